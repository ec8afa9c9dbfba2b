"""Grids of training runs: arms times seeds of one experiment file, each trained once.

    python -m reclib grid run ml-1m                 # train the runs without a record
    python -m reclib grid status ml-1m
    python -m reclib score ml-1m                    # final arms and baselines on the test split
    python -m reclib score ml-1m --validation       # all arms against the first on validation
    python -m reclib score ml-1m --keep             # store test ranks of the runs so far, show nothing
    python -m reclib score ml-1m --from-ranks       # score stored ranks again, without weights

An experiment is `params/grids/<name>.yaml`: a dataset, a recipe, and arms that change some fields of the
model, the training or the data, or the share of the users that train. A run is identified by its
configuration and data. A stopped grid loses at most one checkpoint interval. The same command in several
processes shares the runs, since each takes a run that no other holds; that fills a large GPU that waits for
the launches of one small model.
Records are lines of `executed/<label>/grids/<name>.jsonl`; the ranks of every user are beside them.

Training uses validation only. Scoring chooses nothing: the file names the final arms, and epochs and the
baselines' hyperparameters are chosen on validation. Every scoring of the test split is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from reclib import records, system
from reclib.config import (
    STRICT,
    DataConfig,
    InputError,
    ModelConfig,
    Share,
    TrainConfig,
    as_dict,
    changed,
    model_config,
    validated,
)
from reclib.data.dataset import Dataset
from reclib.data.prepare import prepare
from reclib.data.splits import SPLITS, Split
from reclib.evaluate import metrics, statistics
from reclib.evaluate.baselines import PairwiseCounts, families, fit_pairwise_counts
from reclib.evaluate.baselines import choose as choose_baseline
from reclib.evaluate.metrics import Outcome
from reclib.experiments import baseline
from reclib.experiments.baseline import Assessed, Conditions, Model, Result, Trained
from reclib.hardware import Device, device_card, resolve
from reclib.report import tables
from reclib.system import Parser
from reclib.train.fit import Options, data_identity, fit, is_finished, rank_targets
from reclib.train.trainer import Trainer

SAMPLES = 2000  # bootstrap resamples of the users
MAIN_SPLIT = "leave_one_out"
# Names of arrays in a file of ranks; the arrays of other protocols are called by the protocol.
ARRAYS = {baseline.MAIN: "test", baseline.KEPT: "test kept"}
CONTROLS = {"test shuffled": "shuffled", "test shuffled but last": "shuffled_but_last", "test top": "top"}

# ------------------------------------------------------------------------------------------------
# Experiment files: all arms are checked before any is trained.

Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Predicts:
    """The arm that must be predicted before it starts, and the arms that it is predicted from."""

    of: str
    sources: list[str] = Field(alias="from")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Arm:
    """One configuration of a grid."""

    name: str
    size: str  # a name of config.SIZES
    seeds: list[int]
    model: Fields  # of ModelConfig, the catalogue apart
    train: Fields  # of TrainConfig, the seed apart
    data: Fields = field(default_factory=dict)  # of DataConfig, where they differ from the grid's
    split: Literal["leave_one_out", "global_time", "random_users"] = "leave_one_out"
    users: Share = 1.0  # share of the users whose histories train; all are evaluated
    final: bool = False  # scored on the test split


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Grid:
    """The content of an experiment file."""

    name: str
    about: str
    notebook: str  # that shows its figures
    data: DataConfig
    arms: list[Arm] = Field(min_length=1)
    predicts: Predicts | None = None
    baselines: Literal["all", "fast"] = "all"  # fast: popularity and pairwise counts, for large catalogues


WRONG_FORM = (AttributeError, KeyError, TypeError)  # raised by reading a YAML file of the wrong structure


@contextlib.contextmanager
def naming(place: str, form: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Put `place` in front of an `InputError`, and turn the exceptions of `form` into one."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    except form as error:
        raise InputError(f"{place}: not of the form of such a file ({error})") from None


def experiment_file(folder: str, name: str) -> tuple[str, Fields]:
    """Return file name and content of `params/<folder>/<name>.yaml`; raise `InputError` if it is unknown."""
    file = system.params() / folder / f"{name}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise InputError(f"unknown name {name!r} in params/{folder}; known: {names}")
    return file.name, system.read_yaml(file)


def read_grid(name: str) -> Grid:
    """Read `params/grids/<name>.yaml`; raise `InputError` that names file, arm and value."""
    file, content = experiment_file("grids", name)
    with naming(file, WRONG_FORM):
        keys = {"size", "seeds", "model", "train"} & content.keys()
        shared: Fields = {key: content.pop(key) for key in keys}
        arms = [_arm(shared, arm, fields or {}) for arm, fields in content.pop("arms").items()]
        if "predicts" in content:
            content["predicts"] = validated(Predicts, content["predicts"])
        data = validated(DataConfig, content["data"])
        grid = validated(Grid, {**content, "name": name, "data": data, "arms": arms})
        for arm in arms:  # check all arms before the first is trained
            arm_configs(arm, num_items=10, seed=0)
            with naming(f"arm {arm.name!r}"):
                changed(grid.data, **arm.data)
        names, predicts = [arm.name for arm in arms], grid.predicts
        if predicts and (unknown := {predicts.of, *predicts.sources} - set(names)):
            raise InputError(f"predicts names {min(unknown)!r}, which is no arm; arms: {', '.join(names)}")
        if predicts and predicts.of in predicts.sources:
            raise InputError(f"predicts {predicts.of!r} from itself")
    return grid


def _arm(shared: Fields, name: str, fields: Fields) -> Arm:
    with naming(f"arm {name!r}"):
        parts = {part: {**shared[part], **fields.get(part, {})} for part in ("model", "train")}
        return validated(Arm, {**shared, **fields, **parts, "name": name})


def arm_configs(arm: Arm, num_items: int, seed: int) -> tuple[ModelConfig, TrainConfig]:
    """Return the configurations of a run; raise `InputError` that names the arm."""
    with naming(f"arm {arm.name!r}"):
        train = validated(TrainConfig, {**arm.train, "seed": seed})
        shape = {"num_items": num_items, "causal": train.objective == "next_item", **arm.model}
        return model_config(arm.size, **shape), train


# ------------------------------------------------------------------------------------------------
# Runs.


class Work:
    """A grid on its dataset and a device: its runs and their files."""

    def __init__(self, grid: Grid, dataset: Dataset, device: Device) -> None:
        self.grid, self.dataset, self.device = grid, dataset, device
        self.file = system.executed() / device.label / "grids" / f"{grid.name}.jsonl"
        self._data = {"{}": dataset}

    def runs(self) -> list[tuple[Arm, int]]:
        """Return all (arm, seed), the first seed of every arm first."""
        pairs = [(arm, seed) for arm in self.grid.arms for seed in arm.seeds]
        return sorted(pairs, key=lambda pair: pair[0].seeds.index(pair[1]))

    def data_of(self, arm: Arm) -> Dataset:
        """Return the dataset of an arm: the grid's, or one prepared with the arm's own fields."""
        key = _data_key(arm)
        if key not in self._data:
            self._data[key] = prepare(changed(self.grid.data, **arm.data))
        return self._data[key]

    def split(self, arm: Arm) -> Split:
        """Return the split of an arm's data."""
        split = SPLITS[arm.split](self.data_of(arm))
        return split if arm.users == 1 else split.with_fewer_users(arm.users)

    def configs(self, arm: Arm, seed: int) -> tuple[ModelConfig, TrainConfig]:
        """Return the configurations of a run."""
        return arm_configs(arm, self.data_of(arm).num_items, seed)

    def key(self, arm: Arm, seed: int) -> str:
        """Return a hash that identifies a run by its configuration and data, not by its name or the code."""
        model, train = self.configs(arm, seed)
        data = data_identity(self.data_of(arm), self.split(arm))
        return records.params_hash({"model": model, "train": train, "data": data})

    def folder(self, arm: Arm, seed: int) -> Path:
        """Return the folder of a run's checkpoints."""
        return system.runs() / "grids" / self.key(arm, seed)

    def files(self) -> list[Path]:
        """Return the grid's files of all devices, this device's last; a run may be trained on any of them."""
        files = system.executed().glob(f"*/grids/{self.grid.name}.jsonl")
        return [*sorted(file for file in files if file != self.file), self.file]

    def ranks_file(self, arm: Arm, seed: int, renewed: bool = False) -> Path:
        """Return the file of every user's ranks; `renewed`: with a prior that counts validation items too."""
        name = self.key(arm, seed) + ("-with-validation" if renewed else "")
        places = [file.with_suffix("") / f"{name}.npz" for file in self.files()[::-1]]
        return next((place for place in places if place.is_file()), places[0])

    def rows(self, name: str) -> list[Fields]:
        """Return the records of this name, oldest first."""
        return [row for row in read_rows(self.file) if row["name"] == name]

    def curve(self, arm: Arm, seed: int) -> Fields | None:
        """Return the newest record of a run's training, None if it is not trained."""
        key = self.key(arm, seed)
        rows = [row for file in self.files() for row in read_rows(file) if row["name"] == "learning_curve"]
        return next((row for row in rows[::-1] if row["params_hash"] == key), None)

    def begun(self, arm: Arm, seed: int) -> bool:
        """Return whether a run has a record or a checkpoint."""
        return self.curve(arm, seed) is not None or any(self.folder(arm, seed).glob("step-*"))

    def not_trained(self, arms: Sequence[Arm]) -> list[str]:
        """Return the runs of arms that have no record of their training."""
        return [f"{arm.name} seed {seed}" for arm in arms for seed in arm.seeds if not self.curve(arm, seed)]

    def configuration(self, arm: Arm) -> Fields:
        """Return the configurations of an arm without its seed, with the data's fingerprint."""
        model, train = self.configs(arm, 0)
        fields = {key: value for key, value in as_dict(train).items() if key != "seed"}
        return {"model": as_dict(model), "train": fields, "data": self.data_of(arm).fingerprint}

    def prediction(self, arm: Arm) -> str | None:
        """Return the hash of the newest prediction of an arm with its present configuration, or None."""
        configured = self.configuration(arm)
        for row in self.rows("prediction")[::-1]:
            if row["own_params"]["of"] == arm.name and row["configuration"]["target"] == configured:
                return row["params_hash"]
        return None

    def barred(self, arm: Arm) -> bool:
        """Return whether an arm must not start yet, because the file requires a prediction of it first."""
        predicts = self.grid.predicts
        return predicts is not None and arm.name == predicts.of and self.prediction(arm) is None

    def train(self, arm: Arm, seed: int, options: Options) -> Trainer:
        """Train, resume or load a run; return its trainer with the best weights."""
        data, folder = self.data_of(arm), self.folder(arm, seed)
        model, train = self.configs(arm, seed)
        return fit(model, data, train, self.device, folder, options, self.split(arm))

    def parts(self, arms: Sequence[Arm]) -> list[tuple[Fields, Work]]:
        """Divide arms by what they train on; return its fields and a grid for each."""
        divided = []
        for (_, users), group in tables.by(arms, lambda arm: (_data_key(arm), arm.users)).items():
            grid = replace(self.grid, arms=[replace(arm, data={}) for arm in group])
            fields = group[0].data | ({"users": users} if users != 1 else {})
            divided.append((fields, Work(grid, self.data_of(group[0]), self.device)))
        return divided

    def write(
        self,
        key: str,
        result: Result,
        configuration: Mapping[str, Any],
        timings: Mapping[str, float],
        dataset: Dataset | None = None,
    ) -> None:
        """Append a record in the form of `records.Run.result`; its data have the name of the grid."""
        data = dataset or self.dataset
        card = {"name": self.grid.name, "fingerprint": data.fingerprint, "users": data.num_users}
        card |= {"items": data.num_items, "interactions": data.num_interactions}
        row = records.row(
            self.grid.notebook,
            result.name,
            result.metrics,
            card=device_card(self.device),
            profile="grid",
            params={"grid": self.grid.name},
            own_params=result.params,
            params_hash=key,
            data=card | {"test_targets_sha256": data.manifest["test_targets_sha256"]},
            timings=timings,
            series=result.series,
            seed=result.seed,
            kind="predicted" if result.name == "prediction" else "measured",
            earlier=sum(row["params_hash"] == key for row in self.rows(result.name)),
            configuration=dict(configuration),
        )
        records.append(self.file, row)


