import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import adapter_records
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from accuracy_records import EVERY

from reclib import records as reclib_records
from reclib import system
from reclib.config import InputError
from reclib.data.prepare import DataConfig, evaluation, prepare, synthetic_dataset
from reclib.experiments import data_prep
from reclib.report import figures, findings, style, tables


def a_record(notebook, name, metrics, series=None, **changes):
    record = {
        "notebook": notebook,
        "name": name,
        "kind": "measured",
        "profile": "quick",
        "label": "cpu",
        "metrics": metrics,
        "timings": {},
        "params": {"epochs": 10, "seed": 0},
        "own_params": {},
        "series": series or {},
        "device": {"name": "A processor"},
        "seed": None,
        "data": {"name": "ml-100k", "fingerprint": "abcd"},
        "time": "2026-01-02T03:04:05+00:00",
    }
    assert changes.keys() <= record.keys()
    return record | changes


def described(dataset):
    made = {
        "preparation": data_prep.steps,
        "repeats": data_prep.repeats,
        "sequence_lengths": data_prep.lengths,
        "item_popularity": data_prep.popularity,
        "tied_timestamps": data_prep.ties,
        "last_items": data_prep.last_items,
    }
    found = data_prep.divisions(dataset, seed=0)
    of_splits = {"over_time": data_prep.over_time(dataset, found), "cold": data_prep.cold(dataset, found)}
    return {name: make(dataset) for name, make in made.items()} | of_splits


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIB_DATA", str(tmp_path_factory.mktemp("cache")))
        config = DataConfig(dataset="synthetic", synthetic_items=150, min_item=20)
        return prepare(config)


CURVE = {
    "epoch": [1, 2, 3, 4],
    "train_loss": [7.0, 6.0, 5.5, 5.4],
    "valid_ndcg@10": [None, 0.05, None, 0.07],
}


DRAWN = [spec for spec in figures.FIGURES if "ml-100k".startswith(spec.of)]  # the others are of grids alone


@pytest.fixture(scope="module")
def records(dataset):
    found = [
        a_record("01_data_prep", name, made.metrics, made.series) for name, made in described(dataset).items()
    ]
    for seed in (0, 1):
        found.append(a_record("02_baseline", "learning_curve", {}, CURVE, seed=seed))
    for model, hr in (("BERT4Rec", 0.2), ("popularity", 0.1)):
        own = {"own_params": {"model": model}}
        interval = {"hr@10": hr, "hr@10_low": hr - 0.02, "hr@10_high": hr + 0.01}
        found.append(a_record("02_baseline", "test_metrics", interval, **own))
        ranks = np.arange(1, 60)
        found.append(a_record("02_baseline", "rank_histogram", {}, tables.rank_bins(ranks), **own))
    own = {"model": "BERT4Rec"}
    found.append(a_record("02_baseline", "test_metrics", {"hr@10": 0.25}, seed=0, own_params=own))
    tally = a_record("08_audit", "audit_verdicts", {"holds": 2, "contradicted": 5})
    tally["device"] = {"name": "<i>Odd & named</i>"}
    others = accuracy_records() + adapter_records.everything() + speed_records() + hardware_records()
    return found + others + scaling_records() + audit_records() + plan_records() + [tally]


def audit_records():
    """A rate that the epoch time rules out, and one that it allows."""
    rates = {"85 M": (2.5, 400.0), "T4": (1.0, 90.0)}
    return [
        a_record(
            "08_audit",
            "audit_rates",
            {"ratio": ratio, "by_clock_per_second": allowed},
            own_params={"model": name},
        )
        for name, (ratio, allowed) in rates.items()
    ]


def accuracy_records():
    """What the figures of accuracy need beside the records above; see test_accuracy_figures."""
    made = [record for make in EVERY.values() for record in make()]
    here = {"profile": "quick", "data": {"name": "ml-100k", "fingerprint": "abcd"}}
    above = ("learning_curve", "test_metrics", "rank_histogram")
    return [record | here for record in made if record["name"] not in above]


