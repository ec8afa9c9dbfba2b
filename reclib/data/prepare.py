"""Datasets ready to be split: prepared once, cached under a hash of source and rules, loaded at once.

    python -m reclib data prepare SOURCE [--out DIR] [--min-user 5] [--min-item 5] ...
    python -m reclib data fetch NAME
    python -m reclib data show DIR
    python -m reclib data verify DIR

SOURCE is the name of a dataset or a file. The rules of the preparation are in `prepare`, those of the
splits in `splits`.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_type_hints

import numpy as np
import pandas as pd
from tqdm import tqdm

from reclib import system
from reclib.config import DataConfig, InputError, changed, validated
from reclib.data import dataset, fetch, splits
from reclib.data.dataset import (
    MIN_LEN,
    Dataset,
    Evaluation,
    Histories,
    Keys,
    content_hash,
    described,
    evaluated_users,
    evaluation,
    lengths,
    load,
    ties,
    train_histories,
)
from reclib.data.formats import FORMATS, Format, checked, named, titles_beside
from reclib.data.read import RAW_COLUMNS, READING_VERSION, Ingested, Progress, ingest, printable, twin
from reclib.system import Parser

if TYPE_CHECKING:
    import duckdb


# ------------------------------------------------------------------------------------------------
# Seeded synthetic histories that a sequence model can learn and popularity cannot.
#
# Popularity is Zipf. Each item has a few successors; the next item is one of them with probability
# `FOLLOW`, else a draw by popularity. No user meets an item twice, as in rating data. The only loop
# is over time steps (with chunks of users to bound memory), each step serving all users that are
# still active.

VERSION = 1  # raise whenever the same arguments would give other histories

ZIPF = 1.0  # popularity of the item of rank r is proportional to r ** -ZIPF

SUCCESSORS = np.array([0.6, 0.3, 0.1])  # probabilities of an item's successors

FOLLOW = 0.7  # probability that the next item is a successor

CHUNK_USERS = 1 << 16  # users generated at a time


class Generated(NamedTuple):
    """Histories one after another."""

    items: np.ndarray  # int32 (num_interactions,): items 1..num_items
    offsets: np.ndarray  # int64 (num_users + 1,)


def generate(*, users: int, items: int, mean_len: float, seed: int) -> Generated:
    """Return histories of `users` users over `items` items with about `mean_len` interactions each.

    Lengths are cut at half the catalogue, so that unseen items always remain; with a small
    catalogue the mean comes out lower. Raises `InputError` where the arguments leave no room for
    that.
    """
    if mean_len < MIN_LEN:
        raise InputError(f"mean length is {mean_len}, expected at least {MIN_LEN} interactions per user")
    if items < 2 * MIN_LEN or items < mean_len:
        raise InputError(
            f"{items} synthetic items are too few for a mean length of {mean_len}: expected at "
            f"least {max(2 * MIN_LEN, int(np.ceil(mean_len)))}"
        )
    generator = np.random.default_rng(seed)
    by_rank = generator.permutation(items).astype(np.int32)  # item of each popularity rank
    cumulative = np.cumsum(np.arange(1, items + 1) ** -ZIPF)
    cumulative /= cumulative[-1]
    # successors are drawn by popularity too, so that following them keeps the Zipf shape
    draws = np.searchsorted(cumulative, generator.random((items, SUCCESSORS.size)), side="right")
    successors = by_rank[np.minimum(draws, items - 1)]  # (items, successors)
    length = lengths(users, mean_len, items // 2, generator)
    offsets = np.concatenate([[0], np.cumsum(length)])
    chunks = [
        _walk(length[start : start + CHUNK_USERS], by_rank, cumulative, successors, generator)
        for start in range(0, users, CHUNK_USERS)
    ]
    return Generated(np.concatenate(chunks) + np.int32(1), offsets)


def _walk(
    length: np.ndarray,
    by_rank: np.ndarray,
    cumulative: np.ndarray,
    successors: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return int32 (sum(length),) items from 0, users one after another."""
    longest_first = np.argsort(-length, kind="stable")
    ordered = length[longest_first]
    steps = int(ordered[0])
    active = np.searchsorted(-ordered, -np.arange(steps), side="left")  # users with length > step
    history = np.full((length.size, steps), -1, dtype=np.int32)
    for step in range(steps):
        past = history[: active[step], :step]
        drawn = np.empty(past.shape[0], dtype=np.int32)
        pending = np.arange(past.shape[0])
        attempt = 0
        while pending.size:
            if attempt < 4:
                tries = _by_popularity(pending.size, by_rank, cumulative, generator)
                if attempt == 0 and step:
                    follow = generator.random(pending.size) < FOLLOW
                    which = generator.choice(SUCCESSORS.size, pending.size, p=SUCCESSORS)
                    tries = np.where(follow, successors[past[pending, -1], which], tries)
            else:  # uniform: at least half the catalogue is unseen, so this ends soon
                tries = generator.integers(by_rank.size, size=pending.size, dtype=np.int32)
            drawn[pending] = tries
            pending = pending[(past[pending] == tries[:, None]).any(axis=1)]
            attempt += 1
        history[: active[step], step] = drawn
    rows = np.empty_like(history)
    rows[longest_first] = history
    return rows[np.arange(steps) < length[:, None]]


