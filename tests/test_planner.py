from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from engine import histories
from test_footprint import CASES, CPU, shapes_of, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from reclib import hardware, parameters, records
from reclib.config import InputError, TrainConfig, changed, model_config
from reclib.cost import planner, work
from reclib.cost.work import AdapterPlan
from reclib.experiments import comparison, speed
from reclib.model.bert4rec import Bert4Rec
from reclib.train import timing
from reclib.train.trainer import Trainer

LENGTHS = planner.typical_lengths()
MODEL, TRAIN = model_config("85m"), TrainConfig(batch_size=512)
RATES = {
    "head fp32": {32: 1e11, 1024: 2e11},
    "product fp32": {32: 1e11, 1024: 1e11},
    "attention": {50: 1e9, 200: 4e9},
    **dict.fromkeys(("gelu", "dropout", "norm", "add", "softmax", "lookup", "update"), 1e9),
    "norm of gradients": 1e9,
    "operator": 1e-6,
}
ERROR = {"of": "held-out", "rows": 10, "time_median": 0.1, "time_worst": 0.5, "memory_median": 0.05}
SHARES = dict.fromkeys(planner.GROUPS, 1.0)


def a_cpu(**changes) -> planner.Cpu:
    given = {"label": "cpu1", "name": "test", "rates": RATES, "shares": SHARES, "process_bytes": 10**8}
    given |= {"heap": {"held": 1.0, "layer": 1.0}}
    return planner.Cpu(**(given | {"error": ERROR} | changes))


# -- parts and seconds ---------------------------------------------------------------------------------------


def test_flops_of_the_parts_are_those_that_torch_counts():
    for case in CASES:
        changes, recipe = CASES[case]
        model = small_model(**changes)
        train = TrainConfig(batch_size=32, epochs=9, precision="fp32", **recipe)
        torch.manual_seed(0)
        some = histories([9] * 64, num_items=model.num_items)
        trainer = Trainer(Bert4Rec(model), some, train, CPU, "test")
        parts = work.step_parts(model, train, shapes_of(trainer, 1))
        loop = trainer.steps()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            next(loop)
        loop.close()
        assert counter.get_total_flops() == pytest.approx(sum(part.flops for part in parts), rel=1e-9)


def test_rates_are_interpolated_between_shapes_and_held_beyond_them():
    rates = {50: 1e9, 200: 4e9}
    assert planner.interpolated(rates, 100) == pytest.approx(2e9)
    assert planner.interpolated(rates, 10) == pytest.approx(1e9)
    assert planner.interpolated(rates, 999) == pytest.approx(4e9)


def test_shares_scale_their_group_and_no_other():
    slower = SHARES | {"attention": 3.0}
    one = planner.plan(a_cpu(), MODEL, TRAIN, LENGTHS).step.parts
    other = planner.plan(a_cpu(shares=slower), MODEL, TRAIN, LENGTHS).step.parts
    assert other["attention"] == pytest.approx(3 * one["attention"])
    assert {k: v for k, v in other.items() if k != "attention"} == {
        k: v for k, v in one.items() if k != "attention"
    }


def test_a_measured_cpu_has_the_band_of_its_held_out_rows():
    found = planner.plan(a_cpu(), MODEL, TRAIN, LENGTHS)
    assert found.basis == "validated"
    assert found.step.high == pytest.approx(1.5 * found.step.seconds)
    assert found.step.low == pytest.approx(found.step.seconds / 1.5)


def test_a_gpu_has_a_range_and_is_unvalidated():
    for board in hardware.catalogue().values():
        found = planner.plan(board, MODEL, TRAIN, LENGTHS)
        assert found.basis == "unvalidated"
        assert found.step.low < found.step.seconds < found.step.high
        assert found.precision == ("fp16" if board.capability < (8, 0) else "bf16")


def test_a_step_takes_no_less_than_the_data_sheet_allows():
    board = hardware.catalogue()["l4"]
    found = planner.plan(board, MODEL, TRAIN, LENGTHS)
    assert found.step.low > sum(found.flops.values()) / board.peaks["bf16"]
    assert found.step.low > found.bytes_moved / board.bandwidth * 0.5


def test_a_small_step_waits_for_the_host_and_a_large_one_does_not():
    board = hardware.catalogue()["h100"]
    small = planner.plan(board, model_config("nano"), TrainConfig(batch_size=32), LENGTHS)
    large = planner.plan(board, model_config("430m"), TrainConfig(batch_size=4096), LENGTHS)
    waiting = "waiting for the host"
    assert small.step.parts[waiting] > 0.5 * small.step.seconds
    assert large.step.parts[waiting] == 0


