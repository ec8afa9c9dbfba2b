"""Prepared datasets: equal to a plain preparation, cached, whole or not there; where ml-100k comes from."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from conftest import disk_of, python, refused, sample
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reclib import system
from reclib.config import DataConfig, InputError, as_dict, changed
from reclib.data import fetch
from reclib.data import prepare as prepare_module
from reclib.data.dataset import Dataset, load
from reclib.data.prepare import Source, build, data_main, folder_of, prepare, synthetic_dataset
from reclib.data.read import Ingested

# the default dataset, pinned: a change here is a change of rules and needs another RULES_VERSION
FINGERPRINT = "11351b1d3c74ba8a"
START = 978_307_200  # 2001-01-01: readers refuse times before 1990
TEST_TARGETS = "3729284302d521e8ab1021106a5ce349d4277fdfd1f77d9ad0f5a1a621976d7d"


@pytest.fixture(scope="session")
def raw_files():
    """The real files, kept in the project's own cache so that they are fetched once."""
    try:
        return fetch.files()
    except InputError as error:
        pytest.skip(f"ml-100k is neither cached nor reachable: {error}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of its own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RECLIB_DATA", str(folder))
    return folder


@pytest.fixture
def ml_100k(raw_files, cache):
    """The real files in place in an empty cache."""
    fetch.folder().mkdir(parents=True)
    for path in raw_files[:2]:
        (fetch.folder() / path.name).write_bytes(path.read_bytes())
    return fetch.folder()


def own_file(folder: Path, rows) -> str:
    """Write (user, item, rating, seconds since `START`) rows as `u.data`."""
    path = folder / "u.data"
    path.write_text("".join(f"{user}\t{item}\t{rating}\t{START + t}\n" for user, item, rating, t in rows))
    return str(path)


def test_counts_and_splits_of_real_ml_100k(ml_100k):
    dataset = prepare(DataConfig())
    assert (dataset.num_users, dataset.num_items, dataset.num_interactions) == (943, 1349, 99_287)
    steps = {step.pop("step"): tuple(step.values()) for step in dataset.manifest["steps"]}
    assert steps["source"] == (943, 1682, 100_000)
    assert sum(steps[part][2] for part in ("train", "valid", "test")) == 99_287
    assert dataset.manifest["test_targets_sha256"] == TEST_TARGETS
    assert dataset.fingerprint == FINGERPRINT
    assert dataset.title(1) == "Toy Story (1995)"
    assert all(key in dataset.titles for key in dataset.item_keys[1:].tolist())
    assert (dataset.items.min(), dataset.items.max()) == (1, dataset.num_items)


def test_official_files_give_the_same_dataset(ml_100k, monkeypatch, tmp_path):
    from_recbole = prepare(DataConfig())
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "official"))
    fetch.folder().mkdir(parents=True)
    for name in fetch.OFFICIAL:
        content = gzip.decompress(sample(f"ml-100k/{name}.gz").read_bytes())
        (fetch.folder() / name).write_bytes(content)
    official = prepare(DataConfig())
    assert official.manifest["source"]["file"] == "u.data"
    assert official.fingerprint == from_recbole.fingerprint
    assert official.titles == from_recbole.titles


def test_ties_are_in_the_order_that_was_chosen_and_counted(tmp_path):
    # The time that two users share is no tie.
    rows = [("a", item, 1, 7) for item in (5, 3, 9, 1)] + [("a", 8, 1, 6), ("b", 1, 1, 7)]
    config = DataConfig(dataset=own_file(tmp_path, rows), min_user=1, min_item=1)
    source = prepare(config)
    assert histories_of(source)["a"] == ["8", "5", "3", "9", "1"]
    shares = {"ascending_share": 0.25, "tied_ascending_share": pytest.approx(1 / 3)}
    assert source.manifest["ties"] == {"interactions": 4, "test_targets": 1} | shares
    by_item = prepare(changed(config, ties="item"))
    assert histories_of(by_item)["a"] == ["8", "1", "3", "5", "9"]
    assert by_item.manifest["ties"]["tied_ascending_share"] == 1.0
    assert by_item.manifest["rules"]["order"] == "user, timestamp, item, row"
    shuffled = [prepare(changed(config, ties="shuffle", ties_seed=seed)) for seed in (0, 0, 1, 2)]
    orders = [histories_of(dataset)["a"] for dataset in shuffled]
    assert orders[0] == orders[1] != orders[2] != orders[3]
    assert all(order[0] == "8" and sorted(order) == ["1", "3", "5", "8", "9"] for order in orders)
    assert shuffled[2].manifest["rules"]["order"] == "user, timestamp, shuffled by seed 1"
    assert len({dataset.fingerprint for dataset in (source, by_item, *shuffled[1:])}) == 5
    assert len({prepare(changed(config, ties_seed=seed)).fingerprint for seed in (0, 1)}) == 1
    assert as_dict(config) == as_dict(changed(config, ties="source")) != as_dict(changed(config, ties="item"))


