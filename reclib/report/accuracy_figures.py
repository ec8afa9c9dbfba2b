"""Figures of accuracy: pure functions from a table of records to a `go.Figure`, as in `figures`."""

from __future__ import annotations

from textwrap import wrap
from typing import Any, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib.config import CONTROLS, CompileMode, Precision
from reclib.evaluate import statistics
from reclib.records import reference
from reclib.report.style import (
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PALETTE,
    TEMPLATE,
    bar,
    categories,
    extreme,
    interval,
    label_ends,
    line,
    log_axis,
    marker,
    model_colors,
    named,
    note,
    panels,
    sentence,
    words_beside,
)
from reclib.report.tables import ARM_NAMES, BASELINES, TASK_NAMES, model_name

MOST_COLORS = 4  # lines of a figure that can be told apart; all others are grey

FAR = 5  # medians of all differences, below which an arm stands at the edge of the axis

_BAND = "rgba(95,99,104,0.16)"  # of what lies behind the marks

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
    rows["claim"] = _claims(rows)
    shown = [metric for metric in _TITLES if (rows["metric"] == metric).any()]
    first = rows[rows["metric"] == shown[0]]
    order = list(first.sort_values("difference", ascending=False)["model"])
    figure = make_subplots(rows=len(shown), vertical_spacing=0.2)
    figure.update_layout(template=TEMPLATE, showlegend=False)
    for panel, metric in enumerate(shown, 1):
        mine = rows[rows["metric"] == metric]
        _claim_marks(figure, mine, mine["model"], {"row": panel, "col": 1})
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
    start = f"Against {rows['reference'].iloc[0]}, {_TITLES[shown[0]]} of {len(first)} models"
    return figure.update_layout(title_text=f"{start}: {_counted(first['claim'])}")


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
        **log_axis(rows["minutes"], most=9),
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
    enough = rows["seeds"] >= statistics.MIN_SEEDS
    corrected = "adjusted_p" in rows and bool(rows["adjusted_p"].notna().all())
    sure = (
        rows["adjusted_p"] < statistics.ALPHA
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
        + f"; band: range over seeds; grey: not separated, or fewer than {statistics.MIN_SEEDS} seeds",
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


def _claims(rows: pd.DataFrame) -> list[str]:
    """Return what may be claimed of each row."""
    numbers = rows[["difference", "adjusted_p", "seeds", "reference_seeds"]].to_numpy()
    return [statistics.claim(difference, p, seeds) for difference, p, *seeds in numbers]


def _counted(claims: pd.Series) -> str:
    """Return how many rows have which claim; where all have too few seeds, that nothing is claimed."""
    counts = claims.value_counts()
    if set(counts.index) == {"too few seeds"}:
        return f"no claim, with fewer than {statistics.MIN_SEEDS} seeds"
    words = {word: word for word in ("worse", "better", "not separated")} | {
        "too few seeds": "of too few seeds"
    }
    return ", ".join(f"{counts[claim]} {word}" for claim, word in words.items() if claim in counts)


def _claim_marks(figure: go.Figure, rows: pd.DataFrame, names: pd.Series, place: dict[str, int]) -> None:
    """Draw each row's difference with its interval, coloured by its claim, on what could not be shown."""
    _behind(figure, -rows["detectable"], 2 * rows["detectable"], names, place)
    for (kind, claim), some in rows.groupby(["kind", "claim"]):
        color = _SAID.get(str(claim), MUTED)
        figure.add_scatter(
            x=some["difference"],
            y=names[some.index],
            mode="markers",
            marker=marker(str(kind), color),
            error_x=interval(some, "difference", color),
            customdata=some[["adjusted_p", "detectable", "claim"]],
            hovertemplate="%{y}: %{x:+.4f}, %{customdata[2]}<br>adjusted p %{customdata[0]:.3f}, "
            "detectable %{customdata[1]:.4f}<extra></extra>",
            **place,
        )


def _behind(
    figure: go.Figure,
    base: pd.Series,
    width: pd.Series,
    names: pd.Series,
    place: dict[str, int] | None = None,
) -> None:
    """Draw a grey band behind each row's marks."""
    figure.add_bar(
        **{"base": base, "x": width, "y": names, "orientation": "h", "width": 0.6, "hoverinfo": "skip"},
        marker={"color": _BAND},
        **place or {},
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


# ------------------------------------------------------------------------------------------------
# Figures of what stands behind a table of accuracy: protocols, controls, whom it serves, and with what.
#
# Pure functions from a table of records to a `go.Figure`, as in `figures`.

_BASELINES = {model_name(name) for name in BASELINES}

_PUBLISHED = "seed study, published"

_ORDERS = {  # metric, symbol and name of each order of the histories
    "ndcg@10": ("circle", "true order"),
    "shuffled_but_last": ("diamond", "shuffled but for the last item"),
    "shuffled": ("x", "shuffled"),
}

_BELOW = {"x": 0, "xanchor": "left", "yref": "container", "y": 0.005, "yanchor": "bottom"}  # a legend

_BEYOND = {
    "coverage": "coverage",
    "gini": "Gini",
    "popularity_percentile": "popularity",
}


def rank_histogram(rows: pd.DataFrame) -> go.Figure:
    """Share of users by the rank of their target, by model."""
    rows = named(rows)
    figure = go.Figure(layout={"template": TEMPLATE})
    colors = model_colors(rows["model"].unique())
    for (model, kind), mine in rows.groupby(["model", "kind"], sort=False):
        low, high = mine["rank_low"], mine["rank_high"]
        spans = [str(a) if a == b else f"{a}–{b}" for a, b in zip(low, high, strict=True)]
        figure.add_bar(
            x=spans,
            y=mine["users"] / mine["users"].sum(),
            name=model if kind == "measured" else f"{model}, predicted",
            marker=bar(str(kind), colors[model]),
            hovertemplate="rank %{x}: %{y:.1%} of users<extra></extra>",
        )
    figure.update_xaxes(title_text="rank of the target among all items", type="category")
    figure.update_yaxes(title_text="share of users", tickformat=".0%")
    return figure.update_layout(showlegend=True, title_text="Where do the models rank the target?")


def protocols(rows: pd.DataFrame) -> go.Figure:
    """HR@10 of every model under each protocol, and what the seed study published, as what it is."""
    rows = _over_seeds(named(rows))
    order = list(dict.fromkeys(rows.sort_values("comparable", ascending=False, kind="stable")["protocol"]))
    models = sorted(rows["model"].unique(), key=lambda name: (name not in _BASELINES, name))
    shift = dict(zip(models, np.linspace(0.28, -0.28, len(models)) if len(models) > 1 else [0], strict=True))
    colors = model_colors(models)
    figure = go.Figure(layout={"template": TEMPLATE})
    for (model, kind, comparable), mine in rows.groupby(["model", "kind", "comparable"]):
        look = marker(str(kind), colors[model])
        look |= {"size": 7 if model in _BASELINES else 10}
        figure.add_scatter(
            x=mine["hr@10"],
            y=mine["protocol"].map(order.index) + shift[model],
            mode="markers",
            marker=look if comparable else look | {"symbol": "diamond-open"},
            error_x=interval(mine, "hr@10", colors[model]) | {"width": 0},
            customdata=mine["label"].map(lambda text: "<br>".join(wrap(text, 60))),
            hovertemplate=f"{model}: %{{x:.4f}}<br>%{{customdata}}<extra></extra>",
        )
    _published(figure, len(order))
    trained = {name: colors[name] for name in models if name not in _BASELINES}
    _legend(figure, trained | {"baselines (names on hover)": MUTED})
    names = ["<br>".join(wrap(name, 20)) for name in (*order, _PUBLISHED)]
    rule = {"color": MUTED, "width": 1, "dash": "dot"}
    figure.add_hline(len(order) - 0.5, line=rule)
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.4, -0.6], ticks=""
    )
    figure.update_xaxes(title_text="HR@10", range=[0, 1], tickformat=".1f")
    note(
        figure,
        "bar: 95 % interval over users; open diamonds: sampled or otherwise not comparable; last row: the "
        "seed study's own metric (all masked positions) on other data, published, no artefact in its "
        "repository",
    )
    figure.update_layout(height=200 + 58 * len(names))
    same = rows[~rows["other_training"] & ~rows["model"].isin(_BASELINES)]
    same = same if len(same) else rows
    span = same.groupby("model")["hr@10"].agg(["min", "max"])
    most = extreme(span.assign(moved=span["max"] - span["min"]).reset_index(), "moved")
    moved = f"from {most['min']:.2f} to {most['max']:.2f}"
    return figure.update_layout(title_text=f"The protocol alone moves HR@10 of {most['model']} {moved}")


