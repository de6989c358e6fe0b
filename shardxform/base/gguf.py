"""The head of a GGUF file: pure functions between bytes and values, no I/O.

Layout: magic, version, number of tensors, number of keys, the keys with their values, name, dimensions (fastest first),
type and offset of every tensor, zeros up to the alignment, the data, each tensor padded to the alignment. All integers
are little-endian. `decode_head` refuses whatever llama.cpp's own reader refuses, and keeps every value's bytes, so that
what is not changed is written byte for byte; `encode_head` writes what the `gguf` package's writer does.

Reference: ggml/docs/gguf.md and ggml/src/gguf.cpp of llama.cpp.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from shardxform.base.tensors import BITS, BLOCKS, Entry, TensorSpec, padded
from shardxform.errors import CheckpointError, PlanError

__all__ = [
    "ALIGNMENT",
    "ALIGNMENT_KEY",
    "MAX_HEAD_BYTES",
    "TYPES",
    "VERSION",
    "GgufHead",
    "KeyValue",
    "Kind",
    "NeedsMoreError",
    "Value",
    "alignment_of",
    "decode_head",
    "encode_head",
    "place",
    "read_head",
]

MAGIC: Final = b"GGUF"
VERSION: Final = 3
ALIGNMENT: Final = 32
"""Bytes that data begins at a multiple of, where `general.alignment` does not say otherwise."""

MAX_HEAD_BYTES: Final = 256 << 20
"""Largest head that is read or written: those of the largest vocabularies have a tenth of it."""

_VERSIONS: Final = (2, VERSION)  # the same but for files of big-endian machines, which 3 allows
_FIRST_BYTES: Final = 1 << 20
_MAX_DIMS: Final = 4
_MAX_NAME: Final = 63  # bytes; GGML's names end with a zero in 64
_MAX_DEPTH: Final = 4
_MAX_ALIGNMENT: Final = 1 << 20
_LIMIT: Final = 1 << 63
ALIGNMENT_KEY: Final = "general.alignment"

Kind = Literal[
    "UINT8",
    "INT8",
    "UINT16",
    "INT16",
    "UINT32",
    "INT32",
    "FLOAT32",
    "BOOL",
    "STRING",
    "ARRAY",
    "UINT64",
    "INT64",
    "FLOAT64",
]
"""What a value is; its number in a file is its place here."""

Value = int | float | str | list["Value"]
"""A value as Python has it; that of a BOOL is one too."""

_KINDS: Final[tuple[Kind, ...]] = (
    *("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY"),
    *("UINT64", "INT64", "FLOAT64"),
)
_PACKED: Final[dict[str, str]] = {
    "UINT8": "<B",
    "INT8": "<b",
    "UINT16": "<H",
    "INT16": "<h",
    "UINT32": "<I",
    "INT32": "<i",
    "FLOAT32": "<f",
    "BOOL": "<?",
    "UINT64": "<Q",
    "INT64": "<q",
    "FLOAT64": "<d",
}

TYPES: Final[dict[str, int]] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ2_XXS": 16,
    "IQ2_XS": 17,
    "IQ3_XXS": 18,
    "IQ1_S": 19,
    "IQ4_NL": 20,
    "IQ3_S": 21,
    "IQ2_S": 22,
    "IQ4_XS": 23,
    "I8": 24,
    "I16": 25,
    "I32": 26,
    "I64": 27,
    "F64": 28,
    "IQ1_M": 29,
    "BF16": 30,
    "TQ1_0": 34,
    "TQ2_0": 35,
    "MXFP4": 39,
    "NVFP4": 40,
    "Q1_0": 41,
    "Q2_0": 42,
}
"""GGML's number of every dtype that a GGUF file may hold; for sizes see `tensors.BITS` and `tensors.BLOCKS`."""

