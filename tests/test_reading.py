import contextlib
import gzip
import json
import zlib
from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import CONTENTS, SAMPLES

from reclib import formats as rawfile, reading, sources
from reclib.config import DataConfig, InputError
from reclib.formats import FORMATS, named

SECOND = 964_982_703  # in the year 2000


def read(path: Path, format: str = "auto", columns=None, **options):
    """Return the rows of `raw` in their order, and what `ingest` says."""
    con = duckdb.connect()
    got = reading.ingest(con, path, named(format, path, columns), columns=columns, **options)
    return con.execute("SELECT * FROM raw ORDER BY row").fetchall(), got


def written(folder: Path, text: str | bytes, name: str = "file") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


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


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", CONTENTS)
def test_each_format_is_read(tmp_path, name, packed):
    data = CONTENTS[name].encode()
    path = written(tmp_path, gzip.compress(data) if packed else data)
    columns = {"user": "customer", "item": "product", "time": "when"} if name == "table" else None
    rows, got = read(path, columns=columns, strict=True)
    assert rows == EXPECTED[name]
    assert got.time_unit == UNITS.get(name, "s")
    assert got.lines_read == len(CONTENTS[name].splitlines()) - (name in HEADERS)
    assert got.provenance["format"] == name
    assert got.provenance["bytes"] == path.stat().st_size
    assert got.provenance["sha256"] == sources._sha256(path)
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
    "amazon-sports-2014-5core/Sports_item_org_rank.txt.gz": (296_337, 35_598, 18_357, "s"),
    "amazon-toys-2014-5core/Toys_and_Games_s3rec.txt.gz": (167_597, 19_412, 11_924, "order"),
    "amazon-home-2014-5core/Home_item_org_rank.txt.gz": (551_682, 66_519, 28_237, "order"),
    "amazon-beauty-2014-full-bert4rec/beauty.txt.gz": (353_962, 40_226, 54_542, "order"),
    "amazon-video-games-2014-sasrec/Video.txt.gz": (287_107, 31_013, 23_715, "order"),
    "ml-1m/sequences_lrurec_5core.txt.gz": (999_611, 6040, 3416, "order"),
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


@pytest.mark.parametrize("name", REAL)
def test_counts_of_real_files_are_the_published_ones(name):
    path = sample(name)
    con = duckdb.connect()
    got = reading.ingest(con, path, strict=True)
    assert (*con.execute(COUNTS).fetchone(), got.time_unit) == REAL[name]
    assert con.execute("SELECT min(row), max(row), count(DISTINCT row) FROM raw").fetchone() == (
        0,
        REAL[name][0] - 1,
        REAL[name][0],
    )


def test_ml_1m_without_times_is_read_in_row_order():
    path = sample("ml-1m/pairs_official_order.parquet")
    with pytest.raises(InputError, match=r"no column is clearly the time.*columns found: userID, movieID"):
        read(path)
    con = duckdb.connect()
    got = reading.ingest(con, path, FORMATS["table"], columns={"time": "#row"})
    assert con.execute(COUNTS).fetchone() == (1_000_209, 6040, 3706)
    assert got.time_unit == "order"
    assert con.execute("SELECT bool_and(time >= 0), max(time) FROM raw").fetchone() == (True, 2313)


def test_the_cut_row_of_a_real_parquet_file_is_rejected():
    rows, got = read(sample("ml-latest-2023-subset/ratings.parquet"))
    assert len(rows) == 206_584
    assert got.rejected == {"timestamp out of range or missing": 1}
    assert got.rejected_examples[0]["line"] == 206_585
    assert "1345382" in got.rejected_examples[0]["text"]


def small_blocks(patch: pytest.MonkeyPatch, size: int = 64) -> None:
    patch.setattr(rawfile, "BLOCK_BYTES", size)
    patch.setattr(rawfile, "PIECE_BYTES", 16)


