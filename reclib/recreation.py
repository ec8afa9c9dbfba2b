"""The seed study's loss and its metric on real data, beside the ones that answer the question.

Two trainings of one model on the same histories, in the same order, with the same masks: one minimises focal
cross-entropy over every position that is not padding (`seed_focal`), the other cross-entropy at the masked
positions (`cloze`). Epochs of both are chosen by the next item on validation, which is kind to the first: its
study chose by its own metric. Both are then scored both ways, under that study's split of users.

What deviates from the original: masks are drawn as ours are (in a share of the samples the last item alone,
instead of the last item in all), and the model is a small one of ours.

Shapes: R rows, L positions, V rows of the output table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reclib import metrics, protocols
from reclib.assessment import COMPARED, flat
from reclib.batching import IGNORE, Batch, Epoch
from reclib.config import PAD, ModelConfig, TrainConfig, changed, model_config, validated
from reclib.data import Dataset, Evaluation, Histories
from reclib.experiment import run_folder
from reclib.fit import data_identity, fit
from reclib.hardware import Device
from reclib.ladder import SEED_TRAIN
from reclib.model import Bert4Rec
from reclib.notebook_params import Audit
from reclib.protocols import Outcome
from reclib.splits import Split, random_users
from reclib.trainer import Trainer

OBJECTIVES = ("seed_focal", "cloze")
SHARES = (
    0.6,
    0.1,
    0.3,
)  # of the users that train, validate and test; the study's 0.8, 0.1, 0.1 leaves few here
FRESH = 1_000_000  # number of an epoch that no training reaches: its masks are drawn for looking only


def configurations(p: Audit, dataset: Dataset, objective: str, seed: int) -> tuple[ModelConfig, TrainConfig]:
    """Return the model and the training of an objective; nothing else differs between the two."""
    model = model_config(
        p.size, num_items=dataset.num_items, max_len=p.max_len, dropout=p.dropout, tied=False
    )
    names = ("epochs", "batch_size", "learning_rate", "mask_prob", "last_item_share", "eval_every")
    train = validated(TrainConfig, {name: getattr(p, name) for name in names} | {"seed": seed})
    if objective == "seed_focal":
        theirs = {name: SEED_TRAIN[name] for name in ("objective", "layout", "head_rows", "loss")}
        train = changed(train, **theirs)
    return model, train


def divided(dataset: Dataset, seed: int) -> Split:
    """Divide users at random as that study does: whole histories train, others' last items are targets."""
    return random_users(dataset, SHARES, seed)


def train(
    notebook: str, p: Audit, dataset: Dataset, split: Split, device: Device, objective: str, seed: int
) -> Trainer:
    """Train one objective with one seed, or go on with a run of the same code and data."""
    model, config = configurations(p, dataset, objective, seed)
    folder = run_folder(notebook, model, config, data_identity(dataset, split))
    return fit(model, dataset, config, device, folder, split=split)


def untrained(trainer: Trainer, seed: int) -> Bert4Rec:
    """Return the model that the trainer's run began with."""
    torch.manual_seed(seed)
    return Bert4Rec(trainer.model.config).to(trainer.where)


class LossParts(NamedTuple):
    """What the focal loss over all positions consists of."""

    visible_share: float  # of the positions, those whose item the model is shown
    visible_loss_share: float  # of the loss, what comes from them
    visible_hit: float  # of them, those where the shown item has the highest score: copying
    masked_hit: float  # of the masked positions, those where the hidden item has the highest score


@torch.no_grad()
def loss_parts(model: Bert4Rec, histories: Histories, config: TrainConfig, device: Device) -> LossParts:
    """Divide the focal loss of a model over `histories` into visible and masked positions."""
    was_training = model.training
    model.eval()
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in ("visible", "masked")}
    for batch in _batches(histories, model.config, config):
        moved = batch.to(device.torch_device)
        labels = true_items(moved)  # (R, L)
        logits = model.logits(model.encode(moved.items, moved.segment_ids, moved.positions))
        real = (labels != PAD).flatten()
        label, score = labels.flatten()[real], logits.flatten(0, 1)[real].float()
        entropy = F.cross_entropy(score, label, reduction="none")
        loss = (1 - torch.exp(-entropy)) * entropy  # as in `objective.focal_mean`
        hit = score.argmax(-1) == label
        shown = moved.items.flatten()[real] == label
        for name, chosen in (("visible", shown), ("masked", ~shown)):
            found = (chosen.sum(), loss[chosen].sum(), hit[chosen].sum())
            sums[name] += torch.stack([part.double().cpu() for part in found])
    model.train(was_training)
    (seen, seen_loss, copied), (hidden, hidden_loss, right) = (s.tolist() for s in sums.values())
    return LossParts(
        seen / (seen + hidden), seen_loss / (seen_loss + hidden_loss), copied / seen, right / hidden
    )


def true_items(batch: Batch) -> Tensor:
    """Return the item at every position (R, L), the hidden ones put back; PAD where there is none."""
    labels = batch.items.flatten().clone()
    real = batch.targets != IGNORE
    labels[batch.target_places[real]] = batch.targets[real].to(labels.dtype)
    return labels.view_as(batch.items)


def _batches(histories: Histories, model: ModelConfig, config: TrainConfig) -> Iterator[Batch]:
    plan = Epoch(histories, model, config, FRESH)
    for step in range(plan.num_steps):
        yield from plan.step(step)


def outcomes(trainer: Trainer, split: Split, mask_prob: float) -> list[Outcome]:
    """Rank a model's test targets in four ways, from the seed study's to the next item among unseen ones."""
    model, test, where = trainer.model, split.test, trainer.where

    def scores(part: Evaluation) -> metrics.Scores:
        return metrics.model_scores(model, part, where)

    with trainer.autocast():
        found = [
            protocols.masked_positions(model, test, where, mask_prob),
            protocols.masked_positions(model, test, where, mask_prob, special_tokens=False),
        ]
        for remove_seen in (False, True):
            found.append(protocols.under_split(scores, split, remove_seen))
    names = (
        "seed study's: all masked positions",
        "the same, real items only",
        "next item, seen kept",
        "next item, seen removed",
    )
    return [one._replace(protocol=name) for one, name in zip(found, names, strict=True)]


def redrawn(trainer: Trainer, split: Split, mask_prob: float, draws: int) -> list[float]:
    """Return HR@10 by the seed study's metric of one model, with the masks drawn anew each time."""
    with trainer.autocast():
        found = [
            protocols.masked_positions(trainer.model, split.test, trainer.where, mask_prob, seed=draw)
            for draw in range(draws)
        ]
    return [protocols.mean(one) for one in found]


def numbers(outcome: Outcome, samples: int) -> dict[str, Any]:
    """Return an outcome's metrics with intervals over users, and how many predictions a user stands for."""
    intervals = flat({name: protocols.interval(outcome, name, samples) for name in COMPARED})
    return intervals | {"per_user": len(outcome.ranks) / len(set(outcome.users.tolist()))}
