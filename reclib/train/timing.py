"""Timing the training loop of `trainer`.

A whole step is timed: fetch, forward, backward, clip, optimiser. On a CPU the clock is read after each step.
On CUDA an event is recorded after each step and all are read at the end of a round, so that the host launches
the next step while the device computes, as in training. Warm-up and compile time are reported separately,
variants are interleaved (A B A B), and rates are checked against the wall clock of a whole epoch. Running out
of memory is a result.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import operator
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from reclib import hardware
from reclib.cost import work
from reclib.cost.work import Flops
from reclib.data.batches import Batch, Epoch
from reclib.evaluate import statistics
from reclib.evaluate.statistics import Interval
from reclib.train.losses import batch_loss
from reclib.train.trainer import StepStats, Trainer

EPOCHS = 100_000  # of a timed run, so that its schedule does not end
DISAGREEMENT = 0.05  # largest share by which the epoch's rate may differ from the steady one
RECOMPILE_LIMIT = 256  # compiled variants of one process share `encode`; torch's default is 8
SHORTEST = 2.0  # seconds of the shortest measurement with an energy counter
ENERGY_SECONDS = 2.5  # of steps whose energy a GPU's counter measures
RAPL = Path("/sys/class/powercap")

T = TypeVar("T")

# -- energy --------------------------------------------------------------------------------------------------
#
# NVIDIA's counter (NVML) on a GPU, RAPL of a Linux CPU's packages. Both count the whole device, for all its
# users, and are updated tens of times a second. Without a readable counter the result is None, not zero.


class Meter:
    """Joules used by a device since the construction of the meter."""

    def __init__(self, device: torch.device) -> None:
        self.read = _nvml(device) if device.type == "cuda" else _rapl()
        self.before = None if self.read is None else self.read()

    def joules(self, seconds: float) -> float | None:
        """Return the energy used in `seconds` since the start; None if not reported or too short."""
        if self.read is None or self.before is None or seconds < SHORTEST:
            return None
        used = self.read() - self.before
        return used if used > 0 else None  # not after an overflow of the counter


def _rapl(root: Path = RAPL) -> Callable[[], float] | None:
    """Return a reader of all packages; None without readable counters."""
    files = sorted(root.glob("intel-rapl:?/energy_uj"))  # the same names on AMD
    if not files or not all(os.access(file, os.R_OK) for file in files):
        return None
    return lambda: 1e-6 * sum(int(file.read_text()) for file in files)


def _nvml(device: torch.device) -> Callable[[], float] | None:
    """Return a reader of a GPU's counter (Volta and later); None if the driver has none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None

    counter = functools.partial(
        library.nvmlDeviceGetTotalEnergyConsumption, handle, ctypes.byref(millijoules)
    )

    def read() -> float:
        if counter():
            raise OSError("NVML's energy counter could be read before and cannot now")
        return 1e-3 * millijoules.value

    return None if counter() else read


# -- measurements --------------------------------------------------------------------------------------------

Status = Literal["ok", "oom", "not applicable"]
COUNTED = ("sequences", "tokens", "targets", "row_tokens", "target_slots")


