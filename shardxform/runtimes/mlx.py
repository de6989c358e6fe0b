"""MLX: what mlx-lm calls the experts of a family, and how they lie there: stacked, projection by projection.

Its classes rename and stack what they load, as far as it is what they know; what is written here passes them as it is.
A checkpoint of MLX is seen with its experts one by one, under the names and the config that its family has, so that
what works on other quantized checkpoints works on it. Names from mlx-lm 0.32 (`mlx_lm/models`, `sanitize`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from shardxform.base.tensors import TensorRef, TensorSpec, coalesce
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import FamilyError, SchemeError
from shardxform.formats.config_names import ASYMMETRIC, QUANTIZATION
from shardxform.formats.dialects import Selection
from shardxform.formats.encoding import Encoded, Storage
from shardxform.formats.matrices import Matrix, single_biases, turns
from shardxform.formats.plain import Plain
from shardxform.formats.sources import PartOfMatrix
from shardxform.model.families import family_of
from shardxform.model.families.base import Family, head_dim
from shardxform.model.layout import Layout, Place
from shardxform.runtimes.mlx_families import NAMES
from shardxform.runtimes.rotation import rotation_notes

__all__ = [
    "Stack",
    "as_read",
    "config_of",
    "kept_of",
    "members_of",
    "notes_of",
    "refuse_unrun",
    "single",
    "stacks_of",
    "unrun",
    "whole",
]

_PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")
_PARTS: Final = {"weight": 3, "scales": 3, "biases": 3, "bias": 2}  # of a stack, and how many dimensions each has
_MOST_EXPERTS: Final = 1 << 16  # that a stack is taken apart into
_MOST_MEMBERS: Final = 1 << 22  # of all stacks: ten times what the largest model has
_TAKEN_APART: Final = "self_attn.kv_b_proj"


def refuse_unrun(layout: Layout, quantized: Iterable[Matrix] = ()) -> None:
    """Refuse a family, or a class of one, that is not written for MLX, and what mlx-lm would round again.

    Raises:
        SchemeError: names those that are, or the module.

    """
    for module in quantized:
        if module.local.endswith(_TAKEN_APART):
            raise SchemeError(
                f"`format` mlx: {module.name} is quantized, and mlx-lm takes it apart and rounds it again; it must stay"
                " in 16 bits"
            )
    names = NAMES.get(layout.family.name)
    if names is None or layout.wrapper.model_type not in names.types:
        known = ", ".join(each for names in NAMES.values() for each in names.types)
        raise SchemeError(f"`format` mlx: model_type {layout.wrapper.model_type} is not written for it; known: {known}")


# -- stacks ------------------------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """What of a matrix stands in a stack: all of it, or some of its rows."""

    matrix: Matrix
    source: Storage | PartOfMatrix

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of what stands there."""
        return self.source.shape


@dataclass(frozen=True, slots=True)
class Stack:
    """Matrices [O, I] that are stored as one module: one projection of all experts of a block, in order, or just one.

    Attributes:
        name: of the module.
        experts: what each matrix is made of, rows one below the other.
        apart: last parts of the names of tensors that each matrix has for itself.

    """

    name: str
    experts: tuple[tuple[Member, ...], ...]
    apart: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[Member, ...]:
        """All of them, one below the other."""
        return tuple(member for members in self.experts for member in members)

    @property
    def first(self) -> Matrix:
        """The first matrix, which tells of all."""
        return self.experts[0][0].matrix

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I] of each matrix."""
        return sum(member.shape[0] for member in self.experts[0]), self.first.shape[1]

    @property
    def is_stacked(self) -> bool:
        """Whether its tensors have a dimension that counts experts."""
        return _is_stacked(self.first)

    @property
    def nbytes(self) -> int:
        """Size of the values as they are stored in the source."""
        return sum(member.matrix.nbytes * member.shape[0] // member.matrix.shape[0] for member in self.members)

    def specs(self, last: str, dtype: str, shape: tuple[int, ...]) -> list[TensorSpec]:
        """The tensor of all matrices that is called `last`, or those of each: of a dtype, and a shape for each."""
        if last in self.apart:
            return [TensorSpec(f"{members[0].matrix.name}.{last}", dtype, shape) for members in self.experts]
        return [TensorSpec(f"{self.name}.{last}", dtype, (len(self.experts), *shape) if self.is_stacked else shape)]


def stacks_of(layout: Layout, modules: Iterable[Matrix]) -> list[Stack]:
    """Put experts of one block together, projection by projection; other modules stay alone."""
    names, found = NAMES[layout.family.name], dict[str, dict[int, list[Member]]]()
    halves: dict[tuple[str, int], list[Matrix]] = {}
    taken_turns = layout.family.experts.inner if layout.family.experts.gate == "interleaved" else ()
    for module in modules:
        name, projection = module.name, module.name.rpartition(".")[2]
        if _is_stacked(module) and projection in taken_turns:
            home = name.rsplit(".", 2)[0]
            halves.setdefault((home, module.expert or 0), []).append(module)
            for each in taken_turns:  # in whose order stacks are listed
                found.setdefault(_stack_name(layout, f"{home}.0.{each}"), {})
            continue
        name = _stack_name(layout, name) if _is_stacked(module) else name
        whole = [Member(module, storage) for storage in module.stored]
        found.setdefault(name, {}).setdefault(module.expert or 0, []).extend(whole)
    for (home, expert), members in halves.items():
        for each, parts in zip(taken_turns, _in_turn(members), strict=True):
            found[_stack_name(layout, f"{home}.0.{each}")][expert] = parts
    return [
        Stack(
            name,
            tuple(tuple(members) for _, members in sorted(experts.items())),
            names.apart if _is_stacked(next(iter(experts.values()))[0].matrix) else (),
        )
        for name, experts in found.items()
    ]


def _in_turn(halves: Iterable[Matrix]) -> Iterator[list[Member]]:
    """Gate and up projection, of the halves of a stack in which their rows take turns."""
    found = [Member(matrix, storage) for matrix in halves for storage in matrix.stored]
    for projection in (0, 1):
        cuts = turns([member.shape[0] for member in found], projection)
        yield [
            Member(each.matrix, PartOfMatrix(each.source.storage, cut)) for each, cut in zip(found, cuts, strict=True)
        ]


def _stack_name(layout: Layout, expert: str) -> str:
    """What mlx-lm calls the stack that an expert's matrix is in."""
    theirs = dict(zip(layout.family.experts.projections, _PROJECTIONS, strict=True))
    before, _, projection = expert.rsplit(".", 2)
    home = layout.family.experts.home
    return f"{before.removesuffix(home)}{NAMES[layout.family.name].home}.{theirs[projection]}"


