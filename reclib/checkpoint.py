"""Checkpoints that are whole or not there: safetensors and JSON in a folder that appears by one rename.

A checkpoint is `step-<n>/` with `tensors.safetensors` and `state.json`, which holds the sha256 of the former.
Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reclib.config import InputError

TENSORS, STATE = "tensors.safetensors", "state.json"


def save(folder: Path, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint `folder/name`, replacing one of that name; raise `InputError` if it can't be.

    What was there before is untouched until the new one is complete on disk.
    """
    target, partial = folder / name, folder / f"{name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial / TENSORS)
        body = state | {"sha256": _sha256(partial / TENSORS)}
        (partial / STATE).write_text(json.dumps(body, indent=1) + "\n")
        for file in (partial / TENSORS, partial / STATE, partial):
            _flush(file)
        if target.exists():
            old = folder / f"{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(target)
        _flush(folder)
    except Exception as error:  # safetensors wraps the system's errors in its own type
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest(folder)
        raise InputError(
            f"cannot write checkpoint {_shown(target)}: {_reason(error)}; "
            + (f"the last good one is {kept.name}" if kept else "there is none before it")
        ) from error
    return target


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint; raise `InputError` that names the file when it is damaged."""
    advice = f"delete {_shown(path)} to go on from an earlier one, or the run's folder to start anew"
    try:
        state = json.loads((path / STATE).read_text())
        expected = state["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"damaged checkpoint: {_shown(path / STATE)}: {_reason(error)}; {advice}") from error
    try:
        found = _sha256(path / TENSORS)
    except OSError as error:
        raise InputError(
            f"damaged checkpoint: {_shown(path / TENSORS)}: {_reason(error)}; {advice}"
        ) from error
    if found != expected:
        raise InputError(
            f"damaged checkpoint: {_shown(path / TENSORS)} has sha256 {found[:12]}, "
            f"expected {expected[:12]}; {advice}"
        )
    return load_file(path / TENSORS), state


def latest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint `step-<n>` in `folder`."""
    found = [p for p in folder.glob("step-*") if p.suffix == "" and p.is_dir()]
    return max(found, default=None, key=lambda p: int(p.name.removeprefix("step-")))


def prune(folder: Path, keep: int = 2) -> None:
    """Delete all but the newest `keep` checkpoints and what a killed run left half written."""
    found = sorted(
        (p for p in folder.glob("step-*") if p.suffix == ""),
        key=lambda p: int(p.name.removeprefix("step-")),
    )
    for path in [*found[:-keep], *folder.glob("*.partial"), *folder.glob("*.old")]:
        shutil.rmtree(path, ignore_errors=True)


def unique_tensors(model: torch.nn.Module, frozen: bool = True) -> dict[str, Tensor]:
    """Return the state with tied tensors once, as safetensors wants it, with or without frozen ones."""
    return {name: p.detach() for name, p in model.named_parameters() if frozen or p.requires_grad}


def load_unique(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of `unique_tensors` into a model of the same configuration."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or name in tensors:
                parameter.copy_(tensors[name])


def refuse_other(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise `InputError` naming what differs between a checkpoint's identity and this run's."""
    differs = [
        f"{part}.{key} is {old.get(key)!r} there and {new.get(key)!r} here"
        for part in ("model", "train", "origin")
        for old, new in [(found.get(part, {}), wanted.get(part, {}))]
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if found["data"] != wanted["data"]:
        differs.append(f"the dataset is {found['data'][:12]} there and {wanted['data'][:12]} here")
    if differs:
        raise InputError(
            f"the checkpoint in {folder.name} is of another run: {'; '.join(differs)}; use another folder"
        )


def _shown(path: Path) -> str:
    """Return the path relative to the working directory where it lies below it."""
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or repr(error)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
