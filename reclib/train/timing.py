"""Timing the training loop: the one of `trainer`, stepped from outside and never re-written here.

What is timed is a whole step: fetch, forward, backward, clip, optimiser. On a CPU the clock is read
around each step. On CUDA an event is recorded after each step and all are read at the end of a round:
the host launches the next step while the device computes, as in training. Warm-up is left out and
counted, compile time stands apart, variants are interleaved (A B A B), and a rate is believed only
beside an independent clock over a whole epoch. Running out of memory is a result.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
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
from reclib.data.dataset import Evaluation, Histories
from reclib.evaluate import metrics, statistics
from reclib.evaluate.statistics import Interval
from reclib.train.losses import batch_loss
from reclib.train.trainer import StepStats, Trainer

# ------------------------------------------------------------------------------------------------
# Joules that a device says it has used: NVIDIA's counter (NVML) on a GPU, RAPL of a Linux CPU's packages.
#
# Both count the whole device, whoever uses it. Counters are updated tens of times a second, so that a
# reading over less than `SHORTEST` seconds is none. Where nothing can be read the answer is None, never
# zero.

EPOCHS = 100_000  # of what is timed: its schedule never ends meanwhile

SHORTEST = 2.0  # seconds of a region that can be told from the counter's steps

RAPL = Path("/sys/class/powercap")


class Meter:
    """Joules since it was started, on one device."""

    def __init__(self, device: torch.device) -> None:
        """Start to count."""
        self.read = _nvml(device) if device.type == "cuda" else _rapl()
        self.before = None if self.read is None else self.read()

    def joules(self, seconds: float) -> float | None:
        """Return what was used in the `seconds` since the start; None: not reported, or too short to tell."""
        if self.read is None or self.before is None or seconds < SHORTEST:
            return None
        used = self.read() - self.before
        return used if used > 0 else None  # a counter that wrapped has lost its count


def _rapl(root: Path = RAPL) -> Callable[[], float] | None:
    """Return a reader of all packages; None where the kernel shows none, or not to this user."""
    files = sorted(root.glob("intel-rapl:?/energy_uj"))  # AMD's have the same names
    try:
        if not files or not [file.read_text() for file in files]:
            return None
    except OSError:
        return None
    return lambda: 1e-6 * sum(int(file.read_text()) for file in files)


def _nvml(device: torch.device) -> Callable[[], float] | None:
    """Return a reader of a GPU's counter (Volta and later); None where the driver has none."""
    library = _library()
    if library is None:
        return None
    handle, counted = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None

    def read() -> float:
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(counted)):
            raise OSError("NVML's energy counter could be read before and cannot now")
        return 1e-3 * counted.value  # millijoules

    return None if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(counted)) else read


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library


# ------------------------------------------------------------------------------------------------
# What timing a variant gives: its steps, what they held, and the rates that follow.
#
# Plain numbers, no device: `timing` fills them in.

Status = Literal["ok", "oom", "not applicable"]

DISAGREEMENT = 0.05  # share by which the epoch's rate may differ from the steady one


@dataclass
class Measurement:
    """What one variant did in its timed steps; everything is empty unless `status` is "ok"."""

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
    row_tokens: int = 0  # places in the rows, used or not
    target_slots: int = 0  # places in the head, used or not
    peak_memory_bytes: int | None = None  # CUDA: allocated for this variant; CPU: resident in the process
    reserved_bytes: int | None = None  # CUDA only
    joules: float | None = None  # where the device reports it
    energy_sequences: int = 0  # of the steps that they were used for; 0: of the timed steps

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
        low, middle, high = np.percentile(self.step_seconds, [25, 50, 75])
        return float(low), float(middle), float(high)

    @property
    def median_seconds(self) -> float:
        """Median step, seconds."""
        return self.quartiles[1]

    def _rate(self, counted: int) -> float:
        # Steps differ in what they hold: the mean step's content over the median step's time.
        return counted / len(self.step_seconds) / self.median_seconds

    @property
    def sequences_per_second(self) -> float:
        """Sequences at the median step."""
        return self._rate(self.sequences)

    @property
    def tokens_per_second(self) -> float:
        """Real items at the median step; padding is no work."""
        return self._rate(self.tokens)

    @property
    def targets_per_second(self) -> float:
        """Targets at the median step."""
        return self._rate(self.targets)

    @property
    def fetch_share(self) -> float:
        """Share of the time that the loop waits for its batch."""
        return sum(self.fetch_seconds) / sum(self.step_seconds)

    @property
    def fill(self) -> float:
        """Share of the places in the rows that hold a real item."""
        return self.tokens / self.row_tokens

    @property
    def compile_seconds(self) -> float:
        """What the warm-up took beyond as many median steps; 0 where nothing was compiled."""
        if not self.compiled or not self.step_seconds:
            return 0.0
        return max(0.0, self.warmup_seconds - self.warmup_steps * self.median_seconds)

    @property
    def joules_per_sequence(self) -> float | None:
        """Energy of a sequence; None where it is not reported."""
        return None if self.joules is None else self.joules / (self.energy_sequences or self.sequences)

    def timings(self) -> dict[str, float | int | None]:
        """Return what depends on the clock, for a record; empty unless `status` is "ok"."""
        if self.status != "ok":
            return {}
        low, middle, high = self.quartiles
        return {
            "step_seconds": middle,
            "step_seconds_low": low,
            "step_seconds_high": high,
            "sequences_per_second": self.sequences_per_second,
            "tokens_per_second": self.tokens_per_second,
            "targets_per_second": self.targets_per_second,
            "fetch_share": self.fetch_share,
            "warmup_seconds": self.warmup_seconds,
            "compile_seconds": self.compile_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "reserved_bytes": self.reserved_bytes,
            "joules_per_sequence": self.joules_per_sequence,
        }

    def counts(self) -> dict[str, int]:
        """Return what does not depend on the clock, for a record."""
        names = ("sequences", "tokens", "targets", "row_tokens", "target_slots")
        return {"timed_steps": len(self.step_seconds), "warmup_steps": self.warmup_steps} | {
            name: getattr(self, name) for name in names
        }


