"""The explorer: what can be drawn against what, what is refused, and where a point says it is from."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from reclib.config import InputError
from reclib.experiments import explore


def row(name: str = "step", **changes: object) -> dict:
    return {
        "notebook": "04_amp_compile",
        "name": name,
        "kind": "measured",
        "label": "cpu",
        "profile": "quick",
        "seed": None,
        "device": {"name": "a processor"},
        "data": {"name": "ml-100k", "items": 1349},
        "metrics": {"sequences_per_second": 900.0, "step_seconds": 0.07},
        "timings": {},
        "params": {"size": "tiny", "precisions": ["fp32"]},
        "own_params": {"precision": "fp32", "batch_size": 32},
        "configuration": {},
        "git": {"commit": "0123456789abcdef"},
        "versions": {"torch": "2.13.0"},
        "time": "2026-11-24T10:00:00+00:00",
    } | changes


ROWS = [
    row(),
    row(
        own_params={"precision": "bf16", "batch_size": 64},
        metrics={"sequences_per_second": 1500.0, "step_seconds": 0.05},
    ),
    row(
        own_params={"precision": "bf16", "batch_size": 64},
        metrics={"sequences_per_second": 60_000.0, "step_seconds": 0.001},
        kind="predicted",
        label="l4",
    ),
    row("test_metrics", metrics={"hr@10": 0.1}, own_params={"model": "ease"}),
]


def test_results_are_listed_by_how_many_records_they_have():
    assert explore.results(ROWS) == {"step": 3, "test_metrics": 1}


def test_axes_are_numbers_that_differ():
    rows = explore.frame(ROWS, "step")
    assert set(explore.numbers(rows)) == {"batch_size", "sequences_per_second", "step_seconds"}
    assert {"precision", "label", "kind"} <= set(explore.colors(rows))
    assert rows["model"].unique().tolist() == ["BERT4Rec"]


def test_a_selection_draws_every_record_once_and_tells_measured_from_predicted():
    selection = explore.Selection("step", "batch_size", "sequences_per_second", "precision")
    figure = explore.scatter(explore.chosen(ROWS, selection), selection)
    points = {trace.name: (list(trace.x), trace.marker.symbol) for trace in figure.data}
    assert points == {
        "fp32": ([32], "circle"),
        "bf16": ([64], "circle"),
        "bf16, predicted": ([64], "circle-open"),
    }
    (said,) = next(trace.text for trace in figure.data if trace.name == "fp32")
    for part in (
        "commit: 0123456789",
        "device: a processor",
        "torch: 2.13.0",
        "dataset: ml-100k",
        "profile: quick",
    ):
        assert part in said
    assert figure.layout.yaxis.type == "log"  # 900 to 60,000
    assert figure.layout.yaxis.title.text == "sequences per second"


def test_intervals_are_bars_and_no_axes():
    rows = [
        row("test_metrics", metrics={"hr@10": v, "hr@10_low": v - 0.01, "hr@10_high": v + 0.02, "mrr": v / 2})
        for v in (0.1, 0.2)
    ]
    selection = explore.first_selection(rows, "test_metrics")
    assert (selection.x, selection.y) == ("hr@10", "mrr")  # the first that there are
    turned = explore.Selection("test_metrics", "mrr", "hr@10")
    (trace,) = explore.scatter(explore.chosen(rows, turned), turned).data
    assert list(trace.error_y.array) == pytest.approx([0.02, 0.02])
    assert list(trace.error_y.arrayminus) == pytest.approx([0.01, 0.01])
    assert "HR@10" in explore.scatter(explore.chosen(rows, turned), turned).layout.title.text


def test_devices_can_be_left_out():
    selection = explore.Selection("step", "batch_size", "step_seconds", "kind", ("l4",))
    assert explore.chosen(ROWS, selection)["label"].tolist() == ["l4"]


def test_what_cannot_be_drawn_is_refused_with_what_can():
    for selection, said in [
        (explore.Selection("stp", "a", "b"), "no record of 'stp' .did you mean 'step'?"),
        (explore.Selection("step", "batch_siz", "step_seconds"), "x='batch_siz' .did you mean 'batch_size'?"),
        (explore.Selection("step", "batch_size", "label"), "y='label'"),
        (explore.Selection("step", "batch_size", "step_seconds", "day"), "color='day'"),
        (
            explore.Selection("step", "batch_size", "step_seconds", "kind", ("a100",)),
            "labels: 'a100' has no record of 'step'; there are: cpu, l4",
        ),
    ]:
        with pytest.raises(InputError, match=said):
            explore.chosen(ROWS, selection)


def test_a_result_with_one_number_has_nothing_to_draw():
    with pytest.raises(InputError, match="'test_metrics' has 0 numbers that differ"):
        explore.first_selection(ROWS, "test_metrics")


def test_a_selection_can_be_handed_on_as_parameters():
    selection = explore.Selection("step", "batch_size", "step_seconds", "kind", ("l4",))
    given = yaml.safe_load(explore.selection_as_parameters(selection))
    assert explore.Selection(**given | {"labels": tuple(given["labels"])}) == selection


def test_the_gate_of_a_history_stands_over_what_is_usual():
    usual = np.array([[0.1, 0.2, 0.7]] * 50 + [[0.3, 0.3, 0.4]] * 50)
    figure = explore.gate_figure(np.array([0.2, 0.5, 0.3]), usual)
    bars, medians = figure.data
    assert list(bars.y) == [0.2, 0.5, 0.3]
    assert list(medians.y) == pytest.approx([0.2, 0.25, 0.55])
    assert list(medians.error_y.array) == pytest.approx([0.1, 0.05, 0.15])
    assert "expert 2 has 50% of the weight" in figure.layout.title.text
    assert figure.layout.shapes[0].y0 == pytest.approx(1 / 3)
