"""What a GGUF output holds: every tensor, what it is made of and in which type, and the steps that write it.

Names, shapes and keys are llama.cpp's, see `runtimes.gguf`; here is what each verb makes of them. A weight of integers
keeps its codes and scales to the bit, whatever rows and columns change places: what cannot, because columns leave the
block that shares their scale, is written in a wider type, and it is said. Pure: no tensor data is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from shardxform.ask.manifest import Manifest, chosen_by
from shardxform.ask.recipe import Recipe
from shardxform.base import computing
from shardxform.base.gguf import KeyValue, Kind
from shardxform.base.tensors import BLOCKS, ByteRange, TensorRef, TensorSpec, coalesce, natural_key
from shardxform.checkpoint.history import past_of
from shardxform.checkpoint.identity import Identity, identity_when_asked
from shardxform.checkpoint.sidecars import is_document
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats.config_names import declares
from shardxform.formats.decoding import decoded
from shardxform.formats.encoding import Source, Writable
from shardxform.formats.ggml import FLOATS, Ggml, encoding_of, integer_type
from shardxform.formats.integers import Ints
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import Grid
from shardxform.formats.sources import Constant, Rounded
from shardxform.formats.stored import as_plain, read_stored
from shardxform.model.tied_head import head_differs
from shardxform.plan.gguf_files import lay_out_gguf
from shardxform.plan.plan import Extent, Plan, ShardPlan, Step, copy_steps, extents_of
from shardxform.plan.steps import (
    HEALED_FILE,
    BlockSize,
    TranscodeItem,
    TuneBlock,
    block_sizes,
    healed_names,
    merged_into,
    refuse_unpruned,
    transcode_steps,
)
from shardxform.plan.view import GgufOptions, View, ViewOptions, pruned_view, sidecar_digests, view_stated, view_summary
from shardxform.runtimes.gguf.architecture import Architecture, Named, Piece
from shardxform.runtimes.gguf.architectures import architecture_of
from shardxform.runtimes.gguf.metadata import metadata_of
from shardxform.runtimes.gguf.mixes import KINDS, mix_facts, mixed
from shardxform.runtimes.rotation import rotation_notes

__all__ = ["GgufFiles", "Types", "crossing", "documents_of", "draft_stored", "drafted", "plan_stored"]


# -- types ------------------------------------------------------------------------------------------------------------
# In which type every tensor of the file is stored.


@dataclass(frozen=True, slots=True)
class Types:
    """In which type weights are stored; what is always F32, or nothing is said of, is as it is in the source.

    Attributes:
        grid: of the integers that the weights of `modules` are rounded to; None to round none.
        modules: names of the modules that are rounded, with the decoder block that each is in; None outside them.
        kind: of file, to whose types all other weights are rounded; empty for those of the source.

    """

    grid: Grid | None = None
    modules: Mapping[str, int | None] = field(default_factory=dict)
    kind: str = ""

    def chosen(self, found: Iterable[Named], architecture: Architecture) -> Mapping[str, str]:
        """Types that the kind of file has for tensors, by their names.

        Raises:
            SchemeError: no such kind; or integers would be rounded a second time.

        """
        if not self.kind:
            return {}
        found = tuple(found)
        chosen = mixed(self.kind, {each.name: each.shape for each in found}, mix_facts(architecture))
        for each in found:
            if chosen.get(each.name) in BLOCKS and _is_of_integers(each):
                raise SchemeError(
                    f"`gguf.kind` {self.kind}: tensor '{each.pieces[0].storage.parts[0][1].name}' is of integers, which"
                    " would be rounded a second time; take weights of 16 bits, or leave it out"
                )
        return chosen

    def of(self, named: Named, chosen: str = "") -> Writable:
        """How a tensor is stored for which the kind of file has a type, or has none.

        Raises:
            SchemeError: what it is made of are no floats.

        """
        if chosen and not named.values:
            return encoding_of(chosen)
        if named.wide or named.values:
            return Plain("F32")
        if named.keeps_codes:
            if self.grid and all(piece.matrix in self.modules for piece in named.pieces):
                return Ggml(integer_type(self.grid), self.grid)
            bits = {encoding.grid.bits if isinstance(encoding, Ints) else 0 for encoding in _encodings(named)}
            if bits <= {4, 8} and len(bits) == 1 and not self.kind:
                return Ggml("Q4_0" if bits == {4} else "Q8_0")
        return Plain(_float_of(named))


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
class WrittenTensor:
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
            ref, cut = storage.parts[0][1], storage.cut
            ranges += (ref.rows(cut.first, cut.first + cut.count) if cut else ref).ranges
        return TensorRef(self.spec, coalesce(ranges)) if self.named.pieces else None

    def sources(self) -> tuple[Source, ...]:
        """What its rows are made of; what is rounded is so in the order in which it is stored."""
        if self.named.values:
            return (Constant(self.named.name, self.named.values),)
        grid = self.target.grid if isinstance(self.target, Ggml) else None
        return tuple(Rounded(piece, grid) if grid and _moves_columns(piece) else piece for piece in self.named.pieces)


def _moves_columns(piece: Piece) -> bool:
    """Whether columns change places."""
    return piece.transform is not None and piece.transform.columns is not None


@dataclass(frozen=True, kw_only=True)
class GgufContents:
    """What a file holds, or all of those that it is split into.

    Attributes:
        architecture: the view as llama.cpp sees it.
        types: how weights are stored.
        written: every tensor, in the order of the file.
        healed: tensors of the view that healing changes, which stand in `written` as pseudo-files.

    """

    architecture: Architecture
    types: Types
    written: tuple[WrittenTensor, ...]
    healed: Mapping[str, TensorRef] = field(default_factory=dict)

    @cached_property
    def file_type(self) -> int:
        """llama.cpp's number of the kind of file, or of what most weights are stored as."""
        if self.types.kind:
            return KINDS[self.types.kind].number
        sizes: Counter[str] = Counter()
        for each in self.written:
            if not each.named.wide:
                sizes[each.spec.dtype] += each.shape[0] * each.shape[1]
        most = max(sizes, key=lambda name: (sizes[name], name), default="F32")
        return KINDS[most].number if most in KINDS else 0

    @property
    def copies(self) -> int:
        """Tensors whose bytes are the source's."""
        return sum(each.copied is not None for each in self.written)

    def shards(self, source: Checkpoint, options: GgufOptions, max_shard_bytes: int) -> tuple[ShardPlan, ...]:
        """The files with their heads.

        Raises:
            SchemeError: the config lacks what llama.cpp needs, or the tokenizer is missing, or unknown to it.
            PlanError: see `lay_out_gguf`.

        """
        return lay_out_gguf(_keys(self, source, options), (each.spec for each in self.written), max_shard_bytes)


