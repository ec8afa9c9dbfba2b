"""The command line: run notebooks, show their state, rebuild the figures; train and plan models.

    reclib run 02 --profile quick       one notebook (without installation: python -m reclib ...)
    reclib run 05 -f params/adaptation-beauty.yaml    with the parameters of a file
    reclib run-all --gpus all           all of them on every visible GPU (or --gpus cpu1,cpu2)
    reclib params 02 --profile full     parameters as YAML, for `papermill -f`

All input is checked before a kernel starts; runs that this checkout has finished are skipped. Records go to
runs/executed/ and figures to runs/figures/, beside those of the repository; git ignores both. With --commit
they go into the repository's executed/ and figures/.
Exit codes: 0 done, 1 a notebook failed, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from reclib import hardware, parameters, records, runner, system
from reclib.config import CPU_LABELS, GPU_LABELS, InputError, nearest, typed
from reclib.runner import Job, Slot
from reclib.system import Parser, exit_code


def present() -> list[str]:
    """Return the names of the notebooks of this checkout, in order."""
    files = sorted(system.notebooks().glob("[0-9][0-9]_*.ipynb"))
    return [file.stem for file in files if file.stem in parameters.NOTEBOOKS]


def find(name_or_path: str) -> str:
    """Return the notebook named by `02`, `02_baseline` or the path of its file."""
    notebooks = present()
    stem = Path(name_or_path).name.removesuffix(".ipynb")
    for name in notebooks:
        if stem in (name, name.split("_")[0]):
            return name
    near = nearest(stem, notebooks)
    raise InputError(f"unknown notebook {name_or_path!r}{near}; here: {', '.join(notebooks) or 'none'}")


def device_label(claimed: str) -> str:
    """Return the label of the device that a run under the label `claimed` uses here."""
    device = hardware.find(claimed)
    if not device.is_claimed:
        print(
            f"gpu: {claimed} was asked for, {device.card.name} is here: "
            f"what is measured is recorded under {device.label!r}"
        )
    return device.label


# -- running notebooks ---------------------------------------------------------------------------------------


def plan(notebook: str, profile: str, overrides: dict[str, Any], label: str | None = None) -> Job:
    """Check the parameters and the notebook of a run and return its job; raise `InputError` for bad input.

    `overrides` replace parameters of the profile; `label` is that of the device, None to find it.
    """
    checked = parameters.build(notebook, parameters.profile(notebook, profile) | overrides)
    runner.check_cell(system.notebooks() / f"{notebook}.ipynb", parameters.names(notebook))
    return Job(notebook, parameters.values(checked), label or device_label(checked.gpu))


def _run_command(options: argparse.Namespace) -> int:
    if options.gpu and options.gpus:
        raise InputError("--gpu names one device and --gpus several: give one of them")
    if options.command == "run":
        names = [find(name) for name in options.notebook]
    else:
        stated = parameters.stated(parameters.known_profile(options.profile))
        names = [name for name in present() if name in stated]
    if not names:
        raise InputError(f"no notebooks in {system.notebooks()}")
    overrides = {"gpu": options.gpu} if options.gpu else {}
    overrides |= parameters.from_file(options.f) if options.f else {}
    overrides |= {name: typed(value) for name, value in options.p or []}
    if options.gpus:
        only_cpus = set(options.gpus.split(",")) <= set(CPU_LABELS)
        devices = runner.slots(options.gpus, [] if only_cpus else runner.visible_gpus())
        labels = dict.fromkeys(slot.label for slot in devices)
        claims = {label: {"gpu": label if label in GPU_LABELS else "auto"} for label in labels}
        jobs = [plan(name, options.profile, claims[label], label) for label in labels for name in names]
    else:
        jobs = [plan(name, options.profile, overrides) for name in names]
        devices = [Slot(label) for label in dict.fromkeys(job.label for job in jobs)]
    for job in jobs if options.commit else []:
        _demand_study_data({"params": job.values, "profile": options.profile})
    for job in jobs:
        _demand_dataset(job)
    failed: list[str] = []

    def work(job: Job, slot: Slot) -> None:
        name = f"[{jobs.index(job) + 1}/{len(jobs)}] {job.notebook} ({job.label})"
        try:
            _run_job(name, job, slot, options)
        except Exception as error:  # the other jobs go on
            expected = isinstance(error, runner.NotebookFailed | InputError | OSError)
            failed.append(name)
            print(f"{name} {'' if expected else type(error).__name__ + ': '}{error}", file=sys.stderr)
        if options.command == "run-all" and not options.commit:
            try:
                _rebuild()
            except Exception as error:  # the page is rebuilt at the end; the other jobs go on
                print(f"page not rebuilt: {type(error).__name__}: {error}", file=sys.stderr)

    runner.run_all(jobs, devices, work)
    if failed and len(jobs) > 1:
        print(f"{len(failed)} of {len(jobs)} failed: {', '.join(failed)}", file=sys.stderr)
    if options.command == "run-all":
        _collect_command(options)
    return 1 if failed else 0


def _run_job(name: str, job: Job, slot: Slot, options: argparse.Namespace) -> None:
    """Run a job; print a line at its start and end, and its answer.

    On a terminal, a line with the progress of training is shown in between.
    """
    on_terminal = sys.stdout.isatty()
    clear = "\r\x1b[K" if on_terminal else ""

    def tell(line: str) -> None:
        print(f"{clear}{name} {line}", flush=True)

    def progress(line: str) -> None:
        print(f"{clear}{name}  {line}", end="", flush=True)

    tell("...")
    began, since = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    cells = tell if options.verbose else lambda line: None
    tells = (tell, cells, progress if on_terminal else None)
    if not runner.run(job, slot.visible, *tells, force=options.force, cell_seconds=options.timeout):
        tell("finished before, skipped; --force runs it again")
        return
    summary = f"{name} done in {time.perf_counter() - began:.0f} s"
    print(clear + "\n".join([summary, *_answer(job, since)]), flush=True)


def _answer(job: Job, since: str) -> list[str]:
    """Return the first finding of a run that began at `since`, in two lines at most."""
    from reclib.report import findings

    rows = [
        row
        for row in records.read(system.executed())
        if row["notebook"] == job.notebook and row["time"] >= since
        if row["label"] == job.label or row["kind"] == "predicted"
    ]
    sentences: list[str] = []
    with contextlib.suppress(Exception):  # a missing sentence must not fail the run
        sentences = findings.sentences(job.notebook, rows)
    wrap = textwrap.TextWrapper(104, max_lines=2, placeholder=" ...")
    return [" " * 6 + line for line in wrap.wrap(sentences[0])] if sentences else []


def _demand_dataset(job: Job) -> None:
    """Raise `InputError` if a run's data are unknown, not fetched, or a file that cannot be read."""
    from reclib.data import prepare  # imports pandas, which other commands do not need

    if "dataset" in job.values:
        data = parameters.build(job.notebook, job.values).data_config()
        if prepare.prepared_folder(data) is None:
            prepare.source(data)


