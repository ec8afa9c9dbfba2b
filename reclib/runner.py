"""Running notebooks: one by papermill (`execute`), unless it is done already (`run`), or several (`run_all`).

While it runs, and if it fails, a notebook is `NN_name.failed.ipynb`; only a complete run takes the name
`NN_name.ipynb`. What papermill and widgets leave in it (absolute paths, times, widget state) is dropped, so
that a diff shows results.

A job that is done has a stamp, which git ignores: only work of this checkout is skipped, never because of a
committed record or notebook. Every notebook has a kernel, a process of its own: a crash, a kill or a timeout
costs that one alone, and the same command runs what is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
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
from reclib.system import Tell

_ERROR_MARKER = "papermill-error-cell-tag"  # of the banner cells that papermill inserts

_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


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
    for name in [*expected, *stated]:
        if name not in stated:
            raise InputError(f"{notebook.name}: its parameters cell lacks {name!r}")
        if name not in expected:
            raise InputError(f"{notebook.name}: {name!r} in its parameters cell is no parameter")


# -- one notebook --------------------------------------------------------------------------------------------


def execute(
    notebook: Path,
    output: Path,
    values: Mapping[str, Any],
    *,
    cell_seconds: int | None = None,
    records: Path | None = None,
    gpu: str | None = None,
    tell: Tell = print,
    tell_progress: Tell | None = None,
) -> None:
    """Run `notebook` with the parameters `values` and leave it at `output`; tell of each code cell.

    `tell_progress` gets a line whenever a training run in the notebook reports how far it is.

    `cell_seconds` is the longest that a cell may take; None: as long as it needs. `records` is where
    results go instead of `system.executed()`, `gpu` what `CUDA_VISIBLE_DEVICES` is, None: as it is here.
    Raises `NotebookFailed`; the kernel is gone when this returns, whichever way.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    working = failed_path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # A short folder of its own: the sockets' path has room for about 100 characters.
    runtime = tempfile.mkdtemp(prefix="reclib-", dir="/tmp" if os.path.isdir("/tmp") else None)
    environment = _environment() | {"RECLIB_RECORDS": str(records or system.executed())}
    environment |= {"WANDB_SILENT": "true"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    kernel = _Kernel(notebook.parent, Path(runtime), environment, tell)
    kills = system.memory_kills()
    _register_engine()
    _KERNELS.add(kernel)
    ended = threading.Event()
    if tell_progress is not None:
        watched = Path(runtime) / "progress"
        environment["RECLIB_PROGRESS"] = str(watched)
        threading.Thread(target=_watch, args=(watched, tell_progress, ended), daemon=True).start()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(working),
            parameters=dict(values),
            engine_name="reclib",
            kernel_name="python3",
            progress_bar=False,
            autosave_cell_every=30,
            execution_timeout=cell_seconds,
            kernel=kernel,
        )
        normalise(working)
        os.replace(working, output)
        return
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
    except DeadKernelError:
        reason = f"DeadKernelError: {system.of_death(kernel.end(), system.memory_kills() - kills)}"
    except (TimeoutError, RuntimeError) as error:  # a cell over its time, a kernel that does not start
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}, writing {working.name}"
        if not system.of_error(reason):
            raise
        working.unlink(missing_ok=True)  # a part of one, that the disk had no room for, is of no use
    finally:
        kernel.end()
        ended.set()
        shutil.rmtree(runtime, ignore_errors=True)
        _KERNELS.discard(kernel)
    raise NotebookFailed(f"failed in cell {kernel.cell}: {reason}{system.of_error(reason)}")


def _watch(file: Path, tell: Tell, ended: threading.Event) -> None:
    """Tell what a file says whenever that has changed, until the event is set."""
    last = ""
    while not ended.wait(0.5):
        line = file.read_text(encoding="utf-8") if file.exists() else ""
        if line not in ("", last):
            tell(line)
            last = line


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


_KERNELS: set[_Kernel] = set()  # those that run or start

_STOPPING = threading.Event()  # no further kernel may run


