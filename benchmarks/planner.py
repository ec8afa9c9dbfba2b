"""The planner against measurements of CPUs and GPUs: rows that it was fitted on, and rows that it was not.

    python benchmarks/planner.py rates       this machine's rates, for one and two threads: a minute or two
    python benchmarks/planner.py fitted      measures the rows that the achievable shares are fitted on
    python benchmarks/planner.py fit         fits the shares; they go to params/calibration.yaml
    python benchmarks/planner.py adopt "AMD EPYC"    instead of both: the shares that another CPU's rows gave
    python benchmarks/planner.py predict     predicts rows not yet measured here: to be committed first
    python benchmarks/planner.py predict h100    the rows of `gpu.py` on a GPU: before its first run
    python benchmarks/planner.py held-out    measures those rows
    python benchmarks/planner.py             the error tables by device, fitted and held-out rows apart

One and two threads are two devices, cpu1 and cpu2. Each row runs in a process of its own, since peak memory
belongs to a process; what is shown is the median step. Histories are synthetic, over catalogues of the true
size. Records go to `executed/cpu/grids/planner.jsonl` and say which CPU they are of; those of a GPU lie in
its own folder, and its plans are of the data sheet. Once it was measured, its shares are refitted on half
of the rows, chosen by their hash, and judged on the others.
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
    file,
    here,
    key_of,
    lengths_of,
    measure,
    measured,
    microbench,
    named,
    on_gpu,
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
    from reclib.cost import planner

    parts, size = parts_of(given, "cpu")
    return planner.cpu_groups(parts, configs(given)[0], rates, given.get("precision", "fp32")), size


def parts_of(given: dict[str, Any], device_type: str) -> tuple[Any, Any]:
    """Return the parts of a row's step, and its footprint."""
    from reclib.cost import work

    (model, train), adapter, precision = configs(given), adapter_of(given), given.get("precision", "fp32")
    lengths = lengths_of(given, model.num_items)
    shapes = work.mean_shapes(model, train, lengths)
    width = work.HALF if precision in ("bf16", "fp16") else work.FP32
    parts = work.step_parts(model, train, shapes, width, adapter)
    return parts, work.training_memory(model, train, lengths, precision, device_type, adapter)


def fitted_devices(cpu: str) -> dict[str, Device]:
    """Return a CPU's devices with the shares of the groups fitted to its fitted rows, all rows at once."""
    import numpy as np
    from scipy.optimize import nnls

    from reclib.cost.planner import GROUPS

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
    from reclib.cost.planner import GROUPS

    device = devices[f"cpu{given['threads']}"]
    groups, size = groups_of(given, device["rates"])
    step = sum(device["shares"][name] * groups[name] for name in GROUPS)
    return {
        "step_seconds": step,
        "peak_memory_bytes": size.resident(device["heap"]) + device["process_bytes"],
    }


