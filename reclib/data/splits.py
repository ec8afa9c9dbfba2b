"""How histories are divided into training, validation and test, and which negatives a row is ranked with.

- Leave-one-out: see `dataset`. Training sees interactions of one user that are later than the test target
  of another.
- Global time: two points in time; training is what happened before the first, validation and test are what
  happened in the windows after it.
- Random users: whole histories of some users train, the last interaction of the others is the target. This
  is the seed study's, kept for comparison.
- Periods: three points in time, for adapters. A base is trained on the past, an adapter on the second part,
  and two windows judge it. A user gives several targets in a window, each with the history before it, so
  that few users still say something; a metric is averaged over a user's targets first (`by_user`).

Interactions at exactly a point belong to the part after it, so that all that trains is earlier. Every split
tells in `about` what it left out.

Shapes: I real items, rows of an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from reclib.config import InputError
from reclib.data.dataset import (
    HELD_OUT,
    Dataset,
    Evaluation,
    Histories,
    evaluated_users,
    evaluation,
    train_histories,
    within,
)

Target = Literal["first", "last", "random"]

Sampling = Literal["uniform", "popularity"]

PARTS = ("past", "adaptation", "validation", "test")

ROWS = 1 << 13  # rows whose negatives are drawn together

ROUNDS = 30  # of drawing and rejecting, before the few rows left are drawn over the whole catalogue


class Split(NamedTuple):
    """One division of a dataset."""

    name: str
    train: Histories
    valid: Evaluation
    test: Evaluation
    about: dict[str, Any]  # plain JSON: counts, time points, what was left out


def leave_one_out(dataset: Dataset) -> Split:
    """Return the last interaction of each user as test target, the one before as validation target."""
    users = evaluated_users(dataset).size
    about = {
        "rule": "the last interaction is the test target, the one before it the validation target",
        "train_interactions": dataset.num_interactions - HELD_OUT * users,
        "evaluated_users": users,
        "left_out_short_histories": dataset.num_users - users,
    }
    valid, test = evaluation(dataset, "valid"), evaluation(dataset, "test")
    return Split("leave-one-out", train_histories(dataset), valid, test, about)


def global_time(
    dataset: Dataset,
    valid_share: float = 0.1,
    test_share: float = 0.1,
    target: Target = "first",
    seed: int = 0,
) -> Split:
    """Divide by two time points: `valid_share` and `test_share` of the interactions lie after them.

    Each user with an interaction in a window gives one row: its target is the first, last or a random (by
    `seed`) interaction in the window, its history all that this user did before the target. Rows without a
    history are left out and counted. Raises `InputError` where the dataset has no times, and where a window
    or the training part would be empty.
    """
    if target not in ("first", "last", "random"):
        raise InputError(f"target is {target!r}, expected 'first', 'last' or 'random'")
    if min(valid_share, test_share) <= 0 or valid_share + test_share >= 1:
        raise InputError(
            f"valid_share is {valid_share} and test_share {test_share}: expected both above 0 and their sum "
            "below 1"
        )
    size = dataset.num_interactions
    points = _points(dataset, [int(size * (1 - valid_share - test_share)), int(size * (1 - test_share))])
    start, valid_from, test_from, end = _borders(dataset, points)
    trains = valid_from > start
    known = _known(dataset, points)
    generator = np.random.default_rng(seed)
    about: dict[str, Any] = {
        "rule": "training only before the validation point; ties with a point belong to the window after it",
        "target": f"{target} interaction of each user in the window",
        "time_points": {"valid": int(points[0]), "test": int(points[1])},
        "time_unit": dataset.manifest.get("time_unit"),
        "train_interactions": int((valid_from - start).sum()),
        "train_users": int(trains.sum()),
        "users_unseen_in_training": int((~trains).sum()),
        "items_unseen_in_training": int((~known[1:]).sum()),
    }
    windows = []
    for name, first, last in (("valid", valid_from, test_from), ("test", test_from, end)):
        users = np.flatnonzero(last > first)
        places = {"first": first[users], "last": last[users] - 1}.get(target)
        if places is None:
            places = generator.integers(first[users], last[users])
        kept = places > start[users]  # others have no history
        rows = Evaluation.at(dataset, users[kept], places[kept])
        about[name] = {
            "interactions": int((last - first).sum()),
            "rows": int(kept.sum()),
            "left_out_without_history": int((~kept).sum()),
            "rows_of_unseen_users": int((~trains[users[kept]]).sum()),
            "rows_with_unseen_target": int((~known[rows.targets]).sum()),
        }
        windows.append(rows)
    train = Histories(dataset.items, start[trains], valid_from[trains])
    return Split("global time", train, windows[0], windows[1], about)


def random_users(dataset: Dataset, shares: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> Split:
    """Divide users at random by `shares` (training, validation, test), as the seed study does.

    Whole histories of the training users train; the target of the others is their last interaction. Users of
    those with one interaction have no history: they are left out and counted.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise InputError(f"shares are {tuple(shares)}, expected three that sum to 1")
    drawn = np.random.default_rng(seed).permutation(dataset.num_users)
    ends = np.round(np.cumsum(shares) * dataset.num_users).astype(np.int64)
    trains, *groups = (np.sort(group) for group in np.split(drawn, ends[:2]))
    if not trains.size:
        raise InputError(f"shares are {tuple(shares)}: none of {dataset.num_users:,} users would train")
    train = Histories(dataset.items, dataset.offsets[trains], dataset.offsets[trains + 1])
    about: dict[str, Any] = {
        "rule": "users divided at random, the last interaction of those that did not train is the target",
        "shares": list(shares),
        "seed": seed,
        "train_users": trains.size,
        "train_interactions": int(train.lengths.sum()),
    }
    windows = []
    for name, group in zip(("valid", "test"), groups, strict=True):
        users = group[dataset.lengths[group] > 1]
        about[name] = {"rows": users.size, "left_out_without_history": group.size - users.size}
        windows.append(Evaluation.at(dataset, users, dataset.offsets[users + 1] - 1))
    return Split("random users (the seed study's)", train, windows[0], windows[1], about)


