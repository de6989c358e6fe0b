"""Nemotron-3 (Nano, Super, Ultra): every block is a norm and one mixer, Mamba, attention, a dense or a MoE MLP.

Names and shapes from transformers' `nemotron_h`, those of the MTP layer from vLLM's `nemotron_h_mtp`. MLPs are an up
and a down projection with a squared ReLU between them, no gate. In Super and Ultra experts work on fewer, latent
channels, between two projections that all share: scores are of an expert's output there. An MTP layer is made of
several blocks, `*E` in releases, that are numbered through. Kinds of blocks are a list of names, or a string.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    TYPES,
    Condition,
    Config,
    Decoder,
    ExpertLayout,
    Family,
    Mtp,
    Role,
    Template,
    Wrapper,
    experts,
    size,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout("mixer.experts", (), projections=("up_proj", "down_proj"), gate="none", width="L")
_KINDS: Final = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
_NAMES: Final = {"linear_attention": "mamba", "full_attention": "attention"}  # as transformers 5 has them


def _kinds(config: Config, names: str, pattern: str) -> list[str]:
    """Kinds of blocks in order, under one of two keys."""
    listed = config.get(names)
    listed = config.get(pattern) if listed is None else listed
    if not isinstance(listed, list | str) or not listed:
        raise ValueError(f"{names}: expected a list of names, or {pattern}, found {listed!r}")
    known = _KINDS if isinstance(listed, str) else {**{kind: kind for kind in _KINDS.values()}, **_NAMES}
    if other := next((each for each in listed if each not in known), None):
        raise ValueError(f"{names}: {other!r} is no kind of block")
    return [known[each] for each in listed]


def _decoder_kinds(config: Config) -> list[str]:
    return _kinds(config, "layers_block_type", "hybrid_override_pattern")


def _mtp_kinds(config: Config) -> list[str]:
    pattern = config.get("mtp_hybrid_override_pattern")
    kinds = _kinds({"mtp_layers_block_type": "*E", **config}, "mtp_layers_block_type", "mtp_hybrid_override_pattern")
    kinds = _kinds({"_": pattern}, "", "_") if pattern and kinds == ["attention", "moe"] else kinds
    if kinds.count("moe") > 1:
        raise ValueError("mtp_hybrid_override_pattern: MTP layers with experts in several blocks are not supported")
    return kinds


def _kind(config: Config, layer: int) -> str:
    """Kind of a block, those of MTP layers numbered on after the decoder's; empty in the root."""
    kinds = _decoder_kinds(config)
    if 0 <= layer < len(kinds):
        return kinds[layer]
    mtp = _mtp_kinds(config)
    return mtp[(layer - len(kinds)) % len(mtp)] if layer >= 0 else ""


def _is(kind: str, *flags: str) -> Condition:
    """A condition: blocks of a kind, where flags of the config are set."""
    return lambda config, layer: _kind(config, layer) == kind and all(config.get(flag) for flag in flags)


def _mtp_block(config: Config, layer: int) -> int:
    """Number of a block within its MTP layer; -1 for blocks of the decoder."""
    first = len(_decoder_kinds(config))
    return (layer - first) % len(_mtp_kinds(config)) if layer >= first else -1


def _group(role: Role, when: str, *shapes: tuple[str, str]) -> tuple[Template, ...]:
    return tuple(Template(f"mixer.{name}", shape, role, when) for name, shape in shapes)


