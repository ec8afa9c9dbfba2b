"""Public datasets by name: downloaded from their owners, checked, and taken out of their archive.

    python -m reclib data fetch --list
    python -m reclib data fetch ml-1m

`params/datasets.yaml` says where each comes from. A file is either whole in its place or not there: it is
received into a folder beside its place (named `*.partial`, gone on any failure), checked, and renamed. A
transfer that breaks off is begun anew; `curl --location --continue-at - --output FILE ADDRESS` resumes.

A file without a published checksum must have the length that the server announced and, if it is gzip, pass
that format's own check to its end. Its sha256 is kept in `received.json` beside it, with the address.

MovieLens 100K is fetched where it is first used: from an archive that the user put in place, from RecBole's
wheel on PyPI (whose `ml-100k.inter` is the official `u.data` under a header line), else from GroupLens.
Whatever the way, the rows and their order are the same, and that is checked by hash.

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
PIP_SECONDS = 180  # a stalled index must not hold a study up for longer

MAX_MEMBER_BYTES = 4 << 30  # of a zip member that is unpacked; ml-32m's ratings, the largest, are 0.9 GB

SIGNATURES = {".gz": b"\x1f\x8b", ".zip": b"PK\x03\x04"}

# What a transfer or an archive may fail with. Errors of requests are OSErrors, InputError a ValueError.
FAILURES = (ValueError, OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile)

ML_100K = "ml-100k"

# sha256 of u.data. The .inter file's own hash below pins the same rows in the same order under a header, so
# this one value stands for the interactions wherever they came from.
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
    kept_as: str | None = None  # name of the downloaded file, where the address's own says nothing
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
        """Name of the file that a reader is given: the download, or the first member of the archive."""
        if not self.members:
            return self.file
        member = PurePosixPath(self.members[0])
        return member.with_suffix(".csv").name if member.suffix == ".pkl" else member.name


def catalogue() -> dict[str, Download]:
    """Return the datasets of `params/datasets.yaml`, by name; a root without one has the package's."""
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
    """Return the file to be read of dataset `name`, None where it was not fetched. Nothing is downloaded.

    `folder` holds the raw files, one folder for each dataset; the default is the project's own. Raises
    `InputError` where the file has not the size with which it was received.
    """
    entry = known(name)
    path = _raw(folder) / name / entry.to_read
    if not path.is_file():
        return None
    _check_record(path, content=False)
    return path


def not_fetched(name: str) -> InputError:
    """Return the error that says how to get dataset `name`, for a caller that found it missing."""
    entry = known(name)
    size = f" ({_megabytes(entry.bytes)})" if entry.bytes else ""
    return InputError(
        f"dataset {name!r} is not here: fetch it{size} with 'python -m reclib data fetch {name}'"
    )


def fetch(name: str, folder: Path | None = None) -> Path:
    """Return the file to be read of dataset `name`, downloading and unpacking what is not in place.

    What is in place is checked against the record of its arrival and never overwritten: a user may have
    put it there. Raises `InputError` that names address, reason and where to put the file by hand.
    """
    entry = known(name)
    home = _raw(folder) / name
    wanted = home / entry.to_read
    if wanted.is_file():
        _check_record(wanted, content=True)
        return wanted
    download = _raw(folder) / entry.file if entry.members else wanted
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
            f"{name} could not be fetched from {address(entry)}: {_one_line(error)}; "
            f"to go on by hand, put a whole {entry.file} at {download}"
        ) from None
    return wanted


def address(entry: Download) -> str:
    """Return where the file is fetched from: its address or, with `RECLIB_MIRROR`, the mirror's."""
    mirror = os.environ.get("RECLIB_MIRROR")
    if not mirror:
        return entry.address
    if "://" in mirror:
        return f"{mirror.rstrip('/')}/{entry.file}"
    return str(system.root() / Path(mirror).expanduser() / entry.file)


def receive(entry: Download, target: Path) -> None:
    """Bring the file of `entry` to `target`, whole and checked, or raise one of `FAILURES`."""
    where = address(entry)
    remote = "://" in where
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
            _transfer(where, path, entry.bytes)
        else:
            shutil.copyfile(where, path)
        check(path, entry.checksum)
        with path.open("rb") as file:
            start = file.read(40)
        if not start or not start.startswith(SIGNATURES.get(path.suffix, b"")):  # an error page, say
            raise InputError(f"what arrived is no {path.suffix} file: it begins with {start!r}")
        if entry.checksum is None and path.suffix == ".gz":  # read to its end, it checks itself
            with gzip.open(path) as unpacked:
                while unpacked.read(BLOCK_BYTES):
                    pass
        _put([path], target.parent, None if entry.members else where)


def _put(files: list[Path], home: Path, where: str | None) -> None:
    """Move files into `home`, with a record of the address that they are from.

    The record precedes the files, so that none is there without it. The first file, which is to be read,
    comes last and makes the others count.
    """
    home.mkdir(parents=True, exist_ok=True)
    if where is not None:
        hashes = {p.name: {"bytes": p.stat().st_size, "sha256": system.file_sha256(p)} for p in files}
        system.write_json(home / RECEIVED, {"address": where, "files": hashes})
    for path in reversed(files):
        path.replace(home / path.name)


