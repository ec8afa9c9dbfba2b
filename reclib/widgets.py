"""Controls over the pure functions of `explore`: what a person in JupyterLab turns. Nothing is computed here.

Every control has a description and takes the keyboard. What is shown is drawn anew on each change; the
notebook follows each panel with the same figure as a static one, for a reader without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as ipw
from IPython.display import display

from reclib import explore, explore_figures
from reclib.config import InputError
from reclib.tables import Record

_WIDE = {"description_width": "8em"}
_LAYOUT = ipw.Layout(width="26em", max_width="100%")


def panel(controls: Sequence[ipw.Widget], draw: Callable[[], Sequence[Any]]) -> ipw.VBox:
    """Return the controls above what `draw` returns, drawn anew whenever a control's value changes.

    An `InputError` of `draw` is shown in place of the result: a choice that makes no sense is no crash.
    """
    shown = ipw.Output()

    def redraw(_: Any = None) -> None:
        try:
            things = list(draw())
        except InputError as error:
            things = [ipw.HTML(f"<b>{escape(str(error))}</b>")]
        shown.clear_output(wait=True)
        with shown:
            display(*things)

    for control in controls:
        control.observe(redraw, "value")
    redraw()
    rows = ipw.Box(list(controls), layout=ipw.Layout(flex_flow="row wrap"))
    return ipw.VBox([rows, shown])


def menu(description: str, options: Sequence[Any], value: Any) -> ipw.Dropdown:
    """Return a menu; a value that is not among the options gives way to the first of them."""
    chosen = value if value in options else options[0]
    return ipw.Dropdown(
        options=list(options), value=chosen, description=description, style=_WIDE, layout=_LAYOUT
    )


def results(records: Sequence[Record], selection: explore.Selection) -> ipw.VBox:
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
        style=_WIDE,
        layout=_LAYOUT,
    )

    def other_result(change: dict[str, Any]) -> None:
        first = explore.first_selection(records, change["new"])
        here = explore.frame(records, first.result)
        labels.options, labels.value = sorted(set(here["label"])), ()
        for control, names, value in (
            (x, explore.numbers(here), first.x),
            (y, explore.numbers(here), first.y),
            (color, explore.colors(here), first.color),
        ):
            control.options = names
            control.value = value

    def draw() -> list[Any]:
        now = explore.Selection(kind.value, x.value, y.value, color.value, tuple(labels.value))
        said = f"<pre>{escape(explore.as_parameters(now))}</pre>"
        return [explore_figures.scatter(explore.chosen(records, now), now), ipw.HTML(said)]

    kind.observe(other_result, "value")  # before the panel's own look at the same change
    return panel([kind, x, y, color, labels], draw)


def _can_be_drawn(records: Sequence[Record], result: str) -> bool:
    return len(explore.numbers(explore.frame(records, result))) > 1
