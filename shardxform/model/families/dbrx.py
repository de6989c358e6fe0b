"""DBRX: experts one below the other in matrices [E * I, H]; sizes of attention and experts in configs of their own.

Names and shapes from the release of DBRX and transformers' `dbrx`.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    TYPES,
    Config,
    Decoder,
    ExpertLayout,
    Family,
    Template,
    Wrapper,
    size,
    tied,
    untied,
)

__all__ = ["FAMILY"]

_KNOWN: Final = (
    *("bos_token_id", "eos_token_id", "initializer_range", "pad_token_id", "rope_parameters", "tie_word_embeddings"),
    *("use_cache", "vocab_size"),
)


def _heads(config: Config) -> int:
    return size(config.get("attn_config") or {"kv_n_heads": 1}, "kv_n_heads")


def _width(config: Config) -> int:
    return size(config["ffn_config"], "ffn_hidden_size")


FAMILY: Final = Family(
    name="dbrx",
    wrappers=(Wrapper("DbrxForCausalLM", "dbrx", None, "transformer."),),
    count_keys=("ffn_config.moe_num_experts",),
    top_k_key="ffn_config.moe_top_k",
    layers="n_layers",
    decoder=Decoder(embeddings="wte", blocks="blocks", norm="norm_f"),
    root=(
        Template("{decoder}wte.weight", "V,H", "embeddings"),
        Template("{decoder}norm_f.weight", "H", "norms"),
        Template("{head}.weight", "V,H", "lm head", "untied"),
        Template("{head}.weight", "V,H", "lm head", "tied", optional=True),
    ),
    block=(
        Template("norm_attn_norm.norm_1.weight", "H", "norms"),
        Template("norm_attn_norm.norm_2.weight", "H", "norms"),
        Template("norm_attn_norm.attn.Wqkv.weight", "H+2*KV*D,H", "attention"),
        Template("norm_attn_norm.attn.out_proj.weight", "H,H", "attention"),
        Template("ffn.router.layer.weight", "E,H", "router"),
        *(Template(f"ffn.experts.mlp.{w}", "E*I,H", "routed experts", variant="fused") for w in ("w1", "v1", "w2")),
    ),
    experts=ExpertLayout(home="ffn.experts.mlp", stacks=("w1", "v1", "w2"), gate="separate"),
    symbols={
        "D": lambda config: size(config, "d_model") // size(config, "n_heads"),
        "H": "d_model",
        "I": _width,
        "KV": _heads,
        "V": "vocab_size",
    },
    types={
        **{key: value for key, value in TYPES.items() if key in _KNOWN},
        **dict.fromkeys(("attn_config", "ffn_config"), "object or null"),
        **dict.fromkeys(("d_model", "max_seq_len", "n_heads", "n_layers"), "int or null"),
        **dict.fromkeys(("emb_pdrop", "resid_pdrop"), "float or null"),
        "output_router_logits": "bool or null",
    },
    conditions={"tied": tied, "untied": untied},
    keep_16bit=("ffn.router.layer",),
    formats=(),
    unread="nobody reads its experts one by one",
    not_run="its experts lie in matrices of all, which are not read one at a time",
)