def gguf_contents(view: View, types: Types, healed: Iterable[str] = ()) -> GgufContents:
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
    found = sorted(architecture.tensors(tensors), key=lambda named: natural_key(named.name))
    chosen = types.chosen(found, architecture)
    written = tuple(WrittenTensor(named, types.of(named, chosen.get(named.name, ""))) for named in found)
    return GgufContents(architecture=architecture, types=types, written=written, healed=moved)


def _after_healing(ref: TensorRef) -> TensorRef:
    """A tensor whose bytes are there when its block is healed."""
    return TensorRef(ref.spec, (ByteRange(HEALED_FILE + ref.name, 0, ref.nbytes),))


def crossing(view: View) -> frozenset[str]:
    """Modules whose columns leave the blocks that share a scale: integers of theirs cannot stay as they are."""
    tensors = architecture_of(view.layout).tensors(view.checkpoint.tensors)
    return frozenset(piece.matrix for named in tensors for piece in named.pieces if not piece.keeps_codes)


def _keys(contents: GgufContents, source: Checkpoint, options: GgufOptions) -> tuple[KeyValue, ...]:
    """All keys of the file: of the model, and of its tokenizer, whose files lie beside the source by now."""
    source.bring()
    found = metadata_of(
        contents.architecture,
        [each.named for each in contents.written],
        source.root,
        name=contents.architecture.layout.wrapper.architecture.partition("For")[0],  # not a folder's, which may change
        file_type=contents.file_type,
        pre_tokenizer=options.pre_tokenizer,
    )
    return tuple(
        KeyValue.array(key.name, cast(Kind, key.of), key.value)
        if key.type == "ARRAY"
        else KeyValue.of(key.name, cast(Kind, key.type), key.value)
        for key in found
    )


