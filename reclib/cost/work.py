"""FLOPs, bytes and memory of a training step, computed without a model or a device.

Batches are laid out for history lengths as in `data.batches`. Their shapes determine the parts of a step,
forward and backward together, and its peak memory. Counts are checked against torch's FLOP counter and
profiler (`tests/cost`); memory on CUDA is unvalidated.

A product of (m, k) and (k, n) is 2 m k n FLOPs, and its backward pass twice that, one for each gradient. A
frozen model with adapters has no gradients of weights, and none below the keys, queries and values of its
first layer. Adapters are counted on all matrices of the encoder, whatever `AdapterConfig.targets`.

Shapes: R rows of L positions, T = R L places, G places that are queries in the last layer (Q per row), M
places in the head, I real items, D hidden_dim, E width of the item vectors, F inner width, N layers, r rank
and K experts of an adapter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from reclib import hardware
from reclib.config import AdapterConfig, InputError, ModelConfig, TrainConfig, changed
from reclib.data.batches import bucket, cut, first_fit_decreasing, mask_cloze, next_items
from reclib.data.dataset import Histories
from reclib.hardware import GIB, Device, choose_precision

if TYPE_CHECKING:
    from reclib.data.batches import Batch

BACKWARD = 2  # times the forward pass
FP32, HALF = 4, 2  # bytes of a number; HALF: bf16 and fp16


def number_bytes(precision: str) -> int:
    """Return the bytes of a number in the products of fp32, tf32, bf16 or fp16."""
    return HALF if precision in ("bf16", "fp16") else FP32


def parameters(model: ModelConfig) -> dict[str, int]:
    """Count parameters: input table, output table (0: tied) with its bias, all others."""
    D, E, f, layers = model.hidden_dim, model.table_width, model.ffn_factor, model.num_layers
    layer = (4 + 2 * f) * D * D + (9 + f) * D
    others = layers * layer + 2 * D * (int(model.embedding_norm) + int(model.final_norm))
    others += model.max_len * D if model.positions == "learned" else 0
    others += D * D + 3 * D if model.head == "mlp" else 0
    others += 0 if model.table_dim is None else 2 * D * E
    output = (0 if model.tied else model.output_rows * E) + (model.output_rows if model.output_bias else 0)
    return {"input_table": model.vocab_size * E, "output_table": output, "rest": others}


def trained_parameters(model: ModelConfig, adapter: AdapterConfig) -> int:
    """Count the trained parameters of an adapter: A and B of each layer's four matrices, and the gate."""
    D, F = model.hidden_dim, model.ffn_factor * model.hidden_dim
    layer = adapter.rank * (8 * D + 2 * F) + (4 if adapter.kind == "gated" else 0)
    gate = D * adapter.num_experts if adapter.kind == "ilora" else 0
    return model.num_layers * layer + gate


def everywhere(train: TrainConfig) -> bool:
    """Whether the head scores all places of the rows."""
    return train.objective == "seed_focal" or train.head_rows == "all"


def whole_rows(model: ModelConfig, train: TrainConfig) -> bool:
    """Whether the last layer computes all places of the rows, since nearly every one is a target."""
    return everywhere(train) or model.causal or train.visible_targets


# -- FLOPs ---------------------------------------------------------------------------------------------------
# Without norms, softmax, embeddings and the optimiser, as usual.


class Flops(NamedTuple):
    """Floating-point operations of training, by part."""

    encoder: int
    head: int

    @property
    def total(self) -> int:
        """Both parts."""
        return self.encoder + self.head


def layer_linear(model: ModelConfig, keys: int, queries: int) -> int:
    """Return forward FLOPs of one layer's linear maps for `keys` positions and `queries` queries."""
    D, F = model.hidden_dim, model.ffn_factor * model.hidden_dim
    return 2 * keys * D * 2 * D + 2 * queries * D * D * 2 + 2 * queries * D * F * 2


def linear_forward(model: ModelConfig, places: float, last: float) -> float:
    """Return forward FLOPs of the encoder's linear maps: T places, `last` (G) queries in the last layer."""
    before = (model.num_layers - 1) * layer_linear(model, 1, 1) * places
    return before + (layer_linear(model, 1, 0) * places + layer_linear(model, 0, 1) * last)


