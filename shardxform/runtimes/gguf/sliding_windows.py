"""Families of llama.cpp some of whose blocks attend to a window of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.architecture import Architecture, Kind, Named, Part
from shardxform.runtimes.gguf.common_keys import SILU, UNBIASED, add_common, needed, refuse_values
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.rotation import rope_of

__all__ = ["SLIDING"]


# -- gpt-oss -----------------------------------------------------------------------------------------------------------


def _gpt_oss_keys(architecture: Architecture, recorder: Recorder) -> None:
    add_common(architecture, recorder)
    recorder.writer.add_sliding_window(architecture.size("sliding_window"))
    recorder.writer.add_expert_feed_forward_length(architecture.size("intermediate_size"))


def _gpt_oss_check(architecture: Architecture) -> None:
    """Every second layer attends to a window, the first of them is one, and the activation has its own limits."""
    wanted = {**SILU, "swiglu_limit": (7.0, 7), "swiglu_alpha": (1.702,), "attention_bias": (True,)}
    refuse_values(architecture, {**wanted, "tie_word_embeddings": (False, None)})
    if rope_of(architecture.config).get("rope_type") is None:
        raise SchemeError("config.json: rope_scaling is missing, for which transformers has numbers of its own")
    for layer, kind in enumerate(architecture.config.get("layer_types") or ()):
        if (kind == "sliding_attention") != (layer % 2 == 0):
            raise SchemeError(
                f"config.json: layer_types[{layer}] is {kind}, but llama.cpp lets every second layer, from the"
                " first on, attend to a window"
            )


_GPT_OSS: Final = Kind(
    name="gpt-oss",
    maps=("GPT_OSS",),
    spelled={"self_attn.sinks": "self_attn.sinks.weight"},
    keys=_gpt_oss_keys,
    check=_gpt_oss_check,
)


# -- Gemma 4 -----------------------------------------------------------------------------------------------------------


def _of_full(architecture: Architecture, symbol: str) -> int:
    """A size of layers with full attention, as the family works it out."""
    found = architecture.layout.family.symbols[symbol]
    assert callable(found)
    return found(architecture.config)


def _sliding(architecture: Architecture) -> list[bool]:
    """Which layers attend to a window."""
    holds = architecture.layout.family.holds
    return [holds("sliding", architecture.config, layer) for layer in range(architecture.layout.num_layers)]


def _gemma4_keys(architecture: Architecture, recorder: Recorder) -> None:
    size, writer, config = architecture.size, recorder.writer, architecture.config
    add_common(architecture, recorder, head_dim=None, num_key_value_heads=None)
    writer.add_final_logit_softcapping(config.get("final_logit_softcapping") or 0.0)  # without the key it caps at 30
    writer.add_sliding_window(size("sliding_window"))
    sliding, own, full = _sliding(architecture), size("num_key_value_heads"), _of_full(architecture, "FK")
    writer.add_head_count_kv([own if each else full for each in sliding] if full != own else own)
    writer.add_shared_kv_layers(config.get("num_kv_shared_layers") or 0)
    writer.add_embedding_length_per_layer_input(config.get("hidden_size_per_layer_input") or 0)
    writer.add_sliding_window_pattern(sliding)
    width = _of_full(architecture, "FD")
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_key_length_swa(size("head_dim"))
    writer.add_value_length_swa(size("head_dim"))
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_rope_dimension_count(width)
    writer.add_rope_dimension_count_swa(size("head_dim"))


def _gemma4_check(architecture: Architecture) -> None:
    wanted = {
        **UNBIASED,
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (None, "vision"),
    }
    refuse_values(architecture, wanted)
    rope = rope_of(architecture.config)
    kinds = [rope.get(f"{each}_attention", {}).get("rope_type") for each in ("full", "sliding")]
    if kinds != ["proportional", "default"]:
        raise SchemeError(
            f"config.json: rope_type of full and of sliding attention are {kinds}; expected proportional, default"
        )


def _gemma4_made(architecture: Architecture) -> Iterator[Named]:
    """Factors of the frequencies of full attention: those beyond the part that is rotated are divided away."""
    rope = rope_of(architecture.config)["full_attention"]
    half = _of_full(architecture, "FD") // 2
    rotated = int(2 * half * needed(rope, "partial_rotary_factor") / 2)
    yield Named("rope_freqs.weight", (half,), (), wide=True, values=(1.0,) * rotated + (1e30,) * (half - rotated))


def _gemma4_parts(_: Architecture, name: str) -> tuple[Part, ...]:
    block, _dot, inner = name.partition(".router.")
    scales = {"scale": "ffn_gate_inp.scale", "per_expert_scale": "ffn_down_exps.scale"}
    return (Part(f"{block.replace('model.layers.', 'blk.')}.{scales[inner]}" if inner in scales else name),)


_GEMMA4: Final = Kind(
    name="gemma4",
    maps=("GEMMA4",),
    spelled={"layer_scalar": "layer_scalar.weight"},
    experts=(("model.layers.{l}.experts.down_proj", (2,)), ("model.layers.{l}.experts.gate_up_proj", (0, 1))),
    parts=_gemma4_parts,
    made=_gemma4_made,
    keys=_gemma4_keys,
    check=_gemma4_check,
    tokenizer="gemma4",
)


SLIDING: Final[Mapping[str, Kind]] = {"gemma4": _GEMMA4, "gpt_oss": _GPT_OSS}
"""What each family becomes, by its name."""
