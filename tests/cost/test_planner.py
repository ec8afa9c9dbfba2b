"""Plans of time, memory and price: by rates, by data sheets, on the command line and in notebook 07."""

import itertools
import json
import re

import numpy as np
import pytest
from conftest import ROOT, refused, smoke

from reclib import cli, hardware, parameters, records
from reclib.config import AdapterConfig, TrainConfig, changed, model_config
from reclib.cost import planner, work
from reclib.experiments import comparison, explore, speed
from reclib.report import findings, speed_figures, tables
from reclib.train import timing

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


def run(**changes: object) -> parameters.Explore:
    """Return the parameters of notebook 07 with some of the planned run changed."""
    return smoke("07_explore", **{f"plan_{name}": value for name, value in changes.items()})


def test_rates_are_interpolated_and_shares_scale_their_group_and_no_other():
    rates = {50: 1e9, 200: 4e9}
    between = [planner.interpolated(rates, at) for at in (100, 10, 999)]  # beyond the shapes: held
    assert between == pytest.approx([2e9, 1e9, 4e9])
    parts = planner.plan(a_cpu(), MODEL, TRAIN, LENGTHS).step.parts
    scaled = planner.plan(a_cpu(shares=SHARES | {"attention": 3.0}), MODEL, TRAIN, LENGTHS).step.parts
    assert scaled == pytest.approx(dict(parts) | {"attention": 3 * parts["attention"]})


def test_a_measured_cpu_has_the_band_of_held_out_rows_of_its_kind_of_run():
    few, enough = {"rows": 2, "time_worst": 0.3}, {"rows": 4, "time_worst": 0.2}
    rates = {"product bf16": RATES["product fp32"], "head bf16": RATES["head fp32"], "bandwidth": 1e10}
    cpu = a_cpu(error=ERROR | {"adapted": enough, "bf16": few}, rates=RATES | rates)
    for train, adapter, basis, band in (
        (TRAIN, None, "validated", 1.5),
        (TRAIN, AdapterConfig(), "validated", 1.2),
        (changed(TRAIN, precision="bf16"), None, "unvalidated", 1.3),
    ):
        plan = planner.plan(cpu, MODEL, train, LENGTHS, adapter=adapter)
        bounds = (plan.step.seconds / band, band * plan.step.seconds)
        assert plan.basis == basis
        assert (plan.step.low, plan.step.high) == pytest.approx(bounds)


def test_a_gpu_has_a_range_is_validated_where_it_was_measured_and_no_faster_than_its_data_sheet():
    measured = planner.efficiency()["measured"]
    for board in hardware.catalogue().values():
        plan = planner.plan(board, MODEL, TRAIN, LENGTHS)
        assert plan.basis == ("validated" if board.label in measured else "unvalidated")
        if board.label in measured:
            worst = 1 + measured[board.label]["error"]["time_worst"]
            assert plan.step.high == pytest.approx(worst * plan.step.seconds)
        assert plan.step.low < plan.step.seconds < plan.step.high
        assert plan.precision == ("fp16" if board.capability < (8, 0) else "bf16")
        assert plan.step.low > plan.flops / board.peaks[plan.precision]
        assert plan.step.low > plan.bytes_moved / board.bandwidth * 0.5


def test_a_small_step_waits_for_the_host_and_packing_and_gathering_make_a_large_one_shorter():
    def step(board: str, size: str, **recipe: object) -> planner.Estimate:
        train = TrainConfig(**recipe)
        return planner.plan(hardware.catalogue()[board], model_config(size), train, LENGTHS).step

    waiting, small = "waiting for the host", step("h100", "nano", batch_size=32)
    assert small.parts[waiting] > 0.5 * small.seconds
    captured = step("h100", "nano", compile_mode="graph")
    assert captured.parts[waiting] == step("h100", "430m", batch_size=4096).parts[waiting] == 0
    assert captured.seconds < small.seconds / 5
    recipes = ({}, {"layout": "padded"}, {"layout": "padded", "head_rows": "all"})
    seconds = [step("a100-40", "85m", batch_size=512, **recipe).seconds for recipe in recipes]
    assert seconds[0] < seconds[1] < seconds[2] / 3


