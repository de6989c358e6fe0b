"""Planning a conversion: a quantized source written in another format or spelling, or dequantized to 16 bits.

No integer and no scale changes between the quantized formats; what a client reads from the output is what it read from
the source. The new quantization_config is made by the code that `quantize` uses, from what is stored rather than from
what the old one said. Pure but for sidecars; no tensor data is read and no array library is imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, cast

from shardxform.base import computing
from shardxform.base.tensors import TensorRef, TensorSpec, uncollected
from shardxform.checkpoint.history import past_of
from shardxform.checkpoint.identity import identity_when_asked
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats.config_names import declared_in, declares, method_of, with_declared
from shardxform.formats.decoding import decoded, encodings_of
from shardxform.formats.dialects import Selection, build, kept_tensors, reasons_summary, refuse_unread
from shardxform.formats.encoding import Encoded
from shardxform.formats.integers import Ints
from shardxform.formats.matrices import matrices_of
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import GGUF, ROW_FORMATS, ExpertNames, Format, Scheme
from shardxform.formats.stored import (
    HALF_DTYPES,
    Float,
    Stored,
    as_plain,
    config_of_half,
    has_g_idx,
    read_stored,
    released,
)
from shardxform.model.families import family_origin
from shardxform.model.layout import layout_of
from shardxform.plan.gguf import plan_stored
from shardxform.plan.mlx import part_specs, stack_item
from shardxform.plan.plan import Plan, ShardPlan, Step, copy_steps, extents_of, lay_out
from shardxform.plan.steps import Transcode, TranscodeItem, transcode_item, transcode_steps
from shardxform.plan.view import (
    DEFAULT_SHARD_BYTES,
    GgufOptions,
    View,
    ViewOptions,
    config_bytes,
    pruned_view,
    sidecar_digests,
    view_summary,
)
from shardxform.runtimes import as_family, mlx
from shardxform.runtimes.mlx import Stack
from shardxform.runtimes.mlx_families import refuse_misread

__all__ = [
    "ConvertOptions",
    "Target",
    "plan_convert",
]


_FLOAT_ROLES: Final = frozenset({"router", "embeddings", "norms", "vision"})
_IN_SOURCE: Final = "16-bit in the source"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What to write.

    Attributes:
        format: a quantized format, or `bf16` or `fp16` for dequantized weights in the release's layout; or `gguf`, of
            16-bit weights too.
        expert_names: see `Scheme`; has no meaning for dequantized weights.
        g_idx: see `Scheme`.

    """

    format: Format | Float
    expert_names: ExpertNames = "split"
    g_idx: bool = False

    def __post_init__(self) -> None:
        if self.format == GGUF and (self.g_idx or self.expert_names != "split"):
            raise SchemeError("gguf has no g_idx, and one spelling of experts: llama.cpp's")
        if self.format in HALF_DTYPES and (self.g_idx or self.expert_names != "split"):
            raise SchemeError(f"{self.format} has no g_idx and one spelling of experts: the release's")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """What decides an output's bytes beside source and target.

    Attributes:
        max_shard_bytes: most bytes of tensor data in one shard.
        gguf: how a GGUF file is written, where the target is one.

    """

    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    gguf: GgufOptions | None = None


