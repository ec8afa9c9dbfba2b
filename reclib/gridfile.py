"""Experiment files: `params/grids/<name>.yaml`, read and checked to the last arm before anything is trained.

A file states a dataset, a size and a recipe, and arms that change some of it. It may bar one arm until a
prediction of it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reclib import paths
from reclib.config import DataConfig, InputError, ModelConfig, TrainConfig, model_config, validated
from reclib.data import Dataset
from reclib.splits import Split, global_time, leave_one_out, random_users

SPLITS: dict[str, Callable[[Dataset], Split]] = {
    "leave_one_out": leave_one_out,
    "global_time": global_time,
    "random_users": random_users,
}


@dataclass(frozen=True)
class Arm:
    """One configuration of a grid."""

    name: str
    model: dict[str, Any]  # fields of ModelConfig, the catalogue apart
    train: dict[str, Any]  # fields of TrainConfig, the seed apart
    size: str  # a name of config.SIZES
    split: str  # a name of SPLITS
    seeds: tuple[int, ...]
    final: bool  # scored on the test split


@dataclass(frozen=True)
class Predicts:
    """Which arm may not start before it is predicted, and from which it is."""

    of: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """An experiment file, read."""

    name: str
    about: str
    notebook: str  # that draws it
    data: DataConfig
    arms: tuple[Arm, ...]
    predicts: Predicts | None = None


def read(name: str) -> Grid:
    """Read `params/grids/<name>.yaml`; raise `InputError` for what it may not say."""
    file = paths.params() / "grids" / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise InputError(f"unknown grid {name!r}; known: {known}")
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    allowed = {"about", "notebook", "data", "size", "seeds", "model", "train", "arms"}
    for key in (given.keys() - {"predicts"}) ^ allowed:
        raise InputError(f"{file.name}: {'unknown' if key in given else 'missing'} key {key!r}")
    arms = tuple(_arm(file, given, arm, own or {}) for arm, own in given["arms"].items())
    data = validated(DataConfig, given["data"])
    predicts = _predicts(file, given["predicts"], given["arms"]) if "predicts" in given else None
    grid = Grid(name, given["about"], given["notebook"], data, arms, predicts)
    for arm in arms:  # a mistake in the last arm is told before the first is trained
        configs(grid, arm, num_items=10, seed=0)
    return grid


def _predicts(file: Path, given: Mapping[str, Any], arms: Mapping[str, Any]) -> Predicts:
    if not isinstance(given, dict) or given.keys() != {"of", "from"} or not isinstance(given["from"], list):
        raise InputError(f"{file.name}: predicts is {given!r}: expected an arm `of`, a list of arms `from`")
    for arm in [given["of"], *given["from"]]:
        if arm not in arms:
            raise InputError(f"{file.name}: predicts names {arm!r}, which is no arm; arms: {', '.join(arms)}")
    if given["of"] in given["from"]:
        raise InputError(f"{file.name}: predicts {given['of']!r} from itself")
    return Predicts(given["of"], tuple(given["from"]))


def _arm(file: Path, given: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> Arm:
    allowed = ("final", "model", "seeds", "size", "split", "train")
    for key in own.keys() - set(allowed):
        raise InputError(f"{file.name}, arm {name!r}: unknown key {key!r}; allowed: {', '.join(allowed)}")
    split = own.get("split", "leave_one_out")
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise InputError(f"{file.name}, arm {name!r}: unknown split {split!r}; allowed: {known}")
    return Arm(
        name,
        given["model"] | own.get("model", {}),
        given["train"] | own.get("train", {}),
        own.get("size", given["size"]),
        split,
        tuple(own.get("seeds", given["seeds"])),
        bool(own.get("final", False)),
    )


def configs(grid: Grid, arm: Arm, num_items: int, seed: int) -> tuple[ModelConfig, TrainConfig]:
    """Return the configurations of a run; raise `InputError` that names the arm."""
    try:
        train = validated(TrainConfig, arm.train | {"seed": seed})
        shape = {"num_items": num_items, "causal": train.objective == "next_item"} | arm.model
        return model_config(arm.size, **shape), train
    except InputError as error:
        raise InputError(f"{grid.name}.yaml, arm {arm.name!r}: {error}") from None