def encoder_forward(model: ModelConfig, rows: int, queries: int | None) -> int:
    """Return forward FLOPs of the encoder on (R, L) rows; `queries` is Q, None for all positions."""
    places = rows * model.max_len
    last = places if queries is None else rows * queries
    asking = (model.num_layers - 1) * places + last
    maps = linear_forward(model, places, last) + projection(model) * places
    return int(maps) + 4 * asking * model.max_len * model.hidden_dim


def projection(model: ModelConfig) -> int:
    """Return forward FLOPs per place of the projection between item table and encoder, 0 without one."""
    return 0 if model.table_dim is None else 2 * model.hidden_dim * model.table_dim


def head_forward(model: ModelConfig, slots: int, table_rows: int) -> int:
    """Return forward FLOPs of the head at `slots` places over `table_rows` of the output table."""
    D = model.hidden_dim
    before = (2 * D * D if model.head == "mlp" else 0) + projection(model)
    return slots * (before + 2 * model.table_width * table_rows)


def executed(model: ModelConfig, train: TrainConfig, batch: Batch) -> Flops:
    """Count one training pass over `batch` as it is laid out, padding included."""
    rows, L = batch.items.shape
    queries = None if whole_rows(model, train) else int(batch.query_index.shape[1])
    slots = rows * L if everywhere(train) else len(batch.targets)
    table_rows = model.output_rows if train.objective == "seed_focal" else model.num_items
    if train.sampled:
        table_rows = train.num_negatives  # without the product with each target's row
    forward = encoder_forward(model, rows, queries), head_forward(model, slots, table_rows)
    return Flops(*((1 + BACKWARD) * part for part in forward))


def needed(model: ModelConfig, batch: Batch) -> Flops:
    """Count the FLOPs that the objective needs for `batch`: real items in the encoder, targets in the head.

    Attention is counted inside segments only.
    """
    segments = batch.segment_ids.numpy(force=True).astype(np.int64)
    by_row = segments + np.arange(len(segments))[:, None] * (int(segments.max(initial=0)) + 1)
    lengths = np.bincount(by_row[segments > 0])
    tokens, targets = batch.num_tokens, batch.num_targets
    target_rows = by_row.reshape(-1)[batch.target_places[:targets].numpy(force=True)]
    pairs = (model.num_layers - 1) * int((lengths**2).sum()) + int(lengths[target_rows].sum())
    maps = linear_forward(model, tokens, targets) + projection(model) * tokens
    encoder = int(maps) + 4 * pairs * model.hidden_dim
    forward = encoder, head_forward(model, targets, model.num_items)
    return Flops(*((1 + BACKWARD) * part for part in forward))


def total(parts: Sequence[Flops]) -> Flops:
    """Add up the counts of several micro-batches or steps."""
    return Flops(sum(part.encoder for part in parts), sum(part.head for part in parts))


def mfu(flops: float, seconds: float, label: str, precision: str) -> float | None:
    """Return FLOP/s over the device's dense peak; None on a CPU and for an unknown peak."""
    peak = hardware.peak_flops(label, precision)
    return None if peak is None else flops / seconds / peak


# -- shapes of batches ---------------------------------------------------------------------------------------

DRAWS = 24  # batches whose shapes are drawn
LARGEST = 1024  # sequences that are laid out; larger batches are extrapolated

_drawn: dict[tuple[object, ...], np.ndarray] = {}  # cached shapes


class Shapes(NamedTuple):
    """The shapes of a micro-batch: means over draws, or maxima."""

    rows: float
    queries: float  # Q, per row
    slots: float  # M
    targets: float  # slots with a target
    tokens: float  # real items


def mean_shapes(model: ModelConfig, train: TrainConfig, lengths: np.ndarray) -> Shapes:
    """Return the mean shapes of a micro-batch, which determine its time.

    `lengths` (users,) are those of the training histories. Raises `InputError` without any, and for one that
    is too short.
    """
    return Shapes(*_draws(model, train, lengths).mean(0).tolist())


def largest_shapes(model: ModelConfig, train: TrainConfig, lengths: np.ndarray) -> Shapes:
    """Return the maximum of each shape, which determine the memory."""
    return Shapes(*_draws(model, train, lengths).max(0).tolist())


