"""What a training run would take, before anybody rents anything: time, memory, cost, and whether it fits.

    python -m reclib plan --size 430m --gpu l4
    python -m reclib plan --size 85m --gpu l4,h100 --adapter ilora --rank 8

Everything here is a prediction and says so. For a CPU that was measured it comes with the error found on rows
that no fit had seen; for a GPU of the catalogue it is `unvalidated`, a range of assumed efficiency. Needs no
torch and no GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from reclib import hardware, system
from reclib.config import SIZES, InputError, ModelConfig, TrainConfig, divided, model_config, validated
from reclib.cost import work
from reclib.cost.work import AdapterPlan, Footprint, Part, training_memory
from reclib.data import dataset
from reclib.hardware import GIB, Board
from reclib.system import Parser

# ------------------------------------------------------------------------------------------------
# Seconds of a training step from its parts: on a CPU by measured rates, on a GPU by its data sheet.
#
# For a CPU of `params/calibration.yaml` each part is divided by the rate that the machine reached in a
# microbenchmark, and five shares, one for each group of parts, were fitted on measured steps. `cpu2` is two
# threads of the CPU that is here; where that was not measured, another stands in and the range is that of
# all.
#
# For a GPU each part is a roofline: the longer of its products at a share of the peak and its bytes at a
# share of the bandwidth. The step is their sum, and no shorter than what the host needs to start its
# operators. Those shares are assumptions, from `params/efficiency.yaml`; they give a range.

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
    file = system.params() / name
    return system.read_yaml(file, any_keys=True) if file.is_file() else {}


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
    here = hardware.cpu_model()
    for model in (here, here.rpartition(" ")[0]):  # of the first one calibrated only the name is known
        if f"{label} {model}" in cpus():
            return cpus()[f"{label} {model}"]
    others = with_threads(label)
    if not others:
        known = ", ".join(cpus()) or "none: run benchmarks/planner.py"
        raise InputError(f"no rates of {label!r} in params/calibration.yaml; measured: {known}")
    name = f"{here}, which was not calibrated: {others[0].name} stands in"
    return replace(others[0], label=label, name=name, stands_among=tuple(others))


# ------------------------------------------------------------------------------------------------

ELECTRONICS = {"users": 582_942, "mean_len": 9.25}  # the seed study's training sequences; its dataset's mean

ENOUGH = 4  # held-out rows of a kind of run from which its plans count as validated

HELD_BACK = 2  # last interactions, for validation and test


@dataclass(frozen=True)
class Plan:
    """One run on one device, predicted."""

    device: str  # label
    name: str
    precision: str
    basis: str  # "validated": error found on held-out rows; "unvalidated": no such row was ever run
    step: Estimate
    flops: Mapping[str, float]  # executed in a step, by part
    bytes_moved: float  # of a step, through main memory
    footprint: Footprint
    peak_bytes: int  # of tensors on a GPU, with its context; resident in the process on a CPU
    process_bytes: int  # beside the tensors: interpreter on a CPU, context on a GPU
    memory_bytes: int | None  # of the device; None: this machine's own
    largest_batch: int | None
    sequences: float  # of a step
    users: int
    price: float | None = None  # per hour
    ways: str = ""  # what would make it fit, where it does not

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None where the device's memory is not known."""
        if self.memory_bytes is None:
            return None
        return self.footprint.total <= work.usable(self.memory_bytes, "cuda")

    @property
    def side_by_side(self) -> int | None:
        """How many such trainings fit on the device at once, each a process of its own."""
        if self.memory_bytes is None:
            return None
        return work.side_by_side(itertools.repeat(self.footprint.total), self.memory_bytes, "cuda")

    @property
    def epoch(self) -> Estimate:
        """Seconds of a pass over the users."""
        times = self.users / self.sequences
        step = self.step
        return Estimate(times * step.seconds, times * step.low, times * step.high, {})

    def cost(self, seconds: float) -> float | None:
        """Return what so many seconds cost."""
        return None if self.price is None else seconds / 3600 * self.price

    def numbers(self) -> dict[str, float | int | None]:
        """Return what a record holds."""
        epoch, step = self.epoch, self.step
        return {
            "step_seconds": step.seconds,
            "step_seconds_low": step.low,
            "step_seconds_high": step.high,
            "sequences_per_second": self.sequences / step.seconds,
            "sequences_per_second_low": self.sequences / step.high,
            "sequences_per_second_high": self.sequences / step.low,
            "epoch_seconds": epoch.seconds,
            "epoch_seconds_low": epoch.low,
            "epoch_seconds_high": epoch.high,
            "peak_memory_bytes": self.peak_bytes,
            "largest_batch": self.largest_batch,
            "fits": None if self.fits is None else int(self.fits),
            "flops": sum(self.flops.values()),
            "bytes_moved": self.bytes_moved,
            "cost_per_epoch": self.cost(epoch.seconds),
        }