def published_rate(steady: float, epoch: float) -> tuple[float, Literal["steady", "epoch"]]:
    """Return the rate to publish and whose it is: the epoch's wherever the two differ by more than 5 %."""
    return (epoch, "epoch") if abs(steady - epoch) > DISAGREEMENT * epoch else (steady, "steady")


def break_even_steps(compile_seconds: float, eager_step: float, compiled_step: float) -> int | None:
    """Return after how many steps compiling has paid for itself; None: never."""
    saved = eager_step - compiled_step
    return math.ceil(compile_seconds / saved) if saved > 0 else None


def merged(parts: list[Measurement]) -> Measurement:
    """Return several rounds of one variant as one; a round that failed is the result.

    Compile time and the first losses are those of the first round, before caches were warm.
    """
    failed = next((part for part in parts if part.status != "ok"), None)
    if failed is not None:
        return failed
    first = parts[0]
    whole = replace(first, step_seconds=[], fetch_seconds=[])
    for part in parts:
        whole.step_seconds += part.step_seconds
        whole.fetch_seconds += part.fetch_seconds
    for name in ("sequences", "tokens", "targets", "row_tokens", "target_slots", "energy_sequences"):
        setattr(whole, name, sum(getattr(part, name) for part in parts))
    peaks = [part.peak_memory_bytes for part in parts if part.peak_memory_bytes is not None]
    whole.peak_memory_bytes = max(peaks, default=None)
    joules = [part.joules for part in parts if part.joules is not None]
    whole.joules = sum(joules) if len(joules) == len(parts) else None
    return whole


# ------------------------------------------------------------------------------------------------

RECOMPILE_LIMIT = 256  # compiled variants of one process share `encode`, and torch stops at 8

ENERGY_SECONDS = 2.5  # of the steps whose energy a GPU's counter tells, somewhat above `timing.SHORTEST`

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on CUDA or in torch's allocator on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def timed_by_events(step: Callable[[], T], steps: int, new_event: Callable[[], Any]) -> list[tuple[T, float]]:
    """Take `steps` steps and return what each gave with its seconds, waiting for the device only at the end.

    `new_event` makes a timing event (`record`, `synchronize`, `elapsed_time` in ms) on the stream of the
    steps. A step lasts from the end of the one before to its own: the device's time or the host's,
    whichever is longer.
    """
    events = [new_event() for _ in range(steps + 1)]
    events[0].record()
    given = []
    for event in events[1:]:
        given.append(step())
        event.record()
    events[-1].synchronize()
    spans = [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]
    return list(zip(given, spans, strict=True))


