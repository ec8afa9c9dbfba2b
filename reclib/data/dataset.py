"""A prepared dataset: histories of dense item ids on disk, with keys, titles and a manifest.

Arrays are memory-mapped; keys and titles are decoded on access. Loading therefore takes little time and
memory at any size.

- Dense ids: items 1..num_items and users 0.. in the order of their raw ids, shorter before longer and then
  by character, which for plain integers is their numeric order. 0 is PAD.
- Leave-one-out: the last interaction of each user is the test target, the one before it the validation
  target. A user with fewer than three interactions has no targets; the whole history trains.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from reclib import system
from reclib.config import InputError

HELD_OUT = 2  # interactions at the end of a history that are targets
CHUNK = 1 << 16  # keys decoded at a time
MIN_LEN = 5  # fewest interactions of a synthetic user


class Keys:
    """Raw ids: an array of fixed-width UTF-8 bytes, decoded on access."""

    def __init__(self, encoded: np.ndarray) -> None:
        self._encoded = encoded  # bytes (size,)

    @classmethod
    def encode(cls, keys: Sequence[str]) -> Keys:
        """Encode keys."""
        return cls(np.array([key.encode() for key in keys]))

    def __len__(self) -> int:
        return self._encoded.size

    def __getitem__(self, index: Any) -> Any:
        """Return a str for an integer index, an array of str for a slice or an array."""
        keys = self._encoded[index]
        return keys.decode() if isinstance(keys, bytes) else np.char.decode(keys, "utf-8")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), CHUNK):
            yield from self[start : start + CHUNK].tolist()

    def tolist(self) -> list[str]:
        """Return all keys."""
        return list(self)


class Titles(UserDict[str, str]):
    """Titles by item key, read from their file on first access."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @functools.cached_property
    def data(self) -> dict[str, str]:  # type: ignore[override]
        """All titles."""
        return json.loads(self._path.read_text("utf-8"))


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
        return len(self.user_keys)

    @property
    def num_items(self) -> int:
        """Catalogue size after the k-core, without PAD and MASK."""
        return len(self.item_keys) - 1

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


def within(lengths: np.ndarray) -> np.ndarray:
    """Return int64 (sum of lengths,): the place 0, 1, ... of each element in its run."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


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
        """Return int64 (sum of lengths,): the index into `items` of every interaction, row after row."""
        return np.repeat(self.starts, self.lengths) + within(self.lengths)

    def rows(self, chosen: np.ndarray) -> Histories:
        """Return the rows selected by indices or a boolean mask."""
        return Histories(self.items, self.starts[chosen], self.ends[chosen])


class Evaluation(NamedTuple):
    """The history of each evaluated row, and the item to be predicted."""

    histories: Histories
    targets: np.ndarray  # int32 (rows,)

    @classmethod
    def from_places(cls, dataset: Dataset, users: np.ndarray, targets: np.ndarray) -> Evaluation:
        """Return a row per user; `targets` are indices into `items`, the history is all before them."""
        histories = Histories(dataset.items, dataset.offsets[users], targets)
        return cls(histories, dataset.items[targets])

    def rows(self, chosen: np.ndarray) -> Evaluation:
        """Return the rows selected by indices or a boolean mask."""
        return Evaluation(self.histories.rows(chosen), self.targets[chosen])


def load(folder: Path) -> Dataset:
    """Return the prepared dataset of a folder; raise `InputError` unless it is whole."""
    if not system.holds(folder):
        reason = (system.damage(folder) or ["it was being replaced"])[0]
        raise InputError(f"{folder} is no whole prepared dataset ({reason}); {system.remedy(folder)}")
    return opened(folder, json.loads((folder / "manifest.json").read_text("utf-8")))


def opened(folder: Path, manifest: dict[str, Any]) -> Dataset:
    """Return the dataset of the files in `folder`, without checking them."""

    def mapped(name: str) -> np.ndarray:
        # a plain array on the mapped pages: np.memmap's own class makes each small slice slower
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)

    return Dataset(
        name=manifest["name"],
        items=mapped("items"),
        offsets=mapped("offsets"),
        item_keys=Keys(mapped("item_keys")),
        user_keys=Keys(mapped("user_keys")),
        titles=Titles(folder / "titles.json"),
        manifest=manifest,
        times=mapped("times") if (folder / "times.npy").exists() else None,
    )


def train_histories(dataset: Dataset) -> Histories:
    """Return each user's history without its validation and test targets."""
    starts, ends = dataset.offsets[:-1], dataset.offsets[1:]
    return Histories(dataset.items, starts, np.where(ends - starts > HELD_OUT, ends - HELD_OUT, ends))


