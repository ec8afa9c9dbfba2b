"""Parameter counts, packing inside the encoder, and what must not leak."""

from __future__ import annotations

import pytest
import torch
from small_models import NUM_ITEMS, small_model

from reclib.config import SIZES, model_config
from reclib.cost import work
from reclib.model.bert4rec import Bert4Rec, Dropout, attention_bias, count_parameters

EXACT = {"5m": 5_118_250, "85m": 85_111_814, "130m": 130_095_750, "430m": 429_153_286}


def test_parameter_counts_are_the_published_ones_and_those_of_the_planner():
    configs = [model_config(size) for size in SIZES]
    for changes in (
        {"tied": True, "output_bias": False},
        {"tied": False, "output_bias": True},
        {"head": "mlp"},
        {"table_dim": 8},
        {"table_dim": 48, "tied": False},
    ):
        configs.append(model_config("nano", **changes))
    for config in configs:
        counted = count_parameters(config)
        assert sum(work.parameters(config).values()) == counted["total"]
        assert counted["total"] == sum(counted[k] for k in ("item_tables", "positions", "non_embedding"))
    assert {size: count_parameters(model_config(size))["total"] for size in EXACT} == EXACT


# -- one row with segments of 5 and 4 places and 3 unused ones -----------------------------------------------

SEGMENTS = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])


def drawn(**changes: object) -> tuple[Bert4Rec, torch.Tensor]:
    """A model and the items of the row."""
    torch.manual_seed(0)
    return Bert4Rec(small_model(**changes)).eval(), torch.randint(1, NUM_ITEMS + 1, (1, 12))


@torch.no_grad()
def test_segments_and_padding_do_not_reach_each_other():
    for norm, num_layers in (("pre", 1), ("pre", 2), ("post", 1), ("post", 2)):
        model, items = drawn(norm=norm, num_layers=num_layers)
        other = items.clone()
        other[0, 5:] = 1 + other[0, 5:] % NUM_ITEMS
        before, after = (model.encode(x, SEGMENTS, POSITIONS) for x in (items, other))
        assert torch.equal(before[0, :5], after[0, :5])
        assert not torch.allclose(before[0, 5:9], after[0, 5:9])
        assert before.isfinite().all()


@torch.no_grad()
def test_a_packed_segment_has_the_states_it_has_alone_and_queries_those_of_the_whole_row():
    queries = torch.tensor([[7, 0, 3, 3]])
    for norm in ("pre", "post"):
        model, items = drawn(norm=norm)
        row = (items, SEGMENTS, POSITIONS)
        whole = model.double().encode(*row)
        torch.testing.assert_close(whole[:, 5:9], model.encode(*(x[:, 5:9] for x in row)))
        torch.testing.assert_close(model.encode(*row, queries), whole[:, queries[0]])


@torch.no_grad()
def test_a_causal_model_does_not_see_what_is_later():
    segments, positions = torch.tensor([[1] * 5 + [2] * 7]), torch.tensor([[*range(5), *range(7)]])
    for norm in ("pre", "post"):
        model, items = drawn(causal=True, norm=norm, num_layers=3)
        before = model.encode(items, segments, positions)
        items[0, 7] = items[0, 7] % NUM_ITEMS + 1
        changed = (before - model.encode(items, segments, positions)).abs().amax(-1)[0] > 0
        assert changed.tolist() == [False] * 7 + [True] * 5  # itself and the later ones of its segment


def test_the_attention_bias_is_zero_inside_a_segment_and_that_of_queries_is_part_of_the_whole():
    bias = attention_bias(torch.tensor([[1, 1, 2, 0]]), torch.float32)[0, 0]
    assert (bias == 0).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert bias[bias != 0].isneginf().all()
    segments, queries = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]]), torch.tensor([[4, 0], [3, 5]])
    for causal in (False, True):
        whole = attention_bias(segments, torch.float32, causal)
        some = attention_bias(segments, torch.float32, causal, queries)
        assert torch.equal(some, whole.gather(2, queries[:, None, :, None].expand(-1, -1, -1, 6)))


@torch.no_grad()
def test_item_vectors_of_their_own_width_are_tables_of_low_rank():
    for tied, width, head in ((True, 4, "linear"), (False, 4, "mlp"), (True, 40, "linear")):
        narrow, items = drawn(tied=tied, table_dim=width, head=head)
        plain, _ = drawn(tied=False, head=head)
        state = narrow.double().state_dict()
        into, out = state.pop("table_in"), state.pop("table_out")  # (D, E) and (E, D)
        state["item_table.weight"] = state["item_table.weight"] @ into.T
        state["output_weight"] = state["output_weight"] @ out
        plain.double().load_state_dict(state)
        row = (items, SEGMENTS, POSITIONS)
        torch.testing.assert_close(narrow.logits(narrow.encode(*row)), plain.logits(plain.encode(*row)))
        assert float(narrow.encode(*row).std()) > 0.1


@torch.no_grad()
def test_scaled_items_are_those_of_a_table_times_the_root_of_the_width():
    scaled, items = drawn(tied=False, scale_items=True)
    plain, _ = drawn(tied=False)
    state = scaled.state_dict()
    state["item_table.weight"] = state["item_table.weight"] * scaled.config.hidden_dim**0.5
    plain.load_state_dict(state)
    row = (items, SEGMENTS, POSITIONS)
    torch.testing.assert_close(scaled.encode(*row), plain.encode(*row))


def test_dropout_zeroes_its_share_keeps_the_expectation_and_is_decided_by_torchs_seed():
    torch.manual_seed(0)
    y = Dropout(0.1).train()(torch.ones(1000, 1003))
    assert float((y == 0).float().mean()) == pytest.approx(0.1, abs=0.001)  # three standard errors
    assert float(y.mean()) == pytest.approx(1.0, abs=0.001)
    assert y.unique().numel() == 2
    columns = (y == 0).float().mean(0)
    assert float(columns.std()) == pytest.approx((0.1 * 0.9 / 1000) ** 0.5, rel=0.1)  # no pattern in it
    x, drop = torch.ones(7, 5, requires_grad=True), Dropout(0.4)
    torch.manual_seed(3)
    one, two = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(one, drop(x))
    assert not torch.equal(one, two)
    (gradient,) = torch.autograd.grad(one.sum(), x)
    assert torch.equal(gradient, one.detach())
    assert drop.eval()(x) is x
