"""Curves of a run and the trackers that show them; no tracker names the machine or the user."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import python, refused
from small_models import Stop

from reclib import hardware
from reclib.config import ModelConfig, TrainConfig
from reclib.data.prepare import synthetic_dataset
from reclib.train.fit import Curves, Options, Tracker, fit, start_tracker, used
from reclib.train.trainer import CHECK_EVERY

CPU = hardware.resolve("cpu")
EXPECTED = {  # what people look for in a tracker
    *("train/loss", "train/learning_rate", "train/gradient_norm", "train/tokens_per_second"),
    *("train/sequences_per_second", "run/peak_memory_bytes", "run/epoch", "run/train_seconds"),
    *("valid/loss", "valid/hr@10", "valid/ndcg@10", "valid/mrr"),
}


class Kept(Tracker):
    """A tracker that can be looked at."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, values, step):
        self.rows.append((step, dict(values)))


def test_curves_say_what_the_loop_did_and_rates_what_this_process_saw(tmp_path):
    """A run of 4 steps an epoch, killed after its first evaluation and carried on."""
    dataset = synthetic_dataset(num_users=60, num_items=40, mean_len=9.0, seed=0)
    model = ModelConfig(num_items=dataset.num_items, hidden_dim=8, num_layers=1, num_heads=1, max_len=16)
    config = TrainConfig(epochs=16, batch_size=16, eval_every=7)
    first, second, stats = Kept(), Kept(), {}
    for kept, last in ((first, 33), (second, 10_000)):
        curves = Curves(kept, CPU)

        def on_step(step, curves=curves, last=last):
            curves.step(step)
            stats[step.step] = step
            if step.step == last:
                raise Stop

        with contextlib.suppress(Stop):
            options = Options(on_step=on_step, on_evaluation=curves.evaluation)
            trainer = fit(model, dataset, config, CPU, tmp_path, options)
    assert {name for _, values in first.rows for name in values} >= EXPECTED
    assert [step for step, _ in first.rows + second.rows] == [20, 28, 40, 56, 60, 64]
    window, of = first.rows[0][1], [stats[i] for i in range(1, CHECK_EVERY + 1)]
    mean = sum(s.loss * s.num_targets for s in of) / sum(s.num_targets for s in of)
    assert window["train/loss"] == pytest.approx(mean)
    assert window["train/gradient_norm"] == of[-1].grad_norm
    assert window["train/learning_rate"] == of[-1].learning_rate
    assert "train/tokens_per_second" not in window  # what came before its first step was not waited for
    row, own = first.rows[1][1], trainer.progress.history[0]
    assert row["valid/hr@10"] == own["hr@10"]
    assert row["train/epoch_loss"] == own["train_loss"]
    assert row["train/tokens_per_second"] == pytest.approx(own["tokens"] / own["train_seconds"])
    assert row["train/sequences_per_second"] == pytest.approx(60 * 7 / own["train_seconds"])
    rates = {step: "train/tokens_per_second" in values for step, values in second.rows}
    assert rates == {40: False, 56: False, 60: False, 64: True}


_SCRIPT = """
import socket
import sys
socket.gethostname = lambda: "somebodys-laptop"
from reclib.train.fit import start_tracker
from reclib.config import InputError
for tracker in sys.argv[1:]:
    try:
        for seed in (0, 1):
            with start_tracker(tracker, "02_baseline", f"seed-{seed}", {"epochs": 3}) as run:
                run.log({"train/loss": 1.5}, step=1)
                run.log({"train/loss": 1.25, "valid/hr@10": 0.5}, step=2)
    except InputError as error:
        print(error)
    print(tracker, "wandb" in sys.modules, "tensorboard" in sys.modules)
"""


def script(tmp_path: Path, *trackers: str) -> str:
    """Return what a process without a login and in no known home prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"USER": "somebody", "LOGNAME": "somebody", "HOME": str(tmp_path)}
    environment["RECLIB_RUNS"] = str(tmp_path / "runs")
    done = python("-c", _SCRIPT, *trackers, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a folder of events: (step, value) by tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written_and_none_imports_no_tracker(tmp_path):
    assert script(tmp_path, "none", "tensorboard") == "none False False\ntensorboard False True\n"
    runs = sorted((tmp_path / "runs/tensorboard/02_baseline").iterdir())
    assert [run.name for run in runs] == ["seed-0", "seed-1"]
    assert scalars(runs[0]) == {"train/loss": [(1, 1.5), (2, 1.25)], "valid/hr@10": [(2, 0.5)]}
    for file in (tmp_path / "runs").rglob("events*"):
        assert "somebody" not in file.name
        assert b"somebody" not in file.read_bytes()
        assert b'"epochs": 3' in file.read_bytes()


@pytest.mark.slow
def test_wandb_writes_files_offline_without_a_word_and_asks_for_a_login_online(tmp_path):
    assert script(tmp_path, "wandb-offline", "wandb-online").splitlines() == [
        "wandb-offline True False",
        "tracker='wandb-online' needs a login: run `wandb login` once, or use tracker='wandb-offline'",
        "wandb-online True False",
    ]
    folders = list((tmp_path / "runs/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    content = b"".join(file.read_bytes() for file in folders[0].rglob("*.wandb"))
    assert b"02_baseline" in content
    assert b"somebody" not in content
    assert b"seed-" in content
    assert not (tmp_path / "wandb").exists()


def test_a_run_that_goes_on_in_tensorboard_takes_the_place_of_what_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_RUNS", str(tmp_path))
    with start_tracker("tensorboard", "02_baseline", "loaded", {}):
        pass
    assert list(tmp_path.iterdir()) == []  # no file for a run that logs nothing
    for steps in ((1, 2, 3), (2, 3, 4)):  # killed after 3, its checkpoint was of 1
        with start_tracker("tensorboard", "02_baseline", "seed-0", {}) as run:
            for step in steps:
                run.log({"loss": float(step + len(steps) * 10)}, step)
    losses = scalars(tmp_path / "tensorboard/02_baseline/seed-0")["loss"]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused("pip install tensorboard", start_tracker("tensorboard", "x", "x", {}).__enter__)


def test_wandbs_variable_decides_where_the_tracker_is_wandb(monkeypatch):
    for mode, parameter, tracker in (
        ("disabled", "wandb-online", "none"),
        ("online", "wandb-offline", "wandb-online"),
        ("online", "tensorboard", "tensorboard"),
        ("offline", "none", "none"),
    ):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert used(parameter) == tracker
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    refused("WANDB_MODE is 'sometimes'; allowed: disabled, offline, online", used, "wandb-offline")
    refused(r"unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\)", used, "tensorbord")
