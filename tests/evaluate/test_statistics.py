"""Tests and intervals against enumeration, textbook values and simulation; what lies beside accuracy."""

import numpy as np
import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from small_models import histories, history_of

from reclib.data.dataset import Evaluation, Histories
from reclib.evaluate import baselines, metrics, statistics

SHARES = st.floats(0, 1)


def drawn(rng, seed_spread: float) -> dict[str, np.ndarray]:
    """Two models of equal mean: 3 seeds, 200 users; users, seeds and their interaction vary."""
    user = rng.normal(0.2, 0.3, 200)

    def model() -> np.ndarray:
        of_users, of_seeds = rng.normal(0, 0.15, 200), rng.normal(0, seed_spread, (3, 1))
        return user + of_users + of_seeds + rng.normal(0, 0.25, (3, 200))

    return {"m0": model(), "m1": model()}


def models(seeds: int, lift: float, users: int = 400) -> dict[str, np.ndarray]:
    """A deterministic model, and one of several seeds that lifts some of its users."""
    rng = np.random.default_rng(2)
    base = rng.random((1, users)) < 0.3
    model = np.clip(base + (rng.random((seeds, users)) < lift), 0, 1)
    return {"popularity": base.astype(float), "model": model.astype(float)}


@given(st.lists(SHARES, min_size=1, max_size=10), SHARES)
@settings(deadline=None, max_examples=50)
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values, level):
    adjusted = statistics.holm({str(i): p for i, p in enumerate(p_values)})
    rejected = set()
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if (len(p_values) - place) * p_values[i] > level:
            break
        rejected.add(i)
    assert {i for i in range(len(p_values)) if adjusted[str(i)] <= level} == rejected or level == 1.0
    assert list(adjusted) == [str(i) for i in range(len(p_values))]
    assert all(p <= adjusted[str(i)] <= 1.0 for i, p in enumerate(p_values))


def test_a_detectable_difference_is_detected_four_times_in_five():
    spread, users = 0.4, 300
    size = statistics.detectable_difference(spread / np.sqrt(users), users - 1)
    samples = np.random.default_rng(0).normal(size, spread, (users, 2000))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=0).pvalue < 0.05) == pytest.approx(0.8, abs=0.03)


def test_three_seeds_reject_a_true_null_as_often_as_the_level_and_cover_the_truth():
    rng = np.random.default_rng(1)
    for spread in (0.0, 0.02, 0.05):  # seeds add nothing, as much as users do, and nearly all
        rejected, covered, over_users_alone = [], [], []
        for _ in range(200):
            values = drawn(rng, spread)
            (null,) = statistics.compare(values, "m0")
            rejected.append(null.p_value < 0.05)
            covered.append(null.difference.low <= 0 <= null.difference.high)
            mean = values["m1"].mean(0) - values["m0"].mean(0)
            over_users_alone.append(abs(mean.mean()) / mean.std(ddof=1) * np.sqrt(mean.size) > 1.97)
        assert np.mean(rejected) == pytest.approx(0.05, abs=0.045)
        assert covered == np.logical_not(rejected).tolist()
        if spread:
            assert np.mean(over_users_alone) > np.mean(rejected) + 0.05


def test_with_seeds_alone_a_comparison_is_welch_s_and_other_models_do_not_change_it():
    rng = np.random.default_rng(3)
    means = {"a": rng.normal(0.0, 0.1, 3), "b": rng.normal(0.1, 0.02, 4)}
    values = {name: np.tile(of_seeds[:, None], 50) for name, of_seeds in means.items()}
    (comparison,) = statistics.compare(values, "a")
    wanted = stats.ttest_ind(means["b"], means["a"], equal_var=False)
    assert (comparison.p_value, comparison.degrees) == pytest.approx((wanted.pvalue, wanted.df))
    values = drawn(rng, 0.02)
    (alone,) = statistics.compare(values, "m0")
    among, _ = statistics.compare(values | {"unstable": drawn(rng, 0.5)["m1"]}, "m0")
    assert among._replace(adjusted_p=among.p_value) == alone


