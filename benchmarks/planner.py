"""The planner against measurements of CPUs and GPUs: rows that it was fitted on, and rows that it was not.

    python benchmarks/planner.py rates       this machine's rates, for one and two threads: a minute or two
    python benchmarks/planner.py fitted      measures the rows that the achievable shares are fitted on
    python benchmarks/planner.py fit         fits the shares; they go to params/calibration.yaml
    python benchmarks/planner.py adopt "AMD EPYC"    instead of both: the shares that another CPU's rows gave
    python benchmarks/planner.py predict     predicts rows not yet measured here: to be committed first
    python benchmarks/planner.py predict h100    the rows of `gpu.py` on a GPU: before its first run
    python benchmarks/planner.py held-out    measures those rows
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
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from common import ROOT
from planner_rows import (
    SETS,
    Row,
    adapter_of,
    configs,
    cpu_of,
    file,
    here,
    key_of,
    lengths_of,
    measure,
    measure_rates,
    measured,
    named,
    row_of,
    run_rows,
    title,
    undisturbed,
    write,
)

from reclib import hardware
from reclib.cost import planner, work

RIDGE = 0.02  # pull of each share towards 1, in squared relative errors: five shares, few rows
CALIBRATION, EFFICIENCY = ROOT / "params" / "calibration.yaml", ROOT / "params" / "efficiency.yaml"
# The most that a fit may find of fp32's and bf16's peak (products of 8192 reached that) and bandwidth.
MOST = (0.75, 0.68, 0.9)
PREDICTING = [ROOT / "reclib" / "cost" / f"{name}.py" for name in ("work", "planner")]
WRITTEN = ("predicted", "time", "sha256_of_the_model")  # what a written prediction adds to its row
Device = dict[str, Any]  # of params/calibration.yaml


# -- rates and calibration of CPUs ---------------------------------------------------------------------------


def rates() -> None:
    """Measure this machine's rates for one and two threads and record them."""
    for threads in (1, 2):
        if f"cpu{threads}" in recorded_rates(here()):
            continue
        if measured_rates := undisturbed("microbench", threads, threads):
            measured_rates["timings"] = {
                f"{name} {key}".strip(): value
                for name, values in measured_rates["timings"].items()
                for key, value in (values.items() if isinstance(values, dict) else [("", values)])
            }
            write("rates", measured_rates, {"device": f"cpu{threads}", "threads": threads, "cpu": here()})
            print(json.dumps(measured_rates["timings"], indent=1), flush=True)


def recorded_rates(cpu: str) -> dict[str, Device]:
    """Return the newest rates of a CPU by its devices, shapes as keys again."""
    devices: dict[str, Device] = {}
    for record in (r for r in named("rates") if cpu_of(r) == cpu):
        own: dict[str, Any] = {}
        for name, value in record["timings"].items():
            stem, _, last = name.rpartition(" ")
            place, key = (own.setdefault(stem, {}), int(last)) if last.isdecimal() else (own, name)
            place[key] = float(f"{value:.4g}")
        process = int(own.pop("process_bytes", 0))
        devices[record["own_params"]["device"]] = {"name": cpu, "rates": own, "process_bytes": process}
    return devices


def calibration() -> dict[str, dict[str, Device]]:
    """Return the devices of every CPU."""
    return yaml.safe_load(CALIBRATION.read_text(encoding="utf-8"))


def calibrate(cpu: str, devices: dict[str, Device]) -> None:
    """Put a CPU's devices into the calibration, whose comment at the top stays."""
    text = CALIBRATION.read_text(encoding="utf-8")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    # Through JSON, so that devices which share a band do not become anchors.
    whole = numbered(json.loads(json.dumps(calibration() | {cpu: devices})))
    CALIBRATION.write_text(head + yaml.safe_dump(whole, sort_keys=False), encoding="utf-8")


def numbered(tree: Any) -> Any:
    """Return nested dicts whose keys are numbers where their text is one, as shapes after JSON are."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdecimal() else k: numbered(value) for k, value in tree.items()}


def parts_of(given: Row, device_type: str, room: int | None = None) -> tuple[Any, Any]:
    """Return the parts of a row's step, and its footprint on a device with so much memory."""
    (model, train), adapter, precision = configs(given), adapter_of(given), given.get("precision", "fp32")
    lengths = lengths_of(given, model.num_items)
    width = work.HALF if precision in ("bf16", "fp16") else work.FP32
    parts = work.step_parts(model, train, work.mean_shapes(model, train, lengths), width, adapter)
    return parts, work.training_memory(model, train, lengths, precision, device_type, adapter, room)


