"""Three rules of the layout: imports run downwards, in no circle, and what needs no torch imports none."""

import ast
import functools
from graphlib import TopologicalSorter

from conftest import ROOT, python

# From the ground up. A room imports only rooms before it; the library ends with `train`.
ROOMS = ["config", "system", "hardware", "data", "model", "evaluate", "cost", "train"]
ROOMS += ["parameters", "records", "runner", "report", "experiments", "cli"]
WITHOUT_TORCH = ("config", "system", "cost", "parameters", "records", "report")

PACKAGE = ROOT / "reclib"
FILES = {
    file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): file
    for file in PACKAGE.rglob("*.py")
    if file.name not in ("__init__.py", "__main__.py")
}


@functools.cache
def imported(module: str) -> set[str]:
    """Return the modules of reclib that a module imports."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            for alias in node.names:
                names = [f"{node.module}.{alias.name}", str(node.module)]
                modules |= {n[7:] for n in names if n.startswith("reclib.") and n[7:] in FILES}
    return modules


def room(module: str) -> str:
    return module.split(".")[0]


def test_imports_run_downwards_between_rooms():
    assert {room(module) for module in FILES} == set(ROOMS)
    for module in FILES:
        above = ROOMS[ROOMS.index(room(module)) + 1 :]
        assert not [other for other in imported(module) if room(other) in above], module


def test_imports_run_in_no_circle():
    graph = {module: imported(module) - {module} for module in FILES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_figures_and_plans_need_no_torch():
    modules = [f"reclib.{m}" for m in FILES if room(m) in WITHOUT_TORCH]
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    assert python("-c", code, check=True).stdout == "False\n"
