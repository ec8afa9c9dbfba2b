"""What an instance-wise adapter knows of a sequence: one vector, computed from its visible prefix only.

iLoRA (Kong et al., NeurIPS 2024, arXiv 2408.10159) mixes the experts of an adapter by a gate on a frozen
representation z of the user's sequence. Here z is a function of the rows that the encoder is given, in which
MASK stands at every target: the target's id is not there to be used. Rows are packed, so z belongs to a
segment, and every place of a segment has the same. In a causal model what is later is a target as well:
there each place has a z of its own, of what is up to it.

Representations:

- `MeanEmbedding`: mean of the frozen item embeddings of the visible items; no pass of its own.
- `State`: the state that a frozen model predicts the next item from, given the visible items alone: the base
  itself, or a causal model as in the paper. It costs a pass; where the rows come again, as on validation, its
  result is kept.

Controls, which have no right to help: `Constant`, `Noise`, `OtherSegment`.

Shapes: R rows, L places in a row, Q queries of a row, S segments, D width of z.
"""

from __future__ import annotations

import copy
import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reclib.config import PAD, InputError
from reclib.model import Bert4Rec, take

CACHE_BYTES = 256 * 2**20  # of kept states; beyond it they are computed anew


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
