"""What the benchmarks share: options, processes that may fail, turns, and rows that are written as they come.

A row is one line of JSON, printed as soon as it is known and appended to the file `--out`. What fails (by an
exception, by the system, by taking too long) is a row with `status` and `reason`; the others go on. The first
row is the `environment`, the last the `summary`. Rows that README or FINDINGS rest on are committed in
`executed/<label>/benchmarks/`, where `python -m reclib claims` reads them. Exit codes: 0 all went well, 1 a
row failed, 2 wrong arguments.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# glibc gives large blocks back at once by default, which slows steps with all logits by tens of percent.
BEST_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
Row = dict[str, Any]


class FailedError(Exception):
    """A process of a benchmark did not end well."""


def first_line(error: BaseException) -> str:
    """Return an error in one line of at most 300 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def finite(value: Any) -> Any:
    """Return nested values as JSON has them: a number that is none becomes null."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Rows:
    """The rows of a benchmark, written as they come."""

    def __init__(self, file: Path | None = None) -> None:
        self.file, self.failed = file, False

    def add(self, name: str, /, **values: Any) -> Row:
        """Write a row and return it."""
        row = finite({"name": name, "status": "ok"} | values)
        self.failed |= row["status"] != "ok"
        line = json.dumps(row)
        print(line, flush=True)
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        return row

    def attempt(self, name: str, action: Callable[[], Mapping[str, Any]], /, **about: Any) -> Row | None:
        """Write what `action` returns as a row; write its error and return None if it raises."""
        try:
            values = action()
        except Exception as error:
            reason = str(error) if isinstance(error, FailedError) else first_line(error)
            self.add(name, **about, status="failed", reason=reason)
            return None
        row = self.add(name, **{**about, **values})  # a peer tells its own shape
        return row if row["status"] == "ok" else None

    def in_turns(
        self, actions: Mapping[str, Callable[[], Mapping[str, Any]]], rounds: int, **about: Any
    ) -> dict[str, list[Row]]:
        """Attempt each action once a round, A B C A B C; return the rows of each.

        What has failed is not tried again, and its list is what it gave before.
        """
        results: dict[str, list[Row]] = {name: [] for name in actions}
        left = dict(actions)
        for number in range(1, rounds + 1):
            for name, action in list(left.items()):
                row = self.attempt(name, action, **about, round=number)
                if row is None:
                    del left[name]
                else:
                    results[name].append(row)
        return results


def middle(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the median of a value over rows; NaN where no row has it."""
    return median([row[name] for row in rows if row.get(name) is not None] or [math.nan])


def run_process(command: Sequence[object], environment: Mapping[str, str] | None = None) -> Row:
    """Run a command and return the JSON object in the last line of its output.

    Raises `FailedError` with the signal or the last line of its errors if it does not end well.
    """
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    if done.returncode < 0:
        raise FailedError(f"killed by {signal.Signals(-done.returncode).name}: memory may have run out")
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise FailedError(f"exit code {done.returncode}: {last[:300]}")
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise FailedError("its last line is no JSON object") from None


def run_child(script: str, call: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Row:
    """Call the `child` of a benchmark's script in a process of its own; return what it returns."""
    return run_process([sys.executable, script, "--child", json.dumps(call)], environment)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is a script's docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def options(doc: str | None, quick: str = "", **numbers: int) -> argparse.ArgumentParser:
    """Return a parser of `--out`, of `--quick` if it is described, and of numbers with their defaults."""
    parser = parser_of(doc)
    parser.add_argument("--out", type=Path, metavar="FILE", help="append each row to this file, too")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="(%(default)s)")
    return parser


def start(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace, Rows], Mapping[str, Any]],
    child: Callable[..., Mapping[str, Any]] | None = None,
) -> int:
    """Run a benchmark, or its `child`, with the arguments of the command line; return the exit code."""
    args = parser.parse_args()
    if args.child is not None and child is not None:
        print(json.dumps(finite(child(**args.child))))
        return 0
    rows = Rows(args.out)
    settings = {name: getattr(args, name) for name in ("quick", "threads", "rounds") if name in args}
    rows.add("environment", benchmark=Path(sys.argv[0]).stem, **settings, **environment())
    rows.add("summary", **run(args, rows))
    return int(rows.failed)


def environment() -> Row:
    """Return the time, this machine's CPU, the versions and the commit."""
    from reclib import hardware, records  # here: the children that are timed do not need them

    now = datetime.now(UTC).isoformat(timespec="seconds")
    git = records.git_state()
    return {"time": now, "cpu": hardware.cpu_model(), "versions": records.versions(), "git": git}


def resident_bytes(process: int | str = "self") -> int:
    """Return the resident bytes of a process, by default of this one. Linux only."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
