"""MLX: what mlx-lm calls the experts of a family, and how they lie there: stacked, projection by projection.

Its classes rename and stack what they load, as far as it is what they know; what is written here passes them as it is.
A checkpoint of MLX is seen with its experts one by one, under the names and the config that its family has, so that
what works on other quantized checkpoints works on it. Names from mlx-lm 0.32 (`mlx_lm/models`, `sanitize`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
from shardxform.model.layout import Layout, Place, value_at
from shardxform.runtimes.rotation import magnitude_of, rope_of, rotation_notes, usual_magnitude

__all__ = [
    "Stack",
    "as_read",
    "config_of",
    "kept_of",
    "members_of",
    "notes_of",
    "refuse_misread",
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


@dataclass(frozen=True, slots=True)
class _Names:
    """What mlx-lm has of a family.

    Attributes:
        home: the module that holds the stacks of a block.
        types: values of `model_type`, and what it must be told instead.
        keys: of the config that it reads, and that a config may lack which transformers saved again, since that has
            other ones for the same; without some mlx-lm fails, and for others it takes numbers of its own.
        apart: last parts of names of tensors that are not stacked: those by which mlx-lm knows a release, whose norms
            it then makes its own, and which it stacks itself.
        only: values that it computes by, of keys that it does not read, or takes no other value of; the first of each
            is what transformers' class has where the key is missing.
        needs: keys for which it has other numbers of its own than transformers' class.
        scaled: kinds of rotation that it has beside the usual one.
        share: of a head's channels that are rotated, where a config does not say, as transformers' class has it.
        told: whether the config must say how positions are rotated, since transformers' class scales them where not.
        square: whether it takes a head to have as many channels as the hidden size has for each.

    """

    home: str
    types: Mapping[str, str]
    keys: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    share: float = 1.0
    told: bool = False
    square: bool = False


def _same(*types: str) -> dict[str, str]:
    return {each: each for each in types}


_TAKEN_APART: Final = "self_attn.kv_b_proj"
_INTERVAL: Final = 4  # of layers with full attention, where mlx-lm is told none
_SWITCH: Final = "mlp.switch_mlp"
_ROTARY: Final = ("rope_theta", "rope_scaling")
_SILU: Final = {"hidden_act": ("silu", "swish")}
_UNBIASED: Final = {"attention_bias": (False, None)}
_UNTIED: Final = {"tie_word_embeddings": (False, None)}
_SIGMOID: Final = {
    **_SILU,
    **_UNTIED,
    "rope_interleave": (True,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
}
_ROUTED: Final = ("n_group", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group")
_SCALED: Final = ("dynamic", "linear", "llama3", "yarn")
_NAMES: Final[Mapping[str, _Names]] = {
    "deepseek_v3": _Names(
        _SWITCH, _same("deepseek_v3", "kimi_k2"), _ROTARY, only=_SIGMOID, needs=_ROUTED, scaled=_SCALED
    ),
    "deepseek_v32": _Names(_SWITCH, _same("deepseek_v32"), _ROTARY, only=_SIGMOID, needs=_ROUTED, scaled=_SCALED),
    "gemma4": _Names(
        "experts.switch_glu",
        _same("gemma4", "gemma4_text"),
        only={
            **_UNBIASED,
            "hidden_activation": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (None, "vision"),
        },
    ),
    "glm4_moe": _Names(
        _SWITCH,
        _same("glm4_moe"),
        (*_ROTARY, "head_dim", "partial_rotary_factor"),
        only={**_SILU, **_UNTIED, "scoring_func": ("sigmoid",)},
        share=0.5,
    ),
    "glm4_moe_lite": _Names(
        _SWITCH,
        _same("glm4_moe_lite"),
        (*_ROTARY, "partial_rotary_factor"),
        only=_SIGMOID,
        needs=_ROUTED,
        scaled=_SCALED,
    ),
    "gpt_oss": _Names(
        "mlp.experts",
        _same("gpt_oss"),
        _ROTARY,
        only={**_SILU, **_UNTIED, "attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0, 7)},
        scaled=_SCALED,
        told=True,
    ),
    "minimax_m2": _Names(
        "block_sparse_moe.switch_mlp",
        _same("minimax_m2"),
        ("rope_theta", "rotary_dim", "shared_intermediate_size"),
        only={**_SILU, "scoring_func": ("sigmoid",)},
    ),
    "mixtral": _Names(
        "block_sparse_moe.switch_mlp",
        _same("mixtral"),
        _ROTARY,
        only={**_SILU, "sliding_window": (None,)},
        square=True,
    ),
    "qwen3_5_moe": _Names(
        _SWITCH,
        {"qwen3_5_moe": "qwen3_5_moe", "qwen3_5_moe_text": "qwen3_5_moe"},
        ("full_attention_interval",),
        only=_SILU,
        scaled=_SCALED,
        share=0.25,
    ),
    "qwen3_moe": _Names(
        _SWITCH,
        _same("qwen3_moe"),
        (*_ROTARY, "head_dim", "num_experts"),
        only={**_SILU, **_UNBIASED, "use_sliding_window": (False, None)},
    ),
    "qwen3_next": _Names(
        _SWITCH,
        _same("qwen3_next"),
        (*_ROTARY, "full_attention_interval", "head_dim", "num_experts", "partial_rotary_factor"),
        ("weight",),
        only=_SILU,
        needs=("norm_topk_prob",),
        scaled=_SCALED,
        share=0.25,
    ),
}


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
    names = _NAMES.get(layout.family.name)
    if names is None or layout.wrapper.model_type not in names.types:
        known = ", ".join(each for names in _NAMES.values() for each in names.types)
        raise SchemeError(f"`format` mlx: model_type {layout.wrapper.model_type} is not written for it; known: {known}")
    if "full_attention_interval" in names.keys:
        _refuse_irregular(layout)


def refuse_misread(layout: Layout) -> None:
    """Refuse a config of which mlx-lm reads something in another way than transformers, or not at all.

    Raises:
        SchemeError: names the key.

    """
    names, text = _NAMES[layout.family.name], layout.text
    for key, allowed in names.only.items():
        found = text.get(key, allowed[0])
        if found not in allowed:
            raise SchemeError(
                f"`format` mlx: config.json: {key} is {found!r}, which mlx-lm would run as {allowed[0]!r}; expected"
                f" {' or '.join(map(repr, allowed))}"
            )
    for key in names.needs:
        if text.get(key) is None:
            raise SchemeError(
                f"`format` mlx: config.json: {key} is missing, for which mlx-lm has another number than transformers;"
                " say which it is"
            )
    _refuse_sizes(names, layout)
    rope = rope_of(text)
    if names.told and "rope_type" not in rope:
        raise SchemeError("`format` mlx: config.json: rope_scaling is missing, for which transformers has its own")
    for each in [rope[kind] for kind in ("full_attention", "sliding_attention") if kind in rope] or [rope]:
        _refuse_rotation(names, each)


def _refuse_sizes(names: _Names, layout: Layout) -> None:
    """Refuse heads of a size that mlx-lm does not look for, and a head that it ties, or not, by another key.

    Raises:
        SchemeError: says which.

    """
    text, whole = layout.text, layout.config
    if names.square and head_dim(text) * text["num_attention_heads"] != text["hidden_size"]:
        raise SchemeError(
            f"`format` mlx: config.json: head_dim is {head_dim(text)}, but mlx-lm takes hidden_size divided by"
            " num_attention_heads"
        )
    key, tied = layout.wrapper.text_key, "tie_word_embeddings"
    inside = value_at(whole, key) if key else {}
    if bool(inside.get(tied, text.get(tied))) != bool(text.get(tied)):
        raise SchemeError(
            f"`format` mlx: config.json: {tied} is {whole.get(tied)!r}, but {inside[tied]!r} in {key}, where mlx-lm"
            " looks; expected one value"
        )


def _refuse_rotation(names: _Names, rope: Mapping[str, Any]) -> None:
    """Refuse rotations that mlx-lm does not have, or has with another magnitude.

    Raises:
        SchemeError: says which.

    """
    kind = rope.get("rope_type") or "default"
    if kind not in ("default", "proportional", *names.scaled):
        raise SchemeError(
            f"`format` mlx: config.json: rope_type {kind!r}; of this family mlx-lm has"
            f" {', '.join(('default', *names.scaled))}"
        )
    if kind != "yarn":
        return
    own, factor = magnitude_of(rope), rope["factor"]
    theirs = usual_magnitude(factor, rope.get("mscale", 1)) / usual_magnitude(factor, rope.get("mscale_all_dim", 0))
    if own != theirs:
        raise SchemeError(
            "`format` mlx: config.json: what YaRN multiplies by follows from attention_factor, or from mscale without"
            " mscale_all_dim, which mlx-lm reads in another way"
        )
    if rope.get("original_max_position_embeddings") is None:
        raise SchemeError("`format` mlx: config.json: original_max_position_embeddings is missing; mlx-lm needs it")


def _refuse_irregular(layout: Layout) -> None:
    """Refuse kinds of layers that do not repeat: mlx-lm tells them by an interval alone.

    Raises:
        SchemeError: names the first layer.

    """
    kinds, interval = layout.text.get("layer_types"), layout.text.get("full_attention_interval")
    if not isinstance(kinds, list):
        return
    if not interval and layout.wrapper.text_key is not None:
        interval = _INTERVAL  # what nests the config of its decoder is written as it is
    interval = interval or (kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1)
    for layer, kind in enumerate(kinds):
        if (kind == "full_attention") != (type(interval) is int and (layer + 1) % interval == 0):
            raise SchemeError(
                f"`format` mlx: config.json: layer_types[{layer}] is {kind}, but mlx-lm has full attention where the"
                f" number of a layer, counted from 1, is a multiple of {interval}, and nowhere else"
            )


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
    names, found = _NAMES[layout.family.name], dict[str, dict[int, list[Member]]]()
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
    return f"{before.removesuffix(home)}{_NAMES[layout.family.name].home}.{theirs[projection]}"


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
    names = _NAMES[layout.family.name]
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
    if layout.family.name not in _NAMES or layout.wrapper.model_type not in _NAMES[layout.family.name].types:
        return dict(config)
    key = "quantization_config"
    told = {name: value for name, value in _config(config_of(config, layout, {})).items() if name != key}
    return {**told, key: config[key]} if key in config else told


def _told(layout: Layout) -> dict[str, Any]:
    """What mlx-lm reads under keys of its own, from those of transformers 5."""
    text = layout.text
    head, rotary = head_dim(text), text.get("rope_parameters")
    rotary = rotary if isinstance(rotary, Mapping) else {}
    usual = _NAMES[layout.family.name].share
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
    known = [theirs for names in _NAMES.values() for theirs in names.types.values()]
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
    if family.name not in _NAMES:
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
    return f"{match[1]}{_NAMES[family.name].home}.{theirs[match[2]]}" if match else module


def members_of(checkpoint: Checkpoint) -> dict[str, tuple[str, ...]]:
    """What `single` calls the parts of every tensor of a checkpoint; most are one and the same."""
    config = single(checkpoint).config
    if config is checkpoint.config or (family := family_of(config)[0]).name not in _NAMES:
        return {name: (name,) for name in checkpoint.tensors}
    return {name: tuple(ref.name for ref in members) for name, members in _apart(checkpoint, family).items()}


def _apart(checkpoint: Checkpoint, family: Family) -> dict[str, tuple[TensorRef, ...]]:
    """By the name of every tensor, what it holds of each expert; itself where it is no stack of them."""
    home, experts = _NAMES[family.name].home, family.experts
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
    names, tensors = _NAMES[layout.family.name], dict[str, TensorRef]()
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
    for names in _NAMES.values():
        for ours, theirs in names.types.items():
            if theirs == config.get("model_type") != ours and _text_key(ours) is None is config.get("text_config"):
                out["model_type"] = ours
    return out


def _text_key(model_type: str) -> str | None:
    return family_of({"model_type": model_type})[1].text_key
