"""Prepared datasets, cached in folders named by a hash of source and rules.

    python -m reclib data prepare SOURCE [--out DIR] [--min-user 5] [--min-item 5] ...
    python -m reclib data fetch NAME
    python -m reclib data show DIR
    python -m reclib data verify DIR

SOURCE is the name of a dataset or a file. Duplicates are removed, then the k-core is taken, ids are made
dense and interactions are ordered by time. This is done out of core, in a DuckDB file that spills to disk
beyond its memory limit; only counts per user and item, and the offsets, are in memory. Rules (a change of any
raises `RULES_VERSION`):

- Duplicates: keep all; exact: keep the first row of equal (user, item, time); first, last: keep one
  interaction of each (user, item), the first or last by (time, row).
- Variants: with `merge_variants`, items whose titles differ in size, length, colour or count alone become
  one item (`formats.product_of`), the first of them by id. Of a user's consecutive interactions with one
  product, by (time, row), the first is kept.
- k-core: users below `min_user` and items below `min_item` interactions are removed until nothing changes;
  the result does not depend on the order of removal. With `single_pass` both are counted once, before
  anything is removed, as in the seed study.
- Dense ids: in the order of raw ids, shorter before longer and then by character (see `dataset`).
- Order: by (user, time), equal times by `ties`: in the source's order, by item id, or shuffled by a seed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from tqdm import tqdm

from reclib import system
from reclib.config import DataConfig, InputError, changed, columns_of, nearest, validated
from reclib.data import dataset, fetch, splits
from reclib.data.dataset import MIN_LEN, Dataset, Keys, content_hash, described, lengths, load, within
from reclib.data.formats import FORMATS, checked, named, product_of, titles_beside
from reclib.data.read import RAW_COLUMNS, READING_VERSION, Ingested, Progress, ingest, printable, twin
from reclib.hardware import usable_cores
from reclib.system import Parser

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection as Connection

RULES_VERSION = 2
MANIFEST_VERSION = 2  # raise whenever the manifest of the same dataset changes

MANIFEST = "manifest.json"
SPLIT = "leave-one-out"

# `DataConfig.ties` -> the order in words for the manifest, and in SQL
ORDERS = {
    "source": ("user, timestamp, row", "row"),
    "item": ("user, timestamp, item, row", "item_ids.id, row"),
    "shuffle": ("user, timestamp, shuffled by seed {seed}", "md5('{seed} ' || row), row"),
}

# `DataConfig.duplicates` -> window over repeated interactions, whose first row is kept
_GROUPS = {
    "exact": 'partition by "user", item, time order by row',
    "first": 'partition by "user", item order by time, row',
    "last": 'partition by "user", item order by time desc, row desc',
}

HASH_CACHED_BYTES = 64 << 20  # the hash of a larger file is cached in the data folder
MAX_KEY_BYTES = 256  # of a raw id: keys are stored at the width of the longest
MAX_MB = 1 << 40  # the largest memory limit that is passed to the database
MB_PER_THREAD = 128  # memory that a database thread needs to sort and join
VECTORS = 50  # of 2,048 rows each, fetched at a time


def prepare(config: DataConfig) -> Dataset:
    """Return the dataset of `config`, preparing it unless it is complete in the data folder.

    Raises `InputError` for a source that is unknown, unreachable or malformed, and for an empty k-core;
    nothing is written then.
    """
    return load(folder_of(config))


def folder_of(config: DataConfig, out: Path | None = None) -> Path:
    """Return the folder of the prepared dataset, preparing it unless it is complete.

    The folder is `out`, else one in the data folder named by a hash of source and rules. If `config.dataset`
    is a prepared folder, it is returned unchanged.
    """
    prepared = prepared_folder(config)
    if prepared is not None:
        if out is not None:
            raise InputError(f"{prepared} is prepared already: give the file that it was made from")
        return prepared
    origin = source(config)
    key = _key(origin, config)
    folder = out or system.data() / "prepared" / f"{origin.name}-{key}"
    foreign = out is not None and folder.exists() and not (folder / system.SEAL).is_file()
    if foreign and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no prepared dataset: give a new folder")
    if not system.holds(folder, key):
        build(origin, config, folder, key)
    return folder


def _key(source: Source, config: DataConfig) -> str:
    """Return the hash of the source and of all rules that determine the prepared rows."""
    rules = [config.min_user, config.min_item, config.core, config.duplicates, _order_rule(config)]
    rules += ["variants merged"] if config.merge_variants else []
    reading = [READING_VERSION, config.strict, config.max_rejected_share, config.max_line_mb]
    parts = [RULES_VERSION, MANIFEST_VERSION, source.name, source.identity, rules, reading]
    return content_hash(map(str, parts))[:16]


# ---- synthetic histories --------------------------------------------------------------------------------
#
# Histories that a sequence model can learn and popularity cannot: popularity is Zipf, each item has a few
# successors, and the next item is one of them with probability `FOLLOW`, else drawn by popularity. A user has
# each item once, as in rating data.

VERSION = 1  # raise whenever the same arguments would give other histories
ZIPF = 1.0  # popularity of the item of rank r is proportional to r ** -ZIPF
SUCCESSORS = np.array([0.6, 0.3, 0.1])  # probabilities of an item's successors
FOLLOW = 0.7  # probability that the next item is a successor
CHUNK_USERS = 1 << 16  # users generated at a time


def generate(*, users: int, items: int, mean_len: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return items (num_interactions,) from 1 and offsets (users + 1,) of synthetic histories.

    Histories have about `mean_len` interactions, at most half the catalogue, which lowers the mean for small
    catalogues. Raises `InputError` for a mean or a catalogue that is too small.
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

    def popular(shape: int | tuple[int, int]) -> np.ndarray:
        ranks = np.searchsorted(cumulative, generator.random(shape), side="right")
        return by_rank[np.minimum(ranks, items - 1)]

    # successors are drawn by popularity too, so that following them keeps the Zipf shape
    successors = popular((items, SUCCESSORS.size))
    length = lengths(users, mean_len, items // 2, generator)
    chunks = [
        _walk(length[start : start + CHUNK_USERS], items, popular, successors, generator)
        for start in range(0, users, CHUNK_USERS)
    ]
    return np.concatenate(chunks) + np.int32(1), np.concatenate([[0], np.cumsum(length)])


def _walk(
    length: np.ndarray,
    items: int,
    popular: Callable[[int], np.ndarray],
    successors: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return int32 (sum(length),) items from 0, users one after another.

    The outer loop is over time steps; each handles all users that are still active.
    """
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
                tries = popular(pending.size)
                if attempt == 0 and step:
                    follow = generator.random(pending.size) < FOLLOW
                    which = generator.choice(SUCCESSORS.size, pending.size, p=SUCCESSORS)
                    tries = np.where(follow, successors[past[pending, -1], which], tries)
            else:  # uniform: at least half the catalogue is unseen, so this ends soon
                tries = generator.integers(items, size=pending.size, dtype=np.int32)
            drawn[pending] = tries
            pending = pending[(past[pending] == tries[:, None]).any(axis=1)]
            attempt += 1
        history[: active[step], step] = drawn
    rows = np.empty_like(history)
    rows[longest_first] = history
    return rows[np.arange(steps) < length[:, None]]


