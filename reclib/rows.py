"""What a file's lines hold: where each field is, and whether one line is a valid interaction.

The checks here are the exact ones, line by line. `reading` takes whole blocks at once and comes here
only for blocks that hold something wrong, so that speed and messages do not stand in each other's way.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from reclib.config import InputError
from reclib.formats import Format, is_number, separator_of
from reclib.rawfile import MAX_LINE_BYTES

# 1990-01-01 to 2100-01-01: no interaction of a public dataset lies outside. The two units cannot be mixed
# up, since a time within the range in one lies outside in the other.
FIRST_SECOND, LAST_SECOND = 631_152_000, 4_102_444_800
PER_SECOND = {"s": 1, "ms": 1000}
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds"}

# Names of columns that say what they hold: compared without case, "_", "-", spaces and RecBole's ":type".
OBVIOUS = {
    "user": ("user", "userid", "reviewerid"),
    "item": ("item", "itemid", "movieid", "parentasin", "asin", "productid", "prodid"),
    "time": ("timestamp", "time", "unixreviewtime", "date", "datetime"),
    "rating": ("rating", "overall"),
}
ROW_ORDER = "#row"  # as the column of time: the rows are in time order


class BadLine(Exception):
    """A line that is no valid interaction: `reason` is what is counted, `detail` what is told."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Row(NamedTuple):
    """One valid interaction."""

    user: str
    item: str
    rating: float | None
    time: int  # in the layout's unit


@dataclass(frozen=True)
class Layout:
    """Where the fields are in this very file."""

    separator: str
    names: tuple[str, ...]  # of all columns, in the file's order
    position: dict[str, int]  # user, item, time, rating -> column
    header: tuple[str, ...] | None  # fields of the first line where that is a header
    time_unit: str  # s, ms, order, or date for text such as 2019-03-04 12:00:00 (given as s)
    quoted: bool = False
    rating_may_be_empty: bool = False


def layout(path: Path, format: Format, columns: dict[str, str] | None, lines: list[str]) -> Layout:
    """Find the fields of a text file from its first lines; raise `InputError` that names the columns."""
    first = lines[0].removeprefix("\ufeff")
    if format.kind == "table":
        return _table_layout(path, columns, [first, *lines[1:]])
    separator = format.separator or (separator_of(first) if "\t" in first else " ")
    if format.fields:
        names = format.fields
        return Layout(separator, names, {n: i for i, n in enumerate(names)}, None, format.time_unit)
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
    return Layout(separator, tuple(found), position, tuple(header), format.time_unit)


def _table_layout(path: Path, columns: dict[str, str] | None, lines: list[str]) -> Layout:
    separator = separator_of(lines[0])
    if separator not in lines[0]:
        raise InputError(f"{path.name}, line 1: no comma, TAB, semicolon or bar in {lines[0][:80]!r}")
    csv.field_size_limit(MAX_LINE_BYTES)  # a field may hold a whole review
    rows = list(csv.reader(lines, delimiter=separator))
    by_position = bool(columns) and all(
        column.isdigit() and column not in rows[0] for column in (columns or {}).values()
    )
    names = [str(n + 1) for n in range(len(rows[0]))] if by_position else rows[0]
    header = None if by_position else tuple(names)
    chosen = choose_columns(path, names, columns)
    position = {what: names.index(name) for what, name in chosen.items() if name != ROW_ORDER}
    body = rows[0:] if by_position else rows[1:]
    unit = "order"
    if "time" in position:
        values = [row[position["time"]] for row in body if len(row) == len(names)]
        unit = unit_of([value for value in values if value.strip()])
    return Layout(separator, tuple(names), position, header, unit, True, True)


