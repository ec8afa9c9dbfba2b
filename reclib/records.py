"""What a run found, kept so that figures can be built from it and nobody has to take it on trust.

`Run.result` does two things. It displays a small bundle with the deterministic part (what the
notebook tests compare), and it appends one line with everything to
`executed/<label>/results.jsonl`: metrics in full, timings, parameters, device, versions, code and
commit. The label is that of the device that was really there, whatever was claimed.
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
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from reclib import parameters, system
from reclib.config import InputError
from reclib.system import plain

# ------------------------------------------------------------------------------------------------
# Where a number comes from: code, commit, versions; and nothing about who ran it where.

_PACKAGES = ("torch", "numpy", "pandas", "plotly")


def code_hash(notebook: str) -> str:
    """Return 16 hexadecimal digits over the package, folders within it too, and a notebook's code cells."""
    digest = hashlib.sha256()
    files = {file.relative_to(system.PACKAGE).as_posix(): file for file in system.PACKAGE.rglob("*.py")}
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes() + b"\0")
    source = system.notebooks() / f"{notebook}.ipynb"
    if source.is_file():
        for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                digest.update("".join(cell["source"]).encode() + b"\0")
    return digest.hexdigest()[:16]


def git_state() -> dict[str, Any] | None:
    """Return the commit and whether the code differs from it; None outside a git checkout.

    A checkout that was copied without its .git has the commit that `RECLIB_COMMIT` states, if it does.
    """
    root = system.CHECKOUT
    commit = _git(root, "rev-parse", "HEAD")
    if not commit:
        stated = os.environ.get("RECLIB_COMMIT")
        return {"commit": stated, "dirty": None} if stated else None
    code = ("reclib", "notebooks", "params", "pyproject.toml")  # records change with every run
    changed = _git(root, "status", "--porcelain", "--", *code)
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that numbers and figures depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


# ------------------------------------------------------------------------------------------------

SCHEMA = 1

MIME = "application/vnd.reclib.result+json"

Kind = Literal["measured", "predicted"]

CARD = (
    "name",
    "cpu_model",  # tells generations of one name apart; None on a GPU
    "type",
    "capability",
    "memory_bytes",
    "torch",
    "cuda",
    "driver",
    "threads",
    "label",
)

_KEY = ("notebook", "kind", "label", "name", "params_hash", "seed")


class Record(dict[str, Any]):
    """One record. As the last value of a cell it shows nothing: its provenance is no output."""

    def _ipython_display_(self) -> None:
        pass


