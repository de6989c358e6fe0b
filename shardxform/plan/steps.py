"""Steps that compute: matrices taken from one encoding to another, and tuned weights of a block; values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from shardxform.ask.recipe import Recipe
from shardxform.base.tensors import ByteRange, TensorRef
from shardxform.formats.encoding import TILE_BYTES, Role, Storage, Writable
from shardxform.formats.integers import Ints
from shardxform.plan import plan as plans
from shardxform.plan.block_size import BlockSize
from shardxform.plan.plan import Extent

__all__ = ["KeptItem", "Transcode", "TranscodeItem", "TuneBlock", "transcode_item", "transcode_steps"]


@dataclass(frozen=True, slots=True)
class TranscodeItem:
    """One matrix to write: what is stored for its rows, one below the other, how it is encoded, where its parts go."""

    module: str
    sources: tuple[Storage, ...]
    target: Writable
    parts: tuple[tuple[Role, Extent], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        return sum(source.shape[0] for source in self.sources), self.sources[0].shape[1]

    @property
    def out_bytes(self) -> int:
        """Size of all parts."""
        return sum(extent.length for _, extent in self.parts)

    @property
    def reads(self) -> Iterator[ByteRange]:
        """The ranges of every source."""
        return (piece for source in self.sources for _, ref in source.parts for piece in ref.ranges)


@dataclass(frozen=True, slots=True)
class Transcode:
    """Take matrices from one encoding to another: round them, lay them out anew, or decode them."""

    items: tuple[TranscodeItem, ...]

    @property
    def reads(self) -> Iterable[ByteRange]:
        """Every range that an item needs, once."""
        return dict.fromkeys(piece for item in self.items for piece in item.reads)

    @property
    def writes(self) -> Iterable[Extent]:
        """One extent per part."""
        return (extent for item in self.items for _, extent in item.parts)

    @property
    def peak_bytes(self) -> int:
        """A tile of values, what of a source is held while it is open, and parts that are written whole."""
        held = max(source.held for item in self.items for source in item.sources)
        return TILE_BYTES + held + max(item.target.gathered(item.out_bytes) for item in self.items)


def transcode_item(
    module: str, sources: tuple[Storage, ...], target: Writable, extents: Mapping[str, Extent]
) -> TranscodeItem:
    """Make the item that writes a matrix, whose parts are called after `module` and have their place in `extents`."""
    rows = sum(source.shape[0] for source in sources)
    parts = target.parts(rows, sources[0].shape[1])
    return TranscodeItem(module, sources, target, tuple((p.role, extents[f"{module}.{p.suffix}"]) for p in parts))


def transcode_steps(items: Iterable[tuple[TranscodeItem, int]]) -> Iterator[Transcode]:
    """Steps in the order of items, each of at most `STEP_BYTES`, as told for each item, unless one item has more.

    A tensor is written by one step, so that digests can be taken of its chunks.
    """
    pending: list[TranscodeItem] = []
    filled = 0
    for item, nbytes in items:
        if pending and filled + nbytes > plans.STEP_BYTES:
            yield Transcode(tuple(pending))
            pending, filled = [], 0
        pending.append(item)
        filled += nbytes
    if pending:
        yield Transcode(tuple(pending))


@dataclass(frozen=True, slots=True)
class KeptItem:
    """A tensor that is written under its name in its own dtype, with the values that healing gave it."""

    tensor: TensorRef
    extent: Extent


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneBlock:
    """Heal or tune the weights of one decoder block, then write them. Needs what the block before put out.

    Attributes:
        layer: of the block.
        items: weights that are packed.
        kept: tensors that are healed and stay as wide as they are.
        recipe: what is done.
        size: of the block.

    """

    layer: int
    items: tuple[TranscodeItem, ...] = ()
    kept: tuple[KeptItem, ...] = ()
    recipe: Recipe
    size: BlockSize

    @property
    def encoding(self) -> Ints | None:
        """How `items` are packed, all alike; None when there are none."""
        targets = {item.target for item in self.items}
        assert len(targets) < 2
        return cast(Ints, targets.pop()) if targets else None

    @property
    def reads(self) -> Iterator[ByteRange]:
        """The ranges of every weight."""
        for item in self.items:
            yield from item.reads
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