def _over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per model and protocol: those of a training of their own come one for each seed.

    Ends of their intervals are averaged like the means, which is wider than the interval of the mean.
    """
    keys = ["model", "protocol", "label", "comparable", "kind"]
    found = rows.groupby(keys, sort=False)[["hr@10", "hr@10_low", "hr@10_high"]].mean()
    other = rows.groupby(keys, sort=False)["seed"].agg(lambda seeds: bool(seeds.notna().all()))
    return found.assign(other_training=other).reset_index()


def _published(figure: go.Figure, place: int) -> None:
    """Draw the seed study's figures, outlined and grey, in a row of their own."""
    runs = reference()["accuracy"]
    figure.add_scatter(
        x=[run["hr_at_10"] for run in runs],
        y=[place] * len(runs),
        mode="markers",
        marker={"symbol": "square-open", "size": 10, "color": MUTED, "line": {"color": MUTED, "width": 1.5}},
        customdata=[[run["name"], run["data"], run["source"]] for run in runs],
        hovertemplate="%{customdata[0]} on %{customdata[1]}: %{x:.4f}<br>published in its %{customdata[2]}, "
        "no artefact in its repository<extra></extra>",
        showlegend=False,
    )


def _legend(figure: go.Figure, colors: dict[Any, str]) -> None:
    """Name the colours under the figure."""
    figure.update_traces(showlegend=False)
    for name, color in colors.items():
        figure.add_scatter(x=[None], y=[None], mode="markers", marker={"color": color, "size": 9}, name=name)
    figure.update_layout(showlegend=True, legend=_BELOW, margin={"b": 95})


