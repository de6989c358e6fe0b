"""What headers and config tell is said by the plan, before any work: refused with a way out, or noted."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, read_checkpoint, tiny, write_checkpoint
from click.testing import CliRunner
from test_prune import manifest_of
from test_quantize import KIND_SIZES, SCHEME

from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import FamilyError, PlanError, SchemeError, ShardxformError
from shardxform.execution.runner import run
from shardxform.formats.scheme import FORMATS, Format, Grid
from shardxform.plan.convert import Target, plan_convert
from shardxform.plan.plan import Plan
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions
from shardxform.verification import verify

TOLD = FORMATS[:3]
"""Formats whose config says which modules are quantized; that of mlx leaves it to the shards."""

DROP = ViewOptions(mtp="drop")
EXPERTS = ("*.mlp.experts.*",)


def made(root: Path, kind: str = "qwen3_5_moe_text", config: Mapping[str, Any] | None = None, **tensors: Any) -> Path:
    """A tiny checkpoint of sizes that can be quantized; `config` is put over its own, a tensor of None is left out."""
    whole, table = tiny(kind, **KIND_SIZES[kind])
    changed = {name: t for name, t in {**table, **tensors}.items() if t is not None}
    return write_checkpoint(root, changed, {**whole, **(config or {})}, files={"tokenizer.json": "{}"})


def of(root: Path, **options: Any) -> Plan:
    return plan_quantize(Checkpoint.open(root), SCHEME, **options)


def as_float8(tensor: Raw) -> Raw:
    return Raw("F8_E4M3", tensor.shape, bytes(len(tensor.data) // 2))


# -- experts that stay in 16 bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format_", TOLD)
@pytest.mark.parametrize("spelling", ["fused", "per-expert"])
def test_experts_that_all_stay_16_bit_are_stored_as_the_formats_loader_takes_them(
    format_: Format, spelling: str, tmp_path: Path
) -> None:
    """auto-round's loader un-fuses every block, and leaves fused experts as random as it made them."""
    kind = "qwen3_5_moe_text"
    config, tensors = tiny(kind, experts=spelling, **KIND_SIZES[kind])
    root = write_checkpoint(tmp_path / "s", tensors, config, files={"tokenizer.json": "{}"})
    out = tmp_path / "out"
    run(plan_quantize(Checkpoint.open(root), replace(SCHEME, format=format_, keep_16bit=EXPERTS)), out)
    experts = {name for name in read_checkpoint(out) if ".experts." in name}
    split = {f"model.layers.{at}.mlp.experts.{e}.{p}_proj.weight" for at in range(4) for e in range(8) for p in PARTS}
    fused = {f"model.layers.{at}.mlp.experts.{p}" for at in range(4) for p in ("gate_up_proj", "down_proj")}
    assert experts == (fused if format_ == "compressed-tensors" and spelling == "fused" else split)
    assert verify(out, source=root).sound


PARTS = ("gate", "up", "down")


@pytest.mark.parametrize("format_", ["auto-round", "gptq"])
def test_convert_unfuses_experts_that_all_stay_16_bit(format_: Format, tmp_path: Path) -> None:
    root, first, out = made(tmp_path / "s"), tmp_path / "first", tmp_path / "out"
    run(plan_quantize(Checkpoint.open(root), replace(SCHEME, format="compressed-tensors", keep_16bit=EXPERTS)), first)
    assert "model.layers.0.mlp.experts.down_proj" in read_checkpoint(first)
    run(plan_convert(Checkpoint.open(first), Target(format=format_)), out)
    stored, source = read_checkpoint(out), read_checkpoint(root)
    assert not [name for name in stored if re.search(r"experts\.(gate_up|down)_proj", name)]
    up = source["model.layers.2.mlp.experts.gate_up_proj"].array()[3, 32:]
    assert np.array_equal(stored["model.layers.2.mlp.experts.3.up_proj.weight"].array(), up)
    assert verify(out, source=first).sound


