"""A.X-K2: DeepSeek-V3.2's latent attention with an indexer, gates in its queries, norms with gates of a low rank.

Names and shapes from transformers' `axk2`, whose modules have other names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families.axk1 import FAMILY as AXK1
from shardxform.model.families.axk1 import biased
from shardxform.model.families.base import Template, Wrapper, types
from shardxform.model.families.key_types import INDEXER, LATENT, ROUTED

__all__ = ["FAMILY"]

_NORMS: Final = ("input_layernorm.weight", "post_attention_layernorm.weight", "post_mlp_layernorm.weight")


def _gated(norm: str, when: str = "") -> tuple[Template, ...]:
    """A norm, and the two matrices that its gate is made by."""
    return (
        Template(f"{norm}.norm.weight", "H", "norms", when),
        Template(f"{norm}.W_down.weight", "G,H", "norms", when),
        Template(f"{norm}.W_up.weight", "H,G", "norms", when),
    )


FAMILY: Final = replace(
    AXK1,
    name="axk2",
    wrappers=(Wrapper("AXK2ForCausalLM", "axk2", None, "model."),),
    block=(
        *_gated("input_layernorm"),
        *_gated("post_attention_layernorm", "moe"),
        Template("post_attention_layernorm.weight", "H", "norms", "dense"),
        *(
            replace(each, shape="Q*VD+Q*N+Q*R,2*QA") if each.name == "self_attn.q_b_proj.weight" else each
            for each in biased(AXK1)
            if each.name not in _NORMS
        ),
        Template("self_attn.indexer.wq_b.weight", "IQ*ID,QA", "indexer"),
        Template("self_attn.indexer.wk.weight", "ID,H", "indexer"),
        Template("self_attn.indexer.k_norm.weight", "ID", "norms"),
        Template("self_attn.indexer.k_norm.bias", "ID", "norms"),
        Template("self_attn.indexer.weights_proj.weight", "IQ,H", "indexer"),
    ),
    renames=(("q_b_proj", "q_gate_proj"), ("W_down", "mlp.fc1"), ("W_up", "mlp.fc2")),
    symbols={**AXK1.symbols, "G": "gated_norm_rank", "ID": "index_head_dim", "IQ": "index_n_heads"},
    types={
        **types(
            gated_norm_rank="int",
            head_dim="int",
            intermediate_size="int",
            layer_types="list of str or null",
            mlp_layer_types="list of str or null",
            q_lora_rank="int",
            v_head_dim="int",
        ),
        **INDEXER,
        **LATENT,
        **ROUTED,
        "n_group": "int or null",
        "topk_group": "int or null",
    },
    experts_norm="post_attention_layernorm.norm.weight",
    selection_key="index_topk",
)