_DTYPES: Final = {number: dtype for dtype, number in TYPES.items()}


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key of a file's metadata, with the bytes of its value as they stand after its type."""

    key: str
    kind: Kind
    raw: bytes

    @classmethod
    def of(cls, key: str, kind: Kind, value: int | float | str) -> KeyValue:
        """Make one of a plain value.

        Raises:
            PlanError: the value is none of `kind`.

        """
        return cls(key, kind, _pack(key, kind, value))

    @classmethod
    def array(cls, key: str, kind: Kind, values: Sequence[int | float | str]) -> KeyValue:
        """Make one whose value is an array of values of `kind`.

        Raises:
            PlanError: one of them is none of `kind`.

        """
        head = struct.pack("<IQ", _KINDS.index(kind), len(values))
        return cls(key, "ARRAY", head + b"".join(_pack(key, kind, value) for value in values))

    @property
    def value(self) -> Value:
        """The value, decoded.

        Raises:
            CheckpointError: a text in it is no UTF-8.

        """
        reader = _Reader(self.raw, len(self.raw), f"key '{self.key}'")
        return _value(reader, self.kind)

    @property
    def count(self) -> int:
        """Number of the values of an array; 1 for a plain value."""
        return int.from_bytes(self.raw[4:12], "little") if self.kind == "ARRAY" else 1

    @property
    def items(self) -> Kind:
        """What the values of an array are; for a plain value what it is."""
        return _KINDS[int.from_bytes(self.raw[:4], "little")] if self.kind == "ARRAY" else self.kind

    def with_value(self, value: int) -> KeyValue:
        """The same key with another value of the same kind, and so in as many bytes.

        Raises:
            PlanError: the value does not fit.

        """
        return KeyValue.of(self.key, self.kind, value)


@dataclass(frozen=True, slots=True)
class GgufHead:
    """All that a file says before its data.

    Attributes:
        version: of the format, 2 or 3.
        metadata: keys and values, in the order of the file.
        entries: tensors in the order of the file, which is that of their data; shapes slowest dimension first.
        data_start: offset of the data in the file.
        alignment: of the data, and of every tensor in it, in bytes.

    """

    version: int
    metadata: tuple[KeyValue, ...]
    entries: tuple[Entry, ...]
    data_start: int
    alignment: int

    def find(self, key: str) -> KeyValue | None:
        """Give what the file says under `key`; None when it has no such key."""
        return next((each for each in self.metadata if each.key == key), None)


# -- writing ----------------------------------------------------------------------------------------------------------


def alignment_of(metadata: Iterable[KeyValue]) -> int:
    """Alignment that a file's metadata asks for.

    Raises:
        CheckpointError: it is no power of two.

    """
    found = next((each for each in metadata if each.key == ALIGNMENT_KEY), None)
    if found is None:
        return ALIGNMENT
    value = found.value if found.kind == "UINT32" else 0
    if not isinstance(value, int) or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise CheckpointError(f"{ALIGNMENT_KEY}: expected a power of two as UINT32, found {found.kind} {value or ''}")
    return value


def place(specs: Iterable[TensorSpec], alignment: int) -> tuple[Entry, ...]:
    """Place tensors one after the other in the order given, each at a multiple of `alignment`."""
    entries: list[Entry] = []
    begin = 0
    for spec in specs:
        end = begin + spec.nbytes
        entries.append(Entry(spec, begin, end))
        begin = padded(end, alignment)
    return tuple(entries)


def encode_head(metadata: Sequence[KeyValue], entries: Sequence[Entry], version: int = VERSION) -> bytes:
    """Everything before the data, padded to the alignment that `metadata` asks for.

    Raises:
        PlanError: what no reader takes: a key or a tensor twice, a long name, more than four dimensions, rows that are
            no whole blocks, a dtype that GGML has not.

    """
    for what, names in (("key", [each.key for each in metadata]), ("tensor", [e.spec.name for e in entries])):
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise PlanError(f"a GGUF file would hold the {what} '{twice}' twice")
    parts: list[bytes] = [MAGIC, struct.pack("<IQQ", version, len(entries), len(metadata))]
    for each in metadata:
        parts += (_text(each.key), struct.pack("<I", _KINDS.index(each.kind)), each.raw)
    for entry in entries:
        parts += (_text(entry.spec.name), _info(entry))
    parts.append(bytes(-sum(map(len, parts)) % alignment_of(metadata)))
    return b"".join(parts)


