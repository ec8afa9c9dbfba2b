"""Figures of speed, devices, plans and claimed rates: pure functions from a table to a `go.Figure`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib import hardware
from reclib.cost import planner
from reclib.cost.planner import Plan
from reclib.hardware import GIB
from reclib.records import reference
from reclib.report import style
from reclib.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PALETTE, at, interval, log_axis, panels

SIZES = ("nano", "tiny", "small", "medium", "5m", "85m", "130m", "430m")
CLOSE = 1.05  # a claim holds within 5 %, as in `audit`

_DEVICE_ROW, _MEMORY_ROW = 26, 60  # heights of the row of a device and of the memory bar, pixels
_LEAST = 0.01  # share of a step below which parts share one row
_PUBLISHED = {"85 M": "85m", "130 M": "130m", "429 M": "430m"}  # sizes with epoch times on the slides
_PARTS = ("weights", "16-bit weights", "gradients", "optimizer", "activations", "logits", planner.RUN)
_COLORS = dict(zip(_PARTS, (*PALETTE, MUTED), strict=True))
_NAMES = {"optimizer": "optimiser", planner.RUN: "no tensors"}  # interpreter and libraries, or CUDA's context
_HATCH = {"shape": "/", "fillmode": "overlay", "fgcolor": "white", "fgopacity": 0.55, "solidity": 0.25}
_LEGEND = style.BESIDE | {"traceorder": "normal"}


# -- one device ----------------------------------------------------------------------------------------------


def step_time(rows: pd.DataFrame) -> go.Figure:
    """Median step with quartiles, and peak memory, by precision, compile mode and batch size."""
    rows = rows.sort_values(["batch_size", "precision", "compile_mode"], kind="stable")
    modes = rows["compile_mode"].replace("off", "eager")
    names = rows["precision"] + ", " + modes + ", batch " + rows["batch_size"].astype(str)
    applies = rows["status"] != "not applicable"
    absent, names, rows = names[~applies], names[applies], rows[applies]
    figure = panels(2, spacing=0.06, shared_yaxes=True)
    timed, batches = style.column(rows, "step_seconds").notna(), sorted(rows["batch_size"].unique())
    memory = style.column(rows, "peak_tensor_bytes").fillna(style.column(rows, "peak_memory_bytes")) / 2**20
    for (_, batch), part in rows[timed].groupby(["kind", "batch_size"]):
        color, label = PALETTE[batches.index(batch) % len(PALETTE)], names[part.index]
        ends: dict[str, Any] = {"error_x": interval(part, "step_seconds", color, 1e3)}
        ends |= {"customdata": part["sequences_per_second"]}
        hover = "%{y}: %{x:.2f} ms, %{customdata:,.0f} sequences/s"
        figure.dots(part, part["step_seconds"] * 1e3, label, color, hover, **ends, **at(1, 1))
        figure.bars(part, memory[part.index], label, color, "%{y}: %{x:,.0f} MiB", **at(1, 2))
    words = rows["status"][~timed].replace("oom", "out of memory").astype(str)
    figure.words_beside(names[~timed], words)
    figure.update_xaxes(title_text="median step, bar: quartiles (ms)", rangemode="tozero", **at(1, 1))
    figure.update_xaxes(title_text="peak of tensors in a step (MiB)", rangemode="tozero", **at(1, 2))
    figure.categories(list(dict.fromkeys(names)))
    if len(absent):
        figure.note(f"not applicable on this device: {'; '.join(dict.fromkeys(absent))}")
    title = "No variant could be timed"
    if timed.any():
        rates = style.column(rows, "sequences_per_second")
        fastest = int(np.nanargmax(rates))
        title = f"Fastest: {names.iloc[fastest]} with {rates.iloc[fastest]:,.0f} sequences/s"
    return figure.update_layout(title_text=title)


def step_ladder(rows: pd.DataFrame) -> go.Figure:
    """Time of a step on each rung of the ladder: a mark, and a line from the time of the rung above."""
    rows = rows.sort_values("rung").reset_index(drop=True)
    timed = rows[style.column(rows, "step_seconds").notna()].reset_index(drop=True)
    figure = style.single()
    if timed.empty:
        return figure.update_layout(height=220, title_text="No rung could be timed")
    after = timed["step_seconds"] * 1e3
    before = after.shift(1)
    colors = np.where(before.isna(), MUTED, np.where(after <= before, GREEN, ORANGE))
    for name, kind, was, ms, color in zip(timed["name"], timed["kind"], before, after, colors, strict=True):
        factor, right = "", ms
        if not np.isnan(was):
            figure.path(kind, [was, ms], [name] * 2, color, None, line={"width": 4})
            factor, right = f", {was / ms:.2f} times the speed", max(was, ms)
        place: dict[str, Any] = {"xanchor": "left", "xshift": 10, "align": "left"}
        figure.text(f"{ms:,.4g} ms{factor}", np.log10(right), name, **place)
    hover = "%{y}: %{x:.3g} ms (%{customdata})"
    for (kind, color), part in timed.groupby(["kind", colors]):
        text = timed["change"].fillna("")[part.index]
        figure.dots(kind, after[part.index], part["name"], str(color), hover, customdata=text)
    start, end = float(after.min()) / 1.3, float(after.max()) * 3
    figure.update_xaxes(
        title_text="median step (ms, log scale); green: shorter, orange: longer than the rung above",
        **log_axis([start, end], most=9),
        range=[np.log10(start), np.log10(end)],
    )
    figure.categories(list(timed["name"]))
    best, gain = timed["name"].iloc[int(np.argmin(after))], after.iloc[0] / after.min()
    title = f"From the {timed['name'][0]} to “{best}” a step is {gain:,.1f} times faster"
    return figure.update_layout(showlegend=False, title_text=title)


def operators(rows: pd.DataFrame) -> go.Figure:
    """Own time of the operators of one eager step; of several recorded steps the first is shown."""
    several = [name for name in ("precision", "batch_size") if name in rows and rows[name].nunique() > 1]
    step = {name: rows[name].iloc[0] for name in several}
    for name, value in step.items():
        rows = rows[rows[name] == value]
    figure, hover = style.single(), "%{y}: %{x:.3f} ms in %{customdata:.0f} calls"
    rows = rows.assign(operator=rows["operator"].map(_operator))
    parts = rows.groupby("operator", sort=False)[["seconds", "share", "calls"]].sum().reset_index()
    rows = parts.assign(kind=rows["kind"].iloc[0])
    trace = {"text": rows["share"].map("{:.0%}".format), "textposition": "auto", "customdata": rows["calls"]}
    figure.bars(rows, rows["seconds"] * 1e3, "operator", BLUE, hover, **trace)
    figure.update_xaxes(title_text="own time per step (ms)")
    figure.categories(list(rows["operator"]))
    top = style.extreme(rows[rows["operator"] != "all others"], "seconds")
    title = f"{top['operator']} takes {top['share']:.0%} of a step's own time"
    if several:
        figure.note(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in step.items()))
    return figure.update_layout(title_text=title)


def _operator(name: str) -> str:
    """Return the name of an operator; for a CUDA kernel, its function and its functor."""
    suffix = r"(\w+?)(?:Functor|_kernel_cuda|OptimizerTensorListMetadata)\b"
    functor = re.search(suffix, name.partition("<")[2])
    base = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void "))
    if base.startswith("cutlass::Kernel2<"):
        base, functor = base.partition("<")[2], None
    base = re.split(r"[<(]", base)[0].rpartition("::")[2] or base
    base = f"{base} ({functor[1]})" if functor else base
    return base.removeprefix("aten::").replace("_", " ").strip()[:48]


def claimed_rates(rows: pd.DataFrame) -> go.Figure:
    """Each claimed rate, the rate that its epoch time allows, and the factor between them."""
    rows = rows.assign(claimed=rows["ratio"] * rows["by_clock_per_second"])
    figure = style.single()
    for row in rows.itertuples():
        ends = [row.by_clock_per_second, row.claimed]
        figure.path(str(row.kind), ends, [row.model] * 2, MUTED, None, showlegend=False)
    series = (("allowed by the epoch time", "by_clock_per_second", BLUE), ("claimed", "claimed", ORANGE))
    for name, column, color in series:
        figure.dots(rows, column, "model", color, "%{y}: %{x:,.0f} sequences/s", name=name)
    for row in rows.itertuples():
        figure.text(f"{row.ratio:.1f} times", 1, row.model, xref="paper", xanchor="right", yshift=14)
    figure.categories(list(dict.fromkeys(rows["model"])), row_height=46)
    ticks = log_axis([*rows["claimed"], *rows["by_clock_per_second"]], most=9)
    figure.update_xaxes(title_text="sequences/s (log scale)", **ticks)
    wrong = int((rows["ratio"] > CLOSE).sum())
    title = f"{wrong} of {len(rows)} claimed rates are more than the epoch time allows"
    title += f", by up to {rows['ratio'].max():.1f} times" if wrong else ""
    text = "arithmetic on published figures: the sequences of an epoch over its time; nothing was timed here"
    figure.note(text)
    return figure.update_layout(title_text=title, showlegend=True)


# -- devices side by side: measured solid, predicted hatched, published by others outlined -------------------


def throughput(rows: pd.DataFrame) -> go.Figure:
    """Sequences/s of each size on each device, with the range of each prediction.

    Boards have the open rule. If there are plans, sizes without a plan were measured on CPUs only: they are
    named in a note, not drawn.
    """
    rows = rows[rows["rule"].eq("open") | rows["device"].str.startswith("cpu")]
    rows = rows.drop_duplicates(["size", "device", "kind"], keep="last")
    planned = set(rows.loc[rows["kind"] == "predicted", "size"])
    recorded = [size for size in SIZES if size in set(rows["size"])]
    sizes = [size for size in recorded if not planned or size in planned]
    unplanned = [size for size in recorded if size not in sizes]
    rows, rate = rows[rows["size"].isin(sizes)], "sequences_per_second"
    figure = panels(max(1, len(sizes)), spacing=0.03, shared_yaxes=True, subplot_titles=sizes)
    for column, name in enumerate(sizes, 1):
        for kind, part in rows[rows["size"] == name].groupby("kind"):
            color = BLUE if kind == "measured" else MUTED
            ranged = kind == "predicted" and f"{rate}_low" in part
            trace = {"marker": {"size": 8}, "customdata": part["precision"]}
            trace |= {"error_x": interval(part, rate, color, width=3) if ranged else None}
            hover = f"%{{y}}: %{{x:,.3~g}} sequences/s, %{{customdata}}, {kind}"
            figure.dots(part, rate, "device", color, hover, **trace, **at(1, column))
    figure.update_xaxes(title_text="sequences/s", **log_axis(rows[rate].dropna(), most=4))
    most = max(rows[rate].max(), style.column(rows, f"{rate}_high").max())
    figure.update_xaxes(range=[np.log10(rows[rate].min()) - 0.2, np.log10(most) + 0.3])
    if unplanned:
        figure.note(f"Measured on CPUs alone and not drawn: {', '.join(unplanned)}.")
    look = {"symbol": "square-open", "size": 9, "color": ORANGE, "line": {"width": 2}}
    for run in reference()["throughput"]:  # sequences of an epoch over its time
        if run["source"] == "slides" and (size := _PUBLISHED.get(run["name"])) in sizes:
            hover = f"seed study, {run['name']}, A100, its wall clock: %{{x:,.0f}}/s<extra></extra>"
            values = {"x": [run["sequences"] / run["epoch_seconds"]], "y": ["published"], "mode": "markers"}
            figure.add_scatter(**values, marker=look, hovertemplate=hover, **at(1, sizes.index(size) + 1))
    measured = sorted(set(rows.loc[rows["kind"] == "measured", "device"]))
    named = [device for device in measured if device in hardware.catalogue()]
    named += ["CPUs"] if len(measured) > len(named) else []
    title = f"Measured on {' and '.join(named)}, predicted for everything else"
    title = title if measured else "Predicted rates by device: no size here was measured"
    # CPUs, then boards in the order of the catalogue, then others.
    devices, boards = set(rows["device"]), list(hardware.catalogue())
    cpus = sorted(name for name in devices if name.startswith("cpu"))
    order = [*cpus, *(name for name in boards if name in devices), *sorted(devices - {*cpus, *boards})]
    figure.categories([*order, "published"], _DEVICE_ROW)
    return figure.update_layout(title_text=title, margin={"t": max(120, figure.layout.margin.t or 0)})


# -- a plan: memory and time by part, and the same run on every device; all predicted ------------------------


def parts(plan: Plan) -> go.Figure:
    """Return peak memory by part with the memory of the device, and the step's time by part."""
    total = sum(plan.step.parts.values())
    times = {name: seconds for name, seconds in plan.step.parts.items() if seconds > _LEAST * total}
    remainder = total - sum(times.values())
    times |= {"all else": remainder} if remainder > 0 else {}
    longest = sum(seconds > _LEAST * plan.step.seconds for seconds in plan.step.parts.values()) + 1
    plot = _MEMORY_ROW + _DEVICE_ROW * longest
    share = _MEMORY_ROW / plot
    figure = panels(rows=2, vertical=80 / (plot + 80), legend=True, row_heights=[share, 1 - share])
    for name, size in plan.memory_parts().items():
        label, gib = _NAMES.get(name, name), size / GIB
        look = {"name": f"{label} {gib:.2f}", "marker": {"color": _COLORS[name], "pattern": _HATCH}}
        hover = f"{label}: {gib:.2f} GiB"
        figure.bars("predicted", [gib], ["memory"], _COLORS[name], hover, **look, **at(1, 1))
    if plan.memory_bytes is not None:
        has = plan.memory_bytes / GIB
        figure.add_vline(x=has, line={"color": INK, "width": 2}, **at(1, 1))
        figure.text(f"it has {has:.0f} GiB", has, 1, yref="y domain", yanchor="bottom")
    trace: dict[str, Any] = {"text": [f"{s / total:.0%}" for s in times.values()], "textposition": "outside"}
    trace |= {"cliponaxis": False, "showlegend": False}
    ms = [1e3 * s for s in times.values()]
    figure.bars("predicted", ms, list(times), BLUE, "%{y}: %{x:.3g} ms", **trace, **at(2, 1))
    figure.update_xaxes(title_text="GiB at the peak", rangemode="tozero", **at(1, 1))
    figure.update_xaxes(title_text="ms of a step", rangemode="tozero", **at(2, 1))
    figure.update_yaxes(ticks="", showticklabels=False, **at(1, 1))
    figure.update_yaxes(ticks="", categoryorder="total ascending", dtick=1, **at(2, 1))
    room = "" if plan.fits is None else f", which {'fits' if plan.fits else 'does not fit'}"
    title = f"{plan.peak_bytes / GIB:.2f} GiB at the peak{room}; {style.duration(plan.step.seconds)} a step"
    return figure.update_layout(
        barmode="stack",
        height=plot + 80 + 170,
        title_text=title,
        title_subtitle_text=f"{plan.name}, {plan.precision}: predicted, {plan.basis}",
        legend=_LEGEND,
        margin={"t": 110, "l": 180},
        showlegend=True,
    )


