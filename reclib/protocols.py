"""One trained model under several evaluation protocols: how far the choice of protocol alone moves a metric.

Every result carries a label that says what it is. Only a full ranking of the catalogue is comparable with
another study's; a rank among sampled candidates is not (Krichene and Rendle, KDD 2020; arXiv 2107.13045), and
the metric of the study that this one started from is not next-item prediction at all.

Ties are pessimistic and NaN ranks last everywhere, as in `metrics`.

Shapes: B users at a time, I items, N candidates, P masked positions, V rows of the output table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reclib import metrics
from reclib.batching import Batch, Layout
from reclib.config import InputError
from reclib.data import Evaluation, Histories
from reclib.metrics import Interval, Scores
from reclib.model import Bert4Rec
from reclib.samples import Samples, cut
from reclib.splits import Split

NOT_COMPARABLE = "sampled, not comparable"
SEED_LABEL = "all masked positions: the seed study's metric, not next-item prediction, not comparable"

# A trained model: `metrics.model_scores` with all else given, or a baseline's `scores`.
Scorer = Callable[[Evaluation], Scores]


class Outcome(NamedTuple):
    """Ranks under one protocol, and what they are."""

    protocol: str  # short name, for tables and parameters
    label: str  # what a reader must know, for figures
    comparable: bool  # whether other studies' figures under the same label may stand beside it
    ranks: np.ndarray  # int64 (rows,): 1 is best
    users: np.ndarray  # int64 (rows,): the evaluation's row that each rank belongs to


def mean(outcome: Outcome, metric: str = "hr@10") -> float:
    """Return a metric's mean over the outcome's ranks: users, or masked positions."""
    return float(_values(outcome, metric).mean())


def interval(outcome: Outcome, metric: str = "hr@10", samples: int = 2000, seed: int = 0) -> Interval:
    """Return a metric's mean with its 95 % interval over resampled users."""
    return interval_over_users(_values(outcome, metric), outcome.users, samples, seed)