def speed_records():
    """Two variants that ran, one that does not apply, one without room; three rungs; operators; losses."""
    found = []
    for precision, mode, status, seconds in (
        ("fp32", "off", "ok", 0.020),
        ("fp32", "default", "ok", 0.016),
        ("bf16", "off", "oom", None),
        ("tf32", "off", "not applicable", None),
    ):
        own = {"precision": precision, "compile_mode": mode, "batch_size": 64, "status": status}
        timings = {}
        if seconds is not None:
            own["ran_compile_mode"] = mode
            timings = {
                "step_seconds": seconds,
                "step_seconds_low": 0.9 * seconds,
                "step_seconds_high": 1.2 * seconds,
                "sequences_per_second": 64 / seconds,
                "peak_tensor_bytes": 5 * 2**20,
                "compile_seconds": 0.0 if mode == "off" else 8.0,
                "break_even_steps": None if mode == "off" else 2000,
            }
        found.append(a_record("04_amp_compile", "step", {}, own_params=own, timings=timings))
    for rung, (name, seconds) in enumerate((("seed study's step", 0.5), ("packed", 0.02), ("AMP", 0.04))):
        own = {"rung": rung, "name": name, "change": f"field={rung}", "status": "ok"}
        found.append(
            a_record("04_amp_compile", "ladder", {}, own_params=own, timings={"step_seconds": seconds})
        )
    series = {"operator": ["mm", "all others"], "calls": [3.0, 9.0], "seconds": [0.01, 0.03]}
    series["share"] = [0.25, 0.75]
    found.append(a_record("04_amp_compile", "operators", {}, series))
    for number, name in enumerate(("fp32", "bf16")):
        own = {"precision": name, "number": number}
        losses = {"step": [1, 2], "loss": [7.0, 6.0 + 0.06 * number]}
        found.append(a_record("04_amp_compile", "loss_curve", {}, losses, own_params=own))
    return found


def scaling_records():
    """Runs of two widths, what a law fitted to them predicts of a third, and the trials of a tuning."""
    found = []
    for model, size, loss in (("w32d2", 25_000, 6.4), ("w64d2", 100_000, 6.3)):
        numbers = {"non_embedding": size, "item_tables": 10 * size, "training_flops": 6e6 * size}
        numbers |= {"trained_tokens": 10**6, "lowest_valid_loss": loss, "valid_ndcg@10": 0.07}
        found.append(a_record("03_scaling", "learning_curve", numbers, own_params={"model": model}))
    law = {"floor": 5.6, "factor": 3.4, "exponent": 0.14, "predicted": 6.0, "low": 5.9, "high": 6.1}
    own = {"of": "w384d2", "size": 3_500_000, "seeds": 3}
    found.append(a_record("03_scaling", "prediction", law, own_params=own) | {"params_hash": "1"})
    for trial, (rate, value) in enumerate(((1e-4, 0.1), (1e-2, 0.2))):
        own = {"trial": trial, "state": "complete"}
        numbers = {"learning_rate": rate, "valid_ndcg@10": value}
        found.append(a_record("03_scaling", "trial", numbers, own_params=own))
    shares = {"field": ["learning_rate", "dropout"], "share": [0.8, 0.2]}
    return [*found, a_record("03_scaling", "tuning", {}, shares)]


def hardware_records():
    """One size on two devices of this machine, and what two techniques give."""
    found = []
    for device, seconds in (("cpu1", 0.5), ("cpu2", 0.3)):
        own = {"size": "85m", "device": device, "rule": "closed", "precision": "fp32", "basis": "measured"}
        rate = 128 / seconds
        timings = {"step_seconds": seconds, "sequences_per_second": rate, "peak_memory_bytes": 3 * 2**30}
        timings |= {"sequences_per_second_low": 0.8 * rate, "sequences_per_second_high": 1.2 * rate}
        work = {"flops": 10**11, "bytes_moved": 10**10}
        found.append(a_record("06_hardware", "hardware_step", work, own_params=own, timings=timings))
    for device in ("cpu1", "cpu2"):  # a long measurement, drawn beside them
        own = {"size": "85m", "device": device, "cpu": "Some CPU 1/2", "batch_size": 128, "max_len": 50}
        timings = {"step_seconds": 0.4, "sequences_per_second": 320.0, "peak_memory_bytes": 2**31}
        work = {"encoder_flops": 10**10, "head_flops": 10**11}
        found.append(
            a_record(
                "06_hardware", "real_size_step", work, own_params=own | {"mean_len": 9.4}, timings=timings
            )
        )
    for technique, speedup in (("packed rows", 1.5), ("gather before the head", 9.0)):
        own = {"size": "85m", "device": "cpu1", "technique": technique, "basis": "validated"}
        found.append(a_record("06_hardware", "technique", {}, own_params=own, timings={"speedup": speedup}))
    return found