@uncollected()
def plan_convert(source: Checkpoint, target: Target, options: ConvertOptions | None = None) -> Plan:
    """Plan a conversion of a quantized checkpoint; to GGUF, of any.

    Raises:
        SchemeError: the source is not quantized, or in a way that is not supported; there is nothing to convert; the
            target cannot hold it.
        CheckpointError: a stored tensor is not what config and family say; see `formats.stored`.
        FamilyError, PlanError: see `view.pruned_view`.

    """
    options, source = options or ConvertOptions(), as_family(source)
    if target.format == GGUF:
        return _plan_gguf(source, target, options)
    if floats := decoded(source):
        return _plan_decoded(source, floats, target, options)
    if target.format == "mlx" and not declares(source.config):
        raise SchemeError(_of_16_bits(source))
    stored = read_stored(source)
    scheme = _scheme(stored, target)
    _refuse_nothing(stored, target)
    _refuse_restacking(stored, target)
    plain_source = as_plain(source, stored)
    config = dict(plain_source.config)
    view = pruned_view(plain_source, None, mtp="drop" if target.format == "mlx" else "auto")
    _refuse_half(view, target)
    selection = _selection(view, stored, target.expert_names)
    told: tuple[str, ...] = ()
    stacks = _stacks(view, selection) if target.format == "mlx" else []
    weights = [] if stacks else _weights(view, stored, selection, target)
    plain = _plain(stored, view, selection, scheme)
    if target.format == "mlx":
        quantization = build(selection, cast(Scheme, scheme), view.layout)
        config = mlx.config_of(view.checkpoint.config, view.layout, quantization)
        told = tuple(mlx.notes_of(view.source_layout, config))
    elif scheme is not None:
        quantization = build(selection, scheme, view.layout)
        config = with_declared(source.config, quantization)
    elif target.format == "fp16":
        config = config_of_half(config)
    stacked = part_specs(stacks, Ints.of(cast(Scheme, scheme))) if stacks else ()
    shards = lay_out([*_specs(plain, weights, scheme), *stacked], options.max_shard_bytes)
    encoding = Ints.of(scheme) if scheme else Plain(HALF_DTYPES[target.format])
    copied = {name: ref for name, ref in plain.items() if not isinstance(ref, Encoded)}
    moved = [ref for ref in plain.values() if isinstance(ref, Encoded)]
    computed = (*_moved(shards, moved), *_steps(shards, weights, stacks, encoding))
    steps: tuple[Step, ...] = (*copy_steps(shards, copied), *computed)
    sidecars, past = sidecar_digests(source), past_of(source)
    plan = Plan(
        command="convert",
        source=source.root,
        remote=source.remote,
        source_shards=source.shards,
        view=view.checkpoint,
        shards=shards,
        steps=steps,
        config=config_bytes(source, replace(view, checkpoint=replace(view.checkpoint, config=config))),
        sidecars=sidecars,
        identity=identity_when_asked(source),
        stated=_stated(source, target, options, sidecars, scheme),
        summary=_summary(source, view, stored, selection, shards, scheme),
        notes=(*_notes(stored, target), *view.notes, *told, *past.notes),
        unread=source.unread,
        past=past,
    )
    plan.check()
    return plan


def _plan_gguf(source: Checkpoint, target: Target, options: ConvertOptions) -> Plan:
    """Plan a GGUF file of all that a checkpoint holds."""
    asked = ViewOptions(max_shard_bytes=options.max_shard_bytes, gguf=options.gguf or GgufOptions())
    return plan_stored("convert", source, None, asked, beside={"target": asdict(target)})


def _plan_decoded(source: Checkpoint, plain: Checkpoint, target: Target, options: ConvertOptions) -> Plan:
    """Plan the 16-bit checkpoint that a source that is only read stands for, in the release's layout.

    Raises:
        SchemeError: a target of integers, which are rounded anew and not converted.

    """
    kinds = encodings_of(plain.tensors.values())
    if target.format == "mlx" and method_of(declared_in(source.config)) == "mxfp4":
        raise SchemeError(
            "`target.format` mlx: nothing to convert: mlx-lm takes MXFP4 as the release has it, and so what `shardxform"
            " prune` makes of it; `shardxform quantize` with `requantize` rounds it anew"
        )
    if target.format not in HALF_DTYPES:
        raise SchemeError(
            f"`target.format` {target.format}: the source is in {' and '.join(kinds)}, which symmetric integers of one"
            " scheme do not hold; use `shardxform quantize`, or `target.format` bf16"
        )
    view = pruned_view(plain, None)
    _refuse_half(view, target)
    tensors = released(view.checkpoint.tensors, view.layout)
    dtype = HALF_DTYPES[target.format]
    weights = [replace(ref, spec=ref.spec._replace(dtype=dtype)) for ref in tensors if isinstance(ref, Encoded)]
    copied = {ref.name: ref for ref in tensors if not isinstance(ref, Encoded)}
    config = config_of_half(plain.config) if target.format == "fp16" else plain.config
    shards = lay_out(_specs(copied, weights, None), options.max_shard_bytes)
    sidecars, past = sidecar_digests(source), past_of(source)
    count = len(plain.tensors) - sum(not isinstance(ref, Encoded) for ref in plain.tensors.values())
    plan = Plan(
        command="convert",
        source=source.root,
        remote=source.remote,
        source_shards=source.shards,
        view=view.checkpoint,
        shards=shards,
        steps=(*copy_steps(shards, copied), *_steps(shards, weights, (), Plain(dtype))),
        config=config_bytes(source, replace(view, checkpoint=replace(view.checkpoint, config=config))),
        sidecars=sidecars,
        identity=identity_when_asked(source),
        stated=_stated(source, target, options, sidecars, None),
        summary={
            **view_summary(source, view),
            "from": method_of(declared_in(source.config)),
            "tensors_after": sum(len(shard.entries) for shard in shards),
            "copied": len(copied),
            "converted_modules": count,
        },
        notes=(
            f"{count:,} weight matrices in {' and '.join(kinds)} become {_HALVES[target.format]}",
            *view.notes,
            *past.notes,
        ),
        unread=source.unread,
        past=past,
    )
    plan.check()
    return plan