IDS = st.text(
    st.characters(codec="utf-8", exclude_characters="\t\r\n\0", exclude_categories=["Cs"]), min_size=1
)
INTERACTIONS = st.lists(
    st.tuples(IDS, IDS, st.integers(0, 10), st.integers(SECOND, SECOND + 9)), min_size=1, max_size=20
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=INTERACTIONS, whole=st.booleans(), kind=st.sampled_from(["ml-100k", "table", "json"]))
def test_blocks_and_single_lines_give_the_same_rows(tmp_path_factory, rows, whole, kind):
    """Every id survives, in order, whether DuckDB takes the block or the exact reader its lines."""
    folder = tmp_path_factory.mktemp("rows")
    columns = {"user": "u", "item": "i", "rating": "r", "time": "t"} if kind == "table" else None
    if kind == "json":
        names = ("reviewerID", "asin", "overall", "unixReviewTime")
        text = "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)
        format = "amazon-2018-json"
    elif kind == "table":
        double = [(u.replace('"', '""'), i.replace('"', '""'), r, t) for u, i, r, t in rows]
        text = "t,i,note,u,r\n" + "".join(f'{t},"{i}","a\nb","{u}",{r}\n' for u, i, r, t in double)
        format = "auto"
    else:
        text = "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows)
        format = "ml-100k"
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch)
        if not whole:
            pass
        found, got = read(written(folder, text), format, columns, strict=True)
    # a byte-order mark at the start of a file is not part of the first id
    first = rows[0][0].removeprefix("\ufeff") if kind == "ml-100k" else rows[0][0]
    if first:
        expected = [(n, *row) for n, row in enumerate(rows)]
        expected[0] = (0, first, *rows[0][1:])
        assert found == expected
        assert got.lines_read == len(rows)


@pytest.mark.parametrize("whole", [True, False])
def test_a_byte_order_mark_at_the_start_of_a_block_belongs_to_the_id(tmp_path, whole):
    """The database would take it off each block; only the one at the start of a file is none of the id's."""
    ids = [f"u{n}" if n % 2 else "\ufeff" if n % 4 else f"\ufeffu{n}" for n in range(1, 41)]
    text = "".join(f"{user}\ti\t1\t{SECOND}\n" for user in ids)
    with pytest.MonkeyPatch.context() as patch:
        for size in (24, 32, 64):  # whichever lines begin a block
            small_blocks(patch, size)
            if not whole:
                pass
            found, _ = read(written(tmp_path, text), "ml-100k", strict=True)
            assert [row[1] for row in found] == ids


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


J18, J23, ML, CSV = "amazon-2018-json", "amazon-2023-json", "ml-100k", "movielens-csv"
BAD = [
    (J18, '{"reviewerID": "A1", "asin": "B0', "not JSON", "not a whole JSON object"),
    (
        J18,
        '{"reviewerID": "A1", "unixReviewTime": 964982703}',
        "field missing",
        "missing required field `asin`",
    ),
    (
        J18,
        '{"reviewerID": 3, "asin": "B", "unixReviewTime": 964982703}',
        "field of another type",
        "got `int`",
    ),
    (
        J18,
        '{"reviewerID": "", "asin": "B", "unixReviewTime": 964982703}',
        "user empty",
        "user is '', expected an id",
    ),
    (
        J18,
        '{"reviewerID": "A\\t1\\t2\\t3\\nB", "asin": "B", "unixReviewTime": 964982703}',
        "user with a line break or TAB",
        "expected an id in one line",
    ),
    (J18, "", "not JSON", "not a whole JSON object"),
    (
        J18,
        '{"reviewerID": "A1", "asin": "B", "unixReviewTime": 964982703000}',
        "milliseconds where seconds are due",
        "which is in milliseconds, expected seconds",
    ),
    (
        J23,
        '{"user_id": "A1", "parent_asin": "B", "timestamp": 964982703}',
        "seconds where milliseconds are due",
        "which is in seconds, expected milliseconds",
    ),
    (
        J23,
        '{"user_id": "A1", "parent_asin": "B", "timestamp": -5}',
        "timestamp out of range",
        "timestamp is -5, expected milliseconds between 1990-01-01 and 2100-01-01",
    ),
    (ML, f"1\t2\tx\t{SECOND}", "rating not a number", "rating is 'x', expected a number"),
    (ML, f"1\t2\t\t{SECOND}", "rating not a number", "rating is '', expected a number"),
    (ML, "1\t2\t3\tnan", "timestamp not a number", "timestamp is 'nan', expected a number"),
    (ML, "1\t2\t3\t-7", "timestamp out of range", "timestamp is '-7', expected seconds between"),
    (ML, "1\t2\t3\t99999999999999999", "timestamp out of range", "expected seconds between 1990"),
    (ML, "1\t2\t3", "number of fields", "3 fields, expected 4 separated by TAB"),
    (ML, "", "number of fields", "1 fields, expected 4 separated by TAB"),
    (ML, f"\t2\t3\t{SECOND}", "user empty", "user is '', expected an id"),
    (ML, f"1\t\0\t3\t{SECOND}", "item with a line break or TAB", "expected an id in one line"),
    (ML, f"1\t\udcff\t3\t{SECOND}", "not UTF-8", "byte 0xff is not UTF-8 text"),
    (CSV, "userId,movieId,rating,timestamp", "header line again", "the header line again"),
    (CSV, f"1,2,3,{SECOND},5", "number of fields", "5 fields, expected 4 separated by ','"),
]


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize(("format", "bad", "reason", "detail"), BAD)
def test_a_bad_line_in_the_middle(tmp_path, monkeypatch, format, bad, reason, detail, ending):
    small_blocks(monkeypatch, 500)
    good = good_lines(format, 100)
    lines = [*good[:50], bad, *good[50:]]
    data = "".join(line + ending for line in lines).encode("utf-8", "surrogateescape")
    path = written(tmp_path, data, "mine.txt")
    rows, got = read(path, format)
    assert got.rejected == {reason: 1}
    (example,) = got.rejected_examples
    assert example["line"] == 51
    assert detail in example["reason"]
    valid = len(good) - (format == CSV)
    assert [row[0] for row in rows] == list(range(valid))
    assert got.lines_read == valid + 1
    json.dumps(got.rejected_examples, ensure_ascii=False).encode()  # as the manifest will hold it
    with pytest.raises(InputError, match=r"mine.txt, line 51: ") as error:
        read(path, format, strict=True)
    assert detail in str(error.value)
    assert "\n" not in str(error.value)


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


