"""Reads a file of any format into the table `raw` of a DuckDB connection, out of core.

Text is taken in blocks. DuckDB reads a whole block of separated fields, msgspec decodes a whole block of
JSON lines; a block that holds anything wrong goes through `rows` line by line instead, which says what
is wrong and where. So a clean file passes through no Python loop, and every message is exact.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from reclib import parquet, rows, sequences, titles
from reclib.config import InputError
from reclib.formats import PARQUET_MAGIC, Format, named
from reclib.rawfile import Block, RawFile, checked, line_count
from reclib.rawtable import BYTE_ORDER_MARK, COLUMNS, PLAIN, RawTable, plain
from reclib.rejects import Rejects
from reclib.rows import BadLine, Layout, Row

if TYPE_CHECKING:
    import duckdb

ROWS_HELD = 100_000  # of sequences, before they are appended
APPENDED_BLOCKS = 4  # of JSON lines at a time

Progress = Callable[[int, int], None]  # bytes of the file done, and in all


@dataclass(frozen=True)
class Ingested:
    """What was read into `raw`, for the manifest."""

    time_unit: str  # s, ms, or order: then time is the position in the user's history
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
) -> Ingested:
    """Create the table raw(row, "user", item, rating, time) from a file.

    `row` counts the valid interactions in the file's order from 0; `rating` is NULL where unknown;
    `time` is in the unit that the result names. `format` None is detected. `sha256` is the file's hash
    where it is known: then it is not computed again. Raises `InputError` for
    what cannot be read, at the first bad line if `strict`, else where more than `max_rejected_share`
    of the lines are bad; the table is then not to be used.
    """
    format = format or named("auto", path, columns)
    con.execute(f"CREATE OR REPLACE TABLE raw({COLUMNS})")
    rejects = Rejects(path.name, strict, max_rejected_share)
    with checked(path).open("rb") as file:
        is_parquet = file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC
    if is_parquet and format.kind != "table":
        raise InputError(f"{path.name} is a Parquet file, expected format='table', not {format.name!r}")
    if is_parquet:
        unit, provenance = parquet.read(con, path, columns, rejects, progress)
    else:
        unit, provenance = _read_text(con, path, format, columns, rejects, progress, sha256)
    rejects.finish()
    if unit == "order" and format.kind != "sequences":  # those come with their positions
        _number_positions(con)
    about = {"file": path.name, "bytes": path.stat().st_size, "format": format.name, **provenance}
    side = titles.beside(path)
    if side is not None:
        about["titles"] = side.name
    return Ingested(
        unit,
        about,
        rejects.lines,
        dict(rejects.counts),
        rejects.examples,
        lambda items: {} if side is None else titles.read(side, items),
    )


def _read_text(
    con: duckdb.DuckDBPyConnection,
    path: Path,
    format: Format,
    columns: dict[str, str] | None,
    rejects: Rejects,
    progress: Progress | None,
    sha256: str | None,
) -> tuple[str, dict[str, Any]]:
    """Read blocks of lines; return the time unit and what was learned about the file."""
    file = RawFile(path, quoted=format.kind == "table", sha256=sha256)
    reader: _Fields | _Json | _Sequences | None = None
    with tempfile.TemporaryDirectory(dir=_scratch(con)) as folder:
        table = RawTable(con, Path(folder) / "block")
        for block in file.blocks():
            _demand_line_end(path, block, format)
            block = _utf8(block, format.encoding)
            if reader is None:
                reader = _reader(path, format, columns, block, table, rejects)
            reader.take(block)
            if progress is not None:
                progress(file.bytes_read, file.size)
        if reader is None:
            raise InputError(f"{path.name} is empty, expected one interaction per line")
        unit, about = reader.finish()
    return unit, {"sha256": file.sha256, **about}


def _demand_line_end(path: Path, block: Block, format: Format) -> None:
    if format.line_end and not block.data.endswith(b"\n"):
        line = block.first_line + block.data.count(b"\n")
        raise InputError(
            f"{path.name}, line {line}: the file stops without a line end, so it may be cut short; "
            "expected a line end after the last line"
        )


def _scratch(con: duckdb.DuckDBPyConnection) -> str | None:
    """Return the connection's own temporary folder, None (the system's) where it has none yet."""
    found = con.execute("SELECT current_setting('temp_directory')").fetchone()
    return found[0] if found and found[0] and Path(found[0]).is_dir() else None


def _utf8(block: Block, encoding: str) -> Block:
    data = block.data
    if block.first_line == 1:
        data = data.removeprefix(BYTE_ORDER_MARK)
    if encoding != "utf-8" and not data.isascii():
        data = data.decode(encoding).encode()
    return Block(block.first_line, data)


def _reader(
    path: Path,
    format: Format,
    columns: dict[str, str] | None,
    block: Block,
    table: RawTable,
    rejects: Rejects,
) -> _Fields | _Json | _Sequences:
    start = block.data[: 1 << 20].decode("utf-8", "replace").splitlines()
    if not any(line.strip() for line in start):
        raise InputError(f"{path.name} is empty, expected one interaction per line")
    if b"\n" not in block.data and b"\r" in block.data:
        raise InputError(f"{path.name}: lines end with CR alone, expected LF or CRLF")
    if format.kind == "json":
        return _Json(format, table, rejects)
    if format.kind == "sequences":
        return _Sequences(path, table, rejects)
    return _Fields(rows.layout(path, format, columns, start[:1000]), table, rejects)


def _sift(found: Iterable[tuple[int, str, Row | BadLine]], rejects: Rejects) -> Iterator[str]:
    """Yield the valid ones as lines for `append_rows`; count the others."""
    for line, text, row in found:
        if isinstance(row, BadLine):
            rejects.add(line, row.reason, row.detail, text)
        else:
            yield plain(row)


class _Fields:
    """Lines of separated fields."""

    def __init__(self, layout: Layout, table: RawTable, rejects: Rejects) -> None:
        self.layout = layout
        self.table = table
        self.rejects = rejects

    def take(self, block: Block) -> None:
        data = block.data
        if block.first_line == 1 and self.layout.header is not None:
            data = data.partition(b"\n")[2]
        before = self.table.rows
        if not data or self._whole(data):
            self.rejects.block_done(self.table.rows - before)
            return
        text = block.data.decode("utf-8", "surrogateescape")
        found = rows.field_rows(self.layout, text, block.first_line, self.rejects.name)
        valid = list(_sift(found, self.rejects))
        self.table.append_rows(valid)
        self.rejects.block_done(len(valid))

    def _whole(self, data: bytes) -> bool:
        """Take the block at once; return False, with nothing taken, if any line is not valid."""
        count = line_count(data)
        if count is None:
            return False
        if self.layout.quoted and b'"' in data:
            if data.count(b'"') % 2:  # the database would pass over what an open quote swallows
                return False
            count = None  # a quoted field may hold line ends
        return self.table.append(self.layout, data, count)

    def finish(self) -> tuple[str, dict[str, Any]]:
        return ("s" if self.layout.time_unit == "date" else self.layout.time_unit), {}


class _Json:
    """JSON lines of reviews; appended some blocks at once, since each append costs a plan and a commit."""

    def __init__(self, format: Format, table: RawTable, rejects: Rejects) -> None:
        self.unit = format.time_unit
        self.decoder = rows.json_decoder(format)
        self.layout = replace(PLAIN, time_unit=self.unit)
        self.table = table
        self.rejects = rejects
        self.held: list[tuple[Block, str, int]] = []  # decoded: block, its lines for the table, their number

    def take(self, block: Block) -> None:
        decoded = self._decoded(block.data)
        if decoded is not None:
            self.held.append((block, *decoded))
        if decoded is None or len(self.held) == APPENDED_BLOCKS:
            self._append()
        if decoded is None:
            self._line_by_line(block)

    def _decoded(self, data: bytes) -> tuple[str, int] | None:
        """Return the block as lines for the table and their number; None if any line is not valid."""
        count = line_count(data)
        if count is None:
            return None
        try:
            read = self.decoder.decode_lines(data)
        except (msgspec.DecodeError, msgspec.ValidationError):
            return None
        text = "".join(
            [f"{r.user}\t{r.item}\t{'' if r.rating is None else r.rating}\t{r.time}\n" for r in read]
        )
        whole = len(read) == count == text.count("\n") and text.count("\t") == 3 * count
        return (text, count) if whole else None

    def _append(self) -> None:
        """Append what is held; line by line if the database does not accept it."""
        if not self.held:
            return
        blocks, texts, counts = zip(*self.held, strict=True)
        self.held = []
        if self.table.append(self.layout, "".join(texts).encode(), sum(counts)):
            self.rejects.block_done(sum(counts))
            return
        for block in blocks:
            self._line_by_line(block)

    def _line_by_line(self, block: Block) -> None:
        text = block.data.decode("utf-8", "surrogateescape")
        found = rows.json_rows(self.decoder, self.unit, text, block.first_line)
        valid = list(_sift(found, self.rejects))
        self.table.append_rows(valid)
        self.rejects.block_done(len(valid))

    def finish(self) -> tuple[str, dict[str, Any]]:
        self._append()
        return self.unit, {}


class _Sequences:
    """One user a line, with the twin file of times where there is one."""

    def __init__(self, path: Path, table: RawTable, rejects: Rejects) -> None:
        self.histories = sequences.Histories(path)
        self.table = table
        self.rejects = rejects

    def take(self, block: Block) -> None:
        text = block.data.decode("utf-8", "surrogateescape")
        valid: list[str] = []
        users = 0
        for line, whole, history in self.histories.read(text, block.first_line):
            if isinstance(history, BadLine):
                self.rejects.add(line, history.reason, history.detail, whole)
                continue
            users += 1
            valid += map(plain, history)
            if len(valid) >= ROWS_HELD:
                self.table.append_rows(valid)
                valid = []
        self.table.append_rows(valid)
        self.rejects.block_done(users)

    def finish(self) -> tuple[str, dict[str, Any]]:
        return self.histories.finish()


def _number_positions(con: duckdb.DuckDBPyConnection) -> None:
    """Set time to the position in the user's history, from 0."""
    con.execute("ALTER TABLE raw RENAME TO unnumbered")
    con.execute(f"CREATE TABLE raw({COLUMNS})")
    con.execute("""INSERT INTO raw
        SELECT row, "user", item, rating, row_number() OVER (PARTITION BY "user" ORDER BY row) - 1
        FROM unnumbered ORDER BY row""")
    con.execute("DROP TABLE unnumbered")
