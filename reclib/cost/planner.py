"""Predicts time, memory and price of a training run on each device.

    python -m reclib plan --size 430m --gpu l4 --epochs 20 --price 0.7
    python -m reclib plan --size 85m --gpu all --price l4=0.7,h100=3 --adapter ilora --rank 8

All numbers are predictions. For a measured CPU or GPU the range is the error on held-out rows; for other GPUs
of the catalogue it is a range of assumed efficiency (`unvalidated`). Needs no torch and no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from reclib import hardware, system
from reclib.config import (
    SIZE_NAMES,
    AdapterConfig,
    InputError,
    ModelConfig,
    TrainConfig,
    divided,
    model_config,
    validated,
)
from reclib.cost import work
from reclib.cost.work import Footprint, Part
from reclib.data import dataset
from reclib.hardware import GIB, Board
from reclib.system import Parser

# -- seconds of a step ---------------------------------------------------------------------------------------
# On a CPU of `params/calibration.yaml` each part is divided by the rate of a microbenchmark; five factors,
# one per group of parts, were fitted on measured steps. On a GPU each part is a roofline: the maximum of its
# FLOPs at a share of the peak and its bytes at a share of the bandwidth. The step is their sum, and at least
# the time in which the host launches operators (not with a CUDA graph, and without those of the optimiser).

CACHE_BYTES = 16 * 2**20  # of a table above which the head's products read main memory
GROUPS = ("products", "attention", "passes", "memory", "operators")
_GROUP = dict.fromkeys(("update", "norm of gradients", "clear", "lookup"), "memory")
_GROUP |= {"product": "products", "attention": "attention"}  # all other kinds: passes


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step: the likely value, its range, and its parts."""

    seconds: float
    low: float
    high: float
    parts: Mapping[str, float]

    def times(self, number: float) -> Estimate:
        """Return the estimate multiplied by `number`, without parts."""
        return Estimate(number * self.seconds, number * self.low, number * self.high, {})

    def named(self, name: str) -> dict[str, float]:
        """Return the three numbers as `name`, `name_low` and `name_high`."""
        return {name: self.seconds, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True)
class Cpu:
    """A measured CPU with a number of threads."""

    label: str  # threads and CPU: "cpu2 AMD EPYC"
    name: str
    rates: Mapping[str, Any]
    shares: Mapping[str, float]  # factors of each group's time at `rates`
    heap: Mapping[str, float]  # factors of resident memory: see `Footprint.resident`
    process_bytes: int  # of interpreter and libraries
    error: Mapping[str, Any]  # of held-out rows: median and worst, time and memory
    shares_of: str = ""  # another CPU that shares and heap were fitted on; "": this one
    stands_among: tuple[Cpu, ...] = ()  # all measured CPUs, if this one stands in for an unmeasured one

    @property
    def threads(self) -> int:
        """Number of threads."""
        return int(self.label.partition(" ")[0].removeprefix("cpu"))

    def precision(self, name: str = "auto") -> str:
        """Return the precision for `name`; raise `InputError` if it was not calibrated."""
        if name not in ("auto", "fp32", "bf16"):
            raise InputError(f"precision {name!r} on a CPU: not calibrated; allowed: auto, fp32, bf16")
        return "fp32" if name == "auto" else name

    def band(self, adapted: bool = False, precision: str = "fp32") -> Mapping[str, Any]:
        """Return the error of held-out rows of this kind of run; by default of training all weights."""
        kind = "adapted" if adapted else precision
        return self.error if kind == "fp32" else self.error.get(kind, {**self.error, "rows": 0})


@functools.cache
def _read(name: str) -> dict[str, Any]:
    file = system.params() / name
    return system.read_yaml(file, any_keys=True) if file.is_file() else {}


