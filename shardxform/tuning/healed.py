"""Weights that are healed: held in the type they are stored in with what that type cannot hold beside, moved in place.

    bfloat16     the nearest bfloat16, and the difference to 16 bits of mantissa in one byte: 3 bytes a weight
    other types  float32

A step moves every weight by a fraction of its matrix's root mean square against the sign of its gradient. The smallest
step of a run, a ten-thousandth of a weight, is far below what bfloat16 resolves (1/256), and would be lost without the
byte. No gradient and no optimizer state is kept.
"""

# E: experts, O: output rows of one, I: input columns, R: any run of the E * O rows.

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["HealedStack", "Moving", "signs"]


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

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [self._w_RI] if self._low_RI is None else [self._w_RI, self._low_RI]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def exact_into(self, rows: slice, out_RI: torch.Tensor) -> None:
        """Write the values of some rows, float32."""
        if self._low_RI is None:
            out_RI.copy_(self._w_RI[rows])
        elif self._compiled:
            from shardxform.tuning.heal_kernels import joiner

            joiner()(self._high(rows), self._low_RI[rows].numpy(), out_RI.view(torch.int32).numpy())
        else:
            out_RI.copy_(self._joined(rows, self._low_RI))

    def step(self, rows: slice, step_R: torch.Tensor, gradient_RI: torch.Tensor) -> None:
        """Move every weight of a row by that row's step, float32, against the sign of its gradient; NaN moves none."""
        if self._low_RI is not None and self._compiled:
            from shardxform.tuning.heal_kernels import mover

            wide = gradient_RI.dtype == torch.float32
            gradient = gradient_RI.view(torch.uint32 if wide else torch.uint16).numpy()
            mover(wide)(self._high(rows), self._low_RI[rows].numpy(), step_R.numpy(), gradient)
            return
        change_RI = signs(gradient_RI) * step_R[:, None]
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


class HealedStack:
    """Weights [E, O, I] of routed experts, as `stacked.Tunable`.

    Attributes:
        lr: what part of an expert's root mean square a step moves its weights by; 0 for no step.
        moves: whether they are changed at all; one that is not wants no gradients.
    """

    def __init__(self, w_EOI: torch.Tensor, *, moves: bool) -> None:
        self.lr, self.moves = 0.0, moves
        self._shape = (w_EOI.shape[0], w_EOI.shape[1], w_EOI.shape[2])
        self._stored = w_EOI.dtype
        w_RI = w_EOI.reshape(-1, w_EOI.shape[2])
        self._rms_E = torch.stack([_rms(w_OI) for w_OI in w_EOI]) if moves else None
        self._values = Moving(w_RI) if moves else None
        self._w_RI = self._values.nearest if self._values else w_RI

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, O, I]."""
        return self._shape

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._w_RI.device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._values.nbytes if self._values else self._w_RI.numel() * self._w_RI.element_size()

    def stored(self, experts: int | slice) -> torch.Tensor:
        """The weights of some experts in the type that they are stored in, [E, O, I] or [O, I]."""
        return self._w_RI.view(self._shape)[experts].to(self._stored)

    def values_into(self, first: int, out_RI: torch.Tensor) -> None:
        """Write the rows from `first` on."""
        rows = slice(first, first + out_RI.shape[0])
        if self._values is None or out_RI.dtype == torch.bfloat16:
            out_RI.copy_(self._w_RI[rows])
            return
        self._values.exact_into(rows, out_RI)

    def settle(self) -> None:
        """Stop moving; from now on the values are those that will be stored."""
        self.lr = 0.0
        if self._values is not None:
            self._w_RI.copy_(self._w_RI.to(self._stored))
            self._values = None

    def update(self, first: int, gradient_RI: torch.Tensor, before_RI: torch.Tensor | None = None) -> None:
        """Take one signed step in the rows from `first` on; their values as they were into `before_RI`."""
        if before_RI is not None:
            self.values_into(first, before_RI)
        if self._values is None or self._rms_E is None:
            return
        count, rows = gradient_RI.shape[0], self._shape[1]
        expert_R = torch.arange(first, first + count, device=self.device) // rows
        self._values.step(slice(first, first + count), self._rms_E[expert_R] * self.lr, gradient_RI)


def signs(x: torch.Tensor) -> torch.Tensor:
    """-1, 0 or 1 in float32; 0 for NaN."""
    return torch.sign(torch.nan_to_num(x.float(), nan=0.0))


def _rms(w_OI: torch.Tensor) -> torch.Tensor:
    """Root mean square, float32, summed in an order of its own on each kind of device."""
    return w_OI.float().square().mean().sqrt()
