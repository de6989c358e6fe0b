"""MiniMax-Text-01 and M1: layers of lightning attention among those of softmax, Mixtral's experts and router.

Names and shapes from transformers' `minimax`, as its releases for transformers have them. Decays of lightning attention
are worked out from the number of a layer; transformers saves them all the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families.base import Config, Template, Wrapper
from shardxform.model.families.mixtral import FAMILY as MIXTRAL

__all__ = ["FAMILY"]


def _is_linear(config: Config, layer: int) -> bool:
    kinds = config.get("layer_types")
    return bool((layer + 1) % 2 == 0 if kinds is None else kinds[layer] == "linear_attention")


_LINEAR: Final = (
    Template("self_attn.diagonal_decay", "1,Q,B,B", "linear attention", "linear"),
    Template("self_attn.key_decay", "Q,B,1", "linear attention", "linear"),
    Template("self_attn.norm.weight", "Q*D", "norms", "linear"),
    Template("self_attn.out_proj.weight", "H,Q*D", "linear attention", "linear"),
    Template("self_attn.output_gate.weight", "Q*D,H", "linear attention", "linear"),
    Template("self_attn.qkv_proj.weight", "3*Q*D,H", "linear attention", "linear"),
    Template("self_attn.query_decay", "Q,B,1", "linear attention", "linear"),
    Template("self_attn.slope_rate", "Q,1,1", "linear attention", "linear"),
)

FAMILY: Final = replace(
    MIXTRAL,
    name="minimax",
    wrappers=(Wrapper("MiniMaxForCausalLM", "minimax", None, "model."),),
    block=(
        *_LINEAR,
        *(replace(each, when="full") if each.name.startswith("self_attn.") else each for each in MIXTRAL.block),
    ),
    symbols={**MIXTRAL.symbols, "B": "block_size"},
    types={
        **MIXTRAL.types,
        **{
            f"{part}_{which}_factor": "int or float"
            for part in ("full_attn", "linear_attn", "mlp")
            for which in ("alpha", "beta")
        },
        "block_size": "int",
        "layer_types": "list of str or null",
    },
    conditions={
        **MIXTRAL.conditions,
        "full": lambda config, layer: not _is_linear(config, layer),
        "linear": _is_linear,
    },
)