class _Clock:
    """A trainer's loop, advanced a step at a time."""

    def __init__(self, trainer: Trainer, alone: bool = True) -> None:
        self.trainer = trainer
        self.alone = alone  # nothing else that is timed is in memory
        self.found = Measurement(compiled=trainer.compiles)
        self.loop = trainer.steps()
        self.random: list[torch.Tensor] = []  # state of torch's generators between rounds

    @contextlib.contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Draw dropout from this variant's own stream: the others' turns must not change its masks."""
        cuda = [self.trainer.where] if self.trainer.where.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            if self.random:
                torch.set_rng_state(self.random[0])
                for device, state in zip(cuda, self.random[1:], strict=True):
                    torch.cuda.set_rng_state(state, device)
            else:
                torch.manual_seed(self.trainer.config.seed)
            yield
            self.random = [torch.get_rng_state(), *(torch.cuda.get_rng_state(x) for x in cuda)]

    def warm_up(self, steps: int) -> None:
        hardware.set_matmul_precision(self.trainer.precision)
        began = time.perf_counter()
        for _ in range(steps):
            self._next()
        self.found.warmup_steps += steps
        self.found.warmup_seconds += time.perf_counter() - began

    def round(self, steps: int) -> None:
        """Time `steps` steps and take the peak of memory in them."""
        where = self.trainer.where
        hardware.set_matmul_precision(
            self.trainer.precision
        )  # one switch for the process: the last one rules
        hardware.synchronize(where)
        hardware.reset_peak_memory(where)
        others = torch.cuda.memory_allocated(where) - state_bytes(self.trainer) if where.type == "cuda" else 0
        meter, whole = Meter(where), time.perf_counter()
        if where.type == "cuda":
            timed = timed_by_events(self._launch, steps, lambda: torch.cuda.Event(enable_timing=True))
            self.found.losses += [stats.loss for stats, _ in timed]
            for stats, seconds in timed:
                self.found.add(stats, seconds)
        else:
            for _ in range(steps):
                began = time.perf_counter()
                stats = self._next()
                self.found.add(stats, time.perf_counter() - began)
        used, first = meter.joules(time.perf_counter() - whole), len(self.found.step_seconds) == steps
        told = used is not None and (first or self.found.joules is not None)
        self.found.joules = (self.found.joules or 0.0) + (used or 0.0) if told else None
        graphs = where.type == "cuda" and self.trainer.graphs is not None  # a replay allocates nothing
        peak = (
            torch.cuda.max_memory_reserved(where) if graphs else hardware.peak_memory_bytes(where)
        ) - others
        self.found.peak_memory_bytes = max(peak, self.found.peak_memory_bytes or 0)
        if where.type == "cuda" and self.alone:
            self.found.reserved_bytes = torch.cuda.max_memory_reserved(where)

    def energy(self) -> None:
        """Take further steps, `ENERGY_SECONDS` of them, for the energy of a step; they are not timed."""
        where, sequences = self.trainer.where, 0
        hardware.set_matmul_precision(self.trainer.precision)
        hardware.synchronize(where)
        meter, began = Meter(where), time.perf_counter()
        for _ in range(math.ceil(ENERGY_SECONDS / self.found.median_seconds)):
            sequences += self._launch().num_sequences
        hardware.synchronize(where)
        self.found.joules = meter.joules(time.perf_counter() - began)
        self.found.energy_sequences = sequences

    def _next(self) -> StepStats:
        stats = self._launch()
        hardware.synchronize(self.trainer.where)
        self.found.losses.append(stats.loss)
        return stats

    def _launch(self) -> StepStats:
        """Take a step and do not wait for the device."""
        try:
            return next(self.loop)
        except StopIteration:
            raise ValueError(f"the schedule ended at step {self.trainer.total_steps}: raise epochs") from None

    def stop(self, error: BaseException) -> None:
        """Turn an error of memory into the result and let go of what was held; raise any other."""
        if not is_out_of_memory(error):
            raise error
        self.found = Measurement("oom", str(error).splitlines()[0])
        self.trainer.optimizer.zero_grad(set_to_none=True)
        self.trainer.optimizer.state.clear()
        if self.trainer.where.type == "cuda":
            torch.cuda.empty_cache()


def measure(trainer: Trainer, steps: int, warmup: int, *, gpu_energy: bool = False) -> Measurement:
    """Time `steps` steps of a trainer after `warmup` others."""
    return interleave({"": trainer}, steps, warmup, 1, gpu_energy=gpu_energy)[""]


def interleave(
    trainers: Mapping[str, Trainer], steps: int, warmup: int, repeats: int, *, gpu_energy: bool = False
) -> dict[str, Measurement]:
    """Time several trainers in turns, `repeats` rounds of `steps` steps each (A B A B).

    All of them stay in memory. On CUDA a variant's peak leaves out what the others hold, reserved memory is
    told of one alone, and `gpu_energy` adds steps of each variant, as many as the GPU's energy counter
    needs.
    """
    clocks = {name: _Clock(trainer, len(trainers) == 1) for name, trainer in trainers.items()}
    on_cuda = any(trainer.where.type == "cuda" for trainer in trainers.values())
    if on_cuda:
        torch.cuda.empty_cache()  # what is reserved is then of these
    last = repeats + 1 + int(gpu_energy and on_cuda)
    with contextlib.ExitStack() as stack:
        if any(clock.found.compiled for clock in clocks.values()):
            stack.enter_context(many_compiled())
        for clock in clocks.values():
            stack.enter_context(contextlib.closing(clock.loop))  # type: ignore[type-var]
        for number in range(last):
            for clock in clocks.values():
                if clock.found.status != "ok":
                    continue
                try:
                    with clock.own_randomness():
                        if number == 0:
                            clock.warm_up(warmup)
                        elif number <= repeats:
                            clock.round(steps)
                        else:
                            clock.energy()
                except (RuntimeError, MemoryError) as error:
                    clock.stop(error)
    return {name: clock.found for name, clock in clocks.items()}


def paired_ratio(above: Measurement, below: Measurement) -> Interval:
    """Return how many times as long a step of `above` takes, from steps that were timed in turns.

    The geometric mean of the ratios of paired steps, which are of the same batches, with its 95 % interval.
    """
    found = statistics.bootstrap(np.log(above.step_seconds) - np.log(below.step_seconds))
    return Interval(*(math.exp(value) for value in found))


@contextlib.contextmanager
def many_compiled() -> Iterator[None]:
    """Let many variants be compiled in one process, and fail rather than fall back to eager in silence."""
    import torch._dynamo  # heavy, and of use only where something is compiled

    limits: dict[str, Any] = {
        "recompile_limit": RECOMPILE_LIMIT,
        "accumulated_recompile_limit": 4 * RECOMPILE_LIMIT,
    }
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, **limits):
        yield


def state_bytes(trainer: Trainer) -> int:
    """Return the bytes of weights, gradients and the optimiser's state."""
    tensors: list[torch.Tensor] = list(trainer.model.parameters())
    tensors += [p.grad for p in tensors if p.grad is not None]
    states = trainer.optimizer.state.values()
    tensors += [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)


