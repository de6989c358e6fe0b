"""`quantization_config` of config.json: written from a selection, and read back as clients read it.

Three dialects say the same: which modules are 16-bit, all other linear layers being quantized. The exceptions are
regular expressions that must satisfy `re.search` (vLLM) and `re.fullmatch` (SGLang, transformers) alike, under both
decoder prefixes. `resolve` is the reading side; `build` checks itself against it for every module.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from shardxform.base.tensors import FLOATS, TensorRef, TensorSpec
from shardxform.errors import SchemeError
from shardxform.formats.config_names import ASYMMETRIC, method_of
from shardxform.formats.encoding import Encoded, Gridded, Storage
from shardxform.formats.ggml import Ggml, integer_type
from shardxform.formats.integers import Ints
from shardxform.formats.matrices import Matrix, matrices_of, single_biases
from shardxform.formats.scheme import GGUF, ROW_FORMATS, Format, Grid, Scheme
from shardxform.model.families.base import LINEAR_ROLES
from shardxform.model.layout import Layout
from shardxform.model.tied_head import is_tied

__all__ = [
    "Resolved",
    "Selection",
    "build",
    "gathered_tensors",
    "is_carried",
    "kept_tensors",
    "refuse_unread",
    "resolve",
    "select",
    "takes_over",
    "target_of",
]

# -- selection ---------------------------------------------------------------------------------------------------------
# Which modules a scheme quantizes, and why the others stay as they are: decided once, by names and shapes.
#
# What config.json will say and what the shards will hold are both made from the one `Selection`, so they cannot
# differ.

_BY_DEFAULT = "16-bit by default"
_ROUNDED = FLOATS - {"F64"}


@dataclass(frozen=True, slots=True)
class Selection:
    """Modules in table order, split into those to quantize and those that stay, with the reason.

    Attributes:
        quantized: modules to quantize.
        kept: module name -> reason it stays in its own dtype.
        kept_modules: the same modules.
        misfits: the ones among them that were wanted but whose shape does not fit, for the plan's report.

    """

    quantized: tuple[Matrix, ...]
    kept: Mapping[str, str]
    misfits: Mapping[str, str]
    kept_modules: tuple[Matrix, ...] = ()


def select(layout: Layout, tensors: Mapping[str, TensorRef], scheme: Scheme) -> Selection:
    """Decide for every module of a checkpoint or view.

    A shape that does not fit takes the modules that clients merge with it along, so that a merged module is never
    split between two schemes; a pattern of the user's that would split one is refused.

    Raises:
        SchemeError: patterns that split a merged module or match nothing; a module that is quantized already; nothing
            left to quantize.

    """
    modules = list(matrices_of(layout, tensors, scheme.expert_names))
    _refuse_idle_patterns(scheme, modules)
    reasons = {module.name: _reason(module, layout, scheme) for module in modules}
    misfit = functools.cache(target_of(scheme).misfit)  # of one shape, as a rule, for ten thousand experts
    narrow = functools.cache(Ints(scheme.grid).misfit)
    misfits = {m.name: why for m in modules if not reasons[m.name] and (why := misfit(*m.shape))}
    if scheme.format == GGUF:
        chosen = (m for m in modules if not reasons[m.name] and m.name not in misfits and _has_twin(m, scheme))
        misfits |= {m.name: why for m in chosen if (why := narrow(*m.shape))}
    groups = _merged(layout, modules)
    for members in groups:
        blocked = [name for name in members if name in misfits]
        for name in members if blocked else ():
            if not reasons[name]:
                misfits.setdefault(name, f"merged with {blocked[0]}")
    reasons.update(misfits)
    _refuse_split(groups, reasons)
    quantized = tuple(module for module in modules if not reasons[module.name])
    if not quantized:
        raise SchemeError("nothing to quantize: no module is selected and fits")
    kept = {name: why for name, why in reasons.items() if why}
    return Selection(quantized, kept, misfits, tuple(module for module in modules if module.name in kept))


def _has_twin(module: Matrix, scheme: Scheme) -> bool:
    """Whether the other formats would round a matrix for GGUF too; what they leave alone stays so there."""
    place = module.place
    return place.scope == "block" and place.template.role in LINEAR_ROLES and not is_carried(module, scheme)


def target_of(scheme: Scheme) -> Gridded:
    """How weights of a scheme are stored."""
    return Ggml(integer_type(scheme.grid), scheme.grid) if scheme.format == GGUF else Ints.of(scheme)


def refuse_unread(layout: Layout, scheme: Scheme) -> None:
    """Refuse a format in which no client finds the experts of a family.

    Raises:
        SchemeError: names the formats that are left.

    """
    family = layout.family
    if scheme.format in (GGUF, "mlx"):  # what those run they are asked themselves
        return
    if not family.formats:
        raise SchemeError(
            f"`format` {scheme.format}: no quantized format of family {family.name} is read: {family.unread};"
            " `shardxform prune` makes it smaller all the same"
        )
    if scheme.format not in family.formats:
        raise SchemeError(
            f"`format` {scheme.format}: its loaders do not find experts of family {family.name}; they are read in"
            f" `format` {' or '.join(family.formats)}"
        )


def _reason(module: Matrix, layout: Layout, scheme: Scheme) -> str:
    """Why a module stays as it is; empty when it is to be quantized. Shapes are judged later."""
    if module.weight.spec.dtype not in _ROUNDED:
        return f"dtype {module.weight.spec.dtype}"
    if scheme.quantize and any(fnmatchcase(module.name, pattern) for pattern in scheme.quantize):
        _refuse_unrunnable(module, scheme, layout)
        return ""
    if scheme.keep_16bit and any(fnmatchcase(module.name, pattern) for pattern in scheme.keep_16bit):
        return "on request"
    if is_carried(module, scheme) and not (_unrunnable(module, scheme, layout) or _stays(module, layout)):
        return ""
    if module.place.scope != "block" or module.place.template.role not in LINEAR_ROLES:
        return _BY_DEFAULT
    return _BY_DEFAULT if _stays(module, layout) else ""


def is_carried(module: Matrix, scheme: Scheme) -> bool:
    """Whether a matrix is stored in integers of the grid that is asked for, which are moved as they are."""
    if not isinstance(module.weight, Encoded):
        return False
    for source in module.weight.sources:
        if not (isinstance(source.encoding, Ints) and takes_over(scheme, source.encoding)):
            return False
    return True


def takes_over(scheme: Scheme, found: Ints) -> bool:
    """Whether the scheme stores integers and scales without a change; GGUF repeats a scale every 32 columns."""
    if scheme.requantize:
        return False
    return found.width == scheme.grid.bits if scheme.format == GGUF else Ints.of(scheme).holds(found)


def _stays(module: Matrix, layout: Layout) -> bool:
    """Whether clients of the family want it in 16 bits."""
    return _is_kept(module.local, layout.family.keep_16bit)


@functools.lru_cache(maxsize=1024)
def _is_kept(local: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(local, pattern) for pattern in patterns)


def _refuse_unrunnable(module: Matrix, scheme: Scheme, layout: Layout) -> None:
    """Refuse to quantize what clients would load as garbage or not at all."""
    if why := _unrunnable(module, scheme, layout):
        raise SchemeError(f"`quantize` selects {module.name}, {why}")


def _unrunnable(module: Matrix, scheme: Scheme, layout: Layout) -> str:
    """Say why no client runs a module as integers; empty where some do."""
    role = "mtp" if module.place.scope == "mtp" else module.place.template.role
    if scheme.format == GGUF and role in ("embeddings", "lm head", "mtp"):
        return ""
    if role in ("router", "indexer", "embeddings", "vision", "mtp"):
        return f"but no client runs {role} weights as integers"
    if role == "lm head" and is_tied(layout):
        return "but config.json ties it to the embeddings (tie_word_embeddings), which no client runs as integers"
    if role == "lm head" and scheme.format == "compressed-tensors":
        return "which vLLM cannot run in format compressed-tensors"
    return ""


def _merged(layout: Layout, modules: Iterable[Matrix]) -> list[list[str]]:
    """Names of modules that clients merge: the family's groups per block, and all routed experts of a layer."""
    groups: defaultdict[tuple[str, int | None, str], list[str]] = defaultdict(list)
    for module in modules:
        place = module.place
        if module.expert is not None:
            groups[(place.scope, place.layer, "experts")].append(module.name)
            continue
        for merged, members in layout.family.merged.items():
            if module.local in members:
                groups[(place.scope, place.layer, merged)].append(module.name)
    return list(groups.values())