@functools.cache
def cpus() -> dict[str, Cpu]:
    """Return the measured CPUs by label: `cpu2 AMD EPYC` is that CPU with two threads."""
    measured = _read("calibration.yaml").items()
    rows = ((f"{threads} {name}", row) for name, devices in measured for threads, row in devices.items())
    return {label: Cpu(label=label, **row) for label, row in rows}


def efficiency() -> dict[str, Any]:
    """Return shares of a GPU's data sheet: assumed `slow`, `likely` and `fast`, and `measured` by board."""
    return _read("efficiency.yaml")


def errors() -> dict[str, Mapping[str, Any]]:
    """Return the error of plans on rows that no fit had seen, by measured device."""
    return {name: cpu.error for name, cpu in cpus().items()} | {
        name: board["error"] for name, board in efficiency()["measured"].items()
    }


def with_threads(threads: str) -> list[Cpu]:
    """Return every measured CPU with the threads of cpu1 or cpu2."""
    return [cpu for label, cpu in cpus().items() if label.partition(" ")[0] == threads]


def cpu(label: str) -> Cpu:
    """Return a measured CPU by its label, or this machine's by its threads (`cpu2`).

    If this machine's CPU was not measured, another stands in, with a range over all measured ones; its name
    states this. Raises `InputError` if no CPU was measured with this number of threads.
    """
    model = hardware.cpu_model()
    for name in (label, f"{label} {model}", f"{label} {model.rpartition(' ')[0]}"):  # the last: one old row's
        if name in cpus():
            return cpus()[name]
    measured = with_threads(label)
    if not measured:
        known = ", ".join(cpus()) or "none: run benchmarks/planner.py"
        raise InputError(f"no rates of {label!r} in params/calibration.yaml; measured: {known}")
    name = f"{model}, which was not calibrated: {measured[0].name} stands in"
    return replace(measured[0], label=label, name=name, stands_among=tuple(measured))


def interpolated(by_shape: Mapping[Any, float], x: float) -> float:
    """Interpolate a rate between measured shapes, logarithmic in both, constant beyond them."""
    shapes = sorted(by_shape, key=float)
    logs = np.log([float(shape) for shape in shapes]), np.log([by_shape[shape] for shape in shapes])
    return float(np.exp(np.interp(np.log(x), *logs)))


def cpu_groups(
    parts: Sequence[Part], model: ModelConfig, rates: Mapping[str, Any], precision: str = "fp32"
) -> dict[str, float]:
    """Return the seconds of a step in fp32 or bf16 by group of parts, at the machine's rates alone."""
    groups = dict.fromkeys(GROUPS, 0.0)
    for part in parts:
        if part.kind == "product":
            wide = part.name.startswith("head") and 4 * part.shape[1] * part.shape[2] > CACHE_BYTES
            by_width = rates[f"{'head' if wide else 'product'} {precision}"]
            seconds = part.flops / interpolated(by_width, part.shape[1])
        elif part.kind == "attention":
            seconds = part.elements / interpolated(rates["attention"], model.max_len)
        elif part.kind == "clear":  # in fp32 sinks clear the touched rows only
            seconds = 0.0 if precision == "fp32" else part.bytes / rates["bandwidth"]
        elif part.kind == "logits":  # three passes through memory without the in-place buffer
            seconds = 3 * part.elements / rates["softmax"]
        else:
            seconds = part.elements / rates[part.kind]
        groups[_GROUP.get(part.kind, "passes")] += seconds
        groups["operators"] += part.operators * rates["operator"]
    return groups


def on_cpu(
    parts: Sequence[Part], model: ModelConfig, cpu: Cpu, precision: str = "fp32", adapted: bool = False
) -> Estimate:
    """Return the step on a measured CPU; the range is the worst error of held-out rows.

    If it stands in for an unmeasured one, the range includes those of all measured CPUs.
    """
    groups = cpu_groups(parts, model, cpu.rates, precision)
    seconds = {name: cpu.shares[name] * groups[name] for name in GROUPS}
    total, worst = sum(seconds.values()), cpu.band(adapted, precision)["time_worst"]
    among = [on_cpu(parts, model, other, precision, adapted) for other in cpu.stands_among]
    low = min([total / (1 + worst), *(other.low for other in among)])
    return Estimate(total, low, max([total * (1 + worst), *(other.high for other in among)]), seconds)


