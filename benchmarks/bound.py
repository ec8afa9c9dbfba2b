"""What a device does in a second, and the least that a step can take on it.

`rates` are what the planner multiplies by the work of a step: each is measured by the operation that training
runs, forward and backward where it has both, at a few shapes that bracket those of the named sizes. About a
minute on a CPU.

`gemm_bound` adds up the products that the masked-item objective needs for a batch without padding, the
optimiser, and the bytes that must be moved, all at rates that are measured now. Whatever a step takes beyond
this bound is overhead that could still be removed.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reclib import hardware
from reclib.config import ModelConfig
from reclib.cost.work import BACKWARD, linear_forward, needed
from reclib.data.batches import Batch
from reclib.model.bert4rec import Bert4Rec, Dropout, attention_bias
from reclib.train.losses import cross_entropy_sum

COPY_BYTES = 256 * 2**20
WIDTHS = (32, 64, 128, 256, 512, 1024)  # hidden_dim of the products
LENGTHS = (50, 200)  # places of a row, for attention
PLACES = 1280  # places of the rows of one batch
TARGETS, ITEMS = 240, 40_000  # of the head's products: a table beyond the caches
TABLE = 20_000_000  # parameters of the optimiser's pass


# -- rates ---------------------------------------------------------------------------------------------------


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


def rates(device: torch.device, repeats: int = 7) -> dict[str, float]:
    """Return FLOP/s of products by precision and width, elements/s of passes, seconds of one operator."""
    measured = {"bandwidth": copy_rate(device, repeats)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        kind: Any = {"dtype": dtype, "device": device, "repeats": repeats}
        for D in WIDTHS:
            measured[f"product {name} {D}"] = mean_rate(map_rates(PLACES, D, 4 * D, **kind))
            measured[f"head {name} {D}"] = mean_rate(map_rates(TARGETS, D, ITEMS, **kind))
    measured |= {f"attention {L}": attention_rate(L, device, repeats) for L in LENGTHS}
    measured |= pass_rates(device, repeats) | table_rates(device, repeats)
    return measured | {"operator": operator_seconds(device, repeats)}


def attention_rate(L: int, device: torch.device, repeats: int) -> float:
    """Return (places x L x D)/s of fused attention with a mask, forward and backward, heads of 32."""
    rows, heads, width = max(1, PLACES // L), 4, 32
    q, k, v = (torch.randn(rows, heads, L, width, device=device, requires_grad=True) for _ in range(3))
    bias = attention_bias((torch.arange(L, device=device) // 10 + 1).expand(rows, L), q.dtype)

    def both() -> None:
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias).sum().backward()

    return rows * L * L * heads * width / timed(both, device, repeats)


def pass_rates(device: torch.device, repeats: int) -> dict[str, float]:
    """Return elements/s of what is no product, forward and backward together.

    `softmax` is the loss over logits, its products taken to be free: width 1.
    """
    x = torch.randn(PLACES, 1024, device=device, requires_grad=True)
    slope, scale = torch.ones_like(x), torch.ones(1024, device=device, requires_grad=True)
    dropout = Dropout(0.1)
    hidden = torch.randn(TARGETS, 1, device=device, requires_grad=True)
    table = torch.randn(ITEMS + 2, 1, device=device)
    targets = torch.randint(1, ITEMS, (TARGETS,), device=device)
    route: Any = "inplace" if device.type == "cpu" else "plain"
    passes = {
        "gelu": lambda: F.gelu(x).backward(slope),
        "dropout": lambda: dropout(x).backward(slope),
        "norm": lambda: F.layer_norm(x, (1024,), scale, scale).backward(slope),
        "add": lambda: (x + slope).backward(slope),
        "softmax": lambda: cross_entropy_sum(hidden, table, None, targets, ITEMS, route).backward(),
    }
    elements = dict.fromkeys(passes, x.numel()) | {"softmax": TARGETS * ITEMS}
    return {name: elements[name] / timed(action, device, repeats) for name, action in passes.items()}


def table_rates(device: torch.device, repeats: int) -> dict[str, float]:
    """Return elements/s of the passes over whole tables, and of looking rows up."""
    weight = torch.nn.Parameter(torch.zeros(TABLE // 256, 256, device=device))
    weight.grad = grad = torch.full_like(weight, 1e-3)
    rows = torch.randint(0, len(weight), (PLACES,), device=device)
    values = torch.ones(PLACES, 256, device=device)

    def look_up() -> None:
        F.embedding(rows, weight.detach())
        grad.index_add_(0, rows, values)

    passes = {
        "update": torch.optim.AdamW([weight], fused=True).step,
        "norm of gradients": lambda: torch.nn.utils.get_total_norm([grad]),
        "clear": grad.zero_,
        "lookup": look_up,
    }
    elements = dict.fromkeys(passes, weight.numel()) | {"lookup": values.numel()}
    return {name: elements[name] / timed(action, device, repeats) for name, action in passes.items()}


def operator_seconds(device: torch.device, repeats: int) -> float:
    """Return the seconds of one operator on next to nothing, in a chain of forward and backward."""
    x = torch.ones(8, device=device, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(100):
            y = y * 1.0
        y.sum().backward()

    return timed(chain, device, repeats) / 200


# -- the least time of a step --------------------------------------------------------------------------------


Seconds = dict[str, float]


def gemm_bound(model: ModelConfig, batch: Batch, device: torch.device, repeats: int = 5) -> list[Seconds]:
    """Return the seconds of the products, and of the rest, for one batch of a model that trains in fp32.

    The encoder's products count at the rate of its widest map; attention, too, which flatters it, so that the
    sum stays a lower bound. Moved outside products and optimiser: the logits are read and written once more
    to become a gradient; the dense gradient of the input table is cleared where it is not the output table's;
    the global norm reads every gradient.
    """
    D, tokens, targets = model.hidden_dim, batch.num_tokens, batch.num_targets
    head = map_rates(targets, D, model.num_items, repeats, device=device)
    rate = mean_rate(map_rates(tokens, D, model.ffn_factor * D, repeats, device=device))
    each, total = 2 * targets * D * model.num_items, needed(model, batch).encoder
    linear = (1 + BACKWARD) * linear_forward(model, tokens, targets)
    with torch.device("meta"):
        shapes = [p.shape for p in Bert4Rec(model).parameters()]
    weights = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    update = timed(torch.optim.AdamW(weights, fused=True).step, device, repeats)
    bandwidth = copy_rate(device, repeats)
    products = {
        "head: scores": each / head[0],
        "head: gradient of hidden states": each / head[1],
        "head: gradient of the table": each / head[2],
        "encoder: linear maps": linear / rate,
        "encoder: attention": (total - linear) / rate,
    }
    rest = {"fused AdamW": update, "softmax over the logits": 8 * targets * model.num_items / bandwidth}
    if not model.tied:
        rest["clear the input table's gradient"] = 4 * model.vocab_size * model.hidden_dim / bandwidth
    return [products, rest | {"global norm": 4 * sum(w.numel() for w in weights) / bandwidth}]
