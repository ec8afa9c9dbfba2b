"""Reads a file of any format into the table `raw` of a DuckDB connection, out of core; bad lines are counted.

A reader cuts its file into user, item and time: `_fields` for separated fields, `_json` for JSON
lines, `_histories` for one user a line, `_parquet` for columns. One query (`_checked`) then validates rows
and converts times, so that all formats follow the same rules.

Times have microseconds. A number is seconds, milliseconds, microseconds or nanoseconds since 1970, whichever
lies between 1990 and 2100; text is a date like 2019-03-04 12:00:00, with an offset or in UTC.
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
from reclib.config import DataConfig, InputError
from reclib.data import formats
from reclib.data.formats import ROLES, Block, Format, RawFile, named, separator_of

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection as Connection

RAW_COLUMNS = 'row BIGINT, "user" VARCHAR, item VARCHAR, time BIGINT'

READING_VERSION = 5  # raise whenever the same file would give other interactions or another order

ROW_ORDER = "#row"  # as the column of time: the rows are in time order

ROWS_HELD = 100_000  # rows collected before they are appended

SOURCE = (*ROLES, "width", "text")  # columns of a query of rows beside row and line: see `_checked`
BLANK = "blank line"  # not counted as a bad line

EXAMPLES, TEXT_LENGTH = 5, 120  # bad lines in the manifest, and characters of each

# 1990-01-01 to 2100-01-01, the range of public datasets. It determines the unit of a number, since a time
# within the range in one unit lies outside in the others.
FIRST_SECOND, LAST_SECOND = 631_152_000, 4_102_444_800

UNITS = (1, 10**3, 10**6, 10**9)  # of numbers as times, per second

MICROSECONDS = {"s": 1_000_000, "ms": 1000, "us": 1}  # per unit of the stored times

_DATE = (
    r"^\s*(\d{4})[-/](\d{1,2})[-/](\d{1,2})"
    r"(?:[T ]\s*(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?"
    r"\s*([AaPp][Mm])?\s*(?:[Zz]|UTC|GMT|([+-])(\d{2})(?::?(\d{2}))?)?)?\s*$"
)

_PARTS = ["y", "mo", "d", "h", "mi", "s", "f", "half", "sign", "zh", "zm"]

# Types of Parquet columns that can hold a time, and with UUID an id.
_NUMBER = r"U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL\(.*\)|VARCHAR|ENUM\(.*\)"

# Reason for which `_checked` rejects a row -> the wrong field, and the expected value.
_EXPECTED = {
    "user empty": ("user", "an id"),
    "item empty": ("item", "an id"),
    "user with a line break or TAB": ("user", "an id in one line"),
    "item with a line break or TAB": ("item", "an id in one line"),
    "timestamp missing": ("time", "a time"),
    "timestamp not a number or date": ("time", "a number or a date like 2019-03-04 12:00:00+01:00"),
    "timestamp out of range": ("time", "a time between 1990-01-01 and 2100-01-01"),
    "header line again": ("user", "an interaction, not the header line again"),
}

Progress = Callable[[int, int], None]  # bytes of the file done, and in all


@dataclass(frozen=True)
class Ingested:
    """Metadata of what was read into `raw`, for the manifest."""

    time_unit: str  # s, ms, us, or order: time is then the position in the user's history
    provenance: dict[str, Any]  # plain JSON: file, its sha256, bytes, format
    lines_read: int  # without a header; rows of a Parquet file
    rejected: dict[str, int]  # reason -> lines
    rejected_examples: list[dict[str, Any]]  # {"line": number, "reason": ..., "text": its beginning}
    titles: Callable[[Collection[str]], dict[str, str]]  # reads the titles of these items when called


def ingest(
    con: Connection,
    path: Path,
    format: Format | None = None,
    *,
    config: DataConfig,
    progress: Progress | None = None,
    sha256: str | None = None,
    work: Path | None = None,
) -> Ingested:
    """Create the table raw(row, "user", item, time) from a file.

    `row` increases in the file's order; `time` is in the coarsest unit that represents all times
    (`Ingested.time_unit`). `format` defaults to that of `config`, of which the reading options are used.
    `sha256` is the file's hash if known. `work` is a folder for temporary files. Raises `InputError` for
    unreadable files; the table must not be used then.
    """
    format = format or named(config, path)
    # temporary: not logged, and spilled to disk beyond the memory limit
    con.execute(f"CREATE OR REPLACE TEMP TABLE raw({RAW_COLUMNS})")
    file = RawFile(path, sha256=sha256, max_line_mb=config.max_line_mb)
    table = _Table(con, path.name, config)
    provenance = {"file": printable(path.name), "bytes": file.size, "format": format.name}
    if formats.is_parquet(path):
        if format.kind != "table":
            raise InputError(f"{path.name} is a Parquet file, expected format='table', not {format.name!r}")
        with tempfile.TemporaryDirectory(dir=work) as folder:
            _parquet(table, path, config.columns, Path(folder))
        provenance["sha256"] = sha256 or system.file_sha256(path)
        if progress is not None:
            progress(file.size, file.size)
    else:
        provenance |= _text(table, file, format, config, progress)
        provenance["sha256"] = file.sha256
    table.finish()
    side = formats.titles_beside(path)
    if side is not None:
        provenance["titles"] = side.name
    return Ingested(
        _number_positions(con) if table.order else _coarsest_unit(con),
        provenance,
        table.valid + table.rejected.total(),
        dict(table.rejected),
        table.examples,
        lambda items: {} if side is None else formats.read_titles(side, items),
    )


def printable(name: str) -> str:
    """Return a file's name with "_" for bytes that are not UTF-8."""
    return re.sub("[\udc80-\udcff]", "_", name)


