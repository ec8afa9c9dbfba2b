from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import RESULT, ROOT

from reclib import cli, parameters, runner
from reclib import records as reclib_records

pytest.importorskip("papermill")


def run(*arguments: str) -> int:
    return cli.main(["run", "02", "--profile", "smoke", *arguments])


def written(project: Path) -> list[str]:
    """Everything in the project that was not there at the start, locks apart: they stay, empty."""
    return sorted(
        str(file.relative_to(project))
        for file in project.rglob("*")
        if file.is_file()
        and file.suffix != ".lock"
        and file.relative_to(project).parts[0] not in ("params", "notebooks")
    )


DONE = [".stamps/cpu-02_baseline.json", "executed/cpu/02_baseline.ipynb", "executed/cpu/results.jsonl"]


def test_a_run_leaves_notebook_record_and_stamp(project: Path, capsys):
    assert run("-p", "epochs", "5", "--gpu", "cpu") == 0
    assert written(project) == DONE
    told = capsys.readouterr().out
    assert len(re.findall(r"cell \d/4 +\d+\.\d s  A question", told)) == 4
    (entry,) = reclib_records.read(project / "executed")
    assert entry["metrics"]["hr_10"] == pytest.approx(5.123456)
    assert (entry["profile"], entry["label"]) == ("custom", "cpu")
    text = (project / DONE[1]).read_text()
    for private in (str(project), str(ROOT), str(Path.home()) + "/", '"papermill":', '"widgets":'):
        assert private not in text
    notebook = nbformat.reads(text, 4)
    nbformat.validate(notebook)
    bundle = notebook.cells[-1].outputs[0].data[reclib_records.MIME]
    assert bundle["metrics"] == {"hr_10": 5.12}
    assert not {"gpu", "precision", "tracker"} & set(bundle["params"])


def test_a_file_of_parameters_stands_between_the_profile_and_the_command_line(project: Path, capsys):
    file = project / "params/mine.yaml"
    file.write_text("epochs: 7\nbatch_size: 32\n")
    assert run("-f", str(file), "-p", "epochs", "5") == 0
    (entry,) = reclib_records.read(project / "executed")
    assert (entry["params"]["epochs"], entry["params"]["batch_size"]) == (5, 32)
    assert entry["params"]["size"] == parameters.profile("02_baseline", "smoke")["size"]
    file.write_text("epcohs: 7\n")
    assert run("-f", str(file)) == 2
    assert "unknown parameter 'epcohs'" in capsys.readouterr().err


def test_finished_work_is_skipped_until_something_changes(project: Path, set_cells, capsys):
    def ran(*arguments: str) -> bool:
        assert run(*arguments) == 0
        return "skipped" not in capsys.readouterr().out

    assert ran()
    assert not ran()
    assert ran("--force")
    assert ran("-p", "epochs", "4")
    assert not ran("-p", "epochs", "4")
    (project / "executed/cpu/02_baseline.ipynb").unlink()
    assert ran("-p", "epochs", "4")
    set_cells("answer = 1", RESULT)
    assert ran("-p", "epochs", "4")
    (project / ".stamps/cpu-02_baseline.json").unlink()  # as in a fresh clone: records are there
    assert ran("-p", "epochs", "4")
    device = project / "params/gpu/cpu.yaml"
    device.write_text(device.read_text().replace("fp32\n", "bf16\n", 1))
    assert ran("-p", "epochs", "4")
    assert len(reclib_records.read(project / "executed")) == 7


def test_plain_papermill_works_from_the_root_and_from_the_notebooks(project: Path):
    (project / "executed/cpu").mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for folder, up in ((".", ""), ("notebooks", "../")):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "papermill", f"{up}notebooks/02_baseline.ipynb"),
                *(f"{up}executed/cpu/02_baseline.ipynb", "-p", "gpu", "cpu"),
                *("-p", "tied", "false"),
            ],
            cwd=project / folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "converted: tied='false' -> False" in (project / DONE[1]).read_text()
    entries = reclib_records.read(project / "executed")
    assert [entry["params"]["tied"] for entry in entries] == [False, False]


def test_a_misspelt_parameter_fails_in_plain_papermill_too(project: Path):
    (project / "executed/cpu").mkdir(parents=True)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "papermill", "notebooks/02_baseline.ipynb"),
            *("executed/cpu/02_baseline.ipynb", "-p", "epcohs", "4"),
        ],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "unknown parameter 'epcohs' (did you mean 'epochs'?)" in done.stderr
    assert not (project / "executed/cpu/results.jsonl").exists()


