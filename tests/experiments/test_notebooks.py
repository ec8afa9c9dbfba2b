"""The notebooks as they are committed: their form, and whether running them again gives the same.

The only place that knows nbval.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT

from reclib import parameters
from reclib import records as reclib_records

# Stored outputs were made with the widest instructions of somebody's CPU. The lane runs with narrower ones,
# which round differently in the last bits: an output that depends on them is no reference for anyone.
OTHER_CPU = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SMOKE = yaml.safe_load((ROOT / "params/smoke.yaml").read_text())
MAX_CELL_LINES = 15
IGNORED = "nbval-ignore-output"  # on cells whose numbers come from training: other machines round otherwise


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def bundles(cells: list[nbformat.NotebookNode]) -> Iterator[nbformat.NotebookNode]:
    """Yield the result bundles that cells display."""
    for cell in cells:
        for output in cell.outputs:
            if reclib_records.MIME in output.get("data", {}):
                yield output.data


def lane(file: Path, records: Path) -> subprocess.CompletedProcess[str]:
    """Run a notebook with nbval against the outputs that are stored in it."""
    environment = {**os.environ, **OTHER_CPU} | {
        "RECLIB_RECORDS": str(records),
        "RECLIB_ROOT": str(ROOT),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300"),
            *("--nbval-sanitize-with", str(ROOT / "tests/nbval_sanitize.cfg")),
            *(f"--rootdir={file.parent}", "-c", os.devnull),
            str(file),
        ],
        cwd=file.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_the_form_of_a_notebook():
    for file in NOTEBOOKS:
        notebook = nbformat.read(file, 4)
        nbformat.validate(notebook)
        assert notebook.metadata.kernelspec.name == "python3"
        assert not {"papermill", "widgets"} & set(notebook.metadata)
        assert len(tagged(notebook, "parameters")) == 1
        assert not tagged(notebook, "injected-parameters")
        for cell in code_cells(notebook):
            lines = cell.source.splitlines()
            is_list = "parameters" in cell.metadata.get("tags", [])  # one line a parameter, however many
            assert is_list or len(lines) <= MAX_CELL_LINES, f"{len(lines)} lines: {lines[0]}"
            assert not {"papermill", "execution"} & set(cell.metadata), lines[0]
            assert not [line for line in lines if line.startswith(("class ", "async def "))]
        assert notebook.cells[0].cell_type == "markdown"
        assert notebook.cells[0].source.startswith("# ")


def test_a_notebook_is_committed_with_the_outputs_of_one_clean_run():
    for file in NOTEBOOKS:
        cells = [cell for cell in code_cells(nbformat.read(file, 4)) if cell.source.strip()]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), file.stem
        outputs = [output for cell in cells for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"], file.stem
        first_compared_metric(nbformat.read(file, 4))  # what would be seen if it changed


def test_defaults_are_the_smoke_profile():
    for file in NOTEBOOKS:
        (cell,) = tagged(nbformat.read(file, 4), "parameters")
        defaults = {}
        for statement in ast.parse(cell.source).body:
            assert isinstance(statement, ast.AnnAssign), ast.unparse(statement)
            assert isinstance(statement.target, ast.Name)
            assert statement.value is not None
            defaults[statement.target.id] = ast.literal_eval(statement.value)
        assert list(defaults) == parameters.names(file.stem)
        assert defaults == SMOKE[file.stem]
        assert all("  # " in line for line in cell.source.splitlines()), "each line says what it is"


def told_apart(result: dict) -> str:
    """What tells the results of a notebook of several devices apart; those of one device keep their order."""
    own = result.get("own_params") or result["params"]
    several = ("device", "rule", "technique")
    return json.dumps([result["name"], own.get("size"), *map(own.get, several)]) if own.get("device") else ""


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_gives_again_what_is_stored_in_it(file: Path, tmp_path: Path):
    done = lane(file, tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # Records lie in the folders of their devices, so they are read in another order than they are shown in.
    stored = sorted(
        (data[reclib_records.MIME] for data in bundles(code_cells(nbformat.read(file, 4)))), key=told_apart
    )
    fresh = sorted(reclib_records.read(tmp_path), key=told_apart)
    smoke = parameters.profile_of(file.stem, parameters.build(file.stem, SMOKE[file.stem]))
    assert stored, "the notebook displays no result"
    assert [bundle["name"] for bundle in stored] == [entry["name"] for entry in fresh]
    for bundle, entry in zip(stored, fresh, strict=True):
        assert entry["profile"] == smoke
        fresh_metrics, stored_metrics = entry["metrics"], bundle["metrics"]
        absent = {key for key, value in stored_metrics.items() if value is None}  # what one seed cannot say
        assert absent == {key for key, value in fresh_metrics.items() if value is None}, bundle["name"]
        numbers = {key: value for key, value in stored_metrics.items() if key not in absent}
        fresh_numbers = {key: value for key, value in fresh_metrics.items() if key not in absent}
        assert fresh_numbers == pytest.approx(numbers, rel=0.01, abs=0.005), bundle["name"]


def first_compared_metric(notebook: nbformat.NotebookNode) -> tuple[nbformat.NotebookNode, str]:
    """Return the first stored result that the lane compares, and the name of a metric that is not 0."""
    compared = [c for c in code_cells(notebook) if IGNORED not in c.metadata.get("tags", [])]
    bundle = next(
        b[reclib_records.MIME] for b in bundles(compared) if any(b[reclib_records.MIME]["metrics"].values())
    )
    return bundle, next(name for name, value in bundle["metrics"].items() if value)


@pytest.fixture
def executed(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small notebook of the study's form with its outputs stored."""
    from reclib import cli

    assert cli.main(["refresh", "02"]) == 0
    file = project / "notebooks/02_baseline.ipynb"
    assert [file.name for file in file.parent.iterdir()] == ["02_baseline.ipynb"]
    assert not (project / "executed").exists()
    return file


