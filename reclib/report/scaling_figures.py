"""Figures of scaling and of tuning: pure functions from a table of records to a `go.Figure`.

Committed runs are circles, one for each seed; runs of the notebook are diamonds. The sweep of an arm follows
from its name in `params/grids`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib.evaluate import statistics
from reclib.report import style, tables
from reclib.report.style import BLUE, GREEN, HEIGHT, INK, MUTED, ORANGE, PURPLE, Chart, at, log_axis, panels
from reclib.report.tables import BASELINES, COUNTED, SHAPES, model_name, recipe_of, sweep_of

LOSS, RANKED, SIZE, FLOPS = "lowest_valid_loss", "valid_ndcg@10", "non_embedding", "training_flops"
ACCURACY = {RANKED: "NDCG@10", "valid_hr@10": "HR@10"}
TITLES = {LOSS: "lowest validation loss (nats)", RANKED: "NDCG@10 on validation"}
TITLES |= {SIZE: "non-embedding parameters", FLOPS: "training FLOPs"}
COLORS = {"width": BLUE, "depth": ORANGE, "untied tables": GREEN, "other learning rate": PURPLE}
COLORS |= {"tuned settings": GREEN, SHAPES: PURPLE, f"{SHAPES}, items scaled": GREEN}
OURS, TWIN = map(model_name, ("bert4rec", "causal"))
RECIPES = {OURS: BLUE, TWIN: ORANGE, OURS + COUNTED: GREEN, TWIN + COUNTED: PURPLE}
RECIPES |= {SHAPES: INK, SHAPES + COUNTED: INK, tables.VISIBLE: style.MUTED}
RECIPES |= {OURS + tables.MUON: "#8C510A", TWIN + tables.MUON: "#7CAE00"}
RECIPES |= dict(zip((tables.OWN_LOSS, tables.TABLES), style.PALETTE[4:], strict=True))
SPREAD = {"coverage": "catalogue coverage", "gini": "Gini", "popularity_percentile": "popularity"}
MOST_COUNTS = 3  # number of the best counts shown in a panel of `size_and_counts`
FACTORS = {"half": 0.5, "rule": 1.0, "twice": 2.0}  # multiples of the rule's learning rate


def one_per_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each run, with its `sweep`, and whether it is `of_notebook`, not of a grid.

    Accuracy is that of the best epoch by NDCG@10, whose weights a run keeps.
    """
    curves = rows[rows[LOSS].notna()]
    key = ["profile", "dataset", "model", "seed"]  # one row for a run that was trained on several devices
    parts = curves.groupby(key, dropna=False)
    best = {name: parts[name].transform("max") for name in ACCURACY if name in curves}
    runs = curves.assign(**best).drop_duplicates(key).copy()
    return runs.assign(sweep=runs["model"].astype(str).map(sweep_of), of_notebook=runs["profile"] != "grid")


def scaling_curve(rows: pd.DataFrame) -> go.Figure:
    """Validation loss by width against parameters and FLOPs, with the law, its band and its prediction."""
    runs = one_per_run(rows)
    figure = panels(2, spacing=0.06, shared_yaxes=True).update_layout(showlegend=True, height=HEIGHT + 80)
    laws = rows[style.column(rows, "predicted").notna()]
    law = laws.iloc[-1] if len(laws) else None
    if law is not None:
        _add_law(figure, law, runs)
    from_notebook = runs["of_notebook"] & runs["sweep"].isin(["depth", "tuned settings"])
    plotted = runs[runs["sweep"].str.startswith("width") | from_notebook]
    for column, x in enumerate((SIZE, FLOPS), 1):
        _add_runs(figure, plotted, x, LOSS, 1, column)
    if law is not None:
        ends: dict[str, Any] = {}
        if pd.notna(law.get("low")):
            up, down = law["high"] - law["predicted"], law["predicted"] - law["low"]
            ends = {"error_y": {"array": [up], "arrayminus": [down], "color": INK}}
        hover, name = "predicted %{y:.4f} nats", f"prediction of {law['of']}"
        figure.dots("predicted", [law["size"]], [law["predicted"]], INK, hover, name=name, **ends, **at(1, 1))
    # Names of sizes are under their lowest marks, of committed runs if there are any.
    named = plotted if plotted["of_notebook"].all() else plotted[~plotted["of_notebook"]]
    for row in named.sort_values(LOSS).drop_duplicates("model").to_dict("records"):
        place = {"yshift": -15, "font": {"size": 11, "color": MUTED}}
        figure.text(row["model"], np.log10(row[SIZE]), row[LOSS], **place, **at(1, 1))
    _size_axes(figure, plotted, 1)
    figure.update_yaxes(title_text=TITLES[LOSS], **at(1, 1))
    text = "Circles: committed runs, one for each seed; the line joins their means."
    text = "" if runs["of_notebook"].all() else text
    text += " Diamonds: this notebook's own runs." if runs["of_notebook"].any() else ""
    if law is not None:
        text += " Dashed and hollow: the law of the smaller sizes and its prediction, recorded before."
        text += " Band: 95 % over resampled seeds."
    figure.note(text.strip() + _fewer_seeds(plotted))
    return _legend_below(figure, _curve_title(law, runs))


