"""The user's own Parquet file: DuckDB reads it as it is, and counts what it must leave out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reclib import rows
from reclib.config import InputError
from reclib.rawtable import quoted, seconds
from reclib.rejects import Rejects

if TYPE_CHECKING:
    import duckdb


def read(
    con: duckdb.DuckDBPyConnection,
    path: Path,
    columns: dict[str, str] | None,
    rejects: Rejects,
    progress: Callable[[int, int], None] | None,
) -> tuple[str, dict[str, Any]]:
    """Append the valid rows of a Parquet file to `raw`; return the time unit and the file's hash."""
    import duckdb

    with path.open("rb") as file:
        about = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    source = f"read_parquet({quoted(str(path))}, file_row_number = true)"
    try:
        found = con.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
    except duckdb.Error as error:
        raise InputError(f"{path.name} is not a whole Parquet file: {str(error).splitlines()[0]}") from None
    kinds = {name: kind for name, kind, *_ in found if name != "file_row_number"}
    chosen = rows.choose_columns(path, list(kinds), columns)
    unit, checks = _checks(con, source, chosen, kinds)
    reason = "CASE " + " ".join(f"WHEN {bad} THEN {quoted(why)}" for bad, why in checks["bad"]) + " END"
    count, *_ = con.execute(f"SELECT count(*) FROM {source}").fetchone() or (0,)
    bad = con.execute(
        f"""SELECT why, count(*), min(file_row_number), arg_min(shown, file_row_number)
        FROM (SELECT {reason} AS why, file_row_number, concat_ws(', ', {checks["shown"]}) AS shown
            FROM {source})
        WHERE why IS NOT NULL GROUP BY why ORDER BY 3"""
    ).fetchall()
    for why, lines, first_row, text in bad:
        rejects.add(first_row + 1, why, f"{why} ({text[:80]})", text, lines)
    valid = count - sum(lines for _, lines, *_ in bad)
    rejects.block_done(valid)
    con.execute(
        f"""INSERT INTO raw SELECT row_number() OVER () - 1, {checks["values"]}
        FROM {source} WHERE ({reason}) IS NULL"""
    )
    if progress is not None:
        progress(path.stat().st_size, path.stat().st_size)
    return unit, about


def _checks(
    con: duckdb.DuckDBPyConnection, source: str, chosen: dict[str, str], kinds: dict[str, str]
) -> tuple[str, dict[str, Any]]:
    """Return the time unit, and in SQL: what makes a row bad, the values, and the row for people."""
    user, item = (f"CAST({_name(chosen[what])} AS VARCHAR)" for what in ("user", "item"))
    bad = [(f"coalesce({user}, '') = ''", "user empty"), (f"coalesce({item}, '') = ''", "item empty")]
    rating, time, unit = "NULL", "0", "order"
    if "rating" in chosen:
        rating = f"try_cast({_name(chosen['rating'])} AS DOUBLE)"
        unread = f"{_name(chosen['rating'])} IS NOT NULL AND NOT coalesce(isfinite({rating}), false)"
        bad.append((unread, "rating not a number"))
    if chosen["time"] != rows.ROW_ORDER:
        unit, time = _time(con, source, chosen["time"], kinds[chosen["time"]])
        for other, name in rows.UNIT_NAMES.items():
            if other != unit:
                wrong = f"{name} where {rows.UNIT_NAMES[unit]} are due"
                bad.append((_within(time, other), wrong))
        bad.append((f"NOT coalesce({_within(time, unit)}, false)", "timestamp out of range or missing"))
    shown = ", ".join(_name(column) for column in chosen.values() if column in kinds)
    values = f"{user}, {item}, {rating}, CAST(floor({time}) AS BIGINT)"
    return unit, {"bad": bad, "values": values, "shown": shown}


def _time(con: duckdb.DuckDBPyConnection, source: str, column: str, kind: str) -> tuple[str, str]:
    """Return the unit of a column of times and its value in SQL."""
    name = _name(column)
    if kind.startswith(("TIMESTAMP", "DATE")):
        return "s", f"epoch({name})"
    first = con.execute(f"SELECT {name} FROM {source} WHERE {name} IS NOT NULL LIMIT 1000").fetchall()
    unit = rows.unit_of([str(value) for (value,) in first])
    if unit == "date":
        return "s", seconds(name)
    return unit, f"try_cast({name} AS DOUBLE)"


def _within(time: str, unit: str) -> str:
    first, last = (second * rows.PER_SECOND[unit] for second in (rows.FIRST_SECOND, rows.LAST_SECOND))
    return f"({time} >= {first} AND {time} < {last})"


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