def _of_16_bits(source: Checkpoint) -> str:
    """Why a source that is not quantized is not converted to MLX, and what can be done with it."""
    layout = layout_of(source.config, source.tensors, source.where)
    mlx.refuse_unrun(layout)
    takes = "takes none" if layout.family.experts.transposed else "takes them as they are"
    return (
        f"`target.format` mlx: the source is in 16 bits, and of {layout.family.name} mlx-lm {takes} in the release's"
        " layout; to round it, `shardxform quantize` with `format` mlx"
    )


_HALVES: Final[Mapping[str, str]] = {
    "bf16": "bfloat16: each code times its scale, rounded to 8 significant bits where these are fewer than it has",
    "fp16": "float16: each code times its scale, which must fit exactly",
}


def _scheme(stored: Stored, target: Target) -> Scheme | None:
    """The scheme to write in, on the source's own grid; None for dequantized weights."""
    if target.format == "bf16" or target.format == "fp16":
        return None
    if target.format == "mlx" and stored.scheme.grid.scale_grid != "bf16":
        raise SchemeError(
            "`target.format` mlx: scales of the source are float16 that nothing says are exact in bfloat16, as MLX has"
            " them; use `target.format` bf16, and mlx_lm.convert"
        )
    scheme = Scheme(grid=stored.scheme.grid, format=target.format, expert_names=target.expert_names, g_idx=target.g_idx)
    refuse_unread(stored.layout, scheme)
    for module in stored.modules.values():
        rows, columns = module.shape
        why = Ints.of(scheme).misfit(rows, columns)
        if rows % 32 or columns % 32 or (target.format in ROW_FORMATS and why):
            raise SchemeError(
                f"module {module.name}: {why}, which {target.format} cannot hold; try `target.format` bf16"
            )
    for name in stored.weights:
        if (role := stored.layout.places[name].template.role) in _FLOAT_ROLES:
            raise SchemeError(
                f"tensor '{name}' is quantized, but no client runs a quantized {role}; try `target.format` bf16"
            )
    return scheme


def _refuse_half(view: View, target: Target) -> None:
    """Refuse float16 where it overflows while the model runs, by the rule by which `verify` judges a config."""
    family = view.layout.family
    if target.format == "fp16" and family.bfloat16_only:
        raise SchemeError(
            f"`target.format` fp16: float16 overflows in the gated delta-net layers of family {family.name}; use bf16"
        )


def _refuse_nothing(stored: Stored, target: Target) -> None:
    same_index = all(has_g_idx(module) == target.g_idx for module in stored.modules.values())
    if stored.scheme.format == target.format and stored.spellings <= {target.expert_names} and same_index:
        names = f" with {target.expert_names} expert names" if stored.spellings else ""
        raise SchemeError(f"nothing to convert: the source is {target.format}{names} already")