def test_packing_and_gathering_make_the_planned_step_shorter():
    board = hardware.catalogue()["a100-40"]
    padded = changed(TRAIN, layout="padded")
    everywhere = changed(padded, head_rows="all")
    steps = [planner.plan(board, MODEL, t, LENGTHS).step.seconds for t in (TRAIN, padded, everywhere)]
    assert steps[0] < steps[1] < steps[2] / 3


# -- plans ---------------------------------------------------------------------------------------------------


def test_an_epoch_and_its_cost_follow_from_the_step():
    (found,) = planner.plans("l4", MODEL, TRAIN, LENGTHS, users=51_200, price=3.6)
    numbers = found.numbers()
    assert numbers["epoch_seconds"] == pytest.approx(100 * numbers["step_seconds"])
    assert numbers["cost_per_epoch"] == pytest.approx(numbers["epoch_seconds"] / 1000)


def test_a_label_of_two_boards_gives_two_plans_that_differ_in_memory():
    small, large = planner.plans("a100", MODEL, TRAIN, LENGTHS)
    assert (small.device, large.device) == ("a100-40", "a100-80")
    assert small.largest_batch < large.largest_batch


def test_what_cannot_be_planned_is_told():
    for label, precision, said in [
        ("gtx970", "auto", "unknown device"),
        ("t4", "bf16", "no units"),
        ("cpu77", "auto", "no rates of"),
    ]:
        with pytest.raises(InputError, match=said):
            planner.plans(label, MODEL, changed(TRAIN, precision=precision), LENGTHS)
    with pytest.raises(InputError, match="not calibrated"):
        planner.plan(a_cpu(), MODEL, changed(TRAIN, precision="fp16"), LENGTHS)


def test_an_adapter_costs_less_than_training_everything_and_is_no_validated_plan():
    for label in ["l4", "cpu2 AMD EPYC"]:
        adapter = AdapterPlan(kind="ilora", rank=8)
        (full,) = planner.plans(label, MODEL, TRAIN, LENGTHS)
        (narrow,) = planner.plans(label, MODEL, TRAIN, LENGTHS, adapter=adapter)
        assert narrow.step.seconds < full.step.seconds
        assert narrow.peak_bytes < full.peak_bytes
        assert narrow.footprint.parts["optimizer"] == 8 * 132_096
        assert narrow.basis == "unvalidated"


