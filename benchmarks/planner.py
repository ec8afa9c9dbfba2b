"""The planner against measurements of CPUs and GPUs: rows that it was fitted on, and rows that it was not.

    python benchmarks/planner.py rates       this machine's rates, for one and two threads: a minute or two
    python benchmarks/planner.py fitted      measures the rows that the achievable shares are fitted on
    python benchmarks/planner.py fit         fits the shares; they go to params/calibration.yaml
    python benchmarks/planner.py adopt "AMD EPYC"    instead of both: the shares that another CPU's rows gave
    python benchmarks/planner.py predict     predicts rows not yet measured here: to be committed first
    python benchmarks/planner.py predict h100    the rows of `gpu.py` on a GPU: before its first run
    python benchmarks/planner.py held-out    measures those rows; so do `adapted` and `bf16`
    python benchmarks/planner.py fit-board h200    fits a GPU's shares to half of the rows measured on it
    python benchmarks/planner.py             the error tables by device, fitted and held-out rows apart

One and two threads are two devices, cpu1 and cpu2. Each row runs in a process of its own, since peak memory
belongs to a process; what is recorded is the median step. A row during which other processes took more than
`DISTURBED` of the cores is thrown away. Histories are synthetic, over catalogues of the true size. Records go
to `executed/cpu/grids/planner.jsonl` and say which CPU they are of; those of a GPU lie in its own folder.
"""

import argparse
import copy
import functools
import hashlib
import json
import os
import re
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from common import ROOT, Row, Rows, options, run_child, start

from reclib import hardware, records, system
from reclib.config import AdapterConfig, TrainConfig, model_config, validated
from reclib.cost import planner, work
from reclib.data.dataset import train_histories
from reclib.data.prepare import synthetic_dataset

DISTURBED = 0.04  # share of the cores beyond which a row is thrown away; the same command tries again
SHORT, ML = {"mean_len": 9.4, "max_len": 50}, {"mean_len": 100.0, "max_len": 200, "users": 1000}
REAL = ("5m", "85m", "130m", "430m")  # at their own catalogue and batch 128, two threads: `real_size_step`
RIDGE = 0.02  # pull of each share towards 1, in squared relative errors: five shares, few rows
CALIBRATION, EFFICIENCY = ROOT / "params" / "calibration.yaml", ROOT / "params" / "efficiency.yaml"
# The most that a fit may give of fp32's and bf16's peak (products of 8192 reached that) and bandwidth.
MOST = (0.75, 0.68, 0.9)
PREDICTING = [ROOT / "reclib" / "cost" / f"{name}.py" for name in ("work", "planner")]
WRITTEN = ("predicted", "time", "sha256_of_the_model")  # what a written prediction adds to its row
Devices = dict[str, dict[str, Any]]  # of a CPU in params/calibration.yaml: cpu1 and cpu2


# -- rows: what is trained -----------------------------------------------------------------------------------


def row_of_cpu(size: str, threads: int, batch_size: int, shape: Row, **model: Any) -> Row:
    """Describe one row of a CPU, of 6000 users unless its shape says otherwise; `model` changes its size."""
    whole = {"size": size, "threads": threads, "batch_size": batch_size, "users": 6000} | shape
    return whole | {"model": model}