def _refuse_restacking(stored: Stored, target: Target) -> None:
    """Refuse to dequantize into stacks that hold matrices transposed or row by row in turn.

    Raises:
        SchemeError: names the family.

    """
    family = stored.layout.family
    if target.format in HALF_DTYPES and family.experts.stacks and (family.experts.transposed or family.experts.bias):
        raise SchemeError(
            f"family {family.name} stacks its experts transposed, which is not written from quantized ones; start from"
            " the checkpoint that was quantized"
        )


def _selection(view: View, stored: Stored, expert_names: ExpertNames) -> Selection:
    """What is stored quantized and what is not, in the spelling asked for, as `quantize` would have selected it."""
    modules = list(matrices_of(view.layout, view.checkpoint.tensors, expert_names))
    quantized = tuple(module for module in modules if module.sources[0] in stored.weights)
    kept = tuple(module for module in modules if module.sources[0] not in stored.weights)
    return Selection(quantized, {module.name: _IN_SOURCE for module in kept}, {}, kept)


def _specs(plain: Mapping[str, TensorRef], weights: Iterable[Encoded], scheme: Scheme | None) -> Iterator[TensorSpec]:
    """Every tensor of the output."""
    yield from (ref.spec for ref in plain.values())
    for weight in weights:
        if scheme is None:
            yield weight.spec
        else:
            rows, columns = weight.spec.shape
            yield from (part.spec(weight.name) for part in Ints.of(scheme).parts(rows, columns))


def _weights(view: View, stored: Stored, selection: Selection, target: Target) -> list[Encoded]:
    """What to write of the quantized weights: one for each module, named after it, or dequantized ones."""
    dtype = HALF_DTYPES.get(target.format)
    if dtype is None:
        return [_encoded(module.weight.renamed(module.name)) for module in selection.quantized]
    weights = [_encoded(ref) for ref in released(stored.weights, view.layout)]
    return [replace(weight, spec=weight.spec._replace(dtype=dtype)) for weight in weights]


def _encoded(ref: TensorRef) -> Encoded:
    assert isinstance(ref, Encoded)
    return ref


def _plain(stored: Stored, view: View, selection: Selection, scheme: Scheme | None) -> Mapping[str, TensorRef]:
    """What is copied: experts that are 16-bit in the source in the layout that the target's loaders want."""
    if scheme is not None and scheme.format == "mlx":
        return mlx.kept_of(view.layout, view.checkpoint.tensors, selection)
    if scheme is None or scheme.format == "compressed-tensors":
        return {ref.name: ref for ref in released(stored.plain, view.layout)}
    return kept_tensors(view.layout, stored.plain, selection, scheme)


def _stacks(view: View, selection: Selection) -> list[Stack]:
    """What MLX has as one module each."""
    mlx.refuse_unrun(view.layout, selection.quantized)
    refuse_misread(view.layout)
    return mlx.stacks_of(view.layout, selection.quantized)


def _moved(shards: Sequence[ShardPlan], refs: Iterable[Encoded]) -> Iterator[Transcode]:
    """Steps that write what keeps its values, but is no run of the source's bytes."""
    extents = extents_of(shards)
    items = (
        TranscodeItem(ref.name, ref.sources, Plain(ref.spec.dtype), (("values", extents[ref.name]),)) for ref in refs
    )
    yield from transcode_steps((item, item.out_bytes) for item in items)


def _steps(
    shards: Sequence[ShardPlan], weights: Iterable[Encoded], stacks: Iterable[Stack], encoding: Ints | Plain
) -> Iterator[Transcode]:
    """Steps that write weights, in table order; they are as large as what is written."""
    extents = extents_of(shards)

    def items() -> Iterator[tuple[TranscodeItem, int]]:
        for weight in weights:
            if isinstance(encoding, Plain):
                item = TranscodeItem(weight.name, weight.sources, encoding, (("values", extents[weight.name]),))
            else:
                item = transcode_item(weight.name, weight.sources, encoding, extents)
            yield item, item.out_bytes
        for stack in stacks:
            item = stack_item(stack, cast(Ints, encoding), extents)
            yield item, item.out_bytes

    return transcode_steps(items())


# -- what is said of it -------------------------------------------------------------------------------------------


