"""The rounding rule on a torch device: the same bits as `rtn`, for machines whose weights pass through a GPU anyway.

Plain min/max rounding only; the scale search fixes an order of float32 sums that a GPU would not keep. On any device
torch's float32 division, rounding to even and float16 conversion are those of IEEE 754, which is all the rule needs.
"""

# R: rows of a run, I: input columns, G: groups of a row, S: columns of a group.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from shardxform.errors import ExecutionError, SchemeError
from shardxform.formats.encoding import SourceDtype
from shardxform.formats.rounding import QuantizedWeight, RtnStats
from shardxform.formats.scheme import Grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["open_device", "quantize_on"]

_SMALLEST: Final = float(np.float16(1e-5))
_BITS: Final = {"BF16": (torch.int16, torch.bfloat16), "F16": (torch.int16, torch.float16)}


def open_device(name: str) -> torch.device:
    """Find the device called `name`, such as `cuda` or `cuda:1`.

    Raises:
        SchemeError: torch has no such device here.

    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as e:
        raise SchemeError(f"`device` {name}: {str(e).splitlines()[0]}") from e
    return device


def quantize_on(
    w_RI: NDArray[np.generic], dtype: SourceDtype, grid: Grid, out: QuantizedWeight, device: torch.device
) -> RtnStats:
    """As `rounding.quantize_into` without measuring; every group must be full.

    Args:
        w_RI: raw bits or floats, as `rounding.quantize_into` takes them.
        dtype: what they mean.
        grid: bits, groups and scales; no search.
        out: host arrays to write.
        device: where to compute.

    Raises:
        SchemeError: the grid asks for a search.
        ExecutionError: the device ran out of memory.

    """
    if grid.search:
        raise SchemeError("the scale search runs on the CPU only: leave out `device`")
    try:
        return _quantize_on(w_RI, dtype, grid, out, device)
    except torch.OutOfMemoryError as e:
        raise ExecutionError(f"{device}: {str(e).splitlines()[0]} Fewer jobs take less; what is done is safe") from e


def _quantize_on(
    w_RI: NDArray[np.generic], dtype: SourceDtype, grid: Grid, out: QuantizedWeight, device: torch.device
) -> RtnStats:
    rows, columns = w_RI.shape
    w_rgs = _to_float32(w_RI, dtype, device).reshape(rows, grid.groups(columns), grid.span(columns))
    scale_rg, over_rg = _scales(w_rgs, grid)
    codes = torch.clamp(torch.round(w_rgs / scale_rg[..., None]), -grid.zero_code, grid.zero_code - 1)
    words = _pack((codes + grid.zero_code).to(torch.int32).reshape(rows, columns), grid)
    half = scale_rg.to(torch.float16).view(torch.int16)
    if out.layout == "gptq":
        words, half = words.T, half.T
    out.words[:] = words.cpu().numpy()
    out.scales[:] = half.cpu().numpy().view(np.uint16)
    return RtnStats(
        nonfinite=_first(~torch.isfinite(w_rgs.reshape(rows, columns))),
        overflow_row=None if not over_rg.any() else int(over_rg.any(1).to(torch.int8).argmax()),
        groups=scale_rg.numel(),
        zero_groups=int((w_rgs == 0).all(-1).sum()),
    )


def _to_float32(w: NDArray[np.generic], dtype: SourceDtype, device: torch.device) -> torch.Tensor:
    if dtype == "F32":
        return torch.from_numpy(w).to(device)
    integers, floats = _BITS[dtype]
    return torch.from_numpy(w.view(np.int16)).to(device).view(integers).view(floats).to(torch.float32)


def _scales(w_rgs: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed scales [R, G] in float32, and where float16 overflows although the weights are finite."""
    high = w_rgs.amax(-1).clamp(min=0)
    low = (-w_rgs.amin(-1)).clamp(min=0)
    largest = torch.maximum(high, low)
    magnitude = largest / grid.zero_code
    if grid.scale_grid == "bf16":
        magnitude = magnitude.to(torch.bfloat16).to(torch.float32)
    scale = magnitude.to(torch.float16).to(torch.float32)
    over = torch.isinf(scale) & torch.isfinite(largest)
    # A scale that rounds to zero has lost its sign; the clamp then takes the positive side.
    negative = (high >= low) & (scale > 0)
    scale = scale.clamp(min=_SMALLEST)
    return torch.where(negative, -scale, scale), over


def _pack(codes_ri: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes -> int32 words along the columns, first code in the lowest bits."""
    rows, columns = codes_ri.shape
    grouped = codes_ri.reshape(rows, columns // grid.codes_per_word, grid.codes_per_word)
    words = torch.zeros(grouped.shape[:2], dtype=torch.int32, device=codes_ri.device)
    for k in range(grid.codes_per_word):
        words |= grouped[..., k] << (k * grid.bits)
    return words


def _first(flags_ri: torch.Tensor) -> tuple[int, int] | None:
    if not flags_ri.any():
        return None
    flat = int(flags_ri.reshape(-1).to(torch.int8).argmax())
    return flat // flags_ri.shape[1], flat % flags_ri.shape[1]
