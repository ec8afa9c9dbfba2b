"""Full ranking of all real items, metrics of the ranks, and other evaluation protocols.

Users are scored and ranked in blocks, so that memory is bounded (`pass_sizes`). Scores are fp32 whatever the
precision of the encoder: rounded to 16 bits, many would be equal. Ties are pessimistic (items with the
target's score rank before it), a target with the score NaN ranks last, and PAD and MASK are no candidates.
Metrics have one value per user, for paired comparisons.

Shapes: B users at a time, I real items, k recommendations, N candidates, P masked positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reclib.config import InputError, ModelConfig
from reclib.data.batches import Batch, Layout, Samples, cut, item_counts, next_item_batches, prefetch, send
from reclib.data.dataset import Dataset, Evaluation, Histories, evaluation
from reclib.data.splits import Split
from reclib.model.bert4rec import Bert4Rec

USERS, SCORE_BYTES = 256, 64 * 2**20  # users encoded, and bytes of scores computed at a time on a CPU
LARGE_SCORE_BYTES, MANY_USERS = 2**30, 4096  # upper limits of both on a GPU
SHARE = 32  # scores and encoder states each take at most 1 / SHARE of a GPU's memory
ROWS_IN_CACHE = 8  # users counted at a time on a CPU
BLOCK = 64  # items per block in the search for the best k
KS = (1, 5, 10, 20)

Scores = Iterator[tuple[np.ndarray, Tensor]]  # users (B,) and their scores (B, I); column j is item j + 1
Scorer = Callable[[Evaluation], Scores]  # `model_scores` of a model, or a baseline's `scores`


class Ranking(NamedTuple):
    """Ranks of the targets, and the best items."""

    ranks: np.ndarray  # int64 (U,) in the evaluation's order: 1 is best
    top: np.ndarray | None  # int64 (U, k) item ids, best first
    losses: np.ndarray | None = None  # float32 (U,) cross-entropy of each target, in nats


def rank(
    scores: Scores, evaluation: Evaluation, *, remove_seen: bool, top_k: int = 0, with_losses: bool = False
) -> Ranking:
    """Rank every user's target among the scores that `scores` yields.

    With `remove_seen` the items of a user's history are no candidates; `top_k` best items are returned.
    `with_losses` adds each target's cross-entropy in nats, with the softmax over all items, seen ones
    included; the scores must be logits. Raises `InputError` without targets.
    """
    if not len(evaluation.targets):
        raise InputError("there are no targets to rank: leave-one-out needs a user with three interactions")
    users, ranks, tops, losses = [], [], [], []
    for rows, values in scores:
        arrays = [torch.from_numpy(evaluation.targets[rows].astype(np.int64))]
        arrays += seen_items(evaluation.histories, rows, torch.device("cpu")) if remove_seen else ()
        targets, *seen = send(arrays, values.device)
        if with_losses:  # before the scores are overwritten
            target_scores = values.gather(1, (targets - 1)[:, None]).squeeze(1)
            losses.append(values.logsumexp(1) - target_scores)
        row_ranks, top = rank_scores(values, targets, seen or None, top_k)
        users.append(rows)
        ranks.append(row_ranks)
        tops.append(top)
    order = np.argsort(np.concatenate(users), kind="stable")
    best_items = torch.cat(tops).cpu().numpy()[order] if top_k else None  # type: ignore[arg-type]
    nats = torch.cat(losses).cpu().numpy()[order] if with_losses else None
    return Ranking(torch.cat(ranks).cpu().numpy()[order], best_items, nats)


def rank_scores(
    scores: Tensor, targets: Tensor, seen: Sequence[Tensor] | None, top_k: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Rank targets (B,) among the columns of `scores` (B, I), which is overwritten.

    `seen` is (row, item id) of the items that may not be recommended; a target is never removed. Returns
    ranks (B,) from 1 and, for `top_k` > 0, the ids (B, k) of the best items.
    """
    column = (targets - 1)[:, None]
    threshold = scores.gather(1, column)
    if seen is not None:  # comparisons with NaN are false, also for a threshold of -inf
        scores[seen[0], seen[1] - 1] = float("nan")
        scores.scatter_(1, column, threshold)
    rivals = count_at_least(scores, threshold) - 1  # the target itself is counted
    if seen is not None and top_k:
        scores[seen[0], seen[1] - 1] = float("-inf")
        scores.scatter_(1, column, threshold)
    ranks = torch.where(threshold.squeeze(1).isnan(), scores.shape[1], rivals + 1)
    return ranks, (best(scores, top_k) + 1 if top_k else None)


