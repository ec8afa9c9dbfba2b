"""BERT4Rec: item and position embeddings, a bidirectional encoder, an output layer over the catalogue.

Reference: Sun et al., "BERT4Rec", CIKM 2019, section 3. Differences from a textbook encoder:

- A row may hold several sequences one after another ("packed", Krell et al. 2021, arXiv 2107.02027).
  Attention stays inside a segment, by a mask, and positions restart with each.
- The encoder (`encode`) and the output layer (`head_input`, `output_weight`) are called separately, so that
  only target positions reach the output layer. The product with the output table is left to the caller.
- Dropout on attention probabilities is off by default, because it prevents fused attention kernels.
- With `causal` attention the model predicts the next item (SASRec, Kang and McAuley, ICDM 2018, with full
  cross-entropy). Nothing else differs.

An adapted linear layer or item table (`lora`) may depend on the instance. Its factors are passed as an
argument from `encode` to the layer; plain layers do not get them.

Item vectors may be narrower or wider than the encoder (`table_dim`). They are then projected into the encoder
and back, as in ALBERT (Lan et al., ICLR 2020, arXiv 1909.11942, section 3.1).

Shapes: R rows, L positions in a row, Q query positions of a row, D hidden_dim, E width of an item vector (D
without `table_dim`), H heads, r rank of an adapter, V rows of the output table, M target positions.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclib.config import PAD, SIZES, InputError, ModelConfig, as_dict, model_config
from reclib.system import Parser

# -- gradient sinks ------------------------------------------------------------------------------------------
#
# Autograd allocates new gradients in every step. For an item table these are hundreds of megabytes, which the
# C library returns to the kernel and gets back zeroed page by page: 40 ms and more for 164 MB on two cores,
# several times a step. A sink keeps the gradient in one tensor for the whole run. The output layer overwrites
# it and the lookup adds to it. For a table that is only looked up, the rows of the last step are cleared. The
# values are the same.
#
# Sinks are used on a CPU in full precision, without compilation.

SMALLEST_BYTES = 8 * 2**20  # smaller tables are left to autograd


class Sink:
    """The gradient of one parameter, in the same tensor for a whole run."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.grad = torch.zeros_like(parameter)
        self.fresh = True  # not written in this step: the content is to be treated as zero
        self.dense = False  # written by the output layer: any row may be non-zero
        self.rows: list[Tensor] = []  # otherwise: the rows written by lookups

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Return None: a copied model has no sinks, which belong to one run."""

    def start(self) -> None:
        """Begin a step. The content is cleared on the first write, if necessary."""
        self.fresh = True

    def overwrite(self, product: tuple[Tensor, Tensor], part: slice) -> None:
        """Set the rows `part` to a matrix product and the others to zero; add to them later in a step."""
        left, right = product
        if self.fresh:
            self.grad[: part.start].zero_()
            self.grad[part.stop :].zero_()
            torch.mm(left, right, out=self.grad[part])
        else:  # a further micro-batch of the step
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
        """Mark all rows as possibly non-zero, since gradients of other processes are added."""
        self.dense, self.rows = True, []

    def for_norm(self) -> Tensor:
        """Return the rows that may be non-zero, which have the same norm as the whole gradient."""
        grad = self.finish()
        return grad if self.dense or not self.rows else grad[torch.cat(self.rows).unique()]

    def _clear(self) -> None:
        if self.dense:
            self.grad.zero_()
        else:
            for rows in self.rows:
                self.grad[rows] = 0
        self.dense, self.rows = False, []


class Lookup(torch.autograd.Function):
    """Embedding lookup whose gradient is added to a sink."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, sink: Sink, skip: int) -> Tensor:
        """Return weight[index] (..., D); row `skip` gets no gradient."""
        ctx.save_for_backward(index)
        ctx.sink, ctx.skip = sink, skip
        return F.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Add to the sink and return None, so that autograd allocates nothing."""
        (index,) = ctx.saved_tensors
        ctx.sink.add_rows(index.flatten(), grads[0].flatten(0, -2), ctx.skip)
        return None, None, None, None


# -- the encoder ---------------------------------------------------------------------------------------------


def attention_bias(
    segment_ids: Tensor, dtype: torch.dtype, causal: bool = False, query_index: Tensor | None = None
) -> Tensor:
    """Return the bias of attention scores that restricts attention to segments.

    `segment_ids` (R, L) numbers the sequences of a row from 1. 0 is padding, whose positions attend to each
    other, which keeps their softmax finite. `causal` hides later positions as well. Returns (R, 1, L, L) of 0
    and -inf, or (R, 1, Q, L) for the query positions `query_index` (R, Q).
    """
    queries = segment_ids if query_index is None else segment_ids.gather(1, query_index)
    hidden = queries[:, :, None] != segment_ids[:, None, :]  # (R, L or Q, L)
    if causal:
        place = torch.arange(segment_ids.shape[1], device=segment_ids.device)
        query_places = place if query_index is None else query_index
        hidden |= query_places[..., None] < place
    kind, width = hidden.device.type, hidden.shape[2]
    if kind != "cpu":
        # Fused kernels need the mask in the type of the products, with rows aligned to 8 elements. Otherwise
        # every layer would convert and copy it.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        width = -(-width // 8) * 8
    bias = torch.zeros(*hidden.shape[:2], width, dtype=dtype, device=hidden.device)[..., : hidden.shape[2]]
    return bias.masked_fill_(hidden, float("-inf")).unsqueeze(1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return the positions `index` (R, Q) of each row of x (R, L, D) as (R, Q, D)."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return F.embedding(index + first, x.flatten(0, 1))  # the backward of embedding is faster than gather's


def sinusoidal_positions(max_len: int, hidden_dim: int) -> Tensor:
    """Return the fixed position table (L, D) of Vaswani et al. 2017, section 3.5."""
    rate = torch.exp(torch.arange(0, hidden_dim, 2) * (-math.log(10_000.0) / hidden_dim))
    angle = torch.arange(max_len)[:, None] * rate  # (L, D/2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(max_len, hidden_dim)


class Dropout(nn.Module):
    """Dropout with cheap random bits on a CPU, where torch draws them one by one.

    Sixteen bits decide on each element: p is rounded to 1/65536, and the scale is that of the rounded p, so
    the expectation is exact. On other devices this is `F.dropout`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share p of its elements zero and the others scaled by 1 / (1 - p)."""
        if not self.training or self.p == 0:
            return x
        return x * dropout_factor(x.detach(), self.p) if x.device.type == "cpu" else F.dropout(x, self.p)


# A custom operator, so that a compiler does not trace into numpy.
@torch.library.custom_op("reclib::dropout_factor", mutates_args=(), device_types="cpu")
def dropout_factor(x: Tensor, p: float) -> Tensor:
    """Return a tensor like x of 0, with probability p, and 1 / (1 - p)."""
    levels = 1 << 16
    dropped = round(p * levels)
    # Seeded from torch's generator in each call, so that a run resumes with the same bits from its state.
    seed = int(torch.empty((), dtype=torch.int64).random_())
    bits = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.int16)[: x.numel()]
    keep = torch.from_numpy(bits).view(x.shape) >= dropped - levels // 2
    return keep.to(x.dtype).mul_(levels / (levels - dropped))


@dropout_factor.register_fake
def _(x: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def apply_linear(
    layer: nn.Module, x: Tensor, factors: Tensor | None = None, part: slice | None = None
) -> Tensor:
    """Return a linear layer's outputs (..., out) for x (..., in), or the outputs `part` of them.

    Plain and adapted layers compute `part` only; an adapted layer gets its `factors` (..., r). Modules of
    other types are called normally, and their outputs are sliced.
    """
    if getattr(layer, "takes_factors", False):
        return layer(x, factors, part)
    if part is None:
        return layer(x)
    if type(layer) is nn.Linear:
        return F.linear(x, layer.weight[part], layer.bias[part])
    return layer(x)[..., part]


class SelfAttention(nn.Module):
    """Multi-head self-attention inside segments."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_dim, 3 * config.hidden_dim)
        self.out = nn.Linear(config.hidden_dim, config.hidden_dim)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        queries: Tensor | None = None,
        factors: Tensor | None = None,
        query_factors: Tensor | None = None,
    ) -> Tensor:
        """Return (R, L, D) for x (R, L, D) and the attention bias (R, 1, L, L).

        With `queries` (R, Q, D) the bias is (R, 1, Q, L) and the result (R, Q, D). `query_factors` are the
        factors of the positions in the result.
        """
        D = x.shape[-1]
        if queries is None:
            q, k, v = apply_linear(self.qkv, x, factors).chunk(3, dim=-1)
        else:
            q = apply_linear(self.qkv, queries, query_factors, slice(0, D))
            k, v = apply_linear(self.qkv, x, factors, slice(D, 3 * D)).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(  # (R, H, L or Q, D/H)
            self._split(q),
            self._split(k),
            self._split(v),
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return apply_linear(self.out, y.transpose(1, 2).flatten(2), query_factors)

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

    def forward(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return (R, L, D) for x (R, L, D)."""
        return apply_linear(self.down, F.gelu(apply_linear(self.up, x, factors)), factors)


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

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        query_index: Tensor | None = None,
        factors: Tensor | None = None,
        query_factors: Tensor | None = None,
    ) -> Tensor:
        """Return (R, L, D) for x (R, L, D) and the attention bias (R, 1, L, L).

        With `query_index` (R, Q) bias is (R, 1, Q, L) and the result (R, Q, D), for those positions only.
        """
        keys = self.attention_norm(x) if self.pre_norm else x  # (R, L, D): the input of keys and values
        queries = None
        if query_index is None:
            query_factors = factors
        else:
            x = take(x, query_index)  # (R, Q, D)
            queries = self.attention_norm(x) if self.pre_norm else x
        x = x + self.dropout(self.attention(keys, bias, queries, factors, query_factors))
        if self.pre_norm:
            return x + self.dropout(self.ffn(self.ffn_norm(x), query_factors))
        x = self.attention_norm(x)
        return self.ffn_norm(x + self.dropout(self.ffn(x, query_factors)))


class HeadTransform(nn.Module):
    """The "mlp" head between encoder and output table: Linear, GELU, LayerNorm, Dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return (..., D) for x (..., D)."""
        return self.dropout(self.norm(F.gelu(apply_linear(self.linear, x, factors))))


class Bert4Rec(nn.Module):
    """The masked-item transformer. Item ids: PAD 0, items 1..num_items, MASK num_items + 1."""

    plain = True  # no adapters: weights can be copied to 16 bits and steps captured as CUDA graphs
    frozen_columns = 0  # number of first columns of `output_weight` without gradient

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        D, E = config.hidden_dim, config.table_width
        self.item_table = nn.Embedding(config.vocab_size, E, padding_idx=PAD)
        self.table_in = None if config.table_dim is None else nn.Parameter(torch.empty(D, E))
        self.table_out = None if config.table_dim is None else nn.Parameter(torch.empty(E, D))
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
            self.item_table.weight if config.tied else nn.Parameter(torch.empty(config.output_rows, E))
        )
        self.output_bias = nn.Parameter(torch.empty(config.output_rows)) if config.output_bias else None
        self.item_sink: Sink | None = None  # None: autograd keeps the item table's gradient
        self.output_sink: Sink | None = None  # the same sink if the tables are tied
        self.prior: Any = None  # an `evaluate.baselines.CountPrior` that is added to the scores
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw weights from N(0, 0.02), as BERT does; biases and the PAD row are zero.

        The projections between tables and encoder preserve the scale of their input.
        """
        for name, parameter in self.named_parameters():
            if name in ("table_in", "table_out"):
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            elif parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            else:
                parameter.zero_()  # biases, and the offsets of norms
        self.item_table.weight[PAD].zero_()

    def use_sinks(self, enabled: bool) -> dict[nn.Parameter, Sink]:
        """Give each large trained table a new sink, or remove the sinks; return the sinks in use."""
        tables: list[Any] = [self.item_table.weight, self.output_weight]
        sinks: dict[nn.Parameter, Sink] = {}
        for table in tables:
            large = table.numel() * table.element_size() >= SMALLEST_BYTES
            if enabled and large and table.requires_grad and table not in sinks:
                sinks[table] = Sink(table)
        self.item_sink, self.output_sink = (sinks.get(table) for table in tables)
        return sinks

    def look_up(self, items: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return the item vectors (..., E) of ids (...)."""
        if getattr(self.item_table, "takes_factors", False):
            return self.item_table(items, factors)
        if self.item_sink is None or not torch.is_grad_enabled():
            return self.item_table(items)
        return Lookup.apply(self.item_table.weight, items, self.item_sink, PAD)

    def into_encoder(self, vectors: Tensor) -> Tensor:
        """Project and scale item vectors (..., E) to inputs of the encoder (..., D)."""
        x = vectors if self.table_in is None else F.linear(vectors, self.table_in)
        # Sinusoidal positions have entries of 0.7 on average, initial item vectors of 0.02.
        return x * math.sqrt(self.config.hidden_dim) if self.config.scale_items else x

    def encode(
        self,
        items: Tensor,
        segment_ids: Tensor,
        positions: Tensor,
        query_index: Tensor | None = None,
        factors: Tensor | None = None,
        query_factors: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (R, L, D) of rows of item ids.

        `items`, `segment_ids` and `positions` are (R, L) integers: ids, with MASK at the targets; the number
        of the sequence inside its row (0: padding); the row of the position table.

        With `query_index` (R, Q) only the states at those positions are returned, (R, Q, D). The last layer
        then computes keys and values everywhere, and all else at those positions only.

        `factors` (R, L, r) and `query_factors` (R, Q, r) are for adapted layers (`AdaptedModel.encode`).
        """
        x = self.into_encoder(self.look_up(items, factors)) + F.embedding(positions, self.position_table)
        x = self.dropout(self.embedding_norm(x))
        bias = attention_bias(segment_ids, x.dtype, self.config.causal)  # (R, 1, L, L)
        if query_index is None:
            for block in self.blocks:
                x = block(x, bias, factors=factors)
            return self.final_norm(x)
        for block in self.blocks[:-1]:
            x = block(x, bias, factors=factors)
        # Earlier layers need all positions, for the keys and values of the next layer.
        query_bias = attention_bias(segment_ids, x.dtype, self.config.causal, query_index)  # (R, 1, Q, L)
        return self.final_norm(self.blocks[-1](x, query_bias, query_index, factors, query_factors))

    def head_input(self, hidden: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return the left operand (M, E) of the product with the output table, for hidden states (M, D)."""
        x = self.transform(hidden, factors) if self.config.head == "mlp" else hidden
        return x if self.table_out is None else F.linear(x, self.table_out)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (M, V) of every row of the output table for hidden states (M, D)."""
        return F.linear(self.head_input(hidden), self.output_weight, self.output_bias)

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return groups of trained parameters, each with a factor of the learning rate."""
        return [([p for p in self.parameters() if p.requires_grad], 1.0)]

    def origin(self) -> dict[str, Any]:
        """Return the identity of the initial weights: their hash, and the names of the trained ones."""
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        if not trained:
            raise InputError("all parameters of the model are frozen: there is nothing to train")
        return {"base_sha256": base_hash(self), "trained": trained}


def base_hash(model: Bert4Rec) -> str:
    """Return the sha256 of a model's configuration and weights, which identifies the base of an adapter."""
    digest = hashlib.sha256(json.dumps(as_dict(model.config), sort_keys=True).encode())
    counts = () if model.prior is None else model.prior.named_buffers("prior")
    for name, tensor in (*model.named_parameters(), *counts):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().flatten().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Count parameters on the meta device: total, item tables with output bias, positions, all others."""
    with torch.device("meta"):
        model = Bert4Rec(config)
    total = sum(p.numel() for p in model.parameters())
    tables = {p for p in (model.item_table.weight, model.output_weight, model.output_bias) if p is not None}
    item_tables = sum(p.numel() for p in tables)
    positions = config.max_len * config.hidden_dim if config.positions == "learned" else 0
    parts = {"total": total, "item_tables": item_tables, "positions": positions}
    return parts | {"non_embedding": total - item_tables - positions}


def sizes_main(argv: list[str] | None = None) -> int:
    """Print every named size with its parameter counts."""
    parser = Parser(prog="python -m reclib sizes", description="Every named size, its parameters counted.")
    parser.add_argument("--json", action="store_true", help="as JSON, with more kinds of parameters")
    as_json = parser.parse_args(argv).json
    counts = {
        size: {"num_items": SIZES[size]["num_items"]} | count_parameters(model_config(size)) for size in SIZES
    }
    if as_json:
        print(json.dumps(counts, indent=2))
        return 0
    print(f"{'size':>6} {'items':>8} {'total':>12} {'item tables':>12} {'non-embedding':>14}")
    for size, row in counts.items():
        items, total, tables, _, encoder = row.values()
        print(f"{size:>6} {items:>8,} {total:>12,} {tables:>12,} {encoder:>14,}")
    return 0
