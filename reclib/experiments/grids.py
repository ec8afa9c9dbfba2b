"""Grids of training runs: arms times seeds of one experiment file, each trained once, whoever asks.

An experiment is `params/grids/<name>.yaml`: a dataset, a recipe, and arms that change some of its fields. A
run is known by its configuration and data, so a grid that is stopped loses at most one checkpoint interval,
and several processes may work on one grid: each takes a run that nobody holds.

Training looks at validation only. The arms that the file calls final are scored on the test split, by
`baseline`, from the weights that validation chose; every scoring is a record, so they can be counted.

A file may bar one arm until a prediction of it is recorded (`scaling`): the record of that arm then carries
the prediction's hash.

    python -m reclib grid run ml-1m        # train what is not trained yet
    python -m reclib grid run ml-1m --parallel 3    # three runs at a time on one device
    python -m reclib grid status ml-1m

Runs side by side fill a large GPU that waits for the launches of one small model. Each is a process of its
own: their kernels take turns on the GPU, and overlap under NVIDIA's MPS. On a CPU they divide its threads.

Records are lines of `executed/<label>/grids/<name>.jsonl`; the ranks of every user lie beside them.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reclib import records, system
from reclib.config import (
    DataConfig,
    InputError,
    ModelConfig,
    TrainConfig,
    as_dict,
    changed,
    model_config,
    validated,
)
from reclib.cost.work import demand_room, device_bytes, side_by_side
from reclib.data.dataset import Dataset
from reclib.data.prepare import prepare
from reclib.data.splits import SPLITS, Split, leave_one_out
from reclib.evaluate import metrics, statistics
from reclib.evaluate.metrics import Outcome
from reclib.experiments import baseline
from reclib.experiments.baseline import Assessed, Conditions, Model, Result, Trained, counted
from reclib.hardware import GIB, Device, device_card, resolve
from reclib.report import tables
from reclib.report.tables import Record
from reclib.system import Parser
from reclib.train import distributed
from reclib.train.fit import Options, data_identity, fit, rank_targets
from reclib.train.trainer import Trainer

# ------------------------------------------------------------------------------------------------
# Experiment files: `params/grids/<name>.yaml`, read and checked to the last arm before anything is trained.
#
# A file states a dataset, a size and a recipe, and arms that change some of it. It may bar one arm until a
# prediction of it is recorded.


@dataclass(frozen=True)
class Arm:
    """One configuration of a grid."""

    name: str
    model: dict[str, Any]  # fields of ModelConfig, the catalogue apart
    train: dict[str, Any]  # fields of TrainConfig, the seed apart
    size: str  # a name of config.SIZES
    split: str  # a name of SPLITS
    seeds: tuple[int, ...]
    final: bool  # scored on the test split


@dataclass(frozen=True)
class Predicts:
    """Which arm may not start before it is predicted, and from which it is."""

    of: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """An experiment file, read."""

    name: str
    about: str
    notebook: str  # that draws it
    data: DataConfig
    arms: tuple[Arm, ...]
    predicts: Predicts | None = None


def read_grid(name: str) -> Grid:
    """Read `params/grids/<name>.yaml`; raise `InputError` for what it may not say."""
    file = system.params() / "grids" / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml")))
        raise InputError(f"unknown grid {name!r}; known: {known}")
    given = system.read_yaml(file)
    allowed = {"about", "notebook", "data", "size", "seeds", "model", "train", "arms"}
    for key in (given.keys() - {"predicts"}) ^ allowed:
        raise InputError(f"{file.name}: {'unknown' if key in given else 'missing'} key {key!r}")
    arms = tuple(_arm(file, given, arm, own or {}) for arm, own in given["arms"].items())
    data = validated(DataConfig, given["data"])
    predicts = _predicts(file, given["predicts"], given["arms"]) if "predicts" in given else None
    grid = Grid(name, given["about"], given["notebook"], data, arms, predicts)
    for arm in arms:  # a mistake in the last arm is told before the first is trained
        arm_configs(grid, arm, num_items=10, seed=0)
    return grid


def _predicts(file: Path, given: Mapping[str, Any], arms: Mapping[str, Any]) -> Predicts:
    if not isinstance(given, dict) or given.keys() != {"of", "from"} or not isinstance(given["from"], list):
        raise InputError(f"{file.name}: predicts is {given!r}: expected an arm `of`, a list of arms `from`")
    for arm in [given["of"], *given["from"]]:
        if arm not in arms:
            raise InputError(f"{file.name}: predicts names {arm!r}, which is no arm; arms: {', '.join(arms)}")
    if given["of"] in given["from"]:
        raise InputError(f"{file.name}: predicts {given['of']!r} from itself")
    return Predicts(given["of"], tuple(given["from"]))


def _arm(file: Path, given: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> Arm:
    allowed = ("final", "model", "seeds", "size", "split", "train")
    for key in own.keys() - set(allowed):
        raise InputError(f"{file.name}, arm {name!r}: unknown key {key!r}; allowed: {', '.join(allowed)}")
    split = own.get("split", "leave_one_out")
    if split not in SPLITS:
        known = ", ".join(SPLITS)
        raise InputError(f"{file.name}, arm {name!r}: unknown split {split!r}; allowed: {known}")
    return Arm(
        name,
        given["model"] | own.get("model", {}),
        given["train"] | own.get("train", {}),
        own.get("size", given["size"]),
        split,
        tuple(own.get("seeds", given["seeds"])),
        bool(own.get("final", False)),
    )


def arm_configs(grid: Grid, arm: Arm, num_items: int, seed: int) -> tuple[ModelConfig, TrainConfig]:
    """Return the configurations of a run; raise `InputError` that names the arm."""
    try:
        train = validated(TrainConfig, arm.train | {"seed": seed})
        shape = {"num_items": num_items, "causal": train.objective == "next_item"} | arm.model
        return model_config(arm.size, **shape), train
    except InputError as error:
        raise InputError(f"{grid.name}.yaml, arm {arm.name!r}: {error}") from None


# ------------------------------------------------------------------------------------------------


class Work:
    """A grid on one dataset and device: its runs, and where they lie."""

    def __init__(self, grid: Grid, dataset: Dataset, device: Device) -> None:
        self.grid, self.dataset, self.device = grid, dataset, device
        self.file = system.executed() / device.label / "grids" / f"{grid.name}.jsonl"

    def runs(self) -> list[tuple[Arm, int]]:
        """Return all (arm, seed), the first seed of every arm first."""
        pairs = [(arm, seed) for arm in self.grid.arms for seed in arm.seeds]
        return sorted(pairs, key=lambda pair: pair[0].seeds.index(pair[1]))

    def configs(self, arm: Arm, seed: int) -> tuple[ModelConfig, TrainConfig]:
        """Return the configurations of a run."""
        return arm_configs(self.grid, arm, self.dataset.num_items, seed)

    def key(self, arm: Arm, seed: int) -> str:
        """Return what identifies a run: its configuration and data, not its name or the code."""
        model, train = self.configs(arm, seed)
        data = data_identity(self.dataset, self.split(arm))
        return records.params_hash({"model": model, "train": train, "data": data})

    def split(self, arm: Arm) -> Split:
        """Return how an arm's data are divided."""
        return SPLITS[arm.split](self.dataset)

    def folder(self, arm: Arm, seed: int) -> Path:
        """Return the folder of a run's checkpoints."""
        return system.runs() / "grids" / self.key(arm, seed)

    def ranks_file(self, arm: Arm, seed: int) -> Path:
        """Return the file of every user's ranks."""
        return self.file.with_suffix("") / f"{self.key(arm, seed)}.npz"

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the records of this name, oldest first."""
        return [row for row in read_rows(self.file) if row["name"] == name]

    def trained(self, arm: Arm, seed: int) -> bool:
        """Whether a run has a record of its training."""
        key = self.key(arm, seed)
        return any(row["params_hash"] == key for row in self.rows("learning_curve"))

    def prediction(self, arm: Arm) -> str | None:
        """Return the hash of the newest prediction of an arm as it is configured now, None without one."""
        asked = self.configuration(arm)
        mine = [row for row in self.rows("prediction") if row["own_params"]["of"] == arm.name]
        same = [row for row in mine if row["configuration"]["target"] == asked]
        return same[-1]["params_hash"] if same else None

    def configuration(self, arm: Arm) -> dict[str, Any]:
        """Return what an arm is, whatever the seed, with the data's fingerprint."""
        model, train = self.configs(arm, 0)
        without = {key: value for key, value in as_dict(train).items() if key != "seed"}
        return {"model": asdict(model), "train": without, "data": self.dataset.fingerprint}

    def barred(self, arm: Arm) -> bool:
        """Whether an arm may not start yet: the file wants it predicted, and it is not."""
        predicts = self.grid.predicts
        return predicts is not None and arm.name == predicts.of and self.prediction(arm) is None

    def train(self, arm: Arm, seed: int, options: Options) -> Trainer:
        """Train a run, or go on with it, or load it; return its trainer with the best weights."""
        model, train = self.configs(arm, seed)
        split = self.split(arm)
        return fit(model, self.dataset, train, self.device, self.folder(arm, seed), options, split)

    def write(
        self, key: str, found: Result, configuration: Mapping[str, Any], timings: Mapping[str, float]
    ) -> None:
        """Append a record, in the form of `records.Run.result`, with the grid's name as its profile."""
        row = records.row(
            self.grid.notebook,
            found.name,
            found.metrics,
            card=device_card(self.device),
            profile="grid",
            params={"grid": self.grid.name},
            own_params=found.params,
            params_hash=key,
            data={
                "name": self.grid.name,
                "fingerprint": self.dataset.fingerprint,
                "users": self.dataset.num_users,
                "items": self.dataset.num_items,
                "interactions": self.dataset.num_interactions,
                "test_targets_sha256": self.dataset.manifest["test_targets_sha256"],
            },
            timings=timings,
            series=found.series,
            seed=found.seed,
            kind="predicted" if found.name == "prediction" else "measured",
            earlier=sum(row["params_hash"] == key for row in self.rows(found.name)),
            configuration=dict(configuration),
        )
        records.append(self.file, row)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the records of one grid file; a last line that is not whole yet is left out."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def save_ranks(file: Path, ranks: Mapping[str, np.ndarray]) -> None:
    """Write the ranks of every user, by name, in place of what an earlier run wrote."""
    small = {
        name: values.astype(np.int32) if values.dtype.kind == "i" else values
        for name, values in ranks.items()
    }
    with system.replacing(file) as fresh, fresh.open("wb") as out:
        np.savez_compressed(out, **small)  # type: ignore[arg-type]  # numpy's stub knows no **arrays


