"""Every number of the audit against the one worked out by hand from the study's files."""

import copy
import gzip
import json
import shutil

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, refused, smoke
from torch import nn

from reclib import records, system
from reclib.config import DataConfig, InputError, validated
from reclib.data.batches import IGNORE
from reclib.data.prepare import prepare
from reclib.data.splits import random_users
from reclib.experiments import audit
from reclib.hardware import resolve
from reclib.model.bert4rec import Bert4Rec
from reclib.train.losses import batch_loss

PUBLISHED = records.reference()
ROWS = 159_750
CPU = resolve("cpu")


def numbers(part):
    return {result.params.get("model"): result.metrics for result in part.results}


def verdicts(part):
    return [check.verdict for check in part.checks]


def changed(part, **values):
    """The published figures with every entry of a part changed."""
    return PUBLISHED | {part: [row | values for row in PUBLISHED[part]]}


def test_one_catalogue_gives_all_three_rounded_counts():
    (catalogue,) = numbers(audit.catalogue(PUBLISHED)).values()
    assert (catalogue["rows"], catalogue["solutions"]) == (ROWS, 1)
    millions = {m["name"]: m.get("published_millions") for m in PUBLISHED["models"]}
    single = [audit.rows_within(millions[name], model) for name, model in audit.large(PUBLISHED).items()]
    assert [len(rows) for rows in single] == [20, 13, 5]  # none of the three would have been enough
    counted = numbers(audit.sizes(PUBLISHED))["429 M"]["counted"]
    assert catalogue["log_total"] == counted  # to the last parameter
    assert catalogue["addmm_mflop"] == pytest.approx(PUBLISHED["profile"]["addmm_mflop"], abs=5e-4)


def test_parameters_and_where_they_are():
    sizes = numbers(audit.sizes(PUBLISHED))
    for name, total, tables, encoder, share, tied_millions in [
        ("5 M", 5_118_250, 4_715_050, 396_800, 0.078, 2.77),
        ("85 M", 85_111_814, 81_951_750, 3_160_064, 0.037, 44.2),
        ("130 M", 130_095_750, 122_847_750, 7_248_000, 0.056, 68.8),
        ("429 M", 429_153_286, 327_327_750, 101_825_536, 0.237, 265.6),
    ]:
        row = sizes[name]
        assert row["agrees"]
        assert (row["counted"], row["item_tables"], row["non_embedding"]) == (total, tables, encoder)
        assert row["non_embedding_share"] == pytest.approx(share, abs=5e-4)
        assert row["if_tied"] / 1e6 == pytest.approx(tied_millions, abs=0.05)


def test_rates_against_epoch_times():
    rates = numbers(audit.rates(PUBLISHED))
    for name, ratio, by_clock, share_of_peak in [
        ("85 M", 5.06, 3886, 0.83),
        ("130 M, AMP, compile", 9.31, 1429, 0.88),
        ("5 M", 0.19, 17511, None),
    ]:
        row = rates[name]
        assert row["ratio"] == pytest.approx(ratio, abs=0.005)
        assert row["by_clock_per_second"] == pytest.approx(by_clock, abs=0.6)
        assert row.get("claimed_share_of_peak") == (share_of_peak and pytest.approx(share_of_peak, abs=0.006))


def test_the_weight_of_three_in_ten_thousand():
    test = audit.separation(0.0855, 0.0858, 72_869)
    assert test["error"] == pytest.approx(0.0010, abs=5e-5)
    assert test["in_errors"] < 0.5
    assert test["p"] > 0.7
    enough = audit.separation(0.0855, 0.0858, test["needed"])
    assert enough["z"] == pytest.approx(1.96 + 0.84, abs=0.01)
    assert audit.separation(0.05, 0.09, 72_869)["p"] < 1e-6
    for wrong in ((0.0, 0.1, 10), (0.1, 0.1, 10), (0.1, 0.2, 1)):
        assert "inside" in refused(None, audit.separation, *wrong)