def evaluated_users(dataset: Dataset) -> np.ndarray:
    """Return int64 (rows,) the users that have targets, in the row order of `evaluation`."""
    return np.flatnonzero(dataset.lengths > HELD_OUT)


def evaluation(dataset: Dataset, part: Literal["valid", "test"]) -> Evaluation:
    """Return histories and targets of the users that have at least three interactions.

    valid: the target is the last but one. test: the target is the last, and the history includes the
    validation item. With `min_user` of 3 or more, rows are all users.
    """
    if part not in ("valid", "test"):
        raise InputError(f"part is {part!r}, expected 'valid' or 'test'")
    users = evaluated_users(dataset)
    return Evaluation.from_places(dataset, users, dataset.offsets[users + 1] - (1 if part == "test" else 2))


def described(dataset: Dataset, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest: `metadata`, and the values derived from the arrays."""
    held_out, items = evaluated_users(dataset).size, dataset.num_items
    training = dataset.num_interactions - HELD_OUT * held_out
    steps = [
        *metadata.get("steps", []),
        step("train", dataset.num_users, items, training),
        step("valid", held_out, items, held_out),
        step("test", held_out, items, held_out),
    ]
    derived = {
        "steps": steps,
        "ties": ties(dataset),
        "test_targets_sha256": content_hash(_test_targets(dataset)),
        "fingerprint": content_hash(_content(dataset))[:16],
    }
    return {"name": dataset.name, **metadata, **derived}


def step(name: str, users: int, items: int, interactions: int) -> dict[str, Any]:
    """Return the counts after one step of the preparation."""
    return {"step": name, "users": users, "items": items, "interactions": interactions}


def ties(dataset: Dataset) -> dict[str, int | float | None]:
    """Count interactions with equal times, and measure how far the order follows the item ids.

    - interactions: those whose time equals that of another interaction of the same user.
    - test_targets: those whose time equals that of the interaction before. Both are None without times.
    - ascending_share: share of neighbours in a history that ascend by item id; None without neighbours.
    - tied_ascending_share: the same for neighbours with equal times; None without such.

    A share far above one half means that the source sorted ties by item, which a model can learn.
    """
    same_user = np.ones(max(dataset.num_interactions - 1, 0), dtype=bool)
    same_user[dataset.offsets[1:-1] - 1] = False
    ascends = dataset.items[1:] > dataset.items[:-1]

    def share(pairs: np.ndarray) -> float | None:
        return float(ascends[pairs].mean()) if pairs.any() else None

    if dataset.times is None:
        unknown = dict.fromkeys(("interactions", "test_targets", "tied_ascending_share"))
        return unknown | {"ascending_share": share(same_user)}
    tied = (dataset.times[1:] == dataset.times[:-1]) & same_user
    before, after = np.append(False, tied), np.append(tied, False)
    return {
        "interactions": int((before | after).sum()),
        "test_targets": int(before[dataset.offsets[evaluated_users(dataset) + 1] - 1].sum()),
        "ascending_share": share(same_user),
        "tied_ascending_share": share(tied),
    }


def content_hash(parts: Iterable[str | bytes | memoryview]) -> str:
    """Return the sha256 of parts, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _test_targets(dataset: Dataset) -> Iterator[str]:
    users, targets = evaluated_users(dataset), evaluation(dataset, "test").targets
    for start in range(0, users.size, CHUNK):
        rows = slice(start, start + CHUNK)
        keys = dataset.user_keys[users[rows]].tolist(), dataset.item_keys[targets[rows]].tolist()
        for pair in zip(*keys, strict=True):
            yield from pair


def _content(dataset: Dataset) -> Iterator[str | memoryview]:
    for array, dtype in ((dataset.items, "<i4"), (dataset.offsets, "<i8")):
        yield np.ascontiguousarray(array, dtype).data.cast("B")
    yield from dataset.item_keys
    yield from dataset.user_keys


def lengths(users: int, mean_len: float, longest: int, generator: np.random.Generator) -> np.ndarray:
    """Return int64 (users,) interactions per user: geometric from `MIN_LEN`, cut at `longest`."""
    extra = generator.geometric(1.0 / (mean_len - MIN_LEN + 1.0), users) - 1
    return np.minimum(MIN_LEN + extra, longest).astype(np.int64)
