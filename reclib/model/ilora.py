"""A frozen model with adapters, which has the interface of a plain model.

    adapted = AdaptedModel(model)                     # freezes the model
    adapted.add("june", AdapterConfig(kind="ilora"))  # is then trained as any other model

The forward pass of an `ilora` adapter (`AdaptedModel.encode`):

    z = representation(rows)         # (R, L, width): a vector of each sequence, from its visible items
    g = gate(z)                      # (R, L, K): softmax weights of the experts
    f = repeat(g, r / K) * scaling   # (R, L, r): the factors
    base.encode(*rows, factors=f)    # each adapted layer adds B (f * A x), see `lora`

iLoRA (Kong et al., NeurIPS 2024, arXiv 2408.10159) mixes the experts of an adapter by a gate on a frozen
representation of the user's sequence. Rows have MASK at every target, so that z does not depend on targets.
Rows are packed: all positions of a segment share one z. In a causal model every later item is a target, so
that each position has its own z, of the items up to it.

Shapes: R rows, L positions, Q queries of a row, S segments, M target positions, D hidden_dim, V rows of the
output table, r rank, K experts.
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import asdict
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclib.config import PAD, AdapterConfig, InputError, ModelConfig, validated
from reclib.model.bert4rec import Bert4Rec, Sink, base_hash, take
from reclib.model.lora import AdaptedEmbedding, AdaptedLayer, AdaptedLinear, AdaptedTable

# -- the input of the gate -----------------------------------------------------------------------------------

CACHE_BYTES = 256 * 2**20  # of states that are cached in evaluation


class Rows(NamedTuple):
    """Inputs of an encoder, (R, L) each: see `Bert4Rec.encode`."""

    items: Tensor
    segment_ids: Tensor
    positions: Tensor


def is_visible(rows: Rows, mask_id: int) -> Tensor:
    """Return (R, L): whether a place has an item, neither MASK nor PAD."""
    return (rows.segment_ids > 0) & (rows.items != mask_id) & (rows.items != PAD)


def same_segment(segment_ids: Tensor) -> Tensor:
    """Return (R, L, L): whether two places of a row are of one segment."""
    return segment_ids[:, :, None] == segment_ids[:, None, :]


def first_places(segment_ids: Tensor) -> Tensor:
    """Return (R, L): the first place of each place's segment."""
    return same_segment(segment_ids).to(torch.int32).argmax(2)


def visible_from(base: Bert4Rec, rows: Rows) -> Tensor:
    """Return (R, L, L): for each place, the visible items that its z depends on."""
    visible = same_segment(rows.segment_ids) & is_visible(rows, base.config.mask_id)[:, None, :]
    return visible.tril() if base.config.causal else visible


def mean_embedding(base: Bert4Rec, rows: Rows) -> Tensor:
    """Return z (R, L, D): the mean frozen embedding of the visible items, zero where there are none."""
    vectors = base.into_encoder(F.embedding(rows.items, base.item_table.weight))
    share = visible_from(base, rows).to(vectors.dtype)
    share = share / share.sum(2, keepdim=True).clamp_min(1.0)
    return (share @ vectors).float()


def noise(base: Bert4Rec, rows: Rows) -> Tensor:
    """Return noise z (R, L, D) of mean 0 and variance 1.

    It is a hash of the set of visible items, so that evaluations are reproducible.
    """

    def mixed(x: Tensor) -> Tensor:  # a hash of 64-bit integers: multiply and shift; products wrap round
        for factor in (0x2545F4914F6CDD1D, 0x369DEA0F31A53F85, 0x27BB2EE687B0B0FD):
            x = x * factor
            x = x ^ (x >> 29)
        return x

    seed = (visible_from(base, rows) * mixed(rows.items.long() + 1)[:, None, :]).sum(2)  # (R, L), wraps round
    column = torch.arange(1, base.config.hidden_dim + 1, device=seed.device)
    bits = (mixed(seed[:, :, None] ^ mixed(column)) >> 20) & 0xFFFF  # (R, L, D)
    return (bits.float() / 65536 - 0.5) * 12**0.5