SETS: dict[str, list[Row]] = {
    "fitted": [
        row_of_cpu("nano", 2, 64, ML),
        row_of_cpu("tiny", 1, 64, ML),
        row_of_cpu("tiny", 2, 64, ML),
        row_of_cpu("small", 1, 32, ML),
        row_of_cpu("medium", 1, 64, ML),
        row_of_cpu("medium", 2, 64, ML),
        row_of_cpu("tiny", 2, 128, SHORT, num_items=40_000),
        row_of_cpu("small", 2, 64, SHORT, num_items=3000),
        row_of_cpu("5m", 1, 128, SHORT),
        row_of_cpu("5m", 2, 512, SHORT),
        row_of_cpu("medium", 2, 256, {"mean_len": 30.0, "max_len": 100}, num_items=5000),
        row_of_cpu("85m", 2, 128, SHORT),
        row_of_cpu("85m", 1, 128, SHORT),
        row_of_cpu("85m", 2, 512, SHORT),
        row_of_cpu("130m", 1, 128, SHORT, num_items=20_000),
        row_of_cpu("430m", 2, 64, SHORT, num_items=18_345, num_layers=4),
    ],
    "held-out": [
        row_of_cpu("nano", 2, 256, SHORT, num_items=10_000),
        row_of_cpu("tiny", 1, 128, {"mean_len": 60.0, "max_len": 100, "users": 2000}),
        row_of_cpu("small", 2, 256, {"mean_len": 8.9, "max_len": 50}, num_items=12_101, num_layers=3),
        row_of_cpu("small", 2, 16, ML, num_layers=4, hidden_dim=192),
        row_of_cpu("medium", 2, 32, {"mean_len": 165.0, "max_len": 200, "users": 1000}, num_items=3416),
        row_of_cpu("medium", 1, 128, SHORT, num_items=57_000, tied=False),
        row_of_cpu("5m", 2, 128, SHORT),
        row_of_cpu("5m", 1, 64, SHORT, num_layers=6),
        row_of_cpu("5m", 1, 128, SHORT, num_items=60_000),
        row_of_cpu("85m", 2, 256, SHORT, num_layers=6),
        row_of_cpu("130m", 2, 128, SHORT),
        row_of_cpu("130m", 1, 64, SHORT),
        row_of_cpu("430m", 2, 128, SHORT),
        row_of_cpu("430m", 1, 64, SHORT),
    ],
    "adapted": [
        row_of_cpu("85m", 2, 128, SHORT) | {"adapter": "lora"},
        row_of_cpu("85m", 2, 128, SHORT) | {"adapter": "ilora"},
        row_of_cpu("85m", 1, 64, SHORT) | {"adapter": "ilora"},
        row_of_cpu("medium", 2, 64, ML) | {"adapter": "ilora"},
    ],
    "bf16": [
        row_of_cpu("85m", 2, 128, SHORT) | {"precision": "bf16"},
        row_of_cpu("medium", 1, 64, ML) | {"precision": "bf16"},
    ],
}


def described(stage: str, size: str, model: Any, train: Any, users: int) -> Row:
    """Return the row of a step on a GPU: what a size's model and the defaults of training differ in."""
    usual = (model_config(size, max_len=model.max_len), TrainConfig())
    of_model, of_train = (
        {name: value for name, value in asdict(config).items() if value != getattr(default, name)}
        for config, default in zip((model, train), usual, strict=True)
    )
    for name in ("batch_size", "epochs", "precision"):
        of_train.pop(name, None)
    whole = {"stage": stage, "size": size, "batch_size": train.batch_size, "precision": train.precision}
    whole |= {"users": users, "mean_len": min(SHORT["mean_len"], model.num_items / 4)}
    return whole | {"max_len": model.max_len, "model": of_model, "train": of_train}


def configs(row: Row) -> tuple[Any, Any]:
    """Return the configurations of a row."""
    model = model_config(row["size"], **({"max_len": row["max_len"]} | row["model"]))
    train = {"batch_size": row["batch_size"], "precision": row.get("precision", "fp32"), "epochs": 100_000}
    return model, validated(TrainConfig, train | row.get("train", {}))


def adapter_of(row: Row) -> AdapterConfig | None:
    """Return the adapter of a row as the planner has it; None where the whole model is trained."""
    return AdapterConfig(kind=row["adapter"]) if "adapter" in row else None


synthetic = functools.cache(synthetic_dataset)


def dataset(row: Row, num_items: int) -> Any:
    """Return the synthetic histories of a row."""
    return synthetic(row["users"], num_items, row["mean_len"], 0)


def lengths_of(row: Row, num_items: int) -> Any:
    """Return the lengths of the histories that a row trains on: all but the last two items, or whole ones."""
    prepared = dataset(row, num_items)
    return (prepared if row.get("histories") == "whole" else train_histories(prepared)).lengths


