"""Figures of data, of accuracy and of adapters: pure functions from a table of records to a `go.Figure`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib.config import CONTROLS, CompileMode, Precision
from reclib.evaluate import statistics
from reclib.records import reference
from reclib.report import style
from reclib.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PALETTE, at, interval, marker, panels, single
from reclib.report.tables import ARM_NAMES, BASELINES, TASK_NAMES, model_name

MOST_COLORS = 4  # coloured lines of a figure; all others are grey
FAR = 5  # an arm this many medians below zero is written at the edge of the axis
_ZERO = {"color": INK, "width": 1}  # the line of no difference
_CLAIMED: dict[Any, str] = {"better": GREEN, "worse": ORANGE}  # colour of a claim; of all others: grey
_TITLES = {"hr@10": "HR@10", "ndcg@10": "NDCG@10", "mrr": "MRR"}
_BASELINES = {model_name(name) for name in BASELINES}
_ORDERS = {  # symbol and name of each order of the histories, by metric
    "ndcg@10": ("circle", "true order"),
    "shuffled_but_last": ("diamond", "shuffled but for the last item"),
    "shuffled": ("x", "shuffled"),
}
_BEYOND = {"coverage": "coverage", "gini": "Gini", "popularity_percentile": "popularity"}
_ARMS = ("ilora", "full", "lora", "gated", "head", "bias")
_ARM_COLORS: dict[Any, str] = dict(zip(_ARMS, PALETTE, strict=True)) | dict.fromkeys(CONTROLS, MUTED)


# -- data ----------------------------------------------------------------------------------------------------


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
    figure.update_xaxes(title_text="interactions of a user (log scale)", **style.log_axis(edges, most=9))
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
        update(**style.log_axis(rows[name]), **left)
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
    look |= {"text": share.map("{:.1%}".format), "textposition": "outside", "cliponaxis": False}
    figure.bars(rows, names, share, BLUE, "%{x} items: %{customdata:,} users (%{y:.2%})", **look)
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


# -- models --------------------------------------------------------------------------------------------------


def learning_curves(rows: pd.DataFrame) -> go.Figure:
    """Training loss and validation NDCG@10 by epoch: a line per model and seed, coloured by model."""
    rows = style.named(rows)
    best = rows.groupby(["model", "seed"], dropna=False)["valid_ndcg@10"].max().groupby("model").mean()
    order = list(best.sort_values(ascending=False).index)
    colors = style.model_colors(order[:MOST_COLORS])
    figure = panels(rows=2, vertical=0.06, shared_xaxes=True).update_layout(height=560)
    runs = rows.groupby(["model", "kind", "seed"], sort=True, dropna=False)
    few = len(runs) < 3
    for (model, _, seed), run in runs:
        for panel, measured in enumerate(["train_loss", "valid_ndcg@10"], 1):
            points = run.dropna(subset=[measured])
            look: dict[str, Any] = {"marker": {"size": 5}, "line": {"width": 2 if few else 1.3}}
            look["mode"] = "lines+markers" if few and len(points) < 40 else "lines"
            hover, values = f"{model}, seed {seed}, epoch %{{x}}: %{{y:.4f}}", points[measured]
            color = colors.get(model, MUTED)
            figure.path(run, points["epoch"], values, color, hover, **look, **at(panel, 1))
    last_epoch = rows["epoch"].max()
    if len(order) > 1:
        seeds = rows.loc[rows["model"] == order[0], "seed"].nunique()
        mean = f", mean of {seeds} seeds" if seeds > 1 else ""
        title = style.sentence(f"{order[0]} is best on validation: NDCG@10 {best.max():.3f}{mean}")
        scored = rows.dropna(subset=["valid_ndcg@10"]).sort_values("epoch")
        last = scored.groupby(["model", "seed"], dropna=False).tail(1).groupby("model")["valid_ndcg@10"]
        ends = last.mean().loc[order[:MOST_COLORS]]
        right = pd.Series(last_epoch, ends.index)
        figure.label_ends(right, ends, colors, rows["valid_ndcg@10"].max(), 2)
    else:
        top = style.extreme(rows, "valid_ndcg@10")
        epoch, value = top["epoch"], top["valid_ndcg@10"]
        title = f"NDCG@10 on validation is best after {epoch:.0f} epochs"
        arrow = {"showarrow": None, "ax": -20, "ay": 50, "bgcolor": "white"}
        figure.text(f"best {value:.4f}", epoch, value, **arrow, **at(2, 1))
    figure.update_xaxes(range=[0, 1.03 * last_epoch])
    figure.update_xaxes(title_text="epoch (passes over the users)", **at(2, 1))
    figure.update_yaxes(title_text="training loss (nats per target)", **at(1, 1))
    figure.update_yaxes(title_text="NDCG@10 on validation", rangemode="tozero", **at(2, 1))
    return figure.update_layout(title_text=title)


def comparison(rows: pd.DataFrame) -> go.Figure:
    """Every model's difference from the reference, paired by user, with its interval and its claim."""
    rows = _with_claims(style.named(rows[rows["against"] == rows["against"].iloc[0]]))
    metrics = [metric for metric in _TITLES if (rows["metric"] == metric).any()]
    first = rows[rows["metric"] == metrics[0]]
    order = list(first.sort_values("difference", ascending=False)["model"])
    figure = panels(rows=len(metrics), vertical=0.2)
    for panel, metric in enumerate(metrics, 1):
        part, place = rows[rows["metric"] == metric], at(panel, 1)
        _claim_marks(figure, part, part["model"], place)
        # Claims stand on the right, clear of the intervals.
        low = min(part["difference_low"].min(), 0)
        high = max(part["difference_high"].max(), part["detectable"].max(), 0)
        room = 0.3 * (high - low)
        figure.update_xaxes(range=[low - 0.05 * room, high + room], **place)
        figure.add_vline(0, line=_ZERO, **place)
        for name, claim in zip(part["model"], part["claim"], strict=True):
            color = _CLAIMED.get(claim, MUTED)
            figure.text(claim, high + 0.06 * room, name, color, xanchor="left", **place)
        figure.update_xaxes(title_text=f"difference in {_TITLES[metric]}", nticks=7, **place)
    figure.categories(order)
    figure.update_layout(height=140 + len(metrics) * (75 + 30 * len(order)))
    figure.note(
        "paired by user; bar: 95 % interval; words: p corrected for all rows (Holm); grey band: too small "
        "for these users to show (power 80 %)"
    )
    start = f"Against {model_name(rows['against'].iloc[0])}, {_TITLES[metrics[0]]} of {len(first)} models"
    return figure.update_layout(title_text=f"{start}: {_counted(first['claim'])}")


