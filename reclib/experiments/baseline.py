"""What is said of models on the test split, from one look at it: accuracy, comparisons, protocols, controls.

`assess` asks a scorer for the ranks of the test targets in every way at once; the functions below it turn
the ranks of several models into results that a notebook or a grid records. A model is trained several times
(seeds) or deterministic; its users' metrics are averaged over the seeds before anything else.

Shapes: U users, k recommendations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reclib import records, system
from reclib.config import DataConfig, ModelConfig, TrainConfig, as_dict, model_config, validated
from reclib.cost import work
from reclib.cost.work import Flops
from reclib.data.batches import Epoch
from reclib.data.dataset import Dataset, Evaluation, Histories, train_histories
from reclib.data.splits import Split, sample_candidates
from reclib.evaluate import baselines, metrics, statistics
from reclib.evaluate.metrics import Outcome, Scorer
from reclib.evaluate.statistics import Claim, Interval
from reclib.experiments.notebook import Result
from reclib.hardware import Device
from reclib.model.bert4rec import count_parameters
from reclib.parameters import Baseline, Scaling
from reclib.train import distributed
from reclib.train.fit import (
    SELECT,
    Curves,
    Options,
    Setup,
    data_identity,
    fit,
    is_finished,
    start_tracker,
    write_setup,
)
from reclib.train.trainer import Trainer

# ------------------------------------------------------------------------------------------------
# From the parameters of notebook 02 to its training runs: BERT4Rec and its causal twin, under any split.

OBJECTIVES = {"bert4rec": "cloze", "causal": "next_item"}  # the models of notebook 02


@dataclass
class Trained:
    """One seed's run: its trainer, with the weights that were best on validation."""

    seed: int
    trainer: Trainer

    def curve(self) -> dict[str, list[float]]:
        """Return the columns of the learning curve, one value per evaluation."""
        rows = self.trainer.progress.history
        names = {"epoch": "epoch", "train_loss": "train_loss", f"valid_{SELECT}": SELECT, "tokens": "tokens"}
        if all("valid_loss" in row for row in rows):  # not in a run begun before the loss was evaluated
            names["valid_loss"] = "valid_loss"
        return {name: [row[key] for row in rows] for name, key in names.items()}

    def best(self) -> dict[str, float]:
        """Return validation at the chosen epoch."""
        row = max(self.trainer.progress.history, key=lambda row: row[SELECT])
        return {f"valid_{name}": row[name] for name in ("hr@10", "ndcg@10")} | {"epoch": row["epoch"]}

    def losses(self) -> dict[str, float]:
        """Return the lowest loss on validation and the last, in nats; nothing where it was not evaluated.

        The lowest is what a run stopped early would have: a law of size is about that one. `late_drop` is
        what the last fifth of the training took off it: a run with much of it is undertrained.
        """
        values = self.curve().get("valid_loss")
        if not values:
            return {}
        before = min(values[: max(1, len(values) * 4 // 5)])
        lowest = min(values)
        return {"lowest_valid_loss": lowest, "last_valid_loss": values[-1], "late_drop": before - lowest}

    def together(self) -> dict[str, Any]:
        """Return how many processes trained it and what joined them; nothing where it was one."""
        progress = self.trainer.progress
        if progress.processes == 1:
            return {}
        return {"processes": progress.processes, "backend": progress.backend}

    def timings(self) -> dict[str, float]:
        """Return what the run took."""
        progress = self.trainer.progress
        return {
            "train_seconds": progress.train_seconds,
            "eval_seconds": sum(row["eval_seconds"] for row in progress.history),
            "tokens_per_second": progress.tokens / progress.train_seconds,
        }


def model_of(p: Baseline, dataset: Dataset, objective: str = "cloze") -> ModelConfig:
    """Return the model that the parameters ask for, on the dataset's catalogue."""
    shared = ("dropout", "max_len", "norm", "tied", "output_bias")
    given: dict[str, Any] = {name: getattr(p, name) for name in shared} | {"num_items": dataset.num_items}
    return model_config(p.size, **given, causal=objective == "next_item")


def train_of(p: Baseline, seed: int, objective: str = "cloze") -> TrainConfig:
    """Return one seed's training configuration."""
    shared = (
        "epochs", "batch_size", "micro_batch_size", "learning_rate", "mask_prob", "last_item_share",
        "window", "loss", "eval_every", "patience",
    )  # fmt: skip
    given: dict[str, Any] = {name: getattr(p, name) for name in shared}
    given |= {"seed": seed, "objective": objective}
    given |= {"precision": p.precision or "auto", "compile_mode": p.compile_mode or "off"}
    return validated(TrainConfig, given)


def run_folder(notebook: str, model: ModelConfig, train: TrainConfig, data: str, nproc: int = 1) -> Path:
    """Return the folder of a run's checkpoints; another configuration, data, code or `nproc` has another."""
    parts: list[Any] = [asdict(model), as_dict(train), data, records.code_hash(notebook)]
    parts += [nproc] if nproc > 1 else []
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return system.runs() / notebook / key


def train_seed(
    notebook: str, p: Baseline, dataset: Dataset, split: Split, device: Device, name: str, seed: int
) -> Trained:
    """Train one seed of a model of `OBJECTIVES`, or go on with a run of the same code and data."""
    objective = OBJECTIVES[name]
    model, train = model_of(p, dataset, objective), train_of(p, seed, objective)
    title = f"{notebook}-{device.label}-{name}-{split.name.split()[0]}-seed{seed}"
    return carried_out(notebook, p, dataset, split, device, model, train, title)


def carried_out(
    notebook: str,
    p: Baseline | Scaling,
    dataset: Dataset,
    split: Split,
    device: Device,
    model: ModelConfig,
    train: TrainConfig,
    title: str,
) -> Trained:
    """Train a model as a notebook's parameters say: here, or by several processes beside the notebook.

    Those leave a finished run in the folder of checkpoints, and that is read back. Raises `InputError` with
    what they said where they failed.
    """
    data = data_identity(dataset, split)
    folder = run_folder(notebook, model, train, data, p.nproc)
    about = {"model": asdict(model), "train": asdict(train), "data": data}
    if p.nproc > 1:
        if not is_finished(folder):
            given = DataConfig(dataset=p.dataset, min_user=p.min_user, min_item=p.min_item)
            setup = Setup(given, train, None, asdict(model), split.name, data, notebook, title)
            write_setup(folder / "run.json", setup)
            words = ["--run", str(folder / "run.json"), "--out", str(folder)]
            distributed.apart([*words, "--gpu", p.gpu, "--tracker", p.tracker], p.nproc)
        return Trained(train.seed, fit(model, dataset, train, device, folder, split=split))
    with start_tracker(p.tracker, notebook, title, about) as track:
        curves = Curves(track, device)
        options = Options(on_step=curves.step, on_evaluation=curves.evaluation)
        return Trained(train.seed, fit(model, dataset, train, device, folder, options, split))


# ------------------------------------------------------------------------------------------------

TOP_K = 10

NEGATIVES = 100  # of the protocols that rank among samples

MAIN = "leave-one-out, seen removed"  # the protocol of every table unless it says otherwise

KEPT = "leave-one-out, seen kept"

HEADLINE = ("hr@10", "ndcg@10", "mrr")

COMPARED = ("hr@10", "ndcg@10")


class Assessed(NamedTuple):
    """One trained model, or one baseline, on the test split."""

    outcomes: dict[str, Outcome]  # by protocol
    shuffled: np.ndarray  # int64 (U,) ranks when histories come in random order
    shuffled_but_last: np.ndarray  # the same, their last item in place
    top: np.ndarray  # int64 (U, k) item ids, best first

    @property
    def ranks(self) -> np.ndarray:
        """Ranks (U,) under the main protocol."""
        return self.outcomes[MAIN].ranks


@dataclass
class Model:
    """A model by name: one assessment for each seed, or one without seed."""

    name: str
    runs: list[Assessed]
    seeds: list[int] = field(default_factory=list)  # empty: deterministic

    def per_seed(self, metric: str) -> np.ndarray:
        """Return a metric's values (S, U), by seed and user."""
        return np.stack([metrics.per_user(run.ranks)[metric] for run in self.runs])

    def per_user(self, metric: str) -> np.ndarray:
        """Return a metric's values (U,), averaged over the seeds."""
        return self.per_seed(metric).mean(axis=0)


class Conditions(NamedTuple):
    """A test split with all that protocols and controls need, drawn once for all models."""

    evaluation: Evaluation
    candidates: dict[str, np.ndarray]
    shuffled: Evaluation
    shuffled_but_last: Evaluation


def draw(dataset: Dataset, evaluation: Evaluation, seed: int = 0) -> Conditions:
    """Draw negatives and random orders for an evaluation of the dataset."""
    count = min(NEGATIVES, dataset.num_items - int(dataset.lengths.max()))
    drawn: dict[str, np.ndarray] = {}
    if count > TOP_K:  # a catalogue that a user has nearly all of leaves nothing to draw from
        drawn["uniform"] = sample_candidates(dataset, evaluation, count, "uniform", seed)
        drawn["popularity"] = sample_candidates(dataset, evaluation, count, "popularity", seed)
    orders = [statistics.shuffled(evaluation, seed, keep) for keep in (0, 1)]
    return Conditions(evaluation, drawn, *orders)


def assess(score: Scorer, test: Conditions) -> Assessed:
    """Rank the test targets by a scorer in every way."""
    found = metrics.side_by_side(score, test.evaluation, test.candidates)
    ranking = metrics.rank(score(test.evaluation), test.evaluation, True, TOP_K)
    assert ranking.top is not None
    shuffled, but_last = (
        metrics.rank(score(one), one, True).ranks for one in (test.shuffled, test.shuffled_but_last)
    )
    return Assessed({one.protocol: one for one in found}, shuffled, but_last, ranking.top)


def assess_trained(trainer: Trainer, test: Conditions) -> Assessed:
    """Rank the test targets by a trained model, in its precision."""
    with trainer.autocast():
        return assess(lambda part: metrics.model_scores(trainer.model, part, trainer.where), test)


def assess_baselines(split: Split, dataset: Dataset, test: Conditions) -> tuple[list[Model], dict[str, Any]]:
    """Fit every baseline, its hyperparameters chosen on validation; return them assessed, and the choices."""
    models, chosen = [], {}
    for name, family in baselines.families(dataset.times).items():
        choice = baselines.choose(family, split.train, dataset.num_items, split.valid)
        models.append(Model(name, [assess(choice.recommender.scores, test)]))
        chosen[name] = choice.chosen
        if family.refitted:  # the same hyperparameters, and every item before the test target
            again = family.fit(split.test.histories, dataset.num_items, **choice.chosen)
            models.append(Model(f"{name}_with_validation", [assess(again.scores, test)]))
    return models, chosen


def other_split(
    trainer: Trainer, split: Split, samples: int, model: str, seed: int | None = None
) -> list[Result]:
    """Return HR@10 and NDCG@10 of a model that was trained under another split than leave-one-out.

    Where users were divided at random, a masked model is also evaluated as the seed study does.
    """
    with trainer.autocast():
        found = [
            metrics.under_split(lambda part: metrics.model_scores(trainer.model, part, trainer.where), split)
        ]
        if split.about.get("shares") and not trainer.model.config.causal:
            found.append(metrics.masked_positions(trainer.model, split.test, trainer.where))
    results = []
    for one in found:
        numbers = flat({metric: metrics.interval(one, metric, samples) for metric in COMPARED})
        about = {"model": model, "protocol": one.protocol, "label": one.label}
        results.append(Result("protocol", numbers, about | {"comparable": one.comparable}, {}, seed))
    return results


def headline(models: Sequence[Model], samples: int) -> list[Result]:
    """Return every model's mean over users with its interval, and the mean of each seed apart."""
    found = []
    for model in models:
        values = {name: model.per_seed(name) for name in HEADLINE}
        intervals = {name: statistics.bootstrap(rows.mean(axis=0), samples) for name, rows in values.items()}
        found.append(Result("test_metrics", flat(intervals), {"model": model.name}, {}))
        for place, seed in enumerate(model.seeds):
            means = {name: float(rows[place].mean()) for name, rows in values.items()}
            found.append(Result("test_metrics", means, {"model": model.name}, {}, seed))
    return found


def comparisons(
    models: Sequence[Model], reference: str, left_out: Mapping[str, Sequence[int]] | None = None
) -> list[Result]:
    """Compare every model with the reference, paired by user and corrected for the number of comparisons.

    `left_out` names, by model, seeds that chose its recipe and so do not judge it.
    """
    deterministic = [model.name for model in models if not model.seeds]
    found = []
    for metric in COMPARED:
        values = {}
        for model in models:
            out = set((left_out or {}).get(model.name, ()))
            rows = [place for place, seed in enumerate(model.seeds or [-1]) if seed not in out]
            if rows:
                values[model.name] = model.per_seed(metric)[rows]
        if reference not in values:
            return []
        for one in statistics.compare(values, reference, deterministic):
            found.append(compared(one, metric))
    return found


def compared(one: statistics.Comparison, metric: str, name: str = "comparison") -> Result:
    """Return one comparison as a result."""
    numbers = flat({"difference": one.difference}) | {
        "p": one.p_value,
        "adjusted_p": one.adjusted_p,
        "detectable": one.detectable,
        "seeds": one.seeds[0],
        "reference_seeds": one.seeds[1],
        "degrees_of_freedom": one.degrees,
    }
    return Result(name, numbers, {"model": one.name, "against": one.reference, "metric": metric}, {})


def claim(row: Mapping[str, Any]) -> Claim:
    """Return what a comparison's numbers allow to say."""
    return statistics.claim(row["difference"], row["adjusted_p"], (row["seeds"], row["reference_seeds"]))


def protocol_results(models: Sequence[Model], samples: int) -> list[Result]:
    """Return HR@10 and NDCG@10 of each model under each protocol, averaged over seeds."""
    found = []
    for model in models:
        for name, first in model.runs[0].outcomes.items():
            runs = [run.outcomes[name] for run in model.runs]
            intervals = {metric: _over_seeds(runs, metric, samples) for metric in COMPARED}
            said = {"protocol": name, "label": first.label, "comparable": first.comparable}
            found.append(Result("protocol", flat(intervals), {"model": model.name} | said, {}))
    return found


def _over_seeds(runs: Sequence[Outcome], metric: str, samples: int) -> Interval:
    """Return a metric's mean over seeds; its interval is over users, each with the mean of all seeds.

    Masked positions are the same for every seed, so that ranks can be averaged place by place there too.
    """
    if len(runs) == 1:
        return metrics.interval(runs[0], metric, samples)
    values = np.mean([metrics.per_user(run.ranks)[metric] for run in runs], axis=0)
    return metrics.interval_over_users(values, runs[0].users, samples)


def shuffle_control(models: Sequence[Model], samples: int) -> list[Result]:
    """Return NDCG@10 in the true order and in random ones, and the paired loss with its interval."""
    found = []
    for model in models:
        true = model.per_user("ndcg@10")
        rows: dict[str, Any] = {"ndcg@10": float(true.mean())}
        for name in ("shuffled", "shuffled_but_last"):
            ranks = [metrics.ndcg(getattr(run, name), 10) for run in model.runs]
            values = np.mean(ranks, axis=0)
            change = statistics.bootstrap(values - true, samples)
            rows |= {name: float(values.mean())} | flat({f"{name}_change": change})
        found.append(Result("shuffle_control", rows, {"model": model.name}, {}))
    return found


def groups(models: Sequence[Model], dataset: Dataset, evaluation: Evaluation, samples: int) -> list[Result]:
    """Return HR@10 and NDCG@10 of users by history length, by how popular their target is, and by its time.

    By time where the dataset has times: a target at the same time stamp as the item before it (the same day,
    where times are whole days) is often a part of one order, and its place in it may be the file's alone.
    """
    counts = metrics.popularity(train_histories(dataset), dataset.num_items)
    divisions = {
        "history": statistics.by_history_length(evaluation.histories),
        "popularity": statistics.by_item_popularity(evaluation.targets, counts),
    }
    if dataset.times is not None:
        divisions["time"] = statistics.by_time_before(evaluation.histories, dataset.times)
    found = []
    for model in models:
        for by, division in divisions.items():
            series: dict[str, list[Any]] = {}
            for metric in COMPARED:
                values = model.per_user(metric)
                parts = [one for one in statistics.in_groups(values, division, samples) if one.interval]
                series |= {"group": [one.label for one in parts], "users": [one.users for one in parts]}
                for place, end in enumerate(("", "_low", "_high")):
                    series[f"{metric}{end}"] = [float(one.interval[place]) for one in parts if one.interval]
            found.append(Result("groups", {"groups": len(parts)}, {"model": model.name, "by": by}, series))
    return found


def beyond_accuracy(models: Sequence[Model], dataset: Dataset) -> list[Result]:
    """Return how much of the catalogue is recommended, how unequally, and how popular it is."""
    counts = metrics.popularity(train_histories(dataset), dataset.num_items)
    found = []
    for model in models:
        tops = [run.top for run in model.runs]
        rows = {
            "coverage": [statistics.coverage(top, dataset.num_items) for top in tops],
            "gini": [statistics.gini(top, dataset.num_items) for top in tops],
            "popularity_percentile": [statistics.popularity_percentile(top, counts).mean() for top in tops],
        }
        means = {name: float(np.mean(values)) for name, values in rows.items()}
        found.append(Result("beyond_accuracy", means, {"model": model.name, "k": TOP_K}, {}))
    return found


def everything(
    models: Sequence[Model],
    dataset: Dataset,
    evaluation: Evaluation,
    reference: str,
    samples: int,
    left_out: Mapping[str, Sequence[int]] | None = None,
) -> list[Result]:
    """Return all results of models that were assessed on one test split; `left_out` as in `comparisons`."""
    return [
        *headline(models, samples),
        *comparisons(models, reference, left_out),
        *protocol_results(models, samples),
        *shuffle_control(models, samples),
        *groups(models, dataset, evaluation, samples),
        *beyond_accuracy(models, dataset),
    ]


def flat(intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Return means and ends of intervals as `<name>`, `<name>_low`, `<name>_high`."""
    found: dict[str, float] = {}
    for name, interval in intervals.items():
        found |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return found


# ------------------------------------------------------------------------------------------------
# What a training run is, by counting: parameters, by kind, and floating-point operations.
#
# Item tables grow with the catalogue and hold most parameters of such a model, so a size is told by what is
# left without them ("non-embedding"). FLOPs are counted from the batches that are trained on, head apart,
# since the head's products grow with the catalogue as well.


def epoch_flops(model: ModelConfig, train: TrainConfig, histories: Histories) -> Flops:
    """Return the FLOPs that the first pass over the users needs: real items and targets, no padding."""
    epoch = Epoch(histories, model, train, 0)
    return work.total([work.needed(model, b) for i in range(epoch.num_steps) for b in epoch.step(i)])


def counted(trainer: Trainer) -> dict[str, float]:
    """Return a run's parameters by kind, the tokens it saw, and its training FLOPs with the head's share.

    FLOPs are those of one epoch times the epochs done: windows and masks are drawn anew in each, which moves
    the count by less than its third digit.
    """
    model, train = trainer.model.config, trainer.config
    parameters = count_parameters(model)
    one = epoch_flops(model, train, trainer.histories)
    epochs = trainer.progress.step / trainer.steps_per_epoch
    return {
        "item_tables": parameters["item_tables"],
        "non_embedding": parameters["non_embedding"],
        "trained_tokens": trainer.progress.tokens,
        "training_flops": one.total * epochs,
        "head_share": one.head / one.total,
    }


def closed_flops(model: ModelConfig, tokens: int, targets: int, squares: int, target_keys: int) -> int:
    """Return the same count by the closed formula of a transformer, forward and backward.

    6 FLOPs for each weight of a linear map and each token that passes it (2 forward, 4 backward), attention
    apart. `squares` is the sum of squared lengths, `target_keys` of the lengths of the targets' histories. In
    the last layer only targets ask; its keys and values are of all tokens.
    """
    D, f = model.hidden_dim, model.ffn_factor
    layer = 6 * (4 + 2 * f) * D * D * tokens + 12 * squares * D
    last = 6 * D * D * (2 * tokens + (2 + 2 * f) * targets) + 12 * target_keys * D
    transform = D * D if model.head == "mlp" else 0
    return (model.num_layers - 1) * layer + last + 6 * targets * (D * model.num_items + transform)
