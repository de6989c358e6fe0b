"""What a checkpoint is, down to its values: its config, its shards' headers, and a mark of every tensor.

Two fine-tunes of one model, and two prunings of one model to the same count, have the same config, the same headers
and the same sizes: only their values tell them apart. Whatever is kept on disk between two commands names the identity
of what it was made from, and is compared by it.

Small tensors (the smallest that have 64 MiB together) are read whole; of a larger one, 64 bytes at one place for every
4 MiB, for every slab of its first dimension where it has three or more, and at no fewer than four places. So a mark
misses what was changed between its places, and nothing else: it marks values, and `verify` proves them. Where the
content of a whole file is known for nothing, from the hub's listing or from the names in its cache, that is used.
Modification times are not part of it: touching a file changes nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from shardxform.base.digests import CHUNK_BYTES
from shardxform.base.strict_json import compact_config, dumps
from shardxform.checkpoint.table import Checkpoint, Shard
from shardxform.errors import CheckpointError

__all__ = [
    "Identity",
    "ShardIdentity",
    "changed_values",
    "config_sha256",
    "identify",
    "identity_when_asked",
    "names_of",
    "values_difference",
    "whole_marks",
]

_WHOLE: Final = 64 << 20  # bytes of small tensors that are read whole
_STRIDE: Final = 4 << 20  # one place for every so many bytes of a larger one
_PLACE: Final = 64  # bytes
_FEWEST: Final = 4  # places of a tensor
_MOST: Final = 4096
_MARK: Final = 8  # bytes that a tensor contributes
_BUFFER: Final = 1 << 20
_AT_ONCE: Final = 16 << 10  # bytes that are read in one go, though only places of them count: as many pages of the file
_READERS: Final = 8
_SHA256: Final = re.compile("[0-9a-f]{64}")
_FILE: Final = "sha256:"  # begins what stands for the marks of a shard whose values are not at hand


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIdentity:
    """What one shard is.

    Attributes:
        nbytes: size of the file.
        header: SHA-256 of length prefix and JSON.
        marks: 8 bytes for every tensor, in the order of their data; empty where the values are not at hand.
        sha256: of the whole file, where that is known without reading it; else empty.

    """

    nbytes: int
    header: str
    marks: bytes = b""
    sha256: str = ""

    def differs(self, other: ShardIdentity) -> bool | None:
        """Whether two shards of the same header hold other values; None where nothing is known of both."""
        if self.sha256 and other.sha256:
            return self.sha256 != other.sha256
        return self.marks != other.marks if self.marks and other.marks else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a checkpoint is, wherever it lies.

    Attributes:
        config: SHA-256 of config.json, whatever its formatting.
        shards: name -> what it is.
        repository: `hf://owner/name@commit` of one that is read from the hub; else empty.

    """

    config: str
    shards: Mapping[str, ShardIdentity]
    repository: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over `to_dict`: the same for the same checkpoint, read in the same way."""
        return hashlib.sha256(dumps(self.to_dict()).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for what is bound to it: of every shard the marks, or the SHA-256 of the file in their stead."""
        known = {"repository": self.repository} if self.repository else {}
        ordered = sorted(self.shards.items())
        shards = {name: [shard.nbytes, shard.header] for name, shard in ordered}
        values = {name: _text(shard) for name, shard in ordered}
        return {**known, "config": self.config, "shards": shards, "values": values}

    def described(self) -> dict[str, Any]:
        """All that is known, for what may be compared with a checkpoint that is read in another way."""
        files = {name: shard.sha256 for name, shard in sorted(self.shards.items()) if shard.marks and shard.sha256}
        return {**self.to_dict(), **({"files": files} if files else {})}

    @classmethod
    def from_dict(cls, value: object) -> Identity | None:
        """Read what `to_dict` or `described` gave; None for anything else, such as what an earlier version wrote."""
        if not isinstance(value, Mapping):
            return None
        config, repository = value.get("config"), value.get("repository", "")
        shards, values, files = map(_mapping, (value.get("shards"), value.get("values"), value.get("files", {})))
        if not isinstance(config, str) or shards is None or values is None or files is None:
            return None
        read = {str(name): _read(shard, values.get(name, ""), files.get(name, "")) for name, shard in shards.items()}
        whole = {name: shard for name, shard in read.items() if shard is not None}
        if len(whole) != len(read) or not isinstance(repository, str):
            return None
        return cls(config=config, shards=whole, repository=repository)

    def difference(self, other: Identity, names: Mapping[str, Sequence[str]] | None = None) -> str:
        """Say in what `other` differs from this; empty where nothing that is known of both does.

        Args:
            other: the one that is at hand.
            names: shard -> the tensors of `other` in the order of their data, by which one is named.

        """
        if self.config != other.config:
            return "another config.json"
        for name in sorted({*self.shards, *other.shards}):
            one, two = self.shards.get(name), other.shards.get(name)
            if one is None or two is None:
                return f"{name} is in one of them only"
            if (one.nbytes, one.header) != (two.nbytes, two.header):
                return f"{name} holds other tensors"
            if one.differs(two):
                return f"other values in {_which(name, one.marks, two.marks, (names or {}).get(name, ()))}"
        return ""

    def is_comparable(self, other: Identity) -> bool:
        """Whether values can be told apart: of every shard of both, the same kind of mark is known."""
        shared = self.shards.keys() & other.shards.keys()
        return all(self.shards[name].differs(other.shards[name]) is not None for name in shared)


