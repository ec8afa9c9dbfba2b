"""What one training step is made of, without a model or a device: rows, targets, products, passes, bytes.

The batches of a run are laid out as `batches` would, over a dataset's history lengths; from their shapes
follow the step's parts, each with its FLOPs, the bytes that it moves through main memory and how many
operators it starts. Counts are of forward and backward together.

Shapes: T = R L places of the rows, G = R Q places that go on in the last layer, M places in the head, I real
items, D hidden_dim, F inner width, H heads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import dataclasses as validated
from pydantic import model_validator

from reclib import hardware
from reclib.config import STRICT, InputError, ModelConfig, Positive, TrainConfig, changed
from reclib.data.batches import Samples, bucket, cut, first_fit_decreasing, mask_cloze, next_items
from reclib.data.dataset import Histories
from reclib.hardware import GIB, Device, choose_precision

if TYPE_CHECKING:
    from reclib.data.batches import Batch


# ------------------------------------------------------------------------------------------------
# Training FLOPs of a step, counted from its shapes, and what share of a device's peak they are.
#
# A product of (m, k) and (k, n) is 2 m k n. Backward costs twice forward, since each product has two
# gradients. Norms, softmax, embeddings and the optimiser are left out, as is the custom. Two counts are
# kept apart: what was executed (rows and slots as laid out, padding included) and what the objective needs
# (real items and targets alone).
#
# Shapes: R rows, L positions, Q queries of a row, M places in the head, D hidden_dim, F inner width, N
# layers.

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
    peak = hardware.peak_flops(label, precision)
    return None if peak is None else flops / seconds / peak


# ------------------------------------------------------------------------------------------------
# What a step costs when the model is frozen and adapters on its encoder are trained, counted without torch.
#
# A frozen map has no gradient of its weights: of its three products two remain, and of the first layer's
# keys, queries and values one, since nothing below them is trained. Of the head's table two remain. Each
# adapter adds narrow products beside the map that it adapts, and `ilora` a gate on the mean of the visible
# items.
#
# Checked against what torch counts on the adapted model itself (`tests/test_adapter_plan.py`). Only
# adapters on all encoder matrices are planned for, the default of `config.AdapterConfig`.
#
# Letters as in `work`, with r rank and K experts.

MATRICES = 4  # of a layer that have an adapter: keys, queries and values in one, what follows them, up, down


@validated.dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterPlan:
    """An adapter on all encoder matrices of a frozen model."""

    kind: Literal["lora", "rslora", "gated", "ilora"] = "lora"
    rank: Positive = 8  # r
    num_experts: Positive = 4  # K, of `ilora`

    @model_validator(mode="after")
    def _experts_divide(self) -> AdapterPlan:
        if self.kind == "ilora" and self.rank % self.num_experts:
            raise ValueError(f"rank={self.rank} must be divisible by num_experts={self.num_experts}")
        return self


def trained_parameters(model: ModelConfig, adapter: AdapterPlan) -> int:
    """Count what is trained: A and B of every matrix, and the gate."""
    D, F = model.hidden_dim, model.ffn_factor * model.hidden_dim
    layer = adapter.rank * (8 * D + 2 * F) + (MATRICES if adapter.kind == "gated" else 0)
    gate = D * adapter.num_experts if adapter.kind == "ilora" else 0
    return model.num_layers * layer + gate


def frozen_linear(model: ModelConfig, places: float, last: float) -> float:
    """Return FLOPs of the frozen encoder's linear maps, forward and the gradient of what enters them.

    `places` T go through every layer but the last, where `last` G go on.
    """
    D, both = model.hidden_dim, model.num_layers - 1
    forward = both * layer_linear(model, 1, 1) * places
    forward += layer_linear(model, 1, 0) * places + layer_linear(model, 0, 1) * last
    first = 2 * 3 * D * D * places if both else 2 * D * D * (2 * places + last)
    return 2 * forward - first


def adapter_products(model: ModelConfig, adapter: AdapterPlan, places: float, last: float) -> float:
    """Return FLOPs of A and B of every matrix, forward and both gradients, and of the gate.

    In the last layer queries and keys are adapted apart where fewer places ask than are there.
    """
    D, F, r = model.hidden_dim, model.ffn_factor * model.hidden_dim, adapter.rank
    layer = 8 * D + 2 * F  # (in + out) of its matrices
    apart = last != places
    ends = places * (3 * D) + last * (2 * D) if apart else places * (4 * D)  # of queries, keys and values
    forward = (model.num_layers - 1) * layer * places + ends + last * (4 * D + 2 * F)
    first = places * D + (last * D if apart and model.num_layers == 1 else 0)  # whose input is not trained
    return 2 * r * (3 * forward - first) + gate_products(model, adapter, places)


def gate_products(model: ModelConfig, adapter: AdapterPlan, places: float) -> float:
    """Return FLOPs of `ilora`'s gate: means over segments, W forward and its gradient."""
    if adapter.kind != "ilora":
        return 0.0
    return 2 * places * model.hidden_dim * (model.max_len + 2 * adapter.num_experts)


