"""Reads a file of any format into the table `raw` of a DuckDB connection, out of core; bad lines are counted.

A reader cuts its file into user, item, rating and time: `_fields` for separated fields, `_json` for JSON
lines, `_histories` for one user a line. DuckDB alone then decides, in one query (`_checked`), which of them
are valid and what their times are; the columns of a Parquet file go through the same query. So a line means
the same wherever it stands in a file and whichever format it is written in.

Times are kept to the microsecond. A number is seconds, milliseconds, microseconds or nanoseconds since 1970,
whichever lies between 1990 and 2100; text is a date like 2019-03-04 12:00:00, with an offset or in UTC.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import operator
import re
import sys
import tempfile
from collections import Counter, defaultdict
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

READING_VERSION = 3  # raise whenever the same file would give other interactions or another order

ROW_ORDER = "#row"  # as the column of time: the rows are in time order
NO_RATING = "#none"  # as the column of ratings: leave it out

ROWS_HELD = 100_000  # before they are appended

EXAMPLES, TEXT_LENGTH = 5, 120  # bad lines that are kept, and characters of each

# 1990-01-01 to 2100-01-01: no interaction of a public dataset lies outside. The units cannot be mixed up,
# since a time within the range in one lies outside in the others.
FIRST_SECOND, LAST_SECOND = 631_152_000, 4_102_444_800

UNITS = (1, 10**3, 10**6, 10**9)  # of numbers as times, in parts of a second

MICROSECONDS = {"s": 1_000_000, "ms": 1000, "us": 1}  # units that times are kept in

_DATE = (
    r"^\s*(\d{4})[-/](\d{1,2})[-/](\d{1,2})"
    r"(?:[T ]\s*(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?"
    r"\s*([AaPp][Mm])?\s*(?:[Zz]|UTC|GMT|([+-])(\d{2})(?::?(\d{2}))?)?)?\s*$"
)

_PARTS = ["y", "mo", "d", "h", "mi", "s", "f", "half", "sign", "zh", "zm"]

# Types of Parquet columns that can hold a rating or a time, and with UUID an id.
_NUMBER = r"U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(.*\)|VARCHAR|ENUM\(.*\)"

# Reason for which `_checked` rejects a row -> the field that is wrong, and what was expected.
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
    progress: Progress | None = None,
    sha256: str | None = None,
    work: Path | None = None,
) -> Ingested:
    """Create the table raw(row, "user", item, rating, time) from a file.

    `row` grows in the file's order; `rating` is NULL where unknown; `time` is in the unit that the result
    names, the coarsest that holds all times. `format` None is detected. `sha256` is the file's hash where it
    is known: then it is not computed again. `work` is a folder for temporary files. Raises `InputError` for
    what cannot be read, at the first bad line if `strict`, else where more than `max_rejected_share` of the
    lines are bad; the table is then not to be used.
    """
    format = format or named("auto", path, columns)
    # temporary: it is not written twice, to a log and to the file, and is spilled where memory ends
    con.execute(f"CREATE OR REPLACE TEMP TABLE raw({RAW_COLUMNS})")
    file = RawFile(path, sha256=sha256)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        table = _Table(con, path.name, Path(folder), strict, max_rejected_share)
        if formats.is_parquet(path):
            if format.kind != "table":
                raise InputError(
                    f"{path.name} is a Parquet file, expected format='table', not {format.name!r}"
                )
            _parquet(table, path, columns)
            about: dict[str, Any] = {"sha256": sha256 or system.file_sha256(path)}
            if progress is not None:
                progress(file.size, file.size)
        else:
            about = _text(table, file, format, columns, progress)
            about["sha256"] = file.sha256
    table.finish()
    side = formats.titles_beside(path)
    about = {"file": printable(path.name), "bytes": file.size, "format": format.name, **about}
    if side is not None:
        about["titles"] = side.name
    return Ingested(
        _number_positions(con) if table.order else _coarsest_unit(con),
        about,
        table.lines,
        dict(table.rejected),
        table.examples,
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
    con.execute("""CREATE OR REPLACE TEMP TABLE raw AS SELECT row, "user", item, rating,
        row_number() OVER (PARTITION BY "user" ORDER BY row) - 1 AS time FROM raw ORDER BY row""")
    return "order"


# ---- which rows are valid: one query for all formats ------------------------------------------------------


class Bad(NamedTuple):
    """A line that is no valid interaction, or several alike of which it is the first."""

    line: int
    reason: str  # under which it is counted
    detail: str  # for the error and the examples
    text: str
    lines: int = 1


@dataclass
class Batch:
    """Rows as a reader has cut them, and the lines that are no rows."""

    lines: list[int] = field(default_factory=list)  # number of each row's line
    # user, item, rating or time -> text, numbers or None; one that is missing is unknown in all rows
    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    bad: list[Bad] = field(default_factory=list)
    extra: int = 0  # rows beyond one a line


class _Table:
    """Appends the valid rows of batches to `raw`, counts the others, and stops at too many of them."""

    def __init__(
        self, con: duckdb.DuckDBPyConnection, name: str, folder: Path, strict: bool, max_share: float
    ) -> None:
        self.con, self.name, self.strict, self.max_share = con, name, strict, max_share
        self.folder = folder  # for temporary files
        self.order = False  # whether there are no times, only an order
        self.header: tuple[str, str] | None = None  # user's and item's field in the header line
        self.held = Batch()
        self.rows = 0  # seen, rejected ones included
        self.valid = 0  # lines
        self.rejected: Counter[str] = Counter()  # reason -> lines
        self.examples: list[dict[str, Any]] = []

    @property
    def lines(self) -> int:
        """Lines read, rejected ones included."""
        return self.valid + self.rejected.total()

    @property
    def us(self) -> str:
        """The known time of a row, in SQL: where there is only an order, any."""
        return f"CAST({0 if self.order else 'NULL'} AS BIGINT) AS us"

    def append(self, batch: Batch) -> None:
        """Append rows that a reader has cut; few are held until there are more."""
        held = self.held
        held.lines += batch.lines
        held.bad += batch.bad
        held.extra += batch.extra
        for name, values in batch.columns.items():
            held.columns[name] += values
        if len(held.lines) >= ROWS_HELD or held.bad:
            self.flush()

    def flush(self) -> None:
        """Append the rows that are held."""
        batch, self.held = self.held, Batch()
        size = len(batch.lines)
        columns = {"line": np.array(batch.lines, np.int64), "row": np.arange(self.rows, self.rows + size)}
        casts = []
        for name in FOUR:
            columns[name], kind = _column(batch.columns[name] or [None] * size)
            casts.append(f'CAST("{name}" AS {kind}) AS "{name}"')
        self.con.register("batch", columns)
        try:
            self.take(f"SELECT row, line, {', '.join(casts)}, {self.us} FROM batch", size, batch)
        finally:
            self.con.unregister("batch")

    def append_lines(self, text: str, first: int, layout: Layout) -> bool:
        """Append lines without quotation marks, several times as fast; False where it cannot.

        The database cuts them here, which it does as `_fields` except that it takes a CR for a line end,
        skips blank lines and a mark of byte order, and passes over an empty field too much.
        """
        import duckdb

        separator, names = layout.separator, [f"c{n}" for n in range(len(layout.names))]
        lines = text.count("\n") + (not text.endswith("\n"))
        odd = ("\r", "\n\n", "\0", separator * 2 if len(separator) > 1 else "\0")
        if text.startswith(("\n", "\ufeff")) or any(sign in text for sign in odd):
            return False
        if text.count(separator) != lines * (len(names) - 1):
            return False
        self.flush()
        file = self.folder / "lines"
        file.write_text(text, encoding="utf-8", newline="")
        given = {what: names[place] for what, place in layout.position.items()}
        fields = ", ".join(f'{given.get(what, "NULL")} AS "{what}"' for what in FOUR)
        source = f"""SELECT number + {self.rows - 1} AS row, number + {first - 1} AS line, {fields}, {self.us}
            FROM (SELECT row_number() OVER () AS number, * FROM read_csv({_literal(str(file))},
                columns = {dict.fromkeys(names, "VARCHAR")}, force_not_null = {names}, header = false,
                delim = {_literal(separator)}, quote = '', escape = '', auto_detect = false,
                parallel = false))"""
        try:
            self.take(source, lines, Batch())
        except (duckdb.InvalidInputException, duckdb.ConversionException):
            return False
        return True

    def take(self, source: str, size: int, batch: Batch) -> None:
        """Append what is valid of a query of `size` rows (see `_checked`), and count the rest.

        Raises `InputError` at the first bad line if strict, and where no line at all is valid.
        """
        query = _checked(source, order=self.order, header=self.header)
        insert = f'INSERT INTO raw SELECT row, "user", item, stars, us FROM ({query}) WHERE reason IS NULL'
        row = self.con.execute(insert).fetchone() if size else None
        taken = row[0] if row else 0
        self.rows += size
        if taken < size:
            first = 'arg_min(("user", item, rating, time), line)'
            counts = f"SELECT reason, count(*), min(line), {first} FROM ({query}) WHERE reason IS NOT NULL"
            for reason, count, line, values in self.con.execute(f"{counts} GROUP BY reason").fetchall():
                batch.bad.append(_explained(line, reason, dict(zip(FOUR, values, strict=True)), count))
        batch.bad.sort()
        if batch.bad and self.strict:
            raise InputError(f"{self.name}, line {batch.bad[0].line}: {batch.bad[0].detail}")
        self.valid += taken - batch.extra
        for bad in batch.bad:
            self.rejected[bad.reason] += bad.lines
            if len(self.examples) < EXAMPLES:
                text = bad.text[:TEXT_LENGTH].encode("utf-8", "backslashreplace").decode()
                self.examples.append({"line": bad.line, "reason": bad.detail, "text": text})
        if not self.valid and self.rejected:
            self._stop()

    def finish(self) -> None:
        """Raise `InputError` if too many lines are bad, or if there are none."""
        if not self.lines:
            raise InputError(f"{self.name} has a header and nothing below it")
        if self.rejected.total() > self.max_share * self.lines:
            self._stop()

    def _stop(self) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())
        first = "; ".join(f"{self.name}, line {one['line']}: {one['reason']}" for one in self.examples[:3])
        raise InputError(
            f"{self.name}: {self.rejected.total():,} of {self.lines:,} lines rejected, allowed is a share of "
            f"{self.max_share:g} (max_rejected_share): {reasons}; {first}"
        )


def _checked(source: str, *, order: bool, header: tuple[str, str] | None = None) -> str:
    """Return the query of row, line, user, item, rating, time, stars, us and reason, which is NULL if valid.

    `source` gives row, line, "user" and item as text, rating and time as text or numbers, and the time in
    microseconds in `us` where it is known.
    """
    factors = ("* 1e6", "* 1e3", "", "/ 1e3")  # to microseconds
    numbers = " ".join(
        f"WHEN number >= {FIRST_SECOND * size} AND number < {LAST_SECOND * size} "
        f"THEN CAST(round(number {factor}) AS BIGINT)"
        for size, factor in zip(UNITS, factors, strict=True)
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
        same = f'"user" = {_literal(header[0])} AND item = {_literal(header[1])}'
        again = f"WHEN {same} THEN 'header line again'"
    bad_time = f"""
        WHEN us IS NULL AND coalesce(trim(CAST(time AS VARCHAR)), '') = '' THEN 'timestamp missing'
        WHEN us IS NULL AND (number IS NULL OR NOT isfinite(number)) THEN 'timestamp not a number or date'
        WHEN us IS NULL OR us < {FIRST_SECOND}000000 OR us >= {LAST_SECOND}000000
        THEN 'timestamp out of range'"""
    broken = r"'[\t\r\n\x00]'"  # what no id may hold
    return f"""
        SELECT *, CASE
            WHEN coalesce("user", '') = '' THEN 'user empty'
            WHEN coalesce(item, '') = '' THEN 'item empty'
            {again}
            WHEN regexp_matches("user", {broken}) THEN 'user with a line break or TAB'
            WHEN regexp_matches(item, {broken}) THEN 'item with a line break or TAB'
            WHEN (stars IS NULL OR NOT isfinite(stars)) AND trim(CAST(rating AS VARCHAR)) <> ''
            THEN 'rating not a number'
            {"" if order else bad_time} END AS reason
        FROM (SELECT * EXCLUDE (us, p), CASE
                WHEN us IS NOT NULL THEN us WHEN p IS NULL THEN CASE {numbers} END
                WHEN p.y <> '' THEN {date} END AS us
            FROM (SELECT *, CASE WHEN us IS NULL AND number IS NULL THEN
                    regexp_extract(CAST(time AS VARCHAR), {_literal(_DATE)}, {_PARTS}) END AS p
                FROM (SELECT *, try_cast(time AS DOUBLE) AS number, try_cast(rating AS DOUBLE) AS stars
                    FROM ({source}))))"""


def is_time(text: str) -> bool:
    """Return whether a field looks like a time: a number of a possible size, or a date."""
    if formats.is_number(text):
        return any(FIRST_SECOND * size <= float(text) < LAST_SECOND * size for size in UNITS)
    return re.match(_DATE, text) is not None


def _explained(line: int, reason: str, row: dict[str, Any], count: int) -> Bad:
    what, expected = _EXPECTED[reason]
    shown = ",".join(str(row[name]) for name in FOUR if row.get(name) is not None)
    name = {"time": "timestamp"}.get(what, what)
    return Bad(line, reason, f"{name} is {str(row[what] or '')[:80]!r}, expected {expected}", shown, count)


def _column(values: list[Any]) -> tuple[np.ndarray, str]:
    """Return an array for the database and its type: numbers stay numbers, all else is text."""
    kinds = set(map(type, values))
    with contextlib.suppress(OverflowError):
        for kind, dtype, name in ((int, np.int64, "BIGINT"), (float, np.float64, "DOUBLE")):
            if kinds == {kind}:
                return np.array(values, dtype), name
    texts = values if kinds <= {str} else [None if value is None else str(value) for value in values]
    return np.array(texts, dtype=object), "VARCHAR"


def _literal(text: str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


# ---- columns ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the fields are in this very file."""

    separator: str
    names: tuple[str, ...]  # of all columns, in the file's order
    position: dict[str, int]  # user, item, time, rating -> column
    header: tuple[str, ...] | None  # fields of the first line where that is a header
    quoted: bool  # whether a quotation mark at the start of a field opens it


