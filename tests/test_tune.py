"""Tuning: a budget that is kept whoever dies, two processes on one study, settings kept to their data."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_grid import FILE as GRID

from reclib import records as reclib_records
from reclib import system
from reclib.config import InputError
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
    "train": {"epochs": 4, "batch_size": 8, "eval_every": 1, "checkpoint_seconds": 0},
    "space": {
        "learning_rate": {"low": 1e-5, "high": 0.1, "log": True},
        "model.dropout": {"low": 0.0, "high": 0.5},
        "last_item_share": {"choices": [0.0, 0.5]},
    },
}


def write(**changes: object) -> None:
    file = Path(os.environ["RECLIB_ROOT"]) / "params" / "tuning" / "trial.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))


def study() -> scaling.Study:
    plan = scaling.read_tuning("trial")
    return scaling.Study(plan, prepare(plan.data), resolve("cpu"))


def states(found: scaling.Study) -> Counter[str]:
    return Counter(trial.state.name for trial in found.trials())


def records(found: scaling.Study) -> list[dict]:
    return reclib_records.latest(found.work().rows("trial"))


def test_a_study_runs_to_its_budget_once_and_its_choice_is_picked_up(root, capsys):
    write()
    assert scaling.tune_main(["run", "trial", "--tracker", "none"]) == 0
    assert "written: nano-synthetic.yaml" in capsys.readouterr().out
    found = study()
    assert len(found.finished()) == 7
    assert len(records(found)) == 7
    assert scaling.run(found, Options(), "none") == 0
    best = found.best()
    chosen = scaling.read_tuned("nano", found.dataset.name, found.dataset.fingerprint)
    assert chosen is not None
    assert chosen.train["learning_rate"] == best.params["learning_rate"]
    assert chosen.model["dropout"] == best.params["model.dropout"]
    assert chosen.chosen_by["trials"] == 7
    curve = next(r for r in records(found) if r["own_params"]["trial"] == best.number)
    assert max(curve["series"]["valid_ndcg@10"]) == best.value
    assert (found.trial_folder(best.params) / "best").is_dir()


def test_a_trial_behind_the_median_is_pruned_and_counts(root):
    write(trials=5, space={"learning_rate": {"low": 1e-9, "high": 0.1, "log": True}})
    found = study()
    for rate in (0.02, 0.021, 0.022, 0.023, 1e-9):
        found.open(0).enqueue_trial({"learning_rate": rate})
    scaling.run(found, Options(), "none")
    assert states(found) == {"COMPLETE": 4, "PRUNED": 1}
    pruned = next(row for row in records(found) if row["own_params"]["state"] == "pruned")
    assert pruned["own_params"]["learning_rate"] == 1e-9
    assert len(pruned["series"]["epoch"]) < 4


def test_the_same_seed_draws_the_same_trials(root, monkeypatch):
    write(trials=6)
    drawn = []
    for place in ("a", "b"):
        monkeypatch.setenv("RECLIB_RUNS", str(root / place))
        found = study()
        scaling.run(found, Options(), "none")
        drawn.append([(t.params, t.value) for t in found.trials()])
    assert drawn[0] == drawn[1]


def checkpoint_of(found: scaling.Study) -> int:
    newest = [saving.latest(folder) for folder in found.folder.glob("*/")]
    return max((int(path.name.removeprefix("step-")) for path in newest if path), default=0)


@pytest.mark.slow
def test_sigkill_loses_and_doubles_no_trial(root):
    """The killed trial is told as failed, run again with its settings, and goes on from its checkpoint."""
    write(trials=3, train=FILE["train"] | {"epochs": 30, "eval_every": 2})
    prepare(scaling.read_tuning("trial").data)
    command = [sys.executable, "-m", "reclib", "tune", "run", "trial", "--tracker", "none"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    found = study()
    deadline = time.monotonic() + 60
    while checkpoint_of(found) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert states(found) == {"RUNNING": 1}
    (dead,) = found.trials()
    write(trials=3, train=FILE["train"] | {"epochs": 30, "eval_every": 2}, about="the same study")
    steps: list[int] = []
    again = study()
    assert again.key == found.key
    assert again.one(Options(on_step=lambda stats: steps.append(stats.step)))
    assert steps[0] > 1, "it went on from the checkpoint"
    while again.one(Options()):
        pass
    assert states(again)["FAIL"] == 1
    assert len(again.finished()) == 3
    assert sum(states(again).values()) == 4, "the killed one, and three that count"
    repeated = [t for t in again.trials() if t.user_attrs.get("again") == dead.number]
    assert [t.params for t in repeated] == [dead.params]
    assert len(records(again)) == 3


def _run_study() -> None:
    scaling.run(study(), Options(), "none")


@pytest.mark.slow
def test_two_processes_share_a_study(root):
    write()
    prepare(scaling.read_tuning("trial").data)
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_run_study) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(200)
    assert [process.exitcode for process in both] == [0, 0]
    found = study()
    assert len(found.finished()) == 7
    assert sum(states(found).values()) == 7
    assert len({str(t.params) for t in found.trials()}) == 7
    assert len(records(found)) == 7


def test_a_trial_that_somebody_holds_is_left_to_them(root):
    write(trials=2)
    found = study()
    _, trial = found.claim()
    with system.locked(found.folder / f"trial-{trial.number}" / "lock"):
        assert found.one(Options())
        assert states(found)["RUNNING"] == 1
        assert not found.one(Options()), "one is done and one is somebody's: that is the budget"
    assert found.one(Options())
    assert len(found.finished()) == 2


def test_the_first_trial_is_the_recipe_as_it_stands(root):
    write(
        space={"learning_rate": {"low": 1e-5, "high": 0.1, "log": True}, "model.dropout": {"choices": [0.1]}}
    )
    _, trial = study().claim()
    assert study().draw(trial) == {"learning_rate": 1e-3, "model.dropout": 0.1}
    write(space={"learning_rate": {"low": 0.01, "high": 0.1}})
    assert scaling.default(scaling.read_tuning("trial")) == {}, "outside the space"


def test_a_trial_that_diverges_counts_and_is_not_tried_again(root):
    write(trials=1, space={"learning_rate": {"choices": [1e30]}}, train=FILE["train"] | {"clip_norm": None})
    found = study()
    assert found.one(Options())
    assert not found.one(Options())
    assert "diverged" in found.finished()[0].user_attrs
    with pytest.raises(InputError, match="no trial that ran to its end"):
        found.choose()


def test_settings_of_another_dataset_are_refused(root):
    write(trials=1)
    found = study()
    scaling.run(found, Options(), "none")
    file = found.choose()
    with pytest.raises(InputError, match=r"nano-synthetic\.yaml: tuned on synthetic .* tune anew"):
        scaling.read_tuned("nano", found.dataset.name, "0" * 64)
    assert scaling.read_tuned("tiny", found.dataset.name, found.dataset.fingerprint) is None
    file.write_text("size: nano\n")
    with pytest.raises(InputError, match="key 'dataset' is missing"):
        scaling.read_tuned("nano", found.dataset.name, found.dataset.fingerprint)


def test_default_and_tuned_are_compared_on_the_same_users(root):
    write(trials=2)
    found = study()
    with pytest.raises(InputError, match="nothing is tuned yet"):
        scaling.compare(found, Options())
    scaling.run(found, Options(), "none")
    found.choose()
    results = {one.name: one for one in scaling.compare(study(), Options()) if one.params["model"] == "tuned"}
    assert results["validation_difference"].metrics["seeds"] == 2
    assert results["comparison"].params["against"] == "default"
    assert results["comparison"].metrics["difference_low"] <= results["comparison"].metrics["difference"]


def test_what_a_tuning_file_may_not_say(root):
    for changes, said in [
        ({"trails": 3}, "unknown key 'trails'"),
        ({"space": {"learning_rate": {"low": 1}}}, "space of 'learning_rate': expected low and high"),
        ({"space": {"learnin_rate": {"low": 1.0, "high": 2.0}}}, "unknown parameter 'learnin_rate'"),
        ({"model": {"hidden_dim": 7, "num_heads": 2}}, "hidden_dim=7 must be divisible by num_heads=2"),
    ]:
        write(**changes)
        with pytest.raises(InputError, match=r"trial\.yaml") as caught:
            scaling.read_tuning("trial")
        assert said in str(caught.value)


def test_the_files_of_the_project_can_be_read():
    names = [file.stem for file in (ROOT / "params" / "tuning").glob("*.yaml")]
    assert names
    for name in names:
        plan = scaling.read_tuning(name)
        assert plan.trials > 0
        recipe = scaling.tuning_configs(plan, 10, {})
        assert scaling.tuning_configs(plan, 10, scaling.default(plan)) == recipe, (
            "the first trial is the recipe"
        )
