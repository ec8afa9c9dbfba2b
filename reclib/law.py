"""The power law of loss against size, L(N) = E + A N^-alpha: its fit, its band, and what it predicts.

The form is that of Kaplan et al. 2020 (arXiv 2001.08361, section 1.2) with the floor E of Hoffmann et al.
2022 (arXiv 2203.15556, section 3.3), which Zhang et al. 2023 (arXiv 2311.11351) fit to recommendation. For
each exponent of a grid E and A are a linear least-squares problem, so the fit needs no start and finds the
minimum of the grid; both are kept non-negative.

Shapes: S sizes, B bootstrap draws, G exponents of the grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

EXPONENTS = np.geomspace(0.005, 3.0, 600)  # (G,)
MIN_SIZES = 4  # three parameters are fitted
SAMPLES = 2000  # bootstrap draws


class Law(NamedTuple):
    """Fitted parameters, each a number or an array (B,)."""

    floor: Any  # E, nats: what no size goes below
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
    at = np.arange(len(rows)), best
    exponent = EXPONENTS[best]
    law = Law(floor[at], scale[at] * sizes.min() ** exponent, exponent)
    return law if np.ndim(losses) == 2 else Law(*(float(part[0]) for part in law))


def resampled(losses: Sequence[Sequence[float]], samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Return means (B, S) of seeds drawn with replacement, for each size apart."""
    rng = np.random.default_rng(seed)
    drawn = [np.asarray(one)[rng.integers(len(one), size=(samples, len(one)))].mean(1) for one in losses]
    return np.stack(drawn, axis=1)


def predict(by_size: Mapping[float, Sequence[float]], size: float, samples: int = SAMPLES) -> dict[str, Any]:
    """Fit the law to the losses of each size's seeds, and say what it gives at another size.

    `low` and `high` are the 95 % interval over resampled seeds, None where no size has two seeds: then there
    is nothing to resample. `without_low` and `without_high` is what leaving out one size does, None where
    that leaves too few. The noise of the predicted run's own seeds is in none of them.
    """
    sizes = np.array(sorted(by_size))
    means = np.array([np.mean(by_size[one]) for one in sizes])
    law = fit(sizes, means)
    found: dict[str, Any] = {"floor": law.floor, "factor": law.factor, "exponent": law.exponent}
    found |= {"predicted": float(law(size)), "residual": float(np.abs(law(sizes) - means).max())}
    found |= dict.fromkeys(("low", "high", "without_low", "without_high", "exponent_low", "exponent_high"))
    if max(len(seeds) for seeds in by_size.values()) > 1:
        laws = fit(sizes, resampled([by_size[one] for one in sizes], samples))
        found["low"], found["high"] = (float(v) for v in np.percentile(laws([size]), (2.5, 97.5)))
        ends = np.percentile(laws.exponent, (2.5, 97.5))
        found["exponent_low"], found["exponent_high"] = (float(v) for v in ends)
    if len(sizes) > MIN_SIZES:
        others = [float(fit(np.delete(sizes, i), np.delete(means, i))(size)) for i in range(len(sizes))]
        found["without_low"], found["without_high"] = min(others), max(others)
    return found


def naive(sizes: Any, losses: Any, size: float) -> dict[str, float]:
    """Return what to hold a law against: the largest size's loss again, and a straight line in log N.

    `sizes` and `losses` are (S,), smallest first.
    """
    slope, start = np.polyfit(np.log(np.asarray(sizes, dtype=np.float64)), losses, 1)
    return {"last": float(losses[-1]), "line": float(start + slope * np.log(size))}


def band(by_size: Mapping[float, Sequence[float]], sizes: Any, samples: int = SAMPLES) -> np.ndarray | None:
    """Return the 95 % band (2, S) of the law at `sizes`, over resampled seeds; None where it has none.

    At the predicted size it is `low` and `high` of `predict`.
    """
    measured = sorted(by_size)
    if len(measured) < MIN_SIZES or max(len(seeds) for seeds in by_size.values()) < 2:
        return None
    laws = fit(measured, resampled([by_size[one] for one in measured], samples))
    return np.percentile(laws(sizes), (2.5, 97.5), axis=0)