def _layout(path: Path, format: Format, columns: dict[str, str] | None, lines: list[str]) -> Layout:
    """Find the fields of a text file from its first lines; raise `InputError` that names the columns."""
    first = lines[0]
    if format.kind == "table":
        return _table_layout(path, columns, lines)
    separator = format.separator or ("\t" if "\t" in first else " ")
    if format.fields:
        position = {name: n for n, name in enumerate(format.fields)}
        return Layout(separator, format.fields, position, None, separator == ",")
    header = [name.strip('"') for name in first.split(separator)]
    names = [name.split(":")[0] for name in header]
    wanted = dict(zip(FOUR, format.names, strict=True))
    if missing := [name for what, name in wanted.items() if name not in names and what != "rating"]:
        raise InputError(
            f"{path.name}, line 1: header is {first[:80]!r}, expected {_named(separator)}-separated columns "
            f"that include {', '.join(missing)}"
        )
    position = {what: names.index(name) for what, name in wanted.items() if name in names}
    return Layout(separator, tuple(names), position, tuple(header), separator == ",")


def _table_layout(path: Path, columns: dict[str, str] | None, lines: list[str]) -> Layout:
    separator = separator_of(lines[0])
    if separator not in lines[0]:
        raise InputError(f"{path.name}, line 1: no comma, TAB, semicolon or bar in {lines[0][:80]!r}")
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
    if by_position:  # a header has no number for an id, and lacks what all rows have: a time, else numbers
        ids = [values[chosen[what]] for what in ("user", "item")]
        headed = headed or all(column and all(map(formats.is_number, column)) for column in ids)
        if "time" in position:
            headed = not is_time(first[position["time"]]) and any(map(is_time, values[chosen["time"]]))
        headed = headed and not any(formats.is_number(first[position[what]]) for what in ("user", "item"))
    return Layout(separator, tuple(names), position, tuple(first) if headed else None, quoted=True)