def _by_popularity(
    size: int, by_rank: np.ndarray, cumulative: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    ranks = np.searchsorted(cumulative, generator.random(size), side="right")
    return by_rank[np.minimum(ranks, by_rank.size - 1)]


# ------------------------------------------------------------------------------------------------
# Where interactions come from: a name, a file of any format, or a prepared folder.
#
# A source knows its identity before it reads anything, so that a prepared dataset is found without
# parsing: the same identity means the same interactions in the same order.

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
    fetch.present()
    return Source("ml-100k", fetch.IDENTITY, _fill_ml_100k)


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
    """Return seeded synthetic interactions (see `prepare`)."""
    asked: dict[str, Any] = {
        "users": config.synthetic_users,
        "items": config.synthetic_items,
        "mean_len": config.synthetic_mean_len,
        "seed": config.synthetic_seed,
    }
    described = " ".join(f"{key}={value}" for key, value in asked.items())
    return Source(
        "synthetic",
        f"synthetic-{VERSION} {described}",
        functools.partial(_fill_synthetic, asked),
    )


# Name -> what makes the source from the configuration.
SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "ml-100k": ml_100k_source,
    "synthetic": synthetic_source,
}


def _fill_ml_100k(con: duckdb.DuckDBPyConnection, progress: Progress | None = None) -> Ingested:
    got = fetch.files()
    format: Format = FORMATS["inter" if got.interactions.suffix == ".inter" else "ml-100k"]
    read = ingest(con, got.interactions, format, strict=True, progress=progress)
    read.provenance["origin"] = got.origin
    return read


def _fill_synthetic(
    asked: dict[str, Any], con: duckdb.DuckDBPyConnection, progress: Progress | None = None
) -> Ingested:
    made = generate(**asked)
    lengths = np.diff(made.offsets)
    seconds = 60 * (np.arange(made.items.size) - np.repeat(made.offsets[:-1], lengths))
    users = np.repeat(np.arange(lengths.size), lengths)
    frame = pd.DataFrame({"user": users, "item": made.items, "time": seconds})
    con.execute(f"CREATE OR REPLACE TABLE raw({RAW_COLUMNS})")
    con.register("generated", frame)
    con.execute("""INSERT INTO raw
        SELECT row_number() OVER () - 1, CAST("user" AS VARCHAR), CAST(item AS VARCHAR), NULL, time
        FROM generated""")
    con.unregister("generated")
    return Ingested("s", {"origin": "synthetic", **asked}, made.items.size, {}, [], _no_titles)


def _no_titles(items: Collection[str]) -> dict[str, str]:
    return {}


def _path(config: DataConfig) -> Path:
    return (system.root() / Path(config.dataset).expanduser()).resolve()


def _stem(path: Path) -> str:
    """Return the name without its endings; TiCoSeRec's and other dots inside it stay."""
    return printable(Path(path.name.removesuffix(".gz")).stem)


def _sha256(path: Path) -> str:
    """Return the hash of a file; that of a large one is kept, by path, size and time of change."""
    kept = system.data() / "hashes" / hashlib.sha256(_state(path).encode()).hexdigest()[:32]
    large = path.stat().st_size >= HASH_KEPT_BYTES
    if large:
        with contextlib.suppress(OSError):
            return kept.read_text()
    found = system.file_sha256(path)
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
        system.write_atomically(file, text)