def key_of(row: Row) -> str:
    """Return what tells rows apart."""
    return json.dumps(row, sort_keys=True)


def title(row: Row) -> str:
    """Return a row in words."""
    changes = sorted(row["model"].items()) + sorted(row.get("train", {}).items())
    extra = [f"{name} {value}" for name, value in changes]
    extra += [row[name] for name in ("adapter", "precision") if name in row]
    about = f"{row['size']}, batch {row['batch_size']}"
    about = f"{about}, {row['threads']} thread(s)" if "threads" in row else f"{row['stage']}: {about}"
    return ", ".join([about, *extra])


# -- one row, in a process of its own ------------------------------------------------------------------------


def started(threads: int) -> tuple[hardware.Device, int]:
    """Return the CPU with so many threads, and what this process holds: the libraries' pools are there."""
    import torch

    torch.set_num_threads(threads)
    device = hardware.resolve("cpu")
    torch.randn(64, 64) @ torch.randn(64, 64)
    hardware.reset_peak_memory(device.torch_device)
    return device, hardware.peak_memory_bytes(device.torch_device)


def measure(row: Row) -> Row:
    """Train some steps and return step time, memory, and what was counted."""
    import torch

    from reclib.model.bert4rec import Bert4Rec
    from reclib.model.ilora import AdaptedModel
    from reclib.train import timing
    from reclib.train.trainer import Trainer

    device, before = started(row["threads"])
    model, train = configs(row)
    prepared, plan = dataset(row, model.num_items), adapter_of(row)
    torch.manual_seed(0)
    network: Any = Bert4Rec(model)
    if plan is not None:
        network = AdaptedModel(network)
        network.add("planned", plan)
    trainer = Trainer(network, train_histories(prepared), train, device, prepared.fingerprint)
    parameters = sum(p.numel() for p in network.parameters())
    steps = 24 if parameters < 3e6 else 12 if parameters < 50e6 else 5 if parameters < 200e6 else 3
    measured = timing.measure(trainer, steps, 3 if parameters < 50e6 else 2)
    counts = measured.counts() | {"parameters": parameters}
    if plan is not None:
        counts["trained_parameters"] = sum(p.numel() for p in trainer.parameters)
    else:  # what is counted there is training of all weights
        done, needed = timing.step_flops(trainer, 3)
        counts |= {"encoder_flops": done.encoder, "head_flops": done.head, "needed_flops": needed.total}
    return {
        "card": hardware.device_card(device),
        "data": {"name": "synthetic", "fingerprint": prepared.fingerprint},
        "counts": counts,
        "timings": measured.timings() | {"process_bytes": before},
    }


def measure_rates(threads: int) -> Row:
    """Return the rates of so many threads, and what a process holds before it has a model."""
    import bound

    from reclib.train import trainer  # noqa: F401  (what a training process has loaded)

    dataset(SETS["fitted"][0], 1000)
    device, before = started(threads)
    rates = bound.rates(device.torch_device) | {"process_bytes": before}
    return {"card": hardware.device_card(device), "data": None, "counts": {}, "timings": rates}


def child(row: Row | None = None, threads: int = 0) -> Row:
    """Measure a row, or the rates of so many threads."""
    return measure(row) if row else measure_rates(threads)


def busy_seconds() -> float:
    """Return the processor time that the machine has spent so far, on all cores."""
    user, nice, kernel, *_ = (int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + kernel) / os.sysconf("SC_CLK_TCK")


def undisturbed(threads: int, **call: Any) -> Row | None:
    """Call `child` in a process of so many threads; None where others took too much of the cores."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment["GOMP_SPINCOUNT"] = "10000"  # as the Makefile has it: a neighbour costs time, not minutes
    before, spent = busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    result = run_child(__file__, call, environment)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    ours = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
    others = max(0.0, busy_seconds() - before - ours) / (wall * (os.cpu_count() or 1))
    result["timings"]["others_share"] = others
    if others <= DISTURBED:
        return result
    print(f"  disturbed: others took {others:.0%} of the cores; not recorded: {call}", flush=True)
    return None


# -- records -------------------------------------------------------------------------------------------------


def file(label: str = "cpu", root: Path = ROOT / "executed") -> Path:
    """Return the file of a device's records."""
    return root / label / "grids" / "planner.jsonl"


