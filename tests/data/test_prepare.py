import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reclib import system
from reclib.config import DataConfig, InputError
from reclib.data import dataset
from reclib.data.prepare import Source, build, prepare
from reclib.data.read import Ingested

COLUMNS = ("user", "item", "rating", "time")
# lengths, character orders and code points beyond the first plane all decide the order of ids
KEYS = st.text(alphabet="aZ9-_é\u4e00\U0001f600", min_size=1, max_size=3)


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    monkeypatch.setenv("RECLIB_DATA", str(folder))
    return folder


def source(rows, time_unit="s", titles=None, name="made") -> Source:
    """A source whose `raw` is the given (user, item, rating, time) rows."""

    def fill(con: duckdb.DuckDBPyConnection, progress, work):
        progress(1, 2)
        assert work.is_dir()
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        frame.insert(0, "row", range(len(rows)))
        con.register("frame", frame)
        con.execute(
            'create table raw as select row::bigint as row, "user"::varchar as "user", '
            "item::varchar as item, rating::double as rating, time::bigint as time from frame"
        )
        con.unregister("frame")
        return Ingested(
            time_unit=time_unit,
            provenance={"origin": "file", "file": "made.tsv", "sha256": "0" * 64},
            lines_read=len(rows) + 1,
            rejected={"field missing": 1},
            rejected_examples=[{"line": 3, "reason": "field missing", "text": "x"}],
            titles=lambda keys: {k: t for k, t in (titles or {}).items() if k in keys},
        )

    return Source(name, "made", fill)


def prepared(folder: Path, rows, *, time_unit="s", titles=None, **config) -> dataset.Dataset:
    config = {"min_user": 1, "min_item": 1} | config
    build(source(rows, time_unit, titles), DataConfig(**config), folder, "key")
    return dataset.load(folder)


def histories_of(found: dataset.Dataset) -> dict[str, list[str]]:
    bounds = zip(found.offsets[:-1], found.offsets[1:], strict=True)
    return {
        user: found.item_keys[found.items[a:b]].tolist()
        for user, (a, b) in zip(found.user_keys, bounds, strict=True)
    }


def deduplicated(rows, rule):
    """Plainly: rows are (user, item, rating, time) in the source's order."""
    if rule == "keep":
        return list(rows)
    groups: dict[tuple, list[int]] = {}
    for number, (user, item, _, time) in enumerate(rows):
        groups.setdefault((user, item, time) if rule == "exact" else (user, item), []).append(number)
    pick = max if rule == "last" else min
    stay = {pick(group, key=lambda n: (rows[n][3], n)) for group in groups.values()}
    return [row for number, row in enumerate(rows) if number in stay]


def core_of(rows, min_user, min_item, passes=1000):
    for _ in range(passes):
        users, items = Counter(r[0] for r in rows), Counter(r[1] for r in rows)
        left = [r for r in rows if users[r[0]] >= min_user and items[r[1]] >= min_item]
        if len(left) == len(rows):
            break
        rows = left
    return rows


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(KEYS, KEYS, st.none() | st.just(3.5), st.integers(0, 4)), min_size=1, max_size=40
    ),
    minimum=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    rule=st.sampled_from(["keep", "exact", "first", "last"]),
    core=st.sampled_from(["fixed_point", "single_pass"]),
)
# user b falls below 2 only when item 3 is gone: the single pass keeps what it leaves of b
@example([(*pair, 1, 1) for pair in ("a1", "a2", "b1", "b3", "c2", "c1")], (2, 2), "keep", "single_pass")
@example([(*pair, 1, 1) for pair in ("a1", "a2", "b1", "b3", "c2", "c1")], (2, 2), "keep", "fixed_point")
def test_preparation_equals_a_plain_one(tmp_path_factory, rows, minimum, rule, core):
    folder = tmp_path_factory.mktemp("plain") / "out"
    expected = core_of(deduplicated(rows, rule), *minimum, passes=1 if core == "single_pass" else 1000)
    config = {"min_user": minimum[0], "min_item": minimum[1], "duplicates": rule, "core": core}
    if not expected:
        with pytest.raises(InputError, match="nothing of dataset 'made' is left by the k-core"):
            prepared(folder, rows, **config)
        assert not folder.exists()
        return
    found = prepared(folder, rows, **config)
    order = lambda key: (len(key), key)  # noqa: E731
    users = sorted({row[0] for row in expected}, key=order)
    assert found.user_keys.tolist() == users
    assert found.item_keys.tolist() == ["", *sorted({row[1] for row in expected}, key=order)]
    assert found.items.dtype == np.int32
    mine = {u: sorted((r for r in expected if r[0] == u), key=lambda r: r[3]) for u in users}  # stable
    assert histories_of(found) == {user: [row[1] for row in rows] for user, rows in mine.items()}
    times = [row[3] for rows in mine.values() for row in rows]
    assert found.times.tolist() == times
    table = duckdb.sql(f"select * from '{folder}/interactions.parquet'").fetchall()
    assert table == [(*row, n) for rows in mine.values() for n, row in enumerate(rows)]