def roofline(
    parts: Sequence[Part], board: Board, precision: str, share: Mapping[str, Any], captured: bool = False
) -> tuple[dict[str, float], float]:
    """Return the seconds of each part on a GPU at shares of its data sheet, and those of the host.

    A share may depend on the precision; the default is bf16's, but fp32's for `operator_us` of tf32, which
    needs no casts. `captured` is a step in one CUDA graph, whose operators are not launched by the host.
    """
    of_peak = _of_precision(share["products"], precision, "bf16")
    operator_us = _of_precision(share["operator_us"], precision, "fp32" if precision == "tf32" else "bf16")
    peak, bandwidth = board.peaks[precision] * of_peak, board.bandwidth * share["bandwidth"]
    device = {part.name: max(part.flops / peak, part.bytes / bandwidth) for part in parts}
    started = sum(part.operators for part in parts if part.kind != "update")
    return device, 0.0 if captured else 1e-6 * operator_us * started


def _of_precision(share: float | Mapping[str, float], precision: str, other: str) -> float:
    """Return a share, or of shares by precision this one's, or else another's."""
    return share.get(precision, share[other]) if isinstance(share, Mapping) else share


def on_board(parts: Sequence[Part], board: Board, precision: str, captured: bool = False) -> Estimate:
    """Return the step on a GPU of the catalogue, by shares of its data sheet.

    For a measured board they are fitted, and the range is the worst error of held-out rows; for others they
    are assumed.
    """
    measured = efficiency()["measured"].get(board.label)
    shares = [measured] if measured else [efficiency()[name] for name in ("likely", "fast", "slow")]
    pairs = [roofline(parts, board, precision, share, captured) for share in shares]
    seconds = [max(sum(device.values()), host) for device, host in pairs]
    device, host = pairs[0]
    device_parts = device | {"waiting for the host": max(0.0, host - sum(device.values()))}
    if measured:
        worst = 1 + measured["error"]["time_worst"]
        return Estimate(seconds[0], seconds[0] / worst, seconds[0] * worst, device_parts)
    likely, fast, slow = seconds
    return Estimate(likely, fast, slow, device_parts)


# -- plans ---------------------------------------------------------------------------------------------------

ELECTRONICS = {"users": 582_942, "mean_len": 9.25}  # the seed study's training sequences; its dataset's mean
ENOUGH = 4  # held-out rows of a kind of run from which its plans count as validated
HELD_BACK = 2  # last interactions, for validation and test
RUN = "run"  # part of the memory that is no tensor: interpreter and libraries, or CUDA's context
_COUNTS = ("flops", "bytes_moved", "peak_memory_bytes", "largest_batch", "fits")