def test_wrong_input_is_told_in_one_line_before_a_kernel_starts(project: Path, capsys):
    for arguments, said in [
        (["run", "09"], "unknown notebook '09'"),
        (["run", "02_baselnie"], "did you mean '02_baseline'?"),
        (["run", "02", "--gpu", "rtx"], "parameter 'gpu' is 'rtx'"),
        (["run", "02", "-p", "batch_szie", "4"], "did you mean 'batch_size'?"),
        (["run", "02", "-p", "batch_size", "-4"], "parameter 'batch_size' is -4"),
        (["run", "02", "-p", "epochs", "1e3"], "parameter 'epochs' is 1000.0"),
        (["run", "02", "--profile", "huge"], "unknown profile 'huge'"),
        (["params", "02", "--gpu", "rtx"], "parameter 'gpu' is 'rtx'"),
    ]:
        assert cli.main(arguments) == 2
        told = capsys.readouterr()
        assert said in told.err
        assert told.err.count("\n") == 1
        assert told.out == ""
        assert written(project) == []


def test_a_wrong_command_line_is_told_in_one_line(project: Path, capsys):
    for arguments, said in [
        (["walk"], "invalid choice: 'walk'"),
        (["run", "02", "--timeout", "0"], "'0' is not a positive whole number"),
        (["run", "02", "-p", "epochs"], "expected 2 arguments"),
        (["run", "02", "--bogus"], "--bogus"),
    ]:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1


def test_a_notebook_whose_cell_disagrees_with_its_dataclass_is_refused(project: Path, capsys):
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


