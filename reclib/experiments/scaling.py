"""The scaling experiment: what a size is, a law of loss against size, and settings that a search chose.

    python -m reclib grid run scaling-ml-1m       # the small sizes; the largest is barred
    python -m reclib predict scaling-ml-1m
    python -m reclib grid run scaling-ml-1m       # now the largest as well
    python -m reclib predict --report scaling-ml-1m
    python -m reclib predict --check scaling-ml-1m    # does git show that the prediction came first?
    python -m reclib tune run tiny-ml-100k        # to the file's budget; again: goes on
    python -m reclib tune compare tiny-ml-100k    # default against tuned: seeds, then the test split

A prediction is a record of the grid. Its hash is over the law, what it was fitted to and what it says; the
largest size may start only after it, and its records carry that hash. Once that size has begun nothing can be
predicted any more. That alone is no proof: lines can be deleted and written anew. A prediction counts when a
commit holds it that is older than the run.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pandas as pd
import yaml
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic.dataclasses import dataclass as checked_dataclass

from reclib import records, system
from reclib.config import (
    STRICT,
    DataConfig,
    InputError,
    ModelConfig,
    TrainConfig,
    as_dict,
    changed,
    model_config,
    validated,
)
from reclib.data.dataset import Dataset
from reclib.data.prepare import prepare
from reclib.data.splits import Split
from reclib.evaluate import statistics
from reclib.experiments import grids
from reclib.experiments.baseline import Result, Trained, train_model, train_of
from reclib.experiments.grids import WRONG_FORM, Arm, Grid, Work, command, experiment_file, naming, placed
from reclib.experiments.notebook import Study as NotebookStudy
from reclib.hardware import Device, resolve
from reclib.model.bert4rec import count_parameters
from reclib.parameters import Scaling
from reclib.report import findings
from reclib.report.findings import outcome, scaling_findings
from reclib.system import Parser
from reclib.train import saving
from reclib.train.fit import SELECT, TRACKERS, Curves, Options, fit, start_tracker
from reclib.train.trainer import StepStats

NOTEBOOK = "03_scaling"
BASE_WIDTH, BASE_RATE = 128, 1e-3  # the anchor of the rule; trials on ml-1m gave twice the rate


def learning_rate(width: int, base: float = BASE_RATE) -> float:
    """Return the peak learning rate of a width by the rule of this study, to two digits.

    It falls with the square root of the width: halfway, on a logarithmic scale, between a constant rate and
    the 1/width that muP gives to hidden matrices under Adam (Yang et al. 2022, arXiv 2203.03466, table 3).
    The item tables, most of the parameters here, keep a constant rate there, and one rate serves both here.
    """
    return float(f"{base * (BASE_WIDTH / width) ** 0.5:.1e}")


# ------------------------------------------------------------------------------------------------
# The law and its prediction.


def predict(work: Work, early: bool = False) -> Result:
    """Predict the barred arm's validation loss from the others, and record it.

    `early` takes the seeds that are trained so far, one of each size at least; the record counts them. Raises
    `InputError` where the file predicts nothing, a run is missing, or the predicted size has begun.
    """
    with naming(f"grid {work.grid.name!r}"):
        predicts = work.grid.predicts
        if predicts is None:
            raise InputError("it predicts nothing: its file has no key `predicts`")
        arms = {arm.name: arm for arm in work.grid.arms}
        target, sources = arms[predicts.of], [arms[name] for name in predicts.sources]
        if begun := [str(seed) for seed in target.seeds if work.begun(target, seed)]:
            raise InputError(
                f"{target.name} has begun (seed {', '.join(begun)}): what is known cannot be predicted"
            )
        rows = {arm.name: [row for s in arm.seeds if (row := work.curve(arm, s))] for arm in sources}
        untrained = [name for name, curves in rows.items() if not curves]
        if left := untrained or ([] if early else work.not_trained(sources)):
            advice = "" if untrained else "; --early predicts without them"
            raise InputError(f"not trained yet: {', '.join(left)}{advice}")
        curves = [*itertools.chain(*rows.values())]
        by_size = seeds_by_size(curves)
        size = count_parameters(work.configs(target, 0)[0])["non_embedding"]
        try:
            numbers = statistics.predict(by_size, size)
        except ValueError as error:
            raise InputError(str(error)) from None
    series: dict[str, list[Any]] = {"non_embedding": list(by_size)}
    series["loss"] = [float(np.mean(values)) for values in by_size.values()]
    series["seeds"] = [len(values) for values in by_size.values()]
    of = {"of": target.name, "size": size, "seeds": min(series["seeds"])}
    fitted_to = sorted(row["params_hash"] for row in curves)
    made = {"target": work.configuration(target), "fitted_to": fitted_to}
    result = Result("prediction", numbers, of, series)
    work.write(records.params_hash({"law": numbers, "of": of, "series": series, **made}), result, made, {})
    return result


def seeds_by_size(rows: Iterable[Mapping[str, Any]]) -> dict[float, list[float]]:
    """Return the lowest validation losses of the seeds of each size, smallest size first."""
    losses: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        losses[float(row["metrics"]["non_embedding"])].append(row["metrics"]["lowest_valid_loss"])
    return dict(sorted(losses.items()))


def report(work: Work) -> list[str]:
    """Return lines that say what is predicted, what was measured, and the error."""
    curves, name = records.latest(work.rows("learning_curve")), work.grid.name
    result = outcome([*curves, *work.rows("prediction")], name)
    return scaling_findings(curves, result, name, grids.missing(curves, name))


def committed_before(name: str) -> list[str]:
    """Return, for each prediction of a grid that a run carries, what git shows of which came first.

    A run began, at the latest, its seconds of training and evaluation before its record.
    """
    lines = []
    for file in sorted(system.committed().glob(f"*/grids/{name}.jsonl")):
        rows = grids.read_rows(file)
        for row in (row for row in rows if row["name"] == "prediction"):
            key = row["params_hash"]
            runs = [r for r in rows if (r.get("configuration") or {}).get("prediction") == key]
            if not runs:
                continue
            first = min(runs, key=lambda run: run["time"])
            recorded = datetime.fromisoformat(first["time"])
            seconds = sum(first["timings"].get(part) or 0 for part in ("train_seconds", "eval_seconds"))
            began = recorded - timedelta(seconds=seconds)
            there, commit = first_commit(file, f'"params_hash":"{key}"')
            verdict = "only recorded before, not shown by git"
            if not there:
                verdict = "only recorded before: no git history here"
            elif commit is not None and commit < recorded:
                late = "its first record, after the run had begun" if commit >= began else "the run began"
                verdict = f"committed before {late}"
            when = "" if commit is None else f", committed {commit:%Y-%m-%d %H:%M}"
            lines.append(
                f"{key}: {verdict} (predicted {row['time'][:16].replace('T', ' ')}{when}, run began about "
                f"{began:%H:%M}, first recorded {recorded:%Y-%m-%d %H:%M})"
            )
    return lines


def first_commit(file: Path, text: str) -> tuple[bool, datetime | None]:
    """Return whether there is a git history, and the time of its oldest commit that has `text` in a file."""
    ask = ["git", "-C", str(file.parent), "log", "--reverse", "--format=%ct", f"-S{text}", "--", file.name]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False, None
    seconds = done.stdout.split()
    made = datetime.fromtimestamp(int(seconds[0]), UTC) if seconds else None
    return done.returncode == 0, made


@command
def predict_main(argv: list[str] | None = None) -> int:
    """Predict, or compare the prediction with what came."""
    about = "Predict the loss of a grid's largest size from smaller ones."
    parser = Parser(prog="python -m reclib predict", description=about)
    parser.add_argument("--report", action="store_true", help="only compare with what came")
    parser.add_argument("--early", action="store_true", help="predict though seeds are missing")
    parser.add_argument(
        "--check", action="store_true", help="only say whether a commit is older than the run"
    )
    given = placed(parser, argv)
    if given.check:
        grids.read_grid(given.name)  # or there is no such grid
        lines = committed_before(given.name)
        print("\n".join(lines or ["no prediction that a run carries"]))
        return 0
    work = grids.work_of(given)
    if not given.report:
        predict(work, given.early)
    print("\n".join(report(work)))
    return 0


# ------------------------------------------------------------------------------------------------
# Settings that a tuning study chose. Those of one dataset say nothing about another: a file whose
# fingerprint is not that of the data at hand is an error.


class Tuned(NamedTuple):
    """Chosen fields of the two configurations, and where they come from."""

    model: dict[str, Any]
    train: dict[str, Any]
    chosen_by: dict[str, Any]  # trials, value, seed, code, commit, device, versions, time


def read_tuned(size: str, dataset: str, fingerprint: str) -> Tuned | None:
    """Return the settings chosen for a size on a dataset, None where nothing was tuned.

    Raises `InputError` for a file that is not whole, or is of another dataset.
    """
    file = system.params() / "tuned" / f"{size}-{dataset}.yaml"
    if not file.is_file():
        return None
    given = system.read_yaml(file)
    with naming(file.name, WRONG_FORM):
        there, chosen = given["fingerprint"], Tuned(*(given[name] for name in Tuned._fields))
        if there != fingerprint:
            raise InputError(
                f"tuned on {dataset} with fingerprint {there[:12]}, the data here have {fingerprint[:12]}: "
                "tune anew (python -m reclib tune), or set tuned=False"
            )
    return chosen


def write_tuned(size: str, dataset: str, fingerprint: str, chosen: Tuned) -> Path:
    """Write the settings of a study, in place of earlier ones, whole or not at all."""
    file = system.params() / "tuned" / f"{size}-{dataset}.yaml"
    body = {"size": size, "dataset": dataset, "fingerprint": fingerprint} | chosen._asdict()
    system.write_atomically(file, yaml.safe_dump(body, sort_keys=False))
    return file


# ------------------------------------------------------------------------------------------------
# Tuning files: a recipe, a space of settings, a budget.

SPACES = ({"low", "high"}, {"low", "high", "log"}, {"choices"})


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class TuningPlan:
    """A tuning file `params/tuning/<name>.yaml`, read."""

    name: str
    about: str
    data: DataConfig
    size: str
    seed: int  # of the sampler and of every trial's run
    trials: int
    minutes: float  # of one call: no trial is begun later
    model: dict[str, Any]
    train: dict[str, Any]
    space: dict[str, dict[str, Any]]  # a field of TrainConfig, or model.<field>: low, high, log or choices
    seeds: list[int]  # of the comparison

    def arm(self, name: str, drawn: Mapping[str, Any]) -> Arm:
        """Return the recipe with the drawn fields in it, as an arm of a grid."""
        shape = {k.removeprefix("model."): v for k, v in drawn.items() if k.startswith("model.")}
        rest = {k: v for k, v in drawn.items() if not k.startswith("model.")}
        own = {"name": name, "size": self.size, "seeds": self.seeds, "final": True}
        return validated(Arm, {**own, "model": self.model | shape, "train": self.train | rest})

    def configs(self, num_items: int, drawn: Mapping[str, Any]) -> tuple[ModelConfig, TrainConfig]:
        """Return the configurations of a trial."""
        return grids.arm_configs(self.arm("trial", drawn), num_items, self.seed)

    def default(self) -> dict[str, Any]:
        """Return the recipe's own values of the fields of the space; empty where the space leaves one out."""
        model, train = self.configs(10, {})
        values = {}
        for field, space in self.space.items():
            values[field] = getattr(model if "." in field else train, field.removeprefix("model."))
            low, high = space.get("low"), space.get("high")
            if not (values[field] in space["choices"] if low is None else low <= values[field] <= high):
                return {}
        return values


