"""Paths, atomic writing, locks between processes, and exit codes of commands.

No path in this project is relative to the working directory, which differs between papermill, nbval and
JupyterLab: all paths come from here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import yaml

from reclib.config import InputError, as_dict

PACKAGE = Path(__file__).resolve().parent  # of the code
CHECKOUT = PACKAGE.parent


def _place(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default).resolve()


def root() -> Path:
    """Return the project's root: `RECLIB_ROOT` if set, else the folder that holds the package."""
    return _place("RECLIB_ROOT", CHECKOUT)


def notebooks() -> Path:
    """Return the folder of the notebooks."""
    return root() / "notebooks"


def params() -> Path:
    """Return the folder of profile and device parameter files."""
    return root() / "params"


def data() -> Path:
    """Return the cache of raw and prepared data (git-ignored): `RECLIB_DATA` if set."""
    return _place("RECLIB_DATA", root() / ".data")


def runs() -> Path:
    """Return the folder of a user's runs, checkpoints and records (git-ignored): `RECLIB_RUNS` if set."""
    return _place("RECLIB_RUNS", root() / "runs")


def models() -> Path:
    """Return the folder of saved models (git-ignored): `RECLIB_MODELS` if set."""
    return _place("RECLIB_MODELS", root() / "models")


def stamps() -> Path:
    """Return the folder of this checkout's stamps of finished notebooks (git-ignored)."""
    return root() / ".stamps"


def committed() -> Path:
    """Return the root of the records that the repository holds."""
    return (root() / "executed").resolve()


def executed() -> Path:
    """Return the root of the records of this user's runs: `RECLIB_RECORDS` if set, else `runs/executed/`."""
    return _place("RECLIB_RECORDS", runs() / "executed")


def figures() -> Path:
    """Return the folder of the figures that are built from the committed records."""
    return root() / "figures"


# -- files and folders that are either complete or absent ----------------------------------------------------
# An entry (a folder) is written to a temporary folder and renamed, so that no reader sees it incomplete. Its
# seal holds the key that it was made from, and the size and sha256 of each file. An entry counts as absent if
# the size of a file differs, or the hash of a small one. Large files are memory-mapped: they are hashed on
# demand only (`damage`).

SEAL = "seal.json"

HASHED_ALWAYS = 4 << 20  # bytes; a file up to this size is hashed whenever its entry is looked up


@contextlib.contextmanager
def writing(folder: Path, key: str) -> Iterator[Path]:
    """Yield a folder to fill; without an exception it becomes the entry `folder` made from `key`.

    It replaces an existing entry. If several processes write one key, the first complete entry stays.
    """
    with fresh_folder(folder) as fresh:
        yield fresh
        files = {path.name: _fingerprint(path) for path in sorted(fresh.iterdir())}
        write_json(fresh / SEAL, {"key": key, "files": files})
        fresh.chmod(0o755)  # mkdtemp gives 0o700, and a cache may be shared
        if holds(folder, key):
            return
        with fresh_folder(folder) as previous, contextlib.suppress(FileNotFoundError):
            folder.rename(previous / folder.name)
        try:
            fresh.rename(folder)
        except OSError:
            if not holds(folder, key):  # else another process has written the entry
                raise


def holds(folder: Path, key: str | None = None) -> bool:
    """Whether the entry is complete and, if `key` is given, was made from it."""
    return not _differing(folder, HASHED_ALWAYS, key)


def damage(folder: Path) -> list[str]:
    """Return descriptions of all differences from the written files, after reading every byte."""
    return _differing(folder, float("inf"))


def remedy(folder: Path) -> str:
    """Return the advice for a damaged folder; one without a seal may be anything and is not to be deleted."""
    sealed = (folder / SEAL).exists()
    return "delete it and prepare it again" if sealed else "expected a folder that `prepare` wrote to its end"


