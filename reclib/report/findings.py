"""Findings: sentences on the records of each notebook, shown by the notebook and by the page.

A chapter's function takes the records of one dataset and returns sentences, the answer to the notebook's
question first. The page shows the answer and folds the others; the notebook prints all of them.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd

from reclib.config import CONTROLS
from reclib.cost import planner
from reclib.evaluate import statistics
from reclib.evaluate.statistics import Claim, claim
from reclib.report import tables
from reclib.report.tables import (
    ARM_NAMES,
    BASELINES,
    TASK_NAMES,
    Record,
    by,
    interval_text,
    model_name,
    recipe_of,
    sweep_of,
)

Results = Mapping[str, Sequence[Record]]  # the records of one dataset, by name


class Chapter(NamedTuple):
    """The findings of a notebook's records, and its main figure."""

    findings: Callable[[Results], list[str]]
    lead: str = ""  # name of a figure; "" for the first


def sentences(notebook: str, records: Iterable[Record]) -> list[str]:
    """Return the findings of the records of one notebook and dataset, the answer first."""
    chapter = CHAPTERS.get(notebook)
    return chapter.findings(by(records, lambda record: record["name"])) if chapter else []


TOO_FEW = "Too few seeds for a claim"  # start of an answer without a claim
COUNTS = tuple(name for name in BASELINES if not name.endswith("_with_validation"))


def _model(record: Record) -> str:
    return str(record["own_params"]["model"])


def _first(results: Results, name: str) -> Mapping[str, Any]:
    """Return the metrics of the first record of a name, empty without one."""
    return results[name][0]["metrics"] if results.get(name) else {}


def _claim(metrics: Mapping[str, Any]) -> Claim:
    return claim(metrics["difference"], metrics["adjusted_p"], (metrics["seeds"], metrics["reference_seeds"]))


def _place(records: Sequence[Record]) -> str:
    """Return the dataset and the devices of records."""
    labels = sorted({str(record["label"]) for record in records})
    return f"{(records[0].get('data') or {}).get('name')} ({', '.join(labels)})"


def _seeds(count: float) -> str:
    return f"{count:.0f} seed" + "s" * (count != 1)


# -- 01 ------------------------------------------------------------------------------------------------------


# Names of records, and a sentence on their metrics, for datasets that have all of them.
_DATA = {
    "preparation": "{interactions:,} of {source_interactions:,} interactions are left, of {users:,} users "
    "with {items:,} items.",
    "sequence_lengths": "Histories have {min_length:,} to {max_length:,} interactions, {mean_length:.0f} on "
    "average, half of them at most {median_length:.0f}; {longer_than_200_share:.1%} are longer than 200.",
    "item_popularity": "The most popular tenth of the items holds {top_tenth_share:.0%} of all interactions "
    "(Gini {gini:.2f}).",
    "repeats": "{repeat_target_share:.1%} of the test targets are items that the user had before.",
    "tied_timestamps last_items": "{tied_interaction_share:.0%} of interactions share their timestamp with "
    "another of the same user, and for {last_item_by_tie_rule_share:.0%} of the users only the order of rows "
    "decides which item is the test target.",
    "cold": "Split by time, {global_time_unseen_user_share:.0%} of the test rows are of users that training "
    "never saw, and {global_time_unseen_item_share:.1%} ask for an item that it never saw; by leave-one-out "
    "{leave_one_out_unseen_item_share:.1%} do.",
}


def _of_data(results: Results) -> list[str]:
    """Describe the prediction task, then the data."""
    sentences = []
    counts, ties = _first(results, "preparation"), _first(results, "last_items")
    if {"users", "items"} <= counts.keys():
        answer = f"The last item of each of {counts['users']:,} users, among {counts['items']:,} items."
        if share := ties.get("last_item_by_tie_rule_share"):
            answer += f" For {share:.0%} of them only the order of rows in the file says which item that is."
        sentences.append(answer)
    for names, text in _DATA.items():
        metrics: dict[str, Any] = {}
        for name in names.split():
            metrics |= _first(results, name)
        with contextlib.suppress(KeyError):
            sentences.append(text.format(**metrics))
    return sentences