def shuffle_control(rows: pd.DataFrame) -> go.Figure:
    """NDCG@10 with histories in their order, shuffled but for the last item, and shuffled."""
    rows = named(rows).sort_values("ndcg@10", ascending=False)
    colors = model_colors(rows["model"])
    figure = go.Figure(layout={"template": TEMPLATE})
    for _, row in rows.iterrows():
        color = colors[row["model"]]
        figure.add_scatter(
            x=[row[key] for key in _ORDERS],
            y=[row["model"]] * len(_ORDERS),
            mode="lines+markers",
            line=line(row["kind"], color) | {"width": 1.5},
            marker=marker(row["kind"], color) | {"symbol": [_symbol(key, row["kind"]) for key in _ORDERS]},
            customdata=[
                [name, "" if key == "ndcg@10" else _change(row, key)] for key, (_, name) in _ORDERS.items()
            ],
            hovertemplate="%{y}, %{customdata[0]}: %{x:.4f}%{customdata[1]}<extra></extra>",
            showlegend=False,
        )
    for symbol, name in _ORDERS.values():
        look = {"symbol": symbol, "size": 9, "color": INK}
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=look, name=name)
    figure.update_layout(showlegend=True, legend=_BELOW, margin={"b": 95})
    note(figure, "means over users, full ranking; only the order of histories at test differs")
    categories(figure, list(rows["model"]))
    figure.update_xaxes(title_text="NDCG@10", rangemode="tozero")
    falls = rows[rows["shuffled_change_high"] < 0]
    title = "Order matters for none of the models: no loss from shuffling is separated from zero"
    if len(falls):
        share = falls.assign(share=-falls["shuffled_change"] / falls["ndcg@10"])
        most = extreme(share, "share")
        title = (
            f"Order matters for {len(falls)} of {len(rows)} models, most for {most['model']}: "
            f"shuffled it loses {most['share']:.0%}"
        )
    return figure.update_layout(title_text=title)


def _symbol(order: str, kind: str) -> str:
    return _ORDERS[order][0] + ("" if kind == "measured" else "-open")


def _change(row: pd.Series, order: str) -> str:
    change, low, high = (row[f"{order}_change{end}"] for end in ("", "_low", "_high"))
    return f"<br>change {change:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"


