"""The same training step on many devices, measured here or predicted; and the self-check of a device.

A row is either measured or predicted. Its rule is closed if all devices do the same (fp32, eager), and open
if each device uses its own precision.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from reclib import hardware, records, system
from reclib.config import (
    AdapterConfig,
    InputError,
    ModelConfig,
    TrainConfig,
    changed,
    model_config,
    validated,
)
from reclib.cost import planner
from reclib.cost.planner import Plan
from reclib.data.batches import Epoch
from reclib.data.dataset import Dataset, Histories, train_histories
from reclib.data.prepare import synthetic_dataset
from reclib.experiments import speed
from reclib.experiments.notebook import Result
from reclib.hardware import CPU_THREADS, GIB, Device, usable_cores
from reclib.model.bert4rec import Bert4Rec
from reclib.parameters import AmpCompile, Hardware
from reclib.report import tables
from reclib.system import Parser
from reclib.train import timing
from reclib.train.losses import batch_loss
from reclib.train.timing import EPOCHS
from reclib.train.trainer import Trainer

RULES = {"closed": "fp32", "open": "auto"}  # precision of a row
ILORA = AdapterConfig(kind="ilora", rank=8, num_experts=4)

# Changes of the training configuration without and with a technique; iLoRA: `ILORA` against all weights.
TECHNIQUES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gather before the head": ({"layout": "padded", "head_rows": "all"}, {"layout": "padded"}),
    "packed rows": ({"layout": "padded"}, {}),
    "AMP": ({"precision": "fp32"}, {"precision": "auto"}),
    "iLoRA": ({}, {}),
}


def model_of(p: Hardware, size: str) -> ModelConfig:
    """Return a size on its own catalogue, with the notebook's rows."""
    return model_config(size, max_len=p.max_len)


def train_of(p: Hardware, precision: str, **changes: Any) -> TrainConfig:
    """Return the notebook's training configuration in a precision."""
    values = {"seed": p.seed, "batch_size": p.batch_size, "epochs": EPOCHS, "precision": precision}
    return validated(TrainConfig, values | changes)


def data_of(p: Hardware) -> dict[str, str]:
    """Return name and fingerprint of the histories that are timed here."""
    fingerprint = records.params_hash({"mean_len": p.mean_len, "seed": p.seed})
    return {"name": "synthetic", "fingerprint": fingerprint}


def prices(p: Hardware) -> dict[str, float]:
    """Return the price per hour by device."""
    return planner.hourly(p.prices)


# -- measured ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of torch's threads within a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def local_devices(device: Device) -> dict[str, int]:
    """Return the threads of each device of this machine: a GPU, or the CPU with one and with two threads.

    A run under the label of one of these CPU devices has that device only.
    """
    if device.label in CPU_THREADS:
        return {device.label: CPU_THREADS[device.label]}
    if device.torch_device.type == "cuda":
        return {device.label: torch.get_num_threads()}
    return {label: number for label, number in CPU_THREADS.items() if number <= usable_cores()}


def measured(p: Hardware, device: Device) -> list[Result]:
    """Time a step of each size in `measured_sizes` on each device of this machine, on a GPU by both rules."""
    rows = []
    for size in p.measured_sizes:
        model = model_of(p, size)
        dataset = synthetic_dataset(p.users, model.num_items, min(p.mean_len, model.num_items / 4), p.seed)
        for label, number in local_devices(device).items():
            with threads(number):
                for rule in ["closed"] if device.torch_device.type == "cpu" else RULES:
                    trainer = speed.trainer_of(model, train_of(p, RULES[rule]), dataset, device)
                    rows.append(_timed(p, trainer, {"size": size, "device": label, "rule": rule}))
    return rows


def _timed(p: Hardware, trainer: Trainer, params: dict[str, Any]) -> Result:
    measurement = timing.measure(trainer, p.steps, p.warmup_steps, gpu_energy=True)
    params |= {"basis": "measured", "precision": trainer.precision.name, "batch_size": p.batch_size}
    params["status"] = measurement.status
    params["threads"] = torch.get_num_threads() if trainer.where.type == "cpu" else None
    timings: dict[str, Any] = measurement.timings() | {"epoch_seconds": None}
    if measurement.status == "ok":
        timings["epoch_seconds"] = seconds = p.epoch_users / measurement.sequences_per_second
        if (price := planner.price_of(prices(p), params["device"])) is not None:
            timings["cost_per_epoch"] = seconds / 3600 * price
    counted = {
        "parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "flops": timing.step_flops(trainer, p.warmup_steps + 1)[0].total,
    }
    return Result("hardware_step", counted, params, timings=timings)


