"""What the gate looks at: the visible prefix of its own segment and nothing else."""

import numpy as np
import pytest
import torch
from adapting import UNTIED, base, batch, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NUM_ITEMS, histories, small_model

from reclib.config import PAD, AdapterConfig, InputError, TrainConfig
from reclib.data.batches import Epoch
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import Representation, Rows, visible_prefixes

MASK = NUM_ITEMS + 1
CAUSAL = base(seed=5, causal=True)


def row(*segments: list[int], length: int = 12) -> Rows:
    """One packed row of these segments."""
    items, ids, positions = [], [], []
    for number, segment in enumerate(segments, 1):
        items += segment
        ids += [number] * len(segment)
        positions += range(len(segment))
    spare = [0] * (length - len(items))
    return Rows(*(torch.tensor([values + spare]) for values in (items, ids, positions)))


def form(name: str = "mean_embedding", control: str = "none", of: Bert4Rec | None = None) -> Representation:
    """What a gate reads; `of` is the base if it is no small model that sees both sides."""
    config = AdapterConfig(kind="ilora", representation=name, control=control)
    return Representation(config, small_model() if of is None else of.config, CAUSAL).eval()


def forms(**more: object) -> list[Representation]:
    return [form(**more), form("base_state", **more), form(control="noise", **more)]


def test_the_target_cannot_reach_the_gate():
    """Packed rows whose targets are other items, or whose one visible item is another."""
    train = TrainConfig(batch_size=8, mask_prob=0.3)
    plan = Epoch(histories([9, 4, 12, 7, 3, 8, 5, 6]), small_model(), train, 0)
    samples = plan.samples(0)
    a_visible_one = np.arange(len(samples.tokens)) == np.flatnonzero(~samples.is_target)[0]
    rows = []
    for changed in (np.zeros_like(a_visible_one), samples.is_target, a_visible_one):
        tokens = np.where(changed, samples.tokens % NUM_ITEMS + 1, samples.tokens)
        rows.append(Rows(*rows_of(plan.layout.batch(samples._replace(tokens=tokens), *plan.placed(0)))))
    for one in (*forms(), form("causal_state"), form(control="shuffled_user")):
        before, same, another = (one.train()(base(**UNTIED), given) for given in rows)
        assert torch.equal(same, before)
        assert not torch.equal(another, before)


def test_a_segment_sees_itself_alone():
    model = base(**UNTIED)
    for one in forms():
        before = one(model, row([3, MASK, 5], [7, 8, MASK, 9]))
        after = one(model, row([3, MASK, 6], [7, 8, MASK, 9]))
        assert torch.equal(before[0, 3:7], after[0, 3:7])
        assert float((before[0, :3] - after[0, :3]).abs().max()) > 1e-3
        assert torch.equal(before[0, :3], before[0, :1].expand(3, -1))  # one vector a segment
        alone = one(model, row([7, 8, MASK, 9]))
        torch.testing.assert_close(before[0, 3], alone[0, 0], rtol=1e-5, atol=1e-6)


def test_in_a_causal_model_what_is_later_does_not_reach_a_place():
    for one in forms(of=CAUSAL):
        before, after = one(CAUSAL, row([3, 4, 5, 6])), one(CAUSAL, row([3, 4, 9, 6]))
        torch.testing.assert_close(before[0, :2], after[0, :2])
        assert float((before[0, 2:4] - after[0, 2:4]).abs().max()) > 1e-3
    with pytest.raises(InputError, match="shuffled_user"):
        form(control="shuffled_user", of=CAUSAL)


def test_the_mean_is_that_of_the_visible_items_and_zero_without_any():
    model = base()
    z = form()(model, row([3, MASK, 5], [7], [MASK]))[0]
    table = model.item_table.weight
    torch.testing.assert_close(z[1], (table[3] + table[5]) / 2)
    torch.testing.assert_close(z[3], table[7])
    assert float(z[4:].abs().max()) == 0


SEGMENT = st.lists(st.integers(1, NUM_ITEMS) | st.just(MASK), min_size=1, max_size=6)


@given(st.lists(SEGMENT, min_size=1, max_size=2))
@settings(max_examples=60, deadline=None)
def test_visible_items_move_together_and_mask_follows(segments):
    laid, read = visible_prefixes(row(*segments), CAUSAL, causal=False)
    start = 0
    for segment in segments:
        wanted = [*(item for item in segment if item != MASK), MASK][: len(segment)]
        found = laid.items[0, start : start + len(segment)].tolist()
        assert found == wanted + [PAD] * (len(segment) - len(wanted))
        assert read[0, start].item() == start + len(wanted) - 1
        assert laid.positions[0, start : start + len(wanted)].tolist() == list(range(len(wanted)))
        start += len(segment)


def test_a_model_is_read_at_mask_after_the_visible_items_and_a_causal_one_at_the_last_of_them():
    def state(model: Bert4Rec, items: list[int], positions: list[int]) -> torch.Tensor:
        asked = torch.tensor([items])
        return model.encode(asked, torch.ones_like(asked), torch.tensor([positions]))[0, -1]

    near = {"rtol": 1e-5, "atol": 1e-6}
    for origin, positions in (("first", [0, 1, 2, 3]), ("last", [3, 2, 1, 0])):
        model = base(position_origin=origin)
        z = form("base_state")(model, row([3, MASK, 5, 4, MASK], [7, MASK]))
        torch.testing.assert_close(z[0, 0], state(model, [3, 5, 4, MASK], positions), **near)
    z = form("causal_state")(base(), row([3, MASK, 5, MASK], [MASK]))
    torch.testing.assert_close(z[0, 0], state(CAUSAL, [3, 5], [0, 1]), **near)
    torch.testing.assert_close(z[0, 4], state(CAUSAL, [MASK], [0]), **near)


def test_states_are_kept_where_the_same_rows_come_again(monkeypatch):
    model, one, rows = base(), form("base_state"), row([3, MASK, 5], [7, 8, MASK])
    first = one(model, rows)
    monkeypatch.setattr(model, "encode", None)
    assert torch.equal(one(model, rows), first)
    for again, given_ in ((one, row([4, MASK, 5], [7, 8, MASK])), (one.train(), rows)):
        with pytest.raises(TypeError):
            again(model, given_)


def test_controls_noise_can_be_repeated_and_segments_exchange_their_vectors():
    model, noise = base(hidden_dim=64), form(control="noise")
    rows = [row([i, MASK, i + 1], [i + 1, MASK]) for i in range(1, NUM_ITEMS)]
    values = torch.stack([noise(model, one)[0, 0] for one in rows])
    assert abs(float(values.mean())) < 0.1
    assert float(values.std()) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(values[0], noise(model, rows[0])[0, 0])
    assert abs(float(torch.corrcoef(values)[0, 1:].abs().max())) < 0.6
    assert form(control="static_gate")(model, rows[0]).unique().tolist() == [1.0]
    packed, model = Rows(*rows_of(batch())), base()
    own, other = form()(model, packed), form(control="shuffled_user")(model, packed)
    assert float((own - other)[packed.segment_ids > 0].norm(dim=-1).min()) > 1e-3  # nobody keeps its own
    segments = [packed.segment_ids == s for s in packed.segment_ids.unique() if s > 0]
    assert all(len(other[places].unique(dim=0)) == 1 for places in segments)
    one_each = [torch.cat([z[places][:1] for places in segments]).sort(0).values for z in (own, other)]
    torch.testing.assert_close(*one_each)  # a permutation of what there was