def adapter_elements(model: ModelConfig, places: float, last: float) -> float:
    """Return the elements that adapters read and add to beside their maps, forward: in and out of each."""
    D, F = model.hidden_dim, model.ffn_factor * model.hidden_dim
    return (model.num_layers - 1) * (8 * D + 2 * F) * places + 3 * D * places + (6 * D + 2 * F) * last


def adapter_bytes(model: ModelConfig, adapter: AdapterPlan, places: float, last: float, width: int) -> float:
    """Return the bytes that activations of the adapters hold: A x, scaled, and B turned round."""
    asked = (model.num_layers - 1) * places + last
    turned = trained_parameters(model, adapter)
    gate = places * (model.max_len + adapter.rank) if adapter.kind == "ilora" else 0.0
    return width * (2 * MATRICES * adapter.rank * asked + turned + gate)


# ------------------------------------------------------------------------------------------------

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
    full, both = 1 + BACKWARD, N - 1  # layers that compute everything
    asked = both * T + G  # places that ask, over all layers
    linear = both * layer_linear(model, 1, 1) * T
    linear += layer_linear(model, 1, 0) * T + layer_linear(model, 0, 1) * G
    moved = both * (T * (6 * D + 2 * F)) + T * 3 * D + G * (5 * D + 2 * F)
    weights = N * (4 * D * D + 2 * D * F)
    norms = 2 * asked + T * int(model.embedding_norm) + G * int(model.final_norm)
    dropped = (2 * asked + T) * D if model.dropout else 0.0
    weighted = asked * L * model.num_heads  # attention probabilities, which fused kernels never store
    stored = weighted if model.attention_dropout else 0.0
    maps, passes, looked_up = full * linear, full, T * D
    if adapter is not None:  # no gradient of weights, none of the table that is looked up
        maps, passes, looked_up = frozen_linear(model, T, G), 2, T * D / 2
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
    elements = adapter_elements(model, T, G)
    gate = gate_products(model, adapter, T)
    products = adapter_products(model, adapter, T, G) - gate
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
    passes_of = 1 + BACKWARD if adapter is None else 2  # a frozen table has no gradient
    work = passes_of * head_forward(model, 1, items) * scored
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
        P, table, tensors = trained_parameters(model, adapter), 0, 8 * model.num_layers + 1
    loop = train.optimizer == "loop"
    casts = 2 * (FP32 + HALF) * P if width == HALF else 0  # weights to 16 bits and gradients back
    return [
        Part("AdamW", "update", 0.0, 28 * P * (3 if loop else 1), P, 12 * tensors if loop else 4),
        Part("gradient norm", "norm of gradients", 0.0, FP32 * (P - table), P - table, tensors + 6),
        Part("clear gradients, cast weights", "clear", 0.0, FP32 * table + casts, table, 4),
    ]


# ------------------------------------------------------------------------------------------------
# How many bytes training holds at its peak, by part, and a refusal before they are asked for.
#
# `memory` computes them from the configurations alone, on the CPU's path of the loss (one buffer of logits,
# tables with a gradient that stays) or on CUDA's (fresh gradients, 16-bit copies of the weights). Checked
# against what the profiler counts and against the resident peak of processes (`benchmarks/planner.py`); on
# CUDA unvalidated.
#
# Letters as in `work`.

STATE = ("weights", "gradients", "optimizer")

SPARE = 1.125  # of the logits' buffer: what is asked for beyond the first batch's need

