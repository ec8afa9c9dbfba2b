"""The matrix of notebooks and devices: what a crash, a kill, a timeout or an interrupt leaves."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import RESULT, ROOT

from reclib import cli, hardware, records, runner, system
from reclib.config import InputError

pytest.importorskip("papermill")

# The result under the device that the run was started for: the fixture's card says cpu.
_HERE = """from reclib import hardware
import torch
device = hardware.resolve(p.gpu)
here = records.Run("02_baseline", p, hardware.device_card(device), {"name": "none", "fingerprint": "0"})"""
_RESULT = 'here.result("answer", {"threads": torch.get_num_threads()})'


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `python -m reclib` in a process of its own, as a shell in the foreground does."""
    started = []

    def begin(*arguments: str, **options: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "reclib", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
            **{"preexec_fn": _hear_interrupts} | options,  # type: ignore[call-overload]
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def descendants(project: Path) -> list[int]:
    """Return the live processes that were started for this project, ours apart: they inherit its root."""
    needle = f"RECLIB_RECORDS={project / 'executed'}\0".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and needle in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def matrix_of(start: Callable[..., subprocess.Popen], *more: str) -> tuple[int, str]:
    process = start("run-all", "--profile", "smoke", "--gpus", "cpu1,cpu2", *more)
    told, _ = process.communicate(timeout=240)
    return process.returncode, told


needs_two = pytest.mark.skipif(hardware.usable_cores() < 2, reason="needs two cores")


@pytest.mark.slow
@needs_two
def test_two_devices_of_one_cpu_run_one_after_another_and_each_has_its_threads(project, set_cells, start):
    mark = "import time\nopen(f'../{p.gpu}', 'w').write(str(time.time()))"
    set_cells(_HERE, mark, _RESULT, "import time\nopen(f'../{p.gpu}.end', 'w').write(str(time.time()))")
    code, told = matrix_of(start)
    assert code == 0, told
    rows = {row["label"]: row for row in records.read(project / "executed")}
    assert {label: row["metrics"]["threads"] for label, row in rows.items()} == {"cpu1": 1, "cpu2": 2}
    assert {label: row["device"]["threads"] for label, row in rows.items()} == {"cpu1": 1, "cpu2": 2}
    assert {label: row["claimed"] for label, row in rows.items()} == {"cpu1": "cpu1", "cpu2": "cpu2"}
    times = [float((project / name).read_text()) for name in ("cpu1", "cpu1.end", "cpu2", "cpu2.end")]
    assert times == sorted(times)
    assert [row[1:3] for row in cli.status()] == [("cpu1", "done"), ("cpu2", "done")]
    code, told = matrix_of(start)
    assert code == 0
    assert told.count("finished before, skipped") == 2
    assert (project / "figures/index.html").is_file()


FAULTS = {
    "1 / 0": "ZeroDivisionError: division by zero",
    "import os; os.kill(os.getpid(), 9)": "its kernel was killed",
    "import os, time; os.kill(os.getppid(), 9); time.sleep(30)": (
        "killed by SIGKILL: the same command runs it again"
    ),
    "import time; time.sleep(200)": "it took longer than --timeout allows",
}


@pytest.mark.slow
@needs_two
def test_a_cell_that_does_not_get_through_leaves_the_others(project, set_cells, start):
    """A crash, a killed kernel, a killed process and a timeout on one device, beside another that is done."""
    fault = project / "fault"
    read = "import pathlib\nfault = pathlib.Path('../fault')"
    set_cells(_HERE, f"{read}\nif p.gpu == 'cpu1' and fault.exists():\n    exec(fault.read_text())", _RESULT)
    for cell, said in FAULTS.items():
        fault.write_text(cell)
        code, told = matrix_of(start, *(("--timeout", "25") if "200" in cell else ()))
        assert code == 1
        (line,) = [line for line in told.splitlines() if line.startswith("02_baseline") and "cpu1 " in line]
        assert said in line
        assert [row["label"] for row in records.read(project / "executed")] == ["cpu2"]
        states = {label: state for _, label, state, _ in cli.status()}
        assert states == {"cpu1": "failed", "cpu2": "done"}
        until(lambda: not descendants(project), 10)
    fault.unlink()
    code, told = matrix_of(start)
    assert code == 0, told
    assert "[cpu2] 02_baseline (cpu2): finished before, skipped" in told
    assert sorted(row["label"] for row in records.read(project / "executed")) == ["cpu1", "cpu2"]


@pytest.mark.slow
@needs_two
@pytest.mark.parametrize(
    ("moment", "number"),
    [("early", signal.SIGTERM), ("kernel starts", signal.SIGINT), ("in a cell", signal.SIGKILL)],
    ids=["early", "kernel starts", "in a cell"],
)
def test_stopped_at_any_time_it_leaves_no_process_and_goes_on(project, set_cells, start, moment, number):
    sleeper = "import pathlib, time\nif not pathlib.Path('../mended').exists():\n    time.sleep(99)"
    set_cells("pathlib = __import__('pathlib')\npathlib.Path('../begun').touch()", sleeper, _HERE, _RESULT)
    process = start("run-all", "--profile", "smoke", "--gpus", "cpu1")
    reached = {
        "early": project / ".stamps",
        "kernel starts": project / "executed/cpu1/02_baseline.failed.ipynb",
        "in a cell": project / "begun",
    }
    until(reached[moment].exists, 60)
    process.send_signal(number)
    process.wait(45)
    until(lambda: not descendants(project), 30)
    assert records.read(project / "executed") == []
    assert not system.under_way("cpu1", "02_baseline")
    (project / "mended").touch()
    process = start("run-all", "--profile", "smoke", "--gpus", "cpu1")
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert len(records.read(project / "executed")) == 1


def test_two_at_once_queue_and_the_second_finds_it_done(project, set_cells, start):
    set_cells(
        "import pathlib, time\npathlib.Path('../begun').touch()",
        "while not pathlib.Path('../go').exists():\n    time.sleep(0.1)",
        RESULT,
    )
    one = start("run-all", "--profile", "smoke")
    until((project / "begun").exists, 60)
    assert {row[2] for row in cli.status()} == {"running"}
    two = start("run-all", "--profile", "smoke")
    assert two.stdout is not None
    said = two.stdout.readline()
    assert said == "waiting: another run of this checkout holds cpu-02_baseline\n"
    (project / "go").touch()
    told = [process.communicate(timeout=120)[0] for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), told
    assert "finished before, skipped" in told[1]
    assert len(records.read(project / "executed")) == 1


@pytest.mark.parametrize("limit", ["the record", "the notebook"])
def test_a_full_disk_names_the_cell_and_what_to_do_and_leaves_nothing_half_written(
    project, set_cells, start, limit
):
    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    big = "run.result('answer', {'a': 1}, series={'b': list(range(20000))})" if limit == "the record" else ""
    set_cells(big or "print('x' * 100_000)", RESULT)
    process = start("run", "02", "--profile", "smoke", preexec_fn=no_large_files)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 1, told
    last = told.strip().splitlines()[-1]
    assert "02_baseline failed in cell 4" in last
    assert "the disk is full or a limit is reached: free some space" in last
    assert records.read(project / "executed") == []
    assert not (project / "executed/cpu/02_baseline.ipynb").exists()
    assert not list(project.rglob("*.partial"))


def _can_mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    return bool(shutil.which("mount")) and subprocess.run(command, capture_output=True).returncode == 0


def test_a_disk_that_is_really_full(project, set_cells, start):
    folder = project / "executed"
    folder.mkdir()
    if not _can_mount(folder):
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        (folder / "filler").write_bytes(b"x" * 20_000)
        set_cells("run.result('answer', {'a': 1}, series={'b': list(range(20000))})")
        process = start("run", "02", "--profile", "smoke")
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "No space left" in told
        assert "02_baseline failed in cell 4" in told
        assert "free some space" in told
        assert records.read(folder) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_what_ended_a_kernel_is_told_apart(tmp_path):
    assert "the system killed a process for memory: lower batch_size" in system.of_death(-9, 1)
    assert "by somebody or for memory" in system.of_death(-9, 0)
    assert "SIGSEGV" in system.of_death(-11, 0)
    assert "exit code 3" in system.of_death(3, 0)
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\noom 4\noom_kill 3\n")
    assert system.memory_kills((tmp_path / "none", counter)) == 3
    assert system.memory_kills((tmp_path / "none",)) == 0
    assert "out of memory" in system.of_error("torch.OutOfMemoryError: CUDA out of memory. Tried")


GPUS = [("0", "a100"), ("1", "a100"), ("GPU-7f", "l4"), ("3", "other")]


def test_devices_by_label():
    found = runner.slots("all", GPUS)
    assert [(slot.label, slot.visible) for slot in found] == [(own, visible) for visible, own in GPUS]
    assert [slot.visible for slot in runner.slots("a100,cpu2", GPUS)] == ["0", "1", ""]
    assert runner.slots("cpu1,cpu1", []) == [runner.Slot("cpu1", "")]
    for asked, said in (("v100", "no visible GPU"), ("rtx", "no device label"), ("auto", "no device label")):
        with pytest.raises(InputError, match=said):
            runner.slots(asked, GPUS)


def test_gpus_of_one_label_share_its_notebooks_and_run_at_the_same_time(tmp_path):
    """With processes that stand for cells: each says which device it sees, and when."""
    script = (
        "import os, sys, time; b = time.time(); time.sleep(0.5); "
        f"open(os.path.join({str(tmp_path)!r}, sys.argv[1] + '-' + sys.argv[2]), 'w').write("
        "f\"{os.environ['CUDA_VISIBLE_DEVICES'] or 'cpu'} {b} {time.time()}\")"
    )
    devices = runner.slots("a100,l4,cpu1", GPUS)
    cells = runner.Matrix(["01", "02", "03"], devices, lambda n, la: [sys.executable, "-c", script, n, la])
    assert set(cells.run().values()) == {"done"}
    ran = {file.name: file.read_text().split() for file in tmp_path.iterdir()}
    assert len(ran) == 9
    assert {ran[f"{n}-a100"][0] for n in ("01", "02", "03")} == {"0", "1"}
    assert {where for name, (where, *_) in ran.items() if name.endswith("l4")} == {"GPU-7f"}
    for one, (where, begun, ended) in ran.items():
        for other, (there, start, _) in ran.items():
            if one != other and where == there:
                assert not float(begun) <= float(start) < float(ended), "two jobs on one device"
    last = max(float(ended) for name, (_, _, ended) in ran.items() if not name.endswith("cpu1"))
    assert min(float(begun) for name, (_, begun, _) in ran.items() if name.endswith("cpu1")) >= last


def test_a_gpu_and_the_cores_are_not_timed_together(project, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with (
        system.device_lock("a100"),
        (project / ".stamps/cores.lock").open() as file,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_cpu_label_needs_its_cores():
    assert hardware.cpu_card("cpu2", cores=1, threads=1).label == "cpu"
    assert hardware.cpu_card("cpu2", cores=8, threads=8).threads == 2
    assert hardware.cpu_card("cpu", cores=8, threads=8).threads == 8


def a_row(**changes: object) -> dict:
    about = {"card": {"label": "cpu"}, "profile": "quick", "params": {}, "own_params": {}, "params_hash": "x"}
    whole = records.row("02_baseline", "x", {}, **about, data=None, made_by={})
    return whole | {"time": "2026-01-01T00:00:00+00:00"} | changes


def test_records_of_several_machines_merge_by_copying_folders(tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    for root, values in ((here, (1, 2)), (there, (2, 3))):
        for value in values:
            records.append(root / "cpu/results.jsonl", a_row(value=value))
    records.append(there / "cpu/grids/ml.jsonl", a_row(value=4))
    with (there / "cpu/results.jsonl").open("a") as file:
        file.write('{"half": ')
    shutil.copytree(there / "cpu", here / "cpu/other-machine")
    assert sorted(row["value"] for row in records.read(here)) == [1, 2, 3, 4]
    assert "other-machine/results.jsonl:3: unfinished line: skipped" in capsys.readouterr().err
    shutil.rmtree(here / "cpu/other-machine")
    before = (here / "cpu/results.jsonl").read_text()
    assert records.merge(there, here) == (2, 1, 0)
    assert (here / "cpu/results.jsonl").read_text().startswith(before)
    assert sorted(row["value"] for row in records.read(here)) == [1, 2, 3, 4]
    assert records.merge(there, here) == (0, 3, 0)
    with pytest.raises(InputError, match="no records there"):
        records.merge(tmp_path / "nowhere", here)
    (there / "cpu/results.jsonl").write_text("broken\n" + before)
    with pytest.raises(InputError, match="JSON is malformed"):
        records.merge(there, here)
