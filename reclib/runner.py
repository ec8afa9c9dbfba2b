"""Running notebooks by papermill: one (`execute`), one unless it is finished (`run`), or several (`run_all`).

While it runs, and if it fails, a notebook is `NN_name.failed.ipynb`; only a complete run is named
`NN_name.ipynb`. Metadata of papermill and widgets (absolute paths, times, widget state) are dropped, so that
a diff shows results.

A finished job has a stamp, which git ignores: only work of this checkout is skipped, never because of a
committed record or notebook. Every notebook has its own kernel process: after a crash, a kill or a timeout
of one, the others go on, and the same command runs what is missing.
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
    """Return the path of the notebook while it runs and after it failed."""
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
    """Run `notebook` with the parameters `values` and write it to `output`.

    `tell` gets a line for each code cell, `tell_progress` one whenever a training run reports its progress.
    `cell_seconds` is the time limit of a cell, None for no limit. `records` is the folder of the results in
    place of `system.executed()`, `gpu` the value of `CUDA_VISIBLE_DEVICES`, None to inherit it. Raises
    `NotebookFailed`. The kernel has always ended when this returns.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    working = failed_path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # A folder with a short path: paths of sockets are limited to about 100 characters.
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
        working.unlink(missing_ok=True)  # incomplete, since the disk is full
    finally:
        kernel.end()
        ended.set()
        shutil.rmtree(runtime, ignore_errors=True)
        _KERNELS.discard(kernel)
    raise NotebookFailed(f"failed in cell {kernel.cell}: {reason}{system.of_error(reason)}")


def _watch(file: Path, tell: Tell, ended: threading.Event) -> None:
    """Tell the content of a file whenever it changes, until the event is set."""
    previous = ""
    while not ended.wait(0.5):
        line = file.read_text(encoding="utf-8") if file.exists() else ""
        if line not in ("", previous):
            tell(line)
            previous = line


def normalise(notebook: Path) -> None:
    """Remove metadata and error banners of papermill and widgets from a notebook, and write it atomically."""
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


_KERNELS: set[_Kernel] = set()  # running or starting
_STOPPING = threading.Event()  # set: no further kernel may run


@dataclass(eq=False)
class _Kernel:
    """The process that runs a notebook, and its progress."""

    folder: Path  # working directory
    runtime: Path  # folder of its connection
    environment: dict[str, str]
    tell: Tell
    cell: int = 0  # number of code cells begun
    process: subprocess.Popen | None = None

    def end(self) -> int | None:
        """End the kernel and its child processes, if they still run; return its exit code."""
        if self.process is None:
            return None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a kernel leads a session of its own
        return self.process.wait()


def _register_engine() -> None:
    """Register a papermill engine that starts a `_Kernel` and counts its cells."""
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
    """Return an environment in which a child process uses this root and this code."""
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {
        "RECLIB_ROOT": str(system.root()),
        "PYTHONPATH": os.pathsep.join([str(system.CHECKOUT), *([inherited] if inherited else [])]),
        "PYTHONUNBUFFERED": "1",
    }


