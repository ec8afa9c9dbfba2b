from __future__ import annotations

import pytest

from reclib.config import DataConfig, InputError, ModelConfig, TrainConfig, changed, typed, validated


def test_impossible_values_are_told_in_one_line():
    odd = {"positions": "sinusoidal", "hidden_dim": 3, "num_heads": 1}
    for kind, values, part in [
        (ModelConfig, {"num_items": 0}, "'num_items' is 0"),
        (ModelConfig, {"num_items": 5, "hidden_dim": 10, "num_heads": 3}, "divisible by num_heads=3"),
        (ModelConfig, {"num_items": 5, "hiden_dim": 3}, "did you mean 'hidden_dim'?"),
        (ModelConfig, {}, "'num_items' is missing"),
        (ModelConfig, {"num_items": 5} | odd, "even hidden_dim"),
        (DataConfig, {"min_user": "5"}, "'min_user' is '5'"),
        (TrainConfig, {"batch_size": 10, "micro_batch_size": 3}, "multiple of micro_batch_size=3"),
        (TrainConfig, {"learning_rate": float("nan")}, "'learning_rate' is nan"),
        (TrainConfig, {"seed": 2**64}, "'seed' is 18446744073709551616"),
    ]:
        with pytest.raises(InputError) as error:
            validated(kind, values)
        assert part in str(error.value)
        assert "\n" not in str(error.value)


def test_a_copy_is_validated_again():
    config = TrainConfig(batch_size=64)
    assert changed(config, batch_size=32).batch_size == 32
    assert config.batch_size == 64
    for values, part in (({"batch_size": 0}, "'batch_size' is 0"), ({"batch": 3}, "parameter 'batch'")):
        with pytest.raises(InputError, match=part):
            changed(config, **values)


def test_values_of_the_command_line_are_read_as_papermill_reads_them():
    from papermill.cli import _resolve_type

    for text in ("5", "-4", "1e-3", "0.5", "True", "False", "None", "true", "tiny", "[1, 2]", "a=b", "1_000"):
        assert typed(text) == _resolve_type(text), text
        assert type(typed(text)) is type(_resolve_type(text)), text
