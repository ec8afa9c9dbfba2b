"""Baseline recommenders without gradient descent, evaluated in the same way as the models; counts in a model.

Each is fitted on training histories and yields `metrics.Scores` for an `Evaluation`, a block of users at a
time. Later interactions (the validation item at test) are in the evaluation's histories and are not fitted.
They use scipy, since `implicit` has neither EASE nor a cosine with shrinkage, and `lenskit` needs pandas 2.

Shapes: U users of the training histories, B users at a time, I items; column j is item j + 1.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from reclib.config import InputError
from reclib.data.batches import Samples, whole_sequences
from reclib.data.dataset import Evaluation, Histories
from reclib.data.splits import Split
from reclib.evaluate import metrics
from reclib.evaluate.metrics import Scores

if TYPE_CHECKING:  # scipy is imported in functions: the import takes longer than a small fit
    from scipy import sparse

BLOCK_BYTES = 16 * 2**20  # of similarities computed at a time
EASE_BYTES = 4 * 2**30  # default memory limit of EASE
PAIRS = 2**22  # of items counted at a time


@dataclass(frozen=True)
class Constant:
    """The same scores for every user."""

    values: np.ndarray  # float32 (I,)

    def scores(self, evaluation: Evaluation) -> Scores:
        """Yield (users, scores (B, I))."""
        return metrics.constant_scores(self.values, evaluation)


@dataclass(frozen=True)
class Markov:
    """Smoothed transition shares: (n_ij + a p_j) / (n_i + a) with popularity shares p and a pseudo-counts."""

    transitions: sparse.csr_array  # float32 (I, I): how often column follows row
    popularity: np.ndarray  # float64 (I,), sums to 1
    smoothing: float  # a

    def scores(self, evaluation: Evaluation) -> Scores:
        """Yield (users, scores (B, I)) from each history's last item; popularity for an empty history."""
        items, starts, ends = evaluation.histories
        filled = ends > starts
        last = np.where(filled, items[np.maximum(ends, 1) - 1], 1) - 1
        totals = self.transitions.sum(axis=1)
        for users in metrics.blocks(len(ends), len(self.popularity)):
            known = filled[users][:, None]
            counts = self.transitions[last[users]].toarray() * known
            total = totals[last[users]][:, None] * known
            smoothed = (counts + self.smoothing * self.popularity) / (total + self.smoothing)
            yield users, torch.from_numpy(smoothed.astype(np.float32))


@dataclass(frozen=True)
class Linear:
    """Scores are the sum of the rows of weights of the distinct items of a history."""

    weights: sparse.csr_array | np.ndarray  # float32 (I, I)

    def scores(self, evaluation: Evaluation) -> Scores:
        """Yield (users, scores (B, I)); an empty history scores 0 everywhere."""
        num_items = self.weights.shape[0]
        for users in metrics.blocks(len(evaluation.targets), num_items):
            product = interaction_matrix(evaluation.histories, num_items, users) @ self.weights
            dense = product if isinstance(product, np.ndarray) else product.toarray()
            yield users, torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32))


@dataclass(frozen=True)
class PairwiseCounts:
    """Scores are the weighted sum of the rows of scaled pair counts of the last items of a history.

    The item `age` places before the last one has the weight decay^age. A count is divided by
    (its row's sum)^row_power and (its column's sum)^column_power.
    """

    forward: sparse.csr_array  # float32 (I, I): how often column follows row, by 1 / distance
    backward: float  # weight of a pair in the other direction, in units of the forward one
    row_power: float
    column_power: float
    decay: float
    last: int  # items of a history that are used
    window: int  # largest distance of counted pairs

    @functools.cached_property
    def weights(self) -> sparse.csr_array:
        """The scaled counts, float32 (I, I)."""
        counts, rows, columns = self.both_ways()
        scale = np.repeat(rows, np.diff(counts.indptr)) * columns[counts.indices]
        counts.data = (counts.data * scale).astype(np.float32)
        return counts

    def both_ways(self) -> tuple[sparse.csr_array, np.ndarray, np.ndarray]:
        """Return the counts in both directions (I, I), and factors of their rows (I,) and columns (I,)."""
        counts = (self.forward + np.float32(self.backward) * self.forward.T.tocsr()).tocsr()
        rows, columns = (
            np.maximum(counts.sum(axis=axis, dtype=np.float64), 1e-9) ** -power
            for axis, power in ((1, self.row_power), (0, self.column_power))
        )
        return counts, rows, columns

    def scores(self, evaluation: Evaluation) -> Scores:
        """Yield (users, scores (B, I)); an empty history scores 0 everywhere."""
        from scipy import sparse

        items, starts, ends = evaluation.histories
        num_items = self.forward.shape[0]
        for users in metrics.blocks(len(evaluation.targets), num_items):
            recent = Histories(items, np.maximum(starts[users], ends[users] - self.last), ends[users])
            indptr = np.concatenate(([0], np.cumsum(recent.lengths)))
            age = np.repeat(indptr[1:], recent.lengths) - 1 - np.arange(indptr[-1])
            entries = ((self.decay**age).astype(np.float32), items[recent.places()] - 1, indptr)
            product = sparse.csr_array(entries, shape=(len(users), num_items)) @ self.weights
            yield users, torch.from_numpy(product.toarray())


