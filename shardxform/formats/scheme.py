"""What is asked of a quantization: which weights become integers of what grid, in what format of clients.

Words as in compressed-tensors: scheme, group size, symmetric, pack-quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from shardxform.errors import SchemeError
from shardxform.formats.grid import Bits, Grid, Layout, ScaleGrid

if TYPE_CHECKING:
    from shardxform.formats.integers import Ints

__all__ = ["FORMATS", "PRESETS", "ExpertNames", "Format", "Scheme"]

ExpertNames = Literal["split", "fused-indexed"]
Format = Literal["auto-round", "gptq", "compressed-tensors"]

FORMATS: Final[tuple[Format, ...]] = ("auto-round", "gptq", "compressed-tensors")
PRESETS: Final[dict[str, Bits]] = {"W4A16": 4, "W8A16": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Weights of `grid.bits` bits, symmetric, 16-bit activations, in one on-disk format.

    Attributes:
        grid: bits, group size, scale grid, scale search.
        format: how clients find the weights.
        expert_names: `split` for `experts.{id}.gate_proj`, which current clients load; `fused-indexed` for
            `experts.gate_up_proj.{id}`, which auto-round wrote before 0.12.
        g_idx: also write the identity `g_idx`, which lets llama.cpp read gptq checkpoints.
        keep_16bit: patterns of modules that stay as they are, beside those the family names.
        quantize: patterns of modules to quantize although they would stay as they are.

    """

    grid: Grid
    format: Format = "auto-round"
    expert_names: ExpertNames = "split"
    g_idx: bool = False
    keep_16bit: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SchemeError(f"format: expected one of {', '.join(FORMATS)}, found {self.format!r}")
        if self.g_idx and self.format == "compressed-tensors":
            raise SchemeError("`g_idx`: expected `format` gptq or auto-round, which have such a tensor")
        if self.expert_names == "fused-indexed" and self.format == "compressed-tensors":
            raise SchemeError("`expert_names`: fused-indexed exists in auto-round and gptq checkpoints only")

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        group_size: int = 128,
        scale_grid: ScaleGrid = "bf16",
        search: bool = False,
        format: Format = "auto-round",  # noqa: A002
    ) -> Scheme:
        """Make a scheme from its usual name, `W4A16` or `W8A16`.

        Raises:
            SchemeError: no such preset, group size or format.

        """
        if name not in PRESETS:
            raise SchemeError(f"scheme: expected one of {', '.join(PRESETS)}, found {name!r}")
        grid = Grid(bits=PRESETS[name], group_size=group_size, scale_grid=scale_grid, search=search)
        return cls(grid=grid, format=format)

    @property
    def encoding(self) -> Ints:
        """How a selected weight is stored; scales are bfloat16 where the format allows it and it loses nothing."""
        from shardxform.formats.integers import Ints  # most commands need a scheme to name formats alone

        layout: Layout = "row" if self.format == "compressed-tensors" else "gptq"
        bf16 = layout == "row" and self.grid.scale_grid == "bf16"
        return Ints(self.grid, layout, "BF16" if bf16 else "F16", self.g_idx)
