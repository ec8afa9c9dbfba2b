"""Ranks against a brute-force twin, metrics against an independent library, and what a protocol changes."""

import ir_measures
import numpy as np
import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NUM_ITEMS, histories, history_of, scores_after, small_model

from reclib.config import changed
from reclib.data.dataset import Evaluation
from reclib.data.splits import Split
from reclib.evaluate import metrics, statistics
from reclib.evaluate.metrics import Outcome, Scores
from reclib.model.bert4rec import Bert4Rec

CPU = torch.device("cpu")
SCORE = st.one_of(st.sampled_from([0.0, 1.0, -1.0, float("nan")]), st.floats(-5, 5, width=32))


def evaluation_of(lengths: list[int], num_items: int = NUM_ITEMS) -> Evaluation:
    targets = np.random.default_rng(1).integers(1, num_items + 1, len(lengths)).astype(np.int32)
    return Evaluation(histories(lengths, num_items=num_items), targets)


def fixed(scores: torch.Tensor) -> metrics.Scorer:
    """A model that gives these scores, a few users at a time and not in their order."""

    def score(evaluation: Evaluation) -> Scores:
        for users in np.array_split(np.arange(len(evaluation.targets))[::-1], 3):
            if users.size:
                yield users, scores[torch.from_numpy(users.copy())].clone()

    return score


def uniform_negatives(part: Evaluation, num_items: int, count: int, seed: int) -> np.ndarray:
    """Items that are neither target nor history, without repetition, one user at a time."""
    rng = np.random.default_rng(seed)
    every = set(range(1, num_items + 1))
    pools = [sorted(every - {*history_of(part, u), int(t)}) for u, t in enumerate(part.targets)]
    return np.array([rng.choice(pool, count, replace=False) for pool in pools], dtype=np.int32)


def side_by_side(score: metrics.Scorer, part: Evaluation, candidates: dict) -> dict[str, Outcome]:
    """Outcomes by the end of their protocol's name: `removed`, `kept`, `uniform`."""
    outcomes, top = metrics.side_by_side(score, part, candidates, top_k=3)
    np.testing.assert_array_equal(top, metrics.rank(score(part), part, remove_seen=True, top_k=3).top)
    return {outcome.protocol.split()[-1]: outcome for outcome in outcomes}


@settings(deadline=None, max_examples=50)
@given(st.data(), st.integers(2, 30), st.integers(1, 5), st.booleans())
def test_ranks_equal_brute_force(data, items, users, remove_seen):
    rows = [data.draw(st.lists(SCORE, min_size=items, max_size=items)) for _ in range(users)]
    targets = data.draw(st.lists(st.integers(1, items), min_size=users, max_size=users))
    seen = [data.draw(st.sets(st.integers(1, items))) for _ in range(users)]
    pairs = [(u, i) for u in range(users) for i in seen[u]]
    index = tuple(torch.tensor([p[k] for p in pairs], dtype=torch.long) for k in (0, 1))
    removed = index if remove_seen else None
    ranks, top = metrics.rank_scores(torch.tensor(rows), torch.tensor(targets), removed, top_k=3)
    for u, target in enumerate(targets):
        gone = seen[u] - {target} if remove_seen else set()
        left = {i: score for i, score in enumerate(rows[u], 1) if i not in gone}
        own = left.pop(target)
        assert ranks[u] == (items if np.isnan(own) else 1 + sum(score >= own for score in left.values()))
        known = sorted((score for score in [*left.values(), own] if score == score), reverse=True)
        assert [rows[u][i - 1] for i in top[u].tolist()][: len(known)] == known[:3]


def test_the_best_of_a_wide_catalogue_equal_a_full_sort():
    for items in (700, 1000, 1001):
        scores = torch.randn(40, items, generator=torch.Generator().manual_seed(0))
        scores[3, 5:9], scores[4] = float("nan"), float("-inf")
        scores[4, 17] = 0.0
        wanted = scores.nan_to_num(nan=float("-inf"), neginf=float("-inf"))
        columns = metrics.best(scores.clone(), 10)
        assert (wanted.gather(1, columns) == wanted.sort(descending=True).values[:, :10]).all()
        assert all(len(set(row.tolist())) == 10 for row in columns)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.sampled_from(metrics.KS))