def _stated(
    source: Checkpoint,
    target: Target,
    options: ConvertOptions,
    sidecars: Mapping[str, str],
    scheme: Scheme | None,
) -> dict[str, Any]:
    """What the bytes depend on, by name, but for the source's values.

    `scheme.grid.scale_grid` is what a later conversion looks for. What the source's own record says of its making is
    carried on beside it: with that `verify` can prove the output against the checkpoint that was quantized as well as
    against the one that was converted.
    """
    return {
        "command": "convert",
        "options": {"max_shard_bytes": options.max_shard_bytes},
        "target": asdict(target),
        "source": {"sidecars": dict(sidecars)},
        **family_origin(source.config),
        **({"scheme": scheme.facts()} if scheme else {}),
        computing.KEY: computing.of_rounding(),
    }


def _summary(
    source: Checkpoint,
    view: View,
    stored: Stored,
    selection: Selection,
    shards: Iterable[ShardPlan],
    scheme: Scheme | None,
) -> dict[str, Any]:
    """Figures for people and for JSON; `bytes_by_role` counts weights in 16 bits, as `quantize` does."""
    quantized = (
        {
            "scheme": scheme.facts(),
            "quantized_modules": len(selection.quantized),
            "quantized_weight_bytes": sum(module.nbytes for module in selection.quantized),
            "kept_modules": reasons_summary(selection),
        }
        if scheme
        else {}
    )
    return {
        **view_summary(source, view),
        "from": stored.scheme.format,
        "tensors_after": sum(len(shard.entries) for shard in shards),
        "copied": len(stored.plain),
        "converted_modules": len(stored.modules),
        **quantized,
    }


def _notes(stored: Stored, target: Target) -> Iterator[str]:
    before, bits = stored.scheme.format, stored.scheme.grid.bits
    weights = f"{len(stored.modules):,} weight matrices of {bits} bits"
    if target.format in HALF_DTYPES:
        yield f"{weights} become {_rounding(stored, target)}"
        yield "this cannot be undone: quantizing OUT again need not give the same integers and scales"
        yield from _notes_of_dtype(stored, target)
    else:
        formats = f"stay {before}" if before == target.format else f"are stored as {target.format}, not {before}"
        yield f"{weights} {formats}: every integer and every scale keeps its value"
        if stored.spellings - {target.expert_names}:
            older, newer = "experts.gate_up_proj.0", "experts.0.gate_proj and experts.0.up_proj"
            old, new = (older, newer) if target.expert_names == "split" else (newer, older)
            yield f"experts are named otherwise: {new} for {old}"
    if stored.contradictions:
        more = f", and {len(stored.contradictions) - 1} more like it" if len(stored.contradictions) > 1 else ""
        then = "" if target.format in HALF_DTYPES else "; the new one says what is stored"
        yield stored.contradictions[0] + more + then


def _rounding(stored: Stored, target: Target) -> str:
    """What becomes of a product in 16 bits, and what to do where it is not exact."""
    product, fits = "each integer times its scale", Ints.of(stored.scheme).fits_half
    if target.format == "fp16":
        if fits:
            return f"float16: {product}, exactly"
        why = "8 bits" if stored.scheme.grid.bits == 8 else "scales that may not be exact in bfloat16"
        return f"float16: {product}, rounded to its 11 significant bits, which products of {why} do not fit"
    better = fits and not stored.layout.family.bfloat16_only
    way = "; `target.format` fp16 holds them exactly" if better else ""
    return f"bfloat16: {product}, rounded to its 8 significant bits, fewer than many need{way}"


def _notes_of_dtype(stored: Stored, target: Target) -> Iterator[str]:
    text = stored.layout.text
    if target.format == "fp16":
        yield (
            "config.json's dtype becomes float16: transformers, vLLM and SGLang load all tensors as that; in the shards"
            " what is not quantized stays as it is, and llama.cpp's converter and mlx-lm read it so"
        )
    elif (dtype := text.get("dtype", text.get("torch_dtype", "bfloat16"))) != "bfloat16":
        yield f"config.json says dtype {dtype}, and stays so; the weights written are bfloat16"