SPLITS: dict[str, Callable[[Dataset], Split]] = {
    "leave_one_out": leave_one_out,
    "global_time": global_time,
    "random_users": random_users,
}

# by the name that each gives its result
SPLIT_TITLES = dict(
    zip(("leave-one-out", "global time", "random users (the seed study's)"), SPLITS.values(), strict=True)
)


def row_users(dataset: Dataset, histories: Histories) -> np.ndarray:
    """Return int64 (rows,): the user whose history each row is."""
    return np.searchsorted(dataset.offsets, histories.starts, side="right") - 1


def _points(dataset: Dataset, ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the times of the interactions of some ranks in time; later parts begin there."""
    if dataset.times is None:
        raise InputError(
            f"dataset {dataset.name!r} has no times, only an order: it cannot be divided by time; use "
            "leave_one_out"
        )
    points = np.partition(dataset.times, ranks)[ranks]
    if (np.diff(points, prepend=dataset.times.min()) <= 0).any():
        raise InputError(
            f"dataset {dataset.name!r} has so many interactions at one time that the time points "
            f"{points.tolist()} leave a part empty; choose other shares"
        )
    return points


def _borders(dataset: Dataset, points: np.ndarray) -> list[np.ndarray]:
    """Return int64 (users,) arrays of indices into `items`: where each user's parts begin, and the end."""
    starts = dataset.offsets[:-1]
    earlier = [np.add.reduceat(dataset.times < point, starts, dtype=np.int64) for point in points]
    return [starts, *(starts + count for count in earlier), dataset.offsets[1:]]


def _known(dataset: Dataset, points: np.ndarray) -> np.ndarray:
    """Return bool (I + 1,): items that occur before the first point."""
    known = np.zeros(dataset.num_items + 1, dtype=bool)
    known[dataset.items[dataset.times < points[0]]] = True
    return known


# ---- periods --------------------------------------------------------------------------------------------


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
    the history of one is all that its user did before. Raises `InputError` where there are no times or a
    part would be empty.
    """
    if min(shares) <= 0 or sum(shares) >= 1:
        raise InputError(f"shares are {shares}: expected three above 0 whose sum is below 1")
    points = _points(dataset, (np.cumsum(shares) * dataset.num_interactions).astype(np.int64))
    borders = _borders(dataset, points)
    lengths = np.diff(borders, axis=0)  # (4, users)
    known = _known(dataset, points)
    generator = np.random.default_rng(seed)
    valid, test = (
        _period_window(dataset, first, end, targets_per_user, generator)
        for first, end in ((borders[2], borders[3]), (borders[3], borders[4]))
    )
    about = {
        "points": points.tolist(),
        "interactions": dict(zip(PARTS, lengths.sum(axis=1).tolist(), strict=True)),
        "users": dict(zip(PARTS, (lengths > 0).sum(axis=1).tolist(), strict=True)),
        "items_not_in_the_past": int((~known[1:]).sum()),
        "targets_per_user": targets_per_user,
        "seed": seed,
    }
    train = Histories(dataset.items, borders[1], borders[2]).rows(lengths[1] > 1)
    # the base: the last interaction of a past of three or more validates, and nothing of it is a test
    users = np.flatnonzero(lengths[0] > 2)
    own = Evaluation.at(dataset, users, borders[1][users] - 1)
    base = Split("past", own.histories, own, own.rows(np.zeros(len(own.targets), dtype=bool)), about)
    return Periods(base, Split("next period", train, valid, test, about), known, about)


def _period_window(
    dataset: Dataset, first: np.ndarray, end: np.ndarray, most: int, generator: np.random.Generator
) -> Evaluation:
    """Return up to `most` random targets of each user in [first, end), those without a history left out."""
    first = np.maximum(first, dataset.offsets[:-1] + 1)
    lengths = np.maximum(end - first, 0)
    user = np.repeat(np.arange(dataset.num_users), lengths)
    places = Histories(dataset.items, first, first + lengths).places()
    order = np.lexsort((generator.random(len(places)), user))
    chosen = np.sort(places[order][within(lengths) < most])  # users stay one after another
    if not chosen.size:
        raise InputError(f"dataset {dataset.name!r}: a window has no target with a history; choose others")
    return Evaluation.at(dataset, np.searchsorted(dataset.offsets, chosen, side="right") - 1, chosen)


def segment(dataset: Dataset, periods: Periods, share: float = 1 / 3) -> Split:
    """Return the adaptation of the users whose past is the farthest from popular items.

    A user's distance is the mean popularity rank of its items in the past; the threshold is that above which
    `share` of the adaptation's users lie, those without a past left out. What comes after the past decides
    nothing: users chosen by what is then trained on would teach an adapter that choice.
    """
    start, past_end, *_ = _borders(dataset, np.array(periods.about["points"]))
    ranks = popularity_ranks(periods.base.train, dataset.num_items)
    distance = np.where(past_end > start, mean_rank(Histories(dataset.items, start, past_end), ranks), -1.0)
    whole = periods.adaptation
    train = distance[row_users(dataset, whole.train)]
    if not (train >= 0).any():
        raise InputError(
            f"dataset {dataset.name!r}: nobody of the adaptation has a past: there is no segment"
        )
    threshold = float(np.quantile(train[train >= 0], 1 - share))
    valid, test = (
        rows.rows(distance[row_users(dataset, rows.histories)] >= threshold)
        for rows in (whole.valid, whole.test)
    )
    if not (len(valid.targets) and len(test.targets)):
        raise InputError(f"share is {share}: a window has no user of the segment; take a larger one")
    about = periods.about | {"segment": "past far from popular items", "share": share, "threshold": threshold}
    return Split("user segment", whole.train.rows(train >= threshold), valid, test, about)


def popularity_ranks(histories: Histories, num_items: int) -> np.ndarray:
    """Return float64 (I + 1,): 0 for the most popular item of the histories, 1 for the least; PAD 0."""
    counts = np.bincount(histories.items[histories.places()], minlength=num_items + 1)[1:]
    ranks = np.zeros(num_items + 1)
    ranks[np.argsort(-counts, kind="stable") + 1] = np.arange(num_items) / max(num_items - 1, 1)
    return ranks


def mean_rank(histories: Histories, ranks: np.ndarray) -> np.ndarray:
    """Return float64 (rows,): the mean popularity rank of each history's items."""
    lengths = histories.lengths
    row = np.repeat(np.arange(len(lengths)), lengths)
    sums = np.bincount(row, ranks[histories.items[histories.places()]], minlength=len(lengths))
    return sums / np.maximum(lengths, 1)


def by_user(dataset: Dataset, rows: Evaluation, values: np.ndarray) -> np.ndarray:
    """Average values (..., rows) over each user's targets: (..., users that have any), in users' order."""
    _, user = np.unique(row_users(dataset, rows.histories), return_inverse=True)
    counts = np.bincount(user)
    means = np.stack([np.bincount(user, row) / counts for row in np.atleast_2d(values)])
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


# ---- sampled negatives ------------------------------------------------------------------------------------


def sample_candidates(
    dataset: Dataset, evaluation: Evaluation, count: int = 100, how: Sampling = "uniform", seed: int = 0
) -> np.ndarray:
    """Return int32 (rows, count): for each row distinct items that its user never had, at any time.

    They are drawn one after another without replacement, uniformly or by the number of interactions in the
    whole dataset. Raises `InputError` where a user leaves fewer than `count` items.
    """
    if how not in ("uniform", "popularity"):
        raise InputError(f"how is {how!r}, expected 'uniform' or 'popularity'")
    if count < 1:
        raise InputError(f"count is {count}, expected at least 1 negative per row")
    weights = np.ones(dataset.num_items + 1)
    if how == "popularity":
        weights = np.bincount(dataset.items, minlength=dataset.num_items + 1).astype(float)
    weights[0] = 0.0  # PAD
    users = row_users(dataset, evaluation.histories)
    generator = np.random.default_rng(seed)
    drawn = np.empty((users.size, count), dtype=np.int32)
    for start in range(0, users.size, ROWS):
        rows = slice(start, start + ROWS)
        drawn[rows] = _draw(dataset, users[rows], weights, count, generator)
    return drawn


def _draw(
    dataset: Dataset, users: np.ndarray, weights: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Return int32 (users, count) distinct items per row by weight, none that the user had.

    A row keeps the first `count` distinct new items of a stream of independent draws, which is drawing
    without replacement. (row, item) pairs are single numbers, so that all rows are compared at once.
    """
    width = weights.size
    had = Histories(dataset.items, dataset.offsets[users], dataset.offsets[users + 1])
    row = np.repeat(np.arange(users.size), had.lengths)
    taken = np.unique(row * width + dataset.items[had.places()])
    useful = np.bincount(taken[weights[taken % width] > 0] // width, minlength=users.size)
    left = np.count_nonzero(weights) - useful
    if left.size and left.min() < count:
        key = dataset.user_keys[int(users[left.argmin()])]
        raise InputError(
            f"user {key!r} has not had {left.min():,} items, fewer than the {count} negatives asked"
        )
    cumulative = np.cumsum(weights)
    drawn = np.zeros((users.size, count), dtype=np.int32)
    filled = np.zeros(users.size, dtype=np.int64)
    for _ in range(ROUNDS):
        rows = np.repeat(np.arange(users.size), count - filled)
        if not rows.size:
            return drawn
        tries = generator.random(rows.size) * cumulative[-1]
        pairs = rows * width + np.minimum(np.searchsorted(cumulative, tries, side="right"), width - 1)
        _, first = np.unique(pairs, return_index=True)
        pairs = pairs[np.sort(first)]
        at = np.minimum(np.searchsorted(taken, pairs), taken.size - 1)
        pairs = pairs[taken[at] != pairs]
        rows = pairs // width
        new = np.bincount(rows, minlength=users.size)
        drawn[rows, filled[rows] + within(new)] = pairs % width
        filled += new
        taken = np.sort(np.concatenate([taken, pairs]))
    for number in np.flatnonzero(filled < count):  # few: those who had most of what is popular
        free = weights.copy()
        free[taken[taken // width == number] % width] = 0.0
        chosen = generator.choice(width, count - filled[number], replace=False, p=free / free.sum())
        drawn[number, filled[number] :] = chosen
    return drawn
