"""What mlx-lm has of each family: modules, types and keys; and configs that it would run as another model.

Read in the code of mlx-lm 0.32 (`mlx_lm/models`), and held against transformers by changing one key after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from shardxform.errors import SchemeError
from shardxform.model.families.base import head_dim
from shardxform.model.layout import Layout, value_at
from shardxform.runtimes.rotation import magnitude_of, rope_of, usual_magnitude

__all__ = ["NAMES", "Names", "refuse_misread"]


@dataclass(frozen=True, slots=True)
class Names:
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
        faults: functions that say what else of a config it reads in another way, or nothing.

    """

    home: str
    types: Mapping[str, str]
    keys: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()
    share: float = 1.0
    faults: tuple[Callable[[Layout], str], ...] = ()


def _same(*types: str) -> dict[str, str]:
    return {each: each for each in types}


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


def _square(layout: Layout) -> str:
    """It takes a head to have as many channels as the hidden size has for each."""
    width, heads, hidden = head_dim(layout.text), layout.text["num_attention_heads"], layout.text["hidden_size"]
    return "" if width * heads == hidden else f"head_dim is {width}, but it divides hidden_size by num_attention_heads"


def _rotated(layout: Layout) -> str:
    """Transformers' class scales rotations where the config says nothing."""
    missing = "rope_type" not in rope_of(layout.text)
    return "rope_scaling is missing, for which transformers has numbers that it has not" if missing else ""


def _large_epsilon(layout: Layout) -> str:
    """All of its norms add the config's number, where some of transformers' add 1e-6."""
    found = layout.text.get("rms_norm_eps", _SMALL)
    large = not isinstance(found, int | float) or found > _SMALL
    return f"rms_norm_eps is {found!r}, where some norms have 1e-6: expected at most {_SMALL}" if large else ""


def _dense_before(usual: int) -> Callable[[Layout], str]:
    """It tells layers with experts by two keys, of which the first is `usual` where it is missing."""

    def fault(layout: Layout) -> str:
        first, every = (layout.text.get(key, n) for key, n in (("first_k_dense_replace", usual), ("moe_layer_freq", 1)))
        sparse = [layer for layer in range(layout.num_layers) if layer >= first and not layer % every]
        if sparse == [*layout.moe_layers]:
            return ""
        return (
            f"layers {list(layout.moe_layers)} have experts, but by first_k_dense_replace and moe_layer_freq {sparse}"
        )

    return fault


