"""Data parallelism: several processes train one model, each on its part of every step.

Each process computes every n-th micro-batch of a step. The gradients are then summed over processes, and each
process clips and applies them, so that all have the same bits. The loss is a sum over targets divided by the
targets of the whole step, which every process draws. Gradients therefore add up for unequal parts as well; a
process without micro-batches adds zeros.

`DistributedDataParallel` is not used: it averages over equal parts, needs the loss inside `forward`, and sums
in hooks on autograd's accumulation, which gradient sinks bypass. Summing after the backward pass has no
overlap: on GPUs a step is longer by 2 (n - 1) / n times 4 bytes for each trained parameter, over the link's
rate. Tables are summed densely: with full cross-entropy every row has a gradient.

Processes are started by torchrun, or by `launch` with torchrun's engine; `apart` runs the command from a
notebook. A parent ends the processes that it started.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from reclib import hardware, system
from reclib.config import InputError, TrainConfig
from reclib.data.dataset import Evaluation
from reclib.evaluate.metrics import Ranking
from reclib.model.bert4rec import Sink
from reclib.model.ilora import SequenceModel

ALONE_BYTES = 2**20  # gradients of at least this size are summed in place, smaller ones in one buffer


class LostContact(InputError):
    """Another process of the run has ended; the parent process reports the reason."""


class Placement(NamedTuple):
    """The communication backend of a run, and the CPU threads of each process."""

    backend: str  # nccl or gloo
    threads: int  # CPU threads of each


def placement(processes: int, label: str, gpus: int, threads: int) -> Placement:
    """Place `processes` on a machine with `gpus` visible GPUs and `threads` CPU threads.

    `label` is cpu, cpu1 or cpu2, or anything else for GPUs. Each process on GPUs has its own, with NCCL; on a
    CPU the processes divide the threads, with gloo. Raises `InputError` for more processes than GPUs, or than
    threads of the label.
    """
    on_cpu, stated = label.startswith("cpu"), hardware.CPU_THREADS.get(label)
    if processes < 1:
        raise InputError(f"nproc={processes}: at least one process trains")
    if not on_cpu and processes > gpus:
        raise InputError(f"nproc={processes}, but visible GPUs: {gpus}; each process needs one of its own")
    if stated is not None and processes > stated:
        raise InputError(f"nproc={processes}, but {label} states the CPU's threads: {stated}; use gpu=cpu")
    return Placement("gloo" if on_cpu else "nccl", max(1, threads // processes))


def place(processes: int, claimed: str) -> Placement:
    """Place `processes` on this machine for a gpu label; raise `InputError` if they do not fit."""
    on_cpu = claimed.startswith("cpu") or not torch.cuda.is_available()
    threads = hardware.CPU_THREADS.get(claimed, torch.get_num_threads())
    label = claimed if claimed.startswith("cpu") else "cpu" if on_cpu else "gpu"
    return placement(processes, label, 0 if on_cpu else torch.cuda.device_count(), threads)


def in_run() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined(claimed: str) -> Iterator[None]:
    """Join the process group of torchrun for the gpu label `claimed`; do nothing in a single process."""
    if not in_run():
        yield
        return
    backend, device = place(int(os.environ["LOCAL_WORLD_SIZE"]), claimed).backend, None
    if backend == "nccl":  # before any use of CUDA, which would allocate memory on another device
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with _reached():
        dist.init_process_group(backend, device_id=device)  # by default NCCL derives it from the global rank
    yield
    dist.destroy_process_group()  # not after an error, which ends the process without waiting


def divide_threads(label: str) -> None:
    """Set the CPU threads of this process for a label with a number of threads (cpu1, cpu2)."""
    if in_run() and label in hardware.CPU_THREADS:
        torch.set_num_threads(place(int(os.environ["LOCAL_WORLD_SIZE"]), label).threads)


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Turn a failure of torch's collectives into `LostContact`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise LostContact(f"lost contact with another process of the run: {reason}") from error


def ranks() -> Ranks:
    """Return the rank of this process and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_backend())
    return Ranks()


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among data-parallel processes; in a single process, methods do nothing."""

    rank: int = 0
    count: int = 1
    backend: str = ""

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def where(self) -> torch.device:
        """Device of exchanged tensors."""
        return torch.device("cuda" if self.backend == "nccl" else "cpu")

    def start(self, model: SequenceModel, config: TrainConfig) -> None:
        """Broadcast the weights of the first process; raise `InputError` for an indivisible batch."""
        if config.batch_size % self.count:
            raise InputError(
                f"batch_size={config.batch_size} is divided among {self.count} processes: "
                f"it must be a multiple of {self.count}"
            )
        if self.count > 1:
            with _reached(), torch.no_grad():
                for tensor in (*model.parameters(), *model.buffers()):
                    dist.broadcast(tensor, 0)

    def demand_same(self, step: int, folder: Path) -> None:
        """Raise `InputError` unless all processes are at the same step of a run."""
        if self.count == 1:
            return
        steps = torch.zeros(self.count, dtype=torch.int64, device=self.where)
        steps[self.rank] = step
        with _reached():
            dist.all_reduce(steps)
        if len(set(steps.tolist())) > 1:
            raise InputError(
                f"the processes found different checkpoints in {folder.name} (steps {steps.tolist()}): "
                "all machines of a run need the same folder"
            )

    def seed_step(self, seed: int, step: int) -> None:
        """Seed dropout from (seed, step, rank): checkpoints need no random state of other processes."""
        if self.count > 1:
            high, low = np.random.SeedSequence((seed, step, self.rank)).generate_state(2)
            torch.manual_seed(int(high) << 32 | int(low))

    def sum_gradients(
        self,
        parameters: Sequence[torch.nn.Parameter],
        loss: Tensor,
        used: list[bool],
        sinks: Mapping[torch.nn.Parameter, Sink],
    ) -> None:
        """Sum over all processes, in place, the gradients of a step and its loss ().

        `used`, filled at the first call, marks the parameters with a gradient in any process; the others keep
        None, so that the optimiser skips them as in a single process.
        """
        if self.count == 1:
            return
        with _reached():
            if not used:
                has_grad = [parameter.grad is not None for parameter in parameters]
                anywhere = torch.tensor(has_grad, dtype=torch.int64, device=self.where)
                dist.all_reduce(anywhere, dist.ReduceOp.MAX)
                used.extend(anywhere.bool().tolist())
            grads = []
            for parameter, is_used in zip(parameters, used, strict=True):
                if not is_used:
                    continue
                if parameter.grad is None:  # this process had no micro-batch
                    parameter.grad = torch.zeros_like(parameter)
                if parameter in sinks:
                    sinks[parameter].mix()
                grads.append(parameter.grad)
            large = [grad for grad in grads if grad.nbytes >= ALONE_BYTES]
            small = [grad for grad in grads if grad.nbytes < ALONE_BYTES]
            flat = torch.cat([loss.reshape(1), *(grad.flatten() for grad in small)])
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in (*large, flat)]:
                work.wait()
        loss.copy_(flat[0])
        for grad, part in zip(small, flat[1:].split([grad.numel() for grad in small]), strict=True):
            grad.copy_(part.view_as(grad))

    def ranking(self, part: Evaluation, rank: Callable[[Evaluation], Ranking]) -> Ranking:
        """Rank this process's share of the users of `part`, and return the ranking of all users."""
        if self.count == 1:
            return rank(part)
        users = np.arange(self.rank, len(part.targets), self.count)
        ranked = users if len(users) else np.zeros(1, dtype=np.int64)  # a user whose result is discarded
        local = rank(part.rows(ranked))

        def gathered(values: np.ndarray) -> np.ndarray:
            full = np.zeros((len(part.targets), *values.shape[1:]), dtype=values.dtype)
            full[users] = values[: len(users)]
            moved = torch.from_numpy(full).to(self.where)
            with _reached():
                dist.all_reduce(moved)  # zero for users of other processes
            return moved.cpu().numpy()

        top, losses = (None if values is None else gathered(values) for values in local[1:])
        return Ranking(gathered(local.ranks), top, losses)

    def of_first(self, row: dict[str, float]) -> dict[str, float]:
        """Return the values of the first process, so that all processes take the same decisions."""
        if self.count == 1:
            return row
        values = torch.tensor([float(v) for v in row.values()], dtype=torch.float64, device=self.where)
        with _reached():
            dist.broadcast(values, 0)
        return {key: type(row[key])(value) for key, value in zip(row, values.tolist(), strict=True)}


