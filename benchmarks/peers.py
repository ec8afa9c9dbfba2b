"""Accuracy of this project's models and of other libraries', on the same file and in the same harness.

    python benchmarks/peers.py --dataset ml-100k --peer rectools --model bert4rec --epochs 300 --out DIR
    python benchmarks/peers.py --dataset ml-100k --peer reclib -p last_item_share 0.5 --epochs 300 --out DIR
    python benchmarks/peers.py --dataset FILE --peer replay --curve 1 2 5 10 20 --out DIR
    python benchmarks/peers.py --dataset FILE --peer reclib --recipe replay --curve 1 2 5 10 20 --out DIR
    python benchmarks/peers.py --out DIR --record ml-100k    # into the records of a grid

A peer (rectools, replay) trains in its own environment (`peers/setup.sh`) on an npz of training
sequences, chooses its epoch on validation, and recommends ten items to each user, once, with the validation
item in the history and seen items removed. What it recommended is scored here, by this project's metrics.
`--curve` looks at validation after so many minutes of training and leaves the test targets alone. With
`--recipe` our engine trains with a peer's settings at hidden 64: the peer differs from that curve by its
engine, ours as published differs from it by its settings.

A result is `NAME.npz` (values per user, for paired intervals) and `NAME.json`; a finished one is not run
again. A run that fails is a row with its reason, and the next one starts. Exit codes: 0 all went well, 1 a
run failed, 2 wrong input.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import numpy as np
import torch
import yaml
from common import BEST_ALLOCATOR, FailedError, Rows, parser_of
from harness import process_age
from scoring import NAMES, OURS, Arrays, is_seen, score, values_of, write, write_sequences

from reclib import system
from reclib.config import DataConfig, InputError, ModelConfig, TrainConfig, changed, model_config, validated
from reclib.data.dataset import Dataset, Evaluation, evaluated_users, evaluation, train_histories
from reclib.data.prepare import prepare
from reclib.experiments import grids
from reclib.hardware import resolve
from reclib.model.bert4rec import Bert4Rec
from reclib.train.fit import SELECT, Options, fit, rank_targets
from reclib.train.trainer import Trainer

SCRIPTS = Path(__file__).resolve().parent / "peers"
# What each library's own model class or configuration file starts from, at the versions of peers/setup.sh.
# RePlay's loss is CE_restricted: the values of its default, without the logits that it throws away.
DEFAULTS: dict[str, dict[str, Any]] = {
    "rectools": {"hidden": 256, "layers": 2, "heads": 4, "dropout": 0.2, "mask-prob": 0.15},
    "replay": {"hidden": 256, "layers": 2, "heads": 4, "dropout": 0.1, "mask-prob": 0.15},
}
DEFAULTS["replay"]["loss"] = "restricted"
BATCH_SIZE, LENGTH = 128, 200  # sequences: RecTools' default; RePlay leaves it to the caller
MODELS = {"rectools": ("bert4rec", "sasrec", "fast-sasrec"), "replay": ("bert4rec",)}
MARKS = [1.0, 2.0, 5.0, 10.0, 20.0]  # minutes of training
LOOKS = ("epoch", "train_seconds", *NAMES)


# -- our side ------------------------------------------------------------------------------------------------


def configs_of(identity: dict[str, Any], num_items: int) -> tuple[ModelConfig, TrainConfig]:
    """Return the configurations of one run; raise `InputError` for a parameter that is not one."""
    settings = identity["settings"]
    model = model_config(settings["size"], **({"num_items": num_items} | settings["model"]))
    return model, validated(TrainConfig, settings["train"] | {"seed": identity["seed"]})


def run_ours(identity: dict[str, Any], dataset: Dataset, checkpoints: Path) -> tuple[Arrays, dict[str, Any]]:
    """Train our model and return values per user and what the run took."""
    torch.set_num_threads(identity["threads"])
    model, train = configs_of(identity, dataset.num_items)
    device, valid = resolve("cpu"), evaluation(dataset, "valid")
    about: dict[str, Any] = {"torch": torch.__version__, "model": asdict(model), "train": asdict(train)}
    values: Arrays = {"users": evaluated_users(dataset)}
    if identity["marks"]:
        torch.manual_seed(train.seed)
        trainer = Trainer(Bert4Rec(model), train_histories(dataset), train, device, dataset.fingerprint)
        about["startup_seconds"] = process_age()  # a second seed's counts the first seed's run too
        values |= curve(trainer, valid, identity["marks"], identity["threads"])
    else:
        trainer = fit(model, dataset, train, device, checkpoints, Options(on_evaluation=show))
        history = trainer.progress.history
        values |= {f"look_{name}": np.array([row[name] for row in history]) for name in LOOKS}
        about["best"] = max(history, key=lambda row: row[SELECT])
        for prefix, part in (("valid", valid), ("test", evaluation(dataset, "test"))):
            values |= values_of(rank_targets(trainer, part).ranks, prefix)
    progress = trainer.progress
    about |= {"train_seconds": progress.train_seconds, "steps": progress.step}
    return values, about | {"epochs": progress.step / trainer.steps_per_epoch}


def curve(trainer: Trainer, valid: Evaluation, minutes: list[float], threads: int = 1) -> Arrays:
    """Train until the last mark, or to the end of the schedule, and rank validation at each mark.

    Training time is processor time per thread, without the looks at validation. The model at the end of a
    schedule that ends before a mark stands for the marks that are left.
    """
    looks, looking, began = [], 0.0, time.process_time()

    def spent() -> float:
        return (time.process_time() - began - looking) / threads

    def look() -> tuple[np.ndarray, float, float]:
        nonlocal looking
        seconds, start = spent(), time.process_time()
        ranks = rank_targets(trainer, valid).ranks
        trainer.model.train()
        looking += time.process_time() - start
        return ranks, trainer.progress.step / trainer.steps_per_epoch, seconds

    for _ in trainer.steps():
        while len(looks) < len(minutes) and spent() >= 60 * minutes[len(looks)]:
            looks.append(look())
        if len(looks) == len(minutes):
            break
    if left := len(minutes) - len(looks):
        looks += [look()] * left
    ranks, epochs, seconds = zip(*looks, strict=True)
    values = values_of(np.array(ranks), "mark") | {"mark_minutes": np.array(minutes)}
    values |= {"look_epoch": np.array(epochs), "look_train_seconds": np.array(seconds)}
    return values | {f"look_{name}": values[f"mark_{name}"].mean(axis=1) for name in NAMES}


def show(row: dict[str, float]) -> None:
    print("validation: " + "  ".join(f"{name} {row[name]:.4f}" for name in LOOKS), flush=True)


# -- a run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One run of one model with one seed, and where its result goes."""

    identity: dict[str, Any]  # plain JSON: everything that changes the result
    folder: Path

    @property
    def name(self) -> str:
        """File name without ending."""
        i = self.identity
        parts = [i["dataset"], i["peer"], i["model"], *([f"as-{i['recipe']}"] if "recipe" in i else [])]
        parts += [f"h{i['hidden']}", f"seed{i['seed']}", *(["curve"] if i["marks"] else [])]
        return "-".join(parts)

    def path(self, suffix: str) -> Path:
        """Path of the result's file with this ending."""
        return self.folder / f"{self.name}{suffix}"

    def finished(self) -> bool:
        """Whether the result is there; raises `InputError` if it is one of other settings."""
        if not self.path(".json").is_file():
            return False
        there, here = json.loads(self.path(".json").read_text())["identity"], self.identity
        if keys := sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k)):
            changes = "; ".join(f"{k} is {there.get(k)!r} there and {here.get(k)!r} here" for k in keys)
            raise InputError(f"{self.path('.json').name} is of other settings: {changes}; use another --out")
        return True