def _info(entry: Entry) -> bytes:
    """What follows a tensor's name."""
    spec = entry.spec
    fault = ""
    if spec.dtype not in TYPES:
        fault = "GGML has no such dtype"
    elif not 0 < len(spec.shape) <= _MAX_DIMS:
        fault = f"expected 1 to {_MAX_DIMS} dimensions"
    elif len(spec.name.encode()) > _MAX_NAME:
        fault = f"a name of more than {_MAX_NAME} bytes"
    elif spec.shape[-1] % BLOCKS.get(spec.dtype, (1, 0))[0]:
        fault = f"rows are no whole number of blocks of {BLOCKS[spec.dtype][0]}"
    if fault:
        raise PlanError(f"tensor '{spec.name}' {spec.dtype} {list(spec.shape)} cannot stand in a GGUF file: {fault}")
    dims = len(spec.shape)
    return struct.pack(f"<I{dims}QIQ", dims, *reversed(spec.shape), TYPES[spec.dtype], entry.begin)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data


def _pack(key: str, kind: Kind, value: object) -> bytes:
    try:
        if kind == "STRING" and isinstance(value, str):
            return _text(value)
        if kind in _PACKED and isinstance(value, int | float):
            return struct.pack(_PACKED[kind], value)
    except (struct.error, OverflowError, UnicodeEncodeError):
        pass
    raise PlanError(f"GGUF key '{key}': {value!r} is no {kind}")


# -- reading ----------------------------------------------------------------------------------------------------------


class NeedsMoreError(Exception):
    """The beginning of a file that was given ends within its head, which has `least` bytes or more."""

    def __init__(self, least: int) -> None:
        super().__init__(least)
        self.least = least


def read_head(beginning: Callable[[int], bytes], nbytes: int, where: str) -> tuple[GgufHead, str]:
    """Read the head of a file of which as little is looked at as need be.

    Args:
        beginning: gives the first so many bytes of the file.
        nbytes: of the whole file.
        where: what messages call it.

    Returns:
        the head, and the SHA-256 of all bytes up to the data, in hex.

    Raises:
        CheckpointError: see `decode_head`.

    """
    stop = min(_FIRST_BYTES, nbytes)
    while True:
        data = beginning(stop)
        try:
            head = decode_head(data, nbytes, where)
        except NeedsMoreError as e:
            stop = min(max(e.least, 2 * stop), nbytes, max(MAX_HEAD_BYTES, e.least))
            del data
            continue
        return head, hashlib.sha256(memoryview(data)[: head.data_start]).hexdigest()


def decode_head(data: bytes, nbytes: int, where: str) -> GgufHead:
    """Decode the head of a file of `nbytes` bytes that begins with `data`.

    Raises:
        CheckpointError: no GGUF file of version 2 or 3, or one that llama.cpp would refuse: counts and lengths beyond
            the file, a key or a name twice, unknown types, rows of no whole blocks, tensors that do not lie one after
            the other, data that the file does not hold, more bytes than the head speaks of.
        NeedsMoreError: `data` ends within the head.

    """
    reader = _Reader(data, nbytes, where)
    version = _version(reader)
    tensors, keys = reader.number(8), reader.number(8)
    for what, count, least in (("tensors", tensors, 24), ("keys", keys, 13)):
        if count * least > min(nbytes, MAX_HEAD_BYTES):
            raise CheckpointError(f"{where}: claims {count} {what}, more than a file of {nbytes} bytes can hold")
    metadata = tuple(_key_value(reader) for _ in range(keys))
    _refuse_twice(where, "key", (each.key for each in metadata))
    infos = [_tensor(reader) for _ in range(tensors)]
    _refuse_twice(where, "tensor", (entry.spec.name for entry in infos))
    try:
        alignment = alignment_of(metadata)
    except CheckpointError as e:
        raise CheckpointError(f"{where}: {e}") from e
    start = padded(reader.at, alignment) if infos else min(padded(reader.at, alignment), nbytes)
    head = GgufHead(version, metadata, tuple(infos), start, alignment)
    _refuse_misplaced(head, nbytes, where)
    if start > len(data):
        raise NeedsMoreError(start)
    return head


