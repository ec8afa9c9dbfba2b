"""Uncertainty of comparisons, metrics besides accuracy, and the scaling law.

Users and seeds are both samples. `compare` is the two-way random-effects analysis of crossed samples (as for
readers and cases in Hillis, Statistics in Medicine 2007): the variance of a mean difference is that over
users, plus that of the seeds' means, less their interaction, which both contain. Each model has its own
variance of seeds (Welch), and the t distribution has Satterthwaite's degrees of freedom. Simulated with three
seeds and no true difference, it rejects at 5 % in 3 to 9 % of cases. A bootstrap of users and seeds rejects
in 1 to 13 %, one variance of seeds for the compared models and others in 0 to 21 %, and a test over users
alone in up to 50 %.

Shapes: S seeds, U users, I items, k recommendations.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from reclib.config import InputError
from reclib.data.dataset import Evaluation, Histories

Claim = Literal["better", "worse", "not separated", "too few seeds"]

MIN_SEEDS = 3  # of a trained model, for claiming a difference
ALPHA = 0.05  # level of tests and of the detectable difference


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray, samples: int = 2000, seed: int = 0, users: np.ndarray | None = None
) -> Interval:
    """Return the mean of per-user values (U,) with its 95 % percentile interval over resampled users.

    For a paired comparison pass the per-user differences; for several seeds pass each user's mean over seeds.
    With `users`, the user of each value, all values of a user are resampled together.
    """
    values = np.asarray(values, dtype=np.float64)
    if np.ptp(values) == 0:
        return Interval(float(values.mean()), float(values.mean()), float(values.mean()))
    from scipy import stats  # here: takes longer to import than torch

    rows: tuple[np.ndarray, ...] = (values,)
    if users is not None and len(np.unique(users)) < len(users):
        _, user = np.unique(users, return_inverse=True)
        rows = (np.bincount(user, values), np.bincount(user).astype(np.float64))
    options = {"n_resamples": samples, "batch": 100, "method": "percentile", "rng": seed}
    ends = stats.bootstrap(rows, _mean, paired=len(rows) > 1, **options).confidence_interval
    return Interval(float(values.mean()), float(ends.low), float(ends.high))


def _mean(total: np.ndarray, number: np.ndarray | None = None, axis: int = -1) -> np.ndarray:
    """Return the mean of values, or of sums of `number` values each."""
    return total.mean(axis) if number is None else total.sum(axis) / number.sum(axis)


# -- comparisons ---------------------------------------------------------------------------------------------


def claim(difference: float, adjusted_p: float, seeds: Collection[int]) -> Claim:
    """Return the claim about a mean difference, this model minus the reference.

    `adjusted_p` is corrected for the number of comparisons; `seeds` are the numbers of seeds of both, 0
    for a deterministic one.
    """
    if not enough(seeds):
        return "too few seeds"
    if adjusted_p >= ALPHA:
        return "not separated"
    return "better" if difference > 0 else "worse"


def enough(seeds: Iterable[float]) -> bool:
    """Whether these numbers of seeds, 0 for a deterministic model, allow a claim."""
    return not any(0 < count < MIN_SEEDS for count in seeds)


class Comparison(NamedTuple):
    """A comparison of one model with the reference: paired differences, model minus reference."""

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
        """The claim; a difference needs an adjusted p-value below 5 %."""
        return claim(self.difference.mean, self.adjusted_p, self.seeds)


def compare(
    values: Mapping[str, np.ndarray], reference: str, deterministic: Collection[str] = ()
) -> list[Comparison]:
    """Compare every model with the reference, corrected for the number of comparisons.

    `values` holds a metric per seed and user (S, U) for each model, users in the same order; seeds of two
    models are not paired. Models named in `deterministic` have one row and no seeds. A model with one seed
    takes the variance over seeds of the other of the pair; if that has one seed too, it is taken as zero.
    """
    from scipy import stats

    _check(values, reference, deterministic)
    rows = {name: np.asarray(array, dtype=np.float64) for name, array in values.items()}
    seeds = {name: 0 if name in deterministic else len(array) for name, array in rows.items()}
    users = rows[reference].shape[1]
    of_seeds = {name: _seed_variance(array) for name, array in rows.items() if seeds[name] > 1}
    comparisons: list[Comparison] = []
    for name in (name for name in rows if name != reference):
        difference = rows[name].mean(axis=0) - rows[reference].mean(axis=0)
        shares = {model: 1 / seeds[model] for model in (name, reference) if seeds[model]}
        for one, other in ((name, reference), (reference, name)):
            if seeds[one] == 1 and seeds[other] > 1:
                shares[other] += shares.pop(one)
        over_users = float(difference.var(ddof=1)) / users
        over_seeds, squares = 0.0, over_users**2 / (users - 1)
        for model, share in shares.items():
            if model in of_seeds:
                between, within = of_seeds[model]
                over_seeds += (between - within / users) * share
                squares += (between * share) ** 2 / (seeds[model] - 1)
        variance = over_users + max(over_seeds, 0.0)
        degrees = variance**2 / squares if squares else float(users - 1)
        mean, error = float(difference.mean()), float(np.sqrt(variance))
        reach = float(stats.t.ppf(1 - ALPHA / 2, degrees)) * error
        p = float(2 * stats.t.sf(abs(mean) / error, degrees)) if error else float(mean == 0)
        interval, detectable = (
            Interval(mean, mean - reach, mean + reach),
            detectable_difference(error, degrees),
        )
        pair, means = (seeds[name], seeds[reference]), rows[name].mean(axis=1)
        ends = (float(means.min()), float(means.max()))
        comparisons.append(Comparison(name, reference, interval, p, p, detectable, pair, ends, degrees))
    adjusted = holm({row.name: row.p_value for row in comparisons})
    return [row._replace(adjusted_p=adjusted[row.name]) for row in comparisons]


def _seed_variance(rows: np.ndarray) -> tuple[float, float]:
    """Return of a model's values (S, U) the variances of seeds' means and of users times seeds."""
    seeds, users = rows.shape
    residuals = rows - rows.mean(axis=0) - rows.mean(axis=1, keepdims=True) + rows.mean()
    within = float((residuals**2).sum()) / ((seeds - 1) * (users - 1))
    return float(rows.mean(axis=1).var(ddof=1)), within


def _check(values: Mapping[str, np.ndarray], reference: str, deterministic: Collection[str]) -> None:
    """Raise `InputError` for values that cannot be paired by user."""
    if unknown := [name for name in (reference, *deterministic) if name not in values]:
        raise InputError(f"there is no model {unknown[0]!r}: expected one of {', '.join(values)}")
    users = np.shape(values[reference])[-1]
    if users < 2:
        raise InputError(f"{users} users have no spread: expected 2 or more")
    for name, rows in values.items():
        seeds = "1" if name in deterministic else "seeds"
        shape = np.shape(rows)
        if len(shape) != 2 or shape[1] != users or (name in deterministic and shape[0] != 1):
            raise InputError(f"values of {name!r} have the shape {shape}: expected ({seeds}, {users} users)")


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted so that any false claim among them stays as rare as the level (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1; none falls below a smaller one's, none exceeds 1.
    """
    order = sorted(p_values, key=lambda name: p_values[name])
    steps = [(len(order) - place) * p_values[name] for place, name in enumerate(order)]
    adjusted = dict(zip(order, np.minimum(1.0, np.maximum.accumulate(steps)).tolist(), strict=True))
    return {name: adjusted[name] for name in p_values}


