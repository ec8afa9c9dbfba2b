"""Reads a file of any format into the table `raw` of a DuckDB connection, out of core; bad lines are counted.

A reader cuts its file into user, item, rating and time: `_fields` for separated fields, `_json` for JSON
lines, `_histories` for one user a line. DuckDB alone then decides, in one query (`_checked`), which of
them are valid and what their times are; the columns of a Parquet file go through the same query. So a
line means the same wherever it stands in a file and whichever format it is written in.

Times are kept to the microsecond. A number is seconds, milliseconds, microseconds or nanoseconds since
1970, whichever lies between 1990 and 2100; text is a date like 2019-03-04 12:00:00, with an offset or in UTC.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import operator
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from reclib import system
from reclib.config import InputError
from reclib.data import formats
from reclib.data.formats import FOUR, OBVIOUS, Block, Format, RawFile, named, separator_of

if TYPE_CHECKING:
    import duckdb

RAW_COLUMNS = 'row BIGINT, "user" VARCHAR, item VARCHAR, rating DOUBLE, time BIGINT'

READING_VERSION = 2  # raise whenever the same file would give other interactions or another order

ROW_ORDER = "#row"  # as the column of time: the rows are in time order

NO_RATING = "#none"  # as the column of ratings: leave it out

ROWS_HELD = 100_000  # before they are appended

EXAMPLES = 5  # of bad lines that are kept

TEXT_LENGTH = 120  # characters of each

# 1990-01-01 to 2100-01-01: no interaction of a public dataset lies outside. The units cannot be mixed
# up, since a time within the range in one lies outside in the others.
FIRST_SECOND, LAST_SECOND = 631_152_000, 4_102_444_800

MICROSECONDS = {"s": 1_000_000, "ms": 1000, "us": 1}  # units that times are kept in

_DATE = (
    r"^\s*(\d{4})[-/](\d{1,2})[-/](\d{1,2})"
    r"(?:[T ]\s*(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?"
    r"\s*([AaPp][Mm])?\s*(?:[Zz]|UTC|GMT|([+-])(\d{2})(?::?(\d{2}))?)?)?\s*$"
)

_BROKEN = r"'[\t\r\n\x00]'"  # what no id may hold

_PARTS = ["y", "mo", "d", "h", "mi", "s", "f", "half", "sign", "zh", "zm"]

# Types of a Parquet file, by their beginning.
_NUMBERS: tuple[str, ...] = (
    "TINYINT",
    "SMALLINT",
    "INTEGER",
    "BIGINT",
    "HUGEINT",
    "UTINYINT",
    "USMALLINT",
    "UINTEGER",
)

_NUMBERS += ("UBIGINT", "UHUGEINT", "FLOAT", "DOUBLE", "DECIMAL", "VARCHAR", "ENUM")

_IDS = (*_NUMBERS, "UUID")

# Reason -> what of a row is wrong, and what was expected.
_EXPECTED = {
    "user empty": ("user", "an id"),
    "item empty": ("item", "an id"),
    "user with a line break or TAB": ("user", "an id in one line"),
    "item with a line break or TAB": ("item", "an id in one line"),
    "rating not a number": ("rating", f"a number (columns rating={NO_RATING} leaves the column out)"),
    "timestamp missing": ("time", "a time"),
    "timestamp not a number or date": ("time", "a number or a date like 2019-03-04 12:00:00+01:00"),
    "timestamp out of range": ("time", "a time between 1990-01-01 and 2100-01-01"),
    "header line again": ("user", "an interaction, not the header line again"),
}

Progress = Callable[[int, int], None]  # bytes of the file done, and in all


@dataclass(frozen=True)
class Ingested:
    """What was read into `raw`, for the manifest."""

    time_unit: str  # s, ms, us, or order: then time is the position in the user's history
    provenance: dict[str, Any]  # plain JSON: file, its sha256, bytes, format
    lines_read: int  # without a header; rows of a Parquet file
    rejected: dict[str, int]  # reason -> lines
    rejected_examples: list[dict[str, Any]]  # {"line": number, "reason": ..., "text": its beginning}
    titles: Callable[[Collection[str]], dict[str, str]]  # reads the titles of these items when called


def ingest(
    con: duckdb.DuckDBPyConnection,
    path: Path,
    format: Format | None = None,
    *,
    columns: dict[str, str] | None = None,
    strict: bool = False,
    max_rejected_share: float = 0.01,
    max_line_bytes: int = formats.MAX_LINE_BYTES,
    progress: Progress | None = None,
    sha256: str | None = None,
    work: Path | None = None,
) -> Ingested:
    """Create the table raw(row, "user", item, rating, time) from a file.

    `row` grows in the file's order; `rating` is NULL where unknown; `time` is in the unit that the result
    names, the coarsest that holds all times. `format` None is detected. `sha256` is the file's hash where
    it is known: then it is not computed again. `work` is a folder for temporary files. Raises `InputError`
    for what cannot be read (a line longer than `max_line_bytes`, for one), at the first bad line if
    `strict`, else where more than `max_rejected_share` of the lines are bad; the table is then not to be
    used.
    """
    format = format or named("auto", path, columns)
    # temporary: it is not written twice, to a log and to the file, and is spilled where memory ends
    con.execute(f"CREATE OR REPLACE TEMP TABLE raw({RAW_COLUMNS})")
    with tempfile.TemporaryDirectory(dir=work) as folder:
        table = _Table(con, _Rejects(path.name, strict, max_rejected_share), Path(folder))
        if formats.is_parquet(path):
            if format.kind != "table":
                raise InputError(
                    f"{path.name} is a Parquet file, expected format='table', not {format.name!r}"
                )
            _read_parquet(table, path, columns)
            about: dict[str, Any] = {}
            if progress is not None:
                progress(path.stat().st_size, path.stat().st_size)
        else:
            file = RawFile(path, sha256=sha256, max_line_bytes=max_line_bytes)
            about = _read_text(table, file, format, columns, progress)
            sha256 = file.sha256
    table.rejects.finish()
    unit = _number_positions(con) if table.order else _coarsest_unit(con)
    if sha256 is None:
        sha256 = system.file_sha256(path)
    name = printable(path.name)
    about = {"file": name, "bytes": path.stat().st_size, "format": format.name, "sha256": sha256, **about}
    side = formats.titles_beside(path)
    if side is not None:
        about["titles"] = side.name
    return Ingested(
        unit,
        about,
        table.rejects.lines,
        dict(table.rejects.counts),
        table.rejects.examples,
        lambda items: {} if side is None else formats.read_titles(side, items),
    )


def printable(name: str) -> str:
    """Return a file's name with "_" for bytes that are not UTF-8."""
    return re.sub("[\udc80-\udcff]", "_", name)