class _Reader:
    """Bytes of a file's beginning, and how far they were read."""

    def __init__(self, data: bytes, nbytes: int, where: str) -> None:
        self.data, self.nbytes, self.where, self.at = data, nbytes, where, 0

    def skip(self, count: int) -> None:
        """Go on by `count` bytes, which must be there."""
        end = self.at + count
        if end > self.nbytes:
            raise CheckpointError(
                f"{self.where}: truncated: its head needs {end} bytes or more, the file has {self.nbytes}"
            )
        if end > MAX_HEAD_BYTES:
            raise CheckpointError(f"{self.where}: a head of more than {MAX_HEAD_BYTES} bytes")
        if end > len(self.data):
            raise NeedsMoreError(end)
        self.at = end

    def take(self, count: int) -> bytes:
        """Give the next `count` bytes."""
        begin = self.at
        self.skip(count)
        return self.data[begin : self.at]

    def number(self, width: int) -> int:
        """Give the next unsigned integer of `width` bytes."""
        return int.from_bytes(self.take(width), "little")

    def text(self, what: str) -> str:
        """Give the next text."""
        data = self.take(self.number(8))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{self.where}: {what} is no UTF-8: {_brief(data)}") from e

    def kind(self, what: str) -> Kind:
        """Give the next type of a value."""
        number = self.number(4)
        if number >= len(_KINDS):
            raise CheckpointError(f"{self.where}: {what} has the unknown type {number}")
        return _KINDS[number]


def _version(reader: _Reader) -> int:
    where, magic = reader.where, reader.data[:4]
    if magic != MAGIC:
        why = f"begins with {_brief(magic)}"
        if magic == b"vers":
            why = "a pointer of Git LFS, which stands for the file; fetch it with: git lfs pull"
        raise CheckpointError(f"{where}: expected a GGUF file, found none: {why}")
    reader.skip(4)
    version = reader.number(4)
    if version and not version & 0xFFFF:
        raise CheckpointError(f"{where}: written for big-endian machines; expected a little-endian GGUF file")
    if version not in _VERSIONS:
        raise CheckpointError(f"{where}: version {version} of GGUF; expected 2 or 3, so convert it with llama.cpp")
    return version


def _key_value(reader: _Reader) -> KeyValue:
    key = reader.text("a key")
    kind = reader.kind(f"key '{_shown(key)}'")
    begin = reader.at
    _skip(reader, kind, key, 0)
    if kind == "STRING":  # those in arrays are not read here: tokens of some vocabularies are bytes
        _Reader(reader.data[begin : reader.at], reader.nbytes, reader.where).text(f"key '{_shown(key)}'")
    return KeyValue(key, kind, reader.data[begin : reader.at])


def _skip(reader: _Reader, kind: Kind, key: str, depth: int) -> None:
    """Go over a value."""
    if kind == "STRING":
        reader.skip(reader.number(8))
        return
    if kind != "ARRAY":
        reader.skip(struct.calcsize(_PACKED[kind]))
        return
    if depth == _MAX_DEPTH:
        raise CheckpointError(f"{reader.where}: key '{_shown(key)}': arrays in arrays, more than {_MAX_DEPTH} deep")
    items, count = reader.kind(f"key '{_shown(key)}'"), reader.number(8)
    if items == "STRING":
        _skip_texts(reader, count)
    elif items == "ARRAY":
        for _ in range(count):
            _skip(reader, items, key, depth + 1)
    else:
        reader.skip(count * struct.calcsize(_PACKED[items]))


