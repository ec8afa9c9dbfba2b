"""Figures of the study: pure functions from a table of records to a `go.Figure`, and the way to files.

A figure knows nothing but records, so all of them are rebuilt offline and without torch. To add one:
a function from table to figure, and a line in `FIGURES`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from reclib import records, system
from reclib.config import InputError
from reclib.evaluate import statistics
from reclib.parameters import NOTEBOOKS
from reclib.report import accuracy_figures, data_figures, findings, scaling_figures, speed_figures, tables
from reclib.report.findings import CHAPTERS
from reclib.report.style import HEIGHT
from reclib.report.tables import PROFILES, Record
from reclib.system import Parser

_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}


@dataclass(frozen=True)
class Spec:
    """One figure of the study."""

    name: str  # of its file
    notebook: str
    needs: str  # name of the records that it is made of
    make: Callable[[pd.DataFrame], go.Figure]
    across: bool = False  # one figure of all devices, instead of one for each
    beside: str = ""  # name of further records that are drawn with those of the same data and device
    of: str = ""  # how the names of the data begin that it is drawn of, where it is not of all


def show(name: str, *records: Record) -> go.Figure:
    """Return the figure `name` of `FIGURES` for these records, captioned."""
    figure = next(spec for spec in FIGURES if spec.name == name).make(tables.table(records))
    under = [tables.caption(records), figure.layout.title.subtitle.text]
    return figure.update_layout(title_subtitle_text="<br>".join(text for text in under if text))


FIGURES: list[Spec] = [
    Spec("preparation", "01_data_prep", "preparation", data_figures.preparation),
    Spec("repeats", "01_data_prep", "repeats", data_figures.repeats),
    Spec("interactions_over_time", "01_data_prep", "over_time", data_figures.interactions_over_time),
    Spec("sequence_lengths", "01_data_prep", "sequence_lengths", data_figures.sequence_lengths),
    Spec("item_popularity", "01_data_prep", "item_popularity", data_figures.item_popularity),
    Spec("tied_timestamps", "01_data_prep", "tied_timestamps", data_figures.tied_timestamps),
    Spec("last_items", "01_data_prep", "last_items", data_figures.last_items),
    Spec("cold_start", "01_data_prep", "cold", data_figures.cold_start),
    Spec("learning_curves", "02_baseline", "learning_curve", accuracy_figures.learning_curves),
    Spec("metric_comparison", "02_baseline", "test_metrics", accuracy_figures.metric_comparison),
    Spec("comparison", "02_baseline", "comparison", accuracy_figures.comparison),
    Spec("ablation", "02_baseline", "validation_difference", accuracy_figures.ablation),
    Spec("equal_time", "02_baseline", "equal_time", accuracy_figures.equal_time),
    Spec("rank_histogram", "02_baseline", "rank_histogram", accuracy_figures.rank_histogram),
    Spec("protocols", "02_baseline", "protocol", accuracy_figures.protocols),
    Spec("shuffle_control", "02_baseline", "shuffle_control", accuracy_figures.shuffle_control),
    Spec("groups", "02_baseline", "groups", accuracy_figures.groups),
    Spec("beyond_accuracy", "02_baseline", "beyond_accuracy", accuracy_figures.beyond_accuracy),
    Spec("scaling_curve", "03_scaling", "learning_curve", scaling_figures.scaling_curve, beside="prediction"),
    Spec(
        "scaling_accuracy",
        "03_scaling",
        "learning_curve",
        scaling_figures.scaling_accuracy,
        beside="prediction",
    ),
    Spec(
        "scaling_sweeps",
        "03_scaling",
        "learning_curve",
        scaling_figures.scaling_sweeps,
        beside="prediction",
        of="scaling-",
    ),
    Spec("tuning_history", "03_scaling", "trial", scaling_figures.tuning_history),
    Spec("tuning_importance", "03_scaling", "tuning", scaling_figures.tuning_importance),
    Spec("tuning_parallel", "03_scaling", "trial", scaling_figures.tuning_parallel),
    Spec("step_time", "04_amp_compile", "step", speed_figures.step_time),
    Spec("step_ladder", "04_amp_compile", "ladder", speed_figures.step_ladder),
    Spec("operators", "04_amp_compile", "operators", speed_figures.operators),
    Spec("compile_cost", "04_amp_compile", "step", speed_figures.compile_cost),
    Spec("loss_parity", "04_amp_compile", "loss_curve", speed_figures.loss_parity),
    Spec("published_rates", "04_amp_compile", "step", speed_figures.published_rates),
    Spec("accuracy_by_share", "05_ilora", "adaptation", accuracy_figures.accuracy_by_share),
    Spec("adaptation_gain", "05_ilora", "adaptation_gain", accuracy_figures.adaptation_gain),
    Spec("gate_comparison", "05_ilora", "gate_comparison", accuracy_figures.gate_comparison),
    Spec("adapter_cost", "05_ilora", "adapter_step", accuracy_figures.adapter_cost),
    Spec("gate_by_user", "05_ilora", "gates", accuracy_figures.gate_by_user),
    Spec("gate_correlations", "05_ilora", "gate_correlation", accuracy_figures.gate_correlations),
    Spec(
        "throughput",
        "06_hardware",
        "hardware_step",
        speed_figures.throughput,
        across=True,
        beside="real_size_step",
    ),
    Spec(
        "memory_by_size",
        "06_hardware",
        "hardware_step",
        speed_figures.memory_by_size,
        across=True,
        beside="real_size_step",
    ),
    Spec(
        "roofline",
        "06_hardware",
        "hardware_step",
        speed_figures.roofline,
        across=True,
        beside="real_size_step",
    ),
    Spec("technique_gains", "06_hardware", "technique", speed_figures.technique_gains, across=True),
    Spec("by_device", "07_explore", "plan", speed_figures.by_device, across=True),
    Spec("claimed_rates", "08_audit", "audit_rates", speed_figures.claimed_rates),
]


def write(figure: go.Figure, name: str, out_dir: Path) -> Path:
    """Write `<name>.html` beside one shared `plotly.min.js`; the same figure gives the same bytes."""
    out_dir.mkdir(parents=True, exist_ok=True)
    _replace(out_dir / "plotly.min.js", get_plotlyjs())
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config=_CONFIG,
        post_script="narrow(document.getElementById('{plot_id}'));",
    )
    html = _rendered("figure.html", name=name, plot=Markup(plot))
    return _replace(out_dir / f"{name}.html", html)


def collect(root: Path | Sequence[Path], out_dir: Path) -> list[Path]:
    """Rebuild the figures from the newest records under one root or several; return the files.

    A malformed record is never fatal: it is left out, told on standard error and listed on the page.
    """
    problems: list[str] = []
    rows = tables.well_formed(records.read(root, problems), problems)
    return build(records.latest(map(dict, rows)), out_dir, problems)


def build(rows: Sequence[Record], out_dir: Path, problems: Sequence[str] = ()) -> list[Path]:
    """Rebuild every figure that there are records for, and `index.html`; return the files.

    The page has a section for every notebook of the project. Figures of an earlier build that these records
    do not give are removed. A record that is malformed, or that breaks a figure, costs that figure alone and
    stands in the list of `problems` on the page.
    """
    problems = list(problems)
    rows = tables.distinct(tables.well_formed(rows, problems))
    cards, files = [], []
    out_dir.mkdir(parents=True, exist_ok=True)
    for drawing in drawings(rows):
        spec, shown = drawing.spec, [*drawing.records, *drawing.beside]
        name = file_stem(spec.name, drawing.dataset, drawing.label)
        with _left_out(f"figure {name}", problems):
            figure = show(spec.name, *shown)
            files.append(write(figure, name, out_dir))
            height = figure.layout.height or HEIGHT
            of = shown if spec.across else drawing.records
            cards.append(Card(name, figure.layout.title.text, height, spec, of, tables.of_study(of[0])))
    files.append(
        _replace(out_dir / "index.html", index(cards, rows, questions(system.notebooks()), problems))
    )
    for path in set(out_dir.glob("*.html")) - set(files):
        if GENERATOR in path.read_text(encoding="utf-8", errors="replace"):
            path.unlink()
    return files


def file_stem(figure: str, dataset: str, label: str) -> str:
    """Return a figure's file name without its ending, of plain characters, short enough for any disk."""
    return re.sub(r"[^\w.-]+", "-", f"{figure}_{dataset}_{label}", flags=re.ASCII)[:120]