# -- 02 ------------------------------------------------------------------------------------------------------


def _of_baseline(results: Results) -> list[str]:
    """Compare the reference with counts, then list HR@10 of all models."""
    scored = sorted(results.get("test_metrics", []), key=lambda r: r["seed"] is None)  # means come last
    models = {_model(r): r["metrics"] for r in scored}
    if not models:
        return []
    best_first = sorted(models, key=lambda name: -models[name]["hr@10"])
    listed = ", ".join(_with_interval(name, models[name], "hr@10") for name in best_first)
    ranked = [r for r in results.get("comparison", []) if r["own_params"]["metric"] == "ndcg@10"]
    ranked = [r for r in ranked if {_model(r), r["own_params"]["against"]} <= models.keys()]
    return [*([_verdict(ranked, models)] if ranked else []), f"HR@10 on {_place(scored)}: {listed}."]


def _verdict(compared: Sequence[Record], models: Mapping[str, Mapping[str, Any]]) -> str:
    """Say whether the reference ranks better than the counts, by NDCG@10.

    Counts of validation items do not decide, since the model was not trained on these.
    """
    against, seeds = compared[0]["own_params"]["against"], compared[0]["metrics"]["reference_seeds"]
    name, place = model_name(against), f"on {_place(compared)}"
    reference = _with_interval(against, models[against], "ndcg@10")
    rated = sorted(compared, key=lambda r: -models[_model(r)]["ndcg@10"])
    counts = [r for r in rated if _model(r) in COUNTS]
    if not statistics.enough([seeds]):
        decisive = (r for r in rated if _model(r) in COUNTS or _model(r) not in BASELINES)
        listed = ", ".join(_ranked(r, models) for r in decisive)
        return f"{TOO_FEW} ({seeds:.0f}) {place}: NDCG@10 {reference}; {listed}."
    reference += f", {_seeds(seeds)}"
    by_word = by(counts, lambda r: _claim(r["metrics"]))
    named = {word: ", ".join(_ranked(r, models) for r in rows) for word, rows in by_word.items()}
    beaten = f"; {name} beats {named['worse']}" if "worse" in named else ""
    if "better" in named:
        beat = "beats" if len(by_word["better"]) == 1 else "beat"
        answer = f"No {place}: {named['better']} {beat} {reference} (NDCG@10){beaten}"
    elif set(named) == {"worse"}:
        answer = f"Yes {place}: {reference} (NDCG@10), beats every count scored, the best of them "
        answer += _ranked(by_word["worse"][0], models)
    elif named:
        unclear = "; ".join(f"{word}: {text}" for word, text in named.items() if word != "worse")
        answer = f"Not shown {place}: {reference} (NDCG@10), is not told apart from every count; {unclear}"
        answer += beaten
    else:
        answer = f"{place[:1].upper()}{place[1:]} {reference} (NDCG@10); no count was compared"
    trained = [f"{_ranked(r, models)}: {_claim(r['metrics'])}" for r in rated if _model(r) not in BASELINES]
    return answer + (f". {'; '.join(trained)}" if trained else "") + "."


def _ranked(record: Record, models: Mapping[str, Mapping[str, Any]]) -> str:
    return f"{model_name(_model(record))} {models[_model(record)]['ndcg@10']:.3f}"


def _with_interval(model: str, metrics: Mapping[str, Any], name: str) -> str:
    value = f"{model_name(model)} {metrics[name]:.3f}"
    if metrics.get(f"{name}_low") is None:
        return value
    return f"{value} [{metrics[f'{name}_low']:.3f}, {metrics[f'{name}_high']:.3f}]"


# -- 03 ------------------------------------------------------------------------------------------------------


