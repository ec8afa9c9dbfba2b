"""Files of all kinds through `prepare`: what is kept, in which order, what is rejected and counted."""

import contextlib
import csv
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import CONTENTS, SAMPLES

from reclib.config import DataConfig, InputError
from reclib.data import formats
from reclib.data import prepare as prepare_module
from reclib.data import read as reclib_read
from reclib.data.formats import FORMATS, named
from reclib.data.prepare import _sha256, data_main, folder_of, hashlib, prepare, prepared_folder, source

T = 1577836800  # 2020-01-01


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "data"))


def prepared(path: Path, columns=None, **config) -> tuple[dict[str, str], dict[str, int]]:
    """Return each user's items in order, and what was rejected."""
    config = {"min_user": 1, "min_item": 1, "max_rejected_share": 0.9, **config}
    found = prepare(DataConfig(dataset=str(path), columns=columns, **config))
    histories = {
        user: " ".join(found.item_keys[found.items[found.offsets[n] : found.offsets[n + 1]]])
        for n, user in enumerate(found.user_keys)
    }
    return histories, found.manifest["reading"]["rejected"]


def written(folder: Path, content: str | bytes, name: str = "own.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
    return path


def columns_of(text: str | None) -> dict[str, str] | None:
    return dict(pair.split("=") for pair in text.split(",")) if text else None


UIT = "user,item,time\n"
UITX = "user,item,time,text\n"
# name, content, columns, expected: each user's items in order, or the error; what is rejected
FAULTS = {
    # quoting
    "a mark inside a field": (
        f'{UITX}u,a,{T}, "Great\nu,b,{T + 1},x\nu,c,{T + 2},5"\nu,d,{T + 3},y\n',
        None,
        {"u": "a b c d"},
        {},
    ),
    "a mark in a field of a TSV": (
        f'{UITX}u,a,{T},x "Great\nu,b,{T + 1},x\nu,c,{T + 2},5"\n'.replace(",", "\t"),
        None,
        {"u": "a b c"},
        {},
    ),
    "a mark that opens and is closed below": (
        f'{UITX}u,a,{T},"Great\nu,b,{T + 1},x\nu,c,{T + 2},5"\nu,d,{T + 3},y\n',
        None,
        {"u": "b c d"},
        {"quotation mark never closed": 1},
    ),
    "the same in a TSV": (
        f'{UITX}u,a,{T},"Great\nu,b,{T + 1},x\nu,c,{T + 2},5"\n'.replace(",", "\t"),
        None,
        {"u": "b c"},
        {"quotation mark never closed": 1},
    ),
    "a TSV in row order": (
        'user\titem\nu\t"a\nu\tb\nu\tc"\nu\td\n',
        "time=#row",
        {"u": 'b c" d'},
        {"quotation mark never closed": 1},
    ),
    "a mark that is never closed": (
        f'{UIT}u,a,{T}\nu,"b,{T}\nx\n',
        None,
        {"u": "a"},
        {"quotation mark never closed": 2},
    ),
    "quoted fields": (
        f'{UITX}"u","a,""b""",{T + 1},"one\ntwo\n, three"\n"u","c"d,"{T}",""\n',
        None,
        {"u": 'cd a,"b"'},
        {},
    ),
    "an id over two lines": (
        f'{UIT}u,"a\nb",{T}\nu,c,{T}\n',
        None,
        {"u": "c"},
        {"item with a line break or TAB": 1},
    ),
    "marks in a published CSV": (
        f'userId,movieId,rating,timestamp\n"1","2","4.0","{T}"\n',
        None,
        {"1": "2"},
        {},
    ),
    "too many fields over two lines": (
        f'{UITX}u,a,{T},"x\ny",z\nu,b,{T},x\n',
        None,
        {"u": "b"},
        {"number of fields": 2},
    ),
    "a carriage return": (f"{UIT}u,a,{T}\nu,b\rc,{T}\n", None, {"u": "a"}, {"carriage return": 1}),
    # time
    "offsets": (
        f"{UIT}u,b,2020-03-01 04:59:00-01\nu,c,2020-03-01 06:00:00+00\nu,a,2020-03-01 10:00:00+05\n"
        "u,d,2020-03-01T11:30:00+0530\nu,e,2020-03-01T06:00:00.000001Z\nu,f,2020-03-01 06:00:00.000002 UTC\n",
        None,
        {"u": "a b c d e f"},
        {},
    ),
    "AM and PM": (
        f"{UIT}u,c,2020-03-01 10:00:00 PM\nu,b,2020-03-01 11:00:00 AM\nu,a,2020-03-01 12:00:00 AM\n"
        "u,d,2020-03-01 13:00:00 PM\n",
        None,
        {"u": "a b c"},
        {"timestamp not a number or date": 1},
    ),
    "fractions": (f"{UIT}u,b,{T}.9\nu,a,{T}.1\nu,c,{T}.900001\n", None, {"u": "a b c"}, {}),
    "fractions of dates": (
        f"{UIT}u,b,2020-03-01 10:00:00.9\nu,a,2020-03-01 10:00:00.1\nu,c,2020-03-01 10:00:01\n",
        None,
        {"u": "a b c"},
        {},
    ),
    "zones that are no offset": (
        f"{UIT}u,a,2020-03-01 10:00:00 EST\nu,b,2020-03-01 10:00:00 Europe/Paris\nu,c,2020-03-01\n"
        "u,d,2020-03-01 10:00:00+99\n",
        None,
        {"u": "c"},
        {"timestamp not a number or date": 3},
    ),
    "dates of one digit": (
        f"{UIT}u,c,2020-3-10\nu,b,2020-3-1\nu,a,2020/02/28 1:00\n",
        None,
        {"u": "a b c"},
        {},
    ),
    "no dates": (
        f"{UIT}u,a,2020-13-01\nu,b,2020-02-30\nu,c,\nu,d,nan\nu,e,5\nu,f,{T}\n",
        None,
        {"u": "f"},
        {"timestamp not a number or date": 3, "timestamp missing": 1, "timestamp out of range": 1},
    ),
    "units": (
        f"{UIT}u,b,{T + 1}000\nu,c,{T + 2}\nu,a,{T}000000\nu,d,{T + 3}000000000\n",
        None,
        {"u": "a b c d"},
        {},
    ),
    "JSON": (
        f'{{"user": "u", "item": "c", "time": {T}.9}}\n\n'
        f'{{"user": "u", "item": 5, "time": "2020-01-01T01:00:00+01"}}\n'
        f'{{"user": "u", "item": "b", "time": "{T}.1"}}\n{{"user": "u", "item": null, "time": {T}}}\n'
        f'{{"user": "u", "item": [1], "time": {T}}}\n{{"user": "u", "time": {T}}}\n{{"user": "u"\n',
        None,
        {"u": "5 b c"},
        {"field of another type": 2, "field missing": 1, "not JSON": 1},
    ),
    "JSON objects beside each other and over two lines": (
        f'{{"user": "u", "item": "a", "time": {T}}}{{"user": "u", "item": "b", "time": {T}}}\n'
        f'{{"user": "u", "item": "c",\n"time": {T}}}\n{{"user": "u", "item": "d", "time": {T}}}\n',
        None,
        {"u": "d"},
        {"not JSON": 2, "field of another type": 1},
    ),
    "JSON by columns": (
        '{"who": 1, "what": "b"}\n{"who": 1, "what": "a"}\n',
        "user=who,item=what,time=#row",
        {"1": "b a"},
        {},
    ),
    # columns
    "positions of a headerless table": (
        "2,1\n2,3\n1,3\n1,1\n",
        "user=1,item=2,time=#row",
        {"1": "3 1", "2": "1 3"},
        {},
    ),
    "positions that the first row holds": (
        f"1,1193,5,{T}\n1,7,4,{T + 1}\n",
        "user=1,item=2,time=4",
        {"1": "1193 7"},
        {},
    ),
    "positions below a header": (f"{UIT}u,a,{T}\n", "user=1,item=2,time=3", {"u": "a"}, {}),
    "positions below an unclear header": (f"x,y,z\nu,a,{T}\n", "user=1,item=2,time=3", {"u": "a"}, {}),
    "positions of a TSV": (f"a\tu\t5\t{T}\n", "user=2,item=1,time=4", {"u": "a"}, {}),
    "a headerless TSV": (
        f"7\t12\t5\t{T}\n7\t13\t5\t{T}\n",
        None,
        "does not show which column is the user's",
        {},
    ),
    "a comment above dates": (
        "# made by hand\n" + "".join(f"u,a,2020-01-01 10:0{n}:00\n" for n in range(5)),
        None,
        "remove lines above the table",
        {},
    ),
    "a comment above a TSV with dates": (
        "# made by hand\n" + "".join(f"u{n}\ta\t2020-01-01 10:0{n}:00\n" for n in range(5)),
        None,
        "separated by .*: remove lines above the table",
        {},
    ),
    "dates between spaces": (
        "".join(f"u{n} a 2020-01-01 10:0{n}:00\n" for n in range(5)),
        None,
        "most lines are of one length and end as times do",
        {},
    ),
    "seconds between spaces": (
        "".join(f"{n} 17 4 {T}\n" for n in range(5)),
        None,
        "most lines are of one length and end as times do",
        {},
    ),
    "histories of one length": ("1 7 5\n2 8 4\n", None, {"1": "7 5", "2": "8 4"}, {}),
    "names of columns above numbers in row order": (
        "customer,product\n7,9\n7,8\n",
        "user=1,item=2,time=#row",
        {"7": "9 8"},
        {},
    ),
    "a first row of words in row order": (
        "anna,7\nbob,8\n",
        "user=1,item=2,time=#row",
        {"anna": "7", "bob": "8"},
        {},
    ),
    "a bad time in a first row": (
        f"1,2,n/a\n1,7,{T}\n",
        "user=1,item=2,time=3",
        {"1": "7"},
        {"timestamp not a number or date": 1},
    ),
    "two columns of one name": (f"user,item,item,time\nu,a,b,{T}\n", None, "item may be item or item", {}),
    "words as ratings": (f"user,item,time,rating\nu,a,{T},good\n", None, {"u": "a"}, {}),
    "some words as ratings": (
        f"user,item,time,rating\nu,a,{T},good\nu,b,{T},4\n",
        None,
        {"u": "b"},
        {"rating not a number": 1},
    ),
    "ratings left out": (
        f"user,item,time,rating\nu,a,{T},good\nu,b,{T},4\n",
        "rating=#none",
        {"u": "a b"},
        {},
    ),
    "missing ids": (f"{UIT},a,{T}\nu,,{T}\nu,b,{T}\n", None, {"u": "b"}, {"user empty": 1, "item empty": 1}),
    "blank lines": (f"{UIT}\nu,a,{T}\n\r\nu,b,{T}\n\n", None, {"u": "a b"}, {}),
    "a header line again": (f"{UIT}u,a,{T}\n{UIT}", None, {"u": "a"}, {"header line again": 1}),
    "bytes that are not UTF-8": (f"{UIT}u,\udcff,{T}\nu,b,{T}\n", None, {"u": "b"}, {"not UTF-8": 1}),
    # what cannot be read
    "a JSON array": (
        '[{"user": "u", "item": "a"}]\n',
        None,
        "a JSON array, expected one JSON object a line",
        {},
    ),
    "a JSON array by columns": (
        '[{"user": "u"}]\n',
        "user=user",
        "a JSON array, expected one JSON object",
        {},
    ),
    "JSON behind spaces": (f' {{"user": "u", "item": "a", "time": {T}}}\n', None, {"u": "a"}, {}),
    "JSON over lines": ('{\n "user": "u"\n}\n', None, "expected one whole JSON object a line", {}),
    "JSON without ids": (
        '{"asin": "1", "price": 3}\n',
        None,
        "no column is clearly the user.*columns found: asin",
        {},
    ),
    "UTF-16": (f"{UIT}a,b,{T}\n".encode("utf-16"), None, "UTF-16 text, expected UTF-8", {}),
    "UTF-16 without a mark": (f"{UIT}a,b,{T}\n".encode("utf-16-le"), None, "UTF-16 text, expected UTF-8", {}),
    "xz": (b"\xfd7zXZ\0" + b"x" * 40, None, "compressed by xz: unpack it", {}),
    "lz4": (b"\x04\x22\x4d\x18" + b"x" * 40, None, "compressed by lz4: unpack it", {}),
    "rar": (b"Rar!\x1a\x07\x01" + b"x" * 40, None, "a rar archive: unpack it", {}),
    "zstd": (b"\x28\xb5\x2f\xfd" + b"x" * 40, None, "compressed by zstd: unpack it", {}),
    "Parquet inside gzip": (gzip.compress(b"PAR1" + b"x" * 40), None, "holds a Parquet file: unpack it", {}),
    "gzip inside gzip": (gzip.compress(gzip.compress(b"x")), None, "holds another gzip file: unpack it", {}),
    "an empty member first": (
        gzip.compress(b"") + gzip.compress(f"{UIT}u,a,{T}\n".encode()),
        None,
        {"u": "a"},
        {},
    ),
    "a very long line": (
        gzip.compress(UIT.encode() + b"x" * (40 << 20)),
        None,
        "line 2: longer than 16,777,216 bytes",
        {},
    ),
    "a quoted field without end": (
        f'{UIT}u,a,"' + ("x" * 999 + "\n") * 30_000,
        None,
        "line 2: a quotation mark .* not closed within 16,777,216",
        {},
    ),
    "lines that end with CR": (f"{UIT}a,b,{T}\n".replace("\n", "\r"), None, "lines end with CR alone", {}),
}


def histories(path: Path, columns=None, share: float = 0.9) -> tuple[dict[str, str], dict[str, int]]:
    """Return each user's items in order, and what was rejected, as the reader gives them to `prepare`."""
    format = named("auto", path, columns)
    with duckdb.connect() as con:
        bad = reclib_read.ingest(con, path, format, columns=columns, max_rejected_share=share).rejected
        query = "SELECT \"user\", string_agg(item, ' ' ORDER BY time, row) FROM raw GROUP BY ALL"
        return dict(con.execute(query).fetchall()), bad


def test_one_reading_of_text(tmp_path):
    for number, (name, (content, columns, expected, rejected)) in enumerate(FAULTS.items()):
        path = written(tmp_path, content)
        read = prepared if number % 9 == 0 else histories  # both give the same; the whole way is slow
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected) as error:
                read(path, columns_of(columns))
            assert "\n" not in str(error.value), name
        else:
            assert read(path, columns_of(columns)) == (expected, rejected), name


