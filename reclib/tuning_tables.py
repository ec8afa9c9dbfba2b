"""What the records of tuning say, as tables and as sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from reclib.claims import claim

Record = Mapping[str, Any]


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


def findings(records: Sequence[Record], study: str) -> list[str]:
    """Return sentences on a study: its trials, what it chose, what mattered, what is left anew."""
    mine = [r for r in records if r["data"]["name"] == study]
    trials = [r for r in mine if r["name"] == "trial"]
    if not trials:
        return [f"- {study}: no trial is committed yet."]
    pruned = sum(r["own_params"]["state"] == "pruned" for r in trials)
    said = [f"- {study}: {len(trials)} trials, {pruned} of them pruned."]
    chosen = [r for r in mine if r["name"] == "tuning"]
    if chosen:
        newest = max(chosen, key=lambda r: str(r["time"]))
        own, value = newest["own_params"], newest["metrics"]["valid_ndcg@10"]
        drawn = ", ".join(f"{k} {v:.3g}" for k, v in own.items() if k not in ("study", "trial"))
        said[0] += f" The best, trial {own['trial']}, has NDCG@10 {value:.4f} on validation: {drawn}."
        shares = dict(zip(*(newest["series"].get(k, ()) for k in ("field", "share")), strict=True))
        if shares:
            first = max(shares, key=lambda name: shares[name])
            said.append(f"  What mattered most among the whole trials: {first} ({shares[first]:.0%}).")
    for one in (r for r in mine if r["name"] == "validation_difference"):
        m = one["metrics"]
        said.append(
            f"  Trained anew, {m['seeds']} seeds, NDCG@10 on validation: default {m['base']:.4f}, tuned "
            f"{m['value']:.4f}, {_interval(m)}; single seeds {m['seed_low']:+.4f} to {m['seed_high']:+.4f}."
        )
    for one in (r for r in mine if r["name"] == "comparison" and r["own_params"]["model"] == "tuned"):
        m, metric = one["metrics"], one["own_params"]["metric"].upper()
        claimed = claim(m["difference"], m["adjusted_p"], (m["seeds"], m["reference_seeds"]))
        said.append(
            f"  Test {metric}, tuned against default: {_interval(m)}, adjusted p {m['adjusted_p']:.3f}: "
            f"{claimed} (it could have seen {m['detectable']:.3f}; scored {one['earlier']} times before)."
        )
    if not any(r["name"] == "comparison" for r in mine):
        said.append("  Not compared with the default yet: nothing of it is a result.")
    return said


def beside_sizes(records: Sequence[Record], study: str) -> list[str]:
    """Return a sentence that sets a study's tuned settings against the widths of a grid on the same data.

    Both in mean NDCG@10 on validation over seeds. Empty where one of them is missing.
    """
    tuned = [r for r in records if r["data"]["name"] == study and r["name"] == "validation_difference"]
    if not tuned:
        return []
    value, data = tuned[-1]["metrics"]["value"], tuned[-1]["data"]["fingerprint"]
    curves = [r for r in records if r["name"] == "learning_curve" and r["data"]["fingerprint"] == data]
    grid: dict[str, list[float]] = {}
    for row in (r for r in curves if r["data"]["name"].startswith("scaling-")):
        name = str(row["own_params"]["model"])
        if " " not in name:  # arms of the recipe itself
            grid.setdefault(name, []).append(row["metrics"]["valid_ndcg@10"])
    means = {name: sum(values) / len(values) for name, values in grid.items()}
    above = [f"{name} ({mean:.4f})" for name, mean in means.items() if mean >= value]
    if not means:
        return []
    return [
        f"  Of {len(means)} sizes trained by one recipe on the same data, those that rank validation as well "
        f"as the tuned settings do ({value:.4f}): {', '.join(above) or 'none'}."
    ]


def _interval(m: Mapping[str, float]) -> str:
    return f"{m['difference']:+.4f} ({m['difference_low']:+.4f} to {m['difference_high']:+.4f})"
