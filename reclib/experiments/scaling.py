"""The scaling experiment: model sizes, a law of loss against size, and tuned settings.

    python -m reclib grid run scaling-ml-1m       # the small sizes; the largest is barred
    python -m reclib predict scaling-ml-1m
    python -m reclib grid run scaling-ml-1m       # now the largest as well
    python -m reclib predict --report scaling-ml-1m
    python -m reclib predict --check scaling-ml-1m    # does git show that the prediction came first?
    python -m reclib tune run tiny-ml-100k        # to the file's budget; again: goes on
    python -m reclib tune compare tiny-ml-100k    # default against tuned: seeds, then the test split

A prediction is a record of the grid. Its hash covers the law, the runs that it was fitted to and the
predicted loss. The largest size can only start after the prediction, and its records carry that hash; once it
has begun, nothing can be predicted. Since lines can be rewritten, a prediction counts only if a commit older
than the run has it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
import warnings
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
from reclib.experiments.grids import WRONG_FORM, Arm, Grid, Work, experiment_file, naming, placed
from reclib.experiments.notebook import Study as NotebookStudy
from reclib.hardware import Device, resolve
from reclib.model.bert4rec import count_parameters
from reclib.parameters import Scaling
from reclib.report import findings, tables
from reclib.report.findings import outcome
from reclib.system import Parser
from reclib.train import saving
from reclib.train.fit import SELECT, TRACKERS, Curves, Options, fit, start_tracker

NOTEBOOK = "03_scaling"
BASE_WIDTH, BASE_RATE = 128, 1e-3  # the anchor of the rule; trials on ml-1m gave twice the rate


def learning_rate(width: int, base: float = BASE_RATE) -> float:
    """Return the peak learning rate of a width by the rule of this study, to two digits.

    It falls with the square root of the width. muP (Yang et al. 2022, arXiv 2203.03466, table 3) scales the
    rate of hidden matrices under Adam by 1/width and keeps that of embeddings constant. Here one rate serves
    both, so the rule lies between the two on a logarithmic scale.
    """
    return float(f"{base * (BASE_WIDTH / width) ** 0.5:.1e}")


# ------------------------------------------------------------------------------------------------
# The law and its prediction.


def predict(work: Work) -> Result:
    """Predict the barred arm's validation loss from the others, and record it.

    Raises `InputError` if the file predicts nothing, a run is missing, or the predicted size has begun.
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
        if untrained := work.not_trained(sources):
            raise InputError(f"not trained yet: {', '.join(untrained)}")
        curves = [row for arm in sources for seed in arm.seeds if (row := work.curve(arm, seed))]
        runs = tables.by((row["metrics"] for row in curves), lambda run: float(run["non_embedding"]))
        by_size = {size: [run["lowest_valid_loss"] for run in runs[size]] for size in sorted(runs)}
        size = count_parameters(work.configs(target, 0)[0])["non_embedding"]
        try:
            numbers = statistics.predict(by_size, size)
        except ValueError as error:
            raise InputError(str(error)) from None
    series: dict[str, list[Any]] = {"non_embedding": list(by_size)}
    series["loss"] = [float(np.mean(values)) for values in by_size.values()]
    series["seeds"] = [len(values) for values in by_size.values()]
    params = {"of": target.name, "size": size, "seeds": min(series["seeds"])}
    fitted_to = sorted(row["params_hash"] for row in curves)
    configuration = {"target": work.configuration(target), "fitted_to": fitted_to}
    result = Result("prediction", numbers, params, series)
    key = records.params_hash({"law": numbers, "of": params, "series": series, **configuration})
    work.write(key, result, configuration, {})
    return result


def report(work: Work) -> list[str]:
    """Return lines on the prediction, the measured loss, and the error, and the runs that are missing."""
    curves = records.latest(work.rows("learning_curve"))
    lines = findings.sentences(NOTEBOOK, [*curves, *work.rows("prediction")])
    absent = grids.missing(curves, work.grid.name)
    return [*lines, *([f"Not trained yet: {', '.join(absent)}."] if absent else [])]