@dataclass
class Measurement:
    """The timed steps of one variant; all fields are empty unless `status` is "ok"."""

    status: Status = "ok"
    reason: str = ""
    step_seconds: list[float] = field(default_factory=list)
    warmup_steps: int = 0
    warmup_seconds: float = 0.0
    compiled: bool = False
    fetch_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of every step, warm-up included
    sequences: int = 0  # in the timed steps, as are the counts below
    tokens: int = 0  # real items
    targets: int = 0
    row_tokens: int = 0  # places in the rows, padding included
    target_slots: int = 0  # places in the head, padding included
    peak_memory_bytes: int | None = None  # CUDA: allocated for this variant; CPU: resident in the process
    reserved_bytes: int | None = None  # CUDA only
    joules: float | None = None  # if the device reports it
    energy_sequences: int = 0  # sequences of the steps measured by `joules`; 0: those of the timed steps

    def add(self, stats: StepStats, seconds: float) -> None:
        """Count one timed step."""
        self.step_seconds.append(seconds)
        self.fetch_seconds.append(stats.fetch_seconds)
        self.sequences += stats.num_sequences
        self.tokens += stats.num_tokens
        self.targets += stats.num_targets
        self.row_tokens += stats.row_tokens
        self.target_slots += stats.target_slots

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the step, seconds."""
        low, middle, high = np.percentile(self.step_seconds, [25, 50, 75]).tolist()
        return low, middle, high

    @property
    def median_seconds(self) -> float:
        """Median step, seconds."""
        return self.quartiles[1]

    def per_second(self, counted: int) -> float:
        """Return a rate: the mean count per step over the median step time."""
        return counted / len(self.step_seconds) / self.median_seconds

    @property
    def sequences_per_second(self) -> float:
        """Sequences at the median step."""
        return self.per_second(self.sequences)

    @property
    def compile_seconds(self) -> float:
        """Warm-up time beyond as many median steps; 0 without compilation."""
        if not self.compiled or not self.step_seconds:
            return 0.0
        return max(0.0, self.warmup_seconds - self.warmup_steps * self.median_seconds)

    def timings(self) -> dict[str, float | int | None]:
        """Return the values of a record that depend on the clock; empty unless `status` is "ok"."""
        if self.status != "ok":
            return {}
        low, middle, high = self.quartiles
        energy_sequences = self.energy_sequences or self.sequences
        return {
            "step_seconds": middle,
            "step_seconds_low": low,
            "step_seconds_high": high,
            "sequences_per_second": self.sequences_per_second,
            "tokens_per_second": self.per_second(self.tokens),  # of real items: padding is no work
            "targets_per_second": self.per_second(self.targets),
            "fetch_share": sum(self.fetch_seconds) / sum(self.step_seconds),  # of waiting for batches
            "warmup_seconds": self.warmup_seconds,
            "compile_seconds": self.compile_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "reserved_bytes": self.reserved_bytes,
            "joules_per_sequence": None if self.joules is None else self.joules / energy_sequences,
        }

    def counts(self) -> dict[str, int]:
        """Return the values of a record that do not depend on the clock."""
        steps = {"timed_steps": len(self.step_seconds), "warmup_steps": self.warmup_steps}
        return steps | {name: getattr(self, name) for name in COUNTED}


def merged(parts: list[Measurement]) -> Measurement:
    """Merge several rounds of one variant; the first failed round, if any, is the result.

    Compile time and losses are those of the first round.
    """
    if failed := [part for part in parts if part.status != "ok"]:
        return failed[0]
    names = ("step_seconds", "fetch_seconds", "energy_sequences", *COUNTED)
    peaks = [part.peak_memory_bytes for part in parts if part.peak_memory_bytes is not None]
    joules = [part.joules for part in parts if part.joules is not None]
    return replace(
        parts[0],
        **{name: functools.reduce(operator.add, (getattr(part, name) for part in parts)) for name in names},
        peak_memory_bytes=max(peaks, default=None),
        joules=sum(joules) if len(joules) == len(parts) else None,
    )


def published_rate(steady: float, epoch: float) -> float:
    """Return the rate to publish: the epoch's if the two differ by more than `DISAGREEMENT`."""
    return epoch if abs(steady - epoch) > DISAGREEMENT * epoch else steady


def break_even_steps(compile_seconds: float, eager_step: float, compiled_step: float) -> int | None:
    """Return the number of steps after which compiling saves time; None: never."""
    saved = eager_step - compiled_step
    return math.ceil(compile_seconds / saved) if saved > 0 else None


def paired_ratio(above: Measurement, below: Measurement) -> Interval:
    """Return the ratio of step times of two interleaved variants.

    The geometric mean over paired steps, which have the same batches, with its 95 % interval.
    """
    logs = statistics.bootstrap(np.log(above.step_seconds) - np.log(below.step_seconds))
    return Interval(*(math.exp(value) for value in logs))


# -- timing the loop -----------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is out of memory, on CUDA or in torch's allocator on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class _HostEvent:  # the interface of torch.cuda.Event on the host's clock
    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: _HostEvent) -> float:
        return 1e3 * (later.seconds - self.seconds)


