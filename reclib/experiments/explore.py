"""Controls over pure functions: what a person in JupyterLab turns. Nothing is computed here.

Every control has a description and takes the keyboard. What is shown is drawn anew on each change; the
notebook follows each panel with the same as static outputs, for a reader without a kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

import ipywidgets as ipw
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import yaml

from reclib import hardware, parameters, system
from reclib.config import SIZES, InputError, nearest
from reclib.cost import planner, work
from reclib.cost.planner import Asked, Estimate, Plan
from reclib.data import splits
from reclib.data.dataset import Dataset, Evaluation, Histories
from reclib.evaluate import metrics
from reclib.experiments import adaptation
from reclib.hardware import GIB, Device
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel
from reclib.parameters import Explore, ILora
from reclib.report import speed_figures, style
from reclib.report.style import BLUE, INK, MUTED, PALETTE, TEMPLATE, duration
from reclib.report.tables import PROFILES, Record, model_name
from reclib.train import saving
from reclib.train.trainer import Trainer

# ------------------------------------------------------------------------------------------------
# Turning the study's records: which results there are, what can be drawn against what, and a point's
# origin.
#
# Pure functions under the widgets of notebook 07, so that a reader without a kernel sees the same figures
# and tests need no browser. A choice of axes is a `Selection`, which the notebook's parameters can state.

# What says where a number is from; never an axis.
ORIGIN = (
    "notebook",
    "kind",
    "label",
    "device",
    "dataset",
    "profile",
    "model",
    "seed",
    "commit",
    "torch",
    "day",
)

COLORS = (
    "model",
    "label",
    "dataset",
    "profile",
    "kind",
    "size",
    "precision",
    "compile_mode",
    "protocol",
    "seed",
)

# Axes to begin with: what is sought, against what it costs.
_UPWARDS = ("ndcg@10", "valid_ndcg@10", "sequences_per_second", "difference", "coverage")

_ACROSS = ("non_embedding", "parameters", "hr@10", "peak_memory_bytes", "train_seconds", "gini")

_ENDS = ("_low", "_high")  # of intervals: drawn as bars, no axes of their own


@dataclass(frozen=True)
class Selection:
    """What to draw: a kind of result, two of its numbers, what colours tell apart, and which devices."""

    result: str
    x: str
    y: str
    color: str = "model"
    labels: tuple[str, ...] = ()  # device labels; none: all


def results(records: Iterable[Record]) -> dict[str, int]:
    """Return the kinds of results that have at least two numbers to draw, with the number of records."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record["name"]] = counts.get(record["name"], 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def frame(records: Iterable[Record], result: str) -> pd.DataFrame:
    """Return one row for each record of this kind: its numbers, what it was run with, and its origin.

    Series are left out: a curve has a figure of its own. Raises `InputError` where there is none.
    """
    known = list(records)
    rows = [_row(record) for record in known if record["name"] == result]
    if not rows:
        here = results(known)
        raise InputError(
            f"no record of {result!r}{nearest(result, here)}; there are: {', '.join(here) or 'none'}"
        )
    found = pd.DataFrame(rows)
    ranks = {name: place for place, name in enumerate(PROFILES)}
    order = found["profile"].map(lambda name: ranks.get(name, -1))
    return found.assign(_order=order).sort_values("_order", kind="stable").drop(columns="_order")


def _row(record: Record) -> dict[str, Any]:
    asked = _plain(record.get("params") or {})
    said = record.get("configuration") or {}
    for part in ("model", "train"):
        asked |= _plain(said.get(part) or {})
    own = _plain(record.get("own_params") or {})
    device, data = record.get("device") or {}, record.get("data") or {}
    origin = {
        "notebook": record["notebook"],
        "kind": record["kind"],
        "label": record["label"],
        "device": device.get("name"),
        "dataset": data.get("name"),
        "items": data.get("items"),
        "profile": record["profile"],
        "model": model_name(str(own.get("model", "bert4rec"))),
        "seed": record.get("seed"),
        "commit": ((record.get("git") or {}).get("commit") or "")[:10] or None,
        "torch": (record.get("versions") or {}).get("torch"),
        "day": str(record.get("time") or "")[:10],
    }
    return asked | own | (record.get("timings") or {}) | record["metrics"] | origin


def _plain(values: Any) -> dict[str, Any]:
    return {key: v for key, v in values.items() if isinstance(v, str | int | float | bool)}


def numbers(rows: pd.DataFrame) -> list[str]:
    """Return the columns that can be an axis: numbers with at least two values, measured ones first."""
    found = []
    for name in rows.columns:
        column = rows[name]
        if name in ORIGIN or name.endswith(_ENDS) or column.map(lambda v: isinstance(v, bool | str)).any():
            continue
        if pd.to_numeric(column, errors="coerce").nunique() > 1:
            found.append(str(name))
    return found