def write(name: str, result: Mapping[str, Any], own: Row, root: Path = ROOT / "executed") -> None:
    """Append the record of a result, beside those of its device."""
    about = {"profile": "grid", "params": {"grid": "planner"}, "own_params": own}
    about |= {part: result[part] for part in ("card", "data", "timings")}
    key = records.params_hash(own | {"name": name})
    line = records.row("06_hardware", name, result["counts"], **about, params_hash=key)
    records.append(file(line["label"], root), line)


def recorded(name: str, device: str, kind: str = "") -> list[Row]:
    """Return the newest record of each row of this name, on a GPU or a CPU; `kind` is the set of a CPU's."""
    from reclib.experiments.grids import read_rows  # heavy, and no part of a measured process

    on_gpu = device in hardware.catalogue()
    rows = {r["params_hash"]: r for r in read_rows(file(device if on_gpu else "cpu")) if r["name"] == name}
    return [
        row
        for row in rows.values()
        # The first rows of a CPU have its name only.
        if (on_gpu or row["own_params"].get("cpu", row["device"]["name"]) == device)
        and kind in ("", row["own_params"].get("set"))
    ]


def row_of(record: Row) -> Row:
    """Return the row that a record is of."""
    return {key: value for key, value in record["own_params"].items() if key not in ("set", "device", "cpu")}


def run_rows(kind: str, cpu: str) -> None:
    """Measure the rows of a set that this CPU has no record of.

    A row that others disturb or that fails stays without a record; the same command tries it again.
    """
    done = [row_of(record) for record in recorded("planner_row", cpu, kind)]
    for row in (row for row in SETS[kind] if row not in done):
        try:
            result = undisturbed(row["threads"], row=row)
        except Exception as error:
            print(f"{title(row):58} failed: {error}", flush=True)
            continue
        if result is None:
            continue
        own = row | {"device": f"cpu{row['threads']}", "cpu": cpu}
        write("planner_row", result, own | {"set": kind})
        if row["size"] in REAL and row == row_of_cpu(row["size"], 2, 128, SHORT):
            write("real_size_step", result, own)
        seconds, peak = (result["timings"][name] for name in ("step_seconds", "peak_memory_bytes"))
        print(f"{title(row):58} {seconds:9.4f} s {peak / 2**20:9.0f} MiB", flush=True)


# -- rates and calibration of CPUs ---------------------------------------------------------------------------


def rates(cpu: str) -> Row:
    """Measure the rates of one and two threads and record them."""
    for threads in (1, 2):
        label = f"cpu{threads}"
        if label in recorded_rates(cpu) or not (result := undisturbed(threads, threads=threads)):
            continue
        write("rates", result, {"device": label, "threads": threads, "cpu": cpu})
    return recorded_rates(cpu)


def recorded_rates(cpu: str) -> Devices:
    """Return the newest rates of a CPU by its devices, shapes as keys again."""
    devices: Devices = {}
    for record in recorded("rates", cpu):
        by_name: dict[str, Any] = {}
        for name, value in record["timings"].items():
            stem, _, last = name.rpartition(" ")
            place, key = (by_name.setdefault(stem, {}), int(last)) if last.isdecimal() else (by_name, name)
            place[key] = float(f"{value:.4g}")
        process = int(by_name.pop("process_bytes", 0))
        devices[record["own_params"]["device"]] = {"name": cpu, "rates": by_name, "process_bytes": process}
    return devices


def calibration() -> dict[str, Devices]:
    """Return the devices of every CPU."""
    return system.read_yaml(CALIBRATION, any_keys=True)


