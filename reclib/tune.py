"""Tuning: trials of one recipe on validation, in a study that several processes may share and none can break.

    python -m reclib.tune run tiny-ml-100k             # to the file's budget; again: goes on
    python -m reclib.tune compare tiny-ml-100k         # default against tuned: seeds, then the test split

A study is `params/tuning/<name>.yaml`: data, size, recipe, space, budget. A trial is one run of `fit` with
some fields drawn; its value is the best NDCG@10 on validation, and one behind the median is pruned. The first
trial is the recipe as it stands, where the space holds it, so that what is chosen was never behind it.

Whoever runs a trial holds a lock on its folder. A trial that is running while nobody holds it belonged to a
process that was killed: it is told as failed and enqueued again with the same settings, and goes on from its
checkpoint. Unlike a heartbeat that takes no waiting, and a process that is only stopped keeps its trial.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from reclib import grid, paths, record, scoring, tracker, tuned
from reclib.assessment import Result
from reclib.command import Parser, exit_code
from reclib.config import InputError, changed
from reclib.curves import Curves
from reclib.data import Dataset, prepare
from reclib.experiment import Trained
from reclib.fit import SELECT, Options, fit
from reclib.grid import Arm, Grid, Work, held
from reclib.hardware import Device, resolve
from reclib.provenance import code_hash, git_state, versions
from reclib.trainer import StepStats
from reclib.tuning import Plan, configs, default, read, settings

NOTEBOOK = "03_scaling"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
STARTUP = 4  # trials that are drawn at random and never pruned


class Study:
    """A plan at work on one dataset and device."""

    def __init__(self, plan: Plan, dataset: Dataset, device: Device) -> None:
        self.plan, self.dataset, self.device = plan, dataset, device
        what = {"plan": {k: v for k, v in asdict(plan).items() if k in ("size", "model", "train", "seed")}}
        self.key = record.params_hash(what | {"space": plan.space, "data": dataset.fingerprint})
        self.folder = paths.runs() / "tune" / f"{plan.name}-{self.key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        url = f"sqlite:///{self.folder / 'study.db'}"
        with locked(self.folder / "study.lock"):  # or two processes would make the tables at once
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
        return self.folder / record.params_hash(dict(drawn))

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
        with held(self.folder / f"trial-{trial.number}") as free:
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
            with locked(self.folder / "study.lock"):
                claimed = self.claim()
                if claimed is None:
                    return False
                study, trial = claimed
                assert stack.enter_context(held(self.folder / f"trial-{trial.number}"))
            drawn = self.draw(trial)
            name = f"{self.plan.name}-trial{trial.number}"
            with tracker.start(watched_by, "tune", name, drawn) as track:
                self._run(study, trial, drawn, options, Curves(track, self.device))
        return True

    def _run(
        self, study: optuna.Study, trial: Trial, drawn: dict[str, Any], options: Options, curves: Curves
    ) -> None:
        model, train = configs(self.plan, self.dataset.num_items, drawn)
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
        key = record.params_hash({"study": self.key, "drawn": drawn})
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
        chosen = settings(self.plan, best.params)
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
        self.work().write(record.params_hash({"study": self.key, **own}), found, {"chosen": by}, {})
        name = self.dataset.name
        return tuned.write(self.plan.size, name, self.dataset.fingerprint, chosen._replace(chosen_by=by))

    def work(self) -> Work:
        """Return the grid that its records lie in: the default and, once chosen, the tuned recipe as arms."""
        plan = self.plan
        recipes = {"default": settings(plan, {})}
        if (found := tuned.read(plan.size, self.dataset.name, self.dataset.fingerprint)) is not None:
            recipes["tuned"] = found
        arms = [
            Arm(name, one.model, one.train, plan.size, "leave_one_out", plan.seeds, True)
            for name, one in recipes.items()
        ]
        shown = Grid(f"tuning-{plan.name}", plan.about, NOTEBOOK, plan.data, tuple(arms))
        return Work(shown, self.dataset, self.device)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a file's lock, waiting for it."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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
        raise InputError(f"nothing is tuned yet: run `python -m reclib.tune run {study.plan.name}` first")
    grid.run(work, work.runs(), options)
    return [*scoring.compare(work), *scoring.score(work)]


def main(argv: list[str] | None = None) -> int:
    """Run a study, or compare what it chose with the default."""
    parser = Parser(prog="python -m reclib.tune", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "compare"))
    parser.add_argument("name", help="a file of params/tuning, without .yaml")
    parser.add_argument("--dataset", help="another place of the same data: a file or a prepared folder")
    parser.add_argument("--trials", type=int, help="another budget than the file's, in trials")
    parser.add_argument("--minutes", type=float, help="another budget than the file's, in minutes")
    trackers = ", ".join(tracker.TRACKERS)
    parser.add_argument("--tracker", default="none", help=f"curves of the trials: {trackers} (none)")
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    given = parser.parse_args(argv)
    try:
        plan = read(given.name)
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


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
