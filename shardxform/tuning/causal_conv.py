"""The short causal convolution before linear attention, with a backward pass of its own that stores the input alone.

Transformers' torch version is called as it is, so the outputs are its bits. For the backward pass torch would keep more
tensors of the input's size, and take its time over channels that are not contiguous; products and sums of shifted rows,
a window of channels after the other, give the same gradients up to rounding.
"""

# B: samples, C: channels, T: positions, K: width of the kernel, W: channels of a window.

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable

__all__ = ["storing_the_input"]

_WINDOW_BYTES: Final = 1 << 21
_ACTIVATION: Final = "silu"


def storing_the_input(convolve: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
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
        def forth(x_BCT: torch.Tensor) -> torch.Tensor:
            return convolve(x_BCT, weight_CK, bias_C, activation=activation, **options)

        frozen = not weight_CK.requires_grad and (bias_C is None or not bias_C.requires_grad)
        asked = [name for name, value in options.items() if value is not None and value is not False]
        special = bool(asked) or activation != _ACTIVATION
        if special or not frozen or not hidden_BCT.requires_grad or hidden_BCT.device.type != "cpu":
            return forth(hidden_BCT)
        out: torch.Tensor = _Convolution.apply(hidden_BCT, weight_CK, bias_C, forth)  # type: ignore[no-untyped-call]
        return out

    return convolved


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        hidden_BCT: torch.Tensor,
        weight_CK: torch.Tensor,
        bias_C: torch.Tensor | None,
        forth: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_BCT, weight_CK, bias_C)
        return forth(hidden_BCT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BCT: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:  # noqa: ANN401
        hidden_BCT, weight_CK, bias_C = ctx.saved_tensors
        # Positions before channels, as the projections have them: a row is contiguous, and so is the result.
        out_BTC = torch.empty_like(hidden_BCT.transpose(1, 2), memory_format=torch.contiguous_format)
        for b, (x_CT, g_CT) in enumerate(zip(hidden_BCT, gradient_BCT, strict=True)):
            for run in _windows(*x_CT.shape):
                weight_KW = weight_CK[run].T.float()
                bias_W = None if bias_C is None else bias_C[run].float()
                before_TW = _before_activation(x_CT[run].T, weight_KW, bias_W).to(weight_CK.dtype).float()
                inner_TW = torch.ops.aten.silu_backward(g_CT[run].T.float(), before_TW)
                out_BTC[b, :, run] = _shifted_sum(inner_TW, weight_KW, back=True)
        return out_BTC.transpose(1, 2), None, None, None


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


def _windows(channels: int, positions: int) -> Iterator[slice]:
    width = max(1, _WINDOW_BYTES // (torch.float32.itemsize * positions))
    for first in range(0, channels, width):
        yield slice(first, min(first + width, channels))
