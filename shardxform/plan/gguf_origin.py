"""A GGUF output drafted once more: from the checkpoint that it was made of, and what its record says of its making.

With it `verify` proves such an output, and `evaluate` runs it: a GGUF file has no config, and other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardxform.ask.manifest import FORMAT, VERSION, Manifest
from shardxform.ask.recipe import HEALED, Heal, Recipe, first_steps_told
from shardxform.checkpoint.gguf import GgufModel
from shardxform.checkpoint.history import made_before, put_together, steps_since
from shardxform.checkpoint.identity import Identity, config_sha256, identify, names_of
from shardxform.checkpoint.record import PROVENANCE, read_record
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError, ShardxformError
from shardxform.formats.scheme import GGUF, Grid, Scheme
from shardxform.model.layout import layout_of
from shardxform.plan.gguf import GgufFiles, as_weights, draft_stored
from shardxform.plan.quantize import draft_quantized
from shardxform.plan.view import DEFAULT_GGUF_BYTES, GgufOptions, MtpMode, ViewOptions
from shardxform.runtimes.gguf.mixes import KINDS
from shardxform.runtimes.gguf.undoing import put_back

__all__ = ["Redraft", "inputs_for", "redraft", "stands_for"]

_MODES: Final[tuple[MtpMode, ...]] = ("auto", "keep", "drop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Redraft:
    """A draft, and how its weights were rounded.

    Attributes:
        draft: what the files hold.
        scheme: of weights that were rounded; None where none were.
        recipe: what of it decides which tensors were healed and tuned, and how far; None where none were.
        crossing: modules that were selected, but whose columns leave their blocks.

    """

    draft: GgufFiles
    scheme: Scheme | None
    recipe: Recipe | None
    crossing: frozenset[str]


def inputs_for(
    source: Checkpoint, inputs: Mapping[str, object], *, packed: bool = False, facts: object = None
) -> Mapping[str, object]:
    """Inputs of a record as they hold for a source: what it was made of, or what that was made of.

    Those of a converted output also tell how what was converted had been made, which counts for another source. Where
    several steps lie between, they are put together as if one had done them all.

    Args:
        source: what is compared with.
        inputs: of the record.
        packed: whether the source has the integers that the output has.
        facts: of the record.

    Raises:
        CheckpointError: steps lie between that are not put together.

    """
    if len(between := steps_since(source, inputs, facts)) > 1:
        return {**inputs, **put_together(source, between)}
    origin, recorded = made_before(inputs), inputs.get("source")
    direct = isinstance(recorded, Mapping) and recorded.get("config") == config_sha256(source.config)
    return inputs if between or direct or packed or origin is None else {**inputs, **origin}


def redraft(
    source: Checkpoint,
    inputs: Mapping[str, object],
    manifest: Manifest | None,
    *,
    text_only: bool | None = None,
    mtp: MtpMode | None = None,
) -> Redraft:
    """Draft what an output holds.

    Args:
        source: what it was made of, or what that was made of.
        inputs: of its record; empty for a file of others, which is taken for weights as they are.
        manifest: experts that stay.
        text_only: as it was made, where that is not for the record to say.
        mtp: the same.

    Raises:
        SchemeError, FamilyError, ManifestError, PlanError: see `plan_quantize` and `plan_stored`.

    """
    asked = inputs_for(source, inputs)
    options = _options(inputs, asked, text_only, mtp)
    recipe, scheme = _recipe(asked.get("recipe")), _scheme(asked.get("scheme"))
    if scheme is None:
        draft = draft_stored(source, manifest, options, recipe)
        return Redraft(draft=draft, scheme=None, recipe=recipe, crossing=frozenset())
    draft, chosen, selection = draft_quantized(source, scheme, manifest, options, recipe)
    crossing = frozenset(m.name for m in chosen.quantized) - {m.name for m in selection.quantized}
    return Redraft(draft=draft, scheme=scheme, recipe=recipe, crossing=crossing)


def _options(
    inputs: Mapping[str, object], asked: Mapping[str, object], text_only: bool | None, mtp: MtpMode | None
) -> ViewOptions:
    """How the view was made, and how the file: of a converted output these stand in different records."""
    own, before = (each.get("options") for each in (inputs, asked))
    own, before = (each if isinstance(each, Mapping) else {} for each in (own, before))
    size, told = own.get("max_shard_bytes"), own.get("gguf")
    pre, kind = ((told.get(key) if isinstance(told, Mapping) else "") for key in ("pre_tokenizer", "kind"))
    recorded: MtpMode = next((mode for mode in _MODES if mode == before.get("mtp")), "auto")
    return ViewOptions(
        text_only=before.get("text_only") is True if text_only is None else text_only,
        mtp=mtp or recorded,
        max_shard_bytes=size if type(size) is int and size > 0 else DEFAULT_GGUF_BYTES,
        gguf=GgufOptions(pre_tokenizer=pre if isinstance(pre, str) else "", kind=str(kind) if kind in KINDS else ""),
    )


def _scheme(recorded: object) -> Scheme | None:
    """The scheme of a record; None where nothing was rounded, or what is recorded is none."""
    if not isinstance(recorded, Mapping):
        return None
    try:
        return Scheme(
            grid=Grid(**recorded["grid"]),
            format=recorded.get("format", GGUF),
            keep_16bit=_texts(recorded.get("keep_16bit")),
            quantize=_texts(recorded.get("quantize")),
            requantize=recorded.get("requantize") is True,
        )
    except (KeyError, TypeError, ShardxformError):
        return None


def _texts(found: object) -> tuple[str, ...]:
    return tuple(each for each in found if isinstance(each, str)) if isinstance(found, list) else ()


def _recipe(recorded: object) -> Recipe | None:
    """What of a recipe decides which tensors were healed and tuned, and how far; None where it says nothing."""
    if not isinstance(recorded, Mapping):
        return None
    iters, heal = recorded.get("iters"), recorded.get("heal")
    what: Any = heal.get("what") if isinstance(heal, Mapping) else None
    healing = Heal(what=what) if what == "auto" or what in list(HEALED) else None
    steps = iters if type(iters) is int and iters > 0 else 0
    if not healing and not steps:
        return None
    lr, minmax_lr = first_steps_told(recorded, steps) if steps else (None, None)
    return Recipe(windows="", data={}, samples=2, seqlen=1, iters=steps, lr=lr, minmax_lr=minmax_lr, heal=healing)


# -- the checkpoint that it stands for --------------------------------------------------------------------------------


def stands_for(model: GgufModel, source: Checkpoint, manifest: Manifest | None = None) -> Checkpoint:
    """The checkpoint that a model in GGUF stands for: config and names are the source's, numbers are the file's.

    Args:
        model: an output of shardxform's that was made of `source`, as its record says; or any file of the same model.
        source: the checkpoint that it was made of, or that was converted to it.
        manifest: experts that stay, of a file without a record.

    Raises:
        CheckpointError: the record names another source, or the file holds other tensors than the source gives.
        SchemeError, FamilyError, ManifestError, PlanError: see `redraft`.

    """
    record = read_record(model.table.root / PROVENANCE)
    inputs = record.inputs if record and set(record.shards) == {shard.name for shard in model.table.shards} else {}
    asked = inputs_for(source, inputs)
    if inputs:
        _refuse_other(model, source, asked)
        manifest = _recorded(source, asked) or manifest
    found = redraft(source, inputs, manifest)
    written, held = found.draft.contents.written, model.table.tensors
    for each in written:
        ref = held.get(each.named.name)
        if ref is None or ref.spec.shape != each.named.shape:
            there = f"{list(ref.spec.shape)}" if ref else "missing"
            raise CheckpointError(
                f"{model.where}: tensor '{each.named.name}': {there}, expected {list(each.named.shape)} by"
                f" {source.where}: another model, or pruned otherwise"
            )
    view = found.draft.view.checkpoint
    tensors = put_back([each.named for each in written], held, view.tensors)
    return Checkpoint(model.table.root, view.config, tensors, model.table.shards)


def _recorded(source: Checkpoint, asked: Mapping[str, object]) -> Manifest | None:
    """The manifest of a record, checked."""
    recorded = asked.get("manifest")
    if not isinstance(recorded, Mapping) or not recorded:
        return None
    weights = as_weights(source)
    layout = layout_of(weights.config, weights.tensors, source.where)
    value = {"format": FORMAT, "version": VERSION, **recorded}
    return Manifest.from_dict(value, where=PROVENANCE, layout=layout)


def _refuse_other(model: GgufModel, source: Checkpoint, asked: Mapping[str, object]) -> None:
    known = Identity.from_dict(asked.get("source"))
    other = known.difference(identify(source), names_of(source.shards)) if known else "its record names none"
    if other:
        raise CheckpointError(f"{model.where}: not made of {source.where}: {other}")
