"""What figures of models share: their names and colours, intervals, rows by name, and what is said beside.

Trained models have a colour each, the same in every figure; baselines without gradient descent are grey.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib.report.tables import BASELINES, model_name

# ------------------------------------------------------------------------------------------------
# How every figure looks: colours, template, and the marks that tell measured from predicted.
#
# Colours are those of Okabe and Ito, which people with any colour vision can tell apart; the background
# is white whatever page a figure stands in.

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA5C8F"

PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9")

INK, MUTED, GRID = "#222222", "#5F6368", "#E6E8EB"

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

HEIGHT = 400  # pixels, of a figure that states no other

_AXIS = {
    "gridcolor": GRID,
    "linecolor": MUTED,
    "zeroline": False,
    "ticks": "outside",
    "tickcolor": GRID,
    "automargin": True,
    "title": {"standoff": 10, "font": {"size": 13, "color": MUTED}},
}

MOST_TICKS = 6  # of a logarithmic axis: more overlap in a panel of a third of the width

TEMPLATE = {
    "layout": {
        "colorway": PALETTE,
        "font": {"family": FONT, "size": 13, "color": INK},
        "title": {
            "font": {"size": 17},
            "subtitle": {"font": {"size": 12, "color": MUTED}},
            "x": 0.02,
            "xanchor": "left",
            "y": 0.96,
            "yanchor": "top",
        },
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "height": HEIGHT,
        "margin": {"l": 70, "r": 30, "t": 95, "b": 60},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"font": {"family": FONT}},
        "bargap": 0.25,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
}


def log_axis(values: Iterable[float], most: int = MOST_TICKS) -> dict[str, Any]:
    """Return a logarithmic axis over the values, with whole numbers as ticks: 50k, 100k, 200k.

    Ticks are at 1, 2 and 5 of each decade, at 1 alone, or at every second decade and so on, as many as fit.
    """
    positive = [float(value) for value in values if value > 0]
    if not positive:
        return {"type": "log"}
    low, high = min(positive), max(positive)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    for digits, step in (((1, 2, 5), 1), ((1, 3), 1), ((1,), 1), ((1,), 2), ((1,), 3)):
        ticks = [d * 10.0**decade for decade in decades if decade % step == 0 for d in digits]
        ticks = [tick for tick in ticks if low / 1.6 <= tick <= high * 1.6]
        if len(ticks) <= most:
            break
    return {"type": "log", "tickvals": ticks, "ticktext": [si(tick) for tick in ticks]}


def si(value: float) -> str:
    """Return a number with three digits and the prefix of its thousands: 50k, 3.2M, 0.5."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.3g}"


def line(kind: str, color: str) -> dict[str, Any]:
    """Return the style of a line: solid where measured, dashed where predicted."""
    return {"color": color, "width": 2, "dash": "solid" if kind == "measured" else "dash"}


def marker(kind: str, color: str) -> dict[str, Any]:
    """Return the style of a marker: filled where measured, hollow where predicted."""
    return {
        "color": color,
        "size": 10,
        "symbol": "circle" if kind == "measured" else "circle-open",
        "line": {"color": color, "width": 2},
    }


def bar(kind: str, color: str) -> dict[str, Any]:
    """Return the style of a bar: filled where measured, hatched where predicted."""
    shape = "" if kind == "measured" else "/"
    return {"color": color, "pattern": {"shape": shape, "fillmode": "replace", "solidity": 0.3}}


# ------------------------------------------------------------------------------------------------

ROW_HEIGHT = 38  # pixels of a row of a categorical axis

NOTE = 100  # letters of a line under the title

GAP = 0.075  # between names at line ends, in shares of the highest value

NARROW = 18  # letters of a line of a name above its line's end

LETTER = 7.5  # pixels of a letter of a name at a line's end