def detectable_difference(error: float, degrees: float) -> float:
    """Return the smallest true mean difference that would be found with a power of 80 %.

    From its standard error and degrees of freedom, for one comparison: (t_(1 - ALPHA/2) + t_0.8) * error.
    """
    from scipy import stats

    return float((stats.t.ppf(1 - ALPHA / 2, degrees) + stats.t.ppf(0.8, degrees)) * error)


# -- groups of users, coverage and concentration -------------------------------------------------------------


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
    """Divide users by the length of their history: below edges[0], then from each edge to the next."""
    if not edges or list(edges) != sorted(set(edges)) or edges[0] < 1:
        raise InputError(f"parameter 'edges' is {list(edges)}: expected rising interactions from 1")
    middle = [f"{low} to {high - 1}" for low, high in itertools.pairwise(edges)]
    labels = [f"below {edges[0]}", *middle, f"{edges[-1]} or more"]
    return Groups(labels, np.searchsorted(edges, histories.lengths, side="right"))


def by_item_popularity(
    targets: np.ndarray, counts: np.ndarray, shares: Sequence[float] = (0.2, 0.5, 0.8)
) -> Groups:
    """Divide users by how popular the target is in training.

    Items are sorted by descending training interactions `counts` (I,) and divided at the cumulative `shares`
    of all interactions. Items without training interactions are a separate group.
    """
    if list(shares) != sorted(set(shares)) or not all(0 < share < 1 for share in shares):
        raise InputError(f"parameter 'shares' is {list(shares)}: expected rising shares between 0 and 1")
    group = np.searchsorted(np.asarray(shares) * counts.sum(), _before(counts), side="right")
    group[counts == 0] = len(shares) + 1
    bounds = itertools.pairwise([0, *shares, 1])
    labels = [f"items with {low:.0%} to {high:.0%} of interactions" for low, high in bounds]
    return Groups([*labels, "items not in training"], group[targets - 1])


