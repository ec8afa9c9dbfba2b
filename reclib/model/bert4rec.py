"""BERT4Rec: item and position embeddings, a bidirectional encoder, an output layer over the catalogue.

Reference: Sun et al., "BERT4Rec", CIKM 2019, section 3. What is unusual:

- rows may hold several sequences one after another ("packed", Krell et al. 2021, arXiv 2107.02027): attention
  stays inside a segment and positions restart with each;
- the encoder and the output layer are called apart, so that only target positions need reach the latter;
- the output table is a weight to be multiplied by whoever computes the loss or the ranks;
- there is no dropout on attention probabilities unless asked for: it rules out fused attention;
- attention is over rows with a mask: torch's `varlen_attn` would need neither, but has no kernel for a CPU to
  test it on, and the number of segments, which a batch does not hand out, would be a wait for the GPU;
- with `causal` attention it is the twin that predicts the next item (SASRec, Kang and McAuley, ICDM 2018,
  with full cross-entropy): nothing else differs.

Shapes: R rows, L positions in a row, D hidden_dim, H heads, V rows of the output table, M target positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclib.config import PAD, SIZES, ModelConfig, model_config
from reclib.system import Parser

# ------------------------------------------------------------------------------------------------
# Gradients of large tables, written where they stay.
#
# Autograd allocates a new gradient for every step. For an item table that is hundreds of megabytes, which a
# C library gives back to the kernel and takes again zeroed page by page, or keeps and fragments: 40 ms and
# more for 164 MB on two cores, several times in a step. A sink is the same gradient in one tensor for the
# whole run: the output layer overwrites it, the lookup adds to it, and of a table that is only looked up
# just the rows of the last step are cleared. Values are the same.
#
# Used on a CPU in full precision; elsewhere autograd's way stands.

SMALLEST_BYTES = 8 * 2**20  # a smaller table is no trouble


class Sink:
    """The gradient of one parameter over a run."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.grad = torch.zeros_like(parameter)
        self.fresh = True  # nothing of this step is in it yet
        self.dense = False  # what is in it came, at least in part, from the output layer
        self.rows: list[Tensor] = []  # that this step's lookups touched

    def start(self) -> None:
        """Begin a step: what is in it counts as zero from now on."""
        self.fresh = True

    def overwrite(self, product: tuple[Tensor, Tensor], part: slice) -> None:
        """Set the rows `part` to a matrix product and the others to zero; add, if the step has begun."""
        left, right = product
        if self.fresh:
            self.grad[: part.start].zero_()
            self.grad[part.stop :].zero_()
            torch.mm(left, right, out=self.grad[part])
        else:
            self.grad[part].addmm_(left, right)
        self.fresh, self.dense, self.rows = False, True, []

    def add_rows(self, rows: Tensor, values: Tensor, skip: int) -> None:
        """Add `values` (N, D) to the rows (N,), except to row `skip`."""
        if self.fresh:
            self._clear()
        self.grad.index_add_(0, rows, values)
        self.grad[skip].zero_()
        if not self.dense:
            self.rows.append(rows)
        self.fresh = False

    def finish(self) -> Tensor:
        """Return the whole gradient of the step."""
        if self.fresh:
            self._clear()
            self.fresh = False
        return self.grad

    def mix(self) -> None:
        """Say that other processes' gradients are added to it: any row may hold something."""
        self.dense, self.rows = True, []

    def for_norm(self) -> Tensor:
        """Return what the gradient's norm can be computed from: the rows that are not zero."""
        whole = self.finish()
        return whole if self.dense or not self.rows else whole[torch.cat(self.rows).unique()]

    def _clear(self) -> None:
        if self.dense:
            self.grad.zero_()
        else:
            for rows in self.rows:
                self.grad[rows] = 0
        self.dense, self.rows = False, []


