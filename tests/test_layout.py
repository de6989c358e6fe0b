from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

import pytest
from build import KINDS, names_of, text_of, tiny
from hypothesis import given
from hypothesis import strategies as st

from shardxform.errors import FamilyError
from shardxform.model.expected import expected
from shardxform.model.families import family_of
from shardxform.model.layout import Layout, count_paths, layout_of, variants_found


def layout(kind: str, names: Iterable[str] | None = None, *, top: dict[str, Any] | None = None, **over: Any) -> Layout:
    """Layout of a tiny model whose config, but not its tensors, is changed; `...` removes a key."""
    config, tensors = tiny(kind)
    config = copy.deepcopy(config)
    for home, changes in ((config, top or {}), (text_of(config), over)):
        home.update(changes)
        for key in [key for key, value in changes.items() if value is ...]:
            del home[key]
    return layout_of(config, tensors if names is None else names)


def everything(of: Layout) -> list[str]:
    names = [name for name, _ in islice(expected(of, variants_found(of)), 100_000)]
    assert len(names) < 100_000, "expected() does not end"
    return names


def place(kind: str, name: str) -> tuple[Any, ...] | None:
    """Role, scope, layer, expert, index of the expert id, companion."""
    found = layout(kind, [name]).places.get(name)
    return found and (found.role, found.scope, found.layer, found.expert, found.expert_at, found.companion)


M = "model.language_model.layers"


