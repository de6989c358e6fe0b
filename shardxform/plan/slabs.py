"""Planning the pruning of a model in GGUF, whatever its architecture and its blocks: slabs are copied, nothing else.

Experts are taken out of tensors as `runtimes.gguf.slabs` finds them, and one key is rewritten, in as many bytes. All
other keys and tensors stay as they are, in their order. Nothing is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from shardxform.ask.experts import Pruned
from shardxform.ask.manifest import Manifest, chosen_by
from shardxform.base.gguf import KeyValue
from shardxform.base.tensors import TensorRef, uncollected
from shardxform.checkpoint.gguf import SPLIT_KEYS, GgufModel
from shardxform.checkpoint.history import past_of
from shardxform.checkpoint.identity import identity_when_asked
from shardxform.errors import ManifestError, PlanError, ShardxformError
from shardxform.plan.gguf_files import gguf_names, gguf_shard, lay_out_gguf
from shardxform.plan.plan import Plan, ShardPlan, copy_steps
from shardxform.runtimes.gguf.slabs import UNNORMED_EXPERTS, Slabs, in_a_row, slabs_of

__all__ = ["GgufInspection", "PrunedGguf", "inspect_gguf", "plan_prune_gguf", "pruned_gguf", "pruned_of_slabs"]

_ROUTER: Final = ("ffn_gate_inp.", "exp_probs_b")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedGguf:
    """A model in GGUF that nobody wrote.

    Attributes:
        tensors: in the order of the source; their byte ranges lie in its files.
        metadata: keys of each of the source's files, as they become.
        slabs: of the source.
        sliced: number of tensors that lose experts.

    """

    tensors: Mapping[str, TensorRef]
    metadata: tuple[tuple[KeyValue, ...], ...]
    slabs: Slabs
    sliced: int


def pruned_gguf(model: GgufModel, manifest: Manifest) -> PrunedGguf:
    """Apply a keep manifest, by names, shapes and keys alone.

    Raises:
        CheckpointError, FamilyError, PlanError: see `slabs_of`.
        ManifestError: the manifest does not fit, or takes channels out; or there are blocks that predict further
            tokens, and it does not say which of their experts stay: one key counts those of all blocks.

    """
    slabs = slabs_of(model.metadata, model.table.tensors, model.where)
    manifest.check(pruned_of_slabs(slabs))
    if manifest.width:
        raise ManifestError(
            f"{manifest.where}: width: columns of blocks are not taken out of a GGUF file; prune the safetensors, with"
            " `format` gguf"
        )
    kept = manifest.num_kept
    if kept < slabs.num_experts and slabs.mtp_layers and not manifest.mtp_keep:
        raise ManifestError(
            f"{manifest.where}: mtp_keep: missing, but block {slabs.num_layers} predicts further tokens with experts of"
            f" its own, which {slabs.count_key} counts too; say which of them stay"
        )
    if slabs.arch == "llama4" and UNNORMED_EXPERTS in {kept, slabs.num_experts} and kept != slabs.num_experts:
        raise PlanError(
            f"{model.where}: {slabs.num_experts} experts, of which {kept} would stay; by {UNNORMED_EXPERTS} llama.cpp"
            " knows that a Llama 4 has no norms of queries and keys: it would run another model"
        )
    every = tuple(range(slabs.num_experts))
    keeps = dict(manifest.keep) | {slabs.num_layers + layer: ids for layer, ids in manifest.mtp_keep.items()}
    tensors: dict[str, TensorRef] = {}
    sliced = 0
    for name, ref in model.table.tensors.items():
        keep = keeps.get(slabs.homes[name], every) if name in slabs.homes else every
        tensors[name] = ref if keep == every else _selected(ref, keep)
        sliced += keep != every
    metadata = tuple(tuple(_counted(each, slabs, kept) for each in head.metadata) for head in model.heads)
    return PrunedGguf(tensors=tensors, metadata=metadata, slabs=slabs, sliced=sliced)


def _selected(ref: TensorRef, keep: Sequence[int]) -> TensorRef:
    """What is left of what counts experts, in as many dimensions."""
    if not in_a_row(ref.spec.shape):
        return ref.select(keep)
    return ref.reshaped(ref.spec.shape[1:]).select(keep).reshaped((1, len(keep)))


def _counted(each: KeyValue, slabs: Slabs, kept: int) -> KeyValue:
    return each.with_value(kept) if each.key == slabs.count_key else each


@uncollected()
def plan_prune_gguf(model: GgufModel, manifest: Manifest, max_shard_bytes: int | None = None) -> Plan:
    """Plan a pruned copy of a model in GGUF, in as many files as it has.

    Args:
        model: what to prune.
        manifest: experts to keep; those of blocks that predict further tokens as MTP layers.
        max_shard_bytes: most bytes of data in one file, where it is to be split anew.

    Raises:
        CheckpointError, FamilyError, PlanError, ManifestError: see `pruned_gguf`; or the manifest says that it was
            chosen on another checkpoint, or on other values of this one.

    """
    pruned = pruned_gguf(model, manifest)
    identity = identity_when_asked(model.table)
    manifest.refuse_other_source(identity, model.table.shards)
    shards = _shards(model, pruned, max_shard_bytes)
    before, keep, past = model.table, manifest.to_dict(), past_of(model.table)
    view = replace(before, tensors=pruned.tensors)
    plan = Plan(
        command="prune",
        source=before.root,
        source_name=model.name,
        remote=before.remote,
        source_shards=before.shards,
        view=view,
        shards=shards,
        steps=tuple(copy_steps(shards, pruned.tensors)),
        config=b"",
        sidecars={},
        identity=identity,
        stated={
            "command": "prune",
            "options": {"max_shard_bytes": max_shard_bytes},
            "manifest": {key: keep[key] for key in ("keep", "mtp_keep") if keep.get(key)},
            "source": {"sidecars": {}},
        },
        summary={**_summary(model, pruned, manifest.num_kept), **chosen_by(manifest)},
        notes=(*_notes(model), *past.notes),
        unread=before.unread,
        past=past,
        container="gguf",
    )
    plan.check()
    return plan


def _shards(model: GgufModel, pruned: PrunedGguf, max_shard_bytes: int | None) -> tuple[ShardPlan, ...]:
    """Files of the output: those of the source, or as many as a limit gives."""
    if max_shard_bytes is None:
        names = gguf_names("model", len(model.heads))
        return tuple(
            gguf_shard(name, keys, [pruned.tensors[e.spec.name].spec for e in head.entries], head.version)
            for name, keys, head in zip(names, pruned.metadata, model.heads, strict=True)
        )
    first, *others = (tuple(each for each in keys if each.key not in SPLIT_KEYS) for keys in pruned.metadata)
    if own := [each.key for keys in others for each in keys if each not in first]:
        raise PlanError(
            f"{model.where}: its further files have keys of their own ({own[0]}), so it is not split anew; leave"
            " `max_shard_bytes` out"
        )
    return lay_out_gguf(first, (ref.spec for ref in pruned.tensors.values()), max_shard_bytes)


def _summary(model: GgufModel, pruned: PrunedGguf, kept: int) -> dict[str, Any]:
    """Figures for people and for JSON; sizes in bytes."""
    slabs, roles = pruned.slabs, Counter[str]()
    for name, ref in pruned.tensors.items():
        roles[_role(name, slabs)] += ref.nbytes
    return {
        "family": slabs.arch,
        "architecture": "GGUF",
        "layers": slabs.num_layers,
        "experts_before": slabs.num_experts,
        "experts_after": kept,
        "top_k": slabs.top_k,
        "tensors_before": len(model.table.tensors),
        "tensors_after": len(pruned.tensors),
        "copied": len(pruned.tensors) - pruned.sliced,
        "sliced": pruned.sliced,
        "renamed": 0,
        "dropped": {},
        "bytes_before": model.table.nbytes,
        "bytes_by_role": dict(roles),
    }


def _notes(model: GgufModel) -> list[str]:
    told = [key for key in ("general.name", "general.size_label") if key in model.metadata]
    notes = [f"as in the source, where all experts are there: {', '.join(told)}"] if told else []
    if any(key.startswith("quantize.imatrix.") for key in model.metadata):
        notes.append("quantize.imatrix.* tell of the text that the source was quantized by")
    return notes


def _role(name: str, slabs: Slabs) -> str:
    if name in slabs.homes:
        return "router" if any(part in name for part in _ROUTER) else "routed experts"
    return "other"


# -- inspection -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufInspection:
    """Facts about one model in GGUF; sizes in bytes.

    Attributes:
        architecture: as llama.cpp calls it; empty where the file does not say.
        slabs: what it says of its experts; None where they cannot be pruned.
        refusal: why they cannot; else empty.
        roles: role -> number of tensors and bytes, the largest first.
        dtypes: dtype -> number of tensors and bytes.
        outlook: what could be made of it -> bytes.
        unread: files beside it that are no part of it.

    """

    path: str
    architecture: str
    slabs: Slabs | None
    refusal: str
    tensors: int
    parameters: int
    nbytes: int
    files: int
    roles: Mapping[str, tuple[int, int]]
    dtypes: Mapping[str, tuple[int, int]]
    outlook: Mapping[str, int]
    unread: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        counted = {
            key: {name: {"tensors": count, "bytes": nbytes} for name, (count, nbytes) in found.items()}
            for key, found in (("roles", self.roles), ("dtypes", self.dtypes))
        }
        slabs = {key: value for key, value in asdict(self.slabs).items() if key != "homes"} if self.slabs else None
        return {**asdict(replace(self, slabs=None)), **counted, "slabs": slabs}


def inspect_gguf(model: GgufModel) -> GgufInspection:
    """Describe a model in GGUF without reading tensor data."""
    table, slabs, refusal = model.table, None, ""
    try:
        slabs = slabs_of(model.metadata, table.tensors, model.where)
    except ShardxformError as e:
        refusal = str(e).removeprefix(f"{model.where}: ")
    roles, dtypes = _Sizes(), _Sizes()
    for name, ref in table.tensors.items():
        roles.add(_role(name, slabs) if slabs else "not known", ref.nbytes)
        dtypes.add(ref.spec.dtype, ref.nbytes)
    found = model.metadata.get("general.architecture")
    return GgufInspection(
        path=model.where,
        architecture=str(found.value) if found else "",
        slabs=slabs,
        refusal=refusal,
        tensors=len(table.tensors),
        parameters=sum(ref.spec.elements for ref in table.tensors.values()),
        nbytes=table.nbytes,
        files=len(table.shards),
        roles=roles.sorted(),
        dtypes=dtypes.sorted(),
        outlook=_outlook(model, slabs) if slabs else {},
        unread=table.unread,
    )


class _Sizes:
    """Numbers and bytes of tensors, by what they are."""

    def __init__(self) -> None:
        self._counts, self._bytes = Counter[str](), Counter[str]()

    def add(self, what: str, nbytes: int) -> None:
        self._counts[what] += 1
        self._bytes[what] += nbytes

    def sorted(self) -> dict[str, tuple[int, int]]:
        return {what: (self._counts[what], nbytes) for what, nbytes in self._bytes.most_common()}


def _outlook(model: GgufModel, slabs: Slabs) -> dict[str, int]:
    """Size with half of the experts, the first half of every group; nothing where the router picks more."""
    group = slabs.num_experts // slabs.groups
    keep = tuple(e for e in range(slabs.num_experts) if e % group < group // 2)
    half = Manifest(keep=dict.fromkeys(slabs.moe_layers, keep), mtp_keep=dict.fromkeys(slabs.mtp_layers, keep))
    try:
        pruned = pruned_gguf(model, half)
    except ShardxformError:
        return {}
    return {f"prune to {len(keep)} experts": sum(ref.nbytes for ref in pruned.tensors.values())}


def pruned_of_slabs(slabs: Slabs) -> Pruned:
    """What a manifest for a model in GGUF speaks of."""
    return Pruned(
        model_type=slabs.arch,
        is_called=slabs.is_called,
        num_layers=slabs.num_layers,
        num_experts=slabs.num_experts,
        moe_layers=slabs.moe_layers,
        mtp_layers=slabs.nextn,
        mtp_moe_layers=slabs.mtp_layers,
        mtp_follows=True,
        top_k=slabs.top_k,
        top_k_key=f"{slabs.arch}.expert_used_count",
        groups=slabs.groups,
        group_key=f"{slabs.arch}.expert_group_count",
        top_groups=slabs.top_groups,
        top_group_key=f"{slabs.arch}.expert_group_used_count",
    )
