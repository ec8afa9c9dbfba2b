from __future__ import annotations

import numpy as np
import pytest
import torch
from engine import histories

from reclib import hardware
from reclib.config import SIZES, InputError, ModelConfig, TrainConfig, changed, model_config
from reclib.cost import work
from reclib.cost.work import Shapes
from reclib.model.bert4rec import Bert4Rec, count_parameters
from reclib.train import timing
from reclib.train.trainer import Trainer

CPU = hardware.resolve("cpu")
ELECTRONICS = np.full(1000, 8)
CASES = {
    "tied": ({"hidden_dim": 128, "num_items": 3000, "num_heads": 4, "max_len": 50}, {}),
    "untied, post-norm, deep": (
        {"hidden_dim": 256, "num_items": 3000, "num_layers": 4, "tied": False, "norm": "post", "max_len": 50}
        | {"embedding_norm": True, "dropout": 0.25},
        {},
    ),
    "mlp head": (
        {"hidden_dim": 256, "num_items": 9000, "num_layers": 3, "tied": False, "head": "mlp", "max_len": 50},
        {},
    ),
    "causal": (
        {"hidden_dim": 128, "num_items": 3000, "causal": True, "max_len": 50},
        {"objective": "next_item"},
    ),
    "all positions": (
        {"hidden_dim": 128, "num_items": 3000, "max_len": 50},
        {"layout": "padded", "head_rows": "all"},
    ),
}


def small_model(**changes) -> ModelConfig:
    base = {"hidden_dim": 16, "num_heads": 2, "num_layers": 2, "max_len": 12, "dropout": 0.0}
    return ModelConfig(**({"num_items": 37} | base | changes))


def trainer_of(model, train, lengths) -> Trainer:
    torch.manual_seed(0)
    some = histories(list(lengths), num_items=model.num_items)
    return Trainer(Bert4Rec(model), some, train, CPU, "test")


def shapes_of(trainer: Trainer, step: int) -> Shapes:
    """The shapes of the loop's own batch."""
    (batch,) = timing.step_batches(trainer, step)
    places = batch.items.shape[0], batch.query_index.shape[1], len(batch.targets)
    return Shapes(*places, batch.num_targets, batch.num_tokens, batch.num_sequences)


def test_parameters_are_those_of_the_model():
    for size in SIZES:
        model = model_config(size)
        assert sum(work.parameters(model).values()) == count_parameters(model)["total"]


def test_flops_of_the_parts_are_those_that_the_step_executes():
    for case in CASES:
        changes, recipe = CASES[case]
        model, train = small_model(**changes), TrainConfig(batch_size=64, epochs=9, **recipe)
        trainer = trainer_of(model, train, [9] * 128)
        done, _ = timing.step_flops(trainer, 1)
        parts = work.step_parts(model, train, shapes_of(trainer, 1))
        counted = {
            end: sum(p.flops for p in parts if p.name.startswith(end))
            for end in ("encoder", "head: products")
        }
        assert counted["encoder"] == pytest.approx(done.encoder)
        assert counted["head: products"] == pytest.approx(done.head)


def test_micro_batches_multiply_passes_but_not_the_update():
    model, train = small_model(), TrainConfig(batch_size=64)
    one = Shapes(4, 6, 20, 19, 40, 32)
    whole = {p.name: p for p in work.step_parts(model, train, one)}
    split = {p.name: p for p in work.step_parts(model, changed(train, micro_batch_size=32), one)}
    assert split["GELU"].elements == 2 * whole["GELU"].elements
    assert split["encoder: linear maps"].flops == 2 * whole["encoder: linear maps"].flops
    assert split["AdamW"] == whole["AdamW"]


def test_drawn_shapes_are_those_of_the_loop():
    for recipe in [{}, {"layout": "padded"}, {"last_item_share": 0.0, "mask_prob": 0.4}]:
        lengths = np.random.default_rng(1).geometric(0.15, 2000) + 2
        model, train = small_model(max_len=20), TrainConfig(batch_size=64, epochs=9, **recipe)
        trainer = trainer_of(model, train, lengths)
        real = np.mean([shapes_of(trainer, step)[:5] for step in range(1, 25)], axis=0)
        drawn = work.mean_shapes(model, train, lengths)
        assert drawn[:5] == pytest.approx(tuple(real), rel=0.06)


def test_a_sampled_loss_costs_its_negatives_and_not_the_catalogue():
    model, train = small_model(num_items=10_000), TrainConfig(batch_size=64, loss="gbce", num_negatives=256)
    one = Shapes(4, 6, 20, 19, 40, 64)
    head = next(p for p in work.step_parts(model, train, one) if p.name == "head: products")
    assert head.flops == 3 * work.head_forward(model, 20, 257)