@pytest.mark.parametrize(
    ("kind", "name", "where"),
    [
        ("qwen3_5_moe", "lm_head.weight", ("lm head", "root", None, None, -1, "")),
        ("qwen3_5_moe", "model.language_model.norm.weight", ("norms", "root", None, None, -1, "")),
        ("qwen3_5_moe", "model.language_model.embed_tokens.weight", ("embeddings", "root", None, None, -1, "")),
        ("qwen3_5_moe", f"{M}.2.mlp.experts.gate_up_proj", ("routed experts", "block", 2, None, -1, "")),
        ("qwen3_5_moe", f"{M}.2.mlp.experts.7.up_proj.weight", ("routed experts", "block", 2, 7, 6, "")),
        ("qwen3_5_moe", f"{M}.2.mlp.experts.7.up_proj.qweight", ("routed experts", "block", 2, 7, 6, "qweight")),
        ("qwen3_5_moe", f"{M}.0.mlp.gate.weight", ("router", "block", 0, None, -1, "")),
        ("qwen3_5_moe", f"{M}.0.mlp.shared_expert_gate.weight", ("shared experts", "block", 0, None, -1, "")),
        ("qwen3_5_moe", f"{M}.0.mlp.shared_expert.up_proj.weight", ("shared experts", "block", 0, None, -1, "")),
        ("qwen3_5_moe", f"{M}.0.linear_attn.A_log", ("linear attention", "block", 0, None, -1, "")),
        ("qwen3_5_moe", f"{M}.3.self_attn.k_norm.weight", ("norms", "block", 3, None, -1, "")),
        ("qwen3_5_moe", "model.visual.blocks.1.attn.qkv.bias", ("vision", "vision", None, None, -1, "")),
        ("qwen3_5_moe", "mtp.fc.weight", ("mtp", "mtp", None, None, -1, "")),
        ("qwen3_5_moe", "mtp.layers.0.mlp.experts.3.down_proj.weight", ("mtp", "mtp", 0, 3, 5, "")),
        ("qwen3_5_moe", "mtp.layers.0.mlp.gate.weight", ("mtp", "mtp", 0, None, -1, "")),
        ("qwen3_5_moe_text", "model.layers.1.mlp.experts.down_proj", ("routed experts", "block", 1, None, -1, "")),
        ("qwen3_moe", "model.layers.0.mlp.experts.5.gate_proj.weight", ("routed experts", "block", 0, 5, 5, "")),
        ("qwen3_moe_mixed", "model.layers.0.mlp.gate_proj.weight", ("dense mlp", "block", 0, None, -1, "")),
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", ("router", "block", 1, None, -1, "")),
        ("deepseek_v3", "model.layers.2.mlp.gate.weight", ("router", "block", 2, None, -1, "")),
        ("deepseek_v3", "model.layers.3.mlp.gate.weight", ("mtp", "mtp", 0, None, -1, "")),
        ("deepseek_v3", "model.layers.3.mlp.experts.1.up_proj.weight", ("mtp", "mtp", 0, 1, 5, "")),
        ("deepseek_v3", "model.layers.3.eh_proj.weight", ("mtp", "mtp", 0, None, -1, "")),
        (
            "deepseek_v3",
            "model.layers.1.mlp.experts.1.up_proj.weight_scale_inv",
            ("routed experts", "block", 1, 1, 5, "weight_scale_inv"),
        ),
    ],
)
def test_a_name_has_this_place(kind: str, name: str, where: tuple[Any, ...]) -> None:
    assert place(kind, name) == where


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen3_moe", "model.layers.00.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.01.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.\u0661.up_proj.weight"),  # an Arabic-Indic digit
        ("qwen3_moe", "model.layers.0.mlp.experts.\u00b2.up_proj.weight"),  # superscript: isdigit, but no int
        ("qwen3_moe", "model.layers.0.mlp.experts.-1.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.+1.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.1_0.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts. 1.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.{e}.up_proj.weight"),
        ("qwen3_moe", "model.layers.#.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.3.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.99999999999999999999.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.99999999999999999999.up_proj.weight"),
        ("qwen3_moe", "model.layers..mlp.gate.weight"),
        ("qwen3_moe", "layers.0.mlp.gate.weight"),
        ("qwen3_moe", "model.language_model.layers.0.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.0.mlp.gate.weight.0"),
        ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj.0.qweight"),  # the spelling of auto-round 0.10
        ("qwen3_moe", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("qwen3_moe", "model.visual.pos_embed.weight"),
        ("qwen3_moe", "mtp.fc.weight"),
        ("qwen3_moe", ""),
        ("qwen3_moe", "."),
        ("qwen3_moe", "weight"),
        ("qwen3_5_moe", "model.layers.0.mlp.gate.weight"),
        ("qwen3_5_moe", "mtp.layers.00.mlp.gate.weight"),
        ("qwen3_5_moe_text", "model.visual.pos_embed.weight"),
        ("qwen3_5_moe_text", "model.layers.4.mlp.gate.weight"),
        ("deepseek_v3", "model.layers.0.eh_proj.weight"),
        ("deepseek_v3", "model.layers.4.eh_proj.weight"),
        ("deepseek_v3", "model.layers.4.mlp.gate.weight"),
    ],
)
def test_a_name_that_no_loader_would_accept_is_unknown(kind: str, name: str) -> None:
    found = layout(kind, [name])
    assert (found.unknown, dict(found.places)) == ((name,), {})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen3_moe", "model.layers.0.mlp.experts.6.up_proj.weight"),
        ("qwen3_moe", "model.layers.0.mlp.experts.999999999.up_proj.weight"),
        ("qwen3_5_moe", "mtp.layers.0.mlp.experts.8.up_proj.weight"),
        ("deepseek_v3", "model.layers.3.mlp.experts.8.up_proj.weight"),
        ("qwen3_5_moe", "mtp.layers.1.mlp.gate.weight"),
        ("qwen3_5_moe", "model.visual.blocks.2.norm1.weight"),
    ],
)
def test_a_number_beyond_what_the_config_counts_is_never_expected(kind: str, name: str) -> None:
    """Whether such a name is placed or unknown, verification must find it: clients ignore it silently."""
    config, tensors = tiny(kind)
    assert name not in everything(layout_of(config, [*tensors, name]))


@given(st.text("model.layrs0129#{e}.up_prjwghtx", max_size=60))
def test_any_name_is_either_placed_or_unknown(name: str) -> None:
    found = layout("deepseek_v3", [name])
    assert (name in found.places) is not (name in found.unknown)


def test_unknown_names_keep_the_source_order() -> None:
    assert layout("qwen3_moe", ["z", "lm_head.weight", "a", "m"]).unknown == ("z", "a", "m")