def _demand_study_data(record: Mapping[str, Any]) -> None:
    """Raise `InputError` for a record of a user's own data, which does not belong in the repository."""
    from reclib.report import tables

    if not tables.of_study(record):
        dataset = system.plain(record["params"]["dataset"])
        raise InputError(f"--commit is for the study's datasets, not for {dataset!r}: leave it out")


def _refresh_command(options: argparse.Namespace) -> int:
    """Run notebooks with their defaults and store their outputs, which the notebook tests compare with.

    Records go to a temporary folder; a notebook that fails is not changed.
    """
    for name in [find(name) for name in options.notebook]:
        file = system.notebooks() / f"{name}.ipynb"
        runner.check_cell(file, parameters.names(name))
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / file.name
            try:
                runner.execute(file, output, {}, records=Path(folder) / "records")
            except runner.NotebookFailed as failure:
                print(f"{name} {failure}", file=sys.stderr)
                return 1
            with system.replacing(file) as fresh:
                shutil.copyfile(output, fresh)
        print(f"{name}: outputs stored")
    return 0


# -- records and figures -------------------------------------------------------------------------------------


def _rebuild() -> tuple[Path, int]:
    """Rebuild the figures from the newest records; return their folder and the number of files.

    Figures of the repository's records go to figures/; if the user has records, all go to runs/figures/.
    """
    from reclib.report import figures

    roots, folder = [system.committed()], system.figures()
    if system.executed() != system.committed() and records.files(system.executed()):
        roots, folder = records.roots(), system.runs() / "figures"
    with system.lock("figures", print):
        return folder, len(figures.collect(roots, folder))


def _collect_command(options: argparse.Namespace) -> int:
    folder, count = _rebuild()
    place = folder.relative_to(system.root()) if folder.is_relative_to(system.root()) else folder
    print(f"{count} files in {place}/, start with index.html")
    return 0


def status() -> list[tuple[str, str, str, int]]:
    """Return (notebook, label, state, number of records) for each notebook and device.

    Devices that notebooks ran on (cpu if there is none) have rows for all notebooks; other measured devices
    have rows for the notebooks with measurements.

    States: running, done (by this checkout, with this code), stale (code or parameters files changed since),
    recorded (executed by another checkout), failed (or incomplete), missing.
    """
    rows = records.read(records.roots())
    counts = Counter((row["notebook"], row["label"]) for row in rows)
    measured = {(row["notebook"], row["label"]) for row in rows if row["kind"] == "measured"}
    labels = {file.parent.name for root in records.roots() for file in root.glob("*/*.ipynb")} or {"cpu"}
    return [
        (notebook, label, Job.last(notebook, label).state(), counts[notebook, label])
        for notebook in present()
        for label in sorted(labels | {label for _, label in measured})
        if label in labels or (notebook, label) in measured
    ]