@dataclass(frozen=True)
class Plan:
    """One run on one device, predicted."""

    device: str  # label
    name: str
    precision: str
    basis: str  # "validated" on held-out rows, or "unvalidated"
    step: Estimate
    parameters: int
    trained_parameters: int  # those of the adapter, if there is one
    flops: float  # executed in a step
    bytes_moved: float  # in a step, through main memory
    footprint: Footprint
    peak_bytes: int  # GPU: tensors and context; CPU: resident in the process
    process_bytes: int  # without tensors: interpreter on a CPU, context on a GPU
    memory_bytes: int | None  # of a GPU; None for a CPU, as are the next three
    largest_batch: int | None
    fits: bool | None
    side_by_side: int | None  # number of such trainings on the device at once, each its own process
    ways: str  # advice if it does not fit
    sequences: int  # per step
    users: int
    price: float | None  # per hour

    @property
    def epoch(self) -> Estimate:
        """Seconds of a pass over the users."""
        return self.step.times(self.users / self.sequences)

    def cost(self, seconds: float) -> float | None:
        """Return the cost of a time in seconds."""
        return None if self.price is None else seconds / 3600 * self.price

    def numbers(self) -> dict[str, float | int | None]:
        """Return the numbers of a record."""
        step, n = self.step, self.sequences
        rate = Estimate(n / step.seconds, n / step.high, n / step.low, {})
        return {
            **step.named("step_seconds"),
            **rate.named("sequences_per_second"),
            **self.epoch.named("epoch_seconds"),
            "peak_memory_bytes": self.peak_bytes,
            "largest_batch": self.largest_batch,
            "fits": None if self.fits is None else int(self.fits),
            "flops": self.flops,
            "bytes_moved": self.bytes_moved,
            "cost_per_epoch": self.cost(self.epoch.seconds),
        }

    def counts(self) -> dict[str, Any]:
        """Return the metrics of a record: counts and memory."""
        return {k: v for k, v in self.numbers().items() if k in _COUNTS and v is not None}

    def timings(self) -> dict[str, Any]:
        """Return the timings of a record: seconds, rates and cost, with their ranges."""
        return {k: v for k, v in self.numbers().items() if k not in _COUNTS and v is not None}

    def memory_parts(self) -> dict[str, int]:
        """Return the bytes of the peak by part; on a CPU `activations` are their resident bytes."""
        parts = {name: size for name, size in self.footprint.parts.items() if size}
        held = self.peak_bytes - self.process_bytes - sum(parts.values()) + parts.get("activations", 0)
        return parts | {"activations": held, RUN: self.process_bytes}


@functools.lru_cache(maxsize=64)
def typical_lengths(mean_len: float = ELECTRONICS["mean_len"]) -> np.ndarray:
    """Return lengths of training histories (users,): geometric, as in `prepare`, less `HELD_BACK`."""
    drawn = dataset.lengths(20_000, mean_len, 5000, np.random.default_rng(0))
    return np.maximum(drawn - HELD_BACK, 2)


def plan(
    device: Board | Cpu,
    model: ModelConfig,
    train: TrainConfig,
    lengths: np.ndarray,
    users: int | None = None,
    price: float | None = None,
    adapter: AdapterConfig | None = None,
) -> Plan:
    """Return the plan of one training run on one device.

    `lengths` are those of the training histories; `users` is their number (default: that of `lengths`);
    `price` is per hour; with `adapter` only the adapter is trained. Raises `InputError` for a precision that
    the device does not support.
    """
    precision = device.precision(train.precision)
    shapes = work.mean_shapes(model, train, lengths)
    parts = work.step_parts(model, train, shapes, work.number_bytes(precision), adapter)
    kind, room = ("cpu", None) if isinstance(device, Cpu) else ("cuda", device.memory_bytes)

    def memory(model: ModelConfig, train: TrainConfig) -> Footprint:
        return work.training_memory(model, train, lengths, precision, kind, adapter, room)

    parameters = sum(work.parameters(model).values())
    footprint = memory(model, train)
    total, largest, fits, at_once, ways = footprint.total, None, None, None, ""
    if isinstance(device, Cpu):
        step = on_cpu(parts, model, device, precision, adapter is not None)
        tried = device.band(adapter is not None, precision)["rows"]
        basis = "validated" if tried >= ENOUGH and not device.stands_among else "unvalidated"
        process, total = device.process_bytes, footprint.resident(device.heap)
    else:
        step = on_board(parts, device, precision, train.compile_mode == "graph")
        basis = "validated" if device.label in efficiency()["measured"] else "unvalidated"
        process = work.CONTEXT_BYTES
        usable = work.usable(device.memory_bytes, kind)
        fits, at_once = total <= usable, int(work.USABLE * device.memory_bytes) // (total + process)
        largest = work.largest_batch(lambda train: memory(model, train).total, train, usable)
        if not fits and adapter is None:
            ways = work.ways_to_fit(lambda *pair: memory(*pair).total, model, train, usable)
    return Plan(
        device=device.label,
        name=device.name,
        precision=precision,
        basis=basis,
        step=step,
        parameters=parameters,
        trained_parameters=parameters if adapter is None else work.trained_parameters(model, adapter),
        flops=sum(part.flops for part in parts if part.flops),
        bytes_moved=sum(part.bytes for part in parts),
        footprint=footprint,
        peak_bytes=total + process,
        process_bytes=process,
        memory_bytes=room,
        largest_batch=largest,
        fits=fits,
        side_by_side=at_once,
        ways=ways,
        sequences=min(train.batch_size, users or len(lengths)),
        users=users or len(lengths),
        price=price,
    )


