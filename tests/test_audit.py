"""Every number of the audit against the one worked out by hand from the study's files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reclib import parameters, records
from reclib.config import DataConfig, InputError, model_config
from reclib.data.batches import IGNORE
from reclib.data.prepare import prepare
from reclib.experiments import audit
from reclib.experiments.audit import Shape
from reclib.hardware import resolve
from reclib.model.bert4rec import Bert4Rec
from reclib.train.losses import batch_loss

PUBLISHED = records.reference()
MODELS = PUBLISHED["models"]
ROWS = 159_750
MEAN_LEN = PUBLISHED["dataset"]["interactions"] / PUBLISHED["dataset"]["users"]


def by_name(rows, key="name"):
    return {row[key]: row for row in rows}


def test_one_catalogue_gives_all_three_rounded_counts():
    assert audit.solve_rows(MODELS) == [ROWS]
    assert ROWS == 159_748 + 2
    single = [audit.rows_within(m["published_millions"], audit.shape_of(m)) for m in MODELS[1:]]
    assert [len(found) for found in single] == [20, 13, 5]  # none of the three would have been enough


def test_the_rounding_range_is_exactly_that_of_the_rounded_number():
    shape = Shape(384, 4, True)
    found = audit.rows_within(130.10, shape)
    millions = [
        round(audit.parameters(rows, shape) / 1e6, 2) for rows in (found[0] - 1, *found, found[-1] + 1)
    ]
    assert millions[0] != 130.10
    assert millions[-1] != 130.10
    assert set(millions[1:-1]) == {130.10}


def test_a_log_gives_the_same_catalogue_to_the_last_parameter():
    log = PUBLISHED["adapters"]["log"]
    exact = audit.exact_shapes(log["total"] - log["trainable"], range(64, 2049, 64), 24)
    assert (Shape(1024, 8, True), ROWS) in exact
    others = [rows for shape, rows in exact if shape != Shape(1024, 8, True)]
    assert others == [3_322_118]  # a catalogue twenty times that of the data
    assert audit.rows_of(429_153_287, Shape(1024, 8, True)) is None


def test_solving_without_a_rounded_count_is_refused():
    with pytest.raises(InputError, match="published_millions"):
        audit.solve_rows(MODELS[:1])


def test_parameters_and_where_they_are():
    for name, total, tables, encoder, share, tied_millions in [
        ("5 M", 5_118_250, 4_715_050, 396_800, 0.078, 2.77),
        ("85 M", 85_111_814, 81_951_750, 3_160_064, 0.037, 44.2),
        ("130 M", 130_095_750, 122_847_750, 7_248_000, 0.056, 68.8),
        ("429 M", 429_153_286, 327_327_750, 101_825_536, 0.237, 265.6),
    ]:
        row = by_name(audit.parameter_table(MODELS))[name]
        assert row["agrees"]
        assert (row["counted"], row["item_tables"], row["non_embedding"]) == (total, tables, encoder)
        assert row["non_embedding_share"] == pytest.approx(share, abs=5e-4)
        assert row["if_tied"] / 1e6 == pytest.approx(tied_millions, abs=0.05)
    assert audit.parameters(ROWS, Shape(256, 4, True)) == 85_178_118  # with an output layer


def test_the_profilers_multiplications():
    profile = PUBLISHED["profile"]
    tokens = profile["sequences"] * profile["max_len"]
    found = audit.addmm_flops(ROWS, profile["hidden_dim"], profile["num_layers"], tokens)
    assert found / 1e6 == pytest.approx(profile["addmm_mflop"], abs=5e-4)


def test_rates_against_epoch_times():
    for name, in_epoch_millions, ratio, by_clock, share_of_peak in [
        ("85 M", 2.95, 5.06, 3886, 0.83),
        ("130 M", 2.79, 4.79, 2429, 0.77),
        ("429 M", 2.05, 3.52, 1080, 0.97),
        ("130 M, AMP", 5.14, 8.82, 1295, 0.755),
        ("130 M, AMP, compile", 5.43, 9.31, 1429, 0.88),
        ("130 M, AMP, compile, iLoRA", 5.12, 8.78, 1230, 0.714),
        ("5 M", 3.45, 0.19, 17511, None),
    ]:
        flops = {m["name"]: audit.padded_flops(model_config(m["size"]))[0] for m in MODELS[1:]}
        row = by_name(audit.rates([*PUBLISHED["throughput"], PUBLISHED["throughput_t4"]], flops))[name]
        assert row["claimed_in_epoch"] / 1e6 == pytest.approx(in_epoch_millions, abs=0.006)
        assert row["ratio"] == pytest.approx(ratio, abs=0.005)
        assert row["by_clock_per_second"] == pytest.approx(by_clock, abs=0.6)
        if share_of_peak is None:
            assert row["claimed_flops_per_second"] is None
        else:
            assert row["claimed_flops_per_second"] / audit.TENSOR_PEAK == pytest.approx(
                share_of_peak, abs=0.006
            )


def test_the_counts_of_its_log_and_data():
    log, data = PUBLISHED["log"], PUBLISHED["dataset"]
    assert data["users"] - sum(log.values()) == 41
    assert data["items"] - (ROWS - 2) == 304
    assert pytest.approx(9.25, abs=0.005) == MEAN_LEN
    assert 1 - MEAN_LEN / data["max_len"] == pytest.approx(0.815, abs=5e-4)
    assert audit.mean_targets(0.15, MEAN_LEN) == pytest.approx(2.24, abs=0.005)
    assert audit.mean_targets(0.20, MEAN_LEN) == pytest.approx(2.65, abs=0.005)


def test_gains_and_savings():
    gains = {name: audit.gain(row) for name, row in by_name(PUBLISHED["gains"]).items()}
    assert gains["AMP: sequences/s"] == pytest.approx(0.98, abs=0.005)
    assert 1 / gains["AMP: epoch"] == pytest.approx(1.9, abs=0.03)
    assert gains["compile: sequences/s"] == pytest.approx(1.164, abs=5e-4)
    assert gains["compile: epoch"] == pytest.approx(1.103, abs=5e-4)
    assert gains["CUDA time of AMP and compile"] == pytest.approx(6.2, abs=0.05)
    cuts = [round(audit.cut(row), 2) for row in PUBLISHED["cuts"]]
    assert cuts == [0.79, 0.36, 0.42]
    assert audit.logits_bytes(128, 50, ROWS) / 2**30 == pytest.approx(3.81, abs=0.005)
    assert audit.logits_bytes(128, 50, ROWS, 2) / 2**30 == pytest.approx(1.90, abs=0.005)


def test_the_weight_of_three_in_ten_thousand():
    found = audit.separation(0.0855, 0.0858, 72_869)
    assert found.error == pytest.approx(0.0010, abs=5e-5)
    assert found.in_errors < 0.5
    assert found.p > 0.7
    enough = audit.separation(0.0855, 0.0858, found.needed)
    assert enough.z == pytest.approx(1.96 + 0.84, abs=0.01)
    assert audit.separation(0.05, 0.09, 72_869).p < 1e-6
    with pytest.raises(InputError, match="inside"):
        audit.separation(0.0, 0.1, 10)


def test_trainable_parameters_of_the_adapters():
    profiled = audit.adapter_count(ROWS, 1024, 8, 8)
    assert (profiled.total, profiled.total + profiled.gates) == (2_089_008, 2_089_034)
    assert profiled.dead == 131_072
    small, large = audit.adapter_count(ROWS, 384, 4, 4), audit.adapter_count(ROWS, 1024, 8, 16)
    assert small.total + small.gates == 717_350
    assert small.head_share == pytest.approx(0.89, abs=0.005)
    assert profiled.head_share == pytest.approx(0.61, abs=0.01)
    assert small.total / (130_095_750 + small.total) == pytest.approx(0.0055, abs=5e-5)
    assert large.total / (429_153_286 + large.total) == pytest.approx(0.0096, abs=5e-5)


def test_calls_of_linear_maps_are_those_of_dead_adapters():
    assert audit.linear_calls(8, out_proj_runs=False) == PUBLISHED["adapters"]["log"]["linear_calls"] == 70
    assert audit.linear_calls(8, out_proj_runs=True) == 86
    assert audit.counted_linear_calls(3) == audit.linear_calls(3, out_proj_runs=False) == 30


def test_what_a_padded_step_computes_and_what_is_needed():
    for name, padded, needed, factor, head in [
        ("85 M", 13.24, 0.72, 18, 0.93),
        ("130 M", 20.6, 1.22, 17, 0.90),
        ("429 M", 79.8, 7.8, 10, 0.62),
    ]:
        row = by_name(audit.headroom(MODELS, MEAN_LEN, audit.mean_targets(0.15, MEAN_LEN)))[name]
        assert row["padded_flops"] / 1e9 == pytest.approx(padded, abs=0.05)
        assert row["needed_flops"] / 1e9 == pytest.approx(needed, abs=0.01)
        assert round(row["factor"]) == factor
        assert row["head_share"] == pytest.approx(head, abs=0.006)


def test_adapters_of_the_attentions_output_are_dead_in_torch():
    adapted = audit.adapted_encoder()
    for name, norm in audit.gradients(adapted).items():
        assert (norm is None) == name.endswith("out_proj"), name
    for mode in audit.MODES:
        assert audit.effect(adapted, mode, "out_proj") == 0.0, mode


def test_the_fast_path_drops_the_other_adapters():
    adapted = audit.adapted_encoder()
    changes = {mode: audit.effect(adapted, mode) for mode in audit.MODES}
    assert changes["eval"] == 0.0
    assert changes["train"] > 1
    assert changes["eval, fast path off"] == pytest.approx(changes["train"], rel=1e-3)
    assert torch.backends.mha.get_fastpath_enabled()


def test_looking_leaves_the_adapters_as_they_were():
    adapted = audit.adapted_encoder()
    before = {name: one.lora_B.weight.clone() for name, one in adapted.adapters().items()}
    audit.effects(adapted)
    after = adapted.adapters()
    assert all(torch.equal(weight, after[name].lora_B.weight) for name, weight in before.items())


def test_a_scalar_gate_folds_into_the_weights():
    adapter = audit.ScalarGateLora(nn.Linear(12, 7), rank=3, alpha=6.0)
    nn.init.normal_(adapter.lora_B.weight)
    nn.init.constant_(adapter.gate, 0.7)
    x = torch.randn(5, 12)
    assert torch.allclose(adapter(x), adapter.folded()(x), atol=1e-5)
    assert not torch.allclose(adapter(x), adapter.base(x), atol=1e-2)


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path))
    dataset = prepare(DataConfig(dataset="synthetic", synthetic_users=60, synthetic_items=40))
    p = parameters.build("08_audit", parameters.profile("08_audit", "smoke") | {"max_len": 20, "epochs": 1})
    return p, dataset, audit.divided(dataset, 0)


def test_the_two_trainings_differ_in_the_loss_alone(small):
    p, dataset, _ = small
    one, other = (audit.configurations(p, dataset, name, 3) for name in audit.OBJECTIVES)
    assert one[0] == other[0]
    differ = {name for name in vars(one[1]) if getattr(one[1], name) != getattr(other[1], name)}
    assert differ == {"objective", "layout", "head_rows", "loss"}


def test_parts_of_the_loss_are_parts_of_the_loss_that_trains(small):
    p, dataset, split = small
    model_of, config = audit.configurations(p, dataset, "seed_focal", 0)
    torch.manual_seed(0)
    model = Bert4Rec(model_of).eval()
    parts = audit.loss_parts(model, split.train, config, resolve("cpu"))
    total, visible, tokens, hidden = 0.0, 0.0, 0, 0
    for batch in audit._batches(split.train, model_of, config):
        with torch.no_grad():
            total += float(batch_loss(model, batch, config, 1.0))
            # Visible positions alone: the same loss with the hidden ones taken for padding.
            shown = batch._replace(items=batch.items.masked_fill(batch.items == model_of.mask_id, 0))
            labels = shown.items.clone()
            logits = model.logits(model.encode(batch.items, batch.segment_ids, batch.positions))
            entropy = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            focal = (1 - torch.exp(-entropy)) * entropy * (labels.flatten() != 0)
            visible += float(focal.sum())
        tokens, hidden = tokens + batch.num_tokens, hidden + batch.num_targets
        assert int((batch.targets != IGNORE).sum()) == batch.num_targets
    assert parts.visible_share == pytest.approx(1 - hidden / tokens)
    assert parts.visible_loss_share == pytest.approx(visible / total, rel=1e-4)
    assert 0 <= parts.masked_hit <= 1


def test_the_studys_metric_counts_several_positions_a_user(small, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    p, dataset, split = small
    trainer = audit.train("08_audit", p, dataset, split, resolve("cpu"), "cloze", 0)
    found = [audit.numbers(one, 50) for one in audit.outcomes(trainer, split, p.mask_prob)]
    assert [one["per_user"] == 1 for one in found] == [False, False, True, True]
    draws = audit.redrawn(trainer, split, p.mask_prob, 4)
    assert len(set(draws)) > 1


def test_verdicts_follow_from_numbers():
    counts = audit.parameter_table(MODELS)
    assert {check.verdict for check in audit.of_counts(counts)} == {"holds"}
    wrong = [row | {"agrees": False} for row in counts]
    assert {check.verdict for check in audit.of_counts(wrong)} == {"contradicted"}
    rates = audit.rates(PUBLISHED["throughput"], {})
    assert {check.verdict for check in audit.of_rates(rates)} == {"contradicted"}
    right = [row | {"ratio": 1.02} for row in rates]
    assert {check.verdict for check in audit.of_rates(right)} == {"holds"}
    judged = by_name([c._asdict() for c in audit.of_gains(PUBLISHED["gains"], PUBLISHED["cuts"])], "claim")
    assert judged["AMP: sequences/s: about 2 times"]["verdict"] == "contradicted"
    assert judged["compile: sequences/s: +17 %"]["verdict"] == "holds"
    assert judged["compile: epoch: +17 %"]["verdict"] == "contradicted"
    assert judged["step: 75 % less"]["verdict"] == "holds in part"
    near = audit.of_difference("x", audit.separation(0.0855, 0.0858, 72_869), 72_869)
    far = audit.of_difference("x", audit.separation(0.0855, 0.0958, 72_869), 72_869)
    assert (near.verdict, far.verdict) == ("not supported", "holds")


def test_verdicts_on_adapters_would_clear_adapters_that_work():
    works = [{"mode": mode, "all": 2.0} | dict.fromkeys(audit.PLACES, 1.0) for mode in audit.MODES]
    alive = {f"layers.0.{place}": 0.5 for place in audit.PLACES}
    assert {check.verdict for check in audit.of_adapters(alive, works)} == {"holds"}
    adapted = audit.adapted_encoder()
    found = audit.of_adapters(audit.gradients(adapted), audit.effects(adapted))
    assert [check.verdict for check in found] == ["holds in part", "contradicted"]
