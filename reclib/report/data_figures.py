"""Figures of a prepared dataset: what was kept, lengths, popularity, repeats, ties, time, cold starts.

Pure functions from a table of records to a `go.Figure`, as in `figures`.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib.report.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PALETTE,
    TEMPLATE,
    bar,
    line,
    log_axis,
    panels,
)


def preparation(rows: pd.DataFrame) -> go.Figure:
    """Interactions, users and items after each step of the preparation."""
    names = {"source": "source", "de-duplicated": "de-duplicated", "k-core": "k-core", "train": "training"}
    names |= {"valid": "validation targets", "test": "test targets"}
    first, core = (rows[rows["step"] == step].iloc[0] for step in ("source", "k-core"))
    figure = panels(3, shared_yaxes=True, spacing=0.06)
    for column, counted in enumerate(["interactions", "users", "items"], 1):
        figure.add_bar(
            x=rows[counted],
            y=rows["step"].map(names),
            orientation="h",
            text=rows[counted].map("{:,}".format),
            textposition="auto",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:,} " + counted + "<extra></extra>",
            marker=bar(rows["kind"].iloc[0], PALETTE[column - 1]),
            row=1,
            col=column,
        )
        figure.update_xaxes(title_text=counted, rangemode="tozero", nticks=4, row=1, col=column)
    figure.update_yaxes(autorange="reversed")
    kept = core["interactions"] / first["interactions"]
    lost = first["items"] - core["items"]
    title = f"The k-core keeps {kept:.1%} of interactions and drops {lost:,} of {first['items']:,} items"
    if kept == 1:
        title = f"Nothing was removed: all {core['interactions']:,} interactions are in the k-core"
    return figure.update_layout(title_text=title)


def sequence_lengths(rows: pd.DataFrame) -> go.Figure:
    """How many users have how many interactions, on a logarithmic scale."""
    low, high = rows["length"].min(), rows["length"].max()
    edges = np.unique(np.round(np.geomspace(low, high + 1, 25)).astype(int))
    counts, _ = np.histogram(rows["length"], edges, weights=rows["users"])
    spans = [f"{a} to {b - 1}" for a, b in pairwise(edges)]
    figure = go.Figure(
        go.Bar(
            x=np.sqrt(edges[:-1] * edges[1:]),
            y=counts,
            width=np.diff(edges) * 0.92,
            customdata=spans,
            hovertemplate="%{customdata} interactions: %{y} users<extra></extra>",
            marker=bar(rows["kind"].iloc[0], BLUE),
        ),
        layout={"template": TEMPLATE},
    )
    median, mean = rows["median_length"].iloc[0], rows["mean_length"].iloc[0]
    for value, name, side in ((median, "median", "left"), (mean, "mean", "right")):
        figure.add_vline(value, line={"color": ORANGE, "width": 2, "dash": "dot"})
        figure.add_annotation(
            x=np.log10(value),
            y=1,
            yref="paper",
            text=f"{name} {value:,.0f}",
            showarrow=False,
            xanchor="right" if side == "left" else "left",
            xshift=-6 if side == "left" else 6,
            font={"color": ORANGE},
        )
    figure.update_xaxes(title_text="interactions of a user (log scale)", **log_axis(edges, most=9))
    figure.update_yaxes(title_text="users")
    return figure.update_layout(
        title_text=f"Half of the users have at most {median:,.0f} interactions, "
        f"one has {rows['max_length'].iloc[0]:,}"
    )


def item_popularity(rows: pd.DataFrame) -> go.Figure:
    """Interactions by popularity rank, and the share that the most popular items hold."""
    figure = panels(2)
    figure.add_scatter(
        x=rows["rank"],
        y=rows["interactions"],
        mode="lines",
        line=line(rows["kind"].iloc[0], BLUE),
        hovertemplate="rank %{x:,}: %{y:,} interactions<extra></extra>",
        row=1,
        col=1,
    )
    figure.add_scatter(
        x=[0.0, *rows["item_share"]],
        y=[0.0, *rows["interaction_share"]],
        mode="lines",
        line=line(rows["kind"].iloc[0], BLUE),
        fill="tozeroy",
        fillcolor="rgba(0,114,178,0.10)",
        hovertemplate="top %{x:.1%} of items: %{y:.1%}<extra></extra>",
        row=1,
        col=2,
    )
    equal = {"color": MUTED, "width": 1, "dash": "dot"}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=equal, hoverinfo="skip", row=1, col=2)
    figure.add_annotation(
        x=0.62, y=0.5, text="all items equal", showarrow=False, font={"color": MUTED}, row=1, col=2
    )
    for update, name in ((figure.update_xaxes, "rank"), (figure.update_yaxes, "interactions")):
        update(row=1, col=1, **log_axis(rows[name]))
        update(tickformat=".0%", range=[0, 1], row=1, col=2)
    figure.update_xaxes(title_text="popularity rank (log scale)", row=1, col=1)
    figure.update_yaxes(title_text="interactions (log scale)", row=1, col=1)
    figure.update_xaxes(title_text="share of items, most popular first", row=1, col=2)
    figure.update_yaxes(title_text="share of interactions", row=1, col=2)
    tenth, gini = rows["top_tenth_share"].iloc[0], rows["gini"].iloc[0]
    return figure.update_layout(
        title_text=f"A tenth of the items holds {tenth:.0%} of the interactions (Gini {gini:.2f})"
    )


def tied_timestamps(rows: pd.DataFrame) -> go.Figure:
    """What is ordered by the tie rule alone."""
    share = rows["tied_test_target_share"].iloc[0]
    return _shares(rows, f"For {share:.0%} of the users the last two interactions have the same timestamp")


def repeats(rows: pd.DataFrame) -> go.Figure:
    """What users do again."""
    share, targets = rows["repeat_share"].iloc[0], rows["repeat_target_share"].iloc[0]
    title = f"{share:.1%} of interactions and {targets:.1%} of test targets are repeats"
    return _shares(rows, title if share else "No user has an item twice")


def _shares(rows: pd.DataFrame, title: str) -> go.Figure:
    """Return a bar for each of a few shares of different things."""
    figure = go.Figure(
        go.Bar(
            x=rows["share"],
            y=rows["what"].str.wrap(34).str.replace("\n", "<br>"),
            orientation="h",
            text=rows["share"].map("{:.1%}".format),
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{x:.2%}<extra></extra>",
            marker=bar(rows["kind"].iloc[0], BLUE),
        ),
        layout={"template": TEMPLATE},
    )
    figure.update_xaxes(title_text="share", tickformat=".0%", range=[0, 1.1])
    figure.update_yaxes(autorange="reversed", ticks="")
    return figure.update_layout(height=180 + 50 * len(rows), title_text=title)


def last_items(rows: pd.DataFrame) -> go.Figure:
    """How many items share the last timestamp of a user's history."""
    most = rows["candidates"].max()
    cut = rows["most_candidates"].iloc[0] > most
    names = [f"{n} or more" if cut and n == most else str(n) for n in rows["candidates"]]
    colors = [MUTED if n == 1 else BLUE for n in rows["candidates"]]
    figure = go.Figure(
        go.Bar(
            x=names,
            y=rows["users"] / rows["users"].sum(),
            customdata=rows["users"],
            text=(rows["users"] / rows["users"].sum()).map("{:.1%}".format),
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{x} items: %{customdata:,} users (%{y:.2%})<extra></extra>",
            marker=bar(rows["kind"].iloc[0], BLUE) | {"color": colors},
        ),
        layout={"template": TEMPLATE},
    )
    figure.update_xaxes(title_text="items that share the last timestamp of a history", type="category")
    figure.update_yaxes(title_text="share of evaluated users", tickformat=".0%", rangemode="tozero")
    share = rows["last_item_by_tie_rule_share"].iloc[0]
    return figure.update_layout(title_text=f"For {share:.1%} of the users the tie rule chooses the last item")