def by_device(rows: pd.DataFrame) -> go.Figure:
    """Return the same run on every device: memory used and available, and an epoch's time.

    `rows` are those of `tables.table`: one for each device and part.
    """
    rows = rows.sort_values(["device", "part"], kind="stable")
    devices = rows.drop_duplicates("device")
    kind = str(devices["kind"].iloc[0])
    boards = [name for name in hardware.catalogue() if name in set(devices["device"])]
    order = [*sorted(set(devices["device"]) - set(boards)), *boards]
    figure = panels(2, spacing=0.05, legend=True, shared_yaxes=True)
    peaks = rows.groupby("device")["bytes"].sum().loc[devices["device"]] / GIB
    figure.dots(kind, list(peaks), devices["device"], GREEN, "%{y}: %{x:.3~g} GiB", name="peak", **at(1, 1))
    has = [hardware.catalogue()[name].memory_bytes / GIB for name in boards]
    look = {"symbol": "line-ns", "size": 16, "line": {"width": 2, "color": INK}}
    hover = "%{y} has %{x:.0f} GiB<extra></extra>"
    trace = {"marker": look, "hovertemplate": hover, "name": "what it has"}
    figure.add_scatter(x=has, y=boards, mode="markers", **trace, **at(1, 1))
    fits = devices["status"].eq("ok")
    for (basis, fit), part in devices.groupby(["basis", fits]):
        color = (BLUE if basis == "validated" else ORANGE) if fit else MUTED
        ends: dict[str, Any] = {"error_x": interval(part, "epoch_seconds", color, thickness=1.5)}
        ends["customdata"], name = part["precision"], f"epoch, {basis}" if fit else "epoch, if it fitted"
        hover = "%{y}, %{customdata}: %{x:,.3g} s"
        figure.dots(part, "epoch_seconds", "device", color, hover, name=name, **ends, **at(1, 2))
    figure.update_xaxes(title_text="GiB at the peak", **log_axis([*peaks, *has]), **at(1, 1))
    ticks = log_axis([*devices["epoch_seconds_low"], *devices["epoch_seconds_high"]])
    figure.update_xaxes(title_text="seconds of an epoch, with the range", **ticks, **at(1, 2))
    figure.categories(order, _DEVICE_ROW)
    first, fit = devices.iloc[0], int(fits[devices["device"].isin(boards)].sum())
    title = f"{first['size']}, batch {first['batch_size']:,}: fits on {fit} of {len(boards)} GPUs, {kind}"
    return figure.update_layout(title_text=title, legend=_LEGEND, margin={"t": 100})
