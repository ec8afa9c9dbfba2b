"""Adapting a base to what comes after it: the same steps by every arm, all choices on validation.

A base is trained on the past (`splits`) and then trained further on the next period, or on a segment of its
users. The arms see the same batches, so their tokens are equal by construction:

- `none`: the base as it is; `full`: all its weights; `bias`: only its output bias, which can follow how
  popular items are and nothing else; `head`: plain LoRA of the output table alone;
- `lora`, `ilora`, `gated`: the adapters of `lora` on all encoder matrices. `gated`, one learned scalar a
  layer, is what the seed study calls iLoRA; it does not look at the user;
- `shuffled_user`, `noise`, `fixed_gate`, `static_gate`: `ilora` with something taken away (`ilora`). What
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

from reclib import records, system
from reclib.config import (
    CONTROLS,
    AdapterConfig,
    ModelConfig,
    TrainConfig,
    as_dict,
    changed,
    model_config,
    validated,
)
from reclib.data import splits
from reclib.data.batches import Layout, next_item_batches
from reclib.data.dataset import Dataset, Evaluation, Histories
from reclib.data.splits import Periods, Split
from reclib.evaluate import baselines, metrics, statistics
from reclib.experiments import baseline
from reclib.experiments.baseline import COMPARED, Result, flat, run_folder
from reclib.hardware import Device
from reclib.model.bert4rec import Bert4Rec
from reclib.model.ilora import AdaptedModel
from reclib.parameters import ILora
from reclib.train import saving
from reclib.train.fit import data_identity, fine_tune, fit, rank_targets
from reclib.train.trainer import Trainer

NOTEBOOK = "05_ilora"


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
    whole = splits.divide(dataset, shares, p.targets_per_user)
    found = {"next_period": lambda: whole.adaptation}
    found["segment"] = lambda: splits.segment(dataset, whole, p.segment_share)
    tasks = {name: found[name]() for name in p.tasks}
    return whole, [Task(name, one, splits.known_targets(whole, one.test)) for name, one in tasks.items()]


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

    Neighbours are those in the adaptation period (`splits.neighbours`). Output rows and biases follow. Items
    that do not occur there stay where they were drawn.
    """
    found = splits.neighbours(whole.adaptation.train, whole.known)
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


