"""What is said and drawn of a scaling grid and a tuning: with nothing, with few runs, and with all."""

from dataclasses import asdict

import pytest
import yaml
from conftest import ROOT
from figure_records import of_grid, of_sizes, record

from reclib.config import model_config
from reclib.experiments import grids, scaling
from reclib.report import figures, findings, scaling_figures, tables

SHAPE = asdict(model_config("w32d2", num_items=30, max_len=20))


def curve(model: str, seed: int, size: int, loss: float, prediction: str | None = None, **changes) -> dict:
    metrics = {"non_embedding": size, "item_tables": 100, "training_flops": 6.0 * size, "trained_tokens": 10}
    metrics |= {"lowest_valid_loss": loss, "last_valid_loss": loss, "late_drop": 0.0, "valid_hr@10": 0.2}
    metrics |= {"valid_ndcg@10": 0.1 + size / 1e5}
    about = {"data": {"name": "scaling-x"}, "profile": "grid", "seed": seed, "time": "2026-01-01"}
    about |= {"timings": {"train_seconds": 1800.0, "eval_seconds": 0.0}}
    about |= {"configuration": {"model": SHAPE} | ({"prediction": prediction} if prediction else {})}
    return record("03_scaling", "learning_curve", {"model": model}, metrics, **about | changes)


def prediction(**metrics) -> dict:
    numbers = {"floor": 5.0, "factor": 30.0, "exponent": 0.3, "predicted": 5.5, "low": None, "high": None}
    numbers |= {"without_low": 5.4, "without_high": 5.6} | metrics
    own = {"of": "w384d2", "size": 4000, "seeds": 1}
    law = {"name": "prediction", "kind": "predicted", "metrics": numbers, "own_params": own}
    return curve("none", 0, 1, 1.0) | law | {"params_hash": "abc"}


ROWS = [curve("w32d2", s, 1000, 6.0 + s / 10) for s in (0, 1)] + [curve("w64d4", 0, 2000, 5.8)]
LARGEST = curve("w384d2", 0, 4000, 5.0, "abc")


def findings_of(rows: list[dict]) -> str:
    return "\n".join(findings.sentences("03_scaling", rows))


FLAT = [curve("w32d2", s, 1000, 8.0) for s in (0, 1)] + [curve("w64d2", s, 4000, 8.1) for s in (0, 1)]


def test_findings_read_right_with_nothing_with_few_and_with_all():
    assert findings_of([]) == ""
    assert findings_of(ROWS[:2]) == ""
    assert "w384d2 is not measured yet" in findings_of([*ROWS, prediction()])
    assert "error +0.500 nats (+10.0%)" in findings_of([*ROWS, LARGEST, prediction()])
    flat = findings_of([*FLAT, prediction(factor=0.0, floor=8.05, predicted=8.05)])
    assert "No power of the size: the loss does not fall. 8.050 nats predicted for w384d2" in flat
    stranger = curve("w384d2", 0, 4000, 5.0)  # without the prediction's hash it does not count
    assert scaling.outcome([*ROWS, stranger, prediction()], "scaling-x")["measured"] is None


def test_accuracy_against_size_keeps_validation_and_test_apart_and_says_who_is_ahead():
    rows = of_sizes()
    of_no_size = [of_grid("test_metrics", {"model": name}, {"ndcg@10": 0.2}) for name in ("bert4rec", "ease")]
    chosen = tables.by_size([*rows, *of_no_size])
    assert {r["data"]["fingerprint"] for r in chosen} == {rows[0]["data"]["fingerprint"]}
    figure = figures.show("size_and_counts", *chosen)
    assert figure.layout.title.text == "BERT4Rec ranks below a count on made-up"
    drawn = {trace.name: list(trace.y) for trace in figure.data}
    assert drawn["BERT4Rec, validation"] == pytest.approx([0.035, 0.055])
    assert drawn["BERT4Rec, test"] == [0.04]
    (marks,) = (trace.marker for trace in figure.data if trace.name == "BERT4Rec, test")
    assert (list(marks.symbol), list(marks.size)) == (["circle"], [6]), "the line's recipe, no three seeds"
    seeds = [of_grid("test_metrics", {"model": "w64d2"}, {"ndcg@10": 0.04}, None, seed) for seed in range(3)]
    elsewhere = {"notebook": "02_baseline", "data": rows[0]["data"] | {"name": "made-up"}}
    ranked = [r for r in rows if r["name"] == "test_metrics"] + seeds
    moved = [r | elsewhere for r in [rows[2], *ranked]]
    figure = figures.show("size_and_counts", *tables.by_size([*rows[:4], *moved]))
    (marks,) = (trace.marker for trace in figure.data if trace.name == "BERT4Rec, test")
    assert (list(marks.symbol), list(marks.size)) == (["square"], [10])
    lines = [trace.y[0] for trace in figure.data if trace.name.startswith("counts")]
    assert 0.09 not in lines, "a count that had the validation item is no rival"
    trained = tables.by_size([row for row in rows if row["name"] == "learning_curve"])
    assert "no count was scored" in figures.show("size_and_counts", *trained).layout.title.text
    sizes, counts = findings.study(rows)
    expected = "How far: wider models rank better. NDCG@10 on validation goes on made-up from"
    assert sizes == f"{expected} 0.035 (w32d2) to 0.055 (w64d2)."
    assert counts.startswith("Counting, with nothing trained, is ahead of every network on its own on")
    assert tables.by_size(rows[:2]) == [], "one size is no comparison of sizes"
    assert findings.study([]) == []