def test_without_seeds_a_comparison_is_the_paired_t_test():
    values = {"a": np.random.default_rng(0).random((1, 50)), "b": np.random.default_rng(1).random((1, 50))}
    (comparison,) = statistics.compare(values, "a", ["a", "b"])
    wanted = stats.ttest_rel(values["b"][0], values["a"][0])
    assert (comparison.p_value, comparison.degrees) == pytest.approx((wanted.pvalue, 49))
    assert comparison.difference[1:] == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    (same,) = statistics.compare({"a": values["a"], "b": values["a"]}, "a", ["a", "b"])
    assert (same.p_value, same.claim) == (1.0, "not separated")


def test_a_comparison_is_of_means_over_seeds_and_users_and_says_what_may_be_said():
    values = models(3, 0.2)
    (lifted,) = statistics.compare(values, "popularity", ["popularity"])
    difference = values["model"].mean(0) - values["popularity"][0]
    assert lifted.difference.mean == pytest.approx(difference.mean())
    assert lifted.seed_range == (values["model"].mean(1).min(), values["model"].mean(1).max())
    assert lifted.detectable > 2.8016 * 0.99 * difference.std(ddof=1) / np.sqrt(400)
    three = {name: np.tile(rows, (3, 1))[:3] for name, rows in values.items()}
    comparisons = statistics.compare(three | {"twin": three["model"]}, "model")
    assert {each.name: each.claim for each in comparisons} == {"popularity": "worse", "twin": "not separated"}


def test_trap_single_seed_carries_no_claim():
    for seeds, claim in ((1, "too few seeds"), (2, "too few seeds"), (3, "better")):
        (lifted,) = statistics.compare(models(seeds, 0.2), "popularity", ["popularity"])
        assert (lifted.seeds, lifted.claim) == ((seeds, 0), claim)
        assert lifted.difference.mean > 0.1  # it is the seeds that are missing, not the difference


def test_what_cannot_be_paired_or_divided_is_refused():
    a, two_seeds, four_users = np.zeros((1, 3)), np.zeros((2, 3)), np.zeros((1, 4))
    part = Evaluation(histories([3]), np.ones(1, dtype=np.int32))
    refused("no model 'b': expected one of a", statistics.compare, {"a": a}, "b")
    refused(r"expected \(seeds, 3 users\)", statistics.compare, {"a": a, "b": four_users}, "a")
    refused(r"'b' .* expected \(1, 3 users\)", statistics.compare, {"a": a, "b": two_seeds}, "a", ["b"])
    counts = np.array([1, 2])
    refused("'shares'", statistics.by_item_popularity, counts, counts, (0.5, 1.5))
    refused("'keep_last' is -1", statistics.shuffled, part, 0, -1)


def test_bootstrap_interval_agrees_with_the_normal_one_and_is_reproducible():
    values = np.random.default_rng(0).normal(0.3, 1.0, 2000)
    interval = statistics.bootstrap(values, samples=1000, seed=1)
    mean, half = values.mean(), 1.96 * values.std() / np.sqrt(len(values))
    assert interval == pytest.approx((mean, mean - half, mean + half), abs=0.15 * half)
    assert interval == statistics.bootstrap(values, samples=1000, seed=1)


def test_groups_by_source_need_it_in_every_id():
    groups = statistics.by_source(np.array(["books:1", "toys:a:b", "books:2"]))
    assert groups.labels == ["books", "toys"]
    assert groups.member.tolist() == [0, 1, 0]
    assert statistics.by_source(np.array(["books:1", "2"])) is None


