"""GLM-5 and its successors: DeepSeek-V3.2, but that some blocks have no indexer of their own.

Names and shapes from transformers' `glm_moe_dsa`. Blocks without an indexer take the selection of the block before,
which transformers' blocks hand on beside their hidden states. The MTP layer has an indexer, by releases and vLLM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families.base import Config, Wrapper, listed_as_sparse, size
from shardxform.model.families.deepseek_v32 import FAMILY as DEEPSEEK_V32

__all__ = ["FAMILY"]


def _is_moe(config: Config, layer: int) -> bool:
    return listed_as_sparse(config, layer, int(config.get("first_k_dense_replace", 3)))


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


assert DEEPSEEK_V32.mtp is not None

FAMILY: Final = replace(
    DEEPSEEK_V32,
    name="glm_moe_dsa",
    wrappers=(Wrapper("GlmMoeDsaForCausalLM", "glm_moe_dsa", None, "model."),),
    block=tuple(replace(each, when="indexer") if "indexer" in each.name else each for each in DEEPSEEK_V32.block),
    mtp=replace(DEEPSEEK_V32.mtp, like=_last_whole),
    types={**DEEPSEEK_V32.types, "indexer_types": "list of str or null"},
    conditions={
        **DEEPSEEK_V32.conditions,
        "dense": lambda config, layer: not _is_moe(config, layer),
        "indexer": _has_indexer,
        "moe": _is_moe,
    },
    shares_selection=True,
)
