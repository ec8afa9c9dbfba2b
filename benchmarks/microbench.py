"""What a device does in a second: the rates that the planner multiplies by what a step is made of.

Each is measured by the operation that training runs, forward and backward where it has both, at a few shapes
that bracket those of the named sizes. About a minute on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bound import copy_rate, product_rate, timed
from torch import Tensor

from reclib.model.bert4rec import Dropout, attention_bias
from reclib.train.losses import cross_entropy_sum

WIDTHS = (32, 64, 128, 256, 512, 1024)  # hidden_dim of the products

LENGTHS = (50, 200)  # places of a row, for attention

PLACES = 1280  # places of the rows of one batch

TARGETS, ITEMS = 240, 40_000  # of the head's products: a table beyond the caches

TABLE = 20_000_000  # parameters of the optimiser's pass


def rates(device: torch.device, repeats: int = 7) -> dict[str, Any]:
    """Return FLOP/s of products by precision and width, elements/s of passes, seconds of one operator."""
    found: dict[str, Any] = {"bandwidth": copy_rate(device, repeats)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        found[f"product {name}"] = {D: encoder_rate(D, device, dtype, repeats) for D in WIDTHS}
        found[f"head {name}"] = {D: head_rate(D, device, dtype, repeats) for D in WIDTHS}
    found["attention"] = {L: attention_rate(L, device, repeats) for L in LENGTHS}
    return found | passes(device, repeats) | {"operator": operator_seconds(device, repeats)}


def encoder_rate(D: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Return FLOP/s of a map from D to 4 D: its output and its two gradients."""
    x, slope = (torch.randn(PLACES, width, dtype=dtype, device=device) for width in (D, 4 * D))
    weight = torch.randn(4 * D, D, dtype=dtype, device=device)
    pairs = ((x, weight.t()), (slope, weight), (slope.t(), x))
    return 3 / sum(1 / product_rate(a, b, repeats) for a, b in pairs)


def head_rate(D: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Return FLOP/s of the head's three products, over a table that no cache holds."""
    hidden = torch.randn(TARGETS, D, dtype=dtype, device=device)
    table = torch.randn(ITEMS, D, dtype=dtype, device=device)
    slope = torch.randn(TARGETS, ITEMS, dtype=dtype, device=device)
    pairs = ((hidden, table.t()), (slope, table), (slope.t(), hidden))
    return 3 / sum(1 / product_rate(a, b, repeats) for a, b in pairs)


def attention_rate(L: int, device: torch.device, repeats: int) -> float:
    """Return (places x L x D)/s of fused attention with a mask, forward and backward, heads of 32."""
    rows, heads, width = max(1, PLACES // L), 4, 32
    shape = (rows, heads, L, width)
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    segments = (torch.arange(L, device=device) // 10 + 1).expand(rows, L)
    bias = attention_bias(segments, q.dtype)

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias).sum().backward()

    return rows * L * L * heads * width / timed(both, device, repeats)


def passes(device: torch.device, repeats: int) -> dict[str, float]:
    """Return elements/s of what is no product, forward and backward together."""
    x = torch.randn(PLACES, 1024, device=device, requires_grad=True)
    slope, scale = torch.ones_like(x), torch.ones(1024, device=device, requires_grad=True)
    dropout = Dropout(0.1)
    both: dict[str, Callable[[], Tensor]] = {
        "gelu": lambda: F.gelu(x),
        "dropout": lambda: dropout(x),
        "norm": lambda: F.layer_norm(x, (1024,), scale, scale),
        "add": lambda: x + slope,
    }
    found = {
        name: x.numel() / timed(lambda run=run: run().backward(slope), device, repeats)  # type: ignore[misc]
        for name, run in both.items()
    }
    return found | {"softmax": _softmax(device, repeats)} | _tables(device, repeats)


def _softmax(device: torch.device, repeats: int) -> float:
    """Return elements/s of the loss over logits, its products taken to be free: width 1."""
    hidden = torch.randn(TARGETS, 1, device=device, requires_grad=True)
    table = torch.randn(ITEMS + 2, 1, device=device)
    targets = torch.randint(1, ITEMS, (TARGETS,), device=device)
    how = "inplace" if device.type == "cpu" else "plain"

    def both() -> None:
        cross_entropy_sum(hidden, table, None, targets, ITEMS, how).backward()  # type: ignore[arg-type]

    return TARGETS * ITEMS / timed(both, device, repeats)


def _tables(device: torch.device, repeats: int) -> dict[str, float]:
    weight = torch.nn.Parameter(torch.zeros(TABLE // 256, 256, device=device))
    weight.grad = torch.full_like(weight, 1e-3)
    update = torch.optim.AdamW([weight], fused=True).step
    norm = torch.nn.utils.get_total_norm
    rows = torch.randint(0, len(weight), (PLACES,), device=device)
    values = torch.ones(PLACES, 256, device=device)
    grad = weight.grad

    def look_up() -> None:
        F.embedding(rows, weight.detach())
        grad.index_add_(0, rows, values)

    return {
        "update": weight.numel() / timed(update, device, repeats),
        "norm of gradients": weight.numel() / timed(lambda: norm([grad]), device, repeats),
        "clear": weight.numel() / timed(grad.zero_, device, repeats),
        "lookup": values.numel() / timed(look_up, device, repeats),
    }


def operator_seconds(device: torch.device, repeats: int) -> float:
    """Return the seconds of one operator on next to nothing, in a chain of forward and backward."""
    x = torch.ones(8, device=device, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(100):
            y = y * 1.0
        y.sum().backward()

    return timed(chain, device, repeats) / 200