def plan_records():
    """One run on a GPU of the catalogue and on a CPU, each with the parts of its peak."""
    found = []
    for device, basis, seconds in (("l4", "unvalidated", 50.0), ("cpu1", "validated", 4000.0)):
        own = {"size": "85m", "batch_size": 512, "device": device, "precision": "fp32", "basis": basis}
        times = {"": seconds, "_low": 0.8 * seconds, "_high": 1.3 * seconds}
        timings = {f"epoch_seconds{end}": value for end, value in times.items()}
        fits = {"fits": 1} if device == "l4" else {}
        series = {"part": ["weights", "activations"], "bytes": [2**30, 2**31]}
        record = a_record("07_explore", "plan", fits, series, own_params=own | {"status": "ok"})
        found.append(record | {"timings": timings})
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(records, tmp_path_factory) -> Path:
    """The folder of all figures, drawn once."""
    folder = tmp_path_factory.mktemp("figures")
    files = figures.build(records, folder)
    assert {*files} == {file for file in folder.iterdir() if file.name != "plotly.min.js"}
    return folder


def test_build_writes_every_figure_and_a_rebuild_changes_no_byte(records, built):
    names = {f"{spec.name}_ml-100k_cpu.html" for spec in DRAWN}
    assert {path.name for path in built.iterdir()} == names | {"index.html", "plotly.min.js"}
    before, times = content(built), {p: p.stat().st_mtime_ns for p in built.iterdir()}
    figures.build(json.loads(json.dumps(records)), built)
    assert content(built) == before
    assert {p: p.stat().st_mtime_ns for p in built.iterdir()} == times  # nor touches a file


