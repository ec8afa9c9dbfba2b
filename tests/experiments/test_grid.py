"""Grids: what an experiment file may say, each run once, stop and go on, two processes on one grid."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
from conftest import ROOT
from small_grid import FILE, work, write
from small_models import Stop, stop_at

from reclib import records, system
from reclib.config import InputError, ModelConfig, TrainConfig
from reclib.data.prepare import prepare
from reclib.experiments import grids
from reclib.train.fit import Options


def run_all(**options: object) -> int:
    here = work()
    return grids.run_grid(here, here.runs(), Options(**options))


def names(rows: list[dict]) -> list[tuple[str, int]]:
    return sorted((row["own_params"]["model"], row["seed"]) for row in rows)


def test_every_run_is_trained_once_and_recorded_with_what_it_was(root):
    write(root)
    assert run_all() == 3
    assert run_all() == 0
    rows = work().rows("learning_curve")
    assert names(rows) == [("base", 0), ("base", 1), ("twin", 0)]
    twin = next(row for row in rows if row["own_params"]["model"] == "twin")
    assert twin["configuration"]["model"]["causal"]
    assert twin["configuration"]["train"]["objective"] == "next_item"
    assert twin["metrics"]["valid_ndcg@10"] == max(twin["series"]["valid_ndcg@10"])
    assert twin["metrics"]["lowest_valid_loss"] == min(twin["series"]["valid_loss"])
    ranks = np.load(work().file.with_suffix("") / f"{twin['params_hash']}.npz")["valid"]
    assert len(ranks) == twin["data"]["users"]
    assert float((ranks <= 10).mean()) == pytest.approx(twin["metrics"]["valid_hr@10"])
    write(root, arms={"renamed": {}, "longer": {"train": {"epochs": 3}}})
    assert run_all() == 2, "both seeds of the longer arm: a name makes no other run"


def test_a_stopped_grid_goes_on_within_the_run(root):
    write(root, arms={"base": {"train": {"checkpoint_seconds": 0}}}, seeds=[0])
    with pytest.raises(Stop):
        run_all(on_step=stop_at(7).on_step)
    assert work().rows("learning_curve") == []
    assert "under way" in grids.grid_status(work(), work().runs())[0]
    steps: list[int] = []
    assert run_all(on_step=lambda stats: steps.append(stats.step)) == 1
    assert steps[0] == 7  # the seventh was not in a checkpoint yet
    assert "trained: validation HR@10" in grids.grid_status(work(), work().runs())[0]


@pytest.mark.slow
def test_two_processes_share_a_grid(root):
    write(root)
    prepare(grids.read_grid("trial").data)
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=run_all) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert names(work().rows("learning_curve")) == [("base", 0), ("base", 1), ("twin", 0)]


def test_what_a_file_may_not_say_is_told_before_anything_is_trained(root):
    for changes, message in [
        ({"arms": {"base": {"split": "random"}}}, "arm 'base': parameter 'split' is 'random'"),
        ({"extra": 1}, "unknown parameter 'extra'"),
        ({"arms": ["base"]}, "not of the form of such a file"),
        ({"arms": {"base": {"train": {"epoch": 1}}}}, "arm 'base': unknown parameter 'epoch'"),
        ({"arms": {"base": {"data": {"min_usr": 1}}}}, "arm 'base': unknown parameter 'min_usr'"),
        ({"predicts": {"of": "base"}}, "parameter 'from' is missing"),
        ({"predicts": {"of": "bse", "from": ["twin"]}}, "names 'bse', which is no arm"),
        ({"predicts": {"of": "base", "from": ["base"]}}, "predicts 'base' from itself"),
    ]:
        write(root, **changes)
        with pytest.raises(InputError, match=r"trial\.yaml") as caught:
            grids.read_grid("trial")
        assert message in str(caught.value)


def test_the_command_names_unknown_grids_arms_and_seeds(root, capsys):
    write(root, arms=FILE["arms"] | {"gBCE, 128 negatives": {}})
    for arguments, message in [
        (["run", "tiral"], "unknown name 'tiral' in params/grids; known: trial"),
        (["status", "trial", "--arms", "bse"], "unknown arm 'bse' of grid 'trial'; known: base, twin"),
        (["status", "trial", "--seeds", "5"], "--seeds has 5; seeds of these arms: 0, 1"),
    ]:
        assert grids.grid_main(arguments) == 2
        assert message in capsys.readouterr().err
    command = ["status", "trial", "--arms", "gBCE, 128 negatives", "base", "--seeds", "1"]
    assert grids.grid_main(command) == 0
    assert capsys.readouterr().out.count("seed 1  not begun") == 2


def test_the_files_of_the_project_can_be_read():
    for file in (system.params() / "grids").glob("*.yaml"):
        trials = file.stem.startswith(("ablations", "trials")) or file.stem.endswith("-rates")
        assert trials or any(arm.final for arm in grids.read_grid(file.stem).arms)


def test_committed_runs_are_known_by_the_hash_of_their_configuration():
    """Otherwise they would be trained again: a new field must leave the hash of earlier runs as it was."""
    checked = 0
    for file in sorted((ROOT / "executed" / "cpu" / "grids").glob("*.jsonl")):
        for row in grids.read_rows(file):
            made = row.get("configuration", {})
            if row["name"] == "learning_curve" and made.get("split") == "leave_one_out":
                model, train = ModelConfig(**made["model"]), TrainConfig(**made["train"])
                identity = {"model": model, "train": train, "data": row["data"]["fingerprint"]}
                assert records.params_hash(identity) == row["params_hash"], (file.name, row["own_params"])
                checked += 1
    assert checked > 20
