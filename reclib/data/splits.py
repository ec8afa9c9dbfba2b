"""Splits of the histories into training, validation and test, and sampled negatives.

- Leave-one-out: see `dataset`. Training interactions of a user may be later than another's test target.
- Global time: two points in time. Interactions before the first train; the windows after it are validation
  and test.
- Random users: whole histories of some users train; the last interaction of each other user is its target.
  This is the seed study's split, for comparison.
- Periods: three points in time, for adapters. A base is trained on the first part, an adapter on the second;
  the windows after them are validation and test. A user may have several targets in a window, each with the
  history before it; metrics are averaged over a user's targets first (`by_user`).

An interaction at exactly a point in time belongs to the part after it. `about` of a split counts what it
leaves out.

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
ROUNDS = 30  # of drawing and rejecting, before the remaining rows are drawn from the whole catalogue


class Split(NamedTuple):
    """One division of a dataset."""

    name: str
    train: Histories
    valid: Evaluation
    test: Evaluation
    about: dict[str, Any]  # plain JSON: counts, points in time, numbers of users and rows left out

    def before_test(self) -> Histories:
        """Return the training users' histories up to their test targets, for leave-one-out."""
        histories = self.test.histories
        return histories.rows(np.isin(histories.starts, self.train.starts))

    def with_fewer_users(self, share: float, seed: int = 0) -> Split:
        """Return the split with a share of the training histories, drawn by `seed`; the targets stay.

        A smaller share is a part of a larger one with the same seed.
        """
        users = len(self.train.starts)
        drawn = np.random.default_rng(seed).permutation(users)[: max(1, round(share * users))]
        train = self.train.rows(np.sort(drawn))
        metadata = {"share_of_users": share, "seed": seed, "train_users": len(drawn)}
        metadata["train_interactions"] = int(train.lengths.sum())
        name = f"{self.name}, {share:.0%} of the users train"
        return self._replace(name=name, train=train, about=self.about | metadata)


def leave_one_out(dataset: Dataset) -> Split:
    """Return the last interaction of each user as test target, the one before as validation target."""
    users = evaluated_users(dataset).size
    metadata = {
        "rule": "the last interaction is the test target, the one before it the validation target",
        "train_interactions": dataset.num_interactions - HELD_OUT * users,
        "evaluated_users": users,
        "left_out_short_histories": dataset.num_users - users,
    }
    valid, test = evaluation(dataset, "valid"), evaluation(dataset, "test")
    return Split("leave-one-out", train_histories(dataset), valid, test, metadata)


def global_time(
    dataset: Dataset,
    valid_share: float = 0.1,
    test_share: float = 0.1,
    target: Target = "first",
    seed: int = 0,
) -> Split:
    """Divide by two time points: `valid_share` and `test_share` of the interactions lie after them.

    Each user with an interaction in a window gives one row. Its target is the first, last or a random (by
    `seed`) interaction in the window; its history is everything before the target. Rows without a history are
    left out and counted. Raises `InputError` for a dataset without times, and for an empty window or
    training part.
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
    start, valid_from, test_from, end = borders(dataset, points)
    trains = valid_from > start
    known = _known(dataset, points)
    generator = np.random.default_rng(seed)
    metadata: dict[str, Any] = {
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
        usable = places > start[users]  # others have no history
        rows = Evaluation.from_places(dataset, users[usable], places[usable])
        metadata[name] = {
            "interactions": int((last - first).sum()),
            "rows": int(usable.sum()),
            "left_out_without_history": int((~usable).sum()),
            "rows_of_unseen_users": int((~trains[users[usable]]).sum()),
            "rows_with_unseen_target": int((~known[rows.targets]).sum()),
        }
        windows.append(rows)
    train = Histories(dataset.items, start[trains], valid_from[trains])
    return Split("global time", train, windows[0], windows[1], metadata)


def random_users(dataset: Dataset, shares: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> Split:
    """Divide users at random by `shares` (training, validation, test), as the seed study does.

    Whole histories of the training users train; the target of each other user is the last interaction. Users
    with one interaction have no history: they are left out and counted.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise InputError(f"shares are {tuple(shares)}, expected three that sum to 1")
    drawn = np.random.default_rng(seed).permutation(dataset.num_users)
    ends = np.round(np.cumsum(shares) * dataset.num_users).astype(np.int64)
    trains, *groups = (np.sort(group) for group in np.split(drawn, ends[:2]))
    if not trains.size:
        raise InputError(f"shares are {tuple(shares)}: none of {dataset.num_users:,} users would train")
    train = Histories(dataset.items, dataset.offsets[trains], dataset.offsets[trains + 1])
    metadata: dict[str, Any] = {
        "rule": "users divided at random, the last interaction of those that did not train is the target",
        "shares": list(shares),
        "seed": seed,
        "train_users": trains.size,
        "train_interactions": int(train.lengths.sum()),
    }
    windows = []
    for name, group in zip(("valid", "test"), groups, strict=True):
        users = group[dataset.lengths[group] > 1]
        metadata[name] = {"rows": users.size, "left_out_without_history": group.size - users.size}
        windows.append(Evaluation.from_places(dataset, users, dataset.offsets[users + 1] - 1))
    return Split("random users (the seed study's)", train, windows[0], windows[1], metadata)


