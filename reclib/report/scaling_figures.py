"""Figures of scaling: pure functions from a table of records to a `go.Figure`, as in `figures`.

Committed runs are circles, one for each seed; the notebook's own are diamonds. What a run's arm varies is in
its name, as the files of `params/grids` give it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib.evaluate import statistics
from reclib.report.style import (
    BLUE,
    GREEN,
    HEIGHT,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    TEMPLATE,
    bar,
    line,
    log_axis,
    marker,
    note,
    panels,
)
from reclib.report.tables import RATES, sweep_of

LOSS = "lowest_valid_loss"

RANKED = "valid_ndcg@10"

TITLES = {LOSS: "lowest validation loss (nats)", RANKED: "NDCG@10 on validation"}

SIZE, FLOPS = "non_embedding", "training_flops"

ACCURACY = {RANKED: "NDCG@10", "valid_hr@10": "HR@10"}

COLORS = {"width": BLUE, "depth": ORANGE, "untied tables": GREEN, "other learning rate": PURPLE}

COLORS |= {"tuned settings": GREEN}

FACTORS = {"half": 0.5, "rule": 1.0, "twice": 2.0}  # of the rate that the rule gives

SHADE = "rgba(34, 34, 34, 0.10)"


def one_per_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each run, with its sweep: width at two layers, depth, untied, other rate.

    Accuracy is that of the best epoch, by NDCG@10, as for the weights that a run keeps.
    """
    curves = rows[rows[LOSS].notna()] if LOSS in rows else rows.iloc[:0]
    key = ["profile", "dataset", "model", "seed"]
    best = {
        name: curves.groupby(key, dropna=False)[name].transform("max") for name in ACCURACY if name in curves
    }
    runs = curves.assign(**best).drop_duplicates(key).copy()
    runs["sweep"] = runs["model"].astype(str).map(sweep_of)
    return runs


def scaling_curve(rows: pd.DataFrame) -> go.Figure:
    """Validation loss by width against parameters and FLOPs; the law, its band and what it predicted."""
    runs = one_per_run(rows)
    figure = panels(2, shared_yaxes=True, spacing=0.06).update_layout(showlegend=True, height=HEIGHT + 80)
    said = _predicted(rows)
    if said is not None:
        _add_law(figure, said, runs)
    shown = runs[(runs["sweep"] == "width") | (_own(runs) & runs["sweep"].isin(["depth", "tuned settings"]))]
    for column, x in enumerate((SIZE, FLOPS), 1):
        _add_runs(figure, shown, x, LOSS, row=1, col=column)
    if said is not None:
        _add_prediction(figure, said)
    _name_sizes(figure, shown)
    _sizes_and_flops(figure, shown, row=1)
    figure.update_yaxes(title_text=TITLES[LOSS], row=1, col=1)
    text = "Circles: committed runs, one for each seed; the line joins their means."
    text = "" if _own(runs).all() else text
    text += " Diamonds: this notebook's own runs." if _own(runs).any() else ""
    if said is not None:
        text += " Dashed and hollow: the law of the smaller sizes and its prediction, recorded before."
        text += " Band: 95 % over resampled seeds."
    note(figure, text.strip() + _fewer_seeds(shown))
    return _legend_below(figure.update_layout(title_text=_curve_title(said, runs)))


def scaling_accuracy(rows: pd.DataFrame) -> go.Figure:
    """NDCG@10 and HR@10 on validation against parameters and FLOPs, by width and by depth."""
    runs = one_per_run(rows)
    runs = runs[runs["sweep"].isin(["width", "depth", "tuned settings"])]
    there = [name for name in ACCURACY if name in runs and runs[name].notna().any()]
    figure = panels(2, rows=max(1, len(there)), shared_yaxes=True, shared_xaxes=True, spacing=0.06)
    for row, metric in enumerate(there, 1):
        for column, x in enumerate((SIZE, FLOPS), 1):
            _add_runs(figure, runs, x, metric, row=row, col=column, legend=row == 1)
        figure.update_yaxes(title_text=f"{ACCURACY[metric]} on validation", row=row, col=1)
    _sizes_and_flops(figure, runs, row=max(1, len(there)))
    text = "Lines join the means over seeds of committed runs; at the epoch that has the best NDCG@10."
    note(figure, text + _fewer_seeds(runs))
    title = "No run is recorded yet"
    if there:
        means = runs.groupby("model")[there[0]].mean()
        span = f"{means.min():.3f} to {means.max():.3f}"
        title = f"{ACCURACY[there[0]]} on validation: {span}, best with {means.idxmax()}"
    figure.update_layout(title_text=title, showlegend=True, height=HEIGHT + 220)
    return _legend_below(figure)


