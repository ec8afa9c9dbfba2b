"""Small histories and models that the engine's tests share."""

import numpy as np
import torch

from reclib.config import ModelConfig, TrainConfig
from reclib.data.batches import Epoch
from reclib.data.dataset import Dataset, Evaluation, Histories, Keys, ties
from reclib.model.bert4rec import Bert4Rec
from reclib.train.fit import Options
from reclib.train.losses import batch_loss

NUM_ITEMS = 37


class Stop(Exception):
    """What ends a training in `stop_at`."""


def stop_at(step: int) -> Options:
    """Options that end a training after this step."""

    def on_step(stats):
        if stats.step == step:
            raise Stop

    return Options(on_step=on_step)


def histories(lengths: list[int], seed: int = 0, num_items: int = NUM_ITEMS) -> Histories:
    """Random histories of the given lengths."""
    ends = np.cumsum(lengths)
    items = np.random.default_rng(seed).integers(1, num_items + 1, int(ends[-1])).astype(np.int32)
    return Histories(items, ends - np.asarray(lengths), ends)


def history_of(part: Evaluation, user: int) -> list[int]:
    return part.histories.items[part.histories.starts[user] : part.histories.ends[user]].tolist()


def dataset_of(events: list[list[tuple[int, int]]], num_items: int = NUM_ITEMS, unit: str = "s") -> Dataset:
    """A dataset of each user's (item, time) interactions, put in the order of time."""
    ordered = [sorted(history, key=lambda event: event[1]) for history in events]
    flat = [event for history in ordered for event in history]
    items, times = (np.array([event[n] for event in flat]) for n in (0, 1))
    dataset = Dataset(
        name="made",
        items=items.astype(np.int32),
        offsets=np.cumsum([0, *map(len, ordered)]),
        item_keys=Keys.encode(["", *map(str, range(1, num_items + 1))]),
        user_keys=Keys.encode([f"u{n}" for n in range(len(ordered))]),
        titles={},
        manifest={"fingerprint": "made", "time_unit": unit},
        times=times.astype(np.int64),
    )
    dataset.manifest["ties"] = ties(dataset)
    return dataset


def small_model(**changes: object) -> ModelConfig:
    """A model of a few thousand parameters without dropout."""
    base = {"hidden_dim": 16, "num_heads": 2, "num_layers": 2, "max_len": 12, "dropout": 0.0}
    return ModelConfig(num_items=NUM_ITEMS, **(base | changes))


@torch.no_grad()
def scores_after(model: Bert4Rec, items: list[int]) -> torch.Tensor:
    """Scores of all items after one history, by a forward pass of its own: the items, and MASK at the end."""
    row = torch.tensor([[*items, model.config.mask_id]])
    state = model.encode(row, torch.ones_like(row), torch.arange(row.shape[1])[None])[0, -1:]
    return model.logits(state)[0, 1 : model.config.num_items + 1]


def loss_and_gradients(
    model: ModelConfig, train: TrainConfig, data: Histories, dtype: torch.dtype = torch.float32
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first step of a freshly drawn model."""
    torch.manual_seed(1)
    module = Bert4Rec(model).to(dtype)
    with torch.no_grad():  # biases start at zero, where mistakes in their use do not show
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    micros = Epoch(data, model, train, 0).step(0)
    targets = sum(batch.num_targets for batch in micros)
    total = 0.0
    for batch in micros:
        loss = batch_loss(module, batch, train, targets)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def worst_difference(gradients: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest norm of a difference, per tensor, over max(its norm, 1e-3 of the global norm).

    The key bias has a zero gradient in theory, hence the floor.
    """
    assert gradients.keys() == wanted.keys()
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    norms = {name: torch.maximum(g.norm(), 1e-3 * whole) for name, g in wanted.items()}
    return max(float((gradients[name] - g).norm() / norms[name]) for name, g in wanted.items())
