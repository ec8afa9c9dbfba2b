"""Figures of a prepared dataset: preparation, lengths, popularity, ties, time, cold starts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib.report import style
from reclib.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PALETTE, at, log_axis, panels, single, texts

_STEPS = {"train": "training", "valid": "validation targets", "test": "test targets"}


def preparation(rows: pd.DataFrame) -> go.Figure:
    """Interactions, users and items after each step of the preparation."""
    figure = panels(3, spacing=0.06, shared_yaxes=True)
    steps = rows["step"].replace(_STEPS)
    for column, counted in enumerate(["interactions", "users", "items"], 1):
        hover, look = f"%{{y}}: %{{x:,}} {counted}", texts(rows[counted], "{:,}", "auto")
        figure.bars(rows, counted, steps, PALETTE[column - 1], hover, **look, **at(1, column))
        figure.update_xaxes(title_text=counted, rangemode="tozero", nticks=4, **at(1, column))
    figure.update_yaxes(autorange="reversed")
    first, core = (rows[rows["step"] == step].iloc[0] for step in ("source", "k-core"))
    share, dropped = core["interactions"] / first["interactions"], first["items"] - core["items"]
    title = f"The k-core keeps {share:.1%} of interactions and drops {dropped:,} of {first['items']:,} items"
    if share == 1:
        title = f"Nothing was removed: all {core['interactions']:,} interactions are in the k-core"
    return figure.update_layout(title_text=title)


def sequence_lengths(rows: pd.DataFrame) -> go.Figure:
    """Histogram of users by their number of interactions, on a logarithmic scale."""
    low, high = rows["length"].min(), rows["length"].max()
    edges = np.unique(np.round(np.geomspace(low, high + 1, 25)).astype(int))
    counts, _ = np.histogram(rows["length"], edges, weights=rows["users"])
    spans = [f"{a} to {b - 1}" for a, b in pairwise(edges)]
    figure = single()
    middle, hover = np.sqrt(edges[:-1] * edges[1:]), "%{customdata} interactions: %{y} users"
    look: dict[str, Any] = {"orientation": None, "width": np.diff(edges) * 0.92, "customdata": spans}
    figure.bars(rows, middle, counts, BLUE, hover, **look)
    for name, anchor, shift in (("median", "right", -6), ("mean", "left", 6)):
        value = rows[f"{name}_length"].iloc[0]
        figure.add_vline(value, line={"color": ORANGE, "width": 2, "dash": "dot"})
        place = {"yref": "paper", "xanchor": anchor, "xshift": shift}
        figure.text(f"{name} {value:,.0f}", np.log10(value), 1, ORANGE, **place)
    figure.update_xaxes(title_text="interactions of a user (log scale)", **log_axis(edges, most=9))
    figure.update_yaxes(title_text="users")
    half, most = rows["median_length"].iloc[0], rows["max_length"].iloc[0]
    title = f"Half of the users have at most {half:,.0f} interactions, one has {most:,}"
    return figure.update_layout(title_text=title)


def item_popularity(rows: pd.DataFrame) -> go.Figure:
    """Interactions by popularity rank, and the share that the most popular items hold."""
    figure = panels(2)
    left, right = at(1, 1), at(1, 2)
    hover = "rank %{x:,}: %{y:,} interactions"
    figure.path(rows, "rank", "interactions", BLUE, hover, **left)
    items, shares = ([0.0, *rows[f"{unit}_share"]] for unit in ("item", "interaction"))
    hover, tint = "top %{x:.1%} of items: %{y:.1%}", "rgba(0,114,178,0.10)"
    figure.path(rows, items, shares, BLUE, hover, fill="tozeroy", fillcolor=tint, **right)
    equal = {"color": MUTED, "width": 1, "dash": "dot"}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=equal, hoverinfo="skip", **right)
    figure.text("all items equal", 0.62, 0.5, MUTED, **right)
    for update, name, of_rank, of_share in (
        (figure.update_xaxes, "rank", "popularity rank", "share of items, most popular first"),
        (figure.update_yaxes, "interactions", "interactions", "share of interactions"),
    ):
        update(**log_axis(rows[name]), **left)
        update(title_text=f"{of_rank} (log scale)", **left)
        update(tickformat=".0%", range=[0, 1], **right)
        update(title_text=of_share, **right)
    tenth, gini = rows["top_tenth_share"].iloc[0], rows["gini"].iloc[0]
    title = f"A tenth of the items holds {tenth:.0%} of the interactions (Gini {gini:.2f})"
    return figure.update_layout(title_text=title)


def last_items(rows: pd.DataFrame) -> go.Figure:
    """Users by the number of items at the last timestamp of their history."""
    most, share = rows["candidates"].max(), rows["users"] / rows["users"].sum()
    cut = rows["most_candidates"].iloc[0] > most
    names = [f"{n} or more" if cut and n == most else str(n) for n in rows["candidates"]]
    colors = [MUTED if n == 1 else BLUE for n in rows["candidates"]]
    figure = single()
    look: dict[str, Any] = {"orientation": None, "marker": {"color": colors}, "customdata": rows["users"]}
    hover = "%{x} items: %{customdata:,} users (%{y:.2%})"
    figure.bars(rows, names, share, BLUE, hover, **look, **texts(share, "{:.1%}"))
    figure.update_xaxes(title_text="items that share the last timestamp of a history", type="category")
    figure.update_yaxes(title_text="share of evaluated users", tickformat=".0%", rangemode="tozero")
    ruled = rows["last_item_by_tie_rule_share"].iloc[0]
    return figure.update_layout(title_text=f"For {ruled:.1%} of the users the tie rule chooses the last item")


def interactions_over_time(rows: pd.DataFrame) -> go.Figure:
    """Interactions over time, first occurrences of users and items, and starts of validation and test."""
    figure = panels(rows=2, vertical=0.07, shared_xaxes=True, legend=True)
    above, below = at(1, 1), at(2, 1)
    counts, look = rows["interactions"], {"orientation": None, "showlegend": False}
    figure.bars(rows, "start", counts, BLUE, "from %{x}: %{y:,} interactions", **look, **above)
    for name, color in (("users", ORANGE), ("items", GREEN)):
        share = rows[f"new_{name}"].cumsum() / rows[f"new_{name}"].sum()
        hover = f"by the end of the span from %{{x}}: %{{y:.1%}} of {name}"
        figure.path(rows, "start", share, color, hover, name=f"{name} met so far", **below)
    for part, name, side in (("valid", "validation", "right"), ("test", "test", "left")):
        if f"{part}_from" in rows:  # of the split by global time
            point = pd.Timestamp(rows[f"{part}_from"].iloc[0], unit="s")
            for row in (above, below):
                figure.add_vline(point, line={"color": INK, "width": 1, "dash": "dot"}, **row)
            place: dict[str, Any] = {"yref": "y domain", "yanchor": "bottom", "xanchor": side}
            figure.text(name, point, 1.0, font={"color": INK, "size": 12}, **place, **above)
    figure.update_yaxes(title_text="interactions", **above)
    figure.update_yaxes(title_text="share of all", tickformat=".0%", range=[0, 1.02], **below)
    figure.update_xaxes(title_text="time (UTC)", nticks=5, tickangle=0, **below)
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    days = rows["days"].iloc[0]
    span = f"{days / 365.25:,.1f} years" if days > 730 else f"{days:,.0f} days"
    span = f"{24 * days:,.1f} hours" if days < 2 else span
    busiest = f"the busiest of {len(rows)} spans has {counts.max() / counts.sum():.1%} of them"
    return figure.update_layout(height=520, legend=legend, title_text=f"{span} of interactions; {busiest}")


def cold_start(rows: pd.DataFrame) -> go.Figure:
    """Share of test rows whose target item or user is not in training, by split."""
    rows = rows[rows["part"] == "test"]
    splits = rows["split"].map(lambda text: style.broken(text, 20))
    figure = single()
    for unit, name, color in (("item", "target item", BLUE), ("user", "user", ORANGE)):
        share, hover = rows[f"unseen_{unit}_share"], "%{x:.2%} of %{customdata:,} test rows"
        look = {"name": f"{name} never trained on", "customdata": rows["rows"]}
        figure.bars(rows, share, splits, color, hover, **look, **texts(share, "{:.1%}"))
    figure.update_xaxes(title_text="share of test rows", tickformat=".0%", range=[0, 1.08])
    figure.update_yaxes(autorange="reversed", ticks="")
    worst = rows.iloc[int(rows["unseen_item_share"].argmax())]
    title = "No split asks for an item that training never saw"
    if share := worst["unseen_item_share"]:
        title = f"Up to {share:.1%} of test targets are items that training never saw ({worst['split']})"
    return figure.update_layout(title_text=title)