def scaling_sweeps(rows: pd.DataFrame) -> go.Figure:
    """What else was varied: depth against width, a second table against none, the learning rate's rule.

    The lowest validation loss above, NDCG@10 below where runs have it: the two need not agree. There is a
    panel for each sweep that has runs; the note names those that have none yet.
    """
    runs = one_per_run(rows)
    runs = runs[~_own(runs)]
    kinds = {"depth": _sweep_lines, "untied tables": _untied_lines, "other learning rate": _rate_lines}
    there = ["depth", *(kind for kind in list(kinds)[1:] if (runs["sweep"] == kind).any())]
    ranked = RANKED in runs and runs[RANKED].notna().any()
    measures = [LOSS, RANKED] if ranked else [LOSS]
    figure = panels(len(there), rows=len(measures), spacing=0.09)
    figure.update_layout(height=HEIGHT + 60 + 240 * (len(measures) - 1), showlegend=True)
    gains = {}
    for row, one in enumerate(measures, 1):
        figure.update_yaxes(title_text=TITLES[one], row=row, col=1)
        drawn = [kinds[kind](figure, runs, Panel(row, col, one)) for col, kind in enumerate(there, 1)]
        gains[one] = "; ".join(filter(None, drawn))
    if ranked:
        figure.update_xaxes(title_text=None, row=1)  # the row below has the same
    text = "Means over seeds, bars to the lowest and the highest; rates over the seeds that all three have."
    if ranked and gains[LOSS]:
        text = f"Loss above, in nats: {gains[LOSS]}. {text}"
    if absent := [kind for kind in kinds if not (runs["sweep"] == kind).any()]:
        text += f" Not trained yet: {', '.join(absent)}."
    note(figure, text)
    title = gains[measures[-1]]
    title = (
        f"{'NDCG@10' if ranked else 'Loss (nats)'}: {title}" if title else "Only the width is varied so far"
    )
    return _legend_below(figure.update_layout(title_text=title))


# -- parts ---------------------------------------------------------------------------------------------------


def _own(runs: pd.DataFrame) -> pd.Series:
    """Return which runs are a notebook's own and not of a committed grid."""
    return runs["profile"] != "grid"


def _fewer_seeds(runs: pd.DataFrame) -> str:
    """Return which committed sizes have fewer seeds than the others, as a sentence with a space before it."""
    counts = runs[~_own(runs)].groupby("model", sort=False)["seed"].nunique()
    few = [f"{model} ({count})" for model, count in counts.items() if count < counts.max()]
    return f" Fewer seeds: {', '.join(few)}." if few else ""


def _add_runs(
    figure: go.Figure, runs: pd.DataFrame, x: str, y: str, row: int, col: int, legend: bool = True
) -> None:
    """Draw one mark for each run, and a line through the committed means."""
    for (own, sweep), part in runs.assign(own=_own(runs)).groupby(["own", "sweep"], sort=False):
        color, kind = COLORS[str(sweep)], str(part["kind"].iloc[0])
        look = marker(kind, color) | {"size": 9}
        millions = part["trained_tokens"].max() / 1e6
        name = f"{sweep}, {'this run' if own else 'committed'} ({millions:.1f} M tokens)"
        if own:
            look |= {"symbol": look["symbol"].replace("circle", "diamond"), "size": 11}
        else:
            look |= {"opacity": 0.55}
            means = part.groupby("model").agg({x: "mean", y: "mean"}).sort_values(x)
            joined = line(kind, color) | {"width": 1.5}
            figure.add_scatter(
                x=means[x], y=means[y], mode="lines", line=joined, legendgroup=name, showlegend=False,
                hoverinfo="skip", row=row, col=col,
            )  # fmt: skip
        said = part[["model", "seed"]].astype(str)
        hover = "%{customdata[0]}, seed %{customdata[1]}: %{y:.4f}<extra></extra>"
        figure.add_scatter(
            x=part[x], y=part[y], mode="markers", marker=look, name=name, legendgroup=name,
            showlegend=legend and col == 1, customdata=said, hovertemplate=hover, row=row, col=col,
        )  # fmt: skip


