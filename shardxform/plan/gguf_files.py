"""Files of GGUF in a plan: tensors laid out into one, or split as llama.cpp does, with their heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from shardxform.base import gguf
from shardxform.base.gguf import KeyValue
from shardxform.base.tensors import TensorSpec, split
from shardxform.errors import PlanError
from shardxform.plan.plan import ShardPlan, refuse_same_names

__all__ = ["gguf_names", "gguf_shard", "lay_out_gguf"]

_MOST_SPLITS: Final = 0xFFFF


def lay_out_gguf(
    metadata: Sequence[KeyValue],
    specs: Iterable[TensorSpec],
    max_shard_bytes: int | None = None,
    *,
    stem: str = "model",
) -> tuple[ShardPlan, ...]:
    """Lay tensors out into one GGUF file, or split them as llama.cpp does, in the order given.

    The first of several files has all of `metadata`, each has its number, theirs and that of all tensors.

    Args:
        metadata: keys and values, in order; none of `split.*`.
        specs: tensors, in order, whose shapes have the slowest dimension first and whose dtypes GGML has.
        max_shard_bytes: most bytes of data in one file, but for a larger tensor alone; None for one file.
        stem: what names begin with: `model.gguf`, or `model-00001-of-00002.gguf`.

    Raises:
        PlanError: no tensor at all, a key or a name twice, or what cannot stand in a GGUF file.

    """
    specs = list(specs)
    groups = split(specs, max_shard_bytes) if max_shard_bytes else [specs]
    if not specs:
        raise PlanError("the output would hold no tensor")
    refuse_same_names(specs)
    shared = [each for each in metadata if each.key == gguf.ALIGNMENT_KEY]
    return tuple(
        gguf_shard(name, [*(shared if number else metadata), *_split_keys(number, groups)], group)
        for number, (name, group) in enumerate(zip(gguf_names(stem, len(groups)), groups, strict=True))
    )


def gguf_names(stem: str, count: int) -> list[str]:
    """`STEM.gguf` for one file, else `STEM-0000i-of-0000n.gguf`: llama.cpp finds the others by the first's name."""
    if count == 1:
        return [f"{stem}.gguf"]
    return [f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def gguf_shard(
    name: str, metadata: Sequence[KeyValue], specs: Iterable[TensorSpec], version: int = gguf.VERSION
) -> ShardPlan:
    """One GGUF file of tensors in the order given.

    Raises:
        CheckpointError: `metadata` asks for an alignment that there is none of.
        PlanError: what cannot stand in a GGUF file, or a head beyond what is read.

    """
    alignment = gguf.alignment_of(metadata)
    entries = gguf.place(specs, alignment)
    head = gguf.encode_head(metadata, entries, version)
    if len(head) > gguf.MAX_HEAD_BYTES:
        raise PlanError(f"{name}: a head of {len(head)} bytes, more than {gguf.MAX_HEAD_BYTES}")
    return ShardPlan(name, entries, head, alignment)


def _split_keys(number: int, groups: Sequence[Sequence[TensorSpec]]) -> tuple[KeyValue, ...]:
    if len(groups) == 1:
        return ()
    if len(groups) > _MOST_SPLITS:
        raise PlanError(f"{len(groups)} GGUF files, of which there can be {_MOST_SPLITS}; give a larger shard size")
    return (
        KeyValue.of("split.no", "UINT16", number),
        KeyValue.of("split.count", "UINT16", len(groups)),
        KeyValue.of("split.tensors.count", "INT32", sum(map(len, groups))),
    )