def choose_columns(
    path: Path, names: list[str], columns: dict[str, str] | None, values: dict[str, list[str]] | None = None
) -> dict[str, str]:
    """Return what -> column: as the user says, else by obvious names; raise `InputError` if unclear.

    A column of ratings is optional: one that is only obvious is left out where none of its `values`, those
    at the file's beginning, is a number.
    """
    option = f"give columns user=NAME,item=NAME,time=NAME (time={ROW_ORDER}: the rows are in time order)"
    listed = f"columns found: {', '.join(names)[:300]}"
    chosen = dict(columns or {})
    if unknown := sorted(set(chosen) - set(OBVIOUS)):
        raise InputError(f"parameter 'columns' has {', '.join(unknown)}, expected {', '.join(OBVIOUS)}")
    for what, column in chosen.items():
        if column not in names and (what, column) not in (("time", ROW_ORDER), ("rating", NO_RATING)):
            raise InputError(f"{path.name}: no column {column!r} for {what}; {listed}")
        if names.count(column) > 1:
            raise InputError(f"{path.name}: {names.count(column)} columns are called {column!r}; {listed}")
        if list(chosen.values()).count(column) > 1:
            raise InputError(f"parameter 'columns' names {column!r} twice, expected one column for each")
    for what in (what for what in OBVIOUS if what not in chosen):
        fits = formats.obvious(what, names)
        if what == "rating":
            seen = [value for value in (values or {}).get(fits[0] if fits else "", []) if value.strip()]
            if len(fits) == 1 and (not seen or any(map(formats.is_number, seen))):
                chosen[what] = fits[0]
        elif len(fits) == 1:
            chosen[what] = fits[0]
        else:
            problem = f"{what} may be {' or '.join(fits)}" if fits else f"no column is clearly the {what}"
            raise InputError(f"{path.name}: {problem}; {option}; {listed}")
    return chosen