@settings(deadline=None, max_examples=30)
def test_metrics_equal_ir_measures(ranks, k):
    names = [f"u{u}" for u in range(len(ranks))]
    relevant = [ir_measures.Qrel(u, "target", 1) for u in names]
    run = [
        ir_measures.ScoredDoc(u, "target" if place == rank else f"d{place}", -float(place))
        for u, rank in zip(names, ranks, strict=True)
        for place in range(1, 51)
    ]
    measures = [ir_measures.R @ k, ir_measures.nDCG @ k, ir_measures.RR]
    wanted = ir_measures.calc_aggregate(measures, relevant, run)
    values = metrics.summary(np.array(ranks))
    for name, measure in zip((f"hr@{k}", f"ndcg@{k}", "mrr"), measures, strict=True):
        assert values[name] == pytest.approx(wanted[measure])


def test_model_scores_are_streamed_and_equal_one_user_at_a_time(monkeypatch):
    monkeypatch.setattr(metrics, "SCORE_BYTES", 3 * 4 * NUM_ITEMS)  # three users at a time
    part = evaluation_of([3, 30, 1, 11, 5, 5, 8])
    for tied in (True, False):
        torch.manual_seed(0)
        model = Bert4Rec(small_model(tied=tied)).train()
        torch.nn.init.normal_(model.output_bias)
        pieces = [(u, s.clone()) for u, s in metrics.model_scores(model, part, CPU, batch_size=5)]
        assert model.training  # as it was before
        assert max(len(scores) for _, scores in pieces) <= 3
        assert sorted(np.concatenate([users for users, _ in pieces])) == list(range(7))
        for users, scores in pieces:
            assert scores.shape[1] == NUM_ITEMS  # neither PAD nor MASK is a candidate
            for user, row in zip(users, scores, strict=True):
                wanted = scores_after(model, history_of(part, user)[-11:])
                torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


def test_scores_in_16_bit_precision_are_not_rounded_into_ties(monkeypatch):
    torch.manual_seed(0)
    model = Bert4Rec(changed(small_model(), num_items=3000))
    states, score_product = [], metrics.score_product

    def product(hidden, table, out):
        states.append(hidden.clone())
        return score_product(hidden, table, out)

    monkeypatch.setattr(metrics, "score_product", product)
    with torch.autocast("cpu", torch.bfloat16):
        pieces = metrics.model_scores(model, evaluation_of([3, 30, 1, 11, 5]), CPU)
        scores = torch.cat([values.clone() for _, values in pieces])
    exact = torch.nn.functional.linear(states[0], model.output_weight[1:3001], model.output_bias[1:3001])
    kept, wanted, low = ([len(row.unique()) for row in s] for s in (scores, exact, exact.bfloat16()))
    assert kept == wanted
    assert max(low) < 2000  # what a product in bf16 would leave of 3000


