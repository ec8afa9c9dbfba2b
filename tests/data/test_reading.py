"""Files of all kinds: their formats, what is kept, in which order, what is rejected and counted; titles."""

import csv
import functools
import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from conftest import refused, sample
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from reclib import system
from reclib.config import DataConfig, InputError
from reclib.data import formats
from reclib.data import prepare as prepare_module
from reclib.data import read as reclib_read
from reclib.data.prepare import _sha256, data_main, hashlib, prepare, source

T = 1577836800  # 2020-01-01; @3 in a content is T + 3
SECOND = 964_982_703  # in the year 2000
ML = "ml-100k"
ONE = ("--min-user", "1", "--min-item", "1")  # a core that leaves out nothing


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "data"))


def read(path: Path, format: str = "auto", columns=None, progress=None, **options):
    """Return the rows of `raw` in their order, and what `ingest` says."""
    con = duckdb.connect()
    config = DataConfig(format=format, columns=columns, **options)
    got = reclib_read.ingest(con, path, config=config, progress=progress)
    return con.execute("SELECT * FROM raw ORDER BY row").fetchall(), got


def histories_in(path: Path, columns=None, **options) -> tuple[str, str]:
    """Return each user's items in order, and what was rejected, as `FAULTS` has them."""
    rows, got = read(path, columns=columns, **{"max_rejected_share": 0.9, **options})
    histories: dict[str, list[str]] = {}
    for _, user, item, *_ in sorted(rows, key=lambda row: (row[3], row[0])):
        histories.setdefault(user, []).append(item)
    users = sorted(f"{user}: {' '.join(items)}" for user, items in histories.items())
    return "; ".join(users), ", ".join(f"{count} {reason}" for reason, count in got.rejected.items())


def written(folder: Path, content: str | bytes, name: str = "own.csv") -> Path:
    path = folder / name
    if isinstance(content, str):
        content = re.sub(r"@(\d?)", lambda match: str(T + int(match[1] or 0)), content)
    path.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
    return path


def columns_of(text: str | None) -> dict[str, str] | None:
    return dict(pair.split("=") for pair in text.split(",")) if text else None


