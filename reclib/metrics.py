"""Full ranking of every real item, and what is read off the ranks.

Scores are made and ranked a few users at a time: memory is bounded (`pass_sizes`), never users x items. They
are fp32 sums whatever the precision of the encoder: rounded to 16 bits, many would be equal. Ties are
pessimistic (an item that scores the same stands before the target), a target whose score is NaN ranks last,
and PAD and MASK are never candidates. Metrics keep one value per user, so that models can be compared by a
paired bootstrap over users.

Shapes: B users at a time, I real items, k recommendations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reclib.batching import CPU, Batch, Layout, next_item_batches, prefetch, send
from reclib.config import ModelConfig
from reclib.data import Evaluation, Histories
from reclib.model import Bert4Rec
from reclib.samples import item_counts

SCORE_BYTES = 64 * 2**20  # scores held at a time
USERS = 256  # encoded at a time
LARGE_SCORE_BYTES, MANY_USERS = 2**30, 4096  # the same at most on a GPU, where small pieces wait for launches
SHARE = 32  # scores, and what the encoder holds, take at most this part of a GPU's memory each
ROWS_IN_CACHE = 8  # users counted at a time on a CPU
BLOCK = 64  # items whose maximum is taken first when the best k are sought
KS = (1, 5, 10, 20)

Scores = Iterator[tuple[np.ndarray, Tensor]]  # users (B,) and their scores (B, I); column j is item j + 1


class Ranking(NamedTuple):
    """Where each target stands, and the best items."""

    ranks: np.ndarray  # int64 (U,) in the evaluation's order: 1 is best
    top: np.ndarray | None  # int64 (U, k) item ids, best first
    losses: np.ndarray | None = None  # float32 (U,) cross-entropy of each target, in nats


class Interval(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def rank_scores(
    scores: Tensor, targets: Tensor, seen: tuple[Tensor, Tensor] | None, top_k: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Rank targets (B,) among the columns of `scores` (B, I), which is overwritten.

    `seen` is (row, item id) of the items that may not be recommended; a target is never removed. Returns
    ranks (B,) from 1 and, for `top_k` > 0, the ids (B, k) of the best items.
    """
    column = (targets - 1)[:, None]
    own = scores.gather(1, column)  # from the same product as its rivals: equal scores are equal bits
    if seen is not None:
        scores[seen[0], seen[1] - 1] = float("-inf")
        scores.scatter_(1, column, own)
    rivals = count_at_least(scores, own) - 1  # the target itself is counted
    ranks = torch.where(own.squeeze(1).isnan(), scores.shape[1], rivals + 1)
    return ranks, (best(scores, top_k) + 1 if top_k else None)


def count_at_least(scores: Tensor, threshold: Tensor) -> Tensor:
    """Return (B,) how many of each row of `scores` (B, I) reach its threshold (B, 1).

    A CPU sums floats several times faster than booleans; below 2^24 items their count is exact.
    """
    if scores.device.type != "cpu" or scores.shape[1] >= 1 << 24:
        return (scores >= threshold).sum(1)
    reached = torch.empty(min(len(scores), ROWS_IN_CACHE), scores.shape[1])
    parts = []
    for first in range(0, len(scores), ROWS_IN_CACHE):
        part = scores[first : first + ROWS_IN_CACHE]
        block = reached[: len(part)]
        torch.ge(part, threshold[first : first + ROWS_IN_CACHE], out=block)
        parts.append(block.sum(1))
    return torch.cat(parts).long()


def best(scores: Tensor, k: int) -> Tensor:
    """Return the columns (B, k) of the k largest of each row, best first; NaN counts as -inf.

    The k largest lie in the k blocks with the largest maxima, so only those blocks are searched.
    """
    B, I = scores.shape  # noqa: E741
    k = min(k, I)
    whole = I // BLOCK * BLOCK
    if whole <= k * BLOCK * 2:
        return scores.nan_to_num(nan=float("-inf"), neginf=float("-inf")).topk(k).indices
    blocks = scores[:, :whole].unflatten(1, (-1, BLOCK))
    maxima = blocks.amax(2).nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    chosen = maxima.topk(k).indices  # (B, k)
    columns = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=scores.device)).flatten(1)
    tail = torch.arange(whole, I, device=scores.device).expand(B, -1)
    columns = torch.cat((columns, tail), 1)
    values = scores.gather(1, columns).nan_to_num_(nan=float("-inf"), neginf=float("-inf"))
    return columns.gather(1, values.topk(k).indices)


def rank(
    scores: Scores, evaluation: Evaluation, remove_seen: bool, top_k: int = 0, with_losses: bool = False
) -> Ranking:
    """Rank every user's target among the scores that `scores` yields.

    `with_losses` adds each target's cross-entropy in nats, with the softmax over all items, seen ones too:
    what training minimises, at the position that is predicted. It means something for logits only.
    """
    users, ranks, tops, losses = [], [], [], []
    for chosen, values in scores:
        asked = [torch.from_numpy(evaluation.targets[chosen].astype(np.int64))]
        asked += seen_items(evaluation.histories, chosen, CPU) if remove_seen else ()
        targets, *seen = send(asked, values.device)
        if with_losses:  # before the scores are overwritten
            own = values.gather(1, (targets - 1)[:, None]).squeeze(1)
            losses.append(values.logsumexp(1) - own)
        got, top = rank_scores(values, targets, (seen[0], seen[1]) if remove_seen else None, top_k)
        users.append(chosen)
        ranks.append(got)
        tops.append(top)
    order = np.argsort(np.concatenate(users), kind="stable")
    best_items = torch.cat(tops).cpu().numpy()[order] if top_k else None  # type: ignore[arg-type]
    nats = torch.cat(losses).cpu().numpy()[order] if with_losses else None
    return Ranking(torch.cat(ranks).cpu().numpy()[order], best_items, nats)