# ---- text ---------------------------------------------------------------------------------------------


def _text(
    table: _Table, file: RawFile, format: Format, columns: dict[str, str] | None, progress: Progress | None
) -> dict[str, Any]:
    """Append what a text file holds; return what was learned about the file."""
    about: dict[str, Any] = {}
    lines = formats.sample(file.path)
    blocks = _whole(file, format, progress)
    if format.kind == "json" or (format.kind == "table" and lines[0].lstrip().startswith("{")):
        names = dict(zip(FOUR, format.names, strict=False)) or _json_columns(file.path, columns, lines)
        table.order = names.get("time") == ROW_ORDER
        _json(table, blocks, names)
    elif format.kind == "sequences":
        about = _histories(table, blocks, file.path)
    else:
        layout = _layout(file.path, format, columns, lines)
        table.order = "time" not in layout.position
        if layout.header is not None:
            table.header = (layout.header[layout.position["user"]], layout.header[layout.position["item"]])
        # GroupLens wrote its first sets in Latin-1
        latin = format.separator == "::" and "\ufffd" in "".join(lines)
        _fields(table, blocks, layout, "latin-1" if latin else "utf-8")
    table.flush()
    return about


def _whole(file: RawFile, format: Format, progress: Progress | None) -> Iterator[Block]:
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


