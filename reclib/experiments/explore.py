"""The panels of notebook 07: the cost of a run, any result against any other, and recommendations.

A panel is a set of controls over pure functions, redrawn on each change. The notebook calls the same
functions for the static outputs under each panel, which are visible without a kernel. Every panel shows its
state as YAML that the notebook accepts as parameters.

Shapes: I real items, K experts of iLoRA, k recommendations.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple, get_args

import ipywidgets as ipw
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import yaml

from reclib import hardware, parameters, system
from reclib.config import SIZES, AdapterConfig, InputError, Kind, Precision, changed, nearest, validated
from reclib.cost import planner
from reclib.cost.planner import Plan
from reclib.data import splits
from reclib.data.dataset import Dataset, Evaluation, Histories
from reclib.evaluate import metrics
from reclib.experiments import adaptation, comparison
from reclib.experiments.notebook import Result
from reclib.hardware import Device
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel
from reclib.parameters import Explore, ILora
from reclib.records import params_hash
from reclib.report import speed_figures, style, tables
from reclib.report.style import BLUE, INK, MUTED, PALETTE, PLOTLY_MIME, TEMPLATE
from reclib.report.tables import Record, model_name
from reclib.train import saving
from reclib.train.trainer import Trainer

# -- widgets -------------------------------------------------------------------------------------------------


class Panel(ipw.VBox):
    """Controls above their outputs."""

    def __repr__(self) -> str:
        return "Controls: run this cell with a kernel, in JupyterLab. Below is what they show at first."


def _panel(
    row: Sequence[ipw.Widget],
    controls: Mapping[str, ipw.Widget],
    draw: Callable[..., Sequence[go.Figure | str]],
) -> Panel:
    """Return a row of controls above what `draw` returns for the values of `controls`: figures and HTML.

    The outputs are set, not captured as by `ipywidgets.interactive_output`: with several captured ones in a
    notebook nbclient waits for messages that do not come.
    """
    shown = ipw.Output()

    def show(_: Any = None) -> None:
        try:
            contents = draw(**{name: control.value for name, control in controls.items()})
        except InputError as error:  # a wrong choice is shown, not raised
            contents = [f"<p><b>{escape(str(error))}</b></p>"]
        shown.outputs = tuple(_output(content) for content in contents)

    for control in controls.values():
        control.observe(show, "value")
    show()
    return Panel([ipw.Box(row, layout={"flex_flow": "row wrap"}), shown])


def _output(content: go.Figure | str) -> dict[str, Any]:
    """Return a figure, or a text of HTML, as an output of a notebook."""
    data = {"text/html": content}
    if not isinstance(content, str):
        data = {PLOTLY_MIME: json.loads(content.to_json())}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _control(kind: type[ipw.Widget], description: str, **settings: Any) -> Any:
    layout = {"width": "27em", "max_width": "100%"}
    return kind(description=description, style={"description_width": "8em"}, layout=layout, **settings)


def _menu(name: str, options: Sequence[Any], value: Any) -> Any:
    return _control(ipw.Dropdown, name, options=options, value=value)


def _folded(values: Mapping[str, Any]) -> str:
    """Return parameters as folded YAML, a parameter file of the notebook: `papermill ... -f FILE`."""
    text = yaml.safe_dump(dict(values), sort_keys=False, default_flow_style=None).strip()
    return f"<details><summary>as parameters of this notebook</summary><pre>{escape(text)}</pre></details>"


# -- the cost of a run ---------------------------------------------------------------------------------------

PREFIX = "plan_"  # of the notebook's parameters
OWN = "the size's own"  # the first stop of the slider of the catalogue
_MENUS = {"precision": get_args(Precision), "adapter": ("none", *get_args(Kind))}
# Sliders: description, and stops beside the notebook's own value.
_SLIDERS: dict[str, tuple[str, Sequence[float]]] = {
    "items": ("catalogue", (0, 1349, 3416, 10_000, 18_345, 50_000, 159_748, 500_000, 1_000_000, 5_000_000)),
    "mean_len": ("mean length", (5.0, 7.0, 9.25, 15.0, 30.0, 60.0, 100.0, 165.0, 300.0)),
    "max_len": ("max_len", (10, 20, 50, 100, 200, 500)),
    "batch_size": ("batch", [2**power for power in range(4, 17)]),
    "rank": ("its rank", (4, 8, 16, 32, 64)),
    "users": ("users", (943, 6040, 22_363, 100_000, 582_942, 1_000_000, 10_000_000)),
}


def planned_run(p: Explore) -> dict[str, Any]:
    """Return the parameters of the run to plan for, without their prefix."""
    values = parameters.values(p).items()
    return {name.removeprefix(PREFIX): value for name, value in values if name.startswith(PREFIX)}


def plan(p: Explore) -> Plan:
    """Return the plan of the run; raise `InputError` for invalid values."""
    run = planned_run(p)
    size, device, items, kind, rank = (run.pop(n) for n in ("size", "device", "items", "adapter", "rank"))
    run |= {} if items is None else {"num_items": items}
    run |= {} if kind == "none" else {"adapter": validated(AdapterConfig, {"kind": kind, "rank": rank})}
    return planner.plan_size(size, device, **run)


def plans(p: Explore) -> list[Result]:
    """Return the plans of the run for every device as results, in its precision if supported, else in `auto`.

    The price, and so the cost, applies to the run's own device only.
    """
    results = []
    for label in (*planner.cpus(), *hardware.catalogue()):
        precision = p.plan_precision if p.plan_precision in planner.precisions(label) else "auto"
        price = p.plan_price if label == p.plan_device else None
        planned = plan(changed(p, plan_device=label, plan_precision=precision, plan_price=price))
        params = planned_run(p) | {"items": p.plan_items or SIZES[p.plan_size]["num_items"]}
        params |= comparison.settings_of(planned)
        del params["price"]
        parts = planned.memory_parts()
        series: dict[str, list[Any]] = {"part": list(parts), "bytes": list(parts.values())}
        counts, timings = planned.counts(), planned.timings()
        results.append(comparison.of_plan("plan", planned, params, counts, timings, series))
    return results


def data_of(p: Explore) -> dict[str, str]:
    """Return name and fingerprint of the planned histories."""
    return {"name": "synthetic", "fingerprint": params_hash({"mean_len": p.plan_mean_len})}


def cost_panel(p: Explore) -> Panel:
    """Return menus and sliders for a training run and a device, over its predicted time and memory."""
    run = planned_run(p)
    initial = run | {"items": run["items"] or 0, "price": run["price"] or 0.0}
    menus = {"device": (*planner.cpus(), *hardware.catalogue())} | _MENUS
    menus["size"] = tuple(name for name in SIZES if not name.startswith("w") or name == run["size"])
    controls = {name: _menu(name, options, run[name]) for name, options in menus.items()}
    for name, (description, values) in _SLIDERS.items():
        stops = [(f"{stop:,.12g}" if stop else OWN, stop) for stop in sorted({*values, initial[name]})]
        slider = {"options": stops, "value": initial[name], "continuous_update": False}
        controls[name] = _control(ipw.SelectionSlider, description, **slider)
    controls["price"] = _control(ipw.BoundedFloatText, "price an hour", value=initial["price"], max=1e6)
    controls["tied"] = _control(ipw.Checkbox, "one item table (tied)", value=run["tied"])

    def draw(**values: Any) -> list[go.Figure | str]:
        values |= {"items": values["items"] or None, "price": values["price"] or None}
        state = {PREFIX + name: value for name, value in values.items()}
        chosen = changed(p, **state)
        planned = plan(chosen)
        report = "\n".join(planner.report(planned, chosen.plan_size))
        results = [result._asdict() | {"own_params": result.params} for result in plans(chosen)]
        every = speed_figures.by_device(tables.table(results))
        return [f"<pre>{escape(report)}</pre>", speed_figures.parts(planned), every, _folded(state)]

    return _panel([*controls.values()], controls, draw)


# -- any result against any other ----------------------------------------------------------------------------

COLORS = ("model", "label", "dataset", "profile", "size", "precision", "compile_mode", "protocol", "seed")
_LOG_FROM = 30  # ratio of the largest value to the smallest above which an axis is logarithmic


class Selection(NamedTuple):
    """Axes, colour and devices of a figure; fields are parameters of the notebook."""

    result: str  # name of the records
    x: str
    y: str
    color: str = "model"
    labels: Sequence[str] = ()  # device labels; none: all


def frame(records: Sequence[Record], result: str) -> pd.DataFrame:
    """Return a row for each record of a kind: its numbers, settings and origin, without series.

    Raises `InputError` if there is no record.
    """
    rows = [_row(record) for record in records if record["name"] == result]
    if not rows:
        names = sorted({record["name"] for record in records})
        raise InputError(
            f"no record of {result!r}{nearest(result, names)}; there are: {', '.join(names) or 'none'}"
        )
    return pd.DataFrame(rows)


def _row(record: Record) -> dict[str, Any]:
    run, params = record.get("configuration") or {}, record["own_params"]
    settings: dict[str, Any] = {}
    for values in (record["params"], run.get("model") or {}, run.get("train") or {}, params):
        settings |= {key: value for key, value in values.items() if isinstance(value, str | int | float)}
    origin = {name: record[name] for name in ("notebook", "kind", "label", "profile", "seed")}
    origin |= {"device": record["device"].get("name"), "torch": record["versions"].get("torch")}
    origin["dataset"] = (record["data"] or {}).get("name")
    origin["model"] = model_name(str(params.get("model", "bert4rec")))
    origin |= {"commit": (record["git"].get("commit") or "")[:10], "day": record["time"][:10]}
    text = "<br>".join(f"{key}: {value}" for key, value in origin.items() if value not in (None, ""))
    return {**record["metrics"], **record["timings"], **settings, **origin, "origin": text}


def choices(rows: pd.DataFrame) -> dict[str, list[str]]:
    """Return the allowed values of the fields `x`, `y`, `color` and `labels` of a selection.

    An axis is a number with several values, and no end of an interval. Colours that differ come first.
    """
    axes = [
        str(name)
        for name, column in rows.items()
        if not str(name).endswith(("seed", "_low", "_high"))
        and not column.map(lambda value: isinstance(value, bool | str)).any()
        and pd.to_numeric(column, errors="coerce").nunique() > 1
    ]
    color = [name for name in COLORS if name in rows and rows[name].notna().any()]
    color.sort(key=lambda name: rows[name].nunique() < 2)
    return {"x": axes, "y": axes, "color": color, "labels": sorted(set(rows["label"]))}


def scatter(records: Sequence[Record], selection: Selection) -> go.Figure:
    """Return a scatter plot with a point for each record, hollow if predicted; hovering shows its origin.

    Raises `InputError` for a result, an axis, a colour or a label that is not present.
    """
    import plotly.express as px

    result, x, y, color, labels = selection
    rows = frame(records, result)
    chosen = [("x", x), ("y", y), ("color", color), *(("labels", label) for label in labels)]
    allowed = choices(rows)
    for field, name in chosen:
        if name not in allowed[field]:
            hint, listed = nearest(name, allowed[field]), ", ".join(allowed[field])
            raise InputError(f"{field}={name!r}{hint}; {result!r} has: {listed}")
    rows = rows[rows["label"].isin(labels or set(rows["label"]))].dropna(subset=[x, y])
    rows = rows.assign(**{color: rows[color].astype(str)})
    figure = px.scatter(
        rows,
        x=x,
        y=y,
        color=color,
        symbol="kind",
        symbol_map={"measured": "circle", "predicted": "circle-open"},
        color_discrete_map=style.model_colors(rows[color]) if color == "model" else {},
        color_discrete_sequence=PALETTE,
        log_x=_is_wide(rows[x]),
        log_y=_is_wide(rows[y]),
        labels={name: name.replace("_", " ") for name in (x, y, color)},
        hover_data=["origin"],
        template=TEMPLATE,
    )
    on = ", ".join(sorted(set(rows["label"])))
    return figure.update_traces(marker={"size": 10, "line_width": 2}).update_layout(
        title_text=style.sentence(f"{y} against {x}".replace("_", " ")),
        title_subtitle_text=f"{result.replace('_', ' ')}: {len(rows)} records on {on}",
        legend=style.BESIDE,
    )


def _is_wide(values: pd.Series) -> bool:
    return bool(values.min() > 0 and values.max() / values.min() > _LOG_FROM)


def results_panel(records: Sequence[Record], selection: Selection) -> Panel:
    """Return menus for the kind of result, both axes, the colour and the devices, over the figure."""
    allowed = {name: choices(frame(records, name)) for name in sorted({record["name"] for record in records})}
    drawable = [name for name, fields in allowed.items() if len(fields["x"]) > 1]
    kind = _menu("result", drawable, selection.result)
    panel = Panel()

    def show(selected: Selection) -> None:
        *axes, labels = allowed[selected.result].items()
        controls = {name: _menu(name, names, getattr(selected, name)) for name, names in axes}
        devices = {"options": labels[1], "value": selected.labels, "rows": 3}
        controls["labels"] = _control(ipw.SelectMultiple, "devices", **devices)

        def draw(labels: Sequence[str], **axes: str) -> list[go.Figure | str]:
            chosen = Selection(selected.result, labels=list(labels), **axes)
            return [scatter(records, chosen), _folded(chosen._asdict())]

        panel.children = [kind, _panel([*controls.values()], controls, draw)]

    def other_kind(change: Mapping[str, Any]) -> None:
        fields = allowed[change["new"]]
        show(Selection(change["new"], fields["x"][1], fields["x"][0], fields["color"][0]))

    kind.observe(other_kind, "value")
    show(selection)
    return panel


# -- recommendations -----------------------------------------------------------------------------------------
#
# The base is a model of the dataset under models/, if there is one; else a small one is trained on the past
# (`splits.divide`) in seconds. LoRA and iLoRA are trained on top of it on the following period.

ARMS = {"base": "base", "lora": "LoRA", "ilora": "iLoRA"}
OFFERED = 5000  # titles offered by the control that adds one
_LETTERS = 44  # of a title in a table


class User(NamedTuple):
    """A user of the test window, which is not trained on."""

    history: tuple[int, ...]  # item ids before the target, oldest first
    target: int | None  # the next item; None: the base may have been trained on it


@dataclass(frozen=True)
class Lineup:
    """A base and its adapters, their catalogue, and users to try them on."""

    models: dict[str, Bert4Rec | AdaptedModel]  # by name of `ARMS`
    gated: Trainer  # of iLoRA
    gates: np.ndarray  # float64 (histories, K): gates of the test window, for comparison
    titles: list[str]  # by item id, all different; "" for PAD
    keys: list[str]  # raw ids by item id
    counts: np.ndarray  # int64 (I + 1,): interactions of each item
    users: dict[str, User]  # by raw id
    description: str


def lineup(p: Explore, dataset: Dataset, device: Device) -> Lineup:
    """Load or train the base, train both adapters on top of it, and return them with the users.

    Models trained before with the same code, data and parameters are loaded. Raises `InputError` if the data
    have no times.
    """
    settings = _adaptation(p)
    periods, (task,) = adaptation.tasks_of(settings, dataset)
    name = kept_model(p.kept_model, dataset)
    amounts = periods.about["interactions"]
    if name is None:
        base = adaptation.train_base(settings, dataset, periods, device, p.seed).model
        source = (
            f"Base: size {p.size}, trained here for {p.epochs} epochs on the {amounts['past']:,} "
            "interactions of the past: small, and trained for seconds. A way to try things out, no result."
        )
    else:
        base = saving.load_model(name).model.to(device.torch_device)
        source = f"Base: {name}, kept under models/. It may have learnt what its users did next."
    arguments = (base, dataset, task, device, p.seed, p.adapter_learning_rate)
    lora, ilora = (adaptation.train_arm(settings, arm, *arguments)[0] for arm in ("lora", "ilora"))
    keys = dataset.item_keys.tolist()
    titles = ["", *(dataset.title(item) for item in range(1, dataset.num_items + 1))]
    title_counts = Counter(titles)
    return Lineup(
        models={"base": base.eval(), "lora": lora.model.eval(), "ilora": ilora.model.eval()},
        gated=ilora,
        gates=adaptation.expert_weights(ilora, task.split.test),
        titles=[t if title_counts[t] == 1 else f"{t} [{key}]" for t, key in zip(titles, keys, strict=True)],
        keys=keys,
        counts=np.bincount(dataset.items, minlength=dataset.num_items + 1),
        users=_users(dataset, task.split.test, with_target=name is None),
        description=f"{source} LoRA and iLoRA (rank {p.rank}, {p.num_experts} experts) were trained on top "
        f"of it for {lora.total_steps} steps on the {amounts['adaptation']:,} interactions that came next.",
    )


def _adaptation(p: Explore) -> ILora:
    """Return the parameters of notebook 05 for these adapters; all others are from its smoke profile."""
    shared = ("gpu", "dataset", "min_user", "min_item", "size", "max_len", "dropout", "batch_size")
    values = {name: getattr(p, name) for name in (*shared, "rank", "num_experts")}
    values |= {"base_epochs": p.epochs, "base_learning_rate": p.learning_rate, "epochs": p.adapter_epochs}
    values |= {"learning_rates": [p.adapter_learning_rate], "seeds": [p.seed], "alpha": 2.0 * p.rank}
    values |= {"tasks": ["next_period"], "arms": ["none", "lora", "ilora"], "evaluations": 1}
    return parameters.build("05_ilora", parameters.profile("05_ilora", "smoke") | values)


def kept_model(name: str, dataset: Dataset) -> str | None:
    """Return the saved model of that name; for `auto` the newest of the dataset; None for `none` or no model.

    Causal models are left out: their gate differs between positions of a history.
    """
    names = []
    for file in sorted(system.models().glob(f"*/{saving.MANIFEST}"), key=lambda f: -f.stat().st_mtime):
        data = json.loads(file.read_text("utf-8")).get("data", {})
        model = json.loads((file.parent / saving.MODEL_CONFIG).read_text("utf-8"))
        if data.get("fingerprint") == dataset.fingerprint and not model["causal"]:
            names.append(file.parent.name)
    if name not in ("auto", "none", *names):
        raise InputError(
            f"kept_model={name!r}: no masked model of {dataset.name} by that name under models/; "
            f"there are: {', '.join(names) or 'none'}; allowed besides: auto, none"
        )
    return {"none": None, "auto": next(iter(names), None)}.get(name, name)


def _users(dataset: Dataset, window: Evaluation, with_target: bool) -> dict[str, User]:
    """Return the window's users with the first target of each; without `with_target` it is None."""
    rows, users = window.histories, dict[str, User]()
    for row, user in enumerate(splits.row_users(dataset, rows)):
        history = tuple(rows.items[rows.starts[row] : rows.ends[row]].tolist())
        target = int(window.targets[row]) if with_target else None
        users.setdefault(str(dataset.user_keys[int(user)]), User(history, target))
    return users


