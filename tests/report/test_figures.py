"""Figures, their files and the page that shows them, drawn of committed records."""

import copy
import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path

import pytest
from conftest import ROOT, python, refused
from figure_records import compared, of_sizes, record, title
from markupsafe import escape

from reclib import cli, records
from reclib.report import figures, findings, tables

# Data whose committed records give every figure and are soon drawn; of ml-1m, the race alone.
SMALL = ["ml-100k", "Beauty_item_org_rank", "synthetic", "ablations-ml-1m", "scaling-beauty", "ties-ml-1m"]
SMALL += ["tuning-tiny-ml-100k"]


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Committed records of the smaller datasets, of two devices."""
    rows = [r for r in records.read(ROOT / "executed") if r["label"] in ("cpu", "l4")]
    rows = [r for r in rows if (r["data"] or {}).get("name") in SMALL or r["name"] == "equal_time"]
    return records.latest(rows)


@pytest.fixture(scope="module")
def two(rows) -> list[dict]:
    """The records of two figures."""
    return [r for r in rows if r["name"] in ("item_popularity", "sequence_lengths")]


@pytest.fixture(scope="module")
def drawings(rows) -> list[figures.Drawing]:
    return list(figures.drawings(tables.distinct(rows)))


@pytest.fixture(scope="module")
def built(rows, drawings, tmp_path_factory) -> Path:
    """The folder of all figures, drawn once."""
    folder = tmp_path_factory.mktemp("figures")
    files = figures.build(rows, folder)
    assert {file.name for file in files} == {f"{drawing.file}.html" for drawing in drawings} | {"index.html"}
    assert {*folder.iterdir()} == {*files, folder / "plotly.min.js", folder / "figure.js"}
    return folder


def under(figure):
    return figure.layout.title.subtitle.text.replace("<br>", " ")


# -- every figure --------------------------------------------------------------------------------------------


def test_every_figure_tells_measured_from_predicted_titles_its_axes_and_leaves_records_alone(rows, drawings):
    of_specs = {drawing.spec.name: drawing for drawing in drawings}
    names = {(row["notebook"], row["name"]) for row in rows}
    recorded = [spec.name for spec in figures.FIGURES if (spec.notebook, spec.needs) in names]
    assert list(of_specs) == recorded
    for name, drawing in of_specs.items():
        before, looks = copy.deepcopy(drawing.records), []
        for kind in ("measured", "predicted"):
            figure = figures.show(name, *({**row, "kind": kind} for row in drawing.records))
            assert f"{kind} on " in under(figure)
            traces = figure.to_plotly_json()["data"]
            looks.append(str([(trace.get("marker"), trace.get("line")) for trace in traces]))
        assert looks[0] != looks[1] or not traces, name
        axes = [*figure.select_xaxes(), *figure.select_yaxes()] if traces else []
        titled = {axis.domain for axis in axes if axis.title.text}  # of a column, one axis says it for all
        for axis in axes:
            is_categories = axis.ticks == "" or axis.autorange == "reversed" or axis.matches
            assert axis.domain in titled or is_categories, f"{name}: an axis without a title"
        assert drawing.records == before, name


def test_another_process_writes_the_same_bytes_from_records_in_another_order(rows, built, tmp_path):
    newest_first = sorted(rows, key=lambda row: row["time"], reverse=True)
    (tmp_path / "records.json").write_text(json.dumps(newest_first))
    code = """import json, pathlib, sys