_FIXED = {"BERT4Rec": BLUE, "BERT4Rec (ours)": BLUE, "causal twin": ORANGE}


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with models named for people; rows that name none are of BERT4Rec."""
    models = rows["model"] if "model" in rows else pd.Series("bert4rec", rows.index)
    return rows.assign(model=models.fillna("bert4rec").map(model_name))


def model_colors(models: Iterable[str]) -> dict[Any, str]:
    """Return a colour for each model, grey for baselines; BERT4Rec and its twin keep theirs everywhere."""
    grey = {model_name(name) for name in BASELINES}
    left = [color for color in PALETTE if color not in _FIXED.values()]
    found: dict[Any, str] = {}
    for name in sorted(set(models)):
        free = [color for color in left if color not in found.values()] or left
        found[name] = MUTED if name in grey else _FIXED.get(name, free[0])
    return found


def panels(
    count: int,
    *,
    rows: int = 1,
    shared_yaxes: bool = False,
    shared_xaxes: bool = False,
    spacing: float = 0.14,
) -> go.Figure:
    """Return an empty figure of panels side by side, in one row or several, without legend."""
    figure = make_subplots(
        rows=rows,
        cols=count,
        shared_yaxes=shared_yaxes,
        shared_xaxes=shared_xaxes,
        horizontal_spacing=spacing,
        vertical_spacing=0.08,
    )
    return figure.update_layout(template=TEMPLATE, showlegend=False)


def extreme(rows: pd.DataFrame, metric: str) -> pd.Series:
    """Return the row with the highest value."""
    return rows.sort_values(metric, na_position="first").iloc[-1]


def interval(
    rows: pd.DataFrame, metric: str, color: str, factor: float = 1, width: int = 6
) -> dict[str, Any]:
    """Return the style and lengths of bars from `<metric>_low` to `<metric>_high`, in units of 1 / factor."""
    above = factor * (rows[f"{metric}_high"] - rows[metric])
    below = factor * (rows[metric] - rows[f"{metric}_low"])
    return {"array": above, "arrayminus": below, "symmetric": False, "color": color, "width": width}


def words_beside(figure: go.Figure, names: Iterable[str], words: Iterable[str], panel: int = 1) -> None:
    """Write why a row has no mark at the start of its row."""
    for name, word in zip(names, words, strict=True):
        figure.add_annotation(
            **{"x": 0, "y": name, "text": word, "xanchor": "left", "row": 1, "col": panel},
            showarrow=False,
            font={"color": MUTED},
        )


def categories(figure: go.Figure, names: list[str], row_height: int = ROW_HEIGHT) -> None:
    """Put named rows on the y axis, the first on top, and make the figure as high as they need."""
    figure.update_yaxes(
        range=[len(names) - 0.4, -0.6], categoryorder="array", categoryarray=names, ticks="", type="category"
    )
    figure.update_layout(height=max(HEIGHT - 60, 190 + row_height * len(names)))


def note(figure: go.Figure, text: str) -> None:
    """Say under the title how marks are to be read; the caption stands before it."""
    lines = wrap(text, NOTE)
    figure.update_layout(title_subtitle_text="<br>".join(lines), margin={"t": 95 + 15 * len(lines)})


def sentence(text: str) -> str:
    """Return a title with a capital letter in front, as models' names do not have one."""
    return text[:1].upper() + text[1:]


def label_ends(
    figure: go.Figure, x: pd.Series, y: pd.Series, colors: Mapping[Any, str], top: float, panel: int = 1
) -> None:
    """Name the lines at their right ends, in their colours, names moved apart where ends are close.

    A line that ends before the others has its name above its end, where the lines beside it go on below.
    """
    places = y.sort_values()
    gap = GAP * top * (1 if panel == 1 else 1.3)  # a panel of two is lower than a figure of one
    for before, name in zip(places.index, places.index[1:], strict=False):
        places[name] = max(places[name], places[before] + gap)
    for name in places.index:
        short = x[name] < x.max()
        above = {"xanchor": "right", "yanchor": "bottom", "yshift": 8}
        side = above if short else {"xanchor": "left", "xshift": 8}
        figure.add_annotation(
            **{"x": x[name], "y": places[name]} | side,
            **{"xref": f"x{panel}" if panel > 1 else "x", "yref": f"y{panel}" if panel > 1 else "y"},
            text="<br>".join(wrap(name, NARROW)) if short else name,
            align="right" if short else "left",
            showarrow=False,
            font={"color": colors[name]},
        )
    figure.update_layout(margin={"r": 20 + LETTER * max(map(len, places.index))})


def duration(seconds: float) -> str:
    """Return seconds with two or three digits and a unit that suits them."""
    for limit, unit, size in ((0.9995, "ms", 1e-3), (120, "s", 1), (7200, "min", 60), (2e5, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.3g} days"
