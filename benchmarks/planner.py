"""The planner against measurements of this machine: rows that it was fitted on, and rows that it was not.

    python benchmarks/planner.py rates       the machine's rates, for one and two threads: a minute or two
    python benchmarks/planner.py fitted      measures the rows that the achievable shares are fitted on
    python benchmarks/planner.py fit         fits the shares; they go to params/calibration.yaml
    python benchmarks/planner.py predict     predicts the held-out rows, with a hash: to be committed first
    python benchmarks/planner.py held-out    measures those rows
    python benchmarks/planner.py             the error tables, fitted and held-out rows apart

One and two threads are two devices, cpu1 and cpu2. Each row runs in a process of its own, since peak memory
belongs to a process; what is shown is the median step. Histories are synthetic, over catalogues of the true
size. Records go to `executed/cpu/grids/planner.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NOTEBOOK = "06_hardware"
SPINS = (
    "10000"  # of a waiting OpenMP thread, as the Makefile has it: a neighbour then costs time, not minutes
)
DISTURBED = 0.04  # share of the cores beyond which a row is thrown away; the same command tries again
USERS = 6000  # synthetic histories
SHORT, ML = {"mean_len": 9.4, "max_len": 50}, {"mean_len": 100.0, "max_len": 200, "users": 1000}
REAL = (
    "5m",
    "85m",
    "130m",
    "430m",
)  # at their own catalogue and batch 128 with two threads: `real_size_step`


def row(size: str, threads: int, batch_size: int, shape: dict[str, Any], **model: Any) -> dict[str, Any]:
    """Describe one row; `model` overrides fields of the size."""
    whole = {"size": size, "threads": threads, "batch_size": batch_size, "users": USERS} | shape
    return whole | {"model": model}


FITTED = [
    row("nano", 2, 64, ML),
    row("tiny", 1, 64, ML),
    row("tiny", 2, 64, ML),
    row("small", 1, 32, ML),
    row("medium", 1, 64, ML),
    row("medium", 2, 64, ML),
    row("tiny", 2, 128, SHORT, num_items=40_000),
    row("small", 2, 64, SHORT, num_items=3000),
    row("5m", 1, 128, SHORT),
    row("5m", 2, 512, SHORT),
    row("medium", 2, 256, {"mean_len": 30.0, "max_len": 100}, num_items=5000),
    row("85m", 2, 128, SHORT),
    row("85m", 1, 128, SHORT),
    row("85m", 2, 512, SHORT),
    row("130m", 1, 128, SHORT, num_items=20_000),
    row("430m", 2, 64, SHORT, num_items=18_345, num_layers=4),
]
HELD_OUT = [
    row("nano", 2, 256, SHORT, num_items=10_000),
    row("tiny", 1, 128, {"mean_len": 60.0, "max_len": 100, "users": 2000}),
    row("small", 2, 256, {"mean_len": 8.9, "max_len": 50}, num_items=12_101, num_layers=3),
    row("small", 2, 16, ML, num_layers=4, hidden_dim=192),
    row("medium", 2, 32, {"mean_len": 165.0, "max_len": 200, "users": 1000}, num_items=3416),
    row("medium", 1, 128, SHORT, num_items=57_000, tied=False),
    row("5m", 2, 128, SHORT),
    row("5m", 1, 64, SHORT, num_layers=6),
    row("5m", 1, 128, SHORT, num_items=60_000),
    row("85m", 2, 256, SHORT, num_layers=6),
    row("130m", 2, 128, SHORT),
    row("130m", 1, 64, SHORT),
    row("430m", 2, 128, SHORT),
    row("430m", 1, 64, SHORT),
]
SETS = {"fitted": FITTED, "held-out": HELD_OUT}


def configs(given: dict[str, Any]) -> tuple[Any, Any]:
    """Return the configurations of a row."""
    from reclib.config import TrainConfig, model_config

    model = model_config(given["size"], **({"max_len": given["max_len"]} | given["model"]))
    return model, TrainConfig(batch_size=given["batch_size"], epochs=100_000, precision="fp32")


def dataset(given: dict[str, Any], num_items: int) -> Any:
    """Return the synthetic histories of a row."""
    from reclib import data

    return data.synthetic_dataset(given["users"], num_items, given["mean_len"], 0)


# -- one row, in a process of its own ------------------------------------------------------------------------


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """Train some steps and return step time, memory, and what was counted."""
    import torch

    from reclib import benchmark, data, hardware
    from reclib.model import Bert4Rec
    from reclib.trainer import Trainer

    torch.set_num_threads(given["threads"])
    model, train = configs(given)
    prepared = dataset(given, model.num_items)
    device = hardware.resolve("cpu")
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own pools are there before the count starts
    hardware.reset_peak_memory(device.torch_device)
    before = hardware.peak_memory_bytes(device.torch_device)
    torch.manual_seed(0)
    histories = data.train_histories(prepared)
    trainer = Trainer(Bert4Rec(model), histories, train, device, prepared.fingerprint)
    parameters = sum(p.numel() for p in trainer.parameters)
    steps = 24 if parameters < 3e6 else 12 if parameters < 50e6 else 5 if parameters < 200e6 else 3
    found = benchmark.measure(trainer, steps, 3 if parameters < 50e6 else 2)
    done, needed = benchmark.step_flops(trainer, 3)
    return {
        "card": hardware.device_card(device),
        "data": {"name": "synthetic", "fingerprint": prepared.fingerprint},
        "counts": found.counts()
        | {"parameters": parameters, "encoder_flops": done.encoder, "head_flops": done.head}
        | {"needed_flops": needed.total},
        "timings": found.timings() | {"process_bytes": before},
    }


def busy_seconds() -> float:
    """Return the processor time that the machine has spent so far, on all cores."""
    user, nice, system, *_ = (int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def undisturbed(command: str, threads: int, payload: Any) -> Any:
    """Return what `child` found, or None where other processes took more than `DISTURBED` of the cores."""
    before, spent = busy_seconds(), resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    found = child(command, threads, payload)
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
    others = max(0.0, busy_seconds() - before - own) / (wall * (os.cpu_count() or 1))
    found["timings" if "timings" in found else "rates"]["others_share"] = others
    if others <= DISTURBED:
        return found
    print(f"  disturbed: others took {others:.0%} of the cores; not recorded: {payload}", flush=True)
    return None


def child(command: str, threads: int, payload: Any) -> Any:
    """Run one of this file's commands in a process with so many threads; return what it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment["GOMP_SPINCOUNT"] = SPINS
    done = subprocess.run(
        [sys.executable, __file__, command, "--payload", json.dumps(payload)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


# -- records -------------------------------------------------------------------------------------------------


def file() -> Path:
    return ROOT / "executed" / "cpu" / "grids" / "planner.jsonl"


def write(name: str, found: dict[str, Any], own: dict[str, Any]) -> None:
    """Append a record of what a child found."""
    from reclib import provenance, record

    line = {
        "schema": record.SCHEMA,
        "notebook": NOTEBOOK,
        "name": name,
        "kind": "measured",
        "label": "cpu",
        "claimed": None,
        "profile": "grid",
        "seed": None,
        "device": {key: found["card"][key] for key in record.CARD},
        "data": found["data"],
        "metrics": found["counts"],
        "timings": found["timings"],
        "series": {},
        "params": {"grid": "planner"},
        "own_params": own,
        "params_hash": record.params_hash(own | {"name": name}),
        "earlier": 0,
        "code": provenance.code_hash(NOTEBOOK),
        "git": provenance.git_state(),
        "versions": provenance.versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    record.append(file(), provenance.plain(line))


def measured(kind: str) -> list[dict[str, Any]]:
    """Return the newest record of each row of a set."""
    from reclib.grid import read_rows

    rows = [r for r in read_rows(file()) if r["name"] == "planner_row" and r["own_params"]["set"] == kind]
    return list({r["params_hash"]: r for r in rows}.values())


def run_rows(kind: str) -> None:
    """Measure every row of a set that has no record; rows that others disturb stay without one."""
    done = [{k: v for k, v in r["own_params"].items() if k not in ("set", "device")} for r in measured(kind)]
    for one in SETS[kind]:
        if one in done:
            continue
        found = undisturbed("measure", one["threads"], one)
        if found is None:
            continue
        own = one | {"device": f"cpu{one['threads']}"}
        write("planner_row", found, own | {"set": kind})
        if one["size"] in REAL and one == row(one["size"], 2, 128, SHORT):
            write("real_size_step", found, own)
        t = found["timings"]
        print(
            f"{title(one):58} {t['step_seconds']:9.4f} s {t['peak_memory_bytes'] / 2**20:9.0f} MiB",
            flush=True,
        )


def title(given: dict[str, Any]) -> str:
    changes = "".join(f", {name} {value}" for name, value in sorted(given["model"].items()))
    return f"{given['size']}, batch {given['batch_size']}, {given['threads']} thread(s){changes}"


# -- fitting and predicting ----------------------------------------------------------------------------------


def groups_of(given: dict[str, Any], rates: dict[str, Any]) -> tuple[Any, Any]:
    """Return a row's seconds by group at the machine's rates alone, and its footprint."""
    from reclib import data, footprint, steptime, workload

    model, train = configs(given)
    histories = data.train_histories(dataset(given, model.num_items))
    lengths = histories.ends - histories.starts
    parts = workload.step_parts(model, train, workload.mean_shapes(model, train, lengths))
    groups = steptime.cpu_groups(parts, model, rates)
    return groups, footprint.memory(model, train, lengths, "fp32", "cpu")


def recorded_rates() -> dict[str, dict[str, Any]]:
    """Return the newest rates of each device, shapes as keys again."""
    from reclib.grid import read_rows

    found: dict[str, dict[str, Any]] = {}
    for one in (r for r in read_rows(file()) if r["name"] == "rates"):
        mine: dict[str, Any] = {}
        for name, value in one["timings"].items():
            stem, _, last = name.rpartition(" ")
            if last.isdecimal():
                mine.setdefault(stem, {})[int(last)] = float(f"{value:.4g}")
            else:
                mine[name] = float(f"{value:.4g}")
        found[one["own_params"]["device"]] = {"name": one["device"]["name"], "rates": mine}
    return found


RIDGE = 0.02  # pull of each share towards 1, in squared relative errors: five shares, few rows


def fit() -> None:
    """Fit the shares of the groups to the measured steps, all rows and both devices at once."""
    import numpy as np
    import yaml
    from scipy.optimize import nnls

    from reclib.steptime import GROUPS

    devices, rows = recorded_rates(), measured("fitted")
    seconds, process, heaps = [], {name: [] for name in devices}, []
    for one in rows:
        own = one["own_params"]
        groups, size = groups_of(own, devices[own["device"]]["rates"])
        peak, before = one["timings"]["peak_memory_bytes"], one["timings"]["process_bytes"]
        fixed = size.total - size.parts["activations"]
        heaps.append([size.held / peak, size.layer / peak, (peak - before - fixed) / peak])
        seconds.append([groups[name] / one["timings"]["step_seconds"] for name in GROUPS])
        process[own["device"]].append(one["timings"]["process_bytes"])
    pull = np.sqrt(RIDGE) * np.eye(len(GROUPS))
    left = np.vstack([seconds, pull])
    shares, _ = nnls(left, np.concatenate([np.ones(len(rows)), np.sqrt(RIDGE) * np.ones(len(GROUPS))]))
    heap, _ = nnls(np.array(heaps)[:, :2], np.array(heaps)[:, 2])
    for name, one in devices.items():
        one["heap"] = {"held": round(float(heap[0]), 3), "layer": round(float(heap[1]), 3)}
        one["shares"] = {group: round(float(x), 3) for group, x in zip(GROUPS, shares, strict=True)}
        one["process_bytes"] = int(median(process[name]))
        one["error"] = {"rows": 0, "time_median": 0.0, "time_worst": 0.0}
    head = (
        "# Written by benchmarks/planner.py: what this CPU was measured to do, one and two threads as two\n"
    )
    head += "# devices. Shares were fitted on the fitted rows alone; error says of which rows it is.\n"
    target = ROOT / "params" / "calibration.yaml"
    target.write_text(head + yaml.safe_dump(devices, sort_keys=False), encoding="utf-8")
    _write_error("fitted")
    print(target.read_text()[-900:])


def _write_error(kind: str) -> None:
    """Put the errors of a set of rows into the calibration, as the band around predictions."""
    import yaml

    target = ROOT / "params" / "calibration.yaml"
    text = target.read_text(encoding="utf-8")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    devices = yaml.safe_load(text)
    found = errors(kind)
    for one in devices.values():
        time = [abs(e["time"] - 1) for e in found]
        memory = [abs(e["memory"] - 1) for e in found]
        one["error"] = {
            "of": kind,
            "rows": len(found),
            "time_median": round(median(time), 3),
            "time_worst": round(max(max(e["time"], 1 / e["time"]) - 1 for e in found), 3),
            "memory_median": round(median(memory), 3),
            "memory_worst": round(max(memory), 3),
        }
    target.write_text(head + yaml.safe_dump(devices, sort_keys=False), encoding="utf-8")


def forecast(given: dict[str, Any]) -> dict[str, float]:
    """Return the planner's step time and peak memory of a row."""
    from reclib.steptime import GROUPS, cpus

    device = cpus()[f"cpu{given['threads']}"]
    groups, size = groups_of(given, device.rates)
    step = sum(device.shares[name] * groups[name] for name in GROUPS)
    return {"step_seconds": step, "peak_memory_bytes": size.resident(device.heap) + device.process_bytes}


def predictions_file() -> Path:
    return file().with_name("planner-predictions.json")


def predict() -> None:
    """Predict the held-out rows, with a hash of the calibration and of the modules that predict."""
    if measured("held-out"):
        raise SystemExit("held-out rows have been measured: a prediction made now is none")
    used = [ROOT / "params/calibration.yaml"]
    used += [ROOT / "reclib" / f"{name}.py" for name in ("workload", "footprint", "steptime", "flops")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in used)).hexdigest()
    rows = [one | {"predicted": forecast(one)} for one in HELD_OUT]
    whole = {
        "sha256_of_the_model": digest,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
    }
    predictions_file().write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    for one in rows:
        print(f"{title(one):58} {one['predicted']['step_seconds']:9.4f} s")


def errors(kind: str) -> list[dict[str, Any]]:
    """Return predicted over measured, for time and memory, of each measured row of a set.

    Held-out rows take the predictions that were written down before they were run.
    """
    before: dict[str, dict[str, float]] = {}
    if kind == "held-out" and predictions_file().is_file():
        for one in json.loads(predictions_file().read_text())["rows"]:
            before[title(one) + str(one["mean_len"])] = one["predicted"]
    found = []
    for one in measured(kind):
        own, timings = one["own_params"], one["timings"]
        said = before[title(own) + str(own["mean_len"])] if before else forecast(own)
        tensors = timings["peak_memory_bytes"] - timings["process_bytes"]
        predicted_tensors = said["peak_memory_bytes"] - _process(own)
        found.append(
            {"row": own, "measured": timings, "predicted": said}
            | {"time": said["step_seconds"] / timings["step_seconds"]}
            | {"memory": said["peak_memory_bytes"] / timings["peak_memory_bytes"]}
            | {"tensors": predicted_tensors / tensors}
        )
    return found


def _process(own: dict[str, Any]) -> int:
    from reclib.steptime import cpus

    return cpus()[f"cpu{own['threads']}"].process_bytes


def tables() -> None:
    """Print the error tables, and the seed study's wall clock beside the planner's range for an A100."""
    for kind in SETS:
        found = errors(kind)
        if not found:
            print(f"{kind} rows: none measured yet\n")
            continue
        head = ("predicted s", "measured s", "error", "MiB", "MiB", "error", "tensors")
        print(f"{kind} rows".ljust(60) + "".join(f"{name:>12}" for name in head))
        for e in found:
            s, t = e["predicted"], e["measured"]
            numbers = f"{s['step_seconds']:12.4f}{t['step_seconds']:12.4f}{e['time'] - 1:12.1%}"
            numbers += f"{s['peak_memory_bytes'] / 2**20:12.0f}{t['peak_memory_bytes'] / 2**20:12.0f}"
            print(f"{title(e['row']):60}{numbers}{e['memory'] - 1:12.1%}{e['tensors'] - 1:12.1%}")
        for name in ("time", "memory", "tensors"):
            gaps = [abs(e[name] - 1) for e in found]
            print(
                f"  {name}: median absolute error {median(gaps):.1%}, worst {max(gaps):.1%}, {len(gaps)} rows"
            )
        print()
    seed_check()


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
    commands = ("rates", "fitted", "fit", "predict", "held-out", "tables", "measure", "microbench")
    parser.add_argument("command", nargs="?", default="tables", choices=commands)
    parser.add_argument("--payload", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.command == "measure":
        print(json.dumps(measure(given.payload)))
    elif given.command == "microbench":
        print(json.dumps(microbench(given.payload)))
    elif given.command in SETS:
        run_rows(given.command)
        if given.command == "held-out":
            _write_error("held-out")
    else:
        actions = {"rates": rates, "fit": fit, "predict": predict, "tables": tables}
        actions[given.command]()
    return 0


def microbench(threads: int) -> dict[str, Any]:
    import torch

    from reclib import hardware
    from reclib.microbench import rates as measure_rates

    torch.set_num_threads(threads)
    card = hardware.device_card(hardware.resolve("cpu"))
    return {"card": card, "rates": measure_rates(torch.device("cpu"))}


def rates() -> None:
    """Measure the machine's rates for one and two threads and record them."""
    for threads in (1, 2):
        if f"cpu{threads}" in recorded_rates():
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
        write("rates", about, {"device": f"cpu{threads}", "threads": threads})
        print(json.dumps(found["rates"], indent=1), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
