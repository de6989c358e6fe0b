"""The header of a shard: pure functions between bytes and specs, no I/O.

Layout of a shard (safetensors): 8 bytes little-endian length N, N bytes of JSON, the data. `layout` and `encode`
reproduce the reference writer (tensors by dtype rank descending, then name; header padded with spaces to 8 bytes),
so a shard written through them equals what `safetensors.torch.save_file` writes, byte for byte. `decode` refuses
whatever the reference reader refuses, and what is ambiguous besides, such as a name that occurs twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from shardxform.base.strict_json import JsonError, dumps, parse_object
from shardxform.base.tensors import BITS, RANK, TensorSpec
from shardxform.errors import CheckpointError

__all__ = ["LENGTH_BYTES", "MAX_HEADER_BYTES", "Entry", "data_start", "decode", "encode", "layout"]

LENGTH_BYTES: Final = 8
MAX_HEADER_BYTES: Final = 100_000_000  # the reference reader's own limit
_LFS_POINTER: Final = b"version "
_LIMIT: Final = 1 << 64  # the reference reader computes in 64 bits, and refuses what overflows on the way


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header: its spec, and where its data begins, in bytes from the start of the data."""

    spec: TensorSpec
    begin: int

    @property
    def end(self) -> int:
        """First byte after the tensor, from the start of the data."""
        return self.begin + self.spec.nbytes


def data_start(prefix: bytes, file_bytes: int, where: str) -> int:
    """Offset of the data in a file of `file_bytes` bytes, from its first 8 bytes.

    Raises:
        CheckpointError: the file is shorter than its header claims, or the header exceeds the reader's limit.

    """
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointError(f"{where}: {file_bytes} bytes, too short for a safetensors header")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        why = f"header claims {length} bytes, the limit is {MAX_HEADER_BYTES}"
        if prefix[:LENGTH_BYTES] == _LFS_POINTER:
            why = "a pointer of Git LFS, which stands for the file; fetch it with: git lfs pull"
        raise CheckpointError(f"{where}: expected a safetensors file, found none: {why}")
    if LENGTH_BYTES + length > file_bytes:
        raise CheckpointError(f"{where}: header claims {length} bytes, but the file has {file_bytes}")
    return LENGTH_BYTES + length


def decode(text: bytes, data_bytes: int, where: str) -> tuple[Entry, ...]:
    """Entries of a header's JSON, by offset; `data_bytes` is what follows the header in the file.

    Raises:
        CheckpointError: anything the reference reader would refuse: bad JSON, unknown dtype, absurd shape, a hole, an
            overlap, data beyond the file or not reaching its end.

    """
    try:
        header = parse_object(text)
    except JsonError as e:
        raise CheckpointError(f"{where}: header is {e}") from e
    _check_metadata(header.pop("__metadata__", {}), where)
    entries = [_entry(name, info, where) for name, info in header.items()]
    entries.sort(key=lambda e: (e.begin, e.end))
    expected = 0
    for entry in entries:
        if entry.begin != expected:
            kind = "overlaps its predecessor" if entry.begin < expected else "leaves a hole before it"
            raise CheckpointError(
                f"{where}: tensor '{entry.spec.name}' {kind}: begins at {entry.begin}, expected {expected}"
            )
        expected = entry.end
    if expected != data_bytes:
        fault = "truncated" if expected > data_bytes else "longer than its header says"
        raise CheckpointError(f"{where}: {fault}: header describes {expected} bytes of data, the file has {data_bytes}")
    return tuple(entries)


def layout(specs: Iterable[TensorSpec]) -> tuple[Entry, ...]:
    """Place tensors in the reference writer's order: dtype rank descending, then name."""
    entries: list[Entry] = []
    begin = 0
    for spec in sorted(specs, key=lambda s: (-RANK[s.dtype], s.name)):
        entries.append(Entry(spec, begin))
        begin += spec.nbytes
    return tuple(entries)


def encode(entries: Iterable[Entry]) -> bytes:
    """Length prefix and header for entries in file order.

    `__metadata__` is exactly `{"format": "pt"}`: the reference writer orders several keys at random.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        spec = entry.spec
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (entry.begin, entry.end)}
    text = dumps(header).encode("utf-8")
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _check_metadata(metadata: object, where: str) -> None:
    if metadata is None:  # which the reference reader takes for none
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ is not a map of strings")


def _entry(name: str, info: object, where: str) -> Entry:
    at = f"{where}: tensor '{name}'"
    if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{at}: expected dtype, shape and data_offsets, found {_brief(info)}")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{at}: unknown dtype {_brief(dtype)}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{at}: shape {_brief(shape)} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{at}: data_offsets {_brief(offsets)} are not [begin, end]")
    bits = _bits(shape, dtype)
    if bits is None or bits % 8:
        fault = "is beyond 64 bits" if bits is None else "ends within a byte"
        raise CheckpointError(f"{at}: {dtype} {_brief(shape)} {fault}")
    if bits // 8 != offsets[1] - offsets[0]:
        span = offsets[1] - offsets[0]
        raise CheckpointError(f"{at}: {dtype} {_brief(shape)} needs {bits // 8} bytes, but data_offsets span {span}")
    return Entry(TensorSpec(name, dtype, tuple(shape)), offsets[0])


def _bits(shape: list[int], dtype: str) -> int | None:
    """Size in bits, or None when it overflows, multiplied in the reference reader's order."""
    total = 1
    for factor in (*shape, BITS[dtype]):
        total *= factor
        if total >= _LIMIT:
            return None
    return total


def _is_sizes(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(v) is int and 0 <= v < _LIMIT for v in value)  # bool is an int: type() tells them apart
    )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
