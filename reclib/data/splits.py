"""How histories are divided into training, validation and test, and which negatives a row is ranked with.

- Leave-one-out: see `dataset`. Training sees interactions of one user that are later than the test
  target of another.
- Global time: two points in time; training is what happened before the first, validation and test
  are what happened in the windows after it. Interactions at exactly a point belong to the window
  after it, so that all that trains is earlier.
- Random users: users are divided at random; whole histories of some train, the last interaction of
  the others is the target. This is the seed study's, kept for comparison.

Every split tells in `about` what it left out. Candidate files are for comparison with studies that rank
a target among sampled negatives instead of the catalogue.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from reclib import system
from reclib.config import InputError
from reclib.data.dataset import (
    Dataset,
    Evaluation,
    Histories,
    content_hash,
    evaluated_users,
    evaluation,
    train_histories,
)

Target = Literal["first", "last", "random"]

Sampling = Literal["uniform", "popularity"]

ROWS = 1 << 13  # rows whose negatives are drawn together

ROUNDS = 30  # of drawing and rejecting, before the few rows left are drawn over the whole catalogue


class Split(NamedTuple):
    """One division of a dataset."""

    name: str
    train: Histories
    valid: Evaluation
    test: Evaluation
    about: dict[str, Any]  # plain JSON: counts, time points, what was left out


class Candidates(NamedTuple):
    """Sampled negatives of the rows of an evaluation, and how they were drawn."""

    items: np.ndarray  # int32 (rows, count)
    about: dict[str, Any]  # plain JSON: label, fingerprints of the dataset and the evaluation


def leave_one_out(dataset: Dataset) -> Split:
    """Return the last interaction of each user as test target, the one before as validation target."""
    users = evaluated_users(dataset).size
    about = {
        "rule": "the last interaction is the test target, the one before it the validation target",
        "train_interactions": dataset.num_interactions - 2 * users,
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

    Each user with an interaction in a window gives one row: its target is the first, last or a
    random (by `seed`) interaction in the window, its history all that this user did before the
    target. Rows without a history are left out and counted. Raises `InputError` where the dataset has
    no times, and where a window or the training part would be empty.
    """
    if dataset.times is None:
        raise InputError(
            f"dataset {dataset.name!r} has the order of interactions but no times: "
            "the global time split needs them; use leave_one_out"
        )
    if target not in ("first", "last", "random"):
        raise InputError(f"target is {target!r}, expected 'first', 'last' or 'random'")
    points = _time_points(dataset, valid_share, test_share)
    borders = [dataset.offsets[:-1], *(_first_not_before(dataset, p) for p in points), dataset.offsets[1:]]
    start, valid_from, test_from, end = borders
    trains = valid_from > start
    train = Histories(dataset.items, start[trains], valid_from[trains])
    known = np.zeros(dataset.num_items + 1, dtype=bool)
    known[dataset.items[dataset.times < points[0]]] = True
    generator = np.random.default_rng(seed)
    about: dict[str, Any] = {
        "rule": "training only before the validation point; ties with a point belong to the window after it",
        "target": f"{target} interaction of each user in the window",
        "time_points": {"valid": points[0], "test": points[1]},
        "time_unit": dataset.manifest.get("time_unit"),
        "train_interactions": int((valid_from - start).sum()),
        "train_users": int(trains.sum()),
        "users_unseen_in_training": int((~trains).sum()),
        "items_unseen_in_training": int((~known[1:]).sum()),
    }
    parts = {}
    for name, window in (("valid", (valid_from, test_from)), ("test", (test_from, end))):
        parts[name], rows = _window(dataset, window, target, generator)
        about[name] = {
            "interactions": int((window[1] - window[0]).sum()),
            "rows": rows.size,
            "left_out_without_history": int((window[1] > window[0]).sum()) - rows.size,
            "rows_of_unseen_users": int((~trains[rows]).sum()),
            "rows_with_unseen_target": int((~known[parts[name].targets]).sum()),
        }
    return Split("global time", train, parts["valid"], parts["test"], about)


