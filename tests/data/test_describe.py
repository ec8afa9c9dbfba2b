from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reclib import system
from reclib.config import DataConfig, InputError
from reclib.data import fetch, splits
from reclib.data.dataset import Dataset, Keys, ties
from reclib.data.prepare import folder_of, prepare, synthetic_dataset
from reclib.experiments import data_prep

RAW = system.root().parent / "shared" / "data" / "raw-format-samples"

# Histories of (time, item); few items and times, so that repeats and ties are frequent.
histories = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=9), min_size=1, max_size=8
)


def dataset_of(given: list[list[tuple[int, int]]], unit: str = "s", names: int = 4) -> Dataset:
    """Return a dataset of histories; each is put in the order of time, ties as they are given."""
    ordered = [sorted(one, key=lambda event: event[0]) for one in given]
    events = [event for one in ordered for event in one]
    offsets = np.cumsum([0, *map(len, ordered)])
    manifest = {"time_unit": unit}
    made = Dataset(
        "own",
        np.array([item for _, item in events], dtype=np.int32),
        offsets,
        Keys.encode(["", *map(str, range(1, names + 1))]),
        Keys.encode(list(map(str, range(len(ordered))))),
        {},
        manifest,
        times=np.array([time for time, _ in events], dtype=np.int64),
    )
    manifest["ties"] = ties(made)
    return made


def per_user(dataset: Dataset) -> list[list[tuple[int, int]]]:
    pairs = list(zip(dataset.times.tolist(), dataset.items.tolist(), strict=True))
    return [pairs[a:b] for a, b in zip(dataset.offsets[:-1], dataset.offsets[1:], strict=True)]


@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 20))
def test_repeats_are_those_of_a_loop(given_histories, portion):
    dataset = dataset_of(given_histories)
    again, exact, in_a_row, targets = 0, 0, 0, []
    for history in per_user(dataset):
        seen: set[int] = set()
        for place, (_, item) in enumerate(history):
            again += item in seen
            in_a_row += place > 0 and history[place - 1][1] == item
            if place == len(history) - 1 and len(history) > 2:
                targets.append(item in seen)
            seen.add(item)
        exact += sum(count - 1 for count in Counter(history).values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep, "PORTION", portion)  # however the histories are cut into portions
        found = data_prep.repeats(dataset).metrics
    size = dataset.num_interactions
    assert found["repeat_share"] == pytest.approx(again / size)
    assert found["exact_duplicate_share"] == pytest.approx(exact / size)
    assert found["in_a_row_share"] == pytest.approx(in_a_row / size)
    assert found["repeat_target_share"] == pytest.approx(np.mean(targets) if targets else 0)


@settings(deadline=None, max_examples=60)
@given(histories, st.integers(1, 20))
def test_candidates_for_the_last_item_are_those_of_a_loop(given_histories, portion):
    dataset = dataset_of(given_histories)
    expected = Counter(
        len({item for time, item in history if time == history[-1][0]})
        for history in per_user(dataset)
        if len(history) > 2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep, "PORTION", portion)
        found = data_prep.last_items(dataset)
    assert dict(zip(found.series["candidates"], found.series["users"], strict=True)) == expected
    uncertain = sum(users for candidates, users in expected.items() if candidates > 1)
    share = uncertain / max(sum(expected.values()), 1)
    assert found.metrics["last_item_by_tie_rule_share"] == pytest.approx(share)


def test_nobody_has_targets():
    dataset = dataset_of([[(0, 1), (5, 2)], [(1, 2)]])
    counts = dict.fromkeys(("users", "items", "interactions"), 3)
    dataset.manifest["steps"] = [counts | {"step": step} for step in ("source", "k-core")]
    assert data_prep.example_users(dataset, seed=0) == [0, 1]
    assert "last_items" not in [found.name for found in data_prep.described(dataset, {})]


def test_runs_of_equal_times():
    dataset = dataset_of([[(0, 1), (5, 2), (5, 2)]])
    assert data_prep.ties(dataset).metrics["tied_test_target_share"] == 1
    assert data_prep.last_items(dataset).metrics["last_item_by_tie_rule_share"] == 0

    run = [(7, item) for item in range(1, 15)]
    found = data_prep.last_items(dataset_of([run, run[:12], run[:3]], names=14))
    assert found.series == {"candidates": [3, data_prep.LONG_RUN], "users": [1, 2]}
    assert found.metrics["most_candidates"] == 14


@settings(deadline=None, max_examples=40)
@given(histories, st.integers(1, 20))
def test_what_training_never_saw_is_that_of_a_loop(given_histories, portion):
    dataset = dataset_of(given_histories)
    found = {"leave_one_out": splits.leave_one_out(dataset), "random_users": splits.random_users(dataset)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep, "PORTION", portion)
        made = data_prep.cold(dataset, found)
    rows = 0
    for name, split in found.items():
        train = split.train
        spans = [dataset.items[a:b].tolist() for a, b in zip(train.starts, train.ends, strict=True)]
        known = {item for span in spans for item in span}
        targets = split.test.targets.tolist()
        expected = np.mean([target not in known for target in targets]) if targets else 0
        assert made.metrics[f"{name}_unseen_item_share"] == pytest.approx(expected)
        assert made.metrics[f"{name}_items_unseen_share"] == pytest.approx(1 - len(known) / 4)
        rows += len(split.valid.targets) + len(targets)
    assert sum(made.series["rows"]) == rows
    if found["random_users"].test.targets.size:
        assert made.metrics["random_users_unseen_user_share"] == 1


