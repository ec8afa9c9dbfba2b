"""What the peers read, and the score of what they recommend, in this project's own environment."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reclib import system
from reclib.config import InputError
from reclib.data.dataset import Dataset, Evaluation, evaluated_users, evaluation, train_histories
from reclib.evaluate import metrics

TOP_K = 10
NAMES = ("hr@10", "ndcg@10")
OURS, PUBLISHED = "reclib", "BERT4Rec (ours)"  # the latter: our curve with the published settings
Arrays = dict[str, np.ndarray]
Run = tuple[dict[str, Any], Arrays]  # what a run's JSON says, and its values per user


def write_sequences(dataset: Dataset, path: Path) -> None:
    """Write the npz that the peers read: all but each user's last two items, and those two apart.

    `valid` and `test` are 0 for a user with fewer than three interactions, whose whole history trains.
    """
    train = train_histories(dataset)
    rows = [dataset.items[start:end] for start, end in zip(train.starts, train.ends, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(train.ends - train.starts)]).astype(np.int64)
    arrays = {"items": np.concatenate(rows), "offsets": offsets, "num_items": np.int64(dataset.num_items)}
    for part in ("valid", "test"):
        arrays[part] = np.zeros(dataset.num_users, dtype=np.int32)
        arrays[part][evaluated_users(dataset)] = evaluation(dataset, part).targets
    save(path, arrays)


def save(path: Path, arrays: Arrays) -> None:
    """Write the arrays, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with system.replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def seen_pairs(part: Evaluation) -> Arrays:
    """Return each row and item that is in its history, once."""
    rows, items = metrics.seen_items(part.histories, np.arange(len(part.targets)), torch.device("cpu"))
    pairs = np.unique(np.stack([rows.numpy(), items.numpy()]), axis=1)
    return {"rows": pairs[0], "items": pairs[1]}


def targets_seen(part: Evaluation) -> int:
    """Return how many targets are in their own history: no list without seen items can hold them."""
    seen = seen_pairs(part)
    return int((seen["items"] == part.targets[seen["rows"]]).sum())


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
    seen, width = seen_pairs(part), num_items + 1
    keys = np.arange(len(top))[:, None] * width + top
    again = np.isin(keys, seen["rows"] * width + seen["items"]) & (top > 0)
    if again.any():
        row = int(np.argmax(again.any(axis=1)))
        raise InputError(f"{where}: row {row} recommends item {top[row][again[row]][0]}, seen by its user")
    places = top == part.targets[:, None]
    return np.where(places.any(axis=1), places.argmax(axis=1) + 1, max(num_items, top.shape[1] + 1))


def values_of(ranks: np.ndarray, prefix: str) -> Arrays:
    """Return HR@10 and NDCG@10 per user, float64, on the last axis of `ranks`."""
    return {f"{prefix}_hr@10": metrics.hit(ranks, TOP_K), f"{prefix}_ndcg@10": metrics.ndcg(ranks, TOP_K)}


def score(arrays: Arrays, dataset: Dataset, where: str) -> Arrays:
    """Return the values per user of what a peer recommended: on validation and test, or at the marks."""
    users = evaluated_users(dataset)
    others = {name: array for name, array in arrays.items() if not name.endswith("top")} | {"users": users}

    def ranks(top: np.ndarray, part: str) -> np.ndarray:
        return ranks_in(top[users], evaluation(dataset, part), dataset.num_items, where)

    if "mark_top" in arrays:
        marks = [ranks(top, "valid") for top in arrays["mark_top"]]
        return others | values_of(np.array(marks).reshape(len(marks), len(users)), "mark")
    valid = values_of(ranks(arrays["valid_top"], "valid"), "valid")
    return others | valid | values_of(ranks(arrays["top"], "test"), "test")


def finished(folder: Path, fingerprint: str, curves: bool = False) -> dict[str, list[Run]]:
    """Return the finished runs or curves on this data, by a name that says what was run."""
    runs: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        about = json.loads(path.read_text())
        identity = about["identity"]
        if identity["fingerprint"] == fingerprint and bool(identity["marks"]) == curves:
            runs[label(identity)].append((about, dict(np.load(path.with_suffix(".npz")))))
    return runs


DISPLAY = {
    ("rectools", "bert4rec"): "RecTools BERT4Rec",
    ("rectools", "sasrec"): "RecTools SASRec",
    ("rectools", "fast-sasrec"): "RecTools fast SASRec",
    ("replay", "bert4rec"): "RePlay BERT4Rec",
}


def label(identity: dict[str, Any]) -> str:
    """Return the name of a run: a peer's with what it was given in place of its own defaults."""
    peer, hidden, settings = identity["peer"], identity["hidden"], identity["settings"]
    if "recipe" in identity:
        owner = {"rectools": "RecTools'", "replay": "RePlay's"}[identity["recipe"]]
        return f"our engine, {owner} settings (hidden {hidden})"
    if peer == OURS:
        return PUBLISHED if identity["marks"] else f"{OURS} {identity['model']} h{hidden}"
    loss = f", {settings['negatives']} negatives" if settings.get("loss") == "sampled" else ""
    return f"{DISPLAY[peer, identity['model']]} (hidden {hidden}{loss})"
