"""How sure a comparison is, and what lies beside accuracy: for whom, of what, how concentrated.

Users and seeds are both samples: other users, and other seeds of the same recipe, would have given another
difference. `compare` is the two-way random-effects analysis of crossed samples (as for readers and cases in
Hillis, Statistics in Medicine 2007): the variance of a mean difference is that over users, plus that of the
seeds' means, less their interaction, which both contain. The variance of seeds is pooled over the models that
are compared together, and t with Satterthwaite's degrees of freedom takes the place of the normal.

Why not a bootstrap of users and seeds: three seeds resample to too little spread where seeds differ, and
count the interaction three times where they do not. Simulated with three seeds and no true difference, it
rejects at 5 % in 1 to 13 % of cases, this test in 3 to 6 %, and one over users alone in up to 50 %.

What three seeds can say: two models with three seeds each leave 4 degrees of freedom for the seeds, so where
these dominate a difference needs 2.8 standard errors instead of 2. Thirty arms with three each leave 60: the
pooled variance is why single arms among many can be told apart after correction. It assumes that seeds differ
alike in all of them. A trained model with fewer than `claims.MIN_SEEDS` seeds carries no claim.

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


class Comparison(NamedTuple):
    """One model against the reference: paired differences, this one minus the reference."""

    name: str
    reference: str
    difference: Interval  # 95 % over users and seeds, not adjusted
    p_value: float  # two-sided
    adjusted_p: float  # Holm's, over all comparisons that were made together
    detectable: float  # smallest true difference found with a power of 80 %
    seeds: tuple[int, int]  # of this model and of the reference; 0: deterministic
    seed_range: tuple[float, float]  # lowest and highest mean of this model over its seeds
    degrees: float  # of freedom, Satterthwaite's

    @property
    def claim(self) -> Claim:
        """What may be said; a difference counts from an adjusted p-value below 5 %."""
        return claims.claim(self.difference.mean, self.adjusted_p, self.seeds)


def compare(
    values: Mapping[str, np.ndarray], reference: str, deterministic: Collection[str] = ()
) -> list[Comparison]:
    """Compare every model with the reference, corrected for their number.

    `values` holds a metric per seed and user (S, U) for each model, users in the same order; seeds of two
    models are not paired. Models named in `deterministic` have one row and no seeds (baselines without
    randomness). Where no model has two seeds, nothing is known of what they add.
    """
    from scipy import stats

    _check(values, reference, deterministic)
    rows = {name: np.asarray(array, dtype=np.float64) for name, array in values.items()}
    seeds = {name: 0 if name in deterministic else len(array) for name, array in rows.items()}
    users = rows[reference].shape[1]
    between, within, freedom = _seed_variance([a for name, a in rows.items() if seeds[name] > 1])
    found = {}
    for name in (name for name in rows if name != reference):
        difference = rows[name].mean(axis=0) - rows[reference].mean(axis=0)
        share = sum(1 / seeds[one] for one in (name, reference) if seeds[one])
        over_users = difference.var(ddof=1) / users
        over_seeds = between * share
        variance = over_users + max(over_seeds - within * share / users, 0.0)
        error = float(np.sqrt(variance))
        parts = over_users**2 / (users - 1) + (over_seeds**2 / freedom if freedom else 0.0)
        degrees = float(variance**2 / parts) if parts else float(users - 1)
        mean, reach = float(difference.mean()), float(stats.t.ppf(1 - ALPHA / 2, degrees)) * error
        p_value = float(2 * stats.t.sf(abs(mean) / error, degrees)) if error else float(mean == 0)
        means = rows[name].mean(axis=1)
        found[name] = Comparison(
            name,
            reference,
            Interval(mean, mean - reach, mean + reach),
            p_value,
            p_value,
            detectable_difference(error, degrees),
            (seeds[name], seeds[reference]),
            (float(means.min()), float(means.max())),
            degrees,
        )
    adjusted = holm({name: one.p_value for name, one in found.items()})
    return [one._replace(adjusted_p=adjusted[name]) for name, one in found.items()]


def _seed_variance(models: Sequence[np.ndarray]) -> tuple[float, float, int]:
    """Return, pooled over models (S, U), what seeds add.

    The variance of a seed's mean over users, that of a user's value around both means (the interaction), and
    the degrees of freedom of the first; zeros without models.
    """
    freedom = sum(len(rows) - 1 for rows in models)
    if not freedom:
        return 0.0, 0.0, 0
    users = models[0].shape[1]
    between = sum((len(rows) - 1) * rows.mean(axis=1).var(ddof=1) for rows in models)
    left = (rows - rows.mean(axis=0) - rows.mean(axis=1, keepdims=True) + rows.mean() for rows in models)
    within = sum(float((one**2).sum()) for one in left)
    return float(between / freedom), within / (freedom * (users - 1)), freedom


def _check(values: Mapping[str, np.ndarray], reference: str, deterministic: Collection[str]) -> None:
    """Refuse what cannot be paired user by user."""
    for name in (reference, *deterministic):
        if name not in values:
            raise InputError(f"there is no model {name!r}: expected one of {', '.join(values)}")
    users = np.shape(values[reference])[-1]
    if users < 2:
        raise InputError(f"{users} users have no spread: expected 2 or more")
    for name, rows in values.items():
        if np.ndim(rows) != 2 or np.shape(rows)[1] != users:
            raise InputError(
                f"values of {name!r} have the shape {np.shape(rows)}: expected (seeds, {users} users)"
            )
        if name in deterministic and len(rows) != 1:
            raise InputError(f"{name!r} is said to be deterministic, and has {len(rows)} rows: expected 1")


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


def detectable_difference(error: float, degrees: float, power: float = 0.8, alpha: float = ALPHA) -> float:
    """Return the smallest true mean difference that would be found with the given power.

    From its standard error and degrees of freedom: (t_(1 - alpha/2) + t_power) * error. For one comparison,
    uncorrected.
    """
    from scipy import stats

    return float((stats.t.ppf(1 - alpha / 2, degrees) + stats.t.ppf(power, degrees)) * error)


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


def by_time_before(histories: Histories, times: np.ndarray) -> Groups:
    """Divide users by whether the target has the time of the item before it.

    `times` (interactions,) stands beside `histories.items`, in which the target follows its history.
    """
    same = times[histories.ends] == times[np.maximum(histories.ends - 1, 0)]
    same &= histories.ends > histories.starts
    return Groups(["same time as the item before", "later"], np.where(same, 0, 1))


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