def calibrate(cpu: str, devices: Devices, **about: Any) -> Row:
    """Put a CPU's devices, each with `about`, into the calibration, whose comment stays; return `about`."""
    text = CALIBRATION.read_text(encoding="utf-8")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    # Copies, since YAML would write what devices share as an anchor.
    devices = {name: copy.deepcopy(device | about) for name, device in devices.items()}
    whole = yaml.safe_dump(calibration() | {cpu: devices}, sort_keys=False)
    CALIBRATION.write_text(head + whole, encoding="utf-8")
    return about


def parts_of(row: Row, board: hardware.Board | None = None) -> tuple[Any, Any]:
    """Return the parts of a row's step, and its footprint, on a GPU or on a CPU."""
    (model, train), adapter, precision = configs(row), adapter_of(row), row.get("precision", "fp32")
    lengths, width = lengths_of(row, model.num_items), work.number_bytes(precision)
    parts = work.step_parts(model, train, work.mean_shapes(model, train, lengths), width, adapter)
    place = ("cuda", adapter, board.memory_bytes) if board else ("cpu", adapter)
    return parts, work.training_memory(model, train, lengths, precision, *place)


def groups_of(row: Row, device_rates: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a row's seconds by group at a CPU's rates alone, and its footprint."""
    parts, footprint = parts_of(row)
    return planner.cpu_groups(parts, configs(row)[0], device_rates, row.get("precision", "fp32")), footprint


def fitted_devices(cpu: str) -> Devices:
    """Return a CPU's devices with the shares of the groups fitted to its fitted rows, all rows at once."""
    from scipy.optimize import nnls

    devices = recorded_rates(cpu)
    seconds, heaps, process = [], [], {name: [] for name in devices}
    for record in recorded("planner_row", cpu, "fitted"):
        device, timings = record["own_params"]["device"], record["timings"]
        groups, footprint = groups_of(row_of(record), devices[device]["rates"])
        peak, before = timings["peak_memory_bytes"], timings["process_bytes"]
        fixed = footprint.total - footprint.parts["activations"]
        heaps.append([footprint.held / peak, footprint.layer / peak, (peak - before - fixed) / peak])
        seconds.append([groups[name] / timings["step_seconds"] for name in planner.GROUPS])
        process[device].append(before)
    count = len(planner.GROUPS)
    left = np.vstack([seconds, np.sqrt(RIDGE) * np.eye(count)])
    right = np.concatenate([np.ones(len(seconds)), np.sqrt(RIDGE) * np.ones(count)])
    shares, heap = nnls(left, right)[0], nnls(np.array(heaps)[:, :2], np.array(heaps)[:, 2])[0]
    for name, device in devices.items():
        device["heap"] = {key: round(float(x), 3) for key, x in zip(("held", "layer"), heap, strict=True)}
        device["shares"] = {key: round(float(x), 3) for key, x in zip(planner.GROUPS, shares, strict=True)}
        device["process_bytes"] = int(median(process[name]))
    return devices


def fit(cpu: str) -> Row:
    """Fit the shares of this CPU and put them into the calibration with the error of its fitted rows."""
    devices = fitted_devices(cpu)
    band = error_of(errors(cpu, recorded("planner_row", cpu, "fitted"), devices), "fitted")
    return {"shares": devices["cpu2"]["shares"]} | calibrate(cpu, devices, error=band)


def adopt(cpu: str, other: str) -> Row:
    """Give this CPU, of which only rates were measured, the shares and the error band of another one."""
    devices = recorded_rates(cpu)
    for name, device in devices.items():
        fitted = calibration()[other][name]
        device |= {key: fitted[key] for key in ("heap", "shares", "error")}
    return calibrate(cpu, devices, shares_of=other)


def hold_out(cpu: str, kind: str) -> Row:
    """Measure the rows of a set; put the errors of those that no fit has seen into the calibration, if any.

    Rows with an adapter and rows in bf16 have an error of their own.
    """
    run_rows(kind, cpu)
    devices = calibration().get(cpu, {})
    if not devices:  # fitted rows come before the fit
        return {}
    adopted = any("shares_of" in device for device in devices.values())
    by_set = {name: errors(cpu, recorded("planner_row", cpu, name)) for name in SETS}
    unseen = by_set["held-out"] + (by_set["fitted"] if adopted else [])
    band = error_of(unseen, "held-out") if unseen else next(iter(devices.values()))["error"]
    band |= {name: error_of(by_set[name], "held-out") for name in ("adapted", "bf16") if by_set[name]}
    return calibrate(cpu, devices, error=band)


# -- shares of a GPU -----------------------------------------------------------------------------------------


def is_captured(row: Row) -> bool:
    """Whether a row's steps are CUDA graphs."""
    return row.get("train", {}).get("compile_mode") == "graph"


def board_halves(label: str) -> list[list[Row]]:
    """Return the records of a GPU's steps in two halves: every other configuration, whatever its stage."""
    by_kind: dict[str, list[Row]] = {}
    for record in recorded("planner_row", label):
        kind = {name: value for name, value in row_of(record).items() if name not in ("stage", "users")}
        by_kind.setdefault(key_of(kind), []).append(record)
    kinds = [by_kind[key] for key in sorted(by_kind)]
    return [[record for kind in half for record in kind] for half in (kinds[::2], kinds[1::2])]


def fit_board(label: str) -> Row:
    """Fit a GPU's shares of its data sheet to half of its steps; record them with the error of the others."""
    from scipy.optimize import minimize

    board, (half, others) = hardware.catalogue()[label], board_halves(label)
    steps = [(row_of(record), record["timings"]["step_seconds"]) for record in half]
    prepared = [(row, parts_of(row, board)[0], seconds) for row, seconds in steps]

    def shares(logs: Any) -> dict[str, Any]:
        fp32, bf16, bandwidth, fp32_us, bf16_us = (float(f"{value:.3g}") for value in np.exp(logs))
        products, operator_us = {"fp32": fp32, "bf16": bf16}, {"fp32": fp32_us, "bf16": bf16_us}
        return {"products": products, "bandwidth": bandwidth, "operator_us": operator_us}

    def loss(logs: Any) -> float:
        gaps = []
        for row, parts, seconds in prepared:
            device, host = planner.roofline(parts, board, row["precision"], shares(logs), is_captured(row))
            gaps.append(np.log(max(sum(device.values()), host) / seconds) ** 2)
        return float(np.mean(gaps))

    bounds = [*np.log([(0.05, most) for most in MOST]), *np.log([(1, 200)] * 2)]
    first = np.log([0.5, 0.4, 0.4, 30, 40])
    fitted = minimize(loss, first, method="Nelder-Mead", bounds=bounds, options={"maxiter": 5000})
    measured = planner.efficiency()["measured"]  # the planner's own: the errors below are by the new shares
    measured[label] = shares(fitted.x) | {"error": {"time_worst": 0.0}}
    missed = errors(label, others, {})
    uncaptured = error_of([e for e in missed if not is_captured(e["row"])], "")  # there is a plan of memory
    band = error_of(missed, "held-out")
    band |= {name: value for name, value in uncaptured.items() if name.startswith("memory")}
    measured[label]["error"] = band
    head, _, _ = EFFICIENCY.read_text(encoding="utf-8").partition("measured:")
    text = yaml.safe_dump({"measured": measured}, sort_keys=False, default_flow_style=None, width=120)
    EFFICIENCY.write_text(head + text, encoding="utf-8")
    return measured[label]


# -- predictions and their errors ----------------------------------------------------------------------------


def forecast(row: Row, device: str, devices: Devices) -> dict[str, float]:
    """Return the planner's step time and peak memory of a row on a GPU, or on a CPU by its `devices`."""
    if board := hardware.catalogue().get(device):
        parts, footprint = parts_of(row, board)
        step = planner.on_board(parts, board, row["precision"], is_captured(row))
        return step.named("step_seconds") | {"peak_memory_bytes": footprint.total}
    by_threads = devices[f"cpu{row['threads']}"]
    groups, footprint = groups_of(row, by_threads["rates"])
    seconds = sum(by_threads["shares"][name] * groups[name] for name in planner.GROUPS)
    peak = footprint.resident(by_threads["heap"]) + by_threads["process_bytes"]
    return {"step_seconds": seconds, "peak_memory_bytes": peak}


def predictions_file(device: str) -> Path:
    """Return the file of the predictions for a CPU, or for a GPU in its own folder."""
    name = f"planner-predictions-{re.sub(r'[^a-z0-9]+', '-', device.lower())}.json"
    return file(device if device in hardware.catalogue() else "cpu").with_name(name)


def predictions(device: str) -> dict[str, Row]:
    """Return the rows of a device that were predicted before they were measured, by row."""
    if not predictions_file(device).is_file():
        return {}
    rows = json.loads(predictions_file(device).read_text(encoding="utf-8"))["rows"]
    return {key_of({k: v for k, v in row.items() if k not in WRITTEN}): row for row in rows}


def predict(device: str) -> Row:
    """Predict each row that a CPU or a GPU has neither measured nor a prediction of.

    Each has a hash of the calibration (of a GPU: of data sheets and assumed shares) and of the modules that
    predict. A CPU that has its own shares has no prediction of the rows that they were fitted on.
    """
    on_gpu = device in hardware.catalogue()
    sheets = [ROOT / "params" / "devices.yaml", EFFICIENCY] if on_gpu else [CALIBRATION]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [*sheets, *PREDICTING])).hexdigest()
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "sha256_of_the_model": digest}
    rows = gpu_rows(device) if on_gpu else [row for kind in SETS.values() for row in kind]
    measured = {key_of(row_of(record)) for record in recorded("planner_row", device)}
    before, devices = predictions(device), {} if on_gpu else calibration()[device]
    count = len(before)
    for row in (row for row in rows if key_of(row) not in measured | before.keys()):
        predicted = forecast(row, device, devices)
        before[key_of(row)] = row | {"predicted": predicted} | about
        peak = predicted["peak_memory_bytes"] / 2**30
        print(f"{title(row):100} {predicted['step_seconds']:9.5f} s {peak:7.2f} GiB")
    predictions_file(device).parent.mkdir(parents=True, exist_ok=True)
    whole = {"device" if on_gpu else "cpu": device, "rows": list(before.values())}
    predictions_file(device).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return {"predicted": len(before) - count}


