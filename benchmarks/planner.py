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
belongs to a process; what is shown is the median step. Histories are synthetic, over catalogues of the true
size. Records go to `executed/cpu/grids/planner.jsonl` and say which CPU they are of; those of a GPU lie in
its own folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from common import ROOT, Row, Rows, options, start
from planner_rows import (
    SETS,
    adapter_of,
    child,
    configs,
    file,
    key_of,
    lengths_of,
    recorded,
    row_of,
    run_rows,
    title,
    undisturbed,
    write,
)

from reclib import hardware, system
from reclib.cost import planner, work

RIDGE = 0.02  # pull of each share towards 1, in squared relative errors: five shares, few rows
CALIBRATION, EFFICIENCY = ROOT / "params" / "calibration.yaml", ROOT / "params" / "efficiency.yaml"
# The most that a fit may give of fp32's and bf16's peak (products of 8192 reached that) and bandwidth.
MOST = (0.75, 0.68, 0.9)
PREDICTING = [ROOT / "reclib" / "cost" / f"{name}.py" for name in ("work", "planner")]
WRITTEN = ("predicted", "time", "sha256_of_the_model")  # what a written prediction adds to its row
Devices = dict[str, dict[str, Any]]  # of a CPU in params/calibration.yaml: cpu1 and cpu2


class WithoutAnchors(yaml.SafeDumper):
    """A dumper that writes what devices share for each of them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


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


def calibrate(cpu: str, devices: Devices) -> None:
    """Put a CPU's devices into the calibration, whose comment at the top stays."""
    text = CALIBRATION.read_text(encoding="utf-8")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    whole = yaml.dump(calibration() | {cpu: devices}, Dumper=WithoutAnchors, sort_keys=False)
    CALIBRATION.write_text(head + whole, encoding="utf-8")


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
    calibrate(cpu, {name: device | {"error": band} for name, device in devices.items()})
    return {"shares": devices["cpu2"]["shares"], "error": band}


def adopt(cpu: str, other: str) -> Row:
    """Give this CPU, of which only rates were measured, the shares and the error band of another one."""
    devices = recorded_rates(cpu)
    for name, device in devices.items():
        fitted = calibration()[other][name]
        device |= {key: fitted[key] for key in ("heap", "shares", "error")} | {"shares_of": other}
    calibrate(cpu, devices)
    return {"shares_of": other}


def hold_out(cpu: str, kind: str) -> Row:
    """Measure the rows of a set; put the errors of those that no fit has seen into the calibration.

    Rows with an adapter and rows in bf16 have an error of their own.
    """
    run_rows(kind, cpu)
    devices = calibration()[cpu]
    adopted = any("shares_of" in device for device in devices.values())
    by_set = {name: errors(cpu, recorded("planner_row", cpu, name)) for name in SETS}
    unseen = by_set["held-out"] + (by_set["fitted"] if adopted else [])
    band = error_of(unseen, "held-out") if unseen else next(iter(devices.values()))["error"]
    band |= {name: error_of(by_set[name], "held-out") for name in ("adapted", "bf16") if by_set[name]}
    calibrate(cpu, {name: device | {"error": band} for name, device in devices.items()})
    return {"error": band}


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


def errors(device: str, records: Iterable[Row], refitted: Devices | None = None) -> list[Row]:
    """Return predicted over measured, for time and memory, of records of a CPU or a GPU.

    A prediction is the one that was written before the row was run, else the present one; with `refitted`,
    a CPU's devices or {} for a GPU, it is always the present one.
    """
    before, devices = ({}, refitted) if refitted is not None else (predictions(device), None)
    if devices is None:
        devices = calibration().get(device, {})
    rows = []
    for record in records:
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

    def show(name: str, device: str, records: list[Row], refitted: Devices | None = None) -> None:
        print(f"\n{name}{'' if records else ': none measured'}")
        rows = errors(device, records, refitted)
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
        for kind in SETS:
            unseen = "predicted before they were run" if other or kind != "fitted" else "the fit saw them"
            show(f"{cpu}: {kind} rows, {unseen}", cpu, recorded("planner_row", cpu, kind))
        fitted = recorded("planner_row", cpu, "fitted")
        if other and len(fitted) > len(planner.GROUPS):
            refitted = fitted_devices(cpu)
            print(f"\n{cpu}, shares refitted on its own fitted rows: {refitted['cpu2']['shares']}")
            show(f"{cpu}: fitted rows, the refit saw them", cpu, fitted, refitted)
            show(
                f"{cpu}: held-out rows, not in the refit",
                cpu,
                recorded("planner_row", cpu, "held-out"),
                refitted,
            )
    for label in (label for label in hardware.catalogue() if recorded("planner_row", label)):
        show(f"{label}: as predicted before it was run", label, recorded("planner_row", label))
        if label in planner.efficiency()["measured"]:
            for half, kind in zip(board_halves(label), ("fitted", "held-out"), strict=True):
                show(f"{label}: {kind} rows, by the shares fitted since", label, half, {})
    return summary


def run(args: argparse.Namespace, rows: Rows) -> Row:
    cpu, command, other = hardware.cpu_model(), args.command, args.other
    boards = [*hardware.catalogue()]
    known = {"predict": [None, *boards], "adopt": list(calibration()), "fit-board": boards}.get(command)
    if known is not None and other not in known:
        parser.error(f"{command}: expected one of {', '.join(filter(None, known))}")
    if command in SETS:
        return hold_out(cpu, command)
    commands = {"tables": tables, "rates": lambda: rates(cpu), "fit": lambda: fit(cpu)}
    commands |= {"predict": lambda: predict(other or cpu), "adopt": lambda: adopt(cpu, other)}
    return (commands | {"fit-board": lambda: fit_board(other)})[command]()


if __name__ == "__main__":
    parser = options(__doc__)
    choices = ("tables", "rates", "fit", "predict", "adopt", "fit-board", *SETS)
    parser.add_argument("command", nargs="?", default="tables", choices=choices)
    about = "adopt: the CPU whose shares are taken; predict, fit-board: a GPU"
    parser.add_argument("other", nargs="?", help=about)
    raise SystemExit(start(parser, run, child))
