"""Records of results, from which figures and findings are built, with their provenance.

`Run.result` displays a small bundle with the deterministic part, which the notebook tests compare, and
appends a line to `<label>/results.jsonl` in `system.executed()`: metrics in full, timings, parameters,
device, versions, code and commit. The label is that of the device in use, even if another was claimed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec

from reclib import parameters, system
from reclib.config import ENCODER, InputError
from reclib.system import plain

SCHEMA = 1
MIME = "application/vnd.reclib.result+json"
Kind = Literal["measured", "predicted"]

# Fields of a device's card in a record; cpu_model identifies CPUs that share a name, None on a GPU.
CARD: tuple[str, ...] = ("name", "cpu_model", "type", "capability", "memory_bytes", "torch", "cuda")
CARD += ("driver", "threads", "label")

# Records with equal values of these fields are of the same result.
_KEY = ("notebook", "kind", "label", "name", "params_hash", "seed")

# Profiles of records, from least to most work; grids are long experiments.
PROFILES = ("smoke", "custom", *parameters.PROFILES[1:], "grid")
_RECORDS = ("*/results.jsonl", "*/grids/*.jsonl", "*/*/results.jsonl", "*/*/grids/*.jsonl")
_UNFINISHED = "unfinished line"

# Parameter files that results depend on and that are not in the record, unlike profiles and grids.
_UNRECORDED = tuple(f"params/{name}.yaml" for name in ("calibration", "devices", "efficiency"))
_COPIED = (".ipynb", ".npz", ".json")  # executed notebooks, ranks of a grid, self-checks


# -- provenance: code, commit, versions; no users, hosts or paths --------------------------------------------


def code_hash(notebook: str) -> str:
    """Return a hash of 16 hexadecimal digits over all files of the package and a notebook's code cells."""
    files = {file.relative_to(system.PACKAGE).as_posix(): file for file in system.PACKAGE.rglob("*.py")}
    package = _package_digest({name: file.read_bytes() for name, file in files.items()})
    source = system.notebooks() / f"{notebook}.ipynb"
    return _hash_with(package, _code_cells(source.read_bytes()) if source.is_file() else b"")


def _package_digest(files: Mapping[str, bytes]) -> Any:
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name] + b"\0")
    return digest


def _code_cells(notebook: bytes) -> bytes:
    cells = json.loads(notebook)["cells"]
    return b"".join("".join(cell["source"]).encode() + b"\0" for cell in cells if cell["cell_type"] == "code")


def _hash_with(package: Any, cells: bytes) -> str:
    digest = package.copy()
    digest.update(cells)
    return str(digest.hexdigest())[:16]


def commits_of_code(
    notebooks: Iterable[str], commits: Sequence[str] | None = None
) -> dict[tuple[str, str], str]:
    """Return the newest commit with each (notebook, `code_hash`), of HEAD's history or of `commits`.

    Each state of the package and of a notebook is read and hashed once.
    """
    names = sorted(set(notebooks))
    commits = commits if commits is not None else (_git("rev-list", "HEAD") or b"").decode().split()
    states: dict[
        tuple[tuple[tuple[str, str], ...], str, str], str
    ] = {}  # package, notebook, its blob: commit
    for commit in commits:
        listed = (_git("ls-tree", "-rz", commit, "reclib", "notebooks") or b"").decode()
        blobs = {path: blob for blob, path in re.findall(r" blob (\w+)\t([^\0]+)\0", listed)}
        code = [path for path in blobs if path.startswith("reclib/") and path.endswith(".py")]
        package = tuple((path.removeprefix("reclib/"), blobs[path]) for path in code)
        for name in names if package else ():
            states.setdefault((package, name, blobs.get(f"notebooks/{name}.ipynb", "")), commit)
    packages, sources = {package for package, _, _ in states}, {source for _, _, source in states if source}
    content = _objects(sources | {blob for package in packages for _, blob in package})
    digests = {
        package: _package_digest({path: content.get(blob, b"") for path, blob in package})
        for package in packages
    }
    cells = {source: _code_cells(content[source]) for source in sources & content.keys()}
    result: dict[tuple[str, str], str] = {}
    for (package, name, source), commit in states.items():
        result.setdefault((name, _hash_with(digests[package], cells.get(source, b""))), commit)
    return result


def _objects(names: Iterable[str]) -> dict[str, bytes]:
    """Return the content of those objects of git that exist."""
    output, place, content = _git("cat-file", "--batch", stdin="\n".join(names).encode()) or b"", 0, {}
    while place < len(output):
        start = output.index(b"\n", place) + 1
        name, _, *size = output[place:start].decode().split()  # or "<name> missing"
        place = start
        if size:
            content[name] = output[start : start + int(size[0])]
            place += int(size[0]) + 1
    return content