def rank_among(scores: Tensor, targets: Tensor, candidates: Tensor) -> Tensor:
    """Return the ranks (B,) of targets (B,) among candidates (B, N) by `scores` (B, I), from 1 to N + 1."""
    threshold = scores.gather(1, (targets - 1)[:, None])
    rivals = (scores.gather(1, candidates - 1) >= threshold).sum(1)
    return torch.where(threshold.squeeze(1).isnan(), candidates.shape[1], rivals) + 1


def count_at_least(scores: Tensor, threshold: Tensor) -> Tensor:
    """Return (B,) how many scores (B, I) of each row reach its threshold (B, 1).

    A CPU sums floats several times faster than booleans; the sum is exact below 2^24 items.
    """
    if scores.device.type != "cpu" or scores.shape[1] >= 1 << 24:
        return (scores >= threshold).sum(1)
    reached = torch.empty(min(len(scores), ROWS_IN_CACHE), scores.shape[1])
    blocks = zip(scores.split(ROWS_IN_CACHE), threshold.split(ROWS_IN_CACHE), strict=True)
    counts = [torch.ge(block, limit, out=reached[: len(block)]).sum(1) for block, limit in blocks]
    return torch.cat(counts).long()


def best(scores: Tensor, k: int) -> Tensor:
    """Return the columns (B, k) of the k largest of each row, best first; NaN counts as -inf.

    Only the k blocks with the largest maxima are searched, which contain the k largest.
    """
    B, I = scores.shape  # noqa: E741
    k, low = min(k, I), float("-inf")
    end = I // BLOCK * BLOCK
    if end <= k * BLOCK * 2:
        return scores.nan_to_num(nan=low, neginf=low).topk(k).indices
    maxima = scores[:, :end].unflatten(1, (-1, BLOCK)).amax(2)
    chosen = maxima.nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=low).topk(k).indices  # (B, k)
    columns = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    tail = torch.arange(end, I, device=scores.device).expand(B, -1)
    columns = torch.cat((columns, tail), 1)
    values = scores.gather(1, columns).nan_to_num_(nan=low, neginf=low)
    return columns.gather(1, values.topk(k).indices)


def seen_items(histories: Histories, users: np.ndarray, device: torch.device) -> list[Tensor]:
    """Return (row, item id) of all items in the histories of `users`; row i is users[i]."""
    part = histories.rows(users)
    items = histories.items[part.places()].astype(np.int64)
    rows = np.repeat(np.arange(len(users)), part.lengths)
    return send((torch.from_numpy(rows), torch.from_numpy(items)), device)


# -- scores --------------------------------------------------------------------------------------------------


def constant_scores(values: np.ndarray, evaluation: Evaluation) -> Scores:
    """Yield the same scores (I,) for every user, for example popularity."""
    row = torch.from_numpy(np.asarray(values, dtype=np.float32))
    for users in blocks(len(evaluation.targets), len(values)):
        yield users, row.expand(len(users), -1).clone()


