from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# From the ground up: a module imports only those before it. A new module takes its place here.
ORDER = [
    *("paths", "config", "command", "lifeline", "diagnosis", "turns"),
    *("injected", "notebook_params", "params", "provenance", "tracker", "hardware", "energy"),
    *("cache", "synthetic", "fetch", "ml100k"),
    *("formats", "reading", "sources", "dataset", "prepare", "splits", "periods", "data"),
    *("describe", "datasheet", "samples", "devices", "packing", "batching", "claims"),
    *("flops", "adapter_plan", "workload", "footprint", "headroom", "steptime", "planner", "quote"),
    *("sinks", "model", "instance", "lowrank", "gate", "adapters", "ilora", "adapter_files"),
    *("sampled", "cross_entropy", "objective", "metrics", "baselines", "statistics", "protocols"),
    *("checkpoint", "distributed", "launch", "runfile", "trainer", "curves", "fit", "kept"),
    *("experiment", "assessment"),
    *("measurement", "benchmark", "profiling", "bound", "microbench"),
    *("ladder", "speed", "comparison", "selfcheck"),
    *("adaptation", "adaptation_results", "adapter_speed", "recommend"),
    *("audit", "bypass", "recreation", "verdicts"),
    *("record", "gathered", "merging", "counts", "gridfile", "grid", "scoring"),
    *("law", "sweeps", "scaling", "scaling_tables", "tuned", "tuning", "tuning_tables", "tune", "sized"),
    *("tables", "look", "answers", "page", "marks", "speed_figures", "hardware_figures"),
    *("accuracy_figures", "control_figures", "data_figures", "scaling_figures", "tuning_figures"),
    *("explore", "explore_figures", "quote_figures", "widgets"),
    *("adapter_figures", "audit_figures"),
    *("figures", "pictures", "runner", "job", "matrix", "study"),
]
# Each of these is known to one module, or to one family, so that replacing it touches few files.
ONE_OWNER: dict[str, set[str]] = {
    "papermill": {"runner"},
    "plotly": {"figures", "marks", *(name for name in ORDER if name.endswith("_figures"))},
    "wandb": {"tracker"},
    "tensorboard": {"tracker"},
    "ipywidgets": {"widgets"},
    "optuna": {"tune"},
}
WITHOUT_TORCH = ["", "paths", "config", "params", "record", "claims", "figures", "study", "planner", "quote"]

MODULES = sorted(file.stem for file in (ROOT / "reclib").glob("*.py") if file.stem != "__init__")


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / "reclib" / f"{module}.py").read_text())


def imported(module: str) -> Iterator[str]:
    """Yield the full names of all that a module imports, wherever in it."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_modules_below_it(module):
    assert module in ORDER, f"reclib/{module}.py: give it a place in ORDER, in tests/test_layout.py"
    below = ORDER[: ORDER.index(module)]
    for name in imported(module):
        parts = name.split(".")
        if parts[0] == "reclib" and len(parts) > 1:
            assert parts[1] in below, f"{module} imports {parts[1]}, which is not below it"


@pytest.mark.parametrize(("package", "owner"), ONE_OWNER.items())
def test_some_packages_are_imported_in_one_module_only(package, owner):
    users = {m for m in MODULES if any(n.split(".")[0] == package for n in imported(m))}
    assert users <= owner


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_figures_can_be_rebuilt_where_there_is_no_torch(module):
    name = f"reclib.{module}".rstrip(".")
    if module and module not in MODULES:
        pytest.skip(f"no reclib/{module}.py yet")
    code = f"import {name}, sys; print(sorted({{'torch', 'papermill', 'wandb'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_module_has_a_name_that_says_nothing():
    assert not {"utils", "helpers", "common", "base", "misc"} & set(MODULES)


def test_output_folders_wait_for_plain_papermill():
    from reclib.config import GPU_LABELS

    for label in GPU_LABELS:
        if label != "auto":
            assert (ROOT / "executed" / label / ".gitkeep").is_file(), label


def test_no_committed_text_names_a_folder_of_somebodys_machine():
    names = (ROOT / folder for folder in ("reclib", "tests", "benchmarks", "params", "notebooks"))
    files = [f for folder in names for f in folder.rglob("*") if f.suffix in (".py", ".yaml", ".ipynb")]
    private = [str(ROOT) + "/", str(Path.home()) + "/"]
    assert len(files) > 20
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert not [path for path in private if path in text and path != "/"], file
