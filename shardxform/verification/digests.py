"""Verification against the record's own digests: whether every bit is as it was written, without a source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardxform.checkpoint.record import PROVENANCE, Record, RecordError, is_as_written
from shardxform.checkpoint.table import Checkpoint, is_plain_name
from shardxform.execution.outdir import is_ours
from shardxform.verification.findings import Findings

__all__ = ["check_digests"]


def check_digests(record: Mapping[str, Any], checkpoint: Checkpoint, findings: Findings) -> Mapping[str, str] | None:
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
