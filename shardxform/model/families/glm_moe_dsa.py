"""GLM-5 and its successors: DeepSeek-V3's latent attention and experts, and an indexer that selects positions.

Names and shapes from transformers' `glm_moe_dsa`. Some blocks have no indexer and take the selection of the block
before, which transformers' blocks hand on beside their hidden states; the MTP layer has an indexer of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families.base import Config, Template, Wrapper, size
from shardxform.model.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

__all__ = ["FAMILY", "INDEXER", "INDEXER_SYMBOLS"]


def _is_moe(config: Config, layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    if kinds is None:
        return layer >= size({"first_k_dense_replace": 3, **config}, "first_k_dense_replace")
    return layer >= 0 and kinds[layer] == "sparse"


def _has_indexer(config: Config, layer: int) -> bool:
    kinds = config.get("indexer_types") or config.get("index_topk_pattern")
    if kinds:
        return layer < 0 or kinds[layer] in ("full", "F")
    skipped = max(layer - int(config.get("index_skip_topk_offset", 2)) + 1, 0)
    return skipped % max(int(config.get("index_topk_freq", 1)), 1) == 0


def _last_whole(config: Config) -> int:
    """The last block with experts and an indexer, as the MTP layer has both."""
    layers = range(size(config, "num_hidden_layers"))
    return max((each for each in layers if _is_moe(config, each) and _has_indexer(config, each)), default=layers[-1])


INDEXER: Final = (
    *(
        Template(f"self_attn.indexer.{name}.weight", shape, "attention", "indexer")
        for name, shape in (("wq_b", "IQ*ID,QA"), ("wk", "ID,H"), ("weights_proj", "IQ,H"))
    ),
    Template("self_attn.indexer.k_norm.weight", "ID", "norms", "indexer"),
    Template("self_attn.indexer.k_norm.bias", "ID", "norms", "indexer"),
)
"""What selects the positions that a token attends to."""

INDEXER_SYMBOLS: Final = {"ID": "index_head_dim", "IQ": "index_n_heads"}

_NOT_ITS_OWN: Final = ("num_nextn_predict_layers", "pretraining_tp", "rope_interleave")

assert DEEPSEEK_V3.mtp is not None

FAMILY: Final = replace(
    DEEPSEEK_V3,
    name="glm_moe_dsa",
    wrappers=(Wrapper("GlmMoeDsaForCausalLM", "glm_moe_dsa", None, "model."),),
    count_keys=("n_routed_experts", "num_local_experts", "num_experts"),
    block=(*(each for each in DEEPSEEK_V3.block if each.when != "full query"), *INDEXER),
    mtp=replace(DEEPSEEK_V3.mtp, like=_last_whole),
    symbols={**DEEPSEEK_V3.symbols, **INDEXER_SYMBOLS},
    types={
        **{key: value for key, value in DEEPSEEK_V3.types.items() if key not in _NOT_ITS_OWN},
        "attention_dropout": "float or int",
        "first_k_dense_replace": "int",
        "head_dim": "int",
        "index_head_dim": "int",
        "index_n_heads": "int",
        "index_topk": "int",
        "indexer_types": "list of str or null",
        "layer_types": "list of str or null",
        "mlp_bias": "bool",
        "mlp_layer_types": "list of str or null",
        **dict.fromkeys(("n_group", "topk_group", "num_experts_per_tok", "num_key_value_heads"), "int"),
        "norm_topk_prob": "bool",
        **dict.fromkeys(("q_lora_rank", "v_head_dim"), "int"),
    },
    conditions={
        **{name: holds for name, holds in DEEPSEEK_V3.conditions.items() if name != "full query"},
        "dense": lambda config, layer: not _is_moe(config, layer),
        "indexer": _has_indexer,
        "moe": _is_moe,
    },
    keep_16bit=(*DEEPSEEK_V3.keep_16bit, "self_attn.indexer.*"),  # as auto-round keeps them
    selection_key="index_topk",
    shares_selection=True,
)