LARGE_LOGITS_BYTES = (
    512 * 2**20
)  # of logits that are not made in chunks on any CUDA device; see `logits_limit`

CONTEXT_BYTES = 700 * 2**20  # of CUDA's context and libraries, outside torch's count; assumed

SMALLEST_SINK = 8 * 2**20  # bytes of a table whose gradient stays where it is, on a CPU (as in `bert4rec`)

# Where Linux says what a container may take of the machine's memory: control groups of version 2 and 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

USABLE = 0.95  # of a device's memory: the rest is lost to fragments; assumed


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak of a step, by part."""

    parts: Mapping[str, int]
    held: int = 0  # by all layers as backward begins
    layer: int = 0  # by the first one as backward ends

    def resident(self, heap: Mapping[str, float]) -> int:
        """Return what a CPU's process holds for them, libraries apart.

        Its C library keeps what was freed and does not fill every gap: `heap` says how many times what layers
        hold, and what one layer passes on, stay resident (measured; see params/calibration.yaml).
        """
        fixed = self.total - self.parts["activations"]
        return int(fixed + heap["held"] * self.held + heap["layer"] * self.layer)

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())

    @property
    def state(self) -> int:
        """What is there whatever the batch: weights, gradients, the optimiser's moments."""
        return sum(self.parts[name] for name in STATE)


def training_memory(
    model: ModelConfig,
    train: TrainConfig,
    lengths: np.ndarray,
    precision: str = "fp32",
    device_type: str = "cuda",
    adapter: AdapterPlan | None = None,
    memory_bytes: int | None = None,
) -> Footprint:
    """Return what tensors take at the peak of a step, in bytes.

    `lengths` (users,) are interactions of the histories trained on; `precision` is fp32, tf32, bf16 or fp16;
    `device_type` "cpu" or "cuda", with `memory_bytes` in all, which the route of the loss goes by. With
    `adapter` the model is frozen and only that is trained. Interpreter and libraries are not in it.
    """
    one = largest_shapes(model, train, lengths)
    return at_shapes(model, train, one, precision, device_type, adapter, memory_bytes)


