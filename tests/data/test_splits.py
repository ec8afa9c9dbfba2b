"""Divisions of a dataset: nothing that trains is later than what judges, and rows are what they say."""

import dataclasses
import itertools
import json
from functools import partial

import numpy as np
import pytest
from conftest import refused
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from small_models import dataset_of

from reclib.config import InputError
from reclib.data import splits
from reclib.data.dataset import Dataset, Histories
from reclib.data.splits import row_users

NUM_ITEMS = 12
made = partial(dataset_of, num_items=NUM_ITEMS)
EVENT = st.tuples(st.integers(1, NUM_ITEMS), st.integers(0, 30))
HISTORIES = st.lists(st.lists(EVENT, min_size=1, max_size=9), min_size=2, max_size=12)


def spans(rows) -> list[range]:
    return [range(a, b) for a, b in zip(rows.starts.tolist(), rows.ends.tolist(), strict=True)]


def trained(split: splits.Split) -> set[int]:
    """Positions in the arrays that a training history holds."""
    return {position for span in spans(split.train) for position in span}


def check_rows(dataset: Dataset, split: splits.Split, per_user: int = 1) -> None:
    """What holds for every split: histories begin where a user begins and end right before the target."""
    for part in (split.valid, split.test):
        users = row_users(dataset, part.histories)
        assert np.array_equal(part.histories.starts, dataset.offsets[users])
        assert (part.histories.ends < dataset.offsets[users + 1]).all()
        assert np.array_equal(part.targets, dataset.items[part.histories.ends])
        assert (part.histories.lengths > 0).all()
        assert np.unique(part.histories.ends).size == users.size
        assert np.bincount(users).max(initial=0) <= per_user
    assert len({*spans(split.train)}) == len(split.train.starts)
    assert json.loads(json.dumps(split.about)) == split.about


@settings(max_examples=40, deadline=None)
@given(histories=HISTORIES)
def test_leave_one_out_trains_on_no_target_and_nothing_after_it(histories):
    dataset = made(histories)
    split = splits.leave_one_out(dataset)
    check_rows(dataset, split)
    seen = trained(split)
    for part, from_the_end in ((split.valid, 2), (split.test, 1)):
        users = row_users(dataset, part.histories)
        assert np.array_equal(part.histories.ends, dataset.offsets[users + 1] - from_the_end)
        for user, target in zip(users, part.histories.ends, strict=True):
            assert not seen & set(range(target, dataset.offsets[user + 1]))
    assert len(seen) == dataset.num_interactions - 2 * len(split.test.targets)  # short histories train whole
    assert split.about["train_interactions"] == len(seen)
    assert split.about["evaluated_users"] + split.about["left_out_short_histories"] == dataset.num_users


@settings(max_examples=40, deadline=None)
@given(histories=HISTORIES, shares=st.tuples(*[st.floats(0.05, 1)] * 2))
def test_fewer_users_train_and_the_targets_stay(histories, shares):
    dataset = made(histories)
    split = splits.leave_one_out(dataset)
    assert spans(split.before_test()) == spans(split.test.histories)
    fewer, more = (split.with_fewer_users(share) for share in sorted(shares))
    assert {*spans(fewer.train)} <= {*spans(more.train)} <= {*spans(split.train)}
    assert len(more.train.starts) == max(1, round(max(shares) * dataset.num_users))
    assert more.test is split.test
    assert more.valid is split.valid
    users = {*row_users(dataset, more.train)} & {*row_users(dataset, split.test.histories)}
    assert {*row_users(dataset, more.before_test())} == users
    check_rows(dataset, more)


@settings(max_examples=40, deadline=None)
@given(
    histories=HISTORIES,
    shares=st.tuples(st.floats(0.05, 0.45), st.floats(0.05, 0.45)),
    target=st.sampled_from(["first", "last", "random"]),
)
def test_global_time_trains_only_before_the_point(histories, shares, target):
    dataset = made(histories)
    try:
        split = splits.global_time(dataset, *shares, target=target)
    except InputError:  # see the next test
        reject()
    check_rows(dataset, split)
    points = split.about["time_points"]
    seen = trained(split)
    # exactly what lies before the validation point trains: nothing later, nothing at it, and all of it
    assert seen == set(np.flatnonzero(dataset.times < points["valid"]).tolist())
    known = {int(dataset.items[position]) for position in seen}
    windows = {"valid": (points["valid"], points["test"]), "test": (points["test"], 31)}
    for name, (begin, end) in windows.items():
        rows = getattr(split, name)
        users = row_users(dataset, rows.histories)
        counts = split.about[name]
        inside = (dataset.times >= begin) & (dataset.times < end)
        assert counts["interactions"] == inside.sum()
        for user, at in zip(users, rows.histories.ends, strict=True):
            assert inside[at]
            places = np.flatnonzero(inside[dataset.offsets[user] : dataset.offsets[user + 1]])
            first, last = places[[0, -1]] + dataset.offsets[user]
            assert {"first": at == first, "last": at == last, "random": first <= at <= last}[target]
        active = sum(inside[a:b].any() for a, b in itertools.pairwise(dataset.offsets))
        assert counts["left_out_without_history"] == active - users.size
        trains = set(row_users(dataset, split.train).tolist())
        assert counts["rows_of_unseen_users"] == sum(user not in trains for user in users.tolist())
        assert counts["rows_with_unseen_target"] == sum(item not in known for item in rows.targets.tolist())
    assert split.about["items_unseen_in_training"] == NUM_ITEMS - len(known)
    assert split.about["users_unseen_in_training"] == dataset.num_users - len(split.train.starts)