def _refuse_split(groups: Iterable[list[str]], reasons: Mapping[str, str]) -> None:
    for members in groups:
        kept = [name for name in members if reasons[name]]
        if kept and len(kept) != len(members):
            other = next(name for name in members if not reasons[name])
            raise SchemeError(
                f"clients merge {kept[0]} with {other}, so both need one scheme,"
                f" but the first stays 16-bit ({reasons[kept[0]]})"
            )


def _refuse_idle_patterns(scheme: Scheme, modules: Iterable[Matrix]) -> None:
    """A pattern that matches nothing is a typing error that would surface as a wrong checkpoint."""
    names = [module.name for module in modules]
    for field, patterns in (("keep_16bit", scheme.keep_16bit), ("quantize", scheme.quantize)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SchemeError(f"`{field}` {pattern!r} matches no module, such as {names[0]}")


def reasons_summary(selection: Selection) -> dict[str, int]:
    """Count kept modules by reason, for the plan."""
    return dict(Counter(selection.kept.values()))


# -- dialects ----------------------------------------------------------------------------------------------------------

_BLOCKS: Final = ("model.layers", "model.language_model.layers")
"""Decoder blocks under most text-only and multimodal classes; both, so that either client class finds its own."""

_AUTO_ROUND_VERSION: Final = "0.16.1"  # of the format that is written; its loader looks at nothing newer
_AFFINE: Final = "affine"  # of mlx's modes, the one of integers with scales
_LM_HEAD: Final = "lm_head"
_HEAD_RULE: Final = r"+:.*lm_head$"  # auto-round's loader skips names that it is given exactly


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a config says of every module, as clients understand it.

    Attributes:
        format: dialect.
        bits, group_size: of quantized modules; group size -1 for one scale per row.
        kept: patterns of 16-bit modules, matched against whole names.
        also: modules outside the decoder blocks that are quantized all the same.
        blocks: what holds decoder blocks; for auto-round, which takes all else for 16-bit.

    """

    format: Format
    bits: int
    group_size: int
    kept: tuple[re.Pattern[str], ...] = ()
    also: frozenset[str] = frozenset()
    blocks: tuple[str, ...] = _BLOCKS

    def bits_of(self, module: str) -> int:
        """Width of a linear module's weights: `bits`, or 16."""
        if module in self.also:
            return self.bits
        for pattern in self.kept:
            if pattern.fullmatch(module):
                return 16
        if self.format == "auto-round":
            return self.bits if module.startswith(tuple(block + "." for block in self.blocks)) else 16
        return self.bits


def build(selection: Selection, scheme: Scheme, layout: Layout, iters: int = 0) -> dict[str, Any]:
    """Make `quantization_config` for a selection; `iters` is for the record, 0 for plain rounding.

    Raises:
        SchemeError: what it says of some module is not what was selected; a bug, caught before anything is written.

    """
    modules = {module.name: module for module in (*selection.quantized, *selection.kept_modules)}
    patterns = [*_patterns(selection, modules, layout)]
    outside = sorted((m for m in selection.quantized if m.place.scope != "block"), key=lambda m: m.name)
    if scheme.format == "auto-round":
        config = _auto_round(scheme, patterns, outside, layout)
    elif scheme.format == "gptq":
        config = _gptq(scheme, patterns, outside)
    elif scheme.format == "mlx":
        return {"group_size": scheme.grid.group_size, "bits": scheme.grid.bits, "mode": _AFFINE}
    else:
        config = _compressed_tensors(scheme, patterns)
    if "iters" in config:
        config["iters"] = iters
    _check(resolve(config, layout.family.holders), selection, scheme.grid, modules)
    return config


def resolve(config: Mapping[str, object], holders: Iterable[str] = ()) -> Resolved:
    """Read a `quantization_config` of one of the formats that `quantize` writes.

    Args:
        config: what is read.
        holders: what holds the decoder blocks of the family, beside the usual names.

    Raises:
        SchemeError: another method, or a field that clients require is missing or not one they run.

    """
    readers: Mapping[str, Callable[[Mapping[str, Any]], Resolved]] = {
        "auto-round": lambda declared: _resolve_auto_round(declared, holders),
        "gptq": _resolve_gptq,
        "compressed-tensors": _resolve_compressed_tensors,
        "mlx": _resolve_mlx,
    }
    method = method_of(config)
    if not isinstance(method, str) or method not in readers:
        raise SchemeError(f"quantization_config: quant_method {method!r} is none of {', '.join(readers)}")
    try:
        return readers[method](config)
    except (AttributeError, TypeError, ValueError) as e:  # a list where an object belongs, and the like
        raise SchemeError(f"quantization_config: malformed for {method}: {e}") from e


def _vision_patterns(layout: Layout) -> Iterator[str]:
    prefixes = layout.family.vision_prefix if layout.wrapper.vision else ()
    for prefix in (prefixes,) if isinstance(prefixes, str) else prefixes:
        yield rf".*{prefix.removesuffix('.').rpartition('.')[2]}.*"


def _patterns(selection: Selection, modules: Mapping[str, Matrix], layout: Layout) -> Iterator[str]:
    """Patterns that cover exactly the kept linear modules, fewest first: whole kinds, then kinds in some blocks."""
    quantized = {module.name for module in selection.quantized}
    kept_in, quantized_in, homes = _layers_by_kind(quantized, modules, layout)
    blocks = re.escape(layout.family.decoder.blocks)
    for kind, layers in sorted(kept_in.items()):
        if not layers:
            continue
        tail = re.escape(kind) + (r"(\..*)?" if kind in homes else "$")
        if not quantized_in[kind]:
            yield rf".*\.{tail}"
        else:
            yield rf".*\.{blocks}\.({'|'.join(map(str, sorted(layers)))})\.{tail}"
    yield from (re.escape(tower.name).replace(r"\*", ".*") for tower in layout.family.towers)
    yield from _vision_patterns(layout)
    yield from _mtp_patterns(quantized, modules, layout)
    yield from (re.escape(name) for name, module in modules.items() if name not in quantized and _stands_alone(module))
    yield from (re.escape(name.removesuffix(".weight")) for name in layout.unknown if name.endswith(".weight"))
    if _LM_HEAD not in quantized:
        yield _LM_HEAD
        if layout.wrapper.head != _LM_HEAD:
            yield re.escape(layout.wrapper.head)


def _stands_alone(module: Matrix) -> bool:
    """Whether it is outside all blocks, and no embeddings and no head, of which clients know."""
    return module.place.scope == "root" and module.place.role not in ("embeddings", "lm head")


def _layers_by_kind(
    quantized: set[str], modules: Mapping[str, Matrix], layout: Layout
) -> tuple[Mapping[str, set[int]], Mapping[str, set[int]], set[str]]:
    """In which blocks each kind of module is kept, and quantized, merged ones too; and which kinds hold experts."""
    kept_in: defaultdict[str, set[int]] = defaultdict(set)
    quantized_in: defaultdict[str, set[int]] = defaultdict(set)
    for name, module in modules.items():
        if module.place.scope == "block" and module.place.layer is not None:
            kind = module.home if module.expert is not None else module.local
            (quantized_in if name in quantized else kept_in)[kind].add(module.place.layer)
    for merged, members in layout.family.merged.items():
        layers = set.intersection(*(kept_in[member] for member in members))
        if layers:
            kept_in[merged] |= layers
            quantized_in[merged] |= set.union(*(quantized_in[member] for member in members))
    homes = {layout.family.experts.home}
    for kind in list(kept_in):  # transformers looks for the names of its modules
        name = layout.family.module_name(kind)
        if name != kind:
            kept_in[name] |= kept_in[kind]
            quantized_in[name] |= quantized_in[kind]
            homes |= {name} if kind in homes else set()
    return kept_in, quantized_in, homes


def _mtp_patterns(quantized: set[str], modules: Mapping[str, Matrix], layout: Layout) -> Iterator[str]:
    """Everything of the MTP layers; or each kept module by name, where a converted checkpoint has quantized ones."""
    names = [name for name, module in modules.items() if module.place.scope == "mtp"]
    if not names:
        return
    if any(name in quantized for name in names):
        yield from (re.escape(name) for name in names if name not in quantized)
    elif layout.family.mtp and layout.family.mtp.follows_blocks:
        numbers = range(layout.num_layers, layout.num_layers + layout.mtp_layers * layout.mtp_blocks)
        yield rf".*\.layers\.({'|'.join(map(str, numbers))})\..*"
        yield r".*\.decoder\..*"  # what SGLang calls the layer
    else:
        yield r".*mtp.*"


def _auto_round(scheme: Scheme, patterns: Iterable[str], outside: Iterable[Matrix], layout: Layout) -> dict[str, Any]:
    grid = scheme.grid
    weights = {"bits": grid.bits, "group_size": grid.group_size, "sym": True, "data_type": "int"}
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        **weights,
        "iters": 0,
        "autoround_version": _AUTO_ROUND_VERSION,
        "block_name_to_quantize": list(dict.fromkeys((*_BLOCKS, *layout.family.holders))),
        "extra_config": {
            **{pattern: {"bits": 16, "data_type": "float"} for pattern in patterns},
            **{module.name: dict(weights) for module in outside},
        },
    }


