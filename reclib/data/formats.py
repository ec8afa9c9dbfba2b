"""Raw files: checked, unzipped and cut into lines; the formats they are published in; titles beside them.

Detection looks at the content: two formats that cannot be told apart are never guessed, the user is
asked for `format`. The traps it knows: ratings-only files of Amazon 2014 are USER,ITEM,... and those of
2018 are ITEM,USER,...; a file of two fields a line may be one user or one interaction a line.

Sources: the README files of MovieLens (GroupLens); https://jmcauley.ucsd.edu/data/amazon (2014),
https://nijianmo.github.io/amazon (2018), https://amazon-reviews-2023.github.io; RecBole's atomic files.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import hashlib
import re
import stat
import zlib
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec

from reclib.config import InputError

_unzipper: Callable[[int], Any] = zlib.decompressobj  # takes the window, gives one member's reader

_DAMAGED: tuple[type[Exception], ...] = (zlib.error,)

with contextlib.suppress(ImportError):  # unzips faster, with the same interface and the same result
    from isal import isal_zlib

    _unzipper = isal_zlib.decompressobj
    _DAMAGED = (zlib.error, isal_zlib.error)  # type: ignore[assignment]

GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"

GZIP_WINDOW = 31  # of `decompressobj`: gzip with its header and checksum

BLOCK_BYTES = 4 << 20  # of text in one block

BLOCKS_AHEAD = 6  # read while others are taken

PIECE_BYTES = 1 << 20  # of the file or of unzipped text, held at once

MAX_LINE_BYTES = 16 << 20  # a longer line means that the file is not text of lines

SAMPLE_BYTES = 256 << 10  # of the text, looked at to detect the format

SAMPLE_LINES = 1000

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

PACKED = {  # first bytes -> what the file is
    b"PK\x03\x04": "a zip archive",
    b"\xfd7zXZ\0": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
}

# ---- raw files ----------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Some whole lines of a file."""

    first_line: int  # number of the first one, from 1
    data: bytes  # ends with a line end, except perhaps at the end of the file; CRLF is LF


class RawFile:
    """One pass over a raw file; `sha256` and `bytes_read` are of the file as it lies, at the end.

    Memory does not grow with the file, however well it is compressed. A hash that is known already is not
    computed again; whoever gives it sees to it that the file is the same.
    """

    def __init__(
        self, path: Path, *, sha256: str | None = None, max_line_bytes: int = MAX_LINE_BYTES
    ) -> None:
        self.path = path
        self.size = checked(path).stat().st_size
        self.bytes_read = 0
        self.max_line_bytes = max_line_bytes
        self._known = sha256
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hexadecimal hash of the bytes read so far: of the file once all blocks were taken."""
        return self._known or self._digest.hexdigest()

    def blocks(self) -> Iterator[Block]:
        """Yield the file; raise `InputError` where it is a gzip file that is cut short or damaged.

        Blocks are read and unzipped in a thread of their own, some ahead.
        """
        cut = self._cut()
        with ThreadPoolExecutor(1, thread_name_prefix="read") as ahead:
            coming = deque(ahead.submit(next, cut, None) for _ in range(BLOCKS_AHEAD))
            while (block := coming.popleft().result()) is not None:
                coming.append(ahead.submit(next, cut, None))
                yield block

    def _cut(self) -> Iterator[Block]:
        """Cut the text at line ends."""
        line, held, length, unended = 1, [], 0, 0  # `unended`: bytes after the last line end
        for text in self.text():
            held.append(text)
            length += len(text)
            end = text.rfind(b"\n") + 1
            unended = len(text) - end if end else unended + len(text)
            if unended > self.max_line_bytes:
                number = line + sum(piece.count(b"\n") for piece in held)
                raise InputError(
                    f"{self.path.name}, line {number}: longer than {self.max_line_bytes:,} bytes, expected "
                    "text of lines"
                )
            if length >= BLOCK_BYTES and unended < length:
                joined = b"".join(held)
                whole = joined[: length - unended]
                yield Block(line, whole.replace(b"\r\n", b"\n"))
                line += whole.count(b"\n")
                held, length = [joined[length - unended :]], unended
        last = b"".join(held)
        if last:
            yield Block(line, last.replace(b"\r\n", b"\n"))

    def text(self) -> Generator[bytes, None, None]:
        """Yield the bytes of the text, unzipped, without a byte-order mark."""
        with self.path.open("rb") as file:
            first = file.read(PIECE_BYTES)
            pieces = self._pieces(first, file)
            if first.startswith(GZIP_MAGIC):
                pieces = (text for text in self._unzipped(pieces) if text)
            yield next(pieces, b"").removeprefix(BYTE_ORDER_MARK)
            yield from pieces

    def _pieces(self, piece: bytes, file: BinaryIO) -> Iterator[bytes]:
        while piece:
            if self._known is None:
                self._digest.update(piece)
            self.bytes_read += len(piece)
            yield piece
            piece = file.read(PIECE_BYTES)

    def _unzipped(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Unzip all members of the file; each has its own checksum, which zlib compares."""
        member = _unzipper(GZIP_WINDOW)
        fresh, more = True, False  # nothing was given to this member yet; it may hold more text
        for piece in pieces:
            while piece or more:
                if fresh:
                    piece = piece.lstrip(b"\0")  # padding between members or after the last
                    if not piece:
                        break
                try:
                    text = member.decompress(piece, PIECE_BYTES)
                except _DAMAGED as error:
                    raise InputError(
                        f"{self.path.name} is damaged near byte {self.bytes_read:,}: {error}; fetch it again"
                    ) from None
                yield text
                fresh, piece = member.eof, member.unused_data if member.eof else member.unconsumed_tail
                more = not fresh and len(text) == PIECE_BYTES
                if fresh:
                    member = _unzipper(GZIP_WINDOW)
        if not fresh:
            raise InputError(
                f"{self.path.name} is cut short: its gzip stream has no end after {self.bytes_read:,} bytes; "
                "fetch it again"
            )


