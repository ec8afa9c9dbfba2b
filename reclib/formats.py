"""The formats that interactions are published in, and how each is told from the others.

Detection looks at the content: two formats that cannot be told apart are never guessed, the user is
asked for `format`. The traps it knows: ratings-only files of Amazon 2014 are USER,ITEM,... and those of
2018 are ITEM,USER,...; a file of two fields a line may be one user or one interaction a line.

Sources: the README files of MovieLens (GroupLens); https://jmcauley.ucsd.edu/data/amazon (2014),
https://nijianmo.github.io/amazon (2018), https://amazon-reviews-2023.github.io; RecBole's atomic files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from reclib import rawfile
from reclib.config import InputError

SAMPLE_LINES = 1000
PARQUET_MAGIC = b"PAR1"
FOUR = ("user", "item", "rating", "time")


@dataclass(frozen=True)
class Format:
    """What the lines of a file look like."""

    name: str
    about: str  # for people: which files these are
    kind: Literal["fields", "json", "sequences", "table"]
    separator: str = ""  # between fields; "" is found in the first line
    fields: tuple[str, ...] = ()  # without a header: what each field is
    names: tuple[tuple[str, str], ...] = ()  # with a header, or JSON: what it is -> its name there
    time_unit: str = ""  # s, ms or order; "" is found in the file
    encoding: str = "utf-8"
    line_end: bool = True  # whether a last line without an end means that the file is cut short


_MOVIELENS = (("user", "userId"), ("item", "movieId"), ("rating", "rating"), ("time", "timestamp"))
_AMAZON = (("user", "reviewerID"), ("item", "asin"), ("rating", "overall"), ("time", "unixReviewTime"))
_AMAZON_2023 = (("user", "user_id"), ("item", "parent_asin"), ("rating", "rating"), ("time", "timestamp"))
_RECBOLE = (("user", "user_id"), ("item", "item_id"), ("rating", "rating"), ("time", "timestamp"))
_SWAPPED = ("item", "user", "rating", "time")

_ALL = [
    Format("ml-100k", "u.data: TAB, user item rating time", "fields", "\t", FOUR, time_unit="s"),
    Format("ml-1m", "ratings.dat: '::'", "fields", "::", FOUR, time_unit="s", encoding="latin-1"),
    Format("movielens-csv", "ratings.csv of 20M and later", "fields", ",", names=_MOVIELENS, time_unit="s"),
    Format("amazon-2014-json", "reviews_X.json", "json", names=_AMAZON, time_unit="s", line_end=False),
    Format("amazon-2018-json", "X.json, X_5.json", "json", names=_AMAZON, time_unit="s", line_end=False),
    Format("amazon-2023-json", "X.jsonl", "json", names=_AMAZON_2023, time_unit="ms", line_end=False),
    Format("amazon-2014-csv", "ratings_X.csv: USER,ITEM,...", "fields", ",", FOUR, time_unit="s"),
    Format("amazon-2018-csv", "X.csv: ITEM,USER,...", "fields", ",", _SWAPPED, time_unit="s"),
    Format("amazon-2023-csv", "X.csv with a header", "fields", ",", names=_AMAZON_2023, time_unit="ms"),
    Format("inter", "RecBole's X.inter: TAB, name:type", "fields", "\t", names=_RECBOLE, time_unit="s"),
    Format("user-per-line", "user item item ..., in time order", "sequences", time_unit="order"),
    Format("pair-per-line", "user item, in time order", "fields", "", ("user", "item"), time_unit="order"),
    Format("table", "your own CSV, TSV or Parquet, by `columns`", "table", line_end=False),
]
FORMATS: dict[str, Format] = {one.name: one for one in _ALL}


def named(name: str, path: Path, columns: dict[str, str] | None = None) -> Format:
    """Return the format `name`, or what the file's content shows for `auto`.

    Raises `InputError` for an unknown name, for `columns` with a published format, and where the
    content leaves more than one format or none.
    """
    if name != "auto" and name not in FORMATS:
        raise InputError(f"parameter 'format' is {name!r}, expected auto or one of {', '.join(FORMATS)}")
    if columns and name not in ("auto", "table"):
        raise InputError(f"parameter 'columns' is for format='table', and format is {name!r}")
    if columns:
        return FORMATS["table"]
    return FORMATS[name] if name != "auto" else detect(path)


def detect(path: Path) -> Format:
    """Return the format that the beginning of the file shows; raise `InputError` where it is not one."""
    data = rawfile.sample(path)
    if data.startswith(PARQUET_MAGIC):
        return FORMATS["table"]
    lines = data.decode("utf-8", "replace").splitlines()
    # the last line of the sample may be cut
    lines = lines[:-1] if len(lines) > 1 and not data.endswith(b"\n") else lines
    lines = [line for line in lines if line.strip()][:SAMPLE_LINES]
    if not lines:
        raise InputError(f"{path.name} is empty, expected one interaction per line")
    name = path.name.removesuffix(".gz")
    if name.endswith("_time_org_rank.txt"):
        items = name.replace("_time_", "_item_")
        raise InputError(
            f"{path.name} holds the times of {items}: give that file, the times are read with it"
        )
    first = lines[0].removeprefix("\ufeff")
    if first.startswith("{"):
        return _json(path, [first, *lines[1:]])
    if name.endswith(".inter") or ":token" in first:
        return FORMATS["inter"]
    if "::" in first:
        return FORMATS["ml-1m"]
    if any(separator in first for separator in ",\t;|"):
        return _fields(path, lines, first)
    return _order_only(path, lines)


def _json(path: Path, lines: list[str]) -> Format:
    keys: set[str] = set()
    for line in lines:
        try:
            keys |= set(msgspec.json.decode(line.encode(), type=dict[str, Any]))
        except msgspec.DecodeError:
            continue  # a broken line is reported with its number when it is read
    if {"user_id", "parent_asin"} <= keys:
        return FORMATS["amazon-2023-json"]
    if {"reviewerID", "asin"} <= keys:
        # Both vintages are read alike. Only 2014 has `helpful`; 2018 has `verified` in its place.
        return FORMATS["amazon-2014-json" if "helpful" in keys else "amazon-2018-json"]
    if not keys and lines[0].startswith("{'"):
        raise InputError(f"{path.name}, line 1: a Python dictionary, expected JSON; convert the file first")
    raise InputError(
        f"{path.name}: JSON fields are {', '.join(sorted(keys)) or 'unreadable'}, expected user_id and "
        "parent_asin (Amazon 2023) or reviewerID and asin (Amazon 2014, 2018)"
    )


def _fields(path: Path, lines: list[str], first: str) -> Format:
    separator = separator_of(first)
    header = first.split(separator)
    if separator == ",":
        if header[:4] == [name for _, name in _MOVIELENS]:
            return FORMATS["movielens-csv"]
        if header[:4] == [name for _, name in _AMAZON_2023]:
            return FORMATS["amazon-2023-csv"]
    if not any(is_number(field) for field in header):
        return FORMATS["table"]
    if separator != "\t":
        return _amazon_csv(path, [line.split(separator) for line in lines])
    if len(header) == 2:
        return _order_only(path, lines)
    if len(header) == 4:
        return FORMATS["ml-100k"]
    raise InputError(
        f"{path.name}, line 1: {len(header)} fields, expected 4 separated by TAB (user, item, rating, "
        "timestamp); for other columns give their positions: columns user=1,item=2,time=3"
    )


def _amazon_csv(path: Path, rows: list[list[str]]) -> Format:
    """Tell Amazon 2014 (USER,ITEM) from 2018 (ITEM,USER) where all lines of the sample agree."""
    whole = [row for row in rows if len(row) == 4]
    if whole and len(whole) >= 0.9 * len(rows):
        if all(_is_amazon_user(row[0]) and _is_asin(row[1]) for row in whole):
            return FORMATS["amazon-2014-csv"]
        if all(_is_asin(row[0]) and _is_amazon_user(row[1]) for row in whole):
            return FORMATS["amazon-2018-csv"]
    raise InputError(
        f"{path.name} has no header, and its content does not show which column is the user's "
        f"(line 1: {','.join(rows[0])[:80]!r}): give format amazon-2014-csv (USER,ITEM,rating,time), "
        "amazon-2018-csv (ITEM,USER,rating,time) or positions, columns user=1,item=2,time=4"
    )


def _is_amazon_user(text: str) -> bool:
    return re.fullmatch(r"A[0-9A-Z]{10,}", text) is not None


def _is_asin(text: str) -> bool:
    return re.fullmatch(r"[0-9]{9}[0-9X]|B[0-9A-Z]{9}", text) is not None


def _order_only(path: Path, lines: list[str]) -> Format:
    """Tell one user a line from one interaction a line: only the latter names a user twice."""
    rows = [line.split() for line in lines]
    shortest, longest = min(map(len, rows)), max(map(len, rows))
    users_repeat = len({row[0] for row in rows}) < len(rows)
    if longest > 2 and not users_repeat:
        return FORMATS["user-per-line"]
    if shortest == longest == 2 and users_repeat:
        return FORMATS["pair-per-line"]
    if shortest == longest == 2:
        raise InputError(
            f"{path.name}: every line has two fields and no user has two lines, so it may be one user or one "
            "interaction a line: give format user-per-line or pair-per-line"
        )
    raise InputError(
        f"{path.name}: the format was not recognised (line 1: {lines[0][:80]!r}); give format, one of "
        f"{', '.join(FORMATS)}"
    )


def separator_of(line: str) -> str:
    """Return the separator that occurs most often in a line, of comma, TAB, semicolon and bar."""
    return max(",\t;|", key=line.count)


def is_number(text: str) -> bool:
    """Return whether a field reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