def colors(rows: pd.DataFrame) -> list[str]:
    """Return the columns that colours can tell apart here."""
    return [name for name in COLORS if name in rows and rows[name].notna().any()]


def first_selection(records: Sequence[Record], result: str) -> Selection:
    """Return a choice of axes to begin with; raise `InputError` where a result has fewer than two numbers."""
    rows = frame(records, result)
    axes = numbers(rows)
    tints = sorted(colors(rows), key=lambda name: rows[name].nunique() < 2)  # what tells rows apart first
    if len(axes) < 2:
        raise InputError(
            f"{result!r} has {len(axes)} numbers that differ between its records: nothing to draw"
        )
    y = next((name for name in _UPWARDS if name in axes), axes[1])
    x = next((name for name in [*_ACROSS, *axes] if name in axes and name != y), axes[0])
    return Selection(result, x, y, tints[0])


def chosen(records: Iterable[Record], selection: Selection) -> pd.DataFrame:
    """Return the rows to be drawn; raise `InputError` for an axis, colour or label that is not there."""
    rows = frame(records, selection.result)
    allowed = {"x": numbers(rows), "y": numbers(rows), "color": colors(rows)}
    for field, names in allowed.items():
        name = getattr(selection, field)
        if name not in names:
            said = f"{field}={name!r}{nearest(name, names)}; {selection.result!r} has: {', '.join(names)}"
            raise InputError(said)
    for label in selection.labels:
        if label not in set(rows["label"]):
            here = ", ".join(sorted(set(rows["label"])))
            raise InputError(f"labels: {label!r} has no record of {selection.result!r}; there are: {here}")
    if selection.labels:
        rows = rows[rows["label"].isin(selection.labels)]
    return rows.dropna(subset=[selection.x, selection.y])


def origin(row: pd.Series) -> str:
    """Return what hovering over a point says: where its number is from, a line each."""
    said = [
        f"{name}: {row[name]}" for name in ORIGIN if name in row and pd.notna(row[name]) and row[name] != ""
    ]
    return "<br>".join(said)


def selection_as_parameters(selection: Selection) -> str:
    """Return a selection as YAML, a parameter file of the notebook: `papermill ... -f FILE`."""
    values = asdict(selection) | {"labels": list(selection.labels)}
    return yaml.safe_dump(values, sort_keys=False).strip()


# ------------------------------------------------------------------------------------------------
# Figures of notebook 07: any number of the records against any other, and the gate of one history.

# Baselines share a grey: their marks differ instead.
_SYMBOLS = ("square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star", "pentagon")

_LOG_FROM = 30  # times between the smallest and the largest value, from which an axis is logarithmic


def scatter(rows: pd.DataFrame, selection: Selection) -> go.Figure:
    """Return the chosen numbers of `explore.chosen`, a point for each record; hovering says its origin."""
    figure = go.Figure(layout={"template": TEMPLATE})
    groups = {str(name): part for name, part in rows.groupby(selection.color, sort=True, dropna=False)}
    tints = style.model_colors(groups) if selection.color == "model" else {}
    for place, (name, part) in enumerate(groups.items()):
        tint = tints.get(name, PALETTE[place % len(PALETTE)])
        for kind, points in part.groupby("kind", sort=True):
            mark = style.marker(str(kind), tint)
            if tint == MUTED:
                shape = _SYMBOLS[place % len(_SYMBOLS)]
                mark["symbol"] = shape if kind == "measured" else f"{shape}-open"
            error = None
            if f"{selection.y}_low" in points and points[f"{selection.y}_low"].notna().all():
                error = style.interval(points, selection.y, tint)
            figure.add_scatter(
                x=points[selection.x],
                y=points[selection.y],
                name=name if kind == "measured" else f"{name}, {kind}",
                mode="markers",
                marker=mark,
                error_y=error,
                text=points.apply(origin, axis=1),
                hovertemplate="%{x}, %{y}<br>%{text}<extra></extra>",
            )
    x, y = spoken(selection.x), spoken(selection.y)
    figure.update_xaxes(title_text=x, **_scale(rows[selection.x]))
    figure.update_yaxes(title_text=y, **_scale(rows[selection.y]))
    title = style.sentence(f"{y} against {x}")
    labels = ", ".join(sorted(set(rows["label"])))
    said = f"{selection.result.replace('_', ' ')}: {len(rows)} records on {labels}"
    figure.update_layout(title_text=title, title_subtitle_text=said, showlegend=True)
    return figure.update_layout(
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"}
    )


