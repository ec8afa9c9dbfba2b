"""One notebook to be run with given parameters on a device, and whether that is done already.

What is done is known from a stamp that git ignores, so that only work of this checkout is skipped:
committed records and notebooks never cause a skip.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reclib import params, paths, provenance
from reclib.config import InputError


@dataclass(frozen=True)
class Job:
    """One notebook with its parameters, on the device that is here."""

    notebook: str
    values: dict[str, Any]  # as given to the notebook; None: filled there from the device file
    label: str  # of the device that is really here

    @classmethod
    def last(cls, notebook: str, label: str) -> Job:
        """Return the job that this checkout finished last on a device (no values: none)."""
        empty = cls(notebook, {}, label)
        return cls(notebook, empty._stamped().get("values", {}), label)

    @property
    def output(self) -> Path:
        """Where the executed notebook goes."""
        return paths.executed() / self.label / f"{self.notebook}.ipynb"

    @property
    def stamp(self) -> Path:
        """The file that says that this checkout has finished this notebook on this device."""
        return paths.stamps() / f"{self.label}-{self.notebook}.json"

    def identity(self) -> str:
        """Return a hash of what the outcome depends on: parameters, code, versions."""
        filled = params.fill(params.build(self.notebook, self.values), self.label)
        parts = {
            "params": params.values(filled),
            "code": provenance.code_hash(self.notebook),
            "versions": provenance.versions(),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def is_finished(self) -> bool:
        """Whether this checkout finished it with this code, and what it wrote is still there."""
        stamp = self._stamped()
        try:
            return (
                stamp.get("identity") == self.identity()
                and self.output.is_file()
                and stamp.get("output") == _digest(self.output)
                and self.output.with_name("results.jsonl").is_file()
            )
        except InputError:  # the parameters of then are not valid now
            return False

    def finish(self, identity: str) -> None:
        """Stamp the job as done; `identity` is what it was when it began."""
        stamp = {"identity": identity, "output": _digest(self.output), "values": self.values}
        self.stamp.parent.mkdir(parents=True, exist_ok=True)
        partial = self.stamp.with_suffix(".partial")
        partial.write_text(json.dumps(stamp) + "\n", encoding="utf-8")
        os.replace(partial, self.stamp)

    def _stamped(self) -> dict[str, Any]:
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return stamp if isinstance(stamp, dict) else {}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