def test_names_of_arms_tell_the_recipe_of_their_configuration():
    checked = 0
    for file in (ROOT / "params/grids").glob("*.yaml"):
        grid = yaml.safe_load(file.read_text(encoding="utf-8"))
        if grid["notebook"] != "03_scaling" or tables.chooses(file.stem):
            continue
        for arm, fields in grid["arms"].items():
            model, train = (grid.get(part, {}) | fields.get(part, {}) for part in ("model", "train"))
            recipe, checked = tables.recipe_of(arm), checked + 1
            assert (recipe == tables.OWN_LOSS) == (train.get("objective") == "seed_focal"), arm
            assert (recipe == tables.TABLES) == ("table_dim" in model), arm
            assert (recipe == tables.VISIBLE) == train.get("visible_targets", False), arm
            assert recipe.endswith(tables.COUNTED) == (train.get("prior") == "counts"), arm
            assert recipe.endswith(tables.MUON) == (train.get("optimizer") == "muon"), arm
            assert recipe.startswith("causal twin") == (train.get("objective") == "next_item"), arm
            if recipe not in (tables.OWN_LOSS, tables.VISIBLE):
                assert ("shape" in recipe) == ((grid | fields)["size"] in ("85m", "130m", "430m")), arm
            if recipe != "BERT4Rec":
                assert tables.sweep_of(arm) not in ("width", "depth"), arm
    assert checked > 30


def test_other_recipes_stand_on_no_line_of_plain_widths():
    sweeps = {
        "causal w64d2": "width, causal twin",
        "causal w256d4 with counts": "depth, causal twin with counts",
        "w256d2 with counts": "width, BERT4Rec with counts",
        "w64d2 with Muon": "width, BERT4Rec with Muon",
        "encoder 64, table 256": "item tables of another width",
        "85m shape, its own loss": "the seed study's loss",
        "85m shape scaled with counts": "the seed study's shapes with counts",
        "430m shape": "the seed study's shapes",
        "w1024d8": "depth",
    }
    assert {arm: tables.sweep_of(arm) for arm in sweeps} == sweeps
    plain, others = of_sizes(), []
    run, test = (next(r for r in plain if r["name"] == name) for name in ("learning_curve", "test_metrics"))
    for number, arm in enumerate(sweeps, start=1):
        own = {"own_params": {"model": arm}}
        others += [run | own | {"metrics": run["metrics"] | {"non_embedding": number}}, test | own]
    rows = tables.by_size([*plain, *others])
    traces = figures.show("size_and_counts", *rows).data
    drawn = {trace.name: list(trace.x) for trace in traces if not trace.name.startswith("counts")}
    assert drawn["BERT4Rec, validation"] == [25_000, 100_000]
    assert drawn["BERT4Rec, test"] == [100_000, 9], "and the deep model, which is no other recipe"
    for arm, number in (("430m shape", 8), ("encoder 64, table 256", 5), ("85m shape, its own loss", 6)):
        assert drawn[f"{tables.recipe_of(arm)}, test"] == [number]
    curves = [row for row in rows if row["name"] == "learning_curve"]
    figure = figures.show("scaling_accuracy", *curves)
    left = [trace for trace in figure.data if trace.mode == "lines" and trace.xaxis == "x"]
    lines = {trace.legendgroup: list(trace.x) for trace in left}
    assert [x for name, x in lines.items() if name.startswith("width, committed")] == [[25_000, 100_000]]
    assert len(lines) == 1 + len(sweeps)
    assert "ours 0.040 to 0.040" in findings.study([*plain, *others])[0]
    about = {"data": {"name": "causal-made-up", "fingerprint": "efgh"}, "time": "2026-02-01"}
    twins = [row | about | {"own_params": {"model": f"causal {row['own_params']['model']}"}} for row in plain]
    main = figures.main_figures([*plain, *twins])["scaling_accuracy"]
    names = {row["data"]["name"] for row in main}
    assert names == {"scaling-made-up"}, "a newer grid of twins is not the main one"


