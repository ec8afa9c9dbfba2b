"""Figures of notebook 07: any number of the records against any other, and the gate of one history."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib import explore, look, marks
from reclib.look import BLUE, INK, MUTED, PALETTE, TEMPLATE

# Baselines share a grey: their marks differ instead.
_SYMBOLS = ("square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon")
_LOG_FROM = 30  # times between the smallest and the largest value, from which an axis is logarithmic


def scatter(rows: pd.DataFrame, selection: explore.Selection) -> go.Figure:
    """Return the chosen numbers of `explore.chosen`, a point for each record; hovering says its origin."""
    figure = go.Figure(layout={"template": TEMPLATE})
    groups = {str(name): part for name, part in rows.groupby(selection.color, sort=True, dropna=False)}
    tints = marks.model_colors(groups) if selection.color == "model" else {}
    for place, (name, part) in enumerate(groups.items()):
        tint = tints.get(name, PALETTE[place % len(PALETTE)])
        for kind, points in part.groupby("kind", sort=True):
            mark = look.marker(str(kind), tint)
            if tint == MUTED:
                shape = _SYMBOLS[place % len(_SYMBOLS)]
                mark["symbol"] = shape if kind == "measured" else f"{shape}-open"
            error = None
            if f"{selection.y}_low" in points and points[f"{selection.y}_low"].notna().all():
                error = marks.interval(points, selection.y, tint)
            figure.add_scatter(
                x=points[selection.x],
                y=points[selection.y],
                name=name if kind == "measured" else f"{name}, {kind}",
                mode="markers",
                marker=mark,
                error_y=error,
                text=points.apply(explore.origin, axis=1),
                hovertemplate="%{x}, %{y}<br>%{text}<extra></extra>",
            )
    x, y = spoken(selection.x), spoken(selection.y)
    figure.update_xaxes(title_text=x, **_scale(rows[selection.x]))
    figure.update_yaxes(title_text=y, **_scale(rows[selection.y]))
    title = marks.sentence(f"{y} against {x}")
    labels = ", ".join(sorted(set(rows["label"])))
    said = f"{selection.result.replace('_', ' ')}: {len(rows)} records on {labels}"
    figure.update_layout(title_text=title, title_subtitle_text=said, showlegend=True)
    return figure.update_layout(
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
    )


def gate(weights: np.ndarray, usual: np.ndarray) -> go.Figure:
    """Return the weights (K,) of a history's experts, over those (N, K) of many: their middle 90 %."""
    names = [f"expert {number + 1}<br>{weight:.2f}" for number, weight in enumerate(weights)]
    low, middle, high = np.quantile(usual, (0.05, 0.5, 0.95), axis=0)
    figure = go.Figure(layout={"template": TEMPLATE})
    figure.add_bar(
        x=names,
        y=weights.tolist(),
        marker={"color": BLUE},
        name="this history",
        hovertemplate="this history: %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=names,
        y=middle.tolist(),
        mode="markers",
        name=f"{len(usual)} histories: median, middle 90 %",
        marker={"symbol": "line-ew", "size": 22, "line": {"width": 2, "color": INK}},
        error_y={"array": high - middle, "arrayminus": middle - low, "symmetric": False, "color": INK},
        hovertemplate="median: %{y:.3f}<extra></extra>",
    )
    uniform = 1 / len(weights)
    figure.add_hline(y=uniform, line={"color": MUTED, "width": 1, "dash": "dot"})
    strongest = int(np.argmax(weights))
    title = f"iLoRA's gate: expert {strongest + 1} has {weights[strongest]:.0%} of the weight"
    figure.update_yaxes(title_text="weight", range=[0, 1])
    said = "Dotted: all alike, which would be plain LoRA"
    return figure.update_layout(title_text=title, title_subtitle_text=said, height=320, bargap=0.5)


def spoken(column: str) -> str:
    """Return a column's name for people: `valid_hr@10` is "validation HR@10"."""
    words = [word.upper() if "@" in word or word == "mrr" else word for word in column.split("_")]
    return " ".join("validation" if word == "valid" else word for word in words)


def _scale(values: pd.Series) -> dict[str, object]:
    wide = values.min() > 0 and values.max() / values.min() > _LOG_FROM
    return {"type": "log"} if wide else {"rangemode": "tozero"} if values.min() >= 0 else {}
