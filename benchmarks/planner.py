"""The planner against measurements of CPUs: rows that it was fitted on, and rows that it was not.

    python benchmarks/planner.py rates       this machine's rates, for one and two threads: a minute or two
    python benchmarks/planner.py fitted      measures the rows that the achievable shares are fitted on
    python benchmarks/planner.py fit         fits the shares; they go to params/calibration.yaml
    python benchmarks/planner.py adopt "AMD EPYC"    instead of both: the shares that another CPU's rows gave
    python benchmarks/planner.py predict     predicts rows not yet measured here: to be committed first
    python benchmarks/planner.py held-out    measures those rows
    python benchmarks/planner.py             the error tables by CPU, fitted and held-out rows apart

One and two threads are two devices, cpu1 and cpu2. Each row runs in a process of its own, since peak memory
belongs to a process; what is shown is the median step. Histories are synthetic, over catalogues of the true
size. Records go to `executed/cpu/grids/planner.jsonl` and say which CPU they are of.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from planner_rows import (  # noqa: E402
    SETS,
    adapter_of,
    asked,
    configs,
    cpu_of,
    dataset,
    file,
    here,
    key_of,
    measure,
    measured,
    microbench,
    named,
    run_rows,
    title,
    undisturbed,
    write,
)

RIDGE = 0.02  # pull of each share towards 1, in squared relative errors: five shares, few rows
MODEL = ("workload", "footprint", "steptime", "flops", "adapter_plan")  # modules that predict
Device = dict[str, Any]  # of params/calibration.yaml


# -- rates ---------------------------------------------------------------------------------------------------


def rates() -> None:
    """Measure this machine's rates for one and two threads and record them."""
    for threads in (1, 2):
        if f"cpu{threads}" in recorded_rates(here()):
            continue
        found = undisturbed("microbench", threads, threads)
        if found is None:
            continue
        flat = {
            f"{name} {key}".strip(): value
            for name, values in found["rates"].items()
            for key, value in (values.items() if isinstance(values, dict) else [("", values)])
        }
        about = {"card": found["card"], "data": None, "counts": {}, "timings": flat}
        write("rates", about, {"device": f"cpu{threads}", "threads": threads, "cpu": here()})
        print(json.dumps(found["rates"], indent=1), flush=True)


def recorded_rates(cpu: str) -> dict[str, Device]:
    """Return the newest rates of a CPU by its devices, shapes as keys again."""
    found: dict[str, Device] = {}
    for one in (r for r in named("rates") if cpu_of(r) == cpu):
        mine: dict[str, Any] = {}
        for name, value in one["timings"].items():
            stem, _, last = name.rpartition(" ")
            if last.isdecimal():
                mine.setdefault(stem, {})[int(last)] = float(f"{value:.4g}")
            else:
                mine[name] = float(f"{value:.4g}")
        process = int(mine.pop("process_bytes", 0))
        found[one["own_params"]["device"]] = {"name": cpu, "rates": mine, "process_bytes": process}
    return found


# -- calibration ---------------------------------------------------------------------------------------------


def calibration_file() -> Path:
    return ROOT / "params" / "calibration.yaml"


def calibration() -> dict[str, dict[str, Device]]:
    """Return the devices of every CPU."""
    import yaml

    return yaml.safe_load(calibration_file().read_text(encoding="utf-8"))


def calibrate(cpu: str, found: dict[str, Device]) -> None:
    """Put a CPU's devices into the calibration."""
    import yaml

    text = calibration_file().read_text(encoding="utf-8")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    whole = json.loads(json.dumps(calibration() | {cpu: found}))  # no anchors where devices share a band
    calibration_file().write_text(head + yaml.safe_dump(numbered(whole), sort_keys=False), encoding="utf-8")


def numbered(tree: Any) -> Any:
    """Return nested dicts whose keys are numbers where their text is one, as shapes after JSON are."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdecimal() else k: numbered(value) for k, value in tree.items()}


def groups_of(given: dict[str, Any], rates: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return a row's seconds by group at the machine's rates alone, and its footprint."""
    from reclib import data, footprint, steptime, workload

    (model, train), adapter, precision = configs(given), adapter_of(given), given.get("precision", "fp32")
    histories = data.train_histories(dataset(given, model.num_items))
    lengths = histories.ends - histories.starts
    shapes = workload.mean_shapes(model, train, lengths)
    width = workload.HALF if precision == "bf16" else workload.FP32
    parts = workload.step_parts(model, train, shapes, width, adapter)
    groups = steptime.cpu_groups(parts, model, rates, precision)
    return groups, footprint.memory(model, train, lengths, precision, "cpu", adapter)


