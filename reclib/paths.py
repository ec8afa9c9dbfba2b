"""Where things are, whatever the working directory.

Papermill runs a kernel in the caller's folder, nbval and JupyterLab in the notebook's, so no path in this
project is relative to the working directory: all come from here.
"""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent  # the code; the only place that asks where it lies
CHECKOUT = PACKAGE.parent


def root() -> Path:
    """Return the project's root: `RECLIB_ROOT` if set, else the folder that holds the package."""
    given = os.environ.get("RECLIB_ROOT")
    return Path(given).resolve() if given else CHECKOUT


def notebooks() -> Path:
    """Return the folder of the notebooks."""
    return root() / "notebooks"


def params() -> Path:
    """Return the folder of profile and device parameter files."""
    return root() / "params"


def figures() -> Path:
    """Return the folder that `collect` fills from the records."""
    return root() / "figures"


def data() -> Path:
    """Return the cache of raw and prepared data (git-ignored): `RECLIB_DATA` if set."""
    return Path(os.environ.get("RECLIB_DATA") or root() / ".data").resolve()


def runs() -> Path:
    """Return the folder of checkpoints (git-ignored): `RECLIB_RUNS` if set."""
    return Path(os.environ.get("RECLIB_RUNS") or root() / "runs").resolve()


def models() -> Path:
    """Return the folder of models that are kept (git-ignored): `RECLIB_MODELS`, if set."""
    return Path(os.environ.get("RECLIB_MODELS") or root() / "models").resolve()


def stamps() -> Path:
    """Return the folder of this checkout's stamps of finished notebooks (git-ignored)."""
    return root() / ".stamps"


def executed() -> Path:
    """Return the root of the records: `RECLIB_RECORDS` if set, else `executed/`."""
    return Path(os.environ.get("RECLIB_RECORDS") or root() / "executed").resolve()
