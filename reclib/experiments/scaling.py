"""The scaling experiment: a law fitted to the small sizes of a grid, and its prediction of the largest.

    python -m reclib grid run scaling-ml-1m       # the small sizes; the largest is barred
    python -m reclib predict scaling-ml-1m
    python -m reclib grid run scaling-ml-1m       # now the largest as well
    python -m reclib predict --report scaling-ml-1m

A prediction is a record of the grid. Its hash is over the law, what it was fitted to and what it says; the
largest size may start only after it, and its records carry that hash. Once that size has begun nothing can be
predicted any more.

Learning rates follow one rule, with a check on two sizes (`learning_rate`).
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import yaml
from optuna.trial import FrozenTrial, Trial, TrialState

from reclib import records, system
from reclib.config import DataConfig, InputError, ModelConfig, TrainConfig, changed, model_config, validated
from reclib.cost.work import Footprint, demand_room
from reclib.data.dataset import Dataset
from reclib.data.prepare import prepare
from reclib.data.splits import Split
from reclib.evaluate import statistics
from reclib.experiments import grids
from reclib.experiments.baseline import Result, Trained, carried_out, counted
from reclib.experiments.grids import Arm, Grid, Work, read_grid
from reclib.hardware import Device, resolve
from reclib.parameters import Scaling
from reclib.records import code_hash, git_state, versions
from reclib.report.findings import outcome
from reclib.system import Parser
from reclib.train.fit import SELECT, TRACKERS, Curves, Options, fit, start_tracker
from reclib.train.trainer import StepStats

BASE_WIDTH, BASE_RATE = 128, 1e-3  # the anchor of the rule; trials on ml-1m gave twice the rate


def learning_rate(width: int, base: float = BASE_RATE) -> float:
    """Return the peak learning rate of a width by the rule of this study, to two digits.

    It falls with the square root of the width: halfway, on a logarithmic scale, between a constant rate and
    the 1/width that muP gives to hidden matrices under Adam (Yang et al. 2022, arXiv 2203.03466, table 3).
    The item tables, most of the parameters here, keep a constant rate there, and one rate serves both here.
    """
    return float(f"{base * (BASE_WIDTH / width) ** 0.5:.1e}")


def arm_named(work: Work, name: str) -> Arm:
    """Return an arm of a grid by its name."""
    return next(arm for arm in work.grid.arms if arm.name == name)


def losses_of(work: Work, arm: Arm) -> dict[int, dict[str, Any]]:
    """Return the newest record of each trained seed of an arm as it is configured now."""
    keys = {work.key(arm, seed): seed for seed in arm.seeds}
    rows = [row for row in work.rows("learning_curve") if row["params_hash"] in keys]
    return {keys[row["params_hash"]]: row for row in rows if "lowest_valid_loss" in row["metrics"]}


def predict(work: Work, early: bool = False) -> Result:
    """Predict the barred arm's validation loss from the others, and record it.

    `early` takes the seeds that are trained so far, one of each size at least; the record counts them. Raises
    `InputError` where the file predicts nothing, a run is missing, or the predicted size has begun.
    """
    asked = work.grid.predicts
    if asked is None:
        raise InputError(f"grid {work.grid.name!r} predicts nothing: its file has no key `predicts`")
    target = arm_named(work, asked.of)
    if begun := [str(seed) for seed in target.seeds if _begun(work, target, seed)]:
        raise InputError(
            f"{target.name} of grid {work.grid.name!r} has begun (seed {', '.join(begun)}): "
            "what is known cannot be predicted"
        )
    rows = {name: losses_of(work, arm_named(work, name)) for name in asked.sources}
    if missing := [name for name, found in rows.items() if not found]:
        raise InputError(f"grid {work.grid.name!r}: not trained yet: {', '.join(missing)}")
    arms = {name: arm_named(work, name) for name in asked.sources}
    lacking = [f"{n} seed {s}" for n, arm in arms.items() for s in arm.seeds if s not in rows[n]]
    if lacking and not early:
        raise InputError(
            f"grid {work.grid.name!r}: not trained yet: {', '.join(lacking)}; --early predicts without them"
        )
    by_size = seeds_by_size(row for found in rows.values() for row in found.values())
    size = _non_embedding(work, target)
    try:
        numbers = statistics.predict(by_size, size)
    except ValueError as error:
        raise InputError(f"grid {work.grid.name!r}: {error}") from None
    series: dict[str, list[Any]] = {
        "non_embedding": list(by_size),
        "loss": [float(np.mean(values)) for values in by_size.values()],
        "seeds": [len(values) for values in by_size.values()],
    }
    of = {"of": target.name, "size": size, "seeds": min(series["seeds"])}
    inputs = sorted(row["params_hash"] for found in rows.values() for row in found.values())
    said = {"target": work.configuration(target), "fitted_to": inputs}
    result = Result("prediction", numbers, of, series)
    key = records.params_hash({"law": numbers, "of": of, "series": series, **said})
    work.write(key, result, said, {})
    return result


def _begun(work: Work, arm: Arm, seed: int) -> bool:
    return work.trained(arm, seed) or any(work.folder(arm, seed).glob("step-*"))


def _non_embedding(work: Work, arm: Arm) -> int:
    from reclib.model.bert4rec import count_parameters

    return count_parameters(work.configs(arm, 0)[0])["non_embedding"]


def seeds_by_size(rows: Iterable[Mapping[str, Any]]) -> dict[float, list[float]]:
    """Return the lowest validation losses of the seeds of each size, smallest size first."""
    found: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        found[float(row["metrics"]["non_embedding"])].append(row["metrics"]["lowest_valid_loss"])
    return dict(sorted(found.items()))


def report(work: Work) -> list[str]:
    """Return lines that say what is predicted, what was measured, and the error."""
    found = outcome(records.latest(work_rows(work)), work.grid.name)
    if found["prediction"] is None:
        return ["no prediction is recorded yet"]
    one, m = found["prediction"], found["prediction"]["metrics"]
    lines = [
        f"law: {m['floor']:.4f} + {m['factor']:.4g} N^-{m['exponent']:.4f}, residual {m['residual']:.4f}",
        f"{one['own_params']['of']} at {one['own_params']['size']:,} non-embedding parameters: "
        f"predicted {m['predicted']:.4f} nats ({one['params_hash']}, {one['time']})",
    ]
    if found["measured"] is None:
        return [*lines, "not measured yet"]
    said = f"measured {found['measured']:.4f} over {found['seeds']} seed(s): "
    return [*lines, f"{said}error {found['error']:+.4f} nats, {found['relative_error']:+.2%}"]


def work_rows(work: Work) -> list[dict[str, Any]]:
    """Return the learning curves and predictions of a grid."""
    return [*work.rows("learning_curve"), *work.rows("prediction")]


def predict_main(argv: list[str] | None = None) -> int:
    """Predict, or compare the prediction with what came."""
    parser = Parser(prog="python -m reclib predict", description=__doc__.split("\n")[0])
    parser.add_argument("name", help="an experiment file of params/grids, without .yaml")
    parser.add_argument("--dataset", help="another place of the same data: a file or a prepared folder")
    parser.add_argument("--report", action="store_true", help="only compare with what came")
    parser.add_argument("--early", action="store_true", help="predict though seeds are missing")
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    given = parser.parse_args(argv)
    try:
        grid = read_grid(given.name)
        config = changed(grid.data, dataset=given.dataset) if given.dataset else grid.data
        work = Work(grid, prepare(config), resolve(given.gpu))
        if not given.report:
            predict(work, given.early)
        print("\n".join(report(work)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------
# Settings that a tuning study chose: read from `params/tuned/<size>-<dataset>.yaml`, and refused elsewhere.
#
# The file says what it was chosen on. Settings of one dataset say nothing about another, so a file whose
# data's fingerprint is not that of the data at hand is an error and no default.

KEYS = ("size", "dataset", "fingerprint", "model", "train", "chosen_by")


class Tuned(NamedTuple):
    """Chosen fields of the two configurations, and where they come from."""

    model: dict[str, Any]
    train: dict[str, Any]
    chosen_by: dict[str, Any]  # trials, value, seed, code, commit, device, versions, time


def tuned_file(size: str, dataset: str) -> Path:
    """Return where the settings of a size on a dataset lie."""
    return system.params() / "tuned" / f"{size}-{dataset}.yaml"


def read_tuned(size: str, dataset: str, fingerprint: str) -> Tuned | None:
    """Return the settings chosen for a size on a dataset, None where nothing was tuned.

    Raises `InputError` for a file that is not whole, or is of another size or dataset.
    """
    file = tuned_file(size, dataset)
    if not file.is_file():
        return None
    given = system.read_yaml(file)
    missing = [key for key in KEYS if not isinstance(given, dict) or key not in given]
    if missing:
        raise InputError(f"{file.name}: key {missing[0]!r} is missing; it needs {', '.join(KEYS)}")
    if given["size"] != size:
        raise InputError(f"{file.name}: tuned for size {given['size']!r}, not {size!r}")
    if given["fingerprint"] != fingerprint:
        raise InputError(
            f"{file.name}: tuned on {given['dataset']} with fingerprint {str(given['fingerprint'])[:12]}, "
            f"the data here have {fingerprint[:12]}: tune anew (python -m reclib tune), or set tuned=False"
        )
    return Tuned(given["model"], given["train"], given["chosen_by"])


def write_tuned(size: str, dataset: str, fingerprint: str, chosen: Tuned) -> Path:
    """Write the settings of a study, in place of earlier ones, whole or not at all."""
    file = tuned_file(size, dataset)
    body = {"size": size, "dataset": dataset, "fingerprint": fingerprint} | chosen._asdict()
    system.write_atomically(file, yaml.safe_dump(body, sort_keys=False))
    return file


# ------------------------------------------------------------------------------------------------
# Tuning files: `params/tuning/<name>.yaml`, read and checked, and the configurations of a trial.

SPACES = ({"low", "high"}, {"low", "high", "log"}, {"choices"})


@dataclass(frozen=True)
class TuningPlan:
    """A tuning file, read."""

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
    seeds: tuple[int, ...]  # of the comparison


def read_tuning(name: str) -> TuningPlan:
    """Read `params/tuning/<name>.yaml`; raise `InputError` for what it may not say."""
    file = system.params() / "tuning" / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise InputError(f"unknown tuning {name!r}; known: {known}")
    given = system.read_yaml(file)
    allowed = set(TuningPlan.__dataclass_fields__) - {"name"}
    for key in sorted(given.keys() ^ allowed):
        raise InputError(f"{file.name}: {'unknown' if key in given else 'missing'} key {key!r}")
    for field, space in given["space"].items():
        if not isinstance(space, dict) or set(space) not in SPACES:
            raise InputError(f"{file.name}, space of {field!r}: expected low and high (and log), or choices")
    data, seeds = validated(DataConfig, given["data"]), tuple(given["seeds"])
    plan = TuningPlan(**{"name": name, **given, "data": data, "seeds": seeds})
    ends = {field: space.get("low", space.get("choices", [None])[0]) for field, space in plan.space.items()}
    try:
        tuning_configs(plan, 10, ends)
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from None
    return plan


def tuning_settings(plan: TuningPlan, drawn: Mapping[str, Any]) -> Tuned:
    """Return the recipe with the drawn fields in it."""
    shape = {k.removeprefix("model."): v for k, v in drawn.items() if k.startswith("model.")}
    rest = {k: v for k, v in drawn.items() if not k.startswith("model.")}
    return Tuned(plan.model | shape, plan.train | rest, {})


def tuning_configs(
    plan: TuningPlan, num_items: int, drawn: Mapping[str, Any]
) -> tuple[ModelConfig, TrainConfig]:
    """Return the configurations of a trial."""
    chosen = tuning_settings(plan, drawn)
    train = validated(TrainConfig, chosen.train | {"seed": plan.seed})
    shape = {"num_items": num_items, "causal": train.objective == "next_item"} | chosen.model
    return model_config(plan.size, **shape), train


def default(plan: TuningPlan) -> dict[str, Any]:
    """Return the recipe's own values of the fields of the space; empty where the space leaves one out."""
    model, train = tuning_configs(plan, 10, {})
    values = {
        field: getattr(model, field.removeprefix("model.")) if "." in field else getattr(train, field)
        for field in plan.space
    }
    return values if all(_within(plan.space[field], value) for field, value in values.items()) else {}


