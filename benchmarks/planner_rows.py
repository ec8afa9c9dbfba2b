"""Rows that the planner is fitted on and tried on: what is trained, how it is measured, where it is kept.

Each row runs in a process of its own, since peak memory belongs to a process; what is recorded is the median
step. A row during which other processes took more than `DISTURBED` of the cores is thrown away.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(__file__).with_name("planner.py")

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
ADAPTED = [
    row("85m", 2, 128, SHORT) | {"adapter": "lora"},
    row("85m", 2, 128, SHORT) | {"adapter": "ilora"},
    row("85m", 1, 64, SHORT) | {"adapter": "ilora"},
    row("medium", 2, 64, ML) | {"adapter": "ilora"},
]
BF16 = [
    row("85m", 2, 128, SHORT) | {"precision": "bf16"},
    row("medium", 1, 64, ML) | {"precision": "bf16"},
]
SETS = {"fitted": FITTED, "held-out": HELD_OUT, "adapted": ADAPTED, "bf16": BF16}


def configs(given: dict[str, Any]) -> tuple[Any, Any]:
    """Return the configurations of a row."""
    from reclib.config import TrainConfig, model_config, validated

    model = model_config(given["size"], **({"max_len": given["max_len"]} | given["model"]))
    train = {
        "batch_size": given["batch_size"],
        "epochs": 100_000,
        "precision": given.get("precision", "fp32"),
    }
    return model, validated(TrainConfig, train | given.get("train", {}))


def described(stage: str, size: str, model: Any, train: Any, users: int) -> dict[str, Any]:
    """Return the row of a step on a GPU: what a size's model and the defaults of training differ in."""
    from dataclasses import asdict

    from reclib.config import TrainConfig, model_config

    usual = asdict(model_config(size, max_len=model.max_len)), asdict(TrainConfig())
    changes = [
        {name: value for name, value in asdict(given).items() if value != default[name]}
        for given, default in zip((model, train), usual, strict=True)
    ]
    own = {
        name: value for name, value in changes[1].items() if name not in ("batch_size", "epochs", "precision")
    }
    mean_len = min(SHORT["mean_len"], model.num_items / 4)
    whole = {"stage": stage, "size": size, "batch_size": train.batch_size, "precision": train.precision}
    whole |= {"users": users, "mean_len": mean_len, "max_len": model.max_len}
    return whole | {"model": changes[0], "train": own}


def adapter_of(given: dict[str, Any]) -> Any:
    """Return the adapter of a row as the planner has it; None where the whole model is trained."""
    from reclib.cost.work import AdapterPlan

    return AdapterPlan(kind=given["adapter"]) if "adapter" in given else None


def lengths_of(given: dict[str, Any], num_items: int) -> Any:
    """Return the lengths of the histories that a row trains on: all but the last two items, or whole ones."""
    import numpy as np

    from reclib.data.prepare import train_histories

    prepared = dataset(given, num_items)
    if given.get("histories") == "whole":
        return np.diff(prepared.offsets)
    histories = train_histories(prepared)
    return histories.ends - histories.starts


@functools.cache
def synthetic(users: int, num_items: int, mean_len: float) -> Any:
    from reclib.data.prepare import synthetic_dataset

    return synthetic_dataset(users, num_items, mean_len, 0)


def dataset(given: dict[str, Any], num_items: int) -> Any:
    """Return the synthetic histories of a row."""
    return synthetic(given["users"], num_items, given["mean_len"])


# -- one row, in a process of its own ------------------------------------------------------------------------


def measure(given: dict[str, Any]) -> dict[str, Any]:
    """Train some steps and return step time, memory, and what was counted."""
    import torch

    from reclib import hardware
    from reclib.data.prepare import train_histories
    from reclib.model.bert4rec import Bert4Rec
    from reclib.train import timing
    from reclib.train.trainer import Trainer

    torch.set_num_threads(given["threads"])
    model, train = configs(given)
    prepared = dataset(given, model.num_items)
    device = hardware.resolve("cpu")
    torch.randn(64, 64) @ torch.randn(64, 64)  # the libraries' own pools are there before the count starts
    hardware.reset_peak_memory(device.torch_device)
    before = hardware.peak_memory_bytes(device.torch_device)
    torch.manual_seed(0)
    histories = train_histories(prepared)
    trained = adapted(Bert4Rec(model), given)
    trainer = Trainer(trained, histories, train, device, prepared.fingerprint)
    parameters = sum(p.numel() for p in trained.parameters())
    steps = 24 if parameters < 3e6 else 12 if parameters < 50e6 else 5 if parameters < 200e6 else 3
    found = timing.measure(trainer, steps, 3 if parameters < 50e6 else 2)
    counts = found.counts() | {"parameters": parameters}
    if "adapter" in given:
        counts["trained_parameters"] = sum(p.numel() for p in trainer.parameters)
    else:  # what is counted there is training of all weights
        done, needed = timing.step_flops(trainer, 3)
        counts |= {"encoder_flops": done.encoder, "head_flops": done.head, "needed_flops": needed.total}
    return {
        "card": hardware.device_card(device),
        "data": {"name": "synthetic", "fingerprint": prepared.fingerprint},
        "counts": counts,
        "timings": found.timings() | {"process_bytes": before},
    }


