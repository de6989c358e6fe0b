"""A mark of what a checkpoint's values are, from a thousand places in its shards.

Two fine-tunes of one model have the same config, the same headers and the same sizes: only their values tell them
apart. It names the source of work that is taken up again; it decides nothing else, and is no proof of equality, which
`verify --source` gives.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from shardxform.checkpoint import Shard
from shardxform.errors import CheckpointError

__all__ = ["sampled"]

_PLACES: Final = 1024
_BYTES: Final = 64  # of each place


def sampled(root: Path, shards: Iterable[Shard]) -> str:
    """SHA-256 of 64 bytes at about 1,024 places, spread evenly over the shards in the order of their names.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    ordered = sorted(shards, key=lambda shard: shard.name)
    stride = max(_BYTES, sum(shard.nbytes for shard in ordered) // _PLACES)
    digest = hashlib.sha256()
    for shard in ordered:
        try:
            with (root / shard.name).open("rb", buffering=0) as file:
                for offset in range(0, shard.nbytes, stride):
                    digest.update(os.pread(file.fileno(), _BYTES, offset + (stride - _BYTES) // 2))
        except OSError as e:
            raise CheckpointError(f"{root / shard.name}: {e.strerror}") from e
    return digest.hexdigest()
