"""What the gate looks at: the visible prefix of its own segment and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapting import UNTIED, base, batch, rows_of
from engine import NUM_ITEMS, histories, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from reclib.config import PAD, InputError, TrainConfig
from reclib.data.batches import Epoch
from reclib.model.ilora import (
    Constant,
    MeanEmbedding,
    Noise,
    OtherSegment,
    Rows,
    State,
    first_places,
    visible_prefixes,
)

MASK = NUM_ITEMS + 1


def row(*segments: list[int], length: int = 12) -> Rows:
    """One packed row of these segments."""
    items, ids, positions = [], [], []
    for number, segment in enumerate(segments, 1):
        items += segment
        ids += [number] * len(segment)
        positions += range(len(segment))
    spare = [0] * (length - len(items))
    return Rows(*(torch.tensor([values + spare]) for values in (items, ids, positions)))


def causal() -> torch.nn.Module:
    return base(seed=5, causal=True)


def representations() -> list:
    return [MeanEmbedding(), State(), State(causal()), Noise(), OtherSegment(MeanEmbedding())]


def test_the_target_cannot_reach_the_gate():
    """Packed rows whose targets are other items, or whose one visible item is another."""
    config = TrainConfig(batch_size=8, mask_prob=0.3)
    plan = Epoch(histories([9, 4, 12, 7, 3, 8, 5, 6]), small_model(), config, 0)
    samples = plan.samples(0)
    other = samples.tokens % NUM_ITEMS + 1
    targets = np.where(samples.is_target, other, samples.tokens)
    a_visible_one = samples.tokens.copy()
    a_visible_one[np.flatnonzero(~samples.is_target)[0]] = other[np.flatnonzero(~samples.is_target)[0]]
    rows = []
    for tokens in (samples.tokens, targets, a_visible_one):
        laid = plan.layout.batch(samples._replace(tokens=tokens), *plan.placed(0))
        assert len(laid.items) < laid.num_sequences
        rows.append(Rows(*rows_of(laid)))
    for form in representations():
        before, same, another = (form.train()(base(**UNTIED), given) for given in rows)
        assert torch.equal(same, before)
        assert not torch.equal(another, before)


def test_a_segment_sees_itself_alone():
    for form in [MeanEmbedding(), State(), Noise()]:
        model = base(**UNTIED)
        before = form(model, row([3, MASK, 5], [7, 8, MASK, 9]))
        after = form(model, row([3, MASK, 6], [7, 8, MASK, 9]))
        assert torch.equal(before[0, 3:7], after[0, 3:7])
        assert float((before[0, :3] - after[0, :3]).abs().max()) > 1e-3
        assert torch.equal(before[0, :3], before[0, :1].expand(3, -1))  # one vector a segment
        alone = form(model, row([7, 8, MASK, 9]))
        torch.testing.assert_close(before[0, 3], alone[0, 0], rtol=1e-5, atol=1e-6)


def test_the_mean_is_that_of_the_visible_items():
    model = base()
    z = MeanEmbedding()(model, row([3, MASK, 5], [7]))
    table = model.item_table.weight
    torch.testing.assert_close(z[0, 1], (table[3] + table[5]) / 2)
    torch.testing.assert_close(z[0, 3], table[7])
    assert float(z[0, 4:].abs().max()) == 0


def test_a_segment_without_visible_items_has_a_zero_mean():
    assert float(MeanEmbedding()(base(), row([MASK]))[0].abs().max()) == 0


@given(
    st.lists(
        st.lists(st.integers(1, NUM_ITEMS) | st.just(MASK), min_size=1, max_size=6), min_size=1, max_size=2
    )
)
@settings(max_examples=60, deadline=None)
def test_visible_items_move_together_and_mask_follows(segments):
    model = base()
    laid, read = visible_prefixes(row(*segments), model, causal=False)
    start = 0
    for segment in segments:
        kept = [item for item in segment if item != MASK]
        wanted = [*kept, MASK][: len(segment)]
        found = laid.items[0, start : start + len(segment)].tolist()
        assert found == wanted + [PAD] * (len(segment) - len(wanted))
        assert read[0, start].item() == start + len(wanted) - 1
        assert laid.positions[0, start : start + len(wanted)].tolist() == list(range(len(wanted)))
        start += len(segment)


def test_the_base_is_read_at_mask_after_the_visible_items():
    for origin in ["first", "last"]:
        model = base(position_origin=origin)
        z = State().eval()(model, row([3, MASK, 5, 4, MASK], [7, MASK]))
        positions = [0, 1, 2, 3] if origin == "first" else [3, 2, 1, 0]
        asked = torch.tensor([[3, 5, 4, MASK]])
        wanted = model.encode(asked, torch.ones_like(asked), torch.tensor([positions]))[0, 3]
        torch.testing.assert_close(z[0, 0], wanted, rtol=1e-5, atol=1e-6)


def test_a_causal_model_is_read_at_the_last_visible_item():
    reader = causal()
    z = State(reader).eval()(base(), row([3, MASK, 5, MASK], [MASK]))
    asked = torch.tensor([[3, 5]])
    wanted = reader.encode(asked, torch.ones_like(asked), torch.tensor([[0, 1]]))[0, 1]
    torch.testing.assert_close(z[0, 0], wanted, rtol=1e-5, atol=1e-6)
    lone = torch.tensor([[MASK]])
    empty = reader.encode(lone, torch.ones_like(lone), torch.zeros_like(lone))[0, 0]
    torch.testing.assert_close(z[0, 4], empty, rtol=1e-5, atol=1e-6)


def test_in_a_causal_model_what_is_later_does_not_reach_a_place():
    for form in [MeanEmbedding(), State(), Noise()]:
        model = causal()
        before, after = form(model, row([3, 4, 5, 6])), form(model, row([3, 4, 9, 6]))
        torch.testing.assert_close(before[0, :2], after[0, :2])
        assert float((before[0, 2:4] - after[0, 2:4]).abs().max()) > 1e-3


def test_states_are_kept_where_the_same_rows_come_again(monkeypatch):
    model, form = base(), State().eval()
    rows = row([3, MASK, 5], [7, 8, MASK])
    first = form(model, rows)
    monkeypatch.setattr(model, "encode", None)
    assert torch.equal(form(model, rows), first)
    with pytest.raises(TypeError):
        form(model, row([4, MASK, 5], [7, 8, MASK]))
    with pytest.raises(TypeError):
        form.train()(model, rows)


def test_noise_is_no_function_of_single_items_and_can_be_repeated():
    model = base(hidden_dim=64)
    rows = [row([i, MASK, i + 1], [i + 1, MASK]) for i in range(1, NUM_ITEMS)]
    values = torch.stack([Noise()(model, one)[0, 0] for one in rows])
    assert abs(float(values.mean())) < 0.1
    assert float(values.std()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(values[0], Noise()(model, rows[0])[0, 0])
    assert abs(float(torch.corrcoef(values)[0, 1:].abs().max())) < 0.6


def test_no_segment_keeps_its_own_vector():
    one = batch()
    rows = Rows(*rows_of(one))
    model = base()
    own, other = MeanEmbedding()(model, rows), OtherSegment(MeanEmbedding())(model, rows)
    used = rows.segment_ids > 0
    assert float((own - other)[used].norm(dim=-1).min()) > 1e-3
    by_segment = {
        int(s): other[rows.segment_ids == s].unique(dim=0) for s in rows.segment_ids.unique() if s > 0
    }
    assert all(len(found) == 1 for found in by_segment.values())
    taken = torch.cat([*by_segment.values()]).sort(0).values
    given_ = torch.cat([own[rows.segment_ids == s][:1] for s in by_segment]).sort(0).values
    torch.testing.assert_close(taken, given_)  # a permutation of what there was


def test_a_causal_model_refuses_exchanged_vectors():
    with pytest.raises(InputError, match="shuffled_user"):
        OtherSegment(MeanEmbedding())(causal(), row([1, 2]))


def test_first_places_and_a_constant():
    rows = row([1, 2, 3], [4, 5])
    assert first_places(rows.segment_ids)[0, :6].tolist() == [0, 0, 0, 3, 3, 5]
    assert Constant()(base(), rows).unique().tolist() == [1.0]