def _of_scaling(results: Results) -> list[str]:
    """Say whether a larger model ranks better, what to buy, and how well the law predicted the loss."""
    curves, metric = results.get("learning_curve", []), "valid_ndcg@10"
    sentences = []
    sweeps = by(curves, lambda r: sweep_of(_model(r)))
    for runs in (runs for sweep, runs in sweeps.items() if sweep.startswith("width")):
        widths = by(sorted(runs, key=lambda r: (r["metrics"]["non_embedding"], _model(r))), _model)
        sizes = list(widths)
        if len({r["metrics"]["non_embedding"] for r in runs}) < 2:
            continue
        small, large = ([r["metrics"][metric] for r in widths[name]] for name in (sizes[0], sizes[-1]))
        word = "No" if min(small) > max(large) else "Not told apart"
        word = "Yes" if max(small) < min(large) else word
        seeds = min(len({r["seed"] for r in widths[name]}) for name in (sizes[0], sizes[-1]))
        count = f", {_seeds(seeds)}"
        if seeds < statistics.MIN_SEEDS:
            word, count = f"{TOO_FEW} ({seeds})", ""
        sentences.append(
            f"{word} on {_place(curves).removeprefix('scaling-')}: NDCG@10 on validation is "
            f"{np.mean(small):.3f} for {sizes[0]}, {np.mean(large):.3f} for {sizes[-1]}, the widest "
            f"there{count}."
        )
    sentences += _of_purchase(tables.by_arm(curves)) if curves else []
    if results.get("prediction"):
        sentences += _of_the_law(outcome([*curves, *results["prediction"]]))
    return sentences


def outcome(rows: Iterable[Mapping[str, Any]], name: str | None = None) -> dict[str, Any]:
    """Return a grid's newest prediction and the measured loss, from its records alone.

    Keys: `prediction` (the record or None), `measured` (mean loss over seeds or None), `seeds`, `first` (time
    of the first of their records), `error` (predicted minus measured, nats), `relative_error`, and `naive`
    (predictions without a law, see `statistics.naive`). Only runs with the hash of the prediction count.
    """
    keys = ("prediction", "measured", "seeds", "first", "error", "relative_error", "naive")
    result: dict[str, Any] = dict.fromkeys(keys)
    rows = [row for row in rows if name is None or (row.get("data") or {}).get("name") == name]
    curves = [row for row in rows if row["name"] == "learning_curve"]
    by_law = by(curves, lambda row: (row.get("configuration") or {}).get("prediction"))
    predictions = sorted((row for row in rows if row["name"] == "prediction"), key=lambda row: row["time"])
    if not predictions:
        return result
    newest = ([row for row in predictions if row["params_hash"] in by_law] or predictions)[-1]
    result["prediction"], points = newest, newest.get("series") or {}
    if len(points.get("loss", ())) > 1:
        size = newest["own_params"]["size"]
        result["naive"] = statistics.naive(points["non_embedding"], points["loss"], size)
    if runs := by_law.get(newest["params_hash"], []):
        measured = float(np.mean([row["metrics"]["lowest_valid_loss"] for row in runs]))
        gap = newest["metrics"]["predicted"] - measured
        result |= {"measured": measured, "seeds": len(runs), "first": min(row["time"] for row in runs)}
        result |= {"error": gap, "relative_error": gap / measured}
    return result


