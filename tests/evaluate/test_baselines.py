"""Each baseline against a brute-force or textbook computation on tiny data."""

import gzip
import itertools
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refused, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import histories as random_histories

from reclib.data.dataset import Evaluation, Histories
from reclib.evaluate import baselines, metrics

NUM_ITEMS = 6
# What the independent program chose on validation.
BEAUTY = {"window": 50, "backward": 0.0, "row_power": 0.5, "column_power": 0.0, "decay": 0.5, "last": 20}
ROWS = st.lists(st.lists(st.integers(1, NUM_ITEMS), max_size=8), min_size=1, max_size=8).filter(any)


def of_rows(rows: list[list[int]]) -> Histories:
    """Histories of the given items, with an item between rows that belongs to nobody."""
    items, starts, ends = [NUM_ITEMS], [], []
    for row in rows:
        starts.append(len(items))
        items += row
        ends.append(len(items))
        items.append(NUM_ITEMS)
    return Histories(np.array(items, dtype=np.int32), np.array(starts), np.array(ends))


def evaluated(histories: Histories) -> Evaluation:
    return Evaluation(histories, np.ones(len(histories.starts), dtype=np.int32))


def all_scores(recommender: baselines.Recommender, histories: Histories) -> np.ndarray:
    parts = list(recommender.scores(evaluated(histories)))
    users = np.concatenate([users for users, _ in parts])
    return np.concatenate([scores.numpy() for _, scores in parts])[np.argsort(users)]


@given(rows=ROWS, last=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_recent_popularity_counts_the_last_items_of_each_history(rows, last):
    counts = baselines.fit_recent(of_rows(rows), NUM_ITEMS, last).values
    kept = [item for row in rows for item in row[-last:]]
    assert counts.tolist() == [kept.count(item) for item in range(1, NUM_ITEMS + 1)]


def test_popularity_in_time_counts_the_last_share_of_the_time_range():
    histories = Histories(np.array([1, 2, 3, 2, 6], dtype=np.int32), np.array([0, 2]), np.array([2, 4]))
    times = np.array([0, 90, 89, 100, 500])  # the last belongs to no training history
    counts = baselines.fit_recent_in_time(histories, NUM_ITEMS, times, share=0.1).values
    assert counts.tolist() == [0, 2, 0, 0, 0, 0]
    refused("needs timestamps", baselines.fit_recent_in_time, histories, NUM_ITEMS, None)


@given(rows=ROWS, smoothing=st.sampled_from([0.5, 1.0, 10.0]))
@settings(deadline=None, max_examples=40)
def test_markov_is_smoothed_transition_shares(rows, smoothing):
    histories = of_rows(rows)
    scores = all_scores(baselines.fit_markov(histories, NUM_ITEMS, smoothing), histories)
    items, flat = range(1, NUM_ITEMS + 1), [item for row in rows for item in row]
    pairs = [pair for row in rows for pair in itertools.pairwise(row)]
    smoothed = [smoothing * flat.count(item) / len(flat) for item in items]
    for user, row in enumerate(rows):
        counts = [pairs.count((row[-1], item)) if row else 0 for item in items]
        assert scores[user] == pytest.approx(np.add(counts, smoothed) / (sum(counts) + smoothing), rel=1e-5)


@given(rows=ROWS, neighbours=st.integers(1, 6), shrink=st.sampled_from([0.0, 1.0, 7.5]))
@settings(deadline=None, max_examples=40)
def test_item_knn_is_the_shrunk_cosine_of_the_nearest_neighbours(rows, neighbours, shrink):
    histories = of_rows(rows)
    scores = all_scores(baselines.fit_item_knn(histories, NUM_ITEMS, neighbours, shrink), histories)
    who = {item: {u for u, row in enumerate(rows) if item in row} for item in range(1, NUM_ITEMS + 1)}
    near = {}
    for item, users in who.items():
        similar = {
            other: len(users & others) / (np.sqrt(len(users) * len(others)) + shrink)
            for other, others in who.items()
            if other != item and users & others
        }
        # sorted is stable: of equal ones the lower id stays first
        near[item] = dict(sorted(similar.items(), key=lambda pair: -round(pair[1], 12))[:neighbours])
    wanted = [[sum(near[own].get(item, 0.0) for own in set(row)) for item in who] for row in rows]
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-7)


