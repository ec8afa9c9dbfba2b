"""Notebooks on several devices: what a crash, a kill, a timeout or an interrupt leaves."""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import RESULT, make_notebook, refused, rows_of, until

from reclib import cli, hardware, records, runner, system
from reclib.runner import Job, Slot

pytest.importorskip("papermill")


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `python -m reclib` in a process of its own, as a shell in the foreground does."""
    started = []

    def begin(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "reclib", *arguments, "--profile", "smoke"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        group = {"process_group": 0, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        started.append(subprocess.Popen(command, **pipes, **group))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def descendants(project: Path) -> list[str]:
    """Return the live processes that were started for this project, ours apart: they inherit its root."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            of_project = f"RECLIB_ROOT={project}\0".encode() in (folder / "environ").read_bytes()
            processes += [folder.name] if of_project and not is_zombie else []
    return [process for process in processes if process != str(os.getpid())]


@pytest.mark.slow
@pytest.mark.skipif(hardware.usable_cores() < 2, reason="needs two cores")
def test_two_devices_of_one_cpu_run_one_after_another_and_each_fails_for_itself(project, set_cells, start):
    def run() -> tuple[int, str]:
        process = start("run-all", "--gpus", "cpu1,cpu2")
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def states() -> dict[str, str]:
        return {label: state for _, label, state, _ in cli.status()}

    set_cells(
        "from reclib import hardware\nimport pathlib, time, torch\ndevice = hardware.resolve(p.gpu)",
        "mark = pathlib.Path('..') / p.gpu\nmark.write_text(str(time.time()))",
        "if p.gpu == 'cpu1' and pathlib.Path('../fault').exists():\n    1 / 0",
        "card, data = hardware.device_card(device), {'name': 'none', 'fingerprint': '0'}",
        "here = records.Run('02_baseline', p, card, data)\nthreads = torch.get_num_threads()",
        "here.result('answer', {'threads': threads})",
        "mark.with_suffix('.end').write_text(str(time.time()))",
    )
    (project / "fault").touch()
    code, output = run()
    assert code == 1
    assert "[1/2] 02_baseline (cpu1) failed in cell 6: ZeroDivisionError: division by zero\n" in output
    assert "1 of 2 failed: [1/2] 02_baseline (cpu1)\n" in output
    assert states() == {"cpu1": "failed", "cpu2": "done"}
    begun, ended = (float((project / name).read_text()) for name in ("cpu1", "cpu2.end"))
    assert begun < float((project / "cpu2").read_text()) < ended
    until(lambda: not descendants(project), 10)
    (project / "fault").unlink()
    code, output = run()
    assert code == 0, output
    assert "[2/2] 02_baseline (cpu2) finished before, skipped" in output
    assert states() == {"cpu1": "done", "cpu2": "done"}
    for label, row, threads in zip(("cpu1", "cpu2"), rows_of(project), (1, 2), strict=True):
        assert (row["label"], row["claimed"]) == (label, label)
        assert row["metrics"]["threads"] == row["device"]["threads"] == threads
    assert (project / "runs/figures/index.html").is_file()


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("begun", signal.SIGINT),  # in a cell
        pytest.param(".stamps", signal.SIGTERM, marks=pytest.mark.slow),  # early
        pytest.param("runs/executed/cpu1", signal.SIGINT, marks=pytest.mark.slow),  # as the kernel starts
        pytest.param("begun", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_stopped_at_any_time_it_leaves_no_process_and_goes_on(project, set_cells, start, moment, number):
    sleeper = "if not pathlib.Path('../mended').exists():\n    time.sleep(99)"
    set_cells("import pathlib, time\npathlib.Path('../begun').touch()", sleeper, RESULT)
    process = start("run-all", "--gpus", "cpu1")
    until((project / moment).exists, 60)
    process.send_signal(number)
    output, _ = process.communicate(timeout=45)
    if number != signal.SIGKILL:
        assert process.returncode == 130
        assert output.splitlines()[-1] == "interrupted"
    until(lambda: not descendants(project), 30)
    assert rows_of(project) == []
    assert not system.is_locked("cpu1-02_baseline")
    (project / "mended").touch()
    assert start("run-all", "--gpus", "cpu1").wait(120) == 0
    assert len(rows_of(project)) == 1


@pytest.mark.slow
def test_two_at_once_queue_and_the_second_finds_it_done(project, set_cells, start):
    loop = "while not pathlib.Path('../go').exists():\n    time.sleep(0.1)"
    set_cells("import pathlib, time\npathlib.Path('../begun').touch()", loop, RESULT)
    first = start("run-all")
    until((project / "begun").exists, 60)
    assert {row[2] for row in cli.status()} == {"running"}
    second = start("run", "02")
    _, line = second.stdout.readline(), second.stdout.readline()
    assert line.endswith("waiting: another run of this checkout holds cpu-02_baseline\n")
    (project / "go").touch()
    _, output = (process.communicate(timeout=120)[0] for process in (first, second))
    assert (first.returncode, second.returncode) == (0, 0), output
    assert "finished before, skipped" in output
    assert len(rows_of(project)) == 1


def test_what_ended_a_kernel_is_told_apart(tmp_path):
    counter = tmp_path / "memory.events"
    counter.write_text("low 0\noom 4\noom_kill 3\n")
    kills = system.memory_kills((tmp_path / "none", counter))
    assert kills == 3
    assert "the system killed a process for memory: lower batch_size" in system.of_death(-9, kills)
    assert "by somebody or for memory" in system.of_death(-9, system.memory_kills((tmp_path / "none",)))
    assert "out of memory" in system.of_error("torch.OutOfMemoryError: CUDA out of memory. Tried")


GPUS = [("0", "a100"), ("1", "a100"), ("GPU-7f", "l4"), ("3", "other")]


def test_devices_by_label():
    devices = runner.slots("all", GPUS)
    assert [(slot.label, slot.visible) for slot in devices] == [(own, visible) for visible, own in GPUS]
    assert [slot.visible for slot in runner.slots("a100,cpu2", GPUS)] == ["0", "1", ""]
    assert runner.slots("cpu1,cpu1", []) == [Slot("cpu1", "")]
    for labels, part in (("v100", "no visible GPU"), ("rtx", "no device label"), ("auto", "no device label")):
        assert part in refused(None, runner.slots, labels, GPUS)


def test_gpus_of_one_label_share_its_notebooks_and_a_device_has_one_at_a_time():
    ran: list[tuple[Job, str | None, float, float]] = []

    def work(job: Job, slot: Slot) -> None:
        begun = time.monotonic()
        time.sleep(0.1)
        ran.append((job, slot.visible, begun, time.monotonic()))

    jobs = [Job(name, {}, label) for label in ("a100", "l4", "cpu1") for name in ("01", "02", "03")]
    runner.run_all(jobs, runner.slots("a100,l4,cpu1", GPUS), work)
    assert sorted((job.notebook, job.label) for job, *_ in ran) == sorted((j.notebook, j.label) for j in jobs)
    on = {label: {visible for job, visible, *_ in ran if job.label == label} for label in ("a100", "l4")}
    assert on == {"a100": {"0", "1"}, "l4": {"GPU-7f"}}
    for (_, device, begun, _), (_, other, *times) in itertools.permutations(ran, 2):
        assert device != other or not times[0] <= begun < times[1], "two jobs on one device"
    of_cpu = min(begun for job, _, begun, _ in ran if job.label == "cpu1")
    assert of_cpu >= max(end for job, *_, end in ran if job.label != "cpu1")


def test_kernels_of_two_gpus_run_at_the_same_time_and_see_their_own(tmp_path):
    meet = """import os, pathlib, time
own, other = os.environ["CUDA_VISIBLE_DEVICES"], {"0": "1", "1": "0"}
pathlib.Path(f"here-{own}").touch()
while not pathlib.Path(f"here-{other[own]}").exists():
    time.sleep(0.05)
print("sees", own)"""
    make_notebook(tmp_path / "both.ipynb", {"x": 1}, [meet])

    def work(job: Job, slot: Slot) -> None:
        source, output = tmp_path / "both.ipynb", tmp_path / f"{slot.visible}.ipynb"
        runner.execute(source, output, {}, gpu=slot.visible, cell_seconds=60, tell=lambda line: None)

    runner.run_all([Job("a", {}, "a100"), Job("b", {}, "l4")], [Slot("a100", "0"), Slot("l4", "1")], work)
    for device in ("0", "1"):
        assert f"sees {device}" in (tmp_path / f"{device}.ipynb").read_text()
        assert (tmp_path / f"here-{device}").exists()  # where the notebooks lie


def test_a_gpu_and_the_cores_are_not_timed_together(project):
    with system.device_lock("a100", gpu="1"):
        for name in ("cores", "gpu-1"):
            with (project / f".stamps/{name}.lock").open() as file:
                assert not system.flock(file)
                assert system.flock(file, shared=True) == (name == "cores")  # as another GPU does


def test_records_of_several_machines_merge_by_copying_folders(tmp_path, capsys):
    def append(root: Path, value: int, file: str = "cpu/results.jsonl") -> None:
        about = {"params": {}, "own_params": {}, "profile": "quick", "params_hash": "x"}
        row = records.row("02_baseline", "x", {}, card={"label": "cpu"}, **about, data=None, made_by={})
        records.append(root / file, row | {"time": "2026-01-01T00:00:00+00:00", "value": value})

    def values() -> list[int]:
        return sorted(row["value"] for row in records.read(here))

    here, there = tmp_path / "here", tmp_path / "there"
    for root, value in ((here, 1), (here, 2), (there, 2), (there, 3)):
        append(root, value)
    append(there, 4, "cpu/grids/ml.jsonl")
    with (there / "cpu/results.jsonl").open("a") as file:
        file.write('{"half": ')
    shutil.copytree(there / "cpu", here / "cpu/other-machine")
    assert values() == [1, 2, 3, 4]
    assert "other-machine/results.jsonl:3: unfinished line: skipped" in capsys.readouterr().err
    shutil.rmtree(here / "cpu/other-machine")
    before = (here / "cpu/results.jsonl").read_text()
    for counts in ((2, 1, 0), (0, 3, 0)):
        assert records.merge(there, here) == counts
        assert (here / "cpu/results.jsonl").read_text().startswith(before)
        assert values() == [1, 2, 3, 4]
    assert "no records there" in refused(None, records.merge, tmp_path / "nowhere", here)