def _lines_of(block: Block, encoding: str = "utf-8") -> list[str]:
    """Return the lines of a block, with surrogates for bytes that are not of the encoding."""
    return block.data.decode(encoding, "surrogateescape").removesuffix("\n").split("\n")


def _not_utf8(line: int, text: str) -> Bad | None:
    """Return what is wrong where decoding with surrogate escapes met bytes that are not UTF-8."""
    byte = None if text.isascii() else re.search("[\udc80-\udcff]", text)
    if byte is None:
        return None
    return Bad(line, "not UTF-8", f"byte {ord(byte.group()) - 0xDC00:#04x} is not UTF-8 text", text)


def _named(separator: str) -> str:
    return {"\t": "TAB", " ": "spaces"}.get(separator, f"'{separator}'")


def _fields(table: _Table, blocks: Iterator[Block], layout: Layout, encoding: str) -> None:
    """Append lines of separated fields."""
    width = len(layout.names)
    headed = layout.header is not None
    held: list[str] = []  # lines of a record that goes on in the next block
    first = 1  # number of the first line at hand
    for block in itertools.chain(blocks, [None]):
        lines = held
        if block is not None:
            first = block.first_line - len(held)
            if not (held or (layout.quoted and b'"' in block.data)):
                with contextlib.suppress(UnicodeDecodeError):
                    text = block.data.decode(encoding)
                    start = text.find("\n") + 1 if headed else 0
                    if (start or not headed) and table.append_lines(text[start:], first + headed, layout):
                        headed = False
                        continue
            lines = held + _lines_of(block, encoding)
        batch = Batch()
        if layout.quoted and (held or block is None or b'"' in block.data or b"\r" in block.data):
            records, held = _records(lines, first, layout, block is None, batch.bad)
        else:
            records = [(number, line.split(layout.separator)) for number, line in enumerate(lines, first)]
        if sum(map(len, held)) > formats.MAX_LINE_BYTES:
            raise InputError(
                f"{table.name}, line {first + len(lines) - len(held)}: a quotation mark that opens here is "
                f"not closed within {formats.MAX_LINE_BYTES:,} bytes"
            )
        clean = all(len(row) == width for _, row in records) and (block is None or block.data.isascii())
        if not clean:
            records = [record for record in records if _is_row(*record, layout, batch.bad)]
        if headed and records:
            headed, records = False, records[1:]
        batch.lines = [number for number, _ in records]
        for what, place in layout.position.items():
            batch.columns[what] = [row[place] for _, row in records]
        table.append(batch)


