import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import torch
import yaml
from conftest import ROOT, python

from reclib.config import GPU_LABELS
from reclib.parameters import PROFILES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def make(target: str, folder: Path = ROOT, *variables: str) -> list[str]:
    """Return the commands that make would carry out."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "MFLAGS"}
    option = "--always-make" if folder == ROOT else "--no-print-directory"
    command = ["make", option, "-n", target, *variables]
    output = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return [line.strip() for line in output.stdout.splitlines()]


def test_the_environment_installs_the_project_and_names_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    python, installer, pip = environment["dependencies"]
    assert installer == "pip"
    (extras,) = re.fullmatch(r"-e \.\[([\w,]+)\]", *pip["pip"]).groups()  # type: ignore[union-attr]
    assert set(extras.split(",")) == set(PROJECT["optional-dependencies"])
    assert python == f"python={PROJECT['requires-python'].removeprefix('>=')}"


def test_one_torch_of_the_allowed_range_is_installed_first():
    (allowed,) = (line for line in PROJECT["dependencies"] if line.startswith("torch"))
    lowest, beyond = re.fullmatch(r"torch>=(\d+\.\d+),<(\d+\.\d+)", allowed).groups()
    commands = [line for line in make("install") if " pip install" in line]
    (pinned,) = re.findall(r'"torch==(\d+\.\d+)\.\d+"', commands[0])
    assert commands[1].endswith("--editable '.[study,test]'")
    as_numbers = [tuple(map(int, version.split("."))) for version in (lowest, pinned, beyond)]
    assert as_numbers == sorted(set(as_numbers))
    assert as_numbers[0] <= tuple(map(int, torch.__version__.split(".")[:2])) < as_numbers[2]


def test_the_makefile_loses_no_time_once_it_is_installed_and_tells_an_old_python(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = ["make", "install", "PYTHON=false"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode != 0
    assert "reclib needs Python 3.11 or later" in process.stderr
    assert not (tmp_path / ".venv").exists()
    stamp = next(line for line in make("install", tmp_path) if line.startswith("touch")).split()[1]
    (tmp_path / ".venv").mkdir()
    (tmp_path / stamp).touch()
    assert [line for line in make("figures", tmp_path) if "pip" in line] == []
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert len([line for line in make("figures", tmp_path) if " pip install" in line]) == 2
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    other = make("figures", tmp_path, "TORCH=torch==2.11.0")
    assert '"torch==2.11.0"' in next(line for line in other if " pip install" in line)


def test_what_trains_and_measures_needs_few_packages_and_imports_them_late():
    code = """import json, sys
from reclib import records
from reclib.cost import planner
from reclib.experiments import comparison, speed
from reclib.train import fit, timing
print(json.dumps(list(sys.modules)))"""
    modules = set(json.loads(python("-c", code, check=True).stdout))
    assert not modules & {"torch._dynamo", "scipy.stats", "duckdb"}, "slow to import"
    # Where torch, numpy, pandas and PyYAML are installed, wheels of 3 MB make it complete.
    allowed = {"isal", "msgspec", "pydantic", "pydantic_core", "annotated_types", "typing_inspection"}
    allowed |= {"typing_extensions", "torch", "torchgen", "numpy", "pandas", "dateutil", "safetensors"}
    allowed |= {"tqdm", "yaml", "reclib", "cython_runtime"} | sys.stdlib_module_names
    packages = {name.partition(".")[0] for name in modules} - allowed
    assert {name for name in packages if not name.startswith("_")} == set()


def test_the_task_for_skypilot_runs_on_gpus_that_have_labels():
    task = yaml.safe_load((ROOT / "sky.yaml").read_text())
    families = {label.partition("-")[0] for label in GPU_LABELS if not label.startswith(("auto", "cpu"))}
    assert {name.lower() for name in task["resources"]["accelerators"]} == families
    assert task["envs"]["PROFILE"] in PROFILES
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
