"""What would it cost: one run on one device and on all, in numbers, in words and as a figure."""

from __future__ import annotations

import pytest
import yaml

from reclib import hardware, parameters
from reclib.cost import planner
from reclib.cost.planner import Asked
from reclib.experiments import explore
from reclib.report import speed_figures, style

SMOKE = parameters.profile("07_explore", "smoke")


def asked(**changes: object) -> Asked:
    given = {f"plan_{name}": value for name, value in changes.items()}
    return explore.asked(parameters.build("07_explore", SMOKE | given))


def test_parameters_are_handed_on_and_back():
    one = asked(device="a100-40", items=1000, batch_size=64, price=2.5)
    assert (
        explore.asked(parameters.build("07_explore", SMOKE | yaml.safe_load(explore.plan_as_parameters(one))))
        == one
    )


def test_the_parts_of_the_peak_add_up_to_it_on_every_device():
    found = planner.every_plan(asked())
    assert [plan.device for plan in found] == [*planner.cpus(), *hardware.catalogue()]
    for plan in found:
        parts = planner.memory_parts(plan)
        assert sum(parts.values()) == plan.peak_bytes
        assert min(parts.values()) > 0
        assert parts[planner.RUN] == plan.process_bytes


def test_a_device_without_the_precision_asked_for_has_its_own():
    found = {plan.device: plan.precision for plan in planner.every_plan(asked(device="l4", precision="tf32"))}
    assert (found["l4"], found["h100"], found["t4"], found[next(iter(planner.cpus()))]) == (
        *("tf32", "tf32", "fp16", "fp32"),
    )
    assert planner.precisions("t4") == ["auto", "fp32", "fp16"]


def test_only_the_device_asked_for_has_a_cost():
    costs = {plan.device: plan.numbers()["cost_per_epoch"] for plan in planner.every_plan(asked(price=3.6))}
    (plan,) = [plan for plan in planner.every_plan(asked(price=3.6)) if plan.device == "l4"]
    assert costs.pop("l4") == pytest.approx(plan.epoch.seconds / 1000)
    assert set(costs.values()) == {None}


def test_the_summary_says_what_it_is_and_whether_it_fits():
    said = explore.summary(asked(), planner.plan_of(asked()))
    for part in ("predicted, unvalidated", "assumed efficiency", "NVIDIA L4", "bf16", "fits"):
        assert part in said
    label = next(iter(planner.cpus()))
    cpu = explore.summary(asked(device=label), planner.plan_of(asked(device=label)))
    assert "predicted, validated" in cpu
    full = asked(device="t4", size="430m", batch_size=65_536)
    said = explore.summary(full, planner.plan_of(full))
    assert "DOES NOT FIT" in said
    assert "micro_batch_size" in said  # a way on
    adapted = explore.summary(asked(adapter="lora"), planner.plan_of(asked(adapter="lora")))
    assert "parameters trained: lora, rank 8" in adapted


def test_durations_have_a_unit_that_suits_them():
    for seconds, said in [
        (0.04, "40 ms"),
        (1.5, "1.5 s"),
        (600, "10 min"),
        (1e4, "2.78 h"),
        (1e6, "11.6 days"),
    ]:
        assert style.duration(seconds) == said


def test_figures_are_hatched_and_show_every_part_and_device():
    one, every = planner.plan_of(asked()), planner.every_plan(asked())
    figure = speed_figures.parts(one)
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert {trace.marker.pattern.shape for trace in bars} == {"/"}  # predicted
    assert sum(trace.x[0] for trace in bars[:-1]) == pytest.approx(one.peak_bytes / hardware.GIB)
    assert sum(bars[-1].x) == pytest.approx(1e3 * one.step.seconds)
    assert "predicted, unvalidated" in figure.layout.title.subtitle.text
    table = speed_figures.by_device(planner.table(asked(), every))
    shown = {name for trace in table.data if trace.type == "scatter" for name in trace.y}
    assert shown == {plan.device for plan in every}
    assert "fits on 10 of 10 GPUs, predicted" in table.layout.title.text
    epochs = [trace for trace in table.data if trace.error_x.array is not None]
    assert {trace.marker.symbol for trace in epochs} == {"circle-open"}
    assert {trace.name for trace in epochs} == {"epoch, validated", "epoch, unvalidated"}


def test_a_table_of_plans_is_that_of_their_records(tmp_path, monkeypatch):
    from reclib import records
    from reclib.experiments import comparison
    from reclib.report import findings, tables

    monkeypatch.setenv("RECLIB_RECORDS", str(tmp_path))
    p = parameters.build("07_explore", SMOKE)
    run = records.Run("07_explore", p, dict.fromkeys(records.CARD) | {"label": "cpu", "type": "cpu"})
    one, every = asked(), planner.every_plan(asked())
    for plan in every:
        run.result(
            "plan",
            planner.counted(plan),
            params=planner.about(one, plan),
            timings=planner.timed(plan),
            series=planner.series(plan),
            kind="predicted",
            device=comparison.card_of(plan),
        )
    found = tables.table(records.read(tmp_path)).sort_values(["device", "part"], ignore_index=True)
    live = planner.table(one, every).sort_values(["device", "part"], ignore_index=True)
    for column in ("device", "part", "bytes", "epoch_seconds", "status", "basis", "size"):
        assert found[column].tolist() == live[column].tolist()
    assert {r["kind"] for r in records.read(tmp_path)} == {"predicted"}
    said = " ".join(findings.sentences("07_explore", records.read(tmp_path)))
    assert "85m at a batch of 512 fits on 10 of 10 GPUs" in said
    assert "plans are unvalidated" in said
