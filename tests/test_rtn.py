"""Round-to-nearest: literals, a slow per-element reference, and the two backends against each other."""

from __future__ import annotations

import re
import shutil
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardxform.errors import SchemeError
from shardxform.formats import packing, rounding
from shardxform.formats.scheme import Grid

PACKAGE = Path(rounding.__file__).parents[1]
SMALLEST = 0x00A8  # float16 bits of 1e-5
BACKENDS = [
    "numpy",
    pytest.param("numba", marks=pytest.mark.skipif(not rounding.use_numba("auto"), reason="no numba")),
]
DTYPES = ("BF16", "F16", "F32")
GRID_32 = Grid(group_size=32)


@pytest.fixture(autouse=True, scope="module")
def small_tiles() -> Iterator[None]:
    """Let every test of the numpy backend cross tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "TILE_WEIGHTS", 1)
        yield


def half_bits(value: float) -> int:
    return struct.unpack("<H", struct.pack("<e", value))[0]


def half_value(bits: int) -> float:
    return struct.unpack("<e", struct.pack("<H", bits))[0]


def run(w: Any, grid: Grid = GRID_32, dtype: str = "F32", **options: Any) -> tuple[Any, Any, rounding.RtnStats]:
    """Codes [O, I], scale bits [O, G] and statistics, through the "row" layout unless told otherwise."""
    array = np.ascontiguousarray(w, np.float32) if dtype == "F32" else w
    out, stats = rounding.quantize(array, dtype, grid, layout=options.pop("layout", "row"), **options)
    scales = out.scales if out.layout == "row" else out.scales.T
    return packing.unpack(out.words, grid.bits, out.layout), scales, stats


def row_of(*values: float, columns: int = 32) -> np.ndarray:
    return np.array([list(values) + [0.0] * (columns - len(values))], np.float32)


def bf16(values: np.ndarray) -> np.ndarray:
    return packing.bf16_bits_of(np.asarray(values, np.float32))


# --- literals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_magnitude_becomes_minus_eight(backend: str) -> None:
    codes, scales, _ = run(row_of(8.0, -4.0, 0.5, 1.5, -1.5, 2.5, -8.0 + 1, 7.4), backend=backend)
    assert scales.tolist() == [[half_bits(-1.0)]]
    # 8 / -1 = -8; -4 -> 4; -0.5 -> 0; -1.5 -> -2; 1.5 -> 2; -2.5 -> -2 (ties to even); 7 -> 7; -7.4 -> -7
    assert codes[0, :9].tolist() == [0, 12, 8, 6, 10, 6, 15, 1, 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_larger_negative_side_gives_a_positive_scale_and_clips_the_other(backend: str) -> None:
    codes, scales, _ = run(row_of(-8.0, 7.9, 7.49, 1.0), backend=backend)
    assert scales.tolist() == [[half_bits(1.0)]]
    assert codes[0, :5].tolist() == [0, 15, 15, 9, 8]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_sides_give_a_negative_scale(backend: str) -> None:
    codes, scales, _ = run(row_of(-4.0, 4.0), backend=backend)
    assert scales.tolist() == [[half_bits(-0.5)]]
    assert codes[0, :3].tolist() == [15, 0, 8]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("w", "bits"),
    [
        (0.0, SMALLEST),
        (-0.0, SMALLEST),
        (1e-9, SMALLEST),  # rounds to a scale of -0.0, which is not negative
        (4e-5, 0x8000 | SMALLEST),  # 5e-6 is a float16, too small but negative
        (-4e-5, SMALLEST),
        (-8 * half_value(SMALLEST + 1), SMALLEST + 1),
        (8 * half_value(SMALLEST), 0x8000 | SMALLEST),
    ],
)
def test_small_scales_are_clamped_after_rounding(w: float, bits: int, backend: str) -> None:
    _, scales, _ = run(row_of(w), backend=backend)
    assert scales.tolist() == [[bits]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_and_scales_of_both_layouts(backend: str) -> None:
    w = np.zeros((2, 64), np.float32)
    w[0, 0], w[1, 40] = -8.0, 16.0
    gptq, _ = rounding.quantize(w, "F32", Grid(group_size=32), layout="gptq", backend=backend)
    row, _ = rounding.quantize(w, "F32", Grid(group_size=32), layout="row", backend=backend)
    words = np.full((2, 8), 0x88888888 - (1 << 32))
    words[0, 0] += -8
    words[1, 5] += -8
    assert row.words.tolist() == words.tolist()
    assert gptq.words.tolist() == words.T.tolist()
    assert row.scales.tolist() == [[half_bits(1.0), SMALLEST], [SMALLEST, half_bits(-2.0)]]
    assert gptq.scales.tolist() == row.scales.T.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_eight_bits_and_whole_rows(backend: str) -> None:
    codes, scales, _ = run(row_of(-128.0, 127.0, 128.0, 1.4, columns=96), Grid(bits=8, group_size=-1), backend=backend)
    assert scales.tolist() == [[half_bits(-1.0)]]
    assert codes[0, :5].tolist() == [255, 1, 0, 127, 128]


def test_a_short_last_group_has_its_own_scale() -> None:
    w = np.zeros((1, 160), np.float32)
    w[0, 127], w[0, 159] = -8.0, -16.0
    _, scales, stats = run(w, Grid())
    assert scales.tolist() == [[half_bits(1.0), half_bits(2.0)]]
    assert stats.groups == 2


# --- the rule, element by element -----------------------------------------------------------------


def slow_rtn(w: np.ndarray, bits: int, span: int) -> tuple[list[list[int]], list[list[int]]]:
    zero = 1 << (bits - 1)
    all_codes, all_scales = [], []
    for row in w.tolist():
        codes, scales = [], []
        for start in range(0, len(row), span):
            group = row[start : start + span]
            low, high = min([*group, 0.0]), max([*group, 0.0])
            m = -low if high < -low else -max(-low, high)
            scale = half_value(half_bits(float(np.float32(m) / np.float32(zero))))
            limit = half_value(SMALLEST)
            scale = min(scale, -limit) if scale < 0 else max(scale, limit)
            scales.append(half_bits(scale))
            for x in group:
                ratio = float(np.float32(x) / np.float32(scale))
                codes.append(max(-zero, min(zero - 1, round(ratio))) + zero)  # Python rounds half to even
        all_codes.append(codes)
        all_scales.append(scales)
    return all_codes, all_scales


def nasty(rows: int, columns: int, seed: int) -> np.ndarray:
    """Random weights with rows of very different size, outliers, ties, zeros of both signs and subnormals."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-40, 10, (rows, 1)))
    w[rng.random(w.shape) < 0.02] *= 30
    w[rng.random(w.shape) < 0.05] = 0.0
    w[rng.random(w.shape) < 0.05] = -0.0
    w[rng.random(w.shape) < 0.01] = 1e-40
    ties = rng.random(rows) < 0.3  # exact halves of a power of two
    w[ties] = rng.integers(-16, 17, (int(ties.sum()), columns)) / 2.0
    w[rng.random(rows) < 0.1] = 0.0
    return w.astype(np.float32)