def _is_row(number: int, row: list[str], layout: Layout, bad: list[Bad]) -> bool:
    """Return whether there are as many fields as columns and only UTF-8; else add to `bad`, unless blank."""
    whole = layout.separator.join(row)
    if len(row) == 1 and not whole.strip():  # a blank line in a file made by hand is no mistake
        return False
    wrong = _not_utf8(number, whole)
    if wrong is None and len(row) != len(layout.names):
        detail = (
            f"{len(row)} fields, expected {len(layout.names)} separated by {_named(layout.separator)} "
            f"({', '.join(layout.names)[:100]}); the line is {whole[:80]!r}"
        )
        wrong = Bad(number, "number of fields", detail, whole, 1 + whole.count("\n"))
    bad += [] if wrong is None else [wrong]
    return wrong is None


def _records(
    lines: list[str], first: int, layout: Layout, last: bool, bad: list[Bad]
) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Cut lines whose fields may be quoted; return each record's line and fields, and lines left over.

    A quotation mark opens a field at the field's start only; elsewhere it is a character like others. Where
    a quoted field would hold a line that is a whole interaction, its mark was never closed: the lines before
    that one are bad. Lines left over begin a record that the next block may end (not in the `last` one).
    """
    records: list[tuple[int, list[str]]] = []
    start, ran_out = 0, False
    csv.field_size_limit(sys.maxsize)  # lines are bounded, and a field may hold a whole review

    def feed(begin: int) -> Iterator[str]:
        nonlocal ran_out
        for number in range(begin, len(lines)):
            yield lines[number] + "\n"
        ran_out = True

    while start < len(lines):
        reader = csv.reader(feed(start), delimiter=layout.separator)
        try:
            fields = next(reader)
        except csv.Error:
            end = start + reader.line_num
            detail = f"a carriage return within the line {lines[end - 1][:80]!r}"
            bad.append(Bad(first + start, "carriage return", detail, lines[end - 1], reader.line_num))
            start = end
            continue
        end = start + reader.line_num
        inside = next((n for n in range(start + 1, end) if _is_interaction(lines[n], layout)), None)
        if ran_out and inside is None and not last:
            return records, lines[start:]
        if ran_out or inside is not None:
            detail, end = "a quotation mark that opens a field here is never closed", inside or end
            bad.append(Bad(first + start, "quotation mark never closed", detail, lines[start], end - start))
        else:
            records.append((first + start, fields or [""]))
        start, ran_out = end, False
    return records, []


def _is_interaction(line: str, layout: Layout) -> bool:
    """Return whether a line is a whole interaction by itself."""
    fields = line.split(layout.separator)
    if len(fields) != len(layout.names) or not all(fields[layout.position[w]] for w in ("user", "item")):
        return False
    if "time" not in layout.position:
        return layout.separator == "\t"  # commas occur in any text
    return is_time(fields[layout.position["time"]])


def _json_columns(path: Path, columns: dict[str, str] | None, lines: list[str]) -> dict[str, str]:
    """Return what -> key of the user's own JSON lines."""
    values: dict[str, list[str]] = {}
    for read in formats.json_objects(lines):
        for key, value in read.items():
            values.setdefault(key, []).append("" if value is None else str(value))
    return choose_columns(path, list(values), columns, values)