UIT = "user,item,time\n"
UITX = "user,item,time,text\n"
GREAT = 'u,a,@,"Great\nu,b,@1,x\nu,c,@2,5"\nu,d,@3,y\n'
UNCLOSED, NO_TIME = "quotation mark never closed", "timestamp not a number or date"
POSITIONS = "user=1,item=2,time=3"
DATES = "".join(f"u{n},a,2020-01-01 10:0{n}:00\n" for n in range(5))
# name, content, each user's items in order, what is rejected, columns
FAULTS = [
    # quoting
    ("a mark inside a field", UITX + GREAT.replace(',"', ', "'), "u: a b c d"),
    ("a mark that opens and is closed below", UITX + GREAT, "u: b c d", f"1 {UNCLOSED}"),
    ("a TSV in row order", 'user\titem\nu\t"a\nu\tb\nu\tc"\n', 'u: b c"', f"1 {UNCLOSED}", "time=#row"),
    ("a mark that is never closed", f'{UIT}u,a,@\nu,"b,@\nx\n', "u: a", f"2 {UNCLOSED}"),
    ("quoted fields", f'{UITX}"u","a,""b""",@1,"one\ntwo\n, three"\n"u","c"d,"@",""\n', 'u: cd a,"b"'),
    ("an id over two lines", f'{UIT}u,"a\nb",@\nu,c,@\n', "u: c", "1 item with a line break or TAB"),
    ("extra fields over two lines", f'{UITX}u,a,@,"x\ny",z\nu,b,@,x\n', "u: b", "2 number of fields"),
    ("fields too few and too many", f"{UIT}u,a\nu,b,@\n,,,\n----\n", "u: b", "3 number of fields"),
    ("a carriage return", f"{UIT}u,a,@\nu,b\rc,@\n", "u: a", "1 carriage return"),
    # time
    (
        "offsets",
        f"{UIT}u,b,2020-03-01 04:59:00-01\nu,c,2020-03-01 06:00:00+00\nu,a,2020-03-01 10:00:00+05\n"
        "u,d,2020-03-01T11:30:00+0530\nu,e,2020-03-01T06:00:00.000001Z\nu,f,2020-03-01 06:00:00.000002 UTC\n",
        "u: a b c d e f",
    ),
    ("fractions", f"{UIT}u,b,@.9\nu,a,@.1\nu,c,@.900001\n", "u: a b c"),
    (
        "no dates",
        f"{UIT}u,a,2020-13-01\nu,b,2020-02-30\nu,c,\nu,d,nan\nu,e,5\nu,f,@\nu,g,31/12/2019\n",
        "u: f",
        f"4 {NO_TIME}, 1 timestamp missing, 1 timestamp out of range",
    ),
    ("units", f"{UIT}u,b,{T + 1}000\nu,c,@2\nu,a,{T}000000\nu,d,{T + 3}000000000\n", "u: a b c d"),
    (
        "JSON",
        '{"user": "u", "item": "c", "time": @.9}\n\n{"user": "u", "item": null, "time": @}\n'
        '{"user": "u", "item": 5, "time": "2020-01-01T01:00:00+01"}\n{"user": "u", "item": [1], "time": @}\n'
        '{"user": "u", "item": "b", "time": "@.1"}\n{"user": "u", "time": @}\n{"user": "u"\n',
        "u: 5 b c",
        "2 field of another type, 1 field missing, 1 not JSON",
    ),
    (
        "JSON objects beside each other and over two lines",
        '{"user": "u", "item": "a", "time": @}{"user": "u", "item": "b", "time": @}\n'
        '{"user": "u", "item": "c",\n"time": @}\n{"user": "u", "item": "d", "time": @}\n',
        "u: d",
        "2 not JSON, 1 field of another type",
    ),
    # columns
    ("positions below a header", f"{UIT}u,a,@\n", "u: a", "", POSITIONS),
    ("a headerless TSV", "7\t12\t5\t@\n7\t13\t5\t@\n", "! does not show which column is the user's"),
    ("a comment above dates", "# by hand\n" + DATES, "! separated by ',': remove lines above the table"),
    ("dates between spaces", DATES.replace(",", " "), "! most lines are of one length and end as times do"),
    ("histories of one length", "1 7 5\n2 8 4\n", "1: 7 5; 2: 8 4"),
    ("columns alike but for case", "user,User,item,time\nu,v,a,@\n", "! user may be user or User"),
    ("no such position", "u,a,@\n", "! no column '7' for time", "", "user=1,item=2,time=7"),
    (
        "an unknown column",
        f"{UIT}u,a,@\n",
        "! 'columns' has price, expected user, item, time",
        "",
        "price=time",
    ),
    ("a header in Latin-1", f"{UIT[:-1]},pr\udce9nom\nu,a,@,x\nu,b,@1,y\n", "u: a b"),
    ("a header line again", f"{UIT}u,a,@\n{UIT}", "u: a", "1 header line again"),
    # ids
    ("missing ids", f"{UIT},a,@\nu,,@\nu,b,@\n", "u: b", "1 user empty, 1 item empty"),
    ("a NUL in an id", f"{UIT}u,a\0,@\nu,b,@\n", "u: b", "1 item with a line break or TAB"),
    ("blank lines", f"{UIT}\nu,a,@\n\r\nu,b,@\n\n", "u: a b"),
    ("bytes that are not UTF-8", f"{UIT}u,\udcff,@\nu,b,@\n", "u: b", "1 not UTF-8"),
    # what is not clear
    ("an Amazon CSV", "1384719342,B00005N7P0,5,1365811200\n", "! amazon-2014-csv .*, amazon-2018-csv"),
    ("two fields a line", "1 5\n2 6\n3 5\n", "! two fields and no user has two lines.*give format"),
    ("histories of one user", "1 5 6\n1 7 8\n", "! format was not recognised .line 1: '1 5 6'"),
    ("Python dictionaries", "{'asin': '1'}\n", "! line 1: .*a Python dictionary is none"),
    ("no header above a time", "1\t2\t1400457600\n", f"! column is the user's.*{POSITIONS}"),
    # what cannot be read
    ("a JSON array", '[{"user": "u", "item": "a"}]\n', "! a JSON array, expected one JSON object a line"),
    ("JSON over lines", '{\n "user": "u"\n}\n', "! expected one whole JSON object a line"),
    ("UTF-16 without a mark", f"{UIT}a,b,1\n".encode("utf-16-le"), "! UTF-16 text, expected UTF-8"),
    ("bytes of a program", b"SQLite format 3\0" + b"\0" * 99, "! is no text .it has NUL bytes"),
    ("xz", b"\xfd7zXZ\0" + b"x" * 40, "! an xz file: unpack it"),
    ("Parquet inside gzip", gzip.compress(b"PAR1" + b"x" * 40), "! holds a Parquet file: unpack it"),
    ("lines that end with CR", f"{UIT}a,b,@\n".replace("\n", "\r"), "! lines end with CR alone"),
    ("a header alone", UIT, "! has a header and nothing below it"),
]