def size_and_counts(rows: pd.DataFrame) -> go.Figure:
    """NDCG@10 by size on each dataset, with horizontal lines for counts.

    `rows` are those of `tables.by_size`. Lines of a recipe are of validation; marks with intervals and lines
    of counts are of the test split.
    """
    counted = rows["model"].isin(BASELINES).groupby(rows["dataset"]).any()
    datasets = sorted(dict.fromkeys(rows["dataset"]), key=lambda name: not counted[name])
    columns = len(datasets) if len(datasets) < 4 else 2
    lines = -(-len(datasets) // columns)
    rows = rows.assign(recipe=rows["model"].map(recipe_of), sweep=rows["model"].map(sweep_of))
    figure = panels(columns, lines, 0.08, vertical=0.25 / lines, subplot_titles=datasets)
    entry, ahead = _entries(), []
    ranked, tested = style.column(rows, RANKED), style.column(rows, "ndcg@10")
    low, high = rows[SIZE].min() / 1.3, rows[SIZE].max() * 1.3
    for number, dataset in enumerate(datasets):
        place, in_dataset = at(number // columns + 1, number % columns + 1), rows["dataset"] == dataset
        counts = rows[in_dataset & tested.notna() & rows["model"].isin(BASELINES)].drop_duplicates("model")
        counts = counts[~counts["model"].str.endswith("_with_validation")]
        widths = rows[in_dataset & ranked.notna() & rows["sweep"].str.startswith("width")]
        for recipe, part in ((str(recipe), part) for recipe, part in widths.groupby("recipe")):
            means = part.groupby("model").agg({SIZE: "mean", RANKED: "mean"}).sort_values(SIZE)
            look = {"mode": "lines+markers", "marker": {"size": 6}, "opacity": 0.45}
            trace = look | {"customdata": means.index} | entry(f"{recipe}, validation")
            hover = "%{customdata}: %{y:.4f} on validation"
            figure.path(part, means[SIZE], means[RANKED], RECIPES[recipe], hover, **trace, **place)
        if counts.empty:
            corner = {"xanchor": "left", "yanchor": "bottom"} | place
            figure.text("no count is scored on the test split yet", np.log10(low), 0, MUTED, **corner)
        else:
            best = counts.sort_values("ndcg@10", ascending=False).head(MOST_COUNTS)
            top, above = float(max(tested[in_dataset].max(), ranked[in_dataset].max())), math.inf
            for count in best.to_dict("records"):
                value, name = count["ndcg@10"], model_name(count["model"])
                hover, kind = f"{name}: %{{y:.4f}} on test", str(count["kind"])
                trace = {"line": {"width": 1.5}} | entry("counts, nothing trained, test")
                figure.path(kind, [low, high], [value] * 2, MUTED, hover, **trace, **place)
                close = above - value < 0.08 * top  # its name is under the line, that of the other above
                above = value
                side = {"xanchor": "left", "yanchor": "top" if close else "bottom"}
                figure.text(name, np.log10(low), value, MUTED, font_size=11, **side, **place)
        marks = rows[in_dataset & tested.notna() & rows[SIZE].notna()]
        for recipe, part in ((str(recipe), part) for recipe, part in marks.groupby("recipe")):
            color, hover = RECIPES[recipe], "%{customdata}: %{y:.4f} on test"
            trace = {"customdata": part["model"].map(model_name)} | entry(f"{recipe}, test")
            if "ndcg@10_low" in part:
                trace["error_y"] = style.interval(part, "ndcg@10", color)
            of_lines = set(widths["grid"][widths["recipe"] == recipe])
            look = {"symbol": np.where(part["grid"].isin(of_lines or part["grid"]), "circle", "square")}
            look |= {"size": np.where(part["seeds"] < statistics.MIN_SEEDS, 6, 10), "opacity": 1}
            figure.dots(part, SIZE, "ndcg@10", color, hover, marker=look, **trace, **place)
        scores = tested[marks.index[marks["recipe"] == OURS]]
        if len(counts) and len(scores):
            ahead.append((dataset, float(scores.max()) > counts["ndcg@10"].max()))
        axis = log_axis(rows[SIZE].dropna(), most=4) | {"range": list(np.log10([low, high]))}
        figure.update_xaxes(**axis, **place)
        figure.update_yaxes(rangemode="tozero", nticks=6, **place)
    figure.update_xaxes(title_text=TITLES[SIZE], row=lines)
    figure.update_yaxes(title_text="NDCG@10", col=1)
    figure.note(
        "Marks and grey lines: test split; bar: 95 % interval over users. Pale lines: one recipe at every "
        "width, on validation, where the same model ranks higher than on test. Squares: another recipe than "
        "the line's. Small marks: fewer than three seeds."
    )
    words = {"below a count on": False, "above every count on": True}
    parts = {word: [name for name, is_ahead in ahead if is_ahead == over] for word, over in words.items()}
    text = "; ".join(f"{word} {', '.join(names)}" for word, names in parts.items() if names)
    title = f"BERT4Rec ranks {text}" if text else "NDCG@10 by size; no count was scored beside it"
    return _legend_below(figure, title, showlegend=True, height=240 + 280 * lines)


def popularity_by_size(rows: pd.DataFrame) -> go.Figure:
    """Coverage, Gini coefficient and popularity of the ten recommended items, by size.

    `rows` are those of `tables.popularity_by_size`: a panel for each measure and dataset.
    """
    datasets, sized = list(dict.fromkeys(rows["dataset"])), rows[rows[SIZE].notna()]
    grid: dict[str, Any] = {"shared_xaxes": True, "subplot_titles": datasets}
    figure, entry = panels(len(datasets), len(SPREAD), 0.06, **grid), _entries()
    for column, dataset in enumerate(datasets, 1):
        models = sized[sized["dataset"] == dataset].assign(recipe=sized["model"].map(recipe_of))
        models["sweep"] = models["model"].map(sweep_of)
        counts = rows[(rows["dataset"] == dataset) & (rows["model"] == "pairwise_counts")].head(1)
        low, high = models[SIZE].min() / 1.3, models[SIZE].max() * 1.3
        for line, measure in enumerate(SPREAD, 1):
            place = at(line, column)
            for (recipe, *_), part in models.sort_values(SIZE).groupby(["recipe", "grid", "sweep"]):
                look = {"mode": "lines+markers", "marker": {"size": 8}, "customdata": part["model"]}
                look, color = look | entry(recipe), RECIPES[recipe]
                figure.path(part, SIZE, measure, color, "%{customdata}: %{y:.3f}", **look, **place)
            for value in counts[measure]:
                look = {"line": {"width": 1.5}} | entry("pairwise counts, nothing trained")
                figure.path(counts, [low, high], [value] * 2, MUTED, "counts: %{y:.3f}", **look, **place)
            figure.update_xaxes(**log_axis(models[SIZE], most=4), range=list(np.log10([low, high])), **place)
            title = SPREAD[measure] if column == 1 else ""
            figure.update_yaxes(range=[0, 1.02], nticks=5, title_text=title, **place)
    figure.update_xaxes(title_text=TITLES[SIZE], row=len(SPREAD))
    figure.note(
        "Of the ten items recommended to each test user. Coverage: share of the catalogue recommended to "
        "anybody; Gini: 0 all items alike, 1 all on few; popularity: mean percentile among the items."
    )
    widths = sized[sized["model"].map(sweep_of) == "width"]
    parts = (part.sort_values(SIZE) for _, part in widths.groupby(["dataset", "grid"]) if len(part) > 1)
    ends = {str(part["dataset"].iloc[0]): part["coverage"].iloc[[0, -1]] for part in parts}
    text = ", ".join(f"{name} {small:.0%} to {large:.0%}" for name, (small, large) in ends.items())
    title = f"Catalogue recommended, smallest to largest size: {text}"
    return _legend_below(figure, title, showlegend=True, height=260 + 190 * len(SPREAD))


def _entries() -> Callable[[str], dict[str, Any]]:
    """Return a function that gives traces of one name a single entry of the legend."""
    names: set[str] = set()

    def entry(name: str) -> dict[str, Any]:
        is_new = name not in names
        names.add(name)
        return {"name": name, "legendgroup": name, "showlegend": is_new}

    return entry


def scaling_accuracy(rows: pd.DataFrame) -> go.Figure:
    """NDCG@10 and HR@10 on validation against parameters and FLOPs, by width and by depth."""
    runs = one_per_run(rows)
    runs = runs[~runs["sweep"].isin(["untied tables", "other learning rate"])]
    metrics = [name for name in ACCURACY if name in runs]
    figure = panels(2, len(metrics), 0.06, shared_yaxes=True, shared_xaxes=True)
    for row, metric in enumerate(metrics, 1):
        for column, x in enumerate((SIZE, FLOPS), 1):
            _add_runs(figure, runs, x, metric, row, column)
        figure.update_yaxes(title_text=f"{ACCURACY[metric]} on validation", **at(row, 1))
    _size_axes(figure, runs, len(metrics))
    text = "Lines join the means over seeds of committed runs; at the epoch that has the best NDCG@10."
    text += _add_accuracy_law(figure, runs[(runs["sweep"] == "width") & ~runs["of_notebook"]])
    figure.note(text + _fewer_seeds(runs))
    means = runs.groupby("model")[RANKED].mean()
    title = f"NDCG@10 on validation: {means.min():.3f} to {means.max():.3f}, best with {means.idxmax()}"
    return _legend_below(figure, title, showlegend=True, height=HEIGHT + 220)


def scaling_sweeps(rows: pd.DataFrame) -> go.Figure:
    """The other sweeps: depth against width, untied against tied tables, and the rule of the learning rate.

    The lowest validation loss is above, NDCG@10 below. There is a panel for each sweep with runs; the note
    names the others.
    """
    runs = one_per_run(rows)
    runs = runs[~runs["of_notebook"]]
    kinds = {"depth": _sweep_lines, "untied tables": _untied_lines, "other learning rate": _rate_lines}
    absent = [kind for kind in kinds if not (runs["sweep"] == kind).any()]
    present = ["depth", *(kind for kind in list(kinds)[1:] if kind not in absent)]
    figure = panels(len(present), 2, 0.09).update_layout(height=HEIGHT + 300, showlegend=True)
    gains = {}
    for row, measure in enumerate((LOSS, RANKED), 1):
        figure.update_yaxes(title_text=TITLES[measure], **at(row, 1))
        texts = [kinds[kind](figure, runs, Panel(row, col, measure)) for col, kind in enumerate(present, 1)]
        gains[measure] = "; ".join(filter(None, texts))
    figure.update_xaxes(title_text=None, row=1)  # the row below has the same
    text = f"Loss above, in nats: {gains[LOSS]}. " if gains[LOSS] else ""
    text += "Means over seeds, bars to the lowest and the highest; rates over the seeds that all three have."
    figure.note(text + (f" Not trained yet: {', '.join(absent)}." if absent else ""))
    gain = gains[RANKED]
    return _legend_below(figure, f"NDCG@10: {gain}" if gain else "Only the width is varied so far")


# -- parts ---------------------------------------------------------------------------------------------------


def _fewer_seeds(runs: pd.DataFrame) -> str:
    """Return a sentence, after a space, on the committed sizes with fewer seeds than others."""
    counts = runs[~runs["of_notebook"]].groupby("model", sort=False)["seed"].nunique()
    few = [f"{model} ({count})" for model, count in counts.items() if count < counts.max()]
    return f" Fewer seeds: {', '.join(few)}." if few else ""


def _add_runs(figure: Chart, runs: pd.DataFrame, x: str, y: str, row: int, col: int) -> None:
    """Draw a mark for each run, and a line through the means of committed runs."""
    for (is_notebook, sweep), part in runs.groupby(["of_notebook", "sweep"], sort=False):
        color = COLORS.get(str(sweep)) or RECIPES[recipe_of(part["model"].iloc[0])]
        kind = part["kind"].iloc[0]
        millions = part["trained_tokens"].max() / 1e6
        name = f"{sweep}, {'this run' if is_notebook else 'committed'} ({millions:.1f} M tokens)"
        group: dict[str, Any] = {"legendgroup": name, **at(row, col)}
        look: dict[str, Any] = {"size": 9, "opacity": 0.55}
        if is_notebook:
            look = {"size": 11, "symbol": style.marker(kind, color)["symbol"].replace("circle", "diamond")}
        else:
            means = part.groupby("model").agg({x: "mean", y: "mean"}).sort_values(x)
            thin: dict[str, Any] = {"line": {"width": 1.5}, "showlegend": False}
            figure.path(kind, means[x], means[y], color, None, **thin, **group)
        hover = "%{customdata[0]}, seed %{customdata[1]}: %{y:.4f}"
        trace = {"name": name, "showlegend": row == col == 1, "marker": look}
        trace["customdata"] = part[["model", "seed"]].astype(str)
        figure.dots(part, x, y, color, hover, **trace, **group)


def _add_law(figure: Chart, law: pd.Series, runs: pd.DataFrame) -> None:
    """Draw the law and, if there are enough seeds, its band."""
    fitted = runs[(runs["sweep"] == "width") & ~runs["of_notebook"] & (runs["model"] != law["of"])]
    smallest = min(fitted[SIZE].min(), law["size"]) if len(fitted) else law["size"] / 100
    sizes = np.geomspace(smallest, law["size"], 60)
    ends = statistics.band({float(size): list(part[LOSS]) for size, part in fitted.groupby(SIZE)}, sizes)
    _add_band(figure, ends, sizes)
    values = statistics.Law(law["floor"], law["factor"], law["exponent"])(sizes)
    figure.path("predicted", sizes, values, INK, None, name="law", **at(1, 1))


def _add_accuracy_law(figure: Chart, runs: pd.DataFrame) -> str:
    """Draw the law of NDCG@10 and a line in log N, fitted without the largest width; return a note."""
    by_size: Any = runs.groupby(SIZE)[RANKED].agg(list).to_dict()
    if (law := statistics.accuracy_law(by_size)) is None:
        return ""
    smaller = sorted(by_size)[:-1]
    sizes = np.geomspace(smaller[0], law.size, 60)
    errors = {size: [1 - value for value in by_size[size]] for size in smaller}
    _add_band(figure, statistics.band(errors, sizes), sizes, 1.0)
    figure.path("predicted", sizes, 1 - law.law(sizes), INK, None, name="law", **at(1, 1))
    means = [float(np.mean(by_size[size])) for size in smaller]
    line = [statistics.naive(smaller, means, size)["line"] for size in (sizes[0], law.size)]
    look: dict[str, Any] = {"name": "straight line in log N", "line": {"width": 1.5, "dash": "dot"}}
    figure.path("predicted", [sizes[0], law.size], line, MUTED, None, **look, **at(1, 1))
    verdict = "differ" if law.differs else "cannot be told apart"
    return (
        " Dashed: the law a - b N^-c of NDCG@10 at the smaller widths, with its 95 % band over resampled "
        f"seeds; dotted: a line in log N. For the largest they give {law.predicted:.4f} and {law.line:.4f}: "
        f"they {verdict}."
    )


def _add_band(figure: Chart, ends: np.ndarray | None, sizes: np.ndarray, top: float = 0.0) -> None:
    """Draw the band (2, S) of a law, or `top` minus it; nothing if it is None."""
    if ends is not None:
        low, high = top - ends if top else ends
        around = {"x": [*sizes, *sizes[::-1]], "y": [*low, *high[::-1]], "fill": "toself"}
        look = {"fillcolor": "rgba(34, 34, 34, 0.10)", "line": {"width": 0}, "hoverinfo": "skip"}
        figure.add_scatter(name="95 % band", **around, **look, **at(1, 1))


def _curve_title(law: pd.Series | None, runs: pd.DataFrame) -> str:
    if law is None:
        means = runs.groupby("model")[LOSS].mean()
        return f"Lowest validation loss: {means.min():.3f} nats, with {means.idxmin()}"
    measured = runs[(runs["model"] == law["of"]) & ~runs["of_notebook"]][LOSS]
    if measured.empty:
        return f"The law predicts {law['predicted']:.3f} nats for {law['of']}, which is not measured yet"
    gap, inside = law["predicted"] / measured.mean() - 1, ""
    if pd.notna(law.get("low")):
        hit = law["low"] <= measured.mean() <= law["high"]
        inside = f", {'inside' if hit else 'outside'} its band"
    return f"The law predicted the loss of the largest size, {law['of']}, with an error of {gap:+.1%}{inside}"


def _size_axes(figure: Chart, runs: pd.DataFrame, rows: int) -> None:
    for col, x in enumerate((SIZE, FLOPS), 1):
        for row in range(1, rows + 1):
            figure.update_xaxes(**log_axis(runs[x]), **at(row, col))
        figure.update_xaxes(title_text=TITLES[x], **at(rows, col))


def _legend_below(figure: Chart, title: str, **layout: Any) -> go.Figure:
    figure.update_layout(title_text=title, **layout)
    legend = {"x": 0, "xanchor": "left", "y": -90 / (figure.layout.height - 200), "yanchor": "top"}
    return figure.update_layout(legend=legend, margin={"b": 130})


class Panel(NamedTuple):
    """A panel of the sweeps, and its measure."""

    row: int
    col: int
    measure: str

    def gain(self, values: Sequence[float]) -> str:
        """Return differences of the measure as a text: nats to three digits, accuracy to four."""
        return ", ".join(f"{value:+.3f}" if self.measure == LOSS else f"{value:+.4f}" for value in values)

    def axis(self, figure: Chart, title: str, **settings: Any) -> None:
        """Set the panel's x axis."""
        figure.update_xaxes(**settings, title_text=title, **at(self.row, self.col))

    def draw(self, figure: Chart, x: Any, table: pd.DataFrame, name: str, color: str) -> None:
        """Draw a line of means with bars to the lowest and the highest seed."""
        kind = str(table["kind"].iloc[0]) if len(table) else "measured"
        above, below = table["max"] - table["mean"], table["mean"] - table["min"]
        trace: dict[str, Any] = {"error_y": {"array": above, "arrayminus": below, "color": color, "width": 4}}
        trace |= {"mode": "lines+markers", "marker": style.marker(kind, color), "customdata": table.index}
        trace |= {"name": name, "legendgroup": name, "showlegend": self.row == 1}
        hover = f"%{{customdata}}: %{{y:.4f}}{' nats' if self.measure == LOSS else ''}"
        figure.path(kind, x, table["mean"], color, hover, **trace, **at(self.row, self.col))


def _means(runs: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return each arm's mean of a measure, with its lowest and highest seed, by size."""
    parts = runs.groupby("model")
    table = parts[measure].agg(["mean", "min", "max"])
    return table.assign(**{SIZE: parts[SIZE].first(), "kind": parts["kind"].first()}).sort_values(SIZE)


def _sweep_lines(figure: Chart, runs: pd.DataFrame, panel: Panel) -> str:
    """Draw width and depth; return the change by depth, "" if it is not varied."""
    width = _means(runs[runs["sweep"] == "width"], panel.measure)
    deep = _means(runs[runs["sweep"] == "depth"], panel.measure)
    panel.draw(figure, width[SIZE], width, "width at two layers", COLORS["width"])
    panel.axis(figure, TITLES[SIZE], **log_axis([*width[SIZE], *deep[SIZE]], most=4))
    if deep.empty:
        return ""
    base = f"{deep.index[0].split('d')[0]}d2"
    joined = pd.concat([deep, width[width.index == base]]).sort_values(SIZE)
    panel.draw(figure, joined[SIZE], joined, f"depth at {base.removesuffix('d2')}", COLORS["depth"])
    gain = panel.gain([joined["mean"].iloc[-1] - joined["mean"].iloc[0]])
    return f"depth, {joined.index[0]} to {joined.index[-1]}, {gain}"


def _untied_lines(figure: Chart, runs: pd.DataFrame, panel: Panel) -> str:
    """Draw tied and untied tables; return the change by a second table."""
    untied = _means(runs[runs["sweep"] == "untied tables"], panel.measure)
    names = [name.removesuffix(" untied") for name in untied.index]
    tied = _means(runs[runs["model"].isin(names)], panel.measure)
    panel.axis(figure, "size", type="category")
    panel.draw(figure, list(tied.index), tied, "one table (tied)", COLORS["width"])
    panel.draw(figure, names, untied, "two tables (untied)", COLORS["untied tables"])
    change = (untied.set_axis(names)["mean"] - tied["mean"]).dropna()
    if change.empty:
        return ""
    return f"a second table at {' and '.join(change.index)}, {panel.gain(list(change))}"


def _rate_lines(figure: Chart, runs: pd.DataFrame, panel: Panel) -> str:
    """Draw the measure at half, once and twice the rule's rate."""
    arms = runs[runs["sweep"] == "other learning rate"]["model"]
    bases = sorted({name.rsplit(" ", 2)[0] for name in arms}, key=lambda name: int(name[1:].split("d")[0]))
    ticks = {"type": "log", "tickvals": list(FACTORS.values()), "ticktext": list(FACTORS)}
    panel.axis(figure, "learning rate over the rule's", **ticks)
    for place, base in enumerate(bases):
        names = {base + end: FACTORS[short] for short, end in tables.RATES.items()}
        group = runs[runs["model"].isin(names)]
        shared = set.intersection(*(set(part["seed"]) for _, part in group.groupby("model")))
        table = _means(group[group["seed"].isin(shared)], panel.measure)
        table = table.assign(factor=[names[name] for name in table.index]).sort_values("factor")
        panel.draw(figure, table["factor"], table, f"rates at {base}", (PURPLE, MUTED)[place % 2])
    return ""


# -- tuning --------------------------------------------------------------------------------------------------


def tuning_history(rows: pd.DataFrame) -> go.Figure:
    """Value of each trial's best epoch, complete or pruned, and the best value so far."""
    values, kind = rows.groupby("trial")[RANKED].transform("max"), str(rows["kind"].iloc[0])
    trials = rows.assign(**{RANKED: values}).drop_duplicates("trial").sort_values("trial")
    figure = style.single()
    for state, color in (("complete", BLUE), ("pruned", MUTED)):
        part = trials[trials["state"] == state]
        mark = {"mode": "markers", "marker": style.marker(kind, color)}
        figure.add_scatter(x=part["trial"], y=part[RANKED], name=state, **mark)
    complete = trials[trials["state"] == "complete"]
    best = {"x": complete["trial"], "y": complete[RANKED].cummax(), "name": "best"}
    figure.add_scatter(mode="lines", line=style.line(kind, ORANGE) | {"shape": "hv"}, **best)
    figure.update_xaxes(title_text="trial")
    figure.update_yaxes(title_text="NDCG@10 on validation")
    title = f"{len(trials)} trials, {int((trials['state'] == 'pruned').sum())} pruned"
    title += f"; the best has NDCG@10 {complete[RANKED].max():.4f}"
    return figure.update_layout(showlegend=True, title_text=title)