def _data_key(arm: Arm) -> str:
    return json.dumps(arm.data, sort_keys=True)


def read_rows(file: Path) -> list[Fields]:
    """Return the records of one grid file, without an incomplete last line."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else [""]
    return [json.loads(line) for line in lines[:-1] if line]


def save_ranks(file: Path, ranks: Mapping[str, np.ndarray]) -> None:
    """Write arrays of ranks by name, replacing the file."""
    small = {k: v.astype(np.int32) if v.dtype.kind == "i" else v for k, v in ranks.items()}
    with system.replacing(file) as fresh, fresh.open("wb") as out:
        np.savez_compressed(out, **small)  # type: ignore[arg-type]  # numpy's stub lacks **arrays


def run_grid(work: Work, chosen: Sequence[tuple[Arm, int]], options: Options) -> int:
    """Train the chosen runs that have no record; return how many were trained here.

    Runs held by other processes are skipped.
    """
    trained = 0
    for arm, seed in chosen:
        if work.barred(arm):
            print(f"{work.grid.name}: {arm.name}, seed {seed}: barred until it is predicted", flush=True)
            continue
        with system.locked(work.folder(arm, seed) / "lock") as is_free:
            if not is_free or work.curve(arm, seed):
                continue
            print(f"{work.grid.name}: {arm.name}, seed {seed}", flush=True)
            run = Trained(seed, work.train(arm, seed, options))
            valid = rank_targets(run.trainer, work.split(arm).valid)
            save_ranks(work.ranks_file(arm, seed), {"valid": valid.ranks})
            model, train = work.configs(arm, seed)
            configuration: Fields = {"model": as_dict(model), "train": asdict(train), "split": arm.split}
            optional: Fields = {"prediction": work.prediction(arm), "data": arm.data}
            optional["users"] = arm.users if arm.users != 1 else None
            configuration |= {name: value for name, value in optional.items() if value}
            result = run.result(arm.name)
            work.write(work.key(arm, seed), result, configuration, result.timings, work.data_of(arm))
            print(f"  {run.best()}, {result.timings['train_seconds']:.0f} s", flush=True)
            trained += 1
    return trained


def grid_status(work: Work, chosen: Sequence[tuple[Arm, int]]) -> list[str]:
    """Return one line for each run: not begun, barred, under way or trained."""
    lines = []
    for arm, seed in chosen:
        state = "not begun"
        if row := work.curve(arm, seed):
            hr, ndcg = (row["metrics"][f"valid_{name}"] for name in ("hr@10", "ndcg@10"))
            state = f"trained: validation HR@10 {hr:.4f}, NDCG@10 {ndcg:.4f}"
        elif work.begun(arm, seed):
            state = "under way"
        elif work.barred(arm):
            state = f"barred: not predicted yet (python -m reclib predict {work.grid.name})"
        lines.append(f"{arm.name:24} seed {seed}  {state}")
    return lines


def missing(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return the arms of a grid's file that lack seeds, each with its count: `arm (1 of 3)`.

    Empty if there is no such file.
    """
    try:
        arms = read_grid(name).arms
    except InputError:
        return []
    trained = {(row["own_params"]["model"], row["seed"]) for row in rows}
    counts = {arm.name: sum((arm.name, seed) in trained for seed in arm.seeds) for arm in arms}
    return [f"{a.name} ({counts[a.name]} of {len(a.seeds)})" for a in arms if counts[a.name] < len(a.seeds)]


