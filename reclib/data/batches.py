"""Batches of packed rows with their target positions, vectorised and reproducible.

The samples of a step are drawn by a generator seeded with (seed, stream, epoch, step), then laid out.
Targets therefore do not depend on packing, padding or micro-batches, and a resumed run needs no generator
state. Packing is first-fit decreasing, for `STEPS_PACKED` steps at once. In data-parallel training each
process draws the whole step and lays out its own micro-batches.

Samples and packing use numpy alone, so that the planner can lay out batches without torch.

Shapes: S steps, B sequences of a step, T items of them, R rows, L = max_len, Q queries of a row, M targets,
I real items of the catalogue.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from reclib.config import PAD, ModelConfig, TrainConfig, changed
from reclib.data.dataset import Histories, within

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IGNORE = -100  # target of a slot that only fills a bucket

ORDER, SAMPLE, NEGATIVES, PREFIX = 0, 1, 2, 3  # streams of random numbers

STEPS_PACKED = 64  # steps packed together: about as fast as a whole epoch, with a short wait at the start
AHEAD = 16  # batches prepared ahead: what a fast GPU consumes while the next steps are packed
ALIGNED = 4  # elements: every tensor in a staging buffer starts at a multiple of 16 bytes

T = TypeVar("T")


class Samples(NamedTuple):
    """Sequences cut to at most L items, one after another, with their targets marked."""

    tokens: np.ndarray  # int32 (T,) ids that the network reads: items, or MASK
    lengths: np.ndarray  # int64 (B,)
    is_target: np.ndarray  # bool (T,) whether a place is predicted
    labels: np.ndarray  # int32 (T,) the item to predict: the one at the place (cloze) or the next one

    def masked(self, mask_id: int, visible_targets: bool = False) -> Samples:
        """Put MASK at the targets; with `visible_targets` the other places become targets, too."""
        tokens = np.where(self.is_target, mask_id, self.tokens)
        return self._replace(tokens=tokens, is_target=self.is_target | visible_targets)


def cut(histories: Histories, users: np.ndarray, max_len: int, offset: np.ndarray | None) -> Samples:
    """Return the histories of `users`, at most `max_len` items each and no targets yet.

    `offset` (B,) in [0, 1) places the window inside a longer history; None takes the last items.
    """
    starts, ends = histories.starts[users], histories.ends[users]
    lengths = np.minimum(ends - starts, max_len)
    slack = ends - starts - lengths
    shift = slack if offset is None else np.minimum((offset * (slack + 1)).astype(np.int64), slack)
    windows = Histories(histories.items, starts + shift, starts + shift + lengths)
    tokens = histories.items[windows.places()]
    return Samples(tokens, lengths, np.zeros(len(tokens), dtype=bool), tokens)


def prefixes(histories: Histories, share: float, rng: np.random.Generator) -> Histories:
    """Cut a random `share` of the histories at a random place, after two items or more.

    A prefix is a history at an earlier time. With its last item masked it trains next-item prediction.
    """
    lengths = histories.lengths
    is_cut = rng.random(len(lengths)) < share
    shorter = 2 + (rng.random(len(lengths)) * (lengths - 1)).astype(np.int64)  # 2 .. length
    new_lengths = np.where(is_cut & (lengths > 2), np.minimum(shorter, lengths), lengths)
    return histories._replace(ends=histories.starts + new_lengths)


def mask_cloze(
    samples: Samples, mask_prob: float, last_item_share: float, rng: np.random.Generator
) -> Samples:
    """Mark cloze targets: each item with `mask_prob`, at least one a sequence.

    A share of the sequences has the last item as its only target, as at inference.
    """
    lengths = samples.lengths
    ends = np.cumsum(lengths)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    last_only = rng.random(len(lengths)) < last_item_share
    is_target = (rng.random(len(samples.tokens)) < mask_prob) & ~last_only[sequence]
    spare = ends - lengths + (rng.random(len(lengths)) * lengths).astype(np.int64)
    empty = np.bincount(sequence[is_target], minlength=len(lengths)) == 0
    is_target[np.where(last_only, ends - 1, spare)[empty & (lengths > 0)]] = True
    return samples._replace(is_target=is_target)


def next_items(samples: Samples) -> Samples:
    """Return all items but the last of each sequence as inputs; their targets are the next items."""
    tokens, lengths = samples.tokens, samples.lengths
    is_last = np.zeros(len(tokens), dtype=bool)
    is_last[np.cumsum(lengths)[lengths > 0] - 1] = True
    inputs = np.flatnonzero(~is_last)
    is_target = np.ones(len(inputs), dtype=bool)
    return Samples(tokens[inputs], np.maximum(lengths - 1, 0), is_target, tokens[inputs + 1])


def whole_sequences(samples: Samples, causal: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the unmasked sequences and, for each target, the number of items before it.

    Returns tokens (T,), lengths (B,), each target's sequence (M,) and its number of preceding items (M,).
    """
    tokens, lengths = samples.tokens if causal else samples.labels, samples.lengths
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    known = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if causal:  # the target of a place is the next item; append the last target to its sequence
        ends = np.cumsum(lengths)[lengths > 0]
        tokens = np.insert(tokens, ends, samples.labels[ends - 1])
        lengths, known = lengths + (lengths > 0), known + 1
    return tokens, lengths, sequence[samples.is_target], known[samples.is_target]