def read_tuning(name: str) -> TuningPlan:
    """Read `params/tuning/<name>.yaml`; raise `InputError` that names file and value."""
    file, given = experiment_file("tuning", name)
    with naming(file, WRONG_FORM):
        plan = validated(TuningPlan, given | {"name": name, "data": validated(DataConfig, given["data"])})
        for field, space in plan.space.items():
            if set(space) not in SPACES:
                raise InputError(f"space of {field!r}: expected low and high (and log), or choices")
        plan.configs(
            10, {f: space.get("low", space.get("choices", [0])[0]) for f, space in plan.space.items()}
        )
    return plan


# ------------------------------------------------------------------------------------------------
# Tuning: trials of one recipe on validation, in a study that several processes may share.
#
# A trial is one run of `fit` with some fields drawn; its value is the best NDCG@10 on validation, and one
# behind the median is pruned. The first trial is the recipe as it stands, where the space holds it, so that
# what is chosen was never behind it.
#
# Whoever runs a trial holds a lock on its folder. A trial that is running while nobody holds it belonged to
# a process that was killed: it is told as failed and enqueued again with the same settings, and goes on
# from its checkpoint. Unlike a heartbeat that takes no waiting, and a stopped process keeps its trial.

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STARTUP = 4  # trials that are drawn at random and never pruned