def test_a_file_in_another_unit_stops_at_its_first_block(tmp_path, monkeypatch):
    small_blocks(monkeypatch, 500)
    lines = [line.replace(str(SECOND), str(SECOND * 1000)) for line in good_lines(J18, 1000)]
    path = written(tmp_path, "\n".join(lines))
    with pytest.raises(InputError, match="milliseconds where seconds are due") as error:
        read(path, max_rejected_share=1.0)
    assert " of 1,000 lines" not in str(error.value)


@pytest.mark.parametrize("format", [J18, ML, CSV])
def test_a_gzip_file_that_is_cut_anywhere_is_refused(tmp_path, format):
    whole = gzip.compress(("\n".join(good_lines(format, 300)) + "\n").encode())
    for share in (0.1, 0.5, 0.9, 1.0):
        end = min(int(len(whole) * share), len(whole) - 1)
        path = written(tmp_path, whole[:end], "cut.gz")
        with pytest.raises(InputError, match=r"cut.gz is (cut short|damaged)"):
            read(path, format)
    assert len(read(written(tmp_path, whole), format)[0]) >= 299


@pytest.mark.parametrize("unzip", ["isal", "zlib"])
def test_damage_inside_a_gzip_file_is_refused(tmp_path, monkeypatch, unzip):
    if unzip == "zlib":
        monkeypatch.setattr(rawfile, "_unzipper", zlib.decompressobj)
    whole = bytearray(gzip.compress(("\n".join(good_lines(ML, 300)) + "\n").encode()))
    whole[-6] ^= 1  # in the checksum
    with pytest.raises(InputError, match="is damaged near byte"):
        read(written(tmp_path, bytes(whole)), ML)


@pytest.mark.parametrize("unzip", ["isal", "zlib"])
def test_a_gzip_file_of_several_members_and_padding(tmp_path, monkeypatch, unzip):
    small_blocks(monkeypatch)
    if unzip == "zlib":
        monkeypatch.setattr(rawfile, "_unzipper", zlib.decompressobj)
    lines = [line + "\n" for line in good_lines(ML, 30)]
    members = [gzip.compress("".join(part).encode()) for part in (lines[:10], lines[10:])]
    path = written(tmp_path, b"".join([members[0], b"\0" * 40, members[1], b"\0" * 512]))
    assert [row[1] for row in read(path, ML)[0]] == [str(n) for n in range(30)]


def test_empty_files_and_headers_alone(tmp_path):
    for data in (b"", b"\n \n", gzip.compress(b"")):
        path = written(tmp_path, data, "none.txt")
        for format in ("auto", ML, J18, "user-per-line"):
            with pytest.raises(InputError, match=r"none.txt is empty"):
                read(path, format)
    path = written(tmp_path, "userId,movieId,rating,timestamp\n", "ratings.csv")
    with pytest.raises(InputError, match=r"ratings.csv has a header and nothing below it"):
        read(path)


