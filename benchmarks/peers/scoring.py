"""What the peers read, and the score of what they recommend, in this project's own environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from reclib.config import InputError
from reclib.data.dataset import Dataset, Evaluation, evaluated_users, evaluation, train_histories
from reclib.evaluate import metrics
from reclib.experiments.grids import save_ranks as save

NAMES = ("hr@10", "ndcg@10")
Arrays = dict[str, np.ndarray]


def write_sequences(dataset: Dataset, path: Path) -> None:
    """Write the npz that the peers read: all but each user's last two items, and those two apart.

    `valid` and `test` are 0 for a user with fewer than three interactions, whose whole history trains.
    """
    train = train_histories(dataset)
    offsets = np.concatenate([[0], np.cumsum(train.lengths)])
    arrays = {"items": dataset.items[train.places()], "offsets": offsets}
    arrays["num_items"] = np.int64(dataset.num_items)
    for part in ("valid", "test"):
        arrays[part] = np.zeros(dataset.num_users, dtype=np.int32)
        arrays[part][evaluated_users(dataset)] = evaluation(dataset, part).targets
    save(path, arrays)


def is_seen(items: np.ndarray, part: Evaluation, num_items: int) -> np.ndarray:
    """Return for item ids (rows, k) whether each is in the history of its row's user."""
    users = np.arange(len(part.targets))
    rows, seen = metrics.seen_items(part.histories, users, torch.device("cpu"))
    width = num_items + 1  # a pair of row and item as one number
    return np.isin(users[:, None] * width + items, rows.numpy() * width + seen.numpy()) & (items > 0)


def ranks_in(top: np.ndarray, part: Evaluation, num_items: int, where: str) -> np.ndarray:
    """Return where the targets stand in recommendations (rows, k) of item ids, 0 for none.

    A target that was not recommended ranks last. Raises `InputError`, naming `where`, for ids outside the
    catalogue, an item twice in a row, and an item that the user has had.
    """
    if len(top) != len(part.targets):
        raise InputError(f"{where}: {len(top)} rows of recommendations for {len(part.targets)} users")
    if top.min(initial=0) < 0 or top.max(initial=0) > num_items:
        raise InputError(f"{where}: item ids from {top.min()} to {top.max()}, allowed: 0 to {num_items}")
    ordered = np.sort(top, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)).any(axis=1)
    if twice.any():
        raise InputError(f"{where}: row {int(np.argmax(twice))} recommends an item twice")
    for row, place in np.argwhere(is_seen(top, part, num_items))[:1]:
        raise InputError(f"{where}: row {row} recommends item {top[row, place]}, seen by its user")
    places = top == part.targets[:, None]
    return np.where(places.any(axis=1), places.argmax(axis=1) + 1, max(num_items, top.shape[1] + 1))


def values_of(ranks: np.ndarray, prefix: str) -> Arrays:
    """Return HR@10 and NDCG@10 per user, float64, on the last axis of `ranks`."""
    values = metrics.per_user(ranks)
    return {f"{prefix}_{name}": values[name] for name in NAMES}


def score(arrays: Mapping[str, np.ndarray], dataset: Dataset, where: str) -> Arrays:
    """Return the values per user of what a peer recommended: on validation and test, or at the marks."""
    users = evaluated_users(dataset)
    values = {name: array for name, array in arrays.items() if not name.endswith("top")} | {"users": users}

    def ranks(top: np.ndarray, part: str) -> np.ndarray:
        return ranks_in(top[users], evaluation(dataset, part), dataset.num_items, where)

    if "mark_top" in arrays:
        return values | values_of(np.array([ranks(top, "valid") for top in arrays["mark_top"]]), "mark")
    values |= values_of(ranks(arrays["valid_top"], "valid"), "valid")
    return values | values_of(ranks(arrays["top"], "test"), "test")