def random_users(dataset: Dataset, shares: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> Split:
    """Divide users at random by `shares` (training, validation, test), as the seed study does.

    Whole histories of the training users train; the target of the others is their last interaction.
    Users of those with one interaction have no history: they are left out and counted.
    """
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise InputError(f"shares are {tuple(shares)}, expected three that sum to 1")
    drawn = np.random.default_rng(seed).permutation(dataset.num_users)
    ends = np.round(np.cumsum(shares) * dataset.num_users).astype(np.int64)
    groups = [np.sort(group) for group in np.split(drawn, ends[:2])]
    if not groups[0].size:
        raise InputError(f"shares are {tuple(shares)}: none of {dataset.num_users:,} users would train")
    train = Histories(dataset.items, dataset.offsets[groups[0]], dataset.offsets[groups[0] + 1])
    rows = [users[dataset.lengths[users] > 1] for users in groups[1:]]
    valid, test = (_evaluation(dataset, users, dataset.offsets[users + 1] - 1) for users in rows)
    about = {
        "rule": "users divided at random, the last interaction of those that did not train is the target",
        "shares": list(shares),
        "seed": seed,
        "train_users": groups[0].size,
        "train_interactions": int((train.ends - train.starts).sum()),
        "valid": {"rows": rows[0].size, "left_out_without_history": groups[1].size - rows[0].size},
        "test": {"rows": rows[1].size, "left_out_without_history": groups[2].size - rows[1].size},
    }
    return Split("random users (the seed study's)", train, valid, test, about)


def row_users(dataset: Dataset, histories: Histories) -> np.ndarray:
    """Return int64 (rows,) whose history each row is."""
    return np.searchsorted(dataset.offsets, histories.starts, side="right") - 1


def sample_candidates(
    dataset: Dataset, evaluation: Evaluation, count: int = 100, how: Sampling = "uniform", seed: int = 0
) -> np.ndarray:
    """Return int32 (rows, count): for each row distinct items that its user never had, at any time.

    They are drawn one after another without replacement, uniformly or by the number of interactions
    in the whole dataset. Raises `InputError` where a user leaves fewer than `count` items.
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


def write_candidates(
    path: Path,
    dataset: Dataset,
    split: Split,
    part: Literal["valid", "test"],
    count: int = 100,
    how: Sampling = "uniform",
    seed: int = 0,
) -> Candidates:
    """Sample negatives for a part of a split and write them as an `.npz` candidate file."""
    rows = getattr(split, part)
    items = sample_candidates(dataset, rows, count, how, seed)
    about = {
        "label": f"{count} sampled negatives, {how}",
        "how": how,
        "seed": seed,
        "split": split.name,
        "part": part,
        "dataset": dataset.fingerprint,
        "evaluation": evaluation_fingerprint(rows),
    }
    with system.replacing(path) as fresh, fresh.open("wb") as file:
        np.savez(file, items=items, about=np.array(json.dumps(about)))
    return Candidates(items, about)


def read_candidates(path: Path, dataset: Dataset, evaluation: Evaluation) -> Candidates:
    """Return what a candidate file holds; refuse one of another dataset or other rows."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            items, about = stored["items"], json.loads(str(stored["about"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is no candidate file: {error}") from None
    expected = {"dataset": dataset.fingerprint, "evaluation": evaluation_fingerprint(evaluation)}
    for name, fingerprint in expected.items():
        if about.get(name) != fingerprint:
            raise InputError(
                f"{path} belongs to another {name}: its fingerprint is {about.get(name)}, "
                f"this one's is {fingerprint}"
            )
    return Candidates(items, about)


def evaluation_fingerprint(evaluation: Evaluation) -> str:
    """Return a hexadecimal hash of which positions are histories and which are targets."""
    arrays = (evaluation.histories.starts, evaluation.histories.ends, evaluation.targets)
    return content_hash(*(np.ascontiguousarray(array, "<i8").tobytes() for array in arrays))[:16]


def _time_points(dataset: Dataset, valid_share: float, test_share: float) -> tuple[int, int]:
    if min(valid_share, test_share) <= 0 or valid_share + test_share >= 1:
        raise InputError(
            f"valid_share is {valid_share} and test_share {test_share}: expected both above 0 and their "
            "sum below 1"
        )
    assert dataset.times is not None
    size = dataset.num_interactions
    ranks = [int(size * (1 - valid_share - test_share)), int(size * (1 - test_share))]
    ordered = np.partition(dataset.times, ranks)
    points = int(ordered[ranks[0]]), int(ordered[ranks[1]])
    if not dataset.times.min() < points[0] < points[1]:
        raise InputError(
            f"dataset {dataset.name!r} has so many interactions at one time that the time points "
            f"{points[0]} and {points[1]} leave a part empty; choose other shares"
        )
    return points


