"""A fixture for tests of what is divided by time: synthetic histories whose times are spread."""

import dataclasses

import numpy as np
import pytest

from reclib.data.dataset import Dataset
from reclib.data.prepare import synthetic_dataset


def spread() -> Dataset:
    """Return a dataset whose users live in different parts of the time."""
    found = synthetic_dataset(120, 60, 20.0, 0)
    generator = np.random.default_rng(1)
    times = np.empty(found.num_interactions, dtype=np.int64)
    for user in range(found.num_users):
        part = slice(found.offsets[user], found.offsets[user + 1])
        start, length = generator.integers(0, 900), generator.integers(50, 600)
        times[part] = np.sort(start + generator.integers(0, length, part.stop - part.start))
    return dataclasses.replace(found, times=times)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """The dataset of `spread`, for modules that import it."""
    return spread()