@contextlib.contextmanager
def _left_out(what: str, problems: list[str]) -> Iterator[None]:
    """Note a failure of `what` instead of raising it.

    Records are data of whoever made them, and no check of their form rules out that a figure fails on one:
    that must not take the page with it. The tests demand that the committed records give no such note.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        problems.append(f"{what}: {type(error).__name__} {reason}".rstrip())
        print(f"left out: {problems[-1]}", file=sys.stderr)


class Drawing(NamedTuple):
    """A figure that there are records for."""

    spec: Spec
    dataset: str
    label: str
    records: list[Record]
    beside: list[Record]


def drawings(rows: Sequence[Record]) -> Iterator[Drawing]:
    """Yield every figure that there are records for."""
    for spec in FIGURES:
        needed = [r for r in rows if (r["notebook"], r["name"]) == (spec.notebook, spec.needs)]
        further = [r for r in rows if (r["notebook"], r["name"]) == (spec.notebook, spec.beside)]
        for (dataset, label), some in _groups(spec, needed).items():
            if tables.is_ablation(dataset) and spec.needs == "learning_curve":
                continue  # arms by the dozen are compared in the figure of differences
            if not dataset.startswith(spec.of):
                continue
            besides = tables.groups(further).get((dataset, label), [])
            if spec.across:  # long measurements of whatever device, with the work that they did
                whole = [tables.placed(tables.with_work(r)) for r in further]
                besides = sorted(whole, key=lambda r: json.dumps(r["own_params"], sort_keys=True))
            yield Drawing(spec, dataset, label, some, besides)


def _groups(spec: Spec, records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """Return what one figure each is made of: of one dataset and device, or of all devices together."""
    found = tables.groups(records)
    if not spec.across:
        return found
    together: dict[tuple[str, str], list[Record]] = {}
    for dataset in dict.fromkeys(name for name, _ in found):
        labels = [label for name, label in found if name == dataset]
        whose = labels[0] if len(labels) == 1 else "devices"
        together[dataset, whose] = [record for label in labels for record in found[dataset, label]]
    return together


def _replace(path: Path, text: str) -> Path:
    """Write whole or not at all, and only what differs."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        system.write_atomically(path, text)
    return path


