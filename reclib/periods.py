"""Time in four parts: what a base learns from, what it is adapted to, and two windows that judge it.

    past -> adaptation -> validation -> test

Everything that trains is earlier than everything that judges. A base is trained on the past alone, its epochs
chosen by the last interaction of each user there. An adaptation trains on what happened in the second part
and is chosen in the third. Users give several targets in a window, each with the history before it, so that
few users still say something; a metric is averaged over a user's targets before anything else.

A segment restricts adaptation and judgement to some users: here those whose taste is far from the
most popular items, told from their past alone. Items that the past has not are told apart by
`known_targets`, and `neighbours` gives what they can start from.

Shapes: I real items, rows of an evaluation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reclib.config import InputError
from reclib.dataset import Dataset, Evaluation, Histories
from reclib.splits import Split, row_users

PARTS = ("past", "adaptation", "validation", "test")


class Periods(NamedTuple):
    """A dataset divided by three points in time."""

    base: Split  # trains on the past without each user's last interaction there, which validates
    adaptation: Split  # trains on the second part; validation and test are the windows after it
    known: np.ndarray  # bool (I + 1,): items that the past has, PAD apart
    about: dict[str, Any]  # plain JSON: points in time, counts by part


def divide(
    dataset: Dataset, shares: tuple[float, float, float], targets_per_user: int, seed: int = 0
) -> Periods:
    """Divide by `shares` of the interactions in the past, the adaptation and the validation part.

    The rest is the test part. Each user gives up to `targets_per_user` targets in a window, drawn by `seed`;
    the history of one is all that its user did before. Interactions at exactly a point belong to the part
    after it. Raises `InputError` where there are no times or a part would be empty.
    """
    if dataset.times is None:
        raise InputError(f"dataset {dataset.name!r} has no times: it cannot be divided into periods")
    points = _points(dataset, shares)
    part = np.searchsorted(points, dataset.times, side="right")
    borders = np.stack([_reached(dataset, part, number) for number in range(5)])  # (5, users)
    known = np.zeros(dataset.num_items + 1, dtype=bool)
    known[dataset.items[part == 0]] = True
    generator = np.random.default_rng(seed)
    windows = {
        name: _window(dataset, borders[number], borders[number + 1], targets_per_user, generator)
        for number, name in ((2, "valid"), (3, "test"))
    }
    about = {
        "points": [int(point) for point in points],
        "interactions": dict(zip(PARTS, np.bincount(part, minlength=4).tolist(), strict=True)),
        "users": {name: int((borders[n + 1] > borders[n]).sum()) for n, name in enumerate(PARTS)},
        "items_not_in_the_past": int((~known[1:]).sum()),
        "targets_per_user": targets_per_user,
        "seed": seed,
    }
    trains = borders[2] - borders[1] > 1
    train = Histories(dataset.items, borders[1][trains], borders[2][trains])
    found = Split("next period", train, windows["valid"], windows["test"], about)
    return Periods(_base(dataset, borders, about), found, known, about)


def segment(dataset: Dataset, periods: Periods, share: float = 1 / 3) -> Split:
    """Return the adaptation of the users whose past is the farthest from popular items.

    A user's distance is the mean popularity rank of its items in the past; the threshold is that above which
    `share` of the adaptation's users lie, those without a past left out. What comes after the past decides
    nothing: users chosen by what is then trained on would teach an adapter that choice.
    """
    whole = periods.adaptation
    distance = _past_ranks(dataset, periods)
    train = distance[row_users(dataset, whole.train)]
    if not (train >= 0).any():
        raise InputError(
            f"dataset {dataset.name!r}: nobody of the adaptation has a past: there is no segment"
        )
    threshold = float(np.quantile(train[train >= 0], 1 - share))
    chosen = train >= threshold
    histories = Histories(whole.train.items, whole.train.starts[chosen], whole.train.ends[chosen])
    valid, test = (
        _rows(one, distance[row_users(dataset, one.histories)] >= threshold)
        for one in (whole.valid, whole.test)
    )
    if not (len(valid.targets) and len(test.targets)):
        raise InputError(f"share is {share}: a window has no user of the segment; take a larger one")
    about = periods.about | {"segment": "past far from popular items", "share": share, "threshold": threshold}
    return Split("user segment", histories, valid, test, about)


def popularity_ranks(histories: Histories, num_items: int) -> np.ndarray:
    """Return float64 (I + 1,): 0 for the most popular item of the histories, 1 for the least; PAD 0."""
    counts = np.bincount(histories.items[histories.places()], minlength=num_items + 1)[1:]
    order = np.argsort(-counts, kind="stable")
    ranks = np.zeros(num_items + 1)
    ranks[order + 1] = np.arange(num_items) / max(num_items - 1, 1)
    return ranks


def mean_rank(histories: Histories, ranks: np.ndarray) -> np.ndarray:
    """Return float64 (rows,): the mean popularity rank of each history's items."""
    lengths = histories.lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.bincount(row, ranks[histories.items[histories.places()]], minlength=len(lengths))
    return sums / np.maximum(lengths, 1)


