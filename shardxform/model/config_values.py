"""Values in config.json that transformers refuses, and clients that read it through transformers with it.

transformers 5 checks the type of every field that a model's config declares, the list of layer types, the scaling of
positions and the name of the dtype. The families hold the types as data, and a test compares both with transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from shardxform.model.layout import Layout

__all__ = ["config_faults"]

_TYPES: Final[Mapping[str, type | None]] = {
    "bool": bool,
    "float": float,
    "int": int,
    "null": None,
    "object": dict,
    "str": str,
}
_DTYPES: Final = frozenset(
    {
        *("bfloat16", "double", "float", "float16", "float32", "float64", "half"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    }
)
_LAYER_TYPES: Final = {
    "layer_types": frozenset(
        {
            *("full_attention", "sliding_attention", "chunked_attention", "window_attention", "indexed_attention"),
            *("compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse", "conv", "moe"),
            *("hybrid", "hybrid_sliding", "reference_sliding_attention", "linear_attention"),
            *("attention", "deepseek_sparse_attention", "mamba", "qwen_sparse_attention"),  # of earlier versions
        }
    ),
    "mlp_layer_types": frozenset({"dense", "sparse"}),
}
_SCALINGS: Final = {  # what each way of scaling positions cannot do without
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "yarn": ("factor",),
}


def config_faults(layout: Layout) -> Iterator[str]:
    """Yield what clients refuse in a config, one sentence each that begins with the key."""
    family, key = layout.family, layout.wrapper.text_key
    if key is None:
        yield from _of_decoder(layout.config, family.types, "")
        return
    yield from _of_part(layout.config, family.wrapper_types, "")
    parts = ((key, family.types, _of_decoder), ("vision_config", family.vision_types, _of_part))
    for name, types, look in parts:
        part = layout.config.get(name)
        if isinstance(part, Mapping):
            yield from look(part, types, f"{name}.")


def _of_decoder(config: Mapping[str, Any], types: Mapping[str, str], home: str) -> Iterator[str]:
    yield from _of_part(config, types, home)
    yield from _of_layers(config, home)
    yield from _of_positions(config, home)


def _of_part(config: Mapping[str, Any], types: Mapping[str, str], home: str) -> Iterator[str]:
    for key, words in types.items():
        if key in config and not any(_is(config[key], word) for word in words.split(" or ")):
            yield f"{home}{key}: expected {words}, found {_brief(config[key])}"
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(key)
    if isinstance(dtype, str) and dtype not in _DTYPES:
        yield f"{home}{key}: expected the name of a dtype such as bfloat16, found {_brief(dtype)}"


def _of_layers(config: Mapping[str, Any], home: str) -> Iterator[str]:
    for key, known in _LAYER_TYPES.items():
        listed, count = config.get(key), config.get("num_hidden_layers")
        if not isinstance(listed, list):
            continue
        other = next((kind for kind in listed if not isinstance(kind, str) or kind not in known), None)
        if other is not None:
            yield f"{home}{key}: {_brief(other)} is no kind of layer"
        elif type(count) is int and len(listed) != count:
            yield f"{home}{key}: {len(listed)} of them, but {home}num_hidden_layers is {count}"


def _of_positions(config: Mapping[str, Any], home: str) -> Iterator[str]:
    """Look at how positions are scaled, under the newer key and the older one."""
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if not isinstance(value, Mapping):
            if value and key == "rope_scaling":
                yield f"{home}{key}: expected object or null, found {_brief(value)}"
            continue
        kind = value.get("rope_type", value.get("type"))
        for part in _SCALINGS.get(kind, ()) if isinstance(kind, str) else ():
            if part not in value:
                yield f"{home}{key}: scaling {kind!r} needs {part!r}, which is missing"


def _is(value: object, word: str) -> bool:
    if word.startswith("list of "):
        return isinstance(value, list) and all(_is(item, word.removeprefix("list of ")) for item in value)
    kind = _TYPES[word]
    return value is None if kind is None else type(value) is kind  # bool is an int to Python, not to transformers


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