def identify(checkpoint: Checkpoint) -> Identity:
    """Read the marks of a checkpoint's values; of a view, those of the shards that it is a view of.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    remote, shards = checkpoint.remote, checkpoint.shards
    found = [b""] * len(shards) if remote else _all_marks(checkpoint.root, shards)
    return Identity(
        config=config_sha256(checkpoint.config),
        shards={
            shard.name: ShardIdentity(
                nbytes=shard.nbytes,
                header=shard.header_sha256,
                marks=marked,
                sha256=(remote and remote.sha256(shard.name)) or _blob(checkpoint.root / shard.name),
            )
            for shard, marked in zip(shards, found, strict=True)
        },
        repository=str(remote) if remote else "",
    )


def whole_marks(identity: Identity, shards: Sequence[Shard]) -> dict[str, bytes]:
    """First bytes of the digests of tensors that an identity has read whole, and whose digest is of one chunk."""
    largest, out = _largest_whole(shards), dict[str, bytes]()
    for shard in shards:
        marks = identity.shards[shard.name].marks
        for at, (spec, begin, end) in enumerate(shard.entries):
            nbytes = end - begin
            whole = nbytes < largest[0] or (nbytes == largest[0] and (nbytes, shard.name, at) <= largest)
            if whole and 0 < nbytes <= CHUNK_BYTES:
                out[spec.name] = marks[at * _MARK : (at + 1) * _MARK]
    return out


def identity_when_asked(checkpoint: Checkpoint) -> Callable[[], Identity]:
    """Give what does `identify` once, when it is first called: a few hundred thousand places of a disk are read."""
    return functools.cache(functools.partial(identify, checkpoint))


def names_of(shards: Iterable[Shard]) -> dict[str, tuple[str, ...]]:
    """Names of the tensors of every shard, in the order of their data."""
    return {shard.name: tuple(entry.spec.name for entry in shard.entries) for shard in shards}


def config_sha256(config: Mapping[str, object]) -> str:
    """What identifies a config, whatever its formatting."""
    return hashlib.sha256(compact_config(config).encode()).hexdigest()


def values_difference(old: object, new: object, names: Mapping[str, Sequence[str]]) -> str:
    """Say which values differ between the `values` of two recorded identities of the same headers."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return "not recorded tensor by tensor, by an earlier version"
    for name, text in new.items():
        if old.get(name) != text:
            one, other = (_decoded(str(each)) or b"" for each in (old.get(name), text))
            return f"other values in {_which(name, one, other, names.get(name, ()))}"
    return ""


