"""A frozen model with adapters, which has the interface of a plain model.

    adapted = AdaptedModel(model)                     # freezes it
    adapted.add("june", AdapterConfig(kind="ilora"))  # from here on it is trained as any model is

The forward pass of an `ilora` adapter (`AdaptedModel.encode`):

    z = representation(rows)         # (R, L, width): what is known of each sequence, from its visible items
    g = gate(z)                      # (R, L, K): softmax weights of the experts
    f = repeat(g, r / K) * scaling   # (R, L, r): the factors
    base.encode(*rows, factors=f)    # each adapted layer adds B (f * A x), see `lora`

Shapes: R rows, L positions, Q queries of a row, M target positions, D hidden_dim, r rank, K experts.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclib.config import PAD, AdapterConfig, InputError, ModelConfig, validated
from reclib.model.bert4rec import Bert4Rec, Sink, base_hash, take
from reclib.model.lora import AdaptedEmbedding, AdaptedLayer, AdaptedLinear, AdaptedTable

# -- representations -----------------------------------------------------------------------------------------
#
# What the gate knows of a sequence: one vector z, computed from its visible prefix only. iLoRA (Kong et al.,
# NeurIPS 2024, arXiv 2408.10159) mixes the experts of an adapter by a gate on a frozen representation of the
# user's sequence. The rows have MASK at every target, so the target's id cannot leak into z. Rows are packed:
# z belongs to a segment, and all its positions share it. In a causal model every later item is a target, so
# each position has its own z, of the items up to it.
#
# `MeanEmbedding` and `State` may help; the controls `Constant`, `Noise` and `OtherSegment` must not.

CACHE_BYTES = 256 * 2**20  # of cached states; further ones are computed again


class Rows(NamedTuple):
    """What an encoder is given, (R, L) each: see `Bert4Rec.encode`."""

    items: Tensor
    segment_ids: Tensor
    positions: Tensor


def is_visible(rows: Rows, mask_id: int) -> Tensor:
    """Return (R, L): where an item stands that the model may look at, neither MASK nor PAD."""
    return (rows.segment_ids > 0) & (rows.items != mask_id) & (rows.items != PAD)


def same_segment(segment_ids: Tensor) -> Tensor:
    """Return (R, L, L): whether two places of a row are of one segment."""
    return segment_ids[:, :, None] == segment_ids[:, None, :]


def first_places(segment_ids: Tensor) -> Tensor:
    """Return (R, L): the first place of each place's segment."""
    return same_segment(segment_ids).to(torch.int32).argmax(2)


class Representation(nn.Module):
    """Turns rows into one vector a place, the same for all places of a segment. It is never trained."""

    def width(self, base: Bert4Rec) -> int:
        """Return the number of values in a vector."""
        return base.config.hidden_dim

    def forward(self, base: Bert4Rec, rows: Rows) -> Tensor:
        """Return z (R, L, D) of the rows, with `base` as the frozen model without adapters."""
        raise NotImplementedError


class MeanEmbedding(Representation):
    """Mean of the frozen item embeddings of a segment's visible items; zero where there are none."""

    @torch.no_grad()
    def forward(self, base: Bert4Rec, rows: Rows) -> Tensor:
        """Return z (R, L, D)."""
        taken = same_segment(rows.segment_ids) & is_visible(rows, base.config.mask_id)[:, None, :]
        if base.config.causal:
            taken = taken.tril()
        vectors = F.embedding(rows.items, base.item_table.weight)
        share = taken.to(vectors.dtype)
        share = share / share.sum(2, keepdim=True).clamp_min(1.0)
        return (share @ vectors).float()


class Prefixes(NamedTuple):
    """Rows in which each segment holds its visible items, one after another, and then MASK."""

    rows: Rows
    read: Tensor  # (R, L) where in its row the state of each place's segment stands


