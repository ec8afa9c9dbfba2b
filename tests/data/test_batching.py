"""Masks, packing, reproducibility and prefetching."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import histories, small_model

from reclib.config import PAD, TrainConfig, changed
from reclib.data import batches
from reclib.data.batches import IGNORE, Epoch, Layout, cut, generator, mask_cloze, next_item_batches
from reclib.data.dataset import Histories

lengths_of_steps = st.lists(st.lists(st.integers(0, 12), min_size=5, max_size=5), min_size=1, max_size=4)


@given(lengths_of_steps)
def test_packing_keeps_every_sequence_inside_one_row_and_overlaps_none(lengths):
    lengths = np.array(lengths)
    rows, places = batches.first_fit_decreasing(lengths, 12)
    for step in range(len(lengths)):
        used = np.zeros((6, 12), dtype=int)
        for length, row, place in zip(lengths[step], rows[step], places[step], strict=True):
            assert place + length <= 12
            used[row, place : place + length] += 1
        assert used.max(initial=0) <= 1
        assert used.sum() == lengths[step].sum()


@given(st.integers(1, 100_000), st.sampled_from([4, 16]))
def test_buckets_waste_at_most_their_share_and_are_few(n, steps):
    assert n <= batches.bucket(n, steps) <= n * (1 + 2 / steps) + 1
    assert len({batches.bucket(n, 16) for n in range(1025, 2049)}) <= 16


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.floats(0, 1), st.integers(0, 99))
def test_every_sequence_has_a_target_and_last_only_samples_have_just_the_last(lengths, share, seed):
    samples = cut(histories(lengths), np.arange(len(lengths)), 12, None)
    marked = mask_cloze(samples, 0.3, share, generator(seed)).is_target
    ends = np.cumsum(samples.lengths)
    assert all(part.any() for part in np.split(marked, ends[:-1]))
    only_last = mask_cloze(samples, 0.3, 1.0, generator(seed)).is_target
    assert np.flatnonzero(only_last).tolist() == (ends - 1).tolist()


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
        assert (restored[places].numpy() == samples.labels[end - length : end]).all()
        assert len({int(p) // model.max_len for p in places}) == 1
        counted = batch.positions.flatten()[places].tolist()
        assert counted == list(range(length)) if origin == "first" else list(range(length))[::-1]
    assert (restored[segments == 0] == PAD).all()
    assert batch.num_tokens == len(samples.tokens) == int((segments > 0).sum())
    assert batch.num_targets == int(real.sum()) == int(samples.is_target.sum())
    by_query = batch.query_index + torch.arange(len(batch.items))[:, None] * model.max_len
    assert (by_query.flatten()[batch.target_slots[real]] == batch.target_places[real]).all()


def test_visible_targets_change_what_is_predicted_and_not_what_is_read():
    data, model = histories([3, 12, 5, 20, 2, 7]), small_model()
    for layout in ("packed", "padded"):
        train = TrainConfig(batch_size=6, layout=layout)
        (masked,) = Epoch(data, model, train, 0).step(0)
        (every,) = Epoch(data, model, changed(train, visible_targets=True), 0).step(0)
        for name in ("items", "segment_ids", "positions"):
            assert torch.equal(getattr(every, name), getattr(masked, name))
        assert every.num_targets == every.num_tokens > masked.num_targets
        labels = masked.items.flatten().clone()
        real = masked.targets != IGNORE
        labels[masked.target_places[real]] = masked.targets[real]
        assert torch.equal(every.targets[: every.num_targets], labels[labels != PAD])
        assert torch.equal(every.target_places[: every.num_targets], (labels != PAD).nonzero().flatten())


def test_an_epoch_holds_every_sequence():
    epoch = Epoch(histories([4, 9, 1, 30, 6, 2, 12]), small_model(), TrainConfig(batch_size=3), 4)
    parts = [batch for step in range(epoch.num_steps) for batch in epoch.step(step)]
    assert len(parts) == 3
    assert sum(batch.num_sequences for batch in parts) == 7
    assert sum(batch.num_tokens for batch in parts) == 4 + 9 + 1 + 12 + 6 + 2 + 12


def test_steps_packed_in_blocks_have_the_bits_of_an_epoch_packed_at_once(monkeypatch):
    data = histories([*range(1, 31), *range(30, 0, -1)])
    for train in (TrainConfig(batch_size=8), TrainConfig(batch_size=8, micro_batch_size=2, layout="padded")):
        monkeypatch.setattr(batches, "STEPS_PACKED", 10**6)
        whole = Epoch(data, small_model(), train, 0)
        wanted = [whole.step(i) for i in range(whole.num_steps)]
        monkeypatch.setattr(batches, "STEPS_PACKED", 3)
        blocks = Epoch(data, small_model(), train, 0)
        for i in (7, 0, 1, 2, 3, 6, 5, 4):  # the last step is not full, nor is its block
            for batch, expected in zip(blocks.step(i), wanted[i], strict=True):
                for name, value in batch.tensors().items():
                    assert torch.equal(value, getattr(expected, name)), (i, name)


def test_a_batch_goes_to_a_device_in_one_copy_and_is_the_same_there():
    sampled = TrainConfig(batch_size=6, loss="sampled_softmax", num_negatives=5)
    for train in (TrainConfig(batch_size=6), sampled):
        (batch,) = Epoch(histories([3, 12, 5, 20, 2, 7]), small_model(), train, 0).step(0)
        parts = list(batch.tensors().values())
        unstaged = batches.unstage(batches.stage(parts, torch.device("cpu")), parts)
        torch.testing.assert_close(unstaged, parts, rtol=0, atol=0)  # and of the same types
        assert all(part.storage_offset() * part.element_size() % 16 == 0 for part in unstaged)
        for ready in (batch, batch.staged(torch.device("meta"))):
            moved = ready.to(torch.device("meta"))
            for name, value in batch.tensors().items():
                there = getattr(moved, name)
                assert (there.shape, there.dtype, there.device.type) == (value.shape, value.dtype, "meta")
    assert batch.staged(torch.device("cpu")) is batch.to(torch.device("cpu")) is batch


def test_prefetch():
    assert list(batches.prefetch(iter(range(50)), depth=3)) == list(range(50))
    source = batches.prefetch(iter(range(10**9)))
    assert next(source) == 0
    source.close()  # joins the thread: a hang here would be the failure
    source = batches.prefetch(1 // (1 - n) for n in range(2))
    assert next(source) == 1
    with pytest.raises(ZeroDivisionError):  # from the thread
        next(source)


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
    rows = [data.items[a:b].tolist() for a, b in zip(data.starts, data.ends, strict=True)]
    assert pairs <= {pair for row in rows for pair in itertools.pairwise(row)}


def test_prediction_batches_of_the_causal_twin_ask_at_the_last_item():
    model = small_model(causal=True)
    data = histories([5, 30, 1], seed=5)
    empty = Histories(data.items, np.append(data.starts, 3), np.append(data.ends, 3))
    ((users, batch),) = next_item_batches(empty, Layout(model), np.arange(4), 8)
    last = batch.items.flatten()[batch.target_places[: batch.num_targets]]
    wanted = {u: int(data.items[data.ends[u] - 1]) for u in range(3)} | {3: model.mask_id}
    assert dict(zip(users.tolist(), last.tolist(), strict=True)) == wanted
    longest = int(batch.segment_ids.flatten().bincount()[1:].max())
    assert longest == model.max_len  # a masked model has one place less


def test_negatives_follow_the_shares_and_repeat_with_the_step():
    data = Histories(np.array([1, 1, 1, 2], dtype=np.int32), np.array([0]), np.array([4]))
    popular = TrainConfig(batch_size=1, loss="sampled_softmax", negatives="popularity", num_negatives=4000)
    assert batches.negative_shares(data, 3, popular).tolist() == [0.0, 0.75, 0.25, 0.0]
    epoch = Epoch(data, small_model(), popular, 0)
    drawn = epoch.negatives(0)
    assert np.isclose((drawn["negatives"] == 1).float().mean(), 0.75, atol=0.03)
    assert (drawn["negative_probs"][drawn["negatives"] == 2] == 0.25).all()
    assert (epoch.negatives(0)["negatives"] == drawn["negatives"]).all()
    assert (epoch.negatives(1)["negatives"] != drawn["negatives"]).any()
    uniform = batches.negative_shares(data, 3, TrainConfig(loss="gbce"))
    assert np.allclose(uniform, [0, 1 / 3, 1 / 3, 1 / 3])


def test_prefixes_of_histories():
    data = histories([1, 2, 3, 40] * 500)
    lengths = data.ends - data.starts
    cut_short = batches.prefixes(data, 0.5, generator(0))
    kept = cut_short.ends - cut_short.starts
    assert (cut_short.starts == data.starts).all()
    assert (kept[lengths <= 2] == lengths[lengths <= 2]).all()
    long = kept[lengths == 40]
    assert (long.min(), long.max()) == (2, 40)
    assert 0.4 < (long < 40).mean() < 0.6
    assert abs(long[long < 40].mean() - 20.5) < 1.5
    assert (batches.prefixes(data, 0.0, generator(0)).ends == data.ends).all()
