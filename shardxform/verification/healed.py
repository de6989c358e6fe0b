"""Verification of healed weights: none is farther from the source's than the steps of healing can have taken it.

A step moves a weight by a part `lr` of the root mean square of its matrix, and that part falls to zero linearly: after
`iters` steps it is within lr (iters + 1) / 2 of the root mean square of where it was. What is written in 16 bits is
something within that, rounded; what is written in small floats has the scales that something within that has, and the
codes. A matrix that has the source's very bytes was not moved.
"""

# O: output channels, I: input channels, R: a run of rows.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from shardxform.formats.asymmetric import AsymmetricRows
from shardxform.formats.decoded import ScaledRows
from shardxform.formats.encoding import DECODE_TILE, ROUNDED, Nearest, Opener, Read, Rows, Storage
from shardxform.formats.packing import bf16_bits_of, float32_of, half_bits_of
from shardxform.formats.plain import Plain
from shardxform.verification.findings import Findings
from shardxform.verification.wanted import HealedWeight

__all__ = ["HealedTally", "examine_healed", "near_of", "report_healed"]

_SLACK: Final = 1e-3  # of the root mean square, which is summed in another order
_ROUNDED: Final = 2.0**-16  # of a weight, at every step: its significand has 16 bits on the way, or 24

Values = NDArray[np.float32]


@dataclass(slots=True)
class HealedTally:
    """What one matrix showed.

    Attributes:
        weights: how many.
        far, scales: weights that are farther than they can be, and scales that nothing within reach has.
        first_far, first_scale: a sentence on the first of each.

    """

    item: HealedWeight
    weights: int = 0
    far: int = 0
    scales: int = 0
    first_far: str = ""
    first_scale: str = ""


def examine_healed(item: HealedWeight, read_out: Read, read_source: Read) -> HealedTally:
    """Hold a healed matrix against that of the source."""
    out, source = Opener(read_out, checked=False), Opener(read_source, checked=False)
    tally = HealedTally(item, math.prod(item.source.whole))
    if _same_bytes(item, read_out, read_source):
        return tally
    energy = sum(_energy(each, source) for each in item.beside)
    count = sum(math.prod(each.whole) for each in item.beside)
    reach = item.reach * (1 + _SLACK) * math.sqrt(energy / count)

    def within(values_RI: Values) -> tuple[Values, Values]:
        """What healing can have made of values: from, and to."""
        far_RI = np.float32(reach) + np.float32(item.iters * _ROUNDED) * (np.abs(values_RI) + np.float32(reach))
        return values_RI - far_RI, values_RI + far_RI

    if isinstance(item.stored.encoding, Plain):
        found, before = out.open(item.stored), source.open(item.source)
        rounded = _ROUNDERS[item.stored.encoding.dtype]
        for start, stop in _tiles(item.stored):
            ends = [rounded(end) for end in within(_values(before, start, stop, item.source))]
            _compare(tally, found.values(start, stop), ends, start)
        return tally
    found, before = out.open(_whole(item.stored)), source.open(_whole(item.source))
    assert isinstance(found, ScaledRows | AsymmetricRows)
    encoding = cast(Nearest, item.stored.encoding)
    _compare_scales(tally, encoding, found.scales, _maxima(item, before, within), _whole_scale(item, read_out))
    for start, stop in _tiles(item.stored):
        ends = []
        for end in within(_values(before, start, stop, item.source)):
            codes = encoding.codes(end, found.scales, start)
            ends.append(encoding.decoded(codes, found.scales, start))
        _compare(tally, found.values(start, stop), ends, start)
    return tally


def report_healed(tallies: Sequence[HealedTally], findings: Findings) -> None:
    """Add a problem for every matrix that healing does not explain."""
    for tally in tallies:
        name = tally.item.name
        if tally.scales:
            text = f"{tally.scales} scales are those of nothing that healing makes of the source's weights"
            findings.problem("healed-scale", name, f"{text}, the first at {tally.first_scale}")
        elif tally.far:
            text = f"{tally.far} of {tally.weights} weights are farther from the source's than healing moves them"
            findings.problem("healed-reach", name, f"{text}, the first at {tally.first_far}")


