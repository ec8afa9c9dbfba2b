"""What torch's own modules do with an adapter that stands in the place of a linear map inside them.

Two shortcuts take a map's weight and never call the map:

- `nn.MultiheadAttention` hands `out_proj.weight` to `F.multi_head_attention_forward`, always: an adapter
  there is never executed and gets no gradient (PEFT's documentation of its layer for it says so);
- `nn.TransformerEncoderLayer` in `eval()` hands all its weights to one fused operator (the "fast path"),
  unless autograd needs one of them. The base of an adapter is frozen, so it does not.

`ScalarGateLora` re-creates, in our own words, the adapter of the study that this one started from. It keeps
the weight and bias of its base visible, as a module must that torch looks into: so nothing complains.

Shapes: B sequences, T positions, D hidden_dim, r rank, N rows of an output table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Mode = Literal["train", "eval", "eval, fast path off", "eval, CPU autocast"]
MODES: tuple[Mode, ...] = ("train", "eval", "eval, fast path off", "eval, CPU autocast")
PLACES = ("out_proj", "linear1", "linear2")  # of a layer, where that study adapts it


class ScalarGateLora(nn.Module):
    """W x + sigmoid(a) (alpha / r) B A x: a frozen map and a low-rank one, gated by one learned scalar.

    The scalar does not see the instance. It folds into B (`folded`), so that what this can represent is what
    LoRA of the same rank can.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)
        self.gate = nn.Parameter(torch.zeros(()))
        self.scaling = alpha / rank

    @property
    def weight(self) -> Tensor:
        """The base's own weight: what torch's shortcuts take."""
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        """The base's own bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        return self.base(x) + self.gate.sigmoid() * self.scaling * self.lora_B(self.lora_A(x))

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """Return one plain linear map that does the same for every input."""
        plain = nn.Linear(self.base.in_features, self.base.out_features)
        delta = self.gate.sigmoid() * self.scaling * self.lora_B.weight @ self.lora_A.weight
        plain.weight.copy_(self.weight + delta)
        plain.bias.copy_(self.bias)
        return plain


class Adapted(NamedTuple):
    """A frozen encoder of torch's own layers with adapters inside, and an input for it."""

    encoder: nn.TransformerEncoder
    x: Tensor  # (B, T, D)

    def adapters(self) -> dict[str, ScalarGateLora]:
        """Return the adapters by the name of their place."""
        found = dict(self.encoder.named_modules())
        return {name: one for name, one in found.items() if isinstance(one, ScalarGateLora)}


def adapted_encoder(
    hidden_dim: int = 64, num_layers: int = 2, num_heads: int = 4, rank: int = 8, seed: int = 0
) -> Adapted:
    """Build torch's encoder (post-norm, GELU, batch first, without dropout), freeze it, adapt each layer.

    B is drawn at random and not zero, so that an adapter that runs changes the output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.TransformerEncoderLayer(
            hidden_dim, num_heads, 4 * hidden_dim, dropout=0.0, activation="gelu", batch_first=True
        )
        encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False).requires_grad_(False)
        for one in encoder.layers:
            one.self_attn.out_proj = ScalarGateLora(one.self_attn.out_proj, rank, 2.0 * rank)
            one.linear1 = ScalarGateLora(one.linear1, rank, 2.0 * rank)
            one.linear2 = ScalarGateLora(one.linear2, rank, 2.0 * rank)
        found = Adapted(encoder, torch.randn(4, 10, hidden_dim))
        for adapter in found.adapters().values():
            nn.init.normal_(adapter.lora_B.weight, std=0.5)
    return found


def gradients(adapted: Adapted) -> dict[str, float | None]:
    """Return the norm of the gradient of B after one backward pass in train mode; None: it got none."""
    adapted.encoder.train().zero_grad()
    adapted.encoder(adapted.x).square().sum().backward()
    return {
        name: None if (grad := one.lora_B.weight.grad) is None else float(grad.norm())
        for name, one in adapted.adapters().items()
    }


@contextlib.contextmanager
def silenced(adapted: Adapted, place: str) -> Iterator[None]:
    """Set B of the adapters at `place` ("" for all) to zero for so long: they then add nothing."""
    chosen = [one for name, one in adapted.adapters().items() if name.endswith(place)]
    kept = [one.lora_B.weight.detach().clone() for one in chosen]
    with torch.no_grad():
        for one in chosen:
            one.lora_B.weight.zero_()
        yield
        for one, weight in zip(chosen, kept, strict=True):
            one.lora_B.weight.copy_(weight)


def output(adapted: Adapted, mode: Mode) -> Tensor:
    """Return the encoder's output (B, T, D) in a mode; autograd stays on, as it is in that study's loop."""
    encoder, before = adapted.encoder, torch.backends.mha.get_fastpath_enabled()
    encoder.train(mode == "train")
    try:
        torch.backends.mha.set_fastpath_enabled(mode != "eval, fast path off")
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "eval, CPU autocast"):
            return encoder(adapted.x).detach().float()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        encoder.train()


def effect(adapted: Adapted, mode: Mode, place: str = "") -> float:
    """Return the largest change of any output when the adapters at `place` (all by default) are silenced."""
    spoken = output(adapted, mode)
    with silenced(adapted, place):
        quiet = output(adapted, mode)
    return float((spoken - quiet).abs().max())


def effects(adapted: Adapted) -> list[dict[str, Any]]:
    """Return a row for each mode: the effect of the adapters at each place, and of all."""
    places = {**{name: name for name in PLACES}, "all": ""}
    return [
        {"mode": mode} | {name: effect(adapted, mode, place) for name, place in places.items()}
        for mode in MODES
    ]


def counted_linear_calls(num_layers: int, rank: int = 8, hidden_dim: int = 16, rows: int = 32) -> int:
    """Count calls of `F.linear` in one training pass of an adapted model of `num_layers`.

    The model is that study's: the encoder, an adapted linear map (`output_ffn`), an adapted output table.
    """
    adapted = adapted_encoder(hidden_dim, num_layers, 2, rank)
    head = nn.Sequential(
        ScalarGateLora(nn.Linear(hidden_dim, hidden_dim), rank, rank),
        ScalarGateLora(nn.Linear(hidden_dim, rows), rank, rank),
    )
    with patch.object(F, "linear", wraps=F.linear) as counted:  # what modules and torch's own functions call
        head(adapted.encoder(adapted.x))
    return counted.call_count
