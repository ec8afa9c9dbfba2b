"""Interactions -> k-core -> dense ids -> time order -> leave-one-out split, cached with a manifest.

Rules (a change of any raises `RULES_VERSION`):

- k-core: users below `min_user` and items below `min_item` interactions are removed, again and
  again until nothing changes; the result does not depend on the order of removal. Repeated (user,
  item) pairs are kept.
- Dense ids: items 1..num_items and users 0.. in the order of their raw ids, shorter before longer
  and then by character, which for plain integers is their numeric order. 0 is PAD.
- Order: by (user, timestamp, row in the source), stable, so that ties have one stated order.
- Leave-one-out: the last interaction of each user is the test target, the one before it the
  validation target. A user with fewer than three interactions has no targets; the whole history
  trains.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from reclib import cache, paths, sources, synthetic
from reclib.config import DataConfig, InputError

RULES_VERSION = 1
HELD_OUT = 2  # interactions at the end of a history that are targets
ARRAYS = ("items", "offsets", "item_keys", "user_keys")


@dataclass(frozen=True)
class Dataset:
    """Prepared histories, ready to be split. Arrays are read-only."""

    name: str
    items: np.ndarray  # int32 (num_interactions,): item ids, users one after another, each in time order
    offsets: np.ndarray  # int64 (num_users + 1,)
    item_keys: np.ndarray  # str (num_items + 1,): raw id of each item id; [0] is ""
    user_keys: np.ndarray  # str (num_users,)
    titles: dict[str, str]  # item key -> title, empty where the source has none
    manifest: dict[str, Any]  # source, rules, counts at each step, ties, hash of test targets, fingerprint

    def __post_init__(self) -> None:
        for name in ARRAYS:
            getattr(self, name).setflags(write=False)

    @property
    def num_users(self) -> int:
        """Users after the k-core."""
        return self.user_keys.size

    @property
    def num_items(self) -> int:
        """Catalogue size after the k-core, PAD and MASK apart."""
        return self.item_keys.size - 1

    @property
    def num_interactions(self) -> int:
        """Interactions after the k-core, held-out ones included."""
        return self.items.size

    @property
    def lengths(self) -> np.ndarray:
        """int64 (num_users,): interactions of each user."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of histories and keys: equal wherever the file came from."""
        return self.manifest["fingerprint"]

    def title(self, item: int) -> str:
        """Return the title of an item id, or its key where the source has no title."""
        key = str(self.item_keys[item])
        return self.titles.get(key, key)


class Histories(NamedTuple):
    """Views into a dataset; the history of row u is `items[starts[u]:ends[u]]`."""

    items: np.ndarray  # int32 (num_interactions,), shared with the dataset
    starts: np.ndarray  # int64 (rows,)
    ends: np.ndarray  # int64 (rows,)


class Evaluation(NamedTuple):
    """What is known of each evaluated user, and the one item to be found."""

    histories: Histories
    targets: np.ndarray  # int32 (rows,)


def prepare(config: DataConfig) -> Dataset:
    """Return the dataset of `config`, from the cache under `paths.data()` if it is intact there.

    Raises `InputError` for a source that is unknown, unreachable or malformed, and where the k-core
    leaves nothing; then nothing is written.
    """
    source = sources.source(config)
    folder = paths.data() / "prepared" / f"{source.name}-{_cache_key(source, config)}"
    entry = cache.load(folder)
    if entry is not None:
        fields: dict[str, Any] = {**entry.arrays, **entry.documents}
        return Dataset(source.name, **fields)
    dataset = _build(source, config)
    arrays = {name: getattr(dataset, name) for name in ARRAYS}
    cache.store(folder, arrays, {"titles": dataset.titles, "manifest": dataset.manifest})
    return dataset


def train_histories(dataset: Dataset) -> Histories:
    """Return all but each user's held-out interactions; too short a history is whole."""
    starts, ends = dataset.offsets[:-1], dataset.offsets[1:]
    return Histories(dataset.items, starts, np.where(ends - starts > HELD_OUT, ends - HELD_OUT, ends))


def evaluated_users(dataset: Dataset) -> np.ndarray:
    """Return int64 (rows,) the users that have targets, in the row order of `evaluation`."""
    return np.flatnonzero(dataset.lengths > HELD_OUT)


def evaluation(dataset: Dataset, part: Literal["valid", "test"]) -> Evaluation:
    """Return histories and targets of the users that have at least three interactions.

    valid: the target is the last but one. test: the target is the last, and the history includes
    the validation item. With `min_user` of 3 or more, rows are all users.
    """
    if part not in ("valid", "test"):
        raise InputError(f"part is {part!r}, expected 'valid' or 'test'")
    users = evaluated_users(dataset)
    target = dataset.offsets[users + 1] - (1 if part == "test" else 2)
    histories = Histories(dataset.items, dataset.offsets[users], target)
    return Evaluation(histories, dataset.items[target])


def synthetic_dataset(num_users: int, num_items: int, mean_len: float, seed: int) -> Dataset:
    """Return synthetic histories without filter or cache, for benchmarks and tests.

    The catalogue is exactly 1..num_items, met or not. Lengths are geometric-like from 5
    interactions.
    """
    made = synthetic.generate(users=num_users, items=num_items, mean_len=mean_len, seed=seed)
    item_keys = np.concatenate([[""], np.arange(1, num_items + 1).astype(str)])
    asked = {"users": num_users, "items": num_items, "mean_len": mean_len, "seed": seed}
    about = {"source": {"origin": "synthetic, unfiltered", **asked}}
    keys = np.arange(num_users).astype(str)
    return _dataset("synthetic", made.items, made.offsets, item_keys, keys, {}, about)