def in_dtype(w: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Raw bits of ``w`` in ``dtype``, and the float32 values they stand for."""
    if dtype == "BF16":
        bits = bf16(w)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        half = np.clip(w, -60000, 60000).astype(np.float16)
        return half, half.astype(np.float32)
    return w, w


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (8, 64), (8, -1)])
def test_codes_and_scales_equal_those_of_the_rule(bits: int, group_size: int, dtype: str, backend: str) -> None:
    raw, values = in_dtype(nasty(40, 160, 3), dtype)
    codes, scales, stats = run(raw, Grid(bits=bits, group_size=group_size, scale_grid="fp16"), dtype, backend=backend)
    slow_codes, slow_scales = slow_rtn(values, bits, 160 if group_size == -1 else group_size)
    assert stats.ok
    assert scales.tolist() == slow_scales
    assert codes.tolist() == slow_codes


def test_float16_may_be_given_as_bits() -> None:
    half = nasty(3, 64, 5).astype(np.float16)
    a, _ = rounding.quantize(half, "F16", Grid(), layout="row")
    b, _ = rounding.quantize(half.view(np.uint16), "F16", Grid(), layout="row")
    np.testing.assert_array_equal(a.words, b.words)


# --- the backends give the same bits --------------------------------------------------------------


@given(
    rows=st.integers(0, 70),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["gptq", "row"]),
    grid=st.builds(
        Grid,
        bits=st.sampled_from([4, 8]),
        group_size=st.sampled_from([128, 64, 32, -1]),
        scale_grid=st.sampled_from(["fp16", "bf16"]),
        search=st.booleans(),
    ),
)
@settings(deadline=None, max_examples=200)
def test_numpy_and_numba_agree_to_the_bit(
    rows: int, blocks: int, seed: int, dtype: str, layout: str, grid: Grid
) -> None:
    pytest.importorskip("numba")
    raw, _ = in_dtype(nasty(rows, 32 * blocks, seed), dtype)
    a, a_stats = rounding.quantize(raw, dtype, grid, layout=layout, backend="numpy")
    b, b_stats = rounding.quantize(raw, dtype, grid, layout=layout, backend="numba")
    np.testing.assert_array_equal(a.scales, b.scales)
    np.testing.assert_array_equal(a.words, b.words)
    assert a_stats == b_stats
    assert a_stats.ok


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [32, 128, 224, 512])
def test_the_backends_add_up_squared_errors_in_one_order(columns: int, bits: int) -> None:
    """Which candidate wins may hang on the last bit of these sums."""
    kernels = pytest.importorskip("shardxform.formats.kernels")
    grid, lanes, candidates = Grid(bits=bits, group_size=-1), kernels.LANES, 7
    rng = np.random.default_rng(columns)
    w_SP = rng.standard_normal((columns, lanes)).astype(np.float32)
    scales = (rng.uniform(0.5, 1.0, (candidates, lanes)) / grid.zero_code).astype(np.float32)
    steps = np.float32(1) / scales
    total, acc = np.zeros((candidates, lanes)), np.zeros((candidates, lanes), np.float32)
    chunk = np.zeros((kernels.CHUNK, lanes), np.float32)
    for start in range(0, columns, kernels.CHUNK):
        part = w_SP[start : start + kernels.CHUNK]
        chunk[: len(part)] = part
        kernels._squared_errors(chunk, len(part), (scales, steps, acc, total), grid.zero_code)
    for c in range(candidates):
        expected = rounding._squared_error(w_SP, scales[c], steps[c] if c else None, grid)
        np.testing.assert_array_equal(total[c], expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_backends_agree_on_every_finite_16_bit_pattern(dtype: str) -> None:
    pytest.importorskip("numba")
    bits = np.arange(65536, dtype=np.uint16)
    bits = bits[(bits & 0x7FFF) < (0x4900 if dtype == "BF16" else 0x7C00)]  # BF16: below 2^19, scales fit float16
    bits = np.random.default_rng(0).permutation(np.resize(bits, -(-bits.size // 64) * 64)).reshape(-1, 64)
    for group_size in (32, 64):
        results = [run(bits, Grid(group_size=group_size), dtype, backend=b) for b in ("numpy", "numba")]
        np.testing.assert_array_equal(results[0][0], results[1][0])
        np.testing.assert_array_equal(results[0][1], results[1][1])
        assert results[0][2] == results[1][2]
        assert results[0][2].ok


def test_every_float16_scale_is_rounded_alike_around_its_ties() -> None:
    pytest.importorskip("numba")
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = ((halves[1:] + halves[:-1]) / 2).astype(np.float32)
    scales = np.concatenate([np.nextafter(middles, np.float32(0)), middles, np.nextafter(middles, np.float32(np.inf))])
    for scale_grid, beyond in (("fp16", 65520), ("bf16", 65408)):
        fitting = scales[scales < beyond]
        w = np.zeros((fitting.size, 32), np.float32)
        w[:, 7] = fitting * np.float32(-8)
        grid = Grid(group_size=32, scale_grid=scale_grid)
        a, b = (run(w, grid, backend=backend) for backend in ("numpy", "numba"))
        assert a[2].ok
        np.testing.assert_array_equal(a[1], b[1])
        np.testing.assert_array_equal(a[0], b[0])


# --- scales on the bf16 grid ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("search", [False, True])
def test_bf16_scales_are_exact_in_both_formats(search: bool, backend: str) -> None:
    w = nasty(200, 128, 11)
    codes, scales, stats = run(w, Grid(scale_grid="bf16", search=search), backend=backend)
    values = scales.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal((bf16(values).astype(np.uint32) << 16).view(np.float32), values)
    assert np.abs(values).min() == np.float32(half_value(SMALLEST))
    assert stats.ok
    # The codes were chosen with the rounded scale: nearest to it, wherever nothing was clipped.
    error = np.abs(w - packing.dequantize(codes, scales, 4, 128))
    inside = (codes > 0) & (codes < 15)
    assert (error <= np.abs(values) * np.float32(0.5001))[inside].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_scales_round_to_nearest_even(backend: str) -> None:
    scales = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]
    w = np.concatenate([row_of(-8 * s) for s in scales])
    _, found, _ = run(w, Grid(group_size=32, scale_grid="bf16"), backend=backend)
    assert found.view(np.float16).ravel().tolist() == [1.0, 1 + 4 * 2**-8, 1 + 2 * 2**-8]


# --- the scale search -----------------------------------------------------------------------------


def squared_errors(w: np.ndarray, codes: np.ndarray, scales: np.ndarray, grid: Grid) -> np.ndarray:
    """Per group [O, G], exact enough: float64 of float32 weights."""
    values = packing.dequantize(codes, scales, grid.bits, grid.group_size).astype(np.float64)
    return ((w - values) ** 2).reshape(*scales.shape, -1).sum(axis=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (8, 128), (4, -1)])
def test_the_search_is_never_worse_and_on_gaussian_weights_better(bits: int, group_size: int, backend: str) -> None:
    w = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    plain = Grid(bits=bits, group_size=group_size)
    searched = Grid(bits=bits, group_size=group_size, search=True)
    before = squared_errors(w, *run(w, plain, backend=backend)[:2], plain)
    after = squared_errors(w, *run(w, searched, backend=backend)[:2], searched)
    assert (after <= before).all()
    assert after.sum() < 0.95 * before.sum()


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.sampled_from([128, 32]))
@settings(deadline=None, max_examples=30)
def test_the_search_is_never_worse_on_nasty_weights(seed: int, bits: int, group_size: int) -> None:
    w = nasty(16, 128, seed)
    plain, searched = (Grid(bits=bits, group_size=group_size, search=s) for s in (False, True))
    before = squared_errors(w, *run(w, plain)[:2], plain)
    after = squared_errors(w, *run(w, searched)[:2], searched)
    assert (after <= before).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_search_finds_the_best_of_its_candidates(bits: int, backend: str) -> None:
    w = np.random.default_rng(2).standard_normal((8, 64)).astype(np.float32)
    zero = 1 << (bits - 1)
    codes, scales, _ = run(w, Grid(bits=bits, group_size=64, scale_grid="fp16", search=True), backend=backend)
    top, step, unit = {4: (592, 7, 512), 8: (1180, 6, 1024)}[bits]
    for o in range(8):
        magnitude = float(np.abs(w[o]).max()) / zero
        candidates = [magnitude] + [magnitude * (top - step * j) / unit for j in range(30)]
        errors = []
        for scale in [half_value(half_bits(s * c)) for c in candidates for s in (1, -1)]:
            q = np.clip(np.rint(w[o].astype(np.float64) / scale), -zero, zero - 1)
            errors.append(float(((w[o] - q * scale) ** 2).sum()))
        values = packing.dequantize(codes[o : o + 1], scales[o : o + 1], bits, 64)
        assert float(((w[o] - values.astype(np.float64)) ** 2).sum()) == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_lie_on_the_grid_keep_their_scale_under_the_search(backend: str) -> None:
    q = np.random.default_rng(3).integers(-8, 8, (20, 128))
    q[:, 5] = -8
    w = (q * np.float32(0.0371094)).astype(np.float16).astype(np.float32)
    plain, searched = (run(w, Grid(search=s), backend=backend) for s in (False, True))
    np.testing.assert_array_equal(plain[1], searched[1])
    np.testing.assert_array_equal(plain[0], searched[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_groups_keep_the_smallest_scale_under_the_search(backend: str) -> None:
    codes, scales, stats = run(np.zeros((3, 64), np.float32), Grid(group_size=32, search=True), backend=backend)
    assert (scales == SMALLEST).all()
    assert (codes == 8).all()
    assert stats.zero_groups == stats.groups


def test_search_factors_are_exact_and_surround_one() -> None:
    for bits in (4, 8):
        factors = rounding.search_factors(bits)
        assert factors.shape == (30,)
        assert (factors * 1024 == np.rint(factors * 1024)).all()
        assert factors[0] > 1 > factors[-1]
        assert (np.diff(factors) < 0).all()


# --- what is reported -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(("dtype", "pattern"), [("BF16", 0x7F80), ("BF16", 0xFFC1), ("F16", 0xFC00), ("F16", 0x7E01)])
def test_the_first_nonfinite_weight_is_reported(dtype: str, pattern: int, search: bool, backend: str) -> None:
    raw, _ = in_dtype(nasty(70, 96, 4), dtype)
    raw = raw.view(np.uint16).copy()
    raw[41, 70], raw[41, 90], raw[66, 3] = pattern, 0x7FFF, pattern
    _, _, stats = run(raw, Grid(group_size=64, search=search), dtype, backend=backend)
    assert stats.nonfinite == (41, 70)
    assert not stats.ok
    assert stats.overflow_row is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_nonfinite_float32_is_reported(value: float, backend: str) -> None:
    w = np.ones((3, 32), np.float32)
    w[2, 31] = value
    assert run(w, backend=backend)[2].nonfinite == (2, 31)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("scale_grid", "first_beyond", "last_within"), [("fp16", 65520.0, 65504.0), ("bf16", 65408.0, 65280.0)]
)
def test_scales_beyond_float16_are_reported(
    scale_grid: Any, first_beyond: float, last_within: float, sign: int, backend: str
) -> None:
    grid = Grid(group_size=32, scale_grid=scale_grid)
    below = float(np.nextafter(np.float32(first_beyond), np.float32(0)))
    _, scales, stats = run(row_of(sign * 8 * below), grid, backend=backend)
    assert stats.ok
    assert scales.tolist() == [[half_bits(-sign * last_within)]]
    gap = np.zeros((35, 32), np.float32)
    w = np.concatenate([gap, row_of(sign * 8 * first_beyond), row_of(1e30), gap, row_of(1e30)])
    stats = run(w, grid, backend=backend)[2]
    assert stats.overflow_row == 35
    assert not stats.ok
    assert stats.nonfinite is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scale_grid", "largest"), [("fp16", 65504.0), ("bf16", 65280.0)])
def test_the_search_stops_at_the_largest_scale(scale_grid: Any, largest: float, backend: str) -> None:
    # All but the first weight lie on the grid of the largest scale, which only a factor above 1 reaches.
    w = np.full((1, 32), -7 * largest, np.float32)
    w[0, 0] = -8 * 64960
    _, scales, stats = run(w, Grid(group_size=32, scale_grid=scale_grid, search=True), backend=backend)
    assert stats.ok
    assert scales.view(np.float16).tolist() == [[largest]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_groups_are_counted(backend: str) -> None:
    w = np.ones((3, 96), np.float32)
    w[0, :64] = 0.0
    w[2, 32:] = -0.0
    stats = run(w, Grid(group_size=64), backend=backend)[2]
    assert (stats.groups, stats.zero_groups) == (6, 2)
    assert run(w * 0, Grid(group_size=64), backend=backend)[2].zero_groups == 6


def test_no_rows_are_no_trouble() -> None:
    for backend in ("numpy", "auto"):
        out, stats = rounding.quantize(np.zeros((0, 64), np.float32), "F32", Grid(), layout="gptq", backend=backend)
        assert out.words.shape == (8, 0)
        assert stats.groups == 0


# --- tiles, threads and buffers -------------------------------------------------------------------


@pytest.mark.parametrize("search", [False, True])
def test_numpy_tiles_do_not_show(search: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w, grid = nasty(150, 96, 7), Grid(group_size=64, search=search)
    a, a_stats = rounding.quantize(w, "F32", grid, layout="gptq", backend="numpy")
    assert list(rounding._row_tiles(150, 96)) == [(0, 32), (32, 64), (64, 96), (96, 128), (128, 150)]
    monkeypatch.setattr(rounding, "TILE_WEIGHTS", 1 << 18)
    assert list(rounding._row_tiles(150, 96)) == [(0, 150)]
    b, b_stats = rounding.quantize(w, "F32", grid, layout="gptq", backend="numpy")
    np.testing.assert_array_equal(a.words, b.words)
    np.testing.assert_array_equal(a.scales, b.scales)
    assert a_stats == b_stats


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["gptq", "row"])
def test_row_ranges_on_threads_give_the_bits_of_one_call(layout: Any, backend: str) -> None:
    w, grid = bf16(nasty(101, 160, 8)), Grid(search=True)
    whole, _ = rounding.quantize(w, "BF16", grid, layout=layout, backend=backend)
    out = rounding.QuantizedWeight.empty(layout, grid, w.shape)
    words, scales = (out.words, out.scales) if layout == "row" else (out.words.T, out.scales.T)

    def work(a: int, b: int) -> None:
        part = (words[a:b], scales[a:b]) if layout == "row" else (words[a:b].T, scales[a:b].T)
        view = rounding.QuantizedWeight(layout=layout, words=part[0], scales=part[1])
        rounding.quantize_into(w[a:b], "BF16", grid, view, backend=backend)

    threads = [threading.Thread(target=work, args=span) for span in ((0, 33), (33, 50), (50, 101))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(out.words, whole.words)
    np.testing.assert_array_equal(out.scales, whole.scales)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["gptq", "row"])
def test_only_the_output_given_is_written(layout: Any, backend: str) -> None:
    w, grid = nasty(40, 64, 9), Grid(group_size=32)
    expected, _ = rounding.quantize(w, "F32", grid, layout=layout)
    (a, b), (c, d) = expected.words.shape, expected.scales.shape
    words, scales = np.full((a + 2, b + 2), 7, np.int32), np.full((c + 2, d + 2), 7, np.uint16)
    out = rounding.QuantizedWeight(layout=layout, words=words[1:-1, 1:-1], scales=scales[1:-1, 1:-1])
    rounding.quantize_into(w, "F32", grid, out, backend=backend)
    np.testing.assert_array_equal(words[1:-1, 1:-1], expected.words)
    np.testing.assert_array_equal(scales[1:-1, 1:-1], expected.scales)
    for frame in (words, scales):
        frame[1:-1, 1:-1] = 7
        assert (frame == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_may_be_read_only_or_unaligned(backend: str) -> None:
    w = bf16(nasty(8, 64, 10))
    expected = run(w, Grid(), "BF16", backend=backend)[0]
    odd = np.frombuffer(b"x" + w.tobytes(), np.uint8)[1:].view(np.uint16).reshape(w.shape)
    assert not odd.flags.aligned
    assert rounding._raw_bits(odd, "BF16").flags.aligned  # on some machines compiled code faults on what is not
    assert not odd.flags.writeable
    np.testing.assert_array_equal(run(odd, Grid(), "BF16", backend=backend)[0], expected)
    w.flags.writeable = False
    np.testing.assert_array_equal(run(w, Grid(), "BF16", backend=backend)[0], expected)


# --- refusals -------------------------------------------------------------------------------------


def test_columns_that_do_not_fill_words_are_refused() -> None:
    for columns in (0, 16, 100):
        with pytest.raises(SchemeError, match=f"multiple of 32, found {columns}"):
            rounding.quantize(np.zeros((2, columns), np.float32), "F32", Grid(), layout="row")


@pytest.mark.parametrize(
    ("w", "dtype", "message"),
    [
        (np.zeros((2, 32), np.float64), "F32", "F32 weight: expected uint32 or float32, found <f8"),
        (np.zeros((2, 32), np.float16), "BF16", "BF16 weight: expected uint16, found <f2"),
        (np.zeros((2, 32), ">f4"), "F32", "found >f4"),
        (np.zeros((32, 32), np.float32)[:, ::2], "F32", "C-contiguous"),
        (np.zeros(32, np.float32), "F32", r"2 dimensions, found shape \[32\]"),
        (np.zeros((2, 32), np.float32), "F64", "one of BF16, F16, F32, found F64"),
    ],
)
def test_weights_of_another_form_are_refused(w: np.ndarray, dtype: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rounding.quantize(w, dtype, Grid(), layout="row")


def test_buffers_of_another_form_are_refused() -> None:
    w, good = np.zeros((2, 64), np.float32), rounding.QuantizedWeight.empty("gptq", Grid(), (2, 64))
    bad = rounding.QuantizedWeight(layout="gptq", words=good.words.T, scales=good.scales)
    with pytest.raises(ValueError, match=r"gptq words: expected int32 \[8, 2\], found int32 \[2, 8\]"):
        rounding.quantize_into(w, "F32", Grid(), bad)
    bad = rounding.QuantizedWeight(layout="gptq", words=good.words, scales=good.scales.view(np.float16))
    with pytest.raises(ValueError, match=r"gptq scales: expected uint16 \[1, 2\], found float16"):
        rounding.quantize_into(w, "F32", Grid(), bad)
    good.words.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        rounding.quantize_into(w, "F32", Grid(), good)


def test_a_backend_that_is_absent_is_refused_and_auto_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    w = nasty(3, 32, 1)
    expected, _ = rounding.quantize(w, "F32", Grid(), layout="row")
    monkeypatch.setattr(rounding, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="numba is not installed"):
        rounding.quantize(w, "F32", Grid(), layout="row", backend="numba")
    monkeypatch.setattr(rounding, "_run_kernel", lambda *_: pytest.fail("used numba"))
    found, _ = rounding.quantize(w, "F32", Grid(), layout="row")
    np.testing.assert_array_equal(found.words, expected.words)
    with pytest.raises(ValueError, match="expected auto, numpy or numba, found torch"):
        rounding.quantize(w, "F32", Grid(), layout="row", backend="torch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits: expected 4 or 8, found 3"),
        ({"group_size": 256}, "group size: expected 128, 64, 32 or -1, found 256"),
        ({"scale_grid": "fp32"}, "scale grid: expected fp16 or bf16, found fp32"),
    ],
)
def test_other_grids_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Grid(**options)


def test_grid_arithmetic() -> None:
    four, eight = Grid(), Grid(bits=8, group_size=-1)
    assert (four.zero_code, four.codes_per_word) == (8, 8)
    assert (eight.zero_code, eight.codes_per_word) == (128, 4)
    assert [four.groups(i) for i in (32, 128, 160)] == [1, 1, 2]
    assert (eight.groups(4096), eight.span(4096), four.span(4096)) == (1, 4096, 128)
    assert four.word_shape("gptq", 128, 256) == (32, 128)
    assert four.word_shape("row", 128, 256) == (128, 32)
    assert four.scale_shape("gptq", 128, 256) == (2, 128)
    assert eight.word_shape("gptq", 128, 256) == (64, 128)


def test_compiled_code_is_kept_apart_for_every_state_of_all_that_it_is_made_of(tmp_path: Path) -> None:
    """Numba looks at the file of a kernel alone, not at those of what the kernel calls."""
    kernels = pytest.importorskip("shardxform.formats.kernels")
    copied = tmp_path / "shardxform"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    folders = [kernels.cache_folder(copied)]
    for name in kernels.SOURCES:
        with (copied / name).open("a") as file:
            file.write("# changed\n")
        folders.append(kernels.cache_folder(copied))
    assert len(set(folders)) == len(kernels.SOURCES) + 1


def test_all_that_kernels_import_is_among_the_sources_of_compiled_code() -> None:
    kernels = pytest.importorskip("shardxform.formats.kernels")
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*kernels.py")}
    for name in sorted(found):
        text = (PACKAGE / name).read_text(encoding="utf-8")
        for room, names in re.findall(r"^(?:from|import) shardxform\.([\w.]+) import (.+)$", text, re.MULTILINE):
            file = PACKAGE / f"{room.replace('.', '/')}.py"
            modules = (
                [file] if file.exists() else [file.with_suffix("") / f"{each.strip()}.py" for each in names.split(",")]
            )
            found |= {str(module.relative_to(PACKAGE)) for module in modules}
    assert found | {"formats/rounding.py"} == set(kernels.SOURCES)


def test_kernels_compile_where_no_cache_can_be_written() -> None:
    """Numba refuses ``cache=True`` for code without a place to cache it, as for an unwritable installation."""
    pytest.importorskip("numba")
    from shardxform.formats import kernels

    namespace: dict[str, Any] = {}
    exec("def twice(x):\n    return 2 * x", namespace)
    assert kernels.jit(namespace["twice"])(21) == 42
