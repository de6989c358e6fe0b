"""What a GGUF output holds: every tensor of the file, what it is made of and in which type, and the steps that write it.

Names, shapes and keys are llama.cpp's, see `runtimes.gguf`; here is what each verb makes of them. A weight of integers
keeps its codes and scales to the bit, whatever rows and columns change places: what cannot, because columns leave the
block that shares their scale, is written in a wider type, and it is said. Pure: no tensor data is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from shardxform.ask.recipe import Recipe
from shardxform.base.gguf import KeyValue
from shardxform.base.tensors import ByteRange, TensorRef, TensorSpec, coalesce
from shardxform.checkpoint.sidecars import is_document
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats.encoding import Encoded, Source, Writable
from shardxform.formats.ggml import EXACT, FLOATS, Ggml, encoding_of
from shardxform.formats.integers import Ints
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import Grid
from shardxform.plan.plan import Extent, ShardPlan, Step, copy_steps, extents_of, lay_out_gguf
from shardxform.plan.steps import (
    HEALED_FILE,
    BlockSize,
    TranscodeItem,
    TuneBlock,
    healed_names,
    transcode_steps,
)
from shardxform.plan.view import View
from shardxform.runtimes.gguf.architecture import Architecture, Named, Piece
from shardxform.runtimes.gguf.architectures import architecture_of
from shardxform.runtimes.gguf.sources import Constant, Rounded

__all__ = ["Contents", "Types", "contents_of", "gguf_steps", "moved_columns"]


# -- types ------------------------------------------------------------------------------------------------------------
# In which type every tensor of the file is stored.

FILE_TYPES: Final[Mapping[str, int]] = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers of types for `general.file_type`, by which people are told what most of a file is."""


@dataclass(frozen=True, slots=True)
class Types:
    """In which type weights are stored; what is always F32, or nothing is said of, is as it is in the source.

    Attributes:
        grid: of the integers that the weights of `modules` are rounded to; None to round none.
        modules: names of the modules that are rounded, with the decoder block that each is in; None outside them.
        plain: the float that all other weights are written in; empty for the source's.

    """

    grid: Grid | None = None
    modules: Mapping[str, int | None] = field(default_factory=dict)
    plain: str = ""

    def of(self, named: Named) -> Writable:
        """How a tensor is stored.

        Raises:
            SchemeError: what it is made of are no floats.

        """
        if named.wide or named.values:
            return Plain("F32")
        if named.keeps_codes:
            if self.grid and all(piece.matrix in self.modules for piece in named.pieces):
                return Ggml(integer_type(self.grid), self.grid)
            bits = {encoding.grid.bits if isinstance(encoding, Ints) else 0 for encoding in _encodings(named)}
            if bits <= {4, 8} and len(bits) == 1 and not self.plain:
                return Ggml("Q4_0" if bits == {4} else "Q8_0")
        return Plain(self.plain or _float_of(named))


def integer_type(grid: Grid) -> str:
    """ggml's type of integers with a scale for a group of columns."""
    return next(name for name, bits in EXACT.items() if grid.bits in bits)


def _encodings(named: Named) -> Iterator[object]:
    return (piece.storage.encoding for piece in named.pieces)


def _float_of(named: Named) -> str:
    """The narrowest float that holds what a tensor is made of, or of what is decoded, bfloat16 as everywhere.

    Raises:
        SchemeError: it is made of something else.

    """
    found: set[str] = set()
    for piece in named.pieces:
        encoding = piece.storage.encoding
        if isinstance(encoding, Plain):
            found.add(encoding.dtype)
        elif isinstance(encoding, Ints):
            found.add("F16" if encoding.fits_half else "F32")
        else:
            found.add("BF16")
    if odd := found.difference(FLOATS):
        raise SchemeError(
            f"tensor '{named.pieces[0].storage.parts[0][1].name}' is {min(odd)}; GGUF is written of {', '.join(FLOATS)}"
        )
    return found.pop() if len(found) == 1 else "F32"


# -- contents ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor of the file, and how it is stored."""

    named: Named
    target: Writable

    @property
    def shape(self) -> tuple[int, int]:
        """As a matrix: all rows, one below the other."""
        if self.named.values:
            return len(self.named.values), 1
        return sum(piece.shape[0] for piece in self.named.pieces), self.named.pieces[0].shape[1]

    @property
    def spec(self) -> TensorSpec:
        """Name, type and shape."""
        (part,) = self.target.parts(*self.shape)
        return TensorSpec(self.named.name, part.dtype, self.named.shape)

    @property
    def copied(self) -> TensorRef | None:
        """The bytes of the source that it is, where it is some; rows of one tensor or of several."""
        ranges: list[ByteRange] = []
        for piece in self.named.pieces:
            storage = piece.storage
            if piece.transform or storage.encoding != self.target or (storage.cut and not storage.cut.is_run):
                return None
            ref = storage.parts[0][1]
            ranges += (ref.rows(storage.cut.first, storage.cut.first + storage.cut.count) if storage.cut else ref).ranges
        return TensorRef(self.spec, coalesce(ranges)) if self.named.pieces else None

    def sources(self) -> tuple[Source, ...]:
        """What its rows are made of; what is rounded is so in the order in which it is stored."""
        if self.named.values:
            return (Constant(self.named.name, self.named.values),)
        grid = self.target.grid if isinstance(self.target, Ggml) else None
        return tuple(Rounded(piece, grid) if grid and moved_columns(piece) else piece for piece in self.named.pieces)


