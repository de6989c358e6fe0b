"""Keys that every text model has in GGUF, and what llama.cpp takes for granted, which a config may contradict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.architecture import Architecture
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.rotation import magnitude_of, rope_of, usual_magnitude

__all__ = [
    "CORRECTED",
    "OF_GLM",
    "SILU",
    "SPLITS_OF_GLM",
    "UNBIASED",
    "UNTIED",
    "add_common",
    "add_gating",
    "add_normalized_sigmoid",
    "add_sections",
    "head_channels",
    "multiplier",
    "needed",
    "refuse_large_epsilon",
    "refuse_one_kind",
    "refuse_other_heads",
    "refuse_scaled_rotation",
    "refuse_shared_keys",
    "refuse_values",
    "rotated_channels",
    "shared_experts",
    "sigmoid_weights",
    "usual",
]

_COUNTS: Final = (
    ("max_position_embeddings", "context_length"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "head_count"),
    ("num_key_value_heads", "head_count_kv"),
)


def add_common(
    architecture: Architecture,
    recorder: Recorder,
    *,
    latent: bool = False,
    rotated: bool = True,
    **over: Any,  # noqa: ANN401
) -> None:
    """Add the keys that every text model has; `over` are keys of the config that llama.cpp wants to be another.

    What YaRN multiplies by is told by another key where attention is `latent`. Where nothing is `rotated`, a config
    need not say how.
    """
    config, writer = {**architecture.config, **over}, recorder.writer
    needed(config, "max_position_embeddings")
    writer.add_block_count(architecture.blocks)
    for key, name in _COUNTS:
        if config.get(key) is not None:
            getattr(writer, f"add_{name}")(config[key])
    rope = rope_of(config)
    full = rope.get("full_attention", rope)
    _scaling(writer, full)
    if full.get("rope_type") == "yarn" and not latent:
        _magnitude(writer, full)
    if "mrope_section" in rope:
        add_sections(architecture, recorder, rope)
    if rotated or full.get("rope_theta") is not None:
        writer.add_rope_freq_base(needed(full, "rope_theta"))
    if (sliding := rope.get("sliding_attention", {}).get("rope_theta")) is not None:
        writer.add_rope_freq_base_swa(sliding)
    writer.add_layer_norm_rms_eps(needed(config, "rms_norm_eps"))
    writer.add_expert_count(architecture.layout.num_experts)
    writer.add_expert_used_count(architecture.layout.top_k)
    if architecture.layout.family.group_key:  # others' classes read no such key, but llama.cpp does
        _add_groups(architecture, writer, config)
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _add_groups(architecture: Architecture, writer: Any, config: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Groups of experts that the router looks at first.

    Raises:
        SchemeError: more are taken than there are, or none; or each has a single expert: the best two are looked at.

    """
    groups, taken = config.get("n_group"), config.get("topk_group")
    if groups is not None:
        writer.add_expert_group_count(groups)
    if taken is not None:
        writer.add_expert_group_used_count(taken)
    several = architecture.layout.groups
    if (taken is not None and not 1 <= taken <= several) or (several > 1 and groups is not None and taken is None):
        raise SchemeError(f"config.json: topk_group is {taken!r} of {several} groups; expected 1 to {several}")
    if several > 1 and groups is not None and architecture.layout.num_experts < 2 * several:
        raise SchemeError(
            f"config.json: {architecture.layout.num_experts} experts in {several} groups; routers of groups look at the"
            " best two of each"
        )


def add_sections(architecture: Architecture, recorder: Recorder, rope: Mapping[str, Any]) -> None:
    """Add how many of the rotated pairs go by time, height and width; in text all three are the same.

    Raises:
        SchemeError: more than a head has channels, at which llama.cpp aborts.

    """
    sections, width = [*rope.get("mrope_section", (11, 11, 10)), 0, 0, 0, 0][:4], head_channels(architecture)
    if sum(sections) > width:
        raise SchemeError(f"config.json: mrope_section is {sections}, but heads have {width} channels")
    recorder.writer.add_rope_dimension_sections(sections)


