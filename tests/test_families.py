from __future__ import annotations

import importlib
import inspect
import json
import re
import statistics
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from build import KINDS, text_of, tiny

from shardxform.errors import FamilyError
from shardxform.model.expected import expected
from shardxform.model.families import HOMES, all_families, family_of
from shardxform.model.families.base import COUNT_KEYS, Family, Template
from shardxform.model.layout import layout_of, variants_found

every_family = pytest.mark.parametrize("family", all_families(), ids=lambda family: family.name)
built_here = pytest.mark.parametrize(  # the others are held against transformers alone: see test_every_family.py
    "family", dict.fromkeys(family_of(tiny(kind)[0])[0] for kind in KINDS), ids=lambda family: family.name
)


def templates(family: Family) -> list[Template]:
    extra = (*family.mtp.layer, *family.mtp.root) if family.mtp else ()
    return [*family.root, *family.block, *extra, *family.vision]


@pytest.mark.parametrize(
    ("kind", "family", "architecture", "prefix"),
    [
        ("qwen3_5_moe", "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "model.language_model."),
        ("qwen3_6_moe", "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", "model.language_model."),
        ("qwen3_5_moe_text", "qwen3_5_moe", "Qwen3_5MoeForCausalLM", "model."),
        ("qwen3_moe", "qwen3_moe", "Qwen3MoeForCausalLM", "model."),
        ("deepseek_v3", "deepseek_v3", "DeepseekV3ForCausalLM", "model."),
    ],
)
def test_a_release_is_recognised_with_and_without_its_architectures(
    kind: str, family: str, architecture: str, prefix: str
) -> None:
    config, _ = tiny(kind)
    for architectures in ([architecture], [], None, ["Another", architecture]):
        found, wrapper = family_of({**config, "architectures": architectures})
        assert (found.name, wrapper.architecture, wrapper.prefix) == (family, architecture, prefix)


@pytest.mark.parametrize("model_type", ["llama", "", None, 7, [], {}, "Qwen3_Moe", "qwen3_moe "])
def test_an_unknown_model_type_is_refused_listing_the_known_ones(model_type: Any) -> None:
    known = f"known: {', '.join(sorted(HOMES))}$"
    with pytest.raises(FamilyError, match=re.escape(repr(model_type)) + " is not a known family; " + known):
        family_of({"model_type": model_type})


def test_a_config_without_model_type_is_refused() -> None:
    for config in ({}, {"architectures": ["LlamaForCausalLM"]}, {"architectures": []}):
        with pytest.raises(FamilyError, match="model_type None is not a known family"):
            family_of(config)


def test_a_config_without_model_type_is_known_by_its_architecture() -> None:
    family, wrapper = family_of({"architectures": ["LongcatFlashForCausalLM"]})
    assert (family.name, wrapper.model_type) == ("longcat_flash", "longcat_flash")
    with pytest.raises(FamilyError, match="model_type None is not a known family"):
        family_of({"architectures": ["DeepseekV3ForCausalLM"]})  # which two types are called
    with pytest.raises(FamilyError, match="model_type None is not a known family"):
        family_of({"model_type": None, "architectures": ["LongcatFlashForCausalLM"]})


def test_a_model_type_that_contradicts_the_architecture_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"'qwen3_moe' belongs to Qwen3MoeForCausalLM, but .*DeepseekV3"):
        family_of({"model_type": "qwen3_moe", "architectures": ["DeepseekV3ForCausalLM"]})


@pytest.mark.parametrize(
    "architectures", [5, True, "Qwen3MoeForCausalLMPlus", {"Qwen3MoeForCausalLM": 1}, [["Qwen3MoeForCausalLM"]]]
)
def test_architectures_that_are_no_list_of_names_are_refused(architectures: Any) -> None:
    with pytest.raises(FamilyError, match="architectures"):
        family_of({"model_type": "qwen3_moe", "architectures": architectures})


# -- the data of each family hangs together ---------------------------------------------------------------------------


@every_family
def test_every_symbol_and_condition_of_a_template_is_defined(family: Family) -> None:
    for template in templates(family):
        apart = {**family.layer_symbols, **family.set_symbols}
        symbols = family.vision_symbols if template.role == "vision" else {**family.symbols, **apart}
        used = set(re.findall(r"[A-Z]+", template.shape))
        assert used <= {"E", *symbols}, template.name
        assert template.when in ("", *family.conditions), template.name
    used_symbols = {s for t in templates(family) for s in re.findall(r"[A-Z]+", t.shape)}
    assert used_symbols >= {*family.symbols, *family.layer_symbols, *family.set_symbols, *family.vision_symbols}


@every_family
def test_no_two_tensors_of_a_template_list_share_name_and_condition(family: Family) -> None:
    keys = [(t.name, t.when) for t in (*family.root, *family.block)]
    assert len(keys) == len(set(keys))


