"""What stands for quantized weights in a checkpoint of MLX, and the items that write it: stacks of experts, or members.

A stack is written as one matrix, a member at a time, so that one step writes each chunk of its tensors; a block that is
tuned is written in one step anyway, and each member has its place in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from shardxform.base.tensors import TensorSpec
from shardxform.formats.integers import Ints
from shardxform.plan.plan import Extent
from shardxform.plan.steps import TranscodeItem, transcode_item
from shardxform.runtimes.mlx import Stack

__all__ = ["member_items", "part_specs", "stack_item"]


def part_specs(stacks: Iterable[Stack], encoding: Ints) -> Iterator[TensorSpec]:
    """List the tensors that stand for what is quantized."""
    for stack in stacks:
        for part in encoding.parts(*stack.members[0].shape):
            yield from stack.specs(part.suffix, part.dtype, part.shape)


def stack_item(stack: Stack, encoding: Ints, extents: Mapping[str, Extent]) -> TranscodeItem:
    """Make the item that writes a stack."""
    stored = tuple(each for member in stack.members for each in member.stored)
    parts = [
        (part.role, extents[spec.name])
        for part in encoding.parts(*stack.members[0].shape)
        for spec in stack.specs(part.suffix, part.dtype, part.shape)
    ]
    return TranscodeItem(stack.name, stored, encoding, tuple(parts))


def member_items(stack: Stack, encoding: Ints, extents: Mapping[str, Extent]) -> Iterator[TranscodeItem]:
    """Make the items that write its members, each to its place in the tensors of all."""
    for at, member in enumerate(stack.members):
        places: dict[str, Extent] = {}
        for part in encoding.parts(*member.shape):
            specs = stack.specs(part.suffix, part.dtype, part.shape)
            name, length = f"{member.name}.{part.suffix}", part.spec(member.name).nbytes
            whole = extents[specs[at if len(specs) > 1 else 0].name]
            places[name] = whole if len(specs) > 1 else Extent(whole.shard, whole.offset + at * length, length)
        yield transcode_item(member.name, member.stored, encoding, places)
