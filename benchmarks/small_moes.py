"""Train small MoEs of other shapes than examples/small-moe, for defaults that must not be of one model alone.

    python benchmarks/small_moes.py NAME [NAME ...] --out DIR [--steps 500] [--rate 3e-3]

Each is trained from scratch on the texts of `train_small_moe.py` (the standard library of this Python, the King James
Bible), with the tokenizer and without the documents of examples/small-moe, so that its text/calib.jsonl and
text/heldout.jsonl serve here too. DIR/NAME is a checkpoint in the layout of the family's releases, in bfloat16.

    wide      qwen3_moe: 32 experts, top-4, width 192 by 160: more experts, each of more weights
    few       mixtral: 8 experts, top-2, width 96 by 224: few experts, large ones, nothing shared
    shared    deepseek_v3: 24 experts, top-3, width 128 by 64, a shared expert, latent attention, a dense first layer
    many      qwen3_moe: 64 experts, top-4, width 128 by 64: a token reaches few of them, as in large models
    square    qwen3_moe: 12 experts, top-2, width 256 by 256: rows that fill blocks of 256, as GGUF's kinds of K have
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from train_small_moe import SEED, SMALL_MOE, experts_forward, sources_of, train
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

COMMON: Final[dict[str, Any]] = {
    "vocab_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MODELS: Final[dict[str, dict[str, Any]]] = {
    "wide": {
        "model_type": "qwen3_moe",
        "hidden_size": 192,
        "head_dim": 48,
        "num_key_value_heads": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 160,
        "intermediate_size": 384,
        "norm_topk_prob": True,
    },
    "many": {
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "head_dim": 32,
        "num_key_value_heads": 2,
        "num_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "intermediate_size": 256,
        "norm_topk_prob": True,
    },
    "square": {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "head_dim": 64,
        "num_key_value_heads": 2,
        "num_experts": 12,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "intermediate_size": 512,
        "norm_topk_prob": True,
    },
    "few": {
        "model_type": "mixtral",
        "hidden_size": 96,
        "head_dim": 32,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 224,
        "sliding_window": None,
    },
    "shared": {
        "model_type": "deepseek_v3",
        "hidden_size": 128,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 24,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "moe_intermediate_size": 64,
        "intermediate_size": 384,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
}


def make(name: str, sources: list[torch.Tensor], out: Path, steps: int, rate: float) -> None:
    """Train one and write it."""
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(**COMMON, **MODELS[name])
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=torch.float32)
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {count:,} weights", flush=True)
    train(model.train(), sources, steps, rate)
    model.to(torch.bfloat16).save_pretrained(out / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MOE / file, out / name / file)


def main() -> None:
    """Read the texts; train and write what is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=3e-3)
    given = parser.parse_args()
    for experts in (
        modeling_qwen3_moe.Qwen3MoeExperts,
        modeling_mixtral.MixtralExperts,
        modeling_deepseek_v3.DeepseekV3Experts,
    ):
        setattr(experts, "forward", experts_forward)  # noqa: B010
    sources = sources_of(SMALL_MOE)
    for name in given.names:
        make(name, sources, given.out, given.steps, given.rate)


if __name__ == "__main__":
    main()
