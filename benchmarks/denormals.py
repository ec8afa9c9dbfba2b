"""What numbers below 1.2e-38 cost a step of training on a CPU, once attention is sharp.

    python benchmarks/denormals.py
    python benchmarks/denormals.py --sharp 1 32 64 --pairs 9

The softmax of attention turns a lead of 88 or more into a denormal number. Trained models have such leads
and new ones do not, so weights of queries and keys are multiplied here until their scores spread. Steps with
denormals kept and with denormals flushed to zero (what `hardware.resolve` asks for) alternate in one process,
on one thread, since the setting belongs to a thread. Processor time; medians; the range is over pairs.
MovieLens 100K, hidden 128, 2 layers, max_len 200, batch 64.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from reclib.config import DataConfig, TrainConfig, model_config
from reclib.data.dataset import train_histories
from reclib.data.prepare import prepare
from reclib.hardware import resolve
from reclib.model.bert4rec import Bert4Rec
from reclib.train.trainer import Trainer


def trainer(factor: float) -> Trainer:
    """Return a trainer of a new model whose weights of queries and keys are multiplied by `factor`."""
    device, dataset = resolve("cpu"), prepare(DataConfig())
    torch.manual_seed(0)
    model = Bert4Rec(model_config("small", num_items=dataset.num_items, max_len=200, dropout=0.1))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[: 2 * model.config.hidden_dim] *= factor
    # A rate so small that the model stays as sharp as it is.
    config = TrainConfig(batch_size=64, mask_prob=0.2, learning_rate=1e-9, epochs=100)
    return Trainer(model, train_histories(dataset), config, device, dataset.fingerprint)


def step(steps: Iterator[Any], flush: bool) -> float:
    """Return the processor seconds of one step."""
    torch.set_flush_denormal(flush)
    began = time.process_time()
    next(steps)
    return time.process_time() - began


def measure(factor: float, pairs: int) -> dict[str, Any]:
    """Return the ratio of a step's time, kept over flushed, with its range over pairs of two steps each."""
    steps = iter(trainer(factor).steps())
    for flush in (True, False):
        step(steps, flush)
    found = []
    for _ in range(pairs):
        # Batches differ, so each side of a pair gets two, in the order A B B A.
        times = [step(steps, flush) for flush in (False, True, True, False)]
        found.append((times[0] + times[3], times[1] + times[2]))
    ratios = [kept / flushed for kept, flushed in found]
    seconds = {"kept": median(a for a, _ in found) / 2, "flushed": median(b for _, b in found) / 2}
    return {"sharp": factor, "ratio": median(ratios), "low": min(ratios), "high": max(ratios)} | seconds


def main() -> None:
    """Measure each factor, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sharp", type=float, nargs="+", default=[1.0, 16.0, 32.0, 64.0])
    parser.add_argument("--pairs", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(factor, given.pairs) for factor in given.sharp]
    print("queries and keys times   kept s   flushed s   kept / flushed (range)")
    for row in rows:
        print(
            f"{row['sharp']:22g} {row['kept']:8.3f} {row['flushed']:11.3f}   "
            f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        )
    print(json.dumps({"denormals_kept_over_flushed": rows}))


if __name__ == "__main__":
    main()
