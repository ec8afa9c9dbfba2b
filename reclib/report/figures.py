"""The figures of the study, the page that shows them, and pictures of the main ones.

A figure is a pure function from a table of records to a `go.Figure`: all are built offline and without torch.
To add one, add a function to the file of its topic and a line to `FIGURES`.

    python -m reclib collect                figures/index.html and a file for each figure
    python -m reclib pictures               figures/readme.png and one for each notebook's main figure
    python -m reclib pictures --out slides

Pictures need Chromium or Chrome; `RECLIB_CHROMIUM` names another browser of that family.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import unescape
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
from reclib.report import accuracy_figures, findings, scaling_figures, speed_figures, tables
from reclib.report.style import HEIGHT, PLOTLY_MIME, Chart
from reclib.report.tables import PROFILES, Record
from reclib.system import Parser


@dataclass(frozen=True)
class Spec:
    """One figure of the study. It is named after its function, and its file after it."""

    notebook: str
    needs: str  # name of its records
    make: Callable[[pd.DataFrame], go.Figure]
    across: bool = False  # one figure of all devices instead of one for each
    beside: str = ""  # name of further records of the same data and device
    enough: Callable[[Sequence[Record]], bool] | None = None  # whether records are enough for the figure
    choose: Callable[[Sequence[Record]], list[Record]] | None = None  # selects records of all data

    @property
    def name(self) -> str:
        """The figure's name."""
        return self.make.__name__


def _of_sizes(records: Sequence[Record]) -> bool:
    return len({record["metrics"].get("non_embedding") for record in records}) > 1


def _sweep(record: Record) -> str:
    return tables.sweep_of(str(record["own_params"].get("model")))


def _of_widths(records: Sequence[Record]) -> bool:
    return _of_sizes([record for record in records if _sweep(record).startswith("width")])


def _of_sweeps(records: Sequence[Record]) -> bool:
    return not {"depth", "untied tables", "other learning rate"}.isdisjoint(map(_sweep, records))


_LAW: dict[str, Any] = {"beside": "prediction"}

FIGURES: list[Spec] = [
    Spec("01_data_prep", "over_time", accuracy_figures.interactions_over_time),
    Spec("01_data_prep", "sequence_lengths", accuracy_figures.sequence_lengths),
    Spec("01_data_prep", "item_popularity", accuracy_figures.item_popularity),
    Spec("01_data_prep", "last_items", accuracy_figures.last_items),
    Spec("02_baseline", "learning_curve", accuracy_figures.learning_curves),
    Spec("02_baseline", "comparison", accuracy_figures.comparison),
    Spec("02_baseline", "validation_difference", accuracy_figures.ablation),
    Spec("02_baseline", "equal_time", accuracy_figures.equal_time),
    Spec("02_baseline", "protocol", accuracy_figures.protocols),
    Spec("02_baseline", "shuffle_control", accuracy_figures.shuffle_control),
    Spec("02_baseline", "groups", accuracy_figures.groups),
    Spec("02_baseline", "beyond_accuracy", accuracy_figures.beyond_accuracy),
    Spec("02_baseline", "tie_rule", accuracy_figures.tie_rules, choose=tables.tie_rules),
    Spec("03_scaling", "learning_curve", scaling_figures.size_and_counts, choose=tables.by_size),
    Spec(
        "03_scaling", "beyond_accuracy", scaling_figures.popularity_by_size, choose=tables.popularity_by_size
    ),
    Spec("03_scaling", "learning_curve", scaling_figures.scaling_curve, enough=_of_widths, **_LAW),
    Spec("03_scaling", "learning_curve", scaling_figures.scaling_accuracy, enough=_of_sizes, **_LAW),
    Spec("03_scaling", "learning_curve", scaling_figures.scaling_sweeps, enough=_of_sweeps, **_LAW),
    Spec("03_scaling", "trial", scaling_figures.tuning_history),
    Spec("04_amp_compile", "step", speed_figures.step_time),
    Spec("04_amp_compile", "ladder", speed_figures.step_ladder),
    Spec("04_amp_compile", "operators", speed_figures.operators),
    Spec("05_ilora", "adaptation_gain", accuracy_figures.adaptation_gain),
    Spec("05_ilora", "gate_comparison", accuracy_figures.gate_comparison),
    Spec("05_ilora", "implanted", accuracy_figures.implanted, beside="implanted_ceiling"),
    Spec("05_ilora", "adapter_step", accuracy_figures.adapter_cost),
    Spec("06_hardware", "hardware_step", speed_figures.throughput, across=True, beside="real_size_step"),
    Spec("07_explore", "plan", speed_figures.by_device, across=True),
    Spec("08_audit", "audit_rates", speed_figures.claimed_rates),
]