def choose_columns(path: Path, names: list[str], columns: dict[str, str] | None) -> dict[str, str]:
    """Return what -> column: as the user says, else by obvious names; raise `InputError` if unclear."""
    option = f"give columns user=NAME,item=NAME,time=NAME (time={ROW_ORDER}: the rows are in time order)"
    found = f"columns found: {', '.join(names)[:300]}"
    chosen = dict(columns or {})
    unknown = set(chosen) - set(OBVIOUS)
    if unknown:
        raise InputError(
            f"parameter 'columns' has {', '.join(sorted(unknown))}, expected {', '.join(OBVIOUS)}"
        )
    for what, column in chosen.items():
        if column not in names and (what, column) != ("time", ROW_ORDER):
            raise InputError(f"{path.name}: no column {column!r} for {what}; {found}")
    for what in set(OBVIOUS) - set(chosen):
        fits = [name for name in names if re.sub(r":.*|[_\- ]", "", name.lower()) in OBVIOUS[what]]
        if len(fits) > 1 and what != "rating":
            raise InputError(f"{path.name}: {what} may be {' or '.join(fits)}; {option}; {found}")
        if not fits and what != "rating":
            raise InputError(f"{path.name}: no column is clearly the {what}; {option}; {found}")
        if len(fits) == 1:
            chosen[what] = fits[0]
    return chosen


def unit_of(values: list[str]) -> str:
    """Return the unit that most of these times are in: s, ms, or date for text that is no number."""
    units = Counter(
        "date" if not is_number(value) else "ms" if float(value) >= FIRST_SECOND * PER_SECOND["ms"] else "s"
        for value in values
    )
    return units.most_common(1)[0][0] if units else "s"


def field_rows(
    layout: Layout, text: str, first_line: int, name: str
) -> Iterator[tuple[int, str, Row | BadLine]]:
    """Yield (line, its text, interaction or what is wrong) for a block of separated fields.

    `text` was decoded with surrogate escapes, so that bytes that are not UTF-8 are found here. Raises
    `InputError` for a quote that is never closed: it would hide all lines below it.
    """
    for line, fields, whole in _split(layout, text, first_line, name):
        if line == 1 and layout.header is not None:
            continue
        try:
            yield line, whole, _field_row(layout, fields, whole)
        except BadLine as bad:
            yield line, whole, bad


def _split(layout: Layout, text: str, first_line: int, name: str) -> Iterator[tuple[int, list[str], str]]:
    if not layout.quoted:
        for number, line in enumerate(text.removesuffix("\n").split("\n"), first_line):
            line = line.removesuffix("\r")
            yield number, line.split(layout.separator), line
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=layout.separator, strict=True)
    done = 0
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                detail = "a double quote that opens here is never closed"
                raise InputError(f"{name}, line {first_line + done}: {detail}") from None
            fields = [f"({error})"]
        if fields:  # a blank line in a file made by hand is no mistake
            yield first_line + done, fields, layout.separator.join(fields)
        done = reader.line_num


def _field_row(layout: Layout, fields: list[str], whole: str) -> Row:
    refuse_other_bytes(whole)
    if len(fields) != len(layout.names):
        described = {"\t": "TAB", " ": "spaces"}.get(layout.separator, f"'{layout.separator}'")
        raise BadLine(
            "number of fields",
            f"{len(fields)} fields, expected {len(layout.names)} separated by {described} "
            f"({', '.join(layout.names)[:100]}); the line is {whole[:80]!r}",
        )
    if layout.header is not None and tuple(fields) == layout.header:
        raise BadLine("header line again", f"the header line again ({whole[:80]!r})")
    position = layout.position
    user, item = (checked_id(what, fields[position[what]]) for what in ("user", "item"))
    rating = None
    if "rating" in position:
        said = fields[position["rating"]]
        rating = None if layout.rating_may_be_empty and not said.strip() else _number("rating", said)
    time = 0
    if "time" in position:
        said = fields[position["time"]]
        time = _date(said) if layout.time_unit == "date" else checked_time(said, layout.time_unit)
    return Row(user, item, rating, time)


