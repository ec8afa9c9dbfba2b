r"""Low-rank adapters of single layers. An adapted layer stands in the place of the layer that it adapts.

    x (N, in) --- W, frozen ----------------------------------- + --- y (N, out)
        \                                                       /
         dropout --- A (r, in) --- (N, r) times f --- B (out, r)

B starts at zero, so a new adapter changes nothing. The kinds differ in the factor f:

- `lora` (Hu et al. 2021, arXiv 2106.09685): alpha / r;
- `rslora` (Kalajdzievski 2023, arXiv 2312.03732): alpha / sqrt(r);
- `gated`: alpha / r times sigmoid(a), with a learned scalar a per layer. It can be merged into B and has no
  more capacity than `lora`;
- `ilora` (Kong et al., NeurIPS 2024, arXiv 2408.10159): alpha K / r times the weights g of K experts, each
  repeated r / K times. Expert k has slices A_k and B_k of A and B, of rank r / K each, so that

      sum_k g_k B_k A_k x  =  B ((A x) * repeat(g, r / K)),

  at the cost of `lora`. With the uniform g = 1 / K it is `lora`. g depends on the position: f (..., r) is the
  argument `factors`, which `Bert4Rec.encode` passes to every adapted layer.

Shapes: N positions, r rank, K experts, V rows of a table, D hidden_dim, M target positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclib.config import AdapterConfig
from reclib.model.bert4rec import Dropout


class LowRankFactor(nn.Module):
    """The factor f of one adapted layer, by the kind of its adapter."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.lora_gate = nn.Parameter(torch.zeros(())) if config.kind == "gated" else None

    def constant_factor(self) -> float | Tensor:
        """Return f of a kind that does not depend on the instance: a number or ()."""
        scaling = self.config.scaling
        return scaling if self.lora_gate is None else scaling * self.lora_gate.sigmoid()

    def times_factor(self, y: Tensor, factors: Tensor | None) -> Tensor:
        """Return f times y = A x (..., r); `factors` (..., r) is f of an `ilora` adapter."""
        if self.config.kind == "ilora":
            if factors is None:
                raise RuntimeError("an ilora adapter was called without factors: use AdaptedModel.encode")
            return y * factors.to(y.dtype)
        factor = self.constant_factor()
        return y * (factor.to(y.dtype) if isinstance(factor, Tensor) else factor)