def gpu_rows(label: str) -> list[Row]:
    """Return the rows that `gpu.py` times on a GPU of the catalogue, as if it were here."""
    import gpu_stages
    import torch

    board = hardware.catalogue()[label]
    about = {"name": board.name, "capability": board.capability, "memory_bytes": board.memory_bytes}
    card = hardware.Card(type="cuda", label=label, **about)
    return gpu_stages.rows(hardware.Device(torch.device("cuda"), card, label))


def errors(device: str, measured: Iterable[Row], refitted: Devices | None = None) -> list[Row]:
    """Return predicted over measured, for time and memory, of records of a CPU or a GPU.

    A prediction is the one that was written before the row was run, else the present one; with `refitted`,
    a CPU's devices or {} for a GPU, it is always the present one.
    """
    before = predictions(device) if refitted is None else {}
    devices = calibration().get(device, {}) if refitted is None else refitted
    rows = []
    for record in measured:
        row, timings = row_of(record), record["timings"]
        written = before.get(key_of(row))
        predicted = written["predicted"] if written else forecast(row, device, devices)
        error = {"row": row, "measured": timings, "predicted": predicted, "written": bool(written)}
        error["time"] = predicted["step_seconds"] / timings["step_seconds"]
        rows.append(error | {"memory": predicted["peak_memory_bytes"] / timings["peak_memory_bytes"]})
    return rows


