"""Integers as other tools store them: with a zero point for each group, of any group size, their columns in any order.

Read only. A value is `scale * (code - zero)`, of the scale and zero point of the group that its column is in; exact in
float32, where a float16 or bfloat16 scale times an integer of 9 bits fits. Three orders of the words, n codes in each:

- `gptq`: words [I / n, O] run along the columns; zero points [G, O / n] along the rows, stored as they are or, in the
  first version of the format, less one; scales [G, O]. `g_idx` [I] names the group of each column.
- `awq` (GEMM): words [I, O / n] and zero points [G, O / n] run along the rows, those of a word in the order 0, 2, 4, 6,
  1, 3, 5, 7; scales [G, O].
- `row` (compressed-tensors): words [O, I / n] run along the columns; zero points [O / n, G] along the rows; scales
  [O, G]. `weight_g_idx` [I] names groups.

Layouts from the code of AutoAWQ, GPTQModel, auto-round and compressed-tensors.
"""

# O: output channels, I: input channels, R: a run of rows, G: groups of a row.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from shardxform.base.tensors import TensorRef, TensorSpec
from shardxform.errors import CheckpointError, ExecutionError
from shardxform.formats.decoded import DecodedRows, refuse_scales
from shardxform.formats.encoding import Cut, Encoded, PartSpec, Read, Role, Storage
from shardxform.formats.integers import Ints
from shardxform.formats.scheme import Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Asymmetric", "AsymmetricRows", "IntegerRule", "Order", "StatedGrid", "Zeros", "as_rounded"]

Order = Literal["gptq", "awq", "row"]
"""How words lie."""

Zeros = Literal["", "stored", "less one"]
"""How zero points are stored; without any, each is the middle of the range."""

_INTERLEAVED: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ the codes of eight rows are, the first row's first."""

_SCALES: Final = frozenset({"F16", "BF16", "F32"})
_SIZES: Final = frozenset({"I32", "I64"})