def _coarsest_unit(con: Connection) -> str:
    """Convert microseconds to the coarsest unit without loss, and return it."""
    divisible = ", ".join(f"bool_and(time % {size} = 0)" for size in MICROSECONDS.values())
    row = con.execute(f"SELECT {divisible} FROM raw").fetchone() or ()
    unit, size = next(pair for pair, fits in zip(MICROSECONDS.items(), row, strict=True) if fits)
    if size > 1:
        con.execute(f"ALTER TABLE raw ALTER time SET DATA TYPE BIGINT USING time // {size}")
    return unit


def _number_positions(con: Connection) -> str:
    """Set time to the position in the user's history, from 0."""
    con.execute("""CREATE OR REPLACE TEMP TABLE raw AS SELECT row, "user", item,
        row_number() OVER (PARTITION BY "user" ORDER BY row) - 1 AS time FROM raw ORDER BY row""")
    return "order"


# ---- validation: one query for all formats ----------------------------------------------------------------


class Bad(NamedTuple):
    """A bad line, or the first of several with one reason."""

    line: int
    reason: str  # under which it is counted
    detail: str  # for the error and the examples
    text: str
    lines: int = 1


@dataclass
class Batch:
    """Rows that a reader has cut, and the lines that it could not cut."""

    lines: list[int] = field(default_factory=list)  # line number of each row
    # name in `SOURCE` -> text, numbers or None; a missing column is unknown in all rows
    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    bad: list[Bad] = field(default_factory=list)