def _predicted(rows: pd.DataFrame) -> pd.Series | None:
    if "predicted" not in rows or not rows["predicted"].notna().any():
        return None
    return rows[rows["predicted"].notna()].iloc[-1]


def _add_law(figure: go.Figure, said: pd.Series, runs: pd.DataFrame) -> None:
    """Draw the law and, where seeds allow one, the band of what it was fitted to."""
    fitted = runs[(runs["sweep"] == "width") & ~_own(runs) & (runs["model"] != said["of"])]
    smallest = min(fitted[SIZE].min(), said["size"]) if len(fitted) else said["size"] / 100
    sizes = np.geomspace(smallest, said["size"], 60)
    by_size = {float(size): list(part[LOSS]) for size, part in fitted.groupby(SIZE)}
    ends = statistics.band(by_size, sizes)
    if ends is not None:
        figure.add_scatter(
            x=[*sizes, *sizes[::-1]], y=[*ends[0], *ends[1][::-1]], fill="toself", fillcolor=SHADE,
            line={"width": 0}, name="95 % band", hoverinfo="skip", row=1, col=1,
        )  # fmt: skip
    values = statistics.Law(said["floor"], said["factor"], said["exponent"])(sizes)
    figure.add_scatter(
        x=sizes,
        y=values,
        mode="lines",
        line=line("predicted", INK),
        name="law",
        hoverinfo="skip",
        row=1,
        col=1,
    )


def _add_prediction(figure: go.Figure, said: pd.Series) -> None:
    bar: dict[str, Any] = {}
    if pd.notna(said.get("low")):
        up, down = said["high"] - said["predicted"], said["predicted"] - said["low"]
        bar = {"error_y": {"array": [up], "arrayminus": [down], "color": INK}}
    figure.add_scatter(
        x=[said["size"]], y=[said["predicted"]], mode="markers", marker=marker("predicted", INK),
        name=f"prediction of {said['of']}", hovertemplate="predicted %{y:.4f} nats<extra></extra>",
        row=1, col=1, **bar,
    )  # fmt: skip


def _curve_title(said: pd.Series | None, runs: pd.DataFrame) -> str:
    if said is not None:
        found = runs[(runs["model"] == said["of"]) & ~_own(runs)][LOSS]
        if len(found):
            gap, inside = said["predicted"] / found.mean() - 1, ""
            if pd.notna(said.get("low")):
                hit = said["low"] <= found.mean() <= said["high"]
                inside = ", inside its band" if hit else ", outside its band"
            said_of = f"The law predicted the loss of the largest size, {said['of']}"
            return f"{said_of}, with an error of {gap:+.1%}{inside}"
        return f"The law predicts {said['predicted']:.3f} nats for {said['of']}, which is not measured yet"
    if runs.empty:
        return "No run is recorded yet"
    means = runs.groupby("model")[LOSS].mean()
    return f"Lowest validation loss: {means.min():.3f} nats, with {means.idxmin()}"


def _name_sizes(figure: go.Figure, runs: pd.DataFrame) -> None:
    """Write the sizes' names under their lowest marks, in the first panel; of committed ones if there are."""
    named = runs if _own(runs).all() else runs[~_own(runs)]
    low = named.sort_values(LOSS).drop_duplicates("model")
    for _, one in low.iterrows():
        figure.add_annotation(
            x=np.log10(one[SIZE]), y=one[LOSS], text=one["model"], showarrow=False, yshift=-15,
            font={"size": 11, "color": MUTED}, row=1, col=1,
        )  # fmt: skip


def _sizes_and_flops(figure: go.Figure, runs: pd.DataFrame, row: int) -> None:
    for col, (x, title) in enumerate(((SIZE, "non-embedding parameters"), (FLOPS, "training FLOPs")), 1):
        for each in range(1, row + 1):
            figure.update_xaxes(**log_axis(runs[x]), row=each, col=col)
        figure.update_xaxes(title_text=title, row=row, col=col)


def _legend_below(figure: go.Figure) -> go.Figure:
    legend = {"x": 0, "xanchor": "left", "y": -90 / (figure.layout.height - 200), "yanchor": "top"}
    return figure.update_layout(legend=legend, margin={"b": 130})


class Panel(NamedTuple):
    """A panel of the sweeps, and the measure that it shows."""

    row: int
    col: int
    measure: str

    def gain(self, values: Sequence[float]) -> str:
        """Return differences of the measure as a text: nats to three digits, accuracy to four."""
        return ", ".join(f"{one:+.3f}" if self.measure == LOSS else f"{one:+.4f}" for one in values)