def _of_the_law(outcome: Mapping[str, Any]) -> list[str]:
    """Describe the law, its prediction with the band, and the measured loss."""
    if (prediction := outcome["prediction"]) is None:
        return ["No law yet: its sizes are not all trained, and nothing is predicted."]
    m, params, measured = prediction["metrics"], prediction["own_params"], outcome["measured"]
    band = "no band, since no size had two seeds"
    if m["low"] is not None:
        band = f"{m['low']:.3f} to {m['high']:.3f} over resampled seeds"
    target = f"{params['of']} ({params['size']:,} non-embedding parameters; {band})"
    predicted = f"{m['predicted']:.3f} nats"
    lines = [f"No power of the size: the loss does not fall. {predicted} predicted for {target}."]
    if m["factor"] >= 1e-9:
        formula = f"{m['floor']:.3f} + {m['factor']:.3g} N^-{m['exponent']:.3f}"
        lines = [f"Law {formula}; it predicts {predicted} for {target}."]
        if m.get("exponent_low") is not None:
            lines.append(
                f"The exponent itself is known to {m['exponent_low']:.2f} to {m['exponent_high']:.2f} "
                "only: the law says where the next size lands, not where the loss ends."
            )
    if m.get("without_low") is not None:
        lines.append(
            f"Without any one size it says {m['without_low']:.3f} to {m['without_high']:.3f}: "
            "how far the fit hangs on a single point."
        )
    if measured is None:
        carried = f"its record will carry {prediction['params_hash']}"
        return [*lines, f"{params['of']} is not measured yet; {carried}."]
    error = f"error {outcome['error']:+.3f} nats ({outcome['relative_error']:+.1%})"
    if m["low"] is not None:
        error += f", {'inside' if m['low'] <= measured <= m['high'] else 'outside'} the band"
    lines.append(f"Measured {measured:.3f} over {outcome['seeds']} seed(s): {error}.")
    if naive := outcome.get("naive"):
        lines.append(
            "The same points without a law: no gain over the last of them misses by "
            f"{naive['last'] - measured:+.3f} nats, a straight line in log N by "
            f"{naive['line'] - measured:+.3f}."
        )
    return lines


def _of_purchase(table: pd.DataFrame) -> list[str]:
    """Name the best arm, the cheapest one not told apart from it, and the gain of a doubling of FLOPs.

    Arms with too few seeds for a claim, and those of other learning rates, are left out.
    """
    sweeps = table.index.map(lambda arm: sweep_of(str(arm)))
    enough = [statistics.enough([seeds]) for seeds in table["seeds"]]
    eligible = table[(sweeps != "other learning rate") & enough].sort_values("TFLOP", kind="stable")
    if len(eligible) < 2 or "ndcg@10" not in table:
        return []
    best = eligible.iloc[int(eligible["ndcg@10"].argmax())]
    reached = eligible[eligible["ndcg@10_high"] >= best["ndcg@10_low"]]  # ranges over seeds overlap
    cheap = reached.iloc[0]
    line = f"What to buy, by NDCG@10 on validation, of those with {statistics.MIN_SEEDS} seeds: "
    line += f"{best.name} ranks best ({best['ndcg@10']:.4f}); "
    if cheap.name == best.name:
        line += "no cheaper one has a seed that reaches its worst."
    else:
        share = cheap["TFLOP"] / best["TFLOP"]
        line += f"the cheapest not told apart is {cheap.name} ({cheap['ndcg@10']:.4f}), "
        line += f"at {share:.0%} of its FLOPs."
    for sweep, widths in eligible.groupby(eligible.index.map(lambda arm: sweep_of(str(arm)))):
        if not str(sweep).startswith("width") or len(widths) < 2:
            continue
        smallest, largest = widths.iloc[0], widths.iloc[-1]
        gain = (largest["ndcg@10"] - smallest["ndcg@10"]) / math.log2(largest["TFLOP"] / smallest["TFLOP"])
        line += f" From {smallest.name} to {largest.name} a doubling of training FLOPs is worth {gain:+.4f}."
    return [line]


# -- 04 ------------------------------------------------------------------------------------------------------

FASTER = 1.05  # times the rate of fp32 eager: the least that counts as faster


def _of_speed(results: Results) -> list[str]:
    """Compare precisions and compile modes with a plain step, then the ladder's rungs with its first one."""
    timed = [r for r in results.get("ladder", []) if r["timings"].get("step_seconds")]
    rungs = sorted(timed, key=lambda r: r["own_params"]["rung"])
    names = [r["own_params"]["name"] for r in rungs]
    seconds = [r["timings"]["step_seconds"] for r in rungs]
    sentences = _speed_answer([r for r in results.get("step", []) if r["kind"] == "measured"])
    if len(rungs) > 1:
        best = int(np.argmin(seconds))
        factor, label = seconds[0] / seconds[best], rungs[0]["label"]
        change = f"From the {names[0]} to “{names[best]}”"
        sentences.append(f"{change} a step is {factor:.1f} times faster ({label}).")
    curves = [r for r in results.get("loss_curve", []) if r["timings"].get("largest_gap") is not None]
    gaps = {r["own_params"]["precision"]: r["timings"]["largest_gap"] for r in curves}
    if gaps:
        listed = ", ".join(f"{name} {value:.1e}" for name, value in gaps.items())
        sentences.append(f"Largest relative difference of a step's loss: {listed}.")
    return sentences