def _within(space: Mapping[str, Any], value: Any) -> bool:
    return value in space["choices"] if "choices" in space else space["low"] <= value <= space["high"]


# ------------------------------------------------------------------------------------------------
# Tuning: trials of one recipe on validation, in a study that several processes may share and none can
# break.
#
#     python -m reclib tune run tiny-ml-100k             # to the file's budget; again: goes on
#     python -m reclib tune compare tiny-ml-100k         # default against tuned: seeds, then the test split
#
# A study is `params/tuning/<name>.yaml`: data, size, recipe, space, budget. A trial is one run of `fit`
# with some fields drawn; its value is the best NDCG@10 on validation, and one behind the median is pruned.
# The first trial is the recipe as it stands, where the space holds it, so that what is chosen was never
# behind it.
#
# Whoever runs a trial holds a lock on its folder. A trial that is running while nobody holds it belonged to
# a process that was killed: it is told as failed and enqueued again with the same settings, and goes on
# from its checkpoint. Unlike a heartbeat that takes no waiting, and a process that is only stopped keeps
# its trial.

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

STARTUP = 4  # trials that are drawn at random and never pruned


class Study:
    """A plan at work on one dataset and device."""

    def __init__(self, plan: TuningPlan, dataset: Dataset, device: Device) -> None:
        self.plan, self.dataset, self.device = plan, dataset, device
        what = {"plan": {k: v for k, v in asdict(plan).items() if k in ("size", "model", "train", "seed")}}
        self.key = records.params_hash(what | {"space": plan.space, "data": dataset.fingerprint})
        self.folder = system.runs() / "tune" / f"{plan.name}-{self.key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = f"sqlite:///{self.folder / 'study.db'}"
        with system.locked(
            self.folder / "study.lock", wait=True
        ):  # or two processes would make the tables at once
            self.storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
            self.open(0)

    def open(self, number: int) -> optuna.Study:
        """Return the study with a sampler of its own for the next trial, so that draws can be repeated."""
        sampler = optuna.samplers.TPESampler(
            seed=1_000 * self.plan.seed + number, n_startup_trials=STARTUP, constant_liar=True
        )
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP, n_warmup_steps=1)
        return optuna.create_study(
            storage=self.storage,
            study_name=self.plan.name,
            direction="maximize",
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )

    def trials(self) -> list[FrozenTrial]:
        """Return all trials, failed and waiting ones too."""
        return self.open(0).get_trials(deepcopy=False)

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
        trials = self.trials()
        for one in trials:
            if one.state == TrialState.RUNNING and not self._is_held(one):
                self._enqueue_again(one)
        running = [t for t in self.trials() if t.state == TrialState.RUNNING]
        if len(self.finished()) + len(running) >= self.plan.trials:
            return None
        study = self.open(len(trials))
        if not trials and (recipe := default(self.plan)):
            study.enqueue_trial(recipe)
        return study, study.ask()

    def _is_held(self, trial: FrozenTrial) -> bool:
        with system.locked(self.folder / f"trial-{trial.number}" / "lock") as free:
            return not free

    def _enqueue_again(self, dead: FrozenTrial) -> None:
        study = self.open(0)
        if not any(t.user_attrs.get("again") == dead.number for t in self.trials()):
            again = optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=dead.params,
                distributions=dead.distributions,
                user_attrs={"again": dead.number},
                intermediate_values=dead.intermediate_values,
                system_attrs={"fixed_params": dead.params},
            )
            study.add_trial(again)
        study.tell(dead.number, state=TrialState.FAIL)

    def draw(self, trial: Trial) -> dict[str, Any]:
        """Return the fields of the space, drawn."""
        drawn: dict[str, Any] = {}
        for field, space in self.plan.space.items():
            if "choices" in space:
                drawn[field] = trial.suggest_categorical(field, space["choices"])
            else:
                low, high, log = space["low"], space["high"], space.get("log", False)
                drawn[field] = trial.suggest_float(field, low, high, log=log)
        return drawn

    def one(self, options: Options, watched_by: str = "none") -> bool:
        """Run the next trial; return whether there was one."""
        with contextlib.ExitStack() as stack:
            with system.locked(self.folder / "study.lock", wait=True):
                claimed = self.claim()
                if claimed is None:
                    return False
                study, trial = claimed
                assert stack.enter_context(system.locked(self.folder / f"trial-{trial.number}" / "lock"))
            drawn = self.draw(trial)
            name = f"{self.plan.name}-trial{trial.number}"
            with start_tracker(watched_by, "tune", name, drawn) as track:
                self._run(study, trial, drawn, options, Curves(track, self.device))
        return True

    def _run(
        self, study: optuna.Study, trial: Trial, drawn: dict[str, Any], options: Options, curves: Curves
    ) -> None:
        model, train = tuning_configs(self.plan, self.dataset.num_items, drawn)
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
        said = {"model": asdict(model), "train": asdict(train), "drawn": drawn}
        about = {"trial": trial.number, "state": state.name.lower()} | drawn
        found = Result("trial", {f"valid_{SELECT}": value}, about, curve, self.plan.seed)
        # The record first: a kill in between gives the same record again, and readers take the newest.
        key = records.params_hash({"study": self.key, "drawn": drawn})
        self.work().write(key, found, said, {"trial_seconds": time.perf_counter() - began})
        study.tell(trial, value if state == TrialState.COMPLETE else None, state=state)

    def best(self) -> FrozenTrial:
        """Return the best trial that ran to its end; raise `InputError` where there is none."""
        done = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        if not done:
            raise InputError(f"tuning {self.plan.name!r} has no trial that ran to its end yet")
        return max(done, key=lambda t: (t.value, -t.number))

    def importance(self) -> dict[str, float]:
        """Return each field's share of the value's variance (PED-ANOVA); empty below six whole trials."""
        if sum(t.state == TrialState.COMPLETE for t in self.trials()) < 6:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.importance.get_param_importances(self.open(0), evaluator=evaluator)

    def choose(self) -> Path:
        """Write the best settings to `params/tuned`, and what the study was to the records."""
        best, trials = self.best(), self.finished()
        counts = {"trials": len(trials), "pruned": sum(t.state == TrialState.PRUNED for t in trials)}
        chosen = tuning_settings(self.plan, best.params)
        by: dict[str, Any] = {
            "study": self.plan.name,
            "trial": best.number,
            f"valid_{SELECT}": best.value,
            **counts,
        }
        by |= {"seed": self.plan.seed, "code": code_hash(NOTEBOOK), "git": git_state()}
        by |= {"device": self.device.card.name, "versions": versions()}
        by |= {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        shares = self.importance()
        series: dict[str, list[Any]] = (
            {"field": list(shares), "share": list(shares.values())} if shares else {}
        )
        own = {"study": self.plan.name, "trial": best.number} | best.params
        found = Result("tuning", {f"valid_{SELECT}": best.value, **counts}, own, series, self.plan.seed)
        self.work().write(records.params_hash({"study": self.key, **own}), found, {"chosen": by}, {})
        name = self.dataset.name
        return write_tuned(self.plan.size, name, self.dataset.fingerprint, chosen._replace(chosen_by=by))

    def work(self) -> Work:
        """Return the grid that its records lie in: the default and, once chosen, the tuned recipe as arms."""
        plan = self.plan
        recipes = {"default": tuning_settings(plan, {})}
        if (found := read_tuned(plan.size, self.dataset.name, self.dataset.fingerprint)) is not None:
            recipes["tuned"] = found
        arms = [
            Arm(name, one.model, one.train, plan.size, "leave_one_out", plan.seeds, True)
            for name, one in recipes.items()
        ]
        shown = Grid(f"tuning-{plan.name}", plan.about, NOTEBOOK, plan.data, tuple(arms))
        return Work(shown, self.dataset, self.device)


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


def tune_main(argv: list[str] | None = None) -> int:
    """Run a study, or compare what it chose with the default."""
    parser = Parser(prog="python -m reclib tune", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "compare"))
    parser.add_argument("name", help="a file of params/tuning, without .yaml")
    parser.add_argument("--dataset", help="another place of the same data: a file or a prepared folder")
    parser.add_argument("--trials", type=int, help="another budget than the file's, in trials")
    parser.add_argument("--minutes", type=float, help="another budget than the file's, in minutes")
    trackers = ", ".join(TRACKERS)
    parser.add_argument("--tracker", default="none", help=f"curves of the trials: {trackers} (none)")
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    given = parser.parse_args(argv)
    try:
        plan = read_tuning(given.name)
        plan = replace(plan, trials=given.trials or plan.trials, minutes=given.minutes or plan.minutes)
        config = changed(plan.data, dataset=given.dataset) if given.dataset else plan.data
        study = Study(plan, prepare(config), resolve(given.gpu))
        options = Options(progress_bar=sys.stderr.isatty())
        if given.action == "compare":
            for one in compare(study, options):
                if one.name in ("validation_difference", "comparison"):
                    print(one.params, one.metrics)
            return 0
        run(study, options, given.tracker)
        best = study.best()
        print(f"best: trial {best.number}, validation {SELECT} {best.value:.4f}, {best.params}")
        print(f"written: {study.choose().name}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------
# From the parameters of notebook 03 to its training runs: one recipe and many sizes.

NOTEBOOK = "03_scaling"


def recipe(p: Scaling, size: str, seed: int) -> TrainConfig:
    """Return a size's training configuration, its learning rate by the rule; nothing tuned."""
    shared = ("epochs", "batch_size", "micro_batch_size", "mask_prob", "last_item_share", "eval_every")
    given: dict[str, Any] = {name: getattr(p, name) for name in shared} | {"window": "random", "seed": seed}
    given |= {"precision": p.precision or "auto", "compile_mode": p.compile_mode or "off"}
    given["learning_rate"] = learning_rate(model_config(size).hidden_dim, p.base_rate)
    return validated(TrainConfig, given)


def configs(p: Scaling, dataset: Dataset, size: str, seed: int) -> tuple[ModelConfig, TrainConfig]:
    """Return a size's configurations: the recipe, and what was tuned for these data on top.

    Raises `InputError` where the tuned settings are of other data.
    """
    shape: dict[str, Any] = {"max_len": p.max_len, "dropout": p.dropout, "num_items": dataset.num_items}
    train = recipe(p, size, seed)
    chosen = _chosen(p, dataset, size)
    if chosen is not None:
        # Tokens and device stay the notebook's, so that sizes can be compared.
        length = {"epochs", "eval_every", "batch_size", "precision"}
        train = changed(train, **{k: v for k, v in chosen.train.items() if k not in length})
        shape |= chosen.model
    return model_config(size, **shape), train


def _chosen(p: Scaling, dataset: Dataset, size: str) -> Tuned | None:
    return read_tuned(size, dataset.name, dataset.fingerprint) if p.tuned else None


def demand_fit(
    p: Scaling, dataset: Dataset, split: Split, device: Device, size: str, room: int | None = None
) -> Footprint:
    """Return the estimated peak of a size's training; raise `InputError` that says what to change.

    `room` is the memory in bytes, None: what the device has. Nothing is allocated.
    """
    model, train = configs(p, dataset, size, p.seeds[0])
    return demand_room(model, train, split.train, device, room)


def train(p: Scaling, dataset: Dataset, split: Split, device: Device, size: str, seed: int) -> Trained:
    """Train one seed of a size, or go on with a run of the same code and data."""
    model, config = configs(p, dataset, size, seed)
    title = f"{device.label}-{size}-seed{seed}"
    return carried_out(NOTEBOOK, p, dataset, split, device, model, config, title)


def title(p: Scaling, dataset: Dataset, size: str) -> str:
    """Return what a size is called in records and figures: its name, and whether its settings are tuned."""
    return size if _chosen(p, dataset, size) is None else f"{size} (tuned)"


def settings(p: Scaling, dataset: Dataset) -> list[dict[str, Any]]:
    """Return, for each size, the settings that tuning could have changed, and where they are from."""
    rows = []
    for size in p.sizes:
        model, train = configs(p, dataset, size, p.seeds[0])
        chosen = _chosen(p, dataset, size)
        row = {"size": size, "from": "the rule and this notebook's parameters"}
        if chosen is not None:
            by = chosen.chosen_by
            row["from"] = f"{by['study']}, trial {by['trial']} of {by['trials']}, {by['time'][:10]}"
        row |= {name: getattr(train, name) for name in ("learning_rate", "weight_decay", "mask_prob")}
        rows.append(row | {"last_item_share": train.last_item_share, "dropout": model.dropout})
    return rows


def numbers(one: Trained) -> dict[str, float]:
    """Return what a run is recorded with: accuracy, loss, parameters by kind, tokens and FLOPs."""
    return one.best() | one.losses() | counted(one.trainer)