def _coarsest_unit(con: duckdb.DuckDBPyConnection) -> str:
    """Turn microseconds into the coarsest unit that loses nothing, and return it."""
    whole = ", ".join(f"bool_and(time % {size} = 0)" for size in MICROSECONDS.values())
    row = con.execute(f"SELECT {whole} FROM raw").fetchone() or ()
    unit, size = next(pair for pair, fits in zip(MICROSECONDS.items(), row, strict=True) if fits)
    if size > 1:
        con.execute(f"ALTER TABLE raw ALTER time SET DATA TYPE BIGINT USING time // {size}")
    return unit


def _number_positions(con: duckdb.DuckDBPyConnection) -> str:
    """Set time to the position in the user's history, from 0."""
    con.execute("ALTER TABLE raw RENAME TO unnumbered")
    con.execute(f"CREATE TEMP TABLE raw({RAW_COLUMNS})")
    con.execute("""INSERT INTO raw
        SELECT row, "user", item, rating, row_number() OVER (PARTITION BY "user" ORDER BY row) - 1
        FROM unnumbered ORDER BY row""")
    con.execute("DROP TABLE unnumbered")
    return "order"


# ---- bad lines ----------------------------------------------------------------------------------------


class Bad(NamedTuple):
    """A line that is no valid interaction, or several alike of which it is the first."""

    line: int
    reason: str  # what is counted
    detail: str  # what is told
    text: str
    lines: int = 1


class _Rejects:
    """What was rejected of one file, and why."""

    def __init__(self, name: str, strict: bool, max_share: float) -> None:
        self.name = name  # of the file
        self.strict = strict
        self.max_share = max_share
        self.valid = 0  # lines
        self.counts: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []

    @property
    def lines(self) -> int:
        """Lines read, rejected ones included."""
        return self.valid + self.counts.total()

    def add(self, valid: int, bad: list[Bad]) -> None:
        """Count the lines of one batch; stop at the first bad one if strict, and where none is valid."""
        bad.sort()
        if bad and self.strict:
            raise InputError(f"{self.name}, line {bad[0].line}: {bad[0].detail}")
        self.valid += valid
        for line, reason, detail, text, count in bad:
            self.counts[reason] += count
            if len(self.examples) < EXAMPLES:
                shown = text[:TEXT_LENGTH].encode("utf-8", "backslashreplace").decode()
                self.examples.append({"line": line, "reason": detail, "text": shown})
        if not self.valid and self.counts:
            self._stop()

    def finish(self) -> None:
        """Raise `InputError` if too many lines are bad, or if there are none."""
        if not self.lines:
            raise InputError(f"{self.name} has a header and nothing below it")
        if self.counts.total() > self.max_share * self.lines:
            self._stop()

    def _stop(self) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        first = "; ".join(
            f"{self.name}, line {example['line']}: {example['reason']}" for example in self.examples[:3]
        )
        raise InputError(
            f"{self.name}: {self.counts.total():,} of {self.lines:,} lines rejected, allowed is a share of "
            f"{self.max_share:g} (max_rejected_share): {reasons}; {first}"
        )


# ---- what is valid: one query for all formats -----------------------------------------------------------