def _speed_answer(steps: Sequence[Record]) -> list[str]:
    """Say whether any precision or compile mode is faster than eager fp32 at the largest batch."""
    batches: dict[int, dict[str, float]] = {}
    for params, rate in ((r["own_params"], r["timings"].get("sequences_per_second")) for r in steps):
        if rate:
            mode = "" if params["compile_mode"] == "off" else f" compiled ({params['compile_mode']})"
            batches.setdefault(params["batch_size"], {})[params["precision"] + mode] = rate
    batch, rates = max(((size, rates) for size, rates in batches.items() if "fp32" in rates), default=(0, {}))
    if len(rates) < 2:
        return []
    plain, label = rates.pop("fp32"), steps[0]["label"]
    name, *_ = fastest_first = sorted(rates, key=lambda name: -rates[name])
    listed = ", ".join(f"{name} {rates[name] / plain:.2f}" for name in fastest_first)
    start = f"{name} runs {rates[name] / plain:.2f} times as fast as fp32 eager ({label}, batch {batch})"
    if rates[name] / plain < FASTER:
        start = f"Nothing on {label}: no variant is over {FASTER - 1:.0%} faster than fp32 eager, "
        start += f"batch {batch}"
    rate = f"{plain:,.0f} sequences/s"
    return [f"{start}, which trains {rate}; rates as multiples of it: {listed}."]


# -- 05 ------------------------------------------------------------------------------------------------------


def _of_adapters(results: Results) -> list[str]:
    """Say whether the user's gate helps, then list step times and the claims on all arms."""
    compared = [r for r in results.get("gate_comparison", []) if r["own_params"]["metric"] == "ndcg@10"]
    verdicts, details = [], []
    for task, name in TASK_NAMES.items():
        if rows := [r for r in compared if r["own_params"]["task"] == task]:
            verdicts.append(_gate_verdict(rows, name))
            by_claim = by(rows, lambda r: _claim(r["metrics"]))
            arms = {w: [ARM_NAMES[_model(r)] for r in by_claim.get(w, [])] for w in get_args(Claim)}
            listed = "; ".join(f"{word}: {', '.join(names)}" for word, names in arms.items() if names)
            details.append(f"{name[:1].upper()}{name[1:]}, NDCG@10 against iLoRA, corrected: {listed}.")
    levels = {r["own_params"]["share"]: r["metrics"] for r in results.get("implanted_ceiling", [])}
    for share, rows in by(results.get("implanted", []), lambda r: r["own_params"]["share"]).items():
        parts = [f"iLoRA {rows[0]['metrics']['reference_ndcg@10']:.4f}"]
        parts += [f"{name} {value:.4f}" for name, value in levels.get(share, {}).items()]
        parts += [
            f"{ARM_NAMES[_model(r)]} {_claim(r['metrics'])}, {interval_text(r['metrics'])}" for r in rows
        ]
        details.append(f"A signal in {share:.0%} of later items, NDCG@10: {', '.join(parts)}.")
    answer = [" ".join(verdicts)] if verdicts else []
    return [*answer, *_adapter_steps(results.get("adapter_step", [])), *details]


