"""The least that a step can take on this machine: its products, its optimiser, and the bytes it must move.

Every rate is measured here and now. The products are those that the masked-item objective needs for a batch,
without padding; whatever a step takes beyond the bound is overhead that somebody could still remove.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from reclib import hardware
from reclib.config import ModelConfig
from reclib.cost.work import BACKWARD, Flops, layer_linear, needed
from reclib.data.batches import Batch
from reclib.model.bert4rec import Bert4Rec

COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Component:
    """One part of the bound."""

    name: str
    seconds: float
    rate: float | None  # FLOP/s or bytes/s that it was computed from; None: measured as it is
    unit: str


@dataclass(frozen=True)
class Bound:
    """The parts, in order, and the products that they stand for."""

    components: tuple[Component, ...]
    flops: Flops

    @property
    def seconds(self) -> float:
        """Least seconds of one step."""
        return sum(part.seconds for part in self.components)

    @property
    def gemm_seconds(self) -> float:
        """Seconds of the products alone."""
        return sum(part.seconds for part in self.components if part.unit == "FLOP/s")


def timed(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of `action`, once unmeasured and then `repeats` times."""
    action()
    hardware.synchronize(device)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        hardware.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def product_rate(a: Tensor, b: Tensor, repeats: int) -> float:
    """Return the FLOP/s of a (m, k) times b (k, n), into a buffer that is there already."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    work = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return work / timed(lambda: torch.mm(a, b, out=out), a.device, repeats)


def head_components(
    model: ModelConfig, targets: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[Component]:
    """Return the head's three products at their own shapes: scores, gradient of states, of the table."""
    D, items = model.hidden_dim, model.num_items
    hidden = torch.randn(targets, D, dtype=dtype, device=device)
    table = torch.randn(items, D, dtype=dtype, device=device)
    slope = torch.randn(targets, items, dtype=dtype, device=device)
    work = 2 * targets * D * items
    rates = {
        "head: scores": product_rate(hidden, table.t(), repeats),
        "head: gradient of hidden states": product_rate(slope, table, repeats),
        "head: gradient of the table": product_rate(slope.t(), hidden, repeats),
    }
    return [Component(name, work / rate, rate, "FLOP/s") for name, rate in rates.items()]


def encoder_components(
    model: ModelConfig, batch: Batch, device: torch.device, dtype: torch.dtype, repeats: int
) -> list[Component]:
    """Return the encoder's products, forward and backward, at the rate of its widest map's three products.

    Attention is counted at the same rate, which flatters it: it stays a lower bound.
    """
    D, F, tokens = model.hidden_dim, model.ffn_factor * model.hidden_dim, batch.num_tokens
    x, slope = (torch.randn(tokens, width, dtype=dtype, device=device) for width in (D, F))
    weight = torch.randn(F, D, dtype=dtype, device=device)
    rates = [product_rate(*pair, repeats) for pair in ((x, weight.t()), (slope, weight), (slope.t(), x))]
    rate = 3 / sum(1 / r for r in rates)
    whole = needed(model, batch).encoder
    last = layer_linear(model, tokens, batch.num_targets)
    linear = (1 + BACKWARD) * ((model.num_layers - 1) * layer_linear(model, tokens, tokens) + last)
    return [
        Component("encoder: linear maps", linear / rate, rate, "FLOP/s"),
        Component("encoder: attention", (whole - linear) / rate, rate, "FLOP/s"),
    ]


def optimizer_seconds(model: ModelConfig, device: torch.device, repeats: int) -> float:
    """Return the median seconds of a fused AdamW step over parameters of the model's shapes."""
    with torch.device("meta"):
        shapes = [p.shape for p in Bert4Rec(model).parameters()]
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    return timed(torch.optim.AdamW(parameters, fused=True).step, device, repeats)


def copy_rate(device: torch.device, repeats: int) -> float:
    """Return the bytes/s of a large copy, what is read and what is written both counted."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / timed(lambda: target.copy_(source), device, repeats)


def bytes_moved(model: ModelConfig, targets: int, parameters: int, item_bytes: int) -> dict[str, int]:
    """Return what must be moved outside products and optimiser, by purpose.

    The logits are read and written once more to become a gradient; the dense gradient of the input table is
    cleared where it is not the output table's; the global norm reads every gradient.
    """
    return {
        "softmax over the logits": 2 * targets * model.num_items * item_bytes,
        "clear the input table's gradient": 0 if model.tied else 4 * model.vocab_size * model.hidden_dim,
        "global norm": 4 * parameters,
    }


def gemm_bound(
    model: ModelConfig,
    batch: Batch,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
) -> Bound:
    """Measure the parts of the bound for one batch of a model that trains in `dtype`."""
    parts = head_components(model, batch.num_targets, device, dtype, repeats)
    parts += encoder_components(model, batch, device, dtype, repeats)
    parts.append(Component("fused AdamW", optimizer_seconds(model, device, repeats), None, "s"))
    bandwidth = copy_rate(device, repeats)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Bert4Rec(model).parameters())
    moved = bytes_moved(model, batch.num_targets, parameters, dtype.itemsize)
    parts += [Component(name, size / bandwidth, bandwidth, "B/s") for name, size in moved.items() if size]
    return Bound(tuple(parts), needed(model, batch))