def run_grid(work: Work, chosen: Sequence[tuple[Arm, int]], options: Options, parallel: int = 1) -> int:
    """Train the chosen runs that have no record; return how many were trained here.

    A run that another process holds is passed over: whoever holds it finishes it. A record says of how many
    runs side by side it is one (`parallel`): its seconds are not those of a run alone.
    """
    trained = 0
    for arm, seed in chosen:
        if work.barred(arm):
            print(f"{work.grid.name}: {arm.name}, seed {seed}: barred until it is predicted", flush=True)
            continue
        with system.locked(work.folder(arm, seed) / "lock") as mine:
            if not mine or work.trained(arm, seed):
                continue
            print(f"{work.grid.name}: {arm.name}, seed {seed}", flush=True)
            one = Trained(seed, work.train(arm, seed, options))
            valid = rank_targets(one.trainer, work.split(arm).valid, options.remove_seen)
            save_ranks(work.ranks_file(arm, seed), {"valid": valid.ranks})
            model, train = work.configs(arm, seed)
            said: dict[str, Any] = {"model": asdict(model), "train": asdict(train), "split": arm.split}
            said |= {"prediction": known} if (known := work.prediction(arm)) else {}
            said |= {"parallel": parallel} if parallel > 1 else {}
            numbers = one.best() | one.losses() | counted(one.trainer)
            found = Result("learning_curve", numbers, {"model": arm.name}, one.curve(), seed)
            work.write(work.key(arm, seed), found, said, one.timings())
            print(f"  {one.best()}, {one.timings()['train_seconds']:.0f} s", flush=True)
            trained += 1
    return trained


