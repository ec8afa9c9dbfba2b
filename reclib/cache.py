"""Folders of arrays and JSON documents on disk that are either whole or not there.

An entry is written beside its place and renamed, so that no reader and no crash ever sees half of
it. A seal of content hashes inside it tells an altered or damaged entry, which then counts as
absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SEAL = "seal.json"


class Entry(NamedTuple):
    """What an entry holds, by name."""

    arrays: dict[str, np.ndarray]
    documents: dict[str, Any]  # plain JSON


def store(folder: Path, arrays: Mapping[str, np.ndarray], documents: Mapping[str, Any]) -> None:
    """Write the entry `folder`, in place of one that is there.

    Where processes race, one of the entries stays, whole: those with the same key hold the same
    content.
    """
    with _fresh_folder(folder) as fresh:
        for name, array in arrays.items():
            np.save(fresh / f"{name}.npy", array, allow_pickle=False)
        for name, document in documents.items():
            text = json.dumps(document, indent=1, ensure_ascii=False)
            (fresh / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        (fresh / SEAL).write_text(json.dumps(_hashes(fresh), indent=1) + "\n")
        fresh.chmod(0o755)  # mkdtemp gives 0o700, and a cache may be shared
        with _fresh_folder(folder) as old, contextlib.suppress(FileNotFoundError):
            folder.rename(old / folder.name)
        try:
            fresh.rename(folder)
        except OSError:
            if load(folder) is None:  # not a faster process's entry, then: a real failure
                raise


def load(folder: Path) -> Entry | None:
    """Return the entry, None unless every file is there with the content that was written."""
    try:
        if json.loads((folder / SEAL).read_text()) != _hashes(folder):
            return None
        arrays = {p.stem: np.load(p, allow_pickle=False) for p in folder.glob("*.npy")}
        documents = {p.stem: json.loads(p.read_text("utf-8")) for p in folder.glob("*.json")}
    except (OSError, ValueError):
        return None
    del documents[Path(SEAL).stem]
    return Entry(arrays, documents)


@contextlib.contextmanager
def _fresh_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside `folder`, gone on leaving unless it was renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _hashes(folder: Path) -> dict[str, str]:
    names = sorted(path.name for path in folder.iterdir() if path.name != SEAL)
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