def interactions_over_time(rows: pd.DataFrame) -> go.Figure:
    """When interactions happened, and when users and items came."""
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.07)
    figure.add_bar(
        x=rows["start"],
        y=rows["interactions"],
        hovertemplate="from %{x}: %{y:,} interactions<extra></extra>",
        marker=bar(rows["kind"].iloc[0], BLUE),
        showlegend=False,
        row=1,
        col=1,
    )
    for name, color in (("users", ORANGE), ("items", GREEN)):
        figure.add_scatter(
            x=rows["start"],
            y=rows[f"new_{name}"].cumsum() / rows[f"new_{name}"].sum(),
            mode="lines",
            line=line(rows["kind"].iloc[0], color),
            name=f"{name} met so far",
            hovertemplate="by the end of the span from %{x}: %{y:.1%} of " + name + "<extra></extra>",
            row=2,
            col=1,
        )
    _mark_time_points(figure, rows)
    figure.update_yaxes(title_text="interactions", row=1, col=1)
    figure.update_yaxes(title_text="share of all", tickformat=".0%", range=[0, 1.02], row=2, col=1)
    figure.update_xaxes(title_text="time (UTC)", nticks=5, tickangle=0, row=2, col=1)
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": -0.2, "yanchor": "top"}
    return figure.update_layout(template=TEMPLATE, height=520, legend=legend, title_text=_when(rows))