def visible_prefixes(rows: Rows, base: Bert4Rec, causal: bool) -> tuple[Rows, Tensor]:
    """Move the visible items of each segment to its first places, followed by MASK.

    Returns the new rows and (R, L): the place in the row where the state of each place's segment is read. It
    is read at MASK, or at the last item of a segment without targets. A causal model is read at the last
    visible item, or at MASK if there is none.
    """
    R, L = rows.items.shape
    place = torch.arange(L, device=rows.items.device).expand(R, L)
    first = first_places(rows.segment_ids)
    visible = is_visible(rows, base.config.mask_id)
    in_segment = same_segment(rows.segment_ids)  # (R, L, L)
    count = (in_segment & visible[:, None, :]).sum(2)  # (R, L) visible items of the segment
    order = (2 * first + (~visible).long()).argsort(dim=1, stable=True)  # in each segment the visible first
    rank = place - first  # (R, L) place inside the segment
    items = rows.items.gather(1, order)
    items = torch.where(rank == count, base.config.mask_id, torch.where(rank < count, items, PAD))
    readout = (count - 1).clamp_min(0) if causal else torch.minimum(count, in_segment.sum(2) - 1)
    used = (rank <= readout) & (rows.segment_ids > 0)
    positions = (readout - rank if base.config.position_origin == "last" else rank) * used
    return Rows(torch.where(used, items, PAD), rows.segment_ids * used, positions), first + readout


def exchanged(z: Tensor, segment_ids: Tensor) -> Tensor:
    """Give each segment the z (R, L, width) of the next segment of the batch; a single one keeps its own."""
    R, L = segment_ids.shape
    device = z.device
    first = first_places(segment_ids) + L * torch.arange(R, device=device)[:, None]
    starts = (first.flatten() == torch.arange(R * L, device=device)) & (segment_ids.flatten() > 0)
    # Starts of segments come first in `order`. Its shape is fixed, which avoids a synchronisation.
    order = (~starts).long().argsort(stable=True)
    number = (starts.long().cumsum(0) - 1)[first.flatten()]  # (R * L,) number of the segment
    partner = order[(number + 1) % starts.sum().clamp_min(1)]
    return z.flatten(0, 1)[partner].view(R, L, -1) * (segment_ids > 0)[:, :, None]


