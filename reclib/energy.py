"""Joules that a device says it has used: NVIDIA's counter (NVML) on a GPU, RAPL of a Linux CPU's packages.

Both count the whole device, whoever uses it. Counters are updated tens of times a second, so that a reading
over less than `SHORTEST` seconds is none. Where nothing can be read the answer is None, never zero.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

SHORTEST = 2.0  # seconds of a region that can be told from the counter's steps
RAPL = Path("/sys/class/powercap")


class Meter:
    """Joules since it was started, on one device."""

    def __init__(self, device: torch.device) -> None:
        """Start to count."""
        self.read = _nvml(device) if device.type == "cuda" else _rapl()
        self.before = None if self.read is None else self.read()

    def joules(self, seconds: float) -> float | None:
        """Return what was used in the `seconds` since the start; None: not reported, or too short to tell."""
        if self.read is None or self.before is None or seconds < SHORTEST:
            return None
        used = self.read() - self.before
        return used if used > 0 else None  # a counter that wrapped has lost its count


def _rapl(root: Path = RAPL) -> Callable[[], float] | None:
    """Return a reader of all packages; None where the kernel shows none, or not to this user."""
    files = sorted(root.glob("intel-rapl:?/energy_uj"))  # AMD's have the same names
    try:
        if not files or not [file.read_text() for file in files]:
            return None
    except OSError:
        return None
    return lambda: 1e-6 * sum(int(file.read_text()) for file in files)


def _nvml(device: torch.device) -> Callable[[], float] | None:
    """Return a reader of a GPU's counter (Volta and later); None where the driver has none."""
    library = _library()
    if library is None:
        return None
    handle, counted = ctypes.c_void_p(), ctypes.c_ulonglong()
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    if library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None

    def read() -> float:
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(counted)):
            raise OSError("NVML's energy counter could be read before and cannot now")
        return 1e-3 * counted.value  # millijoules

    return None if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(counted)) else read


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return None if library.nvmlInit_v2() else library
