"""Interactions -> duplicates -> k-core -> dense ids -> time order, out of core, into a prepared folder.

Rows live in a DuckDB file that spills to disk beyond its memory limit; only counts per user and per
item, and the offsets, are ever held whole. Rules (a change of any raises `RULES_VERSION`):

- Duplicates: keep; or exact, the first row of equal (user, item, time) stays; or first and last, one
  interaction of each (user, item) stays, the first or last by (time, row).
- k-core: users below `min_user` and items below `min_item` interactions are removed, again and
  again until nothing changes; the result does not depend on the order of removal. With
  `single_pass` both are counted once, before anything is removed, as in the seed study.
- Dense ids: in the order of raw ids, shorter before longer and then by character (see `dataset`).
- Order: by (user, time, row in the source), so that ties have one stated order.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from reclib import cache, dataset, paths, sources
from reclib.config import DataConfig, InputError
from reclib.reading import Ingested

if TYPE_CHECKING:
    import duckdb

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


def build(source: sources.Source, config: DataConfig, folder: Path, key: str) -> None:
    """Prepare the interactions of `source` and write them as the entry `folder` made from `key`.

    Raises `InputError` for a malformed source, where the k-core leaves nothing, and where the memory
    limit is too low; `OSError` where the disk is full. Then nothing is left behind.
    """
    progress = _Progress()
    with (
        contextlib.closing(progress.bar),
        cache.scratch(paths.data()) as work,
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
        with cache.writing(folder, key) as fresh:
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
        cache.write_array(fresh / f"{file}.npy", dtype, size, pieces)
    offsets = _offsets(con)
    cache.write_array(fresh / "offsets.npy", np.int64, offsets.size, [offsets])
    _write_keys(con, "user", fresh / "user_keys.npy", [])
    _write_keys(con, "item", fresh / "item_keys.npy", [""])
    _write_table(con, fresh / "interactions.parquet", with_times="times" in columns)
    item_keys = dataset.Keys(np.load(fresh / "item_keys.npy", mmap_mode="r"))
    titles = ingested.titles(frozenset(item_keys))
    cache.write_json(fresh / "titles.json", {key: titles[key] for key in item_keys if key in titles})
    written = dataset.opened(fresh, {"name": name})
    about = {**about, "ties": dataset.ties(written)}
    cache.write_json(fresh / "manifest.json", dataset.described(written, about))


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

    cache.write_array(path, dtype, count + len(before), pieces())


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
