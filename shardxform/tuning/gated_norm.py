"""The gated norm behind linear attention, some rows at a time on threads, each made again when its gradient arrives.

Transformers' own module computes, forth and back; of a whole sample it would keep several tensors in float32.
"""

# R: rows, positions times heads; W: a value's width.

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

from shardxform.tuning.workers import Workers

__all__ = ["row_by_row"]

_PIECE_BYTES: Final = 1 << 20
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
        return torch.cat(list(workers.ordered(lambda piece: norm(*piece), _cut(hidden_RW, gate_RW))))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:  # noqa: ANN401
        def one(piece: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            gradient, *inputs = piece
            inputs = [x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                out = ctx.norm(*inputs)
            return torch.autograd.grad(out, inputs, gradient)

        found = ctx.workers.ordered(one, _cut(gradient_RW, *ctx.saved_tensors))
        hidden_RW, gate_RW = (torch.cat(parts) for parts in zip(*found, strict=True))
        return hidden_RW, gate_RW, None, None


def _cut(*tensors_RW: torch.Tensor) -> Any:  # noqa: ANN401
    """The same rows of all tensors, one piece after the other."""
    rows = max(1, _PIECE_BYTES // (torch.float32.itemsize * tensors_RW[0].shape[1]))
    return zip(*(torch.split(x, rows) for x in tensors_RW), strict=True)
