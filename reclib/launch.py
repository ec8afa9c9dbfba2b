"""Starting processes that train one model, and saying in one line how they ended.

`run` is torchrun's own engine on one machine, asked which process failed and why; `torchrun -m reclib.fit`
itself does as well, and says it in its own words. `apart` starts such a command from a notebook: no kernel
ever joins other processes. `side_by_side` starts processes that each train models of their own. Whoever
starts processes ends them: on an error, on Ctrl-C, and, as they look for it (`lifeline`), when it is killed
itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from reclib import diagnosis, lifeline
from reclib.config import InputError
from reclib.distributed import LostContact, in_run, place

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun wants to be told why a process failed
_MINE = "reclib-"  # how the id of a run begins that `run` started
_LOST = "lost-contact: "  # how the message of a process begins that failed because another one did


class Failure(NamedTuple):
    """How one process of a run ended."""

    rank: int
    code: int  # its exit code, or minus the signal that ended it
    message: str  # what it left, or ""


def run(arguments: Sequence[str], processes: int, claimed: str) -> int:
    """Run `python -m reclib.fit ARGUMENTS` in several processes; return an exit code, 0 if all got through.

    What ended them otherwise is one line on standard error.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    where = place(processes, claimed)
    os.environ |= lifeline.start_with() | {"OMP_NUM_THREADS": str(where.threads)}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    kills = diagnosis.memory_kills()
    with tempfile.TemporaryDirectory(prefix="reclib-", ignore_cleanup_errors=True) as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=_MINE + uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "reclib.fit", *arguments)
        except ChildFailedError as error:
            found = [
                Failure(rank, one.exitcode, str(one.error_file_data["message"]) if _left(one) else "")
                for rank, one in error.failures.items()
            ]
            _tell(f"error: {said(found, processes, diagnosis.memory_kills() - kills)}")
            return 2
        except SignalException as error:
            name = signal.Signals(error.sigval).name
            _tell(f"{name}: all {processes} processes ended; {diagnosis.AGAIN}")
            return 128 + error.sigval
    return 0


def _tell(line: str) -> None:
    """Write a line of its own: a process that was killed leaves its progress bar without an end."""
    print(f"\n{line}", file=sys.stderr)


def leave(code: int) -> int:
    """Return the exit code; of several processes, end this one at once.

    An orderly end may wait for processes that are gone, and nobody would learn that this one failed. Nothing
    is lost by it: whatever is on disk is there whole.
    """
    if in_run():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _left(failure: object) -> bool:
    return os.path.isfile(getattr(failure, "error_file", ""))


def said(failures: Sequence[Failure], processes: int, kills: int = 0) -> str:
    """Return one line on what ended a run of `processes`.

    A signal comes before an error, and an error before what it caused elsewhere: SIGTERM, by which the others
    are ended, and the loss of contact. `kills` is how many processes the system killed for memory meanwhile.
    """

    def weight(one: Failure) -> tuple[int, int]:
        if one.code < 0:
            return (2 if one.code == -signal.SIGTERM else 0), one.rank
        return (3 if one.message.startswith(_LOST) else 1), one.rank

    first = min(failures, key=weight)
    who = f"rank {first.rank} of {processes}"
    if first.code < 0 or not first.message:
        return diagnosis.of_death(first.code, kills, who)
    return f"{who}: {first.message.removeprefix(_LOST)}"


def report(error: InputError) -> None:
    """Say what is wrong: on standard error, and of several processes to the one that started them."""
    message = (_LOST if isinstance(error, LostContact) else "") + str(error)
    if file := os.environ.get(_ERROR_FILE):
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))
        if os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_MINE):
            return  # told there, once for all
        print(f"error: rank {os.environ.get('RANK')}: {error}", file=sys.stderr)
    else:
        print(f"error: {error}", file=sys.stderr)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Interrupt processes, and kill what has not put its things away in time."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + lifeline.PATIENCE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        process.kill()


def side_by_side(arguments: Sequence[str], processes: int, threads: int) -> list[int]:
    """Run `python -m ARGUMENTS` in several processes that are not joined; return their exit codes.

    Each has so many CPU `threads` unless its gpu label states them. Interrupted, this interrupts them and
    waits until they have ended.
    """
    environment = lifeline.start_with() | {"OMP_NUM_THREADS": str(threads)}
    started: list[subprocess.Popen] = []
    try:
        for _ in range(processes):
            command = [sys.executable, "-m", *arguments]
            started.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
        return [process.wait() for process in started]
    except BaseException:
        _end(started)
        raise


def apart(arguments: Sequence[str], processes: int) -> None:
    """Run `python -m reclib.fit --nproc PROCESSES ARGUMENTS` and wait for it.

    Raises `InputError` with the line in which it said why it failed. Interrupted, it interrupts the command
    and waits until that has ended its processes.
    """
    command = [sys.executable, "-m", "reclib.fit", "--nproc", str(processes), *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=lifeline.start_with(), text=True, **pipes)  # type: ignore[call-overload]
    try:
        _, told = process.communicate()
    except BaseException:
        _end([process])
        raise
    if process.returncode:
        lines = told.strip().splitlines() or [f"it ended with exit code {process.returncode}"]
        raise InputError(f"training in {processes} processes failed: {lines[-1].removeprefix('error: ')}")
