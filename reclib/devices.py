"""Devices that are not here: what their makers say of them, from `params/devices.yaml`.

A gpu label may stand for several boards ("v100" for 16 and 32 GB). Whoever needs one number of a label gets
it only where its boards agree: an unknown device has no peak, and so no MFU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import yaml

from reclib import paths
from reclib.config import InputError, nearest

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Board:
    """One device of the catalogue."""

    label: str
    name: str
    capability: tuple[int, int]  # CUDA compute capability
    memory_bytes: int
    bandwidth: float  # bytes/s between processor and memory
    power: float  # W, at most
    peaks: dict[str, float] = field(hash=False)  # dense FLOP/s by precision
    source: str
    build: str = ""  # what torch build it needs, where not any

    def precision(self, asked: str = "auto") -> str:
        """Return what `asked` means here: auto is bf16 from capability 8.0, below it fp16.

        Raises `InputError` for a precision that the device has no units for.
        """
        chosen = ("bf16" if self.capability >= (8, 0) else "fp16") if asked == "auto" else asked
        if chosen not in self.peaks:
            known = ", ".join(self.peaks)
            raise InputError(f"precision {chosen!r}: {self.name} has no units for it; allowed: {known}")
        return chosen


@functools.cache
def catalogue() -> dict[str, Board]:
    """Return every device by label."""
    file = paths.params() / "devices.yaml"
    return {label: _board(label, given) for label, given in yaml.safe_load(file.read_text("utf-8")).items()}


def _board(label: str, given: dict[str, Any]) -> Board:
    own = dict(given)
    own |= {
        "capability": tuple(own["capability"]),
        "memory_bytes": int(own.pop("memory") * GIB),
        "bandwidth": own["bandwidth"] * 1e9,
        "peaks": {name: value * 1e12 for name, value in own["peaks"].items()},
    }
    return Board(**own, label=label)


def boards(label: str) -> list[Board]:
    """Return the boards that a label stands for: itself, or all that begin with it; raise `InputError`."""
    found = [board for name, board in catalogue().items() if name == label or name.startswith(f"{label}-")]
    if not found:
        known = ", ".join(catalogue())
        raise InputError(f"unknown device {label!r}{nearest(label, catalogue())}; known: {known}")
    return found


def of_memory(family: str, memory_bytes: int) -> Board | None:
    """Return the board of a family with the memory nearest to this; None for a family that is not known."""
    found = [board for name, board in catalogue().items() if name.partition("-")[0] == family]
    return min(found, key=lambda board: abs(board.memory_bytes - memory_bytes), default=None)


def peak_flops(label: str, precision: str) -> float | None:
    """Return the dense peak of a label; None for a CPU and for whatever is not in the catalogue."""
    try:
        peaks = {board.peaks.get(precision) for board in boards(label)}
    except InputError:
        return None
    return peaks.pop() if len(peaks) == 1 else None
