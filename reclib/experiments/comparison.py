"""The same training step on many devices: measured here, recorded elsewhere, predicted, or published.

Each is a row that says which of these it is; nothing measured and nothing predicted share a row. A row is
closed where all devices do the same (fp32, eager), open where each takes what suits it (its own precision).
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from reclib import hardware, records, system
from reclib.config import InputError, ModelConfig, TrainConfig, changed, model_config, validated
from reclib.cost import planner, work
from reclib.cost.planner import Plan
from reclib.cost.work import AdapterPlan
from reclib.data.batches import Epoch
from reclib.data.dataset import Dataset, Histories
from reclib.data.prepare import synthetic_dataset, train_histories
from reclib.hardware import CPU_THREADS, GIB, Device, usable_cores
from reclib.model.bert4rec import Bert4Rec
from reclib.parameters import AmpCompile, Hardware
from reclib.system import Parser
from reclib.train import timing
from reclib.train.losses import batch_loss
from reclib.train.timing import EPOCHS, measure
from reclib.train.trainer import Trainer


@dataclass(frozen=True)
class Row:
    """One size on one device."""

    own_params: dict[str, Any]  # size, device, precision, rule (closed or open), basis
    metrics: dict[str, Any]  # what any run of it counts
    timings: dict[str, Any]
    card: dict[str, Any] | None = None  # of a device that is not here


def model_of(p: Hardware, size: str) -> ModelConfig:
    """Return a size on its own catalogue, with the notebook's rows."""
    return model_config(size, max_len=p.max_len)


def train_of(p: Hardware, precision: str, **changes: Any) -> TrainConfig:
    """Return the notebook's training configuration in a precision."""
    given = {"seed": p.seed, "batch_size": p.batch_size, "epochs": EPOCHS, "precision": precision}
    return validated(TrainConfig, given | changes)


def prices(p: Hardware) -> dict[str, float]:
    """Return the price per hour by device, from "device=price"; raise `InputError` for anything else."""
    found = {}
    for pair in p.prices:
        label, _, price = pair.partition("=")
        try:
            found[label] = float(price)
        except ValueError:
            raise InputError(f"prices: {pair!r} is no device=price, such as l4=0.7") from None
        if found[label] < 0:
            raise InputError(f"prices: {pair!r}: a price is at least 0")
    return found


def price_of(p: Hardware, label: str) -> float | None:
    """Return a device's price; a board's is its own or that of the label it belongs to."""
    given = prices(p)
    return given.get(label, given.get(label.partition("-")[0]))


# -- measured here -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads: a CPU with one and one with two are two devices."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def here(p: Hardware, device: Device) -> list[str]:
    """Return the devices of this machine: a GPU, or the CPU with one and with two threads.

    A run under the label of one of these two is of that one alone.
    """
    if device.torch_device.type == "cuda" or device.label in CPU_THREADS:
        return [device.label]
    cores = usable_cores()
    return [label for label, number in CPU_THREADS.items() if number <= cores]


def measured(p: Hardware, device: Device) -> list[Row]:
    """Time a step of each size in `measured_sizes` on each device of this machine, closed and open."""
    rows = []
    for size in p.measured_sizes:
        model = model_of(p, size)
        mean_len = min(p.mean_len, model.num_items / 4)
        histories = synthetic_dataset(p.users, model.num_items, mean_len, p.seed)
        for label in here(p, device):
            number = int(label[3:]) if label.startswith("cpu") else torch.get_num_threads()
            with threads(number):
                rows += [_timed(p, size, rule, label, histories, device) for rule in _rules(device)]
    return rows


def _rules(device: Device) -> list[str]:
    return ["closed"] if device.torch_device.type == "cpu" else ["closed", "open"]


def _timed(p: Hardware, size: str, rule: str, label: str, dataset: Any, device: Device) -> Row:
    train = train_of(p, "fp32" if rule == "closed" else "auto")
    torch.manual_seed(p.seed)
    with device.torch_device:  # drawing a large table on the host takes seconds
        model = Bert4Rec(model_of(p, size))
    trainer = Trainer(model, train_histories(dataset), train, device, dataset.fingerprint)
    found = timing.measure(trainer, p.steps, p.warmup_steps, gpu_energy=True)
    done, _ = timing.step_flops(trainer, p.warmup_steps + 1)
    own: dict[str, Any] = {"size": size, "device": label, "rule": rule, "basis": "measured"}
    own |= {"precision": trainer.precision.name, "batch_size": p.batch_size, "status": found.status}
    own |= {"threads": torch.get_num_threads() if label.startswith("cpu") else None}
    rate = found.sequences_per_second if found.status == "ok" else None
    epoch = {"epoch_seconds": p.epoch_users / rate if rate else None}
    if rate and (price := price_of(p, label)) is not None:
        epoch["cost_per_epoch"] = p.epoch_users / rate / 3600 * price
    counted = {"parameters": sum(x.numel() for x in trainer.parameters), "flops": done.total}
    counted["bytes_moved"] = _bytes_moved(trainer)
    return Row(own, counted, found.timings() | epoch)