def equal_time(rows: pd.DataFrame) -> go.Figure:
    """Validation NDCG@10 against minutes of processor time, one line per model, with intervals over users."""
    rows = style.named(rows).sort_values("minutes", kind="stable")
    last = rows.groupby("model").tail(1).set_index("model").sort_values("ndcg@10", ascending=False)
    colors = style.model_colors(last.index)
    figure = single(showlegend=False)
    for (model, kind), part in rows.groupby(["model", "kind"]):
        color, hover = colors[model], f"{model}, %{{x:.3g}} min: %{{y:.4f}}"
        look = {"mode": "lines+markers", "marker": marker(kind, color) | {"size": 7}}
        ends = interval(part, "ndcg@10", color, thickness=1.2, width=4)
        figure.path(part, "minutes", "ndcg@10", color, hover, error_y=ends, **look)
    figure.label_ends(np.log10(last["minutes"]), last["ndcg@10"], colors, rows["ndcg@10"].max())
    first, end = np.log10([rows["minutes"].min(), rows["minutes"].max()])
    axis: dict[str, Any] = {"range": [first - 0.08, end + 0.04]}  # else the names at the ends widen it
    axis |= style.log_axis(rows["minutes"], most=9)
    figure.update_xaxes(title_text="minutes of processor time per thread (log scale)", **axis)
    figure.update_yaxes(title_text="NDCG@10 on validation, full ranking", rangemode="tozero")
    values, low, high = (
        rows.pivot_table(index="minutes", columns="model", values=f"ndcg@10{end}").dropna(thresh=2)
        for end in ("", "_low", "_high")
    )
    if values.empty:
        return figure.update_layout(title_text=f"NDCG@10 of {last.index[0]}: {last['ndcg@10'].iloc[0]:.3f}")
    final = values.iloc[-1].dropna().sort_values(ascending=False)
    first, second = final.index[:2]
    apart = low[first] > high.drop(columns=first).max(axis=1)  # by the intervals of all others
    when = "at every time" if apart.all() else f"after {values.index[-1]:.3g} minutes"
    title = f"{first} leads {when}: in the end {final.iloc[0]:.3f} against {final.iloc[1]:.3f}"
    if not apart.iloc[-1]:
        title = f"{first} is not told apart from {second} {when}"
    return figure.update_layout(title_text=style.sentence(title))


