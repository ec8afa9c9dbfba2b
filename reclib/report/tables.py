"""Records as tables, and the selection of records for figures."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from reclib import hardware
from reclib.cost import planner
from reclib.data import fetch
from reclib.records import PROFILES

Record = Mapping[str, Any]

# Names of models in figures; others keep their own names.
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
BASELINES = tuple(MODEL_NAMES)[2:]  # deterministic, without gradient descent

STUDY_DATA = ("synthetic", "amazon-beauty-2014-5core")  # beside those that can be fetched by name

# Arms and tasks of notebook 05.
ARM_NAMES = {
    "none": "no adaptation",
    "full": "full fine-tuning",
    "lora": "LoRA",
    "ilora": "iLoRA",
    "gated": "gated LoRA (the seed study's)",
    "head": "head only (LoRA)",
    "bias": "output bias only",
    "shuffled_user": "iLoRA, another user's gate",
    "noise": "iLoRA, noise gate",
    "fixed_gate": "iLoRA, random fixed gate",
    "static_gate": "iLoRA, one learned gate",
    "pairwise_counts": "pairwise counts",
}
TASK_NAMES = {"next_period": "next period", "segment": "segment of users"}
SHAPES = "the seed study's shapes"  # 85m, 130m, 430m
OWN_LOSS, TABLES = "the seed study's loss", "item tables of another width"
VISIBLE = "visible items too"  # are targets
COUNTED = " with counts"  # end of arms that have pairwise counts in their logits
MUON = " with Muon"  # end of arms whose hidden matrices Muon trains
RATES = {"half": " half rate", "rule": "", "twice": " twice rate"}  # ends of arms that check the rule
FLOOR = "held over 16 bytes per parameter"
_STATE_BYTES = 16  # of a parameter: weight, gradient and AdamW's two moments in fp32
_STEPS = ("hardware_step", "real_size_step")  # names of records of a step of one size on one device
TIES = "ties-"  # prefix of grids whose arms differ in the order of ties
USERS = "users-"  # prefix of grids whose arms differ in the share of the users that train
APART = (TIES, USERS)  # their arms differ in what they train on: see `grids.score_apart`
_ABLATIONS = ("ablations-", "tuning-")  # prefixes of grids whose arms are compared
# Parameters of notebook 02 that define the configuration of a model.
_RECIPE = ["size", "epochs", "batch_size", "learning_rate", "dropout", "mask_prob", "window"]
_RECIPE += ["last_item_share", "max_len", "norm", "tied", "output_bias", "loss"]
# Parameters that do not change the work of a run; wandb_mode is the name of tracker in older records.
_NOT_WORK = ("gpu", "seed", "seeds", "tracker", "wandb_mode")


# -- names ---------------------------------------------------------------------------------------------------


def model_name(model: str) -> str:
    """Return the name of a model in figures and texts."""
    return MODEL_NAMES.get(model) or model.replace("_with_validation", " + validation item").replace("_", " ")


def recipe_of(arm: str) -> str:
    """Return the recipe of an arm, which all models on one line of sizes have in common.

    Arms are named as in `params/grids`, where a test compares the names with the configurations.
    """
    counts = next((end for end in (COUNTED, MUON) if arm.endswith(end)), "")
    if ", table " in arm:
        return TABLES
    if arm.endswith(" loss"):
        return OWN_LOSS
    if arm.endswith(VISIBLE):
        return VISIBLE
    if re.match(r"\w+ shape\b", arm):
        return SHAPES + counts
    return model_name("causal" if "causal" in arm.split() else "bert4rec") + counts


def sweep_of(arm: str) -> str:
    """Return the sweep of an arm: width at two layers, depth, untied tables, rates, tuned settings.

    Sweeps of recipes other than plain BERT4Rec have the recipe in their name, as `width, causal twin`; other
    architectures are a sweep of their own. A size outside of the family `w<width>d<depth>` counts as a width.
    """
    recipe = recipe_of(arm)
    if recipe == SHAPES and arm.endswith(" scaled"):
        return f"{SHAPES}, items scaled"
    if recipe in (TABLES, OWN_LOSS, VISIBLE) or recipe.startswith(SHAPES):
        return recipe
    if arm.endswith(" untied"):
        return "untied tables"
    if any(end and arm.endswith(end) for end in RATES.values()):
        return "other learning rate"
    if arm.endswith("(tuned)"):
        return "tuned settings"
    depth = re.fullmatch(r"w\d+d(\d+)", arm.removeprefix("causal ").removesuffix(COUNTED).removesuffix(MUON))
    kind = "depth" if depth and depth[1] != "2" else "width"
    return kind if recipe == model_name("bert4rec") else f"{kind}, {recipe}"


def profile(name: str) -> str:
    """Return a description of a profile; grids have none of the notebooks' profiles."""
    return "long runs, committed" if name == "grid" else f"profile {name}"