def test_a_cpu_label_is_the_cpu_that_is_here_or_another_that_stands_in_as_stated(monkeypatch, capsys):
    for here, label in (("Intel Xeon 6/207", "cpu2 Intel Xeon 6/207"), ("AMD EPYC 25/17", "cpu2 AMD EPYC")):
        monkeypatch.setattr(hardware, "cpu_model", lambda here=here: here)
        assert planner.cpu("cpu2").label == label  # the first rows say the name only
    monkeypatch.setattr(hardware, "cpu_model", lambda: "Pentium 5/1")
    plan = planner.plan(planner.cpu("cpu2"), MODEL, TRAIN, LENGTHS)
    assert (plan.basis, "Pentium 5/1, which was not calibrated" in plan.name) == ("unvalidated", True)
    assert planner.plan_main(["--size", "85m", "--gpu", "cpu2"]) == 0
    assert "not calibrated" in capsys.readouterr().out


def test_an_adapter_costs_less_than_training_everything_and_is_no_validated_plan():
    for label in ["l4", "cpu2 AMD EPYC"]:
        (full,) = planner.plans(label, MODEL, TRAIN, LENGTHS)
        (narrow,) = planner.plans(label, MODEL, TRAIN, LENGTHS, adapter=AdapterConfig(kind="ilora", rank=8))
        assert narrow.step.seconds < full.step.seconds
        assert narrow.peak_bytes < full.peak_bytes
        assert narrow.footprint.parts["optimizer"] == 8 * 132_096
        assert narrow.basis == "unvalidated"


def test_what_cannot_be_planned_is_refused():
    bf16, fp16 = (changed(TRAIN, precision=precision) for precision in ("bf16", "fp16"))
    refused("unknown device", planner.plans, "gtx970", MODEL, TRAIN, LENGTHS)
    refused("no units", planner.plans, "t4", MODEL, bf16, LENGTHS)
    refused("no rates of", planner.plans, "cpu77", MODEL, TRAIN, LENGTHS)
    refused("not calibrated", planner.plans, "cpu2 AMD EPYC", MODEL, fp16, LENGTHS)


def test_the_command_line_prints_a_prediction_that_fits_a_screen(capsys):
    def printed(*arguments: str) -> str:
        assert planner.plan_main(["--size", "430m", "--epochs", "20", *arguments]) == 0
        return capsys.readouterr().out

    single = printed("--gpu", "l4", "--price", "0.7")
    every = printed("--gpu", "all,cpu2", "--price", "l4=0.7,a100=3", "--currency", "EUR")
    for text, currency in ((single, "USD"), (every, "EUR")):
        lines = text.splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 110
        for part in ("Predicted: 430m, batch 512, 20 epochs of 582,942 users", "unvalidated", currency):
            assert part in text
    rows = {line.split()[0]: line for line in every.splitlines()[3:]}
    assert set(rows) == {*hardware.catalogue(), "cpu2"}
    plan = planner.plan_size("430m", "a100-80", price="a100=3", batch_size=512)
    assert f"{plan.cost(20 * plan.epoch.seconds):.3g} (" in rows["a100-80"]  # of all boards of that name
    assert rows["t4"].endswith("-")


def test_the_command_line_writes_json_for_adapters_other_catalogues_and_losses(capsys):
    def plans(*arguments: str) -> list[dict]:
        planner.plan_main(["--json", *arguments])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (row,) = plans("--size", "430m", "--gpu", "l4", "--epochs", "3", "--price", "3.6")
    assert (row["kind"], row["basis"], row["fits"]) == ("predicted", "unvalidated", 1)
    assert row["memory"]["weights"] == 4 * 429_153_286
    each = sum(row["memory"].values()) + work.CONTEXT_BYTES
    assert row["side_by_side"] == int(work.USABLE * 24 * 2**30) // each >= 1
    assert row["epoch_seconds"] == pytest.approx(582_942 / 512 * row["step_seconds"], rel=1e-3)
    assert row["run_cost"] == pytest.approx(3 * row["epoch_seconds"] / 1000)
    small, large = plans("--size", "85m", "--gpu", "l4,h100", "--adapter", "ilora", "--rank", "8")
    assert (small["device"], large["device"], small["adapter"]) == ("l4", "h100", "ilora")
    many = ["--size", "85m", "--gpu", "h100", "--items", "10000000"]
    (untied,), (tied,) = plans(*many), plans(*many, "--tied", "--loss", "sampled_softmax")
    assert (untied["fits"], tied["fits"]) == (0, 1)
    assert tied["memory"]["weights"] < 0.51 * untied["memory"]["weights"]
    assert tied["flops"] < 0.01 * untied["flops"]