def _draws(model: ModelConfig, train: TrainConfig, lengths: np.ndarray) -> np.ndarray:
    """Return the shapes (DRAWS, 5) of micro-batches; columns are those of `Shapes`."""
    lengths = np.asarray(lengths)
    if lengths.size == 0 or lengths.min() < 1 + int(model.causal):
        raise InputError("history lengths: expected one or more, each of at least 1 (2 for a causal model)")
    micro = train.micro_batch_size or train.batch_size
    count = min(micro, LARGEST)
    packing = (train.layout, train.bucket_steps)
    masking = (train.mask_prob, train.last_item_share, train.visible_targets)
    key = (model.max_len, model.causal, packing, masking, count, hash(lengths.tobytes()))
    if key not in _drawn:
        _drawn[key] = _lay_out(model, train, lengths, count)
    times = micro / count
    return _drawn[key] * [times, 1, times, times, times]


def _lay_out(model: ModelConfig, train: TrainConfig, lengths: np.ndarray, count: int) -> np.ndarray:
    rng, L, steps = np.random.default_rng(0), model.max_len, train.bucket_steps
    batches = []
    for _ in range(DRAWS):
        drawn = rng.choice(lengths, count, replace=len(lengths) < count)
        ends = np.cumsum(drawn)
        histories = Histories(np.ones(int(ends[-1]), dtype=np.int32), ends - drawn, ends)
        samples = cut(histories, np.arange(count), L + int(model.causal), None)
        if model.causal:
            batches.append(next_items(samples))
        else:
            marked = mask_cloze(samples, train.mask_prob, train.last_item_share, rng)
            batches.append(marked.masked(model.mask_id, train.visible_targets))
    packed = train.layout == "packed"
    spans = np.stack(
        [samples.lengths for samples in batches]
    )  # packing all at once takes a tenth of the time
    row_numbers = first_fit_decreasing(spans, L)[0] if packed else [np.arange(count)] * DRAWS
    shapes = []
    for samples, row in zip(batches, row_numbers, strict=True):
        rows = int(row.max()) + 1
        per_row = np.bincount(np.repeat(row, samples.lengths)[samples.is_target], minlength=rows)
        targets = int(per_row.sum())
        queries = min(bucket(int(per_row.max(initial=1)), steps), L)
        rows = bucket(rows, steps) if packed else rows
        shapes.append((rows, queries, bucket(targets, steps), targets, len(samples.tokens)))
    return np.array(shapes)


def _last_places(model: ModelConfig, train: TrainConfig, shapes: Shapes) -> float:
    """Return G, the number of queries in the last layer."""
    return shapes.rows * (model.max_len if whole_rows(model, train) else shapes.queries)


# -- parts of a step -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a step, forward and backward."""

    name: str
    kind: str  # product, attention, or the kind of elementwise part
    flops: float = 0.0
    bytes: float = 0.0  # through main memory, operands and results of every pass
    elements: float = 0.0  # of an elementwise part, forward
    operators: float = 0.0  # number of launches, forward and backward
    shape: tuple[float, float, float] = (0.0, 0.0, 0.0)  # (m, k, n) of a product, forward


def step_parts(
    model: ModelConfig,
    train: TrainConfig,
    shapes: Shapes,
    width: int = FP32,
    adapter: AdapterConfig | None = None,
) -> list[Part]:
    """Return the parts of an optimiser step whose micro-batches have these `shapes`.

    `width` is the bytes of a number in products and activations (2 under autocast to 16 bits). With `adapter`
    only the adapter is trained.
    """
    micros = train.batch_size // (train.micro_batch_size or train.batch_size)
    amounts = ("flops", "bytes", "elements", "operators")
    passes = [
        replace(part, **{name: micros * getattr(part, name) for name in amounts})
        for part in _pass_parts(model, train, shapes, width, adapter)
    ]
    count = parameters(model)
    P, table, tensors = sum(count.values()), count["input_table"], 16 * model.num_layers + 6
    if adapter is not None:  # frozen matrices are stored in the type of products: no cast in each step
        P, table, tensors = trained_parameters(model, adapter), 0, 8 * model.num_layers + 1
    table = 0 if model.tied else table  # a table with a sparse gradient
    loop, muon = train.optimizer == "loop", []
    if train.optimizer == "muon" and adapter is None:
        muon = [_muon_part(model)]
        P -= int(muon[0].elements)
    casts = 2 * (FP32 + HALF) * P if width == HALF else 0  # weights to 16 bits and gradients back
    return [
        *passes,
        *muon,
        Part("AdamW", "update", 0.0, 28 * P * (3 if loop else 1), P, 12 * tensors if loop else 4),
        Part("gradient norm", "norm of gradients", 0.0, FP32 * (P - table), P - table, tensors + 6),
        Part("clear gradients, cast weights", "clear", 0.0, FP32 * table + casts, table, 4),
    ]


