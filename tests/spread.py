"""Synthetic histories whose times are spread, for tests of what is divided by time."""

import dataclasses

import numpy as np

from reclib.data.dataset import Dataset
from reclib.data.prepare import synthetic_dataset


def spread() -> Dataset:
    """Return a dataset whose users live in different parts of the time."""
    dataset = synthetic_dataset(120, 60, 20.0, 0)
    generator = np.random.default_rng(1)
    times = []
    for count in dataset.lengths:
        start, length = generator.integers(0, 900), generator.integers(50, 600)
        times.append(np.sort(start + generator.integers(0, length, count)))
    return dataclasses.replace(dataset, times=np.concatenate(times))
