"""Time in parts: nothing that trains is later than what judges, and rows are what they say."""

import dataclasses
import itertools

import numpy as np
import pytest
from spread import spread

from reclib.config import InputError
from reclib.data import splits
from reclib.data.dataset import Histories
from reclib.data.splits import row_users

SHARES = (0.5, 0.25, 0.1)
SEGMENT = 0.6  # few of these users live long enough to have a past and a test window


@pytest.fixture(scope="module")
def dataset():
    return spread()


@pytest.fixture(scope="module")
def whole(dataset) -> splits.Periods:
    return splits.divide(dataset, SHARES, 4)


def test_nothing_that_trains_is_later_than_what_judges_and_parts_have_their_shares(dataset, whole):
    first, second, third = whole.about["points"]
    times = dataset.times
    adaptation = whole.adaptation
    assert times[whole.base.train.places()].max() < first
    assert times[whole.base.valid.histories.ends].max() < first
    valid, test = (times[rows.histories.ends] for rows in (adaptation.valid, adaptation.test))
    parts = (times[adaptation.train.places()], first, second), (valid, second, third), (test, third, np.inf)
    for part, begin, end in parts:
        assert begin <= part.min() <= part.max() < end
    counts = np.array(list(whole.about["interactions"].values()))
    assert counts.sum() == dataset.num_interactions
    np.testing.assert_allclose(counts / counts.sum(), [*SHARES, 0.15], atol=0.02)


def test_a_target_follows_all_that_its_user_did_before(dataset, whole):
    for rows in (whole.adaptation.valid, whole.adaptation.test):
        users = row_users(dataset, rows.histories)
        assert (rows.histories.starts == dataset.offsets[users]).all()
        assert (rows.histories.ends < dataset.offsets[users + 1]).all()
        assert (rows.targets == dataset.items[rows.histories.ends]).all()
        assert (rows.histories.lengths > 0).all()
        assert np.bincount(users).max() == 4
        assert len(np.unique(rows.histories.ends)) == len(rows.targets)


def test_targets_are_drawn_by_seed_and_all_can_be_drawn(dataset, whole):
    again = splits.divide(dataset, SHARES, 4).adaptation.test
    other = splits.divide(dataset, SHARES, 4, seed=1).adaptation.test
    assert (again.histories.ends == whole.adaptation.test.histories.ends).all()
    assert not np.array_equal(other.histories.ends, again.histories.ends)
    every = splits.divide(dataset, SHARES, 10_000).adaptation.test
    wanted = np.flatnonzero(dataset.times >= whole.about["points"][2])
    wanted = wanted[~np.isin(wanted, dataset.offsets[:-1])]  # a first interaction has no history
    np.testing.assert_array_equal(every.histories.ends, wanted)


def test_a_metric_is_averaged_over_a_users_targets(dataset, whole):
    rows = whole.adaptation.test
    users = row_users(dataset, rows.histories)
    values = np.random.default_rng(0).random((2, len(users)))
    found = splits.by_user(dataset, rows, values)
    for place, user in enumerate(np.unique(users)):
        np.testing.assert_allclose(found[:, place], values[:, users == user].mean(axis=1))


def test_the_segment_is_told_from_the_past_alone(dataset, whole):
    found = splits.segment(dataset, whole, SEGMENT)
    ranks = splits.popularity_ranks(whole.base.train, dataset.num_items)
    distance = {}
    for user, (start, end) in enumerate(itertools.pairwise(dataset.offsets)):
        past = [
            ranks[dataset.items[i]] for i in range(start, end) if dataset.times[i] < whole.about["points"][0]
        ]
        distance[user] = np.mean(past) if past else -1
    threshold = found.about["threshold"]
    for part, all_of_it in (
        (found.train, whole.adaptation.train),
        (found.valid.histories, whole.adaptation.valid.histories),
        (found.test.histories, whole.adaptation.test.histories),
    ):
        users = row_users(dataset, all_of_it)
        wanted = [end for user, end in zip(users, all_of_it.ends, strict=True) if distance[user] >= threshold]
        assert part.ends.tolist() == wanted
        assert 0 < len(wanted) < len(users)
    have_a_past = sum(distance[user] >= 0 for user in row_users(dataset, whole.adaptation.train))
    assert len(found.train.starts) == pytest.approx(SEGMENT * have_a_past, abs=1.5)


def test_ranks_and_neighbours_by_hand():
    histories = Histories(np.array([3, 3, 1, 3, 1, 2], dtype=np.int32), np.array([0, 3]), np.array([3, 6]))
    np.testing.assert_allclose(splits.popularity_ranks(histories, 4), [0, 1 / 3, 2 / 3, 0, 1])
    ranks = np.array([0, 0.5, 1.0, 0.0, 0.25])
    np.testing.assert_allclose(splits.mean_rank(histories, ranks), [0.5 / 3, 1.5 / 3])

    items = np.array([1, 5, 2, 5, 1, 6, 6, 3], dtype=np.int32)
    histories = Histories(items, np.array([0, 3, 5]), np.array([3, 5, 8]))
    known = np.array([False, True, True, True, True, False, False])
    found = splits.neighbours(histories, known)
    assert {item: sorted(beside.tolist()) for item, beside in found.items()} == {5: [1, 1, 2], 6: [3]}


def test_shares_that_leave_nothing_are_told(dataset):
    for shares, said in [
        ((0.5, 0.3, 0.2), "sum is below 1"),
        ((0.0, 0.3, 0.2), "above 0"),
        ((0.0001, 0.3, 0.2), "part empty"),
    ]:
        with pytest.raises(InputError, match=said):
            splits.divide(dataset, shares, 4)
    with pytest.raises(InputError, match="has no times"):
        splits.divide(dataclasses.replace(dataset, times=None), SHARES, 4)
