"""Steps that compute: matrices taken from one encoding to another, and tuned weights of a block; values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple, cast

from shardxform.ask.recipe import HEALED, Heal, Recipe
from shardxform.base.constants import BATCH_TOKENS, MERGE_TILE, MERGE_TOKENS, MERGED_SHARES
from shardxform.base.tensors import ByteRange, TensorRef, natural_key
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import PlanError, SchemeError
from shardxform.formats.asymmetric import Asymmetric
from shardxform.formats.decoding import decoded_in_part
from shardxform.formats.encoding import (
    ROUNDED,
    TILE_BYTES,
    Encoded,
    Encoding,
    Gridded,
    PartSpec,
    Role,
    Source,
    Writable,
    ranges_of,
    shown,
)
from shardxform.formats.int8 import Int8
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import Grid
from shardxform.formats.stored import encoded_by_codes, plain_of
from shardxform.model.layout import Layout, Place, layout_of
from shardxform.plan import plan as plans
from shardxform.plan.plan import Extent, ShardPlan, extents_of
from shardxform.plan.view import View

__all__ = [
    "HEALED_FILE",
    "BlockSize",
    "KeptItem",
    "Transcode",
    "TranscodeItem",
    "TuneBlock",
    "block_sizes",
    "heal_steps",
    "healed_names",
    "healed_view",
    "kept_items",
    "merged_into",
    "refuse_unpruned",
    "sizes_of",
    "transcode_item",
    "transcode_steps",
]

# -- block size --------------------------------------------------------------------------------------------------------
# What healing and tuning a decoder block takes in memory, from headers alone.
#
# The constants are fits to what was measured with Qwen3.5-35B-A3B's blocks pruned to 128 experts, in bfloat16 and
# float32 (docs/quantization.md has the table); they err on the side of too much.

_LIBRARIES: Final = 750_000_000  # python, torch, transformers, and kernels as they are compiled
_SLACK: Final = 0.5  # bytes a byte of the block: tiles, and holes that freed memory leaves
_TUNED: Final = 1.0  # an offset of two bytes beside each weight of 16 bits
_HEALED: Final = 0.5  # one byte beside it
_MERGED: Final = 20  # bytes for each pair of channels of two experts: their distances, and SciPy's copy of these
_DENSE: Final = 12  # bytes of an expert in float32 for each row and column of its down projection
_AT_ONCE: Final = 6  # times that one is held so while others are merged into it
_BESIDE: Final = 3  # times that each of those others is
_MERGING: Final = 1 << 30  # bytes that several of them may take together
_MOST: Final = 32  # of them at once, whatever they take
_PER_FEATURE: Final = 34  # bytes that a token leaves behind for each row and column of the block's widest linear layer


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSize:
    """One decoder block.

    Attributes:
        nbytes: its weights as they are tuned, after pruning.
        original_nbytes: its weights in the source.
        features: rows and columns of its widest linear layer.
        routed_nbytes: of its weights, those of routed experts.
        down: shape [H, J] of an expert's down projection in the source; zeros where there is none.
        experts, top_k: how many there are in the source, and how many of them a token reaches.

    """

    nbytes: int
    original_nbytes: int
    features: int
    routed_nbytes: int = 0
    down: tuple[int, int] = (0, 0)
    experts: int = 0
    top_k: int = 1

    @property
    def merged_at_once(self) -> int:
        """Pruned experts that are put in another's order at once, at most: as many as fit, whatever the threads."""
        return max(1, min(_MOST, _MERGING // max(1, self._aligning_bytes)))

    @property
    def _aligning_bytes(self) -> int:
        """What it takes to put the channels of one expert in the order of another's."""
        rows, channels = self.down
        return _MERGED * channels**2 + _BESIDE * _DENSE * rows * channels

    def peak_bytes(self, recipe: Recipe) -> int:
        """Of the process that does the step: the original block puts out its states first, then the block is tuned."""
        beside = _TUNED if recipe.iters else _HEALED
        before = self.original_nbytes
        if recipe.heal and recipe.heal.merge:
            rows, channels = self.down
            aligning = self.merged_at_once * self._aligning_bytes
            before = max(before, 2 * MERGE_TILE + aligning + _AT_ONCE * _DENSE * rows * channels)
        resting = max(before, int((1 + beside) * self.nbytes)) + int(_SLACK * self.nbytes)
        return _LIBRARIES + resting + _PER_FEATURE * self.features * (BATCH_TOKENS + recipe.batch_tokens)


def sizes_of(tensors: Mapping[str, TensorRef], places: Mapping[str, Place]) -> dict[int, BlockSize]:
    """By number, the sizes of decoder blocks that nothing was taken from."""
    nbytes, routed, features = Counter[int](), Counter[int](), Counter[int]()
    for name, place in places.items():
        if place.scope != "block" or place.layer is None or name not in tensors:
            continue
        ref = tensors[name]
        nbytes[place.layer] += ref.nbytes
        routed[place.layer] += ref.nbytes if place.template.is_expert_weight else 0
        if len(ref.spec.shape) == 2 and place.expert is None:
            features[place.layer] = max(features[place.layer], sum(ref.spec.shape))
    return {
        layer: BlockSize(nbytes=size, original_nbytes=size, features=features[layer], routed_nbytes=routed[layer])
        for layer, size in nbytes.items()
    }


def block_sizes(source: Checkpoint, view: View) -> dict[int, BlockSize]:
    """By number, the sizes of the decoder blocks of a view of `source`."""
    layout = view.source_layout
    before, after = sizes_of(source.tensors, layout.places), sizes_of(view.checkpoint.tensors, view.layout.places)
    make, down = partial(replace, experts=layout.num_experts, top_k=layout.top_k), _down_shapes(source, layout)
    return {
        layer: make(size, original_nbytes=before[layer].nbytes, down=down.get(layer, (0, 0)))
        for layer, size in after.items()
    }


def _down_shapes(source: Checkpoint, layout: Layout) -> dict[int, tuple[int, int]]:
    """By decoder block, the shape [H, J] of an expert's down projection."""
    experts, found = layout.family.experts, dict[int, tuple[int, int]]()
    last = {experts.projections[-1], *experts.stacks[-1:]}
    for name, place in layout.places.items():
        stem, shape = name.removesuffix(".weight"), source.tensors[name].spec.shape
        if place.scope == "block" and place.template.variant and stem.rpartition(".")[2] in last and len(shape) > 1:
            rows, columns = shape[-2:]
            turned = experts.transposed and len(shape) > 2
            found[place.layer or 0] = (columns, rows) if turned else (rows, columns)
    return found


HEALED_FILE: Final = "healed:"
"""What names of files begin with that hold tensors after healing: they are never written, but kept in memory."""


# -- steps -------------------------------------------------------------------------------------------------------------


class TranscodeItem(NamedTuple):
    """One matrix to write: what its rows are made of, one below the other, how it is encoded, where its parts go."""

    module: str
    sources: tuple[Source, ...]
    target: Writable
    parts: tuple[tuple[Role, Extent], ...]

    def __repr__(self) -> str:  # as dataclasses give it, in a third of the time: plans are fingerprinted by it
        target = shown(self.target)
        return f"TranscodeItem(module={self.module!r}, sources={self.sources!r}, target={target}, parts={self.parts!r})"

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
        return (piece for source in self.sources for piece in source.reads)


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
        return TILE_BYTES + held + max(item.target.gathered(item.out_bytes, len(item.sources)) for item in self.items)


def transcode_item(
    module: str,
    sources: tuple[Source, ...],
    target: Writable,
    extents: Mapping[str, Extent],
    parts_of: Callable[[int, int], Iterable[PartSpec]] | None = None,
) -> TranscodeItem:
    """Make the item that writes a matrix, whose parts are called after `module` and have their place in `extents`.

    `parts_of` is `target.parts`, or what remembers it.
    """
    rows, columns = sources[0].shape
    for source in sources[1:]:
        rows += source.shape[0]
    places = [(part.role, extents[f"{module}.{part.suffix}"]) for part in (parts_of or target.parts)(rows, columns)]
    return TranscodeItem(module, sources, target, tuple(places))


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
    """A tensor that is written with the values that healing gave it.

    Attributes:
        tensor: as it is healed: values, be they decoded from small floats.
        target: how it is written: as they are, or for small floats each of its matrices as it was stored.
        parts: where what is stored goes, that of one matrix after that of another; a scale of a whole tensor stays.

    """

    tensor: TensorRef
    target: Encoding
    parts: tuple[tuple[Role, Extent], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneBlock:
    """Heal or tune the weights of one decoder block, then write them. Needs what the block before put out.

    Attributes:
        layer: of the block.
        keep: experts of the source that stay, where pruned ones are merged into them; else empty.
        items: weights that are packed.
        kept: tensors that are healed and stay as wide as they are.
        moved: tensors that are made of healed ones, whose bytes they read in files of the name `HEALED_FILE` begins.
        healed: those healed ones, as they are in the source.
        recipe: what is done.
        size: of the block.

    """

    layer: int
    keep: tuple[int, ...] = ()
    items: tuple[TranscodeItem, ...] = ()
    kept: tuple[KeptItem, ...] = ()
    moved: tuple[TranscodeItem, ...] = ()
    healed: tuple[TensorRef, ...] = ()
    recipe: Recipe
    size: BlockSize

    @property
    def grid(self) -> Grid | None:
        """What `items` are rounded to, all alike; None when there are none."""
        grids = {cast(Gridded, item.target).grid for item in self.items}
        assert len(grids) < 2
        return grids.pop() if grids else None

    @property
    def reads(self) -> Iterator[ByteRange]:
        """The ranges of every weight."""
        for item in self.items:
            yield from item.reads
        for tensor in (*(kept.tensor for kept in self.kept), *self.healed):
            yield from ranges_of(tensor)

    @property
    def writes(self) -> Iterator[Extent]:
        """One extent per stored part."""
        for item in (*self.items, *self.moved):
            yield from (extent for _, extent in item.parts)
        for kept in self.kept:
            yield from (extent for _, extent in kept.parts)

    @property
    def peak_bytes(self) -> int:
        """Of the whole process: the block, what is kept beside its weights, and the activations of a batch."""
        return self.size.peak_bytes(self.recipe)

    @property
    def work_bytes(self) -> int:
        """Disk that it needs meanwhile, beside hidden states: the experts that others were merged into."""
        return self.size.routed_nbytes if self.keep else 0

    @property
    def merging_tokens(self) -> int:
        """Tokens that go through the block in the time that its pruned experts take to be merged into others.

        All experts are run where a token reaches some, and pruned ones again for their channels.
        """
        if not self.keep:
            return 0
        tokens = min(MERGE_TOKENS, self.recipe.learned * self.recipe.seqlen)
        return tokens * (2 * self.size.experts - len(self.keep)) // max(self.size.top_k, 1)

    @property
    def judged_tokens(self) -> int:
        """Tokens that say how far the block goes to its merged experts."""
        tries = 1 + len(MERGED_SHARES) if self.keep else 0
        return tries * (self.recipe.samples - self.recipe.learned) * self.recipe.seqlen

    @property
    def block_tokens(self) -> int:
        """Tokens that go through the block: the step's share of the work."""
        return self.recipe.block_tokens + self.merging_tokens + self.judged_tokens


# -- heal --------------------------------------------------------------------------------------------------------------
# Which tensors of a pruned view healing may change, and the steps that do it. Names and places only; no numbers.

_MOVABLE: Final = ("BF16", "F16", "F32")


def refuse_unpruned(view: View, heal: Heal) -> None:
    """Refuse to heal what nothing was taken from, or by numbers of steps that are not one for each healed block.

    Raises:
        PlanError: says what to give.

    """
    if heal.merge and view.layout.num_experts == view.source_layout.num_experts:
        raise PlanError(
            "`merge`: no expert is pruned, so there is nothing to merge; give a `manifest` that keeps fewer, or leave"
            " it out"
        )
    if not view.prunes:
        raise PlanError("`heal`: nothing is pruned, so there is nothing to heal; give a `manifest` that keeps less")
    found, blocks = len(heal.schedule), len(view.layout.moe_layers)
    if found not in (0, blocks):
        raise PlanError(f"`heal.iters`: expected one number, or one for each of {blocks} blocks, found {found}")


def heal_steps(source: Checkpoint, view: View, shards: Sequence[ShardPlan], recipe: Recipe) -> tuple[TuneBlock, ...]:
    """One step per pruned block, in order."""
    assert recipe.heal is not None
    refuse_unpruned(view, recipe.heal)
    plain = plain_of(view.checkpoint)
    if plain:
        view = replace(view, checkpoint=plain, layout=layout_of(plain.config, plain.tensors))
    if plain_source := plain_of(source):
        view = replace(view, source_layout=layout_of(plain_source.config, plain_source.tensors))
    places, tensors = view.layout.places, view.checkpoint.tensors
    names = healed_names(view.layout, places, recipe.heal.widest)
    kept = kept_items(names, places, tensors, extents_of(shards), as_stored=recipe.heal.encoding == "source")
    sizes, keep = block_sizes(plain_source or source, view), merged_into(view, recipe)
    return tuple(
        TuneBlock(layer=at, keep=keep.get(at, ()), kept=items, recipe=recipe, size=sizes[at])
        for at, items in kept.items()
    )


def merged_into(view: View, recipe: Recipe) -> Mapping[int, tuple[int, ...]]:
    """By decoder block, the experts of the source that pruned ones are merged into; nothing where none are."""
    return view.keep if recipe.heal and recipe.heal.merge else {}


def healed_view(view: View, heal: Heal) -> tuple[View, Heal]:
    """The view as healing writes it, and how: small floats that it may change are in 16 bits where that is asked for.

    Raises:
        PlanError: `heal.encoding` for weights that are in 16 bits, or as clients cannot be told.

    """
    plain = plain_of(view.checkpoint)
    if plain is None:
        if heal.encoding:
            raise PlanError("`heal.encoding`: the weights of the source are in 16 bits; leave it out")
        return view, heal
    heal = replace(heal, encoding=heal.encoding or "source")
    layout = layout_of(plain.config, plain.tensors)
    _refuse_parts(plain, healed_names(layout, layout.places, heal.widest))
    if heal.encoding == "source":
        _refuse_read_only(plain, healed_names(layout, layout.places, heal.widest))
        return view, heal
    names = [each for each in healed_names(layout, layout.places, heal.widest) if _is_small(plain.tensors[each])]
    routed = [name for name in names if layout.places[name].template.variant]
    homes = {name.partition(f".{layout.family.experts.home}.")[0] + f".{layout.family.experts.home}" for name in routed}
    modules = [name.removesuffix(".weight") for name in names if name not in set(routed)]
    try:
        found = encoded_by_codes(view.checkpoint)
        written = decoded_in_part(view.checkpoint, found, frozenset(names), modules, sorted(homes, key=natural_key))
    except SchemeError as e:
        raise PlanError(f"`heal.encoding` 16bit: {e}; use source") from e
    return replace(view, checkpoint=written, layout=layout_of(written.config, written.tensors)), heal


def _refuse_parts(plain: Checkpoint, names: Iterable[str]) -> None:
    """Refuse to heal integers that are stored together with others, in one tensor.

    Raises:
        PlanError: names the first.

    """
    for name in names:
        ref = plain.tensors[name]
        if isinstance(ref, Encoded) and any(source.cut and source.cut.is_run for source in ref.sources):
            raise PlanError(
                f"`heal`: tensor '{name}' is rows of a larger one, which healed values are not written to; `shardxform"
                " convert` to the same format with `expert_names` split first"
            )


def _refuse_read_only(plain: Checkpoint, names: Iterable[str]) -> None:
    """Refuse to heal integers that are read and not written.

    Raises:
        PlanError: names the first.

    """
    for name in names:
        ref = plain.tensors[name]
        encodings = [source.encoding for source in ref.sources] if isinstance(ref, Encoded) else []
        if odd := [each for each in encodings if isinstance(each, Asymmetric | Int8) and each.unwritten]:
            raise PlanError(
                f"`heal`: tensor '{name}' is in {odd[0]}, {odd[0].unwritten}, to which healed values are not rounded;"
                " give `heal.encoding` 16bit, or heal with `shardxform quantize` and `requantize`"
            )


def _is_small(ref: TensorRef) -> bool:
    """Whether it is decoded from small floats."""
    return isinstance(ref, Encoded)


def healed_names(layout: Layout, places: Mapping[str, Place], what: str) -> Iterator[str]:
    """Of the names in `places`, those of weights in pruned blocks that healing `what` may change."""
    roles, layers = HEALED[what], frozenset(layout.moe_layers)
    for name, place in places.items():
        if place.template.ids or (place.template.variant and not place.template.is_expert_weight):
            continue  # no numbers that can move; biases of experts, which are few
        normed = what not in ("router", "experts") and place.template.name == layout.family.experts_norm
        wanted = place.role in roles or normed
        if place.scope == "block" and place.layer in layers and wanted:
            yield name


def kept_items(
    names: Iterable[str],
    places: Mapping[str, Place],
    tensors: Mapping[str, TensorRef],
    extents: Mapping[str, Extent],
    *,
    as_stored: bool = False,
) -> dict[int, tuple[KeptItem, ...]]:
    """By layer, what healing writes; `as_stored` says that small floats are written as such.

    Raises:
        PlanError: one of them is no float of 16 or 32 bits, as in a quantized source.

    """
    out: dict[int, list[KeptItem]] = {}
    for name in names:
        dtype = tensors[name].spec.dtype
        if dtype not in _MOVABLE:
            raise PlanError(
                f"`heal`: tensor '{name}': expected {', '.join(_MOVABLE)}, found {dtype}, which cannot move"
            )
        layer = places[name].layer
        assert layer is not None
        out.setdefault(layer, []).append(_kept_item(tensors[name], extents, as_stored=as_stored))
    return {layer: tuple(items) for layer, items in sorted(out.items())}


def _kept_item(ref: TensorRef, extents: Mapping[str, Extent], *, as_stored: bool) -> KeptItem:
    """Of small floats, the parts of all its matrices are those of the first, longer: a stack's, or a matrix's own."""
    if not (as_stored and isinstance(ref, Encoded)):
        return KeptItem(ref, Plain(ref.spec.dtype), (("values", extents[ref.name]),))
    first = ref.sources[0]
    return KeptItem(
        ref, first.encoding, tuple((role, extents[part.name]) for role, part in first.parts if role in ROUNDED)
    )