def _differing(folder: Path, hashed_up_to: float, key: str | None = None) -> list[str]:
    try:
        seal = json.loads((folder / SEAL).read_text("utf-8"))
        sealed_key, files = seal["key"], seal["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{SEAL} is missing or unreadable"]
    if key not in (None, sealed_key):
        return ["made from another key"]
    faults = []
    for name, expected in files.items():
        try:
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                faults.append(f"{name} has {size:,} bytes, expected {expected['bytes']:,}")
            elif size <= hashed_up_to and _fingerprint(folder / name) != expected:
                faults.append(f"{name} is altered: its sha256 differs")
        except OSError as error:
            faults.append(f"{name}: {error.strerror or error}")
    return faults


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Yield a new folder below `parent` for temporary files, gone on leaving."""
    with fresh_folder(parent / "scratch") as fresh:
        yield fresh


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, removed on leaving unless it was renamed.

    Its owner holds a lock on it. Folders of killed processes, whose locks have ended, are removed here.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for stale in folder.parent.glob(f"{glob.escape(folder.name)}.*.partial"):
        if (lock := _locked(stale)) is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(lock)
    lock = None
    while lock is None:  # another process may remove it before it is locked
        fresh = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
        lock = _locked(fresh)
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """Return the open folder, locked; None where another process holds it or has removed it."""
    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    if flock(opened) and folder.exists():
        return opened
    os.close(opened)
    return None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; without an exception that file replaces it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def report_progress(line: str) -> None:
    """Write the progress of a training run to the file `RECLIB_PROGRESS`, if that is set."""
    if place := os.environ.get("RECLIB_PROGRESS"):
        with contextlib.suppress(OSError):  # never fails a training
            write_atomically(Path(place), line)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write or replace a file atomically."""
    with replacing(path) as fresh:
        fresh.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, document: Any) -> None:
    """Write a document of plain JSON, indented, atomically."""
    write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def write_array(path: Path, dtype: Any, length: int, pieces: Iterable[np.ndarray]) -> None:
    """Write a one-dimensional `.npy` file piece by piece.

    A memory map would end the process on a full disk instead of raising `OSError`.
    """
    written = 0
    dtype = np.dtype(dtype).newbyteorder("<")
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).tobytes())
            written += piece.size
    if written != length:
        raise RuntimeError(f"{path.name}: {written:,} values written, {length:,} announced")


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys; keys are text unless `any_keys`."""

    any_keys = False

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[Any] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":  # `<<`: the keys of another mapping
                continue
            value = self.construct_object(key, deep=True)
            wrong = ""
            if not (isinstance(value, str) or (self.any_keys and isinstance(value, Hashable))):
                wrong = "as a key is no text: put it in quotation marks"
            elif value in keys:
                wrong = "stands twice"
            if wrong:
                raise yaml.constructor.ConstructorError(None, None, f"{value!r} {wrong}", key.start_mark)
            keys.add(value)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path, *, any_keys: bool = False) -> Any:
    """Return the content of a YAML file; raise `InputError` with file and line if it is malformed.

    A duplicate key in a mapping is an error, and so is a key that is no text unless `any_keys`.
    """
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        loader.any_keys = any_keys
        return loader.get_single_data()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:  # not UTF-8, an odd date
        mark = getattr(error, "problem_mark", None)
        is_ours = isinstance(error, yaml.constructor.ConstructorError)
        problem = (
            str(getattr(error, "problem", "")) if is_ours else f"not valid YAML ({type(error).__name__})"
        )
        raise InputError(f"{file}{f', line {mark.line + 1}' if mark else ''}: {problem}") from None


# -- locks: one timed job at a time on a device, and one run of a notebook for each device -------------------
# All are `flock`s, which the system releases when a process dies. A run on the CPU holds all cores, whatever
# its number of threads. Runs on different GPUs run at the same time and share the cores.

Tell = Callable[[str], None]


def flock(handle: Any, *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; return False where another process holds it."""
    flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(handle, flags)
    except OSError:
        if wait:
            raise
        return False
    return True


