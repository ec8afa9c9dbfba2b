"""The command line: run the notebooks, see what is done, rebuild the figures; train and plan models.

    reclib run 02 --profile quick       one notebook (without installation: python -m reclib ...)
    reclib run 05 -f params/adaptation-beauty.yaml    with the parameters of a file
    reclib run-all --gpus all           all of them on every visible GPU (or --gpus cpu1,cpu2)
    reclib params 02 --profile full     parameters as YAML, for `papermill -f`

All input is checked before a kernel starts. What this checkout has finished is skipped (stamps that git
ignores). Exit codes: 0 done, 1 a notebook failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from reclib import parameters, records, runner, system
from reclib.config import CPU_LABELS, GPU_LABELS, InputError, nearest, typed
from reclib.runner import Job
from reclib.system import Parser, exit_code


def present() -> list[str]:
    """Return the names of the notebooks that are here and can run in batch, in order."""
    files = sorted(system.notebooks().glob("[0-9][0-9]_*.ipynb"))
    return [file.stem for file in files if file.stem in parameters.NOTEBOOKS]


def find(given: str) -> str:
    """Return the notebook that `given` names: `02`, `02_baseline` or the path of the file."""
    here = present()
    wanted = Path(given).name.removesuffix(".ipynb")
    found = [name for name in here if name == wanted or name.split("_")[0] == wanted]
    if not found:
        near = nearest(wanted, here)
        raise InputError(f"unknown notebook {given!r}{near}; here: {', '.join(here) or 'none'}")
    return found[0]


def plan(
    notebook: str, profile: str, gpu: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Job:
    """Resolve and check all that one run depends on; raise `InputError` before anything is touched."""
    given = dict(overrides or {})
    if gpu is not None:
        given = {"gpu": gpu} | given
    checked = parameters.build(notebook, parameters.profile(notebook, profile) | given)
    runner.check_cell(system.notebooks() / f"{notebook}.ipynb", parameters.names(notebook))
    return Job(notebook, parameters.values(checked), device_label(checked.gpu))


def device_label(claimed: str) -> str:
    """Return the label of the device that a run with the label `claimed` uses here."""
    from reclib import hardware  # imports torch, which nothing else here needs

    device = hardware.find(claimed)
    if not device.is_claimed:
        print(
            f"gpu: {claimed} was asked for, {device.card.name} is here: "
            f"what is measured is recorded under {device.label!r}"
        )
    return device.label


def run(job: Job, *, force: bool = False, cell_seconds: int | None = None) -> bool:
    """Execute a job unless this checkout has finished it; return whether it ran."""

    def tell(line: str) -> None:
        print(line, flush=True)

    with system.job_lock(job.label, job.notebook, tell):
        if not force and job.is_finished():
            tell(f"{job.notebook} ({job.label}): finished before, skipped; --force runs it again")
            return False
        with system.device_lock(job.label, tell):
            _execute(job, force, cell_seconds, tell)
    return True


def _execute(job: Job, force: bool, cell_seconds: int | None, tell: runner.Tell) -> None:
    tell(f"{job.notebook} ({job.label}): running")
    identity = job.identity()  # before: what is edited during the run was not run
    began = time.perf_counter()
    job.stamp.unlink(missing_ok=True)
    if force:  # a finished training run would only be loaded
        shutil.rmtree(system.runs() / job.notebook, ignore_errors=True)
    source = system.notebooks() / f"{job.notebook}.ipynb"
    runner.execute(source, job.output, job.values, cell_seconds=cell_seconds, tell=tell)
    job.finish(identity)
    tell(f"{job.notebook} ({job.label}): done in {time.perf_counter() - began:.0f} s")


def refresh(notebook: str) -> None:
    """Run a notebook with its defaults and store the outputs in it: what its tests compare with.

    Its records go to a temporary folder; a notebook that fails is left as it was.
    """
    file = system.notebooks() / f"{notebook}.ipynb"
    runner.check_cell(file, parameters.names(notebook))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / file.name
        runner.execute(file, output, {}, records=Path(folder) / "records")
        with system.replacing(file) as fresh:
            shutil.copyfile(output, fresh)
    print(f"{notebook}: outputs stored")


def collect() -> list[Path]:
    """Rebuild the figures from the newest record of everything; return the files written."""
    from reclib.report import figures

    with system.figures_lock():
        return figures.collect(system.executed(), system.figures())


def status() -> list[tuple[str, str, str, int]]:
    """Return (notebook, label, state, number of records) for each notebook and device with anything.

    States: running, done (by this checkout, with this code), stale (code or parameters files changed since),
    recorded (an executed notebook that this checkout did not make), failed (or not through), missing.
    """
    rows = records.read(system.executed())
    folders = {file.parent.name for file in system.executed().glob("*/*.ipynb")}
    labels = folders | {row["label"] for row in rows} or {"cpu"}
    return [
        (
            notebook,
            label,
            _state(notebook, label),
            sum(row["notebook"] == notebook and row["label"] == label for row in rows),
        )
        for notebook in present()
        for label in sorted(labels)
    ]


def _state(notebook: str, label: str) -> str:
    if system.under_way(label, notebook):
        return "running"
    job = Job.last(notebook, label)
    if runner.failed_path(job.output).is_file():
        return "failed"
    if not job.output.is_file():
        return "missing"
    if not job.stamp.is_file():
        return "recorded"
    return "done" if job.is_finished() else "stale"


def _run_command(given: argparse.Namespace) -> int:
    everything = given.command == "run-all"
    names = present() if everything else [find(name) for name in given.notebook]
    if not names:
        raise InputError(f"no notebooks in {system.notebooks()}")
    if everything:
        stated = parameters.stated(parameters.known_profile(given.profile))
        names = [name for name in names if name in stated]
    if everything and given.gpus:
        return _matrix_command(given, names)
    overrides = {} if everything or given.f is None else parameters.from_file(given.f)
    overrides |= {name: typed(value) for name, value in given.p or []}
    jobs = [plan(name, given.profile, given.gpu, overrides) for name in names]
    failures = 0
    for job in jobs:
        try:
            run(job, force=given.force, cell_seconds=given.timeout)
        except runner.NotebookFailed as failure:
            print(failure, file=sys.stderr)
            failures += 1
    if everything:
        _collect_command(given)
    return 1 if failures else 0


def _matrix_command(given: argparse.Namespace, names: Sequence[str]) -> int:
    """Run all notebooks on several devices, then collect; say how each cell of the matrix ended."""
    if given.gpu:
        raise InputError("--gpu names one device and --gpus several: give one of them")
    wants_gpus = set(given.gpus.split(",")) - set(CPU_LABELS)
    devices = runner.slots(given.gpus, runner.visible_gpus() if wants_gpus else [])
    for name in names:  # a wrong parameters file stops here, not in every process
        for slot in devices:
            gpu = slot.label if slot.label in GPU_LABELS else "auto"
            parameters.build(name, parameters.profile(name, given.profile) | {"gpu": gpu})

    def command(notebook: str, label: str) -> list[str]:
        gpu = label if label in GPU_LABELS else "auto"
        base = [sys.executable, "-m", "reclib", "run", notebook, "--gpu", gpu]
        base += ["--profile", given.profile]
        return [*base, *(["--force"] if given.force else []), *_if_given("--timeout", given.timeout)]

    ended = runner.Matrix(names, devices, command).run()
    for (notebook, label), said in sorted(ended.items()):
        print(f"{notebook:<24}{label:<8}{said}", file=sys.stdout if said == "done" else sys.stderr)
    _collect_command(given)
    return 0 if set(ended.values()) <= {"done"} else 1


def _if_given(option: str, value: int | None) -> list[str]:
    return [] if value is None else [option, str(value)]


def _merge_command(given: argparse.Namespace) -> int:
    for folder in given.folder:
        new, known, files = records.merge(folder, system.executed())
        print(f"{folder.name}: {new} new records, {known} known before, {files} files copied")
    return 0


def _refresh_command(given: argparse.Namespace) -> int:
    for name in [find(name) for name in given.notebook]:
        try:
            refresh(name)
        except runner.NotebookFailed as failure:
            print(failure, file=sys.stderr)
            return 1
    return 0


def _collect_command(given: argparse.Namespace) -> int:
    written = collect()
    print(f"{len(written)} files in {system.figures().name}/, start with index.html")
    return 0


def _status_command(given: argparse.Namespace) -> int:
    print(f"{'notebook':<24}{'device':<8}{'state':<10}{'records':>7}")
    for notebook, label, state, count in status():
        print(f"{notebook:<24}{label:<8}{state:<10}{count:>7}")
    return 0


def _params_command(given: argparse.Namespace) -> int:
    notebook = find(given.notebook)
    values = parameters.profile(notebook, given.profile)
    values |= {"gpu": given.gpu} if given.gpu else {}
    checked = parameters.build(notebook, values)
    if checked.gpu != "auto":  # auto is for the machine that runs it to decide
        checked = parameters.fill(checked, checked.gpu)
    print(yaml.safe_dump(parameters.values(checked), sort_keys=False, default_flow_style=None), end="")
    return 0


def _seconds(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


# Commands of the library and of the long experiments: a function that takes the arguments, and what it does.
# Imported when called, so that `python -m reclib status` needs no torch.
COMMANDS = {
    "data": ("data.prepare:data_main", "fetch, prepare and describe datasets"),
    "fit": ("train.fit:fit_main", "train one model"),
    "recommend": ("train.saving:recommend_main", "recommend items after a history"),
    "grid": ("experiments.grids:grid_main", "train the runs of an experiment file"),
    "score": ("experiments.grids:score_main", "score the final runs of an experiment file"),
    "predict": ("experiments.scaling:predict_main", "predict the loss of the largest size from smaller ones"),
    "tune": ("experiments.scaling:tune_main", "search settings on validation"),
    "plan": ("cost.planner:plan_main", "predict time, memory and price of a run"),
    "check": ("experiments.comparison:check_main", "check that this device computes right"),
    "device": ("hardware:device_main", "describe the device that is here"),
    "sizes": ("model.bert4rec:sizes_main", "count the parameters of every size"),
    "pictures": ("report.figures:pictures_main", "draw PNGs of the main figures"),
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m reclib",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():  # `entry` hands these on: they stand here for the help
        commands.add_parser(name, help=text, add_help=False)
    common = Parser(add_help=False)
    common.add_argument("--profile", default="quick", help=f"one of {', '.join(parameters.PROFILES)}")
    common.add_argument("--gpu", help=f"device label, a claim: one of {', '.join(GPU_LABELS)}")
    for name, text in (("run", "run notebooks"), ("run-all", "run all notebooks, then collect")):
        command = commands.add_parser(name, help=text, parents=[common])
        if name == "run":
            command.add_argument("notebook", nargs="+", help="for example 02")
            command.add_argument("-f", type=Path, metavar="FILE", help="parameters as YAML, on the profile's")
            command.add_argument("-p", nargs=2, action="append", metavar=("NAME", "VALUE"), help="override")
        else:
            command.add_argument("--gpus", help="devices that share the work: all, or labels: cpu1,cpu2")
        command.add_argument("--force", action="store_true", help="run what is finished as well")
        command.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="longest for a cell")
        command.set_defaults(act=_run_command, p=None)
    commands.add_parser("status", help="where it stands").set_defaults(act=_status_command)
    commands.add_parser("collect", help="rebuild figures/").set_defaults(act=_collect_command)
    command = commands.add_parser("merge", help="take the records of other machines' folders")
    command.add_argument("folder", nargs="+", type=Path, help="for example other/executed")
    command.set_defaults(act=_merge_command)
    command = commands.add_parser("params", help="print parameters as YAML", parents=[common])
    command.add_argument("notebook", help="for example 02")
    command.set_defaults(act=_params_command)
    command = commands.add_parser("refresh", help="store new outputs in a notebook")
    command.add_argument("notebook", nargs="+", help="for example 02")
    command.set_defaults(act=_refresh_command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        return given.act(given)
    except InputError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def entry(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m reclib ARGUMENTS` and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else ""
    if name not in COMMANDS or name == "data":
        # Temporary files and kernels are cleaned up. Not for `fit`: a process of a group must die at once.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        system.hold()
    if name not in COMMANDS:
        return exit_code(lambda: main(given))
    module, _, function = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(f"reclib.{module}"), function)
    return exit_code(lambda: command(given[1:]))
