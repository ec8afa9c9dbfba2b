"""Ranking the whole catalogue: how near to the product of scores alone, and users a second end to end.

    python benchmarks/ranking.py [--quick] [--rounds N]

First from ready hidden states to ranks and the ten best items with the seen ones left out, beside nothing but
the product of the same rows, in turns: 160,000 items, hidden 256. Then whole evaluations, from histories to
ranks, and single requests, at the shapes of `engine.py`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import Row, Rows, middle, options, seconds_of, start
from engine import configs, dataset_of

from reclib import hardware
from reclib.config import changed
from reclib.data.dataset import Evaluation, Histories, evaluation, train_histories
from reclib.data.prepare import synthetic_dataset
from reclib.evaluate import metrics
from reclib.model.bert4rec import Bert4Rec
from reclib.train import timing
from reclib.train.trainer import Trainer

ITEMS, HIDDEN, TOP_K = 160_000, 256, 10


def some_users(part: Evaluation, users: int) -> Evaluation:
    """Return the first users of a split."""
    every = part.histories
    return Evaluation(Histories(every.items, every.starts[:users], every.ends[:users]), part.targets[:users])


def timed(rows: Rows, actions: dict[str, Any], rounds: int) -> dict[str, float]:
    """Return the median seconds of each action, in turns, after a call of each that is not counted."""
    for action in actions.values():
        action()
    turns = {name: seconds_of(action) for name, action in actions.items()}
    return {name: middle(results, "seconds") for name, results in rows.in_turns(turns, rounds).items()}


@torch.no_grad()
def from_hidden_states(rows: Rows, users: int, rounds: int) -> Row:
    """Time ranks and top 10, ranks alone, and the product alone, from ready hidden states."""
    part = some_users(evaluation(synthetic_dataset(users, ITEMS, 9.4, 0), "test"), users)
    users = len(part.targets)
    torch.manual_seed(0)
    hidden, weight = torch.randn(users, HIDDEN), 0.02 * torch.randn(ITEMS, HIDDEN)
    block = max(1, metrics.SCORE_BYTES // (4 * ITEMS))
    parts = [np.arange(first, min(first + block, users)) for first in range(0, users, block)]

    def scores() -> metrics.Scores:
        for block_users in parts:
            yield block_users, F.linear(hidden[block_users[0] : block_users[-1] + 1], weight)

    actions = {
        "ranks and top 10": lambda: metrics.rank(scores(), part, remove_seen=True, top_k=TOP_K),
        "product alone": lambda: [None for _ in scores()],
    }
    seconds = timed(rows, actions, rounds)
    return {
        "users_per_second": users / seconds["ranks and top 10"],
        "gemm_users_per_second": users / seconds["product alone"],
        "gemm_gflops": 2e-9 * users * ITEMS * HIDDEN / seconds["product alone"],
        "gemm_bound_share": seconds["product alone"] / seconds["ranks and top 10"],
    }


def end_to_end(rows: Rows, shape: str, users: int, rounds: int) -> Row:
    """Time whole evaluations: from histories to ranks and top 10."""
    dataset = dataset_of(shape)
    part = some_users(evaluation(dataset, "test"), users)
    torch.manual_seed(0)
    model, cpu = Bert4Rec(configs(shape, dataset.num_items)[0]), torch.device("cpu")

    def whole() -> None:
        metrics.rank(metrics.model_scores(model, part, cpu), part, remove_seen=True, top_k=TOP_K)

    seconds = timed(rows, {f"{shape}, end to end": whole}, rounds)
    return {f"{shape}_end_to_end_users_per_second": len(part.targets) / next(iter(seconds.values()))}


def requests(shape: str, precision: str, count: int) -> Row:
    """Serve one history at a time: the ten best items that are not in it."""
    dataset = dataset_of(shape)
    model, train = configs(shape, dataset.num_items)
    torch.manual_seed(0)
    train, device = changed(train, precision=precision), hardware.resolve("cpu")
    trainer = Trainer(Bert4Rec(model), train_histories(dataset), train, device, "latency")
    measured = timing.latency(trainer, evaluation(dataset, "test").histories, count)
    key = f"{shape}_{precision}"
    return {f"{key}_p50_seconds": measured.p50, f"{key}_p99_seconds": measured.p99}


def run(given: argparse.Namespace, rows: Rows) -> Row:
    torch.set_num_threads(given.threads)
    hardware.keep_freed_memory()  # as training does
    users, rounds = (400, 2) if given.quick else (2000, given.rounds)
    actions: dict[str, Any] = {
        "from hidden states": functools.partial(from_hidden_states, rows, users, rounds)
    }
    for shape in ("ml", "electronics"):
        actions[f"{shape}, evaluation"] = functools.partial(end_to_end, rows, shape, users, rounds)
        for precision in ("fp32", "bf16"):
            action = functools.partial(requests, shape, precision, 20 if given.quick else 200)
            actions[f"{shape}, one request, {precision}"] = action
    result: Row = {}
    for name, action in actions.items():
        result |= rows.section(name, action) or {}
    return result


if __name__ == "__main__":
    raise SystemExit(start(options(__doc__, rounds=7, quick="few users, two rounds"), run))
