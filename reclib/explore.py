"""Turning the study's records: which results there are, what can be drawn against what, and a point's origin.

Pure functions under the widgets of notebook 07, so that a reader without a kernel sees the same figures and
tests need no browser. A choice of axes is a `Selection`, which the notebook's parameters can state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import yaml

from reclib.config import InputError, nearest
from reclib.tables import PROFILES, Record, model_name

# What says where a number is from; never an axis.
ORIGIN = (
    "notebook",
    "kind",
    "label",
    "device",
    "dataset",
    "profile",
    "model",
    "seed",
    "commit",
    "torch",
    "day",
)
COLORS = (
    "model",
    "label",
    "dataset",
    "profile",
    "kind",
    "size",
    "precision",
    "compile_mode",
    "protocol",
    "seed",
)
# Axes to begin with: what is sought, against what it costs.
_UPWARDS = ("ndcg@10", "valid_ndcg@10", "sequences_per_second", "difference", "coverage")
_ACROSS = ("non_embedding", "parameters", "hr@10", "peak_memory_bytes", "train_seconds", "gini")
_ENDS = ("_low", "_high")  # of intervals: drawn as bars, no axes of their own


@dataclass(frozen=True)
class Selection:
    """What to draw: a kind of result, two of its numbers, what colours tell apart, and which devices."""

    result: str
    x: str
    y: str
    color: str = "model"
    labels: tuple[str, ...] = ()  # device labels; none: all


def results(records: Iterable[Record]) -> dict[str, int]:
    """Return the kinds of results that have at least two numbers to draw, with the number of records."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record["name"]] = counts.get(record["name"], 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def frame(records: Iterable[Record], result: str) -> pd.DataFrame:
    """Return one row for each record of this kind: its numbers, what it was run with, and its origin.

    Series are left out: a curve has a figure of its own. Raises `InputError` where there is none.
    """
    known = list(records)
    rows = [_row(record) for record in known if record["name"] == result]
    if not rows:
        here = results(known)
        raise InputError(
            f"no record of {result!r}{nearest(result, here)}; there are: {', '.join(here) or 'none'}"
        )
    found = pd.DataFrame(rows)
    ranks = {name: place for place, name in enumerate(PROFILES)}
    order = found["profile"].map(lambda name: ranks.get(name, -1))
    return found.assign(_order=order).sort_values("_order", kind="stable").drop(columns="_order")


def _row(record: Record) -> dict[str, Any]:
    asked = _plain(record.get("params") or {})
    said = record.get("configuration") or {}
    for part in ("model", "train"):
        asked |= _plain(said.get(part) or {})
    own = _plain(record.get("own_params") or {})
    device, data = record.get("device") or {}, record.get("data") or {}
    origin = {
        "notebook": record["notebook"],
        "kind": record["kind"],
        "label": record["label"],
        "device": device.get("name"),
        "dataset": data.get("name"),
        "items": data.get("items"),
        "profile": record["profile"],
        "model": model_name(str(own.get("model", "bert4rec"))),
        "seed": record.get("seed"),
        "commit": ((record.get("git") or {}).get("commit") or "")[:10] or None,
        "torch": (record.get("versions") or {}).get("torch"),
        "day": str(record.get("time") or "")[:10],
    }
    return asked | own | (record.get("timings") or {}) | record["metrics"] | origin


def _plain(values: Any) -> dict[str, Any]:
    return {key: v for key, v in values.items() if isinstance(v, str | int | float | bool)}


def numbers(rows: pd.DataFrame) -> list[str]:
    """Return the columns that can be an axis: numbers with at least two values, measured ones first."""
    found = []
    for name in rows.columns:
        column = rows[name]
        if name in ORIGIN or name.endswith(_ENDS) or column.map(lambda v: isinstance(v, bool | str)).any():
            continue
        if pd.to_numeric(column, errors="coerce").nunique() > 1:
            found.append(str(name))
    return found


def colors(rows: pd.DataFrame) -> list[str]:
    """Return the columns that colours can tell apart here."""
    return [name for name in COLORS if name in rows and rows[name].notna().any()]


def first_selection(records: Sequence[Record], result: str) -> Selection:
    """Return a choice of axes to begin with; raise `InputError` where a result has fewer than two numbers."""
    rows = frame(records, result)
    axes = numbers(rows)
    tints = sorted(colors(rows), key=lambda name: rows[name].nunique() < 2)  # what tells rows apart first
    if len(axes) < 2:
        raise InputError(
            f"{result!r} has {len(axes)} numbers that differ between its records: nothing to draw"
        )
    y = next((name for name in _UPWARDS if name in axes), axes[1])
    x = next((name for name in [*_ACROSS, *axes] if name in axes and name != y), axes[0])
    return Selection(result, x, y, tints[0])


def chosen(records: Iterable[Record], selection: Selection) -> pd.DataFrame:
    """Return the rows to be drawn; raise `InputError` for an axis, colour or label that is not there."""
    rows = frame(records, selection.result)
    allowed = {"x": numbers(rows), "y": numbers(rows), "color": colors(rows)}
    for field, names in allowed.items():
        name = getattr(selection, field)
        if name not in names:
            said = f"{field}={name!r}{nearest(name, names)}; {selection.result!r} has: {', '.join(names)}"
            raise InputError(said)
    for label in selection.labels:
        if label not in set(rows["label"]):
            here = ", ".join(sorted(set(rows["label"])))
            raise InputError(f"labels: {label!r} has no record of {selection.result!r}; there are: {here}")
    if selection.labels:
        rows = rows[rows["label"].isin(selection.labels)]
    return rows.dropna(subset=[selection.x, selection.y])


def origin(row: pd.Series) -> str:
    """Return what hovering over a point says: where its number is from, a line each."""
    said = [
        f"{name}: {row[name]}" for name in ORIGIN if name in row and pd.notna(row[name]) and row[name] != ""
    ]
    return "<br>".join(said)


def as_parameters(selection: Selection) -> str:
    """Return a selection as YAML, a parameter file of the notebook: `papermill ... -f FILE`."""
    values = asdict(selection) | {"labels": list(selection.labels)}
    return yaml.safe_dump(values, sort_keys=False).strip()