class EpochClock(NamedTuple):
    """One whole epoch by the wall clock."""

    seconds: float
    sequences: int  # counted by the dataset, not by the loop

    @property
    def sequences_per_second(self) -> float:
        """The epoch's rate."""
        return self.sequences / self.seconds


def epoch_clock(trainer: Trainer) -> EpochClock:
    """Time one epoch from its first batch to its last, with nothing but the loop inside.

    The trainer must stand at the start of an epoch. Nothing is synchronised between steps.
    """
    if trainer.progress.step % trainer.steps_per_epoch:
        raise ValueError(
            f"step {trainer.progress.step} is inside an epoch of {trainer.steps_per_epoch} steps"
        )
    sequences = int((trainer.histories.ends > trainer.histories.starts).sum())
    hardware.set_matmul_precision(trainer.precision)
    hardware.synchronize(trainer.where)
    began = time.perf_counter()
    with contextlib.closing(trainer.steps()) as loop:  # type: ignore[type-var]
        done = sum(1 for _ in itertools.islice(loop, trainer.steps_per_epoch))
        hardware.synchronize(trainer.where)
        seconds = time.perf_counter() - began
    if done < trainer.steps_per_epoch:
        raise ValueError(f"the schedule ended after {done} of {trainer.steps_per_epoch} steps: raise epochs")
    return EpochClock(seconds, sequences)


def step_batches(trainer: Trainer, step: int) -> list[Batch]:
    """Return the micro-batches of optimiser step 1, 2, ...: the loop's own, drawn again."""
    epoch, within = divmod(step - 1, trainer.steps_per_epoch)
    return Epoch(trainer.histories, trainer.model.config, trainer.config, epoch).step(within)


def step_flops(trainer: Trainer, step: int) -> tuple[Flops, Flops]:
    """Return the FLOPs that a step executes, and those that the masked-item objective needs for it."""
    model, batches = trainer.model.config, step_batches(trainer, step)
    done = work.total([work.executed(model, trainer.config, batch) for batch in batches])
    return done, work.total([work.needed(model, batch) for batch in batches])


class Latency(NamedTuple):
    """Time of one request, seconds."""

    p50: float
    p99: float
    requests: int


def latency(trainer: Trainer, histories: Histories, requests: int, warmup: int = 3) -> Latency:
    """Time requests one at a time: a history in, the ten best items that are not in it out."""
    seconds = []
    for number in range(warmup + requests):
        user = slice(number % len(histories.starts), number % len(histories.starts) + 1)
        one = Histories(histories.items, histories.starts[user], histories.ends[user])
        asked = Evaluation(one, histories.items[one.starts])  # ranked beside, at no cost that shows
        hardware.synchronize(trainer.where)
        began = time.perf_counter()
        with trainer.autocast():
            scores = metrics.model_scores(trainer.model, asked, trainer.where)
            metrics.rank(scores, asked, remove_seen=True, top_k=10)
        seconds.append(time.perf_counter() - began)
    low, high = np.percentile(seconds[warmup:], [50, 99])
    return Latency(float(low), float(high), requests)


# ------------------------------------------------------------------------------------------------
# Where a step's time goes, what type its products run in, and what it holds at its peak.

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
        if micros > 0 and not (cuda and (event.device_type == DeviceType.CPU or event.is_user_annotation)):
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