def _gate_verdict(rows: Sequence[Record], task: str) -> str:
    """Say whether iLoRA differs from LoRA and from its controls, and the detectable difference."""
    arms = {_model(r): r["metrics"] for r in rows}
    rivals = {arm: arms[arm] for arm in ("lora", *CONTROLS) if arm in arms}
    if not rivals:
        return f"{task}: iLoRA's controls were not run."
    claims = {arm: _claim(m) for arm, m in rivals.items()}
    controls = [ARM_NAMES[arm].removeprefix("iLoRA, ") for arm in rivals if arm != "lora"]
    names = f"LoRA and {len(controls)} control{'s' * (len(controls) != 1)} ({', '.join(controls)})"
    if set(claims.values()) == {"worse"}:
        return f"Yes, {task}: iLoRA beats {names} (NDCG@10, corrected)."
    if "too few seeds" in claims.values():
        return f"Not known, {task}: too few seeds to compare iLoRA with {names}."
    if not {"better", "worse"} & set(claims.values()):
        largest = max(abs(m["difference"]) for m in rivals.values())
        detectable = max(m["detectable"] for m in rivals.values())
        return (
            f"No, {task}: {names} are within {largest:.4f} NDCG@10 of iLoRA, where a difference of "
            f"{detectable:.4f} would have been seen."
        )
    listed = ", ".join(f"{ARM_NAMES[arm]} {word}" for arm, word in claims.items())
    return f"Not shown, {task}: against iLoRA {listed}."


def _adapter_steps(records: Sequence[Record]) -> list[str]:
    """Return the time of a step of iLoRA as multiples of the steps that it was paired with."""
    sentences = []
    for params, timings in ((r["own_params"], r["timings"]) for r in records if _model(r) == "ilora"):
        parts = []
        for arm, name in (("lora", "LoRA"), ("full", "full fine-tuning"), ("ilora", "eager iLoRA")):
            if ratio := timings.get(f"over_{arm}"):
                low, high = (timings.get(f"over_{arm}_{end}") for end in ("low", "high"))
                spread = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
                parts.append(f"{ratio:.2f} times that of {name}{spread}")
        if parts:
            mode = "eager" if params["compile_mode"] == "off" else f"compiled ({params['compile_mode']})"
            sentences.append(f"A step of iLoRA in {params['precision']}, {mode}, takes {', '.join(parts)}.")
    return sentences


# -- 06 to 08 ------------------------------------------------------------------------------------------------


def of_devices(results: Results) -> list[str]:
    """Return a sentence on each size: where it fits, the fastest board, and the cheapest at given prices."""
    steps = [r for r in results.get("hardware_step", []) if r["kind"] == "predicted"]
    plans = [r for r in steps if {"rule": "open", "status": "ok"}.items() <= r["own_params"].items()]
    sentences = []
    for size, rows in by(plans, lambda record: record["own_params"]["size"]).items():
        rates = {r["own_params"]["device"]: r["timings"]["sequences_per_second"] for r in rows}
        best = max(rows, key=lambda r: r["timings"]["sequences_per_second"])
        low, high = (best["timings"][f"epoch_seconds_{end}"] for end in ("low", "high"))
        as_fast = [device for device, rate in rates.items() if rate >= 0.99 * max(rates.values())]
        fastest = best["own_params"]["device"]
        if len(as_fast) > 2:
            fastest = f"{len(as_fast)} of them alike"
        sentence = f"{size}: fits on {len(rates)} boards; fastest {fastest}, an epoch in {low:.0f} to "
        sentence += f"{high:.0f} s (predicted)."
        if priced := [r for r in rows if r["timings"].get("cost_per_epoch") is not None]:
            cheap = min(priced, key=lambda r: r["timings"]["cost_per_epoch"])
            cost, device = cheap["timings"]["cost_per_epoch"], cheap["own_params"]["device"]
            sentence += f" Cheapest at the stated prices: {device}, {cost:.3g} an epoch."
        sentences.append(sentence)
    return sentences


def planner_errors() -> list[str]:
    """Return a sentence on the errors of plans for each device with measurements."""
    return [
        f"{label}: plans of {error['rows']} {error['of']} rows were off by {error['time_median']:.0%} in "
        f"time (median; at worst a factor of {1 + error['time_worst']:.2f}), by "
        f"{error['memory_median']:.0%} in memory."
        for label, error in planner.errors().items()
    ]