def kept_of(layout: Layout, tensors: Mapping[str, TensorRef], selection: Selection) -> dict[str, TensorRef]:
    """Tensors that stay as wide as they are, those of experts as stacks: the ones that no matrix was quantized of.

    Raises:
        SchemeError: experts that are to be stacked are of several dtypes.

    """
    experts = [module for module in selection.kept_modules if _is_stacked(module)]
    gone = {name for module in (*selection.quantized, *experts) for name in module.sources}
    biases = dict(_biases_of(layout, tensors))
    gone.update(name for name, place in layout.places.items() if biases and _is_bias(place))
    kept = {name: ref for name, ref in tensors.items() if name not in gone}
    stacked = {ref.name: ref for stack in stacks_of(layout, experts) for ref in _values_of(stack)}
    return {**kept, **stacked, **biases}


def _biases_of(layout: Layout, tensors: Mapping[str, TensorRef]) -> Iterator[tuple[str, TensorRef]]:
    """Biases [E, O] of all experts of a block, projection by projection."""
    alone: list[Matrix] = []
    for name, place in layout.places.items():
        if not _is_bias(place):
            continue
        refs = [tensors[name]] if place.expert is not None else single_biases(layout, tensors, name[: -len("_bias")])
        for ref in refs:
            column, module = ref.reshaped((ref.spec.shape[0], 1)), ref.name.removesuffix(".bias")
            alone.append(Matrix(module, column, (name,), place, expert=int(module.split(".")[-2])))
    for stack in stacks_of(layout, alone):
        for ref in _values_of(stack):
            name = ref.name.removesuffix("weight") + "bias"
            spec = TensorSpec(name, ref.spec.dtype, ref.spec.shape[:2])
            yield name, replace(ref, spec=spec)


def _is_bias(place: Place) -> bool:
    return bool(place.template.variant) and not place.template.is_expert_weight and place.scope == "block"


def _values_of(stack: Stack) -> Iterator[TensorRef]:
    """The values of a stack's matrices, as wide as they are, as one tensor or apart."""
    dtypes = {member.matrix.weight.spec.dtype for member in stack.members}
    if len(dtypes) > 1:
        raise SchemeError(f"experts of {stack.name} are {' and '.join(sorted(dtypes))}; cannot stack them")
    apart = "weight" in stack.apart
    groups = stack.experts if apart else (stack.members,)
    for spec, members in zip(stack.specs("weight", dtypes.pop(), stack.shape), groups, strict=True):
        sources = tuple(member.source.storage for member in members)
        if all(isinstance(each.encoding, Plain) and each.cut is None for each in sources):
            yield TensorRef(spec, coalesce(piece for each in sources for piece in each.reads))
        else:
            yield Encoded(spec, (), sources)


def _is_stacked(module: Matrix) -> bool:
    return module.expert is not None and module.place.scope == "block"


