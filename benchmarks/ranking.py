"""Ranking the whole catalogue: how near to the product of scores alone, and users a second end to end.

    python benchmarks/ranking.py [--quick] [--rounds N]

First from ready hidden states to ranks and the ten best items with the seen ones left out, beside nothing but
the product of the same rows, in turns: 160,000 items, hidden 256. Then whole evaluations, from histories to
ranks, at the shapes of `engine.py`. fp32. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from engine import configs, dataset_of

from reclib import hardware
from reclib.config import changed
from reclib.data.dataset import Evaluation, Histories
from reclib.data.prepare import evaluation, synthetic_dataset, train_histories
from reclib.evaluate import metrics
from reclib.model.bert4rec import Bert4Rec
from reclib.train import timing
from reclib.train.trainer import Trainer

ITEMS, HIDDEN, TOP_K = 160_000, 256, 10


def some_users(part: Evaluation, users: int) -> Evaluation:
    starts, ends = part.histories.starts[:users], part.histories.ends[:users]
    return Evaluation(Histories(part.histories.items, starts, ends), part.targets[:users])


def in_turns(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each action once a round, after a round that is not counted; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


@torch.no_grad()
def from_hidden_states(users: int, rounds: int) -> dict[str, Any]:
    part = some_users(evaluation(synthetic_dataset(users, ITEMS, 9.4, 0), "test"), users)
    users = len(part.targets)
    torch.manual_seed(0)
    hidden, weight = torch.randn(users, HIDDEN), 0.02 * torch.randn(ITEMS, HIDDEN)
    rows = max(1, metrics.SCORE_BYTES // (4 * ITEMS))
    parts = [(first, min(first + rows, users)) for first in range(0, users, rows)]
    everyone = np.arange(users)

    def scores() -> metrics.Scores:
        for first, last in parts:
            yield everyone[first:last], F.linear(hidden[first:last], weight)

    def product() -> None:
        for first, last in parts:
            F.linear(hidden[first:last], weight)

    found = in_turns(
        {
            "ranks and top 10": lambda: metrics.rank(scores(), part, remove_seen=True, top_k=TOP_K),
            "ranks alone": lambda: metrics.rank(scores(), part, remove_seen=True),
            "product alone": product,
        },
        rounds,
    )
    times = {name: median(values) for name, values in found.items()}
    print(f"{users} users, {ITEMS:,} items, hidden {HIDDEN}, {rows} users at a time")
    work = 2 * users * ITEMS * HIDDEN
    for name, seconds in times.items():
        spread = f"{min(found[name]):.3f}-{max(found[name]):.3f} s"
        share = times["product alone"] / seconds
        print(f"  {name:<20}{seconds:>8.3f} s  {spread:<16}{users / seconds:>8.0f} users/s", end="")
        print(f"{work / seconds / 1e9:>7.0f} GFLOP/s  {share:>5.0%} of the product's rate")
    return {
        "users_per_second": users / times["ranks and top 10"],
        "gemm_users_per_second": users / times["product alone"],
        "gemm_bound_share": times["product alone"] / times["ranks and top 10"],
        "gemm_bound_share_without_top_10": times["product alone"] / times["ranks alone"],
    }


def end_to_end(shape: str, users: int, rounds: int) -> dict[str, Any]:
    dataset = dataset_of(shape)
    part = some_users(evaluation(dataset, "test"), users)
    torch.manual_seed(0)
    model = Bert4Rec(configs(shape, dataset.num_items)[0])
    where = torch.device("cpu")

    def whole() -> None:
        metrics.rank(metrics.model_scores(model, part, where), part, remove_seen=True, top_k=TOP_K)

    seconds = in_turns({"whole": whole}, rounds)["whole"]
    rate = len(part.targets) / median(seconds)
    spread = f"{min(seconds):.3f}-{max(seconds):.3f} s"
    print(f"  {shape:<14}{len(part.targets):>6} users, {dataset.num_items:>8,} items  {spread:<16}", end="")
    print(f"{rate:>8.0f} users/s")
    return {f"{shape}_end_to_end_users_per_second": rate}


def requests(shape: str, precision: str, count: int) -> dict[str, Any]:
    """Serve one history at a time: the ten best items that are not in it."""
    dataset = dataset_of(shape)
    model, train = configs(shape, dataset.num_items)
    torch.manual_seed(0)
    histories = train_histories(dataset)
    device = hardware.resolve("cpu")
    trainer = Trainer(Bert4Rec(model), histories, changed(train, precision=precision), device, "latency")
    found = timing.latency(trainer, evaluation(dataset, "test").histories, count)
    low, high = found.p50, found.p99
    print(
        f"  {shape:<14}{precision:<6}p50 {low * 1e3:7.2f} ms   p99 {high * 1e3:7.2f} ms   of {count} requests"
    )
    return {f"{shape}_{precision}_p50_seconds": low, f"{shape}_{precision}_p99_seconds": high}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few users, two rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    hardware.keep_freed_memory()  # as training does
    users, rounds = (400, 2) if given.quick else (2000, given.rounds)
    result: dict[str, Any] = {"threads": given.threads, "quick": given.quick}
    result |= from_hidden_states(users, rounds)
    print("from histories to ranks and top 10")
    for shape in ("ml", "electronics"):
        result |= end_to_end(shape, users, rounds)
    print("one request: history in, ten items out")
    for shape in ("ml", "electronics"):
        for precision in ("fp32", "bf16"):
            result |= requests(shape, precision, 20 if given.quick else 200)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