# -- starting processes, and their failures ------------------------------------------------------------------

_RUN = "reclib-"  # prefix of the run ids of `launch`
_LOST = "lost-contact: "  # prefix of the error message of a process that lost contact


class Failure(NamedTuple):
    """The failure of one process of a run."""

    rank: int
    code: int  # exit code, or minus the signal
    message: str  # its error message, or ""


def launch(arguments: Sequence[str], processes: int, claimed: str) -> int:
    """Run `python -m reclib fit ARGUMENTS` in several processes; return an exit code, 0 on success.

    The cause of a failure is printed as one line on standard error.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    threads = place(processes, claimed).threads
    os.environ |= system.start_with() | {"OMP_NUM_THREADS": str(threads)}
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    kills = system.memory_kills()
    with tempfile.TemporaryDirectory(prefix="reclib-", ignore_cleanup_errors=True) as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=_RUN + uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        # Messages start with a line break: a killed process leaves its progress bar without one.
        try:
            elastic_launch(config, sys.executable)("-m", "reclib", "fit", *arguments)
        except ChildFailedError as error:
            failures = []
            for rank, end in error.failures.items():
                message = str(end.error_file_data["message"]) if Path(end.error_file).is_file() else ""
                failures.append(Failure(rank, end.exitcode, message))
            cause = cause_of(failures, processes, system.memory_kills() - kills)
            print(f"\nerror: {cause}", file=sys.stderr)
            return 2
        except SignalException as error:
            name = signal.Signals(error.sigval).name
            print(f"\n{name}: all {processes} processes ended; {system.AGAIN}", file=sys.stderr)
            return 128 + error.sigval
    return 0


def cause_of(failures: Sequence[Failure], processes: int, kills: int = 0) -> str:
    """Return one line on the cause of a failed run of `processes`.

    Signals precede errors, and both precede their consequences in other processes: SIGTERM and lost contact.
    `kills` is the number of processes that the system killed for memory during the run.
    """

    def order(failure: Failure) -> tuple[int, int]:
        if failure.code < 0:
            return (2 if failure.code == -signal.SIGTERM else 0), failure.rank
        return (3 if failure.message.startswith(_LOST) else 1), failure.rank

    first = min(failures, key=order)
    process = f"rank {first.rank} of {processes}"
    if first.code < 0 or not first.message:
        return system.of_death(first.code, kills, process)
    return f"{process}: {first.message.removeprefix(_LOST)}"


def report(error: InputError) -> None:
    """Print an error; in one of several processes, write it to torchrun's error file."""
    process = ""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = (_LOST if isinstance(error, LostContact) else "") + str(error)
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))
        if os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_RUN):
            return  # `launch` prints it once for all processes
        process = f"rank {os.environ.get('RANK')}: "
    print(f"error: {process}{error}", file=sys.stderr)


def leave(code: int) -> int:
    """Return the exit code of a single process; exit at once from one of several processes.

    A normal exit of a failed process may wait for processes that have ended. A normal exit of a finished one
    may abort, since Python unloads gloo while one of its threads runs ("terminate called without an active
    exception"). All files are complete by then.
    """
    if in_run():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def apart(arguments: Sequence[str], processes: int) -> None:
    """Run `python -m reclib fit --nproc PROCESSES ARGUMENTS` and wait for it.

    Raises `InputError` with the last line of its errors. An interrupt is passed on to the command, which ends
    its processes.
    """
    command = [sys.executable, "-m", "reclib", "fit", "--nproc", str(processes), *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=system.start_with(), text=True, **pipes)  # type: ignore[call-overload]
    try:
        _, errors = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(system.PATIENCE)
        process.kill()
        raise
    if process.returncode:
        lines = errors.strip().splitlines() or [f"it ended with exit code {process.returncode}"]
        raise InputError(f"training in {processes} processes failed: {lines[-1].removeprefix('error: ')}")