# -- checkpoints -------------------------------------------------------------------------------------------------------


def config_of(config: Mapping[str, Any], layout: Layout, declared: Mapping[str, Any]) -> dict[str, Any]:
    """The config that mlx-lm takes of a checkpoint that has `config`, and is quantized as `declared`.

    Raises:
        FamilyError: the config gives no sizes.

    """
    names = NAMES[layout.family.name]
    try:
        told = {key: value for key, value in _told(layout).items() if key in names.keys and config.get(key) is None}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise FamilyError(f"config.json gives no sizes of heads, or of what is rotated: {e}") from e
    told = told if layout.wrapper.text_key is None else {}  # what nests the config of its decoder it reads as it is
    out = {**config, **told, "model_type": names.types[config["model_type"]]}
    out.pop("quantization_config", None)
    return {**out, QUANTIZATION: dict(declared), "quantization_config": dict(declared)}


def notes_of(before: Layout, config: Mapping[str, object]) -> Iterator[str]:
    """Say what becomes of a checkpoint beside its weights, from its layout before and the config that is written."""
    if before.has_mtp:
        yield "the MTP layers are left out: mlx-lm runs none"
    yield from rotation_notes(before.text, "mlx-lm")
    if (now := config["model_type"]) != (was := before.config["model_type"]):
        yield f"config.json's model_type becomes {now}, which mlx-lm takes for both: it does not know {was}"


def as_read(config: Mapping[str, object], layout: Layout) -> dict[str, Any]:
    """The config of what is written for MLX, as it is read again, but for quantization, of which it says the same."""
    if layout.family.name not in NAMES or layout.wrapper.model_type not in NAMES[layout.family.name].types:
        return dict(config)
    key = "quantization_config"
    told = {name: value for name, value in _config(config_of(config, layout, {})).items() if name != key}
    return {**told, key: config[key]} if key in config else told


def _told(layout: Layout) -> dict[str, Any]:
    """What mlx-lm reads under keys of its own, from those of transformers 5."""
    text = layout.text
    head, rotary = head_dim(text), text.get("rope_parameters")
    rotary = rotary if isinstance(rotary, Mapping) else {}
    usual = NAMES[layout.family.name].share
    share = rotary.get("partial_rotary_factor", text.get("partial_rotary_factor", usual))
    scaled = rotary.get("rope_type", "default") != "default"
    of_positions = {"rope_theta": rotary["rope_theta"]} if "rope_theta" in rotary else {}
    kinds = text.get("layer_types")
    full = kinds.index("full_attention") + 1 if isinstance(kinds, list) and "full_attention" in kinds else 0
    of_kinds = {"full_attention_interval": full} if full else {}
    return {
        **of_positions,
        **of_kinds,
        "head_dim": head,
        "num_experts": layout.num_experts,
        "partial_rotary_factor": share,
        "rope_scaling": dict(rotary) if scaled else None,
        "rotary_dim": int(head * share),
        "shared_intermediate_size": 0,  # which it reads and has no use for
    }


def unrun(config: Mapping[str, object]) -> Iterator[str]:
    """Say why mlx-lm, as far as it is known here, has no class for the `model_type` of a config of its own."""
    known = [theirs for names in NAMES.values() for theirs in names.types.values()]
    if (found := config.get("model_type")) not in known:
        yield f"model_type {found!r} is none that mlx-lm is known to run: {', '.join(dict.fromkeys(known))}"


