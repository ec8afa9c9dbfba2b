"""Where interactions come from: one table of sources, each giving a frame in one form.

A source knows its identity before it reads anything, so that a prepared cache is found without
parsing. Files are checked to the last field: what is wrong is told in one line with file, line
number and value.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reclib import ml100k, paths, synthetic
from reclib.config import DataConfig, InputError


class Interactions(NamedTuple):
    """What a reader gives: one row per interaction, in the source's own order."""

    frame: pd.DataFrame  # columns user, item (raw ids), timestamp (number), where known rating
    titles: dict[str, str]  # raw item id -> title
    provenance: dict[str, Any]  # plain JSON: file, its sha256, origin


@dataclass(frozen=True)
class Source:
    """A dataset that can be read."""

    name: str
    identity: str  # the same identity means the same rows in the same order
    read: Callable[[], Interactions]


def source(config: DataConfig) -> Source:
    """Return the source that `config.dataset` names: an entry of `SOURCES`, or a file.

    A file is a RecBole `.inter` file (TAB-separated under a header such as `user_id:token`), or,
    with any other ending, four TAB-separated columns without a header: user, item, rating,
    timestamp (as in u.data). A relative path counts from the project's root, since tools differ in
    their working directory.
    """
    name = config.dataset
    if name in SOURCES:
        return SOURCES[name](config)
    path = (paths.root() / Path(name).expanduser()).resolve()
    if path.is_file():
        return file_source(path)
    known = ", ".join(SOURCES)
    close = difflib.get_close_matches(name, list(SOURCES), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InputError(
        f"parameter 'dataset' is {name!r}{hint}: expected one of {known}, or a file, and {path} is none"
    )


def ml_100k_source(config: DataConfig) -> Source:
    """Return MovieLens 100K: files in place are verified now, missing ones fetched when read."""
    ml100k.present()
    return Source("ml-100k", ml100k.IDENTITY, _read_ml_100k)


def file_source(path: Path) -> Source:
    """Return the user's own file as a source, identified by its content."""
    sha256 = _sha256(path)
    provenance = {"origin": "file", "file": path.name, "sha256": sha256}
    return Source(path.stem, f"{path.suffix}:{sha256}", lambda: _read_file(path, provenance))


def synthetic_source(config: DataConfig) -> Source:
    """Return seeded synthetic interactions (see `synthetic`)."""
    asked: dict[str, Any] = {
        "users": config.synthetic_users,
        "items": config.synthetic_items,
        "mean_len": config.synthetic_mean_len,
        "seed": config.synthetic_seed,
    }

    def read() -> Interactions:
        made = synthetic.generate(**asked)
        lengths = np.diff(made.offsets)
        users = np.repeat(np.arange(lengths.size), lengths)
        seconds = 60 * (np.arange(made.items.size) - np.repeat(made.offsets[:-1], lengths))
        frame = pd.DataFrame({"user": users, "item": made.items, "timestamp": seconds})
        return Interactions(frame, {}, {"origin": "synthetic", **asked})

    described = " ".join(f"{key}={value}" for key, value in asked.items())
    return Source("synthetic", f"synthetic-{synthetic.VERSION} {described}", read)


# Name -> what makes the source from the configuration. A reader for another format is one more line
# here.
SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "ml-100k": ml_100k_source,
    "synthetic": synthetic_source,
}


def read_inter(path: Path) -> pd.DataFrame:
    """Read a RecBole `.inter` file: TAB-separated, header of `name:type`, columns in any order."""
    first = _text(path).split("\n", 1)[0].rstrip("\r")
    names = [field.split(":")[0] for field in first.split("\t")]
    missing = [name for name in ("user_id", "item_id", "timestamp") if name not in names]
    if missing:
        raise InputError(
            f"{path.name}, line 1: header is {first[:80]!r}, expected TAB-separated columns "
            f"that include {', '.join(missing)}"
        )
    table = _table(path, names, header_lines=1)
    columns = {"user_id": "user", "item_id": "item", "rating": "rating", "timestamp": "timestamp"}
    return _typed(path, table[[n for n in names if n in columns]].rename(columns=columns), 1)