def _past_ranks(dataset: Dataset, periods: Periods) -> np.ndarray:
    """Return float64 (users,): the mean popularity rank of each user's past; -1 without one."""
    assert dataset.times is not None
    starts = dataset.offsets[:-1]
    lengths = np.add.reduceat(dataset.times < periods.about["points"][0], starts, dtype=np.int64)
    ranks = popularity_ranks(periods.base.train, dataset.num_items)
    return np.where(lengths > 0, mean_rank(Histories(dataset.items, starts, starts + lengths), ranks), -1.0)


def by_user(dataset: Dataset, rows: Evaluation, values: np.ndarray) -> np.ndarray:
    """Average values (..., rows) over each user's targets: (..., users that have any), in users' order."""
    _, user = np.unique(row_users(dataset, rows.histories), return_inverse=True)
    counts = np.bincount(user)
    flat = np.atleast_2d(values)
    means = np.stack([np.bincount(user, one) / counts for one in flat])
    return means.reshape(*np.shape(values)[:-1], len(counts))


def known_targets(periods: Periods, rows: Evaluation) -> np.ndarray:
    """Return bool (rows,): whether the past has the target's item."""
    return periods.known[rows.targets]


def neighbours(histories: Histories, known: np.ndarray) -> dict[int, np.ndarray]:
    """Return for each item that the past has not, and these histories have, its known neighbours in them.

    Neighbours are the items one before and one after, as often as they stand there.
    """
    items = histories.items[histories.places()]
    row = np.repeat(np.arange(len(histories.starts)), histories.lengths)
    same = row[1:] == row[:-1]
    pairs = np.stack([items[:-1][same], items[1:][same]])
    new, beside = np.concatenate([pairs, pairs[::-1]], axis=1)
    useful = ~known[new] & known[beside]
    new, beside = new[useful], beside[useful]
    return {int(item): beside[new == item] for item in np.unique(new)}


def _points(dataset: Dataset, shares: tuple[float, float, float]) -> np.ndarray:
    """Return the three times at which the later parts begin."""
    if min(shares) <= 0 or sum(shares) >= 1:
        raise InputError(f"shares are {shares}: expected three above 0 whose sum is below 1")
    assert dataset.times is not None
    places = (np.cumsum(shares) * dataset.num_interactions).astype(np.int64)
    points = np.partition(dataset.times, places)[places]
    if not dataset.times.min() < points[0] < points[1] < points[2]:
        raise InputError(
            f"dataset {dataset.name!r} has so many interactions at one time that shares {shares} leave a "
            "part empty; choose others"
        )
    return points


def _reached(dataset: Dataset, part: np.ndarray, number: int) -> np.ndarray:
    """Return int64 (users,): where in `items` each user's interactions from part `number` on begin."""
    earlier = np.add.reduceat(part < number, dataset.offsets[:-1], dtype=np.int64)
    return dataset.offsets[:-1] + earlier


def _base(dataset: Dataset, borders: np.ndarray, about: dict[str, Any]) -> Split:
    """Return the past; its own last interactions validate, and nothing of it is a test."""
    start, end = borders[0], borders[1]
    trains = end - start > 2
    last = end[trains] - 1
    valid = Evaluation(Histories(dataset.items, start[trains], last), dataset.items[last])
    none = _rows(valid, np.zeros(len(last), dtype=bool))
    return Split("past", Histories(dataset.items, start[trains], last), valid, none, about)


def _window(
    dataset: Dataset, first: np.ndarray, end: np.ndarray, most: int, generator: np.random.Generator
) -> Evaluation:
    """Return up to `most` random targets of each user in [first, end), those without a history left out."""
    first = np.maximum(first, dataset.offsets[:-1] + 1)
    lengths = np.maximum(end - first, 0)
    user = np.repeat(np.arange(dataset.num_users), lengths)
    place = Histories(dataset.items, first, first + lengths).places()
    order = np.lexsort((generator.random(len(place)), user))
    within = np.arange(len(place)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    chosen = np.sort(place[order][within < most])  # users stand one after another, so they stay together
    starts = dataset.offsets[np.searchsorted(dataset.offsets, chosen, side="right") - 1]
    if not chosen.size:
        raise InputError(f"dataset {dataset.name!r}: a window has no target with a history; choose others")
    return Evaluation(Histories(dataset.items, starts, chosen), dataset.items[chosen])


def _rows(whole: Evaluation, chosen: np.ndarray) -> Evaluation:
    items, starts, ends = whole.histories
    return Evaluation(Histories(items, starts[chosen], ends[chosen]), whole.targets[chosen])
