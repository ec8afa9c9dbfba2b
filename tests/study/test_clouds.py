"""The task file for SkyPilot, read by SkyPilot itself where it is installed."""

from __future__ import annotations

import subprocess

import pytest
import yaml
from conftest import ROOT

from reclib.config import GPU_LABELS
from reclib.parameters import PROFILES

TASK = yaml.safe_load((ROOT / "sky.yaml").read_text())


def test_the_task_runs_commands_that_are_there_on_gpus_that_have_labels():
    families = {label.partition("-")[0] for label in GPU_LABELS if not label.startswith(("auto", "cpu"))}
    assert {name.lower() for name in TASK["resources"]["accelerators"]} == families
    assert TASK["envs"]["PROFILE"] in PROFILES
    for script in (TASK["setup"], TASK["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "install:" in (ROOT / "Makefile").read_text()


def test_skypilot_takes_it():
    sky = pytest.importorskip("sky", reason="skypilot is not installed: it needs a venv of its own")
    task = sky.Task.from_yaml(str(ROOT / "sky.yaml"))
    names = {name for resource in task.resources for name in resource.accelerators}
    assert (task.name, names) == ("reclib", set(TASK["resources"]["accelerators"]))
