"""The panels of notebook 07, turned from Python as the browser would: what is shown changes."""

from __future__ import annotations

import html
from typing import Any

import pytest
import yaml
from lineups import asked, trained
from spread import dataset  # noqa: F401  # a fixture
from test_explore import ROWS

from reclib.cost import planner
from reclib.experiments import explore

PLOTLY = "application/vnd.plotly.v1+json"


def shown(panel: explore.Panel) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the texts and the figures that a panel shows."""
    data = [output["data"] for output in panel.shown.outputs]
    return [d["text/html"] for d in data if "text/html" in d], [d[PLOTLY] for d in data if PLOTLY in d]


def controls(panel: Any) -> dict[str, Any]:
    """Return every control under a widget, by its description."""
    found = {}
    for child in getattr(panel, "children", ()):
        if getattr(child, "description", ""):
            found[child.description] = child
        found |= controls(child)
    return found


def parameters(panel: explore.Panel) -> dict[str, Any]:
    text = html.unescape(shown(panel)[0][-1])
    return yaml.safe_load(text[text.index("<pre>") + 5 : text.index("</pre>")])


def test_every_control_has_a_description(lineup):
    key, history = explore.first_history(asked(), lineup)
    for panel, count in (
        (explore.cost_panel(explore.asked(asked())), 12),
        (explore.results_panel(ROWS, explore.first_selection(ROWS, "step")), 5),
        (explore.Recommend(lineup, key, history, 6, 5), 9),
    ):
        assert len(controls(panel)) == count
        assert "Controls" in repr(panel)


# -- what would it cost? -------------------------------------------------------------------------------------


def test_a_larger_batch_takes_more_and_the_parameters_say_so():
    panel = explore.cost_panel(explore.asked(asked()))
    turned = controls(panel)
    before = shown(panel)
    turned["batch"].value = 65_536
    after = shown(panel)
    assert before[0][0] != after[0][0]
    assert len(after[1]) == 2
    assert parameters(panel)["plan_batch_size"] == 65_536


def test_a_size_brings_its_catalogue_and_a_device_its_precisions():
    panel = explore.cost_panel(explore.asked(asked()))
    turned = controls(panel)
    turned["size"].value = "5m"
    assert turned["catalogue"].value == 18_345
    assert "5.12 M parameters" in shown(panel)[0][0]
    turned["precision"].value = "bf16"
    turned["device"].value = "t4"
    assert turned["precision"].options == ("auto", "fp32", "fp16")
    assert turned["precision"].value == "auto"
    assert "fp16" in shown(panel)[0][0]
    turned["device"].value = next(iter(planner.cpus()))
    assert "predicted, validated" in shown(panel)[0][0]


def test_what_does_not_fit_and_what_costs_nothing_is_said():
    panel = explore.cost_panel(explore.asked(asked(plan_size="430m", plan_device="t4")))
    turned = controls(panel)
    turned["batch"].value = 65_536
    assert "DOES NOT FIT" in shown(panel)[0][0]
    turned["price an hour"].value = 3.6
    assert "no price given" not in shown(panel)[0][0]
    many = turned["one item table (tied)"]
    before = shown(panel)[0][0]
    many.value = not many.value
    assert shown(panel)[0][0] != before


def test_an_adapter_takes_less_memory_and_says_how_much_it_trains():
    panel = explore.cost_panel(explore.asked(asked()))
    turned = controls(panel)
    before = shown(panel)[1][0]["layout"]["title"]["text"]
    turned["adapter"].value = "ilora"
    after = shown(panel)[1][0]["layout"]["title"]["text"]
    assert float(after.split()[0]) < float(before.split()[0])
    assert "85.1 M parameters trained: ilora, rank 8" in shown(panel)[0][0]
    turned["its rank"].value = 16
    assert "rank 16" in shown(panel)[0][0]
    assert (parameters(panel)["plan_adapter"], parameters(panel)["plan_rank"]) == ("ilora", 16)


# -- results -------------------------------------------------------------------------------------------------


def test_another_axis_another_figure():
    panel = explore.results_panel(ROWS, explore.Selection("step", "batch_size", "step_seconds", "kind"))
    controls(panel)["upwards"].value = "sequences_per_second"
    (figure,) = shown(panel)[1]
    assert figure["layout"]["yaxis"]["title"]["text"] == "sequences per second"
    assert parameters(panel) == {
        "result": "step",
        "x": "batch_size",
        "y": "sequences_per_second",
        "color": "kind",
        "labels": [],
    }


def test_another_result_has_axes_of_its_own_and_a_wrong_choice_is_told():
    scored = [
        ROWS[-1] | {"metrics": {"hr@10": value, "mrr": value / 2}, "own_params": {"model": model}}
        for model, value in (("ease", 0.1), ("markov", 0.2))
    ]
    panel = explore.results_panel([*ROWS[:3], *scored], explore.first_selection(ROWS, "step"))
    turned = controls(panel)
    turned["devices"].value = ("l4",)
    turned["result"].value = "test_metrics"
    assert turned["devices"].options == ("cpu",)
    assert (turned["across"].value, turned["upwards"].value) == ("hr@10", "mrr")
    assert parameters(panel)["result"] == "test_metrics"


# -- recommend -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lineup(dataset, tmp_path_factory):  # noqa: F811
    yield from trained(dataset, tmp_path_factory.getbasetemp() / "lineup")


@pytest.fixture
def panel(lineup):
    key, history = explore.first_history(asked(), lineup)
    return explore.Recommend(lineup, key, history, 6, 5)


def test_items_are_searched_added_moved_and_removed(panel, lineup):
    first, seen = panel.history, [shown(panel)]
    panel.search.value = lineup.titles[3]
    assert lineup.titles[3] in [title for title, _ in panel.found.options]
    panel.found.value = 3
    panel.buttons["add"].click()
    assert panel.history == (*first, 3)
    seen.append(shown(panel))
    panel.buttons["earlier"].click()  # what was added is marked
    assert panel.history == (*first[:-1], 3, first[-1])
    seen.append(shown(panel))
    panel.items.value = (0, 1)
    panel.buttons["remove"].click()
    assert panel.history == (*first[2:-1], 3, first[-1])
    seen.append(shown(panel))
    assert len({text for texts, _ in seen for text in texts[:1]}) > 2
    assert len({tuple(gate["data"][0]["y"]) for _, (gate,) in seen}) == 4
    assert parameters(panel)["history"] == [lineup.keys[item] for item in panel.history]
    panel.buttons["start again"].click()
    assert panel.history == first


def test_another_user_another_history_and_gate(panel, lineup):
    texts, (gate,) = shown(panel)
    assert "next" in texts[0]
    panel.user.value = list(lineup.users)[1]
    assert panel.history == lineup.users[panel.user.value].history[-6:]
    assert shown(panel)[1][0]["data"][0]["y"] != gate["data"][0]["y"]
    assert "new" not in shown(panel)[0][0]  # another user is no change of a history


def test_a_history_can_be_built_from_nothing(panel):
    panel.items.value = tuple(range(len(panel.history)))
    panel.buttons["remove"].click()
    assert panel.history == ()
    assert "the history is empty" in shown(panel)[0][0]
    panel.search.value = "no such title"
    panel.buttons["add"].click()
    assert panel.history == ()
    panel.search.value = ""  # all titles again, the first one marked
    panel.buttons["add"].click()
    assert len(panel.history) == 1
    assert "iLoRA" in shown(panel)[0][0]
