"""What the peers' scripts share: arguments, data, the clock of steps, looks at validation, the report.

Runs inside each peer's own environment: it imports numpy, torch and the standard library, nothing of this
project. A script has a class of what `run` needs.
"""

import argparse
import copy
import json
import os
import random
import time
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np

NAMES = ("hidden", "layers", "heads", "max_len", "batch_size")
SHAPES = {  # values of NAMES
    "electronics": (256, 4, 4, 50, 128),
    "ml": (64, 2, 2, 200, 64),
    "default": (256, 2, 4, 200, 128),  # RecTools' and RePlay's defaults, but for the length
}
TOP_K, EVAL_BATCH_SIZE = 10, 256
LIGHTNING: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False}
LIGHTNING |= dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)


def parse_args(doc: str | None, losses: tuple[str, ...], models: tuple[str, ...]) -> argparse.Namespace:
    """Read the command line; the number of threads must hold since the import of torch."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), required=True)
    add("--data", type=Path, required=True, help="npz: items, offsets, num_items; for --fit valid, test")
    add("--model", choices=models, default=models[0])
    add("--loss", choices=losses, default=losses[0])
    add("--negatives", type=int, default=256, help="for the sampled loss")
    add("--mask-prob", type=float, default=0.2)
    add("--dropout", type=float, default=0.1)
    for name in NAMES:
        add(f"--{name.replace('_', '-')}", type=int, help="another than the shape's")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2, help="as OMP_NUM_THREADS is set")
    add("--steps", type=int, default=10, help="that are timed")
    add("--warmup", type=int, default=2, help="steps before")
    add("--fit", action="store_true", help="train to the end and recommend, by the options below")
    add("--epochs", type=int, help="stop after so many")
    add("--minutes", type=float, help="stop after so much training time")
    add("--valid-every", type=int, default=5, help="epochs between looks at validation")
    add("--patience", type=int, default=0, help="looks without a better one; 0: never stop")
    add("--marks", type=float, nargs="+", help="look at these minutes, no test")
    add("--out", type=Path, help="npz of recommendations per user")
    args = parser.parse_args()
    if args.fit and not (args.epochs or args.minutes or args.marks):
        parser.error("--fit needs --epochs, --minutes or --marks")
    if os.environ.get("OMP_NUM_THREADS") != str(args.threads):  # OpenMP reads it once, as torch is loaded
        parser.error(f"set OMP_NUM_THREADS={args.threads}, or --threads as it is set")
    for name, value in zip(NAMES, SHAPES[args.shape], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


class Data(NamedTuple):
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
        held_out = file.get("valid"), file.get("test")
        return Data(file["items"], file["offsets"], int(file["num_items"]), *held_out)


class StepClock:
    """Wall-clock of whole training steps: fetch, forward, backward and optimiser.

    A step runs from the end of the one before it (or from `start`) to its `step_done`.
    """

    def __init__(self, args: argparse.Namespace, peer: Any) -> None:
        self.args, self.peer, self.stop = args, peer, False
        self.rows: list[tuple[float, int]] = []  # seconds and sequences

    def start(self, steps_per_epoch: int) -> None:
        self._start = time.perf_counter()

    def step_done(self, batch: Any) -> bool:
        self.rows.append((time.perf_counter() - self._start, self.peer.count(batch)))
        self.stop = len(self.rows) >= self.args.warmup + self.args.steps
        self._start = time.perf_counter()
        return False

    def epoch_done(self, epochs: int) -> bool:
        return False

    def finish(self) -> None:
        pass

    def outcome(self) -> dict[str, Any]:
        """Return rates after warm-up, from steps with a full batch wherever there are any."""
        timed = self.rows[self.args.warmup :]
        full = [row for row in timed if row[1] == self.args.batch_size] or timed
        seconds, sequences = zip(*full, strict=True)
        rate = fmean(sequences) / median(seconds)
        return {
            "step_seconds": seconds,
            "step_seconds_median": median(seconds),
            "sequences_per_second": rate,
        }


class Selection:
    """Looks at validation every `valid_every` epochs, or when training time passes one of `marks`.

    Training time is processor time per thread, from the first step to the present, what the library does
    between its steps included; start-up and every look at validation are left out of it. Other programs on
    the machine then cost a run no epochs.
    """

    def __init__(self, args: argparse.Namespace, peer: Any) -> None:
        self.args, self.peer = args, peer
        self.marks = [60 * minutes for minutes in args.marks or []]
        self.stop = False
        self.best: dict[str, Any] | None = None
        self.best_row: dict[str, float] = {}
        self.best_top: np.ndarray | None = None
        self.rows: list[dict[str, float]] = []
        self.mark_tops: list[np.ndarray] = []
        self.eval_seconds = self._spent = 0.0
        self.startup_seconds: float | None = None
        self._since: float | None = None  # None: the clock stands
        self._stale = self._steps = self._steps_per_epoch = 0
        self._steps_seen = -1  # at the latest look at validation

    def start(self, steps_per_epoch: int) -> None:
        """Training begins: everything before this was start-up."""
        self._steps_per_epoch, self.startup_seconds = steps_per_epoch, process_age()
        self._go_on()

    @property
    def seconds(self) -> float:
        """Training time so far."""
        running = 0.0 if self._since is None else time.process_time() - self._since
        return self._spent + running / self.args.threads

    def _go_on(self) -> None:
        self._since = time.process_time()

    def finish(self) -> None:
        """Stop the clock."""
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
        due = self.stop or epochs == self.args.epochs or epochs % self.args.valid_every == 0
        if self.marks or self._steps == self._steps_seen or not due:
            return False
        top, self._stale = self._look(), self._stale + 1
        row = self.rows[-1]
        if not self.best_row or row["ndcg@10"] > self.best_row["ndcg@10"]:
            self.best_row, self.best_top, self._stale = row, top, 0
            self.best = copy.deepcopy(self.peer.module.state_dict())
        self.stop |= bool(self.args.patience) and self._stale >= self.args.patience
        return True

    def _look(self) -> np.ndarray:
        """Recommend on the validation condition, off the clock, with the random state left as it was."""
        import torch

        self.finish()
        began = time.perf_counter()
        python_state, numpy_state = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            top = self.peer.recommend(False)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        row = {"epoch": self._steps / self._steps_per_epoch, "train_seconds": self._spent}
        self.rows.append(row | accuracy(top, self.peer.data.valid))
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
        minutes = np.array(self.args.marks[: len(self.mark_tops)])
        return columns | {"mark_minutes": minutes, "mark_top": np.stack(self.mark_tops).astype(np.int32)}

    def outcome(self) -> dict[str, Any]:
        """Recommend once with the best weights, write the file, return what the fit took and reached.

        After a curve nothing is recommended for the test.
        """
        arrays, report = self.arrays(), {}
        if not self.marks:
            self.peer.module.load_state_dict(self.best)
            arrays["top"] = self.peer.recommend(True)
            report = accuracy(arrays["top"], self.peer.data.test)
        if self.args.out:
            partial = self.args.out.with_suffix(".partial.npz")
            np.savez_compressed(partial, **arrays)
            partial.rename(self.args.out)
        return report | {
            "epochs": self._steps / self._steps_per_epoch,
            "steps": self._steps,
            "train_seconds": self.seconds,
            "startup_seconds": self.startup_seconds,
            "validation_seconds": self.eval_seconds,
            "best": self.best_row,
        }


def accuracy(top: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """HR@10 and NDCG@10 of recommendations over all users with a target (0: none); a miss counts 0."""
    hits = top[targets > 0, :10] == targets[targets > 0, None]
    gains = hits / np.log2(np.arange(2, hits.shape[1] + 2))
    return {"hr@10": float(hits.any(axis=1).mean()), "ndcg@10": float(gains.sum(axis=1).mean())}


def lightning_callback(base: type, watch: StepClock | Selection) -> Any:
    """A Lightning callback that drives a clock or a selection; `base` is the Callback class in use."""

    class Callback(base):
        def __deepcopy__(self, memo: dict) -> Any:
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


def trainer_options(args: argparse.Namespace, callback: Any) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for a timed run or a fit."""
    return {"callbacks": [callback], "max_epochs": (args.fit and args.epochs) or -1} | LIGHTNING


