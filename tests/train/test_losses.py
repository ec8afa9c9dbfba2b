"""Losses: the fast step equals the plain one in every gradient; sampled ones equal their formulas."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NUM_ITEMS, histories, loss_and_gradients, small_model, worst_difference

from reclib.config import TrainConfig, changed
from reclib.data.batches import IGNORE, Epoch
from reclib.model.bert4rec import Bert4Rec
from reclib.train import losses
from reclib.train.losses import batch_loss, cross_entropy_sum, gbce, sampled_sum, softmax_losses
from reclib.train.trainer import clip_gradients

PLAIN = {"layout": "padded", "head_rows": "all", "loss": "plain"}
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}


SHAPES: dict[str, tuple] = {"num_layers": (1, 2, 3), "norm": ("pre", "post"), "head": ("linear", "mlp")}
SHAPES |= {"position_origin": ("first", "last"), "table_dim": (None, 4, 16)}
SHAPES |= dict.fromkeys(("tied", "output_bias", "causal", "scale_items"), (False, True))
FAST = {"loss": ("chunked", "inplace", "plain"), "micro_batch_size": (None, 4)}


def any_of(options: dict[str, tuple]) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in options.items()})


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    mask_prob=st.floats(0.05, 0.9),
    visible=st.booleans(),
    seed=st.integers(0, 1000),
    shape=any_of(SHAPES),
    fast=any_of(FAST),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_packed_gathered_chunked_equals_plain_padded(lengths, mask_prob, visible, seed, shape, fast, dtype):
    model, data = small_model(**shape), histories([*lengths, 2], seed)  # one history has a next item
    objective = "next_item" if model.causal else "cloze"
    targets = {"mask_prob": mask_prob, "visible_targets": visible and not model.causal}
    plain = TrainConfig(batch_size=12, seed=seed, objective=objective, **targets, **PLAIN)
    wanted, wanted_gradients = loss_and_gradients(model, plain, data, dtype)
    train = changed(plain, layout="packed", head_rows="targets", **fast)
    loss, gradients = loss_and_gradients(model, train, data, dtype)
    assert loss == pytest.approx(wanted, rel=LIMIT[dtype])
    assert worst_difference(gradients, wanted_gradients) < LIMIT[dtype]


@pytest.mark.parametrize("how", ["plain", "chunked", "inplace"])
def test_routes_agree_with_torch_and_skip_fillers(how, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK_BYTES", 1)  # in place: one row at a time
    torch.manual_seed(0)
    head = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((6, 8), (12, 8), (12,))]
    hidden, weight, bias = head
    targets = torch.tensor([1, 10, 5, IGNORE, 7, IGNORE])
    loss = cross_entropy_sum(*head, targets, 10, how)
    scores = (hidden @ weight.T + bias)[:, 1:11]
    kept = targets != IGNORE
    wanted = torch.nn.functional.cross_entropy(scores[kept], targets[kept] - 1, reduction="sum")
    torch.testing.assert_close(loss, wanted)
    # of PAD and MASK, which are no items: zero
    torch.testing.assert_close(torch.autograd.grad(loss, head), torch.autograd.grad(wanted, head))


@pytest.mark.parametrize("how", ["plain", "chunked", "inplace"])
def test_under_autocast_the_products_run_in_bf16_and_the_loss_is_fp32(how):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(12, 8, requires_grad=True)
    targets = torch.tensor([1, 10, 5, 2, 7, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = cross_entropy_sum(hidden, weight, None, targets, 10, how)
    rounded = (hidden.bfloat16() @ weight[1:11].bfloat16().T).float()
    wanted = torch.nn.functional.cross_entropy(rounded, targets - 1, reduction="sum")
    assert low.dtype == torch.float32
    assert float(low.detach()) == pytest.approx(float(wanted.detach()), rel=3e-3)
    assert low != cross_entropy_sum(hidden, weight, None, targets, 10, how)
    low.backward()
    assert weight.grad.dtype == torch.float32


def test_the_fused_route_is_the_plain_one_compiled(monkeypatch):
    """With one compilation for all numbers of targets; without a C++ compiler, hence the tracing backend."""
    monkeypatch.setattr(losses.torch, "compile", partial(torch.compile, backend="aot_eager"))
    losses._compiled_sum.cache_clear()
    model, train = small_model(tied=False), TrainConfig(batch_size=4, loss="plain")
    for lengths in ([9, 5, 12, 7], [3, 4], [12, 11, 12, 12]):
        data = histories(lengths)
        wanted, plain = loss_and_gradients(model, train, data)
        loss, fused = loss_and_gradients(model, changed(train, loss="fused"), data)
        assert loss == pytest.approx(wanted, rel=1e-5)
        assert worst_difference(fused, plain) < 1e-5
    losses._compiled_sum.cache_clear()


def test_no_loss_waits_for_the_device(monkeypatch):
    """Forward, backward and clipping ask no tensor for its value: one without values refuses to tell it.

    A tensor on the meta device takes the ways that a GPU's takes, since it is not on a CPU; fake CUDA tensors
    need a build of torch for CUDA as soon as gradients are asked for.
    """
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # which knows no device meta
    for read in (bool, torch.Tensor.item, torch.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read(torch.ones((), device="meta"))
    model = small_model(hidden_dim=64, num_layers=3, dropout=0.1, tied=False)
    base = TrainConfig(batch_size=8, num_negatives=8, mask_prob=0.3, bucket_steps=1)
    for loss in ("plain", "chunked", "inplace", "sampled_softmax", "gbce"):
        (real,) = Epoch(histories([9, 5, 12, 7, 3, 8, 4, 6]), model, changed(base, loss=loss), 0).step(0)
        assert (real.targets == IGNORE).any()
        there = {k: v.to("meta") for k, v in real._asdict().items() if isinstance(v, torch.Tensor)}
        train = changed(base, loss=loss)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.device("meta"):
                module = Bert4Rec(model).to(dtype)
                parameters = list(module.parameters())
                optimizer = torch.optim.AdamW(parameters, fused=False)
                batch_loss(module, real._replace(**there), train, torch.full((), 9.0)).backward()
                clip_gradients(parameters, 1.0, optimizer)
            assert all(p.grad.shape == p.shape for p in parameters)


def test_seed_objective_is_focal_over_every_real_position():
    model = small_model(num_layers=1)
    train = TrainConfig(batch_size=3, objective="seed_focal", last_item_share=0.0, **PLAIN)
    epoch = Epoch(histories([9, 5, 12]), model, train, 0)
    (batch,), tokens = epoch.step(0), epoch.samples(0).labels
    torch.manual_seed(0)
    module = Bert4Rec(model).eval()
    with torch.no_grad():
        loss = batch_loss(module, batch, train, batch.num_tokens)
        logits = module.logits(module.encode(batch.items, batch.segment_ids, batch.positions))
        real = batch.segment_ids > 0
        chance = logits[real].softmax(-1).gather(1, torch.as_tensor(tokens).long()[:, None])
    torch.testing.assert_close(loss, (-(1 - chance) * chance.log()).mean())


ITEMS = 10


def made(negatives: list[int], probs: list[float]):
    """A batch of four targets, one of them a filler, and a random head."""
    (batch,) = Epoch(histories([6]), small_model(), TrainConfig(batch_size=1), 0).step(0)
    torch.manual_seed(0)
    batch = batch._replace(
        targets=torch.tensor([3, 10, IGNORE, 1]),
        negatives=torch.tensor(negatives),
        negative_probs=torch.tensor(probs, dtype=torch.float64),
    )
    sizes = (4, 6), (12, 6), (12,)
    head = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in sizes]
    return batch, head


def test_every_item_drawn_once_is_the_full_softmax():
    batch, head = made(list(range(1, ITEMS + 1)), [1 / ITEMS] * ITEMS)
    loss = sampled_sum(*head, batch, ITEMS, TrainConfig(loss="sampled_softmax"))
    wanted = cross_entropy_sum(*head, batch.targets, ITEMS, "plain")
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss, head), torch.autograd.grad(wanted, head))


def test_with_logq_the_partition_is_estimated_without_bias_whatever_is_drawn_often():
    torch.manual_seed(1)
    scores = torch.randn(ITEMS, dtype=torch.float64)
    odds = torch.rand(ITEMS, dtype=torch.float64) ** 3 + 0.01
    odds /= odds.sum()
    drawn = torch.multinomial(odds, 200_000, replacement=True)
    target = 4
    log_weight = -torch.log(len(drawn) * odds[drawn])
    loss = softmax_losses(scores[target][None], scores[drawn][None], (drawn == target)[None], log_weight)
    assert float(loss) == pytest.approx(float(-scores.log_softmax(0)[target]), abs=0.02)
    naive = softmax_losses(scores[target][None], scores[drawn][None], (drawn == target)[None], None)
    assert abs(float(naive) - float(loss)) > 1


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce_is_the_papers_formula(t):
    positive = torch.tensor([0.3, -1.2], dtype=torch.float64)
    scores = torch.tensor([[0.5, -0.5, 2.0], [0.1, 0.2, 0.3]], dtype=torch.float64)
    clash = torch.tensor([[False, True, False], [False, False, False]])
    rate = 3 / (ITEMS - 1)
    beta = rate * (t * (1 - 1 / rate) + 1 / rate)
    wanted = [
        -(beta * math.log(1 / (1 + math.exp(-p))) + sum(math.log(1 - 1 / (1 + math.exp(-s))) for s in row))
        for p, row in [(0.3, [0.5, 2.0]), (-1.2, [0.1, 0.2, 0.3])]
    ]
    assert gbce(positive, scores, clash, ITEMS, t).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("loss", ["sampled_softmax", "gbce"])
def test_only_drawn_items_and_targets_learn(loss):
    batch, head = made([2, 7], [0.1, 0.1])
    sampled_sum(*head, batch, ITEMS, TrainConfig(loss=loss)).backward()
    touched = head[1].grad.abs().sum(1) > 0
    assert touched.nonzero().flatten().tolist() == [1, 2, 3, 7, 10]
    assert (head[0].grad[2] == 0).all()  # the filler


def test_micro_batches_share_a_steps_negatives():
    config = TrainConfig(batch_size=4, micro_batch_size=2, loss="gbce", num_negatives=16)
    first, second = Epoch(histories([5, 6, 7, 8]), small_model(), config, 0).step(0)
    assert first.negatives.tolist() == second.negatives.tolist()
    assert len(first.negatives) == 16
    assert 1 <= int(first.negatives.min()) <= int(first.negatives.max()) <= NUM_ITEMS