def chooses(dataset: str) -> bool:
    """Return whether a data name is that of a grid from which recipes are chosen."""
    return dataset.startswith((*_ABLATIONS, "trials-")) or dataset.endswith("-rates")


def shown_elsewhere(dataset: str) -> bool:
    """Return whether training curves of a data name have no figures of their own."""
    return chooses(dataset) or dataset.startswith(USERS)


def interval_text(m: Mapping[str, Any]) -> str:
    """Return a difference with its interval, signed."""
    return f"{m['difference']:+.4f} ({m['difference_low']:+.4f} to {m['difference_high']:+.4f})"


def cpu_of(record: Record) -> str | None:
    """Return the CPU of a record, with its generation if it is recorded; None for a GPU."""
    device = record["device"]
    if device.get("type", "cpu") != "cpu":
        return None
    cpu = record["own_params"].get("cpu") or device.get("cpu_model")
    return cpu or hardware.short_cpu(str(device.get("name") or ""))


def device_of(record: Record) -> str:
    """Return the device of a record as named by plans: threads and CPU, or a board of the catalogue."""
    device = record["device"]
    name = str(record["own_params"].get("device") or record["label"])
    if device.get("type", "cpu") == "cpu":
        threads = name if name[3:].isdecimal() else f"cpu{device.get('threads') or ''}"
        return name if " " in name else f"{threads} {cpu_of(record)}"
    board = hardware.of_memory(name, device.get("memory_bytes") or 0)
    return name if board is None else board.label


def _data(record: Record, key: str = "name") -> str:
    return str((record.get("data") or {}).get(key))


# -- selection of records ------------------------------------------------------------------------------------


