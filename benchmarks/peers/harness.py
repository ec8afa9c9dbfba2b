"""What the peers' scripts share: arguments, data, the clock of steps, looks at validation, the report.

Runs inside each peer's own environment: it imports numpy, torch and the standard library, nothing of this
project. A script has a class of what `run` needs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

SHAPES = {  # hidden, layers, heads, max_len, batch_size
    "electronics": (256, 4, 4, 50, 128),
    "ml": (64, 2, 2, 200, 64),
    "default": (256, 2, 4, 200, 128),  # RecTools' and RePlay's defaults, but for the length
}
LIGHTNING = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def parse_args(doc: str | None, losses: tuple[str, ...], models: tuple[str, ...]) -> argparse.Namespace:
    """Read the command line and make sure that the thread count holds from the first import of torch."""
    parser = argparse.ArgumentParser(description=doc)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), required=True)
    add("--data", type=Path, required=True, help="npz: items, offsets, num_items; for --fit valid, test")
    add("--threads", type=int, default=2)
    add("--steps", type=int, default=10)
    add("--warmup", type=int, default=2)
    add("--eval", action="store_true", help="time the ranking of all users too")
    add("--loss", choices=losses, default=losses[0])
    add("--negatives", type=int, default=256, help="for the sampled loss")
    add("--mask-prob", type=float, default=0.2)
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=1e-3)
    names = ("hidden", "layers", "heads", "max_len", "batch_size")
    for name in names:
        add(f"--{name.replace('_', '-')}", type=int, help="another than the shape's")
    add("--eval-batch-size", type=int, default=256)
    add("--topk", type=int, default=10)
    add("--seed", type=int, default=0)
    add("--fit", action="store_true", help="train to the end and recommend")
    add("--model", choices=models, default=models[0])
    add("--epochs", type=int, help="with --fit: stop after so many")
    add("--minutes", type=float, help="with --fit: stop after so much training time")
    add("--valid-every", type=int, default=5, help="epochs between looks at validation")
    add("--patience", type=int, default=0, help="looks without a better one; 0: never stop")
    add("--marks", type=float, nargs="+", help="with --fit: look at these minutes, no test")
    add("--out", type=Path, help="with --fit: npz of recommendations per user")
    args = parser.parse_args()
    if args.fit and not (args.epochs or args.minutes or args.marks):
        parser.error("--fit needs --epochs, --minutes or --marks")
    for name, value in zip(names, SHAPES[args.shape], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.data = args.data.resolve()
    args.out = args.out.resolve() if args.out else None
    if os.environ.get("OMP_NUM_THREADS") != str(args.threads):
        # OpenMP reads this once, when torch is loaded: start over with it set.
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    return args


@dataclass
class Data:
    """One training sequence per user, ids 1..num_items; held-out items where the file has them."""

    items: np.ndarray
    offsets: np.ndarray
    num_items: int
    valid: np.ndarray | None
    test: np.ndarray | None

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    def sequences(self, with_valid: bool = False) -> list[np.ndarray]:
        """The users' sequences; `with_valid` appends the validation item, as at test time."""
        training = np.split(self.items.astype(np.int64), self.offsets[1:-1])
        if not with_valid or self.valid is None:
            return training
        pairs = zip(training, self.valid, strict=True)
        return [np.append(sequence, item) if item else sequence for sequence, item in pairs]


def load(path: Path) -> Data:
    """Read the file that every side of the comparison reads."""
    with np.load(path) as file:
        held_out = {name: file.get(name) for name in ("valid", "test")}
        data = Data(file["items"], file["offsets"], int(file["num_items"]), **held_out)
    if data.items.min() < 1 or data.items.max() > data.num_items:
        raise ValueError(f"{path}: items must be 1..num_items")
    if (np.diff(data.offsets) < 1).any():
        raise ValueError(f"{path}: every user needs at least one item")
    return data


