"""What a checkpoint is made of, from headers alone: sizes by role, and what prune and quantize would make of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

from shardxform.ask.manifest import Manifest
from shardxform.base.tensors import TensorRef, uncollected
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError, FamilyError, SchemeError, ShardxformError
from shardxform.formats.config_names import DECLARATIONS, declarations, declares, method_of
from shardxform.formats.decoding import decoded
from shardxform.formats.dialects import select
from shardxform.formats.encoding import Encoded
from shardxform.formats.integers import Ints
from shardxform.formats.scheme import GROUP_SIZES, Format, Scheme
from shardxform.formats.stored import Stored, read_stored
from shardxform.model.families.base import Slicing
from shardxform.model.layout import Layout, layout_of, variants_found
from shardxform.plan.view import View, pruned_view
from shardxform.runtimes import as_family

__all__ = [
    "Inspection",
    "Parameters",
    "count_parameters",
    "encoding_names",
    "inspect_checkpoint",
    "parameters_of",
    "stored_of",
]

_WORDS: Final = ("qweight", "weight_packed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Facts about one checkpoint; sizes in bytes.

    Attributes:
        roles: role -> number of tensors and bytes, largest first.
        dtypes: dtype -> bytes.
        encodings: of quantized weights -> number of them and bytes, scales included; nothing where they are not
            understood.
        experts_spelling: `fused`, `per-expert`, or both.
        mtp_layers: that config.json declares.
        mtp_layers_found: of which there are tensors.
        parameters: of the decoder with embeddings and output head, quantized weights counted by their elements; None
            where they are quantized in a form that is not understood.
        parameters_apart: of the vision tower and MTP layers.
        unknown: tensors that the family does not know.
        unread: files that are no part of the model.
        outlook: what could be made of it -> bytes.

    """

    path: str
    family: str
    architecture: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    groups: int
    sets: tuple[str, ...]
    experts_spelling: str
    mtp_layers: int
    mtp_layers_found: int
    vision: bool
    quantization: str
    tensors: int
    parameters: int | None
    parameters_apart: int
    nbytes: int
    shards: int
    roles: Mapping[str, tuple[int, int]]
    dtypes: Mapping[str, int]
    encodings: Mapping[str, tuple[int, int]]
    sidecars: tuple[str, ...]
    unknown: tuple[str, ...]
    unread: tuple[str, ...]
    outlook: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        roles = {role: {"tensors": count, "bytes": nbytes} for role, (count, nbytes) in self.roles.items()}
        encodings = {name: {"weights": count, "bytes": nbytes} for name, (count, nbytes) in self.encodings.items()}
        return {**asdict(self), "roles": roles, "encodings": encodings}


@uncollected()
def inspect_checkpoint(source: Checkpoint) -> Inspection:
    """Describe `source` without reading tensor data.

    Raises:
        FamilyError: unknown family, or a config that contradicts itself.

    """
    source = as_family(source)
    layout = layout_of(source.config, source.tensors, source.where)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, ref in source.tensors.items():
        place = layout.places.get(name)
        role = place.role if place else "unknown"
        counts[role] += 1
        sizes[role] += ref.nbytes
        dtypes[ref.spec.dtype] += ref.nbytes
    plain, stored = _understood(source)
    found = _parameters_of(plain or source, stored)
    return Inspection(
        path=source.where,
        family=layout.family.name,
        architecture=layout.wrapper.architecture,
        layers=layout.num_layers,
        moe_layers=len(layout.moe_layers),
        experts=layout.num_experts,
        top_k=layout.top_k,
        groups=1 if layout.family.sets else layout.groups,
        sets=layout.family.sets,
        experts_spelling=" and ".join(sorted(set(variants_found(layout).values()))) or "none found",
        mtp_layers=layout.mtp_layers,
        mtp_layers_found=_mtp_found(layout),
        vision=layout.has_vision,
        quantization=_quantization(source),
        tensors=sum(len(shard.entries) for shard in source.shards),
        parameters=found.total(layout.num_experts) if found else None,
        parameters_apart=found.apart if found else 0,
        nbytes=source.nbytes,
        shards=len(source.shards),
        roles={role: (counts[role], nbytes) for role, nbytes in sizes.most_common()},
        dtypes=dict(dtypes.most_common()),
        encodings=dict(_encodings(plain, stored)),
        sidecars=tuple(sidecar.name for sidecar in source.sidecars),
        unknown=layout.unknown,
        unread=source.unread,
        outlook=dict(_outlook(source, plain or source, layout)),
    )


