"""What the peers read, and the score of what they recommend, in this project's own environment."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reclib.config import InputError
from reclib.data.dataset import Dataset, Evaluation, evaluated_users, evaluation, train_histories
from reclib.evaluate import metrics, statistics

TOP_K = 10
NAMES = ("hr@10", "ndcg@10")
OURS = "reclib"


def write_sequences(dataset: Dataset, path: Path) -> None:
    """Write the npz that the peers read: all but each user's last two items, and those two apart.

    `valid` and `test` are 0 for a user with fewer than three interactions, whose whole history trains.
    """
    train = train_histories(dataset)
    lengths = train.ends - train.starts
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    arrays = {
        "items": dataset.items[np.repeat(train.starts, lengths) + within],
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "num_items": np.int64(dataset.num_items),
    }
    for part in ("valid", "test"):
        arrays[part] = np.zeros(dataset.num_users, dtype=np.int32)
        arrays[part][evaluated_users(dataset)] = evaluation(dataset, part).targets
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, arrays)


def ranks_in(top: np.ndarray, part: Evaluation, num_items: int, where: str) -> np.ndarray:
    """Return where the targets stand in recommendations (rows, k) of item ids, 0 for none.

    A target that was not recommended ranks last. Raises `InputError`, naming `where`, for ids
    outside the catalogue, an item twice in a row, and an item that the user has had.
    """
    if len(top) != len(part.targets):
        raise InputError(f"{where}: {len(top)} rows of recommendations for {len(part.targets)} users")
    if top.min(initial=0) < 0 or top.max(initial=0) > num_items:
        raise InputError(f"{where}: item ids from {top.min()} to {top.max()}, allowed: 0 to {num_items}")
    rows = np.arange(len(top))
    ordered = np.sort(top, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
    if twice.any():
        raise InputError(f"{where}: row {int(np.argmax(twice.any(axis=1)))} recommends an item twice")
    users, seen = metrics.seen_items(part.histories, rows, torch.device("cpu"))
    width = num_items + 1
    had = np.unique(users.numpy() * width + seen.numpy())
    again = np.isin(rows[:, None] * width + top, had) & (top > 0)
    if again.any():
        row = int(np.argmax(again.any(axis=1)))
        raise InputError(f"{where}: row {row} recommends item {top[row][again[row]][0]}, seen by its user")
    places = top == part.targets[:, None]
    return np.where(places.any(axis=1), places.argmax(axis=1) + 1, max(num_items, top.shape[1] + 1))


def targets_seen(part: Evaluation) -> int:
    """Return how many targets are in their own history: no list without seen items can hold them."""
    rows = np.arange(len(part.targets))
    users, seen = metrics.seen_items(part.histories, rows, torch.device("cpu"))
    return np.unique(users.numpy()[seen.numpy() == part.targets[users.numpy()]]).size


def values_of(ranks: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
    """Return HR@10 and NDCG@10 per user, float64, on the last axis of `ranks`."""
    return {f"{prefix}_hr@10": metrics.hit(ranks, TOP_K), f"{prefix}_ndcg@10": metrics.ndcg(ranks, TOP_K)}


def score(arrays: dict[str, np.ndarray], dataset: Dataset, where: str) -> dict[str, np.ndarray]:
    """Return the values per user of what a peer recommended: on validation and test, or at the marks."""
    users = evaluated_users(dataset)
    valid = evaluation(dataset, "valid")
    kept = {name: array for name, array in arrays.items() if not name.endswith("top")} | {"users": users}
    if "mark_top" in arrays:
        tops = [top[users] for top in arrays["mark_top"]]
        ranks = [ranks_in(top, valid, dataset.num_items, where) for top in tops]
        return kept | values_of(np.array(ranks).reshape(len(ranks), len(users)), "mark")
    test = evaluation(dataset, "test")
    for prefix, name, part in (("valid", "valid_top", valid), ("test", "top", test)):
        kept |= values_of(ranks_in(arrays[name][users], part, dataset.num_items, where), prefix)
    return kept


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Write the arrays, whole or not at all."""
    partial = path.with_suffix(".partial.npz")
    np.savez_compressed(partial, **arrays)
    partial.rename(path)


def table(folder: Path, fingerprint: str, samples: int = 2000) -> list[str]:
    """Return lines: each model's test metrics, mean over its seeds per user, with 95 % intervals over users.

    The last columns are the paired difference, ours minus the model, for each of our models there.
    """
    found: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())["identity"]
        if one["fingerprint"] == fingerprint and not one["marks"]:
            name = f"{one['peer']} {one['model']} h{one['hidden']}"
            found[name].append(dict(np.load(path.with_suffix(".npz"))))
    lines = []
    for metric in NAMES:
        means = {n: np.mean([v[f"test_{metric}"] for v in values], axis=0) for n, values in found.items()}
        for name, values in means.items():
            one_line = f"{metric:8} {name:28} seeds {len(found[name])}  {_interval(values, samples)}"
            for ours in (n for n in means if n.startswith(OURS) and n != name):
                one_line += f"  {ours} minus it {_interval(means[ours] - values, samples)}"
            lines.append(one_line)
    return lines


def _interval(values: np.ndarray, samples: int) -> str:
    interval = statistics.bootstrap(values, samples)
    return f"{interval.mean:.4f} ({interval.low:.4f} to {interval.high:.4f})"
