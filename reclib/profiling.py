"""Where a step's time goes, what type its products run in, and what it holds at its peak."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from reclib import hardware
from reclib.benchmark import state_bytes, step_batches
from reclib.objective import batch_loss
from reclib.trainer import Trainer

_CHATTER = ("USDT:", "CPUAllocator.cpp")
_SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Keep what the profiler's C++ says of itself off standard error; everything else comes through."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+b") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.write("".join(x for x in lines if not any(word in x for word in _CHATTER)))


class Operator(NamedTuple):
    """Time that an operator spends in itself, per step."""

    name: str
    calls: float
    seconds: float
    share: float  # of all operators


def operators(trainer: Trainer, steps: int, top: int, trace: Path | None = None) -> list[Operator]:
    """Profile `steps` steps after two others; return the `top` operators by their own time, then the rest.

    On CUDA it is the device's time, on a CPU the processor's. With `trace` a Chrome trace is written there.
    """
    cuda = trainer.where.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with contextlib.closing(trainer.steps()) as loop:  # type: ignore[type-var]
        for _ in range(2):
            next(loop)
        hardware.synchronize(trainer.where)
        with _without_chatter(), profile(activities=activities) as profiler:
            for _ in range(steps):
                next(loop)
            hardware.synchronize(trainer.where)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    found = []
    for event in profiler.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros > 0 and not (cuda and event.device_type == DeviceType.CPU):
            found.append((event.key, event.count / steps, micros / 1e6 / steps))
    whole = sum(seconds for _, _, seconds in found)
    found.sort(key=lambda row: -row[2])
    rest = found[top:]
    rows = [Operator(name, calls, seconds, seconds / whole) for name, calls, seconds in found[:top]]
    if rest:
        left = sum(row[2] for row in rest)
        rows.append(Operator("all others", sum(row[1] for row in rest), left, left / whole))
    return rows


class _Products(TorchDispatchMode):
    """Notes the types of all products that have `width` as one of their dimensions."""

    NAMES = ("mm", "addmm", "bmm", "linear", "matmul", "_scaled_mm")

    def __init__(self, width: tuple[int, ...]) -> None:
        super().__init__()
        self.width, self.found = width, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.NAMES or "linear_cross_entropy" in name:
            tensors = [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 1]
            if any(size in self.width for x in tensors for size in x.shape):
                self.found |= {x.dtype for x in tensors}
        return out


def head_dtype(trainer: Trainer) -> str:
    """Return the type that the head's product really runs in, seen from the operators of one forward pass.

    "fp32 and bf16" would say that its operands differ. Weights stay as they are.
    """
    config = trainer.model.config
    batch = step_batches(trainer, 1)[0].to(trainer.where)
    seen = _Products((config.num_items, config.output_rows))
    # The encoder stays out of the mode: only what `batch_loss` does after it has the catalogue's width.
    with torch.no_grad(), trainer.autocast(), seen:
        batch_loss(
            trainer.model, batch, trainer.config, batch.num_targets, trainer.model.encode, trainer.route
        )
    return " and ".join(sorted(_SHORT.get(dtype, str(dtype)) for dtype in seen.found)) or "unknown"


def peak_tensor_bytes(trainer: Trainer) -> int:
    """Return the most bytes of tensors that one step holds at a time, weights and optimiser included.

    Counted from the profiler's allocations, so it is the same whatever allocator and other models are there.
    """
    with contextlib.closing(trainer.steps()) as loop:  # type: ignore[type-var]
        next(loop)
        held = state_bytes(trainer)
        hardware.synchronize(trainer.where)
        activities = [ProfilerActivity.CPU]
        with _without_chatter(), profile(activities=activities, profile_memory=True) as profiler:
            next(loop)
            hardware.synchronize(trainer.where)
    kineto = profiler.profiler.kineto_results
    kind = DeviceType.CUDA if trainer.where.type == "cuda" else DeviceType.CPU
    events = [e for e in kineto.events() if e.name() == "[memory]" and e.device_type() == kind]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak
