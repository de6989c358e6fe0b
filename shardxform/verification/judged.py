"""Small floats and integers as they are stored, judged by reading them as every command would.

What a reader refuses is a defect of the checkpoint: a scale that is no number, a zero point out of range, a column in
no group. So is what it reads and no quantizer writes: scales below zero, or of zero over codes that are not.
"""

# S, T: rows and columns of blocks, O: output channels, I: input channels, G: groups of a row.

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from shardxform.errors import ExecutionError
from shardxform.formats.asymmetric import AsymmetricRows
from shardxform.formats.decoded import ScaledRows
from shardxform.formats.encoding import DECODE_TILE, Encoded, Opener, Read, Rows, Storage, row_tiles
from shardxform.formats.fp8 import Fp8
from shardxform.formats.int8 import Int8
from shardxform.formats.microscaling import Microscaled
from shardxform.verification.findings import Findings, Item

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardxform.base.tensors import TensorRef
    from shardxform.model.layout import Layout

__all__ = ["JudgedWeight", "StoredWeight", "judge_weight", "report_judged", "stored_weights"]

_ABOUT: Final = re.compile(r"tensor '([^']+)': (.*)", re.DOTALL)
_SMALLEST: Final = 2.0**-126  # normal float32: less is zero where denormals are flushed


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight to be read as it is stored; `name` is that of its values."""

    name: str
    storage: Storage

    @property
    def nbytes(self) -> int:
        """Bytes of its parts, but for codes that are only read where a scale is zero."""
        lazy = isinstance(self.storage.encoding, Fp8 | Int8 | Microscaled)
        return sum(ref.nbytes for role, ref in self.storage.parts if not (lazy and role == "values"))


@dataclass(frozen=True, slots=True)
class JudgedWeight:
    """What is wrong with a weight of that name: tensors, and what is said of them."""

    name: str
    faults: tuple[tuple[str, str], ...]


def stored_weights(tensors: Iterable[TensorRef]) -> Iterator[StoredWeight]:
    """Weights of a decoded checkpoint that are to be judged, each once."""
    seen: set[tuple[object, ...]] = set()
    for ref in tensors:
        for source in ref.sources if isinstance(ref, Encoded) else ():
            key = tuple(part.ranges for _, part in source.parts)
            if key not in seen:
                seen.add(key)
                yield StoredWeight(ref.name, source._replace(cut=None))


def judge_weight(weight: StoredWeight, read: Read) -> JudgedWeight:
    """Read a weight, less its codes where these are read row by row, and say what is wrong with it."""
    try:
        rows = Opener(read).open(weight.storage)
        return JudgedWeight(weight.name, tuple(_odd(rows, weight.storage)))
    except ExecutionError as e:
        about = _ABOUT.fullmatch(str(e))
        return JudgedWeight(weight.name, ((about[1], about[2]) if about else (weight.storage.name, str(e)),))


def report_judged(found: Iterable[JudgedWeight], layout: Layout | None, findings: Findings) -> None:
    """Report what was found, unless the tensor is known to be no sound one."""
    items: list[Item] = []
    known = {problem.where for problem in findings.problems} | findings.named
    faults = dict.fromkeys((judged.name, *fault) for judged in found for fault in judged.faults)
    for weight, name, text in faults:
        place = layout.places.get(weight) if layout else None
        if name in known:
            continue
        if place:
            items.append(Item("scale", name, place._replace(companion=name.rpartition(".")[2]), text))
        else:
            findings.problem("scale", name, text)
    findings.items(items, layout.num_experts if layout else 0)


def _odd(rows: Rows, storage: Storage) -> Iterator[tuple[str, str]]:
    """What no quantizer writes, by the tensor that has it."""
    import numpy as np

    if isinstance(rows, ScaledRows) and isinstance(rows.decoding, Fp8 | Int8 | Microscaled):
        scales, signed = rows.scales, True
    elif isinstance(rows, AsymmetricRows):
        scales, signed = rows.scale_OG, rows.zero_OG is not None
    else:
        return
    name = dict(storage.parts)["scales"].name
    negative = scales < 0
    if signed and negative.any():
        yield name, _told(negative, scales, "scales are below zero")
    zero = np.abs(scales) < (_SMALLEST if _is_float(storage) else 0)
    if zero.any() and (count := _hidden(rows, zero)):
        yield name, _told(zero, scales, f"scales are zero or next to it, over {count} codes that are not")


def _is_float(storage: Storage) -> bool:
    """Whether scales are floats, of which zero is one: powers of two are not."""
    return dict(storage.parts)["scales"].spec.dtype not in ("U8", "F8_E8M0")


def _told(at: NDArray[np.bool_], scales: NDArray[np.float32], what: str) -> str:
    from shardxform.formats.packing import first_of

    first = first_of(at)
    return f"{int(at.sum())} of {scales.size} {what}, the first at {list(first)}: {scales[first]:.6g}"


def _hidden(rows: ScaledRows | AsymmetricRows, zero: NDArray[np.bool_]) -> int:
    """Codes that stand for more than nothing, under scales that do."""
    import numpy as np

    count = 0
    columns = rows.codes.spec.shape[1] * 8 // rows.width if isinstance(rows, ScaledRows) else rows.codes_OI.shape[1]
    for start, stop in row_tiles(rows.count, columns, DECODE_TILE):
        if isinstance(rows, ScaledRows):
            ones: Any = np.ones_like(rows.scales)
            codes_RI, hidden_RI = (
                rows.decoding.decoded(rows.stored(start, stop), each, start) != 0
                for each in (ones, zero.astype(np.float32))
            )
            count += int(np.count_nonzero(codes_RI & hidden_RI))
        else:
            middle = rows.middle if rows.zero_OG is None else rows.spread(rows.zero_OG[start:stop])
            count += int(np.count_nonzero((rows.codes_OI[start:stop] != middle) & rows.spread(zero[start:stop])))
    return count
