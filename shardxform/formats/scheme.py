"""How selected weights are quantized: a value that gives the stored tensors of a module by arithmetic alone.

`Scheme.parts` answers "what tensors will come out?"; `formats.rounding` computes their values; a test holds the two
together. Words as in compressed-tensors: scheme, group size, symmetric, pack-quantized.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, Literal

from shardxform.base.tensors import TensorSpec
from shardxform.errors import SchemeError
from shardxform.formats.grid import Bits, Grid, Layout, ScaleGrid
from shardxform.model.matrices import ExpertNames

__all__ = ["FORMATS", "PRESETS", "ExpertNames", "Format", "Part", "Scheme"]

Format = Literal["auto-round", "gptq", "compressed-tensors"]
Role = Literal["words", "zeros", "scales", "shape", "g_idx"]

FORMATS: Final[tuple[Format, ...]] = ("auto-round", "gptq", "compressed-tensors")
PRESETS: Final[dict[str, Bits]] = {"W4A16": 4, "W8A16": 8}


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a quantized module, and what it holds."""

    role: Role
    spec: TensorSpec


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
    def layout(self) -> Layout:
        """Which way the words of a weight run; see `formats.rounding.QuantizedWeight`."""
        return "row" if self.format == "compressed-tensors" else "gptq"

    @property
    def scale_dtype(self) -> str:
        """Dtype of stored scales: float16, or bfloat16 where the format has the weights' and it loses nothing."""
        return "BF16" if self.format == "compressed-tensors" and self.grid.scale_grid == "bf16" else "F16"

    def misfit(self, out_features: int, in_features: int) -> str:
        """Say why a weight [O, I] cannot be quantized under this scheme; empty when it can."""
        group = self.grid.span(in_features)
        if in_features % 32 or out_features % 32:
            return f"[{out_features}, {in_features}] is no multiple of 32"
        if in_features % group:
            return f"{in_features} input channels do not fill groups of {group}"
        return ""

    def parts(self, module: str, out_features: int, in_features: int) -> tuple[Part, ...]:
        """List the tensors that stand for the weight [O, I] of `module`, in the order in which they are written."""
        return tuple(
            Part(role, TensorSpec(f"{module}.{last}", dtype, shape))
            for role, last, dtype, shape in _forms(self, out_features, in_features)
        )


@functools.lru_cache(maxsize=64)
def _forms(scheme: Scheme, out_features: int, in_features: int) -> tuple[tuple[Role, str, str, tuple[int, ...]], ...]:
    """What stands for a weight of one shape, whatever it is called: role, last part of the name, dtype and shape."""
    grid, layout = scheme.grid, scheme.layout
    words = grid.word_shape(layout, out_features, in_features)
    scales = grid.scale_shape(layout, out_features, in_features)
    if layout == "row":
        return (
            ("words", "weight_packed", "I32", words),
            ("scales", "weight_scale", scheme.scale_dtype, scales),
            ("shape", "weight_shape", "I64", (2,)),
        )
    zeros = (scales[0], out_features // grid.codes_per_word)
    index: tuple[Role, str, str, tuple[int, ...]] = ("g_idx", "g_idx", "I32", (in_features,))
    return (
        ("words", "qweight", "I32", words),
        ("zeros", "qzeros", "I32", zeros),
        ("scales", "scales", "F16", scales),
        *((index,) if scheme.g_idx else ()),
    )
