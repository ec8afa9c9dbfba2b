"""A raw text file as blocks of whole lines: unzipped, hashed and never taken for whole when cut.

Blocks are read and unzipped in a thread of their own, some ahead, since unzipping leaves Python's lock
free. Memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from reclib.config import InputError

_unzipper: Callable[[int], Any] = zlib.decompressobj  # takes the window, gives one member's reader
_DAMAGED: tuple[type[Exception], ...] = (zlib.error,)
with contextlib.suppress(ImportError):  # unzips faster, with the same interface and the same result
    from isal import isal_zlib

    _unzipper = isal_zlib.decompressobj
    _DAMAGED = (zlib.error, isal_zlib.error)  # type: ignore[assignment]

GZIP_MAGIC = b"\x1f\x8b"
GZIP_WINDOW = 31  # of `decompressobj`: gzip with its header and checksum
BLOCK_BYTES = 8 << 20  # of text in one block
BLOCKS_AHEAD = 6  # read while others are taken
PIECE_BYTES = 1 << 20  # of the file, read at once
MAX_LINE_BYTES = 64 << 20  # a longer one means that the file is not text of lines
UTF8_PIECE = 1 << 16  # bytes checked at a time
SAMPLE_BYTES = 256 << 10  # of the file, looked at to detect its format


class Block(NamedTuple):
    """Some whole lines of a file."""

    first_line: int  # number of the first one, from 1
    data: bytes  # ends with a line end, except perhaps at the end of the file


class RawFile:
    """One pass over a raw file; `sha256` and `bytes_read` are of the file as it lies, at the end.

    A hash that is known already is not computed again; whoever gives it sees to it that the file is the same.
    """

    def __init__(self, path: Path, *, quoted: bool = False, sha256: str | None = None) -> None:
        self.path = path
        self.size = checked(path).stat().st_size
        self.bytes_read = 0
        self._known = sha256
        self._digest = hashlib.sha256()
        self._quoted = quoted  # whether a line end inside double quotes belongs to a field

    @property
    def sha256(self) -> str:
        """Hexadecimal hash of the bytes read so far: of the file once all blocks were taken."""
        return self._known or self._digest.hexdigest()

    def blocks(self) -> Iterator[Block]:
        """Yield the file; raise `InputError` where it is a gzip file that is cut short or damaged."""
        cut = self._cut()
        with ThreadPoolExecutor(1, thread_name_prefix="read") as ahead:
            coming = deque(ahead.submit(next, cut, None) for _ in range(BLOCKS_AHEAD))
            while (block := coming.popleft().result()) is not None:
                coming.append(ahead.submit(next, cut, None))
                yield block

    def _cut(self) -> Iterator[Block]:
        """Cut the text at line ends."""
        line, held, length = 1, [], 0
        for text in self._text():
            held.append(text)
            length += len(text)
            if length < BLOCK_BYTES:
                continue
            joined = b"".join(held)
            end = self._last_line_end(joined)
            if not end and length > MAX_LINE_BYTES:
                mebibytes = length >> 20
                raise InputError(
                    f"{self.path.name}, line {line}: no line end outside of quotes in {mebibytes} MiB"
                )
            if end:
                yield Block(line, joined[:end])
                line += joined.count(b"\n", 0, end)
            held, length = [joined[end:]], len(joined) - end
        last = b"".join(held)
        if last:
            yield Block(line, last)

    def _last_line_end(self, text: bytes) -> int:
        """Return where to cut: 0 if there is no line end outside of quotes."""
        end = text.rfind(b"\n") + 1
        quotes = text.count(b'"', 0, end) if self._quoted else 0
        while end and quotes % 2:
            earlier = text.rfind(b"\n", 0, end - 1) + 1
            quotes -= text.count(b'"', earlier, end)
            end = earlier
        return end

    def _text(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            first = file.read(PIECE_BYTES)
            pieces = self._pieces(first, file)
            yield from self._unzipped(pieces) if first.startswith(GZIP_MAGIC) else pieces

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
        fresh = True  # nothing was given to this member yet
        for piece in pieces:
            while piece:
                if fresh:
                    piece = piece.lstrip(b"\0")  # padding between members or after the last
                    if not piece:
                        break
                yield self._inflated(member, piece)
                fresh, piece = member.eof, member.unused_data if member.eof else b""
                if member.eof:
                    member = _unzipper(GZIP_WINDOW)
        if not fresh:
            raise InputError(
                f"{self.path.name} is cut short: its gzip stream has no end after {self.bytes_read:,} bytes; "
                "fetch it again"
            )

    def _inflated(self, member: Any, piece: bytes) -> bytes:
        try:
            return member.decompress(piece)
        except _DAMAGED as error:
            raise InputError(
                f"{self.path.name} is damaged near byte {self.bytes_read:,}: {error}; fetch it again"
            ) from None


def checked(path: Path) -> Path:
    """Return `path` if it is a file that can be read; raise `InputError` that says why it is not."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, expected a file")
    try:
        with path.open("rb") as file:
            start = file.read(2)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist, expected a file") from None
    except PermissionError:
        raise InputError(f"{path} cannot be read: no permission") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not start:
        raise InputError(f"{path.name} is empty, expected one interaction per line")
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path.name} is UTF-16 text, expected UTF-8: save it as UTF-8")
    return path


def sample(path: Path) -> bytes:
    """Return the first part of the text, a quarter of a MiB or more where the file has it.

    A gzip file that is cut short gives what can be read of it: the pass over the whole file tells.
    """
    with checked(path).open("rb") as file:
        start = file.read(SAMPLE_BYTES)
    if not start.startswith(GZIP_MAGIC):
        return start
    text = _first_member(path, start)
    if not text.strip() and path.stat().st_size <= SAMPLE_BYTES:
        raise InputError(f"{path.name} is empty or cut short, expected one interaction per line")
    return text


def _first_member(path: Path, start: bytes) -> bytes:
    try:
        return _unzipper(GZIP_WINDOW).decompress(start)
    except _DAMAGED as error:
        raise InputError(f"{path.name} is damaged near its start: {error}; fetch it again") from None


def lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the lines of a side file, zipped or not, without their ends; undecodable bytes are replaced."""
    opened = gzip.open if checked(path).suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding=encoding, errors="replace", newline="\n") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path.name} is cut short or damaged ({error}); fetch it again") from None


def line_count(data: bytes) -> int | None:
    """Return the number of lines; None where NUL or bytes that are not UTF-8 need a closer look.

    Blank lines show themselves later: readers of whole blocks pass over them, so that the number of
    rows is another.
    """
    if b"\0" in data:
        return None
    if not (data.isascii() or _is_utf8(data)):
        return None
    return data.count(b"\n") + (not data.endswith(b"\n"))


def _is_utf8(data: bytes) -> bool:
    """Return whether all of it is UTF-8; decoded piece by piece, so that what is made stays in cache."""
    view, start = memoryview(data), 0
    while start < len(data):
        piece = view[start : start + UTF8_PIECE]
        try:
            _, taken = codecs.utf_8_decode(piece, "strict", start + len(piece) == len(data))
        except UnicodeDecodeError:
            return False
        start += taken
    return True