def adapted(model: Any, given: dict[str, Any]) -> Any:
    """Return what a row trains: the model, or an adapter on it."""
    from reclib.config import AdapterConfig
    from reclib.model.ilora import AdaptedModel

    if (plan := adapter_of(given)) is None:
        return model
    found = AdaptedModel(model)
    found.add("planned", AdapterConfig(kind=plan.kind, rank=plan.rank, num_experts=plan.num_experts))
    return found


def microbench(threads: int) -> dict[str, Any]:
    """Return the rates of so many threads, and what a process holds before it has a model."""
    import torch
    from microbench import rates as measure_rates

    from reclib import hardware
    from reclib.train import trainer as reclib_trainer  # noqa: F401  (what a training process has loaded)

    torch.set_num_threads(threads)
    device = hardware.resolve("cpu")
    dataset(FITTED[0], 1000)
    torch.randn(64, 64) @ torch.randn(64, 64)
    hardware.reset_peak_memory(device.torch_device)
    before = hardware.peak_memory_bytes(device.torch_device)
    found = measure_rates(torch.device("cpu"))
    return {"card": hardware.device_card(device), "rates": found | {"process_bytes": before}}


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
        [sys.executable, str(COMMAND), command, "--payload", json.dumps(payload)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


# -- records -------------------------------------------------------------------------------------------------


def file(label: str = "cpu", root: Path = ROOT / "executed") -> Path:
    """Return the file of a device's records."""
    return root / label / "grids" / "planner.jsonl"


def write(name: str, found: Mapping[str, Any], own: dict[str, Any], root: Path = ROOT / "executed") -> None:
    """Append a record of what was found, beside those of its device."""
    from reclib import records

    line = records.row(
        NOTEBOOK,
        name,
        found["counts"],
        card=found["card"],
        profile="grid",
        params={"grid": "planner"},
        own_params=own,
        params_hash=records.params_hash(own | {"name": name}),
        data=found["data"],
        timings=found["timings"],
    )
    records.append(file(line["label"], root), line)


def here() -> str:
    """Return the CPU that is here."""
    from reclib import hardware

    return hardware.cpu_model()


def cpu_of(one: dict[str, Any]) -> str:
    """Return the CPU that a record is of; the first rows say its name only."""
    return one["own_params"].get("cpu", one["device"]["name"])


def named(name: str, label: str = "cpu") -> list[dict[str, Any]]:
    """Return the records of a name."""
    from reclib.experiments.grids import read_rows

    return [r for r in read_rows(file(label)) if r["name"] == name]


def measured(kind: str, cpu: str) -> list[dict[str, Any]]:
    """Return the newest record of each row of a set on a CPU."""
    rows = [r for r in named("planner_row") if r["own_params"]["set"] == kind and cpu_of(r) == cpu]
    return list({r["params_hash"]: r for r in rows}.values())


def on_gpu(label: str) -> list[dict[str, Any]]:
    """Return the newest record of each row that was measured on a GPU."""
    return list({r["params_hash"]: r for r in named("planner_row", label)}.values())


def asked(own: dict[str, Any]) -> dict[str, Any]:
    """Return the row that a record is of."""
    return {name: value for name, value in own.items() if name not in ("set", "device", "cpu")}


def run_rows(kind: str, minutes: float) -> None:
    """Measure rows of a set that this CPU has no record of, until `minutes` have passed.

    Rows that others disturb stay without one. The same command goes on.
    """
    cpu, began = here(), time.monotonic()
    done = [asked(r["own_params"]) for r in measured(kind, cpu)]
    for one in SETS[kind]:
        if one in done:
            continue
        if time.monotonic() - began > 60 * minutes:
            print(f"{kind}: {minutes} minutes have passed; the same command goes on")
            return
        found = undisturbed("measure", one["threads"], one)
        if found is None:
            continue
        own = one | {"device": f"cpu{one['threads']}", "cpu": cpu}
        write("planner_row", found, own | {"set": kind})
        if one["size"] in REAL and one == row(one["size"], 2, 128, SHORT):
            write("real_size_step", found, own)
        t = found["timings"]
        print(
            f"{title(one):58} {t['step_seconds']:9.4f} s {t['peak_memory_bytes'] / 2**20:9.0f} MiB",
            flush=True,
        )


def title(given: dict[str, Any]) -> str:
    """Return a row in words."""
    changes = "".join(f", {name} {value}" for name, value in sorted(given["model"].items()))
    changes += "".join(f", {name} {value}" for name, value in sorted(given.get("train", {}).items()))
    extra = "".join(f", {given[name]}" for name in ("adapter", "precision") if name in given)
    if "threads" not in given:
        return f"{given['stage']}: {given['size']}, batch {given['batch_size']}{changes}{extra}"
    return f"{given['size']}, batch {given['batch_size']}, {given['threads']} thread(s){changes}{extra}"


def key_of(given: dict[str, Any]) -> str:
    """Return what tells rows apart."""
    return json.dumps(given, sort_keys=True)
