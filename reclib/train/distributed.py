"""Several processes that train one model, each on its part of every step: data parallelism from outside.

Neither the model nor a batch knows of it. Of a step each process computes every n-th micro-batch; then the
gradients of all are summed, and each process clips and applies them, so that all hold the same bits. The loss
is a sum over targets divided by the targets of the whole step, which every process knows as it draws the
whole step: the sum of the gradients is the gradient, however unequal the parts, and a process whose part is
empty adds zeros.

Why not `DistributedDataParallel`: it averages over equal parts, wants the loss inside `forward`, and sums
from hooks on autograd's accumulation, which gradients that lie in sinks never pass. What sums after the
backward pass cost is overlap: on GPUs a step is longer by 2 (n - 1) / n times 4 bytes for each trained
parameter, over the link's rate. Tables are summed dense: with full cross-entropy every row has a gradient.

Processes are started by torchrun, or by `launch` with torchrun's own engine; `apart` starts such a command
from a notebook, whose kernel never joins other processes. Whoever starts processes ends them.
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
from reclib.data.dataset import Evaluation, Histories
from reclib.evaluate.metrics import Ranking
from reclib.model.bert4rec import SequenceModel, Sink

ALONE_BYTES = 2**20  # a gradient from this size on is summed where it lies, smaller ones in one buffer


class LostContact(InputError):
    """Another process of the run is gone: what ended it is reported by the one that started both."""


class Placement(NamedTuple):
    """How the processes of a run are joined, and what each may use."""

    backend: str  # nccl or gloo
    threads: int  # CPU threads of each


def placement(processes: int, label: str, gpus: int, threads: int) -> Placement:
    """Decide on `processes` of one machine with `gpus` visible GPUs and `threads` CPU threads for all.

    `label` is cpu, cpu1 or cpu2, or anything else for GPUs. There each process has one of its own, and they
    are joined by NCCL; on a CPU they divide the threads and are joined by gloo. Raises `InputError` for more
    processes than GPUs, and for more than the threads that a label states.
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
    """Place `processes` on this machine for a gpu label; raise `InputError` where they have no place."""
    on_cpu = claimed.startswith("cpu") or not torch.cuda.is_available()
    threads = hardware.CPU_THREADS.get(claimed, torch.get_num_threads())
    label = claimed if claimed.startswith("cpu") else "cpu" if on_cpu else "gpu"
    return placement(processes, label, 0 if on_cpu else torch.cuda.device_count(), threads)


def in_run() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def joined(claimed: str) -> Iterator[None]:
    """Join the processes that torchrun started for the gpu label `claimed`; alone, do nothing."""
    if not in_run():
        yield
        return
    backend, device = place(int(os.environ["LOCAL_WORLD_SIZE"]), claimed).backend, None
    if backend == "nccl":  # before anything looks at a device: the first look takes memory of it
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    with _reached():
        dist.init_process_group(backend, device_id=device)  # NCCL else guesses it by the global rank
    yield
    dist.destroy_process_group()  # after an error the process ends without waiting for the others


def divide_threads(label: str) -> None:
    """Take this process's part of the CPU threads of a label that states them (cpu1, cpu2)."""
    if in_run() and label in hardware.CPU_THREADS:
        torch.set_num_threads(place(int(os.environ["LOCAL_WORLD_SIZE"]), label).threads)


