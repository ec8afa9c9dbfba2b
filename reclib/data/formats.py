"""Raw files: checked, unzipped and cut into lines; the formats they are published in; files of titles.

Detection looks at the content. It never guesses between two formats: an error then asks for `format`. Known
ambiguities: ratings-only files of Amazon 2014 are USER,ITEM,... and those of 2018 are ITEM,USER,...; a file
of two fields a line may be one user or one interaction a line.

Sources: the README files of MovieLens (GroupLens); https://jmcauley.ucsd.edu/data/amazon (2014),
https://nijianmo.github.io/amazon (2018), https://amazon-reviews-2023.github.io; RecBole's atomic files.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import hashlib
import html
import io
import re
import stat
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from isal import igzip, isal_zlib  # faster than gzip and zlib, with the same interface

from reclib.config import DataConfig, InputError
from reclib.data.batches import prefetch

GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"

PACKED = {  # first bytes -> kind of file
    b"PK\x03\x04": "a zip archive",
    b"Rar!": "a rar archive",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"\xfd7zXZ\0": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"BZh": "a bzip2 file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
}

BLOCK_BYTES = 4 << 20  # of text in one block
BLOCKS_AHEAD = 6  # read ahead of the consumer
PIECE_BYTES = 1 << 20  # of the file or of unzipped text, in memory at once
MAX_LINE_MB = 16  # default of DataConfig

SAMPLE_BYTES, SAMPLE_LINES = 256 << 10, 1000  # of the text, for detecting the format

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# ---- raw files ----------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Complete lines of a file."""

    first_line: int  # number of the first one, from 1
    data: bytes  # ends with a line end, except perhaps at the end of the file; CRLF is LF