def needed(config: Mapping[str, object], key: str) -> Any:  # noqa: ANN401
    """Return a value that must be there.

    Raises:
        SchemeError: it is not.

    """
    if config.get(key) is None:
        raise SchemeError(f"config.json: {key} is missing")
    return config[key]


def _scaling(writer: Any, rope: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Keys of the scaling of positions.

    Raises:
        SchemeError: a kind that llama.cpp's converter does not carry over.

    """
    kind = rope.get("rope_type") or "default"
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(_scaling_type(kind))
        writer.add_rope_scaling_factor(needed(rope, "factor"))
    elif kind not in ("default", "proportional"):  # the last is a tensor of factors
        raise SchemeError(f"config.json: rope_type {kind!r}; of llama.cpp's converter come default, linear and yarn")
    if kind != "yarn":
        return
    writer.add_rope_scaling_orig_ctx_len(needed(rope, "original_max_position_embeddings"))
    if rope.get("extrapolation_factor") not in (None, 1):
        raise SchemeError(
            f"config.json: extrapolation_factor is {rope['extrapolation_factor']!r}, which transformers takes for 1 and"
            " llama.cpp does not: leave it out"
        )
    for key in ("beta_fast", "beta_slow"):
        if rope.get(key):  # 0 is none to transformers
            getattr(writer, f"add_rope_scaling_yarn_{key}")(rope[key])


def _magnitude(writer: Any, rope: Mapping[str, Any]) -> None:  # noqa: ANN401
    """What sines and cosines are multiplied by, where it is another than llama.cpp multiplies by of itself.

    It is not the key of YaRN that llama.cpp's converter writes, which llama.cpp reads and then works out anew.
    """
    times = magnitude_of(rope) / usual_magnitude(rope["factor"])
    if times != 1:
        writer.add_rope_scaling_attn_factors(times)


def _scaling_type(kind: str) -> Any:  # noqa: ANN401
    from gguf import RopeScalingType

    return RopeScalingType[kind.upper()]


def multiplier(config: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401
    """Return a number that something is multiplied by: llama.cpp takes 0 for there being none.

    Raises:
        SchemeError: it is missing, 0, or no number.

    """
    found = needed(config, key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not found:
        raise SchemeError(f"config.json: {key} is {found!r}; llama.cpp wants a number other than 0")
    return found


def refuse_values(architecture: Architecture, wanted: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse values that llama.cpp would not run as they are meant: it has no key for them.

    Raises:
        SchemeError: names the first.

    """
    for key, allowed in wanted.items():
        found = architecture.config.get(key, allowed[0])
        if found not in allowed:
            expected = " or ".join(repr(each) for each in allowed)
            raise SchemeError(
                f"config.json: {key} is {found!r}, which llama.cpp would run as {allowed[0]!r}; expected {expected}"
            )


SILU: Final = {"hidden_act": ("silu", "swish")}
UNBIASED: Final = {"attention_bias": (False, None)}
UNTIED: Final = {"tie_word_embeddings": (False, None)}


def usual(architecture: Architecture, **values: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what transformers' class has of keys that the config lacks, for `add_common`."""
    found = {**architecture.config, **rope_of(architecture.config)}
    return {key: value for key, value in values.items() if found.get(key) is None}


def head_channels(architecture: Architecture) -> int:
    """Tell the channels of an attention head: as the config says, or what there is for each."""
    if architecture.config.get("head_dim") is not None:
        return architecture.size("head_dim")
    return architecture.size("hidden_size") // architecture.size("num_attention_heads")


def rotated_channels(architecture: Architecture, part: float = 1.0) -> int:
    """Tell how many channels of a head are rotated, where `part` of it is.

    Raises:
        SchemeError: they are no pairs, at which llama.cpp aborts.

    """
    width = head_channels(architecture)
    channels = int(width * part)
    if channels % 2:
        raise SchemeError(
            f"config.json: {channels} of the {width} channels of a head are rotated; llama.cpp rotates pairs"
        )
    return channels


def refuse_scaled_rotation(architecture: Architecture) -> None:
    """Refuse scaled positions where llama.cpp scales those of blocks that are not to be.

    Raises:
        SchemeError: `rope_type` is not default.

    """
    kind = rope_of(architecture.config).get("rope_type") or "default"
    if kind != "default":
        raise SchemeError(f"config.json: rope_type {kind!r}; of llama.cpp's {architecture.name} default is run")


def refuse_shared_keys(architecture: Architecture) -> None:
    """Refuse heads that share keys and values, for architectures of llama.cpp that have none.

    Raises:
        SchemeError: there are fewer keys than heads.

    """
    heads, shared = architecture.size("num_attention_heads"), architecture.config.get("num_key_value_heads")
    if shared not in (None, heads):
        raise SchemeError(
            f"config.json: num_key_value_heads is {shared!r} and num_attention_heads {heads}; llama.cpp's"
            f" {architecture.name} has one for each"
        )


def refuse_one_kind(architecture: Architecture, condition: str) -> None:
    """Refuse models all of whose blocks attend, or none, of which llama.cpp makes no cache.

    Raises:
        SchemeError: the family's `condition` holds of all of them, or of none.

    """
    if len(set(architecture.which(condition))) == 1:
        raise SchemeError(
            f"config.json: layers are all of one kind; llama.cpp's {architecture.name} runs models that have both"
        )


def refuse_other_heads(architecture: Architecture) -> None:
    """Refuse heads of another width than there is for each of the hidden channels.

    Raises:
        SchemeError: `head_dim` says so.

    """
    each = architecture.size("hidden_size") // architecture.size("num_attention_heads")
    if (found := architecture.config.get("head_dim")) not in (None, each):
        raise SchemeError(
            f"config.json: head_dim is {found!r}; llama.cpp's {architecture.name} has {each} channels a head"
        )


_SMALL: Final = 1e-5


def refuse_large_epsilon(architecture: Architecture) -> None:
    """Refuse what llama.cpp adds in norms that have no key of their own, where it is no longer next to nothing.

    Transformers' classes add 1e-6 in some of them, whatever the config says: norms of latent queries and keys, and of a
    delta net's.

    Raises:
        SchemeError: it is more than ten times that.

    """
    found = needed(architecture.config, "rms_norm_eps")
    if not isinstance(found, int | float) or found > _SMALL:
        raise SchemeError(
            f"config.json: rms_norm_eps is {found!r}; some norms have 1e-6 in transformers, and llama.cpp runs all by"
            f" this: expected at most {_SMALL}"
        )


def add_gating(writer: Any, name: str) -> None:  # noqa: ANN401
    """Add how experts are scored: `SOFTMAX` or `SIGMOID`."""
    from gguf import ExpertGatingFuncType

    writer.add_expert_gating_func(ExpertGatingFuncType[name])


def sigmoid_weights(writer: Any, config: Mapping[str, Any]) -> None:  # noqa: ANN401
    """How experts are scored and weighed by a sigmoid: the family's own way, whether the config says so or not.

    Raises:
        SchemeError: a number is missing, for which transformers' classes and llama.cpp have others.

    """
    writer.add_expert_weights_scale(multiplier(config, "routed_scaling_factor"))
    if needed(config, "norm_topk_prob"):
        writer.add_expert_weights_norm(True)
    add_gating(writer, "SIGMOID")


def add_normalized_sigmoid(writer: Any, config: Mapping[str, Any], scale: str) -> None:  # noqa: ANN401
    """Add that scores of a sigmoid are normalized over the experts chosen, and what `scale` multiplies them by.

    Raises:
        SchemeError: see `multiplier`.

    """
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(float(multiplier(config, scale)))
    add_gating(writer, "SIGMOID")


def shared_experts(architecture: Architecture, key: str = "n_shared_experts") -> int:
    """How many there are in a block.

    Raises:
        SchemeError: none, but llama.cpp loads no model of these without.

    """
    count = architecture.size(key)
    if not count:
        raise SchemeError(f"config.json: {key} is 0; llama.cpp runs models that have some")
    return count


CORRECTED: Final = {"e_score_correction_bias": "e_score_correction.bias"}
"""How a correction bias is spelled in the map."""

OF_GLM: Final = {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
"""Special tokens of GLM's."""

SPLITS_OF_GLM: Final = {"llama-bpe": "glm4", "smaug-bpe": "chatglm-bpe"}
"""Names of pre-tokenizers of GLM's."""