def synthetic_dataset(num_users: int, num_items: int, mean_len: float, seed: int) -> Dataset:
    """Return synthetic histories without filter or cache, for benchmarks and tests.

    The catalogue is 1..num_items, whether items occur or not. Lengths are geometric from 5 interactions.
    """
    arguments = {"users": num_users, "items": num_items, "mean_len": mean_len, "seed": seed}
    items, offsets = generate(**arguments)  # type: ignore[arg-type]
    item_keys = Keys.encode(["", *map(str, range(1, num_items + 1))])
    user_keys = Keys.encode(list(map(str, range(num_users))))
    result = Dataset("synthetic", items, offsets, item_keys, user_keys, {}, {})
    rules = {"version": RULES_VERSION, "order": ORDERS["source"][0], "split": SPLIT}
    origin = {"origin": "synthetic, unfiltered", **arguments}
    result.manifest.update(described(result, {"rules": rules, "source": origin, "time_unit": "order"}))
    return result


# ---- sources of interactions ----------------------------------------------------------------------------
#
# The identity of a source is known before it is read, so that a prepared dataset is found without parsing.


@dataclass(frozen=True)
class Source:
    """A dataset that can be read."""

    name: str
    identity: str  # the same identity means the same rows in the same order
    # (database, progress, folder for temporary files): creates the table `raw`
    fill: Callable[..., Ingested]


