"""DeepSeek-V4: four residual streams, compressed attention, first layers that choose experts by token id, W names.

Names and shapes from the release of DeepSeek-V4-Flash and transformers' `deepseek_v4`: checkpoints in the names of
releases, which have no `model.`; those that transformers saves anew have others. `ffn.gate.tid2eid` holds experts' ids,
see `formats.remaking`. The MTP layer attends to its window alone, and has no hash table.
"""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import (
    TYPES,
    Config,
    Decoder,
    ExpertLayout,
    Family,
    Mtp,
    Template,
    Wrapper,
    conditions,
    experts,
    size,
)
from shardxform.model.families.key_types import INDEXER, STREAMS

__all__ = ["FAMILY"]

_EXPERTS: Final = ExpertLayout(home="ffn.experts", stacks=(), projections=("w1", "w3", "w2"))
_RATIOS: Final = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def _attention(config: Config, layer: int) -> str:
    """Kind of attention of a block; of an MTP layer, as of all that is said of none, that to a window."""
    kinds, ratios = config.get("layer_types"), config.get("compress_ratios")
    if layer < 0:
        return _RATIOS[0]
    if kinds is None and ratios is not None:
        return _RATIOS[ratios[layer]]
    if kinds is None:
        return _RATIOS[4 if layer > 1 and layer % 2 else 128]
    return str(kinds[layer])


def _is_hash(config: Config, layer: int) -> bool:
    kinds = config.get("mlp_layer_types")
    if kinds is not None:
        return layer >= 0 and kinds[layer] == "hash_moe"
    return 0 <= layer < int(config.get("num_hash_layers", 3))


def _rate(kind: str, default: int, config: Config) -> int:
    return size(config.get("compress_rates") or {kind: default}, kind)


def _compressor(home: str, width: str, rate: str, when: str, columns: str = "") -> tuple[Template, ...]:
    return (
        Template(f"{home}.ape", f"{rate},{columns or width}", "attention", when),
        Template(f"{home}.norm.weight", width, "norms", when),
        Template(f"{home}.wgate.weight", f"{columns or width},H", "attention", when),
        Template(f"{home}.wkv.weight", f"{columns or width},H", "attention", when),
    )


def _streams(name: str, count: str, scales: str) -> tuple[Template, ...]:
    return (
        Template(f"hc_{name}_base", count, "norms"),
        Template(f"hc_{name}_fn", f"{count},S*H", "norms"),
        Template(f"hc_{name}_scale", scales, "norms"),
    )


