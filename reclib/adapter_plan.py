"""What a step costs when the model is frozen and adapters on its encoder are trained, counted without torch.

A frozen map has no gradient of its weights: of its three products two remain, and of the first layer's keys,
queries and values one, since nothing below them is trained. Of the head's table two remain. Each adapter
adds narrow products beside the map that it adapts, and `ilora` a gate on the mean of the visible items.

Checked against what torch counts on the adapted model itself (`tests/test_adapter_plan.py`). Only adapters on
all encoder matrices are planned for, the default of `lowrank.AdapterConfig`.

Letters as in `workload`, with r rank and K experts.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic import dataclasses as validated

from reclib import flops
from reclib.config import STRICT, ModelConfig, Positive

MATRICES = 4  # of a layer that have an adapter: keys, queries and values in one, what follows them, up, down


@validated.dataclass(frozen=True, kw_only=True, config=STRICT)
class AdapterPlan:
    """An adapter on all encoder matrices of a frozen model."""

    kind: Literal["lora", "rslora", "gated", "ilora"] = "lora"
    rank: Positive = 8  # r
    num_experts: Positive = 4  # K, of `ilora`

    @model_validator(mode="after")
    def _experts_divide(self) -> AdapterPlan:
        if self.kind == "ilora" and self.rank % self.num_experts:
            raise ValueError(f"rank={self.rank} must be divisible by num_experts={self.num_experts}")
        return self


def trained_parameters(model: ModelConfig, adapter: AdapterPlan) -> int:
    """Count what is trained: A and B of every matrix, and the gate."""
    D, F = model.hidden_dim, model.ffn_factor * model.hidden_dim
    layer = adapter.rank * (8 * D + 2 * F) + (MATRICES if adapter.kind == "gated" else 0)
    gate = D * adapter.num_experts if adapter.kind == "ilora" else 0
    return model.num_layers * layer + gate


def frozen_linear(model: ModelConfig, places: float, last: float) -> float:
    """Return FLOPs of the frozen encoder's linear maps, forward and the gradient of what enters them.

    `places` T go through every layer but the last, where `last` G go on.
    """
    D, both = model.hidden_dim, model.num_layers - 1
    forward = both * flops.layer_linear(model, 1, 1) * places
    forward += flops.layer_linear(model, 1, 0) * places + flops.layer_linear(model, 0, 1) * last
    first = 2 * 3 * D * D * places if both else 2 * D * D * (2 * places + last)
    return 2 * forward - first


def adapter_products(model: ModelConfig, adapter: AdapterPlan, places: float, last: float) -> float:
    """Return FLOPs of A and B of every matrix, forward and both gradients, and of the gate.

    In the last layer queries and keys are adapted apart where fewer places ask than are there.
    """
    D, F, r = model.hidden_dim, model.ffn_factor * model.hidden_dim, adapter.rank
    layer = 8 * D + 2 * F  # (in + out) of its matrices
    apart = last != places
    ends = places * (3 * D) + last * (2 * D) if apart else places * (4 * D)  # of queries, keys and values
    forward = (model.num_layers - 1) * layer * places + ends + last * (4 * D + 2 * F)
    first = places * D + (last * D if apart and model.num_layers == 1 else 0)  # whose input is not trained
    return 2 * r * (3 * forward - first) + gate_products(model, adapter, places)


def gate_products(model: ModelConfig, adapter: AdapterPlan, places: float) -> float:
    """Return FLOPs of `ilora`'s gate: means over segments, W forward and its gradient."""
    if adapter.kind != "ilora":
        return 0.0
    return 2 * places * model.hidden_dim * (model.max_len + 2 * adapter.num_experts)


def adapter_elements(model: ModelConfig, places: float, last: float) -> float:
    """Return the elements that adapters read and add to beside their maps, forward: in and out of each."""
    D, F = model.hidden_dim, model.ffn_factor * model.hidden_dim
    return (model.num_layers - 1) * (8 * D + 2 * F) * places + 3 * D * places + (6 * D + 2 * F) * last


def adapter_bytes(model: ModelConfig, adapter: AdapterPlan, places: float, last: float, width: int) -> float:
    """Return the bytes that activations of the adapters hold: A x, scaled, and B turned round."""
    asked = (model.num_layers - 1) * places + last
    turned = trained_parameters(model, adapter)
    gate = places * (model.max_len + adapter.rank) if adapter.kind == "ilora" else 0.0
    return width * (2 * MATRICES * adapter.rank * asked + turned + gate)