def source(config: DataConfig) -> Source:
    """Return the source that `config.dataset` names: an entry of `SOURCES`, a file, or a fetched dataset.

    The file's format is `config.format` (see `formats`). A relative path is relative to the project's root,
    since tools differ in their working directory. For a prepared folder see `prepared_folder`.
    """
    name = config.dataset
    if name in SOURCES:
        return SOURCES[name](config)
    path = _path(config)
    if path.is_dir():
        raise InputError(f"{path} is a folder without {MANIFEST}, expected a file or a prepared dataset")
    if path.exists():
        return file_source(path, config)
    names = list(SOURCES | fetch.catalogue())
    if name in names:
        return fetched_source(name, config)
    raise InputError(
        f"parameter 'dataset' is {name!r}{nearest(name, names)}: expected one of {', '.join(names)}, or a "
        f"file, and {path} is none"
    )


def prepared_folder(config: DataConfig) -> Path | None:
    """Return the folder that `config.dataset` names if it holds a prepared dataset, else None."""
    path = _path(config)
    return path if config.dataset not in SOURCES and (path / MANIFEST).is_file() else None


def file_source(path: Path, config: DataConfig) -> Source:
    """Return a user's file as a source, identified by its content, format and columns."""
    format = named(config, checked(path))
    state = _state(path)
    beside = [other for other in (twin(path), titles_beside(path)) if other is not None]
    hashes = [_sha256(file) for file in (path, *beside)]
    # without `strict` and the limits, which decide about errors only
    identity = json.dumps([format.name, sorted((config.columns or {}).items()), hashes])

    def fill(con: Connection, progress: Progress | None = None, work: Path | None = None) -> Ingested:
        ingested = ingest(con, path, format, config=config, progress=progress, sha256=hashes[0], work=work)
        if _state(path) != state:
            raise InputError(f"{path.name} changed while it was read; prepare it again")
        ingested.provenance["origin"] = "file"
        return ingested

    # the name without its endings; other dots stay
    return Source(printable(Path(path.name.removesuffix(".gz")).stem), identity, fill)


def fetched_source(name: str, config: DataConfig) -> Source:
    """Return a fetched public dataset (see `fetch`) as a source; nothing is downloaded."""
    path = fetch.fetched(name)
    if path is None:
        raise fetch.not_fetched(name)
    entry = fetch.known(name)
    config = changed(config, format=entry.format) if config.format == "auto" else config
    file = file_source(path, config)

    def fill(*arguments: Any) -> Ingested:
        ingested = file.fill(*arguments)
        ingested.provenance.update(origin=entry.address, published_counts=entry.counts)
        return ingested

    return replace(file, name=name, fill=fill)


def ml_100k_source(config: DataConfig) -> Source:
    """Return MovieLens 100K as a source; existing files are verified now, missing ones fetched on reading."""
    fetch.present()

    def fill(con: Connection, progress: Progress | None = None, work: Path | None = None) -> Ingested:
        files = fetch.files()
        format = FORMATS["inter" if files.interactions.suffix == ".inter" else "ml-100k"]
        strict = changed(config, strict=True)
        ingested = ingest(con, files.interactions, format, config=strict, progress=progress, work=work)
        ingested.provenance["origin"] = files.origin
        return ingested

    return Source("ml-100k", fetch.IDENTITY, fill)