def gate_figure(weights: np.ndarray, usual: np.ndarray) -> go.Figure:
    """Return the weights (K,) of a history's experts, over those (N, K) of many: their middle 90 %."""
    names = [f"expert {number + 1}<br>{weight:.2f}" for number, weight in enumerate(weights)]
    low, middle, high = np.quantile(usual, (0.05, 0.5, 0.95), axis=0)
    figure = go.Figure(layout={"template": TEMPLATE})
    figure.add_bar(
        x=names,
        y=weights.tolist(),
        marker={"color": BLUE},
        name="this history",
        hovertemplate="this history: %{y:.3f}<extra></extra>",
    )
    figure.add_scatter(
        x=names,
        y=middle.tolist(),
        mode="markers",
        name=f"{len(usual)} histories: median, middle 90 %",
        marker={"symbol": "line-ew", "size": 22, "line": {"width": 2, "color": INK}},
        error_y={"array": high - middle, "arrayminus": middle - low, "symmetric": False, "color": INK},
        hovertemplate="median: %{y:.3f}<extra></extra>",
    )
    uniform = 1 / len(weights)
    figure.add_hline(y=uniform, line={"color": MUTED, "width": 1, "dash": "dot"})
    strongest = int(np.argmax(weights))
    title = f"iLoRA's gate: expert {strongest + 1} has {weights[strongest]:.0%} of the weight"
    figure.update_yaxes(title_text="weight", range=[0, 1])
    said = "Dotted: all alike, which would be plain LoRA"
    return figure.update_layout(title_text=title, title_subtitle_text=said, height=320, bargap=0.5)


def spoken(column: str) -> str:
    """Return a column's name for people: `valid_hr@10` is "validation HR@10"."""
    words = [word.upper() if "@" in word or word == "mrr" else word for word in column.split("_")]
    return " ".join("validation" if word == "valid" else word for word in words)


def _scale(values: pd.Series) -> dict[str, object]:
    wide = values.min() > 0 and values.max() / values.min() > _LOG_FROM
    return {"type": "log"} if wide else {"rangemode": "tozero"} if values.min() >= 0 else {}


# ------------------------------------------------------------------------------------------------
# What would be recommended to whom: the best items of a base and of its adapters, after any history.
#
# A base that is kept (`saving`) is used where there is one of the dataset; else a small one is trained on the
# past (`splits`), in seconds. LoRA and iLoRA are trained on top of either on what came next, a few steps
# each. What follows is pure: a history of item ids goes in, lists and gates come out.
#
# Shapes: I real items, K experts, k recommendations.

ARMS = {"base": "base", "lora": "LoRA", "ilora": "iLoRA"}

FOUND = 40  # titles that a search shows


@dataclass(frozen=True)
class User:
    """One user of the last window, in which nothing that trained has been."""

    key: str  # raw id
    history: tuple[int, ...]  # item ids, oldest first: all before the target
    target: int | None  # the item that came next; None: the base may have learnt from it


@dataclass(frozen=True)
class Lineup:
    """A base and its adapters, the catalogue that they know, and users to try them on."""

    models: dict[str, Bert4Rec | AdaptedModel]  # by name of `ARMS`
    gated: Trainer  # that of iLoRA
    gates: np.ndarray  # float64 (histories, K) of the last window: what is usual
    titles: list[str]  # by item id; of PAD ""
    keys: list[str]  # raw ids, likewise
    counts: np.ndarray  # int64 (I + 1,): how often each item is in the data
    users: dict[str, User]  # by raw id
    about: str  # what the models are, in a sentence or two


def lineup(p: Explore, dataset: Dataset, device: Device) -> Lineup:
    """Load or train the base, train both adapters on top of it, and return them with the users.

    What was trained before with the same code, data and parameters is loaded. Raises `InputError` where the
    data have no times.
    """
    asked = _adaptation(p)
    whole, (task,) = adaptation.tasks_of(asked, dataset)
    name = kept_model(p.kept_model, dataset)
    if name is None:
        base = adaptation.train_base(asked, dataset, whole, device, p.seed).model
    else:
        base = saving.load_model(name).model.to(device.torch_device)
    adapters = {
        arm: adaptation.train_arm(asked, arm, base, dataset, task, device, p.seed, p.adapter_learning_rate)[0]
        for arm in ("lora", "ilora")
    }
    gates = adaptation.expert_weights(adapters["ilora"], task.split.test)
    models = {"base": base.eval()} | {arm: one.model.eval() for arm, one in adapters.items()}
    items = range(1, dataset.num_items + 1)
    return Lineup(
        models=models,
        gated=adapters["ilora"],
        gates=gates,
        titles=["", *(dataset.title(item) for item in items)],
        keys=dataset.item_keys.tolist(),
        counts=np.bincount(dataset.items, minlength=dataset.num_items + 1),
        users=_users(dataset, task.split.test, known=name is None),
        about=_about(p, name, whole.about["interactions"], adapters["lora"].total_steps),
    )


