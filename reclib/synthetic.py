"""Seeded synthetic histories that a sequence model can learn and popularity cannot.

Popularity is Zipf. Each item has a few successors; the next item is one of them with probability
`FOLLOW`, else a draw by popularity. No user meets an item twice, as in rating data. The only loop
is over time steps (with chunks of users to bound memory), each step serving all users that are
still active.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reclib.config import InputError

VERSION = 1  # raise whenever the same arguments would give other histories
ZIPF = 1.0  # popularity of the item of rank r is proportional to r ** -ZIPF
SUCCESSORS = np.array([0.6, 0.3, 0.1])  # probabilities of an item's successors
FOLLOW = 0.7  # probability that the next item is a successor
MIN_LEN = 5  # interactions that every user has
CHUNK_USERS = 1 << 16  # users generated at a time


class Histories(NamedTuple):
    """Histories one after another."""

    items: np.ndarray  # int32 (num_interactions,): items 1..num_items
    offsets: np.ndarray  # int64 (num_users + 1,)


def lengths(users: int, mean_len: float, longest: int, generator: np.random.Generator) -> np.ndarray:
    """Return int64 (users,) interactions per user: geometric from `MIN_LEN`, cut at `longest`."""
    extra = generator.geometric(1.0 / (mean_len - MIN_LEN + 1.0), users) - 1
    return np.minimum(MIN_LEN + extra, longest).astype(np.int64)


def generate(*, users: int, items: int, mean_len: float, seed: int) -> Histories:
    """Return histories of `users` users over `items` items with about `mean_len` interactions each.

    Lengths are cut at half the catalogue, so that unseen items always remain; with a small
    catalogue the mean comes out lower. Raises `InputError` where the arguments leave no room for
    that.
    """
    if mean_len < MIN_LEN:
        raise InputError(f"mean length is {mean_len}, expected at least {MIN_LEN} interactions per user")
    if items < 2 * MIN_LEN or items < mean_len:
        raise InputError(
            f"{items} synthetic items are too few for a mean length of {mean_len}: expected at "
            f"least {max(2 * MIN_LEN, int(np.ceil(mean_len)))}"
        )
    generator = np.random.default_rng(seed)
    by_rank = generator.permutation(items).astype(np.int32)  # item of each popularity rank
    cumulative = np.cumsum(np.arange(1, items + 1) ** -ZIPF)
    cumulative /= cumulative[-1]
    # successors are drawn by popularity too, so that following them keeps the Zipf shape
    draws = np.searchsorted(cumulative, generator.random((items, SUCCESSORS.size)), side="right")
    successors = by_rank[np.minimum(draws, items - 1)]  # (items, successors)
    length = lengths(users, mean_len, items // 2, generator)
    offsets = np.concatenate([[0], np.cumsum(length)])
    chunks = [
        _walk(length[start : start + CHUNK_USERS], by_rank, cumulative, successors, generator)
        for start in range(0, users, CHUNK_USERS)
    ]
    return Histories(np.concatenate(chunks) + np.int32(1), offsets)


def _walk(
    length: np.ndarray,
    by_rank: np.ndarray,
    cumulative: np.ndarray,
    successors: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return int32 (sum(length),) items from 0, users one after another."""
    longest_first = np.argsort(-length, kind="stable")
    ordered = length[longest_first]
    steps = int(ordered[0])
    active = np.searchsorted(-ordered, -np.arange(steps), side="left")  # users with length > step
    history = np.full((length.size, steps), -1, dtype=np.int32)
    for step in range(steps):
        past = history[: active[step], :step]
        drawn = np.empty(past.shape[0], dtype=np.int32)
        pending = np.arange(past.shape[0])
        attempt = 0
        while pending.size:
            if attempt < 4:
                tries = _by_popularity(pending.size, by_rank, cumulative, generator)
                if attempt == 0 and step:
                    follow = generator.random(pending.size) < FOLLOW
                    which = generator.choice(SUCCESSORS.size, pending.size, p=SUCCESSORS)
                    tries = np.where(follow, successors[past[pending, -1], which], tries)
            else:  # uniform: at least half the catalogue is unseen, so this ends soon
                tries = generator.integers(by_rank.size, size=pending.size, dtype=np.int32)
            drawn[pending] = tries
            pending = pending[(past[pending] == tries[:, None]).any(axis=1)]
            attempt += 1
        history[: active[step], step] = drawn
    rows = np.empty_like(history)
    rows[longest_first] = history
    return rows[np.arange(steps) < length[:, None]]


def _by_popularity(
    size: int, by_rank: np.ndarray, cumulative: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    ranks = np.searchsorted(cumulative, generator.random(size), side="right")
    return by_rank[np.minimum(ranks, by_rank.size - 1)]