class Study:
    """A plan at work on one dataset and device."""

    def __init__(self, plan: TuningPlan, dataset: Dataset, device: Device) -> None:
        self.plan, self.dataset, self.device = plan, dataset, device
        recipe = {name: getattr(plan, name) for name in ("size", "seed", "model", "train")}
        identity = {"plan": recipe, "space": plan.space, "data": dataset.fingerprint}
        self.key = records.params_hash(identity)
        self.folder = system.runs() / "tune" / f"{plan.name}-{self.key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = f"sqlite:///{self.folder / 'study.db'}"
        with self.alone():  # or two processes would make the tables at once
            self.storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
            self.open(0)

    def alone(self) -> contextlib.AbstractContextManager[bool]:
        """Wait for the study's lock and hold it."""
        return system.locked(self.folder / "study.lock", wait=True)

    def lock(self, number: int) -> contextlib.AbstractContextManager[bool]:
        """Hold the lock of a trial; False where a process that runs it does."""
        return system.locked(self.folder / f"trial-{number}" / "lock")

    def open(self, number: int) -> optuna.Study:
        """Return the study with a sampler of its own for the next trial, so that draws can be repeated."""
        seed, startup = 1_000 * self.plan.seed + number, STARTUP
        how: dict[str, Any] = {
            "sampler": optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True),
            "pruner": optuna.pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=1),
        }
        place: dict[str, Any] = {"storage": self.storage, "study_name": self.plan.name}
        return optuna.create_study(**place, **how, direction="maximize", load_if_exists=True)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in these states; all of them, failed and waiting ones too, without states."""
        return self.open(0).get_trials(deepcopy=False, states=states or None)

    def finished(self) -> list[FrozenTrial]:
        """Return the trials that count: run to the end, pruned, or diverged."""
        return [t for t in self.trials() if t.state in FINISHED or "diverged" in t.user_attrs]

    def trial_folder(self, drawn: Mapping[str, Any]) -> Path:
        """Return a trial's folder: the same settings go on where they were."""
        return self.folder / records.params_hash(dict(drawn))

    def claim(self) -> tuple[optuna.Study, Trial] | None:
        """Take the next trial, a killed process's first; None when the budget is used or taken.

        To be called under the study's lock.
        """
        number = len(self.trials())
        for trial in self.trials(TrialState.RUNNING):
            with self.lock(trial.number) as free:
                if free:
                    self._enqueue_again(trial)
        if len(self.finished()) + len(self.trials(TrialState.RUNNING)) >= self.plan.trials:
            return None
        study = self.open(number)
        if number == 0 and (recipe := self.plan.default()):
            study.enqueue_trial(recipe)
        return study, study.ask()

    def _enqueue_again(self, dead: FrozenTrial) -> None:
        study = self.open(0)
        if not any(t.user_attrs.get("again") == dead.number for t in self.trials()):
            names = ("params", "distributions", "intermediate_values")
            same: dict[str, Any] = {name: getattr(dead, name) for name in names}
            same |= {"user_attrs": {"again": dead.number}, "system_attrs": {"fixed_params": dead.params}}
            study.add_trial(optuna.trial.create_trial(state=TrialState.WAITING, **same))
        study.tell(dead.number, state=TrialState.FAIL)

    def draw(self, trial: Trial) -> dict[str, Any]:
        """Return the fields of the space, drawn."""
        drawn = {}
        for field, space in self.plan.space.items():
            if "choices" in space:
                drawn[field] = trial.suggest_categorical(field, space["choices"])
            else:
                drawn[field] = trial.suggest_float(field, **space)  # low, high and log
        return drawn

    def one(self, options: Options, watched_by: str = "none") -> bool:
        """Run the next trial; return whether there was one."""
        with contextlib.ExitStack() as stack:
            with self.alone():
                claimed = self.claim()
                if claimed is None:
                    return False
                study, trial = claimed
                assert stack.enter_context(self.lock(trial.number))
            drawn = self.draw(trial)
            title = f"{self.plan.name}-trial{trial.number}"
            track = stack.enter_context(start_tracker(watched_by, "tune", title, drawn))
            self._run(study, trial, drawn, options, Curves(track, self.device))
        return True

    def _run(
        self, study: optuna.Study, trial: Trial, drawn: dict[str, Any], options: Options, curves: Curves
    ) -> None:
        model, train = self.plan.configs(self.dataset.num_items, drawn)
        rows: list[Mapping[str, float]] = []

        def watch(row: dict[str, float]) -> None:
            curves.evaluation(row)
            rows.append(row)
            with warnings.catch_warnings():  # of an epoch that the killed process had reported already
                warnings.simplefilter("ignore", UserWarning)
                trial.report(row[SELECT], step=round(row["epoch"]))
            if trial.should_prune():
                raise optuna.TrialPruned

        def step(stats: StepStats) -> None:
            curves.step(stats)
            if options.on_step is not None:
                options.on_step(stats)

        watched = replace(options, on_step=step, on_evaluation=watch)
        began = time.perf_counter()
        try:
            trainer = fit(model, self.dataset, train, self.device, self.trial_folder(drawn), watched)
            value, state = trainer.progress.best_value, TrialState.COMPLETE
            curve = Trained(self.plan.seed, trainer).curve()
        except optuna.TrialPruned:
            value, state = max(row[SELECT] for row in rows), TrialState.PRUNED
            curve = {"epoch": [r["epoch"] for r in rows], f"valid_{SELECT}": [r[SELECT] for r in rows]}
        except InputError as error:
            if "diverged" not in str(error):
                raise
            trial.set_user_attr("diverged", str(error))
            study.tell(trial, state=TrialState.FAIL)
            return
        made = {"model": as_dict(model), "train": asdict(train), "drawn": drawn}
        own = {"trial": trial.number, "state": state.name.lower(), **drawn}
        result = Result("trial", {f"valid_{SELECT}": value}, own, curve, self.plan.seed)
        # The record first: a kill in between gives the same record again, and readers take the newest.
        key = records.params_hash({"study": self.key, "drawn": drawn})
        self.work().write(key, result, made, {"trial_seconds": time.perf_counter() - began})
        study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)

    def best(self) -> FrozenTrial:
        """Return the best trial that ran to its end; raise `InputError` where there is none."""
        done = self.trials(TrialState.COMPLETE)
        if not done:
            raise InputError(f"tuning {self.plan.name!r} has no trial that ran to its end yet")
        return max(done, key=lambda t: (t.value, -t.number))

    def choose(self) -> Path:
        """Write the best settings to `params/tuned`, and what the study was to the records.

        The record holds each field's share of the value's variance (PED-ANOVA).
        """
        plan, best = self.plan, self.best()
        counts = {"trials": len(self.finished()), "pruned": len(self.trials(TrialState.PRUNED))}
        own = {"study": plan.name, "trial": best.number}
        metrics = {f"valid_{SELECT}": best.value, **counts}
        made_by = records.provenance(NOTEBOOK) | {"device": self.device.card.name}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        chosen_by = {**own, **metrics, "seed": plan.seed, **made_by, "time": when}
        series: dict[str, list[Any]] = {}
        if len(self.trials(TrialState.COMPLETE)) >= 6:  # fewer say nothing of what mattered
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shares = optuna.importance.get_param_importances(self.open(0), evaluator=evaluator)
            series = {"field": list(shares), "share": list(shares.values())}
        own |= best.params
        result = Result("tuning", metrics, own, series, plan.seed)
        key = records.params_hash({"study": self.key, **own})
        self.work().write(key, result, {"chosen": chosen_by}, {})
        arm = plan.arm("tuned", best.params)
        chosen = Tuned(arm.model, arm.train, chosen_by)
        return write_tuned(plan.size, self.dataset.name, self.dataset.fingerprint, chosen)

    def work(self) -> Work:
        """Return the grid that its records are in: the default and, once chosen, the tuned recipe as arms."""
        plan = self.plan
        arms = [plan.arm("default", {})]
        if chosen := read_tuned(plan.size, self.dataset.name, self.dataset.fingerprint):
            arms.append(replace(arms[0], name="tuned", model=chosen.model, train=chosen.train))
        name = f"tuning-{plan.name}"
        grid = Grid(name=name, about=plan.about, notebook=NOTEBOOK, data=plan.data, arms=arms)
        return Work(grid, self.dataset, self.device)