# ------------------------------------------------------------------------------------------------
# Scoring. Test ranks of a run are stored beside its validation ranks. So a run that is trained later or
# elsewhere needs no weights of the others, and no run is ranked on the test split twice.


def final_arms(work: Work) -> list[Arm]:
    """Return the arms to be scored; raise `InputError` if one of their runs is not trained yet."""
    final = [arm for arm in work.grid.arms if arm.final]
    untrained = work.not_trained(final)
    if untrained or not final:
        reason = f"not trained yet: {', '.join(untrained)}" if untrained else "it has no final arm"
        raise InputError(f"grid {work.grid.name!r} cannot be scored: {reason}")
    return final


def counting(work: Work, arm: Arm) -> bool:
    """Return whether the models of an arm have a prior of pairwise counts."""
    return work.configs(arm, arm.seeds[0])[1].prior == "counts"


def stored_ranks(work: Work, arm: Arm, seed: int, renewed: bool = False) -> dict[str, np.ndarray]:
    """Return the stored arrays of a run; empty if it has not been ranked on the test split."""
    file = work.ranks_file(arm, seed, renewed)
    arrays = dict(np.load(file)) if file.is_file() else {}
    return arrays if "test protocols" in arrays else {}


def is_ranked(work: Work, arm: Arm, seed: int) -> bool:
    """Return whether a run's ranks on the test split are stored, with each of its priors."""
    return all(stored_ranks(work, arm, seed, renewed) for renewed in (False, True)[: 1 + counting(work, arm)])


