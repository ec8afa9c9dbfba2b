"""What the three peer scripts share: arguments, the data file, the step clock and the report.

Runs inside each peer's own environment, so it imports nothing but numpy and the standard library,
and nothing of this project.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {
    "electronics": {"hidden": 256, "layers": 4, "heads": 4, "max_len": 50, "batch_size": 128},
    "ml": {"hidden": 64, "layers": 2, "heads": 2, "max_len": 200, "batch_size": 64},
    # RecTools' and RePlay's defaults, but for the length.
    "default": {"hidden": 256, "layers": 2, "heads": 4, "max_len": 200, "batch_size": 128},
}

# Reported with every figure: threads and the allocator's settings change the step by tens of
# percent, and they can only be set by whoever starts the process.
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_ARENA_MAX",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)


def parse_args(
    description: str, losses: tuple[str, ...], models: tuple[str, ...] = ("bert4rec",)
) -> argparse.Namespace:
    """Read the command line and make sure that the thread count holds from the first import."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--data", type=Path, required=True, help="npz: items, offsets, num_items")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--eval", action="store_true", help="time the ranking of all users too")
    parser.add_argument("--loss", choices=losses, default=losses[0])
    parser.add_argument("--negatives", type=int, default=256, help="for the sampled loss")
    parser.add_argument("--mask-prob", type=float, default=0.2)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-3)
    for name in ("hidden", "layers", "heads", "max-len", "batch-size"):
        parser.add_argument(f"--{name}", type=int, help="another than the shape's")
    parser.add_argument("--eval-batch-size", type=int, default=256)
    parser.add_argument("--topk", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit", action="store_true", help="train to the end and recommend")
    parser.add_argument("--model", choices=models, default=models[0])
    parser.add_argument("--epochs", type=int, help="with --fit: stop after so many")
    parser.add_argument("--minutes", type=float, help="with --fit: stop after so much training time")
    parser.add_argument("--valid-every", type=int, default=5, help="epochs between looks at validation")
    parser.add_argument("--patience", type=int, default=0, help="looks without a better one; 0: never stop")
    parser.add_argument("--marks", type=float, nargs="+", help="with --fit: look at these minutes, no test")
    parser.add_argument("--out", type=Path, help="with --fit: npz of recommendations per user")
    args = parser.parse_args()
    if args.fit and (args.epochs is None and args.minutes is None and not args.marks):
        parser.error("--fit needs --epochs, --minutes or --marks")
    for key, value in SHAPES[args.shape].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
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
        """The users' sequences; ``with_valid`` appends the validation item, as at test time."""
        sequences = [
            self.items[start:stop].astype(np.int64)
            for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True)
        ]
        if with_valid and self.valid is not None:
            return [
                np.append(sequence, item) if item else sequence
                for sequence, item in zip(sequences, self.valid, strict=True)
            ]
        return sequences


def load(path: Path) -> Data:
    """Read the file that every side of the comparison reads."""
    with np.load(path) as file:
        data = Data(
            items=file["items"],
            offsets=file["offsets"],
            num_items=int(file["num_items"]),
            valid=file.get("valid"),
            test=file.get("test"),
        )
    if data.items.min() < 1 or data.items.max() > data.num_items:
        raise ValueError(f"{path}: items must be 1..num_items")
    if (np.diff(data.offsets) < 1).any():
        raise ValueError(f"{path}: every user needs at least one item")
    return data


class StepClock:
    """Wall-clock of whole training steps: fetch, forward, backward and optimiser.

    A step runs from the end of the one before it (or from ``open``) to its ``close``. What the
    clock itself does with a batch, counting its tokens, falls outside both.
    """

    def __init__(self, count: Callable[[Any], tuple[int, int, int]]) -> None:
        self.count = count
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.fetch_seconds: list[float] = []
        self.sequences: list[int] = []
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.losses: list[float] = []
        self._start = math.nan
        self._cpu_start = math.nan
        self._fetch = math.nan

    def open(self) -> None:
        self._cpu_start = time.process_time()
        self._start = time.perf_counter()

    def fetched(self) -> None:
        self._fetch = time.perf_counter() - self._start

    def close(self, batch: Any, loss: float) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        self.cpu_seconds.append(time.process_time() - self._cpu_start)
        self.fetch_seconds.append(self._fetch)
        sequences, tokens, targets = self.count(batch)
        self.sequences.append(int(sequences))
        self.tokens.append(int(tokens))
        self.targets.append(int(targets))
        self.losses.append(float(loss))
        self.open()


