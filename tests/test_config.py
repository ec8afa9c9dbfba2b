from __future__ import annotations

import dataclasses

import pytest

from reclib.config import (
    LATER,
    SIZES,
    DataConfig,
    InputError,
    ModelConfig,
    TrainConfig,
    as_dict,
    changed,
    model_config,
    validated,
)


def test_configurations_cannot_be_changed():
    config = model_config("tiny")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_dim = 3  # type: ignore[misc]


def test_every_named_size_is_valid_and_has_a_catalogue():
    for size in SIZES:
        config = model_config(size)
        assert config.hidden_dim % config.num_heads == 0
        assert config.mask_id == config.num_items + 1
        assert config.vocab_size == config.num_items + 2


def test_impossible_values_are_told_in_one_line():
    for kind, values, said in [
        (ModelConfig, {"num_items": 0}, "'num_items' is 0"),
        (ModelConfig, {"num_items": 5, "hidden_dim": 10, "num_heads": 3}, "divisible by num_heads=3"),
        (ModelConfig, {"num_items": 5, "dropout": 1.0}, "'dropout' is 1.0"),
        (ModelConfig, {"num_items": 5, "hiden_dim": 3}, "did you mean 'hidden_dim'?"),
        (ModelConfig, {}, "'num_items' is missing"),
        (
            ModelConfig,
            {"num_items": 5, "positions": "sinusoidal", "hidden_dim": 3, "num_heads": 1},
            "even hidden_dim",
        ),
        (DataConfig, {"min_user": "5"}, "'min_user' is '5'"),
        (TrainConfig, {"batch_size": 10, "micro_batch_size": 3}, "multiple of micro_batch_size=3"),
        (TrainConfig, {"learning_rate": float("nan")}, "'learning_rate' is nan"),
        (TrainConfig, {"mask_prob": 0.0}, "'mask_prob' is 0.0"),
        (TrainConfig, {"precision": "half"}, "'bf16'"),
    ]:
        with pytest.raises(InputError) as error:
            validated(kind, values)
        assert said in str(error.value)
        assert "\n" not in str(error.value)


def test_a_copy_is_validated_again():
    config = TrainConfig(batch_size=64)
    assert changed(config, batch_size=32).batch_size == 32
    assert config.batch_size == 64
    with pytest.raises(InputError, match="'batch_size' is 0"):
        changed(config, batch_size=0)
    with pytest.raises(InputError, match="unknown parameter 'batch'"):
        changed(config, batch=3)


def test_fields_that_came_later_are_recorded_where_they_are_not_at_their_default():
    names = {kind: {f.name for f in dataclasses.fields(kind)} for kind in (TrainConfig, DataConfig)}
    assert set(LATER) < set.union(*names.values())
    for kind, fields in names.items():
        assert as_dict(kind()).keys() == fields - set(LATER)
    assert as_dict(TrainConfig(half_copies=True))["half_copies"] is True
    assert as_dict(DataConfig(ties="item"))["ties"] == "item"
    assert as_dict(model_config("nano")) == dataclasses.asdict(model_config("nano"))
