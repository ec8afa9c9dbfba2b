"""Tables that say what a dataset is: what was read, what is left, what it should have been.

They are made from the manifest of the preparation, for people; `data_prep` counts what the arrays hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reclib.config import DataConfig, InputError, changed
from reclib.data import fetch, splits
from reclib.data.dataset import Dataset, Histories, evaluated_users
from reclib.data.prepare import prepare, prepared_folder
from reclib.data.splits import Split

# ------------------------------------------------------------------------------------------------
# What a prepared dataset looks like, as records can hold it: metrics and columns of numbers.
#
# Everything is counted from the memory-mapped arrays, in portions: beside these it takes a few bytes per
# interaction and some numbers per user and per item.

CURVE_POINTS = 300  # of a curve that is stored; a catalogue may have hundreds of thousands of items

TIME_BINS = 60  # of equal width, from the first interaction to the last

PORTION = 1 << 20  # interactions looked at together

LONG_RUN = 10  # tied interactions at the end of a history; longer runs are counted with this one


class Described(NamedTuple):
    """One description, ready for `records.Run.result(name, **described._asdict())`."""

    metrics: dict[str, float | int]
    series: dict[str, list[Any]]


def steps(dataset: Dataset) -> Described:
    """Count users, items and interactions after each step of the preparation."""
    table = dataset.manifest["steps"]
    last = next(row for row in table if row["step"] == "k-core")
    first = table[0]
    metrics = {name: last[name] for name in ("users", "items", "interactions")}
    metrics |= {f"source_{name}": first[name] for name in ("users", "items", "interactions")}
    return Described(metrics, {name: [row[name] for row in table] for name in table[0]})


def lengths(dataset: Dataset) -> Described:
    """Count users by the number of their interactions."""
    length, users = np.unique(dataset.lengths, return_counts=True)
    metrics = {
        "mean_length": float(dataset.lengths.mean()),
        "median_length": float(np.median(dataset.lengths)),
        "min_length": int(length[0]),
        "max_length": int(length[-1]),
        "longer_than_200_share": float((dataset.lengths > 200).mean()),
    }
    return Described(metrics, {"length": length.tolist(), "users": users.tolist()})


def popularity(dataset: Dataset) -> Described:
    """Interactions of each item by popularity rank, and how unequal they are.

    The Gini coefficient is 0 where all items are met equally often and near 1 where one has all. Of
    a large catalogue the series keeps ranks at equal steps of their logarithm.
    """
    counts = np.sort(np.bincount(dataset.items, minlength=dataset.num_items + 1)[1:])[::-1]
    held = np.cumsum(counts) / counts.sum()  # share of interactions that the top items hold
    # area under the curve from the most popular down, by trapezoids: (1 + Gini) / 2
    area = (held.sum() - 0.5) / counts.size
    spaced = np.geomspace(1, counts.size, CURVE_POINTS)
    ranks = np.unique(np.round(spaced)).astype(np.int64)
    tenth = held[max(1, counts.size // 10) - 1]
    metrics = {"gini": float(2 * area - 1), "top_tenth_share": float(tenth)}
    metrics |= {"most_popular": int(counts[0]), "least_popular": int(counts[-1])}
    series = {
        "rank": ranks.tolist(),
        "interactions": counts[ranks - 1].tolist(),
        "item_share": (ranks / counts.size).tolist(),
        "interaction_share": held[ranks - 1].tolist(),
    }
    return Described(metrics, series)


def repeats(dataset: Dataset) -> Described:
    """Share of interactions with an item that the user had before, and of targets that are such.

    An exact duplicate has the same user, item and time as an earlier row. What the rule `duplicates`
    removed is not counted.
    """
    again = np.zeros(dataset.num_interactions, dtype=bool)
    exact = 0
    for begin, end, users in _portions(dataset):
        pairs = users * (dataset.num_items + 1) + dataset.items[begin:end]
        order = np.argsort(pairs, kind="stable")  # equal pairs stay in the order of time
        same = pairs[order][1:] == pairs[order][:-1]
        again[begin + order[1:][same]] = True
        if dataset.times is not None:
            times = dataset.times[begin:end][order]
            exact += int((same & (times[1:] == times[:-1])).sum())
    in_a_row = dataset.items[1:] == dataset.items[:-1]
    in_a_row[dataset.offsets[1:-1] - 1] = False  # neighbours of two different users
    targets = again[dataset.offsets[evaluated_users(dataset) + 1] - 1]
    metrics = {"repeat_share": float(again.mean()), "in_a_row_share": in_a_row.sum() / again.size}
    what = ["interactions with an item that the user had before", "of the same item twice in a row"]
    if dataset.times is not None:
        metrics["exact_duplicate_share"] = exact / again.size
        what.append("with the same timestamp too: exact duplicates")
    metrics["repeat_target_share"] = float(targets.mean()) if targets.size else 0.0
    what.append("test targets that the user had before")
    return Described(metrics, {"what": what, "share": list(metrics.values())})


def ties(dataset: Dataset) -> Described:
    """Share of what is ordered by the tie rule alone, since timestamps are equal."""
    tied = {name: count or 0 for name, count in dataset.manifest["ties"].items()}  # None: there are no times
    users = evaluated_users(dataset).size
    metrics = {
        "tied_interaction_share": tied["interactions"] / dataset.num_interactions,
        "tied_test_target_share": tied["test_targets"] / max(users, 1),
    }
    what = ["interactions with the timestamp of another of the same user"]
    what += ["test targets that could change places with the item before"]
    return Described(metrics, {"what": what, "share": list(metrics.values())})


def last_items(dataset: Dataset) -> Described:
    """Count evaluated users by how many different items share the last timestamp of their history.

    With one, the test target is certain; with more, the tie rule chooses it. Runs of more than
    `LONG_RUN` are counted as `LONG_RUN`. Raises `InputError` for a dataset without times.
    """
    times = _times(dataset)
    candidates = np.ones(dataset.num_users, dtype=np.int64)
    for begin, end, users in _portions(dataset):
        last = times[dataset.offsets[users + 1] - 1]
        tied = times[begin:end] == last
        pairs = users[tied] * (dataset.num_items + 1) + dataset.items[begin:end][tied]
        owner, count = np.unique(np.unique(pairs) // (dataset.num_items + 1), return_counts=True)
        candidates[owner] = count
    candidates = candidates[evaluated_users(dataset)]
    runs, users = np.unique(np.minimum(candidates, LONG_RUN), return_counts=True)
    metrics = {
        "last_item_by_tie_rule_share": float((candidates > 1).mean()) if candidates.size else 0.0,
        "most_candidates": int(candidates.max(initial=1)),
    }
    return Described(metrics, {"candidates": runs.tolist(), "users": users.tolist()})


def over_time(dataset: Dataset, found: Mapping[str, Split]) -> Described:
    """Count interactions, and users and items met for the first time, in equal spans of time.

    Metrics hold the time points of the global split in seconds where `found` has one. Raises
    `InputError` for a dataset without times.
    """
    times = _times(dataset)
    first_met = np.full(dataset.num_items + 1, np.iinfo(np.int64).max)
    for begin in range(0, times.size, PORTION):
        part = slice(begin, begin + PORTION)
        np.minimum.at(first_met, dataset.items[part], times[part])
    joined = times[dataset.offsets[:-1]]
    edges = np.linspace(joined.min(), times[dataset.offsets[1:] - 1].max(), TIME_BINS + 1)
    counted = sum(
        np.histogram(times[begin : begin + PORTION], edges)[0] for begin in range(0, times.size, PORTION)
    )
    per_second = _per_second(dataset)
    metrics: dict[str, float | int] = {"days": float((edges[-1] - edges[0]) / per_second / 86_400)}
    if "global_time" in found:
        for part, point in found["global_time"].about["time_points"].items():
            metrics[f"{part}_from"] = point // per_second
    series = {
        "start": [date_text(dataset, edge) for edge in edges[:-1]],
        "interactions": np.asarray(counted).tolist(),
        "new_users": np.histogram(joined, edges)[0].tolist(),
        "new_items": np.histogram(first_met[1:], edges)[0].tolist(),
    }
    return Described(metrics, series)


def divisions(dataset: Dataset, seed: int) -> dict[str, Split]:
    """Divide the dataset by every rule of `splits`; without times there is no global time split."""
    found = {"leave_one_out": splits.leave_one_out(dataset)}
    try:
        found["global_time"] = splits.global_time(dataset, seed=seed)
    except InputError as error:
        print(f"no global time split: {error}")
    return found | {"random_users": splits.random_users(dataset, seed=seed)}


def cold(dataset: Dataset, found: Mapping[str, Split]) -> Described:
    """Share of the rows of each split whose target, or whose user, training has never seen."""
    metrics: dict[str, float | int] = {}
    names = ("split", "part", "rows", "unseen_item_share", "unseen_user_share")
    series: dict[str, list[Any]] = {name: [] for name in names}
    for name, split in found.items():
        known = _items_met(dataset, split.train)
        trained = np.zeros(dataset.num_users, dtype=bool)
        trained[splits.row_users(dataset, split.train)] = True
        metrics[f"{name}_items_unseen_share"] = float(1 - known[1:].mean())
        for part in ("valid", "test"):
            rows = getattr(split, part)
            users = splits.row_users(dataset, rows.histories)
            shares = [
                float((~seen).mean()) if seen.size else 0.0 for seen in (known[rows.targets], trained[users])
            ]
            for column, value in zip(names, (split.name, part, users.size, *shares), strict=True):
                series[column].append(value)
        metrics[f"{name}_unseen_item_share"], metrics[f"{name}_unseen_user_share"] = shares
    return Described(metrics, series)


def date_text(dataset: Dataset, time: float) -> str:
    """Return a time of the dataset as a date in UTC, to the minute."""
    return datetime.fromtimestamp(float(time) / _per_second(dataset), UTC).strftime("%Y-%m-%d %H:%M")


def example_users(dataset: Dataset, seed: int, count: int = 3) -> list[int]:
    """Draw distinct users that have targets, in ascending order."""
    users = evaluated_users(dataset)
    drawn = np.random.default_rng(seed).choice(users, min(count, users.size), replace=False)
    return sorted(drawn.tolist())


def history(dataset: Dataset, user: int, last: int = 8) -> pd.DataFrame:
    """Tabulate the last interactions of a user: position, item id, title and what each is for."""
    end = int(dataset.offsets[user + 1])
    start = max(int(dataset.offsets[user]), end - last)
    items = dataset.items[start:end].tolist()
    held_out = ["validation target", "test target"] if dataset.lengths[user] > 2 else []
    return pd.DataFrame(
        {
            "position": np.arange(start, end) - int(dataset.offsets[user]) + 1,
            "item": items,
            "title": [dataset.title(item) for item in items],
            "used for": ["training"] * (len(items) - len(held_out)) + held_out,
        }
    )


def _portions(dataset: Dataset) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (begin, end, users): whole histories of about `PORTION` interactions, and whose each is."""
    first = 0
    while first < dataset.num_users:
        after = np.searchsorted(dataset.offsets, dataset.offsets[first] + PORTION, side="right") - 1
        after = max(first + 1, min(int(after), dataset.num_users))
        lengths = dataset.lengths[first:after]
        yield (
            int(dataset.offsets[first]),
            int(dataset.offsets[after]),
            np.repeat(np.arange(first, after), lengths),
        )
        first = after


