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
    seconds = []
    for _ in range(repeats + 1):
        hardware.synchronize(device)
        began = time.perf_counter()
        action()
        hardware.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:])


def product_rate(a: Tensor, b: Tensor, repeats: int) -> float:
    """Return the FLOP/s of a (m, k) times b (k, n), into a buffer that is there already."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    work = 2 * a.shape[0] * a.shape[1] * b.shape[1]
    return work / timed(lambda: torch.mm(a, b, out=out), a.device, repeats)


def map_rates(rows: int, inner: int, outer: int, repeats: int, **kind: object) -> list[float]:
    """Return the FLOP/s of a linear map's products: output, gradient of the input, gradient of the weight.

    The input is (rows, inner), the weight (outer, inner); `kind` has dtype and device.
    """
    x, slope = torch.randn(rows, inner, **kind), torch.randn(rows, outer, **kind)
    weight = torch.randn(outer, inner, **kind)
    return [product_rate(a, b, repeats) for a, b in ((x, weight.t()), (slope, weight), (slope.t(), x))]


def mean_rate(rates: list[float]) -> float:
    """Return the rate of equal products one after another."""
    return len(rates) / sum(1 / rate for rate in rates)


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
    """Measure the parts of the bound for one batch of a model that trains in `dtype`.

    The encoder's products count at the rate of its widest map; attention, too, which flatters it, so that the
    sum stays a lower bound.
    """
    D, tokens, targets = model.hidden_dim, batch.num_tokens, batch.num_targets
    kind = {"dtype": dtype, "device": device}
    head = map_rates(targets, D, model.num_items, repeats, **kind)
    names = ("scores", "gradient of hidden states", "gradient of the table")
    work = 2 * targets * D * model.num_items
    parts = [
        Component(f"head: {name}", work / rate, rate, "FLOP/s")
        for name, rate in zip(names, head, strict=True)
    ]
    rate = mean_rate(map_rates(tokens, D, model.ffn_factor * D, repeats, **kind))
    layers = (model.num_layers - 1) * layer_linear(model, tokens, tokens) + layer_linear(
        model, tokens, targets
    )
    linear, encoder = (1 + BACKWARD) * layers, needed(model, batch).encoder
    parts.append(Component("encoder: linear maps", linear / rate, rate, "FLOP/s"))
    parts.append(Component("encoder: attention", (encoder - linear) / rate, rate, "FLOP/s"))
    with torch.device("meta"):
        shapes = [p.shape for p in Bert4Rec(model).parameters()]
    weights = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    update = timed(torch.optim.AdamW(weights, fused=True).step, device, repeats)
    parts.append(Component("fused AdamW", update, None, "s"))
    bandwidth = copy_rate(device, repeats)
    moved = bytes_moved(model, targets, sum(w.numel() for w in weights), dtype.itemsize)
    parts += [Component(name, size / bandwidth, bandwidth, "B/s") for name, size in moved.items() if size]
    return Bound(tuple(parts), needed(model, batch))
