"""ggml's block types: integers that stay as they are, floats that are rounded by ggml's rules, and what they decode to.

The oracles are llama.cpp's own library, called through ctypes, and the gguf package's readers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from strategies import ALL, picked

from shardxform.base.tensors import BLOCKS, ByteRange, TensorRef, TensorSpec
from shardxform.errors import ExecutionError, SchemeError
from shardxform.formats import ggml, ggml_blocks, packing, rounding
from shardxform.formats.encoding import Cut, Rows, Writing
from shardxform.formats.ggml import Ggml, encoding_of, rounded_blocks
from shardxform.formats.integers import Ints
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import Grid

TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "MXFP4": 39,
}
NUMBA = rounding.use_numba("auto")
COMPILED = tuple(TYPES) if ALL else ("Q8_0", "Q4_K")  # each takes seconds to compile
RULES = [(name, "numpy") for name in TYPES] + [(name, "numba") for name in COMPILED if NUMBA]


# -- a matrix in memory -------------------------------------------------------------------------------------------


class Memory:
    """Tensors that are read from arrays."""

    def __init__(self) -> None:
        self.bytes: dict[str, bytes] = {}

    def put(self, name: str, dtype: str, shape: tuple[int, ...], array: np.ndarray) -> TensorRef:
        data = np.ascontiguousarray(array).tobytes()
        self.bytes[name] = data
        spec = TensorSpec(name, dtype, shape)
        assert spec.nbytes == len(data)
        return TensorRef(spec, (ByteRange(name, 0, len(data)),))

    def read(self, ref: TensorRef, into: np.ndarray) -> None:
        data = b"".join(self.bytes[piece.file][piece.offset : piece.end] for piece in ref.ranges)
        into.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8)


def rows_of(values: np.ndarray, dtype: str = "F32") -> Rows:
    memory = Memory()
    bits = {"F32": values, "BF16": packing.bf16_bits_of(values), "F16": packing.half_bits_of(values)}[dtype]
    ref = memory.put("x.weight", dtype, values.shape, bits)
    return Plain(dtype).open({"values": ref}, values.shape, memory.read, True)


def writing(shape: tuple[int, int], stopped: Callable[[], None] = lambda: None) -> Writing:
    return Writing("tensor 'x.weight'", shape, rounding.quantize_into, stopped)


def blocks_of(encoding: Any, sources: list[Rows], shape: tuple[int, int]) -> np.ndarray:
    """What an encoding writes, put together."""
    out = np.zeros((shape[0], encoding.row_bytes(shape[1])), np.uint8)
    flat, filled = out.reshape(-1), 0
    for role, offset, data in encoding.written(iter(sources), writing(shape)):
        assert role == "values"
        assert offset == filled  # one after the other
        flat[offset : offset + data.nbytes] = data.reshape(-1).view(np.uint8)
        filled += data.nbytes
    assert filled == out.nbytes
    return out


def opened(type_name: str, blocks: np.ndarray, columns: int, checked: bool = True) -> Rows:
    memory = Memory()
    shape = (len(blocks), columns)
    ref = memory.put("y.weight", type_name, shape, blocks)
    return Ggml(type_name).open({"values": ref}, shape, memory.read, checked)


def ints(values: np.ndarray, grid: Grid, layout: str, scale_dtype: str = "F16") -> Rows:
    """A quantized matrix as a checkpoint holds it."""
    memory = Memory()
    encoding = Ints(grid, layout, scale_dtype)
    arrays = {role: data for role, _, data in encoding.written([rows_of(values)], writing(values.shape))}
    parts = {
        part.role: memory.put(f"x.{part.suffix}", part.dtype, part.shape, arrays[part.role])
        for part in encoding.parts(*values.shape)
    }
    return encoding.open(parts, values.shape, memory.read, True)


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05).astype(np.float32)


# -- integers that stay as they are -------------------------------------------------------------------------------


def test_the_bytes_of_a_block() -> None:
    """Two floats of a half each, 0.5 apart: written down by hand."""
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    scale = np.array([[0x3800]], np.uint16)  # 0.5
    four = ggml_blocks.of_codes(codes, scale, Grid(bits=4, group_size=32), "Q4_0")
    assert four.tolist() == [[0x00, 0x38, *(0x11 * code for code in range(16))]]
    wide = np.arange(112, 144, dtype=np.uint8)[None]
    eight = ggml_blocks.of_codes(wide, scale, Grid(bits=8, group_size=32), "Q8_0")
    assert eight.tolist() == [[0x00, 0x38, *(code % 256 for code in range(-16, 16))]]
    np.testing.assert_array_equal(
        ggml_blocks.block_values(four, "Q4_0")[0], [(code % 16 - 8) / 2 for code in range(32)]
    )
    np.testing.assert_array_equal(ggml_blocks.block_values(eight, "Q8_0")[0], [code / 2 for code in range(-16, 16)])


@pytest.mark.parametrize("group_size", [32, 64, -1])
def test_both_backends_give_words_the_same_blocks(group_size: int) -> None:
    rng, grid = np.random.default_rng(0), Grid(bits=4, group_size=group_size)
    words = rng.integers(-(1 << 31), 1 << 31, grid.word_shape("row", 5, 192), "i4")
    scales = rng.integers(0, 0x7C00, grid.scale_shape("row", 5, 192), "u2")
    one, other = (ggml.blocks_of_words(words, scales, grid, "Q4_0", backend) for backend in ("numba", "numpy"))
    np.testing.assert_array_equal(one, other)
    codes = words[:, :, None].view("u4") >> np.arange(0, 32, 4, dtype="u4") & 15
    wanted = (codes.reshape(5, 6, 32).astype("f4") - 8) * np.repeat(
        scales.view("f2").astype("f4"), grid.span(192) // 32, 1
    )[..., None]
    np.testing.assert_array_equal(ggml_blocks.block_values(one, "Q4_0"), wanted.reshape(5, 192))


@pytest.mark.parametrize("layout", ["gptq", "row"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize(("type_name", "bits"), [("Q4_0", 4), ("Q8_0", 8), ("Q8_0", 4)])
def test_integers_keep_their_values(type_name: str, bits: int, group_size: int, layout: str) -> None:
    """Whatever the groups and the order of the words, and for any run of rows."""
    values, grid = normal(64, 256), Grid(bits=bits, group_size=group_size)
    rows = ints(values, grid, layout, "BF16" if layout == "row" else "F16")
    found = opened(type_name, blocks_of(Ggml(type_name), [rows], (64, 256)), 256)
    np.testing.assert_array_equal(found.values(0, 64), rows.values(0, 64))
    part = blocks_of(Ggml(type_name), [rows.cut(Cut(40, 8)), rows.cut(Cut(3, 5))], (13, 256))
    wanted = np.concatenate((rows.values(40, 48), rows.values(3, 8)))
    np.testing.assert_array_equal(opened(type_name, part, 256).values(0, 13), wanted)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize(("type_name", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_floats_of_a_grid_equal_the_quantized_checkpoint(
    type_name: str, bits: int, group_size: int, search: bool, dtype: str
) -> None:
    values, grid = normal(64, 256), Grid(bits=bits, group_size=group_size, search=search)
    source = rows_of(values, dtype)
    twin = ints(source.values(0, 64), grid, "gptq")
    straight = blocks_of(Ggml(type_name, grid), [source], (64, 256))
    np.testing.assert_array_equal(straight, blocks_of(Ggml(type_name), [twin], (64, 256)))


def test_a_scale_that_is_no_float16_is_refused_by_name() -> None:
    """BF16 holds numbers that float16 rounds, and others that it makes infinite."""
    for bits in (0x3780, 0x4780, 0x3301):  # 2^-16, which float16 holds; 65536; a denormal with a bit too many
        grid, memory = Grid(bits=4, group_size=32), Memory()
        scale = np.full((1, 2), 0x3C00, np.uint16)
        scale[0, 1] = bits
        parts = {
            "words": memory.put("m.weight_packed", "I32", (1, 8), np.zeros((1, 8), np.int32)),
            "scales": memory.put("m.weight_scale", "BF16", (1, 2), scale),
            "shape": memory.put("m.weight_shape", "I64", (2,), np.array([1, 64])),
        }
        rows = Ints(grid, "row", "BF16").open(parts, (1, 64), memory.read, True)
        if bits == 0x3780:
            blocks_of(Ggml("Q4_0"), [rows], (1, 64))
            continue
        with pytest.raises(ExecutionError, match=r"tensor 'm': row 0: scale .* of group 1 is no float16"):
            blocks_of(Ggml("Q4_0"), [rows], (1, 64))


def test_zero_groups_of_a_grid_are_counted() -> None:
    values = normal(4, 64)
    values[1, 32:] = 0
    told = writing((4, 64))
    list(Ggml("Q4_0", Grid(bits=4, group_size=32)).written([rows_of(values)], told))
    assert (told.groups, told.zero_groups) == (8, 1)


# -- ggml's own rules ---------------------------------------------------------------------------------------------


def cases(columns: int, rows: int = 24) -> Iterator[tuple[str, np.ndarray]]:
    """Rows of every kind."""
    r = np.random.default_rng(columns)
    normal = r.standard_normal((rows, columns)).astype(np.float32)
    for power in (0, -6, -20, -24, -60, -120, -130, -140, 12):
        yield f"normal times 2^{power}", np.ldexp(normal, power)
    yield "of BF16", (normal.view(np.uint32) & 0xFFFF0000).view(np.float32)
    yield "heavy tails", np.clip(r.standard_t(1, (rows, columns)), -1e5, 1e5).astype(np.float32)
    yield "constant", np.repeat(normal[:, :1], columns, axis=1)
    yield "zeros", np.zeros((2, columns), np.float32)
    yield "negative zeros", -np.zeros((2, columns), np.float32)
    yield "one sign", np.abs(normal)
    yield "the other", -np.abs(normal)
    yield "ties", (r.integers(-16, 17, (rows, columns)) / 2).astype(np.float32)
    yield "sparse", normal * (r.random((rows, columns)) < 0.03)
    yield "sizes that differ", normal * np.exp2(r.integers(-20, 8, (rows, columns // 16))).repeat(16, 1).astype("f4")
    yield "any bits", (r.integers(0, 2**32, (rows, columns), np.uint32) & np.uint32(0xBFFFFFFF)).view(np.float32)


@cache
def library() -> Any:
    """The C functions of llama.cpp's library."""
    found = ctypes.CDLL(pytest.importorskip("xllamacpp.xllamacpp").__file__)
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_void_p]
    return found


