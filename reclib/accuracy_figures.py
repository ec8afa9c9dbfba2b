"""Figures of accuracy: pure functions from a table of records to a `go.Figure`, as in `figures`."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import wrap

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib import claims
from reclib.look import DECADES, GREEN, INK, MUTED, ORANGE, TEMPLATE, line, marker
from reclib.marks import (
    categories,
    extreme,
    interval,
    label_ends,
    model_colors,
    named,
    note,
    panels,
    sentence,
)
from reclib.tables import model_name

MOST_COLORS = 4  # lines of a figure that can be told apart; all others are grey
FAR = 5  # medians of all differences, below which an arm stands at the edge of the axis
_BAND = "rgba(95,99,104,0.16)"  # of what lies behind the marks
_UNSAID = ("not separated", "too few seeds")
_SAID = {"better": GREEN, "worse": ORANGE}  # colour of a claim; of all others: grey
_TITLES = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "mrr": "MRR"}


def learning_curves(rows: pd.DataFrame) -> go.Figure:
    """Training loss and validation NDCG@10 by epoch: a line per model and seed, coloured by model."""
    rows = named(rows)
    best = rows.groupby(["model", "seed"], dropna=False)["valid_ndcg@10"].max().groupby("model").mean()
    order = list(best.sort_values(ascending=False).index)
    colors = model_colors(order[:MOST_COLORS])
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.06)
    figure.update_layout(template=TEMPLATE, showlegend=False, height=560)
    runs = rows.groupby(["model", "kind", "seed"], sort=True, dropna=False)
    for (model, kind, seed), run in runs:
        for panel, measured in enumerate(["train_loss", "valid_ndcg@10"], 1):
            points = run.dropna(subset=[measured])
            figure.add_scatter(
                x=points["epoch"],
                y=points[measured],
                mode="lines+markers" if len(points) < 40 and len(runs) < 3 else "lines",
                line=line(str(kind), colors.get(model, MUTED)) | {"width": 2 if len(runs) < 3 else 1.3},
                marker={"size": 5},
                hovertemplate=f"{model}, seed {seed}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
                row=panel,
                col=1,
            )
    last_epoch = rows["epoch"].max()
    if len(order) > 1:
        seeds = rows.loc[rows["model"] == order[0], "seed"].nunique()
        mean = f", mean of {seeds} seeds" if seeds > 1 else ""
        title = sentence(f"{order[0]} is best on validation: NDCG@10 {best.max():.3f}{mean}")
        known = rows.dropna(subset=["valid_ndcg@10"]).sort_values("epoch")
        last = known.groupby(["model", "seed"], dropna=False).tail(1).groupby("model")["valid_ndcg@10"]
        ends = last.mean().loc[order[:MOST_COLORS]]
        right = pd.Series(last_epoch, ends.index)
        label_ends(figure, right, ends, colors, rows["valid_ndcg@10"].max(), 2)
    else:
        top = extreme(rows, "valid_ndcg@10")
        title = f"NDCG@10 on validation is best after {top['epoch']:.0f} epochs"
        figure.add_annotation(
            **{"x": top["epoch"], "y": top["valid_ndcg@10"], "ax": -20, "ay": 50, "row": 2, "col": 1},
            text=f"best {top['valid_ndcg@10']:.4f}",
            bgcolor="white",
        )
    figure.update_xaxes(range=[0, 1.03 * last_epoch])
    figure.update_xaxes(title_text="epoch (passes over the users)", row=2, col=1)
    figure.update_yaxes(title_text="training loss (nats per target)", row=1, col=1)
    figure.update_yaxes(title_text="NDCG@10 on validation", rangemode="tozero", row=2, col=1)
    return figure.update_layout(title_text=title)


def metric_comparison(rows: pd.DataFrame) -> go.Figure:
    """HR@10, NDCG@10 and MRR by model: mean over users with its interval, and each seed apart."""
    rows = named(rows)
    shown = [key for key in _TITLES if key in rows and rows[key].notna().any()]
    means = rows[rows["seed"].isna()] if rows["seed"].isna().any() else rows
    models = list(means.groupby("model")["hr@10"].max().sort_values(ascending=False).index)
    figure = panels(len(shown), shared_yaxes=True, spacing=0.06)
    colors = model_colors(models)
    tick = {"symbol": "line-ns", "size": 14, "line": {"color": INK, "width": 1.5}}
    for column, metric in enumerate(shown, 1):
        known = rows[rows[metric].notna()]
        has_interval = known.get(f"{metric}_low", pd.Series(np.nan, known.index)).notna()
        for (model, kind, whole), some in known.groupby(["model", "kind", has_interval]):
            color = colors[model]
            is_mean = whole or some["seed"].isna().all()
            figure.add_scatter(
                x=some[metric],
                y=some["model"],
                mode="markers",
                marker=marker(str(kind), color) if is_mean else tick,
                error_x=interval(some, metric, color) if whole else None,
                hovertemplate="%{y}: %{x:.4f}<extra></extra>",
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text=_TITLES[metric], rangemode="tozero", nticks=4, row=1, col=column)
    note(
        figure,
        "means over users, full ranking; bar: 95 % interval, tick: one seed; grey: no gradient descent",
    )
    categories(figure, models)
    best = extreme(means, "hr@10")
    return figure.update_layout(
        title_text=sentence(
            f"{best['model']} has the target among its ten first for {best['hr@10']:.1%} of users"
        )
    )


def comparison(rows: pd.DataFrame) -> go.Figure:
    """Every model's paired difference from the reference, with its interval, and what may be said of it."""
    rows = named(rows).assign(reference=lambda r: r["against"].map(model_name))
    rows["claim"] = [
        claims.claim(d, p, seeds)
        for d, p, *seeds in rows[["difference", "adjusted_p", "seeds", "reference_seeds"]].to_numpy()
    ]
    shown = [metric for metric in _TITLES if (rows["metric"] == metric).any()]
    first = rows[rows["metric"] == shown[0]]
    order = list(first.sort_values("difference", ascending=False)["model"])
    figure = make_subplots(rows=len(shown), vertical_spacing=0.2)
    figure.update_layout(template=TEMPLATE, showlegend=False)
    for panel, metric in enumerate(shown, 1):
        mine = rows[rows["metric"] == metric]
        _behind(figure, -mine["detectable"], 2 * mine["detectable"], mine["model"], panel)
        for (kind, claim), some in mine.groupby(["kind", "claim"]):
            color = _SAID.get(str(claim), MUTED)
            figure.add_scatter(
                x=some["difference"],
                y=some["model"],
                mode="markers",
                marker=marker(str(kind), color),
                error_x=interval(some, "difference", color),
                customdata=some[["adjusted_p", "detectable", "claim"]],
                hovertemplate="%{y}: %{x:+.4f}, %{customdata[2]}<br>adjusted p %{customdata[0]:.3f}, "
                "detectable %{customdata[1]:.4f}<extra></extra>",
                row=panel,
                col=1,
            )
        high = max(mine["difference_high"].max(), mine["detectable"].max())
        _say(figure, mine["model"], mine["claim"], min(mine["difference_low"].min(), 0), high, panel)
        figure.update_xaxes(title_text=f"difference in {_TITLES[metric]}", nticks=7, row=panel, col=1)
    categories(figure, order)
    figure.update_layout(height=140 + len(shown) * (75 + 30 * len(order)))
    note(
        figure,
        "paired by user; bar: 95 % interval; words: p corrected for all rows (Holm); "
        "grey band: too small for these users to show (power 80 %)",
    )
    counts = first["claim"].value_counts()
    said = [f"{counts[claim]} {claim}" for claim in ("worse", "better", *_UNSAID) if claim in counts]
    reference = rows["reference"].iloc[0]
    return figure.update_layout(
        title_text=f"Against {reference}, {_TITLES[shown[0]]} of {len(first)} models: {', '.join(said)}"
    )


