"""What tuning computes weight by weight, in torch operations: on any device, and where numba is not installed.

The rule is the symmetric case of Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs" (2023): a weight w is stored as `scale * clamp(round(w / scale + V), -zero, zero - 1)`, its scale
as `start * clip` rounded to the grid. Rounding passes gradients through, clamping stops them. `kernels` computes the
same bits in fewer passes. No state, no choice of device.
"""

# R: rows of any number of experts, I: input columns, G: groups of a row, B: blocks of 32 columns, L: lanes of a block.

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from shardxform.base.constants import LANES, OFFSET_STEP, OFFSET_UNITS
from shardxform.formats.rounding import LARGEST_SCALE, SMALLEST_SCALE

if TYPE_CHECKING:
    from shardxform.formats.scheme import Grid

__all__ = ["LIMIT", "ONE", "UNITS_PER_STEP", "Pace", "codes", "keep", "scales", "step", "values", "zero_groups"]

ONE: Final = OFFSET_UNITS
"""Offsets are int16 in units of 1 / ONE."""

UNITS_PER_STEP: Final = OFFSET_STEP
"""Offsets are multiples of this; the two bits below hold a tag, the kept code's distance from plain rounding."""

LIMIT: Final = ONE - UNITS_PER_STEP


class Pace(NamedTuple):
    """Sizes of one step, exact in float32.

    Attributes:
        offset: Step of an offset, in units of 1 / ONE; a multiple of UNITS_PER_STEP.
        clip: Step of a clip.
        low: Smallest clip.
        high: Largest clip.
    """

    offset: float
    clip: float
    low: float
    high: float


def scales(start_RG: torch.Tensor, clip_RG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The scales as they would be stored: float32 [R, G], exact in float16."""
    magnitude = start_RG.abs() * clip_RG
    if grid.scale_grid == "bf16":
        magnitude = magnitude.to(torch.bfloat16).to(torch.float32)
    magnitude = magnitude.to(torch.float16).to(torch.float32)
    magnitude = magnitude.clamp(float(SMALLEST_SCALE), float(LARGEST_SCALE[grid.scale_grid]))
    return torch.where(start_RG < 0, -magnitude, magnitude)


def values(
    w_RI: torch.Tensor, v_RI: torch.Tensor, scale_RG: torch.Tensor, grid: Grid, *, kept: bool = False
) -> torch.Tensor:
    """The weights as they would be stored, float32 [R, I]: with the offsets, or with the codes that were kept."""
    scale_RI = _spread(scale_RG, grid, w_RI.shape[1])
    return scale_RI * _clamped(_rounded(w_RI.float() / scale_RI, v_RI, kept), grid)


def codes(w_RI: torch.Tensor, v_RI: torch.Tensor, scale_RG: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The codes that were kept, uint8 [R, I]; `scale_RG` are the scales that were kept with them."""
    ratio_RI = w_RI.float() / _spread(scale_RG, grid, w_RI.shape[1])
    return (_clamped(_rounded(ratio_RI, v_RI, kept=True), grid) + grid.zero_code).to(torch.uint8)


def zero_groups(w_RI: torch.Tensor, grid: Grid) -> int:
    """How many groups hold nothing but zeros, of either sign."""
    rows, columns = w_RI.shape
    span, groups = grid.span(columns), grid.groups(columns)
    some_RI = torch.nn.functional.pad(w_RI != 0, (0, groups * span - columns))
    return rows * groups - int(some_RI.view(rows, groups, span).any(-1).sum())


def keep(w_RI: torch.Tensor, v_RI: torch.Tensor, scale_RG: torch.Tensor, grid: Grid) -> None:
    """Write into the tags of `v_RI` how far each code is from plain rounding: -1, 0 or 1, as offsets are below 1."""
    ratio_RI = w_RI.float() / _spread(scale_RG, grid, w_RI.shape[1])
    more_RI = _rounded(ratio_RI, v_RI, kept=False) - torch.round(ratio_RI)
    v_RI.copy_(v_RI & -UNITS_PER_STEP | more_RI.to(torch.int16) & 3)


def step(
    w_RI: torch.Tensor,
    v_RI: torch.Tensor,
    scale: tuple[torch.Tensor, torch.Tensor, Grid],
    pace: Pace,
    gradient_RI: torch.Tensor,
) -> None:
    """Move offsets and clips against the signs of their gradients, in place.

    Args:
        w_RI: 16-bit or float32 weights.
        v_RI: int16 offsets and tags; changed, the tags apart.
        scale: signed scales to start from [R, G], clips [R, G] (changed), and the grid.
        pace: sizes of the step.
        gradient_RI: of the loss by the weights as `values` gives them. NaN moves nothing.
    """
    start_RG, clip_RG, grid = scale
    scale_RI = _spread(scales(start_RG, clip_RG, grid), grid, w_RI.shape[1])
    ratio_RI = w_RI.float() / scale_RI
    rounded_RI = _rounded(ratio_RI, v_RI, kept=False)
    q_RI = _clamped(rounded_RI, grid)
    inside_RI = q_RI == rounded_RI
    g_RI = gradient_RI.float()
    slope_RG = _group_sums(g_RI * (q_RI - torch.where(inside_RI, ratio_RI, 0.0)), grid)
    move_RI = torch.where(inside_RI, _sign(g_RI) * torch.sign(scale_RI), 0.0) * pace.offset
    moved_RI = ((v_RI & -UNITS_PER_STEP).float() - move_RI).clamp(-LIMIT, LIMIT)
    v_RI.copy_(moved_RI.to(torch.int16) | v_RI & 3)
    clip_RG.sub_(_sign(slope_RG) * torch.sign(start_RG) * pace.clip).clamp_(pace.low, pace.high)


def _rounded(ratio_RI: torch.Tensor, v_RI: torch.Tensor, kept: bool) -> torch.Tensor:
    """Weights in scales, rounded, not yet clamped."""
    if kept:
        return torch.round(ratio_RI) + (((v_RI & 3) ^ 2) - 2).float()
    return torch.round(ratio_RI + (v_RI & -UNITS_PER_STEP).float() * (1 / ONE))


def _clamped(rounded_RI: torch.Tensor, grid: Grid) -> torch.Tensor:
    return rounded_RI.clamp(-grid.zero_code, grid.zero_code - 1)


def _sign(x: torch.Tensor) -> torch.Tensor:
    """-1, 0 or 1; 0 for NaN."""
    return (x > 0).float() - (x < 0).float()


def _spread(scale_RG: torch.Tensor, grid: Grid, columns: int) -> torch.Tensor:
    """Each group's scale at all of its columns, [R, I]."""
    return scale_RG.repeat_interleave(grid.span(columns), dim=1)[:, :columns]


def _group_sums(terms_RI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Sums of the groups [R, G], in the order that a vector register adds in: 32 lanes, then halves of them."""
    rows, columns = terms_RI.shape
    groups, span = grid.groups(columns), grid.span(columns)
    terms_RI = torch.nn.functional.pad(terms_RI, (0, groups * span - columns))
    blocks_BRGL = terms_RI.reshape(rows, groups, span // LANES, LANES).permute(2, 0, 1, 3)
    acc_RGL = torch.zeros_like(blocks_BRGL[0])
    for block_RGL in blocks_BRGL:
        acc_RGL += block_RGL
    half = LANES // 2
    while half:
        acc_RGL = acc_RGL[..., :half] + acc_RGL[..., half : 2 * half]
        half //= 2
    return acc_RGL[..., 0]
