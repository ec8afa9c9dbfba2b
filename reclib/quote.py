"""What would it cost? One training run asked of one device, or of all of them, in numbers to be shown.

Pure functions over the planner, under the widgets of notebook 07: everything here is a prediction, and what
it returns says so. Needs no torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import yaml

from reclib import adapter_plan, devices, planner, steptime, workload
from reclib.adapter_plan import AdapterPlan
from reclib.config import ModelConfig, TrainConfig, model_config, validated
from reclib.devices import GIB
from reclib.notebook_params import Explore
from reclib.planner import Plan
from reclib.steptime import Estimate

PREFIX = "plan_"  # of the notebook's parameters
RUN = "run"  # of what is no tensor: interpreter and libraries, or CUDA's context


@dataclass(frozen=True)
class Asked:
    """A training run and the device that it is to be planned for."""

    device: str  # of the catalogue, or a CPU that was measured
    size: str
    items: int | None  # catalogue; None: the size's own
    mean_len: float  # interactions of a user
    max_len: int
    batch_size: int
    precision: str
    adapter: str  # none: all weights are trained; else the kind of `AdapterPlan`, on a frozen model
    rank: int  # of the adapter
    tied: bool
    users: int  # histories of an epoch
    price: float | None  # of an hour of the device, in any currency

    def model(self) -> ModelConfig:
        """Return the model; raise `InputError` for one that cannot be."""
        given = {} if self.items is None else {"num_items": self.items}
        return model_config(self.size, max_len=self.max_len, tied=self.tied, **given)

    def narrow(self) -> AdapterPlan | None:
        """Return the adapter that is trained, None where all weights are."""
        if self.adapter == "none":
            return None
        return validated(AdapterPlan, {"kind": self.adapter, "rank": self.rank})

    def train(self) -> TrainConfig:
        """Return the training configuration."""
        return validated(TrainConfig, {"batch_size": self.batch_size, "precision": self.precision})


def asked(p: Explore) -> Asked:
    """Return what the notebook's parameters ask for."""
    return Asked(**{name: getattr(p, PREFIX + name) for name in Asked.__dataclass_fields__})


def as_parameters(one: Asked) -> str:
    """Return what was asked as YAML, a parameter file of the notebook: `papermill ... -f FILE`."""
    return yaml.safe_dump({PREFIX + k: v for k, v in asdict(one).items()}, sort_keys=False).strip()


def device_labels() -> list[str]:
    """Return the devices that a plan can be made for: CPUs that were measured, then the catalogue."""
    return [*steptime.cpus(), *devices.catalogue()]


def precisions(device: str) -> list[str]:
    """Return the precisions that a plan for a device can have, `auto` first."""
    board = devices.catalogue().get(device)
    return ["auto", *(board.peaks if board else ("fp32", "bf16"))]


def plan(one: Asked) -> Plan:
    """Return the plan; raise `InputError` for what cannot be planned."""
    given = one.model(), one.train(), lengths(one.mean_len), one.users, one.price, one.narrow()
    return planner.plans(one.device, *given)[0]


def every_plan(one: Asked) -> list[Plan]:
    """Return the plan for every device, in the precision asked for where it has that, else in its own.

    Only the device asked for has a cost: the price is that of one.
    """
    found = []
    for label in device_labels():
        own = {"device": label, "price": one.price if label == one.device else None}
        own |= {} if one.precision in precisions(label) else {"precision": "auto"}
        found.append(plan(Asked(**asdict(one) | own)))
    return found


@functools.lru_cache(maxsize=64)
def lengths(mean_len: float) -> np.ndarray:
    """Return history lengths (users,) with this mean; see `planner.typical_lengths`."""
    return planner.typical_lengths(mean_len)


def memory_parts(found: Plan) -> dict[str, int]:
    """Return the bytes of the peak by part; they add up to it.

    On a CPU what layers hold is what stays resident of it in the process.
    """
    parts = {name: size for name, size in found.footprint.parts.items() if size}
    held = found.peak_bytes - found.process_bytes - sum(parts.values()) + parts.get("activations", 0)
    return parts | {"activations": held, RUN: found.process_bytes}