def test_a_line_means_the_same_in_whatever_block_it_stands(tmp_path, monkeypatch):
    """Lines before it move every line of the text over the bounds of blocks, and bad lines lie beside it."""
    monkeypatch.setattr(formats, "BLOCK_BYTES", 1)  # a block ends wherever a piece does
    checked = 0
    for content, columns, expected, rejected in FAULTS.values():
        if not isinstance(expected, dict) or columns or not str(content).startswith("user,item,time"):
            continue
        head, body = content.split("\n", 1)
        before = "".join(f"v,i{n},{T + n}" + ",1" * (head.count(",") - 2) + "\n" for n in range(30))
        path = written(tmp_path, f"{head}\n{before}{body}")
        for size in (97, 1000) if "rating" not in head else ():
            monkeypatch.setattr(formats, "PIECE_BYTES", size)
            found, bad = histories(path, share=1.0)
            assert found.pop("v") == " ".join(f"i{n}" for n in range(30))
            assert (found, bad) == (expected, rejected), (content, size)
            checked += 1
    assert checked > 30


def parquet(path: Path, select: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = duckdb.connect().execute(f"CREATE TABLE t AS {select}")
    rows.execute(f"COPY t TO '{path}' (FORMAT parquet)")
    return path


def test_a_parquet_path_is_a_name(tmp_path):
    body = f"AS item, {T} AS time"
    for name in ("user=me/x.parquet", "data1.parquet", "data[1].parquet", "*.parquet", "q?.parquet"):
        path = parquet(tmp_path / "plain.parquet", f"SELECT 'u' AS user, '{name}' {body}")
        target = tmp_path / name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    for name in ("user=me/x.parquet", "data[1].parquet", "*.parquet", "q?.parquet"):
        assert prepared(tmp_path / name) == ({"u": name}, {})


PARQUET = [
    (
        f"SELECT 'u' AS user, i::DOUBLE AS item, {T} + i AS time "
        "FROM (VALUES (1), ('nan'::DOUBLE), (NULL), (2)) t(i)",
        {"u": "1.0 2.0"},
        {"item empty": 2},
    ),
    (
        f"SELECT 'u' AS user, i AS item, {T} AS time, 7 AS file_row_number FROM (VALUES ('a'), ('')) t(i)",
        {"u": "a"},
        {"item empty": 1},
    ),
    (
        "SELECT 'u' AS user, i AS item, t AS time FROM (VALUES ('b', '2020-03-01T04:59:00-01:00'), "
        "('c', '2020-03-01T06:00:00.5+00:00'), ('a', '2020-03-01T10:00:00+05:00'), ('x', '')) t(i, t)",
        {"u": "a b c"},
        {"timestamp missing": 1},
    ),
    (
        f"SELECT 1 AS user, i AS item, {T} + t AS time "
        "FROM (VALUES ('b', 0.9), ('a', 0.1), ('c', NULL)) t(i, t)",
        {"1": "a b"},
        {"timestamp missing": 1},
    ),
    (
        "SELECT 1 AS user, i AS item, t::TIMESTAMP AS time FROM (VALUES ('b', '2020-01-01 00:00:00.9'), "
        "('a', '2020-01-01 00:00:00.1'), ('c', NULL), ('d', '1900-01-01')) t(i, t)",
        {"1": "a b"},
        {"timestamp missing": 1, "timestamp out of range": 1},
    ),
    (
        "SELECT 1 AS user, i AS item, t::TIMESTAMPTZ AS time FROM (VALUES ('b', '2020-01-01 01:00:00+00'), "
        "('a', '2020-01-01 01:00:00+01')) t(i, t)",
        {"1": "a b"},
        {},
    ),
    ("SELECT 1 AS user, 'b' AS item, DATE '2020-01-01' AS time", {"1": "b"}, {}),
    (f"SELECT 1 AS user, 'b' AS item, {T} AS time, 'good' AS rating", {"1": "b"}, {}),
    (f"SELECT 1 AS user, 'b' AS item, {T} AS time, true AS rating", {"1": "b"}, {}),
    (f"SELECT [1] AS user, 'a' AS item, {T} AS time", r"column 'user' for user is of type INTEGER\[\]", {}),
    (f"SELECT 1 AS user, {{'a': 1}} AS item, {T} AS time", r"column 'item' for item is of type STRUCT", {}),
    (f"SELECT 'a'::BLOB AS user, 'a' AS item, {T} AS time", "column 'user' for user is of type BLOB", {}),
    (
        f"SELECT 1 AS user, 'a' AS item, [{T}] AS time",
        r"column 'time' for time is of type INTEGER\[\], expected",
        {},
    ),
    (
        "SELECT 1 AS who, 'a' AS item, {'user': 1} AS s, 1 AS time",
        "no column is clearly the user.*found: who, item, s, time",
        {},
    ),
]


def test_one_reading_of_parquet(tmp_path):
    for number, (select, expected, rejected) in enumerate(PARQUET):
        path = parquet(tmp_path / f"{number}.parquet", select)
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected):
                prepared(path)
        else:
            assert prepared(path) == (expected, rejected), select
    path = parquet(tmp_path / "whole.parquet", f"SELECT 'u' AS user, 'a' AS item, {T} AS time")
    cut = written(tmp_path, path.read_bytes()[:-9], "cut.parquet")
    with pytest.raises(InputError, match=r"cut\.parquet is not a whole Parquet file"):
        prepared(cut)
    with pytest.raises(InputError, match="is a Parquet file, expected format='table', not 'ml-100k'"):
        prepared(path, format="ml-100k")


