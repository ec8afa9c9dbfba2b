"""Files of one user a line: `user item item ...` in time order, as S3-Rec and TiCoSeRec publish them.

TiCoSeRec's `X_item_org_rank.txt` has a twin `X_time_org_rank.txt` with the times of the same
interactions, in seconds; where it lies beside, they are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reclib.config import InputError
from reclib.rawfile import RawFile
from reclib.rows import BadLine, Row, checked_time, refuse_other_bytes

ITEMS, TIMES = "_item_org_rank.txt", "_time_org_rank.txt"


def twin(path: Path) -> Path | None:
    """Return the file of times that belongs to a file of items, None where there is none."""
    stem = path.name.removesuffix(".gz").removesuffix(ITEMS)
    if not path.name.removesuffix(".gz").endswith(ITEMS):
        return None
    for name in (stem + TIMES, stem + TIMES + ".gz"):
        if (path.parent / name).is_file():
            return path.parent / name
    return None


class Histories:
    """One pass over a file of histories and its twin."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._users: set[str] = set()
        found = twin(path)
        self._times = RawFile(found) if found else None
        self._time_lines = _lines(self._times) if self._times else None

    def read(self, text: str, first_line: int) -> Iterator[tuple[int, str, list[Row] | BadLine]]:
        """Yield (line, its text, history or what is wrong) for a block of lines.

        Raises `InputError` where the twin does not belong to this file, at the line that shows it.
        """
        for number, line in enumerate(text.removesuffix("\n").split("\n"), first_line):
            times = self._next_times(number, line)
            try:
                yield number, line, self._history(line, times)
            except BadLine as bad:
                yield number, line, bad

    def finish(self) -> tuple[str, dict[str, Any]]:
        """Return the time unit and the provenance of the twin; raise `InputError` if it goes on."""
        if self._times is None or self._time_lines is None:
            return "order", {}
        extra = next(self._time_lines, None)
        if extra is not None:
            raise InputError(
                f"{self._times.path.name} has more lines than {self._path.name}, expected the same number"
            )
        return "s", {"time_file": self._times.path.name, "time_sha256": self._times.sha256}

    def _next_times(self, number: int, line: str) -> list[str] | None:
        if self._times is None or self._time_lines is None:
            return None
        found = next(self._time_lines, None)
        name = self._times.path.name
        if found is None:
            raise InputError(
                f"{name} ends before line {number}, expected as many lines as {self._path.name} has"
            )
        times, items = found.split(), line.split()
        if len(times) != len(items) or times[:1] != items[:1]:
            raise InputError(
                f"{name}, line {number}: user {' '.join(times[:1])!r} with {max(len(times) - 1, 0)} times, "
                f"expected user {' '.join(items[:1])!r} with {max(len(items) - 1, 0)} as in {self._path.name}"
            )
        return times[1:]

    def _history(self, line: str, times: list[str] | None) -> list[Row]:
        refuse_other_bytes(line)
        user, *items = line.split() or [""]
        if not items:
            raise BadLine("number of fields", f"the line is {line[:80]!r}, expected a user and their items")
        if user in self._users:
            raise BadLine(
                "user on a second line",
                f"user {user!r} has a second line, expected one line per user (is it format pair-per-line?)",
            )
        self._users.add(user)
        if times is None:
            return [Row(user, item, None, position) for position, item in enumerate(items)]
        return [
            Row(user, item, None, checked_time(time, "s")) for item, time in zip(items, times, strict=True)
        ]


def _lines(file: RawFile) -> Iterator[str]:
    for block in file.blocks():
        yield from block.data.decode("utf-8", "surrogateescape").removesuffix("\n").split("\n")
