"""The command line on a small study of its own: what a run leaves, skips, refuses and tells."""

import json
import re
import subprocess
import unittest.mock
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import RESULT, ROOT, python, rows_of, smoke

from reclib import cli, parameters
from reclib import records as reclib_records
from reclib.report import figures, findings
from reclib.runner import Job

pytest.importorskip("papermill")

STAMP, NOTEBOOK = ".stamps/cpu-02_baseline.json", "runs/executed/cpu/02_baseline.ipynb"
FAILED = NOTEBOOK.replace(".ipynb", ".failed.ipynb")
DONE = [STAMP, NOTEBOOK, "runs/executed/cpu/results.jsonl"]


def run(*arguments: str) -> int:
    return cli.main(["run", "02", "--profile", "smoke", *arguments])


def written(project: Path) -> list[str]:
    """Everything in the project that was not there at the start, locks apart: they stay, empty."""
    files = [file for file in project.rglob("*") if file.is_file() and file.suffix != ".lock"]
    names = [file.relative_to(project) for file in files]
    return sorted(str(name) for name in names if name.parts[0] not in ("params", "notebooks"))


def test_a_run_leaves_notebook_record_and_stamp_and_no_tracked_file(project: Path, capsys, monkeypatch):
    monkeypatch.setattr(findings, "sentences", lambda notebook, rows: [f"{len(rows)} record. " * 20])
    file = project / "params/mine.yaml"
    file.write_text("epochs: 7\nbatch_size: 32\n")
    assert run("-v", "-f", str(file), "-p", "epochs", "5", "--gpu", "cpu") == 0
    assert written(project) == DONE
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {f"{name.split('/')[0]}/" for name in DONE} <= set(ignored)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\[1/1\] 02_baseline \(cpu\) done in \d+ s", lines[-3])
    assert all(line.startswith("      ") and len(line) <= 110 for line in lines[-2:])
    assert len(re.findall(r"cell \d/4 +\d+\.\d s  A question", "\n".join(lines))) == 4
    (entry,) = rows_of(project)
    assert entry["metrics"]["hr_10"] == pytest.approx(5.123456)
    assert (entry["profile"], entry["label"]) == ("custom", "cpu")
    values = [entry["params"][name] for name in ("epochs", "batch_size", "size")]
    assert values == [5, 32, smoke("02_baseline").size]
    text = (project / NOTEBOOK).read_text()
    for private in (str(project), str(ROOT), str(Path.home()) + "/", '"papermill":', '"widgets":'):
        assert private not in text
    notebook = nbformat.reads(text, 4)
    nbformat.validate(notebook)
    bundle = notebook.cells[-1].outputs[0].data[reclib_records.MIME]
    assert bundle["metrics"] == {"hr_10": 5.12}
    assert not {"gpu", "precision", "tracker"} & set(bundle["params"])


def test_finished_work_is_skipped_until_something_changes(project: Path, set_cells, capsys):
    def state() -> str:
        ((_, _, state, _),) = cli.status()
        return state

    checkpoint = project / "runs/02_baseline/key/step-9"
    checkpoint.mkdir(parents=True)
    (project / "runs/01_data_prep").mkdir()
    assert state() == "missing"
    assert run() == run() == 0
    assert state() == "done"
    assert checkpoint.is_dir()
    assert "skipped" in capsys.readouterr().out
    job = Job.last("02_baseline", "cpu")
    assert not Job(job.notebook, job.values | {"epochs": 4}, "cpu").is_finished()
    for name, old, new in (
        ("params/gpu/cpu.yaml", "fp32\n", "bf16\n"),
        (NOTEBOOK, "{", " {"),
        ("notebooks/02_baseline.ipynb", "0.123456", "0.2"),
    ):
        before = (project / name).read_text()
        (project / name).write_text(before.replace(old, new, 1))
        assert state() == "stale", name
        (project / name).write_text(before)
        assert state() == "done", name
    (project / STAMP).rename(project / "stamp")  # as in a fresh clone: notebook and records are there
    assert state() == "recorded"
    (project / "stamp").rename(project / STAMP)
    assert run("--force") == 0  # trains again instead of loading what was trained
    assert not checkpoint.exists()
    assert (project / "runs/01_data_prep").is_dir()
    good = (project / NOTEBOOK).read_bytes()
    capsys.readouterr()
    set_cells("1 / 0", RESULT)
    assert run() == 1
    error = "[1/1] 02_baseline (cpu) failed in cell 4: ZeroDivisionError: division by zero\n"
    assert capsys.readouterr().err == error
    assert written(project) == [FAILED, *DONE[1:]]
    assert "ZeroDivisionError" in (project / FAILED).read_text()
    assert (project / NOTEBOOK).read_bytes() == good
    assert cli.status() == [("02_baseline", "cpu", "failed", 2)]
    set_cells(RESULT)
    assert run() == 0
    assert written(project) == DONE
    assert cli.main(["status"]) == 0
    assert capsys.readouterr().out.split()[-4:] == ["02_baseline", "cpu", "done", "3"]