def test_ease_reaches_the_minimum_column_by_column():
    """Each column is a ridge regression of an item on all others: its gradient vanishes off the diagonal."""
    histories = random_histories([4, 6, 3, 7, 5, 4, 8, 6], num_items=9)
    X = baselines.interaction_matrix(histories, 9).toarray().astype(np.float64)
    regularisation = 2.5
    weights = baselines.fit_ease(histories, 9, regularisation).weights
    assert (np.diag(weights) == 0).all()
    for item in range(9):
        others = np.delete(np.arange(9), item)
        A = X[:, others].T @ X[:, others] + regularisation * np.eye(8)
        wanted = np.linalg.solve(A, X[:, others].T @ X[:, item])
        np.testing.assert_allclose(weights[others, item], wanted, rtol=1e-4, atol=1e-6)


def test_similarities_do_not_depend_on_their_blocks_nor_scores_on_theirs(monkeypatch):
    histories = random_histories([12, 30, 7, 25, 18], num_items=20)
    X = baselines.interaction_matrix(histories, 20).toarray()
    knn = partial(baselines.fit_item_knn, histories, 20, 3, 2.0)
    fits = [knn, partial(baselines.fit_ease, histories, 20, 2.0)]
    wanted = [X @ fit().weights for fit in fits]
    monkeypatch.setattr(metrics, "SCORE_BYTES", 2 * 4 * 20)  # two users at a time
    for block_bytes in (1, 300, 2**20):
        monkeypatch.setattr(baselines, "BLOCK_BYTES", block_bytes)
        for fit, scores in zip(fits, wanted, strict=True):
            np.testing.assert_allclose(all_scores(fit(), histories), scores, rtol=1e-5, atol=1e-6)


TWO_KINDS = of_rows([[1, 2, 3]] * 6 + [[4, 5, 3]] * 2)


def test_validation_chooses_and_keeps_what_it_saw():
    valid = Evaluation(of_rows([[1], [4]]), np.array([2, 5], dtype=np.int32))
    family = baselines.Family(baselines.fit_markov, {"smoothing": (1e6, 1.0, 2.0)})
    choice = baselines.choose(family, TWO_KINDS, NUM_ITEMS, valid)
    assert choice.chosen == {"smoothing": 1.0}  # as good as 2.0, and before it
    assert [row["smoothing"] for row in choice.tried] == [1e6, 1.0, 2.0]
    best = metrics.summary(metrics.rank(choice.recommender.scores(valid), valid, remove_seen=True).ranks)
    assert best["ndcg@10"] == choice.tried[1]["ndcg@10"] > choice.tried[0]["ndcg@10"]


def test_impossible_hyperparameters_are_refused_by_name():
    rows = of_rows([[1, 2]])
    refused("'last' is 0", baselines.fit_recent, rows, NUM_ITEMS, last=0)
    refused("'smoothing' is 0.0", baselines.fit_markov, rows, NUM_ITEMS, smoothing=0.0)
    refused("'shrink' is -1.0", baselines.fit_item_knn, rows, NUM_ITEMS, shrink=-1.0)
    refused("'regularisation' is 0.0", baselines.fit_ease, rows, NUM_ITEMS, regularisation=0.0)
    refused("'decay' is 1.5", baselines.fit_pairwise_counts, rows, NUM_ITEMS, decay=1.5)
    refused(r"286\.1 GiB.*'memory_bytes' allows 4\.0 GiB", baselines.fit_ease, rows, 160_000)