@contextlib.contextmanager
def locked(file: Path, *, shared: bool = False, tell: Tell | None = None) -> Iterator[bool]:
    """Hold a lock file; yield whether it is held, False where another process holds it.

    With `tell` it waits for the lock, after calling `tell` with a line about it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:  # closed in children, so that a kernel does not hold it on
        free = flock(handle, shared=shared)
        if tell is not None and not free:
            tell(f"waiting: another run of this checkout holds {file.stem}")
            free = flock(handle, shared=shared, wait=True)
        yield free


def lock(name: str, tell: Tell, shared: bool = False) -> contextlib.AbstractContextManager[bool]:
    """Hold a named lock of this checkout, waiting for other runs."""
    return locked(_lock_file(name), shared=shared, tell=tell)


@contextlib.contextmanager
def device_lock(label: str, tell: Tell = print, gpu: str | None = None) -> Iterator[None]:
    """Hold the device with this label, waiting while another run of this checkout is timed on it.

    `gpu` is the one of `CUDA_VISIBLE_DEVICES` that is used; None: the first that this process sees.
    """
    on_cpu = label.startswith("cpu")
    gpu = gpu or os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    board = contextlib.nullcontext() if on_cpu else lock(f"gpu-{gpu}", tell)
    with lock("cores", tell, shared=not on_cpu), board:
        yield


def is_locked(name: str) -> bool:
    """Whether a run holds, or waits for, the lock of this name."""
    try:
        with _lock_file(name).open() as handle:
            return not flock(handle, shared=True)
    except FileNotFoundError:
        return False


def _lock_file(name: str) -> Path:
    return stamps() / (re.sub(r"[^\w.-]", "_", name) + ".lock")


# -- a process that ends with its parent ---------------------------------------------------------------------
# A killed parent cannot end its children. `start_with` therefore passes its pid to a child, and `hold` in the
# child interrupts it once it has another parent. Kernels do the same by themselves (ipykernel).

_VARIABLE = "RECLIB_PARENT"

PATIENCE = 20.0  # seconds that an interrupted process has to clean up


def start_with() -> dict[str, str]:
    """Return the environment for a child that calls `hold`."""
    return os.environ | {_VARIABLE: str(os.getpid())}


def hold() -> None:
    """Interrupt this process when its parent has ended, and exit if it does not end within `PATIENCE`.

    Does nothing in a process that was not started with `start_with`.
    """
    parent = os.environ.pop(_VARIABLE, None)  # not inherited by children of this process

    def look() -> None:
        while os.getppid() == int(str(parent)):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE)
        os._exit(1)

    if parent is not None:
        threading.Thread(target=look, daemon=True, name="lifeline").start()


# -- reasons why a notebook or a process ended, and remedies -------------------------------------------------

# Counters of processes that the system killed for memory: the container's, else the machine's.
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))

_LESS_MEMORY = "lower batch_size or micro_batch_size, or choose a smaller size"

AGAIN = "the same command goes on from the last checkpoint"

_REMEDIES = {  # pattern of an error message -> remedy
    r"MemoryError|OutOfMemoryError|out of memory|can't allocate memory": f"out of memory: {_LESS_MEMORY}",
    rf"\[Errno ({errno.ENOSPC}|{errno.EDQUOT}|{errno.EFBIG})\]|No space left": (
        f"the disk is full or a limit is reached: free some space, {AGAIN}"
    ),
    "CellTimeoutError": f"it took longer than --timeout allows: {AGAIN}",
}


def memory_kills(files: tuple[Path, ...] = _COUNTERS) -> int:
    """Return the number of processes that the system has killed for memory, 0 if unknown."""
    for file in files:
        if file.is_file() and (match := re.search(r"^oom_kill (\d+)$", file.read_text(), re.MULTILINE)):
            return int(match[1])
    return 0


def of_death(code: int | None, kills: int, who: str = "its kernel") -> str:
    """Return why a process ended, from its exit code (minus the signal) and memory kills while it ran."""
    if code == -signal.SIGKILL and kills:
        reason = f"was killed, and the system killed a process for memory: {_LESS_MEMORY}"
    elif code == -signal.SIGKILL:
        reason = f"was killed by SIGKILL, by somebody or for memory (`dmesg` tells): if so, {_LESS_MEMORY}"
    elif code is not None and code < 0:
        reason = f"died of {signal.Signals(-code).name}"
    else:
        reason = f"ended with exit code {code}"
    return f"{who} {reason}; {AGAIN}"


def of_error(message: str) -> str:
    """Return the remedy for an error raised by a cell, "" if there is none."""
    remedies = (text for rule, text in _REMEDIES.items() if re.search(rule, message, re.IGNORECASE))
    return next((f"; {text}" for text in remedies), "")


# -- common to all commands ----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        self.exit(2, f"{self.prog}: {message} (--help tells more)\n")


def exit_code(main: Callable[[], int]) -> int:
    """Run a command and return its exit code; errors are printed in one line.

    2 for wrong input, 1 for errors of the system (such as a full disk), 130 if interrupted, 141 for a closed
    pipe (`... | head`).
    """
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()  # raises here for a closed pipe, not at Python's exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python prints it again at exit
        return 128 + signal.SIGPIPE
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


_FOLDERS = re.compile(r"(?<![\w.:/\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+")


def plain(value: Any) -> Any:
    """Return `value` as plain JSON, without the folders of paths, which may name people and hosts.

    Numpy scalars and one-element tensors become numbers. Other types raise `ValueError`.
    """
    if isinstance(value, str | Path):
        return _FOLDERS.sub("", str(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(as_dict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # a numpy scalar or a tensor of one element
        return plain(value.item())
    raise ValueError(f"cannot record a {type(value).__name__}: {value!r}")
