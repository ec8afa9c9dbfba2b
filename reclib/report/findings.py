"""Findings: sentences on the records of each notebook, shown by the notebook and by the page.

A chapter's function takes the records of one dataset and returns sentences, the answer to the notebook's
question first. The page shows the answer and folds the others; the notebook prints all of them.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd

from reclib.cost import planner
from reclib.evaluate import statistics
from reclib.evaluate.statistics import Claim, claim
from reclib.report import tables
from reclib.report.tables import (
    ARM_NAMES,
    BASELINES,
    CONTROLS,
    FLOOR,
    LATE,
    RATES,
    TASK_NAMES,
    Record,
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
    return chapter.findings(_by(records, lambda record: record["name"])) if chapter else []


def _by(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[str, list[Record]]:
    """Group records by a key, in their order."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(str(key(record)), []).append(record)
    return grouped


TOO_FEW = "Too few seeds for a claim"  # start of an answer without a claim
COUNTS = tuple(name for name in BASELINES if not name.endswith("_with_validation"))


def _model(record: Record) -> str:
    return str(record["own_params"]["model"])


def _first(results: Results, name: str) -> Mapping[str, Any]:
    """Return the metrics of the first record of a name, empty without one."""
    return results[name][0]["metrics"] if results.get(name) else {}


def _claim(metrics: Mapping[str, Any]) -> Claim:
    return claim(metrics["difference"], metrics["adjusted_p"], (metrics["seeds"], metrics["reference_seeds"]))


