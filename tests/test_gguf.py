"""The head of a GGUF file, against the `gguf` package's writer and reader, and against what strangers may write."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from ggufs import blocks, fields_of, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from strategies import mutations

from shardxform.base import gguf
from shardxform.base.gguf import GgufHead, KeyValue, NeedsMoreError
from shardxform.base.tensors import BITS, BLOCKS, ByteRange, TensorRef, TensorSpec
from shardxform.errors import CheckpointError, PlanError

TYPES = package.GGUFValueType
METADATA: dict[str, Any] = {
    "general.name": "tiny",
    "a.u8": (TYPES.UINT8, 200),
    "a.i8": (TYPES.INT8, -3),
    "a.u16": (TYPES.UINT16, 65535),
    "a.i16": (TYPES.INT16, -2),
    "a.u32": 7,
    "a.i32": (TYPES.INT32, -7),
    "a.f32": 0.5,
    "a.bool": True,
    "a.u64": (TYPES.UINT64, 1 << 63),
    "a.i64": (TYPES.INT64, -(1 << 62)),
    "a.f64": (TYPES.FLOAT64, 0.1),
    "tokenizer.ggml.tokens": ["a", "ü", "", "\U0001f600"],
    "a.scores": [0.5, -1.0],
    "a.flags": [True, False],
    "a.ids": [1, -2, 3],
}


def example(path: Path, **options: Any) -> list[Path]:
    rng = np.random.default_rng(0)
    kinds = {name: getattr(package.GGMLQuantizationType, name) for name in ("Q4_K", "Q8_0", "IQ4_XS", "MXFP4")}
    tensors: dict[str, Any] = {f"blk.{name}": blocks(rng, kind, (3, 2, 256)) for name, kind in kinds.items()}
    tensors |= {"norm.weight": np.arange(5, dtype="f4"), "odd.weight": rng.integers(0, 9, (3, 7), "i1")}
    return write_gguf(path, METADATA, tensors, **options)


def decoded(path: Path) -> GgufHead:
    data = path.read_bytes()
    return gguf.decode_head(data, len(data), str(path))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example(tmp_path_factory.mktemp("gguf") / "tiny.gguf")[0]


def test_what_is_decoded_is_what_the_package_reads(path: Path) -> None:
    head, reader = decoded(path), package.GGUFReader(path)
    assert {each.key: each.value for each in head.metadata} == fields_of(path)
    assert [(e.spec.name, e.spec.dtype, list(e.spec.shape[::-1]), e.spec.nbytes) for e in head.entries] == [
        (t.name, t.tensor_type.name, t.shape.tolist(), t.n_bytes) for t in reader.tensors
    ]
    assert [head.data_start + e.begin for e in head.entries] == [t.data_offset for t in reader.tensors]


def test_what_is_encoded_is_what_the_package_writes(path: Path) -> None:
    head = decoded(path)
    assert gguf.encode_head(head.metadata, head.entries) == path.read_bytes()[: head.data_start]
    assert gguf.place([e.spec for e in head.entries], head.alignment) == head.entries


def test_keys_are_made_as_the_package_makes_them(path: Path) -> None:
    """Every kind of value, from the value alone."""
    for each in decoded(path).metadata:
        if isinstance(each.value, list):
            assert KeyValue.array(each.key, each.items, each.value) == each  # type: ignore[arg-type]
            assert each.count == len(each.value)
        else:
            assert KeyValue.of(each.key, each.kind, each.value) == each


@pytest.mark.parametrize(
    ("kind", "value"), [("UINT8", 256), ("INT8", -129), ("FLOAT32", 1e300), ("STRING", 3), ("UINT32", "3")]
)
def test_a_value_that_is_none_of_its_kind_is_refused(kind: gguf.Kind, value: Any) -> None:
    with pytest.raises(PlanError, match=f"GGUF key 'a': .* is no {kind}"):
        KeyValue.of("a", kind, value)


def test_sizes_of_blocks_are_the_packages() -> None:
    known = {kind.name: sizes for kind, sizes in package.GGML_QUANT_SIZES.items() if kind.name in gguf.TYPES}
    assert {name: (1, BITS[name] // 8) if name in BITS else BLOCKS[name] for name in known} == known
    assert {name: int(package.GGMLQuantizationType[name]) for name in known} == {n: gguf.TYPES[n] for n in known}
    assert set(gguf.TYPES) - set(known) == {"Q2_0"}  # which llama.cpp has, and the package not yet
    assert {kind.name for kind in package.GGML_QUANT_SIZES} - set(known) == {"Q8_1", "Q8_K"}


def test_experts_of_blocks_are_byte_ranges() -> None:
    stack = TensorRef(TensorSpec("e", "Q4_K", (4, 2, 512)), (ByteRange("f", 64, 4 * 2 * 2 * 144),))
    assert stack.nbytes == 4 * 576
    assert stack.select([0, 2]).ranges == (ByteRange("f", 64, 576), ByteRange("f", 64 + 2 * 576, 576))
    assert stack.index(1).spec == TensorSpec("e", "Q4_K", (2, 512))
    with pytest.raises(CheckpointError, match="split a block of 256"):
        TensorRef(TensorSpec("e", "Q4_K", (512,)), (ByteRange("f", 0, 288),)).select([0])


def test_a_head_is_read_in_as_few_bytes_as_need_be(path: Path) -> None:
    data, asked = path.read_bytes(), []

    def beginning(stop: int) -> bytes:
        asked.append(stop)
        return data[:stop]

    head, digest = gguf.read_head(beginning, len(data), "f")
    assert head == decoded(path)
    assert digest == hashlib.sha256(data[: head.data_start]).hexdigest()
    for stop in range(4, head.data_start, 7):
        with pytest.raises(NeedsMoreError) as e:
            gguf.decode_head(data[:stop], len(data), "f")
        assert stop < e.value.least <= head.data_start


def test_a_longer_head_is_read_in_steps(tmp_path: Path) -> None:
    tokens = [f"token {n}" for n in range(120_000)]
    path = write_gguf(tmp_path / "t.gguf", {"tokenizer.ggml.tokens": tokens}, {"a": np.zeros(3, "f4")})[0]
    data, asked = path.read_bytes(), []
    head, _ = gguf.read_head(lambda stop: (asked.append(stop), data[:stop])[1], len(data), "f")
    assert head.metadata[1].value == tokens
    assert asked == [1 << 20, 1 << 21, len(data)]


# -- what strangers write ---------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, number: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", number) + raw


def info(name: bytes, dims: tuple[int, ...], number: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)


def made(
    keys: list[bytes], infos: list[bytes], data: int = 0, *, version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    tensors, values = counts or (len(infos), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(keys) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


ONE = info(b"a", (8,), 0, 0)
HUGE = 1 << 62
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected a GGUF file, found none: begins with b''"),
    "other": (b"\x80\x02}q\0" * 9, "expected a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "version 1": (made([], [ONE], 32, version=1), "version 1 of GGUF; expected 2 or 3"),
    "big-endian": (made([], [ONE], 32, version=3 << 24), "written for big-endian machines"),
    "tensors": (made([], [ONE], 32, counts=(HUGE, 0)), f"claims {HUGE} tensors"),
    "keys": (made([], [ONE], 32, counts=(1, HUGE)), f"claims {HUGE} keys"),
    "key's length": (made([struct.pack("<Q", HUGE)], [ONE], 32), "truncated: its head needs"),
    "array's length": (made([key(b"k", 9, struct.pack("<IQ", 4, HUGE))], [ONE], 32), "truncated: its head needs"),
    "texts' length": (made([key(b"k", 9, struct.pack("<IQ", 8, HUGE))], [ONE], 32), "truncated: its head needs"),
    "text's length": (made([key(b"k", 9, struct.pack("<IQQ", 8, 1, HUGE))], [ONE], 32), "truncated: its head needs"),
    "arrays' length": (made([key(b"k", 9, struct.pack("<IQ", 9, HUGE))], [ONE], 32), "truncated: its head needs"),
    "deep": (made([key(b"k", 9, struct.pack("<IQ", 9, 1) * 6)], [ONE], 32), "key 'k': arrays in arrays"),
    "value's type": (made([key(b"k", 13, bytes(8))], [ONE], 32), "key 'k' has the unknown type 13"),
    "key twice": (made([key(b"k", 0, b"1")] * 2, [ONE], 32), "key 'k' occurs 2 times"),
    "key no text": (made([key(b"\xff", 0, b"1")], [ONE], 32), "a key is no UTF-8"),
    "value no text": (made([key(b"k", 8, text(b"\xff"))], [ONE], 32), "key 'k' is no UTF-8"),
    "alignment": (made([key(gguf.ALIGNMENT_KEY.encode(), 4, struct.pack("<I", 24))], [ONE], 32), "a power of two"),
    "alignment's type": (made([key(gguf.ALIGNMENT_KEY.encode(), 0, b"\x20")], [ONE], 32), "found UINT8"),
    "alignment 0": (made([key(gguf.ALIGNMENT_KEY.encode(), 4, bytes(4))], [ONE], 32), "a power of two"),
    "name twice": (made([], [ONE, info(b"a", (8,), 0, 32)], 64), "tensor 'a' occurs 2 times"),
    "name no text": (made([], [info(b"\xff", (8,), 0, 0)], 32), "a tensor's name is no UTF-8"),
    "long name": (made([], [info(b"a" * 64, (8,), 0, 0)], 32), "a name of more than 63 bytes"),
    "dimensions": (made([], [info(b"a", (1,) * 5, 0, 0)], 32), "5 dimensions; expected 4"),
    "overflow": (made([], [info(b"a", (1 << 32, 1 << 32), 0, 0)], 32), "whose product fits 63 bits"),
    "no elements": (made([], [info(b"a", (8, 0), 0, 0)], 32), "expected sizes above 0"),
    "type": (made([], [info(b"a", (8,), 4, 0)], 32), "type 4, which is unknown"),
    "part of a block": (made([], [info(b"a", (48, 2), 8, 0)], 128), "rows are no whole number of blocks of 32"),
    "unaligned": (made([], [ONE, info(b"b", (8,), 0, 33)], 96), "'b' begins at 33 of the data, expected 32"),
    "overlap": (made([], [ONE, info(b"b", (8,), 0, 0)], 64), "'b' begins at 0 of the data, expected 32"),
    "hole": (made([], [ONE, info(b"b", (8,), 0, 64)], 96), "'b' begins at 64 of the data, expected 32"),
    "out of the file": (made([], [info(b"a", (80,), 0, 0)], 32), "truncated: its head describes 320 bytes"),
    "longer": (made([], [ONE], 64), "longer than its head says"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_no_reader_takes_is_refused(fault: str) -> None:
    data, message = FAULTS[fault]
    with pytest.raises(CheckpointError) as e:
        gguf.read_head(lambda stop: data[:stop], len(data), "x.gguf")
    assert message in str(e.value)
    assert str(e.value).startswith("x.gguf: ")


def test_what_the_faults_are_made_of_is_sound() -> None:
    data = made([key(b"k", 0, b"1")], [ONE, info(b"b", (8, 2), 0, 32)], 96)
    assert len(gguf.decode_head(data, len(data), "f").entries) == 2
    assert gguf.decode_head(made([], [ONE], 32, version=2), 96, "f").version == 2


def test_a_count_that_a_large_file_could_hold_is_not_believed() -> None:
    """Sizes are compared before anything is made of them."""
    data = made([key(b"k", 9, struct.pack("<IQ", 4, 1 << 30))], [ONE], 32)
    with pytest.raises(CheckpointError, match="a head of more than"):
        gguf.decode_head(data, 1 << 40, "f")


def base() -> bytes:
    keys = [key(b"k", 9, struct.pack("<IQ", 8, 2) + text(b"x") + text(b"yz")), key(b"n", 4, bytes(4))]
    return made(keys, [ONE, info(b"b", (32, 2), 8, 32)], 32 + 96)


@given(mutations(base()))
def test_whatever_is_there_is_decoded_or_refused(data: bytes) -> None:
    try:
        head, _ = gguf.read_head(lambda stop: data[:stop], len(data), "f")
    except CheckpointError:
        return
    again = gguf.encode_head(head.metadata, head.entries, head.version)
    assert gguf.decode_head(again + data[head.data_start :], len(data), "f") == head


@given(st.lists(st.tuples(st.sampled_from(sorted(gguf.TYPES)), st.integers(1, 5), st.integers(1, 3)), max_size=5))
def test_what_is_encoded_is_decoded(items: list[tuple[str, int, int]]) -> None:
    specs = [
        TensorSpec(f"t{n}", dtype, (rows, cols * BLOCKS.get(dtype, (1, 0))[0]))
        for n, (dtype, rows, cols) in enumerate(items)
    ]
    entries = gguf.place(specs, 64)
    metadata = (KeyValue.of(gguf.ALIGNMENT_KEY, "UINT32", 64),)
    data = gguf.encode_head(metadata, entries)
    end = gguf.padded(entries[-1].end, 64) if entries else 0
    assert gguf.decode_head(data, len(data) + end, "f") == GgufHead(3, metadata, entries, len(data), 64)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("t", "F8_E4M3", (2, 2)), "GGML has no such dtype"),
        (TensorSpec("t", "F32", (1,) * 5), "expected 1 to 4 dimensions"),
        (TensorSpec("t" * 64, "F32", (1,)), "a name of more than 63 bytes"),
        (TensorSpec("t", "Q8_0", (4, 48)), "no whole number of blocks of 32"),
    ],
)
def test_what_no_reader_takes_is_not_written(spec: TensorSpec, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        gguf.encode_head((), gguf.place([spec], 32))


def test_nothing_is_written_twice() -> None:
    spec = TensorSpec("t", "F32", (1,))
    with pytest.raises(PlanError, match="the tensor 't' twice"):
        gguf.encode_head((), gguf.place([spec, spec], 32))
    with pytest.raises(PlanError, match="the key 'k' twice"):
        gguf.encode_head((KeyValue.of("k", "UINT8", 1),) * 2, ())