@pytest.mark.parametrize(
    ("kind", "moe_layers", "mtp_layers", "experts", "top_k", "groups"),
    [
        ("qwen3_5_moe", (0, 1, 2, 3), 1, 8, 2, 1),
        ("qwen3_5_moe_text", (0, 1, 2, 3), 0, 8, 2, 1),
        ("qwen3_moe", (0, 1, 2), 0, 6, 2, 1),
        ("qwen3_moe_mixed", (1,), 0, 6, 2, 1),
        ("deepseek_v3", (1, 2), 1, 8, 2, 2),
    ],
)
def test_the_config_gives_these_counts(
    kind: str, moe_layers: tuple[int, ...], mtp_layers: int, experts: int, top_k: int, groups: int
) -> None:
    found = layout(kind)
    assert (found.moe_layers, found.mtp_layers, found.num_experts) == (moe_layers, mtp_layers, experts)
    assert (found.top_k, found.groups) == (top_k, groups)


@pytest.mark.parametrize("kind", KINDS)
def test_mtp_and_vision_are_reported_when_a_tensor_of_them_is_there(kind: str) -> None:
    _, tensors = tiny(kind)
    assert layout(kind).has_vision is bool(names_of(tensors, "visual"))
    assert layout(kind).has_mtp is (kind in ("qwen3_5_moe", "qwen3_6_moe", "deepseek_v3"))
    bare = layout(kind, ["lm_head.weight"])
    assert (bare.has_vision, bare.has_mtp) == (False, False)


def test_the_spelling_of_experts_is_found_per_block() -> None:
    assert variants_found(layout("qwen3_5_moe")) == {
        **{("block", layer): "fused" for layer in range(4)},
        ("mtp", 0): "per-expert",
    }
    assert variants_found(layout("qwen3_6_moe"))[("mtp", 0)] == "fused"
    assert variants_found(layout("deepseek_v3")) == {
        ("block", 1): "per-expert",
        ("block", 2): "per-expert",
        ("mtp", 0): "per-expert",
    }
    names = ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.0.up_proj.weight"]
    assert variants_found(layout("qwen3_moe", names)) == {("block", 1): "fused"}


def test_the_text_config_is_where_the_wrapper_keeps_it() -> None:
    assert layout("qwen3_5_moe").text["model_type"] == "qwen3_5_moe_text"
    assert layout("qwen3_moe").text["model_type"] == "qwen3_moe"


# -- counts of experts -------------------------------------------------------------------------------------------------


def paths(kind: str, **over: Any) -> list[tuple[str, ...]]:
    config, _ = tiny(kind)
    text_of(config).update(over)
    return count_paths(config, *family_of(config))


def test_the_paths_of_the_expert_count_are_found() -> None:
    assert paths("qwen3_5_moe") == [("text_config", "num_experts")]
    assert paths("qwen3_5_moe_text") == [("num_experts",)]
    assert set(paths("qwen3_moe", num_local_experts=6)) == {("num_experts",), ("num_local_experts",)}
    assert paths("deepseek_v3") == [("n_routed_experts",)]


@pytest.mark.parametrize(
    ("kind", "changes", "path"),
    [
        ("qwen3_5_moe", {"top": {"num_experts": 8}}, "num_experts"),
        ("qwen3_5_moe", {"top": {"audio_config": {"a": {"num_local_experts": 8}}}}, "audio_config.a.num_local_experts"),
        ("qwen3_5_moe", {"n_routed_experts": 8}, "text_config.n_routed_experts"),
        ("qwen3_moe", {"top": {"text_config": {"num_experts": 6}}}, "text_config.num_experts"),
        ("qwen3_moe", {"moe_num_experts": 6}, "moe_num_experts"),
        ("deepseek_v3", {"num_experts": 8}, "num_experts"),
    ],
)
def test_a_count_of_experts_in_an_unexpected_place_is_refused(kind: str, changes: dict[str, Any], path: str) -> None:
    with pytest.raises(FamilyError, match=f"^config.json: {path} counts experts where"):
        layout(kind, **changes)


@pytest.mark.parametrize(
    ("kind", "key", "where"),
    [
        ("qwen3_5_moe", "num_experts", "text_config.num_experts"),
        ("qwen3_5_moe_text", "num_experts", "num_experts"),
        ("deepseek_v3", "n_routed_experts", "n_routed_experts"),
    ],
)
def test_a_config_without_the_expert_count_is_refused(kind: str, key: str, where: str) -> None:
    with pytest.raises(FamilyError, match=f"missing the expert count, expected {where}$"):
        layout(kind, **{key: ...})