def _json(table: _Table, blocks: Iterator[Block], names: dict[str, str]) -> None:
    """Append JSON lines: build the four fields and pass over all others."""
    number, rating = int | float | str | None, float | str | None
    kinds: dict[str, Any] = {"user": str | int, "item": str | int, "time": number, "rating": rating}
    used = [what for what in kinds if what in names and not names[what].startswith("#")]
    fields: list[Any] = []
    for what in used:
        options = {"default": None} if what == "rating" else {}
        fields.append((what, kinds[what], msgspec.field(name=names[what], **options)))
    decoder = msgspec.json.Decoder(msgspec.defstruct("Line", fields, gc=False))
    for block in blocks:
        batch, read = Batch(), list[Any]()
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            block.data.decode()  # the decoder takes any bytes in fields that it passes over
            read = decoder.decode_lines(block.data)
        if len(read) == _objects(block.data):
            batch.lines = list(range(block.first_line, block.first_line + len(read)))
        else:  # line by line, by the same decoder
            read = []
            for place, line in enumerate(_lines_of(block), block.first_line):
                wrong = _not_utf8(place, line)
                if wrong is None and line.strip():  # a blank line is no mistake
                    try:
                        read.append(decoder.decode(line))
                        batch.lines.append(place)
                    except msgspec.DecodeError as error:
                        wrong = _bad_json(place, line, error)
                batch.bad += [] if wrong is None else [wrong]
        for what in used:
            batch.columns[what] = list(map(operator.attrgetter(what), read))
        for what in ("user", "item"):
            batch.columns[what] = list(map(str, batch.columns[what]))
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


def _bad_json(number: int, text: str, error: msgspec.DecodeError) -> Bad:
    if not isinstance(error, msgspec.ValidationError):
        return Bad(number, "not JSON", f"not a whole JSON object: {error}", text)
    reason = "field missing" if "missing required" in str(error) else "field of another type"
    return Bad(number, reason, str(error), text)


# ---- one user a line ----------------------------------------------------------------------------------

ITEMS, TIMES = "_item_org_rank.txt", "_time_org_rank.txt"


def twin(path: Path) -> Path | None:
    """Return the file of times that belongs to a file of items, None where there is none.

    TiCoSeRec's `X_item_org_rank.txt` has a twin `X_time_org_rank.txt` with the times of the same
    interactions; where it lies beside, they are read.
    """
    plain = path.name.removesuffix(".gz")
    beside = path.with_name(plain.removesuffix(ITEMS) + TIMES)
    places = (beside, beside.with_name(beside.name + ".gz")) if plain.endswith(ITEMS) else ()
    return next((place for place in places if place.is_file()), None)


