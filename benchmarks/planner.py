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
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NOTEBOOK = "06_hardware"
SPINS = (
    "10000"  # of a waiting OpenMP thread, as the Makefile has it: a neighbour then costs time, not minutes
)
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
    """Measure every row of a set that has no record."""
    done = [{k: v for k, v in r["own_params"].items() if k not in ("set", "device")} for r in measured(kind)]
    for one in SETS[kind]:
        if one in done:
            continue
        found = child("measure", one["threads"], one)
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
    changes = "".join(f", {name} {value}" for name, value in given["model"].items())
    return f"{given['size']}, batch {given['batch_size']}, {given['threads']} thread(s){changes}"


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
    elif given.command == "rates":
        rates()
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
        found = child("microbench", threads, threads)
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