def _checked(source: str, *, order: bool, header: tuple[str, str] | None = None) -> str:
    """Return the query of row, line, user, item, rating, time, stars, us and reason, which is NULL if valid.

    `source` gives row, line, "user" and item as text, rating and time as text or numbers, and the time in
    microseconds in `us` where it is known.
    """
    units = ((1, "* 1e6"), (10**3, "* 1e3"), (10**6, ""), (10**9, "/ 1e3"))  # seconds to nanoseconds
    numbers = " ".join(
        f"WHEN number >= {FIRST_SECOND * size} AND number < {LAST_SECOND * size} "
        f"THEN CAST(round(number {factor}) AS BIGINT)"
        for size, factor in units
    )
    hour = """CASE WHEN p.half = '' THEN p.h WHEN CAST(p.h AS INT) BETWEEN 1 AND 12
        THEN CAST(CAST(p.h AS INT) % 12 + if(lower(p.half) = 'pm', 12, 0) AS VARCHAR) END"""
    clock = f"({hour}) || ':' || p.mi || ':' || if(p.s = '', '00', p.s) || '.' || left(p.f || '0', 6)"
    stamp = f"p.y || '-' || p.mo || '-' || p.d || ' ' || if(p.h = '', '00:00:00', {clock})"
    zone = "(CAST('0' || p.zh AS INT) * 60 + CAST('0' || p.zm AS INT))"
    date = f"""CASE WHEN {zone} < 960 AND CAST('0' || p.zm AS INT) < 60 THEN
        epoch_us(try_cast({stamp} AS TIMESTAMP)) - if(p.sign = '-', -1, 1) * {zone} * 60000000::BIGINT END"""
    again = ""
    if header is not None:
        same = f'"user" = {_text(header[0])} AND item = {_text(header[1])}'
        again = f"WHEN {same} THEN 'header line again'"
    text = "CAST({} AS VARCHAR)"
    bad_time = f"""
        WHEN us IS NULL AND coalesce(trim({text.format("time")}), '') = '' THEN 'timestamp missing'
        WHEN us IS NULL AND (number IS NULL OR NOT isfinite(number)) THEN 'timestamp not a number or date'
        WHEN us IS NULL OR us < {FIRST_SECOND}000000 OR us >= {LAST_SECOND}000000
        THEN 'timestamp out of range'"""
    return f"""
        SELECT *, CASE
            WHEN coalesce("user", '') = '' THEN 'user empty'
            WHEN coalesce(item, '') = '' THEN 'item empty'
            {again}
            WHEN regexp_matches("user", {_BROKEN}) THEN 'user with a line break or TAB'
            WHEN regexp_matches(item, {_BROKEN}) THEN 'item with a line break or TAB'
            WHEN (stars IS NULL OR NOT isfinite(stars)) AND trim({text.format("rating")}) <> ''
            THEN 'rating not a number'
            {"" if order else bad_time} END AS reason
        FROM (SELECT * EXCLUDE (us, p), CASE
                WHEN us IS NOT NULL THEN us WHEN p IS NULL THEN CASE {numbers} END
                WHEN p.y <> '' THEN {date} END AS us
            FROM (SELECT *, CASE WHEN us IS NULL AND number IS NULL THEN
                    regexp_extract({text.format("time")}, {_text(_DATE)}, {_PARTS}) END AS p
                FROM (SELECT *, try_cast(time AS DOUBLE) AS number, try_cast(rating AS DOUBLE) AS stars
                    FROM ({source}))))"""


class _Table:
    """Appends the valid rows of batches to `raw` and counts the others."""

    def __init__(self, con: duckdb.DuckDBPyConnection, rejects: _Rejects, folder: Path) -> None:
        self.con = con
        self.rejects = rejects
        self.rows = 0  # seen, rejected ones included
        self.order = False  # whether there are no times, only an order
        self.header: tuple[str, str] | None = None  # user's and item's field in the header line
        self.held = Batch()
        self.folder = folder  # for temporary files

    def append(self, batch: Batch) -> None:
        """Append rows that a reader has cut; few are held until there are more."""
        for name in ("lines", *FOUR, "bad"):
            getattr(self.held, name).extend(getattr(batch, name))
        if batch.valid is not None:
            self.held.valid = (self.held.valid or 0) + batch.valid
        if len(self.held.lines) >= ROWS_HELD or self.held.bad:
            self.flush()

    def flush(self) -> None:
        """Append the rows that are held."""
        batch, self.held = self.held, Batch()
        size = len(batch.lines)
        columns: dict[str, np.ndarray] = {
            "line": np.array(batch.lines, np.int64),
            "row": np.arange(self.rows, self.rows + size),
        }
        names = {}
        for name in FOUR:
            columns[name], kind = _column(getattr(batch, name), size)
            names[name] = f'CAST("{name}" AS {kind}) AS "{name}"'
        self.con.register("batch", columns)
        try:
            self.take(f"SELECT row, line, {', '.join(names.values())}, {self.us} FROM batch", size, batch)
        finally:
            self.con.unregister("batch")

    def append_lines(self, text: str, first: int, layout: Layout) -> bool:
        """Append lines without quotation marks whose fields the database can cut; False where it cannot.

        It is asked only where it cuts as `_fields` does: it would take a CR for a line end, skip blank lines
        and a mark of byte order, and pass over an empty field too much.
        """
        import duckdb

        separator, size = layout.separator, text.count("\n") + (not text.endswith("\n"))
        width = len(layout.names)
        odd = ("\r", "\n\n", "\0", separator * 2 if len(separator) > 1 else "\0")
        if text.startswith(("\n", "\ufeff")) or any(sign in text for sign in odd):
            return False
        if text.count(separator) != size * (width - 1):
            return False
        self.flush()
        file = self.folder / "lines"
        file.write_text(text, encoding="utf-8", newline="")
        kinds = ", ".join(f"c{n}: 'VARCHAR'" for n in range(width))
        fields = {what: f'c{layout.position[what]} AS "{what}"' for what in layout.position}
        given = ", ".join(fields.get(what, f"NULL AS {what}") for what in FOUR)
        source = f"""
            SELECT number + {self.rows - 1} AS row, number + {first - 1} AS line, {given}, {self.us}
            FROM (SELECT row_number() OVER () AS number, * FROM read_csv({_text(str(file))},
                columns = {{{kinds}}}, force_not_null = {[f"c{n}" for n in range(width)]}, header = false,
                delim = {_text(separator)}, quote = '', escape = '', auto_detect = false,
                parallel = false))"""
        try:
            self.take(source, size, Batch())
        except (duckdb.InvalidInputException, duckdb.ConversionException):
            return False
        return True

    @property
    def us(self) -> str:
        """The known time of a row, in SQL: where there is only an order, any."""
        return f"CAST({0 if self.order else 'NULL'} AS BIGINT) AS us"

    def take(self, source: str, size: int, batch: Batch) -> None:
        """Append what is valid of a query of `size` rows (see `_checked`), and count the rest."""
        query = _checked(source, order=self.order, header=self.header)
        insert = f'INSERT INTO raw SELECT row, "user", item, stars, us FROM ({query}) WHERE reason IS NULL'
        row = self.con.execute(insert).fetchone() if size else None
        taken = row[0] if row else 0
        self.rows += size
        if taken < size:
            first = 'arg_min(("user", item, rating, time), line)'
            counts = f"SELECT reason, count(*), min(line), {first} FROM ({query}) WHERE reason IS NOT NULL"
            for reason, count, line, row in self.con.execute(f"{counts} GROUP BY reason").fetchall():
                batch.bad.append(_explained(line, reason, dict(zip(FOUR, row, strict=True)), count))
        self.rejects.add(taken if batch.valid is None else batch.valid, batch.bad)


