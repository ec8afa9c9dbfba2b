"""Reading and preparing reviews at catalogue scale: seconds and peak memory, beside the study's first way.

    python benchmarks/data.py [--full] [--rounds N] [--json] [--reviews N ...] [--folder DIR]

Writes files shaped like Amazon Electronics 2018 5-core (see `reviews.py`) of 0.4 and 1.6 million reviews,
with --full also of 6.7 million as the real one has. Each action then runs in processes of its own, all of a
size in turns: `json.loads` of every line into a list and pandas (at the smallest size: its memory grows with
the file), `gzip -dc`, our reading into the database, the whole `python -m reclib data prepare`, and the
loading of what that wrote, up to the first batch. Peak memory is that of a process and its children together.

Targets: preparing 5 times as fast as the list at 0.4 million; reading within 2.5 times `gzip -dc`; peak below
1 GB; time linear in the reviews; loading within 2 s and 100 MB. Linux only: it reads /proc. --json prints
nothing but one object.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
GENERATOR = ROOT / "benchmarks" / "reviews.py"

SIZES, FULL_SIZE = (400_000, 1_600_000), 6_700_000
LIST_UP_TO = 500_000  # reviews: beyond, the list of dicts needs many gigabytes
POLL_SECONDS = 0.01
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MB = 1e6

# ---- what is measured, each in a process of its own --------------------------------------------------


def list_of_dicts(path: Path, folder: Path) -> dict[str, Any]:
    import pandas as pd

    began = time.perf_counter()
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            rows.append(json.loads(line))
    frame = pd.DataFrame(rows)
    return {"inside": time.perf_counter() - began, "rows": len(frame)}


def reading(path: Path, folder: Path) -> dict[str, Any]:
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
        found = con.execute("select count(*) from raw").fetchone()
    return {"inside": seconds, "rows": found[0] if found else 0}


def preparation(path: Path, folder: Path) -> dict[str, Any]:
    from reclib.data.prepare import data_main

    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = data_main(["prepare", str(path), "--out", str(folder / "prepared")])
    if code:
        sys.exit(code)
    return {"inside": time.perf_counter() - began, "rows": None}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


def loading(path: Path, folder: Path) -> dict[str, Any]:
    """Load a prepared folder; seconds and added memory until the trainer could ask for its first batch."""
    from reclib.config import TrainConfig, model_config
    from reclib.data import batches
    from reclib.data.prepare import load, train_histories

    before, began = resident_bytes(), time.perf_counter()
    dataset = load(path)
    histories = train_histories(dataset)
    loaded, added = time.perf_counter() - began, resident_bytes() - before
    model = model_config("tiny", num_items=dataset.num_items, max_len=50)
    epoch = batches.Epoch(histories, model, TrainConfig(), epoch=0)
    epoch.step(0)
    first = time.perf_counter() - began
    return {
        "inside": loaded,
        "rows": dataset.num_interactions,
        "added_mb": added / MB,
        "with_first_batch_seconds": first,
        "with_first_batch_mb": (resident_bytes() - before) / MB,
    }


ACTIONS = {
    "list of dicts": list_of_dicts,
    "reading": reading,
    "preparation": preparation,
    "loading": loading,
}

# ---- the measuring process: it stays small, since a child's peak counts from its parent's ---------------


@dataclass
class Measured:
    """Every round of one action."""

    seconds: list[float] = field(default_factory=list)  # of the whole process
    inside: list[float] = field(default_factory=list)  # without its start and its imports
    peak_mb: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)  # of the last round

    def summary(self) -> dict[str, Any]:
        found = {name: median(getattr(self, name)) for name in ("seconds", "inside")}
        return found | {"peak_mb": max(self.peak_mb), "rounds": len(self.seconds)} | self.extra


def tree_bytes(pid: int) -> int:
    """Return the resident bytes of a process and its descendants; 0 for one that has ended."""
    try:
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return total + sum(tree_bytes(int(child)) for child in children)


def watched(command: list[str], env: dict[str, str], stdout: Any) -> tuple[float, float, str]:
    """Run a command; return its seconds, its peak MB with its children, and what it printed."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=stdout, text=True)
    peak, over = [0], threading.Event()

    def look() -> None:
        while not over.wait(POLL_SECONDS):
            peak[0] = max(peak[0], tree_bytes(process.pid))

    looking = threading.Thread(target=look)
    looking.start()
    out = process.stdout.read() if process.stdout else ""
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    over.set()
    looking.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
    return seconds, max(peak[0], used.ru_maxrss * 1024) / MB, out


def measure(action: str, path: Path, folder: Path, into: Measured) -> None:
    """Run one action once, with an empty data folder, and add its figures."""
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        env = os.environ | {"RECLIB_DATA": str(Path(fresh) / "data")}
        if action == "gzip -dc":
            seconds, peak, _ = watched(["gzip", "-dc", str(path)], env, subprocess.DEVNULL)
            extra: dict[str, Any] = {"inside": seconds}
        else:
            command = [sys.executable, __file__, "--action", action, str(path), fresh]
            seconds, peak, out = watched(command, env, subprocess.PIPE)
            extra = json.loads(out.splitlines()[-1])
            made = Path(fresh) / "prepared"
            kept = folder / f"{path.name}.prepared"
            if made.is_dir() and not kept.exists():
                made.rename(kept)
    into.seconds.append(seconds)
    into.inside.append(extra.pop("inside"))
    into.peak_mb.append(peak)
    into.extra = extra