def assess_run(
    work: Work, arm: Arm, seed: int, test: Conditions, counts: PairwiseCounts | None = None
) -> Assessed:
    """Return the assessment of a run on the test split, from stored ranks or by ranking the targets now.

    `counts` replaces its prior by one that counts validation items too, without training.
    """
    if stored := stored_ranks(work, arm, seed, counts is not None):
        outcomes = {}
        for name, label, comparable in stored["test protocols"]:
            ranks = stored[ARRAYS.get(name, f"test {name}")]
            outcomes[name] = Outcome(name, label, comparable == "1", ranks, np.arange(len(ranks)))
        return Assessed(outcomes, **{field: stored[name] for name, field in CONTROLS.items()})
    print(f"  {arm.name}, seed {seed}", flush=True)
    trainer = work.train(arm, seed, Options())
    if counts is not None:
        trainer.model.prior = trainer.model.prior.counted_anew(counts).to(trainer.where)
    assessed = baseline.assess_trained(trainer, test)
    arrays = {ARRAYS.get(name, f"test {name}"): outcome.ranks for name, outcome in assessed.outcomes.items()}
    arrays |= {name: getattr(assessed, field) for name, field in CONTROLS.items()}
    labels = [[o.protocol, o.label, str(int(o.comparable))] for o in assessed.outcomes.values()]
    file = work.ranks_file(arm, seed, counts is not None)
    before = {} if counts is not None else dict(np.load(file))  # the ranks on validation
    save_ranks(file, {**before, **arrays, "test protocols": np.array(labels)})
    return assessed


