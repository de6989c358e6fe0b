"""Rows of a weight whose values are worked out when they are asked for: of codes in small floats, with scales."""

# O: output channels, I: input channels, R: a run of rows, B: bytes of a row, S, T: rows and columns of blocks.

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from shardxform.base.tensors import TensorRef
from shardxform.errors import ExecutionError
from shardxform.formats.encoding import Cut, Read, Rows, SourceDtype, taken

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["HUGE", "Compiled", "DecodedRows", "Decoding", "ScaledRows", "compiled", "refuse_scales"]

_WORTHWHILE: Final = 1 << 16
"""Codes from which on a tile is decoded by compiled code; the import of numba takes a part of a second."""

HUGE: Final = 2.0**100
"""Scales below it leave all codes that are numbers finite."""

Compiled = Callable[["NDArray[np.uint8]", "NDArray[np.float32]", int, "NDArray[np.float32]"], bool]
"""Decodes rows of codes under all scales, the first of which is row `begin`; says whether it is what it decodes."""


@functools.cache
def _is_compiled() -> bool:
    return find_spec("numba") is not None


def compiled(
    kind: Literal["F8_E4M3", "E2M1", "int4"],
    codes_RB: NDArray[np.uint8],
    scale_ST: NDArray[np.float32],
    begin: int,
    block: tuple[int, int],
    out_RI: NDArray[np.float32],
) -> bool:
    """Decode rows from `begin` on by `decoding_kernels.decode_run`; not where it is not worth it, or for a NaN."""
    if codes_RB.size < _WORTHWHILE or not _is_compiled():
        return False
    from shardxform.formats.decoding_kernels import decode_run

    return decode_run(kind, codes_RB, scale_ST, begin, block, out_RI)


class Decoding(Protocol):
    """What turns codes and scales into values."""

    def decoded(self, codes_RB: NDArray[np.uint8], scales: NDArray[np.float32], begin: int) -> NDArray[np.float32]:
        """Values of rows `begin`.. of a weight, float32 [R, I], of their codes as they are stored and all scales."""
        ...


@dataclass(frozen=True, slots=True)
class DecodedRows(ABC):
    """Rows of a weight whose values are worked out when they are asked for.

    Attributes:
        name: of the tensor that holds the codes.
        first, count: of the rows, among all that are stored.

    """

    name: str
    first: int
    count: int

    @abstractmethod
    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Values of rows `start`..`stop - 1`, float32 [R, I]."""

    def into(self, start: int, stop: int, out_RI: NDArray[np.float32]) -> None:
        """Put these values where they are wanted; raises as `values` does."""
        out_RI[...] = self.values(start, stop)

    def resting(self) -> DecodedRows | None:
        """The same with all that is stored for them in memory, where values cost little more than widening BF16."""
        return None

    @property
    def is_resting(self) -> bool:
        """Whether it is in memory, so that several threads may ask for values."""
        return False

    @property
    def fits_half(self) -> bool:
        """No: scales have any size."""
        return False

    def where(self, row: int) -> str:
        """Name a row in a message."""
        return f"tensor '{self.name}': row {self.first + row}"

    def cut(self, cut: Cut) -> Rows:
        """Some of the rows, or of those of the transpose."""
        return replace(self, first=self.first + cut.first, count=cut.count) if cut.is_run else taken(self, cut)

    def raw(self, start: int, stop: int) -> tuple[NDArray[Any], SourceDtype]:
        """The values: nothing narrower is known to hold them."""
        return self.values(start, stop), "F32"

    def refuse_bad(self, values_RI: NDArray[np.float32], start: int) -> None:
        """Refuse values of rows `start`.. that are no numbers.

        Raises:
            ExecutionError: names the first.

        """
        import numpy as np

        if not np.isfinite(values_RI).all():
            row, column = np.argwhere(~np.isfinite(values_RI))[0]
            raise ExecutionError(
                f"tensor '{self.name}': NaN or infinity at row {self.first + start + row}, column {column};"
                " expected finite weights"
            )


@dataclass(frozen=True, slots=True)
class ScaledRows(DecodedRows):
    """Rows of a weight of codes with scales.

    Attributes:
        codes: [O, bytes of a row].
        read: fills an array.
        decoding: makes the values.
        scales: all of them.
        checked: whether a value may be no number, and is refused.
        width: bits of a code.
        compiled: decodes several times as fast where it can; of scales that leave all numbers finite.
        held: codes that are in memory, and the row that is the first of them.

    """

    codes: TensorRef
    read: Read
    decoding: Decoding
    scales: NDArray[np.float32]
    checked: bool
    width: int
    compiled: Compiled | None = None
    held: tuple[int, NDArray[np.uint8]] | None = None

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Codes times their scales.

        Raises:
            ExecutionError: a value is NaN or too large; names it.

        """
        import numpy as np

        columns = self.codes.spec.shape[1] * 8 // self.width
        values_RI = np.empty((stop - start, columns), np.float32)
        self.into(start, stop, values_RI)
        return values_RI

    def into(self, start: int, stop: int, out_RI: NDArray[np.float32]) -> None:
        """Put these values where they are wanted; raises as `values` does."""
        import numpy as np

        begin, codes_RB = self.first + start, self.stored(start, stop)
        if self.compiled and self.compiled(codes_RB, self.scales, begin, out_RI):
            return
        with np.errstate(over="ignore", invalid="ignore"):
            out_RI[...] = self.decoding.decoded(codes_RB, self.scales, begin)
        if self.checked:
            self.refuse_bad(out_RI, start)

    def resting(self) -> ScaledRows | None:
        """The same with the codes in memory, where there is compiled code for them, or may be."""
        return replace(self, held=(self.first, self.stored(0, self.count))) if self.compiled else None

    @property
    def is_resting(self) -> bool:
        """Whether the codes are in memory."""
        return self.held is not None

    def stored(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Codes of rows `start`..`stop - 1`."""
        import numpy as np

        begin, end = self.first + start, self.first + stop
        if self.held is not None:
            first, codes_RB = self.held
            return codes_RB[begin - first : end - first]
        ref = self.codes.rows(begin, end)
        codes_RB = np.empty(ref.spec.shape, np.uint8)
        self.read(ref, codes_RB)
        return codes_RB


def refuse_scales(scales: NDArray[np.float32], name: str) -> None:
    """Refuse scales that are no numbers.

    Raises:
        ExecutionError: names the first.

    """
    import numpy as np

    if not np.isfinite(scales).all():
        at = tuple(np.argwhere(~np.isfinite(scales))[0].tolist())
        raise ExecutionError(f"tensor '{name}': scale {scales[at]} at {list(at)}; expected finite scales")
