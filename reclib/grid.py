"""Grids of training runs: arms times seeds of one experiment file, each trained once, whoever asks.

An experiment is `params/grids/<name>.yaml`: a dataset, a recipe, and arms that change some of its fields. A
run is known by its configuration and data, so a grid that is stopped loses at most one checkpoint interval,
and several processes may work on one grid: each takes a run that nobody holds.

Training looks at validation only. The arms that the file calls final are scored on the test split, by
`assessment`, from the weights that validation chose; every scoring is a record, so they can be counted.

A file may bar one arm until a prediction of it is recorded (`scaling`): the record of that arm then carries
the prediction's hash.

    python -m reclib.grid run ml-1m        # train what is not trained yet
    python -m reclib.grid run ml-1m --parallel 3    # three runs at a time on one device
    python -m reclib.grid status ml-1m

Runs side by side fill a large GPU that waits for the launches of one small model. Each is a process of its
own: their kernels take turns on the GPU, and overlap under NVIDIA's MPS. On a CPU they divide its threads.

Records are lines of `executed/<label>/grids/<name>.jsonl`; the ranks of every user lie beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reclib import diagnosis, footprint, launch, lifeline, paths, record
from reclib.assessment import Result
from reclib.command import Parser, exit_code
from reclib.config import InputError, ModelConfig, TrainConfig, as_dict, changed
from reclib.counts import counted
from reclib.data import Dataset, prepare
from reclib.devices import GIB
from reclib.experiment import Trained
from reclib.fit import Options, data_identity, fit, rank_targets
from reclib.gridfile import SPLITS, Arm, Grid, configs, read
from reclib.hardware import Device, device_card, resolve
from reclib.headroom import demand_room, device_bytes
from reclib.provenance import code_hash, git_state, plain, versions
from reclib.splits import Split
from reclib.trainer import Trainer


class Work:
    """A grid on one dataset and device: its runs, and where they lie."""

    def __init__(self, grid: Grid, dataset: Dataset, device: Device) -> None:
        self.grid, self.dataset, self.device = grid, dataset, device
        self.file = paths.executed() / device.label / "grids" / f"{grid.name}.jsonl"

    def runs(self) -> list[tuple[Arm, int]]:
        """Return all (arm, seed), the first seed of every arm first."""
        pairs = [(arm, seed) for arm in self.grid.arms for seed in arm.seeds]
        return sorted(pairs, key=lambda pair: pair[0].seeds.index(pair[1]))

    def configs(self, arm: Arm, seed: int) -> tuple[ModelConfig, TrainConfig]:
        """Return the configurations of a run."""
        return configs(self.grid, arm, self.dataset.num_items, seed)

    def key(self, arm: Arm, seed: int) -> str:
        """Return what identifies a run: its configuration and data, not its name or the code."""
        model, train = self.configs(arm, seed)
        data = data_identity(self.dataset, self.split(arm))
        return record.params_hash({"model": model, "train": train, "data": data})

    def split(self, arm: Arm) -> Split:
        """Return how an arm's data are divided."""
        return SPLITS[arm.split](self.dataset)

    def folder(self, arm: Arm, seed: int) -> Path:
        """Return the folder of a run's checkpoints."""
        return paths.runs() / "grids" / self.key(arm, seed)

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
        """Append a record, in the form of `record.Run.result`, with the grid's name as its profile."""
        card = device_card(self.device)
        earlier = sum(row["params_hash"] == key for row in self.rows(found.name))
        row = {
            "schema": record.SCHEMA,
            "notebook": self.grid.notebook,
            "name": found.name,
            "kind": "predicted" if found.name == "prediction" else "measured",
            "label": self.device.label,
            "claimed": None,
            "profile": "grid",
            "seed": found.seed,
            "device": {key: card[key] for key in record.CARD},
            "data": {
                "name": self.grid.name,
                "fingerprint": self.dataset.fingerprint,
                "users": self.dataset.num_users,
                "items": self.dataset.num_items,
                "interactions": self.dataset.num_interactions,
                "test_targets_sha256": self.dataset.manifest["test_targets_sha256"],
            },
            "metrics": found.metrics,
            "timings": dict(timings),
            "series": found.series,
            "params": {"grid": self.grid.name},
            "own_params": found.params,
            "configuration": dict(configuration),
            "params_hash": key,
            "earlier": earlier,
            "code": code_hash(self.grid.notebook),
            "git": git_state(),
            "versions": versions(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        record.append(self.file, plain(row))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return the records of one grid file; a last line that is not whole yet is left out."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def save_ranks(file: Path, ranks: Mapping[str, np.ndarray]) -> None:
    """Write the ranks of every user, by name, in place of what an earlier run wrote."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(".partial.npz")
    small = {
        name: values.astype(np.int32) if values.dtype.kind == "i" else values
        for name, values in ranks.items()
    }
    np.savez_compressed(fresh, **small)  # type: ignore[arg-type]  # numpy's stub knows no **arrays
    fresh.replace(file)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a run's folder against other processes; yield whether that was possible."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def run(work: Work, chosen: Sequence[tuple[Arm, int]], options: Options, parallel: int = 1) -> int:
    """Train the chosen runs that have no record; return how many were trained here.

    A run that another process holds is passed over: whoever holds it finishes it. A record says of how many
    runs side by side it is one (`parallel`): its seconds are not those of a run alone.
    """
    trained = 0
    for arm, seed in chosen:
        if work.barred(arm):
            print(f"{work.grid.name}: {arm.name}, seed {seed}: barred until it is predicted", flush=True)
            continue
        with held(work.folder(arm, seed)) as mine:
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
        fit = footprint.side_by_side(largest, room, kind)
        if fit < processes:
            raise InputError(
                f"--parallel {parallel}: {fit} of these runs fit side by side into {room / GIB:.1f} GiB; the "
                f"largest {processes} take {sum(largest) / GIB:.1f} GiB"
            )
    return processes


def run_parallel(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m reclib.grid ARGUMENTS` in several processes that share its runs; return an exit code."""
    kills = diagnosis.memory_kills()
    threads = max(1, torch.get_num_threads() // processes)
    codes = launch.side_by_side(["reclib.grid", *arguments, "--worker"], processes, threads)
    for number, code in enumerate(codes, 1):
        if code:  # what it could say itself is said
            who = f"process {number} of {processes}"
            print(
                f"error: {diagnosis.of_death(code, diagnosis.memory_kills() - kills, who)}", file=sys.stderr
            )
    return 2 if any(codes) else 0


def status(work: Work, chosen: Sequence[tuple[Arm, int]]) -> list[str]:
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
            said = f"barred: not predicted yet (python -m reclib.scaling predict {work.grid.name})"
        lines.append(f"{arm.name:24} seed {seed}  {said}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run, score or describe a grid."""
    lifeline.hold()
    arguments = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="python -m reclib.grid", description=__doc__.split("\n")[0])
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
        grid = read(given.name)
        config = changed(grid.data, dataset=given.dataset) if given.dataset else grid.data
        work = Work(grid, prepare(config), resolve(given.gpu))
        chosen = choose(work, given.arms, given.seeds)
        code = 0
        if given.worker:
            run(work, chosen, Options(), given.parallel)
            return 0
        if given.action == "run":
            processes = demand_parallel(work, chosen, given.parallel)
            if processes > 1:
                code = run_parallel(arguments, processes)
            else:
                run(work, chosen, Options(progress_bar=sys.stderr.isatty()))
        print("\n".join(status(work, chosen)))
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


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
