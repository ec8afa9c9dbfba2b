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

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import yaml
from common import BEST_ALLOCATOR, FailedError, Rows
from ours import configs_of, run_ours
from recorded import write
from scoring import OURS, Arrays, save, score, targets_seen, write_sequences

from reclib import system
from reclib.config import DataConfig, InputError, changed, validated
from reclib.data.dataset import Dataset, evaluation
from reclib.data.prepare import prepare
from reclib.experiments import grids
from reclib.hardware import resolve

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
    import numpy as np

    identity = task.identity
    data, out, log = task.path(".data.npz"), task.path(".raw.npz"), task.path(".log")
    write_sequences(dataset, data)
    words: list[Any] = [python_of(identity["peer"], environments)]
    words += [SCRIPTS / f"{identity['peer']}_peer.py"]
    words += ["--fit", "--shape", "default", "--data", data, "--out", out]
    for name, value in identity["settings"].items():
        words += [f"--{name}", value]
    for name in ("model", "seed", "threads", "hidden", "epochs", "minutes", "valid-every", "patience"):
        words += [f"--{name}", identity[name]] if identity[name] is not None else []
    words += ["--marks", *identity["marks"]] if identity["marks"] else []
    threads = {name: str(identity["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    # Ours sets the allocator itself; a peer gets it from here unless the caller's environment says otherwise.
    variables = BEST_ALLOCATOR | dict(os.environ) | threads
    with log.open("w") as file:  # to be watched while it runs
        done = subprocess.run([str(word) for word in words], env=variables, stdout=file, stderr=file)
    lines = log.read_text().splitlines()
    if done.returncode or not out.is_file():
        tail = " / ".join(lines[-2:])
        raise FailedError(f"the peer ended with status {done.returncode}, see {log.name}: {tail}")
    with np.load(out) as file:
        values = score({name: file[name] for name in file.files}, dataset, out.name)
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
    seen = {part: targets_seen(evaluation(dataset, part)) for part in ("valid", "test")}
    record = {"identity": task.identity, "users": len(values["users"]), "targets_seen": seen, **means}
    record |= {"wall_seconds": time.perf_counter() - began, "reported": about}
    save(task.path(".npz"), values)
    system.write_json(task.path(".json"), record)  # last, so that a result that is there is whole
    return means


def tasks_of(given: argparse.Namespace, dataset: Dataset) -> list[Task]:
    """Return one task for each seed; raise `InputError` for what the peer does not have."""
    values = {name: yaml.safe_load(value) for name, value in given.p}
    if given.peer == OURS:
        recipe = recipe_of(given) if given.recipe else {"model": {}, "train": {}}
        model = {k.removeprefix("model."): v for k, v in values.items() if k.startswith("model.")}
        train = {k: v for k, v in values.items() if not k.startswith("model.")}
        model, train = recipe["model"] | model, recipe["train"] | train
        train |= {"eval_every": given.valid_every, "patience": given.patience}
        train |= {"epochs": given.epochs} if given.epochs else {}
        model |= {"max_len": given.max_len} if given.max_len else {}
        settings: dict[str, Any] = {"size": given.size, "model": model, "train": train}
        hidden = configs_of({"settings": settings, "seed": 0}, dataset.num_items)[0].hidden_dim
    else:
        if given.model not in MODELS[given.peer]:
            allowed = ", ".join(MODELS[given.peer])
            raise InputError(f"parameter 'model' is {given.model!r}: {given.peer} has {allowed}")
        python_of(given.peer, given.environments)
        settings = (
            DEFAULTS[given.peer] | {"batch-size": BATCH_SIZE, "max-len": given.max_len or LENGTH} | values
        )
        default = settings.pop("hidden")
        hidden = given.hidden or default
    limits = ("epochs", "minutes", "valid_every", "patience", "threads", "model", "peer")
    identity = {name.replace("_", "-"): getattr(given, name) for name in limits}
    identity |= {"dataset": dataset.name, "fingerprint": dataset.fingerprint, "marks": given.curve}
    identity |= {"hidden": hidden, "settings": settings} | ({"recipe": given.recipe} if given.recipe else {})
    return [Task(identity | {"seed": seed}, given.out.resolve()) for seed in given.seeds]


def recipe_of(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return a peer's settings as ours: two heads at hidden 64, as the peer has there, a constant rate."""
    peer = DEFAULTS[given.recipe]
    model = {
        "hidden_dim": given.hidden or 64,
        "num_layers": peer["layers"],
        "num_heads": 2,
        "max_len": LENGTH,
    }
    train = {
        "batch_size": BATCH_SIZE,
        "mask_prob": peer["mask-prob"],
        "last_item_share": 0.0,
        "window": "last",
    }
    train |= {"learning_rate": 1e-3, "lr_warmup_steps": 0, "lr_final_share": 1.0, "weight_decay": 0.0}
    train |= {"clip_norm": None, "epochs": 10_000, "precision": "fp32"}  # a curve ends with its last mark
    return {"model": model | {"dropout": peer["dropout"]}, "train": train}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="ml-100k", help="what reclib.data.prepare knows: a name or a file")
    add("--min-user", type=int, default=5)
    add("--min-item", type=int, default=5)
    add("--peer", choices=[*MODELS, OURS], default="rectools")
    add(
        "--model",
        default="bert4rec",
        help="rectools: bert4rec, sasrec, fast-sasrec; reclib: a label of your own",
    )
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
    given = parser.parse_args(argv)
    given.curve = given.curve or MARKS if given.curve is not None else None
    if given.peer != OURS and not (given.epochs or given.minutes or given.curve or given.record):
        parser.error("a peer needs --epochs, --minutes or --curve")
    if given.recipe and (given.peer != OURS or not given.curve):
        parser.error("--recipe is one of --peer reclib --curve")
    return given


def record(given: argparse.Namespace) -> None:
    """Record the folder's results beside a grid's, on the grid's data; print a line for each difference."""
    grid = grids.read_grid(given.record)
    elsewhere = given.dataset != grid.data.dataset and Path(given.dataset).exists()
    data = changed(grid.data, dataset=given.dataset) if elsewhere else grid.data
    for result in write(given.out, grids.Work(grid, prepare(data), resolve("cpu"))):
        own, numbers = (
            result.params,
            "  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()),
        )
        after = f" after {own['minutes']:g} minutes" if "minutes" in own else ""
        against = f" minus {own['against']}, {own['metric']}{after}" if "against" in own else ""
        print(f"{own['model']}{against}: {numbers}")


def main(argv: list[str] | None = None) -> int:
    """Run what is not there yet, or record."""
    given, rows = arguments(argv), Rows()
    data = {"dataset": given.dataset, "min_user": given.min_user, "min_item": given.min_item}
    try:
        if given.record:
            record(given)
            return 0
        dataset = prepare(validated(DataConfig, data))
        for task in tasks_of(given, dataset):
            if task.finished():
                print(f"{task.name}: finished before, {task.path('.json').name}", flush=True)
            else:
                rows.attempt(task.name, lambda task=task: run(task, dataset, given.environments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(rows.failed)


if __name__ == "__main__":
    raise SystemExit(main())
