"""What numbers below 1.2e-38 cost a step of training on a CPU, once attention is sharp.

    python benchmarks/denormals.py
    python benchmarks/denormals.py --sharp 1 32 64 --pairs 9

The softmax of attention turns a lead of 88 or more into a denormal number. Trained models have such leads
and new ones do not, so weights of queries and keys are multiplied here until their scores spread. Steps with
denormals kept and with denormals flushed to zero (what `hardware.resolve` asks for) alternate in one process,
on one thread, since the setting belongs to a thread. Processor time; medians; the range is over pairs.
MovieLens 100K, hidden 128, 2 layers, max_len 200, batch 64.
"""

import argparse
import functools
import time
from statistics import median

import torch
from common import Row, Rows, options, start

from reclib.config import DataConfig, TrainConfig, model_config
from reclib.data.prepare import prepare
from reclib.experiments import speed
from reclib.hardware import resolve
from reclib.train.trainer import Trainer


def trainer_of(factor: float) -> Trainer:
    """Return a trainer of a new model whose weights of queries and keys are multiplied by `factor`."""
    dataset = prepare(DataConfig())
    model = model_config("small", num_items=dataset.num_items, max_len=200, dropout=0.1)
    # A rate so small that the model stays as sharp as it is.
    config = TrainConfig(batch_size=64, mask_prob=0.2, learning_rate=1e-9, epochs=100)
    trainer = speed.trainer_of(model, config, dataset, resolve("cpu"))
    with torch.no_grad():
        for block in trainer.model.blocks:
            block.attention.qkv.weight[: 2 * model.hidden_dim] *= factor
    return trainer


def measure(factor: float, pairs: int) -> Row:
    """Return the ratio of a step's time, kept over flushed, with its range over pairs of two steps each."""
    steps = iter(trainer_of(factor).steps())

    def step(flush: bool) -> float:
        torch.set_flush_denormal(flush)
        began = time.process_time()
        next(steps)
        return time.process_time() - began

    step(True), step(False)
    # Batches differ, so each side of a pair gets two, in the order A B B A.
    turns = [[step(flush) for flush in (False, True, True, False)] for _ in range(pairs)]
    kept, flushed = ([a + d for a, _, _, d in turns], [b + c for _, b, c, _ in turns])
    ratios = [above / below for above, below in zip(kept, flushed, strict=True)]
    seconds = {"kept_seconds": median(kept) / 2, "flushed_seconds": median(flushed) / 2}
    return {"ratio": median(ratios), "low": min(ratios), "high": max(ratios)} | seconds


def run(args: argparse.Namespace, rows: Rows) -> Row:
    torch.set_num_threads(1)
    results = [
        rows.attempt(f"queries and keys times {factor:g}", functools.partial(measure, factor, args.pairs))
        for factor in args.sharp
    ]
    return {"denormals_kept_over_flushed": [row for row in results if row]}


if __name__ == "__main__":
    parser = options(__doc__, pairs=7)
    parser.add_argument("--sharp", type=float, nargs="+", default=[1.0, 16.0, 32.0, 64.0])
    raise SystemExit(start(parser, run))