def run(study: Study, options: Options, watched_by: str = "none") -> int:
    """Run trials until the study's budget or this call's minutes are used; return how many ran here."""
    began, count = time.monotonic(), 0
    while time.monotonic() - began < 60 * study.plan.minutes and study.one(options, watched_by):
        count += 1
        print(f"{study.plan.name}: {len(study.finished())} of {study.plan.trials} trials", flush=True)
    return count


def compare(study: Study, options: Options) -> list[Result]:
    """Train default and tuned with the file's seeds and score them on the test split, paired by user."""
    work = study.work()
    if len(work.grid.arms) < 2:
        raise InputError(f"nothing is tuned yet: run `python -m reclib tune run {study.plan.name}` first")
    grids.run_grid(work, work.runs(), options)
    return [*grids.compare(work), *grids.score(work)]


@command
def tune_main(argv: list[str] | None = None) -> int:
    """Run a study, or compare what it chose with the default."""
    parser = Parser(prog="python -m reclib tune", description="Search settings on validation.")
    parser.add_argument("action", choices=("run", "compare"))
    parser.add_argument("--trials", type=int, help="another budget than the file's, in trials")
    parser.add_argument("--minutes", type=float, help="another budget than the file's, in minutes")
    trackers = ", ".join(TRACKERS)
    parser.add_argument("--tracker", default="none", help=f"curves of the trials: {trackers} (none)")
    given = placed(parser, argv)
    plan = read_tuning(given.name)
    plan = replace(plan, trials=given.trials or plan.trials, minutes=given.minutes or plan.minutes)
    config = changed(plan.data, dataset=given.dataset) if given.dataset else plan.data
    study = Study(plan, prepare(config), resolve(given.gpu))
    options = Options(progress_bar=sys.stderr.isatty())
    if given.action == "compare":
        for result in compare(study, options):
            if result.name in ("validation_difference", "comparison"):
                print(result.params, result.metrics)
        return 0
    run(study, options, given.tracker)
    best = study.best()
    print(f"best: trial {best.number}, validation {SELECT} {best.value:.4f}, {best.params}")
    print(f"written: {study.choose().name}")
    return 0