def _about(p: Explore, name: str | None, interactions: Mapping[str, int], steps: int) -> str:
    base = f"Base: {name}, kept under models/. It may have learnt what its users did next."
    if name is None:
        base = (
            f"Base: size {p.size}, trained here for {p.epochs} epochs on the {interactions['past']:,} "
            "interactions of the past: small, and trained for seconds. A way to try things out, no result."
        )
    return (
        f"{base} LoRA and iLoRA (rank {p.rank}, {p.num_experts} experts) were trained on top of it for "
        f"{steps} steps on the {interactions['adaptation']:,} interactions that came next."
    )


def _adaptation(p: Explore) -> ILora:
    """Return what notebook 05 would be asked for the same: its own settings where ours say nothing."""
    ours = ("gpu", "dataset", "min_user", "min_item", "size", "max_len", "dropout", "batch_size")
    given = {name: getattr(p, name) for name in (*ours, "rank", "num_experts")}
    given |= {"base_epochs": p.epochs, "base_learning_rate": p.learning_rate, "epochs": p.adapter_epochs}
    given |= {"learning_rates": [p.adapter_learning_rate], "seeds": [p.seed], "alpha": 2.0 * p.rank}
    given |= {"tasks": ["next_period"], "arms": ["none", "lora", "ilora"], "evaluations": 1}
    return parameters.build("05_ilora", parameters.profile("05_ilora", "smoke") | given)


def kept_model(asked: str, dataset: Dataset) -> str | None:
    """Return the kept model to use: the one asked for, or for `auto` the newest of the dataset.

    None where there is none, and for `none`. A causal model has no one gate for a history and is left out.
    """
    if asked == "none":
        return None
    files = system.models().glob(f"*/{saving.MANIFEST}")
    found = []
    for file in sorted(files, key=lambda one: one.stat().st_mtime, reverse=True):
        same = json.loads(file.read_text("utf-8")).get("data", {}).get("fingerprint") == dataset.fingerprint
        shape = json.loads((file.parent / saving.MODEL_CONFIG).read_text("utf-8"))
        if same and not shape["causal"]:
            found.append(file.parent.name)
    if asked == "auto":
        return found[0] if found else None
    if asked not in found:
        raise InputError(
            f"kept_model={asked!r}: no masked model of {dataset.name} by that name under models/; "
            f"there are: {', '.join(found) or 'none'}; allowed besides: auto, none"
        )
    return asked


def _users(dataset: Dataset, window: Evaluation, known: bool) -> dict[str, User]:
    """Return the window's users, each with the first of its targets; `known`: whether no base saw it."""
    rows = window.histories
    found: dict[str, User] = {}
    for row, user in enumerate(splits.row_users(dataset, rows)):
        key = str(dataset.user_keys[int(user)])
        history = tuple(rows.items[rows.starts[row] : rows.ends[row]].tolist())
        found.setdefault(key, User(key, history, int(window.targets[row]) if known else None))
    return found


def first_history(p: Explore, lineup: Lineup) -> tuple[str, tuple[int, ...]]:
    """Return the user and the history to begin with: those asked for, else the first with enough items."""
    long = (key for key, one in lineup.users.items() if len(one.history) >= p.history_items)
    key = p.user or next(long, next(iter(lineup.users)))
    if key not in lineup.users:
        some = ", ".join(list(lineup.users)[:5])
        raise InputError(f"user={key!r} is not in the last window; {len(lineup.users)} are, such as {some}")
    ids = {raw: item for item, raw in enumerate(lineup.keys) if item}
    for raw in p.history:
        if raw not in ids:
            raise InputError(f"history: unknown item {raw!r}: {len(ids):,} are in the data")
    own = tuple(ids[raw] for raw in p.history)
    return key, own or lineup.users[key].history[-p.history_items :]


def next_item(lineup: Lineup, user: str, history: Sequence[int]) -> int | None:
    """Return what the user really took next, where `history` is the end of the user's own and it is known."""
    own = lineup.users[user]
    return own.target if history and own.history[-len(history) :] == tuple(history) else None


# -- histories -----------------------------------------------------------------------------------------------


def search(lineup: Lineup, text: str, most: int = FOUND) -> list[int]:
    """Return items whose title has every word of `text`, the most frequent first; all for an empty text."""
    words = text.lower().split()
    hits = [i for i, title in enumerate(lineup.titles) if i and all(w in title.lower() for w in words)]
    return sorted(hits, key=lambda item: -lineup.counts[item])[:most]


def without(history: Sequence[int], places: Sequence[int]) -> tuple[int, ...]:
    """Return a history without what stands at `places`."""
    return tuple(item for place, item in enumerate(history) if place not in set(places))


