"""What a training run is, by counting: parameters, by kind, and floating-point operations.

Item tables grow with the catalogue and hold most parameters of such a model, so a size is told by what is
left without them ("non-embedding"). FLOPs are counted from the batches that are trained on, head apart, since
the head's products grow with the catalogue as well.
"""

from __future__ import annotations

from reclib import flops
from reclib.batching import Epoch
from reclib.config import ModelConfig, TrainConfig
from reclib.data import Histories
from reclib.flops import Flops
from reclib.model import count_parameters
from reclib.trainer import Trainer


def epoch_flops(model: ModelConfig, train: TrainConfig, histories: Histories) -> Flops:
    """Return the FLOPs that the first pass over the users needs: real items and targets, no padding."""
    epoch = Epoch(histories, model, train, 0)
    return flops.total([flops.needed(model, b) for i in range(epoch.num_steps) for b in epoch.step(i)])


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