def equal_time(rows: pd.DataFrame) -> go.Figure:
    """Validation NDCG@10 against minutes of training, one line per model, with intervals over users."""
    rows = named(rows).sort_values("minutes", kind="stable")
    last = rows.groupby("model").tail(1).set_index("model").sort_values("ndcg@10", ascending=False)
    colors = model_colors(last.index)
    figure = go.Figure(layout={"template": TEMPLATE, "showlegend": False})
    for (model, kind), mine in rows.groupby(["model", "kind"]):
        figure.add_scatter(
            x=mine["minutes"],
            y=mine["ndcg@10"],
            mode="lines+markers",
            line=line(str(kind), colors[model]),
            marker=marker(str(kind), colors[model]) | {"size": 7},
            error_y=interval(mine, "ndcg@10", colors[model]) | {"thickness": 1.2, "width": 4},
            hovertemplate=f"{model}, %{{x:.3g}} min: %{{y:.4f}}<extra></extra>",
        )
    label_ends(figure, np.log10(last["minutes"]), last["ndcg@10"], colors, rows["ndcg@10"].max())
    first, end = np.log10([rows["minutes"].min(), rows["minutes"].max()])
    figure.update_xaxes(  # ranged by hand: else the names at the ends widen it
        **{"title_text": "minutes of training (log scale)", "range": [first - 0.08, end + 0.04]},
        **DECADES | {"tickformat": ",.3~g"},
    )
    figure.update_yaxes(title_text="NDCG@10 on validation, full ranking", rangemode="tozero")
    table = rows.pivot_table(index="minutes", columns="model", values="ndcg@10").dropna(thresh=2)
    if table.empty:
        return figure.update_layout(title_text=f"NDCG@10 of {last.index[0]}: {last['ndcg@10'].iloc[0]:.3f}")
    final = table.iloc[-1].dropna().sort_values(ascending=False)
    always = (table.idxmax(axis=1) == final.index[0]).all()
    where = "at every time" if always else f"after {table.index[-1]:.3g} minutes"
    return figure.update_layout(
        title_text=sentence(
            f"{final.index[0]} leads {where}: in the end {final.iloc[0]:.3f} against {final.iloc[1]:.3f}"
        )
    )