def moved(history: Sequence[int], places: Sequence[int], step: int) -> tuple[tuple[int, ...], list[int]]:
    """Move what stands at `places` one place earlier (-1) or later (+1); return the history and new places.

    Where one of them is at that end already, nothing moves.
    """
    found, last = list(history), len(history) - 1
    if not places or (min(places) == 0 and step < 0) or (max(places) == last and step > 0):
        return tuple(history), list(places)
    for place in sorted(places, reverse=step > 0):
        found[place], found[place + step] = found[place + step], found[place]
    return tuple(found), [place + step for place in places]


# -- what is recommended -------------------------------------------------------------------------------------


def _asked(history: Sequence[int]) -> Evaluation:
    if not history:
        raise InputError("the history is empty: add an item")
    items = np.array(history, dtype=np.int32)
    return Evaluation(Histories(items, np.array([0]), np.array([len(items)])), np.array([1], dtype=np.int32))


def ranks(lineup: Lineup, arm: str, history: Sequence[int]) -> np.ndarray:
    """Return the rank of every item after a history, int64 (I + 1,) from 1; 0 for PAD and items seen."""
    model: Any = lineup.models[arm]
    ((_, scores),) = metrics.model_scores(model, _asked(history), lineup.gated.where)
    seen = sorted(set(history))
    order = np.argsort(-scores[0].double().cpu().numpy(), kind="stable") + 1
    order = order[~np.isin(order, seen)]
    found = np.zeros(len(lineup.titles), dtype=np.int64)
    found[order] = np.arange(1, len(order) + 1)
    return found


def top(found: np.ndarray, k: int) -> list[int]:
    """Return the k best items of `ranks`, best first."""
    order = np.argsort(np.where(found > 0, found, len(found)), kind="stable")
    return [int(item) for item in order[:k] if found[item]]


@torch.no_grad()
def gate(lineup: Lineup, history: Sequence[int]) -> np.ndarray:
    """Return iLoRA's weights of the experts for a history, float64 (K,), which sum to 1."""
    return adaptation.expert_weights(lineup.gated, _asked(history))[0]


def as_parameters(lineup: Lineup, user: str, history: Sequence[int]) -> str:
    """Return a user and a history as YAML, a parameter file of the notebook: `papermill ... -f FILE`."""
    values = {"user": user, "history": [lineup.keys[item] for item in history]}
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None).strip()


# -- for people ----------------------------------------------------------------------------------------------

_LEFT = ' style="text-align:left"'


def side_by_side(
    lineup: Lineup,
    history: Sequence[int],
    k: int = 10,
    before: Sequence[int] | None = None,
    target: int | None = None,
) -> str:
    """Return the k best items of every model as an HTML table, a column for each.

    An adapter's item says where the base has it. Where `before` is another history, an item that was not in
    the same list after that one is marked. `target` is the item that really came next, if it is known.
    """
    found = {arm: ranks(lineup, arm, history) for arm in lineup.models}
    earlier = {arm: set(top(ranks(lineup, arm, before), k)) for arm in found} if before else {}
    lists = {arm: top(one, k) for arm, one in found.items()}
    head = "".join(f"<th{_LEFT}>{ARMS[arm]}</th>" for arm in lists)
    rows = []
    for place in range(k):
        cells = ""
        for arm, items in lists.items():
            item = items[place] if place < len(items) else 0
            marks = _marks(arm, item, found["base"], earlier.get(arm), place + 1)
            cells += f"<td{_LEFT}>{_cell(lineup.titles[item], marks, item == target)}</td>"
        rows.append(f"<tr><th>{place + 1}</th>{cells}</tr>")
    if target is not None:
        title = escape(lineup.titles[target])
        cells = "".join(f"<td{_LEFT}>{title}: {_rank(one[target])}</td>" for one in found.values())
        rows.append(f"<tr><th>next</th>{cells}</tr>")
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _marks(arm: str, item: int, base: np.ndarray, earlier: set[int] | None, place: int) -> list[str]:
    said = []
    if arm != "base" and item and base[item] != place:
        said.append(f"base: {base[item]}")
    if earlier is not None and item not in earlier:
        said.append("<b>new</b>")
    return said


def _cell(title: str, marks: Sequence[str], hit: bool) -> str:
    shown = escape(title if len(title) <= 44 else title[:43] + "…")
    shown = f"<b>{shown}</b>" if hit else shown
    return shown + (f" <small>({', '.join(marks)})</small>" if marks else "")


def _rank(rank: int) -> str:
    return f"rank {rank:,}" if rank else "in the history"


def options(lineup: Lineup, history: Sequence[int]) -> list[tuple[str, int]]:
    """Return a history's places by numbered title, as menus show them."""
    return [(f"{place + 1}. {lineup.titles[item]}", place) for place, item in enumerate(history)]


# ------------------------------------------------------------------------------------------------

_STYLE = {"description_width": "8em"}