class Representation(nn.Module):
    """Maps rows to a vector z per place, equal for all places of a segment. It is not trained.

    `config.representation` is the mean item embedding; the frozen state from which the base predicts the item
    after the visible ones; or that state of `reader`, a causal model of the same catalogue.

    Controls: with `static_gate` all sequences have the same z, with `noise` it is random, and with
    `shuffled_user` it is that of another sequence.
    """

    def __init__(self, config: AdapterConfig, base: ModelConfig, reader: Bert4Rec | None = None) -> None:
        super().__init__()
        self.form = config.control if config.control in ("noise", "static_gate") else config.representation
        self.is_exchanged = config.control == "shuffled_user"
        if self.is_exchanged and base.causal:
            raise InputError("control='shuffled_user' needs one vector a sequence: a causal model has many")
        if self.form != "causal_state":
            source = base
        elif reader is None:
            raise InputError("representation='causal_state' needs causal_model, a trained causal model")
        else:
            source = reader.config
        if source.num_items != base.num_items or source.max_len < base.max_len:
            raise InputError(
                f"causal_model knows {source.num_items} items and {source.max_len} positions, the base "
                f"{base.num_items} and {base.max_len}: it needs the same items and no fewer positions"
            )
        self.reader = frozen_twin(reader) if reader is not None and self.form == "causal_state" else None
        self.width = 1 if self.form == "static_gate" else source.hidden_dim
        self.cached: dict[bytes, Tensor] = {}
        self.cached_bytes = 0
        if self.form.endswith("_state"):  # not compiled, because of dynamic sizes and the cache
            # Not as a decorator, which would import torch._dynamo with this module: as slow as torch itself.
            self.uncompiled = torch.compiler.disable(Representation.state)

    def train(self, mode: bool = True) -> Representation:
        """Set the mode of this module only; its reader stays in `eval()`."""
        self.training = mode
        return self

    @torch.no_grad()
    def forward(self, base: Bert4Rec, rows: Rows) -> Tensor:
        """Return z (R, L, width) of the rows, with `base` as the frozen model without adapters."""
        if self.form == "static_gate":
            return torch.ones(*rows.items.shape, 1, device=rows.items.device)
        if self.form == "noise":
            z = noise(base, rows)
        elif self.form == "mean_embedding":
            z = mean_embedding(base, rows)
        else:
            z = self.uncompiled(self, base, rows)
        return exchanged(z, rows.segment_ids) if self.is_exchanged else z

    def state(self, base: Bert4Rec, rows: Rows) -> Tensor:
        """Return the states (R, L, D) that the gate reads, cached by rows in `eval()`."""
        model = self.reader or base
        if base.config.causal:
            return model.encode(*rows).float()
        place = torch.arange(rows.items.shape[1], device=rows.items.device)
        starts = (first_places(rows.segment_ids) == place) & (rows.segment_ids > 0)  # (R, L)
        key = b"" if self.training else _digest(rows)
        states = self.cached.get(key)  # (S, D)
        if states is None:
            prefixes, readout = visible_prefixes(rows, model, model.config.causal)
            states = take(model.encode(*prefixes), readout)[starts].float()
            if not self.training and self.cached_bytes < CACHE_BYTES:
                self.cached[key] = states
                self.cached_bytes += states.numel() * states.element_size()
        # Segments are numbered in the order of their first places; all their places look up the same state.
        number = (starts.flatten().long().cumsum(0) - 1).view(starts.shape)
        number = number.gather(1, first_places(rows.segment_ids)).clamp_min(0)
        return F.embedding(number, states) * (rows.segment_ids > 0)[:, :, None]


def frozen_twin(model: Bert4Rec) -> Bert4Rec:
    """Return a copy of the model's modules in `eval()` whose weights are the model's own tensors."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


def _digest(rows: Rows) -> bytes:
    """Return a digest of rows and of whether autocast is on."""
    header = (rows.items.shape, torch.is_autocast_enabled(rows.items.device.type))
    digest = hashlib.sha256(str(header).encode())
    for tensor in (rows.items, rows.segment_ids):
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.digest()


class Gate(nn.Module):
    """Weights of the K experts for each instance, softmax(W z / temperature).

    All layers share one W. The paper has a small convolutional network instead.
    """

    def __init__(self, width: int, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(width, config.num_experts, bias=False)
        with torch.no_grad():
            if config.control == "fixed_gate":  # not trained and in no checkpoint: drawn from its own seed
                seeded = torch.Generator().manual_seed(config.gate_seed)
                nn.init.kaiming_uniform_(self.linear.weight, a=5**0.5, generator=seeded)
            self.linear.weight.mul_(config.gate_init)

    def forward(self, z: Tensor) -> Tensor:
        """Return weights (..., K), which sum to 1, for representations z (..., width)."""
        scores = F.linear(z.to(self.linear.weight.dtype), self.linear.weight)
        return torch.softmax(scores.float() / self.config.temperature, -1)

    def factors(self, weights: Tensor) -> Tensor:
        """Return the factors of A x, (..., r), for weights (..., K)."""
        per_expert = self.config.rank // self.config.num_experts
        return weights.repeat_interleave(per_expert, -1) * self.config.scaling


# -- the adapted model ---------------------------------------------------------------------------------------

OUTPUT = "output_weight"  # the path of the output table, which is no module

TARGETS: dict[str, tuple[str, ...]] = {  # name -> suffixes of paths
    "qkv": ("attention.qkv",),
    "attention_out": ("attention.out",),
    "ffn_up": ("ffn.up",),
    "ffn_down": ("ffn.down",),
    "head": ("transform.linear", OUTPUT),
    "item_table": ("item_table",),
}


def matched(model: Bert4Rec, targets: tuple[str, ...]) -> list[str]:
    """Return the paths of `targets` in the model's order; raise `InputError` for a target without any."""
    paths = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    paths = [path.removesuffix(".base") for path in paths if ".adapters." not in path] + [OUTPUT]
    chosen: set[str] = set()
    for target in targets:
        ends = TARGETS.get(target, (target,))
        matches = {path for path in paths if any(f".{path}".endswith(f".{end}") for end in ends)}
        if not matches:
            raise InputError(
                f"target {target!r} matches no module of this model; allowed: {', '.join(TARGETS)}, or the "
                f"path of a single module, such as {paths[1]!r}"
            )
        chosen |= matches
    return [path for path in dict.fromkeys(paths) if path in chosen]


