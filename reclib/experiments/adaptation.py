"""Adapting a base model to later data: every arm takes the same steps, all choices are made on validation.

A base is trained on the past (`splits.divide`) and then trained further on the next period, or on a segment
of its users. All arms see the same batches and the same number of tokens:

- `none`: the base as it is; `full`: all its weights; `bias`: only its output bias, which can follow how
  popular items are and nothing else; `head`: plain LoRA of the output table alone;
- `lora`, `ilora`, `gated`: the adapters of `lora` on all encoder matrices. `gated`, one learned scalar a
  layer, is what the seed study calls iLoRA; it does not look at the user;
- `shuffled_user`, `noise`, `fixed_gate`, `static_gate`: controls, `ilora` without the user's instance. A gain
  that they share is not due to that instance.

New items, absent from the past, have random embeddings. Before any arm starts, each gets the mean of its
known neighbours in the adaptation period (`start_new_items`).

Metrics are averaged over a user's targets, then over seeds. Comparisons are paired by user and corrected
for all arms of a task (Holm).

Shapes: S seeds, U users, K experts.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from reclib.data.dataset import Dataset, Evaluation, Histories, content_hash
from reclib.data.splits import Periods, Split
from reclib.evaluate import baselines, metrics, statistics
from reclib.experiments import baseline
from reclib.experiments.baseline import COMPARED, flat, run_folder
from reclib.experiments.notebook import Result
from reclib.hardware import Device
from reclib.model.bert4rec import Bert4Rec, count_parameters
from reclib.model.ilora import AdaptedModel
from reclib.parameters import ILora
from reclib.train import saving
from reclib.train.fit import data_identity, fine_tune, fit, rank_targets
from reclib.train.trainer import Trainer

NOTEBOOK = "05_ilora"


class Task(NamedTuple):
    """The histories and users that a base is adapted to."""

    name: str
    split: Split
    known: np.ndarray  # bool (test rows,): whether the target's item is in the past


class Run(NamedTuple):
    """One arm and seed at the learning rate chosen on validation, ranked once on the test windows.

    Pairwise counts are not trained: they have neither seed nor trainer.
    """

    arm: str
    valid: float  # NDCG@10 on validation, over targets
    ranks: np.ndarray  # int64 (rows of the test,)
    tokens: int = 0  # real items trained on
    seed: int | None = None
    learning_rate: float | None = None  # None: not trained
    trained: int = 0  # number of trained parameters
    saved_bytes: int | None = 0  # size of the file with the trained parameters
    trainer: Trainer | None = None


# -- training ------------------------------------------------------------------------------------------------


def tasks_of(p: ILora, dataset: Dataset) -> tuple[Periods, list[Task]]:
    """Return the dataset in periods, and the tasks that the parameters ask for."""
    periods = splits.divide(dataset, (p.past_share, p.adaptation_share, p.valid_share), p.targets_per_user)
    tasks = []
    for name in p.tasks:
        segment = name == "segment"
        split = splits.segment(dataset, periods, p.segment_share) if segment else periods.adaptation
        tasks.append(Task(name, split, periods.known[split.test.targets]))
    return periods, tasks


def described(periods: Periods, tasks: Sequence[Task]) -> list[Result]:
    """Return the sizes of the periods and of each task."""
    sizes: dict[str, Any] = {}
    for unit in ("interactions", "users"):
        sizes |= {f"{part}_{unit}": count for part, count in periods.about[unit].items()}
    sizes["items_not_in_the_past"] = periods.about["items_not_in_the_past"]
    results = [Result("periods", sizes)]
    for task in tasks:
        numbers = {"histories": len(task.split.train.starts), "valid_targets": len(task.split.valid.targets)}
        numbers |= {"test_targets": len(task.known), "new_item_targets": int((~task.known).sum())}
        results.append(Result("task", numbers, {"task": task.name}))
    return results


def train_of(p: ILora, split: Split, seed: int, epochs: int, learning_rate: float) -> TrainConfig:
    """Return the configuration of a base or of an arm: they differ in length and rate only."""
    steps = -(-len(split.train.starts) // p.batch_size) * epochs
    shared = ("batch_size", "mask_prob", "last_item_share")
    values = {name: getattr(p, name) for name in shared} | {"window": "random", "precision": "fp32"}
    values |= {"seed": seed, "epochs": epochs, "learning_rate": learning_rate}
    values |= {"lr_warmup_steps": max(1, steps // 10), "eval_every": max(1, epochs // p.evaluations)}
    return validated(TrainConfig, values)


def shape_of(p: ILora, dataset: Dataset, causal: bool = False) -> ModelConfig:
    """Return the base's configuration, or that of its causal twin."""
    sizes: dict[str, Any] = {"max_len": p.max_len, "num_items": dataset.num_items}
    return model_config(p.size, dropout=p.dropout, causal=causal, **sizes)


