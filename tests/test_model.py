"""Parameter counts, packing inside the encoder, and what must not leak."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from engine import NUM_ITEMS, small_model

from reclib.config import SIZES, InputError, changed, model_config
from reclib.model.bert4rec import (
    Bert4Rec,
    Dropout,
    attention_bias,
    closed_formula,
    count_parameters,
    sizes_main,
)

EXACT = {"5m": 5_118_250, "85m": 85_111_814, "130m": 130_095_750, "430m": 429_153_286}


def test_named_sizes_have_exactly_the_published_number_of_parameters():
    for size in EXACT:
        assert count_parameters(model_config(size))["total"] == EXACT[size]


def test_closed_formula_agrees_with_instantiation():
    for size in SIZES:
        for tied in [True, False]:
            for output_bias in [True, False]:
                config = model_config(size, tied=tied, output_bias=output_bias)
                counted = count_parameters(config)
                assert closed_formula(config) == counted["total"]
                assert (
                    counted["item_tables"] + counted["positions"] + counted["non_embedding"]
                    == counted["total"]
                )


def test_command_prints_every_size_as_json():
    out = subprocess.run(
        [sys.executable, "-m", "reclib", "sizes", "--json"], capture_output=True, text=True, check=True
    )
    printed = json.loads(out.stdout)
    assert printed.keys() == SIZES.keys()
    assert {size: printed[size]["total"] for size in EXACT} == EXACT


def test_command_refuses_unknown_arguments(capsys):
    with pytest.raises(SystemExit) as ended:
        sizes_main(["--jsno"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --jsno" in capsys.readouterr().err


def test_unknown_size_is_named_with_what_is_allowed():
    with pytest.raises(InputError, match=r"unknown size '85M' \(did you mean '85m'\?\); allowed: nano"):
        model_config("85M")


def test_size_that_does_not_divide_by_its_heads_is_refused():
    with pytest.raises(InputError, match="hidden_dim=66 must be divisible by num_heads=4"):
        model_config("small", hidden_dim=66)


def rows(length: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One row with segments of 5 and 4 places and 3 unused ones."""
    items = torch.randint(1, NUM_ITEMS + 1, (1, length))
    segments = torch.tensor([[1] * 5 + [2] * 4 + [0] * 3])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]])
    return items, segments, positions


def test_segments_and_padding_do_not_reach_each_other():
    for norm in ["pre", "post"]:
        for num_layers in [1, 2]:
            torch.manual_seed(0)
            model = Bert4Rec(small_model(norm=norm, num_layers=num_layers)).eval()
            items, segments, positions = rows()
            with torch.no_grad():
                before = model.encode(items, segments, positions)
                other = items.clone()
                other[0, 5:] = 1 + other[0, 5:] % NUM_ITEMS
                after = model.encode(other, segments, positions)
            assert torch.equal(before[0, :5], after[0, :5])
            assert not torch.allclose(before[0, 5:9], after[0, 5:9])
            assert before.isfinite().all()


def test_a_segment_alone_gives_the_same_states_as_in_a_packed_row():
    torch.manual_seed(0)
    model = Bert4Rec(small_model()).double().eval()
    items, segments, positions = rows()
    with torch.no_grad():
        packed = model.encode(items, segments, positions)
        alone = model.encode(items[:, 5:9], segments[:, 5:9], positions[:, 5:9])
    torch.testing.assert_close(packed[:, 5:9], alone)


def test_states_at_queries_equal_those_of_the_whole_row():
    for norm in ["pre", "post"]:
        torch.manual_seed(0)
        model = Bert4Rec(small_model(norm=norm)).double()
        items, segments, positions = rows()
        queries = torch.tensor([[7, 0, 3, 3]])
        whole = model.encode(items, segments, positions)
        some = model.encode(items, segments, positions, queries)
        torch.testing.assert_close(some, whole[:, queries[0]])


def test_attention_bias_is_zero_inside_a_segment_and_minus_infinity_outside():
    bias = attention_bias(torch.tensor([[1, 1, 2, 0]]), torch.float32)
    seen = (bias[0, 0] == 0).int().tolist()
    assert seen == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert bias[0, 0][bias[0, 0] != 0].isneginf().all()


def test_the_mask_of_queries_is_part_of_the_whole_and_off_the_cpu_in_the_products_type(monkeypatch):
    segments, queries = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 0, 0]]), torch.tensor([[4, 0], [3, 5]])
    for causal in (False, True):
        whole = attention_bias(segments, torch.float32, causal)
        some = attention_bias(segments, torch.float32, causal, queries)
        assert torch.equal(some, whole.gather(2, queries[:, None, :, None].expand(-1, -1, -1, 6)))
    # On `meta` nothing is computed, and its autocast is made up: a CPU build has no CUDA to ask.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "meta")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    rows = torch.zeros(3, 50, dtype=torch.int32, device="meta")
    asked = torch.zeros(3, 7, dtype=torch.int64, device="meta")
    for mask in (attention_bias(rows, torch.float32), attention_bias(rows, torch.float32, True, asked)):
        assert mask.dtype == torch.bfloat16
        assert mask.stride()[2:] == (56, 1)  # rows 16 bytes apart or a multiple of it


def test_tied_tables_are_one_tensor():
    model = Bert4Rec(small_model())
    assert model.output_weight is model.item_table.weight
    untied = Bert4Rec(changed(small_model(), tied=False))
    assert untied.output_weight is not untied.item_table.weight


def test_dropout_zeroes_its_share_and_keeps_the_expectation():
    torch.manual_seed(0)
    drop = Dropout(0.1).train()
    y = drop(torch.ones(1000, 1003))
    assert float((y == 0).float().mean()) == pytest.approx(0.1, abs=0.001)  # three standard errors
    assert float(y.mean()) == pytest.approx(1.0, abs=0.001)
    assert y.unique().numel() == 2
    columns = (y == 0).float().mean(0)
    assert float(columns.std()) == pytest.approx((0.1 * 0.9 / 1000) ** 0.5, rel=0.1)  # no pattern in it


def test_dropout_is_decided_by_torchs_seed_and_passes_the_gradient_it_kept():
    x = torch.ones(7, 5, requires_grad=True)
    drop = Dropout(0.4)
    torch.manual_seed(3)
    one, two = drop(x), drop(x)
    torch.manual_seed(3)
    again = drop(x)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    (gradient,) = torch.autograd.grad(one.sum(), x)
    assert torch.equal(gradient, one.detach())
    assert drop.eval()(x) is x


def test_the_causal_twin_does_not_see_what_is_later():
    for norm in ["pre", "post"]:
        torch.manual_seed(0)
        config = small_model(causal=True, norm=norm, num_layers=3)
        model = Bert4Rec(config).eval()
        items = torch.randint(1, NUM_ITEMS, (1, 12))
        segments = torch.tensor([[1] * 5 + [2] * 7])
        positions = torch.tensor([[*range(5), *range(7)]])
        with torch.no_grad():
            before = model.encode(items, segments, positions)
            items[0, 7] = items[0, 7] % NUM_ITEMS + 1
            after = model.encode(items, segments, positions)
        changed = (before - after).abs().amax(-1)[0] > 0
        assert changed.tolist() == [False] * 7 + [True] * 5  # itself and the later ones of its segment