def test_the_lane_is_green_on_its_own_outputs_and_red_on_others_and_on_a_cell_that_fails(
    executed: Path, tmp_path: Path
):
    done = lane(executed, tmp_path / "records")
    assert done.returncode == 0, done.stdout
    assert len(reclib_records.read(tmp_path / "records")) == 1
    notebook = nbformat.read(executed, 4)
    bundle, name = first_compared_metric(notebook)
    bundle["metrics"][name] *= 1.5
    notebook.cells.append(nbformat.v4.new_code_cell("1 / 0"))
    nbformat.write(notebook, executed)
    done = lane(executed, tmp_path / "others")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert reclib_records.MIME in done.stdout
    assert repr(bundle["metrics"][name]) in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert "2 failed" in done.stdout.splitlines()[-1]  # these and no others


def test_the_sanitiser_hides_what_differs_between_good_runs_and_nothing_else():
    from configparser import RawConfigParser

    parser = RawConfigParser()
    parser.read(ROOT / "tests/nbval_sanitize.cfg")
    rules = [(parser[name]["regex"], parser[name]["replace"]) for name in parser.sections()]

    def clean(text: str) -> str:
        for pattern, replacement in rules:
            text = re.sub(pattern, replacement, text)
        return text

    assert clean("took 12.5 s at 1,234.5 tokens/s") == clean("took 3 s at 99 tokens/s")
    assert clean("at 2026-01-02T03:04:05+00:00") == clean("at 2027-11-12 13:14:15.5Z")
    assert clean("<object at 0x7f00aabbccdd>") == clean("<object at 0x7f00aabb0000>")
    assert clean("read /home/a/b.csv") == clean("read /tmp/c/d.csv")
    for text in ("HR@10=0.123  NDCG@10=0.061", "943 users, 1,349 items", "3 sequences", "p=0.05"):
        assert clean(text) == text
    assert clean("0.123") != clean("0.124")


def test_the_runners_and_the_hooks_normaliser_agree(executed: Path, tmp_path: Path):
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"  # no hook needs the network
    hooks = local["hooks"]
    entry = next(hook["entry"] for hook in hooks if hook["id"] == "normalise-notebooks")
    keys = entry.split("--extra-keys")[1].strip().strip('"')
    dirty = copy.deepcopy(nbformat.read(executed, 4))
    dirty.metadata["papermill"] = {"input_path": "/home/x"}
    dirty.cells[1].metadata["execution"] = {"iopub.status.busy": "2026"}
    target = tmp_path / "dirty.ipynb"
    nbformat.write(dirty, target)
    tool = shutil.which("nbstripout", path=str(Path(sys.executable).parent))
    assert tool is not None
    flags = entry.split("--extra-keys")[0].split()[1:]
    subprocess.run([tool, *flags, "--extra-keys", keys, str(target)], check=True)
    assert json.loads(target.read_text()) == json.loads(executed.read_text())