def test_counts_that_disagree_are_refused_and_counts_that_agree_are_not() -> None:
    assert layout("qwen3_moe", num_local_experts=6).num_experts == 6
    assert layout("qwen3_moe", num_local_experts=6, num_experts=...).num_experts == 6
    with pytest.raises(FamilyError, match=r"counts disagree: \{'num_experts': 6, 'num_local_experts': 5\}"):
        layout("qwen3_moe", num_local_experts=5)


def test_more_experts_per_token_than_experts_are_refused() -> None:
    assert layout("qwen3_moe", num_experts_per_tok=6).top_k == 6
    with pytest.raises(FamilyError, match="num_experts_per_tok is 7, but there are 6 experts"):
        layout("qwen3_moe", num_experts_per_tok=7)


@pytest.mark.parametrize("n_group", [3, 16, -1, "2", True, 2.0])
def test_router_groups_that_do_not_divide_the_experts_are_refused(n_group: Any) -> None:
    with pytest.raises(FamilyError, match="n_group"):
        layout("deepseek_v3", n_group=n_group)


@pytest.mark.parametrize("n_group", [None, ..., 0, 1])
def test_no_router_groups_is_one_group(n_group: Any) -> None:
    assert layout("deepseek_v3", n_group=n_group).groups == 1


# -- configs of the wrong types ----------------------------------------------------------------------------------------

NOT_A_COUNT = ["8", None, -1, 0, 8.0, True, [8], {}, 10**30, float("nan")]


@pytest.mark.parametrize("value", NOT_A_COUNT, ids=repr)
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("qwen3_5_moe", "num_experts"),
        ("qwen3_5_moe", "num_hidden_layers"),
        ("qwen3_5_moe", "num_experts_per_tok"),
        ("deepseek_v3", "n_routed_experts"),
    ],
)
def test_a_count_that_is_none_is_refused_naming_its_path(kind: str, key: str, value: Any) -> None:
    path = f"text_config.{key}" if kind == "qwen3_5_moe" else key
    with pytest.raises(FamilyError, match=f"config.json: .*{path}"):
        layout(kind, **{key: value})


@pytest.mark.parametrize("value", ["1", -1, 1.0, True, [1], 10**30], ids=repr)
@pytest.mark.parametrize(
    ("kind", "key"), [("qwen3_5_moe", "mtp_num_hidden_layers"), ("deepseek_v3", "num_nextn_predict_layers")]
)
def test_an_optional_count_of_the_wrong_type_is_refused(kind: str, key: str, value: Any) -> None:
    with pytest.raises(FamilyError, match=f"{key}: expected a count, found"):
        layout(kind, **{key: value})


@pytest.mark.parametrize("value", [None, [], "x", 1], ids=repr)
def test_a_nested_config_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(FamilyError, match="needs an object 'text_config'"):
        layout("qwen3_5_moe", top={"text_config": value})
    with pytest.raises(FamilyError, match="needs an object 'vision_config'"):
        everything(layout("qwen3_5_moe", top={"vision_config": value}))


@pytest.mark.parametrize("depth", NOT_A_COUNT[:3] + NOT_A_COUNT[4:-2], ids=repr)
def test_a_vision_depth_that_is_no_count_is_refused(depth: Any) -> None:
    config, _ = tiny("qwen3_5_moe")
    with pytest.raises(FamilyError, match=r"vision_config\.depth"):
        everything(layout("qwen3_5_moe", top={"vision_config": {**config["vision_config"], "depth": depth}}))


@pytest.mark.parametrize(
    "value",
    [
        [],
        ["linear_attention"],
        ["linear_attention"] * 3,
        5,
        {},
        {"0": "linear_attention"},
        "abcdefgh",
        ["sliding_attention"] * 4,
        [1, 2, 3, 4],
        [["linear_attention"]] * 4,
    ],
    ids=repr,
)
def test_layer_types_that_do_not_name_the_kind_of_every_layer_are_refused(value: Any) -> None:
    with pytest.raises(FamilyError, match=r"config\.json"):
        everything(layout("qwen3_5_moe_text", layer_types=value))