def test_no_file_a_folder_no_permission(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is a folder, expected a file"):
        read(tmp_path, ML)
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none", ML)
    path = written(tmp_path, CONTENTS[ML])

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # a test may run as root, who may read everything
    with pytest.raises(InputError, match="file cannot be read: no permission"):
        read(path, ML)


def test_a_last_line_without_an_end_may_be_cut(tmp_path):
    path = written(tmp_path, "1\t2\t3\t881250949\n1\t2\t3\t8812509", "u.data")
    with pytest.raises(InputError, match=r"u\.data, line 2: the file stops without a line end"):
        read(path)
    columns = {"user": "1", "item": "2", "time": "3"}
    path = written(tmp_path, f"a,b,{SECOND}\na,c,{SECOND}")  # made by hand
    assert [row[2] for row in read(path, columns=columns, strict=True)[0]] == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("who,what,when\nme,it,1\n", None, r"no column is clearly the .*columns found: who, what, when"),
        ("user,item,asin,time\nme,it,it,1\n", None, "item may be item or asin; give columns"),
        (
            "user,item,time\n",
            {"item": "thing"},
            "no column 'thing' for item; columns found: user, item, time",
        ),
        ("user,item,time\n", {"price": "time"}, "'columns' has price, expected user, item, time, rating"),
        ("user\n", {"user": "user"}, "no comma, TAB, semicolon or bar"),
    ],
)
def test_columns_of_an_own_table_are_asked_for(tmp_path, text, columns, said):
    with pytest.raises(InputError, match=said):
        read(written(tmp_path, text, "mine.csv"), "table", columns)


def test_own_table_by_hand(tmp_path):
    text = '\ufeffUser_ID;date;Rating;Item\r\nme;2019-03-04 12:00:00;;"a;b"\r\n\r\nme;2019-03-05;4,;c\r\n'
    rows, got = read(written(tmp_path, text), max_rejected_share=0.5)
    assert rows == [(0, "me", "a;b", None, 1551700800)]
    assert got.time_unit == "s"
    assert got.rejected_examples[0]["line"] == 4
    assert got.rejected == {"rating not a number": 1}
    clean = text.replace("4,", "4.5").replace(" 12:00:00", "T12:00:00+01:00")
    rows, got = read(written(tmp_path, clean), strict=True)
    assert rows == [(0, "me", "a;b", None, 1551697200), (1, "me", "c", 4.5, 1551744000)]


def test_a_quote_that_is_never_closed_hides_nothing(tmp_path):
    text = f'user,item,time\nme,"a,{SECOND}\n' + f"me,b,{SECOND}\n" * 300
    with pytest.raises(InputError, match="line 2: a double quote that opens here is never closed"):
        read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (f"user,item,time\ra,b,{SECOND}\r".encode(), "file: lines end with CR alone, expected LF or CRLF"),
        (f"user,item,time\na,b,{SECOND}\n".encode("utf-16"), "file is UTF-16 text, expected UTF-8"),
    ],
)
def test_text_of_other_systems_is_told(tmp_path, data, said):
    with pytest.raises(InputError, match=said):
        read(written(tmp_path, data))


def test_a_long_field_and_a_byte_order_mark(tmp_path):
    text = f'user,item,time,review\na,b,{SECOND},"{"x" * 3_000_000}"\n'
    assert read(written(tmp_path, text), strict=True)[0] == [(0, "a", "b", None, SECOND)]
    text = "\ufeff" + CONTENTS["amazon-2023-json"]
    assert read(written(tmp_path, text), strict=True)[0] == EXPECTED["amazon-2023-json"]


def test_line_numbers_count_line_ends_inside_quotes(tmp_path, monkeypatch):
    small_blocks(monkeypatch, 40)
    text = "user,item,time,note\n" + f'me,a,{SECOND},"one\ntwo"\n' * 3 + f"me,,{SECOND},x\n"
    with pytest.raises(InputError, match="line 8: item is ''"):
        read(written(tmp_path, text), strict=True)


def parquet(folder: Path, select: str) -> Path:
    path = folder / "mine.parquet"
    duckdb.connect().execute(f"COPY ({select}) TO '{path}' (FORMAT parquet)")
    return path


