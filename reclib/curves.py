"""What a training run shows while it goes on: loss, rates, norm, memory and validation, for a tracker.

Names are `train/`, `valid/` and `run/` with what people look for. On CUDA a loss is read only at the steps at
which the loop waits for the device anyway, so that watching a run does not slow it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from reclib import hardware
from reclib.hardware import Device
from reclib.tracker import Tracker
from reclib.trainer import CHECK_EVERY, StepStats

_RUN = ("epoch", "tokens", "train_seconds", "eval_seconds")  # of a row of the history, what is no metric


class Curves:
    """The callbacks of one training run; give them to `fit.Options`."""

    def __init__(self, track: Tracker, device: Device) -> None:
        """Take where the numbers go and what the run is on."""
        self._track, self._where = track, device.torch_device
        self._window: list[StepStats] = []  # since the last time that something was logged
        self._begun: float | None = None  # when the window began; None: not at a step that was waited for
        self._sequences = 0  # since the last evaluation
        self._before: tuple[float, float] | None = None  # (tokens, train_seconds) at the last evaluation

    def step(self, stats: StepStats) -> None:
        """Take one step; log the mean of a window of `CHECK_EVERY`."""
        if stats.step == 1:
            self._before = (0.0, 0.0)
        self._window.append(stats)
        self._sequences += stats.num_sequences
        if stats.step % CHECK_EVERY:
            return
        values = self._losses()  # waits for the device
        now = time.perf_counter()
        if self._begun is not None:
            values |= self._rates(now - self._begun)
        self._log(values, stats.step)
        self._begun = now

    def evaluation(self, row: Mapping[str, float]) -> None:
        """Log a row of the history; on a CPU, where no work is left to wait for, with the rates since."""
        values = self._losses() if self._window else {}
        if self._before is not None and self._where.type == "cpu":
            tokens, seconds = row["tokens"] - self._before[0], row["train_seconds"] - self._before[1]
            values["train/tokens_per_second"] = tokens / seconds
            values["train/sequences_per_second"] = self._sequences / seconds
        for name, value in row.items():
            if name == "train_loss":
                values["train/epoch_loss"] = value
            elif name not in ("step", "learning_rate"):
                values[f"run/{name}" if name in _RUN else f"valid/{name.removeprefix('valid_')}"] = value
        self._log(values, int(row["step"]))
        self._before, self._sequences, self._begun = (row["tokens"], row["train_seconds"]), 0, None

    def _losses(self) -> dict[str, float]:
        """Return the window's mean loss over targets, its last gradient norm and learning rate."""
        counted = [stats for stats in self._window if not stats.skipped]
        targets = sum(stats.num_targets for stats in counted)
        values = {"train/learning_rate": self._window[-1].learning_rate}
        if targets:
            values["train/loss"] = sum(stats.loss * stats.num_targets for stats in counted) / targets
            if (norm := counted[-1].grad_norm) is not None:
                values["train/gradient_norm"] = norm
        return values

    def _rates(self, seconds: float) -> dict[str, float]:
        return {
            "train/tokens_per_second": sum(stats.num_tokens for stats in self._window) / seconds,
            "train/sequences_per_second": sum(stats.num_sequences for stats in self._window) / seconds,
        }

    def _log(self, values: dict[str, float], step: int) -> None:
        self._window = []
        self._track.log(values | {"run/peak_memory_bytes": hardware.peak_memory_bytes(self._where)}, step)
