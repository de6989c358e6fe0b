"""Hypothesis strategies for the nouns of the package, and the one place that configures hypothesis."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import TypeVar

import pytest
from build import Raw, random_tensor
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from shardxform.base.tensors import BITS, TensorSpec

_T = TypeVar("_T")
ALL = os.environ.get("SHARDXFORM_TESTS") == "all"  # as a nightly run sets it
by_night = pytest.mark.skipif(not ALL, reason="by night")
"""A mark of tests that take long and that others say the most of."""
settings.register_profile(
    "shardxform",
    deadline=None,
    max_examples=200 if ALL else 25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("shardxform")


def some(count: int) -> int:
    """Examples of a test whose examples take long: a few, or all where SHARDXFORM_TESTS=all."""
    return count if ALL else max(20, count // 4)


def picked(cases: Iterable[_T], every: int) -> list[_T]:
    """Cases of a test that takes long: the first and every so manieth after it, or all where SHARDXFORM_TESTS=all."""
    return list(cases) if ALL else list(cases)[::every]


# What torch and the reference library's torch module can both save, one element per item.
_COMMON = "BOOL U8 I8 U16 I16 U32 I32 U64 I64 F16 BF16 F32 F64 C64".split()  # noqa: SIM905
TORCH_DTYPES = (*_COMMON, "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0")

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
"""Any name a header can hold: control characters, quotes, astral planes, the empty name."""

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def specs(dtypes: tuple[str, ...] = tuple(BITS)) -> st.SearchStrategy[TensorSpec]:
    """Any spec whose data is a whole number of bytes."""
    return st.builds(TensorSpec, names, st.sampled_from(dtypes), shapes).filter(
        lambda spec: math.prod(spec.shape) * BITS[spec.dtype] % 8 == 0
    )


def spec_lists(dtypes: tuple[str, ...] = tuple(BITS)) -> st.SearchStrategy[list[TensorSpec]]:
    """Specs of one shard: names are unique."""
    return st.lists(specs(dtypes), max_size=8, unique_by=lambda spec: spec.name)


def filled(spec: TensorSpec) -> Raw:
    """A tensor of that spec with bytes that depend on its name."""
    if spec.dtype.startswith(("F4", "F6")):
        return Raw(spec.dtype, spec.shape, random_tensor(spec.name, "U8", (spec.nbytes,)).data)
    return random_tensor(spec.name, spec.dtype, spec.shape)


@st.composite
def keeps(draw: st.DrawFn, count: int) -> list[int]:
    """A keep list: distinct ids below `count`, ascending, at least one."""
    return sorted(draw(st.sets(st.integers(0, count - 1), min_size=1)))


selections = st.lists(st.integers(0, 5), max_size=8)
"""Rows of a tensor with six, repeats and any order included."""


@st.composite
def mutations(draw: st.DrawFn, text: bytes) -> bytes:
    """`text` after a few edits: bytes flipped, inserted, deleted, slices doubled, numbers and words replaced."""
    out = bytearray(text)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(out)))
        kind = draw(st.sampled_from(["flip", "insert", "delete", "double", "number"]))
        if kind == "flip" and at < len(out):
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            out[at:at] = draw(st.sampled_from(_FRAGMENTS))
        elif kind == "delete":
            del out[at : at + draw(st.integers(1, 4))]
        elif kind == "double":
            out[at:at] = out[at : at + draw(st.integers(1, 40))]
        elif digits := [i for i, byte in enumerate(out) if 48 <= byte <= 57]:
            at = draw(st.sampled_from(digits))
            out[at : at + 1] = draw(st.sampled_from(_NUMBERS))
    return bytes(out)


_NUMBERS = [b"0", b"1", b"2", b"3", b"7", b"-0", b"-1", b"00", b"1.0", b"1e0", b"1e999", b"true", b"null", b'"1"']
_NUMBERS += [b"18446744073709551615", b"18446744073709551616", b"36893488147419103232", b"[]", b"9" * 30]
_FRAGMENTS = [
    *(bytes([b]) for b in b' \n\t\0\x7f\x80\xff"\\{}[]:,0-'),
    b"\\u0000",
    b"\\ud800",
    b"\\ud83d\\ude00",
    b"NaN",
]
_FRAGMENTS += [b'"a":1,', b'"__metadata__":{},', b"\xef\xbb\xbf", b"\xed\xa0\x80", "\u00e9".encode(), b"[" * 200]