def show(name: str, *records: Record) -> go.Figure:
    """Return the figure `name` of `FIGURES` for these records, captioned."""
    spec = next(spec for spec in FIGURES if spec.name == name)
    figure = spec.make(tables.table(records))
    under = [tables.caption(records, with_data=spec.choose is None), figure.layout.title.subtitle.text]
    if isinstance(figure, Chart):
        figure._page = f"figures/index.html, question {spec.notebook[:2]}"
    return figure.update_layout(title_subtitle_text="<br>".join(text for text in under if text))


# -- files ---------------------------------------------------------------------------------------------------


class Drawing(NamedTuple):
    """A figure with its records: of one dataset and device, or of all devices together."""

    spec: Spec
    dataset: str
    label: str
    records: Sequence[Record]
    beside: Sequence[Record]

    @property
    def file(self) -> str:
        """Name of its file, without .html."""
        name = "_".join(filter(None, (self.spec.name, self.dataset, self.label)))
        return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:120]


class Card(NamedTuple):
    """One figure on the page."""

    name: str  # of its file, without .html
    title: str
    height: int  # pixels
    spec: Spec
    records: Sequence[Record]

    @property
    def origin(self) -> Origin:
        """What its numbers rest on."""
        return origin(self.records)


def collect(root: Path | Sequence[Path], out_dir: Path) -> list[Path]:
    """Rebuild the page of the newest records and executed notebooks under one root or several; return files.

    The first of several roots is the repository: its figures are copied from `figures/`. Malformed records
    are left out, printed on standard error and listed on the page.
    """
    roots, problems = [root] if isinstance(root, Path) else list(root), list[str]()
    by_root = [records.read(folder, problems) for folder in roots]
    if len(roots) > 1:
        for drawing in drawings(tables.distinct(records.latest(by_root[0]))):
            committed, file = (folder / f"{drawing.file}.html" for folder in (system.figures(), out_dir))
            if committed.is_file() and file not in _DRAWN:
                _replace(file, committed.read_text(encoding="utf-8"))
                _DRAWN[file] = drawing
    return build(records.latest(itertools.chain(*by_root)), out_dir, problems, roots)


_DRAWN: dict[Path, Drawing] = {}  # figures drawn or copied by this process, by file


def build(
    rows: Sequence[Record],
    out_dir: Path,
    problems: Sequence[str] = (),
    roots: Sequence[Path] = (),
) -> list[Path]:
    """Rebuild all figures with records, and `index.html`; return the files.

    `rows` are checked by `records.read`. The page has a section for every notebook of the project. Figures
    of an earlier build without records are removed. If a record breaks a figure, only that figure is left out
    and added to the `problems` on the page.

    Figures that this process has drawn or copied before are not drawn again. Executed notebooks under `roots`
    become pages.
    """
    problems, rows = list(problems), tables.distinct(rows)
    cards, files = [], []
    out_dir.mkdir(parents=True, exist_ok=True)
    for drawing in drawings(rows):
        file = out_dir / f"{drawing.file}.html"
        with _noting_failures(f"figure {drawing.file}", problems):
            if _DRAWN.get(file) != drawing or not file.is_file():
                write(show(drawing.spec.name, *drawing.records, *drawing.beside), drawing.file, out_dir)
                _DRAWN[file] = drawing
            cards.append(_card(drawing, file))
            files.append(file)
    if files:
        write_scripts(out_dir)
    pages: dict[Path, str] = {}
    with _noting_failures("executed notebooks", problems):
        pages = notebook_pages(roots, out_dir)
    files += [page for page in pages if page.suffix == ".html"]
    addresses = {name: Path(os.path.relpath(page, out_dir)).as_posix() for page, name in pages.items()}
    page = index(cards, rows, questions(system.notebooks()), problems, addresses)
    files.append(_replace(out_dir / "index.html", page))
    for path in set(out_dir.glob("*.html")) - set(files):
        if GENERATOR in path.read_text(encoding="utf-8", errors="replace"):
            path.unlink()
    return files


