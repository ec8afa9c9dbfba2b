"""MovieLens 100K: where its two files come from.

The licence forbids passing the files on, so they are fetched: from a file that the user put in
place, from an installed RecBole or its wheel on PyPI (whose `ml-100k.inter` is the official
`u.data` under a header line), else from GroupLens. Whatever the way, the rows and their order are
the same, and that is checked by hash.

Reference: Harper and Konstan, The MovieLens Datasets, ACM TiiS 5(4), 2015.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from reclib import cache, fetch, paths
from reclib.config import InputError

# sha256 of u.data. The .inter file's own hash below pins the same rows in the same order under a
# header, so this one value stands for the interactions wherever they came from.
IDENTITY = "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490"

SHA256 = {
    "u.data": IDENTITY,
    "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
LINES = {"u.data": 100_000, "u.item": 1_682, "ml-100k.inter": 100_001, "ml-100k.item": 1_683}
OFFICIAL = ("u.data", "u.item")
RECBOLE = ("ml-100k.inter", "ml-100k.item")

MAX_MEMBER_BYTES = 16 << 20  # of a zip member that is read; the largest real one has 2 MB
PIP_SECONDS = 180  # a stalled index must not hold a study up for longer
FAILURES = (*fetch.FAILURES, subprocess.SubprocessError)  # of one way; then the next is tried


class Files(NamedTuple):
    """The two verified files, and in words where they were got."""

    interactions: Path
    items: Path
    origin: str


def folder() -> Path:
    """Return the folder that holds the raw files, whether fetched or put there by hand."""
    return paths.data() / "raw" / "ml-100k"


def archive() -> Path:
    """Return where a downloaded `ml-100k.zip` is kept, or may be put by hand."""
    return paths.data() / "raw" / official().file


def present() -> Files | None:
    """Return the verified files if they are in place, None if they are not.

    Raises `InputError` where a file is there and is not what it should be: it is never used or
    overwritten in silence, since a user may have put it there.
    """
    for pair in (RECBOLE, OFFICIAL):
        found = [folder() / name for name in pair]
        if not any(path.exists() for path in found):
            continue
        for path in found:
            if not path.exists():
                raise InputError(f"{path} is missing beside {' and '.join(pair)}")
            _verify(path)
        return Files(found[0], found[1], "RecBole" if pair is RECBOLE else "GroupLens")
    return None


def files() -> Files:
    """Return the two verified files, fetching them if they are not in place.

    Raises one `InputError` that names all ways tried and where to put the file by hand.
    """
    tried = []
    ways: list[tuple[str, Callable[[Path], None]]] = [
        (f"archive {archive()}", _from_archive),
        ("installed recbole", _from_installed_recbole),
        ("pip download recbole==1.2.1", _from_recbole_wheel),
        (fetch.address(official()), _from_grouplens),
    ]
    for name, way in ways:
        found = present()  # a process beside this one may have been faster
        if found:
            return found
        try:
            with cache.fresh_folder(folder()) as fresh:
                way(fresh)
                _put_in_place(fresh)
        except FAILURES as error:
            tried.append(f"{name}: {fetch.one_line(error)}")
    found = present()
    if found:
        return found
    raise InputError(
        f"ml-100k could not be had ({'; '.join(tried)}); fetch {fetch.address(official())} by hand "
        f"and put it at {archive()}"
    )


def official() -> fetch.Download:
    """Return where GroupLens has its archive, and its checksum."""
    return fetch.known("ml-100k")


def _put_in_place(fresh: Path) -> None:
    for path in fresh.iterdir():
        _verify(path)
    try:
        fresh.rename(folder())  # atomic; fails where another process has put a full folder meanwhile
    except OSError:
        if present() is None:  # an empty or foreign folder: fill it, one atomic rename per file
            folder().mkdir(exist_ok=True)
            for path in sorted(fresh.iterdir(), reverse=True):  # titles first: interactions make it count
                path.rename(folder() / path.name)


def _from_archive(into: Path) -> None:
    if not archive().exists():
        raise InputError("not there")
    fetch.check(archive(), official().checksum)
    fetch.unpack(archive(), official().members, into, MAX_MEMBER_BYTES)


def _from_installed_recbole(into: Path) -> None:
    spec = importlib.util.find_spec("recbole")  # finds the package without importing it
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise InputError("not installed")
    for name in RECBOLE:
        shutil.copyfile(Path(places[0]) / "dataset_example" / "ml-100k" / name, into / name)


def _from_recbole_wheel(into: Path) -> None:
    fetch.refuse_offline()
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--disable-pip-version-check", "--retries", "1", "--only-binary", ":all:"]
        command += ["--dest", tmp, "recbole==1.2.1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
        wheels = list(Path(tmp).glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise InputError(said[-1] if said else f"pip ended with code {done.returncode}")
        members = tuple(f"recbole/dataset_example/ml-100k/{name}" for name in RECBOLE)
        fetch.unpack(wheels[0], members, into, MAX_MEMBER_BYTES)


def _from_grouplens(into: Path) -> None:
    fetch.receive(official(), archive())
    _from_archive(into)


def _verify(path: Path) -> None:
    name = path.name
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found == SHA256[name]:
        return
    lines = content.count(b"\n")
    short = lines != LINES[name]
    size = f"{lines:,} lines of {LINES[name]:,} expected" if short else f"{len(content):,} bytes"
    raise InputError(
        f"{path} is truncated or altered: {size}, sha256 {found[:16]}…, expected "
        f"{SHA256[name][:16]}…; delete it to have it fetched again"
    )