def committed_before(name: str) -> list[str]:
    """Return a line for each prediction that runs carry: whether git shows that it came before them.

    The start of a run is taken as the time of its record minus its seconds of training and evaluation.
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
            has_history, commit = first_commit(file, f'"params_hash":"{key}"')
            verdict = "only recorded before, not shown by git"
            if not has_history:
                verdict = "only recorded before: no git history here"
            elif commit is not None and commit < recorded:
                late = "its first record, after the run had begun" if commit >= began else "the run began"
                verdict = f"committed before {late}"
            predicted = row["time"][:16].replace("T", " ")
            predicted += "" if commit is None else f", committed {commit:%Y-%m-%d %H:%M}"
            lines.append(
                f"{key}: {verdict} (predicted {predicted}, run began about {began:%H:%M}, "
                f"first recorded {recorded:%Y-%m-%d %H:%M})"
            )
    return lines


def first_commit(file: Path, text: str) -> tuple[bool, datetime | None]:
    """Return whether there is a git history, and the time of its oldest commit that has `text` in a file."""
    ask = ["git", "-C", str(file.parent), "log", "--reverse", "--format=%ct", f"-S{text}", "--", file.name]
    try:
        process = subprocess.run(ask, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False, None
    seconds = process.stdout.split()
    committed = datetime.fromtimestamp(int(seconds[0]), UTC) if seconds else None
    return process.returncode == 0, committed


def predict_main(argv: list[str] | None = None) -> int:
    """Predict a grid's largest size, or compare the prediction with the measured loss."""
    description = "Predict the loss of a grid's largest size from smaller ones."
    parser = Parser(prog="python -m reclib predict", description=description)
    parser.add_argument("--report", action="store_true", help="only compare with what came")
    text = "only say whether a commit is older than the run"
    parser.add_argument("--check", action="store_true", help=text)
    options = placed(parser, argv)
    if options.check:
        grids.read_grid(options.name)  # or there is no such grid
        lines = committed_before(options.name)
        print("\n".join(lines or ["no prediction that a run carries"]))
        return 0
    work = grids.work_of(options)
    if not options.report:
        predict(work)
    print("\n".join(report(work)))
    return 0


# ------------------------------------------------------------------------------------------------
# Settings chosen by a tuning study. They hold for one dataset: another fingerprint is an error.


class Tuned(NamedTuple):
    """Chosen fields of the two configurations, and their origin."""

    model: dict[str, Any]
    train: dict[str, Any]
    chosen_by: dict[str, Any]  # trials, value, seed, code, commit, device, versions, time


def read_tuned(size: str, dataset: str, fingerprint: str) -> Tuned | None:
    """Return the settings chosen for a size on a dataset, None if it was not tuned.

    Raises `InputError` for an incomplete file, or one of another dataset.
    """
    file = system.params() / "tuned" / f"{size}-{dataset}.yaml"
    if not file.is_file():
        return None
    content = system.read_yaml(file)
    with naming(file.name, WRONG_FORM):
        tuned_on, chosen = content["fingerprint"], Tuned(*(content[name] for name in Tuned._fields))
        if tuned_on != fingerprint:
            raise InputError(
                f"tuned on {dataset} with fingerprint {tuned_on[:12]}, the data here have "
                f"{fingerprint[:12]}: tune anew (python -m reclib tune), or set tuned=False"
            )
    return chosen


def write_tuned(size: str, dataset: str, fingerprint: str, chosen: Tuned) -> Path:
    """Write the settings of a study atomically, replacing earlier ones."""
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
        fields = {k: v for k, v in drawn.items() if not k.startswith("model.")}
        base = {"name": name, "size": self.size, "seeds": self.seeds, "final": True}
        return validated(Arm, {**base, "model": self.model | shape, "train": self.train | fields})

    def configs(self, num_items: int, drawn: Mapping[str, Any]) -> tuple[ModelConfig, TrainConfig]:
        """Return the configurations of a trial."""
        return grids.arm_configs(self.arm("trial", drawn), num_items, self.seed)

    def default(self) -> dict[str, Any]:
        """Return the recipe's values of the fields of the space; empty if the space does not contain them."""
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
    file, content = experiment_file("tuning", name)
    with naming(file, WRONG_FORM):
        plan = validated(TuningPlan, content | {"name": name, "data": validated(DataConfig, content["data"])})
        for field, space in plan.space.items():
            if set(space) not in SPACES:
                raise InputError(f"space of {field!r}: expected low and high (and log), or choices")
        lowest = {f: space.get("low", space.get("choices", [0])[0]) for f, space in plan.space.items()}
        plan.configs(10, lowest)
    return plan