def _card(drawing: Drawing, file: Path) -> Card:
    """Return the card of a figure, with title and height from its file."""
    html = file.read_text(encoding="utf-8")
    match, height = re.search("<title>(.*?)</title>", html), re.search(r'style="height:(\d+)px', html)
    rows = [*drawing.records, *drawing.beside] if drawing.spec.across else drawing.records
    title = unescape(match[1]) if match else drawing.file
    return Card(drawing.file, title, int(height[1]) if height else HEIGHT, drawing.spec, rows)


def write(figure: go.Figure, name: str, out_dir: Path) -> Path:
    """Write `<name>.html`, which needs the files of `write_scripts`; the same figure gives the same bytes."""
    buttons = ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"]
    plot = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=name,
        config={"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": buttons},
        post_script="narrow(document.getElementById('{plot_id}'));",
    )
    title = figure.layout.title.text or name
    return _replace(out_dir / f"{name}.html", _rendered("figure.html", title=title, plot=Markup(plot)))


def write_scripts(out_dir: Path) -> None:
    """Write the scripts that pages of figures load from their own folder."""
    _replace(out_dir / "plotly.min.js", get_plotlyjs())
    _replace(out_dir / "figure.js", _rendered("figure.js"))


def _replace(path: Path, text: str) -> Path:
    """Write a file atomically, unless it has this text already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        system.write_atomically(path, text)
    return path


@contextlib.contextmanager
def _noting_failures(task: str, problems: list[str]) -> Iterator[None]:
    """Add a failure of `task` to `problems` instead of raising it.

    A figure may fail on a record of valid form; the page must be built nevertheless. Tests check that the
    committed records cause no failure.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        problems.append(f"{task}: {type(error).__name__} {reason}".rstrip())
        print(f"left out: {problems[-1]}", file=sys.stderr)


def drawings(rows: Sequence[Record]) -> Iterator[Drawing]:
    """Yield every figure with records."""
    for spec in FIGURES:
        if spec.choose is not None:
            if chosen := spec.choose(rows):
                yield Drawing(spec, "", "", chosen, [])
            continue
        main, further = (
            [r for r in rows if (r["notebook"], r["name"]) == (spec.notebook, name)]
            for name in (spec.needs, spec.beside)
        )
        parts, besides = tables.groups(main), dict[Any, Any](tables.groups(further))
        if spec.across:  # join the devices of a dataset, and add the long measurements of all devices
            joined: dict[tuple[str, str], list[Record]] = {}
            devices = Counter(dataset for dataset, _ in parts)
            for (dataset, label), group in parts.items():
                place = dataset, label if devices[dataset] == 1 else "devices"
                joined.setdefault(place, []).extend(map(tables.placed, group))
            placed = list(map(tables.placed, further))
            placed.sort(key=lambda r: json.dumps(r["own_params"], sort_keys=True))
            parts, besides = joined, dict.fromkeys(joined, placed)
        for (dataset, label), group in parts.items():
            # Runs that choose settings, or train on a share of the users, are compared elsewhere.
            is_elsewhere = spec.needs == "learning_curve" and tables.shown_elsewhere(dataset)
            shows_nothing = spec.enough is not None and not spec.enough(group)
            if not is_elsewhere and not shows_nothing:
                yield Drawing(spec, dataset, label, group, besides.get((dataset, label), []))


# -- the page: each notebook's question, its answer from the records, and one figure; the others are folded --

FEW = 4  # most devices, or versions of the data, that a caption lists
GENERATOR = Markup('<meta name="generator" content="reclib.figures">')

