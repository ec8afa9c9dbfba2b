"""Figures of the audit: pure functions from a table of records to a `go.Figure`, as in `figures`."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go

from reclib.look import BLUE, MUTED, ORANGE, TEMPLATE, line, marker
from reclib.marks import categories, note

CLOSE = 1.05  # a claim is met within 5 %, as in `verdicts`


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
    figure.update_xaxes(title_text="sequences/s (log scale)", type="log", tickformat=",d", dtick="D2")
    wrong = int((rows["ratio"] > CLOSE).sum())
    title = f"{wrong} of {len(rows)} claimed rates are more than the epoch time allows"
    if wrong:
        title += f", by up to {rows['ratio'].max():.1f} times"
    note(
        figure,
        "arithmetic on published figures: the sequences of an epoch over its time; nothing was timed here",
    )
    return figure.update_layout(title_text=title, showlegend=True)


FIGURES: list[tuple[str, Callable[[pd.DataFrame], go.Figure]]] = [("audit_rates", claimed_rates)]
