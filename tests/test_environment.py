from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib

import yaml
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_environment_installs_the_project_and_names_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    *plain, pip = environment["dependencies"]
    python, installer = plain
    assert installer == "pip"
    assert list(pip) == ["pip"]
    (project,) = pip["pip"]
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", project)
    assert extras is not None
    assert set(extras[1].split(",")) == set(PROJECT["optional-dependencies"])
    minimum = re.fullmatch(r">=(\d+\.\d+)", PROJECT["requires-python"])
    assert minimum is not None
    assert python == f"python={minimum[1]}"


def test_torch_is_pinned_once_and_installed_first():
    pins = [line for line in PROJECT["dependencies"] if line.startswith("torch")]
    assert len(pins) == 1
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", pins[0])
    commands = [line for line in _make("install") if " pip install" in line]
    assert f'"{pins[0]}"' in commands[0]
    assert commands[1].endswith("--editable '.[study,test]'")


def test_the_makefile_loses_no_time_once_it_is_installed(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    stamp = next(line for line in _make("install", tmp_path) if line.startswith("touch")).split()[1]
    (tmp_path / ".venv").mkdir()
    (tmp_path / stamp).touch()
    assert [line for line in _make("figures", tmp_path) if "pip" in line] == []
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert len([line for line in _make("figures", tmp_path) if " pip install" in line]) == 2


def test_an_old_python_is_told_apart(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(["make", "install", "PYTHON=false"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "reclib needs Python 3.11 or later" in done.stderr
    assert not (tmp_path / ".venv").exists()


def _make(target: str, folder=ROOT) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    done = subprocess.run(
        ["make", "--always-make" if folder == ROOT else "--no-print-directory", "-n", target],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.strip() for line in done.stdout.splitlines()]


def test_hooks_normalise_notebooks_as_the_runner_does_and_need_no_network():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in hooks["repos"]] == ["local"]
    entries = {hook["id"]: hook["entry"] for hook in hooks["repos"][0]["hooks"]}
    assert {"ruff", "ruff-format", "normalise-notebooks"} <= set(entries)
    for part in ("--keep-output", "--keep-count", "metadata.widgets", "cell.metadata.papermill"):
        assert part in entries["normalise-notebooks"]


def test_continuous_integration_runs_what_a_person_runs():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test test-all"