def interval_over_users(values: np.ndarray, users: np.ndarray, samples: int, seed: int = 0) -> Interval:
    """Return the mean of `values` (rows,), which belong to `users` (rows,), with its 95 % interval.

    Masked positions of one user are not independent: users are drawn with all of theirs.
    """
    _, user = np.unique(users, return_inverse=True)
    counts = np.bincount(user).astype(np.float64)
    if (counts == 1).all():
        return metrics.bootstrap(values, samples, seed)
    sums = np.bincount(user, values)
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    from scipy import stats

    found = stats.bootstrap(
        (sums, counts),
        lambda total, number, axis=-1: total.sum(axis) / number.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=samples,
        batch=100,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return Interval(float(values.mean()), float(found.low), float(found.high))


def side_by_side(
    score: Scorer,
    evaluation: Evaluation,
    candidates: Mapping[str, np.ndarray] | None = None,
    split: str = "leave-one-out",
) -> list[Outcome]:
    """Rank the same scores in each way: fully, seen items removed and kept, and among candidates.

    `candidates` gives the negatives (rows, N) of `splits.sample_candidates` by how they were drawn, "uniform"
    or "popularity". The model is asked once, so that nothing but the protocol differs.
    """
    candidates = dict(candidates or {})
    for how, negatives in candidates.items():
        _check(negatives, evaluation, how)
    users: list[np.ndarray] = []
    ranks: dict[str, list[Tensor]] = {name: [] for name in ("removed", "kept", *candidates)}
    for chosen, scores in score(evaluation):
        targets = torch.as_tensor(evaluation.targets[chosen].astype(np.int64), device=scores.device)
        users.append(chosen)
        for how, negatives in candidates.items():
            drawn = torch.as_tensor(negatives[chosen].astype(np.int64), device=scores.device)
            ranks[how].append(rank_among(scores, targets, drawn))
        ranks["kept"].append(metrics.rank_scores(scores, targets, None)[0])
        seen = metrics.seen_items(evaluation.histories, chosen, scores.device)
        ranks["removed"].append(metrics.rank_scores(scores, targets, seen)[0])  # last: it overwrites scores
    order = np.argsort(np.concatenate(users), kind="stable")
    rows = np.arange(len(order))
    found = []
    for name, parts in ranks.items():
        protocol, label, comparable = _describe(split, name, candidates)
        found.append(Outcome(protocol, label, comparable, torch.cat(parts).cpu().numpy()[order], rows))
    return found


def _describe(split: str, name: str, candidates: Mapping[str, np.ndarray]) -> tuple[str, str, bool]:
    """Return short name, label and comparability of a way to rank under a split."""
    if name in candidates:
        count = candidates[name].shape[1]
        return (
            f"{split}, {count} {name}",
            f"{split}, target among {count} {name} negatives: {NOT_COMPARABLE}",
            False,
        )
    return f"{split}, seen {name}", f"{split}, full ranking, seen items {name}", True


def _check(negatives: np.ndarray, evaluation: Evaluation, how: str) -> None:
    """Refuse candidates that are not of this evaluation."""
    rows = len(evaluation.targets)
    if negatives.ndim != 2 or len(negatives) != rows:
        raise InputError(
            f"{how} candidates have the shape {negatives.shape}: expected ({rows}, count), a row a user"
        )
    if negatives.size and int(negatives.min()) < 1:
        raise InputError(
            f"{how} candidates hold the item {int(negatives.min())}: expected ids from 1, no PAD"
        )
    wrong = (negatives == evaluation.targets[:, None]).any(axis=1)
    if wrong.any():
        raise InputError(
            f"{how} candidates of row {int(np.argmax(wrong))} hold its target: expected negatives"
        )


def rank_among(scores: Tensor, targets: Tensor, candidates: Tensor) -> Tensor:
    """Return the ranks (B,) of targets (B,) among candidates (B, N) by `scores` (B, I), from 1 to N + 1."""
    own = scores.gather(1, (targets - 1)[:, None])
    rivals = (scores.gather(1, candidates - 1) >= own).sum(1)
    return torch.where(own.squeeze(1).isnan(), candidates.shape[1], rivals) + 1


def expected_sampled_hit(ranks: np.ndarray, pool: np.ndarray | int, count: int, k: int = 10) -> np.ndarray:
    """Return the expected HR@k (rows,) among `count` uniform negatives for targets of these full ranks.

    `pool` is the number of items that negatives are drawn from without replacement: the catalogue less the
    target and what the user has had. Of them rank - 1 stand before the target, so the number drawn is
    hypergeometric, and there is a hit when it is below k. `ranks` are those with seen items removed.
    """
    from scipy import stats

    return stats.hypergeom.cdf(k - 1, pool, np.asarray(ranks) - 1, count)


def under_split(score: Scorer, split: Split, remove_seen: bool = True) -> Outcome:
    """Rank the test targets of a split that the model was trained under, fully.

    A global time split or a random-user split is another training: hand in the model of that training.
    """
    ranks = metrics.rank(score(split.test), split.test, remove_seen).ranks
    protocol, label, comparable = _describe(split.name, "removed" if remove_seen else "kept", {})
    return Outcome(protocol, label, comparable, ranks, np.arange(len(ranks)))


@torch.no_grad()
def masked_positions(
    model: Bert4Rec,
    evaluation: Evaluation,
    device: torch.device,
    mask_prob: float = 0.15,
    seed: int = 0,
    special_tokens: bool = True,
    batch_size: int = 256,
) -> Outcome:
    """Rank the item at every masked position, as the seed study's evaluation does; one rank a position.

    A window is the last max_len items of history and target together. Its last item is masked always, the
    item d places before it, in a window of n, with mask_prob * (0.8 + 0.4 * (1 - d / n)). All positions count
    alike, so that long histories count more; the random ones are predicted with context on both sides, the
    last one with gaps in its context. All rows of the output table compete, PAD and (where it has one) MASK
    included, and seen items stay.

    It is the seed study's protocol when the evaluation's users were not trained on (`splits.random_users`).
    What deviates: masks are drawn once from `seed` and not at each evaluation; ties and NaN count against
    the target, where the original takes what `topk` gives; windows are of the model's own max_len (50 there)
    and rows packed, padding on the left there. `special_tokens` False leaves PAD and MASK out.
    """
    config = model.config
    if config.causal:
        raise InputError("every-masked-position needs a model that reads both sides; this one is causal")
    was_training = model.training
    model.eval()
    layout = Layout(config.max_len, config.mask_id, config.position_origin, True, 16)
    ranks, users = [], []
    for chosen, samples in _windows(evaluation, config.max_len, mask_prob, seed, batch_size):
        rows, places = layout.place(samples.lengths[None])
        batch = layout.batch(samples, rows[0], places[0])
        ranks.append(_ranks_at_masks(model, batch.to(device), special_tokens))
        # Positions are ranked in the order of rows: by row, then by place in it.
        order = np.argsort(rows[0] * config.max_len + places[0], kind="stable")
        masked = np.add.reduceat(samples.is_target, np.cumsum(samples.lengths) - samples.lengths, dtype=int)
        users.append(np.repeat(chosen[order], masked[order]))
    model.train(was_training)
    label = SEED_LABEL if special_tokens else f"{SEED_LABEL}, PAD and MASK left out"
    return Outcome("seed study's", label, False, np.concatenate(ranks), np.concatenate(users))


def _windows(
    evaluation: Evaluation, max_len: int, mask_prob: float, seed: int, batch_size: int
) -> Iterator[tuple[np.ndarray, Samples]]:
    """Yield (users, samples) of windows that end with the target, masks drawn."""
    joined = with_target(evaluation)
    rng = np.random.default_rng(seed)
    for first in range(0, len(joined.starts), batch_size):
        users = np.arange(first, min(first + batch_size, len(joined.starts)))
        samples = cut(joined, users, max_len, None)
        drawn = rng.random(len(samples.tokens)) < seed_mask_probability(samples.lengths, mask_prob)
        yield users, samples._replace(is_target=drawn)


def seed_mask_probability(lengths: np.ndarray, mask_prob: float) -> np.ndarray:
    """Return how likely each item of windows of these lengths (B,) is masked; 1 for the last of each."""
    n = np.repeat(lengths, lengths)
    distance = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(lengths.sum())
    return np.where(distance == 0, 1.0, mask_prob * (0.8 + 0.4 * (1 - distance / n)))


def with_target(evaluation: Evaluation) -> Histories:
    """Return histories, copied, that go on to their target."""
    old = evaluation.histories
    lengths = old.lengths
    ends = np.cumsum(lengths + 1)
    items = np.empty(ends[-1], dtype=old.items.dtype)
    last = np.zeros(len(items), dtype=bool)
    last[ends - 1] = True
    items[~last] = old.items[old.places()]
    items[last] = evaluation.targets
    return Histories(items, ends - lengths - 1, ends)


def _ranks_at_masks(model: Bert4Rec, batch: Batch, special_tokens: bool) -> np.ndarray:
    """Return the rank (P,) of the item at each masked place among the rows of the output table."""
    rows = (batch.items, batch.segment_ids, batch.positions, batch.query_index)
    slots = batch.target_slots[: batch.num_targets]
    hidden = model.head_input(model.encode(*rows).flatten(0, 1)[slots])
    part = slice(None) if special_tokens else slice(1, model.config.num_items + 1)
    weight = model.output_weight[part]
    bias = None if model.output_bias is None else model.output_bias[part]
    targets = batch.targets[: batch.num_targets] + int(
        special_tokens
    )  # columns from 1, as `rank_scores` counts
    size = max(1, metrics.SCORE_BYTES // (4 * len(weight)))
    found = [
        metrics.rank_scores(
            F.linear(hidden[first : first + size], weight, bias).float(), targets[first : first + size], None
        )[0]
        for first in range(0, len(hidden), size)
    ]
    return torch.cat(found).cpu().numpy()


def _values(outcome: Outcome, metric: str) -> np.ndarray:
    values = metrics.per_user(outcome.ranks)
    if metric not in values:
        raise InputError(f"parameter 'metric' is {metric!r}: expected one of {', '.join(values)}")
    return values[metric]
