"""Records as tables, and which of many records belong into one figure."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import yaml

from reclib import hardware, system
from reclib.config import ModelConfig, TrainConfig, model_config
from reclib.cost import planner, work
from reclib.cost.work import parameters
from reclib.data import fetch
from reclib.evaluate.statistics import claim
from reclib.records import PROFILES

# ------------------------------------------------------------------------------------------------
# Records of many devices and many days, made comparable: where each was run, what it did, what it gave.
#
# Functions from records to records or rows of a table; nothing here measures or draws.


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
    return said or hardware.short_cpu(str(device.get("name") or ""))


def device_of(record: Record) -> str:
    """Return the device of a record as plans name it: threads and CPU, or the board of the catalogue."""
    own, device = record.get("own_params") or {}, record["device"]
    said = str(own.get("device") or record["label"])
    if device.get("type", "cpu") == "cpu":
        threads = said if said[3:].isdecimal() else f"cpu{device.get('threads') or ''}"
        return said if " " in said else f"{threads} {cpu_of(record)}"
    board = hardware.of_memory(said, device.get("memory_bytes") or 0)
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
    shapes = work.mean_shapes(model, train, planner.typical_lengths(asked["mean_len"]))
    width = work.HALF if own.get("precision") in ("bf16", "fp16") else work.FP32
    parts = work.step_parts(model, train, shapes, width)
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
    return sorted(labels - set(hardware.catalogue()))


def mfu_of(record: Record) -> float | None:
    """Return the share of a GPU's peak that a step reached; None on a CPU and on an unknown device."""
    board = hardware.catalogue().get(device_of(record))
    timings, counted = record["timings"], record["metrics"]
    peak = None if board is None else board.peaks.get(record["own_params"].get("precision", "fp32"))
    if peak is None or not timings.get("step_seconds"):
        return None
    return float(np.divide(counted["flops"], timings["step_seconds"] * peak))


# ------------------------------------------------------------------------------------------------
# What an arm of a scaling grid varies, told from its name as the files of `params/grids` give it.

RATES = {"half": " half rate", "rule": "", "twice": " twice rate"}  # how the arms that check the rule end


def sweep_of(arm: str) -> str:
    """Return the sweep of an arm: width at two layers, depth, untied tables, other rates or tuned settings.

    A size outside of the family `w<width>d<depth>` counts as one of the widths.
    """
    if arm.endswith(" untied"):
        return "untied tables"
    if any(end and arm.endswith(end) for end in RATES.values()):
        return "other learning rate"
    if arm.endswith("(tuned)"):
        return "tuned settings"
    in_depth = re.fullmatch(r"w\d+d\d+", arm) and not arm.endswith("d2")
    return "depth" if in_depth else "width"


# ------------------------------------------------------------------------------------------------
# What the records of a scaling grid say, as tables and as sentences; right with few runs and with all.

LATE = 0.01  # nats off the lowest loss in the last fifth of the training: above it a run is undertrained

STATE_BYTES = 16  # of a parameter: weight, gradient and AdamW's two moments in fp32

FLOOR = "held over 16 bytes per parameter"


def by_arm(rows: Sequence[Record]) -> pd.DataFrame:
    """Return one row for each arm: its size, the seeds' mean loss and range, accuracy, tokens, TFLOP, hours.

    `risen` is how far the loss lay above its lowest at the end, in nats. `state MiB` is what weights,
    gradients and moments take; `hours` are wall-clock of all its seeds together.
    """
    frame = pd.DataFrame(
        [
            {"arm": r["own_params"]["model"], "seed": r["seed"], "state": _state_bytes(r)}
            | r["metrics"]
            | r["timings"]
            for r in rows
        ]
    )
    parts = frame.groupby("arm", sort=False)
    table = parts[["item_tables", "non_embedding", "trained_tokens"]].mean().round().astype(int)
    table.insert(0, "seeds", parts["seed"].nunique())
    table["TFLOP"], table["late_drop"] = parts["training_flops"].mean() / 1e12, parts["late_drop"].mean()
    table["risen"] = (frame["last_valid_loss"] - frame["lowest_valid_loss"]).groupby(frame["arm"]).mean()
    table["state MiB"] = (parts["state"].first() / 2**20).round(1)
    took = ["train_seconds", "eval_seconds"]
    table["hours"] = (parts[took].sum().sum(axis=1) / 3600).round(2) if {*took} <= {*frame} else None
    loss = parts["lowest_valid_loss"]
    table["loss"], table["loss_low"], table["loss_high"] = loss.mean(), loss.min(), loss.max()
    for metric in ("ndcg@10", "hr@10"):
        if f"valid_{metric}" in frame:
            one = parts[f"valid_{metric}"]
            table[metric], table[f"{metric}_low"], table[f"{metric}_high"] = one.mean(), one.min(), one.max()
    return table.sort_values(["non_embedding", "item_tables"], kind="stable")


