"""Masks, packing, reproducibility and prefetching."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import NUM_ITEMS, histories, small_model

from reclib.config import PAD, TrainConfig
from reclib.data import batches as reclib_batches
from reclib.data.batches import (
    IGNORE,
    Epoch,
    Layout,
    Samples,
    bucket,
    cut,
    first_fit_decreasing,
    generator,
    mask_cloze,
    negative_shares,
    next_item_batches,
    next_items,
    prefetch,
    prefixes,
    stage,
    unstage,
)
from reclib.data.dataset import Histories

lengths_of_steps = st.lists(st.lists(st.integers(0, 12), min_size=5, max_size=5), min_size=1, max_size=4)


@given(lengths_of_steps)
def test_packing_keeps_every_sequence_inside_one_row_and_overlaps_none(lengths):
    lengths = np.array(lengths)
    rows, places = first_fit_decreasing(lengths, 12)
    for step in range(len(lengths)):
        used = np.zeros((6, 12), dtype=int)
        for length, row, place in zip(lengths[step], rows[step], places[step], strict=True):
            assert place + length <= 12
            used[row, place : place + length] += 1
        assert used.max(initial=0) <= 1
        assert used.sum() == lengths[step].sum()


def test_packing_of_electronics_lengths_and_buckets():
    lengths = np.minimum(5 + generator(0).geometric(1 / 5.4, (20, 128)) - 1, 50)
    rows, _ = first_fit_decreasing(lengths, 50)
    used = lengths.sum() / (50 * (rows.max(axis=1) + 1).sum())
    assert used > 0.95  # rounding up to whole rows of 50 alone costs 2 %

    assert len({bucket(n, 16) for n in range(1025, 2049)}) <= 16


@given(st.integers(1, 100_000), st.sampled_from([4, 16]))
def test_buckets_waste_at_most_their_share_and_are_few(n, steps):
    assert n <= bucket(n, steps) <= n * (1 + 2 / steps) + 1
    assert bucket(bucket(n, steps), steps) == bucket(n, steps)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.floats(0, 1), st.integers(0, 99))
def test_every_sequence_has_a_target_and_last_only_samples_have_just_the_last(lengths, share, seed):
    samples = cut(histories(lengths), np.arange(len(lengths)), 12, None)
    marked = mask_cloze(samples, 0.3, share, generator(seed)).is_target
    per_sequence = np.split(marked, np.cumsum(samples.lengths)[:-1])
    assert all(part.any() for part in per_sequence)
    only_last = mask_cloze(samples, 0.3, 1.0, generator(seed)).is_target
    for part in np.split(only_last, np.cumsum(samples.lengths)[:-1]):
        assert part.sum() == 1
        assert part[-1]


def test_masked_share_in_the_limit():
    samples = cut(histories([100] * 400), np.arange(400), 100, None)
    share = mask_cloze(samples, 0.2, 0.0, generator(0)).is_target.mean()
    assert share == pytest.approx(0.2, abs=0.006)  # three standard errors of 40,000 draws
    only = mask_cloze(samples, 0.2, 0.25, generator(0)).is_target.reshape(400, 100)
    assert (only.sum(1) == 1).mean() == pytest.approx(0.25, abs=0.065)


def test_windows_are_the_last_items_or_anywhere_inside():
    data = histories([30])
    assert (cut(data, np.array([0]), 12, None).tokens == data.items[18:]).all()
    first = cut(data, np.array([0]), 12, np.array([0.0])).tokens
    final = cut(data, np.array([0]), 12, np.array([0.999999])).tokens
    assert (first == data.items[:12]).all()
    assert (final == data.items[18:]).all()


@pytest.mark.parametrize("origin", ["first", "last"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_batch_holds_its_samples_and_nothing_else(origin, layout):
    lengths = [3, 12, 5, 20, 2, 7]
    model = small_model(position_origin=origin)
    epoch = Epoch(histories(lengths), model, TrainConfig(batch_size=6, layout=layout), 0)
    samples = epoch.samples(0)
    (batch,) = epoch.step(0)
    restored = batch.items.clone().flatten()
    real = batch.targets != IGNORE
    assert (restored[batch.target_places[real]] == model.mask_id).all()
    restored[batch.target_places[real]] = batch.targets[real]
    segments = batch.segment_ids.flatten()
    ends = np.cumsum(samples.lengths)
    for number, (end, length) in enumerate(zip(ends, samples.lengths, strict=True), start=1):
        places = (segments == number).nonzero().flatten()
        assert (restored[places].numpy() == samples.tokens[end - length : end]).all()
        assert len({int(p) // model.max_len for p in places}) == 1
        counted = batch.positions.flatten()[places].tolist()
        assert counted == list(range(length)) if origin == "first" else list(range(length))[::-1]
    assert (restored[segments == 0] == PAD).all()
    assert batch.num_tokens == len(samples.tokens) == int((segments > 0).sum())
    assert batch.num_targets == int(real.sum()) == int(samples.is_target.sum())
    by_query = batch.query_index + torch.arange(len(batch.items))[:, None] * model.max_len
    assert (by_query.flatten()[batch.target_slots[real]] == batch.target_places[real]).all()


def test_an_epoch_holds_every_sequence():
    data = histories([4, 9, 1, 30, 6, 2, 12])
    epoch = Epoch(data, small_model(), TrainConfig(batch_size=3), 4)
    assert epoch.num_steps == 3
    batches = [batch for i in range(3) for batch in epoch.step(i)]
    assert sum(b.num_sequences for b in batches) == 7
    assert sum(b.num_tokens for b in batches) == 4 + 9 + 1 + 12 + 6 + 2 + 12

    layout = Layout(12, NUM_ITEMS + 1, "first", True, 16)
    items = np.array([3, 4])
    samples = Samples(items, np.array([2]), np.array([False, True]), items)
    batch = layout.batch(samples, np.array([0]), np.array([0]))
    assert batch.num_targets == 1
    assert batch.items[0, :2].tolist() == [3, NUM_ITEMS + 1]


def test_steps_are_reproducible_and_micro_batches_hold_their_targets():
    data, model, train = histories([9] * 20), small_model(), TrainConfig(batch_size=8)
    again = Epoch(data, model, train, 3).step(1)[0]
    same = Epoch(data, model, train, 3).step(1)[0]
    other = Epoch(data, model, train, 2).step(1)[0]
    assert torch.equal(again.items, same.items)
    assert not torch.equal(again.items, other.items)

    data, model = histories([9, 4, 12, 7, 3, 8, 5, 6]), small_model()
    (whole,) = Epoch(data, model, TrainConfig(batch_size=8), 0).step(0)
    parts = Epoch(data, model, TrainConfig(batch_size=8, micro_batch_size=2), 0).step(0)
    assert len(parts) == 4

    def targets(batches):
        return sorted(t for b in batches for t in b.targets.tolist() if t != IGNORE)

    assert targets(parts) == targets([whole])


def test_steps_packed_in_blocks_have_the_bits_of_an_epoch_packed_at_once(monkeypatch):
    data = histories([*range(1, 31), *range(30, 0, -1)])
    for train in (TrainConfig(batch_size=8), TrainConfig(batch_size=8, micro_batch_size=2, layout="padded")):
        monkeypatch.setattr(reclib_batches, "STEPS_PACKED", 10**6)
        whole = Epoch(data, small_model(), train, 0)
        wanted = [whole.step(i) for i in range(whole.num_steps)]
        monkeypatch.setattr(reclib_batches, "STEPS_PACKED", 3)
        blocks = Epoch(data, small_model(), train, 0)
        for i in (7, 0, 1, 2, 3, 6, 5, 4):  # the last step is not full, nor is its block
            for one, other in zip(blocks.step(i), wanted[i], strict=True):
                for name, value in one._tensors().items():
                    assert torch.equal(value, getattr(other, name)), (i, name)


def test_a_batch_goes_to_a_device_in_one_copy_and_is_the_same_there():
    sampled = TrainConfig(batch_size=6, loss="sampled_softmax", num_negatives=5)
    for train in (TrainConfig(batch_size=6), sampled):
        (batch,) = Epoch(histories([3, 12, 5, 20, 2, 7]), small_model(), train, 0).step(0)
        parts = list(batch._tensors().values())
        for one, other in zip(parts, unstage(stage(parts, torch.device("cpu")), parts), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
            assert other.storage_offset() * other.element_size() % 16 == 0
        for ready in (batch, batch.staged(torch.device("meta"))):
            moved = ready.to(torch.device("meta"))
            for name, value in batch._tensors().items():
                there = getattr(moved, name)
                assert (there.shape, there.dtype, there.device.type) == (value.shape, value.dtype, "meta")
    assert batch.staged(torch.device("cpu")) is batch.to(torch.device("cpu")) is batch


def test_prediction_batches_end_each_history_with_mask():
    data = histories([3, 30, 1, 11])
    layout = Layout(12, NUM_ITEMS + 1, "first", True, 16)
    seen = {}
    for users, batch in next_item_batches(data, layout, np.arange(4), 3):
        for slot, user in enumerate(users):
            place = int(batch.target_places[slot])
            segment = batch.segment_ids.flatten()[place]
            places = (batch.segment_ids.flatten() == segment).nonzero().flatten()
            assert places[-1] == place
            seen[int(user)] = batch.items.flatten()[places].tolist()
    for user in range(4):
        history = data.items[data.starts[user] : data.ends[user]][-11:].tolist()
        assert seen[user] == [*history, NUM_ITEMS + 1]


def test_prefetch():
    assert list(prefetch(iter(range(50)), depth=3)) == list(range(50))

    def broken():
        yield 1
        raise ValueError("from the thread")

    source = prefetch(broken())
    assert next(source) == 1
    with pytest.raises(ValueError, match="from the thread"):
        next(source)

    source = prefetch(iter(range(10**9)))
    assert next(source) == 0
    source.close()  # joins the thread: a hang here would be the failure


CAUSAL = TrainConfig(objective="next_item", batch_size=4)


def test_the_causal_twin_predicts_next_items():
    data = histories([1, 2, 7, 30], seed=3)
    model = small_model(causal=True)
    (batch,) = Epoch(data, model, CAUSAL, 0).step(0)
    assert batch.num_sequences == 3  # one item alone has no next
    assert batch.num_targets == batch.num_tokens == 1 + 6 + model.max_len
    assert not (batch.items == model.mask_id).any()
    real = batch.targets != IGNORE
    shown = batch.items.flatten()[batch.target_places[real]]
    pairs = set(zip(shown.tolist(), batch.targets[real].tolist(), strict=True))
    follows = {
        pair
        for first, last in zip(data.starts, data.ends, strict=True)
        for pair in zip(
            data.items[first : last - 1].tolist(), data.items[first + 1 : last].tolist(), strict=True
        )
    }
    assert pairs <= follows

    items = np.array([1, 2, 3, 4, 5, 6])
    found = next_items(Samples(items, np.array([3, 1, 2, 0]), np.zeros(6, dtype=bool), items))
    assert found.tokens.tolist() == [1, 2, 5]
    assert found.labels.tolist() == [2, 3, 6]
    assert found.lengths.tolist() == [2, 0, 1, 0]
    assert found.is_target.all()


def test_prediction_batches_of_the_causal_twin_ask_at_the_last_item():
    model = small_model(causal=True)
    data = histories([5, 30, 1], seed=5)
    empty = Histories(data.items, np.append(data.starts, 3), np.append(data.ends, 3))
    ((users, batch),) = next_item_batches(empty, Layout.from_config(model, CAUSAL), np.arange(4), 8)
    asked = batch.items.flatten()[batch.target_places[: batch.num_targets]]
    wanted = {u: int(data.items[data.ends[u] - 1]) for u in range(3)} | {3: model.mask_id}
    assert dict(zip(users.tolist(), asked.tolist(), strict=True)) == wanted
    longest = int(batch.segment_ids.flatten().bincount()[1:].max())
    assert longest == model.max_len  # a masked model has one place less


def test_negatives_follow_the_shares_and_repeat_with_the_step():
    data = Histories(np.array([1, 1, 1, 2], dtype=np.int32), np.array([0]), np.array([4]))
    popular = TrainConfig(batch_size=1, loss="sampled_softmax", negatives="popularity", num_negatives=4000)
    assert negative_shares(data, 3, popular).tolist() == [0.0, 0.75, 0.25, 0.0]
    epoch = Epoch(data, small_model(), popular, 0)
    drawn = epoch.negatives(0)
    assert np.isclose((drawn["negatives"] == 1).float().mean(), 0.75, atol=0.03)
    assert (drawn["negative_probs"][drawn["negatives"] == 2] == 0.25).all()
    assert (epoch.negatives(0)["negatives"] == drawn["negatives"]).all()
    assert (epoch.negatives(1)["negatives"] != drawn["negatives"]).any()
    uniform = negative_shares(data, 3, TrainConfig(loss="gbce"))
    assert uniform[PAD] == 0
    assert np.allclose(uniform[1:], 1 / 3)


def test_prefixes_of_histories():
    data = histories([1, 2, 3, 40] * 500)
    lengths = data.ends - data.starts
    found = prefixes(data, 0.5, generator(0))
    kept = found.ends - found.starts
    assert (found.starts == data.starts).all()
    assert (kept[lengths <= 2] == lengths[lengths <= 2]).all()
    long = kept[lengths == 40]
    assert long.min() == 2
    assert long.max() == 40
    assert 0.4 < (long < 40).mean() < 0.6
    assert abs(long[long < 40].mean() - 20.5) < 1.5
    assert (prefixes(data, 0.0, generator(0)).ends == data.ends).all()
