"""Figures of what stands behind a table of accuracy: protocols, controls, whom it serves, and with what.

Pure functions from a table of records to a `go.Figure`, as in `figures`.
"""

from __future__ import annotations

from collections.abc import Callable
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reclib.look import INK, MUTED, TEMPLATE, bar, line, marker
from reclib.marks import (
    categories,
    extreme,
    interval,
    model_colors,
    named,
    note,
    panels,
    sentence,
)
from reclib.speed_figures import reference
from reclib.tables import BASELINES, model_name

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


# The name of the records that each is made of, and the figure.
FIGURES: list[tuple[str, Callable[[pd.DataFrame], go.Figure]]] = [
    ("rank_histogram", rank_histogram),
    ("protocol", protocols),
    ("shuffle_control", shuffle_control),
    ("groups", groups),
    ("beyond_accuracy", beyond_accuracy),
]
