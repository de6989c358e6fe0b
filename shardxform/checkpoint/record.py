"""The record of an output, `shardxform.json`: what it was made from, by what, and a digest of every tensor.

One type, with the one reader and the one writer. It binds an output to its inputs while it is made (as
`.shardxform/plan.json`, before there are digests) and for good, and lets `verify` find a flipped bit without a source.
There is no clock in it and no host: the same inputs give the same bytes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from shardxform.base.digests import ALGORITHM, CHUNK_BYTES
from shardxform.base.strict_json import Fields, JsonError, parse_object, pretty

__all__ = [
    "FORMAT",
    "PROVENANCE",
    "VERSION",
    "Record",
    "RecordError",
    "ShardRecord",
    "is_as_written",
    "read_record",
    "read_written",
]

PROVENANCE: Final = "shardxform.json"
FORMAT: Final = "shardxform.provenance"
VERSION: Final = 2
"""Version 1 has no digests, and names its source by a sample of all values together."""

_VERSIONS: Final = (1, VERSION)
_MAX_BYTES: Final = 256 << 20


class RecordError(ValueError):
    """What is there is no record of an output; the message says why."""


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A shard as it was written: its size, the size of its header, and the header's SHA-256."""

    nbytes: int
    head_bytes: int
    head_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What is known of an output.

    Attributes:
        fingerprint: of the plan that it was made by.
        inputs: what the plan depends on, by name: command, options, source, and what computes where that decides bytes.
        files: every file -> SHA-256 of a small one; None for shards.
        shards: shard -> what it is.
        digests: tensor -> digest, see `digests`; None while it is made, and in records of version 1.
        summary, notes, facts: what was planned and found, for people; of a finished output.
        version: of the form that it was read in.

    """

    fingerprint: str
    inputs: Mapping[str, Any]
    files: Mapping[str, str | None]
    shards: Mapping[str, ShardRecord]
    digests: Mapping[str, str] | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @property
    def asked(self) -> Fields:
        """Its inputs, for who reads single ones."""
        return Fields(self.inputs)

    @classmethod
    def parse(cls, value: Mapping[str, object]) -> Record:
        """Check what a JSON file holds.

        Raises:
            RecordError: it is no record, or malformed; names the key.

        """
        if value.get("format") != FORMAT:
            raise RecordError(f"format: expected {FORMAT!r}")
        version = value.get("version")
        if version not in _VERSIONS:
            raise RecordError(f"version: expected one of {_VERSIONS}, found {version!r}; a later shardxform reads it")
        fingerprint = value.get("fingerprint")
        if not isinstance(fingerprint, str):
            raise RecordError("fingerprint: expected a text")
        notes = value.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise RecordError("notes: expected a list of texts")
        return cls(
            fingerprint=fingerprint,
            inputs=_object(value, "inputs"),
            files=_files(_object(value, "files")),
            shards={name: _shard(name, shard) for name, shard in _object(value, "shards").items()},
            digests=_digests(value),
            summary=_object(value, "summary", {}),
            notes=tuple(notes),
            facts=_object(value, "facts", {}),
            version=int(version),
        )

    def to_bytes(self) -> bytes:
        """The file; with digests it is a finished one, and ends with a checksum of all before it."""
        shards = {name: [each.nbytes, each.head_bytes, each.head_sha256] for name, each in self.shards.items()}
        out: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "inputs": self.inputs,
            "files": dict(self.files),
            "shards": shards,
        }
        if self.digests is not None:
            out |= {"summary": dict(self.summary), "notes": list(self.notes), "facts": dict(self.facts)}
            out["digests"] = {
                "algorithm": ALGORITHM,
                "chunk_bytes": CHUNK_BYTES,
                "tensors": dict(sorted(self.digests.items())),
            }
            out["checksum"] = blake3(pretty(out).encode()).hexdigest()
        return pretty(out).encode()


def is_as_written(data: bytes) -> bool:
    """Whether a finished record of this version is, byte for byte, one that was written: any flipped bit shows."""
    try:
        return Record.parse(parse_object(data)).to_bytes() == data
    except (JsonError, RecordError):
        return False


def read_record(path: Path) -> Record | None:
    """Read a record; None where there is none that can be believed, or a link in its place."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode) or path.stat().st_size > _MAX_BYTES:
            return None
        return Record.parse(parse_object(path.read_bytes()))
    except (OSError, JsonError, RecordError):
        return None


def read_written(path: Path) -> Record:
    """Read the finished record of what is taken for a source; links are followed, as caches of hubs have them.

    Raises:
        RecordError: it is none, or not as it was written.

    """
    try:
        if not stat.S_ISREG(path.stat().st_mode) or path.stat().st_size > _MAX_BYTES:
            raise RecordError("expected a file of a record's size")
        data = path.read_bytes()
        record = Record.parse(parse_object(data))
    except OSError as e:
        raise RecordError(str(e.strerror)) from e
    except JsonError as e:
        raise RecordError(str(e)) from e
    if record.digests is not None and record.to_bytes() != data:
        raise RecordError("its checksum differs: it was changed since shardxform wrote it")
    return record


def _object(value: Mapping[str, object], key: str, default: Mapping[str, object] | None = None) -> Mapping[str, Any]:
    found = value.get(key, default)
    if not isinstance(found, Mapping):
        raise RecordError(f"{key}: expected an object")
    return found


def _files(found: Mapping[str, Any]) -> Mapping[str, str | None]:
    for name, digest in found.items():
        if digest is not None and not isinstance(digest, str):
            raise RecordError(f"files[{name!r}]: expected a digest or null")
    return found


def _shard(name: str, found: object) -> ShardRecord:
    if isinstance(found, list) and len(found) == 3:
        nbytes, head_bytes, digest = found
        if type(nbytes) is int and type(head_bytes) is int and isinstance(digest, str) and 0 <= head_bytes <= nbytes:
            return ShardRecord(nbytes, head_bytes, digest)
    raise RecordError(f"shards[{name!r}]: expected size, header size and digest")


def _digests(value: Mapping[str, object]) -> Mapping[str, str] | None:
    if "digests" not in value:
        return None
    found = _object(value, "digests")
    if (found.get("algorithm"), found.get("chunk_bytes")) != (ALGORITHM, CHUNK_BYTES):
        raise RecordError(f"digests: expected {ALGORITHM} of chunks of {CHUNK_BYTES} bytes")
    tensors = _object(found, "tensors")
    if not all(isinstance(digest, str) for digest in tensors.values()):
        raise RecordError("digests.tensors: expected a text for every tensor")
    return tensors
