"""The panels of notebook 07, turned from Python as the browser would; lists and histories under them."""

import html
from typing import Any

import pytest
import torch
import yaml
from conftest import refused, smoke
from figure_records import record
from small_models import scores_after

from reclib import hardware, system
from reclib.config import TrainConfig
from reclib.cost import planner
from reclib.experiments import explore
from reclib.experiments.explore import Selection
from reclib.parameters import Explore
from reclib.train import saving

CPU = hardware.resolve("cpu")
PLOTLY = "application/vnd.plotly.v1+json"
SMALL = {"max_len": 16, "batch_size": 32, "epochs": 6, "adapter_epochs": 4, "history_items": 6, "top_k": 5}


def small(**changes: object) -> Explore:
    return smoke("07_explore", **(SMALL | changes))


FLOAT, HALF = {"precision": "fp32", "batch_size": 32}, {"precision": "bf16", "batch_size": 64}


def row(name: str = "step", rate: float = 900.0, seconds: float = 0.07, **changes: object) -> dict:
    own, numbers = FLOAT, {"sequences_per_second": rate, "step_seconds": seconds}
    about = {"device": {"name": "a processor"}, "params": {"size": "tiny", "precisions": ["fp32"]}}
    about |= {"git": {"commit": "0123456789abcdef"}, "versions": {"torch": "2.13.0"}}
    return record("04_amp_compile", name, own, numbers) | about | changes


ROWS = [
    row(),
    row(rate=1500.0, seconds=0.05, own_params=HALF),
    row(rate=60_000.0, seconds=0.001, own_params=HALF, kind="predicted", label="l4"),
    row("test_metrics", metrics={"hr@10": 0.1}, own_params={"model": "ease"}),
]


def shown(panel: explore.Panel) -> list[dict[str, Any]]:
    """Return what a panel shows, as outputs of a notebook."""
    last = panel.children[-1]
    return shown(last) if isinstance(last, explore.Panel) else [output["data"] for output in last.outputs]


def texts(panel: explore.Panel) -> list[str]:
    return [output["text/html"] for output in shown(panel) if "text/html" in output]


def figures(panel: explore.Panel) -> list[dict[str, Any]]:
    return [output[PLOTLY] for output in shown(panel) if PLOTLY in output]


def controls(panel: Any) -> dict[str, Any]:
    """Return every control under a widget, by its description."""
    by_description = {}
    for child in getattr(panel, "children", ()):
        if getattr(child, "description", ""):
            by_description[child.description] = child
        by_description |= controls(child)
    return by_description


def parameters(panel: explore.Panel) -> dict[str, Any]:
    """Return the parameters that a panel shows as its state."""
    text = html.unescape(texts(panel)[-1])
    return yaml.safe_load(text[text.index("<pre>") + 5 : text.index("</pre>")])


# -- what would it cost? -------------------------------------------------------------------------------------


def test_the_cost_panel_plans_what_its_controls_say():
    panel = explore.cost_panel(small())
    turned = controls(panel)
    assert len(turned) == 12
    assert "Controls" in repr(panel)
    before = texts(panel)
    turned["batch"].value = 65_536
    assert before[0] != texts(panel)[0]
    assert len(figures(panel)) == 2
    assert parameters(panel)["plan_batch_size"] == 65_536
    assert small(**parameters(panel)).plan_items is None  # the size's own
    turned["size"].value = "5m"
    assert "5,118,250 parameters" in texts(panel)[0]
    turned["precision"].value = "tf32"
    turned["device"].value = "t4"
    assert texts(panel)[0].startswith("<p><b>")  # a wrong choice is shown
    turned["precision"].value = "auto"
    assert "fp16" in texts(panel)[0]
    turned["device"].value = next(iter(planner.cpus()))
    assert "predicted, validated" in texts(panel)[0]


# -- any result against any other ----------------------------------------------------------------------------


def test_a_selection_draws_every_record_once_and_tells_measured_from_predicted():
    selection = Selection("step", "batch_size", "sequences_per_second", "precision")
    figure = explore.scatter(ROWS, selection)
    points = {(*trace.name.split(", "), trace.marker.symbol): list(trace.x) for trace in figure.data}
    assert points == {
        ("fp32", "measured", "circle"): [32],
        ("bf16", "measured", "circle"): [64],
        ("bf16", "predicted", "circle-open"): [64],
    }
    for part in ("commit: 0123456789", "device: a processor", "torch: 2.13.0", "dataset: ml-100k"):
        assert part in figure.data[0].customdata[0][0]
    assert figure.layout.yaxis.type == "log"  # 900 to 60,000
    assert figure.layout.yaxis.title.text == "sequences per second"
    assert "3 records on cpu, l4" in figure.layout.title.subtitle.text
    (only,) = explore.scatter(ROWS, selection._replace(labels=["l4"])).data
    assert list(only.y) == [60_000]


