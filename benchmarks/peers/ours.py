"""Our side of the comparison: one run by `reclib fit`, or a curve over training time."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import process_age
from scoring import NAMES, Arrays, values_of

from reclib.config import ModelConfig, TrainConfig, model_config, validated
from reclib.data.dataset import Dataset, Evaluation, evaluated_users, evaluation, train_histories
from reclib.hardware import resolve
from reclib.model.bert4rec import Bert4Rec
from reclib.train.fit import SELECT, Options, fit, rank_targets
from reclib.train.trainer import Trainer

LOOKS = ("epoch", "train_seconds", "hr@10", "ndcg@10")


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
        values |= curve(trainer, valid, identity["marks"])
    else:
        trainer = fit(model, dataset, train, device, checkpoints, Options(on_evaluation=say))
        history = trainer.progress.history
        values |= {f"look_{name}": np.array([row[name] for row in history]) for name in LOOKS}
        about["best"] = max(history, key=lambda row: row[SELECT])
        for prefix, part in (("valid", valid), ("test", evaluation(dataset, "test"))):
            values |= values_of(rank_targets(trainer, part, True).ranks, prefix)
    progress = trainer.progress
    about |= {"train_seconds": progress.train_seconds, "steps": progress.step}
    return values, about | {"epochs": progress.step / trainer.steps_per_epoch}


def curve(trainer: Trainer, valid: Evaluation, minutes: list[float]) -> Arrays:
    """Train until the last mark, or to the end of the schedule, and rank validation at each mark.

    Training time is the trainer's own: steps with their batches, without the looks at validation. What a
    schedule that ends before a mark has reached stands for the marks that are left: there is no more by then.
    """
    ranks: list[np.ndarray] = []
    looks: list[tuple[float, float]] = []

    def look(count: int) -> None:
        current = rank_targets(trainer, valid, True).ranks
        trainer.model.train()
        at = (trainer.progress.step / trainer.steps_per_epoch, trainer.progress.train_seconds)
        ranks.extend([current] * count)
        looks.extend([at] * count)

    for _ in trainer.steps():
        while len(ranks) < len(minutes) and trainer.progress.train_seconds >= 60 * minutes[len(ranks)]:
            look(1)
        if len(ranks) == len(minutes):
            break
    if left := len(minutes) - len(ranks):
        look(left)
    values, (epochs, seconds) = values_of(np.array(ranks), "mark"), np.array(looks).T
    means = {f"look_{name}": values[f"mark_{name}"].mean(axis=1) for name in NAMES}
    about = {"mark_minutes": np.array(minutes), "look_epoch": epochs, "look_train_seconds": seconds}
    return values | means | about


def say(row: dict[str, float]) -> None:
    print("validation: " + "  ".join(f"{name} {row[name]:.4f}" for name in LOOKS), flush=True)