def keep(work: Work) -> list[str]:
    """Store test ranks of the trained runs of final arms, before all runs are trained; return these runs.

    This is for machines that will be lost with their weights. Nothing is shown or recorded until `score` has
    every run, so no choice can depend on it.
    """
    final = [arm for arm in work.grid.arms if arm.final and arm.split == MAIN_SPLIT]
    names = []
    for _, part in work.parts(final):
        split = part.split(part.grid.arms[0])
        test, items, counts = baseline.draw(part.dataset, split.test), part.dataset.num_items, None
        if any(counting(part, arm) for arm in part.grid.arms):
            settings = choose_baseline(families()["pairwise_counts"], split.train, items, split.valid).chosen
            counts = fit_pairwise_counts(split.before_test(), items, **settings)
        for arm, seed in part.runs():
            if not part.curve(arm, seed):
                continue
            if not is_ranked(part, arm, seed) and not is_finished(part.folder(arm, seed)):
                print(f"{arm.name} seed {seed} has a record and no weights here: left out", flush=True)
            else:
                assess_run(part, arm, seed, test)
                if counting(part, arm):
                    assess_run(part, arm, seed, test, counts)
                names.append(f"{arm.name} seed {seed}")
    return names


def score(work: Work, from_ranks: bool = False) -> list[Result]:
    """Score and record the final arms and the baselines on each dataset.

    Arms of leave-one-out are compared with the first of them; arms of other splits are scored under their
    own. `from_ranks` scores the former from stored ranks and skips the latter.
    """
    final = [arm for arm in final_arms(work) if not from_ranks or arm.split == MAIN_SPLIT]
    return [result for data, part in work.parts(final) for result in _score(part, data, from_ranks)]


