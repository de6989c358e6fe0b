"""A weight being tuned: the 16-bit original, an offset per weight, a clip per group, and the best of them so far.

Two bytes per weight beside the original, and 12 per group; no gradient, no optimizer state, no copy. What was best is
kept in two bits that offsets do not need. Any number of experts is one stack of rows, and rows are independent: so
threads may work on different ones. No files, no modules, no loss.
"""

# E: experts, O: output rows of one, I: input columns, G: groups of a row, R: any run of the E * O rows.

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import torch

from shardxform.base.tensors import TensorSpec
from shardxform.errors import ExecutionError, SchemeError
from shardxform.formats import packing, rounding
from shardxform.formats.encoding import SourceDtype
from shardxform.formats.scheme import COLUMN_MULTIPLE, Grid
from shardxform.tuning import elementwise
from shardxform.tuning.elementwise import Pace

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardxform.tuning.workers import Workers

__all__ = ["Codes", "StackedWeight", "Tunable", "rows_of", "stacked_weight"]

_KINDS: Final[dict[torch.dtype, SourceDtype]] = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}
_BITS: Final = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}
_ARRAYS: Final = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float32: torch.float32}
_START_ROWS: Final = 512
_AT_REST: Final = Pace(0.0, 0.0, 0.0, 1.2)


class Tunable(Protocol):
    """What the modules need of a weight: its present values, and a rule that takes gradients as they arrive."""

    moves: bool
    """Whether it wants gradients at all."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, O, I]."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        ...

    def values_into(self, first: int, out_RI: torch.Tensor) -> None:
        """Write the rows from `first` on as the block shall multiply with them; float32 or bfloat16."""
        ...

    def update(self, first: int, gradient_RI: torch.Tensor, before_RI: torch.Tensor | None = None) -> None:
        """Move the rows from `first` on against their gradient, float32 or bfloat16.

        `before_RI` takes their values as they were, as from `values_into`: both together are one sweep over memory.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codes:
    """A weight as it will be stored.

    Attributes:
        codes_OI: uint8 codes, `Grid.zero_code` for zero.
        scale_OG: uint16, the bits of float16 scales.
        zero_groups: how many groups of the original hold nothing but zeros.
    """

    codes_OI: NDArray[np.uint8]
    scale_OG: NDArray[np.uint16]
    zero_groups: int


