"""Rows that the planner is fitted on and tried on: what is trained, how it is measured, where it is kept.

Each row runs in a process of its own, since peak memory belongs to a process; what is recorded is the median
step. A row during which other processes took more than `DISTURBED` of the cores is thrown away.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import ROOT, Row, run_child

from reclib import hardware, records
from reclib.config import AdapterConfig, TrainConfig, model_config, validated
from reclib.cost.work import AdapterPlan
from reclib.data.dataset import train_histories
from reclib.data.prepare import synthetic_dataset

DISTURBED = 0.04  # share of the cores beyond which a row is thrown away; the same command tries again
SHORT, ML = {"mean_len": 9.4, "max_len": 50}, {"mean_len": 100.0, "max_len": 200, "users": 1000}
REAL = ("5m", "85m", "130m", "430m")  # at their own catalogue and batch 128, two threads: `real_size_step`


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


def adapter_of(row: Row) -> AdapterPlan | None:
    """Return the adapter of a row as the planner has it; None where the whole model is trained."""
    return AdapterPlan(kind=row["adapter"]) if "adapter" in row else None


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
        network.add("planned", AdapterConfig(kind=plan.kind, rank=plan.rank, num_experts=plan.num_experts))
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
    result = run_child(str(ROOT / "benchmarks" / "planner.py"), call, environment)
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
    line = records.row(
        "06_hardware",
        name,
        result["counts"],
        card=result["card"],
        profile="grid",
        params={"grid": "planner"},
        own_params=own,
        params_hash=records.params_hash(own | {"name": name}),
        data=result["data"],
        timings=result["timings"],
    )
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
