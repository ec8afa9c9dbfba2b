"""The fast step equals the plain one, in loss and in every gradient."""

from __future__ import annotations

import pytest
import torch
from engine import histories, loss_and_gradients, small_model, worst_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from reclib import cross_entropy
from reclib.batching import IGNORE, Epoch
from reclib.config import TrainConfig, changed
from reclib.cross_entropy import InplaceCrossEntropy
from reclib.model import Bert4Rec
from reclib.objective import batch_loss, cross_entropy_sum, route

PLAIN = {"layout": "padded", "head_rows": "all", "loss": "plain"}
LIMIT = {torch.float32: 1e-5, torch.float64: 1e-10}


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    mask_prob=st.floats(0.05, 0.9),
    seed=st.integers(0, 1000),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    norm=st.sampled_from(["pre", "post"]),
    head=st.sampled_from(["linear", "mlp"]),
    bias=st.booleans(),
    origin=st.sampled_from(["first", "last"]),
    loss=st.sampled_from(["chunked", "inplace", "plain"]),
    micro=st.sampled_from([None, 4]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_packed_gathered_chunked_equals_plain_padded(
    lengths, mask_prob, seed, layers, tied, norm, head, bias, origin, loss, micro, causal, dtype
):
    shape = {"num_layers": layers, "tied": tied, "norm": norm, "head": head, "output_bias": bias}
    model = small_model(**shape, position_origin=origin, causal=causal)
    data = histories([*lengths, 2], seed)  # one history at least has a next item
    objective = "next_item" if causal else "cloze"
    plain = TrainConfig(batch_size=12, mask_prob=mask_prob, seed=seed, objective=objective, **PLAIN)
    fast = changed(plain, layout="packed", head_rows="targets", loss=loss, micro_batch_size=micro)
    wanted, wanted_gradients = loss_and_gradients(model, plain, data, dtype)
    found, found_gradients = loss_and_gradients(model, fast, data, dtype)
    assert found == pytest.approx(wanted, rel=LIMIT[dtype])
    assert worst_difference(found_gradients, wanted_gradients) < LIMIT[dtype]


def test_the_measure_sees_a_wrong_gradient():
    data, train = histories([9, 5, 12]), TrainConfig(batch_size=3, **PLAIN)
    _, gradients = loss_and_gradients(small_model(), train, data)
    wrong = dict(gradients) | {"output_bias": gradients["output_bias"] * 1.001}
    assert worst_difference(wrong, gradients) > 1e-5


@pytest.mark.parametrize("how", ["plain", "chunked", "inplace"])
def test_routes_agree_with_torch_and_skip_fillers(how):
    torch.manual_seed(0)
    hidden = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 10, 5, IGNORE, 7, IGNORE])
    found = cross_entropy_sum(hidden, weight, bias, targets, 10, how)
    scores = (hidden @ weight.T + bias)[:, 1:11]
    kept = targets != IGNORE
    wanted = torch.nn.functional.cross_entropy(scores[kept], targets[kept] - 1, reduction="sum")
    torch.testing.assert_close(found, wanted)
    for got, right in zip(
        torch.autograd.grad(found, (hidden, weight, bias)),
        torch.autograd.grad(wanted, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_inplace_route_by_numerical_differentiation_and_in_small_blocks(monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 1)  # one row at a time
    torch.manual_seed(0)
    arguments = (
        torch.randn(5, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(9, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(9, dtype=torch.float64, requires_grad=True),
    )
    targets = torch.tensor([1, 7, IGNORE, 3, 3])
    assert torch.autograd.gradcheck(lambda h, w, b: InplaceCrossEntropy.apply(h, w, b, targets, 7), arguments)


@pytest.mark.parametrize("how", ["plain", "chunked", "inplace"])
def test_special_rows_get_no_gradient(how):
    hidden = torch.randn(3, 8)
    weight = torch.randn(12, 8, requires_grad=True)
    cross_entropy_sum(hidden, weight, None, torch.tensor([1, 2, 3]), 10, how).backward()
    assert (weight.grad[[0, 11]] == 0).all()
    assert (weight.grad[1:11] != 0).any(dim=1).all()


@pytest.mark.parametrize("how", ["plain", "chunked", "inplace"])
def test_under_autocast_the_products_run_in_bf16_and_the_loss_is_fp32(how):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(12, 8, requires_grad=True)
    targets = torch.tensor([1, 10, 5, 2, 7, 4])
    full = cross_entropy_sum(hidden, weight, None, targets, 10, how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = cross_entropy_sum(hidden, weight, None, targets, 10, how)
    rounded = (hidden.bfloat16() @ weight[1:11].bfloat16().T).float()
    wanted = torch.nn.functional.cross_entropy(rounded, targets - 1, reduction="sum")
    assert low.dtype == torch.float32
    assert float(low.detach()) == pytest.approx(float(wanted.detach()), rel=3e-3)
    assert low != full
    low.backward()
    assert weight.grad.dtype == torch.float32


def test_route_by_device_and_size():
    assert route("auto", "cpu", 240, 160_000) == "inplace"
    assert route("auto", "cuda", 240, 160_000) == "plain"
    assert route("auto", "cuda", 4096, 160_000) == "chunked"
    assert route("plain", "cuda", 10**6, 10**6) == "plain"


def test_seed_objective_is_focal_over_every_real_position():
    data = histories([9, 5, 12])
    model = small_model(num_layers=1)
    train = TrainConfig(
        batch_size=3, objective="seed_focal", layout="padded", head_rows="all", last_item_share=0.0
    )
    epoch = Epoch(data, model, train, 0)
    (batch,) = epoch.step(0)
    torch.manual_seed(0)
    module = Bert4Rec(model).eval()
    with torch.no_grad():
        found = batch_loss(module, batch, train, batch.num_tokens)
        samples = epoch.samples(0)
        logits = module.logits(module.encode(batch.items, batch.segment_ids, batch.positions))
        real = batch.segment_ids > 0
        chance = logits[real].softmax(-1).gather(1, torch.as_tensor(samples.tokens).long()[:, None])
    wanted = (-(1 - chance) * chance.log()).mean()
    torch.testing.assert_close(found, wanted)