def timed_by_events(step: Callable[[], T], steps: int, new_event: Callable[[], Any]) -> list[tuple[T, float]]:
    """Run `steps` steps and return (result, seconds) of each, synchronising only at the end.

    `new_event` returns a timing event (`record`, `synchronize`, `elapsed_time` in ms) on the stream of the
    steps. A step is timed from the end of the previous one: the longer of the device's and the host's time.
    """
    events = [new_event() for _ in range(steps + 1)]
    events[0].record()
    results = []
    for event in events[1:]:
        results.append(step())
        event.record()
    events[-1].synchronize()
    spans = [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]
    return list(zip(results, spans, strict=True))


class _Clock:
    """A trainer's loop, advanced step by step."""

    def __init__(self, trainer: Trainer, alone: bool = True) -> None:
        self.trainer, self.where, self.loop = trainer, trainer.where, trainer.steps()
        self.on_cuda = trainer.where.type == "cuda"
        self.alone = alone  # whether no other variant is in memory
        self.result = Measurement(compiled=trainer.compiles)
        self.random: list[torch.Tensor] = []  # state of torch's generators between rounds

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Set the precision of products and the random state of this variant."""
        cuda = [self.where] if self.on_cuda else []
        with torch.random.fork_rng(cuda):
            if self.random:
                torch.set_rng_state(self.random[0])
                for device, state in zip(cuda, self.random[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            else:
                torch.manual_seed(self.trainer.config.seed)
            hardware.set_matmul_precision(self.trainer.precision)
            hardware.synchronize(self.where)
            yield
            self.random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(x) for x in cuda)]

    def step(self, wait: bool = True) -> StepStats:
        """Run a step; without `wait` the device is not synchronised."""
        try:
            stats = next(self.loop)
        except StopIteration:
            raise ValueError(f"the schedule ended at step {self.trainer.total_steps}: raise epochs") from None
        if wait:
            hardware.synchronize(self.where)
        return stats

    def warm_up(self, steps: int) -> None:
        began = time.perf_counter()
        self.result.losses += [self.step().loss for _ in range(steps)]
        self.result.warmup_steps += steps
        self.result.warmup_seconds += time.perf_counter() - began

    def round(self, steps: int) -> None:
        """Time `steps` steps and measure their peak memory."""
        where, result, trainer = self.where, self.result, self.trainer
        hardware.reset_peak_memory(where)
        other_bytes = torch.cuda.memory_allocated(where) - state_bytes(trainer) if self.on_cuda else 0
        meter, began, is_first = Meter(where), time.perf_counter(), not result.step_seconds
        event = functools.partial(torch.cuda.Event, enable_timing=True) if self.on_cuda else _HostEvent
        timed = timed_by_events(lambda: self.step(wait=not self.on_cuda), steps, event)
        joules = meter.joules(time.perf_counter() - began)
        for stats, seconds in timed:
            result.losses.append(stats.loss)
            result.add(stats, seconds)
        complete = joules is not None and (is_first or result.joules is not None)  # in all rounds, or None
        result.joules = (result.joules or 0.0) + (joules or 0.0) if complete else None
        replays = self.on_cuda and trainer.graphs is not None  # a replayed CUDA graph allocates nothing
        peak = torch.cuda.max_memory_reserved(where) if replays else hardware.peak_memory_bytes(where)
        result.peak_memory_bytes = max(peak - other_bytes, result.peak_memory_bytes or 0)
        if self.on_cuda and self.alone:
            result.reserved_bytes = torch.cuda.max_memory_reserved(where)

    def energy(self) -> None:
        """Measure the energy of further steps, which take `ENERGY_SECONDS` and are not timed."""
        meter, began = Meter(self.where), time.perf_counter()
        steps = math.ceil(ENERGY_SECONDS / self.result.median_seconds)
        self.result.energy_sequences = sum(self.step(wait=False).num_sequences for _ in range(steps))
        hardware.synchronize(self.where)
        self.result.joules = meter.joules(time.perf_counter() - began)

    def stop(self, error: BaseException) -> None:
        """Turn an out-of-memory error into the result and free memory; raise any other error."""
        if not is_out_of_memory(error):
            raise error
        self.result = Measurement("oom", str(error).splitlines()[0])
        self.trainer.optimizer.zero_grad(set_to_none=True)
        self.trainer.optimizer.state.clear()
        if self.on_cuda:
            torch.cuda.empty_cache()


def measure(trainer: Trainer, steps: int, warmup: int, *, gpu_energy: bool = False) -> Measurement:
    """Time `steps` steps of a trainer after `warmup` steps."""
    return interleave({"": trainer}, steps, warmup, 1, gpu_energy=gpu_energy)[""]


def interleave(
    trainers: Mapping[str, Trainer], steps: int, warmup: int, repeats: int, *, gpu_energy: bool = False
) -> dict[str, Measurement]:
    """Time several trainers in turns, `repeats` rounds of `steps` steps each (A B A B).

    All of them stay in memory. On CUDA a variant's peak excludes the memory of the others, reserved memory is
    measured for a single variant only, and `gpu_energy` adds steps for the GPU's energy counter.
    """
    clocks = {name: _Clock(trainer, len(trainers) == 1) for name, trainer in trainers.items()}
    on_cuda = any(clock.on_cuda for clock in clocks.values())
    if on_cuda:
        torch.cuda.empty_cache()  # so that reserved memory is that of the trainers
    rounds: list[Callable[[_Clock], None]] = [lambda clock: clock.warm_up(warmup)]
    rounds += [lambda clock: clock.round(steps)] * repeats
    rounds += [_Clock.energy] if gpu_energy and on_cuda else []
    with contextlib.ExitStack() as stack:
        if any(clock.result.compiled for clock in clocks.values()):
            from torch._dynamo import config  # lazy: slow to import

            # Allow many variants in one process, and raise instead of silently falling back to eager.
            limits: Any = {"recompile_limit": RECOMPILE_LIMIT}
            limits["accumulated_recompile_limit"] = 4 * RECOMPILE_LIMIT
            stack.enter_context(config.patch(fail_on_recompile_limit_hit=True, **limits))
        for clock in clocks.values():
            stack.callback(clock.loop.close)  # type: ignore[attr-defined]
        for run_round in rounds:
            for clock in clocks.values():
                if clock.result.status != "ok":
                    continue
                try:
                    with clock.turn():
                        run_round(clock)
                except (RuntimeError, MemoryError) as error:
                    clock.stop(error)
    return {name: clock.result for name, clock in clocks.items()}


def state_bytes(trainer: Trainer) -> int:
    """Return the bytes of weights, gradients and the optimiser's state."""
    tensors: list[torch.Tensor] = list(trainer.model.parameters())
    tensors += [p.grad for p in tensors if p.grad is not None]
    states = trainer.optimizer.state.values()
    tensors += [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


@contextlib.contextmanager
def _loop(trainer: Trainer) -> Iterator[Iterator[StepStats]]:
    """Yield the trainer's loop in its precision, on a synchronised device; close it on leaving."""
    hardware.set_matmul_precision(trainer.precision)
    hardware.synchronize(trainer.where)
    with contextlib.closing(trainer.steps()) as loop:  # type: ignore[type-var]
        yield loop


class EpochClock(NamedTuple):
    """One whole epoch by the wall clock."""

    seconds: float
    sequences: int  # counted by the dataset, not by the loop

    @property
    def sequences_per_second(self) -> float:
        """The epoch's rate."""
        return self.sequences / self.seconds


def epoch_clock(trainer: Trainer) -> EpochClock:
    """Time one epoch without synchronising between steps; the trainer must be at the start of an epoch."""
    steps = trainer.steps_per_epoch
    if trainer.progress.step % steps:
        raise ValueError(f"step {trainer.progress.step} is inside an epoch of {steps} steps")
    sequences = int((trainer.histories.ends > trainer.histories.starts).sum())
    with _loop(trainer) as loop:
        began = time.perf_counter()
        count = sum(1 for _ in itertools.islice(loop, steps))
        hardware.synchronize(trainer.where)
        seconds = time.perf_counter() - began
    if count < steps:
        raise ValueError(f"the schedule ended after {count} of {steps} steps: raise epochs")
    return EpochClock(seconds, sequences)


def step_batches(trainer: Trainer, step: int) -> list[Batch]:
    """Return the micro-batches of optimiser step 1, 2, ..., equal to those of the loop."""
    epoch, within = divmod(step - 1, trainer.steps_per_epoch)
    return Epoch(trainer.histories, trainer.model.config, trainer.config, epoch).step(within)


def step_flops(trainer: Trainer, step: int) -> tuple[Flops, Flops]:
    """Return the FLOPs that a step executes, and those that the masked-item objective needs."""
    model, batches = trainer.model.config, step_batches(trainer, step)
    executed = work.total([work.executed(model, trainer.config, batch) for batch in batches])
    return executed, work.total([work.needed(model, batch) for batch in batches])


# -- profiles: time by operator, type of products, and peak memory -------------------------------------------

_CHATTER = ("USDT:", "CPUAllocator.cpp")


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Remove messages of the profiler's C++ code from standard error."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile("w+b") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.write("".join(x for x in lines if not any(word in x for word in _CHATTER)))


def _profiled(trainer: Trainer, before: int, steps: int, **options: Any) -> tuple[profile, int]:
    """Profile `steps` steps after `before` others; return the profiler and `state_bytes` at its start."""
    with _loop(trainer) as loop:
        for _ in range(before):
            next(loop)
        held = state_bytes(trainer)
        hardware.synchronize(trainer.where)
        with _without_chatter(), profile(**options) as profiler:
            for _ in range(steps):
                next(loop)
            hardware.synchronize(trainer.where)
    return profiler, held


class Operator(NamedTuple):
    """Self time of an operator, per step."""

    name: str
    calls: float
    seconds: float
    share: float  # of all operators


def operators(trainer: Trainer, steps: int, top: int, trace: Path | None = None) -> list[Operator]:
    """Profile `steps` steps after two others; return the `top` operators by self time, then all others.

    Time is the device's on CUDA and the processor's on a CPU. `trace` is a file for a Chrome trace.
    """
    cuda = trainer.where.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    profiler, _ = _profiled(trainer, 2, steps, activities=activities)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    rows = []
    for event in profiler.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if micros > 0 and not (cuda and (event.device_type == DeviceType.CPU or event.is_user_annotation)):
            rows.append((event.key, event.count / steps, micros / 1e6 / steps))
    rows.sort(key=lambda row: -row[2])
    if remaining := rows[top:]:
        rows[top:] = [("all others", sum(row[1] for row in remaining), sum(row[2] for row in remaining))]
    total = sum(seconds for *_, seconds in rows)
    return [Operator(name, calls, seconds, seconds / total) for name, calls, seconds in rows]


class _Products(TorchDispatchMode):
    """Records the types of all products that have one of `widths` as a dimension."""

    NAMES = ("mm", "addmm", "bmm", "linear", "matmul", "_scaled_mm")

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths, self.types = widths, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NAMES or "linear_cross_entropy" in name:
            tensors = [x for x in args if isinstance(x, torch.Tensor) and x.dim() > 1]
            if any(size in self.widths for x in tensors for size in x.shape):
                self.types |= {x.dtype for x in tensors}
        return func(*args, **(kwargs or {}))


def head_dtype(trainer: Trainer) -> str:
    """Return the type of the head's product, from the operators of one forward pass.

    "fp32 and bf16" means operands of different types. Weights are not changed.
    """
    model, config = trainer.model, trainer.model.config
    batch = step_batches(trainer, 1)[0].to(trainer.where)
    products = _Products((config.num_items, config.output_rows))  # only the head has the catalogue's width
    with torch.no_grad(), trainer.autocast(), products:
        batch_loss(model, batch, trainer.config, batch.num_targets, model.encode, trainer.route)
    names = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return " and ".join(sorted(names.get(dtype, str(dtype)) for dtype in products.types)) or "unknown"


def peak_tensor_bytes(trainer: Trainer) -> int:
    """Return the peak bytes of tensors in one step, weights and optimiser included.

    Counted from the profiler's allocations, and so independent of the allocator and other models.
    """
    profiler, held = _profiled(trainer, 1, 1, activities=[ProfilerActivity.CPU], profile_memory=True)
    kind = DeviceType.CUDA if trainer.where.type == "cuda" else DeviceType.CPU
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    events = sorted((e for e in events if e.device_type() == kind), key=lambda e: e.start_ns())
    return held + max(0, *itertools.accumulate(event.nbytes() for event in events))