def near_of(tallies: Sequence[HealedTally]) -> frozenset[str]:
    """Tensors of the output all of whose matrices healing explains; the scale of a whole tensor is none of them."""
    names = {True: set[str](), False: set[str]()}
    for tally in tallies:
        names[not (tally.far or tally.scales)].update(
            ref.name for role, ref in tally.item.stored.parts if role in ROUNDED
        )
    return frozenset(names[True] - names[False])


def _same_bytes(item: HealedWeight, read_out: Read, read_source: Read) -> bool:
    if item.source.encoding != item.stored.encoding:
        return False
    for (_, one), (_, other) in zip(item.source.parts, item.stored.parts, strict=True):
        ours, theirs = np.empty(other.nbytes, np.uint8), np.empty(one.nbytes, np.uint8)
        read_out(other, ours)
        read_source(one, theirs)
        if not np.array_equal(ours, theirs):
            return False
    return True


def _whole(storage: Storage) -> Storage:
    return storage._replace(cut=None)


def _tiles(storage: Storage) -> Iterator[tuple[int, int]]:
    """Runs of rows that hold whole blocks."""
    rows, columns = storage.whole
    block = getattr(storage.encoding, "block", (None,))[0] or 1
    step = max(1, DECODE_TILE // max(columns, 1) // block) * block
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _values(rows: Rows, start: int, stop: int, storage: Storage) -> Values:
    """Values that healing began with: those of small floats in bfloat16."""
    values_RI = rows.values(start, stop)
    return values_RI if isinstance(storage.encoding, Plain) else _bf16(values_RI)


def _energy(storage: Storage, source: Opener) -> float:
    """Sum of the squares."""
    rows = source.open(_whole(storage))
    parts = (_values(rows, start, stop, storage).reshape(-1) for start, stop in _tiles(storage))
    return math.fsum(float(np.dot(part, part)) for part in parts)


def _bf16(values: Values) -> Values:
    return float32_of(bf16_bits_of(values), "BF16")


_ROUNDERS: Final[dict[str, Callable[[Values], Values]]] = {
    "BF16": _bf16,
    "F16": lambda values: float32_of(half_bits_of(values), "F16"),
    "F32": lambda values: values,
}


def _whole_scale(item: HealedWeight, read: Read) -> Values | None:
    ref = dict(item.stored.parts).get("whole")
    if ref is None:
        return None
    whole = np.empty((), np.float32)
    read(ref, whole)
    return whole


def _maxima(item: HealedWeight, rows: Rows, within: Callable[[Values], tuple[Values, Values]]) -> tuple[Values, Values]:
    """Largest magnitude under each scale, at least and at most."""
    encoding, least, most = cast(Nearest, item.stored.encoding), [], []
    for start, stop in _tiles(item.stored):
        low_RI, high_RI = within(np.abs(_values(rows, start, stop, item.source)))
        least.append(encoding.maxima(np.maximum(low_RI, 0)))
        most.append(encoding.maxima(high_RI))
    if getattr(encoding, "block", (1,))[0] is None:  # one scale for all rows
        return np.maximum.reduce(least), np.maximum.reduce(most)
    return np.concatenate(least), np.concatenate(most)


def _compare_scales(
    tally: HealedTally, encoding: Nearest, found: Values, maxima: tuple[Values, Values], whole: Values | None
) -> None:
    least, most = (encoding.scales(encoding.scale_bits(each, whole), whole) for each in maxima)
    empty = maxima[0] == 0  # what may be all zeros, whose scale is any
    wrong = ((found < least.reshape(found.shape)) & ~empty.reshape(found.shape)) | (found > most.reshape(found.shape))
    wrong &= ~(empty.reshape(found.shape) & (found == 1))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0].tolist())
        tally.scales = int(np.count_nonzero(wrong))
        tally.first_scale = f"{list(at)}: {found[at]:.6g}, expected {least[at]:.6g} to {most[at]:.6g}"


def _compare(tally: HealedTally, found_RI: Values, ends: Sequence[Values], start: int) -> None:
    low_RI, high_RI = ends
    far: NDArray[Any] = (found_RI < low_RI) | (found_RI > high_RI)  # a NaN is told by itself
    if not far.any():
        return
    if not tally.far:
        at = tuple(np.argwhere(far)[0].tolist())
        place = f"row {start + at[0]}, column {at[1]}"
        tally.first_far = f"{place}: {found_RI[at]:.6g}, expected {low_RI[at]:.6g} to {high_RI[at]:.6g}"
    tally.far += int(np.count_nonzero(far))