def _muon_part(model: ModelConfig) -> Part:
    """Return Muon's step of the encoder's matrices: five Newton-Schulz iterations of three products each."""
    D, F = model.hidden_dim, model.ffn_factor * model.hidden_dim
    shapes = model.num_layers * [(D, 3 * D), (D, D), (D, F), (D, F)] + [(D, D)] * (model.head == "mlp")
    flops = sum(5 * 2 * m * m * (2 * n + m) for m, n in shapes)
    elements = sum(m * n for m, n in shapes)
    return Part("Muon", "product", flops, (20 + 5 * 4 * HALF) * elements, elements, 30 * len(shapes))


def _pass_parts(
    model: ModelConfig, train: TrainConfig, shapes: Shapes, width: int, adapter: AdapterConfig | None
) -> list[Part]:
    """Return the parts of one micro-batch, forward and backward."""
    D, F, L, N = model.hidden_dim, model.ffn_factor * model.hidden_dim, model.max_len, model.num_layers
    E, between = model.table_width, projection(model)
    T, G = shapes.rows * L, _last_places(model, train, shapes)
    full, full_layers = 1 + BACKWARD, N - 1  # `full_layers`: layers that compute all places
    asking = full_layers * T + G  # number of queries, over all layers
    moved = full_layers * (T * (6 * D + 2 * F)) + T * 3 * D + G * (5 * D + 2 * F)
    weights = N * (4 * D * D + 2 * D * F)
    norms = 2 * asking + T * int(model.embedding_norm) + G * int(model.final_norm)
    dropped = (2 * asking + T) * D if model.dropout else 0.0
    weighted = asking * L * model.num_heads  # attention probabilities, which fused kernels never store
    stored = weighted if model.attention_dropout else 0.0
    maps, passes, looked_up = full * (linear_forward(model, T, G) + between * T), full, T * E
    moved += T * (D + E) if between else 0
    adapter_parts = []
    if adapter is not None:  # no gradients of weights, of the first maps' input and of the looked-up table
        first = 2 * 3 * D * D * T if full_layers else 2 * D * D * (2 * T + G)
        maps, passes, looked_up = 2 * linear_forward(model, T, G) - first + between * T, 2, T * E / 2
        adapter_parts = _adapter_parts(model, adapter, T, G, width)

    items = model.output_rows if train.objective == "seed_focal" else model.num_items
    items = train.num_negatives + 1 if train.sampled else items
    scored = T if everywhere(train) else shapes.slots
    logits = scored * items
    # In place: product writes, log-softmax, exponential and subtraction in cache, two products read.
    # Elsewhere logits are widened to fp32, read for the loss, and their gradient written and read.
    logit_bytes = 6 * FP32 if width == FP32 else 4 * width + 5 * FP32
    inplace = train.loss in ("auto", "inplace") and not everywhere(train)
    return [
        Part("encoder: linear maps", "product", maps, passes * width * (moved + weights), 0.0,
             N * 4 * (4 if adapter is None else 2), (T, D, F)),
        Part("encoder: attention", "attention", full * 4 * asking * L * D,
             full * width * (2 * full_layers * T + T + G) * 2 * D + 8 * FP32 * stored,
             asking * L * D, N * 12),
        Part("GELU", "gelu", 0.0, 5 * width * asking * F, asking * F, N * 2),
        Part("dropout", "dropout", 0.0, 8 * width * dropped, dropped, (2 * N + 1) * 4),
        Part("LayerNorm", "norm", 0.0, 5 * FP32 * norms * D, norms * D, 2 * (2 * N + 2)),
        Part("residuals", "add", 0.0, 6 * width * (2 * asking + T) * D, (2 * asking + T) * D, N * 6),
        Part("look up items", "lookup", 0.0, 4 * FP32 * looked_up, looked_up, 12),
        *adapter_parts,
        Part("head: products", "product", passes * head_forward(model, 1, items) * scored,
             passes * width * (items * E + scored * E + logits), 0.0, 8, (scored, E, items)),
        Part("head: softmax and loss", "softmax" if inplace else "logits", 0.0,
             logit_bytes * logits * (1 if inplace else 2), logits, 20),
    ]  # fmt: skip