class _Table:
    """Appends the valid rows of batches to `raw`, counts bad lines, and raises at too many of them."""

    def __init__(self, con: Connection, name: str, config: DataConfig) -> None:
        self.con, self.name, self.config = con, name, config
        self.order = False  # whether there are no times, only an order
        self.layout: Layout | None = None  # of separated fields
        self.base = 1  # number of the first line below a header
        self.pending = Batch()
        self.valid = 0  # lines
        self.rejected: Counter[str] = Counter()  # reason -> lines
        self.examples: list[dict[str, Any]] = []

    @property
    def us(self) -> str:
        """Initial value of the column `us`, in SQL: 0 without times, else NULL."""
        return f"CAST({0 if self.order else 'NULL'} AS BIGINT) AS us"

    def append(self, batch: Batch) -> None:
        """Append rows that a reader has cut, collecting small batches."""
        pending = self.pending
        pending.lines += batch.lines
        pending.bad += batch.bad
        for name, values in batch.columns.items():
            pending.columns[name] += values
        if len(pending.lines) >= ROWS_HELD or pending.bad:
            self.flush()

    def flush(self) -> None:
        """Append the collected rows."""
        batch, self.pending = self.pending, Batch()
        size = len(batch.lines)
        columns: dict[str, np.ndarray] = {"line": np.array(batch.lines, np.int64)}
        columns["row"] = np.array(batch.columns.pop("row", None) or columns["line"] - self.base)
        casts = []
        for name in SOURCE:
            kind = "VARCHAR"
            if batch.columns[name]:
                columns[name], kind = _column(batch.columns[name])
            value = f'"{name}"' if name in columns else "NULL"
            casts.append(f'CAST({value} AS {kind}) AS "{name}"')
        self.con.register("batch", columns)
        try:
            self.take(f"SELECT row, line, {', '.join(casts)}, {self.us} FROM batch", size, batch.bad)
        finally:
            self.con.unregister("batch")

    def append_lines(self, text: str, first: int, layout: Layout, bad: list[Bad]) -> None:
        """Append lines without quotation marks: the database cuts them, which is several times as fast."""
        self.flush()
        cut = f"string_split(text, {_literal(layout.separator)})"
        fields = {role: f"cut[{place + 1}]" for role, place in layout.position.items()}
        columns = ", ".join(f'{fields.get(role, "NULL")} AS "{role}"' for role in ROLES)
        source = f"""SELECT line - {self.base} AS row, line, {columns}, len(cut) AS width, text, {self.us}
            FROM (SELECT *, {cut} AS cut FROM (SELECT unnest(lines) AS text,
                generate_subscripts(lines, 1) + {first - 1} AS line
                FROM (SELECT string_split($text, chr(10)) AS lines)))"""
        self.take(source, text.count("\n") + 1, bad, {"text": text})

    def take(self, source: str, size: int, bad: list[Bad], values: dict[str, Any] | None = None) -> None:
        """Append the valid rows of a query of `size` rows (see `_checked`), and count the others.

        Raises `InputError` at the first bad line if strict, and after many bad lines without a valid one.
        """
        query = _checked(source, self.order, self.layout)
        insert = f'INSERT INTO raw SELECT row, "user", item, us FROM ({query}) WHERE reason IS NULL'
        (inserted,) = (self.con.execute(insert, values).fetchone() if size else None) or (0,)
        if inserted < size:
            counts = f"""SELECT reason, sum(coalesce(len(string_split(text, chr(10))), 1)), min(line),
                arg_min(checked, line)
                FROM ({query}) AS checked WHERE reason <> '{BLANK}' GROUP BY reason"""
            for reason, lines, first, row in self.con.execute(counts, values).fetchall():
                bad.append(_explained(first, reason, row, lines, self.layout))
        bad.sort()
        if bad and self.config.strict:
            raise InputError(f"{self.name}, line {bad[0].line}: {bad[0].detail}")
        self.valid += inserted
        for entry in bad:
            self.rejected[entry.reason] += entry.lines
            if len(self.examples) < EXAMPLES:
                text = entry.text[:TEXT_LENGTH].encode("utf-8", "backslashreplace").decode()
                self.examples.append({"line": entry.line, "reason": entry.detail, "text": text})
        if not self.valid and self.rejected.total() > ROWS_HELD:
            self._stop()

    def finish(self) -> None:
        """Raise `InputError` if too many lines are bad, or if there are none."""
        rejected = self.rejected.total()
        if not self.valid and not rejected:
            raise InputError(f"{self.name} has a header and nothing below it")
        if not self.valid or rejected > self.config.max_rejected_share * (self.valid + rejected):
            self._stop()

    def _stop(self) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())
        examples = "; ".join(f"{self.name}, line {row['line']}: {row['reason']}" for row in self.examples[:3])
        count = self.rejected.total()
        raise InputError(
            f"{self.name}: {count:,} of {self.valid + count:,} lines rejected, allowed is a share of "
            f"{self.config.max_rejected_share:g} (max_rejected_share): {reasons}; {examples}"
        )