def groups(rows: pd.DataFrame) -> go.Figure:
    """HR@10 of users by history length, by how popular their target is and, with times, by its time."""
    rows = named(rows)
    means = rows.groupby("model")["hr@10"].mean()
    trained = [name for name in means.index if name not in _BASELINES]
    shown = [*trained, *means.drop(trained).sort_values().index[-1:]]  # with the best baseline
    colors = model_colors(means.index)
    titles = {"history": "by length of the history", "popularity": "by popularity of the target"}
    titles |= {"time": "by time of the target"} if (rows["by"] == "time").any() else {}
    figure = make_subplots(rows=len(titles), vertical_spacing=0.16 if len(titles) == 2 else 0.12)
    figure.update_layout(template=TEMPLATE)
    height = 0
    for panel, (by, title) in enumerate(titles.items(), 1):
        mine = rows[rows["by"] == by]
        order = list(dict.fromkeys(mine["group"]))
        height += len(order)
        _group_lines(figure, mine.assign(place=mine["group"].map(order.index)), shown, colors, panel)
        users = mine.groupby("group")["users"].first()
        names = [f"{_short(group)}<br>{users[group]:,} users" for group in order]
        figure.update_xaxes(title_text=f"HR@10 {title}", rangemode="tozero", row=panel, col=1)
        place = {"tickvals": list(range(len(order))), "ticktext": names, "range": [len(order) - 0.5, -0.5]}
        figure.update_yaxes(**place, ticks="", row=panel, col=1)
    note(
        figure,
        "history: interactions; popularity: shares of all interactions, most popular items first; bar: 95 % "
        "interval over users; thin grey lines: other baselines (names on hover)",
    )
    _legend(figure, {name: colors[name] for name in shown})
    figure.update_layout(height=100 + 100 * len(titles) + 46 * height)
    leader = max(shown, key=lambda name: means[name])
    part = rows[(rows["by"] == "popularity") & (rows["model"] == leader)]
    met = part[part["group"].map(_short) != "not in training"]  # no model can find what it never met
    first, last = met["hr@10"].iloc[0], met["hr@10"].iloc[-1]
    return figure.update_layout(
        title_text=sentence(
            f"{leader} finds {first:.0%} of the most popular targets, {last:.0%} of the rarest"
        )
    )


def _group_lines(
    figure: go.Figure, rows: pd.DataFrame, shown: list[str], colors: dict[Any, str], panel: int
) -> None:
    """Draw a line of groups for each model, with intervals for those that are shown by name."""
    for (model, kind), some in rows.groupby(["model", "kind"]):
        name, color = str(model), colors[str(model)]
        plain = name not in shown
        shift = 0.0 if plain else 0.12 * (shown.index(name) - (len(shown) - 1) / 2)
        figure.add_scatter(
            x=some["hr@10"],
            y=some["place"] + shift,
            mode="lines" if plain else "lines+markers",
            line=line(str(kind), color) | {"width": 1 if plain else 1.5},
            marker=marker(str(kind), color) | {"size": 7},
            opacity=0.45 if plain else 1,
            error_x=None if plain else interval(some, "hr@10", color) | {"width": 3},
            customdata=some[["group", "users"]],
            hovertemplate=f"{name}, %{{customdata[0]}} (%{{customdata[1]:,}} users): "
            "%{x:.3f}<extra></extra>",
            row=panel,
            col=1,
        )


def _short(group: str) -> str:
    """Return a group's name without what its axis says."""
    return group.removeprefix("items with ").removesuffix(" of interactions").removeprefix("items ")


def beyond_accuracy(rows: pd.DataFrame) -> go.Figure:
    """How much of the catalogue is recommended, how unequally, and how popular it is."""
    rows = named(rows).sort_values("coverage", ascending=False)
    colors = model_colors(rows["model"])
    figure = panels(len(_BEYOND), shared_yaxes=True, spacing=0.06)
    for column, (metric, title) in enumerate(_BEYOND.items(), 1):
        for _, row in rows.iterrows():
            figure.add_scatter(
                x=[row[metric]],
                y=[row["model"]],
                mode="markers",
                marker=marker(row["kind"], colors[row["model"]]),
                hovertemplate="%{y}: %{x:.3f}<extra></extra>",
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text=title, range=[-0.05, 1.05], nticks=4, row=1, col=column)
    categories(figure, list(rows["model"]), 30)
    k = int(rows["k"].iloc[0])
    note(
        figure,
        f"of the {k} items recommended to each user; coverage: share of the catalogue recommended to "
        "anybody; Gini: 0 all items alike, 1 all on few; popularity: mean percentile among the items",
    )
    most, least = extreme(rows, "coverage"), extreme(rows.assign(coverage=-rows["coverage"]), "coverage")
    return figure.update_layout(
        title_text=sentence(
            f"{most['model']} recommends {most['coverage']:.0%} of the catalogue, "
            f"{least['model']} {-least['coverage']:.0%}"
        )
    )


