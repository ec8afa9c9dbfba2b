"""Synthetic histories whose times are spread, for tests of what is divided by time."""

import dataclasses

import numpy as np

from reclib.data.dataset import Dataset
from reclib.data.prepare import synthetic_dataset


def spread() -> Dataset:
    """Return a dataset whose users live in different parts of the time."""
    dataset, generator = synthetic_dataset(120, 60, 20.0, 0), np.random.default_rng(1)
    times = np.empty(dataset.num_interactions, dtype=np.int64)
    for user in range(dataset.num_users):
        part = slice(dataset.offsets[user], dataset.offsets[user + 1])
        start, length = generator.integers(0, 900), generator.integers(50, 600)
        times[part] = np.sort(start + generator.integers(0, length, part.stop - part.start))
    return dataclasses.replace(dataset, times=times)
