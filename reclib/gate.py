"""The gate of an instance-wise adapter: softmax weights of its experts, from what is known of the sequence.

    g = softmax(W z / temperature)

One W serves all layers, as in the paper (Kong et al., NeurIPS 2024, arXiv 2408.10159); there a small
convolutional network stands in the place of the matrix.

Shapes: D width of z, K experts, r rank, N instances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclib.config import InputError, ModelConfig
from reclib.instance import Constant, MeanEmbedding, Noise, OtherSegment, Representation, State
from reclib.lowrank import AdapterConfig
from reclib.model import Bert4Rec


class Gate(nn.Module):
    """Weights of the experts for each instance."""

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(width, config.num_experts, bias=False)
        with torch.no_grad():
            if config.control == "fixed_gate":  # never trained, so no checkpoint has it: drawn the same again
                seeded = torch.Generator().manual_seed(config.gate_seed)
                nn.init.kaiming_uniform_(self.linear.weight, a=5**0.5, generator=seeded)
            self.linear.weight.mul_(config.gate_init)

    def forward(self, z: Tensor) -> Tensor:
        """Return weights (..., K), which sum to 1, for representations z (..., D)."""
        scores = F.linear(z.to(self.linear.weight.dtype), self.linear.weight)
        return torch.softmax(scores.float() / self.config.temperature, -1)

    def factors(self, weights: Tensor) -> Tensor:
        """Return what A x is multiplied by, (..., r), for weights (..., K)."""
        per_expert = self.config.rank // self.config.num_experts
        return weights.repeat_interleave(per_expert, -1) * self.config.scaling

    def constant(self) -> Tensor:
        """Return the weights (K,) that everybody has where z is the constant 1."""
        return self(torch.ones(1, device=self.linear.weight.device)).detach()


class GateSpread(NamedTuple):
    """How far the gate is from the constant that an approximate merge put in its place, by expert (K,)."""

    mean: Tensor  # what was merged
    standard_deviation: Tensor  # over the instances given
    low: Tensor  # 5th percentile
    high: Tensor  # 95th percentile

    @classmethod
    def of(cls, gates: Tensor) -> GateSpread:
        """Return the spread of gates (N, K)."""
        seen = gates.detach().float().reshape(-1, gates.shape[-1])
        low, high = torch.quantile(seen, torch.tensor([0.05, 0.95], device=seen.device), dim=0)
        return cls(seen.mean(0), seen.std(0, correction=0), low, high)


def representation_of(config: AdapterConfig, causal_model: Bert4Rec | None) -> Representation:
    """Return what the gate of an `ilora` adapter looks at, with its control."""
    if config.control == "noise":
        return Noise()
    if config.control == "static_gate":
        return Constant()
    if config.representation == "causal_state":
        if causal_model is None:
            raise InputError("representation='causal_state' needs causal_model, a trained causal model")
        found: Representation = State(causal_model)
    else:
        found = State() if config.representation == "base_state" else MeanEmbedding()
    return OtherSegment(found) if config.control == "shuffled_user" else found


def refuse_other_catalogue(base: ModelConfig, other: ModelConfig) -> None:
    """Raise `InputError` unless a model of `other` can read the base's rows."""
    if other.num_items != base.num_items or other.max_len < base.max_len:
        raise InputError(
            f"causal_model knows {other.num_items} items and {other.max_len} positions, the base "
            f"{base.num_items} and {base.max_len}: train it on the same catalogue, with no fewer positions"
        )