def visible_prefixes(rows: Rows, base: Bert4Rec, causal: bool) -> Prefixes:
    """Lay the visible items of each segment out in the segment's own places.

    A sequence of the cloze objective has at least one target, so that there is a place for MASK; a segment
    without any is read at its last item. A causal reader is asked at the last visible item instead, and at
    MASK alone where there is none.
    """
    mask_id = base.config.mask_id
    R, L = rows.items.shape
    place = torch.arange(L, device=rows.items.device).expand(R, L)
    first = first_places(rows.segment_ids)
    visible = is_visible(rows, mask_id)
    same = same_segment(rows.segment_ids)
    count = (same & visible[:, None, :]).sum(2)  # (R, L) visible items of the segment
    length = same.sum(2)
    order = (2 * first + (~visible).long()).argsort(dim=1, stable=True)
    rank = place - first
    items = rows.items.gather(1, order)
    items = torch.where(rank == count, mask_id, torch.where(rank < count, items, PAD))
    asked = (count - 1).clamp_min(0) if causal else torch.minimum(count, length - 1)
    used = (rank <= asked) & (rows.segment_ids > 0)
    from_last = base.config.position_origin == "last"
    positions = (asked - rank if from_last else rank) * used
    laid = Rows(torch.where(used, items, PAD), rows.segment_ids * used, positions)
    return Prefixes(laid, first + asked)


class State(Representation):
    """Frozen state from which a model would predict the next item after the visible ones.

    `reader` None: the base. Otherwise a model of the same catalogue, causal as SASRec or not, which is frozen
    and kept in `eval()`.
    """

    def __init__(self, reader: Bert4Rec | None = None) -> None:
        super().__init__()
        self.reader = None if reader is None else frozen_twin(reader)
        # No decorator: that imports torch._dynamo with this module, which takes as long as torch itself.
        self.uncompiled = torch.compiler.disable(State.states)
        self.kept: dict[bytes, Tensor] = {}
        self.kept_bytes = 0

    def width(self, base: Bert4Rec) -> int:
        """Return hidden_dim of the model that is read."""
        return (self.reader or base).config.hidden_dim

    def train(self, mode: bool = True) -> State:
        """Switch this module alone: what it reads stays in `eval()`."""
        self.training = mode
        return self

    def forward(self, base: Bert4Rec, rows: Rows) -> Tensor:
        """Return z (R, L, D), from what is kept where the same rows were seen in `eval()` before."""
        return self.uncompiled(self, base, rows)

    @torch.no_grad()
    def states(self, base: Bert4Rec, rows: Rows) -> Tensor:
        """Return what `forward` does: never compiled, since sizes follow the data and a cache is kept."""
        model = self.reader or base
        if base.config.causal:
            return model.encode(*rows).float()
        is_first = first_places(rows.segment_ids) == torch.arange(
            rows.items.shape[1], device=rows.items.device
        )
        starts = is_first & (rows.segment_ids > 0)
        key = b"" if self.training else _digest(rows)
        states = None if self.training else self.kept.get(key)
        if states is None:
            laid, read = visible_prefixes(rows, model, model.config.causal)
            states = take(model.encode(*laid), read)[starts].float()  # (S, D)
            if not self.training and self.kept_bytes < CACHE_BYTES:
                self.kept[key] = states
                self.kept_bytes += states.numel() * states.element_size()
        # Segments are counted in the order of their first places; all places of one look up the same state.
        number = (starts.flatten().long().cumsum(0) - 1).view(starts.shape)
        number = number.gather(1, first_places(rows.segment_ids)).clamp_min(0)
        return F.embedding(number, states) * (rows.segment_ids > 0)[:, :, None]


class Constant(Representation):
    """Control: the same for everybody, so that the gate is learnt but static."""

    def width(self, base: Bert4Rec) -> int:
        """Return 1."""
        return 1

    def forward(self, base: Bert4Rec, rows: Rows) -> Tensor:
        """Return ones (R, L, 1)."""
        return torch.ones(*rows.items.shape, 1, device=rows.items.device)


class Noise(Representation):
    """Control: numbers of mean 0 and variance 1 that say nothing of the items.

    They are drawn from a hash of the visible items, so that the same prefix has the same and an evaluation
    can be repeated.
    """

    def forward(self, base: Bert4Rec, rows: Rows) -> Tensor:
        """Return z (R, L, D)."""
        taken = same_segment(rows.segment_ids) & is_visible(rows, base.config.mask_id)[:, None, :]
        if base.config.causal:
            taken = taken.tril()
        hashed = _mixed(rows.items.long() + 1)
        seed = (taken * hashed[:, None, :]).sum(2)  # (R, L); integers wrap round
        column = torch.arange(1, base.config.hidden_dim + 1, device=seed.device)
        bits = (_mixed(seed[:, :, None] ^ _mixed(column)) >> 20) & 0xFFFF
        return (bits.float() / 65536 - 0.5) * 12**0.5