def _checked(source: str, order: bool, layout: Layout | None) -> str:
    """Return a query that adds us and reason to the columns of `source`; reason is NULL if valid.

    `source` has row, line, the columns of `SOURCE` and us. "user" and item are text, time text or a
    number. For separated fields, width is their number and text the line where that is wrong. us is the time
    in microseconds where known.
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
    fields = repeated_header = ""
    if layout is not None:
        fields = f"""WHEN width <> {len(layout.names)} AND regexp_full_match(text, '\\s*') THEN '{BLANK}'
            WHEN width <> {len(layout.names)} THEN 'number of fields'"""
    if layout is not None and layout.header is not None:
        user, item = (_literal(layout.header[layout.position[role]]) for role in ("user", "item"))
        repeated_header = f"""WHEN "user" = {user} AND item = {item} THEN 'header line again'"""
    bad_time = f"""
        WHEN us IS NULL AND coalesce(trim(CAST(time AS VARCHAR)), '') = '' THEN 'timestamp missing'
        WHEN us IS NULL AND (number IS NULL OR NOT isfinite(number)) THEN 'timestamp not a number or date'
        WHEN us IS NULL OR us < {FIRST_SECOND}000000 OR us >= {LAST_SECOND}000000
        THEN 'timestamp out of range'"""
    broken = r"'[\t\r\n\x00]'"  # characters not allowed in ids
    return f"""
        SELECT *, CASE {fields}
            WHEN coalesce("user", '') = '' THEN 'user empty'
            WHEN coalesce(item, '') = '' THEN 'item empty'
            {repeated_header}
            WHEN regexp_matches("user", {broken}) THEN 'user with a line break or TAB'
            WHEN regexp_matches(item, {broken}) THEN 'item with a line break or TAB'
            {"" if order else bad_time} END AS reason
        FROM (SELECT * EXCLUDE (us, p), CASE
                WHEN us IS NOT NULL THEN us WHEN p IS NULL THEN CASE {numbers} END
                WHEN p.y <> '' THEN {date} END AS us
            FROM (SELECT *, CASE WHEN us IS NULL AND number IS NULL THEN
                    regexp_extract(CAST(time AS VARCHAR), {_literal(_DATE)}, {_PARTS}) END AS p
                FROM (SELECT *, try_cast(time AS DOUBLE) AS number FROM ({source}))))"""


def is_time(text: str) -> bool:
    """Return whether a field looks like a time: a number of a possible size, or a date."""
    if formats.is_number(text):
        return any(FIRST_SECOND * size <= float(text) < LAST_SECOND * size for size in UNITS)
    return re.match(_DATE, text) is not None


def _explained(line: int, reason: str, row: dict[str, Any], lines: int, layout: Layout | None) -> Bad:
    """Return the report on rows that `_checked` rejected for one reason, of which `row` is the first."""
    text = row.get("text") or ",".join(str(row[name]) for name in ROLES if row.get(name) is not None)
    if reason == "number of fields" and layout is not None:
        detail = (
            f"{row['width']} fields, expected {len(layout.names)} separated by "
            f"{_separator_name(layout.separator)} ({', '.join(layout.names)[:100]}); the line is "
            f"{text[:80]!r}"
        )
    else:
        role, expected = _EXPECTED[reason]
        name = {"time": "timestamp"}.get(role, role)
        detail = f"{name} is {str(row[role] or '')[:80]!r}, expected {expected}"
    return Bad(line, reason, detail, text, lines)


def _column(values: list[Any]) -> tuple[np.ndarray, str]:
    """Return an array for the database and its SQL type: a number type, or text for all other values."""
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
    """Positions of the fields in a file."""

    separator: str
    names: tuple[str, ...]  # of all columns, in the file's order
    position: dict[str, int]  # user, item, time -> column
    header: tuple[str, ...] | None  # fields of the first line where that is a header
    quoted: bool  # whether a quotation mark at the start of a field opens it


def _layout(path: Path, format: Format, columns: dict[str, str] | None, lines: list[str]) -> Layout:
    """Return the layout of a text file from its first lines; `InputError` names the missing columns."""
    first = lines[0]
    if format.kind == "table":
        return _table_layout(path, columns, lines)
    separator = format.separator or ("\t" if "\t" in first else " ")
    if format.fields:
        position = {name: n for n, name in enumerate(format.fields)}
        return Layout(separator, format.fields, position, None, separator == ",")
    header = [name.strip('"') for name in first.split(separator)]
    names = [name.split(":")[0] for name in header]
    expected = dict(zip(ROLES, format.names, strict=True))
    if missing := [name for name in expected.values() if name not in names]:
        raise InputError(
            f"{path.name}, line 1: header is {first[:80]!r}, expected {_separator_name(separator)}-separated "
            f"columns that include {', '.join(missing)}"
        )
    position = {role: names.index(name) for role, name in expected.items()}
    return Layout(separator, tuple(names), position, tuple(header), separator == ",")


def _table_layout(path: Path, columns: dict[str, str] | None, lines: list[str]) -> Layout:
    separator = separator_of(lines[0])
    if separator not in lines[0]:
        raise InputError(f"{path.name}, line 1: no comma, TAB, semicolon or bar in {lines[0][:80]!r}")
    try:
        first = next(csv.reader((line + "\n" for line in lines), delimiter=separator))
    except csv.Error:
        raise InputError(f"{path.name}, line 1: a carriage return within {lines[0][:80]!r}") from None
    selected = [column for column in (columns or {}).values() if not column.startswith("#")]
    by_position = bool(selected) and all(column.isdecimal() for column in selected)
    names = [str(n + 1) for n in range(len(first))] if by_position else first
    rows = [[field.strip('"') for field in line.split(separator)] for line in lines[1:]]
    values = {name: [row[n] for row in rows if len(row) == len(names)] for n, name in enumerate(names)}
    chosen = choose_columns(path, names, columns)
    position = {role: names.index(name) for role, name in chosen.items() if not name.startswith("#")}
    headed = not by_position or formats.is_header(first)
    if by_position:  # a header has no number as an id, and no time (or number) where all rows have one
        ids = [values[chosen[role]] for role in ("user", "item")]
        headed = headed or all(column and all(map(formats.is_number, column)) for column in ids)
        if "time" in position:
            headed = not is_time(first[position["time"]]) and any(map(is_time, values[chosen["time"]]))
        headed = headed and not any(formats.is_number(first[position[role]]) for role in ("user", "item"))
    return Layout(separator, tuple(names), position, tuple(first) if headed else None, quoted=True)


def choose_columns(path: Path, names: list[str], columns: dict[str, str] | None) -> dict[str, str]:
    """Return role -> column, from the user's `columns`, else by obvious names; `InputError` if unclear."""
    option = f"give columns user=NAME,item=NAME,time=NAME (time={ROW_ORDER}: the rows are in time order)"
    listed = f"columns found: {', '.join(names)[:300]}"
    chosen = dict(columns or {})
    if unknown := sorted(set(chosen) - set(ROLES)):
        raise InputError(f"parameter 'columns' has {', '.join(unknown)}, expected {', '.join(ROLES)}")
    for role, column in chosen.items():
        if column not in names and (role, column) != ("time", ROW_ORDER):
            raise InputError(f"{path.name}: no column {column!r} for {role}; {listed}")
        if names.count(column) > 1:
            raise InputError(f"{path.name}: {names.count(column)} columns are called {column!r}; {listed}")
        if list(chosen.values()).count(column) > 1:
            raise InputError(f"parameter 'columns' names {column!r} twice, expected one column for each")
    for role in (role for role in ROLES if role not in chosen):
        fits = formats.obvious(role, names)
        if len(fits) != 1:
            problem = f"{role} may be {' or '.join(fits)}" if fits else f"no column is clearly the {role}"
            raise InputError(f"{path.name}: {problem}; {option}; {listed}")
        chosen[role] = fits[0]
    return chosen


