from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from build import Raw, header_bytes, shard_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from strategies import TORCH_DTYPES, filled, mutations, spec_lists

from shardxform.base import tensors
from shardxform.base.tensors import BITS, Entry, TensorSpec
from shardxform.errors import CheckpointError

A = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'


def decode(shard: bytes) -> tuple[Entry, ...]:
    start = tensors.data_start(shard[:8], len(shard), "s")
    return tensors.decode(shard[8:start], len(shard) - start, "s")


def reference(shard: bytes) -> dict[str, Raw] | None:
    """What the reference reader makes of it; None when it refuses."""
    try:
        return {name: Raw(t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(shard)}
    except SafetensorError:
        return None


def entry(**changes: Any) -> bytes:
    """A header of one two-byte tensor `a`, with changes to its fields."""
    info = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} | changes
    return header_bytes({"a": {key: value for key, value in info.items() if value is not ...}})


def test_a_header_is_encoded_to_exactly_these_bytes() -> None:
    specs = [TensorSpec("b", "BF16", (2, 3)), TensorSpec("a", "F32", ()), TensorSpec("c", "BF16", (0,))]
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},'
        b'"c":{"dtype":"BF16","shape":[0],"data_offsets":[16,16]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert tensors.encode(tensors.layout(specs)) == bytes([len(padded), 0, 0, 0, 0, 0, 0, 0]) + padded


def test_a_header_of_no_tensors_is_encoded_to_exactly_these_bytes() -> None:
    assert tensors.encode(()) == b"\x20\0\0\0\0\0\0\0" + b'{"__metadata__":{"format":"pt"}} '.ljust(32)[:32]


def test_control_characters_and_unicode_are_escaped_as_the_reference_writer_escapes_them() -> None:
    name = '"\\/\b\f\n\r\t\x00\x1f\x7f\u2028é🙂'
    text = tensors.encode([Entry(TensorSpec(name, "U8", ()), 0, 1)])
    assert rb'"\"\\/\b\f\n\r\t\u0000\u001f' + "\x7f\u2028é🙂".encode() + b'":{' in text


def test_tensors_are_laid_out_by_dtype_width_and_then_name() -> None:
    dtypes = ["BOOL", "F4", "U8", "BF16", "F16", "I64", "F32"]
    entries = tensors.layout([TensorSpec(name, dtype, (2,)) for name in ("y", "x") for dtype in dtypes])
    order = ["I64", "F32", "BF16", "F16", "U8", "F4", "BOOL"]
    assert [(e.spec.dtype, e.spec.name) for e in entries] == [(dtype, name) for dtype in order for name in "xy"]
    assert [e.begin for e in entries] == [0, 16, 32, 40, 48, 52, 56, 60, 64, 66, 68, 69, 70, 72]


@pytest.mark.oracle
@settings(max_examples=150)
@given(spec_lists(TORCH_DTYPES), st.randoms(use_true_random=False))
def test_layout_and_encode_equal_the_reference_writer_byte_for_byte(specs: list[TensorSpec], random: Any) -> None:
    import torch
    from safetensors.torch import _TYPES, save

    types = {**_TYPES, "F8_E8M0": torch.float8_e8m0fnu}
    raws = {spec.name: filled(spec) for spec in specs}
    values = {
        name: torch.frombuffer(bytearray(raw.data), dtype=torch.uint8).view(types[raw.dtype]).reshape(raw.shape)
        if raw.data
        else torch.empty(raw.shape, dtype=types[raw.dtype])
        for name, raw in raws.items()
    }
    random.shuffle(specs)
    entries = tensors.layout(specs)
    ours = tensors.encode(entries) + b"".join(raws[e.spec.name].data for e in entries)
    assert ours == save(values, {"format": "pt"})
    assert ours == shard_bytes(raws)  # the tests' own writer, for the dtypes that torch lacks


