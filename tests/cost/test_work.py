"""FLOPs, bytes and memory that are planned for, against what torch counts on real models."""

import numpy as np
import pytest
import torch
from conftest import refused
from small_models import histories, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reclib import hardware
from reclib.config import AdapterConfig, ModelConfig, TrainConfig, changed, model_config
from reclib.cost import work
from reclib.cost.work import Shapes
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel
from reclib.train import timing
from reclib.train.trainer import Trainer

CPU = hardware.resolve("cpu")
ELECTRONICS = np.full(1000, 8)
LORA, GATED = AdapterConfig(kind="lora", rank=8), AdapterConfig(kind="gated", rank=3)
ILORA = AdapterConfig(kind="ilora", rank=6, num_experts=3)
POST = {"tied": False, "norm": "post", "embedding_norm": True, "num_layers": 3}
EVERYWHERE = {"layout": "padded", "head_rows": "all"}
CASES: list[tuple[dict, dict, list[AdapterConfig | None]]] = [
    ({}, {}, [None, LORA, GATED, ILORA]),
    ({"num_layers": 1}, {}, [None, ILORA]),
    (POST | {"head": "mlp", "dropout": 0.25}, {}, [None, GATED]),
    ({"causal": True}, {"objective": "next_item"}, [None, LORA]),
    ({"table_dim": 6}, {}, [None, LORA]),
    ({"head": "mlp", "num_layers": 1}, {"optimizer": "muon"}, [None]),
    (POST | {"table_dim": 20, "head": "mlp"}, EVERYWHERE, [None, ILORA]),
    ({}, EVERYWHERE, [None, ILORA]),
    ({}, {"visible_targets": True}, [None]),
]


def trainer_of(model: ModelConfig, train: TrainConfig, lengths, adapter: AdapterConfig | None = None):
    torch.manual_seed(0)
    module = Bert4Rec(model)
    if adapter is not None:
        module = AdaptedModel(module)
        module.add("a", adapter)
    return Trainer(module, histories(list(lengths), num_items=model.num_items), train, CPU, "test")


def shapes_of(trainer: Trainer, step: int) -> Shapes:
    """The shapes of the loop's own batch."""
    (batch,) = timing.step_batches(trainer, step)
    places = batch.items.shape[0], batch.query_index.shape[1], len(batch.targets)
    return Shapes(*places, batch.num_targets, batch.num_tokens)


def test_flops_of_the_parts_are_those_that_torch_counts_and_the_step_executes():
    for changes, recipe, adapters in CASES:
        model = small_model(**changes)
        train = TrainConfig(batch_size=32, epochs=9, precision="fp32", **recipe)
        for adapter in adapters:
            trainer = trainer_of(model, train, [9] * 64, adapter)
            parts = work.step_parts(model, train, shapes_of(trainer, 1), adapter=adapter)
            loop = trainer.steps()
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                next(loop)
            loop.close()
            assert counter.get_total_flops() == pytest.approx(sum(part.flops for part in parts), rel=1e-9)
            if adapter is None:
                done, _ = timing.step_flops(trainer, 1)
                encoder = sum(part.flops for part in parts if part.name.startswith("encoder"))
                head = next(part.flops for part in parts if part.name == "head: products")
                assert (encoder, head) == pytest.approx(done)
            else:
                trained = sum(p.numel() for p in trainer.parameters)
                assert work.trained_parameters(model, adapter) == trained


def test_micro_batches_sampled_losses_and_adapters_change_their_parts_alone():
    model, train, shapes = small_model(), TrainConfig(batch_size=64), Shapes(4, 6, 20, 19, 40)

    def parts(train: TrainConfig, adapter: AdapterConfig | None = None) -> dict[str, work.Part]:
        return {part.name: part for part in work.step_parts(model, train, shapes, adapter=adapter)}

    whole, split = parts(train), parts(changed(train, micro_batch_size=32))
    assert split["GELU"].elements == 2 * whole["GELU"].elements
    assert split["encoder: linear maps"].flops == 2 * whole["encoder: linear maps"].flops
    assert split["AdamW"] == whole["AdamW"]
    sampled = parts(changed(train, loss="gbce", num_negatives=256))
    assert sampled["head: products"].flops == 3 * work.head_forward(model, 20, 257)
    adapted = parts(train, LORA)
    assert adapted["head: products"].flops == pytest.approx(2 / 3 * whole["head: products"].flops)
    assert adapted["AdamW"].elements == work.trained_parameters(model, LORA)
    assert adapted["GELU"] == whole["GELU"]


