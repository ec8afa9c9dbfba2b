"""Whose turn it is: one timed job at a time on a device, and one run of a notebook for each device.

Locks are `flock`s on files in the folder of stamps, so the system lets go of them when a process dies,
however it dies. A run on the CPU, with whatever number of threads, has all cores for itself; runs on
different GPUs go on at the same time, as each holds its own and shares the cores that feed them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator

from reclib import paths

Tell = Callable[[str], None]


@contextlib.contextmanager
def device(label: str, tell: Tell = print) -> Iterator[None]:
    """Hold the device with this label, waiting while another run of this checkout is timed on it."""
    on_cpu = label.startswith("cpu")
    with _held("cores", shared=not on_cpu, tell=tell):
        if on_cpu:
            yield
            return
        which = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        with _held(f"gpu-{which}", tell=tell):
            yield


@contextlib.contextmanager
def job(label: str, notebook: str, tell: Tell = print) -> Iterator[None]:
    """Hold a notebook on a device: two runs of it would write the same files."""
    with _held(_job(label, notebook), tell=tell):
        yield


@contextlib.contextmanager
def figures(tell: Tell = print) -> Iterator[None]:
    """Hold the folder of figures."""
    with _held("figures", tell=tell):
        yield


def under_way(label: str, notebook: str) -> bool:
    """Whether a run holds, or waits to hold, this notebook on this device."""
    file = paths.stamps() / f"{_job(label, notebook)}.lock"
    if not file.is_file():
        return False
    with file.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _job(label: str, notebook: str) -> str:
    return f"{label}-{notebook}"


@contextlib.contextmanager
def _held(name: str, tell: Tell, shared: bool = False) -> Iterator[None]:
    file = paths.stamps() / (re.sub(r"[^\w.-]", "_", name) + ".lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with file.open("a") as handle:  # closed in children, so that a kernel does not hold it on
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting: another run of this checkout holds {name}")
            fcntl.flock(handle, how)
        yield