def groups_of(given: Row, rates: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a row's seconds by group at the machine's rates alone, and its footprint."""
    parts, size = parts_of(given, "cpu")
    return planner.cpu_groups(parts, configs(given)[0], rates, given.get("precision", "fp32")), size


def fitted_devices(cpu: str) -> dict[str, Device]:
    """Return a CPU's devices with the shares of the groups fitted to its fitted rows, all rows at once."""
    import numpy as np
    from scipy.optimize import nnls

    devices = recorded_rates(cpu)
    seconds, heaps, process = [], [], {name: [] for name in devices}
    for entry in measured("fitted", cpu):
        device, timings = entry["own_params"]["device"], entry["timings"]
        groups, size = groups_of(row_of(entry), devices[device]["rates"])
        peak, before = timings["peak_memory_bytes"], timings["process_bytes"]
        fixed = size.total - size.parts["activations"]
        heaps.append([size.held / peak, size.layer / peak, (peak - before - fixed) / peak])
        seconds.append([groups[name] / timings["step_seconds"] for name in planner.GROUPS])
        process[device].append(before)
    count = len(planner.GROUPS)
    left = np.vstack([seconds, np.sqrt(RIDGE) * np.eye(count)])
    right = np.concatenate([np.ones(len(seconds)), np.sqrt(RIDGE) * np.ones(count)])
    shares, heap = nnls(left, right)[0], nnls(np.array(heaps)[:, :2], np.array(heaps)[:, 2])[0]
    for name, entry in devices.items():
        entry["heap"] = {"held": round(float(heap[0]), 3), "layer": round(float(heap[1]), 3)}
        entry["shares"] = {group: round(float(x), 3) for group, x in zip(planner.GROUPS, shares, strict=True)}
        entry["process_bytes"] = int(median(process[name]))
    return devices


def fit() -> None:
    """Fit the shares of this CPU and put them into the calibration with the error of its fitted rows."""
    devices = fitted_devices(here())
    band = error_of(errors("fitted", here(), devices), "fitted")
    calibrate(here(), {name: device | {"error": band} for name, device in devices.items()})
    print(json.dumps(devices["cpu2"]["shares"]), json.dumps(band))


def adopt(other: str) -> None:
    """Give this CPU, of which only rates were measured, the shares and the error band of another one."""
    devices = recorded_rates(here())
    for name, device in devices.items():
        given = calibration()[other][name]
        device |= {key: given[key] for key in ("heap", "shares", "error")} | {"shares_of": other}
    calibrate(here(), devices)


def is_captured(given: Row) -> bool:
    """Whether a row's steps are CUDA graphs."""
    return given.get("train", {}).get("compile_mode") == "graph"


def board_halves(label: str) -> list[list[Row]]:
    """Return the records of a GPU's steps in two halves: every other configuration, whatever its stage."""
    by_kind: dict[str, list[Row]] = {}
    for record in named("planner_row", label):
        row = row_of(record)
        kind = {name: value for name, value in row.items() if name not in ("stage", "users")}
        by_kind.setdefault(key_of(kind), []).append(record)
    kinds = [by_kind[key] for key in sorted(by_kind)]
    return [[record for kind in half for record in kind] for half in (kinds[::2], kinds[1::2])]


def fit_board(label: str) -> None:
    """Fit a GPU's shares of its data sheet to half of its steps; record them with the error of the others."""
    import numpy as np
    from scipy.optimize import minimize

    board = hardware.catalogue()[label]
    prepared = [
        (row_of(r), parts_of(row_of(r), "cuda")[0], r["timings"]["step_seconds"])
        for r in board_halves(label)[0]
    ]

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
    start = np.log([0.5, 0.4, 0.4, 30, 40])
    fitted = minimize(loss, start, method="Nelder-Mead", bounds=bounds, options={"maxiter": 5000})
    given = planner.efficiency()  # held in the planner's memory: the errors below are by the new shares
    given["measured"][label] = shares(fitted.x) | {"error": {"time_worst": 0.0}}
    errors = gpu_errors(label, board_halves(label)[1], {})
    uncaptured = [
        error for error in errors if not is_captured(error["row"])
    ]  # of whose memory there is a plan
    band = error_of(errors, "held-out")
    band |= {name: value for name, value in error_of(uncaptured, "").items() if name.startswith("memory")}
    given["measured"][label]["error"] = band
    head, _, _ = EFFICIENCY.read_text(encoding="utf-8").partition("measured:")
    text = yaml.safe_dump(
        {"measured": given["measured"]}, sort_keys=False, default_flow_style=None, width=120
    )
    EFFICIENCY.write_text(head + text, encoding="utf-8")
    print(json.dumps(given["measured"][label]))


def error_of(rows: list[Row], of: str) -> Row:
    """Return the errors of rows as the band around predictions."""
    time, memory = ([abs(e[name] - 1) for e in rows] for name in ("time", "memory"))
    worst = max(max(e["time"], 1 / e["time"]) - 1 for e in rows)
    numbers = {"time_median": median(time), "time_worst": worst}
    numbers |= {"memory_median": median(memory), "memory_worst": max(memory)}
    return {"of": of, "rows": len(rows)} | {name: round(value, 3) for name, value in numbers.items()}


def write_error(cpu: str) -> None:
    """Put the errors of a CPU's rows that no fit of its shares has seen into the calibration.

    Rows with an adapter and rows in bf16 have an error of their own.
    """
    devices = calibration()[cpu]
    adopted = any("shares_of" in device for device in devices.values())
    unseen = [e for kind in (("fitted", "held-out") if adopted else ("held-out",)) for e in errors(kind, cpu)]
    band = error_of(unseen, "held-out") if unseen else next(iter(devices.values()))["error"]
    for kind in ("adapted", "bf16"):
        if rows := errors(kind, cpu):
            band[kind] = error_of(rows, "held-out")
    calibrate(cpu, {name: device | {"error": band} for name, device in devices.items()})


# -- predictions ---------------------------------------------------------------------------------------------


def forecast(given: Row, devices: Mapping[str, Device]) -> dict[str, float]:
    """Return the planner's step time and peak memory of a row on a CPU's devices."""
    device = devices[f"cpu{given['threads']}"]
    groups, size = groups_of(given, device["rates"])
    return {
        "step_seconds": sum(device["shares"][name] * groups[name] for name in planner.GROUPS),
        "peak_memory_bytes": size.resident(device["heap"]) + device["process_bytes"],
    }


def on_board(given: Row, label: str) -> dict[str, float]:
    """Return the planner's step time and peak of tensors of a row on a GPU."""
    board = hardware.catalogue()[label]
    parts, size = parts_of(given, "cuda", board.memory_bytes)
    step = planner.on_board(parts, board, given["precision"], is_captured(given))
    seconds = {"step_seconds": step.seconds, "step_seconds_low": step.low, "step_seconds_high": step.high}
    return seconds | {"peak_memory_bytes": size.total}


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


def predict(gpu: str | None) -> None:
    """Predict each row that this CPU, or a GPU, has neither measured nor a prediction of.

    Each has a hash of the calibration (of a GPU: of data sheets and assumed shares) and of the modules that
    predict. A CPU that has its own shares has no prediction of the rows that they were fitted on.
    """
    device = gpu or here()
    sheets = [ROOT / "params" / "devices.yaml", EFFICIENCY] if gpu else [CALIBRATION]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [*sheets, *PREDICTING])).hexdigest()
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "sha256_of_the_model": digest}
    rows = gpu_rows(gpu) if gpu else [row for kind in SETS.values() for row in kind]
    done = [r for r in named("planner_row", gpu or "cpu") if gpu or cpu_of(r) == device]
    before, keys = predictions(device), {key_of(row_of(r)) for r in done}
    for row in rows:
        if key_of(row) in keys or key_of(row) in before:
            continue
        predicted = on_board(row, gpu) if gpu else forecast(row, calibration()[device])
        before[key_of(row)] = row | {"predicted": predicted} | about
        size = predicted["peak_memory_bytes"] / 2**30
        print(f"{title(row):100} {predicted['step_seconds']:9.5f} s {size:7.2f} GiB")
    predictions_file(device).parent.mkdir(parents=True, exist_ok=True)
    whole = {"device" if gpu else "cpu": device, "rows": list(before.values())}
    predictions_file(device).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def gpu_rows(label: str) -> list[Row]:
    """Return the rows that `gpu.py` times on a GPU of the catalogue, as if it were here."""
    import gpu_stages
    import torch

    board = hardware.catalogue()[label]
    about = {"name": board.name, "capability": board.capability, "memory_bytes": board.memory_bytes}
    card = hardware.Card(type="cuda", label=label, **about)
    return gpu_stages.rows(hardware.Device(torch.device("cuda"), card, label))