def first_history(p: Explore, lineup: Lineup) -> tuple[str, tuple[int, ...]]:
    """Return the initial user and history: those of the parameters, else the first user with enough items."""
    long = (key for key, user in lineup.users.items() if len(user.history) >= p.history_items)
    key = p.user or next(long, next(iter(lineup.users)))
    if key not in lineup.users:
        examples = ", ".join(list(lineup.users)[:5])
        raise InputError(
            f"user={key!r} is not in the last window; {len(lineup.users)} are, such as {examples}"
        )
    ids = {raw: item for item, raw in enumerate(lineup.keys) if item}
    for raw in p.history:
        if raw not in ids:
            raise InputError(f"history: unknown item {raw!r}: {len(ids):,} are in the data")
    return key, tuple(ids[raw] for raw in p.history) or lineup.users[key].history[-p.history_items :]


def next_item(lineup: Lineup, user: str, history: Sequence[int]) -> int | None:
    """Return the user's next item, if `history` is the end of the user's history and the item is known."""
    profile = lineup.users[user]
    return profile.target if history and profile.history[-len(history) :] == tuple(history) else None


def search(lineup: Lineup, text: str, most: int = OFFERED) -> list[int]:
    """Return items whose titles contain every word of `text`, the most frequent first."""
    words = text.lower().split()
    hits = [i for i, title in enumerate(lineup.titles) if i and all(w in title.lower() for w in words)]
    return sorted(hits, key=lambda item: -lineup.counts[item])[:most]