class RawFile:
    """One pass over a raw file in constant memory.

    `bytes_read` and `sha256` refer to the file on disk, after the last block. A known hash is not computed.
    """

    def __init__(self, path: Path, *, sha256: str | None = None, max_line_mb: int = MAX_LINE_MB) -> None:
        self.path, self.max_line_mb = path, max_line_mb
        self.size = checked(path).stat().st_size
        self.bytes_read = 0
        self._known = sha256
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hexadecimal hash of the bytes read so far."""
        return self._known or self._digest.hexdigest()

    def blocks(self) -> Iterator[Block]:
        """Yield the file, read ahead by a thread; raise `InputError` for truncated or damaged gzip."""
        return prefetch(self._cut(), BLOCKS_AHEAD)

    def _cut(self) -> Iterator[Block]:
        """Cut the text at line ends."""
        line, chunks, length, unended = 1, [], 0, 0  # `unended`: bytes after the last line end
        for text in self.text():
            chunks.append(text)
            length += len(text)
            end = text.rfind(b"\n") + 1
            unended = len(text) - end if end else unended + len(text)
            if unended > self.max_line_mb << 20:
                raise self.too_long(line + sum(piece.count(b"\n") for piece in chunks))
            if length >= BLOCK_BYTES and unended < length:
                joined = b"".join(chunks)
                lines = joined[: length - unended]
                yield Block(line, lines.replace(b"\r\n", b"\n"))
                line += lines.count(b"\n")
                chunks, length = [joined[length - unended :]], unended
        if tail := b"".join(chunks):
            yield Block(line, tail.replace(b"\r\n", b"\n"))

    def too_long(self, line: int) -> InputError:
        """Return the error for a line above the limit."""
        limit = f"longer than {self.max_line_mb} MB (max_line_mb), expected text of lines"
        return InputError(f"{self.path.name}, line {line}: {limit}")

    def text(self) -> Generator[bytes, None, None]:
        """Yield the bytes of the text, unzipped, without a byte-order mark."""
        is_gzip = _start(self.path).startswith(GZIP_MAGIC)
        with io.BufferedReader(_OnDisk(self), PIECE_BYTES) as file:
            source: io.BufferedIOBase = igzip.IGzipFile(fileobj=file) if is_gzip else file
            pieces = iter(lambda: self._read(source), b"")
            start = b""
            while len(start) < len(BYTE_ORDER_MARK) and (piece := next(pieces, b"")):
                start += piece
            yield start.removeprefix(BYTE_ORDER_MARK)
            yield from pieces

    def _read(self, source: io.BufferedIOBase) -> bytes:
        """Read a piece; each member of a gzip file has its own checksum, which the library compares."""
        try:
            return source.read(PIECE_BYTES)
        except EOFError:
            problem = f"is cut short: its gzip stream has no end after {self.bytes_read:,} bytes"
        except (igzip.BadGzipFile, isal_zlib.error) as error:  # type: ignore[misc]
            problem = f"is damaged near byte {self.bytes_read:,}: {error}"
        raise InputError(f"{self.path.name} {problem}; fetch it again")


class _OnDisk(io.FileIO):
    """The bytes of a raw file, which are counted and hashed as they are read."""

    def __init__(self, of: RawFile) -> None:
        super().__init__(of.path)
        self._of = of

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        if self._of._known is None:
            self._of._digest.update(memoryview(buffer)[:size])
        self._of.bytes_read += size
        return size


def checked(path: Path) -> Path:
    """Return `path` if it is a readable, unpacked file; raise `InputError` otherwise."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"))
            kind = next((kind for test, kind in kinds if test(mode)), "a device or socket")
            raise InputError(f"{path} is {kind}, expected a file")
        start = _start(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read, expected a file: {error.strerror}") from None
    if not start:
        raise InputError(f"{path.name} is empty, expected one interaction per line")
    for magic, kind in PACKED.items():
        if start.startswith(magic):
            raise InputError(f"{path.name} is {kind}: unpack it and give the file inside (gzip is read)")
    return path


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def is_parquet(path: Path) -> bool:
    """Return whether the file begins as a Parquet file."""
    return _start(checked(path)).startswith(PARQUET_MAGIC)


def sample(path: Path, max_line_mb: int) -> list[str]:
    """Return the first lines that are not blank; raise `InputError` if the file is not text in lines."""
    data, file = b"", RawFile(path, sha256="", max_line_mb=max_line_mb)
    with contextlib.closing(file.text()) as text:
        for piece in text:
            data += piece
            if len(data) >= SAMPLE_BYTES and b"\n" in data:
                break
            if len(data) > max_line_mb << 20:
                raise file.too_long(1)
    if not data.strip():
        raise InputError(f"{path.name} is empty, expected one interaction per line")
    inside = {GZIP_MAGIC: "another gzip file", PARQUET_MAGIC: "a Parquet file", **PACKED}
    kind = next((kind for magic, kind in inside.items() if data.startswith(magic)), None)
    if kind is not None or data[257:262] == b"ustar":
        raise InputError(f"{path.name} holds {kind or 'a tar archive'}: unpack it and give the file inside")
    nul = [data[place:200:2].count(b"\0") for place in (0, 1)]
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or (not min(nul) and max(nul) > len(data[:200]) // 4):
        raise InputError(f"{path.name} is UTF-16 text, expected UTF-8: save it as UTF-8")
    if sum(nul) > len(data[:200]) // 4:
        raise InputError(f"{path.name} is no text (it has NUL bytes), expected UTF-8 text or Parquet")
    if b"\n" not in data and b"\r" in data:
        raise InputError(f"{path.name}: lines end with CR alone, expected LF or CRLF")
    if re.match(rb"\s*\[\s*[\[{\"]", data):
        raise InputError(f"{path.name}: a JSON array, expected one JSON object a line (jq -c '.[]' makes it)")
    lines = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    if len(lines) > 1 and len(data) >= SAMPLE_BYTES:
        del lines[-1]  # it may be cut
    return [line for line in lines if line.strip()][:SAMPLE_LINES]


# ---- formats ------------------------------------------------------------------------------------------

# Role -> obvious names of its column, compared without case, "_", "-", spaces and RecBole's ":type".
OBVIOUS = {
    "user": ("user", "userid", "reviewerid"),
    "item": ("item", "itemid", "movieid", "parentasin", "asin", "productid", "prodid"),
    "time": ("timestamp", "time", "unixreviewtime", "date", "datetime"),
}
ROLES = tuple(OBVIOUS)


@dataclass(frozen=True)
class Format:
    """The layout of the lines of a file."""

    name: str
    kind: Literal["fields", "json", "sequences", "table"]
    separator: str = ""  # between fields; "": detected in the first line
    fields: tuple[str, ...] = ()  # without a header: the role of each field
    names: tuple[str, ...] = ()  # with a header, or JSON: the names of `ROLES` in the file
    line_end: bool = True  # whether a last line without a line end means a truncated file


_RATED = ("user", "item", "rating", "time")
_MOVIELENS = ("userId", "movieId", "timestamp")
_AMAZON = ("reviewerID", "asin", "unixReviewTime")
_AMAZON_2023 = ("user_id", "parent_asin", "timestamp")
_RECBOLE = ("user_id", "item_id", "timestamp")

_ALL = [
    Format("ml-100k", "fields", "\t", _RATED),  # u.data
    Format("ml-1m", "fields", "::", _RATED),  # ratings.dat
    Format("movielens-csv", "fields", ",", names=_MOVIELENS),  # ratings.csv of 20M and later
    Format("amazon-2014-json", "json", names=_AMAZON, line_end=False),  # reviews_X.json
    Format("amazon-2018-json", "json", names=_AMAZON, line_end=False),  # X.json, X_5.json
    Format("amazon-2023-json", "json", names=_AMAZON_2023, line_end=False),  # X.jsonl
    Format("amazon-2014-csv", "fields", ",", _RATED),  # ratings_X.csv
    Format("amazon-2018-csv", "fields", ",", ("item", "user", "rating", "time")),  # X.csv
    Format("amazon-2023-csv", "fields", ",", names=_AMAZON_2023),  # X.csv with a header
    Format("inter", "fields", "\t", names=_RECBOLE),  # RecBole's X.inter, whose names are name:type
    Format("user-per-line", "sequences"),  # user item item ..., in time order
    Format("pair-per-line", "fields", fields=("user", "item")),  # in time order
    Format("table", "table", line_end=False),  # one's own CSV, TSV, JSON lines or Parquet, by `columns`
]

FORMATS: dict[str, Format] = {format.name: format for format in _ALL}


def named(config: DataConfig, path: Path) -> Format:
    """Return the format of a file that `config` names, for `auto` the one detected from the content.

    Raises `InputError` for an unknown name, for `columns` with a published format, and for content that fits
    no format or several.
    """
    name, columns = config.format, config.columns
    if name != "auto" and name not in FORMATS:
        raise InputError(f"parameter 'format' is {name!r}, expected auto or one of {', '.join(FORMATS)}")
    if columns and name not in ("auto", "table"):
        raise InputError(f"parameter 'columns' is for format='table', and format is {name!r}")
    if columns:
        return FORMATS["table"]
    return FORMATS[name] if name != "auto" else detect(path, config.max_line_mb)


def detect(path: Path, max_line_mb: int) -> Format:
    """Return the format detected at the beginning of a file; raise `InputError` if it is ambiguous."""
    if is_parquet(path):
        return FORMATS["table"]
    lines = sample(path, max_line_mb)
    first, name = lines[0], path.name.removesuffix(".gz")
    if name.endswith("_time_org_rank.txt"):
        items = name.replace("_time_", "_item_")
        raise InputError(
            f"{path.name} holds the times of {items}: give that file, the times are read with it"
        )
    if first.lstrip().startswith("{"):
        return _json(path, lines)
    if name.endswith(".inter") or ":token" in first:
        return FORMATS["inter"]
    if "::" in first:
        return FORMATS["ml-1m"]
    separator = separator_of(first)
    return _separated(path, lines, separator) if separator in first else _order_only(path, lines)


def _json(path: Path, lines: list[str]) -> Format:
    keys = {key for row in json_objects(lines) for key in row}
    if {"user_id", "parent_asin"} <= keys:
        return FORMATS["amazon-2023-json"]
    if {"reviewerID", "asin"} <= keys:
        # Both are read in the same way. Only 2014 has `helpful`.
        return FORMATS["amazon-2014-json" if "helpful" in keys else "amazon-2018-json"]
    if keys:
        return FORMATS["table"]
    raise InputError(
        f"{path.name}, line 1: {lines[0][:80]!r}, expected one whole JSON object a line (a Python dictionary "
        "is none: convert it first)"
    )


def json_objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of lines, without broken ones, which reading reports."""
    for line in lines:
        with contextlib.suppress(msgspec.DecodeError):
            yield msgspec.json.decode(line.encode(), type=dict[str, Any])


_USER, _ASIN = r"A[0-9A-Z]{10,}", r"([0-9]{9}[0-9X]|B[0-9A-Z]{9})"  # Amazon's ids


def _separated(path: Path, lines: list[str], separator: str) -> Format:
    header = [field.strip('"') for field in lines[0].split(separator)]
    for name in ("movielens-csv", "amazon-2023-csv"):
        if separator == "," and set(FORMATS[name].names) <= set(header):
            return FORMATS[name]
    if not any(map(is_number, header)) or is_header(header):
        return FORMATS["table"]
    if separator == "\t" and len(header) == 2:
        return _order_only(path, lines)
    if (
        separator == "\t"
        and len(header) == 4
        and re.fullmatch(r"u[0-9a-z]?\.(data|base|test)(\.gz)?", path.name)
    ):
        return FORMATS["ml-100k"]
    rows = [line for line in lines if line.count(",") == 3]
    if separator == "," and len(rows) >= 0.9 * len(lines):
        for name, ids in (("amazon-2014-csv", f"{_USER},{_ASIN},"), ("amazon-2018-csv", f"{_ASIN},{_USER},")):
            if all(re.match(ids, line) for line in rows):
                return FORMATS[name]
    raise InputError(
        f"{path.name} has no header, and its content does not show which column is the user's (line 1: "
        f"{lines[0][:80]!r}): give format ml-100k (user, item, rating, time, separated by TAB), "
        "amazon-2014-csv (USER,ITEM,rating,time), amazon-2018-csv (ITEM,USER,rating,time) or positions, "
        "columns user=1,item=2,time=3"
    )


# The last word of a line that ends with a time: a clock, a date or seconds since 1970.
_END_OF_TIME = r"\d{1,2}:\d\d(:\d\d\S*)?|\d{4}[-/]\d\d?[-/]\d\d?\S*|(1\d{9}|[6-9]\d{8})(\.\d+|\d{3})?"


def _order_only(path: Path, lines: list[str]) -> Format:
    """Return one user or one interaction a line: only the latter repeats users."""
    for separator in ",;|\t":
        if separator not in lines[0] and 2 * sum(separator in line for line in lines) >= len(lines):
            raise InputError(
                f"{path.name}, line 1: {lines[0][:80]!r}, but lines below it are separated by {separator!r}: "
                "remove lines above the table"
            )
    rows = [line.split() for line in lines]
    sizes = set(map(len, rows))
    users_repeat = len({row[0] for row in rows}) < len(rows)
    times = [row[-1] for row in rows if len(row) > 2 and re.fullmatch(_END_OF_TIME, row[-1])]
    if min(Counter(map(len, rows)).most_common(1)[0][1], len(times)) > len(rows) / 2:
        raise InputError(
            f"{path.name}: most lines are of one length and end as times do ({times[0]!r}), so it may be one "
            "interaction a line, which needs commas or TABs; give format user-per-line if these are items"
        )
    if max(sizes) > 2 and not users_repeat:
        return FORMATS["user-per-line"]
    if sizes == {2} and users_repeat:
        return FORMATS["pair-per-line"]
    problem = "the format was not recognised"
    if sizes == {2}:
        problem = (
            "every line has two fields and no user has two lines, so it may be one user or one interaction a "
            "line (user-per-line, pair-per-line)"
        )
    raise InputError(
        f"{path.name}: {problem} (line 1: {lines[0][:80]!r}); give format, one of {', '.join(FORMATS)}"
    )


def separator_of(line: str) -> str:
    """Return the separator that occurs most often in a line, of comma, TAB, semicolon and bar."""
    return max(",\t;|", key=line.count)


def obvious(role: str, names: Iterable[str]) -> list[str]:
    """Return the names of columns that are obvious for a role."""
    return [name for name in names if re.sub(r":.*|[_\- ]", "", name.lower()) in OBVIOUS[role]]


def is_header(row: list[str]) -> bool:
    """Return whether a row has an obvious name of a user or item column."""
    return any(obvious(role, row) for role in ("user", "item"))


def is_number(text: str) -> bool:
    """Return whether a field reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- titles -------------------------------------------------------------------------------------------


def titles_beside(path: Path) -> Path | None:
    """Return the file of titles beside the interactions `path`, None where there is none.

    ml-100k: u.item; ml-1m: movies.dat; ratings.csv: movies.csv; RecBole: X.item beside X.inter;
    SeqRec-Benchmark's user2item.csv: item2title.csv; Amazon's category X: meta_X.json or meta_X.jsonl. All
    also with .gz.
    """
    plain = path.name.removesuffix(".gz")
    stem = plain.rpartition(".")[0]
    category = re.sub(r"^(reviews|ratings)_|_5$|_10$|_rating_only$|\.(train|valid|test).*$", "", stem)
    names = {"u.data": ["u.item"], "ratings.dat": ["movies.dat"], "ratings.csv": ["movies.csv"]}
    names["user2item.csv"] = ["item2title.csv"]
    choices = names.get(plain, [f"{stem}.item", f"meta_{category}.json", f"meta_{category}.jsonl"])
    for name in choices:
        for candidate in (path.parent / name, path.parent / f"{name}.gz"):
            if candidate.is_file() and candidate != path:
                return candidate
    return None


def read_titles(path: Path, items: Collection[str]) -> dict[str, str]:
    """Return raw item id -> title, for the given `items` only; the first title of an item is used."""
    plain = path.name.removesuffix(".gz")
    selected = items if isinstance(items, set | frozenset | dict) else set(items)
    if plain == "u.item" or plain.endswith(".dat"):
        pairs = _fields_of_titles(path, "|" if plain == "u.item" else "::")
    elif plain.endswith((".csv", ".item")):
        pairs = _table_of_titles(path, "," if plain.endswith(".csv") else "\t")
    else:
        pairs = _amazon_titles(path, selected)
    titles: dict[str, str] = {}
    for item, title in pairs:
        if item in selected and (title := " ".join(title.split())):
            titles.setdefault(item, title)
    return titles


_COLOURS = (
    r"(?:(?:dark|light|bright|deep|hot|matte|metallic|midnight|pearl|royal|sky|space|jet|sea)[\s-]+)?"
    "(?:aqua|beige|black|blue|bronze|brown|burgundy|champagne|charcoal|chrome|clear|coral|cream|crimson|cyan|"
    "fuchsia|golden|gold|gray|graphite|green|grey|gunmetal|indigo|ivory|khaki|lavender|lilac|lime|magenta|"
    "maroon|mint|multicolor|navy|olive|orange|peach|pink|plum|purple|red|rose|salmon|silver|slate|tan|teal|"
    "titanium|transparent|turquoise|violet|white|yellow)"
)
_AMOUNT = r"(?<![\w.])(?<![a-z]-)\d+(?:[.,]\d+)*(?:\s*[/-]\s*\d+(?:\.\d+)?)?[\s-]*"  # a number or a range
_INCHES = r"(?:(?:inch(?:es)?|in(?![\s-]*\d))\b|[\"'″′”’]+)"
_MILLIMETRES = r"(?:mm|millimet(?:er|re)s?)\b"
_UNITS = (
    r"(?:feet|foot|ft|yards?|yds?|cm|centimet(?:er|re)s?|met(?:er|re)s?|m|[gtm]b|oz|ounces?|lbs?|packs?|pk|"
    r"pcs?|pieces?|counts?|ct|rolls?|sheets?|discs?)\b"
)


def product_of(title: str) -> tuple[str, ...]:
    """Return the words of a title that are equal for all variants of a product.

    The title in lower case, without numbers with a unit (of length, storage, weight or count), "pack of N",
    and colours. Inches after "for" are kept, since they belong to another product that this one fits; so are
    millimetres beside an aperture, which distinguish lenses. Punctuation is dropped except "+" (DVD+R). For
    fewer than three words the result is empty. The rule was checked by eye on 200 pairs of Amazon Electronics
    2018; variants with other model numbers, word orders or misspellings are not recognised.
    """
    text = html.unescape(title).lower()
    head, word, tail = text.partition(" for ")
    lens = re.search(r"\bf/?\d", text)
    for units in (_UNITS, *(() if lens else (_MILLIMETRES,))):
        head, tail = (re.sub(_AMOUNT + units, " ", part) for part in (head, tail))
    text = re.sub(_AMOUNT + _INCHES, " ", head) + word + tail
    text = re.sub(rf"\b(?:pack|set|lot|box|spindle)s? of \d+\b|\b{_COLOURS}\b", " ", text)
    words = tuple(re.findall(r"[a-z0-9+]+", text))
    return words if len(words) > 2 else ()


def _text_of(path: Path) -> io.StringIO:
    """Return a small text file in UTF-8 or Latin-1 (early sets of GroupLens)."""
    data = b"".join(block.data for block in RawFile(path, sha256="").blocks())
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return io.StringIO(text, newline="\n")


def _fields_of_titles(path: Path, separator: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_text_of(path), 1):
        fields = line.split(separator, 2)
        if len(fields) < 3:
            raise InputError(
                f"{path.name}, line {number}: expected '{separator}'-separated item, title, date, ..."
            )
        yield fields[0], fields[1]


def _table_of_titles(path: Path, separator: str) -> Iterator[tuple[str, str]]:
    """Yield titles of a table with a header: MovieLens's movies.csv, or RecBole's items with a year."""
    dialect: dict[str, Any] = {} if separator == "," else {"quoting": csv.QUOTE_NONE}
    rows = csv.reader(_text_of(path), delimiter=separator, **dialect)
    names = [field.split(":")[0] for field in next(rows, [])]
    item, title = ([name for name in options if name in names] for options in _TITLE_COLUMNS)
    for row in rows if item and title else ():
        if len(row) != len(names):
            raise InputError(f"{path.name}, line {rows.line_num}: {len(row)} fields, expected {len(names)}")
        # RecBole misspells GroupLens' "unknown"
        fields = {name: value.replace("unkonwn", "unknown") for name, value in zip(names, row, strict=True)}
        year = fields.get("release_year", "").replace("unknown", "")
        yield fields[item[0]], fields[title[0]] + (f" ({year})" if year else "")


_TITLE_COLUMNS = ("item_id", "movieId", "ItemID"), ("movie_title", "title", "Title")


class _Product(msgspec.Struct, gc=False):
    asin: str | None = None
    parent_asin: str | None = None
    title: str | None = None


def _amazon_titles(path: Path, selected: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield titles of Amazon's metadata: JSON lines, in 2014 Python dictionaries; skip unreadable lines."""
    decoder = msgspec.json.Decoder(_Product)
    asin = re.compile(r"'asin': '([^']*)'")
    for block in RawFile(path, sha256="").blocks():
        for line in block.data.decode("utf-8", "replace").split("\n"):
            try:
                product = decoder.decode(line)
                yield product.parent_asin or product.asin or "", product.title or ""
            except msgspec.DecodeError:
                match = asin.search(line)
                if match and match[1] in selected:  # evaluating all lines of 2014 would take minutes
                    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                        title = dict(ast.literal_eval(line)).get("title")
                        yield match[1], title if isinstance(title, str) else ""
