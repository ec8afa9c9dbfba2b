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
alike in all of them. A trained model with fewer than `statistics.MIN_SEEDS` seeds carries no claim.

Shapes: S seeds, U users, I items, k recommendations.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from reclib.config import InputError
from reclib.data.dataset import Evaluation, Histories

# ------------------------------------------------------------------------------------------------
# What a comparison allows to say: one rule for reports, tables and figures, which need no torch for it.

Claim = Literal["better", "worse", "not separated", "too few seeds"]

MIN_SEEDS = 3  # of a trained model, before a difference from it is claimed

ALPHA = 0.05  # level of tests and of the detectable difference


def claim(difference: float, adjusted_p: float, seeds: Collection[int]) -> Claim:
    """Return what may be said of a mean difference, this model minus the reference.

    `adjusted_p` is corrected for the number of comparisons; `seeds` are those of both models, 0 where a model
    is deterministic.
    """
    if not enough(seeds):
        return "too few seeds"
    if adjusted_p >= ALPHA:
        return "not separated"
    return "better" if difference > 0 else "worse"


def enough(seeds: Iterable[float]) -> bool:
    """Whether these numbers of seeds, 0 where a model is deterministic, allow a claim."""
    return not any(0 < count < MIN_SEEDS for count in seeds)


# ------------------------------------------------------------------------------------------------


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
        return claim(self.difference.mean, self.adjusted_p, self.seeds)


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
        interval = bootstrap(chosen, samples, seed) if chosen.size else None
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


# ------------------------------------------------------------------------------------------------
# The power law of loss against size, L(N) = E + A N^-alpha: its fit, its band, and what it predicts.
#
# The form is that of Kaplan et al. 2020 (arXiv 2001.08361, section 1.2) with the floor E of Hoffmann et al.
# 2022 (arXiv 2203.15556, section 3.3), which Zhang et al. 2023 (arXiv 2311.11351) fit to recommendation.
# For each exponent of a grid E and A are a linear least-squares problem, so the fit needs no start and
# finds the minimum of the grid; both are kept non-negative.
#
# Shapes: S sizes, B bootstrap draws, G exponents of the grid.

EXPONENTS = np.geomspace(0.005, 3.0, 600)  # (G,)

MIN_SIZES = 4  # three parameters are fitted

SAMPLES = 2000  # bootstrap draws


class Law(NamedTuple):
    """Fitted parameters, each a number or an array (B,)."""

    floor: Any  # E, nats: what no size goes below
    factor: Any  # A, nats
    exponent: Any  # alpha

    def __call__(self, sizes: Any) -> np.ndarray:
        """Return the loss in nats at `sizes` (non-embedding parameters): (S,), or (B, S) of B laws."""
        sizes = np.asarray(sizes, dtype=np.float64)
        if np.ndim(self.floor) == 0:
            return self.floor + self.factor * sizes**-self.exponent
        return self.floor[:, None] + self.factor[:, None] * sizes[None] ** -self.exponent[:, None]


def fit(sizes: Any, losses: Any) -> Law:
    """Return the law of least squares through `losses` (S,) or, one law for each row, (B, S).

    Raises `ValueError` for fewer than MIN_SIZES different sizes.
    """
    sizes = np.asarray(sizes, dtype=np.float64)
    rows = np.atleast_2d(np.asarray(losses, dtype=np.float64))  # (B, S)
    if len(np.unique(sizes)) < MIN_SIZES:
        raise ValueError(f"a law with a floor needs {MIN_SIZES} sizes, there are {len(np.unique(sizes))}")
    x = np.exp(-EXPONENTS[:, None] * np.log(sizes / sizes.min()))  # (G, S): conditioned by the smallest
    centred = x - x.mean(1, keepdims=True)
    scale = (rows - rows.mean(1, keepdims=True)) @ centred.T / (centred**2).sum(1)  # (B, G)
    floor = rows.mean(1)[:, None] - scale * x.mean(1)
    through_zero = rows @ x.T / (x**2).sum(1)
    scale, floor = np.where(floor < 0, through_zero, scale), np.maximum(floor, 0.0)
    floor, scale = np.where(scale < 0, rows.mean(1)[:, None], floor), np.maximum(scale, 0.0)
    errors = ((floor[..., None] + scale[..., None] * x - rows[:, None, :]) ** 2).sum(-1)  # (B, G)
    best = errors.argmin(1)
    at = np.arange(len(rows)), best
    exponent = EXPONENTS[best]
    law = Law(floor[at], scale[at] * sizes.min() ** exponent, exponent)
    return law if np.ndim(losses) == 2 else Law(*(float(part[0]) for part in law))


