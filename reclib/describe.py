"""What a prepared dataset looks like, as records can hold it: metrics and columns of numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reclib.data import Dataset, evaluated_users

CURVE_POINTS = 300  # of a curve that is stored; a catalogue may have hundreds of thousands of items


class Described(NamedTuple):
    """One description, ready for `record.Run.result(name, **described._asdict())`."""

    metrics: dict[str, float | int]
    series: dict[str, list[Any]]


def steps(dataset: Dataset) -> Described:
    """Count users, items and interactions after each step of the preparation."""
    table = dataset.manifest["steps"]
    last = next(row for row in table if row["step"] == "k-core")
    first = table[0]
    metrics = {name: last[name] for name in ("users", "items", "interactions")}
    metrics |= {f"source_{name}": first[name] for name in ("users", "items", "interactions")}
    return Described(metrics, {name: [row[name] for row in table] for name in table[0]})


def lengths(dataset: Dataset) -> Described:
    """Count users by the number of their interactions."""
    length, users = np.unique(dataset.lengths, return_counts=True)
    metrics = {
        "mean_length": float(dataset.lengths.mean()),
        "median_length": float(np.median(dataset.lengths)),
        "min_length": int(length[0]),
        "max_length": int(length[-1]),
        "longer_than_200_share": float((dataset.lengths > 200).mean()),
    }
    return Described(metrics, {"length": length.tolist(), "users": users.tolist()})


def popularity(dataset: Dataset) -> Described:
    """Interactions of each item by popularity rank, and how unequal they are.

    The Gini coefficient is 0 where all items are met equally often and near 1 where one has all. Of
    a large catalogue the series keeps ranks at equal steps of their logarithm.
    """
    counts = np.sort(np.bincount(dataset.items, minlength=dataset.num_items + 1)[1:])[::-1]
    held = np.cumsum(counts) / counts.sum()  # share of interactions that the top items hold
    # area under the curve from the most popular down, by trapezoids: (1 + Gini) / 2
    area = (held.sum() - 0.5) / counts.size
    spaced = np.geomspace(1, counts.size, CURVE_POINTS)
    ranks = np.unique(np.round(spaced)).astype(np.int64)
    tenth = held[max(1, counts.size // 10) - 1]
    metrics = {"gini": float(2 * area - 1), "top_tenth_share": float(tenth)}
    metrics |= {"most_popular": int(counts[0]), "least_popular": int(counts[-1])}
    series = {
        "rank": ranks.tolist(),
        "interactions": counts[ranks - 1].tolist(),
        "item_share": (ranks / counts.size).tolist(),
        "interaction_share": held[ranks - 1].tolist(),
    }
    return Described(metrics, series)


def ties(dataset: Dataset) -> Described:
    """Share of what is ordered by the tie rule alone, since timestamps are equal."""
    tied = dataset.manifest["ties"]
    users = evaluated_users(dataset).size
    metrics = {
        "tied_interaction_share": tied["interactions"] / dataset.num_interactions,
        "tied_test_target_share": tied["test_targets"] / max(users, 1),
    }
    what = ["interactions in a second with another of the same user"]
    what += ["test targets that could change places with the item before"]
    return Described(metrics, {"what": what, "share": list(metrics.values())})


def example_users(dataset: Dataset, seed: int, count: int = 3) -> list[int]:
    """Draw distinct users that have targets, in ascending order."""
    users = evaluated_users(dataset)
    drawn = np.random.default_rng(seed).choice(users, min(count, users.size), replace=False)
    return sorted(drawn.tolist())


def history(dataset: Dataset, user: int, last: int = 8) -> pd.DataFrame:
    """Tabulate the last interactions of a user: position, item id, title and what each is for."""
    end = int(dataset.offsets[user + 1])
    start = max(int(dataset.offsets[user]), end - last)
    items = dataset.items[start:end].tolist()
    held_out = ["validation target", "test target"] if dataset.lengths[user] > 2 else []
    return pd.DataFrame(
        {
            "position": np.arange(start, end) - int(dataset.offsets[user]) + 1,
            "item": items,
            "title": [dataset.title(item) for item in items],
            "used for": ["training"] * (len(items) - len(held_out)) + held_out,
        }
    )