def checked(path: Path) -> Path:
    """Return `path` if it is a file that can be read; raise `InputError` that says why it is not."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder, expected a file")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            kind = "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
            raise InputError(f"{path} is {kind}, expected a file: write its content to a file first")
        with path.open("rb") as file:
            start = file.read(8)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist, expected a file") from None
    except PermissionError:
        raise InputError(f"{path} cannot be read: no permission") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise InputError(f"{path.name} is empty, expected one interaction per line")
    for magic, kind in PACKED.items():
        if start.startswith(magic):
            raise InputError(f"{path.name} is {kind}: unpack it and give the file inside (gzip is read)")
    return path


def is_parquet(path: Path) -> bool:
    """Return whether the file begins as a Parquet file."""
    with checked(path).open("rb") as file:
        return file.read(len(PARQUET_MAGIC)) == PARQUET_MAGIC


def sample(path: Path) -> list[str]:
    """Return the first lines of the text that are not blank; raise `InputError` if it is no text of lines."""
    data = b""
    with contextlib.closing(RawFile(path, sha256="").text()) as text:
        while len(data) < SAMPLE_BYTES and (piece := next(text, b"")):
            data += piece
    if not data.strip():
        raise InputError(f"{path.name} is empty, expected one interaction per line")
    inside = {GZIP_MAGIC: "another gzip file", PARQUET_MAGIC: "a Parquet file", **PACKED}
    kind = next((kind for magic, kind in inside.items() if data.startswith(magic)), None)
    if kind is None and data[257:262] == b"ustar":
        kind = "a tar archive"
    if kind is not None:
        raise InputError(f"{path.name} holds {kind}: unpack it and give the file inside")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[:200].count(b"\0") > len(data[:200]) // 4:
        raise InputError(f"{path.name} is UTF-16 text, expected UTF-8: save it as UTF-8")
    if b"\n" not in data and b"\r" in data:
        raise InputError(f"{path.name}: lines end with CR alone, expected LF or CRLF")
    lines = data.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")
    # the last line of a sample may be cut
    lines = lines[:-1] if len(lines) > 1 and len(data) >= SAMPLE_BYTES else lines
    return [line for line in lines if line.strip()][:SAMPLE_LINES]


# ---- formats ------------------------------------------------------------------------------------------

FOUR = ("user", "item", "rating", "time")

# Names of columns that say what they hold: compared without case, "_", "-", spaces and RecBole's ":type".
OBVIOUS = {
    "user": ("user", "userid", "reviewerid"),
    "item": ("item", "itemid", "movieid", "parentasin", "asin", "productid", "prodid"),
    "time": ("timestamp", "time", "unixreviewtime", "date", "datetime"),
    "rating": ("rating", "overall"),
}


@dataclass(frozen=True)
class Format:
    """What the lines of a file look like."""

    name: str
    about: str  # for people: which files these are
    kind: Literal["fields", "json", "sequences", "table"]
    separator: str = ""  # between fields; "" is found in the first line
    fields: tuple[str, ...] = ()  # without a header: what each field is
    names: tuple[tuple[str, str], ...] = ()  # with a header, or JSON: what it is -> its name there
    order: bool = False  # whether the lines are in time order, without times
    line_end: bool = True  # whether a last line without an end means that the file is cut short


_MOVIELENS = (("user", "userId"), ("item", "movieId"), ("rating", "rating"), ("time", "timestamp"))

_AMAZON = (("user", "reviewerID"), ("item", "asin"), ("rating", "overall"), ("time", "unixReviewTime"))

_AMAZON_2023 = (("user", "user_id"), ("item", "parent_asin"), ("rating", "rating"), ("time", "timestamp"))

_RECBOLE = (("user", "user_id"), ("item", "item_id"), ("rating", "rating"), ("time", "timestamp"))

_SWAPPED = ("item", "user", "rating", "time")

_ALL = [
    Format("ml-100k", "u.data: TAB, user item rating time", "fields", "\t", FOUR),
    Format("ml-1m", "ratings.dat: '::'", "fields", "::", FOUR),
    Format("movielens-csv", "ratings.csv of 20M and later", "fields", ",", names=_MOVIELENS),
    Format("amazon-2014-json", "reviews_X.json", "json", names=_AMAZON, line_end=False),
    Format("amazon-2018-json", "X.json, X_5.json", "json", names=_AMAZON, line_end=False),
    Format("amazon-2023-json", "X.jsonl", "json", names=_AMAZON_2023, line_end=False),
    Format("amazon-2014-csv", "ratings_X.csv: USER,ITEM,...", "fields", ",", FOUR),
    Format("amazon-2018-csv", "X.csv: ITEM,USER,...", "fields", ",", _SWAPPED),
    Format("amazon-2023-csv", "X.csv with a header", "fields", ",", names=_AMAZON_2023),
    Format("inter", "RecBole's X.inter: TAB, name:type", "fields", "\t", names=_RECBOLE),
    Format("user-per-line", "user item item ..., in time order", "sequences", order=True),
    Format("pair-per-line", "user item, in time order", "fields", "", ("user", "item"), order=True),
    Format("table", "your own CSV, TSV, JSON lines or Parquet, by `columns`", "table", line_end=False),
]

FORMATS: dict[str, Format] = {format.name: format for format in _ALL}


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
    if is_parquet(path):
        return FORMATS["table"]
    lines = sample(path)
    name = path.name.removesuffix(".gz")
    if name.endswith("_time_org_rank.txt"):
        items = name.replace("_time_", "_item_")
        raise InputError(
            f"{path.name} holds the times of {items}: give that file, the times are read with it"
        )
    first = lines[0]
    if first.startswith("{"):
        return _json(path, lines)
    if first.lstrip().startswith("["):
        raise InputError(f"{path.name}: a JSON array, expected one JSON object a line (jq -c '.[]' makes it)")
    if name.endswith(".inter") or ":token" in first:
        return FORMATS["inter"]
    if "::" in first:
        return FORMATS["ml-1m"]
    if any(separator in first for separator in ",\t;|"):
        return _fields(path, lines, first)
    return _order_only(path, lines)


def json_keys(lines: list[str]) -> list[str]:
    """Return the keys of JSON objects, in the order in which they are met; broken lines have none."""
    keys: dict[str, None] = {}
    for line in lines:
        with contextlib.suppress(msgspec.DecodeError):  # reported with its number when it is read
            keys |= dict.fromkeys(msgspec.json.decode(line.encode(), type=dict[str, Any]))
    return list(keys)


def _json(path: Path, lines: list[str]) -> Format:
    keys = set(json_keys(lines))
    if {"user_id", "parent_asin"} <= keys:
        return FORMATS["amazon-2023-json"]
    if {"reviewerID", "asin"} <= keys:
        # Both vintages are read alike. Only 2014 has `helpful`; 2018 has `verified` in its place.
        return FORMATS["amazon-2014-json" if "helpful" in keys else "amazon-2018-json"]
    if keys:
        return FORMATS["table"]
    if lines[0].startswith("{'"):
        raise InputError(f"{path.name}, line 1: a Python dictionary, expected JSON; convert the file first")
    raise InputError(f"{path.name}, line 1: {lines[0][:80]!r}, expected one whole JSON object a line")


def _fields(path: Path, lines: list[str], first: str) -> Format:
    separator = separator_of(first)
    header = [field.strip('"') for field in first.split(separator)]
    if separator == ",":
        if header[:4] == [name for _, name in _MOVIELENS]:
            return FORMATS["movielens-csv"]
        if header[:4] == [name for _, name in _AMAZON_2023]:
            return FORMATS["amazon-2023-csv"]
    if not any(is_number(field) for field in header) or is_header(header):
        return FORMATS["table"]
    rows = [line.split(separator) for line in lines]
    if separator != "\t":
        return _amazon_csv(path, rows)
    if len(header) == 2:
        return _order_only(path, lines)
    if len(header) == 4 and re.fullmatch(r"u[0-9a-z]?\.(data|base|test)(\.gz)?", path.name):
        return FORMATS["ml-100k"]
    raise InputError(
        f"{path.name} has no header, and its content does not show which column is the user's (line 1: "
        f"{first[:80]!r}): give format ml-100k (user, item, rating, time, separated by TAB) or positions, "
        "columns user=1,item=2,time=3"
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
    for separator in ",;|":
        if sum(separator in line for line in lines) > len(lines) / 2:
            raise InputError(
                f"{path.name}, line 1: {lines[0][:80]!r}, but lines below it are separated by '{separator}': "
                "remove lines above the table"
            )
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


def obvious(what: str, names: Iterable[str]) -> list[str]:
    """Return those names of columns that clearly hold `what`."""
    return [name for name in names if re.sub(r":.*|[_\- ]", "", name.lower()) in OBVIOUS[what]]


def is_header(row: list[str]) -> bool:
    """Return whether a first row clearly names its columns."""
    return any(obvious(what, row) for what in ("user", "item"))


def is_number(text: str) -> bool:
    """Return whether a field reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- titles -------------------------------------------------------------------------------------------


