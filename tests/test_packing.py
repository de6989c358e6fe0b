"""Codes, words and values: literals, and slow versions that go bit by bit."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardxform.errors import SchemeError
from shardxform.formats import packing

LAYOUTS = ("gptq", "row")


def codes_of(rows: int, columns: int, bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)


def bit_by_bit(codes: np.ndarray, bits: int) -> list[list[int]]:
    """Signed words [O][W], built by setting one bit at a time."""
    per_word = 32 // bits
    result = []
    for row in codes.tolist():
        words = []
        for i in range(len(row) // per_word):
            word = 0
            for k in range(per_word):
                for bit in range(bits):
                    if (row[per_word * i + k] >> bit) & 1:
                        word |= 1 << (bits * k + bit)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        result.append(words)
    return result


def test_four_bit_codes_fill_a_word_from_the_lowest_nibble() -> None:
    codes = np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.uint8)
    assert packing.pack(codes, 4, "row").tolist() == [[0x87654321 - (1 << 32)]]


def test_eight_bit_codes_fill_a_word_from_the_lowest_byte() -> None:
    codes = np.array([[0x01, 0x02, 0x03, 0x84]], np.uint8)
    assert packing.pack(codes, 8, "row").tolist() == [[0x84030201 - (1 << 32)]]


def test_gptq_words_run_along_the_output_channels() -> None:
    codes = np.zeros((2, 16), np.uint8)
    codes[1, 8] = 5  # output channel 1, input channel 8: lowest nibble of word 1 of column 1
    assert packing.pack(codes, 4, "gptq").tolist() == [[0, 0], [0, 5]]


@pytest.mark.parametrize("bits", [4, 8])
def test_words_equal_those_built_bit_by_bit(bits: int) -> None:
    codes = codes_of(5, 96, bits)
    assert packing.pack(codes, bits, "row").tolist() == bit_by_bit(codes, bits)
    assert packing.pack(codes, bits, "gptq").T.tolist() == bit_by_bit(codes, bits)


@given(
    st.integers(0, 9),
    st.integers(0, 5),
    st.sampled_from([4, 8]),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=60)
def test_unpacking_undoes_packing(rows: int, blocks: int, bits: int, layout: str, seed: int) -> None:
    codes = codes_of(rows, 32 * blocks, bits, seed)
    words = packing.pack(codes, bits, layout)
    assert words.dtype == np.int32
    assert words.shape == ((bits * blocks, rows) if layout == "gptq" else (rows, bits * blocks))
    np.testing.assert_array_equal(packing.unpack(words, bits, layout), codes)


def test_packing_leaves_the_codes_alone() -> None:
    codes = codes_of(3, 32, 4)
    before = codes.copy()
    packing.pack(codes, 4, "row")
    np.testing.assert_array_equal(codes, before)


def test_packing_takes_views_that_are_not_contiguous() -> None:
    codes = codes_of(64, 6, 8).T
    assert packing.pack(codes, 8, "row").tolist() == bit_by_bit(codes, 8)


def test_zero_points_are_stored_one_too_low() -> None:
    assert packing.qzeros(2, 16, 4).tolist() == [[0x77777777, 0x77777777]] * 2
    assert packing.qzeros(1, 8, 8).tolist() == [[0x7F7F7F7F, 0x7F7F7F7F]]
    assert packing.qzeros(1, 8, 8).dtype == np.int32


def test_what_does_not_fill_words_is_refused() -> None:
    with pytest.raises(SchemeError, match="multiple of 8 channels, found 12"):
        packing.pack(np.zeros((1, 12), np.uint8), 4, "row")
    with pytest.raises(SchemeError, match="multiple of 4 channels, found 6"):
        packing.qzeros(1, 6, 8)
    with pytest.raises(SchemeError, match="expected 4 or 8, found 3"):
        packing.unpack(np.zeros((1, 1), np.int32), 3, "row")


def test_values_of_codes() -> None:
    codes = np.array([[0, 8, 9, 15] * 16], np.uint8)
    scales = np.array([[0.5, -2.0]], np.float16)
    values = packing.dequantize(codes, scales, 4, 32)
    assert values[0, :4].tolist() == [-4.0, 0.0, 0.5, 3.5]
    assert values[0, 32:36].tolist() == [16.0, 0.0, -2.0, -14.0]
    np.testing.assert_array_equal(packing.dequantize(codes, scales.view(np.uint16), 4, 32), values)


def test_values_with_a_short_last_group_and_with_one_group() -> None:
    codes = np.full((1, 160), 9, np.uint8)
    values = packing.dequantize(codes, np.array([[1.0, 3.0]], np.float16), 4, 128)
    assert values[0, [0, 127, 128, 159]].tolist() == [1.0, 1.0, 3.0, 3.0]
    values = packing.dequantize(np.full((2, 96), 129, np.uint8), np.array([[1.0], [3.0]], np.float16), 8, -1)
    assert values[:, [0, 95]].tolist() == [[1.0, 1.0], [3.0, 3.0]]


def nearest_bf16(value: float) -> int:
    """Bits of the BF16 nearest to an exact float32 value, ties to even, by comparing distances."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0] >> 16
    candidates = [bits, bits + 1]  # towards zero, and the next one away from it
    distances = [abs(struct.unpack("<f", struct.pack("<I", c << 16))[0] - value) for c in candidates]
    if distances[0] == distances[1]:
        return next(c for c in candidates if c % 2 == 0)
    return candidates[0] if distances[0] < distances[1] else candidates[1]


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40))
@settings(deadline=None, max_examples=100)
def test_bf16_rounding_picks_the_nearest(values: list[float]) -> None:
    found = packing.bf16_bits_of(np.array(values, np.float32))
    assert found.tolist() == [nearest_bf16(v) for v in values]