Recommender: TypeAlias = Constant | Markov | Linear | PairwiseCounts  # their `scores` are of all items


def fit_popularity(histories: Histories, num_items: int) -> Constant:
    """Score items by how often they occur in the training histories."""
    return Constant(metrics.popularity(histories, num_items))


def fit_recent(histories: Histories, num_items: int, last: int = 5) -> Constant:
    """Score items by how often they occur among the last `last` interactions of each training history.

    Uses the order only: the last interactions of different users may be years apart.
    """
    _require("last", last, last >= 1, "at least 1 interaction")
    starts = np.maximum(histories.starts, histories.ends - int(last))
    return fit_popularity(histories._replace(starts=starts), num_items)


def fit_recent_in_time(
    histories: Histories, num_items: int, times: np.ndarray | None, share: float = 0.1
) -> Constant:
    """Score items by how often they occur in the last `share` of the training interactions' time range.

    `times` (num_interactions,) are those of `histories.items`, in any unit. Under leave-one-out the range
    ends with the latest training interaction of any user, so that counts include the future of other users.
    Raises `InputError` without times.
    """
    if times is None:
        raise InputError("popularity by time needs timestamps, and the dataset has an order only: use 'last'")
    _require("share", share, 0 < share <= 1, "a share of the time range above 0 and at most 1")
    places = histories.places()
    stamps = np.asarray(times)[places].astype(np.float64)
    since = stamps.max() - share * np.ptp(stamps)
    items = histories.items[places[stamps >= since]]
    return Constant(np.bincount(items, minlength=num_items + 1)[1:].astype(np.float32))


def fit_markov(histories: Histories, num_items: int, smoothing: float = 10.0) -> Markov:
    """Count which item directly follows which in the training histories.

    `smoothing` is the number of pseudo-transitions of every item, distributed by popularity.
    """
    from scipy import sparse

    _require("smoothing", smoothing, smoothing > 0, "above 0")
    shorter = np.maximum(histories.starts, histories.ends - 1)  # nothing follows the last item of a history
    places = histories._replace(ends=shorter).places()
    pairs = histories.items[places] - 1, histories.items[places + 1] - 1
    counts = sparse.coo_array((np.ones(len(places), dtype=np.float32), pairs), shape=(num_items, num_items))
    popularity = metrics.popularity(histories, num_items).astype(np.float64)
    return Markov(counts.tocsr(), popularity / max(popularity.sum(), 1.0), float(smoothing))


def fit_item_knn(histories: Histories, num_items: int, neighbours: int = 100, shrink: float = 10.0) -> Linear:
    """Keep each item's nearest neighbours by users in common: n_ij / (sqrt(n_i n_j) + shrink).

    A user counts once per item (Deshpande and Karypis, TOIS 2004). Ties are broken by the lower id. Memory is
    bounded by the neighbours and `BLOCK_BYTES`.
    """
    from scipy import sparse

    _require("neighbours", neighbours, neighbours >= 1, "at least 1")
    _require("shrink", shrink, shrink >= 0, "0 or above")
    users = interaction_matrix(histories, num_items)
    by_item = users.T.tocsr()
    norms = np.sqrt(np.diff(by_item.indptr).astype(np.float64))
    matrices = []
    for block in metrics.blocks(num_items, num_items, BLOCK_BYTES):
        common = (by_item[block] @ users).tocsr()
        common.sort_indices()
        row, column = np.repeat(block, np.diff(common.indptr)), common.indices
        near = (common.data / (norms[row] * norms[column] + shrink)).astype(np.float32)
        near[row == column] = 0.0
        nearest = [
            first + np.argsort(-near[first:end], kind="stable")[:neighbours]
            for first, end in itertools.pairwise(common.indptr)
        ]
        best = np.concatenate(nearest)
        best = best[near[best] > 0]
        entries = (near[best], (row[best] - block[0], column[best]))
        matrices.append(sparse.coo_array(entries, shape=(len(block), num_items)).tocsr())
    return Linear(sparse.vstack(matrices, format="csr"))