def test_each_way_to_rank_equals_its_own_computation_and_says_what_it_is():
    part = evaluation_of([3, 9, 1, 14, 5, 6, 2])
    scores = torch.randn(7, NUM_ITEMS, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    negatives = uniform_negatives(part, NUM_ITEMS, 8, 0)
    outcomes = side_by_side(fixed(scores), part, {"uniform": negatives, "popularity": negatives})
    for remove_seen, name in ((True, "removed"), (False, "kept")):
        wanted = metrics.rank(fixed(scores)(part), part, remove_seen=remove_seen).ranks
        assert outcomes[name].ranks.tolist() == wanted.tolist()
    for user, target in enumerate(part.targets):
        wanted = 1 + (scores[user, negatives[user] - 1] >= scores[user, target - 1]).sum()
        assert outcomes["uniform"].ranks[user] == wanted
    for outcome in outcomes.values():
        assert ("sampled, not comparable" in outcome.label) == (not outcome.comparable)
        assert outcome.comparable == ("full ranking" in outcome.label)
    split = Split("global time", part.histories, part, part, {})
    outcome = metrics.under_split(fixed(scores), split, remove_seen=False)
    assert outcome.label == "global time, full ranking, seen items kept"
    assert outcome.ranks.tolist() == outcomes["kept"].ranks.tolist()


def test_trap_rank_ties_are_pessimistic_under_every_protocol():
    part = evaluation_of([3, 4, 5])
    negatives = {"uniform": uniform_negatives(part, NUM_ITEMS, 7, 0)}
    for value in (0.0, float("nan"), float("-inf")):
        outcomes = side_by_side(fixed(torch.full((3, NUM_ITEMS), value)), part, negatives)
        assert (outcomes["uniform"].ranks == 8).all()
        assert (outcomes["kept"].ranks == NUM_ITEMS).all()
        left = NUM_ITEMS - np.array([len(set(history_of(part, user))) for user in range(3)])
        assert (outcomes["removed"].ranks == (NUM_ITEMS if np.isnan(value) else left)).all()
    model = Bert4Rec(small_model())
    with torch.no_grad():
        model.output_weight.zero_()  # a collapsed model: all scores alike
    assert (metrics.masked_positions(model, part, CPU).ranks == model.config.output_rows).all()


def test_trap_pad_and_mask_are_candidates_in_the_seed_metric_only():
    part = evaluation_of([5, 6, 7])
    for tied in (True, False):
        model = Bert4Rec(small_model(tied=tied))
        with torch.no_grad():  # PAD and MASK win everywhere
            model.output_bias[0] = model.output_bias[NUM_ITEMS + 1] = 100.0
        with_special = metrics.masked_positions(model, part, CPU)
        without = metrics.masked_positions(model, part, CPU, special_tokens=False)
        assert "not comparable" in with_special.label
        assert (with_special.ranks == without.ranks + 2).all()


def test_masked_positions_equal_one_window_at_a_time(monkeypatch):
    torch.manual_seed(0)
    model = Bert4Rec(small_model(dropout=0.3)).train()  # whose scores would be random were it not set to eval
    part = evaluation_of([3, 30, 0, 11, 5, 5, 8])
    masked: list[np.ndarray] = []
    windows = metrics._windows

    def watched(*given):
        for users, samples in windows(*given):
            masked.extend(np.split(samples.is_target, np.cumsum(samples.lengths)[:-1]))
            yield users, samples

    monkeypatch.setattr(metrics, "_windows", watched)
    monkeypatch.setattr(metrics, "SCORE_BYTES", 4 * 4 * 39)  # four positions at a time
    outcome = metrics.masked_positions(model, part, CPU, mask_prob=0.4, seed=2, batch_size=3)
    assert model.training
    model.eval()
    for user, target in enumerate(part.targets):
        window = torch.tensor([*history_of(part, user), int(target)][-model.config.max_len :])
        visible = window.clone()
        visible[torch.from_numpy(masked[user])] = model.config.mask_id
        with torch.no_grad():
            ones, places = torch.ones(1, len(window), dtype=torch.int64), torch.arange(len(window))[None]
            scores = model.logits(model.encode(visible[None], ones, places)[0])
        wanted = [int((scores[p] >= scores[p, window[p]]).sum()) for p in np.flatnonzero(masked[user])]
        assert sorted(outcome.ranks[outcome.users == user].tolist()) == sorted(wanted)
        assert masked[user][-1]  # the last item, which is the target, is always masked
    assert len(outcome.ranks) > 12
    refused("reads both sides", metrics.masked_positions, Bert4Rec(small_model(causal=True)), part, CPU)


def test_intervals_draw_users_with_all_of_their_positions():
    """With a rank a user they are the bootstrap; twenty identical ranks of a user say no more than one."""

    values, users = np.random.default_rng(0).random(200), np.arange(200)
    wanted = statistics.bootstrap(values, 500, seed=4)
    assert statistics.bootstrap(values, 500, seed=4, users=users) == wanted
    once = statistics.bootstrap(values, users=users)
    many = statistics.bootstrap(np.repeat(values, 20), users=np.repeat(users, 20))
    assert many.mean == pytest.approx(once.mean)
    assert many.high - many.low == pytest.approx(once.high - once.low, rel=0.1)
    assert statistics.bootstrap(np.zeros(3), users=np.array([0, 0, 1])) == (0.0, 0.0, 0.0)


def test_candidates_of_another_evaluation_are_refused():
    part = evaluation_of([2, 2])._replace(targets=np.array([9, 4], dtype=np.int32))
    score = fixed(torch.zeros(2, NUM_ITEMS))
    for rows, message in [
        ([[1, 2]], r"shape \(1, 2\): expected \(2, count\)"),
        ([[1, 2], [3, 4]], "candidates of row 1 hold 4"),
        ([[0, 2], [3, 5]], "candidates of row 0 hold 0"),
    ]:
        refused(message, metrics.side_by_side, score, part, {"uniform": np.array(rows)})
