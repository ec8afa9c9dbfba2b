"""Figures of scaling and tuning: pure functions from a table of records to a `go.Figure`, as in `figures`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib.look import BLUE, GREEN, HEIGHT, INK, MUTED, ORANGE, PURPLE, TEMPLATE, bar, line, marker
from reclib.marks import note, panels

LOSS = "lowest_valid_loss"
COLORS = {"width": BLUE, "depth": ORANGE, "untied tables": GREEN, "other learning rate": PURPLE}


def one_per_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each run, with its sweep: width at two layers, depth, untied, other rate."""
    curves = rows[rows[LOSS].notna()] if LOSS in rows else rows.iloc[:0]
    runs = curves.drop_duplicates(["profile", "dataset", "model", "seed"]).copy()
    names = runs["model"].astype(str)
    runs["sweep"] = np.select(
        [names.str.contains("untied"), names.str.contains("rate"), names.str.fullmatch(r"w\d+d2")],
        ["untied tables", "other learning rate", "width"],
        np.where(names.str.fullmatch(r"w\d+d\d+"), "depth", "width"),
    )
    return runs


def scaling_curve(rows: pd.DataFrame) -> go.Figure:
    """Validation loss against non-embedding parameters and training FLOPs, the law and what it predicted."""
    runs = one_per_run(rows)
    figure = panels(2, shared_yaxes=True, spacing=0.06).update_layout(showlegend=True, height=HEIGHT + 60)
    for (sweep, profile, kind), part in runs.groupby(["sweep", "profile", "kind"], sort=False):
        committed = profile == "grid"
        look = marker(str(kind), COLORS[str(sweep)])
        look["symbol"] = look["symbol"] if committed else look["symbol"].replace("circle", "diamond")
        name = f"{sweep}, {'committed' if committed else 'this run'}"
        for column, x in enumerate(("non_embedding", "training_flops"), 1):
            figure.add_scatter(
                x=part[x],
                y=part[LOSS],
                mode="markers",
                marker=look,
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                customdata=part[["model", "seed"]].astype(str),
                hovertemplate="%{customdata[0]}, seed %{customdata[1]}: %{y:.4f} nats<extra></extra>",
                row=1,
                col=column,
            )
    title = _add_prediction(figure, rows, runs)
    figure.update_xaxes(type="log", title_text="non-embedding parameters", row=1, col=1)
    figure.update_xaxes(type="log", title_text="training FLOPs", row=1, col=2)
    figure.update_yaxes(title_text="lowest validation loss (nats)", row=1, col=1)
    note(
        figure,
        "Each mark is one seed; dashed and hollow: the law and its prediction, recorded before.",
    )
    return figure.update_layout(title_text=title, legend={"y": -0.25, "yanchor": "top"}, margin={"b": 130})


def _add_prediction(figure: go.Figure, rows: pd.DataFrame, runs: pd.DataFrame) -> str:
    if "predicted" in rows and rows["predicted"].notna().any():
        one = rows[rows["predicted"].notna()].iloc[-1]
        smallest = min(runs["non_embedding"].min(), one["size"]) if len(runs) else one["size"] / 100
        sizes = np.geomspace(smallest, one["size"], 60)
        figure.add_scatter(
            x=sizes,
            y=one["floor"] + one["factor"] * sizes ** -one["exponent"],
            mode="lines",
            line=line("predicted", INK),
            name="law",
            hoverinfo="skip",
            row=1,
            col=1,
        )
        band = {}
        if pd.notna(one.get("low")):
            up, down = one["high"] - one["predicted"], one["predicted"] - one["low"]
            band = {"error_y": {"array": [up], "arrayminus": [down], "color": INK}}
        figure.add_scatter(
            x=[one["size"]],
            y=[one["predicted"]],
            mode="markers",
            marker=marker("predicted", INK),
            name=f"prediction of {one['of']}",
            hovertemplate="predicted %{y:.4f} nats<extra></extra>",
            row=1,
            col=1,
            **band,
        )
        found = runs[(runs["model"] == one["of"]) & (runs["profile"] == "grid")][LOSS]
        if len(found):
            gap = one["predicted"] / found.mean() - 1
            return f"The law missed the loss of the largest size by {gap:+.1%}"
        return f"The law predicts {one['predicted']:.3f} nats for {one['of']}, which is not measured yet"
    if runs.empty:
        return "No run is recorded yet"
    means = runs.groupby("model")[LOSS].mean()
    return f"Lowest validation loss: {means.min():.3f} nats, with {means.idxmin()}"


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
    ("learning_curve", scaling_curve),
    ("trial", tuning_history),
    ("trial", tuning_parallel),
    ("tuning", tuning_importance),
]