def _adapter_parts(model: ModelConfig, adapter: AdapterConfig, T: float, G: float, width: int) -> list[Part]:
    """Return A and B of every matrix, and the gate of `ilora`; memory passes dominate.

    If the last layer has fewer queries than places, queries and keys are adapted separately there.
    """
    D, F, L, N = model.hidden_dim, model.ffn_factor * model.hidden_dim, model.max_len, model.num_layers
    before, apart = (N - 1) * (8 * D + 2 * F) * T, G != T
    ends = T * (3 * D) + G * (2 * D) if apart else T * (4 * D)  # of queries, keys and values
    first = T * D + (G * D if apart and N == 1 else 0)  # maps without gradients of their input
    gate = T * (2 * D * (L + 2 * adapter.num_experts) + projection(model)) if adapter.kind == "ilora" else 0.0
    flops = 2 * adapter.rank * (3 * (before + ends + G * (4 * D + 2 * F)) - first) + gate
    elements = before + 3 * D * T + (6 * D + 2 * F) * G
    parts = [Part("adapters", "add", flops - gate, 4 * width * elements, elements, 14 * (4 * N + 1))]
    if gate:
        read = T * (3 * L + 2 * D)
        parts.append(Part("gate", "add", gate, 2 * FP32 * read, read, 60))
    return parts


# -- memory at the peak --------------------------------------------------------------------------------------

