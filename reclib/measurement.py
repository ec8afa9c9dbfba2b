"""What timing a variant gives: its steps, what they held, and the rates that follow.

Plain numbers, no device: `benchmark` fills them in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from reclib.trainer import StepStats

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