def ablation(rows: pd.DataFrame) -> go.Figure:
    """Change of NDCG@10 on validation by each change to the base arm, paired by user."""
    rows = style.named(rows).sort_values("difference", ascending=False)
    rows["model"] = rows["model"].map(lambda name: style.broken(name, 26))
    figure = single(showlegend=False)
    _behind(figure, rows["seed_low"], rows["seed_high"] - rows["seed_low"], rows["model"])
    enough, up = rows["seeds"] >= statistics.MIN_SEEDS, rows["difference"] > 0
    corrected = bool(style.column(rows, "adjusted_p").notna().all())
    sure = (rows["difference_low"] > 0) | (rows["difference_high"] < 0)
    sure = rows["adjusted_p"] < statistics.ALPHA if corrected else sure
    helps, hurts = enough & sure & up, enough & sure & (rows["difference"] < 0)
    effect = np.select([helps, hurts], ["better", "worse"], "not separated")
    hover = "%{y}: %{x:+.4f}<br>NDCG@10 %{customdata[0]:.4f}, %{customdata[1]:.0f} seeds"
    hover += ", adjusted p %{customdata[2]:.3f}" if corrected else ""
    for (_, claim), part in rows.groupby(["kind", effect]):
        color, data = _CLAIMED.get(claim, MUTED), part.reindex(columns=["value", "seeds", "adjusted_p"])
        ends = interval(part, "difference", color)
        figure.dots(part, "difference", "model", color, hover, error_x=ends, customdata=data)
    base = model_name(rows["against"].iloc[0])
    figure.update_xaxes(title_text="change of NDCG@10", tickformat="+.3~f", nticks=7)
    figure.add_vline(0, line=_ZERO)
    figure.categories(list(rows["model"]), 40)
    _far_off(figure, rows)
    over = " and seeds; colour: p below .05 corrected for all arms (Holm)"
    over = over if corrected else ", not corrected for the number of arms"
    figure.note(
        f"0: {base}, NDCG@10 {rows['base'].iloc[0]:.4f} on validation; bar: 95 % interval over users{over}; "
        f"band: range over seeds; grey: not separated, or fewer than {statistics.MIN_SEEDS} seeds"
    )
    title = f"Of {len(rows)} changes to “{base}”, {helps.sum()} raise NDCG@10, {hurts.sum()} lower it"
    if not enough.any():
        title = f"{len(rows)} changes to “{base}”, of fewer seeds than a claim needs"
    return figure.update_layout(title_text=title)


def _far_off(figure: style.Chart, rows: pd.DataFrame) -> None:
    """Cut the axis at arms far below the others, and write their values at its edge."""
    far = rows["difference"] < -FAR * rows["difference"].abs().median()
    if not far.any():
        return
    near = rows[~far]
    low = min(near["difference_low"].min(), near["seed_low"].min(), 0.0)
    high = max(near["difference_high"].max(), near["seed_high"].max(), 0.0)
    room = 0.12 * (high - low)
    figure.update_xaxes(range=[low - 3 * room, high + room])
    for name, difference in zip(rows["model"][far], rows["difference"][far], strict=True):
        text = f"◂ {difference:+.4f}".replace("-", "−")
        figure.text(text, low - 3 * room, name, ORANGE, xanchor="left", xshift=4, bgcolor="white")