def single(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of MLX with its experts one by one and the config of its family; any other as it is."""
    declared = checkpoint.config.get(QUANTIZATION)
    if not isinstance(declared, Mapping) or not declared.keys() >= {"bits", "group_size"}:
        return checkpoint
    if not any(ref.spec.dtype == "U32" for ref in checkpoint.tensors.values()):
        return checkpoint  # a declaration of nothing
    config = _config(checkpoint.config)
    try:
        family, _ = family_of(config)
    except FamilyError:
        return checkpoint  # said by whoever looks for it
    if family.name not in NAMES:
        return replace(checkpoint, config=config)
    tensors = {ref.name: ref for members in _apart(checkpoint, family).values() for ref in members}
    if _tells_asymmetric(checkpoint):
        declared = dict(_of_members(config["quantization_config"], family, tensors))
        config["quantization_config"] = {**declared, ASYMMETRIC: True}
    return replace(checkpoint, tensors=tensors, config=config)


def _tells_asymmetric(checkpoint: Checkpoint) -> bool:
    """Whether headers tell that weights are none of `quantize`: mlx_lm.convert rounds the embeddings too."""
    mixed = any(isinstance(own, Mapping) for own in checkpoint.config[QUANTIZATION].values())
    return mixed or any(
        (name.endswith("embed_tokens.weight") and ref.spec.dtype == "U32")
        or (name.endswith(".scales") and ref.spec.dtype in ("F16", "F32"))
        for name, ref in checkpoint.tensors.items()
    )


def _of_members(declared: Mapping[str, object], family: Family, tensors: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The same declaration with what it says of a stack said of each expert."""
    paths = {path for path, own in declared.items() if isinstance(own, Mapping)}
    for key, value in declared.items():
        if key not in paths:
            yield key, value
    if not paths:
        return
    for name in tensors:
        stem, _, last = name.rpartition(".")
        path = _path_of(stem, family)
        if last == "weight" and path in paths:
            yield stem, declared[path]


def _of_stacks(declared: Mapping[str, object], family: Family) -> Iterator[tuple[str, Any]]:
    """The declaration that `_of_members` was made of."""
    for key, value in declared.items():
        if key != ASYMMETRIC:
            yield (_path_of(key, family) if isinstance(value, Mapping) else key), value


def _path_of(module: str, family: Family) -> str:
    """What mlx-lm calls a module, or the stack that it is in."""
    theirs = dict(zip(family.experts.projections, _PROJECTIONS, strict=True))
    pattern = rf"(.*\.){re.escape(family.experts.home)}\.\d+\.({'|'.join(map(re.escape, theirs))})"
    match = re.fullmatch(pattern, module)
    return f"{match[1]}{NAMES[family.name].home}.{theirs[match[2]]}" if match else module


def members_of(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """What `single` calls the parts of every tensor of a checkpoint; most are one and the same."""
    config = single(checkpoint).config
    if config is checkpoint.config or (family := family_of(config)[0]).name not in NAMES:
        return {name: (name,) for name in checkpoint.tensors}
    return {name: tuple(ref.name for ref in members) for name, members in _apart(checkpoint, family).items()}


def _apart(checkpoint: Checkpoint, family: Family) -> dict[str, tuple[TensorRef, ...]]:
    """By the name of every tensor, what it holds of each expert; itself where it is no stack of them."""
    home, experts = NAMES[family.name].home, family.experts
    pattern = re.compile(rf"(.*\.\d+\.){re.escape(home)}\.({'|'.join(_PROJECTIONS)})\.({'|'.join(_PARTS)})")
    ours = dict(zip(_PROJECTIONS, experts.projections, strict=True))
    found: dict[str, tuple[TensorRef, ...]] = {}
    room = _MOST_MEMBERS
    for name, ref in checkpoint.tensors.items():
        match, shape = pattern.fullmatch(name), ref.spec.shape
        if (
            match is None
            or len(shape) != _PARTS[match[3]]
            or not 0 < shape[0] <= min(_MOST_EXPERTS, room)
            or not ref.nbytes
        ):
            found[name] = (ref,)
            continue
        room -= shape[0]
        block, projection, part = match.groups()
        stem = f"{block}{experts.home}."
        names = (f"{stem}{expert}.{ours[projection]}.{part}" for expert in range(ref.spec.shape[0]))
        found[name] = tuple(ref.index(expert).renamed(one) for expert, one in enumerate(names))
    return found


def whole(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    """What `single` gave, pruned as it may be, as mlx-lm has it."""
    names, tensors = NAMES[layout.family.name], dict[str, TensorRef]()
    stacks: dict[str, list[tuple[int, TensorRef]]] = {}
    for name, ref in checkpoint.tensors.items():
        place = layout.places.get(name)
        last = name.rpartition(".")[2]
        if place is None or place.expert is None or place.scope != "block" or last in names.apart:
            tensors[name] = ref
            continue
        stack = f"{_stack_name(layout, name.removesuffix(f'.{last}'))}.{last}"
        stacks.setdefault(stack, []).append((place.expert, ref))
    for name, members in stacks.items():
        refs = [ref for _, ref in sorted(members, key=lambda member: member[0])]
        spec = TensorSpec(name, refs[0].spec.dtype, (len(refs), *refs[0].spec.shape))
        tensors[name] = TensorRef(spec, coalesce(piece for ref in refs for piece in ref.ranges))
    declared = checkpoint.config["quantization_config"]
    config = config_of(checkpoint.config, layout, dict(_of_stacks(declared, layout.family)))
    return replace(checkpoint, tensors=tensors, config=config)


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same as the family has it: quantization under one key, and the `model_type` of the class."""
    declared = {**config[QUANTIZATION], "mode": config[QUANTIZATION].get("mode", "affine")}  # which older ones lack
    out = {key: value for key, value in config.items() if key != QUANTIZATION} | {"quantization_config": declared}
    for names in NAMES.values():
        for ours, theirs in names.types.items():
            if theirs == config.get("model_type") != ours and _text_key(ours) is None is config.get("text_config"):
                out["model_type"] = ours
    return out


def _text_key(model_type: str) -> str | None:
    return family_of({"model_type": model_type})[1].text_key