SHARED = system.root().parent / "shared" / "data"
PUBLISHED = {  # users, items, interactions of the 5-core sets, and what a 5-core leaves of MovieLens
    "amazon-beauty-2014-5core/Beauty_s3rec.txt.gz": (22_363, 12_101, 198_502),
    "amazon-toys-2014-5core/Toys_and_Games_s3rec.txt.gz": (19_412, 11_924, 167_597),
    "ml-100k/u.data.gz": (943, 1_682, 100_000),
}


def test_counts_are_the_published_ones():
    for name, counts in PUBLISHED.items():
        if not (SHARED / name).is_file():
            pytest.skip(f"no copy of {name}")
        found = prepare(DataConfig(dataset=str(SHARED / name)))
        assert tuple(found.manifest["steps"][0].values()) == ("source", *counts)
        if "5core" in name:
            assert found.manifest["core"]["passes"] == []  # a fixed point
            assert (found.num_users, found.num_items, found.num_interactions) == counts
        assert np.bincount(found.items)[1:].min() >= 5
        assert found.lengths.min() >= 5


def test_manifest_says_what_happened(tmp_path):
    rows = [("u", item, 3, time) for item, time in ((1, 5), (2, 6), (2, 6), (3, 6), (4, 7))]
    found = prepared(tmp_path / "out", rows, duplicates="exact", titles={"2": "Two", "9": "Not here"})
    manifest = found.manifest
    assert [tuple(step.values()) for step in manifest["steps"]] == [
        ("source", 1, 4, 5),
        ("de-duplicated", 1, 4, 4),
        ("k-core", 1, 4, 4),
        ("train", 1, 4, 2),
        ("valid", 1, 4, 1),
        ("test", 1, 4, 1),
    ]
    assert manifest["source"] == {"origin": "file", "file": "made.tsv", "sha256": "0" * 64}
    reading = {"lines": 6, "rejected": {"field missing": 1}}
    assert reading.items() <= manifest["reading"].items()
    assert manifest["reading"]["rejected_examples"][0]["line"] == 3
    assert (manifest["ties"]["interactions"], manifest["ties"]["test_targets"]) == (2, 0)
    assert (dict(found.titles), found.title(2), found.title(1)) == ({"2": "Two"}, "Two", "1")


def test_order_without_times(tmp_path):
    rows = [("u", 5, None, 0), ("u", 3, None, 1), ("v", 3, None, 0), ("u", 4, None, 2)]
    found = prepared(tmp_path / "out", rows, time_unit="order", ties="item")  # no rule changes a known order
    assert histories_of(found) == {"u": ["5", "3", "4"], "v": ["3"]}
    assert found.times is found.manifest["ties"]["interactions"] is None
    assert not (tmp_path / "out" / "times.npy").exists()
    times = duckdb.sql(f"select distinct time from '{tmp_path}/out/interactions.parquet'").fetchall()
    assert times == [(None,)]


