"""MLX checkpoints: what is stored, that nothing is lost on the way there and back, what is refused, what is noticed.

mlx-lm itself is asked in `test_mlx_oracle`. Kinds cover how experts lie in releases: fused and one by one, under other
names, with norms that mlx-lm makes its own, and below a class with a vision tower.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, read_checkpoint, tiny, write_checkpoint, write_json
from click.testing import CliRunner
from strategies import picked
from test_quantize import KIND_SIZES
from test_verify_independent import manifest_of

from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError, ExecutionError, SchemeError
from shardxform.execution.runner import run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan.convert import Target, plan_convert
from shardxform.plan.inspection import inspect_checkpoint
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions
from shardxform.runtimes import mlx
from shardxform.verification import verify

SIZES = {
    **KIND_SIZES,
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32, "head_dim": 32},
    "mixtral": {"hidden_size": 64, "intermediate_size": 32},
}
KINDS = ("gpt_oss", "qwen3_5_moe_text", "mixtral", "qwen3_moe", "deepseek_v3", "qwen3_5_moe")
MTP = {"qwen3_5_moe": ("mtp.",), "deepseek_v3": ("model.layers.3.",)}
STACK = "model.layers.1.mlp.switch_mlp."


def make(root: Path, kind: str = "qwen3_5_moe_text", **over: Any) -> Path:
    config, tensors = tiny(kind, **{**SIZES.get(kind, {}), **over})
    return write_checkpoint(root, tensors, config, shards=2, files={"tokenizer.json": "{}"})


def quantize(source: Path, out: Path, format: str = "mlx", manifest: Any = None, bits: Any = 4, **of: Any) -> Path:  # noqa: A002
    scheme = Scheme(**{"grid": Grid(bits=bits, group_size=32), "format": format, **of})
    run(plan_quantize(Checkpoint.open(source), scheme, manifest), out)
    return out


def convert(source: Path, out: Path, to: Any) -> Path:
    run(plan_convert(Checkpoint.open(source), Target(format=to)), out)
    return out


def config_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())
    return found


def same(one: Path, other: Path) -> bool:
    return read_checkpoint(one) == read_checkpoint(other) and config_of(one) == config_of(other)


def sound(out: Path, source: Path, **options: Any) -> Any:
    report = verify(out, source=source, independent=True, **options)
    assert [str(problem) for problem in report.problems] == []
    return report


# -- what is stored ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_words_and_scales_are_those_of_compressed_tensors_and_biases_what_code_0_stands_for(
    bits: int, tmp_path: Path
) -> None:
    source = make(tmp_path / "source", "qwen3_moe")
    packed = read_checkpoint(quantize(source, tmp_path / "packed", "compressed-tensors", bits=bits))
    out = quantize(source, tmp_path / "out", bits=bits)
    found, experts = read_checkpoint(out), tiny("qwen3_moe", **KIND_SIZES["qwen3_moe"])[0]["num_experts"]
    for projection in ("gate_proj", "up_proj", "down_proj"):
        theirs = [f"model.layers.1.mlp.experts.{expert}.{projection}" for expert in range(experts)]
        words, scales, biases = (found[f"{STACK}{projection}.{last}"] for last in ("weight", "scales", "biases"))
        assert (words.dtype, scales.dtype, biases.dtype) == ("U32", "BF16", "BF16")
        assert words.shape == (experts, *packed[f"{theirs[0]}.weight_packed"].shape)
        assert words.data == b"".join(packed[f"{name}.weight_packed"].data for name in theirs)
        assert scales.data == b"".join(packed[f"{name}.weight_scale"].data for name in theirs)
        assert biases.shape == scales.shape == (experts, *packed[f"{theirs[0]}.weight_scale"].shape)
        assert (biases.float32() == -(2 ** (bits - 1)) * scales.float32()).all()
    alone = "model.layers.0.self_attn.q_proj"
    assert found[f"{alone}.weight"].data == packed[f"{alone}.weight_packed"].data
    assert found["model.layers.1.mlp.gate.weight"].dtype == "BF16"
    assert not [name for name in found if ".experts." in name or name.endswith("weight_shape")]
    declared = {"group_size": 32, "bits": bits, "mode": "affine"}
    assert config_of(out)["quantization"] == config_of(out)["quantization_config"] == declared


@pytest.mark.parametrize("kind", picked(KINDS, 3))
def test_nothing_is_lost_there_and_back_nor_by_pruning(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    other = "auto-round" if kind == "gpt_oss" else "compressed-tensors"
    packed = quantize(source, tmp_path / "packed", other)
    out = convert(packed, tmp_path / "out", "mlx")
    direct = quantize(source, tmp_path / "direct")
    assert same(out, direct)
    sound(out, packed)
    sound(direct, source)
    back = convert(out, tmp_path / "back", other)
    mtp = MTP.get(kind, ("-",))
    dropped = {name: tensor for name, tensor in read_checkpoint(packed).items() if not name.startswith(mtp)}
    assert read_checkpoint(back) == dropped
    turned = convert(direct, tmp_path / "turned", other)
    assert same(turned, back)
    sound(turned, direct)
    assert [str(problem) for problem in verify(turned, source=source).problems] == []
    manifest = replace(manifest_of(source), mtp_keep={})
    run(plan_prune(Checkpoint.open(out), manifest), tmp_path / "pruned")
    both = quantize(source, tmp_path / "both", manifest=manifest)
    assert same(tmp_path / "pruned", both)
    sound(tmp_path / "pruned", out)
    sound(both, source)


def test_experts_that_stay_16_bit_are_stacked_too_and_what_the_config_says_holds_for_the_rest(tmp_path: Path) -> None:
    source = make(tmp_path / "source", keep := "qwen3_5_moe_text")
    out = quantize(source, tmp_path / "out", keep_16bit=("model.layers.1.mlp.experts.*",))
    found, released = read_checkpoint(out), read_checkpoint(source)
    gate_up = released["model.layers.1.mlp.experts.gate_up_proj"].array()
    half = gate_up.shape[1] // 2
    assert (found[f"{STACK}gate_proj.weight"].array() == gate_up[:, :half]).all()
    assert (found[f"{STACK}up_proj.weight"].array() == gate_up[:, half:]).all()
    down = released["model.layers.1.mlp.experts.down_proj"]
    assert (found[f"{STACK}down_proj.weight"].dtype, found[f"{STACK}down_proj.weight"].data) == ("BF16", down.data)
    assert f"{STACK}down_proj.scales" not in found
    assert "model.layers.0.mlp.switch_mlp.down_proj.scales" in found
    assert keep in config_of(source)["model_type"]
    sound(out, source)


def test_gate_and_up_that_take_turns_stand_apart_with_their_biases_whatever_they_are_stored_in(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "gpt_oss")
    released = read_checkpoint(source)
    kept = quantize(source, tmp_path / "kept", keep_16bit=("*.experts.*",))
    twin = quantize(source, tmp_path / "twin", "auto-round", keep_16bit=("*.experts.*",))
    assert same(kept, convert(twin, tmp_path / "out", "mlx"))
    sound(kept, source)
    whole = sound(quantize(source, tmp_path / "whole"), source)
    assert (whole.values_compared, whole.values_left) == (whole.tensors, {})
    sound(tmp_path / "out", twin)
    sound(convert(kept, tmp_path / "back", "auto-round"), kept)
    assert read_checkpoint(tmp_path / "back") == read_checkpoint(twin)
    experts, found = "model.layers.1.mlp.experts.", read_checkpoint(kept)
    both, biases = (released[f"{experts}gate_up_proj{last}"].array() for last in ("", "_bias"))
    for first, name in enumerate(("gate_proj", "up_proj")):
        assert (found[f"{experts}{name}.weight"].array() == both[..., first::2].swapaxes(1, 2)).all()
        assert (found[f"{experts}{name}.bias"].array() == biases[:, first::2]).all()
    down = released[f"{experts}down_proj"].array().swapaxes(1, 2)
    assert (found[f"{experts}down_proj.weight"].array() == down).all()
    assert found[f"{experts}down_proj.bias"] == released[f"{experts}down_proj_bias"]
    assert not [name for name in found if "gate_up" in name or re.search(r"experts\.\d", name)]
    plan = plan_quantize(Checkpoint.open(source), Scheme(grid=Grid(group_size=32), format="mlx"), None)
    assert not [note for note in plan.notes if "significant bits" in note]  # what is moved keeps its values


def test_mlx_is_told_the_class_and_the_keys_that_it_reads(tmp_path: Path) -> None:
    """A text-only Qwen3.5 by the name that mlx-lm has for both; what transformers 5 calls otherwise is said twice."""
    out = quantize(make(tmp_path / "one"), tmp_path / "mlx")
    assert config_of(out)["model_type"] == "qwen3_5_moe"
    assert mlx.single(Checkpoint.open(out)).config["model_type"] == "qwen3_5_moe_text"
    rotary = {"rope_type": "yarn", "rope_theta": 12345.0, "factor": 4.0, "original_max_position_embeddings": 64}
    source = make(tmp_path / "two", "qwen3_moe", rope_parameters=rotary, rope_theta=None)
    with pytest.raises(SchemeError, match="rope_type 'yarn'; of this family mlx-lm has default"):
        quantize(source, tmp_path / "yarn")
    source = make(tmp_path / "three", "deepseek_v3", rope_parameters=rotary, rope_theta=None, rope_scaling=None)
    out = quantize(source, tmp_path / "yarn")
    config = config_of(out)
    assert (config["rope_theta"], config["rope_scaling"]) == (12345.0, rotary)
    sound(out, source)


def test_mtp_layers_are_left_out_and_the_config_says_so(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_5_moe")
    out = quantize(source, tmp_path / "out")
    assert any(name.startswith("mtp.") for name in read_checkpoint(source))
    assert not any(name.startswith("mtp.") for name in read_checkpoint(out))
    assert config_of(out)["text_config"]["mtp_num_hidden_layers"] == 0
    assert any(name.startswith("model.visual.") for name in read_checkpoint(out))
    scheme = Scheme(grid=Grid(group_size=32), format="mlx")
    with pytest.raises(SchemeError, match="`mtp` keep: mlx-lm runs no MTP layers"):
        plan_quantize(Checkpoint.open(source), scheme, None, ViewOptions(mtp="keep"))


# -- what is read ---------------------------------------------------------------------------------------------------


def test_inspect_sees_the_weights_that_the_words_stand_for(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    one, other = (inspect_checkpoint(Checkpoint.open(path)) for path in (source, quantize(source, tmp_path / "out")))
    assert (other.quantization, other.experts, other.parameters) == ("mlx", one.experts, one.parameters)
    assert other.tensors == len(read_checkpoint(tmp_path / "out"))
    assert not other.unknown


def test_the_card_says_how_it_is_run_and_made_again(tmp_path: Path) -> None:
    from shardxform.publish.card.gathering import gather
    from shardxform.publish.card.rendering import render

    text = render(gather(quantize(make(tmp_path / "source"), tmp_path / "out")))
    assert "\nlibrary_name: mlx\n" in text
    assert "\nmlx_lm.generate --model out --prompt Hello" in text
    assert "Its model_type is `qwen3_5_moe`, since mlx-lm does not know" in text
    assert "vllm serve" not in text
    assert "\nshardxform quantize SRC out --format mlx\n" in text


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"grid": Grid(group_size=32, scale_grid="fp16")}, "`format` mlx needs `scale_grid` bf16"),
        ({"grid": Grid(group_size=-1)}, "`format` mlx needs `group_size` 128, 64 or 32"),
        ({"grid": Grid(), "g_idx": True}, "`g_idx`: expected `format` gptq"),
        ({"grid": Grid(), "expert_names": "fused-indexed"}, "`expert_names`: fused-indexed exists in"),
    ],
)
def test_schemes_that_mlx_does_not_run(options: dict[str, Any], why: str) -> None:
    with pytest.raises(SchemeError, match=re.escape(why)):
        Scheme(format="mlx", **options)


def test_families_that_are_not_written(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from any_moe import build, save

    source = save(build("olmoe"), tmp_path / "source")
    with pytest.raises(SchemeError, match="model_type olmoe is not written for it; known: deepseek_v3, kimi_k2,"):
        quantize(source, tmp_path / "out")


def test_layers_that_mlx_lm_would_take_for_another_kind(tmp_path: Path) -> None:
    kinds = ["linear_attention", "full_attention", "full_attention", "full_attention"]
    source = make(tmp_path / "source", layer_types=kinds, num_hidden_layers=4, full_attention_interval=None)
    with pytest.raises(
        SchemeError, match=r"layer_types\[2\] is full_attention, .* counted from 1, is a multiple of 2, "
    ):
        quantize(source, tmp_path / "out")


def test_what_needs_no_conversion_is_told(tmp_path: Path) -> None:
    halves = make(tmp_path / "halves", "qwen3_moe")
    with pytest.raises(
        SchemeError, match="in 16 bits, and of qwen3_moe mlx-lm takes them as they are in the release's"
    ):
        convert(halves, tmp_path / "out", "mlx")
    with pytest.raises(
        SchemeError, match="in 16 bits, and of gpt_oss mlx-lm takes none in the release's layout; to rou"
    ):
        convert(make(tmp_path / "turned", "gpt_oss"), tmp_path / "out", "mlx")
    words = [
        "prune",
        str(halves),
        str(tmp_path / "out"),
        "-m",
        str(halves / "config.json"),
        "--heal",
        "--format",
        "mlx",
    ]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    told = " ".join(result.output.split())
    assert (
        "prune rounds no weights; `shardxform quantize --format mlx` prunes, heals and rounds in one pass; in" in told
    )


def test_what_mlx_lm_would_round_again(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "deepseek_v3", qk_nope_head_dim=32)
    with pytest.raises(SchemeError, match="kv_b_proj is quantized, and mlx-lm takes it apart and rounds it again"):
        quantize(source, tmp_path / "out", quantize=("*.kv_b_proj",))


def test_scales_that_bfloat16_may_not_hold(tmp_path: Path) -> None:
    grid = Grid(group_size=32, scale_grid="fp16")
    packed = quantize(make(tmp_path / "source"), tmp_path / "packed", "auto-round", grid=grid)
    with pytest.raises(SchemeError, match="mlx: scales of the source are float16"):
        convert(packed, tmp_path / "out", "mlx")


def test_weights_that_are_not_symmetric(tmp_path: Path) -> None:
    out = quantize(make(tmp_path / "source"), tmp_path / "out")
    change(out, f"{STACK}up_proj.biases", lambda biases: np.add(biases, 1, out=biases))
    with pytest.raises(CheckpointError, match=r"switch_mlp\.up_proj\.biases' is not as its shardxform\.json has it"):
        convert(out, tmp_path / "back", "auto-round")
    (out / "shardxform.json").unlink()
    with pytest.raises(ExecutionError, match=r"experts\.0\.up_proj\.biases': .*-8 times the scale: an asym"):
        convert(out, tmp_path / "back", "auto-round")


def change(out: Path, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Change a tensor in place."""
    (piece,) = Checkpoint.open(out).tensors[name].ranges
    array = read_checkpoint(out)[name].array().copy()
    edit(array)
    with (out / piece.file).open("r+b") as file:
        file.seek(piece.offset)
        file.write(array.tobytes())