def typical_lengths(
    mean_len: float = ELECTRONICS["mean_len"], longest: int = 5000, users: int = 20_000
) -> np.ndarray:
    """Return history lengths for training (users,): geometric, as in `prepare`, the last two held back."""
    drawn = dataset.lengths(users, mean_len, longest, np.random.default_rng(0))
    return np.maximum(drawn - HELD_BACK, 2)


def plans(
    label: str,
    model: ModelConfig,
    train: TrainConfig,
    lengths: np.ndarray,
    users: int | None = None,
    price: float | None = None,
    adapter: AdapterPlan | None = None,
) -> list[Plan]:
    """Return the plan for each board that a label stands for.

    `lengths` are those of the histories trained on; `users` how many there are (as many as lengths);
    `price` is per hour; with `adapter` the model is frozen and only that is trained. Raises
    `InputError` for a device that is neither measured nor in the catalogue, and for a precision that it does
    not have.
    """
    if label.startswith("cpu"):
        return [plan(cpu(label), model, train, lengths, users, price, adapter)]
    return [plan(board, model, train, lengths, users, price, adapter) for board in hardware.boards(label)]


def plan(
    device: Board | Cpu,
    model: ModelConfig,
    train: TrainConfig,
    lengths: np.ndarray,
    users: int | None = None,
    price: float | None = None,
    adapter: AdapterPlan | None = None,
) -> Plan:
    """Return the plan of one training run on one device; arguments are those of `plans`."""
    shapes = work.mean_shapes(model, train, lengths)
    sequences = min(train.batch_size, users or len(lengths))
    precision = (
        _cpu_precision(train.precision) if isinstance(device, Cpu) else device.precision(train.precision)
    )
    width = work.HALF if precision in ("bf16", "fp16") else work.FP32
    parts = work.step_parts(model, train, shapes, width, adapter)
    if isinstance(device, Cpu):
        step = on_cpu(parts, model, device, precision, adapter is not None)
        tried = device.band(adapter is not None, precision)["rows"]
        basis = "validated" if tried >= ENOUGH and not device.stands_among else "unvalidated"
        process, room, kind, largest = device.process_bytes, None, "cpu", None
    else:
        step = on_board(parts, device, precision)
        basis, process, room, kind = "unvalidated", work.CONTEXT_BYTES, device.memory_bytes, "cuda"
        largest = work.largest_batch(model, train, lengths, room, precision, adapter=adapter)
    found = training_memory(model, train, lengths, precision, kind, adapter, room)
    tensors = found.resident(device.heap) if isinstance(device, Cpu) else found.total
    ways = ""
    if room is not None and found.total > work.usable(room, kind) and adapter is None:
        ways = work.ways_to_fit(model, train, lengths, room, precision, kind)
    return Plan(
        device=device.label,
        name=device.name,
        precision=precision,
        basis=basis,
        step=step,
        flops={part.name: part.flops for part in parts if part.flops},
        bytes_moved=sum(part.bytes for part in parts),
        footprint=found,
        peak_bytes=tensors + process,
        process_bytes=process,
        memory_bytes=room,
        largest_batch=largest,
        sequences=sequences,
        users=users or len(lengths),
        price=price,
        ways=ways,
    )


def _cpu_precision(asked: str) -> str:
    if asked not in ("auto", "fp32", "bf16"):
        raise InputError(f"precision {asked!r} on a CPU: not calibrated; allowed: auto, fp32, bf16")
    return "fp32" if asked == "auto" else asked


# -- command line --------------------------------------------------------------------------------------------


def plan_size(
    size: str,
    gpu: str,
    *,
    users: int = int(ELECTRONICS["users"]),
    mean_len: float = ELECTRONICS["mean_len"],
    price: float | None = None,
    adapter: AdapterPlan | None = None,
    **settings: Any,
) -> Plan:
    """Return the plan of training a named size on one device: `plan_size("85m", "l4", price=0.7)`.

    `gpu` is a label of `params/devices.yaml`, or `cpu1` or `cpu2` for this machine; `settings` are fields of
    ModelConfig and TrainConfig. The defaults are those of `python -m reclib plan`.
    """
    shape, train = divided({"batch_size": 512} | settings)
    labels = [gpu] if gpu.startswith("cpu") else [board.label for board in hardware.boards(gpu)]
    if len(labels) > 1:
        raise InputError(f"{gpu!r} stands for {', '.join(labels)}: name one of them")
    _refuse_load(users, mean_len, price)
    configs = model_config(size, **shape), validated(TrainConfig, train)
    return plans(labels[0], *configs, typical_lengths(mean_len), users, price, adapter)[0]


