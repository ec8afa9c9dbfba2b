"""Figures of the study: pure functions from a table of records to a `go.Figure`, and the way to files.

A figure knows nothing but records, so all of them are rebuilt offline and without torch. To add one:
a function from table to figure, and a line in `FIGURES`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from reclib import records, system
from reclib.config import InputError
from reclib.evaluate import statistics
from reclib.report import accuracy_figures, data_figures, page, scaling_figures, speed_figures, tables
from reclib.report.page import CHAPTERS
from reclib.report.style import HEIGHT
from reclib.report.tables import PROFILES, Record
from reclib.system import Parser

_STYLE = (  # no margin, so that a frame of the figure's height fits; no buttons over a title on a phone
    "<style>body { margin: 0 } @media (hover: none) { .modebar-container { display: none } } "
    # In the dark lightness is turned round and hues stay, so that every contrast is kept as it was chosen.
    "@media (prefers-color-scheme: dark) { body { background: #191919 } "
    ".plotly-graph-div { filter: invert(.9) hue-rotate(180deg) } }</style>"
)

# On a narrow screen titles are broken into lines that fit, by pixels a letter, and plots move down.
_NARROW = """
const plot = document.getElementById("{plot_id}"), title = plot.layout.title;
if (title && title.text && plot.clientWidth < 640) {
  const broken = (text, letters) => text.split("<br>").map(part => part.split(" ").reduce((lines, word) => {
    const last = lines.length - 1;
    const fits = last >= 0 && lines[last].length + word.length < letters;
    return fits ? [...lines.slice(0, last), lines[last] + " " + word] : [...lines, word];
  }, []).join("<br>")).join("<br>");
  const text = broken(title.text, plot.clientWidth / 8.5), under = (title.subtitle || {}).text || "";
  const said = broken(under, plot.clientWidth / 6.3);
  const more = 20 * (text.split("<br>").length - title.text.split("<br>").length)
    + 15 * (said.split("<br>").length - under.split("<br>").length);
  Plotly.relayout(plot, {"title.text": text, "title.subtitle.text": said, "title.font.size": 15,
    "margin.t": plot._fullLayout.margin.t + more});
}
"""

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
    said = [tables.caption(records), figure.layout.title.subtitle.text]
    return figure.update_layout(title_subtitle_text="<br>".join(text for text in said if text))


_LONG = {"hardware_step": "real_size_step"}  # sizes at their true catalogue, each in its own process

_BASELINE = [*accuracy_figures.FIGURES, *accuracy_figures.CONTROL_FIGURES]

FIGURES: list[Spec] = [
    *(Spec(make.__name__, "01_data_prep", needs, make) for needs, make in data_figures.FIGURES),
    *(Spec(make.__name__, "02_baseline", needs, make) for needs, make in _BASELINE),
    *(
        Spec(make.__name__, "03_scaling", needs, make, beside="prediction", of=of)
        for needs, make, of in scaling_figures.FIGURES
    ),
    *(Spec(make.__name__, "03_scaling", needs, make) for needs, make in scaling_figures.TUNING_FIGURES),
    *(Spec(make.__name__, "04_amp_compile", needs, make) for needs, make in speed_figures.FIGURES),
    *(Spec(make.__name__, "05_ilora", needs, make) for needs, make in accuracy_figures.ADAPTER_FIGURES),
    *(
        Spec(make.__name__, "06_hardware", needs, make, True, _LONG.get(needs, ""))
        for needs, make in speed_figures.HARDWARE_FIGURES
    ),
    *(Spec(make.__name__, "07_explore", needs, make, True) for needs, make in speed_figures.PLAN_FIGURES),
    *(Spec(make.__name__, "08_audit", needs, make) for needs, make in speed_figures.AUDIT_FIGURES),
]


def write(figure: go.Figure, name: str, out_dir: Path) -> Path:
    """Write `<name>.html` beside one shared `plotly.min.js`; the same figure gives the same bytes."""
    out_dir.mkdir(parents=True, exist_ok=True)
    html = figure.to_html(include_plotlyjs="directory", div_id=name, config=_CONFIG, post_script=_NARROW)
    head = f"<head>{page.GENERATOR}<title>{escape(name)}</title>{_STYLE}"
    _replace(out_dir / "plotly.min.js", get_plotlyjs())
    return _replace(out_dir / f"{name}.html", html.replace("<head>", head, 1))


def build(records: Sequence[Record], out_dir: Path) -> list[Path]:
    """Rebuild every figure that there are records for, and `index.html`; return the files.

    The page has a section for every notebook of the project. Figures of an earlier build that these records
    do not give are removed.
    """
    cards, files = [], []
    for spec, dataset, label, some, besides in drawings(records):
        name = re.sub(r"[^\w.-]+", "-", f"{spec.name}_{dataset}_{label}")
        figure = show(spec.name, *some, *besides)
        files.append(write(figure, name, out_dir))
        height = figure.layout.height or HEIGHT
        shown = [*some, *besides] if spec.across else some
        cards.append(page.Card(spec.notebook, name, figure.layout.title.text, height, shown, spec.name))
    out_dir.mkdir(parents=True, exist_ok=True)
    asked = page.questions(system.notebooks())
    files.append(_replace(out_dir / "index.html", page.index(cards, records, asked)))
    for path in set(out_dir.glob("*.html")) - set(files):
        if page.GENERATOR in path.read_text(encoding="utf-8"):
            path.unlink()
    return files


def drawings(
    records: Sequence[Record],
) -> Iterator[tuple[Spec, str, str, list[Record], list[Record]]]:
    """Yield every figure that there are records for: spec, dataset, label, its records, and those beside."""
    for spec in FIGURES:
        mine = [r for r in records if (r["notebook"], r["name"]) == (spec.notebook, spec.needs)]
        further = [r for r in records if (r["notebook"], r["name"]) == (spec.notebook, spec.beside)]
        for (dataset, label), some in _groups(spec, mine).items():
            if tables.is_ablation(dataset) and spec.needs == "learning_curve":
                continue  # arms by the dozen are compared in the figure of differences
            if not dataset.startswith(spec.of):
                continue
            besides = tables.groups(further).get((dataset, label), [])
            if spec.across:  # long measurements of whatever device, with the work that they did
                whole = [tables.placed(tables.with_work(r)) for r in further]
                besides = sorted(whole, key=lambda r: json.dumps(r["own_params"], sort_keys=True))
            yield spec, dataset, label, some, besides


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


def main_figures(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the figure to draw for each notebook that has records: its file's name, and its records.

    Of several datasets or devices it is the one of the most work: a long run before one at quick, then one
    with seeds enough for a claim, then the most recent.
    """
    found: dict[str, tuple[tuple[int, bool, str], list[Record]]] = {}
    leads = {(notebook, chapter.lead) for notebook, chapter in CHAPTERS.items()}
    for spec, _, _, some, besides in drawings(records):
        if (spec.notebook, spec.name) not in leads:
            continue
        rank = max((PROFILES.index(r["profile"]), _may_claim(r), r["time"]) for r in some)
        if spec.name not in found or rank > found[spec.name][0]:
            found[spec.name] = rank, [*some, *besides]
    return {name: some for name, (_, some) in found.items()}


def _may_claim(row: Record) -> bool:
    """Whether a record that compares has seeds enough to say more than that it has too few."""
    return statistics.enough(row["metrics"].get(name, 0) for name in ("seeds", "reference_seeds"))


def file_name(figure: str) -> str:
    """Return the name of a figure's picture: that of its notebook, or the README's."""
    if figure == README:
        return "readme.png"
    return next(f"{name}.png" for name, chapter in CHAPTERS.items() if chapter.lead == figure)


def draw(records: Sequence[Record], out_dir: Path) -> list[Path]:
    """Draw the main figure of each notebook that has records; return the files written."""
    program = browser()  # before anything is written
    out_dir.mkdir(parents=True, exist_ok=True)
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for name, some in main_figures(records).items():
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
        files = draw(records.latest(records.read(system.executed())), given.out or system.figures())
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(_said(files))
    return 0