def by(records: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group records by a key, in their order."""
    grouped: dict[Any, list[Any]] = {}
    for record in records:
        grouped.setdefault(key(record), []).append(record)
    return grouped


def newest(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, Record]:
    """Return the newest record of each key, in the order of time."""
    return {key(record): record for record in sorted(records, key=lambda r: r["time"])}


def table(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row per point of the records' series, or per record without series.

    Columns are those of the series, metrics, timings, own parameters (such as `model`), and kind, label,
    profile, dataset and seed.
    """
    parts = []
    for record in records:
        origin = {key: record.get(key) for key in ("kind", "label", "profile", "seed")}
        origin["dataset"] = (record.get("data") or {}).get("name")
        columns = {**record["timings"], **record["own_params"], **record["metrics"], **origin}
        series = {k: v for k, v in record["series"].items() if k not in origin}
        rows = pd.DataFrame(series or {"_": [0]})
        parts.append(rows.assign(**{k: v for k, v in columns.items() if k not in rows}))
    return pd.concat(parts, ignore_index=True)


def caption(records: Sequence[Record], with_data: bool = True) -> str:
    """Return the origin of records in one line; a smoke run is marked as no result."""
    first = records[0]
    parts = [((first.get("data") or {}).get("name") or "") if with_data else ""]
    for kind in ("measured", "predicted"):
        labels = sorted({r["label"] for r in records if r["kind"] == kind})
        few = [f"{kind} on {label}" for label in labels]
        parts += few if len(labels) < 4 else [f"{kind} on {len(labels)} devices"]
    absent = sorted({str(record["claimed"]) for record in records if _is_claim_unmet(record)})
    parts += [f"<b>{label} was asked for and is not here</b>" for label in absent]
    seeds = len({record["seed"] for record in records if record.get("seed") is not None})
    parts += [f"{seeds} seed{'s' if seeds > 1 else ''}"] if seeds else []
    smoke = any(record["profile"] == "smoke" for record in records)
    parts.append("<b>smoke run, not a result</b>" if smoke else profile(first["profile"]))
    return " · ".join(part for part in parts if part)


def _is_claim_unmet(record: Record) -> bool:
    claimed = record.get("claimed") or "auto"
    if record["kind"] != "measured" or claimed in ("auto", record["label"]):
        return False
    return "-" not in claimed or claimed != device_of(record)


def of_study(record: Record) -> bool:
    """Return whether a record is of the study's data and not of a user's file."""
    dataset = (record.get("params") or {}).get("dataset")
    return record["profile"] == "grid" or dataset in (None, *STUDY_DATA, *fetch.catalogue())


def distinct(records: Iterable[Record]) -> list[Record]:
    """Return records in which names of different datasets are unique, by the start of their fingerprints.

    Generated data stay `synthetic`: figures of devices show several of them side by side.
    """
    records, prints = list(records), defaultdict(set)
    for record in records:
        prints[_data(record)].add(_data(record, "fingerprint"))
    shared = {name for name, of_name in prints.items() if len(of_name) > 1 and name != "synthetic"}
    return [
        _renamed(r, f"{_data(r)} ({_data(r, 'fingerprint')[:8]})") if _data(r) in shared else r
        for r in records
    ]


def _renamed(record: Record, name: str) -> Record:
    """Return a record with another name of its data."""
    return dict(record) | {"data": dict(record.get("data") or {}) | {"name": name}}


def groups(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Group records by dataset and label, each group with the records of one figure.

    A group has the profile with the most work, and of it the newest parameters, with all seeds. Of repeated
    results the newest counts. Measured and predicted records are selected separately, so that no plan hides
    a measurement.
    """
    parts, labels = defaultdict(list), dict[str, str]()
    for record in sorted(distinct(records), key=lambda r: r["label"]):
        label = record["label"]
        if record["profile"] == "grid":  # runs of all devices are in one figure
            label = labels.setdefault(_data(record), label)
        parts[_data(record), label].append(record)
    return {key: _preferred(parts[key]) for key in sorted(parts)}


def _preferred(records: list[Record]) -> list[Record]:
    """Return the records of the best work; with plans of other work, also the measured ones."""
    chosen = _one_work(records)
    measured = [r for r in records if r["kind"] == "measured"]
    if not measured or any(r["kind"] == "measured" for r in chosen):
        return chosen
    return _one_work(measured) + chosen


def _one_work(records: list[Record]) -> list[Record]:
    """Return the newest records of the newest parameters of the largest profile, means over seeds first."""
    newest = max(records, key=lambda r: (PROFILES.index(r["profile"]), r["time"], _work(r)))
    matching = [r for r in records if _work(r) == _work(newest) and r["profile"] == newest["profile"]]
    by_seed = {}
    for record in sorted(matching, key=lambda r: (r["time"], json.dumps(r, sort_keys=True, default=str))):
        seed = -1 if record.get("seed") is None else record["seed"]
        by_seed[json.dumps(record.get("own_params"), sort_keys=True), seed] = record
    return [by_seed[key] for key in sorted(by_seed)]


def _work(record: Record) -> str:
    params = record.get("params") or {}
    return json.dumps({k: v for k, v in params.items() if k not in _NOT_WORK}, sort_keys=True)


def best_work(records: Iterable[Record]) -> list[Record]:
    """Return the records shown by figures, for each result, dataset and label."""
    by_name = by(records, lambda r: r["name"])
    return [r for rows in by_name.values() for group in groups(rows).values() for r in group]


def family(model: Mapping[str, Any], name: str) -> str:
    """Return the family of a model, causal or bert4rec, by its configuration or else its name."""
    causal = model["causal"] if "causal" in model else name.startswith("causal")
    return "causal" if causal else "bert4rec"


def scored_configurations(records: Iterable[Record]) -> dict[tuple[str, str, str], int]:
    """Count the configurations with recorded accuracy on a test split, by (fingerprint, split, family).

    Seeds of a configuration and repeated scoring count once. Baselines are left out, since validation chooses
    their hyperparameters anew each time.
    """
    recipes_by_key = defaultdict(set)
    for record in records:
        params, model, split = record["own_params"], str(record["own_params"].get("model")), "leave-one-out"
        if record["name"] == "protocol":
            split = params.get("protocol", "").split(",")[0]
            if split in ("leave-one-out", "seed study's") or record["seed"] is None:
                continue  # another protocol on the same test split
        elif record["name"] not in ("test_metrics", "tie_rule", "user_share"):
            continue
        if model in BASELINES:
            continue
        configuration = record.get("configuration") or {}
        arm = (configuration.get("arms") or {}).get(model)
        if arm is None and configuration:
            continue  # of another library, or an arm with another name
        if arm is None:  # of a notebook
            recipe = [model, {key: (record.get("params") or {}).get(key) for key in _RECIPE}]
        else:
            recipe = [arm["model"], {key: value for key, value in arm["train"].items() if key != "seed"}]
        key = (_data(record, "fingerprint"), split, family((arm or {}).get("model") or {}, model))
        recipes_by_key[key].add(json.dumps(recipe, sort_keys=True))
    return {key: len(recipes) for key, recipes in recipes_by_key.items()}


# -- accuracy against size -----------------------------------------------------------------------------------


def by_size(records: Iterable[Record], result: str = "test_metrics") -> list[Record]:
    """Return the runs of grids of sizes, and results of models and baselines with the sizes of their runs.

    Their own parameters have `grid` and, for results, `seeds`, the number of seeds that were ranked. Only the
    newest records of committed grids count, without grids that choose a recipe or change what trains. Grids
    of one dataset get one name; series are left out, and datasets with fewer than two sizes.
    """
    grids = [r for r in records if r["profile"] == "grid" and not chooses(_data(r))]
    grids = [r for r in grids if not _data(r).startswith(APART)]
    runs = [r for r in grids if r["name"] == "learning_curve" and r["metrics"].get("non_embedding")]
    results = [r for r in grids if r["name"] == result]
    sizes = {(_data(r), r["own_params"].get("model")): r["metrics"]["non_embedding"] for r in runs}
    sized, rows = [], newest([*runs, *results], _run)
    seeds = Counter((grid, model) for grid, name, model, seed in rows if name == result and seed is not None)
    for (grid, name, model, seed), r in rows.items():
        size = sizes.get((grid, model))
        is_result = name == result and seed is None and (size or model in BASELINES)
        if is_result or (name == "learning_curve" and r["notebook"] == "03_scaling"):
            added = {"metrics": dict(r["metrics"]) | {"non_embedding": size}, "series": {}}
            about = {"grid": grid} | ({"seeds": seeds[grid, model]} if is_result else {})
            sized.append(_with_params(r, **about) | added)
    chosen: list[Record] = []
    for of_data in by(sized, lambda r: _data(r, "fingerprint")).values():
        name = min((_data(r).removeprefix("scaling-").removeprefix("prior-") for r in of_data), key=len)
        if len({r["metrics"]["non_embedding"] for r in of_data} - {None}) > 1:
            chosen += [_renamed(r, name) for r in of_data]
    chosen.sort(key=lambda r: ((r["data"].get("interactions") or 0), _data(r), r["name"], r["time"]))
    return chosen


def _run(record: Record) -> tuple[str, str, Any, Any]:
    """Return the dataset, the name, the model and the seed of a record."""
    return _data(record), record["name"], record["own_params"].get("model"), record.get("seed")


def popularity_by_size(records: Iterable[Record]) -> list[Record]:
    """Return `by_size` of `beyond_accuracy`, on datasets where a grid has several sizes."""
    rows = [r for r in by_size(records, "beyond_accuracy") if r["name"] == "beyond_accuracy"]
    rows = [_with_params(r, grid=r["params"]["grid"]) for r in rows]
    sizes: dict[tuple[str, str], set[Any]] = defaultdict(set)
    for r in rows:
        sizes[_data(r), r["params"]["grid"]].add(r["metrics"]["non_embedding"])
    several = {data for (data, _), values in sizes.items() if len(values - {None}) > 1}
    return [r for r in rows if _data(r) in several]


def tie_rules(records: Iterable[Record]) -> list[Record]:
    """Return the means over seeds under each rule for ties, with grids named by their data."""
    rows = [r for r in records if r["name"] == "tie_rule" and r["seed"] is None]
    named = [_renamed(r, r["params"]["grid"].removeprefix(TIES)) for r in rows]
    return sorted(named, key=lambda r: (_data(r), json.dumps(r["own_params"], sort_keys=True)))


def user_shares(records: Iterable[Record]) -> pd.DataFrame:
    """Return test metrics by model and share of the users that train, with those of the same data on all.

    *later* is NDCG@10 of users whose target is later than the item before it. Empty without grids of shares.
    """
    names = ("user_share", "test_metrics", "groups")
    results = [r for r in records if r["name"] in names and r["profile"] == "grid" and r["seed"] is None]
    shares = [r for r in results if r["name"] == "user_share"]
    models = {(_data(r, "fingerprint"), r["own_params"]["model"]) for r in shares}
    results = [r for r in results if (_data(r, "fingerprint"), r["own_params"]["model"]) in models]
    results = [r for r in results if not _data(r).startswith(APART)]
    whole = [r for r in results if r["name"] == "test_metrics"]
    by_time = [r for r in results if r["own_params"].get("by") == "time"]
    later = {
        model: dict(zip(r["series"]["group"], r["series"]["ndcg@10"], strict=True)).get("later")
        for model, r in newest(by_time, lambda r: r["own_params"]["model"]).items()
    }
    rows = []
    for (model, share), r in newest([*shares, *whole], _share).items():
        m = r["metrics"]
        row = {"model": model_name(model), "share of users": share, "HR@10": m["hr@10"]}
        row["NDCG@10"] = f"{m['ndcg@10']:.4f} ({m['ndcg@10_low']:.4f} to {m['ndcg@10_high']:.4f})"
        rows.append(row | {"later": m.get("later_ndcg@10", later.get(model))})
    return _indexed(sorted(rows, key=lambda row: list(row.values())[:2]), ["model", "share of users"])


def _share(record: Record) -> tuple[str, float]:
    return record["own_params"]["model"], record["own_params"].get("users", 1.0)


def steps_and_plans(measured: Iterable[Record], predicted: Iterable[Record]) -> list[dict[str, Any]]:
    """Return measured steps with the plan of the same size, device, batch and rule, if there is one.

    A measured step that names no rule is one in fp32, as the closed plan.
    """

    def key(record: Record) -> tuple[Any, ...]:
        own = record["own_params"]
        return own.get("size"), own.get("device"), own.get("batch_size"), own.get("rule", "closed")

    plans = {key(r): (r["own_params"]["precision"], r["timings"]["step_seconds"]) for r in predicted}
    timed = [(key(r), r["timings"].get("step_seconds")) for r in measured]
    return [
        dict(zip(("size", "device", "batch", "precision"), (*place[:3], plans[place][0]), strict=True))
        | {"measured (s)": seconds, "predicted (s)": plans[place][1], "error": plans[place][1] / seconds - 1}
        for place, seconds in timed
        if seconds and place in plans
    ]


# -- steps on devices ----------------------------------------------------------------------------------------


def placed(record: Record) -> dict[str, Any]:
    """Return a record with its `device_of` among its own parameters."""
    return _with_params(record, device=device_of(record))


def _with_params(record: Record, **params: Any) -> dict[str, Any]:
    return dict(record) | {"own_params": dict(record["own_params"]) | params}


def steps(fresh: Iterable[Record], recorded: Iterable[Record]) -> list[dict[str, Any]]:
    """Return one measured step for each size, device and rule: `fresh`, or else from `recorded`.

    Recorded smoke runs are left out; of the others, the newest of the longest profile counts.
    """
    measured = [r for r in recorded if r["name"] in _STEPS and r["kind"] == "measured"]
    ranked = [r for r in measured if r["profile"] != "smoke"]
    ranked.sort(key=lambda r: (PROFILES.index(r["profile"]), str(r["time"])), reverse=True)
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in [*fresh, *ranked]:
        step = placed(record)
        params = step["own_params"]
        best.setdefault((params["size"], params["device"], params.get("rule", "closed")), step)
    return list(best.values())


def points(recorded: Iterable[Record], prices: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the training time per point (0.01) of NDCG@10 on the test split, for each dataset and model.

    Both are means over the seeds that have both. `prices` are per hour by device.
    """
    trained, scored = {}, {}
    for record in (r for r in recorded if r["notebook"] == "02_baseline" and r["profile"] != "smoke"):
        key = (_data(record), record["own_params"].get("model"), record["profile"], record.get("seed"))
        if record["name"] == "learning_curve" and (record.get("timings") or {}).get("train_seconds"):
            trained[key] = record
        elif record["name"] == "test_metrics":
            scored[key] = record
    both = (key for key in trained if key in scored and key[-1] is not None)
    runs = by(both, lambda key: (*key[:3], device_of(trained[key])))
    rows = []
    for (data, model, name, device), keys in sorted(runs.items()):
        seconds = fmean(trained[key]["timings"]["train_seconds"] for key in keys)
        accuracy = fmean(scored[key]["metrics"]["ndcg@10"] for key in keys)
        price = planner.price_of(prices, device)
        cost = None if price is None else seconds / 3600 * price / (100 * accuracy)
        row = {"data": data, "model": model, "profile": name, "device": device, "seeds": len(keys)}
        row |= {"training (s)": seconds, "NDCG@10": accuracy, "s per 0.01": seconds / (100 * accuracy)}
        rows.append(row | {"cost per 0.01": cost})
    return rows


def mfu_of(record: Record) -> float | None:
    """Return the share of a GPU's peak that a step reached; None for a CPU and an unknown device."""
    board, seconds = hardware.catalogue().get(device_of(record)), record["timings"].get("step_seconds")
    peak = None if board is None else board.peaks.get(record["own_params"].get("precision", "fp32"))
    metrics = record["metrics"]
    flops = metrics.get("flops") or metrics.get("encoder_flops", 0) + metrics.get("head_flops", 0)
    return flops / (seconds * peak) if peak and seconds else None


def real_steps(records: Iterable[Record]) -> pd.DataFrame:
    """Return one row for each named size at its true catalogue: step, rate, peak, and peak over floor.

    The floor is 16 bytes per parameter (weights, gradients and AdamW's two moments in fp32); the peak is
    without the memory of the interpreter and its libraries. Empty without records.
    """
    rows = []
    for record in sorted(records, key=lambda record: record["metrics"]["parameters"]):
        params, timings, metrics = record["own_params"], record["timings"], record["metrics"]
        floor = _STATE_BYTES * metrics["parameters"]
        used = timings["peak_memory_bytes"] - timings["process_bytes"]
        row = {"size": params["size"], "parameters": metrics["parameters"], "device": device_of(record)}
        row |= {"batch": params["batch_size"], "steps": metrics.get("timed_steps")}
        row |= {"step s": round(timings["step_seconds"], 3), "tokens/s": round(timings["tokens_per_second"])}
        row |= {"peak GB": round(timings["peak_memory_bytes"] / 1e9, 2)}
        row |= {"16 bytes per parameter, GB": round(floor / 1e9, 2), FLOOR: round(used / floor, 2)}
        rows.append(row)
    return _indexed(rows, "size")


# -- scaling and tuning --------------------------------------------------------------------------------------


def by_arm(rows: Sequence[Record]) -> pd.DataFrame:
    """Return one row for each arm: its size, the seeds' mean loss and range, accuracy, tokens, TFLOP, hours.

    `risen` is the last loss minus the lowest, in nats; `hours` are the wall-clock time of all seeds together.
    """
    named = ({"arm": r["own_params"]["model"], "seed": r["seed"]} | r["metrics"] | r["timings"] for r in rows)
    frame = pd.DataFrame(named)
    frame["risen"] = frame["last_valid_loss"] - frame["lowest_valid_loss"]
    parts = frame.groupby("arm", sort=False)
    table = parts[["item_tables", "non_embedding", "trained_tokens"]].mean().round().astype(int)
    table.insert(0, "seeds", parts["seed"].nunique())
    table["TFLOP"] = parts["training_flops"].mean() / 1e12
    table["late_drop"], table["risen"] = parts["late_drop"].mean(), parts["risen"].mean()
    table["hours"] = (parts[["train_seconds", "eval_seconds"]].sum().sum(axis=1) / 3600).round(2)
    measures = {"loss": "lowest_valid_loss", "ndcg@10": "valid_ndcg@10", "hr@10": "valid_hr@10"}
    for name, column in measures.items():
        ends = parts[column].agg(["mean", "min", "max"])
        table[[name, f"{name}_low", f"{name}_high"]] = ends.to_numpy()
    return table.sort_values(["non_embedding", "item_tables"], kind="stable")


def predictions(outcomes: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return one row for each grid with a prediction: predicted and measured loss, and their records."""
    table = {}
    for name, outcome in outcomes.items():
        if (prediction := outcome["prediction"]) is None:
            continue
        m, measured = prediction["metrics"], outcome["measured"]
        row = {"size": prediction["own_params"]["of"], "predicted": round(m["predicted"], 4)}
        row["band"] = "none: one seed" if m["low"] is None else f"{m['low']:.3f} to {m['high']:.3f}"
        row |= {"hash": prediction["params_hash"], "recorded": prediction["time"], "measured": None}
        row |= {"runs that carry the hash": outcome["seeds"] or 0, "first of them": outcome["first"]}
        row["error"] = None
        if measured is not None:
            row["measured"] = round(measured, 4)
            row["error"] = f"{outcome['error']:+.4f} ({outcome['relative_error']:+.2%})"
        table[name] = row
    return pd.DataFrame(table).T


# -- accuracy ------------------------------------------------------------------------------------------------


def accuracy(records: Iterable[Record], all_records: Iterable[Record] | None = None) -> pd.DataFrame:
    """Return one row for each grid and model: test metrics with intervals, seeds, device and day.

    *configurations scored* counts those of the model's family with records on the same test split, since a
    split that is used often becomes a validation split. They are counted in `all_records` if given. Of
    repeated scorings the newest counts.
    """
    rows, records = [], list(records)
    configurations = scored_configurations(records if all_records is None else all_records)
    for (data, label), scored in groups(r for r in records if r["name"] == "test_metrics").items():
        runs = Counter(r["own_params"]["model"] for r in scored if r["seed"] is not None)
        for record in sorted((r for r in scored if r["seed"] is None), key=lambda r: -r["metrics"]["hr@10"]):
            model, m = record["own_params"]["model"], record["metrics"]
            arm = ((record.get("configuration") or {}).get("arms") or {}).get(model)
            row = {"data": data, "model": model_name(model)}
            row |= {"seeds": str(runs[model] or ""), "device": label}  # no seeds: deterministic
            kind = family(arm["model"], model) if arm else ""
            key = _data(record, "fingerprint"), "leave-one-out", kind
            row["configurations scored"] = str(configurations.get(key, ""))
            for name in ("hr@10", "ndcg@10"):
                row[name.upper()] = f"{m[name]:.4f} ({m[f'{name}_low']:.4f} to {m[f'{name}_high']:.4f})"
            rows.append(row | {"day": record["time"][:10]})
    return _indexed(rows, ["data", "model"])


def differences(records: Iterable[Record], name: str) -> pd.DataFrame:
    """Return one row for each difference between two models, paired by user.

    `name` is that of the records: `comparison` within a grid, `peer_comparison` with other libraries,
    `equal_time_comparison` after equal minutes, `validation_difference` on validation, which has no p-value.
    """
    rows = []
    for (data, _), compared in groups(r for r in records if r["name"] == name).items():
        for params, m in ((r["own_params"], r["metrics"]) for r in compared):
            row = {"data": data, "model": model_name(params["model"]), "minus": model_name(params["against"])}
            row |= {"minutes": params["minutes"]} if "minutes" in params else {}
            row |= {"metric": params["metric"].upper(), "difference": interval_text(m)}
            row["seeds"] = f"{m['seeds'] or 'no'} and {m.get('reference_seeds', m['seeds'])}"
            sureness = {"adjusted p": m.get("adjusted_p"), "could have seen": m.get("detectable")}
            rows.append(row | {column: value and round(value, 4) for column, value in sureness.items()})
    return _indexed(rows, ["data", "model"]).dropna(axis=1, how="all")


def _indexed(rows: Sequence[Mapping[str, Any]], keys: str | list[str]) -> pd.DataFrame:
    """Return rows as a table indexed by these columns; empty without rows."""
    return pd.DataFrame(rows).set_index(keys) if rows else pd.DataFrame()