def contents(dataset: Dataset):
    arrays = [getattr(dataset, name).tolist() for name in ("items", "offsets", "item_keys", "user_keys")]
    return arrays, dict(dataset.titles), dataset.manifest, dataset.name


SYNTHETIC = DataConfig(dataset="synthetic")


def test_damaged_cache_is_rebuilt(cache):
    fresh = contents(prepare(SYNTHETIC))
    (folder,) = (cache / "prepared").iterdir()
    items, manifest = folder / "items.npy", folder / "manifest.json"
    for damage in (
        lambda: items.write_bytes(items.read_bytes()[:-4]),
        lambda: items.write_bytes(items.read_bytes()[:-1] + b"\1"),
        lambda: manifest.write_text(manifest.read_text().replace("300", "301")),
        lambda: (folder / "titles.json").unlink(),
        lambda: (folder / "seal.json").write_text("{"),
        lambda: [path.unlink() for path in folder.iterdir()],
    ):
        damage()
        assert contents(prepare(SYNTHETIC)) == fresh
        assert list((cache / "prepared").iterdir()) == [folder]
        assert json.loads(manifest.read_text()) == fresh[2]


def test_records_name_no_folder(tmp_path, monkeypatch):
    own_file(tmp_path, [("a", i, 1, i) for i in range(4)])
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))  # a relative path starts there
    manifest = prepare(DataConfig(dataset="u.data", min_user=1, min_item=1)).manifest
    assert manifest["source"]["file"] == "u.data"
    assert str(tmp_path) not in json.dumps(manifest)
    assert manifest["ties"]["tied_ascending_share"] is None  # there are none


@pytest.fixture
def small(monkeypatch, cache):
    """Stand in for the real files with small ones: {name: content}, and the zip that holds them."""
    contents = {
        "u.data": b"".join(b"%d\t%d\t3\t%d\n" % (u, i, START + i) for u in range(6) for i in range(6)),
        "u.item": "".join(f"{i}|Caf\u00e9 {i}|x\n" for i in range(6)).encode("latin-1"),
    }
    zipped = cache.parent / "served" / "ml-100k.zip"
    zipped.parent.mkdir()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name, content in contents.items():
            archive.writestr(f"ml-100k/{name}", content)
    for name, content in contents.items():
        monkeypatch.setitem(fetch.SHA256, name, hashlib.sha256(content).hexdigest())
    checksum = f"sha256:{hashlib.sha256(zipped.read_bytes()).hexdigest()}"
    expected = dataclasses.replace(fetch.known("ml-100k"), checksum=checksum)
    monkeypatch.setattr(fetch, "known", lambda name: expected)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip fails at once, without network
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache.parent / "served"))
    return zipped


def test_the_official_archive_is_downloaded_kept_and_may_be_put_there_by_hand(small, cache, monkeypatch):
    monkeypatch.setenv("RECLIB_MIRROR", str(small.parent))
    dataset = prepare(DataConfig())
    assert (dataset.num_users, dataset.num_items, dataset.title(1)) == (6, 6, "Café 0")
    assert dataset.manifest["source"]["origin"] == "GroupLens"
    (fetch.folder() / "u.data").write_bytes(b"1\t1\t3\t978307200\n")
    refused(r"u\.data is truncated or altered", prepare, DataConfig())  # though it is prepared already
    assert (fetch.folder() / "u.data").stat().st_size == 16  # the user's file is left alone
    monkeypatch.setenv("RECLIB_OFFLINE", "1")
    shutil.rmtree(fetch.folder())
    assert fetch.files().interactions.exists()  # from the archive
    assert sorted(p.name for p in (cache / "raw").iterdir()) == ["ml-100k", "ml-100k.zip"]
    (fetch.folder() / "u.item").unlink()
    refused(r"u\.item is missing beside u\.data and u\.item", prepare, DataConfig())
    shutil.rmtree(cache)
    monkeypatch.delenv("RECLIB_MIRROR")
    problem = f"RECLIB_OFFLINE is set.*put a whole ml-100k.zip at {re.escape(str(fetch.archive()))}"
    refused(problem, prepare, DataConfig())