class StepClock:
    """Wall-clock of whole training steps: fetch, forward, backward and optimiser.

    A step runs from the end of the one before it (or from `start`) to its `step_done`.
    """

    def __init__(self, args: argparse.Namespace, count: Callable[[Any], int]) -> None:
        self.args, self.count, self.stop = args, count, False
        self.rows: list[dict[str, float]] = []

    def start(self, steps_per_epoch: int) -> None:
        self._start = time.perf_counter()

    def step_done(self, batch: Any) -> bool:
        seconds = time.perf_counter() - self._start
        self.rows.append({"seconds": seconds, "sequences": self.count(batch)})
        self.stop = len(self.rows) >= self.args.warmup + self.args.steps
        self._start = time.perf_counter()
        return False

    def epoch_done(self, epochs: int) -> bool:
        return False

    def finish(self) -> None:
        pass

    def outcome(self, peer: Any) -> dict[str, Any]:
        """Return figures after warm-up, from steps with a full batch wherever there are any."""
        timed = self.rows[self.args.warmup :]
        rows = [row for row in timed if row["sequences"] == self.args.batch_size] or timed
        seconds = median(row["seconds"] for row in rows)
        report = {
            "step_seconds": [row["seconds"] for row in rows],
            "step_seconds_median": seconds,
            "sequences_per_second": fmean(row["sequences"] for row in rows) / seconds,
        }
        if self.args.eval:
            began = time.perf_counter()
            peer.recommend(False)
            took = time.perf_counter() - began
            report |= {"eval_seconds": took, "eval_users_per_second": peer.data.num_users / took}
        return report


