"""The table `raw` in DuckDB: interactions in the order of their source, appended block by block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reclib.formats import FOUR
from reclib.rows import FIRST_SECOND, LAST_SECOND, PER_SECOND, Layout, Row

if TYPE_CHECKING:
    import duckdb

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COLUMNS = 'row BIGINT, "user" VARCHAR, item VARCHAR, rating DOUBLE, time BIGINT'
# What a block is written as when Python has read it: no quoting, since ids hold neither TAB nor line end.
PLAIN = Layout("\t", FOUR, {what: n for n, what in enumerate(FOUR)}, None, "order", rating_may_be_empty=True)


class RawTable:
    """Appends blocks to `raw`."""

    def __init__(self, con: duckdb.DuckDBPyConnection, file: Path) -> None:
        self.con = con
        self.file = file
        self.rows = 0

    def append(self, layout: Layout, data: bytes, expected: int | None) -> bool:
        """Append the rows that `data` holds, all or none; return whether all were valid.

        `expected` is their number where it is known. Not caught: a full disk, too little memory.
        """
        import duckdb

        # The database takes a byte-order mark off the start of each file that it reads: here it is an id's.
        marked = data.startswith(BYTE_ORDER_MARK)
        self.file.write_bytes(BYTE_ORDER_MARK + data if marked else data)
        self.con.execute("BEGIN")
        try:
            query = f"INSERT INTO raw {_select(layout, self.file, self.rows)}"
            (count,) = self.con.execute(query).fetchone() or (0,)
        except (duckdb.InvalidInputException, duckdb.ConversionException):
            self.con.execute("ROLLBACK")
            return False
        if expected is not None and count != expected:
            self.con.execute("ROLLBACK")
            return False
        self.con.execute("COMMIT")
        self.rows += count
        return True

    def append_rows(self, valid: list[str]) -> None:
        """Append lines of TAB-separated user, item, rating, time that are known to be valid."""
        if valid and not self.append(PLAIN, "".join(valid).encode(), len(valid)):
            raise RuntimeError(f"{len(valid)} valid lines were not accepted by the database")


def _select(layout: Layout, file: Path, rows_before: int) -> str:
    """Return the query that reads a block; a row that is not valid makes it fail."""
    types = dict.fromkeys(range(len(layout.names)), "VARCHAR")
    for what, position in layout.position.items():
        if what == "rating" or (what == "time" and layout.time_unit != "date"):
            types[position] = "DOUBLE"
    columns = ", ".join(f"'c{position}': '{kind}'" for position, kind in types.items())
    name = {what: f"c{position}" for what, position in layout.position.items()}
    user, item, rating = name["user"], name["item"], name.get("rating", "NULL")
    valid = [f"{user} <> ''", f"{item} <> ''"]
    if "rating" in name:
        empty = f" OR {rating} IS NULL" if layout.rating_may_be_empty else ""
        valid.append(f"(isfinite({rating}){empty})")
    time = name.get("time", "0")
    if layout.time_unit == "date":
        time = seconds(time)
    if "time" in name and layout.time_unit != "order":
        per_second = PER_SECOND.get(layout.time_unit, 1)  # a date is in seconds by now
        first, last = FIRST_SECOND * per_second, LAST_SECOND * per_second
        valid.append(f"{time} >= {first} AND {time} < {last}")
    quote = '"' if layout.quoted else ""
    return f"""
        SELECT {rows_before} + row_number() OVER () - 1,
            CASE WHEN coalesce({" AND ".join(valid)}, false) THEN {user} ELSE error('not valid') END,
            {item}, {rating}, CAST(floor({time}) AS BIGINT)
        FROM read_csv({quoted(str(file))}, columns = {{{columns}}}, header = false,
            delim = {quoted(layout.separator)}, quote = '{quote}', escape = '{quote}',
            auto_detect = false, parallel = false)"""


def plain(row: Row) -> str:
    """Return a valid interaction as a line for `append_rows`."""
    rating = "" if row.rating is None else row.rating
    return f"{row.user}\t{row.item}\t{rating}\t{row.time}\n"


def seconds(text: str) -> str:
    """Return the query's expression for a date in text: NULL with an offset, which a cast would ignore."""
    has_offset = f"regexp_matches({text}, '[+-][0-9]{{2}}:?[0-9]{{2}}$')"
    return f"CASE WHEN {has_offset} THEN NULL ELSE epoch(try_cast({text} AS TIMESTAMP)) END"


def quoted(text: str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"