def _gptq(scheme: Scheme, patterns: Iterable[str], outside: Iterable[Matrix]) -> dict[str, Any]:
    quantizes_head = any(module.name == _LM_HEAD for module in outside)
    head = {"bits": scheme.grid.bits, "group_size": scheme.grid.group_size, "sym": True}
    return {
        "quant_method": "gptq",
        "bits": scheme.grid.bits,
        "group_size": scheme.grid.group_size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": quantizes_head,
        "dynamic": {**{f"-:{pattern}": {} for pattern in patterns}, **({_HEAD_RULE: head} if quantizes_head else {})},
    }


def _compressed_tensors(scheme: Scheme, patterns: Iterable[str]) -> dict[str, Any]:
    grid = scheme.grid
    per_row = grid.group_size == -1
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if per_row else "group",
        "group_size": None if per_row else grid.group_size,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [pattern if pattern == _LM_HEAD else f"re:{pattern}" for pattern in patterns],
        "kv_cache_scheme": None,
    }


def _resolve_auto_round(config: Mapping[str, Any], holders: Iterable[str]) -> Resolved:
    packing = _field(config, "packing_format", str)
    if packing not in ("auto_round:auto_gptq", "auto_round:gptq"):
        raise SchemeError(f"quantization_config: packing_format {packing!r}, expected 'auto_round:auto_gptq'")
    extra = config.get("extra_config") or {}
    kept = [name for name, item in extra.items() if isinstance(item, Mapping) and item.get("bits", 16) >= 16]
    blocks = config.get("block_name_to_quantize") or []
    named = blocks.split(",") if isinstance(blocks, str) else list(blocks)
    known = tuple(dict.fromkeys((*_BLOCKS, *holders)))
    if named and not set(named) & set(known):
        raise SchemeError(f"quantization_config: block_name_to_quantize {named} names no decoder blocks")
    also = frozenset(name for name in extra if name not in kept)
    return Resolved("auto-round", *_integers(config), _compile(kept), also, known)