def compared(record: Row, written: Row | None, now: Callable[[], dict[str, float]]) -> Row:
    """Return predicted over measured, for time and memory, of a record.

    It takes the prediction that was written down before it was run; where there is none, what is said now.
    """
    timings, predicted = record["timings"], written["predicted"] if written else now()
    row = {"row": row_of(record), "measured": timings, "predicted": predicted, "written": bool(written)}
    row["time"] = predicted["step_seconds"] / timings["step_seconds"]
    return row | {"memory": predicted["peak_memory_bytes"] / timings["peak_memory_bytes"]}


def errors(kind: str, cpu: str, refitted: Mapping[str, Device] | None = None) -> list[Row]:
    """Return predicted over measured of each row of a set on a CPU; with `refitted` devices, as they say now.

    `tensors` is that of memory beyond what the process holds before it has a model.
    """
    before, devices = {} if refitted else predictions(cpu), refitted or calibration()[cpu]
    compared_rows = []
    for record in measured(kind, cpu):
        given, timings = row_of(record), record["timings"]
        row = compared(record, before.get(key_of(given)), lambda given=given: forecast(given, devices))
        process = devices[record["own_params"]["device"]]["process_bytes"]
        tensors = timings["peak_memory_bytes"] - timings["process_bytes"]
        compared_rows.append(row | {"tensors": (row["predicted"]["peak_memory_bytes"] - process) / tensors})
    return compared_rows


