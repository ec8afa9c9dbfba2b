"""What a model is shown and asked: windows of histories, their targets, and the negatives of a sampled loss.

Shapes: B sequences, T items of all of them, I real items.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reclib.config import PAD, TrainConfig
from reclib.data import Histories


class Samples(NamedTuple):
    """Sequences cut to at most L items, one after another, with their targets marked."""

    tokens: np.ndarray  # int32 (T,) item ids
    lengths: np.ndarray  # int64 (B,)
    is_target: np.ndarray  # bool (T,) places where something is to be predicted
    labels: np.ndarray  # int32 (T,) what: the item itself (cloze) or the one after it


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
    """Return histories of which a share, drawn at random, ends at a random place, after two items or more.

    A model that sees whole histories alone knows what comes after the last item of none: prefixes are what
    histories looked like earlier, and with the last item masked they are prediction at that time.
    """
    lengths = histories.ends - histories.starts
    cut_here = rng.random(len(lengths)) < share
    shorter = 2 + (rng.random(len(lengths)) * (lengths - 1)).astype(np.int64)  # 2 .. length
    kept = np.where(cut_here & (lengths > 2), np.minimum(shorter, lengths), lengths)
    return histories._replace(ends=histories.starts + kept)


def mask_cloze(
    samples: Samples, mask_prob: float, last_item_share: float, rng: np.random.Generator
) -> Samples:
    """Mark cloze targets: each item with `mask_prob`, at least one a sequence.

    A share of the sequences has the last item as its only target, which is the condition at inference.
    """
    lengths = samples.lengths
    ends = np.cumsum(lengths)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    last_only = rng.random(len(lengths)) < last_item_share
    is_target = (rng.random(len(samples.tokens)) < mask_prob) & ~last_only[sequence]
    spare = ends - lengths + (rng.random(len(lengths)) * lengths).astype(np.int64)
    empty = np.bincount(sequence[is_target], minlength=len(lengths)) == 0
    forced = np.where(last_only, ends - 1, spare)[empty & (lengths > 0)]
    is_target[forced] = True
    return samples._replace(is_target=is_target)


def next_items(samples: Samples) -> Samples:
    """Return every item but each sequence's last, as inputs whose targets are the items after them."""
    lengths = samples.lengths
    is_last = np.zeros(len(samples.tokens), dtype=bool)
    is_last[np.cumsum(lengths)[lengths > 0] - 1] = True
    kept = np.flatnonzero(~is_last)
    tokens = samples.tokens
    return Samples(tokens[kept], np.maximum(lengths - 1, 0), np.ones(len(kept), dtype=bool), tokens[kept + 1])


def item_counts(histories: Histories, num_items: int) -> np.ndarray:
    """Return how often each item occurs in the histories, int64 (I + 1,); [0] is PAD's, zero."""
    return np.bincount(histories.items[histories.places()], minlength=num_items + 1)


def negative_shares(histories: Histories, num_items: int, train: TrainConfig) -> np.ndarray:
    """Return the probability (I + 1,) with which a draw of a sampled loss gives each item; PAD's is 0."""
    if train.negatives == "popularity":
        counts = item_counts(histories, num_items)
    else:
        counts = (np.arange(num_items + 1) != PAD).astype(np.int64)
    return counts / counts.sum()
