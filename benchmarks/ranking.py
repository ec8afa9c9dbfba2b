"""Ranking the whole catalogue: how near to the product of scores alone, and users a second end to end.

    python benchmarks/ranking.py [--quick] [--rounds N]

First from ready hidden states to ranks and the ten best items with the seen ones left out, beside nothing but
the product of the same rows, in turns: 160,000 items, hidden 256. Then whole evaluations, from histories to
ranks, and single requests, at the shapes of `engine.py`. The last line is one JSON object.
"""

import argparse
import functools
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from common import Row, Rows, middle, options, start
from engine import configs, dataset_of

from reclib import hardware
from reclib.config import changed
from reclib.data.dataset import Dataset, Evaluation, Histories, evaluation
from reclib.data.prepare import synthetic_dataset
from reclib.evaluate import metrics
from reclib.experiments import speed
from reclib.model.bert4rec import Bert4Rec
from reclib.train import timing

ITEMS, HIDDEN, TOP_K = 160_000, 256, 10


def test_users(dataset: Dataset, users: int) -> Evaluation:
    """Return the first users of the test split."""
    part = evaluation(dataset, "test")
    histories = part.histories
    first = Histories(histories.items, histories.starts[:users], histories.ends[:users])
    return Evaluation(first, part.targets[:users])


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
    part = test_users(synthetic_dataset(users, ITEMS, 9.4, 0), users)
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


def end_to_end(rows: Rows, shape: str, users: int, rounds: int) -> Row:
    """Time whole evaluations: from histories to ranks and top 10."""
    dataset = dataset_of(shape)
    part = test_users(dataset, users)
    torch.manual_seed(0)
    model, cpu = Bert4Rec(configs(shape, dataset.num_items)[0]), torch.device("cpu")

    def whole() -> None:
        metrics.rank(metrics.model_scores(model, part, cpu), part, remove_seen=True, top_k=TOP_K)

    (seconds,) = timed(rows, {f"{shape}, end to end": whole}, rounds).values()
    return {f"{shape}_end_to_end_users_per_second": len(part.targets) / seconds}


def requests(shape: str, precision: str, count: int) -> Row:
    """Serve one history at a time: the ten best items that are not in it."""
    dataset = dataset_of(shape)
    model, train = configs(shape, dataset.num_items)
    trainer = speed.trainer_of(model, changed(train, precision=precision), dataset, hardware.resolve("cpu"))
    measured = timing.latency(trainer, evaluation(dataset, "test").histories, count)
    return {f"{shape}_{precision}_{name}_seconds": getattr(measured, name) for name in ("p50", "p99")}


def run(args: argparse.Namespace, rows: Rows) -> Row:
    torch.set_num_threads(args.threads)
    hardware.keep_freed_memory()  # as training does
    users, rounds = (400, 2) if args.quick else (2000, args.rounds)
    actions = {"from hidden states": functools.partial(from_hidden_states, rows, users, rounds)}
    for shape in ("ml", "electronics"):
        actions[f"{shape}, evaluation"] = functools.partial(end_to_end, rows, shape, users, rounds)
        for precision in ("fp32", "bf16"):
            action = functools.partial(requests, shape, precision, 20 if args.quick else 200)
            actions[f"{shape}, one request, {precision}"] = action
    result: Row = {}
    for name, action in actions.items():
        result |= rows.section(name, action) or {}
    return result


if __name__ == "__main__":
    raise SystemExit(start(options(__doc__, quick="few users, two rounds", rounds=7, threads=2), run))