def _skip_texts(reader: _Reader, count: int) -> None:
    """Go over texts, of which a vocabulary has a quarter of a million."""
    if count * 8 > reader.nbytes:
        reader.skip(count * 8)
    data, at, last = reader.data, reader.at, len(reader.data) - 8
    for _ in range(count):
        if at > last:
            reader.skip(at + 8 - reader.at)  # which says what is missing
        at += 8 + int.from_bytes(data[at : at + 8], "little")
    reader.skip(at - reader.at)


def _value(reader: _Reader, kind: Kind) -> Value:
    if kind == "STRING":
        return reader.text("its value")
    if kind == "ARRAY":
        items, count = reader.kind("an array"), reader.number(8)
        return [_value(reader, items) for _ in range(count)]
    form = _PACKED[kind]
    value: int | float = struct.unpack(form, reader.take(struct.calcsize(form)))[0]
    return value


def _tensor(reader: _Reader) -> Entry:
    name = reader.text("a tensor's name")
    at = f"{reader.where}: tensor '{_shown(name)}'"
    if len(name.encode()) > _MAX_NAME:
        raise CheckpointError(f"{at}: a name of more than {_MAX_NAME} bytes, which llama.cpp refuses")
    dims = reader.number(4)
    if dims > _MAX_DIMS:
        raise CheckpointError(f"{at}: {dims} dimensions; expected {_MAX_DIMS} or fewer")
    shape = tuple(reader.number(8) for _ in range(dims))[::-1]
    number = reader.number(4)
    dtype = _DTYPES.get(number)
    if dtype is None:
        raise CheckpointError(f"{at}: type {number}, which is unknown here: removed from GGML, or of a later one")
    if not all(shape) or math.prod(shape) * (BITS.get(dtype) or 8) >= _LIMIT:
        raise CheckpointError(f"{at}: dimensions {list(shape)}; expected sizes above 0 whose product fits 63 bits")
    elements = BLOCKS.get(dtype, (1, 0))[0]
    if (shape[-1] if shape else 1) % elements:
        raise CheckpointError(f"{at}: {dtype} {list(shape)}: rows are no whole number of blocks of {elements}")
    spec, begin = TensorSpec(name, dtype, shape), reader.number(8)
    return Entry(spec, begin, begin + spec.nbytes)


def _refuse_twice(where: str, what: str, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise CheckpointError(f"{where}: {what} '{_shown(name)}' occurs {count} times")


def _refuse_misplaced(head: GgufHead, nbytes: int, where: str) -> None:
    """Refuse tensors that do not lie one after the other, each at the next multiple of the alignment, in the file."""
    expected = end = 0
    for entry in head.entries:
        if entry.begin != expected:
            raise CheckpointError(
                f"{where}: tensor '{_shown(entry.spec.name)}' begins at {entry.begin} of the data, expected {expected}:"
                f" the end of the one before it, at a multiple of {head.alignment}"
            )
        end = entry.end
        expected = padded(end, head.alignment)
    found = nbytes - head.data_start
    if found < end:
        raise CheckpointError(f"{where}: truncated: its head describes {end} bytes of data, the file has {found}")
    if found > expected:
        raise CheckpointError(
            f"{where}: longer than its head says: it describes {expected} bytes of data, the file has {found}"
        )


def _shown(name: str) -> str:
    """Show a name on one line, cut where it is long."""
    text = name if name.isprintable() else ascii(name)[1:-1]
    return text if len(text) <= 80 else text[:77] + "..."


def _brief(data: bytes) -> str:
    return repr(data if len(data) <= 40 else data[:37])
