"""What a device does in a second: the rates that the planner multiplies by what a step is made of.

Each is measured by the operation that training runs, forward and backward where it has both, at a few shapes
that bracket those of the named sizes. About a minute on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from bound import copy_rate, map_rates, mean_rate, timed

from reclib.model.bert4rec import Dropout, attention_bias
from reclib.train.losses import cross_entropy_sum

WIDTHS = (32, 64, 128, 256, 512, 1024)  # hidden_dim of the products
LENGTHS = (50, 200)  # places of a row, for attention
PLACES = 1280  # places of the rows of one batch
TARGETS, ITEMS = 240, 40_000  # of the head's products: a table beyond the caches
TABLE = 20_000_000  # parameters of the optimiser's pass


def rates(device: torch.device, repeats: int = 7) -> dict[str, Any]:
    """Return FLOP/s of products by precision and width, elements/s of passes, seconds of one operator."""
    measured: dict[str, Any] = {"bandwidth": copy_rate(device, repeats)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        kind: Any = {"dtype": dtype, "device": device, "repeats": repeats}
        measured[f"product {name}"] = {D: mean_rate(map_rates(PLACES, D, 4 * D, **kind)) for D in WIDTHS}
        measured[f"head {name}"] = {D: mean_rate(map_rates(TARGETS, D, ITEMS, **kind)) for D in WIDTHS}
    measured["attention"] = {L: attention_rate(L, device, repeats) for L in LENGTHS}
    measured |= passes(device, repeats) | tables(device, repeats)
    return measured | {"operator": operator_seconds(device, repeats)}


def attention_rate(L: int, device: torch.device, repeats: int) -> float:
    """Return (places x L x D)/s of fused attention with a mask, forward and backward, heads of 32."""
    rows, heads, width = max(1, PLACES // L), 4, 32
    q, k, v = (torch.randn(rows, heads, L, width, device=device, requires_grad=True) for _ in range(3))
    bias = attention_bias((torch.arange(L, device=device) // 10 + 1).expand(rows, L), q.dtype)

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias).sum().backward()

    return rows * L * L * heads * width / timed(both, device, repeats)


def passes(device: torch.device, repeats: int) -> dict[str, float]:
    """Return elements/s of what is no product, forward and backward together.

    `softmax` is the loss over logits, its products taken to be free: width 1.
    """
    x = torch.randn(PLACES, 1024, device=device, requires_grad=True)
    slope, scale = torch.ones_like(x), torch.ones(1024, device=device, requires_grad=True)
    dropout = Dropout(0.1)
    hidden = torch.randn(TARGETS, 1, device=device, requires_grad=True)
    table = torch.randn(ITEMS + 2, 1, device=device)
    targets = torch.randint(1, ITEMS, (TARGETS,), device=device)
    how: Any = "inplace" if device.type == "cpu" else "plain"
    runs = {
        "gelu": lambda: F.gelu(x).backward(slope),
        "dropout": lambda: dropout(x).backward(slope),
        "norm": lambda: F.layer_norm(x, (1024,), scale, scale).backward(slope),
        "add": lambda: (x + slope).backward(slope),
        "softmax": lambda: cross_entropy_sum(hidden, table, None, targets, ITEMS, how).backward(),
    }
    elements = dict.fromkeys(runs, x.numel()) | {"softmax": TARGETS * ITEMS}
    return {name: elements[name] / timed(run, device, repeats) for name, run in runs.items()}


def tables(device: torch.device, repeats: int) -> dict[str, float]:
    """Return elements/s of the passes over whole tables, and of looking rows up."""
    weight = torch.nn.Parameter(torch.zeros(TABLE // 256, 256, device=device))
    weight.grad = grad = torch.full_like(weight, 1e-3)
    update = torch.optim.AdamW([weight], fused=True).step
    rows = torch.randint(0, len(weight), (PLACES,), device=device)
    values = torch.ones(PLACES, 256, device=device)

    def look_up() -> None:
        F.embedding(rows, weight.detach())
        grad.index_add_(0, rows, values)

    return {
        "update": weight.numel() / timed(update, device, repeats),
        "norm of gradients": weight.numel()
        / timed(lambda: torch.nn.utils.get_total_norm([grad]), device, repeats),
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