def _before(counts: np.ndarray) -> np.ndarray:
    """Return, for each item (I,), the interactions of all items before it by descending count."""
    order = np.argsort(-counts, kind="stable")
    before = np.empty(len(counts))
    before[order] = np.cumsum(counts[order], dtype=np.float64) - counts[order]
    return before


def by_time_before(histories: Histories, times: np.ndarray) -> Groups:
    """Divide users by whether the target has the time of the item before it.

    `times` (interactions,) are those of `histories.items`, in which the target follows its history.
    """
    is_tied = times[histories.ends] == times[np.maximum(histories.ends - 1, 0)]
    is_tied &= histories.ends > histories.starts
    return Groups(["same time as the item before", "later"], np.where(is_tied, 0, 1))


def by_source(keys: np.ndarray) -> Groups | None:
    """Divide users by what precedes ":" in the raw id of the target; None if not every id has it.

    Catalogues made of several files have such ids (docs/data.md).
    """
    names, colon, _ = np.char.partition(keys, ":").T
    if not (colon == ":").all():
        return None
    labels, member = np.unique(names, return_inverse=True)
    return Groups(labels.tolist(), member)


def in_groups(values: np.ndarray, groups: Groups, samples: int = 2000) -> list[GroupResult]:
    """Return the mean of per-user values (U,) in each group, with its 95 % interval over users."""
    parts = [values[groups.member == place] for place in range(len(groups.labels))]
    intervals = [bootstrap(part, samples) if part.size else None for part in parts]
    return [GroupResult(*row) for row in zip(groups.labels, map(len, parts), intervals, strict=True)]


def coverage(top: np.ndarray, num_items: int) -> float:
    """Return the share of the catalogue that is recommended to any user, from `Ranking.top` (U, k)."""
    return len(np.unique(top)) / num_items


def gini(top: np.ndarray, num_items: int) -> float:
    """Return the Gini index of recommendations (U, k) over items: 0 if equal, near 1 if on few."""
    counts = np.sort(np.bincount(top.ravel(), minlength=num_items + 1)[1:])
    place = np.arange(1, num_items + 1)
    return float(((2 * place - num_items - 1) * counts).sum() / (num_items * counts.sum()))