def logits_limit(memory_bytes: int | None) -> int:
    """Return how many bytes of fp32 logits a CUDA device with so much memory holds whole: a sixteenth of it.

    Above it they are made in chunks. Chunks read the output table again each time, so that a large card is
    spared them at the batches that it is bought for; 512 MiB at least, and where the memory is not known.
    """
    return max(LARGE_LOGITS_BYTES, (memory_bytes or 0) // 16)


def at_shapes(
    model: ModelConfig,
    train: TrainConfig,
    one: Shapes,
    precision: str,
    device_type: str,
    adapter: AdapterPlan | None = None,
    memory_bytes: int | None = None,
) -> Footprint:
    """Return what tensors take at the peak of a step whose micro-batches have the shapes `one`."""
    width = HALF if precision in ("bf16", "fp16") else FP32
    if adapter is not None:
        return _frozen(model, train, one, width, device_type, adapter, memory_bytes)
    count = parameters(model)
    P = sum(count.values())
    table = FP32 * count["input_table"]
    sunk = device_type == "cpu" and width == FP32 and not everywhere(train) and table >= SMALLEST_SINK
    # Gradients of the encoder, and of a table that is only looked up, come as activations go. At the peak the
    # last layer has its own.
    late = FP32 * count["rest"] * (1 - 1 / model.num_layers) + (0 if model.tied or sunk else table)
    held, first = activations(model, train, one, width)
    end = first + (table if model.tied and not sunk else 0)  # the lookup's gradient, before it is added
    parts = {
        "weights": FP32 * P,
        "gradients": FP32 * P,
        "optimizer": 2 * FP32 * P,
        "activations": max(held - late, end),
        "logits": _logits(model, train, one, width, device_type, memory_bytes),
        "16-bit weights": HALF * P if width == HALF else 0,
    }
    whole = {name: int(size) for name, size in parts.items()}
    return Footprint(whole, int(held), int(first))


def _frozen(
    model: ModelConfig,
    train: TrainConfig,
    one: Shapes,
    width: int,
    device_type: str,
    adapter: AdapterPlan,
    memory_bytes: int | None,
) -> Footprint:
    """Return the footprint of a frozen model: only the adapters have gradients and moments.

    Its matrices are held in the type that products run in, and are cast no more (`Adapters.hold_frozen`).
    """
    P, trained = sum(parameters(model).values()), trained_parameters(model, adapter)
    places = one.rows * model.max_len
    last = places if everywhere(train) or model.causal else one.rows * one.queries
    held, first = activations(model, train, one, width)
    held += adapter_bytes(model, adapter, places, last, width)
    parts = {
        "weights": width * P + FP32 * trained,
        "gradients": FP32 * trained,
        "optimizer": 2 * FP32 * trained,
        "activations": max(held, first),
        "logits": _logits(model, train, one, width, device_type, memory_bytes),
        "16-bit weights": HALF * trained if width == HALF else 0,
    }
    whole = {name: int(size) for name, size in parts.items()}
    return Footprint(whole, int(held), int(first))


def activations(model: ModelConfig, train: TrainConfig, one: Shapes, width: int) -> tuple[float, float]:
    """Return the bytes held as backward begins and as it ends: all layers', and the first one's."""
    D, F, L, N = model.hidden_dim, model.ffn_factor * model.hidden_dim, model.max_len, model.num_layers
    T = one.rows * L
    G = T if everywhere(train) or model.causal else one.rows * one.queries
    drop = int(model.dropout > 0)
    # A layer keeps q, k, v, what attention gives, two residual sums, two norms, and the inner width twice;
    # of dropout its factors (one byte on CUDA would do; four on a CPU).
    layer = 8 * D + 2 * F + 2 * drop * D
    last = T * 3 * D + G * (8 * D + 2 * F + 2 * drop * D)
    kept = (N - 1) * T * layer + last + T * D * (2 + drop + int(model.embedding_norm))
    probabilities = (N - 1) * T * L + G * L
    kept += 3 * model.num_heads * probabilities if model.attention_dropout else 0
    head = one.slots * D * (2 + (4 + drop if model.head == "mlp" else 0))
    wide = 2 * F + 3 * D  # of gradients on their way through a layer
    passing = max(G * wide, T * wide - last if N > 1 else 0.0)  # the second: the last layer is gone by then
    fixed = FP32 * (T * L + (0 if G == T else G * L)) + 5 * 8 * T  # attention bias, indices
    first = T * (layer + wide) if N > 1 else last + G * wide
    return width * (kept + head + passing) + fixed, width * first + fixed


def _logits(
    model: ModelConfig,
    train: TrainConfig,
    one: Shapes,
    width: int,
    device_type: str,
    memory_bytes: int | None,
) -> float:
    if train.sampled:
        return 4 * FP32 * one.slots * (train.num_negatives + 1)
    if everywhere(train):
        places = one.rows * model.max_len * model.output_rows
        if train.objective == "seed_focal":  # held, with a copy of real places, their softmax and gradients
            return places * (width + FP32) + 3 * FP32 * one.tokens * model.output_rows
        return places * (width if width == FP32 else width + FP32)
    elements = one.slots * model.num_items
    if device_type == "cpu" and train.loss in ("auto", "inplace"):
        return width * elements
    plain = elements * (FP32 * 3 if width == FP32 else 2 * HALF + 3 * FP32)
    held = train.loss == "auto" and FP32 * elements <= logits_limit(memory_bytes)
    if train.loss in ("plain", "fused") or held:
        return plain
    return min(plain, LARGE_LOGITS_BYTES + width * model.num_items * model.hidden_dim)


def machine_bytes() -> int:
    """Return the memory of this machine, or what its container may take of it."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in LIMITS:
        text = file.read_text().strip() if file.is_file() else ""
        found = min(found, int(text)) if text.isdecimal() else found
    return found


def usable(memory_bytes: int, device_type: str) -> int:
    """Return how much of a device's memory training's tensors can take."""
    return int(USABLE * memory_bytes) - (CONTEXT_BYTES if device_type == "cuda" else 0)


def side_by_side(totals: Iterable[int], memory_bytes: int, device_type: str) -> int:
    """Return how many trainings, taken in the order of their `totals` of bytes, fit on a device at once.

    Each is a process of its own, on CUDA with a context of its own.
    """
    room, count = int(USABLE * memory_bytes), 0
    for total in totals:
        room -= total + (CONTEXT_BYTES if device_type == "cuda" else 0)
        if room < 0:
            break
        count += 1
    return count


def largest_batch(
    model: ModelConfig,
    train: TrainConfig,
    lengths: np.ndarray,
    memory_bytes: int,
    precision: str = "fp32",
    device_type: str = "cuda",
    most: int = 1 << 20,
    adapter: AdapterPlan | None = None,
) -> int:
    """Return the largest batch, of the powers of two, that fits in one pass; 0: not even one sequence."""
    room, fits, size = usable(memory_bytes, device_type), 0, 1
    while size <= most:
        one = changed(train, batch_size=size, micro_batch_size=None)
        if training_memory(model, one, lengths, precision, device_type, adapter, memory_bytes).total > room:
            break
        fits, size = size, 2 * size
    return fits


def require_fit(
    model: ModelConfig,
    train: TrainConfig,
    lengths: np.ndarray,
    memory_bytes: int,
    precision: str = "fp32",
    device_type: str = "cuda",
) -> Footprint:
    """Return the footprint where it fits into `memory_bytes`; else raise `InputError` with what to change.

    To be called before anything is allocated.
    """
    found = training_memory(model, train, lengths, precision, device_type, memory_bytes=memory_bytes)
    room = usable(memory_bytes, device_type)
    if found.total <= room:
        return found
    sized = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.parts.items() if size)
    raise InputError(
        f"this does not fit: estimated {found.total / GIB:.2f} GiB ({sized}) of {room / GIB:.2f} usable; "
        + ways_to_fit(model, train, lengths, memory_bytes, precision, device_type)
    )


def ways_to_fit(
    model: ModelConfig,
    train: TrainConfig,
    lengths: np.ndarray,
    memory_bytes: int,
    precision: str,
    device_type: str,
) -> str:
    """Say which changes of a training of all weights, each alone, make it fit."""
    room = usable(memory_bytes, device_type)
    said = []
    micro = largest_batch(model, train, lengths, memory_bytes, precision, device_type, train.batch_size)
    if micro and train.batch_size % micro == 0:
        said.append(f"micro_batch_size={micro}")
    tried = {"tied=True": (changed(model, tied=True), train)}
    if train.objective != "seed_focal":
        sampled = changed(train, loss="sampled_softmax", head_rows="targets")
        tried["loss=sampled_softmax"] = (model, sampled)
    tried[f"hidden_dim={model.hidden_dim // 2}"] = (_narrower(model), train)
    for name, (smaller, recipe) in tried.items():
        same = (smaller, recipe) == (model, train)
        needed = training_memory(
            smaller, recipe, lengths, precision, device_type, memory_bytes=memory_bytes
        ).total
        if not same and needed <= room:
            said.append(name)
    if not said:
        return (
            "no single change of micro_batch_size, tied, loss or hidden_dim makes it fit: take a smaller size"
        )
    return "any of these alone makes it fit: " + ", ".join(said)


def _narrower(model: ModelConfig) -> ModelConfig:
    half = model.hidden_dim // 2
    heads = model.num_heads if half % model.num_heads == 0 else 1
    return changed(model, hidden_dim=max(2, half // 2 * 2), num_heads=heads)


# ------------------------------------------------------------------------------------------------
# Whether a training fits into the memory of the device at hand, asked before anything is allocated.


def device_bytes(device: Device) -> int:
    """Return the memory of a device in bytes, for a CPU what the machine or its container has."""
    return device.card.memory_bytes or machine_bytes()


def demand_room(
    model: ModelConfig,
    config: TrainConfig,
    histories: Histories,
    device: Device,
    room: int | None = None,
    processes: int = 1,
) -> Footprint:
    """Return the estimated peak of a training; raise `InputError` that says what to change.

    `room` is the memory in bytes, None: what the device has. Of several `processes`, which divide a batch, it
    is one's. Nothing is allocated.
    """
    kind, lengths = device.torch_device.type, histories.ends - histories.starts
    lengths = lengths[lengths > int(model.causal)]  # the others train nothing
    if room is None:
        room = device_bytes(device)
    precision = choose_precision(config.precision, device.card).name
    if processes > 1 and config.micro_batch_size is None:
        config = changed(config, micro_batch_size=max(1, config.batch_size // processes))
    return require_fit(model, config, lengths, room, precision, kind)