class Lookup(torch.autograd.Function):
    """Rows of a table, whose gradient goes into a sink."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, sink: Sink, skip: int) -> Tensor:
        """Return weight[index]; `skip` is the row that gets no gradient."""
        ctx.save_for_backward(index)
        ctx.sink, ctx.skip = sink, skip
        return torch.nn.functional.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Add to the sink; autograd is given nothing."""
        (index,) = ctx.saved_tensors
        ctx.sink.add_rows(index.flatten(), grads[0].flatten(0, -2), ctx.skip)
        return None, None, None, None


def sink_of(parameter: Tensor) -> Sink | None:
    """Return the sink of a parameter, if it has one."""
    return getattr(parameter, "sink", None)


def detach(parameters: list[nn.Parameter]) -> None:
    """Take the sinks of an earlier run away: from now on autograd has the gradients."""
    for parameter in parameters:
        if sink_of(parameter) is not None:
            del parameter.sink  # type: ignore[attr-defined]


def attach(parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, Sink]]:
    """Give each large parameter a sink; return those with theirs."""
    sunk = []
    for parameter in parameters:
        if parameter.numel() * parameter.element_size() >= SMALLEST_BYTES:
            sink = Sink(parameter)
            parameter.sink = sink  # type: ignore[attr-defined]
            sunk.append((parameter, sink))
    return sunk


# ------------------------------------------------------------------------------------------------