def test_a_users_records_stand_beside_the_committed_ones_which_only_commit_changes(
    project: Path, set_cells, monkeypatch, capsys
):
    fault = RuntimeError("a page that cannot be built")
    collect = unittest.mock.Mock(side_effect=[[], fault, *[[]] * 4])
    monkeypatch.setattr(figures, "collect", collect)
    committed, own = project / "executed", project / "runs/executed"
    assert cli.main(["collect"]) == 0
    assert cli.main(["run-all", "--profile", "smoke"]) == 0
    assert "page not rebuilt: RuntimeError: a page that cannot be built" in capsys.readouterr().err
    before = (own / "cpu/results.jsonl").read_text()
    assert cli.main(["merge", str(own)]) == 0
    assert (own / "cpu/results.jsonl").read_text() == before
    assert not committed.exists()
    set_cells("raise ValueError('no')")
    assert cli.main(["run-all", "--profile", "smoke"]) == 1
    assert "(cpu) failed in cell 4: ValueError: no" in capsys.readouterr().err
    monkeypatch.setenv("RECLIB_RECORDS", str(own))  # put back after the test: the next lines set it
    assert cli.main(["merge", "--commit", str(own)]) == 0
    assert (committed / "cpu/results.jsonl").read_text() == before
    assert cli.main(["collect", "--commit"]) == 0
    beside = ([committed, own], project / "runs/figures")
    alone = ([committed], project / "figures")
    calls = [call.args for call in collect.call_args_list]
    assert calls == [alone, *[beside] * 4, alone]  # after each notebook, and at the end
    reclib_records.append(own / "cpu/grids/x.jsonl", json.loads(before) | {"params": {"dataset": "mine.csv"}})
    for arguments in (["merge", str(own)], ["run", "02", "-p", "dataset", "mine.csv"]):
        assert cli.main([*arguments, "--commit"]) == 2
        assert "not for 'mine.csv'" in capsys.readouterr().err


def test_plain_papermill_works_and_refuses_a_misspelt_parameter(project: Path):
    (project / "executed/cpu").mkdir(parents=True)

    def papermill(folder: str, up: str, name: str, value: str) -> subprocess.CompletedProcess[str]:
        files = (f"{up}notebooks/02_baseline.ipynb", f"{up}executed/cpu/02_baseline.ipynb")
        return python("-m", "papermill", *files, "-p", "gpu", "cpu", "-p", name, value, cwd=project / folder)

    right = papermill(".", "", "tied", "false")
    assert right.returncode == 0, right.stderr
    assert "converted: tied='false' -> False" in (project / "executed/cpu/02_baseline.ipynb").read_text()
    wrong = papermill("notebooks", "../", "epcohs", "4")
    assert wrong.returncode != 0
    assert "unknown parameter 'epcohs' (did you mean 'epochs'?)" in wrong.stderr
    assert [entry["params"]["tied"] for entry in rows_of(project)] == [False]


def test_wrong_input_is_told_in_one_line_before_a_kernel_starts(project: Path, capsys):
    file = project / "params/mine.yaml"
    file.write_text("epcohs: 7\n")
    for arguments, part in [
        (["run", "02_baselnie"], "did you mean '02_baseline'?"),
        (["run", "02", "-p", "epochs", "1e3"], "parameter 'epochs' is 1000.0"),
        (["run", "02", "-p", "dataset", "nonesuch"], "parameter 'dataset' is 'nonesuch'"),
        (["run", "02", "-f", str(file)], "unknown parameter 'epcohs'"),
        (["run-all", "--gpus", "cpu1", "--gpu", "cpu"], "give one of them"),
    ]:
        assert cli.main(arguments) == 2
        output = capsys.readouterr()
        assert part in output.err
        assert output.err.count("\n") == 1
        assert output.out == ""
    assert written(project) == []


def test_a_notebook_whose_cell_disagrees_with_its_parameters_is_refused(project: Path, capsys):
    file = project / "notebooks/02_baseline.ipynb"
    notebook = nbformat.read(file, 4)
    notebook.cells[1].source = notebook.cells[1].source.replace("epochs =", "epoch =")
    nbformat.write(notebook, file)
    assert run() == 2
    assert "its parameters cell lacks 'epochs'" in capsys.readouterr().err
    notebook.cells[1].metadata.clear()
    nbformat.write(notebook, file)
    assert run() == 2
    assert "no cell tagged 'parameters'" in capsys.readouterr().err
    assert written(project) == []


@pytest.mark.slow
def test_a_dead_kernel_and_a_cell_over_its_time_fail_as_well(project: Path, set_cells, capsys):
    for cell, part in [
        ("import os; os._exit(9)", "DeadKernelError: its kernel ended with exit code 9"),
        ("import os; os.kill(os.getpid(), 9)", "its kernel was killed"),
        ("import time; time.sleep(60)", "it took longer than --timeout allows"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ]:
        set_cells(cell)
        assert run("--timeout", "3") == 1
        error = capsys.readouterr().err
        assert "02_baseline (cpu) failed in cell 4: " in error
        assert part in error
        assert written(project) == [FAILED]


def test_refreshing_a_notebook_that_fails_leaves_it_as_it_was(project: Path, set_cells, capsys):
    set_cells("1 / 0")
    file = project / "notebooks/02_baseline.ipynb"
    before = file.read_bytes()
    assert cli.main(["refresh", "02"]) == 1
    assert "02_baseline failed in cell 3: ZeroDivisionError" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_params_prints_yaml_that_papermill_takes(project: Path, capsys):
    assert cli.main(["params", "02", "--profile", "full", "--gpu", "h100"]) == 0
    p = parameters.build("02_baseline", yaml.safe_load(capsys.readouterr().out))
    assert (p.gpu, p.compile_mode) == ("h100", "default")
    assert parameters.profile_of("02_baseline", p) == "full"
