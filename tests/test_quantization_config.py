"""What is selected, what `quantization_config` says of it, and what the shards hold: all one, read as clients read.

The readers at the bottom are written from the clients' behaviour, not from ours: vLLM searches extra_config by
`re.search` under renamed prefixes and looks at merged modules, SGLang and transformers use `re.fullmatch` or
`re.match`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strategies  # noqa: F401  configures hypothesis
from build import read_checkpoint, tiny, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from shardxform.base.tensors import ByteRange, TensorRef, TensorSpec
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import SchemeError
from shardxform.execution.runner import run
from shardxform.formats import dialects, rounding
from shardxform.formats.dialects import Selection, select
from shardxform.formats.integers import Ints
from shardxform.formats.matrices import Matrix, matrices_of
from shardxform.formats.scheme import FORMATS, Format, Grid, Scheme
from shardxform.model.layout import Layout, layout_of
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions

TOLD = FORMATS[:3]
"""Formats whose config says which modules are quantized; that of mlx leaves it to the shards."""

SIZES: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32}
QWEN35: dict[str, Any] = {
    **SIZES,
    "shared_expert_intermediate_size": 32,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
KIND_SIZES: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": QWEN35,
    "qwen3_6_moe": QWEN35,
    "qwen3_5_moe_text": QWEN35,
    "qwen3_moe": {**SIZES, "head_dim": 32, "intermediate_size": 64},
    "qwen3_moe_mixed": {**SIZES, "head_dim": 32, "intermediate_size": 64},
    "deepseek_v3": {**SIZES, "intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 32},
}
GRID = Grid(group_size=32)
Table = tuple[Layout, dict[str, TensorRef]]


def table_of(kind: str, dtype: str = "BF16", **over: Any) -> Table:
    """Layout and references of a tiny checkpoint that nobody wrote."""
    config, raws = tiny(kind, dtype=dtype, **{**KIND_SIZES[kind], **over})
    tensors = {}
    for name, raw in raws.items():
        spec = TensorSpec(name, raw.dtype, raw.shape)
        tensors[name] = TensorRef(spec, (ByteRange("model.safetensors", 0, spec.nbytes),))
    return layout_of(config, tensors), tensors


def chosen(table: Table, **scheme: Any) -> Selection:
    return select(*table, Scheme(**{"grid": GRID, **scheme}))


def config_of(table: Table, **fields: Any) -> dict[str, Any]:
    scheme = Scheme(**{"grid": GRID, **fields})
    return dialects.build(select(*table, scheme), scheme, table[0])


# -- the dictionaries --------------------------------------------------------------------------------------------------

QWEN35_KEPT = [
    r".*\.linear_attn\.in_proj_a$",
    r".*\.linear_attn\.in_proj_b$",
    r".*\.linear_attn\.in_proj_ba$",
    r".*\.mlp\.gate$",
    r".*\.mlp\.shared_expert_gate$",
]
KEPT = {
    "qwen3_5_moe": [*QWEN35_KEPT, ".*visual.*", ".*mtp.*", "lm_head"],
    "qwen3_6_moe": [*QWEN35_KEPT, ".*visual.*", ".*mtp.*", "lm_head"],
    "qwen3_5_moe_text": [*QWEN35_KEPT, "lm_head"],
    "qwen3_moe": [r".*\.mlp\.gate$", "lm_head"],
    "qwen3_moe_mixed": [r".*\.mlp\.gate$", "lm_head"],
}
DEEPSEEK_ALWAYS = {r".*\.mlp\.gate$", r".*\.layers\.(3)\..*", "lm_head"}


@pytest.mark.parametrize("kind", sorted(KEPT))
def test_auto_round_config(kind: str) -> None:
    assert config_of(table_of(kind)) == {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "iters": 0,
        "autoround_version": "0.16.1",
        "block_name_to_quantize": ["model.layers", "model.language_model.layers"],
        "extra_config": {pattern: {"bits": 16, "data_type": "float"} for pattern in KEPT[kind]},
    }


@pytest.mark.parametrize("kind", sorted(KEPT))
def test_gptq_config(kind: str) -> None:
    assert config_of(table_of(kind), format="gptq", grid=Grid(bits=8, group_size=-1)) == {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": -1,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "dynamic": {f"-:{pattern}": {} for pattern in KEPT[kind]},
    }


@pytest.mark.parametrize("kind", sorted(KEPT))
@pytest.mark.parametrize(("group_size", "strategy", "stated"), [(32, "group", 32), (-1, "channel", None)])
def test_compressed_tensors_config(kind: str, group_size: int, strategy: str, stated: int | None) -> None:
    ignore = ["lm_head" if pattern == "lm_head" else f"re:{pattern}" for pattern in KEPT[kind]]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": strategy, "group_size": stated}
    assert config_of(table_of(kind), format="compressed-tensors", grid=Grid(group_size=group_size)) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


QKV_A = ("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa")


def test_deepseek_names_its_mtp_layer_by_number_and_the_modules_that_do_not_fit() -> None:
    """kv_a_proj_with_mqa has 36 rows here; it takes q_a_proj along, which clients merge with it."""
    kept = set(config_of(table_of("deepseek_v3"))["extra_config"])
    misfits = {rf".*\.self_attn\.{name}$" for name in QKV_A}
    odd = {r".*\.self_attn\.q_b_proj$", r".*\.self_attn\.kv_b_proj$", r".*\.self_attn\.o_proj$"}
    assert r".*\.decoder\..*" in kept  # SGLang's name of the layer
    kept -= {r".*\.decoder\..*"}
    assert DEEPSEEK_ALWAYS | misfits <= kept <= DEEPSEEK_ALWAYS | misfits | odd


def test_a_module_kept_in_some_blocks_is_named_with_their_numbers() -> None:
    config = config_of(table_of("qwen3_5_moe_text"), keep_16bit=("model.layers.[02].mlp.experts.*",))
    assert r".*\.layers\.(0|2)\.mlp\.experts(\..*)?" in config["extra_config"]
    resolved = dialects.resolve(config)
    widths = [resolved.bits_of(f"model.layers.{layer}.mlp.experts.7.up_proj") for layer in range(4)]
    assert widths == [16, 4, 16, 4]
    assert resolved.bits_of("model.layers.12.mlp.experts.7.up_proj") == 4  # no substring of a number


def test_a_quantized_head_is_said_in_each_dialect() -> None:
    table = table_of("qwen3_moe", vocab_size=64)
    auto_round, gptq = (config_of(table, format=f, quantize=("lm_head",)) for f in TOLD[:2])
    weights = {"bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    assert auto_round["extra_config"]["lm_head"] == weights
    assert gptq["lm_head"] is True
    assert "-:lm_head" not in gptq["dynamic"]
    assert gptq["dynamic"][r"+:.*lm_head$"] == {"bits": 4, "group_size": 32, "sym": True}
    for config in (auto_round, gptq):
        assert dialects.resolve(config).bits_of("lm_head") == 4


@pytest.mark.parametrize("format_", TOLD)
def test_resolve_reads_what_build_wrote(format_: Format) -> None:
    resolved = dialects.resolve(config_of(table_of("qwen3_5_moe"), format=format_, grid=Grid(bits=8)))
    assert (resolved.format, resolved.bits, resolved.group_size) == (format_, 8, 128)
    assert resolved.bits_of("model.language_model.layers.0.mlp.experts.3.gate_proj") == 16  # 64 columns, groups of 128
    resolved = dialects.resolve(config_of(table_of("qwen3_5_moe"), format=format_))
    eight = ("mlp.experts.3.gate_proj", "linear_attn.in_proj_qkv", "mlp.shared_expert.down_proj")
    assert {resolved.bits_of(f"model.language_model.layers.0.{name}") for name in eight} == {4}
    sixteen = ("mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_a", "linear_attn.in_proj_ba")
    assert {resolved.bits_of(f"model.language_model.layers.0.{name}") for name in sixteen} == {16}
    outside = ("lm_head", "mtp.fc", "mtp.layers.0.mlp.experts.0.up_proj", "model.visual.blocks.0.attn.qkv")
    assert {resolved.bits_of(name) for name in outside} == {16}


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one key, dots between levels; ... removes it."""

    def change(config: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            config = config[parent]
        if value is ...:
            del config[last]
        else:
            config[last] = value

    return change


@pytest.mark.parametrize(
    ("format_", "change", "message"),
    [
        ("gptq", changed("quant_method", "awq"), "quant_method 'awq' is none of auto-round, gptq, compressed-tensors"),
        ("gptq", changed("desc_act", ...), "desc_act: expected bool, found None"),
        ("gptq", changed("desc_act", True), "desc_act true, expected false"),
        ("gptq", changed("sym", False), "sym false, expected symmetric weights"),
        ("gptq", changed("bits", 3), "bits 3, expected 4 or 8"),
        ("gptq", changed("group_size", "128"), "group_size: expected int, found '128'"),
        ("gptq", changed("dynamic", {"-:(": {}}), r"'\(' is no regular expression"),
        ("auto-round", changed("packing_format", "auto_round:awq"), "packing_format 'auto_round:awq'"),
        ("auto-round", changed("block_name_to_quantize", ["model.blocks"]), "names no decoder blocks"),
        ("compressed-tensors", changed("format", "int-quantized"), "format 'int-quantized', expected 'pack-quantized'"),
        ("compressed-tensors", changed("config_groups", ...), "config_groups: expected dict, found None"),
        ("compressed-tensors", changed("config_groups.group_0.weights.symmetric", False), "symmetric int weights"),
        ("compressed-tensors", changed("config_groups.group_0.weights.num_bits", None), "bits None, expected 4 or 8"),
    ],
)
def test_resolve_refuses_what_clients_do_not_run(format_: Format, change: Any, message: str) -> None:
    config = config_of(table_of("qwen3_moe"), format=format_)
    change(config)
    with pytest.raises(SchemeError, match=message):
        dialects.resolve(config)


# -- selection ---------------------------------------------------------------------------------------------------------


def locals_of(selection: Selection) -> set[str]:
    return {module.local for module in selection.quantized}


def test_by_default_the_linears_of_decoder_blocks_are_quantized() -> None:
    selection = chosen(table_of("qwen3_5_moe"))
    shared = {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    experts = {f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    linear = {f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj")}
    assert locals_of(selection) == shared | experts | attention | linear
    assert {module.place.scope for module in selection.quantized} == {"block"}
    assert selection.misfits == {}
    assert set(selection.kept.values()) == {"16-bit by default"}
    assert {"lm_head", "mtp.fc", "model.visual.pos_embed", "model.language_model.embed_tokens"} <= set(selection.kept)
    assert len(selection.quantized) == 4 * (8 * 3 + 3) + 3 * 3 + 4


def test_keep_16bit_wins_over_the_default_and_quantize_over_both() -> None:
    table = table_of("qwen3_moe", vocab_size=64)
    kept = chosen(table, keep_16bit=("*.self_attn.*",))
    assert not any(module.local.startswith("self_attn") for module in kept.quantized)
    assert kept.kept["model.layers.1.self_attn.o_proj"] == "on request"
    both = chosen(table, keep_16bit=("*.self_attn.*", "lm_head"), quantize=("*.self_attn.*", "lm_head"))
    assert "self_attn.q_proj" in locals_of(both)
    assert "lm_head" in {module.name for module in both.quantized}
    assert "lm_head" not in both.kept


def test_a_misfit_takes_along_what_clients_merge_with_it() -> None:
    selection = chosen(table_of("qwen3_5_moe_text", num_key_value_heads=1, head_dim=16))  # k and v have 16 rows
    for name in ("q", "k", "v"):
        assert f"model.layers.3.self_attn.{name}_proj" in selection.misfits
    assert selection.misfits["model.layers.3.self_attn.k_proj"] == "[16, 64] is no multiple of 32"
    assert selection.misfits["model.layers.3.self_attn.q_proj"] == "merged with model.layers.3.self_attn.k_proj"
    assert "model.layers.3.self_attn.o_proj" not in selection.kept
    assert selection.kept["model.layers.3.self_attn.q_proj"] == selection.misfits["model.layers.3.self_attn.q_proj"]


def test_one_odd_matrix_keeps_all_experts_of_its_layer() -> None:
    selection = chosen(table_of("qwen3_moe"), grid=Grid(group_size=64))  # down_proj has 32 columns
    assert not any(module.expert is not None for module in selection.quantized)
    assert selection.misfits["model.layers.0.mlp.experts.0.down_proj"] == "32 input channels do not fill groups of 64"
    assert selection.misfits["model.layers.0.mlp.experts.5.up_proj"].startswith("merged with model.layers.0.mlp.exp")
    assert "self_attn.q_proj" in locals_of(selection)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("qwen3_moe", {"keep_16bit": ("*.0.self_attn.q_proj",)}, r"clients merge .*q_proj with .*k_proj.*on request"),
        ("qwen3_moe", {"keep_16bit": ("*.experts.3.*",)}, r"clients merge .*experts\.3\.\w+ with .*experts\.0\."),
        ("qwen3_5_moe", {"keep_16bit": ("*.in_proj_z",)}, r"clients merge .*in_proj_z with .*in_proj_qkv"),
        (
            "qwen3_5_moe",
            {"quantize": ("*.1.mlp.gate",)},
            r"`quantize` selects .*1\.mlp\.gate, but no client runs router",
        ),
        ("qwen3_5_moe", {"quantize": ("*embed_tokens",)}, "no client runs embeddings"),
        ("qwen3_5_moe", {"quantize": ("*visual*qkv",)}, "no client runs vision"),
        ("qwen3_5_moe", {"quantize": ("mtp.fc",)}, "no client runs mtp"),
        ("qwen3_moe", {"format": "compressed-tensors", "quantize": ("lm_head",)}, "vLLM cannot run"),
        ("qwen3_moe", {"keep_16bit": ("*.mlp.expert.*",)}, r"`keep_16bit` '\*\.mlp\.expert\.\*' matches no module"),
        ("qwen3_moe", {"quantize": ("head",)}, "`quantize` 'head' matches no module"),
        ("qwen3_moe", {"keep_16bit": ("*",)}, "nothing to quantize"),
        ("qwen3_moe_mixed", {"keep_16bit": ("*.3.mlp.up_proj",)}, r"clients merge .*3\.mlp\.up_proj with .*gate_proj"),
    ],
)
def test_selection_refuses(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        chosen(table_of(kind), **options)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_16_and_32_bit_float_is_quantized(dtype: str) -> None:
    assert len(chosen(table_of("qwen3_moe", dtype)).quantized) == 3 * (6 * 3 + 4)


def test_fp8_weights_stay_as_they_are() -> None:
    layout, tensors = table_of("qwen3_moe")
    name = "model.layers.0.self_attn.o_proj.weight"
    ref = tensors[name]
    tensors[name] = replace(
        ref, spec=TensorSpec(name, "F8_E4M3", ref.spec.shape), ranges=(ByteRange("m", 0, 64 * 128),)
    )
    selection = select(layout, tensors, Scheme(grid=GRID))
    assert selection.kept["model.layers.0.self_attn.o_proj"] == "dtype F8_E4M3"
    assert "model.layers.1.self_attn.o_proj" not in selection.kept


# -- modules and parts -------------------------------------------------------------------------------------------------


def modules(table: Table, names: Any) -> dict[str, Matrix]:
    return {
        module.name: module for module in matrices_of(*table, names) if module.expert == 2 and module.place.layer == 1
    }


def test_fused_experts_are_seen_as_rows_of_the_fused_tensors() -> None:
    table = table_of("qwen3_5_moe_text")
    stem = "model.layers.1.mlp.experts"
    found = modules(table, "split")
    assert list(found) == [f"{stem}.2.gate_proj", f"{stem}.2.up_proj", f"{stem}.2.down_proj"]
    gate, up, down = found.values()
    one = 32 * 64 * 2  # bytes of a matrix
    assert (gate.weight.spec.shape, up.weight.spec.shape, down.weight.spec.shape) == ((32, 64), (32, 64), (64, 32))
    assert [module.weight.ranges[0].offset for module in (gate, up, down)] == [4 * one, 5 * one, 2 * one]
    assert {r.length for module in (gate, up, down) for r in module.weight.ranges} == {one}
    assert gate.sources == (f"{stem}.gate_up_proj",)
    assert [module.local for module in found.values()] == [f"mlp.experts.{n}_proj" for n in ("gate", "up", "down")]


def test_fused_indexed_names_keep_gate_and_up_as_one() -> None:
    found = modules(table_of("qwen3_5_moe_text"), "fused-indexed")
    assert {name: module.weight.spec.shape for name, module in found.items()} == {
        "model.layers.1.mlp.experts.gate_up_proj.2": (64, 64),
        "model.layers.1.mlp.experts.down_proj.2": (64, 32),
    }
    assert {module.local for module in found.values()} == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_per_expert_tensors_are_joined_for_fused_indexed_names_and_left_alone_otherwise() -> None:
    stem = "model.layers.1.mlp.experts"
    table = table_of("qwen3_moe")
    assert set(modules(table, "split")) == {f"{stem}.2.{name}_proj" for name in ("gate", "up", "down")}
    joined = modules(table, "fused-indexed")
    assert {name: module.sources for name, module in joined.items()} == {
        f"{stem}.gate_up_proj.2": (f"{stem}.2.gate_proj.weight", f"{stem}.2.up_proj.weight"),
        f"{stem}.down_proj.2": (f"{stem}.2.down_proj.weight",),
    }
    both = joined[f"{stem}.gate_up_proj.2"].weight
    assert both.spec.shape == (64, 64)
    assert both.nbytes == sum(piece.length for piece in both.ranges)


def test_norms_convolutions_and_vectors_are_no_modules() -> None:
    names = {module.name for module in matrices_of(*table_of("qwen3_5_moe"))}
    assert not any(re.search("norm|conv1d|A_log|dt_bias|patch_embed", name) for name in names)
    assert {"lm_head", "mtp.fc", "model.language_model.layers.0.mlp.gate"} <= names


@given(
    rows=st.integers(1, 5).map(lambda n: 32 * n),
    columns=st.integers(1, 5).map(lambda n: 128 * n),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([128, 64, 32, -1]),
    scale_grid=st.sampled_from(["fp16", "bf16"]),
    format_=st.sampled_from(TOLD),
    g_idx=st.booleans(),
)
def test_parts_are_what_rounding_returns(
    rows: int, columns: int, bits: Any, group_size: int, scale_grid: Any, format_: Format, g_idx: bool
) -> None:
    grid = Grid(bits=bits, group_size=group_size, scale_grid=scale_grid)
    scheme = Scheme(grid=grid, format=format_, g_idx=g_idx and format_ != "compressed-tensors")
    values = np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(np.float32)
    out, stats = rounding.quantize(values, "F32", grid, layout=Ints.of(scheme).layout, backend="numpy")
    assert stats.ok
    assert Ints.of(scheme).misfit(rows, columns) == ""
    parts = {part.role: part.spec("m") for part in Ints.of(scheme).parts(rows, columns)}
    assert (parts["words"].dtype, parts["words"].shape) == ("I32", out.words.shape)
    assert parts["words"].nbytes == out.words.nbytes
    assert parts["scales"].dtype == ("BF16" if (format_, scale_grid) == ("compressed-tensors", "bf16") else "F16")
    assert (parts["scales"].shape, parts["scales"].nbytes) == (out.scales.shape, out.scales.nbytes)
    if format_ == "compressed-tensors":
        assert set(parts) == {"words", "scales", "shape"}
        assert (parts["shape"].dtype, parts["shape"].shape) == ("I64", (2,))
        return
    assert set(parts) == {"words", "scales", "zeros"} | ({"g_idx"} if g_idx else set())
    assert parts["zeros"].shape == (out.scales.shape[0], rows * bits // 32)
    assert not g_idx or parts["g_idx"].shape == (columns,)


# -- config and files, read as clients do ------------------------------------------------------------------------------

Reader = Callable[[dict[str, Any], str], int]


def bits_on_disk(path: Path, bits: int) -> dict[str, int]:
    """Width of every linear module in the shards, by names and shapes alone; fused experts un-fused."""
    out = {}
    for name, raw in read_checkpoint(path).items():
        module, _, part = name.rpartition(".")
        if part in ("qweight", "weight_packed"):
            out[module] = bits
        elif part in ("gate_up_proj", "down_proj"):
            for expert in range(raw.shape[0]):
                for half in ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,):
                    out[f"{module}.{expert}.{half}"] = 16
        elif part == "weight" and len(raw.shape) == 2 and not re.search("embed|pos_emb", module):
            out[module] = 16
    return out


def in_vllm(module: str) -> str:
    """The name in vLLM: prefixes of the multimodal class; merged linears and routed experts as one."""
    for old, new in (("model.language_model.", "language_model.model."), ("model.visual.", "visual.")):
        if module.startswith(old):
            module = new + module.removeprefix(old)
    return merged(module)


def merged(module: str) -> str:
    module = re.sub(r"\.experts\..*", ".experts", module)
    module = re.sub(r"(?<=\.self_attn\.)[qkv]_proj$", "qkv_proj", module)
    module = re.sub(r"(?<=\.)(gate|up)_proj$", "gate_up_proj", module)
    module = re.sub(r"(?<=\.self_attn\.)(q_a_proj|kv_a_proj_with_mqa)$", "fused_qkv_a_proj", module)
    return re.sub(r"(?<=\.)in_proj_[ab]$", "in_proj_ba", re.sub(r"(?<=\.)in_proj_(qkv|z)$", "in_proj_qkvz", module))


MEMBERS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}


def agreed(widths: list[int], name: str) -> int:
    """The one width of all members of a merged module."""
    assert len(set(widths)) == 1, f"{name}: members differ"
    return widths[0]


def vllm_auto_round(config: dict[str, Any], name: str) -> int:
    """vLLM renames block prefixes, takes a name, its end, or a pattern found in it, members first."""
    blocks = [re.sub(r"^model\.language_model\.", "language_model.model.", b) for b in config["block_name_to_quantize"]]
    extra = config["extra_config"]

    def width(name: str) -> int | None:
        found = [item for key, item in extra.items() if set(key) & set("*+?^$()[]{}|\\") and re.search(key, name)]
        return found[0]["bits"] if found else None

    for key, item in extra.items():
        if name == key or name.endswith(f".{key}"):
            return int(item["bits"])
    default = config["bits"] if any(name.startswith(block) for block in blocks) else 16
    fused = next((key for key in MEMBERS if name.endswith(f".{key}")), None)
    if fused:
        widths = [width(name.replace(fused, member)) for member in MEMBERS[fused]]
        if any(widths):
            return agreed([w or default for w in widths], name)
    return width(name) or default


def sglang_auto_round(config: dict[str, Any], name: str) -> int:
    """SGLang keeps the names of the checkpoint, wants whole matches, and asks members one by one."""
    extra = config["extra_config"]
    default = config["bits"] if name.startswith(tuple(config["block_name_to_quantize"])) else 16

    def width(name: str) -> int:
        if name in extra:
            return int(extra[name]["bits"])
        return next((item["bits"] for key, item in extra.items() if re.fullmatch(key, name)), default)

    fused = next((key for key in MEMBERS if name.endswith(f".{key}")), None)
    return agreed([width(name.replace(fused, m)) for m in MEMBERS[fused]], name) if fused else width(name)


def gptq(config: dict[str, Any], name: str) -> int:
    """vLLM and SGLang: a rule that matches at the start of the name as the client calls it; the head by its own key."""
    if name.endswith("lm_head"):
        return config["bits"] if config["lm_head"] else 16
    for rule in config["dynamic"]:
        assert rule.startswith("-:")
        if re.match(rule[2:], name):
            return 16
    return int(config["bits"])


def compressed(config: dict[str, Any], name: str) -> int:
    """vLLM: names or patterns from the start; the merged name first, then all members; experts by their first one."""

    def ignored(name: str) -> bool:
        return any(re.match(t[3:], name) if t.startswith("re:") else t == name for t in config["ignore"])

    bits = int(config["config_groups"]["group_0"]["weights"]["num_bits"])
    if name.endswith("lm_head"):
        return 16  # no `Linear` in vLLM
    if name.endswith(".experts"):
        return 16 if agreed([ignored(f"{name}.0.{p}_proj") for p in ("gate", "up", "down")], name) else bits
    fused = next((key for key in MEMBERS if name.endswith(f".{key}")), None)
    if not fused or ignored(name):
        return 16 if ignored(name) else bits
    return 16 if agreed([ignored(name.replace(fused, m)) for m in MEMBERS[fused]], name) else bits


def transformers_compressed(config: dict[str, Any], name: str) -> int:
    if any(re.match(t[3:], name) if t.startswith("re:") else t == name for t in config["ignore"]):
        return 16
    return int(config["config_groups"]["group_0"]["weights"]["num_bits"])


CLIENTS: dict[str, list[tuple[Callable[[str], str], Reader]]] = {
    "auto-round": [(in_vllm, vllm_auto_round), (merged, sglang_auto_round)],
    "gptq": [(in_vllm, gptq), (merged, gptq)],
    "compressed-tensors": [(in_vllm, compressed), (merged, compressed), (str, transformers_compressed)],
}

OPTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((kind, {}, {}) for kind in sorted(KIND_SIZES)),
    ("qwen3_5_moe", {"text_only": True}, {}),
    ("qwen3_5_moe", {"mtp": "drop"}, {"grid": Grid(bits=8, group_size=32)}),
    ("qwen3_6_moe", {}, {"keep_16bit": ("*.layers.1.mlp.experts.*", "*.self_attn.*")}),
    ("qwen3_6_moe", {"text_only": True}, {"keep_16bit": ("*.linear_attn.in_proj_qkv", "*.linear_attn.in_proj_z")}),
    (
        "qwen3_5_moe_text",
        {},
        {"grid": Grid(group_size=64), "keep_16bit": ("*.mlp.experts.*",)},
    ),  # other modules do not fit
    ("qwen3_5_moe_text", {}, {"grid": Grid(group_size=-1), "keep_16bit": ("*.3.mlp.shared_expert.*",)}),
    ("qwen3_moe_mixed", {}, {"keep_16bit": ("*.layers.2.mlp.*_proj", "*.layers.4.mlp.*_proj")}),
    ("deepseek_v3", {}, {"keep_16bit": ("*.kv_b_proj", "model.layers.1.mlp.shared_experts.*")}),
    ("deepseek_v3", {"mtp": "drop"}, {"grid": Grid(bits=8, group_size=32)}),
]


def quantized(root: Path, kind: str, view: Mapping[str, Any], scheme: Scheme) -> Path:
    config, tensors = tiny(kind, **KIND_SIZES[kind])
    source = write_checkpoint(root / "source", tensors, config, files={"tokenizer.json": "{}"})
    run(plan_quantize(Checkpoint.open(source), scheme, None, ViewOptions(**view)), root / "out")
    return root / "out"


@pytest.mark.parametrize("format_", TOLD)
@pytest.mark.parametrize(("kind", "view", "options"), OPTIONS)
def test_every_reading_of_the_config_is_what_the_shards_hold(
    kind: str, view: dict[str, Any], options: dict[str, Any], format_: Format, tmp_path: Path
) -> None:
    scheme = Scheme(**{"grid": GRID, **options, "format": format_})
    out = quantized(tmp_path, kind, view, scheme)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    held = bits_on_disk(out, scheme.grid.bits)
    assert set(held.values()) == {scheme.grid.bits, 16}
    resolved = dialects.resolve(config)
    assert {module: resolved.bits_of(module) for module in held} == held
    for rename, reader in CLIENTS[format_]:
        by_name: dict[str, set[int]] = {}
        for module, bits in held.items():
            by_name.setdefault(rename(module), set()).add(bits)
        wrong = {name: bits for name, bits in by_name.items() if bits != {reader(config, name)}}
        assert not wrong, f"{reader.__name__}: {wrong}"


@pytest.mark.oracle
@pytest.mark.parametrize("format_", ["auto-round", "gptq"])
@pytest.mark.parametrize(("kind", "view", "options"), OPTIONS)
def test_auto_rounds_own_reading_is_what_the_shards_hold(
    kind: str, view: dict[str, Any], options: dict[str, Any], format_: Format, tmp_path: Path
) -> None:
    """Over a skeleton of linear layers with the names in the shards."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("auto_round")
    from auto_round.inference.convert_model import get_layer_config
    from transformers import AutoRoundConfig

    scheme = Scheme(**{"grid": GRID, **options, "format": format_})
    out = quantized(tmp_path, kind, view, scheme)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    held = {name: bits for name, bits in bits_on_disk(out, scheme.grid.bits).items() if "mtp" not in name}
    layers = {name: layer for name, layer in held.items() if re.fullmatch(r".*\.layers\.[0-9]+\..*|lm_head", name)}
    if kind == "deepseek_v3":  # transformers has no layer beyond num_hidden_layers
        layers = {name: bits for name, bits in layers.items() if ".layers.3." not in name}
    skeleton = torch.nn.Module()
    for name in layers:
        parent = skeleton
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        if not name.endswith("mlp.gate"):  # routers are no linear layers there
            parent.add_module(name.rpartition(".")[2], torch.nn.Linear(1, 1, device="meta"))
    if format_ == "gptq" and not hasattr(skeleton, "config"):
        config = {**config, "block_name_to_quantize": ["model.layers", "model.language_model.layers"]}
    read = get_layer_config(skeleton, AutoRoundConfig.from_dict(dict(config)))
    linear = {name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name: (read[name].bits if name in read else 16) for name in linear} == {
        name: layers[name] for name in linear
    }