def precisions(label: str) -> list[str]:
    """Return the precisions of a device, `auto` first."""
    board = hardware.catalogue().get(label)
    return ["auto", *(board.peaks if board else ("fp32", "bf16"))]


def plans(
    label: str, model: ModelConfig, train: TrainConfig, lengths: np.ndarray, *arguments: Any, **options: Any
) -> list[Plan]:
    """Return the plan for each device of a label: a measured CPU, or one or several boards.

    The arguments are those of `plan`. Raises `InputError` for an unknown label.
    """
    devices: Sequence[Board | Cpu] = [cpu(label)] if label.startswith("cpu") else hardware.boards(label)
    return [plan(device, model, train, lengths, *arguments, **options) for device in devices]


def priced(plans: Sequence[Plan], price: float | str | None) -> list[Plan]:
    """Return the plans with prices per hour: a number for all, or "l4=0.7,a100=3" for some devices."""
    if price is None:
        return list(plans)
    prices = hourly(str(price).split(","))
    if unused := set(prices) - {name for plan in plans for name in _names(plan.device)}:
        planned = ", ".join(plan.device for plan in plans)
        raise InputError(f"price of {', '.join(unused)}: no such device is planned for; planned: {planned}")
    return [replace(plan, price=price_of(prices, plan.device)) for plan in plans]


def hourly(pairs: Sequence[str]) -> dict[str, float]:
    """Return prices per hour from "l4=0.7"; a number alone is that of every device, under ""."""
    prices = {}
    for pair in pairs:
        label, _, number = pair.strip().rpartition("=")
        try:
            prices[label] = float(number)
        except ValueError:
            prices[label] = math.nan
        if not 0 <= prices[label] < math.inf:
            raise InputError(f"price {pair}: expected a number of at least 0, or one a device: l4=0.7,h100=3")
    return prices


def price_of(prices: Mapping[str, float], device: str) -> float | None:
    """Return a device's price: its own, or that of its label, as a100 of a100-80, or of every device."""
    return next((prices[name] for name in _names(device) if name in prices), None)


def _names(device: str) -> tuple[str, str, str]:
    return device, re.split("[- ]", device)[0], ""


def plan_sizes(
    size: str,
    gpu: str,
    *,
    users: int = int(ELECTRONICS["users"]),
    mean_len: float = ELECTRONICS["mean_len"],
    price: float | str | None = None,
    adapter: AdapterConfig | None = None,
    **settings: Any,
) -> list[Plan]:
    """Return the plans of training a named size on `gpu`: labels with commas between them, or `all`.

    `price` is that of `priced`; `settings` are fields of ModelConfig and TrainConfig.
    """
    shape, recipe = divided({"batch_size": 512} | settings)
    model, train = model_config(size, **shape), validated(TrainConfig, recipe)
    low = dataset.MIN_LEN
    if users < 1 or not low <= mean_len < math.inf:
        raise InputError(f"users {users}, mean length {mean_len}: expected at least 1 and at least {low}")
    labels, lengths = gpu.replace("all", ",".join(hardware.catalogue())).split(","), typical_lengths(mean_len)
    planned = [plan for label in labels for plan in plans(label, model, train, lengths, users, None, adapter)]
    return priced(planned, price)