def train_base(
    p: ILora, dataset: Dataset, periods: Periods, device: Device, seed: int, causal: bool = False
) -> Trainer:
    """Train or load a base on the past, then set new items to the mean of their neighbours.

    With `causal`, train its causal twin instead: same size, same data, same number of epochs.
    """
    model = shape_of(p, dataset, causal)
    train = train_of(p, periods.base, seed, p.base_epochs, p.base_learning_rate)
    train = changed(train, objective="next_item") if causal else train
    folder = run_folder(NOTEBOOK, model, train, data_identity(dataset, periods.base))
    trainer = fit(model, dataset, train, device, folder, split=periods.base)
    start_new_items(trainer.model, periods)
    return trainer


def train_reader(p: ILora, dataset: Dataset, periods: Periods, device: Device, seed: int) -> Bert4Rec | None:
    """Return the causal model that representation='causal_state' reads; None for the others."""
    if p.representation != "causal_state":
        return None
    return train_base(p, dataset, periods, device, seed, causal=True).model


@torch.no_grad()
def start_new_items(model: Bert4Rec, periods: Periods) -> int:
    """Set items absent from the past to the mean of their known neighbours; return how many were set.

    Neighbours are taken from the adaptation period (`splits.neighbours`). Output rows and biases are set
    likewise. Items without neighbours keep their random initial values.
    """
    neighbours = splits.neighbours(periods.adaptation.train, periods.known)
    tables = {id(t): t for t in (model.item_table.weight, model.output_weight, model.output_bias)}
    for item, known in neighbours.items():
        index = torch.from_numpy(known.astype(np.int64))
        for table in tables.values():
            if table is not None:
                table[item] = table[index.to(table.device)].mean(0)
    return len(neighbours)


def arm_model(
    p: ILora, arm: str, base: Bert4Rec, seed: int, reader: Bert4Rec | None = None
) -> Bert4Rec | AdaptedModel:
    """Return an arm's model: a copy of the base, trained in full, in part, or frozen with a new adapter.

    `reader` is what `train_reader` returned.
    """
    model = copy.deepcopy(base)
    if arm in ("none", "full", "bias"):
        model.requires_grad_(arm == "full")
        if arm == "bias":
            assert model.output_bias is not None
            model.output_bias.requires_grad_(True)
        return model
    shared = ("rank", "alpha", "num_experts", "gate_learning_rate", "representation", "temperature")
    values: dict[str, Any] = {name: getattr(p, name) for name in shared}
    values |= {"kind": "lora" if arm == "head" else "ilora" if arm in CONTROLS else arm, "gate_seed": seed}
    values |= {"dropout": p.adapter_dropout, "control": arm if arm in CONTROLS else "none"}
    values["targets"] = ("head",) if arm == "head" else tuple(p.targets)
    adapted = AdaptedModel(model)
    torch.manual_seed(seed)  # of A, and of the gate
    adapted.add(arm, validated(AdapterConfig, values), reader)
    return adapted


def counts(p: ILora, dataset: Dataset) -> Result:
    """Return how many parameters every arm trains, and the base's."""
    base = Bert4Rec(shape_of(p, dataset))
    reader = Bert4Rec(shape_of(p, dataset, True)) if p.representation == "causal_state" else None
    models = {arm: arm_model(p, arm, base, 0, reader) for arm in p.arms}
    sizes = {arm: sum(q.numel() for q in m.parameters() if q.requires_grad) for arm, m in models.items()}
    return Result("trained_parameters", {"base": sum(q.numel() for q in base.parameters())} | sizes)


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
    """Train, resume or load one arm at one learning rate; return its trainer and its folder."""
    model = arm_model(p, arm, base, seed, reader)
    train = train_of(p, task.split, seed, p.epochs, rate)
    parts = [model.origin(), as_dict(model.config), as_dict(train), data_identity(dataset, task.split)]
    key = json.dumps([*parts, records.code_hash(NOTEBOOK)], sort_keys=True)
    folder = system.runs() / NOTEBOOK / hashlib.sha256(key.encode()).hexdigest()[:16]
    return fine_tune(model, dataset, train, device, folder, split=task.split), folder