def error_of(rows: list[Row], kind: str) -> Row:
    """Return the errors of rows as the band around predictions."""
    time, memory = ([abs(e[name] - 1) for e in rows] for name in ("time", "memory"))
    worst = max(max(e["time"], 1 / e["time"]) - 1 for e in rows)
    numbers = {"time_median": median(time), "time_worst": worst}
    numbers |= {"memory_median": median(memory), "memory_worst": max(memory)}
    return {"of": kind, "rows": len(rows)} | {name: round(value, 3) for name, value in numbers.items()}


def tables() -> Row:
    """Print the error tables by device; return the errors of each."""
    summary = {}

    def show(name: str, device: str, measured: list[Row], refitted: Devices | None = None) -> None:
        print(f"\n{name}{'' if measured else ': none measured'}")
        rows = errors(device, measured, refitted)
        for e in rows:
            times, peaks = (
                f"{e['predicted'][key] / unit:9.4f} for {e['measured'][key] / unit:9.4f}"
                for key, unit in (("step_seconds", 1), ("peak_memory_bytes", 2**30))
            )
            print(f"{title(e['row']):96} {times} s {e['time'] - 1:+6.1%} {peaks} GiB {e['memory'] - 1:+6.1%}")
        for key in ("time", "memory") if rows else ():
            gaps = [e[key] - 1 for e in rows]
            middle, worst = median(map(abs, gaps)), max(map(abs, gaps))
            print(f"  {key}: median absolute error {middle:.1%}, worst {worst:.1%}, {len(gaps)} rows")
            summary[f"{name}, {key}"] = {"median": middle, "worst": worst, "signed": median(gaps)}

    for cpu, devices in calibration().items():
        other = devices["cpu2"].get("shares_of")
        print(f"\n== {cpu}: rates of its own, shares {f'of {other}' if other else 'fitted on its rows'}")
        measured = {kind: recorded("planner_row", cpu, kind) for kind in SETS}
        for kind, of_kind in measured.items():
            unseen = "predicted before they were run" if other or kind != "fitted" else "the fit saw them"
            show(f"{cpu}: {kind} rows, {unseen}", cpu, of_kind)
        if other and len(measured["fitted"]) > len(planner.GROUPS):
            refitted = fitted_devices(cpu)
            print(f"\n{cpu}, shares refitted on its own fitted rows: {refitted['cpu2']['shares']}")
            show(f"{cpu}: fitted rows, the refit saw them", cpu, measured["fitted"], refitted)
            show(f"{cpu}: held-out rows, not in the refit", cpu, measured["held-out"], refitted)
    for label in (label for label in hardware.catalogue() if recorded("planner_row", label)):
        show(f"{label}: as predicted before it was run", label, recorded("planner_row", label))
        if label in planner.efficiency()["measured"]:
            for half, kind in zip(board_halves(label), ("fitted", "held-out"), strict=True):
                show(f"{label}: {kind} rows, by the shares fitted since", label, half, {})
    return summary


def run(args: argparse.Namespace, rows: Rows) -> Row:
    cpu, other, boards = hardware.cpu_model(), args.other, [*hardware.catalogue()]
    known = {"predict": [None, *boards], "adopt": list(calibration()), "fit-board": boards}
    if other not in known.get(args.command, [other]):
        parser.error(f"{args.command}: expected one of {', '.join(filter(None, known[args.command]))}")
    commands = {"tables": tables, "rates": lambda: rates(cpu), "fit": lambda: fit(cpu)}
    commands |= {"predict": lambda: predict(other or cpu), "adopt": lambda: adopt(cpu, other)}
    commands |= {"fit-board": lambda: fit_board(other)}
    return hold_out(cpu, args.command) if args.command in SETS else commands[args.command]()


if __name__ == "__main__":
    parser = options(__doc__)
    choices = ("tables", "rates", "fit", "predict", "adopt", "fit-board", *SETS)
    parser.add_argument("command", nargs="?", default="tables", choices=choices)
    about = "adopt: the CPU whose shares are taken; predict, fit-board: a GPU"
    parser.add_argument("other", nargs="?", help=about)
    raise SystemExit(start(parser, run, child))