# ------------------------------------------------------------------------------------------------
# Interactions -> duplicates -> k-core -> dense ids -> time order, out of core, into a prepared folder.
#
# Rows live in a DuckDB file that spills to disk beyond its memory limit; only counts per user and per
# item, and the offsets, are ever held whole. Rules (a change of any raises `RULES_VERSION`):
#
# - Duplicates: keep; or exact, the first row of equal (user, item, time) stays; or first and last, one
#   interaction of each (user, item) stays, the first or last by (time, row).
# - k-core: users below `min_user` and items below `min_item` interactions are removed, again and
#   again until nothing changes; the result does not depend on the order of removal. With
#   `single_pass` both are counted once, before anything is removed, as in the seed study.
# - Dense ids: in the order of raw ids, shorter before longer and then by character (see `dataset`).
# - Order: by (user, time, row in the source), so that ties have one stated order.

RULES_VERSION = 2

ORDER_BY = "user, timestamp, row"

SPLIT = "leave-one-out"

MAX_KEY_BYTES = 256  # of a raw id: keys are stored at the width of the longest

MAX_MB = 1 << 40  # of memory: more is no limit either

MB_PER_THREAD = 128  # a database thread needs about this much to sort and join without failing

VECTORS = 50  # fetched at a time, of 2,048 rows each

PAIRS = 1 << 20  # (user, item) pairs read at a time

# which row of a group of repeated interactions stays
_GROUPS = {
    "exact": 'partition by "user", item, time order by row',
    "first": 'partition by "user", item order by time, row',
    "last": 'partition by "user", item order by time desc, row desc',
}


class Core(NamedTuple):
    """What a k-core leaves."""

    users: np.ndarray  # bool (users,): whether the user code is in the core
    items: np.ndarray  # bool (items,)
    passes: list[int]  # interactions that each pass left, of the passes that removed something