def _bytes_moved(trainer: Trainer) -> int:
    """Return the bytes that a step moves by the planner's count, since nothing measures them."""
    model, train, histories = trainer.model.config, trainer.config, trainer.histories
    shapes = work.mean_shapes(model, train, histories.ends - histories.starts)
    width = work.FP32 if trainer.precision.autocast_dtype is None else work.HALF
    return int(sum(part.bytes for part in work.step_parts(model, train, shapes, width)))


# -- predicted -----------------------------------------------------------------------------------------------


def predicted(p: Hardware) -> list[Row]:
    """Return the plan of each of `sizes` for each of `devices`, closed and open."""
    lengths = planner.typical_lengths(p.mean_len)
    rows = []
    for size in p.sizes:
        model = model_of(p, size)
        for label in p.devices:
            for board in boards(label):
                for rule in ("closed", "open"):
                    if rule == "open" and isinstance(board, planner.Cpu):
                        continue  # fp32 is what suits it
                    train = train_of(p, "fp32" if rule == "closed" else "auto")
                    found = planner.plan(
                        board, model, train, lengths, p.epoch_users, price_of(p, board.label)
                    )
                    rows.append(row_of(found, size, rule, p.batch_size))
    return rows


def boards(label: str) -> Sequence[hardware.Board | planner.Cpu]:
    """Return the devices that a label stands for: boards of the catalogue, and of cpu2 every CPU measured.

    Which CPU is here makes no difference: plans are the same wherever a notebook runs.
    """
    if not label.startswith("cpu"):
        return hardware.boards(label)
    return planner.with_threads(label) or [planner.cpu(label)]


def row_of(found: Plan, size: str, rule: str, batch_size: int) -> Row:
    """Return a plan as a row."""
    own: dict[str, Any] = {"size": size, "device": found.device, "rule": rule, "basis": found.basis}
    own |= {"precision": found.precision, "batch_size": batch_size, "status": "ok"}
    if found.fits is False:
        own |= {"status": "does not fit"}
    numbers = found.numbers()
    names = ("flops", "bytes_moved", "peak_memory_bytes", "largest_batch", "fits")
    counted = {name: value for name in names if (value := numbers.pop(name)) is not None}
    return Row(own, counted, numbers, card_of(found))


def card_of(found: Plan) -> dict[str, Any]:
    """Return what a record says of a device that is not here."""
    cpu = found.device.startswith("cpu")
    card = {"name": f"{found.name} (by its data sheet)", "type": "cuda", "label": found.device}
    if cpu:
        threads = planner.cpu(found.device).threads
        return card | {"name": found.name, "type": "cpu", "label": "cpu", "threads": threads}
    capability = hardware.catalogue()[found.device].capability
    return card | {"memory_bytes": found.memory_bytes, "capability": list(capability)}


# -- what a technique gives ----------------------------------------------------------------------------------

TECHNIQUES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gather before the head": ({"layout": "padded", "head_rows": "all"}, {"layout": "padded"}),
    "packed rows": ({"layout": "padded"}, {}),
    "AMP": ({"precision": "fp32"}, {"precision": "auto"}),
    "iLoRA": ({}, {}),  # against training all weights: the same step with `ILORA`
}

ILORA = AdapterPlan(kind="ilora", rank=8, num_experts=4)


def gains(p: Hardware) -> list[Row]:
    """Return how many times faster each technique makes a step of each size, predicted for each device."""
    lengths = planner.typical_lengths(p.mean_len)
    rows = []
    for size in p.sizes:
        model = model_of(p, size)
        for label in p.devices:
            for board in boards(label):
                for name, sides in TECHNIQUES.items():
                    if name == "AMP" and isinstance(board, planner.Cpu):
                        continue
                    adapters = (None, ILORA) if name == "iLoRA" else (None, None)
                    trains = [train_of(p, **({"precision": "auto"} | side)) for side in sides]
                    without, with_it = (
                        planner.plan(board, model, train, lengths, adapter=adapter)
                        for train, adapter in zip(trains, adapters, strict=True)
                    )
                    own = {"size": size, "device": board.label, "technique": name, "basis": with_it.basis}
                    ratio = {"speedup": without.step.seconds / with_it.step.seconds}
                    rows.append(Row(own, {}, ratio, card_of(with_it)))
    return rows


