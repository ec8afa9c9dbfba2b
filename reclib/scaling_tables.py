"""What the records of a scaling grid say, as a table and as sentences; right with few runs and with all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from reclib import gathered

Record = Mapping[str, Any]
LATE = 0.01  # nats off the lowest loss in the last fifth of the training: above it a run is undertrained


def by_arm(rows: Sequence[Record]) -> pd.DataFrame:
    """Return one row for each arm: its size, the seeds' mean loss and range, NDCG@10, tokens and FLOPs."""
    frame = pd.DataFrame([{"arm": r["own_params"]["model"], "seed": r["seed"]} | r["metrics"] for r in rows])
    parts = frame.groupby("arm", sort=False)
    counted = ["item_tables", "non_embedding", "trained_tokens", "training_flops", "late_drop"]
    table = parts[counted].mean()
    table.insert(0, "seeds", parts["seed"].nunique())
    loss = parts["lowest_valid_loss"]
    table["loss"], table["loss_low"], table["loss_high"] = loss.mean(), loss.min(), loss.max()
    table["ndcg@10"] = parts["valid_ndcg@10"].mean()
    return table.sort_values(["non_embedding", "item_tables"], kind="stable")


def findings(rows: Sequence[Record], outcome: Mapping[str, Any], name: str) -> list[str]:
    """Return sentences on a grid: the law, its prediction and error, what is undertrained or missing."""
    if not rows:
        return [f"- {name}: no run is committed yet."]
    table = by_arm(rows)
    best = str(table["loss"].idxmin())
    said = [
        f"- {name}: {len(rows)} runs of {len(table)} configurations, {int(table['trained_tokens'].max()):,} "
        f"tokens each at most; lowest mean loss {table['loss'].min():.3f} nats, with {best} "
        f"({int(table['non_embedding'][best]):,} of {int(table['non_embedding'].max()):,} at most)."
    ]
    late = table.index[table["late_drop"] > LATE]
    said.append(f"  Undertrained (over {LATE} nats fell in the last fifth): {', '.join(late) or 'none'}.")
    few = [f"{arm} ({int(count)})" for arm, count in table["seeds"].items() if count < 3]
    said.append(f"  Fewer than three seeds: {', '.join(few) or 'none'}.")
    return said + _of_the_law(outcome)


def _of_the_law(outcome: Mapping[str, Any]) -> list[str]:
    one = outcome["prediction"]
    if one is None:
        return ["  No law yet: its sizes are not all trained, and nothing is predicted."]
    m, own = one["metrics"], one["own_params"]
    band = "no band, since no size had two seeds"
    if m["low"] is not None:
        band = f"{m['low']:.3f} to {m['high']:.3f} over resampled seeds"
    said = [
        f"  Law {m['floor']:.3f} + {m['factor']:.3g} N^-{m['exponent']:.3f}; it predicts "
        f"{m['predicted']:.3f} nats for {own['of']} ({own['size']:,} non-embedding parameters; {band})."
    ]
    if m["without_low"] is not None:
        said.append(
            f"  Without any one size it says {m['without_low']:.3f} to {m['without_high']:.3f}: "
            "how far the fit hangs on a single point."
        )
    if outcome["measured"] is None:
        return [*said, f"  {own['of']} is not measured yet; its record will carry {one['params_hash']}."]
    error = f"error {outcome['error']:+.3f} nats ({outcome['relative_error']:+.1%})"
    return [*said, f"  Measured {outcome['measured']:.3f} over {outcome['seeds']} seed(s): {error}."]


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
                "step s": round(took["step_seconds"], 3),
                "tokens/s": round(took["tokens_per_second"]),
                "peak GB": round(took["peak_memory_bytes"] / 1e9, 2),
                "held over 16 bytes per parameter": round(held / (16 * count), 2),
            }
        )
    return pd.DataFrame(rows).set_index("size") if rows else pd.DataFrame()