_WIDTH = {"width": "27em", "max_width": "100%"}

# Where the sliders stop; what the notebook's parameters give is among them too.
_ITEMS = [1349, 3416, 10_000, 18_345, 50_000, 100_000, 159_748, 500_000, 1_000_000, 5_000_000]

_MEAN_LENS = [5.0, 7.0, 9.25, 15.0, 30.0, 60.0, 100.0, 165.0, 300.0]

_RANKS = [4, 8, 16, 32, 64]

_MAX_LENS = [10, 20, 50, 100, 200, 500]

_BATCHES = [2**power for power in range(4, 17)]

_USERS = [943, 6040, 22_363, 100_000, 582_942, 1_000_000, 10_000_000]


class Panel(ipw.VBox):
    """Controls above what they draw. `follow` says what else a control sets before that is drawn."""

    def __init__(
        self,
        controls: Sequence[ipw.Widget],
        draw: Callable[[], Sequence[Any]],
        follow: Mapping[ipw.Widget, Callable[[], None]] | None = None,
        above: ipw.Widget | None = None,
    ) -> None:
        self._draw, self._follow, self._held = draw, dict(follow or {}), False
        self.shown = ipw.Output()
        for control in controls:
            control.observe(self._changed, "value")
        rows = above or ipw.Box(list(controls), layout=ipw.Layout(flex_flow="row wrap"))
        super().__init__([rows, self.shown])
        self.redraw()

    def __repr__(self) -> str:
        return (
            "Controls: run this cell with a kernel, in JupyterLab. What follows is the same, standing still."
        )

    def redraw(self) -> None:
        """Draw what the controls say; an `InputError` is shown instead: no choice is a crash."""
        try:
            things = self._draw()
        except InputError as error:
            things = [f"<p><b>{escape(str(error))}</b></p>"]
        # Set, not captured: nothing flickers, and it is the same from a callback and from a cell.
        self.shown.outputs = tuple(_displayed(thing) for thing in things)

    def _changed(self, change: Mapping[str, Any]) -> None:
        if self._held:
            return
        self._held = True
        try:
            self._follow.get(change["owner"], lambda: None)()
        finally:
            self._held = False
        self.redraw()


def _displayed(thing: Any) -> dict[str, Any]:
    """Return a figure, or a text of HTML, as an output of a notebook."""
    if isinstance(thing, str):
        data: dict[str, Any] = {"text/html": thing}
    else:
        data = {"application/vnd.plotly.v1+json": json.loads(thing.to_json())}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def menu(description: str, options: Sequence[Any], value: Any) -> ipw.Dropdown:
    """Return a menu; a value that is not among the options gives way to the first of them."""
    chosen = value if value in options else options[0]
    return ipw.Dropdown(
        options=list(options),
        value=chosen,
        description=description,
        style=_STYLE,
        layout=ipw.Layout(**_WIDTH),
    )


def stops(description: str, values: Sequence[float], value: float) -> ipw.SelectionSlider:
    """Return a slider over numbers, `value` among them, which moves on when it is let go of."""
    return ipw.SelectionSlider(
        options=_labelled(values, value),
        value=value,
        description=description,
        continuous_update=False,
        style=_STYLE,
        layout=ipw.Layout(**_WIDTH),
    )


def _labelled(values: Sequence[float], value: float) -> list[tuple[str, float]]:
    return [(f"{one:,.12g}", one) for one in sorted({*values, value})]


def _parameters(text: str) -> str:
    return f"<details><summary>as parameters of this notebook</summary><pre>{escape(text)}</pre></details>"


# -- what would it cost? -------------------------------------------------------------------------------------


