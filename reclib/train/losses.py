"""Losses: cross-entropy over the catalogue at the target positions, and alternatives.

Four routes compute the same loss and gradients:

- `plain`: logits, then `F.cross_entropy`; the reference.
- `fused`: the same with `torch.compile`, which reduces the passes over the logits on a GPU.
- `chunked`: logits for a part of the targets at a time, for logits that do not fit; as
  `F.linear_cross_entropy`, which needs torch 2.13.
- `inplace`: one buffer for logits, probabilities and gradient, transformed a few rows at a time in cache,
  between full matrix products. On a CPU it takes little more time than the products, and a third of the
  memory of `plain`.

Two losses over sampled items are for catalogues whose scores do not fit (see below).

PAD and MASK get no probability and no gradient. The loss is in fp32 whatever the products' precision. It is a
sum divided by the number of targets of the whole step.

`seed_focal` re-creates the loss of the seed study: focal cross-entropy (Lin et al. 2017, arXiv 1708.02002)
with gamma 1 over every position that is not padding, visible ones included.

Shapes: M targets, D hidden_dim, V rows of the output table, I real items.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reclib.config import PAD, TrainConfig
from reclib.cost.work import LARGE_LOGITS_BYTES, logits_limit
from reclib.data.batches import IGNORE, Batch
from reclib.model.bert4rec import Sink
from reclib.model.ilora import SequenceModel

# -- losses over sampled items -------------------------------------------------------------------------------
#
# For catalogues whose full softmax does not fit. The K negatives of a step are shared by its targets, so that
# scores are one product (M, K). A negative equal to the target is excluded from that target's loss.
#
# - `sampled_softmax`: cross-entropy among the target and the negatives. With `logq` each negative counts
#   1 / (K q) times, q being its probability of being drawn (Bengio and Senecal, IEEE TNN 19(4), 2008): the
#   sum over negatives then estimates the sum over the catalogue. Without it the loss is the naive one.
# - `gbce`: generalised binary cross-entropy (Petrov and Macdonald, RecSys 2023, arXiv 2308.07192, section 5).
#   The positive's probability is raised to beta = 1 + t (a - 1), with a = K / (I - 1). t = 0 is plain binary
#   cross-entropy, t = 1 is calibrated like the softmax. The paper draws negatives for each target; here they
#   are drawn for the step.
#
# Both are biased against the full softmax, which is the default wherever its logits fit.


def sampled_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, num_items: int, config: TrainConfig
) -> Tensor:
    """Return the sum over targets of the sampled loss, in fp32 at least.

    `hidden` (M, D), `weight` (V, D), `bias` (V,) or None; targets (M,) and negatives (K,) are the batch's.
    """
    assert batch.negatives is not None
    assert batch.negative_probs is not None
    targets, negatives = batch.targets, batch.negatives
    is_target = targets != IGNORE
    target_rows = F.embedding(targets.clamp_min(0), weight)  # (M, D)
    positive = (hidden * target_rows).sum(-1)  # (M,)
    scores = F.linear(hidden, F.embedding(negatives, weight))  # (M, K)
    if bias is not None:
        positive, scores = positive + bias[targets.clamp_min(0)], scores + bias[negatives]
    if scores.dtype in (torch.float16, torch.bfloat16):
        positive, scores = positive.float(), scores.float()
    clash = targets[:, None] == negatives[None, :]
    if config.loss == "gbce":
        losses = gbce(positive, scores, clash, num_items, config.gbce_t)
    else:
        shift = -torch.log(len(negatives) * batch.negative_probs) if config.logq else None
        losses = softmax_losses(positive, scores, clash, shift)
    return (losses * is_target).sum()


def softmax_losses(positive: Tensor, scores: Tensor, clash: Tensor, log_weight: Tensor | None) -> Tensor:
    """Return the cross-entropies (M,) of `positive` (M,) against `scores` (M, K) with log weights (K,)."""
    if log_weight is not None:
        scores = scores + log_weight
    scores = scores.masked_fill(clash, float("-inf"))
    rivals = torch.cat((positive[:, None], scores), 1)
    return torch.logsumexp(rivals, 1) - positive


def gbce(positive: Tensor, scores: Tensor, clash: Tensor, num_items: int, t: float) -> Tensor:
    """Return the generalised binary cross-entropies (M,): -(beta log s(+) + sum log(1 - s(-)))."""
    rate = scores.shape[1] / max(1, num_items - 1)
    beta = 1 + t * (rate - 1)  # the paper's rate (t (1 - 1/rate) + 1/rate), multiplied out
    negative = F.softplus(scores).masked_fill(clash, 0.0).sum(1)
    return beta * F.softplus(-positive) + negative


# -- full cross-entropy as autograd functions ----------------------------------------------------------------
#
# Candidates are real items only; softmax and loss are in fp32 at least. No gradient is computed for the first
# columns of a table if they are frozen (`lora.AdaptedTable.widened`): it would cost as much as the scores.

BLOCK_BYTES = 8 * 2**20  # of logits at a time on the in-place route: they stay in the last cache level

FULL = (torch.float32, torch.float64)


class Added(NamedTuple):
    """The addition of a prior to the logits (M, I): scale * values at (rows, columns), ordered by row."""

    rows: Tensor  # (N,) int64
    columns: Tensor  # (N,) int64
    values: Tensor  # (N,)
    scale: Tensor  # (), learned

    def within(self, first: int, end: int, num_items: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices into the flattened logits of the rows from `first` to `end`, values, and rows.

        On a GPU all entries are returned, with the value 0 for other rows: filtering would synchronise.
        """
        if self.rows.device.type == "cpu":
            bounds = torch.searchsorted(self.rows, torch.tensor([first, end])).tolist()
            rows, columns, values, _ = (tensor[slice(*bounds)] for tensor in (*self[:3], self.rows))
            return (rows - first) * num_items + columns, values, rows
        inside = (self.rows >= first) & (self.rows < end)
        places = torch.where(inside, (self.rows - first) * num_items + self.columns, 0)
        return places, torch.where(inside, self.values, 0), self.rows