def _score(work: Work, data: Fields, from_ranks: bool) -> list[Result]:
    main = [arm for arm in work.grid.arms if arm.split == MAIN_SPLIT]
    pairs = [(arm, seed) for arm in main for seed in arm.seeds]
    unranked = [f"{arm.name} seed {seed}" for arm, seed in pairs if not is_ranked(work, arm, seed)]
    if from_ranks and unranked:
        raise InputError(f"no ranks on the test split are kept of {', '.join(unranked)}: leave --from-ranks")
    split = work.split(main[0])
    test = baseline.draw(work.dataset, split.test)
    fitted = ("popularity", "pairwise_counts") if work.grid.baselines == "fast" else ()
    models, chosen = baseline.assess_baselines(split, work.dataset, test, fitted)
    for arm in main:
        models.append(Model(arm.name, [assess_run(work, arm, seed, test) for seed in arm.seeds], arm.seeds))
        if counting(work, arm):
            settings = chosen["pairwise_counts"]
            counts = fit_pairwise_counts(split.before_test(), work.dataset.num_items, **settings)
            runs = [assess_run(work, arm, seed, test, counts) for seed in arm.seeds]
            models.append(Model(f"{arm.name}_with_validation", runs, arm.seeds))
    out = choosing_seeds(work)
    if out:
        print("left out of the comparisons, since they chose the recipe:", out)
    results = baseline.everything(models, work.dataset, split.test, main[0].name, SAMPLES, out)
    for arm, seed in work.runs():
        if arm.split != MAIN_SPLIT:
            trainer = work.train(arm, seed, Options())
            name = arm.name.split(" (")[0]  # "causal (global time)": the protocol says the rest
            results += baseline.other_split(trainer, work.split(arm), SAMPLES, name, seed)
    keys = {f"{arm.name} seed {seed}": work.key(arm, seed) for arm, seed in work.runs()}
    common = {"baselines": chosen, "bootstrap_samples": SAMPLES, "looks": looks_before(work)}
    common |= {"seeds_left_out": out} | ({"data": data} if data else {})
    key = records.params_hash({"scored": keys, "data": work.dataset.fingerprint})
    for result in results:
        compared = [str(result.params.get(name)) for name in ("model", "against")]
        names = {name.removesuffix("_with_validation") for name in compared}
        scored = [arm for arm in work.grid.arms if arm.name.split(" (")[0] in names]
        arms = {arm.name: _arm_configuration(work, arm) for arm in scored}
        own_keys = {run: keys[run] for run in (f"{arm.name} seed {s}" for arm in scored for s in arm.seeds)}
        result_key = records.params_hash({"of": key, "own": result.params, "seed": result.seed})
        work.write(result_key, result, common | {"runs": own_keys, "arms": arms}, {})
    return results