def _refuse_load(users: int, mean_len: float, price: float | None) -> None:
    if users < 1 or not dataset.MIN_LEN <= mean_len < math.inf:
        low = dataset.MIN_LEN
        raise InputError(f"users {users}, mean length {mean_len}: expected at least 1 and at least {low}")
    if price is not None and not 0 <= price < math.inf:
        raise InputError(f"price {price}: expected a number of at least 0")


def report(found: Plan) -> list[str]:
    """Return the plan as lines."""
    step, epoch = found.step, found.epoch
    lines = [
        f"{found.name} ({found.device}), {found.precision}: predicted, {found.basis}",
        f"  step    {step.seconds:10.4f} s ({step.low:.4f} to {step.high:.4f}: {_range(found)})",
        f"  rate    {found.sequences / step.seconds:10,.0f} sequences/s",
        f"  epoch   {epoch.seconds:10,.1f} s ({epoch.low:,.1f} to {epoch.high:,.1f}; {found.users:,} users)",
        f"  memory  {found.peak_bytes / GIB:10.2f} GiB, {found.process_bytes / GIB:.2f} of them no tensors",
    ]
    lines += [f"            {size / GIB:8.2f} {name}" for name, size in found.footprint.parts.items() if size]
    if found.memory_bytes is not None:
        said = "fits" if found.fits else "DOES NOT FIT"
        lines.append(
            f"  {said} into {found.memory_bytes / GIB:.0f} GiB; largest batch {found.largest_batch:,}; "
            f"{found.side_by_side} such runs at once"
        )
        lines += [f"  {found.ways}"] if found.ways else []
    if found.price is not None:
        low, high = found.cost(epoch.low) or 0.0, found.cost(epoch.high) or 0.0
        lines.append(f"  cost    {found.cost(epoch.seconds):10.4f} an epoch ({low:.4f} to {high:.4f})")
    lines.append(
        f"  work    {sum(found.flops.values()) / 1e9:10,.1f} GFLOP, {found.bytes_moved / 1e9:,.2f} GB moved"
    )
    longest = sorted(step.parts.items(), key=lambda part: -part[1])
    lines += [f"            {seconds:8.4f} s {name}" for name, seconds in longest if seconds > 0]
    return lines


def _range(found: Plan) -> str:
    """Say what the range around a step is."""
    if not found.device.startswith("cpu"):
        return "assumed efficiency"
    if found.basis == "validated":
        return "worst error of held-out rows"
    return "worst error of held-out rows, too few of which were such a run"


