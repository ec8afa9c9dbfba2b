"""Records of several machines in one place: appended where they are new, known by their hash."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from reclib import record
from reclib.config import InputError

_COPIED = (".ipynb", ".npz", ".json")  # executed notebooks, ranks of a grid, self-checks


def merge(source: Path, root: Path) -> tuple[int, int, int]:
    """Add another machine's records to a root: append those that are not there, copy other files.

    Nothing that is there changes. Returns the numbers of new records, of known ones, of files copied.
    Raises `InputError` where `source` holds no records or a broken one, before anything is written.
    """
    theirs = [(file, record.read_file(file, source)) for file in record.files(source)]
    if not theirs:
        raise InputError(f"{source}: no records there: expected <label>/results.jsonl in it")
    known = {record.digest(one) for one in record.read(root)}
    before = len(known)
    for file, records in theirs:
        for one in records:
            if record.digest(one) not in known:
                record.append(root / file.relative_to(source), one)
                known.add(record.digest(one))
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
