"""How a card says that a checkpoint is loaded: which client reads which format, and with what. Text only.

What is said of vLLM and SGLang was read in their code; see docs/quantization.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Final

from shardxform.publish.card.facts import Facts
from shardxform.publish.card.markdown import fence, shell

__all__ = ["loading"]

_MAX_CONTEXT: Final = 32768  # of the examples: a longer one is a matter of the reader's memory
_ASSERTS_MTP: Final = "qwen3_5_moe"  # the family whose converter in llama.cpp takes MTP layers for granted
_NEEDS: Final = {"auto-round": "auto-round", "gptq": "auto-round", "compressed-tensors": "compressed-tensors"}


def loading(facts: Facts) -> Iterator[str]:
    """Paragraphs and blocks of code, one client after the other."""
    old_names = facts.quantization is not None and facts.quantization.expert_names == "fused-indexed"
    if old_names:
        yield (
            "The experts are named as auto-round did before 0.12. Current versions of transformers, vLLM and SGLang do"
            " not load them; `shardxform convert --expert-names split` writes names that they do."
        )
        return
    if facts.bfloat16_only:
        yield "Load it in bfloat16: float16 overflows in the gated delta-net layers of this family, and gives NaN."
    yield from _transformers(facts)
    yield from _served(facts)
    if others := [*_llama_cpp(facts), *_mlx(facts)]:
        yield "### llama.cpp and MLX"
        yield "\n".join(f"- {line}" for line in others)


def _transformers(facts: Facts) -> Iterator[str]:
    yield "### transformers"
    needs = _NEEDS[facts.quantization.format] if facts.quantization else ""
    if needs:
        yield f"Needs `pip install {needs}`."
    yield fence("\n".join(_python(facts)), "python")


def _python(facts: Facts) -> Iterator[str]:
    model = "AutoModelForImageTextToText" if facts.vision else "AutoModelForCausalLM"
    inputs = "AutoProcessor" if facts.vision else "AutoTokenizer"
    gptq = facts.quantization is not None and facts.quantization.format == "gptq"
    backend = ', quantization_config=AutoRoundConfig(backend="torch")' if gptq else ""
    names = sorted([model, inputs, *(["AutoRoundConfig"] if gptq else [])])
    yield "import torch"
    yield f"from transformers import {', '.join(names)}"
    yield ""
    yield f"path = {json.dumps(facts.name)}  # this directory, or its name on the hub"
    yield f"{'processor' if facts.vision else 'tokenizer'} = {inputs}.from_pretrained(path)"
    yield f"model = {model}.from_pretrained(path, dtype=torch.{facts.dtype}{backend})"


def _llama_cpp(facts: Facts) -> Iterator[str]:
    """What the converter has to be told, of formats that it reads."""
    made = facts.quantization
    read = made is None or made.format == "compressed-tensors" or (made.format == "gptq" and made.g_idx)
    if read and facts.family == _ASSERTS_MTP and not facts.has_mtp:
        yield "llama.cpp: `convert_hf_to_gguf.py` needs `--no-mtp`; without MTP layers it stops at an assertion."


def _mlx(facts: Facts) -> Iterator[str]:
    """What mlx-lm has to be told, or must not be given; no spelling of config.json suits it and the others."""
    made = facts.quantization
    if made is None and facts.model_type == "qwen3_5_moe_text":
        told = json.dumps({"model_type": "qwen3_5_moe"})
        yield (
            f"mlx-lm does not know model_type `{facts.model_type}`: load it with `mlx_lm.load(path,"
            f" model_config={told})`, or write that model_type into the config.json of a copy for mlx-lm alone."
        )
    if made and (facts.family, made.format, made.bits) == ("deepseek_v3", "compressed-tensors", 8):
        yield (
            "mlx-lm loads this and computes garbage, since it takes all packed weights for 4 bits: give it what"
            " `shardxform convert --to bf16` makes of this."
        )


def _served(facts: Facts) -> Iterator[str]:
    """Servers that read the format, as far as their code says."""
    context = str(min(facts.max_positions or _MAX_CONTEXT, _MAX_CONTEXT))
    yield "### vLLM"
    yield fence(shell(("vllm", "serve", facts.name, "--dtype", facts.dtype, "--max-model-len", context)), "sh")
    if facts.quantization is None or facts.quantization.format == "auto-round":
        yield "### SGLang"
        launch = ("python", "-m", "sglang.launch_server", "--model-path", facts.name)
        yield fence(shell((*launch, "--dtype", facts.dtype, "--context-length", context)), "sh")
    yield "That these servers read this format was found in their code (vLLM 0.32, SGLang 0.5.23), not by running them."