# ---- text ---------------------------------------------------------------------------------------------


def _text(
    table: _Table, file: RawFile, format: Format, config: DataConfig, progress: Progress | None
) -> dict[str, Any]:
    """Append the rows of a text file; return provenance of a second file, if there is one."""
    provenance: dict[str, Any] = {}
    lines = formats.sample(file.path, config.max_line_mb)
    blocks = _complete_blocks(file, format, progress)
    if format.kind == "json" or (format.kind == "table" and lines[0].lstrip().startswith("{")):
        names = dict(zip(ROLES, format.names, strict=False))
        names = names or _json_columns(file.path, config.columns, lines)
        table.order = names.get("time") == ROW_ORDER
        _json(table, blocks, names)
    elif format.kind == "sequences":
        provenance = _histories(table, blocks, file)
    else:
        table.layout = layout = _layout(file.path, format, config.columns, lines)
        table.order = "time" not in layout.position
        # GroupLens wrote its first sets in Latin-1
        latin = format.separator == "::" and "\ufffd" in "".join(lines)
        _fields(table, blocks, layout, file.max_line_mb, "latin-1" if latin else "utf-8")
    table.flush()
    return provenance


def _complete_blocks(file: RawFile, format: Format, progress: Progress | None) -> Iterator[Block]:
    """Yield the blocks of a file and report progress; raise `InputError` where its last line is cut."""
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


def _lines(block: Block, encoding: str = "utf-8") -> list[str]:
    """Return the lines of a block, with surrogate escapes for undecodable bytes."""
    return block.data.decode(encoding, "surrogateescape").removesuffix("\n").split("\n")


