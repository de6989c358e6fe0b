"""DeepSeek-V3.2: DeepSeek-V3 with an indexer in every layer, which says which positions a token attends to.

Names and shapes from transformers' `deepseek_v32`, which has no MTP layers; theirs from vLLM's `deepseek_mtp`, which
builds them as the other layers, indexer and all. The indexer is run as transformers runs it: in 16 bits, without the
Hadamard transform, which changes no product of a query and a key. It is never quantized to integers: vLLM merges `wk`
and `weights_proj` unquantized. In the release, `weights_proj` alone is not FP8.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import EMBEDDINGS, TYPES, Config, Family, Template, Wrapper, listed_as_sparse
from shardxform.model.families.deepseek_v3 import FAMILY as DEEPSEEK_V3
from shardxform.model.families.key_types import INDEXER, LATENT, ROUTED

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    return listed_as_sparse(config, layer, int(config.get("first_k_dense_replace", 3)))


FAMILY: Final = Family(
    name="deepseek_v32",
    wrappers=(Wrapper("DeepseekV32ForCausalLM", "deepseek_v32", None, "model."),),
    count_keys=("n_routed_experts", "num_local_experts", "num_experts"),
    group_key="n_group",
    root=EMBEDDINGS,
    block=(
        *(template for template in DEEPSEEK_V3.block if template.when != "full query"),
        Template("self_attn.indexer.wq_b.weight", "IH*ID,QA", "indexer"),
        Template("self_attn.indexer.wk.weight", "ID,H", "indexer"),
        Template("self_attn.indexer.k_norm.weight", "ID", "norms"),
        Template("self_attn.indexer.k_norm.bias", "ID", "norms"),
        Template("self_attn.indexer.weights_proj.weight", "IH,H", "indexer"),
    ),
    mtp=DEEPSEEK_V3.mtp,
    symbols={**DEEPSEEK_V3.symbols, "ID": "index_head_dim", "IH": "index_n_heads"},
    types={
        **TYPES,
        **INDEXER,
        **LATENT,
        **ROUTED,
        "first_k_dense_replace": "int",
        "head_dim": "int",
        "intermediate_size": "int",
        "layer_types": "list of str or null",
        "mlp_bias": "bool",
        "mlp_layer_types": "list of str or null",
        "q_lora_rank": "int",
        "v_head_dim": "int",
    },
    conditions={
        **DEEPSEEK_V3.conditions,
        "dense": lambda config, layer: not _is_moe(config, layer),
        "moe": _is_moe,
    },
    moe="moe",
    keep_16bit=(*DEEPSEEK_V3.keep_16bit, "self_attn.indexer.*"),  # for clients that go by names
    merged=DEEPSEEK_V3.merged,
    selection_key="index_topk",
)
