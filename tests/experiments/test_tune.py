"""Tuning: a budget that is kept when a process is killed, and settings that are kept to their data."""

import subprocess
import sys

import pytest
from conftest import refused, until
from optuna.trial import TrialState
from small_grid import FILE as GRID
from small_grid import light_scoring, write_params

from reclib import records as reclib_records
from reclib import system
from reclib.data.prepare import prepare
from reclib.experiments import scaling
from reclib.hardware import resolve
from reclib.train import saving
from reclib.train.fit import Options

FILE = {
    "about": "a test",
    "data": GRID["data"],
    "size": "nano",
    "seed": 0,
    "trials": 7,
    "minutes": 10,
    "seeds": [0, 1],
    "model": {"max_len": 20},
    "train": {"epochs": 3, "batch_size": 20, "eval_every": 1},
    "space": {
        "learning_rate": {"low": 1e-5, "high": 0.1, "log": True},
        "model.dropout": {"low": 0.0, "high": 0.5},
        "last_item_share": {"choices": [0.0, 0.5]},
    },
}


def write(**changes: object) -> None:
    write_params("tuning", FILE | changes)


def read_study() -> scaling.Study:
    plan = scaling.read_tuning("trial")
    return scaling.Study(plan, prepare(plan.data), resolve("cpu"))


def run(study: scaling.Study) -> int:
    return scaling.run(study, Options(), "none")


def records(study: scaling.Study) -> list[dict]:
    return reclib_records.latest(study.work().rows("trial"))


def test_a_study_runs_to_its_budget_once_and_its_choice_is_picked_up(root, capsys, monkeypatch):
    write()
    assert scaling.tune_main(["run", "trial", "--tracker", "none"]) == 0
    assert "written: nano-synthetic.yaml" in capsys.readouterr().out
    study = read_study()
    assert len(study.trials(*scaling.FINISHED)) == len(records(study)) == 7
    assert run(study) == 0
    best = study.best()
    chosen = scaling.read_tuned("nano", study.dataset.name, study.dataset.fingerprint)
    assert chosen is not None
    assert chosen.train["learning_rate"] == best.params["learning_rate"]
    assert chosen.model["dropout"] == best.params["model.dropout"]
    assert chosen.chosen_by["trials"] == 7
    curve = next(r for r in records(study) if r["own_params"]["trial"] == best.number)
    assert max(curve["series"]["valid_ndcg@10"]) == best.value
    assert (study.trial_folder(best.params) / "best").is_dir()

    monkeypatch.setenv("RECLIB_RUNS", str(root / "again"))  # the same seed draws the same trials
    again = read_study()
    run(again)
    assert [(t.params, t.value) for t in again.trials()] == [(t.params, t.value) for t in study.trials()]


def test_a_trial_behind_the_median_is_pruned_and_counts(root):
    write(trials=5, space={"learning_rate": {"low": 1e-9, "high": 0.1, "log": True}})
    study = read_study()
    for rate in (0.02, 0.021, 0.022, 0.023, 1e-9):
        study.optuna_study.enqueue_trial({"learning_rate": rate})
    run(study)
    assert len(study.trials(TrialState.COMPLETE)) == 4
    pruned = next(row for row in records(study) if row["own_params"]["state"] == "pruned")
    assert pruned["own_params"]["learning_rate"] == 1e-9
    assert len(pruned["series"]["epoch"]) < 3


def checkpoint_of(study: scaling.Study) -> int:
    newest = [saving.latest(folder) for folder in study.folder.glob("*/")]
    return max((int(path.name.removeprefix("step-")) for path in newest if path), default=0)


@pytest.mark.slow
def test_sigkill_loses_and_doubles_no_trial(root, monkeypatch):
    """The trial of the killed process goes on from its checkpoint."""
    long = FILE["train"] | {"epochs": 30, "eval_every": 2, "checkpoint_seconds": 0}
    write(trials=3, train=long)
    prepare(scaling.read_tuning("trial").data)
    command = [sys.executable, "-m", "reclib", "tune", "run", "trial", "--tracker", "none"]
    process = subprocess.Popen(command)
    killed = read_study()
    until(lambda: checkpoint_of(killed) >= 2, 60)
    process.kill()
    process.wait()
    (left,) = killed.trials(TrialState.RUNNING)
    write(trials=3, train=long, about="the same study")
    steps: list[int] = []
    monkeypatch.setattr(scaling.Curves, "step", lambda _, stats: steps.append(stats.step))
    again = read_study()
    assert again.key == killed.key
    run(again)
    assert steps[0] > 1, "it went on from the checkpoint"
    assert again.trials()[0].params == left.params
    assert len(again.trials()) == len(again.trials(*scaling.FINISHED)) == len(records(again)) == 3


@pytest.mark.slow
def test_one_process_at_a_time_runs_a_study_and_default_is_compared_with_tuned(root, monkeypatch):
    light_scoring(monkeypatch)
    write(trials=2)
    study = read_study()
    assert "nothing is tuned yet" in refused(None, scaling.compare, study, Options())
    with system.locked(study.folder / "study.lock"):
        assert "another process is running" in refused(None, run, read_study())
    assert run(study) == 2
    study.choose()
    results = {r.name: r for r in scaling.compare(read_study(), Options()) if r.params["model"] == "tuned"}
    assert results["validation_difference"].metrics["seeds"] == 2
    assert results["comparison"].params["against"] == "default"


def test_a_trial_that_diverges_counts_and_is_not_tried_again(root, capsys):
    write(trials=1, space={"learning_rate": {"choices": [1e30]}}, train=FILE["train"] | {"clip_norm": None})
    study = read_study()
    assert run(study) == 1
    assert run(study) == 0
    assert "diverged" in capsys.readouterr().out
    assert "no trial that ran to its end" in refused(None, study.choose)


def test_what_a_tuning_file_may_not_say(root):
    for changes, message in [
        ({"trails": 3}, "unknown parameter 'trails'"),
        ({"space": {"learning_rate": {"low": 1}}}, "space of 'learning_rate': expected low and high"),
        ({"space": {"learnin_rate": {"low": 1.0, "high": 2.0}}}, "unknown parameter 'learnin_rate'"),
    ]:
        write(**changes)
        error = refused(None, scaling.read_tuning, "trial")
        assert error.startswith("trial.yaml: ")
        assert message in error


def test_the_files_of_the_project_can_be_read():
    names = [file.stem for file in (system.params() / "tuning").glob("*.yaml")]
    assert names
    for name in names:
        plan = scaling.read_tuning(name)
        assert plan.trials > 0
        assert plan.configs(10, plan.default()) == plan.configs(10, {}), "the first trial is the recipe"