def ease_bytes(num_items: int) -> int:
    """Return the memory that EASE needs: a matrix of doubles and one in single precision."""
    return 12 * num_items**2


def fit_ease(
    histories: Histories, num_items: int, regularisation: float = 100.0, memory_bytes: int = EASE_BYTES
) -> Linear:
    """Solve for the item-to-item weights, zero on the diagonal, that best reconstruct every history.

    See Steck, WWW 2019 (arXiv 1905.03375). With P the inverse of X'X + lambda I they are -P_ij / P_jj off the
    diagonal. A matrix of doubles is inverted in place; with the result in single precision that takes 12
    bytes for each pair of items. Raises `InputError` above `memory_bytes`.
    """
    from scipy import linalg

    _require("regularisation", regularisation, regularisation > 0, "above 0")
    needed = ease_bytes(num_items)
    if needed > memory_bytes:
        raise InputError(
            f"EASE on {num_items:,} items needs {needed / 2**30:.1f} GiB, parameter 'memory_bytes' allows "
            f"{memory_bytes / 2**30:.1f} GiB: raise it, or leave EASE out for this catalogue"
        )
    users = interaction_matrix(histories, num_items)
    by_item = users.T.tocsr()
    gram = np.empty((num_items, num_items))
    for block in metrics.blocks(num_items, num_items, BLOCK_BYTES):
        gram[block] = (by_item[block] @ users).toarray()
    gram[np.diag_indices(num_items)] += regularisation
    # The transpose is the same symmetric matrix in the order that LAPACK can overwrite.
    factor, failed = linalg.lapack.dpotrf(gram.T, lower=1, overwrite_a=1)
    inverse, not_inverted = linalg.lapack.dpotri(factor, lower=1, overwrite_c=1)
    if failed or not_inverted:
        raise InputError(f"EASE cannot be solved with regularisation={regularisation}: raise it")
    weights = np.empty(inverse.shape, dtype=np.float32)
    for item, column in enumerate(inverse.T):  # only the lower triangle is filled
        weights[item, item:] = weights[item:, item] = column[item:]
    weights /= -np.diag(weights)  # each column by its own
    weights[np.diag_indices(num_items)] = 0.0
    return Linear(weights)