def test_time_points_among_equal_times():
    for times in [[5] * 20, [5] * 19 + [6], [1] + [5] * 19]:
        dataset = made([[(1 + n % 5, time) for n, time in enumerate(times)]])
        refused("leave a part empty", splits.global_time, dataset)

    # of 13 interactions the validation point falls on the second of the three at time 7
    times = [1, 2, 3, 4, 5, 6, 7, 7, 7, 9]
    dataset = made([[(1 + n % 5, time) for n, time in enumerate(times)], [(3, 1), (4, 2), (5, 12)]])
    split = splits.global_time(dataset, 0.2, 0.12)
    assert split.about["time_points"]["valid"] == 7
    assert dataset.times[sorted(trained(split))].max() == 6
    assert split.valid.histories.ends.tolist() == [6]


def test_impossible_divisions_are_refused():
    dataset = made([[(1, 1), (2, 2)]] * 4)
    refused("target is 'next'", splits.global_time, dataset, 0.1, 0.1, "next")
    refused("both above 0", splits.global_time, dataset, 0.0, 0.1)
    refused("both above 0", splits.global_time, dataset, 0.6, 0.4)
    refused("shares are", splits.random_users, dataset, (0.5, 0.5))
    refused("shares are", splits.random_users, dataset, (1.2, -0.1, -0.1))
    refused("sum is below 1", splits.divide, dataset, (0.5, 0.3, 0.2), 4)
    refused("above 0", splits.divide, dataset, (0.0, 0.3, 0.2), 4)
    refused("part empty", splits.divide, dataset, (0.0001, 0.3, 0.2), 4)
    without_times = dataclasses.replace(dataset, times=None)
    refused("no times", splits.global_time, without_times)
    refused("no times", splits.divide, without_times, SHARES, 4)


@settings(max_examples=40, deadline=None)
@given(histories=HISTORIES, seed=st.integers(0, 5))
def test_random_users_are_disjoint(histories, seed):
    dataset = made(histories)
    split = splits.random_users(dataset, (0.5, 0.25, 0.25), seed)
    check_rows(dataset, split)
    groups = [row_users(dataset, rows) for rows in (split.train, split.valid[0], split.test[0])]
    assert np.unique(np.concatenate(groups)).size == sum(group.size for group in groups)
    assert np.array_equal(split.train.ends, dataset.offsets[groups[0] + 1])  # whole histories
    for part, users in zip((split.valid, split.test), groups[1:], strict=True):
        assert np.array_equal(part.histories.ends, dataset.offsets[users + 1] - 1)  # the last item
    left_out = sum(split.about[part]["left_out_without_history"] for part in ("valid", "test"))
    assert sum(group.size for group in groups) + left_out == dataset.num_users
    assert "seed study" in split.name


def test_random_draws_follow_shares_and_seed():
    dataset = made([[(1, 1), (2, 2)]] * 1000)
    first, again, other = (splits.random_users(dataset, seed=seed) for seed in (0, 0, 1))
    sizes = [len(part) for part in (first.train.starts, first.valid.targets, first.test.targets)]
    assert sizes == [800, 100, 100]
    assert np.array_equal(first.test.histories.starts, again.test.histories.starts)
    assert not np.array_equal(first.test.histories.starts, other.test.histories.starts)
    dataset = made([[(1 + (u + t) % NUM_ITEMS, t) for t in range(30)] for u in range(40)])
    ends = [splits.global_time(dataset, target="random", seed=s).test.histories.ends for s in (1, 1, 2)]
    assert np.array_equal(ends[0], ends[1])
    assert not np.array_equal(ends[0], ends[2])


@settings(max_examples=40, deadline=None)
@given(histories=HISTORIES, how=st.sampled_from(["uniform", "popularity"]), count=st.integers(1, 6))
def test_negatives_were_never_had(histories, how, count):
    dataset = made(histories)
    rows = splits.random_users(dataset, (0.4, 0.3, 0.3)).test
    met = set(dataset.items.tolist()) if how == "popularity" else set(range(1, NUM_ITEMS + 1))
    users = row_users(dataset, rows.histories)
    had = [set(dataset.items[dataset.offsets[u] : dataset.offsets[u + 1]].tolist()) for u in users]
    if any(len(met - items) < count for items in had):
        refused("fewer than the", splits.sample_candidates, dataset, rows, count, how)
        return
    drawn = splits.sample_candidates(dataset, rows, count, how, seed=1)
    assert drawn.shape == (len(rows.targets), count)
    assert drawn.dtype == np.int32
    for negatives, items in zip(drawn.tolist(), had, strict=True):  # the target is one of the user's items
        assert len(set(negatives)) == count
        assert set(negatives) <= met - items


