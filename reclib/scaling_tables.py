"""What the records of a scaling grid say, as tables and as sentences; right with few runs and with all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from reclib import claims, gathered, gridfile
from reclib.config import InputError, ModelConfig
from reclib.sweeps import RATES, sweep_of
from reclib.workload import parameters

Record = Mapping[str, Any]
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


def missing(rows: Sequence[Record], name: str) -> list[str]:
    """Return the arms of a grid's file that lack seeds, each with how many are there: `arm (1 of 3)`.

    Empty where the file is not here.
    """
    try:
        arms = gridfile.read(name).arms
    except InputError:
        return []
    there = {(r["own_params"]["model"], r["seed"]) for r in rows}
    counts = {arm.name: sum((arm.name, seed) in there for seed in arm.seeds) for arm in arms}
    return [f"{a.name} ({counts[a.name]} of {len(a.seeds)})" for a in arms if counts[a.name] < len(a.seeds)]


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


def findings(
    rows: Sequence[Record], outcome: Mapping[str, Any], name: str, absent: Sequence[str] = ()
) -> list[str]:
    """Return sentences on a grid: the law and its error, what does not scale, is undertrained or `absent`."""
    if not rows:
        return [f"- {name}: no run is committed yet."]
    table = by_arm(rows)
    best = str(table["loss"].idxmin())
    hours = table["hours"].sum()
    said = [
        f"- {name}: {len(rows)} runs of {len(table)} configurations, {int(table['trained_tokens'].max()):,} "
        f"tokens each at most, {hours:.1f} hours of a machine that did other work beside it; lowest mean "
        f"loss {table['loss'].min():.3f} nats, with {best} ({int(table['non_embedding'][best]):,} of "
        f"{int(table['non_embedding'].max()):,} non-embedding parameters at most)."
    ]
    said += _of_the_law(outcome)
    parts = [_of_width(table), _of_depth_and_tables(table), _of_rates(rows), _of_purchase(table)]
    said += [f"  {line}" for line in itertools.chain(*parts)]
    late = table.index[table["late_drop"] > LATE]
    said.append(f"  Undertrained (over {LATE} nats fell in the last fifth): {', '.join(late) or 'none'}.")
    risen = [f"{arm} ({up:+.3f})" for arm, up in table["risen"].items() if up > LATE]
    said.append(f"  Loss risen again at the end, in nats above its lowest: {', '.join(risen) or 'none'}.")
    few = [f"{arm} ({int(n)})" for arm, n in table["seeds"].items() if n < 3 and "rate" not in str(arm)]
    said.append(f"  Fewer than three seeds: {', '.join(few) or 'none'}.")
    if absent:
        said.append(f"  Not trained yet, of the file: {', '.join(absent)}.")
    return said


def _of_the_law(outcome: Mapping[str, Any]) -> list[str]:
    one = outcome["prediction"]
    if one is None:
        return ["  No law yet: its sizes are not all trained, and nothing is predicted."]
    m, own = one["metrics"], one["own_params"]
    band = "no band, since no size had two seeds"
    if m["low"] is not None:
        band = f"{m['low']:.3f} to {m['high']:.3f} over resampled seeds"
    target = f"{own['of']} ({own['size']:,} non-embedding parameters; {band})"
    if m["factor"] < 1e-9:
        said = [
            f"  No power of the size: the loss does not fall. {m['predicted']:.3f} nats predicted for "
            f"{target}."
        ]
    else:
        formula = f"{m['floor']:.3f} + {m['factor']:.3g} N^-{m['exponent']:.3f}"
        said = [f"  Law {formula}; it predicts {m['predicted']:.3f} nats for {target}."]
        if m.get("exponent_low") is not None:
            said.append(
                f"  The exponent itself is known to {m['exponent_low']:.2f} to {m['exponent_high']:.2f} "
                "only: the law says where the next size lands, not where the loss ends."
            )
    if m["without_low"] is not None:
        said.append(
            f"  Without any one size it says {m['without_low']:.3f} to {m['without_high']:.3f}: "
            "how far the fit hangs on a single point."
        )
    if outcome["measured"] is None:
        return [*said, f"  {own['of']} is not measured yet; its record will carry {one['params_hash']}."]
    error = f"error {outcome['error']:+.3f} nats ({outcome['relative_error']:+.1%})"
    place = ""
    if m["low"] is not None:
        place = ", inside the band" if m["low"] <= outcome["measured"] <= m["high"] else ", outside the band"
    said.append(f"  Measured {outcome['measured']:.3f} over {outcome['seeds']} seed(s): {error}{place}.")
    if naive := outcome.get("naive"):
        said.append(
            "  The same points without a law: no gain over the last of them misses by "
            f"{naive['last'] - outcome['measured']:+.3f} nats, a straight line in log N by "
            f"{naive['line'] - outcome['measured']:+.3f}."
        )
    return said


def _of_width(table: pd.DataFrame) -> list[str]:
    """Say what each step in width took off the loss, and where the seeds' ranges do not part."""
    arms = [str(arm) for arm in table.index if sweep_of(str(arm)) == "width"]
    steps: dict[str, list[str]] = {metric: [] for metric in ("loss", "ndcg@10", "hr@10") if metric in table}
    same: dict[str, list[str]] = {metric: [] for metric in steps}
    against = []
    for small, large in itertools.pairwise(arms):
        a, b = table.loc[small], table.loc[large]
        both = f"{small} and {large}"
        for metric in steps:
            steps[metric].append(f"{b[metric] - a[metric]:+.4f}")
            if not _parted(a, b, metric):
                same[metric].append(both)
        if "ndcg@10" in steps and (b["loss"] - a["loss"]) * (b["ndcg@10"] - a["ndcg@10"]) > 0:
            against.append(both)
    if len(arms) < 2:
        return []
    names = {metric: metric.upper() if "@" in metric else f"{metric} (nats)" for metric in steps}
    overlap = [f"{names[metric]}: {', '.join(found) or 'none'}" for metric, found in same.items()]
    changes = [f"{names[metric]} {', '.join(found)}" for metric, found in steps.items()]
    return [
        f"Width, {' to '.join(arms)}, step by step: {'; '.join(changes)}.",
        f"Neighbours whose seeds' ranges overlap, so that the step is not told apart: {'; '.join(overlap)}.",
        f"Neighbours of which the one with the lower loss ranks worse: {', '.join(against) or 'none'}.",
    ]