def seen_items(histories: Histories, users: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (row, item id) of everything in the histories of `users`, rows in their order."""
    chosen = Histories(histories.items, histories.starts[users], histories.ends[users])
    items = histories.items[chosen.places()].astype(np.int64)
    rows = np.repeat(np.arange(len(users)), chosen.lengths)
    sent = send((torch.from_numpy(rows), torch.from_numpy(items)), device)
    return sent[0], sent[1]


def constant_scores(values: np.ndarray, evaluation: Evaluation) -> Scores:
    """Yield the same scores (I,) for every user: popularity, say."""
    users = np.arange(len(evaluation.targets))
    size = max(1, SCORE_BYTES // (4 * len(values)))
    row = torch.from_numpy(np.asarray(values, dtype=np.float32))
    for first in range(0, len(users), size):
        chosen = users[first : first + size]
        yield chosen, row.expand(len(chosen), -1).clone()


def popularity(histories: Histories, num_items: int) -> np.ndarray:
    """Return how often each item 1..num_items occurs in the histories, as scores (I,)."""
    return item_counts(histories, num_items)[1:].astype(np.float32)


def pass_sizes(config: ModelConfig, memory_bytes: int | None) -> tuple[int, int]:
    """Return how many users are encoded at a time and how many bytes of scores are held.

    `memory_bytes` is a GPU's memory; None: a CPU, where small pieces stay in its caches.
    """
    if memory_bytes is None:
        return USERS, SCORE_BYTES
    share = memory_bytes // SHARE
    # A layer in fp32: its input, two norms, q, k, v, what attention gives, a sum, and the inner width.
    user_bytes = 4 * config.max_len * config.hidden_dim * (8 + config.ffn_factor)
    users = min(MANY_USERS, max(USERS, share // user_bytes))
    return users, min(LARGE_SCORE_BYTES, max(SCORE_BYTES, share))


def score_product(hidden: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Return the product of states (B, D) with an item table (I, D), as fp32 sums in `out` (B, I).

    A 16-bit table, on CUDA only, is multiplied in 16 bits; its scores are not rounded to them.
    """
    wide = {} if table.dtype == torch.float32 else {"out_dtype": torch.float32}
    return torch.mm(hidden.to(table.dtype), table.t(), out=out, **wide)


@torch.no_grad()
def model_scores(
    model: Bert4Rec,
    evaluation: Evaluation,
    device: torch.device,
    batch_size: int | None = None,
    encode: Callable[..., Tensor] | None = None,
) -> Scores:
    """Yield a model's scores of all real items after each history; puts the model in eval mode.

    A history longer than max_len - 1 (max_len for the causal twin) is cut to its last items. The encoder runs
    in autocast's precision where that is on; scores are fp32, in a buffer that the next ones overwrite.
    `batch_size` users are encoded at a time, None: as many as suit the device (`pass_sizes`).
    """
    was_training = model.training
    model.eval()
    config: ModelConfig = model.config
    layout = Layout(config.max_len, config.mask_id, config.position_origin, True, 16, config.causal)
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
        batches = prefetch((chosen, batch.staged(device)) for chosen, batch in batches)
    with contextlib.closing(batches):
        for chosen, batch in batches:
            moved = batch.to(device)
            rows = (moved.items, moved.segment_ids, moved.positions, moved.query_index)
            hidden = (encode or model.encode)(*rows).flatten(0, 1)[moved.target_slots[: len(chosen)]]
            hidden = model.head_input(hidden)
            for first in range(0, len(chosen), size):
                part = hidden[first : first + size]
                scores = score_product(part, table, buffer[: len(part)])
                yield chosen[first : first + size], scores if bias is None else scores.add_(bias)
    model.train(was_training)


def hit(ranks: np.ndarray, k: int) -> np.ndarray:
    """Return HR@k per user: 1 where the target is among the first k. Equals Recall@k with one target."""
    return (ranks <= k).astype(np.float64)


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """Return NDCG@k per user: 1 / log2(rank + 1) where the target is among the first k (one target)."""
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def reciprocal(ranks: np.ndarray) -> np.ndarray:
    """Return 1 / rank per user, whose mean is MRR."""
    return 1.0 / ranks


def per_user(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Return every metric's value per user, by name: hr@k, ndcg@k, mrr."""
    values = {f"hr@{k}": hit(ranks, k) for k in KS} | {f"ndcg@{k}": ndcg(ranks, k) for k in KS}
    return values | {"mrr": reciprocal(ranks)}


def summary(ranks: np.ndarray) -> dict[str, float]:
    """Return every metric's mean over users."""
    return {name: float(values.mean()) for name, values in per_user(ranks).items()}


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