# ------------------------------------------------------------------------------------------------
# Tuning: trials of one recipe on validation.
#
# A trial is one run of `fit` with some fields drawn. Its value is the best NDCG@10 on validation; trials
# below the median are pruned. The first trial is the recipe itself if the space contains it, so the chosen
# settings are never worse on validation.
#
# One process at a time runs a study. A trial that a killed process left is resumed from its checkpoint.

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)  # FAIL: the training diverged
STARTUP = 4  # trials that are drawn at random and never pruned


class Study:
    """A tuning plan on one dataset and device."""

    def __init__(self, plan: TuningPlan, dataset: Dataset, device: Device) -> None:
        self.plan, self.dataset, self.device = plan, dataset, device
        recipe = {name: getattr(plan, name) for name in ("size", "seed", "model", "train")}
        identity = {"plan": recipe, "space": plan.space, "data": dataset.fingerprint}
        self.key = records.params_hash(identity)
        self.folder = system.runs() / "tune" / f"{plan.name}-{self.key}"
        self.folder.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def optuna_study(self) -> optuna.Study:
        """The study of Optuna, in a database in the folder."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        place: dict[str, Any] = {"storage": f"sqlite:///{self.folder / 'study.db'}"}
        place |= {"study_name": self.plan.name, "load_if_exists": True}
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=1)
        return optuna.create_study(pruner=pruner, direction="maximize", **place)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in these states; without states, all trials."""
        return self.optuna_study.get_trials(deepcopy=False, states=states or None)

    def trial_folder(self, drawn: Mapping[str, Any]) -> Path:
        """Return the folder of a trial, named by its settings, so that it can be resumed."""
        return self.folder / records.params_hash(dict(drawn))

    def next_trial(self) -> Trial | None:
        """Return the trial that a killed process left, or else a new one; None if the budget is used."""
        if len(self.trials(*FINISHED)) >= self.plan.trials:
            return None
        number = len(self.trials())
        seed = 1_000 * self.plan.seed + number  # for reproducible draws, also if the study was interrupted
        self.optuna_study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        for trial in self.trials(TrialState.RUNNING):
            return Trial(self.optuna_study, trial._trial_id)
        if number == 0 and (recipe := self.plan.default()):
            self.optuna_study.enqueue_trial(recipe)
        return self.optuna_study.ask()

    def draw(self, trial: Trial) -> dict[str, Any]:
        """Return the fields of the space, drawn."""
        drawn = {}
        for field, space in self.plan.space.items():
            if "choices" in space:
                drawn[field] = trial.suggest_categorical(field, space["choices"])
            else:
                drawn[field] = trial.suggest_float(field, **space)  # low, high and log
        return drawn

    def run_trial(self, options: Options, tracker: str = "none") -> bool:
        """Run the next trial; return whether there was one."""
        if (trial := self.next_trial()) is None:
            return False
        drawn = self.draw(trial)
        with start_tracker(tracker, "tune", f"{self.plan.name}-trial{trial.number}", drawn) as track:
            self._train(trial, drawn, options, Curves(track, self.device))
        return True

    def _train(self, trial: Trial, drawn: dict[str, Any], options: Options, curves: Curves) -> None:
        """Train with the drawn fields, record the result and tell it to Optuna."""
        model, train = self.plan.configs(self.dataset.num_items, drawn)
        rows: list[Mapping[str, float]] = []

        def watch(row: dict[str, float]) -> None:
            curves.evaluation(row)
            rows.append(row)
            with warnings.catch_warnings():  # a resumed trial reports some epochs twice
                warnings.simplefilter("ignore", UserWarning)
                trial.report(row[SELECT], step=round(row["epoch"]))
            if trial.should_prune():
                raise optuna.TrialPruned

        watched = replace(options, on_step=curves.step, on_evaluation=watch)
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
            print(f"trial {trial.number}: {error}")
            self.optuna_study.tell(trial, state=TrialState.FAIL)
            return
        configuration = {"model": as_dict(model), "train": asdict(train), "drawn": drawn}
        params = {"trial": trial.number, "state": state.name.lower(), **drawn}
        result = Result("trial", {f"valid_{SELECT}": value}, params, curve, self.plan.seed)
        # The record first: after a kill in between it is written again, and readers take the newest.
        key = records.params_hash({"study": self.key, "drawn": drawn})
        self.work().write(key, result, configuration, {"trial_seconds": time.perf_counter() - began})
        self.optuna_study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)

    def best(self) -> FrozenTrial:
        """Return the best complete trial; raise `InputError` if there is none."""
        complete = self.trials(TrialState.COMPLETE)
        if not complete:
            raise InputError(f"tuning {self.plan.name!r} has no trial that ran to its end yet")
        return max(complete, key=lambda t: (t.value, -t.number))

    def choose(self) -> Path:
        """Write the best settings to `params/tuned`, and record the study.

        The record has each field's share of the value's variance (PED-ANOVA).
        """
        plan, best = self.plan, self.best()
        counts = {"trials": len(self.trials(*FINISHED)), "pruned": len(self.trials(TrialState.PRUNED))}
        params = {"study": plan.name, "trial": best.number}
        metrics = {f"valid_{SELECT}": best.value, **counts}
        origin = records.provenance(NOTEBOOK) | {"device": self.device.card.name}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        chosen_by = {**params, **metrics, "seed": plan.seed, **origin, "time": now}
        series: dict[str, list[Any]] = {}
        if len(self.trials(TrialState.COMPLETE)) >= 6:  # fewer give no estimate of importance
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                shares = optuna.importance.get_param_importances(self.optuna_study, evaluator=evaluator)
            series = {"field": list(shares), "share": list(shares.values())}
        params |= best.params
        result = Result("tuning", metrics, params, series, plan.seed)
        key = records.params_hash({"study": self.key, **params})
        self.work().write(key, result, {"chosen": chosen_by}, {})
        arm = plan.arm("tuned", best.params)
        chosen = Tuned(arm.model, arm.train, chosen_by)
        return write_tuned(plan.size, self.dataset.name, self.dataset.fingerprint, chosen)

    def work(self) -> Work:
        """Return the grid of its records, with the default and, once chosen, the tuned recipe as arms."""
        plan = self.plan
        arms = [plan.arm("default", {})]
        if chosen := read_tuned(plan.size, self.dataset.name, self.dataset.fingerprint):
            arms.append(replace(arms[0], name="tuned", model=chosen.model, train=chosen.train))
        name = f"tuning-{plan.name}"
        grid = Grid(name=name, about=plan.about, notebook=NOTEBOOK, data=plan.data, arms=arms)
        return Work(grid, self.dataset, self.device)