SPLITS: dict[str, Callable[[Dataset], Split]] = {
    "leave_one_out": leave_one_out,
    "global_time": global_time,
    "random_users": random_users,
}

# By the `name` of the resulting `Split`.
SPLIT_TITLES = {
    "leave-one-out": leave_one_out,
    "global time": global_time,
    "random users (the seed study's)": random_users,
}


def row_users(dataset: Dataset, histories: Histories) -> np.ndarray:
    """Return int64 (rows,): the user of each history."""
    return np.searchsorted(dataset.offsets, histories.starts, side="right") - 1


def _points(dataset: Dataset, ranks: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the times of the interactions of the given ranks in time: the points between the parts."""
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


def borders(dataset: Dataset, points: np.ndarray) -> list[np.ndarray]:
    """Return int64 (users,) arrays of indices into `items`: the start of each part, and the end."""
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

    base: Split  # trains on the past; each user's last interaction in the past validates
    adaptation: Split  # trains on the second part; validation and test are the windows after it
    known: np.ndarray  # bool (I + 1,): items that occur in the past; False for PAD
    about: dict[str, Any]  # plain JSON: points in time, counts by part


def divide(
    dataset: Dataset, shares: tuple[float, float, float], targets_per_user: int, seed: int = 0
) -> Periods:
    """Divide by `shares` of the interactions in the past, the adaptation and the validation part.

    The remaining interactions are the test part. Each user gives up to `targets_per_user` targets in a
    window, drawn by `seed`, each with the history before it. Raises `InputError` for a dataset without times
    and for an empty part.
    """
    if min(shares) <= 0 or sum(shares) >= 1:
        raise InputError(f"shares are {shares}: expected three above 0 whose sum is below 1")
    points = _points(dataset, (np.cumsum(shares) * dataset.num_interactions).astype(np.int64))
    bounds = borders(dataset, points)
    lengths = np.diff(bounds, axis=0)  # (4, users)
    known = _known(dataset, points)
    generator = np.random.default_rng(seed)
    valid, test = (
        _period_window(dataset, first, end, targets_per_user, generator)
        for first, end in ((bounds[2], bounds[3]), (bounds[3], bounds[4]))
    )
    metadata = {
        "points": points.tolist(),
        "interactions": dict(zip(PARTS, lengths.sum(axis=1).tolist(), strict=True)),
        "users": dict(zip(PARTS, (lengths > 0).sum(axis=1).tolist(), strict=True)),
        "items_not_in_the_past": int((~known[1:]).sum()),
        "targets_per_user": targets_per_user,
        "seed": seed,
    }
    train = Histories(dataset.items, bounds[1], bounds[2]).rows(lengths[1] > 1)
    # the base: the last interaction of a past of three or more validates; there is no test
    users = np.flatnonzero(lengths[0] > 2)
    last_items = Evaluation.from_places(dataset, users, bounds[1][users] - 1)
    no_test = last_items.rows(np.zeros(len(users), dtype=bool))
    base = Split("past", last_items.histories, last_items, no_test, metadata)
    return Periods(base, Split("next period", train, valid, test, metadata), known, metadata)


def _period_window(
    dataset: Dataset, first: np.ndarray, end: np.ndarray, most: int, generator: np.random.Generator
) -> Evaluation:
    """Return up to `most` random targets with a history of each user in [first, end)."""
    first = np.maximum(first, dataset.offsets[:-1] + 1)
    lengths = np.maximum(end - first, 0)
    user = np.repeat(np.arange(dataset.num_users), lengths)
    places = Histories(dataset.items, first, first + lengths).places()
    order = np.lexsort((generator.random(len(places)), user))
    chosen = np.sort(places[order][within(lengths) < most])  # users stay one after another
    if not chosen.size:
        raise InputError(f"dataset {dataset.name!r}: a window has no target with a history; choose others")
    return Evaluation.from_places(dataset, np.searchsorted(dataset.offsets, chosen, side="right") - 1, chosen)


def segment(dataset: Dataset, periods: Periods, share: float = 1 / 3) -> Split:
    """Return the adaptation of the users whose past has the least popular items.

    A user's distance is the mean popularity rank of the items in the past. `share` of the adaptation's users
    with a past lie above the threshold. Later interactions do not affect the choice.
    """
    start, past_end, *_ = borders(dataset, np.array(periods.about["points"]))
    ranks = popularity_ranks(periods.base.train, dataset.num_items)
    distance = np.where(past_end > start, mean_rank(Histories(dataset.items, start, past_end), ranks), -1.0)
    adaptation = periods.adaptation
    train = distance[row_users(dataset, adaptation.train)]
    if not (train >= 0).any():
        raise InputError(
            f"dataset {dataset.name!r}: nobody of the adaptation has a past: there is no segment"
        )
    threshold = float(np.quantile(train[train >= 0], 1 - share))
    valid, test = (
        rows.rows(distance[row_users(dataset, rows.histories)] >= threshold)
        for rows in (adaptation.valid, adaptation.test)
    )
    if not (len(valid.targets) and len(test.targets)):
        raise InputError(f"share is {share}: a window has no user of the segment; take a larger one")
    details = periods.about | {"segment": "past far from popular items", "share": share}
    details |= {"threshold": threshold}
    return Split("user segment", adaptation.train.rows(train >= threshold), valid, test, details)


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


def neighbours(histories: Histories, known: np.ndarray) -> dict[int, np.ndarray]:
    """Return, for each item of the histories that is not `known`, its known neighbours with repetition.

    Neighbours of an item are the items directly before and after it in a history.
    """
    items = histories.items[histories.places()]
    row = np.repeat(np.arange(len(histories.starts)), histories.lengths)
    same_row = row[1:] == row[:-1]
    pairs = np.stack([items[:-1][same_row], items[1:][same_row]])
    unknown, neighbour = np.concatenate([pairs, pairs[::-1]], axis=1)
    useful = ~known[unknown] & known[neighbour]
    unknown, neighbour = unknown[useful], neighbour[useful]
    return {int(item): neighbour[unknown == item] for item in np.unique(unknown)}


# ---- sampled negatives ------------------------------------------------------------------------------------


def sample_candidates(
    dataset: Dataset, evaluation: Evaluation, count: int = 100, how: Sampling = "uniform", seed: int = 0
) -> np.ndarray:
    """Return int32 (rows, count): for each row distinct items that its user never had, at any time.

    They are drawn without replacement, uniformly or by the number of interactions in the whole dataset.
    Raises `InputError` where fewer than `count` items remain for a user.
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

    A row keeps the first `count` distinct new items of independent draws, which equals drawing without
    replacement. A (row, item) pair is encoded as one number, so that all rows are compared at once.
    """
    width = weights.size
    had = Histories(dataset.items, dataset.offsets[users], dataset.offsets[users + 1])
    row = np.repeat(np.arange(users.size), had.lengths)
    excluded = np.unique(row * width + dataset.items[had.places()])
    useful = np.bincount(excluded[weights[excluded % width] > 0] // width, minlength=users.size)
    available = np.count_nonzero(weights) - useful
    if available.size and available.min() < count:
        key = dataset.user_keys[int(users[available.argmin()])]
        raise InputError(
            f"user {key!r} has not had {available.min():,} items, fewer than the {count} negatives requested"
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
        index = np.minimum(np.searchsorted(excluded, pairs), excluded.size - 1)
        pairs = pairs[excluded[index] != pairs]
        rows = pairs // width
        accepted = np.bincount(rows, minlength=users.size)
        drawn[rows, filled[rows] + within(accepted)] = pairs % width
        filled += accepted
        excluded = np.sort(np.concatenate([excluded, pairs]))
    for number in np.flatnonzero(filled < count):  # few users, who had most of the popular items
        free = weights.copy()
        free[excluded[excluded // width == number] % width] = 0.0
        chosen = generator.choice(width, count - filled[number], replace=False, p=free / free.sum())
        drawn[number, filled[number] :] = chosen
    return drawn