FAMILY: Final = Family(
    name="deepseek_v4",
    wrappers=(Wrapper("DeepseekV4ForCausalLM", "deepseek_v4", None, "", head="head"),),
    count_keys=("n_routed_experts", "num_local_experts"),
    decoder=Decoder(embeddings="embed"),
    root=(
        Template("embed.weight", "V,H", "embeddings"),
        Template("norm.weight", "H", "norms"),
        *_streams("head", "S", "1"),
        Template("head.weight", "V,H", "lm head", "untied"),
        Template("head.weight", "V,H", "lm head", "tied", optional=True),
    ),
    block=(
        Template("attn_norm.weight", "H", "norms"),
        Template("ffn_norm.weight", "H", "norms"),
        *_streams("attn", "SS", "3"),
        *_streams("ffn", "SS", "3"),
        Template("attn.attn_sink", "Q", "attention"),
        Template("attn.q_norm.weight", "QA", "norms"),
        Template("attn.kv_norm.weight", "D", "norms"),
        Template("attn.wq_a.weight", "QA,H", "attention"),
        Template("attn.wq_b.weight", "Q*D,QA", "attention"),
        Template("attn.wkv.weight", "D,H", "attention"),
        Template("attn.wo_a.weight", "G*OA,GI", "attention"),
        Template("attn.wo_b.weight", "H,G*OA", "attention"),
        *_compressor("attn.compressor", "D", "HR", "heavily compressed"),
        *_compressor("attn.compressor", "D", "CR", "sparsely compressed", "2*D"),
        *_compressor("attn.indexer.compressor", "ID", "CR", "sparsely compressed", "2*ID"),
        Template("attn.indexer.wq_b.weight", "IQ*ID,QA", "attention", "sparsely compressed"),
        Template("attn.indexer.weights_proj.weight", "IQ,H", "attention", "sparsely compressed"),
        Template("ffn.gate.weight", "E,H", "router"),
        Template("ffn.gate.bias", "E", "router", "scored"),
        Template("ffn.gate.tid2eid", "V,K", "router", "hashed", ids=True),
        *experts(layout=_EXPERTS),
        # One of that width, whatever n_shared_experts says: transformers makes no other.
        Template("ffn.shared_experts.w1.weight", "I,H", "shared experts"),
        Template("ffn.shared_experts.w3.weight", "I,H", "shared experts"),
        Template("ffn.shared_experts.w2.weight", "H,I", "shared experts"),
    ),
    experts=_EXPERTS,
    renames=(
        ("attn.indexer.compressor.wgate", "self_attn.compressor.indexer.gate_proj"),
        ("attn.indexer.compressor.wkv", "self_attn.compressor.indexer.kv_proj"),
        ("attn.indexer.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
        ("attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
        ("attn.compressor.wgate", "self_attn.compressor.gate_proj"),
        ("attn.compressor.wkv", "self_attn.compressor.kv_proj"),
        ("attn.wq_a", "self_attn.q_a_proj"),
        ("attn.wq_b", "self_attn.q_b_proj"),
        ("attn.wkv", "self_attn.kv_proj"),
        ("attn.wo_a", "self_attn.o_a_proj"),
        ("attn.wo_b", "self_attn.o_b_proj"),
        ("ffn.shared_experts.w1", "mlp.shared_experts.gate_proj"),
        ("ffn.shared_experts.w3", "mlp.shared_experts.up_proj"),
        ("ffn.shared_experts.w2", "mlp.shared_experts.down_proj"),
        ("ffn.", "mlp."),
    ),
    mtp=Mtp(
        count_key="num_nextn_predict_layers",
        prefix="mtp.{l}.",
        follows_blocks=False,
        like=lambda _config: -1,  # scored, and attending to a window, whatever the blocks are
        inputs=("mtp.{l}.enorm.weight", "mtp.{l}.hnorm.weight", "mtp.{l}.e_proj.weight", "mtp.{l}.norm.weight"),
        layer=(
            Template("enorm.weight", "H", "mtp"),
            Template("hnorm.weight", "H", "mtp"),
            Template("e_proj.weight", "H,H", "mtp"),
            Template("h_proj.weight", "H,H", "mtp"),
            Template("norm.weight", "H", "mtp"),
            *_streams("head", "S", "1"),
            Template("emb.tok_emb.weight", "V,H", "mtp", optional=True),
            Template("head.weight", "V,H", "mtp", optional=True),
        ),
    ),
    symbols={
        "CR": lambda config: _rate("compressed_sparse_attention", 4, config),
        "D": "head_dim",
        "G": "o_groups",
        "GI": lambda config: size(config, "num_attention_heads") * size(config, "head_dim") // size(config, "o_groups"),
        "H": "hidden_size",
        "HR": lambda config: _rate("heavily_compressed_attention", 128, config),
        "I": "moe_intermediate_size",
        "ID": "index_head_dim",
        "IQ": "index_n_heads",
        "K": "num_experts_per_tok",
        "OA": "o_lora_rank",
        "Q": "num_attention_heads",
        "QA": "q_lora_rank",
        "S": "hc_mult",
        "SS": lambda config: size(config, "hc_mult") * (2 + size(config, "hc_mult")),
        "V": "vocab_size",
    },
    types={
        **TYPES,
        **STREAMS,
        **INDEXER,
        "attention_dropout": "float",
        "compress_rates": "object or null",
        "compress_rope_theta": "float or int",
        "head_dim": "int",
        "layer_types": "list of str or null",
        "mlp_bias": "bool",
        "mlp_layer_types": "list of str or null",
        "n_routed_experts": "int",
        "n_shared_experts": "int",
        "norm_topk_prob": "bool",
        "num_nextn_predict_layers": "int",
        "o_groups": "int",
        "o_lora_rank": "int",
        "partial_rotary_factor": "float or null",
        "q_lora_rank": "int",
        "rope_theta": "float or int",
        "routed_scaling_factor": "float",
        "router_aux_loss_coef": "float",
        "router_jitter_noise": "float",
        "scoring_func": "str",
        "sliding_window": "int",
    },
    layer_kinds={"mlp_layer_types": frozenset({"hash_moe", "moe"})},
    conditions={
        **conditions(hashed=_is_hash, scored=lambda config, layer: not _is_hash(config, layer)),
        "heavily compressed": lambda config, layer: _attention(config, layer) == _RATIOS[128],
        "sparsely compressed": lambda config, layer: _attention(config, layer) == _RATIOS[4],
    },
    keep_16bit=("ffn.gate", "attn.indexer.weights_proj", "attn.compressor.*", "attn.indexer.compressor.*"),
    formats=("compressed-tensors",),
    not_run="its blocks hand on four residual streams [B, T, 4, H], and the first ones want token ids",
)
