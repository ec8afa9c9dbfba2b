"""Training FLOPs of a step, counted from its shapes, and what share of a device's peak they are.

A product of (m, k) and (k, n) is 2 m k n. Backward costs twice forward, since each product has two gradients.
Norms, softmax, embeddings and the optimiser are left out, as is the custom. Two counts are kept apart: what
was executed (rows and slots as laid out, padding included) and what the objective needs (real items and
targets alone).

Shapes: R rows, L positions, Q queries of a row, M places in the head, D hidden_dim, F inner width, N layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from reclib import devices
from reclib.config import ModelConfig, TrainConfig

if TYPE_CHECKING:  # plans count FLOPs where there is no torch
    from reclib.batching import Batch

BACKWARD = 2  # times the forward pass


class Flops(NamedTuple):
    """Floating-point operations of training, by part."""

    encoder: int
    head: int

    @property
    def total(self) -> int:
        """Both parts."""
        return self.encoder + self.head

    def __add__(self, other: object) -> Flops:
        """Add part by part."""
        if not isinstance(other, Flops):
            return NotImplemented
        return Flops(self.encoder + other.encoder, self.head + other.head)


def layer_linear(model: ModelConfig, keys: int, queries: int) -> int:
    """Return forward FLOPs of one layer's linear maps for `keys` positions, of which `queries` go on."""
    D, F = model.hidden_dim, model.ffn_factor * model.hidden_dim
    return 2 * keys * D * 2 * D + 2 * queries * D * D * 2 + 2 * queries * D * F * 2


def encoder_forward(model: ModelConfig, rows: int, queries: int | None) -> int:
    """Return forward FLOPs of the encoder on (R, L) rows; `queries` is Q, None: every position goes on."""
    places = rows * model.max_len

    def layer(asking: int) -> int:
        return layer_linear(model, places, asking) + 4 * asking * model.max_len * model.hidden_dim

    last = layer(places if queries is None else rows * queries)
    return (model.num_layers - 1) * layer(places) + last


def head_forward(model: ModelConfig, slots: int, table_rows: int) -> int:
    """Return forward FLOPs of the head at `slots` places over `table_rows` of the output table."""
    D = model.hidden_dim
    transform = 2 * slots * D * D if model.head == "mlp" else 0
    return transform + 2 * slots * D * table_rows


def executed(model: ModelConfig, train: TrainConfig, batch: Batch) -> Flops:
    """Count one training pass over `batch` as it is laid out, padding included."""
    rows, L = batch.items.shape
    focal = train.objective == "seed_focal"
    everywhere = focal or train.head_rows == "all"
    queries = None if everywhere or model.causal else int(batch.query_index.shape[1])
    slots = rows * L if everywhere else len(batch.targets)
    table_rows = model.output_rows if focal else model.num_items
    if train.sampled:
        table_rows = train.num_negatives  # the product with each target's own row is left out
    forward = Flops(encoder_forward(model, rows, queries), head_forward(model, slots, table_rows))
    return Flops(*((1 + BACKWARD) * part for part in forward))


def needed(model: ModelConfig, batch: Batch) -> Flops:
    """Count what the masked-item objective needs for `batch`: real items in the encoder, targets in the head.

    Attention is counted inside each segment alone.
    """
    segments = batch.segment_ids.numpy(force=True).astype(np.int64)
    by_row = segments + np.arange(len(segments))[:, None] * (int(segments.max(initial=0)) + 1)
    lengths = np.bincount(by_row[segments > 0])
    squares = int((lengths**2).sum())
    D, tokens, targets = model.hidden_dim, batch.num_tokens, batch.num_targets
    full = layer_linear(model, tokens, tokens) + 4 * squares * D
    target_rows = by_row.reshape(-1)[batch.target_places[:targets].numpy(force=True)]
    last = layer_linear(model, tokens, targets) + 4 * int(lengths[target_rows].sum()) * D
    forward = Flops((model.num_layers - 1) * full + last, head_forward(model, targets, model.num_items))
    return Flops(*((1 + BACKWARD) * part for part in forward))


def total(parts: Sequence[Flops]) -> Flops:
    """Add up the counts of several micro-batches or steps."""
    return Flops(sum(part.encoder for part in parts), sum(part.head for part in parts))


def mfu(flops: float, seconds: float, label: str, precision: str) -> float | None:
    """Return FLOP/s over the device's dense peak; None on a CPU and wherever the peak is not known."""
    peak = devices.peak_flops(label, precision)
    return None if peak is None else flops / seconds / peak