def _of_devices_and_plans(results: Results) -> list[str]:
    steps = [*results.get("hardware_step", []), *results.get("real_size_step", [])]
    if not steps:
        return []
    timed = {tables.device_of(r) for r in steps if r["kind"] == "measured"}
    measured = f"Measured on {', '.join(sorted(timed)) or 'no device'}."
    start, plans = _measured_on_gpus(steps), of_devices(results)
    if plans and not start:
        start = ["No GPU was measured in this run: all that follows is predicted."]
    return [*filter(None, [" ".join(start + plans)]), measured, *planner_errors()]


def _measured_on_gpus(steps: Sequence[Record]) -> list[str]:
    """Return the measured sequences/s of each GPU by size, in its fastest precision."""
    rates: dict[str, dict[str, tuple[float, str]]] = {}
    for r in steps:
        if r["kind"] == "measured" and tables.cpu_of(r) is None and r["timings"].get("sequences_per_second"):
            params, rate = r["own_params"], r["timings"]["sequences_per_second"]
            sizes = rates.setdefault(tables.device_of(r), {})
            sizes[params["size"]] = max(sizes.get(params["size"], (0.0, "")), (rate, params["precision"]))
    texts = {
        device: [f"{size} {rate:,.0f} sequences/s ({name})" for size, (rate, name) in sizes.items()]
        for device, sizes in rates.items()
    }
    return [f"{device}, measured: {', '.join(listed)}." for device, listed in texts.items()]


def _of_plans(results: Results) -> list[str]:
    """Say on which GPUs the planned run fits, which is the fastest, and how many plans are validated."""
    plans = results.get("plan", [])
    boards = [r for r in plans if r["metrics"].get("fits") is not None]
    if not boards:
        return []
    fit, params = [r for r in boards if r["metrics"]["fits"]], boards[0]["own_params"]
    run = f"{params['size']} at a batch of {params['batch_size']:,}"
    sentences = [f"{run} fits on {len(fit)} of {len(boards)} GPUs (predicted)."]
    bases = [r["own_params"]["basis"] for r in plans]
    sentences += [f"{bases.count(basis)} plans are {basis}." for basis in ("validated", "unvalidated")]
    if fit:
        best = min(fit, key=lambda r: r["timings"]["epoch_seconds"])
        low, high = (best["timings"][f"epoch_seconds_{end}"] for end in ("low", "high"))
        device = best["own_params"]["device"]
        sentences.append(f"Fastest is {device}, an epoch in {low:,.3g} to {high:,.3g} s (predicted).")
    return sentences


def _of_audit(results: Results) -> list[str]:
    tally = {verdict: count for verdict, count in _first(results, "audit_verdicts").items() if count}
    words = {"holds": "hold", "contradicted": "are contradicted", "holds in part": "hold in part"}
    words |= {"not supported": "are not supported"}
    listed = ", ".join(f"{tally[verdict]} {word}" for verdict, word in words.items() if verdict in tally)
    return [f"Of {sum(tally.values())} published claims that arithmetic can check {listed}."] if tally else []


# -- the whole study -----------------------------------------------------------------------------------------


def study(records: Sequence[Record]) -> list[str]:
    """Return the study's answer: effects of size and counting, the cost of a step, and what does not pay."""
    datasets = by(tables.by_size(records), lambda r: r["data"]["name"])
    answer = [*_of_sizes(datasets), *_of_counts(datasets)]
    starts = {  # start of a notebook's sentence, and its replacement here
        "04_amp_compile": ("From the", "How cheaply: from the"),
        "05_ilora": (f"No, {TASK_NAMES['next_period']}:", "What does not pay: a gate on the user's history."),
    }
    for notebook, (start, opening) in starts.items():
        chapter = tables.best_work(r for r in records if r["notebook"] == notebook and tables.of_study(r))
        lines = []
        for rows in by(chapter, lambda r: _place([r])).values():
            matching = [line for line in sentences(notebook, rows) if line.startswith(start)]
            lines += [line.split(". ")[0].removesuffix(".") for line in matching[:1]]
        if lines:
            labels = "|".join({r["label"] for r in chapter})
            first, *others = (re.sub(rf" \((?!{labels})[^)]*\)", "", line) for line in lines)
            others = [line[0].lower() + line[1:] for line in others]
            answer.append(f"{'; '.join([opening + first.removeprefix(start), *others])}.")
    return answer