def test_another_process_writes_the_same_bytes_from_records_in_another_order(records, built, tmp_path):
    (tmp_path / "records.json").write_text(json.dumps(list(reversed(records))))
    code = (
        "import json, sys; from pathlib import Path; from reclib.report import figures; "
        "figures.build(json.loads(Path('records.json').read_text()), Path('there'));"
        "print('torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(system.root()), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert content(tmp_path / "there") == content(built)


class Addresses(HTMLParser):
    """Every address that a page loads or links, and every tag that is left open."""

    def __init__(self, html):
        super().__init__()
        self.found, self.open = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "data-src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "data-src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pages_are_whole_and_load_nothing_from_elsewhere(built):
    for path in built.glob("*.html"):
        parsed = Addresses(path.read_text(encoding="utf-8"))
        assert parsed.open == [], path.name
        for address in parsed.found:
            assert address.startswith("#") or (built / address).is_file(), address
    index = (built / "index.html").read_text()
    assert "http" not in index
    assert "prefers-color-scheme: dark" in index


def test_index_states_question_answer_and_origin(built):
    index = (built / "index.html").read_text()
    assert "What exactly is being predicted?" in index
    assert "HR@10 on ml-100k (cpu): BERT4Rec 0.200 [0.180, 0.210], popularity 0.100 [0.080, 0.110]" in index
    assert "a step is 25.0 times faster (cpu)." in index
    assert "fp32 eager on ml-100k at batch 64: 3,200 sequences/s; as multiples of it: fp32 compiled " in index
    assert "Measured on A processor (cpu), profile quick, data ml-100k abcd," in index
    assert "<time>2026-01-02</time>" in index
    assert "&lt;i&gt;Odd &amp; named&lt;/i&gt;" in index
    assert "smoke run" not in index


def test_smoke_runs_are_called_that_everywhere(records, tmp_path):
    smoke = [record | {"profile": "smoke"} for record in records]
    for path in figures.build(smoke, tmp_path):
        assert "smoke run, not a result" in path.read_text(), path.name
    said = (tmp_path / "index.html").read_text().count("smoke run, not a result")
    answered = {spec.notebook for spec in figures.FIGURES}
    assert said == len(DRAWN) + len(answered)  # beside every answer too; the opening figure is no chapter's
    assert "smoke run" in figures.show("preparation", smoke[0]).layout.title.subtitle.text
    assert "smoke run" not in figures.show("preparation", records[0]).layout.title.subtitle.text


def test_figures_without_records_are_removed_and_other_files_stay(records, built, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.html").write_text("<p>by hand</p>")
    figures.build(records[:1], tmp_path)
    left = {"preparation_ml-100k_cpu.html", "index.html", "plotly.min.js", "mine.html"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_without_records_there_is_still_an_index(tmp_path):
    (file,) = figures.build([], tmp_path)
    assert "no records yet" in file.read_text()


def test_records_that_no_figure_knows_are_left_alone(tmp_path):
    files = figures.build([a_record("06_hardware", "price", {"usd": 1.0})], tmp_path)
    assert [path.name for path in files] == ["index.html"]


def test_odd_dataset_names_make_plain_file_names(records, tmp_path):
    odd = records[0] | {"data": {"name": 'a "b"/../c', "fingerprint": "0"}}
    names = sorted(path.name for path in figures.build([odd], tmp_path / "out"))
    assert names == ["index.html", "preparation_a-b-..-c_cpu.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_profile_with_most_work_is_shown_and_its_newest_parameters():
    def curve(profile, time, epochs, seed):
        params = {"epochs": epochs, "seeds": [seed], "gpu": "auto"}
        return a_record(
            "02_baseline", "learning_curve", {}, profile=profile, time=time, params=params, seed=seed
        )

    smoke = curve("smoke", "2026-01-09", 1, 0)
    old = curve("quick", "2026-01-01", 50, 0)
    new = [curve("quick", f"2026-01-0{day}", 100, seed) for day, seed in ((2, 1), (3, 0))]
    other = curve("smoke", "2026-01-01", 1, 0) | {"label": "l4"}
    groups = tables.groups([smoke, *new, other, old])
    assert groups == {("ml-100k", "cpu"): [new[1], new[0]], ("ml-100k", "l4"): [other]}


def test_a_plan_of_more_work_does_not_hide_what_was_measured():
    def step(kind, profile, steps):
        own = {"size": "85m", "kind": kind}
        record = a_record("06_hardware", "hardware_step", {}, profile=profile, params={"steps": steps})
        return record | {"label": "h100", "kind": kind, "own_params": own}

    plan, measured = step("predicted", "quick", 12), step("measured", "custom", 7)
    older = step("measured", "smoke", 4)
    (shown,) = tables.groups([plan, older, measured]).values()
    assert shown == [measured, plan]
    (both,) = tables.groups([plan, measured, step("measured", "full", 30)]).values()
    assert both == [step("measured", "full", 30)]


def test_table_has_a_row_per_point_with_what_it_belongs_to(records):
    curves = [r for r in records if (r["notebook"], r["name"]) == ("02_baseline", "learning_curve")]
    rows = tables.table(curves)
    assert len(rows) == 8
    assert rows["seed"].tolist() == [0] * 4 + [1] * 4
    assert rows["train_loss"].tolist() == CURVE["train_loss"] * 2
    metrics = tables.table([r for r in records if r["name"] == "test_metrics"])
    assert metrics["model"].tolist() == ["BERT4Rec", "popularity", "BERT4Rec"]
    assert metrics["hr@10"].tolist() == [0.2, 0.1, 0.25]


def test_a_claimed_rate_stands_beside_what_its_epoch_allows():
    drawn = figures.show("claimed_rates", *audit_records())
    title = "1 of 2 claimed rates are more than the epoch time allows, by up to 2.5 times"
    assert drawn.layout.title.text == title
    allowed, claimed = (trace for trace in drawn.data if trace.mode == "markers")
    assert list(allowed.x) == [400, 90]
    assert list(claimed.x) == [1000, 90]
    assert [said.text for said in drawn.layout.annotations] == ["2.5 times", "1.0 times"]


def test_predictions_look_different_in_every_figure(records):
    for spec in DRAWN:
        if spec.name == "tuning_parallel":
            continue  # lines coloured by value; a trial is never a prediction
        mine = [r for r in records if (r["notebook"], r["name"]) == (spec.notebook, spec.needs)]
        looks = []
        for kind in ("measured", "predicted"):
            drawn = figures.show(spec.name, *(record | {"kind": kind} for record in mine))
            traces = drawn.to_plotly_json()["data"]
            looks.append([(t.get("marker"), t.get("line")) for t in traces])
            assert f"{kind} on cpu" in drawn.layout.title.subtitle.text
        assert str(looks[0]) != str(looks[1]), spec.name
    assert style.line("predicted", "red")["dash"] == "dash"
    assert style.bar("predicted", "red")["pattern"]["shape"] == "/"
    assert style.marker("predicted", "red")["symbol"] == "circle-open"


def values(figure: go.Figure, axis: str) -> list[list]:
    return [list(trace[axis]) for trace in figure.data]


def test_titles_state_what_the_records_say(records, dataset):
    titles = {}
    for spec in figures.FIGURES:
        mine = [r for r in records if (r["notebook"], r["name"]) == (spec.notebook, spec.needs)]
        figure = figures.show(spec.name, *mine)
        titles[spec.name] = figure.layout.title.text
        for axis in [*figure.select_xaxes(), *figure.select_yaxes()]:
            is_categories = axis.ticks == "" or axis.autorange == "reversed" or axis.matches
            is_categories = is_categories or figure.data[0].type == "parcoords"  # has axes of its own
            assert axis.title.text or is_categories, f"{spec.name}: an axis without a title"
    steps = dataset.manifest["steps"]
    lost = steps[0]["items"] - steps[1]["items"]
    assert lost > 0
    assert f"drops {lost} of {steps[0]['items']} items" in titles["preparation"]
    assert titles["learning_curves"] == "NDCG@10 on validation is best after 4 epochs"
    assert titles["metric_comparison"].startswith("BERT4Rec has the target")  # by its mean, 0.2
    assert titles["metric_comparison"].endswith("for 20.0% of users")
    assert titles["step_time"] == "Fastest: fp32, default, batch 64 with 4,000 sequences/s"
    assert titles["step_ladder"] == "From the seed study's step to “packed” a step is 25.0 times faster"
    assert titles["operators"] == "mm takes 25% of a step's own time"
    assert titles["compile_cost"] == "Compiling costs 8 s and has paid after 2,000 steps"
    assert titles["loss_parity"] == "Losses of fp32, bf16 differ by at most 1.00%"
    assert titles["published_rates"] == "The seed study's rates are up to 9.3 times what its epochs took"


def test_the_ladder_hangs_each_rung_from_the_one_above():
    figure = figures.show("step_ladder", *(r for r in speed_records() if r["name"] == "ladder"))
    bars = {
        name: (base, base + x)
        for trace in figure.data
        for name, base, x in zip(trace.y, trace.base, trace.x, strict=True)
    }
    assert bars["packed"] == pytest.approx((500.0, 20.0))  # ms
    assert bars["AMP"] == pytest.approx((20.0, 40.0))
    assert bars["seed study's step"][1] == pytest.approx(500.0)


def test_what_did_not_run_is_said_in_the_figure_and_has_no_mark():
    records = [r for r in speed_records() if r["name"] == "step"]
    figure = figures.show("step_time", *records)
    said = [annotation.text for annotation in figure.layout.annotations]
    assert said == ["out of memory"]
    assert "not applicable on this device: tf32, eager, batch 64" in figure.layout.title.subtitle.text
    assert sum(len(trace.x) for trace in figure.data if trace.type == "scatter") == 2
    nothing = [r for r in records if not r["timings"]]
    for name in ("step_time", "compile_cost", "published_rates"):
        assert figures.show(name, *nothing).layout.title.text
    assert figures.show("step_time", *nothing).layout.title.text == "No variant could be timed"


def test_lines_of_compile_cost_cross_where_it_has_paid():
    figure = figures.show("compile_cost", *(r for r in speed_records() if r["name"] == "step"))
    compiled, eager = (np.array(trace.y) for trace in figure.data)
    steps = np.array(figure.data[0].x)
    assert {trace.name for trace in figure.data} == {"eager", "compiled, default"}
    assert steps[np.argmin(abs(compiled - eager))] == pytest.approx(2000, rel=0.05)


def test_an_unmet_claim_stands_in_the_caption():
    (record, *_) = speed_records()
    unmet = tables.caption([record | {"claimed": "l4"}])
    assert "measured on cpu" in unmet
    assert "l4 was asked for and is not here" in unmet
    for claimed in ("auto", "cpu", None):
        assert "asked for" not in tables.caption([record | {"claimed": claimed}])


def test_the_published_reference_agrees_with_itself():
    published = reclib_records.reference()
    ratios = [
        run["claimed_per_second"] * run["epoch_seconds"] / run["sequences"] for run in published["throughput"]
    ]
    assert min(ratios) == pytest.approx(3.52, abs=0.01)
    assert max(ratios) == pytest.approx(9.31, abs=0.01)
    assert all(step["wrong"] for step in published["steps"])


def test_every_user_is_in_the_length_histogram(records):
    lengths = next(record for record in records if record["name"] == "sequence_lengths")
    (counts,) = values(figures.show("sequence_lengths", lengths), "y")
    assert sum(counts) == sum(lengths["series"]["users"])


def test_one_length_for_all_users_can_be_drawn():
    metrics = {"median_length": 7.0, "mean_length": 7.0, "max_length": 7}
    record = a_record("01_data_prep", "sequence_lengths", metrics, {"length": [7], "users": [3]})
    assert values(figures.show("sequence_lengths", record), "y") == [[3]]


def test_rank_bins_count_every_rank():
    ranks = np.array([1, 1, 2, 3, 5, 6, 10, 11, 1349])
    bins = pd.DataFrame(tables.rank_bins(ranks))
    assert bins["users"].sum() == ranks.size
    assert bins.iloc[:4].values.tolist() == [[1, 1, 2], [2, 2, 1], [3, 5, 2], [6, 10, 2]]
    assert bins.iloc[-1].tolist() == [1001, 2000, 1]
    assert tables.rank_bins(np.array([1]))["users"] == [1]


def test_descriptions_agree_with_the_dataset(dataset):
    made = described(dataset)
    assert sum(made["sequence_lengths"].series["users"]) == dataset.num_users
    assert made["sequence_lengths"].metrics["mean_length"] == pytest.approx(dataset.lengths.mean())
    popularity = made["item_popularity"]
    counts = np.bincount(dataset.items, minlength=dataset.num_items + 1)[1:]
    assert popularity.metrics["most_popular"] == counts.max()
    differences = np.abs(counts[:, None] - counts[None, :]).mean()  # Gini by its definition
    assert popularity.metrics["gini"] == pytest.approx(differences / (2 * counts.mean()))
    assert popularity.series["interaction_share"][-1] == pytest.approx(1.0)
    assert popularity.series["rank"] == sorted(set(popularity.series["rank"]))


def test_history_says_what_each_interaction_is_for():
    dataset = synthetic_dataset(50, 100, 10.0, seed=0)
    users = data_prep.example_users(dataset, seed=3)
    assert users == data_prep.example_users(dataset, seed=3)
    assert len(set(users)) == 3
    shown = data_prep.history(dataset, users[0], last=4)
    assert shown["used for"].tolist() == ["training"] * 2 + ["validation target", "test target"]
    assert shown["item"].tolist()[-1] == evaluation(dataset, "test").targets[users[0]]
    assert shown["position"].tolist()[-1] == dataset.lengths[users[0]]


def test_every_figure_has_a_chapter_and_no_two_have_one_name():
    assert {spec.notebook for spec in figures.FIGURES} <= set(findings.CHAPTERS)
    assert len({spec.name for spec in figures.FIGURES}) == len(figures.FIGURES)


def test_the_answer_of_a_comparison_says_no_more_than_its_claims():
    def scored(model, hr):
        metrics = {"hr@10": hr, "hr@10_low": hr - 0.01, "hr@10_high": hr + 0.01}
        return a_record("02_baseline", "test_metrics", metrics, own_params={"model": model})

    def compared(model, difference, adjusted_p, seeds):
        metrics = {"difference": difference, "adjusted_p": adjusted_p, "seeds": seeds, "reference_seeds": 3}
        metrics |= {"difference_low": difference - 0.01, "difference_high": difference + 0.01}
        own = {"model": model, "against": "bert4rec", "metric": "hr@10"}
        return a_record("02_baseline", "comparison", metrics, own_params=own)

    found = {
        "test_metrics": [scored("bert4rec", 0.2), scored("ease", 0.15), scored("causal", 0.21)],
        "comparison": [compared("ease", -0.05, 0.01, 0), compared("causal", 0.01, 0.3, 3)],
    }
    answer = findings.CHAPTERS["02_baseline"].answer
    assert answer(found) == (
        "On ml-100k (cpu) BERT4Rec 0.200 [0.190, 0.210] (HR@10) beats every counting baseline; over 3 seeds, "
        "corrected, against it: worse: EASE 0.150; not separated: causal twin 0.210."
    )
    found["comparison"][0] = compared("ease", -0.05, 0.01, 1)
    assert "is not shown to beat" in answer(found)
    assert "too few seeds: EASE 0.150" in answer(found)


def test_the_audit_counts_its_verdicts():
    tally = a_record("08_audit", "audit_verdicts", {"holds": 2, "contradicted": 5})
    assert findings.CHAPTERS["08_audit"].answer({"audit_verdicts": [tally]}) == (
        "Of 7 published claims that arithmetic can check: contradicted 5, holds 2."
    )


def test_a_chapter_without_records_answers_nothing():
    assert {chapter.answer({}) for chapter in findings.CHAPTERS.values()} == {""}


def test_the_answer_of_scaling_tells_what_size_gained_and_what_the_law_said():
    rows = [r for r in scaling_records() if r["name"] in ("prediction", "learning_curve")]
    law = next(r for r in rows if r["name"] == "prediction")
    law["metrics"] |= {"without_low": None, "without_high": None}
    said = findings.sentences("03_scaling", rows)
    assert said[0].startswith("Not told apart on ml-100k (cpu): NDCG@10 on validation is 0.070 for w32d2")
    assert said[-1] == "w384d2 is not measured yet; its record will carry 1."
    own, numbers = {"model": "w384d2"}, {"non_embedding": 3_500_000, "lowest_valid_loss": 6.05}
    largest = a_record("03_scaling", "learning_curve", numbers | {"valid_ndcg@10": 0.09}, own_params=own)
    numbers |= {"non_embedding": 25_000, "valid_ndcg@10": 0.01}
    other = a_record("03_scaling", "learning_curve", numbers, own_params={"model": "w32d2 half rate"})
    said = findings.sentences("03_scaling", [other, largest | {"configuration": {"prediction": "1"}}, *rows])
    assert said[0].startswith("Yes on ml-100k (cpu): NDCG@10 on validation is 0.070 for w32d2 and 0.090")
    assert said[-1] == "Measured 6.050 over 1 seed(s): error -0.050 nats (-0.8%), inside the band."


HOSTILE = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>{{ 7*7 }}'


def test_what_a_record_says_is_escaped_and_a_malformed_one_is_counted(records, tmp_path, capsys):
    for number, key in enumerate(("time", "label", "notebook", "name", "profile", "kind", "device", "data")):
        value = {"name": HOSTILE, "fingerprint": HOSTILE} if key in ("device", "data") else HOSTILE
        rows = [records[0], records[-1] | {key: value}, *(r | {key: value} for r in records[:20:7])]
        folder = tmp_path / str(number)
        for path in figures.build(rows, folder):
            html = path.read_text(encoding="utf-8")
            assert "<script>alert" not in html, key
            assert "<img" not in html, key
            assert "49" not in re.findall(r"onerror=alert\(1\)(?:&gt;|>)(\S*)", html), key
        assert Addresses((folder / "index.html").read_text()).open == []
    own = {"own_params": {"model": HOSTILE}, "params": {"dataset": HOSTILE}}
    found = [r | own if r["name"] in ("test_metrics", "learning_curve") else r for r in records]
    for path in figures.build(found, tmp_path / "own"):
        assert "<script>alert" not in path.read_text(encoding="utf-8")


def test_a_malformed_record_costs_nothing_but_itself(records, built, tmp_path, capsys):
    good = records[0]
    bad = [good | {"profile": "unheard"}, good | {"time": 5}, good | {"time": "<script>/*"}, "text", None]
    bad += [good | {"metrics": {"interactions": float("nan")}}, good | {"metrics": None}, good | {"data": 3}]
    bad += [{k: v for k, v in good.items() if k != "device"}, good | {"series": {"step": [1], "users": []}}]
    figures.build([*bad, *records], tmp_path)
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f"{len(bad)} left out" in index
    whole = content(built)
    assert {k: v for k, v in content(tmp_path).items() if k != "index.html"} == {
        k: v for k, v in whole.items() if k != "index.html"
    }
    figures.build([good | {"metrics": {}, "series": {}}, records[-1]], tmp_path / "unfit")  # of good form
    assert "figure preparation" in (tmp_path / "unfit" / "index.html").read_text(encoding="utf-8")
    assert "left out: figure preparation" in capsys.readouterr().err


def test_a_file_of_records_with_bad_lines_still_gives_a_page(tmp_path):
    folder = tmp_path / "executed" / "cpu"
    folder.mkdir(parents=True)
    line = b'{"time": "\xff"}\n{"metrics": NaN}\n{"broken": \n[1]\n'
    (folder / "results.jsonl").write_bytes(line)
    (file,) = figures.collect(tmp_path / "executed", tmp_path / "figures")
    assert "4 left out" in file.read_text(encoding="utf-8")


def test_two_datasets_of_one_name_have_figures_and_sentences_of_their_own(records, tmp_path):
    rows = [r for r in records if r["notebook"] == "01_data_prep"]
    first, second = (
        {"data": {"name": "ratings", "fingerprint": print_}} for print_ in ("aaaa1111bb", "cccc")
    )
    own = {"params": {"dataset": "/home/me/ratings.csv"}}
    both = [*(r | first | own for r in rows), *(r | second | own for r in rows), *rows]
    names = {path.name for path in figures.build(both, tmp_path)}
    assert {"preparation_ratings-aaaa1111-_cpu.html", "preparation_ratings-cccc-_cpu.html"} <= names
    assert "preparation_ml-100k_cpu.html" in names  # whose name nobody shares
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    study, yours = index.split('<section id="own">')
    assert "ratings" not in study[study.index("<main>") :]
    assert "ratings (aaaa1111)" in yours
    assert "ratings (cccc)" in yours
    assert "ml-100k" not in yours
    assert figures.main_figures([r | first | own for r in rows]) == {}


def test_a_notebook_without_records_says_how_to_run_it(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    text = "# 02 Is it <good>?\n\nA **bold** word, `code` and\n[a link](x.ipynb).\n\nMore."
    cell = {"cell_type": "markdown", "source": text.splitlines(keepends=True)}
    for name in ("02_baseline", "09_sketches"):
        (folder / f"{name}.ipynb").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))
    (file,) = figures.build([], tmp_path / "out")
    html = file.read_text()
    assert "Is it &lt;good&gt;?</h2>" in html
    assert "A <strong>bold</strong> word, <code>code</code> and a link.</p>" in html
    assert "More." not in html
    assert "<code>python -m reclib run 02 --profile quick</code>" in html
    assert "<code>make lab</code>, then <code>09_sketches.ipynb</code>" in html
    assert Addresses(html).open == []


def test_a_damaged_notebook_is_named(tmp_path):
    (tmp_path / "02_baseline.ipynb").write_text('{"cells": ')
    with pytest.raises(InputError, match=r"^02_baseline\.ipynb: not a notebook"):
        figures.questions(tmp_path)


def test_a_new_notebook_needs_no_change_of_the_page(tmp_path, monkeypatch, records):
    """Its records, figures and question stand there under its heading, without a chapter."""
    spec = figures.FIGURES[0]
    own = figures.Spec("new_figure", "09_new", spec.needs, spec.make)
    monkeypatch.setattr(figures, "FIGURES", [own])
    record = next(r for r in records if r["name"] == spec.needs) | {"notebook": "09_new"}
    figures.build([record], tmp_path)
    html = (tmp_path / "index.html").read_text()
    assert '<section id="09_new">' in html
    assert '<iframe src="new_figure_ml-100k_cpu.html"' in html


def test_a_figure_file_has_a_fixed_id(tmp_path):
    file = figures.write(go.Figure(), "empty", tmp_path)
    assert re.search(r'<div id="empty"', file.read_text())
    assert (tmp_path / "plotly.min.js").stat().st_size > 1_000_000
