"""Granite 4: Mamba-2 layers and some of attention, experts and a shared expert in each; see `granitemoe`.

Names and shapes from releases of Granite 4 and transformers' `granitemoehybrid`. Those without experts, such as
Granite-4.0-H-1B, have `num_local_experts` 0, and nothing to prune.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from shardxform.model.families import granitemoe
from shardxform.model.families.base import EMBEDDINGS, NORMS, Config, Template, Wrapper, size
from shardxform.model.families.granitemoe import SHARED_MLP, attention

__all__ = ["FAMILY"]

_OF_MOE: Final = tuple(each for each in granitemoe.FAMILY.block if each.name.startswith("block_sparse_moe."))
_MAMBA: Final = tuple(
    Template(f"mamba.{name}", shape, "linear attention", when)
    for name, shape, when in (
        ("A_log", "MH", "mamba"),
        ("D", "MH", "mamba"),
        ("conv1d.bias", "X+2*MG*MS", "mamba conv bias"),
        ("conv1d.weight", "X+2*MG*MS,1,MC", "mamba"),
        ("dt_bias", "MH", "mamba"),
        ("in_proj.bias", "2*X+2*MG*MS+MH", "mamba bias"),
        ("in_proj.weight", "2*X+2*MG*MS+MH,H", "mamba"),
        ("norm.weight", "X", "mamba"),
        ("out_proj.bias", "H", "mamba bias"),
        ("out_proj.weight", "H,X", "mamba"),
    )
)


def _is_mamba(config: Config, layer: int) -> bool:
    kinds = config.get("layer_types") or config.get("layers_block_type")
    return kinds is None or (layer >= 0 and kinds[layer] in ("linear_attention", "mamba"))


FAMILY: Final = replace(
    granitemoe.FAMILY,
    name="granitemoehybrid",
    wrappers=(Wrapper("GraniteMoeHybridForCausalLM", "granitemoehybrid", None, "model."),),
    root=EMBEDDINGS,
    block=(*NORMS, *attention("attention"), *_MAMBA, *_OF_MOE, *SHARED_MLP),
    symbols={
        **granitemoe.FAMILY.symbols,
        "MC": "mamba_d_conv",
        "MG": "mamba_n_groups",
        "MH": "mamba_n_heads",
        "MS": "mamba_d_state",
        "S": "shared_intermediate_size",
        "X": lambda config: size(config, "mamba_expand") * size(config, "hidden_size"),
    },
    types={
        **granitemoe.FAMILY.types,
        "layer_types": "list of str or null",
        **dict.fromkeys(("mamba_chunk_size", "mamba_d_conv", "mamba_d_state"), "int or null"),
        **dict.fromkeys(("mamba_conv_bias", "mamba_proj_bias"), "bool or null"),
        "mamba_d_head": "int or str or null",
        **dict.fromkeys(("mamba_expand", "mamba_n_groups", "mamba_n_heads"), "int or null"),
        "position_embedding_type": "str or null",
        "shared_intermediate_size": "int",
        "time_step_limit": "list of float or null",
    },
    conditions={
        **{name: granitemoe.FAMILY.conditions[name] for name in ("tied", "untied")},
        "attention": lambda config, layer: not _is_mamba(config, layer),
        "attention bias": lambda config, layer: not _is_mamba(config, layer) and bool(config.get("attention_bias")),
        "mamba": _is_mamba,
        "mamba bias": lambda config, layer: _is_mamba(config, layer) and bool(config.get("mamba_proj_bias")),
        "mamba conv bias": lambda config, layer: _is_mamba(config, layer) and bool(config.get("mamba_conv_bias", True)),
        "shared": lambda _config, _layer: True,
    },
)
