"""Ranking the whole catalogue: how near to the product of scores alone.

    python benchmarks/ranking.py [--quick] [--rounds N]

From ready hidden states to ranks and the ten best items with the seen ones left out, beside nothing but the
product of the same rows, in turns: 160,000 items, hidden 256. The last line is one JSON object.
"""

import argparse
import functools
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from common import Row, Rows, middle, options, start

from reclib import hardware
from reclib.data.dataset import evaluation
from reclib.data.prepare import synthetic_dataset
from reclib.evaluate import metrics

ITEMS, HIDDEN, TOP_K = 160_000, 256, 10


def timed(rows: Rows, actions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each action, in turns, after a call of each that is not counted."""

    def seconds_of(action: Callable[[], object]) -> Row:
        began = time.perf_counter()
        action()
        return {"seconds": time.perf_counter() - began}

    for action in actions.values():
        action()
    turns = {name: functools.partial(seconds_of, action) for name, action in actions.items()}
    return {name: middle(results, "seconds") for name, results in rows.in_turns(turns, rounds).items()}


@torch.no_grad()
def from_hidden_states(rows: Rows, users: int, rounds: int) -> Row:
    """Time ranks and top 10, and the product alone, from ready hidden states."""
    part = evaluation(synthetic_dataset(users, ITEMS, 9.4, 0), "test")
    users = len(part.targets)
    torch.manual_seed(0)
    hidden, weight = torch.randn(users, HIDDEN), 0.02 * torch.randn(ITEMS, HIDDEN)
    block = max(1, metrics.SCORE_BYTES // (4 * ITEMS))

    def scores() -> metrics.Scores:
        for first in range(0, users, block):
            rows_of_block = np.arange(first, min(first + block, users))
            yield rows_of_block, F.linear(hidden[first : first + block], weight)

    actions = {
        "ranks and top 10": lambda: metrics.rank(scores(), part, remove_seen=True, top_k=TOP_K),
        "product alone": lambda: [None for _ in scores()],
    }
    ranking, product = timed(rows, actions, rounds).values()
    return {
        "users_per_second": users / ranking,
        "gemm_users_per_second": users / product,
        "gemm_gflops": 2e-9 * users * ITEMS * HIDDEN / product,
        "gemm_bound_share": product / ranking,
    }


def run(args: argparse.Namespace, rows: Rows) -> Row:
    """Time both; return users a second of each and their ratio."""
    torch.set_num_threads(args.threads)
    hardware.keep_freed_memory()  # as training does
    return from_hidden_states(rows, *((400, 2) if args.quick else (2000, args.rounds)))


if __name__ == "__main__":
    raise SystemExit(start(options(__doc__, quick="few users, two rounds", rounds=7, threads=2), run))