def by_ggml(values: np.ndarray, type_name: str) -> np.ndarray:
    values = np.ascontiguousarray(values)
    columns, nbytes = BLOCKS[type_name]
    out = np.empty((len(values), values.shape[1] // columns * nbytes), np.uint8)
    places = values.ctypes.data, out.ctypes.data
    done = library().ggml_quantize_chunk(TYPES[type_name], *places, 0, *values.shape, None)
    assert done == out.nbytes
    return out


def read_by_ggml(blocks: np.ndarray, type_name: str, columns: int) -> np.ndarray:
    decode = getattr(library(), f"dequantize_row_{type_name.lower().replace('_k', '_K')}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    out = np.empty((len(blocks), columns), np.float32)
    decode(blocks.ctypes.data, out.ctypes.data, out.size)
    return out


@pytest.mark.oracle
@pytest.mark.parametrize(("type_name", "backend"), picked(RULES, 3))
def test_rounding_equals_ggmls(type_name: str, backend: rounding.Backend) -> None:
    for name, values in cases(512):
        found = rounded_blocks(values, type_name, backend)
        np.testing.assert_array_equal(found, by_ggml(values, type_name), err_msg=name)


@pytest.mark.oracle
@given(
    rule=st.sampled_from(RULES),
    values=arrays(np.float32, (2, 256), elements=st.floats(-1e6, 1e6, width=32)),
    power=st.integers(-140, 0),
)
def test_rounding_any_values_equals_ggmls(rule: tuple[str, rounding.Backend], values: np.ndarray, power: int) -> None:
    values = np.ldexp(values, power)
    np.testing.assert_array_equal(rounded_blocks(values, *rule), by_ggml(values, rule[0]))


@pytest.mark.oracle
@pytest.mark.parametrize("type_name", [name for name in BLOCKS if not Ggml(name).unreadable])
def test_scales_that_are_no_numbers_are_found_where_they_are(type_name: str) -> None:
    """Wherever a float16 decides whether values are numbers, and nowhere else."""
    nbytes = BLOCKS[type_name][1]
    blocks = np.zeros((nbytes - 1, 2 * nbytes), np.uint8)
    at = np.arange(nbytes - 1)
    blocks[at, nbytes + at + 1] = 0x7C
    odd = ~np.isfinite(ggml_blocks.block_values(blocks, type_name)).all(axis=1)
    for row in at:
        found = ggml_blocks.overflowing(blocks[row : row + 1], type_name)
        assert found == ((0, 1) if odd[row] and type_name not in ("IQ1_M", "MXFP4", "NVFP4") else ())


@pytest.mark.oracle
@pytest.mark.parametrize("type_name", [name for name in BLOCKS if not Ggml(name).unreadable])
def test_decoding_equals_ggmls(type_name: str) -> None:
    """Of any bytes: scales may be no numbers."""
    columns, nbytes = BLOCKS[type_name]
    blocks = np.random.default_rng(0).integers(0, 256, (40, 4 * nbytes), np.uint8)
    found = ggml_blocks.block_values(blocks, type_name)
    np.testing.assert_array_equal(found, read_by_ggml(blocks, type_name, 4 * columns))


@pytest.mark.skipif(not NUMBA, reason="no numba")
@pytest.mark.parametrize("type_name", COMPILED)
def test_blocks_that_do_not_fill_the_lanes_of_a_kernel(type_name: str) -> None:
    values = normal(3, 256 * 7)
    compiled = rounded_blocks(values, type_name, "numba")
    np.testing.assert_array_equal(compiled, rounded_blocks(values, type_name, "numpy"))


@pytest.mark.parametrize("type_name", TYPES)
def test_what_is_rounded_is_near(type_name: str) -> None:
    """Whatever the oracle is: within one step of the largest value of a block."""
    values = normal(16, 512)
    found = ggml_blocks.block_values(rounded_blocks(values, type_name, "numpy"), type_name)
    bits = {"MXFP4": 2, "IQ4_NL": 3}.get(type_name) or int(type_name[1])
    assert np.abs(found - values).max() < 2.0 ** (1 - bits) * np.abs(values).max()


@pytest.mark.parametrize("type_name", COMPILED)
def test_tiles_and_sources_do_not_show(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(40, 512)
    whole = blocks_of(Ggml(type_name), [rows_of(values)], (40, 512))
    monkeypatch.setattr("shardxform.formats.ggml.DECODE_TILE", 3 * 512)
    halves = [rows_of(values[:17]), rows_of(values[17:])]
    np.testing.assert_array_equal(blocks_of(Ggml(type_name), halves, (40, 512)), whole)


@pytest.mark.parametrize("type_name", COMPILED)
def test_what_cannot_be_said_is_refused_by_name(type_name: str) -> None:
    values = normal(4, 256)
    values[2, 70] = np.inf
    with pytest.raises(ExecutionError, match=r"tensor 'x.weight': NaN or infinity at row 2, column 70"):
        blocks_of(Ggml(type_name), [rows_of(values)], (4, 256))
    values[2, 70] = 1e9
    if type_name == "MXFP4":  # its scales are powers of two
        blocks_of(Ggml(type_name), [rows_of(values)], (4, 256))
        return
    with pytest.raises(ExecutionError, match=rf"row 2 needs a scale beyond float16 .* of {type_name}"):
        blocks_of(Ggml(type_name), [rows_of(values)], (4, 256))
    blocks = rounded_blocks(values, type_name)
    assert not np.isfinite(opened(type_name, blocks, 256, checked=False).values(0, 4)).all()
    with pytest.raises(ExecutionError, match=r"tensor 'y.weight': NaN or infinity at row 2, column \d+"):
        opened(type_name, blocks, 256).values(1, 4)


# -- what is stored ------------------------------------------------------------------------------------------------


def test_blocks_of_the_same_type_are_moved() -> None:
    """They are not decoded and rounded again, which would not give them back."""
    blocks = np.random.default_rng(0).integers(0, 256, (6, 36), np.uint8)
    blocks[:, [1, 19]] &= 0x3F
    rows = opened("Q4_0", blocks, 64)
    np.testing.assert_array_equal(blocks_of(Ggml("Q4_0"), [rows.cut(Cut(2, 3))], (3, 64)), blocks[2:5])
    turned = rows.cut(Cut(1, 2, transposed=True))
    np.testing.assert_array_equal(turned.values(0, 2), ggml_blocks.block_values(blocks, "Q4_0").T[1:3])


def test_types_that_nothing_reads_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = np.zeros((2, 18), np.uint8)
    with pytest.raises(ExecutionError, match=r"tensor 'y.weight': blocks of Q1_0 are not read"):
        opened("Q1_0", blocks, 128)
    monkeypatch.setattr("shardxform.formats.ggml.find_spec", lambda _: None)
    with pytest.raises(ExecutionError, match=r"IQ4_XS are read by the gguf package: pip install shardxform\[gguf\]"):
        opened("IQ4_XS", np.zeros((2, 136), np.uint8), 256)
    opened("Q4_K", np.zeros((2, 144), np.uint8), 256)


def test_shapes_and_types() -> None:
    assert encoding_of("F32") == Plain("F32")
    assert encoding_of("Q4_0", Grid()) == Ggml("Q4_0", Grid())
    assert Ggml("Q8_0").misfit(1, 96) == ""
    assert "100 input channels do not fill blocks of 32" in Ggml("Q8_0").misfit(3, 100)
    assert "96 input channels do not fill groups of 128" in Ggml("Q4_0", Grid()).misfit(3, 96)
    assert Ggml("Q4_0", Grid(group_size=-1)).misfit(3, 96) == ""
    (part,) = Ggml("Q4_0").parts(3, 64)
    assert (part.spec("m").name, part.spec("m").nbytes, Ggml("Q4_0").row_bytes(64)) == ("m.weight", 3 * 36, 36)
    assert "Q2_K is only read; expected one of Q4_0" in Ggml("Q2_K").misfit(1, 256)
    assert Ggml("Q4_K").misfit(1, 512) == ""
    with pytest.raises(SchemeError, match="expected one of F32, F16, BF16, Q4_0"):
        encoding_of("Q9_0")
    with pytest.raises(SchemeError, match="Q4_K: expected none for integers of 4 bits"):
        Ggml("Q4_K", Grid(bits=4))
    with pytest.raises(SchemeError, match="Q4_0: expected none for integers of 8 bits"):
        Ggml("Q4_0", Grid(bits=8))
