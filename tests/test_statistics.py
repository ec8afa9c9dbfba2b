"""Tests and intervals against enumeration, textbook values and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from engine import histories
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from reclib.config import InputError
from reclib.data.dataset import Evaluation, Histories
from reclib.evaluate import baselines, metrics, statistics

SHARES = st.floats(0, 1)


@given(st.lists(SHARES, min_size=1, max_size=10), SHARES)
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
    rng = np.random.default_rng(0)
    size = statistics.detectable_difference(spread / np.sqrt(users), users - 1)
    p_values = stats.ttest_1samp(rng.normal(size, spread, (users, 2000)), 0, axis=0).pvalue
    assert np.mean(p_values < 0.05) == pytest.approx(0.8, abs=0.03)


def drawn(rng, seed_spread: float, lift: float = 0.0, seeds: int = 3, users: int = 400, arms: int = 2):
    """Models of equal mean but for `lift` of the last; users, seeds and their interaction vary."""
    user = rng.normal(0.2, 0.3, users)

    def one(add: float) -> np.ndarray:
        own = user + rng.normal(0, 0.15, users)
        return add + own + rng.normal(0, seed_spread, (seeds, 1)) + rng.normal(0, 0.25, (seeds, users))

    return {f"m{i}": one(lift if i == arms - 1 else 0.0) for i in range(arms)}


def test_three_seeds_reject_a_true_null_as_often_as_the_level_and_cover_the_truth():
    rng = np.random.default_rng(1)
    for spread in (0.0, 0.01, 0.05):  # seeds add nothing, as much as users do, and nearly all
        rejected, covered, over_users_alone = [], [], []
        for _ in range(500):
            values = drawn(rng, spread, lift=0.02)
            values["m0"] = values["m0"] + 0.02  # the same truth in both
            (null,) = statistics.compare(values, "m0")
            rejected.append(null.p_value < 0.05)
            (lifted,) = statistics.compare(values | {"m0": values["m0"] - 0.02}, "m0")
            covered.append(lifted.difference.low <= 0.02 <= lifted.difference.high)
            mean = values["m1"].mean(0) - values["m0"].mean(0)
            over_users_alone.append(stats.ttest_1samp(mean, 0).pvalue < 0.05)
        assert np.mean(rejected) == pytest.approx(0.05, abs=0.035)
        assert np.mean(covered) == pytest.approx(0.95, abs=0.035)
        if spread:
            assert np.mean(over_users_alone) > np.mean(rejected) + 0.05


def test_many_arms_of_three_seeds_have_one_false_claim_in_twenty_and_find_what_is_there():
    rng = np.random.default_rng(2)
    false, found = [], []
    for _ in range(100):
        null = statistics.compare(drawn(rng, 0.01, arms=30), "m0")
        false.append(any(one.adjusted_p < 0.05 for one in null))
        real = statistics.compare(drawn(rng, 0.01, lift=0.15, arms=30), "m0")
        found.append(real[-1].claim == "better")
    assert np.mean(false) <= 0.11
    assert np.mean(found) > 0.8


def test_without_seeds_a_comparison_is_the_paired_t_test():
    values = {"a": np.random.default_rng(0).random((1, 50)), "b": np.random.default_rng(1).random((1, 50))}
    (found,) = statistics.compare(values, "a", ["a", "b"])
    wanted = stats.ttest_rel(values["b"][0], values["a"][0])
    assert found.p_value == pytest.approx(wanted.pvalue)
    assert found.difference[1:] == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert found.degrees == pytest.approx(49)
    (same,) = statistics.compare({"a": values["a"], "b": values["a"]}, "a", ["a", "b"])
    assert (same.p_value, same.claim) == (1.0, "not separated")


def models(seeds: int, lift: float, users: int = 400) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    base = rng.random((1, users)) < 0.3
    model = np.clip(base + (rng.random((seeds, users)) < lift), 0, 1)
    return {"popularity": base.astype(float), "model": model.astype(float)}


def test_a_comparison_is_of_means_over_seeds_and_users():
    values = models(3, 0.2)
    (found,) = statistics.compare(values, "popularity", ["popularity"])
    difference = values["model"].mean(0) - values["popularity"][0]
    assert found.difference.mean == pytest.approx(difference.mean())
    assert found.seed_range == (values["model"].mean(1).min(), values["model"].mean(1).max())
    assert found.seeds == (3, 0)
    assert found.claim == "better"
    assert found.detectable > 2.8016 * 0.99 * difference.std(ddof=1) / np.sqrt(400)


def test_a_worse_model_and_an_equal_one_are_called_so():
    values = {name: np.tile(rows, (3, 1))[:3] for name, rows in models(3, 0.2).items()}
    values["twin"] = values["model"].copy()
    found = {one.name: one.claim for one in statistics.compare(values, "model")}
    assert found == {"popularity": "worse", "twin": "not separated"}


def test_trap_single_seed_carries_no_claim():
    for seeds, claim in ((1, "too few seeds"), (2, "too few seeds"), (3, "better")):
        (found,) = statistics.compare(models(seeds, 0.2), "popularity", ["popularity"])
        assert found.claim == claim
        assert found.difference.mean > 0.1  # it is the seeds that are missing, not the difference


def test_many_comparisons_are_corrected():
    rng = np.random.default_rng(0)
    values = {"reference": np.zeros((3, 60))} | {f"m{i}": rng.normal(0, 1, (3, 60)) for i in range(8)}
    found = statistics.compare(values, "reference")
    wanted = statistics.holm({one.name: one.p_value for one in found})
    assert {one.name: one.adjusted_p for one in found} == wanted
    assert any(one.adjusted_p > one.p_value for one in found)


def test_what_cannot_be_paired_is_refused():
    for values, reference, deterministic, message in [
        ({"a": np.zeros((1, 3))}, "b", [], "no model 'b': expected one of a"),
        ({"a": np.zeros((1, 3)), "b": np.zeros((1, 4))}, "a", [], "expected \\(seeds, 3 users\\)"),
        ({"a": np.zeros((1, 3)), "b": np.zeros(3)}, "a", [], "shape \\(3,\\)"),
        ({"a": np.zeros((2, 3)), "b": np.zeros((1, 3))}, "b", ["a"], "'a' is said to be deterministic"),
    ]:
        with pytest.raises(InputError, match=message):
            statistics.compare(values, reference, deterministic)


def test_groups_by_history_length():
    groups = statistics.by_history_length(histories([1, 9, 10, 19, 20, 50]), edges=(10, 20))
    assert groups.labels == ["below 10", "10 to 19", "20 or more"]
    assert groups.member.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(InputError, match="'edges' is \\[20, 10\\]"):
        statistics.by_history_length(histories([3]), edges=(20, 10))


def test_groups_by_item_popularity_hold_the_stated_shares():
    counts = np.array([0, 50, 10, 30, 10])  # item 2 has half of all interactions, item 4 the next 30 %
    groups = statistics.by_item_popularity(np.array([1, 2, 3, 4, 5]), counts, shares=(0.5, 0.8))
    assert groups.labels[0] == "items with 0% to 50% of interactions"
    assert groups.member.tolist() == [3, 0, 2, 1, 2]
    with pytest.raises(InputError, match="'shares'"):
        statistics.by_item_popularity(np.array([1]), counts, shares=(0.5, 1.5))


def test_results_in_groups_have_counts_and_intervals():
    values = np.array([0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    groups = statistics.Groups(["few", "many", "none"], np.array([0, 0, 1, 1, 1, 1]))
    few, many, none = statistics.in_groups(values, groups, samples=500)
    assert (few.users, many.users, none.users) == (2, 4, 0)
    assert few.interval.mean == 0.5
    assert many.interval == statistics.bootstrap(values[2:], 500)
    assert none.interval is None


def test_coverage_and_gini_of_one_item_for_all_and_of_all_alike():
    one, even = np.full((8, 1), 3), np.arange(1, 9)[:, None]
    assert statistics.coverage(one, 8) == 1 / 8
    assert statistics.coverage(even, 8) == 1.0
    assert statistics.gini(one, 8) == pytest.approx(7 / 8)  # 1 - 1 / I is its largest value
    assert statistics.gini(even, 8) == pytest.approx(0.0)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=30))
def test_gini_is_the_mean_absolute_difference_over_twice_the_mean(items):
    counts = np.bincount(items, minlength=7)[1:]
    wanted = np.abs(counts[:, None] - counts[None]).mean() / (2 * counts.mean())
    assert statistics.gini(np.array(items)[:, None], 6) == pytest.approx(wanted)


def test_popularity_percentile_by_hand():
    counts = np.array([5, 1, 1, 9, 3])  # ranks from below: 3, 0.5, 0.5, 4, 2
    found = statistics.popularity_percentile(np.array([[4, 1], [2, 3]]), counts)
    assert found.tolist() == pytest.approx([(4 + 3) / 2 / 4, 0.5 / 4])


def test_an_even_choice_has_a_popularity_percentile_of_one_half():
    counts = np.random.default_rng(0).integers(0, 50, 101)
    assert statistics.popularity_percentile(np.arange(1, 102)[None], counts)[0] == pytest.approx(0.5)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    keep=st.integers(0, 3),
    seed=st.integers(0, 9),
)
@settings(deadline=None)
def test_shuffled_histories_hold_the_same_items_and_keep_the_last(lengths, keep, seed):
    whole = histories([length + 2 for length in lengths])
    part = Evaluation(whole._replace(starts=whole.starts + 2), np.arange(len(lengths), dtype=np.int32))
    before = whole.items.copy()
    found = statistics.shuffled(part, seed, keep)
    assert (found.targets == part.targets).all()
    assert (whole.items == before).all()
    for u, length in enumerate(lengths):
        old = part.histories.items[part.histories.starts[u] : part.histories.ends[u]].tolist()
        new = found.histories.items[found.histories.starts[u] : found.histories.ends[u]].tolist()
        assert sorted(new) == sorted(old)
        tail = min(keep, length)
        assert new[length - tail :] == old[length - tail :]


def test_shuffles_are_seeded_uniform_and_independent():
    items = np.tile(np.arange(1, 5, dtype=np.int32), 6000)
    ends = np.arange(4, len(items) + 1, 4)
    part = Evaluation(Histories(items, ends - 4, ends), np.ones(6000, dtype=np.int32))
    found = statistics.shuffled(part, 1).histories.items.reshape(-1, 4)
    assert (found == statistics.shuffled(part, 1).histories.items.reshape(-1, 4)).all()
    assert not (found == statistics.shuffled(part, 2).histories.items.reshape(-1, 4)).all()
    _, counts = np.unique(found, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4
    with pytest.raises(InputError, match="'keep_last' is -1"):
        statistics.shuffled(part, 0, -1)


def hit_rate(recommender: baselines.Recommender, part: Evaluation) -> float:
    return float(metrics.hit(metrics.rank(recommender.scores(part), part, remove_seen=False).ranks, 1).mean())


def test_trap_weak_order_shows_in_the_shuffle_control():
    """On a cycle order decides all; on independent draws it decides nothing."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 20, 300)
    cycle = (first[:, None] + np.arange(12)) % 20 + 1
    independent = rng.choice(20, (300, 12), p=np.arange(1, 21) / 210) + 1
    fall = {}
    for name, rows in (("cycle", cycle), ("independent", independent)):
        ends = np.arange(12, rows.size + 1, 12)
        whole = Histories(rows.ravel().astype(np.int32), ends - 12, ends - 1)
        part = Evaluation(whole, rows[:, -1].astype(np.int32))
        model = baselines.fit_markov(whole, 20, smoothing=5.0)
        fall[name] = hit_rate(model, part) - hit_rate(model, statistics.shuffled(part, 0))
        assert hit_rate(model, statistics.shuffled(part, 0, keep_last=1)) == hit_rate(model, part)
    assert fall["cycle"] > 0.8
    assert abs(fall["independent"]) < 0.06