# ------------------------------------------------------------------------------------------------
# The page: each notebook's question, its answer from the records, and one figure; the rest unfolds.

FEW = 4  # devices, or versions of the data, that a caption names

GENERATOR = Markup('<meta name="generator" content="reclib.figures">')

OPENING = ("scaling_accuracy", ("03_scaling", "02_baseline", "05_ilora"))  # the page's figure; whose answers

# Every value is escaped, in HTML and in attributes: what a record says is data, whoever wrote it.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("reclib.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def _rendered(template: str, **values: Any) -> str:
    return _TEMPLATES.get_template(template).render(generator=GENERATOR, **values)


@dataclass(frozen=True)
class Card:
    """One figure on the page."""

    name: str  # of its file, without .html
    title: str
    height: int  # pixels
    spec: Spec
    records: Sequence[Record]
    of_study: bool  # and not of a user's own data

    @property
    def origin(self) -> Origin:
        """What its numbers rest on."""
        return origin(self.records)


class Origin(NamedTuple):
    """On what numbers were made: device, profile and data; the day; whether a smoke run is among them."""

    text: str
    day: str
    smoke: bool


class Question(NamedTuple):
    """What a notebook asks: its first heading, without the number, and its first paragraph."""

    heading: str
    paragraph: Markup


def questions(notebooks: Path) -> dict[str, Question]:
    """Return what each notebook in a folder asks, by name, in reading order."""
    return {file.stem: _question(file) for file in sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))}