def _items_met(dataset: Dataset, histories: Histories) -> np.ndarray:
    """Return bool (num_items + 1,): whether an item stands in any of the histories, which are in order."""
    starts, ends = histories.starts, histories.ends
    known = np.zeros(dataset.num_items + 1, dtype=bool)
    for begin in range(0, dataset.num_interactions, PORTION):
        end = min(begin + PORTION, dataset.num_interactions)
        rows = slice(np.searchsorted(ends, begin, side="right"), np.searchsorted(starts, end))
        size = end - begin + 1
        opened = np.bincount(np.maximum(starts[rows], begin) - begin, minlength=size)
        closed = np.bincount(np.minimum(ends[rows], end) - begin, minlength=size)
        inside = np.cumsum(opened - closed)[:-1] > 0
        known[dataset.items[begin:end][inside]] = True
    return known


def _times(dataset: Dataset) -> np.ndarray:
    if dataset.times is None:
        raise InputError(f"dataset {dataset.name!r} has the order of interactions but no times")
    return dataset.times


def _per_second(dataset: Dataset) -> int:
    return {"ms": 1000, "us": 1_000_000}.get(dataset.manifest["time_unit"], 1)


# ------------------------------------------------------------------------------------------------

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
    elif prepared_folder(config) is not None:
        rows[other] = {"passes": "not computed: the folder holds only what is left"}
    else:
        try:
            rows[other] = _core(prepare(changed(config, core=other)))
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