def test_memory_is_what_the_profiler_counts():
    for case in CASES:
        changes, recipe = CASES[case]
        model = small_model(**changes)
        train = TrainConfig(batch_size=128, epochs=99, precision="fp32", **recipe)
        trainer = trainer_of(model, train, np.random.default_rng(0).integers(3, 17, 512))
        measured = timing.peak_tensor_bytes(trainer)
        found = work.at_shapes(model, train, shapes_of(trainer, 2), "fp32", "cpu")
        # The buffer of logits is kept from step to step, so the profiler sees it in no step but the first.
        buffer = 0 if train.head_rows == "all" else found.parts["logits"]
        assert found.total - buffer == pytest.approx(measured, rel=0.25)
        assert found.state == 16 * sum(p.numel() for p in trainer.parameters)


def test_memory_grows_with_the_batch_and_with_nothing_else_where_there_is_no_batch():
    model, train = model_config("85m"), TrainConfig(batch_size=128)
    small = work.training_memory(model, train, ELECTRONICS, "bf16")
    large = work.training_memory(model, changed(train, batch_size=1024), ELECTRONICS, "bf16")
    again = work.training_memory(
        model, changed(train, batch_size=1024, micro_batch_size=128), ELECTRONICS, "bf16"
    )
    assert large.parts["activations"] > 5 * small.parts["activations"]
    assert large.state == small.state == 16 * count_parameters(model)["total"]
    assert again.total == small.total


def test_the_largest_batch_fits_and_twice_as_much_does_not():
    model, train = model_config("430m"), TrainConfig(batch_size=1)
    l4 = hardware.catalogue()["l4"].memory_bytes
    size = work.largest_batch(model, train, ELECTRONICS, l4, "bf16")
    work.require_fit(model, changed(train, batch_size=size), ELECTRONICS, l4, "bf16")
    with pytest.raises(InputError, match="does not fit"):
        work.require_fit(model, changed(train, batch_size=2 * size), ELECTRONICS, l4, "bf16")


def test_a_refusal_names_knobs_of_which_each_makes_it_fit():
    model, train = model_config("430m"), TrainConfig(batch_size=4096, precision="fp32")
    room = 16 * hardware.GIB
    with pytest.raises(InputError, match="micro_batch_size=") as refused:
        work.require_fit(model, train, ELECTRONICS, room)
    said = str(refused.value)
    assert "\n" not in said
    micro = int(said.partition("micro_batch_size=")[2].split(",")[0])
    work.require_fit(model, changed(train, micro_batch_size=micro), ELECTRONICS, room)


def test_what_cannot_fit_by_any_one_knob_is_said_so():
    with pytest.raises(InputError, match="take a smaller size"):
        work.require_fit(model_config("430m"), TrainConfig(), ELECTRONICS, 2 * hardware.GIB)


def test_lengths_that_cannot_be_trained_on_are_refused():
    for lengths in [[], [0, 5]]:
        with pytest.raises(InputError, match="history lengths"):
            work.training_memory(small_model(), TrainConfig(), np.array(lengths, dtype=int))


def test_a_label_of_several_boards_has_only_what_they_share():
    assert [board.label for board in hardware.boards("v100")] == ["v100-16", "v100-32"]
    assert hardware.peak_flops("v100", "fp16") == 125e12
    assert hardware.peak_flops("v100", "bf16") is None
    assert hardware.peak_flops("gtx970", "fp32") is None
    with pytest.raises(InputError, match="known: t4"):
        hardware.boards("gtx970")


def test_no_board_has_bf16_below_capability_8():
    for board in hardware.catalogue().values():
        assert ("bf16" in board.peaks) == (board.capability >= (8, 0)), board.label
        assert board.precision() == ("bf16" if board.capability >= (8, 0) else "fp16")
        assert board.source
    with pytest.raises(InputError, match="no units"):
        hardware.catalogue()["t4"].precision("bf16")


def test_logits_are_held_whole_up_to_a_share_of_the_cards_memory():
    assert [work.logits_limit(m) >> 20 for m in (None, 4 << 30, 8 << 30, 80 << 30)] == [
        512,
        512,
        512,
        5120,
    ]
    model, train = model_config("85m"), TrainConfig(batch_size=2048)
    parts = {
        loss: work.training_memory(
            model, changed(train, loss=loss), ELECTRONICS, "bf16", memory_bytes=memory
        ).parts["logits"]
        for loss, memory in (("plain", None), ("chunked", 80 << 30))
    }
    for memory, wanted in ((None, "chunked"), (16 << 30, "chunked"), (80 << 30, "plain")):
        found = work.training_memory(model, train, ELECTRONICS, "bf16", memory_bytes=memory)
        assert found.parts["logits"] == parts[wanted]