# Every value is escaped, in HTML and in attributes: records are untrusted data.
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("reclib.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def _rendered(template: str, **values: Any) -> str:
    return _TEMPLATES.get_template(template).render(**{"generator": GENERATOR, "nonce": ""} | values)


class Origin(NamedTuple):
    """The origin of numbers: device, profile and data; the day; whether a smoke run is among them."""

    text: str
    day: str
    smoke: bool


class Question(NamedTuple):
    """The question of a notebook: its first heading, without the number, and its first paragraph."""

    heading: str
    paragraph: Markup


def questions(notebooks: Path) -> dict[str, Question]:
    """Return the questions of the notebooks in a folder, by name, in reading order."""
    by_notebook = {}
    for file in sorted(notebooks.glob("[0-9][0-9]_*.ipynb")):
        try:
            cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file.name}: not a notebook (broken JSON, or no cells)") from None
        cell = next((cell for cell in cells if cell["cell_type"] == "markdown"), {"source": ""})
        heading, _, body = "".join(cell["source"]).strip().partition("\n")
        paragraph = body.strip().split("\n\n")[0]
        text = "" if paragraph.startswith(("|", "#", "-")) else " ".join(paragraph.split())
        by_notebook[file.stem] = Question(re.sub(r"^#+\s*(\d\d\s+)?", "", heading), _inline(text))
    return by_notebook


def notebook_pages(roots: Sequence[Path], out_dir: Path) -> dict[Path, str]:
    """Write a page of each executed notebook under the roots; return its name and label by page.

    If two roots have a notebook of the same device, the last counts. Without mistune, a dependency of
    JupyterLab, the notebooks are linked instead of pages.
    """
    files = [file for root in roots for file in sorted(root.glob("*/[0-9][0-9]_*.ipynb"))]
    files = [file for file in files if "." not in file.stem]  # without failed ones
    executed = {(file.stem, file.parent.name): file for file in files}
    try:
        import mistune
    except ModuleNotFoundError:
        return {file: " ".join(key) for key, file in executed.items()}
    values: dict[str, Any] = {"mime": PLOTLY_MIME, "records": records.MIME}
    values["markdown"] = mistune.create_markdown(escape=False, plugins=["table"])
    empty = _rendered("notebook.html", name="", label="", cells=[], source="", **values)
    pages = {}
    for (name, label), file in executed.items():
        content, page = file.read_bytes(), out_dir / f"{name}_{label}.html"
        source = hashlib.sha256(content + empty.encode()).hexdigest()[:32]
        for candidate in (page, system.figures() / page.name):
            if candidate.is_file() and source in (html := candidate.read_text(encoding="utf-8")):
                break
        else:
            fields = {"name": name, "label": label, "cells": json.loads(content)["cells"], "source": source}
            html = _rendered("notebook.html", **fields, **values)
            html = re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="index.html#\1', html)
        pages[_replace(page, html)] = f"{name} {label}"
    return pages


def _inline(markdown: str) -> Markup:
    """Return a paragraph of Markdown as HTML, with emphasis and code, and links as text."""
    html = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", str(escape(markdown)))
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", html)
    html = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html)
    return Markup(re.sub(r"(?<!\*)\*([^*]+)\*(?!\*)", r"<em>\1</em>", html))


def index(
    cards: Sequence[Card],
    rows: Sequence[Record],
    texts: Mapping[str, Question],
    problems: list[str],
    pages: Mapping[str, str],
) -> str:
    """Return the page as HTML: a section for each notebook in reading order, then one for a user's data.

    `texts` is the result of `questions`, `pages` the addresses of executed notebooks by name and label.
    Notebooks that only records name have sections too.
    """
    study_cards = [card for card in cards if tables.of_study(card.records[0])]
    user_cards = [card for card in cards if not tables.of_study(card.records[0])]
    study_rows, user_rows = ([r for r in rows if tables.of_study(r) == study] for study in (True, False))
    opening = _of_most_work([card for card in study_cards if card.spec.name == README])
    sections = []
    for name in sorted({*texts, *(card.spec.notebook for card in study_cards)}):
        chapter, question = findings.CHAPTERS.get(name), texts.get(name) or Question("", Markup())
        notebook_cards = [c for c in study_cards if c.spec.notebook == name and c is not opening]
        lead = _of_most_work([c for c in notebook_cards if chapter and c.spec.name == chapter.lead])
        title = question.heading or name[3:].replace("_", " ").capitalize()
        executed = [(page.split()[1], pages[page]) for page in pages if page.split()[0] == name]
        head: dict[str, Any] = {"id": name, "number": name[:2], "heading": title, "executed": executed}
        notebook_rows = [row for row in study_rows if row["notebook"] == name]
        section = _section([name], notebook_rows, notebook_cards, lead, problems)
        sections.append(head | {"paragraph": question.paragraph} | section)
    if user_rows:
        head = {"id": "own", "number": "", "heading": "Your own data", "paragraph": "", "executed": []}
        section = _section(sorted({r["notebook"] for r in user_rows}), user_rows, user_cards, None, problems)
        sections.append(head | section | {"origin": origin(user_rows)})
    summary: list[str] = []
    with _noting_failures("the answer of the study", problems):
        summary = findings.study(study_rows)
    values = {"sections": sections, "opening": opening, "summary": summary, "problems": problems}
    return _rendered("index.html", empty=not cards, **values)


