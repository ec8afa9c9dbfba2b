"""Timing the training loop: the one of `trainer`, stepped from outside and never re-written here.

What is timed is a whole step: fetch, forward, backward, clip, optimiser. On a CPU the clock is read
around each step. On CUDA an event is recorded after each step and all are read at the end of a round:
the host launches the next step while the device computes, as in training. Warm-up is left out and
counted, compile time stands apart, variants are interleaved (A B A B), and a rate is believed only
beside an independent clock over a whole epoch. Running out of memory is a result.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from reclib import energy, flops, hardware, metrics
from reclib.batching import Batch, Epoch
from reclib.data import Evaluation, Histories
from reclib.flops import Flops
from reclib.measurement import Measurement
from reclib.metrics import Interval
from reclib.trainer import StepStats, Trainer

RECOMPILE_LIMIT = 256  # compiled variants of one process share `encode`, and torch stops at 8
ENERGY_SECONDS = 2.5  # of the steps whose energy a GPU's counter tells, somewhat above `energy.SHORTEST`

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
        meter, whole = energy.Meter(where), time.perf_counter()
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
        peak = hardware.peak_memory_bytes(where) - others
        self.found.peak_memory_bytes = max(peak, self.found.peak_memory_bytes or 0)
        if where.type == "cuda" and self.alone:
            self.found.reserved_bytes = torch.cuda.max_memory_reserved(where)

    def energy(self) -> None:
        """Take further steps, `ENERGY_SECONDS` of them, for the energy of a step; they are not timed."""
        where, sequences = self.trainer.where, 0
        hardware.set_matmul_precision(self.trainer.precision)
        hardware.synchronize(where)
        meter, began = energy.Meter(where), time.perf_counter()
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
    found = metrics.bootstrap(np.log(above.step_seconds) - np.log(below.step_seconds))
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
    done = flops.total([flops.executed(model, trainer.config, batch) for batch in batches])
    return done, flops.total([flops.needed(model, batch) for batch in batches])


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