def _not_utf8(line: int, text: str, bad: list[Bad]) -> bool:
    """Return whether `text` has surrogate escapes of bytes that are not UTF-8; if so, add it to `bad`."""
    byte = None if text.isascii() else re.search("[\udc80-\udcff]", text)
    if byte is not None:
        detail = f"byte {ord(byte.group()) - 0xDC00:#04x} is not UTF-8 text"
        bad.append(Bad(line, "not UTF-8", detail, text, 1 + text.count("\n")))
    return byte is not None


def _separator_name(separator: str) -> str:
    return {"\t": "TAB", " ": "spaces"}.get(separator, f"'{separator}'")


def _fields(table: _Table, blocks: Iterator[Block], layout: Layout, max_line_mb: int, encoding: str) -> None:
    """Append lines of separated fields; blocks with quotation marks are cut by Python's csv module."""
    headed = layout.header is not None
    width = len(layout.names)
    unfinished: list[str] = []  # lines of a record that continues in the next block
    first = 1  # number of the first unread line
    for block in itertools.chain(blocks, [None]):
        data = b"" if block is None else block.data
        first = first if block is None else block.first_line - len(unfinished)
        clean = not unfinished and _decodes(data, encoding)
        batch = Batch()
        if layout.quoted and (unfinished or b'"' in data or b"\r" in data):
            lines = unfinished if block is None else unfinished + _lines(block, encoding)
            records, unfinished = _records(lines, first, layout, block is None, batch.bad)
            first += len(lines) - len(unfinished)
            if sum(map(len, unfinished)) > max_line_mb << 20:
                raise InputError(
                    f"{table.name}, line {first}: a quotation mark that opens here is not closed within "
                    f"{max_line_mb} MB (max_line_mb)"
                )
            start = next((n for n, (_, row) in enumerate(records, 1) if "".join(row).strip()), 0)
            if headed and start:
                table.base, records, headed = records[start - 1][0] + 1, records[start:], False
            join = layout.separator.join
            if not clean:
                records = [(n, row) for n, row in records if not _not_utf8(n, join(row), batch.bad)]
            batch.lines = [number for number, _ in records]
            rows = [row for _, row in records]
            widths = batch.columns["width"] = list(map(len, rows))
            text: list[str | None] = [None] * len(rows)
            for n in (n for n, size in enumerate(widths) if size != width):
                text[n], rows[n] = join(rows[n]), [""] * width
            batch.columns["text"] = text
            for role, place in layout.position.items():
                batch.columns[role] = [row[place] for row in rows]
            table.append(batch)
        elif block is not None:
            content = data.decode(encoding, "surrogateescape")
            if headed and (above := re.match(r"\s*\S[^\n]*\n?", content)):  # blank lines and the header
                first, content, headed = first + above[0].count("\n"), content[above.end() :], False
                table.base = first
            content = content.removesuffix("\n")
            if not clean:
                numbered = enumerate(content.split("\n"), first)
                content = "\n".join("" if _not_utf8(n, line, batch.bad) else line for n, line in numbered)
            table.append_lines(content, first, layout, batch.bad)


def _decodes(data: bytes, encoding: str) -> bool:
    """Return whether bytes are valid text of an encoding."""
    try:
        return data.isascii() or bool(data.decode(encoding))
    except UnicodeDecodeError:
        return False


def _records(
    lines: list[str], first: int, layout: Layout, last: bool, bad: list[Bad]
) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Cut lines whose fields may be quoted; return each record's line and fields, and unfinished lines.

    A quotation mark is special at the start of a field only. A quoted field that would contain a complete
    interaction was never closed: the lines before that interaction are bad. Unfinished lines begin a record
    that the next block may complete; there are none in the `last` block.
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
    """Return whether a line is a complete interaction."""
    fields = line.split(layout.separator)
    if len(fields) != len(layout.names) or not all(fields[layout.position[w]] for w in ("user", "item")):
        return False
    if "time" not in layout.position:
        return layout.separator == "\t"  # commas occur in any text
    return is_time(fields[layout.position["time"]])


def _json_columns(path: Path, columns: dict[str, str] | None, lines: list[str]) -> dict[str, str]:
    """Return role -> key for the user's own JSON lines."""
    keys = dict.fromkeys(itertools.chain.from_iterable(formats.json_objects(lines)))
    return choose_columns(path, list(keys), columns)