def _means(runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return each arm's mean of a measure, with its lowest and highest seed, by size."""
    parts = runs.groupby("model")
    table = parts[measure].agg(["mean", "min", "max"])
    return table.assign(**{SIZE: parts[SIZE].first(), "kind": parts["kind"].first()}).sort_values(SIZE)


def _add_means(figure: go.Figure, x: Any, table: pd.DataFrame, name: str, color: str, panel: Panel) -> None:
    kind = str(table["kind"].iloc[0]) if len(table) else "measured"
    spread = {"array": table["max"] - table["mean"], "arrayminus": table["mean"] - table["min"]}
    unit = " nats" if panel.measure == LOSS else ""
    figure.add_scatter(
        x=x, y=table["mean"], mode="lines+markers", name=name, line=line(kind, color),
        marker=marker(kind, color), error_y=spread | {"color": color, "width": 4}, legendgroup=name,
        showlegend=panel.row == 1, customdata=table.index,
        hovertemplate=f"%{{customdata}}: %{{y:.4f}}{unit}<extra></extra>", row=panel.row, col=panel.col,
    )  # fmt: skip


def _sweep_lines(figure: go.Figure, runs: pd.DataFrame, panel: Panel) -> str:
    """Draw width and depth; return what depth gave, empty where it is not varied."""
    width = _means(runs[runs["sweep"] == "width"], panel.measure)
    deep = _means(runs[runs["sweep"] == "depth"], panel.measure)
    _add_means(figure, width[SIZE], width, "width at two layers", COLORS["width"], panel)
    axis = log_axis([*width[SIZE], *deep[SIZE]], most=4)
    figure.update_xaxes(**axis, title_text="non-embedding parameters", row=panel.row, col=panel.col)
    if deep.empty:
        return ""
    base = f"{deep.index[0].split('d')[0]}d2"
    joined = pd.concat([deep, width[width.index == base]]).sort_values(SIZE)
    _add_means(figure, joined[SIZE], joined, f"depth at {base.removesuffix('d2')}", COLORS["depth"], panel)
    gain = panel.gain([joined["mean"].iloc[-1] - joined["mean"].iloc[0]])
    return f"depth, {joined.index[0]} to {joined.index[-1]}, {gain}"


def _untied_lines(figure: go.Figure, runs: pd.DataFrame, panel: Panel) -> str:
    """Draw tied beside untied; return what a second table gave."""
    untied = _means(runs[runs["sweep"] == "untied tables"], panel.measure)
    names = [name.removesuffix(" untied") for name in untied.index]
    tied = _means(runs[runs["model"].isin(names)], panel.measure)
    figure.update_xaxes(title_text="size", type="category", row=panel.row, col=panel.col)
    _add_means(figure, list(tied.index), tied, "one table (tied)", COLORS["width"], panel)
    _add_means(figure, names, untied, "two tables (untied)", COLORS["untied tables"], panel)
    change = (untied.set_axis(names)["mean"] - tied["mean"]).dropna()
    if change.empty:
        return ""
    return f"a second table at {' and '.join(change.index)}, {panel.gain(list(change))}"


def _rate_lines(figure: go.Figure, runs: pd.DataFrame, panel: Panel) -> str:
    """Draw the measure at half the rule's rate, the rule's and twice."""
    other = runs[runs["sweep"] == "other learning rate"]["model"]
    bases = sorted({name.rsplit(" ", 2)[0] for name in other}, key=lambda name: int(name[1:].split("d")[0]))
    ticks = {"type": "log", "tickvals": list(FACTORS.values()), "ticktext": list(FACTORS)}
    figure.update_xaxes(title_text="learning rate over the rule's", **ticks, row=panel.row, col=panel.col)
    for place, base in enumerate(bases):
        names = {base + end: FACTORS[short] for short, end in RATES.items()}
        mine = runs[runs["model"].isin(names)]
        shared = set.intersection(*(set(part["seed"]) for _, part in mine.groupby("model")))
        table = _means(mine[mine["seed"].isin(shared)], panel.measure)
        table = table.assign(factor=[names[name] for name in table.index]).sort_values("factor")
        color = (PURPLE, MUTED)[place % 2]
        _add_means(figure, table["factor"], table, f"rates at {base}", color, panel)
    return ""


# ------------------------------------------------------------------------------------------------
# Figures of tuning: pure functions from a table of records to a `go.Figure`, as in `figures`.

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
