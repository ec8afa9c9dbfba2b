"""What a step minimises: cross-entropy over the catalogue at the target positions.

Four routes to the same number and the same gradients:

- `plain`: logits, then `F.cross_entropy`; the reference.
- `fused`: the same through `torch.compile`, so that a GPU passes over the logits a few times and not a dozen.
- `chunked`: logits for some targets at a time, for logits too large to hold; torch's own
  `F.linear_cross_entropy` does the same, from 2.13 on alone.
- `inplace`: one buffer of logits that becomes probabilities and then the gradient, a few rows at a time while
  they are in cache; the three matrix products stay whole. On a CPU it costs the products and little more,
  and a third of the memory of `plain`.

Two losses over sampled items stand beside them, for catalogues whose scores do not fit (see `sampled`).

Only real items compete: the rows of PAD and MASK get no probability and no gradient. The loss is in fp32
whatever the products' precision, and is a sum divided by the number of targets of the whole step.

`seed_focal` re-creates the step of the study that this one started from: focal cross-entropy (Lin et al.
2017, arXiv 1708.02002) with gamma 1 over every position that is not padding, the visible ones included.

Shapes: M targets, D hidden_dim, V rows of the output table, I real items.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reclib.batching import IGNORE, Batch
from reclib.config import PAD, TrainConfig
from reclib.cross_entropy import (
    FULL,
    ChunkedCrossEntropy,
    InplaceCrossEntropy,
    PartlyFrozenProduct,
    frozen_columns,
)
from reclib.footprint import LARGE_LOGITS_BYTES, logits_limit
from reclib.model import Bert4Rec
from reclib.sampled import sampled_sum

Route = Literal["plain", "fused", "chunked", "inplace"]


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the type that matrix products run in: that of autocast where it is on, else the tensor's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def route(
    loss: str, device_type: str, num_targets: int, num_items: int, memory_bytes: int | None = None
) -> Route:
    """Choose the route for `loss` = auto | plain | fused | chunked | inplace.

    On CUDA auto goes by the logits of `num_targets` and the device's `memory_bytes`. A run asks once, with
    its largest batch: steps of one run that took different routes could not be compared.
    """
    if loss == "auto":
        if device_type == "cpu":
            return "inplace"
        return "chunked" if 4 * num_targets * num_items > logits_limit(memory_bytes) else "plain"
    return loss  # type: ignore[return-value]  # validated by TrainConfig


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, num_items: int, how: Route
) -> Tensor:
    """Return the sum over targets of the cross-entropy over items 1..num_items.

    `hidden` (M, D), `weight` (V, D), `bias` (V,) or None, `targets` (M,) item ids or IGNORE. The products run
    in autocast's type where that is on: both sides are cast here, since a product with `out=` is outside
    autocast and would run in fp32 in silence. The softmax and the loss are in fp32.
    """
    if how == "fused" and not frozen_columns(weight):
        for tensor in (hidden, targets):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # M alone: the catalogue stays a constant
        return _compiled_sum()(hidden, weight, bias, targets, num_items)
    if how in ("plain", "fused"):
        return _plain_sum(hidden, weight, bias, targets, num_items)
    dtype = compute_dtype(hidden)
    frozen = frozen_columns(weight)  # asked before a cast, which makes another tensor
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if how == "inplace":
        return InplaceCrossEntropy.apply(hidden, weight, bias, targets, num_items, frozen)
    chunk = min(max(16, LARGE_LOGITS_BYTES // (8 * num_items)), len(targets))
    return ChunkedCrossEntropy.apply(hidden, weight, bias, targets, num_items, frozen, chunk)


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, num_items: int) -> Tensor:
    """Return the scores (M, I) of all real items, in fp32 at least."""
    dtype = compute_dtype(hidden)
    shift = None if bias is None else bias[1 : num_items + 1].to(dtype)
    if frozen := frozen_columns(weight):
        logits = PartlyFrozenProduct.apply(hidden.to(dtype), weight.to(dtype), shift, num_items, frozen)
    else:
        logits = F.linear(hidden.to(dtype), weight[1 : num_items + 1].to(dtype), shift)
    return logits if dtype in FULL else logits.float()


def _plain_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, num_items: int
) -> Tensor:
    return _sum_over_targets(plain_logits(hidden, weight, bias, num_items), targets)


@functools.cache
def _compiled_sum() -> Any:
    """Return `_plain_sum` compiled, made when first asked for: the compiler takes a second to import."""
    return torch.compile(_plain_sum)


def filled_up(
    weight: Tensor, bias: Tensor | None, num_items: int, multiple: int
) -> tuple[Tensor, Tensor, int]:
    """Return an output table whose scored rows are a multiple of `multiple`, its bias, and their number.

    On tensor cores a product whose sizes are no multiple of 8 in 16 bits falls to slower kernels, and the
    size of a catalogue is anything. The rows that are added score -inf: they get no probability and no
    gradient, exactly, and exist in no checkpoint. The table's copy costs little beside the logits.
    """
    rows = -(-num_items // multiple) * multiple
    spare = rows - num_items
    table = weight[1 : num_items + 1].to(compute_dtype(weight))
    own = weight.new_zeros(num_items) if bias is None else bias[1 : num_items + 1]
    return F.pad(table, (0, 0, 1, spare)), F.pad(F.pad(own, (0, spare), value=-torch.inf), (1, 0)), rows


def _sum_over_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of logits (M, I) at targets (M,), fillers left out."""
    labels = torch.where(targets == IGNORE, IGNORE, targets - 1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def focal_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean focal cross-entropy, gamma 1, over positions whose label is not PAD.

    `logits` (R, L, V) of every position, `labels` (R, L): the seed study's loss, special rows competing.
    """
    kept = labels.flatten() != PAD
    chosen = logits.flatten(0, 1)[kept]
    entropy = F.cross_entropy(chosen, labels.flatten()[kept], reduction="none")
    return ((1 - torch.exp(-entropy)) * entropy).mean()


def batch_loss(
    model: Bert4Rec,
    batch: Batch,
    config: TrainConfig,
    denominator: float | Tensor,
    encode: Callable[..., Tensor] | None = None,
    how: Route | None = None,
) -> Tensor:
    """Return a micro-batch's part of the step's loss: its sum divided by the step's number of targets.

    `encode` stands in for `model.encode`, compiled for instance. `how` is the run's route of the loss; None:
    this batch's.
    """
    encode = encode or model.encode
    num_items = model.config.num_items
    rows = (batch.items, batch.segment_ids, batch.positions)
    if config.objective == "seed_focal":
        labels = batch.items.flatten().clone()
        real = batch.targets != IGNORE
        labels[batch.target_places[real]] = batch.targets[real]
        logits = model.logits(encode(*rows))
        share = batch.num_tokens / denominator  # of the step's positions that this loss is a mean over
        loss = focal_mean(logits, labels.view_as(batch.items)) * share
        loss.held = logits  # type: ignore[attr-defined]  # as the original does, through backward
        return loss
    weight: Tensor = model.output_weight
    bias: Tensor | None = model.output_bias
    if config.head_rows == "all":  # logits everywhere, of which those at the targets are used
        everywhere = model.head_input(encode(*rows).flatten(0, 1))  # (R * L, D)
        chosen = plain_logits(everywhere, weight, bias, num_items)[batch.target_places]  # (M, I)
        return _sum_over_targets(chosen, batch.targets) / denominator
    if model.config.causal:  # nearly every place is a target: nothing is saved by asking for some
        states = F.embedding(batch.target_places, encode(*rows).flatten(0, 1))
    else:
        states = F.embedding(batch.target_slots, encode(*rows, batch.query_index).flatten(0, 1))
    hidden = model.head_input(states)  # (M, D)
    if config.sampled:
        return sampled_sum(hidden, weight, bias, batch, num_items, config) / denominator
    how = how or route(config.loss, hidden.device.type, len(batch.targets), num_items)
    if config.head_multiple > 1 and not frozen_columns(weight):
        weight, bias, num_items = filled_up(weight, bias, num_items, config.head_multiple)
    return cross_entropy_sum(hidden, weight, bias, batch.targets, num_items, how) / denominator