def cost_panel(asked: Asked) -> Panel:
    """Return menus and sliders for a training run and a device, over what it is predicted to take."""
    model = asked.model()
    sizes = [asked.size, *(name for name in SIZES if not name.startswith("w") and name != asked.size)]
    controls: dict[str, Any] = {
        "device": menu("device", planner.device_labels(), asked.device),
        "size": menu("size", sorted(sizes, key=list(SIZES).index), asked.size),
        "items": stops("catalogue", _ITEMS, model.num_items),
        "mean_len": stops("mean length", _MEAN_LENS, asked.mean_len),
        "max_len": stops("max_len", _MAX_LENS, asked.max_len),
        "batch_size": stops("batch", _BATCHES, asked.batch_size),
        "precision": menu("precision", planner.precisions(asked.device), asked.precision),
        "adapter": menu("adapter", ["none", "lora", "rslora", "gated", "ilora"], asked.adapter),
        "rank": stops("its rank", _RANKS, asked.rank),
        "users": stops("users", _USERS, asked.users),
        "price": ipw.BoundedFloatText(
            value=asked.price or 0.0,
            min=0,
            max=1e6,
            step=0.1,
            description="price an hour",
            style=_STYLE,
            layout=ipw.Layout(**_WIDTH),
        ),
        "tied": ipw.Checkbox(
            value=asked.tied, description="one item table (tied)", style=_STYLE, layout=ipw.Layout(**_WIDTH)
        ),
    }

    def other_size() -> None:
        own = SIZES[controls["size"].value]
        controls["items"].options = _labelled(_ITEMS, own["num_items"])
        controls["items"].value = own["num_items"]
        controls["tied"].value = own["tied"]

    def other_device() -> None:
        before = controls["precision"].value
        controls["precision"].options = planner.precisions(controls["device"].value)
        controls["precision"].value = before if before in controls["precision"].options else "auto"

    def draw() -> list[Any]:
        now = Asked(**asdict(asked) | {name: control.value for name, control in controls.items()})
        found = planner.plan_of(now)
        everywhere = speed_figures.by_device(planner.table(now, planner.every_plan(now)))
        said = _parameters(plan_as_parameters(now))
        return [summary(now, found), speed_figures.parts(found), everywhere, said]

    follow = {controls["size"]: other_size, controls["device"]: other_device}
    return Panel(list(controls.values()), draw, follow)


# -- results -------------------------------------------------------------------------------------------------


def results_panel(records: Sequence[Record], selection: Selection) -> Panel:
    """Return menus for the kind of result, both axes, the colour and the devices, over the figure.

    Below the figure stands the selection as parameters, to be handed on.
    """
    drawable = [name for name in results(records) if _can_be_drawn(records, name)]
    rows = frame(records, selection.result)
    kind = menu("result", drawable, selection.result)
    x = menu("across", numbers(rows), selection.x)
    y = menu("upwards", numbers(rows), selection.y)
    color = menu("colour", colors(rows), selection.color)
    labels = ipw.SelectMultiple(
        options=sorted(set(rows["label"])),
        value=selection.labels,
        description="devices",
        rows=3,
        style=_STYLE,
        layout=ipw.Layout(**_WIDTH),
    )

    def other_result() -> None:
        first = first_selection(records, kind.value)
        here = frame(records, first.result)
        labels.value = ()
        labels.options = sorted(set(here["label"]))
        for control, names, value in (
            (x, numbers(here), first.x),
            (y, numbers(here), first.y),
            (color, colors(here), first.color),
        ):
            control.options = names
            control.value = value

    def draw() -> list[Any]:
        now = Selection(kind.value, x.value, y.value, color.value, tuple(labels.value))
        figure = scatter(chosen(records, now), now)
        return [figure, _parameters(selection_as_parameters(now))]

    return Panel([kind, x, y, color, labels], draw, {kind: other_result})


def _can_be_drawn(records: Sequence[Record], result: str) -> bool:
    return len(numbers(frame(records, result))) > 1


# -- recommend -----------------------------------------------------------------------------------------------


class Recommend(Panel):
    """A user's history that can be searched into, cut and put in another order, over what it leads to."""

    def __init__(self, lineup: Lineup, user: str, history: Sequence[int], first: int, k: int) -> None:
        self._lineup, self._first, self._k = lineup, first, k
        self.history: tuple[int, ...] = tuple(history)
        self.before: tuple[int, ...] | None = None  # the last change's
        wide, style = ipw.Layout(width="27em", max_width="100%"), {"description_width": "5em"}
        users = [(f"user {key}, {len(one.history)} items", key) for key, one in lineup.users.items()]
        self.user = ipw.Dropdown(options=users, value=user, description="user", style=style, layout=wide)
        self.search = ipw.Text(description="search", placeholder="a title", style=style, layout=wide)
        self.found = ipw.Select(description="titles", rows=6, style=style, layout=wide)
        self.items = ipw.SelectMultiple(description="history", rows=10, style=style, layout=wide)
        self.buttons = {
            name: ipw.Button(description=name, tooltip=tip, layout=ipw.Layout(width="auto"))
            for name, tip in {
                "add": "put the title at the end of the history",
                "earlier": "move what is marked in the history one place up",
                "later": "move what is marked in the history one place down",
                "remove": "take what is marked out of the history",
                "start again": "the user's own last items",
            }.items()
        }
        self._find()
        self._show_history(())
        self.search.observe(lambda _: self._find(), "value")
        for name, button in self.buttons.items():
            button.on_click(lambda _, name=name: self.press(name))
        left = ipw.VBox([self.user, self.search, self.found, self.buttons["add"]])
        edits = ipw.HBox([self.buttons[name] for name in ("earlier", "later", "remove", "start again")])
        above = ipw.Box([left, ipw.VBox([self.items, edits])], layout=ipw.Layout(flex_flow="row wrap"))
        super().__init__([self.user], self._lists, {self.user: self._own}, above)

    def press(self, name: str) -> None:
        """Do what a button says to the history, and draw what follows from it."""
        marked = list(self.items.value)
        history, places = self.history, marked
        if name == "add" and self.found.value is not None:
            history, places = (*self.history, self.found.value), [len(self.history)]
        elif name == "remove":
            history, places = without(self.history, marked), []
        elif name in ("earlier", "later"):
            history, places = moved(self.history, marked, -1 if name == "earlier" else 1)
        elif name == "start again":
            history, places = self._lineup.users[self.user.value].history[-self._first :], []
        if history != self.history:
            self.before, self.history = self.history or None, history
            self._show_history(places)
            self.redraw()

    def _own(self) -> None:
        self.before, self.history = None, self._lineup.users[self.user.value].history[-self._first :]
        self._show_history(())

    def _find(self) -> None:
        hits = search(self._lineup, self.search.value)
        self.found.options = [(self._lineup.titles[item], item) for item in hits]
        self.found.value = hits[0] if hits else None  # so that "add" can follow at once

    def _show_history(self, places: Sequence[int]) -> None:
        self.items.options = options(self._lineup, self.history)
        self.items.value = tuple(places)

    def _lists(self) -> list[Any]:
        lineup, user, history = self._lineup, self.user.value, self.history
        target = next_item(lineup, user, history)
        table = side_by_side(lineup, history, self._k, self.before, target)
        gates = gate_figure(gate(lineup, history), lineup.gates)
        return [table, gates, _parameters(as_parameters(lineup, user, history))]