def _resolve_gptq(config: Mapping[str, Any]) -> Resolved:
    if _field(config, "desc_act", bool):
        raise SchemeError("quantization_config: desc_act true, expected false")
    kept = [name[2:] for name in config.get("dynamic") or {} if name.startswith("-:")]
    if not config.get("lm_head"):
        kept.append(_LM_HEAD)
    also = frozenset({_LM_HEAD} if config.get("lm_head") else ())
    return Resolved("gptq", *_integers(config), _compile(kept), also)


def _resolve_compressed_tensors(config: Mapping[str, Any]) -> Resolved:
    if config.get("format") != "pack-quantized":
        raise SchemeError(f"quantization_config: format {config.get('format')!r}, expected 'pack-quantized'")
    groups = _field(config, "config_groups", dict)
    weights = [group.get("weights") or {} for group in groups.values() if isinstance(group, Mapping)]
    if len(weights) != 1 or weights[0].get("type") != "int" or not weights[0].get("symmetric"):
        raise SchemeError("quantization_config: expected one config group of symmetric int weights")
    size = weights[0].get("group_size")
    bits = _bits(weights[0].get("num_bits"))
    kept = [name[3:] if name.startswith("re:") else re.escape(name) for name in config.get("ignore") or []]
    return Resolved("compressed-tensors", bits, -1 if size is None else int(size), _compile(kept))


