"""How sure a comparison is, and what lies beside accuracy: for whom, of what, how concentrated.

The unit is the user: each user's metric is averaged over the seeds first, and intervals, p-values and
detectable differences are over users. What the seeds add is shown apart, as the range of their means, and a
trained model with fewer than `claims.MIN_SEEDS` of them carries no claim.

Shapes: S seeds, U users, I items, k recommendations.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reclib import claims, metrics
from reclib.claims import ALPHA, Claim
from reclib.config import InputError
from reclib.data import Evaluation, Histories
from reclib.metrics import Interval

BLOCK_BYTES = 32 * 2**20  # of sign draws held at a time


class Comparison(NamedTuple):
    """One model against the reference: paired differences, this one minus the reference."""

    name: str
    reference: str
    difference: Interval  # 95 % bootstrap interval over users, not adjusted
    p_value: float  # two-sided sign-flip test
    adjusted_p: float  # Holm's, over all comparisons that were made together
    detectable: float  # smallest true difference found with a power of 80 %
    seeds: tuple[int, int]  # of this model and of the reference; 0: deterministic
    seed_range: tuple[float, float]  # lowest and highest mean of this model over its seeds

    @property
    def claim(self) -> Claim:
        """What may be said; a difference counts from an adjusted p-value below 5 %."""
        return claims.claim(self.difference.mean, self.adjusted_p, self.seeds)


def compare(
    values: Mapping[str, np.ndarray],
    reference: str,
    deterministic: Collection[str] = (),
    samples: int = 10_000,
    seed: int = 0,
) -> list[Comparison]:
    """Compare every model with the reference, corrected for their number.

    `values` holds a metric per seed and user (S, U) for each model, users in the same order. Models named in
    `deterministic` have one row and no seeds (baselines without randomness).
    """
    _check(values, reference, deterministic)
    per_user = {name: np.mean(rows, axis=0) for name, rows in values.items()}
    differences = {n: per_user[n] - per_user[reference] for n in values if n != reference}
    p_values = {n: sign_flip(d, samples, seed) for n, d in differences.items()}
    adjusted = holm(p_values)
    seeds = {n: 0 if n in deterministic else len(rows) for n, rows in values.items()}
    found = []
    for name, difference in differences.items():
        means = np.mean(values[name], axis=1)
        found.append(
            Comparison(
                name,
                reference,
                metrics.bootstrap(difference, samples, seed),
                p_values[name],
                adjusted[name],
                detectable_difference(difference),
                (seeds[name], seeds[reference]),
                (float(means.min()), float(means.max())),
            )
        )
    return found


def _check(values: Mapping[str, np.ndarray], reference: str, deterministic: Collection[str]) -> None:
    """Refuse what cannot be paired user by user."""
    for name in (reference, *deterministic):
        if name not in values:
            raise InputError(f"there is no model {name!r}: expected one of {', '.join(values)}")
    users = np.shape(values[reference])[-1]
    for name, rows in values.items():
        if np.ndim(rows) != 2 or np.shape(rows)[1] != users:
            raise InputError(
                f"values of {name!r} have the shape {np.shape(rows)}: expected (seeds, {users} users)"
            )
        if name in deterministic and len(rows) != 1:
            raise InputError(f"{name!r} is said to be deterministic, and has {len(rows)} rows: expected 1")


def sign_flip(differences: np.ndarray, samples: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value that paired differences (U,) are symmetric around zero.

    Signs are flipped user by user: all of them where 2^users is at most `samples`, else `samples` random
    draws with the observed one among them (Phipson and Smyth 2010: a p-value is never 0). Users without a
    difference change nothing and are left out.
    """
    moved = np.asarray(differences, dtype=np.float64)
    moved = moved[moved != 0]
    if moved.size == 0:
        return 1.0
    # Sums of the same numbers in another order differ in the last bits: those are ties.
    reached = abs(moved.sum()) - 1e-9 * np.abs(moved).sum()
    every = moved.size < 63 and 2**moved.size <= samples
    total = 2**moved.size if every else samples
    rng = np.random.default_rng(seed)
    size = max(1, BLOCK_BYTES // (8 * moved.size))
    extreme = 0
    for first in range(0, total, size):
        rows = min(size, total - first)
        if every:
            flips = (np.arange(first, first + rows)[:, None] >> np.arange(moved.size)) & 1
        else:
            flips = rng.integers(0, 2, (rows, moved.size), dtype=np.int8)
        sums = moved.sum() - 2 * (flips.astype(np.float64) @ moved)
        extreme += int((np.abs(sums) >= reached).sum())
    return extreme / total if every else (1 + extreme) / (1 + samples)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted so that any false claim among them stays as rare as the level (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1; none falls below a smaller one's, none exceeds 1.
    """
    order = sorted(p_values, key=lambda name: p_values[name])
    adjusted, floor = {}, 0.0
    for place, name in enumerate(order):
        floor = max(floor, min(1.0, (len(order) - place) * p_values[name]))
        adjusted[name] = floor
    return {name: adjusted[name] for name in p_values}


def detectable_difference(differences: np.ndarray, power: float = 0.8, alpha: float = ALPHA) -> float:
    """Return the smallest true mean difference that these users would show with the given power.

    From the spread of paired differences (U,) and the normal approximation of a two-sided test:
    (z_(1 - alpha/2) + z_power) * standard deviation / sqrt(U). For one comparison, uncorrected.
    """
    if len(differences) < 2:
        raise InputError(f"{len(differences)} users have no spread: expected 2 or more")
    from scipy import stats

    z = stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)
    return float(z * np.std(differences, ddof=1) / np.sqrt(len(differences)))


class Groups(NamedTuple):
    """A division of the users of an evaluation."""

    labels: list[str]
    member: np.ndarray  # int64 (U,): the label's place


class GroupResult(NamedTuple):
    """A metric in one group of users."""

    label: str
    users: int
    interval: Interval | None  # None: no users


def by_history_length(histories: Histories, edges: Sequence[int] = (10, 20, 50, 100)) -> Groups:
    """Divide users by the interactions in their history: below edges[0], then up to below each next edge."""
    if list(edges) != sorted(set(edges)) or not edges or edges[0] < 1:
        raise InputError(
            f"parameter 'edges' is {list(edges)}: expected rising numbers of interactions from 1"
        )
    labels = [f"below {edges[0]}"]
    labels += [f"{low} to {high - 1}" for low, high in itertools.pairwise(edges)]
    labels.append(f"{edges[-1]} or more")
    return Groups(labels, np.searchsorted(edges, histories.ends - histories.starts, side="right"))


def by_item_popularity(
    targets: np.ndarray, counts: np.ndarray, shares: Sequence[float] = (0.2, 0.5, 0.8)
) -> Groups:
    """Divide users by how popular the target is in training.

    `counts` (I,) are training interactions. Items stand by falling count, and an item belongs to the first
    share of all interactions that those before it have not yet filled: the head is few items, the tail many.
    Items never met in training are a group of their own.
    """
    if list(shares) != sorted(set(shares)) or not all(0 < share < 1 for share in shares):
        raise InputError(f"parameter 'shares' is {list(shares)}: expected rising shares between 0 and 1")
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order], dtype=np.float64) - counts[order]
    group = np.empty(len(counts), dtype=np.int64)
    group[order] = np.searchsorted(np.asarray(shares) * counts.sum(), before, side="right")
    group[counts == 0] = len(shares) + 1
    bounds = [0, *shares, 1]
    labels = [
        f"items with {low:.0%} to {high:.0%} of interactions" for low, high in itertools.pairwise(bounds)
    ]
    return Groups([*labels, "items not in training"], group[targets - 1])


def in_groups(values: np.ndarray, groups: Groups, samples: int = 2000, seed: int = 0) -> list[GroupResult]:
    """Return the mean of per-user values (U,) in each group, with its 95 % interval over users."""
    found = []
    for place, label in enumerate(groups.labels):
        chosen = values[groups.member == place]
        interval = metrics.bootstrap(chosen, samples, seed) if chosen.size else None
        found.append(GroupResult(label, len(chosen), interval))
    return found


def coverage(top: np.ndarray, num_items: int) -> float:
    """Return the share of the catalogue that is recommended to anybody, from `Ranking.top` (U, k)."""
    return len(np.unique(top)) / num_items


def gini(top: np.ndarray, num_items: int) -> float:
    """Return how unequally recommendations (U, k) fall on items: 0 all alike, near 1 all on few."""
    counts = np.sort(np.bincount(top.ravel(), minlength=num_items + 1)[1:])
    place = np.arange(1, num_items + 1)
    return float(((2 * place - num_items - 1) * counts).sum() / (num_items * counts.sum()))


def popularity_percentile(top: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return per user (U,) the mean popularity percentile of the items recommended (U, k).

    0 is the item with the fewest training interactions, 1 the one with the most; equal counts share the mean.
    An even choice from the catalogue has an expectation of 0.5.
    """
    from scipy import stats

    percentile = (stats.rankdata(counts) - 1) / max(len(counts) - 1, 1)
    return percentile[top - 1].mean(axis=1)


def shuffled(evaluation: Evaluation, seed: int, keep_last: int = 0) -> Evaluation:
    """Return the evaluation with each history in random order, targets as they are: the shuffle control.

    With `keep_last` the last so many items of each history stay in place. A model that does not fall uses no
    order (or the data have none); one that falls without `keep_last` and not with it uses the last items
    only. The histories are copied: the dataset stays as it is. See arXiv 2408.12008.
    """
    if keep_last < 0:
        raise InputError(f"parameter 'keep_last' is {keep_last}: expected 0 or more interactions")
    histories = evaluation.histories
    lengths = histories.lengths
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(len(row)) - np.repeat(ends - lengths, lengths)
    items = histories.items[histories.places()]
    key = np.random.default_rng(seed).random(len(row))
    kept = within >= lengths[row] - keep_last
    key[kept] = 1.0 + within[kept]  # after all others, in their order
    order = np.lexsort((key, row))
    return Evaluation(Histories(items[order], ends - lengths, ends), evaluation.targets)