def test_the_longest_line_is_a_parameter_and_named_where_it_is_longer(tmp_path, capsys):
    for content, line in (
        (UIT.encode() + b"x" * (3 << 20), "line 2: longer than 2 MB"),
        (f'{UIT}u,a,"'.encode() + b"123456789\n" * 300_000, "line 2: a quotation mark .* within 2 MB"),
    ):
        for path in (written(tmp_path, content), written(tmp_path, gzip.compress(content, 1), "own.csv.gz")):
            refused(rf"{path.name}, {line} \(max_line_mb\)", histories_in, path, max_line_mb=2)
    wide = written(tmp_path, f"{UITX}u,a,@,{'x' * (3 << 20)}\nu,b,@1,\n")
    command = ["prepare", str(wide), *ONE, "--max-line-mb"]
    assert [data_main([*command, size]) for size in ("2", "4", "2", "0")] == [2, 0, 2, 2]
    assert "own.csv, line 2: longer than 2 MB" in capsys.readouterr().err


def parquet(path: Path, select: str) -> Path:
    duckdb.connect().execute(f"COPY ({select}) TO '{path}' (FORMAT parquet)")
    return path


U, UA = "SELECT 'u' AS user, i AS item", "SELECT 1 AS user, 'a' AS item"
PARQUET = [
    (
        "ids that are missing or NaN",
        f"SELECT 'u' AS user, i::DOUBLE AS item, {T} + i AS time "
        "FROM (VALUES (1), ('nan'::DOUBLE), (NULL), (2)) t(i)",
        "u: 1.0 2.0",
        "2 item empty",
    ),
    ("a column file_row_number", f"{UA}, {T} AS time, 7 AS file_row_number, 'x' AS filename", "1: a"),
    (
        "text with offsets",
        f"{U}, t AS time FROM (VALUES ('b', '2020-03-01T04:59:00-01:00'), "
        "('c', '2020-03-01T06:00:00.5+00:00'), ('a', '2020-03-01T10:00:00+05:00'), ('x', '')) t(i, t)",
        "u: a b c",
        "1 timestamp missing",
    ),
    (
        "timestamps",
        f"{U}, t::TIMESTAMP AS time FROM (VALUES ('b', '2020-01-01 00:00:00.9'), "
        "('a', '2020-01-01 00:00:00.1'), ('c', NULL), ('d', '1900-01-01')) t(i, t)",
        "u: a b",
        "1 timestamp missing, 1 timestamp out of range",
    ),
    ("bytes as ids", f"SELECT 'a'::BLOB AS user, 1 AS item, {T} AS time", "! column 'user' .* of type BLOB"),
    ("a column in a column", "SELECT 1 AS who, {'user': 1} AS s, 1 AS time", "! user; .*found: who, s, time"),
]


@pytest.mark.parametrize(
    ("content", "expected", "rejected", "columns"),
    [pytest.param(*more, *[""] * (4 - len(more)), id=name) for name, *more in FAULTS + PARQUET],
)
def test_one_reading_in_blocks_of_any_size(tmp_path, monkeypatch, content, expected, rejected, columns):
    is_query = str(content).startswith("SELECT")
    path = parquet(tmp_path / "x.parquet", content) if is_query else written(tmp_path, content)
    for size in (1 << 20, 97, 7):
        monkeypatch.setattr(formats, "PIECE_BYTES", size)
        monkeypatch.setattr(formats, "BLOCK_BYTES", size)
        if expected.startswith("! "):
            refused(expected[2:], histories_in, path, columns_of(columns))
        else:
            assert histories_in(path, columns_of(columns)) == (expected, rejected)