def _question(file: Path) -> Question:
    """Read the first heading and paragraph of a notebook; an empty one where it has none."""
    try:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{file.name}: not a notebook (broken JSON, or no cells)") from None
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    heading, _, rest = (texts[0] if texts else "").strip().partition("\n")
    paragraph = rest.strip().split("\n\n")[0]
    shown = "" if paragraph.startswith(("|", "#", "-")) else " ".join(paragraph.split())
    return Question(re.sub(r"^#+\s*(\d\d\s+)?", "", heading), _inline(shown))


def _inline(markdown: str) -> Markup:
    """Return a paragraph of Markdown as HTML: emphasis and code; of links the text alone."""
    html = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", str(escape(markdown)))
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", html)
    html = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html)
    return Markup(re.sub(r"(?<!\*)\*([^*]+)\*(?!\*)", r"<em>\1</em>", html))


def index(
    cards: Sequence[Card], rows: Sequence[Record], asked: Mapping[str, Question], problems: list[str]
) -> str:
    """Return the page as HTML: a section per notebook, in reading order, then one of a user's own data.

    `asked` is what `questions` returns; a notebook that is only in the records has its section too.
    """
    study = [card for card in cards if card.of_study]
    names = sorted({*asked, *(card.spec.notebook for card in study)})
    figure, first = OPENING
    opening = _of_most_work([card for card in study if card.spec.name == figure])
    rest = [card for card in study if card is not opening]
    known = [row for row in rows if tables.of_study(row)]
    sections = [_section(name, rest, known, asked, problems) for name in names]
    if own := [row for row in rows if not tables.of_study(row)]:
        sections.append(_own_section([card for card in cards if not card.of_study], own, problems))
    answers = {section["id"]: section["answers"] for section in sections}
    summary = [answers[name][0] for name in first if answers.get(name)]
    return _rendered(
        "index.html",
        sections=sections,
        opening=opening,
        summary=summary if opening else [],
        problems=problems,
        empty=not cards,
    )


def _section(
    name: str,
    cards: Sequence[Card],
    rows: Sequence[Record],
    asked: Mapping[str, Question],
    problems: list[str],
) -> dict[str, Any]:
    """Return what the template shows of a notebook."""
    chapter = findings.CHAPTERS.get(name)
    title = chapter.title if chapter else name[3:].replace("_", " ").capitalize()
    question = asked.get(name) or Question("", Markup())
    mine = [card for card in cards if card.spec.notebook == name]
    work = tables.best_work(row for row in rows if row["notebook"] == name)
    answers, details = _sentences(name, work, problems)
    leads = [card for card in mine if chapter and card.spec.name == chapter.lead]
    lead = _of_most_work(leads) or (mine[0] if mine else None)
    section = {
        "id": name,
        "number": name[:2],
        "heading": question.heading or title,
        "paragraph": question.paragraph,
        "answers": answers,
        "details": details,
        "origin": origin(work) if work else None,
        "lead": lead,
        "others": [card for card in mine if card is not lead],
    }
    if work:
        return section | {"command": ""}
    if name in NOTEBOOKS:
        absent = "No record of this notebook is here yet. To make one:"
        command = f"python -m reclib run {name[:2]} --profile quick"
        return section | {"absent": absent, "command": command, "opens": ""}
    absent = "This notebook is for a person, not for a batch:"
    return section | {"absent": absent, "command": "make lab", "opens": f"{name}.ipynb"}