STACKS = {"mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
SLICED = {
    "deepseek_v3": STACKS | {"mlp.gate.e_score_correction_bias"},
    "gpt_oss": {
        *("mlp.router.weight", "mlp.router.bias", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        *("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"),
    },
    "mixtral": {"block_sparse_moe.gate.weight"},
}
NUMBERED = {
    "gpt_oss": {f"mlp.experts.{{e}}.{n}_proj.{part}" for n in ("gate", "up", "down") for part in ("weight", "bias")},
    "mixtral": {f"block_sparse_moe.experts.{{e}}.w{n}.weight" for n in (1, 2, 3)},
}


@built_here
def test_exactly_the_tensors_with_a_row_per_expert_are_sliced(family: Family) -> None:
    usual = {f"mlp.experts.{{e}}.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert {t.name for t in templates(family) if t.sliced} == SLICED.get(family.name, STACKS)
    assert {t.name for t in templates(family) if t.numbered} == NUMBERED.get(family.name, usual)


@every_family
def test_patterns_of_modules_name_modules_that_exist(family: Family) -> None:
    modules = {t.name.removesuffix(".weight") for t in family.block}
    for pattern in (*family.keep_16bit, *(member for group in family.merged.values() for member in group)):
        assert any(fnmatchcase(module, pattern) for module in modules), pattern


@every_family
def test_members_that_clients_merge_read_the_same_input(family: Family) -> None:
    columns = {t.name: t.shape.split(",")[-1] for t in family.block}
    for merged, group in family.merged.items():
        assert len({columns[f"{member}.weight"] for member in group}) == 1, merged


@every_family
def test_count_keys_are_known_as_such(family: Family) -> None:
    assert {key.rpartition(".")[2] for key in family.count_keys} <= COUNT_KEYS


def test_routers_stay_16_bit_in_every_family() -> None:
    for family in all_families():
        routers = [
            t.name.removesuffix(".weight") for t in family.block if t.role == "router" and t.name.endswith("weight")
        ]
        assert all(any(fnmatchcase(router, pattern) for pattern in family.keep_16bit) for router in routers)


VARIATIONS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("qwen3_5_moe", {"attention_bias": True, "experts": "per-expert", "mtp": "fused"}),
    ("qwen3_5_moe_text", {"tie_word_embeddings": True, "mtp_num_hidden_layers": 2}),
    ("qwen3_moe", {"attention_bias": True, "experts": "fused"}),
    ("qwen3_moe", {"tie_word_embeddings": True}),
    ("deepseek_v3", {"q_lora_rank": None}),
    ("deepseek_v3", {"experts": "fused", "mtp": "fused", "num_nextn_predict_layers": 2}),
    ("deepseek_v3", {"moe_layer_freq": 2, "num_nextn_predict_layers": 0}),
    ("gpt_oss", {"attention_bias": False, "experts": "per-expert"}),
    ("mixtral", {"head_dim": 12, "tie_word_embeddings": True}),
]


@built_here
def test_every_template_is_seen_in_some_tiny_model(family: Family) -> None:
    """So that no template escapes the comparison with the literal names and shapes of build.py."""
    seen = set()
    for kind, over in VARIATIONS:
        config, tensors = tiny(kind, **over)
        seen |= {place.template.name for place in layout_of(config, tensors).places.values()}
    optional = {t.name for t in templates(family) if t.optional}
    assert {t.name for t in templates(family)} - optional <= seen


@pytest.mark.parametrize(("kind", "over"), VARIATIONS, ids=lambda value: json.dumps(value))
def test_expected_gives_exactly_the_names_and_shapes_of_a_release(kind: str, over: dict[str, Any]) -> None:
    config, tensors = tiny(kind, **over)
    layout = layout_of(config, tensors)
    assert layout.unknown == ()
    listed = list(expected(layout, variants_found(layout)))
    required = {name: e.shape for name, e in listed if not e.optional}
    allowed = {name: e.shape for name, e in listed}
    assert set(required) <= set(tensors) <= set(allowed)
    open_shapes = {name for name in tensors if allowed[name] is None}
    assert open_shapes <= {n for n in tensors if n.endswith(("patch_embed.proj.weight", "q_proj.bias"))}
    assert {n: s for n, s in allowed.items() if n in tensors and s} == {
        n: raw.shape for n, raw in tensors.items() if n not in open_shapes
    }


@pytest.mark.parametrize(("kind", "over"), VARIATIONS, ids=lambda value: json.dumps(value))
def test_expected_and_layout_agree_on_the_place_of_every_tensor(kind: str, over: dict[str, Any]) -> None:
    config, tensors = tiny(kind, **over)
    layout = layout_of(config, tensors)
    places = {name: e.place for name, e in expected(layout, variants_found(layout))}
    for name, place in layout.places.items():
        fields = (place.template.name, place.scope, place.layer, place.expert, place.expert_at, place.role)
        other = places[name]
        assert fields == (
            other.template.name,
            other.scope,
            other.layer,
            other.expert,
            other.expert_at,
            other.role,
        ), name


@pytest.mark.parametrize(("kind", "over"), VARIATIONS, ids=lambda value: json.dumps(value))
def test_expected_names_each_tensor_once(kind: str, over: dict[str, Any]) -> None:
    config, tensors = tiny(kind, **over)
    layout = layout_of(config, tensors)
    names = [name for name, _ in expected(layout, variants_found(layout))]
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_head_is_required_exactly_when_it_is_not_tied(kind: str) -> None:
    for tied in (False, True):
        config, tensors = tiny(kind, tie_word_embeddings=tied)
        listed = dict(expected(layout_of(config, tensors), {}))
        assert listed["lm_head.weight"].optional is tied


# -- transformers as the oracle ----------------------------------------------------------------------------------------


def meta_model(config: dict[str, Any]) -> Any:
    """The transformers model of a config, without memory."""
    import torch
    import transformers

    cls = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        return cls(cls.config_class.from_dict(json.loads(json.dumps(config))))


TRANSFORMERS = [
    *((kind, {}) for kind in KINDS),
    ("qwen3_moe", {"attention_bias": True}),
    ("qwen3_moe", {"num_hidden_layers": 6, "mlp_only_layers": [1], "decoder_sparse_step": 3}),
    ("deepseek_v3", {"q_lora_rank": None}),
    ("deepseek_v3", {"attention_bias": True}),
    ("qwen3_5_moe", {"attention_bias": True}),
    ("gpt_oss", {"attention_bias": False}),
    ("mixtral", {"head_dim": 12}),
]


def released(family: Family, state: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of modules as in checkpoints of a family: renamed, and without stacks where it has none."""
    out: dict[str, tuple[int, ...]] = {}
    for module_name, shape in state.items():
        name = module_name
        for old, new in family.renames:
            name = name.replace(f".{new}", f".{old}")
        stem, _, stack = name.rpartition(".")
        if family.experts.stacks or not stem.endswith(".experts"):
            out[name] = shape
            continue
        gate, up, down = family.experts.projections
        for e in range(shape[0]):
            parts = {gate: (shape[1] // 2, shape[2]), up: (shape[1] // 2, shape[2])} if "gate" in stack else {}
            parts = parts or {down: shape[1:]}
            out |= {f"{stem}.{e}.{part}.weight": size for part, size in parts.items()}
    return out


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_of_experts_is_that_of_the_flags_of_transformers_class(kind: str) -> None:
    config, tensors = tiny(kind)
    layout = layout_of(config, tensors)
    experts = layout.family.experts
    blocks = meta_model(config).get_decoder().layers
    found = next(m for m in blocks[layout.moe_layers[0]].modules() if hasattr(m, "is_transposed"))
    assert found.is_transposed == experts.transposed
    assert found.is_concatenated == (experts.gate == "concatenated")
    assert (found.has_bias, found.has_gate) == (experts.bias, experts.gated)


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "over"), TRANSFORMERS, ids=lambda value: json.dumps(value))
def test_expected_equals_the_state_dict_of_the_transformers_model(kind: str, over: dict[str, Any]) -> None:
    config, tensors = tiny(kind, **over)
    layout = layout_of(config, tensors)
    model = meta_model(config)
    state = released(layout.family, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    fused = {("block", layer): layout.family.spelling for layer in range(layout.num_layers)}
    listed = {n: e for n, e in expected(layout, fused) if e.place.scope != "mtp"}  # transformers has no MTP
    assert {n for n, e in listed.items() if not e.optional} <= set(state) <= set(listed)
    assert {n: e.shape for n, e in listed.items() if n in state and e.shape} == {
        n: shape for n, shape in state.items() if listed[n].shape
    }


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_a_config_saved_by_transformers_describes_the_same_model(kind: str) -> None:
    config, tensors = tiny(kind)
    saved = json.loads(meta_model(config).config.to_json_string()) | {"architectures": config["architectures"]}
    before, after = layout_of(config, tensors), layout_of(saved, tensors)
    for field in ("num_layers", "num_experts", "top_k", "groups", "moe_layers", "mtp_layers", "places"):
        assert getattr(after, field) == getattr(before, field), field
    variants = variants_found(before)
    assert dict(expected(after, variants)) == dict(expected(before, variants))


@pytest.mark.oracle
@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("nested", [True, False, None])
def test_the_output_head_is_tied_when_transformers_ties_it(top: bool | None, nested: bool | None) -> None:
    config, tensors = tiny("qwen3_5_moe")
    for home, value in ((config, top), (text_of(config), nested)):
        home["tie_word_embeddings"] = value
        if value is None:
            del home["tie_word_embeddings"]
    model = meta_model(config)
    tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
    required = {name for name, e in expected(layout_of(config, tensors), {}) if not e.optional}
    assert ("lm_head.weight" not in required) is tied


def test_an_entry_is_short() -> None:
    lines = sorted(len(Path(inspect.getfile(module)).read_text().splitlines()) for module in entries())
    assert statistics.median(lines) <= 80
    assert lines[-1] <= 200


def entries() -> list[ModuleType]:
    """Modules of built-in families."""
    return [importlib.import_module(f"shardxform.model.families.{name}") for name in sorted(set(HOMES.values()))]