_SMALL: Final = 1e-5
_ROUTED: Final = ("n_group", "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "topk_group")
_BUILT: Final = ("attention_bias", "tie_word_embeddings")
_SCALED: Final = ("dynamic", "linear", "llama3", "yarn")
_DEEPSEEK_V3: Final = Names(
    _SWITCH,
    _same("deepseek_v3", "kimi_k2"),
    _ROTARY,
    only=_SIGMOID,
    needs=_ROUTED,
    scaled=_SCALED,
    faults=(_dense_before(0),),
)
NAMES: Final[Mapping[str, Names]] = {
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": replace(_DEEPSEEK_V3, types=_same("deepseek_v32")),
    "gemma4": Names(
        "experts.switch_glu",
        _same("gemma4", "gemma4_text"),
        only={
            **_UNBIASED,
            "hidden_activation": ("gelu_pytorch_tanh",),
            "use_bidirectional_attention": (None, "vision"),
        },
    ),
    "glm4_moe": Names(
        _SWITCH,
        _same("glm4_moe"),
        (*_ROTARY, "head_dim", "partial_rotary_factor"),
        only={**_SILU, **_UNTIED, "scoring_func": ("sigmoid",)},
        needs=(*_ROUTED, *_BUILT, "first_k_dense_replace", "n_shared_experts", "use_qk_norm"),
        share=0.5,
        faults=(_dense_before(0),),
    ),
    "glm4_moe_lite": replace(
        _DEEPSEEK_V3,
        types=_same("glm4_moe_lite"),
        keys=(*_ROTARY, "partial_rotary_factor"),
        faults=(_dense_before(1), _large_epsilon),
    ),
    "gpt_oss": Names(
        "mlp.experts",
        _same("gpt_oss"),
        _ROTARY,
        only={**_SILU, **_UNTIED, "attention_bias": (True,), "swiglu_alpha": (1.702,), "swiglu_limit": (7.0, 7)},
        scaled=tuple(kind for kind in _SCALED if kind != "dynamic"),
        faults=(_rotated,),
    ),
    "minimax_m2": Names(
        "block_sparse_moe.switch_mlp",
        _same("minimax_m2"),
        ("rope_theta", "rotary_dim", "shared_intermediate_size"),
        only={**_SILU, "scoring_func": ("sigmoid",)},
    ),
    "mixtral": Names(
        "block_sparse_moe.switch_mlp",
        _same("mixtral"),
        _ROTARY,
        only={**_SILU, "sliding_window": (None,)},
        faults=(_square,),
    ),
    "qwen3_5_moe": Names(
        _SWITCH,
        {"qwen3_5_moe": "qwen3_5_moe", "qwen3_5_moe_text": "qwen3_5_moe"},
        ("full_attention_interval",),
        only=_SILU,
        needs=("rope_parameters",),
        scaled=_SCALED,
        share=0.25,
    ),
    "qwen3_moe": Names(
        _SWITCH,
        _same("qwen3_moe"),
        (*_ROTARY, "head_dim", "num_experts"),
        only={**_SILU, **_UNBIASED, "use_sliding_window": (False, None)},
        needs=("decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "tie_word_embeddings"),
    ),
    "qwen3_next": Names(
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


def refuse_misread(layout: Layout) -> None:
    """Refuse a config of which mlx-lm reads something in another way than transformers, or not at all.

    Raises:
        SchemeError: names the key.

    """
    try:
        told = next(_misread(layout), "")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise SchemeError(f"`format` mlx: config.json: cannot tell what mlx-lm makes of it: {e!r}") from e
    if told:
        raise SchemeError(f"`format` mlx: config.json: {told}")


def _misread(layout: Layout) -> Iterator[str]:
    """Say what mlx-lm reads in another way."""
    names, text = NAMES[layout.family.name], layout.text
    if "full_attention_interval" in names.keys:
        yield from _irregular(layout)
    for key, allowed in names.only.items():
        found = text.get(key, allowed[0])
        if found not in allowed:
            expected = " or ".join(map(repr, allowed))
            yield f"{key} is {found!r}, which mlx-lm would run as {allowed[0]!r}; expected {expected}"
    for key in names.needs:
        if text.get(key) is None:
            yield (
                f"{key} is missing, without which mlx-lm does not run it, or not as transformers does; write there what"
                " it is"
            )
    for fault in names.faults:
        if found := fault(layout):
            yield f"{found}; mlx-lm would run another model"
    yield from _tied_elsewhere(layout)
    rope = rope_of(text)
    for each in [rope[kind] for kind in ("full_attention", "sliding_attention") if kind in rope] or [rope]:
        yield from _rotated_otherwise(names, each)


def _tied_elsewhere(layout: Layout) -> Iterator[str]:
    """Say where the output head is tied, or not, by another key than transformers looks at."""
    text, whole = layout.text, layout.config
    key, tied = layout.wrapper.text_key, "tie_word_embeddings"
    inside = value_at(whole, key) if key else {}
    if bool(inside.get(tied, text.get(tied))) != bool(text.get(tied)):
        yield (f"{tied} is {whole.get(tied)!r}, but {inside[tied]!r} in {key}, where mlx-lm looks; expected one value")


def _rotated_otherwise(names: Names, rope: Mapping[str, Any]) -> Iterator[str]:
    """Say which rotation mlx-lm does not have, or has with another magnitude."""
    kind = rope.get("rope_type") or "default"
    if kind not in ("default", "proportional", *names.scaled):
        kinds = ", ".join(("default", *names.scaled))
        yield f"rope_type {kind!r}; of this family mlx-lm has {kinds}: take it out for contexts that need no scaling"
    if kind != "yarn":
        return
    own, factor = magnitude_of(rope), rope["factor"]
    theirs = usual_magnitude(factor, rope.get("mscale", 1)) / usual_magnitude(factor, rope.get("mscale_all_dim", 0))
    if own != theirs:
        yield (
            "what YaRN multiplies by follows from attention_factor, or from mscale without mscale_all_dim, which mlx-lm"
            " reads in another way"
        )
    if rope.get("original_max_position_embeddings") is None:
        yield "original_max_position_embeddings is missing; mlx-lm needs it"


def _irregular(layout: Layout) -> Iterator[str]:
    """Say which layer is of another kind than mlx-lm takes it for, which tells them by an interval alone."""
    kinds, interval = layout.text.get("layer_types"), layout.text.get("full_attention_interval")
    if not isinstance(kinds, list):
        return
    if not interval and layout.wrapper.text_key is not None:
        interval = _INTERVAL  # what nests the config of its decoder is written as it is
    interval = interval or (kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1)
    for layer, kind in enumerate(kinds):
        if (kind == "full_attention") != (type(interval) is int and (layer + 1) % interval == 0):
            yield (
                f"layer_types[{layer}] is {kind}, but mlx-lm has full attention where the number of a layer, counted"
                f" from 1, is a multiple of {interval}, and nowhere else"
            )