def _own_section(cards: Sequence[Card], rows: Sequence[Record], problems: list[str]) -> dict[str, Any]:
    """Return what the template shows of a user's own data, apart from the study."""
    answers, details = [], []
    for name in sorted({row["notebook"] for row in rows}):
        work = tables.best_work(row for row in rows if row["notebook"] == name)
        first, more = _sentences(name, work, problems)
        answers += first
        details += more
    return {
        "id": "own",
        "number": "",
        "heading": "Your own data",
        "paragraph": "",
        "answers": answers,
        "details": details,
        "origin": origin(rows),
        "lead": cards[0] if cards else None,
        "others": list(cards[1:]),
        "command": "",
    }


def _sentences(name: str, work: Sequence[Record], problems: list[str]) -> tuple[list[str], list[str]]:
    """Return the answers of a notebook, one a dataset, and all further findings, each with its dataset."""
    datasets: dict[str, list[Record]] = {}
    for row in work:
        datasets.setdefault(str((row.get("data") or {}).get("name")), []).append(row)
    answers, details = [], []
    for dataset, rows in sorted(datasets.items(), key=lambda item: _most_work(item[1]), reverse=True):
        with _left_out(f"findings of {name} on {dataset}", problems):
            labels = sorted({row["label"] for row in rows})
            apart = name in findings.CHAPTERS and name not in ("06_hardware", "07_explore")
            for label in labels if apart else [""]:
                some = [row for row in rows if not apart or row["label"] == label]
                sentences = findings.sentences(name, some)
                answers += sentences[:1]
                start = f"{dataset}: " if len(datasets) > 1 else ""
                details += [start + sentence for sentence in sentences[1:]]
    return answers, details


def origin(rows: Sequence[Record]) -> Origin:
    """Return on what numbers were made: device, profile, data, day; a smoke run stands out."""
    where = "; ".join(
        f"{kind} on {_counted((_device(r) for r in rows if r['kind'] == kind), 'devices')}"
        for kind in sorted({row["kind"] for row in rows})
    )
    versions: dict[str, list[str]] = {}
    for data in (row.get("data") for row in rows):
        if data:
            versions.setdefault(str(data.get("name")), []).append(str(data.get("fingerprint")))
    data = ", ".join(f"{name} {_counted(versions[name], 'versions')}" for name in sorted(versions)) or "none"
    names = {row["profile"] for row in rows}
    profiles = " and ".join(sorted(map(tables.profile, names)))
    text = f"{where[:1].upper() + where[1:]}, {profiles}, data {data},"
    return Origin(text, max(row["time"] for row in rows)[:10], "smoke" in names)


def _device(row: Record) -> str:
    return f"{row['device'].get('name')} ({row['label']})"


def _counted(texts: Iterable[str], what: str) -> str:
    """Return texts, each once, where they are few, else how many of `what` there are."""
    distinct = sorted(set(texts))
    return ", ".join(distinct) if len(distinct) <= FEW else f"{len(distinct)} {what}"


def _most_work(rows: Sequence[Record]) -> tuple[int, bool, str]:
    """Return what ranks datasets: the longest profile, then seeds enough for a claim, then the newest."""
    return max((PROFILES.index(r["profile"]), _may_claim(r), r["time"]) for r in rows)


def _of_most_work(cards: Sequence[Card]) -> Card | None:
    return max(cards, key=lambda card: _most_work(card.records), default=None)


# ------------------------------------------------------------------------------------------------
# PNGs of the main figures, for the README and for slides: drawn by a browser from the same records.
#
#     python -m reclib pictures               figures/readme.png and one for each notebook's main figure
#     python -m reclib pictures --out slides
#
# Needs Chromium or Chrome; `RECLIB_CHROMIUM` names another browser of that family.

WIDTH = 1000  # pixels

README = "step_ladder"  # the figure at the top of the README, readme.png

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

_SECONDS = 60  # for one picture