def blocks(rows: int, columns: int, limit_bytes: int | None = None) -> Iterator[np.ndarray]:
    """Yield blocks of row numbers; fp32 rows of a block stay within the limit, by default `SCORE_BYTES`."""
    size = max(1, (limit_bytes or SCORE_BYTES) // (4 * columns))
    for first in range(0, rows, size):
        yield np.arange(first, min(first + size, rows))


def popularity(histories: Histories, num_items: int) -> np.ndarray:
    """Return how often each item 1..num_items occurs in the histories, as scores (I,)."""
    return item_counts(histories, num_items)[1:].astype(np.float32)


def pass_sizes(config: ModelConfig, memory_bytes: int | None) -> tuple[int, int]:
    """Return how many users are encoded, and how many bytes of scores computed, at a time.

    `memory_bytes` is a GPU's memory; None for a CPU, whose caches hold small blocks.
    """
    if memory_bytes is None:
        return USERS, SCORE_BYTES
    share = memory_bytes // SHARE
    # A layer in fp32: its input, two norms, q, k, v, attention's output, a sum, and the inner width.
    user_bytes = 4 * config.max_len * config.hidden_dim * (8 + config.ffn_factor)
    users = min(MANY_USERS, max(USERS, share // user_bytes))
    return users, min(LARGE_SCORE_BYTES, max(SCORE_BYTES, share))


def score_product(hidden: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Return the product of states (B, D) with an item table (I, D), as fp32 sums in `out` (B, I).

    A 16-bit table (CUDA only) is multiplied in 16 bits with fp32 results.
    """
    wide = {} if table.dtype == torch.float32 else {"out_dtype": torch.float32}
    return torch.mm(hidden.to(table.dtype), table.t(), out=out, **wide)


@torch.no_grad()
def model_scores(
    model: Any, evaluation: Evaluation, device: torch.device, batch_size: int | None = None
) -> Scores:
    """Yield a model's scores of all real items after each history, with the model in eval mode.

    A history longer than max_len - 1 (max_len for a causal model) is cut to its last items. The encoder uses
    autocast's precision if enabled; scores are fp32, in a buffer that the next scores overwrite. `batch_size`
    users are encoded at a time; the default depends on the device (`pass_sizes`).
    """
    was_training = model.training
    model.eval()
    config: ModelConfig = model.config
    layout = Layout(config)
    weight = model.output_weight[1 : config.num_items + 1]
    bias = None if model.output_bias is None else model.output_bias[1 : config.num_items + 1]
    cuda = device.type == "cuda"
    memory_bytes = torch.cuda.get_device_properties(device).total_memory if cuda else None
    most_users, score_bytes = pass_sizes(config, memory_bytes)
    most_users, size = batch_size or most_users, max(1, score_bytes // (4 * config.num_items))
    half = cuda and torch.is_autocast_enabled(device.type)
    table = weight.to(torch.get_autocast_dtype(device.type) if half else torch.float32)  # once for all users
    users = np.arange(len(evaluation.targets))
    buffer = torch.empty(min(size, most_users, len(users)), config.num_items, device=device)
    batches: Generator[tuple[np.ndarray, Batch], None, None] = next_item_batches(
        evaluation.histories, layout, users, most_users
    )
    if cuda and len(users) > most_users:
        batches = prefetch((rows, batch.staged(device)) for rows, batch in batches)
    with contextlib.closing(batches):
        for rows, batch in batches:
            moved = batch.to(device)
            inputs = (moved.items, moved.segment_ids, moved.positions, moved.query_index)
            hidden = model.encode(*inputs).flatten(0, 1)[moved.target_slots[: len(rows)]]
            hidden = model.head_input(hidden)
            for first in range(0, len(rows), size):
                part = hidden[first : first + size]
                scores = score_product(part, table, buffer[: len(part)])
                scores = scores if bias is None else scores.add_(bias)
                if model.prior is not None:
                    model.prior.add_to(scores, evaluation.histories, rows[first : first + size])
                yield rows[first : first + size], scores
    model.train(was_training)


# -- metrics -------------------------------------------------------------------------------------------------


def hit(ranks: np.ndarray, k: int) -> np.ndarray:
    """Return HR@k per user: 1 where the target is among the first k. Equals Recall@k with one target."""
    return (ranks <= k).astype(np.float64)


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """Return NDCG@k per user: 1 / log2(rank + 1) where the target is among the first k (one target)."""
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def per_user(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Return every metric's value per user, by name: hr@k, ndcg@k, mrr."""
    values = {f"hr@{k}": hit(ranks, k) for k in KS} | {f"ndcg@{k}": ndcg(ranks, k) for k in KS}
    return values | {"mrr": 1.0 / ranks}


def summary(ranks: np.ndarray) -> dict[str, float]:
    """Return every metric's mean over users."""
    return {name: float(values.mean()) for name, values in per_user(ranks).items()}


def evaluate(
    model: Any, dataset: Dataset, part: Literal["valid", "test"] = "test", remove_seen: bool = True
) -> dict[str, float]:
    """Return hr@k, ndcg@k and mrr of a model by leave-one-out, each target ranked among all items.

    `model` is a Bert4Rec, with or without adapters, or a `saving.Recommender`. The target is the last but one
    item of each user for `valid`, and the last for `test`. With `remove_seen` the items of a user's history
    are no candidates. Raises `InputError` for a model of another catalogue.
    """
    keys = getattr(model, "keys", None)
    model = model if isinstance(model, torch.nn.Module) else model.model
    items = dataset.item_keys.tolist()[1:]
    if model.config.num_items != len(items) or keys not in (None, items):
        raise InputError(f"the model's items are not those of {dataset.name}: {len(items):,} are expected")
    held_out = evaluation(dataset, part)
    if not len(held_out.targets):
        raise InputError(f"{dataset.name}: no user has three interactions, so nothing is held out")
    scores = model_scores(model, held_out, model.output_weight.device)
    return summary(rank(scores, held_out, remove_seen=remove_seen).ranks)


# -- protocols -----------------------------------------------------------------------------------------------
# One trained model under several evaluation protocols: the effect of the protocol alone. Every result has a
# label. Only a full ranking of the catalogue is comparable with other studies; a rank among sampled
# candidates is not (Krichene and Rendle, KDD 2020; arXiv 2107.13045), and neither is the seed study's metric.

NOT_COMPARABLE = "sampled, not comparable"
SEED_LABEL = "all masked positions: the seed study's metric, not next-item prediction, not comparable"


class Outcome(NamedTuple):
    """Ranks under one protocol, with its name and label."""

    protocol: str  # short name, for tables and parameters
    label: str  # description, for figures
    comparable: bool  # whether it is comparable with other studies under the same label
    ranks: np.ndarray  # int64 (rows,): 1 is best
    users: np.ndarray  # int64 (rows,): the evaluation's row of each rank


def side_by_side(
    score: Scorer,
    evaluation: Evaluation,
    candidates: Mapping[str, np.ndarray] | None = None,
    top_k: int = 0,
) -> tuple[list[Outcome], np.ndarray | None]:
    """Rank the same scores under each protocol: fully, seen items removed and kept, and among candidates.

    `candidates` maps the sampling, "uniform" or "popularity", to the negatives (rows, N) of
    `splits.sample_candidates`. Also returned are the `top_k` best items (rows, k) without seen ones, if any.
    Scores are computed once, for leave-one-out.
    """
    candidates = dict(candidates or {})
    for sampling, negatives in candidates.items():
        _check(negatives, evaluation.targets, sampling)
    users: list[np.ndarray] = []
    tops: list[Any] = []
    ranks: dict[str, list[Tensor]] = {name: [] for name in ("removed", "kept", *candidates)}
    for rows, scores in score(evaluation):
        users.append(rows)
        targets = torch.as_tensor(evaluation.targets[rows].astype(np.int64), device=scores.device)
        for sampling, negatives in candidates.items():
            drawn = torch.as_tensor(negatives[rows].astype(np.int64), device=scores.device)
            ranks[sampling].append(rank_among(scores, targets, drawn))
        ranks["kept"].append(rank_scores(scores, targets, None)[0])
        seen = seen_items(evaluation.histories, rows, scores.device)
        removed, top = rank_scores(scores, targets, seen, top_k)  # last: it overwrites scores
        ranks["removed"].append(removed)
        tops.append(top)
    order = np.argsort(np.concatenate(users), kind="stable")
    counts = {name: negatives.shape[1] for name, negatives in candidates.items()}
    outcomes = [
        _outcome("leave-one-out", name, torch.cat(parts).cpu().numpy()[order], counts.get(name))
        for name, parts in ranks.items()
    ]
    return outcomes, torch.cat(tops).cpu().numpy()[order] if top_k else None


def _outcome(split: str, name: str, ranks: np.ndarray, candidates: int | None = None) -> Outcome:
    protocol, label = f"{split}, seen {name}", f"{split}, full ranking, seen items {name}"
    if candidates is not None:
        protocol = f"{split}, {candidates} {name}"
        label = f"{split}, target among {candidates} {name} negatives: {NOT_COMPARABLE}"
    return Outcome(protocol, label, candidates is None, ranks, np.arange(len(ranks)))


def _check(negatives: np.ndarray, targets: np.ndarray, sampling: str) -> None:
    """Raise `InputError` for candidates of another evaluation."""
    if negatives.ndim != 2 or len(negatives) != len(targets):
        expected = f"expected ({len(targets)}, count), a row a user"
        raise InputError(f"{sampling} candidates have the shape {negatives.shape}: {expected}")
    wrong = (negatives < 1) | (negatives == targets[:, None])
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        item = negatives[row, column]
        raise InputError(
            f"{sampling} candidates of row {row} hold {item}: expected ids from 1, not its target"
        )


def under_split(score: Scorer, split: Split, remove_seen: bool = True) -> Outcome:
    """Rank the test targets of a split fully; `score` is of a model trained under that split."""
    ranks = rank(score(split.test), split.test, remove_seen=remove_seen).ranks
    return _outcome(split.name, "removed" if remove_seen else "kept", ranks)


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
    """Rank the item at every masked position, as in the seed study; one rank per position.

    A window is the last max_len items of history and target together. Its last item is always masked; the
    item d places before it, in a window of n, is masked with mask_prob * (0.8 + 0.4 * (1 - d / n)). All rows
    of the output table are candidates, PAD and MASK included unless `special_tokens` is False; seen items are
    not removed. The seed study evaluates users that were not trained on (`splits.random_users`). Differences
    from it: masks are drawn once from `seed`, ties and NaN count against the target, windows have the model's
    max_len (50 there), and rows are packed.
    """
    config = model.config
    if config.causal:
        raise InputError("every-masked-position needs a model that reads both sides; this one is causal")
    was_training = model.training
    model.eval()
    layout = Layout(config)
    table_rows = slice(None) if special_tokens else slice(1, config.num_items + 1)
    weight = model.output_weight[table_rows]
    bias = None if model.output_bias is None else model.output_bias[table_rows]
    size = max(1, SCORE_BYTES // (4 * len(weight)))
    ranks, users = [], []
    for window_users, samples in _windows(evaluation, config, mask_prob, seed, batch_size):
        rows, places = layout.place(samples.lengths[None])
        batch = layout.batch(samples, rows[0], places[0]).to(device)
        states = model.encode(batch.items, batch.segment_ids, batch.positions, batch.query_index)
        hidden = model.head_input(states.flatten(0, 1)[batch.target_slots[: batch.num_targets]])
        targets = batch.targets[: batch.num_targets] + int(special_tokens)  # columns from 1
        for part, columns in zip(hidden.split(size), targets.split(size), strict=True):
            ranks.append(rank_scores(F.linear(part, weight, bias).float(), columns, None)[0].cpu().numpy())
        # Positions are ranked in the order of rows: by row, then by place in it.
        order = np.argsort(rows[0] * config.max_len + places[0], kind="stable")
        masked = np.add.reduceat(samples.is_target, np.cumsum(samples.lengths) - samples.lengths, dtype=int)
        users.append(np.repeat(window_users[order], masked[order]))
    model.train(was_training)
    label = SEED_LABEL if special_tokens else f"{SEED_LABEL}, PAD and MASK left out"
    return Outcome("seed study's", label, False, np.concatenate(ranks), np.concatenate(users))


def _windows(
    evaluation: Evaluation, config: ModelConfig, mask_prob: float, seed: int, batch_size: int
) -> Iterator[tuple[np.ndarray, Samples]]:
    """Yield (users, samples) of masked windows that end with the target."""
    histories = evaluation.histories
    ends = np.cumsum(histories.lengths + 1)
    items = np.insert(histories.items[histories.places()], np.cumsum(histories.lengths), evaluation.targets)
    joined = Histories(items, ends - histories.lengths - 1, ends)
    rng = np.random.default_rng(seed)
    for first in range(0, len(ends), batch_size):
        users = np.arange(first, min(first + batch_size, len(ends)))
        samples = cut(joined, users, config.max_len, None)
        masked = rng.random(len(samples.tokens)) < seed_mask_probability(samples.lengths, mask_prob)
        yield users, samples._replace(is_target=masked).masked(config.mask_id)


def seed_mask_probability(lengths: np.ndarray, mask_prob: float) -> np.ndarray:
    """Return the mask probability of each item of windows of `lengths` (B,); 1 for the last of each."""
    n = np.repeat(lengths, lengths)
    distance = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(lengths.sum())
    return np.where(distance == 0, 1.0, mask_prob * (0.8 + 0.4 * (1 - distance / n)))