def ranked(model: str, flops: float, *scores: float) -> list[dict]:
    rows = [curve(model, seed, 1000, 6.0) for seed in range(len(scores))]
    for row, score in zip(rows, scores, strict=True):
        row["metrics"] |= {"valid_ndcg@10": score, "training_flops": flops}
    return rows


def test_what_to_buy_is_the_cheapest_not_told_apart_from_the_best_of_those_with_enough_seeds():
    small, middle = ranked("w32d2", 1e12, 0.10, 0.11, 0.12), ranked("w64d2", 2e12, 0.20, 0.21, 0.25)
    large, few = ranked("w96d2", 4e12, 0.24, 0.26, 0.28), ranked("w128d2", 8e12, 0.9)
    rate = ranked("w32d2 twice rate", 1e12, 0.8, 0.8, 0.8)

    def bought(*rows: dict) -> str:
        return next((line for line in findings_of(list(rows)).splitlines() if "What to buy" in line), "")

    line = bought(*small, *middle, *large, *few, *rate)
    assert "w96d2 ranks best (0.2600); the cheapest not told apart is w64d2 (0.2200), at 50% of its" in line
    assert "From w32d2 to w96d2 a doubling of training FLOPs is worth +0.0750" in line
    line = bought(*small, *middle)
    assert "w64d2 ranks best (0.2200); no cheaper one has a seed that reaches its worst" in line
    assert not bought(*small, *few), "one arm with enough seeds leaves nothing to choose"


def test_what_a_law_is_held_against_and_how_sure_its_exponent_is():
    law = prediction(low=4.9, high=5.6, exponent_low=0.1, exponent_high=0.9)
    law["series"] = {"non_embedding": [1000, 2000], "loss": [6.0, 5.5]}
    outcome = scaling.outcome([LARGEST, law], "scaling-x")
    assert outcome["naive"] == pytest.approx({"last": 5.5, "line": 5.0})
    text = findings_of([LARGEST, law])
    for part in (
        "misses by +0.500 nats, a straight line in log N by +0.000",
        "known to 0.10 to 0.90 only",
        "error +0.500 nats (+10.0%), inside the band",
    ):
        assert part in text
    table = tables.predictions({"scaling-x": outcome, "scaling-y": scaling.outcome([], "scaling-y")})
    assert list(table.index) == ["scaling-x"]
    assert table.loc["scaling-x", ["hash", "runs that carry the hash"]].tolist() == ["abc", 1]


def test_what_a_committed_grid_lacks_is_named():
    there = [curve("w32d2", seed, 25_472, 6.0) for seed in (0, 1, 2)] + [curve("w64d2", 1, 100_096, 6.0)]
    absent = grids.missing(there, "scaling-ml-100k")
    assert {"w64d2 (1 of 3)", "w32d2 half rate (0 of 1)"} <= set(absent)
    assert not any(name.startswith("w32d2 (") for name in absent)
    assert grids.missing(there, "scaling-x") == []


def test_the_curve_shows_every_seed_hollow_what_is_predicted_and_this_run_apart():
    own = curve("w32d2", 0, 1000, 6.5) | {"profile": "quick", "data": {"name": "x"}}
    figure = scaling_figures.scaling_curve(tables.table([*ROWS, LARGEST, own, prediction()]))
    assert figure.layout.title.subtitle.text.replace("<br>", " ").endswith("Fewer seeds: w384d2 (1).")
    marks = {t.name: t for t in figure.data if t.xaxis in (None, "x") and t.mode == "markers"}
    committed, this_run = (marks[f"width, {runs} (0.0 M tokens)"] for runs in ("committed", "this run"))
    assert sorted(committed.y) == [5.0, 6.0, 6.1]
    assert (list(this_run.y), this_run.marker.symbol) == ([6.5], "diamond")
    assert not any("depth" in name for name in marks), "depth has a figure of its own"
    assert marks["prediction of w384d2"].marker.symbol == "circle-open"
    assert "+10.0%" in figure.layout.title.text
    assert next(trace for trace in figure.data if trace.name == "law").line.dash == "dash"