def moved_columns(piece: Piece) -> bool:
    """Whether columns change places."""
    return piece.transform is not None and piece.transform.columns is not None


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a file holds, or all of those that it is split into.

    Attributes:
        architecture: the view as llama.cpp sees it.
        types: how weights are stored.
        written: every tensor, in the order of the file.
        healed: tensors of the view that healing changes, which stand in `written` as pseudo-files.

    """

    architecture: Architecture
    types: Types
    written: tuple[Written, ...]
    healed: Mapping[str, TensorRef] = field(default_factory=dict)

    @cached_property
    def file_type(self) -> int:
        """llama.cpp's number of what most weights are stored as."""
        sizes: Counter[str] = Counter()
        for each in self.written:
            if not each.named.wide:
                sizes[each.spec.dtype] += each.shape[0] * each.shape[1]
        return FILE_TYPES.get(max(sizes, key=lambda name: (sizes[name], name)), 0) if sizes else 0

    def shards(self, metadata: Sequence[KeyValue], max_shard_bytes: int | None) -> tuple[ShardPlan, ...]:
        """The files with their heads; raises like `lay_out_gguf`."""
        return lay_out_gguf(metadata, (each.spec for each in self.written), max_shard_bytes)


def contents_of(view: View, types: Types, healed: Iterable[str] = ()) -> Contents:
    """Find what a GGUF file of a view holds.

    Args:
        view: of weights as they are, or as `Encoded`.
        types: how weights are stored.
        healed: names of the tensors that healing changes, as wide as they are.

    Raises:
        SchemeError: llama.cpp does not run the family, or has no place for a tensor.

    """
    architecture = architecture_of(view.layout)
    tensors = dict(view.checkpoint.tensors)
    moved = {name: tensors[name] for name in healed}
    tensors |= {name: _after_healing(ref) for name, ref in moved.items()}
    written = tuple(Written(named, types.of(named)) for named in architecture.tensors(tensors))
    return Contents(architecture=architecture, types=types, written=written, healed=moved)


def _after_healing(ref: TensorRef) -> TensorRef:
    """A tensor whose bytes are there when its block is healed."""
    return TensorRef(ref.spec, (ByteRange(HEALED_FILE + ref.name, 0, ref.nbytes),))


def keys_of(contents: Contents, tokenizer: Iterable[KeyValue]) -> tuple[KeyValue, ...]:
    """All keys of the file: those of the model, then those of its tokenizer."""
    found = contents.architecture.metadata(contents.file_type)
    values = (
        KeyValue.array(key.name, key.of, key.value) if key.type == "ARRAY" else KeyValue.of(key.name, key.type, key.value)
        for key in found
    )
    return (*values, *tokenizer)


def documents_of(checkpoint: Checkpoint) -> Checkpoint:
    """The view with those sidecars only that are for people: the file itself has what programs read."""
    return replace(checkpoint, sidecars=tuple(each for each in checkpoint.sidecars if is_document(each.name)))


# -- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Blocks:
    """How decoder blocks are healed and tuned, and how large they are."""

    recipe: Recipe
    sizes: Mapping[int, BlockSize]


def gguf_steps(contents: Contents, view: View, shards: Sequence[ShardPlan], blocks: Blocks | None) -> Iterator[Step]:
    """Steps that write every tensor: bytes that are moved, values that are worked out, blocks that are tuned."""
    extents = extents_of(shards)
    layers = {name: place.layer for name, place in view.layout.places.items()}
    tuned: dict[int, list[TranscodeItem]] = {}
    healed: dict[int, list[TranscodeItem]] = {}
    copied: dict[str, TensorRef] = {}
    rest: list[TranscodeItem] = []
    for each in contents.written:
        extent = extents[each.named.name]
        if (layer := _healed_in(each, layers)) is not None:
            healed.setdefault(layer, []).append(_item(each, extent))
        elif blocks and isinstance(each.target, Ggml) and (layer := contents.types.modules.get(each.named.pieces[0].matrix)) is not None:
            tuned.setdefault(layer, []).extend(_tuned_items(each, extent))
        elif ref := each.copied:
            copied[each.named.name] = ref
        else:
            rest.append(_item(each, extent))
    yield from copy_steps(shards, copied)
    yield from transcode_steps((item, item.out_bytes) for item in rest)
    if blocks:
        for layer in sorted({*tuned, *healed}):
            yield TuneBlock(
                layer=layer,
                items=tuple(tuned.get(layer, ())),
                moved=tuple(healed.get(layer, ())),
                healed=tuple(ref for name, ref in contents.healed.items() if layers[name] == layer),
                recipe=blocks.recipe,
                size=blocks.sizes[layer],
            )


def _item(each: Written, extent: Extent) -> TranscodeItem:
    return TranscodeItem(each.named.name, each.sources(), each.target, (("values", extent),))


def _tuned_items(each: Written, extent: Extent) -> Iterator[TranscodeItem]:
    """One item for each matrix: the tuner gives them one by one."""
    rows, _ = each.shape
    row = extent.length // rows
    first = 0
    for piece in each.named.pieces:
        count = piece.shape[0]
        place = Extent(extent.shard, extent.offset + first * row, count * row)
        yield TranscodeItem(piece.matrix, (piece,), each.target, (("values", place),))
        first += count


def _healed_in(each: Written, layers: Mapping[str, int | None]) -> int | None:
    """The block whose healing gives the values of a tensor; None for one that is not healed."""
    for piece in each.named.pieces:
        for place in piece.storage.reads:
            if place.file.startswith(HEALED_FILE):
                return layers[place.file.removeprefix(HEALED_FILE)]
    return None