class OtherSegment(Representation):
    """Control: the vector of another sequence of the batch, the next one; alone, a sequence keeps its own."""

    def __init__(self, of: Representation) -> None:
        super().__init__()
        self.of = of

    def width(self, base: Bert4Rec) -> int:
        """Return the width of what is exchanged."""
        return self.of.width(base)

    def forward(self, base: Bert4Rec, rows: Rows) -> Tensor:
        """Return z (R, L, D)."""
        if base.config.causal:
            raise InputError(
                "the control 'shuffled_user' needs one vector a sequence: a causal model has many"
            )
        own = self.of(base, rows).flatten(0, 1)  # (R * L, D)
        R, L = rows.items.shape
        place = torch.arange(R * L, device=own.device)
        first = first_places(rows.segment_ids) + L * torch.arange(R, device=own.device)[:, None]
        starts = (first.flatten() == place) & (rows.segment_ids.flatten() > 0)
        # Places that start a segment come first in `order`, in their own order: a fixed shape, no waiting.
        order = (~starts).long().argsort(stable=True)
        rank = (starts.long().cumsum(0) - 1)[first.flatten()]
        partner = order[(rank + 1) % starts.sum().clamp_min(1)]
        return own[partner].view(R, L, -1) * (rows.segment_ids > 0)[:, :, None]


def frozen_twin(model: Bert4Rec) -> Bert4Rec:
    """Return a copy of the model's modules in `eval()` whose weights are the model's own tensors."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    return twin.requires_grad_(False).eval()


def _mixed(x: Tensor) -> Tensor:
    """Return a hash of 64-bit integers: multiply and shift, three times; products wrap round."""
    for factor in (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85, 0x27BB2EE687B0B0FD):
        x = x * factor
        x = x ^ (x >> 29)
    return x


def _digest(rows: Rows) -> bytes:
    """Return what identifies rows, and the precision they are read in."""
    said = hashlib.sha256(str((rows.items.shape, torch.is_autocast_enabled(rows.items.device.type))).encode())
    for tensor in (rows.items, rows.segment_ids):
        said.update(tensor.contiguous().cpu().numpy().tobytes())
    return said.digest()


# -- the gate ------------------------------------------------------------------------------------------------
#
#     g = softmax(W z / temperature): weights of the K experts
#
# One W serves all layers, as in the paper, where a small convolutional network takes the place of W.


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


# -- adapters around a model ---------------------------------------------------------------------------------
#
# Added, selected, merged and removed with PEFT's verbs. A layer is replaced by one that holds it.

OUTPUT = "output_weight"  # the path of the output table, which is no module

TARGETS: dict[str, tuple[str, ...]] = {  # what a path ends in
    "qkv": ("attention.qkv",),
    "attention_out": ("attention.out",),
    "ffn_up": ("ffn.up",),
    "ffn_down": ("ffn.down",),
    "head": ("transform.linear", OUTPUT),
    "item_table": ("item_table",),
}


def matched(model: Bert4Rec, targets: tuple[str, ...]) -> list[str]:
    """Return the paths that `targets` name, in the model's order; raise `InputError` for one without any."""
    there = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    there = [path.removesuffix(".base") for path in there if ".adapters." not in path] + [OUTPUT]
    found: set[str] = set()
    for target in targets:
        ends = TARGETS.get(target, (target,))
        paths = {p for p in there if any(p == end or p.endswith("." + end) for end in ends)}
        if not paths:
            raise InputError(
                f"target {target!r} matches no module of this model; allowed: {', '.join(TARGETS)}, or the "
                f"path of a single module, such as {there[1]!r}"
            )
        found |= paths
    return [path for path in dict.fromkeys(there) if path in found]