def test_what_cannot_be_drawn_is_refused_with_what_can():
    for selection, message in [
        (Selection("stp", "a", "b"), "no record of 'stp' (did you mean 'step'?)"),
        (Selection("step", "batch_siz", "step_seconds"), "x='batch_siz' (did you mean 'batch_size'?)"),
        (Selection("step", "batch_size", "label"), "y='label'"),
        (Selection("step", "batch_size", "step_seconds", "day"), "color='day'"),
        (Selection("step", "batch_size", "step_seconds", "label", ["a100"]), "'a100'; 'step' has: cpu, l4"),
    ]:
        assert message in refused(None, explore.scatter, ROWS, selection)


def test_a_kind_of_result_brings_its_axes():
    rows = [*ROWS, *(row("ladder", rate, 0.1 * rate) for rate in (1.0, 2.0))]
    panel = explore.results_panel(rows, Selection("step", "batch_size", "sequences_per_second", "precision"))
    turned = controls(panel)
    assert turned["result"].options == ("ladder", "step")  # test_metrics has one number
    turned["x"].value = "step_seconds"
    assert parameters(panel)["x"] == "step_seconds"
    turned["result"].value = "ladder"
    assert set(controls(panel)["x"].options) == {"sequences_per_second", "step_seconds"}
    assert Selection(**parameters(panel)).result == "ladder"


# -- what would be recommended -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lineup(dataset, tmp_path_factory):
    """A small base with its adapters, trained once."""
    folder = tmp_path_factory.mktemp("lineup")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIB_RUNS", str(folder / "runs"))
        patch.setenv("RECLIB_MODELS", str(folder / "models"))  # none is kept there
        yield explore.lineup(small(), dataset, CPU)


def test_a_history_is_written_added_to_and_put_in_another_order(lineup):
    key, initial = explore.first_history(small(), lineup)
    panel = explore.recommend_panel(lineup, key, initial, 6, 5)
    turned = controls(panel)
    assert len(turned) == 3

    def table_and_gate() -> tuple[str, tuple[float, ...]]:
        return texts(panel)[0], tuple(figures(panel)[0]["data"][0]["y"])

    history, views = turned["history"], [table_and_gate()]
    first = history.value.splitlines()
    assert "next" in views[0][0]
    turned["add a title"].value = lineup.titles[3]
    assert history.value.splitlines() == [*first, lineup.titles[3]]
    assert turned["add a title"].value == ""
    views.append(table_and_gate())
    history.value = "\n".join([first[-1], lineup.titles[3], "", *first[:2]])
    views.append(table_and_gate())
    assert [len(set(of_views)) for of_views in zip(*views, strict=True)] == [3, 3]
    ids = [lineup.titles.index(title) for title in history.value.splitlines() if title]
    assert parameters(panel)["history"] == [lineup.keys[item] for item in ids]
    assert explore.written(lineup, history.value) == tuple(ids)
    other = next(user for user in lineup.users if user != key)
    turned["user"].value = other
    ends = lineup.users[other].history[-6:]
    assert parameters(panel) == {"user": other, "history": [lineup.keys[item] for item in ends]}


@pytest.fixture
def history(lineup):
    return explore.first_history(small(), lineup)[1]


def test_a_list_is_that_of_the_models_scores_without_what_was_seen(lineup, history):
    ranks = explore.ranks(lineup, "base", history)
    best = explore.top(ranks, 5)
    assert ranks[best].tolist() == [1, 2, 3, 4, 5]
    assert not ranks[list(history)].any()
    scores = scores_after(lineup.models["base"], history)
    scores[torch.tensor(history) - 1] = -torch.inf
    assert best == (scores.topk(5).indices + 1).tolist()
    assert "the history is empty" in refused(None, explore.ranks, lineup, "base", ())


def test_a_history_is_handed_on_and_read_back(lineup, history):
    key = list(lineup.users)[1]
    p = small(user=key, history=[lineup.keys[item] for item in history[:3]])
    assert explore.first_history(p, lineup) == (key, history[:3])
    for wrong, part in [({"user": "nobody"}, "not in the last"), ({"history": ["x"]}, "unknown item 'x'")]:
        assert part in refused(None, explore.first_history, small(**wrong), lineup)


def test_a_kept_model_is_used_where_there_is_one(lineup, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_MODELS", str(tmp_path))
    assert explore.kept_model("auto", dataset) is None
    assert "kept_model='mine': no masked model" in refused(None, explore.kept_model, "mine", dataset)
    folder = saving.save_model(lineup.models["base"], TrainConfig(), dataset, "mine", {})
    assert folder.parent == system.models()
    assert explore.kept_model("auto", dataset) == "mine"
    assert explore.kept_model("none", dataset) is None
    of_kept = explore.lineup(small(), dataset, CPU)
    assert "mine, kept under models/" in of_kept.description
    assert {user.target for user in of_kept.users.values()} == {None}  # it may have learnt them