def fitted_devices(cpu: str) -> dict[str, Device]:
    """Return a CPU's devices with the shares of the groups fitted to its fitted rows, all rows at once."""
    import numpy as np
    from scipy.optimize import nnls

    from reclib.steptime import GROUPS

    found, rows = recorded_rates(cpu), measured("fitted", cpu)
    seconds, process, heaps = [], {name: [] for name in found}, []
    for one in rows:
        own, timings = one["own_params"], one["timings"]
        groups, size = groups_of(own, found[own["device"]]["rates"])
        peak, before = timings["peak_memory_bytes"], timings["process_bytes"]
        fixed = size.total - size.parts["activations"]
        heaps.append([size.held / peak, size.layer / peak, (peak - before - fixed) / peak])
        seconds.append([groups[name] / timings["step_seconds"] for name in GROUPS])
        process[own["device"]].append(before)
    left = np.vstack([seconds, np.sqrt(RIDGE) * np.eye(len(GROUPS))])
    right = np.concatenate([np.ones(len(rows)), np.sqrt(RIDGE) * np.ones(len(GROUPS))])
    shares, heap = nnls(left, right)[0], nnls(np.array(heaps)[:, :2], np.array(heaps)[:, 2])[0]
    for name, one in found.items():
        one["heap"] = {"held": round(float(heap[0]), 3), "layer": round(float(heap[1]), 3)}
        one["shares"] = {group: round(float(x), 3) for group, x in zip(GROUPS, shares, strict=True)}
        one["process_bytes"] = int(median(process[name]))
    return found


def fit() -> None:
    """Fit the shares of this CPU and put them into the calibration with the error of its fitted rows."""
    cpu = here()
    found = fitted_devices(cpu)
    band = error_of(errors("fitted", cpu, found), "fitted")
    calibrate(cpu, {name: one | {"error": band} for name, one in found.items()})
    print(json.dumps(found["cpu2"]["shares"]), json.dumps(band))


def adopt(other: str) -> None:
    """Give this CPU, of which only rates were measured, the shares and the error band of another one."""
    found = recorded_rates(here())
    for name, one in found.items():
        given = calibration()[other][name]
        one |= {key: given[key] for key in ("heap", "shares", "error")} | {"shares_of": other}
    calibrate(here(), found)


def error_of(found: list[dict[str, Any]], of: str) -> dict[str, Any]:
    """Return the errors of rows as the band around predictions."""
    time, memory = ([abs(e[name] - 1) for e in found] for name in ("time", "memory"))
    return {
        "of": of,
        "rows": len(found),
        "time_median": round(median(time), 3),
        "time_worst": round(max(max(e["time"], 1 / e["time"]) - 1 for e in found), 3),
        "memory_median": round(median(memory), 3),
        "memory_worst": round(max(memory), 3),
    }


def write_error(cpu: str) -> None:
    """Put the errors of a CPU's rows that no fit of its shares has seen into the calibration.

    Rows with an adapter and rows in bf16 have an error of their own.
    """
    mine = calibration()[cpu]
    adopted = any("shares_of" in one for one in mine.values())
    found = [e for kind in (("fitted", "held-out") if adopted else ("held-out",)) for e in errors(kind, cpu)]
    band = error_of(found, "held-out") if found else next(iter(mine.values()))["error"]
    for kind in ("adapted", "bf16"):
        if rows := errors(kind, cpu):
            band[kind] = error_of(rows, "held-out")
    calibrate(cpu, {name: one | {"error": band} for name, one in mine.items()})


# -- predictions ---------------------------------------------------------------------------------------------


def forecast(given: dict[str, Any], devices: Mapping[str, Device]) -> dict[str, float]:
    """Return the planner's step time and peak memory of a row on a CPU's devices."""
    from reclib.steptime import GROUPS

    device = devices[f"cpu{given['threads']}"]
    groups, size = groups_of(given, device["rates"])
    step = sum(device["shares"][name] * groups[name] for name in GROUPS)
    return {
        "step_seconds": step,
        "peak_memory_bytes": size.resident(device["heap"]) + device["process_bytes"],
    }


def predictions_file(cpu: str) -> Path:
    return file().with_name(f"planner-predictions-{re.sub(r'[^a-z0-9]+', '-', cpu.lower())}.json")