def arm_model(
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
        one = arm_model(p, arm, base, 0, reader)
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
    model = arm_model(p, arm, base, seed, reader)
    train = train_of(p, task.split, seed, p.epochs, rate)
    parts = [model.origin(), asdict(model.config), as_dict(train), data_identity(dataset, task.split)]
    said = json.dumps([*parts, records.code_hash(NOTEBOOK)], sort_keys=True)
    folder = system.runs() / NOTEBOOK / hashlib.sha256(said.encode()).hexdigest()[:16]
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
        (folder / "best" / saving.TENSORS).stat().st_size,
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


# ------------------------------------------------------------------------------------------------
# What is said of adaptations: accuracy by arm, comparisons with their power, and what the gates look at.
#
# The unit is the user: a metric is averaged over a user's targets, then over seeds. Comparisons are paired
# by user and corrected for all arms of a task (Holm); each says the smallest difference that it could have
# seen.
#
# Shapes: S seeds, U users, K experts.


class Counted(NamedTuple):
    """A count without training beside the arms, which are `Run`s: what adapting has to beat."""

    arm: str
    valid: float  # NDCG@10 on validation, over targets
    ranks: np.ndarray  # int64 (rows of the test,)
    tokens: int  # interactions that were counted
    seed: int | None = None  # deterministic
    learning_rate: float | None = None
    trained: int = 0
    saved_bytes: int | None = None


def pairwise_counts(dataset: Dataset, whole: Periods, task: Task) -> Counted:
    """Count item pairs in past and adaptation period together, hyperparameters chosen on validation."""
    assert dataset.times is not None
    starts = dataset.offsets[:-1]
    before = np.add.reduceat(dataset.times < whole.about["points"][1], starts, dtype=np.int64)
    histories = Histories(dataset.items, starts, starts + before)
    family = baselines.families()["pairwise_counts"]
    choice = baselines.choose(family, histories, dataset.num_items, task.split.valid)
    valid, test = (
        metrics.rank(choice.recommender.scores(part), part, True).ranks
        for part in (task.split.valid, task.split.test)
    )
    return Counted("pairwise_counts", float(metrics.ndcg(valid, 10).mean()), test, int(before.sum()))


def per_user(
    dataset: Dataset, task: Task, runs: Sequence[Run | Counted], metric: str
) -> dict[str, np.ndarray]:
    """Return a metric of every arm by seed and user (S, U), targets of a user averaged."""
    found: dict[str, list[np.ndarray]] = {}
    for run in runs:
        values = metrics.per_user(run.ranks)[metric]
        found.setdefault(run.arm, []).append(splits.by_user(dataset, task.split.test, values))
    return {arm: np.stack(rows) for arm, rows in found.items()}


def accuracy(dataset: Dataset, task: Task, runs: Sequence[Run | Counted], samples: int) -> list[Result]:
    """Return every arm's means over users with intervals, each seed's apart, and new items' targets apart."""
    values = {metric: per_user(dataset, task, runs, metric) for metric in COMPARED}
    found = []
    base = next(_base_size(run.trainer) for run in runs if isinstance(run, Run))
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        intervals = {name: statistics.bootstrap(values[name][arm].mean(axis=0), samples) for name in COMPARED}
        hits = np.mean([metrics.hit(run.ranks, 10) for run in mine], axis=0)
        said: dict[str, Any] = flat(intervals) | {
            "hr@10_known": float(hits[task.known].mean()),
            "hr@10_new": float(hits[~task.known].mean()) if (~task.known).any() else None,
            "users": values["hr@10"][arm].shape[1],
            "trained": mine[0].trained,
            "trained_share": mine[0].trained / base,
            "saved_bytes": mine[0].saved_bytes,
            "tokens": mine[0].tokens,
            "seeds": sum(run.seed is not None for run in mine),
        }
        about = {"task": task.name, "model": arm, "learning_rate": mine[0].learning_rate}
        found.append(Result("adaptation", said, about, {}))
        for row, run in enumerate(mine):
            if run.seed is None:
                continue
            one = {name: float(values[name][arm][row].mean()) for name in COMPARED}
            one |= {"valid_ndcg@10": run.valid}
            found.append(Result("adaptation", one, {"task": task.name, "model": arm}, {}, run.seed))
    return found


def _base_size(trainer: Trainer) -> int:
    """Return how many parameters the base has, adapters and what a gate reads apart."""
    model: Any = trainer.model
    base = model.twin if isinstance(model, AdaptedModel) else model
    return sum(parameter.numel() for parameter in base.parameters())


def comparisons(
    dataset: Dataset, task: Task, runs: Sequence[Run | Counted], reference: str, name: str
) -> list[Result]:
    """Compare all arms with `reference` on both metrics, corrected for their number; records are `name`."""
    found = []
    for metric in COMPARED:
        values = per_user(dataset, task, runs, metric)
        deterministic = {run.arm for run in runs if run.seed is None}
        for one in statistics.compare(values, reference, deterministic):
            result = baseline.compared(one, metric, name)
            found.append(result._replace(params={"task": task.name} | result.params))
    return found


# -- the gate ------------------------------------------------------------------------------------------------


class Gates(NamedTuple):
    """The experts' weights of users, and what else is known of them."""

    weights: np.ndarray  # float64 (U, K)
    features: dict[str, np.ndarray]  # by name, (U,)


@torch.no_grad()
def expert_weights(trainer: Trainer, rows: Evaluation) -> np.ndarray:
    """Return the gate of each row of an evaluation, float64 (rows, K), as the ranking computes it."""
    model: Any = trainer.model
    config = model.config
    layout = Layout(config.max_len, config.mask_id, config.position_origin, True, 16, config.causal)
    model.eval()
    found = None
    for chosen, batch in next_item_batches(rows.histories, layout, np.arange(len(rows.targets)), 256):
        moved = batch.to(trainer.where)
        weights = model.expert_weights(moved.items, moved.segment_ids, moved.positions).flatten(0, 1)
        mine = weights[moved.target_places[: len(chosen)]].double().cpu().numpy()
        found = np.empty((len(rows.targets), mine.shape[1])) if found is None else found
        found[chosen] = mine
    assert found is not None
    return found


def gates_of(dataset: Dataset, whole: Periods, task: Task, run: Run, beside: Run | None) -> Gates:
    """Return a run's gates by user, with what they might follow; `beside` is the run that a gain is over."""
    test = task.split.test
    ranks = splits.popularity_ranks(whole.base.train, dataset.num_items)
    last = test.histories.items[test.histories.ends - 1]
    features = {
        "items in the history": test.histories.lengths.astype(np.float64),
        "mean popularity rank of the history": splits.mean_rank(test.histories, ranks),
        "popularity rank of the last item": ranks[last],
    }
    if beside is not None:
        gain = metrics.ndcg(run.ranks, 10) - metrics.ndcg(beside.ranks, 10)
        features[f"NDCG@10 minus that of {beside.arm}"] = gain
    weights = splits.by_user(dataset, test, expert_weights(run.trainer, test).T).T
    means = {name: splits.by_user(dataset, test, values) for name, values in features.items()}
    return Gates(weights, means)


def gate_results(task: Task, found: Gates, seed: int) -> list[Result]:
    """Return the gates by user, and Spearman's correlation of every expert with every feature (Holm)."""
    from scipy import stats

    experts = found.weights.shape[1]
    series: dict[str, list[Any]] = {f"expert {k + 1}": found.weights[:, k].tolist() for k in range(experts)}
    series |= {name: values.tolist() for name, values in found.features.items()}
    pairs = {
        f"{name}|{k}": stats.spearmanr(found.weights[:, k], values)
        for name, values in found.features.items()
        for k in range(experts)
    }
    known = {key: one for key, one in pairs.items() if np.isfinite(one.statistic)}  # constant: no correlation
    adjusted = statistics.holm({key: float(one.pvalue) for key, one in known.items()})
    spread = {f"expert_{k + 1}_sd": float(found.weights[:, k].std()) for k in range(experts)}
    results = [Result("gates", {"users": len(found.weights)} | spread, {"task": task.name}, series, seed)]
    for key, one in known.items():
        name, k = key.rsplit("|", 1)
        numbers = {"spearman": float(one.statistic), "adjusted_p": adjusted[key]}
        about = {"task": task.name, "feature": name, "expert": int(k) + 1}
        results.append(Result("gate_correlation", numbers, about, {}, seed))
    return results