def resampled(losses: Sequence[Sequence[float]], samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Return means (B, S) of seeds drawn with replacement, for each size apart."""
    rng = np.random.default_rng(seed)
    drawn = [np.asarray(one)[rng.integers(len(one), size=(samples, len(one)))].mean(1) for one in losses]
    return np.stack(drawn, axis=1)


def predict(by_size: Mapping[float, Sequence[float]], size: float, samples: int = SAMPLES) -> dict[str, Any]:
    """Fit the law to the losses of each size's seeds, and say what it gives at another size.

    `low` and `high` are the 95 % interval over resampled seeds, None where no size has two seeds: then there
    is nothing to resample. `without_low` and `without_high` is what leaving out one size does, None where
    that leaves too few. The noise of the predicted run's own seeds is in none of them.
    """
    sizes = np.array(sorted(by_size))
    means = np.array([np.mean(by_size[one]) for one in sizes])
    law = fit(sizes, means)
    found: dict[str, Any] = {"floor": law.floor, "factor": law.factor, "exponent": law.exponent}
    found |= {"predicted": float(law(size)), "residual": float(np.abs(law(sizes) - means).max())}
    found |= dict.fromkeys(("low", "high", "without_low", "without_high", "exponent_low", "exponent_high"))
    if max(len(seeds) for seeds in by_size.values()) > 1:
        laws = fit(sizes, resampled([by_size[one] for one in sizes], samples))
        found["low"], found["high"] = (float(v) for v in np.percentile(laws([size]), (2.5, 97.5)))
        ends = np.percentile(laws.exponent, (2.5, 97.5))
        found["exponent_low"], found["exponent_high"] = (float(v) for v in ends)
    if len(sizes) > MIN_SIZES:
        others = [float(fit(np.delete(sizes, i), np.delete(means, i))(size)) for i in range(len(sizes))]
        found["without_low"], found["without_high"] = min(others), max(others)
    return found


def naive(sizes: Any, losses: Any, size: float) -> dict[str, float]:
    """Return what to hold a law against: the largest size's loss again, and a straight line in log N.

    `sizes` and `losses` are (S,), smallest first.
    """
    slope, start = np.polyfit(np.log(np.asarray(sizes, dtype=np.float64)), losses, 1)
    return {"last": float(losses[-1]), "line": float(start + slope * np.log(size))}


def band(by_size: Mapping[float, Sequence[float]], sizes: Any, samples: int = SAMPLES) -> np.ndarray | None:
    """Return the 95 % band (2, S) of the law at `sizes`, over resampled seeds; None where it has none.

    At the predicted size it is `low` and `high` of `predict`.
    """
    measured = sorted(by_size)
    if len(measured) < MIN_SIZES or max(len(seeds) for seeds in by_size.values()) < 2:
        return None
    laws = fit(measured, resampled([by_size[one] for one in measured], samples))
    return np.percentile(laws(sizes), (2.5, 97.5), axis=0)


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: np.ndarray, samples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of per-user values (U,) with its 95 % percentile interval over resampled users.

    For a paired comparison give the per-user differences; for several seeds give each user's mean over seeds.
    """
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values) == 0:
        return Interval(float(values.mean()), float(values.mean()), float(values.mean()))
    from scipy import stats  # here: takes longer to import than torch

    found = stats.bootstrap(
        (values,), np.mean, n_resamples=samples, batch=100, method="percentile", rng=seed
    ).confidence_interval
    return Interval(float(values.mean()), float(found.low), float(found.high))
