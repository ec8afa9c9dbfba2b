"""Counts the lines of a file that are no valid interactions, and says when there are too many."""

from __future__ import annotations

from collections import Counter
from typing import Any

from reclib.config import InputError

EXAMPLES = 5
TEXT_LENGTH = 120  # characters of a line that are kept as an example


class Rejects:
    """What was rejected of one file, and why."""

    def __init__(self, name: str, strict: bool, max_share: float) -> None:
        self.name = name  # of the file
        self.strict = strict
        self.max_share = max_share
        self.valid = 0  # lines
        self.counts: Counter[str] = Counter()
        self.examples: list[dict[str, Any]] = []

    @property
    def lines(self) -> int:
        """Lines read, rejected ones included."""
        return self.valid + self.counts.total()

    def add(self, line: int, reason: str, detail: str, text: str, count: int = 1) -> None:
        """Count a bad line (or `count` alike, of which it is the first); stop here if strict."""
        if self.strict:
            raise InputError(f"{self.name}, line {line}: {detail}")
        self.counts[reason] += count
        if len(self.examples) < EXAMPLES:
            shown = text[:TEXT_LENGTH].encode("utf-8", "backslashreplace").decode()
            self.examples.append({"line": line, "reason": detail, "text": shown})

    def block_done(self, valid: int) -> None:
        """Count the valid lines of a block; stop where the file's first block holds none at all."""
        self.valid += valid
        if not self.valid and self.counts:
            self._stop()

    def finish(self) -> None:
        """Raise `InputError` if too many lines are bad, or if there are none."""
        rejected = self.counts.total()
        if not self.lines:
            raise InputError(f"{self.name} has a header and nothing below it")
        if rejected > self.max_share * self.lines:
            self._stop()

    def _stop(self) -> None:
        rejected = self.counts.total()
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        first = "; ".join(
            f"{self.name}, line {example['line']}: {example['reason']}" for example in self.examples[:3]
        )
        raise InputError(
            f"{self.name}: {rejected:,} of {self.lines:,} lines rejected, allowed is a share of "
            f"{self.max_share:g} (max_rejected_share): {reasons}; {first}"
        )