def refuse_other_bytes(text: str) -> None:
    """Raise `BadLine` where decoding with surrogate escapes met bytes that are not UTF-8."""
    if not text.isascii() and (found := re.search("[\udc80-\udcff]", text)):
        byte = ord(found.group()) - 0xDC00
        raise BadLine("not UTF-8", f"byte {byte:#04x} is not UTF-8 text")


def checked_id(what: str, text: str) -> str:
    """Return a raw id; it is not empty and stays on one line."""
    if not text:
        raise BadLine(f"{what} empty", f"{what} is '', expected an id")
    if not text.isprintable() and re.search(r"[\t\r\n\0]", text):
        raise BadLine(
            f"{what} with a line break or TAB", f"{what} is {text[:80]!r}, expected an id in one line"
        )
    return text


def checked_time(value: str | float, unit: str) -> int:
    """Return a time in `unit`, rounded down; it lies between 1990-01-01 and 2100-01-01."""
    number = _number("timestamp", value)
    per_second = PER_SECOND[unit]
    if FIRST_SECOND * per_second <= number < LAST_SECOND * per_second:
        return math.floor(number)
    for other, factor in PER_SECOND.items():
        if FIRST_SECOND * factor <= number < LAST_SECOND * factor:
            raise BadLine(
                f"{UNIT_NAMES[other]} where {UNIT_NAMES[unit]} are due",
                f"timestamp is {value!r}, which is in {UNIT_NAMES[other]}, expected {UNIT_NAMES[unit]}",
            )
    raise BadLine(
        "timestamp out of range",
        f"timestamp is {value!r}, expected {UNIT_NAMES[unit]} between 1990-01-01 and 2100-01-01",
    )


def _date(text: str) -> int:
    try:
        date = datetime.datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadLine(
            "timestamp not a date", f"timestamp is {text!r}, expected a date like 2019-03-04 12:00:00"
        ) from None
    date = date if date.tzinfo else date.replace(tzinfo=datetime.UTC)
    return checked_time(date.timestamp(), "s")


def _number(what: str, value: str | float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadLine(f"{what} not a number", f"{what} is {value!r}, expected a number")
    return number


class _Amazon(msgspec.Struct, gc=False):
    user: str = msgspec.field(name="reviewerID")
    item: str = msgspec.field(name="asin")
    time: int | float = msgspec.field(name="unixReviewTime")
    rating: float | None = msgspec.field(name="overall", default=None)


class _Amazon2023(msgspec.Struct, gc=False):
    user: str = msgspec.field(name="user_id")
    item: str = msgspec.field(name="parent_asin")
    time: int | float = msgspec.field(name="timestamp")
    rating: float | None = None


def json_decoder(format: Format) -> msgspec.json.Decoder[Any]:
    """Return the decoder of a line: it builds the four fields and passes over all others."""
    return msgspec.json.Decoder(_Amazon2023 if format.time_unit == "ms" else _Amazon)


def json_rows(
    decoder: msgspec.json.Decoder[Any], unit: str, text: str, first_line: int
) -> Iterator[tuple[int, str, Row | BadLine]]:
    """Yield (line, its text, interaction or what is wrong) for a block of JSON lines."""
    for number, line in enumerate(text.removesuffix("\n").split("\n"), first_line):
        line = line.removesuffix("\r")
        try:
            yield number, line, _json_row(decoder, unit, line)
        except BadLine as bad:
            yield number, line, bad


def _json_row(decoder: msgspec.json.Decoder[Any], unit: str, line: str) -> Row:
    refuse_other_bytes(line)
    try:
        read = decoder.decode(line)
    except msgspec.ValidationError as error:
        reason = "field missing" if "missing required" in str(error) else "field of another type"
        raise BadLine(reason, str(error)) from None
    except msgspec.DecodeError as error:
        raise BadLine("not JSON", f"not a whole JSON object: {error}") from None
    user, item = checked_id("user", read.user), checked_id("item", read.item)
    return Row(user, item, read.rating, checked_time(read.time, unit))