def fit_pairwise_counts(
    histories: Histories,
    num_items: int,
    window: int = 10,
    backward: float = 0.5,
    row_power: float = 0.5,
    column_power: float = 0.3,
    decay: float = 0.8,
    last: int = 20,
) -> PairwiseCounts:
    """Count every pair of items at most `window` places apart in the training histories, by 1 / distance.

    Sequential rules (Ludewig and Jannach, UMUAI 2018, arXiv 1803.09587). `backward` is the weight of a pair
    whose second item predicts the first. Memory is bounded by the pairs of items that occur and by `PAIRS`.
    """
    from scipy import sparse

    _require("window", window, window >= 1, "at least 1 place")
    _require("backward", backward, backward >= 0, "0 or above")
    _require("decay", decay, 0 < decay <= 1, "above 0 and at most 1")
    _require("last", last, last >= 1, "at least 1 interaction")
    items = histories.items[histories.places()] - 1
    row = np.repeat(np.arange(len(histories.starts)), histories.lengths)
    shape = (num_items, num_items)
    counts = sparse.csr_array(shape, dtype=np.float32)
    size = max(1, PAIRS // window)
    for start in range(0, len(items), size):
        parts = []
        for distance in range(1, window + 1):
            first = np.arange(start, min(start + size, len(items) - distance))
            first = first[row[first] == row[first + distance]]
            weight = np.full(len(first), 1 / distance, dtype=np.float32)
            parts.append((weight, items[first], items[first + distance]))
        weight, rows, columns = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        counts = counts + sparse.coo_array((weight, (rows, columns)), shape=shape).tocsr()
    settings = (float(backward), float(row_power), float(column_power), float(decay), int(last), int(window))
    return PairwiseCounts(counts, *settings)


class Family(NamedTuple):
    """A kind of baseline and its grid of hyperparameters."""

    fit: Callable[..., Recommender]  # (histories, num_items, **hyperparameters)
    grid: Mapping[str, Sequence[Any]]
    at_scoring: Sequence[str] = ()  # hyperparameters that need no new fit: fields of the recommender
    by_turns: bool = False  # search one hyperparameter after another instead of every combination
    valid_users: int | None = None  # number of validation users that are drawn for the search; None: all
    refitted: bool = False  # also fitted with the validation items


PAIRWISE_GRID: dict[str, Sequence[Any]] = {
    "window": (10, 50),
    "backward": (0.5, 0.0, 0.2, 1.0),
    "row_power": (0.5, 0.0, 1.0),
    "column_power": (0.3, 0.0, 0.5, 0.7),
    "decay": (0.8, 0.3, 0.5, 0.95),
}


def families(times: np.ndarray | None = None) -> dict[str, Family]:
    """Return the baselines by name; popularity by time only where `times` beside the items are known."""
    baselines = {
        "popularity": Family(fit_popularity, {}),
        "recent_popularity": Family(fit_recent, {"last": (1, 2, 5, 10, 20, 50)}),
        # Below about a hundred, popularity only breaks ties of the transitions.
        "markov": Family(fit_markov, {"smoothing": (1.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)}),
        "item_knn": Family(fit_item_knn, {"neighbours": (2, 5, 10, 30, 100), "shrink": (0.0, 10.0, 100.0)}),
        "ease": Family(fit_ease, {"regularisation": (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)}),
        "pairwise_counts": Family(
            fit_pairwise_counts, PAIRWISE_GRID, tuple(PAIRWISE_GRID)[1:], True, 10_000, True
        ),
    }
    if times is not None:
        by_time = functools.partial(fit_recent_in_time, times=times)
        baselines["recent_popularity_in_time"] = Family(by_time, {"share": (0.003, 0.01, 0.03, 0.1, 0.3)})
    return baselines


class Choice(NamedTuple):
    """The result of a search on validation."""

    chosen: dict[str, Any]  # the best hyperparameters; empty for a family without any
    tried: list[dict[str, Any]]  # a row for each combination: hyperparameters and validation metrics
    recommender: Recommender  # fitted with `chosen`


def choose(family: Family, histories: Histories, num_items: int, valid: Evaluation) -> Choice:
    """Fit the combinations of the family's grid on `histories` and return the best by NDCG@10 on validation.

    Of equal ones the first is chosen. A search by turns starts from the first value of each hyperparameter
    and optimises one after another, twice. The test split is not used.
    """
    if not all(family.grid.values()):
        raise InputError("a grid has a hyperparameter without values: give at least one")
    if family.valid_users is not None and family.valid_users < len(valid.targets):
        drawn = np.random.default_rng(0).choice(len(valid.targets), family.valid_users, replace=False)
        valid = valid.rows(drawn)
    rounds = (
        [{name: values} for name, values in family.grid.items()] * 2 if family.by_turns else [family.grid]
    )
    chosen = {name: values[0] for name, values in family.grid.items()}
    tried: list[dict[str, Any]] = []
    fits: dict[tuple[Any, ...], Any] = {}  # of a family with hyperparameters that need no other fit
    highest, best = -math.inf, None
    for grid in rounds:
        around = chosen
        for values in itertools.product(*grid.values()):
            settings = around | dict(zip(grid, values, strict=True))
            if any(row.items() >= settings.items() for row in tried):
                continue
            key = tuple(value for name, value in settings.items() if name not in family.at_scoring)
            scoring = {name: settings[name] for name in family.at_scoring}
            fitted = (
                replace(fits[key], **scoring) if key in fits else family.fit(histories, num_items, **settings)
            )
            if scoring:
                fits.setdefault(key, fitted)
            scored = metrics.summary(metrics.rank(fitted.scores(valid), valid, remove_seen=True).ranks)
            tried.append(settings | scored)
            if scored["ndcg@10"] > highest:
                highest, chosen, best = scored["ndcg@10"], settings, fitted
    assert best is not None
    return Choice(chosen, tried, best)


def interaction_matrix(
    histories: Histories, num_items: int, users: np.ndarray | None = None
) -> sparse.csr_array:
    """Return interactions as a float32 matrix (rows, I) of 0 and 1; repetitions count once."""
    from scipy import sparse

    chosen = histories if users is None else histories.rows(users)
    columns = chosen.items[chosen.places()] - 1
    indptr = np.concatenate(([0], np.cumsum(chosen.lengths)))
    ones = np.ones(len(columns), dtype=np.float32)
    matrix = sparse.csr_array((ones, columns, indptr), shape=(len(chosen.starts), num_items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _require(name: str, value: float, valid: bool, allowed: str) -> None:
    if not valid:
        raise InputError(f"parameter {name!r} is {value!r}: expected {allowed}")


# -- pairwise counts as a part of a model --------------------------------------------------------------------
#
# Their log is added to the model's logits with a learned scale:
#
#     logit(j | h) = network(j | h) + scale * log(1 + score(j | h) / floor)
#
# `score` is that of `PairwiseCounts`. It is 0 for most items, so that the prior is sparse. Network and scale
# are trained together. With scale 0 the model equals the network.
#
# In training the counts would contain the answer, since a user's history was counted as well. That history's
# contribution is therefore subtracted from its scores.
#
# Shapes: T items of all sequences, M queries, I real items, N scored (query, item) pairs.

FLOOR_USERS = 500  # validation histories whose scores determine `floor`
ROUNDING = 1e-4  # smaller values are rounding errors of a subtracted count
PRIOR_TENSORS = ("indptr", "indices", "data", "row_scale", "column_scale", "settings")


class Entries(NamedTuple):
    """A sparse matrix (M, I), ordered by row."""

    rows: np.ndarray  # int64 (N,)
    columns: np.ndarray  # int64 (N,): item id - 1
    values: np.ndarray  # float32 (N,)


class CountPrior(nn.Module):
    """Pairwise counts as a part of a model."""

    settings: Tensor  # backward, decay, last, window, floor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Use the tensors of `from_counts`, or those of a checkpoint under the same names."""
        super().__init__()
        self.scale = nn.Parameter(tensors["scale"].detach().clone())  # ()
        for name in PRIOR_TENSORS:
            self.register_buffer(name, tensors[name])
        self._numpy: tuple[sparse.csr_array, np.ndarray, np.ndarray] | None = None

    @classmethod
    def from_counts(cls, counts: PairwiseCounts, floor: float) -> CountPrior:
        """Return a prior of fitted counts; `floor` is the score at which it is log 2."""
        pairs, rows, columns = counts.both_ways()
        settings = [counts.backward, counts.decay, counts.last, counts.window, floor]
        arrays = {
            "indptr": pairs.indptr.astype(np.int64),
            "indices": pairs.indices.astype(np.int32),
            "data": pairs.data.astype(np.float32),
            "row_scale": rows.astype(np.float32),
            "column_scale": columns.astype(np.float32),
            "settings": np.array(settings, dtype=np.float64),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        return cls(tensors | {"scale": torch.ones(())})

    @classmethod
    def chosen(cls, split: Split, num_items: int) -> CountPrior:
        """Count the training histories, with the settings and the floor that validation chooses."""
        choice = choose(families()["pairwise_counts"], split.train, num_items, split.valid)
        counts: PairwiseCounts = choice.recommender  # type: ignore[assignment]
        drawn = np.random.default_rng(0).permutation(len(split.valid.targets))[:FLOOR_USERS]
        positive = [scores[scores > 0] for _, scores in counts.scores(split.valid.rows(drawn))]
        values = torch.cat(positive).numpy() if positive else np.ones(1)
        return cls.from_counts(counts, float(np.median(values)) if len(values) else 1.0)

    def counted_anew(self, counts: PairwiseCounts) -> CountPrior:
        """Return a prior of other (newer) counts with this one's scale and floor, without training."""
        prior = CountPrior.from_counts(counts, float(self.settings[-1]))
        prior.scale.data.copy_(self.scale.data)
        return prior

    def _apply(self, fn: Any, recurse: bool = True) -> CountPrior:
        self._numpy = None
        return super()._apply(fn, recurse)

    def arrays(self) -> tuple[sparse.csr_array, np.ndarray, np.ndarray]:
        """Return the scaled counts (I, I), and the scales of rows (I,) and columns (I,)."""
        if self._numpy is None:
            from scipy import sparse

            tensors = (getattr(self, name).cpu().numpy() for name in PRIOR_TENSORS[:5])
            indptr, indices, data, rows, columns = tensors
            scaled = data * np.repeat(rows, np.diff(indptr)) * columns[indices]
            matrix = sparse.csr_array((scaled, indices, indptr), shape=(len(rows), len(rows)))
            self._numpy = matrix, rows, columns
        return self._numpy

    def entries(
        self, tokens: np.ndarray, lengths: np.ndarray, sequence: np.ndarray, known: np.ndarray
    ) -> Entries:
        """Return the prior of queries, before its scale.

        `tokens` (T,) are the concatenated sequences of `lengths` (B,). Query m predicts the item after the
        first `known[m]` items of sequence `sequence[m]`.
        """
        from scipy import sparse

        weights, row_scale, _ = self.arrays()
        _, decay, last, _, floor = self.settings.tolist()
        items, num_items = tokens.astype(np.int64) - 1, len(row_scale)
        starts = np.cumsum(lengths) - lengths
        age = np.arange(int(last))
        query, age = np.nonzero(age < known[:, None])  # every item that counts, newest first
        place = starts[sequence[query]] + known[query] - 1 - age
        weight = (decay**age).astype(np.float32)
        scores = sparse.csr_array((weight, (query, items[place])), shape=(len(known), num_items)) @ weights
        # One row for each item of each sequence: a repeated pair was counted repeatedly.
        token_sequence = np.repeat(np.arange(len(lengths)), lengths)
        keys, local = np.unique(token_sequence * num_items + items, return_inverse=True)
        occurrences = sparse.csr_array((weight, (query, local[place])), shape=(len(known), len(keys)))
        scores = (scores - occurrences @ self._added(items, token_sequence, local, len(keys))).tocsr()
        scores.sort_indices()
        values = np.log1p(np.maximum(scores.data, 0) / np.float32(floor))
        rows = np.repeat(np.arange(len(known)), np.diff(scores.indptr))
        large = values > ROUNDING
        return Entries(rows[large], scores.indices[large].astype(np.int64), values[large].astype(np.float32))

    def _added(
        self, items: np.ndarray, sequence: np.ndarray, local: np.ndarray, rows: int
    ) -> sparse.csr_array:
        """Return the contribution of the sequences themselves to the scaled counts of their items, (rows, I).

        `items` (T,) from 0, `sequence` (T,) the number of each item's sequence, `local` (T,) its row.
        """
        from scipy import sparse

        _, row_scale, column_scale = self.arrays()
        backward, _, _, window, _ = self.settings.tolist()
        near = [np.flatnonzero(sequence[d:] == sequence[:-d]) for d in range(1, int(window) + 1)]
        first = np.concatenate(near)
        distance = np.repeat(np.arange(1, len(near) + 1), [len(part) for part in near])
        second, forward = first + distance, 1 / distance
        value = np.concatenate((forward, backward * forward))
        row, column = np.concatenate((first, second)), np.concatenate((second, first))
        value = (value * row_scale[items[row]] * column_scale[items[column]]).astype(np.float32)
        return sparse.csr_array((value, (local[row], items[column])), shape=(rows, len(row_scale)))

    def for_samples(self, samples: Samples, causal: bool, order: np.ndarray) -> Entries:
        """Return the prior of the targets of samples, in `order` (M,)."""
        tokens, lengths, sequence, known = whole_sequences(samples, causal)
        return self.entries(tokens, lengths, sequence[order], known[order])

    def for_histories(self, histories: Histories, users: np.ndarray) -> Entries:
        """Return the prior of the next item after the histories of `users`."""
        chosen = histories.rows(users)
        tokens = chosen.items[chosen.places()]
        return self.entries(tokens, chosen.lengths, np.arange(len(users)), chosen.lengths)

    @torch.no_grad()
    def add_to(self, scores: Tensor, histories: Histories, users: np.ndarray) -> None:
        """Add the scaled prior of `users` to their scores (B, I), in place."""
        rows, columns, values = (
            torch.from_numpy(a).to(scores.device) for a in self.for_histories(histories, users)
        )
        scores.view(-1).index_add_(0, rows * scores.shape[1] + columns, values * self.scale.to(values.device))