def run_peer(task: Task, dataset: Dataset, environments: Path) -> tuple[Arrays, dict[str, Any]]:
    """Run a peer in its own environment; return values per user and what it reported."""
    identity = task.identity
    data, out, log = task.path(".data.npz"), task.path(".raw.npz"), task.path(".log")
    write_sequences(dataset, data)
    command: list[Any] = [python_of(identity["peer"], environments), SCRIPTS / f"{identity['peer']}_peer.py"]
    command += ["--fit", "--shape", "default", "--data", data, "--out", out]
    names = ("model", "seed", "threads", "hidden", "epochs", "minutes", "valid-every", "patience")
    for name, value in (identity["settings"] | {name: identity[name] for name in names}).items():
        command += [f"--{name}", value] if value is not None else []
    command += ["--marks", *identity["marks"]] if identity["marks"] else []
    threads = {name: str(identity["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # Ours sets the allocator itself; a peer gets it from here unless the caller's environment says otherwise.
    variables = BEST_ALLOCATOR | dict(os.environ) | threads
    with log.open("w") as file:  # to be watched while it runs
        done = subprocess.run([str(word) for word in command], env=variables, stdout=file, stderr=file)
    lines = log.read_text().splitlines()
    if done.returncode or not out.is_file():
        tail = " / ".join(lines[-2:])
        raise FailedError(f"the peer ended with status {done.returncode}, see {log.name}: {tail}")
    with np.load(out) as file:
        values = score(file, dataset, out.name)
    for path in (data, out):
        path.unlink()
    return values, json.loads([line for line in lines if line.startswith("{")][-1])


def python_of(peer: str, environments: Path) -> Path:
    """Return a peer's interpreter; raise `InputError` if it is not there."""
    python = environments / peer / "bin" / "python"
    if not python.is_file():
        raise InputError(f"no {peer} environment in {environments}: run benchmarks/peers/setup.sh")
    return python


def run(task: Task, dataset: Dataset, environments: Path) -> dict[str, Any]:
    """Run the task, write its result and return its means."""
    task.folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    if task.identity["peer"] == OURS:
        values, about = run_ours(task.identity, dataset, task.path(".checkpoints"))
    else:
        values, about = run_peer(task, dataset, environments)
    scored = [name for name in values if name.startswith(("valid_", "test_", "mark_")) and "@" in name]
    means = {name: values[name].mean(axis=-1).tolist() for name in scored}
    record = {"identity": task.identity, "users": len(values["users"]), "targets_seen": {}, **means}
    for name in ("valid", "test"):  # targets that no list without seen items can hold
        part = evaluation(dataset, name)
        seen = is_seen(part.targets[:, None], part, dataset.num_items)
        record["targets_seen"][name] = int(seen.sum())
    record |= {"wall_seconds": time.perf_counter() - began, "reported": about}
    grids.save_ranks(task.path(".npz"), values)
    system.write_json(task.path(".json"), record)  # last, so that a result that is there is whole
    return means


# -- the command line ----------------------------------------------------------------------------------------


def tasks_of(args: argparse.Namespace, dataset: Dataset) -> list[Task]:
    """Return one task for each seed; raise `InputError` for what the peer does not have."""
    values = {name: yaml.safe_load(value) for name, value in args.p}
    if args.peer == OURS:
        model, train = recipe_of(args) if args.recipe else ({}, {})
        model |= {k.removeprefix("model."): v for k, v in values.items() if k.startswith("model.")}
        model |= {"max_len": args.max_len} if args.max_len else {}
        train |= {k: v for k, v in values.items() if not k.startswith("model.")}
        train |= {"eval_every": args.valid_every, "patience": args.patience}
        train |= {"epochs": args.epochs} if args.epochs else {}
        settings: dict[str, Any] = {"size": args.size, "model": model, "train": train}
        hidden = configs_of({"settings": settings, "seed": 0}, dataset.num_items)[0].hidden_dim
    else:
        if args.model not in MODELS[args.peer]:
            allowed = ", ".join(MODELS[args.peer])
            raise InputError(f"parameter 'model' is {args.model!r}: {args.peer} has {allowed}")
        python_of(args.peer, args.environments)
        lengths = {"batch-size": BATCH_SIZE, "max-len": args.max_len or LENGTH}
        settings = DEFAULTS[args.peer] | lengths | values
        default = settings.pop("hidden")
        hidden = args.hidden or default
    limits = ("epochs", "minutes", "valid_every", "patience", "threads", "model", "peer")
    identity = {name.replace("_", "-"): getattr(args, name) for name in limits}
    identity |= {"dataset": dataset.name, "fingerprint": dataset.fingerprint, "marks": args.curve}
    identity |= {"hidden": hidden, "settings": settings} | ({"recipe": args.recipe} if args.recipe else {})
    return [Task(identity | {"seed": seed}, args.out.resolve()) for seed in args.seeds]


def recipe_of(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a peer's settings as ours: two heads at hidden 64, as the peer has there, a constant rate."""
    peer = DEFAULTS[args.recipe]
    model = {"hidden_dim": args.hidden or 64, "num_layers": peer["layers"], "num_heads": 2}
    model |= {"max_len": LENGTH, "dropout": peer["dropout"]}
    train = {"batch_size": BATCH_SIZE, "mask_prob": peer["mask-prob"], "last_item_share": 0.0}
    train |= {"window": "last", "learning_rate": 1e-3, "lr_warmup_steps": 0, "lr_final_share": 1.0}
    train |= {"weight_decay": 0.0, "clip_norm": None, "epochs": 10_000}  # a curve ends with its last mark
    return model, train | {"precision": "fp32"}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--dataset", default="ml-100k", help="what reclib.data.prepare knows: a name or a file")
    add("--min-user", type=int, default=5)
    add("--min-item", type=int, default=5)
    add("--peer", choices=[*MODELS, OURS], default="rectools")
    add("--model", default="bert4rec", help="of RecTools also sasrec, fast-sasrec; reclib: a label")
    add("--epochs", type=int, help="at most so many")
    add("--minutes", type=float, help="peers: at most so much training time")
    add("--valid-every", type=int, default=5, help="epochs between looks at validation")
    add("--patience", type=int, default=10, help="looks without a better NDCG@10 before stopping; 0: never")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--threads", type=int, default=1)
    add("--hidden", type=int, help="another hidden size than the library's own, or with --recipe than 64")
    add("--max-len", type=int, help="longest history (peers: 200)")
    add("--size", default="tiny", help="reclib: one of its named sizes")
    add("--recipe", choices=list(DEFAULTS), help="reclib: train with this peer's settings, at hidden 64")
    about = "reclib: a field of TrainConfig, or model.<field>; a peer: an argument of its script"
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help=about)
    add("--curve", type=float, nargs="*", help="look at validation after so many minutes (1 2 5 10 20)")
    add("--environments", type=Path, default=system.root() / ".peers", help="folder that setup.sh filled")
    add("--out", type=Path, required=True, help="folder of results")
    add("--record", metavar="GRID", help="only compare what is there with a scored grid, and record it")
    args = parser.parse_args(argv)
    args.curve = args.curve or MARKS if args.curve is not None else None
    if args.peer != OURS and not (args.epochs or args.minutes or args.curve or args.record):
        parser.error("a peer needs --epochs, --minutes or --curve")
    if args.recipe and (args.peer != OURS or not args.curve):
        parser.error("--recipe is one of --peer reclib --curve")
    return args


def record(args: argparse.Namespace) -> None:
    """Record the folder's results beside a grid's, on the grid's data; print a line for each difference."""
    grid = grids.read_grid(args.record)
    elsewhere = args.dataset != grid.data.dataset and Path(args.dataset).exists()
    data = changed(grid.data, dataset=args.dataset) if elsewhere else grid.data
    for result in write(args.out, grids.Work(grid, prepare(data), resolve("cpu"))):
        params = {name: value for name, value in result.params.items() if name != "run"}
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        print(f"{', '.join(f'{name} {value}' for name, value in params.items())}: {numbers}")


def main(argv: list[str] | None = None) -> int:
    """Run what is not there yet, or record."""
    args, rows = arguments(argv), Rows()
    data = {"dataset": args.dataset, "min_user": args.min_user, "min_item": args.min_item}
    try:
        if args.record:
            record(args)
            return 0
        dataset = prepare(validated(DataConfig, data))
        for task in tasks_of(args, dataset):
            if task.finished():
                print(f"{task.name}: finished before, {task.path('.json').name}", flush=True)
            else:
                rows.attempt(task.name, lambda task=task: run(task, dataset, args.environments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(rows.failed)


if __name__ == "__main__":
    raise SystemExit(main())
