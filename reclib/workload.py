"""What one training step is made of, without a model or a device: rows, targets, products, passes, bytes.

The batches of a run are laid out as `batching` would, over a dataset's history lengths; from their shapes
follow the step's parts, each with its FLOPs, the bytes that it moves through main memory and how many
operators it starts. Counts are of forward and backward together.

Shapes: T = R L places of the rows, G = R Q places that go on in the last layer, M places in the head, I real
items, D hidden_dim, F inner width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from reclib import adapter_plan, flops
from reclib.adapter_plan import AdapterPlan
from reclib.config import InputError, ModelConfig, TrainConfig
from reclib.data import Histories
from reclib.packing import bucket, first_fit_decreasing
from reclib.samples import Samples, cut, mask_cloze, next_items

DRAWS = 24  # batches whose shapes are drawn
LARGEST = 1024  # sequences that are laid out; a larger batch is so many times as much
FP32 = 4  # bytes
HALF = 2  # bytes of bf16 and fp16


_drawn: dict[tuple[object, ...], np.ndarray] = {}  # shapes by what they follow from: plans ask often


class Shapes(NamedTuple):
    """One micro-batch as it is laid out: a mean over draws, or the largest."""

    rows: float
    queries: float  # Q, of a row
    slots: float  # M
    targets: float  # of the slots, those that hold a target
    tokens: float  # real items
    sequences: int


def draw(model: ModelConfig, train: TrainConfig, lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the shapes (DRAWS, 5) of micro-batches of histories with these `lengths` (users,).

    Columns are those of `Shapes` but the last. Raises `InputError` for lengths that cannot be trained on.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0 or lengths.min() < 1 + int(model.causal):
        raise InputError("history lengths: expected one or more, each of at least 1 (2 for a causal model)")
    micro = train.micro_batch_size or train.batch_size
    drawn = min(micro, LARGEST)
    packing = (train.layout, train.bucket_steps, train.mask_prob, train.last_item_share)
    key = (model.max_len, model.causal, packing, drawn, seed, hash(lengths.tobytes()))
    if key not in _drawn:
        rng = np.random.default_rng(seed)
        again = len(lengths) < drawn
        some = [_samples(model, train, rng.choice(lengths, drawn, replace=again), rng) for _ in range(DRAWS)]
        _drawn[key] = np.array(_laid_out(model, train, some))
    times = micro / drawn
    return _drawn[key] * [times, 1, times, times, times]


def _samples(
    model: ModelConfig, train: TrainConfig, lengths: np.ndarray, rng: np.random.Generator
) -> Samples:
    ends = np.cumsum(lengths)
    histories = Histories(np.ones(int(ends[-1]), dtype=np.int32), ends - lengths, ends)
    chosen = cut(histories, np.arange(len(lengths)), model.max_len + int(model.causal), None)
    if model.causal:
        return next_items(chosen)
    return mask_cloze(chosen, train.mask_prob, train.last_item_share, rng)


def _laid_out(model: ModelConfig, train: TrainConfig, some: list[Samples]) -> list[tuple[int, ...]]:
    """Return the shapes of micro-batches, packed all together, which takes a tenth of the time."""
    L, steps, packed = model.max_len, train.bucket_steps, train.layout == "packed"
    lengths = np.stack([samples.lengths for samples in some])
    row_of = np.broadcast_to(np.arange(lengths.shape[1]), lengths.shape)
    if packed:
        row_of = first_fit_decreasing(lengths, L)[0]
    shapes: list[tuple[int, ...]] = []
    for samples, row in zip(some, row_of, strict=True):
        rows = int(row.max()) + 1
        per_row = np.bincount(np.repeat(row, samples.lengths)[samples.is_target], minlength=rows)
        targets = int(per_row.sum())
        queries = min(bucket(int(per_row.max(initial=1)), steps), L)
        real = len(samples.tokens)
        shapes.append(
            (bucket(rows, steps) if packed else rows, queries, bucket(targets, steps), targets, real)
        )
    return shapes


def mean_shapes(model: ModelConfig, train: TrainConfig, lengths: np.ndarray) -> Shapes:
    """Return the mean shapes of a micro-batch: what its time follows."""
    return _shapes(draw(model, train, lengths).mean(0), train)


def largest_shapes(model: ModelConfig, train: TrainConfig, lengths: np.ndarray) -> Shapes:
    """Return the largest of each shape: what its memory follows."""
    return _shapes(draw(model, train, lengths).max(0), train)


def _shapes(drawn: np.ndarray, train: TrainConfig) -> Shapes:
    rows, queries, slots, targets, tokens = (float(x) for x in drawn)
    sequences = train.micro_batch_size or train.batch_size
    return Shapes(rows, queries, slots, targets, tokens, sequences)


@dataclass(frozen=True)
class Part:
    """A part of a step, forward and backward."""

    name: str
    kind: str  # product, attention, or what the passes over memory are of
    flops: float = 0.0
    bytes: float = 0.0  # through main memory, operands and results of every pass
    elements: float = 0.0  # that an elementwise part handles, forward
    operators: float = 0.0  # started, forward and backward
    shape: tuple[float, float, float] = (0.0, 0.0, 0.0)  # (m, k, n) of a product, forward


def parameters(model: ModelConfig) -> dict[str, int]:
    """Count parameters: input table, output table (0: tied) with its bias, all others."""
    D, f, layers = model.hidden_dim, model.ffn_factor, model.num_layers
    layer = (4 + 2 * f) * D * D + (9 + f) * D
    rest = layers * layer + 2 * D * (int(model.embedding_norm) + int(model.final_norm))
    rest += model.max_len * D if model.positions == "learned" else 0
    rest += D * D + 3 * D if model.head == "mlp" else 0
    output = (0 if model.tied else model.output_rows * D) + (model.output_rows if model.output_bias else 0)
    return {"input_table": model.vocab_size * D, "output_table": output, "rest": rest}


def everywhere(train: TrainConfig) -> bool:
    """Whether the head scores every place of the rows."""
    return train.objective == "seed_focal" or train.head_rows == "all"


def step_parts(
    model: ModelConfig,
    train: TrainConfig,
    one: Shapes,
    width: int = FP32,
    adapter: AdapterPlan | None = None,
) -> list[Part]:
    """Return the parts of an optimiser step whose micro-batches have the shapes `one`.

    `width` is the bytes of a number in products and activations (2 under autocast to 16 bits). With `adapter`
    the model is frozen and only that is trained.
    """
    micros = train.batch_size // (train.micro_batch_size or train.batch_size)
    once = _encoder_parts(model, train, one, width, adapter) + _head_parts(model, train, one, width, adapter)
    scaled = [
        Part(p.name, p.kind, micros * p.flops, micros * p.bytes, micros * p.elements, micros * p.operators,
             p.shape)
        for p in once
    ]  # fmt: skip
    return scaled + _update_parts(model, train, width, adapter)


def _last_places(model: ModelConfig, train: TrainConfig, one: Shapes) -> float:
    """Return the places that go on in the last layer."""
    return one.rows * (model.max_len if everywhere(train) or model.causal else one.queries)


def _encoder_parts(
    model: ModelConfig, train: TrainConfig, one: Shapes, width: int, adapter: AdapterPlan | None
) -> list[Part]:
    D, F, L, N = model.hidden_dim, model.ffn_factor * model.hidden_dim, model.max_len, model.num_layers
    T, G = one.rows * L, _last_places(model, train, one)
    full, both = 1 + flops.BACKWARD, N - 1  # layers that compute everything
    asked = both * T + G  # places that ask, over all layers
    linear = both * flops.layer_linear(model, 1, 1) * T
    linear += flops.layer_linear(model, 1, 0) * T + flops.layer_linear(model, 0, 1) * G
    moved = both * (T * (6 * D + 2 * F)) + T * 3 * D + G * (5 * D + 2 * F)
    weights = N * (4 * D * D + 2 * D * F)
    norms = 2 * asked + T * int(model.embedding_norm) + G * int(model.final_norm)
    dropped = (2 * asked + T) * D if model.dropout else 0.0
    weighted = asked * L * model.num_heads  # attention probabilities, which fused kernels never store
    stored = weighted if model.attention_dropout else 0.0
    maps, passes, looked_up = full * linear, full, T * D
    if adapter is not None:  # no gradient of weights, none of the table that is looked up
        maps, passes, looked_up = adapter_plan.frozen_linear(model, T, G), 2, T * D / 2
    return [
        Part("encoder: linear maps", "product", maps, passes * width * (moved + weights), 0.0,
             N * 4 * (4 if adapter is None else 2), (T, D, F)),
        Part("encoder: attention", "attention", full * 4 * asked * L * D,
             full * width * (2 * both * T + T + G) * 2 * D + 8 * FP32 * stored, asked * L * D, N * 12),
        Part("GELU", "gelu", 0.0, 5 * width * asked * F, asked * F, N * 2),
        Part("dropout", "dropout", 0.0, 8 * width * dropped, dropped, (2 * N + 1) * 4),
        Part("LayerNorm", "norm", 0.0, 5 * FP32 * norms * D, norms * D, 2 * (2 * N + 2)),
        Part("residuals", "add", 0.0, 6 * width * (2 * asked + T) * D, (2 * asked + T) * D, N * 6),
        Part("look up items", "lookup", 0.0, 4 * FP32 * looked_up, looked_up, 12),
        *([] if adapter is None else _adapter_parts(model, adapter, T, G, width)),
    ]  # fmt: skip


def _adapter_parts(model: ModelConfig, adapter: AdapterPlan, T: float, G: float, width: int) -> list[Part]:
    """Return the adapters' own parts: so narrow that passes over what they read and add to take the time."""
    elements = adapter_plan.adapter_elements(model, T, G)
    gate = adapter_plan.gate_products(model, adapter, T)
    products = adapter_plan.adapter_products(model, adapter, T, G) - gate
    found = [
        Part("adapters", "add", products, 4 * width * elements, elements, 14 * (4 * model.num_layers + 1))
    ]
    if adapter.kind == "ilora":
        seen = T * (3 * model.max_len + 2 * model.hidden_dim)
        found.append(Part("gate", "add", gate, 2 * FP32 * seen, seen, 60))
    return found