def _json(table: _Table, blocks: Iterator[Block], names: dict[str, str]) -> None:
    """Append JSON lines, decoding the three fields only."""
    kinds: dict[str, Any] = {"user": str | int, "item": str | int, "time": int | float | str | None}
    used = [role for role in kinds if names[role] != ROW_ORDER]
    fields: list[Any] = [(role, kinds[role], msgspec.field(name=names[role])) for role in used]
    decoder = msgspec.json.Decoder(msgspec.defstruct("Line", fields, gc=False))
    for block in blocks:
        batch, objects = Batch(), list[Any]()
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            block.data.decode()  # the decoder does not check the encoding of skipped fields
            objects = decoder.decode_lines(block.data)
        if len(objects) == _objects(block.data):
            batch.lines = list(range(block.first_line, block.first_line + len(objects)))
        else:  # line by line, by the same decoder
            objects = []
            for place, line in enumerate(_lines(block), block.first_line):
                if not _not_utf8(place, line, batch.bad) and line.strip():  # a blank line is no mistake
                    try:
                        objects.append(decoder.decode(line))
                        batch.lines.append(place)
                    except msgspec.DecodeError as error:
                        batch.bad.append(_bad_json(place, line, error))
        for role in used:
            batch.columns[role] = list(map(operator.attrgetter(role), objects))
        for role in ("user", "item"):
            batch.columns[role] = list(map(str, batch.columns[role]))
        table.append(batch)


def _objects(data: bytes) -> int | None:
    """Return the number of lines if each begins with "{" and ends with "}" and a line end, else None.

    If a decoder finds as many objects as such lines, each line holds one object. Counting with an array is
    faster than `bytes.count` of two bytes, which takes longer than decoding.
    """
    signs = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(signs == ord("\n"))
    if not ends.size or ends[-1] != signs.size - 1 or signs[0] != ord("{"):
        return None
    complete = (signs[ends[:-1] + 1] == ord("{")).all() and (signs[ends - 1] == ord("}")).all()
    return len(ends) if complete else None


def _bad_json(number: int, text: str, error: msgspec.DecodeError) -> Bad:
    if not isinstance(error, msgspec.ValidationError):
        return Bad(number, "not JSON", f"not a whole JSON object: {error}", text)
    reason = "field missing" if "missing required" in str(error) else "field of another type"
    return Bad(number, reason, str(error), text)


# ---- one user a line ----------------------------------------------------------------------------------

ITEMS, TIMES = "_item_org_rank.txt", "_time_org_rank.txt"


def twin(path: Path) -> Path | None:
    """Return the file of times beside a file of items, None where there is none.

    TiCoSeRec's `X_time_org_rank.txt` has the times of the interactions of `X_item_org_rank.txt`.
    """
    plain = path.name.removesuffix(".gz")
    beside = path.with_name(plain.removesuffix(ITEMS) + TIMES)
    places = (beside, beside.with_name(beside.name + ".gz")) if plain.endswith(ITEMS) else ()
    return next((place for place in places if place.is_file()), None)


def _histories(table: _Table, blocks: Iterator[Block], file: RawFile) -> dict[str, Any]:
    """Append lines of a user and their items in time order; a bad time makes the whole line bad.

    Returns the provenance of the times. Raises `InputError` if the file of times has other histories.
    """
    path, beside = file.path, twin(file.path)
    times_file = None if beside is None else RawFile(beside, max_line_mb=file.max_line_mb)
    time_blocks = iter(()) if times_file is None else times_file.blocks()
    time_lines = (line for block in time_blocks for line in _lines(block))
    table.order = times_file is None
    users: set[str] = set()
    rows = 0
    for block in blocks:
        batch = Batch()
        for number, line in enumerate(_lines(block), block.first_line):
            user, *items = line.split() or [""]
            times: list[str] = []
            if times_file is not None:
                time_line = next(time_lines, None)
                if time_line is None:
                    raise InputError(
                        f"{times_file.path.name} ends before line {number}, expected as many lines as in "
                        f"{path.name}"
                    )
                name, *times = time_line.split() or [""]
                if (name, len(times)) != (user, len(items)):
                    raise InputError(
                        f"{times_file.path.name}, line {number}: user {name!r} with {len(times)} times, "
                        f"expected user {user!r} with {len(items)} as in {path.name}"
                    )
            if not line.strip():
                continue
            bad_time = next((time for time in times if not is_time(time)), None)
            if _not_utf8(number, line, batch.bad):
                continue
            if not items:
                detail = f"the line is {line[:80]!r}, expected a user and their items"
                batch.bad.append(Bad(number, "number of fields", detail, line))
            elif user in users:
                detail = f"user {user!r} has a second line, expected one line per user"
                detail += " (is it format pair-per-line?)"
                batch.bad.append(Bad(number, "user on a second line", detail, line))
            elif bad_time is not None:
                row = {"time": bad_time, "user": user}
                batch.bad.append(_explained(number, "timestamp out of range", row, 1, None))
            else:
                users.add(user)
                batch.lines += [number] * len(items)
                batch.columns["row"] += range(rows, rows + len(items))
                batch.columns["user"] += [user] * len(items)
                batch.columns["item"] += items
                batch.columns["time"] += times
                rows += len(items)
                table.valid -= len(items) - 1  # lines, not rows
        table.append(batch)
    if times_file is None:
        return {}
    if next(time_lines, None) is not None:
        raise InputError(f"{times_file.path.name} has more lines than {path.name}, expected the same number")
    return {"time_file": times_file.path.name, "time_sha256": times_file.sha256}