def attention_bias(
    segment_ids: Tensor, dtype: torch.dtype, causal: bool = False, query_index: Tensor | None = None
) -> Tensor:
    """Return what is added to the attention scores so that segments never see each other.

    `segment_ids` (R, L) numbers the sequences of a row from 1; 0 is padding, whose positions see only each
    other, which keeps their softmax finite. `causal` hides what is later as well. Returns (R, 1, L, L) of 0
    and -inf, or (R, 1, Q, L) where only the places `query_index` (R, Q) ask.
    """
    own = segment_ids if query_index is None else segment_ids.gather(1, query_index)
    apart = own[:, :, None] != segment_ids[:, None, :]  # (R, L or Q, L)
    if causal:
        place = torch.arange(segment_ids.shape[1], device=segment_ids.device)
        asking = place if query_index is None else query_index
        apart |= asking[..., None] < place
    kind, width = apart.device.type, apart.shape[2]
    if kind != "cpu":  # made once in the type of the products, its rows where fused kernels want them
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        width = -(-width // 8) * 8
    bias = torch.zeros(*apart.shape[:2], width, dtype=dtype, device=apart.device)[..., : apart.shape[2]]
    return bias.masked_fill_(apart, float("-inf")).unsqueeze(1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the places `index` (R, Q) of each row of x (R, L, D) as (R, Q, D)."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return F.embedding(index + first, x.flatten(0, 1))  # its backward is faster than gather's


def sinusoidal_positions(max_len: int, hidden_dim: int) -> Tensor:
    """Return the fixed position table (L, D) of Vaswani et al. 2017, section 3.5."""
    rate = torch.exp(torch.arange(0, hidden_dim, 2) * (-math.log(10_000.0) / hidden_dim))
    angle = torch.arange(max_len)[:, None] * rate  # (L, D/2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(max_len, hidden_dim)


class Dropout(nn.Module):
    """Dropout whose random bits cost little on a CPU, where torch draws them one by one.

    Sixteen bits decide on each element: p is rounded to 1/65536, and the scale is that of the rounded p, so
    the expectation is exact. Off the CPU it is torch's own.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share p of its elements zero and the others scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        return x * dropout_factor(x.detach(), self.p) if x.device.type == "cpu" else F.dropout(x, self.p)


@torch.library.custom_op("reclib::dropout_factor", mutates_args=(), device_types="cpu")
def dropout_factor(x: Tensor, p: float) -> Tensor:
    """Return a tensor like x of 0, with probability p, and 1 / (1 - p).

    The bits come from a generator that is seeded from torch's at each call, so that torch's seed and state
    still decide everything. An operator of its own, so that a compiler takes it as it is.
    """
    levels = 1 << 16
    dropped = round(p * levels)
    seed = int(torch.empty((), dtype=torch.int64).random_())
    bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)[: x.numel()]
    keep = torch.from_numpy(bits).view(x.shape) >= dropped - levels // 2
    return keep.to(x.dtype).mul_(levels / (levels - dropped))


@dropout_factor.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def part_of(linear: nn.Module, x: Tensor, part: slice) -> Tensor:
    """Return the outputs `part` of a linear map of x (..., D), and compute only those where it can be cut.

    A plain layer is cut by its weights. Whatever stands in its place is never bypassed: it is asked by its
    own method `part`, or else computes everything.
    """
    if type(linear) is nn.Linear:
        return F.linear(x, linear.weight[part], linear.bias[part])
    own: Callable[[Tensor, slice], Tensor] | None = getattr(linear, "part", None)
    return linear(x)[..., part] if own is None else own(x, part)


class SelfAttention(nn.Module):
    """Multi-head self-attention inside segments."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_dim, 3 * config.hidden_dim)
        self.out = nn.Linear(config.hidden_dim, config.hidden_dim)

    def forward(self, x: Tensor, bias: Tensor, queries: Tensor | None = None) -> Tensor:
        """Return (R, L, D) for x (R, L, D) and the attention bias (R, 1, L, L).

        With `queries` (R, Q, D) they alone ask, bias is (R, 1, Q, L) and the result (R, Q, D).
        """
        D = x.shape[-1]
        if queries is None:
            q, k, v = (self._split(part) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            q = self._split(part_of(self.qkv, queries, slice(0, D)))
            k, v = (self._split(y) for y in part_of(self.qkv, x, slice(D, 3 * D)).chunk(2, dim=-1))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        """Split (R, L, D) into heads (R, H, L, D/H)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Linear, GELU, Linear with an inner width of `ffn_factor` hidden_dim."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.ffn_factor * config.hidden_dim
        self.up = nn.Linear(config.hidden_dim, inner)
        self.down = nn.Linear(inner, config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (R, L, D) for x (R, L, D)."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One encoder layer, with LayerNorm before ("pre") or after ("post") each residual branch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre_norm = config.norm == "pre"
        self.attention = SelfAttention(config)
        self.ffn = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.hidden_dim)
        self.ffn_norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor, query_index: Tensor | None = None) -> Tensor:
        """Return (R, L, D) for x (R, L, D) and the attention bias (R, 1, L, L).

        With `query_index` (R, Q) only those places go on: bias is (R, 1, Q, L), the result (R, Q, D).
        """
        seen = self.attention_norm(x) if self.pre_norm else x
        asking = None
        if query_index is not None:
            x = take(x, query_index)
            asking = self.attention_norm(x) if self.pre_norm else x
        x = x + self.dropout(self.attention(seen, bias, asking))
        if self.pre_norm:
            return x + self.dropout(self.ffn(self.ffn_norm(x)))
        x = self.attention_norm(x)
        return self.ffn_norm(x + self.dropout(self.ffn(x)))


class HeadTransform(nn.Module):
    """What stands between encoder and output table in the "mlp" head: Linear, GELU, LayerNorm, Dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., D) for x (..., D)."""
        return self.dropout(self.norm(F.gelu(self.linear(x))))


class Bert4Rec(nn.Module):
    """The masked-item transformer. Item ids: PAD 0, items 1..num_items, MASK num_items + 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_dim
        self.item_table = nn.Embedding(config.vocab_size, D, padding_idx=PAD)
        if config.positions == "learned":
            self.position_table = nn.Parameter(torch.empty(config.max_len, D))
        else:
            self.register_buffer("position_table", sinusoidal_positions(config.max_len, D), False)
        self.embedding_norm = nn.LayerNorm(D) if config.embedding_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(D) if config.final_norm else nn.Identity()
        self.transform = HeadTransform(config) if config.head == "mlp" else nn.Identity()
        self.output_weight = (
            self.item_table.weight if config.tied else nn.Parameter(torch.empty(config.output_rows, D))
        )
        self.output_bias = nn.Parameter(torch.empty(config.output_rows)) if config.output_bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights from N(0, 0.02), as BERT does; biases and the PAD row are zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()
        self.item_table.weight[PAD].zero_()

    def look_up(self, items: Tensor) -> Tensor:
        """Return the item vectors (..., D) of ids (...)."""
        sink = sink_of(self.item_table.weight)
        if sink is None or not torch.is_grad_enabled():
            return self.item_table(items)
        return Lookup.apply(self.item_table.weight, items, sink, PAD)

    def encode(
        self,
        items: Tensor,
        segment_ids: Tensor,
        positions: Tensor,
        query_index: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (R, L, D) of rows of item ids.

        `items`, `segment_ids` and `positions` are (R, L) integers: ids with MASK where the model may not
        look, the number of the sequence inside its row (0: padding), the row of the position table.

        With `query_index` (R, Q) only the states at those places are wanted, (R, Q, D): the last layer then
        computes keys and values everywhere and all else at those places. The values are the same.
        """
        x = self.look_up(items) + F.embedding(positions, self.position_table)
        x = self.dropout(self.embedding_norm(x))
        bias = attention_bias(segment_ids, x.dtype, self.config.causal)
        if query_index is None:
            for block in self.blocks:
                x = block(x, bias)
            return self.final_norm(x)
        for block in self.blocks[:-1]:
            x = block(x, bias)
        row_bias = attention_bias(segment_ids, x.dtype, self.config.causal, query_index)
        return self.final_norm(self.blocks[-1](x, row_bias, query_index))

    def head_input(self, hidden: Tensor) -> Tensor:
        """Return (M, D): what is multiplied by the output table, for hidden states (M, D)."""
        return self.transform(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (M, V) of every row of the output table for hidden states (M, D)."""
        return F.linear(self.head_input(hidden), self.output_weight, self.output_bias)

    def table_parameters(self) -> int:
        """Count the parameters that grow with the catalogue: item tables and output bias."""
        tables = {id(p): p.numel() for p in (self.item_table.weight, self.output_weight)}
        return sum(tables.values()) + (0 if self.output_bias is None else self.output_bias.numel())


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count by instantiation on the meta device: total, item tables, non-embedding.

    Learned positions count as neither table nor encoder and are listed apart.
    """
    with torch.device("meta"):
        model = Bert4Rec(config)
    total = sum(p.numel() for p in model.parameters())
    tables = model.table_parameters()
    positions = config.max_len * config.hidden_dim if config.positions == "learned" else 0
    return {
        "total": total,
        "item_tables": tables,
        "positions": positions,
        "non_embedding": total - tables - positions,
    }


def closed_formula(config: ModelConfig) -> int:
    """Return the parameter count by arithmetic: tables, positions, layers, norms, head."""
    D, f = config.hidden_dim, config.ffn_factor
    layer = (4 * D * D + 4 * D) + (2 * f * D * D + f * D + D) + 4 * D
    total = config.vocab_size * D + config.num_layers * layer
    total += config.max_len * D if config.positions == "learned" else 0
    total += 2 * D * (int(config.embedding_norm) + int(config.final_norm))
    total += (D * D + D + 2 * D) if config.head == "mlp" else 0
    total += 0 if config.tied else config.output_rows * D
    return total + (config.output_rows if config.output_bias else 0)


def sizes_main(argv: list[str] | None = None) -> int:
    """Print every named size with its parameter counts."""
    parser = Parser(prog="python -m reclib sizes", description="Every named size, its parameters counted.")
    parser.add_argument("--json", action="store_true", help="as JSON, with more kinds of parameters")
    given = parser.parse_args(argv)
    counts = {
        size: {"num_items": SIZES[size]["num_items"]} | count_parameters(model_config(size)) for size in SIZES
    }
    if given.json:
        print(json.dumps(counts, indent=2))
        return 0
    print(f"{'size':>6} {'items':>8} {'total':>12} {'item tables':>12} {'non-embedding':>14}")
    for size, row in counts.items():
        print(
            f"{size:>6} {row['num_items']:>8,} {row['total']:>12,} {row['item_tables']:>12,} "
            f"{row['non_embedding']:>14,}"
        )
    return 0