def test_without_layer_types_every_fourth_layer_is_full_attention() -> None:
    assert set(everything(layout("qwen3_5_moe_text", layer_types=...))) == set(everything(layout("qwen3_5_moe_text")))
    every_second = everything(layout("qwen3_5_moe_text", layer_types=None, full_attention_interval=2))
    assert names_of(every_second, "o_proj") == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (1, 3)]


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("qwen3_5_moe_text", "full_attention_interval", 0),
        ("qwen3_5_moe_text", "full_attention_interval", "x"),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_moe", "decoder_sparse_step", None),
        ("qwen3_moe", "decoder_sparse_step", []),
        ("qwen3_moe", "decoder_sparse_step", float("inf")),
        ("qwen3_moe", "mlp_only_layers", 1),
        ("qwen3_moe", "mlp_only_layers", "12"),
        ("deepseek_v3", "first_k_dense_replace", "x"),
        ("deepseek_v3", "first_k_dense_replace", None),
        ("deepseek_v3", "first_k_dense_replace", {}),
        ("deepseek_v3", "moe_layer_freq", 0),
        ("deepseek_v3", "moe_layer_freq", [1, 1, 1]),
    ],
)
def test_a_condition_that_cannot_be_evaluated_is_refused(kind: str, key: str, value: Any) -> None:
    config = tiny(kind)[0] | {key: value, "layer_types": None}
    with pytest.raises(FamilyError, match=r"cannot tell what its \d layers are made of"):
        layout_of(config, [])


def test_a_list_that_is_too_short_is_named() -> None:
    config = tiny("qwen3_5_moe_text")[0] | {"layer_types": ["full_attention"]}
    with pytest.raises(FamilyError, match=r"what its 4 layers are made of: layer_types has 1 entries"):
        layout_of(config, [])


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", 64.5), ("qk_nope_head_dim", -4), ("num_attention_heads", "4")]
)
def test_a_size_that_is_none_is_named_by_its_key(key: str, value: Any) -> None:
    config = tiny("deepseek_v3")[0] | {key: value}
    with pytest.raises(FamilyError, match=re.escape(f"config.json: expected a size for {key}, found {value!r}")):
        list(expected(layout_of(config, []), {}))


HOSTILE = ["x", None, -8, 0, 2**70, 8.5, True, [], {}, [8], float("inf"), float("nan")]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_moe", "qwen3_moe_mixed", "deepseek_v3"])
def test_a_hostile_value_of_any_config_key_gives_a_family_error_or_an_answer(kind: str, value: Any) -> None:
    config, tensors = tiny(kind)
    escaped = []
    for home in ([], ["text_config"], ["vision_config"]):
        for key in config.get(home[0], {}) if home else config:
            changed = copy.deepcopy(config)
            (changed[home[0]] if home else changed)[key] = value
            try:
                found = layout_of(changed, tensors)
                if found.num_layers < 100 and found.num_experts < 100:
                    everything(found)
            except FamilyError:
                pass
            except Exception as e:
                escaped.append((".".join([*home, key]), repr(e)))
    assert not escaped


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("qwen3_5_moe_text", "hidden_size"),
        ("qwen3_5_moe_text", "head_dim"),
        ("qwen3_5_moe_text", "num_attention_heads"),
        ("qwen3_5_moe_text", "linear_num_value_heads"),
        ("qwen3_moe", "moe_intermediate_size"),
        ("qwen3_moe", "num_key_value_heads"),
        ("deepseek_v3", "kv_lora_rank"),
        ("deepseek_v3", "n_shared_experts"),
    ],
)
def test_a_size_that_is_missing_is_refused_by_name(kind: str, key: str) -> None:
    with pytest.raises(FamilyError, match=f"config.json: missing '{key}'"):
        everything(layout(kind, **{key: ...}))


def test_the_head_size_of_qwen3_follows_from_the_hidden_size_when_it_is_not_given() -> None:
    for head_dim in (None, ...):
        found = layout("qwen3_moe", head_dim=head_dim)
        assert dict(expected(found, {}))["model.layers.0.self_attn.q_norm.weight"].shape == (4,)