def about(one: Asked, found: Plan) -> dict[str, Any]:
    """Return a record's own parameters: what was asked, and what the device makes of it."""
    given = asdict(one) | {"items": one.model().num_items, "device": found.device}
    given |= {"precision": found.precision, "basis": found.basis}
    del given["price"]
    return given | {"status": "does not fit" if found.fits is False else "ok"}


def counted(found: Plan) -> dict[str, Any]:
    """Return a record's metrics: what follows from the configuration and the device's memory."""
    names = ("flops", "bytes_moved", "peak_memory_bytes", "largest_batch", "fits")
    numbers = found.numbers()
    return {name: numbers[name] for name in names if numbers[name] is not None}


def timed(found: Plan) -> dict[str, Any]:
    """Return a record's timings: seconds, rates and cost, with the ends of their ranges."""
    counts = counted(found)
    return {k: v for k, v in found.numbers().items() if k not in counts and v is not None}


def series(found: Plan) -> dict[str, list[Any]]:
    """Return a record's series: the peak by part."""
    parts = memory_parts(found)
    return {"part": list(parts), "bytes": list(parts.values())}


def table(one: Asked, plans: Sequence[Plan]) -> pd.DataFrame:
    """Return plans as the table that their records would give: a row for each part of the peak."""
    rows = []
    for found in plans:
        columns = about(one, found) | counted(found) | timed(found) | {"kind": "predicted"}
        rows += [columns | {"part": part, "bytes": size} for part, size in memory_parts(found).items()]
    return pd.DataFrame(rows)


# -- for people ----------------------------------------------------------------------------------------------


def summary(one: Asked, found: Plan) -> str:
    """Return the plan as a few lines of HTML: what it is, and the numbers that one asks for first."""
    model, narrow = one.model(), one.narrow()
    count = sum(workload.parameters(model).values())
    what = f"{_count(count)} parameters"
    if narrow is not None:
        trained = adapter_plan.trained_parameters(model, narrow)
        what = f"{_count(trained)} of {what} trained: {one.adapter}, rank {one.rank}"
    title = (
        f"<b>{escape(one.size)}</b> ({what}) on <b>{escape(found.name)}</b>, {found.precision}: "
        f"<b>predicted, {found.basis}</b> (ranges: {_range(found)})"
    )
    cells = {
        "step": _ranged(found.step),
        "rate": f"{found.sequences / found.step.seconds:,.0f} sequences/s",
        f"epoch of {_count(found.users)} users": _ranged(found.epoch),
        "memory at the peak": _fits(found),
        "cost of an epoch": _cost(found),
    }
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in cells)
    body = "".join(f'<td style="text-align:left">{value}</td>' for value in cells.values())
    ways = f"<p>{escape(found.ways)}</p>" if found.ways else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>"
    return f"<p>{title}</p>{table}{ways}"


def _range(found: Plan) -> str:
    if found.device in devices.catalogue():
        return "assumed efficiency"
    said = "worst error of rows that no fit had seen"
    return said if found.basis == "validated" else f"{said}, too few of which were such a run"


def _fits(found: Plan) -> str:
    used = f"{found.peak_bytes / GIB:.2f} GiB"
    if found.memory_bytes is None:
        return f"<b>{used}</b>, resident in the process"
    said = "fits" if found.fits else "DOES NOT FIT"
    largest = (
        f"largest batch {found.largest_batch:,}" if found.largest_batch else "not even a batch of 1 fits"
    )
    return f"<b>{used}</b> of {found.memory_bytes / GIB:.0f}: <b>{said}</b>; {largest}"


def _cost(found: Plan) -> str:
    if found.price is None:
        return "no price given"
    low, likely, high = (
        found.cost(s) or 0.0 for s in (found.epoch.low, found.epoch.seconds, found.epoch.high)
    )
    return f"<b>{likely:.3g}</b> ({low:.3g} to {high:.3g})"


def _ranged(time: Estimate) -> str:
    return f"<b>{duration(time.seconds)}</b> ({duration(time.low)} to {duration(time.high)})"


def duration(seconds: float) -> str:
    """Return seconds with two or three digits and a unit that suits them."""
    for limit, unit, size in ((0.9995, "ms", 1e-3), (120, "s", 1), (7200, "min", 60), (2e5, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.3g} days"


def _count(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:,.0f}"
