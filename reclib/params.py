"""The parameters of each notebook: from its cell, through profiles, to a validated value.

A notebook states its parameters in one cell tagged `parameters`, which papermill may override, and
makes a frozen dataclass of them in the next: `p = params.read("02_baseline", globals())`. What each
may be asked is in `notebook_params`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from reclib import injected, paths
from reclib.config import InputError, nearest, validated
from reclib.notebook_params import NOTEBOOKS

PROFILES = ("smoke", "quick", "lease", "full")  # the more work, the later
# Who runs it, where and how often is not how much work one run is: a profile's name ignores these.
_NOT_WORK = frozenset({"gpu", "seed", "seeds", "nproc", "tracker"})

T = TypeVar("T")


def kind(notebook: str) -> type:
    """Return the dataclass of a notebook's parameters; `InputError` for an unknown notebook."""
    if notebook not in NOTEBOOKS:
        close = nearest(notebook, NOTEBOOKS)
        raise InputError(f"unknown notebook {notebook!r}{close}; known: {', '.join(NOTEBOOKS)}")
    return NOTEBOOKS[notebook]


def names(notebook: str) -> list[str]:
    """Return the names of a notebook's parameters, in order."""
    return [field.name for field in dataclasses.fields(kind(notebook))]


def read(notebook: str, namespace: Mapping[str, Any]) -> Any:
    """Build a notebook's parameters from its global names: `read("02_baseline", globals())`.

    A name that is no parameter, a wrong type and an impossible value are an `InputError`.
    """
    known = names(notebook)
    given = {name: namespace[name] for name in known if name in namespace}
    return build(notebook, given | injected.strangers(namespace, known))


def build(notebook: str, values: Mapping[str, Any]) -> Any:
    """Validate `values` into the notebook's dataclass; undone misspellings are printed."""
    fields = get_type_hints(kind(notebook), include_extras=True)
    converted = {}
    for name, value in values.items():
        converted[name] = injected.respelt(value, fields[name]) if name in fields else value
        if converted[name] is not value:
            print(f"converted: {name}={value!r} -> {converted[name]!r}")
    return validated(kind(notebook), converted)


def fill(p: T, label: str) -> T:
    """Return `p` with what is None filled from `params/gpu/<label>.yaml`, if there is one.

    `label` is that of the device that is really there. A value that was given is never replaced.
    """
    file = paths.params() / "gpu" / f"{label}.yaml"
    if not file.is_file():
        print(f"no device file for {label!r}: what depends on the device keeps its general default")
        return p
    own = values(p)
    device = _mapping(file)
    return validated(type(p), {k: device.get(k) if v is None else v for k, v in own.items()})


def values(p: Any) -> dict[str, Any]:
    """Return parameters as a dict of plain values."""
    return dataclasses.asdict(p)


def profile(notebook: str, name: str) -> dict[str, Any]:
    """Return a notebook's parameters in a profile: smoke's, with the profile's own on top."""
    known_profile(name)
    smoke = _section("smoke", notebook)
    if not smoke:
        raise InputError(f"params/smoke.yaml has no section {notebook!r}")
    return smoke | _section(name, notebook)


def from_file(file: Path) -> dict[str, Any]:
    """Return the parameters that a YAML file states, such as `papermill -f` takes."""
    return _mapping(file)


def profile_of(notebook: str, p: Any) -> str:
    """Return the profile whose work `p` is, or "custom": found by comparing, so it cannot lie.

    Where profiles ask for the same work it is the largest of them: there is nothing left out to warn of. A
    profile counts only for the notebooks that it has a section of.
    Ignored are the device label, the seeds, the tracker, and what the device file decides.
    """
    given = values(p)
    from_device = device_names()
    for name in reversed(PROFILES):
        if notebook not in stated(name):
            continue
        section = profile(notebook, name)
        if all(
            given[key] == value
            for key, value in section.items()
            if key not in _NOT_WORK and not (value is None and key in from_device)
        ):
            return name
    return "custom"


def known_profile(name: str) -> str:
    """Return the name of a profile as it is; `InputError` for one that there is not."""
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}{nearest(name, PROFILES)}; allowed: {', '.join(PROFILES)}")
    return name


def stated(profile_name: str) -> list[str]:
    """Return the notebooks that a profile has a section of; the others run in it as in smoke."""
    return list(_mapping(paths.params() / f"{profile_name}.yaml"))


def device_names() -> frozenset[str]:
    """Return the names of the parameters that any `params/gpu/*.yaml` decides."""
    files = sorted((paths.params() / "gpu").glob("*.yaml"))
    return frozenset(name for file in files for name in _mapping(file))


def _section(profile_name: str, notebook: str) -> dict[str, Any]:
    file = paths.params() / f"{profile_name}.yaml"
    section = _mapping(file).get(notebook) or {}
    if not isinstance(section, dict):
        raise InputError(f"{file.name}: section {notebook!r} must be a mapping of parameters")
    return section


def _mapping(file: Path) -> dict[str, Any]:
    try:
        state = file.stat()
        content = _parsed(file, state.st_mtime_ns, state.st_size)
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{file}{line}: not valid YAML") from None
    if content is not None and not isinstance(content, dict):
        raise InputError(f"{file}: must be a mapping")
    return copy.deepcopy(content) or {}


@functools.lru_cache(maxsize=64)
def _parsed(file: Path, changed_ns: int, size: int) -> Any:
    """Return what a YAML file holds, parsed once for each state that it was in; not to be changed."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))
