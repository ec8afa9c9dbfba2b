"""Item titles, read from the file that publishers put beside the interactions.

Only titles of the items that are asked for are kept, since a catalogue of Amazon has millions.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import msgspec

from reclib import rawfile
from reclib.config import InputError


def beside(path: Path) -> Path | None:
    """Return the file with the titles of the items of `path`, None where there is none.

    ml-100k: u.item; ml-1m: movies.dat; ratings.csv: movies.csv; RecBole: X.item beside X.inter;
    Amazon's category X: meta_X.json or meta_X.jsonl. All also with .gz.
    """
    plain = path.name.removesuffix(".gz")
    stem = plain.rpartition(".")[0]
    category = re.sub(r"^(reviews|ratings)_|_5$|_10$|_rating_only$|\.(train|valid|test).*$", "", stem)
    names = {"u.data": ["u.item"], "ratings.dat": ["movies.dat"], "ratings.csv": ["movies.csv"]}
    wanted = names.get(plain, [f"{stem}.item", f"meta_{category}.json", f"meta_{category}.jsonl"])
    for name in wanted:
        for candidate in (path.parent / name, path.parent / f"{name}.gz"):
            if candidate.is_file() and candidate != path:
                return candidate
    return None


def read(path: Path, items: Collection[str]) -> dict[str, str]:
    """Return raw item id -> title for those of `items` that the file has; the first one counts."""
    plain = path.name.removesuffix(".gz")
    wanted = items if isinstance(items, set | frozenset | dict) else set(items)
    if plain == "u.item":
        found = _split(path, "|", 3)
    elif plain.endswith(".dat"):
        found = _split(path, "::", 2)
    elif plain.endswith(".csv"):
        found = _movies_csv(path)
    elif plain.endswith(".item"):
        found = _recbole(path)
    else:
        found = _amazon(path, wanted)
    titles: dict[str, str] = {}
    for item, title in found:
        if title and item in wanted:
            titles.setdefault(item, title)
    return titles


def _split(path: Path, separator: str, least: int) -> Iterator[tuple[str, str]]:
    """Lines of item, title, ... in Latin-1, as GroupLens wrote its first sets."""
    for number, line in enumerate(rawfile.lines(path, "latin-1"), 1):
        fields = line.split(separator, 2)
        if len(fields) < least:
            raise InputError(
                f"{path.name}, line {number}: expected '{separator}'-separated item, title, date, ..."
            )
        yield fields[0], fields[1].strip()


def _movies_csv(path: Path) -> Iterator[tuple[str, str]]:
    table = csv.DictReader(rawfile.lines(path))
    if not {"movieId", "title"} <= set(table.fieldnames or []):
        return
    for row in table:
        yield row["movieId"], (row["title"] or "").strip()


def _recbole(path: Path) -> Iterator[tuple[str, str]]:
    """RecBole's table of items: `movie_title`, else `title`; the year is a column apart."""
    table = rawfile.lines(path)
    names = [field.split(":")[0] for field in next(table, "").split("\t")]
    title = next((name for name in ("movie_title", "title") if name in names), None)
    if "item_id" not in names or title is None:
        return
    for number, line in enumerate(table, 2):
        fields = dict(zip(names, line.split("\t"), strict=False))
        if len(fields) != len(names):
            raise InputError(f"{path.name}, line {number}: expected {len(names)} fields separated by TAB")
        # RecBole has "unkonwn" for GroupLens' "unknown"
        said = "unknown" if fields[title] == "unkonwn" else fields[title]
        year = fields.get("release_year", "")
        yield fields["item_id"], said if year in ("", "unkonwn") else f"{said} ({year})"


class _Product(msgspec.Struct, gc=False):
    asin: str | None = None
    parent_asin: str | None = None
    title: str | None = None


def _amazon(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
    """Amazon's metadata: JSON lines, in 2014 Python dictionaries; unreadable lines have no title."""
    decoder = msgspec.json.Decoder(_Product)
    asin = re.compile(r"'asin': '([^']*)'")
    for line in rawfile.lines(path):
        try:
            read = decoder.decode(line)
        except (msgspec.DecodeError, msgspec.ValidationError):
            found = asin.search(line)
            if found and found[1] in wanted:  # evaluating all lines of 2014 would take minutes
                yield found[1], _python_title(line)
            continue
        item = read.parent_asin or read.asin
        if item and read.title:
            yield item, " ".join(read.title.split())


def _python_title(line: str) -> str:
    try:
        product = ast.literal_eval(line)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""
    title = product.get("title") if isinstance(product, dict) else None
    return " ".join(title.split()) if isinstance(title, str) else ""
