"""The grid a weight is rounded to: how many bits, how many columns share a scale, which floats a scale may be.

Pure integer arithmetic; a ``Grid`` holds no data and knows no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from shardxform.errors import SchemeError

__all__ = ["COLUMN_MULTIPLE", "GROUP_SIZES", "Bits", "Grid", "Layout", "ScaleGrid"]

Bits = Literal[4, 8]
Layout = Literal["gptq", "row"]
ScaleGrid = Literal["fp16", "bf16"]

GROUP_SIZES: Final = (128, 64, 32, -1)
"""Input columns that may share a scale, the usual number first; -1 for a whole row."""

COLUMN_MULTIPLE: Final = 32
"""Input channels of a weight that can be packed: a multiple of this, so that groups fill whole words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Symmetric signed integer grid with one float16 scale per group of consecutive input columns.

    Attributes:
        bits: Width of a code, 4 or 8.
        group_size: Input columns that share a scale: 128, 64, 32, or -1 for the whole row.
        scale_grid: "bf16" for scales that are exact in both 16-bit formats, or "fp16" for auto-round's.
        search: Choose each scale by its squared weight error instead of by the extremes alone.
    """

    bits: Bits = 4
    group_size: int = 128
    scale_grid: ScaleGrid = "bf16"
    search: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise SchemeError(f"bits: expected 4 or 8, found {self.bits}")
        if self.group_size not in GROUP_SIZES:
            raise SchemeError(f"group size: expected 128, 64, 32 or -1, found {self.group_size}")
        if self.scale_grid not in ("fp16", "bf16"):
            raise SchemeError(f"scale grid: expected fp16 or bf16, found {self.scale_grid}")

    @property
    def zero_code(self) -> int:
        """The code that means 0: 8 or 128."""
        return 1 << (self.bits - 1)

    @property
    def codes_per_word(self) -> int:
        """Codes in an int32 word: 8 or 4."""
        return 32 // self.bits

    def span(self, in_features: int) -> int:
        """Columns of a full group in a row of ``in_features``."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups of a row; the last one may be short."""
        return -(-in_features // self.span(in_features))

    def words(self, in_features: int) -> int:
        """int32 words of a packed row."""
        return in_features // self.codes_per_word

    def word_shape(self, layout: Layout, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the packed int32 tensor in ``layout``."""
        words = self.words(in_features)
        return (words, out_features) if layout == "gptq" else (out_features, words)

    def scale_shape(self, layout: Layout, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scale tensor in ``layout``."""
        groups = self.groups(in_features)
        return (groups, out_features) if layout == "gptq" else (out_features, groups)