def _status_command(options: argparse.Namespace) -> int:
    print(f"{'notebook':<24}{'device':<8}{'state':<10}{'records':>7}")
    for notebook, label, state, count in status():
        print(f"{notebook:<24}{label:<8}{state:<10}{count:>7}")
    return 0


def _merge_command(options: argparse.Namespace) -> int:
    for folder in options.folder:
        for row in records.read(folder, problems=[]) if options.commit else []:
            _demand_study_data(row)
        new, present_before, files = records.merge(folder, system.executed())
        print(f"{folder.name}: {new} new records, {present_before} known before, {files} files copied")
    return 0


def _params_command(options: argparse.Namespace) -> int:
    notebook = find(options.notebook)
    values = parameters.profile(notebook, options.profile) | ({"gpu": options.gpu} if options.gpu else {})
    checked = parameters.build(notebook, values)
    if checked.gpu != "auto":  # auto is for the machine that runs it to decide
        checked = parameters.fill(checked, checked.gpu)
    print(yaml.safe_dump(parameters.values(checked), sort_keys=False, default_flow_style=None), end="")
    return 0


# -- the commands --------------------------------------------------------------------------------------------

# Commands of the library and of the long experiments: function and description.
# They are imported when called, so that `python -m reclib status` needs no torch.
COMMANDS = {
    "data": ("data.prepare:data_main", "fetch, prepare and describe datasets"),
    "fit": ("train.fit:fit_main", "train one model"),
    "recommend": ("train.saving:recommend_main", "recommend items after a history"),
    "grid": ("experiments.grids:grid_main", "train the runs of an experiment file"),
    "score": ("experiments.grids:score_main", "score the final runs of an experiment file"),
    "predict": ("experiments.scaling:predict_main", "predict the loss of the largest size from smaller ones"),
    "claims": ("experiments.audit:claims_main", "check the numbers of README and FINDINGS by their records"),
    "tune": ("experiments.scaling:tune_main", "search settings on validation"),
    "plan": ("cost.planner:plan_main", "predict time, memory and price of a run"),
    "check": ("experiments.comparison:check_main", "check that this device computes right"),
    "device": ("hardware:device_main", "describe the device that is here"),
    "sizes": ("model.bert4rec:sizes_main", "count the parameters of every size"),
    "pictures": ("report.figures:pictures_main", "draw PNGs of the main figures"),
}


def _seconds(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m reclib",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():  # `entry` hands these on: they stand here for the help
        commands.add_parser(name, help=text, add_help=False)
    work, place, running = (Parser(add_help=False) for _ in range(3))
    work.add_argument("--profile", default="quick", help=f"one of {', '.join(parameters.PROFILES)}")
    work.add_argument("--gpu", help=f"device label, a claim: one of {', '.join(GPU_LABELS)}")
    place.add_argument("--commit", action="store_true", help="records in executed/ instead of runs/executed/")
    running.add_argument("--force", action="store_true", help="run what is finished as well")
    running.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="longest for a cell")
    running.add_argument("-v", "--verbose", action="store_true", help="a line for each cell")
    running.set_defaults(p=None, f=None, gpus=None)
    for name, text, act, parents in (
        ("run", "run notebooks", _run_command, [work, running, place]),
        ("run-all", "run all notebooks, then collect", _run_command, [work, running, place]),
        ("status", "where it stands", _status_command, [place]),
        ("collect", "rebuild the figures", _collect_command, [place]),
        ("merge", "take the records of other machines' folders", _merge_command, [place]),
        ("params", "print parameters as YAML", _params_command, [work]),
        ("refresh", "store new outputs in a notebook", _refresh_command, []),
    ):
        command = commands.add_parser(name, help=text, parents=parents)
        command.set_defaults(act=act)
        add = command.add_argument
        if name in ("run", "refresh"):
            add("notebook", nargs="+", help="for example 02")
        if name == "params":
            add("notebook", help="for example 02")
        if name == "run":
            add("-f", type=Path, metavar="FILE", help="parameters as YAML, on the profile's")
            add("-p", nargs=2, action="append", metavar=("NAME", "VALUE"), help="override")
        if name == "run-all":
            add("--gpus", help="devices that share the work: all, or labels: cpu1,cpu2")
        if name == "merge":
            add("folder", nargs="+", type=Path, help="for example other/executed")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of the study and return its exit code."""
    options = _parser().parse_args(arguments)
    if getattr(options, "commit", False):
        os.environ["RECLIB_RECORDS"] = str(system.committed())
    return exit_code(lambda: options.act(options))


def entry(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m reclib ARGUMENTS` and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else ""
    if name not in COMMANDS or name == "data":
        # Clean up temporary files and kernels. Not for `fit`: a process of a group must end at once.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        system.hold()
    if name not in COMMANDS:
        return main(words)
    module, _, function = COMMANDS[name][0].partition(":")
    command = getattr(importlib.import_module(f"reclib.{module}"), function)
    return exit_code(lambda: command(words[1:]))