class Adapters(nn.Module):
    """A frozen `Bert4Rec` with adapters by name, of which one at most is active.

    Frozen weights have no gradients, no gradient sinks and no optimiser state.
    """

    def __init__(self, model: Bert4Rec) -> None:
        super().__init__()
        self.base_sha256 = base_hash(model)
        self.was_trained = {name: p.requires_grad for name, p in model.named_parameters()}
        model.use_sinks(False)  # a sink would get gradients of frozen tables
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.base = model
        self.twin = frozen_twin(model)  # without adapters and dropout: what representations read
        self.output: AdaptedTable | None = None
        self.gates = nn.ModuleDict()
        self.representations = nn.ModuleDict()
        self.configs: dict[str, AdapterConfig] = {}
        self.active: str | None = None
        self.merged: str | None = None
        self.merged_approximately = False
        self.head_is_adapted = False

    def train(self, mode: bool = True) -> Adapters:
        """Switch everything but the frozen twin."""
        super().train(mode)
        self.twin.eval()
        return self

    # -- adapters ------------------------------------------------------------------------------------------

    def add(self, name: str, config: AdapterConfig, causal_model: Bert4Rec | None = None) -> None:
        """Add a new adapter and make it the active one.

        Controls of `ilora`: `shuffled_user` gives the gate the vector of another sequence of the batch,
        `noise` numbers that say nothing, `fixed_gate` keeps W at its random start, `static_gate` learns one
        gate for everybody. Raises `InputError` for a name in use and a target that matches nothing.
        """
        if name in self.configs or "." in name or not name:
            said = "in use" if name in self.configs else "no name: it is empty or has a point in it"
            raise InputError(f"adapter {name!r} is {said}; there are: {', '.join(self.configs) or 'none'}")
        paths = matched(self.base, config.targets)
        found = representation_of(config, causal_model) if config.kind == "ilora" else None
        if isinstance(found, State) and found.reader is not None:
            refuse_other_catalogue(self.base.config, found.reader.config)
        where = next(self.base.parameters()).device
        for path in paths:
            self._layer(path).add(name, config)
        if found is not None:
            self.representations[name] = found
            self.gates[name] = Gate(found.width(self.twin), config)
        self.configs[name] = config
        self.to(where)
        self.use(name)

    def use(self, name: str | None) -> None:
        """Make an adapter the active one, from the next batch on, and the only one that is trained.

        None: no adapter, the model as it was.
        """
        self._refuse_unknown(name)
        if self.merged is not None and name != self.merged:
            raise InputError(f"adapter {self.merged!r} is merged: unmerge it before another is used")
        self.active = name
        for layer in self.layers().values():
            layer.active = name
            for key, adapter in layer.adapters.items():
                adapter.requires_grad_(key == name)
        head = (layer for path, layer in self.layers().items() if path in TARGETS["head"])
        self.head_is_adapted = name is not None and any(name in layer.adapters for layer in head)
        for key, gate in self.gates.items():
            gate.requires_grad_(key == name and self.configs[key].control != "fixed_gate")

    def delete(self, name: str) -> None:
        """Take an adapter away; if it was the active one, none is then."""
        self._refuse_unknown(name)
        if self.merged == name:
            self.unmerge()
        for layer in self.layers().values():
            if name in layer.adapters:
                del layer.adapters[name]
        for kept in (self.gates, self.representations):
            if name in kept:
                del kept[name]
        del self.configs[name]
        self.use(None if self.active == name else self.active)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Be the model without adapters inside the `with` block."""
        if self.merged is not None:
            raise InputError(f"adapter {self.merged!r} is merged: unmerge it instead")
        before = self.active
        self.use(None)
        try:
            yield
        finally:
            self.use(before)

    @torch.no_grad()
    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Hold the frozen matrices in `dtype`, the one that autocast computes in.

        Autocast casts a frozen weight anew for each use. Norms and position tables stay as they are.
        """
        matrices = [m for m in self.twin.modules() if isinstance(m, nn.Linear | nn.Embedding)]
        for parameter in {p for m in matrices for p in m.parameters()} | {self.twin.output_weight}:
            parameter.data = parameter.data.to(dtype)

    def layers(self) -> dict[str, AdaptedLayer]:
        """Return the layers that have adapters by the path of what they stand for."""
        found = {p: m for p, m in self.base.named_modules() if isinstance(m, AdaptedLayer)}
        return found | ({} if self.output is None else {OUTPUT: self.output})

    def counts(self) -> dict[str, int]:
        """Count the parameters trained, in the encoder, in tables and head, in the gate, and the base's."""
        trained = {"encoder": 0, "tables_and_head": 0}
        for path, layer in self.layers().items():
            part = "encoder" if path.startswith("blocks.") else "tables_and_head"
            trained[part] += sum(p.numel() for p in layer.adapters.parameters() if p.requires_grad)
        gate = sum(p.numel() for p in self.gates.parameters() if p.requires_grad)
        base = sum(p.numel() for p in self.twin.parameters())
        return trained | {"gate": gate, "base": base}

    def reader(self, name: str) -> Bert4Rec | None:
        """Return the other model that an adapter's gate reads its representation from, if there is one."""
        if name not in self.representations:
            return None
        found: Any = self.representations[name]
        found = found.of if isinstance(found, OtherSegment) else found
        return found.reader if isinstance(found, State) else None

    def _layer(self, path: str) -> Any:
        """Return the layer at a path, put around what is there if it is not yet."""
        if path == OUTPUT:
            if self.output is None:
                table: Any = self.base.output_weight
                self.output = AdaptedTable(table)
            return self.output
        there = self.base.get_submodule(path)
        if not isinstance(there, AdaptedLayer):
            there = AdaptedEmbedding(there) if isinstance(there, nn.Embedding) else AdaptedLinear(there)
            there.train(self.training)
            self.base.set_submodule(path, there)
        return there

    def _refuse_unknown(self, name: str | None) -> None:
        if name is not None and name not in self.configs:
            raise InputError(f"unknown adapter {name!r}; there are: {', '.join(self.configs) or 'none'}")

    # -- merging -------------------------------------------------------------------------------------------

    def merge(self, approximate: bool = False, gates: Tensor | None = None) -> GateSpread | None:
        """Add the active adapter to the weights it adapts, so that it costs nothing; `unmerge` takes it back.

        Exact for every kind whose factor is a constant. The gate of `ilora` is not: with `approximate` the
        mean of `gates` (N, K), which `expert_weights` gave for some instances, stands in its place, and
        the spread that is lost is returned. Raises `InputError` where that is not asked for, and where a
        merged table would be another table as well.
        """
        name = self.active
        if name is None or self.merged is not None:
            raise InputError(f"there is nothing to merge: active {name!r}, merged {self.merged!r}")
        self._refuse_inexact(name)
        factor, spread = None, None
        if name in self.gates:
            factor, spread = self._constant_gate(name, approximate, gates)
        for layer in self.layers().values():
            if name in layer.adapters:
                layer.merge(name, factor)
        self.merged, self.merged_approximately = name, spread is not None
        return spread

    def unmerge(self) -> None:
        """Take the merged adapter out of the weights again, which are then the same bits as before."""
        for layer in self.layers().values():
            layer.unmerge()
        self.merged, self.merged_approximately = None, False

    def merge_and_unload(self, approximate: bool = False, gates: Tensor | None = None) -> Bert4Rec:
        """Return the plain model with the active adapter merged; this object is of no use afterwards."""
        if self.merged is None:
            self.merge(approximate, gates)
        for layer in self.layers().values():
            layer.kept_weight = None
        return self.unload()

    def unload(self) -> Bert4Rec:
        """Return the plain model without adapters, trainable as it was; this object is of no use then."""
        for path, layer in self.layers().items():
            layer.unmerge()
            if path != OUTPUT:
                self.base.set_submodule(path, layer.base)
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(self.was_trained[name])
        return self.base

    def _constant_gate(
        self, name: str, approximate: bool, gates: Tensor | None
    ) -> tuple[Tensor, GateSpread | None]:
        """Return the factor (r,) to merge and, where it is an approximation, what it loses."""
        gate: Any = self.gates[name]
        if isinstance(self.representations[name], Constant):
            return gate.factors(gate.constant()).detach(), None
        if not approximate or gates is None:
            raise InputError(
                f"adapter {name!r} cannot be merged exactly: its gate differs from user to user; "
                "merge(approximate=True, gates=...) merges the mean of the gates given"
            )
        spread = GateSpread.of(gates)
        return gate.factors(spread.mean).detach(), spread

    def _refuse_inexact(self, name: str) -> None:
        """Raise `InputError` where adding the adapter to the weights would be another model."""
        for path, layer in self.layers().items():
            if name not in layer.adapters:
                continue
            if layer.weight.dtype not in (torch.float32, torch.float64):
                raise InputError(
                    f"adapter {name!r} cannot be merged exactly: the frozen weights are held in "
                    f"{layer.weight.dtype}; hold them in torch.float32"
                )
            if self.base.config.tied and path in ("item_table", OUTPUT):
                raise InputError(
                    f"adapter {name!r} cannot be merged: the item table is the output table as well "
                    f"(tied), and only one of the two has the adapter"
                )