def test_trainable_parameters_of_the_adapters():
    shapes = ((1024, 8, 8), (384, 4, 4), (1024, 8, 16))
    counts = [audit.adapter_count(ROWS, *shape) for shape in shapes]
    profiled, small, _ = counts
    totals = [count["encoder"] + count["output_ffn"] + count["head"] for count in counts]
    assert (totals[0], profiled["gates"], profiled["dead"]) == (2_089_008, 26, 131_072)
    assert PUBLISHED["adapters"]["log"]["trainable"] == totals[0]
    assert totals[1] + small["gates"] == 717_350
    assert small["head"] / totals[1] == pytest.approx(0.89, abs=0.005)
    assert profiled["head"] / totals[0] == pytest.approx(0.61, abs=0.01)
    for total, base, share in ((totals[1], 130_095_750, 0.0055), (totals[2], 429_153_286, 0.0096)):
        assert total / (base + total) == pytest.approx(share, abs=5e-5)


# -- torch's own modules -------------------------------------------------------------------------------------


def test_torch_never_calls_the_attentions_output_and_in_eval_no_map_at_all():
    for mode in audit.MODES:
        count = 2 if mode in ("train", "eval, fast path off") else 0
        assert audit.calls(mode) == {"out_proj": 0, "linear1": count, "linear2": count}, mode
    assert torch.backends.mha.get_fastpath_enabled()
    # A profile of 8 layers has 70 calls of linear maps: those of a model whose output adapters are dead.
    published = PUBLISHED["adapters"]["log"]["linear_calls"]
    assert audit.linear_calls(8, ("linear1", "linear2")) == published == 70
    assert audit.linear_calls(8, audit.PLACES) == 86


# -- its loss and its metric ---------------------------------------------------------------------------------


@pytest.fixture
def small(root):
    (root / "reclib_root/notebooks").mkdir(parents=True)
    (root / "reclib_root/params").symlink_to(ROOT / "params")
    dataset = prepare(DataConfig(dataset="synthetic", synthetic_users=60, synthetic_items=40))
    return smoke("08_audit", max_len=20, epochs=1, mask_draws=3, bootstrap_samples=50), dataset


def test_parts_of_the_loss_are_parts_of_the_loss_that_trains(small):
    p, dataset = small
    split = random_users(dataset, audit.SHARES, 0)
    model_of, config = audit.configurations(p, dataset, "seed_focal", 0)
    torch.manual_seed(0)
    model = Bert4Rec(model_of).eval()
    parts = audit.loss_parts(model, split.train, config, CPU.torch_device)
    total, visible, tokens, hidden = 0.0, 0.0, 0, 0
    for batch in audit.batches(split.train, model_of, config):
        with torch.no_grad():
            total += float(batch_loss(model, batch, config, 1.0))
            # Visible positions alone: the same loss with the hidden ones taken for padding.
            labels = batch.items.masked_fill(batch.items == model_of.mask_id, 0)
            logits = model.logits(model.encode(batch.items, batch.segment_ids, batch.positions))
            entropy = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            focal = (1 - torch.exp(-entropy)) * entropy * (labels.flatten() != 0)
            visible += float(focal.sum())
        tokens, hidden = tokens + batch.num_tokens, hidden + batch.num_targets
        assert int((batch.targets != IGNORE).sum()) == batch.num_targets
    assert parts["visible_share"] == pytest.approx(1 - hidden / tokens)
    assert parts["visible_loss_share"] == pytest.approx(visible / total, rel=1e-4)
    assert 0 <= parts["masked_hit"] <= 1


def test_the_studys_metric_counts_several_positions_a_user(small):
    p, dataset = small
    runs = audit.train_both(p, dataset, CPU)
    assert [run.objective for run in runs] == list(audit.OBJECTIVES)
    loss, metric = audit.loss(runs[0]), audit.metric(p, runs)
    assert [result.params["training"] for result in loss.results] == ["begins", "ends"]
    per_user = [result.metrics["per_user"] == 1 for result in metric.results]
    assert per_user == 2 * [False, False, True, True]
    assert {*verdicts(loss), *verdicts(metric)} == {"contradicted"}
    (spread,) = audit.redrawn(p, runs[0]).results
    assert spread.metrics["lowest"] < spread.metrics["highest"]


# -- verdicts ------------------------------------------------------------------------------------------------