def plan_size(size: str, gpu: str, **settings: Any) -> Plan:
    """Return the plan of training a named size on one device: `plan_size("85m", "l4", price=0.7)`.

    `gpu` is a label of `params/devices.yaml`, or `cpu1` or `cpu2` for this machine; `settings` are those of
    `plan_sizes`. The defaults are those of `python -m reclib plan`.
    """
    planned = plan_sizes(size, gpu, **settings)
    if len(planned) > 1:
        raise InputError(f"{gpu!r} stands for {', '.join(plan.device for plan in planned)}: name one of them")
    return planned[0]


# -- command line --------------------------------------------------------------------------------------------


def report(
    plans: Plan | Sequence[Plan], what: str = "one run", epochs: int = 1, currency: str = "cost"
) -> list[str]:
    """Return plans as a table of at most 110 columns, a row for each; of a single one also its parts."""
    plans = [plans] if isinstance(plans, Plan) else plans
    rows, run = [], "epoch" if epochs == 1 else f"{epochs} epochs"
    for plan in plans:
        duration = plan.epoch.times(epochs)
        size, unit = next(pair for pair in _UNITS if duration.seconds < 120 * pair[0] or pair == _UNITS[-1])
        row = {"device": plan.device, "type": plan.precision, "step ms": f"{1e3 * plan.step.seconds:,.1f}"}
        row["seq/s"] = f"{plan.sequences / plan.step.seconds:,.0f}"
        row |= {run: _ranged(duration.times(1 / size)) + f" {unit}", "GiB": f"{plan.peak_bytes / GIB:.1f}"}
        if plan.memory_bytes is not None:
            row["GiB"] += f" of {plan.memory_bytes / GIB:.0f}"
            row["largest batch"] = f"{plan.largest_batch:,}" if plan.fits else "DOES NOT FIT"
        if plan.price is not None:
            row[currency] = _ranged(duration.times(plan.price / 3600))
        rows.append(row)
    lines = [
        f"Predicted: {what}, {run} of {plans[0].users:,} users; in brackets the range,",
        "the worst error of held-out rows of a measured device, assumed efficiency (unvalidated) of others.",
        *pd.DataFrame(rows).fillna("-").to_string(index=False).splitlines(),
    ]
    if len(plans) == 1:
        (plan,) = plans
        parts = sorted(plan.step.parts.items(), key=lambda item: -item[1])
        memory, weights = plan.memory_parts().items(), f"{plan.parameters:,} parameters"
        if plan.trained_parameters != plan.parameters:
            weights += f", frozen; {plan.trained_parameters:,} of an adapter are trained"
        lines += [weights, f"{plan.name}, {plan.precision}: predicted, {plan.basis}", plan.ways]
        lines += ["memory, GiB (run: no tensors):", *(f"{size / GIB:10.2f} {name}" for name, size in memory)]
        lines += ["step, ms:", *(f"{1e3 * seconds:10.2f} {name}" for name, seconds in parts if seconds > 0)]
        lines += [f"{plan.flops / 1e9:10,.1f} GFLOP and {plan.bytes_moved / 1e9:,.2f} GB moved"]
        if plan.side_by_side:
            lines += [f"{plan.side_by_side:10} such runs fit on it at once"]
    return [line for line in lines if line]


_UNITS = ((1, "s"), (60, "min"), (3600, "h"), (86_400, "days"))


def _ranged(estimate: Estimate) -> str:
    return f"{estimate.seconds:,.3g} ({estimate.low:,.3g} to {estimate.high:,.3g})"


