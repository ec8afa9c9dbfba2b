"""Reading and preparing reviews at catalogue scale: seconds and peak memory, beside the study's first way.

    python benchmarks/data.py [--full] [--rounds N] [--reviews N ...]

Writes files of made-up reviews, shaped like Amazon Electronics 2018 5-core, to the folder for temporary files
(TMPDIR): of 0.4 and 1.6 million reviews, with --full also of 6.7 million as the real one has. Each action
then runs in processes of its own, all of a size in turns: `json.loads` of every line into a list and pandas
(at the smallest size: its memory grows with the file), `gzip -dc`, our reading into the database, the whole
`python -m reclib data prepare`, and the loading of what that wrote, up to the first batch. Peak memory is
that of a process and its children together.

The summary has medians by size and action: whole seconds, those without starting the interpreter, peak MB and
what loading added. Linux only: it reads /proc.
"""

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
from pathlib import Path
from typing import Any

from common import FailedError, Row, Rows, middle, options, resident_bytes, start

SIZES, FULL_SIZE = (400_000, 1_600_000), 6_700_000
LIST_UP_TO = 500_000  # reviews: beyond, the list of dicts needs many gigabytes
POLL_SECONDS = 0.01
MB = 1e6

# -- made-up reviews -----------------------------------------------------------------------------------------

REVIEWS_PER_USER, REVIEWS_PER_ITEM = 9.25, 42.1  # of the real file: 6,739,590 / 728,719 / 160,052
FIRST_DAY, DAYS = 11_000, 6_800  # since 1970: February 2000 to September 2018
LINE = (
    b'{"overall": %d.0, "vote": "2", "verified": true, "reviewTime": "%b", "reviewerID": "A%013X", '
    b'"asin": "B0%08X", "style": {"Color:": " Black"}, "reviewerName": "A. Reader", "reviewText": %b, '
    b'"summary": %b, "unixReviewTime": %d}\n'
)


def texts(rng: Any, count: int, mean_words: float) -> list[bytes]:
    """Return `count` JSON strings of made-up words with Zipf's frequencies; some hold what JSON escapes."""
    import numpy as np

    syllables = [c + v + e for c in "bcdfglmnprstvw" for v in "aeiou" for e in ("", "n", "r", "st")]
    words = ["".join(rng.choice(syllables, size)) for size in rng.integers(1, 4, 5_000).tolist()]
    weight = 1 / np.arange(1, len(words) + 1)
    lengths = np.maximum(1, rng.lognormal(np.log(mean_words) - 0.5, 1.0, count)).astype(int)
    drawn = np.split(rng.choice(words, lengths.sum(), p=weight / weight.sum()), np.cumsum(lengths)[:-1])
    plain = [f"{' '.join(row).capitalize()}." for row in drawn]
    special = [text.replace(" b", '\n\n"B', 1).replace("co", "c\u00f6", 1) for text in plain[::7]]
    return [json.dumps(text).encode() for text in plain + special]