from reclib.report import figures
figures.build(json.load(open("records.json")), pathlib.Path("built"))
print("torch" in sys.modules)"""
    process = python("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True)
    assert process.stdout == "False\n"
    other, own = (
        {p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path / "built", built)
    )
    assert other == own


def test_titles_state_what_the_records_say(drawings):
    rows = {drawing.spec.name: drawing.records for drawing in drawings if drawing.label == "cpu"}
    rungs = sorted(rows["step_ladder"], key=lambda row: row["own_params"]["rung"])
    ladder = [row["timings"]["step_seconds"] for row in rungs if "step_seconds" in row["timings"]]
    rates = [row["timings"].get("sequences_per_second") or 0 for row in rows["step_time"]]
    ratios = [row["metrics"]["ratio"] for row in rows["claimed_rates"]]
    for name, part in {
        "step_ladder": f"a step is {ladder[0] / min(ladder):,.1f} times faster",
        "step_time": f"with {max(rates):,.0f} sequences/s",
        "claimed_rates": f"more than the epoch time allows, by up to {max(ratios):.1f} times",
    }.items():
        assert part in title(name, *rows[name])


def test_what_did_not_run_is_said_in_the_figure_and_has_no_mark():
    def step(precision, status):
        own = {"precision": precision, "compile_mode": "off", "batch_size": 64, "status": status}
        return record("04_amp_compile", "step", own)

    figure = figures.show("step_time", step("bf16", "oom"), step("tf32", "not applicable"))
    assert figure.layout.title.text == "No variant could be timed"
    assert [annotation.text for annotation in figure.layout.annotations] == ["out of memory"]
    assert "not applicable on this device: tf32, eager, batch 64" in under(figure)
    assert not [trace for trace in figure.data if trace.type == "scatter"]


def test_open_marks_are_those_that_cannot_be_compared(drawings):
    drawing = next(drawing for drawing in drawings if drawing.spec.name == "protocols")
    comparable = {row["own_params"]["protocol"]: row["own_params"]["comparable"] for row in drawing.records}
    figure = figures.show("protocols", *drawing.records)
    names = [name.replace("<br>", " ") for name in figure.layout.yaxis.ticktext]
    marks = [t for t in figure.data if t.customdata is not None and round(t.y[0]) < len(comparable)]
    assert {trace.marker.symbol for trace in marks} > {"diamond-open"}
    for trace in marks:
        for y in trace.y:
            assert (trace.marker.symbol == "diamond-open") != comparable[names[round(y)]]


# -- files and the page --------------------------------------------------------------------------------------


def test_a_rebuild_touches_no_file_removes_old_figures_and_leaves_others_alone(two, built, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.html").write_text("<p>by hand</p>")
    figures.build(two, tmp_path)
    left = {f"{name}_ml-100k_cpu.html" for name in ("item_popularity", "sequence_lengths")}
    left |= {"index.html", "plotly.min.js", "figure.js"}
    assert {path.name for path in tmp_path.iterdir()} == left | {"mine.html"}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    figures.build(json.loads(json.dumps(two)), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


HOSTILE = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>{{ 7*7 }}'


def test_an_executed_notebook_is_a_page_whose_outputs_run_no_script(two, tmp_path, monkeypatch):
    shown, place, out = [], tmp_path / "executed/cpu", tmp_path / "out"
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    monkeypatch.setattr("plotly.io.renderers.default", "plotly_mimetype")
    popularity = next(row for row in two if row["name"] == "item_popularity")
    figures.show("item_popularity", popularity)._ipython_display_()
    assert "A tenth of the items" in shown[0]["text/html"]
    assert "figures/index.html, question 01" in shown[0]["text/html"]
    outputs = [{"output_type": "display_data", "data": data} for data in (*shown, {"text/html": HOSTILE})]
    cells = [{"cell_type": "code", "source": ["1 < 2"], "outputs": outputs}]
    cells.append({"cell_type": "markdown", "source": "# A title\n[two](02_baseline.ipynb)"})
    place.mkdir(parents=True)
    for name in ("01_data_prep", "01_data_prep.failed"):
        (place / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
    figures.build(two[:1], out, roots=[place.parent])
    html = (out / "01_data_prep_cpu.html").read_text()
    (nonce,) = re.findall("script-src 'nonce-([0-9a-f]{32})'", html)
    assert html.count(f'<script nonce="{nonce}"') == 4  # plotly, figure.js, a check of both, and what draws
    for part in ("<pre>1 &lt; 2</pre>", "<h1>A title</h1>", "index.html#02_baseline", '"text": "A tenth of'):
        assert part in html, part
    assert '<a href="01_data_prep_cpu.html">cpu</a>' in (out / "index.html").read_text()
    monkeypatch.setitem(sys.modules, "mistune", None)
    figures.build(two[:1], out, roots=[place.parent])
    assert '<a href="../executed/cpu/01_data_prep.ipynb">cpu</a>' in (out / "index.html").read_text()
    assert not (out / "01_data_prep_cpu.html").exists()


def test_pages_load_nothing_from_elsewhere_and_state_question_answer_and_origin(rows, two, built):
    for path in built.glob("*.html"):
        for address in re.findall(r' (?:src|data-src|href)="([^"]*)"', path.read_text(encoding="utf-8")):
            assert address.startswith("#") or (built / address).is_file(), address
    page = (built / "index.html").read_text()
    audit = findings.sentences("08_audit", [row for row in rows if row["notebook"] == "08_audit"])
    origin = figures.origin(two[:1])
    study = findings.study(tables.distinct(rows))
    assert study
    for text in ("What exactly is being predicted?", audit[0], *study, origin.text):
        assert str(escape(text)) in page
    assert f"<time>{origin.day}</time>" in page
    assert "prefers-color-scheme: dark" in page
    assert "needs plotly.min.js and figure.js" in (built / "sequence_lengths_ml-100k_cpu.html").read_text()
    assert "smoke run" not in page
    assert "http" not in page


def test_smoke_runs_are_called_that_everywhere(rows, two, tmp_path):
    speed = [row for row in rows if (row["notebook"], row["label"]) == ("04_amp_compile", "cpu")]
    *drawn, page = figures.build([row | {"profile": "smoke"} for row in (*speed, *two)], tmp_path)
    for path in drawn:
        assert "smoke run, not a result" in path.read_text(), path.name
    answers = 2  # beside the answer of each notebook too
    assert page.read_text().count("smoke run, not a result") == len(drawn) + answers


def test_what_a_record_says_is_escaped(rows, two, tmp_path):
    named = {"name": HOSTILE, "fingerprint": HOSTILE}
    changes = {"label": HOSTILE, "notebook": HOSTILE, "name": HOSTILE, "device": named, "data": named}
    hostile = [row | {key: value} for key, value in changes.items() for row in two]
    own = {"own_params": {"model": HOSTILE}, "params": {"dataset": HOSTILE}}
    of_models = ("test_metrics", "learning_curve")
    hostile += [r | own for r in rows if r["notebook"] == "02_baseline" and r["name"] in of_models]
    files = figures.build(hostile, tmp_path)
    assert len(files) > 2 * len(two)
    for path in files:
        html = path.read_text(encoding="utf-8")
        assert "<script>alert" not in html
        assert "<img" not in html
        assert "49" not in re.findall(r"onerror=alert\(1\)(?:&gt;|>)(\S*)", html)


def test_a_malformed_record_and_one_that_breaks_a_figure_cost_nothing_but_themselves(tmp_path, two, capsys):
    file = tmp_path / "executed" / "cpu" / "results.jsonl"
    file.parent.mkdir(parents=True)
    good = record("08_audit", "audit_verdicts", metrics={"holds": 2}) | {"schema": 1}
    changes = [{"profile": "unheard"}, {"time": 5}, {"time": "<script>/*"}, {"metrics": None}, {"data": 3}]
    bad = [json.dumps(good | change).encode() for change in changes]
    bad += [b'{"time": "\xff"}', b'{"metrics": NaN}', b'{"broken": ', b"[1]"]
    file.write_bytes(b"\n".join([*bad, json.dumps(good).encode()]) + b"\n")
    (page,) = figures.collect(tmp_path / "executed", tmp_path / "figures")
    assert f"{len(bad)} left out" in page.read_text(encoding="utf-8")
    assert "2 hold." in page.read_text(encoding="utf-8")
    figures.build([two[0] | {"metrics": {}, "series": {}}, two[1]], tmp_path / "unfit")
    assert len([*(tmp_path / "unfit").glob("*_ml-100k_cpu.html")]) == 1
    assert "left out: figure " in capsys.readouterr().err


def test_two_datasets_of_one_name_and_a_users_own_stand_apart(two, tmp_path):
    odd = two[0] | {"data": {"name": 'a "b"/../c', "fingerprint": "0"}}
    names = sorted(path.name for path in figures.build([odd], tmp_path / "odd"))
    assert names == ["index.html", f"{two[0]['name']}_a-b-..-c_cpu.html"]
    own = {"params": {"dataset": "/home/me/ratings.csv"}}
    prints = [{"data": {"name": "ratings", "fingerprint": print_}} for print_ in ("aaaa1111bb", "cccc")]
    users = [row | data | own for data in prints for row in two]
    names = {path.name for path in figures.build([*users, *two], tmp_path)}
    shared = {f"item_popularity_ratings-{start}-_cpu.html" for start in ("aaaa1111", "cccc")}
    assert shared | {"item_popularity_ml-100k_cpu.html"} <= names  # whose name nobody shares
    study_html, own_html = (tmp_path / "index.html").read_text(encoding="utf-8").split('<section id="own">')
    assert "ratings" not in study_html[study_html.index("<main>") :]
    assert "ratings (aaaa1111)" in own_html
    assert "ratings (cccc)" in own_html
    assert "ml-100k" not in own_html
    assert figures.main_figures(users) == {}


def test_a_notebook_without_records_says_how_to_run_it(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    cell = {"cell_type": "markdown", "source": ["# 02 Is it <good>?\n", "\n", "A **bold** word."]}
    (folder / "02_baseline.ipynb").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))
    (file,) = figures.build([], tmp_path / "out")
    html = file.read_text()
    assert "Is it &lt;good&gt;?</h2>" in html
    assert "A <strong>bold</strong> word.</p>" in html
    assert "<code>python -m reclib run 02 --profile quick</code>" in html
    assert "no records yet" in html
    assert {chapter.findings({}) == [] for chapter in findings.CHAPTERS.values()} == {True}
    (folder / "02_baseline.ipynb").write_text('{"cells": ')
    assert refused(None, figures.questions, folder).startswith("02_baseline.ipynb: not a notebook")


# -- which records are shown ---------------------------------------------------------------------------------


def test_the_profile_with_most_work_is_shown_and_its_newest_parameters():
    def curve(profile, time, epochs, seed):
        params = {"epochs": epochs, "seeds": [seed], "gpu": "auto"}
        about = {"profile": profile, "time": time, "params": params, "seed": seed}
        return record("02_baseline", "learning_curve", **about)

    smoke, old = curve("smoke", "2026-01-09", 1, 0), curve("quick", "2026-01-01", 50, 0)
    new = [curve("quick", f"2026-01-0{day}", 100, seed) for day, seed in ((2, 1), (3, 0))]
    other = curve("smoke", "2026-01-01", 1, 0) | {"label": "l4"}
    groups = tables.groups([smoke, *new, other, old])
    assert groups == {("ml-100k", "cpu"): [new[1], new[0]], ("ml-100k", "l4"): [other]}


def test_a_plan_of_more_work_does_not_hide_what_was_measured():
    def step(kind, profile, steps):
        about = {"profile": profile, "params": {"steps": steps}, "label": "h100", "kind": kind}
        return record("06_hardware", "hardware_step", {"size": "85m", "kind": kind}, **about)

    plan, measured = step("predicted", "quick", 12), step("measured", "custom", 7)
    (shown,) = tables.groups([plan, step("measured", "smoke", 4), measured]).values()
    assert shown == [measured, plan]
    (both,) = tables.groups([plan, measured, step("measured", "full", 30)]).values()
    assert both == [step("measured", "full", 30)]


def test_an_unmet_claim_stands_in_the_caption():
    for claimed, is_unmet in (("l4", True), ("auto", False), ("cpu", False), (None, False)):
        caption = tables.caption([record("04_amp_compile", "step", claimed=claimed)])
        assert "measured on cpu" in caption
        assert ("l4 was asked for and is not here" in caption) == is_unmet


# -- pictures ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not any(map(shutil.which, figures.BROWSERS)), reason="no Chromium or Chrome is installed")
def test_the_first_figure_is_drawn_and_is_not_blank(tmp_path):
    file, *_ = figures.draw(of_sizes(), tmp_path / "out")
    assert file == tmp_path / "out" / "readme.png"
    width, height = struct.unpack(">II", file.read_bytes()[16:24])
    assert width == figures.WIDTH
    assert height > 200
    assert file.stat().st_size > 15_000  # a blank page has 3,000 bytes
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"readme.png", "03_scaling.png"}


def test_without_a_browser_it_says_what_to_install_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("RECLIB_CHROMIUM", raising=False)
    assert cli.entry(["pictures", "--out", str(tmp_path / "out")]) == 2
    assert re.fullmatch("error: no browser to draw pictures with.*\n", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RECLIB_CHROMIUM", "a-browser")
    assert "none of a-browser is installed" in refused(None, figures.browser)


def test_a_browser_that_fails_is_told_in_one_line(tmp_path):
    browser = tmp_path / "broken"
    browser.write_text("#!/bin/sh\necho first >&2\necho 'no display' >&2\nexit 1\n")
    browser.chmod(0o755)
    files = (tmp_path / "page.html", tmp_path / "page.png")
    message = refused(None, figures.photograph, str(browser), *files, 100)
    assert message == "broken could not draw page.html: no display"


def test_of_several_runs_that_of_most_work_is_drawn_then_with_enough_seeds_then_the_newest():
    def last(**about):
        return record("01_data_prep", "last_items", metrics={"last_item_by_tie_rule_share": 0.5}, **about)

    old, new = last(label="l4", time="2026-01-01"), last(time="2026-01-02")
    long = last(profile="grid", label="t4", time="2026-01-01")
    assert figures.main_figures([]) == {}
    assert figures.main_figures([new, old]) == {"last_items": [new]}
    assert figures.main_figures([new, old, long]) == {"last_items": [long]}
    runs = [
        compared("causal", 0.1, seeds=seeds, reference_seeds=reference)
        | {"label": label, "time": f"2026-01-0{day}", "profile": "quick"}
        for label, day, seeds, reference in (("cpu", 1, 3, 3), ("l4", 2, 1, 1), ("t4", 3, 3, 2))
    ]
    assert figures.main_figures(runs[::-1]) == {"comparison": [runs[0]]}
