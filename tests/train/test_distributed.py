"""Several processes that train one model: the same gradients, bits, decisions and files; and how they end."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from conftest import ROOT, python, refused, smoke, until
from safetensors.torch import load_file
from small_models import histories, small_model

from reclib import hardware
from reclib.config import DataConfig, InputError, TrainConfig, changed
from reclib.data import splits
from reclib.data.batches import Epoch
from reclib.data.prepare import prepare
from reclib.experiments import baseline
from reclib.train import distributed, saving
from reclib.train.distributed import Failure, Placement, Ranks, cause_of, placement
from reclib.train.fit import data_identity, fit_setup, is_finished, rank_targets
from reclib.train.saving import unique_tensors
from reclib.train.trainer import Trainer

LIMIT = 150  # seconds that a process may take on a busy machine; nothing here waits for ever
GNU = {"OMP_NUM_THREADS": "1"}


def test_processes_are_joined_by_what_their_devices_have_and_divide_the_threads():
    assert placement(2, "cpu", 0, 8) == placement(2, "cpu", 4, 8) == Placement("gloo", 4)
    assert placement(4, "gpu", 4, 16) == Placement("nccl", 4)
    assert placement(1, "gpu", 1, 16) == Placement("nccl", 16)
    refused("nproc=4, but visible GPUs: 2; each process needs one of its own", placement, 4, "gpu", 2, 16)
    refused("nproc=2, but cpu1 states the CPU's threads: 1; use gpu=cpu", placement, 2, "cpu1", 0, 1)
    refused("nproc=0: at least one process trains", placement, 0, "cpu", 0, 2)


def test_what_ended_a_run_is_the_signal_then_the_error_and_never_the_contact_lost_by_it():
    lost, own = "lost-contact: connection closed", "training diverged at step 3"
    killed = Failure(1, -signal.SIGKILL, "")
    ended = Failure(0, -signal.SIGTERM, "")  # by the launcher, after the other one
    for failures, processes, wanted in [
        ([Failure(0, 2, lost), killed], 2, "rank 1 of 2 was killed by SIGKILL"),
        ([ended, killed], 2, "rank 1 of 2 was killed by SIGKILL"),
        ([ended, Failure(1, 2, own)], 2, f"rank 1 of 2: {own}"),
        ([Failure(1, 2, lost), ended], 2, "rank 0 of 2 died of SIGTERM"),
        ([Failure(0, 2, lost), Failure(2, 2, own)], 4, f"rank 2 of 4: {own}"),
        ([Failure(0, 2, own), Failure(1, 2, own)], 2, f"rank 0 of 2: {own}"),
        ([Failure(1, 1, "")], 2, "rank 1 of 2 ended with exit code 1"),
        ([Failure(1, -signal.SIGSEGV, "")], 2, "rank 1 of 2 died of SIGSEGV"),
    ]:
        assert cause_of(failures, processes).startswith(wanted)
    assert "for memory" in cause_of([killed], 2, kills=1)


def test_the_parts_of_all_processes_are_the_step_whatever_their_number():
    given = histories(ranks.LENGTHS)
    for count, micro, layout in itertools.product((1, 2, 4), (None, 2, 8), ("packed", "padded")):
        train = TrainConfig(batch_size=8, micro_batch_size=micro, layout=layout)
        whole = Epoch(given, small_model(), changed(train, micro_batch_size=None), 0)
        parts = [Epoch(given, small_model(), train, 0, rank, count) for rank in range(count)]
        for step in range(whole.num_steps):
            (batch,) = whole.step(step)
            batches, totals = zip(*(part.counted(step) for part in parts), strict=True)
            micros = list(itertools.chain(*batches))
            targets = torch.cat([each.targets[: each.num_targets] for each in micros])
            assert sorted(targets.tolist()) == sorted(batch.targets[: batch.num_targets].tolist())
            assert {*totals} == {(batch.num_targets, batch.num_tokens, batch.num_sequences)}
            assert max(each.num_sequences for each in micros) <= min(micro or 8, 8 // count)
        if count == 2:  # three sequences are left
            assert len(parts[1].step(3)) == {None: 0, 2: 1, 8: 0}[micro]


def test_each_process_and_step_has_its_own_dropout_and_an_equal_part_of_the_batch():
    drawn = set()
    for rank, step in [(0, 1), (1, 1), (0, 2), (1, 2)]:
        Ranks(rank, 2, "gloo").seed_step(7, step)
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 4
    with pytest.raises(InputError, match="batch_size=8 is divided among 3 processes: it must be a multiple"):
        Ranks(0, 3, "gloo").start(torch.nn.Linear(2, 2), TrainConfig(batch_size=8))
    with distributed.joined("cpu"):  # alone nothing is joined, and the generator is left as it is
        assert not torch.distributed.is_initialized()
        assert distributed.ranks() == Ranks()
        state = torch.get_rng_state()
        Ranks().seed_step(7, 1)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache) -> Path:
    """The folder in which two processes, started by torchrun itself, left what they saw."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    environment = os.environ | GNU | {"RECLIB_DATA": str(cache)}
    done = python(*launcher, ROOT / "tests/ranks.py", folder, env=environment, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(two):
    for case in ranks.CASES:
        alone, wanted = ranks.trained(case)
        first, second = (json.loads((two / f"{case}-{rank}.json").read_text()) for rank in (0, 1))
        halves = ("micro", "uneven-micro", "sinks")  # micro-batches of two divide the last three histories
        # Otherwise a process had nothing to do.
        assert (0 in second.pop("row_tokens")) == (case not in halves)
        first.pop("row_tokens")
        assert first == second
        for key in ("num_targets", "num_sequences", "skipped", "sinks", "scale"):
            assert first[key] == wanted[key]
        loose = case in ("bf16", "overflow")
        for key in ("loss", "grad_norm"):
            values, expected = ([-1.0 if x is None else x for x in seen[key]] for seen in (first, wanted))
            for part, near in ((slice(4), 2e-5), (slice(4, None), 1e-3)):  # first epoch, and what grew of it
                assert values[part] == pytest.approx(expected[part], rel=0.02 if loose else near, nan_ok=True)
        weights = [load_file(two / f"{case}-{rank}.safetensors") for rank in (0, 1)]
        for name, tensor in unique_tensors(alone.model).items():
            assert torch.equal(weights[0][name], weights[1][name]), name
            if not loose:  # Adam divides rounding noise by itself where the true gradient is zero
                torch.testing.assert_close(weights[0][name], tensor, rtol=1e-3, atol=1e-3)
        if case == "overflow":  # in one process, and skipped by both
            assert first["skipped"] == [step == 3 for step in range(1, ranks.STEPS + 1)]


@pytest.mark.slow
def test_validation_the_early_stop_and_each_users_rank_are_those_of_one_process(two, cache, monkeypatch):
    alone = ranks.validated(None).progress.history
    first, second = (json.loads((two / f"history-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first) == len(alone) < 30
    clocks = {"train_seconds": 0, "eval_seconds": 0}
    for row, expected in zip(first, alone, strict=True):
        assert row | clocks == pytest.approx(expected | clocks, rel=1e-3)
    trainer = ranks.validated(two / "validated")  # finished: loads the best weights
    part = splits.leave_one_out(ranks.dataset()).valid
    ranking = rank_targets(trainer, part, with_losses=True)
    for rank in (0, 1):
        tensors = load_file(two / f"ranking-{rank}.safetensors")
        assert np.array_equal(tensors["ranks"].numpy(), ranking.ranks)
        np.testing.assert_allclose(tensors["losses"].numpy(), ranking.losses, rtol=1e-5)
    # A finished run of two processes is read by one.
    monkeypatch.setenv("RECLIB_DATA", str(cache))
    monkeypatch.setattr(Trainer, "steps", lambda self: pytest.fail("trained"))
    trainer = fit_setup(ranks.setup(), "cpu", two / "whole")
    assert (trainer.progress.processes, trainer.progress.backend) == (2, "gloo")


def start(out: Path, cache: Path, processes: int = 2) -> subprocess.Popen:
    words = ["fit", "--dataset", "synthetic", "--size", "nano", "--gpu", "cpu", "--out", str(out)]
    values = [word for name, value in ranks.COMMAND.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "reclib", *words, "--nproc", str(processes), *values]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | GNU | {"RECLIB_DATA": str(cache)}, **pipes)


def workers(process: subprocess.Popen) -> dict[int, int]:
    """Return the pid of each rank that a launcher has started."""
    pids = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            pairs = (folder / "environ").read_text().split("\0")
            environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if parent == process.pid and "RANK" in environment:
                pids[int(environment["RANK"])] = int(folder.name)
    return pids


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> dict[int, int]:
    def reached() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return (latest := saving.latest(out)) is not None and int(latest.name[5:]) >= step

    until(reached, LIMIT)
    return workers(process)


def assert_same_bits(whole: Path, parts: Path, but: str = "none") -> None:
    """Compare the checkpoints of two runs but for the tensors whose names begin so."""
    for name in ("best", "step-76"):
        wanted, tensors = (saving.load_checkpoint(out / name)[0] for out in (whole, parts))
        assert wanted.keys() == tensors.keys()
        assert all(torch.equal(wanted[key], tensors[key]) for key in wanted if not key.startswith(but))


def wait_for_the_end(pids: Iterable[int]) -> None:
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_rank_ends_the_job_which_goes_on_to_the_same_bits(two, cache, tmp_path, monkeypatch):
    out = tmp_path / "run"
    process = start(out, cache)
    pids = wait_for_step(process, out, 5)
    os.kill(pids[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    lines = [line for line in re.split("[\r\n]", errors) if "step/s" not in line and line.strip()]
    assert len(lines) == 1
    pattern = "error: rank 1 of 2 was killed.*the same command goes on from the last checkpoint"
    assert re.fullmatch(pattern, lines[0])
    wait_for_the_end(pids.values())
    reached = int(saving.latest(out).name[5:])
    assert reached < 76
    monkeypatch.setenv("RECLIB_DATA", str(cache))
    with pytest.raises(InputError, match="begun with nproc=2, and here nproc is 1: go on with nproc=2"):
        fit_setup(ranks.setup(), "cpu", out)

    process = start(out, cache)
    pids = wait_for_step(process, out, reached + 10)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGINT
    assert errors.replace("\r", "\n").splitlines()[-1].startswith("SIGINT: all 2 processes ended")
    wait_for_the_end(pids.values())
    assert not is_finished(out)

    process = start(out, cache)
    printed, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    assert json.loads(printed)["step"] == 76
    assert_same_bits(two / "whole", out, but="random.")


@pytest.mark.slow
def test_a_process_alone_killed_by_sigkill_ends_with_the_same_bits(cache, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for step in (7, 30, 55):
        process = start(parts, cache, processes=1)
        wait_for_step(process, parts, step)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    printed = []
    for out in (parts, whole):
        process = start(out, cache, processes=1)
        printed.append(process.communicate(timeout=LIMIT)[0])
        assert process.returncode == 0
    assert json.loads(printed[0]) == json.loads(printed[1])
    assert_same_bits(whole, parts)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_processes_end_with_a_launcher_that_is_killed(cache, tmp_path):
    process = start(tmp_path / "run", cache)
    pids = wait_for_step(process, tmp_path / "run", 2)
    process.kill()
    process.communicate()
    wait_for_the_end(pids.values())


@pytest.mark.slow
def test_a_notebook_lets_processes_beside_it_train_and_reads_the_result_back(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("RECLIB_ROOT", str(tmp_path))
    monkeypatch.setenv("RECLIB_DATA", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "params").symlink_to(ROOT / "params")
    changes = {"dataset": "synthetic", "size": "nano", "epochs": 1, "nproc": 2, "gpu": "cpu", "dropout": 0.0}
    changes |= {"precision": "fp32", "compile_mode": "off", "max_len": 50}
    p = smoke("02_baseline", **changes)
    dataset = prepare(DataConfig(dataset="synthetic", min_user=p.min_user, min_item=p.min_item))
    split = splits.random_users(dataset)
    given = ("02_baseline", p, dataset, split, hardware.resolve("cpu"), "bert4rec", 0)
    together = baseline.train_seed(*given)
    assert together.together() == {"processes": 2, "backend": "gloo"}
    assert together.trainer.identity()["data"] == data_identity(dataset, split)
    monkeypatch.setattr(distributed, "apart", lambda *_: pytest.fail("started again"))
    assert baseline.train_seed(*given).best() == together.best()
    alone = baseline.train_seed(given[0], smoke("02_baseline", **changes | {"nproc": 1}), *given[2:])
    assert alone.together() == {}
    assert together.curve()["train_loss"] == pytest.approx(alone.curve()["train_loss"], rel=1e-4)
