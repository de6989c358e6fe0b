"""An output head that config.json ties to the embeddings, and that is stored all the same: clients disagree on it.

transformers runs the stored one where the two differ; vLLM and SGLang skip it and run the embeddings. Most such heads
are a copy, which is harmless, so the values are looked at: in a few hundred places, or all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shardxform.base.tensors import ByteRange, TensorRef
from shardxform.checkpoint.table import Checkpoint
from shardxform.model.layout import Layout

__all__ = ["head_differs", "is_tied", "tied_notes"]

_PLACES: Final = 256
_BYTES: Final = 64  # of each place
_PIECE: Final = 1 << 20


def is_tied(layout: Layout) -> bool:
    """Tell whether config.json ties the output head to the embeddings."""
    return layout.family.holds("tied", layout.text, -1)


def tied_notes(checkpoint: Checkpoint, layout: Layout, *, whole: bool = False) -> Iterator[str]:
    """Say that a tied head is stored with other values than the embeddings.

    Args:
        checkpoint: to look at; a view will do.
        layout: of it, or of what it is a view of.
        whole: compare every byte, instead of a few places.

    """
    differs = head_differs(checkpoint, layout, whole=whole)
    if differs:
        yield (
            f"config.json ties the output head to the embeddings, but {layout.head} is stored and differs from them:"
            " transformers, and figures here, run what is stored, vLLM and SGLang the embeddings; set"
            " tie_word_embeddings to false, or remove the tensor"
        )
    elif differs is None:
        told = "config.json ties the output head to the embeddings"
        yield f"{told}, but {layout.head} is stored; the two were not compared"


def head_differs(checkpoint: Checkpoint, layout: Layout, *, whole: bool = False) -> bool | None:
    """Tell whether a stored head is another one than the embeddings it is tied to; None for not known.

    Nothing is fetched from a hub for it.
    """
    head = checkpoint.tensors.get(layout.head)
    embeddings = checkpoint.tensors.get(layout.embeddings)
    if head is None or embeddings is None or not is_tied(layout):
        return False
    if (head.spec.dtype, head.spec.shape) != (embeddings.spec.dtype, embeddings.spec.shape):
        return True
    if checkpoint.remote and checkpoint.remote.streamed:
        return None
    try:
        pairs = zip(_pieces(checkpoint, head, whole), _pieces(checkpoint, embeddings, whole), strict=True)
        return any(one != other for one, other in pairs)
    except OSError:  # said by whoever reads the shards
        return None


def _pieces(checkpoint: Checkpoint, ref: TensorRef, whole: bool) -> Iterator[bytes]:
    """Bytes of a tensor, all of them a piece at a time, or a few at places spread evenly."""
    size = _PIECE if whole else _BYTES
    stride = size if whole else max(size, ref.nbytes // _PLACES)
    for offset in range(0, ref.nbytes, stride):
        yield _read(checkpoint, ref, offset, min(size, ref.nbytes - offset))


def _read(checkpoint: Checkpoint, ref: TensorRef, offset: int, count: int) -> bytes:
    found = b""
    for piece in ref.ranges:
        if offset < piece.length and count > len(found):
            take = min(count - len(found), piece.length - offset)
            found += _read_range(checkpoint, ByteRange(piece.file, piece.offset + offset, take))
            offset = 0
        else:
            offset = max(0, offset - piece.length)
    return found


def _read_range(checkpoint: Checkpoint, piece: ByteRange) -> bytes:
    with (checkpoint.root / piece.file).open("rb", buffering=0) as file:
        file.seek(piece.offset)
        return file.read(piece.length)
