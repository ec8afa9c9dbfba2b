"""What a training run would take, before anybody rents anything: time, memory, cost, and whether it fits.

    python -m reclib.planner --size 430m --gpu l4
    python -m reclib.planner --size 85m --gpu a100 --batch-size 512 --price 2.5 --json
    python -m reclib.planner --size 85m --gpu l4,h100 --adapter ilora --rank 8
    python -m reclib.planner --size 85m --gpu h100 --items 10000000 --tied --loss sampled_softmax

Everything here is a prediction and says so. For a CPU that was measured it comes with the error found on rows
that no fit had seen; for a GPU of the catalogue it is `unvalidated`, a range of assumed efficiency. Needs no
torch and no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reclib import devices, footprint, steptime, synthetic, workload
from reclib.adapter_plan import AdapterPlan
from reclib.command import Parser, exit_code
from reclib.config import SIZES, InputError, ModelConfig, TrainConfig, model_config, validated
from reclib.devices import GIB, Board
from reclib.footprint import Footprint, memory, require_fit
from reclib.steptime import Cpu, Estimate

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
        return self.footprint.total <= footprint.usable(self.memory_bytes, "cuda")

    @property
    def side_by_side(self) -> int | None:
        """How many such trainings fit on the device at once, each a process of its own."""
        if self.memory_bytes is None:
            return None
        return footprint.side_by_side(itertools.repeat(self.footprint.total), self.memory_bytes, "cuda")

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
    """Return history lengths for training (users,): geometric, as in `synthetic`, the last two held back."""
    drawn = synthetic.lengths(users, mean_len, longest, np.random.default_rng(0))
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
        return [plan(steptime.cpu(label), model, train, lengths, users, price, adapter)]
    return [plan(board, model, train, lengths, users, price, adapter) for board in devices.boards(label)]


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
    shapes = workload.mean_shapes(model, train, lengths)
    sequences = min(train.batch_size, users or len(lengths))
    precision = (
        _cpu_precision(train.precision) if isinstance(device, Cpu) else device.precision(train.precision)
    )
    width = workload.HALF if precision in ("bf16", "fp16") else workload.FP32
    parts = workload.step_parts(model, train, shapes, width, adapter)
    if isinstance(device, Cpu):
        step = steptime.on_cpu(parts, model, device, precision, adapter is not None)
        tried = device.band(adapter is not None, precision)["rows"]
        basis = "validated" if tried >= ENOUGH and not device.stands_among else "unvalidated"
        process, room, kind, largest = device.process_bytes, None, "cpu", None
    else:
        step = steptime.on_board(parts, device, precision)
        basis, process, room, kind = "unvalidated", footprint.CONTEXT_BYTES, device.memory_bytes, "cuda"
        largest = footprint.largest_batch(model, train, lengths, room, precision, adapter=adapter)
    found = memory(model, train, lengths, precision, kind, adapter, room)
    tensors = found.resident(device.heap) if isinstance(device, Cpu) else found.total
    ways = ""
    if room is not None and found.total > footprint.usable(room, kind) and adapter is None:
        ways = footprint.ways_to_fit(model, train, lengths, room, precision, kind)
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
        prog="python -m reclib.planner",
        usage="%(prog)s --size SIZE --gpu GPU [what, on what, how]",
        description=f"{about}\n\n{more.strip()}",
        epilog=f"examples:\n{examples}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 26, 100),
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
    data = parser.add_argument_group("on what")
    data.add_argument(
        "--users", type=int, default=ELECTRONICS["users"], metavar="N", help="of an epoch (%(default)s)"
    )
    data.add_argument(
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
        help=f"one or several with commas, or all: {', '.join(devices.catalogue())}; {here}",
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
    if given.users < 1 or (given.price is not None and given.price < 0):
        raise InputError(f"--users {given.users}, --price {given.price}: expected at least 1, at least 0")
    if given.mean_len < synthetic.MIN_LEN:
        raise InputError(f"--mean-len {given.mean_len}: expected at least {synthetic.MIN_LEN}")
    lengths = typical_lengths(given.mean_len)
    labels = list(devices.catalogue()) if given.gpu == "all" else given.gpu.split(",")
    return [
        one
        for label in labels
        for one in plans(label, model, train, lengths, given.users, given.price, adapter)
    ]


def main(argv: Sequence[str] | None = None) -> int:
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


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