@dataclass(frozen=True, slots=True)
class Asymmetric:
    """Codes of 4 or 8 bits with a scale and a zero point for each group.

    Attributes:
        bits: of a code.
        group_size: columns that share a scale; -1 for a whole row.
        order: of the words.
        zeros: how zero points are stored.
        symmetric: whether each is the middle of the range, stored or not.
        scale_dtype: F16, BF16 or F32.
        g_idx: whether the group of each column is stored.

    """

    bits: int
    group_size: int
    order: Order
    zeros: Zeros
    symmetric: bool = False
    scale_dtype: str = "F16"
    g_idx: bool = False

    def __str__(self) -> str:
        groups = "a scale a row" if self.group_size == -1 else f"groups of {self.group_size}"
        zeros = "" if self.symmetric else " with zero points"
        return f"{self.bits}-bit integers{zeros}, {groups}{', in the order of AWQ' if self.order == 'awq' else ''}"

    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.bits

    def span(self, columns: int) -> int:
        """Columns of a full group."""
        return columns if self.group_size == -1 else self.group_size

    def parts(self, rows: int, columns: int) -> tuple[PartSpec, ...]:
        """List the codes, zero points, scales, and what says where columns belong."""
        groups, n = -(-columns // self.span(columns)), 32 // self.bits
        if self.order == "row":
            found = [
                PartSpec("words", "weight_packed", "I32", (rows, -(-columns // n))),
                PartSpec("scales", "weight_scale", self.scale_dtype, (rows, groups)),
                PartSpec("shape", "weight_shape", "I64", (2,)),
            ]
            found += [PartSpec("zeros", "weight_zero_point", "I32", (-(-rows // n), groups))] if self.zeros else []
            return (*found, *((PartSpec("g_idx", "weight_g_idx", "I32", (columns,)),) if self.g_idx else ()))
        words = (columns, rows // n) if self.order == "awq" else (columns // n, rows)
        found = [
            PartSpec("words", "qweight", "I32", words),
            PartSpec("zeros", "qzeros", "I32", (groups, rows // n)),
            PartSpec("scales", "scales", self.scale_dtype, (groups, rows)),
        ]
        return (*found, *((PartSpec("g_idx", "g_idx", "I32", (columns,)),) if self.g_idx else ()))

    @property
    def unwritten(self) -> str:
        """Why values are not rounded to it; empty where they are."""
        if not self.symmetric:
            return "which has zero points"
        if self.order == "awq":
            return "in the order of AWQ"
        return "with columns in groups of their own" if self.g_idx else ""

    # -- rounding values to it: as compressed-tensors does, to symmetric integers ---------------------------------

    def maxima(self, values_OI: NDArray[np.float32]) -> NDArray[np.float32]:
        """The largest magnitude of every group [O, G]."""
        import numpy as np

        starts = np.arange(0, values_OI.shape[1], self.span(values_OI.shape[1]))
        most_OG: NDArray[np.float32] = np.maximum.reduceat(np.abs(values_OI), starts, axis=1)
        return most_OG

    def scale_bits(self, most_OG: NDArray[np.float32], _whole: NDArray[np.float32] | None = None) -> NDArray[Any]:
        """Scales [O, G] under which the largest magnitude is half the range of codes, as bits of their dtype."""
        import numpy as np

        from shardxform.formats import packing

        scale_OG: NDArray[np.float32] = np.maximum(
            most_OG / np.float32(((1 << self.bits) - 1) / 2), np.float32(_SMALLEST_SCALE)
        )
        if self.scale_dtype == "F32":
            return scale_OG
        if self.scale_dtype == "BF16":
            return packing.bf16_bits_of(scale_OG)
        return packing.half_bits_of(np.minimum(scale_OG, np.float32(65504)))

    def scales(self, bits: NDArray[Any], _whole: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Scales of these bits."""
        from shardxform.formats import packing

        return packing.float32_of(bits, self.scale_dtype)

    def codes(self, values_RI: NDArray[np.float32], scales: NDArray[np.float32], begin: int) -> NDArray[np.uint8]:
        """Codes of rows `begin`.., a byte each: the nearest to the quotient, of two the even one."""
        import numpy as np

        middle = np.float32(1 << (self.bits - 1))
        quotient_RI = np.rint(values_RI / self._spread(scales, begin, values_RI.shape))
        codes: NDArray[np.uint8] = (np.clip(quotient_RI, -middle, middle - 1) + middle).astype(np.uint8)
        return codes

    def decoded(self, codes_RB: NDArray[np.uint8], scales: NDArray[np.float32], begin: int) -> NDArray[np.float32]:
        """Values of such codes."""
        import numpy as np

        values_RI = codes_RB.astype(np.float32) - np.float32(1 << (self.bits - 1))
        values_RI *= self._spread(scales, begin, codes_RB.shape)
        return values_RI

    def _spread(self, scale_OG: NDArray[np.float32], begin: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The scale of each column, of rows `begin`.. [R, I]."""
        import numpy as np

        return np.repeat(scale_OG[begin : begin + shape[0]], self.span(shape[1]), axis=1)[:, : shape[1]]

    def laid_out(self, codes_OB: NDArray[np.uint8], bits: NDArray[Any]) -> dict[Role, NDArray[Any]]:
        """Words, and scales in their order; zero points and the shape are not changed by rounding."""
        from shardxform.formats import packing

        layout: Layout = "row" if self.order == "row" else "gptq"
        return {"words": packing.pack(codes_OB, self.bits, layout), "scales": bits if layout == "row" else bits.T}

    def held(self, parts: Mapping[Role, TensorRef], _cut: Cut | None) -> int:
        """The codes, a byte each; words as they are read; zero points and scales, in float32."""
        words, scales = parts["words"].nbytes, parts["scales"].spec
        return words * 8 // self.bits + 2 * words + 8 * scales.shape[0] * scales.shape[1]

    def open(
        self, parts: Mapping[Role, TensorRef], shape: tuple[int, int], read: Read, checked: bool
    ) -> AsymmetricRows:
        """Read a matrix.

        Raises:
            ExecutionError: a scale is not finite, a column is in no group, the shape is another, or zero points are
                such as clients read in two ways.

        """
        import numpy as np

        from shardxform.formats import packing

        arrays = {role: np.empty(ref.spec.shape, _NUMPY[ref.spec.dtype]) for role, ref in parts.items()}
        for role, ref in parts.items():
            read(ref, arrays[role])
        scales = packing.float32_of(arrays["scales"], parts["scales"].spec.dtype)
        scale_OG = scales if self.order == "row" else np.ascontiguousarray(scales.T)
        zero_OG = self._zero_points(arrays, shape, parts, checked)
        if checked:
            refuse_scales(scale_OG, parts["scales"].name)
            if "shape" in arrays and arrays["shape"].tolist() != list(shape):
                raise ExecutionError(
                    f"tensor '{parts['shape'].name}': {arrays['shape'].tolist()}, expected the weight's shape"
                    f" {list(shape)}"
                )
        group_I = self._groups(arrays.get("g_idx"), parts, shape, checked)
        codes_OI = self._codes(arrays["words"])[: shape[0], : shape[1]]
        middle, span = np.float32(1 << (self.bits - 1)), self.span(shape[1])
        return AsymmetricRows(parts["words"].name, 0, shape[0], codes_OI, scale_OG, zero_OG, group_I, middle, span)

    def _codes(self, words: NDArray[Any]) -> NDArray[np.uint8]:
        """Codes [O, I]."""
        import numpy as np

        from shardxform.formats import packing

        if self.order != "awq":
            return packing.unpack(words, self.bits, "row" if self.order == "row" else "gptq")
        return np.ascontiguousarray(_in_order(packing.unpack(words, self.bits, "row")).T)

    def _zero_points(
        self,
        arrays: Mapping[Role, NDArray[Any]],
        shape: tuple[int, int],
        parts: Mapping[Role, TensorRef],
        checked: bool,
    ) -> NDArray[np.float32] | None:
        """Zero points [O, G]; None where all are the middle of the range."""
        import numpy as np

        from shardxform.formats import packing

        if not self.zeros:
            return None
        codes_GO = packing.unpack(arrays["zeros"], self.bits, "gptq" if self.order == "row" else "row")
        if self.order == "awq":
            codes_GO = _in_order(codes_GO)
        zero_OG = np.ascontiguousarray(codes_GO.T[: shape[0]]).astype(np.float32)
        less = np.float32(self.zeros == "less one")
        if self.symmetric:
            middle = np.float32(1 << (self.bits - 1))
            if checked and (bad := packing.first_of(zero_OG + less != middle)):
                raise ExecutionError(
                    f"tensor '{parts['zeros'].name}': zero point {int(zero_OG[bad] + less)} of row {bad[0]}, group"
                    f" {bad[1]}, expected {int(middle)} of a weight that the config calls symmetric"
                )
            return None
        if not less:
            return zero_OG
        if checked and (bad := packing.first_of(zero_OG == (1 << self.bits) - 1)):
            raise ExecutionError(
                f"tensor '{parts['zeros'].name}': zero point {int(zero_OG[bad])} of row {bad[0]}, group {bad[1]}, which"
                f" clients of checkpoint_format gptq read as {1 << self.bits} or as 0, with the next one off by one;"
                " expected smaller ones, or checkpoint_format gptq_v2"
            )
        return zero_OG + less

    def _groups(
        self, found: NDArray[Any] | None, parts: Mapping[Role, TensorRef], shape: tuple[int, int], checked: bool
    ) -> NDArray[np.intp] | None:
        """The group of each column [I]; None where they are in order."""
        import numpy as np

        from shardxform.formats import packing

        count = -(-shape[1] // self.span(shape[1]))
        if found is None or np.array_equal(found, np.arange(shape[1]) // self.span(shape[1])):
            return None
        if checked and (bad := packing.first_of((found < 0) | (found >= count))):
            raise ExecutionError(
                f"tensor '{parts['g_idx'].name}': column {bad[0]} is in group {found[bad]}, expected one of {count}"
            )
        group_I: NDArray[np.intp] = np.clip(found, 0, count - 1).astype(np.intp)
        return group_I


_SMALLEST_SCALE: Final = 168 * 2.0**-24
"""Of `formats.rounding`, exact in all dtypes: below it float16 has few bits."""

_NUMPY: Final = {"I32": "<i4", "I64": "<i8", "F16": "<u2", "BF16": "<u2", "F32": "<f4"}


def _in_order(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes [.., O] in the order of rows, of those in the order of AWQ's words."""
    count = codes.shape[-1]
    return codes.reshape(*codes.shape[:-1], count // 8, 8)[..., list(_INTERLEAVED)].reshape(codes.shape)


@dataclass(frozen=True, slots=True)
class AsymmetricRows(DecodedRows):
    """Rows of such a weight in memory.

    Attributes:
        codes_OI, scale_OG: of the whole weight.
        zero_OG: its zero points; None where each is `middle`.
        group_I: the group of each column; None where groups are of `span` consecutive columns.

    """

    codes_OI: NDArray[np.uint8]
    scale_OG: NDArray[np.float32]
    zero_OG: NDArray[np.float32] | None
    group_I: NDArray[np.intp] | None
    middle: np.float32
    span: int

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """`scale * (code - zero)`, exact in float32 [R, I]."""
        import numpy as np

        run = slice(self.first + start, self.first + stop)
        values_RI = self.codes_OI[run].astype(np.float32)
        values_RI -= self.middle if self.zero_OG is None else self.spread(self.zero_OG[run])
        values_RI *= self.spread(self.scale_OG[run])
        return values_RI

    def resting(self) -> AsymmetricRows:
        """Themselves."""
        return self

    @property
    def is_resting(self) -> bool:
        """Yes."""
        return True

    @property
    def scales(self) -> NDArray[np.float32]:
        """Those of the whole weight."""
        return self.scale_OG

    def spread(self, of_groups_RG: NDArray[Any]) -> NDArray[Any]:
        """For each column what its group has [R, I]."""
        import numpy as np

        columns = self.codes_OI.shape[1]
        if self.group_I is not None:
            return of_groups_RG[:, self.group_I]
        return np.repeat(of_groups_RG, self.span, axis=1)[:, :columns]


# -- what configs say of it ---------------------------------------------------------------------------------------


def as_rounded(storage: Storage) -> Storage:
    """What is stored of symmetric integers, as an encoding to which values are rounded; of others, themselves."""
    ints = storage.encoding
    if not isinstance(ints, Ints) or ints.biases:
        return storage
    grid, row = ints.grid, ints.layout == "row"
    parts = tuple((role, ref) for role, ref in storage.parts if role != "g_idx")  # which is that of the place
    dtype = dict(storage.parts)["scales"].spec.dtype
    order: Order = "row" if row else "gptq"
    encoding = Asymmetric(
        grid.bits, grid.group_size, order, "" if row else "less one", symmetric=True, scale_dtype=dtype
    )
    return storage._replace(encoding=encoding, parts=parts)


@dataclass(frozen=True, slots=True)
class StatedGrid:
    """What a config says of one weight: bits, columns of a group (-1 for a row), and whether it has zero points."""

    bits: int
    group_size: int
    zeros: bool = True


@dataclass(frozen=True, slots=True)
class IntegerRule:
    """How a config says that integers are stored.

    Attributes:
        order, zeros: as in `Asymmetric`; zero points as they are where the width of a weight says that it has any.
        width_of: says how wide the weight of a module is.

    """

    order: Order
    zeros: Zeros
    width_of: Callable[[str], StatedGrid | None]

    def encoded(self, weight: TensorRef, tensors: Mapping[str, TensorRef]) -> Encoded | None:
        """The weight whose codes are `weight`; None where it is no tensor of such codes.

        Raises:
            CheckpointError: other parts are missing, or are none of it.

        """
        spec = weight.spec
        stem, _, last = spec.name.rpartition(".")
        if last != ("weight_packed" if self.order == "row" else "qweight"):
            return None
        if spec.dtype != "I32":
            raise CheckpointError(f"tensor '{spec.name}': {spec.dtype}, expected I32 for words of integers")
        width = self.width_of(stem)
        if width is None or len(spec.shape) != 2:
            what = "the config says that it is in 16 bits" if width is None else f"expected two dimensions {spec.shape}"
            raise CheckpointError(f"tensor '{spec.name}': {what}")
        rows, columns = self._shape(spec, width)
        scales = tensors.get(f"{stem}.{'weight_scale' if self.order == 'row' else 'scales'}")
        encoding = Asymmetric(
            width.bits,
            width.group_size,
            self.order,
            self.zeros if width.zeros or self.order != "row" else "",
            not width.zeros,
            scales.spec.dtype if scales and scales.spec.dtype in _SCALES else "F16",
            f"{stem}.{'weight_g_idx' if self.order == 'row' else 'g_idx'}" in tensors,
        )
        if columns % encoding.span(columns):
            raise CheckpointError(f"tensor '{spec.name}': {columns} columns are no groups of {width.group_size}")
        found = tuple(_found(encoding, stem, (rows, columns), tensors))
        if not width.zeros and f"{stem}.weight_zero_point" in tensors:
            raise CheckpointError(f"tensor '{stem}.weight_zero_point': the config says that there are no zero points")
        return Encoded.of(Storage(encoding, found, (rows, columns)), f"{stem}.weight")

    def _shape(self, words: TensorSpec, width: StatedGrid) -> tuple[int, int]:
        """Shape [O, I] of the weight that words hold."""
        n, (first, second) = 32 // width.bits, words.shape
        return {"gptq": (second, first * n), "awq": (second * n, first), "row": (first, second * n)}[self.order]


def _found(
    encoding: Asymmetric, stem: str, shape: tuple[int, int], tensors: Mapping[str, TensorRef]
) -> Iterator[tuple[Role, TensorRef]]:
    """The parts of a weight; raises like `encoded`."""
    for part in encoding.parts(*shape):
        ref = tensors.get(f"{stem}.{part.suffix}")
        if ref is None:
            raise CheckpointError(f"tensor '{stem}.{part.suffix}' is missing; its weight means nothing without")
        dtypes = {"scales": _SCALES, "shape": _SIZES}.get(part.role, {part.dtype})
        if ref.spec.shape != part.shape or ref.spec.dtype not in dtypes:
            raise CheckpointError(
                f"tensor '{ref.name}': {ref.spec.dtype} {list(ref.spec.shape)}, expected {' or '.join(sorted(dtypes))}"
                f" {list(part.shape)} for a weight {list(shape)} in {encoding}"
            )
        yield part.role, ref
