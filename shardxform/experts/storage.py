"""The saliency file as bytes: a safetensors file with one JSON record in its metadata. Pure but for `read`.

`encode` gives the same bytes for the same content: tensors in the reference writer's order, and one metadata key,
because the reference writer orders several at random. `decode` takes nothing on trust, and knows dtypes and names but
no meaning: what the numbers must be is checked by whoever makes a value of them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.ask.manifest_import import show
from shardxform.base import header
from shardxform.base.header import LENGTH_BYTES, Entry
from shardxform.base.strict_json import JsonError, dumps, parse_object
from shardxform.base.tensors import TensorSpec
from shardxform.errors import CheckpointError

__all__ = ["FIELDS", "KEY", "VERSION", "Arrays", "decode", "encode", "read"]

KEY: Final = "shardxform.saliency"
VERSION: Final = 1
MAX_BYTES: Final = 64 << 20  # 100 layers of 512 experts are 2 MB; what is larger is a shard given by mistake
FIELDS: Final = {"count": "I64", "reap": "F64", "ean": "F64", "gate": "F64", "peak": "F64"}
"""Statistic -> dtype, as the tensors are named; each has shape [E]."""

_NUMPY: Final = {"I64": "<i8", "F64": "<f8"}
_NAME: Final = re.compile(rf"(layers|mtp_layers)\.(0|[1-9][0-9]{{0,5}})\.({'|'.join(FIELDS)})")
_RECORD: Final = ("version", "model", "tokens", "runs")

Arrays = dict[str, dict[int, dict[str, NDArray[Any]]]]
"""`layers` or `mtp_layers` -> layer -> statistic -> array of E elements."""


def read(path: str | os.PathLike[str]) -> bytes:
    """Bytes of a file that can be a saliency file.

    Raises:
        CheckpointError: it cannot be read, is no regular file, or is larger than any saliency file.

    """
    where = os.fspath(path)
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{where}: expected a saliency file, found something that is no file")
        if info.st_size > MAX_BYTES:
            raise CheckpointError(f"{where}: {info.st_size} bytes; a saliency file has at most {MAX_BYTES}")
        return Path(path).read_bytes()
    except OSError as e:
        raise CheckpointError(f"{where}: {e.strerror or e}") from e


def encode(arrays: Arrays, record: Mapping[str, Any]) -> bytes:
    """The file that holds `arrays` and `record`, whose `version` is added here.

    Raises:
        CheckpointError: the record is not plain JSON.

    """
    tensors = {
        f"{scope}.{layer}.{field}": array
        for scope, layers in arrays.items()
        for layer, stats in layers.items()
        for field, array in stats.items()
    }
    specs = [TensorSpec(name, FIELDS[name.rsplit(".", 1)[1]], array.shape) for name, array in tensors.items()]
    entries = header.layout(specs)
    data = [tensors[entry.spec.name].astype(_NUMPY[entry.spec.dtype]).tobytes() for entry in entries]
    return b"".join([_header(entries, {"version": VERSION, **record}), *data])


def _header(entries: Iterable[Entry], record: Mapping[str, Any]) -> bytes:
    """`header.encode` with our record instead of the format of a model's shard."""
    try:
        top: dict[str, Any] = {"__metadata__": {KEY: dumps(record)}}
        for entry in entries:
            spec = entry.spec
            top[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (entry.begin, entry.end)}
        text = dumps(top).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as e:  # NaN, half a surrogate pair, what has no JSON form
        raise CheckpointError(f"saliency: expected runs and model of plain JSON values, found {e}") from e
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def decode(data: bytes, where: str) -> tuple[Arrays, dict[str, Any]]:
    """Arrays (read-only) and record of a file's bytes; `where` is its name for messages.

    Raises:
        CheckpointError: no safetensors file, none of ours, or tensors of other names, dtypes or ranks.

    """
    start = header.data_start(data[:LENGTH_BYTES], len(data), where)
    text = data[LENGTH_BYTES:start]
    entries = header.decode(text, len(data) - start, where)
    record = _record(text, where)
    arrays: Arrays = {"layers": {}, "mtp_layers": {}}
    for entry in entries:
        scope, layer, field = _place(entry.spec, where)
        array = np.frombuffer(data, _NUMPY[entry.spec.dtype], entry.spec.shape[0], offset=start + entry.begin)
        arrays[scope].setdefault(layer, {})[field] = array
    _check_complete(arrays, where)
    return arrays, record


def _record(text: bytes, where: str) -> dict[str, Any]:
    metadata = parse_object(text).get("__metadata__", {})  # header.decode has found it a map of strings
    if set(metadata) != {KEY}:
        found = show(sorted(metadata)) if metadata else "none"
        raise CheckpointError(f"{where}: not a saliency file: expected the metadata key '{KEY}', found {found}")
    try:
        record = parse_object(metadata[KEY].encode("utf-8"))
    except JsonError as e:
        raise CheckpointError(f"{where}: metadata '{KEY}' is {e}") from e
    version = record.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise CheckpointError(f"{where}: version: expected {VERSION}, found {show(version)}")
    if set(record) != set(_RECORD[1:]):
        raise CheckpointError(f"{where}: expected the record {', '.join(_RECORD)}, found {show(sorted(record))}")
    return record


def _place(spec: TensorSpec, where: str) -> tuple[str, int, str]:
    match = _NAME.fullmatch(spec.name)
    if match is None:
        raise CheckpointError(f"{where}: tensor {show(spec.name)}: expected a name such as 'layers.3.reap'")
    scope, layer, field = match.groups()
    if spec.dtype != FIELDS[field] or len(spec.shape) != 1:
        raise CheckpointError(
            f"{where}: tensor '{spec.name}': expected {FIELDS[field]} [experts], found {spec.dtype}"
            f" {show(list(spec.shape))}"
        )
    return scope, int(layer), field


def _check_complete(arrays: Arrays, where: str) -> None:
    for scope, layers in arrays.items():
        for layer, stats in layers.items():
            if missing := [field for field in FIELDS if field not in stats]:
                raise CheckpointError(f"{where}: tensor '{scope}.{layer}.{missing[0]}' is missing")