def test_files_that_are_refused(tmp_path):
    whole = parquet(tmp_path / "whole.parquet", f"{UA}, {T} AS time").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    for name, content, format, problem in (
        ("cut.parquet", whole[:-9], "auto", r"cut\.parquet is not a whole Parquet file"),
        ("x.parquet", whole, ML, "is a Parquet file, expected format='table', not 'ml-100k'"),
        ("a.zip", b"PK\3\4" + b"x" * 40, "auto", r"a\.zip is a zip archive: unpack it"),
        ("a.tar.gz", gzip.compress(bytes(257) + b"ustar"), "auto", r"a\.tar\.gz holds a tar archive: unpack"),
        ("pipe", None, "auto", "pipe is a pipe, expected a file"),
        (".", None, "auto", "is a folder"),
        ("/dev/null", None, "auto", "is a device or socket"),
        ("none.txt", b"", "auto", "none.txt is empty"),
        ("none.txt", b"\n \n", ML, "none.txt is empty"),
        ("none.txt", gzip.compress(b""), "user-per-line", "none.txt is empty"),
        ("u.data", f"1\t2\t3\t{SECOND}\n1\t2\t3\t8812509", "auto", r"u\.data, line 2: the file stops"),
        ("both", "".join(CONTENTS[f"amazon-{year}-csv"] for year in (2014, 2018)), "auto", "is the user's"),
        ("X_time_org_rank.txt", "1 13188\n", "auto", "holds the times of X_item_org_rank.txt"),
        ("file", "1 5\n2 6\n", "ml-10m", "'ml-10m', expected auto or one of ml-100k, ml-1m"),
        ("x.inter", "1\t2\t3\t4\n", "auto", r"x.inter, line 1: header is '1\\t2\\t3\\t4', expected TAB-sep"),
        ("users", "1 5 6\n1 7 8\n", "user-per-line", r"line 2: user '1' has a second line.*pair-per-line"),
    ):
        path = tmp_path / name if content is None else written(tmp_path, content, name)
        refused(problem, read, path, format, strict=True)
    refused("'columns' is for format='table', and format is 'inter'", read, path, "inter", {"user": "1"})


def test_names_and_folders_of_any_characters(tmp_path):
    for name in ("user=me/x", "data1", "data[1]", "*", "q?", "{a,b}.csv", os.fsdecode(b"caf\xe9")):
        path = parquet(tmp_path / "plain.parquet", f"SELECT 'u' AS user, 'a' AS item, {T} AS time")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        assert histories_in(path.rename(tmp_path / f"{name}.parquet")) == ("u: a", "")
    home = tmp_path / "a?[b]=c"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECLIB_DATA", str(home / "data"))
        path = written(home, f"{UIT}u,a,@\n", os.fsdecode(b"caf\xe9?.csv"))
        assert data_main(["prepare", str(path), *ONE]) == 0