def _head_parts(
    model: ModelConfig, train: TrainConfig, one: Shapes, width: int, adapter: AdapterPlan | None
) -> list[Part]:
    D = model.hidden_dim
    focal = train.objective == "seed_focal"
    items = model.output_rows if focal else model.num_items
    scored = one.rows * model.max_len if everywhere(train) else one.slots
    if train.sampled:
        items = train.num_negatives + 1
    passes_of = 1 + flops.BACKWARD if adapter is None else 2  # a frozen table has no gradient
    work = passes_of * flops.head_forward(model, 1, items) * scored
    logits = scored * items
    # In place: product writes, log-softmax, exponential and subtraction in cache, two products read.
    # Elsewhere logits are widened to fp32, read for the loss, and their gradient written and read.
    passes = 6 * FP32 if width == FP32 else 4 * width + 5 * FP32
    inplace = train.loss in ("auto", "inplace") and not everywhere(train)
    return [
        Part("head: products", "product", work, passes_of * width * (items * D + scored * D + logits), 0.0, 8,
             (scored, D, items)),
        Part("head: softmax and loss", "softmax" if inplace else "logits", 0.0,
             passes * logits * (1 if inplace else 2), logits, 20),
    ]  # fmt: skip


def _update_parts(
    model: ModelConfig, train: TrainConfig, width: int, adapter: AdapterPlan | None
) -> list[Part]:
    count = parameters(model)
    P = sum(count.values())
    table = 0 if model.tied else count["input_table"]
    tensors = 16 * model.num_layers + 6
    if adapter is not None:  # frozen matrices are held in the type that products run in: no cast each step
        P, table, tensors = adapter_plan.trained_parameters(model, adapter), 0, 8 * model.num_layers + 1
    loop = train.optimizer == "loop"
    casts = 2 * (FP32 + HALF) * P if width == HALF else 0  # weights to 16 bits and gradients back
    return [
        Part("AdamW", "update", 0.0, 28 * P * (3 if loop else 1), P, 12 * tensors if loop else 4),
        Part("gradient norm", "norm of gradients", 0.0, FP32 * (P - table), P - table, tensors + 6),
        Part("clear gradients, cast weights", "clear", 0.0, FP32 * table + casts, table, 4),
    ]