def _git(*arguments: str, stdin: bytes = b"") -> bytes | None:
    command = ["git", "-C", str(system.CHECKOUT), *arguments]
    try:
        process = subprocess.run(command, capture_output=True, input=stdin, timeout=300)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout if process.returncode == 0 else None


def git_state(notebook: str = "") -> dict[str, Any] | None:
    """Return the commit and whether the checkout differs from it; None outside a git checkout.

    Compared are the code of `code_hash` and the parameter files that are not in records. For a copy without
    .git the commit is the value of `RECLIB_COMMIT`, if it is set.
    """
    if head := _git("rev-parse", "HEAD"):
        commit = head.decode().strip()
        changed = _git("status", "--porcelain", "--", *_UNRECORDED)
        unchanged = (notebook, code_hash(notebook)) in commits_of_code([notebook], [commit])
        return {"commit": commit, "dirty": None if changed is None else bool(changed) or not unchanged}
    stated = os.environ.get("RECLIB_COMMIT")
    return {"commit": stated, "dirty": None} if stated else None


def code_in_git(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a sentence on how many records have the code of a commit, and on the other code hashes."""
    commits = commits_of_code(row["notebook"] for row in rows)
    missing = Counter(key for row in rows if (key := (row["notebook"], row.get("code"))) not in commits)
    named = ", ".join(f"{count} of {name} {code}" for (name, code), count in sorted(missing.items()))
    counted = f"{len(rows) - missing.total():,} of {len(rows):,} records have the code of a commit"
    return f"{counted}; no commit has the code of {named}" if named else counted


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that numbers and figures depend on."""
    result: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numpy", "pandas", "plotly"):
        result[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[package] = importlib.metadata.version(package)
    return result


def params_hash(params: Mapping[str, Any]) -> str:
    """Return a hash of 16 hexadecimal digits of parameters, independent of their order."""
    return _sha256(json.dumps(plain(params), sort_keys=True, separators=(",", ":"), allow_nan=False))[:16]


def provenance(notebook: str) -> dict[str, Any]:
    """Return the provenance of a result: hash of the code, commit, and versions."""
    return {"code": code_hash(notebook), "git": git_state(notebook), "versions": versions()}


# -- making records ------------------------------------------------------------------------------------------


def row(
    notebook: str,
    name: str,
    metrics: Mapping[str, Any],
    *,
    card: Mapping[str, Any],
    made_by: Mapping[str, Any] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """Return a record with the present time.

    `card` is that of the device; `made_by` is the `provenance`, by default of the present code. `fields` must
    have `profile`, `params` (of the run), `own_params` (of this result), `params_hash` and `data` (name and
    fingerprint), and may have other fields of `_Form`.
    """
    optional: dict[str, Any] = {"kind": "measured", "claimed": None, "seed": None, "earlier": 0}
    optional |= {"timings": {}, "series": {}}
    of_device = {"label": card["label"], "device": {key: card.get(key) for key in CARD}}
    timestamp = datetime.now(UTC).isoformat(timespec="seconds")
    head = {"schema": SCHEMA, "notebook": notebook, "name": name, "metrics": metrics, "time": timestamp}
    return plain({**head, **of_device, **optional, **(made_by or provenance(notebook)), **fields})


class Record(dict[str, Any]):
    """One record. As the last value of a cell it shows nothing, since its provenance is no output."""

    def _ipython_display_(self) -> None:
        pass


class Run:
    """One execution of one notebook on one device, whose results `result` records."""

    def __init__(
        self,
        notebook: str,
        p: Any,
        device: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the notebook's parameters, the device's card, the data's name and fingerprint.

        `p` is a value of `parameters.read`; `device` has at least the keys of `hardware.device_card`; `data`
        has `name` and `fingerprint`.
        """
        if missing := [key for key in CARD if key not in device]:
            raise ValueError(f"device card lacks {', '.join(missing)}")
        if device["type"] == "cuda":
            _demand_self_check(device)
        self.notebook = notebook
        self.params = plain(parameters.values(p))
        self.label = str(device["label"])
        self._card = dict(device)
        self._row = {
            "claimed": self.params.get("gpu"),
            "profile": parameters.profile_of(notebook, p),
            "data": data,
            "made_by": provenance(notebook),
        }

    def result(
        self,
        name: str,
        metrics: Mapping[str, Any],
        *,
        params: Mapping[str, Any] | None = None,
        timings: Mapping[str, Any] | None = None,
        series: Mapping[str, Sequence[Any]] | None = None,
        seed: int | None = None,
        kind: Kind = "measured",
        device: Mapping[str, Any] | None = None,
    ) -> Record:
        """Display and append one result; return the record.

        `metrics` must be the same in every run on one machine (the notebook tests compare them to 3 digits);
        numbers that depend on the clock go into `timings`. `params` are those of this result, beside those of
        the run. Metrics and timings must be finite numbers or None (not measured); values of a series that
        are not finite (a loss that diverged) are stored as null. The record counts earlier records of the
        same configuration, as the number of earlier looks at the test split.

        `device` is the card of another device, for predictions only; the record goes to its folder.
        """
        if kind not in ("measured", "predicted"):
            raise ValueError(f"kind of {name!r} must be measured or predicted, got {kind!r}")
        if device is not None and kind != "predicted":
            raise ValueError(f"{name!r} is {kind} on {device['label']}, which is not here")
        own_values = plain(params or {})
        # The result of one seed does not depend on the other seeds of the run.
        identity = self._without("gpu", "tracker", *(("seed", "seeds") if seed is not None else ()))
        record = Record(
            row(
                self.notebook,
                name,
                _finite(name, metrics),
                card=device or self._card,
                params=self.params,
                own_params=own_values,
                params_hash=params_hash(identity | {"own": own_values}),
                timings=_finite(name, timings or {}),
                series={key: [_or_null(v) for v in values] for key, values in (series or {}).items()},
                seed=seed,
                kind=kind,
                **self._row,
            )
        )
        record["earlier"] = _times_recorded(record)
        append(system.executed() / record["label"] / "results.jsonl", record)
        deterministic = self._without("gpu", "tracker", *parameters.device_names())
        _display(self.notebook, name, deterministic | own_values, record["metrics"], seed)
        return record

    def _without(self, *names: str) -> dict[str, Any]:
        # Parameters added later: their defaults are left out, so that hashes of older records stay valid.
        defaults = {"nproc": 1, "ties": "source", "ties_seed": 0, "implanted": [], "targets": [*ENCODER]}
        names += tuple(name for name, value in defaults.items() if self.params.get(name) == value)
        return {key: value for key, value in self.params.items() if key not in names}


def _demand_self_check(device: Mapping[str, Any]) -> None:
    """Raise `InputError` for a GPU that has not passed its self-check with this torch."""
    for root in roots():
        file = root / str(device["label"]) / "selfcheck.json"
        if file.is_file():
            check = json.loads(file.read_text(encoding="utf-8"))
            matches = [check["device"].get(key) == plain(device[key]) for key in ("name", "torch", "cuda")]
            if check["passed"] and all(matches):
                return
    raise InputError(
        f"no passed self-check of {device['name']} with torch {device['torch']} in "
        f"{device['label']}/selfcheck.json: run `python -m reclib check` once, then again"
    )


def _times_recorded(record: Mapping[str, Any]) -> int:
    """Count the records of the same result with the same parameters under all roots."""
    needle = f'"params_hash":"{record["params_hash"]}"'
    count = 0
    for root in roots():
        file = root / record["label"] / "results.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            if needle in line and line.startswith("{") and line.endswith("}"):
                count += all(json.loads(line).get(key) == record[key] for key in _KEY)
    return count


def _display(
    notebook: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, Any], seed: int | None
) -> None:
    """Show the deterministic part of a record in a notebook; do nothing elsewhere."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:  # a script on a machine without Jupyter
        return
    if get_ipython() is None:
        return
    rounded = {key: float(f"{v:.3g}") if isinstance(v, float) else v for key, v in metrics.items()}
    bundle: dict[str, Any] = {"name": name, "params": dict(params), "metrics": rounded}
    text = "  ".join(f"{key}={value}" for key, value in rounded.items())
    if seed is not None:
        bundle["seed"] = seed
        name = f"{name} (seed {seed})"
    display({MIME: bundle, "text/plain": f"{notebook} / {name}: {text}"}, raw=True)


def _finite(name: str, numbers: Mapping[str, Any]) -> dict[str, float | int | None]:
    result = {key: plain(number) for key, number in numbers.items()}
    for key, value in result.items():
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{key} of result {name!r} is {numbers[key]!r}: not a finite number")
    return result


def _or_null(number: Any) -> Any:
    value = plain(number)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Append one line atomically."""
    line = _text(record).encode() + b"\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        system.flock(descriptor, wait=True)
        end = _end_of_records(descriptor)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                problem = f"No space left: only {written} of {len(line)} bytes could be written"
                raise OSError(errno.ENOSPC, problem, file.name)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _end_of_records(descriptor: int) -> int:
    """Remove an incomplete line after the last newline, left by a killed writer; return the file's length."""
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    end = content.rfind(b"\n") + 1
    if end == len(content):
        return end
    try:
        json.loads(content[end:])
    except ValueError:
        os.ftruncate(descriptor, end)
        return end
    return len(content) + os.write(descriptor, b"\n")  # complete: an editor removed the newline


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -- reading records -----------------------------------------------------------------------------------------


class _Form(TypedDict):
    """Fields of every record; see `row`."""

    schema: Literal[1]
    notebook: str
    name: str
    kind: Kind
    label: str
    profile: str
    seed: int | None
    device: dict[str, Any]
    data: dict[str, Any] | None
    metrics: dict[str, int | float | bool | None]
    timings: dict[str, int | float | bool | None]
    series: dict[str, list[Any]]
    params: dict[str, Any]
    own_params: dict[str, Any]
    params_hash: str
    time: str


def roots() -> list[Path]:
    """Return the roots of records: the repository's, then this user's."""
    return list(dict.fromkeys([system.committed(), system.executed()]))


def read(root: Path | Sequence[Path], problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Return all records under one root or several, each once, by folder and line.

    They are in `<label>/results.jsonl` and `<label>/grids/*.jsonl`, and one folder deeper where another
    machine's folder was copied into the label's. A line that is no record, or is in another device's folder,
    is skipped and its fault is added to `problems`; without such a list, faults go to standard error.
    """
    rows: dict[str, dict[str, Any]] = {}
    for folder in [root] if isinstance(root, Path) else root:
        for file in files(folder):
            faults: list[str] = []
            for record in read_file(file, folder, faults):
                rows.setdefault(digest(record), record)
            if problems is not None:
                problems += faults
            elif faults:
                others = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
                print(f"{faults[0]}{others}: skipped", file=sys.stderr)
    return list(rows.values())


def files(root: Path) -> list[Path]:
    """Return the files of records under a root."""
    return sorted({file for pattern in _RECORDS for file in root.glob(pattern)})


def digest(record: Mapping[str, Any]) -> str:
    """Return a hash that identifies a record and its copies."""
    return _sha256(_text(record))


def read_file(file: Path, root: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Return the records of one file under `root`; faults of other lines are added to `problems`."""
    rows, place = [], file.relative_to(root)
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows += [_checked(line, place.parts[0])] if line.strip() else []
        except InputError as error:
            # The last element follows the last newline: it is left by a killed run.
            problems.append(f"{place}:{number}: {_UNFINISHED if number == len(lines) else error}")
    return rows


def _checked(line: bytes, label: str) -> dict[str, Any]:
    """Return the record of a line in the folder `label`; raise `InputError` if it is not valid."""
    try:
        record = msgspec.json.decode(line)  # no NaN, no infinity, UTF-8 alone
        msgspec.convert(record, _Form)
        datetime.fromisoformat(record["time"])
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise InputError(f"not a record ({error})") from None
    if record["profile"] not in PROFILES:
        raise InputError(f"not a record (unknown profile {record['profile']!r})")
    if record["label"] != label:
        raise InputError(f"a record of {record['label']!r} in another device's folder")
    return record


def latest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the newest record of each notebook, kind, label, name, parameters, seed, and data or grid.

    If two grids have the same run, both records stay, since each grid has its own figures.
    """
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        data = record.get("data") or {}
        key = (*(record[part] for part in _KEY), data.get("name"), data.get("fingerprint"))
        if key not in newest or record["time"] >= newest[key]["time"]:
            newest[key] = record
    return list(newest.values())


def committed() -> list[dict[str, Any]]:
    """Return the newest records of the grids in the repository."""
    return latest(row for row in read(system.committed()) if row["profile"] == "grid")


def reference() -> dict[str, Any]:
    """Return the seed study's published figures, with their sources and errors."""
    return system.read_yaml(system.params() / "published" / "seed_study.yaml")


def merge(source: Path, root: Path) -> tuple[int, int, int]:
    """Add another machine's records to a root: append new records, copy other files.

    Existing files and records do not change. Returns the numbers of new records, of known ones, of files
    copied. Raises `InputError` if `source` has no records or a broken one, before anything is written.
    """
    faults: list[str] = []
    theirs = [(file, read_file(file, source, faults)) for file in files(source)]
    if not theirs:
        raise InputError(f"{source}: no records there: expected <label>/results.jsonl in it")
    for fault in faults:
        if not fault.endswith(_UNFINISHED):
            raise InputError(fault)
    digests = {digest(record) for record in read(root)}
    before, copied = len(digests), 0
    for file, rows in theirs:
        for record in rows:
            if digest(record) not in digests:
                append(root / file.relative_to(source), record)
                digests.add(digest(record))
    for file in sorted(source.glob("*/**/*")):
        target = root / file.relative_to(source)
        is_copied = file.suffix in _COPIED and not file.name.endswith(".failed.ipynb")
        if is_copied and file.is_file() and not target.exists():
            with system.replacing(target) as fresh:
                shutil.copyfile(file, fresh)
            copied += 1
    new = len(digests) - before
    return new, sum(len(rows) for _, rows in theirs) - new, copied