# ------------------------------------------------------------------------------------------------
# Figures of adapters: pure functions from a table of records to a `go.Figure`, as in `figures`.


DRAWN_USERS = 500  # in a figure of single users: more overlap, and make a notebook of megabytes

_MODES = list(get_args(CompileMode))


def accuracy_by_share(rows: pd.DataFrame) -> go.Figure:
    """NDCG@10 on the test windows against the share of the parameters that is trained, by task.

    Controls are left out: they stand where iLoRA stands, and `gate_comparison` is about them.
    """
    means = _tasks(rows[rows["seed"].isna() & ~rows["model"].isin(CONTROLS)])
    means = means.sort_values("model", key=lambda names: names.map(list(ARM_NAMES).index), kind="stable")
    tasks = list(dict.fromkeys(means["task_name"]))
    figure = panels(len(tasks), spacing=0.1)
    for column, task in enumerate(tasks, 1):
        mine = means[means["task_name"] == task]
        place = {"row": 1, "col": column}
        for (kind, model), some in mine[~mine["model"].isin(("none", "pairwise_counts"))].groupby(
            ["kind", "model"], sort=False
        ):
            color = _color(str(model))
            figure.add_scatter(
                x=100 * some["trained_share"],
                y=some["ndcg@10"],
                mode="markers",
                marker=marker(str(kind), color),
                error_y=interval(some, "ndcg@10", color) | {"thickness": 1.2, "width": 3},
                name=ARM_NAMES[str(model)],
                legendgroup=model,
                showlegend=column == 1,
                customdata=some[["trained", "saved_bytes"]],
                hovertemplate=f"{ARM_NAMES[str(model)]}: %{{y:.4f}}<br>%{{customdata[0]:,.0f}} trained, "
                "%{customdata[1]:,.0f} bytes saved<extra></extra>",
                **place,
            )
        base = mine[mine["model"] == "none"].iloc[0]
        figure.add_hline(base["ndcg@10"], line={"color": INK, "width": 1, "dash": "dot"}, **place)
        for value in mine.loc[mine["model"] == "pairwise_counts", "ndcg@10"]:  # trains nothing: no share
            figure.add_hline(value, line={"color": MUTED, "width": 1.5, "dash": "dash"}, **place)
        figure.update_xaxes(
            title_text=f"{task}: trained share (%, log scale)", type="log", dtick=1, tickformat="~g", **place
        )
        figure.update_yaxes(title_text="NDCG@10, full ranking", **place)
    first = means[means["task_name"] == tasks[0]]
    best = extreme(first, "ndcg@10")
    base = first[first["model"] == "none"].iloc[0]
    counted = "; dashed: pairwise counts" if (means["model"] == "pairwise_counts").any() else ""
    note(figure, f"dotted: no adaptation{counted}; bar: 95 % interval over users, each the mean over seeds")
    return figure.update_layout(
        showlegend=True,
        legend={"x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top", "orientation": "v"},
        height=440,
        title_text=f"Highest on the {tasks[0]}: {ARM_NAMES[best['model']]}, NDCG@10 {best['ndcg@10']:.4f}; "
        f"the base as it is {base['ndcg@10']:.4f}",
    )


def adaptation_gain(rows: pd.DataFrame) -> go.Figure:
    """Each arm's NDCG@10 minus that of the base as it is, paired by user."""
    return _differences(rows, "no adaptation")


def gate_comparison(rows: pd.DataFrame) -> go.Figure:
    """Each arm's NDCG@10 minus iLoRA's, paired by user: whether the user's gate is what helps."""
    return _differences(rows, "iLoRA")


