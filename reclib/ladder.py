"""From the step of the study that this one started from to ours: one changed field at a time.

The first rung re-creates that study's step: focal cross-entropy over every position that is not padding, rows
padded to their full length, logits at all of them, dropout on attention, an optimiser that takes one tensor
at a time. Every other rung changes a single field of the configuration, so that what it gives is its own.
Which positions are masked is drawn as in ours on every rung; the cost does not depend on it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from reclib.config import ModelConfig, TrainConfig, changed

SEED_MODEL: dict[str, Any] = {"attention_dropout": 0.1}
SEED_TRAIN: dict[str, Any] = {
    "objective": "seed_focal",
    "layout": "padded",
    "head_rows": "all",
    "optimizer": "loop",
    "loss": "plain",
    "precision": "fp32",
    "compile_mode": "off",
}


@dataclass(frozen=True)
class Rung:
    """A step of the ladder: the configurations that it trains with, and what it changed."""

    name: str
    change: str  # "field=value"
    model: ModelConfig
    train: TrainConfig


# Name, field and value of each change after the seed study's step. "auto" routes are resolved per device.
CHANGES: tuple[tuple[str, str, Any], ...] = (
    ("masked positions only", "objective", "cloze"),
    ("no dropout on attention", "attention_dropout", 0.0),
    ("gather before the head", "head_rows", "targets"),
    ("packed rows", "layout", "packed"),
    ("fused AdamW", "optimizer", "fused"),
    ("loss in place or in chunks", "loss", "auto"),
)


def ladder(model: ModelConfig, train: TrainConfig, more: tuple[tuple[str, str, Any], ...] = ()) -> list[Rung]:
    """Return the rungs, the seed study's step first; `more` changes follow the last (precision, compile)."""
    model, train = changed(model, **SEED_MODEL), changed(train, **SEED_TRAIN)
    rungs = [Rung("seed study's step", "", model, train)]
    in_model = {field.name for field in dataclasses.fields(model)}
    for name, key, value in (*CHANGES, *more):
        if key in in_model:
            model = changed(model, **{key: value})
        else:
            train = changed(train, **{key: value})
        rungs.append(Rung(name, f"{key}={value}", model, train))
    return rungs