def _by_claim(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group comparisons by their claims, in the order of `Claim`."""
    by_claim = _by(records, lambda record: _claim(record["metrics"]))
    return {word: by_claim[word] for word in get_args(Claim) if word in by_claim}


def _place(records: Sequence[Record]) -> str:
    """Return the dataset and the device of records."""
    return f"{(records[0].get('data') or {}).get('name')} ({records[0]['label']})"


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
    """Compare the reference with counts, then list HR@10 of all models, comparisons and seeds."""
    scored = [r for r in results.get("test_metrics", []) if "hr@10" in r["metrics"]]
    models: dict[str, Mapping[str, Any]] = {}
    for record in sorted(scored, key=lambda r: r.get("seed") is None):  # the mean over seeds has none
        models[(record.get("own_params") or {}).get("model") or "bert4rec"] = record["metrics"]
    if not models:
        return []
    best_first = sorted(models, key=lambda name: -models[name]["hr@10"])
    listed = ", ".join(_with_interval(name, models[name], "hr@10") for name in best_first)
    sentences = [f"HR@10 on {_place(scored)}: {listed}."]
    compared = results.get("comparison", [])
    compared = [r for r in compared if {_model(r), r["own_params"]["against"]} <= models.keys()]
    if ranked := [r for r in compared if r["own_params"]["metric"] == "ndcg@10"]:
        sentences.insert(0, _verdict(ranked, models))
    for params, m in ((r["own_params"], r["metrics"]) for r in compared):
        pair = f"{model_name(params['model'])} minus {model_name(params['against'])}"
        sentences.append(f"{params['metric'].upper()}, {pair}: {interval_text(m)}: {_claim(m)}.")
    for name, runs in _by((r for r in scored if r.get("seed") is not None), _model).items():
        values = [r["metrics"]["hr@10"] for r in runs]
        span = f"{min(values):.3f} to {max(values):.3f}"
        sentences.append(f"{model_name(name)}: HR@10 over {_seeds(len(runs))} {span}.")
    return sentences


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
    by_word = _by(counts, lambda r: _claim(r["metrics"]))
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
    """Say whether a larger model ranks better, then compare the law's prediction with the measured loss."""
    curves, metric = results.get("learning_curve", []), "valid_ndcg@10"
    widths = _by((r for r in curves if sweep_of(_model(r)) == "width" and metric in r["metrics"]), _model)
    sizes = sorted(widths, key=lambda name: (widths[name][0]["metrics"]["non_embedding"], name))
    sentences = []
    if len({r["metrics"]["non_embedding"] for (r, *_) in widths.values()}) > 1:
        small, large = ([r["metrics"][metric] for r in widths[name]] for name in (sizes[0], sizes[-1]))
        word = "No" if min(small) > max(large) else "Not told apart"
        word = "Yes" if max(small) < min(large) else word
        seeds = min(len(small), len(large))
        count = f", {_seeds(seeds)}"
        if seeds < statistics.MIN_SEEDS:
            word, count = f"{TOO_FEW} ({seeds})", ""
        sentences.append(
            f"{word} on {_place(curves).removeprefix('scaling-')}: NDCG@10 on validation is "
            f"{np.mean(small):.3f} for {sizes[0]}, {np.mean(large):.3f} for {sizes[-1]}, the largest{count}."
        )
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
    by_law = _by(curves, lambda row: (row.get("configuration") or {}).get("prediction"))
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


def scaling_findings(
    rows: Sequence[Record], outcome: Mapping[str, Any], name: str, absent: Sequence[str] = ()
) -> list[str]:
    """Return sentences on a grid: the law, its error, and runs that are undertrained or `absent`."""
    if not rows:
        return [f"- {name}: no run is committed yet."]
    table = tables.by_arm(rows)
    best, sizes = str(table["loss"].idxmin()), table["non_embedding"]
    start = (
        f"- {name}: {len(rows)} runs of {len(table)} configurations, {int(table['trained_tokens'].max()):,} "
        f"tokens each at most, {table['hours'].sum():.1f} hours of a machine that did other work beside it; "
        f"lowest mean loss {table['loss'].min():.3f} nats, with {best} "
        f"({sizes[best]:,} of {sizes.max():,} non-embedding parameters at most)."
    )
    late = table.index[table["late_drop"] > LATE]
    risen = [f"{arm} ({up:+.3f})" for arm, up in table["risen"].items() if up > LATE]
    few = [f"{arm} ({int(n)})" for arm, n in table["seeds"].items() if n < 3 and "rate" not in str(arm)]
    lines = [
        *_of_the_law(outcome),
        *_of_accuracy_law(rows),
        *_of_width(table),
        *_of_depth_and_tables(table),
        *_of_rates(rows),
        *_of_purchase(table),
        f"Undertrained (over {LATE} nats fell in the last fifth): {', '.join(late) or 'none'}.",
        f"Loss risen again at the end, in nats above its lowest: {', '.join(risen) or 'none'}.",
        f"Fewer than three seeds: {', '.join(few) or 'none'}.",
        *([f"Not trained yet, of the file: {', '.join(absent)}."] if absent else []),
    ]
    return [start, *(f"  {line}" for line in lines)]


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


def _of_accuracy_law(rows: Sequence[Record]) -> list[str]:
    """Compare a law of NDCG@10 with a straight line, for the largest width."""
    if (law := tables.law_of_accuracy(rows)) is None:
        return []
    band = "" if law.low is None else f" ({law.low:.4f} to {law.high:.4f} over resampled seeds)"
    return [
        f"NDCG@10 of the largest width: {law.predicted:.4f}{band} by a law of the smaller ones, "
        f"{law.line:.4f} by a straight line in log N, {law.measured:.4f} measured; law and line "
        f"{'differ' if law.differs else 'cannot be told apart'}."
    ]


def _of_width(table: pd.DataFrame) -> list[str]:
    """List the changes from each width to the next, and the steps at which ranges over seeds overlap."""
    arms = [str(arm) for arm in table.index if sweep_of(str(arm)) == "width"]
    if len(arms) < 2:
        return []
    changes, overlaps, against = [], [], []
    pairs = [(f"{a} and {b}", table.loc[a], table.loc[b]) for a, b in pairwise(arms)]
    for metric in (metric for metric in ("loss", "ndcg@10", "hr@10") if metric in table):
        name = metric.upper() if "@" in metric else f"{metric} (nats)"
        changes.append(f"{name} {', '.join(f'{b[metric] - a[metric]:+.4f}' for _, a, b in pairs)}")
        overlap = [pair for pair, a, b in pairs if not _parted(a, b, metric)]
        overlaps.append(f"{name}: {', '.join(overlap) or 'none'}")
        if metric == "ndcg@10":
            against = [pair for pair, a, b in pairs if (b["loss"] - a["loss"]) * (b[metric] - a[metric]) > 0]
    return [
        f"Width, {' to '.join(arms)}, step by step: {'; '.join(changes)}.",
        f"Neighbours whose seeds' ranges overlap, so that the step is not told apart: {'; '.join(overlaps)}.",
        f"Neighbours of which the one with the lower loss ranks worse: {', '.join(against) or 'none'}.",
    ]


def _of_depth_and_tables(table: pd.DataFrame) -> list[str]:
    """Compare deeper models and untied tables with the arm that they vary."""
    lines = []
    for arm in map(str, table.index):
        kind = sweep_of(arm)
        base = arm.removesuffix(" untied") if kind == "untied tables" else f"{arm.split('d')[0]}d2"
        if kind in ("depth", "untied tables") and base in table.index:
            a, b = table.loc[base], table.loc[arm]
            parted = "" if _parted(a, b, "loss") else ", ranges of seeds overlap"
            ranked = f", NDCG@10 {b['ndcg@10'] - a['ndcg@10']:+.4f}" if "ndcg@10" in table else ""
            lines.append(f"{arm} against {base}: {b['loss'] - a['loss']:+.3f} nats{ranked}{parted}.")
    return lines


def _of_rates(rows: Sequence[Record]) -> list[str]:
    """Say whether the rule for the learning rate held where it was checked."""
    lines = []
    for arm, row in tables.rate_check(rows).iterrows():
        best = min(RATES, key=lambda name: row[name])
        verdict = f"{best} of it is better by {row['lost']:.3f} nats"
        verdict = "the rule's is the best of the three" if best == "rule" else verdict
        losses = ", ".join(f"{name} {row[name]:.3f}" for name in RATES)
        line = f"Learning rate at {arm}, {int(row['seeds'])} seed(s): {losses} nats; {verdict} "
        line += f"(the rule's seeds lie {row['range']:.3f} apart)."
        ranked = {name: row[f"ndcg@10 {name}"] for name in RATES}
        if not any(map(math.isnan, ranked.values())):
            top = max(RATES, key=lambda name: ranked[name])
            scores = ", ".join(f"{name} {value:.4f}" for name, value in ranked.items())
            agreed = "as the loss says" if top == best else f"the loss says {best}"
            line += f" NDCG@10 {scores}: highest with {top}, {agreed}."
        lines.append(line)
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
    cheap = next(row for _, row in eligible.iterrows() if not _parted(row, best, "ndcg@10"))
    line = f"What to buy, by NDCG@10 on validation, of those with {statistics.MIN_SEEDS} seeds: "
    line += f"{best.name} ranks best ({best['ndcg@10']:.4f}); "
    if cheap.name == best.name:
        line += "no cheaper one has a seed that reaches its worst."
    else:
        share = cheap["TFLOP"] / best["TFLOP"]
        line += f"the cheapest not told apart is {cheap.name} ({cheap['ndcg@10']:.4f}), "
        line += f"at {share:.0%} of its FLOPs."
    widths = eligible[[sweep_of(str(arm)) == "width" for arm in eligible.index]]
    if len(widths) > 1:
        smallest, largest = widths.iloc[0], widths.iloc[-1]
        gain = (largest["ndcg@10"] - smallest["ndcg@10"]) / math.log2(largest["TFLOP"] / smallest["TFLOP"])
        line += f" From {smallest.name} to {largest.name} a doubling of training FLOPs is worth {gain:+.4f}."
    return [line]


def _parted(a: Any, b: Any, metric: str) -> bool:
    """Return whether the ranges over seeds of two arms are disjoint."""
    low, high = f"{metric}_low", f"{metric}_high"
    return bool(a[high] < b[low] or b[high] < a[low])


def size_findings(steps: pd.DataFrame, named: Collection[str]) -> list[str]:
    """Return a sentence for each device of the table of `real_steps`, with the sizes not measured on it."""
    if steps.empty:
        return [f"- Steps of the named sizes: not measured yet: {', '.join(named)}."]
    lines = []
    for device, part in steps.groupby("device"):
        sizes = [
            f"{size} {row['step s']:.2f} s, {row['peak GB']:.1f} GB at peak, {row[FLOOR]:.2f} times its floor"
            for size, row in part.iterrows()
        ]
        absent = [name for name in named if name not in part.index]
        missing = f" Not measured there: {', '.join(absent)}." if absent else ""
        start = f"- Steps of the named sizes at their own catalogues, {device}"
        lines.append(f"{start}: {'; '.join(sizes)}.{missing}")
    return lines


def tuning_findings(records: Sequence[Record], study: str) -> list[str]:
    """Return sentences on a study: trials, chosen settings, importance, and comparison with the default."""
    results = _by((r for r in records if r["data"]["name"] == study), lambda record: record["name"])
    trials = results.get("trial", [])
    if not trials:
        return [f"- {study}: no trial is committed yet."]
    pruned = sum(r["own_params"]["state"] == "pruned" for r in trials)
    lines = [f"- {study}: {len(trials)} trials, {pruned} of them pruned."]
    if results.get("tuning"):
        newest = max(results["tuning"], key=lambda r: str(r["time"]))
        params, value = newest["own_params"], newest["metrics"]["valid_ndcg@10"]
        settings = ", ".join(f"{k} {v:.3g}" for k, v in params.items() if k not in ("study", "trial"))
        lines[0] += f" The best, trial {params['trial']}, has NDCG@10 {value:.4f} on validation: {settings}."
        shares = dict(zip(*(newest["series"].get(k, ()) for k in ("field", "share")), strict=True))
        if shares:
            field = max(shares, key=lambda name: shares[name])
            lines.append(f"  What mattered most among the whole trials: {field} ({shares[field]:.0%}).")
    for m in (record["metrics"] for record in results.get("validation_difference", [])):
        lines.append(
            f"  Trained anew, {m['seeds']} seeds, NDCG@10 on validation: default {m['base']:.4f}, tuned "
            f"{m['value']:.4f}, {interval_text(m)}; single seeds {m['seed_low']:+.4f} to "
            f"{m['seed_high']:+.4f}."
        )
    for record in (r for r in results.get("comparison", []) if _model(r) == "tuned"):
        m, metric = record["metrics"], record["own_params"]["metric"].upper()
        lines.append(
            f"  Test {metric}, tuned against default: {interval_text(m)}, adjusted p {m['adjusted_p']:.3f}: "
            f"{_claim(m)} (it could have seen {m['detectable']:.3f}; scored {record['earlier']} times "
            "before)."
        )
    if not results.get("comparison"):
        lines.append("  Not compared with the default yet: nothing of it is a result.")
    return lines


def beside_sizes(records: Sequence[Record], study: str) -> list[str]:
    """Compare a study's tuned settings with the widths of a grid on the same data, in one sentence.

    The metric is mean NDCG@10 on validation over seeds. Empty if one of them is missing.
    """
    tuned = [r for r in records if r["data"]["name"] == study and r["name"] == "validation_difference"]
    if not tuned:
        return []
    value, data = tuned[-1]["metrics"]["value"], tuned[-1]["data"]["fingerprint"]
    curves = (r for r in records if r["name"] == "learning_curve" and r["data"]["fingerprint"] == data)
    grid = _by((r for r in curves if r["data"]["name"].startswith("scaling-")), _model)
    means = {  # of the recipe itself
        name: sum(r["metrics"]["valid_ndcg@10"] for r in runs) / len(runs)
        for name, runs in grid.items()
        if " " not in name
    }
    above = [f"{name} ({mean:.4f})" for name, mean in means.items() if mean >= value]
    if not means:
        return []
    line = f"  Of {len(means)} sizes trained by one recipe on the same data, those that rank validation as "
    return [f"{line}well as the tuned settings do ({value:.4f}): {', '.join(above) or 'none'}."]


FASTER = 1.05  # times the rate of fp32 eager: the least that counts as faster

# -- 04 ------------------------------------------------------------------------------------------------------


def _of_speed(results: Results) -> list[str]:
    """Compare precisions and compile modes with a plain step, then list the rungs of the ladder."""
    timed = [r for r in results.get("ladder", []) if r["timings"].get("step_seconds")]
    rungs = sorted(timed, key=lambda r: r["own_params"]["rung"])
    names = [r["own_params"]["name"] for r in rungs]
    seconds = [r["timings"]["step_seconds"] for r in rungs]
    steps = [r for r in results.get("step", []) if r["kind"] == "measured"]
    sentences = _speed_answer(steps)
    if len(rungs) > 1:
        best = int(np.argmin(seconds))
        factor, label = seconds[0] / seconds[best], rungs[0]["label"]
        change = f"From the {names[0]} to “{names[best]}”"
        sentences.append(f"{change} a step is {factor:.1f} times faster ({label}).")
    sentences += _rates(steps)
    for place in range(1, len(rungs)):
        faster, total = seconds[place - 1] / seconds[place], seconds[0] / seconds[place]
        sentences.append(
            f"{names[place]}: {faster:.2f} times the speed of the rung before, {total:.1f} times that of the "
            f"{names[0]}."
        )
    for params, took in ((r["own_params"], r["timings"]) for r in steps):
        if params.get("ran_compile_mode", "off") != "off" and took.get("compile_seconds"):
            paid = took.get("break_even_steps")
            pays = f"has paid after {paid:,} steps" if paid else "never pays"
            start = f"{params['compile_mode']} in {params['precision']}: compiling took"
            sentences.append(f"{start} {took['compile_seconds']:.1f} s and {pays}.")
    curves = [r for r in results.get("loss_curve", []) if r["timings"].get("largest_gap") is not None]
    gaps = {r["own_params"]["precision"]: r["timings"]["largest_gap"] for r in curves}
    if gaps:
        listed = ", ".join(f"{name} {value:.1e}" for name, value in gaps.items())
        sentences.append(f"Largest relative difference of a step's loss: {listed}.")
    return sentences


def _speed_answer(steps: Sequence[Record]) -> list[str]:
    """Say whether any precision or compile mode is faster than eager fp32 at the largest batch."""
    if not (rates := _shares(steps)):
        return []
    batch, (_, shares) = max(rates.items())
    if not shares:
        return []
    name, best = max(shares.items(), key=lambda item: item[1])
    label, listed = steps[0]["label"], ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    start = f"{name} runs {best:.2f} times as fast as fp32 eager ({label}, batch {batch})"
    if best < FASTER:
        start = f"Nothing on {label}: no variant is over {FASTER - 1:.0%} faster than fp32 eager, "
        start += f"batch {batch}"
    return [f"{start}; rates as multiples of it: {listed}."]


def _shares(steps: Sequence[Record]) -> dict[int, tuple[float, dict[str, float]]]:
    """Return by batch size the rate of eager fp32, and those of other variants as multiples of it."""
    batches: dict[int, dict[str, float]] = {}
    for params, rate in ((r["own_params"], r["timings"].get("sequences_per_second")) for r in steps):
        if rate:
            mode = "" if params["compile_mode"] == "off" else f" compiled ({params['compile_mode']})"
            batches.setdefault(params["batch_size"], {})[params["precision"] + mode] = rate
    shares = {}
    for batch, rates in batches.items():
        if plain := rates.pop("fp32", None):
            fastest_first = sorted(rates, key=lambda name: -rates[name])
            shares[batch] = plain, {name: rates[name] / plain for name in fastest_first}
    return shares


def _rates(steps: Sequence[Record]) -> list[str]:
    """Return a sentence on the rates of all variants for each batch size."""
    sentences = []
    for batch, (plain, shares) in sorted(_shares(steps).items(), reverse=True):
        listed = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
        start = f"fp32 eager on {_place(steps).split(' (')[0]} at batch {batch}: {plain:,.0f} sequences/s"
        sentences.append(start + (f"; as multiples of it: {listed}." if listed else "."))
    return sentences


# -- 05 ------------------------------------------------------------------------------------------------------


def _of_adapters(results: Results) -> list[str]:
    """Say whether the user's gate helps, then list step times, accuracy and comparisons."""
    compared = [r for r in results.get("gate_comparison", []) if r["own_params"]["metric"] == "ndcg@10"]
    means = [r for r in results.get("adaptation", []) if r.get("seed") is None]
    verdicts, details = [], []
    for task, name in TASK_NAMES.items():
        rows = [r for r in compared if r["own_params"]["task"] == task]
        if rows:
            verdicts.append(_gate_verdict(rows, name))
            arms_by_claim = {w: [ARM_NAMES[_model(r)] for r in part] for w, part in _by_claim(rows).items()}
            listed = "; ".join(f"{word}: {', '.join(names)}" for word, names in arms_by_claim.items())
            details.append(f"{name[:1].upper()}{name[1:]}, NDCG@10 against iLoRA, corrected: {listed}.")
        arms = {_model(r): r["metrics"] for r in means if r["own_params"]["task"] == task}
        if arms:
            best = max(arms, key=lambda arm: arms[arm]["ndcg@10"])
            labels = {arm: f"{ARM_NAMES[arm]}, NDCG@10 {m['ndcg@10']:.4f}" for arm, m in arms.items()}
            references = [labels[arm].replace(", NDCG@10", "") for arm in ("none", "ilora") if arm in arms]
            details.append(f"{name}: best is {labels[best]}; {', '.join(references)}.")
            new = [f"{ARM_NAMES[arm]} {m['hr@10_new']:.3f}" for arm, m in arms.items() if m.get("hr@10_new")]
            details.append(f"{name}: HR@10 on new items above 0: {', '.join(new) or 'no arm'}.")
    for params, m in ((r["own_params"], r["metrics"]) for r in compared):
        details.append(
            f"{TASK_NAMES[params['task']]}, {ARM_NAMES[params['model']]} against iLoRA: {_claim(m)}, "
            f"{interval_text(m)}; one comparison alone finds {m['detectable']:.4f} four times in five."
        )
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
    for size, rows in _by(plans, lambda record: record["own_params"]["size"]).items():
        best = max(rows, key=lambda r: r["timings"]["sequences_per_second"])
        low, high = (best["timings"][f"epoch_seconds_{end}"] for end in ("low", "high"))
        rate = 0.99 * best["timings"]["sequences_per_second"]
        as_fast = {r["own_params"]["device"] for r in rows if r["timings"]["sequences_per_second"] >= rate}
        fastest = best["own_params"]["device"]
        if len(as_fast) > 2:
            fastest = f"{len(as_fast)} of them alike, whose step waits for the host"
        sentence = (
            f"{size}: fits on {len({r['own_params']['device'] for r in rows})} boards; fastest {fastest}, an "
            f"epoch in {low:.0f} to {high:.0f} s (predicted)."
        )
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
    plans = of_devices(results)
    start = measured_on_gpus(steps)
    if plans and not start:
        start = ["No GPU was measured in this run: all that follows is predicted."]
    return [*([" ".join(start + plans)] if plans or start else []), measured, *planner_errors()]


def measured_on_gpus(steps: Sequence[Record]) -> list[str]:
    """Return the measured sequences/s of each GPU by size, in its fastest precision."""
    rates: dict[str, dict[str, tuple[float, str]]] = {}
    for r in steps:
        if r["kind"] == "measured" and tables.cpu_of(r) is None and r["timings"].get("sequences_per_second"):
            params, rate = r["own_params"], r["timings"]["sequences_per_second"]
            sizes = rates.setdefault(tables.device_of(r), {})
            sizes[params["size"]] = max(sizes.get(params["size"], (0.0, "")), (rate, params["precision"]))
    sentences = []
    for device, sizes in rates.items():
        listed = [f"{size} {rate:,.0f} sequences/s ({name})" for size, (rate, name) in sizes.items()]
        sentences.append(f"{device}, measured: {', '.join(listed)}.")
    return sentences


def _of_plans(results: Results) -> list[str]:
    """Say on which GPUs the planned run fits, which is the fastest, and how many plans are validated."""
    plans = results.get("plan", [])
    boards = [r for r in plans if r["metrics"].get("fits") is not None]
    if not boards:
        return []
    fit, params = [r for r in boards if r["metrics"]["fits"]], boards[0]["own_params"]
    run = f"{params['size']} at a batch of {params['batch_size']:,}"
    sentences = [f"{run} fits on {len(fit)} of {len(boards)} GPUs (predicted)."]
    for basis in ("validated", "unvalidated"):
        sentences.append(f"{sum(r['own_params']['basis'] == basis for r in plans)} plans are {basis}.")
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
    datasets = _by(tables.by_size(records), lambda r: r["data"]["name"])
    answer = [*_of_sizes(datasets), *_of_counts(datasets)]
    starts = {  # start of a notebook's sentence, and its replacement here
        "04_amp_compile": ("From the", "How cheaply: from the"),
        "05_ilora": (f"No, {TASK_NAMES['next_period']}:", "What does not pay: a gate on the user's history."),
    }
    for notebook, (start, opening) in starts.items():
        chapter = tables.best_work(r for r in records if r["notebook"] == notebook and tables.of_study(r))
        lines = []
        for rows in _by(chapter, lambda r: _place([r])).values():
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
        widths = _by((r for r in rows if "valid_ndcg@10" in r["metrics"]), _model)
        arms = [m for m in widths if sweep_of(m) == "width" and recipe_of(m) == "bert4rec"]
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
        shapes = [value for m, value in tested.items() if sweep_of(m).startswith(tables.SHAPES)]
        ours = [v for m, v in tested.items() if recipe_of(m) == "bert4rec" and m not in BASELINES]
        if shapes and ours:
            text += f" On {name} {tables.SHAPES} have {min(shapes):.3f} to {max(shapes):.3f} on the test "
            text += f"split, ours {min(ours):.3f} to {max(ours):.3f}."
    return [text]


def _of_counts(datasets: Mapping[str, Sequence[Record]]) -> list[str]:
    """Compare the best count with the best model on the test split, on each dataset of `tables.by_size`."""
    parts, behind = [], []
    for name, rows in datasets.items():
        tested = {_model(r): r["metrics"]["ndcg@10"] for r in rows if r["name"] == "test_metrics"}
        counts = [m for m in tested if m in COUNTS]
        if counts and (trained := [m for m in tested if m not in BASELINES]):
            count, model = (max(group, key=lambda m: tested[m]) for group in (counts, trained))
            scores = [f"{model_name(m)} {tested[m]:.3f}" for m in (count, model)]
            parts.append(f"on {name} {', '.join(scores)}")
            behind += [name] if tested[count] > tested[model] else []
    if not parts:
        return []
    ahead = "is behind a trained model everywhere"
    if behind:
        ahead = f"is ahead of every trained model on {' and '.join(behind)}"
    return [f"Counting, with nothing trained, {ahead}. Best NDCG@10 on the test split: {'; '.join(parts)}."]


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
