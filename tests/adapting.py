"""Adapted small models that the tests of adapters share."""

import torch
from small_models import histories, small_model

from reclib.config import AdapterConfig, TrainConfig
from reclib.data.batches import Batch, Epoch
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel

KINDS = ("lora", "rslora", "gated", "ilora")
EVERYTHING = ("qkv", "attention_out", "ffn_up", "ffn_down", "head", "item_table")
UNTIED = {"tied": False, "head": "mlp"}


def base(seed: int = 0, **changes: object) -> Bert4Rec:
    """A small model whose biases are not zero."""
    torch.manual_seed(seed)
    model = Bert4Rec(small_model(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def stir(adapted: AdaptedModel, seed: int = 1) -> AdaptedModel:
    """Move every adapter and gate away from where it starts, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


def adapted(kind: str = "ilora", model: Bert4Rec | None = None, **changes: object) -> AdaptedModel:
    """A small model with a stirred adapter."""
    adapted = AdaptedModel(base(**UNTIED) if model is None else model)
    adapted.add("default", AdapterConfig(kind=kind, **({"rank": 8, "alpha": 16.0} | changes)))
    return stir(adapted).eval()


def first_batch(lengths: tuple[int, ...] = (9, 4, 12, 7, 3, 8, 5, 6), **changes: object) -> Batch:
    """The first batch of some histories."""
    train = TrainConfig(batch_size=len(lengths), **({"mask_prob": 0.3} | changes))
    return Epoch(histories(list(lengths)), small_model(), train, 0).step(0)[0]


def rows_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.items, batch.segment_ids, batch.positions


@torch.no_grad()
def scores(model: Bert4Rec | AdaptedModel, batch: Batch, everywhere: bool = False) -> torch.Tensor:
    """Scores (M, V) at the targets, by way of the queries as in training, or of the states `everywhere`."""
    states = model.encode(*rows_of(batch), None if everywhere else batch.query_index).flatten(0, 1)
    places = batch.target_places if everywhere else batch.target_slots
    return model.logits(states[places[: batch.num_targets]])