@dataclass(eq=False)
class _Kernel:
    """The process that runs a notebook, and how far it is."""

    folder: Path  # where it starts
    runtime: Path  # of its connection
    environment: dict[str, str]
    tell: Tell
    cell: int = 0  # code cells begun
    process: subprocess.Popen | None = None

    def end(self) -> int | None:
        """End the kernel and what it started, if they are still there; return its exit code."""
        if self.process is None:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a kernel leads a session of its own
        return self.process.wait()


def _register_engine() -> None:
    """Give papermill an engine that starts a kernel as a `_Kernel` says and counts its cells."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import Engine, papermill_engines
    from traitlets.config import Config

    class Client(PapermillNotebookClient):
        kernel: _Kernel
        title = ""

        def start_new_kernel(self, **options: Any) -> None:
            super().start_new_kernel(**options)
            self.kernel.process = self.km.provisioner.process
            if _STOPPING.is_set():
                self.kernel.end()

        def execute_cell(self, cell: Any, index: int, **options: Any) -> None:
            if cell.cell_type != "code":
                if cell.source.startswith("#"):
                    self.title = cell.source.splitlines()[0].lstrip("# ")
                return
            self.kernel.cell += 1
            begun = time.perf_counter()
            try:
                super().execute_cell(cell, index, **options)
            finally:
                total = sum(cell.cell_type == "code" for cell in self.nb.cells)
                seconds = time.perf_counter() - begun
                self.kernel.tell(f"  cell {self.kernel.cell}/{total}  {seconds:6.1f} s  {self.title}")

    class ReclibEngine(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> None:
            kernel: _Kernel = options["kernel"]
            # Sockets in the file system: TCP ports race between runs, and anyone can connect.
            config = Config({"KernelManager": {"transport": "ipc"}})
            config.KernelManager.connection_file = str(kernel.runtime / "kernel.json")
            client = Client(
                nb_man,
                kernel_name=kernel_name,
                timeout=options["execution_timeout"],
                startup_timeout=options["start_timeout"],
                log=logging.getLogger("papermill"),
                resources={"metadata": {"path": str(kernel.folder)}},
                config=config,
            )
            client.kernel = kernel
            client.execute(env=kernel.environment)

    papermill_engines.register("reclib", ReclibEngine)


def _environment() -> dict[str, str]:
    """Return an environment in which a child uses our root and our code, wherever it starts."""
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {
        "RECLIB_ROOT": str(system.root()),
        "PYTHONPATH": os.pathsep.join([str(system.CHECKOUT), *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
    }


# -- a notebook unless it is done ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One notebook with its parameters, on the device that is here."""

    notebook: str
    values: dict[str, Any]  # as given to the notebook; None: filled there from the device file
    label: str  # of the device that is really here

    @classmethod
    def last(cls, notebook: str, label: str) -> Job:
        """Return the job that this checkout finished last on a device (no values: none)."""
        return cls(notebook, cls(notebook, {}, label)._stamped().get("values", {}), label)

    @property
    def lock(self) -> str:
        """Name of its lock."""
        return f"{self.label}-{self.notebook}"

    @property
    def output(self) -> Path:
        """Where the executed notebook goes."""
        return system.executed() / self.label / f"{self.notebook}.ipynb"

    @property
    def stamp(self) -> Path:
        """The file that says that this checkout has finished this notebook on this device."""
        return system.stamps() / f"{self.lock}.json"

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

    def state(self) -> str:
        """Return running, failed, done, stale, recorded or missing: see `cli.status`."""
        if system.is_locked(self.lock):
            return "running"
        if failed_path(self.output).is_file():
            return "failed"
        if self.output.is_file() and self.stamp.is_file():
            return "done" if self.is_finished() else "stale"
        files = (root / self.label / self.output.name for root in records.roots())
        return "recorded" if any(file.is_file() for file in files) else "missing"

    def _stamped(self) -> dict[str, Any]:
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return stamp if isinstance(stamp, dict) else {}