def _histories(table: _Table, blocks: Iterator[Block], path: Path) -> dict[str, Any]:
    """Append lines of a user and their items in time order; a line with a bad time is bad as a whole.

    Returns the provenance of the times. Raises `InputError` where their file has other histories.
    """
    beside = twin(path)
    file = None if beside is None else RawFile(beside)
    others = iter(()) if file is None else (line for block in file.blocks() for line in _lines_of(block))
    table.order = file is None
    users: set[str] = set()
    for block in blocks:
        batch = Batch()
        for number, line in enumerate(_lines_of(block), block.first_line):
            user, *items = line.split() or [""]
            times: list[str] = []
            if file is not None:
                other = next(others, None)
                if other is None:
                    raise InputError(
                        f"{file.path.name} ends before line {number}, expected as many lines as in "
                        f"{path.name}"
                    )
                name, *times = other.split() or [""]
                if (name, len(times)) != (user, len(items)):
                    raise InputError(
                        f"{file.path.name}, line {number}: user {name!r} with {len(times)} times, expected "
                        f"user {user!r} with {len(items)} as in {path.name}"
                    )
            if not line.strip():
                continue
            wrong, bad_time = _not_utf8(number, line), next((t for t in times if not is_time(t)), None)
            if wrong is None and not items:
                detail = f"the line is {line[:80]!r}, expected a user and their items"
                wrong = Bad(number, "number of fields", detail, line)
            elif wrong is None and user in users:
                detail = f"user {user!r} has a second line, expected one line per user"
                detail += " (is it format pair-per-line?)"
                wrong = Bad(number, "user on a second line", detail, line)
            elif wrong is None and bad_time is not None:
                wrong = _explained(number, "timestamp out of range", {"time": bad_time, "user": user}, 1)
            if wrong is not None:
                batch.bad.append(wrong)
                continue
            users.add(user)
            batch.lines += [number] * len(items)
            batch.columns["user"] += [user] * len(items)
            batch.columns["item"] += items
            batch.columns["time"] += times
            batch.extra += len(items) - 1
        table.append(batch)
    if file is None:
        return {}
    if next(others, None) is not None:
        raise InputError(f"{file.path.name} has more lines than {path.name}, expected the same number")
    return {"time_file": file.path.name, "time_sha256": file.sha256}


# ---- Parquet ------------------------------------------------------------------------------------------


def _parquet(table: _Table, path: Path, columns: dict[str, str] | None) -> None:
    """Append the rows of exactly this file."""
    import duckdb

    # A link with a plain name: the database takes *, ? and [ in a path for a pattern, and name=value for a
    # partition.
    link = table.folder / "file.parquet"
    link.symlink_to(path.resolve())
    place = _literal(re.sub(r"([*?[])", r"[\1]", str(link)))
    source = f"read_parquet({place}, hive_partitioning = false)"
    try:
        kinds = [row[1] for row in table.con.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
        schema = table.con.execute(f"SELECT name, num_children FROM parquet_schema({place})").fetchall()
        names = _top_level(schema)
        renamed = f"(SELECT * FROM {source}) AS t({', '.join(f'c{n}' for n in range(len(names)))})"
        some: dict[str, list[str]] = {}  # ratings at the file's beginning
        for name in formats.obvious("rating", names):
            query = f"SELECT coalesce(CAST(c{names.index(name)} AS VARCHAR), '') FROM {renamed} LIMIT 1000"
            some[name] = [text for (text,) in table.con.execute(query).fetchall()]
        chosen = choose_columns(path, names, columns, some)
        table.order = chosen["time"] == ROW_ORDER
        values = []
        for what in FOUR:
            number = names.index(chosen[what]) if chosen.get(what, "#")[0] != "#" else None
            kind = "" if number is None else kinds[number]
            values.append(_parquet_value(path, what, chosen.get(what, ""), number, kind))
        stamped = "" if any(value.endswith("AS us") for value in values) else f", {table.us}"
        numbered = f"SELECT row_number() OVER () AS line, {', '.join(values)}{stamped} FROM {renamed}"
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


def _parquet_value(path: Path, what: str, column: str, number: int | None, kind: str) -> str:
    """Return what `_checked` takes, in SQL; raise `InputError` for a column of a type that cannot hold it."""
    value = f"c{number}"
    if number is None:
        return f"CAST(NULL AS VARCHAR) AS {what}"
    if what == "time" and (kind.startswith("TIMESTAMP") or kind == "DATE"):
        return f"CAST({value} AS VARCHAR) AS time, if(isfinite({value}), epoch_us({value}), NULL) AS us"
    if not re.fullmatch(f"UUID|{_NUMBER}" if what in ("user", "item") else _NUMBER, kind):
        wanted = "text or numbers" if what != "time" else "numbers, text or timestamps"
        raise InputError(f"{path.name}: column {column!r} for {what} is of type {kind}, expected {wanted}")
    text = f"CAST({value} AS VARCHAR)"
    if kind in ("FLOAT", "DOUBLE"):  # a missing number of pandas
        text = f"CASE WHEN isnan({value}) THEN NULL ELSE {text} END"
    return f'{text} AS "{what}"'
