"""The cross-entropy over a catalogue as autograd functions that compute no more than is asked for.

`objective` chooses among them. What they share: only real items compete, softmax and loss are in fp32 at
least, and of a table whose first columns are frozen (`lowrank.AdaptedTable.widened`) no gradient is computed
for those: it would cost as much as the scores and be dropped.

Shapes: M targets, D columns of hidden states and table, V rows of the output table, I real items.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reclib.batching import IGNORE
from reclib.config import PAD
from reclib.sinks import sink_of

BLOCK_BYTES = 8 * 2**20  # logits handled at a time on the in-place route: they stay in the last cache level
FULL = (torch.float32, torch.float64)


def frozen_columns(weight: Tensor) -> int:
    """Return how many columns of an output table, the first ones, are frozen and need no gradient.

    Of a table with adapters beside it (`lowrank.AdaptedTable.widened`) only the adapters' columns need one.
    """
    return getattr(weight, "frozen_columns", 0)


class PartlyFrozenProduct(torch.autograd.Function):
    """Scores (M, I) by a table whose first columns are frozen: their gradient is never computed."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, shift: Tensor | None, num_items: int, frozen: int
    ) -> Tensor:
        """Return hidden (M, D) times the items' rows of weight (V, D), plus shift (I,)."""
        ctx.save_for_backward(hidden, weight)
        ctx.num_items, ctx.frozen = num_items, frozen
        return F.linear(hidden, weight[1 : num_items + 1], shift)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and shift."""
        hidden, weight = ctx.saved_tensors
        slope, last = grads[0], ctx.num_items + 1
        d_hidden = slope @ weight[1:last] if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = _empty_but(weight, last, ctx.frozen)
            torch.mm(slope.t(), hidden[:, ctx.frozen :], out=d_weight[1:last, ctx.frozen :])
        return d_hidden, d_weight, slope.sum(0) if ctx.needs_input_grad[2] else None, None, None


def _empty_but(weight: Tensor, last: int, frozen: int) -> Tensor:
    """Return room for a table's gradient, zero in PAD's and MASK's rows; frozen columns hold nothing."""
    room = torch.empty_like(weight)
    room[PAD, frozen:].zero_()
    room[last:, frozen:].zero_()
    return room


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
        frozen: int = 0,
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
            losses[part] = _to_gradient(block, shift, column[part])
            if block.dtype != scores.dtype:
                scores[part] = block
        ctx.save_for_backward(hidden, weight, scores, kept.to(scores.dtype))
        ctx.num_items, ctx.bias_dtype = num_items, None if bias is None else bias.dtype
        ctx.sink = sink_of(weight)
        ctx.frozen = frozen  # columns, the first ones, without a gradient
        return (losses * kept).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias."""
        hidden, weight, slope, kept = ctx.saved_tensors
        scale, last = grads[0], ctx.num_items + 1
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.mm(slope, weight[1:last]).mul_(scale).mul_(kept[:, None])
        # Fillers are left out here, (M, D), and not in the slope, (M, I): that would be a pass over it all.
        scaled = (hidden * scale).to(slope.dtype) * kept[:, None]
        if ctx.sink is not None:
            ctx.sink.overwrite((slope.t(), scaled), slice(1, last))
        elif ctx.needs_input_grad[1]:
            d_weight = _empty_but(weight, last, ctx.frozen)
            torch.mm(slope.t(), scaled[:, ctx.frozen :], out=d_weight[1:last, ctx.frozen :])
        if ctx.needs_input_grad[2]:
            ones = scale.to(slope.dtype) * kept
            d_bias = torch.zeros(len(weight), dtype=ctx.bias_dtype, device=weight.device)
            d_bias[1:last] = torch.mv(slope.t(), ones)
        _spare[:] = [ctx.buffer]
        return d_hidden, d_weight, d_bias, None, None, None


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies over a partly frozen table, its logits made for some targets at a time.

    torch's own computes the gradient of the whole table. Gradients are made on the way forward, as there,
    while a chunk's logits exist; those that are summed over chunks are summed in fp32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        num_items: int,
        frozen: int,
        chunk: int,
    ) -> Tensor:
        """Return the sum over targets (M,) for hidden (M, D) and weight (V, D)."""
        rows = weight[1 : num_items + 1]
        wide = hidden.dtype if hidden.dtype in FULL else torch.float32
        shift = None if bias is None else bias[1 : num_items + 1].to(wide)
        kept = (targets != IGNORE).to(wide)
        column = (targets - 1).clamp_min(0)[:, None]  # (M, 1)
        d_hidden = torch.empty_like(hidden)
        d_rows = rows.new_zeros(num_items, weight.shape[1] - frozen, dtype=wide)
        d_shift = None if bias is None else rows.new_zeros(num_items, dtype=wide)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for first in range(0, len(targets), chunk):
            part = slice(first, first + chunk)
            block = F.linear(hidden[part], rows).to(wide)  # (chunk, I)
            real = kept[part]
            total += (_to_gradient(block, shift, column[part]) * real).sum()
            slope, own = block.to(hidden.dtype), real.to(hidden.dtype)[:, None]
            d_hidden[part] = (slope @ rows) * own
            d_rows += slope.t() @ (hidden[part, frozen:] * own)
            if d_shift is not None:
                d_shift += torch.mv(block.t(), real)
        ctx.save_for_backward(d_hidden, d_rows, d_shift, weight)
        ctx.last, ctx.frozen, ctx.bias = num_items + 1, frozen, bias
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias."""
        d_hidden, d_rows, d_shift, weight = ctx.saved_tensors
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            d_weight = _empty_but(weight, ctx.last, ctx.frozen)
            d_weight[1 : ctx.last, ctx.frozen :] = d_rows * grads[0]
        if ctx.needs_input_grad[2]:
            d_bias = torch.zeros_like(ctx.bias)
            d_bias[1 : ctx.last] = d_shift * grads[0]
        own = d_hidden * grads[0].to(d_hidden.dtype) if ctx.needs_input_grad[0] else None
        return own, d_weight, d_bias, None, None, None, None


def _to_gradient(block: Tensor, shift: Tensor | None, column: Tensor) -> Tensor:
    """Turn a block of logits into their gradient, in place; return its losses. Fillers are the caller's."""
    if shift is not None:
        block += shift
    torch.log_softmax(block, -1, out=block)
    losses = -block.gather(1, column).squeeze(1)
    block.exp_().scatter_add_(1, column, block.new_full(column.shape, -1.0))
    return losses