def item_counts(histories: Histories, num_items: int) -> np.ndarray:
    """Return how often each item occurs in the histories, int64 (I + 1,); [0] is PAD's, zero."""
    return np.bincount(histories.items[histories.places()], minlength=num_items + 1)


def negative_shares(histories: Histories, num_items: int, train: TrainConfig) -> np.ndarray:
    """Return each item's probability (I + 1,) of being drawn as a negative; 0 for PAD."""
    if train.negatives == "popularity":
        counts = item_counts(histories, num_items)
    else:
        counts = (np.arange(num_items + 1) != PAD).astype(np.int64)
    return counts / counts.sum()


def bucket(n: int, steps: int) -> int:
    """Round n up to one of `steps` sizes per octave, so that shapes repeat at a bounded waste."""
    size = 1 << max(0, n.bit_length() - steps.bit_length())
    return -(-n // size) * size


def first_fit_decreasing(lengths: np.ndarray, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack the sequences of many steps at once; return the row and the place in the row of each.

    `lengths` and both results are (S, B); 0 fills up shorter steps. The loop runs over the B ranks by length
    and handles all steps at once.
    """
    S, B = lengths.shape
    order = np.argsort(-lengths, axis=1, kind="stable")
    # Of the rows that first fit opens, at most one is half empty: this many suffice.
    num_rows = min(B, int(2 * lengths.sum(axis=1).max(initial=0) // max_len) + 1)
    small = np.int16 if max_len <= np.iinfo(np.int16).max else np.int64  # `free` is read once a rank
    free = np.full((S, num_rows), max_len, dtype=small)
    rows, places = np.zeros_like(lengths), np.zeros_like(lengths)
    step = np.arange(S)
    for rank in range(B):
        chosen = order[:, rank]
        length = lengths[step, chosen]
        row = (free >= length[:, None].astype(small)).argmax(axis=1)
        rows[step, chosen], places[step, chosen] = row, max_len - free[step, row]
        free[step, row] -= length.astype(small)
    return rows, places


class Batch(NamedTuple):
    """Rows for the encoder and where in them the targets are."""

    items: Tensor  # (R, L) ids, MASK at targets, PAD in unused places
    segment_ids: Tensor  # (R, L) number of the sequence, 0 in unused places
    positions: Tensor  # (R, L) row of the position table
    query_index: Tensor  # (R, Q) places in each row that hold targets, filled up with place 0
    target_slots: Tensor  # (M,) where the targets are in the flattened (R, Q) queries
    target_places: Tensor  # (M,) where they are in the flattened (R, L) rows
    targets: Tensor  # (M,) item ids; IGNORE in slots that only fill the bucket
    num_targets: int
    num_tokens: int  # real items, MASK included
    num_sequences: int
    negatives: Tensor | None = None  # (K,) item ids of a sampled loss
    negative_probs: Tensor | None = None  # (K,) probability of each in one draw
    prior_rows: Tensor | None = None  # (N,) rows of the logits that a prior is added to
    prior_columns: Tensor | None = None  # (N,) columns, item id - 1
    prior_values: Tensor | None = None  # (N,) values before scaling
    buffer: Tensor | None = None  # int32: the tensors above in one staging buffer (see `staged`)

    def staged(self, device: torch.device) -> Batch:
        """Return the batch with a staging buffer for `device`; called by the prefetching thread."""
        if device.type == "cpu":
            return self
        return self._replace(buffer=stage(list(self.tensors().values()), device))

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`, moved by one asynchronous copy."""
        if device.type == "cpu":
            return self
        tensors = self.tensors()
        moved = send(list(tensors.values()), device, self.buffer)
        fields: dict[str, Any] = dict(zip(tensors, moved, strict=True))
        return self._replace(**fields, buffer=None)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, without the buffer."""
        from torch import Tensor

        fields = self._replace(buffer=None)._asdict()
        return {name: value for name, value in fields.items() if isinstance(value, Tensor)}


def stage(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Copy int32, int64 (below 2^31) and fp32 tensors into one int32 buffer, pinned for CUDA."""
    import torch

    sizes = [-(-tensor.numel() // ALIGNED) * ALIGNED for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    for tensor, part in zip(tensors, buffer.split(sizes), strict=True):
        bits = tensor.view(torch.int32) if tensor.is_floating_point() else tensor
        part[: tensor.numel()].copy_(bits.flatten())
    return buffer


def unstage(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors of a `stage` buffer, with the types and shapes of `like`, as views."""
    import torch

    wide, first, views = buffer.long(), 0, []
    for tensor in like:
        source = wide if tensor.dtype == torch.int64 else buffer.view(tensor.dtype)
        views.append(source[first : first + tensor.numel()].view(tensor.shape))
        first += -(-tensor.numel() // ALIGNED) * ALIGNED
    return views


def send(tensors: Sequence[Tensor], device: torch.device, buffer: Tensor | None = None) -> list[Tensor]:
    """Return CPU tensors on `device`, moved by one copy of their `stage` buffer, with their types kept.

    Integers travel as int32 and are widened on the device in one operation.
    """
    if device.type == "cpu":
        return list(tensors)
    buffer = stage(tensors, device) if buffer is None else buffer
    return unstage(buffer.to(device, non_blocking=True), tensors)


class Totals(NamedTuple):
    """Counts of a whole step, over its micro-batches and all processes."""

    num_targets: int
    num_tokens: int  # real items, MASK included
    num_sequences: int


def generator(*key: int) -> np.random.Generator:
    """Return the generator of a key such as (seed, stream, epoch, step)."""
    return np.random.default_rng(key)


@dataclass(frozen=True)
class Layout:
    """How samples are laid out as a batch."""

    model: ModelConfig
    packed: bool = True  # several sequences in a row
    bucket_steps: int = 16  # as in TrainConfig

    def place(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return row and place (S, B) of every sequence; unpacked, each has a row of its own."""
        if self.packed:
            return first_fit_decreasing(lengths, self.model.max_len)
        return np.broadcast_to(np.arange(lengths.shape[1]), lengths.shape), np.zeros_like(lengths)

    def batch(self, samples: Samples, rows: np.ndarray, places: np.ndarray, prior: Any = None) -> Batch:
        """Lay samples out in rows (B,) at places (B,); `prior` is an `evaluate.baselines.CountPrior`."""
        import torch

        tokens, lengths, is_target, labels = samples
        L = self.model.max_len
        num_rows = int(rows.max(initial=0)) + 1
        num_rows = bucket(num_rows, self.bucket_steps) if self.packed else num_rows
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        order = within(lengths)
        flat = rows[sequence] * L + places[sequence] + order  # (T,) place in the flattened rows

        items = np.full(num_rows * L, PAD, dtype=np.int64)
        segments = np.zeros(num_rows * L, dtype=np.int32)
        positions = np.zeros(num_rows * L, dtype=np.int64)
        items[flat] = tokens
        segments[flat] = sequence + 1
        from_last = self.model.position_origin == "last"
        positions[flat] = lengths[sequence] - 1 - order if from_last else order

        arrays = [array.reshape(num_rows, L) for array in (items, segments, positions)]
        targets = flat[is_target]
        arrays += self._queries(targets, labels[is_target].astype(np.int64), num_rows)
        counts = (int(is_target.sum()), len(tokens), len(lengths))
        batch = Batch(*map(torch.from_numpy, arrays), *counts)  # type: ignore[call-arg, arg-type]
        if prior is None:
            return batch
        order = np.argsort(targets, kind="stable")  # as in `_queries`
        entries = prior.for_samples(samples, self.model.causal, order)
        added: Any = {f"prior_{name}": torch.from_numpy(array) for name, array in entries._asdict().items()}
        return batch._replace(**added)

    def _queries(self, places: np.ndarray, targets: np.ndarray, num_rows: int) -> list[np.ndarray]:
        """Sort targets by place and give each row the same number Q of query slots."""
        order, L = np.argsort(places, kind="stable"), self.model.max_len
        places, targets = places[order], targets[order]
        row = places // L
        per_row = np.bincount(row, minlength=num_rows)
        Q = min(bucket(int(per_row.max(initial=1)), self.bucket_steps), L)
        rank = within(per_row)
        query_index = np.zeros((num_rows, Q), dtype=np.int64)
        query_index[row, rank] = places % L
        fill = (0, bucket(len(places), self.bucket_steps) - len(places))
        slots, places = np.pad(row * Q + rank, fill), np.pad(places, fill)
        return [query_index, slots, places, np.pad(targets, fill, constant_values=IGNORE)]


class Epoch:
    """The steps of one pass over the users; `step(i)` always gives the same micro-batches.

    With `ranks` processes (a divisor of `batch_size`), process `rank` gets every `ranks`-th micro-batch of a
    step. At the end of an epoch it may get none.
    """

    def __init__(
        self,
        histories: Histories,
        model: ModelConfig,
        train: TrainConfig,
        epoch: int,
        rank: int = 0,
        ranks: int = 1,
        prior: Any = None,
    ) -> None:
        self.model, self.train, self.epoch, self.prior = model, train, epoch, prior
        if train.prefix_share:
            histories = prefixes(histories, train.prefix_share, generator(train.seed, PREFIX, epoch))
        self.histories = histories
        self.layout = Layout(model, train.layout == "packed", train.bucket_steps)
        self.extra = int(model.causal)  # items of a window beyond its inputs: the last target
        users = np.flatnonzero(histories.lengths > self.extra)
        self.users = generator(train.seed, ORDER, epoch).permutation(users)
        self.num_steps = -(-len(users) // train.batch_size)
        self.rank, self.ranks = rank, ranks
        self.micro_batch_size = math.gcd(
            train.micro_batch_size or train.batch_size, train.batch_size // ranks
        )
        self._packed: tuple[int, np.ndarray, np.ndarray] | None = None  # first step of a block, rows, places
        self.shares = negative_shares(histories, model.num_items, train) if train.sampled else None

    def samples(self, step: int) -> Samples:
        """Draw the windows and targets of a step."""
        train = self.train
        users = self.users[step * train.batch_size : (step + 1) * train.batch_size]
        rng = generator(train.seed, SAMPLE, self.epoch, step)
        offset = rng.random(len(users)) if train.window == "random" else None
        chosen = cut(self.histories, users, self.model.max_len + self.extra, offset)
        if self.model.causal:
            return next_items(chosen)
        marked = mask_cloze(chosen, train.mask_prob, train.last_item_share, rng)
        return marked.masked(self.model.mask_id, train.visible_targets)

    def negatives(self, step: int) -> dict[str, Any]:
        """Draw the negatives of a sampled loss, shared by all targets of a step, with their probabilities."""
        import torch

        if self.shares is None:
            return {}
        rng = generator(self.train.seed, NEGATIVES, self.epoch, step)
        drawn = rng.choice(len(self.shares), self.train.num_negatives, p=self.shares)
        odds = torch.from_numpy(self.shares[drawn].astype(np.float32))
        return {"negatives": torch.from_numpy(drawn), "negative_probs": odds}

    def placed(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row and place (B,) of a step's sequences; B is batch_size, also in a shorter last step.

        Steps are packed in blocks, on the first request for one of them.
        """
        first = step // STEPS_PACKED * STEPS_PACKED
        if self._packed is None or self._packed[0] != first:
            size = self.train.batch_size
            users = self.users[first * size : (first + STEPS_PACKED) * size]
            lengths = np.zeros(-(-len(users) // size) * size, dtype=np.int64)
            spans = self.histories.ends[users] - self.histories.starts[users] - self.extra
            lengths[: len(users)] = np.minimum(spans, self.model.max_len)
            rows, places = self.layout.place(lengths.reshape(-1, self.micro_batch_size))
            self._packed = first, rows.reshape(-1, size), places.reshape(-1, size)
        _, rows, places = self._packed
        return rows[step - first], places[step - first]

    def step(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step."""
        return self.counted(step)[0]

    def counted(self, step: int, device: torch.device | None = None) -> tuple[list[Batch], Totals]:
        """Return this process's micro-batches of a step, staged for `device`, and the whole step's totals."""
        samples, negatives = self.samples(step), self.negatives(step)
        size, (rows, places) = self.micro_batch_size, self.placed(step)
        ends = np.concatenate(([0], np.cumsum(samples.lengths)))
        batches = []
        for first in range(0, len(samples.lengths), size)[self.rank :: self.ranks]:
            part = slice(first, min(first + size, len(samples.lengths)))
            items = slice(ends[part.start], ends[part.stop])
            tokens, lengths, is_target, labels = samples
            micro = Samples(tokens[items], lengths[part], is_target[items], labels[items])
            batch = self.layout.batch(micro, rows[part], places[part], self.prior)._replace(**negatives)
            batches.append(batch if device is None else batch.staged(device))
        totals = Totals(int(samples.is_target.sum()), len(samples.tokens), len(samples.lengths))
        return batches, totals


def next_item_batches(
    histories: Histories, layout: Layout, users: np.ndarray, batch_size: int
) -> Generator[tuple[np.ndarray, Batch], None, None]:
    """Yield (users, batch) for prediction: the last L - 1 items of each history, then MASK.

    A causal model predicts at the last of L items, or at MASK for an empty history. Users are sorted by
    length; rows are as long as the longest of a batch. Target slots follow the order of the yielded users.
    """
    model = layout.model
    longest = model.max_len - int(not model.causal)
    spans = np.minimum(histories.lengths[users], longest)
    users = users[np.argsort(-spans, kind="stable")]
    for first in range(0, len(users), batch_size):
        chosen = users[first : first + batch_size]
        windows = cut(histories, chosen, longest, None)
        lengths = np.maximum(windows.lengths, 1) if model.causal else windows.lengths + 1
        ends = np.cumsum(lengths)
        tokens = np.full(ends[-1], model.mask_id, dtype=np.int64)
        is_target = np.zeros(ends[-1], dtype=bool)
        is_target[ends - 1] = True
        tokens[within(lengths) < np.repeat(windows.lengths, lengths)] = windows.tokens
        width = min(-(-int(lengths[0]) // 16) * 16, model.max_len)
        fitting = replace(layout, model=changed(model, max_len=width))
        rows, places = fitting.place(lengths[None])
        batch = fitting.batch(Samples(tokens, lengths, is_target, tokens), rows[0], places[0])
        by_place = np.argsort(rows[0] * width + places[0], kind="stable")
        yield chosen[by_place], batch


def prefetch(source: Iterable[T], depth: int = AHEAD) -> Generator[T, None, None]:
    """Yield from `source`, read by a thread up to `depth` items ahead; its errors are raised here."""
    items, end = iter(source), object()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        coming = deque(thread.submit(next, items, end) for _ in range(depth))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(thread.submit(next, items, end))
                yield item  # type: ignore[misc]
        finally:
            thread.shutdown(cancel_futures=True)
