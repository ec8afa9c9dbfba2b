"""The notebooks as they are committed: their form, and whether running them again gives the same.

The only place that knows nbval.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import ROOT, python

from reclib import parameters
from reclib import records as reclib_records

# Stored outputs were made with the widest instructions of somebody's CPU. The lane runs with narrower ones,
# which round differently in the last bits: an output that depends on them is no reference for anyone.
OTHER_CPU = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SMOKE = yaml.safe_load((ROOT / "params/smoke.yaml").read_text())
MAX_CELL_LINES = 15
IGNORED = "nbval-ignore-output"  # on cells whose numbers come from training: other machines round otherwise
SANITISER = ROOT / "tests/nbval_sanitize.cfg"


def code_cells(file: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(file, 4).cells if cell.cell_type == "code"]


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def bundles(cells: Iterable[nbformat.NotebookNode]) -> list[dict]:
    """Return the results that cells display: a table of several, or one."""
    contents = [out.get("data", {}).get(reclib_records.MIME, []) for cell in cells for out in cell.outputs]
    return [bundle for c in contents for bundle in (c if isinstance(c, list) else [c])]


def lane(file: Path, records: Path) -> subprocess.CompletedProcess[str]:
    """Run a notebook with nbval against the outputs that are stored in it."""
    environment = os.environ | OTHER_CPU | {"RECLIB_RECORDS": str(records), "RECLIB_ROOT": str(ROOT)}
    environment |= {"PYTHONWARNINGS": "ignore"}
    options = f"-q -p no:cacheprovider -c {os.devnull} --rootdir={file.parent} --nbval --nbval-current-env"
    options += f" --nbval-cell-timeout 300 --nbval-sanitize-with {SANITISER}"
    return python("-m", "pytest", *options.split(), file, cwd=file.parent, env=environment, timeout=None)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_form_of_a_notebook_and_its_outputs_of_one_clean_run(file: Path):
    notebook, cells = nbformat.read(file, 4), code_cells(file)
    nbformat.validate(notebook)
    assert not {"papermill", "widgets"} & set(notebook.metadata)
    assert notebook.cells[0].source.startswith("# ")
    for cell in cells:
        is_list = "parameters" in tags(cell)  # one line a parameter, however many
        assert is_list or len(cell.source.splitlines()) <= MAX_CELL_LINES, cell.source
        assert not {"papermill", "execution"} & set(cell.metadata), cell.source
        assert "injected-parameters" not in tags(cell)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    compared = bundles(cell for cell in cells if IGNORED not in tags(cell))
    assert any(any(bundle["metrics"].values()) for bundle in compared), "a change would be unseen"


def device_key(result: dict) -> str:
    """Key that tells the results of several devices apart; those of one device keep their order."""
    own = result.get("own_params") or result["params"]
    values = map(own.get, ("size", "device", "rule", "technique"))
    return json.dumps([result["name"], *values]) if own.get("device") else ""


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_gives_again_what_is_stored_in_it(file: Path, tmp_path: Path):
    process = lane(file, tmp_path)
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    # Records are in the folders of their devices, so they are read in another order than they are shown in.
    stored = sorted(bundles(code_cells(file)), key=device_key)
    fresh = sorted(reclib_records.read(tmp_path), key=device_key)
    smoke = parameters.profile_of(file.stem, parameters.build(file.stem, SMOKE[file.stem]))
    assert stored, "the notebook displays no result"
    assert [bundle["name"] for bundle in stored] == [entry["name"] for entry in fresh]
    for bundle, entry in zip(stored, fresh, strict=True):
        assert entry["profile"] == smoke
        wanted = {  # None: what one seed cannot say
            key: value if value is None else pytest.approx(value, rel=0.01, abs=0.005)
            for key, value in bundle["metrics"].items()
        }
        assert entry["metrics"] == wanted, bundle["name"]


@pytest.fixture
def executed(project: Path) -> Path:
    """A small notebook of the study's form with its outputs stored."""
    from reclib import cli

    assert cli.main(["refresh", "02"]) == 0
    assert not (project / "executed").exists()
    (file,) = (project / "notebooks").iterdir()
    return file


def test_the_lane_is_green_on_its_own_outputs_and_red_on_others_and_on_a_failing_cell(executed, tmp_path):
    process = lane(executed, tmp_path / "records")
    assert process.returncode == 0, process.stdout
    assert len(reclib_records.read(tmp_path / "records")) == 1
    notebook = nbformat.read(executed, 4)
    bundle = notebook.cells[-1].outputs[0].data[reclib_records.MIME]
    bundle["metrics"]["hr_10"] *= 1.5
    notebook.cells.append(nbformat.v4.new_code_cell("1 / 0"))
    nbformat.write(notebook, executed)
    process = lane(executed, tmp_path / "others")
    assert process.returncode == 1, process.stdout[-3000:] + process.stderr[-2000:]
    for part in (reclib_records.MIME, repr(bundle["metrics"]["hr_10"]), "ZeroDivisionError"):
        assert part in process.stdout
    assert "2 failed" in process.stdout.splitlines()[-1]  # these and no others


def test_the_runners_and_the_hooks_normaliser_agree(executed: Path, tmp_path: Path):
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"  # no hook needs the network
    entry = next(hook["entry"] for hook in local["hooks"] if hook["id"] == "normalise-notebooks")
    flags, keys = entry.split("--extra-keys")
    dirty = nbformat.read(executed, 4)
    dirty.metadata["papermill"] = {"input_path": "/home/x"}
    dirty.cells[1].metadata["execution"] = {"iopub.status.busy": "2026"}
    target = tmp_path / "dirty.ipynb"
    nbformat.write(dirty, target)
    tool = Path(sys.executable).parent / "nbstripout"
    options = [*flags.split()[1:], "--extra-keys", keys.strip().strip('"')]
    subprocess.run([tool, *options, target], check=True)
    assert json.loads(target.read_text()) == json.loads(executed.read_text())