def changed_values(root: Path, shards: Sequence[Shard], recorded: object) -> str:
    """Look at the values of shards once more, and say in what they differ from those of a recorded identity.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    known = Identity.from_dict(recorded)
    if known is None:
        return "its values were not recorded"
    found = {shard.name: marks for shard, marks in zip(shards, _all_marks(root, shards), strict=True)}
    names = names_of(shards)
    for name, marks in found.items():
        if name in known.shards and known.shards[name].marks != marks:
            return f"other values in {_which(name, known.shards[name].marks, marks, names[name])}"
    return ""


# -- marks ------------------------------------------------------------------------------------------------------------


def _all_marks(root: Path, shards: Sequence[Shard]) -> list[bytes]:
    """Marks of every shard; read side by side, since a cold disk answers one after the other slowly."""
    largest = _largest_whole(shards)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="marks") as pool:
        return list(pool.map(lambda shard: _marks(root, shard, largest), shards))


def _largest_whole(shards: Sequence[Shard]) -> tuple[int, str, int]:
    """The last of the smallest tensors that have `_WHOLE` bytes together: its size, shard and place in it."""
    total, largest = 0, (-1, "", 0)
    counts = Counter(entry.nbytes for shard in shards for entry in shard.entries)
    for nbytes, count in sorted(counts.items()):
        if total + nbytes * count > _WHOLE:
            alike = sorted((s.name, at) for s in shards for at, e in enumerate(s.entries) if e.nbytes == nbytes)
            fitting = (_WHOLE - total) // nbytes
            return (nbytes, *alike[fitting - 1]) if fitting else largest
        total, largest = total + nbytes * count, (nbytes + 1, "", 0)
    return largest


def _marks(root: Path, shard: Shard, largest: tuple[int, str, int]) -> bytes:
    """8 bytes for every tensor of a shard."""
    path = root / shard.name
    pieces_of = functools.cache(_pieces)  # a shard has a few kinds of tensors
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            if hasattr(os, "posix_fadvise"):  # of 64 bytes the kernel would read 128 KiB ahead
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            marks = []
            for at, (spec, begin, end) in enumerate(shard.entries):
                nbytes = end - begin
                whole = nbytes < largest[0] or (nbytes == largest[0] and (nbytes, shard.name, at) <= largest)
                marks.append(_mark(fd, shard.data_start + begin, nbytes, pieces_of(nbytes, spec.shape, whole)))
            return b"".join(marks)
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from e


def _mark(fd: int, start: int, nbytes: int, pieces: Sequence[tuple[int, int]]) -> bytes:
    """What a tensor contributes: of `nbytes` from `start` on, the digest of some pieces."""
    if nbytes <= _AT_ONCE:
        data = os.pread(fd, nbytes, start)
        return blake3(b"".join([data[offset : offset + count] for offset, count in pieces])).digest(_MARK)
    if pieces[0][1] <= _PLACE:
        return blake3(b"".join([os.pread(fd, count, start + offset) for offset, count in pieces])).digest(_MARK)
    digest = blake3()
    for offset, count in pieces:
        digest.update(os.pread(fd, count, start + offset))
    return digest.digest(_MARK)


def _pieces(nbytes: int, shape: tuple[int, ...], whole: bool) -> tuple[tuple[int, int], ...]:
    """What is read of a tensor: offsets from its beginning, and lengths."""
    slabs = shape[0] if len(shape) > 2 else 0
    count = min(max(_FEWEST, math.ceil(nbytes / _STRIDE), slabs), _MOST)
    if whole or nbytes <= count * _PLACE:
        return tuple((offset, min(_BUFFER, nbytes - offset)) for offset in range(0, nbytes, _BUFFER))
    cuts = [nbytes * place // count for place in range(count + 1)]
    return tuple(((begin + end - _PLACE) // 2, _PLACE) for begin, end in pairwise(cuts))


def _blob(path: Path) -> str:
    """SHA-256 of a file by its name in the hub client's cache, where a link leads there; else empty."""
    real = Path(os.path.realpath(path))
    return real.name if real.parent.name == "blobs" and _SHA256.fullmatch(real.name) else ""


def _which(name: str, one: bytes, other: bytes, tensors: Sequence[str]) -> str:
    """Name the first tensor of a shard whose mark differs, and count the others; the shard, where that is not known."""
    pairs = range(0, min(len(one), len(other)), _MARK)
    odd = [at // _MARK for at in pairs if one[at : at + _MARK] != other[at : at + _MARK]]
    if not odd or odd[0] >= len(tensors):
        return name
    more = f" and {len(odd) - 1:,} more of {name}" if len(odd) > 1 else ""
    return f"tensor '{tensors[odd[0]]}'{more}"


def _text(shard: ShardIdentity) -> str:
    return base64.b64encode(shard.marks).decode() if shard.marks else f"{_FILE}{shard.sha256}"


def _read(shard: object, values: object, file: object) -> ShardIdentity | None:
    """One shard of a dictionary; None when it is none of ours."""
    if (
        not isinstance(shard, (list, tuple))
        or len(shard) != 2
        or not (isinstance(values, str) and isinstance(file, str))
    ):
        return None
    nbytes, head = shard
    if type(nbytes) is not int or not isinstance(head, str):
        return None
    if values.startswith(_FILE):
        return ShardIdentity(nbytes=nbytes, header=head, sha256=values.removeprefix(_FILE))
    marks = _decoded(values)
    return None if marks is None else ShardIdentity(nbytes=nbytes, header=head, marks=marks, sha256=file)


def _mapping(value: object) -> Mapping[Any, Any] | None:
    return value if isinstance(value, Mapping) else None


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # a binascii.Error is one
        return None