def test_parquet_columns_are_told_apart_by_their_exact_names(tmp_path):
    path = parquet(tmp_path / "x.parquet", f"SELECT 'a' AS usex, 'b' AS user, 'i' AS item, {T} AS time")
    path.write_bytes(path.read_bytes().replace(b"usex", b"User"))
    with pytest.raises(InputError, match="user may be User or user"):
        prepared(path)
    assert prepared(path, {"user": "User"}) == ({"a": "i"}, {})
    assert prepared(path, {"user": "user"}) == ({"b": "i"}, {})


def test_archives_are_named_and_pipes_are_refused_at_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("x.csv", UIT)
    with pytest.raises(InputError, match=r"a\.zip is a zip archive: unpack it"):
        prepared(tmp_path / "a.zip")
    member = written(tmp_path, UIT)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as packed:
        packed.add(member, "x.csv")
    with pytest.raises(InputError, match=r"a\.tar\.gz holds a tar archive: unpack it"):
        prepared(tmp_path / "a.tar.gz")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe, expected a file"):
        prepared(tmp_path / "pipe")
    with pytest.raises(InputError, match="is a folder"):
        prepared(tmp_path)


def test_names_and_folders_of_any_characters(tmp_path, monkeypatch):
    name = os.fsdecode(b"caf\xe9?.csv")
    home = tmp_path / "a?[b]=c"
    home.mkdir()
    monkeypatch.setenv("RECLIB_DATA", str(home / "data"))
    path = written(home, f"{UIT}u,a,{T}\n", name)
    assert prepared(path) == ({"u": "a"}, {})
    done = subprocess.run(
        [sys.executable, "-m", "reclib", "data", "prepare", path, "--min-user", "1", "--min-item", "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_show_and_limits_at_the_command(tmp_path, capsys):
    path = written(tmp_path, f"{UIT}u,a,{T}\n")
    assert prepared(path, memory_limit_mb=10**18) == ({"u": "a"}, {})
    assert data_main(["prepare", str(path), "--memory-mb", "9" * 20]) == 2

    path = written(tmp_path, UIT + "".join(f"u{n},i{k},{T}\n" for n in range(4) for k in range(5)))
    folder = folder_of(DataConfig(dataset=str(path), min_user=1, min_item=1))
    assert data_main(["show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "leave-one-out" in out
    assert "global_time: " in out


def test_an_interrupted_preparation_leaves_one_line_and_nothing_else(tmp_path):
    rows = (f"u{n % 5000},i{n % 700},{T + n}\n" for n in range(500_000))
    path = written(tmp_path, UIT + "".join(rows))
    command = [sys.executable, "-m", "reclib", "data", "prepare", str(path)]
    home = tmp_path / "data"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            # A shell's background job ignores SIGINT, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while not list(home.glob("scratch.*.partial/rows.duckdb")):  # it is at work
            assert process.poll() is None
        process.send_signal(number)
        assert (process.communicate()[1], process.returncode) == ("interrupted\n", 130)
        assert not list(home.rglob("*.partial"))


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    path = written(tmp_path, f"{UIT}u,a,{T}\n")
    home = tmp_path / "data"
    code = (
        "import pathlib, sys, time\nfrom reclib import system\n"
        f"with system.scratch(pathlib.Path({str(home)!r})) as folder:\n"
        "    (folder / 'big').write_text('x')\n    print(folder, flush=True)\n    time.sleep(600)\n"
    )
    killed, alive = (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    try:
        left, used = (Path(process.stdout.readline().strip()) for process in (killed, alive))
        killed.kill()
        killed.wait()
        assert left.exists()
        prepared(path)
        assert not left.exists()
        assert (used / "big").exists()
    finally:
        alive.kill()
        alive.wait()


# ---- against pandas -----------------------------------------------------------------------------------

IDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\t\r\n\0", exclude_categories=["Cs"]),
    min_size=1,
    max_size=8,
).filter(lambda text: text.strip() == text)
NOTES = st.text(st.sampled_from('ab ,;"\n\t'), max_size=12).filter(
    # a line inside quotation marks that is a whole interaction ends them, so a note may not hold one
    lambda note: all(line.count(",") + line.count("\t") < 2 for line in note.split("\n")[1:])
)
ROWS = st.lists(st.tuples(IDS, IDS, NOTES, st.integers(0, 5), st.integers(0, 10**7)), min_size=1, max_size=25)
BAD = {"csv": "only one field", "tsv": "only one field", "jsonl": '{"user": "u", "item'}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=ROWS,
    kind=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
    piece=st.sampled_from([5, 50, 5000]),
    dates=st.booleans(),
    bad=st.sets(st.integers(0, 24)),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_random_tables_give_what_pandas_reads(tmp_path_factory, rows, kind, piece, dates, bad, quoting):
    folder = tmp_path_factory.mktemp("rows")
    table = pd.DataFrame(rows, columns=["user", "item", "note", "rating", "time"])
    table["note"] = table["note"].str.replace("\t", " ") if kind == "tsv" else table["note"]
    expected = table.sort_values("time", kind="stable")
    stamps = pd.to_datetime(T * 10**6 + table["time"], unit="us", utc=True)
    table["time"] = stamps.dt.strftime("%Y-%m-%dT%H:%M:%S.%f+00:00") if dates else T + table["time"] / 10**6
    path = folder / f"own.{kind}"
    rejected = {n for n in bad if n < len(rows)} if kind in BAD else set()
    if kind == "parquet":
        con = duckdb.connect()
        arrays = {
            name: table[name].to_numpy(object if table[name].dtype == "str" else None) for name in table
        }
        con.register("made", arrays)
        con.execute(f"COPY (SELECT * FROM made) TO '{path}' (FORMAT parquet)")
    else:
        separator = "\t" if kind == "tsv" else ","
        flat = {"sep": separator, "header": False, "index": False, "lineterminator": "\n"}
        text = "" if kind == "jsonl" else separator.join(table.columns) + "\n"
        for n in range(len(rows)):
            row = table.iloc[n : n + 1]
            if kind == "jsonl":
                text += row.to_json(orient="records", lines=True, force_ascii=False, double_precision=15)
            else:
                text += row.to_csv(quoting=quoting, float_format="%.6f", **flat)
            text += BAD[kind] + "\n" if n in rejected else ""
        path.write_text(text, encoding="utf-8", newline="")
    columns = {name: name for name in ("user", "item", "time", "rating")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE_BYTES", piece)
        patch.setattr(formats, "BLOCK_BYTES", 1)
        con = duckdb.connect()
        got = reclib_read.ingest(
            con, path, named("auto", path, columns), columns=columns, max_rejected_share=1.0
        )
    found = con.execute('SELECT "user", item, rating FROM raw ORDER BY time, row').fetchall()
    assert found == [(r.user, r.item, float(r.rating)) for r in expected.itertuples()]
    assert sum(got.rejected.values()) == len(rejected)
    assert got.lines_read == len(rows) + len(rejected)


@pytest.mark.slow
def test_damaged_files_give_an_error_of_ours_or_counted_lines(tmp_path):
    generator = random.Random(0)
    rows = [(f"u{n % 7}", f"i{n % 5}", 'a "b", c', T + n) for n in range(60)]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("user", "item", "note", "time"), *rows])
    jsonl = "".join(
        json.dumps(dict(zip(("user", "item", "note", "time"), row, strict=True))) + "\n" for row in rows
    )
    select = f"SELECT 'u' || (i % 7) AS user, 'i' || (i % 5) AS item, {T} + i AS time FROM range(60) t(i)"
    whole = {
        "own.csv": buffer.getvalue().encode(),
        "own.jsonl": jsonl.encode(),
        "own.csv.gz": gzip.compress(buffer.getvalue().encode()),
        "own.parquet": parquet(tmp_path / "p", select).read_bytes(),
        "u.data": "".join(f"{u}\t{i}\t3\t{t}\n" for u, i, _, t in rows).encode(),
    }
    outcomes = {"read": 0, "refused": 0}
    for _ in range(200):
        name = generator.choice(list(whole))
        content = bytearray(whole[name])
        for _ in range(generator.randint(1, 6)):
            place = generator.randrange(len(content))
            match generator.randrange(3):
                case 0:
                    content[place] = generator.choice(b'",\n\r\t\0 \xff{}0')
                case 1:
                    del content[place : place + generator.randint(1, 30)]
                case 2:
                    content[place:place] = bytes(
                        generator.choices(b'",\n\r\t\0\xff19', k=generator.randint(1, 4))
                    )
            if not content:
                break
        path = written(tmp_path, bytes(content), name)
        con = duckdb.connect()
        try:
            got = reclib_read.ingest(con, path, max_rejected_share=1.0)
            outcomes["read"] += 1
            (kept,) = con.execute("SELECT count(*) FROM raw").fetchone()
            assert got.lines_read == kept + sum(got.rejected.values())
        except InputError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


# ---- each format, and real files ------------------------------------------------------------------------

SECOND = 964_982_703  # in the year 2000


def read(path: Path, format: str = "auto", columns=None, **options):
    """Return the rows of `raw` in their order, and what `ingest` says."""
    con = duckdb.connect()
    got = reclib_read.ingest(con, path, named(format, path, columns), columns=columns, **options)
    return con.execute("SELECT * FROM raw ORDER BY row").fetchall(), got


EXPECTED = {
    "ml-100k": [(0, "196", "242", 3.0, 881250949), (1, "186", "302", 3.0, 891717742)],
    "ml-1m": [(0, "1", "1193", 5.0, 978300760), (1, "1", "661", 3.0, 978302109)],
    "movielens-csv": [(0, "1", "1", 4.0, 964982703)],
    "amazon-2014-json": [(0, "A2IBPI20UZIR0U", "1384719342", 5.0, 1393545600)],
    "amazon-2018-json": [(0, "A2IBPI20UZIR0U", "1384719342", 5.0, 1393545600)],
    "amazon-2023-json": [(0, "AE", "B0", 5.0, 1602133857705)],
    "amazon-2014-csv": [
        (0, "A2IBPI20UZIR0U", "1384719342", 5.0, 1365811200),
        (1, "AKM1MP6P0OYPR", "B00005N7P0", 5.0, 1365811200),
        (2, "A14VAT5EAX3D9S", "013279304X", 5.0, 1365811200),
    ],
    "amazon-2023-csv": [(0, "AE", "B0", 5.0, 1547589356557)],
    "inter": [(0, "1", "2", None, 881250949)],
    "user-per-line": [
        (0, "1", "5", None, 0),
        (1, "1", "6", None, 1),
        (2, "1", "7", None, 2),
        (3, "2", "5", None, 0),
    ],
    "pair-per-line": [(0, "1", "5", None, 0), (1, "1", "6", None, 1), (2, "2", "5", None, 0)],
    "table": [(0, "me", "it", None, 964982703)],
}
EXPECTED["amazon-2018-csv"] = EXPECTED["amazon-2014-csv"]
UNITS = {
    "amazon-2023-json": "ms",
    "amazon-2023-csv": "ms",
    "user-per-line": "order",
    "pair-per-line": "order",
}


def test_each_format_is_read(tmp_path):
    for name, content in CONTENTS.items():
        file = "u.data" if name == "ml-100k" else "file"
        columns = {"user": "customer", "item": "product", "time": "when"} if name == "table" else None
        for data in (content.encode(), gzip.compress(content.encode())):
            path = written(tmp_path, data, file)
            rows, got = read(path, columns=columns, strict=True)
            assert rows == EXPECTED[name], name
            assert got.time_unit == UNITS.get(name, "s"), name
            assert got.lines_read == len(content.splitlines()) - (name in HEADERS), name
            assert got.provenance["format"] == name
            assert got.provenance["bytes"] == path.stat().st_size
            assert got.provenance["sha256"] == _sha256(path)
            assert (got.rejected, got.rejected_examples) == ({}, [])


HEADERS = ("movielens-csv", "amazon-2023-csv", "inter", "table")

# rows, users, items as published; lines that are rejected
REAL = {
    "ml-100k/u.data.gz": (100_000, 943, 1682, "s"),
    "ml-latest-small-2016/ratings.csv.gz": (100_004, 671, 9066, "s"),
    "ml-latest-small-2018/ratings.csv.gz": (100_836, 610, 9724, "s"),
    "amazon-electronics-2014/ratings_Electronics_prefix_with_header.csv.gz": (50_698, 47_141, 3529, "s"),
    "amazon-electronics-2023/interactions_subset.parquet": (31_286, 16_841, 8663, "ms"),
    "amazon-grocery-2014-5core/train.csv.gz": (121_892, 14_681, 8687, "s"),
    "amazon-beauty-2014-5core/Beauty_item_org_rank.txt.gz": (198_502, 22_363, 12_101, "s"),
    "amazon-beauty-2014-full-bert4rec/beauty.txt.gz": (353_962, 40_226, 54_542, "order"),
    "raw-format-samples/amazon-2014/reviews_Musical_Instruments_5.json.gz": (10_261, 1429, 900, "s"),
    "raw-format-samples/amazon-2018/All_Beauty_5.json.gz": (5269, 991, 85, "s"),
    "raw-format-samples/amazon-2018/Magazine_Subscriptions_first546.csv.gz": (546, 535, 22, "s"),
    "raw-format-samples/amazon-2023/Subscription_Boxes.jsonl.gz": (16_216, 15_237, 641, "ms"),
    "raw-format-samples/amazon-2023/All_Beauty_rating_only.csv.gz": (2535, 253, 356, "ms"),
    "raw-format-samples/amazon-2023/All_Beauty.train_w_his.csv.gz": (19_120, 8151, 10_496, "ms"),
}


def sample(name: str) -> Path:
    if not (SAMPLES / name).is_file():
        pytest.skip(f"no sample of a real file at {SAMPLES / name}")
    return SAMPLES / name


COUNTS = 'SELECT count(*), count(DISTINCT "user"), count(DISTINCT item) FROM raw'


def test_counts_of_real_files_are_the_published_ones():
    for name in REAL:
        with duckdb.connect() as con:
            got = reclib_read.ingest(con, sample(name), strict=True)
            assert (*con.execute(COUNTS).fetchone(), got.time_unit) == REAL[name], name
            numbers = con.execute("SELECT min(row), max(row), count(DISTINCT row) FROM raw").fetchone()
            assert numbers == (0, REAL[name][0] - 1, REAL[name][0]), name


def test_odd_real_parquet_files():
    path = sample("ml-1m/pairs_official_order.parquet")
    with pytest.raises(InputError, match=r"no column is clearly the time.*columns found: userID, movieID"):
        read(path)
    con = duckdb.connect()
    got = reclib_read.ingest(con, path, FORMATS["table"], columns={"time": "#row"})
    assert con.execute(COUNTS).fetchone() == (1_000_209, 6040, 3706)
    assert got.time_unit == "order"
    assert con.execute("SELECT bool_and(time >= 0), max(time) FROM raw").fetchone() == (True, 2313)

    rows, got = read(sample("ml-latest-2023-subset/ratings.parquet"))
    assert len(rows) == 206_584
    assert got.rejected == {"timestamp out of range": 1}
    assert got.rejected_examples[0]["line"] == 206_585
    assert "1345382" in got.rejected_examples[0]["text"]


def small_blocks(patch: pytest.MonkeyPatch, size: int = 64) -> None:
    patch.setattr(formats, "BLOCK_BYTES", size)
    patch.setattr(formats, "PIECE_BYTES", 16)


def good_lines(format: str, count: int) -> list[str]:
    if format == "amazon-2018-json":
        review = {"asin": "B00005N7P0", "overall": 5.0, "unixReviewTime": SECOND}
        return [json.dumps({"reviewerID": f"A{n}", **review}) for n in range(count)]
    if format == "amazon-2023-json":
        review = {"parent_asin": "B00005N7P0", "rating": 5.0, "timestamp": SECOND * 1000}
        return [json.dumps({"user_id": f"A{n}", **review}) for n in range(count)]
    if format == "movielens-csv":
        return ["userId,movieId,rating,timestamp", *(f"{n},1,4.0,{SECOND}" for n in range(1, count))]
    return [f"{n}\t1\t4\t{SECOND}" for n in range(count)]


J18, ML, CSV = "amazon-2018-json", "ml-100k", "movielens-csv"


def test_too_many_bad_lines_stop_with_counts_and_examples(tmp_path):
    lines = [*good_lines(ML, 97), "1\t2\tx\t3", "1\t2", "1\t3"]
    path = written(tmp_path, "\n".join(lines) + "\n", "u.data")
    assert len(read(path, max_rejected_share=0.03)[0]) == 97
    with pytest.raises(InputError) as error:
        read(path, max_rejected_share=0.029)
    said = str(error.value)
    assert "3 of 100 lines rejected, allowed is a share of 0.029" in said
    assert "2 number of fields, 1 rating not a number" in said
    assert "u.data, line 98: rating is 'x', expected a number" in said


def test_a_gzip_file_that_is_cut_or_damaged_is_refused(tmp_path, monkeypatch):
    for format in (J18, ML, CSV):
        whole = gzip.compress(("\n".join(good_lines(format, 300)) + "\n").encode())
        for share in (0.1, 0.5, 0.9, 1.0):
            end = min(int(len(whole) * share), len(whole) - 1)
            path = written(tmp_path, whole[:end], "cut.gz")
            with pytest.raises(InputError, match=r"cut.gz is (cut short|damaged)"):
                read(path, format)
        assert len(read(written(tmp_path, whole), format)[0]) >= 299
    damaged = bytearray(gzip.compress(("\n".join(good_lines(ML, 300)) + "\n").encode()))
    damaged[-6] ^= 1  # in the checksum
    lines = [line + "\n" for line in good_lines(ML, 30)]
    members = [gzip.compress("".join(part).encode()) for part in (lines[:10], lines[10:])]
    small_blocks(monkeypatch)
    for unzipper in (formats._unzipper, zlib.decompressobj):  # isal's, where it is installed
        monkeypatch.setattr(formats, "_unzipper", unzipper)
        with pytest.raises(InputError, match="is damaged near byte"):
            read(written(tmp_path, bytes(damaged)), ML)
        path = written(tmp_path, b"".join([members[0], b"\0" * 40, members[1], b"\0" * 512]))
        assert [row[1] for row in read(path, ML)[0]] == [str(n) for n in range(30)]


def test_files_that_hold_nothing_or_are_cut(tmp_path):
    for content in (b"", b"\n \n", gzip.compress(b"")):
        path = written(tmp_path, content, "none.txt")
        for format in ("auto", ML, J18, "user-per-line"):
            with pytest.raises(InputError, match=r"none.txt is empty"):
                read(path, format)
    path = written(tmp_path, "userId,movieId,rating,timestamp\n", "ratings.csv")
    with pytest.raises(InputError, match=r"ratings.csv has a header and nothing below it"):
        read(path)

    path = written(tmp_path, "1\t2\t3\t881250949\n1\t2\t3\t8812509", "u.data")
    with pytest.raises(InputError, match=r"u\.data, line 2: the file stops without a line end"):
        read(path)
    columns = {"user": "1", "item": "2", "time": "3"}
    path = written(tmp_path, f"a,b,{SECOND}\na,c,{SECOND}")  # made by hand
    assert [row[2] for row in read(path, columns=columns, strict=True)[0]] == ["b", "c"]


def test_columns_of_an_own_table_are_asked_for(tmp_path):
    for text, columns, said in (
        ("who,what,when\nme,it,1\n", None, r"no column is clearly the .*columns found: who, what, when"),
        ("user,item,asin,time\nme,it,it,1\n", None, "item may be item or asin; give columns"),
        (UIT, {"item": "thing"}, "no column 'thing' for item; columns found: user, item, time"),
        (UIT, {"price": "time"}, "'columns' has price, expected user, item, time, rating"),
        ("user\n", {"user": "user"}, "no comma, TAB, semicolon or bar"),
    ):
        with pytest.raises(InputError, match=said):
            read(written(tmp_path, text, "mine.csv"), "table", columns)


def test_long_fields_and_lines_inside_quotes(tmp_path, monkeypatch):
    text = f'user,item,time,review\na,b,{SECOND},"{"x" * 3_000_000}"\n'
    assert read(written(tmp_path, text), strict=True)[0] == [(0, "a", "b", None, SECOND)]
    text = "\ufeff" + CONTENTS["amazon-2023-json"]
    assert read(written(tmp_path, text), strict=True)[0] == EXPECTED["amazon-2023-json"]

    small_blocks(monkeypatch, 40)
    text = "user,item,time,note\n" + f'me,a,{SECOND},"one\ntwo"\n' * 3 + f"me,,{SECOND},x\n"
    with pytest.raises(InputError, match="line 8: item is ''"):
        read(written(tmp_path, text), strict=True)


def test_odd_parts_of_published_formats(tmp_path):
    path = written(tmp_path, "1\t2\t3\t4\n", "x.inter")
    with pytest.raises(
        InputError, match=r"x.inter, line 1: header is '1\\t2\\t3\\t4', expected TAB-separated"
    ):
        read(path)
    text = f"timestamp:float\titem_id:token\tx:float\tuser_id:token\n{SECOND}.5\ti0\t0.5\tme\n"
    assert read(written(tmp_path, text, "y.inter"), strict=True)[0] == [
        (0, "me", "i0", None, SECOND * 1000 + 500)
    ]

    path = written(tmp_path, f"Zo\xeb::1::5::{SECOND}\n".encode("latin-1"), "ratings.dat")
    assert read(path, strict=True)[0] == [(0, "Zoë", "1", 5.0, SECOND)]

    path = written(tmp_path, "1 5 6\n1 7 8\n")
    with pytest.raises(InputError, match=r"line 2: user '1' has a second line.*is it format pair-per-line"):
        read(path, "user-per-line", strict=True)
    with pytest.raises(InputError, match=r"line 1: the line is '1', expected a user and their items"):
        read(written(tmp_path, "1\n"), "user-per-line", strict=True)


TIMES = f"1 {SECOND} {SECOND + 5}\n2 {SECOND}\n"


def test_the_twin_file_of_times(tmp_path):
    path = written(tmp_path, "1 a b\n2 c\n", "X_item_org_rank.txt")
    for times, said in (
        (TIMES, None),
        (f"1 {SECOND} {SECOND + 5}\n3 {SECOND}\n", "line 2: user '3' with 1 times, expected user '2' with 1"),
        (f"1 {SECOND}\n2 {SECOND}\n", "line 1: user '1' with 1 times, expected user '1' with 2"),
        (f"1 {SECOND} {SECOND + 5}\n", "ends before line 2"),
        (TIMES + f"3 {SECOND}\n", "has more lines than X_item_org_rank.txt"),
    ):
        written(tmp_path, gzip.compress(times.encode()), "X_time_org_rank.txt.gz")
        with pytest.raises(InputError, match=said) if said else contextlib.nullcontext():
            rows, got = read(path)
            assert [row[1:] for row in rows] == [
                ("1", "a", None, SECOND),
                ("1", "b", None, SECOND + 5),
                ("2", "c", None, SECOND),
            ]
            assert got.time_unit == "s"
            assert got.provenance["time_file"] == "X_time_org_rank.txt.gz"


def test_progress_ends_at_the_whole_file(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    path = written(tmp_path, "\n".join(good_lines(ML, 40)) + "\n")
    told = []
    read(path, ML, progress=lambda done, size: told.append((done, size)))
    assert told[-1] == (path.stat().st_size, path.stat().st_size)
    assert told == sorted(told)
    assert len(told) > 5


def test_a_source_is_known_by_its_content_and_by_how_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "data"))
    path = written(tmp_path, CONTENTS["pair-per-line"])
    config = DataConfig(dataset=str(path))
    first = source(config)
    assert first.name == "own"
    assert source(DataConfig(dataset=str(path), strict=True)).identity == first.identity
    assert source(DataConfig(dataset=str(path), format="user-per-line")).identity != first.identity
    written(tmp_path, CONTENTS["pair-per-line"] + "2 9\n")
    assert source(config).identity != first.identity
    with pytest.raises(InputError, match="changed while it was read"):
        first.fill(duckdb.connect(), None)


def test_the_hash_of_a_large_file_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(prepare_module, "HASH_KEPT_BYTES", 10)
    path = written(tmp_path, CONTENTS[ML], "u.data")
    identity = source(DataConfig(dataset=str(path))).identity
    (kept,) = (tmp_path / "data" / "hashes").iterdir()
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert source(DataConfig(dataset=str(path))).identity == identity
    assert kept.read_text() in identity


def test_a_folder_is_a_dataset_only_with_a_manifest(tmp_path):
    config = DataConfig(dataset=str(tmp_path))
    assert prepared_folder(config) is None
    with pytest.raises(InputError, match=r"is a folder without manifest.json"):
        source(config)
    written(tmp_path, "{}", "manifest.json")
    assert prepared_folder(config) == tmp_path


def test_synthetic_and_ml_100k_fill_the_table(tmp_path):
    con = duckdb.connect()
    got = source(DataConfig(dataset="synthetic")).fill(con, None)
    assert con.execute(COUNTS).fetchone()[:2] == (got.lines_read, 300)
    assert con.execute("SELECT bool_and(time % 60 = 0), min(time) FROM raw").fetchone() == (True, 0)