# -- weights that are quantized, or said to be ------------------------------------------------------------------------


def test_quantized_weights_that_nothing_declares_are_refused_or_noted(tmp_path: Path) -> None:
    table = tiny("qwen3_5_moe_text", **KIND_SIZES["qwen3_5_moe_text"])[1]
    some = {name: as_float8(t) for name, t in table.items() if ".experts." in name}
    root = made(tmp_path / "s", **some)
    with pytest.raises(SchemeError, match=r"experts\.\w+' is F8_E4M3, and 7 tensors more: .* 16-bit checkpoint"):
        of(root)
    assert any("8 tensors of quantized weights" in n for n in plan_prune(Checkpoint.open(root), None).notes)
    scale = {"model.layers.0.mlp.shared_expert.up_proj.weight_scale_inv": Raw("F32", (1, 1), bytes(4))}
    with pytest.raises(SchemeError, match=r"weight_scale_inv' is F32: quantized weights"):
        of(made(tmp_path / "scale", **scale))


def test_float8_weights_that_are_dropped_are_no_obstacle(tmp_path: Path) -> None:
    table = tiny("qwen3_5_moe", **KIND_SIZES["qwen3_5_moe"])[1]
    some = {name: as_float8(t) for name, t in table.items() if name.startswith("mtp.layers") and "proj" in name}
    root = made(tmp_path / "s", "qwen3_5_moe", **some)
    with pytest.raises(SchemeError, match="F8_E4M3"):
        of(root)
    assert not of(root, options=DROP).summary["dropped"].keys() - {"MTP layers"}


LEFT = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False},
    {"group_size": 64, "bits": 4},  # MLX's
    {"quant_method": "fp8"},
    "gptq",
]


@pytest.mark.parametrize("declared", LEFT)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_a_declaration_without_quantized_tensors_is_called_so_and_removing_it_works(
    key: str, declared: Any, tmp_path: Path
) -> None:
    root = made(tmp_path / "s", config={key: declared})
    with pytest.raises(SchemeError, match=rf"{key} declares quantized weights, .* remove {key} from config\.json"):
        of(root)
    assert any("declares quantized weights, but" in n for n in plan_prune(Checkpoint.open(root), None).notes)
    if key == "quantization_config":
        with pytest.raises(SchemeError, match=r"no tensor is quantized: remove it from config\.json"):
            plan_convert(Checkpoint.open(root), Target(format="bf16"))
    config = json.loads((root / "config.json").read_text())
    del config[key]
    (root / "config.json").write_text(json.dumps(config))
    assert of(root).summary["quantized_modules"]


def test_a_source_that_is_quantized_is_sent_where_there_is_a_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(of(made(tmp_path / "s")), out)
    with pytest.raises(SchemeError, match=r"nothing to round: .* already; see `shardxform convert`"):
        of(out)
    assert plan_convert(Checkpoint.open(out), Target(format="bf16")).shards
    config = json.loads((out / "config.json").read_text())
    for method in ("fp8", "bitsandbytes", None):
        config["quantization_config"]["quant_method"] = method
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(SchemeError, match=r"quantized already, .* start from a 16-bit checkpoint") as refused:
            of(out)
        assert "convert`" not in str(refused.value)


# -- group sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "size", "fits"), [(192, 128, 64), (96, 128, 32), (96, 64, 32), (160, 64, 32)])
def test_experts_that_fill_no_group_are_refused_with_the_group_size_that_fits(
    width: int, size: Any, fits: int, tmp_path: Path
) -> None:
    sizes = {**KIND_SIZES["qwen3_moe"], "hidden_size": 128, "moe_intermediate_size": width}
    config, tensors = tiny("qwen3_moe", **sizes)
    source = Checkpoint.open(write_checkpoint(tmp_path / "s", tensors, config))
    said = rf"no routed expert can be quantized: .*down_proj: {width} input channels .*; `group_size` {fits} fits"
    with pytest.raises(SchemeError, match=said):
        plan_quantize(source, replace(SCHEME, grid=Grid(group_size=size)))
    fitting: Any = fits
    assert plan_quantize(source, replace(SCHEME, grid=Grid(group_size=fitting))).notes == ()
    kept = plan_quantize(source, replace(SCHEME, grid=Grid(group_size=size), keep_16bit=EXPERTS))
    assert kept.summary["kept_modules"]["on request"] == 3 * 6 * 3


