"""A linear layer whose weight is tuned while gradients pass through it.

The forward pass stores its input and nothing else; the backward pass makes the weight again, passes the gradient on,
and hands each tile of the weight's own gradient to the weight, which moves at once. Work is cut the same way whatever
the number of threads, so the results are the same.
"""

# N: tokens, I: input columns, O: output rows.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shardxform.base.constants import LINEAR_ROWS, LINEAR_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardxform.tuning.stacked import Tunable
    from shardxform.tuning.workers import Workers

__all__ = ["TunedLinear", "runs"]


class TunedLinear(torch.nn.Module):
    """Stands for a `torch.nn.Linear` of the same weight; a bias is added and not tuned."""

    def __init__(self, weight: Tunable, workers: Workers, bias_O: torch.Tensor | None = None) -> None:
        super().__init__()
        _, self.out_features, self.in_features = weight.shape
        self.tuned, self.workers = weight, workers
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias_O)
        # Without an input that wants a gradient, autograd would not come by to deliver the weight's.
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., I] -> [..., O] in the type of the input."""
        y_NO = _Linear.apply(x.reshape(-1, x.shape[-1]), self._anchor, self)  # type: ignore[no-untyped-call]
        y: torch.Tensor = y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])
        return y if self.bias is None else y + self.bias

    def multiply(self, x_NI: torch.Tensor) -> torch.Tensor:
        """Outputs [N, O]."""
        y_NO = x_NI.new_empty(x_NI.shape[0], self.out_features)
        self._each(lambda run: self._multiply(x_NI, y_NO[:, run], run.start), self.out_features, LINEAR_ROWS)
        return y_NO

    def pass_back(self, x_NI: torch.Tensor, gradient_NO: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """Tune the weight, and return the gradient of the input if `wanted`."""
        w_OI = x_NI.new_empty(self.out_features, self.in_features) if wanted else None
        self._each(lambda run: self._update(x_NI, gradient_NO, run, w_OI), self.out_features, LINEAR_ROWS)
        if w_OI is None:
            return None
        gradient_NI = torch.empty_like(x_NI)
        self._each(lambda run: torch.mm(gradient_NO[run], w_OI, out=gradient_NI[run]), len(x_NI), LINEAR_TOKENS)
        return gradient_NI

    def _multiply(self, x_NI: torch.Tensor, y_NR: torch.Tensor, first: int) -> None:
        w_RI = self._scratch("values", (y_NR.shape[1], self.in_features), x_NI.dtype)
        self.tuned.values_into(first, w_RI)
        torch.mm(x_NI, w_RI.T, out=y_NR)

    def _update(self, x_NI: torch.Tensor, gradient_NO: torch.Tensor, run: slice, old_OI: torch.Tensor | None) -> None:
        """Move some rows; the values that they had go into `old_OI`."""
        tile_RI = self._scratch("rows", (run.stop - run.start, self.in_features), x_NI.dtype)
        torch.mm(gradient_NO[:, run].T, x_NI, out=tile_RI)
        self.tuned.update(run.start, tile_RI, None if old_OI is None else old_OI[run])

    def _scratch(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        if self.tuned.device.type == "cpu":
            return self.workers.scratch(name, shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.tuned.device)

    def _each(self, work: Any, size: int, tile: int) -> None:  # noqa: ANN401
        """Do `work` for tiles of `size`: on the threads, or at once where a device has threads of its own."""
        if self.tuned.device.type == "cpu":
            self.workers.each(work, runs(size, tile))
        else:
            work(slice(0, size))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: torch.Tensor, anchor: torch.Tensor, module: TunedLinear) -> torch.Tensor:  # noqa: ANN401, ARG004
        ctx.save_for_backward(x_NI)
        ctx.module = module
        return module.multiply(x_NI)

    @staticmethod
    def backward(ctx: Any, gradient_NO: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:  # noqa: ANN401
        (x_NI,) = ctx.saved_tensors
        with torch.no_grad():
            return ctx.module.pass_back(x_NI, gradient_NO, ctx.needs_input_grad[0]), None, None


def runs(size: int, tile: int) -> Iterator[slice]:
    """Cut `range(size)` into tiles."""
    for first in range(0, size, tile):
        yield slice(first, min(first + tile, size))
