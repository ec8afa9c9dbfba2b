from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from reclib import tracker
from reclib.config import InputError

# A process of its own: under pytest tracking is off, whatever is asked for.
_SCRIPT = """
import sys
from reclib import tracker
from reclib.config import InputError
try:
    for seed in (0, 1):
        with tracker.start(sys.argv[1], "02_baseline", f"seed-{seed}", {"epochs": 3}) as run:
            run.log({"loss": 1.0}, step=1)
except InputError as error:
    sys.exit(str(error))
print("wandb" in sys.modules)
"""


def script(tmp_path: Path, mode: str, **variables: str) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTEST_", "WANDB_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "RECLIB_RUNS": str(tmp_path / "runs")}
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, mode],
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_disabled_does_nothing_and_does_not_even_import_wandb(tmp_path):
    done = script(tmp_path, "disabled")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
    assert not (tmp_path / "runs").exists()


def test_offline_writes_files_without_a_login_and_without_a_word(tmp_path):
    done = script(tmp_path, "offline")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
    folders = list((tmp_path / "runs/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    content = b"".join(file.read_bytes() for file in folders[0].rglob("*.wandb"))
    assert b"02_baseline" in content
    assert b"seed-" in content
    assert not (tmp_path / "wandb").exists()


def test_online_without_a_login_says_what_to_do(tmp_path):
    done = script(tmp_path, "online")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "wandb_mode='online' needs a login: run `wandb login` once, or use wandb_mode='offline'"
    )


def test_the_environment_variable_wins(tmp_path):
    assert script(tmp_path, "online", WANDB_MODE="disabled").stdout == "False\n"
    done = script(tmp_path, "disabled", WANDB_MODE="sometimes")
    assert "unknown wandb mode 'sometimes'; allowed: disabled, offline, online" in done.stderr


def test_tests_never_track(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert tracker.mode_of("online") == "disabled"
    monkeypatch.delenv("PYTEST_VERSION")
    assert tracker.mode_of("disabled") == "online"
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(InputError, match="unknown wandb mode"):
        tracker.mode_of("on")