def ablation(rows: pd.DataFrame) -> go.Figure:
    """What each change to the base arm does to NDCG@10 on validation, paired by user."""
    rows = named(rows).sort_values("difference", ascending=False)
    rows["model"] = rows["model"].map(lambda name: "<br>".join(wrap(name, 26)))
    figure = go.Figure(layout={"template": TEMPLATE, "showlegend": False})
    width = rows["seed_high"] - rows["seed_low"]
    _behind(figure, rows["seed_low"], width, rows["model"])
    enough = rows["seeds"] >= claims.MIN_SEEDS
    corrected = "adjusted_p" in rows and bool(rows["adjusted_p"].notna().all())
    sure = (
        rows["adjusted_p"] < claims.ALPHA
        if corrected
        else (rows["difference_low"] > 0) | (rows["difference_high"] < 0)
    )
    helps, hurts = enough & sure & (rows["difference"] > 0), enough & sure & (rows["difference"] < 0)
    effect = np.select([helps, hurts], ["better", "worse"], "not separated")
    for (kind, said), some in rows.groupby(["kind", effect]):
        color = _SAID.get(str(said), MUTED)
        figure.add_scatter(
            x=some["difference"],
            y=some["model"],
            mode="markers",
            marker=marker(str(kind), color),
            error_x=interval(some, "difference", color),
            customdata=some.reindex(columns=["value", "seeds", "adjusted_p"]),
            hovertemplate="%{y}: %{x:+.4f}<br>NDCG@10 %{customdata[0]:.4f}, "
            "%{customdata[1]:.0f} seeds"
            + (", adjusted p %{customdata[2]:.3f}" if corrected else "")
            + "<extra></extra>",
        )
    base, value = model_name(rows["against"].iloc[0]), rows["base"].iloc[0]
    figure.update_xaxes(title_text="change of NDCG@10", tickformat="+.3~f", nticks=7)
    figure.add_vline(0, line={"color": INK, "width": 1})
    categories(figure, list(rows["model"]), 40)
    _far_off(figure, rows)
    note(
        figure,
        f"0: {base}, NDCG@10 {value:.4f} on validation; bar: 95 % interval over users"
        + (
            " and seeds; colour: p below .05 corrected for all arms (Holm)"
            if corrected
            else ", not corrected for the number of arms"
        )
        + f"; band: range over seeds; grey: not separated, or fewer than {claims.MIN_SEEDS} seeds",
    )
    if not enough.any():
        said = f"{len(rows)} changes to “{base}”, of fewer seeds than a claim needs"
        return figure.update_layout(title_text=said)
    counts = f"{helps.sum()} raise NDCG@10, {hurts.sum()} lower it"
    return figure.update_layout(title_text=f"Of {len(rows)} changes to “{base}”, {counts}")


def _far_off(figure: go.Figure, rows: pd.DataFrame) -> None:
    """Cut the axis where single arms would press all others together, and say their values at its edge."""
    edge = -FAR * rows["difference"].abs().median()
    far = rows["difference"] < edge
    if not far.any():
        return
    near = rows[~far]
    low = min(near["difference_low"].min(), near["seed_low"].min(), 0.0)
    high = max(near["difference_high"].max(), near["seed_high"].max(), 0.0)
    room = 0.12 * (high - low)
    figure.update_xaxes(range=[low - 3 * room, high + room])
    for name, difference in zip(rows["model"][far], rows["difference"][far], strict=True):
        said = f"◂ {difference:+.4f}".replace("-", "−")
        figure.add_annotation(
            **{"x": low - 3 * room, "y": name, "xanchor": "left", "xshift": 4},
            text=said,
            showarrow=False,
            bgcolor="white",
            font={"color": ORANGE},
        )


def _behind(figure: go.Figure, base: pd.Series, width: pd.Series, names: pd.Series, panel: int = 0) -> None:
    """Draw a grey band behind each row's marks."""
    place = {"row": panel, "col": 1} if panel else {}
    figure.add_bar(
        **{"base": base, "x": width, "y": names, "orientation": "h", "width": 0.6, "hoverinfo": "skip"},
        marker={"color": _BAND},
        **place,
    )


def _say(figure: go.Figure, names: pd.Series, words: pd.Series, low: float, high: float, panel: int) -> None:
    """Write each row's claim on the right of its panel, clear of the intervals."""
    room = 0.62 * (max(high, 0) - low)
    figure.update_xaxes(range=[low - 0.05 * room, max(high, 0) + room], row=panel, col=1)
    figure.add_vline(0, line={"color": INK, "width": 1}, row=panel, col=1)
    for name, said in zip(names, words, strict=True):
        figure.add_annotation(
            **{"x": max(high, 0) + 0.06 * room, "y": name, "xanchor": "left", "row": panel, "col": 1},
            text=said,
            showarrow=False,
            font={"color": _SAID.get(said, MUTED)},
        )


# The name of the records that each is made of, and the figure.
FIGURES: list[tuple[str, Callable[[pd.DataFrame], go.Figure]]] = [
    ("learning_curve", learning_curves),
    ("test_metrics", metric_comparison),
    ("comparison", comparison),
    ("validation_difference", ablation),
    ("equal_time", equal_time),
]
