"""The figures of data, speed and devices, their files, and the page that shows them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import figure_records
import pytest
from figure_records import record

from reclib import system
from reclib.config import DataConfig, InputError
from reclib.data.prepare import prepare
from reclib.experiments import data_prep
from reclib.report import figures, findings, tables

ELSEWHERE = ("popularity_by_size", "tie_rules")  # of several grids: tests of tables and scoring draw them
STUDY = {"profile": "quick", "data": {"name": "ml-100k", "fingerprint": "abcd"}}
CURVE = {"epoch": [1, 2, 3, 4], "train_loss": [7.0, 6.0, 5.5, 5.4]}
CURVE |= {"valid_ndcg@10": [None, 0.05, None, 0.07]}
DRAWN = [  # the others are of several sweeps and datasets
    spec for spec in figures.FIGURES if spec.name != "scaling_sweeps" and spec.choose is None
]
SPEED = figure_records.speed()


def described(dataset):
    found = data_prep.divisions(dataset, seed=0)
    return {
        "preparation": data_prep.steps(dataset),
        "sequence_lengths": data_prep.lengths(dataset),
        "item_popularity": data_prep.popularity(dataset),
        "last_items": data_prep.last_items(dataset),
        "over_time": data_prep.over_time(dataset, found),
        "cold": data_prep.cold(dataset, found),
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIB_DATA", str(tmp_path_factory.mktemp("cache")))
        return prepare(DataConfig(dataset="synthetic", synthetic_items=150, min_item=20))


@pytest.fixture(scope="module")
def records(dataset):
    """What every figure of one dataset is made of."""
    found = [
        record("01_data_prep", name, metrics=made.metrics, series=made.series)
        for name, made in described(dataset).items()
    ]
    found += [record("02_baseline", "learning_curve", series=CURVE, seed=seed) for seed in (0, 1)]
    for model, hr in (("BERT4Rec", 0.2), ("popularity", 0.1)):
        own, metrics = {"model": model}, figure_records.ends("hr@10", hr, 0.02, 0.01)
        found.append(record("02_baseline", "test_metrics", own, metrics))
    found.append(record("02_baseline", "test_metrics", {"model": "BERT4Rec"}, {"hr@10": 0.25}, seed=0))
    above = ("learning_curve", "test_metrics")
    made = [one for make in figure_records.EVERY.values() for one in make()]
    found += [one | STUDY for one in made if one["name"] not in above]
    found += [*figure_records.adapters(), *SPEED, *figure_records.hardware(), *figure_records.scaling()]
    found += figure_records.audit()
    found[-1]["device"] = {"name": "<i>Odd & named</i>"}
    return found


@pytest.fixture(scope="module")
def built(records, tmp_path_factory) -> Path:
    """The folder of all figures, drawn once."""
    folder = tmp_path_factory.mktemp("figures")
    files = figures.build(records, folder)
    assert {*files} == {file for file in folder.iterdir() if file.name != "plotly.min.js"}
    names = {f"{spec.name}_ml-100k_cpu.html" for spec in DRAWN}
    assert {path.name for path in folder.iterdir()} == names | {"index.html", "plotly.min.js"}
    return folder


@pytest.fixture(scope="module")
def shown(records):
    """Every figure, measured and predicted."""
    found = {}
    for spec in figures.FIGURES:
        mine = [r for r in records if (r["notebook"], r["name"]) == (spec.notebook, spec.needs)]
        mine = spec.choose(figure_records.of_sizes()) if spec.choose else mine
        if spec.name in ELSEWHERE:
            continue
        for kind in ("measured", "predicted"):
            found[spec.name, kind] = figures.show(spec.name, *(one | {"kind": kind} for one in mine))
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def title(figure):
    return figure.layout.title.text


def under(figure):
    return figure.layout.title.subtitle.text.replace("<br>", " ")


# -- files and the page --------------------------------------------------------------------------------------


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


def test_a_rebuild_touches_no_file_removes_old_figures_and_leaves_others_alone(records, built, tmp_path):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine.html").write_text("<p>by hand</p>")
    figures.build(records[:2], tmp_path)
    left = {"preparation_ml-100k_cpu.html", "sequence_lengths_ml-100k_cpu.html", "mine.html"}
    assert {path.name for path in tmp_path.iterdir()} == left | {"index.html", "plotly.min.js"}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    figures.build(json.loads(json.dumps(records[:2])), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


def test_an_executed_notebook_is_a_page_whose_outputs_run_no_script(records, tmp_path, monkeypatch):
    shown, place = [], tmp_path / "executed/cpu"
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    monkeypatch.setattr("plotly.io.renderers.default", "plotly_mimetype")
    figures.show("preparation", records[0])._ipython_display_()
    assert "The k-core" in shown[0]["text/html"]
    assert "figures/index.html, question 01" in shown[0]["text/html"]
    outputs = [{"output_type": "display_data", "data": data} for data in (*shown, {"text/html": HOSTILE})]
    cells = [{"cell_type": "code", "source": ["1 < 2"], "outputs": outputs}]
    cells.append({"cell_type": "markdown", "source": "# A title\n[two](02_baseline.ipynb)"})
    place.mkdir(parents=True)
    for name in ("01_data_prep", "01_data_prep.failed"):
        (place / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))
    figures.build(records[:1], tmp_path / "out", roots=[place.parent])
    html = (tmp_path / "out/01_data_prep_cpu.html").read_text()
    (nonce,) = re.findall("script-src 'nonce-([0-9a-f]{32})'", html)
    assert html.count(f'<script nonce="{nonce}"') == 2  # plotly, and what draws
    for part in ("<pre>1 &lt; 2</pre>", "<h1>A title</h1>", "index.html#02_baseline", '"text": "The k-core'):
        assert part in html, part
    page = (tmp_path / "out/index.html").read_text()
    assert '<a href="01_data_prep_cpu.html">cpu</a>' in page
    monkeypatch.setitem(sys.modules, "mistune", None)
    figures.build(records[:1], tmp_path / "out", roots=[place.parent])
    assert '<a href="../executed/cpu/01_data_prep.ipynb">cpu</a>' in (tmp_path / "out/index.html").read_text()
    assert not (tmp_path / "out/01_data_prep_cpu.html").exists()


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


def test_pages_are_whole_load_nothing_from_elsewhere_and_state_question_answer_and_origin(built):
    for path in built.glob("*.html"):
        parsed = Addresses(path.read_text(encoding="utf-8"))
        assert parsed.open == [], path.name
        for address in parsed.found:
            assert address.startswith("#") or (built / address).is_file(), address
    page = (built / "index.html").read_text()
    for text in (
        "What exactly is being predicted?",
        "HR@10 on ml-100k (cpu): BERT4Rec 0.200 [0.180, 0.210], popularity 0.100 [0.080, 0.110]",
        "How cheaply: from the seed study&#39;s step to “packed” a step is 25.0 times faster (cpu).",
        "which trains 3,200 sequences/s; rates as multiples of it: fp32 compiled ",
        "Of 7 published claims that arithmetic can check 2 hold, 5 are contradicted.",
        "Measured on A processor (cpu), profile quick, data ml-100k abcd,",
        "<time>2026-01-02</time>",
        "&lt;i&gt;Odd &amp; named&lt;/i&gt;",
        "prefers-color-scheme: dark",
    ):
        assert text in page
    assert "smoke run" not in page
    assert "http" not in page


def test_smoke_runs_are_called_that_everywhere(records, tmp_path):
    smoke = [one | {"profile": "smoke"} for one in [*records[:3], *SPEED]]
    files = figures.build(smoke, tmp_path)
    for path in files:
        assert "smoke run, not a result" in path.read_text(), path.name
    answers = 2  # beside the answer of each notebook too
    assert (tmp_path / "index.html").read_text().count("smoke run, not a result") == len(files) - 1 + answers
    assert "smoke run" in under(figures.show("preparation", smoke[0]))
    assert "smoke run" not in under(figures.show("preparation", records[0]))


def test_without_records_of_figures_there_is_still_a_page(tmp_path):
    (file,) = figures.build([], tmp_path)
    assert "no records yet" in file.read_text()
    assert figures.build([record("06_hardware", "price", metrics={"usd": 1.0})], tmp_path) == [file]
    assert {chapter.findings({}) == [] for chapter in findings.CHAPTERS.values()} == {True}


def test_odd_dataset_names_make_plain_file_names(records, tmp_path):
    odd = records[0] | {"data": {"name": 'a "b"/../c', "fingerprint": "0"}}
    names = sorted(path.name for path in figures.build([odd], tmp_path / "out"))
    assert names == ["index.html", "preparation_a-b-..-c_cpu.html"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


HOSTILE = '</script><script>alert(1)</script>"><img src=x onerror=alert(1)>{{ 7*7 }}'


def test_what_a_record_says_is_escaped(records, tmp_path):
    named = {"name": HOSTILE, "fingerprint": HOSTILE}
    changes = {"label": HOSTILE, "notebook": HOSTILE, "name": HOSTILE, "device": named, "data": named}
    rows = [one | {key: value} for key, value in changes.items() for one in (records[0], records[-1])]
    own = {"own_params": {"model": HOSTILE}, "params": {"dataset": HOSTILE}}
    rows += [one | own for one in records if one["name"] in ("test_metrics", "learning_curve")]
    for path in figures.build(rows, tmp_path):
        html = path.read_text(encoding="utf-8")
        assert "<script>alert" not in html
        assert "<img" not in html
        assert "49" not in re.findall(r"onerror=alert\(1\)(?:&gt;|>)(\S*)", html)
    assert Addresses((tmp_path / "index.html").read_text()).open == []


def test_a_malformed_record_and_one_that_breaks_a_figure_cost_nothing_but_themselves(
    tmp_path, records, capsys
):
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
    figures.build([records[0] | {"metrics": {}, "series": {}}, records[-1]], tmp_path / "unfit")
    assert "figure preparation" in (tmp_path / "unfit" / "index.html").read_text(encoding="utf-8")
    assert "left out: figure preparation" in capsys.readouterr().err


def test_two_datasets_of_one_name_and_a_users_own_stand_apart(records, tmp_path):
    rows, own = records[:2], {"params": {"dataset": "/home/me/ratings.csv"}}
    prints = [{"data": {"name": "ratings", "fingerprint": print_}} for print_ in ("aaaa1111bb", "cccc")]
    mine = [one | data | own for data in prints for one in rows]
    names = {path.name for path in figures.build([*mine, *rows], tmp_path)}
    assert {"preparation_ratings-aaaa1111-_cpu.html", "preparation_ratings-cccc-_cpu.html"} <= names
    assert "preparation_ml-100k_cpu.html" in names  # whose name nobody shares
    study, yours = (tmp_path / "index.html").read_text(encoding="utf-8").split('<section id="own">')
    assert "ratings" not in study[study.index("<main>") :]
    assert "ratings (aaaa1111)" in yours
    assert "ratings (cccc)" in yours
    assert "ml-100k" not in yours
    assert figures.main_figures(mine) == {}


def test_a_notebook_without_records_says_how_to_run_it(tmp_path, monkeypatch):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    text = "# 02 Is it <good>?\n\nA **bold** word."
    cell = {"cell_type": "markdown", "source": text.splitlines(keepends=True)}
    (folder / "02_baseline.ipynb").write_text(json.dumps({"cells": [cell]}))
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))
    (file,) = figures.build([], tmp_path / "out")
    html = file.read_text()
    assert "Is it &lt;good&gt;?</h2>" in html
    assert "A <strong>bold</strong> word.</p>" in html
    assert "<code>python -m reclib run 02 --profile quick</code>" in html
    assert Addresses(html).open == []
    (folder / "02_baseline.ipynb").write_text('{"cells": ')
    with pytest.raises(InputError, match=r"^02_baseline\.ipynb: not a notebook"):
        figures.questions(folder)


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
    unmet = tables.caption([SPEED[0] | {"claimed": "l4"}])
    assert "measured on cpu" in unmet
    assert "l4 was asked for and is not here" in unmet
    for claimed in ("auto", "cpu", None):
        assert "asked for" not in tables.caption([SPEED[0] | {"claimed": claimed}])


# -- what figures show ---------------------------------------------------------------------------------------


def test_predictions_look_different_in_every_figure(shown):
    for spec in DRAWN:
        looks = []
        for kind in ("measured", "predicted"):
            drawn = shown[spec.name, kind]
            traces = drawn.to_plotly_json()["data"]
            looks.append(str([(trace.get("marker"), trace.get("line")) for trace in traces]))
            assert f"{kind} on cpu" in under(drawn)
        assert looks[0] != looks[1], spec.name


def test_titles_state_what_the_records_say(shown, dataset):
    for spec in figures.FIGURES:
        if spec.name in ELSEWHERE:
            continue
        figure = shown[spec.name, "measured"]
        for axis in [*figure.select_xaxes(), *figure.select_yaxes()]:
            is_categories = axis.ticks == "" or axis.autorange == "reversed" or axis.matches
            assert axis.title.text or is_categories, f"{spec.name}: an axis without a title"
    steps = dataset.manifest["steps"]
    lost = steps[0]["items"] - steps[1]["items"]
    assert lost > 0
    for name, said in {
        "preparation": f"drops {lost} of {steps[0]['items']} items",
        "learning_curves": "NDCG@10 on validation is best after 4 epochs",
        "metric_comparison": "BERT4Rec has the target among its ten first for 20.0% of users",  # by its mean
        "step_ladder": "From the seed study's step to “packed” a step is 25.0 times faster",
        "compile_cost": "Compiling costs 8 s and has paid after 2,000 steps",
        "loss_parity": "Losses of fp32, bf16 differ by at most 1.00%",
        "claimed_rates": "1 of 2 claimed rates are more than the epoch time allows, by up to 2.5 times",
    }.items():
        assert said in title(shown[name, "measured"])


def test_what_did_not_run_is_said_in_the_figure_and_has_no_mark(shown):
    figure = shown["step_time", "measured"]
    assert [annotation.text for annotation in figure.layout.annotations] == ["out of memory"]
    assert "not applicable on this device: tf32, eager, batch 64" in under(figure)
    assert sum(len(trace.x) for trace in figure.data if trace.type == "scatter") == 2
    nothing = [one for one in SPEED if one["name"] == "step" and not one["timings"]]
    assert title(figures.show("compile_cost", *nothing))
    assert title(figures.show("step_time", *nothing)) == "No variant could be timed"