def test_an_interrupted_preparation_leaves_one_line_and_nothing_else(tmp_path):
    rows = (f"u{n % 5000},i{n % 700},{T + n}\n" for n in range(500_000))
    path = written(tmp_path, UIT + "".join(rows))
    command = [sys.executable, "-m", "reclib", "data", "prepare", str(path)]
    home = tmp_path / "data"
    for number in (signal.SIGINT, signal.SIGTERM):
        options = {"stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        # A shell's background job ignores SIGINT, and so would its children.
        default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        process = subprocess.Popen(command, preexec_fn=default, **options)
        while not list(home.glob("scratch.*.partial/rows.duckdb")):  # it is at work
            assert process.poll() is None
        process.send_signal(number)
        assert (process.communicate()[1], process.returncode) == ("interrupted\n", 130)
        assert not list(home.rglob("*.partial"))


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    path = written(tmp_path, f"{UIT}u,a,{T}\n")
    home = tmp_path / "data"
    code = f"import os, pathlib, reclib.system as s\nwith s.scratch(pathlib.Path({str(home)!r})): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    (left,) = home.iterdir()
    with system.scratch(home) as used:
        prepare(DataConfig(dataset=str(path), min_user=1, min_item=1))
        assert used.exists()
    assert not left.exists()


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


def moment(us: int, hours: float = 0) -> datetime:
    return datetime.fromtimestamp(T, timezone(timedelta(hours=hours))) + timedelta(microseconds=us)


TIMES = [  # microseconds after T -> a time as it may be written
    lambda us: f"{T + us // 10**6}.{us % 10**6:06}",
    lambda us: f"{T * 1000 + us // 1000}.{us % 1000:03}",
    lambda us: f"{moment(us):%Y-%m-%dT%H:%M:%S.%fZ}",
    lambda us: f"{moment(us):%Y-%m-%d %I:%M:%S.%f %p}",
    lambda us: moment(us, 5.5).isoformat(),
    lambda us: moment(us, -3).isoformat(" ").removesuffix(":00"),
]
ROW = st.tuples(IDS, IDS, NOTES, st.integers(0, 10**11), st.sampled_from(TIMES))
BAD = [b"one field", b"{", b"u,\xff,1,2020-01-01", b"1\t2\t3\t4\t5\t6\t7", b",,,,,,,", b'[1, "u"]', b"7"]
PLACE = st.integers(0, 24)
TABLES = {
    "rows": st.lists(ROW, min_size=1, max_size=25),
    "kind": st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
    "piece": st.sampled_from([5, 50, 5000]),
    "missing": st.dictionaries(PLACE, st.sampled_from(["user", "item", "time"]), max_size=4),
    "bad": st.dictionaries(PLACE, st.sampled_from(BAD)),
    "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    "end": st.sampled_from([b"\n", b"\r\n"]),
    "packed": st.sampled_from(["", "gzip", "gzip in two members"]),
}
COLUMNS = {name: name for name in ("user", "item", "time")}


def text_of(table: pd.DataFrame, kind: str, bad, quoting, end: bytes) -> bytes:
    """Return the table as text, with bad lines below the rows of these numbers."""
    separator = "\t" if kind == "tsv" else ","
    lines = [separator.join(table).encode()] if kind != "jsonl" else []
    for n, row in enumerate(table.to_dict("records")):
        held = io.StringIO()
        if kind == "jsonl":
            row |= {"time": float(row["time"])} if row["time"].isdecimal() else {}
            json.dump({name: None if row[name] == "" else row[name] for name in row}, held)
        else:
            csv.writer(held, delimiter=separator, quoting=quoting, lineterminator="\n").writerow(row.values())
        lines += [held.getvalue().removesuffix("\n").encode(), *([bad[n]] if n in bad else [])]
    return end.join([*lines, b""])


def by_pandas(table: pd.DataFrame) -> pd.DataFrame:
    """Return the valid rows in the order of time, and the time in microseconds."""
    text = table["time"].replace("", None)
    dated = text.str.contains("-", na=False)
    dates = pd.to_datetime(text.where(dated), format="mixed", utc=True).astype("datetime64[us, UTC]")
    numbers = pd.to_numeric(text.where(~dated))
    table["us"] = (numbers * 10**6).where(numbers < 10**11, numbers * 1000).round().astype("Int64")
    table.loc[dated, "us"] = dates[dated].astype("int64").astype("Int64")
    return table[(table[["user", "item", "time"]] != "").all(axis=1)].sort_values("us", kind="stable")


# What fails is shown as it is: making it smaller takes minutes.
QUICK = {"phases": [Phase.reuse, Phase.generate], "suppress_health_check": list(HealthCheck)}


@settings(max_examples=40, deadline=None, **QUICK)
@given(**TABLES)
def test_random_tables_give_what_pandas_reads(tmp_path_factory, rows, kind, piece, missing, packed, **text):
    table = pd.DataFrame([row[:3] for row in rows], columns=["user", "item", "note"], dtype=str)
    table["time"] = [style(us) for *_, us, style in rows]
    for n, name in missing.items():
        table.loc[table.index == n, name] = ""
    table["note"] = table["note"].str.replace("\t", " ")
    text["bad"] = {n: line for n, line in text["bad"].items() if n < len(rows) and kind != "parquet"}
    path = tmp_path_factory.mktemp("rows") / f"own.{kind}"
    if kind == "parquet":
        con = duckdb.connect()
        con.register("made", {name: table[name].replace("", None).to_numpy(object) for name in table})
        fields = ", ".join(f'CAST("{name}" AS VARCHAR) AS "{name}"' for name in table)
        con.execute(f"COPY (SELECT {fields} FROM made) TO '{path}' (FORMAT parquet)")
    else:
        data = text_of(table, kind, **text)
        half = len(data) // 2 if "two" in packed else 0
        data = gzip.compress(data[:half]) + gzip.compress(data[half:]) if packed else data
        path.write_bytes(data)
    expected = by_pandas(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "PIECE_BYTES", piece)
        patch.setattr(formats, "BLOCK_BYTES", 1)
        if expected.empty:
            refused("lines rejected", read, path, columns=COLUMNS, max_rejected_share=1.0)
            return
        records, got = read(path, columns=COLUMNS, max_rejected_share=1.0)
    size = {"s": 10**6, "ms": 1000, "us": 1}[got.time_unit]
    in_time = sorted(records, key=lambda row: (row[3], row[0]))
    assert [(user, item, time * size) for _, user, item, time in in_time] == [
        (row.user, row.item, row.us) for row in expected.itertuples()
    ]
    assert sum(got.rejected.values()) == len(rows) - len(expected) + len(text["bad"]), got.rejected
    assert got.lines_read == len(rows) + len(text["bad"])


@pytest.mark.slow
def test_damaged_files_give_an_error_of_ours_or_counted_lines(tmp_path):
    generator = random.Random(0)
    rows = pd.DataFrame([(f"u{n % 7}", f"i{n % 5}", 'a "b", c', T + n) for n in range(60)])
    rows.columns = ["user", "item", "note", "time"]
    table = rows.to_csv(index=False).encode()
    whole = {
        "own.csv": table,
        "own.jsonl": rows.to_json(orient="records", lines=True).encode(),
        "own.csv.gz": gzip.compress(table),
        "own.parquet": parquet(tmp_path / "p", f"{UA}, {T} + i AS time FROM range(60) t(i)").read_bytes(),
        "u.data": table.split(b"\n", 1)[1].replace(b'"a ""b"", c"', b"3").replace(b",", b"\t"),
    }
    outcomes = {"read": 0, "refused": 0}
    for _ in range(200):
        name = generator.choice(list(whole))
        content = bytearray(whole[name])
        for _ in range(generator.randint(1, 6)):
            place = generator.randrange(len(content))
            end = place + generator.choice([0, 1, 30])  # nothing, a byte or some are replaced
            content[place:end] = bytes(generator.choices(b'",\n\r\t\0 \xff{}019', k=generator.randint(0, 4)))
        path = written(tmp_path, bytes(content), name)
        try:
            rows, got = read(path, max_rejected_share=1.0)
            outcomes["read"] += 1
            assert got.lines_read == len(rows) + sum(got.rejected.values())
        except InputError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


# ---- each format, and real files ------------------------------------------------------------------------


# The same interaction in the files of most formats.
ROW = ("196", "242", 881250949)
REVIEW = '{"reviewerID": "196", "asin": "242", "overall": 3.0, "unixReviewTime": 881250949'
REVIEW_2023 = '{"user_id": "196", "parent_asin": "242", "asin": "B1", "rating": 3, "timestamp": 881250949123}'
PAIRS = [("A2IBPI20UZIR0U", "1384719342"), ("AKM1MP6P0OYPR", "B00005N7P0"), ("A14VAT5EAX3D9S", "013279304X")]
CONTENTS = {
    "ml-100k": "196\t242\t3\t881250949\n",
    "ml-1m": "196::242::3::881250949\n",
    "movielens-csv": "userId,movieId,rating,timestamp\r\n196,242,3.0,881250949\r\n",
    "amazon-2014-json": REVIEW + ', "helpful": [0, 0]}\n',
    "amazon-2018-json": REVIEW + ', "verified": true}\n',
    "amazon-2023-json": REVIEW_2023 + "\n",
    "amazon-2014-csv": "".join(f"{user},{item},3.0,881250949\n" for user, item in PAIRS),
    "amazon-2018-csv": "".join(f"{item},{user},3.0,881250949\n" for user, item in PAIRS),
    "amazon-2023-csv": "user_id,parent_asin,rating,timestamp\n196,242,3.0,881250949123\n",
    "inter": "user_id:token\titem_id:token\ttimestamp:float\n196\t242\t881250949\n",
    "user-per-line": "1 5 6\n2 5\n",
    "pair-per-line": "1 5\n1 6\n2 5\n",
    "table": "customer;product;when\n196;242;881250949\n",
}
ORDERED = (("1", "5", 0), ("1", "6", 1), ("2", "5", 0))
EXPECTED = dict.fromkeys(CONTENTS, (ROW,))
EXPECTED |= dict.fromkeys(("amazon-2014-csv", "amazon-2018-csv"), tuple((*pair, ROW[2]) for pair in PAIRS))
EXPECTED |= dict.fromkeys(("amazon-2023-json", "amazon-2023-csv"), ((*ROW[:2], 881250949123),))
EXPECTED |= dict.fromkeys(("user-per-line", "pair-per-line"), ORDERED)
UNITS = dict.fromkeys(("amazon-2023-json", "amazon-2023-csv"), "ms")
UNITS |= dict.fromkeys(("user-per-line", "pair-per-line"), "order")
HEADERS = ("movielens-csv", "amazon-2023-csv", "inter", "table")


def test_each_format_is_read(tmp_path):
    assert set(CONTENTS) == set(formats.FORMATS)
    for name, content in CONTENTS.items():
        columns = {"user": "customer", "item": "product", "time": "when"} if name == "table" else None
        for data in (content.encode(), gzip.compress(content.encode())):
            path = written(tmp_path, data, "u.data" if name == "ml-100k" else "file")
            rows, got = read(path, columns=columns, strict=True)
            assert rows == [(number, *row) for number, row in enumerate(EXPECTED[name])], name
            assert got.time_unit == UNITS.get(name, "s"), name
            assert got.lines_read == len(content.splitlines()) - (name in HEADERS), name
            about = {"format": name, "bytes": path.stat().st_size, "sha256": _sha256(path)}
            assert about.items() <= got.provenance.items()
            assert (got.rejected, got.rejected_examples) == ({}, [])


# rows, users and items as published, and the unit of time
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


COUNTS = """SELECT count(*), count(DISTINCT "user"), count(DISTINCT item), min(row), max(row),
count(DISTINCT row) FROM raw"""


def test_counts_of_real_files_are_the_published_ones():
    for name, (rows, users, items, unit) in REAL.items():
        with duckdb.connect() as con:
            got = reclib_read.ingest(con, sample(name), config=DataConfig(strict=True))
            assert con.execute(COUNTS).fetchone() == (rows, users, items, 0, rows - 1, rows), name
            assert got.time_unit == unit, name


def good_lines(count: int) -> str:
    return "".join(f"{n}\t1\t4\t{SECOND}\n" for n in range(count))


def test_too_many_bad_lines_stop_with_counts_and_examples(tmp_path):
    bad = "1\t2\t3\tx\n1\t2\n1\t3\n"
    path = written(tmp_path, good_lines(97) + bad, "u.data")
    assert len(read(path, max_rejected_share=0.03)[0]) == 97
    counts = (
        "3 of 100 lines rejected, allowed is a share of 0.029.*2 number of fields, 1 timestamp not a number"
    )
    example = "u.data, line 98: timestamp is 'x', expected a number or a date"
    refused(f"{counts}.*{example}", read, path, max_rejected_share=0.029)


def test_a_gzip_file_that_is_cut_or_damaged_is_refused(tmp_path, monkeypatch):
    damaged = bytearray(gzip.compress(good_lines(300).encode()))
    for end in (len(damaged) // 2, len(damaged) - 1):
        refused(r"cut.gz is (cut short|damaged)", read, written(tmp_path, bytes(damaged[:end]), "cut.gz"), ML)
    damaged[-6] ^= 1  # in the checksum
    members = [gzip.compress(part.encode()) for part in good_lines(30).partition("10\t")]
    monkeypatch.setattr(formats, "BLOCK_BYTES", 64)
    monkeypatch.setattr(formats, "PIECE_BYTES", 16)
    refused("is damaged near byte", read, written(tmp_path, bytes(damaged)), ML)
    path = written(tmp_path, members[0] + bytes(40) + members[1] + members[2] + bytes(512))
    assert [row[1] for row in read(path, ML)[0]] == [str(n) for n in range(30)]


def test_odd_parts_of_published_formats(tmp_path):
    inter = f"timestamp:float\titem_id:token\tx:float\tuser_id:token\n{SECOND}.5\ti0\t0.5\tme\n"
    for name, content, row in (
        ("y.inter", inter, ("me", "i0", SECOND * 1000 + 500)),
        ("ratings.dat", f"Zo\xeb::1::5::{SECOND}\n".encode("latin-1"), ("Zoë", "1", SECOND)),
        ("own.csv", f"\ufeff{UIT}a,b,{SECOND}", ("a", "b", SECOND)),  # by hand: no line end
    ):
        assert read(written(tmp_path, content, name), strict=True)[0] == [(0, *row)]
    path = written(tmp_path, f'{UITX}me,a,{SECOND},"one\ntwo"\nme,,{SECOND},x\n')
    refused("line 4: item is ''", read, path, strict=True)


def test_the_twin_file_of_times(tmp_path):
    path = written(tmp_path, "1 a b\n2 c\n", "X_item_org_rank.txt")
    times = f"1 {SECOND} {SECOND + 5}\n2 {SECOND}\n"

    def with_times(content: str):
        written(tmp_path, gzip.compress(content.encode()), "X_time_org_rank.txt.gz")
        return read(path)

    shorter = times.replace(f" {SECOND + 5}", "")
    refused("line 1: user '1' with 1 times, expected user '1' with 2", with_times, shorter)
    refused("ends before line 2", with_times, times.split("\n")[0] + "\n")
    refused("has more lines than X_item_org_rank.txt", with_times, times + f"3 {SECOND}\n")
    rows, got = with_times(times)
    assert [row[3] for row in rows] == [SECOND, SECOND + 5, SECOND]
    assert (got.time_unit, got.provenance["time_file"]) == ("s", "X_time_org_rank.txt.gz")


def test_a_source_is_known_by_its_content_and_by_how_it_is_read(tmp_path, monkeypatch):
    path = written(tmp_path, CONTENTS["pair-per-line"])
    config = DataConfig(dataset=str(path))
    first = source(config)
    assert first.name == "own"
    assert source(DataConfig(dataset=str(path), strict=True)).identity == first.identity
    assert source(DataConfig(dataset=str(path), format="user-per-line")).identity != first.identity
    written(tmp_path, CONTENTS["pair-per-line"] + "2 9\n")
    assert source(config).identity != first.identity
    refused("changed while it was read", first.fill, duckdb.connect(), None)
    monkeypatch.setattr(prepare_module, "HASH_CACHED_BYTES", 10)  # the hash of a large file is kept
    identity = source(config).identity
    (kept,) = (tmp_path / "data" / "hashes").iterdir()
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert source(config).identity == identity
    assert kept.read_text() in identity


# ---- titles -------------------------------------------------------------------------------------------


def test_where_titles_lie(tmp_path):
    for data, side in (
        ("u.data.gz", "u.item.gz"),
        ("ratings.csv.gz", "movies.csv"),
        ("own.inter", "own.item"),
        ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"),
        ("All_Beauty.jsonl.gz", "meta_All_Beauty.jsonl.gz"),
    ):
        folder = tmp_path / side
        folder.mkdir()
        (folder / data).touch()
        (folder / "meta_Other.json").touch()
        assert formats.titles_beside(folder / data) is None
        (folder / side).touch()
        assert formats.titles_beside(folder / data) == folder / side


def test_titles_of_the_wanted_items(tmp_path):
    cafe, films = "Café (1995)", "1::Café (1995)::Drama\n2::Other::x\n"
    csv = 'movieId,title,genres\r\n1,"Café, The (1995)",x\r\n2,O,y\r\n'
    product = json.dumps({"parent_asin": "1", "title": "A\nB", "x": [1]}) + "\nbroken\n"
    for name, data, expected in (
        ("u.item", "1|Café (1995)|x\n2|Other|y\n".encode("latin-1"), cafe),
        ("movies.dat", films.encode("latin-1"), cafe),
        ("movies.dat", films.replace("Other", "Amélie").encode(), cafe),
        ("movies.csv", csv.encode(), "Café, The (1995)"),
        ("x.item", b"item_id:token\ttitle:token_seq\n1\tCaf\n2\tO\n", "Caf"),
        ("meta_X.jsonl", product.encode(), "A B"),
        ("meta_X.json", json.dumps({"asin": "1", "title": "Old"}).encode() + b"\n", "Old"),
        ("meta_X.json", b"{'asin': '1', 'title': \"It's\", 'price': 3.5}\n{'asin': '2'}\n", "It's"),
    ):
        for path, content in ((tmp_path / name, data), (tmp_path / f"{name}.gz", gzip.compress(data))):
            path.write_bytes(content)
            assert formats.read_titles(path, ["1", "9"]) == {"1": expected}
            assert formats.read_titles(path, set()) == {}


def test_odd_lines_of_titles(tmp_path):
    path = tmp_path / "u.item"
    path.write_text("1|Toy Story|x\n2|Golden\n")
    refused(r"u\.item, line 2: expected '\|'-separated item, title", formats.read_titles, path, ["1"])
    path = tmp_path / "ml-100k.item"  # RecBole's spelling of unknown, and the year in a column apart
    path.write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
        "1\tToy Story\t1995\n267\tunkonwn\tunkonwn\n1412\tLand (1995)\tV\n"
    )
    expected = {"1": "Toy Story (1995)", "267": "unknown", "1412": "Land (1995) (V)"}
    assert formats.read_titles(path, set(expected)) == expected
    path.write_text("item_id:token\ttitle:token_seq\n1\n")
    refused(r"ml-100k\.item, line 2: 1 fields, expected 2", formats.read_titles, path, ["1"])


def test_titles_of_variants_share_their_words():
    def same(first, second):
        return formats.product_of(first) == formats.product_of(second) != ()

    assert same("Tiffen 58mm UV Protection Filter", "Tiffen 62mm UV Protection Filter")
    assert same("Foscam Wi-Fi Camera (Black) 1.3 MP", "Foscam Wi-Fi Camera 1.3 MP - Sky Blue")
    assert same("Kingston 4 GB SDHC Card SD4/4GB", "Kingston 32 GB SDHC Card SD4/32GB")
    assert not same("Nikon DK-17M Magnifying Eyepiece", "Nikon DK-21M Magnifying Eyepiece")
    assert not same("Blank DVD-R media, 100 Pack", "Blank DVD+R media, 100 Pack")
    assert formats.product_of("Black Cable 6ft") == ()