class AdaptedModel(nn.Module):
    """A frozen `Bert4Rec` with named adapters, at most one of them active.

    Losses and trainer use it as they use a `Bert4Rec`.

    Frozen weights have no gradients, no gradient sinks and no optimiser state. Adapted layers wrap the
    original ones.
    """

    plain = False  # see `Bert4Rec.plain`
    output_sink = None

    def __init__(self, model: Bert4Rec) -> None:
        super().__init__()
        self.base_sha256 = base_hash(model)
        self.was_trained = {name: p.requires_grad for name, p in model.named_parameters()}
        model.use_sinks(False)  # a sink would get gradients of frozen tables
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.base, self.config = model, model.config
        self.twin = frozen_twin(model)  # without adapters and dropout, for representations
        self.output: AdaptedTable | None = None
        self.gates = nn.ModuleDict()
        self.representations = nn.ModuleDict()
        self.configs: dict[str, AdapterConfig] = {}
        self.active: str | None = None
        self.head_is_adapted = False  # by the active adapter

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set the mode of all modules but the frozen twin."""
        super().train(mode)
        self.twin.eval()
        return self

    # -- adapters, with PEFT's verbs -----------------------------------------------------------------------

    def add(self, name: str, config: AdapterConfig, causal_model: Bert4Rec | None = None) -> None:
        """Add a new adapter and activate it.

        `causal_model` is for representation='causal_state'. For the controls of `ilora` see `Representation`;
        with `fixed_gate` W keeps its random initial values. Raises `InputError` for a name in use and a
        target that matches nothing.
        """
        if name in self.configs or "." in name or not name:
            raise InputError(
                f"adapter name {name!r}: expected a new one, not empty and without a point; in use: "
                f"{', '.join(self.configs) or 'none'}"
            )
        paths = matched(self.base, config.targets)
        is_gated = config.kind == "ilora"
        form = Representation(config, self.config, causal_model) if is_gated else None
        for path in paths:
            self._layer(path).add(name, config)
        if form is not None:
            self.representations[name], self.gates[name] = form, Gate(form.width, config)
        self.configs[name] = config
        self.to(self.twin.output_weight.device)
        self.use(name)

    def use(self, name: str | None) -> None:
        """Activate an adapter, which is then the only trained one; None deactivates all."""
        self.demand_known(name)
        self.active = name
        for layer in self.layers().values():
            layer.active = name
            for key, adapter in layer.adapters.items():
                adapter.requires_grad_(key == name)
        for key, gate in self.gates.items():
            gate.requires_grad_(key == name and self.configs[key].control != "fixed_gate")
        head = [layer for path, layer in self.layers().items() if path in TARGETS["head"]]
        self.head_is_adapted = any(layer.active_adapter is not None for layer in head)

    def delete(self, name: str) -> None:
        """Delete an adapter; if it was active, none is active afterwards."""
        self.demand_known(name)
        adapters = [layer.adapters for layer in self.layers().values()]
        for parts in (*adapters, self.gates, self.representations):
            if name in parts:
                del parts[name]
        del self.configs[name]
        self.use(None if self.active == name else self.active)

    def demand_known(self, name: str | None) -> None:
        """Raise `InputError` unless `name` is None or the name of an adapter."""
        if name is not None and name not in self.configs:
            raise InputError(f"unknown adapter {name!r}; there are: {', '.join(self.configs) or 'none'}")

    @torch.no_grad()
    def hold_frozen(self, dtype: torch.dtype) -> None:
        """Convert the frozen matrices to autocast's `dtype`, which saves a cast for each use.

        Norms and position tables are not converted.
        """
        matrices = [m for m in self.twin.modules() if isinstance(m, nn.Linear | nn.Embedding)]
        for parameter in {p for m in matrices for p in m.parameters()} | {self.twin.output_weight}:
            parameter.data = parameter.data.to(dtype)

    def layers(self) -> dict[str, AdaptedLayer]:
        """Return the layers with adapters, by the path of the layer that they wrap."""
        layers = {p: m for p, m in self.base.named_modules() if isinstance(m, AdaptedLayer)}
        return layers | ({} if self.output is None else {OUTPUT: self.output})

    def counts(self) -> dict[str, int]:
        """Count the parameters trained, in the encoder, in tables and head, in the gate, and the base's."""
        trained = {"encoder": 0, "tables_and_head": 0}
        for path, layer in self.layers().items():
            part = "encoder" if path.startswith("blocks.") else "tables_and_head"
            trained[part] += sum(p.numel() for p in layer.adapters.parameters() if p.requires_grad)
        gate = sum(p.numel() for p in self.gates.parameters() if p.requires_grad)
        return trained | {"gate": gate, "base": sum(p.numel() for p in self.twin.parameters())}

    def reader(self, name: str) -> Bert4Rec | None:
        """Return the causal model of an adapter's representation, if there is one."""
        forms: Any = self.representations
        return forms[name].reader if name in forms else None

    def _layer(self, path: str) -> Any:
        """Return the adapted layer at a path, wrapping the plain one if necessary."""
        if path == OUTPUT:
            if self.output is None:
                table: Any = self.base.output_weight
                self.output = AdaptedTable(table)
            return self.output
        layer = self.base.get_submodule(path)
        if not isinstance(layer, AdaptedLayer):
            layer = AdaptedEmbedding(layer) if isinstance(layer, nn.Embedding) else AdaptedLinear(layer)
            layer.train(self.training)
            self.base.set_submodule(path, layer)
        return layer

    def unload(self) -> Bert4Rec:
        """Return the plain model without adapters, trainable as before; this object must not be used then."""
        for path, layer in self.layers().items():
            if path != OUTPUT:
                self.base.set_submodule(path, layer.base)
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(self.was_trained[name])
        return self.base

    @torch.no_grad()
    def merge_and_unload(self) -> Bert4Rec:
        """Return the plain model with the active adapter merged into its weights.

        This object must not be used afterwards. Raises `InputError` if an exact merge is impossible: the gate
        of `ilora` depends on the user (except with `static_gate`), 16-bit weights would be rounded, and an
        adapter of a tied table belongs to only one of its two uses.
        """
        name = self.active
        if name is None:
            raise InputError("no adapter is active: there is nothing to merge")
        layers = {path: layer for path, layer in self.layers().items() if name in layer.adapters}
        reason = ""
        if self.has_factors and self.configs[name].control != "static_gate":
            reason = "its gate differs from user to user"
        elif self.base.config.tied and {"item_table", OUTPUT} & layers.keys():
            reason = (
                "the item table is the output table as well (tied), and only one of the two has the adapter"
            )
        elif any(layer.weight.dtype not in (torch.float32, torch.float64) for layer in layers.values()):
            reason = "the frozen weights are held in 16 bits (hold_frozen)"
        if reason:
            raise InputError(f"adapter {name!r} cannot be merged exactly: {reason}")
        factor = None
        if self.has_factors:
            gate: Any = self.gates[name]
            weights = gate(torch.ones(1, device=self.twin.output_weight.device))  # (K,), for the constant z
            factor = gate.factors(weights)[:, None]  # (r, 1)
        for layer in layers.values():
            adapter: Any = layer.adapters[name]
            layer.weight.add_(adapter.delta(adapter.constant_factor() if factor is None else factor))
        return self.unload()

    # -- the interface of a model --------------------------------------------------------------------------

    @property
    def output_weight(self) -> Tensor:
        """The right operand of the scores: (V, D), or (V, D + r) if the output table is adapted."""
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
        """Number of first columns of `output_weight` without gradient."""
        return 0 if self.output is None else self.output.frozen_columns

    @property
    def has_factors(self) -> bool:
        """Whether the active adapter depends on the instance: it has a gate."""
        return self.active is not None and self.active in self.gates

    def use_sinks(self, enabled: bool) -> dict[nn.Parameter, Sink]:
        """Return no sinks: the large tables are frozen."""
        return {}

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return groups of trained parameters, each with a factor of the learning rate; the gate is one."""
        trained = {id(p): p for p in self.parameters() if p.requires_grad}
        gate = [trained.pop(id(p)) for p in self.gates.parameters() if p.requires_grad]
        groups = [(list(trained.values()), 1.0)]
        if self.active is not None and gate:
            groups.append((gate, self.configs[self.active].gate_learning_rate))
        return groups

    def origin(self) -> dict[str, Any]:
        """Return the identity of the base and the adapter: hashes and settings."""
        if self.active is None:
            raise InputError("the adapted model has no active adapter: there is nothing to train")
        settings = asdict(self.configs[self.active])
        settings["targets"] = list(settings["targets"])  # as JSON returns it
        reader = self.reader(self.active)
        reader_sha256 = None if reader is None else base_hash(reader)
        return {"base_sha256": self.base_sha256, "adapter": settings, "reader_sha256": reader_sha256}

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

        If an `ilora` adapter is on the head, its factors are r further columns: (R, L or Q, D + r), so that
        they follow the selection of positions before `head_input`.
        """
        rows = (items, segment_ids, positions)
        if not self.has_factors:
            return self.base.encode(*rows, query_index)
        gate: Any = self.gates[self.active or ""]
        factors = gate.factors(self.expert_weights(*rows))  # (R, L, r)
        query_factors = factors if query_index is None else take(factors, query_index)  # (R, Q, r)
        hidden = self.base.encode(*rows, query_index, factors, query_factors)
        return torch.cat((hidden, query_factors.to(hidden.dtype)), -1) if self.head_is_adapted else hidden

    def head_input(self, hidden: Tensor) -> Tensor:
        """Return the left operand of the scores, (M, D) or (M, D + r), for states of `encode`."""
        factors = None
        if self.has_factors and self.head_is_adapted:
            hidden, factors = hidden.tensor_split((self.config.hidden_dim,), -1)  # (M, D), (M, r)
        x = self.base.head_input(hidden, factors)
        return x if self.output is None else self.output.widen(x, factors)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (M, V) of every row of the output table for hidden states."""
        return F.linear(self.head_input(hidden), self.output_weight, self.output_bias)


SequenceModel: TypeAlias = Bert4Rec | AdaptedModel  # what losses and trainer work with


def add_ilora(model: Any, rank: int = 8, experts: int = 4, **settings: Any) -> AdaptedModel:
    """Freeze a Bert4Rec (or the one of a `saving.Recommender`) and put an iLoRA adapter into its layers.

    `experts` divides `rank`; `settings` are further fields of AdapterConfig. The adapter "ilora" is active;
    `reclib.fit(dataset, model=adapted)` trains it.
    """
    config = validated(AdapterConfig, {"kind": "ilora", "rank": rank, "num_experts": experts} | settings)
    adapted = AdaptedModel(model if isinstance(model, Bert4Rec) else model.model)
    adapted.add("ilora", config)
    return adapted