class _Progress:
    """A bar on stderr where that is a terminal: bytes read, then the step at work."""

    def __init__(self) -> None:
        self.bar = tqdm(disable=None, leave=False, unit="B", unit_scale=True, desc="reading")

    def read(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def step(self, name: str) -> None:
        self.bar.set_description(name)


def build(source: Source, config: DataConfig, folder: Path, key: str) -> None:
    """Prepare the interactions of `source` and write them as the entry `folder` made from `key`.

    Raises `InputError` for a malformed source, where the k-core leaves nothing, and where the memory
    limit is too low; `OSError` where the disk is full. Then nothing is left behind.
    """
    progress = _Progress()
    with (
        contextlib.closing(progress.bar),
        system.scratch(system.data()) as work,
        _database(work, config) as con,
    ):
        ingested = source.fill(con, progress.read)
        progress.step("ids")
        steps = [_encode(con)]
        if config.duplicates != "keep":
            progress.step("duplicates")
            steps.append(_deduplicate(con, config.duplicates))
        progress.step("k-core")
        core = k_core(_pairs(con, work), steps[-1], config)
        if not core.users.any():
            raise InputError(_nothing_left(source.name, config, steps[-1]))
        progress.step("order")
        _renumber(con, core)
        steps.append(_order(con))
        about = _about(ingested, config, core.passes, steps)
        progress.step("writing")
        with system.writing(folder, key) as fresh:
            _write(con, fresh, source.name, ingested, about)


def k_core(pairs: Path, counts: Mapping[str, int], config: DataConfig) -> Core:
    """Return the (min_user, min_item)-core of a file of int32 (interactions, 2) user and item codes.

    `counts` holds how many "users" and "items" there are, coded from 0. The file shrinks from pass
    to pass, so that memory is needed only for one count per user and per item.
    """
    passes: list[int] = []
    users, items = _count(pairs, counts)
    while True:
        before = int(users.sum())
        _filter(pairs, users >= config.min_user, items >= config.min_item)
        users, items = _count(pairs, counts)
        left = int(users.sum())
        if left < before:
            passes.append(left)
        if left == before or config.core == "single_pass":
            return Core(users > 0, items > 0, passes)


def _count(pairs: Path, counts: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    users, items = (np.zeros(counts[name], dtype=np.int64) for name in ("users", "items"))
    for block in _blocks(pairs):
        users += np.bincount(block[:, 0], minlength=users.size)
        items += np.bincount(block[:, 1], minlength=items.size)
    return users, items


def _filter(pairs: Path, users: np.ndarray, items: np.ndarray) -> None:
    """Rewrite the file without the pairs whose user or item has no True."""
    fresh = pairs.with_suffix(".next")
    with fresh.open("wb") as file:
        for block in _blocks(pairs):
            file.write(block[users[block[:, 0]] & items[block[:, 1]]].tobytes())
    fresh.replace(pairs)


def _blocks(pairs: Path) -> Iterator[np.ndarray]:
    with pairs.open("rb") as file:
        while (block := np.fromfile(file, dtype=np.int32, count=2 * PAIRS)).size:
            yield block.reshape(-1, 2)


@contextlib.contextmanager
def _database(work: Path, config: DataConfig) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a database in the folder `work`; its errors become errors of ours."""
    import duckdb  # here: what trains on prepared data needs no database

    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings: dict[str, Any] = {
        "memory_limit": f"{min(config.memory_limit_mb, MAX_MB)}MB",
        "threads": max(1, min(available, config.memory_limit_mb // MB_PER_THREAD)),
        "temp_directory": str(work / "spilled"),
        "autoinstall_known_extensions": False,  # reading a file never asks the network
    }
    try:
        # In a path, the database takes "?" for the start of options; one in memory spills to `work` as well.
        place = ":memory:" if "?" in str(work) else str(work / "rows.duckdb")
        with duckdb.connect(place, config=settings) as con:
            con.execute("set enable_progress_bar = false")  # ours is shown
            yield con
    except duckdb.InterruptException:
        raise KeyboardInterrupt from None
    except RuntimeError as error:  # what the database makes of an interrupt at work
        if "interrupt" in str(error).lower():
            raise KeyboardInterrupt from None
        raise
    except duckdb.OutOfMemoryException as error:
        raise InputError(
            f"parameter 'memory_limit_mb' is {config.memory_limit_mb}, too low for this dataset: "
            f"{_first_line(error)}"
        ) from None
    except (duckdb.IOException, duckdb.TransactionException, duckdb.FatalException) as error:
        raise OSError(_first_line(error)) from None  # a full disk appears as any of them


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _encode(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Turn `raw` into `events` with integer codes for users and items; the codes have no order."""
    for table, column in (("users", '"user"'), ("items", "item")):
        con.execute(
            f"create table {table} as "
            f"select row_number() over () - 1 as code, key from (select distinct {column} as key from raw)"
        )
        _refuse_keys(con, table, column)
    con.execute(
        'create table events as select raw.row, users.code::integer as "user", items.code::integer as item, '
        'raw.rating, raw.time from raw join users on users.key = raw."user" '
        "join items on items.key = raw.item"
    )
    con.execute("drop table raw")
    return _counted(con, "source")


def _refuse_keys(con: duckdb.DuckDBPyConnection, table: str, column: str) -> None:
    bad = con.execute(
        f"select key from {table} where strlen(key) > {MAX_KEY_BYTES} or contains(key, chr(0)) limit 1"
    ).fetchone()
    if bad:
        name = column.strip('"')
        raise InputError(
            f"{name} id {bad[0][:40]!r} has {len(bad[0].encode()):,} bytes or a NUL character: "
            f"expected at most {MAX_KEY_BYTES} bytes of text"
        )


def _deduplicate(con: duckdb.DuckDBPyConnection, rule: str) -> dict[str, Any]:
    con.execute(
        f"create table kept as select * from events qualify row_number() over ({_GROUPS[rule]}) = 1;"
        "drop table events; alter table kept rename to events"
    )
    return _counted(con, "de-duplicated")


def _counted(con: duckdb.DuckDBPyConnection, name: str) -> dict[str, Any]:
    counts = con.execute(
        "select (select count(*) from users), (select count(*) from items), (select count(*) from events)"
    ).fetchone()
    return dataset.step(name, *(counts or ()))


def _pairs(con: duckdb.DuckDBPyConnection, work: Path) -> Path:
    path = work / "pairs"
    with path.open("wb") as file:
        for chunk in _chunks(con, 'select "user", item from events'):
            file.write(np.ascontiguousarray(chunk.to_numpy(np.int32)).tobytes())
    return path


def _renumber(con: duckdb.DuckDBPyConnection, core: Core) -> None:
    """Give dense ids to what is in the core: `user_ids` from 0 and `item_ids` from 1."""
    for table, alive, first in (("user", core.users, 0), ("item", core.items, 1)):
        con.register("alive", pd.DataFrame({"code": np.flatnonzero(alive)}))
        con.execute(
            f"create table {table}_ids as select code, key, "
            f"(row_number() over (order by length(key), key) - 1 + {first})::integer as id "
            f"from {table}s where code in (select code from alive)"
        )
        con.unregister("alive")


def _order(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Make `histories`, whose row ids are the positions in the arrays."""
    con.execute(
        'create table histories as select user_ids.id as "user", item_ids.id as item, rating, time '
        'from events join user_ids on user_ids.code = events."user" '
        "join item_ids on item_ids.code = events.item order by user_ids.id, time, row"
    )
    con.execute("drop table events")
    counts = con.execute(
        "select (select count(*) from user_ids), (select count(*) from item_ids), "
        "(select count(*) from histories)"
    ).fetchone()
    return dataset.step("k-core", *(counts or ()))


def _about(
    ingested: Ingested, config: DataConfig, passes: list[int], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    core = {"min_user": config.min_user, "min_item": config.min_item, "rule": config.core, "passes": passes}
    rules = {"version": RULES_VERSION, "order": ORDER_BY, "duplicates": config.duplicates, "split": SPLIT}
    read = {"lines": ingested.lines_read, "rejected": dict(ingested.rejected)}
    return {
        "rules": rules,
        "source": dict(ingested.provenance),
        "reading": {**read, "rejected_examples": list(ingested.rejected_examples)},
        "core": core,
        "time_unit": ingested.time_unit,
        "steps": steps,
    }


def _write(
    con: duckdb.DuckDBPyConnection, fresh: Path, name: str, ingested: Ingested, about: dict[str, Any]
) -> None:
    """Fill the folder `fresh`: arrays and keys, the table for people and tools, titles, manifest."""
    size = about["steps"][-1]["interactions"]
    columns = {"items": ("item", np.int32), "times": ("time", np.int64)}
    if ingested.time_unit == "order":
        del columns["times"]
    for file, (column, dtype) in columns.items():
        pieces = (chunk[column].to_numpy() for chunk in _chunks(con, f"select {column} from histories"))
        system.write_array(fresh / f"{file}.npy", dtype, size, pieces)
    offsets = _offsets(con)
    system.write_array(fresh / "offsets.npy", np.int64, offsets.size, [offsets])
    _write_keys(con, "user", fresh / "user_keys.npy", [])
    _write_keys(con, "item", fresh / "item_keys.npy", [""])
    _write_table(con, fresh / "interactions.parquet", with_times="times" in columns)
    item_keys = dataset.Keys(np.load(fresh / "item_keys.npy", mmap_mode="r"))
    titles = ingested.titles(frozenset(item_keys))
    system.write_json(fresh / "titles.json", {key: titles[key] for key in item_keys if key in titles})
    written = dataset.opened(fresh, {"name": name})
    about = {**about, "ties": dataset.ties(written)}
    system.write_json(fresh / "manifest.json", dataset.described(written, about))


def _chunks(con: duckdb.DuckDBPyConnection, query: str) -> Iterator[pd.DataFrame]:
    """Yield the rows of a query a piece at a time; tables give them in the order of their row ids."""
    result = con.execute(query)
    while len(chunk := result.fetch_df_chunk(VECTORS)):
        yield chunk


def _offsets(con: duckdb.DuckDBPyConnection) -> np.ndarray:
    chunks = _chunks(con, 'select count(*) as length from histories group by "user" order by "user"')
    lengths = np.concatenate([chunk["length"].to_numpy() for chunk in chunks])
    return np.concatenate([[0], np.cumsum(lengths)])


def _write_keys(con: duckdb.DuckDBPyConnection, table: str, path: Path, before: list[str]) -> None:
    row = con.execute(f"select max(strlen(key)), count(*) from {table}_ids").fetchone()
    width, count = row or (1, 0)
    dtype = np.dtype(f"S{width}")

    def pieces() -> Iterator[np.ndarray]:
        if before:
            yield np.array([key.encode() for key in before], dtype)
        for chunk in _chunks(con, f"select key from {table}_ids order by id"):
            yield np.array([key.encode() for key in chunk["key"].tolist()], dtype)

    system.write_array(path, dtype, count + len(before), pieces())


def _write_table(con: duckdb.DuckDBPyConnection, path: Path, *, with_times: bool) -> None:
    con.execute('create table firsts as select "user", min(rowid) as first from histories group by "user"')
    time = "time" if with_times else "null::bigint"
    con.execute(
        f'copy (select user_ids.key as "user", item_ids.key as item, rating, {time} as time, '
        "histories.rowid - firsts.first as position from histories "
        'join user_ids on user_ids.id = histories."user" join item_ids on item_ids.id = histories.item '
        'join firsts on firsts."user" = histories."user" order by histories.rowid) '
        "to ? (format parquet, compression zstd)",
        [str(path)],
    )


def _nothing_left(name: str, config: DataConfig, counts: Mapping[str, Any]) -> str:
    return (
        f"nothing of dataset {name!r} is left by the k-core with min_user={config.min_user} and "
        f"min_item={config.min_item}: it has {counts['interactions']:,} interactions of "
        f"{counts['users']:,} users with {counts['items']:,} items; lower one"
    )


# ------------------------------------------------------------------------------------------------

__all__ = [
    "DataConfig",
    "Dataset",
    "Evaluation",
    "Histories",
    "evaluated_users",
    "evaluation",
    "folder_of",
    "load",
    "prepare",
    "synthetic_dataset",
    "train_histories",
]

COLUMNS = ("user", "item", "time", "rating")


def prepare(config: DataConfig) -> Dataset:
    """Return the dataset of `config`, prepared unless it is whole in the data folder.

    Raises `InputError` for a source that is unknown, unreachable or malformed, and where the k-core
    leaves nothing; then nothing is written.
    """
    return load(folder_of(config))


def folder_of(config: DataConfig, out: Path | None = None) -> Path:
    """Return the folder of the prepared dataset, after preparing it unless it is whole there.

    The folder is `out`, else one in the data folder named by a hash of source and rules. Where
    `config.dataset` is a prepared folder it is that one, as it is.
    """
    given = prepared_folder(config)
    if given is not None:
        if out is not None:
            raise InputError(f"{given} is prepared already: give the file that it was made from")
        return given
    origin = source(config)
    key = _key(origin, config)
    folder = out or system.data() / "prepared" / f"{origin.name}-{key}"
    if out is not None:
        _refuse_foreign(out)
    if not system.holds(folder, key):
        build(origin, config, folder, key)
    return folder


def synthetic_dataset(num_users: int, num_items: int, mean_len: float, seed: int) -> Dataset:
    """Return synthetic histories without filter or cache, for benchmarks and tests.

    The catalogue is exactly 1..num_items, met or not. Lengths are geometric-like from 5
    interactions.
    """
    made = generate(users=num_users, items=num_items, mean_len=mean_len, seed=seed)
    asked = {"users": num_users, "items": num_items, "mean_len": mean_len, "seed": seed}
    item_keys = Keys.of(["", *map(str, range(1, num_items + 1))])
    user_keys = Keys.of(list(map(str, range(num_users))))
    dataset = Dataset("synthetic", made.items, made.offsets, item_keys, user_keys, {}, {})
    rules = {"version": RULES_VERSION, "order": ORDER_BY, "split": SPLIT}
    source = {"origin": "synthetic, unfiltered", **asked}
    about = {"rules": rules, "source": source, "time_unit": "order", "ties": ties(dataset)}
    dataset.manifest.update(described(dataset, about))
    return dataset


def _key(source: Source, config: DataConfig) -> str:
    """Return what tells prepared folders apart: the source's rows and all that decides what is kept."""
    rules = [config.min_user, config.min_item, config.core, config.duplicates]
    reading = [READING_VERSION, config.strict, config.max_rejected_share]
    told = [RULES_VERSION, source.name, source.identity, rules, reading]
    return content_hash(*map(str, told))[:16]


def _refuse_foreign(folder: Path) -> None:
    """Refuse to put a dataset in the place of what is none: a file, or a folder with other content."""
    free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not free and not (folder / system.SEAL).is_file():
        raise InputError(f"{folder} exists and is no prepared dataset: give a new folder")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m reclib data", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make a dataset of a file or a name")
    command.set_defaults(act=_prepare_command)
    default = DataConfig()
    kinds = get_type_hints(DataConfig)
    command.add_argument("source", help="a file, or the name of a dataset")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: the data folder)")
    command.add_argument("--format", default=default.format, help="of the file (default: auto)")
    command.add_argument("--columns", type=_columns, metavar="user=A,item=B,time=C", help="of an own table")
    for name, text in (
        ("min_user", "interactions that a user must have"),
        ("min_item", "interactions that an item must have"),
    ):
        given = getattr(default, name)
        command.add_argument(_option(name), type=int, default=given, metavar="N", help=f"{text} ({given})")
    for name, text in (("core", "how the two are applied"), ("duplicates", "what stays of repeated rows")):
        allowed, given = get_args(kinds[name]), getattr(default, name)
        command.add_argument(_option(name), choices=allowed, default=given, help=f"{text} ({given})")
    command.add_argument("--strict", action="store_true", help="stop at the first bad line")
    share, memory = default.max_rejected_share, default.memory_limit_mb
    text = f"bad lines at which it stops, a share of all ({share:g})"
    command.add_argument("--max-rejected-share", type=float, default=share, metavar="X", help=text)
    text = f"megabytes that the database may take ({memory})"
    command.add_argument("--memory-mb", type=int, default=memory, metavar="N", help=text)
    for name, act, text in (
        ("show", _show_command, "print counts and splits of a prepared folder"),
        ("verify", _verify_command, "read every byte of a prepared folder and compare"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("folder", type=Path, help="what `prepare` wrote")
        command.set_defaults(act=act)
    command = commands.add_parser("fetch", help="download a dataset by name, or list them")
    fetch.add_arguments(command)
    command.set_defaults(act=fetch.run)
    return parser


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _columns(text: str) -> dict[str, str]:
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    wrong = [name for name, column in pairs.items() if name not in COLUMNS or not column]
    if wrong:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=COLUMN with a name of {', '.join(COLUMNS)}"
        )
    return pairs


def _prepare_command(given: argparse.Namespace) -> int:
    path = Path(given.source)
    values: dict[str, Any] = {
        # a file as the shell sees it: a relative name in a configuration counts from the project's root
        "dataset": str(path.resolve()) if path.exists() else given.source,
        "memory_limit_mb": given.memory_mb,
    }
    names = (
        "format",
        "columns",
        "min_user",
        "min_item",
        "core",
        "duplicates",
        "strict",
        "max_rejected_share",
    )
    values |= {name: getattr(given, name) for name in names}
    config = validated(DataConfig, values)
    folder = folder_of(config, given.out and given.out.resolve())
    print("\n".join(_report(load(folder))))
    print(folder / "manifest.json")
    return 0


def _show_command(given: argparse.Namespace) -> int:
    dataset = load(given.folder)
    print("\n".join(_report(dataset)))
    kinds = [splits.leave_one_out] + ([splits.global_time] if dataset.times is not None else [])
    for kind in kinds:
        try:
            split = kind(dataset)
        except InputError as error:  # all times may coincide, say
            print(f"{kind.__name__}: {error}")
            continue
        print(f"{split.name}:")
        for name, value in split.about.items():
            print(f"  {name}: {value}")
    return 0


def _verify_command(given: argparse.Namespace) -> int:
    found = system.damage(given.folder)
    if found:
        raise InputError(f"{given.folder}: {'; '.join(found)}; {system.remedy(given.folder)}")
    print(f"{given.folder}: every file is as it was written; fingerprint {load(given.folder).fingerprint}")
    return 0


def _report(dataset: Dataset) -> list[str]:
    manifest = dataset.manifest
    lines = [f"{dataset.name}, fingerprint {dataset.fingerprint}, times: {manifest['time_unit']}"]
    lines.append(f"{'':<16}{'users':>14}{'items':>14}{'interactions':>16}")
    for row in manifest["steps"]:
        lines.append(f"{row['step']:<16}{row['users']:>14,}{row['items']:>14,}{row['interactions']:>16,}")
    core = manifest["core"]
    lines.append(f"k-core ({core['rule']}): {len(core['passes'])} passes")
    for what, published in manifest["source"].get("published_counts", {}).items():
        found = manifest["steps"][0][what]
        agrees = "as published" if found == published else f"but {published:,} are published"
        lines.append(f"{what} of the source: {found:,}, {agrees}")
    for reason, count in manifest["reading"]["rejected"].items():
        lines.append(f"rejected, {reason}: {count:,} of {manifest['reading']['lines']:,} lines")
    return lines


def data_main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        return given.act(given)
    except BrokenPipeError:
        raise
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