def test_the_command_line_prints_a_prediction_and_says_so(capsys):
    assert planner.plan_main(["--size", "430m", "--gpu", "l4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["basis"], found["fits"]) == ("predicted", "unvalidated", 1)
    assert found["memory"]["weights"] == 4 * 429_153_286
    each = sum(found["memory"].values()) + work.CONTEXT_BYTES
    assert found["side_by_side"] == int(work.USABLE * 24 * 2**30) // each >= 1
    assert planner.plan_main(["--size", "430m", "--gpu", "l4", "--price", "0.7"]) == 0
    spoken = capsys.readouterr().out
    assert "predicted, unvalidated" in spoken
    assert "cost" in spoken


def test_the_command_line_plans_adapters_other_catalogues_and_losses_on_several_devices(capsys):
    def plans(*arguments: str) -> list[dict]:
        planner.plan_main(["--size", "85m", "--json", *arguments])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    small, large = plans("--gpu", "l4,h100", "--adapter", "ilora", "--rank", "8")
    assert (small["device"], large["device"], small["adapter"]) == ("l4", "h100", "ilora")
    (untied,) = plans("--gpu", "h100", "--items", "10000000")
    (tied,) = plans("--gpu", "h100", "--items", "10000000", "--tied", "--loss", "sampled_softmax")
    assert (untied["fits"], tied["fits"]) == (0, 1)
    assert tied["memory"]["weights"] < 0.51 * untied["memory"]["weights"]
    assert tied["flops"] < 0.01 * untied["flops"]


def test_the_command_line_says_what_does_not_fit_and_what_makes_no_sense(capsys):
    assert planner.plan_main(["--size", "430m", "--gpu", "t4", "--batch-size", "65536"]) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    assert "micro_batch_size=" in printed
    for wrong in (
        ["--size", "431m"],
        ["--mean-len", "2"],
        ["--price", "-1"],
        ["--gpu", "gtx970"],
        ["--rank", "8"],
    ):
        assert planner.plan_main(["--size", "85m", "--gpu", "l4", *wrong]) == 2, wrong
        printed = capsys.readouterr().err
        assert printed.count("\n") == 1, wrong
        assert printed.startswith("error: ")


# -- what was calibrated -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("predictions", "cpu"), [("amd-epyc", "AMD EPYC"), ("intel-xeon-6-207", "Intel Xeon 6/207")]
)
def test_committed_predictions_are_older_than_their_measurements(predictions, cpu):
    folder = ROOT / "executed/cpu/grids"
    before = json.loads((folder / f"planner-predictions-{predictions}.json").read_text())
    times = {title_of(one): one.get("time", before.get("time")) for one in before["rows"]}
    lines = [json.loads(line) for line in (folder / "planner.jsonl").read_text().splitlines()]
    rows = [r for r in lines if r["name"] == "planner_row"]
    mine = [r for r in rows if r["own_params"].get("cpu", r["device"]["name"]) == cpu]
    held_out = [r for r in mine if r["own_params"]["set"] == "held-out"]
    assert len(held_out) >= 10
    assert all(row["time"] > times[title_of(row["own_params"])] for row in held_out)
    assert {"5m", "85m", "130m"} <= {row["own_params"]["size"] for row in held_out}
    assert {row["own_params"]["threads"] for row in held_out} == {1, 2}


def title_of(row: dict) -> str:
    names = ("size", "threads", "batch_size", "mean_len", "max_len", "model", "adapter", "precision")
    return json.dumps({name: row[name] for name in names if name in row}, sort_keys=True)


def test_measured_cpus_are_two_devices_each_with_their_errors():
    for model in ("AMD EPYC", "Intel Xeon 6/207"):
        for threads in (1, 2):
            cpu = planner.cpus()[f"cpu{threads} {model}"]
            assert cpu.threads == threads
            assert cpu.error["of"] == "held-out"
            assert cpu.error["rows"] >= 10
            assert set(cpu.shares) == set(planner.GROUPS)


def test_a_kind_of_run_is_validated_by_rows_of_its_own():
    few, enough = {"rows": 2, "time_worst": 0.3}, {"rows": 4, "time_worst": 0.2}
    cpu = a_cpu(error=ERROR | {"adapted": enough, "bf16": few})
    rates = RATES | {
        "product bf16": RATES["product fp32"],
        "head bf16": RATES["head fp32"],
        "bandwidth": 1e10,
    }
    cpu = replace(cpu, rates=rates)
    adapted = planner.plan(cpu, MODEL, TRAIN, LENGTHS, adapter=AdapterPlan())
    half = planner.plan(cpu, MODEL, changed(TRAIN, precision="bf16"), LENGTHS)
    assert (adapted.basis, half.basis) == ("validated", "unvalidated")
    assert adapted.step.high == pytest.approx(1.2 * adapted.step.seconds)
    assert half.step.high == pytest.approx(1.3 * half.step.seconds)


def test_a_cpu_label_is_the_cpu_that_is_here(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_model", lambda: "Intel Xeon 6/207")
    assert planner.cpu("cpu2").label == "cpu2 Intel Xeon 6/207"
    monkeypatch.setattr(hardware, "cpu_model", lambda: "AMD EPYC 25/17")  # the first rows say the name only
    assert planner.cpu("cpu1").label == "cpu1 AMD EPYC"


def test_another_cpu_stands_in_for_one_that_was_not_calibrated_and_it_is_said(monkeypatch, capsys):
    monkeypatch.setattr(hardware, "cpu_model", lambda: "Pentium 5/1")
    found = planner.plan(planner.cpu("cpu2"), MODEL, TRAIN, LENGTHS)
    assert found.basis == "unvalidated"
    assert "Pentium 5/1, which was not calibrated" in found.name
    each = [planner.plan(one, MODEL, TRAIN, LENGTHS).step for one in planner.with_threads("cpu2")]
    assert found.step.low == min(one.low for one in each)
    assert found.step.high == max(one.high for one in each)
    assert planner.plan_main(["--size", "85m", "--gpu", "cpu2"]) == 0
    assert "not calibrated" in capsys.readouterr().out


# -- records -------------------------------------------------------------------------------------------------


def hardware_params(**changes):
    return parameters.build("06_hardware", parameters.profile("06_hardware", "smoke") | changes)


def test_prices_are_pairs_of_device_and_number():
    p = hardware_params(prices=["l4=0.7", "a100-80=3"])
    assert comparison.price_of(p, "l4") == 0.7
    assert comparison.price_of(p, "a100-40") is None
    with pytest.raises(InputError, match="no device=price"):
        comparison.prices(hardware_params(prices=["l4"]))


def test_predictions_lie_in_the_folder_of_their_device_and_are_never_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_RECORDS", str(tmp_path))
    p = hardware_params(gpu="l4", devices=["l4", "v100"], sizes=["5m"])
    card = dict.fromkeys(records.CARD) | {"label": "cpu", "type": "cpu", "name": "test"}
    run = records.Run("06_hardware", p, card)
    for row in comparison.predicted(p):
        run.result(
            "hardware_step",
            row.metrics,
            params=row.own_params,
            timings=row.timings,
            kind="predicted",
            device=row.card,
        )
    found = records.read(tmp_path)
    assert {r["label"] for r in found} == {"l4", "v100-16", "v100-32"}
    assert {r["kind"] for r in found} == {"predicted"}
    assert all("data sheet" in r["device"]["name"] for r in found)
    with pytest.raises(ValueError, match="not here"):
        run.result("hardware_step", {}, device={"label": "l4"})


def test_no_committed_record_of_a_gpu_without_a_self_check_is_measured():
    for one in records.read(ROOT / "executed"):
        if one["label"] != "cpu" and not (ROOT / "executed" / one["label"] / "selfcheck.json").is_file():
            assert one["kind"] == "predicted", (one["label"], one["name"])
        if one["kind"] == "predicted" and one["notebook"] != "03_scaling":  # of a loss, not of a device
            assert one["own_params"].get("basis") in ("validated", "unvalidated")


def test_gains_are_ratios_of_two_plans():
    p = hardware_params(devices=["l4"], sizes=["85m"])
    found = {row.own_params["technique"]: row.timings["speedup"] for row in comparison.gains(p)}
    assert set(found) == set(comparison.TECHNIQUES)
    assert found["gather before the head"] > found["packed rows"] > 1
    assert np.isfinite(list(found.values())).all()


def test_each_notebook_of_the_lease_ends_in_three_minutes_on_an_h100_by_its_slowest_plan():
    h100 = hardware.catalogue()["h100"]
    energy = timing.ENERGY_SECONDS

    def step(model, train, mean_len, adapter=None):
        lengths = planner.typical_lengths(mean_len)
        return planner.plan(h100, model, train, lengths, adapter=adapter).step.high

    p = parameters.build("06_hardware", parameters.profile("06_hardware", "lease"))
    pairs = [(comparison.model_of(p, size), rule) for size in p.measured_sizes for rule in ("fp32", "auto")]
    steps = p.warmup_steps + p.steps
    sizes = sum(
        steps * step(model, comparison.train_of(p, rule), p.mean_len) + energy for model, rule in pairs
    )

    p = parameters.build("04_amp_compile", parameters.profile("04_amp_compile", "lease"))
    model = model_config(p.size, num_items=p.synthetic_items, max_len=p.max_len)
    assert set(p.compile_modes) == {"off"}  # no plan knows how long compiling takes
    timed = p.warmup_steps + p.repeats * p.steps
    amp = sum(
        timed * step(model, TrainConfig(precision=precision, batch_size=size), p.synthetic_mean_len) + energy
        for precision in p.precisions
        for size in p.batch_sizes
    )
    first = TrainConfig(batch_size=p.batch_sizes[0], precision="fp32")
    rungs = speed.ladder(model, first, (("AMP", "precision", "bf16"),))
    of_rung = p.repeats * (p.warmup_steps + p.steps)
    amp += sum(of_rung * step(rung.model, rung.train, p.synthetic_mean_len) for rung in rungs)
    amp += 2 * p.synthetic_users / p.batch_sizes[0] * step(model, first, p.synthetic_mean_len)  # epochs

    p = parameters.build("05_ilora", parameters.profile("05_ilora", "lease"))
    model = model_config(p.size, num_items=1349, max_len=p.max_len)
    train = TrainConfig(batch_size=p.batch_size, precision="fp32")
    base, adapted = step(model, train, 50), step(model, train, 50, comparison.ILORA)
    per_epoch = -(-943 // p.batch_size)  # MovieLens 100K: of all users, where fewer have a past
    runs = len(p.tasks) * (len(p.arms) - 1) * (len(p.learning_rates) + len(p.seeds) - 1)
    arms = len(p.seeds) * p.base_epochs * per_epoch * base + runs * p.epochs * per_epoch * adapted
    arms += (4 + len(p.precisions)) * (p.warmup_steps + p.rounds) * adapted

    seconds = {"04": amp, "05": arms, "06": sizes}  # params/lease.yaml states them
    assert {name: round(value) for name, value in seconds.items()} == {"04": 43, "05": 35, "06": 31}
