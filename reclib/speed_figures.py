"""Figures of speed: pure functions from a table of records to a `go.Figure`, as in `figures`."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import yaml
from plotly.subplots import make_subplots

from reclib import paths
from reclib.look import BLUE, DECADES, GREEN, HEIGHT, MUTED, ORANGE, PALETTE, TEMPLATE, bar, line, marker

ROW_HEIGHT = 34  # pixels of a row of a categorical axis


def step_time(rows: pd.DataFrame) -> go.Figure:
    """Median step with quartiles, and peak memory, by precision, compile mode and batch size."""
    rows = rows.sort_values(["batch_size", "precision", "compile_mode"], kind="stable")
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
            error_x={
                "symmetric": False,
                "array": (part["step_seconds_high"] - part["step_seconds"]) * 1e3,
                "arrayminus": (part["step_seconds"] - part["step_seconds_low"]) * 1e3,
                "color": color,
            },
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
    for name, status in zip(names[~timed], rows["status"][~timed], strict=True):
        said = "out of memory" if status == "oom" else str(status)
        figure.add_annotation(
            x=0, y=name, text=said, xanchor="left", showarrow=False, font={"color": MUTED}, row=1, col=1
        )
    figure.update_xaxes(title_text="median step, bar: quartiles (ms)", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="peak of tensors in a step (MiB)", rangemode="tozero", row=1, col=2)
    order = list(dict.fromkeys(names))
    figure.update_yaxes(
        categoryorder="array", categoryarray=order, range=[len(order) - 0.5, -0.5], ticks="", type="category"
    )
    best = _extreme(rows, "sequences_per_second") if timed.any() else None
    title = "No variant could be timed"
    if best is not None:
        title = f"Fastest: {_said(best)} with {best['sequences_per_second']:,.0f} sequences/s"
    return figure.update_layout(height=_height(len(order)), title_text=title)


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
        **DECADES | {"tickformat": None},
        range=[np.log10(start), np.log10(float(after.max()) * 3)],
    )
    figure.update_yaxes(categoryorder="array", categoryarray=list(timed["name"])[::-1], ticks="")
    gain = after.iloc[0] / after.min()
    best = timed["name"].iloc[int(np.argmin(after))]
    return figure.update_layout(
        height=_height(len(timed)),
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
    figure.update_yaxes(autorange="reversed", ticks="")
    named = rows[rows["operator"] != "all others"]
    top = _extreme(named, "seconds")
    return figure.update_layout(
        height=_height(len(rows)),
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
    figure.update_yaxes(title_text=f"relative difference to {names[0]}", tickformat=".2%", row=1, col=2)
    title = f"Losses of {', '.join(names)} differ by at most {worst:.2%}"
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
        title_text="sequences/s (log scale); another device, size and data than here", type="log"
    )
    figure.update_yaxes(autorange="reversed", ticks="")
    worst = (runs["claimed_per_second"] / by_clock).max()
    return figure.update_layout(
        height=HEIGHT + 70,
        margin={"b": 130},
        showlegend=True,
        title_text=f"The seed study's rates are up to {worst:.1f} times what its epochs took",
    )


def reference() -> dict[str, Any]:
    """Return the seed study's published figures, with their sources and what is wrong in them."""
    file = paths.params() / "published" / "seed_study.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _variant(rows: pd.DataFrame) -> pd.Series:
    return rows.apply(_said, axis=1)


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


def _height(rows: int) -> int:
    return max(HEIGHT - 60, 170 + ROW_HEIGHT * rows)


def _nothing(figure: go.Figure, said: str, kind: str = "measured") -> go.Figure:
    """Return a figure that says why it is empty."""
    figure.add_scatter(x=[], y=[], line=line(kind, BLUE))
    figure.update_xaxes(title_text="steps")
    figure.update_yaxes(title_text="seconds")
    return figure.update_layout(height=220, title_text=said, showlegend=False)


# The name of the records that each is made of, and the figure.
FIGURES: list[tuple[str, Callable[[pd.DataFrame], go.Figure]]] = [
    ("step", step_time),
    ("ladder", step_ladder),
    ("operators", operators),
    ("step", compile_cost),
    ("loss_curve", loss_parity),
    ("step", published_rates),
]