def _of_depth_and_tables(table: pd.DataFrame) -> list[str]:
    """Say what depth at fixed tables and a second table gave, against the arm that they vary."""
    said = []
    for arm in map(str, table.index):
        kind = sweep_of(arm)
        base = arm.removesuffix(" untied") if kind == "untied tables" else f"{arm.split('d')[0]}d2"
        if kind not in ("depth", "untied tables") or base not in table.index:
            continue
        a, b = table.loc[base], table.loc[arm]
        parted = "" if _parted(a, b, "loss") else ", ranges of seeds overlap"
        ranked = f", NDCG@10 {b['ndcg@10'] - a['ndcg@10']:+.4f}" if "ndcg@10" in table else ""
        said.append(f"{arm} against {base}: {b['loss'] - a['loss']:+.3f} nats{ranked}{parted}.")
    return said


def _of_rates(rows: Sequence[Record]) -> list[str]:
    """Say whether the rule for the learning rate held where it was checked."""
    said = []
    for arm, one in rate_check(rows).iterrows():
        best = min(RATES, key=lambda name: one[name])
        held = "the rule's is the best of the three" if best == "rule" else f"{best} of it is better by"
        lost = "" if best == "rule" else f" {one['lost']:.3f} nats"
        said.append(
            f"Learning rate at {arm}, {int(one['seeds'])} seed(s): half {one['half']:.3f}, rule "
            f"{one['rule']:.3f}, twice {one['twice']:.3f} nats; {held}{lost} "
            f"(the rule's seeds lie {one['range']:.3f} apart)."
        )
        ranked = [one[f"ndcg@10 {name}"] for name in RATES]
        if not any(map(math.isnan, ranked)):
            top = list(RATES)[ranked.index(max(ranked))]
            shown = ", ".join(f"{name} {value:.4f}" for name, value in zip(RATES, ranked, strict=True))
            agreed = "as the loss says" if top == best else f"the loss says {best}"
            said[-1] += f" NDCG@10 {shown}: highest with {top}, {agreed}."
    return said


def _of_purchase(table: pd.DataFrame) -> list[str]:
    """Say which arm ranks best, which is the cheapest not told apart from it, and what FLOPs of width bought.

    Arms with too few seeds for a claim, and those of other rates, are left out.
    """
    kept = [arm for arm in table.index if sweep_of(str(arm)) != "other learning rate"]
    kept = [arm for arm in kept if claims.enough([table["seeds"][arm]])]
    if len(kept) < 2 or "ndcg@10" not in table:
        return []
    there = table.loc[kept].sort_values("TFLOP", kind="stable")
    best = str(there["ndcg@10"].idxmax())
    top = there.loc[best]
    cheap = next(str(arm) for arm, one in there.iterrows() if not _parted(one, top, "ndcg@10"))
    said = f"What to buy, by NDCG@10 on validation, of those with {claims.MIN_SEEDS} seeds: "
    said += f"{best} ranks best ({top['ndcg@10']:.4f}); "
    if cheap == best:
        said += "no cheaper one has a seed that reaches its worst."
    else:
        one = there.loc[cheap]
        share = one["TFLOP"] / top["TFLOP"]
        said += f"the cheapest not told apart is {cheap} ({one['ndcg@10']:.4f}), at {share:.0%} of its FLOPs."
    widths = there[[sweep_of(str(arm)) == "width" for arm in there.index]]
    if len(widths) > 1:
        first, last = widths.iloc[0], widths.iloc[-1]
        gain = (last["ndcg@10"] - first["ndcg@10"]) / math.log2(last["TFLOP"] / first["TFLOP"])
        span = f"From {widths.index[0]} to {widths.index[-1]}"
        said += f" {span} a doubling of training FLOPs is worth {gain:+.4f}."
    return [said]


def _parted(a: Any, b: Any, metric: str) -> bool:
    """Whether the ranges over seeds of two arms do not overlap; with one seed each a range is a point."""
    low, high = f"{metric}_low", f"{metric}_high"
    return bool(a[high] < b[low] or b[high] < a[low])


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
                "device": gathered.device_of(one),
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


def size_findings(steps: pd.DataFrame, named: Collection[str]) -> list[str]:
    """Return a sentence for each device of the table of `real_steps`, and on the sizes that it lacks."""
    said = [] if len(steps) else [f"- Steps of the named sizes: not measured yet: {', '.join(named)}."]
    for device, part in steps.groupby("device") if len(steps) else ():
        shown = [
            f"{size} {one['step s']:.2f} s, {one['peak GB']:.1f} GB at peak, {one[FLOOR]:.2f} times its floor"
            for size, one in part.iterrows()
        ]
        absent = [name for name in named if name not in part.index]
        last = f" Not measured there: {', '.join(absent)}." if absent else ""
        said.append(
            f"- Steps of the named sizes at their own catalogues, {device}: {'; '.join(shown)}.{last}"
        )
    return said