def test_bf16_rounding_of_ties_and_signed_zeros() -> None:
    values = np.array([1.0 + 2**-8, 1.0 + 3 * 2**-8, -(1.0 + 2**-8), -0.0], np.float32)
    assert packing.bf16_bits_of(values).tolist() == [0x3F80, 0x3F82, 0xBF80, 0x8000]


def test_bf16_values_of_codes_are_the_rounded_float32_values() -> None:
    codes = codes_of(4, 64, 8)
    scales = np.random.default_rng(1).standard_normal((4, 2)).astype(np.float16)
    found = packing.bf16_bits_of(packing.dequantize(codes, scales, 8, 32))
    for o in range(4):
        for i in range(64):
            exact = float(scales[o, i // 32]) * (int(codes[o, i]) - 128)
            assert int(found[o, i]) == nearest_bf16(exact)


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (130, 257), (0, 4)])
@pytest.mark.parametrize("dtype", [np.int32, np.uint16])
def test_one_layout_becomes_the_other_by_a_blocked_transpose(shape: tuple[int, int], dtype: type) -> None:
    source = np.arange(shape[0] * shape[1]).reshape(shape).astype(dtype)
    target = np.full(shape[::-1], 7, dtype)
    packing.transpose_into(source, target)
    np.testing.assert_array_equal(target, source.T)


@pytest.mark.parametrize("bits", [4, 8])
def test_converted_words_unpack_to_the_same_codes(bits: int) -> None:
    codes = codes_of(40, 64, bits)
    row = packing.pack(codes, bits, "row")
    gptq = np.empty(row.shape[::-1], np.int32)
    packing.transpose_into(row, gptq)
    np.testing.assert_array_equal(packing.unpack(gptq, bits, "gptq"), codes)


def test_a_transpose_into_the_wrong_shape_or_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected int32 \[3, 2\], found int32 \[2, 3\]"):
        packing.transpose_into(np.zeros((2, 3), np.int32), np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match="found int64"):
        packing.transpose_into(np.zeros((2, 3), np.int32), np.zeros((3, 2), np.int64))