def test_the_command_line_says_what_does_not_fit_and_what_makes_no_sense(capsys):
    assert planner.plan_main(["--size", "430m", "--gpu", "t4", "--batch-size", "65536"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    wrong = ["--size 431m", "--mean-len 2", "--gpu gtx970", "--rank 8", "--epochs 0", "--users 0"]
    prices = ("-1", "nan", "inf", "cheap", "l4=nan", "l4=", "h100=3", "l4=1,l4=x")
    wrong += [f"--price {price}" for price in prices]
    for arguments in wrong:
        assert cli.entry(["plan", "--size", "85m", "--gpu", "l4", *arguments.split()]) == 2, arguments
        assert re.fullmatch("error: .*\n", capsys.readouterr().err), arguments


def test_plans_of_the_notebook_are_for_every_device_in_its_precision_at_the_price_of_one():
    results = explore.plans(run(device="l4", precision="tf32", price=3.6))
    by_device = {result.params["device"]: result for result in results}
    assert [*by_device] == [*planner.cpus(), *hardware.catalogue()]
    for device, result in by_device.items():
        sizes = dict(zip(result.series["part"], result.series["bytes"], strict=True))
        assert sum(sizes.values()) == result.metrics["peak_memory_bytes"]
        assert min(sizes.values()) > 0
        cost = result.timings["epoch_seconds"] / 1000 if device == "l4" else None
        assert result.timings.get("cost_per_epoch") == (cost and pytest.approx(cost))
    precision = {device: result.params["precision"] for device, result in by_device.items()}
    assert [precision[name] for name in ("l4", "h100", "t4")] == ["tf32", "tf32", "fp16"]
    assert precision[next(iter(planner.cpus()))] == "fp32"
    assert planner.precisions("t4") == ["auto", "fp32", "fp16"]


def test_the_report_says_what_it_is_and_whether_it_fits():
    label = next(iter(planner.cpus()))
    for p, parts in [
        (run(), ("predicted, unvalidated", "assumed efficiency", "NVIDIA L4", "bf16")),
        (run(device=label, price=None), ("predicted, validated", "worst error of")),
        (run(device="t4", size="430m", batch_size=65_536), ("DOES NOT FIT", "micro_batch_size")),
        (run(adapter="lora"), ("85,111,814 parameters, frozen",)),
    ]:
        report = "\n".join(planner.report(explore.plan(p)))
        assert [part for part in parts if part not in report] == []


def test_plans_of_the_notebook_are_recorded_and_drawn_as_predictions(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_RECORDS", str(tmp_path))
    card = dict.fromkeys(records.CARD) | {"label": "cpu", "type": "cpu"}
    recorded = records.Run("07_explore", run(), card)
    for result in explore.plans(run()):
        recorded.result(**result._asdict())
    written = records.read(tmp_path)
    assert {r["kind"] for r in written} == {"predicted"}
    sentences = " ".join(findings.sentences("07_explore", written))
    assert "85m at a batch of 512 fits on 10 of 10 GPUs" in sentences
    assert "plans are unvalidated" in sentences
    for figure in (speed_figures.parts(explore.plan(run())), speed_figures.by_device(tables.table(written))):
        assert "predicted" in f"{figure.layout.title.text} {figure.layout.title.subtitle.text}"


# -- records -------------------------------------------------------------------------------------------------


def test_committed_predictions_are_older_than_their_measurements():
    folder = ROOT / "executed/cpu/grids"
    lines = [json.loads(line) for line in (folder / "planner.jsonl").read_text().splitlines()]
    rows = [r for r in lines if r["name"] == "planner_row" and r["own_params"]["set"] == "held-out"]
    for name, cpu in (("amd-epyc", "AMD EPYC"), ("intel-xeon-6-207", "Intel Xeon 6/207")):
        before = json.loads((folder / f"planner-predictions-{name}.json").read_text())
        times = {title_of(row): row.get("time", before.get("time")) for row in before["rows"]}
        held_out = [r for r in rows if r["own_params"].get("cpu", r["device"]["name"]) == cpu]
        assert len(held_out) >= 10
        assert all(row["time"] > times[title_of(row["own_params"])] for row in held_out)
        for threads in (1, 2):
            measured = planner.cpus()[f"cpu{threads} {cpu}"].error
            assert (measured["of"], measured["rows"] >= 10) == ("held-out", True)


def title_of(row: dict) -> str:
    names = ("size", "threads", "batch_size", "mean_len", "max_len", "model", "adapter", "precision")
    return json.dumps({name: row[name] for name in names if name in row}, sort_keys=True)


def test_no_committed_record_of_a_gpu_without_a_self_check_is_measured():
    for row in records.read(ROOT / "executed"):
        if row["label"] != "cpu" and not (ROOT / "executed" / row["label"] / "selfcheck.json").is_file():
            assert row["kind"] == "predicted", (row["label"], row["name"])
        if row["kind"] == "predicted" and row["notebook"] != "03_scaling":  # of a loss, not of a device
            assert row["own_params"].get("basis") in ("validated", "unvalidated")


def test_gains_are_ratios_of_two_plans_and_prices_pairs_of_device_and_number():
    p = smoke("06_hardware", devices=["l4"], sizes=["85m"], prices=["l4=0.7", "a100-80=3"])
    gains = {row.params["technique"]: row.timings["speedup"] for row in comparison.gains(p)}
    assert set(gains) == set(comparison.TECHNIQUES)
    assert gains["gather before the head"] > gains["packed rows"] > 1
    assert np.isfinite(list(gains.values())).all()
    assert [planner.price_of(comparison.prices(p), label) for label in ("l4", "a100-40")] == [0.7, None]
    assert planner.price_of({"cpu2": 0.1}, "cpu2 AMD EPYC 25/17") == 0.1
    refused("price l4: expected a number", comparison.prices, smoke("06_hardware", prices=["l4"]))


def test_each_notebook_of_the_lease_ends_in_three_minutes_on_an_h100_by_its_slowest_plan():
    def lease(notebook: str):
        return parameters.build(notebook, parameters.profile(notebook, "lease"))

    def step(model, train, mean_len, adapter=None):
        lengths = planner.typical_lengths(mean_len)
        return planner.plan(hardware.catalogue()["h100"], model, train, lengths, adapter=adapter).step.high

    p, energy = lease("06_hardware"), timing.ENERGY_SECONDS
    sizes = 0.0
    for size, rule in itertools.product(p.measured_sizes, ("fp32", "auto")):
        seconds = step(comparison.model_of(p, size), comparison.train_of(p, rule), p.mean_len)
        sizes += (p.warmup_steps + p.steps) * seconds + energy

    p = lease("04_amp_compile")
    model = model_config(p.size, num_items=p.synthetic_items, max_len=p.max_len)
    assert set(p.compile_modes) == {"off"}  # no plan knows how long compiling takes
    amp = 0.0
    for precision, size in itertools.product(p.precisions, p.batch_sizes):
        seconds = step(model, TrainConfig(precision=precision, batch_size=size), p.synthetic_mean_len)
        amp += (p.warmup_steps + p.repeats * p.steps) * seconds + energy
    first = TrainConfig(batch_size=p.batch_sizes[0], precision="fp32")
    for rung in speed.ladder(model, first, (("AMP", "precision", "bf16"),)):
        amp += p.repeats * (p.warmup_steps + p.steps) * step(rung.model, rung.train, p.synthetic_mean_len)
    amp += 2 * p.synthetic_users / p.batch_sizes[0] * step(model, first, p.synthetic_mean_len)  # epochs

    p = lease("05_ilora")
    model = model_config(p.size, num_items=1349, max_len=p.max_len)
    train = TrainConfig(batch_size=p.batch_size, precision="fp32")
    base, adapted = step(model, train, 50), step(model, train, 50, comparison.ILORA)
    per_epoch = -(-943 // p.batch_size)  # MovieLens 100K: of all users, where fewer have a past
    runs = len(p.tasks) * (len(p.arms) - 1) * (len(p.learning_rates) + len(p.seeds) - 1)
    arms = len(p.seeds) * p.base_epochs * per_epoch * base + runs * p.epochs * per_epoch * adapted
    arms += (4 + len(p.precisions)) * (p.warmup_steps + p.rounds) * adapted
    assert [round(seconds) for seconds in (amp, arms, sizes)] == [61, 171, 36]  # stated in params/lease.yaml
