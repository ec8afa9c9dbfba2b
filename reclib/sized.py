"""From the parameters of notebook 03 to its training runs: one recipe and many sizes."""

from __future__ import annotations

from typing import Any

from reclib import tuned
from reclib.config import ModelConfig, TrainConfig, changed, model_config, validated
from reclib.counts import counted
from reclib.data import Dataset
from reclib.experiment import Trained, carried_out
from reclib.footprint import Footprint
from reclib.hardware import Device
from reclib.headroom import demand_room
from reclib.notebook_params import Scaling
from reclib.scaling import learning_rate
from reclib.splits import Split

NOTEBOOK = "03_scaling"


def recipe(p: Scaling, size: str, seed: int) -> TrainConfig:
    """Return a size's training configuration, its learning rate by the rule; nothing tuned."""
    shared = ("epochs", "batch_size", "micro_batch_size", "mask_prob", "last_item_share", "eval_every")
    given: dict[str, Any] = {name: getattr(p, name) for name in shared} | {"window": "random", "seed": seed}
    given |= {"precision": p.precision or "auto", "compile_mode": p.compile_mode or "off"}
    given["learning_rate"] = learning_rate(model_config(size).hidden_dim, p.base_rate)
    return validated(TrainConfig, given)


def configs(p: Scaling, dataset: Dataset, size: str, seed: int) -> tuple[ModelConfig, TrainConfig]:
    """Return a size's configurations: the recipe, and what was tuned for these data on top.

    Raises `InputError` where the tuned settings are of other data.
    """
    shape: dict[str, Any] = {"max_len": p.max_len, "dropout": p.dropout, "num_items": dataset.num_items}
    train = recipe(p, size, seed)
    chosen = _chosen(p, dataset, size)
    if chosen is not None:
        # Tokens and device stay the notebook's, so that sizes can be compared.
        length = {"epochs", "eval_every", "batch_size", "precision"}
        train = changed(train, **{k: v for k, v in chosen.train.items() if k not in length})
        shape |= chosen.model
    return model_config(size, **shape), train


def _chosen(p: Scaling, dataset: Dataset, size: str) -> tuned.Tuned | None:
    return tuned.read(size, dataset.name, dataset.fingerprint) if p.tuned else None


def demand_fit(
    p: Scaling, dataset: Dataset, split: Split, device: Device, size: str, room: int | None = None
) -> Footprint:
    """Return the estimated peak of a size's training; raise `InputError` that says what to change.

    `room` is the memory in bytes, None: what the device has. Nothing is allocated.
    """
    model, train = configs(p, dataset, size, p.seeds[0])
    return demand_room(model, train, split.train, device, room)


def train(p: Scaling, dataset: Dataset, split: Split, device: Device, size: str, seed: int) -> Trained:
    """Train one seed of a size, or go on with a run of the same code and data."""
    model, config = configs(p, dataset, size, seed)
    title = f"{device.label}-{size}-seed{seed}"
    return carried_out(NOTEBOOK, p, dataset, split, device, model, config, title)


def title(p: Scaling, dataset: Dataset, size: str) -> str:
    """Return what a size is called in records and figures: its name, and whether its settings are tuned."""
    return size if _chosen(p, dataset, size) is None else f"{size} (tuned)"


def settings(p: Scaling, dataset: Dataset) -> list[dict[str, Any]]:
    """Return, for each size, the settings that tuning could have changed, and where they are from."""
    rows = []
    for size in p.sizes:
        model, train = configs(p, dataset, size, p.seeds[0])
        chosen = _chosen(p, dataset, size)
        row = {"size": size, "from": "the rule and this notebook's parameters"}
        if chosen is not None:
            by = chosen.chosen_by
            row["from"] = f"{by['study']}, trial {by['trial']} of {by['trials']}, {by['time'][:10]}"
        row |= {name: getattr(train, name) for name in ("learning_rate", "weight_decay", "mask_prob")}
        rows.append(row | {"last_item_share": train.last_item_share, "dropout": model.dropout})
    return rows


def numbers(one: Trained) -> dict[str, float]:
    """Return what a run is recorded with: accuracy, loss, parameters by kind, tokens and FLOPs."""
    return one.best() | one.losses() | counted(one.trainer)
