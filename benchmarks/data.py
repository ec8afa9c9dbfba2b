"""Reading and preparing reviews at catalogue scale: seconds and peak memory, beside the study's first way.

    python benchmarks/data.py [--full] [--rounds N] [--reviews N ...] [--folder DIR]

Writes files shaped like Amazon Electronics 2018 5-core (see `reviews.py`) of 0.4 and 1.6 million reviews,
with --full also of 6.7 million as the real one has. Each action then runs in processes of its own, all of a
size in turns: `json.loads` of every line into a list and pandas (at the smallest size: its memory grows with
the file), `gzip -dc`, our reading into the database, the whole `python -m reclib data prepare`, and the
loading of what that wrote, up to the first batch. Peak memory is that of a process and its children together.

The summary has medians by size and action: whole seconds, those without starting the interpreter, peak MB and
what loading added. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import FailedError, Row, Rows, middle, options, resident_bytes, start

SIZES, FULL_SIZE = (400_000, 1_600_000), 6_700_000
LIST_UP_TO = 500_000  # reviews: beyond, the list of dicts needs many gigabytes
POLL_SECONDS = 0.01
MB = 1e6

# -- what is measured, each in a process of its own ----------------------------------------------------------


def list_of_dicts(path: Path, folder: Path) -> Row:
    import pandas as pd

    began = time.perf_counter()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        frame = pd.DataFrame([json.loads(line) for line in file])
    return {"inside": time.perf_counter() - began, "rows": len(frame)}


def reading(path: Path, folder: Path) -> Row:
    import duckdb

    from reclib.config import DataConfig
    from reclib.data.prepare import source

    config = DataConfig(dataset=str(path))
    settings: dict[str, Any] = {"memory_limit": f"{config.memory_limit_mb}MB"}
    began = time.perf_counter()
    with duckdb.connect(str(folder / "rows.duckdb"), config=settings) as con:
        con.execute("set enable_progress_bar = false")
        source(config).fill(con, None)
        seconds = time.perf_counter() - began
        (count,) = con.execute("select count(*) from raw").fetchone() or (0,)
    return {"inside": seconds, "rows": count}


def preparation(path: Path, folder: Path) -> Row:
    from reclib.data.prepare import data_main

    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = data_main(["prepare", str(path), "--out", str(folder / "prepared")])
    if code:
        raise SystemExit(code)
    return {"inside": time.perf_counter() - began}


def loading(path: Path, folder: Path) -> Row:
    """Load a prepared folder; seconds and added memory until the trainer could ask for its first batch."""
    from reclib.config import TrainConfig, model_config
    from reclib.data import batches
    from reclib.data.dataset import load, train_histories

    before, began = resident_bytes(), time.perf_counter()
    dataset = load(path)
    histories = train_histories(dataset)
    row = {"inside": time.perf_counter() - began, "added_mb": (resident_bytes() - before) / MB}
    model = model_config("tiny", num_items=dataset.num_items, max_len=50)
    batches.Epoch(histories, model, TrainConfig(), epoch=0).step(0)
    row |= {"first_batch_seconds": time.perf_counter() - began}
    return row | {"first_batch_mb": (resident_bytes() - before) / MB, "rows": dataset.num_interactions}


ACTIONS: dict[str, Callable[[Path, Path], Row]] = {
    "list of dicts": list_of_dicts,
    "reading": reading,
    "preparation": preparation,
    "loading": loading,
}

# -- the measuring process: it stays small, since a child's peak counts from its parent's --------------------


def tree_bytes(pid: int) -> int:
    """Return the resident bytes of a process and its descendants; 0 for one that has ended."""
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return total + sum(tree_bytes(int(child)) for child in children)


def measure(action: str, path: Path, folder: Path, reviews: int) -> Row:
    """Run one action in a process with an empty data folder; return its seconds and peak memory."""
    with (
        tempfile.TemporaryDirectory(dir=folder) as fresh,
        (Path(fresh) / "out").open("w+", encoding="utf-8") as out,
    ):
        call = {"action": action, "path": str(path), "folder": fresh}
        command = [sys.executable, __file__, "--child", json.dumps(call)]
        environment = os.environ | {"RECLIB_DATA": str(Path(fresh) / "data")}
        if action == "gzip -dc":
            command = ["sh", "-c", 'exec gzip -dc "$0" > /dev/null', str(path)]
        began, peak, ended = time.perf_counter(), 0, 0
        process = subprocess.Popen(command, env=environment, stdout=out)
        while not ended:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(POLL_SECONDS)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        seconds, peak = time.perf_counter() - began, max(peak, used.ru_maxrss * 1024)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise FailedError(f"ended with code {process.returncode} (below 0: of that signal)")
        out.seek(0)
        row = json.loads((out.read().splitlines() or ["{}"])[-1])
        if row.get("rows", reviews) not in (None, reviews):
            raise FailedError(f"{row['rows']:,} interactions of {reviews:,}")
        if action == "preparation" and not prepared_of(path).exists():
            (Path(fresh) / "prepared").rename(prepared_of(path))
    return {"inside": seconds} | row | {"seconds": seconds, "peak_mb": peak / MB}


def prepared_of(path: Path) -> Path:
    """Return the folder that the preparation of a file is kept in."""
    return path.with_suffix(".prepared")


def at_size(reviews: int, given: argparse.Namespace, folder: Path, rows: Rows) -> dict[str, list[Row]]:
    """Generate a file of `reviews` and measure all actions on it in turns; return the rows of each."""
    path = folder / f"reviews_{reviews}_5.json.gz"
    began = time.perf_counter()
    generator = Path(__file__).with_name("reviews.py")  # in a process: this one must stay small
    subprocess.run([sys.executable, str(generator), str(path), str(reviews)], check=True)
    rows.add("file", reviews=reviews, seconds=time.perf_counter() - began, mb=path.stat().st_size / MB)
    actions = ["list of dicts"] if reviews <= LIST_UP_TO else []
    actions += ["gzip -dc", "reading", "preparation", "loading"]
    places = {name: prepared_of(path) if name == "loading" else path for name in actions}
    turns = {name: functools.partial(measure, name, place, folder, reviews) for name, place in places.items()}
    results = rows.in_turns(turns, given.rounds, reviews=reviews)
    path.unlink()
    return results


def run(given: argparse.Namespace, rows: Rows) -> Row:
    sizes = given.reviews or (*SIZES, *([FULL_SIZE] if given.full else []))
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="reclib-data-") as folder:
        results = {n: at_size(n, given, Path(folder), rows) for n in sorted(sizes)}
    names = ("seconds", "inside", "peak_mb", "added_mb", "first_batch_seconds", "first_batch_mb")
    summary = {
        n: {action: {name: middle(of, name) for name in names} for action, of in actions.items()}
        for n, actions in results.items()
    }
    return {"sizes": summary, "cpus": len(os.sched_getaffinity(0))}


def child(action: str, path: str, folder: str) -> Row:
    return ACTIONS[action](Path(path), Path(folder))


if __name__ == "__main__":
    arguments = options(__doc__, rounds=3)
    arguments.add_argument("--full", action="store_true", help=f"also {FULL_SIZE:,} reviews: 4 GB of lines")
    arguments.add_argument("--reviews", type=int, nargs="+", metavar="N", help="other sizes, for a trial")
    arguments.add_argument("--folder", type=Path, help="for the files, emptied at the end (temporary)")
    raise SystemExit(start(arguments, run, child))