LARGE_LOGITS_BYTES = 512 * 2**20  # of logits that any CUDA device holds whole; see `logits_limit`
SMALLEST_SINK = 8 * 2**20  # bytes of the smallest table with a gradient sink (as in `bert4rec`)


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a step, by part."""

    parts: Mapping[str, int]
    held: int = 0  # of activations of all layers at the start of backward
    layer: int = 0  # of the first layer at the end of backward

    def resident(self, heap: Mapping[str, float]) -> int:
        """Return the resident bytes of a CPU process for these tensors, without libraries.

        The C library keeps freed memory and leaves gaps: `heap` has measured factors for `held` and `layer`
        (see params/calibration.yaml).
        """
        fixed = self.total - self.parts["activations"]
        return int(fixed + heap["held"] * self.held + heap["layer"] * self.layer)

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def training_memory(
    model: ModelConfig,
    train: TrainConfig,
    lengths: np.ndarray | Shapes,
    precision: str = "fp32",
    device_type: str = "cuda",
    adapter: AdapterConfig | None = None,
    memory_bytes: int | None = None,
) -> Footprint:
    """Return the bytes of tensors at the peak of a step, without interpreter and libraries.

    `lengths` (users,) are those of the training histories, or the shapes of a micro-batch; `precision` is
    fp32, tf32, bf16 or fp16; `device_type` is "cpu" or "cuda"; `memory_bytes` of the device determines the
    route of the loss. With `adapter` only the adapter is trained.

    On a CPU the loss has one buffer of logits, and large tables have gradient sinks; on CUDA gradients are
    new in every step and weights have 16-bit copies.
    """
    shapes = lengths if isinstance(lengths, Shapes) else largest_shapes(model, train, lengths)
    width, count, N = number_bytes(precision), parameters(model), model.num_layers
    P, T, G = sum(count.values()), shapes.rows * model.max_len, _last_places(model, train, shapes)
    held, first = _activations(model, train, shapes, width)
    if adapter is None:
        trained, weights, table = P, FP32 * P, FP32 * count["input_table"]
        sunk = device_type == "cpu" and width == FP32 and not everywhere(train) and table >= SMALLEST_SINK
        # Gradients of the encoder, and of a table that is only looked up, are allocated while activations are
        # freed: at the peak only the last layer has its own. A tied table has the lookup's gradient as well.
        late = FP32 * count["rest"] * (1 - 1 / N) + (0 if model.tied or sunk else table)
        peak = max(held - late, first + (table if model.tied and not sunk else 0))
    else:  # frozen matrices are stored in the type of products
        trained = trained_parameters(model, adapter)
        weights = width * P + FP32 * trained
        gate = T * (model.max_len + adapter.rank) if adapter.kind == "ilora" else 0.0
        scaled = 2 * 4 * adapter.rank * ((N - 1) * T + G)  # A x of four matrices, and its scaled copy
        held += width * (scaled + trained + gate)
        peak = max(held, first)
    # Muon keeps one number for each parameter, and AdamW two.
    alone = _muon_part(model).elements if train.optimizer == "muon" and adapter is None else 0
    parts = {
        "weights": weights,
        "gradients": FP32 * trained,
        "optimizer": FP32 * (2 * trained - int(alone)),
        "activations": int(peak),
        "logits": int(_logits(model, train, shapes, width, device_type, memory_bytes)),
        "16-bit weights": HALF * trained if width == HALF else 0,
    }
    return Footprint(parts, int(held), int(first))


def _activations(model: ModelConfig, train: TrainConfig, shapes: Shapes, width: int) -> tuple[float, float]:
    """Return the bytes of activations at the start of backward (all layers) and at its end (the first)."""
    D, F, L, N = model.hidden_dim, model.ffn_factor * model.hidden_dim, model.max_len, model.num_layers
    T, G = shapes.rows * L, _last_places(model, train, shapes)
    drop = int(model.dropout > 0)
    # A layer keeps q, k, v, attention's output, two residual sums, two norms, the inner width twice, and the
    # factors of dropout.
    layer = 8 * D + 2 * F + 2 * drop * D
    last = T * 3 * D + G * (8 * D + 2 * F + 2 * drop * D)
    stored = (N - 1) * T * layer + last + T * D * (2 + drop + int(model.embedding_norm))
    probabilities = (N - 1) * T * L + G * L
    stored += 3 * model.num_heads * probabilities if model.attention_dropout else 0
    head = shapes.slots * D * (2 + (4 + drop if model.head == "mlp" else 0))
    head += 0 if model.table_dim is None else (shapes.slots + T) * model.table_dim
    wide = 2 * F + 3 * D  # of temporary gradients in a layer
    passing = max(G * wide, T * wide - last if N > 1 else 0.0)  # the second: after the last layer is freed
    fixed = FP32 * (T * L + (0 if G == T else G * L)) + 5 * 8 * T  # attention bias, indices
    first = T * (layer + wide) if N > 1 else last + G * wide
    return width * (stored + head + passing) + fixed, width * first + fixed


def _logits(
    model: ModelConfig, train: TrainConfig, shapes: Shapes, width: int, device_type: str, memory: int | None
) -> float:
    if train.sampled:
        return 4 * FP32 * shapes.slots * (train.num_negatives + 1)
    if everywhere(train):
        places = shapes.rows * model.max_len * model.output_rows
        if train.objective == "seed_focal":  # with a copy of real places, their softmax and gradients
            return places * (width + FP32) + 3 * FP32 * shapes.tokens * model.output_rows
        return places * (width if width == FP32 else width + FP32)
    elements = shapes.slots * model.num_items
    if device_type == "cpu" and train.loss in ("auto", "inplace"):
        return width * elements
    if train.loss == "fused":  # logits and their gradient; intermediate values are in registers
        return 2 * width * elements
    plain = elements * (FP32 * 3 if width == FP32 else 2 * HALF + 2 * FP32)
    fits = train.loss == "auto" and FP32 * elements <= logits_limit(memory)
    if train.loss == "plain" or fits:
        return plain
    return min(plain, LARGE_LOGITS_BYTES + width * model.num_items * model.table_width)


def logits_limit(memory_bytes: int | None) -> int:
    """Return the bytes of fp32 logits above which a CUDA device computes them in chunks.

    It is a sixteenth of the memory, at least 512 MiB, which is also the value for unknown memory. Each chunk
    reads the output table again, so that large devices should not need chunks at usual batches.
    """
    return max(LARGE_LOGITS_BYTES, (memory_bytes or 0) // 16)


# -- fitting into memory -------------------------------------------------------------------------------------

CONTEXT_BYTES = 700 * 2**20  # of CUDA's context and libraries, not counted by torch; assumed
USABLE = 0.95  # share of a device's memory that is not lost to fragmentation; assumed

# Memory limits of containers on Linux: control groups of version 2 and 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_bytes() -> int:
    """Return the memory of this machine, or the limit of its container."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    limits = [file.read_text().strip() for file in LIMITS if file.is_file()]
    return min(sizes + [int(text) for text in limits if text.isdecimal()])


