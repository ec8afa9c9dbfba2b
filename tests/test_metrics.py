"""Ranks against a brute-force twin, metrics against an independent library, intervals against theory."""

from __future__ import annotations

import ir_measures
import numpy as np
import pytest
import torch
from engine import NUM_ITEMS, histories, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from reclib.config import changed, model_config
from reclib.data.dataset import Evaluation
from reclib.evaluate import metrics, statistics
from reclib.model.bert4rec import Bert4Rec


def brute_force_rank(scores: list[float], target: int, seen: set[int]) -> int:
    """Rank of item `target` by one comparison at a time; ties and NaN against it."""
    own = scores[target - 1]
    if np.isnan(own):
        return len(scores)
    rivals = (s for i, s in enumerate(scores, 1) if i != target and i not in seen)
    return 1 + sum(1 for s in rivals if s >= own)


score = st.one_of(st.sampled_from([0.0, 1.0, -1.0, float("nan")]), st.floats(-5, 5, width=32))


@settings(deadline=None)
@given(st.data(), st.integers(2, 30), st.integers(1, 5), st.booleans())
def test_ranks_equal_brute_force(data, items, users, remove_seen):
    rows = [data.draw(st.lists(score, min_size=items, max_size=items)) for _ in range(users)]
    targets = data.draw(st.lists(st.integers(1, items), min_size=users, max_size=users))
    seen = [data.draw(st.sets(st.integers(1, items))) for _ in range(users)]
    pairs = [(u, i) for u in range(users) for i in seen[u]]
    index = tuple(torch.tensor([p[k] for p in pairs], dtype=torch.long) for k in (0, 1))
    ranks, top = metrics.rank_scores(
        torch.tensor(rows), torch.tensor(targets), index if remove_seen else None, top_k=3
    )
    for u in range(users):
        gone = seen[u] if remove_seen else set()
        assert ranks[u] == brute_force_rank(rows[u], targets[u], gone)
        left = [s for i, s in enumerate(rows[u], 1) if (i not in gone or i == targets[u]) and s == s]
        values = [rows[u][i - 1] for i in top[u].tolist()][: len(left)]
        assert values == sorted(left, reverse=True)[: min(3, len(left))]


@pytest.mark.parametrize("items", [700, 1000, 1001])
def test_best_of_a_wide_catalogue_equals_a_full_sort(items):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, items, generator=generator)
    scores[3, 5:9] = float("nan")
    scores[4] = float("-inf")
    scores[4, 17] = 0.0
    wanted = scores.nan_to_num(nan=float("-inf"), neginf=float("-inf"))
    found = metrics.best(scores.clone(), 10)
    torch.testing.assert_close(
        wanted.gather(1, found), wanted.sort(descending=True).values[:, :10], equal_nan=True
    )
    assert all(len(set(row.tolist())) == 10 for row in found)


@given(st.data(), st.integers(1, 20), st.integers(1, 30))
def test_counting_equals_comparing_one_by_one(data, users, items):
    rows = [data.draw(st.lists(score, min_size=items, max_size=items)) for _ in range(users)]
    threshold = data.draw(st.lists(score, min_size=users, max_size=users))
    found = metrics.count_at_least(torch.tensor(rows), torch.tensor(threshold)[:, None])
    wanted = [sum(s >= t for s in row) for row, t in zip(rows, threshold, strict=True)]
    assert found.tolist() == wanted


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.sampled_from(metrics.KS))
@settings(deadline=None)
def test_metrics_equal_ir_measures(ranks, k):
    ranks = np.array(ranks)
    names = [f"u{u}" for u in range(len(ranks))]
    relevant = [ir_measures.Qrel(u, "target", 1) for u in names]
    run = [
        ir_measures.ScoredDoc(u, "target" if place == rank else f"d{place}", -float(place))
        for u, rank in zip(names, ranks, strict=True)
        for place in range(1, 51)
    ]
    measures = [ir_measures.R @ k, ir_measures.nDCG @ k, ir_measures.RR]
    wanted = ir_measures.calc_aggregate(measures, relevant, run)
    found = metrics.summary(ranks)
    assert found[f"hr@{k}"] == pytest.approx(wanted[measures[0]])
    assert found[f"ndcg@{k}"] == pytest.approx(wanted[measures[1]])
    assert found["mrr"] == pytest.approx(wanted[measures[2]])


def evaluation_of(lengths: list[int]) -> Evaluation:
    seen = histories(lengths)
    targets = np.random.default_rng(1).integers(1, NUM_ITEMS + 1, len(lengths)).astype(np.int32)
    return Evaluation(seen, targets)