def predictions(cpu: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a CPU that were predicted before they were measured, by row."""
    if not predictions_file(cpu).is_file():
        return {}
    rows = json.loads(predictions_file(cpu).read_text(encoding="utf-8"))["rows"]
    about = ("predicted", "time", "sha256_of_the_model")
    return {key_of({k: v for k, v in one.items() if k not in about}): one for one in rows}


def predict() -> None:
    """Predict each row that this CPU has neither measured nor a prediction of.

    Each has a hash of the calibration and of the modules that predict. A CPU that has its own shares has no
    prediction of the rows that they were fitted on.
    """
    cpu, before = here(), predictions(here())
    used = [calibration_file(), *(ROOT / "reclib" / f"{name}.py" for name in MODEL)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in used)).hexdigest()
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "sha256_of_the_model": digest}
    devices = calibration()[cpu]
    for kind, rows in SETS.items():
        run = {key_of(asked(r["own_params"])) for r in measured(kind, cpu)}
        for one in rows:
            if key_of(one) in run or key_of(one) in before:
                continue
            said = forecast(one, devices)
            before[key_of(one)] = one | {"predicted": said} | about
            print(f"{kind:9} {title(one):58} {said['step_seconds']:9.4f} s")
    whole = {"cpu": cpu, "rows": list(before.values())}
    predictions_file(cpu).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def errors(kind: str, cpu: str, refitted: Mapping[str, Device] | None = None) -> list[dict[str, Any]]:
    """Return predicted over measured, for time and memory, of each row of a set that was measured on a CPU.

    A row takes the prediction that was written down before it was run; where there is none, and with
    `refitted` devices, it is what the planner says now.
    """
    before = {} if refitted else predictions(cpu)
    devices = refitted or calibration()[cpu]
    found = []
    for one in measured(kind, cpu):
        own, timings = one["own_params"], one["timings"]
        written = before.get(key_of(asked(own)))
        said = written["predicted"] if written else forecast(own, devices)
        tensors = timings["peak_memory_bytes"] - timings["process_bytes"]
        predicted_tensors = said["peak_memory_bytes"] - devices[own["device"]]["process_bytes"]
        found.append(
            {"row": own, "measured": timings, "predicted": said, "written": bool(written)}
            | {"time": said["step_seconds"] / timings["step_seconds"]}
            | {"memory": said["peak_memory_bytes"] / timings["peak_memory_bytes"]}
            | {"tensors": predicted_tensors / tensors}
        )
    return found


# -- tables --------------------------------------------------------------------------------------------------


def tables() -> None:
    """Print the error tables by CPU, and the seed study's wall clock beside the range for an A100."""
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
    seed_check()


def print_table(name: str, found: Iterable[dict[str, Any]]) -> None:
    """Print the rows of a set, and the median and the worst of their errors."""
    rows = list(found)
    if not rows:
        print(f"{name}: none measured\n")
        return
    head = ("predicted s", "measured s", "error", "MiB", "MiB", "error", "tensors")
    print(name.ljust(60) + "".join(f"{word:>12}" for word in head))
    for e in rows:
        s, t = e["predicted"], e["measured"]
        numbers = f"{s['step_seconds']:12.4f}{t['step_seconds']:12.4f}{e['time'] - 1:12.1%}"
        numbers += f"{s['peak_memory_bytes'] / 2**20:12.0f}{t['peak_memory_bytes'] / 2**20:12.0f}"
        print(f"{title(e['row']):60}{numbers}{e['memory'] - 1:12.1%}{e['tensors'] - 1:12.1%}")
    for what in ("time", "memory", "tensors"):
        gaps = [abs(e[what] - 1) for e in rows]
        print(f"  {what}: median absolute error {median(gaps):.1%}, worst {max(gaps):.1%}, {len(gaps)} rows")
    print()


def seed_check() -> None:
    """Compare the seed study's wall clock on an A100 with the plan of its step: for consistency only."""
    from reclib import planner
    from reclib.config import TrainConfig, model_config

    rates = {"85m": 3886, "130m": 2429, "430m": 1080}  # sequences/s: an epoch's sequences over its time
    lengths = planner.typical_lengths()
    wasteful = {"layout": "padded", "head_rows": "all", "objective": "seed_focal", "optimizer": "loop"}
    print("seed study on an A100 (its batch and precision are not known: 512, tf32 and fp16)")
    for size, rate in rates.items():
        model = model_config(size, attention_dropout=0.25)
        for precision in ("fp32", "tf32", "fp16"):
            train = TrainConfig(batch_size=512, precision=precision, **wasteful)
            n = planner.plans("a100-40", model, train, lengths, 582_942)[0].numbers()
            low, high = n["sequences_per_second_low"], n["sequences_per_second_high"]
            inside = "inside" if low <= rate <= high else "outside"
            print(
                f"  {size:5} {precision}: {rate} by its clock, predicted {low:,.0f} to {high:,.0f}: {inside}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    actions = {"rates": rates, "fit": fit, "predict": predict, "tables": tables}
    commands = (*actions, "adopt", *SETS, "measure", "microbench")
    parser.add_argument("command", nargs="?", default="tables", choices=commands)
    parser.add_argument("other", nargs="?", help="adopt: the CPU whose shares are taken")
    parser.add_argument("--minutes", type=float, default=600.0, help="no row is started after so many")
    parser.add_argument("--payload", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.command in ("measure", "microbench"):
        print(json.dumps({"measure": measure, "microbench": microbench}[given.command](given.payload)))
    elif given.command == "adopt":
        if given.other not in calibration():
            parser.error(f"adopt: expected one of {', '.join(calibration())}")
        adopt(given.other)
    elif given.command in SETS:
        run_rows(given.command, given.minutes)
        write_error(here())
    else:
        actions[given.command]()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
