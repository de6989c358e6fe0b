"""The gated norm behind linear attention, some rows at a time on threads, each made again when its gradient arrives.

Transformers' own module computes, forth and back; of a whole sample it would keep several tensors in float32.
"""

# R: rows, positions times heads; W: a value's width.

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

from shardxform.tuning.linear import runs
from shardxform.tuning.workers import Workers

__all__ = ["row_by_row"]

_PIECE_BYTES: Final = 1 << 19
"""Of rows as they are computed with, in float32."""

_Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def row_by_row(norm: torch.nn.Module, workers: Workers) -> Callable[..., torch.Tensor]:
    """The forward pass of `norm(hidden_RW, gate_RW)` as it is now; not for parameters that want gradients."""
    forward: _Norm = norm.forward

    @functools.wraps(forward)
    def pieces(hidden_RW: torch.Tensor, gate_RW: torch.Tensor) -> torch.Tensor:
        trained = any(parameter.requires_grad for parameter in norm.parameters())
        if trained or not torch.is_grad_enabled() or hidden_RW.device.type != "cpu":
            return forward(hidden_RW, gate_RW)
        out_RW: torch.Tensor = _RowByRow.apply(hidden_RW, gate_RW, forward, workers)  # type: ignore[no-untyped-call]
        return out_RW

    return pieces


class _RowByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden_RW: torch.Tensor,
        gate_RW: torch.Tensor,
        norm: _Norm,
        workers: Workers,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_RW, gate_RW)
        ctx.norm, ctx.workers = norm, workers
        out_RW = torch.empty_like(hidden_RW)

        def one(rows: slice) -> None:
            out_RW[rows] = norm(hidden_RW[rows], gate_RW[rows])

        workers.each(one, _pieces(hidden_RW))
        return out_RW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:  # noqa: ANN401
        inputs = ctx.saved_tensors
        hidden_RW, gate_RW = (torch.empty_like(x) for x in inputs)

        def one(rows: slice) -> None:
            piece = [x[rows].detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                out = ctx.norm(*piece)
            hidden_RW[rows], gate_RW[rows] = torch.autograd.grad(out, piece, gradient_RW[rows])

        ctx.workers.each(one, _pieces(gradient_RW))
        return hidden_RW, gate_RW, None, None


def _pieces(x_RW: torch.Tensor) -> Iterator[slice]:
    """Some rows, one piece after the other."""
    rows = max(1, _PIECE_BYTES // (torch.float32.itemsize * x_RW.shape[1]))
    return runs(len(x_RW), rows)