def written(lineup: Lineup, text: str) -> tuple[int, ...]:
    """Return the history of a text with a title, or words of one, on each line.

    Words stand for the most frequent item that has them. Raises `InputError` if no title has the words.
    """
    history = []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if line:
            hits = [lineup.titles.index(line)] if line in lineup.titles else search(lineup, line, most=1)
            if not hits:
                raise InputError(f"history, line {number}: no title has the words {line!r}")
            history += hits
    return tuple(history)


def ranks(lineup: Lineup, arm: str, history: Sequence[int]) -> np.ndarray:
    """Return the rank of every item after a history, int64 (I + 1,) from 1; 0 for PAD and items in it."""
    model: Any = lineup.models[arm]
    ((_, scores),) = metrics.model_scores(model, _after(history), lineup.gated.where)
    order = np.argsort(-scores[0].double().cpu().numpy(), kind="stable") + 1
    order = order[~np.isin(order, history)]
    by_item = np.zeros(len(lineup.titles), dtype=np.int64)
    by_item[order] = np.arange(1, len(order) + 1)
    return by_item


def _after(history: Sequence[int]) -> Evaluation:
    if not history:
        raise InputError("the history is empty: add a title")
    items = np.array(history, dtype=np.int32)
    return Evaluation(Histories(items, np.array([0]), np.array([len(items)])), np.array([1], dtype=np.int32))


