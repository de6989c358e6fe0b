"""What is asked of a quantization: which weights become integers of what grid, in what format of clients.

Words as in compressed-tensors: scheme, group size, symmetric, pack-quantized.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from shardxform.errors import SchemeError

__all__ = [
    "COLUMN_MULTIPLE",
    "FORMATS",
    "GGUF",
    "GROUP_SIZES",
    "PRESETS",
    "ROW_FORMATS",
    "Bits",
    "ExpertNames",
    "Format",
    "Grid",
    "Layout",
    "ScaleGrid",
    "Scheme",
    "usual_group_size",
]

# -- grid --------------------------------------------------------------------------------------------------------------
# The grid a weight is rounded to: how many bits, how many columns share a scale, which floats a scale may be.
#
# Pure integer arithmetic; a ``Grid`` holds no data and knows no tensor.

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


# -- scheme ------------------------------------------------------------------------------------------------------------

ExpertNames = Literal["split", "fused-indexed"]
Format = Literal["auto-round", "gptq", "compressed-tensors", "mlx", "gguf"]

FORMATS: Final[tuple[Format, ...]] = ("auto-round", "gptq", "compressed-tensors", "mlx")
"""Those that a config declares, beside shards of safetensors."""

ROW_FORMATS: Final[tuple[Format, ...]] = ("compressed-tensors", "mlx")
"""Of those, the ones whose words lie row by row."""

GGUF: Final = "gguf"
_NARROW: Final = ("mlx", GGUF)
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
        requantize: round anew what the source holds in as few bits, or fewer, which else stays as it is.

    """

    grid: Grid
    format: Format = "auto-round"
    expert_names: ExpertNames = "split"
    g_idx: bool = False
    keep_16bit: tuple[str, ...] = ()
    quantize: tuple[str, ...] = ()
    requantize: bool = False

    def __post_init__(self) -> None:
        if self.format not in (*FORMATS, GGUF):
            raise SchemeError(f"format: expected one of {', '.join((*FORMATS, GGUF))}, found {self.format!r}")
        if self.format == "mlx":
            _refuse_beyond_mlx(self.grid)
        if self.g_idx and self.format in (*ROW_FORMATS, GGUF):
            raise SchemeError("`g_idx`: expected `format` gptq or auto-round, which have such a tensor")
        if self.expert_names == "fused-indexed" and self.format in (*ROW_FORMATS, GGUF):
            raise SchemeError("`expert_names`: fused-indexed exists in auto-round and gptq checkpoints only")

    def facts(self) -> dict[str, Any]:
        """What a record holds of it; `requantize` where it is asked for."""
        return {key: value for key, value in asdict(self).items() if key != "requantize" or value}

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


def usual_group_size(format: str) -> int:  # noqa: A002
    """Input columns that share a scale where nobody says: 32 in the formats of llama.cpp and MLX, else 128."""
    return 32 if format in _NARROW else 128


def _refuse_beyond_mlx(grid: Grid) -> None:
    if grid.scale_grid != "bf16":
        raise SchemeError(
            "`format` mlx needs `scale_grid` bf16: its scales are of the model's own 16-bit type, and beside float16"
            " ones mlx multiplies bfloat16 activations in float32"
        )
    if grid.group_size == -1:
        raise SchemeError("`format` mlx needs `group_size` 128, 64 or 32, the groups that mlx has kernels for")