def read_four_columns(path: Path) -> pd.DataFrame:
    """Read TAB-separated user, item, rating, timestamp without a header (MovieLens `u.data`)."""
    return _typed(path, _table(path, ["user", "item", "rating", "timestamp"], header_lines=0), 0)


def read_item_titles(path: Path) -> dict[str, str]:
    """Read titles from RecBole's `.item` (UTF-8, TAB) or GroupLens' `u.item` (Latin-1, `|`)."""
    if path.suffix == ".item" and path.name != "u.item":
        names = [field.split(":")[0] for field in _text(path).split("\n", 1)[0].rstrip("\r").split("\t")]
        if "item_id" not in names or "movie_title" not in names:
            return {}
        table = _table(path, names, header_lines=1)
        # RecBole has "unkonwn" for GroupLens' "unknown", and the year apart from the title
        titles = table["movie_title"].replace("unkonwn", "unknown")
        if "release_year" in names:
            year = table["release_year"]
            titles = titles.where(year.isin(["", "unkonwn"]), titles + " (" + year + ")")
        return dict(zip(table["item_id"], titles, strict=True))
    lines = path.read_text(encoding="latin-1").splitlines()
    fields = [line.split("|", 2) for line in lines]
    short = next((n for n, field in enumerate(fields, 1) if len(field) < 3), None)
    if short:
        raise InputError(f"{path.name}, line {short}: expected '|'-separated item, title, date, ...")
    return {field[0]: field[1].strip() for field in fields}


def _read_ml_100k() -> Interactions:
    got = ml100k.files()
    read = read_inter if got.interactions.suffix == ".inter" else read_four_columns
    provenance = {
        "origin": got.origin,
        "file": got.interactions.name,
        "sha256": ml100k.SHA256[got.interactions.name],
    }
    return Interactions(read(got.interactions), read_item_titles(got.items), provenance)


def _read_file(path: Path, provenance: dict[str, Any]) -> Interactions:
    frame = read_inter(path) if path.suffix == ".inter" else read_four_columns(path)
    beside = path.with_suffix(".item")
    titles = read_item_titles(beside) if beside.is_file() and beside != path else {}
    return Interactions(frame, titles, provenance)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        bad = error.object[error.start]
        raise InputError(f"{path.name}, line {line}: byte {bad:#04x} is not UTF-8 text") from None
    if not text.strip():
        raise InputError(f"{path.name} is empty, expected one interaction per line")
    if not text.endswith("\n"):
        line = text.count("\n") + 1
        raise InputError(
            f"{path.name}, line {line}: the file stops without a line end, so it may be cut short; "
            "expected a line end after the last line"
        )
    return text


def _table(path: Path, names: list[str], *, header_lines: int) -> pd.DataFrame:
    """Split into columns of text; any line with another number of fields is an error."""
    lines = pd.Series(_text(path).split("\n")[header_lines:-1], dtype="object").str.removesuffix("\r")
    if lines.empty:
        raise InputError(f"{path.name} has a header and nothing below it")
    fields = lines.str.count("\t").to_numpy() + 1
    if (fields != len(names)).any():
        row = int(np.argmax(fields != len(names)))
        raise InputError(
            f"{path.name}, line {row + 1 + header_lines}: {fields[row]} fields, expected "
            f"{len(names)} separated by TAB ({', '.join(names)}); the line is {lines[row][:80]!r}"
        )
    cells = "\t".join(lines).split("\t")  # every line has the same number: one flat list is the table
    return pd.DataFrame({name: cells[i :: len(names)] for i, name in enumerate(names)}, dtype="object")


def _typed(path: Path, table: pd.DataFrame, header_lines: int) -> pd.DataFrame:
    """Check and convert columns: ids are not empty, rating and timestamp are finite numbers."""
    typed: dict[str, pd.Series] = {}
    for name in table.columns:
        column = table[name]
        if name in ("user", "item"):
            bad, expected, typed[name] = (column == "").to_numpy(), "an id", column
        else:
            numbers = pd.to_numeric(column, errors="coerce")
            bad, expected, typed[name] = ~np.isfinite(numbers.to_numpy(float)), "a number", numbers
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(
                f"{path.name}, line {row + 1 + header_lines}: {name} is {column[row]!r}, expected {expected}"
            )
    return pd.DataFrame(typed)
