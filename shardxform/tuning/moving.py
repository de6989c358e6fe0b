"""Weights that healing moves: 16 bits stay where they are, and one more byte holds what a small step adds to them.

No root mean square, no step size, no rule.
"""

# R: any run of the rows, I: input columns.

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from shardxform.tuning.directions import signs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Moving"]


class Moving:
    """Values [R, I] that can be read and moved; bfloat16 ones stay in the tensor they came in."""

    def __init__(self, w_RI: torch.Tensor) -> None:
        self._split = w_RI.dtype == torch.bfloat16
        self._w_RI = w_RI if self._split else w_RI.float()
        self._low_RI = torch.zeros(w_RI.shape, dtype=torch.int8, device=w_RI.device) if self._split else None
        self._compiled = w_RI.device.type == "cpu" and find_spec("numba") is not None

    @property
    def nearest(self) -> torch.Tensor:
        """The values [R, I]; for bfloat16, rounded to it."""
        return self._w_RI

    def exact_into(self, rows: slice, out_RI: torch.Tensor) -> None:
        """Write the values of some rows, float32."""
        if self._low_RI is None:
            out_RI.copy_(self._w_RI[rows])
        elif self._compiled:
            from shardxform.tuning.kernels import joiner

            joiner()(self._high(rows), self._low_RI[rows].numpy(), out_RI.view(torch.int32).numpy())
        else:
            out_RI.copy_(self._joined(rows, self._low_RI))

    def step(self, rows: slice, step_R: torch.Tensor, gradient_RI: torch.Tensor) -> None:
        """Move every weight of a row by that row's step, float32, against the sign of its gradient; NaN moves none."""
        if self._low_RI is not None and self._compiled:
            from shardxform.tuning.kernels import mover

            wide = gradient_RI.dtype == torch.float32
            gradient = gradient_RI.view(torch.uint32 if wide else torch.uint16).numpy()
            mover(wide)(self._high(rows), self._low_RI[rows].numpy(), step_R.numpy(), gradient)
            return
        self._move(rows, signs(gradient_RI) * step_R[:, None])

    def follow(self, rows: slice, step_R: torch.Tensor, direction_RI: torch.Tensor) -> None:
        """Move every weight of a row against its direction, times that row's step, both float32."""
        if self._low_RI is not None and self._compiled:
            from shardxform.tuning.kernels import follower

            follower()(self._high(rows), self._low_RI[rows].numpy(), step_R.numpy(), direction_RI.numpy())
            return
        self._move(rows, direction_RI * step_R[:, None])

    def _move(self, rows: slice, change_RI: torch.Tensor) -> None:
        if self._low_RI is None:
            self._w_RI[rows].sub_(change_RI)
            return
        bits_RI = self._joined(rows, self._low_RI).sub_(change_RI).view(torch.int32)
        bits_RI.add_(128).bitwise_right_shift_(8)  # the upper 24 bits, rounded
        high_RI = (bits_RI + 128).bitwise_right_shift_(8)
        self._low_RI[rows] = bits_RI.sub_(high_RI, alpha=256).to(torch.int8)
        self._w_RI[rows] = high_RI.to(torch.int16).view(torch.bfloat16)

    def _joined(self, rows: slice, low_RI: torch.Tensor) -> torch.Tensor:
        bits_RI = self._w_RI[rows].view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
        return bits_RI.add_(low_RI[rows].to(torch.int32), alpha=256).view(torch.float32)

    def _high(self, rows: slice) -> NDArray[np.int16]:
        return self._w_RI[rows].view(torch.int16).numpy()