def _parser() -> argparse.ArgumentParser:
    summary, _, body = (__doc__ or "").partition("\n\n")
    examples, _, details = body.partition("\n\n")
    parser = Parser(
        prog="python -m reclib plan",
        usage="%(prog)s --size SIZE --gpu GPU [what, how]",
        description=f"{summary}\n\n{details.strip()}",
        epilog=f"examples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 26, 110),
        argument_default=argparse.SUPPRESS,
    )
    boards = f"{', '.join(hardware.catalogue())}; cpu1 and cpu2 are one and two threads of this machine"
    users, mean_len = ELECTRONICS.values()
    group = parser.add_argument_group("what is trained")
    group.add_argument("--size", required=True, help=f"one of {SIZE_NAMES}")
    group.add_argument("--items", type=int, dest="num_items", help="catalogue (default: the size's own)")
    group.add_argument("--tied", action="store_const", const=True, help="one table for input and output")
    group.add_argument("--untied", action="store_const", const=False, dest="tied", help="two of them")
    group.add_argument("--max-len", type=int, help="positions of a row (default: the size's own)")
    group.add_argument("--adapter", dest="kind", help="freeze the model, train lora, rslora, gated or ilora")
    group.add_argument("--rank", type=int, help="of the adapter (8)")
    group.add_argument("--experts", type=int, dest="num_experts", help="of ilora (4)")
    group.add_argument("--users", type=int, help=f"of an epoch ({users})")
    group.add_argument("--mean-len", type=float, help=f"interactions of a user ({mean_len})")
    group = parser.add_argument_group("how")
    group.add_argument("--epochs", type=int, default=1, help="of the whole run (1)")
    group.add_argument("--batch-size", type=int, default=512, help="sequences of a step (512)")
    group.add_argument("--micro-batch-size", type=int, help="sequences of a forward pass (the batch)")
    group.add_argument("--precision", help="auto, fp32, tf32, bf16 or fp16")
    group.add_argument("--layout", help="packed or padded")
    group.add_argument("--loss", help="auto, plain, chunked, inplace, sampled_softmax or gbce")
    group.add_argument("--negatives", type=int, dest="num_negatives", help="of a sampled loss")
    group = parser.add_argument_group("where, and at what price")
    group.add_argument("--gpu", required=True, help=f"one or several with commas, or all: {boards}")
    group.add_argument("--price", help="of an hour: a number, or one for each device: l4=0.7,h100=3")
    group.add_argument("--currency", default="USD", help="of the price (USD)")
    group.add_argument("--json", action="store_true", default=False, help="one JSON object a line")
    return parser


def plan_main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the exit code is 1 if it does not fit."""
    options = vars(_parser().parse_args(argv))
    as_json, epochs, currency = options.pop("json"), options.pop("epochs"), options.pop("currency")
    narrow: dict[str, Any] = {
        name: options.pop(name) for name in ("kind", "rank", "num_experts") if name in options
    }
    if narrow and "kind" not in narrow:
        raise InputError("--rank and --experts are of an adapter: give --adapter as well")
    if epochs < 1:
        raise InputError(f"--epochs {epochs}: expected 1 or more")
    planned = plan_sizes(**options, adapter=validated(AdapterConfig, narrow) if narrow else None)
    if not as_json:
        title = f"{options['size']}, batch {options['batch_size']:,}"
        print("\n".join(report(planned, title, epochs, currency)))
    for plan in planned if as_json else ():
        run = plan.epoch.seconds * epochs
        row = {"kind": "predicted", "basis": plan.basis, "size": options["size"], "device": plan.device}
        row |= {"precision": plan.precision, "batch_size": options["batch_size"]}
        row["adapter"] = narrow.get("kind")
        row |= plan.numbers() | {"memory": dict(plan.footprint.parts), "side_by_side": plan.side_by_side}
        row |= {"epochs": epochs, "run_seconds": run, "run_cost": plan.cost(run), "currency": currency}
        print(json.dumps(row))
    return 1 if any(plan.fits is False for plan in planned) else 0
