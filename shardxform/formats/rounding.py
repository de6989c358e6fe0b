"""Round-to-nearest weight quantization: raw 16- or 32-bit weights in, packed words and float16 scales out.

The rule is the plain rounding of Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the
Quantization of LLMs" (2023), bit for bit as auto-round 0.16.1 computes it from float32; optionally each scale is
searched instead. Runs on the calling thread, opens no file, keeps no state. Weights that cannot be represented are
reported in ``RtnStats``, never raised: only the caller knows the tensor's name.

Two backends give the same bits: ``numpy`` here, ``numba`` in ``kernels``.
"""

# O: output rows, I: input columns, G: groups of a row, S: columns of a full group, P: groups of a tile, K: columns of a
# chunk.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from shardxform.base.constants import SEARCH_MARGIN
from shardxform.errors import SchemeError
from shardxform.formats import packing
from shardxform.formats.encoding import SourceDtype
from shardxform.formats.scheme import COLUMN_MULTIPLE, Grid, Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Backend",
    "QuantizedWeight",
    "RtnStats",
    "quantize",
    "quantize_into",
    "search_factors",
    "use_numba",
]

Backend = Literal["auto", "numpy", "numba"]

TILE_WEIGHTS: Final = 1 << 18
TILE_ROWS: Final = 32
CHUNK: Final = 128
SMALLEST_SCALE: Final = np.float32(np.float16(1e-5))  # 168 * 2^-24, exact in bf16 too
LARGEST_SCALE: Final = {"fp16": np.float32(65504.0), "bf16": np.float32(65280.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RtnStats:
    """What quantizing one weight (or a run of its rows) found. Rows count from the first row given.

    Attributes:
        nonfinite: (row, column) of the first NaN or infinity in row order, or None.
        overflow_row: First row with finite weights whose scale float16 cannot hold, or None.
        groups: Number of groups.
        zero_groups: Groups that hold nothing but zeros (of either sign).
    """

    nonfinite: tuple[int, int] | None
    overflow_row: int | None
    groups: int
    zero_groups: int

    @property
    def ok(self) -> bool:
        """Whether the words and scales mean anything; if not, they are unspecified and must not be written."""
        return self.nonfinite is None and self.overflow_row is None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """Packed words and scales of one weight in one layout.

    Attributes:
        layout: "gptq" or "row".
        words: int32, [I * bits / 32, O] for "gptq", [O, I * bits / 32] for "row"; offset codes, lowest bits first.
        scales: uint16, float16 bits, [G, O] for "gptq", [O, G] for "row".
    """

    layout: Layout
    words: NDArray[np.int32]
    scales: NDArray[np.uint16]

    @classmethod
    def empty(cls, layout: Layout, grid: Grid, shape: tuple[int, int]) -> QuantizedWeight:
        """Uninitialised buffers for a weight of ``shape`` [O, I]."""
        return cls(
            layout=layout,
            words=np.empty(grid.word_shape(layout, *shape), np.int32),
            scales=np.empty(grid.scale_shape(layout, *shape), np.uint16),
        )

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """View of what stands for rows `start`..`stop - 1` of the weight."""
        return QuantizedWeight(
            layout=self.layout,
            words=packing.rows_between(self.words, self.layout, start, stop),
            scales=packing.rows_between(self.scales, self.layout, start, stop),
        )


def quantize(
    w_OI: NDArray[np.generic],
    dtype: SourceDtype,
    grid: Grid,
    *,
    layout: Layout,
    backend: Backend = "auto",
) -> tuple[QuantizedWeight, RtnStats]:
    """As ``quantize_into``, into new arrays."""
    out = QuantizedWeight.empty(layout, grid, _shape(w_OI))
    return out, quantize_into(w_OI, dtype, grid, out, backend=backend)


def quantize_into(
    w_OI: NDArray[np.generic],
    dtype: SourceDtype,
    grid: Grid,
    out: QuantizedWeight,
    *,
    backend: Backend = "auto",
) -> RtnStats:
    """Round ``w_OI`` to ``grid`` and pack it into ``out``.

    Rows are independent: disjoint row ranges may be given to different threads with views of one output
    (``words[:, a:b]`` for "gptq"), and give the same bits as one call.

    Args:
        w_OI: [O, I], C-contiguous; uint16 bits (BF16, F16), float16 (F16) or float32 (F32). I a multiple of 32.
        dtype: What the bits mean, in safetensors' names.
        grid: Bits, groups and scales.
        out: Buffers of the shapes ``QuantizedWeight`` states; any strides.
        backend: "auto" takes numba where it is installed.

    Returns:
        The statistics. Unless they are ``ok``, what was written to ``out`` is unspecified.

    Raises:
        SchemeError: The columns are no positive multiple of 32.
        ValueError: An array has the wrong type, shape or layout, or the backend is not installed.
    """
    bits_OI = _raw_bits(w_OI, dtype)
    shape = _shape(bits_OI)
    if shape[1] == 0 or shape[1] % COLUMN_MULTIPLE:
        raise SchemeError(f"input channels: expected a multiple of {COLUMN_MULTIPLE}, found {shape[1]}")
    _check_out(out, grid, shape)
    run = _run_kernel if use_numba(backend) else _run_numpy
    row, column, overflow, zeros = run(bits_OI, dtype, grid, out)
    return RtnStats(
        nonfinite=None if row < 0 else (row, column),
        overflow_row=None if overflow < 0 else overflow,
        groups=shape[0] * grid.groups(shape[1]),
        zero_groups=zeros,
    )


def search_factors(bits: int) -> NDArray[np.float32]:
    """Factors of the min/max scale that ``Grid.search`` tries, in order, each with both signs; exact in float32.

    Where the best factors of Gaussian, Laplacian and trained weights lie: a wide range at 4 bits, around 1 at 8.
    """
    top, step, unit = (592, 7, 512) if bits == 4 else (1180, 6, 1024)
    return ((top - step * np.arange(30)) / unit).astype(np.float32)


def _shape(w_OI: NDArray[np.generic]) -> tuple[int, int]:
    if w_OI.ndim != 2:
        raise ValueError(f"weight: expected 2 dimensions, found shape {list(w_OI.shape)}")
    return w_OI.shape[0], w_OI.shape[1]


def _raw_bits(w_OI: NDArray[np.generic], dtype: SourceDtype) -> NDArray[Any]:
    """The weight as uint16 or uint32, aligned, without a copy where it is aligned already."""
    accepted = {"BF16": ("uint16",), "F16": ("uint16", "float16"), "F32": ("uint32", "float32")}
    if dtype not in accepted:
        raise ValueError(f"weight: expected one of {', '.join(accepted)}, found {dtype}")
    if w_OI.dtype.name not in accepted[dtype] or not w_OI.dtype.isnative:
        raise ValueError(f"{dtype} weight: expected {' or '.join(accepted[dtype])}, found {w_OI.dtype.str}")
    if not w_OI.flags.c_contiguous:
        raise ValueError("weight: expected a C-contiguous array")
    aligned = np.require(w_OI, requirements=("C", "A"))
    return aligned.view(np.uint32 if dtype == "F32" else np.uint16)


def _check_out(out: QuantizedWeight, grid: Grid, shape: tuple[int, int]) -> None:
    expected = (
        ("words", out.words, np.int32, grid.word_shape(out.layout, *shape)),
        ("scales", out.scales, np.uint16, grid.scale_shape(out.layout, *shape)),
    )
    for name, array, dtype, wanted in expected:
        if array.dtype != dtype or array.shape != wanted:
            found = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{out.layout} {name}: expected {np.dtype(dtype)} {list(wanted)}, found {found}")
        if not (array.flags.writeable and array.flags.aligned):
            raise ValueError(f"{out.layout} {name}: expected a writeable, aligned array")


def use_numba(backend: Backend) -> bool:
    """Whether a backend is the compiled one.

    Raises:
        ValueError: no such backend, or it is not installed.

    """
    if backend not in ("auto", "numpy", "numba"):
        raise ValueError(f"backend: expected auto, numpy or numba, found {backend}")
    installed = backend != "numpy" and find_spec("numba") is not None
    if backend == "numba" and not installed:
        raise ValueError("backend: numba is not installed; install shardxform[fast] or use numpy")
    return installed


_Found = tuple[int, int, int, int]
"""Row and column of what is not finite, and the row of an overflow, with -1 for none; zero groups."""


def _run_kernel(bits_OI: NDArray[np.generic], dtype: SourceDtype, grid: Grid, out: QuantizedWeight) -> _Found:
    from shardxform.formats import kernels

    settings = kernels.RoundSettings(
        kind=("BF16", "F16", "F32").index(dtype),
        bits=grid.bits,
        zero=grid.zero_code,
        span=grid.span(bits_OI.shape[1]),
        limit=0x47800000 if dtype == "F16" else 0x7F800000,
        bf16=int(grid.scale_grid == "bf16"),
        row_major=int(out.layout == "row"),
    )
    factors = search_factors(grid.bits) if grid.search else np.empty(0, np.float32)
    kernel = kernels.quantizer(wide=dtype == "F32")
    found: _Found = kernel(bits_OI, settings, factors, out.words, out.scales)
    return found


def _run_numpy(bits_OI: NDArray[np.generic], dtype: SourceDtype, grid: Grid, out: QuantizedWeight) -> _Found:
    row, column, overflow, zeros = -1, -1, -1, 0
    # Bits that cannot be represented are found and reported; until then they may overflow at will.
    with np.errstate(all="ignore"):
        for first, last in _row_tiles(*_shape(bits_OI)):
            w_OI = packing.float32_of(bits_OI[first:last], dtype)
            if row < 0 and not np.isfinite(w_OI).all():
                row, column = (int(i[0]) for i in np.nonzero(~np.isfinite(w_OI)))
                row += first
            w_OGS = _grouped(w_OI, grid)
            scale_OG, magnitude_OG, over_O = _plain_scales(w_OGS, grid)
            if overflow < 0 and over_O.any():
                overflow = first + int(over_O.argmax())
            zeros += int((w_OGS == 0).all(axis=-1).sum())
            if grid.search:
                scale_OG = _searched_scales(w_OGS, scale_OG, magnitude_OG, grid)
            codes_OI = _codes(w_OGS, scale_OG, grid)[:, : w_OI.shape[1]]
            _store(codes_OI, scale_OG, grid.bits, (first, last), out)
    return row, column, overflow, zeros


def _row_tiles(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Row ranges of bounded size, all but the last a multiple of 32 rows."""
    step = max(TILE_ROWS, TILE_WEIGHTS // columns // TILE_ROWS * TILE_ROWS)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


def _grouped(w_OI: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """[O, I] -> [O, G, S], a short last group padded with zeros, which change neither extremes nor errors."""
    rows, columns = w_OI.shape
    span, groups = grid.span(columns), grid.groups(columns)
    if groups * span != columns:
        w_OI = np.pad(w_OI, ((0, 0), (0, groups * span - columns)))
    return w_OI.reshape(rows, groups, span)


def _round_to_grid(magnitude: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """Non-negative float32 -> nearest scale of the grid, infinite where float16 overflows, not yet clamped."""
    if grid.scale_grid == "bf16":
        magnitude = packing.float32_of(packing.bf16_bits_of(magnitude), "BF16")
    return magnitude.astype(np.float16).astype(np.float32)


def _plain_scales(
    w_OGS: NDArray[np.float32], grid: Grid
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Signed min/max scales [O, G], the unrounded magnitudes [O, G], and the rows [O] with an overflow."""
    high = np.maximum(w_OGS.max(axis=-1), np.float32(0))
    low = np.maximum(-w_OGS.min(axis=-1), np.float32(0))
    largest = np.maximum(high, low)
    magnitude = largest / np.float32(grid.zero_code)
    scale = _round_to_grid(magnitude, grid)
    overflow = np.isinf(scale) & np.isfinite(largest)
    # A scale that rounds to zero has lost its sign; the clamp then takes the positive side.
    sign = np.where((high >= low) & (scale > 0), np.float32(-1), np.float32(1))
    return sign * np.maximum(scale, SMALLEST_SCALE), magnitude, overflow.any(axis=-1)


def _searched_scales(
    w_OGS: NDArray[np.float32], scale_OG: NDArray[np.float32], magnitude_OG: NDArray[np.float32], grid: Grid
) -> NDArray[np.float32]:
    """The candidate of least squared error per group; the first of equals, the min/max scale before all."""
    w_SP = np.ascontiguousarray(w_OGS.reshape(-1, w_OGS.shape[-1]).T)
    plain_P, magnitude_P = scale_OG.reshape(-1), magnitude_OG.reshape(-1)
    sign_P = np.where(plain_P < 0, np.float32(-1), np.float32(1))
    chosen_P = plain_P.copy()
    best_P = _squared_error(w_SP, plain_P, None, grid) * SEARCH_MARGIN
    for factor in search_factors(grid.bits):
        shrunk_P = _round_to_grid(magnitude_P * factor, grid)
        shrunk_P = sign_P * np.clip(shrunk_P, SMALLEST_SCALE, LARGEST_SCALE[grid.scale_grid])
        for candidate_P in (shrunk_P, -shrunk_P):
            error_P = _squared_error(w_SP, candidate_P, np.float32(1) / candidate_P, grid)
            better = error_P < best_P
            chosen_P[better] = candidate_P[better]
            best_P[better] = error_P[better]
    return chosen_P.reshape(scale_OG.shape)


def _squared_error(
    w_SP: NDArray[np.float32], scale_P: NDArray[np.float32], step_P: NDArray[np.float32] | None, grid: Grid
) -> NDArray[np.float64]:
    """Squared error per group: float32 in column order within 128 columns, float64 across them.

    Codes come from a product with ``step_P``, the reciprocal scale, where given: off only where two are as near.
    """
    low, high = np.float32(-grid.zero_code), np.float32(grid.zero_code - 1)
    total_P = np.zeros(scale_P.shape)
    for start in range(0, w_SP.shape[0], CHUNK):
        w_KP = w_SP[start : start + CHUNK]
        ratio_KP = w_KP / scale_P if step_P is None else w_KP * step_P
        error_KP = w_KP - scale_P * np.rint(np.clip(ratio_KP, low, high))
        error_KP *= error_KP
        acc_P = np.zeros_like(scale_P)
        for squares_P in error_KP:  # np.sum would choose an order of its own
            acc_P += squares_P
        total_P += acc_P
    return total_P


def _codes(w_OGS: NDArray[np.float32], scale_OG: NDArray[np.float32], grid: Grid) -> NDArray[np.uint8]:
    """Codes [O, G*S]."""
    zero = np.float32(grid.zero_code)
    q_OGS = np.clip(np.rint(w_OGS / scale_OG[:, :, None]), -zero, zero - np.float32(1))
    codes_OGS: NDArray[np.uint8] = (q_OGS + zero).astype(np.uint8)
    return codes_OGS.reshape(w_OGS.shape[0], -1)


def _store(
    codes_OI: NDArray[np.uint8],
    scale_OG: NDArray[np.float32],
    bits: int,
    rows: tuple[int, int],
    out: QuantizedWeight,
) -> None:
    first, last = rows
    words_OW = packing.pack(codes_OI, bits, "row")
    half_OG = scale_OG.astype(np.float16).view(np.uint16)
    if out.layout == "gptq":
        packing.transpose_into(words_OW, out.words[:, first:last])
        packing.transpose_into(half_OG, out.scales[:, first:last])
    else:
        out.words[first:last], out.scales[first:last] = words_OW, half_OG