class Run:
    """One execution of one notebook on one device: `result` records what it finds."""

    def __init__(
        self,
        notebook: str,
        p: Any,
        device: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the notebook's parameters, the device's card, the data's name and fingerprint.

        `p` is the dataclass from `parameters.read`; `device` has at least the keys that
        `hardware.device_card` returns; `data` has `name` and `fingerprint`.
        """
        missing = [key for key in CARD if key not in device]
        if missing:
            raise ValueError(f"device card lacks {', '.join(missing)}")
        if device["type"] == "cuda":
            _demand_self_check(device)
        self.notebook = notebook
        self.params = plain(parameters.values(p))
        self.label = str(device["label"])
        self._deterministic = self._without(parameters.device_names() | {"gpu", "tracker"})
        self._provenance = {
            "schema": SCHEMA,
            "notebook": notebook,
            "label": self.label,
            "claimed": self.params.get("gpu"),
            "profile": parameters.profile_of(notebook, p),
            "device": plain({key: device[key] for key in CARD}),
            "data": None if data is None else plain(dict(data)),
            "code": code_hash(notebook),
            "git": git_state(),
            "versions": versions(),
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

        `metrics` must be the same in every run on one machine (the notebook tests compare them to
        3 digits); what depends on the clock goes into `timings`. `params` are this result's own,
        beside those of the run. Metrics and timings must be finite numbers or None (not measured);
        a value of a series that is not finite (a loss that diverged) is stored as null. The record
        counts the earlier ones of the same configuration: so often was the test split scored before.

        `device` is the card of one that is not here: only a prediction has one, and lies in its folder.
        """
        own = plain(dict(params or {}))
        if seed is not None and not isinstance(seed, int):
            raise ValueError(f"seed of {name!r} must be a whole number, got {seed!r}")
        if kind not in ("measured", "predicted"):
            raise ValueError(f"kind of {name!r} must be measured or predicted, got {kind!r}")
        if device is not None and kind != "predicted":
            raise ValueError(f"{name!r} is {kind} on {device['label']}, which is not here")
        numbers = _finite(name, metrics)
        record = Record(self._provenance)
        record |= {
            "name": name,
            "kind": kind,
            "seed": seed,
            "metrics": numbers,
            "timings": _finite(name, timings or {}),
            "series": {key: [_or_null(v) for v in values] for key, values in (series or {}).items()},
            "params": self.params,
            "own_params": own,
            "params_hash": params_hash(self._identity(seed) | {"own": own}),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if device is not None:
            record |= {"label": device["label"], "device": plain({key: device.get(key) for key in CARD})}
        file = system.executed() / record["label"] / "results.jsonl"
        record["earlier"] = _times_recorded(file, record)
        append(file, record)
        _display(self.notebook, name, self._deterministic | own, numbers, seed)
        return record

    def _identity(self, seed: int | None) -> dict[str, Any]:
        # A result of one seed is the same result whichever other seeds the run had.
        return self._without({"gpu", "tracker"} | ({"seed", "seeds"} if seed is not None else set()))

    def _without(self, names: Iterable[str]) -> dict[str, Any]:
        left_out = set(names)
        if self.params.get("nproc") == 1:  # as every result was found before there was a choice
            left_out.add("nproc")
        return {key: value for key, value in self.params.items() if key not in left_out}


def _demand_self_check(device: Mapping[str, Any]) -> None:
    """Refuse to record measurements of a GPU that has not passed its self-check with this torch."""
    file = system.executed() / str(device["label"]) / "selfcheck.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    checked = found.get("device", {})
    same = all(checked.get(key) == plain(device[key]) for key in ("name", "torch", "cuda"))
    if not (found.get("passed") and same):
        raise InputError(
            f"no passed self-check of {device['name']} with torch {device['torch']} in "
            f"{device['label']}/selfcheck.json: run `python -m reclib check` once, then again"
        )


def params_hash(params: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that identify a set of parameters, whatever their order."""
    text = json.dumps(plain(dict(params)), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(root: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Return all records of a root's devices and grids, each once, by folder and line.

    They are in `<label>/results.jsonl` and `<label>/grids/*.jsonl`, and one folder deeper where another
    machine's folder was copied into the label's. A record that is there twice counts once. A last line
    that a killed run left unfinished is skipped and reported on standard error; anything else that is no
    record, or lies in another device's folder, is an `InputError`; with a list of `problems` it is left out
    and told there.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in files(root):
        for one in read_file(file, root, problems):
            found.setdefault(digest(one), one)
    return list(found.values())


def files(root: Path) -> list[Path]:
    """Return the files of records under a root."""
    patterns = ("results.jsonl", "grids/*.jsonl")
    return sorted(file for depth in ("*", "*/*") for p in patterns for file in root.glob(f"{depth}/{p}"))


def digest(record: Mapping[str, Any]) -> str:
    """Return the hash by which a record is known wherever it is copied."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_file(file: Path, root: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the records of one file under `root`, checked as `read` says."""
    found = []
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file.relative_to(root)}:{number}"
        try:
            try:
                record = json.loads(line, parse_constant=_no_number)
            except (ValueError, RecursionError) as error:
                if number == len(lines) and isinstance(error, json.JSONDecodeError):
                    print(f"{where}: unfinished line skipped", file=sys.stderr)  # no newline follows it
                    continue
                raise InputError(f"{where}: not a record (broken JSON)") from None
            found.append(_checked(record, file.relative_to(root), number))
        except InputError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def latest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the newest record of each notebook, kind, label, name, parameters, seed, and data or grid.

    Two grids can hold one and the same run: each keeps its record, since each is drawn by itself.
    """
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in records:
        data = record.get("data") or {}
        key = (*(record[part] for part in _KEY), data.get("name"), data.get("fingerprint"))
        if key not in newest or record["time"] >= newest[key]["time"]:
            newest[key] = record
    return list(newest.values())


def committed() -> list[dict[str, Any]]:
    """Return the newest records of the grids that lie in the repository, wherever this run records."""
    return latest(row for row in read(system.root() / "executed") if row["profile"] == "grid")


def _times_recorded(file: Path, record: Mapping[str, Any]) -> int:
    """Count the records of the same result, with the same parameters, that are in the file already."""
    if not file.is_file():
        return 0
    there = (line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("{"))
    needle = f'"params_hash":"{record["params_hash"]}"'
    same = (json.loads(line) for line in there if needle in line and line.endswith("}"))
    return sum(all(one.get(key) == record[key] for key in _KEY) for one in same)


def _checked(record: Any, file: Path, number: int) -> dict[str, Any]:
    where = f"{file}:{number}"
    if not isinstance(record, dict) or any(key not in record for key in (*_KEY, "schema", "time")):
        raise InputError(f"{where}: not a record (a key is missing)")
    if record["schema"] != SCHEMA:
        raise InputError(f"{where}: schema {record['schema']!r}, this version reads {SCHEMA}")
    if record["label"] != file.parts[0]:
        raise InputError(f"{where}: a record of {record['label']!r} in another device's folder")
    return record


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Append one line in one write, whole or not at all."""
    import fcntl  # POSIX only; reading records works everywhere

    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    line = text.encode() + b"\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        end = _end_of_records(descriptor)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                said = f"No space left: only {written} of {len(line)} bytes could be written"
                raise OSError(errno.ENOSPC, said, file.name)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def _end_of_records(descriptor: int) -> int:
    """Cut off what a killed writer left after the last newline; return the file's length."""
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    end = content.rfind(b"\n") + 1
    if end == len(content):
        return end
    try:
        json.loads(content[end:])
    except ValueError:
        os.ftruncate(descriptor, end)
        return end
    return len(content) + os.write(descriptor, b"\n")  # whole: only an editor dropped the newline


def _display(
    notebook: str,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float | int | None],
    seed: int | None,
) -> None:
    """Show the deterministic part, where there is a notebook to show it in."""
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:  # a script on a machine without Jupyter
        return
    if get_ipython() is None:
        return
    rounded = {key: _three_digits(value) for key, value in metrics.items()}
    bundle: dict[str, Any] = {"name": name, "params": dict(params), "metrics": rounded}
    text = "  ".join(f"{key}={value}" for key, value in rounded.items())
    if seed is not None:
        bundle["seed"] = seed
        name = f"{name} (seed {seed})"
    display({MIME: bundle, "text/plain": f"{notebook} / {name}: {text}"}, raw=True)


def _three_digits(value: float | int | None) -> float | int | None:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _finite(name: str, numbers: Mapping[str, Any]) -> dict[str, float | int | None]:
    result = {}
    for key, given in numbers.items():
        value = plain(given)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{key} of result {name!r} is {given!r}: not a finite number")
        result[key] = value
    return result


def _or_null(given: Any) -> Any:
    value = plain(given)
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------
# Records of several machines in one place: appended where they are new, known by their hash.

_COPIED = (".ipynb", ".npz", ".json")  # executed notebooks, ranks of a grid, self-checks


def merge(source: Path, root: Path) -> tuple[int, int, int]:
    """Add another machine's records to a root: append those that are not there, copy other files.

    Nothing that is there changes. Returns the numbers of new records, of known ones, of files copied.
    Raises `InputError` where `source` holds no records or a broken one, before anything is written.
    """
    theirs = [(file, read_file(file, source)) for file in files(source)]
    if not theirs:
        raise InputError(f"{source}: no records there: expected <label>/results.jsonl in it")
    known = {digest(one) for one in read(root)}
    before = len(known)
    for file, records in theirs:
        for one in records:
            if digest(one) not in known:
                append(root / file.relative_to(source), one)
                known.add(digest(one))
    new = len(known) - before
    return new, sum(len(records) for _, records in theirs) - new, _copy_files(source, root)


def _copy_files(source: Path, root: Path) -> int:
    copied = 0
    for file in sorted(source.glob("*/**/*")):
        target = root / file.relative_to(source)
        wanted = file.suffix in _COPIED and not file.name.endswith(".failed.ipynb")
        if wanted and file.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".partial")
            shutil.copyfile(file, partial)
            os.replace(partial, target)
            copied += 1
    return copied


def reference() -> dict[str, Any]:
    """Return the seed study's published figures, with their sources and what is wrong in them."""
    file = system.params() / "published" / "seed_study.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))