def _resolve_mlx(config: Mapping[str, object]) -> Resolved:
    """Read what holds for all modules that are stored with scales; mlx-lm takes those for quantized, and no others."""
    if config.get(ASYMMETRIC):
        raise SchemeError("quantization: weights that are not symmetric, as mlx_lm.convert rounds them")
    if config.get("mode") != _AFFINE:
        raise SchemeError(f"quantization: mode {config.get('mode')!r}, expected {_AFFINE!r}")
    bits, group_size = _bits(config.get("bits")), _field(config, "group_size", int)
    for path, own in config.items():
        said = {"bits": bits, "group_size": group_size, "mode": _AFFINE}
        if isinstance(own, Mapping) and {**said, **own} != said:
            raise SchemeError(f"quantization: {path}: {dict(own)}, expected {said}, one scheme for all weights")
    return Resolved("mlx", bits, group_size)


def _integers(config: Mapping[str, object]) -> tuple[int, int]:
    if _field(config, "sym", bool) is not True:
        raise SchemeError("quantization_config: sym false, expected symmetric weights")
    return _bits(config.get("bits")), _field(config, "group_size", int)


def _bits(value: object) -> int:
    if value not in (4, 8):
        raise SchemeError(f"quantization_config: bits {value!r}, expected 4 or 8")
    return int(str(value))