def unpack(archive: Path, members: tuple[str, ...], into: Path, max_bytes: int = MAX_MEMBER_BYTES) -> None:
    """Unpack exactly the named members of a zip under their last names into the folder `into`.

    No path of the archive's own choosing is written to, so names such as `../x` or `/x` have no effect.
    A member that is missing, a symbolic link or larger than `max_bytes` is an `InputError`; one that is
    damaged is a `BadZipFile`.
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
            # Reading stops at the size that was just looked at, whatever the compressed data hold.
            with zipped.open(member) as source, (into / PurePosixPath(name).name).open("wb") as out:
                shutil.copyfileobj(source, out, BLOCK_BYTES)


class _Tables(pickle.Unpickler):
    """Reads pickled pandas tables of numbers, texts and lists, and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        parts = {"_unpickle_block", "_frombuffer", "_reconstruct", "_new_Index", "slice", "dtype", "ndarray"}
        parts |= {"DataFrame", "BlockManager", "Index", "RangeIndex"}
        if module.split(".")[0] not in ("pandas", "numpy", "builtins") or name not in parts:
            raise InputError(f"a table holds {module}.{name}")
        return super().find_class(module, name)


def _without_pickle(path: Path) -> Path:
    """Return the file; a pickled pandas table becomes CSV, in which lists of a row are rows of their own."""
    if path.suffix != ".pkl":
        return path
    with path.open("rb") as file:
        table = _Tables(file).load()
    lists = [name for name in table if isinstance(table[name].iloc[0], list)]
    (table.explode(lists) if lists else table).to_csv(path.with_suffix(".csv"), index=False)
    path.unlink()
    return path.with_suffix(".csv")


def check(path: Path, checksum: str | None) -> None:
    """Raise `InputError` unless the file has this checksum (algorithm:digest), where there is one."""
    if checksum is None:
        return
    algorithm, expected = checksum.split(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise InputError(
            f"{path.name} is truncated or altered: {path.stat().st_size:,} bytes, {algorithm} {found[:16]}…, "
            f"expected {expected[:16]}…; delete it, if it is still there, to have it fetched again"
        )


def _refuse_offline() -> None:
    if os.environ.get("RECLIB_OFFLINE", "").lower() not in ("", "0", "false"):
        raise InputError("not tried, RECLIB_OFFLINE is set")


def _one_line(error: BaseException) -> str:
    """Return what an error, or the innermost of those that it wraps, says; its kind if it says nothing."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    return " ".join(str(error).split()) or type(error).__name__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads."""
    parser.add_argument("name", nargs="?", help="dataset, as --list shows it")
    parser.add_argument("--list", action="store_true", help="show the datasets, their sizes and licences")
    parser.add_argument("--folder", type=Path, help="of raw files; default: raw/ in the data folder")


def run(arguments: argparse.Namespace) -> int:
    """Fetch one dataset and print the path of the file to be read, or list all. Returns the exit code."""
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


def _transfer(where: str, path: Path, size: int | None) -> None:
    import pooch  # only where something is fetched: it is slow to import
    from requests.exceptions import ChunkedEncodingError
    from tqdm import tqdm

    def as_sent(response: Any, **_: Any) -> None:
        # Some servers call a .gz file an encoding of its content, and requests would unpack it.
        response.raw.headers.pop("content-encoding", None)

    # disable=None: drawn on a terminal only. Pooch asks for the bar's truth, which needs a total.
    with tqdm(total=size or 1, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        get = pooch.HTTPDownloader(
            progressbar=bar, chunk_size=BLOCK_BYTES, timeout=TIMEOUT_SECONDS, hooks={"response": as_sent}
        )
        try:
            get(where, str(path), None)
        except ChunkedEncodingError as error:  # of any transfer, chunked or not, that ends early
            raise InputError(f"the connection broke off: {_one_line(error)}") from None


def _check_record(path: Path, *, content: bool) -> None:
    """Compare with the record of the file's arrival, if there is one: its size or all its content."""
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
    """The two verified files, and in words where they were got."""

    interactions: Path
    items: Path
    origin: str


def folder() -> Path:
    """Return the folder that holds the raw files, whether fetched or put there by hand."""
    return _raw(None) / ML_100K


def archive() -> Path:
    """Return where a downloaded `ml-100k.zip` is kept, or may be put by hand."""
    return _raw(None) / known(ML_100K).file


def present() -> Files | None:
    """Return the verified files if they are in place, None if they are not.

    Raises `InputError` where a file is there and is not what it should be: it is never used or overwritten
    in silence, since a user may have put it there.
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
    """Return the two verified files, fetching them if they are not in place.

    Raises one `InputError` that names all ways tried and where to put the file by hand.
    """
    ways = [_from_archive]
    if not archive().exists():
        ways = [_from_recbole_wheel, _from_archive]
    tried = []
    for way in ways:
        if found := present():  # a process beside this one may have been faster
            return found
        try:
            with system.fresh_folder(folder()) as fresh:
                way(fresh)
                received = [fresh / name for name in RECBOLE if (fresh / name).exists()]
                for path in received:
                    check(path, f"sha256:{SHA256[path.name]}")
                _put(received, folder(), None)
        except (*FAILURES, subprocess.SubprocessError) as error:
            tried.append(_one_line(error))
    if found := present():
        return found
    raise InputError(f"ml-100k could not be had: {'; '.join(tried)}")


def _from_archive(into: Path) -> None:
    fetch(ML_100K)


def _from_recbole_wheel(into: Path) -> None:
    what = "pip download recbole==1.2.1"
    _refuse_offline()
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, "-m", *what.split(), "--quiet", "--no-input", "--no-deps"]
        command += ["--disable-pip-version-check", "--retries", "1", "--only-binary", ":all:", "--dest", tmp]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
        wheels = list(Path(tmp).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()[-1]
            raise InputError(f"{what}: {reason}")
        unpack(wheels[0], tuple(f"recbole/dataset_example/{ML_100K}/{name}" for name in RECBOLE), into)