def test_groups_by_history_length_and_item_popularity_and_results_in_them():
    groups = statistics.by_history_length(histories([1, 9, 10, 19, 20, 50]), edges=(10, 20))
    assert groups.labels == ["below 10", "10 to 19", "20 or more"]
    assert groups.member.tolist() == [0, 0, 1, 1, 2, 2]
    counts = np.array([0, 50, 10, 30, 10])  # item 2 has half of all interactions, item 4 the next 30 %
    groups = statistics.by_item_popularity(np.array([1, 2, 3, 4, 5]), counts, shares=(0.5, 0.8))
    assert groups.labels[0] == "items with 0% to 50% of interactions"
    assert groups.member.tolist() == [3, 0, 2, 1, 2]
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    groups = statistics.Groups(["few", "many", "none"], np.array([0, 0, 1, 1, 1, 1]))
    results = statistics.in_groups(values, groups, samples=500)
    means = [(result.users, result.interval and result.interval.mean) for result in results]
    assert means == [(2, 0.5), (4, 0.75), (0, None)]
    assert results[1].interval == statistics.bootstrap(values[2:], 500)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.tuples(*[st.integers(0, 9)] * 6))
@settings(deadline=None, max_examples=50)
def test_concentration_equals_brute_force(items, counts):
    top, counts = np.array(items)[:, None], np.array(counts)
    shares = statistics.concentration(top, counts)
    given_out = [items.count(item) for item in range(1, 7)]
    gaps = np.abs(np.subtract.outer(given_out, given_out)).mean()
    assert shares["gini"] == pytest.approx(gaps / (2 * np.mean(given_out)))
    assert shares["coverage"] == len(set(items)) / 6
    head: list[int] = []
    for item in sorted(range(1, 7), key=lambda item: -counts[item - 1]):
        if counts[[item - 1 for item in head]].sum() < counts.sum() / 2:
            head.append(item)
    assert shares["head_share"] == pytest.approx(np.mean([item in head for item in items]))


def test_popularity_percentile_by_hand():
    counts = np.array([5, 1, 1, 9, 3])  # ranks from below: 3, 0.5, 0.5, 4, 2
    percentiles = statistics.popularity_percentile(np.array([[4, 1], [2, 3]]), counts)
    assert percentiles.tolist() == pytest.approx([(4 + 3) / 2 / 4, 0.5 / 4])


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_shuffled_histories_hold_the_same_items_and_keep_the_last(lengths, keep, seed):
    whole = histories([length + 2 for length in lengths])
    part = Evaluation(whole._replace(starts=whole.starts + 2), np.arange(len(lengths), dtype=np.int32))
    before = whole.items.copy()
    shuffled = statistics.shuffled(part, seed, keep)
    assert (shuffled.targets == part.targets).all()
    assert (whole.items == before).all()
    for user, length in enumerate(lengths):
        old, new = (history_of(each, user) for each in (part, shuffled))
        assert sorted(new) == sorted(old)
        assert new[max(0, length - keep) :] == old[max(0, length - keep) :]


def test_trap_weak_order_shows_in_the_shuffle_control():
    """On a cycle order decides all; on independent draws it decides nothing."""

    def hit_rate(part: Evaluation) -> float:
        return float(metrics.hit(metrics.rank(model.scores(part), part, remove_seen=False).ranks, 1).mean())

    rng = np.random.default_rng(0)
    cycle = (rng.integers(0, 20, 300)[:, None] + np.arange(12)) % 20 + 1
    independent = rng.choice(20, (300, 12), p=np.arange(1, 21) / 210) + 1
    falls = []
    for rows in (cycle, independent):
        ends = np.arange(12, rows.size + 1, 12)
        whole = Histories(rows.ravel().astype(np.int32), ends - 12, ends - 1)
        part = Evaluation(whole, rows[:, -1].astype(np.int32))
        model = baselines.fit_markov(whole, 20, smoothing=5.0)
        falls.append(hit_rate(part) - hit_rate(statistics.shuffled(part, 0)))
        assert hit_rate(statistics.shuffled(part, 0, keep_last=1)) == hit_rate(part)
    assert falls[0] > 0.8
    assert abs(falls[1]) < 0.06
