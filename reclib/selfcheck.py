"""Does this device compute what the study says it computes? Run by `python -m reclib.hardware check`.

Four questions, each answered by running the real thing on the device: does the fast step equal the plain one,
do products run in the precision that was chosen, does the clock wait for the device, and does running out of
memory end in a row and leave the device usable. The answers are written to `executed/<label>/selfcheck.json`.
A row counts as measured on a GPU only beside such a file with every check passed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch

from reclib import hardware, paths, profiling, provenance
from reclib.batching import Epoch
from reclib.benchmark import measure
from reclib.command import Parser, exit_code
from reclib.config import InputError, ModelConfig, TrainConfig, changed
from reclib.data import Histories
from reclib.hardware import Device
from reclib.model import Bert4Rec
from reclib.objective import batch_loss
from reclib.trainer import Trainer

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
        found = profiling.head_dtype(trainer)
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
    folder = paths.executed() / device.label
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "device": provenance.plain(hardware.device_card(device)),
        "passed": all(one.passed for one in found),
        "checks": [one._asdict() for one in found],
        "versions": provenance.versions(),
        "git": provenance.git_state(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    partial = folder / f"{FILE}.partial"
    partial.write_text(json.dumps(body, indent=1, default=bool) + "\n")
    os.replace(partial, folder / FILE)
    return f"{device.label}/{FILE}"


def main(argv: Sequence[str] | None = None) -> int:
    """Check a device (the one that is there, or "cpu") and print the answers; 0 if all passed."""
    parser = Parser(prog="python -m reclib.hardware check", description=(__doc__ or "").split("\n")[0])
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


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
