"""Groups of templates that many families share. Shapes as in `base.Template`."""

from __future__ import annotations

from typing import Final

from shardxform.model.families.base import Config, ExpertLayout, Role, Template

__all__ = ["EMBEDDINGS", "GROUPED_ATTENTION", "NORMS", "TYPES", "experts", "mlp", "size", "tied", "untied"]


def mlp(prefix: str, width: str, role: Role, when: str = "") -> tuple[Template, ...]:
    """Gate, up and down projection of a gated MLP under `prefix`; `width` is its intermediate size."""
    return (
        Template(f"{prefix}.gate_proj.weight", f"{width},H", role, when),
        Template(f"{prefix}.up_proj.weight", f"{width},H", role, when),
        Template(f"{prefix}.down_proj.weight", f"H,{width}", role, when),
    )


def experts(when: str = "", layout: ExpertLayout | None = None) -> tuple[Template, ...]:
    """Routed experts as `layout` has them: stacked under its home, `[E, 2I, H]` and `[E, H, I]`, and one by one."""
    layout = layout or ExpertLayout()
    role: Role = "routed experts"
    shapes = ("E,H,2*I", "E,I,H") if layout.transposed else ("E,2*I,H", "E,H,I")
    out = [
        Template(f"{layout.home}.{stack}", shape, role, when, "fused")
        for stack, shape in zip(layout.stacks, shapes, strict=False)
    ]
    if layout.bias:
        biases = zip(layout.stacks, ("E,2*I", "E,H"), strict=False)
        out += [Template(f"{layout.home}.{stack}_bias", shape, role, when, "fused") for stack, shape in biases]
    for projection, rows, columns in zip(layout.projections, "IIH", "HHI", strict=True):
        name = f"{layout.home}.{{e}}.{projection}"
        out.append(Template(f"{name}.weight", f"{rows},{columns}", role, when, "per-expert"))
        if layout.bias:
            out.append(Template(f"{name}.bias", rows, role, when, "per-expert"))
    return tuple(out)


def size(config: Config, key: str) -> int:
    """Read a size that a symbol is computed from.

    Raises:
        ValueError: it is no plain integer.

    """
    value = config[key]
    if type(value) is not int:  # bool is an int, and 8.7 would be cut to 8
        raise ValueError(f"{key}: expected a size, found {value!r}")
    return value


def untied(config: Config, _layer: int) -> bool:
    """The output head is a tensor of its own."""
    return not config.get("tie_word_embeddings", False)


def tied(config: Config, layer: int) -> bool:
    """The output head is the embeddings."""
    return not untied(config, layer)


TYPES: Final = {
    "attention_bias": "bool",
    "attention_dropout": "float or int",
    "bos_token_id": "int or null",
    "eos_token_id": "int or list of int or null",
    "hidden_act": "str",
    "hidden_size": "int",
    "initializer_range": "float",
    "max_position_embeddings": "int",
    "moe_intermediate_size": "int",
    "num_attention_heads": "int",
    "num_experts_per_tok": "int",
    "num_hidden_layers": "int",
    "num_key_value_heads": "int",
    "output_router_logits": "bool",
    "pad_token_id": "int or null",
    "rms_norm_eps": "float",
    "rope_parameters": "object or null",
    "tie_word_embeddings": "bool",
    "use_cache": "bool",
    "vocab_size": "int",
}
"""Values that transformers takes in every family here; a test compares."""


EMBEDDINGS: Final = (
    Template("{decoder}embed_tokens.weight", "V,H", "embeddings"),
    Template("{decoder}norm.weight", "H", "norms"),
    Template("lm_head.weight", "V,H", "lm head", "untied"),
    Template("lm_head.weight", "V,H", "lm head", "tied", optional=True),  # stored all the same: harmless, and common
)

NORMS: Final = (
    Template("input_layernorm.weight", "H", "norms"),
    Template("post_attention_layernorm.weight", "H", "norms"),
)

GROUPED_ATTENTION: Final = (
    Template("self_attn.k_proj.weight", "KV*D,H", "attention", "attention"),
    Template("self_attn.v_proj.weight", "KV*D,H", "attention", "attention"),
    Template("self_attn.o_proj.weight", "H,Q*D", "attention", "attention"),
    Template("self_attn.q_norm.weight", "D", "norms", "attention"),
    Template("self_attn.k_norm.weight", "D", "norms", "attention"),
    Template("self_attn.q_proj.bias", "?", "attention", "attention bias"),
    Template("self_attn.k_proj.bias", "KV*D", "attention", "attention bias"),
    Template("self_attn.v_proj.bias", "KV*D", "attention", "attention bias"),
    Template("self_attn.o_proj.bias", "H", "attention", "attention bias"),
)