@dataclass(frozen=True, kw_only=True)
class GgufFiles:
    """An output in GGUF, but for the steps that write it: what its files hold, and their heads."""

    view: View
    contents: GgufContents
    shards: tuple[ShardPlan, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What llama.cpp runs in another way, and cannot be told."""
        architecture = self.contents.architecture
        return (*rotation_notes(architecture.config, "llama.cpp"), *architecture.kind.notes(architecture))

    def plan(
        self,
        source: Checkpoint,
        recipe: Recipe | None,
        *,
        identity: Callable[[], Identity],
        stated: Mapping[str, Any],
        summary: Mapping[str, Any],
        notes: tuple[str, ...],
    ) -> Plan:
        """The plan that writes it, with what is recorded and said of it."""
        blocks = None
        if recipe:
            blocks = Blocks(recipe, block_sizes(as_weights(source), self.view), merged_into(self.view, recipe))
        past = past_of(source)
        plan = Plan(
            command=str(stated["command"]),
            source=source.root,
            remote=source.remote,
            source_shards=source.shards,
            view=self.view.checkpoint,
            shards=self.shards,
            steps=tuple(gguf_steps(self.contents, self.view, self.shards, blocks)),
            config=b"",
            container="gguf",
            sidecars=stated["source"]["sidecars"],
            identity=identity,
            stated=stated,
            summary=summary,
            notes=(*notes, *past.notes),
            unread=source.unread,
            past=past,
        )
        plan.check()
        return plan


def drafted(
    source: Checkpoint, view: View, types: Types, options: ViewOptions, healed: Iterable[str] = ()
) -> GgufFiles:
    """Draft the files of a view of `source`.

    Raises:
        SchemeError, PlanError: see `gguf_contents` and `GgufContents.shards`; or a tied output head is stored, and is
            another than the embeddings that llama.cpp would run.

    """
    if head_differs(source, view.source_layout):
        raise SchemeError(
            f"tensor '{view.source_layout.head}' is not the embeddings that config.json ties it to, and GGUF has one of"
            " the two: set tie_word_embeddings to false, or remove the tensor"
        )
    contents = gguf_contents(view, types, healed)
    shards = contents.shards(source, options.gguf or GgufOptions(), options.max_shard_bytes)
    return GgufFiles(view=view, contents=contents, shards=shards)


def documents_of(checkpoint: Checkpoint) -> Checkpoint:
    """The view with those sidecars only that are for people: the file itself has what programs read."""
    return replace(checkpoint, sidecars=tuple(each for each in checkpoint.sidecars if is_document(each.name)))


# -- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Blocks:
    """How decoder blocks are healed and tuned, how large they are, and which experts others are merged into."""

    recipe: Recipe
    sizes: Mapping[int, BlockSize]
    keep: Mapping[int, tuple[int, ...]]


def gguf_steps(
    contents: GgufContents, view: View, shards: Sequence[ShardPlan], blocks: Blocks | None
) -> Iterator[Step]:
    """Steps that write every tensor: bytes that are moved, values that are worked out, blocks that are tuned."""
    extents = extents_of(shards)
    layers = {name: place.layer for name, place in view.layout.places.items()}
    tuned: dict[int, list[TranscodeItem]] = {}
    healed: dict[int, list[TranscodeItem]] = {}
    copied: dict[str, TensorRef] = {}
    rest: list[TranscodeItem] = []
    for each in contents.written:
        extent = extents[each.named.name]
        layer = contents.types.modules.get(each.named.pieces[0].matrix) if each.named.pieces else None
        if (at := _healed_in(each, layers)) is not None:
            healed.setdefault(at, []).append(_item(each, extent))
        elif blocks and layer is not None and isinstance(each.target, Ggml):
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
                keep=blocks.keep.get(layer, ()),
                items=tuple(tuned.get(layer, ())),
                moved=tuple(healed.get(layer, ())),
                healed=tuple(ref for name, ref in contents.healed.items() if layers[name] == layer),
                recipe=blocks.recipe,
                size=blocks.sizes[layer],
            )


def _item(each: WrittenTensor, extent: Extent) -> TranscodeItem:
    return TranscodeItem(each.named.name, each.sources(), each.target, (("values", extent),))


def _tuned_items(each: WrittenTensor, extent: Extent) -> Iterator[TranscodeItem]:
    """One item for each matrix: the tuner gives them one by one."""
    rows, _ = each.shape
    row = extent.length // rows
    first = 0
    for piece in each.named.pieces:
        count = piece.shape[0]
        place = Extent(extent.shard, extent.offset + first * row, count * row)
        yield TranscodeItem(piece.matrix, (piece,), each.target, (("values", place),))
        first += count


def _healed_in(each: WrittenTensor, layers: Mapping[str, int | None]) -> int | None:
    """The block whose healing gives the values of a tensor; None for one that is not healed."""
    for piece in each.named.pieces:
        for place in piece.storage.reads:
            if place.file.startswith(HEALED_FILE):
                return layers[place.file.removeprefix(HEALED_FILE)]
    return None


# -- weights as they are stored ---------------------------------------------------------------------------------------


def plan_stored(
    command: str,
    source: Checkpoint,
    manifest: Manifest | None,
    options: ViewOptions,
    recipe: Recipe | None = None,
    beside: Mapping[str, object] | None = None,
) -> Plan:
    """Plan a GGUF file of weights as they are in the source: floats as wide, integers with their codes and scales.

    Small floats are decoded, as everywhere.

    Args:
        command: verb that is planned.
        source: what is read.
        manifest: experts that stay; None for all.
        options: what else decides bytes.
        recipe: how pruned blocks are healed; None to heal none.
        beside: what else is recorded of how it was made.

    Raises:
        SchemeError: llama.cpp does not run the family, or a weight is stored in a way that is not read.
        CheckpointError, FamilyError, ManifestError, PlanError: see `view.pruned_view`.

    """
    options = replace(options, gguf=options.gguf or GgufOptions())
    draft = draft_stored(source, manifest, options, recipe)
    sidecars = sidecar_digests(documents_of(draft.view.checkpoint))
    identity = identity_when_asked(source)
    stated = {
        **view_stated(command, source, manifest, options, sidecars, identity),
        **(beside or {}),
        **({"recipe": recipe.facts()} if recipe else {}),
        computing.KEY: computing.of_model(recipe.device) if recipe else computing.of_rounding(),
    }
    summary = {
        **view_summary(source, draft.view),
        **chosen_by(manifest),
        "tensors_after": len(draft.contents.written),
        "copied": draft.contents.copies,
        **({"healed": len(draft.contents.healed)} if recipe else {}),
    }
    notes = (*draft.view.notes, *_stored_notes(draft.contents), *draft.notes)
    return draft.plan(source, recipe, identity=identity, stated=stated, summary=summary, notes=notes)


def draft_stored(
    source: Checkpoint, manifest: Manifest | None, options: ViewOptions, recipe: Recipe | None = None
) -> GgufFiles:
    """Find what `plan_stored` writes; raises as it does."""
    view = pruned_view(as_weights(source), manifest, text_only=options.text_only, mtp=options.mtp)
    healed: Iterable[str] = ()
    if recipe:
        assert recipe.heal is not None
        refuse_unpruned(view, recipe.heal)
        healed = healed_names(view.layout, view.layout.places, recipe.heal.widest)
    return drafted(source, view, Types(kind=options.gguf.kind if options.gguf else ""), options, healed)


def as_weights(source: Checkpoint) -> Checkpoint:
    """A checkpoint whose table has weights, whatever stands for them: small floats, integers, or themselves.

    Raises:
        SchemeError: it is quantized in a way that is not read.
        CheckpointError: a weight is not stored as the config says.

    """
    if plain := decoded(source):
        return plain
    return as_plain(source, read_stored(source)) if declares(source.config) else source


def _stored_notes(contents: GgufContents) -> Iterator[str]:
    """Say what becomes of integers, and of those that no block of ggml's holds as they are; or what is rounded."""
    kinds = Counter(each.spec.dtype for each in contents.written if isinstance(each.target, Ggml))
    if contents.types.kind:
        types = ", ".join(f"{count:,} in {dtype}" for dtype, count in kinds.most_common())
        yield f"{contents.types.kind} as llama-quantize makes it without an importance matrix: {types or 'no blocks'}"
        return
    for dtype, count in kinds.items():
        yield f"{count:,} tensors of integers are stored as {dtype}: every integer and every scale keeps its value"
    wider = [each for each in contents.written if isinstance(each.target, Plain) and _is_of_integers(each.named)]
    for each in wider:
        yield (
            f"{each.named.name} becomes {each.spec.dtype}, which holds its values exactly: its columns leave the"
            " blocks that share a scale in GGUF"
        )


def _is_of_integers(named: Named) -> bool:
    return any(isinstance(encoding, Ints) for encoding in _encodings(named))
