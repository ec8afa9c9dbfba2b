"""A prepared dataset: histories of dense item ids that lie on disk, and what is known of them.

Arrays are memory-mapped, keys and titles are decoded when they are asked for, so that loading costs
neither time nor memory however large the dataset is.

- Dense ids: items 1..num_items and users 0.. in the order of their raw ids, shorter before longer
  and then by character, which for plain integers is their numeric order. 0 is PAD.
- Leave-one-out: the last interaction of each user is the test target, the one before it the
  validation target. A user with fewer than three interactions has no targets; the whole history
  trains.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from reclib import system
from reclib.config import InputError

HELD_OUT = 2  # interactions at the end of a history that are targets

ARRAYS = ("items", "offsets", "item_keys", "user_keys")

CHUNK = 1 << 16  # keys decoded at a time


class Keys:
    """Raw ids: UTF-8 bytes of one width, where they lie, decoded on access. Indexes as an array does."""

    def __init__(self, encoded: np.ndarray) -> None:
        self._encoded = encoded  # bytes (size,)

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys:
        """Encode keys."""
        return cls(np.array([key.encode() for key in keys]))

    @property
    def size(self) -> int:
        """How many there are."""
        return self._encoded.size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        """Return str for one index, an array of str for a slice or an array."""
        found = self._encoded[index]
        return found.decode() if isinstance(found, bytes) else np.char.decode(found, "utf-8")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self.size, CHUNK):
            yield from self[start : start + CHUNK].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def tolist(self) -> list[str]:
        """Return all keys."""
        return list(self)


class Titles(Mapping[str, str]):
    """Titles by item key, read from their file when the first one is asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @functools.cached_property
    def _titles(self) -> dict[str, str]:
        return json.loads(self._path.read_text("utf-8"))

    def __getitem__(self, key: str) -> str:
        return self._titles[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._titles)

    def __len__(self) -> int:
        return len(self._titles)


@dataclass(frozen=True)
class Dataset:
    """Prepared histories, ready to be split. Arrays are read-only."""

    name: str
    items: np.ndarray  # int32 (num_interactions,): item ids, users one after another, each in time order
    offsets: np.ndarray  # int64 (num_users + 1,)
    item_keys: Keys  # (num_items + 1,): raw id of each item id; [0] is ""
    user_keys: Keys  # (num_users,)
    titles: Mapping[str, str]  # item key -> title, empty where the source has none
    manifest: dict[str, Any]  # source, rules, counts at each step, ties, hash of test targets, fingerprint
    times: np.ndarray | None = None  # int64 (num_interactions,) in manifest["time_unit"]; None: order only

    def __post_init__(self) -> None:
        for array in (self.items, self.offsets, self.times):
            if array is not None:
                array.setflags(write=False)

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
        key = self.item_keys[int(item)]
        return self.titles.get(key, key)


class Histories(NamedTuple):
    """Views into a dataset; the history of row u is `items[starts[u]:ends[u]]`."""

    items: np.ndarray  # int32 (num_interactions,), shared with the dataset
    starts: np.ndarray  # int64 (rows,)
    ends: np.ndarray  # int64 (rows,)

    @property
    def lengths(self) -> np.ndarray:
        """int64 (rows,): interactions of each row."""
        return self.ends - self.starts

    def places(self) -> np.ndarray:
        """Return int64 (sum of lengths,): where in `items` every interaction stands, row after row."""
        lengths = self.lengths
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return np.repeat(self.starts, lengths) + within


class Evaluation(NamedTuple):
    """What is known of each evaluated user, and the one item to be found."""

    histories: Histories
    targets: np.ndarray  # int32 (rows,)


def load(folder: Path) -> Dataset:
    """Return the prepared dataset of a folder; raise `InputError` unless it is whole."""
    if not system.holds(folder):
        found = system.damage(folder)
        said = found[0] if found else "it was being replaced"
        raise InputError(f"{folder} is no whole prepared dataset ({said}); {system.remedy(folder)}")
    return opened(folder, json.loads((folder / "manifest.json").read_text("utf-8")))