def _differences(rows: pd.DataFrame, reference: str) -> go.Figure:
    rows = _tasks(rows[rows["metric"] == "ndcg@10"])
    rows["claim"] = _claims(rows)
    tasks = list(dict.fromkeys(rows["task_name"]))
    order = [ARM_NAMES[arm] for arm in ARM_NAMES if (rows["model"] == arm).any()]
    figure = panels(len(tasks), shared_yaxes=True, spacing=0.06)
    for column, task in enumerate(tasks, 1):
        mine = rows[rows["task_name"] == task]
        names = mine["model"].map(ARM_NAMES)
        place = {"row": 1, "col": column}
        _claim_marks(figure, mine, names, place)
        figure.add_vline(0, line={"color": INK, "width": 1}, **place)
        figure.update_xaxes(title_text=f"{task}: difference in NDCG@10", nticks=6, **place)
    categories(figure, order, 32)
    note(
        figure,
        "paired by user; bar: 95 % interval; green, orange: better, worse after Holm's correction; grey: not "
        "separated, or too few seeds; grey band: too small for these users to show (power 80 %)",
    )
    first = rows[rows["task_name"] == tasks[0]]
    said = _counted(first["claim"])
    return figure.update_layout(title_text=f"Against {reference}, {tasks[0]}: of {len(first)} arms {said}")


def adapter_cost(rows: pd.DataFrame) -> go.Figure:
    """Median step with quartiles, tensors at the peak, weights trained: by arm, precision, compile mode."""
    rows = rows[rows["status"] != "not applicable"] if "status" in rows else rows
    order = {"model": list(ARM_NAMES), "precision": list(get_args(Precision)), "compile_mode": _MODES}
    rows = rows.sort_values(
        list(order), key=lambda values: values.map(order[str(values.name)].index), kind="stable"
    )
    names = rows.apply(_variant, axis=1)
    figure = panels(3, shared_yaxes=True, spacing=0.05)
    timed = rows["step_seconds"].notna() if "step_seconds" in rows else pd.Series(False, rows.index)
    for (kind, model), some in rows[timed].groupby(["kind", "model"], sort=False):
        color, label = _color(str(model)), names[some.index]
        figure.add_scatter(
            x=1e3 * some["step_seconds"],
            y=label,
            mode="markers",
            marker=marker(str(kind), color),
            error_x=interval(some, "step_seconds", color, 1e3),
            hovertemplate="%{y}: %{x:.2f} ms<extra></extra>",
            row=1,
            col=1,
        )
        hover = "%{y}: %{x:,.4~g}<extra></extra>"
        figure.add_bar(
            **{"x": some["peak_tensor_bytes"] / 2**20, "y": label, "orientation": "h", "row": 1, "col": 2},
            marker=bar(str(kind), color),
            hovertemplate=hover,
        )
        figure.add_scatter(
            **{"x": some["trained_bytes"] / 2**10, "y": label, "mode": "markers", "row": 1, "col": 3},
            marker=marker(str(kind), color),
            hovertemplate=hover,
        )
    words_beside(figure, names[~timed], rows["status"][~timed].astype(str))
    figure.update_xaxes(title_text="median step, quartiles (ms)", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="tensors at the peak (MiB)", rangemode="tozero", row=1, col=2)
    figure.update_xaxes(title_text="trained weights (KiB, log scale)", row=1, col=3)
    figure.update_xaxes(**log_axis(rows["trained_bytes"] / 2**10, most=4), row=1, col=3)
    categories(figure, list(dict.fromkeys(names)), 34)
    return figure.update_layout(title_text=_cost_title(rows[timed]))


def _cost_title(timed: pd.DataFrame) -> str:
    ilora = timed[timed["model"] == "ilora"]
    if "over_ilora" in ilora:  # eager, in the first precision: the one that is not compared with itself
        ilora = ilora[ilora["over_ilora"].isna()]
    if ilora.empty or "over_lora" not in ilora or pd.isna(ilora["over_lora"].iloc[0]):
        return "What a step with adapters costs"
    one = ilora.iloc[0]
    low, high = one["over_lora_low"], one["over_lora_high"]
    said = f"A step of iLoRA takes {one['over_lora']:.2f} times LoRA's ({low:.2f} to {high:.2f})"
    return (
        said if pd.isna(one.get("over_full")) else f"{said}, {one['over_full']:.2f} times full fine-tuning's"
    )