def test_a_failed_notebook_is_kept_as_failed_and_told_in_one_line(project: Path, set_cells, capsys):
    assert run() == 0
    good = (project / DONE[1]).read_bytes()
    capsys.readouterr()
    set_cells("1 / 0", RESULT)
    assert run() == 1
    assert capsys.readouterr().err == ("02_baseline failed in cell 4: ZeroDivisionError: division by zero\n")
    failed = "executed/cpu/02_baseline.failed.ipynb"
    assert written(project) == [failed, *DONE[1:]]
    assert "ZeroDivisionError" in (project / failed).read_text()
    assert (project / DONE[1]).read_bytes() == good
    assert len(reclib_records.read(project / "executed")) == 1
    assert cli.status() == [("02_baseline", "cpu", "failed", 1)]
    set_cells(RESULT)
    assert run() == 0
    assert written(project) == DONE
    assert cli.status() == [("02_baseline", "cpu", "done", 2)]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("import os; os._exit(9)", "DeadKernelError"),
        ("import time; time.sleep(60)", "CellTimeoutError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_dead_kernel_and_a_cell_over_its_time_fail_as_well(project: Path, set_cells, capsys, cell, said):
    set_cells(cell)
    assert run("--timeout", "3") == 1
    told = capsys.readouterr().err
    assert f"02_baseline failed in cell 4: {said}" in told
    assert (project / "executed/cpu/02_baseline.failed.ipynb").is_file()
    assert not (project / DONE[0]).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_kernel(project: Path, set_cells, number):
    set_cells("import os, pathlib, time\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(99)")
    process = subprocess.Popen(
        [sys.executable, "-m", "reclib", "run", "02", "--profile", "smoke"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hear_interrupts,
    )
    told = project / "notebooks/pid"
    _until(lambda: told.exists() and told.read_text() != "", 60)
    process.send_signal(number)
    assert process.wait(30) == 130
    assert process.stderr is not None
    assert process.stderr.read().strip().splitlines()[-1] == "interrupted"
    _until(lambda: not _alive(int(told.read_text())), 10)
    assert not (project / DONE[1]).exists()


def _hear_interrupts() -> None:
    """A shell starts background jobs with SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_claimed_device_that_is_not_here_is_said(project: Path, capsys, monkeypatch):
    hardware = pytest.importorskip("reclib.hardware")
    here = hardware.Card(type="cpu", name="Some CPU", label="cpu")
    monkeypatch.setattr(hardware, "probe", lambda: here)
    assert cli.device_label("l4") == "cpu"
    assert "l4 was asked for, Some CPU is here" in capsys.readouterr().out
    assert cli.device_label("auto") == "cpu"
    assert capsys.readouterr().out == ""


def test_status_tells_done_stale_recorded_and_missing(project: Path, set_cells, capsys):
    assert cli.status() == [("02_baseline", "cpu", "missing", 0)]
    assert run() == 0
    assert cli.status() == [("02_baseline", "cpu", "done", 1)]
    set_cells("changed = 1", RESULT)
    assert cli.status() == [("02_baseline", "cpu", "stale", 1)]
    (project / DONE[0]).unlink()
    capsys.readouterr()
    assert cli.main(["status"]) == 0
    assert capsys.readouterr().out.split()[-4:] == ["02_baseline", "cpu", "recorded", "1"]


def test_run_all_runs_what_is_here_and_collects_also_after_a_failure(
    project: Path, set_cells, monkeypatch, capsys
):
    collected = []
    monkeypatch.setattr(cli, "collect", lambda: collected.append(1) or [])
    assert cli.main(["run-all", "--profile", "smoke"]) == 0
    set_cells("raise ValueError('no')")
    assert cli.main(["run-all", "--profile", "smoke"]) == 1
    assert "02_baseline failed in cell 4: ValueError: no" in capsys.readouterr().err
    assert collected == [1, 1]


def test_collect_hands_the_newest_records_to_the_figures(project: Path, monkeypatch):
    from reclib.report import figures

    got: list = []
    monkeypatch.setattr(figures, "build", lambda rows, folder, problems: got.append((rows, folder)) or [])
    assert run() == 0
    assert run("--force") == 0
    assert cli.main(["collect"]) == 0
    ((records, folder),) = got
    assert len(records) == 1
    assert folder == project / "figures"


def test_a_folder_that_cannot_be_made_is_told_in_one_line(project: Path, capsys):
    (project / "executed").write_text("a file is in the way")
    assert run() == 1
    told = capsys.readouterr().err
    assert str(project / "executed") in told
    assert told.count("\n") == 1


def test_refreshing_a_notebook_that_fails_leaves_it_as_it_was(project: Path, set_cells, capsys):
    set_cells("1 / 0")
    file = project / "notebooks/02_baseline.ipynb"
    before = file.read_bytes()
    assert cli.main(["refresh", "02"]) == 1
    assert "failed in cell 3: ZeroDivisionError" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_params_prints_yaml_that_papermill_takes(project: Path, capsys):
    assert cli.main(["params", "02", "--profile", "full", "--gpu", "h100"]) == 0
    values = yaml.safe_load(capsys.readouterr().out)
    p = parameters.build("02_baseline", values)
    assert (p.gpu, p.compile_mode) == ("h100", "default")
    assert parameters.profile_of("02_baseline", p) == "full"


def test_normalising_drops_what_says_nothing_and_keeps_the_rest(tmp_path: Path):
    new = nbformat.v4
    cell = new.new_code_cell("1", metadata={"tags": ["parameters"], "papermill": {"a": "/home/x"}})
    banner = new.new_markdown_cell("error", metadata={"tags": ["papermill-error-cell-tag"]})
    cell.execution_count = 3
    cell.outputs = [new.new_output("stream", text="kept")]
    widgets = {"application/vnd.jupyter.widget-state+json": {"state": {}, "version_major": 2}}
    notebook = new.new_notebook(
        cells=[banner, cell],
        metadata={"papermill": {"input_path": "/home/x"}, "widgets": widgets, "reclib": {"a": 1}},
    )
    file = tmp_path / "a.ipynb"
    nbformat.write(notebook, file)
    runner.normalise(file)
    after = json.loads(file.read_text())
    assert after["metadata"] == {"reclib": {"a": 1}}
    (kept,) = after["cells"]
    assert kept["metadata"] == {"tags": ["parameters"]}
    assert (kept["execution_count"], kept["outputs"][0]["text"]) == (3, ["kept"])
    assert [file.name for file in tmp_path.iterdir()] == ["a.ipynb"]


def test_force_trains_again_instead_of_loading_what_was_trained(project: Path):
    kept = project / "runs/02_baseline/key/step-9"
    kept.mkdir(parents=True)
    (project / "runs/01_data_prep").mkdir()
    assert run() == 0
    assert kept.is_dir()
    assert run("--force") == 0
    assert not kept.exists()
    assert (project / "runs/01_data_prep").is_dir()