def k_core(user: np.ndarray, item: np.ndarray, min_user: int, min_item: int) -> tuple[np.ndarray, list[int]]:
    """Return the mask of the (min_user, min_item)-core, and how many interactions each pass left.

    `user` and `item` are dense codes from 0, int (num_interactions,). The last pass is the one that
    removed something; without one the list is empty.
    """
    keep = np.ones(user.size, dtype=bool)
    left: list[int] = []
    while True:
        enough_user = np.bincount(user[keep], minlength=1) >= min_user
        enough_item = np.bincount(item[keep], minlength=1) >= min_item
        stays = np.flatnonzero(keep)
        stays = stays[enough_user[user[stays]] & enough_item[item[stays]]]
        if stays.size == np.count_nonzero(keep):
            return keep, left
        keep = np.zeros(user.size, dtype=bool)
        keep[stays] = True
        left.append(stays.size)


def _build(source: sources.Source, config: DataConfig) -> Dataset:
    read = source.read()
    frame = read.frame
    user, user_keys = _dense(frame["user"])
    item, item_keys = _dense(frame["item"])
    keep, passes = k_core(user, item, config.min_user, config.min_item)
    if not keep.any():
        raise InputError(
            f"nothing of dataset {source.name!r} is left by the k-core with "
            f"min_user={config.min_user} and min_item={config.min_item}: it has {user.size:,} "
            f"interactions of {user_keys.size:,} users with {item_keys.size:,} items; lower one"
        )
    kept_users, user = np.unique(user[keep], return_inverse=True)
    kept_items, item = np.unique(item[keep], return_inverse=True)
    seconds = frame["timestamp"].to_numpy()[keep]
    order = np.lexsort((seconds, user))  # stable: equal timestamps stay in source order
    user, item, seconds = user[order], item[order], seconds[order]
    offsets = np.searchsorted(user, np.arange(kept_users.size + 1)).astype(np.int64)
    about = {
        "source": read.provenance,
        "core": {"min_user": config.min_user, "min_item": config.min_item, "passes": passes},
        "steps": [
            _step("source", user_keys.size, item_keys.size, frame.shape[0]),
            _step("k-core", kept_users.size, kept_items.size, user.size),
        ],
        "ties": _ties(seconds, offsets),
    }
    keys = np.concatenate([[""], item_keys[kept_items]])
    ids = (item + 1).astype(np.int32)
    titles = {key: read.titles[key] for key in keys.tolist() if key in read.titles}
    return _dataset(source.name, ids, offsets, keys, user_keys[kept_users], titles, about)


def _dataset(
    name: str,
    items: np.ndarray,
    offsets: np.ndarray,
    item_keys: np.ndarray,
    user_keys: np.ndarray,
    titles: dict[str, str],
    about: dict[str, Any],
) -> Dataset:
    """Complete the manifest with what follows from the arrays alone."""
    dataset = Dataset(name, items, offsets, item_keys, user_keys, titles, {})
    held_out = evaluation(dataset, "test")
    users = evaluated_users(dataset)
    pairs = np.stack([user_keys[users], item_keys[held_out.targets]], axis=1)
    train = train_histories(dataset)
    training = int((train.ends - train.starts).sum())
    steps = [
        *about.pop("steps", []),
        _step("train", dataset.num_users, dataset.num_items, training),
        _step("valid", users.size, dataset.num_items, users.size),
        _step("test", users.size, dataset.num_items, users.size),
    ]
    manifest = {
        "name": name,
        "rules": {"version": RULES_VERSION, "order": "user, timestamp, row", "split": "leave-one-out"},
        **about,
        "steps": steps,
        "test_targets_sha256": _hash(*pairs.ravel().tolist()),
        "fingerprint": _fingerprint(dataset),
    }
    return Dataset(name, items, offsets, item_keys, user_keys, titles, manifest)


def _dense(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return codes int64 (rows,) and keys str (distinct,) in the stated order of raw ids."""
    codes, uniques = pd.factorize(column)
    if (codes < 0).any():
        raise InputError(f"{column.name} is missing in row {int(np.argmax(codes < 0)) + 1}")
    keys = np.asarray(uniques).astype(str)
    order = np.lexsort((keys, np.char.str_len(keys)))
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    return rank[codes], keys[order]


def _step(step: str, users: int, items: int, interactions: int) -> dict[str, Any]:
    return {"step": step, "users": users, "items": items, "interactions": interactions}


def _ties(seconds: np.ndarray, offsets: np.ndarray) -> dict[str, int]:
    """Count what only the tie rule orders: timestamps shared within a user's history."""
    same = seconds[1:] == seconds[:-1]
    same[offsets[1:-1] - 1] = False  # neighbours of two different users
    before, after = np.append(False, same), np.append(same, False)
    lasts = offsets[1:][np.diff(offsets) > HELD_OUT] - 1
    return {
        "interactions": int((before | after).sum()),
        "test_targets": int(before[lasts].sum()),  # the last two could be exchanged
    }


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)  # lengths keep parts apart
    return digest.hexdigest()


def _fingerprint(dataset: Dataset) -> str:
    keys = [*dataset.item_keys.tolist(), *dataset.user_keys.tolist()]
    numbers = [dataset.items.astype("<i4").tobytes(), dataset.offsets.astype("<i8").tobytes()]
    return _hash(*numbers, *keys)[:16]


def _cache_key(source: sources.Source, config: DataConfig) -> str:
    core = f"{config.min_user} {config.min_item}"
    return _hash(str(RULES_VERSION), source.name, source.identity, core)[:16]
