"""Every defect that clients load in silence, or stumble over, is made here one at a time and must be named.

One checkpoint, one defect: `verify` must report that defect's code at its place, and nothing else. Numbers
such as #3 are those of the list of what users of such checkpoints complain of.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import (
    Raw,
    bf16,
    names_of,
    random_tensor,
    read_shard,
    shard_bytes,
    text_of,
    tiny,
    write_checkpoint,
    write_json,
)

from shardxform.verification import verify

Config = dict[str, Any]
Tensors = dict[str, Raw]
Change = Callable[[Config, Tensors], None]

FILES = {"tokenizer.json": "{}\n", "preprocessor_config.json": "{}\n"}
INDEX = "model.safetensors.index.json"
WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 32}
GROUP = 32
LEFT_OUT = r".*(self_attn|linear_attn|shared_expert|mlp\.gate$|\.mlp\.(gate|up|down)_proj|mtp|visual|lm_head).*"
METHODS: dict[str, Config] = {
    "auto-round": {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": GROUP,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": ["model.layers", "model.language_model.layers"],
        "extra_config": {LEFT_OUT: {"bits": 16, "data_type": "float"}},
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "dynamic": {f"-:{LEFT_OUT}": {}},
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
            }
        },
        "ignore": [f"re:{LEFT_OUT}"],
    },
}


def quantized(method: str = "auto-round", kind: str = "qwen3_5_moe_text", **over: Any) -> tuple[Config, Tensors]:
    """A sound checkpoint whose routed experts are int4."""
    config, tensors = tiny(kind, experts="per-expert", mtp="per-expert", **{**WIDE, **over})
    config["quantization_config"] = json.loads(json.dumps(METHODS[method]))
    for name in names_of(tensors, ".layers.", ".experts.", ".weight"):
        if not name.startswith("mtp."):
            replace_by_int4(tensors, name, method)
    return config, tensors


def replace_by_int4(tensors: Tensors, name: str, method: str = "gptq") -> None:
    """Take a weight out and put random int4 in, packed as `method` does."""
    weight = tensors.pop(name)
    rows, columns = (weight.shape * 2)[:2]
    stem = name.removesuffix("weight")
    if method == "compressed-tensors":
        tensors[f"{stem}weight_packed"] = random_tensor(name, "I32", (rows, columns // 8))
        tensors[f"{stem}weight_scale"] = bf16(np.full((rows, columns // GROUP), 0.01))
        tensors[f"{stem}weight_shape"] = Raw("I64", (2,), np.array([rows, columns], "<i8").tobytes())
        return
    tensors[f"{stem}qweight"] = random_tensor(name, "I32", (columns // 8, rows))
    zeros = np.full((columns // GROUP, rows // 8), 0x77777777, "<i4")
    tensors[f"{stem}qzeros"] = Raw("I32", zeros.shape, zeros.tobytes())
    scales = np.full((columns // GROUP, rows), 0.01, "<f2")
    tensors[f"{stem}scales"] = Raw("F16", scales.shape, scales.tobytes())


def check(root: Path, code: str, where: str, message: str = "", *, warning: bool = False) -> None:
    """The one thing that `verify` finds."""
    report = verify(root)
    found = report.warnings if warning else report.problems
    assert {p.code for p in found} == {code}, found
    assert any(where in p.where and message in p.message for p in found), found
    assert not (report.problems if warning else report.warnings)


@dataclass
class Defect:
    """A change that makes exactly one thing wrong, and what must be said of it."""

    change: Change
    code: str
    where: str
    message: str = ""
    kind: str = "qwen3_5_moe_text"
    over: Config = field(default_factory=dict)
    method: str = ""
    warning: bool = False


def drop(*fragments: str) -> Change:
    """Remove every tensor whose name has all fragments."""

    def change(_: Config, tensors: Tensors) -> None:
        names = names_of(tensors, *fragments)
        assert names
        for name in names:
            del tensors[name]

    return change


def resize(fragment: str, rows: int) -> Change:
    """Give tensors another first dimension."""

    def change(_: Config, tensors: Tensors) -> None:
        assert names_of(tensors, fragment)
        for name in names_of(tensors, fragment):
            tensors[name] = random_tensor(name, tensors[name].dtype, (rows, *tensors[name].shape[1:]))

    return change


def add(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> Change:
    return lambda _, tensors: tensors.update({name: random_tensor(name, dtype, shape)})


def rename(old: str, new: str) -> Change:
    def change(_: Config, tensors: Tensors) -> None:
        assert names_of(tensors, old)
        for name in names_of(tensors, old):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def to_int4(*fragments: str) -> Change:
    def change(_: Config, tensors: Tensors) -> None:
        names = [name for name in names_of(tensors, *fragments) if name.endswith("weight")]
        assert names
        for name in names:
            replace_by_int4(tensors, name)

    return change


def set_text(**keys: Any) -> Change:
    return lambda config, _: text_of(config).update(keys)


def set_top(**keys: Any) -> Change:
    return lambda config, _: config.update(keys)


def set_quantization(**keys: Any) -> Change:
    return lambda config, _: config["quantization_config"].update(keys)


def unset_quantization(key: str) -> Change:
    return lambda config, _: config["quantization_config"].pop(key)


def seed_spelling(_: Config, tensors: Tensors) -> None:
    """`experts.{id}.down_proj.*` -> `experts.down_proj.{id}.*`, gate and up as one."""
    for name in names_of(tensors, ".experts."):
        home, _, rest = name.partition(".experts.")
        expert, projection, part = rest.split(".")
        if projection == "up_proj":
            continue
        tensor = tensors.pop(name)
        if projection == "gate_proj":
            both = [tensor.array(), tensors.pop(name.replace("gate_proj", "up_proj")).array()]
            joined = np.concatenate(both, axis=1)
            tensor, projection = Raw(tensor.dtype, joined.shape, joined.tobytes()), "gate_up_proj"
        tensors[f"{home}.experts.{projection}.{expert}.{part}"] = tensor


def gate_up_per_expert(_: Config, tensors: Tensors) -> None:
    for name in names_of(tensors, ".experts."):
        tensor = tensors.pop(name)
        if ".up_proj." not in name:
            tensors[name.replace(".gate_proj.", ".gate_up_proj.")] = tensor


def fuse_experts(config: Config, tensors: Tensors) -> None:
    """Plain 3-D experts under a config that declares them quantized."""
    config["quantization_config"] = METHODS["auto-round"]
    assert names_of(tensors, "experts.gate_up_proj")


def one_plain_expert(_: Config, tensors: Tensors) -> None:
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"model.layers.1.mlp.experts.3.down_proj.{part}"]
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name] = random_tensor(name, "BF16", (64, 32))


def all_plain(_: Config, tensors: Tensors) -> None:
    for name in names_of(tensors, ".experts.", ".qweight"):
        stem = name.removesuffix("qweight")
        words, rows = tensors[name].shape
        for part in ("qweight", "qzeros", "scales"):
            del tensors[stem + part]
        tensors[stem + "weight"] = random_tensor(name, "BF16", (rows, words * 8))


def mtp_with_old_count(_: Config, tensors: Tensors) -> None:
    """The trunk is pruned to 8 experts, the MTP layer keeps 16."""
    tensors["mtp.layers.0.mlp.gate.weight"] = random_tensor("r", "BF16", (16, 16))
    for expert in range(8, 16):
        for name in names_of(list(tensors), "mtp.layers.0.mlp.experts.0."):
            tensors[name.replace(".0.mlp.experts.0.", f".0.mlp.experts.{expert}.")] = tensors[name]


def poke(name: str, position: int, bits: int) -> Change:
    def change(_: Config, tensors: Tensors) -> None:
        tensor = tensors[name]
        values = tensor.array().copy().reshape(-1)
        values.view(f"<u{values.itemsize}")[position] = bits
        tensors[name] = Raw(tensor.dtype, tensor.shape, values.tobytes())

    return change


def zero_rows(name: str, rows: slice) -> Change:
    def change(_: Config, tensors: Tensors) -> None:
        values = tensors[name].array().copy()
        values[rows] = 0
        tensors[name] = Raw(tensors[name].dtype, tensors[name].shape, values.tobytes())

    return change


MULTI = "qwen3_5_moe"
L = "model.layers"
DEFECTS = {
    # missing (#10): what vLLM and SGLang load in silence
    "one expert of every layer": Defect(
        drop(".experts.5."), "missing", "layers 0..2, expert 5", "{gate_proj,up_proj,down_proj}", kind="qwen3_moe"
    ),
    "one expert of one layer": Defect(
        drop("layers.1.", ".experts.5."), "missing", "layer 1, expert 5", "(3 tensors)", kind="qwen3_moe"
    ),
    "one projection of one expert": Defect(
        drop("layers.1.", ".experts.5.up_proj"), "missing", f"{L}.1.mlp.experts.5.up_proj.weight", kind="qwen3_moe"
    ),
    "all experts of a layer": Defect(
        drop("layers.1.", ".experts."), "missing", "layer 1, all experts", "(18 tensors)", kind="qwen3_moe"
    ),
    "all experts of a fused layer": Defect(drop("layers.2.", ".experts."), "missing", "layer 2", "all experts missing"),
    "all experts of all layers": Defect(drop(".experts."), "missing", "layers 0..3", "all experts missing"),
    "the router of a layer": Defect(drop("layers.2.mlp.gate."), "missing", f"{L}.2.mlp.gate.weight"),
    "the final norm": Defect(drop("model.norm.weight"), "missing", "model.norm.weight"),
    "a whole layer": Defect(drop("layers.3."), "missing", "layer 3", " more (13 tensors)"),
    "vision tensors": Defect(drop("visual.blocks.", "attn.qkv"), "missing", "vision blocks 0..1", kind=MULTI),
    "a vision tensor": Defect(drop("visual.pos_embed"), "missing", "model.visual.pos_embed.weight", kind=MULTI),
    "expert of a quantized layer": Defect(
        drop("layers.1.", ".experts.5."), "missing", "layer 1, expert 5", "(9 tensors)", method="auto-round"
    ),
    "qzeros of one expert": Defect(
        drop("layers.1.", ".experts.5.up_proj.qzeros"),
        "missing",
        f"{L}.1.mlp.experts.5.up_proj.qzeros",
        method="auto-round",
    ),
    "qweight of one expert": Defect(
        drop("layers.1.", ".experts.5.up_proj.qweight"),
        "missing",
        f"{L}.1.mlp.experts.5.up_proj.qweight",
        method="gptq",
    ),
    "weight_shape of one expert": Defect(
        drop("layers.1.", ".experts.5.up_proj.weight_shape"),
        "missing",
        f"{L}.1.mlp.experts.5.up_proj.weight_shape",
        method="compressed-tensors",
    ),
    "e_score_correction_bias": Defect(
        drop("layers.1.", "e_score"), "missing", f"{L}.1.mlp.gate.e_score_correction_bias", kind="deepseek_v3"
    ),
    # unexpected (#10)
    "an unknown tensor": Defect(
        add("model.extra.weight", (4, 4)), "unknown", "model.extra.weight", "unknown", warning=True
    ),
    "an unknown tensor of experts": Defect(
        add(f"{L}.1.mlp.experts.down_bias", (8, 16)), "stray", "experts.down_bias", "looks like a part of experts"
    ),
    "an unknown bias of the router": Defect(
        add(f"{L}.1.mlp.gate.bias", (8,)), "stray", "mlp.gate.bias", "looks like a part of a router"
    ),
    "an unknown part of a quantized weight": Defect(
        add(f"{L}.3.self_attn.q_proj.weight.absmax", (8,)), "stray", "absmax", "looks like a part of a quantized weight"
    ),
    "a nested prefix": Defect(  # (#2)
        add("model.language_model.language_model.layers.0.mlp.gate.weight", (8, 16)),
        "stray",
        "model.language_model.language_model.layers.0.mlp.gate.weight",
        kind=MULTI,
    ),
    "an expert beyond the count": Defect(
        add(f"{L}.1.mlp.experts.6.up_proj.weight", (12, 16)),
        "expert-range",
        f"{L}.1.mlp.experts.6.up_proj.weight",
        "beyond the 6 experts",
        kind="qwen3_moe",
    ),
    "a layer beyond the count": Defect(
        add(f"{L}.4.mlp.gate.weight", (8, 16)), "layer-range", f"{L}.4.mlp.gate.weight", "beyond the 4 layers"
    ),
    "linear attention in a full attention layer": Defect(
        add(f"{L}.3.linear_attn.A_log", (4,), "F32"), "stray", f"{L}.3.linear_attn.A_log", "no such tensor"
    ),
    "experts in a dense layer": Defect(
        add(f"{L}.0.mlp.gate.weight", (8, 16)), "stray", f"{L}.0.mlp.gate.weight", kind="deepseek_v3"
    ),
    "both spellings in a block": Defect(
        add(f"{L}.1.mlp.experts.0.up_proj.weight", (12, 16)), "spelling", f"{L}.1.mlp.experts.0.up_proj.weight"
    ),
    "one fused tensor in a per-expert block": Defect(
        add(f"{L}.1.mlp.experts.down_proj", (6, 16, 12)), "spelling", f"{L}.1.mlp.experts.down_proj", kind="qwen3_moe"
    ),
    "a stale weight beside int4": Defect(
        add(f"{L}.1.mlp.experts.2.up_proj.weight", (32, 64)),
        "stray",
        f"{L}.1.mlp.experts.2.up_proj.weight",
        "beside its quantized form",
        method="gptq",
    ),
    # counts (#7)
    "router rows of one layer": Defect(
        resize("layers.1.mlp.gate.weight", 6), "expert-count", f"{L}.1.mlp.gate.weight", "6 experts, but"
    ),
    "routers not sliced": Defect(resize("mlp.gate.weight", 16), "expert-count", "layers 0..3", "16 experts, but"),
    "num_experts not updated": Defect(set_text(num_experts=16), "expert-count", "layers 0..3", "config.json says 16"),
    "fused experts of one layer": Defect(
        resize("layers.1.mlp.experts.down_proj", 7), "expert-count", f"{L}.1.mlp.experts.down_proj"
    ),
    "correction bias not sliced": Defect(
        resize("layers.1.mlp.gate.e_score", 4), "expert-count", f"{L}.1.mlp.gate.e_score", kind="deepseek_v3"
    ),
    "fewer experts than top-k": Defect(set_text(num_experts_per_tok=9), "config", "config.json", "num_experts_per_tok"),
    "no expert count": Defect(lambda c, _: c.pop("num_experts"), "config", "config.json", "missing the expert count"),
    "two expert counts": Defect(set_top(num_local_experts=7), "config", "config.json", "disagree", kind="qwen3_moe"),
    "count at the top of a multimodal config": Defect(
        set_top(num_experts=8), "config", "config.json", "num_experts counts experts where", kind=MULTI
    ),
    "no layer count": Defect(lambda c, _: c.pop("num_hidden_layers"), "config", "config.json", "num_hidden_layers"),
    "absurd counts": Defect(set_text(num_experts=900_000), "config", "config.json", "absurd", kind="qwen3_moe"),
    "a size that is no number": Defect(set_text(hidden_size="16"), "config", "config.json", "hidden_size, found '16'"),
    "a head count of zero": Defect(
        lambda c, _: c.update(num_attention_heads=0, head_dim=None),
        "config",
        "config.json",
        "by zero",
        kind="qwen3_moe",
    ),
    "another hidden size in one tensor": Defect(
        add(f"{L}.1.mlp.shared_expert_gate.weight", (1, 8)), "shape", f"{L}.1.mlp.shared_expert_gate.weight", "[1, 16]"
    ),
    "groups that do not divide": Defect(set_text(n_group=3), "config", "config.json", "n_group", kind="deepseek_v3"),
    "groups of one expert": Defect(
        set_text(n_group=8, topk_group=4), "groups", "config.json", "two to score", kind="deepseek_v3"
    ),
    "top-k beyond the picked groups": Defect(
        set_text(num_experts_per_tok=6), "groups", "config.json", "hold 4 experts", kind="deepseek_v3"
    ),
    "more groups picked than there are": Defect(
        set_text(topk_group=3), "groups", "config.json", "topk_group", kind="deepseek_v3"
    ),
    # class, model_type, prefix (#6)
    "architecture of the other class": Defect(
        set_top(architectures=["Qwen3_5MoeForConditionalGeneration"]), "class", "config.json", "Qwen3_5MoeForCausalLM"
    ),
    "architectures is no list": Defect(set_top(architectures=5), "class", "config.json", "found 5"),
    "unknown model_type": Defect(set_top(model_type="gpt"), "class", "config.json", "not a known family"),
    "no architectures": Defect(
        lambda c, _: c.pop("architectures"), "class", "config.json", "architectures is missing", warning=True
    ),
    "multimodal prefix under the text-only class": Defect(
        rename("model.", "model.language_model."), "prefix", "model.language_model.", "another class's prefix"
    ),
    "text-only prefix under the multimodal class": Defect(
        rename("model.language_model.", "model."), "prefix", "model.", "another class's prefix", kind=MULTI
    ),
    "vision tower under the text-only class": Defect(
        add("model.visual.patch_embed.proj.weight", (12, 3, 2, 2, 2)), "vision", "model.visual.patch_embed.proj.weight"
    ),
    "no vision_config": Defect(
        lambda c, _: c.pop("vision_config"), "config", "config.json", "vision_config", kind=MULTI
    ),
    # multi-token prediction (#8)
    "mtp with another expert count": Defect(mtp_with_old_count, "mtp", "mtp.layers.0.mlp.gate.weight", kind=MULTI),
    "fused mtp with another expert count": Defect(
        resize("mtp.layers.0.mlp.experts.down_proj", 16),
        "mtp",
        "mtp.layers.0.mlp.experts.down_proj",
        kind="qwen3_6_moe",
    ),
    "half of the mtp layer": Defect(drop("mtp.layers.0.self_attn"), "mtp", "MTP layer 0", "missing", kind=MULTI),
    "mtp without its root": Defect(drop("mtp.fc.weight"), "mtp", "mtp.fc.weight", "missing", kind=MULTI),
    "mtp present but undeclared": Defect(set_text(mtp_num_hidden_layers=0), "mtp", "mtp.", "no mtp_num", kind=MULTI),
    "mtp declared but absent": Defect(drop("mtp."), "mtp-absent", "config.json", warning=True, kind=MULTI),
    "mtp of deepseek undeclared": Defect(
        set_text(num_nextn_predict_layers=0), "layer-range", "layer 3", "0 MTP layers", kind="deepseek_v3"
    ),
    "a second mtp layer": Defect(add("mtp.layers.1.mlp.gate.weight", (8, 16)), "mtp", "mtp.layers.1.", kind=MULTI),
    # spelling (#1)
    "seed-era spelling": Defect(
        seed_spelling, "seed-spelling", "layers 0..3", "auto-round before 0.12", method="auto-round"
    ),
    "gate_up_proj per expert": Defect(
        gate_up_per_expert, "seed-spelling", "layers 0..3", "no client loads", method="auto-round"
    ),
    # quantization (#2, #3, #4, #5, #11)
    "3-D experts declared quantized": Defect(fuse_experts, "not-quantized", "layers 0..3", "auto-round"),
    "plain experts declared quantized": Defect(
        all_plain, "not-quantized", "layers 0..3, all experts", "16 bits", method="auto-round"
    ),
    "plain experts declared gptq": Defect(all_plain, "not-quantized", "layers 0..3, all experts", method="gptq"),
    "plain mtp experts declared quantized": Defect(
        set_quantization(dynamic={"-:" + LEFT_OUT.replace("mtp|", ""): {}, r"-:mtp\.(fc|.*self_attn).*": {}}),
        "not-quantized",
        "MTP layer 0, all experts",
        kind=MULTI,
        method="gptq",
    ),
    "quantized without quantization_config": Defect(
        lambda c, _: c.pop("quantization_config"), "undeclared", ".qweight", "96 modules", method="auto-round"
    ),
    "quantized but declared 16-bit": Defect(
        set_quantization(dynamic={f"-:{LEFT_OUT}": {}, r"-:.*layers\.2\..*": {}}),
        "undeclared",
        "layer 2, all experts",
        method="gptq",
    ),
    "quantized but ignored": Defect(
        set_quantization(ignore=[f"re:{LEFT_OUT}", r"re:.*\.layers\.2\.mlp\.experts\..*"]),
        "undeclared",
        "layer 2, all experts",
        method="compressed-tensors",
    ),
    "gptq tensors declared compressed-tensors": Defect(
        lambda c, _: c.update(quantization_config=METHODS["compressed-tensors"]),
        "quantization-kind",
        "layers 0..3, all experts",
        method="gptq",
    ),
    **{
        f"{what} quantized": Defect(to_int4(name), "quantized", where, "16 bits", over=WIDE, method="gptq")
        for what, name, where in (
            ("a router", "layers.1.mlp.gate.", f"{L}.1.mlp.gate.qweight"),
            ("shared_expert_gate", "shared_expert_gate", "layers 0..3"),
            ("embeddings", "embed_tokens", "model.embed_tokens."),
            ("a norm", "layers.1.input_layernorm", f"{L}.1.input_layernorm."),
            ("conv1d", "conv1d", "layers 0..2"),
            ("in_proj_a", "in_proj_a", "layers 0..2"),
            ("in_proj_b", "in_proj_b", "layers 0..2"),
        )
    },
    "A_log as integers": Defect(add(f"{L}.0.linear_attn.A_log", (4,), "I32"), "quantized", f"{L}.0.linear_attn.A_log"),
    "one expert plain": Defect(
        one_plain_expert, "merged", "layer 1", "down_proj of expert 3 is 16-bit, the others are gptq", method="gptq"
    ),
    "q_proj quantized, k and v not": Defect(
        to_int4("layers.3.self_attn.q_proj"), "merged", "layer 3", "self_attn.q_proj gptq", method="gptq"
    ),
    "in_proj_qkv quantized, in_proj_z not": Defect(
        to_int4("layers.0.linear_attn.in_proj_qkv"), "merged", "layer 0", "linear_attn.in_proj_z 16-bit", method="gptq"
    ),
    "shared gate_proj quantized, up_proj not": Defect(
        to_int4("layers.2.mlp.shared_expert.gate_proj"), "merged", "layer 2", "up_proj 16-bit", method="gptq"
    ),
    **{
        f"{method} without {key}": Defect(
            unset_quantization(key), "quantization-config", "config.json", f"{key}: missing", method=method
        )
        for method, keys in {
            "gptq": ("bits", "group_size", "desc_act", "sym"),
            "auto-round": ("bits", "group_size", "sym", "packing_format"),
            "compressed-tensors": ("config_groups", "format"),
        }.items()
        for key in keys
    },
    "no quant_method": Defect(
        unset_quantization("quant_method"), "quantization-config", "config.json", "quant_method", method="gptq"
    ),
    "quantization_config is no object": Defect(set_top(quantization_config=[]), "quantization-config", "config.json"),
    "gptq asymmetric": Defect(
        set_quantization(sym=False),
        "quantization-config",
        "config.json",
        "sym: false (4 bits)",
        method="gptq",
        warning=True,
    ),
    "unknown packing_format": Defect(
        set_quantization(packing_format="qigen"), "quantization-config", "config.json", "qigen", method="auto-round"
    ),
    # numbers (#9)
    "float16": Defect(set_text(dtype="float16"), "float16", "config.json", "overflows"),
    "float16 at the top": Defect(set_top(torch_dtype="float16"), "float16", "config.json", "torch_dtype", kind=MULTI),
    "float16 in text_config": Defect(set_text(dtype="float16"), "float16", "config.json", "text_config.", kind=MULTI),
    "NaN in a fused expert": Defect(
        poke(f"{L}.1.mlp.experts.gate_up_proj", 3 * 24 * 16 + 5, 0x7FC0),
        "not-finite",
        f"{L}.1.mlp.experts.gate_up_proj",
        "1 of 3072 values are NaN or infinite, the first at 1157 (expert 3)",
    ),
    "infinity in an expert": Defect(
        poke(f"{L}.1.mlp.experts.5.up_proj.weight", 7, 0xFF80),
        "not-finite",
        f"{L}.1.mlp.experts.5.up_proj.weight",
        "the first at 7",
        kind="qwen3_moe",
    ),
    "NaN in float32": Defect(
        poke(f"{L}.0.linear_attn.A_log", 3, 0xFFC00000), "not-finite", f"{L}.0.linear_attn.A_log", "the first at 3"
    ),
    "NaN in a router row": Defect(
        poke(f"{L}.2.mlp.gate.weight", 6 * 16, 0x7F81), "not-finite", f"{L}.2.mlp.gate.weight", "(expert 6)"
    ),
    "infinite scale": Defect(
        poke(f"{L}.2.mlp.experts.1.up_proj.scales", 2, 0x7C00),
        "not-finite",
        f"{L}.2.mlp.experts.1.up_proj.scales",
        method="gptq",
    ),
    "experts of zeros": Defect(
        zero_rows(f"{L}.1.mlp.experts.down_proj", slice(2, 5)),
        "zero",
        f"{L}.1.mlp.experts.down_proj",
        "experts 2..4",
        warning=True,
    ),
    "a fused tensor of zeros": Defect(
        zero_rows(f"{L}.1.mlp.experts.down_proj", slice(None)),
        "zero",
        f"{L}.1.mlp.experts.down_proj",
        "every value is zero",
        warning=True,
    ),
    "a tensor of zeros": Defect(
        zero_rows(f"{L}.1.mlp.experts.2.up_proj.weight", slice(None)),
        "zero",
        f"{L}.1.mlp.experts.2.up_proj.weight",
        warning=True,
        kind="qwen3_moe",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_names_the_defect_and_nothing_else(name: str, tmp_path: Path) -> None:
    defect = DEFECTS[name]
    if defect.method:
        config, tensors = quantized(defect.method, defect.kind, **defect.over)
    else:
        config, tensors = tiny(defect.kind, **defect.over)
    defect.change(config, tensors)
    if defect.code in ("quantized", "merged") and defect.method:  # what is stored quantized is declared so, too
        plain = [name.removesuffix(".weight") for name in tensors if name.endswith(".weight")]
        config["quantization_config"]["dynamic"] = {f"-:{re.escape(name)}$": {} for name in plain}
    root = write_checkpoint(tmp_path / "out", tensors, config, shards=2, files=FILES)
    found = verify(root)
    listed = found.warnings if defect.warning else found.problems
    also = {"merged"} if name in ("in_proj_a quantized", "in_proj_b quantized") else set()
    assert {p.code for p in listed} - also == {defect.code}, listed
    assert any(defect.where in p.where and defect.message in p.message for p in listed), listed
    assert not (found.problems if defect.warning else found.warnings)


# -- files: the same, made in the directory -----------------------------------------------------------------------

SHARD = "model-00002-of-00002.safetensors"


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit_index(root: Path, change: Callable[[Any], object]) -> None:
    index = json.loads((root / INDEX).read_text())
    change(index)
    write_json(root / INDEX, index)


def duplicate(root: Path) -> None:
    """As published quantizations had it (#10): the same key in two shards."""
    first = root / SHARD.replace("00002-of", "00001-of")
    tensors = read_shard(root / SHARD)
    other = read_shard(first)
    home = "model.language_model.embed_tokens.weight"
    (root / SHARD).write_bytes(shard_bytes({**tensors, home: other[home]}))


FILE_DEFECTS: dict[str, tuple[Callable[[Path], object], str, str, str, bool]] = {
    "truncated shard": (lambda r: cut(r / SHARD, -10), "shard", SHARD, "truncated", False),
    "shard of five bytes": (lambda r: cut(r / SHARD, 5), "shard", SHARD, "too short", False),
    "missing shard": (lambda r: (r / SHARD).unlink(), "shard", SHARD, "missing", False),
    "bytes after the data": (
        lambda r: (r / SHARD).write_bytes((r / SHARD).read_bytes() + b"\0"),
        "shard",
        SHARD,
        "longer",
        False,
    ),
    "header that is no JSON": (
        lambda r: (r / SHARD).write_bytes(b"\x08" + bytes(7) + b"{'a': 1}"),
        "shard",
        SHARD,
        "not JSON",
        False,
    ),
    "a tensor in two shards": (
        lambda r: duplicate(r),
        "duplicate",
        SHARD,
        "'model.language_model.embed_tokens.weight' is also in model-00001",
        False,
    ),
    "index names the other shard": (
        lambda r: edit_index(r, lambda i: i["weight_map"].update({"model.language_model.embed_tokens.weight": SHARD})),
        "index",
        INDEX,
        "embed_tokens.weight' should be in",
        False,
    ),
    "index lacks a tensor": (
        lambda r: edit_index(r, lambda i: i["weight_map"].pop("mtp.norm.weight")),
        "index",
        INDEX,
        "'mtp.norm.weight' is in",
        False,
    ),
    "index leads outside": (
        lambda r: edit_index(r, lambda i: i["weight_map"].update({"model.norm.weight": "../x.safetensors"})),
        "index",
        INDEX,
        "expected a plain .safetensors",
        False,
    ),
    "index is no JSON": (lambda r: (r / INDEX).write_text("{"), "index", INDEX, "not JSON", False),
    "index names no file that can be": (
        lambda r: edit_index(r, lambda i: i["weight_map"].update(x="\ud800.safetensors")),
        "index",
        INDEX,
        "surrogate",
        False,
    ),
    "total_size of zero": (
        lambda r: edit_index(r, lambda i: i["metadata"].update(total_size=0)),
        "total-size",
        INDEX,
        "total_size is 0",
        True,
    ),
    "no config": (lambda r: (r / "config.json").unlink(), "config", ".", "no config.json", False),
    "config is no JSON": (lambda r: (r / "config.json").write_text("x"), "config", "config.json", "not JSON", False),
    "a shard that no index names": (
        lambda r: shutil.copy(r / SHARD, r / "old.safetensors"),
        "stray-shard",
        "old.safetensors",
        "",
        False,
    ),
    "a partial shard": (
        lambda r: (r / "model-00003-of-00003.safetensors.partial").touch(),
        "unfinished",
        ".partial",
        "again",
        False,
    ),
    "a work directory": (lambda r: (r / ".shardxform").mkdir(), "unfinished", ".shardxform", "", False),
    "no tokenizer": (lambda r: (r / "tokenizer.json").unlink(), "tokenizer", ".", "", True),
    "no preprocessor_config.json": (
        lambda r: (r / "preprocessor_config.json").unlink(),
        "preprocessor",
        ".",
        "vLLM",
        True,
    ),
    "a sidecar that leads nowhere": (
        lambda r: (r / "merges.txt").symlink_to("nowhere"),
        "sidecar",
        "merges.txt",
        "No such file",
        False,
    ),
}


@pytest.mark.parametrize("name", FILE_DEFECTS)
def test_names_the_defective_file_and_nothing_else(name: str, tmp_path: Path) -> None:
    change, code, where, message, warning = FILE_DEFECTS[name]
    config, tensors = tiny(MULTI)
    root = write_checkpoint(tmp_path / "out", tensors, config, shards=2, files=FILES)
    change(root)
    check(root, code, where, message, warning=warning)


def test_names_everything_that_is_wrong_at_once(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    for name in ("one expert of one layer", "an unknown tensor"):
        DEFECTS[name].change(config, tensors)
    poke("model.layers.0.mlp.experts.5.up_proj.weight", 7, 0xFF80)(config, tensors)
    root = write_checkpoint(tmp_path / "out", tensors, {**config, "dtype": "float16"}, files={})
    report = verify(root)
    assert {p.code for p in report.problems} == {"missing", "not-finite"}
    assert [p.code for p in report.warnings] == ["unknown", "tokenizer"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_moe_mixed"])
def test_a_sound_quantized_checkpoint_is_sound(method: str, kind: str, tmp_path: Path) -> None:
    config, tensors = quantized(method, kind)
    root = write_checkpoint(tmp_path / "out", tensors, config, shards=3, files=FILES)
    report = verify(root)
    assert (report.problems, report.warnings) == ((), ())