def titles_beside(path: Path) -> Path | None:
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


def read_titles(path: Path, items: Collection[str]) -> dict[str, str]:
    """Return raw item id -> title for those of `items` that the file has; the first one counts.

    Only these are kept, since a catalogue of Amazon has millions.
    """
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


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a side file, zipped or not, without their ends."""
    for block in RawFile(path, sha256="").blocks():
        yield from block.data.decode("utf-8", "replace").removesuffix("\n").split("\n")


def _split(path: Path, separator: str, least: int) -> Iterator[tuple[str, str]]:
    """Lines of item, title, ...: GroupLens wrote its first sets in Latin-1 and later ones in UTF-8."""
    data = b"".join(block.data for block in RawFile(path, sha256="").blocks())
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        fields = line.split(separator, 2)
        if len(fields) < least:
            raise InputError(
                f"{path.name}, line {number}: expected '{separator}'-separated item, title, date, ..."
            )
        yield fields[0], fields[1].strip()


def _movies_csv(path: Path) -> Iterator[tuple[str, str]]:
    table = csv.DictReader(_lines(path))
    if not {"movieId", "title"} <= set(table.fieldnames or []):
        return
    for row in table:
        yield row["movieId"], (row["title"] or "").strip()


def _recbole(path: Path) -> Iterator[tuple[str, str]]:
    """RecBole's table of items: `movie_title`, else `title`; the year is a column apart."""
    table = _lines(path)
    names = [field.split(":")[0] for field in next(table, "").split("\t")]
    title = next((name for name in ("movie_title", "title") if name in names), None)
    if "item_id" not in names or title is None:
        return
    for number, line in enumerate(table, 2):
        fields = dict(zip(names, line.split("\t"), strict=False))
        if len(fields) != len(names):
            raise InputError(f"{path.name}, line {number}: expected {len(names)} fields separated by TAB")
        # RecBole has "unkonwn" for GroupLens' "unknown"
        text = "unknown" if fields[title] == "unkonwn" else fields[title]
        year = fields.get("release_year", "")
        yield fields["item_id"], text if year in ("", "unkonwn") else f"{text} ({year})"


class _Product(msgspec.Struct, gc=False):
    asin: str | None = None
    parent_asin: str | None = None
    title: str | None = None


def _amazon(path: Path, wanted: Collection[str]) -> Iterator[tuple[str, str]]:
    """Amazon's metadata: JSON lines, in 2014 Python dictionaries; unreadable lines have no title."""
    decoder = msgspec.json.Decoder(_Product)
    asin = re.compile(r"'asin': '([^']*)'")
    for line in _lines(path):
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
