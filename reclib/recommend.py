"""What would be recommended to whom: the best items of a base and of its adapters, after any history.

A base that is kept (`kept`) is used where there is one of the dataset; else a small one is trained on the
past (`periods`), in seconds. LoRA and iLoRA are trained on top of either on what came next, a few steps each.
What follows is pure: a history of item ids goes in, lists and gates come out.

Shapes: I real items, K experts, k recommendations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
import yaml

from reclib import adaptation, adaptation_results, kept, metrics, params, paths, splits
from reclib.config import InputError
from reclib.data import Dataset, Evaluation
from reclib.dataset import Histories
from reclib.hardware import Device
from reclib.ilora import AdaptedModel
from reclib.model import Bert4Rec
from reclib.notebook_params import Explore, ILora
from reclib.trainer import Trainer

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
        base = kept.load(name).model.to(device.torch_device)
    adapters = {
        arm: adaptation.train_arm(asked, arm, base, dataset, task, device, p.seed, p.adapter_learning_rate)[0]
        for arm in ("lora", "ilora")
    }
    gates = adaptation_results.expert_weights(adapters["ilora"], task.split.test)
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
    return params.build("05_ilora", params.profile("05_ilora", "smoke") | given)


def kept_model(asked: str, dataset: Dataset) -> str | None:
    """Return the kept model to use: the one asked for, or for `auto` the newest of the dataset.

    None where there is none, and for `none`. A causal model has no one gate for a history and is left out.
    """
    if asked == "none":
        return None
    files = paths.models().glob(f"*/{kept.MANIFEST}")
    found = []
    for file in sorted(files, key=lambda one: one.stat().st_mtime, reverse=True):
        same = json.loads(file.read_text("utf-8")).get("data", {}).get("fingerprint") == dataset.fingerprint
        shape = json.loads((file.parent / kept.CONFIG).read_text("utf-8"))
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
    return adaptation_results.expert_weights(lineup.gated, _asked(history))[0]


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