def opened(folder: Path, manifest: dict[str, Any]) -> Dataset:
    """Return the dataset of the files in `folder`, which nothing has checked."""
    times = folder / "times.npy"
    return Dataset(
        name=manifest["name"],
        items=_mapped(folder / "items.npy"),
        offsets=_mapped(folder / "offsets.npy"),
        item_keys=Keys(_mapped(folder / "item_keys.npy")),
        user_keys=Keys(_mapped(folder / "user_keys.npy")),
        titles=Titles(folder / "titles.json"),
        manifest=manifest,
        times=_mapped(times) if times.exists() else None,
    )


def train_histories(dataset: Dataset) -> Histories:
    """Return what may be trained on: each user's history without its targets."""
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


def described(dataset: Dataset, about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest: `about`, and what follows from the arrays alone."""
    held_out = evaluated_users(dataset).size
    training = dataset.num_interactions - HELD_OUT * held_out
    steps = [
        *about.get("steps", []),
        step("train", dataset.num_users, dataset.num_items, training),
        step("valid", held_out, dataset.num_items, held_out),
        step("test", held_out, dataset.num_items, held_out),
    ]
    own = {
        "steps": steps,
        "test_targets_sha256": _test_targets_hash(dataset),
        "fingerprint": _fingerprint(dataset),
    }
    return {"name": dataset.name, **about, **own}


def step(name: str, users: int, items: int, interactions: int) -> dict[str, Any]:
    """Return the counts after one step of the preparation."""
    return {"step": name, "users": users, "items": items, "interactions": interactions}


def ties(dataset: Dataset) -> dict[str, int]:
    """Count what only the tie rule orders: times shared within a user's history; 0 without times."""
    if dataset.times is None:
        return {"interactions": 0, "test_targets": 0}
    same = dataset.times[1:] == dataset.times[:-1]
    same[dataset.offsets[1:-1] - 1] = False  # neighbours of two different users
    before, after = np.append(False, same), np.append(same, False)
    lasts = dataset.offsets[1:][dataset.lengths > HELD_OUT] - 1
    return {
        "interactions": int((before | after).sum()),
        "test_targets": int(before[lasts].sum()),  # the last two could be exchanged
    }


def content_hash(*parts: str | bytes | memoryview) -> str:
    """Return the sha256 of parts and their lengths, which keep them apart."""
    return _hash(parts)


def _hash(parts: Iterable[str | bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _test_targets_hash(dataset: Dataset) -> str:
    def parts() -> Iterator[str]:
        users, targets = evaluated_users(dataset), evaluation(dataset, "test").targets
        for start in range(0, users.size, CHUNK):
            rows = slice(start, start + CHUNK)
            keys = dataset.user_keys[users[rows]].tolist(), dataset.item_keys[targets[rows]].tolist()
            for pair in zip(*keys, strict=True):
                yield from pair

    return _hash(parts())


def _fingerprint(dataset: Dataset) -> str:
    def parts() -> Iterator[str | memoryview]:
        for array, dtype in ((dataset.items, "<i4"), (dataset.offsets, "<i8")):
            yield np.ascontiguousarray(array, dtype).data.cast("B")
        yield from dataset.item_keys
        yield from dataset.user_keys

    return _hash(parts())[:16]


def _mapped(path: Path) -> np.ndarray:
    # a plain array on the mapped pages: np.memmap's own class makes each small slice slower
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


MIN_LEN = 5  # interactions that every user has


def lengths(users: int, mean_len: float, longest: int, generator: np.random.Generator) -> np.ndarray:
    """Return int64 (users,) interactions per user: geometric from `MIN_LEN`, cut at `longest`."""
    extra = generator.geometric(1.0 / (mean_len - MIN_LEN + 1.0), users) - 1
    return np.minimum(MIN_LEN + extra, longest).astype(np.int64)