def generate(path: Path, reviews: int) -> None:
    """Write a file of `reviews` lines of some 600 bytes, grouped by item; the same number, the same lines."""
    import numpy as np

    rng = np.random.default_rng(reviews)

    def keys(reviews_per_group: float, digits: int) -> Any:
        """Return the key of each review's group, in no order: long-tailed groups, none below five."""
        groups = max(1, int(reviews / reviews_per_group))
        weight = 1 / (rng.permutation(groups) + groups / 50) ** 0.9
        counts = 5 + rng.multinomial(reviews - 5 * groups, weight / weight.sum())
        # Multiples of an odd number are distinct among numbers of so many hexadecimal digits.
        numbers = np.arange(groups, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return np.repeat(numbers % np.uint64(16**digits), counts)

    users, items = rng.permutation(keys(REVIEWS_PER_USER, 13)), keys(REVIEWS_PER_ITEM, 8)
    fixed = np.random.default_rng(0)  # the same at every size: so is the work of a line
    bodies, titles = np.array(texts(fixed, 20_000, 48.0), object), np.array(texts(fixed, 5_000, 4.0), object)
    seconds = [86_400 * (FIRST_DAY + day) for day in range(DAYS)]
    dates = np.array([time.strftime("%m %d, %Y", time.gmtime(s)).encode() for s in seconds])
    with gzip.open(path, "wb", compresslevel=4) as out:
        for first in range(0, reviews, 100_000):
            user, item = users[first : first + 100_000], items[first : first + 100_000]
            day, stars = rng.integers(0, DAYS, len(user)), rng.integers(1, 6, len(user))
            body, title = rng.choice(bodies, len(user)), rng.choice(titles, len(user))
            columns = (stars, dates[day], user, item, body, title, np.array(seconds)[day])
            out.write(b"".join(map(LINE.__mod__, zip(*(c.tolist() for c in columns), strict=True))))


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
    import torch  # noqa: F401  (what a training process has loaded)

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


ACTIONS = {"list of dicts": list_of_dicts, "reading": reading, "preparation": preparation, "loading": loading}


def child(action: str, path: str, argument: str) -> Row:
    if action == "file":
        generate(Path(path), int(argument))
        return {"mb": Path(path).stat().st_size / MB}
    return ACTIONS[action](Path(path), Path(argument))


# -- the measuring process: it stays small, since a child's peak counts from its parent's --------------------


def tree_bytes(pid: int) -> int:
    """Return the resident bytes of a process and its descendants; 0 for one that has ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return resident_bytes(pid) + sum(tree_bytes(int(child)) for child in children)
    except (OSError, IndexError):
        return 0


def measure(action: str, path: Path, argument: object) -> Row:
    """Run an action in a process of its own; return its row with its seconds and peak memory."""
    call = {"action": action, "path": str(path), "argument": str(argument)}
    command = [sys.executable, __file__, "--child", json.dumps(call)]
    if action == "gzip -dc":
        command = ["sh", "-c", 'exec gzip -dc "$0" > /dev/null', str(path)]
    environment = os.environ | {"RECLIB_DATA": f"{argument}/data"}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
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
    return {"inside": seconds} | row | {"seconds": seconds, "peak_mb": peak / MB}


def prepared_of(path: Path) -> Path:
    """Return the folder that the preparation of a file is kept in."""
    return path.with_suffix(".prepared")


def attempt(action: str, path: Path, reviews: int) -> Row:
    """Measure an action on a file of `reviews` with an empty data folder; raise if it has read fewer."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        row = measure(action, prepared_of(path) if action == "loading" else path, folder)
        if row.get("rows", reviews) != reviews:
            raise FailedError(f"{row['rows']:,} interactions of {reviews:,}")
        if action == "preparation" and not prepared_of(path).exists():
            (Path(folder) / "prepared").rename(prepared_of(path))
    return row


def at_size(reviews: int, rounds: int, folder: Path, rows: Rows) -> dict[str, list[Row]]:
    """Generate a file of `reviews` and measure all actions on it in turns; return the rows of each."""
    path = folder / f"reviews_{reviews}_5.json.gz"
    rows.add("file", reviews=reviews, **measure("file", path, reviews))
    actions = ["list of dicts"] if reviews <= LIST_UP_TO else []
    actions += ["gzip -dc", "reading", "preparation", "loading"]
    turns = {name: functools.partial(attempt, name, path, reviews) for name in actions}
    results = rows.in_turns(turns, rounds, reviews=reviews)
    path.unlink()
    return results


def run(args: argparse.Namespace, rows: Rows) -> Row:
    sizes = args.reviews or (*SIZES, *([FULL_SIZE] if args.full else []))
    with tempfile.TemporaryDirectory(prefix="reclib-data-") as folder:
        results = {n: at_size(n, args.rounds, Path(folder), rows) for n in sorted(sizes)}
    names = ("seconds", "inside", "peak_mb", "added_mb", "first_batch_seconds", "first_batch_mb")
    summary = {
        n: {action: {name: middle(of, name) for name in names} for action, of in actions.items()}
        for n, actions in results.items()
    }
    return {"sizes": summary, "cpus": len(os.sched_getaffinity(0))}


if __name__ == "__main__":
    parser = options(__doc__, rounds=3)
    parser.add_argument("--full", action="store_true", help=f"also {FULL_SIZE:,} reviews: 4 GB of lines")
    parser.add_argument("--reviews", type=int, nargs="+", metavar="N", help="other sizes, for a trial")
    raise SystemExit(start(parser, run, child))
