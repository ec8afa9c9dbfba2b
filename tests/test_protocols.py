"""What the choice of protocol does to one and the same scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine import NUM_ITEMS, histories, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from reclib.config import InputError
from reclib.data.dataset import Evaluation, Histories, train_histories
from reclib.data.dataset import evaluation as evaluation_part
from reclib.data.prepare import synthetic_dataset
from reclib.data.splits import Split, sample_candidates
from reclib.evaluate import metrics, statistics
from reclib.evaluate.metrics import Scores
from reclib.model.bert4rec import Bert4Rec

CPU = torch.device("cpu")


def fixed(scores: torch.Tensor) -> metrics.Scorer:
    """A model that gives these scores, a few users at a time and not in their order."""

    def score(evaluation: Evaluation) -> Scores:
        for users in np.array_split(np.arange(len(evaluation.targets))[::-1], 3):
            if users.size:
                yield users, scores[torch.from_numpy(users.copy())].clone()

    return score


def evaluation_of(lengths: list[int], num_items: int = NUM_ITEMS) -> Evaluation:
    targets = np.random.default_rng(1).integers(1, num_items + 1, len(lengths)).astype(np.int32)
    return Evaluation(histories(lengths, num_items=num_items), targets)


def history(part: Evaluation, user: int) -> list[int]:
    return part.histories.items[part.histories.starts[user] : part.histories.ends[user]].tolist()


def uniform_negatives(part: Evaluation, num_items: int, count: int, seed: int) -> np.ndarray:
    """Items that are neither target nor history, without repetition, one user at a time."""
    rng = np.random.default_rng(seed)
    rows = []
    for user, target in enumerate(part.targets):
        pool = sorted(set(range(1, num_items + 1)) - set(history(part, user)) - {int(target)})
        rows.append(rng.choice(pool, count, replace=False))
    return np.array(rows, dtype=np.int32)


def by_name(found: list[metrics.Outcome]) -> dict[str, metrics.Outcome]:
    return {outcome.protocol: outcome for outcome in found}


def test_each_way_to_rank_equals_its_own_computation():
    part = evaluation_of([3, 9, 1, 14, 5, 6, 2])
    scores = torch.randn(7, NUM_ITEMS, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    negatives = uniform_negatives(part, NUM_ITEMS, 8, 0)
    found = by_name(metrics.side_by_side(fixed(scores), part, {"uniform": negatives}))
    for remove_seen, name in ((True, "removed"), (False, "kept")):
        wanted = metrics.rank(fixed(scores)(part), part, remove_seen).ranks
        assert found[f"leave-one-out, seen {name}"].ranks.tolist() == wanted.tolist()
    for user, target in enumerate(part.targets):
        rivals = [float(scores[user, item - 1]) for item in negatives[user]]
        wanted = 1 + sum(rival >= float(scores[user, target - 1]) for rival in rivals)
        assert found["leave-one-out, 8 uniform"].ranks[user] == wanted


def test_every_result_says_what_it_is():
    part = evaluation_of([3, 4])
    negatives = uniform_negatives(part, NUM_ITEMS, 5, 0)
    both = {"uniform": negatives, "popularity": negatives}
    for outcome in metrics.side_by_side(fixed(torch.zeros(2, NUM_ITEMS)), part, both):
        assert ("sampled, not comparable" in outcome.label) == (not outcome.comparable)
        assert outcome.comparable == ("full ranking" in outcome.label)
    model = Bert4Rec(small_model())
    assert "not comparable" in metrics.masked_positions(model, part, CPU).label


@pytest.mark.parametrize("count", [20, 100])
def test_trap_sampled_metrics_inflate_as_the_closed_form_says(count):
    """Of 400 items the full ranking finds few targets; among `count` negatives the same scores find many."""
    num_items, users = 400, 600
    part = evaluation_of([8] * users, num_items)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(users, num_items, generator=generator)
    scores[torch.arange(users), torch.from_numpy(part.targets.astype(np.int64)) - 1] += 1.0
    pool = np.array([num_items - len({*history(part, u), int(t)}) for u, t in enumerate(part.targets)])
    drawn = []
    for seed in range(4):
        negatives = {"uniform": uniform_negatives(part, num_items, count, seed)}
        found = by_name(metrics.side_by_side(fixed(scores), part, negatives))
        drawn.append(metrics.mean(found[f"leave-one-out, {count} uniform"]))
    full = found["leave-one-out, seen removed"]
    expected = metrics.expected_sampled_hit(full.ranks, pool, count)
    noise = np.sqrt((expected * (1 - expected)).sum() / 4) / users
    assert np.mean(drawn) == pytest.approx(expected.mean(), abs=4 * noise)
    assert np.mean(drawn) > metrics.mean(full) * 1.8


def test_the_closed_form_at_its_ends():
    assert metrics.expected_sampled_hit(np.array([1, 10]), 300, 100).tolist() == [1.0, 1.0]
    ranks = np.array([11, 12, 290])
    assert metrics.expected_sampled_hit(ranks, 300, 300).tolist() == [0.0, 0.0, 0.0]  # all are drawn
    # one rival too many only if every one of the ten before it is drawn
    wanted = 1 - np.prod([(100 - i) / (300 - i) for i in range(10)])
    assert metrics.expected_sampled_hit(np.array([11]), 300, 100) == pytest.approx([wanted])


def test_trap_rank_ties_are_pessimistic_under_every_protocol():
    part = evaluation_of([3, 4, 5])
    negatives = {"uniform": uniform_negatives(part, NUM_ITEMS, 7, 0)}
    for value in (0.0, float("nan"), float("-inf")):
        scores = torch.full((3, NUM_ITEMS), value)
        found = by_name(metrics.side_by_side(fixed(scores), part, negatives))
        assert (found["leave-one-out, 7 uniform"].ranks == 8).all()
        assert (found["leave-one-out, seen kept"].ranks == NUM_ITEMS).all()
        assert (found["leave-one-out, seen removed"].ranks > NUM_ITEMS - 6).all()
    model = Bert4Rec(small_model())
    with torch.no_grad():
        model.output_weight.zero_()  # a collapsed model: all scores alike
    outcome = metrics.masked_positions(model, part, CPU)
    assert (outcome.ranks == model.config.output_rows).all()


def test_trap_seen_filter_moves_the_rank_and_both_are_reported():
    part = Evaluation(
        Histories(np.array([1, 2], dtype=np.int32), np.array([0]), np.array([2])),
        np.array([3], dtype=np.int32),
    )
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    found = by_name(metrics.side_by_side(fixed(scores), part))
    assert found["leave-one-out, seen removed"].ranks.tolist() == [1]
    assert found["leave-one-out, seen kept"].ranks.tolist() == [3]
    assert "seen items removed" in found["leave-one-out, seen removed"].label
    assert "seen items kept" in found["leave-one-out, seen kept"].label


@pytest.mark.parametrize("tied", [True, False])
def test_trap_pad_and_mask_are_candidates_in_the_seed_metric_only(tied):
    model = Bert4Rec(small_model(tied=tied))
    part = evaluation_of([5, 6, 7])
    with torch.no_grad():  # PAD and MASK win everywhere
        model.output_bias[0] = model.output_bias[NUM_ITEMS + 1] = 100.0
    with_special = metrics.masked_positions(model, part, CPU).ranks
    without = metrics.masked_positions(model, part, CPU, special_tokens=False).ranks
    assert (with_special == without + 2).all()
    full = by_name(metrics.side_by_side(lambda e: metrics.model_scores(model, e, CPU), part))
    for outcome in full.values():
        top = metrics.rank(metrics.model_scores(model, part, CPU), part, False, top_k=NUM_ITEMS).top
        assert sorted(top[0].tolist()) == list(range(1, NUM_ITEMS + 1))
        assert outcome.ranks.max() <= NUM_ITEMS


def brute_force_seed_metric(model: Bert4Rec, part: Evaluation, masked: list[np.ndarray]) -> dict:
    """(user, place) -> rank, one unpacked window at a time."""
    found = {}
    for user, target in enumerate(part.targets):
        window = torch.tensor([*history(part, user), int(target)][-model.config.max_len :])
        visible = window.clone()
        visible[torch.from_numpy(masked[user])] = model.config.mask_id
        with torch.no_grad():
            ones = torch.ones(1, len(window), dtype=torch.int64)
            scores = model.logits(model.encode(visible[None], ones, torch.arange(len(window))[None])[0])
        for place in np.flatnonzero(masked[user]):
            own = scores[place, window[place]]
            found[user, int(place)] = int((scores[place] >= own).sum())
    return found


def test_masked_positions_equal_one_window_at_a_time(monkeypatch):
    torch.manual_seed(0)
    model = Bert4Rec(small_model(dropout=0.3)).train()  # whose scores would be random were it not set to eval
    part = evaluation_of([3, 30, 0, 11, 5, 5, 8])
    drawn: list[np.ndarray] = []
    windows = metrics._windows

    def watched(*given):
        for users, samples in windows(*given):
            ends = np.cumsum(samples.lengths)
            drawn.extend(np.split(samples.is_target, ends[:-1]))
            yield users, samples

    monkeypatch.setattr(metrics, "_windows", watched)
    monkeypatch.setattr(metrics, "SCORE_BYTES", 4 * 4 * 39)  # four positions at a time
    found = metrics.masked_positions(model, part, CPU, mask_prob=0.4, seed=2, batch_size=3)
    assert model.training
    wanted = brute_force_seed_metric(model.eval(), part, drawn)
    assert len(wanted) > 12
    for user in range(7):
        ours = sorted(found.ranks[found.users == user].tolist())
        assert ours == sorted(rank for (u, _), rank in wanted.items() if u == user)
        assert drawn[user][-1]  # the last item, which is the target, is always masked


def test_masks_follow_the_rule_of_the_seed_study():
    lengths = np.array([1, 4, 10])
    found = metrics.seed_mask_probability(lengths, 0.15)
    assert found[0] == 1.0
    assert found[1:5].tolist() == pytest.approx([0.15 * (0.8 + 0.4 * (1 - d / 4)) for d in (3, 2, 1)] + [1.0])
    assert found[5:14].min() == pytest.approx(0.15 * 0.84)
    assert found[5:14].max() == pytest.approx(0.15 * 1.16)
    assert (np.diff(found[5:]) > 0).all()


def test_masks_are_seeded_and_as_frequent_as_said():
    part = evaluation_of([11] * 2000)
    one, same, other = (
        [samples.is_target for _, samples in metrics._windows(part, 12, 0.15, seed, 256)]
        for seed in (0, 0, 1)
    )
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))
    share = np.concatenate(one).reshape(2000, 12).mean(axis=0)
    wanted = metrics.seed_mask_probability(np.array([12]), 0.15)
    assert share == pytest.approx(wanted, abs=4 * np.sqrt(0.17 * 0.83 / 2000))


def test_the_seed_metric_refuses_a_causal_model():
    model = Bert4Rec(small_model(causal=True))
    with pytest.raises(InputError, match="reads both sides"):
        metrics.masked_positions(model, evaluation_of([3]), CPU)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6))
@settings(deadline=None)
def test_histories_go_on_to_their_target(lengths):
    part = evaluation_of([length + 1 for length in lengths])
    part = part._replace(histories=part.histories._replace(starts=part.histories.starts + 1))
    joined = metrics.with_target(part)
    for user, target in enumerate(part.targets):
        found = joined.items[joined.starts[user] : joined.ends[user]].tolist()
        assert found == [*history(part, user), int(target)]


def test_a_model_is_scored_under_the_split_it_was_trained_under():
    part = evaluation_of([3, 4, 5, 6])
    scores = torch.randn(4, NUM_ITEMS, generator=torch.Generator().manual_seed(0))
    outcome = metrics.under_split(
        fixed(scores), Split("global time", part.histories, part, part, {}), remove_seen=False
    )
    assert outcome.label == "global time, full ranking, seen items kept"
    assert outcome.comparable
    assert outcome.ranks.tolist() == metrics.rank(fixed(scores)(part), part, False).ranks.tolist()


def outcome_of(ranks: list[int], users: list[int]) -> metrics.Outcome:
    return metrics.Outcome("p", "label", True, np.array(ranks), np.array(users))


def test_intervals_over_users_equal_the_bootstrap():
    ranks = np.random.default_rng(0).integers(1, 30, 200)
    outcome = outcome_of(ranks.tolist(), list(range(200)))
    wanted = statistics.bootstrap(metrics.ndcg(ranks, 10), 500, seed=4)
    assert metrics.interval(outcome, "ndcg@10", 500, seed=4) == wanted
    assert metrics.mean(outcome, "ndcg@10") == wanted.mean


def test_intervals_draw_users_with_all_of_their_positions():
    """Twenty identical positions of a user say no more than one of them."""
    ranks = np.random.default_rng(0).integers(1, 30, 200)
    users = np.arange(200)
    once = metrics.interval(outcome_of(ranks.tolist(), users.tolist()), samples=2000)
    many = metrics.interval(
        outcome_of(np.repeat(ranks, 20).tolist(), np.repeat(users, 20).tolist()), samples=2000
    )
    assert many.mean == pytest.approx(once.mean)
    assert many.high - many.low == pytest.approx(once.high - once.low, rel=0.1)
    assert metrics.interval(outcome_of([50, 50, 50], [0, 0, 1])) == (0.0, 0.0, 0.0)


def test_candidates_of_another_evaluation_are_refused():
    for rows, message in [
        ([[1, 2]], r"shape \(1, 2\): expected \(2, count\)"),
        ([[1, 2], [3, 4]], "candidates of row 1 hold its target"),
        ([[0, 2], [3, 5]], "hold the item 0"),
    ]:
        part = evaluation_of([2, 2])._replace(targets=np.array([9, 4], dtype=np.int32))
        with pytest.raises(InputError, match=message):
            metrics.side_by_side(
                fixed(torch.zeros(2, NUM_ITEMS)), part, {"uniform": np.array(rows, dtype=np.int32)}
            )


def test_an_unknown_metric_is_refused_by_name():
    with pytest.raises(InputError, match="'metric' is 'recall@10'"):
        metrics.mean(outcome_of([1], [0]), "recall@10")


def test_negatives_of_the_splits_give_the_hit_rate_of_the_closed_form():
    dataset = synthetic_dataset(num_users=400, num_items=300, mean_len=12.0, seed=0)
    part = evaluation_part(dataset, "test")
    counts = metrics.popularity(train_histories(dataset), dataset.num_items)
    negatives = {"uniform": [sample_candidates(dataset, part, 50, "uniform", seed) for seed in range(4)]}
    negatives["popularity"] = [sample_candidates(dataset, part, 50, "popularity", 0)]

    def score(evaluation: Evaluation) -> Scores:
        return metrics.constant_scores(counts, evaluation)

    drawn: dict[str, list[float]] = {"uniform": [], "popularity": []}
    for how, several in negatives.items():
        for items in several:
            found = by_name(metrics.side_by_side(score, part, {how: items}))
            drawn[how].append(metrics.mean(found[f"leave-one-out, 50 {how}"]))
    full = found["leave-one-out, seen removed"]
    had = [{*history(part, u), int(t)} for u, t in enumerate(part.targets)]
    pool = np.array([dataset.num_items - len(items) for items in had])
    expected = metrics.expected_sampled_hit(full.ranks, pool, 50)
    noise = np.sqrt((expected * (1 - expected)).sum() / 4) / len(expected)
    assert np.mean(drawn["uniform"]) == pytest.approx(expected.mean(), abs=4 * noise)
    # popular negatives are the rivals that popularity ranks high: the same scores look worse
    assert metrics.mean(full) < np.mean(drawn["popularity"]) < np.mean(drawn["uniform"])