def _state_bytes(row: Record) -> float | None:
    """Return what weights, gradients and moments of a run's model take; None where its shape is not told."""
    shape = row.get("configuration", {}).get("model")
    return STATE_BYTES * sum(parameters(ModelConfig(**shape)).values()) if shape else None


def rate_check(rows: Sequence[Record]) -> pd.DataFrame:
    """Return one row for each arm whose rule was checked: loss and NDCG@10 at half, once and twice the rate.

    All are means over the seeds that all of them have; `range` is that of the rule's own seeds, and
    `lost` what the rule gives away to the best of the three, in nats.
    """
    losses: dict[str, dict[int, float]] = {}
    ranked: dict[str, dict[int, float]] = {}
    for row in rows:
        arm, seed, m = row["own_params"]["model"], row["seed"], row["metrics"]
        losses.setdefault(arm, {})[seed] = m["lowest_valid_loss"]
        ranked.setdefault(arm, {})[seed] = m.get("valid_ndcg@10", math.nan)
    found = []
    for arm, own in losses.items():
        arms = {short: arm + end for short, end in RATES.items()}
        shared = sorted(set.intersection(*(set(losses.get(name, {})) for name in arms.values())))
        if not shared:
            continue
        mean = {short: sum(losses[name][s] for s in shared) / len(shared) for short, name in arms.items()}
        spread = max(own.values()) - min(own.values())
        row = {"arm": arm, "seeds": len(shared)} | mean
        row |= {"lost": mean["rule"] - min(mean.values()), "range": spread}
        for short, name in arms.items():
            row[f"ndcg@10 {short}"] = sum(ranked[name][s] for s in shared) / len(shared)
        found.append(row)
    return pd.DataFrame(found).set_index("arm") if found else pd.DataFrame()