def test_verdicts_follow_from_numbers():
    run = PUBLISHED["throughput"][0]
    right = run | {"claimed_per_second": 1.02 * run["sequences"] / run["epoch_seconds"]}
    apart = copy.deepcopy(PUBLISHED)
    apart["accuracy"][4]["hr_at_10"] = 0.0958
    for part, figures, expected in [
        (audit.sizes, PUBLISHED, "holds"),
        (audit.sizes, changed("models", published_parameters=1), "contradicted"),
        (audit.rates, PUBLISHED, "contradicted"),
        (audit.rates, PUBLISHED | {"throughput": [right], "throughput_t4": right}, "holds"),
        (audit.accuracy, PUBLISHED, "not supported"),
        (audit.accuracy, apart, "holds"),
        (audit.gains, changed("gains", claimed=1e3) | {"cuts": []}, "contradicted"),
    ]:
        assert set(verdicts(part(figures))) == {expected}, part
    assert audit.tally(audit.gains(PUBLISHED)).metrics == {"contradicted": 3, "holds": 1, "holds in part": 4}


def test_verdicts_on_adapters_would_clear_adapters_that_work():
    works = pd.DataFrame(1, index=list(audit.MODES), columns=list(audit.PLACES))
    assert set(verdicts(audit.adapters(PUBLISHED, works))) == {"holds"}
    calls = pd.DataFrame({mode: audit.calls(mode) for mode in audit.MODES}).T
    judged = verdicts(audit.adapters(PUBLISHED, calls))
    assert judged == ["holds in part", "contradicted", "holds", "holds"]


# -- this study's own claims ---------------------------------------------------------------------------------


def test_a_wrong_number_fails_the_command_and_a_wrong_claim_is_named(root, capsys):
    """On the study's own texts and records; tests/benchmarks/test_text.py has every claim of them."""
    root = system.root()
    for name in ("docs", "params"):
        shutil.copytree(ROOT / name, root / name)
    for name in ("README.md", "FINDINGS.md"):
        shutil.copy(ROOT / name, root)
    (root / "executed").symlink_to(ROOT / "executed")
    readme, file = root / "README.md", root / "params/claims.yaml"
    content, text = yaml.safe_load(file.read_text()), readme.read_text()
    number, claim = next(
        (match[0], claim)
        for claim in content["claims"]
        if "record" in claim and claim["text"] in text and (match := audit.DECIMAL.search(claim["text"]))
    )
    wrong = claim | {"text": claim["text"].replace(number, " 9.87", 1)}
    readme.write_text(text.replace(claim["text"], wrong["text"]))

    def write(*claims):
        kept = [other for other in content["claims"] if other != claim and "record" in other][:20]
        file.write_text(yaml.safe_dump(content | {"claims": [*kept, *claims]}))

    write(wrong)
    assert audit.claims_main([]) == 1
    output = capsys.readouterr().out
    assert "number differs: 9.87 is " in output
    assert "no claim covers it" in output  # the claims that are left out
    for changes, part in (({"numbers": []}, "0 under `numbers`"), ({"log": "x"}, "expected either `record`")):
        write(wrong | changes)
        with pytest.raises(InputError, match=rf"claims.yaml: .*{part}"):
            audit.claims()


def test_a_query_reads_rows_of_benchmarks_and_single_seeds(root):
    rows = [
        {"name": "row", "row": {"size": "85m", "batch": b}, "timings": {"s": b / 1000}} for b in (1, 2, 6)
    ]
    file = system.committed() / "h200/benchmarks/gpu-trial.jsonl.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    stored = audit.Records()
    shared = {"grid": "benchmarks/gpu-trial", "name": "row", "own": {"row.size": "85m"}, "value": "timings.s"}
    median = validated(audit.Query, shared | {"take": "median", "scale": 1000})
    assert stored.number(median) == pytest.approx(2)
    one = shared | {"own": {"row.batch": 6}, "over": {"own": {"row.batch": 2}}}
    assert stored.number(validated(audit.Query, one)) == pytest.approx(3)
    about = {"own_params": {}, "data": None, "label": "cpu", "time": "1", "profile": "grid", "series": {}}
    seeds = [about | {"seed": s, "metrics": {"x": s}, "timings": {}} for s in (1, 2, 4)]
    stored.rows["test_metrics", "g"] = [*seeds, about | {"seed": None, "metrics": {"x": 0}, "timings": {}}]
    query = {"grid": "g", "name": "test_metrics", "value": "x"}
    assert stored.number(validated(audit.Query, query)) == 0
    assert stored.number(validated(audit.Query, query | {"seeds": [1, 2]})) == 1.5