def run(
    job: Job,
    gpu: str | None,
    tell: Tell,
    tell_cells: Tell,
    tell_progress: Tell | None = None,
    *,
    force: bool = False,
    cell_seconds: int | None = None,
) -> bool:
    """Execute a job unless this checkout has finished it; return whether it ran.

    `gpu` and `cell_seconds` are those of `execute`; `tell` gets a line where another run is waited for,
    `tell_cells` one for each cell, `tell_progress` as in `execute`.
    """
    with system.lock(job.lock, tell):  # two runs of it would write the same files
        if not force and job.is_finished():
            return False
        with system.device_lock(job.label, tell, gpu):
            identity = job.identity()  # before: what is edited during the run was not run
            job.stamp.unlink(missing_ok=True)
            if force:  # a finished training run would only be loaded
                shutil.rmtree(system.runs() / job.notebook, ignore_errors=True)
            source = system.notebooks() / job.output.name
            execute(
                source,
                job.output,
                job.values,
                cell_seconds=cell_seconds,
                gpu=gpu,
                tell=tell_cells,
                tell_progress=tell_progress,
            )
            sha256 = system.file_sha256(job.output)
            system.write_json(job.stamp, {"identity": identity, "output": sha256, "values": job.values})
    return True


# -- several notebooks on several devices --------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One device of this machine."""

    label: str
    visible: str | None = None  # CUDA_VISIBLE_DEVICES of its kernels; empty: none, the CPU; None: as it is


def slots(labels: str, gpus: Sequence[tuple[str, str]]) -> list[Slot]:
    """Return the devices that `labels` names, separated by commas; "all": every visible GPU.

    `gpus` is what `hardware.visible_gpus` returns. Raises `InputError` for a label that is none or not here.
    """
    result: list[Slot] = []
    here = ", ".join([*dict.fromkeys(label for _, label in gpus), *CPU_LABELS])
    for wanted in [part.strip() for part in labels.split(",")]:
        if wanted == "auto" or wanted not in ("all", *GPU_LABELS):
            raise InputError(f"--gpus is {labels!r}: {wanted!r} is no device label; here: {here}, or all")
        devices = [Slot(label, visible) for visible, label in gpus if wanted in (label, "all")]
        if wanted in CPU_LABELS:
            devices = [Slot(wanted, "")]
        if not devices:
            raise InputError(f"--gpus is {labels!r}: there is no visible GPU for {wanted!r}; here: {here}")
        result += devices
    return list(dict.fromkeys(result))


def visible_gpus() -> list[tuple[str, str]]:
    """Ask a process of its own for `hardware.visible_gpus`, so that this one opens none of them."""
    command = [sys.executable, "-m", "reclib", "device", "visible"]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise InputError(f"cannot list the GPUs: {done.stderr.strip().splitlines()[-1]}")
    return [(visible, label) for visible, label in json.loads(done.stdout.splitlines()[-1])]


def run_all(jobs: Sequence[Job], devices: Sequence[Slot], work: Callable[[Job, Slot], object]) -> None:
    """Call `work` for each job on a device of its label, in a thread for each GPU.

    GPUs of one label share its jobs. The CPU comes last, one label after another: its jobs are timed on the
    cores that feed the GPUs. On an interrupt the kernels are ended, and it is raised again.
    """
    left = {slot.label: iter([job for job in jobs if job.label == slot.label]) for slot in devices}

    def lane(devices: Sequence[Slot]) -> None:
        for slot in devices:
            for job in left[slot.label]:  # which other lanes take from as well
                if _STOPPING.is_set():
                    return
                work(job, slot)

    _STOPPING.clear()
    on_cpu = [slot for slot in devices if slot.label.startswith("cpu")]
    lanes = [[slot] for slot in devices if slot not in on_cpu]
    try:
        for together in (lanes, [on_cpu]):
            threads = [threading.Thread(target=lane, args=(each,), daemon=True) for each in together]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.05)
    except KeyboardInterrupt:
        _STOPPING.set()
        end = time.monotonic() + system.PATIENCE
        while _KERNELS and time.monotonic() < end:
            for kernel in list(_KERNELS):
                kernel.end()
            time.sleep(0.05)
        raise