# ------------------------------------------------------------------------------------------------
# From the parameters of notebook 03 to its runs: one recipe and many sizes.


@dataclass(frozen=True)
class Sized:
    """A named size as notebook 03 trains it."""

    size: str
    model: ModelConfig
    train: TrainConfig  # of the first seed
    chosen_by: dict[str, Any] | None  # by which study its settings were tuned; None: they were not

    @property
    def title(self) -> str:
        """What it is called in records and figures."""
        return self.size if self.chosen_by is None else f"{self.size} (tuned)"


def recipe(p: Scaling, size: str, seed: int) -> TrainConfig:
    """Return a size's training configuration, its learning rate by the rule; nothing tuned."""
    rate = learning_rate(model_config(size).hidden_dim, p.base_rate)
    return train_of(p, seed, window="random", learning_rate=rate)


def sized(p: Scaling, dataset: Dataset, size: str) -> Sized:
    """Return a size's configurations: the recipe, and what was tuned for these data on top.

    Tokens and device stay the notebook's, so that sizes can be compared. Raises `InputError` where the tuned
    settings are of other data.
    """
    shape: dict[str, Any] = {"max_len": p.max_len, "dropout": p.dropout}
    train = recipe(p, size, p.seeds[0])
    chosen = read_tuned(size, dataset.name, dataset.fingerprint) if p.tuned else None
    if chosen is not None:
        fixed = {"epochs", "eval_every", "batch_size", "precision"}
        train = changed(train, **{k: v for k, v in chosen.train.items() if k not in fixed})
        shape |= chosen.model
    model = model_config(size, num_items=dataset.num_items, **shape)
    return Sized(size, model, train, None if chosen is None else chosen.chosen_by)