@settings(max_examples=150)
@given(spec_lists())
def test_decode_reverses_encode_for_every_dtype(specs: list[TensorSpec]) -> None:
    entries = tensors.layout(specs)
    shard = tensors.encode(entries) + b"".join(filled(e.spec).data for e in entries)
    assert set(decode(shard)) == set(entries)
    assert [e.begin for e in decode(shard)] == sorted(e.begin for e in entries)
    assert (
        tensors.encode(entries)
        == shard_bytes({s.name: filled(s) for s in specs})[: -sum(s.nbytes for s in specs) or None]
    )
    assert reference(shard) == {spec.name: filled(spec) for spec in specs}


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_has_the_width_that_the_reference_reader_gives_it(dtype: str) -> None:
    nbytes = 8 * BITS[dtype] // 8
    shard = header_bytes({"a": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, nbytes]}}) + bytes(nbytes)
    assert reference(shard) is not None
    assert [e.end for e in decode(shard)] == [nbytes]


@pytest.mark.parametrize(
    ("prefix", "file_bytes", "message"),
    [
        (b"", 0, "0 bytes, too short"),
        (b"1234567", 7, "7 bytes, too short"),
        (struct.pack("<Q", 93), 100, "claims 93 bytes, but the file has 100"),
        (struct.pack("<Q", 100_000_001), 1 << 40, "claims 100000001 bytes, the limit is 100000000"),
        (b"\xff" * 8, 1 << 40, "claims 18446744073709551615 bytes, the limit"),
    ],
)
def test_a_length_prefix_beyond_the_file_or_the_limit_is_refused(prefix: bytes, file_bytes: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"here: .*{message}"):
        tensors.data_start(prefix, file_bytes, "here")


def test_a_header_may_fill_the_file_and_reach_the_limit() -> None:
    assert tensors.data_start(struct.pack("<Q", 92), 100, "s") == 100
    assert tensors.data_start(struct.pack("<Q", 100_000_000), 1 << 40, "s") == 100_000_008


