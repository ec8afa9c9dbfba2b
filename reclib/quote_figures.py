"""Figures of a plan: where its memory and its time go, and the same run on every device. All predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib import devices, quote
from reclib.devices import GIB
from reclib.look import BLUE, INK, MUTED, ORANGE, PALETTE, TEMPLATE, bar, marker
from reclib.planner import Plan

ROW_HEIGHT = 26  # pixels of a row
_MEMORY_HEIGHT = 60  # pixels of the bar of memory
_PARTS = ("weights", "16-bit weights", "gradients", "optimizer", "activations", "logits")
_COLORS = dict(zip(_PARTS, PALETTE, strict=True)) | {quote.RUN: MUTED}
_SAID = {"optimizer": "optimiser", quote.RUN: "no tensors"}  # interpreter and libraries, or CUDA's context
_BESIDE = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top", "traceorder": "normal"}
_LEAST = 0.01  # share of a step below which a part is no row of its own


def parts(found: Plan) -> go.Figure:
    """Return the peak of memory by part against what the device has, and the step's time by part."""
    longest = sum(seconds > _LEAST * found.step.seconds for seconds in found.step.parts.values()) + 1
    plot = _MEMORY_HEIGHT + ROW_HEIGHT * longest
    share = _MEMORY_HEIGHT / plot
    figure = make_subplots(rows=2, row_heights=[share, 1 - share], vertical_spacing=80 / (plot + 80))
    figure.update_layout(template=TEMPLATE)
    for name, size in quote.memory_parts(found).items():
        figure.add_bar(
            x=[size / GIB],
            y=["memory"],
            orientation="h",
            name=f"{_SAID.get(name, name)} {size / GIB:.2f}",
            marker=_filled("predicted", _COLORS[name]),
            hovertemplate=f"{_SAID.get(name, name)}: {size / GIB:.2f} GiB<extra></extra>",
            row=1,
            col=1,
        )
    if found.memory_bytes is not None:
        has = found.memory_bytes / GIB
        figure.add_vline(x=has, line={"color": INK, "width": 2}, row=1, col=1)
        figure.add_annotation(
            x=has, y=1, yref="y domain", yanchor="bottom", text=f"it has {has:.0f} GiB", showarrow=False
        )
    _time_by_part(figure, found)
    figure.update_xaxes(title_text="GiB at the peak", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="ms of a step", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(ticks="", row=1, col=1, showticklabels=False)
    figure.update_yaxes(ticks="", row=2, col=1, categoryorder="total ascending", dtick=1)
    said = "fits" if found.fits else "does not fit"
    room = "" if found.fits is None else f", which {said}"
    title = f"{found.peak_bytes / GIB:.2f} GiB at the peak{room}; {quote.duration(found.step.seconds)} a step"
    about = f"{found.name}, {found.precision}: predicted, {found.basis}"
    return figure.update_layout(
        barmode="stack",
        height=plot + 80 + 170,
        title_text=title,
        title_subtitle_text=about,
        legend=_BESIDE,
        margin={"t": 110, "l": 180},
        showlegend=True,
    )


def _filled(kind: str, color: str) -> dict[str, Any]:
    """Return the style of a part of a bar: predicted it is hatched, yet full enough for narrow parts."""
    if kind == "measured":
        return bar(kind, color)
    hatch = {"shape": "/", "fillmode": "overlay", "fgcolor": "white", "fgopacity": 0.55, "solidity": 0.25}
    return {"color": color, "pattern": hatch}


def _time_by_part(figure: go.Figure, found: Plan) -> None:
    whole = sum(found.step.parts.values())
    shown = {name: s for name, s in found.step.parts.items() if s > _LEAST * whole}
    rest = whole - sum(shown.values())
    shown |= {"all else": rest} if rest > 0 else {}
    figure.add_bar(
        x=[1e3 * s for s in shown.values()],
        y=list(shown),
        orientation="h",
        marker=bar("predicted", BLUE),
        text=[f"{s / whole:.0%}" for s in shown.values()],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.3g} ms<extra></extra>",
        showlegend=False,
        row=2,
        col=1,
    )


def by_device(rows: pd.DataFrame) -> go.Figure:
    """Return the same run on every device: memory by part against what each has, and an epoch's time.

    `rows` are those of `quote.table`, or of the records: one for each device and part.
    """
    rows = rows.sort_values(["device", "part"], kind="stable")
    one = rows.drop_duplicates("device")
    kind = str(one["kind"].iloc[0])
    order = [name for name in devices.catalogue() if name in set(one["device"])]
    order = [*sorted(set(one["device"]) - set(order)), *order]
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.05)
    figure.update_layout(template=TEMPLATE)
    for name in (*_PARTS, quote.RUN):
        part = rows[rows["part"] == name]
        if len(part):
            figure.add_bar(
                x=part["bytes"] / GIB,
                y=part["device"],
                orientation="h",
                name=_SAID.get(name, name),
                marker=_filled(kind, _COLORS[name]),
                hovertemplate=f"%{{y}}, {_SAID.get(name, name)}: %{{x:.2f}} GiB<extra></extra>",
                row=1,
                col=1,
            )
    has = [name for name in order if name in devices.catalogue()]
    figure.add_scatter(
        x=[devices.catalogue()[name].memory_bytes / GIB for name in has],
        y=has,
        mode="markers",
        name="what it has",
        marker={"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": INK}},
        hovertemplate="%{y} has %{x:.0f} GiB<extra></extra>",
        row=1,
        col=1,
    )
    for basis, part in one.groupby("basis"):
        _epochs(figure, part, str(basis))
    figure.update_xaxes(title_text="GiB at the peak", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="seconds of an epoch, with the range", type="log", row=1, col=2)
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], ticks="", type="category")
    first = one.iloc[0]
    boards = one[one["device"].isin(has)]
    fit = int(boards["status"].eq("ok").sum())
    title = f"{first['size']}, batch {first['batch_size']:,}: fits on {fit} of {len(boards)} GPUs, {kind}"
    return figure.update_layout(
        barmode="stack",
        height=180 + ROW_HEIGHT * len(order),
        title_text=title,
        legend=_BESIDE,
        margin={"t": 100},
    )


def _epochs(figure: go.Figure, rows: pd.DataFrame, basis: str) -> None:
    """Add the epochs of devices whose plans rest on the same basis; those that do not fit are grey."""
    for fits, part in rows.groupby(rows["status"].eq("ok")):
        seconds, color = part["epoch_seconds"], (BLUE if basis == "validated" else ORANGE) if fits else MUTED
        figure.add_scatter(
            x=seconds,
            y=part["device"],
            mode="markers",
            name=f"epoch, {basis}" if fits else "epoch, if it fitted",
            marker=marker(str(part["kind"].iloc[0]), color),
            error_x={
                "array": part["epoch_seconds_high"] - seconds,
                "arrayminus": seconds - part["epoch_seconds_low"],
                "symmetric": False,
                "color": color,
                "thickness": 1.5,
            },
            customdata=part["precision"],
            hovertemplate="%{y}, %{customdata}: %{x:,.3g} s<extra></extra>",
            row=1,
            col=2,
        )


# The name of the records that each is made of, and the figure.
FIGURES: list[tuple[str, Callable[[pd.DataFrame], go.Figure]]] = [("plan", by_device)]
