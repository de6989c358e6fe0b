"""The short causal convolution before linear attention, with a backward pass of its own that stores the input alone.

Channels do not depend on each other, so threads work on different windows of them. Transformers' torch version is
called for each, so the outputs are its bits. For the backward pass torch would keep more tensors of the input's size,
and take its time over channels that are not contiguous; products and sums of shifted rows give the same gradients up to
rounding.
"""

# B: samples, C: channels, T: positions, K: width of the kernel, W: channels of a window.

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

from shardxform.tuning.linear import runs
from shardxform.tuning.workers import Workers

__all__ = ["storing_the_input"]

_WINDOW_BYTES: Final = 1 << 20
_ACTIVATION: Final = "silu"

_Place = tuple[int, slice]


def storing_the_input(convolve: Callable[..., torch.Tensor], workers: Workers) -> Callable[..., torch.Tensor]:
    """`convolve(hidden_BCT, weight_CK, bias_C, activation=...)`, whose gradient of `hidden_BCT` is computed here.

    Other calls than transformers makes of frozen kernels on the CPU go to `convolve` as they are.
    """

    @functools.wraps(convolve)
    def convolved(
        hidden_BCT: torch.Tensor,
        weight_CK: torch.Tensor,
        bias_C: torch.Tensor | None = None,
        activation: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        given = functools.partial(convolve, activation=activation, **options)
        frozen = not weight_CK.requires_grad and (bias_C is None or not bias_C.requires_grad)
        asked = [name for name, value in options.items() if value is not None and value is not False]
        special = bool(asked) or activation != _ACTIVATION
        if special or not frozen or not hidden_BCT.requires_grad or hidden_BCT.device.type != "cpu":
            return given(hidden_BCT, weight_CK, bias_C)
        out: torch.Tensor = _Convolution.apply(hidden_BCT, weight_CK, bias_C, given, workers)  # type: ignore[no-untyped-call]
        return out

    return convolved


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden_BCT: torch.Tensor,
        weight_CK: torch.Tensor,
        bias_C: torch.Tensor | None,
        convolve: Callable[..., torch.Tensor],
        workers: Workers,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_BCT, weight_CK, bias_C)
        ctx.workers = workers
        out_BTC = _positions_first(hidden_BCT)

        def one(place: _Place) -> None:
            b, run = place
            bias_W = None if bias_C is None else bias_C[run]
            out_BTC[b, :, run] = convolve(hidden_BCT[b : b + 1, run], weight_CK[run], bias_W)[0].T

        workers.each(one, _places(hidden_BCT))
        return out_BTC.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BCT: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:  # noqa: ANN401
        hidden_BCT, weight_CK, bias_C = ctx.saved_tensors
        out_BTC = _positions_first(hidden_BCT)

        def one(place: _Place) -> None:
            b, run = place
            weight_KW = weight_CK[run].T.float()
            bias_W = None if bias_C is None else bias_C[run].float()
            before_TW = _before_activation(hidden_BCT[b, run].T, weight_KW, bias_W).to(weight_CK.dtype).float()
            inner_TW = torch.ops.aten.silu_backward(gradient_BCT[b, run].T.float(), before_TW)
            out_BTC[b, :, run] = _shifted_sum(inner_TW, weight_KW, back=True)

        ctx.workers.each(one, _places(hidden_BCT))
        return out_BTC.transpose(1, 2), None, None, None, None


def _positions_first(x_BCT: torch.Tensor) -> torch.Tensor:
    """Uninitialised [B, T, C], as the projections have it: a position is contiguous."""
    return torch.empty_like(x_BCT.transpose(1, 2), memory_format=torch.contiguous_format)


def _before_activation(x_TW: torch.Tensor, weight_KW: torch.Tensor, bias_W: torch.Tensor | None) -> torch.Tensor:
    out_TW = _shifted_sum(x_TW.float(), weight_KW, back=False)
    return out_TW if bias_W is None else out_TW + bias_W


def _shifted_sum(x_TW: torch.Tensor, weight_KW: torch.Tensor, *, back: bool) -> torch.Tensor:
    """The sum of x, each time a position later (`back`: earlier) and with the kernel's weight before the last."""
    positions = len(x_TW)
    out_TW = x_TW * weight_KW[-1]
    for shift, weight_W in enumerate(weight_KW.flip(0)[1:positions], start=1):
        if back:
            out_TW[:-shift].addcmul_(x_TW[shift:], weight_W)
        else:
            out_TW[shift:].addcmul_(x_TW[:-shift], weight_W)
    return out_TW


def _places(x_BCT: torch.Tensor) -> Iterator[_Place]:
    """Every sample's windows of channels."""
    samples, channels, positions = x_BCT.shape
    width = max(1, _WINDOW_BYTES // (torch.float32.itemsize * positions))
    for b in range(samples):
        for run in runs(channels, width):
            yield b, run
