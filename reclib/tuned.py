"""Settings that a tuning study chose: read from `params/tuned/<size>-<dataset>.yaml`, and refused elsewhere.

The file says what it was chosen on. Settings of one dataset say nothing about another, so a file whose data's
fingerprint is not that of the data at hand is an error and no default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

from reclib import paths
from reclib.config import InputError

KEYS = ("size", "dataset", "fingerprint", "model", "train", "chosen_by")


class Tuned(NamedTuple):
    """Chosen fields of the two configurations, and where they come from."""

    model: dict[str, Any]
    train: dict[str, Any]
    chosen_by: dict[str, Any]  # trials, value, seed, code, commit, device, versions, time


def path(size: str, dataset: str) -> Path:
    """Return where the settings of a size on a dataset lie."""
    return paths.params() / "tuned" / f"{size}-{dataset}.yaml"


def read(size: str, dataset: str, fingerprint: str) -> Tuned | None:
    """Return the settings chosen for a size on a dataset, None where nothing was tuned.

    Raises `InputError` for a file that is not whole, or is of another size or dataset.
    """
    file = path(size, dataset)
    if not file.is_file():
        return None
    try:
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        raise InputError(f"{file.name}: not valid YAML") from None
    missing = [key for key in KEYS if not isinstance(given, dict) or key not in given]
    if missing:
        raise InputError(f"{file.name}: key {missing[0]!r} is missing; it needs {', '.join(KEYS)}")
    if given["size"] != size:
        raise InputError(f"{file.name}: tuned for size {given['size']!r}, not {size!r}")
    if given["fingerprint"] != fingerprint:
        raise InputError(
            f"{file.name}: tuned on {given['dataset']} with fingerprint {str(given['fingerprint'])[:12]}, "
            f"the data here have {fingerprint[:12]}: tune anew (python -m reclib.tune), or set tuned=False"
        )
    return Tuned(given["model"], given["train"], given["chosen_by"])


def write(size: str, dataset: str, fingerprint: str, chosen: Tuned) -> Path:
    """Write the settings of a study, in place of earlier ones, whole or not at all."""
    file = path(size, dataset)
    body = {"size": size, "dataset": dataset, "fingerprint": fingerprint} | chosen._asdict()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    partial.replace(file)
    return file