# -- one notebook unless it is finished ----------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One notebook with its parameters and its device."""

    notebook: str
    values: dict[str, Any]  # parameters of the notebook; None: filled there from the device file
    label: str  # of the device in use

    @classmethod
    def last(cls, notebook: str, label: str) -> Job:
        """Return the last finished job of this checkout on a device, with empty values if there is none."""
        return cls(notebook, cls(notebook, {}, label)._stamped().get("values", {}), label)

    @property
    def lock(self) -> str:
        """Name of its lock."""
        return f"{self.label}-{self.notebook}"

    @property
    def output(self) -> Path:
        """Path of the executed notebook."""
        return system.executed() / self.label / f"{self.notebook}.ipynb"

    @property
    def stamp(self) -> Path:
        """The file that marks this notebook as finished by this checkout on this device."""
        return system.stamps() / f"{self.lock}.json"

    def identity(self) -> str:
        """Return a hash of parameters, code and versions, on which the outcome depends."""
        filled = parameters.fill(parameters.build(self.notebook, self.values), self.label)
        parts = {
            "params": parameters.values(filled),
            "code": records.code_hash(self.notebook),
            "versions": records.versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def is_finished(self) -> bool:
        """Return whether this checkout finished it with this code, and its outputs are still there."""
        stamp = self._stamped()
        try:
            return (
                stamp.get("identity") == self.identity()
                and self.output.is_file()
                and stamp.get("output") == system.file_sha256(self.output)
                and self.output.with_name("results.jsonl").is_file()
            )
        except InputError:  # its parameters are no longer valid
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

    `gpu`, `cell_seconds` and `tell_progress` are those of `execute`; `tell` gets a line while waiting for
    another run, `tell_cells` one for each cell.
    """
    with system.lock(job.lock, tell):  # two runs of it would write the same files
        if not force and job.is_finished():
            return False
        with system.device_lock(job.label, tell, gpu):
            identity = job.identity()  # before the run, since code may be edited during it
            job.stamp.unlink(missing_ok=True)
            if force:  # else finished training runs would only be loaded
                shutil.rmtree(system.runs() / job.notebook, ignore_errors=True)
            source = system.notebooks() / job.output.name
            tells: dict[str, Any] = {"tell": tell_cells, "tell_progress": tell_progress}
            execute(source, job.output, job.values, cell_seconds=cell_seconds, gpu=gpu, **tells)
            sha256 = system.file_sha256(job.output)
            system.write_json(job.stamp, {"identity": identity, "output": sha256, "values": job.values})
    return True


# -- several notebooks on several devices --------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """One device of this machine."""

    label: str
    visible: str | None = None  # CUDA_VISIBLE_DEVICES of its kernels; "": no GPU; None: inherited


def slots(labels: str, gpus: Sequence[tuple[str, str]]) -> list[Slot]:
    """Return the devices of `labels`, separated by commas; "all" stands for every visible GPU.

    `gpus` is the result of `hardware.visible_gpus`. Raises `InputError` for a label that is unknown or not
    here.
    """
    result: list[Slot] = []
    available = ", ".join([*dict.fromkeys(label for _, label in gpus), *CPU_LABELS])
    for name in [part.strip() for part in labels.split(",")]:
        if name == "auto" or name not in ("all", *GPU_LABELS):
            raise InputError(f"--gpus is {labels!r}: {name!r} is no device label; here: {available}, or all")
        devices = [Slot(label, visible) for visible, label in gpus if name in (label, "all")]
        if name in CPU_LABELS:
            devices = [Slot(name, "")]
        if not devices:
            raise InputError(f"--gpus is {labels!r}: there is no visible GPU for {name!r}; here: {available}")
        result += devices
    return list(dict.fromkeys(result))


def visible_gpus() -> list[tuple[str, str]]:
    """Return `hardware.visible_gpus` of a child process, so that this process opens no GPU."""
    command = [sys.executable, "-m", "reclib", "device", "visible"]
    process = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if process.returncode:
        raise InputError(f"cannot list the GPUs: {process.stderr.strip().splitlines()[-1]}")
    return [(visible, label) for visible, label in json.loads(process.stdout.splitlines()[-1])]


def run_all(jobs: Sequence[Job], devices: Sequence[Slot], work: Callable[[Job, Slot], object]) -> None:
    """Call `work` for each job on a device of its label, in a thread for each GPU.

    GPUs of one label share its jobs. CPU labels come last, one after another, since their jobs are timed on
    the cores that feed the GPUs. On an interrupt the kernels are ended, and it is raised again.
    """
    queues = {slot.label: iter([job for job in jobs if job.label == slot.label]) for slot in devices}

    def lane(devices: Sequence[Slot]) -> None:
        for slot in devices:
            for job in queues[slot.label]:  # shared with other lanes
                if _STOPPING.is_set():
                    return
                work(job, slot)

    _STOPPING.clear()
    on_cpu = [slot for slot in devices if slot.label.startswith("cpu")]
    lanes = [[slot] for slot in devices if slot not in on_cpu]
    try:
        for together in (lanes, [on_cpu]):
            threads = [threading.Thread(target=lane, args=(slots,), daemon=True) for slots in together]
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
