"""Figures of speed: pure functions from a table of records to a `go.Figure`, as in `figures`."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib import hardware
from reclib.cost import planner
from reclib.cost.planner import Plan
from reclib.hardware import GIB
from reclib.records import reference
from reclib.report import style
from reclib.report.style import (
    BLUE,
    GREEN,
    HEIGHT,
    INK,
    MUTED,
    ORANGE,
    PALETTE,
    TEMPLATE,
    bar,
    categories,
    interval,
    line,
    log_axis,
    marker,
    note,
    sentence,
    words_beside,
)


def step_time(rows: pd.DataFrame) -> go.Figure:
    """Median step with quartiles, and peak memory, by precision, compile mode and batch size."""
    rows = rows.sort_values(["batch_size", "precision", "compile_mode"], kind="stable")
    absent, rows = rows[rows["status"] == "not applicable"], rows[rows["status"] != "not applicable"]
    names = _variant(rows)
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.06)
    figure.update_layout(template=TEMPLATE, showlegend=False)
    seconds = _column(rows, "step_seconds")
    timed = seconds.notna()
    for (kind, _), part in rows[timed].groupby(["kind", "batch_size"]):
        color = PALETTE[sorted(rows["batch_size"].unique()).index(part["batch_size"].iloc[0]) % len(PALETTE)]
        figure.add_scatter(
            x=part["step_seconds"] * 1e3,
            y=names[part.index],
            mode="markers",
            marker=marker(str(kind), color),
            error_x=interval(part, "step_seconds", color, 1e3),
            customdata=part["sequences_per_second"],
            hovertemplate="%{y}: %{x:.2f} ms, %{customdata:,.0f} sequences/s<extra></extra>",
            row=1,
            col=1,
        )
        figure.add_bar(
            x=_memory(part) / 2**20,
            y=names[part.index],
            orientation="h",
            marker=bar(str(kind), color),
            hovertemplate="%{y}: %{x:,.0f} MiB<extra></extra>",
            row=1,
            col=2,
        )
    words_beside(figure, names[~timed], rows["status"][~timed].replace("oom", "out of memory").astype(str))
    figure.update_xaxes(title_text="median step, bar: quartiles (ms)", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="peak of tensors in a step (MiB)", rangemode="tozero", row=1, col=2)
    categories(figure, list(dict.fromkeys(names)))
    if len(absent):
        note(figure, f"not applicable on this device: {'; '.join(dict.fromkeys(_variant(absent)))}")
    best = _extreme(rows, "sequences_per_second") if timed.any() else None
    title = "No variant could be timed"
    if best is not None:
        title = f"Fastest: {_said(best)} with {best['sequences_per_second']:,.0f} sequences/s"
    return figure.update_layout(title_text=title)


def step_ladder(rows: pd.DataFrame) -> go.Figure:
    """A waterfall from the seed study's step to the last rung, on a logarithmic scale: length is factor."""
    rows = rows.sort_values("rung").reset_index(drop=True)
    timed = rows[_column(rows, "step_seconds").notna()].reset_index(drop=True)
    figure = go.Figure(layout={"template": TEMPLATE})
    if timed.empty:
        return _nothing(figure, "No rung could be timed")
    after = timed["step_seconds"] * 1e3
    before = after.shift(1)
    colors = np.where(before.isna(), MUTED, np.where(after <= before, GREEN, ORANGE))
    start = float(after.min()) / 2  # a logarithmic axis has no zero to stand on
    base = before.fillna(start)
    factor = (before / after).map(lambda x: "" if np.isnan(x) else f"{x:.2f} times the speed")
    for kind in timed["kind"].unique():
        mine = timed["kind"] == kind
        for color in dict.fromkeys(colors[mine]):
            chosen = mine & (colors == color)
            figure.add_bar(
                base=base[chosen],
                x=(after - base)[chosen],
                y=timed["name"][chosen],
                orientation="h",
                customdata=np.stack([after[chosen], timed["change"][chosen].fillna("")], 1),
                hovertemplate="%{y}: %{customdata[0]:.3g} ms (%{customdata[1]})<extra></extra>",
                marker=bar(str(kind), str(color)),
            )
    ends = np.maximum(base, after)  # on the right of each bar: on the left stand the names
    for name, ms, said, end in zip(timed["name"], after, factor, ends, strict=True):
        text = f"{ms:,.4g} ms  {said}"
        figure.add_annotation(x=np.log10(end), y=name, text=text, xanchor="left", showarrow=False)
    figure.update_xaxes(
        title_text="median step (ms, log scale); green: shorter, orange: longer than the rung above",
        **log_axis([start, 3 * float(after.max())], most=9),
        range=[np.log10(start), np.log10(float(after.max()) * 3)],
    )
    categories(figure, list(timed["name"]))
    gain = after.iloc[0] / after.min()
    best = timed["name"].iloc[int(np.argmin(after))]
    return figure.update_layout(
        showlegend=False,
        barmode="overlay",
        title_text=f"From the {timed['name'][0]} to “{best}” a step is {gain:,.1f} times faster",
    )


