"""Folders on disk that are either whole or not there.

An entry is written beside its place and renamed, so that no reader and no crash ever sees half of
it. A seal inside it holds what the entry was made from (its key) and size and sha256 of each file.
An entry whose files differ in size, or small ones in content, counts as absent; large files are
hashed on demand only (`damage`), since they are memory-mapped and need not be read to be used.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEAL = "seal.json"
HASHED_ALWAYS = 4 << 20  # bytes; a file up to this size is hashed whenever its entry is looked up


@contextlib.contextmanager
def writing(folder: Path, key: str) -> Iterator[Path]:
    """Yield a folder to fill; without an exception it becomes the entry `folder` made from `key`.

    It takes the place of an entry that is there. Where processes race for one key, the first whole
    entry stays.
    """
    with fresh_folder(folder) as fresh:
        yield fresh
        files = {path.name: _about(path) for path in sorted(fresh.iterdir())}
        write_json(fresh / SEAL, {"key": key, "files": files})
        fresh.chmod(0o755)  # mkdtemp gives 0o700, and a cache may be shared
        if holds(folder, key):
            return
        with fresh_folder(folder) as old, contextlib.suppress(FileNotFoundError):
            folder.rename(old / folder.name)
        try:
            fresh.rename(folder)
        except OSError:
            if not holds(folder, key):  # not a faster process's entry, then: a real failure
                raise


def holds(folder: Path, key: str | None = None) -> bool:
    """Whether the whole entry is there, and was made from `key` where one is given."""
    seal = _seal(folder)
    if seal is None or key not in (None, seal["key"]):
        return False
    return not _differing(folder, seal["files"], HASHED_ALWAYS)


def damage(folder: Path) -> list[str]:
    """Return what differs from what was written, in words, after reading every byte of it."""
    seal = _seal(folder)
    if seal is None:
        return [f"{SEAL} is missing or unreadable"]
    return _differing(folder, seal["files"])


def remedy(folder: Path) -> str:
    """Return what to do about `damage`: a folder without a seal may be anything and is not to be deleted."""
    sealed = (folder / SEAL).exists()
    return "delete it and prepare it again" if sealed else "expected a folder that `prepare` wrote to its end"


def write_array(path: Path, dtype: Any, length: int, pieces: Iterable[np.ndarray]) -> None:
    """Write a one-dimensional `.npy` file piece by piece.

    Not through a memory map: on a full disk that ends the process instead of raising `OSError`.
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


def write_json(path: Path, document: Any) -> None:
    """Write a document of plain JSON, for people as well."""
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Yield a new folder below `parent` for temporary files, gone on leaving."""
    with fresh_folder(parent / "scratch") as fresh:
        yield fresh


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, gone on leaving unless it was renamed.

    Its owner holds a lock on it, which ends with the process: folders whose owner is gone, killed say, are
    removed here.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.*.partial"):
        if (lock := _locked(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
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
    import fcntl  # POSIX only; reading a prepared folder works everywhere

    try:
        opened = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.exists():
            return opened
    os.close(opened)
    return None


def _seal(folder: Path) -> dict[str, Any] | None:
    try:
        seal = json.loads((folder / SEAL).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return seal if isinstance(seal, dict) and {"key", "files"} <= seal.keys() else None


def _differing(folder: Path, files: dict[str, Any], hashed_up_to: float = float("inf")) -> list[str]:
    found = []
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                found.append(f"{name} has {size:,} bytes, expected {expected['bytes']:,}")
            elif size <= hashed_up_to and _about(path) != expected:
                found.append(f"{name} is altered: its sha256 differs")
        except OSError as error:
            found.append(f"{name}: {error.strerror or error}")
    return found


def _about(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