def refuse_other_count(saved: int, current: int, folder: Path) -> None:
    """Raise `InputError` where an unfinished run would go on with another number of processes."""
    if saved != current:
        raise InputError(
            f"the run in {folder.name} was begun with nproc={saved}, and here nproc is {current}: go on with "
            f"nproc={saved}, or start anew in another folder"
        )


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
    """Return which of how many processes this is."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), dist.get_backend())
    return Ranks()


@dataclass(frozen=True)
class Ranks:
    """Which process this is of those that train together; alone, its methods do nothing."""

    rank: int = 0
    count: int = 1
    backend: str = ""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    @property
    def where(self) -> torch.device:
        """Device of what is exchanged."""
        return torch.device("cuda" if self.backend == "nccl" else "cpu")

    def start(self, model: SequenceModel, config: TrainConfig) -> None:
        """Give every process the first one's weights; refuse a batch that cannot be divided."""
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
        """Seed dropout from (seed, step, process): a checkpoint needs nothing of the others."""
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

        `used`, filled at the first call, says which parameters get a gradient in any process: the others
        keep None, so that the optimiser passes them over as it does in one process.
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
                if parameter.grad is None:  # this process had nothing to do
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
        """Rank this process's users of `part` by `rank`, and return the ranking of all users."""
        if self.count == 1:
            return rank(part)
        users = np.arange(self.rank, len(part.targets), self.count)
        ranked = users if len(users) else np.zeros(1, dtype=np.int64)  # somebody's, and thrown away
        items, starts, ends = part.histories
        local = rank(Evaluation(Histories(items, starts[ranked], ends[ranked]), part.targets[ranked]))

        def gathered(values: np.ndarray) -> np.ndarray:
            full = np.zeros((len(part.targets), *values.shape[1:]), dtype=values.dtype)
            full[users] = values[: len(users)]
            moved = torch.from_numpy(full).to(self.where)
            with _reached():
                dist.all_reduce(moved)  # zeros everywhere but where a user was ranked
            return moved.cpu().numpy()

        top, losses = (None if values is None else gathered(values) for values in local[1:])
        return Ranking(gathered(local.ranks), top, losses)

    def of_first(self, row: dict[str, float]) -> dict[str, float]:
        """Return the first process's values: what is decided by them is decided alike."""
        if self.count == 1:
            return row
        values = torch.tensor([float(v) for v in row.values()], dtype=torch.float64, device=self.where)
        with _reached():
            dist.broadcast(values, 0)
        return {
            key: type(value)(received)
            for (key, value), received in zip(row.items(), values.tolist(), strict=True)
        }


# -- starting processes, and how they ended ------------------------------------------------------------------

_RUN = "reclib-"  # how the id of a run begins that `launch` started
_LOST = "lost-contact: "  # how the message of a process begins that failed because another one did


class Failure(NamedTuple):
    """How one process of a run ended."""

    rank: int
    code: int  # its exit code, or minus the signal that ended it
    message: str  # what it left, or ""


def launch(arguments: Sequence[str], processes: int, claimed: str) -> int:
    """Run `python -m reclib fit ARGUMENTS` in several processes; return an exit code, 0 if all got through.

    What ended them otherwise is one line on standard error.
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
        # Lines begin anew below: a process that was killed leaves its progress bar without an end.
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
    """Return one line on what ended a run of `processes`.

    A signal comes before an error, and an error before what it caused elsewhere: SIGTERM, by which the others
    are ended, and the loss of contact. `kills` is how many processes the system killed for memory meanwhile.
    """

    def order(failure: Failure) -> tuple[int, int]:
        if failure.code < 0:
            return (2 if failure.code == -signal.SIGTERM else 0), failure.rank
        return (3 if failure.message.startswith(_LOST) else 1), failure.rank

    first = min(failures, key=order)
    who = f"rank {first.rank} of {processes}"
    if first.code < 0 or not first.message:
        return system.of_death(first.code, kills, who)
    return f"{who}: {first.message.removeprefix(_LOST)}"


def report(error: InputError) -> None:
    """Print an error or, in one of several processes, leave it where torchrun's engine looks for it."""
    who = ""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = (_LOST if isinstance(error, LostContact) else "") + str(error)
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))
        if os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_RUN):
            return  # `launch` prints it, once for all
        who = f"rank {os.environ.get('RANK')}: "
    print(f"error: {who}{error}", file=sys.stderr)


def leave(code: int) -> int:
    """Return the exit code of a process that trains alone; end one of several processes at once.

    An orderly end of a failed process may wait for processes that are gone. An orderly end of a finished one
    lets Python unload gloo while a thread of it still runs, which now and then aborts the process ("terminate
    called without an active exception"). What is on disk is whole by then.
    """
    if in_run():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def apart(arguments: Sequence[str], processes: int) -> None:
    """Run `python -m reclib fit --nproc PROCESSES ARGUMENTS` and wait for it.

    Raises `InputError` with the line in which it said why it failed. Interrupted, it interrupts the command
    and waits until that has ended its processes.
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
