"""Running notebooks: one by papermill (`execute`), unless it is done already (`Job`), all of them (`Matrix`).

While it runs, and if it fails, a notebook is `NN_name.failed.ipynb`; only a complete run takes the name
`NN_name.ipynb`. What papermill and widgets leave in it (absolute paths, times, widget state) is dropped, so
that a diff shows results.

A job that is done has a stamp, which git ignores: only work of this checkout is skipped, never because of a
committed record or notebook. In a matrix each notebook and device is a process of its own: a crash, a kill
or a timeout costs that one alone, and the same command runs what is left. GPUs of one label share its
notebooks. The CPU comes last: its jobs are timed on the cores that feed the GPUs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reclib import parameters, records, system
from reclib.config import CPU_LABELS, GPU_LABELS, InputError

_ERROR_MARKER = "papermill-error-cell-tag"  # of the banner cells that papermill inserts

_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"

Tell = Callable[[str], None]


class NotebookFailed(Exception):
    """A cell raised, ran out of time or took its kernel down; `str()` is one line."""


def failed_path(output: Path) -> Path:
    """Return where the notebook lies while it runs and after it failed."""
    return output.with_suffix(".failed.ipynb")


def check_cell(notebook: Path, expected: list[str]) -> None:
    """Raise `InputError` unless the notebook's parameters cell states exactly the `expected` names."""
    import papermill

    logging.getLogger("papermill").setLevel(logging.ERROR)
    stated = list(papermill.inspect_notebook(str(notebook)))
    if not stated:
        raise InputError(f"{notebook.name} has no cell tagged 'parameters'")
    for name in expected:
        if name not in stated:
            raise InputError(f"{notebook.name}: its parameters cell lacks {name!r}")
    for name in stated:
        if name not in expected:
            raise InputError(f"{notebook.name}: {name!r} in its parameters cell is no parameter")


def execute(
    notebook: Path,
    output: Path,
    values: Mapping[str, Any],
    *,
    cell_seconds: int | None = None,
    records: Path | None = None,
    tell: Tell = print,
) -> None:
    """Run `notebook` with the parameters `values` and leave it at `output`.

    `cell_seconds` is the longest that a cell may take; None: as long as it needs. `records` is where
    results go instead of the study's own folder. Raises `NotebookFailed`; the kernel is gone when
    this returns, whichever way.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    working = failed_path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    progress = _Progress(tell)
    _register(progress)
    kills = system.memory_kills()
    # A short folder of its own: the sockets' path has room for about 100 characters.
    runtime = tempfile.mkdtemp(prefix="reclib-", dir="/tmp" if os.path.isdir("/tmp") else None)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(working),
            parameters=dict(values),
            engine_name="reclib",
            kernel_name="python3",
            progress_bar=False,
            autosave_cell_every=30,
            cwd=str(notebook.parent),
            execution_timeout=cell_seconds,
            runtime_folder=runtime,
            records=records,
        )
        normalise(working)
        os.replace(working, output)
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        raise _failed(notebook, error.exec_count, reason + system.of_error(reason)) from None
    except DeadKernelError:
        code = progress.end_kernel()
        reason = f"DeadKernelError: {system.of_death(code, system.memory_kills() - kills)}"
        raise _failed(notebook, progress.cell, reason) from None
    except (TimeoutError, RuntimeError) as error:  # a cell over its time, a kernel that does not start
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise _failed(notebook, progress.cell, reason + system.of_error(reason)) from None
    except OSError as error:
        if not system.is_full_disk(error):
            raise
        raise _failed(notebook, progress.cell, _put_away(working, error)) from None
    finally:
        progress.end_kernel()
        shutil.rmtree(runtime, ignore_errors=True)


def _put_away(working: Path, error: OSError) -> str:
    """Delete a notebook that the disk had no room for, and say so: a part of one is of no use."""
    working.unlink(missing_ok=True)
    reason = f"[Errno {error.errno}] {error.strerror}, writing {working.name}"
    return reason + system.of_error(reason)


def _failed(notebook: Path, cell: int, reason: str) -> NotebookFailed:
    return NotebookFailed(f"{notebook.stem} failed in cell {cell}: {reason}")


def normalise(notebook: Path) -> None:
    """Drop from a notebook what says nothing about its results, and write it whole or not at all."""
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    for key in ("papermill", "widgets"):
        content.metadata.pop(key, None)
    content.cells = [c for c in content.cells if _ERROR_MARKER not in c.metadata.get("tags", [])]
    for cell in content.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags", True):  # papermill adds an empty list to every cell
            del cell.metadata["tags"]
        for output in cell.get("outputs", []):  # without its state a widget's view is an error to look at
            output.get("data", {}).pop(_WIDGET_VIEW, None)
    system.write_atomically(notebook, nbformat.writes(content).rstrip("\n") + "\n")


class _Progress:
    """Tells of each code cell, once, when it is done."""

    def __init__(self, tell: Tell) -> None:
        self.cell = 0  # code cells begun
        self._tell = tell
        self._title = ""
        self._kernel: subprocess.Popen | None = None

    def watch(self, manager: Any) -> None:
        """Follow the cells of papermill's execution manager."""
        total = sum(cell.cell_type == "code" for cell in manager.nb.cells)
        start, complete = manager.cell_start, manager.cell_complete
        begun = 0.0

        def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> None:
            nonlocal begun
            begun = time.perf_counter()
            if cell.cell_type == "code":
                self.cell += 1
            elif cell.source.startswith("#"):
                self._title = cell.source.splitlines()[0].lstrip("# ")
            start(cell, cell_index, **more)

        def cell_complete(cell: Any, cell_index: int | None = None, **more: Any) -> None:
            complete(cell, cell_index, **more)
            if cell.cell_type == "code":
                seconds = time.perf_counter() - begun
                self._tell(f"  cell {self.cell}/{total}  {seconds:6.1f} s  {self._title}")

        manager.cell_start, manager.cell_complete = cell_start, cell_complete

    def hold(self, kernel: subprocess.Popen) -> None:
        """Remember the kernel's process, to see to its end."""
        self._kernel = kernel

    def end_kernel(self) -> int | None:
        """End the kernel and what it started, if they are still there; return its exit code."""
        if self._kernel is None:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._kernel.pid, signal.SIGKILL)  # a kernel leads a session of its own
        return self._kernel.wait()


