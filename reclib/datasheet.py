"""Tables that say what a dataset is: what was read, what is left, what it should have been.

They are made from the manifest of the preparation, for people; `describe` counts what the arrays hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from reclib import data, fetch, sources
from reclib.config import DataConfig, InputError, changed
from reclib.data import Dataset
from reclib.describe import date_text
from reclib.splits import Split

CHEAP_INTERACTIONS = 2_000_000  # up to which a source is prepared a second time for a comparison


def reading(dataset: Dataset) -> pd.DataFrame:
    """Tabulate what was read, how, and by which rules, as the manifest has it."""
    manifest = dataset.manifest
    source, core = manifest["source"], manifest["core"]
    shown = {name: source[name] for name in source if name != "published_counts"}
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in shown.items()}
    shown["lines"] = f"{manifest['reading']['lines']:,}"
    shown["time unit"] = manifest["time_unit"]
    shown["order"] = manifest["rules"]["order"]
    shown["duplicates"] = manifest["rules"]["duplicates"]
    passes = len(core["passes"])
    shown["k-core"] = f"{core['min_user']} per user, {core['min_item']} per item, {core['rule']}"
    shown["k-core passes"] = f"{passes}" if passes else "none: it was a k-core already"
    shown["fingerprint"] = dataset.fingerprint
    return pd.DataFrame({"": shown})


def rejected(dataset: Dataset) -> pd.DataFrame:
    """Tabulate the lines that were no valid interactions, by reason; empty where all were valid."""
    found, lines = dataset.manifest["reading"]["rejected"], dataset.manifest["reading"]["lines"]
    rows = [(reason, count, f"{100 * count / lines:.2g}%") for reason, count in found.items()]
    return pd.DataFrame(rows, columns=["rejected because", "lines", "share"]).set_index("rejected because")


def rejected_examples(dataset: Dataset) -> pd.DataFrame:
    """Tabulate the first rejected lines: number, what is wrong, how the line begins."""
    examples = dataset.manifest["reading"]["rejected_examples"]
    return pd.DataFrame(examples, columns=["line", "reason", "text"]).set_index("line")


def counts(dataset: Dataset) -> pd.DataFrame:
    """Tabulate the counts after each step, with the published ones beside the source where known."""
    rows = list(dataset.manifest["steps"])
    known = published(dataset)
    if known:
        rows.insert(1, {"step": "published", **known})
    return pd.DataFrame(rows).set_index("step").map(_readable)


def published(dataset: Dataset) -> dict[str, int]:
    """Return the published counts of a public dataset's source; none for a file of one's own."""
    source = dataset.manifest["source"]
    if source.get("origin") in ("file", "synthetic"):
        return {}
    entry = fetch.catalogue().get(dataset.name)
    return source.get("published_counts") or (entry.counts if entry else {})


def cores(dataset: Dataset, config: DataConfig) -> pd.DataFrame:
    """Tabulate what each rule of the k-core leaves: the fixed point, and the seed study's single pass.

    The other rule means preparing the source again. That is left out for a prepared folder, which
    has forgotten what it removed, and for a source of more than `CHEAP_INTERACTIONS`.
    """
    made = dataset.manifest["core"]["rule"]
    other = "single_pass" if made == "fixed_point" else "fixed_point"
    rows = {made: _core(dataset)}
    if dataset.manifest["steps"][0]["interactions"] > CHEAP_INTERACTIONS:
        rows[other] = {"passes": "not computed: the source is large"}
    elif sources.prepared_folder(config) is not None:
        rows[other] = {"passes": "not computed: the folder holds only what is left"}
    else:
        try:
            rows[other] = _core(data.prepare(changed(config, core=other)))
        except InputError as error:
            rows[other] = {"passes": str(error)}
    return pd.DataFrame(rows).T.map(_readable)


def about_splits(dataset: Dataset, found: Mapping[str, Split]) -> pd.DataFrame:
    """Tabulate what each split says of itself: counts, time points as dates, what was left out."""
    columns = {}
    for split in found.values():
        rows: dict[str, Any] = {}
        for name, value in split.about.items():
            if name == "time_points":
                value = {part: date_text(dataset, point) for part, point in value.items()}
            inner = value if isinstance(value, dict) else {"": value}
            rows |= {f"{name}: {key}".removesuffix(": ").replace("_", " "): inner[key] for key in inner}
        columns[split.name] = {key: rows[key] for key in rows if key not in ("rule", "time unit")}
    return pd.DataFrame(columns).map(_readable)


def downloads() -> pd.DataFrame:
    """Tabulate the public datasets that can be fetched by name: counts, size, format, licence."""
    rows = [
        {
            "name": entry.name,
            **{what: entry.counts.get(what) for what in ("interactions", "users", "items")},
            "download, MB": entry.bytes and round(entry.bytes / 1e6, 1),
            "format": entry.format,
            "licence": entry.licence,
        }
        for entry in fetch.catalogue().values()
    ]
    table = pd.DataFrame(rows).set_index("name")
    return table.map(lambda value: "unknown" if pd.isna(value) else _readable(value))


def _core(dataset: Dataset) -> dict[str, Any]:
    core = dataset.manifest["core"]
    row = dict(next(step for step in dataset.manifest["steps"] if step["step"] == "k-core"))
    del row["step"]
    per_item = np.bincount(dataset.items, minlength=dataset.num_items + 1)[1:]
    row["users below min_user"] = int((dataset.lengths < core["min_user"]).sum())
    row["items below min_item"] = int((per_item < core["min_item"]).sum())
    left = [f"{count:,}" for count in core["passes"]]
    return row | {"passes": " → ".join(left) or "none: it was a k-core already"}


def _readable(value: Any) -> Any:
    """Return whole numbers with their thousands marked, what is missing as nothing."""
    if isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer()):
        return f"{int(value):,}"
    return "" if isinstance(value, float) and np.isnan(value) else value
