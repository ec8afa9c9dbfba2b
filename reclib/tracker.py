"""Curves in Weights & Biases or TensorBoard, for those who want them; the records do not depend on it.

Off in tests and by default, files only in batch, online only when asked. Files lie under `runs/`, which git
ignores, and say nothing of host, user or command line. TensorBoard's own writer puts the host's name into the
name of its file, so the events are framed here, by that package's record writer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from reclib import paths
from reclib.config import InputError, nearest

TRACKERS = ("none", "wandb-offline", "wandb-online", "tensorboard")
_WANDB_MODES = ("disabled", "offline", "online")  # of its own variable, WANDB_MODE
_PROJECT = "reclib"


class Tracker(Protocol):
    """What a training run logs to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log named numbers at an optimiser step; steps do not go backwards."""

    def close(self, failed: bool) -> None:
        """End the run."""


class Nothing:
    """The tracker of those who want none."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Forget the numbers."""

    def close(self, failed: bool) -> None:
        """Do nothing."""


class Wandb:
    """A run of Weights & Biases: one folder under `runs/wandb`, which `wandb sync` uploads later."""

    def __init__(self, mode: str, group: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        """Start it. Raises `InputError` for online mode without a login."""
        os.environ.setdefault("WANDB_SILENT", "true")  # else banners with run ids and paths
        import wandb

        if mode == "online" and not _logged_in(wandb):
            raise InputError(
                "tracker='wandb-online' needs a login: run `wandb login` once, or use tracker='wandb-offline'"
            )
        folder.mkdir(parents=True, exist_ok=True)  # wandb makes a folder `wandb` in it
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,  # host name, user and command line
            # The run itself holds host and user as well.
            host="hidden",
            username="hidden",
        )
        self._run = wandb.init(
            project=_PROJECT,
            group=group,
            name=name,
            config=dict(config),
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            reinit="create_new",  # several runs, one per seed, in one notebook
            settings=settings,
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log named numbers at an optimiser step."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Finish the run; one that failed is marked so."""
        self._run.finish(exit_code=1 if failed else 0)


class TensorBoard:
    """A file of events under `runs/tensorboard/<group>/<name>`, made when there is something to write.

    A run that goes on from a checkpoint writes a further file into the same folder; its first event tells
    TensorBoard to forget what the killed run had logged from that step on.
    """

    def __init__(self, group: str, name: str, config: Mapping[str, Any], folder: Path) -> None:
        """Take the run's place. Raises `InputError` where the package is missing."""
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer import record_writer
        except ModuleNotFoundError:
            raise InputError(
                "tracker='tensorboard' needs its package: pip install tensorboard, or use another tracker"
            ) from None
        self._events, self._writers = event_pb2, record_writer
        self._config, self._folder = dict(config), folder / "tensorboard" / group / name
        self._file: Any = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write named numbers at an optimiser step; they can be looked at from then on."""
        if self._file is None:
            self._open(step)
        event = self._event(step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=float(value))
        self._write(event)

    def close(self, failed: bool) -> None:
        """Close the file; TensorBoard knows no failed runs."""
        if self._file is not None:
            self._file.close()

    def _open(self, step: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"events.out.tfevents.{time.time_ns()}"
        self._file = self._writers.RecordWriter(file.open("xb"))
        self._write(self._event(file_version="brain.Event:2"))
        begun = self._event(step=step)
        begun.session_log.status = self._events.SessionLog.START
        self._write(begun)
        said = self._event(step=step)
        text = said.summary.value.add(tag="config/text_summary")
        text.metadata.plugin_data.plugin_name = "text"
        text.tensor.dtype = 7  # DT_STRING
        shown = json.dumps(self._config, indent=2, default=str)
        text.tensor.string_val.append("\n".join(f"    {line}" for line in shown.splitlines()).encode())
        self._write(said)

    def _event(self, **fields: Any) -> Any:
        return self._events.Event(wall_time=time.time(), **fields)

    def _write(self, event: Any) -> None:
        self._file.write(event.SerializeToString())
        self._file.flush()


def used(asked: str) -> str:
    """Return the tracker that is used: `asked`, unless the environment says otherwise.

    `WANDB_MODE`, where it is set, decides between offline, online and none for those who asked for wandb.
    Raises `InputError` for an unknown tracker or mode.
    """
    if asked not in TRACKERS:
        raise InputError(
            f"unknown tracker {asked!r}{nearest(asked, TRACKERS)}; allowed: {', '.join(TRACKERS)}"
        )
    mode = os.environ.get("WANDB_MODE")
    if mode and asked.startswith("wandb"):
        if mode not in _WANDB_MODES:
            raise InputError(f"WANDB_MODE is {mode!r}; allowed: {', '.join(_WANDB_MODES)}")
        return "none" if mode == "disabled" else f"wandb-{mode}"
    return asked


@contextmanager
def start(tracker: str, group: str, name: str, config: Mapping[str, Any]) -> Iterator[Tracker]:
    """Track one run: `group` is the notebook, `name` the run in it, `config` its parameters.

    Never prompts. Raises `InputError` for an unknown tracker, or one that lacks a login or its package. A
    run whose block raises is marked as failed where the tracker knows such a mark.
    """
    run = _begin(used(tracker), group, name, config)
    try:
        yield run
    except BaseException:
        run.close(failed=True)
        raise
    run.close(failed=False)


def _begin(tracker: str, group: str, name: str, config: Mapping[str, Any]) -> Tracker:
    if tracker == "none":
        return Nothing()
    if tracker == "tensorboard":
        return TensorBoard(group, name, config, paths.runs())
    return Wandb(tracker.removeprefix("wandb-"), group, name, config, paths.runs())


def _logged_in(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.UsageError:
        return False