def _mark_time_points(figure: go.Figure, rows: pd.DataFrame) -> None:
    """Draw where validation and test of the global time split begin."""
    for part, name, side in (("valid", "validation", "right"), ("test", "test", "left")):
        if f"{part}_from" not in rows:
            continue
        point = pd.Timestamp(rows[f"{part}_from"].iloc[0], unit="s")
        for row in (1, 2):
            figure.add_vline(point, line={"color": INK, "width": 1, "dash": "dot"}, row=row, col=1)
        at = {"x": point, "y": 1.0, "yref": "y domain", "yanchor": "bottom", "xanchor": side}
        font = {"color": INK, "size": 12}
        figure.add_annotation(at, text=name, showarrow=False, font=font, row=1, col=1)


def _when(rows: pd.DataFrame) -> str:
    days, per_bin = rows["days"].iloc[0], rows["interactions"]
    busiest = per_bin.max() / per_bin.sum()
    span = f"{24 * days:,.1f} hours" if days < 2 else f"{days:,.0f} days"
    span = f"{days / 365.25:,.1f} years" if days > 730 else span
    return f"{span} of interactions; the busiest of {len(rows)} spans has {busiest:.1%} of them"


def cold_start(rows: pd.DataFrame) -> go.Figure:
    """Share of test rows whose target item or user training never saw, by split."""
    rows = rows[rows["part"] == "test"]
    figure = go.Figure(layout={"template": TEMPLATE})
    named = (
        ("unseen_item_share", "target item never trained on", BLUE),
        ("unseen_user_share", "user never trained on", ORANGE),
    )
    for column, name, color in named:
        figure.add_bar(
            x=rows[column],
            y=rows["split"].str.wrap(20).str.replace("\n", "<br>"),
            orientation="h",
            name=name,
            customdata=rows["rows"],
            text=rows[column].map("{:.1%}".format),
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{x:.2%} of %{customdata:,} test rows<extra></extra>",
            marker=bar(rows["kind"].iloc[0], color),
        )
    figure.update_xaxes(title_text="share of test rows", tickformat=".0%", range=[0, 1.08])
    figure.update_yaxes(autorange="reversed", ticks="")
    worst = int(rows["unseen_item_share"].argmax())
    share, split = rows["unseen_item_share"].iloc[worst], rows["split"].iloc[worst]
    return figure.update_layout(
        title_text=f"Up to {share:.1%} of test targets are items that training never saw ({split})"
        if share
        else "No split asks for an item that training never saw"
    )