def usable(memory_bytes: int, device_type: str) -> int:
    """Return the bytes of a device's memory that are available for tensors."""
    return int(USABLE * memory_bytes) - (CONTEXT_BYTES if device_type == "cuda" else 0)


def largest_batch(
    total: Callable[[TrainConfig], int], train: TrainConfig, room: int, most: int = 1 << 20
) -> int:
    """Return the largest power of two as batch size whose `total` of bytes in one pass fits, 0 if none."""
    fits, size = 0, 1
    while size <= most and total(changed(train, batch_size=size, micro_batch_size=None)) <= room:
        fits, size = size, 2 * size
    return fits


def ways_to_fit(
    total: Callable[[ModelConfig, TrainConfig], int], model: ModelConfig, train: TrainConfig, room: int
) -> str:
    """Return advice: which single changes of a training make its `total` of bytes fit into `room`."""
    micro = largest_batch(lambda smaller: total(model, smaller), train, room, train.batch_size)
    ways = [f"micro_batch_size={micro}"] if micro and train.batch_size % micro == 0 else []
    half = max(2, model.hidden_dim // 4 * 2)
    heads = model.num_heads if half % model.num_heads == 0 else 1
    tried = {"tied=True": (changed(model, tied=True), train)}
    if train.objective != "seed_focal":
        tried["loss=sampled_softmax"] = model, changed(train, loss="sampled_softmax", head_rows="targets")
    tried[f"hidden_dim={half}"] = changed(model, hidden_dim=half, num_heads=heads), train
    ways += [name for name, pair in tried.items() if pair != (model, train) and total(*pair) <= room]
    if ways:
        return "any of these alone makes it fit: " + ", ".join(ways)
    return "no single change of micro_batch_size, tied, loss or hidden_dim makes it fit: take a smaller size"


def require_fit(
    model: ModelConfig,
    train: TrainConfig,
    lengths: np.ndarray,
    memory_bytes: int,
    precision: str = "fp32",
    device_type: str = "cuda",
) -> Footprint:
    """Return the footprint if it fits into `memory_bytes`; else raise `InputError` with advice."""

    def memory(model: ModelConfig, train: TrainConfig) -> Footprint:
        return training_memory(model, train, lengths, precision, device_type, None, memory_bytes)

    size, room = memory(model, train), usable(memory_bytes, device_type)
    if size.total <= room:
        return size
    parts = ", ".join(f"{name} {part / GIB:.2f}" for name, part in size.parts.items() if part)
    raise InputError(
        f"this does not fit: estimated {size.total / GIB:.2f} GiB ({parts}) of {room / GIB:.2f} usable; "
        + ways_to_fit(lambda *pair: memory(*pair).total, model, train, room)
    )


def demand_room(
    model: ModelConfig,
    config: TrainConfig,
    histories: Histories,
    device: Device,
    room: int | None = None,
    processes: int = 1,
) -> Footprint:
    """Return the estimated peak of a training; raise `InputError` with advice if it does not fit.

    `room` is the memory in bytes, by default the device's. The estimate is for one of `processes`, which
    divide a batch. Nothing is allocated.
    """
    lengths = histories.lengths[histories.lengths > int(model.causal)]  # the others train nothing
    if config.batch_size % processes:
        raise InputError(
            f"nproc={processes} does not divide batch_size={config.batch_size}: give a batch_size such as "
            f"{-(-config.batch_size // processes) * processes}"
        )
    if config.micro_batch_size is None:
        config = changed(config, micro_batch_size=config.batch_size // processes)
    precision = choose_precision(config.precision, device.card).name
    room = (device.card.memory_bytes or machine_bytes()) if room is None else room
    return require_fit(model, config, lengths, room, precision, device.torch_device.type)