def adapt(
    p: ILora,
    bases: Mapping[int, Trainer],
    dataset: Dataset,
    task: Task,
    device: Device,
    readers: Mapping[int, Bert4Rec | None] | None = None,
) -> list[Run]:
    """Train every arm on every seed's base, and rank the test windows once for each run.

    The first seed tries all learning rates of an arm; the best on validation is used for all seeds. `readers`
    maps seeds to the results of `train_reader`.
    """
    runs: list[Run] = []
    for arm in p.arms:
        rates: Sequence[float] = p.learning_rates
        for seed, base in bases.items():
            if arm == "none":
                valid = metrics.summary(rank_targets(base, task.split.valid).ranks)["ndcg@10"]
                ranks = rank_targets(base, task.split.test).ranks
                runs.append(Run(arm, valid, ranks, seed=seed, trainer=base))
                continue
            arguments = (base.model, dataset, task, device, seed)
            tried = [train_arm(p, arm, *arguments, rate, (readers or {}).get(seed)) for rate in rates]
            trainer, folder = max(tried, key=lambda pair: pair[0].progress.best_value)
            rates = [trainer.config.learning_rate]
            run = Run(
                arm,
                trainer.progress.best_value,
                rank_targets(trainer, task.split.test).ranks,
                tokens=trainer.progress.tokens,
                seed=seed,
                learning_rate=trainer.config.learning_rate,
                trained=sum(parameter.numel() for parameter in trainer.parameters),
                saved_bytes=(folder / "best" / saving.TENSORS).stat().st_size,
                trainer=trainer,
            )
            runs.append(run)
    return runs


def pairwise_counts(dataset: Dataset, periods: Periods, task: Task) -> Run:
    """Score pairwise counts of the past and the adaptation period, hyperparameters chosen on validation.

    Nothing is trained: this is the baseline that adaptation has to beat.
    """
    starts, _, adaptation_ends, *_ = splits.borders(dataset, np.array(periods.about["points"]))
    histories = Histories(dataset.items, starts, adaptation_ends)
    family = baselines.families()["pairwise_counts"]
    choice = baselines.choose(family, histories, dataset.num_items, task.split.valid)
    valid, test = (
        metrics.rank(choice.recommender.scores(part), part, remove_seen=True).ranks
        for part in (task.split.valid, task.split.test)
    )
    tokens = int(histories.lengths.sum())
    return Run("pairwise_counts", float(metrics.ndcg(valid, 10).mean()), test, tokens, saved_bytes=None)


# -- accuracy ------------------------------------------------------------------------------------------------


def per_user(dataset: Dataset, task: Task, runs: Sequence[Run], metric: str) -> dict[str, np.ndarray]:
    """Return a metric of every arm by seed and user (S, U), targets of a user averaged."""
    by_arm: dict[str, list[np.ndarray]] = {}
    for run in runs:
        values = metrics.per_user(run.ranks)[metric]
        by_arm.setdefault(run.arm, []).append(splits.by_user(dataset, task.split.test, values))
    return {arm: np.stack(rows) for arm, rows in by_arm.items()}


def accuracy(dataset: Dataset, task: Task, runs: Sequence[Run], samples: int) -> list[Result]:
    """Return every arm's mean metrics with intervals over users, and the means of each seed.

    HR@10 is also given for targets that the past has and for new ones.
    """
    values = {metric: per_user(dataset, task, runs, metric) for metric in COMPARED}
    trainer = next(run.trainer for run in runs if run.trainer is not None)
    base = count_parameters(trainer.model.config)["total"]
    results = []
    for arm in dict.fromkeys(run.arm for run in runs):
        arm_runs = [run for run in runs if run.arm == arm]
        first = arm_runs[0]
        intervals = {name: statistics.bootstrap(values[name][arm].mean(axis=0), samples) for name in COMPARED}
        hits = np.mean([metrics.hit(run.ranks, 10) for run in arm_runs], axis=0)
        numbers: dict[str, Any] = flat(intervals) | {
            "hr@10_known": float(hits[task.known].mean()),
            "hr@10_new": float(hits[~task.known].mean()) if (~task.known).any() else None,
            "users": values["hr@10"][arm].shape[1],
            "trained": first.trained,
            "trained_share": first.trained / base,
            "saved_bytes": first.saved_bytes,
            "tokens": first.tokens,
            "seeds": sum(run.seed is not None for run in arm_runs),
        }
        params: dict[str, Any] = {"task": task.name, "model": arm}
        results.append(Result("adaptation", numbers, params | {"learning_rate": first.learning_rate}))
        for row, run in enumerate(arm_runs):
            if run.seed is not None:
                means = {name: float(values[name][arm][row].mean()) for name in COMPARED}
                means["valid_ndcg@10"] = run.valid
                results.append(Result("adaptation", means, params, seed=run.seed))
    return results