# ---- Parquet ------------------------------------------------------------------------------------------


def _parquet(table: _Table, path: Path, columns: dict[str, str] | None, folder: Path) -> None:
    """Append the rows of a Parquet file."""
    import duckdb

    # A link with a plain name: in a path, DuckDB reads *, ? and [ as patterns and name=value as a partition.
    link = folder / "file.parquet"
    link.symlink_to(path.resolve())
    place = _literal(re.sub(r"([*?[])", r"[\1]", str(link)))
    source = f"read_parquet({place}, hive_partitioning = false)"
    try:
        kinds = [row[1] for row in table.con.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()]
        schema = table.con.execute(f"SELECT name, num_children FROM parquet_schema({place})").fetchall()
        names = _top_level(schema)  # DESCRIBE renames a column that is like another but for case
        renamed = f"(SELECT * FROM {source}) AS t({', '.join(f'c{n}' for n in range(len(names)))})"
        chosen = choose_columns(path, names, columns)
        table.order = chosen["time"] == ROW_ORDER
        values = []
        for role, column in chosen.items():
            number = names.index(column) if column != ROW_ORDER else None
            kind = "" if number is None else kinds[number]
            values.append(_parquet_value(path, role, column, number, kind))
        stamped = "" if any(value.endswith("AS us") for value in values) else f", {table.us}"
        numbered = f"""SELECT row_number() OVER () AS line, {", ".join(values)}{stamped},
            NULL AS width, CAST(NULL AS VARCHAR) AS text FROM {renamed}"""
        (size,) = table.con.execute(f"SELECT count(*) FROM {source}").fetchone() or (0,)
        table.take(f"SELECT *, line - 1 AS row FROM ({numbered})", size, [])
    except (duckdb.OutOfMemoryException, duckdb.InterruptException):
        raise
    except duckdb.Error as error:
        line = str(error).splitlines()[0].replace(str(link), path.name)
        if "space left" in line:
            raise
        raise InputError(f"{path.name} is not a whole Parquet file: {line}") from None


def _top_level(schema: list[tuple[str, int | None]]) -> list[str]:
    """Return the names of the top-level columns of a schema in which each group precedes its children."""
    names: list[str] = []
    inside: list[int] = []  # children still to come, of each open group
    for name, children in schema:
        if len(inside) == 1:
            names.append(name)
        if inside:
            inside[-1] -= 1
        inside.append(children or 0)
        while inside and not inside[-1]:
            inside.pop()
    return names


def _parquet_value(path: Path, role: str, column: str, number: int | None, kind: str) -> str:
    """Return a column as SQL for `_checked`; raise `InputError` for a type that cannot hold the role."""
    value = f"c{number}"
    if number is None:
        return f"CAST(NULL AS VARCHAR) AS {role}"
    if role == "time" and (kind.startswith("TIMESTAMP") or kind == "DATE"):
        return f"CAST({value} AS VARCHAR) AS time, if(isfinite({value}), epoch_us({value}), NULL) AS us"
    if not re.fullmatch(f"UUID|{_NUMBER}" if role in ("user", "item") else _NUMBER, kind):
        allowed = "text or numbers" if role != "time" else "numbers, text or timestamps"
        raise InputError(f"{path.name}: column {column!r} for {role} is of type {kind}, expected {allowed}")
    text = f"CAST({value} AS VARCHAR)"
    if kind in ("FLOAT", "DOUBLE"):  # a missing number of pandas
        text = f"CASE WHEN isnan({value}) THEN NULL ELSE {text} END"
    return f'{text} AS "{role}"'
