"""Executing one notebook with papermill: checked before, watched while, normalised after.

While it runs, and if it fails, the notebook is `NN_name.failed.ipynb`; only a complete run takes the
name `NN_name.ipynb`. What papermill and widgets leave in it (absolute paths, times, widget state) is
dropped, so that a diff shows results.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from reclib import diagnosis, paths
from reclib.config import InputError

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
    found = list(papermill.inspect_notebook(str(notebook)))
    if not found:
        raise InputError(f"{notebook.name} has no cell tagged 'parameters'")
    for name in expected:
        if name not in found:
            raise InputError(f"{notebook.name}: its parameters cell lacks {name!r}")
    for name in found:
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
    kills = diagnosis.memory_kills()
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
        said = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        raise _failed(notebook, error.exec_count, said + diagnosis.of_error(said)) from None
    except DeadKernelError:
        code = progress.end_kernel()
        said = f"DeadKernelError: {diagnosis.of_death(code, diagnosis.memory_kills() - kills)}"
        raise _failed(notebook, progress.cell, said) from None
    except (TimeoutError, RuntimeError) as error:  # a cell over its time, a kernel that does not start
        said = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise _failed(notebook, progress.cell, said + diagnosis.of_error(said)) from None
    except OSError as error:
        if not diagnosis.is_full_disk(error):
            raise
        raise _failed(notebook, progress.cell, _put_away(working, error)) from None
    finally:
        progress.end_kernel()
        shutil.rmtree(runtime, ignore_errors=True)


def _put_away(working: Path, error: OSError) -> str:
    """Delete a notebook that the disk had no room for, and say so: a part of one is of no use."""
    for half in (working, working.with_suffix(".partial")):
        half.unlink(missing_ok=True)
    said = f"[Errno {error.errno}] {error.strerror}, writing {working.name}"
    return said + diagnosis.of_error(said)


def _failed(notebook: Path, cell: int, said: str) -> NotebookFailed:
    return NotebookFailed(f"{notebook.stem} failed in cell {cell}: {said}")


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
    partial = notebook.with_suffix(".partial")
    nbformat.write(content, partial)
    os.replace(partial, notebook)


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
            client.execute(env=_environment(options["records"]))

    papermill_engines.register("reclib", ReclibEngine)


def _environment(records: Path | None) -> dict[str, str]:
    """Return the kernel's environment: our root and our code, wherever it starts."""
    code = str(paths.CHECKOUT)
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {
        "RECLIB_ROOT": str(paths.root()),
        "RECLIB_RECORDS": str(records or paths.executed()),
        "PYTHONPATH": os.pathsep.join([code, *([inherited] if inherited else [])]),
        "WANDB_SILENT": "true",
    }
