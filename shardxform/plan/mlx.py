"""What stands for quantized weights in a checkpoint of MLX, and the items that write it: stacks of experts, or members.

A stack is written as one matrix, a member at a time, so that one step writes each chunk of its tensors; a block that is
tuned is written in one step anyway, and each member has its place in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from shardxform.base.tensors import TensorSpec
from shardxform.formats.encoding import Role
from shardxform.formats.integers import Ints
from shardxform.plan.plan import Extent
from shardxform.plan.steps import TranscodeItem
from shardxform.runtimes.mlx import Stack

__all__ = ["member_items", "part_specs", "stack_item"]


def part_specs(stacks: Iterable[Stack], encoding: Ints) -> Iterator[TensorSpec]:
    """List the tensors that stand for what is quantized."""
    for stack in stacks:
        for part in encoding.parts(*stack.shape):
            yield from stack.specs(part.suffix, part.dtype, part.shape)


def stack_item(stack: Stack, encoding: Ints, extents: Mapping[str, Extent]) -> TranscodeItem:
    """Make the item that writes a stack."""
    parts = [
        (part.role, extents[spec.name])
        for part in encoding.parts(*stack.shape)
        for spec in stack.specs(part.suffix, part.dtype, part.shape)
    ]
    return TranscodeItem(stack.name, tuple(member.source for member in stack.members), encoding, tuple(parts))


def member_items(stack: Stack, encoding: Ints, extents: Mapping[str, Extent]) -> Iterator[TranscodeItem]:
    """Make the items that write its members, each to its place in the tensors of all."""
    done: dict[str, int] = {}
    for at, members in enumerate(stack.experts):
        for member in members:
            places: list[tuple[Role, Extent]] = []
            for part, whole in zip(encoding.parts(*member.shape), encoding.parts(*stack.shape), strict=True):
                specs = stack.specs(part.suffix, part.dtype, whole.shape)
                name, length = specs[at if len(specs) > 1 else 0].name, part.spec(member.matrix.name).nbytes
                first, extent = done.get(name, 0), extents[name]
                places.append((part.role, Extent(extent.shard, extent.offset + first, length)))
                done[name] = first + length
            yield TranscodeItem(member.matrix.name, (member.source,), encoding, tuple(places))
