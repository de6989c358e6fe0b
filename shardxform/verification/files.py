"""Verification of files: what cannot be read, what is left over, and what shardxform.json recorded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Final

from shardxform.base.strict_json import JsonError, parse_object
from shardxform.checkpoint.record import FORMAT as RECORD_FORMAT
from shardxform.checkpoint.record import PROVENANCE, Record, RecordError, is_as_written
from shardxform.checkpoint.sidecars import fault_of, is_document
from shardxform.checkpoint.table import CONFIG, INDEX, WORK, Checkpoint, is_plain_name, scan
from shardxform.execution.output import is_ours
from shardxform.model.families.base import Wrapper
from shardxform.verification.findings import Findings

__all__ = ["check_digests", "check_files", "check_record", "check_sidecars", "file_bytes", "read_checkpoint"]

_TOKENIZERS: Final = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*")


def read_checkpoint(root: Path, findings: Findings) -> tuple[Checkpoint | None, frozenset[str]]:
    """Scan `root` and report what is wrong with config, index and headers.

    Returns:
        the checkpoint as far as it could be read, and the tensors that lie in shards that could not.

    """
    try:
        checkpoint, errors = scan(root)
    except (OSError, ValueError, RecursionError) as e:  # a name that no file can have, a directory that is closed
        findings.problem("unreadable", ".", f"cannot be read: {e}")
        return None, frozenset()
    for error in errors:
        _report(str(error), root, findings)
    if checkpoint is None:
        return None, frozenset()
    index = _json(root / INDEX)
    lost = _lost(index, checkpoint, findings)
    if not errors:
        _check_total_size(index, checkpoint, findings)
    return checkpoint, lost


def check_files(root: Path, checkpoint: Checkpoint | None, findings: Findings) -> None:
    """Report what unfinished work left behind, and shards that no index names."""
    known = {shard.name for shard in checkpoint.shards} if checkpoint else set()
    listed = _json(root / INDEX).get("weight_map")
    known |= {name for name in listed.values() if isinstance(name, str)} if isinstance(listed, Mapping) else set()
    try:
        names = sorted(entry.name for entry in os.scandir(root))
    except OSError as e:
        findings.problem("unreadable", ".", f"cannot be listed: {e.strerror}")
        return
    for name in names:
        if name.endswith(".partial") or name == WORK:
            findings.problem("unfinished", name, "left by an unfinished run; run the same command again to go on")
        elif name.endswith(".safetensors") and checkpoint and name not in known:
            findings.problem("stray-shard", name, "not in the index, yet some clients load every .safetensors file")


def check_sidecars(checkpoint: Checkpoint, wrapper: Wrapper | None, findings: Findings) -> None:
    """Report small files that no client can read, and warn of those without which clients do not start."""
    for sidecar in checkpoint.sidecars:
        try:
            fault = fault_of(checkpoint.root / sidecar.name, sidecar.name)
        except OSError as e:
            fault = f"cannot be read: {e.strerror}"
        if fault:
            findings.problem("sidecar", sidecar.name, fault)
    names = [sidecar.name.lower() for sidecar in checkpoint.sidecars]
    if not any(fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZERS):
        findings.warn("tokenizer", ".", "no tokenizer; clients need one beside the shards")
    if wrapper and wrapper.vision and "preprocessor_config.json" not in names:
        findings.warn("preprocessor", ".", f"no preprocessor_config.json, which vLLM needs for {wrapper.architecture}")


def check_record(root: Path, findings: Findings) -> Mapping[str, object]:
    """Hold the files against shardxform.json, where there is one.

    Returns:
        the record, with the `inputs` that the output was made from; empty without one.

    """
    if not (root / PROVENANCE).exists():
        return {}
    record = _json(root / PROVENANCE)
    files, inputs = record.get("files"), record.get("inputs")
    if record.get("format") != RECORD_FORMAT or not isinstance(files, Mapping) or not isinstance(inputs, Mapping):
        findings.problem("record", PROVENANCE, "damaged: not a record as shardxform writes it")
        return {}
    for name, digest in files.items():
        path = PurePosixPath(name)
        if ".." in path.parts or path.is_absolute():
            findings.problem("record", PROVENANCE, f"names a file outside the checkpoint: {name!r}")
        elif not (root / path).is_file():
            findings.problem("record", name, "missing, though shardxform wrote it")
        elif digest is not None and _sha256(root / path) != digest:
            report = findings.warn if is_document(name) else findings.problem
            report("record", name, "changed since shardxform wrote it")
    return record


def file_bytes(path: Path) -> Iterator[bytes]:
    """Contents of a file, a piece at a time."""
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def _report(error: str, root: Path, findings: Findings) -> None:
    """One error of `scan`, which begins with the path it is about."""
    if error.startswith(f"{root}: "):
        code = "index" if INDEX in error else "shard" if "safetensors" in error else "config"
        findings.problem(code, ".", error.removeprefix(f"{root}: "))
        return
    where, _, message = error.removeprefix(f"{root}{os.sep}").partition(": ")
    code = {CONFIG: "config", INDEX: "index"}.get(where, "sidecar")
    if where.endswith(".safetensors"):
        code = "duplicate" if message.startswith("tensor '") and "' is also in " in message else "shard"
    findings.problem(code, where, message)


def _lost(index: Mapping[str, Any], checkpoint: Checkpoint, findings: Findings) -> frozenset[str]:
    read = {shard.name for shard in checkpoint.shards}
    lost: dict[str, list[str]] = {}
    for name, shard in (index.get("weight_map") or {}).items():
        if shard not in read and name not in checkpoint.tensors:
            lost.setdefault(shard, []).append(name)
    for shard, names in lost.items():
        findings.problem("shard", shard, f"{len(names)} tensors cannot be checked, such as {names[0]}")
    return frozenset(name for names in lost.values() for name in names)


def _check_total_size(index: Mapping[str, object], checkpoint: Checkpoint, findings: Findings) -> None:
    metadata = index.get("metadata")
    if index and not isinstance(metadata, Mapping):
        found = "null" if metadata is None else repr(metadata)
        findings.problem("index", INDEX, f"metadata: expected an object, found {found}, which transformers refuses")
        return
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    if index and total != checkpoint.nbytes:
        findings.warn("total-size", INDEX, f"metadata.total_size is {total}, the tensors have {checkpoint.nbytes}")


def _json(path: Path) -> Mapping[str, object]:
    try:
        return parse_object(path.read_bytes())
    except (OSError, JsonError):
        return {}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        for piece in file_bytes(path):
            digest.update(piece)
    except OSError as e:
        return f"unreadable: {e.strerror}"
    return digest.hexdigest()


# -- digests of the record ----------------------------------------------------------------------------------------


def check_digests(record: Mapping[str, object], checkpoint: Checkpoint, findings: Findings) -> Mapping[str, str] | None:
    """Hold what a record says of itself and of headers against what is there; tensors are left to who reads them.

    Args:
        record: shardxform.json; empty without one.
        checkpoint: the output.
        findings: where what differs is told.

    Returns:
        digests of the tensors that are there; None without any, as in records of earlier versions.

    """
    if not record:
        return None
    try:
        read = Record.parse(record)
    except RecordError as e:
        findings.problem("record", PROVENANCE, f"damaged: {e}")
        return None
    for name, shard in read.shards.items():
        path = checkpoint.root / name
        if is_plain_name(name) and path.is_file() and not is_ours(path, None, shard):
            findings.problem("record", name, "its size or its header is not what shardxform wrote")
    if read.digests is None:
        return None
    if not is_as_written((checkpoint.root / PROVENANCE).read_bytes()):
        findings.problem("record", PROVENANCE, "changed since shardxform wrote it: its checksum differs")
    for name in sorted(read.digests.keys() ^ checkpoint.tensors.keys()):
        gone = name not in checkpoint.tensors
        findings.problem(
            "digest", name, "missing, though shardxform wrote it" if gone else "its digest is not recorded"
        )
    return {name: digest for name, digest in read.digests.items() if name in checkpoint.tensors}
