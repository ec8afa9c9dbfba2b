"""Records as tables, and which of many records belong into one figure."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from reclib import gathered
from reclib.gathered import PROFILES

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
            about["cpu"] = gathered.cpu_of(record)
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
                "difference": _gap(m),
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
        rows.append(about | {"minus ours": _gap(one["metrics"])} | _sureness(one["metrics"]))
    keys = ["data", "model", "minutes"]
    return pd.DataFrame(rows).set_index(keys).sort_index() if rows else pd.DataFrame()


def _gap(m: Mapping[str, Any]) -> str:
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
    return "-" not in claimed or claimed != gathered.device_of(record)


def groups(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Split into what one figure each is made of: (dataset, label) -> records of one run's work.

    Where several are there, the profile with the most work counts, and in it the newest parameters;
    all seeds of those stay together. Of a result that was recorded again the newest counts. What is measured
    is chosen apart from what is predicted: no plan, of however much work, hides a measurement.
    """
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
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
