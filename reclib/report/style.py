"""The style of every figure: colours, marks, panels, axes, notes and labels.

Measured values are filled and solid, predicted ones hollow, hatched or dashed. A trained model has one colour
in all figures; baselines without gradient descent are grey. Colours are those of Okabe and Ito, which are
distinct for all kinds of colour vision; the background is always white.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from textwrap import wrap
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib.report.tables import BASELINES, model_name

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#AA5C8F"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9")
INK, MUTED, GRID = "#222222", "#5F6368", "#E6E8EB"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# In pixels: default height of a figure, height of a row of a categorical axis, width of a letter.
HEIGHT, ROW_HEIGHT, LETTER = 400, 38, 7.5
PLOTLY_MIME = "application/vnd.plotly.v1+json"
NOTE, NARROW = 100, 18  # letters in a line under the title, and in a name above the end of its line
GAP = 0.075  # between names at line ends, as a share of the highest value
MOST_TICKS = 6  # of a logarithmic axis: more would overlap in a panel of a third of the width

_AXIS = {
    "gridcolor": GRID,
    "linecolor": MUTED,
    "zeroline": False,
    "ticks": "outside",
    "tickcolor": GRID,
    "automargin": True,
    "title": {"standoff": 10, "font": {"size": 13, "color": MUTED}},
}
_SUBTITLE = {"font": {"size": 12, "color": MUTED}}
_TITLE = {"font": {"size": 17}, "subtitle": _SUBTITLE, "x": 0.02, "xanchor": "left", "y": 0.96}
TEMPLATE = {
    "layout": {
        "colorway": PALETTE,
        "font": {"family": FONT, "size": 13, "color": INK},
        "title": _TITLE | {"yanchor": "top"},
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
BESIDE = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}  # places of a legend
BELOW = {"x": 0, "xanchor": "left", "yref": "container", "y": 0.005, "yanchor": "bottom"}
_FIXED = {"BERT4Rec": BLUE, "BERT4Rec (ours)": BLUE, "causal twin": ORANGE}


# -- styles --------------------------------------------------------------------------------------------------


def line(kind: Any, color: str) -> dict[str, Any]:
    """Return the style of a line: solid if measured, dashed if predicted."""
    return {"color": color, "width": 2, "dash": "solid" if kind == "measured" else "dash"}


def marker(kind: Any, color: str) -> dict[str, Any]:
    """Return the style of a marker: filled if measured, hollow if predicted."""
    symbol = "circle" if kind == "measured" else "circle-open"
    return {"color": color, "size": 10, "symbol": symbol, "line": {"color": color, "width": 2}}


def bar(kind: Any, color: str) -> dict[str, Any]:
    """Return the style of a bar: filled if measured, hatched if predicted."""
    shape = "" if kind == "measured" else "/"
    return {"color": color, "pattern": {"shape": shape, "fillmode": "replace", "solidity": 0.3}}


def model_colors(models: Iterable[str]) -> dict[Any, str]:
    """Return a colour for each model: fixed for BERT4Rec and its twin, grey for baselines."""
    grey = {model_name(name) for name in BASELINES}
    names = sorted(set(models))
    available = [color for color in PALETTE if color not in _FIXED.values()]
    available += [color for name, color in _FIXED.items() if name not in names]
    colors: dict[Any, str] = {}
    for name in names:
        free = [color for color in available if color not in colors.values()] or available
        colors[name] = MUTED if name in grey else _FIXED.get(name, free[0])
    return colors


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with readable names of models."""
    return rows.assign(model=rows["model"].map(model_name))


# -- figures and their marks ---------------------------------------------------------------------------------


def single(**layout: Any) -> Chart:
    """Return an empty figure of one panel."""
    return Chart(layout={"template": TEMPLATE} | layout)


def panels(
    columns: int = 1,
    rows: int = 1,
    spacing: float = 0.14,
    vertical: float = 0.08,
    legend: bool = False,
    **grid: Any,
) -> Chart:
    """Return an empty figure of panels; spaces between columns and rows are shares of the figure.

    `grid` are further arguments of plotly's `make_subplots`.
    """
    grid |= {"horizontal_spacing": spacing, "vertical_spacing": vertical, "figure": Chart()}
    figure = make_subplots(rows=rows, cols=columns, **grid).update_layout(template=TEMPLATE)
    return figure if legend else figure.update_layout(showlegend=False)


def at(row: int, col: int) -> dict[str, Any]:
    """Return the place of a panel as arguments of plotly's functions; rows and columns count from 1."""
    return {"row": row, "col": col}