def at_size(reviews: int, rounds: int, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Generate a file of `reviews` and measure all actions on it in turns."""
    path = folder / f"reviews_{reviews}_5.json.gz"
    began = time.perf_counter()
    subprocess.run([sys.executable, str(GENERATOR), str(path), str(reviews)], check=True)
    seconds = time.perf_counter() - began
    size = path.stat().st_size
    say(f"\n{reviews:,} reviews: {size / MB:,.0f} MB compressed, written in {seconds:.0f} s")
    actions = ["gzip -dc", "reading", "preparation"]
    if reviews <= LIST_UP_TO:
        actions.insert(0, "list of dicts")
    found = {action: Measured() for action in actions}
    for _ in range(rounds):
        for action in actions:
            measure(action, path, folder, found[action])
    prepared = folder / f"{path.name}.prepared"
    found["loading"] = Measured()
    for _ in range(rounds):
        measure("loading", prepared, folder, found["loading"])
    path.unlink()
    for action, one in found.items():
        rows = one.extra.get("rows")
        if rows not in (None, reviews):
            raise SystemExit(f"{action}: {rows:,} interactions of {reviews:,}")
        low, high = min(one.seconds), max(one.seconds)
        mine = one.summary()
        text = f"  {action:<14}{mine['seconds']:>9.2f} s  {low:.2f}-{high:.2f} s"
        say(f"{text:<46}{mine['inside']:>9.2f} s without start{mine['peak_mb']:>9,.0f} MB peak")
    return {"reviews": reviews, **{action: one.summary() for action, one in found.items()}}


def against_targets(sizes: list[dict[str, Any]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return one row for each target: what was asked, what was found, whether it is met."""
    rows: list[dict[str, Any]] = []

    def row(what: str, found: float, asked: float, *, at_least: bool = False) -> None:
        met = found >= asked if at_least else found <= asked
        rows.append({"what": what, "found": found, "asked": asked, "met": met})
        bound = "at least" if at_least else "at most"
        say(f"  {what:<58}{found:>9.2f}  {bound} {asked:g}: {'met' if met else 'MISSED'}")

    small, large = sizes[0], sizes[-1]
    say("\ntargets")
    for one in sizes:
        if "list of dicts" in one:
            # The list without its imports, ours with them: the comparison that favours the list.
            loop = one["list of dicts"]["inside"]
            n = f"{one['reviews']:,} reviews"
            row(f"list / whole preparation, {n}", loop / one["preparation"]["seconds"], 5, at_least=True)
            row(f"list / our reading, {n}", loop / one["reading"]["inside"], 5, at_least=True)
    for one in sizes:
        n = f"{one['reviews']:,} reviews"
        row(f"our reading / gzip -dc, {n}", one["reading"]["inside"] / one["gzip -dc"]["seconds"], 2.5)
        row(f"peak MB of the preparation, {n}", one["preparation"]["peak_mb"], 1000)
    if large is not small:
        for action in ("reading", "preparation"):
            growth = large[action]["inside"] / small[action]["inside"]
            row(
                f"growth of the {action} / growth of the reviews",
                growth / (large["reviews"] / small["reviews"]),
                1.2,
            )
    load = large["loading"]
    n = f"{large['reviews']:,} reviews"
    row(f"seconds of loading, {n}", load["inside"], 2)
    row(f"MB added by loading, {n}", load["added_mb"], 100)
    row(f"seconds until the first batch is there, {n}", load["with_first_batch_seconds"], 2)
    row(f"MB added when the first batch is there, {n}", load["with_first_batch_mb"], 100)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help=f"also {FULL_SIZE:,} reviews: 4 GB of lines")
    parser.add_argument("--reviews", type=int, nargs="+", metavar="N", help="other sizes, for a trial")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the files, emptied at the end (default: temporary)")
    parser.add_argument("--json", action="store_true", help="print one object with all figures")
    parser.add_argument("--action", nargs=3, help=argparse.SUPPRESS)  # what the measuring process starts
    given = parser.parse_args()
    if given.action:
        name, path, folder = given.action
        print(json.dumps(ACTIONS[name](Path(path), Path(folder))))
        return
    sizes = given.reviews or [*SIZES, *([FULL_SIZE] if given.full else [])]
    say: Callable[[str], None] = (lambda _: None) if given.json else (lambda text: print(text, flush=True))
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="reclib-data-") as folder:
        found = [at_size(n, given.rounds, Path(folder), say) for n in sorted(sizes)]
    result = {"sizes": found, "targets": against_targets(found, say), "cpus": len(os.sched_getaffinity(0))}
    if given.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
