"""Controls over pure functions: what a person in JupyterLab turns. Nothing is computed here.

Every control has a description and takes the keyboard. What is shown is drawn anew on each change; the
notebook follows each panel with the same as static outputs, for a reader without a kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import ipywidgets as ipw

from reclib import explore, explore_figures, quote, quote_figures, recommend
from reclib.config import SIZES, InputError
from reclib.quote import Asked
from reclib.recommend import Lineup
from reclib.tables import Record

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


def cost(asked: Asked) -> Panel:
    """Return menus and sliders for a training run and a device, over what it is predicted to take."""
    model = asked.model()
    sizes = [asked.size, *(name for name in SIZES if not name.startswith("w") and name != asked.size)]
    controls: dict[str, Any] = {
        "device": menu("device", quote.device_labels(), asked.device),
        "size": menu("size", sorted(sizes, key=list(SIZES).index), asked.size),
        "items": stops("catalogue", _ITEMS, model.num_items),
        "mean_len": stops("mean length", _MEAN_LENS, asked.mean_len),
        "max_len": stops("max_len", _MAX_LENS, asked.max_len),
        "batch_size": stops("batch", _BATCHES, asked.batch_size),
        "precision": menu("precision", quote.precisions(asked.device), asked.precision),
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
        controls["precision"].options = quote.precisions(controls["device"].value)
        controls["precision"].value = before if before in controls["precision"].options else "auto"

    def draw() -> list[Any]:
        now = Asked(**asdict(asked) | {name: control.value for name, control in controls.items()})
        found = quote.plan(now)
        everywhere = quote_figures.by_device(quote.table(now, quote.every_plan(now)))
        said = _parameters(quote.as_parameters(now))
        return [quote.summary(now, found), quote_figures.parts(found), everywhere, said]

    follow = {controls["size"]: other_size, controls["device"]: other_device}
    return Panel(list(controls.values()), draw, follow)


# -- results -------------------------------------------------------------------------------------------------


def results(records: Sequence[Record], selection: explore.Selection) -> Panel:
    """Return menus for the kind of result, both axes, the colour and the devices, over the figure.

    Below the figure stands the selection as parameters, to be handed on.
    """
    drawable = [name for name in explore.results(records) if _can_be_drawn(records, name)]
    rows = explore.frame(records, selection.result)
    kind = menu("result", drawable, selection.result)
    x = menu("across", explore.numbers(rows), selection.x)
    y = menu("upwards", explore.numbers(rows), selection.y)
    color = menu("colour", explore.colors(rows), selection.color)
    labels = ipw.SelectMultiple(
        options=sorted(set(rows["label"])),
        value=selection.labels,
        description="devices",
        rows=3,
        style=_STYLE,
        layout=ipw.Layout(**_WIDTH),
    )

    def other_result() -> None:
        first = explore.first_selection(records, kind.value)
        here = explore.frame(records, first.result)
        labels.value = ()
        labels.options = sorted(set(here["label"]))
        for control, names, value in (
            (x, explore.numbers(here), first.x),
            (y, explore.numbers(here), first.y),
            (color, explore.colors(here), first.color),
        ):
            control.options = names
            control.value = value

    def draw() -> list[Any]:
        now = explore.Selection(kind.value, x.value, y.value, color.value, tuple(labels.value))
        figure = explore_figures.scatter(explore.chosen(records, now), now)
        return [figure, _parameters(explore.as_parameters(now))]

    return Panel([kind, x, y, color, labels], draw, {kind: other_result})


def _can_be_drawn(records: Sequence[Record], result: str) -> bool:
    return len(explore.numbers(explore.frame(records, result))) > 1


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
            history, places = recommend.without(self.history, marked), []
        elif name in ("earlier", "later"):
            history, places = recommend.moved(self.history, marked, -1 if name == "earlier" else 1)
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
        hits = recommend.search(self._lineup, self.search.value)
        self.found.options = [(self._lineup.titles[item], item) for item in hits]
        self.found.value = hits[0] if hits else None  # so that "add" can follow at once

    def _show_history(self, places: Sequence[int]) -> None:
        self.items.options = recommend.options(self._lineup, self.history)
        self.items.value = tuple(places)

    def _lists(self) -> list[Any]:
        lineup, user, history = self._lineup, self.user.value, self.history
        target = recommend.next_item(lineup, user, history)
        table = recommend.side_by_side(lineup, history, self._k, self.before, target)
        gates = explore_figures.gate(recommend.gate(lineup, history), lineup.gates)
        return [table, gates, _parameters(recommend.as_parameters(lineup, user, history))]
