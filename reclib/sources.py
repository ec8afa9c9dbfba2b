"""Where interactions come from: a name, a file of any format, or a prepared folder.

A source knows its identity before it reads anything, so that a prepared dataset is found without
parsing: the same identity means the same interactions in the same order.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from reclib import fetch, ml100k, paths, synthetic
from reclib.config import DataConfig, InputError, changed
from reclib.formats import FORMATS, Format, checked, named, titles_beside
from reclib.reading import COLUMNS, Ingested, Progress, ingest, printable, twin

if TYPE_CHECKING:
    import duckdb

MANIFEST = "manifest.json"
HASH_KEPT_BYTES = 64 << 20  # the hash of a larger file is kept in the data folder


@dataclass(frozen=True)
class Source:
    """A dataset that can be read."""

    name: str
    identity: str  # the same identity means the same rows in the same order
    fill: Callable[[duckdb.DuckDBPyConnection, Progress | None], Ingested]  # creates the table `raw`


def source(config: DataConfig) -> Source:
    """Return the source that `config.dataset` names: an entry of `SOURCES`, a file, or what was fetched.

    The file's format is `config.format` (see `formats`). A relative path counts from the project's
    root, since tools differ in their working directory. For a prepared folder see `prepared_folder`.
    """
    name = config.dataset
    if name in SOURCES:
        return SOURCES[name](config)
    path = _path(config)
    if not path.exists() and name in fetch.catalogue():
        return fetched_source(name, config)
    if path.is_dir():
        raise InputError(f"{path} is a folder without {MANIFEST}, expected a file or a prepared dataset")
    if path.exists():
        return file_source(path, config)
    names = list(SOURCES | fetch.catalogue())
    known = ", ".join(names)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise InputError(
        f"parameter 'dataset' is {name!r}{hint}: expected one of {known}, or a file, and {path} is none"
    )


def prepared_folder(config: DataConfig) -> Path | None:
    """Return the folder that `config.dataset` names if it holds a prepared dataset, else None."""
    if config.dataset in SOURCES:
        return None
    path = _path(config)
    return path if (path / MANIFEST).is_file() else None


def ml_100k_source(config: DataConfig) -> Source:
    """Return MovieLens 100K: files in place are verified now, missing ones fetched when read."""
    ml100k.present()
    return Source("ml-100k", ml100k.IDENTITY, _fill_ml_100k)


def file_source(path: Path, config: DataConfig) -> Source:
    """Return the user's own file as a source, identified by its content and by how it is read."""
    format = named(config.format, checked(path), config.columns)
    state = _state(path)
    beside = [other for other in (twin(path), titles_beside(path)) if other is not None]
    hashes = [_sha256(one) for one in (path, *beside)]
    columns = sorted((config.columns or {}).items())
    # strict and max_rejected_share only decide whether reading ends in an error, not what it gives
    identity = json.dumps([format.name, columns, hashes])

    def fill(con: duckdb.DuckDBPyConnection, progress: Progress | None = None) -> Ingested:
        read = ingest(
            con,
            path,
            format,
            columns=config.columns,
            strict=config.strict,
            max_rejected_share=config.max_rejected_share,
            progress=progress,
            sha256=hashes[0],
        )
        if _state(path) != state:
            raise InputError(f"{path.name} changed while it was read; prepare it again")
        read.provenance["origin"] = "file"
        return read

    return Source(_stem(path), identity, fill)


def fetched_source(name: str, config: DataConfig) -> Source:
    """Return a public dataset that was fetched (see `fetch`); nothing is downloaded here."""
    path = fetch.fetched(name)
    if path is None:
        raise fetch.not_fetched(name)
    entry = fetch.known(name)
    format = entry.format if config.format == "auto" else config.format
    file = file_source(path, changed(config, format=format))

    def fill(con: duckdb.DuckDBPyConnection, progress: Progress | None = None) -> Ingested:
        read = file.fill(con, progress)
        read.provenance.update(origin=entry.address, published_counts=entry.counts)
        return read

    return replace(file, name=name, fill=fill)


def synthetic_source(config: DataConfig) -> Source:
    """Return seeded synthetic interactions (see `synthetic`)."""
    asked: dict[str, Any] = {
        "users": config.synthetic_users,
        "items": config.synthetic_items,
        "mean_len": config.synthetic_mean_len,
        "seed": config.synthetic_seed,
    }
    described = " ".join(f"{key}={value}" for key, value in asked.items())
    return Source(
        "synthetic",
        f"synthetic-{synthetic.VERSION} {described}",
        functools.partial(_fill_synthetic, asked),
    )


# Name -> what makes the source from the configuration.
SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "ml-100k": ml_100k_source,
    "synthetic": synthetic_source,
}


def _fill_ml_100k(con: duckdb.DuckDBPyConnection, progress: Progress | None = None) -> Ingested:
    got = ml100k.files()
    format: Format = FORMATS["inter" if got.interactions.suffix == ".inter" else "ml-100k"]
    read = ingest(con, got.interactions, format, strict=True, progress=progress)
    read.provenance["origin"] = got.origin
    return read


def _fill_synthetic(
    asked: dict[str, Any], con: duckdb.DuckDBPyConnection, progress: Progress | None = None
) -> Ingested:
    made = synthetic.generate(**asked)
    lengths = np.diff(made.offsets)
    seconds = 60 * (np.arange(made.items.size) - np.repeat(made.offsets[:-1], lengths))
    users = np.repeat(np.arange(lengths.size), lengths)
    frame = pd.DataFrame({"user": users, "item": made.items, "time": seconds})
    con.execute(f"CREATE OR REPLACE TABLE raw({COLUMNS})")
    con.register("generated", frame)
    con.execute("""INSERT INTO raw
        SELECT row_number() OVER () - 1, CAST("user" AS VARCHAR), CAST(item AS VARCHAR), NULL, time
        FROM generated""")
    con.unregister("generated")
    return Ingested("s", {"origin": "synthetic", **asked}, made.items.size, {}, [], _no_titles)


def _no_titles(items: Collection[str]) -> dict[str, str]:
    return {}


def _path(config: DataConfig) -> Path:
    return (paths.root() / Path(config.dataset).expanduser()).resolve()


def _stem(path: Path) -> str:
    """Return the name without its endings; TiCoSeRec's and other dots inside it stay."""
    return printable(Path(path.name.removesuffix(".gz")).stem)


def _sha256(path: Path) -> str:
    """Return the hash of a file; that of a large one is kept, by path, size and time of change."""
    kept = paths.data() / "hashes" / hashlib.sha256(_state(path).encode()).hexdigest()[:32]
    large = path.stat().st_size >= HASH_KEPT_BYTES
    if large:
        with contextlib.suppress(OSError):
            return kept.read_text()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if large:
        _keep(kept, found)
    return found


def _state(path: Path) -> str:
    """Return what changes whenever the file does: its place, size and time of change."""
    stat = checked(path).stat()
    return f"{os.fsencode(path.resolve())!r} {stat.st_size} {stat.st_mtime_ns}"


def _keep(file: Path, text: str) -> None:
    """Write a small file, whole or not at all; a full disk only means hashing again."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "w") as out:
            out.write(text)
        Path(name).replace(file)
