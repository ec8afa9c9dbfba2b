"""Figures of the study: pure functions from a table of records to a `go.Figure`, and the way to files.

A figure knows nothing but records, so all of them are rebuilt offline and without torch. To add one:
a function from table to figure, and a line in `FIGURES`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from reclib import (
    accuracy_figures,
    adapter_figures,
    audit_figures,
    control_figures,
    data_figures,
    gathered,
    hardware_figures,
    page,
    paths,
    quote_figures,
    scaling_figures,
    speed_figures,
    tables,
    tuning_figures,
)
from reclib.look import HEIGHT
from reclib.tables import Record

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
_BASELINE = [*accuracy_figures.FIGURES, *control_figures.FIGURES]
FIGURES: list[Spec] = [
    *(Spec(make.__name__, "01_data_prep", needs, make) for needs, make in data_figures.FIGURES),
    *(Spec(make.__name__, "02_baseline", needs, make) for needs, make in _BASELINE),
    *(
        Spec(make.__name__, "03_scaling", needs, make, beside="prediction", of=of)
        for needs, make, of in scaling_figures.FIGURES
    ),
    *(Spec(make.__name__, "03_scaling", needs, make) for needs, make in tuning_figures.FIGURES),
    *(Spec(make.__name__, "04_amp_compile", needs, make) for needs, make in speed_figures.FIGURES),
    *(Spec(make.__name__, "05_ilora", needs, make) for needs, make in adapter_figures.FIGURES),
    *(
        Spec(make.__name__, "06_hardware", needs, make, True, _LONG.get(needs, ""))
        for needs, make in hardware_figures.FIGURES
    ),
    *(Spec(make.__name__, "07_explore", needs, make, True) for needs, make in quote_figures.FIGURES),
    *(Spec(make.__name__, "08_audit", needs, make) for needs, make in audit_figures.FIGURES),
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
    asked = page.questions(paths.notebooks())
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
                whole = [gathered.placed(gathered.with_work(r)) for r in further]
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
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return path