def score_apart(work: Work) -> list[Result]:
    """Score the pairwise counts and the trained arms under each rule for ties, or at each share of the users.

    For grids whose arms differ in what they train on. Nothing is paired by user: test targets differ between
    rules for ties. Only arms with all seeds trained are scored, named without their ` (...)`.
    `later_ndcg@10` is that of users whose target is later than the item before it.
    """
    results = []
    kind, defaults = "tie_rule", {"ties": "source", "ties_seed": 0}
    if any(arm.users != 1 for arm in work.grid.arms):
        kind, defaults = "user_share", {"users": 1.0}
    for data, part in work.parts(work.grid.arms):
        split = part.split(part.grid.arms[0])
        test = baseline.draw(part.dataset, split.test)
        models, chosen = baseline.assess_baselines(split, part.dataset, test, ["pairwise_counts"])
        arms = {arm.name.split(" (")[0]: arm for arm in part.grid.arms if not part.not_trained([arm])}
        for name, arm in arms.items():
            models.append(Model(name, [assess_run(part, arm, seed, test) for seed in arm.seeds], arm.seeds))
        configuration = {"baselines": chosen, "bootstrap_samples": SAMPLES, "data": data}
        configuration["arms"] = {name: _arm_configuration(part, arm) for name, arm in arms.items()}
        later, of_seeds = None, {model.name: model for model in models}
        if part.dataset.times is not None:
            groups = statistics.by_time_before(split.test.histories, part.dataset.times)
            later = groups.member == 1
        for result in baseline.headline(models, SAMPLES):
            if later is not None and later.any():
                model = of_seeds[result.params["model"]]
                values = model.per_seed("ndcg@10")[:, later]
                rows = slice(None) if result.seed is None else model.seeds.index(result.seed)
                result.metrics["later_ndcg@10"] = float(values[rows].mean())
            results.append(result._replace(name=kind, params=result.params | defaults | data))
            # "ties" is the name of both kinds: earlier records have it in their hash
            key = records.params_hash({"ties": results[-1].params, "data": part.dataset.fingerprint})
            part.write(key, results[-1], configuration, {})
    return results


def _arm_configuration(work: Work, arm: Arm) -> Fields:
    """Return the configurations of an arm for a record of scoring."""
    model, train = work.configs(arm, arm.seeds[0])
    return {"model": as_dict(model), "train": asdict(train), "split": arm.split, "seeds": arm.seeds}


def choosing_seeds(work: Work) -> dict[str, list[int]]:
    """Return by arm the seeds whose runs were used to choose a recipe, according to the committed records.

    These runs have a learning curve in a grid of trials, ablations or tuning too. They stay in the means and
    are left out of the comparisons.
    """
    curves = [row for row in records.committed() if row["name"] == "learning_curve"]
    others = [row for row in curves if row["data"]["name"] != work.grid.name]
    keys = {row["params_hash"] for row in others if tables.chooses(row["data"]["name"])}
    seeds = {arm.name: [s for s in arm.seeds if work.key(arm, s) in keys] for arm in work.grid.arms}
    return {name: chose for name, chose in seeds.items() if chose}


def looks_before(work: Work) -> dict[str, int]:
    """Return by model family the number of configurations with records on this test split."""
    counts = tables.scored_configurations(records.read(system.committed()))
    models = [(as_dict(work.configs(arm, arm.seeds[0])[0]), arm.name) for arm in work.grid.arms]
    families = sorted({tables.family(*model) for model in models})
    return {kind: counts.get((work.dataset.fingerprint, "leave-one-out", kind), 0) for kind in families}


