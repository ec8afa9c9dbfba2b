"""What a step minimises: cross-entropy over the catalogue at the target positions.

Three routes to the same number and the same gradients:

- `plain`: logits, then `F.cross_entropy`; the reference.
- `chunked`: torch's `F.linear_cross_entropy` with an explicit chunk of targets, for logits too large to hold.
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

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reclib.batching import IGNORE, Batch
from reclib.config import PAD, TrainConfig
from reclib.model import Bert4Rec
from reclib.sampled import sampled_sum
from reclib.sinks import sink_of

Route = Literal["plain", "chunked", "inplace"]
LARGE_LOGITS_BYTES = 512 * 2**20  # above this, off the CPU, the logits are never held whole
BLOCK_BYTES = 8 * 2**20  # logits handled at a time on the in-place route: they stay in the last cache level
FULL = (torch.float32, torch.float64)


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the type that matrix products run in: that of autocast where it is on, else the tensor's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def route(loss: str, device_type: str, num_targets: int, num_items: int) -> Route:
    """Choose the route for `loss` = auto | plain | chunked | inplace."""
    if loss == "auto":
        if device_type == "cpu":
            return "inplace"
        return "chunked" if 4 * num_targets * num_items > LARGE_LOGITS_BYTES else "plain"
    return loss  # type: ignore[return-value]  # validated by TrainConfig


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, num_items: int, how: Route
) -> Tensor:
    """Return the sum over targets of the cross-entropy over items 1..num_items.

    `hidden` (M, D), `weight` (V, D), `bias` (V,) or None, `targets` (M,) item ids or IGNORE. The products run
    in autocast's type where that is on: both sides are cast here, since `F.linear_cross_entropy` is outside
    autocast and would run in fp32 in silence. The softmax and the loss are in fp32.
    """
    if how == "plain":
        return _sum_over_targets(plain_logits(hidden, weight, bias, num_items), targets)
    dtype = compute_dtype(hidden)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if how == "inplace":
        return InplaceCrossEntropy.apply(hidden, weight, bias, targets, num_items)
    rows = weight[1 : num_items + 1]
    shift = None if bias is None else bias[1 : num_items + 1]
    # The automatic chunking makes one-row chunks when classes far outnumber rows: the size is explicit.
    chunk = max(16, LARGE_LOGITS_BYTES // (8 * num_items))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(chunk, len(targets)))
    loss = F.linear_cross_entropy(
        hidden,
        rows,
        torch.where(targets == IGNORE, IGNORE, targets - 1),
        linear_bias=None if shift is None else shift.to(dtype),
        ignore_index=IGNORE,
        reduction="sum",
        options=options,
    )
    return loss.float() if dtype not in FULL else loss


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, num_items: int) -> Tensor:
    """Return the scores (M, I) of all real items, in fp32 at least."""
    dtype = compute_dtype(hidden)
    shift = None if bias is None else bias[1 : num_items + 1].to(dtype)
    logits = F.linear(hidden.to(dtype), weight[1 : num_items + 1].to(dtype), shift)
    return logits if dtype in FULL else logits.float()


def _sum_over_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of logits (M, I) at targets (M,), fillers left out."""
    labels = torch.where(targets == IGNORE, IGNORE, targets - 1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


_spare: list[Tensor] = []  # the buffer of the last step: asking the kernel for new pages takes longer


def _take_buffer(like: Tensor, size: int) -> Tensor:
    """Return an uninitialised vector of at least `size`: the spare one where it fits.

    Whoever takes it owns it until backward gives it back; a second use before that gets another.
    """
    if _spare:
        found = _spare.pop()
        if found.numel() >= size and (found.dtype, found.device) == (like.dtype, like.device):
            return found
    return like.new_empty(size + size // 8)  # the number of targets varies a little


class InplaceCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies whose logits, probabilities and gradient share one buffer (M, I)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        num_items: int,
    ) -> Tensor:
        """Return the sum; what is kept for backward is the gradient of the logits."""
        ctx.buffer = _take_buffer(hidden, len(targets) * num_items)
        scores = ctx.buffer[: len(targets) * num_items].view(len(targets), num_items)  # (M, I)
        torch.mm(hidden, weight[1 : num_items + 1].t(), out=scores)
        wide = scores.dtype if scores.dtype in FULL else torch.float32
        shift = None if bias is None else bias[1 : num_items + 1].to(wide)
        kept = (targets != IGNORE).to(wide)
        column = (targets - 1).clamp_min(0)[:, None]  # (M, 1)
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        size = max(1, BLOCK_BYTES // (wide.itemsize * num_items))
        for first in range(0, len(targets), size):
            part = slice(first, first + size)
            block = scores[part].to(wide)  # the buffer itself where the products are in full precision
            losses[part] = _to_gradient(block, shift, column[part], kept[part])
            if block.dtype != scores.dtype:
                scores[part] = block
        ctx.save_for_backward(hidden, weight, scores)
        ctx.num_items, ctx.bias_dtype = num_items, None if bias is None else bias.dtype
        ctx.sink = sink_of(weight)
        ctx.frozen_columns = getattr(weight, "frozen_columns", 0)  # the first ones, without a gradient
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias."""
        hidden, weight, slope = ctx.saved_tensors
        scale, last = grads[0], ctx.num_items + 1
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.mm(slope, weight[1:last]).mul_(scale)
        scaled = (hidden * scale).to(slope.dtype)
        if ctx.sink is not None:
            ctx.sink.overwrite((slope.t(), scaled), slice(1, last))
        elif ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight)
            d_weight[PAD].zero_()
            d_weight[last:].zero_()
            first = ctx.frozen_columns
            torch.mm(slope.t(), scaled[:, first:], out=d_weight[1:last, first:])
        if ctx.needs_input_grad[2]:
            ones = scale.to(slope.dtype).expand(len(slope)).contiguous()
            d_bias = torch.zeros(len(weight), dtype=ctx.bias_dtype, device=weight.device)
            d_bias[1:last] = torch.mv(slope.t(), ones)
        _spare[:] = [ctx.buffer]
        return d_hidden, d_weight, d_bias, None, None


def _to_gradient(block: Tensor, shift: Tensor | None, column: Tensor, kept: Tensor) -> Tensor:
    """Turn a block of logits into their gradient, in place; return its losses."""
    if shift is not None:
        block += shift
    torch.log_softmax(block, -1, out=block)
    losses = -block.gather(1, column).squeeze(1) * kept
    block.exp_().scatter_add_(1, column, block.new_full(column.shape, -1.0))
    if not bool(kept.all()):
        block *= kept[:, None]
    return losses


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
    denominator: float,
    encode: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return a micro-batch's part of the step's loss: its sum divided by the step's number of targets.

    `encode` stands in for `model.encode`, compiled for instance.
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
    table = (model.output_weight, model.output_bias)
    if config.head_rows == "all":  # logits everywhere, of which those at the targets are used
        everywhere = model.head_input(encode(*rows).flatten(0, 1))  # (R * L, D)
        chosen = plain_logits(everywhere, *table, num_items)[batch.target_places]  # (M, I)
        return _sum_over_targets(chosen, batch.targets) / denominator
    if model.config.causal:  # nearly every place is a target: nothing is saved by asking for some
        states = encode(*rows).flatten(0, 1)[batch.target_places]
    else:
        states = encode(*rows, batch.query_index).flatten(0, 1)[batch.target_slots]
    hidden = model.head_input(states)  # (M, D)
    if config.sampled:
        return sampled_sum(hidden, *table, batch, num_items, config) / denominator
    how = route(config.loss, hidden.device.type, len(batch.targets), num_items)
    return cross_entropy_sum(hidden, *table, batch.targets, num_items, how) / denominator
