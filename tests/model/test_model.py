"""Parameter counts, packing inside the encoder, and what must not leak."""

import pytest
import torch
from small_models import NUM_ITEMS, small_model

from reclib.config import SIZES, model_config
from reclib.cost import work
from reclib.model.bert4rec import Bert4Rec, Dropout, count_parameters

EXACT = {"5m": 5_118_250, "85m": 85_111_814, "130m": 130_095_750, "430m": 429_153_286}


def test_parameter_counts_are_the_published_ones_and_those_of_the_planner():
    changes = [{"output_bias": False}, {"head": "mlp"}, {"table_dim": 8}, {"table_dim": 48, "tied": False}]
    for config in [*map(model_config, SIZES), *(model_config("nano", **change) for change in changes)]:
        counted = count_parameters(config)
        assert sum(work.parameters(config).values()) == counted["total"]
        assert counted["total"] == sum(counted[k] for k in ("item_tables", "positions", "non_embedding"))
    assert {size: count_parameters(model_config(size))["total"] for size in EXACT} == EXACT


SEGMENTS = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])


def drawn(**changes: object) -> tuple[Bert4Rec, torch.Tensor]:
    """A model and the items of the row."""
    torch.manual_seed(0)
    return Bert4Rec(small_model(**changes)).eval(), torch.randint(1, NUM_ITEMS + 1, (1, 12))


@torch.no_grad()
def test_a_packed_segment_has_the_states_it_has_alone_and_queries_those_of_the_whole_row():
    queries = torch.tensor([[7, 0, 3, 3]])
    for norm, causal in (("pre", False), ("post", False), ("pre", True)):
        model, items = drawn(norm=norm, causal=causal)
        row = (items, SEGMENTS, POSITIONS)
        whole = model.double().encode(*row)
        assert whole.isfinite().all()
        for part in (slice(5), slice(5, 9)):
            torch.testing.assert_close(whole[:, part], model.encode(*(x[:, part] for x in row)))
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


@torch.no_grad()
def test_item_vectors_of_their_own_width_are_tables_of_low_rank():
    for tied, width, head, scaled in [(True, 4, "linear", 0), (False, 4, "mlp", 1), (True, 40, "linear", 0)]:
        narrow, items = drawn(tied=tied, table_dim=width, head=head, scale_items=bool(scaled))
        plain, _ = drawn(tied=False, head=head)
        state = narrow.double().state_dict()
        into, out = state.pop("table_in"), state.pop("table_out")  # (D, E) and (E, D)
        scale = plain.config.hidden_dim**0.5 if scaled else 1.0
        state["item_table.weight"] = scale * state["item_table.weight"] @ into.T
        state["output_weight"] = state["output_weight"] @ out
        plain.double().load_state_dict(state)
        row = (items, SEGMENTS, POSITIONS)
        torch.testing.assert_close(narrow.logits(narrow.encode(*row)), plain.logits(plain.encode(*row)))
        assert float(narrow.encode(*row).std()) > 0.1


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
    first, second = drop(x), drop(x)
    torch.manual_seed(3)
    assert torch.equal(first, drop(x))
    assert not torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(gradient, first.detach())
    assert drop.eval()(x) is x
