"""Gradients of large tables, written where they stay.

Autograd allocates a new gradient for every step. For an item table that is hundreds of megabytes, which a
C library gives back to the kernel and takes again zeroed page by page, or keeps and fragments: 40 ms and more
for 164 MB on two cores, several times in a step. A sink is the same gradient in one tensor for the whole run:
the output layer overwrites it, the lookup adds to it, and of a table that is only looked up just the rows of
the last step are cleared. Values are the same.

Used on a CPU in full precision; elsewhere autograd's way stands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_BYTES = 8 * 2**20  # a smaller table is no trouble


class Sink:
    """The gradient of one parameter over a run."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.grad = torch.zeros_like(parameter)
        self.fresh = True  # nothing of this step is in it yet
        self.dense = False  # what is in it came, at least in part, from the output layer
        self.rows: list[Tensor] = []  # that this step's lookups touched

    def start(self) -> None:
        """Begin a step: what is in it counts as zero from now on."""
        self.fresh = True

    def overwrite(self, product: tuple[Tensor, Tensor], part: slice) -> None:
        """Set the rows `part` to a matrix product and the others to zero; add, if the step has begun."""
        left, right = product
        if self.fresh:
            self.grad[: part.start].zero_()
            self.grad[part.stop :].zero_()
            torch.mm(left, right, out=self.grad[part])
        else:
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
        """Say that other processes' gradients are added to it: any row may hold something."""
        self.dense, self.rows = True, []

    def for_norm(self) -> Tensor:
        """Return what the gradient's norm can be computed from: the rows that are not zero."""
        whole = self.finish()
        return whole if self.dense or not self.rows else whole[torch.cat(self.rows).unique()]

    def _clear(self) -> None:
        if self.dense:
            self.grad.zero_()
        else:
            for rows in self.rows:
                self.grad[rows] = 0
        self.dense, self.rows = False, []


class Lookup(torch.autograd.Function):
    """Rows of a table, whose gradient goes into a sink."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, sink: Sink, skip: int) -> Tensor:
        """Return weight[index]; `skip` is the row that gets no gradient."""
        ctx.save_for_backward(index)
        ctx.sink, ctx.skip = sink, skip
        return torch.nn.functional.embedding(index, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        """Add to the sink; autograd is given nothing."""
        (index,) = ctx.saved_tensors
        ctx.sink.add_rows(index.flatten(), grads[0].flatten(0, -2), ctx.skip)
        return None, None, None, None


def sink_of(parameter: Tensor) -> Sink | None:
    """Return the sink of a parameter, if it has one."""
    return getattr(parameter, "sink", None)


def detach(parameters: list[nn.Parameter]) -> None:
    """Take the sinks of an earlier run away: from now on autograd has the gradients."""
    for parameter in parameters:
        if sink_of(parameter) is not None:
            del parameter.sink  # type: ignore[attr-defined]


def attach(parameters: list[nn.Parameter]) -> list[tuple[nn.Parameter, Sink]]:
    """Give each large parameter a sink; return those with theirs."""
    sunk = []
    for parameter in parameters:
        if parameter.numel() * parameter.element_size() >= SMALLEST_BYTES:
            sink = Sink(parameter)
            parameter.sink = sink  # type: ignore[attr-defined]
            sunk.append((parameter, sink))
    return sunk
