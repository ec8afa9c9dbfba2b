"""Seconds of a training step from its parts: on a CPU by measured rates, on a GPU by its data sheet.

For a CPU of `params/calibration.yaml` each part is divided by the rate that the machine reached in a
microbenchmark, and five shares, one for each group of parts, were fitted on measured steps. `cpu2` is two
threads of the CPU that is here; where that was not measured, another stands in and the range is that of all.

For a GPU each part is a roofline: the longer of its products at a share of the peak and its bytes at a share
of the bandwidth. The step is their sum, and no shorter than what the host needs to start its operators. Those
shares are assumptions, from `params/efficiency.yaml`; they give a range.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml

from reclib import paths, provenance
from reclib.config import InputError, ModelConfig
from reclib.devices import Board
from reclib.workload import Part

CACHE_BYTES = 16 * 2**20  # of a table above which the head's products are those over main memory
GROUPS = ("products", "attention", "passes", "memory", "operators")
_GROUP = {
    "product": "products",
    "attention": "attention",
    "update": "memory",
    "norm of gradients": "memory",
    "clear": "memory",
    "lookup": "memory",
}


@dataclass(frozen=True)
class Cpu:
    """A CPU with some threads, as measured."""

    label: str  # threads and CPU: "cpu2 AMD EPYC"
    name: str
    rates: Mapping[str, Any]
    shares: Mapping[str, float]  # of each group's time by rates alone; below 1: faster than there
    heap: Mapping[str, float]  # how many times what layers hold stays resident
    process_bytes: int  # of interpreter and libraries
    error: Mapping[str, Any]  # of held-out rows: median and worst, time and memory
    shares_of: str = ""  # another CPU that shares and heap were fitted on; "": this one
    stands_among: tuple[Cpu, ...] = ()  # the CPUs measured, where none of them is the one asked for

    def band(self, adapted: bool = False, precision: str = "fp32") -> Mapping[str, Any]:
        """Return the error of held-out rows of this kind of run; of training all weights where none was."""
        kind = "adapted" if adapted else precision
        return self.error if kind == "fp32" else self.error.get(kind, {**self.error, "rows": 0})

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return int(self.label.partition(" ")[0].removeprefix("cpu"))


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step: what is likely, the range around it, and where it goes."""

    seconds: float
    low: float
    high: float
    parts: Mapping[str, float]


def _read(name: str) -> dict[str, Any]:
    file = paths.params() / name
    return yaml.safe_load(file.read_text("utf-8")) if file.is_file() else {}


@functools.cache
def cpus() -> dict[str, Cpu]:
    """Return the CPUs that were measured, by label: `cpu2 AMD EPYC` is that one with two threads."""
    found = {}
    for model, devices in _read("calibration.yaml").items():
        for threads, given in devices.items():
            label = f"{threads} {model}"
            found[label] = Cpu(label=label, **given)
    return found


@functools.cache
def efficiency() -> dict[str, Any]:
    """Return the assumed shares of a GPU's data sheet: slow, likely, fast, and their source."""
    return _read("efficiency.yaml")


def interpolated(by_shape: Mapping[Any, float], at: float) -> float:
    """Return a rate between two measured shapes, logarithmic in both; beyond them the nearest one's."""
    shapes = sorted(by_shape, key=float)
    logs = np.log([float(shape) for shape in shapes]), np.log([by_shape[shape] for shape in shapes])
    return float(np.exp(np.interp(np.log(at), *logs)))


def cpu_groups(
    parts: Sequence[Part], model: ModelConfig, rates: Mapping[str, Any], precision: str = "fp32"
) -> dict[str, float]:
    """Return the seconds of a step in fp32 or bf16 by group of parts, at the machine's rates alone."""
    found = dict.fromkeys(GROUPS, 0.0)
    for part in parts:
        found[_GROUP.get(part.kind, "passes")] += _cpu_seconds(part, model, rates, precision)
        found["operators"] += part.operators * rates["operator"]
    return found