def compare(work: Work) -> list[Result]:
    """Compare every trained arm with the first on validation, paired by user, corrected, and record it.

    The range over seeds is that of the arm's means minus the base's mean over its seeds.
    """
    results = []
    for _, part in work.parts(work.grid.arms):
        base = part.grid.arms[0]
        values = {}
        for arm in part.grid.arms:
            files = [part.ranks_file(arm, seed) for seed in arm.seeds if part.curve(arm, seed)]
            if arm.split == base.split and files:
                values[arm.name] = np.stack([metrics.ndcg(np.load(file)["valid"], 10) for file in files])
        if base.name not in values:
            continue
        mean = float(values[base.name].mean())
        for comparison in statistics.compare(values, base.name):
            result = baseline.compared(comparison, "ndcg@10", "validation_difference")
            low, high = (end - mean for end in comparison.seed_range)
            numbers = {"value": mean + comparison.difference.mean, "base": mean}
            numbers |= {"seed_low": low, "seed_high": high}
            results.append(result._replace(metrics=result.metrics | numbers))
            key = records.params_hash({"compared": result.params, "data": part.dataset.fingerprint})
            part.write(key, results[-1], {}, {})
    return results


# ------------------------------------------------------------------------------------------------
# Commands.


def work_of(options: argparse.Namespace) -> Work:
    """Return the grid named by the options of `placed`, on its dataset and device."""
    grid = read_grid(options.name)
    if options.dataset:
        grid = replace(grid, data=changed(grid.data, dataset=options.dataset))
    return Work(grid, prepare(grid.data), resolve(options.gpu))


def placed(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """Parse a command's options and those of every experiment: name, dataset and device."""
    parser.add_argument("name", help="an experiment file of params, without .yaml")
    parser.add_argument("--dataset", help="another place of the same data: a file or a prepared folder")
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    return parser.parse_args(argv)


def choose(work: Work, arms: Sequence[str] | None, seeds: Sequence[int] | None) -> list[tuple[Arm, int]]:
    """Return the runs of the named arms and seeds; raise `InputError` for an unknown one."""
    names = [arm.name for arm in work.grid.arms]
    if unknown := [name for name in arms or () if name not in names]:
        raise InputError(f"unknown arm {unknown[0]!r} of grid {work.grid.name!r}; known: {', '.join(names)}")
    pairs = [(arm, seed) for arm, seed in work.runs() if arm.name in (arms or names)]
    available = sorted({seed for _, seed in pairs})
    if unknown_seeds := set(seeds or ()) - set(available):
        raise InputError(
            f"--seeds has {min(unknown_seeds)}; seeds of these arms: {', '.join(map(str, available))}"
        )
    return [(arm, seed) for arm, seed in pairs if seed in (seeds or available)]


def grid_main(argv: list[str] | None = None) -> int:
    """Run or describe a grid."""
    system.hold()
    parser = Parser(prog="python -m reclib grid", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "status"))
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="some arms only")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="some seeds only")
    options = placed(parser, argv)
    work = work_of(options)
    chosen = choose(work, options.arms, options.seeds)
    if options.action == "run":
        run_grid(work, chosen, Options(progress_bar=sys.stderr.isatty()))
    print("\n".join(grid_status(work, chosen)))
    return 0


def score_main(argv: list[str] | None = None) -> int:
    """Score a grid and print its table."""
    parser = Parser(prog="python -m reclib score", description="Score a grid's final runs on the test split.")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--validation", action="store_true", help="compare all arms with the first on it")
    instead.add_argument("--keep", action="store_true", help="keep what the runs so far show on test, unseen")
    text = "from kept ranks: no weights, no other split"
    instead.add_argument("--from-ranks", action="store_true", help=text)
    options = placed(parser, argv)
    work = work_of(options)
    if options.keep:
        print("kept:", ", ".join(keep(work)) or "no run is trained yet")
        return 0
    if options.name.startswith(tables.APART):
        results = score_apart(work)
    else:
        results = compare(work) if options.validation else score(work, options.from_ranks)
    for result in results:
        if result.name in ("test_metrics", "tie_rule", "user_share", "validation_difference"):
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            seed = "" if result.seed is None else f" seed {result.seed}"
            rule = ", ".join(f"{key} {value}" for key, value in result.params.items() if key != "model")
            print(f"{result.params['model']}{seed}{f' ({rule})' if rule else ''}: {numbers}")
    return 0
