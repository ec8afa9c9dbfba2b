"""Figures of adapters: pure functions from a table of records to a `go.Figure`, as in `figures`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from reclib import claims
from reclib.config import CompileMode, Precision
from reclib.look import GREEN, INK, MUTED, ORANGE, PALETTE, TEMPLATE, bar, marker
from reclib.marks import categories, extreme, interval, note, panels
from reclib.tables import ARM_NAMES, TASK_NAMES

CONTROLS = ("shuffled_user", "noise", "fixed_gate", "static_gate")
DRAWN_USERS = 500  # in a figure of single users: more overlap, and make a notebook of megabytes
_MODES = list(get_args(CompileMode))
_SAID = {"better": GREEN, "worse": ORANGE}  # colour of a claim; of all others: grey
_BAND = "rgba(95,99,104,0.16)"


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
    rows["claim"] = [
        claims.claim(d, p, seeds)
        for d, p, *seeds in rows[["difference", "adjusted_p", "seeds", "reference_seeds"]].to_numpy()
    ]
    tasks = list(dict.fromkeys(rows["task_name"]))
    order = [ARM_NAMES[arm] for arm in ARM_NAMES if (rows["model"] == arm).any()]
    figure = panels(len(tasks), shared_yaxes=True, spacing=0.06)
    for column, task in enumerate(tasks, 1):
        mine = rows[rows["task_name"] == task]
        names = mine["model"].map(ARM_NAMES)
        place = {"row": 1, "col": column}
        figure.add_bar(
            **{"base": -mine["detectable"], "x": 2 * mine["detectable"], "y": names, "orientation": "h"},
            width=0.6,
            hoverinfo="skip",
            marker={"color": _BAND},
            **place,
        )
        for (kind, claim), some in mine.groupby(["kind", "claim"]):
            color = _SAID.get(str(claim), MUTED)
            figure.add_scatter(
                x=some["difference"],
                y=some["model"].map(ARM_NAMES),
                mode="markers",
                marker=marker(str(kind), color),
                error_x=interval(some, "difference", color),
                customdata=some[["adjusted_p", "detectable", "claim"]],
                hovertemplate="%{y}: %{x:+.4f}, %{customdata[2]}<br>adjusted p %{customdata[0]:.3f}, "
                "detectable %{customdata[1]:.4f}<extra></extra>",
                **place,
            )
        figure.add_vline(0, line={"color": INK, "width": 1}, **place)
        figure.update_xaxes(title_text=f"{task}: difference in NDCG@10", nticks=6, **place)
    categories(figure, order, 32)
    note(
        figure,
        "paired by user; bar: 95 % interval; green, orange: better, worse after Holm's correction; grey: not "
        "separated, or too few seeds; grey band: too small for these users to show (power 80 %)",
    )
    first = rows[rows["task_name"] == tasks[0]]
    counts = first["claim"].value_counts()
    words = ("better", "worse", "not separated", "too few seeds")
    said = ", ".join(f"{counts[word]} {word}" for word in words if word in counts)
    return figure.update_layout(title_text=f"Against {reference}, {tasks[0]}: of {len(first)} arms {said}")


def adapter_cost(rows: pd.DataFrame) -> go.Figure:
    """Median step with quartiles, tensors at the peak, weights trained: by arm, precision, compile mode."""
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
            error_x={
                "symmetric": False,
                "array": 1e3 * (some["step_seconds_high"] - some["step_seconds"]),
                "arrayminus": 1e3 * (some["step_seconds"] - some["step_seconds_low"]),
                "color": color,
            },
            hovertemplate="%{y}: %{x:.2f} ms<extra></extra>",
            row=1,
            col=1,
        )
        for column, (name, unit) in enumerate((("peak_tensor_bytes", 2**20), ("trained_bytes", 2**10)), 2):
            figure.add_bar(
                x=some[name] / unit,
                y=label,
                orientation="h",
                marker=bar(str(kind), color),
                hovertemplate="%{y}: %{x:,.4~g}<extra></extra>",
                row=1,
                col=column,
            )
    for name, status in zip(names[~timed], rows["status"][~timed], strict=True):
        figure.add_annotation(
            **{"x": 0, "y": name, "text": str(status), "xanchor": "left", "row": 1, "col": 1},
            showarrow=False,
            font={"color": MUTED},
        )
    figure.update_xaxes(title_text="median step, quartiles (ms)", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="tensors at the peak (MiB)", rangemode="tozero", row=1, col=2)
    figure.update_xaxes(title_text="trained weights (KiB, log scale)", type="log", row=1, col=3)
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
            text=np.where(some["adjusted_p"] < claims.ALPHA, "*", ""),
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


# The name of the records that each is made of, and the figure.
FIGURES: list[tuple[str, Callable[[pd.DataFrame], go.Figure]]] = [
    ("adaptation", accuracy_by_share),
    ("adaptation_gain", adaptation_gain),
    ("gate_comparison", gate_comparison),
    ("adapter_step", adapter_cost),
    ("gates", gate_by_user),
    ("gate_correlation", gate_correlations),
]
