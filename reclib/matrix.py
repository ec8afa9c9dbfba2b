"""Notebooks times devices: one process at a time for each device, and none that takes another down.

Each cell of the matrix is a process of its own (`reclib.study run`), so a crash, a kill or a timeout costs
that cell alone; the same command runs what is left, since finished cells are skipped by their stamps. GPUs of
one label share its notebooks. The CPU comes last: its jobs are timed on the cores that feed the GPUs.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reclib import lifeline, paths
from reclib.config import GPU_LABELS, InputError

Command = Callable[[str, str], list[str]]  # (notebook, label) -> arguments of one cell's process
CPU_LABELS = tuple(label for label in GPU_LABELS if label.startswith("cpu"))


@dataclass(frozen=True)
class Slot:
    """One device of this machine."""

    label: str
    visible: str  # CUDA_VISIBLE_DEVICES of its processes; empty: none, the CPU


def slots(asked: str, gpus: Sequence[tuple[str, str]]) -> list[Slot]:
    """Return the devices that `asked` names: labels separated by commas, or "all" for every visible GPU.

    `gpus` is what `hardware.visible_gpus` returns. Raises `InputError` for a label that is none or not here.
    """
    found: list[Slot] = []
    for label in [part.strip() for part in asked.split(",")]:
        mine = [Slot(own, visible) for visible, own in gpus if label in (own, "all")]
        if label in CPU_LABELS:
            mine = [Slot(label, "")]
        here = ", ".join([*dict.fromkeys(own for _, own in gpus), *CPU_LABELS])
        if (label != "all" and label not in GPU_LABELS) or label == "auto":
            raise InputError(f"--gpus is {asked!r}: {label!r} is no device label; here: {here}, or all")
        if not mine:
            raise InputError(f"--gpus is {asked!r}: there is no visible GPU for {label!r}; here: {here}")
        found += mine
    return list(dict.fromkeys(found))


def visible_gpus() -> list[tuple[str, str]]:
    """Ask a process of its own for the GPUs, so that this one opens none of them."""
    done = subprocess.run(
        [sys.executable, "-m", "reclib.hardware", "visible"],
        capture_output=True,
        text=True,
        env=_environment(),
    )
    if done.returncode:
        raise InputError(f"cannot list the GPUs: {done.stderr.strip().splitlines()[-1]}")
    return [(visible, label) for visible, label in json.loads(done.stdout.splitlines()[-1])]


class Matrix:
    """The cells of a run, and how each ended."""

    def __init__(self, notebooks: Sequence[str], devices: Sequence[Slot], command: Command) -> None:
        self.devices, self.command = devices, command
        self.left = {slot.label: queue.SimpleQueue[str]() for slot in devices}
        for label in self.left:
            for notebook in notebooks:
                self.left[label].put(notebook)
        self.ended: dict[tuple[str, str], str] = {}  # (notebook, label) -> "done" or what went wrong
        self.children: set[subprocess.Popen] = set()
        self.stopping = threading.Event()

    def run(self) -> dict[tuple[str, str], str]:
        """Run every cell; on an interrupt end the processes that are under way and raise it again."""
        gpus = [[slot] for slot in self.devices if slot.visible]
        cpus = [slot for slot in self.devices if not slot.visible]
        try:
            for lanes in (gpus, [cpus] if cpus else []):
                threads = [threading.Thread(target=self._lane, args=(lane,)) for lane in lanes]
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    time.sleep(0.1)
        except KeyboardInterrupt:
            self._stop()
            raise
        return self.ended

    def _lane(self, devices: Sequence[Slot]) -> None:
        for slot in devices:
            while not self.stopping.is_set():
                try:
                    notebook = self.left[slot.label].get_nowait()
                except queue.Empty:
                    break
                self._cell(notebook, slot)

    def _cell(self, notebook: str, slot: Slot) -> None:
        environment = lifeline.start_with() | _environment() | {"CUDA_VISIBLE_DEVICES": slot.visible}
        child = subprocess.Popen(
            self.command(notebook, slot.label),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # an interrupt from the terminal reaches us alone, and we pass it on
        )
        self.children.add(child)
        assert child.stdout is not None
        last = ""
        for line in child.stdout:
            last = line.rstrip() or last
            print(f"[{slot.label}] {line.rstrip()}", flush=True)
        code = child.wait()
        self.children.discard(child)
        self.ended[notebook, slot.label] = outcome(code, last)

    def _stop(self) -> None:
        """End what is under way: by an interrupt, then by force."""
        self.stopping.set()
        for number in (signal.SIGINT, signal.SIGKILL):
            for child in list(self.children):
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(number)
            end = time.monotonic() + lifeline.PATIENCE
            while self.children and time.monotonic() < end:
                time.sleep(0.1)


def outcome(code: int, last: str) -> str:
    """Say how a cell's process ended, from its exit code and the last line that it wrote."""
    if code == 0:
        return "done"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}: the same command runs it again"
    return last or f"exit code {code}"


def _environment() -> dict[str, str]:
    """Return an environment in which children import this code, wherever they start."""
    code = str(paths.CHECKOUT)
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([code, *([inherited] if inherited else [])]),
        "RECLIB_ROOT": str(paths.root()),
        "PYTHONUNBUFFERED": "1",
    }
