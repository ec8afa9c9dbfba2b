"""What is said of adaptations: accuracy by arm, comparisons with their power, and what the gates look at.

The unit is the user: a metric is averaged over a user's targets, then over seeds. Comparisons are paired by
user and corrected for all arms of a task (Holm); each says the smallest difference that it could have seen.

Shapes: S seeds, U users, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from reclib import assessment, baselines, metrics, periods, statistics
from reclib.adaptation import Run, Task
from reclib.assessment import COMPARED, Result, flat
from reclib.batching import Layout, next_item_batches
from reclib.data import Dataset, Evaluation, Histories
from reclib.ilora import AdaptedModel
from reclib.periods import Periods
from reclib.trainer import Trainer


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
        found.setdefault(run.arm, []).append(periods.by_user(dataset, task.split.test, values))
    return {arm: np.stack(rows) for arm, rows in found.items()}


def accuracy(dataset: Dataset, task: Task, runs: Sequence[Run | Counted], samples: int) -> list[Result]:
    """Return every arm's means over users with intervals, each seed's apart, and new items' targets apart."""
    values = {metric: per_user(dataset, task, runs, metric) for metric in COMPARED}
    found = []
    base = next(_base_size(run.trainer) for run in runs if isinstance(run, Run))
    for arm in dict.fromkeys(run.arm for run in runs):
        mine = [run for run in runs if run.arm == arm]
        intervals = {name: metrics.bootstrap(values[name][arm].mean(axis=0), samples) for name in COMPARED}
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
            result = assessment.compared(one, metric, name)
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
    ranks = periods.popularity_ranks(whole.base.train, dataset.num_items)
    last = test.histories.items[test.histories.ends - 1]
    features = {
        "items in the history": test.histories.lengths.astype(np.float64),
        "mean popularity rank of the history": periods.mean_rank(test.histories, ranks),
        "popularity rank of the last item": ranks[last],
    }
    if beside is not None:
        gain = metrics.ndcg(run.ranks, 10) - metrics.ndcg(beside.ranks, 10)
        features[f"NDCG@10 minus that of {beside.arm}"] = gain
    weights = periods.by_user(dataset, test, expert_weights(run.trainer, test).T).T
    means = {name: periods.by_user(dataset, test, values) for name, values in features.items()}
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