def browser() -> str:
    """Return the browser that draws; `InputError` where there is none."""
    given = os.environ.get("RECLIB_CHROMIUM")
    for name in [given] if given else BROWSERS:
        if found := shutil.which(name):
            return found
    if given:
        raise InputError(f"RECLIB_CHROMIUM={given}: no such program; pictures need Chromium or Chrome")
    raise InputError(
        f"no browser to draw pictures with: none of {', '.join(BROWSERS)} is installed; "
        "install Chromium or Chrome, or name one in RECLIB_CHROMIUM"
    )


def main_figures(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the figure to draw for each notebook that has records: its file's name, and its records.

    Of several datasets or devices it is the one of the most work: a long run before one at quick, then one
    with seeds enough for a claim, then the most recent.
    """
    best: dict[str, tuple[tuple[int, bool, str], list[Record]]] = {}
    leads = {(notebook, chapter.lead) for notebook, chapter in CHAPTERS.items()}
    for drawing in drawings(tables.distinct(row for row in rows if tables.of_study(row))):
        spec, rank = drawing.spec, _most_work(drawing.records)
        if (spec.notebook, spec.name) in leads and (spec.name not in best or rank > best[spec.name][0]):
            best[spec.name] = rank, [*drawing.records, *drawing.beside]
    return {name: some for name, (_, some) in best.items()}


def _may_claim(row: Record) -> bool:
    """Whether a record that compares has seeds enough to say more than that it has too few."""
    return statistics.enough(row["metrics"].get(name, 0) for name in ("seeds", "reference_seeds"))


def file_name(figure: str) -> str:
    """Return the name of a figure's picture: that of its notebook, or the README's."""
    if figure == README:
        return "readme.png"
    return next(f"{name}.png" for name, chapter in CHAPTERS.items() if chapter.lead == figure)


def draw(rows: Sequence[Record], out_dir: Path) -> list[Path]:
    """Draw the main figure of each notebook that has records; return the files written."""
    program = browser()  # before anything is written
    out_dir.mkdir(parents=True, exist_ok=True)
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for name, some in main_figures(rows).items():
            figure = show(name, *some)
            html = write(figure, name, Path(folder))
            drawn = Path(folder) / f"{name}.png"
            photograph(program, html, drawn, figure.layout.height or HEIGHT)
            system.write_atomically(out_dir / file_name(name), drawn.read_bytes())
            files.append(out_dir / file_name(name))
    return files


def photograph(program: str, html: Path, picture: Path, height: int, width: int = WIDTH) -> None:
    """Write what a browser shows of a local page as a PNG of `width` by `height` pixels, in light colours.

    Raises `InputError` when the browser fails, takes too long or gives another size.
    """
    with tempfile.TemporaryDirectory() as profile:  # nothing of a person's own browser
        command = [program, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--user-data-dir={profile}", "--virtual-time-budget=10000", f"--screenshot={picture}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses root otherwise
        command += [f"--window-size={width},{height}", html.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise InputError(f"{Path(program).name} took over {_SECONDS} s to draw {html.name}") from None
    if done.returncode or not picture.is_file():
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"{Path(program).name} could not draw {html.name}: {said}")
    if (got := size(picture)) != (width, height):
        raise InputError(
            f"{Path(program).name} drew {html.name} as {got[0]} x {got[1]}, not {width} x {height}"
        )


def size(picture: Path) -> tuple[int, int]:
    """Return width and height of a PNG in pixels, from its header."""
    header = picture.read_bytes()[:24]
    if header[:8] != b"\x89PNG\r\n\x1a\n" or len(header) < 24:
        raise InputError(f"{picture.name}: not a PNG")
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def _said(files: Iterable[Path]) -> str:
    return ", ".join(file.name for file in files) or "no picture: there are no records, run `make study`"


def pictures_main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 2 where there is no browser."""
    parser = Parser(
        prog="python -m reclib pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (figures/)")
    given = parser.parse_args(arguments)
    try:
        files = draw(records.latest(records.read(system.committed())), given.out or system.figures())
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(_said(files))
    return 0