def _of_sizes(datasets: Mapping[str, Sequence[Record]]) -> list[str]:
    """Return NDCG@10 on validation of the smallest and the largest width, by dataset of `tables.by_size`."""
    parts, rises = [], []
    for name, rows in datasets.items():
        widths = by((r for r in rows if "valid_ndcg@10" in r["metrics"]), _model)
        arms = [m for m in widths if sweep_of(m) == "width"]
        arms.sort(key=lambda m: widths[m][0]["metrics"]["non_embedding"])
        if len(arms) > 1:
            ends = widths[arms[0]], widths[arms[-1]]
            low, high = (np.mean([r["metrics"]["valid_ndcg@10"] for r in runs]) for runs in ends)
            parts.append(f"on {name} from {low:.3f} ({arms[0]}) to {high:.3f} ({arms[-1]})")
            rises.append(high > low)
    if not parts:
        return []
    start = "wider models rank better" if all(rises) else "not every wider model ranks better"
    text = f"How far: {start}. NDCG@10 on validation goes {', '.join(parts)}."
    for name, rows in datasets.items():
        tested = {_model(r): r["metrics"]["ndcg@10"] for r in rows if r["name"] == "test_metrics"}
        shapes = [value for m, value in tested.items() if recipe_of(m) == tables.SHAPES]
        ours = [v for m, v in tested.items() if recipe_of(m) == model_name("bert4rec") and m not in BASELINES]
        if shapes and ours:
            text += f" On {name} {tables.SHAPES} have {min(shapes):.3f} to {max(shapes):.3f} on the test "
            text += f"split, ours {min(ours):.3f} to {max(ours):.3f}"
            own = [value for m, value in tested.items() if recipe_of(m) == tables.OWN_LOSS]
            text += f"; with {tables.OWN_LOSS} {max(own):.3f}." if own else "."
    return [text]


def _of_counts(datasets: Mapping[str, Sequence[Record]]) -> list[str]:
    """Compare the best count with the best network on the test split, on each dataset of `tables.by_size`."""
    parts, behind, joined = [], [], []
    for name, rows in datasets.items():
        tested = {_model(r): r["metrics"]["ndcg@10"] for r in rows if r["name"] == "test_metrics"}
        counts = [m for m in tested if m in COUNTS]
        alone = [m for m in tested if m not in BASELINES and tables.COUNTED not in m]
        if counts and alone:
            count, model = (max(group, key=lambda m: tested[m]) for group in (counts, alone))
            scores = [f"{model_name(m)} {tested[m]:.4f}" for m in (count, model)]
            parts.append(f"on {name} {', '.join(scores)}")
            behind += [name] if tested[count] > tested[model] else []
        if together := [m for m in tested if m.endswith(tables.COUNTED)]:
            model = max(together, key=lambda m: tested[m])
            joined.append(f"on {name} {model_name(model)} {tested[model]:.4f}")
    if not parts:
        return []
    ahead = "is behind a network everywhere"
    if behind:
        ahead = f"is ahead of every network on its own on {' and '.join(behind)}"
    text = f"Counting, with nothing trained, {ahead}. Best NDCG@10 on the test split: {'; '.join(parts)}."
    return [text + (f" Trained with counts in their scores: {'; '.join(joined)}." if joined else "")]


CHAPTERS: dict[str, Chapter] = {
    "01_data_prep": Chapter(_of_data, "last_items"),
    "02_baseline": Chapter(_of_baseline, "comparison"),
    "03_scaling": Chapter(_of_scaling, "scaling_accuracy"),
    "04_amp_compile": Chapter(_of_speed, "step_time"),
    "05_ilora": Chapter(_of_adapters, "gate_comparison"),
    "06_hardware": Chapter(_of_devices_and_plans),
    "07_explore": Chapter(_of_plans),
    "08_audit": Chapter(_of_audit),
}
