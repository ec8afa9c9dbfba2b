"""Losses over sampled items, for catalogues whose full softmax does not fit.

The K negatives of a step are shared by its targets, so that scores are one product (M, K). A negative that is
the target itself is left out of that target's loss.

- `sampled_softmax`: cross-entropy among the target and the negatives. With `logq` each negative counts
  1 / (K q) times, q being the probability that it was drawn (Bengio and Senecal, IEEE TNN 19(4), 2008): the
  sum over negatives then estimates the sum over the catalogue. Without it the loss is the naive one.
- `gbce`: generalised binary cross-entropy (Petrov and Macdonald, RecSys 2023, arXiv 2308.07192, section 5).
  The positive's probability is raised to beta = 1 + t (a - 1), with a = K / (I - 1); t = 0 is plain binary
  cross-entropy, t = 1 is calibrated like the softmax. Negatives there are drawn for each target, here for
  the step.

Both read a few rows of the output table instead of all of them; both are biased against the full softmax,
which stays the default wherever its logits fit.

Shapes: M targets, K negatives, D hidden_dim, V rows of the output table, I real items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from reclib.batching import IGNORE, Batch
from reclib.config import TrainConfig


def sampled_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: Batch, num_items: int, config: TrainConfig
) -> Tensor:
    """Return the sum over targets of the sampled loss, in fp32 at least.

    `hidden` (M, D), `weight` (V, D), `bias` (V,) or None; targets (M,) and negatives (K,) are the batch's.
    """
    assert batch.negatives is not None
    assert batch.negative_probs is not None
    targets, negatives = batch.targets, batch.negatives
    kept = targets != IGNORE
    own = F.embedding(targets.clamp_min(0), weight)  # (M, D)
    positive = (hidden * own).sum(-1)  # (M,)
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
    return (losses * kept).sum()


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