def operators(rows: pd.DataFrame) -> go.Figure:
    """Own time of the operators of one eager step."""
    figure = go.Figure(
        go.Bar(
            x=rows["seconds"] * 1e3,
            y=rows["operator"],
            orientation="h",
            text=rows["share"].map("{:.0%}".format),
            textposition="auto",
            customdata=rows["calls"],
            hovertemplate="%{y}: %{x:.3f} ms in %{customdata:.0f} calls<extra></extra>",
            marker=bar(rows["kind"].iloc[0], BLUE),
        ),
        layout={"template": TEMPLATE},
    )
    figure.update_xaxes(title_text="own time per step (ms)")
    categories(figure, list(rows["operator"]))
    top = _extreme(rows[rows["operator"] != "all others"], "seconds")
    return figure.update_layout(
        title_text=f"{top['operator']} takes {top['share']:.0%} of a step's own time",
    )


def compile_cost(rows: pd.DataFrame) -> go.Figure:
    """Seconds by steps done, eager and compiled: where the lines cross, compiling has paid."""
    figure = go.Figure(layout={"template": TEMPLATE})
    timed = rows[_column(rows, "step_seconds").notna()]
    compiled = timed[timed["ran_compile_mode"] != "off"] if len(timed) else timed
    if compiled.empty:
        return _nothing(figure, "Nothing was compiled on this device", rows["kind"].iloc[0])
    one = _extreme(compiled, "step_seconds", -1)
    same = timed[(timed["precision"] == one["precision"]) & (timed["batch_size"] == one["batch_size"])]
    pays = _column(same, "break_even_steps").dropna()
    last = max(100.0, 2 * pays.max()) if len(pays) else 5 * one["compile_seconds"] / one["step_seconds"]
    steps = np.linspace(0, last, 50)
    for number, (_, row) in enumerate(same.iterrows()):
        figure.add_scatter(
            x=steps,
            y=row["compile_seconds"] + steps * row["step_seconds"],
            mode="lines",
            line=line(row["kind"], PALETTE[number % len(PALETTE)]),
            name="eager" if row["ran_compile_mode"] == "off" else f"compiled, {row['compile_mode']}",
            hovertemplate="%{x:,.0f} steps: %{y:.1f} s<extra></extra>",
        )
    figure.update_xaxes(title_text="steps", rangemode="tozero")
    figure.update_yaxes(title_text="seconds, compiling included", rangemode="tozero")
    title = f"Compiling costs {one['compile_seconds']:.0f} s and never pays here"
    if len(pays):
        title = f"Compiling costs {one['compile_seconds']:.0f} s and has paid after {pays.min():,.0f} steps"
    return figure.update_layout(showlegend=True, title_text=title)


