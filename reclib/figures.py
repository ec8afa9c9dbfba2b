"""Figures of the study: pure functions from a table of records to a `go.Figure`, and the way to files.

A figure knows nothing but records, so all of them are rebuilt offline and without torch. To add one:
a function from table to figure, and a line in `FIGURES`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from reclib import accuracy_figures, control_figures, page, speed_figures, tables
from reclib.look import BLUE, DECADES, HEIGHT, MUTED, ORANGE, PALETTE, TEMPLATE, bar, line
from reclib.marks import panels
from reclib.tables import Record

_STYLE = (  # no margin, so that a frame of the figure's height fits; no buttons over a title on a phone
    "<style>body { margin: 0 } @media (hover: none) { .modebar-container { display: none } }</style>"
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


def show(name: str, *records: Record) -> go.Figure:
    """Return the figure `name` of `FIGURES` for these records, captioned."""
    figure = next(spec for spec in FIGURES if spec.name == name).make(tables.table(records))
    said = [tables.caption(records), figure.layout.title.subtitle.text]
    return figure.update_layout(title_subtitle_text="<br>".join(text for text in said if text))


def preparation(rows: pd.DataFrame) -> go.Figure:
    """Interactions, users and items after each step of the preparation."""
    names = {"source": "source", "k-core": "k-core", "train": "training"}
    names |= {"valid": "validation targets", "test": "test targets"}
    first, core = (rows[rows["step"] == step].iloc[0] for step in ("source", "k-core"))
    figure = panels(3, shared_yaxes=True, spacing=0.06)
    for column, counted in enumerate(["interactions", "users", "items"], 1):
        figure.add_bar(
            x=rows[counted],
            y=rows["step"].map(names),
            orientation="h",
            text=rows[counted].map("{:,}".format),
            textposition="auto",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:,} " + counted + "<extra></extra>",
            marker=bar(rows["kind"].iloc[0], PALETTE[column - 1]),
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text=counted, rangemode="tozero", nticks=4, row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    kept = core["interactions"] / first["interactions"]
    lost = first["items"] - core["items"]
    return figure.update_layout(
        title_text=f"The k-core keeps {kept:.1%} of interactions and drops {lost:,} of "
        f"{first['items']:,} items"
    )


def sequence_lengths(rows: pd.DataFrame) -> go.Figure:
    """How many users have how many interactions, on a logarithmic scale."""
    low, high = rows["length"].min(), rows["length"].max()
    edges = np.unique(np.round(np.geomspace(low, high + 1, 25)).astype(int))
    counts, _ = np.histogram(rows["length"], edges, weights=rows["users"])
    spans = [f"{a} to {b - 1}" for a, b in pairwise(edges)]
    figure = go.Figure(
        go.Bar(
            x=np.sqrt(edges[:-1] * edges[1:]),
            y=counts,
            width=np.diff(edges) * 0.92,
            customdata=spans,
            hovertemplate="%{customdata} interactions: %{y} users<extra></extra>",
            marker=bar(rows["kind"].iloc[0], BLUE),
        ),
        layout={"template": TEMPLATE},
    )
    median, mean = rows["median_length"].iloc[0], rows["mean_length"].iloc[0]
    for value, name, side in ((median, "median", "left"), (mean, "mean", "right")):
        figure.add_vline(value, line={"color": ORANGE, "width": 2, "dash": "dot"})
        figure.add_annotation(
            x=np.log10(value),
            y=1,
            yref="paper",
            text=f"{name} {value:,.0f}",
            showarrow=False,
            xanchor="right" if side == "left" else "left",
            xshift=-6 if side == "left" else 6,
            font={"color": ORANGE},
        )
    figure.update_xaxes(title_text="interactions of a user (log scale)", **DECADES)
    figure.update_yaxes(title_text="users")
    return figure.update_layout(
        title_text=f"Half of the users have at most {median:,.0f} interactions, "
        f"one has {rows['max_length'].iloc[0]:,}"
    )


def item_popularity(rows: pd.DataFrame) -> go.Figure:
    """Interactions by popularity rank, and the share that the most popular items hold."""
    figure = panels(2)
    figure.add_scatter(
        x=rows["rank"],
        y=rows["interactions"],
        mode="lines",
        line=line(rows["kind"].iloc[0], BLUE),
        hovertemplate="rank %{x:,}: %{y:,} interactions<extra></extra>",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=[0.0, *rows["item_share"]],
        y=[0.0, *rows["interaction_share"]],
        mode="lines",
        line=line(rows["kind"].iloc[0], BLUE),
        fill="tozeroy",
        fillcolor="rgba(0,114,178,0.10)",
        hovertemplate="top %{x:.1%} of items: %{y:.1%}<extra></extra>",
        row=1,
        col=2,
    )
    equal = {"color": MUTED, "width": 1, "dash": "dot"}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=equal, hoverinfo="skip", row=1, col=2)
    figure.add_annotation(
        x=0.62, y=0.5, text="all items equal", showarrow=False, font={"color": MUTED}, row=1, col=2
    )
    for update in (figure.update_xaxes, figure.update_yaxes):
        update(row=1, col=1, **DECADES)
        update(tickformat=".0%", range=[0, 1], row=1, col=2)
    figure.update_xaxes(title_text="popularity rank (log scale)", row=1, col=1)
    figure.update_yaxes(title_text="interactions (log scale)", row=1, col=1)
    figure.update_xaxes(title_text="share of items, most popular first", row=1, col=2)
    figure.update_yaxes(title_text="share of interactions", row=1, col=2)
    tenth, gini = rows["top_tenth_share"].iloc[0], rows["gini"].iloc[0]
    return figure.update_layout(
        title_text=f"A tenth of the items holds {tenth:.0%} of the interactions (Gini {gini:.2f})"
    )


def tied_timestamps(rows: pd.DataFrame) -> go.Figure:
    """What is ordered by the tie rule alone."""
    figure = go.Figure(
        go.Bar(
            x=rows["share"],
            y=rows["what"].str.wrap(34).str.replace("\n", "<br>"),
            orientation="h",
            text=rows["share"].map("{:.1%}".format),
            textposition="auto",
            hovertemplate="%{x:.1%}<extra></extra>",
            marker=bar(rows["kind"].iloc[0], BLUE),
        ),
        layout={"template": TEMPLATE},
    )
    figure.update_xaxes(title_text="share", tickformat=".0%", range=[0, 1])
    figure.update_yaxes(autorange="reversed", ticks="")
    share = rows["tied_test_target_share"].iloc[0]
    return figure.update_layout(
        height=280,
        title_text=f"For {share:.0%} of the users the order of rows in the file decides the test target",
    )


_BASELINE = [*accuracy_figures.FIGURES, *control_figures.FIGURES]
FIGURES: list[Spec] = [
    Spec("preparation", "01_data_prep", "preparation", preparation),
    Spec("sequence_lengths", "01_data_prep", "sequence_lengths", sequence_lengths),
    Spec("item_popularity", "01_data_prep", "item_popularity", item_popularity),
    Spec("tied_timestamps", "01_data_prep", "tied_timestamps", tied_timestamps),
    *(Spec(make.__name__, "02_baseline", needs, make) for needs, make in _BASELINE),
    *(Spec(make.__name__, "04_amp_compile", needs, make) for needs, make in speed_figures.FIGURES),
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

    Figures of an earlier build that these records do not give are removed.
    """
    cards, files = [], []
    for spec in FIGURES:
        mine = [r for r in records if (r["notebook"], r["name"]) == (spec.notebook, spec.needs)]
        for (dataset, label), some in tables.groups(mine).items():
            if tables.is_ablation(dataset) and spec.needs == "learning_curve":
                continue  # arms by the dozen are compared in the figure of differences
            name = re.sub(r"[^\w.-]+", "-", f"{spec.name}_{dataset}_{label}")
            figure = show(spec.name, *some)
            files.append(write(figure, name, out_dir))
            height = figure.layout.height or HEIGHT
            cards.append(page.Card(spec.notebook, name, figure.layout.title.text, height, some))
    out_dir.mkdir(parents=True, exist_ok=True)
    files.append(_replace(out_dir / "index.html", page.index(cards, records)))
    for path in set(out_dir.glob("*.html")) - set(files):
        if page.GENERATOR in path.read_text(encoding="utf-8"):
            path.unlink()
    return files


def _replace(path: Path, text: str) -> Path:
    """Write whole or not at all, and only what differs."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return path