def gpu_errors(label: str, records: Iterable[Row], written: Mapping[str, Row] | None = None) -> list[Row]:
    """Return predicted over measured of records of a GPU, by what was written before or, with {}, by now."""
    before = predictions(label) if written is None else written
    return [
        compared(record, before.get(key_of(row_of(record))), lambda r=record: on_board(row_of(r), label))
        for record in records
    ]


# -- tables --------------------------------------------------------------------------------------------------


def tables() -> None:
    """Print the error tables by device."""
    for cpu, devices in calibration().items():
        other = devices["cpu2"].get("shares_of")
        print(f"== {cpu}: rates of its own, shares {f'of {other}' if other else 'fitted on its rows'}\n")
        for kind in SETS:
            unseen = "predicted before they were run" if other or kind != "fitted" else "the fit saw them"
            print_table(f"{kind} rows, {unseen}", errors(kind, cpu))
        if other and len(measured("fitted", cpu)) > len(devices["cpu2"]["shares"]):
            again = fitted_devices(cpu)
            print(f"-- {cpu}, shares refitted on its own fitted rows: {again['cpu2']['shares']}\n")
            print_table("fitted rows, the refit saw them", errors("fitted", cpu, again))
            print_table("held-out rows, the refit did not see them", errors("held-out", cpu, again))
    for label in hardware.catalogue():
        if rows := named("planner_row", label):
            print_table(f"{label}: as predicted before it was run", gpu_errors(label, rows))
            if label in planner.efficiency()["measured"]:
                for half, name in zip(board_halves(label), ("fitted", "held-out"), strict=True):
                    print_table(
                        f"{label}: {name} rows, by the shares fitted since", gpu_errors(label, half, {})
                    )


def print_table(name: str, rows: list[Row]) -> None:
    """Print the rows of a set, and the median and the worst of their errors."""
    if not rows:
        print(f"{name}: none measured\n")
        return
    import pandas as pd  # heavy, and no part of a measured process

    whats = [what for what in ("time", "memory", "tensors") if what in rows[0]]
    columns: dict[str, list[str]] = {name: [title(e["row"]) for e in rows]}
    for side in ("predicted", "measured"):
        columns[f"{side} s"] = [f"{e[side]['step_seconds']:.4f}" for e in rows]
        columns[f"{side} MiB"] = [f"{e[side]['peak_memory_bytes'] / 2**20:.0f}" for e in rows]
    columns |= {f"error of {what}": [f"{e[what] - 1:.1%}" for e in rows] for what in whats}
    print(pd.DataFrame(columns).to_string(index=False))
    for what in whats:
        signed = [e[what] - 1 for e in rows]
        gaps = [abs(gap) for gap in signed]
        text = f"  {what}: median absolute error {median(gaps):.1%}, worst {max(gaps):.1%}, {len(gaps)} rows"
        print(f"{text}; median error {median(signed):+.1%}")
    print()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = {"rates": rates, "fit": fit, "tables": tables}
    children = {"measure": measure, "microbench": measure_rates}
    commands = (*actions, "predict", "adopt", "fit-board", *SETS, *children)
    parser.add_argument("command", nargs="?", default="tables", choices=commands)
    parser.add_argument(
        "other", nargs="?", help="adopt: the CPU whose shares are taken; predict, fit-board: a GPU"
    )
    parser.add_argument("--minutes", type=float, default=600.0, help="no row is started after so many")
    parser.add_argument("--payload", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    boards = [*hardware.catalogue()]
    known = {"predict": [None, *boards], "adopt": list(calibration()), "fit-board": boards}.get(given.command)
    if known is not None and given.other not in known:
        parser.error(f"{given.command}: expected one of {', '.join(filter(None, known))}")
    if given.command in children:
        print(json.dumps(children[given.command](given.payload)))
    elif given.command == "predict":
        predict(given.other)
    elif given.command == "adopt":
        adopt(given.other)
    elif given.command == "fit-board":
        fit_board(given.other)
    elif given.command in SETS:
        run_rows(given.command, given.minutes)
        write_error(here())
    else:
        actions[given.command]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