def lightning_clock(base: type, count: Callable[[Any], tuple[int, int, int]]) -> Any:
    """A Lightning callback that carries a StepClock; ``base`` is the Callback class in use."""

    class StepClockCallback(base):
        def __init__(self) -> None:
            super().__init__()
            self.clock = StepClock(count)
            self.rss_before: int | None = None

        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.rss_before = process_memory("VmRSS")
            self.clock.open()

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            self.clock.fetched()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.clock.close(batch, outputs["loss"])

    return StepClockCallback()


def process_memory(field: str) -> int | None:
    """Bytes of this process: ``VmHWM`` the peak so far, ``VmRSS`` now.

    Not ``getrusage``: its peak survives ``exec``, so a child of a large process would report its
    parent's.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def measured(args: argparse.Namespace, clock: StepClock) -> dict[str, Any]:
    """The clock's figures after warm-up, from steps with a full batch wherever there are any."""
    steps = range(args.warmup, len(clock.seconds))
    full = [step for step in steps if clock.sequences[step] == args.batch_size]
    kept = full or list(steps)
    result: dict[str, Any] = {
        "warmup_seconds": clock.seconds[: args.warmup],
        # Of a whole fit, the last ones are enough to see how steady they were.
        "step_seconds": [clock.seconds[step] for step in (kept[-50:] if args.fit else kept)],
        "ragged_steps_left_out": len(steps) - len(kept),
        "losses": clock.losses[-50:],
    }
    if kept:
        median = statistics.median(clock.seconds[step] for step in kept)
        sequences = statistics.fmean(clock.sequences[step] for step in kept)
        result |= {
            "step_seconds_median": median,
            # Well below 1 on a step that keeps all threads busy: something else had the cores.
            "cpu_share": sum(clock.cpu_seconds[step] for step in kept)
            / (sum(clock.seconds[step] for step in kept) * args.threads),
            "fetch_seconds_median": statistics.median(clock.fetch_seconds[step] for step in kept),
            "sequences_per_second": sequences / median,
            "real_tokens_per_second": statistics.fmean(clock.tokens[step] for step in kept) / median,
            "real_tokens_per_sequence": sum(clock.tokens[step] for step in kept)
            / sum(clock.sequences[step] for step in kept),
            "targets_per_sequence": sum(clock.targets[step] for step in kept)
            / sum(clock.sequences[step] for step in kept),
        }
    return result


def accuracy(top: np.ndarray, targets: np.ndarray | None) -> dict[str, float]:
    """HR and NDCG of the recommendations over all users with a target (0: none); a miss counts 0."""
    if targets is None:
        return {}
    users = targets > 0
    k = top.shape[1]
    hits = top[users] == targets[users, None]
    gains = hits / np.log2(np.arange(2, k + 2))
    return {
        f"hr@{k}": float(hits.any(axis=1).mean()),
        f"ndcg@{k}": float(gains.sum(axis=1).mean()),
        "users": int(users.sum()),
    }


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the arrays of a fit, whole or not at all.

    ``top`` holds one row per user of the data file, best first, the file's item ids, 0 for none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, allow_pickle=False, **arrays)
    partial.rename(path)


def report(args: argparse.Namespace, *, package: str, **fields: Any) -> None:
    """Print the last line: one JSON object."""
    import torch  # after OMP_NUM_THREADS is settled

    print(
        json.dumps(
            {
                "version": metadata.version(package),
                "torch": torch.__version__,
                "model": args.model,
                "shape": args.shape,
                "loss": args.loss,
                "dropout": args.dropout,
                "mask_prob": args.mask_prob,
                "batch_size": args.batch_size,
                "threads": torch.get_num_threads(),
                "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
            }
            | fields
        ),
        flush=True,
    )