def _field(config: Mapping[str, object], key: str, kind: type) -> Any:  # noqa: ANN401
    value = config.get(key)
    if not isinstance(value, kind):
        raise SchemeError(f"quantization_config: {key}: expected {kind.__name__}, found {value!r}")
    return value


def _compile(patterns: Iterable[str]) -> tuple[re.Pattern[str], ...]:
    try:
        return tuple(re.compile(pattern) for pattern in patterns)
    except re.error as e:
        raise SchemeError(f"quantization_config: {e.pattern!r} is no regular expression: {e}") from e


def _check(resolved: Resolved, selection: Selection, grid: Grid, modules: Mapping[str, Matrix]) -> None:
    quantized = {module.name for module in selection.quantized}
    for name, module in modules.items():
        if module.place.template.role == "embeddings":
            continue  # no linear layer: no client asks
        if resolved.bits_of(name) != (grid.bits if name in quantized else 16):
            raise SchemeError(f"internal: quantization_config says {resolved.bits_of(name)} bits for {name}")


def kept_tensors(
    layout: Layout, tensors: Mapping[str, TensorRef], selection: Selection, scheme: Scheme
) -> dict[str, TensorRef]:
    """Tensors that stay as they are, byte for byte.

    Experts that stay 16-bit are un-fused too: the loader of auto-round and gptq un-fuses every block, whether any of
    its experts is quantized or not, and would leave fused ones at their random initial values with only a warning.
    That of compressed-tensors looks at each block, and wants 16-bit experts as the release has them.
    """
    replaced = {name for module in selection.quantized for name in module.sources}
    unfused: dict[str, TensorRef] = {}
    for module in _unfused(selection, scheme):
        replaced.update(module.sources)
        if module.cut is None:
            unfused[f"{module.name}.weight"] = module.weight.renamed(f"{module.name}.weight")
    unfused |= {bias.name: bias for stack in replaced for bias in single_biases(layout, tensors, stack)}
    replaced |= {f"{name}_bias" for name in replaced}
    return {**{name: ref for name, ref in tensors.items() if name not in replaced}, **unfused}


def gathered_tensors(
    selection: Selection, scheme: Scheme, kept: Mapping[str, TensorRef]
) -> dict[str, tuple[TensorSpec, tuple[Storage, ...]]]:
    """Tensors that keep their values, but are no run of the source's bytes: what they are, and what is stored for them.

    Experts that stay 16-bit where the family's stacks are transposed, and what is decoded.
    """
    found = {name: (ref.spec, ref.sources) for name, ref in kept.items() if isinstance(ref, Encoded)}
    for module in _unfused(selection, scheme):
        if module.cut:
            spec = TensorSpec(f"{module.name}.weight", module.weight.spec.dtype, module.shape)
            found[spec.name] = spec, module.stored
    return found


def _unfused(selection: Selection, scheme: Scheme) -> Iterator[Matrix]:
    """Experts that stay 16-bit, and are written one by one all the same."""
    if scheme.expert_names == "split" and scheme.format not in ROW_FORMATS:
        for module in selection.kept_modules:
            if module.place.template.variant == "fused" and module.place.scope == "block":
                yield module