def test_experts_of_4_bits_that_fill_no_group_are_refused_with_all_that_can_be_done(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe", **{**KIND_SIZES["qwen3_moe"], "hidden_size": 128, "moe_intermediate_size": 96})
    for name in [name for name in tensors if ".experts." in name]:
        rows, columns = tensors.pop(name).shape
        packed, scales = rows * columns // 2, rows * columns // 32
        tensors[f"{name}_packed"] = Raw("U8", (rows, columns // 2), bytes(packed))
        tensors[f"{name}_scale"] = Raw("U8", (rows, columns // 32), bytes([127]) * scales)
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["Linear"], "format": "mxfp4-pack-quantized", "weights": weights}
    declared = {"quant_method": "compressed-tensors", "format": group["format"], "config_groups": {"group_0": group}}
    ignored = ["re:.*self_attn.*", "re:.*mlp.gate$", "lm_head"]
    config = {**config, "quantization_config": {**declared, "ignore": ignored}}
    source = Checkpoint.open(write_checkpoint(tmp_path / "s", tensors, config))
    scheme = replace(SCHEME, grid=Grid(group_size=128))
    said = "`group_size` 32 fits, but they are MXFP4 in blocks of 32 already: `requantize` rounds them a second time"
    with pytest.raises(SchemeError, match=f"no routed expert can be quantized: .*; {said}"):
        plan_quantize(source, scheme)
    assert plan_quantize(source, replace(scheme, grid=Grid(group_size=32), requantize=True)).steps


def test_experts_that_no_group_size_fits_are_noted(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe", **{**KIND_SIZES["qwen3_moe"], "moe_intermediate_size": 48})
    source = Checkpoint.open(write_checkpoint(tmp_path / "s", tensors, config))
    assert plan_quantize(source, SCHEME).notes[0].startswith("no routed expert is quantized")


# -- MTP layers -------------------------------------------------------------------------------------------------------


def odd_mtp(what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tiny multimodal model whose MTP layer the config does not declare, or that lacks a tensor, or has too many."""
    config, tensors = tiny("qwen3_5_moe", **KIND_SIZES["qwen3_5_moe"])
    if what == "undeclared":
        del config["text_config"]["mtp_num_hidden_layers"]
    elif what == "partial":
        del tensors["mtp.layers.0.mlp.experts.2.up_proj.weight"]
    elif what == "router":
        tensors["mtp.layers.0.mlp.gate.weight"] = Raw("BF16", (16, 64), bytes(2048))
    elif what == "wide":
        tensors["mtp.layers.0.mlp.experts.8.up_proj.weight"] = tensors["mtp.layers.0.mlp.experts.2.up_proj.weight"]
    elif what == "twice":
        tensors["mtp.layers.0.mlp.experts.down_proj"] = Raw("BF16", (8, 64, 32), bytes(32768))
    return config, tensors


@pytest.mark.parametrize("what", ["undeclared", "partial", "router", "wide", "twice"])
def test_mtp_layers_that_are_dropped_are_not_held_against_the_config(what: str, tmp_path: Path) -> None:
    config, tensors = odd_mtp(what)
    root = write_checkpoint(tmp_path / "s", tensors, config, files={"tokenizer.json": "{}"})
    source = Checkpoint.open(root)
    with pytest.raises(FamilyError, match="; or leave the MTP layers out with `mtp` drop"):
        plan_quantize(source, SCHEME)
    for at, plan in enumerate((plan_quantize(source, SCHEME, None, DROP), plan_prune(source, manifest_of(root), DROP))):
        assert plan.summary["dropped"]["MTP layers"] == sum(name.startswith("mtp.") for name in tensors)
        assert not json.loads(plan.config)["text_config"].get("mtp_num_hidden_layers")
        run(plan, tmp_path / str(at))
        assert verify(tmp_path / str(at), source=root).sound
    assert plan_prune(source, manifest_of(root)).summary["dropped"]["MTP layers"]  # no mtp_keep: dropped all the same


def test_layers_beyond_those_declared_are_dropped_as_mtp_layers_where_a_family_has_them_there(tmp_path: Path) -> None:
    config, tensors = tiny("deepseek_v3", **KIND_SIZES["deepseek_v3"])
    config["num_nextn_predict_layers"] = 0
    root = write_checkpoint(tmp_path / "s", tensors, config, files={"tokenizer.json": "{}"})
    source = Checkpoint.open(root)
    with pytest.raises(PlanError, match=r"model\.layers\.3\..* unknown to family .*`mtp` drop"):
        plan_prune(source, manifest_of(root))
    plan = plan_prune(source, manifest_of(root), DROP)
    assert plan.summary["dropped"] == {
        "MTP layers": sum(name.startswith("model.layers.3.") for name in tensors),
        "pruned experts": 2 * 3 * (8 - plan.summary["experts_after"]),
    }
    assert plan.notes == ()
    run(plan, tmp_path / "out")
    assert verify(tmp_path / "out", source=root).sound


# -- experts that are there twice -------------------------------------------------------------------------------------


def test_experts_in_both_spellings_are_one_message_everywhere(tmp_path: Path) -> None:
    table = tiny("qwen3_5_moe_text", **KIND_SIZES["qwen3_5_moe_text"])[1]
    stem = "model.layers.1.mlp.experts"
    one = Raw("BF16", (64, 32), table[f"{stem}.down_proj"].data[:4096])
    root = made(tmp_path / "s", **{f"{stem}.0.down_proj.weight": one})
    said = re.compile(
        r"layer 1 holds its experts twice, fused \('[\w.]+'\) and one by one \('[\w.]+'\): remove the tensors"
    )
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    for call in (lambda: of(root), lambda: plan_prune(Checkpoint.open(root), manifest_of(tmp_path / "s"))):
        with pytest.raises(FamilyError, match=said):
            call()
    import torch

    from shardxform.forward.weights import Precision, Weights

    with pytest.raises(FamilyError, match=said):
        Weights(Checkpoint.open(root), Precision(torch.device("cpu"), torch.float32))
    assert "spelling" in {problem.code for problem in verify(root).problems}


# -- companions of a router -------------------------------------------------------------------------------------------

ROUTER = "model.layers.1.mlp.gate"


@pytest.mark.parametrize(
    ("companion", "dtype", "shape", "sliced"),
    [
        ("weight_scale", "F32", (1,), False),
        ("weight_scale", "F32", (), False),
        ("weight_scale", "F32", (1, 1), False),
        ("weight_scale", "F32", (6,), True),
        ("weight_scale", "BF16", (6, 1), True),
        ("weight_scale", "BF16", (6, 4), True),
        ("weight_scale_inv", "F32", (1, 1), False),
        ("weight_scale_inv", "F32", (6, 1), True),
        ("weight_packed", "I32", (6, 2), True),
        ("input_scale", "F32", (1,), False),
        ("input_scale", "F32", (), False),
        ("input_scale", "F32", (6,), False),
        ("g_idx", "I32", (16,), False),
        ("weight_g_idx", "I32", (6,), False),  # one a column
    ],
)
def test_a_companion_of_a_router_is_sliced_or_left_as_its_rows_are(
    companion: str, dtype: str, shape: tuple[int, ...], sliced: bool, tmp_path: Path
) -> None:
    width = {"F32": 4, "BF16": 2, "I32": 4}[dtype]
    count = int(np.prod(shape, dtype=int))
    beside = Raw(dtype, shape, bytes(range(count * width)))
    config, tensors = tiny("qwen3_moe")
    root = write_checkpoint(tmp_path / "s", {**tensors, f"{ROUTER}.{companion}": beside}, config)
    manifest = manifest_of(root)
    run(plan_prune(Checkpoint.open(root), manifest), tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")[f"{ROUTER}.{companion}"]
    if not sliced:
        assert found == beside
        return
    row = len(beside.data) // 6
    rows = b"".join(beside.data[at * row : (at + 1) * row] for at in manifest.keep[1])
    assert found == Raw(dtype, (len(manifest.keep[1]), *shape[1:]), rows)


@pytest.mark.parametrize(
    ("companion", "dtype", "shape"),
    [
        ("weight_scale", "F32", (2, 4)),
        ("weight_scale_inv", "F32", (2, 1)),
        ("weight_scale_inv", "F32", (3,)),
        ("weight_packed", "I32", (1,)),
        ("weight_packed", "I32", ()),
        ("qweight", "I32", (2, 6)),
        ("qweight", "I32", (6, 6)),
        ("qzeros", "I32", (1, 1)),
        ("scales", "F16", (1, 6)),
        ("weight_shape", "I64", (2,)),
        ("weight_zero_point", "I32", (1, 1)),
    ],
)
def test_a_companion_of_a_router_that_cannot_be_sliced_is_refused_by_name(
    companion: str, dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    width = {"F16": 2, "F32": 4, "I32": 4, "I64": 8}[dtype]
    beside = Raw(dtype, shape, bytes(int(np.prod(shape, dtype=int)) * width))
    config, tensors = tiny("qwen3_moe")
    root = write_checkpoint(tmp_path / "s", {**tensors, f"{ROUTER}.{companion}": beside}, config)
    with pytest.raises(PlanError, match=rf"mlp\.gate\.{companion}' .*quantized router cannot be pruned"):
        plan_prune(Checkpoint.open(root), manifest_of(root))
    assert plan_prune(Checkpoint.open(root), None).summary["copied"] == len(tensors) + 1


# -- said first, by the commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["declared", "float8", "twice"])
def test_commands_refuse_at_once_on_one_line(what: str, tmp_path: Path) -> None:
    table = tiny("qwen3_5_moe_text", **KIND_SIZES["qwen3_5_moe_text"])[1]
    stem = "model.layers.1.mlp.experts"
    changes: dict[str, Any] = {}
    if what == "float8":
        changes = {f"{stem}.down_proj": as_float8(table[f"{stem}.down_proj"])}
    elif what == "twice":
        changes = {f"{stem}.0.down_proj.weight": Raw("BF16", (64, 32), bytes(4096))}
    root = made(tmp_path / "s", config={"quantization_config": LEFT[0]} if what == "declared" else None, **changes)
    for command in (
        ["quantize", str(root), str(tmp_path / "o")],
        ["quantize", str(root), str(tmp_path / "o"), "--dry-run"],
    ):
        result = CliRunner().invoke(main, command)
        assert isinstance(result.exception, SystemExit | ShardxformError)
        assert result.exit_code
        assert len(result.output.splitlines()) <= 2
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("format_", FORMATS[:4])
def test_a_weight_of_another_shape_than_the_configs_is_not_rounded(format_: Format, tmp_path: Path) -> None:
    root = made(tmp_path / "s", "qwen3_moe")
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps(config | {"num_key_value_heads": config["num_key_value_heads"] * 2}))
    words = ["quantize", root, tmp_path / "out", "--format", format_, "--group-size", 32]
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == 1
    assert re.search(r"its output would not be sound: layers.*self_attn\.{?k_proj", done.output)
    assert not (tmp_path / "out").exists()