class LowRank(LowRankFactor):
    """A and B of one adapted layer. Names and shapes are PEFT's."""

    def __init__(self, inputs: int, outputs: int, config: AdapterConfig) -> None:
        super().__init__(config)
        self.lora_A = nn.Linear(inputs, config.rank, bias=False)  # Kaiming-uniform, as in the paper
        self.lora_B = nn.Linear(config.rank, outputs, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.dropout = Dropout(config.dropout)

    def inner(self, x: Tensor, factors: Tensor | None) -> Tensor:
        """Return f A x (..., r) for x (..., in)."""
        return self.times_factor(self.lora_A(self.dropout(x)), factors)

    def added_to(self, y: Tensor, x: Tensor, factors: Tensor | None, part: slice) -> Tensor:
        """Return y (..., outputs in `part`) plus the adapter's outputs for x (..., in)."""
        # A copy of B as (r, out), for which the gradient is a product of two wide matrices. As (out, r) it
        # took up to seven times as long on a CPU, and the backward pass through B twice as long.
        weight = self.lora_B.weight[part].t().contiguous()
        return torch.addmm(y.flatten(0, -2), self.inner(x, factors).flatten(0, -2), weight).view(y.shape)

    def delta(self, factor: float | Tensor) -> Tensor:
        """Return B f A (out, in) for a constant factor: a number, () or (r, 1)."""
        return self.lora_B.weight @ (self.lora_A.weight * factor)


class LowRankTable(LowRankFactor):
    """A and B of an adapted embedding. A (r, V) is looked up, and starts at zero in place of B (D, r)."""

    def __init__(self, rows: int, width: int, config: AdapterConfig) -> None:
        super().__init__(config)
        self.lora_embedding_A = nn.Parameter(torch.zeros(config.rank, rows))
        self.lora_embedding_B = nn.Parameter(torch.randn(width, config.rank))

    def added_to(self, y: Tensor, index: Tensor, factors: Tensor | None) -> Tensor:
        """Return y (..., D) plus the adapter's vectors of the rows `index` (...)."""
        inner = self.times_factor(F.embedding(index, self.lora_embedding_A.t()), factors)  # (..., r)
        return y + F.linear(inner, self.lora_embedding_B)

    def delta(self, factor: float | Tensor) -> Tensor:
        """Return the update of the table (V, D) for a constant factor: a number, () or (r, 1)."""
        return (self.lora_embedding_B @ (self.lora_embedding_A * factor)).t()


class AdaptedLayer(nn.Module):
    """A layer `base` with named adapters, at most one of them active."""

    takes_factors = True  # `forward` has the argument `factors`; see `bert4rec.apply_linear`

    def __init__(self, base: nn.Module | None) -> None:
        super().__init__()
        self.base: Any = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None

    @property
    def weight(self) -> Tensor:
        """The layer's own weight."""
        return self.base.weight

    @property
    def active_adapter(self) -> Any:
        """The adapter whose outputs are added, or None."""
        if self.active is None or self.active not in self.adapters:
            return None
        return self.adapters[self.active]

    def add(self, name: str, config: AdapterConfig) -> None:
        """Add a new adapter, which changes nothing yet."""
        outputs, inputs = self.weight.shape
        self.adapters[name] = LowRank(inputs, outputs, config)


class AdaptedLinear(AdaptedLayer):
    """A linear layer with adapters."""

    def forward(self, x: Tensor, factors: Tensor | None = None, part: slice | None = None) -> Tensor:
        """Return (..., out) for x (..., in), or the outputs `part` only."""
        part = part or slice(None)
        y = F.linear(x, self.base.weight[part], self.base.bias[part])
        adapter = self.active_adapter
        return y if adapter is None else adapter.added_to(y, x, factors, part)


class AdaptedEmbedding(AdaptedLayer):
    """A table that is looked up, with adapters."""

    def add(self, name: str, config: AdapterConfig) -> None:
        """Add a new adapter, which changes nothing yet."""
        self.adapters[name] = LowRankTable(self.base.num_embeddings, self.base.embedding_dim, config)

    def forward(self, index: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return the vectors (..., D) of the rows `index` (...)."""
        y = self.base(index)
        adapter = self.active_adapter
        return y if adapter is None else adapter.added_to(y, index, factors)


class AdaptedTable(AdaptedLayer):
    """The output table (V, D) with adapters. It has no forward: callers multiply by it.

    h W' = h (W + B f A)^T is [h, f A h] times [W, B]^T: the adapter adds r columns to both.
    """

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__(None)
        self.table = table

    @property
    def weight(self) -> Tensor:
        """The table's own weight (V, D)."""
        return self.table

    @property
    def frozen_columns(self) -> int:
        """Number of first columns of `widened` that are frozen and need no gradient."""
        return 0 if self.active_adapter is None else self.table.shape[1]

    def widened(self) -> Tensor:
        """Return the table and B side by side, (V, D + r), or the table if no adapter is active."""
        adapter = self.active_adapter
        if adapter is None:
            return self.table
        return torch.cat((self.table, adapter.lora_B.weight.to(self.table.dtype)), 1)

    def widen(self, x: Tensor, factors: Tensor | None) -> Tensor:
        """Return x (M, D) and f A x side by side, (M, D + r), or x if no adapter is active."""
        adapter = self.active_adapter
        return x if adapter is None else torch.cat((x, adapter.inner(x, factors).to(x.dtype)), -1)