def run(study: Study, options: Options, tracker: str = "none") -> int:
    """Run trials until the study's budget or this call's minutes are used; return how many ran here.

    Raises `InputError` if another process runs the study.
    """
    began, count, plan = time.monotonic(), 0, study.plan
    with system.locked(study.folder / "study.lock") as held:
        if not held:
            raise InputError(f"tuning {plan.name!r}: another process is running this study")
        while time.monotonic() - began < 60 * plan.minutes and study.run_trial(options, tracker):
            count += 1
            print(f"{plan.name}: {len(study.trials(*FINISHED))} of {plan.trials} trials", flush=True)
    return count


def compare(study: Study, options: Options) -> list[Result]:
    """Train default and tuned with the file's seeds and score them on the test split, paired by user."""
    work = study.work()
    if len(work.grid.arms) < 2:
        raise InputError(f"nothing is tuned yet: run `python -m reclib tune run {study.plan.name}` first")
    grids.run_grid(work, work.runs(), options)
    return [*grids.compare(work), *grids.score(work)]


def tune_main(argv: list[str] | None = None) -> int:
    """Run a study, or compare its chosen settings with the default."""
    parser = Parser(prog="python -m reclib tune", description="Search settings on validation.")
    parser.add_argument("action", choices=("run", "compare"))
    parser.add_argument("--trials", type=int, help="another budget than the file's, in trials")
    parser.add_argument("--minutes", type=float, help="another budget than the file's, in minutes")
    trackers = ", ".join(TRACKERS)
    parser.add_argument("--tracker", default="none", help=f"curves of the trials: {trackers} (none)")
    arguments = placed(parser, argv)
    plan = read_tuning(arguments.name)
    plan = replace(plan, trials=arguments.trials or plan.trials, minutes=arguments.minutes or plan.minutes)
    config = changed(plan.data, dataset=arguments.dataset) if arguments.dataset else plan.data
    study = Study(plan, prepare(config), resolve(arguments.gpu))
    options = Options(progress_bar=sys.stderr.isatty())
    if arguments.action == "compare":
        for result in compare(study, options):
            if result.name in ("validation_difference", "comparison"):
                print(result.params, result.metrics)
        return 0
    run(study, options, arguments.tracker)
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
    chosen_by: dict[str, Any] | None  # the study that tuned its settings; None: not tuned

    @property
    def title(self) -> str:
        """Its name in records and figures."""
        return self.size if self.chosen_by is None else f"{self.size} (tuned)"