def concentration(top: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Return coverage, Gini index and head share of recommendations (U, k), by training counts (I,).

    Head items are the fewest that hold half of the training interactions.
    """
    is_head = _before(counts) < 0.5 * counts.sum()
    spread = {"coverage": coverage(top, len(counts)), "gini": gini(top, len(counts))}
    return spread | {"head_share": float(is_head[top - 1].mean())}


def popularity_percentile(top: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return per user (U,) the mean popularity percentile of the items recommended (U, k).

    0 is the item with the fewest training interactions, 1 the one with the most; 0.5 is expected at random.
    """
    from scipy import stats

    percentile = (stats.rankdata(counts) - 1) / max(len(counts) - 1, 1)
    return percentile[top - 1].mean(axis=1)


def shuffled(evaluation: Evaluation, seed: int, keep_last: int = 0) -> Evaluation:
    """Return the evaluation with each history in random order, targets as they are: the shuffle control.

    With `keep_last` that many last items of each history stay in place. A model whose accuracy does not fall
    uses no order (or the data have none); one whose accuracy falls only without `keep_last` uses the last
    items only. The dataset is not modified. See arXiv 2408.12008.
    """
    if keep_last < 0:
        raise InputError(f"parameter 'keep_last' is {keep_last}: expected 0 or more interactions")
    histories, lengths = evaluation.histories, evaluation.histories.lengths
    ends = np.cumsum(lengths)
    row = np.repeat(np.arange(len(lengths)), lengths)
    within = np.arange(len(row)) - np.repeat(ends - lengths, lengths)
    key = np.random.default_rng(seed).random(len(row))
    is_fixed = within >= lengths[row] - keep_last
    key[is_fixed] = 1.0 + within[is_fixed]  # after all others, in their order
    items = histories.items[histories.places()][np.lexsort((key, row))]
    return Evaluation(Histories(items, ends - lengths, ends), evaluation.targets)


# -- the power law of loss against size ----------------------------------------------------------------------
# L(N) = E + A N^-alpha, the form of Kaplan et al. 2020 (arXiv 2001.08361, section 1.2) with the floor E of
# Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3), which Zhang et al. 2023 (arXiv 2311.11351) fit to
# recommendation. For each exponent of a grid E and A are a linear least-squares problem, so the fit needs no
# start and finds the minimum of the grid; both are kept non-negative.
#
# Shapes: S sizes, B bootstrap draws, G exponents of the grid.

EXPONENTS = np.geomspace(0.005, 3.0, 600)  # (G,)
MIN_SIZES = 4  # three parameters are fitted
SAMPLES = 2000  # bootstrap draws


class Law(NamedTuple):
    """Fitted parameters, each a number or an array (B,)."""

    floor: Any  # E, nats: the limit for infinite size
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
    index = np.arange(len(rows)), best
    exponent = EXPONENTS[best]
    law = Law(floor[index], scale[index] * sizes.min() ** exponent, exponent)
    return law if np.ndim(losses) == 2 else Law(*(float(part[0]) for part in law))


def predict(by_size: Mapping[float, Sequence[float]], size: float) -> dict[str, Any]:
    """Fit the law to the losses of each size's seeds, and predict the loss at another size.

    `low` and `high` are the 95 % interval over resampled seeds, None if no size has two seeds. `without_low`
    and `without_high` are the range of predictions with one size left out, None if too few sizes remain. None
    of them includes the noise of the predicted run's seeds.
    """
    sizes = np.array(sorted(by_size))
    means = np.array([np.mean(by_size[n]) for n in sizes])
    law = fit(sizes, means)
    result: dict[str, Any] = {"floor": law.floor, "factor": law.factor, "exponent": law.exponent}
    result |= {"predicted": float(law(size)), "residual": float(np.abs(law(sizes) - means).max())}
    result |= dict.fromkeys(("low", "high", "without_low", "without_high", "exponent_low", "exponent_high"))
    laws = _resampled_laws(by_size)
    if laws is not None:
        result["low"], result["high"] = np.percentile(laws([size]), (2.5, 97.5)).tolist()
        result["exponent_low"], result["exponent_high"] = np.percentile(laws.exponent, (2.5, 97.5)).tolist()
    if len(sizes) > MIN_SIZES:
        predictions = [float(fit(np.delete(sizes, i), np.delete(means, i))(size)) for i in range(len(sizes))]
        result["without_low"], result["without_high"] = min(predictions), max(predictions)
    return result


def band(by_size: Mapping[float, Sequence[float]], sizes: Any) -> np.ndarray | None:
    """Return the 95 % band (2, S) of the law at `sizes`, as `low` and `high` of `predict`, or None."""
    laws = _resampled_laws(by_size) if len(by_size) >= MIN_SIZES else None
    return None if laws is None else np.percentile(laws(sizes), (2.5, 97.5), axis=0)


def _resampled_laws(by_size: Mapping[float, Sequence[float]]) -> Law | None:
    """Return the laws through means of seeds resampled within each size; None if no size has two."""
    sizes = sorted(by_size)
    if max(len(seeds) for seeds in by_size.values()) < 2:
        return None
    rng, means = np.random.default_rng(0), []
    for losses in (np.asarray(by_size[size]) for size in sizes):
        means.append(losses[rng.integers(len(losses), size=(SAMPLES, len(losses)))].mean(1))
    return fit(sizes, np.stack(means, axis=1))


def naive(sizes: Any, losses: Any, size: float) -> dict[str, float]:
    """Return two reference predictions for a law: the largest size's loss, and a straight line in log N.

    `sizes` and `losses` are (S,), smallest first.
    """
    slope, start = np.polyfit(np.log(np.asarray(sizes, dtype=np.float64)), losses, 1)
    return {"last": float(losses[-1]), "line": float(start + slope * np.log(size))}


class AccuracyLaw(NamedTuple):
    """Predictions of the largest size's accuracy from smaller sizes: by a law a - b N^-c, and by a line."""

    size: float  # the largest, N
    law: Law  # of 1 - accuracy: a is 1 - floor, b the factor, c the exponent
    predicted: float  # by the law
    low: float | None  # the 95 % interval of it over resampled seeds, None where no size has two
    high: float | None
    line: float  # by a straight line in log N
    measured: float  # mean over the seeds of the largest size

    @property
    def differs(self) -> bool:
        """Whether law and line are distinguishable: the line lies outside the law's interval."""
        return self.low is not None and self.high is not None and not self.low <= self.line <= self.high


def accuracy_law(by_size: Mapping[float, Sequence[float]]) -> AccuracyLaw | None:
    """Fit the law to 1 - accuracy of each size's seeds, the largest left out; None for too few sizes.

    `by_size` has values from 0 to 1, such as NDCG@10. The law and its interval are those of the loss.
    """
    *sizes, largest = sorted(by_size) or [0.0]
    if len(sizes) < MIN_SIZES:
        return None
    errors = {size: [1 - value for value in by_size[size]] for size in sizes}
    result = predict(errors, largest)
    law = Law(result["floor"], result["factor"], result["exponent"])
    low, high = (None if result[end] is None else 1 - result[end] for end in ("high", "low"))
    means = [float(np.mean(by_size[size])) for size in sizes]
    line = naive(sizes, means, largest)["line"]
    return AccuracyLaw(
        largest, law, 1 - result["predicted"], low, high, line, float(np.mean(by_size[largest]))
    )