def synthetic_source(config: DataConfig) -> Source:
    """Return seeded synthetic interactions, a minute apart (see `generate`)."""
    names = ("users", "items", "mean_len", "seed")
    arguments = {name: getattr(config, f"synthetic_{name}") for name in names}

    def fill(con: Connection, *_: Any) -> Ingested:
        items, offsets = generate(**arguments)
        length = np.diff(offsets)
        users = np.repeat(np.arange(length.size), length)
        con.execute(f"CREATE OR REPLACE TABLE raw({RAW_COLUMNS})")
        con.register("generated", pd.DataFrame({"user": users, "item": items, "time": 60 * within(length)}))
        con.execute("""INSERT INTO raw
            SELECT row_number() OVER () - 1, CAST("user" AS VARCHAR), CAST(item AS VARCHAR), time
            FROM generated""")
        con.unregister("generated")
        return Ingested("s", {"origin": "synthetic", **arguments}, items.size, {}, [], lambda _: {})

    description = " ".join(f"{name}={value}" for name, value in arguments.items())
    return Source("synthetic", f"synthetic-{VERSION} {description}", fill)


# Name -> function that returns the source of a configuration.
SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "ml-100k": ml_100k_source,
    "synthetic": synthetic_source,
}


def _path(config: DataConfig) -> Path:
    return (system.root() / Path(config.dataset).expanduser()).resolve()


def _state(path: Path) -> str:
    """Return a file's path, size and time of change as text."""
    stat = checked(path).stat()
    return f"{os.fsencode(path.resolve())!r} {stat.st_size} {stat.st_mtime_ns}"


def _sha256(path: Path) -> str:
    """Return the hash of a file; for a large one it is cached by path, size and time of change."""
    if path.stat().st_size < HASH_CACHED_BYTES:
        return system.file_sha256(path)
    cached = system.data() / "hashes" / hashlib.sha256(_state(path).encode()).hexdigest()[:32]
    with contextlib.suppress(OSError):
        return cached.read_text()
    digest = system.file_sha256(path)
    with contextlib.suppress(OSError):  # a full disk only means hashing again
        system.write_atomically(cached, digest)
    return digest


# ---- from interactions to a folder ----------------------------------------------------------------------


def build(source: Source, config: DataConfig, folder: Path, key: str) -> None:
    """Prepare the interactions of `source` and write them as the entry `folder` made from `key`.

    Raises `InputError` for a malformed source, an empty k-core and a memory limit that is too low, and
    `OSError` for a full disk. Nothing is left behind then.
    """
    # on a terminal, a progress bar on stderr: bytes read, then the current step
    bar = tqdm(disable=None, leave=False, unit="B", unit_scale=True, desc="reading")

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar, system.scratch(system.data()) as work, _database(work, config) as con:
        ingested = source.fill(con, progress, work)
        bar.set_description("ids")
        steps = [_encode(con)]
        if config.duplicates != "keep":
            bar.set_description("duplicates")
            steps.append(_deduplicate(con, config.duplicates))
        if config.merge_variants:
            bar.set_description("variants")
            steps.append(_merge_variants(con, ingested, source.name))
        bar.set_description("k-core")
        passes = _k_core(con, config)
        if not steps[-1]["interactions"] or passes[-1:] == [0]:
            raise InputError(
                f"nothing of dataset {source.name!r} is left by the k-core with min_user={config.min_user} "
                f"and min_item={config.min_item}: it has {steps[-1]['interactions']:,} interactions of "
                f"{steps[-1]['users']:,} users with {steps[-1]['items']:,} items; lower one"
            )
        bar.set_description("order")
        steps.append(_order(con, config))
        bar.set_description("writing")
        with system.writing(folder, key) as fresh:
            _write(con, fresh, steps[-1]["interactions"], ingested)
            metadata = _metadata(ingested, config, passes, steps)
            prepared = dataset.opened(fresh, {"name": source.name})
            system.write_json(fresh / MANIFEST, described(prepared, metadata))


