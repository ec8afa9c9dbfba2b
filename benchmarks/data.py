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
    b'{"overall": %d.0, %b"verified": %b, "reviewTime": "%b", "reviewerID": "%b", "asin": "%b", %b'
    b'"reviewerName": %b, "reviewText": %b, "summary": %b, "unixReviewTime": %d}\n'
)
VOTES = [b""] * 17 + [b'"vote": "2", ', b'"vote": "14", ', b'"vote": "1,204", ']
STYLES = [b"", b'"style": {"Color:": " Black"}, ', b'"style": {"Size:": " 7.0 oz", "Color:": " Red"}, ']


def keys(count: int, prefix: str, digits: int) -> list[bytes]:
    """Return distinct keys of a prefix and hexadecimal digits, such as A0C9D7A81F3B62, in no order."""
    step = 0x9E3779B97F4A7C15  # odd: its multiples run through all numbers of so many digits
    return [f"{prefix}{number * step % 16**digits:0{digits}X}".encode() for number in range(count)]


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

    def members(groups: int) -> Any:
        """Return the group of each review: long-tailed, none below five."""
        weight = 1 / (rng.permutation(groups) + groups / 50) ** 0.9
        counts = 5 + rng.multinomial(reviews - 5 * groups, weight / weight.sum())
        return np.repeat(np.arange(groups), counts)

    users, items = (max(1, int(reviews / per)) for per in (REVIEWS_PER_USER, REVIEWS_PER_ITEM))
    user_keys, item_keys = keys(users, "A", 13), keys(items, "B0", 8)
    user, item = rng.permutation(members(users)), members(items)
    fixed = np.random.default_rng(0)  # the same at every size: so is the work of a line
    body, title, names = texts(fixed, 20_000, 48.0), texts(fixed, 5_000, 4.0), texts(fixed, 500, 2.0)
    pools = (VOTES, (b"true", b"false"), STYLES, names, body, title)
    days = [time.gmtime(86_400 * day) for day in range(FIRST_DAY, FIRST_DAY + DAYS)]
    dates = [f"{d.tm_mon:02d} {d.tm_mday}, {d.tm_year}".encode() for d in days]
    with gzip.open(path, "wb", compresslevel=4) as out:
        for first in range(0, reviews, 100_000):
            of_users, of_items = user[first : first + 100_000], item[first : first + 100_000]
            count = len(of_users)
            day, stars = rng.integers(0, DAYS, count), rng.integers(1, 6, count).tolist()
            vote, verified, style, *written = (
                [pool[n] for n in rng.integers(0, len(pool), count).tolist()] for pool in pools
            )
            reviewer, asin = [user_keys[u] for u in of_users], [item_keys[i] for i in of_items]
            date, seconds = [dates[d] for d in day], (86_400 * (FIRST_DAY + day)).tolist()
            columns = (stars, vote, verified, date, reviewer, asin, style, *written, seconds)
            out.write(b"".join(map(LINE.__mod__, zip(*columns, strict=True))))


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
        total = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, IndexError):
        return 0
    return total + sum(tree_bytes(int(child)) for child in children)


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
