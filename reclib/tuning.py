"""Tuning files: `params/tuning/<name>.yaml`, read and checked, and the configurations of a trial."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from reclib import paths
from reclib.config import DataConfig, InputError, ModelConfig, TrainConfig, model_config, validated
from reclib.tuned import Tuned

SPACES = ({"low", "high"}, {"low", "high", "log"}, {"choices"})


@dataclass(frozen=True)
class Plan:
    """A tuning file, read."""

    name: str
    about: str
    data: DataConfig
    size: str
    seed: int  # of the sampler and of every trial's run
    trials: int
    minutes: float  # of one call: no trial is begun later
    model: dict[str, Any]
    train: dict[str, Any]
    space: dict[str, dict[str, Any]]  # a field of TrainConfig, or model.<field>: low, high, log or choices
    seeds: tuple[int, ...]  # of the comparison


def read(name: str) -> Plan:
    """Read `params/tuning/<name>.yaml`; raise `InputError` for what it may not say."""
    file = paths.params() / "tuning" / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise InputError(f"unknown tuning {name!r}; known: {known}")
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    allowed = set(Plan.__dataclass_fields__) - {"name"}
    for key in sorted(given.keys() ^ allowed):
        raise InputError(f"{file.name}: {'unknown' if key in given else 'missing'} key {key!r}")
    for field, space in given["space"].items():
        if not isinstance(space, dict) or set(space) not in SPACES:
            raise InputError(f"{file.name}, space of {field!r}: expected low and high (and log), or choices")
    data, seeds = validated(DataConfig, given["data"]), tuple(given["seeds"])
    plan = Plan(**{"name": name, **given, "data": data, "seeds": seeds})
    ends = {field: space.get("low", space.get("choices", [None])[0]) for field, space in plan.space.items()}
    try:
        configs(plan, 10, ends)
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from None
    return plan


def settings(plan: Plan, drawn: Mapping[str, Any]) -> Tuned:
    """Return the recipe with the drawn fields in it."""
    shape = {k.removeprefix("model."): v for k, v in drawn.items() if k.startswith("model.")}
    rest = {k: v for k, v in drawn.items() if not k.startswith("model.")}
    return Tuned(plan.model | shape, plan.train | rest, {})


def configs(plan: Plan, num_items: int, drawn: Mapping[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    """Return the configurations of a trial."""
    chosen = settings(plan, drawn)
    train = validated(TrainConfig, chosen.train | {"seed": plan.seed})
    shape = {"num_items": num_items, "causal": train.objective == "next_item"} | chosen.model
    return model_config(plan.size, **shape), train


def default(plan: Plan) -> dict[str, Any]:
    """Return the recipe's own values of the fields of the space; empty where the space leaves one out."""
    model, train = configs(plan, 10, {})
    values = {
        field: getattr(model, field.removeprefix("model.")) if "." in field else getattr(train, field)
        for field in plan.space
    }
    return values if all(_within(plan.space[field], value) for field, value in values.items()) else {}


def _within(space: Mapping[str, Any], value: Any) -> bool:
    return value in space["choices"] if "choices" in space else space["low"] <= value <= space["high"]
