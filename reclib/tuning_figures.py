"""Figures of tuning: pure functions from a table of records to a `go.Figure`, as in `figures`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib.look import BLUE, MUTED, ORANGE, TEMPLATE, bar, line, marker
from reclib.marks import note


def tuning_history(rows: pd.DataFrame) -> go.Figure:
    """Value of each trial, whole or pruned, and the best so far."""
    trials = rows.drop_duplicates("trial").sort_values("trial")
    value, kind = "valid_ndcg@10", str(rows["kind"].iloc[0])
    figure = go.Figure(layout={"template": TEMPLATE})
    for state, color in (("complete", BLUE), ("pruned", MUTED)):
        part = trials[trials["state"] == state]
        figure.add_scatter(
            x=part["trial"], y=part[value], mode="markers", marker=marker(kind, color), name=state
        )
    whole = trials[trials["state"] == "complete"]
    best = whole[value].cummax()
    figure.add_scatter(
        x=whole["trial"], y=best, mode="lines", line=line(kind, ORANGE) | {"shape": "hv"}, name="best"
    )
    figure.update_xaxes(title_text="trial")
    figure.update_yaxes(title_text="NDCG@10 on validation")
    said = f"{len(trials)} trials, {int((trials['state'] == 'pruned').sum())} pruned"
    return figure.update_layout(
        showlegend=True, title_text=f"{said}; the best has NDCG@10 {whole[value].max():.4f}"
    )


def tuning_parallel(rows: pd.DataFrame) -> go.Figure:
    """Parallel coordinates: what each whole trial drew, coloured by its value."""
    trials = rows.drop_duplicates("trial")
    trials = trials[trials["state"] == "complete"]
    fixed = {"trial", "state", "kind", "label", "profile", "seed", "dataset", "trial_seconds", "epoch"}
    drawn = [
        str(name) for name in trials if name not in fixed and not str(name).startswith(("valid_", "train_"))
    ]
    drawn = [name for name in drawn if name not in ("tokens", "_") and trials[name].notna().all()]
    axes = []
    for name in [*drawn, "valid_ndcg@10"]:
        values = trials[name].astype(float)
        spans = values.min() > 0 and values.max() / values.min() > 10
        shown = np.log10(values) if spans else values
        axes.append({"label": f"log10 {name}" if spans else name, "values": shown})
    value = trials["valid_ndcg@10"]
    scale = [[0, "#DDE8F0"], [1, BLUE]]
    figure = go.Figure(
        go.Parcoords(dimensions=axes, line={"color": value, "colorscale": scale, "showscale": False}),
        layout={"template": TEMPLATE},
    )
    best = trials.iloc[int(value.to_numpy().argmax())]
    said = ", ".join(f"{name} {best[name]:.3g}" for name in drawn)
    note(figure, f"Best: {said}")
    return figure.update_layout(title_text="What the trials drew; darker is better", margin={"t": 150})


def tuning_importance(rows: pd.DataFrame) -> go.Figure:
    """Share of the value's variance that each field explains among the trials (PED-ANOVA)."""
    rows = rows[rows["share"].notna()].sort_values("share") if "share" in rows else rows.iloc[:0]
    figure = go.Figure(layout={"template": TEMPLATE})
    if rows.empty:
        return figure.update_layout(title_text="Too few whole trials to say what mattered", height=220)
    figure.add_bar(
        x=rows["share"], y=rows["field"], orientation="h", marker=bar(str(rows["kind"].iloc[0]), BLUE)
    )
    figure.update_xaxes(title_text="importance (share)", rangemode="tozero")
    figure.update_yaxes(title_text="field")
    top = rows.iloc[-1]
    return figure.update_layout(title_text=f"{top['field']} has {top['share']:.0%} of the importance")


# The name of the records that each is made of, and the figure.
FIGURES: list[tuple[str, Callable[[pd.DataFrame], go.Figure]]] = [
    ("trial", tuning_history),
    ("tuning", tuning_importance),
    ("trial", tuning_parallel),
]