def train(study: NotebookStudy, split: Split, one: Sized, seed: int) -> Trained:
    """Train one seed of a size for notebook 03, or go on with a run of the same code and data."""
    config, title = changed(one.train, seed=seed), f"{study.device.label}-{one.size}-seed{seed}"
    return train_model(NOTEBOOK, study.p, study.dataset, split, study.device, one.model, config, title)


def committed_grids(prefix: str) -> list[str]:
    """Return the names of the grids with committed records that begin with `prefix`."""
    names = {row["data"]["name"] for row in records.committed() if row["notebook"] == NOTEBOOK}
    return sorted(name for name in names if name.startswith(prefix))


class Committed(NamedTuple):
    """The committed runs of a grid of sizes, its law, and what a figure of it shows."""

    runs: list[dict[str, Any]]
    law: dict[str, Any]  # `findings.outcome`
    shown: list[Mapping[str, Any]]  # the runs, and those of the notebook on the same data


def committed_runs(study: NotebookStudy, own: Sequence[Mapping[str, Any]]) -> dict[str, Committed]:
    """Return the grids of sizes that have committed records, by name; `own` are the notebook's runs."""
    grids_of_sizes = {}
    for name in committed_grids("scaling-"):
        rows = study.committed(grid=name)
        runs = [row for row in rows if row["name"] == "learning_curve"]
        beside: Sequence[Mapping[str, Any]] = own if name == f"scaling-{study.dataset.name}" else []
        grids_of_sizes[name] = Committed(runs, outcome(rows, name), [*runs, *beside])
    counts = [f"{name} ({len(grid.runs)} runs)" for name, grid in grids_of_sizes.items()]
    print("committed:", ", ".join(counts) or "none")
    return grids_of_sizes