FAMILY: Final = Family(
    name="nemotron_h",
    wrappers=(Wrapper("NemotronHForCausalLM", "nemotron_h", None, "backbone."),),
    count_keys=("n_routed_experts", "num_local_experts"),
    group_key="n_group",
    layers=lambda config: len(_decoder_kinds(config)),
    root=(
        Template("{decoder}embeddings.weight", "V,H", "embeddings"),
        Template("{decoder}norm_f.weight", "H", "norms"),
        Template("{head}.weight", "V,H", "lm head", "untied"),
        Template("{head}.weight", "V,H", "lm head", "tied", optional=True),
    ),
    block=(
        Template("norm.weight", "H", "norms"),
        *_group("linear attention", "mamba", ("A_log", "MH"), ("D", "MH"), ("dt_bias", "MH"), ("norm.weight", "M")),
        *_group("linear attention", "mamba", ("conv1d.weight", "M+2*G*N,1,C"), ("in_proj.weight", "2*M+2*G*N+MH,H")),
        *_group("linear attention", "mamba", ("out_proj.weight", "H,M")),
        *_group("linear attention", "conv bias", ("conv1d.bias", "M+2*G*N")),
        *_group("linear attention", "mamba bias", ("in_proj.bias", "2*M+2*G*N+MH"), ("out_proj.bias", "H")),
        *_group("attention", "attention", ("q_proj.weight", "Q*D,H"), ("k_proj.weight", "KV*D,H")),
        *_group("attention", "attention", ("v_proj.weight", "KV*D,H"), ("o_proj.weight", "H,Q*D")),
        *_group("dense mlp", "mlp", ("up_proj.weight", "F,H"), ("down_proj.weight", "H,F")),
        *_group("dense mlp", "mlp bias", ("up_proj.bias", "F"), ("down_proj.bias", "H")),
        *_group("router", "moe", ("gate.weight", "E,H"), ("gate.e_score_correction_bias", "E")),
        *experts("moe", _EXPERTS),
        *_group("shared experts", "latent", ("fc1_latent_proj.weight", "L,H"), ("fc2_latent_proj.weight", "H,L")),
        *_group("shared experts", "latent bias", ("fc1_latent_proj.bias", "L"), ("fc2_latent_proj.bias", "H")),
        *_group("shared experts", "moe", ("shared_experts.up_proj.weight", "S,H")),
        *_group("shared experts", "moe", ("shared_experts.down_proj.weight", "H,S")),
        *_group(
            "shared experts", "moe bias", ("shared_experts.up_proj.bias", "S"), ("shared_experts.down_proj.bias", "H")
        ),
    ),
    decoder=Decoder(embeddings="embeddings", norm="norm_f"),
    experts=_EXPERTS,
    mtp=Mtp(
        count_key="num_nextn_predict_layers",
        prefix="mtp.layers.{l}.",
        follows_blocks=False,
        like=lambda config: len(_decoder_kinds(config)),  # see `_kind`
        inputs=(
            "mtp.layers.{l}.enorm.weight",
            "mtp.layers.{l}.hnorm.weight",
            "mtp.layers.{l}.eh_proj.weight",
            "mtp.layers.{last}.final_layernorm.weight",
        ),
        layer=(
            Template("enorm.weight", "H", "mtp", "mtp first"),
            Template("hnorm.weight", "H", "mtp", "mtp first"),
            Template("eh_proj.weight", "H,2*H", "mtp", "mtp first"),
            Template("final_layernorm.weight", "H", "mtp", "mtp last"),
        ),
        blocks=lambda config: len(_mtp_kinds(config)),
    ),
    symbols={
        "C": "conv_kernel",
        "D": "head_dim",
        "F": "intermediate_size",
        "G": "n_groups",
        "H": "hidden_size",
        "I": "moe_intermediate_size",
        "KV": "num_key_value_heads",
        "L": lambda config: size(config, "hidden_size" if config.get("moe_latent_size") is None else "moe_latent_size"),
        "M": lambda config: size(config, "mamba_num_heads") * size(config, "mamba_head_dim"),
        "MH": "mamba_num_heads",
        "N": "ssm_state_size",
        "Q": "num_attention_heads",
        "S": "moe_shared_expert_intermediate_size",
        "V": "vocab_size",
    },
    types={
        **{
            key: TYPES[key]
            for key in TYPES
            if key not in ("hidden_act", "num_hidden_layers", "rms_norm_eps", "rope_parameters")
        },
        **dict.fromkeys(("chunk_size", "conv_kernel", "expand", "head_dim", "intermediate_size"), "int"),
        **dict.fromkeys(("mamba_head_dim", "mamba_num_heads", "moe_shared_expert_intermediate_size"), "int"),
        **dict.fromkeys(("n_group", "n_groups", "n_routed_experts", "n_shared_experts", "num_logits_to_keep"), "int"),
        **dict.fromkeys(("num_nextn_predict_layers", "ssm_state_size", "topk_group"), "int"),
        **dict.fromkeys(("moe_latent_size", "sliding_window"), "int or null"),
        **dict.fromkeys(("layers_block_type", "mtp_layers_block_type"), "list of str or null"),
        **dict.fromkeys(("mamba_hidden_act", "mamba_ssm_cache_dtype", "mlp_hidden_act"), "str"),
        **dict.fromkeys(("mamba_proj_bias", "mlp_bias", "moe_shared_expert_overlap", "norm_topk_prob"), "bool"),
        **dict.fromkeys(("rescale_prenorm_residual", "residual_in_fp32", "use_bias", "use_conv_bias"), "bool"),
        "use_mamba_kernels": "bool",
        **dict.fromkeys(("layer_norm_epsilon", "time_step_floor", "time_step_max", "time_step_min"), "float"),
        "time_step_limit": "list of float",
        **dict.fromkeys(("hidden_dropout", "routed_scaling_factor"), "float or int"),
    },
    conditions={
        "attention": _is("attention"),
        "conv bias": lambda config, layer: _kind(config, layer) == "mamba" and bool(config.get("use_conv_bias", True)),
        "latent": _is("moe", "moe_latent_size"),
        "latent bias": _is("moe", "moe_latent_size", "mlp_bias"),
        "mamba": _is("mamba"),
        "mamba bias": _is("mamba", "use_bias"),
        "mlp": _is("mlp"),
        "mlp bias": _is("mlp", "mlp_bias"),
        "moe": _is("moe"),
        "moe bias": _is("moe", "mlp_bias"),
        "mtp first": lambda config, layer: _mtp_block(config, layer) == 0,
        "mtp last": lambda config, layer: _mtp_block(config, layer) == len(_mtp_kinds(config)) - 1,
        "tied": tied,
        "untied": untied,
    },
    moe="moe",
    experts_norm="norm.weight",
    keep_16bit=("mixer.gate", "mixer.conv1d", "mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
    merged={"mixer.qkv_proj": ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj")},
)