PREFIX = "plan_"  # of the notebook's parameters


def asked(p: Explore) -> Asked:
    """Return what the notebook's parameters ask for."""
    return Asked(**{name: getattr(p, PREFIX + name) for name in Asked.__dataclass_fields__})


def plan_as_parameters(one: Asked) -> str:
    """Return what was asked as YAML, a parameter file of the notebook: `papermill ... -f FILE`."""
    return yaml.safe_dump({PREFIX + k: v for k, v in asdict(one).items()}, sort_keys=False).strip()


# -- for people ----------------------------------------------------------------------------------------------


def summary(one: Asked, found: Plan) -> str:
    """Return the plan as a few lines of HTML: what it is, and the numbers that one asks for first."""
    model, narrow = one.model(), one.narrow()
    count = sum(work.parameters(model).values())
    what = f"{_count(count)} parameters"
    if narrow is not None:
        trained = work.trained_parameters(model, narrow)
        what = f"{_count(trained)} of {what} trained: {one.adapter}, rank {one.rank}"
    title = (
        f"<b>{escape(one.size)}</b> ({what}) on <b>{escape(found.name)}</b>, {found.precision}: "
        f"<b>predicted, {found.basis}</b> (ranges: {_range_text(found)})"
    )
    cells = {
        "step": _ranged(found.step),
        "rate": f"{found.sequences / found.step.seconds:,.0f} sequences/s",
        f"epoch of {_count(found.users)} users": _ranged(found.epoch),
        "memory at the peak": _fits(found),
        "cost of an epoch": _cost(found),
    }
    head = "".join(f'<th style="text-align:left">{escape(name)}</th>' for name in cells)
    body = "".join(f'<td style="text-align:left">{value}</td>' for value in cells.values())
    ways = f"<p>{escape(found.ways)}</p>" if found.ways else ""
    table = f"<table><thead><tr>{head}</tr></thead><tbody><tr>{body}</tr></tbody></table>"
    return f"<p>{title}</p>{table}{ways}"


def _range_text(found: Plan) -> str:
    if found.device in hardware.catalogue():
        return "assumed efficiency"
    said = "worst error of rows that no fit had seen"
    return said if found.basis == "validated" else f"{said}, too few of which were such a run"


def _fits(found: Plan) -> str:
    used = f"{found.peak_bytes / GIB:.2f} GiB"
    if found.memory_bytes is None:
        return f"<b>{used}</b>, resident in the process"
    said = "fits" if found.fits else "DOES NOT FIT"
    largest = (
        f"largest batch {found.largest_batch:,}" if found.largest_batch else "not even a batch of 1 fits"
    )
    return f"<b>{used}</b> of {found.memory_bytes / GIB:.0f}: <b>{said}</b>; {largest}"


def _cost(found: Plan) -> str:
    if found.price is None:
        return "no price given"
    low, likely, high = (
        found.cost(s) or 0.0 for s in (found.epoch.low, found.epoch.seconds, found.epoch.high)
    )
    return f"<b>{likely:.3g}</b> ({low:.3g} to {high:.3g})"


def _ranged(time: Estimate) -> str:
    return f"<b>{duration(time.seconds)}</b> ({duration(time.low)} to {duration(time.high)})"


def _count(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:,.0f}"
