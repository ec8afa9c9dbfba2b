"""How many bytes training holds at its peak, by part, and a refusal before they are asked for.

`memory` computes them from the configurations alone, on the CPU's path of the loss (one buffer of logits,
tables with a gradient that stays) or on CUDA's (fresh gradients, 16-bit copies of the weights). Checked
against what the profiler counts and against the resident peak of processes (`benchmarks/planner.py`); on CUDA
unvalidated.

Letters as in `workload`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reclib import adapter_plan
from reclib.adapter_plan import AdapterPlan
from reclib.config import InputError, ModelConfig, TrainConfig, changed
from reclib.devices import GIB
from reclib.workload import FP32, HALF, Shapes, everywhere, largest_shapes, parameters

STATE = ("weights", "gradients", "optimizer")
SPARE = 1.125  # of the logits' buffer: what is asked for beyond the first batch's need
LARGE_LOGITS_BYTES = (
    512 * 2**20
)  # of logits that are not made in chunks on any CUDA device; see `logits_limit`
CONTEXT_BYTES = 700 * 2**20  # of CUDA's context and libraries, outside torch's count; assumed
SMALLEST_SINK = 8 * 2**20  # bytes of a table whose gradient stays where it is, on a CPU (as in `sinks`)
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


def memory(
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
    P, trained = sum(parameters(model).values()), adapter_plan.trained_parameters(model, adapter)
    places = one.rows * model.max_len
    last = places if everywhere(train) or model.causal else one.rows * one.queries
    held, first = activations(model, train, one, width)
    held += adapter_plan.adapter_bytes(model, adapter, places, last, width)
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
        if memory(model, one, lengths, precision, device_type, adapter, memory_bytes).total > room:
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
    found = memory(model, train, lengths, precision, device_type, memory_bytes=memory_bytes)
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
        needed = memory(smaller, recipe, lengths, precision, device_type, memory_bytes=memory_bytes).total
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
