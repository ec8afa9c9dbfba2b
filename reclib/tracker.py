"""Curves in Weights & Biases, for those who want them; the records do not depend on it.

Off in tests, files only in batch, online only when asked. Files lie under `runs/`, which git ignores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reclib import paths
from reclib.config import InputError

MODES = ("disabled", "offline", "online")
_PROJECT = "reclib"


class Tracker:
    """What a training run logs to; does nothing when tracking is disabled."""

    def __init__(self, run: Any | None) -> None:
        """Take a wandb run, or None when tracking is disabled."""
        self._run = run

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log named numbers at an optimiser step."""
        if self._run is not None:
            self._run.log(dict(values), step=step)


def mode_of(asked: str) -> str:
    """Return the mode that is used: disabled under tests, else `WANDB_MODE` if set, else `asked`."""
    if "PYTEST_VERSION" in os.environ:
        return "disabled"
    mode = os.environ.get("WANDB_MODE") or asked
    if mode not in MODES:
        raise InputError(f"unknown wandb mode {mode!r}; allowed: {', '.join(MODES)}")
    return mode


@contextmanager
def start(mode: str, group: str, name: str, config: Mapping[str, Any]) -> Iterator[Tracker]:
    """Track one run: `group` is the notebook, `name` the run in it, `config` its parameters.

    Never prompts. Raises `InputError` for online mode without a login. A run whose block raises is
    marked as failed.
    """
    used = mode_of(mode)
    if used == "disabled":
        yield Tracker(None)
        return
    run = _init(used, group, name, config, paths.runs())
    try:
        yield Tracker(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _init(mode: str, group: str, name: str, config: Mapping[str, Any], folder: Path) -> Any:
    os.environ.setdefault("WANDB_SILENT", "true")  # else banners with run ids and paths
    import wandb

    if mode == "online" and not _logged_in(wandb):
        raise InputError(
            "wandb_mode='online' needs a login: run `wandb login` once, or use wandb_mode='offline'"
        )
    folder.mkdir(parents=True, exist_ok=True)  # wandb makes a folder `wandb` in it
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,  # host name, user and command line
    )
    return wandb.init(
        project=_PROJECT,
        group=group,
        name=name,
        config=dict(config),
        mode=mode,  # type: ignore[arg-type]
        dir=str(folder),
        reinit="create_new",  # several runs, one per seed, in one notebook
        settings=settings,
    )


def _logged_in(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.UsageError:
        return False
