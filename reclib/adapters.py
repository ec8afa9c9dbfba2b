"""Adapters around the layers of a frozen model: added, chosen, merged, taken away. PEFT's verbs.

The model does not know of them: a layer is replaced by one that holds it. What passes through the adapted
model is in `ilora`.

Shapes: K experts, r rank, N instances.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from reclib.config import InputError
from reclib.gate import Gate, GateSpread, refuse_other_catalogue, representation_of
from reclib.instance import Constant, OtherSegment, State, frozen_twin
from reclib.lowrank import AdaptedEmbedding, AdaptedLayer, AdaptedLinear, AdaptedTable, AdapterConfig
from reclib.model import Bert4Rec
from reclib.sinks import detach

OUTPUT = "output_weight"  # the path of the output table, which is no module
TARGETS: dict[str, tuple[str, ...]] = {  # what a path ends in
    "qkv": ("attention.qkv",),
    "attention_out": ("attention.out",),
    "ffn_up": ("ffn.up",),
    "ffn_down": ("ffn.down",),
    "head": ("transform.linear", OUTPUT),
    "item_table": ("item_table",),
}


def base_hash(model: Bert4Rec) -> str:
    """Return sha256 of a model's configuration and weights: what an adapter belongs to."""
    said = hashlib.sha256(json.dumps(asdict(model.config), sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        said.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        said.update(parameter.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return said.hexdigest()


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
        detach(list(model.parameters()))  # a sink would get a gradient that nobody asks for
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