def on_board(given: dict[str, Any], label: str, share: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the planner's step time and peak of tensors of a row on a GPU, with its shares or given ones."""
    from reclib import hardware
    from reclib.cost import planner

    board = hardware.catalogue()[label]
    parts, size = parts_of(given, "cuda")
    if share is None:
        step = planner.on_board(parts, board, given["precision"])
        seconds = {"step_seconds": step.seconds, "step_seconds_low": step.low, "step_seconds_high": step.high}
    else:
        seconds = {"step_seconds": planner.roofline(parts, board, given["precision"], share)}
    return seconds | {"peak_memory_bytes": size.total}


def predictions_file(device: str) -> Path:
    """Return the file of the predictions for a CPU, or for a GPU in its own folder."""
    from reclib import hardware

    name = f"planner-predictions-{re.sub(r'[^a-z0-9]+', '-', device.lower())}.json"
    return file(device if device in hardware.catalogue() else "cpu").with_name(name)


def predictions(cpu: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a device that were predicted before they were measured, by row."""
    if not predictions_file(cpu).is_file():
        return {}
    rows = json.loads(predictions_file(cpu).read_text(encoding="utf-8"))["rows"]
    about = ("predicted", "time", "sha256_of_the_model")
    return {key_of({k: v for k, v in one.items() if k not in about}): one for one in rows}


def predict(gpu: str | None) -> None:
    """Predict each row that this CPU, or a GPU, has neither measured nor a prediction of.

    Each has a hash of the calibration (of a GPU: of data sheets and assumed shares) and of the modules that
    predict. A CPU that has its own shares has no prediction of the rows that they were fitted on.
    """
    device = gpu or here()
    before, params = predictions(device), ROOT / "params"
    used = [params / "devices.yaml", params / "efficiency.yaml"] if gpu else [calibration_file()]
    used += [ROOT / "reclib" / f"{name}.py" for name in MODEL]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in used)).hexdigest()
    about = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "sha256_of_the_model": digest}
    if gpu:
        rows, run = gpu_rows(gpu), {key_of(asked(r["own_params"])) for r in on_gpu(gpu)}
    else:
        rows = [one for kind in SETS.values() for one in kind]
        run = {key_of(asked(r["own_params"])) for kind in SETS for r in measured(kind, device)}
    for one in rows:
        if key_of(one) in run or key_of(one) in before:
            continue
        said = on_board(one, gpu) if gpu else forecast(one, calibration()[device])
        before[key_of(one)] = one | {"predicted": said} | about
        print(f"{title(one):100} {said['step_seconds']:9.5f} s {said['peak_memory_bytes'] / 2**30:7.2f} GiB")
    predictions_file(device).parent.mkdir(parents=True, exist_ok=True)
    whole = {"device" if gpu else "cpu": device, "rows": list(before.values())}
    predictions_file(device).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def gpu_rows(label: str) -> list[dict[str, Any]]:
    """Return the rows that `gpu.py` times on a GPU of the catalogue, as if it were here."""
    import gpu
    import torch

    from reclib import hardware
    from reclib.hardware import Card, Device

    board = hardware.catalogue()[label]
    card = Card(
        type="cuda",
        name=board.name,
        label=label,
        capability=board.capability,
        memory_bytes=board.memory_bytes,
    )
    return gpu.rows(Device(torch.device("cuda"), card, label))


def gpu_errors(
    label: str, rows: Iterable[dict[str, Any]], share: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return predicted over measured, for time and memory, of measured rows of a GPU.

    A row takes the prediction that was written down before it was run; where there is none, and with the
    shares `share`, it is what the planner says now.
    """
    before, found = {} if share else predictions(label), []
    for one in rows:
        given, timings = asked(one["own_params"]), one["timings"]
        written = before.get(key_of(given))
        said = written["predicted"] if written else on_board(given, label, share)
        ratios = {"time": said["step_seconds"] / timings["step_seconds"]}
        ratios["memory"] = said["peak_memory_bytes"] / timings["peak_memory_bytes"]
        found.append(
            {"row": given, "measured": timings, "predicted": said, "written": bool(written)} | ratios
        )
    return found


def halves(rows: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows to fit on and rows to judge by: the hash of what a row is decides."""
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for one in rows:
        digest = hashlib.sha256(key_of(asked(one["own_params"])).encode()).digest()
        sides[digest[0] % 2].append(one)
    return sides


def refitted(label: str, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the shares of a GPU's data sheet, and of the host, that rows give: least squares of logs."""
    import numpy as np
    from scipy.optimize import least_squares

    from reclib import hardware
    from reclib.cost import planner

    board, names = hardware.catalogue()[label], ("products", "bandwidth", "operator_us")
    parts = [(parts_of(asked(r["own_params"]), "cuda")[0], r["own_params"]["precision"]) for r in rows]
    took = [r["timings"]["step_seconds"] for r in rows]

    def gaps(logs: Any) -> Any:
        share = dict(zip(names, np.exp(logs), strict=True))
        return [
            np.log(planner.roofline(one, board, name, share) / t)
            for (one, name), t in zip(parts, took, strict=True)
        ]

    starts = [np.log([planner.efficiency()[at][name] for name in names]) for at in ("slow", "likely", "fast")]
    tries = [least_squares(gaps, start, diff_step=1e-3) for start in starts]  # a host that waits has no slope
    found = min(tries, key=lambda one: one.cost)
    return {name: round(float(value), 3) for name, value in zip(names, np.exp(found.x), strict=True)}


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
    gpu_tables()
    seed_check()


def gpu_tables() -> None:
    """Print the errors of every GPU that was measured: as predicted, and with shares refitted on half."""
    from reclib import hardware

    for label in hardware.catalogue():
        rows = on_gpu(label)
        if not rows:
            continue
        print_table(f"{label}: as predicted before it was run, by its data sheet", gpu_errors(label, rows))
        known, new = halves(rows)
        if len(known) < 6 or len(new) < 6:
            print(f"-- {label}: {len(rows)} rows are too few to refit its shares on half of them\n")
            continue
        share = refitted(label, known)
        print(f"-- {label}, shares refitted on {len(known)} rows: {share}\n")
        print_table(f"{label}: rows that the refit did not see", gpu_errors(label, new, share))


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
        numbers += f"{e['memory'] - 1:12.1%}" + (f"{e['tensors'] - 1:12.1%}" if "tensors" in e else "")
        print(f"{title(e['row']):60}{numbers}")
    for what in [name for name in ("time", "memory", "tensors") if name in rows[0]]:
        signed = [e[what] - 1 for e in rows]
        gaps = [abs(gap) for gap in signed]
        print(
            f"  {what}: median absolute error {median(gaps):.1%}, worst {max(gaps):.1%}, {len(gaps)} rows;"
            f" median error {median(signed):+.1%}"
        )
    print()


def seed_check() -> None:
    """Compare the seed study's wall clock on an A100 with the plan of its step: for consistency only."""
    from reclib.config import TrainConfig, model_config
    from reclib.cost import planner

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
    from reclib import hardware

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    actions = {"rates": rates, "fit": fit, "tables": tables}
    commands = (*actions, "predict", "adopt", *SETS, "measure", "microbench")
    parser.add_argument("command", nargs="?", default="tables", choices=commands)
    parser.add_argument(
        "other", nargs="?", help="adopt: the CPU whose shares are taken; predict: a GPU's label"
    )
    parser.add_argument("--minutes", type=float, default=600.0, help="no row is started after so many")
    parser.add_argument("--payload", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.command in ("measure", "microbench"):
        print(json.dumps({"measure": measure, "microbench": microbench}[given.command](given.payload)))
    elif given.command == "predict":
        if given.other and given.other not in hardware.catalogue():
            parser.error(f"predict: expected one of {', '.join(hardware.catalogue())}")
        predict(given.other)
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