def gate_by_user(rows: pd.DataFrame) -> go.Figure:
    """Every user's expert weights against what is known of the user; a menu chooses what."""
    task = rows["task"].iloc[0]
    rows = rows[rows["task"] == task]
    experts = [str(name) for name in rows if str(name).startswith("expert ")]
    features = _features(rows)
    spread = max(float(rows[expert].std()) for expert in experts)  # of all users, drawn or not
    users = len(rows)
    rows = rows.sample(min(users, DRAWN_USERS), random_state=0).sort_index()
    figure = go.Figure(layout={"template": TEMPLATE})
    for number, expert in enumerate(experts):
        figure.add_scatter(
            x=rows[features[0]],
            y=rows[expert],
            mode="markers",
            marker=marker(str(rows["kind"].iloc[0]), PALETTE[number % len(PALETTE)]) | {"size": 6},
            opacity=0.65,
            name=expert,
            hovertemplate=f"{expert}: %{{y:.3f}} at %{{x:.3g}}<extra></extra>",
        )
    figure.add_hline(1 / len(experts), line={"color": MUTED, "width": 1, "dash": "dot"})
    buttons: list[dict[str, Any]] = [
        {
            "label": name,
            "method": "update",
            "args": [{"x": [rows[name].tolist()] * len(experts)}, {"xaxis.title.text": name}],
        }
        for name in features
    ]
    figure.update_xaxes(title_text=features[0])
    figure.update_yaxes(title_text="weight of the expert")
    drawn = f"{len(rows):,} of {users:,} users drawn by chance, " if users > len(rows) else ""
    note(figure, f"{drawn}a mark a user and expert, one seed; dotted: all experts alike, as plain LoRA")
    where = TASK_NAMES[str(task)]
    return figure.update_layout(
        height=480,
        showlegend=True,
        updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": -0.16, "yanchor": "top"}],
        margin={"b": 110},
        title_text=f"Weights of an expert differ by {spread:.3f} (standard deviation) among users, {where}",
    )


def _features(rows: pd.DataFrame) -> list[str]:
    said = ("items in the history", "mean popularity", "last item", "NDCG@10 minus")
    return [str(name) for part in said for name in rows if part in str(name)]


def gate_correlations(rows: pd.DataFrame) -> go.Figure:
    """Spearman's correlation of each expert's weight with what is known of the user."""
    rows = rows[rows["task"] == rows["task"].iloc[0]]
    figure = go.Figure(layout={"template": TEMPLATE})
    for number, ((kind, expert), some) in enumerate(rows.groupby(["kind", "expert"])):
        figure.add_scatter(
            x=some["spearman"],
            y=some["feature"],
            mode="markers+text",
            text=np.where(some["adjusted_p"] < statistics.ALPHA, "*", ""),
            textposition="top center",
            marker=marker(str(kind), PALETTE[number % len(PALETTE)]),
            name=f"expert {expert}",
            customdata=some["adjusted_p"],
            hovertemplate="%{y}: %{x:+.3f}, adjusted p %{customdata:.3f}",
        )
    figure.add_vline(0, line={"color": INK, "width": 1})
    figure.update_xaxes(title_text="Spearman's correlation over users", range=[-1.05, 1.05])
    categories(figure, sorted(set(rows["feature"])), 44)
    note(figure, "*: below 5 % after Holm's correction. That a gate follows something says not that it helps")
    top = rows.iloc[int(rows["spearman"].abs().to_numpy().argmax())]
    pair = f"the weight of expert {top['expert']} and {top['feature']}"
    return figure.update_layout(showlegend=True, title_text=f"Strongest: {pair}, {top['spearman']:+.2f}")


def _tasks(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(task_name=rows["task"].map(TASK_NAMES))


def _color(model: str) -> str:
    if model in CONTROLS:
        return MUTED
    return dict(zip(("ilora", "full", "lora", "gated", "head", "bias"), PALETTE, strict=True)).get(model, INK)


def _variant(row: pd.Series) -> str:
    mode = "eager" if row["compile_mode"] == "off" else row["compile_mode"]
    return f"{ARM_NAMES[row['model']]}, {row['precision']}, {mode}"