TWO = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (header_bytes({"a": TWO, "b": {**TWO, "data_offsets": [1, 3]}}) + b"123", "'b' overlaps its predecessor"),
        (header_bytes({"a": TWO, "b": TWO}) + b"12", "'b' overlaps its predecessor: begins at 0, expected 2"),
        (header_bytes({"a": TWO, "b": {**TWO, "data_offsets": [3, 5]}}) + b"12345", "'b' leaves a hole before it"),
        (header_bytes({"a": {**TWO, "data_offsets": [1, 3]}}) + b"123", "'a' leaves a hole before it"),
        (header_bytes({"a": TWO, "z": {**TWO, "shape": [0], "data_offsets": [1, 1]}}) + b"12", "'z' overlaps"),
        (entry() + b"1", "truncated: header describes 2 bytes of data, the file has 1"),
        (entry(), "truncated"),
        (entry() + b"123", "longer than its header says: header describes 2 bytes of data, the file has 3"),
        (header_bytes({}) + b"1", "longer than its header says"),
        (entry(shape=[2**70]) + b"12", "shape .* is not a list of sizes"),
        (entry(shape=[2**65, 2**65]) + b"12", "'a': "),
        (entry(shape=[2**63] * 64) + b"12", "'a': "),
        (entry(shape=[int("9" * 4000)]) + b"12", "'a': "),
        (entry(shape=[-2]) + b"12", "shape"),
        (entry(shape=[-1, -2]) + b"12", "shape"),
        (entry(shape=[True, 2]) + b"12", "shape"),
        (entry(shape=[2.0]) + b"12", "shape"),
        (entry(shape=["2"]) + b"12", "shape"),
        (entry(shape=[[2]]) + b"12", "shape"),
        (entry(shape=2) + b"12", "shape"),
        (entry(shape=None) + b"12", "shape"),
        (entry(shape={}) + b"12", "shape"),
        (entry(shape=[1] * 99 + [2]) + b"12", "shape .* is not a list of sizes"),
        (entry(shape=[3]) + b"12", r"U8 \[3\] needs 3 bytes, but data_offsets span 2"),
        (entry(shape=[2, 0]) + b"12", "needs 0 bytes, but data_offsets span 2"),
        (entry(dtype="F4", shape=[3]) + b"12", r"F4 \[3\]"),
        (entry(dtype="F6_E2M3", shape=[4]) + b"12", "needs 3 bytes"),
        (entry(dtype="Q8") + b"12", "unknown dtype 'Q8'"),
        (entry(dtype="u8") + b"12", "unknown dtype"),
        (entry(dtype=["U8"]) + b"12", "unknown dtype"),
        (entry(dtype=None) + b"12", "unknown dtype None"),
        (entry(data_offsets=[2, 0]) + b"12", "data_offsets"),
        (entry(data_offsets=[0]) + b"12", "data_offsets"),
        (entry(data_offsets=[0, 2, 2]) + b"12", "data_offsets"),
        (entry(data_offsets=[0.0, 2.0]) + b"12", "data_offsets"),
        (entry(data_offsets=[False, 2]) + b"12", "data_offsets"),
        (entry(data_offsets=[-2, 0]) + b"12", "data_offsets"),
        (entry(data_offsets={"0": 2}) + b"12", "data_offsets"),
        (entry(data_offsets=[2**64, 2**64 + 2]) + b"12", "'a'"),
        (entry(shape=...) + b"12", "expected dtype, shape and data_offsets"),
        (header_bytes({"a": None}), "expected dtype, shape and data_offsets, found None"),
        (header_bytes({"a": "U8"}), "expected dtype, shape and data_offsets"),
        (header_bytes({"__metadata__": {"a": 1}}), "__metadata__ is not a map of strings"),
        (header_bytes({"__metadata__": []}), "__metadata__ is not a map of strings"),
        (header_bytes({"__metadata__": "pt"}), "__metadata__ is not a map of strings"),
        (header_bytes([]), "expected an object, found list"),
        (header_bytes(b"null"), "expected an object, found NoneType"),
        (header_bytes(b""), "not JSON"),
        (header_bytes(b"{"), "not JSON"),
        (header_bytes(A + b"\0\0"), "not JSON"),
        (header_bytes(A + A), "not JSON"),
        (header_bytes(A + b'"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}') + b"123", "not JSON"),
        (header_bytes(A[:-1] + b',"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},') + b"123", "not JSON"),
        (header_bytes(b"\xef\xbb\xbf" + A), "not JSON"),
        (header_bytes(b'{"\xff":1}'), "not UTF-8 at byte 2"),
        (header_bytes(b'{"\xed\xa0\x80":1}'), "not UTF-8"),
        (header_bytes(b'{"a\x01":1}'), "not JSON"),
        (header_bytes(b'{"a":NaN}'), "NaN"),
        (header_bytes(b'{"a":-Infinity}'), "Infinity"),
        (header_bytes(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
        (header_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
        (header_bytes(b'{"a":' + b'{"a":' * 900 + b"1" + b"}" * 901), "'a'|nested too deeply"),
    ],
)
def test_what_the_reference_reader_refuses_is_refused_naming_the_fault(shard: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^s: .*{message}"):
        decode(shard)
    assert len(shard) < 8 or reference(shard) is None or b"1,1,1" in shard  # many dims: stricter on purpose


@pytest.mark.parametrize(
    "shard",
    [
        pytest.param(
            header_bytes(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), id="minus zero in a shape"
        ),
        pytest.param(header_bytes(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[-0,0]}}'), id="minus zero offset"),
        pytest.param(entry(shape=[0, 2**64], data_offsets=[0, 0]), id="a size of 65 bits beside a zero"),
        pytest.param(entry(shape=[2**40, 2**40, 0], data_offsets=[0, 0]), id="a product of 80 bits before a zero"),
        pytest.param(header_bytes(A.replace(b'"a"', b'"\\ud800"')) + b"12", id="half a surrogate pair in a name"),
        pytest.param(header_bytes(b'{"__metadata__":{"a":"\\udc00"}}'), id="half a surrogate pair in the metadata"),
    ],
)
def test_json_that_python_accepts_and_the_reference_reader_refuses_is_refused(shard: bytes) -> None:
    assert reference(shard) is None
    with pytest.raises(CheckpointError):
        decode(shard)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (header_bytes(b'{"a":1,' + A[1:]) + b"12", "duplicate key 'a'"),
        (header_bytes(b'{"__metadata__":{"x":"1","x":"1"},' + A[1:]) + b"12", "duplicate key 'x'"),
        (header_bytes(A[:-2] + b',"more":1}}') + b"12", "expected dtype, shape and data_offsets, found"),
        (header_bytes(b'{"a":["U8",[2],[0,2]]}') + b"12", "expected dtype, shape and data_offsets"),
        (entry(shape=[1] * 64 + [2]) + b"12", "is not a list of sizes"),
    ],
)
def test_ambiguous_headers_are_refused_although_the_reference_reader_takes_them(shard: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decode(shard)


@pytest.mark.parametrize(
    "shard",
    [
        header_bytes({}),
        header_bytes(b"  " + A + b" \n\t ") + b"12",
        header_bytes(b'{"a":{"data_offsets":[0,2],"shape":[2],"dtype":"\\u0055\\u0038"}}') + b"12",
        header_bytes({"": TWO}) + b"12",
        header_bytes({"z": TWO, "a": {**TWO, "data_offsets": [2, 4]}, "__metadata__": {"x": "y"}}) + b"1234",
        header_bytes(
            {"b": {**TWO, "shape": [0], "data_offsets": [2, 2]}, "a": TWO, "c": {**TWO, "data_offsets": [2, 4]}}
        )
        + b"1234",
        struct.pack("<Q", len(A)) + A + b"12",  # not padded
    ],
)
def test_unusual_but_sound_headers_are_read_as_the_reference_reader_reads_them(shard: bytes) -> None:
    body = shard[tensors.data_start(shard[:8], len(shard), "s") :]
    ours = {e.spec.name: Raw(e.spec.dtype, e.spec.shape, body[e.begin : e.end]) for e in decode(shard)}
    assert ours == reference(shard)


@settings(max_examples=600)
@given(
    st.data(),
    st.sampled_from(
        [
            {"a": Raw("BF16", (2, 3), bytes(range(12))), "b": Raw("F32", (), b"1234"), "é\n": Raw("U8", (0, 7), b"")},
            {"w": Raw("I64", (1,), b"12345678"), "x": Raw("F4", (2, 2), b"12"), "y": Raw("BOOL", (3,), b"\0\1\0")},
            {},
        ]
    ),
)
def test_a_mutated_header_is_refused_or_read_as_the_reference_reader_reads_it(
    data: st.DataObject, tensors: dict[str, Raw]
) -> None:
    whole = shard_bytes(tensors)
    (length,) = struct.unpack("<Q", whole[:8])
    text = data.draw(mutations(whole[8 : 8 + length]))
    claimed = data.draw(st.sampled_from([len(text), len(text), len(text), length, len(text) + 1]))
    shard = struct.pack("<Q", claimed) + text + whole[8 + length :]
    try:
        entries = decode(shard)
    except CheckpointError:
        return
    body = shard[8 + claimed :]
    assert {e.spec.name: Raw(e.spec.dtype, e.spec.shape, body[e.begin : e.end]) for e in entries} == reference(shard)


def test_an_error_stays_short_however_long_the_hostile_value_is() -> None:
    with pytest.raises(CheckpointError) as caught:
        decode(entry(dtype="x" * 100_000) + b"12")
    assert len(str(caught.value)) < 300


def test_the_json_of_a_header_is_what_any_json_parser_reads() -> None:
    text = tensors.encode(tensors.layout([TensorSpec('q"\n', "U8", (1, 2))]))[8:]
    assert json.loads(text)['q"\n'] == {"dtype": "U8", "shape": [1, 2], "data_offsets": [0, 2]}