def comparisons(dataset: Dataset, task: Task, runs: Sequence[Run], reference: str, name: str) -> list[Result]:
    """Compare all arms with `reference` on both metrics, corrected for their number.

    `name` is that of the results.
    """
    deterministic = {run.arm for run in runs if run.seed is None}
    results = []
    for metric in COMPARED:
        compared = statistics.compare(per_user(dataset, task, runs, metric), reference, deterministic)
        named = (baseline.compared(comparison, metric, name) for comparison in compared)
        results += [result._replace(params={"task": task.name} | result.params) for result in named]
    return results


# -- an implanted signal -------------------------------------------------------------------------------------


class Rule(NamedTuple):
    """What `implant` follows: the next item depends on the user and on the item before."""

    half: np.ndarray  # bool (I + 1,): half of an item
    stays: np.ndarray  # bool (users,): whether the next item is of the half of the one before
    has_past: np.ndarray  # bool (users,): users without a past do not follow the rule
    frequent: np.ndarray  # int64 (2, N): most frequent items of each half

    def choices(self, user: int, before: int) -> np.ndarray:
        """Return the items (N,) of which one follows the item `before`."""
        return self.frequent[int(self.half[before] == self.stays[user])]


def rule_of(dataset: Dataset, periods: Periods, per_side: int = 10) -> Rule:
    """Return the rule for a dataset: halves by the past's user-item matrix.

    The sign of its second singular vector less the median divides the items, the third the users.
    """
    from scipy.sparse import csr_matrix
    from scipy.sparse.linalg import svds

    starts, past_ends, *_ = splits.borders(dataset, np.array(periods.about["points"]))
    past = Histories(dataset.items, starts, past_ends)
    users = np.repeat(np.arange(dataset.num_users), past.lengths)
    shape = (dataset.num_users, dataset.num_items + 1)
    matrix = csr_matrix((np.ones(len(users)), (users, dataset.items[past.places()])), shape=shape)
    matrix.data[:] = 1  # repetitions count once
    frequency, has_past = np.asarray(matrix.sum(axis=0)).ravel(), past.lengths > 0
    left, values, right = svds(matrix, k=3, v0=np.ones(min(shape)))
    third, second, _ = np.argsort(values)
    items, people = (v * np.sign(v[np.abs(v).argmax()]) for v in (right[second], left[:, third]))
    half = items > np.median(items[frequency > 0])
    ranked = [np.where(half == side, frequency, -1).argsort(kind="stable")[::-1] for side in (False, True)]
    stays = people > np.median(people[has_past])
    return Rule(half, stays, has_past, np.stack(ranked)[:, :per_side])


def implant(dataset: Dataset, periods: Periods, rule: Rule, share: float, seed: int = 0) -> Dataset:
    """Exchange a `share` of the items after the past for items that the rule chooses and the user never had.

    One adapter for all users would have to multiply user and item; a gate that reads the user's history
    chooses between two adapters of rank one. Users without a past stay as they are.
    """
    generator, items = np.random.default_rng(seed), dataset.items.copy()
    _, firsts, *_ = splits.borders(dataset, np.array(periods.about["points"]))
    for user in np.flatnonzero(rule.has_past):
        start, end = dataset.offsets[user : user + 2]
        had = set(items[start:end].tolist())
        for place in range(firsts[user], end):
            if generator.random() < share:
                new = [item for item in rule.choices(int(user), items[place - 1]).tolist() if item not in had]
                if new:
                    items[place] = generator.choice(new)
                    had.add(int(items[place]))
    fingerprint = content_hash([items.tobytes(), dataset.fingerprint.encode()])[:16]
    return replace(dataset, items=items, manifest=dataset.manifest | {"fingerprint": fingerprint})


