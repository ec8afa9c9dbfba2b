"""Statistics of a dataset for notebook 01: results to record, and tables of its preparation.

Results are counted from the memory-mapped arrays in portions, with a few bytes of memory per interaction,
user and item. Tables are made from the manifest of the preparation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pandas as pd

from reclib.config import DataConfig, InputError, changed
from reclib.data import fetch, splits
from reclib.data.dataset import Dataset, Histories, evaluated_users
from reclib.data.prepare import prepare, prepared_folder
from reclib.data.splits import Split
from reclib.experiments.notebook import Result

CURVE_POINTS = 300  # of a curve that is stored; a catalogue may have hundreds of thousands of items
TIME_BINS = 60  # of equal width, from the first interaction to the last
PORTION = 1 << 20  # interactions looked at together
LONG_RUN = 10  # tied interactions at the end of a history; longer runs are counted with this one
CHEAP_INTERACTIONS = 2_000_000  # up to which a source is prepared a second time for a comparison
COUNTS = ("users", "items", "interactions")

# -- results -------------------------------------------------------------------------------------------------


def described(dataset: Dataset, divided: Mapping[str, Split]) -> list[Result]:
    """Return all results on a dataset and its splits; those about time need a dataset with times."""
    results = [count(dataset) for count in (steps, lengths, popularity, repeats)] + [cold(dataset, divided)]
    if dataset.times is not None:
        results += [over_time(dataset, divided), ties(dataset)]
        results += [last_items(dataset)] if evaluated_users(dataset).size else []
    return results


def steps(dataset: Dataset) -> Result:
    """Count users, items and interactions in the source and after the k-core."""
    source, core = dataset.manifest["steps"][0], _after_core(dataset)
    metrics = {name: core[name] for name in COUNTS} | {f"source_{name}": source[name] for name in COUNTS}
    return Result("preparation", metrics)


def lengths(dataset: Dataset) -> Result:
    """Count users by the number of their interactions."""
    length, users = np.unique(dataset.lengths, return_counts=True)
    metrics = {
        "mean_length": float(dataset.lengths.mean()),
        "median_length": float(np.median(dataset.lengths)),
        "min_length": int(length[0]),
        "max_length": int(length[-1]),
        "longer_than_200_share": float((dataset.lengths > 200).mean()),
    }
    return Result("sequence_lengths", metrics, series={"length": length.tolist(), "users": users.tolist()})


def popularity(dataset: Dataset) -> Result:
    """Count interactions of each item by popularity rank, and compute their Gini coefficient.

    It is 0 if all items occur equally often and near 1 if one item has all interactions. The series has at
    most `CURVE_POINTS` ranks, at equal steps of their logarithm.
    """
    counts = np.sort(_per_item(dataset))[::-1]
    shares = np.cumsum(counts) / counts.sum()  # share of interactions that the top items hold
    area = (shares.sum() - 0.5) / counts.size  # under that curve, by trapezoids: (1 + Gini) / 2
    ranks = np.unique(np.round(np.geomspace(1, counts.size, CURVE_POINTS))).astype(np.int64)
    metrics = {
        "gini": float(2 * area - 1),
        "top_tenth_share": float(shares[max(1, counts.size // 10) - 1]),
        "most_popular": int(counts[0]),
        "least_popular": int(counts[-1]),
    }
    series = {
        "rank": ranks.tolist(),
        "interactions": counts[ranks - 1].tolist(),
        "item_share": (ranks / counts.size).tolist(),
        "interaction_share": shares[ranks - 1].tolist(),
    }
    return Result("item_popularity", metrics, series=series)


def repeats(dataset: Dataset) -> Result:
    """Return the share of interactions with an item that the user had before, and of such test targets.

    An exact duplicate has the same user, item and time as an earlier row. Duplicates that were removed by the
    rule `duplicates` are not counted.
    """
    again = np.zeros(dataset.num_interactions, dtype=bool)
    exact = 0
    for part, frame in _portions(dataset):
        again[part] = frame.duplicated(["user", "item"])
        exact += int(frame.duplicated().sum())
    in_a_row = np.diff(dataset.items) == 0
    in_a_row[dataset.offsets[1:-1] - 1] = False  # neighbours of two different users
    targets = again[dataset.offsets[evaluated_users(dataset) + 1] - 1]
    shares = {"repeat_share": float(again.mean()), "in_a_row_share": float(in_a_row.sum() / again.size)}
    if dataset.times is not None:
        shares["exact_duplicate_share"] = exact / again.size
    shares["repeat_target_share"] = float(targets.mean()) if targets.size else 0.0
    return Result("repeats", shares)


def ties(dataset: Dataset) -> Result:
    """Return the shares of interactions and test targets that only the tie rule orders, for equal timestamps.

    A tied test target could change places with the item before. Without times these shares are unknown. The
    share of neighbours that ascend by item id tells if the order is one of time: then it is about half.
    """
    tied = dataset.manifest["ties"]
    shares = {}
    if tied["interactions"] is not None:
        shares["tied_interaction_share"] = tied["interactions"] / dataset.num_interactions
        shares["tied_test_target_share"] = tied["test_targets"] / max(evaluated_users(dataset).size, 1)
    for name in ("ascending_share", "tied_ascending_share"):
        if tied[name] is not None:
            shares[name] = tied[name]
    return Result("tied_timestamps", shares)


def last_items(dataset: Dataset) -> Result:
    """Count evaluated users by the number of different items at the last timestamp of their history.

    With one, the test target is certain; with several, the tie rule chooses it. Numbers above `LONG_RUN`
    are counted as `LONG_RUN`.
    """
    times: Any = dataset.times  # callers know that it has them
    candidates = np.ones(dataset.num_users, dtype=np.int64)
    for _, frame in _portions(dataset):
        tied = frame[frame["time"] == times[dataset.offsets[frame["user"] + 1] - 1]]
        items = tied.groupby("user")["item"].nunique()
        candidates[items.index] = items
    candidates = candidates[evaluated_users(dataset)]
    runs, users = np.unique(np.minimum(candidates, LONG_RUN), return_counts=True)
    metrics = {
        "last_item_by_tie_rule_share": float((candidates > 1).mean()) if candidates.size else 0.0,
        "most_candidates": int(candidates.max(initial=1)),
    }
    return Result("last_items", metrics, series={"candidates": runs.tolist(), "users": users.tolist()})


def over_time(dataset: Dataset, divided: Mapping[str, Split]) -> Result:
    """Count interactions, new users and new items in equal spans of time.

    Metrics include the time points of the global split, in seconds, if `divided` has one.
    """
    times: Any = dataset.times
    joined = times[dataset.offsets[:-1]]
    edges = np.linspace(joined.min(), times[dataset.offsets[1:] - 1].max(), TIME_BINS + 1)
    first_met = np.full(dataset.num_items + 1, np.iinfo(np.int64).max)
    counted = np.zeros(TIME_BINS, dtype=np.int64)
    for begin in range(0, times.size, PORTION):
        part = slice(begin, begin + PORTION)
        np.minimum.at(first_met, dataset.items[part], times[part])
        counted += np.histogram(times[part], edges)[0]
    per_second = _per_second(dataset)
    metrics: dict[str, float] = {"days": float((edges[-1] - edges[0]) / per_second / 86_400)}
    if "global_time" in divided:
        points = divided["global_time"].about["time_points"]
        metrics |= {f"{part}_from": point // per_second for part, point in points.items()}
    series = {
        "start": [date_text(dataset, edge) for edge in edges[:-1]],
        "interactions": counted.tolist(),
        "new_users": np.histogram(joined, edges)[0].tolist(),
        "new_items": np.histogram(first_met[1:], edges)[0].tolist(),
    }
    return Result("over_time", metrics, series=series)


def divisions(dataset: Dataset, seed: int) -> dict[str, Split]:
    """Divide the dataset by every rule of `splits`; without times there is no global time split."""
    divided = {"leave_one_out": splits.leave_one_out(dataset)}
    try:
        divided["global_time"] = splits.global_time(dataset, seed=seed)
    except InputError as error:
        print(f"no global time split: {error}")
    return divided | {"random_users": splits.random_users(dataset, seed=seed)}


def cold(dataset: Dataset, divided: Mapping[str, Split]) -> Result:
    """Return for each split the shares of test rows whose target or whose user is not in training."""
    metrics: dict[str, float] = {}
    for name, split in divided.items():
        trained_items = _items_of(dataset, split.train)
        trained_users = np.zeros(dataset.num_users, dtype=bool)
        trained_users[splits.row_users(dataset, split.train)] = True
        metrics[f"{name}_items_unseen_share"] = float(1 - trained_items[1:].mean())
        users = splits.row_users(dataset, split.test.histories)
        known = {"item": trained_items[split.test.targets], "user": trained_users[users]}
        for unit, flags in known.items():
            metrics[f"{name}_unseen_{unit}_share"] = float((~flags).mean()) if flags.size else 0.0
    return Result("cold", metrics)


def _portions(dataset: Dataset) -> Iterator[tuple[slice, pd.DataFrame]]:
    """Yield whole histories in portions of about `PORTION` interactions: a slice; user, item and time."""
    user = 0
    while user < dataset.num_users:
        after = int(np.searchsorted(dataset.offsets, dataset.offsets[user] + PORTION, side="right")) - 1
        after = max(user + 1, min(after, dataset.num_users))
        part = slice(*dataset.offsets[[user, after]].tolist())
        owner = np.repeat(np.arange(user, after), dataset.lengths[user:after])
        columns = {"user": owner, "item": dataset.items[part]}
        yield part, pd.DataFrame(columns | ({} if dataset.times is None else {"time": dataset.times[part]}))
        user = after


def _items_of(dataset: Dataset, histories: Histories) -> np.ndarray:
    """Return bool (num_items + 1,): whether an item is in any of the histories."""
    present = np.zeros(dataset.num_items + 1, dtype=bool)
    rows = max(1, PORTION >> 6)
    for begin in range(0, len(histories.starts), rows):
        starts, ends = (side[begin : begin + rows] for side in (histories.starts, histories.ends))
        present[dataset.items[Histories(dataset.items, starts, ends).places()]] = True
    return present


def _per_item(dataset: Dataset) -> np.ndarray:
    return np.bincount(dataset.items, minlength=dataset.num_items + 1)[1:]


def _per_second(dataset: Dataset) -> int:
    return {"ms": 1000, "us": 1_000_000}.get(dataset.manifest["time_unit"], 1)


def date_text(dataset: Dataset, time: float) -> str:
    """Return a time of the dataset as a date in UTC, to the minute."""
    return datetime.fromtimestamp(float(time) / _per_second(dataset), UTC).strftime("%Y-%m-%d %H:%M")


# -- tables --------------------------------------------------------------------------------------------------


def example_users(dataset: Dataset, seed: int) -> list[int]:
    """Draw three users with targets, or any users if none has; return them in ascending order."""
    users = evaluated_users(dataset)
    users = users if users.size else np.arange(dataset.num_users)
    drawn = np.random.default_rng(seed).choice(users, min(3, users.size), replace=False)
    return sorted(drawn.tolist())


def history(dataset: Dataset, user: int, last: int = 8) -> pd.DataFrame:
    """Tabulate the last interactions of a user: position, item id, title and use."""
    first, end = dataset.offsets[user : user + 2].tolist()
    start = max(first, end - last)
    items = dataset.items[start:end].tolist()
    held_out = ["validation target", "test target"] if end - first > 2 else []
    columns = {"position": np.arange(start, end) - first + 1, "item": items}
    columns |= {"title": [dataset.title(item) for item in items]}
    columns |= {"used for": ["training"] * (len(items) - len(held_out)) + held_out}
    return pd.DataFrame(columns)


def reading(dataset: Dataset) -> pd.DataFrame:
    """Tabulate the source, how it was read, and the rules of the preparation, from the manifest."""
    manifest = dataset.manifest
    core, rules, passes = manifest["core"], manifest["rules"], len(manifest["core"]["passes"])
    rows = {name: value for name, value in manifest["source"].items() if name != "published_counts"}
    rows |= {"lines": manifest["reading"]["lines"], "time unit": manifest["time_unit"]}
    rows |= {"order": rules["order"], "duplicates": rules["duplicates"]}
    rows["k-core"] = f"{core['min_user']} per user, {core['min_item']} per item, {core['rule']}"
    rows["k-core passes"] = f"{passes}" if passes else "none: it was a k-core already"
    rows["fingerprint"] = dataset.fingerprint
    return pd.DataFrame({"": {name: _readable(value) for name, value in rows.items()}})


def rejected(dataset: Dataset) -> pd.DataFrame:
    """Count the rejected lines by reason; empty if all lines were valid."""
    counts, lines = dataset.manifest["reading"]["rejected"], dataset.manifest["reading"]["lines"]
    rows = [(reason, count, f"{100 * count / lines:.2g}%") for reason, count in counts.items()]
    return pd.DataFrame(rows, columns=["rejected because", "lines", "share"]).set_index("rejected because")


def rejected_examples(dataset: Dataset) -> pd.DataFrame:
    """Tabulate the first rejected lines: number, reason, and beginning of the line."""
    examples = dataset.manifest["reading"]["rejected_examples"]
    return pd.DataFrame(examples, columns=["line", "reason", "text"]).set_index("line")


def counts(dataset: Dataset) -> pd.DataFrame:
    """Tabulate the counts after each step, and the published counts of the source if known."""
    rows = list(dataset.manifest["steps"])
    if source_counts := published(dataset):
        rows.insert(1, {"step": "published", **source_counts})
    return pd.DataFrame(rows).set_index("step").map(_readable)


def published(dataset: Dataset) -> dict[str, int]:
    """Return the published counts of a public dataset's source; empty for a user's file."""
    source = dataset.manifest["source"]
    if source.get("origin") in ("file", "synthetic"):
        return {}
    entry = fetch.catalogue().get(dataset.name)
    return source.get("published_counts") or (entry.counts if entry else {})


def cores(dataset: Dataset, config: DataConfig) -> pd.DataFrame:
    """Tabulate the counts after each rule of the k-core: the fixed point, and the seed study's single pass.

    For the other rule the source is prepared again. That is skipped for a prepared folder, which lacks the
    removed rows, and for a source of more than `CHEAP_INTERACTIONS`.
    """
    rule = dataset.manifest["core"]["rule"]
    other = "single_pass" if rule == "fixed_point" else "fixed_point"
    rows = {rule: _core(dataset)}
    if dataset.manifest["steps"][0]["interactions"] > CHEAP_INTERACTIONS:
        rows[other] = {"passes": "not computed: the source is large"}
    elif prepared_folder(config) is not None:
        rows[other] = {"passes": "not computed: the folder holds only what is left"}
    else:
        try:
            rows[other] = _core(prepare(changed(config, core=other)))
        except InputError as error:
            rows[other] = {"passes": str(error)}
    return pd.DataFrame(rows).T.map(_readable)


def about_splits(dataset: Dataset, divided: Mapping[str, Split]) -> pd.DataFrame:
    """Tabulate the description of each split: counts, time points as dates, rows left out."""
    columns = {}
    for split in divided.values():
        rows: dict[str, Any] = {}
        for name, value in split.about.items():
            inner = value if isinstance(value, dict) else {"": value}
            if name == "time_points":
                inner = {part: date_text(dataset, point) for part, point in inner.items()}
            rows |= {f"{name}: {key}".removesuffix(": ").replace("_", " "): inner[key] for key in inner}
        columns[split.name] = {key: rows[key] for key in rows if key not in ("rule", "time unit")}
    return pd.DataFrame(columns).map(_readable)


def downloads() -> pd.DataFrame:
    """Tabulate the public datasets that can be fetched by name: counts, size, format, licence."""
    rows = []
    for entry in fetch.catalogue().values():
        row: dict[str, Any] = {"name": entry.name}
        row |= {unit: entry.counts.get(unit) for unit in ("interactions", "users", "items")}
        row["download, MB"] = entry.bytes and round(entry.bytes / 1e6, 1)
        rows.append(row | {"format": entry.format, "licence": entry.licence})
    return pd.DataFrame(rows).set_index("name").map(lambda value: _readable(value) or "unknown")


def _after_core(dataset: Dataset) -> dict[str, Any]:
    return next(row for row in dataset.manifest["steps"] if row["step"] == "k-core")


def _core(dataset: Dataset) -> dict[str, Any]:
    core = dataset.manifest["core"]
    row = {name: value for name, value in _after_core(dataset).items() if name != "step"}
    row["users below min_user"] = int((dataset.lengths < core["min_user"]).sum())
    row["items below min_item"] = int((_per_item(dataset) < core["min_item"]).sum())
    passes = " → ".join(f"{count:,}" for count in core["passes"])
    return row | {"passes": passes or "none: it was a k-core already"}


def _readable(value: Any) -> Any:
    """Return whole numbers with thousands separators, and missing values as an empty string."""
    if value is None or value != value:
        return ""
    is_whole = isinstance(value, int | np.integer) or (isinstance(value, float) and value.is_integer())
    return f"{int(value):,}" if is_whole and not isinstance(value, bool) else value