class StackedWeight:
    """Weights [E, O, I] with rounding offsets and clips; `stacked_weight` makes one.

    The original is neither copied nor changed. `pace` says how far `update` moves; at first it moves nothing. Once
    `settled`, values are those that were kept.
    """

    moves = True

    def __init__(self, w_EOI: torch.Tensor, start_RG: torch.Tensor, grid: Grid) -> None:
        self.grid, self.pace, self.settled = grid, _AT_REST, False
        self._shape = (w_EOI.shape[0], w_EOI.shape[1], w_EOI.shape[2])
        self._w_RI = w_EOI.reshape(-1, w_EOI.shape[2])
        self._start_RG = start_RG
        self._v_RI = torch.zeros(self._w_RI.shape, dtype=torch.int16, device=w_EOI.device)
        self._clip_RG = torch.ones_like(start_RG)
        self._kept_RG = torch.ones_like(start_RG)
        self._compiled = w_EOI.device.type == "cpu" and find_spec("numba") is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, O, I]."""
        return self._shape

    @property
    def device(self) -> torch.device:
        """Where the weights and everything beside them are."""
        return self._w_RI.device

    def values_into(self, first: int, out_RI: torch.Tensor) -> None:
        """Write the rows from `first` on as they would be stored, or once `settled`, as they will be."""
        rows = slice(first, first + out_RI.shape[0])
        clip_RG = self._kept_RG if self.settled else self._clip_RG
        if self._compiled:
            from shardxform.tuning import kernels

            kernel = kernels.valuer(_KINDS[self._w_RI.dtype], _KINDS[out_RI.dtype])
            kernel(*self._arrays(rows, clip_RG), self._settings(kept=self.settled), _array(out_RI))
            return
        scale_RG = elementwise.scales(self._start_RG[rows], clip_RG[rows], self.grid)
        out_RI.copy_(elementwise.values(self._w_RI[rows], self._v_RI[rows], scale_RG, self.grid, kept=self.settled))

    def update(self, first: int, gradient_RI: torch.Tensor, before_RI: torch.Tensor | None = None) -> None:
        """Take one signed step of `pace` in the rows from `first` on; their values as they were into `before_RI`."""
        rows = slice(first, first + gradient_RI.shape[0])
        if self._compiled:
            from shardxform.tuning import kernels

            out, before = (None, None) if before_RI is None else (_KINDS[before_RI.dtype], _array(before_RI))
            kernel = kernels.stepper(_KINDS[self._w_RI.dtype], _KINDS[gradient_RI.dtype], out)
            kernel(*self._arrays(rows, self._clip_RG), self._settings(), self.pace, _array(gradient_RI), before)
            return
        if before_RI is not None:
            self.values_into(first, before_RI)
        scale = self._start_RG[rows], self._clip_RG[rows], self.grid
        elementwise.step(self._w_RI[rows], self._v_RI[rows], scale, self.pace, gradient_RI)

    def keep(self, first: int, last: int) -> None:
        """Remember the present codes and scales of a run of rows as the best."""
        rows = slice(first, last)
        self._kept_RG[rows] = self._clip_RG[rows]
        if self._compiled:
            from shardxform.tuning import kernels

            kernels.keeper(_KINDS[self._w_RI.dtype])(*self._arrays(rows, self._clip_RG), self._settings())
            return
        scale_RG = elementwise.scales(self._start_RG[rows], self._clip_RG[rows], self.grid)
        elementwise.keep(self._w_RI[rows], self._v_RI[rows], scale_RG, self.grid)

    def restart(self) -> None:
        """Forget all that was learned; what is kept is plain rounding, or the searched scales with it."""
        self.settled = False
        self._v_RI.zero_()
        self._clip_RG.fill_(1.0)
        self._kept_RG.fill_(1.0)

    def codes(self, expert: int, rows: slice) -> Codes:
        """What was kept of some rows of one expert, on the host."""
        first, last, _ = rows.indices(self._shape[1])
        run = slice(expert * self._shape[1] + first, expert * self._shape[1] + last)
        scale_RG = elementwise.scales(self._start_RG[run], self._kept_RG[run], self.grid)
        codes_OI = elementwise.codes(self._w_RI[run], self._v_RI[run], scale_RG, self.grid)
        half_OG = scale_RG.to(torch.float16).view(torch.int16).cpu().numpy()
        return Codes(
            codes_OI=codes_OI.cpu().numpy(),
            scale_OG=half_OG.view(np.uint16),
            zero_groups=elementwise.zero_groups(self._w_RI[run], self.grid),
        )

    def _arrays(self, rows: slice, clip_RG: torch.Tensor) -> tuple[Any, Any, tuple[Any, Any]]:
        scales = self._start_RG[rows].numpy(), clip_RG[rows].numpy()
        return _array(self._w_RI[rows]), self._v_RI[rows].numpy(), scales

    def _settings(self, *, kept: bool = False) -> Any:  # noqa: ANN401
        from shardxform.tuning.kernels import GridSettings

        span = self.grid.span(self._shape[2])
        return GridSettings(self.grid.zero_code, span, int(self.grid.scale_grid == "bf16"), int(kept))


def _array(x: torch.Tensor) -> NDArray[Any]:
    """The same memory, of the types that kernels are compiled for."""
    return x.view(_ARRAYS[x.dtype]).numpy()


def stacked_weight(w_EOI: torch.Tensor, grid: Grid, workers: Workers, name: str) -> StackedWeight:
    """Start from the scales that plain rounding takes, or the search if the grid asks for it.

    Args:
        w_EOI: contiguous bfloat16, float16 or float32 weights; kept, never changed.
        grid: bits, groups and scales.
        workers: threads for the search.
        name: what errors call the weight.

    Raises:
        SchemeError: the columns are no positive multiple of 32, or the type is another.
        ExecutionError: NaN, infinities, or a scale that float16 cannot hold.

    """
    if w_EOI.dtype not in _KINDS:
        raise SchemeError(f"{name}: expected bfloat16, float16 or float32 weights, found {w_EOI.dtype}")
    experts, rows, columns = w_EOI.shape
    if columns == 0 or columns % COLUMN_MULTIPLE or not w_EOI.is_contiguous():
        found = f"{list(w_EOI.shape)} with strides {list(w_EOI.stride())}"
        raise SchemeError(f"{name}: expected contiguous rows of a multiple of {COLUMN_MULTIPLE} columns, found {found}")
    w_RI = w_EOI.detach().reshape(-1, columns)
    runs = [(first, min(first + _START_ROWS, experts * rows)) for first in range(0, experts * rows, _START_ROWS)]
    found_scales = workers.ordered(lambda run: _start(w_RI, run, grid, f"{name} [{experts}, {rows}, {columns}]"), runs)
    start_RG = torch.from_numpy(np.concatenate(list(found_scales))).view(torch.float16).float()
    return StackedWeight(w_EOI.detach(), start_RG.to(w_EOI.device), grid)


def _start(w_RI: torch.Tensor, run: tuple[int, int], grid: Grid, name: str) -> NDArray[np.uint16]:
    """float16 bits of the scales of a run of rows."""
    part = w_RI[run[0] : run[1]].cpu()
    out, stats = rounding.quantize(part.view(_BITS[part.dtype]).numpy(), _KINDS[part.dtype], grid, layout="row")
    if not stats.ok:
        row = stats.overflow_row if stats.nonfinite is None else stats.nonfinite[0]
        what = "a scale beyond float16" if stats.nonfinite is None else "NaN or an infinity"
        raise ExecutionError(f"{name}: expected finite weights, found {what} in row {run[0] + (row or 0)} of the stack")
    return out.scales


def rows_of(codes: Codes, grid: Grid, module: str) -> packing.IntRows:
    """The rows of a weight as any encoding takes them."""
    words_OW, count = packing.pack(codes.codes_OI, grid.bits, "row"), codes.codes_OI.shape[0]
    scales = TensorSpec(f"{module}.scales", "F16", codes.scale_OG.shape)
    return packing.IntRows(words_OW, codes.scale_OG, "row", grid, scales, module, 0, count)
