"""Training time, looks at validation, the best weights and the end of a fit, alike for every peer.

Runs inside each peer's own environment, like `peer_common`. Training time runs from the first step to the
present, what the library does between its steps included; start-up and every look at validation are left
out of it.
"""

import argparse
import copy
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_common import Data, accuracy, write_arrays


class Selection:
    """Looks at validation every `valid_every` epochs, or when training time passes one of `marks`.

    `recommend(with_valid)` returns (users, k) item ids, best first, seen items removed; the history of each
    user includes the validation item where `with_valid`. `state()` returns the weights.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: Data,
        recommend: Callable[[bool], np.ndarray],
        state: Callable[[], dict[str, torch.Tensor]],
    ) -> None:
        self.args, self.data, self.recommend, self.state = args, data, recommend, state
        self.marks = [60 * minutes for minutes in args.marks or []]
        self.limit = 60 * args.minutes if args.minutes else None
        self.stop = False
        self.best: dict[str, torch.Tensor] | None = None
        self.best_row: dict[str, float] = {}
        self.best_top: np.ndarray | None = None
        self.rows: list[dict[str, float]] = []
        self.mark_tops: list[np.ndarray] = []
        self.eval_seconds = 0.0
        self.startup_seconds: float | None = None
        self._spent = 0.0
        self._cpu_spent = 0.0
        self._cpu_since = 0.0
        self._running_since: float | None = None
        self._stale = 0
        self._steps = 0
        self._steps_per_epoch = 0
        self._steps_seen = -1  # at the latest look at validation

    def start(self, steps_per_epoch: int) -> None:
        """Training begins: everything before this was start-up."""
        self._steps_per_epoch = steps_per_epoch
        self.startup_seconds = process_age()
        self._go_on()

    @property
    def seconds(self) -> float:
        """Training time so far."""
        running = 0.0 if self._running_since is None else time.perf_counter() - self._running_since
        return self._spent + running

    def step_done(self) -> bool:
        """Look at validation if a mark has been passed; return whether it was looked at."""
        self._steps += 1
        looked = False
        while len(self.mark_tops) < len(self.marks) and self.seconds >= self.marks[len(self.mark_tops)]:
            self.mark_tops.append(self._look())
            looked = True
        all_marks = bool(self.marks) and len(self.mark_tops) == len(self.marks)
        if all_marks or (self.limit is not None and self.seconds >= self.limit):
            self.stop = True
        return looked

    def epoch_done(self, epochs: int) -> bool:
        """Look at validation if it is due, keep the best weights; return whether it was looked at.

        Called too for an epoch that was cut short, once `stop` is set.
        """
        last = self.stop or epochs == self.args.epochs
        if self.marks or self._steps == self._steps_seen or not (last or epochs % self.args.valid_every == 0):
            return False
        top = self._look()
        row = self.rows[-1]
        if not self.best_row or row["ndcg@10"] > self.best_row["ndcg@10"]:
            self.best_row, self.best_top, self._stale = row, top, 0
            self.best = copy.deepcopy(self.state())
        else:
            self._stale += 1
        if self.args.patience and self._stale >= self.args.patience:
            self.stop = True
        return True

    def finish(self) -> None:
        """Training is over; the clock stands still."""
        self._pause()

    @property
    def cpu_seconds(self) -> float:
        """Processor time of training up to the latest pause; below `seconds` where others had the cores."""
        return self._cpu_spent

    def _go_on(self) -> None:
        self._running_since, self._cpu_since = time.perf_counter(), time.process_time()

    def _pause(self) -> None:
        if self._running_since is not None:
            self._spent, self._running_since = self.seconds, None
            self._cpu_spent += time.process_time() - self._cpu_since

    def _look(self) -> np.ndarray:
        """Recommend on the validation condition, off the clock, with the random state left as it was."""
        self._pause()
        began = time.perf_counter()
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        top = self.recommend(False)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        figures = accuracy(top, self.data.valid)
        self.rows.append(
            {
                "epoch": self._steps / self._steps_per_epoch,
                "train_seconds": self._spent,
                "cpu_seconds": self._cpu_spent,
                "hr@10": figures["hr@10"],
                "ndcg@10": figures["ndcg@10"],
            }
        )
        said = "  ".join(f"{name} {value:.4f}" for name, value in self.rows[-1].items())
        print(f"validation: {said}", flush=True)
        self._steps_seen = self._steps
        self.eval_seconds += time.perf_counter() - began
        self._go_on()
        return top

    def arrays(self) -> dict[str, np.ndarray]:
        """The looks at validation as columns; the best one's or the marks' recommendations."""
        columns = {f"look_{name}": np.array([row[name] for row in self.rows]) for name in self.rows[0]}
        if self.marks:
            reached = len(self.mark_tops)
            tops = np.stack(self.mark_tops).astype(np.int32) if reached else np.zeros((0, 0, 0), np.int32)
            return columns | {"mark_minutes": np.array(self.args.marks[:reached]), "mark_top": tops}
        assert self.best_top is not None
        return columns | {"valid_top": self.best_top.astype(np.int32)}


def lightning_selection(base: type, selection: Selection) -> Any:
    """A Lightning callback that drives `selection`; ``base`` is the Callback class in use."""

    class SelectionCallback(base):
        def __deepcopy__(self, memo: dict) -> "SelectionCallback":
            return self  # RecTools copies its trainer; the selection must stay the one

        def on_train_start(self, trainer: Any, module: Any) -> None:
            selection.start(trainer.num_training_batches)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if selection.step_done():
                module.train()
            trainer.should_stop = trainer.should_stop or selection.stop

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if selection.epoch_done(trainer.current_epoch + 1):
                module.train()
            trainer.should_stop = trainer.should_stop or selection.stop

        def on_train_end(self, trainer: Any, module: Any) -> None:
            selection.finish()

    return SelectionCallback()


def outcome(
    args: argparse.Namespace, data: Data, model: torch.nn.Module, selection: Selection
) -> dict[str, Any]:
    """Recommend once with the best weights, write the file and return what the fit took and reached.

    After a curve nothing is recommended for the test.
    """
    arrays = selection.arrays()
    found: dict[str, Any] = {}
    if not args.marks:
        assert selection.best is not None  # a fit ends with a look at validation
        model.load_state_dict(selection.best)
        arrays["top"] = selection.recommend(True)
        found = accuracy(arrays["top"], data.test)
    if args.out:
        write_arrays(args.out, arrays)
    return found | {
        "train_seconds": selection.seconds,
        "cpu_seconds": selection.cpu_seconds,
        "startup_seconds": selection.startup_seconds,
        "validation_seconds": selection.eval_seconds,
        "best": selection.best_row,
    }


def process_age() -> float | None:
    """Seconds since this process started, imports and a start over with other threads included (Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[19])
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
