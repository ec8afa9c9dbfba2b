"""Grids: what an experiment file may say, each run once, stop and go on, two processes on one grid."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import PLACES, ROOT

from reclib import records, system
from reclib.config import InputError, ModelConfig, TrainConfig
from reclib.cost import work as reclib_work
from reclib.data.prepare import prepare
from reclib.experiments import grids
from reclib.hardware import Card, Device, resolve
from reclib.train import saving
from reclib.train.fit import Options

FILE = {
    "about": "a test",
    "notebook": "02_baseline",
    "data": {
        "dataset": "synthetic",
        "synthetic_users": 40,
        "synthetic_items": 30,
        "min_user": 1,
        "min_item": 1,
    },
    "size": "nano",
    "seeds": [0, 1],
    "model": {"max_len": 20},
    "train": {"epochs": 2, "batch_size": 8, "eval_every": 1, "checkpoint_seconds": 0},
    "arms": {
        "base": {"final": True},
        "twin": {"train": {"objective": "next_item"}, "seeds": [0]},
    },
}


def write(root: Path, **changes: object) -> None:
    file = root / "reclib_root" / "params" / "grids" / "trial.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))


def work() -> grids.Work:
    found = grids.read_grid("trial")
    return grids.Work(found, prepare(found.data), resolve("cpu"))


def names(rows: list[dict]) -> list[tuple[str, int]]:
    return sorted((row["own_params"]["model"], row["seed"]) for row in rows)


def test_every_run_is_trained_once_and_recorded_with_what_it_was(root):
    write(root)
    first = work()
    assert grids.run_grid(first, first.runs(), Options()) == 3
    assert grids.run_grid(work(), work().runs(), Options()) == 0
    rows = work().rows("learning_curve")
    assert names(rows) == [("base", 0), ("base", 1), ("twin", 0)]
    twin = next(row for row in rows if row["own_params"]["model"] == "twin")
    assert twin["configuration"]["model"]["causal"]
    assert twin["configuration"]["train"]["objective"] == "next_item"
    assert twin["metrics"]["valid_ndcg@10"] == max(twin["series"]["valid_ndcg@10"])
    ranks = np.load(first.file.with_suffix("") / f"{twin['params_hash']}.npz")["valid"]
    assert len(ranks) == twin["data"]["users"]
    assert float((ranks <= 10).mean()) == pytest.approx(twin["metrics"]["valid_hr@10"])


def test_the_name_of_an_arm_does_not_make_it_another_run(root):
    write(root)
    assert grids.run_grid(work(), work().runs(), Options()) == 3
    write(root, arms={"renamed": {}, "longer": {"train": {"epochs": 3}}})
    assert grids.run_grid(work(), work().runs(), Options()) == 2  # both seeds of the longer arm


def test_a_stopped_grid_goes_on_within_the_run(root):
    write(root, arms={"base": {}}, seeds=[0])

    class Stop(Exception):
        pass

    def stop_at_seven(stats):
        if stats.step == 7:
            raise Stop

    with pytest.raises(Stop):
        grids.run_grid(work(), work().runs(), Options(on_step=stop_at_seven))
    assert work().rows("learning_curve") == []
    assert "under way" in grids.grid_status(work(), work().runs())[0]
    steps: list[int] = []
    assert grids.run_grid(work(), work().runs(), Options(on_step=lambda stats: steps.append(stats.step))) == 1
    assert steps[0] == 7  # the seventh was not in a checkpoint yet
    assert "trained: validation HR@10" in grids.grid_status(work(), work().runs())[0]


def _run_all() -> None:
    here = work()
    grids.run_grid(here, here.runs(), Options())


@pytest.mark.slow
def test_two_processes_share_a_grid(root):
    write(root)
    prepare(grids.read_grid("trial").data)
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_run_all) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    rows = work().rows("learning_curve")
    assert names(rows) == [("base", 0), ("base", 1), ("twin", 0)]


@pytest.mark.slow
def test_runs_side_by_side_have_the_bits_of_runs_one_after_the_other(tmp_path, monkeypatch):
    threads, found = torch.get_num_threads(), []
    for parallel in (2, 1):
        for name in PLACES:
            monkeypatch.setenv(name, str(tmp_path / str(parallel) / name.lower()))
        write(tmp_path / str(parallel))
        assert grids.grid_main(["run", "trial", "--gpu", "cpu1", "--parallel", str(parallel)]) == 0
        here = grids.Work(grids.read_grid("trial"), prepare(grids.read_grid("trial").data), resolve("cpu1"))
        rows = sorted(here.rows("learning_curve"), key=lambda row: row["params_hash"])
        assert names(rows) == [("base", 0), ("base", 1), ("twin", 0)]
        assert {row["configuration"].get("parallel") for row in rows} == ({2} if parallel == 2 else {None})
        weights = [saving.load_checkpoint(here.folder(*pair) / "best")[0] for pair in here.runs()]
        found.append(([(row["params_hash"], row["metrics"]) for row in rows], weights))
    torch.set_num_threads(threads)
    (beside, others), (alone, wanted) = found
    assert beside == alone
    for one, other in zip(others, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_how_many_runs_fit_side_by_side_is_told_before_any_starts(root):
    write(root)
    here = work()
    card = Card(type="cuda", name="a card of 2 GiB", label="other", capability=(8, 0), memory_bytes=2 * 2**30)
    here.device = Device(torch.device("cuda"), card, "other")
    assert grids.demand_parallel(here, here.runs(), 2) == 2
    assert grids.demand_parallel(here, here.runs()[:1], 9) == 1
    with pytest.raises(InputError, match=r"--parallel 3: 2 of these runs fit side by side into 2\.0 GiB"):
        grids.demand_parallel(here, here.runs(), 3)
    with pytest.raises(InputError, match="--parallel is 0: expected at least 1"):
        grids.demand_parallel(here, here.runs(), 0)
    assert reclib_work.side_by_side([5, 1], 0, "cpu") == 0
    assert reclib_work.side_by_side([50, 40, 5], 100, "cpu") == 3


def children(process: subprocess.Popen) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found += [int(folder.name)] if parent == process.pid else []
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_processes_are_told_and_leave_nobody_behind(root):
    write(root, train=FILE["train"] | {"epochs": 100_000, "patience": 0, "eval_every": 100})
    command = [sys.executable, "-m", "reclib", "grid", "run", "trial", "--gpu", "cpu1", "--parallel", "2"]

    def started(begun: int) -> tuple[subprocess.Popen, list[int]]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(begun):  # a line as each takes a run
            assert "trial: " in process.stdout.readline()
        return process, children(process)

    process, pids = started(2)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    out, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert told.count("was killed by SIGKILL") == len(pids) == 2
    assert "base                     seed 1" in out

    process, pids = started(2)
    process.kill()
    assert len(pids) == 2
    process.communicate(timeout=60)  # waits until both are gone too: they hold its pipes


def test_what_a_file_may_not_say_is_told_before_anything_is_trained(root):
    for changes, said in [
        ({"arms": {"base": {"split": "random"}}}, "arm 'base': unknown split 'random'"),
        ({"extra": 1}, "trial.yaml: unknown key 'extra'"),
        (
            {"arms": {"base": {"lr": 1}}},
            "arm 'base': unknown key 'lr'; allowed: final, model, seeds, size, split, train",
        ),
        ({"arms": {"base": {"train": {"epoch": 1}}}}, "arm 'base': unknown parameter 'epoch'"),
        ({"model": {"hidden_dim": 7, "num_heads": 2}}, "hidden_dim=7 must be divisible by num_heads=2"),
    ]:
        write(root, **changes)
        with pytest.raises(InputError, match=r"trial\.yaml") as caught:
            grids.read_grid("trial")
        assert said in str(caught.value)


def test_an_arm_whose_name_has_a_comma_is_chosen_alone_or_quoted():
    names = ["base", "gBCE, 128 negatives", "two"]
    assert grids.named_arms("gBCE, 128 negatives", names) == ["gBCE, 128 negatives"]
    assert grids.named_arms('base, "gBCE, 128 negatives",two', names) == names


def test_unknown_grids_arms_and_seeds_are_named(root, capsys):
    write(root)
    assert grids.grid_main(["run", "tiral"]) == 2
    assert "unknown grid 'tiral'; known: trial" in capsys.readouterr().err
    assert grids.grid_main(["status", "trial", "--arms", "bse"]) == 2
    assert "unknown arm 'bse' of grid 'trial'; known: base, twin" in capsys.readouterr().err
    assert grids.grid_main(["status", "trial", "--seeds", "x"]) == 2
    assert "--seeds is 'x'" in capsys.readouterr().err


def test_an_unfinished_last_line_is_no_record(root):
    write(root)
    file = system.executed() / "cpu" / "grids" / "trial.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"name": "x"}) + "\n" + '{"name": "y')
    assert grids.read_rows(file) == [{"name": "x"}]


def test_the_files_of_the_project_can_be_read():
    names = [file.stem for file in (system.params() / "grids").glob("*.yaml")]
    assert names
    for name in names:
        found = grids.read_grid(name)
        assert name.startswith(("ablations", "trials")) or any(arm.final for arm in found.arms)


def test_committed_runs_are_known_by_the_hash_of_their_configuration():
    """Otherwise they would be trained again: a new field must leave the hash of earlier runs as it was."""
    checked = 0
    for file in sorted((ROOT / "executed" / "cpu" / "grids").glob("*.jsonl")):
        for row in grids.read_rows(file):
            said = row.get("configuration", {})
            if row["name"] == "learning_curve" and said.get("split") == "leave_one_out":
                model, train = ModelConfig(**said["model"]), TrainConfig(**said["train"])
                identity = {"model": model, "train": train, "data": row["data"]["fingerprint"]}
                assert records.params_hash(identity) == row["params_hash"], (file.name, row["own_params"])
                checked += 1
    assert checked > 20