def demand_parallel(work: Work, chosen: Sequence[tuple[Arm, int]], parallel: int) -> int:
    """Return how many processes have a run to take, `parallel` at most.

    Raises `InputError` where so many of the largest runs do not fit into the device's memory at once.
    """
    if parallel < 1:
        raise InputError(f"--parallel is {parallel}: expected at least 1")
    left = [(arm, seed) for arm, seed in chosen if not (work.barred(arm) or work.trained(arm, seed))]
    processes = min(parallel, len(left))
    if processes > 1:
        totals = [
            demand_room(*work.configs(arm, seed), work.split(arm).train, work.device).total
            for arm, seed in left
        ]
        largest = sorted(totals, reverse=True)[:processes]
        room, kind = device_bytes(work.device), work.device.torch_device.type
        fit = side_by_side(largest, room, kind)
        if fit < processes:
            raise InputError(
                f"--parallel {parallel}: {fit} of these runs fit side by side into {room / GIB:.1f} GiB; the "
                f"largest {processes} take {sum(largest) / GIB:.1f} GiB"
            )
    return processes


def run_parallel(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m reclib grid ARGUMENTS` in several processes that share its runs; return an exit code."""
    kills = system.memory_kills()
    threads = max(1, torch.get_num_threads() // processes)
    codes = distributed.side_by_side(["reclib", "grid", *arguments, "--worker"], processes, threads)
    for number, code in enumerate(codes, 1):
        if code:  # what it could say itself is said
            who = f"process {number} of {processes}"
            print(f"error: {system.of_death(code, system.memory_kills() - kills, who)}", file=sys.stderr)
    return 2 if any(codes) else 0


def grid_status(work: Work, chosen: Sequence[tuple[Arm, int]]) -> list[str]:
    """Return one line for each run: not begun, under way or trained, and how often it was scored."""
    lines = []
    for arm, seed in chosen:
        key = work.key(arm, seed)
        found = [row for row in work.rows("learning_curve") if row["params_hash"] == key]
        said = "not begun"
        if found:
            best = found[-1]["metrics"]
            said = f"trained: validation HR@10 {best['valid_hr@10']:.4f}, NDCG@10 {best['valid_ndcg@10']:.4f}"
        elif any(work.folder(arm, seed).glob("step-*")):
            said = "under way"
        elif work.barred(arm):
            said = f"barred: not predicted yet (python -m reclib predict {work.grid.name})"
        lines.append(f"{arm.name:24} seed {seed}  {said}")
    return lines


def grid_main(argv: list[str] | None = None) -> int:
    """Run, score or describe a grid."""
    system.hold()
    arguments = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m reclib grid", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("run", "status"))
    parser.add_argument("name", help="an experiment file of params/grids, without .yaml")
    parser.add_argument("--dataset", help="another place of the same data: a file or a prepared folder")
    parser.add_argument("--arms", help="some arms only, separated by commas; quote a name that has one")
    parser.add_argument("--seeds", help="some seeds only, separated by commas")
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs side by side (1)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of several processes
    given = parser.parse_args(arguments)
    try:
        grid = read_grid(given.name)
        config = changed(grid.data, dataset=given.dataset) if given.dataset else grid.data
        work = Work(grid, prepare(config), resolve(given.gpu))
        chosen = choose(work, given.arms, given.seeds)
        code = 0
        if given.worker:
            run_grid(work, chosen, Options(), given.parallel)
            return 0
        if given.action == "run":
            processes = demand_parallel(work, chosen, given.parallel)
            if processes > 1:
                code = run_parallel(arguments, processes)
            else:
                run_grid(work, chosen, Options(progress_bar=sys.stderr.isatty()))
        print("\n".join(grid_status(work, chosen)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def named_arms(said: str, names: Sequence[str]) -> list[str]:
    """Return the names in a list with commas; a name that has a comma stands alone, or in double quotes."""
    return [said] if said in names else next(csv.reader([said], skipinitialspace=True))


def choose(work: Work, arms: str | None, seeds: str | None) -> list[tuple[Arm, int]]:
    """Return the runs of the named arms and seeds; raise `InputError` for a name that is none."""
    names = [arm.name for arm in work.grid.arms]
    wanted = named_arms(arms, names) if arms else names
    for name in wanted:
        if name not in names:
            raise InputError(f"unknown arm {name!r} of grid {work.grid.name!r}; known: {', '.join(names)}")
    if seeds and not all(seed.isdecimal() for seed in seeds.split(",")):
        raise InputError(f"--seeds is {seeds!r}: expected whole numbers separated by commas")
    numbers = {int(seed) for seed in seeds.split(",")} if seeds else None
    pairs = [(arm, seed) for arm, seed in work.runs() if arm.name in wanted]
    here = sorted({seed for _, seed in pairs})
    if numbers and not numbers <= set(here):
        raise InputError(f"--seeds is {seeds!r}; seeds of these arms: {', '.join(map(str, here))}")
    return [(arm, seed) for arm, seed in pairs if numbers is None or seed in numbers]


# ------------------------------------------------------------------------------------------------
# Scores a grid's final arms on the test split, beside the baselines, and records all that follows from it.
#
#     python -m reclib score ml-1m
#     python -m reclib score ablations-ml-100k --validation    # all arms against the first; test unseen
#     python -m reclib score ml-1m --keep    # keep what the runs so far show on test, and show nothing of
#     it
#     python -m reclib score ml-1m --from-ranks    # anew without weights: with new baselines, say
#
# Nothing is chosen here: arms are final by the grid's file, epochs and the baselines' hyperparameters by
# validation. Every call is counted in the records (`earlier`), and so are the configurations of a model
# family that were scored before on the same data and split (`looks`), since a test split that is looked at
# often is a validation split. A seed whose run another grid had among the candidates for a recipe has
# chosen that recipe: it stays in the means, and is left out of the comparisons. What a run showed on the
# test split is kept beside its validation ranks: a run that is trained later or elsewhere joins without the
# others' weights, and none looks at the test split twice.

SAMPLES = 2000  # bootstrap resamples of the users

MAIN_SPLIT = "leave_one_out"

# Names of arrays that files had before there were others; a protocol's own name is used for the rest.
NAMES = {baseline.MAIN: "test", baseline.KEPT: "test kept"}


def final_arms(work: Work) -> list[Arm]:
    """Return the arms to be scored; raise `InputError` where one of their runs is not trained yet."""
    final = [arm for arm in work.grid.arms if arm.final]
    missing = [f"{a.name} seed {s}" for a in final for s in a.seeds if not work.trained(a, s)]
    if missing or not final:
        said = f"not trained yet: {', '.join(missing)}" if missing else "it has no final arm"
        raise InputError(f"grid {work.grid.name!r} cannot be scored: {said}")
    return final


def assess_arm(work: Work, arm: Arm, test: Conditions) -> Model:
    """Return what an arm's runs showed on the test split; a run that has not been asked yet is."""
    return Model(arm.name, [assess_run(work, arm, seed, test) for seed in arm.seeds], list(arm.seeds))


def assess_run(work: Work, arm: Arm, seed: int, test: Conditions) -> Assessed:
    """Return what a run showed on the test split: from its file, or by ranking the targets now."""
    file = work.ranks_file(arm, seed)
    kept = dict(np.load(file)) if file.is_file() else {}
    if "test" in kept:
        return unpacked(kept)
    print(f"  {arm.name}, seed {seed}", flush=True)
    one = baseline.assess_trained(work.train(arm, seed, Options()), test)
    save_ranks(file, kept | packed(one))
    return one


def keep(work: Work) -> list[str]:
    """Keep what the trained runs of the final arms show on the test split, before all of them are trained.

    For machines that go away, weights and all: nothing of it is shown or recorded until `score` has every
    run, so no choice can rest on it. Returns the runs that are kept.
    """
    test = baseline.draw(work.dataset, leave_one_out(work.dataset).test)
    final = [arm for arm in work.grid.arms if arm.final and arm.split == MAIN_SPLIT]
    trained = [(arm, seed) for arm in final for seed in arm.seeds if work.trained(arm, seed)]
    for arm, seed in trained:
        assess_run(work, arm, seed, test)
    return [f"{arm.name} seed {seed}" for arm, seed in trained]


def packed(one: Assessed) -> dict[str, np.ndarray]:
    """Return a run's assessment as named arrays; `unpacked` reads them."""
    arrays = {NAMES.get(name, f"test {name}"): outcome.ranks for name, outcome in one.outcomes.items()}
    labels = [[o.protocol, o.label, str(int(o.comparable))] for o in one.outcomes.values()]
    controls = {"test shuffled": one.shuffled, "test shuffled but last": one.shuffled_but_last}
    return arrays | controls | {"test top": one.top, "test protocols": np.array(labels)}


def unpacked(arrays: Mapping[str, np.ndarray]) -> Assessed:
    """Return the assessment that `packed` wrote; files of before it hold the ranks of two protocols alone."""
    both = [[baseline.MAIN, baseline.MAIN, "1"], [baseline.KEPT, baseline.KEPT, "1"]]
    outcomes = {}
    for name, label, comparable in arrays.get("test protocols", both):
        ranks = arrays[NAMES.get(name, f"test {name}")]
        outcomes[name] = Outcome(name, label, comparable == "1", ranks, np.arange(len(ranks)))
    nothing = np.zeros((0,), np.int64)
    controls = (arrays.get(f"test {name}", nothing) for name in ("shuffled", "shuffled but last", "top"))
    return Assessed(outcomes, *controls)


def score(work: Work, from_ranks: bool = False) -> list[Result]:
    """Score the final arms and the baselines under leave-one-out, and arms of other splits under theirs.

    `from_ranks` takes all of the first from the kept ranks and leaves the others as they are recorded.
    """
    final = final_arms(work)
    if from_ranks:
        final = [arm for arm in final if arm.split == MAIN_SPLIT]
        missing = [f"{a.name} seed {s}" for a in final for s in a.seeds if not _is_kept(work, a, s)]
        if missing:
            raise InputError(
                f"no ranks on the test split are kept of {', '.join(missing)}: leave --from-ranks"
            )
    split = leave_one_out(work.dataset)
    test = baseline.draw(work.dataset, split.test)
    models, chosen = baseline.assess_baselines(split, work.dataset, test)
    models += [assess_arm(work, arm, test) for arm in final if arm.split == MAIN_SPLIT]
    reference = next(arm.name for arm in final if arm.split == MAIN_SPLIT)
    out = choosing_seeds(work, final)
    if out:
        print("left out of the comparisons, since they chose the recipe:", out)
    found = _said_of(models, work, split, reference, out)
    for arm in final:
        if arm.split != MAIN_SPLIT:
            found += [one for seed in arm.seeds for one in _under_its_split(work, arm, seed)]
    keys = {f"{arm.name} seed {seed}": work.key(arm, seed) for arm in final for seed in arm.seeds}
    said: dict[str, Any] = {"runs": keys, "baselines": chosen, "bootstrap_samples": SAMPLES}
    said["arms"] = {arm.name: _said(work, arm) for arm in final}
    said |= {"looks": looks_before(work, final), "seeds_left_out": out}
    key = records.params_hash({"scored": keys, "data": work.dataset.fingerprint})
    for result in found:
        work.write(
            records.params_hash({"of": key, "own": result.params, "seed": result.seed}), result, said, {}
        )
    return found


def _is_kept(work: Work, arm: Arm, seed: int) -> bool:
    file = work.ranks_file(arm, seed)
    if not file.is_file():
        return False
    with np.load(file) as kept:
        return "test" in kept.files


def choosing_seeds(work: Work, arms: Sequence[Arm]) -> dict[str, list[int]]:
    """Return, by arm, the seeds whose very run a recipe was chosen from, as the committed records have it.

    These are runs that a grid of trials, ablations or tuning has a learning curve of as well.
    """
    rows = [r for r in records.committed() if r["name"] == "learning_curve"]
    keys = {
        r["params_hash"]
        for r in rows
        if tables.chooses(r["data"]["name"]) and r["data"]["name"] != work.grid.name
    }
    found = {arm.name: [seed for seed in arm.seeds if work.key(arm, seed) in keys] for arm in arms}
    return {name: seeds for name, seeds in found.items() if seeds}


def looks_before(work: Work, arms: Sequence[Arm]) -> dict[str, int]:
    """Return, by family of the arms, how many of its configurations the records show on this test split."""
    counts = tables.looks(records.read(system.root() / "executed"))
    families = {tables.family(asdict(work.configs(arm, arm.seeds[0])[0]), arm.name) for arm in arms}
    where = (work.dataset.fingerprint, "leave-one-out")
    return {family: counts.get((*where, family), 0) for family in sorted(families)}


def _said_of(
    models: Sequence[Model], work: Work, split: Split, reference: str, out: Mapping[str, Sequence[int]]
) -> list[Result]:
    """Return all results, or without protocols and controls where a run's file does not hold them."""
    partial = [m.name for m in models if not all(len(run.top) for run in m.runs)]
    if not partial:
        return baseline.everything(models, work.dataset, split.test, reference, SAMPLES, out)
    print(f"ranks alone are kept of {', '.join(partial)}: accuracy and comparisons only")
    return [
        *baseline.headline(models, SAMPLES),
        *baseline.comparisons(models, reference, out),
    ]


def validation_differences(work: Work) -> list[Result]:
    """Compare every arm with the first on validation: paired by user, corrected for the number of arms.

    The band of seeds is the range of this arm's means, each minus the base's mean over its seeds.
    """
    base = work.grid.arms[0]
    values = {}
    for arm in work.grid.arms:
        trained = [seed for seed in arm.seeds if work.trained(arm, seed)]
        if arm.split == base.split and trained:
            values[arm.name] = np.stack([_validation(work, arm, seed) for seed in trained])
    if base.name not in values:
        return []
    mean = float(values[base.name].mean())
    found = []
    for one in statistics.compare(values, base.name):
        result = baseline.compared(one, "ndcg@10", "validation_difference")
        low, high = (end - mean for end in one.seed_range)
        numbers = {"value": mean + one.difference.mean, "base": mean, "seed_low": low, "seed_high": high}
        found.append(result._replace(metrics=dict(result.metrics) | numbers))
    return found


def compare(work: Work) -> list[Result]:
    """Record the comparisons on validation of the arms that are trained."""
    found = validation_differences(work)
    for result in found:
        key = records.params_hash({"compared": result.params, "data": work.dataset.fingerprint})
        work.write(key, result, {}, {})
    return found


def _validation(work: Work, arm: Arm, seed: int) -> np.ndarray:
    with np.load(work.ranks_file(arm, seed)) as file:
        return metrics.ndcg(file["valid"], 10)


def _said(work: Work, arm: Arm) -> dict[str, Any]:
    model, train = work.configs(arm, arm.seeds[0])
    return {"model": asdict(model), "train": asdict(train), "split": arm.split, "seeds": list(arm.seeds)}


def _under_its_split(work: Work, arm: Arm, seed: int) -> list[Result]:
    trainer = work.train(arm, seed, Options())
    name = arm.name.split(" (")[0]  # "causal (global time)" is the causal model: the protocol says the rest
    return baseline.other_split(trainer, work.split(arm), SAMPLES, name, seed)


def score_main(argv: list[str] | None = None) -> int:
    """Score a grid and print its table."""
    parser = Parser(prog="python -m reclib score", description=__doc__.split("\n")[0])
    parser.add_argument("name", help="an experiment file of params/grids, without .yaml")
    parser.add_argument("--dataset", help="another place of the same data: a file or a prepared folder")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--validation", action="store_true", help="compare all arms with the first on validation, test unseen"
    )
    instead.add_argument(
        "--keep", action="store_true", help="only keep what the runs so far show on the test split, unseen"
    )
    instead.add_argument(
        "--from-ranks", action="store_true", help="score from the kept ranks: no weights, other splits left"
    )
    parser.add_argument("--gpu", default="auto", help="auto, cpu or a gpu label (auto)")
    given = parser.parse_args(argv)
    try:
        chosen = read_grid(given.name)
        config = changed(chosen.data, dataset=given.dataset) if given.dataset else chosen.data
        work = Work(chosen, prepare(config), resolve(given.gpu))
        if given.keep:
            print("kept:", ", ".join(keep(work)) or "no run is trained yet")
            return 0
        found = compare(work) if given.validation else score(work, given.from_ranks)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for result in found:
        if result.name in ("test_metrics", "validation_difference"):
            numbers = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            seed = "" if result.seed is None else f" seed {result.seed}"
            print(f"{result.params['model']}{seed}: {numbers}")
    return 0


def missing(rows: Sequence[Record], name: str) -> list[str]:
    """Return the arms of a grid's file that lack seeds, each with how many are there: `arm (1 of 3)`.

    Empty where the file is not here.
    """
    try:
        arms = read_grid(name).arms
    except InputError:
        return []
    there = {(r["own_params"]["model"], r["seed"]) for r in rows}
    counts = {arm.name: sum((arm.name, seed) in there for seed in arm.seeds) for arm in arms}
    return [f"{a.name} ({counts[a.name]} of {len(a.seeds)})" for a in arms if counts[a.name] < len(a.seeds)]
