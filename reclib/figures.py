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
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from reclib import page, speed_figures, tables
from reclib.look import BLUE, DECADES, HEIGHT, INK, MUTED, ORANGE, PALETTE, TEMPLATE, bar, line, marker
from reclib.tables import Record

_NO_MARGIN = "<style>body { margin: 0 }</style>"  # so that a frame of the figure's height fits
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
    return figure.update_layout(title_subtitle_text=tables.caption(records))


def preparation(rows: pd.DataFrame) -> go.Figure:
    """Interactions, users and items after each step of the preparation."""
    names = {"source": "source", "k-core": "k-core", "train": "training"}
    names |= {"valid": "validation targets", "test": "test targets"}
    first, core = (rows[rows["step"] == step].iloc[0] for step in ("source", "k-core"))
    figure = _panels(3, shared_yaxes=True, spacing=0.06)
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
    figure = _panels(2)
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


def learning_curves(rows: pd.DataFrame) -> go.Figure:
    """Training loss and validation NDCG@10 by epoch, one line per seed."""
    figure = _panels(2, spacing=0.1)
    best = _best(rows, "valid_ndcg@10")
    runs = rows.groupby(["kind", "seed"], sort=True, dropna=False)
    for number, ((kind, seed), run) in enumerate(runs):
        color = PALETTE[number % len(PALETTE)]
        for column, measured in enumerate(["train_loss", "valid_ndcg@10"], 1):
            points = run.dropna(subset=[measured])
            figure.add_scatter(
                x=points["epoch"],
                y=points[measured],
                mode="lines+markers" if len(points) < 40 else "lines",
                line=line(str(kind), color),
                marker={"size": 5},
                name=f"seed {seed}",
                legendgroup=f"{kind} {seed}",
                showlegend=column == 1 and len(runs) > 1,
                hovertemplate="epoch %{x}: %{y:.4f}<extra></extra>",
                row=1,
                col=column,
            )
    figure.add_annotation(
        x=best["epoch"],
        y=best["valid_ndcg@10"],
        text=f"best {best['valid_ndcg@10']:.4f}",
        bgcolor="white",
        ax=-20,
        ay=50,
        row=1,
        col=2,
    )
    figure.update_xaxes(title_text="epoch (passes over the users)", rangemode="tozero")
    figure.update_yaxes(title_text="cross-entropy per target (nats)", row=1, col=1)
    figure.update_yaxes(title_text="NDCG@10, full ranking", rangemode="tozero", row=1, col=2)
    return figure.update_layout(
        showlegend=len(runs) > 1, title_text=f"NDCG@10 on validation is best after {best['epoch']:.0f} epochs"
    )


def metric_comparison(rows: pd.DataFrame) -> go.Figure:
    """HR@10, NDCG@10 and MRR by model: mean over users with its interval, and each seed apart."""
    metrics = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "mrr": "MRR"}
    shown = {key: name for key, name in metrics.items() if key in rows and rows[key].notna().any()}
    models = rows.groupby("model")["hr@10"].max().sort_values(ascending=False).index
    figure = _panels(len(shown), shared_yaxes=True, spacing=0.06)
    colors = dict(zip(models, PALETTE, strict=False))
    for column, (metric, title) in enumerate(shown.items(), 1):
        known = rows[rows[metric].notna()]
        has_interval = known.get(f"{metric}_low", pd.Series(np.nan, known.index)).notna()
        one_seed = {"symbol": "line-ns", "size": 14, "line": {"color": INK, "width": 1.5}}
        for (model, kind, whole), some in known.groupby(["model", "kind", has_interval]):
            color = colors.get(model, MUTED)
            is_mean = whole or some["seed"].isna().all()
            figure.add_scatter(
                x=some[metric],
                y=some["model"],
                mode="markers",
                marker=marker(str(kind), color) if is_mean else one_seed,
                error_x=_interval(some, metric, color) if whole else None,
                hovertemplate="%{y}: %{x:.4f}<extra></extra>",
                row=1,
                col=column,
            )
        axis_title = f"{title} (mean over users, full ranking)"
        figure.update_xaxes(title_text=axis_title, rangemode="tozero", row=1, col=column)
    figure.add_annotation(
        text="bar: 95 % interval over users, tick: one seed",
        **{"xref": "paper", "x": 1, "xanchor": "right", "yref": "paper", "y": 1.1},
        showarrow=False,
        font={"color": MUTED, "size": 12},
    )
    figure.update_yaxes(
        range=[len(models) - 0.4, -0.6], categoryorder="array", categoryarray=models, ticks=""
    )
    best = _best(rows[rows["seed"].isna()] if rows["seed"].isna().any() else rows, "hr@10")
    return figure.update_layout(
        title_text=f"{best['model']} has the target among its ten first for {best['hr@10']:.1%} of users"
    )


