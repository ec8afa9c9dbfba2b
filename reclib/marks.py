"""What figures of models share: their names and colours, intervals, rows by name, and what is said beside.

Trained models have a colour each, the same in every figure; baselines without gradient descent are grey.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import wrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib.look import BLUE, HEIGHT, MUTED, ORANGE, PALETTE, TEMPLATE
from reclib.tables import BASELINES, model_name

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


def interval(rows: pd.DataFrame, metric: str, color: str) -> dict[str, Any]:
    """Return the style and lengths of the bars of a 95 % interval."""
    above = rows[f"{metric}_high"] - rows[metric]
    below = rows[metric] - rows[f"{metric}_low"]
    return {"array": above, "arrayminus": below, "symmetric": False, "color": color, "width": 6}


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