@pytest.mark.parametrize("tied", [True, False])
def test_model_scores_are_streamed_and_equal_one_user_at_a_time(tied, monkeypatch):
    monkeypatch.setattr(metrics, "SCORE_BYTES", 3 * 4 * NUM_ITEMS)  # three users at a time
    torch.manual_seed(0)
    model = Bert4Rec(small_model(tied=tied))
    part = evaluation_of([3, 30, 1, 11, 5, 5, 8])
    streamed = metrics.model_scores(model, part, torch.device("cpu"), batch_size=5)
    pieces = [(users, scores.clone()) for users, scores in streamed]
    assert max(len(scores) for _, scores in pieces) <= 3
    assert sorted(np.concatenate([users for users, _ in pieces])) == list(range(7))
    for users, scores in pieces:
        assert scores.shape[1] == NUM_ITEMS  # neither PAD nor MASK is a candidate
        for user, row in zip(users, scores, strict=True):
            history = part.histories.items[part.histories.starts[user] : part.histories.ends[user]][-11:]
            items = torch.tensor([[*history, NUM_ITEMS + 1]])
            ones = torch.ones_like(items)
            with torch.no_grad():
                state = model.encode(items, ones, torch.arange(items.shape[1])[None])[0, -1:]
                wanted = model.logits(state)[0, 1 : NUM_ITEMS + 1]
            torch.testing.assert_close(row, wanted, rtol=1e-4, atol=1e-5)


def test_scores_in_16_bit_precision_are_not_rounded_into_ties(monkeypatch):
    torch.manual_seed(0)
    model = Bert4Rec(changed(small_model(), num_items=3000))
    part = evaluation_of([3, 30, 1, 11, 5])
    calls, score_product = [], metrics.score_product

    def product(hidden, table, out):
        calls.append((hidden.clone(), table))
        return score_product(hidden, table, out)

    monkeypatch.setattr(metrics, "score_product", product)
    with torch.autocast("cpu", torch.bfloat16):
        scores = torch.cat(
            [values.clone() for _, values in metrics.model_scores(model, part, torch.device("cpu"))]
        )
    ((hidden, table),) = calls
    exact = torch.nn.functional.linear(
        hidden.float(), *(x[1:3001] for x in (model.output_weight, model.output_bias))
    )

    def distinct(values):
        return [len(row.unique()) for row in values]

    assert scores.dtype == torch.float32
    assert distinct(scores) == distinct(exact)
    assert max(distinct(exact.bfloat16())) < 2000  # what a product in bf16 would leave of 3000
    # On CUDA 16-bit states and tables are multiplied, and only their sums stay fp32.
    halves = torch.mm(hidden.bfloat16().float(), table.bfloat16().float().t())
    assert min(distinct(halves)) >= min(distinct(exact)) * 0.99
    with FakeTensorMode():
        states = torch.empty(5, 16, device="cuda", dtype=torch.float32)
        half = torch.empty(3000, 16, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(5, 3000, device="cuda")
        assert score_product(states, half, out).dtype == torch.float32


def test_passes_follow_the_memory_of_a_gpu_and_stay_as_they_were_on_a_cpu():
    seed = model_config("85m")
    assert metrics.pass_sizes(seed, None) == (256, 64 * 2**20)
    assert metrics.pass_sizes(seed, 80 * 2**30) == (4096, 2**30)
    sizes = [metrics.pass_sizes(model_config("430m"), gib * 2**30) for gib in (1, 16, 24, 80, 141)]
    assert sizes == sorted(sizes)
    assert sizes[0] == (256, 64 * 2**20)
    assert sizes[1][1] == 2**29


def test_scoring_leaves_the_model_in_the_mode_it_was_in():
    model = Bert4Rec(small_model()).train()
    list(metrics.model_scores(model, evaluation_of([3, 4]), torch.device("cpu")))
    assert model.training


def test_popularity_counts_training_interactions_only():
    data = histories([4, 6, 3])
    counts = metrics.popularity(data, NUM_ITEMS)
    assert counts.sum() == 13
    assert (counts == np.bincount(data.items, minlength=NUM_ITEMS + 1)[1:]).all()


def test_constant_scores_rank_every_user_alike_without_filter():
    part = evaluation_of([3, 4, 5])
    part = part._replace(targets=np.array([2, 2, 2], dtype=np.int32))
    values = np.arange(NUM_ITEMS, 0, -1, dtype=np.float32)
    ranking = metrics.rank(metrics.constant_scores(values, part), part, remove_seen=False, top_k=2)
    assert ranking.ranks.tolist() == [2, 2, 2]
    assert ranking.top.tolist() == [[1, 2]] * 3


def test_bootstrap_interval_agrees_with_the_normal_one_and_is_reproducible():
    values = np.random.default_rng(0).normal(0.3, 1.0, 2000)
    found = statistics.bootstrap(values, samples=2000, seed=1)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert found == statistics.bootstrap(values, samples=2000, seed=1)
