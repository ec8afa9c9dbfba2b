"""Records of many devices and many days, made comparable: where each was run, what it did, what it gave.

Functions from records to records or rows of a table; nothing here measures or draws.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from reclib import devices, planner, provenance, workload
from reclib.config import TrainConfig, model_config

Record = Mapping[str, Any]
# The more work, the more it says: of several profiles the last of these counts.
PROFILES = ("smoke", "custom", "quick", "lease", "full", "grid")
STEPS = ("hardware_step", "real_size_step")  # names of records of a step of one size on one device
CLIMBED = ("gather before the head", "packed rows")  # rungs of the ladder that a plan knows as techniques
_LENGTHS = ("users", "mean_len")


# -- where ---------------------------------------------------------------------------------------------------


def cpu_of(record: Record) -> str | None:
    """Return the CPU that a record is of, generations told apart where the record can; None for a GPU."""
    device = record.get("device") or {}
    if device.get("type", "cpu") != "cpu":
        return None
    said = (record.get("own_params") or {}).get("cpu") or device.get("cpu_model")
    return said or provenance.short_cpu(str(device.get("name") or ""))


def device_of(record: Record) -> str:
    """Return the device of a record as plans name it: threads and CPU, or the board of the catalogue."""
    own, device = record.get("own_params") or {}, record["device"]
    said = str(own.get("device") or record["label"])
    if device.get("type", "cpu") == "cpu":
        threads = said if said[3:].isdecimal() else f"cpu{device.get('threads') or ''}"
        return said if " " in said else f"{threads} {cpu_of(record)}"
    board = devices.of_memory(said, device.get("memory_bytes") or 0)
    return said if board is None else board.label


def placed(record: Record) -> dict[str, Any]:
    """Return a record whose own parameters say its device by `device_of`."""
    return dict(record) | {"own_params": dict(record["own_params"]) | {"device": device_of(record)}}


# -- steps ---------------------------------------------------------------------------------------------------


def steps(fresh: Iterable[Record], recorded: Iterable[Record]) -> list[dict[str, Any]]:
    """Return measured steps, each size on each device once: `fresh` ones, then those `recorded` elsewhere.

    Recorded smoke runs are left out; of the others the longest profile counts, and in it the newest.
    """
    of_steps = [r for r in recorded if r["name"] in STEPS and r["kind"] == "measured"]
    ranked = sorted(
        (r for r in of_steps if r["profile"] != "smoke"),
        key=lambda r: (PROFILES.index(r["profile"]), str(r["time"])),
        reverse=True,
    )
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in [*fresh, *ranked]:
        whole = placed(with_work(one))
        own = whole["own_params"]
        found.setdefault((own["size"], own["device"], own.get("rule", "closed")), whole)
    return list(found.values())


def with_work(record: Record) -> dict[str, Any]:
    """Return a record of a step that has its FLOPs and the bytes that the planner says it moves."""
    own, counted = record["own_params"], dict(record["metrics"])
    if "bytes_moved" in counted or own.get("status", "ok") != "ok":
        return dict(record)
    asked = record["params"] | own
    model = model_config(own["size"], **({"max_len": asked["max_len"]} | asked.get("model", {})))
    train = TrainConfig(batch_size=asked["batch_size"])
    shapes = workload.mean_shapes(model, train, planner.typical_lengths(asked["mean_len"]))
    width = workload.HALF if own.get("precision") in ("bf16", "fp16") else workload.FP32
    parts = workload.step_parts(model, train, shapes, width)
    done = counted.get("encoder_flops", 0) + counted.get("head_flops", 0)
    counted |= {"flops": counted.get("flops") or done, "bytes_moved": sum(part.bytes for part in parts)}
    return dict(record) | {"metrics": counted}


def against(measured: Iterable[Record], predicted: Iterable[Record]) -> list[dict[str, Any]]:
    """Return measured steps beside the closed plan of the same size, device and batch, where there is one."""
    plans = {
        (r["own_params"]["size"], r["own_params"]["device"], r["own_params"]["batch_size"]): r
        for r in predicted
        if r["own_params"]["rule"] == "closed"
    }
    rows = []
    for one in measured:
        key = tuple(one["own_params"].get(name) for name in ("size", "device", "batch_size"))
        if key in plans and (took := one["timings"].get("step_seconds")):
            said = plans[key]["timings"]["step_seconds"]
            about = dict(zip(("size", "device", "batch"), key, strict=True))
            rows.append(about | {"measured (s)": took, "predicted (s)": said, "error": said / took - 1})
    return rows


# -- what a technique gave ----------------------------------------------------------------------------------


def gains(recorded: Iterable[Record]) -> list[dict[str, Any]]:
    """Return how many times faster each technique made a measured step, as records of the runs they are of.

    From notebook 04 the ladder's rungs, and AMP and compiling against eager fp32; from notebook 05 iLoRA
    against training all weights. Smoke runs are left out.
    """
    runs: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for one in recorded:
        if one["kind"] == "measured" and one["profile"] != "smoke":
            work = json.dumps(one["params"], sort_keys=True)
            runs[one["notebook"], one["name"], one["label"], work].append(one)
    found: list[dict[str, Any]] = []
    for (notebook, name, *_), some in runs.items():
        timed = [r for r in some if (r.get("timings") or {}).get("step_seconds")]
        if (notebook, name) == ("04_amp_compile", "ladder"):
            found += _climbed(sorted(timed, key=lambda r: r["own_params"]["rung"]))
        elif (notebook, name) == ("04_amp_compile", "step"):
            found += _against_eager(timed)
        elif (notebook, name) == ("05_ilora", "adapter_step"):
            found += [
                _gain(r, "iLoRA", 1 / r["timings"]["over_full"])
                for r in timed
                if r["own_params"]["model"] == "ilora" and r["timings"].get("over_full")
            ][:1]
    return found


def _climbed(rungs: Sequence[Record]) -> list[dict[str, Any]]:
    seconds = [r["timings"]["step_seconds"] for r in rungs]
    return [
        _gain(one, one["own_params"]["name"], before / after)
        for one, before, after in zip(rungs[1:], seconds, seconds[1:], strict=False)
        if one["own_params"]["name"] in CLIMBED
    ]


def _against_eager(timed: Sequence[Record]) -> list[dict[str, Any]]:
    def one(precision: str, mode: str, batch: int) -> Record | None:
        asked = {"ran_precision": precision, "ran_compile_mode": mode, "batch_size": batch}
        return next((r for r in timed if asked.items() <= r["own_params"].items()), None)

    found = []
    for batch in sorted({r["own_params"]["batch_size"] for r in timed}):
        if (eager := one("fp32", "off", batch)) is None:
            continue
        sides = {"AMP": one("bf16", "off", batch) or one("fp16", "off", batch)}
        sides["torch.compile"] = one("fp32", "default", batch)
        for name, other in sides.items():
            if other is not None:
                ratio = eager["timings"]["step_seconds"] / other["timings"]["step_seconds"]
                found.append(_gain(other, name, ratio))
    return found


def _gain(of: Record, technique: str, speedup: float) -> dict[str, Any]:
    own = {"size": of["params"]["size"], "device": device_of(of), "technique": technique, "basis": "measured"}
    own["dataset"] = (of.get("data") or {}).get("name")
    return dict(of) | {"name": "technique", "own_params": own, "timings": {"speedup": speedup}, "metrics": {}}


# -- what a point of accuracy took ---------------------------------------------------------------------------


def points(recorded: Iterable[Record], prices: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return, for each model that was trained and scored on one dataset, what a point of NDCG@10 took.

    Seconds are of the whole training, NDCG@10 is that of the test split, both as means over the seeds that
    have both; a point is 0.01. `prices` are per hour by device.
    """
    trained: dict[tuple[Any, ...], Record] = {}
    scored: dict[tuple[Any, ...], Record] = {}
    for one in recorded:
        if one["notebook"] != "02_baseline" or one.get("seed") is None or one["profile"] == "smoke":
            continue
        key = (one["data"]["name"], one["own_params"].get("model"), one["profile"], one["seed"])
        if one["name"] == "learning_curve" and (one.get("timings") or {}).get("train_seconds"):
            trained[key] = one
        elif one["name"] == "test_metrics":
            scored[key] = one
    groups: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
    for key in trained.keys() & scored.keys():
        groups[(*key[:3], device_of(trained[key]))].append(key)
    rows = []
    for (data, model, profile, device), keys in sorted(groups.items()):
        seconds = fmean(trained[key]["timings"]["train_seconds"] for key in keys)
        accuracy = fmean(scored[key]["metrics"]["ndcg@10"] for key in keys)
        price = prices.get(device, prices.get(device.partition(" ")[0]))
        cost = None if price is None else seconds / 3600 * price
        about = {"data": data, "model": model, "profile": profile, "device": device, "seeds": len(keys)}
        per: dict[str, float | None] = {
            "training (s)": seconds,
            "NDCG@10": accuracy,
            "s per 0.01": seconds / (100 * accuracy),
        }
        per["cost per 0.01"] = None if cost is None else cost / (100 * accuracy)
        rows.append(about | per)
    return rows


def environments(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return the builds that measured records were made with, and how many of each device."""
    found: dict[tuple[Any, ...], int] = defaultdict(int)
    for one in records:
        device = one["device"]
        name = device.get("name") if device.get("type") != "cpu" else cpu_of(one)
        found[name, device.get("torch"), device.get("cuda"), device.get("driver")] += 1
    names = ("device", "torch", "CUDA", "driver", "records")
    return [dict(zip(names, (*key, count), strict=True)) for key, count in sorted(found.items(), key=str)]


def without_roof(records: Iterable[Record]) -> list[str]:
    """Return the measured devices whose peak is not known, so that no MFU is said of them."""
    labels = {device_of(r) for r in records if r["kind"] == "measured"}
    return sorted(labels - set(devices.catalogue()))


def mfu_of(record: Record) -> float | None:
    """Return the share of a GPU's peak that a step reached; None on a CPU and on an unknown device."""
    board = devices.catalogue().get(device_of(record))
    timings, counted = record["timings"], record["metrics"]
    peak = None if board is None else board.peaks.get(record["own_params"].get("precision", "fp32"))
    if peak is None or not timings.get("step_seconds"):
        return None
    return float(np.divide(counted["flops"], timings["step_seconds"] * peak))