def _first_not_before(dataset: Dataset, point: int) -> np.ndarray:
    """Return int64 (num_users,): where in the arrays each user's interactions from `point` on begin."""
    assert dataset.times is not None
    earlier = np.add.reduceat(dataset.times < point, dataset.offsets[:-1], dtype=np.int64)
    return dataset.offsets[:-1] + earlier


def _window(
    dataset: Dataset,
    window: tuple[np.ndarray, np.ndarray],
    target: Target,
    generator: np.random.Generator,
) -> tuple[Evaluation, np.ndarray]:
    """Return the rows of a window and their users."""
    users = np.flatnonzero(window[1] > window[0])
    first, end = window[0][users], window[1][users]
    at = {"first": first, "last": end - 1}.get(target)
    if at is None:
        at = generator.integers(first, end)
    some = at > dataset.offsets[users]
    return _evaluation(dataset, users[some], at[some]), users[some]


def _evaluation(dataset: Dataset, users: np.ndarray, target: np.ndarray) -> Evaluation:
    histories = Histories(dataset.items, dataset.offsets[users], target)
    return Evaluation(histories, dataset.items[target])


def _draw(
    dataset: Dataset, users: np.ndarray, weights: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Return int32 (users, count) distinct items per row by weight, none that the user had.

    A row keeps the first `count` distinct new items of a stream of independent draws, which is
    drawing without replacement. (row, item) pairs are single numbers, so that all rows are compared
    at once.
    """
    width = weights.size
    taken = _pairs_had(dataset, users, width)
    _refuse_few(dataset, users, np.bincount(taken[weights[taken % width] > 0] // width), weights, count)
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
        pairs = pairs[~_among(pairs, taken)]
        rows = pairs // width
        new = np.bincount(rows, minlength=users.size)
        order = np.arange(rows.size) - np.repeat(np.cumsum(new) - new, new)  # within its row
        drawn[rows, filled[rows] + order] = pairs % width
        filled += new
        taken = np.sort(np.concatenate([taken, pairs]))
    for row in np.flatnonzero(filled < count):  # few: those who had most of what is popular
        left = weights.copy()
        left[taken[taken // width == row] % width] = 0.0
        chosen = generator.choice(width, count - filled[row], replace=False, p=left / left.sum())
        drawn[row, filled[row] :] = chosen
    return drawn


def _pairs_had(dataset: Dataset, users: np.ndarray, width: int) -> np.ndarray:
    """Return int64 row * width + item, ascending and distinct, of all that the users of rows had."""
    lengths = dataset.lengths[users]
    before = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) + np.repeat(dataset.offsets[users] - before, lengths)
    return np.unique(np.repeat(np.arange(users.size), lengths) * width + dataset.items[positions])


def _refuse_few(
    dataset: Dataset, users: np.ndarray, had: np.ndarray, weights: np.ndarray, count: int
) -> None:
    left = np.count_nonzero(weights) - np.pad(had, (0, users.size - had.size))
    if left.size and left.min() < count:
        key = dataset.user_keys[int(users[left.argmin()])]
        raise InputError(
            f"user {key!r} has not had {left.min():,} items, fewer than the {count} negatives asked"
        )


def _among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(ordered, values), ordered.size - 1)
    return ordered[at] == values


# ------------------------------------------------------------------------------------------------
# Time in four parts: what a base learns from, what it is adapted to, and two windows that judge it.
#
#     past -> adaptation -> validation -> test
#
# Everything that trains is earlier than everything that judges. A base is trained on the past alone, its
# epochs chosen by the last interaction of each user there. An adaptation trains on what happened in the
# second part and is chosen in the third. Users give several targets in a window, each with the history
# before it, so that few users still say something; a metric is averaged over a user's targets before
# anything else.
#
# A segment restricts adaptation and judgement to some users: here those whose taste is far from the
# most popular items, told from their past alone. Items that the past has not are told apart by
# `known_targets`, and `neighbours` gives what they can start from.
#
# Shapes: I real items, rows of an evaluation.

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
        name: _period_window(dataset, borders[number], borders[number + 1], targets_per_user, generator)
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


def _period_window(
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


SPLITS: dict[str, Callable[[Dataset], Split]] = {
    "leave_one_out": leave_one_out,
    "global_time": global_time,
    "random_users": random_users,
}

SPLIT_TITLES: dict[str, Callable[[Dataset], Split]] = {  # by the name that each gives its result
    "leave-one-out": leave_one_out,
    "global time": global_time,
    "random users (the seed study's)": random_users,
}