@pytest.mark.parametrize("rounds", [30, 1], ids=["rejection", "over the catalogue"])
def test_negatives_by_popularity(rounds, monkeypatch):
    monkeypatch.setattr(splits, "ROUNDS", rounds)
    size = 5000
    popular = [[(item, time) for time in range(item)] for item in range(3, 7)]  # item n is met n times
    dataset = made([[(1, 1), (2, 2)]] * size + popular, num_items=6)
    histories = Histories(dataset.items, dataset.offsets[:size], dataset.offsets[1 : size + 1] - 1)
    rows = splits.Evaluation(histories, np.full(size, 2, np.int32))
    drawn = splits.sample_candidates(dataset, rows, 1, "popularity", seed=3)
    shares = np.bincount(drawn[:, 0], minlength=7) / size
    assert shares[3:] == pytest.approx(np.arange(3, 7) / 18, abs=0.025)


SHARES = (0.5, 0.25, 0.1)
SEGMENT = 0.6  # few of these users live long enough to have a past and a test window


@pytest.fixture(scope="module")
def whole(dataset) -> splits.Periods:
    return splits.divide(dataset, SHARES, 4)


def test_nothing_that_trains_is_later_than_what_judges_and_parts_have_their_shares(dataset, whole):
    first, second, third = whole.about["points"]
    times, adaptation = dataset.times, whole.adaptation
    assert times[whole.base.train.places()].max() < first
    assert times[whole.base.valid.histories.ends].max() < first
    valid, test = (times[rows.histories.ends] for rows in (adaptation.valid, adaptation.test))
    parts = (times[adaptation.train.places()], first, second), (valid, second, third), (test, third, np.inf)
    for part, begin, end in parts:
        assert begin <= part.min() <= part.max() < end
    counts = np.array(list(whole.about["interactions"].values()))
    assert counts.sum() == dataset.num_interactions
    np.testing.assert_allclose(counts / counts.sum(), [*SHARES, 0.15], atol=0.02)
    check_rows(dataset, adaptation, per_user=4)
    for rows in (adaptation.valid, adaptation.test):
        assert np.bincount(row_users(dataset, rows.histories)).max() == 4


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
    means = splits.by_user(dataset, rows, values)
    for place, user in enumerate(np.unique(users)):
        np.testing.assert_allclose(means[:, place], values[:, users == user].mean(axis=1))


def test_the_segment_is_told_from_the_past_alone(dataset, whole):
    segment, adaptation = splits.segment(dataset, whole, SEGMENT), whole.adaptation
    ranks = splits.popularity_ranks(whole.base.train, dataset.num_items)
    distance = {}
    for user, (start, end) in enumerate(itertools.pairwise(dataset.offsets)):
        past = ranks[dataset.items[start:end][dataset.times[start:end] < whole.about["points"][0]]]
        distance[user] = past.mean() if past.size else -1
    for part, every in (
        (segment.train, adaptation.train),
        (segment.valid.histories, adaptation.valid.histories),
        (segment.test.histories, adaptation.test.histories),
    ):
        inside = [distance[user] >= segment.about["threshold"] for user in row_users(dataset, every)]
        assert part.ends.tolist() == every.ends[inside].tolist()
        assert 0 < sum(inside) < len(inside)
    have_a_past = sum(distance[user] >= 0 for user in row_users(dataset, adaptation.train))
    assert len(segment.train.starts) == pytest.approx(SEGMENT * have_a_past, abs=1.5)


def test_ranks_and_neighbours_by_hand():
    histories = Histories(np.array([3, 3, 1, 3, 1, 2], dtype=np.int32), np.array([0, 3]), np.array([3, 6]))
    np.testing.assert_allclose(splits.popularity_ranks(histories, 4), [0, 1 / 3, 2 / 3, 0, 1])
    ranks = np.array([0, 0.5, 1.0, 0.0, 0.25])
    np.testing.assert_allclose(splits.mean_rank(histories, ranks), [0.5 / 3, 1.5 / 3])

    items = np.array([1, 5, 2, 5, 1, 6, 6, 3], dtype=np.int32)
    histories = Histories(items, np.array([0, 3, 5]), np.array([3, 5, 8]))
    known = np.array([False, True, True, True, True, False, False])
    neighbours = splits.neighbours(histories, known).items()
    assert {item: sorted(beside.tolist()) for item, beside in neighbours} == {5: [1, 1, 2], 6: [3]}
