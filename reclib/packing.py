"""How sequences share rows: first-fit decreasing, and sizes that repeat.

Plain numpy, so that a plan can lay out the batches of a device that is not there.

Shapes: S steps, B sequences of a step, R rows, L = max_len.
"""

from __future__ import annotations

import numpy as np


def bucket(n: int, steps: int) -> int:
    """Round n up to one of `steps` sizes per octave, so that shapes repeat at a bounded waste."""
    size = 1 << max(0, n.bit_length() - steps.bit_length())
    return -(-n // size) * size


def first_fit_decreasing(lengths: np.ndarray, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack the sequences of many steps at once; return row and place in the row of each.

    `lengths` (S, B) with 0 where a step has no further sequence; both results are (S, B). The loop runs over
    the B ranks by length; all steps move together.
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
