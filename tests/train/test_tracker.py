from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from reclib.config import InputError
from reclib.train.fit import start_tracker, used

_SCRIPT = """
import socket
import sys
socket.gethostname = lambda: "somebodys-laptop"
from reclib.train.fit import start_tracker
from reclib.config import InputError
try:
    for seed in (0, 1):
        with start_tracker(sys.argv[1], "02_baseline", f"seed-{seed}", {"epochs": 3}) as run:
            run.log({"train/loss": 1.5}, step=1)
            run.log({"train/loss": 1.25, "valid/hr@10": 0.5}, step=2)
except InputError as error:
    sys.exit(str(error))
print("wandb" in sys.modules, "tensorboard" in sys.modules)
"""


def script(tmp_path: Path, asked: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"USER": "somebody", "LOGNAME": "somebody"}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "RECLIB_RUNS": str(tmp_path / "runs")}
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, asked],
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a folder of events: (step, value) by tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_none_does_nothing_and_does_not_even_import_a_tracker(tmp_path):
    done = script(tmp_path, "none")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False False\n", "")
    assert not (tmp_path / "runs").exists()


def test_wandb_offline_writes_files_without_a_login_and_without_a_word(tmp_path):
    done = script(tmp_path, "wandb-offline")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True False\n", "")
    folders = list((tmp_path / "runs/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    content = b"".join(file.read_bytes() for file in folders[0].rglob("*.wandb"))
    assert b"02_baseline" in content
    assert b"somebody" not in content
    assert b"seed-" in content
    assert not (tmp_path / "wandb").exists()


def test_wandb_online_without_a_login_says_what_to_do(tmp_path):
    done = script(tmp_path, "wandb-online")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "tracker='wandb-online' needs a login: run `wandb login` once, or use tracker='wandb-offline'"
    )


def test_tensorboard_reads_what_was_written_and_nothing_names_the_machine(tmp_path):
    done = script(tmp_path, "tensorboard")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False True\n", "")
    runs = sorted((tmp_path / "runs/tensorboard/02_baseline").iterdir())
    assert [run.name for run in runs] == ["seed-0", "seed-1"]
    assert scalars(runs[0]) == {"train/loss": [(1, 1.5), (2, 1.25)], "valid/hr@10": [(2, 0.5)]}
    for file in (tmp_path / "runs").rglob("events*"):
        assert "somebody" not in file.name
        assert b"somebody" not in file.read_bytes()
        assert b'"epochs": 3' in file.read_bytes()


def test_a_run_that_goes_on_in_tensorboard_takes_the_place_of_what_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_RUNS", str(tmp_path))
    for steps in ((1, 2, 3), (2, 3, 4)):  # killed after 3, its checkpoint was of 1
        with start_tracker("tensorboard", "02_baseline", "seed-0", {}) as run:
            for step in steps:
                run.log({"loss": float(step + len(steps) * 10)}, step)
    found = scalars(tmp_path / "tensorboard/02_baseline/seed-0")
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]


def test_tensorboard_writes_no_file_for_a_run_that_logs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RECLIB_RUNS", str(tmp_path))
    with start_tracker("tensorboard", "02_baseline", "loaded", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_without_its_package_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with (
        pytest.raises(InputError, match="pip install tensorboard"),
        start_tracker("tensorboard", "02_baseline", "x", {}),
    ):
        pass


def test_wandbs_variable_decides_for_those_who_asked_for_wandb(tmp_path):
    assert script(tmp_path, "wandb-online", WANDB_MODE="disabled").stdout == "False False\n"
    assert script(tmp_path, "none", WANDB_MODE="offline").stdout == "False False\n"
    done = script(tmp_path, "wandb-offline", WANDB_MODE="sometimes")
    assert done.stderr.strip() == "WANDB_MODE is 'sometimes'; allowed: disabled, offline, online"


def test_the_tracker_that_is_used(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert used("wandb-online") == "none"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert used("wandb-offline") == "wandb-online"
    assert used("tensorboard") == "tensorboard"
    with pytest.raises(InputError, match=r"unknown tracker 'tensorbord' \(did you mean 'tensorboard'\?\)"):
        used("tensorbord")