@pytest.mark.parametrize(("unit", "per_second"), [("s", 1), ("ms", 1000)])
def test_interactions_over_time_are_all_counted_once(unit, per_second):
    start = 1_600_000_000
    given_histories = [
        [((start + 60 * n * (u + 1)) * per_second, 1 + n % 4) for n in range(9)] for u in range(5)
    ]
    dataset = dataset_of(given_histories, unit)
    found = data_prep.divisions(dataset, seed=0)
    made = data_prep.over_time(dataset, found)
    assert sum(made.series["interactions"]) == dataset.num_interactions
    assert (sum(made.series["new_users"]), sum(made.series["new_items"])) == (5, 4)
    assert made.series["start"][0] == "2020-09-13 12:26"  # of 1.6e9 seconds, in UTC
    assert made.metrics["days"] == pytest.approx(60 * 8 * 5 / 86_400)
    assert start < made.metrics["valid_from"] < made.metrics["test_from"] < start + 60 * 8 * 5


def test_without_times_nothing_is_said_about_time(capsys):
    dataset = synthetic_dataset(30, 20, 6.0, seed=0)
    assert list(data_prep.divisions(dataset, seed=0)) == ["leave_one_out", "random_users"]
    assert "no global time split" in capsys.readouterr().out
    for ask in (data_prep.last_items, lambda one: data_prep.over_time(one, {})):
        with pytest.raises(InputError, match="no times"):
            ask(dataset)
    assert "exact_duplicate_share" not in data_prep.repeats(dataset).metrics


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A file of one's own with a bad line, and users and items that only one pass leaves."""
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "cache"))
    day = 86_400
    rows = [(f"u{u}", f"i{i}", 1_600_000_000 + day * i) for u in range(4) for i in range(4)]
    rows += [("u9", "i0", 1_600_000_000), ("u9", "i1", 1_600_000_001), ("u9", "rare", 1_600_000_002)]
    text = "user,item,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows) + "u0,i0,-5\n"
    (tmp_path / "mine.csv").write_text(text)
    config = DataConfig(dataset=str(tmp_path / "mine.csv"), min_user=3, min_item=2, max_rejected_share=0.1)
    return prepare(config), config


def test_the_sheet_of_a_file(prepared):
    dataset, _ = prepared
    sheet = data_prep.reading(dataset)[""]
    assert (sheet["file"], sheet["lines"], sheet["time unit"]) == ("mine.csv", "20", "s")
    assert sheet["k-core"] == "3 per user, 2 per item, fixed_point"
    assert len(sheet["sha256"]) == 64
    rejected = data_prep.rejected(dataset)
    assert rejected["lines"].tolist() == [1]
    assert rejected["share"].tolist() == ["5%"]
    assert data_prep.rejected_examples(dataset).loc[21, "text"] == "u0,i0,-5"
    assert data_prep.counts(dataset).loc["source", "interactions"] == "19"
    assert data_prep.published(dataset) == {}

    dataset, config = prepared
    both = data_prep.cores(dataset, config)
    assert both.loc["fixed_point", "passes"] == "18 → 16"
    assert both.loc["single_pass", "passes"] == "18"
    assert both["users"].to_dict() == {"fixed_point": "4", "single_pass": "5"}
    assert both["users below min_user"].to_dict() == {"fixed_point": "0", "single_pass": "1"}


def test_the_other_core_is_left_out_where_it_cannot_be_had(prepared, tmp_path, monkeypatch):
    dataset, config = prepared
    folder = DataConfig(dataset=str(folder_of(config)))
    assert "only what is left" in data_prep.cores(dataset, folder).loc["single_pass", "passes"]
    monkeypatch.setattr(data_prep, "CHEAP_INTERACTIONS", 18)
    assert "large" in data_prep.cores(dataset, config).loc["single_pass", "passes"]


def test_splits_are_tabulated_with_dates():
    start = 1_600_000_000
    dataset = dataset_of([[(start + 3600 * (4 * n + u), 1 + n) for n in range(4)] for u in range(4)])
    found = data_prep.divisions(dataset, seed=0)
    table = data_prep.about_splits(dataset, found)
    assert table.columns.tolist() == [split.name for split in found.values()]
    assert table.loc["evaluated users", "leave-one-out"] == "4"
    assert table.loc["time points: test", "global time"] == "2020-09-14 02:26"  # 14 hours after the first
    assert table.loc["evaluated users", "global time"] == ""


def test_downloads_and_published_counts():
    table = data_prep.downloads()
    assert table.index.tolist() == list(fetch.catalogue())
    assert table.loc["ml-20m", "interactions"] == "20,000,263"
    assert table["licence"].str.len().min() > 20
    assert set(table.loc[table["users"] == "unknown"].index) == {"amazon-electronics-2023-reviews"}

    dataset = dataset_of([[(0, 1)]])
    for origin, expected in (
        ("file", {}),
        ("RecBole", {"interactions": 100_000, "users": 943, "items": 1682}),
    ):
        manifest = {"source": {"origin": origin}}
        named = Dataset(
            "ml-100k", dataset.items, dataset.offsets, dataset.item_keys, dataset.user_keys, {}, manifest
        )
        assert data_prep.published(named) == expected


def test_a_published_5_core_with_duplicates_is_no_fixed_point(tmp_path, monkeypatch):
    file = RAW / "amazon-2018" / "All_Beauty_5.json.gz"
    if not file.is_file():
        pytest.skip(f"no copy of All_Beauty_5 at {RAW}")
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path))
    dataset = prepare(DataConfig(dataset=str(file)))
    assert dataset.manifest["steps"][0]["interactions"] == 5269  # as published
    assert dataset.manifest["core"]["passes"] == [5189, 5113, 5097, 5084]
    found = data_prep.repeats(dataset).metrics
    assert found["repeat_share"] == pytest.approx(0.2207, abs=1e-3)