def top(ranks: np.ndarray, k: int) -> list[int]:
    """Return the k best items by their `ranks`, best first."""
    items = np.flatnonzero(ranks)
    return items[np.argsort(ranks[items])][:k].tolist()


def gate(lineup: Lineup, history: Sequence[int]) -> np.ndarray:
    """Return iLoRA's weights of the experts for a history, float64 (K,), which sum to 1."""
    return adaptation.expert_weights(lineup.gated, _after(history))[0]


def side_by_side(
    lineup: Lineup,
    history: Sequence[int],
    k: int = 10,
    before: Sequence[int] | None = None,
    target: int | None = None,
) -> str:
    """Return the k best items of every model as an HTML table with a column for each model.

    Items show their rank by the base if it differs. With another history `before`, items that were not in the
    list of that history are marked as new. `target` is the item that came next, if it is known.
    """
    by_arm = {arm: ranks(lineup, arm, history) for arm in lineup.models}
    lists = {arm: top(arm_ranks, k) for arm, arm_ranks in by_arm.items()}
    earlier = {arm: top(ranks(lineup, arm, before), k) for arm in by_arm} if before else lists

    def cell(arm: str, place: int) -> str:
        if place > len(lists[arm]):
            return ""
        item = lists[arm][place - 1]
        title, by_base = lineup.titles[item], by_arm["base"][item]
        cell_text = escape(title if len(title) <= _LETTERS else title[: _LETTERS - 1] + "…")
        cell_text = f"<b>{cell_text}</b>" if item == target else cell_text
        marks = [f"base: {by_base}"] if by_base != place else []
        marks += ["<b>new</b>"] if item not in earlier[arm] else []
        return cell_text + (f" <small>({', '.join(marks)})</small>" if marks else "")

    rows = [["", *(f"<b>{ARMS[arm]}</b>" for arm in lists)]]
    rows += [[f"{place}", *(cell(arm, place) for arm in lists)] for place in range(1, k + 1)]
    if target is not None:
        ranked = (int(arm_ranks[target]) for arm_ranks in by_arm.values())
        places = (f"rank {rank:,}" if rank else "in the history" for rank in ranked)
        rows.append(["next", *(f"{escape(lineup.titles[target])}: {place}" for place in places)])
    lines = ("".join(f'<td style="text-align:left">{text}</td>' for text in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def gate_figure(weights: np.ndarray, usual: np.ndarray) -> go.Figure:
    """Return the experts' weights (K,) for a history, with the middle 90 % of those of many (N, K)."""
    names = [f"expert {number}<br>{weight:.2f}" for number, weight in enumerate(weights, start=1)]
    low, middle, high = np.quantile(usual, (0.05, 0.5, 0.95), axis=0)
    ends = {"array": high - middle, "arrayminus": middle - low, "symmetric": False, "color": INK}
    line = {"symbol": "line-ew", "size": 22, "line": {"width": 2, "color": INK}}
    figure = go.Figure(layout={"template": TEMPLATE, "height": 320, "bargap": 0.5})
    figure.add_bar(x=names, y=weights.tolist(), marker={"color": BLUE}, name="this history")
    legend = f"{len(usual)} histories: median, middle 90 %"
    figure.add_scatter(x=names, y=middle.tolist(), mode="markers", name=legend, marker=line, error_y=ends)
    figure.add_hline(y=1 / len(weights), line={"color": MUTED, "width": 1, "dash": "dot"})
    figure.update_traces(hovertemplate="%{y:.3f}").update_yaxes(title_text="weight", range=[0, 1])
    best = int(np.argmax(weights))
    title = f"iLoRA's gate: expert {best + 1} has {weights[best]:.0%} of the weight"
    below = "Dotted: all alike, which would be plain LoRA"
    return figure.update_layout(title_text=title, title_subtitle_text=below)


def recommend_panel(lineup: Lineup, user: str, history: Sequence[int], first: int, k: int) -> Panel:
    """Return a menu of users and a history with a title on each line, over the recommendations.

    Choosing a user shows the last `first` items of its history. Added titles are appended.
    """

    def text(items: Sequence[int]) -> str:
        return "\n".join(lineup.titles[item] for item in items)

    users = [(f"user {key}, {len(profile.history)} items", key) for key, profile in lineup.users.items()]
    popular = [lineup.titles[item] for item in search(lineup, "")]
    person = _menu("user", users, user)
    add = _control(ipw.Combobox, "add a title", options=popular, continuous_update=False)
    lines = _control(ipw.Textarea, "history", rows=10, value=text(history), continuous_update=False)
    changes: list[Sequence[int] | None] = [None, history]  # the histories before and after the last change

    def other_user(change: Mapping[str, Any]) -> None:
        last_items = lineup.users[change["new"]].history[-first:]
        changes[:] = [None, last_items]
        lines.value = text(last_items)

    def added(change: Mapping[str, Any]) -> None:
        if change["new"]:
            lines.value, add.value = f"{lines.value}\n{change['new']}", ""

    def draw(user: str, history: str) -> list[go.Figure | str]:
        items = written(lineup, history)
        if items != tuple(changes[1] or ()):
            changes[:] = [changes[1], items]
        table = side_by_side(lineup, items, k, changes[0], next_item(lineup, user, items))
        names = "; ".join(lineup.titles[item] for item in items)
        gates = gate_figure(gate(lineup, items), lineup.gates)
        state = {"user": user, "history": [lineup.keys[item] for item in items]}
        return [f"<p>After {escape(names)}:</p>{table}", gates, _folded(state)]

    person.observe(other_user, "value")
    add.observe(added, "value")
    return _panel([person, add, lines], {"user": person, "history": lines}, draw)
