"""From a notebook's parameters to trained models and test scores: the training runs of one notebook.

Models are compared user by user: each user's metric is averaged over the seeds, differences are bootstrapped
over users, and the range over seeds is shown apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reclib import metrics, paths, provenance, tracker
from reclib.config import ModelConfig, TrainConfig, model_config, validated
from reclib.data import Dataset, evaluation, train_histories
from reclib.fit import SELECT, Options, fit, rank_targets
from reclib.hardware import Device
from reclib.metrics import Interval, Ranking
from reclib.params import Baseline
from reclib.trainer import Trainer

TOP_K = 10


@dataclass
class Trained:
    """One seed's run: its trainer, with the weights that were best on validation."""

    seed: int
    trainer: Trainer

    def curve(self) -> dict[str, list[float]]:
        """Return the columns of the learning curve, one value per evaluation."""
        rows = self.trainer.progress.history
        names = {"epoch": "epoch", "train_loss": "train_loss", f"valid_{SELECT}": SELECT, "tokens": "tokens"}
        return {name: [row[key] for row in rows] for name, key in names.items()}

    def best(self) -> dict[str, float]:
        """Return validation at the chosen epoch."""
        row = max(self.trainer.progress.history, key=lambda row: row[SELECT])
        return {f"valid_{name}": row[name] for name in ("hr@10", "ndcg@10")} | {"epoch": row["epoch"]}

    def timings(self) -> dict[str, float]:
        """Return what the run took."""
        progress = self.trainer.progress
        return {
            "train_seconds": progress.train_seconds,
            "eval_seconds": sum(row["eval_seconds"] for row in progress.history),
            "tokens_per_second": progress.tokens / progress.train_seconds,
        }


def model_of(p: Baseline, dataset: Dataset) -> ModelConfig:
    """Return the model that the parameters ask for, on the dataset's catalogue."""
    given = {"num_items": dataset.num_items, "dropout": p.dropout, "max_len": p.max_len}
    return model_config(p.size, **given)


def train_of(p: Baseline, seed: int) -> TrainConfig:
    """Return one seed's training configuration."""
    shared = (
        "epochs", "batch_size", "micro_batch_size", "learning_rate", "mask_prob", "last_item_share",
        "eval_every", "patience",
    )  # fmt: skip
    given: dict[str, Any] = {name: getattr(p, name) for name in shared} | {"seed": seed}
    given |= {"precision": p.precision or "auto", "compile_mode": p.compile_mode or "off"}
    return validated(TrainConfig, given)


def run_folder(notebook: str, model: ModelConfig, train: TrainConfig, fingerprint: str) -> Path:
    """Return the folder of a run's checkpoints; another configuration, dataset or code has another."""
    parts = [asdict(model), asdict(train), fingerprint, provenance.code_hash(notebook)]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return paths.runs() / notebook / key


def train_seed(notebook: str, p: Baseline, dataset: Dataset, device: Device, seed: int) -> Trained:
    """Train one seed, or go on with a run of the same code, configuration and data that was killed."""
    model, train = model_of(p, dataset), train_of(p, seed)
    folder = run_folder(notebook, model, train, dataset.fingerprint)
    about = {"model": asdict(model), "train": asdict(train), "data": dataset.fingerprint}
    with tracker.start(p.wandb_mode, notebook, f"{notebook}-{device.label}-seed{seed}", about) as track:
        options = Options(
            remove_seen=p.remove_seen,
            on_evaluation=lambda row: track.log(row, int(row["step"])),
        )
        return Trained(seed, fit(model, dataset, train, device, folder, options))


def score_test(trained: Sequence[Trained], dataset: Dataset, remove_seen: bool) -> list[Ranking]:
    """Rank the test targets, once for each seed; weights are not fitted again with the validation item."""
    part = evaluation(dataset, "test")
    return [rank_targets(one.trainer, part, remove_seen, TOP_K) for one in trained]


def score_popularity(dataset: Dataset, remove_seen: bool) -> Ranking:
    """Rank the test targets by how often items occur in the training histories."""
    part = evaluation(dataset, "test")
    counts = metrics.popularity(train_histories(dataset), dataset.num_items)
    return metrics.rank(metrics.constant_scores(counts, part), part, remove_seen, TOP_K)


def over_seeds(rankings: Sequence[Ranking]) -> dict[str, np.ndarray]:
    """Return every metric's value per user (U,), averaged over the seeds."""
    values = [metrics.per_user(ranking.ranks) for ranking in rankings]
    return {name: np.mean([one[name] for one in values], axis=0) for name in values[0]}


def with_intervals(
    values: dict[str, np.ndarray], samples: int, names: Sequence[str] = ("hr@10", "ndcg@10", "mrr")
) -> dict[str, float]:
    """Return each metric's mean and the ends of its 95 % interval over users, as `<name>_low`, `_high`."""
    found: dict[str, float] = {}
    for name in names:
        interval = metrics.bootstrap(values[name], samples)
        found |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return found


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray], name: str, samples: int) -> Interval:
    """Return the paired difference of a metric, one minus other, with its 95 % interval over users."""
    return metrics.bootstrap(one[name] - other[name], samples)


def seed_range(rankings: Sequence[Ranking], name: str) -> tuple[float, float]:
    """Return the lowest and highest mean of a metric over the seeds."""
    means = [metrics.summary(ranking.ranks)[name] for ranking in rankings]
    return min(means), max(means)
