"""How every figure looks: colours, template, and the marks that tell measured from predicted.

Colours are those of Okabe and Ito, which people with any colour vision can tell apart; the background
is white whatever page a figure stands in.
"""

from __future__ import annotations

from typing import Any

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
DECADES = {"type": "log", "dtick": "D2", "tickformat": ",d"}  # ticks at 1, 2 and 5
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