class PartlyFrozenProduct(torch.autograd.Function):
    """Scores (M, I) for a table whose first columns are frozen and get no gradient."""

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
        slope, last = grads[0], ctx.num_items + 1  # (M, I)
        d_hidden = slope @ weight[1:last] if ctx.needs_input_grad[0] else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = _empty_but(weight, last, ctx.frozen)
            torch.mm(slope.t(), hidden[:, ctx.frozen :], out=d_weight[1:last, ctx.frozen :])
        return d_hidden, d_weight, slope.sum(0) if ctx.needs_input_grad[2] else None, None, None


def _empty_but(weight: Tensor, last: int, frozen: int) -> Tensor:
    """Return an empty gradient of a table, zero in the rows of PAD and MASK except for frozen columns."""
    room = torch.empty_like(weight)
    room[PAD, frozen:].zero_()
    room[last:, frozen:].zero_()
    return room


# The buffer of the last step, for reuse: allocating fresh pages for 164 MB takes 38 to 43 ms.
_spare: list[Tensor] = []


def _take_buffer(like: Tensor, size: int) -> Tensor:
    """Return an uninitialised vector of at least `size`, the spare one if it fits.

    Backward returns it; another forward before that gets a new one.
    """
    if _spare:
        buffer = _spare.pop()
        if buffer.numel() >= size and (buffer.dtype, buffer.device) == (like.dtype, like.device):
            return buffer
    return like.new_empty(size + size // 8)  # the number of targets varies a little


class InplaceCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies whose logits, probabilities and gradient share one buffer (M, I).

    `F.cross_entropy` holds three such tensors, 154 MB each in the benchmark. Here log-softmax, exponential
    and subtraction are applied to blocks of a few rows in cache: 35 ms instead of several passes over memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        num_items: int,
        frozen: int = 0,
        sink: Sink | None = None,
        *added: Tensor,
    ) -> Tensor:
        """Return the sum; save the gradient of the logits. `added` has the fields of `Added`, if any."""
        ctx.buffer = _take_buffer(hidden, len(targets) * num_items)
        scores = ctx.buffer[: len(targets) * num_items].view(len(targets), num_items)  # (M, I)
        torch.mm(hidden, weight[1 : num_items + 1].t(), out=scores)
        wide = scores.dtype if scores.dtype in FULL else torch.float32
        shift = None if bias is None else bias[1 : num_items + 1].to(wide)
        is_target = (targets != IGNORE).to(wide)
        column = (targets - 1).clamp_min(0)[:, None]  # (M, 1); a filler gets any valid column
        losses = torch.empty(len(targets), dtype=wide, device=hidden.device)
        size = max(1, BLOCK_BYTES // (wide.itemsize * num_items))
        d_scale = losses.new_zeros(()) if added else None
        for first in range(0, len(targets), size):
            part = slice(first, first + size)
            block = scores[part].to(wide)  # the buffer itself where the products are in full precision
            losses[part], d_scale = _to_gradient(block, shift, column[part], first, is_target, added, d_scale)
            if block.dtype != scores.dtype:
                scores[part] = block
        ctx.save_for_backward(hidden, weight, scores, is_target.to(scores.dtype))
        ctx.d_scale = d_scale
        ctx.num_items, ctx.bias_dtype = num_items, None if bias is None else bias.dtype
        ctx.frozen, ctx.sink = frozen, sink
        return (losses * is_target).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias."""
        hidden, weight, slope, is_target = ctx.saved_tensors
        scale, last = grads[0], ctx.num_items + 1
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.mm(slope, weight[1:last]).mul_(scale).mul_(is_target[:, None])
        # `scale` and the mask are applied to (M, D): applying them to (M, I) would be another pass over it.
        scaled = (hidden * scale).to(slope.dtype) * is_target[:, None]
        if ctx.sink is not None:
            ctx.sink.overwrite((slope.t(), scaled), slice(1, last))  # and autograd gets None
        elif ctx.needs_input_grad[1]:
            d_weight = _empty_but(weight, last, ctx.frozen)
            torch.mm(slope.t(), scaled[:, ctx.frozen :], out=d_weight[1:last, ctx.frozen :])
        if ctx.needs_input_grad[2]:
            ones = scale.to(slope.dtype) * is_target
            d_bias = torch.zeros(len(weight), dtype=ctx.bias_dtype, device=weight.device)
            d_bias[1:last] = torch.mv(slope.t(), ones)
        _spare[:] = [ctx.buffer]
        prior_grads = () if ctx.d_scale is None else (None, None, None, ctx.d_scale * scale)
        return d_hidden, d_weight, d_bias, None, None, None, None, *prior_grads


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies over a partly frozen table, with logits for `chunk` targets at a time.

    `F.linear_cross_entropy` computes the gradient of the whole table. As there, gradients are computed in
    forward, while the logits of a chunk exist. Sums over chunks are in fp32 at least.
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
        *added: Tensor,
    ) -> Tensor:
        """Return the sum over targets (M,) for hidden (M, D), weight (V, D) and the fields of `Added`."""
        rows = weight[1 : num_items + 1]
        wide = hidden.dtype if hidden.dtype in FULL else torch.float32
        shift = None if bias is None else bias[1 : num_items + 1].to(wide)
        is_target = (targets != IGNORE).to(wide)
        column = (targets - 1).clamp_min(0)[:, None]  # (M, 1)
        d_hidden = torch.empty_like(hidden)
        d_rows = rows.new_zeros(num_items, weight.shape[1] - frozen, dtype=wide)
        d_shift = None if bias is None else rows.new_zeros(num_items, dtype=wide)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_scale = total.clone() if added else None
        for first in range(0, len(targets), chunk):
            part = slice(first, first + chunk)
            block = F.linear(hidden[part], rows).to(wide)  # (chunk, I)
            real = is_target[part]
            losses, d_scale = _to_gradient(block, shift, column[part], first, is_target, added, d_scale)
            total += (losses * real).sum()
            slope, mask = block.to(hidden.dtype), real.to(hidden.dtype)[:, None]
            d_hidden[part] = (slope @ rows) * mask
            d_rows += slope.t() @ (hidden[part, frozen:] * mask)
            if d_shift is not None:
                d_shift += torch.mv(block.t(), real)
        ctx.save_for_backward(d_hidden, d_rows, d_shift, weight)
        ctx.last, ctx.frozen, ctx.bias, ctx.d_scale = num_items + 1, frozen, bias, d_scale
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
        d_input = d_hidden * grads[0].to(d_hidden.dtype) if ctx.needs_input_grad[0] else None
        prior_grads = () if ctx.d_scale is None else (None, None, None, ctx.d_scale * grads[0])
        return d_input, d_weight, d_bias, None, None, None, None, *prior_grads


def _to_gradient(
    block: Tensor,
    shift: Tensor | None,
    column: Tensor,
    first: int,
    is_target: Tensor,
    added: Sequence[Tensor],
    d_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Turn a block of logits (m, I), the rows from `first`, into their gradient, in place.

    Returns the losses (m,) and `d_scale` plus the block's gradient of a prior's scale. The gradient of the
    logits is softmax - onehot(target). The caller masks fillers.
    """
    if shift is not None:
        block += shift
    if added:
        prior = Added(*added)
        places, values, rows = prior.within(first, first + len(block), block.shape[1])
        block.view(-1).index_add_(0, places, (values * prior.scale).to(block.dtype))
    torch.log_softmax(block, -1, out=block)
    losses = -block.gather(1, column).squeeze(1)
    block.exp_().scatter_add_(1, column, block.new_full(column.shape, -1.0))
    if d_scale is not None:
        d_scale = d_scale + (block.view(-1)[places] * values * is_target[rows]).sum()
    return losses, d_scale


# -- the loss of a batch -------------------------------------------------------------------------------------

Route = Literal["plain", "fused", "chunked", "inplace"]


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """Return the type of matrix products: that of autocast if enabled, else the tensor's."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def route(
    loss: str, device_type: str, num_targets: int, num_items: int, memory_bytes: int | None = None
) -> Route:
    """Choose the route for `loss` = auto | plain | fused | chunked | inplace.

    On CUDA auto depends on the size of the logits of `num_targets` and the device's `memory_bytes`. A run
    chooses once, for its largest batch, so that all its steps are comparable.
    """
    if loss == "auto":
        if device_type == "cpu":
            return "inplace"
        return "chunked" if 4 * num_targets * num_items > logits_limit(memory_bytes) else "plain"
    return loss  # type: ignore[return-value]  # validated by TrainConfig


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    num_items: int,
    how: Route,
    frozen: int = 0,
    sink: Sink | None = None,
    added: Added | None = None,
) -> Tensor:
    """Return the sum over targets of the cross-entropy over items 1..num_items.

    `hidden` (M, D), `weight` (V, D), `bias` (V,) or None, `targets` (M,) item ids or IGNORE. The first
    `frozen` columns of `weight` get no gradient. On the in-place route `sink` takes the gradient of `weight`.
    With `added`, the part of a prior, the loss is not compiled.
    """
    if how == "fused" and not frozen and added is None:
        for tensor in (hidden, targets):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # M alone: the catalogue stays a constant
        return _compiled_sum()(hidden, weight, bias, targets, num_items)
    if how in ("plain", "fused"):
        return _plain_sum(hidden, weight, bias, targets, num_items, frozen, added)
    # Cast explicitly: a product with `out=` ignores autocast and would run in fp32.
    dtype = compute_dtype(hidden)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if how == "inplace":
        return InplaceCrossEntropy.apply(
            hidden, weight, bias, targets, num_items, frozen, sink, *(added or ())
        )
    chunk = min(max(16, LARGE_LOGITS_BYTES // (8 * num_items)), len(targets))
    shape = (num_items, frozen, chunk)
    return ChunkedCrossEntropy.apply(hidden, weight, bias, targets, *shape, *(added or ()))


def plain_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, num_items: int, frozen: int = 0
) -> Tensor:
    """Return the scores (M, I) of all real items, in fp32 at least."""
    dtype = compute_dtype(hidden)
    shift = None if bias is None else bias[1 : num_items + 1].to(dtype)
    if frozen:
        logits = PartlyFrozenProduct.apply(hidden.to(dtype), weight.to(dtype), shift, num_items, frozen)
    else:
        logits = F.linear(hidden.to(dtype), weight[1 : num_items + 1].to(dtype), shift)
    return logits if dtype in FULL else logits.float()


def _plain_sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    num_items: int,
    frozen: int = 0,
    added: Added | None = None,
) -> Tensor:
    logits = plain_logits(hidden, weight, bias, num_items, frozen)
    if added is not None:
        values = (added.values * added.scale).to(logits.dtype)
        logits = logits.index_put((added.rows, added.columns), values, accumulate=True)
    return _sum_over_targets(logits, targets)


@functools.cache
def _compiled_sum() -> Any:
    """Return `_plain_sum` compiled, on first use: importing the compiler takes a second."""
    return torch.compile(_plain_sum)


def _sum_over_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of logits (M, I) at targets (M,), fillers left out."""
    labels = torch.where(targets == IGNORE, IGNORE, targets - 1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def focal_mean(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean focal cross-entropy, gamma 1, over positions whose label is not PAD.

    `logits` (R, L, V) of every position, `labels` (R, L): the seed study's loss, special rows competing.
    """
    is_real = labels.flatten() != PAD
    chosen = logits.flatten(0, 1)[is_real]
    entropy = F.cross_entropy(chosen, labels.flatten()[is_real], reduction="none")
    return ((1 - torch.exp(-entropy)) * entropy).mean()


def batch_loss(
    model: SequenceModel,
    batch: Batch,
    config: TrainConfig,
    denominator: float | Tensor,
    encode: Callable[..., Tensor] | None = None,
    how: Route | None = None,
    held: list[Tensor] | None = None,
) -> Tensor:
    """Return a micro-batch's part of the step's loss: its sum divided by the step's number of targets.

    `encode` replaces `model.encode`, for instance by a compiled version. `how` is the route of the loss; the
    default is chosen for this batch. Tensors appended to `held` must be kept until backward is done.
    """
    encode = encode or model.encode
    num_items = model.config.num_items
    rows = (batch.items, batch.segment_ids, batch.positions)
    if config.objective == "seed_focal":
        labels = batch.items.flatten().clone()
        real = batch.targets != IGNORE
        labels[batch.target_places[real]] = batch.targets[real]
        logits = model.logits(encode(*rows))
        share = batch.num_tokens / denominator  # of the positions of the step
        if held is not None:
            held.append(logits)  # the seed study keeps them in backward, which counts in measured memory
        return focal_mean(logits, labels.view_as(batch.items)) * share
    weight, bias, frozen = model.output_weight, model.output_bias, model.frozen_columns
    if config.head_rows == "all":  # logits at all places, of which those at the targets are used
        everywhere = model.head_input(encode(*rows).flatten(0, 1))  # (R * L, D)
        chosen = plain_logits(everywhere, weight, bias, num_items, frozen)[batch.target_places]  # (M, I)
        return _sum_over_targets(chosen, batch.targets) / denominator
    if model.config.causal or config.visible_targets:  # nearly every place is a target
        states = F.embedding(batch.target_places, encode(*rows).flatten(0, 1))
    else:
        states = F.embedding(batch.target_slots, encode(*rows, batch.query_index).flatten(0, 1))
    hidden = model.head_input(states)  # (M, D)
    if config.sampled:
        return sampled_sum(hidden, weight, bias, batch, num_items, config) / denominator
    how = how or route(config.loss, hidden.device.type, len(batch.targets), num_items)
    added = None
    if model.prior is not None:
        entries: Any = (batch.prior_rows, batch.prior_columns, batch.prior_values, model.prior.scale)
        added = Added(*entries)
    sink = model.output_sink
    total = cross_entropy_sum(hidden, weight, bias, batch.targets, num_items, how, frozen, sink, added)
    return total / denominator
