"""Values in config.json that transformers refuses, and clients that read it through transformers with it.

transformers 5 checks the type of every field that a model's config declares, the list of layer types, the scaling of
positions and the name of the dtype. The families hold the types as data, and a test compares both with transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

from shardxform.model.families.base import Family
from shardxform.model.layout import Layout, value_at

__all__ = ["config_faults"]

_TYPES: Final[Mapping[str, type | None]] = {
    "bool": bool,
    "float": float,
    "int": int,
    "list": list,
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
    if key is None:  # a multimodal config that nests no other is that of code beside the shards, not of transformers
        types = {} if layout.wrapper.vision else family.types
        yield from _of_decoder(layout.config, types, "", family)
        return
    yield from _of_part(layout.config, family.wrapper_types, "")
    decoder, vision = value_at(layout.config, key), layout.config.get("vision_config")
    if isinstance(decoder, Mapping):
        yield from _of_decoder(decoder, family.types, f"{key}.", family)
    if isinstance(vision, Mapping):
        yield from _of_part(vision, family.vision_types, "vision_config.")


def _of_decoder(config: Mapping[str, object], types: Mapping[str, str], home: str, family: Family) -> Iterator[str]:
    yield from _of_part(config, types, home)
    yield from _of_layers(config, home, family)
    yield from _of_positions(config, home)


def _of_part(config: Mapping[str, object], types: Mapping[str, str], home: str) -> Iterator[str]:
    for key, words in types.items():
        if key in config and not _is_any(config[key], words.split(" or ")):
            yield f"{home}{key}: expected {words}, found {_brief(config[key])}"
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    dtype = config.get(key)
    if isinstance(dtype, str) and dtype not in _DTYPES:
        yield f"{home}{key}: expected the name of a dtype such as bfloat16, found {_brief(dtype)}"


def _is_any(value: object, words: Collection[str]) -> bool:
    """Whether a value is of one of the kinds; what a list holds may be of several."""
    single = isinstance(value, list) and all(any(_is([each], word) for word in words) for each in value)
    return single or any(_is(value, word) for word in words)


def _of_layers(config: Mapping[str, object], home: str, family: Family) -> Iterator[str]:
    for key, known in {**_LAYER_TYPES, **family.layer_kinds}.items():
        listed, count = config.get(key), config.get("num_hidden_layers")
        if not isinstance(listed, list):
            continue
        other = next((kind for kind in listed if not isinstance(kind, str) or kind not in known), None)
        if other is not None:
            yield f"{home}{key}: {_brief(other)} is no kind of layer"
        elif type(count) is int and len(listed) not in (count, count + _padding(config, family)):
            yield f"{home}{key}: {len(listed)} of them, but {home}num_hidden_layers is {count}"


def _padding(config: Mapping[str, object], family: Family) -> int:
    more = config.get(family.mtp.count_key) if family.mtp and family.pads_lists else 0
    return more if type(more) is int else 0


def _of_positions(config: Mapping[str, object], home: str) -> Iterator[str]:
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
    if word == "float" and isinstance(value, Mapping):
        return value.keys() == {"__float__"}  # as transformers 5 writes infinity
    kind = _TYPES[word]
    return value is None if kind is None else type(value) is kind  # bool is an int to Python, not to transformers


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