def _with_claims(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with their claims."""
    numbers = rows[["difference", "adjusted_p", "seeds", "reference_seeds"]].to_numpy()
    claims = [statistics.claim(difference, p, seeds) for difference, p, *seeds in numbers]
    return rows.assign(claim=claims)


def _counted(claims: pd.Series) -> str:
    """Return the number of rows by claim as a text; "no claim" if all have too few seeds."""
    counts = claims.value_counts()
    if set(counts.index) == {"too few seeds"}:
        return f"no claim, with fewer than {statistics.MIN_SEEDS} seeds"
    words = {word: word for word in ("worse", "better", "not separated")}
    words |= {"too few seeds": "of too few seeds"}
    return ", ".join(f"{counts[claim]} {word}" for claim, word in words.items() if claim in counts)


def _claim_marks(figure: style.Chart, rows: pd.DataFrame, names: pd.Series, place: dict[str, Any]) -> None:
    """Draw each row's difference with its interval, coloured by its claim, on a band of undetectable ones."""
    _behind(figure, -rows["detectable"], 2 * rows["detectable"], names, **place)
    hover = "%{y}: %{x:+.4f}, %{customdata[2]}<br>adjusted p %{customdata[0]:.3f}, "
    hover += "detectable %{customdata[1]:.4f}"
    for (_, claim), part in rows.groupby(["kind", "claim"]):
        color = _CLAIMED.get(claim, MUTED)
        trace: dict[str, Any] = {"error_x": interval(part, "difference", color)}
        trace |= {"customdata": part[["adjusted_p", "detectable", "claim"]]}
        figure.dots(part, "difference", names[part.index], color, hover, **trace, **place)


def _behind(figure: style.Chart, base: pd.Series, width: pd.Series, names: pd.Series, **place: Any) -> None:
    """Draw a grey band behind each row's marks."""
    look = {"width": 0.6, "hoverinfo": "skip", "marker": {"color": "rgba(95,99,104,0.16)"}}
    figure.add_bar(base=base, x=width, y=names, orientation="h", **look, **place)


# -- behind the accuracy: protocols, controls, groups of users, recommended items ----------------------------


def protocols(rows: pd.DataFrame) -> go.Figure:
    """HR@10 of every model under each protocol, and the published values of the seed study."""
    rows = _over_seeds(style.named(rows))
    order = list(dict.fromkeys(rows.sort_values("comparable", ascending=False, kind="stable")["protocol"]))
    models = sorted(rows["model"].unique(), key=lambda name: (name not in _BASELINES, name))
    shift = dict(zip(models, np.linspace(0.28, -0.28, len(models)) if len(models) > 1 else [0], strict=True))
    figure, colors = single(), style.model_colors(models)
    for (model, _, comparable), part in rows.groupby(["model", "kind", "comparable"]):
        places = part["protocol"].map(order.index) + shift[model]
        look: dict[str, Any] = {"size": 7 if model in _BASELINES else 10}
        look |= {} if comparable else {"symbol": "diamond-open"}
        trace: dict[str, Any] = {"marker": look, "error_x": interval(part, "hr@10", colors[model], width=0)}
        trace |= {"customdata": part["label"].map(lambda text: style.broken(text, 60))}
        hover = f"{model}: %{{x:.4f}}<br>%{{customdata}}"
        figure.dots(part, "hr@10", places, colors[model], hover, **trace)
    published = pd.DataFrame(reference()["accuracy"])
    look = {"symbol": "square-open", "size": 10, "color": MUTED, "line": {"color": MUTED, "width": 1.5}}
    origins = published[["name", "data", "source"]].to_numpy().tolist()
    hover = "%{customdata[0]} on %{customdata[1]}: %{x:.4f}<br>published in its %{customdata[2]}, "
    hover += "no artefact in its repository<extra></extra>"
    marks = {"mode": "markers", "marker": look, "customdata": origins, "hovertemplate": hover}
    places = [len(order)] * len(published)
    figure.add_scatter(x=list(published["hr_at_10"]), y=places, showlegend=False, **marks)
    trained = {name: colors[name] for name in models if name not in _BASELINES}
    _legend(figure, trained | {"baselines (names on hover)": MUTED})
    names = [style.broken(name, 20) for name in (*order, "seed study, published")]
    figure.add_hline(len(order) - 0.5, line={"color": MUTED, "width": 1, "dash": "dot"})
    _rows(figure, names, 0.6)
    figure.update_xaxes(title_text="HR@10", range=[0, 1], tickformat=".1f")
    figure.note(
        "bar: 95 % interval over users; open diamonds: sampled or otherwise not comparable; last row: the "
        "seed study's own metric (all masked positions) on other data, published, no artefact in its "
        "repository"
    )
    figure.update_layout(height=200 + 58 * len(names))
    same = rows[~rows["other_training"] & ~rows["model"].isin(_BASELINES)]
    span = (same if len(same) else rows).groupby("model")["hr@10"].agg(["min", "max"])
    most = style.extreme(span.assign(moved=span["max"] - span["min"]).reset_index(), "moved")
    moved = f"from {most['min']:.2f} to {most['max']:.2f}"
    return figure.update_layout(title_text=f"The protocol alone moves HR@10 of {most['model']} {moved}")


def _over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per model and protocol, averaging the seeds of models trained for that protocol.

    Ends of intervals are averaged too, which is wider than the interval of the mean.
    """
    parts = rows.groupby(["model", "protocol", "label", "comparable", "kind"], sort=False)
    other = parts["seed"].agg(lambda seeds: bool(seeds.notna().all()))
    return parts[["hr@10", "hr@10_low", "hr@10_high"]].mean().assign(other_training=other).reset_index()


def _rows(figure: style.Chart, names: list[str], room: float, **place: Any) -> None:
    """Label the rows 0, 1, ... of a numeric y axis, the first on top."""
    ticks = {"tickvals": list(range(len(names))), "ticktext": names}
    figure.update_yaxes(**ticks, range=[len(names) - 1 + room, -room], ticks="", **place)


def _legend(figure: style.Chart, colors: dict[Any, str]) -> None:
    """Add a legend of colours under the figure."""
    figure.update_traces(showlegend=False)
    _below(figure, {name: {"color": color, "size": 9} for name, color in colors.items()})


def _below(figure: style.Chart, looks: dict[Any, dict[str, Any]]) -> None:
    """Add a legend of marks under the figure."""
    for name, look in looks.items():
        figure.add_scatter(x=[None], y=[None], mode="markers", marker=look, name=name)
    figure.update_layout(showlegend=True, legend=style.BELOW, margin={"b": 95})


def shuffle_control(rows: pd.DataFrame) -> go.Figure:
    """NDCG@10 with histories in true order, shuffled except for the last item, and shuffled."""
    rows = style.named(rows).sort_values("ndcg@10", ascending=False)
    figure, colors = single(), style.model_colors(rows["model"])
    for row in rows.to_dict("records"):
        color, end = colors[row["model"]], "" if row["kind"] == "measured" else "-open"
        symbols = [symbol + end for symbol, _ in _ORDERS.values()]
        changes = [[name, _change(row, key)] for key, (_, name) in _ORDERS.items()]
        look: dict[str, Any] = {"marker": marker(row["kind"], color) | {"symbol": symbols}}
        look |= {"mode": "lines+markers", "line": {"width": 1.5}}
        look |= {"customdata": changes, "showlegend": False}
        values, names = [row[key] for key in _ORDERS], [row["model"]] * len(_ORDERS)
        hover = "%{y}, %{customdata[0]}: %{x:.4f}%{customdata[1]}"
        figure.path(row["kind"], values, names, color, hover, **look)
    _below(figure, {name: {"symbol": symbol, "size": 9, "color": INK} for symbol, name in _ORDERS.values()})
    figure.note("means over users, full ranking; only the order of histories at test differs")
    figure.categories(list(rows["model"]))
    figure.update_xaxes(title_text="NDCG@10", rangemode="tozero")
    falls = rows[rows["shuffled_change_high"] < 0]
    title = "Order matters for none of the models: no loss from shuffling is separated from zero"
    if len(falls):
        most = style.extreme(falls.assign(share=-falls["shuffled_change"] / falls["ndcg@10"]), "share")
        title = f"Order matters for {len(falls)} of {len(rows)} models, most for {most['model']}: "
        title += f"shuffled it loses {most['share']:.0%}"
    return figure.update_layout(title_text=title)


def _change(row: dict[Any, Any], order: str) -> str:
    if order == "ndcg@10":
        return ""
    change, low, high = (row[f"{order}_change{end}"] for end in ("", "_low", "_high"))
    return f"<br>change {change:+.4f} (95 % interval {low:+.4f} to {high:+.4f})"


def groups(rows: pd.DataFrame) -> go.Figure:
    """HR@10 of users by history length, by popularity of the target and, with times, by its time."""
    rows = style.named(rows)
    means = rows.groupby("model")["hr@10"].mean()
    trained = [name for name in means.index if name not in _BASELINES]
    named = [*trained, *means.drop(trained).sort_values().index[-1:]]  # with the best baseline
    colors = style.model_colors(means.index)
    titles = {"history": "by length of the history", "popularity": "by popularity of the target"}
    titles |= {"time": "by time of the target"} if (rows["by"] == "time").any() else {}
    figure = panels(rows=len(titles), vertical=0.16 if len(titles) == 2 else 0.12, legend=True)
    height = 0
    for panel, (by, title) in enumerate(titles.items(), 1):
        part = rows[rows["by"] == by]
        order = list(dict.fromkeys(part["group"]))
        height += len(order)
        _group_lines(figure, part.assign(place=part["group"].map(order.index)), named, colors, panel)
        users = part.groupby("group")["users"].first()
        figure.update_xaxes(title_text=f"HR@10 {title}", rangemode="tozero", **at(panel, 1))
        names = [f"{_short(group)}<br>{users[group]:,} users" for group in order]
        _rows(figure, names, 0.5, **at(panel, 1))
    figure.note(
        "history: interactions; popularity: shares of all interactions, most popular items first; bar: 95 % "
        "interval over users; thin grey lines: other baselines (names on hover)"
    )
    _legend(figure, {name: colors[name] for name in named})
    figure.update_layout(height=100 + 100 * len(titles) + 46 * height)
    leader = max(named, key=lambda name: means[name])
    part = rows[(rows["by"] == "popularity") & (rows["model"] == leader)]
    findable = part[part["group"].map(_short) != "not in training"]
    first, last = findable["hr@10"].iloc[0], findable["hr@10"].iloc[-1]
    title = f"{leader} finds {first:.0%} of the most popular targets, {last:.0%} of the rarest"
    return figure.update_layout(title_text=style.sentence(title))


def _group_lines(
    figure: style.Chart, rows: pd.DataFrame, named: list[str], colors: dict[Any, str], panel: int
) -> None:
    """Draw a line over the groups for each model, with intervals for the `named` ones."""
    for (name, kind), part in rows.groupby(["model", "kind"]):
        color, shift, ends = colors[name], 0.0, None
        look: dict[str, Any] = {"mode": "lines", "line": {"width": 1}, "opacity": 0.45}
        if name in named:
            look = {"mode": "lines+markers", "line": {"width": 1.5}, "opacity": 1}
            shift = 0.12 * (named.index(name) - (len(named) - 1) / 2)
            ends = interval(part, "hr@10", color, width=3)
        look |= {"marker": marker(kind, color) | {"size": 7}, "customdata": part[["group", "users"]]}
        hover = f"{name}, %{{customdata[0]}} (%{{customdata[1]:,}} users): %{{x:.3f}}"
        places = part["place"] + shift
        figure.path(part, "hr@10", places, color, hover, error_x=ends, **look, **at(panel, 1))


def _short(group: str) -> str:
    """Return a group's name without the words of its axis title."""
    return group.removeprefix("items with ").removesuffix(" of interactions").removeprefix("items ")


def beyond_accuracy(rows: pd.DataFrame) -> go.Figure:
    """Coverage of the catalogue, Gini coefficient and popularity of the recommended items."""
    rows = style.named(rows).sort_values("coverage", ascending=False)
    figure, colors = panels(len(_BEYOND), spacing=0.06, shared_yaxes=True), style.model_colors(rows["model"])
    for panel, (metric, title) in enumerate(_BEYOND.items(), 1):
        for model, kind, value in zip(rows["model"], rows["kind"], rows[metric], strict=True):
            figure.dots(kind, [value], [model], colors[model], "%{y}: %{x:.3f}", **at(1, panel))
        figure.update_xaxes(title_text=title, range=[-0.05, 1.05], nticks=4, **at(1, panel))
    figure.categories(list(rows["model"]), 30)
    figure.note(
        f"of the {int(rows['k'].iloc[0])} items recommended to each user; coverage: share of the catalogue "
        "recommended to anybody; Gini: 0 all items alike, 1 all on few; popularity: mean percentile among "
        "the items"
    )
    most, least = rows.iloc[0], rows.iloc[-1]
    title = f"{most['model']} recommends {most['coverage']:.0%} of the catalogue, "
    title += f"{least['model']} {least['coverage']:.0%}"
    return figure.update_layout(title_text=style.sentence(title))


def tie_rules(rows: pd.DataFrame) -> go.Figure:
    """NDCG@10 on the test split under each rule for the order of ties, a panel for each dataset.

    `rows` are those of `tables.tie_rules`. Test targets differ between rules. Data with merged variants of a
    product have a row of their own.
    """
    names = {"source": "order of the file", "item": "by item id", "shuffle": "shuffled"}
    rows = style.named(rows).assign(rule=rows["ties"].map(names))
    if "merge_variants" in rows:
        rows.loc[rows["merge_variants"].eq(True), "rule"] = "variants merged"
    datasets, colors = list(dict.fromkeys(rows["dataset"])), style.model_colors(rows["model"])
    colors |= dict(zip(sorted(_BASELINES & {*colors}), (MUTED, INK), strict=False))
    figure = panels(len(datasets), spacing=0.06, shared_yaxes=True, subplot_titles=datasets)
    for (dataset, model), part in rows.groupby(["dataset", "model"]):
        place, color = at(1, datasets.index(dataset) + 1), colors[model]
        trace = {"error_x": interval(part, "ndcg@10", color, width=0), "customdata": part[["model", "hr@10"]]}
        hover = "%{customdata[0]}, %{y}: %{x:.4f} (HR@10 %{customdata[1]:.4f})"
        figure.dots(part, "ndcg@10", "rule", color, hover, **trace, **place)
    figure.update_xaxes(title_text="NDCG@10 on test", rangemode="tozero", nticks=5)
    _legend(figure, colors)
    rules = [name for name in (*names.values(), "variants merged") if name in set(rows["rule"])]
    figure.categories(rules, 56)
    figure.update_layout(height=420, margin={"b": 110})
    text = "Interactions at one time in each order; shuffled: a mark for each seed; bar: 95 % over users"
    figure.note(text)
    counts = rows[(rows["model"] == model_name("pairwise_counts")) & (rows["rule"] != "variants merged")]
    span = counts.groupby("dataset")["ndcg@10"].agg(["min", "max"])
    text = ", ".join(f"{high / low - 1:.0%} on {name}" for name, low, high in span.itertuples())
    return figure.update_layout(title_text=f"The order of ties moves NDCG@10 of pairwise counts by {text}")


# -- adapters ------------------------------------------------------------------------------------------------


def adaptation_gain(rows: pd.DataFrame) -> go.Figure:
    """Each arm's NDCG@10 minus that of the base without adaptation, paired by user."""
    return _differences(rows, "no adaptation")


def gate_comparison(rows: pd.DataFrame) -> go.Figure:
    """Each arm's NDCG@10 minus that of iLoRA, paired by user."""
    return _differences(rows, "iLoRA")


def _differences(rows: pd.DataFrame, against: str) -> go.Figure:
    rows = _with_claims(rows[rows["metric"] == "ndcg@10"])
    rows = rows.assign(task_name=rows["task"].map(TASK_NAMES))
    tasks = list(dict.fromkeys(rows["task_name"]))
    figure = panels(len(tasks), spacing=0.06, shared_yaxes=True)
    for panel, task in enumerate(tasks, 1):
        part, place = rows[rows["task_name"] == task], at(1, panel)
        _claim_marks(figure, part, part["model"].map(ARM_NAMES), place)
        figure.add_vline(0, line=_ZERO, **place)
        figure.update_xaxes(title_text=f"{task}: difference in NDCG@10", nticks=6, **place)
    figure.categories([ARM_NAMES[arm] for arm in ARM_NAMES if (rows["model"] == arm).any()], 32)
    figure.note(
        "paired by user; bar: 95 % interval; green, orange: better, worse after Holm's correction; grey: not "
        "separated, or too few seeds; grey band: too small for these users to show (power 80 %)"
    )
    claims = rows.loc[rows["task_name"] == tasks[0], "claim"]
    title = f"Against {against}, {tasks[0]}: of {len(claims)} arms {_counted(claims)}"
    return figure.update_layout(title_text=title)


def implanted(rows: pd.DataFrame) -> go.Figure:
    """NDCG@10 of each arm by the share of items with the signal, beside popularity and the rule itself."""
    known = rows["model"].isna()  # of `implanted_ceiling`
    arms, ceiling = _with_claims(rows[~known]).sort_values("share"), rows[known].sort_values("share")
    ilora = arms.drop_duplicates("share")
    lines = {"iLoRA": (ilora, "reference_ndcg@10", _ARM_COLORS["ilora"], "circle")}
    for arm, color in (("lora", ORANGE), ("shuffled_user", GREEN), ("none", MUTED)):
        lines[ARM_NAMES[arm]] = (arms[arms["model"] == arm], "ndcg@10", color, "circle")
    lines["the rule, known"] = (ceiling, "the rule", INK, "diamond")
    lines["popularity"] = (ceiling, "popularity", INK, "x")
    figure = panels(legend=True)
    for name, (part, column, color, symbol) in lines.items():
        if len(part):
            look = {"name": name, "mode": "lines+markers", "marker": {"symbol": symbol, "size": 8}}
            figure.path(part, "share", column, color, f"{name}, %{{x:.0%}}: %{{y:.4f}}", **look)
    claims_by_share = arms[arms["model"] != "none"].groupby("share")["claim"]
    seen = claims_by_share.agg(lambda claims: set(claims) == {"worse"})
    text = f"is seen from {seen.idxmax():.0%} of items on" if seen.any() else "is not seen"
    if (arms["claim"] == "too few seeds").any():
        text = f"would be seen or not: no claim, with fewer than {statistics.MIN_SEEDS} seeds"
    figure.update_xaxes(title_text="share of later items that follow the rule", tickformat=".0%", nticks=6)
    figure.update_yaxes(title_text="NDCG@10", rangemode="tozero")
    figure.note(
        f"adapters on {arms['targets'].iloc[0]}; seen: iLoRA above LoRA and above another user's gate"
    )
    return figure.update_layout(legend=style.BESIDE, title_text=f"A gate that could help {text}")


def adapter_cost(rows: pd.DataFrame) -> go.Figure:
    """Median step with quartiles, tensors at the peak, weights trained: by arm, precision, compile mode."""
    rows = rows[rows["status"] != "not applicable"]
    order = {"model": list(ARM_NAMES), "precision": list(get_args(Precision))}
    order |= {"compile_mode": list(get_args(CompileMode))}
    rank = {name: values.index for name, values in order.items()}
    rows = rows.sort_values(list(order), key=lambda values: values.map(rank[str(values.name)]), kind="stable")
    modes = rows["compile_mode"].replace("off", "eager")
    names = rows["model"].map(ARM_NAMES) + ", " + rows["precision"] + ", " + modes
    figure, hover = panels(3, spacing=0.05, shared_yaxes=True), "%{y}: %{x:,.4~g}"
    timed = style.column(rows, "step_seconds").notna()
    for (_, model), part in rows[timed].groupby(["kind", "model"], sort=False):
        color, label = _ARM_COLORS.get(model, INK), names[part.index]
        ends, ms = interval(part, "step_seconds", color, 1e3), 1e3 * part["step_seconds"]
        figure.dots(part, ms, label, color, "%{y}: %{x:.2f} ms", error_x=ends, **at(1, 1))
        figure.bars(part, part["peak_tensor_bytes"] / 2**20, label, color, hover, **at(1, 2))
        figure.dots(part, part["trained_bytes"] / 2**10, label, color, hover, **at(1, 3))
    figure.words_beside(names[~timed], rows["status"][~timed].astype(str))
    figure.update_xaxes(title_text="median step, quartiles (ms)", rangemode="tozero", **at(1, 1))
    figure.update_xaxes(title_text="tensors at the peak (MiB)", rangemode="tozero", **at(1, 2))
    figure.update_xaxes(title_text="trained weights (KiB, log scale)", **at(1, 3))
    figure.update_xaxes(**style.log_axis(rows["trained_bytes"] / 2**10, most=4), **at(1, 3))
    figure.categories(list(dict.fromkeys(names)), 34)
    # The reference of `over_ilora` is eager, in the first precision: only this row has no such ratio.
    plain = rows[timed & (rows["model"] == "ilora") & style.column(rows, "over_ilora").isna()]
    title = "What a step with adapters costs"
    if len(plain) and pd.notna(plain.iloc[0].get("over_lora")):
        row = plain.iloc[0]
        title = f"A step of iLoRA takes {row['over_lora']:.2f} times LoRA's "
        title += f"({row['over_lora_low']:.2f} to {row['over_lora_high']:.2f})"
        if pd.notna(row.get("over_full")):
            title += f", {row['over_full']:.2f} times full fine-tuning's"
    return figure.update_layout(title_text=title)