def _mtp_found(layout: Layout) -> int:
    """How many MTP layers have tensors; of one whose names have no number, as many as are declared."""
    found = {place.layer for place in layout.places.values() if place.scope == "mtp"} if layout.has_mtp else set()
    return len(found - {None}) or (layout.mtp_layers if found else 0)


def _understood(source: Checkpoint) -> tuple[Checkpoint | None, Stored | None]:
    """The 16-bit checkpoint that small floats stand for, or the weights that are quantized as `quantize` does it."""
    with suppress(CheckpointError, SchemeError):  # not as its config says; `verify` tells what is wrong
        plain = decoded(source)
        return plain, None if plain else stored_of(source)
    return None, None


def _encodings(plain: Checkpoint | None, stored: Stored | None) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, number and size of weights in each encoding, the largest first."""
    storages = [*stored.modules.values()] if stored else []
    for ref in plain.tensors.values() if plain else ():
        storages += ref.sources if isinstance(ref, Encoded) else ()
    counts = Counter(str(storage.encoding) for storage in storages)
    sizes = Counter[str]()
    for storage in storages:
        sizes[str(storage.encoding)] += storage.nbytes
    yield from ((name, (counts[name], nbytes)) for name, nbytes in sizes.most_common())


def _of_experts(ref: TensorRef, slicing: Slicing, experts: int) -> int:
    """Count the parameters of a router, or what lies like one, that belong to routed experts.

    Raises:
        FamilyError: it is not of so many experts.

    """
    shape = ref.spec.shape
    try:
        each = slicing.per_expert(shape[slicing.axis], experts)
    except (IndexError, ValueError):
        raise FamilyError(
            f"tensor '{ref.name}' {list(shape)}: expected dimension {slicing.axis} to count the {experts} experts that "
            "config.json says; one of the two is of another model"
        ) from None
    return math.prod(shape) // max(shape[slicing.axis], 1) * each * experts


def encoding_names(source: Checkpoint) -> tuple[str, ...]:
    """Name the encodings of quantized weights, the one with most bytes first; nothing where there are none."""
    return tuple(name for name, _ in _encodings(*_understood(source)))


def parameters_of(source: Checkpoint) -> Parameters | None:
    """Count parameters, those that stand for several codes in a number too; None where the form is not understood.

    Raises:
        FamilyError: see `layout.layout_of`.

    """
    plain, stored = _understood(source)
    return _parameters_of(plain or source, stored)


def _parameters_of(source: Checkpoint, stored: Stored | None) -> Parameters | None:
    if stored is None and any(name.rpartition(".")[2] in _WORDS for name in source.tensors):
        return None
    return count_parameters(source, stored)


def _quantization(source: Checkpoint) -> str:
    config = next((value for path, value in declarations(source.config) if path[-1] == DECLARATIONS[0]), None)
    return str(method_of(config) or "unknown method") if isinstance(config, Mapping) else ""


def _outlook(source: Checkpoint, plain: Checkpoint, layout: Layout) -> Iterator[tuple[str, int]]:
    """Sizes of what prune and quantize would write; nothing where they would refuse. `plain` is what is quantized."""
    keep = _half(layout)
    halved = f"prune to {len(keep)} experts" if keep else ""
    for manifest in (None, Manifest(keep=dict.fromkeys(layout.moe_layers, keep))) if keep else (None,):
        try:
            view = pruned_view(source if manifest else plain, manifest)
        except ShardxformError:
            continue
        if manifest:
            yield halved, view.checkpoint.nbytes
            view = view if plain is source else pruned_view(plain, manifest)
        with suppress(SchemeError):
            group_size, nbytes, again = _quantized(view)
            how = "" if group_size == GROUP_SIZES[0] else f" in groups of {group_size}"
            how += ", rounding 4 bits again" if again else ""
            yield f"{halved} and quantize to W4A16{how}" if manifest else f"quantize to W4A16{how}", nbytes


def _quantized(view: View) -> tuple[int, int, bool]:
    """Group size that experts fit, the usual one if they do, bytes of a view once quantized so, and what it takes.

    The last says whether weights of as few bits are rounded a second time, which `quantize` does only where it is told.

    Worked out on one routed expert of every layer and multiplied.

    Raises:
        SchemeError: see `dialects.select`; or no format's loader finds the experts.

    """
    from shardxform.plan.quantize import rounded_again  # what only copies needs none of it

    formats = view.layout.family.formats
    if not formats:
        raise SchemeError("no format has a loader that finds the experts")
    sample: dict[str, TensorRef] = {}
    times: dict[str, int] = {}
    for name, ref in view.checkpoint.tensors.items():
        place = view.layout.places.get(name)
        if place and place.expert is not None and place.expert % view.layout.in_set:
            continue
        fused = place is not None and place.template.variant == "fused"
        sample[name] = ref.rows(0, 1) if fused else ref
        times[name] = (
            (view.layout.num_experts if fused else view.layout.in_set) if place and place.template.variant else 1
        )
    for group_size in GROUP_SIZES:
        scheme = Scheme.preset("W4A16", group_size=group_size, format=cast("Format", formats[0]))
        selection = select(view.layout, sample, scheme)
        if any(module.expert is not None for module in selection.quantized):
            break
    replaced = {name for module in selection.quantized for name in module.sources}
    total = sum(ref.nbytes * times[name] for name, ref in sample.items() if name not in replaced)
    for module in selection.quantized:
        parts = Ints.of(scheme).parts(*module.shape)
        total += sum(part.spec(module.name).nbytes for part in parts) * times[module.sources[0]]
    return group_size, total, bool(rounded_again(selection, scheme))


def _half(layout: Layout) -> tuple[int, ...] | None:
    """Ids of half the experts, the first half of every router group; None when top-k needs more."""
    group = layout.num_experts // layout.groups
    keep = tuple(e for e in range(layout.num_experts) if e % group < group // 2)
    return keep if len(keep) >= layout.top_k else None


# -- parameters ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Counts over all layers.

    Attributes:
        shared: parameters that do not depend on the number of experts.
        routed: of one routed expert of every MoE layer.
        router: that the routers have for one expert of every MoE layer.
        reached: of one routed expert of every MoE layer that a token of text goes through, where sets of them differ.
        apart: of MTP layers and the vision tower, which are in none of the others.

    """

    shared: int
    routed: int
    router: int
    apart: int
    reached: int

    def total(self, experts: int) -> int:
        """With so many routed experts per layer."""
        return self.shared + experts * (self.routed + self.router)

    def active(self, experts: int, top_k: int) -> int:
        """What one token goes through: all routers, and `top_k` experts of every layer."""
        return self.shared + experts * self.router + top_k * self.reached


