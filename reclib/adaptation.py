"""Adapting a base to what comes after it: the same steps by every arm, all choices on validation.

A base is trained on the past (`periods`) and then trained further on the next period, or on a segment of its
users. The arms see the same batches, so their tokens are equal by construction:

- `none`: the base as it is; `full`: all its weights; `bias`: only its output bias, which can follow how
  popular items are and nothing else; `head`: plain LoRA of the output table alone;
- `lora`, `ilora`, `gated`: the adapters of `lowrank` on all encoder matrices. `gated`, one learned scalar a
  layer, is what the seed study calls iLoRA; it does not look at the user;
- `shuffled_user`, `noise`, `fixed_gate`, `static_gate`: `ilora` with something taken away (`adapters`). What
  they reach as well cannot be owed to the user's instance.

What a gate looks at is `p.representation`. `causal_state`, the paper's, is read from a causal model of the
base's size that `train_reader` trains on the same past.

Items that the past has not would stand where they were drawn, pushed away as wrong answers. Before any arm
starts, each gets the mean of its known neighbours in the adaptation period (`start_new_items`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from reclib import checkpoint, metrics, paths, periods, provenance
from reclib.config import ModelConfig, TrainConfig, as_dict, changed, model_config, validated
from reclib.data import Dataset, Histories
from reclib.experiment import run_folder
from reclib.fit import data_identity, fine_tune, fit, origin_of, rank_targets
from reclib.hardware import Device
from reclib.ilora import AdaptedModel
from reclib.lowrank import AdapterConfig
from reclib.model import Bert4Rec
from reclib.notebook_params import ILora
from reclib.periods import Periods
from reclib.splits import Split
from reclib.trainer import Trainer

NOTEBOOK = "05_ilora"
CONTROLS = ("shuffled_user", "noise", "fixed_gate", "static_gate")


class Task(NamedTuple):
    """What a base is adapted to, and its users."""

    name: str
    split: Split
    known: np.ndarray  # bool (rows of the test,): whether the past has the target's item


class Run(NamedTuple):
    """One arm of one seed at the learning rate that validation chose, ranked once on the test windows."""

    arm: str
    seed: int
    learning_rate: float | None  # None: nothing was trained
    trainer: Trainer
    valid: float  # NDCG@10 on validation, over targets
    ranks: np.ndarray  # int64 (rows of the test,)
    trained: int  # parameters
    saved_bytes: int  # of the file that holds them
    tokens: int  # real items that were trained on, at the end of the schedule


def tasks_of(p: ILora, dataset: Dataset) -> tuple[Periods, list[Task]]:
    """Return the dataset in periods, and the tasks that the parameters ask for."""
    shares = (p.past_share, p.adaptation_share, p.valid_share)
    whole = periods.divide(dataset, shares, p.targets_per_user)
    found = {"next_period": lambda: whole.adaptation}
    found["segment"] = lambda: periods.segment(dataset, whole, p.segment_share)
    tasks = {name: found[name]() for name in p.tasks}
    return whole, [Task(name, one, periods.known_targets(whole, one.test)) for name, one in tasks.items()]


def steps_of(histories: Histories, batch_size: int) -> int:
    """Return the steps of an epoch."""
    return -(-len(histories.starts) // batch_size)


def train_of(p: ILora, split: Split, seed: int, epochs: int, learning_rate: float) -> TrainConfig:
    """Return the configuration of a base or of an arm: they differ in length and rate only."""
    steps = steps_of(split.train, p.batch_size) * epochs
    return validated(
        TrainConfig,
        {
            "seed": seed,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "lr_warmup_steps": max(1, steps // 10),
            "batch_size": p.batch_size,
            "mask_prob": p.mask_prob,
            "last_item_share": p.last_item_share,
            "window": "random",
            "eval_every": max(1, epochs // p.evaluations),
            "precision": "fp32",
        },
    )


def shape_of(p: ILora, dataset: Dataset, causal: bool = False) -> ModelConfig:
    """Return the base's configuration, or that of its causal twin."""
    given: dict[str, Any] = {"max_len": p.max_len, "dropout": p.dropout, "causal": causal}
    return model_config(p.size, num_items=dataset.num_items, **given)


def train_base(p: ILora, dataset: Dataset, whole: Periods, device: Device, seed: int) -> Trainer:
    """Train a base on the past, or load it; its items without a past start from their neighbours."""
    model = shape_of(p, dataset)
    train = train_of(p, whole.base, seed, p.base_epochs, p.base_learning_rate)
    folder = run_folder(NOTEBOOK, model, train, data_identity(dataset, whole.base))
    trainer = fit(model, dataset, train, device, folder, split=whole.base)
    start_new_items(trainer.model, whole)
    return trainer


def train_reader(p: ILora, dataset: Dataset, whole: Periods, device: Device, seed: int) -> Bert4Rec | None:
    """Train the causal model that representation='causal_state' reads, or load it; None for the others.

    It is as large as the base and learns from the same past as long; its new items start as the base's do.
    """
    if p.representation != "causal_state":
        return None
    train = train_of(p, whole.base, seed, p.base_epochs, p.base_learning_rate)
    train = changed(train, objective="next_item")
    folder = run_folder(NOTEBOOK, shape_of(p, dataset, True), train, data_identity(dataset, whole.base))
    trainer = fit(shape_of(p, dataset, True), dataset, train, device, folder, split=whole.base)
    start_new_items(trainer.model, whole)
    return trainer.model


