"""Steps that compute: rounding weights, and tuning the weights of a decoder block. Values; nothing is done here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from shardxform.ask.recipe import Recipe
from shardxform.base.tensors import ByteRange, TensorRef
from shardxform.formats.scheme import Role, Scheme
from shardxform.model.matrices import Cut
from shardxform.plan.block_size import BlockSize
from shardxform.plan.plan import Extent

__all__ = ["TILE_BYTES", "Gather", "GatherItem", "KeptItem", "Round", "RoundItem", "TuneBlock"]

TILE_BYTES: Final = 4 << 20
"""Most bytes of a weight that are read and rounded at a time."""


@dataclass(frozen=True, slots=True)
class RoundItem:
    """One weight [O, I] to round, all of `weight` or a `cut` of it, and where its parts go."""

    module: str
    weight: TensorRef
    parts: tuple[tuple[Role, Extent], ...]
    cut: Cut | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        rows, columns = self.weight.spec.shape
        return self.cut.shape((rows, columns)) if self.cut else (rows, columns)


@dataclass(frozen=True, slots=True)
class GatherItem:
    """A matrix or vector that is a cut of a stored tensor but no run of its bytes, and where it goes."""

    tensor: TensorRef
    cut: Cut
    extent: Extent


@dataclass(frozen=True, slots=True)
class Gather:
    """Write values as they are, in another order: every so many rows, or transposed."""

    items: tuple[GatherItem, ...]

    @property
    def reads(self) -> Iterable[ByteRange]:
        """The ranges of every tensor."""
        return (piece for item in self.items for piece in item.tensor.ranges)

    @property
    def writes(self) -> Iterable[Extent]:
        """One extent an item."""
        return (item.extent for item in self.items)

    @property
    def peak_bytes(self) -> int:
        """The largest tensor, as it is read and as it is written."""
        return 2 * max(item.tensor.nbytes for item in self.items)


@dataclass(frozen=True, slots=True)
class KeptItem:
    """A tensor that is written under its name in its own dtype, with the values that healing gave it."""

    tensor: TensorRef
    extent: Extent


@dataclass(frozen=True, slots=True)
class Round:
    """Round weights to nearest and pack them."""

    items: tuple[RoundItem, ...]
    scheme: Scheme

    @property
    def reads(self) -> Iterable[ByteRange]:
        """The ranges of every weight."""
        return (piece for item in self.items for piece in item.weight.ranges)

    @property
    def writes(self) -> Iterable[Extent]:
        """One extent per stored part."""
        return (extent for item in self.items for _, extent in item.parts)

    @property
    def peak_bytes(self) -> int:
        """One tile of input, as read and as float32 rows, and the packed parts of the largest weight.

        A weight that is a cut is read whole.
        """
        read = max((item.weight.nbytes for item in self.items if item.cut), default=0)
        return 3 * TILE_BYTES + read + max(sum(extent.length for _, extent in item.parts) for item in self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneBlock:
    """Heal or tune the weights of one decoder block, then write them. Needs what the block before put out.

    Attributes:
        layer: of the block.
        items: weights that are packed.
        kept: tensors that are healed and stay as wide as they are.
        scheme: how `items` are packed; None when there are none.
        recipe: what is done.
        size: of the block.

    """

    layer: int
    items: tuple[RoundItem, ...] = ()
    kept: tuple[KeptItem, ...] = ()
    scheme: Scheme | None = None
    recipe: Recipe
    size: BlockSize

    @property
    def reads(self) -> Iterator[ByteRange]:
        """The ranges of every weight."""
        for item in self.items:
            yield from item.weight.ranges
        for kept in self.kept:
            yield from kept.tensor.ranges

    @property
    def writes(self) -> Iterator[Extent]:
        """One extent per stored part."""
        for item in self.items:
            yield from (extent for _, extent in item.parts)
        yield from (kept.extent for kept in self.kept)

    @property
    def peak_bytes(self) -> int:
        """Of the whole process: the block, what is kept beside its weights, and the activations of a batch."""
        return self.size.peak_bytes(self.recipe)

    @property
    def block_tokens(self) -> int:
        """Tokens that go through the block: the step's share of the work."""
        return self.recipe.block_tokens
