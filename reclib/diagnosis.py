"""Why a notebook or a process did not get through, and what its owner can do about it."""

from __future__ import annotations

import errno
import re
import signal
from pathlib import Path

# How the system counts what it killed for memory: this container's count, else the machine's.
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEMORY = re.compile(r"MemoryError|OutOfMemoryError|out of memory|can't allocate memory", re.IGNORECASE)
_LESS_MEMORY = "lower batch_size or micro_batch_size, or choose a smaller size"
AGAIN = "the same command goes on from the last checkpoint"


def memory_kills(files: tuple[Path, ...] = _COUNTERS) -> int:
    """Return how many processes the system has killed for memory so far, as far as it says."""
    for file in files:
        if file.is_file() and (found := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)):
            return int(found[1])
    return 0


def of_death(code: int | None, kills: int, who: str = "its kernel") -> str:
    """Say what ended a process: its exit code (minus the signal), and memory kills while it ran."""
    if code == -signal.SIGKILL and kills:
        return f"{who} was killed, and the system killed a process for memory: {_LESS_MEMORY}; {AGAIN}"
    if code == -signal.SIGKILL:
        return (
            f"{who} was killed by SIGKILL, by somebody or for memory (`dmesg` tells): if for memory, "
            f"{_LESS_MEMORY}; {AGAIN}"
        )
    if code is not None and code < 0:
        return f"{who} died of {signal.Signals(-code).name}; {AGAIN}"
    return f"{who} ended with exit code {code}; {AGAIN}"


def of_error(said: str) -> str:
    """Return what to do about an error that a cell raised, "" where it says so itself."""
    if _MEMORY.search(said):
        return f"; out of memory: {_LESS_MEMORY}"
    if any(re.search(rf"\[Errno {number}\]", said) for number in _DISK) or "No space left" in said:
        return f"; the disk is full or a limit is reached: free some space, {AGAIN}"
    if "CellTimeoutError" in said:
        return f"; it took longer than --timeout allows: {AGAIN}"
    return ""


def is_full_disk(error: OSError) -> bool:
    """Whether an error says that nothing more can be written."""
    return error.errno in _DISK