@torch.no_grad()
def start_new_items(model: Bert4Rec, whole: Periods) -> int:
    """Set items that the past has not to the mean of their known neighbours; return how many were set.

    Neighbours are those in the adaptation period (`periods.neighbours`). Output rows and biases follow. Items
    that do not occur there stay where they were drawn.
    """
    found = periods.neighbours(whole.adaptation.train, whole.known)
    tables = {id(t): t for t in (model.item_table.weight, model.output_weight, model.output_bias)}
    for item, beside in found.items():
        index = torch.from_numpy(beside.astype(np.int64))
        for table in tables.values():
            if table is not None:
                table[item] = table[index.to(table.device)].mean(0)
    return len(found)


def adapter_of(p: ILora, arm: str, seed: int) -> AdapterConfig:
    """Return the adapter of an arm that has one."""
    kind = arm if arm in ("lora", "ilora", "gated") else "lora" if arm == "head" else "ilora"
    given: dict[str, Any] = {name: getattr(p, name) for name in ("rank", "alpha", "num_experts")}
    given |= {"kind": kind, "dropout": p.adapter_dropout, "gate_learning_rate": p.gate_learning_rate}
    given |= {"representation": p.representation, "temperature": p.temperature, "gate_seed": seed}
    given |= {"control": arm} if arm in CONTROLS else {}
    given |= {"targets": ("head",)} if arm == "head" else {}
    return validated(AdapterConfig, given)


def model_of(
    p: ILora, arm: str, base: Bert4Rec, seed: int, reader: Bert4Rec | None = None
) -> Bert4Rec | AdaptedModel:
    """Return what an arm trains: a copy of the base, whole, in part, or frozen with a new adapter.

    `reader` is what `train_reader` returned.
    """
    model = copy.deepcopy(base)
    if arm in ("none", "full", "bias"):
        model.requires_grad_(arm == "full")
        if arm == "bias":
            assert model.output_bias is not None
            model.output_bias.requires_grad_(True)
        return model
    adapted = AdaptedModel(model)
    torch.manual_seed(seed)  # of A, and of the gate
    adapted.add(arm, adapter_of(p, arm, seed), reader)
    return adapted


def counts(p: ILora, dataset: Dataset) -> dict[str, int]:
    """Return how many parameters every arm trains, and the base's."""
    base = Bert4Rec(shape_of(p, dataset))
    reader = Bert4Rec(shape_of(p, dataset, True)) if p.representation == "causal_state" else None
    found = {"base": sum(parameter.numel() for parameter in base.parameters())}
    for arm in p.arms:
        one = model_of(p, arm, base, 0, reader)
        found[arm] = sum(q.numel() for q in one.parameters() if q.requires_grad)
    return found


def train_arm(
    p: ILora,
    arm: str,
    base: Bert4Rec,
    dataset: Dataset,
    task: Task,
    device: Device,
    seed: int,
    rate: float,
    reader: Bert4Rec | None = None,
) -> tuple[Trainer, Path]:
    """Train one arm at one rate, or go on with it, or load it; return its trainer and its folder."""
    model = model_of(p, arm, base, seed, reader)
    train = train_of(p, task.split, seed, p.epochs, rate)
    parts = [origin_of(model), asdict(model.config), as_dict(train), data_identity(dataset, task.split)]
    said = json.dumps([*parts, provenance.code_hash(NOTEBOOK)], sort_keys=True)
    folder = paths.runs() / NOTEBOOK / hashlib.sha256(said.encode()).hexdigest()[:16]
    return fine_tune(model, dataset, train, device, folder, split=task.split), folder


def run_arm(
    p: ILora,
    arm: str,
    base: Trainer,
    dataset: Dataset,
    task: Task,
    device: Device,
    seed: int,
    rates: Sequence[float],
    reader: Bert4Rec | None = None,
) -> Run:
    """Train an arm at each of the rates, keep the one that is best on validation, and rank the test once."""
    if arm == "none":
        valid = metrics.summary(rank_targets(base, task.split.valid, True).ranks)["ndcg@10"]
        return Run(arm, seed, None, base, valid, rank_targets(base, task.split.test, True).ranks, 0, 0, 0)
    tried = [train_arm(p, arm, base.model, dataset, task, device, seed, rate, reader) for rate in rates]
    trainer, folder = max(tried, key=lambda one: one[0].progress.best_value)
    return Run(
        arm,
        seed,
        trainer.config.learning_rate,
        trainer,
        trainer.progress.best_value,
        rank_targets(trainer, task.split.test, True).ranks,
        sum(parameter.numel() for parameter in trainer.parameters),
        (folder / "best" / checkpoint.TENSORS).stat().st_size,
        trainer.progress.tokens,
    )


def adapt(
    p: ILora,
    bases: Mapping[int, Trainer],
    dataset: Dataset,
    task: Task,
    device: Device,
    readers: Mapping[int, Bert4Rec | None] | None = None,
) -> list[Run]:
    """Adapt every seed's base by every arm; the first seed's validation chooses each arm's learning rate.

    `readers` holds by seed what `train_reader` returned.
    """
    found: list[Run] = []
    for arm in p.arms:
        rates: Sequence[float] = p.learning_rates
        for seed, base in bases.items():
            run = run_arm(p, arm, base, dataset, task, device, seed, rates, (readers or {}).get(seed))
            found.append(run)
            rates = rates if run.learning_rate is None else [run.learning_rate]
    return found