def _k_core(con: Connection, config: DataConfig) -> list[int]:
    """Create `pairs`, the (user, item) codes of the (min_user, min_item)-core of `events`.

    Returns the remaining interactions after each pass that removed something.
    """
    con.execute('create temp table pairs as select "user", item from events')
    passes: list[int] = []
    remaining = _count(con, "pairs")
    while True:
        before = remaining
        con.execute(f"""create temp table kept as select * from pairs
            where "user" in (select "user" from pairs group by "user" having count(*) >= {config.min_user})
            and item in (select item from pairs group by item having count(*) >= {config.min_item});
            drop table pairs; alter table kept rename to pairs""")
        remaining = _count(con, "pairs")
        if remaining < before:
            passes.append(remaining)
        if remaining == before or config.core == "single_pass":
            return passes


@contextlib.contextmanager
def _database(work: Path, config: DataConfig) -> Iterator[Connection]:
    """Yield a database in the folder `work`; its errors become `InputError` or `OSError`."""
    import duckdb  # lazy: training on prepared data needs no database

    settings: dict[str, Any] = {
        "memory_limit": f"{min(config.memory_limit_mb, MAX_MB)}MB",
        "threads": max(1, min(usable_cores(), config.memory_limit_mb // MB_PER_THREAD)),
        "temp_directory": str(work / "spilled"),
        "autoinstall_known_extensions": False,  # reading a file never asks the network
    }
    try:
        # "?" in a path starts options; a database in memory spills to `work` as well.
        place = ":memory:" if "?" in str(work) else str(work / "rows.duckdb")
        with duckdb.connect(place, config=settings) as con:
            con.execute("set enable_progress_bar = false")
            yield con
    except duckdb.InterruptException:
        raise KeyboardInterrupt from None
    except RuntimeError as error:  # DuckDB raises it when interrupted in a query
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


def _encode(con: Connection) -> dict[str, Any]:
    """Turn `raw` into `events`, with arbitrary integer codes for users and items."""
    for role in ("user", "item"):
        con.execute(
            f"create table {role}s as "
            f'select row_number() over () - 1 as code, key from (select distinct "{role}" as key from raw)'
        )
        bad = con.execute(
            f"select key from {role}s where strlen(key) > {MAX_KEY_BYTES} or contains(key, chr(0)) limit 1"
        ).fetchone()
        if bad:
            raise InputError(
                f"{role} id {bad[0][:40]!r} has {len(bad[0].encode()):,} bytes or a NUL character: "
                f"expected at most {MAX_KEY_BYTES} bytes of text"
            )
    con.execute(
        'create table events as select raw.row, users.code::integer as "user", items.code::integer as item, '
        'raw.time from raw join users on users.key = raw."user" '
        "join items on items.key = raw.item"
    )
    con.execute("drop table raw")
    return _counted(con, "source", "users", "items", "events")


def _deduplicate(con: Connection, rule: str) -> dict[str, Any]:
    con.execute(
        f"create table kept as select * from events qualify row_number() over ({_GROUPS[rule]}) = 1;"
        "drop table events; alter table kept rename to events"
    )
    return _counted(con, "de-duplicated", "users", "items", "events")


def _merge_variants(con: Connection, ingested: Ingested, name: str) -> dict[str, Any]:
    """Give variants of a product one code in `events`; drop a user's consecutive repeats of a product."""
    items = con.execute("select code, key from items order by length(key), key").fetchall()
    titles = ingested.titles(frozenset(key for _, key in items))
    if not titles:
        raise InputError(
            f"parameter 'merge_variants' is True: expected titles, and dataset {name!r} has none"
        )
    first: dict[Any, int] = {}
    merged = [(code, first.setdefault(product_of(titles.get(key, "")) or key, code)) for code, key in items]
    con.register("variants", pd.DataFrame(merged, columns=["code", "product"]))
    con.execute("""create table kept as
        select events.* replace (product::integer as item) from events join variants on code = item
        qualify product is distinct from lag(product) over (partition by "user" order by time, row);
        drop table events; alter table kept rename to events;
        delete from items where code not in (select product from variants)""")
    con.unregister("variants")
    return _counted(con, "variants merged", "users", "items", "events")


def _counted(con: Connection, name: str, *tables: str) -> dict[str, Any]:
    return dataset.step(name, *(_count(con, table) for table in tables))


def _count(con: Connection, table: str) -> int:
    row = con.execute(f"select count(*) from {table}").fetchone()
    return row[0] if row else 0


def _order(con: Connection, config: DataConfig) -> dict[str, Any]:
    """Create `histories`, the ordered events of the core; row ids are positions in the arrays.

    Users and items of the core get dense ids, `user_ids` from 0 and `item_ids` from 1.
    """
    for table, first in (("user", 0), ("item", 1)):
        con.execute(
            f"create table {table}_ids as select code, key, "
            f"(row_number() over (order by length(key), key) - 1 + {first})::integer as id "
            f'from {table}s where code in (select "{table}" from pairs)'
        )
    ties = ORDERS[config.ties][1].format(seed=config.ties_seed)
    con.execute(
        'create table histories as select user_ids.id as "user", item_ids.id as item, time '
        'from events join user_ids on user_ids.code = events."user" '
        f"join item_ids on item_ids.code = events.item order by user_ids.id, time, {ties}"
    )
    con.execute("drop table events")
    return _counted(con, "k-core", "user_ids", "item_ids", "histories")


def _order_rule(config: DataConfig) -> str:
    return ORDERS[config.ties][0].format(seed=config.ties_seed)


def _metadata(
    ingested: Ingested, config: DataConfig, passes: list[int], steps: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "rules": {
            "version": RULES_VERSION,
            "order": _order_rule(config),
            "ties": config.ties,
            "duplicates": config.duplicates,
            **({"variants": "merged"} if config.merge_variants else {}),
            "split": SPLIT,
        },
        "source": dict(ingested.provenance),
        "reading": {
            "lines": ingested.lines_read,
            "rejected": dict(ingested.rejected),
            "rejected_examples": list(ingested.rejected_examples),
        },
        "core": {
            "min_user": config.min_user,
            "min_item": config.min_item,
            "rule": config.core,
            "passes": passes,
        },
        "time_unit": ingested.time_unit,
        "steps": steps,
    }


def _write(con: Connection, fresh: Path, size: int, ingested: Ingested) -> None:
    """Write all files of a prepared folder but the manifest: arrays, keys and titles."""
    timed = ingested.time_unit != "order"
    for file, column, dtype in (("items", "item", np.int32), ("times", "time", np.int64))[: 1 + timed]:
        pieces = (chunk[column].to_numpy() for chunk in _chunks(con, f"select {column} from histories"))
        system.write_array(fresh / f"{file}.npy", dtype, size, pieces)
    counts = con.execute('select count(*) as n from histories group by "user" order by "user"').fetchnumpy()
    offsets = np.concatenate([[0], np.cumsum(counts["n"])])
    system.write_array(fresh / "offsets.npy", np.int64, offsets.size, [offsets])
    _write_keys(con, "user", fresh / "user_keys.npy", [])
    _write_keys(con, "item", fresh / "item_keys.npy", [b""])
    item_keys = Keys(np.load(fresh / "item_keys.npy", mmap_mode="r"))
    titles = ingested.titles(frozenset(item_keys))
    system.write_json(fresh / "titles.json", {key: titles[key] for key in item_keys if key in titles})


def _chunks(con: Connection, query: str) -> Iterator[pd.DataFrame]:
    """Yield the rows of a query in chunks; tables yield them in the order of their row ids."""
    result = con.execute(query)
    while len(chunk := result.fetch_df_chunk(VECTORS)):
        yield chunk


def _write_keys(con: Connection, table: str, path: Path, before: list[bytes]) -> None:
    width, count = con.execute(f"select max(strlen(key)), count(*) from {table}_ids").fetchone() or (1, 0)
    chunks = _chunks(con, f"select key from {table}_ids order by id")
    pieces = itertools.chain([before], ([key.encode() for key in chunk["key"]] for chunk in chunks))
    dtype = np.dtype(f"S{width}")
    system.write_array(path, dtype, count + len(before), (np.array(piece, dtype) for piece in pieces))


# ---- the command ----------------------------------------------------------------------------------------

# Field of `DataConfig` -> help text of its option
_OPTIONS = {
    "format": "of the file",
    "columns": "of an own table: user=A,item=B,time=C",
    "min_user": "interactions that a user must have",
    "min_item": "interactions that an item must have",
    "core": "how the two are applied",
    "duplicates": "what stays of repeated rows",
    "ties": "how interactions at the same time are ordered",
    "ties_seed": "of ties=shuffle",
    "merge_variants": "one item for titles that differ in size, colour or count",
    "strict": "stop at the first bad line",
    "max_rejected_share": "bad lines at which it stops, a share of all",
    "max_line_mb": "megabytes of the longest line",
    "memory_limit_mb": "megabytes that the database may take",
}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m reclib data", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="make a dataset of a file or a name")
    command.set_defaults(act=_prepare_command)
    command.add_argument("source", help="a file, or the name of a dataset")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: the data folder)")
    kinds = get_type_hints(DataConfig)
    for name, text in _OPTIONS.items():
        option = "--memory-mb" if name == "memory_limit_mb" else f"--{name.replace('_', '-')}"
        default = getattr(DataConfig(), name)
        settings: dict[str, Any] = {"type": str if name == "columns" else type(default)}
        if default is False:
            settings = {"action": "store_true"}
        elif get_origin(kinds[name]) is Literal:
            settings = {"choices": get_args(kinds[name])}
        command.add_argument(option, dest=name, default=default, help=f"{text} ({default})", **settings)
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


def _prepare_command(options: argparse.Namespace) -> int:
    path = Path(options.source)
    # a file as the shell sees it: a relative name in a configuration counts from the project's root
    values = {"dataset": str(path.resolve()) if path.exists() else options.source}
    values |= {name: getattr(options, name) for name in _OPTIONS}
    config = validated(DataConfig, values | {"columns": columns_of(options.columns or "")})
    folder = folder_of(config, options.out and options.out.resolve())
    print("\n".join(_report(load(folder))))
    print(folder / MANIFEST)
    return 0


def _show_command(options: argparse.Namespace) -> int:
    prepared = load(options.folder)
    print("\n".join(_report(prepared)))
    for rule in (splits.leave_one_out, splits.global_time):
        try:
            split = rule(prepared)
        except InputError as error:  # there are no times, or all coincide
            print(f"{rule.__name__}: {error}")
            continue
        print(f"{split.name}:")
        for name, value in split.about.items():
            print(f"  {name}: {value}")
    return 0


def _verify_command(options: argparse.Namespace) -> int:
    folder = options.folder
    if damage := system.damage(folder):
        raise InputError(f"{folder}: {'; '.join(damage)}; {system.remedy(folder)}")
    print(f"{folder}: every file is as it was written; fingerprint {load(folder).fingerprint}")
    return 0


def _report(dataset: Dataset) -> list[str]:
    manifest = dataset.manifest
    lines = [f"{dataset.name}, fingerprint {dataset.fingerprint}, times: {manifest['time_unit']}"]
    lines.append(f"{'':<16}{'users':>14}{'items':>14}{'interactions':>16}")
    for row in manifest["steps"]:
        lines.append(f"{row['step']:<16}{row['users']:>14,}{row['items']:>14,}{row['interactions']:>16,}")
    core, ties = manifest["core"], manifest["ties"]
    lines.append(f"k-core ({core['rule']}): {len(core['passes'])} passes")
    lines.append(f"order: {manifest['rules']['order']}")
    for name, value in ties.items():
        lines.append(f"ties, {name}: {'unknown' if value is None else round(value, 4)}")
    for role, published in manifest["source"].get("published_counts", {}).items():
        actual = manifest["steps"][0][role]
        agrees = "as published" if actual == published else f"but {published:,} are published"
        lines.append(f"{role} of the source: {actual:,}, {agrees}")
    for reason, count in manifest["reading"]["rejected"].items():
        lines.append(f"rejected, {reason}: {count:,} of {manifest['reading']['lines']:,} lines")
    return lines


def data_main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    return system.exit_code(lambda: options.act(options))