def _section(
    notebooks: Sequence[str],
    rows: Sequence[Record],
    cards: Sequence[Card],
    lead: Card | None,
    problems: list[str],
) -> dict[str, Any]:
    """Return the values of the template for the records and figures of notebooks; `lead` is shown first."""
    answers, details, work = [], [], []
    for name in notebooks:
        work = tables.best_work(row for row in rows if row["notebook"] == name)
        notebook_answers, notebook_details = _sentences(name, work, problems)
        answers += notebook_answers
        details += notebook_details
    lead = lead or next(iter(cards), None)
    return {
        "answers": answers,
        "details": details,
        "lead": lead,
        "others": [card for card in cards if card is not lead],
        "origin": origin(work) if work else None,
        "command": "" if work else f"python -m reclib run {notebooks[0][:2]} --profile quick",
    }


def _sentences(name: str, work: Sequence[Record], problems: list[str]) -> tuple[list[str], list[str]]:
    """Return the answers of a notebook, one for each dataset, and its other findings with their dataset.

    Answers with too few seeds for a claim go to the findings if another dataset has a claim.
    """
    datasets = tables.by(work, lambda row: str((row.get("data") or {}).get("name")))
    answers, details = [], []
    for dataset, rows in sorted(datasets.items(), key=lambda item: _most_work(item[1]), reverse=True):
        if tables.shown_elsewhere(dataset):
            continue
        with _noting_failures(f"findings of {name} on {dataset}", problems):
            apart = name in findings.CHAPTERS and name not in ("06_hardware", "07_explore")
            for label in sorted({row["label"] for row in rows}) if apart else [""]:
                part = [row for row in rows if not apart or row["label"] == label]
                first, *others = findings.sentences(name, part) or [""]
                answers += [first] if first else []
                details += [f"{dataset}: {line}" if len(datasets) > 1 else line for line in others]
    claims = [answer for answer in answers if not answer.startswith(findings.TOO_FEW)]
    return claims or answers, [*(answer for answer in answers if claims and answer not in claims), *details]


def origin(rows: Sequence[Record]) -> Origin:
    """Return the origin of records: device, profile, data, day, and whether it is a smoke run."""
    on: dict[str, set[str]] = {}
    versions: dict[str, set[str]] = {}
    for row in rows:
        on.setdefault(row["kind"], set()).add(f"{row['device'].get('name')} ({row['label']})")
        if data := row.get("data"):
            versions.setdefault(str(data.get("name")), set()).add(str(data.get("fingerprint")))
    where = "; ".join(f"{kind} on {_counted(on[kind], 'devices')}" for kind in sorted(on))
    data = ", ".join(f"{name} {_counted(versions[name], 'versions')}" for name in sorted(versions))
    profiles = {row["profile"] for row in rows}
    named = " and ".join(sorted(map(tables.profile, profiles)))
    text = f"{where[:1].upper() + where[1:]}, {named}, data {data or 'none'},"
    return Origin(text, max(row["time"] for row in rows)[:10], "smoke" in profiles)


def _counted(texts: set[str], noun: str) -> str:
    """Return the texts, or their number with `noun` if there are more than `FEW`."""
    return ", ".join(sorted(texts)) if len(texts) <= FEW else f"{len(texts)} {noun}"