@given(
    rows=ROWS,
    window=st.integers(1, 4),
    last=st.integers(1, 5),
    backward=st.sampled_from([0.0, 0.5]),
    pairs=st.sampled_from([1, 2**22]),
)
@settings(deadline=None, max_examples=40)
def test_pairwise_counts_equal_a_sum_over_all_pairs(rows, window, last, backward, pairs):
    """A brute-force twin with the definition in plain loops, counted in chunks of any size."""
    histories = of_rows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "PAIRS", pairs)
        fitted = baselines.fit_pairwise_counts(histories, NUM_ITEMS, window, backward, 0.5, 0.3, 0.8, last)
    counts = np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1))
    for row in rows:
        for (i, first), (j, second) in itertools.combinations(enumerate(row), 2):
            if j - i <= window:
                counts[first, second] += 1 / (j - i)
                counts[second, first] += backward / (j - i)
    by_row, by_column = np.maximum(counts.sum(1), 1e-9), np.maximum(counts.sum(0), 1e-9)
    scaled = counts / by_row[:, None] ** 0.5 / by_column**0.3
    wanted = [
        sum((0.8**age * scaled[item] for age, item in enumerate(row[::-1][:last])), np.zeros(NUM_ITEMS + 1))
        for row in rows
    ]
    np.testing.assert_allclose(all_scores(fitted, histories), np.array(wanted)[:, 1:], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_pairwise_counts_reach_the_figures_of_an_independent_program_on_beauty():
    """On S3-Rec's file of Beauty, with the hyperparameters that the other program chose on validation."""
    with gzip.open(sample("amazon-beauty-2014-5core/Beauty_s3rec.txt.gz"), "rt") as lines:
        rows = [np.array(line.split()[1:], dtype=np.int32) for line in lines]
    items, ends = np.concatenate(rows), np.cumsum([len(row) for row in rows])
    starts = ends - [len(row) for row in rows]
    test = Evaluation(Histories(items, starts, ends - 1), items[ends - 1])
    for back, wanted in ((2, (0.0862, 0.0541)), (1, (0.0970, 0.0621))):
        fitted = baselines.fit_pairwise_counts(Histories(items, starts, ends - back), items.max(), **BEAUTY)
        parts = []  # that program gives a target the middle of its ties; the project the last place
        for users, scores in fitted.scores(test):
            targets = torch.from_numpy(test.targets[users].astype(np.int64))
            seen = metrics.seen_items(test.histories, users, torch.device("cpu"))
            last, _ = metrics.rank_scores(scores, targets, seen)
            own = scores.gather(1, (targets - 1)[:, None])
            parts.append((last + (scores > own).sum(1) + 1).numpy() / 2)
        ranks = np.concatenate(parts)
        values = (metrics.hit(ranks, 10.5).mean(), metrics.ndcg(ranks, 10.5).mean())  # 10 from 0
        assert values == pytest.approx(wanted, abs=6e-5)


def test_a_search_by_turns_finds_the_best_and_fits_once_for_what_only_scores_differently():
    valid = Evaluation(of_rows([[1], [4], [1, 2]]), np.array([2, 5, 3], dtype=np.int32))
    fits = []

    def fit(*given, **named):
        fits.append(named["window"])
        return baselines.fit_pairwise_counts(*given, **named)

    family = baselines.families()["pairwise_counts"]._replace(fit=fit, valid_users=2)
    choice = baselines.choose(family, TWO_KINDS, NUM_ITEMS, valid)
    assert sorted(fits) == [10, 50]
    keys = [tuple(row[name] for name in family.grid) for row in choice.tried]
    assert len(set(keys)) == len(keys) < np.prod([len(values) for values in family.grid.values()])
    chosen = choice.tried[keys.index(tuple(choice.chosen.values()))]
    assert chosen["ndcg@10"] == max(row["ndcg@10"] for row in choice.tried)