def ceiling(dataset: Dataset, task: Task, rule: Rule, share: float) -> Result:
    """Rank the test windows by popularity, and by the rule before popularity: what there is to be learned."""
    test, popularity = task.split.test, metrics.popularity(task.split.train, dataset.num_items)
    users, last = splits.row_users(dataset, test.histories), test.histories.items[test.histories.ends - 1]

    def known() -> metrics.Scores:
        for rows, scores in metrics.constant_scores(popularity, test):
            for row, at in zip(rows, scores, strict=True):
                if rule.has_past[users[row]]:
                    at[rule.choices(int(users[row]), int(last[row])) - 1] += float(popularity.max()) + 1
            yield rows, scores

    scorers = {"popularity": metrics.constant_scores(popularity, test), "the rule": known()}
    ranks = {name: metrics.rank(scores, test, remove_seen=True).ranks for name, scores in scorers.items()}
    values = {name: splits.by_user(dataset, test, metrics.ndcg(rank, 10)) for name, rank in ranks.items()}
    means = {name: float(per_user.mean()) for name, per_user in values.items()}
    return Result("implanted_ceiling", means, {"share": share, "metric": "ndcg@10"})


def implanted(
    p: ILora,
    bases: Mapping[int, Trainer],
    dataset: Dataset,
    periods: Periods,
    device: Device,
    readers: Mapping[int, Bert4Rec | None] | None = None,
) -> list[Result]:
    """Compare LoRA, and iLoRA with another user's gate, with iLoRA where a gate has something to say.

    For each share of `p.implanted` the arms are trained from the same bases on the data of `implant`.
    """
    arms = [arm for arm in ("ilora", "lora", "shuffled_user") if arm in p.arms]
    results, rule = [], rule_of(dataset, periods)
    for share in p.implanted:
        data = implant(dataset, periods, rule, share)
        at_share = changed(p, tasks=["next_period"], arms=["none", *arms])
        _, (task,) = tasks_of(at_share, data)
        results.append(ceiling(data, task, rule, share))
        runs = adapt(at_share, bases, data, task, device, readers)
        means = {arm: values.mean() for arm, values in per_user(data, task, runs, "ndcg@10").items()}
        own = {"share": share, "targets": "encoder, head" if "head" in p.targets else "encoder"}
        for result in comparisons(data, task, runs, "ilora", "implanted"):
            if result.params["metric"] == "ndcg@10":
                levels = {"ndcg@10": means[result.params["model"]], "reference_ndcg@10": means["ilora"]}
                metrics_of = {**result.metrics, **{name: float(value) for name, value in levels.items()}}
                results.append(result._replace(metrics=metrics_of, params=own | result.params))
    return results


# -- the gate ------------------------------------------------------------------------------------------------


@torch.no_grad()
def expert_weights(trainer: Trainer, rows: Evaluation) -> np.ndarray:
    """Return the gate of each row of an evaluation, float64 (rows, K), as the ranking computes it."""
    model: Any = trainer.model
    config = model.config
    layout = Layout(config)
    model.eval()
    parts, places = [], []
    for chosen, batch in next_item_batches(rows.histories, layout, np.arange(len(rows.targets)), 256):
        moved = batch.to(trainer.where)
        weights = model.expert_weights(moved.items, moved.segment_ids, moved.positions).flatten(0, 1)
        parts.append(weights[moved.target_places[: len(chosen)]].double().cpu().numpy())
        places.append(chosen)
    return np.concatenate(parts)[np.argsort(np.concatenate(places))]


def gates(dataset: Dataset, periods: Periods, task: Task, runs: Sequence[Run]) -> Result:
    """Return iLoRA's gates by user for the first seed, with features of the user; one is the gain on LoRA."""
    first = {run.arm: run for run in reversed(runs)}  # of each arm the first seed's
    run, lora, test = first["ilora"], first.get("lora"), task.split.test
    assert run.trainer is not None
    ranks = splits.popularity_ranks(periods.base.train, dataset.num_items)
    rows = {
        "items in the history": test.histories.lengths.astype(np.float64),
        "mean popularity rank of the history": splits.mean_rank(test.histories, ranks),
        "popularity rank of the last item": ranks[test.histories.items[test.histories.ends - 1]],
    }
    if lora is not None:
        rows["NDCG@10 minus that of lora"] = metrics.ndcg(run.ranks, 10) - metrics.ndcg(lora.ranks, 10)
    features = {name: splits.by_user(dataset, test, values) for name, values in rows.items()}
    weights = splits.by_user(dataset, test, expert_weights(run.trainer, test).T)  # (K, U)
    spread = {f"expert_{k}_sd": float(column.std()) for k, column in enumerate(weights, start=1)}
    columns = {f"expert {k}": column for k, column in enumerate(weights, start=1)} | features
    series = {name: column.tolist() for name, column in columns.items()}
    return Result("gates", {"users": weights.shape[1]} | spread, {"task": task.name}, series, run.seed)