def _parser() -> argparse.ArgumentParser:
    about, _, rest = (__doc__ or "").partition("\n\n")
    examples, _, more = rest.partition("\n\n")
    parser = Parser(
        prog="python -m reclib plan",
        usage="%(prog)s --size SIZE --gpu GPU [what, how]",
        description=f"{about}\n\n{more.strip()}",
        epilog=f"examples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 26, 110),
    )
    here = "cpu1 and cpu2 are one and two threads of this machine"
    what = parser.add_argument_group("what is trained")
    sizes = ", ".join(name for name in SIZES if not re.fullmatch(r"w\d+d\d+", name))
    what.add_argument("--size", required=True, metavar="SIZE", help=f"{sizes}, or by width and depth: w64d2")
    what.add_argument("--items", type=int, metavar="N", help="catalogue (default: the size's own)")
    tables = what.add_mutually_exclusive_group()
    tables.add_argument("--tied", action="store_true", default=None, help="one table for input and output")
    tables.add_argument("--untied", action="store_false", dest="tied", help="two (default: as the size is)")
    what.add_argument("--max-len", type=int, metavar="N", help="positions of a row (default: the size's own)")
    what.add_argument(
        "--adapter", metavar="KIND", help="freeze the model, train lora, rslora, gated or ilora"
    )
    what.add_argument("--rank", type=int, metavar="R", help="of the adapter (8)")
    what.add_argument("--experts", type=int, metavar="K", help="of ilora (4)")
    what.add_argument(
        "--users", type=int, default=ELECTRONICS["users"], metavar="N", help="of an epoch (%(default)s)"
    )
    what.add_argument(
        "--mean-len",
        type=float,
        default=ELECTRONICS["mean_len"],
        metavar="N",
        help="interactions of a user (%(default)s)",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--batch-size", type=int, default=512, metavar="N", help="sequences of a step (512)")
    how.add_argument(
        "--micro-batch-size", type=int, metavar="N", help="sequences of a forward pass (the batch)"
    )
    how.add_argument("--precision", default="auto", help="auto, fp32, tf32, bf16 or fp16")
    how.add_argument("--layout", default="packed", help="packed or padded")
    how.add_argument("--loss", default="auto", help="auto, plain, chunked, inplace, sampled_softmax or gbce")
    how.add_argument("--negatives", type=int, metavar="N", help="of a sampled loss")
    where = parser.add_argument_group("where, and at what price")
    where.add_argument(
        "--gpu",
        required=True,
        metavar="GPU",
        help=f"one or several with commas, or all: {', '.join(hardware.catalogue())}; {here}",
    )
    where.add_argument("--price", type=float, help="of an hour, in any currency")
    where.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def configured(given: argparse.Namespace) -> tuple[ModelConfig, TrainConfig, AdapterPlan | None]:
    """Return the configurations that the command line asks for."""
    shape = {"num_items": given.items, "max_len": given.max_len, "tied": given.tied}
    model = model_config(given.size, **{name: value for name, value in shape.items() if value is not None})
    names = ("batch_size", "micro_batch_size", "precision", "layout", "loss")
    train = {name: getattr(given, name) for name in names}
    train |= {} if given.negatives is None else {"num_negatives": given.negatives}
    narrow = {"kind": given.adapter, "rank": given.rank, "num_experts": given.experts}
    narrow = {name: value for name, value in narrow.items() if value is not None}
    if narrow and given.adapter is None:
        raise InputError("--rank and --experts are of an adapter: give --adapter as well")
    return model, validated(TrainConfig, train), validated(AdapterPlan, narrow) if narrow else None


def asked_for(given: argparse.Namespace) -> list[Plan]:
    """Return the plans that the command line asks for."""
    model, train, adapter = configured(given)
    _refuse_load(given.users, given.mean_len, given.price)
    lengths = typical_lengths(given.mean_len)
    labels = list(hardware.catalogue()) if given.gpu == "all" else given.gpu.split(",")
    return [
        one
        for label in labels
        for one in plans(label, model, train, lengths, given.users, given.price, adapter)
    ]


def plan_main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the exit code is 1 where it does not fit, 2 for what makes no sense."""
    given = _parser().parse_args(argv)
    try:
        found = asked_for(given)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for one in found:
        about = {"kind": "predicted", "basis": one.basis, "size": given.size, "device": one.device}
        about |= {"precision": one.precision, "batch_size": given.batch_size, "adapter": given.adapter}
        whole: dict[str, Any] = about | one.numbers() | {"memory": dict(one.footprint.parts)}
        whole |= {"side_by_side": one.side_by_side}
        print(json.dumps(whole) if given.json else "\n".join(report(one)))
    return 1 if any(one.fits is False for one in found) else 0


# ------------------------------------------------------------------------------------------------
# What would it cost? One training run asked of one device, or of all of them, in numbers to be shown.
#
# Pure functions over the planner, under the widgets of notebook 07: everything here is a prediction, and
# what it returns says so. Needs no torch.

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


def device_labels() -> list[str]:
    """Return the devices that a plan can be made for: CPUs that were measured, then the catalogue."""
    return [*cpus(), *hardware.catalogue()]


def precisions(device: str) -> list[str]:
    """Return the precisions that a plan for a device can have, `auto` first."""
    board = hardware.catalogue().get(device)
    return ["auto", *(board.peaks if board else ("fp32", "bf16"))]


def plan_of(one: Asked) -> Plan:
    """Return the plan; raise `InputError` for what cannot be planned."""
    given = one.model(), one.train(), lengths(one.mean_len), one.users, one.price, one.narrow()
    return plans(one.device, *given)[0]


def every_plan(one: Asked) -> list[Plan]:
    """Return the plan for every device, in the precision asked for where it has that, else in its own.

    Only the device asked for has a cost: the price is that of one.
    """
    found = []
    for label in device_labels():
        own = {"device": label, "price": one.price if label == one.device else None}
        own |= {} if one.precision in precisions(label) else {"precision": "auto"}
        found.append(plan_of(Asked(**asdict(one) | own)))
    return found


@functools.lru_cache(maxsize=64)
def lengths(mean_len: float) -> np.ndarray:
    """Return history lengths (users,) with this mean; see `planner.typical_lengths`."""
    return typical_lengths(mean_len)


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
