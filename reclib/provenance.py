"""Where a number comes from: code, commit, versions; and nothing about who ran it where."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reclib import paths
from reclib.config import as_dict

_PACKAGES = ("torch", "numpy", "pandas", "plotly")
_FOLDERS = re.compile(r"(?<![\w.:/\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+")


def code_hash(notebook: str) -> str:
    """Return 16 hexadecimal digits over the package, folders within it too, and a notebook's code cells."""
    digest = hashlib.sha256()
    files = {file.relative_to(paths.PACKAGE).as_posix(): file for file in paths.PACKAGE.rglob("*.py")}
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name].read_bytes() + b"\0")
    source = paths.notebooks() / f"{notebook}.ipynb"
    if source.is_file():
        for cell in json.loads(source.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                digest.update("".join(cell["source"]).encode() + b"\0")
    return digest.hexdigest()[:16]


def git_state() -> dict[str, Any] | None:
    """Return the commit and whether the code differs from it; None outside a git checkout.

    A checkout that was copied without its .git has the commit that `RECLIB_COMMIT` states, if it does.
    """
    root = paths.CHECKOUT
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


def cpu_name() -> str:
    """Return what this machine's CPU calls itself; several generations may share a name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_model() -> str:
    """Return a short name that tells generations apart, such as `Intel Xeon 6/207` (family and model)."""
    found = _cpuinfo()
    numbers = [found[name] for name in ("cpu family", "model") if name in found]
    return f"{short_cpu(cpu_name())} {'/'.join(numbers)}".strip()


def short_cpu(name: str) -> str:
    """Return a CPU's name without marks and words that say nothing."""
    words = re.sub(r"\((R|TM)\)|@.*", "", name).split()
    return " ".join(word for word in words if word not in ("Processor", "CPU"))


def _cpuinfo() -> dict[str, str]:
    """Return what Linux says of the first core; nothing elsewhere."""
    if sys.platform != "linux":
        return {}
    first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    pairs = (line.partition(":")[::2] for line in first.splitlines())
    return {name.strip(): value.strip() for name, value in pairs}


def plain(value: Any) -> Any:
    """Return `value` as JSON holds it, without the folders of paths: they name people and hosts.

    Numpy scalars and one-element tensors become numbers; what JSON cannot hold is a `ValueError`.
    """
    if isinstance(value, str | Path):
        return _FOLDERS.sub("", str(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(as_dict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):  # a numpy scalar or a tensor of one element
        return plain(value.item())
    raise ValueError(f"cannot record a {type(value).__name__}: {value!r}")