def _register(progress: _Progress) -> None:
    """Give papermill an engine that reports to `progress` and starts kernels as we need them."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines
    from traitlets.config import Config

    class Client(PapermillNotebookClient):
        def start_new_kernel(self, **options: Any) -> None:
            super().start_new_kernel(**options)
            progress.hold(self.km.provisioner.process)

    class ReclibEngine(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
            progress.watch(nb_man)
            # Sockets in the file system: TCP ports race between runs, and anyone can connect.
            config = Config({"KernelManager": {"transport": "ipc"}})
            runtime = Path(options["runtime_folder"])
            config.KernelManager.connection_file = str(runtime / "kernel.json")
            client = Client(
                nb_man,
                kernel_name=kernel_name,
                timeout=options["execution_timeout"],
                startup_timeout=options["start_timeout"],
                log=logging.getLogger("papermill"),
                config=config,
            )
            folder = str(options["records"] or system.executed())
            client.execute(env=_environment() | {"RECLIB_RECORDS": folder, "WANDB_SILENT": "true"})

    papermill_engines.register("reclib", ReclibEngine)


def _environment() -> dict[str, str]:
    """Return an environment in which a child uses our root and our code, wherever it starts."""
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {
        "RECLIB_ROOT": str(system.root()),
        "PYTHONPATH": os.pathsep.join([str(system.CHECKOUT), *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
    }


@dataclass(frozen=True)
class Job:
    """One notebook with its parameters, on the device that is here."""

    notebook: str
    values: dict[str, Any]  # as given to the notebook; None: filled there from the device file
    label: str  # of the device that is really here

    @classmethod
    def last(cls, notebook: str, label: str) -> Job:
        """Return the job that this checkout finished last on a device (no values: none)."""
        empty = cls(notebook, {}, label)
        return cls(notebook, empty._stamped().get("values", {}), label)

    @property
    def output(self) -> Path:
        """Where the executed notebook goes."""
        return system.executed() / self.label / f"{self.notebook}.ipynb"

    @property
    def stamp(self) -> Path:
        """The file that says that this checkout has finished this notebook on this device."""
        return system.stamps() / f"{self.label}-{self.notebook}.json"

    def identity(self) -> str:
        """Return a hash of what the outcome depends on: parameters, code, versions."""
        filled = parameters.fill(parameters.build(self.notebook, self.values), self.label)
        parts = {
            "params": parameters.values(filled),
            "code": records.code_hash(self.notebook),
            "versions": records.versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def is_finished(self) -> bool:
        """Whether this checkout finished it with this code, and what it wrote is still there."""
        stamp = self._stamped()
        try:
            return (
                stamp.get("identity") == self.identity()
                and self.output.is_file()
                and stamp.get("output") == system.file_sha256(self.output)
                and self.output.with_name("results.jsonl").is_file()
            )
        except InputError:  # the parameters of then are not valid now
            return False

    def finish(self, identity: str) -> None:
        """Stamp the job as done; `identity` is what it was when it began."""
        stamp = {"identity": identity, "output": system.file_sha256(self.output), "values": self.values}
        system.write_json(self.stamp, stamp)

    def _stamped(self) -> dict[str, Any]:
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return stamp if isinstance(stamp, dict) else {}


Command = Callable[[str, str], list[str]]  # (notebook, label) -> arguments of one cell's process


@dataclass(frozen=True)
class Slot:
    """One device of this machine."""

    label: str
    visible: str  # CUDA_VISIBLE_DEVICES of its processes; empty: none, the CPU


def slots(labels: str, gpus: Sequence[tuple[str, str]]) -> list[Slot]:
    """Return the devices that `labels` names, separated by commas; "all": every visible GPU.

    `gpus` is what `hardware.visible_gpus` returns. Raises `InputError` for a label that is none or not here.
    """
    result: list[Slot] = []
    here = ", ".join([*dict.fromkeys(label for _, label in gpus), *CPU_LABELS])
    for wanted in [part.strip() for part in labels.split(",")]:
        if (wanted != "all" and wanted not in GPU_LABELS) or wanted == "auto":
            raise InputError(f"--gpus is {labels!r}: {wanted!r} is no device label; here: {here}, or all")
        devices = [Slot(label, visible) for visible, label in gpus if wanted in (label, "all")]
        if wanted in CPU_LABELS:
            devices = [Slot(wanted, "")]
        if not devices:
            raise InputError(f"--gpus is {labels!r}: there is no visible GPU for {wanted!r}; here: {here}")
        result += devices
    return list(dict.fromkeys(result))


def visible_gpus() -> list[tuple[str, str]]:
    """Ask a process of its own for the GPUs, so that this one opens none of them."""
    done = subprocess.run(
        [sys.executable, "-m", "reclib", "device", "visible"],
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
        environment = system.start_with() | _environment() | {"CUDA_VISIBLE_DEVICES": slot.visible}
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
            end = time.monotonic() + system.PATIENCE
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