class Chart(go.Figure):
    """A plotly figure that draws rows of records in the style of the study.

    `dots`, `path` and `bars` take rows of one kind, or the kind itself; values as names of columns or as
    arrays; the hover text ("": that of plotly, None: none); and further settings of plotly's trace, of which
    `marker` and `line` update the style of the kind.
    """

    _page = ""  # where else the figure is shown, for readers of an executed notebook

    def _ipython_display_(self) -> None:
        """Show the figure; viewers that cannot draw it show its title and where it is drawn."""
        from IPython.display import display

        bundle = self._repr_mimebundle_()
        if PLOTLY_MIME not in bundle:  # not in JupyterLab: plotly knows how to show it there
            super()._ipython_display_()
            return
        title = self.layout.title
        lines = [title.text, *(title.subtitle.text or "").split("<br>")]
        head, *details = (escape(re.sub("<[^>]*>", "", line)) for line in lines if line)
        place = f" and in {self._page}" if self._page else ""
        text = f"<p><strong>{head}</strong><br>{'<br>'.join(details)}</p>"
        text += f"<p><em>This figure is drawn in JupyterLab{place}.</em></p>"
        display({"text/html": text} | bundle, raw=True)

    def _draw(self, add: Any, x: Any, y: Any, rows: Any, hover: str | None, trace: dict[str, Any]) -> None:
        values = {"x": rows[x] if isinstance(x, str) else x, "y": rows[y] if isinstance(y, str) else y}
        text = {"hoverinfo": "skip"} if hover is None else {}
        text |= {"hovertemplate": f"{hover}<extra></extra>"} if hover else {}
        add(**values | text | trace)

    def dots(self, rows: Any, x: Any, y: Any, color: str, hover: str, **trace: Any) -> None:
        """Add a mark for each row."""
        trace["marker"] = marker(_kind(rows), color) | trace.get("marker", {})
        self._draw(self.add_scatter, x, y, rows, hover, {"mode": "markers"} | trace)

    def path(self, rows: Any, x: Any, y: Any, color: str, hover: str | None, **trace: Any) -> None:
        """Add a line through the rows, without marks unless `mode` and `marker` say otherwise."""
        trace["line"] = line(_kind(rows), color) | trace.get("line", {})
        self._draw(self.add_scatter, x, y, rows, hover, {"mode": "lines"} | trace)

    def bars(self, rows: Any, x: Any, y: Any, color: str, hover: str, **trace: Any) -> None:
        """Add a bar for each row, horizontal unless `orientation` says otherwise."""
        trace["marker"] = bar(_kind(rows), color) | trace.get("marker", {})
        self._draw(self.add_bar, x, y, rows, hover, {"orientation": "h"} | trace)

    def text(self, text: str, x: Any, y: Any, color: str | None = None, **place: Any) -> None:
        """Write a text at a point of a panel."""
        font = {"font": {"color": color}} if color else {}
        self.add_annotation(**{"x": x, "y": y, "text": text, "showarrow": False} | font | place)

    def words_beside(self, names: Iterable[str], words: Iterable[str]) -> None:
        """Write a word at the start of each row without a mark."""
        for name, word in zip(names, words, strict=True):
            self.text(word, 0, name, MUTED, xanchor="left", **at(1, 1))

    def label_ends(
        self, x: pd.Series, y: pd.Series, colors: Mapping[Any, str], top: float, panel: int = 1
    ) -> None:
        """Write the names of lines at their right ends in their colours, moved apart if ends are close.

        The name of a line that ends before the others is above its end.
        """
        places, axis = y.sort_values(), "" if panel == 1 else panel
        gap = GAP * top * (1 if panel == 1 else 1.3)  # one of two panels is lower than a single one
        for before, name in zip(places.index, places.index[1:], strict=False):
            places[name] = max(places[name], places[before] + gap)
        for name in places.index:
            text, place = name, {"xanchor": "left", "xshift": 8, "align": "left"}
            if x[name] < x.max():
                place = {"xanchor": "right", "yanchor": "bottom", "yshift": 8, "align": "right"}
                text = broken(name, NARROW)
            place |= {"xref": f"x{axis}", "yref": f"y{axis}"}
            self.text(text, x[name], places[name], colors[name], **place)
        self.update_layout(margin={"r": 20 + LETTER * max(map(len, places.index))})

    def categories(self, names: list[str], row_height: int = ROW_HEIGHT) -> None:
        """Put named rows on the y axis, the first on top, and make the figure as high as they need."""
        order = {"categoryorder": "array", "categoryarray": names, "ticks": "", "type": "category"}
        self.update_yaxes(range=[len(names) - 0.4, -0.6], **order)
        self.update_layout(height=max(HEIGHT - 60, 190 + row_height * len(names)))

    def note(self, text: str) -> None:
        """Write a note on the marks under the title."""
        lines = wrap(text, NOTE)
        self.update_layout(title_subtitle_text="<br>".join(lines), margin={"t": 95 + 15 * len(lines)})


def _kind(rows: Any) -> str:
    return rows if isinstance(rows, str) else str(rows["kind"].iloc[0])


def interval(rows: pd.DataFrame, metric: str, color: str, factor: float = 1, **look: Any) -> dict[str, Any]:
    """Return error bars from `<metric>_low` to `<metric>_high`, multiplied by `factor`."""
    above = factor * (rows[f"{metric}_high"] - rows[metric])
    below = factor * (rows[metric] - rows[f"{metric}_low"])
    return {"array": above, "arrayminus": below, "symmetric": False, "color": color, "width": 6} | look


# -- axes and texts ------------------------------------------------------------------------------------------


def log_axis(values: Iterable[float], most: int = MOST_TICKS) -> dict[str, Any]:
    """Return a logarithmic axis over the values, with ticks such as 50k, 100k, 200k.

    Ticks are at 1, 2 and 5 of each decade, or fewer if these are more than `most`.
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


def broken(text: str, letters: int) -> str:
    """Return a text broken into lines of at most `letters` letters."""
    return "<br>".join(wrap(text, letters))


def sentence(text: str) -> str:
    """Return a title with a capital first letter."""
    return text[:1].upper() + text[1:]


def column(rows: pd.DataFrame, name: str) -> pd.Series:
    """Return a column as numbers, NaN if the rows do not have it."""
    return pd.to_numeric(rows[name] if name in rows else pd.Series(math.nan, rows.index))


def extreme(rows: pd.DataFrame, metric: str) -> pd.Series:
    """Return the row with the highest value."""
    return rows.sort_values(metric, na_position="first").iloc[-1]


def duration(seconds: float) -> str:
    """Return seconds with two or three digits and a suitable unit."""
    for limit, unit, size in ((0.9995, "ms", 1e-3), (120, "s", 1), (7200, "min", 60), (2e5, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.3g} days"