def loss_parity(rows: pd.DataFrame) -> go.Figure:
    """Loss of the same steps in each precision, and its difference to the first."""
    figure = make_subplots(cols=2, horizontal_spacing=0.14).update_layout(template=TEMPLATE)
    names = list(dict.fromkeys(rows.sort_values("number")["precision"]))
    reference = rows[rows["precision"] == names[0]].set_index("step")["loss"]
    worst = 0.0
    for number, name in enumerate(names):
        mine = rows[rows["precision"] == name]
        gap = mine["loss"].to_numpy() / reference[mine["step"]].to_numpy() - 1
        worst = max(worst, float(np.abs(gap).max()))
        for column, y in enumerate((mine["loss"], gap), 1):
            figure.add_scatter(
                x=mine["step"],
                y=y,
                mode="lines+markers",
                line=line(str(mine["kind"].iloc[0]), PALETTE[number % len(PALETTE)]),
                marker={"size": 5},
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                hovertemplate="step %{x}: %{y:.5g}<extra></extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(title_text="optimiser step")
    figure.update_yaxes(title_text="cross-entropy per target (nats)", row=1, col=1)
    figure.update_yaxes(title_text=f"relative difference to {names[0]}", tickformat=".1~e", row=1, col=2)
    size = f"{worst:.2%}" if worst >= 1e-4 else f"{worst:.1e} of their size"
    title = f"Losses of {', '.join(names)} differ by at most {size}"
    return figure.update_layout(
        showlegend=True, title_text=title if len(names) > 1 else f"Loss in {names[0]}"
    )


def published_rates(rows: pd.DataFrame) -> go.Figure:
    """The seed study's published rates beside what its own epoch times allow, and the best rate here."""
    published = reference()
    runs = pd.DataFrame(published["throughput"])
    by_clock = runs["sequences"] / runs["epoch_seconds"]
    figure = go.Figure(layout={"template": TEMPLATE})
    cross = {"symbol": "x-thin", "size": 11, "line": {"color": ORANGE, "width": 2}}
    hollow = {"symbol": "diamond-open", "size": 11, "color": MUTED, "line": {"color": MUTED, "width": 2}}
    series = (("published rate", runs["claimed_per_second"], cross), ("its wall clock", by_clock, hollow))
    for name, values, look in series:
        figure.add_scatter(
            x=values,
            y=runs["name"] + f" ({published['device']})",
            mode="markers",
            marker=look,
            name=f"seed study, {name}",
            customdata=runs["source"],
            hovertemplate="%{y}: %{x:,.0f} sequences/s (%{customdata})<extra></extra>",
        )
    timed = rows[_column(rows, "sequences_per_second").notna()]
    if len(timed):
        best = _extreme(timed, "sequences_per_second")
        figure.add_scatter(
            x=[best["sequences_per_second"]],
            y=[f"here: {best['label']}"],
            mode="markers",
            marker=marker(best["kind"], BLUE),
            name=f"{best['kind']} here, {_said(best)}",
            hovertemplate="%{y}: %{x:,.0f} sequences/s<extra></extra>",
        )
    figure.add_annotation(
        text="<br>".join(wrap(published["throughput_wrong"].strip(), 120)),
        **{"xref": "paper", "x": 0, "xanchor": "left", "yref": "paper", "y": -0.26, "yanchor": "top"},
        align="left",
        showarrow=False,
        font={"color": MUTED, "size": 12},
    )
    figure.update_xaxes(
        title_text="sequences/s (log scale); another device, size and data than here",
        **log_axis([*runs["claimed_per_second"], *by_clock, *_column(timed, "sequences_per_second")], most=9),
    )
    figure.update_yaxes(autorange="reversed", ticks="")
    worst = (runs["claimed_per_second"] / by_clock).max()
    return figure.update_layout(
        height=HEIGHT + 70,
        margin={"b": 130},
        showlegend=True,
        title_text=f"The seed study's rates are up to {worst:.1f} times what its epochs took",
    )


def _variant(rows: pd.DataFrame) -> pd.Series:
    return rows.apply(_said, axis=1) if len(rows) else pd.Series([], dtype=object)


def _said(row: pd.Series) -> str:
    mode = "eager" if row["compile_mode"] == "off" else row["compile_mode"]
    return f"{row['precision']}, {mode}, batch {row['batch_size']}"


def _memory(rows: pd.DataFrame) -> pd.Series:
    return _column(rows, "peak_tensor_bytes").fillna(_column(rows, "peak_memory_bytes"))


def _column(rows: pd.DataFrame, name: str) -> pd.Series:
    found = rows[name] if name in rows else pd.Series(np.nan, rows.index)
    return pd.to_numeric(found)


def _extreme(rows: pd.DataFrame, name: str, sign: int = 1) -> pd.Series:
    """Return the row with the largest value, with the smallest for sign -1."""
    return rows.iloc[int(np.nanargmax(sign * _column(rows, name).to_numpy()))]


def _nothing(figure: go.Figure, said: str, kind: str = "measured") -> go.Figure:
    """Return a figure that says why it is empty."""
    figure.add_scatter(x=[], y=[], line=line(kind, BLUE))
    figure.update_xaxes(title_text="steps")
    figure.update_yaxes(title_text="seconds")
    return figure.update_layout(height=220, title_text=said, showlegend=False)


# ------------------------------------------------------------------------------------------------
# Figures of devices side by side: measured solid, predicted hatched, published by others outlined.

DEVICE_ROW_HEIGHT = 26  # pixels of a device

SIZES = ("nano", "tiny", "small", "medium", "5m", "85m", "130m", "430m")

_PUBLISHED = {"85 M": "85m", "130 M": "130m", "429 M": "430m"}  # by its wall clock, from the slides


def device_order(rows: pd.DataFrame) -> list[str]:
    """Return the devices that rows are of: CPUs first, then the catalogue's, as it lists them."""
    there = set(rows["device"])
    cpus = sorted(name for name in there if str(name).startswith("cpu"))
    known = [name for name in hardware.catalogue() if name in there]
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
    figure, order = _device_panels(rows, "sequences_per_second", 1, "sequences/s")
    for column, size in enumerate(_sizes(rows), 1):
        for name, rate in _published(size):
            figure.add_scatter(
                **{"x": [rate], "y": ["published"], "mode": "markers", "row": 1, "col": column},
                marker={"symbol": "square-open", "size": 9, "color": ORANGE, "line": {"width": 2}},
                hovertemplate=f"seed study, {name}, A100, its wall clock: %{{x:,.0f}}/s<extra></extra>",
            )
    best = rows[rows["kind"] == "measured"]
    title = "Predicted rates by device: nothing was measured here"
    if len(best):
        title = f"Measured on {', '.join(sorted(set(best['device'])))}, predicted for everything else"
    return _finish(figure, [*order, "published"], title)


def memory_by_size(rows: pd.DataFrame) -> go.Figure:
    """Peak memory of each size, and what each device has."""
    rows = closed_or_measured(named(rows))
    figure, order = _device_panels(rows, "peak_memory_bytes", GIB, "GiB")
    boards = [name for name in order if name in hardware.catalogue()]
    has = [hardware.catalogue()[name].memory_bytes / GIB for name in boards]
    for column, _ in enumerate(_sizes(rows), 1):
        figure.add_scatter(
            **{"x": has, "y": boards, "mode": "markers", "row": 1, "col": column},
            marker={"symbol": "line-ns", "size": 14, "line": {"width": 2, "color": ORANGE}},
            hovertemplate="%{y} has %{x:.0f} GiB<extra></extra>",
        )
    figure.update_xaxes(**log_axis([0.3, 150], most=4), range=list(np.log10([0.3, 200])))
    return _finish(figure, order, "Peak memory: a mark left of the device's orange line fits")


def roofline(rows: pd.DataFrame) -> go.Figure:
    """FLOP/s over FLOPs per byte moved: each device's roof, and the steps under it."""
    figure = go.Figure(layout={"template": TEMPLATE})
    rows = named(rows)
    rows = rows[rows["rule"].fillna("closed").eq("open") | rows["device"].astype(str).str.startswith("cpu")]
    rows = rows[rows["bytes_moved"].notna()] if "bytes_moved" in rows else rows.iloc[:0]
    for number, name in enumerate(device_order(rows)):
        color, measured = PALETTE[number % len(PALETTE)], name in planner.cpus()
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
    if name in planner.cpus():
        rates = planner.cpus()[name].rates
        return max(rates["product fp32"].values()), rates["bandwidth"]
    board = hardware.catalogue().get(name)
    return None if board is None else (board.peaks[board.precision()], board.bandwidth)


def _roof_title(rows: pd.DataFrame) -> str:
    boards = rows[rows["device"].isin(list(hardware.catalogue()))]
    if boards.empty:
        return ""
    ridge = boards["device"].map(lambda name: _ridge(hardware.catalogue()[name]))
    left = (boards["flops"] / boards["bytes_moved"] < ridge).sum()
    return f"{left} of {len(boards)} predicted steps lie left of the ridge: bandwidth limits them first"


def _ridge(board: hardware.Board) -> float:
    return board.peaks[board.precision()] / board.bandwidth


def technique_gains(rows: pd.DataFrame) -> go.Figure:
    """How many times faster each technique makes a step, by device and size, measured and predicted."""
    rows = named(rows)
    names = list(dict.fromkeys(rows["technique"]))
    rows = rows[rows["size"].isin(SIZES)]
    sizes, order = _sizes(rows), device_order(rows)
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
    best = [part.iloc[int(part["speedup"].argmax())] for _, part in rows.groupby("kind")]
    title = "; ".join(
        f"{row['kind']}: up to {row['speedup']:.1f} times the speed, by {row['technique']} ({row['device']})"
        for row in best
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


def _sizes(rows: pd.DataFrame) -> list[str]:
    return [size for size in SIZES if size in set(rows["size"])]


def _device_panels(rows: pd.DataFrame, metric: str, unit: float, title: str) -> tuple[go.Figure, list[str]]:
    """Return a panel for each size with a mark for each device, on one logarithmic axis, and the devices."""
    sizes = _sizes(rows)
    figure = make_subplots(
        cols=max(1, len(sizes)), shared_yaxes=True, subplot_titles=sizes, horizontal_spacing=0.03
    ).update_layout(template=TEMPLATE, showlegend=False)
    for column, size in enumerate(sizes, 1):
        for kind, part in rows[rows["size"] == size].groupby("kind"):
            color = BLUE if kind == "measured" else MUTED
            ranged = kind == "predicted" and f"{metric}_low" in part
            figure.add_scatter(
                **{"x": part[metric] / unit, "y": part["device"], "mode": "markers", "row": 1, "col": column},
                marker=marker(str(kind), color) | {"size": 8},
                error_x=interval(part, metric, color, 1 / unit, width=3) if ranged else None,
                customdata=part["precision"],
                hovertemplate=f"%{{y}}: %{{x:,.3~g}} {title}, %{{customdata}}, {kind}<extra></extra>",
            )
    values = rows[metric].dropna() / unit
    figure.update_xaxes(title_text=title, **log_axis(values, most=4))
    figure.update_xaxes(range=[np.log10(values.min()) - 0.2, np.log10(values.max()) + 0.3])
    return figure, device_order(rows)


def _published(size: str) -> list[tuple[str, float]]:
    """Return what others published of a size: sequences of an epoch over its time."""
    runs = reference()["throughput"]
    return [
        (run["name"], run["sequences"] / run["epoch_seconds"])
        for run in runs
        if _PUBLISHED.get(run["name"]) == size and run["source"] == "slides"
    ]


def _finish(figure: go.Figure, order: list[str], title: str) -> go.Figure:
    categories(figure, order, DEVICE_ROW_HEIGHT)
    return figure.update_layout(title_text=title, margin={"t": 120})


# ------------------------------------------------------------------------------------------------
# Figures of a plan: where its memory and its time go, and the same run on every device. All predicted.

_MEMORY_HEIGHT = 60  # pixels of the bar of memory

_PARTS = ("weights", "16-bit weights", "gradients", "optimizer", "activations", "logits")

_COLORS = dict(zip(_PARTS, PALETTE, strict=True)) | {planner.RUN: MUTED}

_SAID = {"optimizer": "optimiser", planner.RUN: "no tensors"}  # interpreter and libraries, or CUDA's context

_BESIDE = {"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top", "traceorder": "normal"}

_LEAST = 0.01  # share of a step below which a part is no row of its own


def parts(found: Plan) -> go.Figure:
    """Return the peak of memory by part against what the device has, and the step's time by part."""
    longest = sum(seconds > _LEAST * found.step.seconds for seconds in found.step.parts.values()) + 1
    plot = _MEMORY_HEIGHT + DEVICE_ROW_HEIGHT * longest
    share = _MEMORY_HEIGHT / plot
    figure = make_subplots(rows=2, row_heights=[share, 1 - share], vertical_spacing=80 / (plot + 80))
    figure.update_layout(template=TEMPLATE)
    for name, size in planner.memory_parts(found).items():
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
    title = f"{found.peak_bytes / GIB:.2f} GiB at the peak{room}; {style.duration(found.step.seconds)} a step"
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

    `rows` are those of `planner.table`, or of the records: one for each device and part.
    """
    rows = rows.sort_values(["device", "part"], kind="stable")
    one = rows.drop_duplicates("device")
    kind = str(one["kind"].iloc[0])
    order = [name for name in hardware.catalogue() if name in set(one["device"])]
    order = [*sorted(set(one["device"]) - set(order)), *order]
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.05)
    figure.update_layout(template=TEMPLATE)
    for name in (*_PARTS, planner.RUN):
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
    has = [name for name in order if name in hardware.catalogue()]
    figure.add_scatter(
        x=[hardware.catalogue()[name].memory_bytes / GIB for name in has],
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
    ends = [*one["epoch_seconds_low"], *one["epoch_seconds_high"]]
    figure.update_xaxes(title_text="seconds of an epoch, with the range", **log_axis(ends), row=1, col=2)
    categories(figure, order, DEVICE_ROW_HEIGHT)
    first = one.iloc[0]
    boards = one[one["device"].isin(has)]
    fit = int(boards["status"].eq("ok").sum())
    title = f"{first['size']}, batch {first['batch_size']:,}: fits on {fit} of {len(boards)} GPUs, {kind}"
    return figure.update_layout(
        barmode="stack",
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
            error_x=interval(part, "epoch_seconds", color) | {"thickness": 1.5},
            customdata=part["precision"],
            hovertemplate="%{y}, %{customdata}: %{x:,.3g} s<extra></extra>",
            row=1,
            col=2,
        )


# ------------------------------------------------------------------------------------------------
# Figures of the audit: pure functions from a table of records to a `go.Figure`, as in `figures`.

CLOSE = 1.05  # a claim is met within 5 %, as in `audit`


def claimed_rates(rows: pd.DataFrame) -> go.Figure:
    """Each claimed rate beside what its own epoch time allows, and the factor between them."""
    rows = rows.assign(claimed=rows["ratio"] * rows["by_clock_per_second"])
    figure = go.Figure(layout={"template": TEMPLATE})
    for row in rows.itertuples():
        figure.add_scatter(
            x=[row.by_clock_per_second, row.claimed],
            y=[row.model, row.model],
            mode="lines",
            line=line(str(row.kind), MUTED),
            showlegend=False,
            hoverinfo="skip",
        )
    series = (("allowed by the epoch time", "by_clock_per_second", BLUE), ("claimed", "claimed", ORANGE))
    for name, column, color in series:
        figure.add_scatter(
            x=rows[column],
            y=rows["model"],
            mode="markers",
            marker=marker(str(rows["kind"].iloc[0]), color),
            name=name,
            hovertemplate="%{y}: %{x:,.0f} sequences/s<extra></extra>",
        )
    for row in rows.itertuples():
        said = f"{row.ratio:.1f} times"
        figure.add_annotation(
            x=1, xref="paper", xanchor="right", y=row.model, text=said, showarrow=False, yshift=14
        )
    categories(figure, list(dict.fromkeys(rows["model"])), row_height=46)
    figure.update_xaxes(
        title_text="sequences/s (log scale)",
        **log_axis([*rows["claimed"], *rows["by_clock_per_second"]], most=9),
    )
    wrong = int((rows["ratio"] > CLOSE).sum())
    title = f"{wrong} of {len(rows)} claimed rates are more than the epoch time allows"
    if wrong:
        title += f", by up to {rows['ratio'].max():.1f} times"
    note(
        figure,
        "arithmetic on published figures: the sequences of an epoch over its time; nothing was timed here",
    )
    return figure.update_layout(title_text=title, showlegend=True)