def rank_histogram(rows: pd.DataFrame) -> go.Figure:
    """Share of users by the rank of their target, by model."""
    figure = go.Figure(layout={"template": TEMPLATE})
    for number, ((model, kind), mine) in enumerate(rows.groupby(["model", "kind"], sort=False)):
        low, high = mine["rank_low"], mine["rank_high"]
        spans = [str(a) if a == b else f"{a}–{b}" for a, b in zip(low, high, strict=True)]
        figure.add_bar(
            x=spans,
            y=mine["users"] / mine["users"].sum(),
            name=model if kind == "measured" else f"{model}, predicted",
            marker=bar(str(kind), PALETTE[number % len(PALETTE)]),
            hovertemplate="rank %{x}: %{y:.1%} of users<extra></extra>",
        )
    figure.update_xaxes(title_text="rank of the target among all items", type="category")
    figure.update_yaxes(title_text="share of users", tickformat=".0%")
    return figure.update_layout(showlegend=True, title_text="Where do the models rank the target?")


FIGURES: list[Spec] = [
    Spec("preparation", "01_data_prep", "preparation", preparation),
    Spec("sequence_lengths", "01_data_prep", "sequence_lengths", sequence_lengths),
    Spec("item_popularity", "01_data_prep", "item_popularity", item_popularity),
    Spec("tied_timestamps", "01_data_prep", "tied_timestamps", tied_timestamps),
    Spec("learning_curves", "02_baseline", "learning_curve", learning_curves),
    Spec("metric_comparison", "02_baseline", "test_metrics", metric_comparison),
    Spec("rank_histogram", "02_baseline", "rank_histogram", rank_histogram),
    *(Spec(make.__name__, "04_amp_compile", needs, make) for needs, make in speed_figures.FIGURES),
]


def write(figure: go.Figure, name: str, out_dir: Path) -> Path:
    """Write `<name>.html` beside one shared `plotly.min.js`; the same figure gives the same bytes."""
    out_dir.mkdir(parents=True, exist_ok=True)
    html = figure.to_html(include_plotlyjs="directory", div_id=name, config=_CONFIG)
    head = f"<head>{page.GENERATOR}<title>{escape(name)}</title>{_NO_MARGIN}"
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


def _panels(count: int, *, shared_yaxes: bool = False, spacing: float = 0.14) -> go.Figure:
    figure = make_subplots(cols=count, shared_yaxes=shared_yaxes, horizontal_spacing=spacing)
    return figure.update_layout(template=TEMPLATE, showlegend=False)


def _best(rows: pd.DataFrame, metric: str) -> pd.Series:
    return rows.sort_values(metric, na_position="first").iloc[-1]


def _interval(rows: pd.DataFrame, metric: str, color: str) -> dict[str, Any]:
    above = rows[f"{metric}_high"] - rows[metric]
    below = rows[metric] - rows[f"{metric}_low"]
    return {"array": above, "arrayminus": below, "symmetric": False, "color": color, "width": 6}


def _replace(path: Path, text: str) -> Path:
    """Write whole or not at all, and only what differs."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    return path