def predictions(outcomes: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row for each grid with a prediction: what was said when, and what came, by which records."""
    found = {}
    for name, one in outcomes.items():
        if one["prediction"] is None:
            continue
        said, m = one["prediction"], one["prediction"]["metrics"]
        found[name] = {
            "size": said["own_params"]["of"],
            "predicted": round(m["predicted"], 4),
            "band": _band(m),
            "hash": said["params_hash"],
            "recorded": said["time"],
            "measured": None if one["measured"] is None else round(one["measured"], 4),
            "runs that carry the hash": one["seeds"] or 0,
            "first of them": one["first"],
            "error": None if one["error"] is None else f"{one['error']:+.4f} ({one['relative_error']:+.2%})",
        }
    return pd.DataFrame(found).T


def _band(m: Mapping[str, Any]) -> str:
    return "none: one seed" if m["low"] is None else f"{m['low']:.3f} to {m['high']:.3f}"


def real_steps(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row for each named size at its true catalogue: step, rate, peak, and peak by its floor.

    The floor is 16 bytes per parameter (weights, gradients and AdamW's two moments in fp32); the peak is
    what the process holds beyond the interpreter and its libraries. Empty without records.
    """
    rows = []
    for one in sorted(records, key=lambda one: one["metrics"]["parameters"]):
        own, took, count = one["own_params"], one["timings"], one["metrics"]["parameters"]
        held = took["peak_memory_bytes"] - took["process_bytes"]
        rows.append(
            {
                "size": own["size"],
                "parameters": count,
                "device": device_of(one),
                "batch": own["batch_size"],
                "steps": one["metrics"].get("timed_steps"),
                "step s": round(took["step_seconds"], 3),
                "tokens/s": round(took["tokens_per_second"]),
                "peak GB": round(took["peak_memory_bytes"] / 1e9, 2),
                "16 bytes per parameter, GB": round(STATE_BYTES * count / 1e9, 2),
                FLOOR: round(held / (STATE_BYTES * count), 2),
            }
        )
    return pd.DataFrame(rows).set_index("size") if rows else pd.DataFrame()


# ------------------------------------------------------------------------------------------------
# What the records of tuning say, as tables and as sentences.


def tuned_against_default(rows: Iterable[Record]) -> pd.DataFrame:
    """Return one row for each study, split and metric: tuned minus default, paired by user, over the seeds.

    Rows of the test split carry what may be claimed after correction, and how often the split had been
    scored with these settings before.
    """
    found = []
    for one in rows:
        own, m = one["own_params"], one["metrics"]
        if one["name"] not in ("validation_difference", "comparison") or own["model"] != "tuned":
            continue
        test = one["name"] == "comparison"
        row = {"study": one["data"]["name"], "split": "test" if test else "validation"}
        row |= {"metric": own["metric"].upper(), "tuned minus default": round(m["difference"], 4)}
        row |= {"low": round(m["difference_low"], 4), "high": round(m["difference_high"], 4)}
        row["seeds"] = m["seeds"]
        if test:
            seeds = (m["seeds"], m["reference_seeds"])
            row |= {"adjusted p": round(m["adjusted_p"], 4), "could have seen": round(m["detectable"], 4)}
            row |= {"claim": claim(m["difference"], m["adjusted_p"], seeds), "scored before": one["earlier"]}
        else:
            row["over seeds"] = f"{m['seed_low']:+.4f} to {m['seed_high']:+.4f}"
        found.append(row)
    return pd.DataFrame(found).set_index("study").sort_values("split") if found else pd.DataFrame()


# ------------------------------------------------------------------------------------------------

Record = Mapping[str, Any]

# How models are called in figures; what is not here goes by its own name.
MODEL_NAMES = {
    "bert4rec": "BERT4Rec",
    "causal": "causal twin",
    "popularity": "popularity",
    "recent_popularity": "recent popularity",
    "recent_popularity_in_time": "popularity by time",
    "markov": "Markov chain",
    "item_knn": "ItemKNN",
    "ease": "EASE",
    "pairwise_counts": "pairwise counts",
    "pairwise_counts_with_validation": "pairwise counts + validation item",
}

# Arms of notebook 05, and what a base is adapted to.
ARM_NAMES = {
    "none": "no adaptation",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "ilora": "iLoRA",
    "gated": "gated LoRA (the seed's)",
    "head": "head only (LoRA)",
    "bias": "output bias only",
    "shuffled_user": "iLoRA, another user's gate",
    "noise": "iLoRA, noise gate",
    "fixed_gate": "iLoRA, random fixed gate",
    "static_gate": "iLoRA, one learned gate",
    "pairwise_counts": "pairwise counts",
}

TASK_NAMES = {"next_period": "next period", "segment": "segment of users"}

CONTROLS = ("shuffled_user", "noise", "fixed_gate", "static_gate")  # of iLoRA

BASELINES = tuple(MODEL_NAMES)[2:]  # deterministic, without gradient descent

_ABLATIONS = ("ablations-", "tuning-")  # how the data name of a grid begins whose arms are compared

# Parameters of notebook 02 that make another configuration of a model.
_RECIPE: tuple[str, ...] = ("size", "epochs", "batch_size", "learning_rate", "dropout", "mask_prob", "window")

_RECIPE += ("last_item_share", "max_len", "norm", "tied", "output_bias", "loss")

# Parameters that do not make it another run; wandb_mode is what tracker was called in older records.
_NOT_WORK = ("gpu", "seed", "seeds", "tracker", "wandb_mode")


def table(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per point of the records' series (one per record where there is none).

    Columns: those of the series, every metric and timing, what the result's own parameters say (such
    as `model`), and kind, label, profile, dataset and seed.
    """
    parts = []
    for record in records:
        about = {key: record.get(key) for key in ("kind", "label", "profile", "seed")}
        about["dataset"] = (record.get("data") or {}).get("name")
        if "device" in (record.get("own_params") or {}):  # cpu2 of which CPU?
            about["cpu"] = cpu_of(record)
        timed = record.get("timings") or {}
        columns = {**timed, **(record.get("own_params") or {}), **record["metrics"], **about}
        series = record.get("series") or {}
        rows = pd.DataFrame({k: v for k, v in series.items() if k not in about} or {"_": [0]})
        parts.append(rows.assign(**{k: v for k, v in columns.items() if k not in rows}))
    return pd.concat(parts, ignore_index=True)


def accuracy(records: Iterable[Record], all_records: Iterable[Record] | None = None) -> pd.DataFrame:
    """Return one row for each grid and model: test metrics with intervals, seeds, device and day.

    *configurations scored* is how many of the model's family the records show on the same test split: a split
    that was looked at often is a validation split. They are counted in `all_records`, notebooks among them,
    where given. Of models that were scored again, with more seeds say, the newest scoring counts.
    """
    rows, records = [], list(records)
    looked = looks(records if all_records is None else all_records)
    for (data, label), scored in groups(r for r in records if r["name"] == "test_metrics").items():
        runs = Counter(r["own_params"]["model"] for r in scored if r["seed"] is not None)
        for one in (r for r in scored if r["seed"] is None):
            model, m = one["own_params"]["model"], one["metrics"]
            interval = {
                name.upper(): f"{m[name]:.4f} ({m[f'{name}_low']:.4f} to {m[f'{name}_high']:.4f})"
                for name in ("hr@10", "ndcg@10")
            }
            seeds = str(runs[model] or "")  # what is deterministic has none
            about = {"data": data, "model": model_name(model), "seeds": seeds, "device": label}
            arm = ((one.get("configuration") or {}).get("arms") or {}).get(model)
            of = family(arm["model"], model) if arm else ""
            where = (str(one["data"].get("fingerprint")), "leave-one-out", of)
            about["configurations scored"] = str(looked.get(where, "")) if arm else ""
            rows.append((data, -m["hr@10"], about | interval | {"day": one["time"][:10]}))
    frame = pd.DataFrame([row for *_, row in sorted(rows, key=lambda row: row[:2])])
    return frame.set_index(["data", "model"]) if rows else frame


def differences(records: Iterable[Record], name: str) -> pd.DataFrame:
    """Return one row for each model and metric of these comparisons: its difference, paired by user.

    `name` is that of the records: `comparison` within a grid, `peer_comparison` with other libraries.
    """
    rows = []
    for (data, _), compared in groups(r for r in records if r["name"] == name).items():
        for one in compared:
            own, m = one["own_params"], one["metrics"]
            about = {
                "data": data,
                "model": model_name(own["model"]),
                "minus": model_name(own["against"]),
                "metric": own["metric"].upper(),
                "difference": interval_text(m),
                "seeds": f"{m['seeds'] or 'no'} and {m['reference_seeds']}",
            }
            rows.append(about | _sureness(m))
    return pd.DataFrame(rows).set_index(["data", "model"]) if rows else pd.DataFrame()


def equal_time(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row for each peer and time of training: its validation NDCG@10 minus ours by user."""
    rows = []
    for one in (r for r in records if r["name"] == "equal_time_comparison"):
        own = one["own_params"]
        about = {"data": one["data"]["name"], "model": own["model"], "minutes": own["minutes"]}
        rows.append(about | {"minus ours": interval_text(one["metrics"])} | _sureness(one["metrics"]))
    keys = ["data", "model", "minutes"]
    return pd.DataFrame(rows).set_index(keys).sort_index() if rows else pd.DataFrame()


def interval_text(m: Mapping[str, Any]) -> str:
    """Return a difference with its interval, signed."""
    return f"{m['difference']:+.4f} ({m['difference_low']:+.4f} to {m['difference_high']:+.4f})"


def _sureness(m: Mapping[str, Any]) -> dict[str, float]:
    """Return how sure a comparison is: its corrected p-value, and the difference that it could have seen."""
    return {"adjusted p": round(m["adjusted_p"], 4), "could have seen": round(m["detectable"], 4)}


def model_name(model: str) -> str:
    """Return a model's name for people."""
    return MODEL_NAMES.get(model, model.replace("_", " "))


def chooses(dataset: str) -> bool:
    """Return whether records under this data name are of a grid that recipes are chosen from."""
    return dataset.startswith((*_ABLATIONS, "trials-"))


def family(model: Mapping[str, Any], name: str) -> str:
    """Return the family of a model by its configuration, or by its name where that says nothing."""
    causal = model["causal"] if "causal" in model else name.startswith("causal")
    return "causal" if causal else "bert4rec"


def looks(records: Iterable[Record]) -> dict[tuple[str, str, str], int]:
    """Count the configurations whose accuracy on a test split is recorded, by data, split and model family.

    The key is (fingerprint, split, family). A recipe that is changed counts again; its seeds, and scoring it
    again, do not. Baselines are no family: validation chooses them anew each time.
    """
    seen: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for one in records:
        own, data = one["own_params"], one.get("data") or {}
        split = "leave-one-out" if one["name"] == "test_metrics" else own.get("protocol", "").split(",")[0]
        name = str(own.get("model"))
        if (
            one["name"] not in ("test_metrics", "protocol")
            or name in BASELINES
            or one["notebook"] != "02_baseline"
        ):
            continue
        if one["name"] == "protocol" and (split in ("leave-one-out", "seed study's") or one["seed"] is None):
            continue  # another way to rank the same test
        said = one.get("configuration") or {}
        arms = said.get("arms") or {}
        arm = arms.get(name)
        if said and arm is None:
            continue  # another library's, or of an arm that stands under another name
        if arm is None:  # of a notebook: what it ran with
            params = one.get("params") or {}
            what: Any = {key: params.get(key) for key in _RECIPE}
        else:
            train = {key: value for key, value in arm["train"].items() if key != "seed"}
            what = [arm["model"], train]
        key = (str(data.get("fingerprint")), split, family((arm or {}).get("model") or {}, name))
        seen[key].add(json.dumps([name if arm is None else "", what], sort_keys=True))
    return {key: len(some) for key, some in seen.items()}


def is_ablation(dataset: str) -> bool:
    """Return whether records under this data name are of an ablation grid."""
    return dataset.startswith(_ABLATIONS)


def profile(name: str) -> str:
    """Say how much work a profile is; a grid has none of the notebooks' profiles."""
    return "long runs, committed" if name == "grid" else f"profile {name}"


def caption(records: Sequence[Record]) -> str:
    """Say in one line what the numbers are, and that a smoke run is no result."""
    first = records[0]
    parts = [str((first.get("data") or {}).get("name") or "")]
    on = {
        kind: sorted({r["label"] for r in records if r["kind"] == kind}) for kind in ("measured", "predicted")
    }
    for kind, labels in on.items():
        parts += [f"{kind} on {label}" for label in labels] if len(labels) < 4 else []
        parts += [f"{kind} on {len(labels)} devices"] if len(labels) >= 4 else []
    absent = sorted({str(record["claimed"]) for record in records if _is_claim_unmet(record)})
    parts += [f"<b>{label} was asked for and is not here</b>" for label in absent]
    seeds = {record["seed"] for record in records if record.get("seed") is not None}
    parts += [f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"] if seeds else []
    smoke = any(record["profile"] == "smoke" for record in records)
    parts.append("<b>smoke run, not a result</b>" if smoke else profile(first["profile"]))
    return " · ".join(part for part in parts if part)


def _is_claim_unmet(record: Record) -> bool:
    claimed = record.get("claimed") or "auto"
    if record["kind"] != "measured" or claimed in ("auto", record["label"]):
        return False
    return "-" not in claimed or claimed != device_of(record)


def well_formed(records: Iterable[Any], problems: list[str]) -> list[Record]:
    """Return the records that have the form that figures read; add the faults of the others to `problems`."""
    kept: list[Record] = []
    for record in records:
        if (reason := _fault(record)) is None:
            kept.append(record)
        else:
            about = [str(record.get(key))[:40] for key in ("notebook", "name")] if reason[:3] != "not" else []
            problems.append(f"record {' / '.join(about)}: {reason}".replace(" :", ":"))
    return kept


def _fault(record: Any) -> str | None:
    """Return what is wrong with the form of a record, None for nothing."""
    if not isinstance(record, Mapping):
        return "not an object"
    for key in ("notebook", "name", "kind", "label", "profile", "time"):
        if not isinstance(record.get(key), str):
            return f"{key} is {str(record.get(key))[:40]!r}, not a text"
    for key, known in (("kind", ("measured", "predicted")), ("profile", PROFILES)):
        if record[key] not in known:
            return f"{key} {record[key][:40]!r} is none of {', '.join(known)}"
    try:
        datetime.fromisoformat(record["time"])
    except ValueError:
        return f"time {record['time'][:40]!r} is not of ISO 8601"
    for key in ("metrics", "device", "timings", "own_params", "params", "series", "data"):
        value = record.get(key, "" if key in ("metrics", "device") else None)
        if (value is not None or key in ("metrics", "device")) and not isinstance(value, Mapping):
            return f"{key} is missing or no object"
    for key in ("metrics", "timings"):
        for name, value in (record.get(key) or {}).items():
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                return f"{key}: {name[:40]} is {str(value)[:40]!r}, not a finite number"
    series = (record.get("series") or {}).values()
    if any(not isinstance(values, list) for values in series) or len({*map(len, series)}) > 1:
        return "series are not lists of one length"
    if record.get("seed") is not None and not isinstance(record["seed"], int):
        return f"seed is {str(record['seed'])[:40]!r}, not a whole number"
    return None


@cache
def _study_names() -> frozenset[str]:
    """Return the datasets of the study: those that can be fetched, and those that its parameters name."""
    named = {"synthetic", *fetch.catalogue()}
    for file in system.params().glob("*.yaml"):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        for section in [values, *values.values()] if isinstance(values, dict) else []:
            if isinstance(section, dict) and isinstance(section.get("dataset"), str):
                named.add(section["dataset"])
    return frozenset(named)


def of_study(record: Record) -> bool:
    """Return whether a record is of the study's data and not of a file of the user's own."""
    dataset = (record.get("params") or {}).get("dataset")
    return record["profile"] == "grid" or dataset is None or dataset in _study_names()


def distinct(records: Iterable[Record]) -> list[Record]:
    """Return records in which datasets that share a name are told apart by the start of their fingerprints.

    Generated data stay `synthetic`: figures of devices set shapes of them side by side.
    """
    records = list(records)
    prints: dict[str, set[str]] = defaultdict(set)
    for record in records:
        data = record.get("data") or {}
        prints[str(data.get("name"))].add(str(data.get("fingerprint")))
    shared = {name for name, of_name in prints.items() if len(of_name) > 1 and name != "synthetic"}
    told = []
    for record in records:
        data = record.get("data") or {}
        if (name := str(data.get("name"))) in shared:
            name = f"{name} ({str(data.get('fingerprint'))[:8]})"
            record = dict(record) | {"data": dict(data) | {"name": name}}
        told.append(record)
    return told


def groups(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Split into what one figure each is made of: (dataset, label) -> records of one run's work.

    Where several are there, the profile with the most work counts, and in it the newest parameters;
    all seeds of those stay together. Of a result that was recorded again the newest counts. What is measured
    is chosen apart from what is predicted: no plan, of however much work, hides a measurement.
    """
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in distinct(records):
        found[str((record.get("data") or {}).get("name")), record["label"]].append(record)
    return {key: _shown(found[key]) for key in sorted(found)}


def _shown(records: list[Record]) -> list[Record]:
    """Return the records of the best work, those measured first where plans are of another."""
    whole = _one_work(records)
    measured = [r for r in records if r["kind"] == "measured"]
    if not measured or any(r["kind"] == "measured" for r in whole):
        return whole
    return _one_work(measured) + whole


def _one_work(records: list[Record]) -> list[Record]:
    newest = max(records, key=lambda r: (PROFILES.index(r["profile"]), r["time"], _work(r)))
    same = [r for r in records if _work(r) == _work(newest) and r["profile"] == newest["profile"]]
    by_time = sorted(same, key=lambda r: (r["time"], json.dumps(r, sort_keys=True, default=str)))
    last = {_own(record): record for record in by_time}  # of equal ones the newest
    return [last[key] for key in sorted(last)]


def _own(record: Record) -> tuple[str, float]:
    """Return what tells the results of one run apart; the mean over seeds, without one, stands first."""
    seed = record.get("seed")
    return json.dumps(record.get("own_params"), sort_keys=True), -1 if seed is None else seed


def _work(record: Record) -> str:
    params = record.get("params") or {}
    return json.dumps({k: v for k, v in params.items() if k not in _NOT_WORK}, sort_keys=True)


def best_work(records: Iterable[Record]) -> list[Record]:
    """Return, of each result, dataset and label, the records that its figure shows."""
    named: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        named[record["name"]].append(record)
    return [r for some in named.values() for group in groups(some).values() for r in group]


def rank_bins(ranks: np.ndarray) -> dict[str, list[int]]:
    """Count ranks (from 1) in bins that end at 1, 2, 5, 10, 20, 50, ...: the series of a histogram."""
    last = int(np.max(ranks))
    ends = [d * 10**p for p in range(len(str(last)) + 1) for d in (1, 2, 5)]
    ends = ends[: int(np.searchsorted(ends, last)) + 1]
    lows = [1, *(end + 1 for end in ends[:-1])]
    users, _ = np.histogram(ranks, [*lows, ends[-1] + 1])
    return {"rank_low": lows, "rank_high": ends, "users": users.tolist()}
