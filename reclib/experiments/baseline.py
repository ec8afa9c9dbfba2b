"""Training runs of notebooks and grids, and results of models on the test split.

`assess` ranks the test targets once under every protocol; the functions below it turn the ranks of several
models into results. A model has several seeds or is deterministic; its users' metrics are averaged over the
seeds first.

Shapes: S seeds, U users, k recommendations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from reclib import records, system
from reclib.config import ModelConfig, TrainConfig, as_dict, model_config, validated
from reclib.cost import work
from reclib.data.batches import Epoch
from reclib.data.dataset import Dataset, Evaluation, train_histories
from reclib.data.splits import SPLITS, Split, sample_candidates
from reclib.evaluate import baselines, metrics, statistics
from reclib.evaluate.metrics import Outcome, Scorer
from reclib.evaluate.statistics import Interval
from reclib.experiments.notebook import Result, Study
from reclib.hardware import Device
from reclib.model.bert4rec import count_parameters
from reclib.train import distributed, fit
from reclib.train.fit import SELECT, Curves, Options, Setup, data_identity
from reclib.train.trainer import Trainer

OBJECTIVES = {"bert4rec": "cloze", "causal": "next_item"}  # the models of notebook 02
TOP_K = 10
NEGATIVES = 100  # of the protocols that rank among samples
MAIN = "leave-one-out, seen removed"  # the protocol of every table unless it says otherwise
KEPT = "leave-one-out, seen kept"
HEADLINE = ("hr@10", "ndcg@10", "mrr")
COMPARED = ("hr@10", "ndcg@10")

# ------------------------------------------------------------------------------------------------
# Training runs: from the parameters of a notebook to a trained model.


@dataclass
class Trained:
    """One seed's run: its trainer, with the weights that were best on validation."""

    seed: int
    trainer: Trainer

    def curve(self) -> dict[str, list[float]]:
        """Return the columns of the learning curve, one value per evaluation."""
        rows = self.trainer.progress.history
        names = ("epoch", "train_loss", "tokens", "valid_loss")
        curve = {name: [row[name] for row in rows] for name in names}
        return curve | {f"valid_{SELECT}": [row[SELECT] for row in rows]}

    def best(self) -> dict[str, float]:
        """Return the validation metrics of the chosen epoch."""
        row = max(self.trainer.progress.history, key=lambda row: row[SELECT])
        return {f"valid_{name}": row[name] for name in COMPARED} | {"epoch": row["epoch"]}

    def losses(self) -> dict[str, float]:
        """Return the lowest and the last loss on validation, in nats.

        The law of size is fitted to the lowest. `late_drop` is how much it fell in the last fifth of the
        training: a run with a large one is undertrained.
        """
        values = self.curve()["valid_loss"]
        before, lowest = min(values[: max(1, len(values) * 4 // 5)]), min(values)
        return {"lowest_valid_loss": lowest, "last_valid_loss": values[-1], "late_drop": before - lowest}

    def counted(self) -> dict[str, float]:
        """Return the run's parameters by kind, its training tokens and FLOPs, and the head's share of FLOPs.

        FLOPs are those of the first epoch (real items and targets, no padding) times the number of epochs.
        Windows and masks differ between epochs; that changes the count by less than its third digit.
        """
        trainer, progress = self.trainer, self.trainer.progress
        model = trainer.model.config
        parameters, epoch = count_parameters(model), Epoch(trainer.histories, model, trainer.config, 0)
        flops = work.total([work.needed(model, b) for i in range(epoch.num_steps) for b in epoch.step(i)])
        numbers: dict[str, float] = {name: parameters[name] for name in ("item_tables", "non_embedding")}
        numbers["trained_tokens"] = progress.tokens
        numbers["training_flops"] = flops.total * progress.step / trainer.steps_per_epoch
        return numbers | {"head_share": flops.head / flops.total}

    def timings(self) -> dict[str, float]:
        """Return the run's seconds of training and evaluation, and its tokens per second."""
        progress = self.trainer.progress
        return {
            "train_seconds": progress.train_seconds,
            "eval_seconds": sum(row["eval_seconds"] for row in progress.history),
            "tokens_per_second": progress.tokens / progress.train_seconds,
        }

    def together(self) -> dict[str, Any]:
        """Return the number of processes that trained it and their backend; empty for one process."""
        progress = self.trainer.progress
        if progress.processes == 1:
            return {}
        return {"processes": progress.processes, "backend": progress.backend}

    def result(self, model: str) -> Result:
        """Return the run as a result: accuracy, losses, counts, and its curve."""
        numbers = self.best() | self.losses() | self.counted()
        params = {"model": model} | self.together()
        return Result("learning_curve", numbers, params, self.curve(), self.seed, self.timings())


def model_of(p: Any, dataset: Dataset, objective: str = "cloze") -> ModelConfig:
    """Return the model configuration of a notebook's parameters, on the dataset's catalogue."""
    fields_of_p, causal = _shared(ModelConfig, p), objective == "next_item"
    return model_config(p.size, **fields_of_p, num_items=dataset.num_items, causal=causal)


def train_of(p: Any, seed: int, objective: str = "cloze", **changes: Any) -> TrainConfig:
    """Return one seed's training configuration; `changes` replace fields of the parameters."""
    values = _shared(TrainConfig, p) | {"seed": seed, "objective": objective} | changes
    device = {"precision": p.precision or "auto", "compile_mode": p.compile_mode or "off"}
    return validated(TrainConfig, values | device)


def _shared(kind: type, p: Any) -> dict[str, Any]:
    """Return the parameters that are fields of a configuration."""
    return {item.name: getattr(p, item.name) for item in fields(kind) if hasattr(p, item.name)}


def run_folder(notebook: str, model: ModelConfig, train: TrainConfig, data: str, nproc: int = 1) -> Path:
    """Return the folder of a run's checkpoints, named by its configuration, data, code and `nproc`."""
    parts: list[Any] = [as_dict(model), as_dict(train), data, records.code_hash(notebook)]
    parts += [nproc] if nproc > 1 else []
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return system.runs() / notebook / key


def train_seed(
    notebook: str, p: Any, dataset: Dataset, split: Split, device: Device, name: str, seed: int
) -> Trained:
    """Train one seed of a model of `OBJECTIVES`, or resume a run of the same code and data."""
    objective = OBJECTIVES[name]
    model, train = model_of(p, dataset, objective), train_of(p, seed, objective)
    title = f"{notebook}-{device.label}-{name}-{split.name.split()[0]}-seed{seed}"
    return train_model(notebook, p, dataset, split, device, model, train, title)


def train_models(study: Study, split: Split) -> dict[str, list[Trained]]:
    """Train every seed of notebook 02's models and record their learning curves; return the runs by model."""
    p, data, device = study.p, study.dataset, study.device
    trained = {
        name: [train_seed(study.notebook, p, data, split, device, name, seed) for seed in p.seeds]
        for name in p.models
    }
    study.record(*(run.result(name) for name, runs in trained.items() for run in runs))
    for name, runs in trained.items():
        print(f"{name}: first training loss {runs[0].curve()['train_loss'][0]:.3f} nats")
    return trained


def train_model(
    notebook: str,
    p: Any,
    dataset: Dataset,
    split: Split,
    device: Device,
    model: ModelConfig,
    train: TrainConfig,
    title: str,
) -> Trained:
    """Train a model with a notebook's parameters, in this process or in `nproc` separate processes.

    Separate processes leave a finished run in the folder of checkpoints, which is loaded here. Raises
    `InputError` with their error if they failed. `title` is the run's name for a tracker.
    """
    data = data_identity(dataset, split)
    folder = run_folder(notebook, model, train, data, p.nproc)
    if p.nproc > 1:
        if not fit.is_finished(folder):
            setup = Setup(p.data_config(), train, None, as_dict(model), split.name, data, notebook, title)
            system.write_json(folder / "run.json", asdict(setup))
            words = ["--run", str(folder / "run.json"), "--out", str(folder)]
            distributed.apart([*words, "--gpu", p.gpu, "--tracker", p.tracker], p.nproc)
        return Trained(train.seed, fit.fit(model, dataset, train, device, folder, split=split))
    settings = {"model": as_dict(model), "train": asdict(train), "data": data}
    with fit.start_tracker(p.tracker, notebook, title, settings) as track:
        curves = Curves(track, device)
        options = Options(on_step=curves.step, on_evaluation=curves.evaluation)
        return Trained(train.seed, fit.fit(model, dataset, train, device, folder, options, split))


# ------------------------------------------------------------------------------------------------
# One look at the test split.


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
    """A test split with negatives and shuffled histories, drawn once for all models."""

    evaluation: Evaluation
    candidates: dict[str, np.ndarray]
    shuffled: Evaluation
    shuffled_but_last: Evaluation


def draw(dataset: Dataset, evaluation: Evaluation, seed: int = 0) -> Conditions:
    """Draw negatives and random orders for an evaluation of the dataset."""
    count = min(NEGATIVES, dataset.num_items - int(dataset.lengths.max()))
    candidates: dict[str, np.ndarray] = {}
    if count > TOP_K:  # a catalogue that a user has nearly all of leaves nothing to draw from
        candidates["uniform"] = sample_candidates(dataset, evaluation, count, "uniform", seed)
        candidates["popularity"] = sample_candidates(dataset, evaluation, count, "popularity", seed)
    orders = [statistics.shuffled(evaluation, seed, keep) for keep in (0, 1)]
    return Conditions(evaluation, candidates, *orders)


def assess(score: Scorer, test: Conditions) -> Assessed:
    """Rank the test targets by a scorer under every protocol and control."""
    outcomes, top = metrics.side_by_side(score, test.evaluation, test.candidates, TOP_K)
    assert top is not None
    orders = (test.shuffled, test.shuffled_but_last)
    shuffled, but_last = (metrics.rank(score(order), order, remove_seen=True).ranks for order in orders)
    return Assessed({outcome.protocol: outcome for outcome in outcomes}, shuffled, but_last, top)


def assess_trained(trainer: Trainer, test: Conditions) -> Assessed:
    """Rank the test targets by a trained model, in its precision."""
    with trainer.autocast():
        return assess(lambda part: metrics.model_scores(trainer.model, part, trainer.where), test)


def assess_baselines(
    split: Split, dataset: Dataset, test: Conditions, names: Sequence[str] = ()
) -> tuple[list[Model], dict[str, Any]]:
    """Fit baselines with hyperparameters chosen on validation; return their assessments and the choices.

    `names` selects baselines; by default all are fitted.
    """
    models, chosen = [], {}
    families = baselines.families(dataset.times)
    for name, family in ((name, families[name]) for name in names or families):
        if name == "ease" and baselines.ease_bytes(dataset.num_items) > baselines.EASE_BYTES:
            print(f"EASE is left out: {dataset.num_items:,} items are too many for its memory")
            continue
        choice = baselines.choose(family, split.train, dataset.num_items, split.valid)
        models.append(Model(name, [assess(choice.recommender.scores, test)]))
        chosen[name] = choice.chosen
        if family.refitted:  # the same hyperparameters, and every item before the test target
            again = family.fit(split.before_test(), dataset.num_items, **choice.chosen)
            models.append(Model(f"{name}_with_validation", [assess(again.scores, test)]))
    return models, chosen


def under_other_splits(study: Study) -> list[Result]:
    """Train notebook 02's first model under each of `other_splits`, and return its results."""
    p, data, model, results = study.p, study.dataset, study.p.models[0], []
    for split in (SPLITS[name](data) for name in p.other_splits):
        for seed in p.seeds:
            run = train_seed(study.notebook, p, data, split, study.device, model, seed)
            results += other_split(run.trainer, split, p.bootstrap_samples, model, seed)
    return results


def other_split(
    trainer: Trainer, split: Split, samples: int, model: str, seed: int | None = None
) -> list[Result]:
    """Return HR@10 and NDCG@10 of a model trained under another split than leave-one-out.

    If users were divided at random, a masked model is also evaluated by the seed study's metric.
    """
    with trainer.autocast():
        network, device = trainer.model, trainer.where
        outcomes = [metrics.under_split(lambda part: metrics.model_scores(network, part, device), split)]
        if split.about.get("shares") and not trainer.model.config.causal:
            outcomes.append(metrics.masked_positions(trainer.model, split.test, trainer.where))
    return [_protocol(model, [outcome], samples, seed) for outcome in outcomes]


# ------------------------------------------------------------------------------------------------
# Results of models that were assessed on one test split.


def everything(
    models: Sequence[Model],
    dataset: Dataset,
    evaluation: Evaluation,
    reference: str,
    samples: int,
    left_out: Mapping[str, Sequence[int]] | None = None,
) -> list[Result]:
    """Return all results; `samples` is the number of bootstrap resamples, `left_out` as in `comparisons`."""
    results = headline(models, samples) + comparisons(models, reference, left_out)
    if dataset.times is not None:
        # Only the file may decide the order of targets at one time: the others are compared apart.
        later = np.flatnonzero(statistics.by_time_before(evaluation.histories, dataset.times).member)
        if len(later) > 1:
            results += comparisons(models, reference, left_out, later, "later")
    for model in models:
        for name in model.runs[0].outcomes:
            results.append(_protocol(model.name, [run.outcomes[name] for run in model.runs], samples))
    results += [_shuffle_control(model, samples) for model in models]
    results += [result for model in models for result in _groups(model, dataset, evaluation, samples)]
    return results + [_beyond_accuracy(model, dataset) for model in models]


def headline(models: Sequence[Model], samples: int) -> list[Result]:
    """Return every model's mean metrics with intervals over users, and the means of each seed."""
    results = []
    for model in models:
        values = {name: model.per_seed(name) for name in HEADLINE}
        intervals = {name: statistics.bootstrap(rows.mean(axis=0), samples) for name, rows in values.items()}
        results.append(Result("test_metrics", flat(intervals), {"model": model.name}))
        for place, seed in enumerate(model.seeds):
            means = {name: float(rows[place].mean()) for name, rows in values.items()}
            results.append(Result("test_metrics", means, {"model": model.name}, seed=seed))
    return results


def comparisons(
    models: Sequence[Model],
    reference: str,
    left_out: Mapping[str, Sequence[int]] | None = None,
    users: np.ndarray | None = None,
    group: str | None = None,
) -> list[Result]:
    """Compare every model with the reference, paired by user and corrected for the number of comparisons.

    Models that count the validation items are also compared with the reference that does, if there is one.
    `left_out` maps models to seeds that chose their recipe; these are left out. `users` (places of the
    evaluation) restricts the comparison to a `group`, whose results are named `group_comparison`.
    """
    name, about = ("comparison", {}) if group is None else ("group_comparison", {"group": group})
    deterministic = [model.name for model in models if not model.seeds]
    results = []
    for metric in COMPARED:
        values = {}
        for model in models:
            out = (left_out or {}).get(model.name, ())
            rows = [place for place, seed in enumerate(model.seeds or [-1]) if seed not in out]
            if rows:
                values[model.name] = model.per_seed(metric)[rows]
                if users is not None:
                    values[model.name] = values[model.name][:, users]
        renewed = {model: rows for model, rows in values.items() if model.endswith("_with_validation")}
        for against, compared_values in ((reference, values), (f"{reference}_with_validation", renewed)):
            if against in compared_values and len(compared_values) > 1:
                fixed = [model for model in deterministic if model in compared_values]
                pairs = statistics.compare(compared_values, against, fixed)
                for result in (compared(comparison, metric, name) for comparison in pairs):
                    results.append(result._replace(params=result.params | about))
    return results


def compared(comparison: statistics.Comparison, metric: str, name: str = "comparison") -> Result:
    """Return one comparison as a result."""
    numbers = flat({"difference": comparison.difference}) | {
        "p": comparison.p_value,
        "adjusted_p": comparison.adjusted_p,
        "detectable": comparison.detectable,
        "seeds": comparison.seeds[0],
        "reference_seeds": comparison.seeds[1],
        "degrees_of_freedom": comparison.degrees,
    }
    params = {"model": comparison.name, "against": comparison.reference, "metric": metric}
    return Result(name, numbers, params)


def _protocol(model: str, runs: Sequence[Outcome], samples: int, seed: int | None = None) -> Result:
    """Return HR@10 and NDCG@10 under one protocol: means over seeds, with intervals over users.

    Masked positions are the same for every seed, so their values are averaged over seeds as well.
    """
    first = runs[0]
    values = [metrics.per_user(run.ranks) for run in runs]
    means = {metric: np.mean([of_run[metric] for of_run in values], axis=0) for metric in COMPARED}
    numbers = flat({m: statistics.bootstrap(means[m], samples, users=first.users) for m in COMPARED})
    params = {"protocol": first.protocol, "label": first.label, "comparable": first.comparable}
    return Result("protocol", numbers, {"model": model} | params, seed=seed)


def _shuffle_control(model: Model, samples: int) -> Result:
    """Return NDCG@10 with histories in true and in random order, and the paired changes with intervals."""
    true = model.per_user("ndcg@10")
    numbers = {"ndcg@10": float(true.mean())}
    for name in ("shuffled", "shuffled_but_last"):
        values = np.mean([metrics.ndcg(getattr(run, name), 10) for run in model.runs], axis=0)
        change = statistics.bootstrap(values - true, samples)
        numbers |= {name: float(values.mean())} | flat({f"{name}_change": change})
    return Result("shuffle_control", numbers, {"model": model.name})


def _groups(model: Model, dataset: Dataset, evaluation: Evaluation, samples: int) -> Iterator[Result]:
    """Yield HR@10 and NDCG@10 of users by history length, and by popularity, time and source of the target.

    The groups by time need a dataset with times. A target with the timestamp of the item before it is often
    part of the same order, and only the file may decide which comes first.
    """
    counts = metrics.popularity(train_histories(dataset), dataset.num_items)
    divisions = {
        "history": statistics.by_history_length(evaluation.histories),
        "popularity": statistics.by_item_popularity(evaluation.targets, counts),
    }
    if dataset.times is not None:
        divisions["time"] = statistics.by_time_before(evaluation.histories, dataset.times)
    if (sources := statistics.by_source(dataset.item_keys[evaluation.targets])) is not None:
        divisions["source"] = sources
    for by, division in divisions.items():
        series: dict[str, list[Any]] = {}
        for metric in COMPARED:
            parts = statistics.in_groups(model.per_user(metric), division, samples)
            intervals = [(part, flat({metric: part.interval})) for part in parts if part.interval]
            series["group"] = [part.label for part, _ in intervals]
            series["users"] = [part.users for part, _ in intervals]
            for name in (metric, f"{metric}_low", f"{metric}_high"):
                series[name] = [numbers[name] for _, numbers in intervals]
        yield Result("groups", {"groups": len(series["group"])}, {"model": model.name, "by": by}, series)


def _beyond_accuracy(model: Model, dataset: Dataset) -> Result:
    """Return coverage of the catalogue, Gini coefficient and popularity of the recommended items."""
    counts = metrics.popularity(train_histories(dataset), dataset.num_items)
    tops = [run.top for run in model.runs]
    seeds = [statistics.concentration(top, counts) for top in tops]
    means = {name: float(np.mean([values[name] for values in seeds])) for name in seeds[0]}
    percentiles = [statistics.popularity_percentile(top, counts).mean() for top in tops]
    means["popularity_percentile"] = float(np.mean(percentiles))
    return Result("beyond_accuracy", means, {"model": model.name, "k": TOP_K})


def recommended(
    models: Sequence[Model], dataset: Dataset, test: Evaluation, names: Sequence[str]
) -> pd.DataFrame:
    """Tabulate what these models recommend to the first user; print the history's end and the target."""
    end = test.histories.items[test.histories.starts[0] : test.histories.ends[0]][-5:]
    print("history ends with:", *map(dataset.title, end), sep="\n  ")
    print("what came next:", dataset.title(test.targets[0]), sep="\n  ")
    tops = {model.name: [*map(dataset.title, model.runs[0].top[0])] for model in models}
    table = pd.DataFrame(tops, index=pd.RangeIndex(1, TOP_K + 1, name="rank"))
    return table[[name for name in names if name in tops]]


def flat(intervals: Mapping[str, Interval]) -> dict[str, float]:
    """Return means and ends of intervals as `<name>`, `<name>_low`, `<name>_high`."""
    numbers: dict[str, float] = {}
    for name, (mean, low, high) in intervals.items():
        numbers |= {name: float(mean), f"{name}_low": float(low), f"{name}_high": float(high)}
    return numbers