@pytest.fixture
def wheel(small, monkeypatch):
    """A wheel of recbole 1.2.1 where pip finds it without network; returns what its files should be."""
    header = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    contents = {
        "ml-100k.inter": header + zipfile.ZipFile(small).read("ml-100k/u.data"),
        "ml-100k.item": b"item_id:token\tmovie_title:token_seq\n0\tFrom the wheel\n",
    }
    about = {
        "METADATA": "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(small.parent / "recbole-1.2.1-py3-none-any.whl", "w") as archive:
        for name, text in about.items():
            archive.writestr(f"recbole-1.2.1.dist-info/{name}", text)
        for name, content in contents.items():
            archive.writestr(f"recbole/dataset_example/ml-100k/{name}", content)
    for name, content in contents.items():
        monkeypatch.setitem(fetch.SHA256, name, hashlib.sha256(content).hexdigest())
    monkeypatch.setenv("RECLIB_MIRROR", "http://127.0.0.1:9/nobody")
    return contents


def test_the_wheel_by_pip_whose_altered_files_are_never_put_in_place(wheel, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(fetch.SHA256, "ml-100k.inter", "0" * 64)  # another file was expected
        refused(r"ml-100k\.inter is truncated or altered", prepare, DataConfig())
    assert list((cache / "raw").iterdir()) == []
    dataset = prepare(DataConfig())
    assert (dataset.manifest["source"]["file"], dataset.title(1)) == ("ml-100k.inter", "From the wheel")
    assert [path.name for path in (cache / "raw").iterdir()] == ["ml-100k"]


def test_synthetic_histories_are_seeded_and_shaped():
    first, again, other = (synthetic_dataset(200, 100, 12.0, seed=seed) for seed in (3, 3, 4))
    assert contents(first) == contents(again)
    assert first.fingerprint != other.fingerprint

    dataset = synthetic_dataset(2000, 300, 20.0, seed=0)
    assert (dataset.num_users, dataset.num_items, dataset.lengths.min()) == (2000, 300, 5)
    assert dataset.lengths.mean() == pytest.approx(20.0, rel=0.05)
    pairs = np.repeat(np.arange(2000), dataset.lengths) * 301 + dataset.items
    assert np.unique(pairs).size == pairs.size  # no user meets an item twice
    counts = np.sort(np.bincount(dataset.items, minlength=301)[1:])[::-1]
    assert counts[:30].sum() > 0.4 * counts.sum()  # a tenth of the items has most of the interactions
    refused(r"mean length is 4\.0, expected at least 5", synthetic_dataset, 10, 100, 4.0, seed=0)


OWN = [(f"reader {u}", f"book {i}", 1, 10 * u + i) for u in range(4) for i in range(5) if (u + i) % 4]


@pytest.fixture
def out(cache, tmp_path):
    """A prepared folder."""
    config = DataConfig(dataset=own_file(tmp_path, OWN), min_user=1, min_item=1)
    return folder_of(config, tmp_path / "out")


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    code = data_main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_command_prepares_a_file_of_ones_own(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = "who,what,when\n" + "".join(f"{u},{i},{START + t}\n" for u, i, _, t in OWN)
    (tmp_path / "own.csv").write_text(table)
    options = ("--columns", "user=who,item=what,time=when", "--min-user", 1, "--min-item", 1)
    code, out, errors = run(capsys, "prepare", "own.csv", "--out", "out", *options)
    assert (code, out.splitlines()[-1], errors) == (0, str(tmp_path / "out/manifest.json"), "")
    dataset = prepare(DataConfig(dataset=str(tmp_path / "out")))  # a prepared folder is a dataset
    assert (dataset.num_users, dataset.num_items, dataset.num_interactions) == (4, 5, 15)
    assert not cache.exists() or not any(cache.rglob("*"))


def test_command_again_does_nothing_and_other_options_replace_the_folder(out, tmp_path, capsys, monkeypatch):
    given = (tmp_path / "u.data", "--out", out, "--min-item", 1, "--min-user")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "build", lambda *_: pytest.fail("prepared again"))
        assert run(capsys, "prepare", *given, 1)[0] == 0
    assert run(capsys, "prepare", *given, 4)[0] == 0
    assert load(out).manifest["core"]["min_user"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "u.data"]


def test_show_prints_counts_and_verify_finds_one_altered_byte(out, capsys, monkeypatch):
    code, printed, _ = run(capsys, "show", out)
    assert code == 0
    assert ["source", "4", "5", "15"] in [line.split() for line in printed.splitlines()]
    assert "leave-one-out:" in printed
    assert "global time:" in printed

    monkeypatch.setattr(system, "HASHED_ALWAYS", 0)  # as if all files were large
    assert run(capsys, "verify", out)[0] == 0
    whole = (out / "times.npy").read_bytes()
    (out / "times.npy").write_bytes(whole[:-1] + b"\1")
    items = load(out).items.base  # sizes and the seal are as they were: this is what `verify` is for
    assert isinstance(items, np.memmap)  # loading reads no array
    code, _, error = run(capsys, "verify", out)
    assert (code, error.count("\n")) == (2, 1)
    assert "times.npy is altered: its sha256 differs" in error


def test_what_is_wrong_is_one_line_and_no_other_folder_is_written(out, tmp_path, capsys):
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letters.txt").write_text("dear")
    (out / "offsets.npy").unlink()
    data = tmp_path / "u.data"
    for arguments, problem in (
        (["verify", other], "expected a folder that `prepare` wrote"),
        (["prepare", data, "--out", other, "--min-item", 1], "give a new folder"),
        (["show", out], "no whole prepared dataset (offsets.npy"),
        (["prepare", out], "no whole prepared dataset (offsets.npy"),
        (["show", "nowhere"], "no whole prepared dataset"),
        (["prepare", "ml-10k"], "'ml-10k' (did you mean 'ml-100k'?): expected one of"),
        (["prepare", "ml-100k", "--min-user", "0"], "'min_user' is 0"),
        (
            ["prepare", "x", "--columns", "who=a"],
            "expected pairs user=NAME,item=NAME,time=NAME in columns, not 'who'",
        ),
        (["prepare", "x", "--core", "none"], "invalid choice"),
        ([], "required: command"),
    ):
        try:
            code, _, error = run(capsys, *arguments)
        except SystemExit as ended:
            code, error = ended.code, capsys.readouterr().err
        assert (code, error.count("\n")) == (2, 1)
        assert problem in error
    assert [path.name for path in other.iterdir()] == ["letters.txt"]


def test_fingerprint_is_that_of_the_committed_records():
    records = system.root() / "executed" / "cpu" / "results.jsonl"
    lines = map(json.loads, records.read_text().splitlines())
    fingerprints = {line["data"]["fingerprint"] for line in lines if line["data"]["name"] == "ml-100k"}
    assert fingerprints == {FINGERPRINT}


COLUMNS = ("user", "item", "time")
# lengths, character orders and code points beyond the first plane all decide the order of ids
KEYS = st.text(alphabet="aZ9-_é\u4e00\U0001f600", min_size=1, max_size=3)


def source(rows, time_unit="s", titles=None) -> Source:
    """A source whose `raw` is the given (user, item, time) rows."""

    def fill(con: duckdb.DuckDBPyConnection, progress, work):
        progress(1, 2)
        assert work.is_dir()
        con.register("frame", pd.DataFrame(rows, columns=list(COLUMNS)).reset_index(names="row"))
        con.execute(
            'create table raw as select row::bigint as row, "user"::varchar as "user", '
            "item::varchar as item, time::bigint as time from frame"
        )
        con.unregister("frame")
        about = {"origin": "file", "file": "made.tsv", "sha256": "0" * 64}
        example = {"line": 3, "reason": "field missing", "text": "x"}
        of_items = lambda keys: {k: t for k, t in (titles or {}).items() if k in keys}  # noqa: E731
        return Ingested(time_unit, about, len(rows) + 1, {"field missing": 1}, [example], of_items)

    return Source("made", "made", fill)


def prepared_from(folder: Path, rows, *, time_unit="s", titles=None, **config) -> Dataset:
    config = {"min_user": 1, "min_item": 1} | config
    build(source(rows, time_unit, titles), DataConfig(**config), folder, "key")
    return load(folder)


def histories_of(prepared: Dataset) -> dict[str, list[str]]:
    keys = prepared.item_keys[prepared.items].tolist()
    bounds = itertools.pairwise(prepared.offsets)
    return {user: keys[a:b] for user, (a, b) in zip(prepared.user_keys, bounds, strict=True)}


def deduplicated(rows, rule):
    """Plainly: rows are (user, item, time) in the source's order."""
    if rule == "keep":
        return list(rows)
    groups: dict[tuple, list[int]] = {}
    for number, (user, item, time) in enumerate(rows):
        groups.setdefault((user, item, time) if rule == "exact" else (user, item), []).append(number)
    pick = max if rule == "last" else min
    stay = {pick(group, key=lambda n: (rows[n][2], n)) for group in groups.values()}
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
    rows=st.lists(st.tuples(KEYS, KEYS, st.integers(0, 4)), min_size=1, max_size=40),
    minimum=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    rule=st.sampled_from(["keep", "exact", "first", "last"]),
    core=st.sampled_from(["fixed_point", "single_pass"]),
)
# user b falls below 2 only when item 3 is gone: the single pass keeps what it leaves of b
@example([(*pair, 1) for pair in ("a1", "a2", "b1", "b3", "c2", "c1")], (2, 2), "keep", "single_pass")
@example([(*pair, 1) for pair in ("a1", "a2", "b1", "b3", "c2", "c1")], (2, 2), "keep", "fixed_point")
def test_preparation_equals_a_plain_one(tmp_path_factory, rows, minimum, rule, core):
    folder = tmp_path_factory.mktemp("plain") / "out"
    expected = core_of(deduplicated(rows, rule), *minimum, passes=1 if core == "single_pass" else 1000)
    config = {"min_user": minimum[0], "min_item": minimum[1], "duplicates": rule, "core": core}
    if not expected:
        refused("nothing of dataset 'made' is left by the k-core", prepared_from, folder, rows, **config)
        assert not folder.exists()
        return
    prepared = prepared_from(folder, rows, **config)
    users, items = (sorted({row[n] for row in expected}, key=lambda key: (len(key), key)) for n in (0, 1))
    assert prepared.user_keys.tolist() == users
    assert prepared.item_keys.tolist() == ["", *items]
    assert prepared.items.dtype == np.int32
    by_user = {u: sorted((r for r in expected if r[0] == u), key=lambda r: r[2]) for u in users}  # stable
    assert histories_of(prepared) == {user: [row[1] for row in rows] for user, rows in by_user.items()}
    assert prepared.times.tolist() == [row[2] for rows in by_user.values() for row in rows]


def test_counts_of_5_core_sets_are_the_published_ones():
    for name, *counts in (
        ("amazon-beauty-2014-5core/Beauty_s3rec.txt.gz", 22_363, 12_101, 198_502),
        ("amazon-toys-2014-5core/Toys_and_Games_s3rec.txt.gz", 19_412, 11_924, 167_597),
    ):
        prepared = prepare(DataConfig(dataset=str(sample(name))))
        assert list(prepared.manifest["steps"][0].values()) == ["source", *counts]
        assert prepared.manifest["core"]["passes"] == []  # a fixed point
        assert [prepared.num_users, prepared.num_items, prepared.num_interactions] == counts
        assert np.bincount(prepared.items)[1:].min() >= 5
        assert prepared.lengths.min() >= 5


def test_manifest_says_what_happened(tmp_path):
    rows = [("u", item, time) for item, time in ((1, 5), (2, 6), (2, 6), (3, 6), (4, 7))]
    titles = {"2": "Two", "9": "Not here"}
    prepared = prepared_from(tmp_path / "out", rows, duplicates="exact", titles=titles)
    manifest = prepared.manifest
    steps = {step["step"]: step["interactions"] for step in manifest["steps"]}
    assert steps == {"source": 5, "de-duplicated": 4, "k-core": 4, "train": 2, "valid": 1, "test": 1}
    assert {(step["users"], step["items"]) for step in manifest["steps"]} == {(1, 4)}
    assert manifest["source"] == {"origin": "file", "file": "made.tsv", "sha256": "0" * 64}
    assert {"lines": 6, "rejected": {"field missing": 1}}.items() <= manifest["reading"].items()
    assert manifest["reading"]["rejected_examples"][0]["line"] == 3
    assert (manifest["ties"]["interactions"], manifest["ties"]["test_targets"]) == (2, 0)
    assert (dict(prepared.titles), prepared.title(2), prepared.title(1)) == ({"2": "Two"}, "Two", "1")


def test_order_without_times(tmp_path):
    rows = [("u", 5, 0), ("u", 3, 1), ("v", 3, 0), ("u", 4, 2)]
    # No rule changes a known order.
    prepared = prepared_from(tmp_path / "out", rows, time_unit="order", ties="item")
    assert histories_of(prepared) == {"u": ["5", "3", "4"], "v": ["3"]}
    assert prepared.times is prepared.manifest["ties"]["interactions"] is None
    assert not (tmp_path / "out" / "times.npy").exists()


def test_impossible_ids_are_refused(tmp_path):
    for key in ("k" * 257, "nul\0inside"):
        rows = [("u", key, 1)]
        refused("^item id .* expected at most 256 bytes", prepared_from, tmp_path / "out", rows)


def test_a_memory_limit_that_is_too_low_is_refused(tmp_path):
    rows = [(f"user {n}", f"item {n}", n) for n in range(60_000)]
    refused("'memory_limit_mb' is 1, too low", prepared_from, tmp_path / "out", rows, memory_limit_mb=1)
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_nothing(tmp_path, cache, monkeypatch):
    """The database, its spilled rows and the output are all on a disk that is too small for them."""
    rows = [(f"user {n // 5}", f"item {n % 7000} {n % 11}", n) for n in range(50_000)]
    for megabytes in (1, 4):
        with disk_of(megabytes, tmp_path / "disk") as disk:
            monkeypatch.setenv("RECLIB_DATA", str(disk / "data"))
            with pytest.raises(OSError) as error:  # noqa: PT011  # the system's and the database's words
                prepared_from(disk / "data" / "prepared" / "out", rows)
            assert "\n" not in str(error.value)
            assert [path for path in disk.rglob("*") if path.is_file()] == []
    monkeypatch.setenv("RECLIB_DATA", str(cache))  # and with room the same command works
    assert prepared_from(tmp_path / "out", rows).num_interactions == 50_000


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
        "'B' || hash(range * 31) % {items} as item, "
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
        peaks.append(int(python("-c", code, tmp_path / str(rows), check=True).stdout))
    assert peaks[1] < peaks[0] + 128


def test_variants_of_a_product_become_one_item(tmp_path):
    cables = ["Acme HDMI Cable (6 Feet), Black", "ACME HDMI cable (10 feet) - Red, 2-Pack"]
    titles = dict(zip("1234", [*cables, "Acme HDMI Switch, Black", "Acme HDMI Switch Pro"], strict=True))
    bought = {"ann": "12131", "bob": "3411"}
    rows = [(user, item, time) for user in bought for time, item in enumerate(bought[user])]
    merged = prepared_from(tmp_path / "merged", rows, titles=titles, merge_variants=True)
    assert histories_of(merged) == {"ann": ["1", "3", "1"], "bob": ["3", "4", "1"]}
    steps = {step["step"]: (step["items"], step["interactions"]) for step in merged.manifest["steps"]}
    assert (steps["source"], steps["variants merged"]) == ((4, 9), (3, 6))
    assert prepared_from(tmp_path / "plain", rows, titles=titles).fingerprint != merged.fingerprint
    problem = "'merge_variants' is True: expected titles, and dataset 'made' has"
    refused(problem, prepared_from, tmp_path / "none", rows, merge_variants=True)
