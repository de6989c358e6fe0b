"""GGUF files as a table: tensor name -> where its bytes are, with the keys of every file.

One file, or those that llama.cpp's own tool splits a model into, which are named after the first. Opening reads heads,
never tensor data. Nothing else in the folder is taken for a part of the model.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shardxform.base.gguf import GgufHead, KeyValue, read_head
from shardxform.base.tensors import ByteRange, TensorRef, uncollected
from shardxform.checkpoint.table import GGUF_SUFFIX, PROJECTOR, SPLIT_NAME, Checkpoint, Shard
from shardxform.errors import CheckpointError

if TYPE_CHECKING:
    from shardxform.checkpoint.remote.repository import Remote

__all__ = ["SPLIT_KEYS", "GgufModel", "assemble", "open_gguf", "read_split"]

SPLIT_KEYS: Final = ("split.no", "split.count", "split.tensors.count")
"""Keys that say which of several files one is."""

_ALIGNMENT: Final = "general.alignment"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """A model in GGUF.

    Attributes:
        table: its tensors and files; GGUF has no config.json, so that of the table is empty.
        heads: of every file, in order.
        name: of the first file.

    """

    table: Checkpoint
    heads: tuple[GgufHead, ...]
    name: str

    @property
    def where(self) -> str:
        """What people call it: its first file."""
        remote = self.table.remote
        return remote.named(self.name) if remote else str(self.table.root / self.name)

    @property
    def metadata(self) -> Mapping[str, KeyValue]:
        """Keys of all files, but for those that say which file it is."""
        return {each.key: each for head in self.heads for each in head.metadata if each.key not in SPLIT_KEYS}


Read = Callable[[str], tuple[GgufHead, Shard]]
"""Reads the head of a file, by its name."""


@uncollected()
def open_gguf(first: Path) -> GgufModel:
    """Open a model by its first file; see `find_gguf`.

    Raises:
        CheckpointError: a file is missing or malformed, or they do not belong together.

    """
    beside = (entry.name for entry in os.scandir(first.parent)) if first.parent.is_dir() else ()
    return assemble(first, lambda name: read_split(first.parent / name), beside)


def assemble(first: Path, read: Read, beside: Iterable[str], remote: Remote | None = None) -> GgufModel:
    """Put a model together from the heads of its files.

    Args:
        first: its first file.
        read: gives the head of each.
        beside: names of all files in its folder.
        remote: the repository that they are in, if they are not all here.

    Raises:
        CheckpointError: see `open_gguf`.

    """
    names = list(_names(first.name))
    root = first.parent
    found = [read(name) for name in names]
    heads = tuple(head for head, _ in found)
    if len(names) > 1 or _count_of(heads[0], "split.count") is not None:
        _refuse_mixed(root, names, heads)
    tensors: dict[str, TensorRef] = {}
    for (head, shard), name in zip(found, names, strict=True):
        for entry in head.entries:
            if entry.spec.name in tensors:
                other = tensors[entry.spec.name].ranges[0].file
                raise CheckpointError(f"{root / name}: tensor '{entry.spec.name}' is also in {other}")
            place = ByteRange(name, shard.data_start + entry.begin, entry.spec.nbytes)
            tensors[entry.spec.name] = TensorRef(entry.spec, (place,))
    if not tensors:
        raise CheckpointError(f"{first}: no tensor; expected the file of a model")
    shards = tuple(shard for _, shard in found)
    table = Checkpoint(root, {}, tensors, shards, (), tuple(_projectors(beside, names)), remote)
    return GgufModel(table=table, heads=heads, name=first.name)


def _names(first: str) -> Iterator[str]:
    match = SPLIT_NAME.fullmatch(first)
    if match is None:
        yield first
        return
    for number in range(1, int(match[3]) + 1):
        yield f"{match[1]}-{number:05d}-of-{match[3]}{GGUF_SUFFIX}"


def _projectors(beside: Iterable[str], names: Sequence[str]) -> Iterator[str]:
    """Files of the same folder that belong to models, and are left where they are: projectors of images."""
    for name in sorted(beside):
        if name.startswith(PROJECTOR) and name.endswith(GGUF_SUFFIX) and name not in names:
            yield name if name.isprintable() else ascii(name)[1:-1]


def read_split(path: Path) -> tuple[GgufHead, Shard]:
    """Read the head of a file, and what it is as a shard.

    Raises:
        CheckpointError: it is missing or malformed.

    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: expected a file")
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            head, digest = read_head(lambda stop: os.pread(file.fileno(), stop, 0), info.st_size, str(path))
    except FileNotFoundError as e:
        match = SPLIT_NAME.fullmatch(path.name)
        of = f"; the model is split into {int(match[3])} files, and this one" if match else ", which"
        raise CheckpointError(f"{path}: no such file{of} is needed") from e
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from e
    return head, Shard(path.name, info.st_size, head.data_start, digest, info.st_mtime_ns, head.entries)


def _refuse_mixed(root: Path, names: Sequence[str], heads: Sequence[GgufHead]) -> None:
    """Refuse files whose keys do not say that they are these parts of one model."""
    total = sum(len(head.entries) for head in heads)
    for number, (name, head) in enumerate(zip(names, heads, strict=True)):
        no, count, tensors = (_count_of(head, key) for key in SPLIT_KEYS)
        if (no, count) != (number, len(names)) or (number == len(names) - 1 and tensors != total):
            raise CheckpointError(
                f"{root / name}: says split.no {no}, split.count {count}, split.tensors.count {tensors}; expected"
                f" {number}, {len(names)} and {total}, by the files' names and tensors: files of several models, or one"
                " that was renamed"
            )
        if head.alignment != heads[0].alignment:
            raise CheckpointError(f"{root / name}: {_ALIGNMENT} is {head.alignment}, the first file's another")


def _count_of(head: GgufHead, key: str) -> int | None:
    found = head.find(key)
    value = found.value if found and found.kind not in ("STRING", "ARRAY", "BOOL") else None
    return value if isinstance(value, int) else None