# -- what is noticed -------------------------------------------------------------------------------------------------


def rewrite(out: Path, edit: Callable[[dict[str, Any], dict[str, Raw]], object]) -> None:
    """Write a checkpoint again with other tensors or another config."""
    tensors, config = read_checkpoint(out), config_of(out)
    edit(config, tensors)
    for path in out.glob("*.safetensors*"):
        path.unlink()
    (out / "shardxform.json").unlink()
    write_checkpoint(out, tensors, config)
    write_json(out / "config.json", config)


def _cut(tensors: dict[str, Raw], name: str, count: int) -> None:
    """Take the last of a stack away."""
    old = tensors[name]
    kept = len(old.data) // old.shape[0] * count
    tensors[name] = Raw(old.dtype, (count, *old.shape[1:]), old.data[:kept])


GONE = [f"{STACK}up_proj.{last}" for last in ("weight", "scales", "biases")]
DEFECTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Raw]], object], str, str]] = {
    "biases gone": (lambda _, t: t.pop(GONE[2]), "missing", "biases"),
    "scales gone": (lambda _, t: t.pop(GONE[1]), "missing", "scales"),
    "words gone": (lambda _, t: t.pop(GONE[0]), "missing", "up_proj.weight"),
    "an expert short": (lambda _, t: [_cut(t, name, t[name].shape[0] - 1) for name in GONE], "missing", "up_proj"),
    "biases of one expert short": (lambda _, t: _cut(t, GONE[2], t[GONE[2]].shape[0] - 1), "missing", "biases"),
    "another scheme in config.json": (
        lambda c, _: c["quantization"].update(group_size=64),
        "quantization-config",
        "quantization and quantization_config differ",
    ),
    "a mode of other codes": (
        lambda c, _: [c[key].update(mode="mxfp4") for key in ("quantization", "quantization_config")],
        "quantization-config",
        "mode 'mxfp4', expected 'affine'",
    ),
    "no width": (
        lambda c, _: [c[key].update(bits=0) for key in ("quantization", "quantization_config")],
        "quantization-config",
        "bits 0, expected 4 or 8",
    ),
    "a class that mlx-lm has not": (
        lambda c, _: c.update(model_type="qwen3_5_moe_text"),
        "class",
        "is none that mlx-lm is known to run",
    ),
}


@pytest.mark.parametrize("defect", picked(DEFECTS, 2))
def test_every_defect_is_named(defect: str, tmp_path: Path) -> None:
    out = quantize(make(tmp_path / "source"), tmp_path / "out")
    edit, code, what = DEFECTS[defect]
    rewrite(out, edit)
    report = verify(out)
    named = [problem for problem in report.problems if problem.code == code]
    assert named, report.problems
    assert any(what in f"{problem.where} {problem.message}" for problem in named), named


@pytest.mark.parametrize("last", ["weight", "scales", "biases"])
def test_a_value_that_is_changed_is_noticed_alone_or_against_the_source(last: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    out = quantize(source, tmp_path / "out")

    def edit(array: np.ndarray) -> None:
        array.reshape(-1)[7] ^= array.dtype.type(4)

    change(out, f"{STACK}down_proj.{last}", edit)
    written = verify(out, quick=True, written=True)
    assert [problem.code for problem in written.problems] == ["digest"]
    (out / "shardxform.json").unlink()
    alone, against = verify(out), verify(out, source=source, independent=True)
    assert ("biases" in {problem.code for problem in alone.problems}) == (last != "weight")
    codes = {problem.code for problem in against.problems}
    assert "independent" in codes
    assert codes - {"independent"}
