"""Public datasets by name: downloaded from their owners, checked and unpacked.

    python -m reclib data fetch --list
    python -m reclib data fetch ml-1m

`params/datasets.yaml` has their addresses. A file is downloaded into a temporary folder (`*.partial`, removed
on failure), checked, and renamed, so that it is either complete or absent. A broken transfer starts again;
`curl --location --continue-at - --output FILE ADDRESS` resumes.

A file without a published checksum must have the length that the server announced and, if it is gzip, pass
the checks of that format. Its sha256 and address are written to `received.json` beside it.

MovieLens 100K is fetched on first use: from an archive that the user put in place, from RecBole's wheel on
PyPI (whose `ml-100k.inter` is the official `u.data` under a header line), else from GroupLens. Rows and their
order are the same for all of them, which is checked by hash.

Reference: Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

from reclib import system
from reclib.config import STRICT, InputError, Positive, nearest, validated

LIST = "datasets.yaml"
RECEIVED = "received.json"

BLOCK_BYTES = 1 << 20  # read, hashed or unpacked at a time
TIMEOUT_SECONDS = 30  # without a byte arriving
PIP_SECONDS = 180  # at most, for an index that stalls
MAX_MEMBER_BYTES = 4 << 30  # of a zip member that is unpacked; ml-32m's ratings, the largest, are 0.9 GB

SIGNATURES = {".gz": b"\x1f\x8b", ".zip": b"PK\x03\x04"}

# Errors of transfers and archives. Errors of requests are OSErrors, InputError is a ValueError.
FAILURES = (ValueError, OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)

ML_100K = "ml-100k"

# sha256 of u.data, which identifies the interactions. The .inter file has the same rows under a header.
IDENTITY = "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"

SHA256 = {
    "u.data": IDENTITY,
    "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}

OFFICIAL, RECBOLE = ("u.data", "u.item"), ("ml-100k.inter", "ml-100k.item")  # interactions, titles


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Download:
    """One entry of `params/datasets.yaml`, whose head explains the fields."""

    name: str
    address: str
    kept_as: str | None = None  # name of the downloaded file, if not the last part of the address
    checksum: str | None  # algorithm:digest
    bytes: Positive | None
    members: tuple[str, ...] = ()
    format: str
    counts: dict[str, int] = field(default_factory=dict)
    licence: str
    citation: str

    @property
    def file(self) -> str:
        """Name of the downloaded file."""
        return self.kept_as or PurePosixPath(self.address).name

    @property
    def to_read(self) -> str:
        """Name of the file to read: the download, or the first member of the archive."""
        if not self.members:
            return self.file
        member = PurePosixPath(self.members[0])
        return member.with_suffix(".csv").name if member.suffix == ".pkl" else member.name


def catalogue() -> dict[str, Download]:
    """Return the datasets of `params/datasets.yaml` (by default the package's), by name."""
    file = system.params() / LIST
    if not file.is_file():
        file = system.CHECKOUT / "params" / LIST
    entries = system.read_yaml(file)
    return {
        name: validated(Download, values | {"name": name, "members": tuple(values.get("members", ()))})
        for name, values in entries.items()
    }


def known(name: str) -> Download:
    """Return the dataset called `name`; raise `InputError` with the nearest name otherwise."""
    entries = catalogue()
    if name in entries:
        return entries[name]
    raise InputError(f"no dataset is called {name!r}{nearest(name, entries)}; there are {', '.join(entries)}")


def fetched(name: str, folder: Path | None = None) -> Path | None:
    """Return the file to read of dataset `name`, None if it was not fetched. Nothing is downloaded.

    `folder` holds a folder for each dataset; the default is the project's. Raises `InputError` for a file
    whose size differs from the received one.
    """
    entry = known(name)
    path = _raw(folder) / name / entry.to_read
    if not path.is_file():
        return None
    _check_record(path, content=False)
    return path


def not_fetched(name: str) -> InputError:
    """Return the error for a missing dataset, with the command that fetches it."""
    entry = known(name)
    size = f" ({_megabytes(entry.bytes)})" if entry.bytes else ""
    return InputError(
        f"dataset {name!r} is not here: fetch it{size} with 'python -m reclib data fetch {name}'"
    )


def fetch(name: str, folder: Path | None = None) -> Path:
    """Return the file to read of dataset `name`, downloading and unpacking it if necessary.

    An existing file is checked against `received.json` and never overwritten. Raises `InputError` with the
    address, the reason and the place for a manual download.
    """
    entry = known(name)
    home = _raw(folder) / name
    path = home / entry.to_read
    if path.is_file():
        _check_record(path, content=True)
        return path
    download = _raw(folder) / entry.file if entry.members else path
    try:
        if not download.is_file():
            print(f"{entry.name}: {entry.licence}\nTo cite: {entry.citation}", file=sys.stderr)
            receive(entry, download)
        if entry.members:
            check(download, entry.checksum)
            with system.fresh_folder(home) as fresh:
                unpack(download, entry.members, fresh)
                files = [_without_pickle(fresh / PurePosixPath(name).name) for name in entry.members]
                _put(files, home, address(entry))
    except FAILURES as error:
        raise InputError(
            f"{name} could not be fetched from {address(entry)}: {_message(error)}; "
            f"to go on by hand, put a whole {entry.file} at {download}"
        ) from None
    return path


def address(entry: Download) -> str:
    """Return the address that the file is fetched from, with `RECLIB_MIRROR` that of the mirror."""
    mirror = os.environ.get("RECLIB_MIRROR")
    if not mirror:
        return entry.address
    if "://" in mirror:
        return f"{mirror.rstrip('/')}/{entry.file}"
    return str(system.root() / Path(mirror).expanduser() / entry.file)


def receive(entry: Download, target: Path) -> None:
    """Download the file of `entry` to `target` and check it; raise one of `FAILURES` otherwise."""
    location = address(entry)
    remote = "://" in location
    if remote:
        _refuse_offline()
    with system.fresh_folder(target) as fresh:
        free = shutil.disk_usage(fresh).free
        if entry.bytes and entry.bytes > free:
            raise InputError(
                f"it needs {_megabytes(entry.bytes)}, {target.parent} has {_megabytes(free)} free"
            )
        path = fresh / target.name
        if remote:
            _transfer(location, path, entry.bytes)
        else:
            shutil.copyfile(location, path)
        check(path, entry.checksum)
        with path.open("rb") as file:
            start = file.read(40)
        if not start or not start.startswith(SIGNATURES.get(path.suffix, b"")):  # an error page, say
            raise InputError(f"what arrived is no {path.suffix} file: it begins with {start!r}")
        if entry.checksum is None and path.suffix == ".gz":  # read to its end, it checks itself
            with gzip.open(path) as unpacked:
                while unpacked.read(BLOCK_BYTES):
                    pass
        _put([path], target.parent, None if entry.members else location)


def _put(files: list[Path], home: Path, location: str | None) -> None:
    """Move files into `home` and record their address.

    The record is written first and the first file, whose presence marks the dataset as complete, moved last.
    """
    home.mkdir(parents=True, exist_ok=True)
    if location is not None:
        hashes = {p.name: {"bytes": p.stat().st_size, "sha256": system.file_sha256(p)} for p in files}
        system.write_json(home / RECEIVED, {"address": location, "files": hashes})
    for path in reversed(files):
        path.replace(home / path.name)


def unpack(archive: Path, members: tuple[str, ...], into: Path, max_bytes: int = MAX_MEMBER_BYTES) -> None:
    """Unpack the named members of a zip into the folder `into`, under the last part of their names.

    Paths inside the archive, such as `../x` or `/x`, have no effect. A member that is missing, a symbolic
    link or larger than `max_bytes` is an `InputError`; a damaged one is a `BadZipFile`.
    """
    with zipfile.ZipFile(archive) as zipped:
        for name in members:
            try:
                member = zipped.getinfo(name)
            except KeyError:
                raise InputError(f"{archive.name} holds no {name}") from None
            if stat.S_ISLNK(member.external_attr >> 16):
                raise InputError(f"{archive.name}: {name} is a symbolic link, expected a file")
            if member.file_size > max_bytes:
                raise InputError(
                    f"{archive.name}: {name} has {member.file_size:,} bytes, more than {max_bytes:,}"
                )
            # Reading stops at `file_size`, also if the compressed data are longer.
            with zipped.open(member) as source, (into / PurePosixPath(name).name).open("wb") as out:
                shutil.copyfileobj(source, out, BLOCK_BYTES)


TABLE_CLASSES = {"DataFrame", "BlockManager", "Index", "RangeIndex", "ndarray", "dtype", "slice"}
TABLE_CLASSES |= {"_unpickle_block", "_frombuffer", "_reconstruct", "_new_Index"}


class _Tables(pickle.Unpickler):
    """Reads pickled pandas tables of numbers, texts and lists, and no executable objects."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("pandas", "numpy", "builtins") or name not in TABLE_CLASSES:
            raise InputError(f"a table holds {module}.{name}")
        return super().find_class(module, name)


def _without_pickle(path: Path) -> Path:
    """Return the file; convert a pickled pandas table to CSV, with one row per element of lists."""
    if path.suffix != ".pkl":
        return path
    with path.open("rb") as file:
        table = _Tables(file).load()
    lists = [name for name in table if isinstance(table[name].iloc[0], list)]
    (table.explode(lists) if lists else table).to_csv(path.with_suffix(".csv"), index=False)
    path.unlink()
    return path.with_suffix(".csv")


def check(path: Path, checksum: str | None) -> None:
    """Raise `InputError` unless the file has this checksum (algorithm:digest); None is not checked."""
    if checksum is None:
        return
    algorithm, expected = checksum.split(":")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    if digest != expected:
        raise InputError(
            f"{path.name} is truncated or altered: {path.stat().st_size:,} bytes, {algorithm} "
            f"{digest[:16]}…, expected {expected[:16]}…; delete it, if it is still there, to have it fetched "
            "again"
        )


def _refuse_offline() -> None:
    if os.environ.get("RECLIB_OFFLINE", "").lower() not in ("", "0", "false"):
        raise InputError("not tried, RECLIB_OFFLINE is set")


def _message(error: BaseException) -> str:
    """Return the message of the innermost wrapped error in one line, its type if there is none."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    return " ".join(str(error).split()) or type(error).__name__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`."""
    parser.add_argument("name", nargs="?", help="dataset, as --list shows it")
    parser.add_argument("--list", action="store_true", help="show the datasets, their sizes and licences")
    parser.add_argument("--folder", type=Path, help="of raw files; default: raw/ in the data folder")


def run(arguments: argparse.Namespace) -> int:
    """Fetch a dataset and print the path of the file to read, or list all; return the exit code."""
    if arguments.list:
        for entry in catalogue().values():
            size = _megabytes(entry.bytes) if entry.bytes else "size unknown"
            rows = f"{entry.counts['interactions']:,} interactions"
            state = "fetched" if fetched(entry.name, arguments.folder) else "not fetched"
            print(f"{entry.name:<32}{size:>14}  {rows:>24}  {state}\n    {entry.licence}")
        return 0
    if not arguments.name:
        raise InputError(f"which dataset? one of {', '.join(catalogue())}")
    print(fetch(arguments.name, arguments.folder))
    return 0


def _raw(folder: Path | None) -> Path:
    return folder.expanduser().resolve() if folder else system.data() / "raw"


def _transfer(location: str, path: Path, size: int | None) -> None:
    import pooch  # only where something is fetched: it is slow to import
    from requests.exceptions import ChunkedEncodingError
    from tqdm import tqdm

    def as_sent(response: Any, **_: Any) -> None:
        # Some servers call a .gz file an encoding of its content, and requests would unpack it.
        response.raw.headers.pop("content-encoding", None)

    # disable=None: shown on a terminal only. Pooch tests the truth of the bar, which needs a total.
    with tqdm(total=size or 1, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        get = pooch.HTTPDownloader(
            progressbar=bar, chunk_size=BLOCK_BYTES, timeout=TIMEOUT_SECONDS, hooks={"response": as_sent}
        )
        try:
            get(location, str(path), None)
        except ChunkedEncodingError as error:  # of any transfer, chunked or not, that ends early
            raise InputError(f"the connection broke off: {_message(error)}") from None


def _check_record(path: Path, *, content: bool) -> None:
    """Compare a file's size, and with `content` its hash, with `received.json` if that exists."""
    try:
        record = json.loads((path.parent / RECEIVED).read_text(encoding="utf-8"))["files"][path.name]
    except (OSError, ValueError, KeyError):
        return  # put there by hand: its owner vouches for it
    if path.stat().st_size != record["bytes"]:
        raise InputError(
            f"{path} has {path.stat().st_size:,} bytes, {record['bytes']:,} were received: delete it to have "
            f"it fetched again, or delete {RECEIVED} beside it to keep it as it is"
        )
    if content:
        check(path, f"sha256:{record['sha256']}")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


# ---- MovieLens 100K ---------------------------------------------------------------------------------------


class Files(NamedTuple):
    """The two verified files and the name of their origin."""

    interactions: Path
    items: Path
    origin: str


def folder() -> Path:
    """Return the folder of the raw files."""
    return _raw(None) / ML_100K


def archive() -> Path:
    """Return the path of `ml-100k.zip`, downloaded or put there by hand."""
    return _raw(None) / known(ML_100K).file


def present() -> Files | None:
    """Return the verified files if they exist, else None.

    Raises `InputError` for an unexpected file, which is neither used nor overwritten.
    """
    for names, origin in ((RECBOLE, "RecBole"), (OFFICIAL, "GroupLens")):
        interactions, items = (folder() / name for name in names)
        if interactions.exists():
            if not items.exists():
                raise InputError(f"{items} is missing beside {' and '.join(names)}")
            for path in (interactions, items):
                check(path, f"sha256:{SHA256[path.name]}")
            return Files(interactions, items, origin)
    return None


def files() -> Files:
    """Return the two verified files, fetching them if necessary.

    Raises an `InputError` with the failures of all sources.
    """
    sources = [_from_archive]
    if not archive().exists():
        sources = [_from_recbole_wheel, _from_archive]
    tried = []
    for download in sources:
        if verified := present():  # a process beside this one may have been faster
            return verified
        try:
            with system.fresh_folder(folder()) as fresh:
                download(fresh)
                received = [fresh / name for name in RECBOLE if (fresh / name).exists()]
                for path in received:
                    check(path, f"sha256:{SHA256[path.name]}")
                _put(received, folder(), None)
        except (*FAILURES, subprocess.SubprocessError) as error:
            tried.append(_message(error))
    if verified := present():
        return verified
    raise InputError(f"ml-100k could not be had: {'; '.join(tried)}")


def _from_archive(into: Path) -> None:
    fetch(ML_100K)


def _from_recbole_wheel(into: Path) -> None:
    pip_command = "pip download recbole==1.2.1"
    _refuse_offline()
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, "-m", *pip_command.split(), "--quiet", "--no-input", "--no-deps"]
        command += ["--disable-pip-version-check", "--retries", "1", "--only-binary", ":all:", "--dest", tmp]
        process = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
        wheels = list(Path(tmp).glob("*.whl"))
        if process.returncode or not wheels:
            reason = (process.stderr.strip() or f"it ended with code {process.returncode}").splitlines()[-1]
            raise InputError(f"{pip_command}: {reason}")
        unpack(wheels[0], tuple(f"recbole/dataset_example/{ML_100K}/{name}" for name in RECBOLE), into)
