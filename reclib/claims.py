"""What a comparison allows to say: one rule for reports, tables and figures, which need no torch for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

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
