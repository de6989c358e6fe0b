"""Values in config.json that clients refuse: the data of the families, held against transformers' own classes."""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from collections.abc import Collection
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from any_moe import TEXTS
from build import tiny, write_checkpoint
from transformers import CONFIG_MAPPING
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES, ALLOWED_MLP_LAYER_TYPES, PreTrainedConfig

from shardxform.calibration.tokens import load_tokenizer
from shardxform.errors import CheckpointError, FamilyError
from shardxform.model.families import all_families
from shardxform.model.layout import layout_of
from shardxform.verification import config_values, verify
from shardxform.verification.config_values import config_faults

COMMON = {field.name for field in dataclasses.fields(PreTrainedConfig)}
WORDS = {int: "int", float: "float", bool: "bool", str: "str", dict: "object", list: "list", type(None): "null"}


def fields_of(kind: Any, known: Collection[str]) -> dict[str, set[str]]:
    """What a config class of transformers takes, by the names of checkpoints that are known."""
    renamed = {name: other for name, other in kind.attribute_map.items() if name not in known}
    found = {field.name: field.type for field in dataclasses.fields(kind) if field.name not in COMMON}
    return {renamed.get(name, name): set(words(hint)) for name, hint in found.items()}


def words(hint: Any) -> list[str]:
    """A type in the words of the families."""
    if hint in WORDS:
        return [WORDS[hint]]
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return [f"list of {word}" for word in words(inside[0])]
    if origin is dict:
        return ["object"]
    if origin is typing.Literal:
        return sorted({WORDS[type(each)] for each in inside})
    if origin is tuple or (isinstance(hint, type) and issubclass(hint, PreTrainedConfig)):
        return []
    return [word for each in inside for word in words(each)] if inside else ["object"]


NEWER = {"bailing_hybrid": ("q_lora_rank",)}
"""Keys that came with a newer transformers than some that are run here: 5.24."""


@pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
def test_types_are_those_of_transformers(family: Any) -> None:
    texts = [each for each in family.wrappers if each.text_key is None and not each.vision]
    pairs = [(CONFIG_MAPPING[text.model_type], family.types) for text in texts[:1]]
    for wrapper in family.wrappers:
        if wrapper.model_type not in CONFIG_MAPPING:  # of remote code
            continue
        whole = CONFIG_MAPPING[wrapper.model_type]
        pairs.append((whole, family.wrapper_types if wrapper.text_key else family.types))
        if wrapper.text_key:
            default = type(attrgetter(wrapper.text_key)(whole()))
            text = CONFIG_MAPPING[TEXTS[wrapper.model_type]] if wrapper.model_type in TEXTS else default
            pairs.append((text, family.types))
            if hasattr(whole(), "vision_config"):
                vision = whole().vision_config
                kind = type(vision) if vision else CONFIG_MAPPING[f"{wrapper.model_type}_vision"]
                pairs.append((kind, family.vision_types))
    for kind, types in pairs:
        newer = {key for key in NEWER.get(family.name, ()) if not hasattr(kind, key)}
        wanted = {key: set(value.split(" or ")) for key, value in types.items() if key not in newer}
        assert wanted == fields_of(kind, types)


def test_names_of_layers_and_dtypes_are_those_of_transformers_and_torch() -> None:
    known = config_values._LAYER_TYPES
    assert known["layer_types"] >= set(ALLOWED_ATTN_LAYER_TYPES)
    assert known["mlp_layer_types"] == set(ALLOWED_MLP_LAYER_TYPES)
    assert all(getattr(torch, name).is_floating_point for name in config_values._DTYPES)


VALUES: list[tuple[str, Any]] = [
    *(("rms_norm_eps", value) for value in (1, "1e-6", None, 1e-5)),
    *(("use_cache", value) for value in (1, "true", False)),
    *(("hidden_act", value) for value in (3, "gelu")),
    *(("attention_dropout", value) for value in (0, "0", True)),
    *(("max_position_embeddings", value) for value in ("64", 64.0, True, 128)),
    *(("eos_token_id", value) for value in ("0", [0, 1], [0, "1"], None)),
    *(("tie_word_embeddings", value) for value in ("false", None, 0)),
    *(("dtype", value) for value in ("bf16", "torch.bfloat16", "auto", "", "float32", None, "half")),
    *(("torch_dtype", value) for value in ("torch.float16", "bfloat16")),
    *(("rope_scaling", value) for value in ({"type": "linear"}, {"type": "linear", "factor": 2.0}, "yarn", None)),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    ("rope_scaling", {"rope_type": "longrope", "factor": 4.0}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 4.0}),
    *(("initializer_range", value) for value in ("0.02", 0.5)),
    *(("moe_intermediate_size", value) for value in ("12", 12.0)),
    *(("num_key_value_heads", value) for value in ("2", 2.0)),
]


def is_taken(config: dict[str, Any]) -> bool:
    """Whether transformers makes a config of it."""
    try:
        CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    except Exception:  # of transformers, which differ by version
        return False
    return True


def is_ours(config: dict[str, Any]) -> bool:
    """Whether nothing is said against it; what the layout refuses is no config for anybody here."""
    try:
        return not list(config_faults(layout_of(config, [])))
    except FamilyError:
        return False


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "deepseek_v3"])
def test_what_transformers_refuses_is_found_and_nothing_else(kind: str) -> None:
    config, _ = tiny(kind)
    home = config.get("text_config", config)
    home.pop("rope_parameters", None)
    assert is_ours(config)
    assert is_taken(config)
    for key, value in VALUES:
        before = dict(home)
        home.pop("torch_dtype" if key == "dtype" else "dtype" if key == "torch_dtype" else "", None)
        home[key] = value
        assert is_ours(config) == is_taken(config), (key, value)
        home.clear()
        home.update(before)
    for listed in (["full_attention"] * (home["num_hidden_layers"] + 1), ["x"] * home["num_hidden_layers"]):
        home["layer_types"] = listed
        assert not is_ours(config)
        assert not is_taken(config)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dtype", "torch.bfloat16", "dtype: expected the name of a dtype such as bfloat16, found 'torch.bfloat16'"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps: expected float, found '1e-6'"),
        ("layer_types", ["full_attention"] * 4, "layer_types: 4 of them, but num_hidden_layers is 3"),
    ],
)
def test_verify_reports_them_and_a_tokenizer_is_not_blamed(key: str, value: Any, said: str, tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    config[key] = value
    root = write_checkpoint(tmp_path / "out", tensors, config, files={"tokenizer.json": "{}"})
    (problem,) = verify(root, quick=True).problems
    assert (problem.code, problem.where) == ("config", "config.json")
    assert problem.message == f"{said}; transformers refuses it"
    with pytest.raises(CheckpointError, match=re.escape(f"{root}/config.json: transformers refuses it: ")) as e:
        load_tokenizer(root)
    assert "\n" not in str(e.value)
    assert str(value)[:20] in str(e.value) or "(4)" in str(e.value)  # all of the message, not its first line