def stored_of(checkpoint: Checkpoint) -> Stored | None:
    """Read a checkpoint that is quantized as `quantize` does it; None for any other.

    Raises:
        CheckpointError: quantized so, but not as its config says.

    """
    if not declares(checkpoint.config):
        return None
    try:
        return read_stored(checkpoint)
    except SchemeError:
        return None


def count_parameters(checkpoint: Checkpoint, stored: Stored | None) -> Parameters:
    """Count from names and shapes; `stored` as `stored_of` gives it.

    Raises:
        FamilyError: see `layout.layout_of`.

    """
    if stored:
        return _count(stored.layout, [*stored.weights.values(), *stored.plain.values()])
    return _count(layout_of(checkpoint.config, checkpoint.tensors, checkpoint.where), checkpoint.tensors.values())


def _count(layout: Layout, refs: Iterable[TensorRef]) -> Parameters:
    shared = routed = router = apart = reached = 0
    for ref in refs:
        place = layout.places.get(ref.name)
        if place is None or place.companion:
            continue
        size = math.prod(ref.spec.shape)
        if place.scope not in ("root", "block"):
            apart += size
        elif place.template.variant:
            routed += size
            reached += size if (place.expert or 0) < layout.in_set else 0
        elif slicing := place.template.slicing:
            of_experts = _of_experts(ref, slicing, layout.counted(place.template))
            router += of_experts
            shared += size - of_experts
        else:
            shared += size
    experts = layout.num_experts
    return Parameters(
        shared=shared,
        routed=routed // experts,
        router=router // experts,
        apart=apart,
        reached=reached // layout.in_set,
    )
