"""A frozen model with adapters, seen from outside as the model it was.

    adapted = AdaptedModel(model)                     # freezes it
    adapted.add("june", AdapterConfig(kind="ilora"))  # from here on it is trained as any model is

`encode` computes, before it calls the model's own, one gate a segment from the rows themselves (`instance`,
`gate`), and lets the adapted layers find it while they run (`lowrank.present`).

Shapes: R rows, L places, Q queries of a row, M target positions, D hidden_dim, r rank, K experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclib.adapters import Adapters
from reclib.config import InputError, ModelConfig
from reclib.instance import Rows
from reclib.lowrank import present
from reclib.model import take


class AdaptedModel(Adapters):
    """An adapted model that has what a trainer, a loss and a ranking ask a `Bert4Rec` for."""

    @property
    def config(self) -> ModelConfig:
        """The base's configuration."""
        return self.base.config

    @property
    def item_table(self) -> nn.Module:
        """The item table, adapted or not."""
        return self.base.item_table

    @property
    def output_weight(self) -> Tensor:
        """What `head_input` is multiplied by: (V, D), or (V, D + r) where the output table is adapted."""
        return self.base.output_weight if self.output is None else self.output.widened()

    @property
    def output_bias(self) -> Tensor | None:
        """The base's output bias."""
        return self.base.output_bias

    def table_parameters(self) -> int:
        """Count the base's parameters that grow with the catalogue."""
        return self.twin.table_parameters()

    def expert_weights(self, items: Tensor, segment_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the active `ilora` adapter's weights of the experts (R, L, K): the gate of each segment."""
        name = self.active
        if name is None or name not in self.gates:
            raise InputError(f"adapter {name!r} has no gate on the instance: only kind='ilora' has")
        z = self.representations[name](self.twin, Rows(items, segment_ids, positions))
        return self.gates[name](z)

    def encode(
        self, items: Tensor, segment_ids: Tensor, positions: Tensor, query_index: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states (R, L, D), or (R, Q, D), as `Bert4Rec.encode` does.

        Where the head is adapted by `ilora` they carry their gate in r more columns, which `head_input` uses.
        """
        rows = (items, segment_ids, positions)
        name = self.active
        if name is None or name not in self.gates or self.merged is not None:
            return self.base.encode(*rows, query_index)
        gate: Any = self.gates[name]
        factors = gate.factors(self.expert_weights(*rows))  # (R, L, r)
        if query_index is None:
            with present(factors):
                hidden = self.base.encode(*rows)
            return self._with_factors(hidden, factors)
        asked = query_index
        if asked.shape[1] == items.shape[1]:  # factors are told apart by their number of places: one more
            asked = F.pad(asked, (0, 1))
        at_queries = take(factors, asked)  # (R, Q, r)
        with present(factors, at_queries):
            hidden = self.base.encode(*rows, asked)
        return self._with_factors(hidden, at_queries)[:, : query_index.shape[1]]

    def head_input(self, hidden: Tensor) -> Tensor:
        """Return what is multiplied by `output_weight`, for states (M, D) or such as `encode` gives."""
        D = self.config.hidden_dim
        if hidden.shape[-1] == D:
            return self._head(hidden)
        with present(hidden[..., D:]):
            return self._head(hidden[..., :D])

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (M, V) of every row of the output table for hidden states."""
        return F.linear(self.head_input(hidden), self.output_weight, self.output_bias)

    def _head(self, hidden: Tensor) -> Tensor:
        x = self.base.head_input(hidden)
        return x if self.output is None else self.output.widen(x)

    def _with_factors(self, hidden: Tensor, factors: Tensor) -> Tensor:
        return torch.cat((hidden, factors.to(hidden.dtype)), -1) if self.head_is_adapted else hidden