def _explained(line: int, reason: str, row: dict[str, Any], count: int) -> Bad:
    what, expected = _EXPECTED[reason]
    shown = ",".join(str(row[name]) for name in FOUR if row.get(name) is not None)
    name = {"time": "timestamp"}.get(what, what)
    return Bad(line, reason, f"{name} is {str(row[what] or '')[:80]!r}, expected {expected}", shown, count)


def _text(text: str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


# ---- columns ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the fields are in this very file."""

    separator: str
    names: tuple[str, ...]  # of all columns, in the file's order
    position: dict[str, int]  # user, item, time, rating -> column
    header: tuple[str, ...] | None  # fields of the first line where that is a header
    order: bool  # whether the lines are in time order, without times
    quoted: bool  # whether a quotation mark at the start of a field opens it


def _layout(path: Path, format: Format, columns: dict[str, str] | None, lines: list[str]) -> Layout:
    """Find the fields of a text file from its first lines; raise `InputError` that names the columns."""
    first = lines[0]
    if format.kind == "table":
        return _table_layout(path, columns, lines)
    separator = format.separator or ("\t" if "\t" in first else " ")
    if format.fields:
        names = format.fields
        position = {name: n for n, name in enumerate(names)}
        return Layout(separator, names, position, None, format.order, separator == ",")
    header = first.split(separator)
    found = [name.split(":")[0] for name in header]
    missing = [name for what, name in format.names if name not in found and what != "rating"]
    if missing:
        described = "TAB" if separator == "\t" else f"'{separator}'"
        raise InputError(
            f"{path.name}, line 1: header is {first[:80]!r}, expected {described}-separated columns that "
            f"include {', '.join(missing)}"
        )
    position = {what: found.index(name) for what, name in format.names if name in found}
    return Layout(separator, tuple(found), position, tuple(header), format.order, separator == ",")


def _table_layout(path: Path, columns: dict[str, str] | None, lines: list[str]) -> Layout:
    separator = separator_of(lines[0])
    if separator not in lines[0]:
        raise InputError(f"{path.name}, line 1: no comma, TAB, semicolon or bar in {lines[0][:80]!r}")
    csv.field_size_limit(sys.maxsize)  # lines are bounded, and a field may hold a whole review
    try:
        first = next(csv.reader((line + "\n" for line in lines), delimiter=separator))
    except csv.Error:
        raise InputError(f"{path.name}, line 1: a carriage return within {lines[0][:80]!r}") from None
    given = [column for column in (columns or {}).values() if not column.startswith("#")]
    by_position = bool(given) and all(column.isdecimal() for column in given)
    names = [str(n + 1) for n in range(len(first))] if by_position else first
    rows = [[field.strip('"') for field in line.split(separator)] for line in lines[1:]]
    values = {name: [row[n] for row in rows if len(row) == len(names)] for n, name in enumerate(names)}
    chosen = choose_columns(path, names, columns, values)
    position = {what: names.index(name) for what, name in chosen.items() if not name.startswith("#")}
    headed = not by_position or formats.is_header(first)
    if by_position and "time" in position:  # a time in the first row tells that it is no header
        headed = not is_time(first[position["time"]]) and any(map(is_time, values[chosen["time"]]))
    header = tuple(first) if headed else None
    return Layout(separator, tuple(names), position, header, "time" not in position, quoted=True)


def choose_columns(
    path: Path, names: list[str], columns: dict[str, str] | None, values: dict[str, list[str]] | None = None
) -> dict[str, str]:
    """Return what -> column: as the user says, else by obvious names; raise `InputError` if unclear.

    A column of ratings is optional: one that is only obvious is left out where none of its `values`, those
    at the file's beginning, is a number.
    """
    option = f"give columns user=NAME,item=NAME,time=NAME (time={ROW_ORDER}: the rows are in time order)"
    found = f"columns found: {', '.join(names)[:300]}"
    chosen = dict(columns or {})
    unknown = set(chosen) - set(OBVIOUS)
    if unknown:
        raise InputError(
            f"parameter 'columns' has {', '.join(sorted(unknown))}, expected {', '.join(OBVIOUS)}"
        )
    for what, column in chosen.items():
        if column not in names and (what, column) not in (("time", ROW_ORDER), ("rating", NO_RATING)):
            raise InputError(f"{path.name}: no column {column!r} for {what}; {found}")
        if names.count(column) > 1:
            raise InputError(f"{path.name}: {names.count(column)} columns are called {column!r}; {found}")
        if list(chosen.values()).count(column) > 1:
            raise InputError(f"parameter 'columns' names {column!r} twice, expected one column for each")
    for what in OBVIOUS:
        fits = [] if what in chosen else formats.obvious(what, names)
        if len(fits) > 1 and what != "rating":
            raise InputError(f"{path.name}: {what} may be {' or '.join(fits)}; {option}; {found}")
        if what not in chosen and not fits and what != "rating":
            raise InputError(f"{path.name}: no column is clearly the {what}; {option}; {found}")
        seen = [value for value in (values or {}).get(fits[0] if fits else "", []) if value.strip()]
        if len(fits) == 1 and (what != "rating" or not seen or any(map(formats.is_number, seen))):
            chosen[what] = fits[0]
    return chosen


def is_time(text: str) -> bool:
    """Return whether a field looks like a time: a number of a possible size, or a date."""
    if formats.is_number(text):
        return any(FIRST_SECOND * size <= float(text) < LAST_SECOND * size for size in (1, 1e3, 1e6, 1e9))
    return re.match(_DATE, text) is not None


# ---- text ---------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Rows as a reader has cut them: columns, and the lines that are no rows."""

    lines: list[int] = field(default_factory=list)
    user: list[str] = field(default_factory=list)
    item: list[str] = field(default_factory=list)
    rating: list[Any] = field(default_factory=list)  # text, numbers or None
    time: list[Any] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    valid: int | None = None  # lines, where they are not rows


def _read_text(
    table: _Table,
    file: RawFile,
    format: Format,
    columns: dict[str, str] | None,
    progress: Progress | None,
) -> dict[str, Any]:
    """Read blocks of lines; return what was learned about the file."""
    lines = formats.sample(file.path)
    blocks = _told(file, format, progress)
    twin = None
    if format.kind == "json" or (format.kind == "table" and lines[0].startswith("{")):
        names = dict(format.names) or _json_columns(file.path, columns, lines)
        table.order = names.get("time") == ROW_ORDER
        _json(table, blocks, names)
    elif format.kind == "sequences":
        twin = _Twin(file.path)
        table.order = twin.file is None
        _histories(table, blocks, twin)
    else:
        layout = _layout(file.path, format, columns, lines)
        table.order = layout.order
        if layout.header is not None:
            user, item = (layout.header[layout.position[what]] for what in ("user", "item"))
            table.header = (user, item)
        encoding = "utf-8"
        if format.separator == "::" and "\ufffd" in "".join(lines):
            encoding = "latin-1"  # as GroupLens wrote its first sets
        _fields(table, blocks, layout, encoding, file)
    table.flush()
    return {} if twin is None else twin.finish()


def _told(file: RawFile, format: Format, progress: Progress | None) -> Iterator[Block]:
    """Yield the blocks of a file and tell of its progress; raise `InputError` where its last line is cut."""
    for block in file.blocks():
        if format.line_end and not block.data.endswith(b"\n"):
            line = block.first_line + block.data.count(b"\n")
            raise InputError(
                f"{file.path.name}, line {line}: the file stops without a line end, so it may be cut short; "
                "expected a line end after the last line"
            )
        yield block
        if progress is not None:
            progress(file.bytes_read, file.size)


def _column(values: list[Any], size: int) -> tuple[np.ndarray, str]:
    """Return an array of `size` for the database and its type: numbers stay numbers, all else is text."""
    kinds = set(map(type, values))
    with contextlib.suppress(OverflowError):
        for kind, dtype, name in ((int, np.int64, "BIGINT"), (float, np.float64, "DOUBLE")):
            if kinds == {kind}:
                return np.array(values, dtype), name
    texts = values if kinds <= {str} else [None if value is None else str(value) for value in values]
    return np.array(texts or [None] * size, dtype=object), "VARCHAR"


def _decoded(data: bytes, encoding: str = "utf-8") -> tuple[str, bool]:
    """Return the text, and whether bytes in it are not of the encoding: they are surrogates then."""
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError:
        return data.decode(encoding, "surrogateescape"), True


def _not_utf8(line: int, text: str) -> Bad | None:
    """Return what is wrong where decoding with surrogate escapes met bytes that are not UTF-8."""
    found = re.search("[\udc80-\udcff]", text)
    if found is None:
        return None
    return Bad(line, "not UTF-8", f"byte {ord(found.group()) - 0xDC00:#04x} is not UTF-8 text", text)


def _fields(table: _Table, blocks: Iterator[Block], layout: Layout, encoding: str, file: RawFile) -> None:
    """Append lines of separated fields."""
    headed = layout.header is not None
    held: list[str] = []  # lines of a record that goes on in the next block
    block = next(blocks, None)
    while block is not None:
        following = next(blocks, None)
        text, other_bytes = _decoded(block.data, encoding)
        first = block.first_line
        if not (held or other_bytes or (layout.quoted and '"' in text)):
            start = text.find("\n") + 1 if headed else 0
            if (start or not headed) and table.append_lines(text[start:], first + headed, layout):
                headed, block = False, following
                continue
        batch = Batch()
        lines = held + text.removesuffix("\n").split("\n")
        first -= len(held)
        if layout.quoted and (held or '"' in text or "\r" in text):
            numbers, rows, held = _records(lines, first, layout, following is None, batch.bad)
            if sum(map(len, held)) > file.max_line_bytes:
                raise InputError(
                    f"{file.path.name}, line {first + len(lines) - len(held)}: a quotation mark that opens "
                    f"here is not closed within {file.max_line_bytes:,} bytes"
                )
        else:
            numbers, held = list(range(first, first + len(lines))), []
            rows = [line.split(layout.separator) for line in lines]
        numbers, rows = _sifted(numbers, rows, layout, batch.bad)
        if headed and rows:
            numbers, rows, headed = numbers[1:], rows[1:], False
        batch.lines = numbers
        for what in FOUR:
            place = layout.position.get(what)
            setattr(batch, what, [None if place is None else row[place] for row in rows])
        table.append(batch)
        block = following


def _sifted(
    numbers: list[int], rows: list[list[str]], layout: Layout, bad: list[Bad]
) -> tuple[list[int], list[list[str]]]:
    """Return the rows that have as many fields as there are columns, and no bytes that are not UTF-8."""
    good_numbers, good_rows = [], []
    described = {"\t": "TAB", " ": "spaces"}.get(layout.separator, f"'{layout.separator}'")
    for number, row in zip(numbers, rows, strict=True):
        whole = layout.separator.join(row)
        if len(row) == 1 and not whole.strip():  # a blank line in a file made by hand is no mistake
            continue
        wrong = _not_utf8(number, whole)
        if wrong is None and len(row) != len(layout.names):
            detail = (
                f"{len(row)} fields, expected {len(layout.names)} separated by {described} "
                f"({', '.join(layout.names)[:100]}); the line is {whole[:80]!r}"
            )
            wrong = Bad(number, "number of fields", detail, whole, 1 + whole.count("\n"))
        if wrong is not None:
            bad.append(wrong)
            continue
        good_numbers.append(number)
        good_rows.append(row)
    return good_numbers, good_rows


def _records(
    lines: list[str], first: int, layout: Layout, last: bool, bad: list[Bad]
) -> tuple[list[int], list[list[str]], list[str]]:
    """Cut lines whose fields may be quoted; return the records' lines and fields, and lines left over.

    A quotation mark opens a field at the field's start only; elsewhere it is a character like others.
    Where a quoted field would hold a line that is a whole interaction, its mark was never closed: the
    lines before that one are bad. Lines left over begin a record that the next block may end (not in the
    `last` one).
    """
    numbers: list[int] = []
    rows: list[list[str]] = []
    at, start, ran_out = 0, 0, False

    def feed() -> Iterator[str]:
        nonlocal at, ran_out
        while at < len(lines):
            at += 1
            yield lines[at - 1] + "\n"
        ran_out = True

    def never_closed(count: int) -> None:
        detail = "a quotation mark that opens a field here is never closed"
        bad.append(Bad(first + start, "quotation mark never closed", detail, lines[start], count))

    while start < len(lines):
        reader = csv.reader(feed(), delimiter=layout.separator)
        try:
            for fields in reader:
                inside = next((n for n in range(start + 1, at) if _is_interaction(lines[n], layout)), None)
                if inside is not None:
                    never_closed(inside - start)
                    at = start = inside
                    break
                if ran_out and last:
                    never_closed(at - start)
                elif ran_out:
                    return numbers, rows, lines[start:]
                else:
                    numbers.append(first + start)
                    rows.append(fields or [""])
                start = at
        except csv.Error:  # a CR within a line
            detail = f"a carriage return within the line {lines[at - 1][:80]!r}"
            bad.append(Bad(first + start, "carriage return", detail, lines[at - 1], at - start))
            start = at
        ran_out = False
    return numbers, rows, []


def _is_interaction(line: str, layout: Layout) -> bool:
    """Return whether a line is a whole interaction by itself."""
    fields = line.split(layout.separator)
    if len(fields) != len(layout.names) or not all(fields[layout.position[w]] for w in ("user", "item")):
        return False
    if layout.order:
        return layout.separator == "\t"  # commas occur in any text
    return is_time(fields[layout.position["time"]])


def _json_columns(path: Path, columns: dict[str, str] | None, lines: list[str]) -> dict[str, str]:
    """Return what -> key of the user's own JSON lines."""
    values: dict[str, list[str]] = {}
    for line in lines:
        try:
            read = msgspec.json.decode(line.encode(), type=dict[str, Any])
        except msgspec.DecodeError:
            continue
        for key, value in read.items():
            values.setdefault(key, []).append("" if value is None else str(value))
    return choose_columns(path, list(values), columns, values)


def _json(table: _Table, blocks: Iterator[Block], names: dict[str, str]) -> None:
    """Append JSON lines: build the four fields and pass over all others."""
    kinds: dict[str, tuple[Any, bool]] = {
        "user": (str | int, True),
        "item": (str | int, True),
        "rating": (float | str | None, False),
        "time": (int | float | str | None, True),
    }
    fields: list[Any] = []
    for what, (kind, required) in sorted(kinds.items(), key=lambda pair: not pair[1][1]):
        if what in names and not names[what].startswith("#"):
            options = {"name": names[what]} if required else {"name": names[what], "default": None}
            fields.append((what, kind, msgspec.field(**options)))
    decoder = msgspec.json.Decoder(msgspec.defstruct("Line", fields, gc=False))
    has = {what for what, *_ in fields}
    for block in blocks:
        other_bytes = not block.data.isascii() and _decoded(block.data)[1]
        batch, read, lines = Batch(), list[Any](), list[bytes]()
        if not other_bytes:
            with contextlib.suppress(msgspec.DecodeError):
                read = decoder.decode_lines(block.data)
        if len(read) == _objects(block.data):
            batch.lines = list(range(block.first_line, block.first_line + len(read)))
        else:  # line by line, by the same decoder
            read, lines = [], block.data.removesuffix(b"\n").split(b"\n")
        for number, line in enumerate(lines, block.first_line):
            try:
                row = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                if line.strip():  # a blank line is no mistake
                    batch.bad.append(_bad_json(number, line, error))
                continue
            if other_bytes and (wrong := _not_utf8(number, line.decode("utf-8", "surrogateescape"))):
                batch.bad.append(wrong)
                continue
            read.append(row)
            batch.lines.append(number)
        batch.user = [str(row.user) for row in read]
        batch.item = [str(row.item) for row in read]
        for what in ("rating", "time"):
            values = (
                map(operator.attrgetter(what), read) if what in has else itertools.repeat(None, len(read))
            )
            setattr(batch, what, list(values))
        table.append(batch)


def _objects(data: bytes) -> int | None:
    """Return the number of lines if each begins and ends as an object does and has a line end, else None.

    Such a line holds whole objects: where there are as many objects as lines, each line holds one. An array,
    since counting two bytes such as those of "}" and a line end takes longer than decoding the objects.
    """
    signs = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(signs == ord("\n"))
    if not ends.size or ends[-1] != signs.size - 1 or signs[0] != ord("{"):
        return None
    whole = (signs[ends[:-1] + 1] == ord("{")).all() and (signs[ends - 1] == ord("}")).all()
    return len(ends) if whole else None


def _bad_json(number: int, line: bytes, error: Exception) -> Bad:
    text = line.decode("utf-8", "surrogateescape")
    wrong = _not_utf8(number, text)
    if wrong is not None:
        return wrong
    if isinstance(error, msgspec.ValidationError):
        reason = "field missing" if "missing required" in str(error) else "field of another type"
        return Bad(number, reason, str(error), text)
    return Bad(number, "not JSON", f"not a whole JSON object: {error}", text)


# ---- one user a line ----------------------------------------------------------------------------------

ITEMS, TIMES = "_item_org_rank.txt", "_time_org_rank.txt"


def twin(path: Path) -> Path | None:
    """Return the file of times that belongs to a file of items, None where there is none.

    TiCoSeRec's `X_item_org_rank.txt` has a twin `X_time_org_rank.txt` with the times of the same
    interactions; where it lies beside, they are read.
    """
    plain = path.name.removesuffix(".gz")
    if not plain.endswith(ITEMS):
        return None
    for name in (plain.removesuffix(ITEMS) + TIMES, plain.removesuffix(ITEMS) + TIMES + ".gz"):
        if (path.parent / name).is_file():
            return path.parent / name
    return None


class _Twin:
    """One pass over the file of times of a file of histories, if it has one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        found = twin(path)
        self.file = RawFile(found) if found else None
        blocks = self.file.blocks() if self.file else iter(())
        self._lines = itertools.chain.from_iterable(
            block.data.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n") for block in blocks
        )

    def times(self, number: int, line: str) -> list[str] | None:
        """Return the times of the next line; raise `InputError` where it is not of the same history."""
        if self.file is None:
            return None
        found = next(self._lines, None)
        name = self.file.path.name
        if found is None:
            raise InputError(
                f"{name} ends before line {number}, expected as many lines as {self.path.name} has"
            )
        times, items = found.split(), line.split()
        if len(times) != len(items) or times[:1] != items[:1]:
            raise InputError(
                f"{name}, line {number}: user {' '.join(times[:1])!r} with {max(len(times) - 1, 0)} times, "
                f"expected user {' '.join(items[:1])!r} with {max(len(items) - 1, 0)} as in {self.path.name}"
            )
        return times[1:]

    def finish(self) -> dict[str, Any]:
        """Return the provenance of the times; raise `InputError` if they go on."""
        if self.file is None:
            return {}
        if next(self._lines, None) is not None:
            raise InputError(
                f"{self.file.path.name} has more lines than {self.path.name}, expected the same number"
            )
        return {"time_file": self.file.path.name, "time_sha256": self.file.sha256}


def _histories(table: _Table, blocks: Iterator[Block], twin: _Twin) -> None:
    """Append lines of a user and their items in time order."""
    users: set[str] = set()
    for block in blocks:
        text = _decoded(block.data)[0]
        batch = Batch(valid=0)
        for number, line in enumerate(text.removesuffix("\n").split("\n"), block.first_line):
            times = twin.times(number, line)
            user, *items = line.split() or [""]
            wrong = _not_utf8(number, line) or _bad_history(number, line, user in users, times)
            if not line.strip() or wrong is not None:
                batch.bad += [wrong] if line.strip() and wrong is not None else []
                continue
            users.add(user)
            batch.lines += [number] * len(items)
            batch.user += [user] * len(items)
            batch.item += items
            batch.rating += [None] * len(items)
            batch.time += times or [None] * len(items)
            batch.valid = (batch.valid or 0) + 1
            if len(batch.lines) >= ROWS_HELD:
                table.append(batch)
                batch = Batch(valid=0)
        table.append(batch)


def _bad_history(number: int, line: str, known: bool, times: list[str] | None) -> Bad | None:
    """Return what is wrong with a history; one with a bad time is bad as a whole."""
    user, *items = line.split() or [""]
    if not items:
        detail = f"the line is {line[:80]!r}, expected a user and their items"
        return Bad(number, "number of fields", detail, line)
    if known:
        detail = f"user {user!r} has a second line, expected one line per user (is it format pair-per-line?)"
        return Bad(number, "user on a second line", detail, line)
    wrong = next((time for time in times or [] if not is_time(time)), None)
    if wrong is not None:
        return _explained(number, "timestamp out of range", {"time": wrong, "user": user}, 1)
    return None


# ---- Parquet ------------------------------------------------------------------------------------------


def _read_parquet(table: _Table, path: Path, columns: dict[str, str] | None) -> None:
    """Append the rows of exactly this file."""
    import duckdb

    # A link with a plain name: the database takes *, ? and [ in a path for a pattern, and name=value for a
    # partition.
    link = table.folder / "file.parquet"
    link.symlink_to(path.resolve())
    place = _text(re.sub(r"([*?[])", r"[\1]", str(link)))
    source = f"read_parquet({place}, hive_partitioning = false)"
    try:
        kinds = [row[1] for row in table.con.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
        schema = table.con.execute(f"SELECT name, num_children FROM parquet_schema({place})").fetchall()
        names = _top_level(schema)
        chosen = choose_columns(path, names, columns)
        values = ", ".join(
            _parquet_column(table, path, names, kinds, what, chosen.get(what)) for what in FOUR
        )
        renamed = f"(SELECT * FROM {source}) AS t({', '.join(f'c{n}' for n in range(len(names)))})"
        numbered = f"SELECT row_number() OVER () AS line, {values} FROM {renamed}"
        size = table.con.execute(f"SELECT count(*) FROM {source}").fetchone()
        table.take(f"SELECT *, line - 1 AS row FROM ({numbered})", size[0] if size else 0, Batch())
    except (duckdb.OutOfMemoryException, duckdb.InterruptException):
        raise
    except duckdb.Error as error:
        line = str(error).splitlines()[0].replace(str(link), path.name)
        if "space left" in line:
            raise
        raise InputError(f"{path.name} is not a whole Parquet file: {line}") from None


def _top_level(schema: list[tuple[str, int | None]]) -> list[str]:
    """Return the names of the columns from a schema in which each group precedes its children."""
    names: list[str] = []
    inside: list[int] = []  # children that are still to come, of each group that is open
    for name, children in schema:
        if len(inside) == 1:
            names.append(name)
        if inside:
            inside[-1] -= 1
        inside.append(children or 0)
        while inside and not inside[-1]:
            inside.pop()
    return names


def _parquet_column(
    table: _Table, path: Path, names: list[str], kinds: list[str], what: str, column: str | None
) -> str:
    """Return what `_checked` takes, in SQL; raise `InputError` for a column of a type that cannot hold it."""
    if column is None or column.startswith("#"):
        table.order = table.order or what == "time"
        return f"CAST(NULL AS VARCHAR) AS {what}" + (", CAST(0 AS BIGINT) AS us" if what == "time" else "")
    place = names.index(column)
    kind, value = kinds[place], f"c{place}"
    if what == "time" and (kind.startswith("TIMESTAMP") or kind == "DATE"):
        return f"CAST({value} AS VARCHAR) AS time, if(isfinite({value}), epoch_us({value}), NULL) AS us"
    allowed = _IDS if what in ("user", "item") else _NUMBERS
    if not kind.startswith(allowed) or kind.endswith("]"):
        wanted = "text or numbers" if what != "time" else "numbers, text or timestamps"
        raise InputError(f"{path.name}: column {column!r} for {what} is of type {kind}, expected {wanted}")
    text = f"CAST({value} AS VARCHAR)"
    if kind in ("FLOAT", "DOUBLE"):  # a missing number of pandas
        text = f"CASE WHEN isnan({value}) THEN NULL ELSE {text} END"
    return f'{text} AS "{what}"' + (", CAST(NULL AS BIGINT) AS us" if what == "time" else "")