def _most_work(rows: Sequence[Record]) -> tuple[int, bool, bool, str]:
    """Return the rank of records: by the longest profile, then enough seeds for a claim, then the newest.

    Records of several widths of plain BERT4Rec come before newer ones of other recipes.
    """
    enough = len({r.get("seed") for r in rows} - {None}) >= statistics.MIN_SEEDS
    widths = _of_sizes([row for row in rows if _sweep(row) == "width"])

    def rank(row: Record) -> tuple[int, bool, bool, str]:
        seeds = [row["metrics"][name] for name in ("seeds", "reference_seeds") if name in row["metrics"]]
        sure = enough or (bool(seeds) and statistics.enough(seeds))
        return PROFILES.index(row["profile"]), sure, widths, row["time"]

    return max(map(rank, rows))


def _of_most_work(cards: Sequence[Card]) -> Card | None:
    return max(cards, key=lambda card: _most_work(card.records), default=None)


# -- pictures of the main figures for the README and for slides, drawn by a browser --------------------------

WIDTH = 1000  # pixels
README = "size_and_counts"  # the figure at the top of the page and of the README
# File names of main figures.
PICTURES = {chapter.lead: name for name, chapter in findings.CHAPTERS.items()} | {README: "readme"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60  # for one picture


def browser() -> str:
    """Return the path of the browser; raise `InputError` if there is none."""
    requested = os.environ.get("RECLIB_CHROMIUM")
    names = [requested] if requested else BROWSERS
    if program := next(filter(None, map(shutil.which, names)), None):
        return program
    raise InputError(
        f"no browser to draw pictures with: none of {', '.join(names)} is installed; "
        "install Chromium or Chrome, or name one in RECLIB_CHROMIUM"
    )


def main_figures(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the main figure of each notebook with records: its name and its records.

    Of several datasets or devices the one with the most work is chosen, see `_most_work`.
    """
    drawn = drawings(tables.distinct(row for row in rows if tables.of_study(row)))
    leading = (drawing for drawing in drawn if drawing.spec.name in PICTURES)
    best = {
        name: max(several, key=lambda drawing: _most_work(drawing.records))
        for name, several in tables.by(leading, lambda drawing: drawing.spec.name).items()
    }
    return {name: [*drawing.records, *drawing.beside] for name, drawing in best.items()}


def draw(rows: Sequence[Record], out_dir: Path) -> list[Path]:
    """Draw the main figure of each notebook with records; return the files."""
    program = browser()  # before anything is written
    out_dir.mkdir(parents=True, exist_ok=True)
    files = []
    with tempfile.TemporaryDirectory() as folder:
        write_scripts(Path(folder))
        for name, group in main_figures(rows).items():
            figure = show(name, *group)
            picture = Path(folder) / f"{name}.png"
            photograph(program, write(figure, name, Path(folder)), picture, figure.layout.height or HEIGHT)
            files.append(out_dir / f"{PICTURES[name]}.png")
            system.write_atomically(files[-1], picture.read_bytes())
    return files


def photograph(program: str, html: Path, picture: Path, height: int) -> None:
    """Write a screenshot of a local page as a PNG of `WIDTH` by `height` pixels, in light colours.

    Raises `InputError` if the browser fails or takes too long.
    """
    name = Path(program).name
    with tempfile.TemporaryDirectory() as profile:  # not the user's profile
        command = [program, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--user-data-dir={profile}", "--virtual-time-budget=10000", f"--screenshot={picture}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # it refuses root otherwise
        command += [f"--window-size={WIDTH},{height}", html.resolve().as_uri()]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise InputError(f"{name} took over {_SECONDS} s to draw {html.name}") from None
    if process.returncode or not picture.is_file():
        reason = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise InputError(f"{name} could not draw {html.name}: {reason}")


def pictures_main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; raise `InputError` without a browser."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m reclib pictures", description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (figures/)")
    options = parser.parse_args(arguments)
    files = draw(records.latest(records.read(system.committed())), options.out or system.figures())
    print(", ".join(file.name for file in files) or "no picture: there are no records, run `make study`")
    return 0