class Selection:
    """Looks at validation every `valid_every` epochs, or when training time passes one of `marks`.

    Training time runs from the first step to the present, what the library does between its steps included;
    start-up and every look at validation are left out of it. `recommend(with_valid)` returns (users, k) item
    ids, best first, seen items removed; the history of each user includes the validation item where
    `with_valid`. `state()` returns the weights.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        data: Data,
        recommend: Callable[[bool], np.ndarray],
        state: Callable[[], dict[str, Any]],
    ) -> None:
        self.args, self.data, self.recommend, self.state = args, data, recommend, state
        self.marks = [60 * minutes for minutes in args.marks or []]
        self.stop = False
        self.best: dict[str, Any] | None = None
        self.best_row: dict[str, float] = {}
        self.best_top: np.ndarray | None = None
        self.rows: list[dict[str, float]] = []
        self.mark_tops: list[np.ndarray] = []
        self.eval_seconds = self.cpu_seconds = self._spent = 0.0
        self.startup_seconds: float | None = None
        self._since: tuple[float, float] | None = None  # wall and processor time; None: the clock stands
        self._stale = self._steps = self._steps_per_epoch = 0
        self._steps_seen = -1  # at the latest look at validation

    def start(self, steps_per_epoch: int) -> None:
        """Training begins: everything before this was start-up."""
        self._steps_per_epoch, self.startup_seconds = steps_per_epoch, process_age()
        self._go_on()

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return self._spent + (time.perf_counter() - self._since[0] if self._since else 0.0)

    def _go_on(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def finish(self) -> None:
        """Stop the clock."""
        if self._since is not None:
            self.cpu_seconds += time.process_time() - self._since[1]
            self._spent, self._since = self.seconds, None

    def step_done(self, batch: Any = None) -> bool:
        """Look at validation if a mark has been passed; return whether it was looked at."""
        self._steps += 1
        before = len(self.mark_tops)
        while len(self.mark_tops) < len(self.marks) and self.seconds >= self.marks[len(self.mark_tops)]:
            self.mark_tops.append(self._look())
        self.stop |= bool(self.marks) and len(self.mark_tops) == len(self.marks)
        self.stop |= bool(self.args.minutes) and self.seconds >= 60 * self.args.minutes
        return len(self.mark_tops) > before

    def epoch_done(self, epochs: int) -> bool:
        """Look at validation if it is due, keep the best weights; return whether it was looked at.

        Called too for an epoch that was cut short, once `stop` is set.
        """
        last = self.stop or epochs == self.args.epochs
        if self.marks or self._steps == self._steps_seen or not (last or epochs % self.args.valid_every == 0):
            return False
        top, self._stale = self._look(), self._stale + 1
        row = self.rows[-1]
        if not self.best_row or row["ndcg@10"] > self.best_row["ndcg@10"]:
            self.best_row, self.best_top, self._stale = row, top, 0
            self.best = copy.deepcopy(self.state())
        self.stop |= bool(self.args.patience) and self._stale >= self.args.patience
        return True

    def _look(self) -> np.ndarray:
        """Recommend on the validation condition, off the clock, with the random state left as it was."""
        import torch

        self.finish()
        began = time.perf_counter()
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        top = self.recommend(False)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        row = {"epoch": self._steps / self._steps_per_epoch, "train_seconds": self._spent}
        self.rows.append(row | {"cpu_seconds": self.cpu_seconds} | accuracy(top, self.data.valid))
        print("validation: " + "  ".join(f"{k} {v:.4f}" for k, v in self.rows[-1].items()), flush=True)
        self._steps_seen = self._steps
        self.eval_seconds += time.perf_counter() - began
        self._go_on()
        return top

    def arrays(self) -> dict[str, np.ndarray]:
        """The looks at validation as columns; the best one's or the marks' recommendations."""
        columns = {f"look_{name}": np.array([row[name] for row in self.rows]) for name in self.rows[0]}
        if not self.marks:
            return columns | {"valid_top": np.asarray(self.best_top, dtype=np.int32)}
        reached = len(self.mark_tops)
        tops = np.stack(self.mark_tops).astype(np.int32) if reached else np.zeros((0, 0, 0), np.int32)
        return columns | {"mark_minutes": np.array(self.args.marks[:reached]), "mark_top": tops}

    def outcome(self, peer: Any) -> dict[str, Any]:
        """Recommend once with the best weights, write the file, return what the fit took and reached.

        After a curve nothing is recommended for the test.
        """
        arrays, report = self.arrays(), {}
        if not self.marks:
            peer.module.load_state_dict(self.best)
            arrays["top"] = self.recommend(True)
            report = accuracy(arrays["top"], self.data.test)
        if self.args.out:
            partial = self.args.out.with_suffix(".partial.npz")
            np.savez_compressed(partial, **arrays)
            partial.rename(self.args.out)
        return report | {
            "epochs": self._steps / self._steps_per_epoch,
            "steps": self._steps,
            "train_seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "startup_seconds": self.startup_seconds,
            "validation_seconds": self.eval_seconds,
            "best": self.best_row,
        }


def accuracy(top: np.ndarray, targets: np.ndarray | None) -> dict[str, float]:
    """HR@10 and NDCG@10 of recommendations over all users with a target (0: none); a miss counts 0."""
    if targets is None:
        return {}
    hits = top[targets > 0, :10] == targets[targets > 0, None]
    gains = hits / np.log2(np.arange(2, hits.shape[1] + 2))
    return {"hr@10": float(hits.any(axis=1).mean()), "ndcg@10": float(gains.sum(axis=1).mean())}


def lightning_callback(base: type, watch: StepClock | Selection) -> Any:
    """A Lightning callback that drives a clock or a selection; `base` is the Callback class in use."""

    class Callback(base):
        def __deepcopy__(self, memo: dict) -> Callback:
            return self  # RecTools copies its trainer; what watches must stay the one

        def on_train_start(self, trainer: Any, module: Any) -> None:
            watch.start(trainer.num_training_batches)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.after(trainer, module, watch.step_done(batch))

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self.after(trainer, module, watch.epoch_done(trainer.current_epoch + 1))

        def after(self, trainer: Any, module: Any, looked: bool) -> None:
            if looked:
                module.train()
            trainer.should_stop = trainer.should_stop or watch.stop

        def on_train_end(self, trainer: Any, module: Any) -> None:
            watch.finish()

    return Callback()


def process_age() -> float | None:
    """Seconds since this process started, imports and a start over with other threads included (Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[19])
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def run(models: dict[str, Any], doc: str | None) -> None:
    """Time or fit a peer, and print one JSON object as the last line.

    `models` has a class for each name; its object, of `(args, data)`, has `module` (what is trained),
    `train(watch)`, `recommend(with_valid)`, `fields()`; of the class are `package`, `losses` and
    `count(batch)` (its sequences).
    """
    losses = dict.fromkeys(loss for peer in models.values() for loss in peer.losses)
    args = parse_args(doc, tuple(losses), tuple(models))
    peer_class = models[args.model]
    if args.loss not in peer_class.losses:
        raise SystemExit(f"{args.model} has no loss {args.loss}: expected {', '.join(peer_class.losses)}")
    import torch  # after OMP_NUM_THREADS is settled

    torch.set_num_threads(args.threads)
    data = load(args.data)
    peer = peer_class(args, data)
    if args.fit:
        watch = Selection(args, data, peer.recommend, lambda: peer.module.state_dict())
    else:
        watch = StepClock(args, peer_class.count)
    peer.train(watch)
    names = ("model", "shape", "loss", "dropout", "mask_prob", "batch_size")
    about = {name: getattr(args, name) for name in names}
    about |= {"version": metadata.version(peer_class.package), "torch": torch.__version__}
    about |= {"threads": torch.get_num_threads()}
    about |= {"parameters": sum(p.numel() for p in peer.module.parameters())}
    print(
        json.dumps(about | {"eval_users_per_second": None} | watch.outcome(peer) | peer.fields()), flush=True
    )