def side_by_side(p: Hardware, steps: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Tabulate measured steps (records): rate, memory, epoch, cost and energy; unknown cells are blank."""
    rows = []
    for record in steps:
        params, timings = record["own_params"], record["timings"]
        rate, price = timings.get("sequences_per_second"), planner.price_of(prices(p), params["device"])
        epoch = p.epoch_users / rate if rate else None
        row = {key: params.get(key) for key in ("size", "device", "rule", "precision", "batch_size")}
        row |= {"sequences/s": rate, "peak (MiB)": (timings.get("peak_memory_bytes") or 0) / 2**20 or None}
        row |= {"epoch (s)": epoch, "J per sequence": timings.get("joules_per_sequence")}
        row |= {"MFU": tables.mfu_of(record)}
        rows.append(row | {"cost of an epoch": epoch / 3600 * price if epoch and price is not None else None})
    return pd.DataFrame(rows).sort_values(["device", "size"]).round(4)


# -- predicted -----------------------------------------------------------------------------------------------


def boards(label: str) -> Sequence[hardware.Board | planner.Cpu]:
    """Return the devices of a label: boards of the catalogue, or for cpu1 and cpu2 every measured CPU.

    The CPU of this machine makes no difference: plans are the same wherever a notebook runs.
    """
    if not label.startswith("cpu"):
        return hardware.boards(label)
    return planner.with_threads(label) or [planner.cpu(label)]


def _cases(p: Hardware) -> list[tuple[str, hardware.Board | planner.Cpu]]:
    return [(size, board) for size in p.sizes for label in p.devices for board in boards(label)]


def _plan(p: Hardware, size: str, board: hardware.Board | planner.Cpu, **changes: Any) -> Plan:
    """Return the plan of a size in the board's own precision, unless changed."""
    adapter = changes.pop("adapter", None)
    train = train_of(p, changes.pop("precision", "auto"), **changes)
    lengths, price = planner.typical_lengths(p.mean_len), planner.price_of(prices(p), board.label)
    return planner.plan(board, model_of(p, size), train, lengths, p.epoch_users, price, adapter)


def predicted(p: Hardware) -> list[Result]:
    """Return the plan of each of `sizes` for each of `devices`, closed and open; a CPU's own is fp32."""
    return [
        row_of(_plan(p, size, board, precision=precision), size, rule, p.batch_size)
        for size, board in _cases(p)
        for rule, precision in RULES.items()
        if rule == "closed" or not isinstance(board, planner.Cpu)
    ]


def gains(p: Hardware) -> list[Result]:
    """Return how many times faster each technique makes a step of each size, predicted for each device."""
    rows = []
    for size, board in _cases(p):
        for name, (without, change) in TECHNIQUES.items():
            if name == "AMP" and isinstance(board, planner.Cpu):
                continue
            before = _plan(p, size, board, **without)
            after = _plan(p, size, board, **change, adapter=ILORA if name == "iLoRA" else None)
            params = {"size": size, "device": board.label, "technique": name, "basis": after.basis}
            speedup = before.step.seconds / after.step.seconds
            rows.append(of_plan("technique", after, params, {}, {"speedup": speedup}))
    return rows


def claimed(p: AmpCompile, dataset: Dataset) -> list[Result]:
    """Return the plans of notebook 04's eager steps for a claimed device that is not here."""
    lengths, model, rows = train_histories(dataset).lengths, speed.model_of(p, dataset), []
    for board in hardware.boards(p.gpu):
        for precision in (name for name in p.precisions if name in ("auto", *board.peaks)):
            for size in p.batch_sizes:
                train = TrainConfig(seed=p.seed, batch_size=size, precision=precision)
                row = row_of(planner.plan(board, model, train, lengths), p.size, "open", size)
                modes: dict[str, Any] = {"precision": precision, "ran_precision": precision}
                modes |= {"compile_mode": "off", "ran_compile_mode": "off"}
                rows.append(row._replace(name="step", params=row.params | modes))
    return rows


def row_of(plan: Plan, size: str, rule: str, batch_size: int) -> Result:
    """Return a plan as the result of a step."""
    params = {"size": size, "rule": rule, "batch_size": batch_size} | settings_of(plan)
    return of_plan("hardware_step", plan, params, plan.counts(), plan.timings())


def of_plan(name: str, plan: Plan, params: Any, metrics: Any, timings: Any, series: Any = None) -> Result:
    """Return a result that is predicted for the device of a plan."""
    card = card_of(plan)
    return Result(name, metrics, params, series or {}, timings=timings, kind="predicted", device=card)


def settings_of(plan: Plan) -> dict[str, Any]:
    """Return what a record says of a plan beside the run that it is of."""
    status = "does not fit" if plan.fits is False else "ok"
    return {"device": plan.device, "precision": plan.precision, "basis": plan.basis, "status": status}


def card_of(plan: Plan) -> dict[str, Any]:
    """Return the card of a planned device, for a record."""
    if plan.device.startswith("cpu"):
        number = planner.cpu(plan.device).threads
        return {"name": plan.name, "type": "cpu", "label": "cpu", "threads": number}
    capability = hardware.catalogue()[plan.device].capability
    card = {"name": f"{plan.name} (by its data sheet)", "type": "cuda", "label": plan.device}
    return card | {"memory_bytes": plan.memory_bytes, "capability": list(capability)}


def fits_which(p: Hardware) -> pd.DataFrame:
    """Tabulate for each size the smallest GPU that holds it, the fastest and the cheapest.

    A GPU that holds the state but not the batch does not fit. The cheapest is given if `prices` has two or
    more of those that fit.
    """
    rows = []
    for size in p.sizes:
        plans = [_plan(p, size, board) for name_of_size, board in _cases(p) if name_of_size == size]
        gpus = [plan for plan in plans if plan.memory_bytes is not None]
        fitting = [plan for plan in gpus if plan.fits]
        priced = [plan for plan in fitting if plan.price is not None]
        orders = {
            "smallest": (fitting, lambda plan: (plan.memory_bytes, plan.step.seconds)),
            "fastest": (fitting, lambda plan: (plan.step.seconds, plan.memory_bytes)),
            "cheapest": (priced if len(priced) > 1 else [], lambda plan: plan.cost(plan.epoch.seconds)),
        }
        for name, (candidates, order) in orders.items():
            for plan in sorted(candidates, key=order)[:1]:
                alike = sum(other.step.seconds < 1.01 * plan.step.seconds for other in fitting) - 1
                device = f"{plan.device} and {alike} alike" if name == "fastest" and alike else plan.device
                row = {"size": size, "which": name, "device": device}
                row["epoch (s)"] = f"{plan.epoch.low:,.0f} to {plan.epoch.high:,.0f}"
                row["GiB"] = f"{plan.peak_bytes / GIB:.1f} of {(plan.memory_bytes or 0) / GIB:.0f}"
                row["largest batch"] = f"{plan.largest_batch:,}"
                row["mostly"] = max(plan.step.parts, key=lambda part: plan.step.parts[part])
                cost = plan.cost(plan.epoch.seconds)
                rows.append(row | ({} if cost is None else {"cost of an epoch": f"{cost:.4f}"}))
        others = ", ".join(plan.device for plan in gpus if not plan.fits)
        rows.append({"size": size, "which": "does not fit on", "device": others or "-"})
    return pd.DataFrame(rows).set_index(["size", "which"]).fillna("")


# -- the self-check ------------------------------------------------------------------------------------------
#
# `python -m reclib check` runs real steps on the device: does the fast step equal the plain one, do products
# run in the chosen precision, does the clock wait for the device, and is the device usable after running out
# of memory? GPU measurements are recorded only beside a passed check in `executed/<label>/selfcheck.json`.

LIMIT = 1e-5  # of a gradient's norm, or of a thousandth of the global norm if that is larger
FILE = "selfcheck.json"
_SHAPE: dict[str, Any] = {"hidden_dim": 64, "num_layers": 2, "num_heads": 2, "max_len": 32}
MODEL = ModelConfig(num_items=2000, dropout=0.0, tied=False, **_SHAPE)
FAST = TrainConfig(batch_size=64, epochs=1000, precision="fp32")
PLAIN = {"layout": "padded", "head_rows": "all", "loss": "plain"}


class Check(NamedTuple):
    """The outcome of one check."""

    name: str
    passed: bool
    found: str


def random_histories() -> Histories:
    """Return 400 random histories of 3 to 60 interactions."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 61, 400)
    ends = np.cumsum(lengths)
    return Histories(rng.integers(1, MODEL.num_items + 1, ends[-1]).astype(np.int32), ends - lengths, ends)


def make_trainer(device: Device, **changes: Any) -> Trainer:
    """Return a trainer of fresh weights."""
    torch.manual_seed(0)
    return Trainer(Bert4Rec(MODEL), random_histories(), changed(FAST, **changes), device, "self-check")


def gradients(device: Device, train: TrainConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one step from the same weights."""
    torch.manual_seed(0)
    model = Bert4Rec(MODEL).to(device.torch_device)
    (batch,) = Epoch(random_histories(), MODEL, train, 0).step(0)
    loss = batch_loss(model, batch.to(device.torch_device), train, batch.num_targets)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def exactness(device: Device) -> Check:
    """Compare the gradients of fast steps with those of plain, padded ones, for every route of the loss."""
    hardware.set_matmul_precision(hardware.PrecisionChoice("fp32", "self-check"))
    _, expected = gradients(device, changed(FAST, **PLAIN))
    least = 1e-3 * torch.stack([g.norm() for g in expected.values()]).norm()
    worst = 0.0
    for route in ("plain", "chunked", "inplace"):
        _, grads = gradients(device, changed(FAST, loss=route))
        for name, right in expected.items():
            worst = max(worst, float((grads[name] - right).norm() / torch.maximum(right.norm(), least)))
    answer = f"largest difference of a gradient {worst:.1e}, limit {LIMIT:.0e}"
    return Check("exactness", worst <= LIMIT, answer)


def precision(device: Device) -> Check:
    """Check for each precision of the device that the head's product runs in it and the loss is finite."""
    answers, passed = [], True
    for name in ("fp32", "tf32", "bf16", "fp16"):
        try:
            hardware.choose_precision(name, device.card)
        except InputError:
            answers.append(f"{name} not applicable")
            continue
        trainer = make_trainer(device, precision=name)
        dtype, loss = timing.head_dtype(trainer), next(trainer.steps()).loss
        passed &= dtype == ("fp32" if name == "tf32" else name) and bool(np.isfinite(loss))
        answers.append(f"{name} head in {dtype}, loss {loss:.3f}")
    return Check("precision", passed, "; ".join(answers))


def synchronisation(device: Device) -> Check:
    """Check that timing many products together agrees with waiting for each of them."""
    size, count = (4096, 20) if device.torch_device.type == "cuda" else (512, 20)
    a = torch.randn(size, size, device=device.torch_device)

    def run(wait_each: bool) -> float:
        hardware.synchronize(device.torch_device)
        began = time.perf_counter()
        for number in range(count):
            a @ a
            if wait_each or number == count - 1:
                hardware.synchronize(device.torch_device)
        return time.perf_counter() - began

    run(True)
    ratio = min(run(False) for _ in range(5)) / min(run(True) for _ in range(5))
    answer = f"clock around {count} products: {ratio:.2f} of one by one"
    return Check("synchronisation", 0.5 < ratio < 2.0, answer)


def out_of_memory(device: Device) -> Check:
    """Check that running out of memory is reported and that the device can train afterwards."""

    def too_much(*_: object) -> None:
        torch.empty(1 << 50, dtype=torch.uint8, device=device.torch_device)  # a pebibyte

    greedy = make_trainer(device)
    greedy.model.blocks[0].register_forward_pre_hook(too_much)
    row = timing.measure(greedy, 1, 1)
    after = next(make_trainer(device).steps()).loss
    answer = f"status {row.status!r}, then a step with loss {after:.3f}"
    return Check("out of memory", row.status == "oom" and bool(np.isfinite(after)), answer)


CHECKS = (exactness, precision, synchronisation, out_of_memory)


def check(device: Device) -> list[Check]:
    """Run every check; one that raises has failed, with its error as the answer."""
    answers = []
    for run in CHECKS:
        try:
            answers.append(run(device))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            answers.append(Check(run.__name__, False, reason))
    return answers


def write(device: Device, answers: list[Check]) -> str:
    """Write the answers beside the records of the device; return the file's name."""
    body = {
        "device": system.plain(hardware.device_card(device)),
        "passed": all(answer.passed for answer in answers),
        "checks": [answer._asdict() for answer in answers],
        "versions": records.versions(),
        "git": records.git_state(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    file = system.executed() / device.label / FILE
    system.write_atomically(file, json.dumps(body, indent=1, default=bool) + "\n")
    return f"{device.label}/{FILE}"


def check_main(argv: Sequence[str] | None = None) -> int:
    """Check that a device computes correctly; print the answers. Returns 0 if all passed."""
    parser = Parser(prog="python -m reclib check", description=(check_main.__doc__ or "").split(";")[0])
    parser.add_argument("gpu", nargs="?", default="auto", help="auto, cpu or a gpu label (auto)")
    options = parser.parse_args(argv)
    device = hardware.resolve(options.gpu)
    print(f"{device.label}: {device.card.name}, torch {torch.__version__}")
    answers = check(device)
    for answer in answers:
        print(f"  {'passed' if answer.passed else 'FAILED':<7} {answer.name:<16} {answer.found}")
    print(f"written to {write(device, answers)}")
    return 0 if all(answer.passed for answer in answers) else 1