def _cpu_seconds(part: Part, model: ModelConfig, rates: Mapping[str, Any], precision: str) -> float:
    if part.kind == "product":
        wide = part.name.startswith("head") and 4 * part.shape[1] * part.shape[2] > CACHE_BYTES
        by_width = rates[f"{'head' if wide else 'product'} {precision}"]
        return part.flops / interpolated(by_width, part.shape[1])
    if part.kind == "attention":
        return part.elements / interpolated(rates["attention"], model.max_len)
    if part.kind == "clear":  # in fp32 sinks clear the rows that were touched and no others
        return 0.0 if precision == "fp32" else part.bytes / rates["bandwidth"]
    if part.kind == "logits":  # three passes through memory where the loss has no buffer of its own
        return 3 * part.elements / rates["softmax"]
    return part.elements / rates[part.kind]


def on_cpu(
    parts: Sequence[Part], model: ModelConfig, cpu: Cpu, precision: str = "fp32", adapted: bool = False
) -> Estimate:
    """Return the step on a measured CPU; the range is the worst error of rows held out.

    Where it stands in for one that was not measured, the range holds those of all that were.
    """
    groups = cpu_groups(parts, model, cpu.rates, precision)
    seconds = {name: cpu.shares[name] * groups[name] for name in GROUPS}
    whole, worst = sum(seconds.values()), cpu.band(adapted, precision)["time_worst"]
    among = [on_cpu(parts, model, one, precision, adapted) for one in cpu.stands_among]
    low = min([whole / (1 + worst), *(one.low for one in among)])
    return Estimate(whole, low, max([whole * (1 + worst), *(one.high for one in among)]), seconds)


def on_board(parts: Sequence[Part], board: Board, precision: str) -> Estimate:
    """Return the step on a GPU of the catalogue, by assumed shares of its data sheet: unvalidated."""
    peak = board.peaks[precision]
    ranged = {name: _roofline(parts, peak, board, efficiency()[name]) for name in ("fast", "likely", "slow")}
    fast, likely, slow = (max(sum(device.values()), host) for device, host in ranged.values())
    device, host = ranged["likely"]
    waiting = max(0.0, host - sum(device.values()))
    return Estimate(likely, fast, slow, device | {"waiting for the host": waiting})


def roofline(parts: Sequence[Part], board: Board, precision: str, share: Mapping[str, float]) -> float:
    """Return the seconds of a step on a GPU at given shares of its data sheet."""
    device, host = _roofline(parts, board.peaks[precision], board, share)
    return max(sum(device.values()), host)


def _roofline(
    parts: Sequence[Part], peak: float, board: Board, share: Mapping[str, float]
) -> tuple[dict[str, float], float]:
    device = {
        part.name: max(
            part.flops / (peak * share["products"]), part.bytes / (board.bandwidth * share["bandwidth"])
        )
        for part in parts
    }
    return device, 1e-6 * share["operator_us"] * sum(part.operators for part in parts)


def with_threads(threads: str) -> list[Cpu]:
    """Return every measured CPU with so many threads: cpu1, cpu2."""
    return [one for label, one in cpus().items() if label.partition(" ")[0] == threads]


def cpu(label: str) -> Cpu:
    """Return a measured CPU by its label, or by threads alone (`cpu2`) the one that is here.

    Where the CPU that is here was not measured, another stands in: its name says so, and its range is that of
    all that were. Raises `InputError` where nothing was measured with so many threads.
    """
    if label in cpus():
        return cpus()[label]
    here = provenance.cpu_model()
    for model in (here, here.rpartition(" ")[0]):  # of the first one calibrated only the name is known
        if f"{label} {model}" in cpus():
            return cpus()[f"{label} {model}"]
    others = with_threads(label)
    if not others:
        known = ", ".join(cpus()) or "none: run benchmarks/planner.py"
        raise InputError(f"no rates of {label!r} in params/calibration.yaml; measured: {known}")
    name = f"{here}, which was not calibrated: {others[0].name} stands in"
    return replace(others[0], label=label, name=name, stands_among=tuple(others))