def fits_which(p: Hardware) -> list[dict[str, Any]]:
    """Return, for each size, which GPU to take: those that hold it, the smallest and the fastest of them.

    A GPU that holds the state but not the batch counts as one that does not fit. The cheapest is named where
    `prices` name two or more of those that fit.
    """
    lengths = planner.typical_lengths(p.mean_len)
    found = []
    for size in p.sizes:
        plans = [
            planner.plan(
                board,
                model_of(p, size),
                train_of(p, "auto"),
                lengths,
                p.epoch_users,
                price_of(p, board.label),
            )
            for label in p.devices
            if not label.startswith("cpu")
            for board in hardware.boards(label)
        ]
        fitting = [one for one in plans if one.fits]
        row = {"size": size, "does not fit on": ", ".join(one.device for one in plans if not one.fits) or "-"}
        if fitting:
            row |= _choice(
                "smallest", min(fitting, key=lambda one: (one.memory_bytes or 0, one.step.seconds))
            )
            row |= _choice("fastest", min(fitting, key=lambda one: (one.step.seconds, one.memory_bytes or 0)))
        costs = {one.device: cost for one in fitting if (cost := one.cost(one.epoch.seconds)) is not None}
        if len(costs) > 1:
            cheapest = min(costs, key=lambda device: costs[device])
            row |= {"cheapest": cheapest, "its cost of an epoch": f"{costs[cheapest]:.4f}"}
        found.append(row)
    return found


def _choice(name: str, one: Plan) -> dict[str, str]:
    return {
        name: one.device,
        f"{name}: epoch (s)": f"{one.epoch.low:,.0f} to {one.epoch.high:,.0f}",
        f"{name}: GiB": f"{one.peak_bytes / GIB:.1f} of {(one.memory_bytes or 0) / GIB:.0f}",
        f"{name}: largest batch": f"{one.largest_batch:,}",
        f"{name}: mostly": max(one.step.parts, key=lambda part: one.step.parts[part]),
    }


def builds() -> dict[str, str]:
    """Return the boards that need a torch build of their own, and which."""
    return {board.label: board.build for board in hardware.catalogue().values() if board.build}


def claimed(p: AmpCompile, dataset: Dataset) -> list[Row]:
    """Return the plans of notebook 04's eager steps for the device that was asked for and is not here."""
    histories = train_histories(dataset)
    lengths = histories.ends - histories.starts
    model = model_config(p.size, num_items=dataset.num_items, max_len=p.max_len)
    rows = []
    for board in hardware.boards(p.gpu):
        for precision in p.precisions:
            if precision != "auto" and precision not in board.peaks:
                continue
            for size in p.batch_sizes:
                train = TrainConfig(seed=p.seed, batch_size=size, precision=precision)
                found = row_of(planner.plan(board, model, train, lengths), p.size, "open", size)
                ran = {"compile_mode": "off", "ran_compile_mode": "off", "ran_precision": precision}
                rows.append(replace(found, own_params=found.own_params | {"precision": precision} | ran))
    return rows


def committed_root() -> Path:
    """Return where the records of the repository lie, wherever this run records."""
    return system.root() / "executed"


# ------------------------------------------------------------------------------------------------
# Does this device compute what the study says it computes? Run by `python -m reclib check`.
#
# Four questions, each answered by running the real thing on the device: does the fast step equal the plain
# one, do products run in the precision that was chosen, does the clock wait for the device, and does
# running out of memory end in a row and leave the device usable. The answers are written to
# `executed/<label>/selfcheck.json`. A row counts as measured on a GPU only beside such a file with every
# check passed.

LIMIT = 1e-5  # of a gradient's norm, or of a thousandth of the global norm where that is larger

FILE = "selfcheck.json"

MODEL = ModelConfig(
    num_items=2000, hidden_dim=64, num_layers=2, num_heads=2, max_len=32, dropout=0.0, tied=False
)

FAST = TrainConfig(batch_size=64, epochs=1000, precision="fp32")

PLAIN = {"layout": "padded", "head_rows": "all", "loss": "plain"}


class Check(NamedTuple):
    """One question's answer."""

    name: str
    passed: bool
    found: str


def some_histories() -> Histories:
    """Return 400 random histories of 3 to 60 interactions."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 61, 400)
    ends = np.cumsum(lengths)
    items = rng.integers(1, MODEL.num_items + 1, ends[-1]).astype(np.int32)
    return Histories(items, ends - lengths, ends)


def gradients(device: Device, train: TrainConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one step from the same weights."""
    torch.manual_seed(0)
    model = Bert4Rec(MODEL).to(device.torch_device)
    (batch,) = Epoch(some_histories(), MODEL, train, 0).step(0)
    loss = batch_loss(model, batch.to(device.torch_device), train, batch.num_targets)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def exactness(device: Device) -> Check:
    """Packed, gathered and fused against plain and padded, in full fp32, by every route of the loss."""
    hardware.set_matmul_precision(hardware.PrecisionChoice("fp32", "self-check"))
    _, wanted = gradients(device, changed(FAST, **PLAIN))
    whole = torch.stack([g.norm() for g in wanted.values()]).norm()
    worst = 0.0
    for route in ("plain", "chunked", "inplace"):
        _, found = gradients(device, changed(FAST, loss=route))
        for name, right in wanted.items():
            gap = (found[name] - right).norm() / torch.maximum(right.norm(), 1e-3 * whole)
            worst = max(worst, float(gap))
    return Check(
        "exactness", worst <= LIMIT, f"largest difference of a gradient {worst:.1e}, limit {LIMIT:.0e}"
    )


