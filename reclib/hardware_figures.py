"""Figures of devices side by side: measured solid, predicted hatched, published by others outlined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib import devices, steptime
from reclib.devices import GIB
from reclib.look import BLUE, GREEN, MUTED, ORANGE, PALETTE, TEMPLATE, bar, marker
from reclib.marks import sentence
from reclib.speed_figures import reference

ROW_HEIGHT = 26  # pixels of a device
OUTLINED = {"color": "rgba(0,0,0,0)", "line": {"color": ORANGE, "width": 2}}
SIZES = ("nano", "tiny", "small", "medium", "5m", "85m", "130m", "430m")
_PUBLISHED = {"85 M": "85m", "130 M": "130m", "429 M": "430m"}  # by its wall clock, from the slides


def device_order(rows: pd.DataFrame) -> list[str]:
    """Return the devices that rows are of: CPUs first, then the catalogue's, as it lists them."""
    there = set(rows["device"])
    cpus = sorted(name for name in there if str(name).startswith("cpu"))
    known = [name for name in devices.catalogue() if name in there]
    return cpus + known + sorted(there - set(cpus) - set(known))


def named(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows whose CPUs have a name: cpu2 of one machine is not cpu2 of another."""
    device = rows["device"].astype(str)
    bare = device.str.fullmatch(r"cpu\d*")
    if "cpu" not in rows or not bare.any():
        return rows
    return rows.assign(
        device=device.where(~bare, device + " " + rows["cpu"].fillna("").astype(str)).str.strip()
    )


def throughput(rows: pd.DataFrame) -> go.Figure:
    """Sequences/s of each size on each device, with the range of each prediction."""
    rows = closed_or_measured(named(rows))
    figure, sizes, order = _panels(rows)
    for column, size in enumerate(sizes, 1):
        mine = rows[rows["size"] == size]
        for kind, part in mine.groupby("kind"):
            figure.add_bar(
                x=part["sequences_per_second"],
                y=part["device"],
                orientation="h",
                marker=bar(str(kind), BLUE if kind == "measured" else MUTED),
                error_x=_range(part) if kind == "predicted" else None,
                customdata=part["precision"],
                hovertemplate=f"%{{y}}: %{{x:,.0f}} sequences/s, %{{customdata}}, {kind}<extra></extra>",
                offsetgroup=str(kind),
                row=1,
                col=column,
            )
        for name, rate in _published(size):
            figure.add_bar(
                x=[rate],
                y=["published"],
                orientation="h",
                marker=OUTLINED,
                hovertemplate=f"seed study, {name}, A100, its wall clock: %{{x:,.0f}}/s<extra></extra>",
                row=1,
                col=column,
            )
    _same_decades(figure, rows["sequences_per_second"], "sequences/s")
    best = rows[rows["kind"] == "measured"]
    title = "Predicted rates by device: nothing was measured here"
    if len(best):
        title = f"Measured on {', '.join(sorted(set(best['device'])))}, predicted for everything else"
    return _finish(figure, [*order, "published"], title)


def memory_by_size(rows: pd.DataFrame) -> go.Figure:
    """Peak memory of each size, and what each device has."""
    rows = closed_or_measured(named(rows))
    figure, sizes, order = _panels(rows)
    for column, size in enumerate(sizes, 1):
        mine = rows[rows["size"] == size]
        for kind, part in mine.groupby("kind"):
            figure.add_bar(
                x=part["peak_memory_bytes"] / GIB,
                y=part["device"],
                orientation="h",
                marker=bar(str(kind), BLUE if kind == "measured" else MUTED),
                hovertemplate=f"%{{y}}: %{{x:.2f}} GiB, {kind}<extra></extra>",
                offsetgroup=str(kind),
                row=1,
                col=column,
            )
        has = [name for name in order if name in devices.catalogue()]
        figure.add_scatter(
            x=[devices.catalogue()[name].memory_bytes / GIB for name in has],
            y=has,
            mode="markers",
            marker={"symbol": "line-ns", "size": 14, "line": {"width": 2, "color": ORANGE}},
            hovertemplate="%{y} has %{x:.0f} GiB<extra></extra>",
            row=1,
            col=column,
        )
    _same_decades(figure, pd.Series([0.3, 150.0]), "GiB")
    return _finish(figure, order, "Peak memory: a bar that ends left of the device's line fits")


def roofline(rows: pd.DataFrame) -> go.Figure:
    """FLOP/s over FLOPs per byte moved: each device's roof, and the steps under it."""
    figure = go.Figure(layout={"template": TEMPLATE})
    rows = named(rows)
    rows = rows[rows["rule"].fillna("closed").eq("open") | rows["device"].astype(str).str.startswith("cpu")]
    rows = rows[rows["bytes_moved"].notna()] if "bytes_moved" in rows else rows.iloc[:0]
    for number, name in enumerate(device_order(rows)):
        color, measured = PALETTE[number % len(PALETTE)], name in steptime.cpus()
        mine = rows[rows["device"] == name]
        if (roof := roof_of(name)) is not None:
            x = np.logspace(0, 4, 60)
            dash = "solid" if measured else "dot" if number >= len(PALETTE) else "dash"
            style = {"color": color, "width": 1.5, "dash": dash}
            y = np.minimum(roof[0], roof[1] * x)
            figure.add_scatter(x=x, y=y, mode="lines", line=style, name=name, hoverinfo="skip")
        for kind, part in mine.groupby("kind"):
            figure.add_scatter(
                x=part["flops"] / part["bytes_moved"],
                y=part["flops"] / part["step_seconds"],
                mode="markers",
                marker=marker(str(kind), color),
                name=f"{name}, {kind}",
                customdata=part["size"],
                hovertemplate=f"{name}, %{{customdata}}: %{{y:.2s}}FLOP/s, {kind}<extra></extra>",
                showlegend=roof is None,
            )
    figure.update_xaxes(
        type="log", title_text="FLOPs per byte moved through main memory", range=[0.3, 3.3], dtick=1
    )
    figure.update_yaxes(
        type="log", title_text="FLOP/s (roof: data sheet; of CPUs measured)", exponentformat="SI", dtick=1
    )
    legend = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
    title = (
        _roof_title(rows) or "Steps measured here, under no roof: no device of the catalogue is among them"
    )
    return figure.update_layout(height=520, showlegend=True, legend=legend, title_text=title)


def roof_of(name: str) -> tuple[float, float] | None:
    """Return a device's FLOP/s at most and its bytes/s: by its data sheet, of a CPU as measured."""
    if name in steptime.cpus():
        rates = steptime.cpus()[name].rates
        return max(rates["product fp32"].values()), rates["bandwidth"]
    board = devices.catalogue().get(name)
    return None if board is None else (board.peaks[board.precision()], board.bandwidth)


def _roof_title(rows: pd.DataFrame) -> str:
    boards = rows[rows["device"].isin(list(devices.catalogue()))]
    if boards.empty:
        return ""
    ridge = boards["device"].map(lambda name: _ridge(devices.catalogue()[name]))
    left = (boards["flops"] / boards["bytes_moved"] < ridge).sum()
    return f"{left} of {len(boards)} predicted steps lie left of the ridge: bandwidth limits them first"


def _ridge(board: devices.Board) -> float:
    return board.peaks[board.precision()] / board.bandwidth


def technique_gains(rows: pd.DataFrame) -> go.Figure:
    """How many times faster each technique makes a step, by device and size, measured and predicted."""
    rows = named(rows)
    names = list(dict.fromkeys(rows["technique"]))
    rows = rows[rows["size"].isin(SIZES)]
    sizes = [size for size in SIZES if size in set(rows["size"])]
    order = device_order(rows)
    figure = make_subplots(
        cols=len(names), shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.04
    ).update_layout(template=TEMPLATE)
    for column, name in enumerate(names, 1):
        mine = rows[rows["technique"] == name]
        grouped = sorted(mine.groupby(["size", "kind"]), key=lambda one: (sizes.index(one[0][0]), one[0][1]))
        for (size, kind), part in grouped:
            known = {trace.name for trace in figure.data}
            figure.add_scatter(
                x=part["speedup"],
                y=part["device"],
                mode="markers",
                marker=marker(str(kind), PALETTE[sizes.index(size) % len(PALETTE)]),
                name=size,
                legendgroup=size,
                showlegend=size not in known,
                hovertemplate=f"%{{y}}, {size}: %{{x:.2f}} times, {kind}<extra></extra>",
                row=1,
                col=column,
            )
        figure.add_vline(x=1, line={"color": MUTED, "width": 1}, row=1, col=column)
        figure.update_xaxes(range=[0, 1.1 * max(1.5, mine["speedup"].max())], row=1, col=column)
    figure.update_xaxes(title_text="times as fast")
    best = rows.iloc[int(rows["speedup"].argmax())]
    title = (
        f"{best['technique']}: up to {best['speedup']:.1f} times the speed, {best['kind']} ({best['device']})"
    )
    title = sentence(title)
    figure = _finish(figure, order, title)
    legend = {"y": -0.3, "yanchor": "top", "traceorder": "normal"}
    return figure.update_layout(showlegend=True, legend=legend, margin={"b": 120})


def closed_or_measured(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per size, device and kind: each device with what suits it, CPUs in fp32."""
    rule = rows["rule"] if "rule" in rows else pd.Series("closed", rows.index)
    cpu = rows["device"].astype(str).str.startswith("cpu")
    chosen = rows[(rule.fillna("closed") == "open") | cpu]
    return chosen.drop_duplicates(["size", "device", "kind"], keep="last")


def _panels(rows: pd.DataFrame) -> tuple[go.Figure, list[str], list[str]]:
    sizes = [size for size in SIZES if size in set(rows["size"])]
    figure = make_subplots(
        cols=max(1, len(sizes)), shared_yaxes=True, subplot_titles=sizes, horizontal_spacing=0.03
    )
    return figure.update_layout(template=TEMPLATE, showlegend=False), sizes, device_order(rows)


def _same_decades(figure: go.Figure, values: pd.Series, title: str) -> None:
    """Give all panels one logarithmic axis, so that bars can be compared across them."""
    low, high = np.floor(np.log10(values.min())), np.log10(values.max()) + 0.4
    figure.update_xaxes(type="log", title_text=title, range=[low, high], dtick=1, exponentformat="SI")


def _range(part: pd.DataFrame) -> dict[str, Any]:
    rate = part["sequences_per_second"]
    high, low = part["sequences_per_second_high"] - rate, rate - part["sequences_per_second_low"]
    return {"symmetric": False, "array": high, "arrayminus": low, "color": GREEN, "thickness": 1.5}


def _published(size: str) -> list[tuple[str, float]]:
    """Return what others published of a size: sequences of an epoch over its time."""
    runs = reference()["throughput"]
    return [
        (run["name"], run["sequences"] / run["epoch_seconds"])
        for run in runs
        if _PUBLISHED.get(run["name"]) == size and run["source"] == "slides"
    ]


def _finish(figure: go.Figure, order: list[str], title: str) -> go.Figure:
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1], ticks="", type="category")
    height = 190 + ROW_HEIGHT * len(order)
    return figure.update_layout(height=height, title_text=title, margin={"t": 120}, bargap=0.2)


# The name of the records that each is made of, and the figure.
FIGURES: list[tuple[str, Callable[[pd.DataFrame], go.Figure]]] = [
    ("hardware_step", throughput),
    ("hardware_step", memory_by_size),
    ("hardware_step", roofline),
    ("technique", technique_gains),
]