def keep_best(study: NotebookStudy, trained: Mapping[str, Sequence[Trained]]) -> str:
    """Keep the run with the lowest validation loss as a model of the user's; return the model's name."""
    runs = [
        (run.losses()["lowest_valid_loss"], title, run) for title, some in trained.items() for run in some
    ]
    _, title, best = min(runs, key=lambda run: run[0])
    name = f"{title.split()[0]}-{study.dataset.name}"
    about = best.best() | {"git": records.git_state(), "versions": records.versions()}
    return saving.save_model(best.trainer.model, best.trainer.config, study.dataset, name, about).name


def sentences(study: NotebookStudy, sizes: Mapping[str, Committed], studies: Iterable[str]) -> list[str]:
    """Return the findings of the committed grids of sizes and of tuning studies."""
    lines, rows = [], study.committed()
    for name, grid in sizes.items():
        lines += scaling_findings(grid.runs, grid.law, name, grids.missing(grid.runs, name))
    for name in studies:
        lines += findings.tuning_findings(rows, name) + findings.beside_sizes(rows, name)
    return lines


def settings(sizes: Iterable[Sized]) -> pd.DataFrame:
    """Tabulate, for each size, the settings that tuning could have changed, and where they are from."""
    rows = []
    for size in sizes:
        row = {"size": size.size, "from": "the rule and this notebook's parameters"}
        if by := size.chosen_by:
            row["from"] = f"{by['study']}, trial {by['trial']} of {by['trials']}, {by['time'][:10]}"
        fields = ("learning_rate", "weight_decay", "mask_prob", "last_item_share")
        rows.append(
            row | {name: getattr(size.train, name) for name in fields} | {"dropout": size.model.dropout}
        )
    return pd.DataFrame(rows).set_index("size")