def test_impossible_ids_are_refused(tmp_path):
    for key in ("k" * 257, "nul\0inside"):
        with pytest.raises(InputError, match=r"^item id .* expected at most 256 bytes.*$"):
            prepared(tmp_path / "out", [("u", key, 1, 1)])


def test_memory_limit_that_is_too_low_is_told(tmp_path):
    rows = [(f"user {n}", f"item {n}", 1, n) for n in range(60_000)]
    with pytest.raises(InputError, match="'memory_limit_mb' is 1, too low") as error:
        prepared(tmp_path / "out", rows, memory_limit_mb=1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_nothing(tmp_path, data_folder, monkeypatch):
    """The database, its spilled rows and the output are all on a disk that is too small for them."""
    point = tmp_path / "disk"
    point.mkdir()
    rows = [(f"user {n // 5}", f"item {n % 7000} {n % 11}", 1, n) for n in range(50_000)]
    for megabytes in (1, 4):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(point)]
        if os.name != "posix" or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root on Linux")
        try:
            monkeypatch.setenv("RECLIB_DATA", str(point / "data"))
            with pytest.raises(OSError) as error:  # noqa: PT011  # the system's and the database's words
                prepared(point / "data" / "prepared" / "out", rows)
            assert "\n" not in str(error.value)
            assert [path for path in point.rglob("*") if path.is_file()] == []
        finally:
            subprocess.run(["umount", str(point)], check=True)
    monkeypatch.setenv("RECLIB_DATA", str(data_folder))  # and with room the same command works
    assert prepared(tmp_path / "out", rows).num_interactions == 50_000


LIKE_ELECTRONICS = """
import json, resource, sys
from pathlib import Path
from types import SimpleNamespace
from reclib.data.prepare import build
from reclib.config import DataConfig
from reclib.data.read import Ingested

def fill(con, progress, work):
    con.execute(
        "create table raw as select range as row, 'A' || md5('u' || range % {users}) as \\"user\\", "
        "'B' || hash(range * 31) % {items} as item, 5.0 as rating, "
        "(946684800 + hash(range) % 500000000)::bigint as time from range({rows})"
    )
    return Ingested("s", dict(), {rows}, dict(), [], lambda keys: dict())

made = SimpleNamespace(name="made", identity="", fill=fill)
build(made, DataConfig(memory_limit_mb={limit}), Path(sys.argv[1]), "key")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """Four times the rows may take a little more than the database's limit, not four times the memory."""
    peaks = []
    for rows in (50_000, 200_000):
        code = LIKE_ELECTRONICS.format(rows=rows, users=rows // 8, items=rows // 40, limit=128)
        command = [sys.executable, "-c", code, str(tmp_path / str(rows))]
        environment = os.environ | {"PYTHONPATH": str(system.root())}
        peaks.append(int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout))
    assert peaks[1] < peaks[0] + 128


def test_variants_of_a_product_become_one_item(tmp_path):
    titles = {
        "1": "Acme HDMI Cable (6 Feet), Black",
        "2": "ACME HDMI cable (10 feet) - Red, 2-Pack",
        "3": "Acme HDMI Switch, Black",
        "4": "Acme HDMI Switch Pro",
    }
    bought = {"ann": "12131", "bob": "3411"}
    rows = [(user, item, None, time) for user in bought for time, item in enumerate(bought[user])]
    merged = prepared(tmp_path / "merged", rows, titles=titles, merge_variants=True)
    assert histories_of(merged) == {"ann": ["1", "3", "1"], "bob": ["3", "4", "1"]}
    steps = {step["step"]: (step["items"], step["interactions"]) for step in merged.manifest["steps"]}
    assert (steps["source"], steps["variants merged"]) == ((4, 9), (3, 6))
    assert prepared(tmp_path / "plain", rows, titles=titles).fingerprint != merged.fingerprint
    with pytest.raises(InputError, match="'merge_variants' is True: expected titles, and dataset 'made' has"):
        prepared(tmp_path / "none", rows, merge_variants=True)