def test_drawn_shapes_are_those_of_the_loop():
    lengths = np.random.default_rng(1).geometric(0.15, 2000) + 2
    for recipe in [{}, {"layout": "padded"}, {"last_item_share": 0.0, "mask_prob": 0.4}]:
        model, train = small_model(max_len=20), TrainConfig(batch_size=64, epochs=9, **recipe)
        trainer = trainer_of(model, train, lengths)
        real = np.mean([shapes_of(trainer, step) for step in range(1, 25)], axis=0)
        assert work.mean_shapes(model, train, lengths) == pytest.approx(tuple(real), rel=0.06)
    for lengths in [[], [0, 5]]:
        refused("history lengths", work.training_memory, model, train, np.array(lengths, dtype=int))


def test_memory_is_what_the_profiler_counts():
    wide = {"num_items": 3000, "max_len": 50}
    lengths = np.random.default_rng(0).integers(3, 17, 512)
    for changes, recipe, adapter in [
        ({"hidden_dim": 128, "num_heads": 4}, {}, None),
        ({"hidden_dim": 128, "dropout": 0.25} | POST, {}, None),
        ({"hidden_dim": 256, "num_items": 9000, "tied": False, "head": "mlp"}, {}, None),
        ({"hidden_dim": 128, "causal": True}, {"objective": "next_item"}, None),
        ({"hidden_dim": 64}, EVERYWHERE, None),
        ({"hidden_dim": 128, "num_layers": 3, "tied": False}, {}, ILORA),
    ]:
        model = changed(small_model(), **(wide | changes))
        train = TrainConfig(batch_size=64, epochs=99, precision="fp32", **recipe)
        trainer = trainer_of(model, train, lengths, adapter)
        measured = timing.peak_tensor_bytes(trainer)
        size = work.training_memory(model, train, shapes_of(trainer, 2), "fp32", "cpu", adapter)
        # The buffer of logits is kept from step to step, so the profiler sees it in no step but the first.
        buffer = 0 if train.head_rows == "all" else size.parts["logits"]
        assert size.total - buffer == pytest.approx(measured, rel=0.2)
        trained = sum(p.numel() for p in trainer.parameters)
        assert size.parts["weights"] == 4 * sum(p.numel() for p in trainer.model.parameters())
        assert size.parts["gradients"] + size.parts["optimizer"] == 12 * trained


def test_memory_grows_with_the_batch_of_one_pass_alone():
    model, train = model_config("85m"), TrainConfig(batch_size=128)
    more = changed(train, batch_size=1024)
    recipes = (train, more, changed(more, micro_batch_size=128))
    small, large, split = (work.training_memory(model, recipe, ELECTRONICS, "bf16") for recipe in recipes)
    assert large.parts["activations"] > 5 * small.parts["activations"]
    assert large.parts["optimizer"] == small.parts["optimizer"]
    assert split.total == small.total


def test_the_largest_batch_fits_and_twice_as_much_does_not():
    model, train, l4 = model_config("430m"), TrainConfig(), hardware.catalogue()["l4"].memory_bytes

    def total(train: TrainConfig) -> int:
        return work.training_memory(model, train, ELECTRONICS, "bf16", memory_bytes=l4).total

    size = work.largest_batch(total, train, work.usable(l4, "cuda"))
    work.require_fit(model, changed(train, batch_size=size), ELECTRONICS, l4, "bf16")
    twice = changed(train, batch_size=2 * size)
    refused("does not fit", work.require_fit, model, twice, ELECTRONICS, l4, "bf16")


def test_a_refusal_names_changes_of_which_each_makes_it_fit_or_says_that_none_does():
    model, train, room = model_config("430m"), TrainConfig(batch_size=4096, precision="fp32"), 16 * 2**30
    message = refused("micro_batch_size=", work.require_fit, model, train, ELECTRONICS, room)
    ways = message.partition("makes it fit: ")[2].split(", ")
    assert len(ways) > 1
    for name, value in (way.split("=") for way in ways):
        fields = {name: True if name == "tied" else value if name == "loss" else int(value)}
        smaller = changed(model, **fields) if name in ("tied", "hidden_dim") else model
        recipe = train if smaller is not model else changed(train, **fields)
        work.require_fit(smaller, recipe, ELECTRONICS, room)
    refused("take a smaller size", work.require_fit, model, TrainConfig(), ELECTRONICS, 2 * 2**30)


def test_logits_are_held_whole_up_to_a_share_of_the_cards_memory():
    limits = [work.logits_limit(memory) >> 20 for memory in (None, 4 << 30, 8 << 30, 80 << 30)]
    assert limits == [512, 512, 512, 5120]
    model, train = model_config("85m"), TrainConfig(batch_size=2048)

    def logits(loss: str, memory: int | None) -> int:
        recipe = changed(train, loss=loss)
        return work.training_memory(model, recipe, ELECTRONICS, "bf16", memory_bytes=memory).parts["logits"]

    for memory, route in ((None, "chunked"), (16 << 30, "chunked"), (80 << 30, "plain")):
        assert logits("auto", memory) == logits(route, memory)