def test_own_parquet(tmp_path):
    path = parquet(tmp_path, "SELECT 7 AS user_id, 'x' AS item, TIMESTAMP '2019-03-04 12:00:00' AS time")
    rows, got = read(path)
    assert rows == [(0, "7", "x", None, 1551700800)]
    assert got.provenance["format"] == "table"
    bad = "i AS user_id, if(i = 3, NULL, 'x') AS item, if(i = 5, -1, 964982703) AS time"
    bad = f"SELECT {bad} FROM range(9) t(i)"
    path = parquet(tmp_path, bad)
    rows, got = read(path, max_rejected_share=0.3)
    assert [row[1] for row in rows] == ["0", "1", "2", "4", "6", "7", "8"]
    assert got.rejected == {"item empty": 1, "timestamp out of range or missing": 1}
    assert [example["line"] for example in got.rejected_examples] == [4, 6]
    with pytest.raises(InputError, match=r"mine.parquet, line 4: item empty"):
        read(path, strict=True)
    cut = written(tmp_path, path.read_bytes()[:-9], "cut.parquet")
    with pytest.raises(InputError, match=r"cut.parquet is not a whole Parquet file"):
        read(cut)
    with pytest.raises(InputError, match="is a Parquet file, expected format='table', not 'ml-100k'"):
        read(path, ML)


def test_an_inter_file_needs_its_columns(tmp_path):
    path = written(tmp_path, "1\t2\t3\t4\n", "x.inter")
    with pytest.raises(
        InputError, match=r"x.inter, line 1: header is '1\\t2\\t3\\t4', expected TAB-separated"
    ):
        read(path)
    text = f"timestamp:float\titem_id:token\tx:float\tuser_id:token\n{SECOND}.5\ti0\t0.5\tme\n"
    assert read(written(tmp_path, text, "y.inter"), strict=True)[0] == [(0, "me", "i0", None, SECOND)]


def test_latin_1_of_ml_1m(tmp_path):
    path = written(tmp_path, f"Zo\xeb::1::5::{SECOND}\n".encode("latin-1"), "ratings.dat")
    assert read(path, strict=True)[0] == [(0, "Zoë", "1", 5.0, SECOND)]


def test_a_user_on_two_lines_is_told(tmp_path):
    path = written(tmp_path, "1 5 6\n1 7 8\n")
    with pytest.raises(InputError, match=r"line 2: user '1' has a second line.*is it format pair-per-line"):
        read(path, "user-per-line", strict=True)
    with pytest.raises(InputError, match=r"line 1: the line is '1', expected a user and their items"):
        read(written(tmp_path, "1\n"), "user-per-line", strict=True)


TIMES = f"1 {SECOND} {SECOND + 5}\n2 {SECOND}\n"


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (TIMES, None),
        (f"1 {SECOND} {SECOND + 5}\n3 {SECOND}\n", "line 2: user '3' with 1 times, expected user '2' with 1"),
        (f"1 {SECOND}\n2 {SECOND}\n", "line 1: user '1' with 1 times, expected user '1' with 2"),
        (f"1 {SECOND} {SECOND + 5}\n", "ends before line 2"),
        (TIMES + f"3 {SECOND}\n", "has more lines than X_item_org_rank.txt"),
    ],
)
def test_the_twin_file_of_times(tmp_path, times, said):
    path = written(tmp_path, "1 a b\n2 c\n", "X_item_org_rank.txt")
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
    first = sources.source(config)
    assert first.name == "file"
    assert sources.source(DataConfig(dataset=str(path), strict=True)).identity == first.identity
    assert sources.source(DataConfig(dataset=str(path), format="user-per-line")).identity != first.identity
    written(tmp_path, CONTENTS["pair-per-line"] + "2 9\n")
    assert sources.source(config).identity != first.identity
    with pytest.raises(InputError, match="changed while it was read"):
        first.fill(duckdb.connect(), None)


def test_the_hash_of_a_large_file_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(sources, "HASH_KEPT_BYTES", 10)
    path = written(tmp_path, CONTENTS[ML])
    identity = sources.source(DataConfig(dataset=str(path))).identity
    (kept,) = (tmp_path / "data" / "hashes").iterdir()
    monkeypatch.setattr(sources.hashlib, "file_digest", lambda *_: pytest.fail("hashed again"))
    assert sources.source(DataConfig(dataset=str(path))).identity == identity
    assert kept.read_text() in identity


def test_a_folder_is_a_dataset_only_with_a_manifest(tmp_path):
    config = DataConfig(dataset=str(tmp_path))
    assert sources.prepared_folder(config) is None
    with pytest.raises(InputError, match=r"is a folder without manifest.json"):
        sources.source(config)
    written(tmp_path, "{}", "manifest.json")
    assert sources.prepared_folder(config) == tmp_path


def test_synthetic_and_ml_100k_fill_the_table(tmp_path):
    con = duckdb.connect()
    got = sources.source(DataConfig(dataset="synthetic")).fill(con, None)
    assert con.execute(COUNTS).fetchone()[:2] == (got.lines_read, 300)
    assert con.execute("SELECT bool_and(time % 60 = 0), min(time) FROM raw").fetchone() == (True, 0)