def process_age() -> float:
    """Seconds since this process started, imports included (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def run(models: dict[str, Any], doc: str | None) -> None:
    """Time or fit a peer, and print one JSON object as the last line.

    `models` has a class for each name; its object, of `(args, data)`, has `data`, `module` (what is trained),
    `train(watch)`, `fields()`, `count(batch)` (its sequences), and `recommend(with_valid)`, which returns
    (users, k) item ids, best first, 0 for none, seen items removed; the history of each user includes the
    validation item where `with_valid`. Of the class are `package` and `losses`.
    """
    losses = dict.fromkeys(loss for peer in models.values() for loss in peer.losses)
    args = parse_args(doc, tuple(losses), tuple(models))
    peer_class = models[args.model]
    if args.loss not in peer_class.losses:
        raise SystemExit(f"{args.model} has no loss {args.loss}: expected {', '.join(peer_class.losses)}")
    import torch

    torch.set_num_threads(args.threads)
    peer = peer_class(args, load(args.data))
    watch = (Selection if args.fit else StepClock)(args, peer)
    peer.train(watch)
    names = ("model", "shape", "loss", "dropout", "mask_prob", "batch_size")
    about = {name: getattr(args, name) for name in names}
    about |= {"version": metadata.version(peer_class.package), "torch": torch.__version__}
    about |= {"threads": torch.get_num_threads()}
    about |= {"parameters": sum(p.numel() for p in peer.module.parameters())}
    print(json.dumps(about | watch.outcome() | peer.fields()), flush=True)
