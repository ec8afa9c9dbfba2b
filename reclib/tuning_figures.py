"""Figures of tuning: pure functions from a table of records to a `go.Figure`, as in `figures`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib.look import BLUE, MUTED, ORANGE, TEMPLATE, bar, line, marker
from reclib.marks import note

VALUE = "valid_ndcg@10"
ON_LOG = ("learning_rate", "weight_decay")  # fields that are shown by their logarithm


def per_trial(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each trial, by number; its value is that of its best epoch."""
    best = rows.groupby("trial")[VALUE].transform("max")
    return rows.assign(**{VALUE: best}).drop_duplicates("trial").sort_values("trial")


def tuning_history(rows: pd.DataFrame) -> go.Figure:
    """Value of each trial, whole or pruned, and the best so far."""
    trials, value, kind = per_trial(rows), VALUE, str(rows["kind"].iloc[0])
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
    trials = per_trial(rows)
    trials = trials[trials["state"] == "complete"]
    fixed = {"trial", "state", "kind", "label", "profile", "seed", "dataset", "trial_seconds", "epoch"}
    drawn = [
        str(name) for name in trials if name not in fixed and not str(name).startswith(("valid_", "train_"))
    ]
    drawn = [name for name in drawn if name not in ("tokens", "_") and trials[name].notna().all()]
    axes = []
    for name in [*drawn, VALUE]:
        label, values = name.removeprefix("model."), trials[name].astype(float)
        shown = np.log10(values) if name in ON_LOG else values
        axes.append({"label": f"log10 {label}" if name in ON_LOG else label, "values": shown})
    axes[-1]["label"] = "NDCG@10"
    value = trials[VALUE]
    scale = [[0, "#C3D7E6"], [0.6, BLUE], [1, "#00304D"]]
    figure = go.Figure(
        go.Parcoords(dimensions=axes, line={"color": value, "colorscale": scale, "showscale": False}),
        layout={"template": TEMPLATE},
    )
    best = trials.iloc[int(value.to_numpy().argmax())]
    said = ", ".join(f"{name.removeprefix('model.')} {best[name]:.3g}" for name in drawn)
    note(figure, f"NDCG@10 on validation. The best, {value.max():.4f}: {said}")
    return figure.update_layout(
        title_text="What the trials drew; darker is better", margin={"t": 150, "r": 60}
    )


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