def precision(device: Device) -> Check:
    """Each precision that the device has: what the head's product really ran in, and a finite loss."""
    said, passed = [], True
    for name in ("fp32", "tf32", "bf16", "fp16"):
        try:
            hardware.choose_precision(name, device.card)
        except InputError:
            said.append(f"{name} not applicable")
            continue
        trainer = make_trainer(device, precision=name)
        wanted = "fp32" if name == "tf32" else name
        found = timing.head_dtype(trainer)
        loss = next(trainer.steps()).loss
        passed &= found == wanted and np.isfinite(loss)
        said.append(f"{name} head in {found}, loss {loss:.3f}")
    return Check("precision", passed, "; ".join(said))


def synchronisation(device: Device) -> Check:
    """Products of known work: the rate by our clock may not exceed what waiting for each of them gives."""
    size, count = (4096, 20) if device.torch_device.type == "cuda" else (512, 20)
    a = torch.randn(size, size, device=device.torch_device)

    def run(wait_each: bool) -> float:
        hardware.synchronize(device.torch_device)
        began = time.perf_counter()
        for _ in range(count):
            a @ a
            if wait_each:
                hardware.synchronize(device.torch_device)
        hardware.synchronize(device.torch_device)
        return time.perf_counter() - began

    run(True)
    ratio = min(run(False) for _ in range(5)) / min(run(True) for _ in range(5))
    return Check(
        "synchronisation", 0.5 < ratio < 2.0, f"clock around {count} products: {ratio:.2f} of one by one"
    )


def out_of_memory(device: Device) -> Check:
    """A batch that cannot fit becomes a row, and the same device trains right after it."""
    greedy = make_trainer(device)

    def too_much(*_: object) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device=device.torch_device)  # a pebibyte

    handle = greedy.model.register_forward_pre_hook(too_much)
    hook = greedy.model.blocks[0].register_forward_pre_hook(too_much)
    row = measure(greedy, 1, 1)
    handle.remove()
    hook.remove()
    after = next(make_trainer(device).steps()).loss
    passed = row.status == "oom" and bool(np.isfinite(after))
    return Check("out of memory", passed, f"status {row.status!r}, then a step with loss {after:.3f}")


def make_trainer(device: Device, **changes: Any) -> Trainer:
    """Return a trainer of fresh weights."""
    torch.manual_seed(0)
    return Trainer(Bert4Rec(MODEL), some_histories(), changed(FAST, **changes), device, "self-check")


CHECKS: tuple[Callable[[Device], Check], ...] = (exactness, precision, synchronisation, out_of_memory)


def check(device: Device) -> list[Check]:
    """Run every check; one that raises has failed and says with what."""
    found = []
    for question in CHECKS:
        try:
            found.append(question(device))
        except Exception as error:  # whatever breaks on a device is an answer
            found.append(Check(question.__name__, False, f"{type(error).__name__}: {error}".splitlines()[0]))
    return found


def write(device: Device, found: list[Check]) -> str:
    """Write the answers beside the records of the device; return the file's name."""
    folder = system.executed() / device.label
    body = {
        "device": system.plain(hardware.device_card(device)),
        "passed": all(one.passed for one in found),
        "checks": [one._asdict() for one in found],
        "versions": records.versions(),
        "git": records.git_state(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    system.write_atomically(folder / FILE, json.dumps(body, indent=1, default=bool) + "\n")
    return f"{device.label}/{FILE}"


def check_main(argv: Sequence[str] | None = None) -> int:
    """Check a device (the one that is there, or "cpu") and print the answers; 0 if all passed."""
    parser = Parser(prog="python -m reclib check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("gpu", nargs="?", default="auto", help="auto, cpu or a gpu label (auto)")
    given = parser.parse_args(argv)
    try:
        device = hardware.resolve(given.gpu)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{device.label}: {device.card.name}, torch {torch.__version__}")
    found = check(device)
    for one in found:
        print(f"  {'passed' if one.passed else 'FAILED':<7} {one.name:<16} {one.found}")
    print(f"written to {write(device, found)}")
    return 0 if all(one.passed for one in found) else 1