# -- the adapted model ---------------------------------------------------------------------------------------


class AdaptedModel(Adapters):
    """An adapted model with the interface of `Bert4Rec` that training and evaluation use."""

    plain = False  # see `Bert4Rec.plain`
    output_sink = None

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

    @property
    def prior(self) -> Any:
        """The base's prior, or None."""
        return self.base.prior

    @property
    def frozen_columns(self) -> int:
        """How many columns of `output_weight`, from the first, need no gradient."""
        return 0 if self.output is None else self.output.frozen_columns

    @property
    def has_factors(self) -> bool:
        """Whether the active adapter depends on the instance: it has a gate and is not merged."""
        return self.active is not None and self.active in self.gates and self.merged is None

    def use_sinks(self, wanted: bool) -> dict[nn.Parameter, Sink]:
        """Return no sinks: the large tables are frozen."""
        return {}

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the trained parameters with their shares of the learning rate: the gate has its own."""
        trained = {id(p): p for p in self.parameters() if p.requires_grad}
        gate = [trained.pop(id(p)) for p in self.gates.parameters() if p.requires_grad]
        groups = [(list(trained.values()), 1.0)]
        if self.active is not None and gate:
            groups.append((gate, self.configs[self.active].gate_learning_rate))
        return groups

    def origin(self) -> dict[str, Any]:
        """Return what a further training starts from: a hash of the base, and the adapter's settings."""
        if self.active is None:
            raise InputError("the adapted model has no active adapter: there is nothing to train")
        settings = asdict(self.configs[self.active])
        settings["targets"] = list(settings["targets"])  # as JSON returns it
        reader = self.reader(self.active)
        read = None if reader is None else base_hash(reader)
        return {"base_sha256": self.base_sha256, "adapter": settings, "reader_sha256": read}

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

        If an `ilora` adapter is on the head, its factors follow in r more columns: (R, L or Q, D + r). They
        belong to positions, and the caller selects positions before it calls `head_input`.
        """
        rows = (items, segment_ids, positions)
        if not self.has_factors:
            return self.base.encode(*rows, query_index)
        gate: Any = self.gates[self.active or ""]
        factors = gate.factors(self.expert_weights(*rows))  # (R, L, r)
        at_queries = factors if query_index is None else take(factors, query_index)  # (R, Q, r)
        hidden = self.base.encode(*rows, query_index, factors, at_queries)
        return torch.cat((hidden, at_queries.to(hidden.dtype)), -1) if self.head_is_adapted else hidden

    def head_input(self, hidden: Tensor) -> Tensor:
        """Return what is multiplied by `output_weight`, (M, D) or (M, D + r), for states of `encode`."""
        factors = None
        if self.has_factors and self.head_is_adapted:
            hidden, factors = hidden.tensor_split((self.config.hidden_dim,), -1)  # (M, D), (M, r)
        x = self.base.head_input(hidden, factors)
        return x if self.output is None else self.output.widen(x, factors)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (M, V) of every row of the output table for hidden states."""
        return F.linear(self.head_input(hidden), self.output_weight, self.output_bias)


def add_ilora(model: Any, rank: int = 8, experts: int = 4, **settings: Any) -> AdaptedModel:
    """Freeze a Bert4Rec (or the one of a `saving.Recommender`) and put an iLoRA adapter into its layers.

    `experts` divides `rank`; `settings` are further fields of AdapterConfig. The adapter, "ilora", is active:
    `reclib.fit(dataset, model=adapted)` trains it.
    """
    config = validated(AdapterConfig, {"kind": "ilora", "rank": rank, "num_experts": experts} | settings)
    adapted = AdaptedModel(model if isinstance(model, Bert4Rec) else model.model)
    adapted.add("ilora", config)
    return adapted