def sized(p: Scaling, dataset: Dataset, size: str) -> Sized:
    """Return a size's configurations: the rule's learning rate, updated by the settings tuned for these data.

    Tokens and device stay those of the notebook, so that sizes can be compared. Raises `InputError` if the
    tuned settings are of other data.
    """
    shape: dict[str, Any] = {"max_len": p.max_len, "dropout": p.dropout}
    rate = learning_rate(model_config(size).hidden_dim, p.base_rate)
    train = train_of(p, p.seeds[0], window="random", learning_rate=rate)
    chosen = read_tuned(size, dataset.name, dataset.fingerprint) if p.tuned else None
    if chosen is not None:
        fixed = {"epochs", "eval_every", "batch_size", "precision"}
        train = changed(train, **{k: v for k, v in chosen.train.items() if k not in fixed})
        shape |= chosen.model
    model = model_config(size, num_items=dataset.num_items, **shape)
    return Sized(size, model, train, None if chosen is None else chosen.chosen_by)


def train(study: NotebookStudy, split: Split, configured: Sized, seed: int) -> Trained:
    """Train one seed of a size for notebook 03, or resume a run of the same code and data."""
    config, title = changed(configured.train, seed=seed), f"{study.device.label}-{configured.size}-seed{seed}"
    return train_model(NOTEBOOK, study.p, study.dataset, split, study.device, configured.model, config, title)


def committed_grids(prefix: str) -> list[str]:
    """Return the names of the grids with committed records that begin with `prefix`."""
    names = {row["data"]["name"] for row in records.committed() if row["notebook"] == NOTEBOOK}
    return sorted(name for name in names if name.startswith(prefix))


class Committed(NamedTuple):
    """The committed runs of a grid of sizes, its law, and the runs of its figure."""

    runs: list[dict[str, Any]]
    law: dict[str, Any]  # `findings.outcome`
    shown: list[Mapping[str, Any]]  # the runs, and those of the notebook on the same data


def committed_runs(study: NotebookStudy, notebook_runs: Sequence[Mapping[str, Any]]) -> dict[str, Committed]:
    """Return the grids of sizes that have committed records, by name."""
    grids_of_sizes = {}
    for name in committed_grids("scaling-"):
        rows = study.committed(grid=name)
        runs = [row for row in rows if row["name"] == "learning_curve"]
        beside: Sequence[Mapping[str, Any]] = notebook_runs if name == f"scaling-{study.dataset.name}" else []
        grids_of_sizes[name] = Committed(runs, outcome(rows, name), [*runs, *beside])
    counts = [f"{name} ({len(grid.runs)} runs)" for name, grid in grids_of_sizes.items()]
    print("committed:", ", ".join(counts) or "none")
    return grids_of_sizes


def keep_best(study: NotebookStudy, trained: Mapping[str, Sequence[Trained]]) -> str:
    """Save the run with the lowest validation loss under models/; return the model's name."""
    runs = [(title, run) for title, seeds in trained.items() for run in seeds]
    title, best = min(runs, key=lambda pair: pair[1].losses()["lowest_valid_loss"])
    name = f"{title.split()[0]}-{study.dataset.name}"
    origin = best.best() | {"git": records.git_state(), "versions": records.versions()}
    return saving.save_model(best.trainer.model, best.trainer.config, study.dataset, name, origin).name


def settings(sizes: Iterable[Sized]) -> pd.DataFrame:
    """Tabulate for each size the settings that tuning can change, and their origin."""
    rows = []
    for size in sizes:
        row: dict[str, Any] = {"size": size.size, "from": "the rule and this notebook's parameters"}
        if by := size.chosen_by:
            row["from"] = f"{by['study']}, trial {by['trial']} of {by['trials']}, {by['time'][:10]}"
        for name in ("learning_rate", "weight_decay", "mask_prob", "last_item_share"):
            row[name] = getattr(size.train, name)
        rows.append(row | {"dropout": size.model.dropout})
    return pd.DataFrame(rows).set_index("size")
