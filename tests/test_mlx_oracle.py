"""MLX checkpoints in the hands of mlx-lm, on the CPU: loaded as they are, and the same to rounding as transformers.

The reference is transformers on the weights that the stored codes, scales and biases stand for, decoded here by numpy.
Only the rest, which is bfloat16 in the files, is widened to float32 before mlx-lm loads it, so that it may compute so.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, raw, read_checkpoint, write_checkpoint
from config_changes import changed, changes, edited, taken
from strategies import by_night, picked

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import SchemeError
from shardxform.execution.runner import run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan.convert import Target, plan_convert
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.verification import verify

torch = pytest.importorskip("torch")
mx = pytest.importorskip("mlx.core")
mlx_utils = pytest.importorskip("mlx_lm.utils")

pytestmark = pytest.mark.oracle

HOMES = {
    "mlp.switch_mlp": "mlp.experts",
    "experts.switch_glu": "experts",
    "block_sparse_moe.switch_mlp": "block_sparse_moe.experts",
}
OURS = {"block_sparse_moe.experts": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}


def quantize(source: Path, out: Path, format: str = "mlx", bits: Any = 4, group_size: int = 32) -> Path:  # noqa: A002
    grid = Grid(bits=bits, group_size=group_size)
    run(plan_quantize(Checkpoint.open(source), Scheme(grid=grid, format=format)), out)  # type: ignore[arg-type]
    return out


def convert(source: Path, out: Path, to: Any = "mlx") -> Path:
    run(plan_convert(Checkpoint.open(source), Target(format=to)), out)
    return out


def plain(out: Path, bits: int) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint of MLX as float32, under its own name."""
    stored, values = stacked(read_checkpoint(out)), {}
    for name, tensor in stored.items():
        stem, _, last = name.rpartition(".")
        if last in ("scales", "biases"):
            continue
        if tensor.dtype != "U32":
            values[name] = tensor.float32()
            continue
        words = np.frombuffer(tensor.data, np.uint32).reshape(tensor.shape)
        codes = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & np.uint32((1 << bits) - 1)
        scales, biases = (stored[f"{stem}.{each}"].float32() for each in ("scales", "biases"))
        groups = codes.reshape(*scales.shape, -1).astype(np.float32) * scales[..., None] + biases[..., None]
        values[name] = groups.reshape(*words.shape[:-1], -1)
    return values


def stacked(tensors: dict[str, Raw]) -> dict[str, Raw]:
    """The same with words that are there for every expert as one stack, which mlx-lm makes of them."""
    single: dict[str, list[Raw]] = {}
    for name in [name for name, tensor in tensors.items() if ".experts." in name and tensor.dtype == "U32"]:
        if match := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name):
            members = single.setdefault(f"{match[1]}.switch_mlp.{match[3]}.weight", [])
            assert int(match[2]) == len(members)
            members.append(tensors.pop(name))
    for name, members in single.items():
        data = b"".join(member.data for member in members)
        tensors[name] = Raw("U32", (len(members), *members[0].shape), data)
    return tensors


def released(values: Mapping[str, np.ndarray], source: Path) -> dict[str, Raw]:
    """The same under the names of a release, of which `source` is one."""
    out = {}
    for name in read_checkpoint(source):
        out[name] = raw(torch.tensor(_of_release(name, values)))
    return out


def _of_turns(name: str, values: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """A stack [E, H, 2I] in which gate and up take turns, one [E, I, H], or the biases of either."""
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up|down)_proj(_bias)?", name)
    if match is None or f"{match[1]}.gate_proj.bias" not in values:
        return None
    last = "bias" if match[3] else "weight"
    gate, up, down = (values[f"{match[1]}.{each}_proj.{last}"] for each in ("gate", "up", "down"))
    both = np.stack([gate, up], 2).reshape(len(gate), -1, *gate.shape[2:])
    found = down if match[2] == "down" else both
    return found if match[3] else found.swapaxes(1, 2)


def _of_release(name: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    if (found := _of_turns(name, values)) is not None:
        return found
    for home, experts in HOMES.items():
        if match := re.fullmatch(rf"(.*){re.escape(experts)}\.(gate_up_proj|down_proj)", name):
            of = [f"{match[1]}{home}.{each}.weight" for each in ("gate_proj", "up_proj", "down_proj")]
            return values[of[2]] if match[2] == "down_proj" else np.concatenate([values[of[0]], values[of[1]]], 1)
        if match := re.fullmatch(rf"(.*){re.escape(experts)}\.(\d+)\.(\w+)\.weight", name):
            theirs = {ours: their for their, ours in OURS.get(experts, {}).items()}
            stack = values.get(f"{match[1]}{home}.{theirs.get(match[3], match[3])}.weight")
            if stack is not None:
                return stack[int(match[2])]
    return values[name]


def widened(out: Path, folder: Path) -> Path:
    """The same checkpoint with all but codes in float32, which mlx on the CPU needs and which rounds nothing."""
    config = json.loads((out / "config.json").read_text())
    tensors = {
        name: tensor if tensor.dtype in ("U32", "U8") else raw(torch.tensor(tensor.float32()))
        for name, tensor in read_checkpoint(out).items()
    }
    write_checkpoint(folder, tensors, config)
    return folder


def mlx_logits(path: Path, ids: Any) -> np.ndarray:
    """Loaded strictly: nothing missing, nothing left over."""
    mx.set_default_device(mx.cpu)
    model, _ = mlx_utils.load_model(path, strict=True)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(ids.numpy())).astype(mx.float32), np.float64)


def divergence(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL divergence over positions."""
    one, other = (torch.log_softmax(torch.tensor(each), -1) for each in (ours, theirs))
    return float((one.exp() * (one - other)).sum(-1).mean())


def check(out: Path, source: Path, bits: int, tmp_path: Path, ids: Any) -> None:
    from any_moe import load

    assert [str(problem) for problem in verify(out, source=source, independent=True).problems] == []
    values = plain(out, bits)
    reference = tmp_path / "reference"
    write_checkpoint(reference, released(values, source), json.loads((source / "config.json").read_text()))
    model, info = load(reference, torch.float32)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = model(ids).logits.double().numpy()
    found = mlx_logits(widened(out, tmp_path / "wide"), ids)
    assert found.shape == expected.shape
    kl = divergence(expected, found)
    print(out, kl, abs(found - expected).max())
    assert kl <= 1e-10
    shutil.rmtree(reference)


def test_the_small_model_converted(small_moe: Path, tmp_path: Path) -> None:
    from test_prune_oracle import tokens

    out = convert(quantize(small_moe, tmp_path / "q", "auto-round"), tmp_path / "out")
    check(out, small_moe, 4, tmp_path, tokens(small_moe))
    assert mlx_utils.load_model(out, strict=True)


def test_values_are_those_of_the_same_weights_in_another_format(small_moe: Path, tmp_path: Path) -> None:
    from shardxform.forward.weights import Precision, Weights

    paths = quantize(small_moe, tmp_path / "one"), quantize(small_moe, tmp_path / "two", "auto-round")
    full = Precision(torch.device("cpu"), torch.float32)
    with Weights(Checkpoint.open(paths[0]), full) as ours, Weights(Checkpoint.open(paths[1]), full) as theirs:
        name = "model.layers.0.mlp.shared_expert.up_proj.weight"
        assert torch.equal(ours.tensor(name), theirs.tensor(name))
        one, other = (each.expert("block", 1, 2).dense(full) for each in (ours, theirs))
        assert torch.equal(one.gate_up_OH, other.gate_up_OH)
        assert torch.equal(one.down_HI, other.down_HI)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
OVER: dict[str, dict[str, Any]] = {
    "deepseek_v32": {"index_n_heads": 16},  # of fewer, all have no use for many tokens, of which any may be chosen
    "gpt_oss": {"rope_parameters": YARN | {"truncate": True}},  # as mlx-lm always does
}
SIDES = ("mlx", "auto-round")


@pytest.mark.parametrize("format_", SIDES)
def test_an_expert_that_stands_alone_has_the_values_of_one_in_a_turned_stack(format_: str, tmp_path: Path) -> None:
    """To rounding: each row of both, in the order in which the model's own gate takes them, with its bias."""
    from build import tiny
    from test_mlx import SIZES

    from shardxform.forward.weights import Precision, Weights

    config, tensors = tiny("gpt_oss", **SIZES["gpt_oss"])
    source = write_checkpoint(tmp_path / "source", tensors, config)
    out = quantize(source, tmp_path / "out", format_, bits=8)
    full = Precision(torch.device("cpu"), torch.float32)
    with Weights(Checkpoint.open(source), full) as whole, Weights(Checkpoint.open(out), full) as part:
        one, other = (each.expert("block", 1, 2).dense(full) for each in (whole, part))
        for wanted, found in zip(one, other, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=float(wanted.abs().max()) / 100)


FAMILIES = (
    "gpt_oss",
    "deepseek_v3",
    "qwen3_moe",
    "mixtral",
    "minimax_m2",
    "glm4_moe",
    "glm4_moe_lite",
    "deepseek_v32",
    "qwen3_next",
    "gemma4_text",
)


@pytest.mark.parametrize("model_type", picked(FAMILIES, 4))
def test_a_tiny_model_of_every_family(model_type: str, tmp_path: Path) -> None:
    from any_moe import build, save

    source = save(build(model_type, **OVER.get(model_type, {})), tmp_path / "source")
    out = quantize(source, tmp_path / "out")
    check(out, source, 4, tmp_path, torch.arange(24).reshape(1, 24) * 7 % 256)


BY_DAY = (("qwen3_moe", "rotated: yarn"), ("mixtral", "sliding_window"), ("qwen3_next", "as older releases say it"))


@pytest.mark.parametrize(("family", "kind"), changes((*FAMILIES, "qwen3_5_moe"), BY_DAY))
def test_a_config_that_is_changed_is_run_as_it_is_meant_or_refused(family: str, kind: str, tmp_path: Path) -> None:
    from any_moe import build, load, save
    from gguf_families import LINEAR

    usual = {**OVER, "qwen3_5_moe": LINEAR}.get(family, {})
    over, told, without = changed(family, kind, usual)
    with taken():
        source = edited(save(build(family, **{**usual, **over}), tmp_path / "source"), told, without)
        load(source, torch.float32)[0](torch.arange(24).reshape(1, 24))
    try:
        out = quantize(source, tmp_path / "out")
    except SchemeError as e:
        assert "config.json" in str(e)  # noqa: PT017
        assert not (tmp_path / "out").exists()
        return
    check(out, source, 4, tmp_path, torch.arange(24).reshape(1, 24) * 7 % 256)


@by_night
def test_gpt_oss_in_mxfp4_is_pruned_and_loaded_with_every_code_as_it_is(tmp_path: Path) -> None:
    """Not converted: mlx-lm reads the release's own blocks and scales."""
    from any_moe import load
    from test_small_floats import made

    outs = []
    for source in made(tmp_path, "mxfp4 of gpt-oss"):
        config = json.loads((source / "config.json").read_text())
        rope = config["rope_parameters"] | {"truncate": True}
        told = {"rope_parameters": rope, "rope_scaling": rope, "rope_theta": rope["rope_theta"]}
        (source / "config.json").write_text(json.dumps(config | told))
        every = range(0, config["num_local_experts"], 2)
        keep = {layer: tuple(every) for layer in range(config["num_hidden_layers"])}
        run(plan_prune(Checkpoint.open(source), Manifest(keep=keep)), tmp_path / f"out of {source.name}")
        outs.append(tmp_path / f"out of {source.name}")
    packed, twin = outs
    model, _ = load(twin, torch.float32)
    ids = torch.arange(24).reshape(1, 24) * 7 % 256
    with torch.no_grad():
        expected = model(ids).logits.double().numpy()
    assert divergence(expected, mlx_logits(widened(packed, tmp_path / "wide"), ids)) <= 1e-10


@by_night
def test_tuned_rows_that_take_turns_go_where_mlx_lm_has_them(tmp_path: Path) -> None:
    from any_moe import build, save
    from click.testing import CliRunner

    from shardxform.cli import main

    source = save(build("gpt_oss", **OVER["gpt_oss"]), tmp_path / "source")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "0123456789" * 40}) + "\n")
    data = ["--data", tmp_path / "data.jsonl", "--samples", "2", "--seqlen", "32"]
    asked = ["--method", "auto-round", "--iters", "2", "--group-size", "32", "--scale-grid", "bf16", "-q", *data]
    for format_ in ("mlx", "auto-round"):
        words = ["quantize", source, tmp_path / format_, "--format", format_, *asked]
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert not result.exit_code, result.output
    assert read_checkpoint(convert(tmp_path / "auto-round", tmp_path / "again")) == read_checkpoint(tmp_path / "mlx")


def test_what_mlx_lm_rounds_itself_is_read_pruned_and_written_in_16_bits(tmp_path: Path) -> None:
    """Biases of their own, embeddings, head and routers in words too, routers in 8 bits."""
    from any_moe import build, save
    from mlx_lm.convert import convert as theirs

    from shardxform.forward.weights import Precision, Weights

    source = save(build("qwen3_moe"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    names = {"rope_theta": 10000.0, "num_experts": 6, "head_dim": 16}  # which it does not find otherwise
    (source / "config.json").write_text(json.dumps(config | names))
    mx.set_default_device(mx.cpu)
    theirs(str(source), str(out := tmp_path / "out"), quantize=True, q_group_size=32, q_bits=4)
    keep = {0: (0, 2, 3, 5), 1: (1, 2, 3, 4)}
    run(plan_prune(Checkpoint.open(out), Manifest(keep=keep)), pruned := tmp_path / "pruned")
    halves = convert(out, tmp_path / "halves", "bf16")
    for path, made_from in ((pruned, out), (halves, out)):
        assert [str(problem) for problem in verify(path, source=made_from).problems] == []
    full = Precision(torch.device("cpu"), torch.float32)
    with Weights(Checkpoint.open(out), full) as whole, Weights(Checkpoint.open(pruned), full) as part:
        whole.check()
        part.check()
        for layer, ids in keep.items():
            router = f"model.layers.{layer}.mlp.gate"
            values = dequantized(out, router, 8)
            assert (whole.tensor(f"{router}.weight").numpy() == values).all()
            assert (part.tensor(f"{router}.weight").numpy() == values[list(ids)]).all()
            down = dequantized(out, f"model.layers.{layer}.mlp.switch_mlp.down_proj", 4)
            for new, old in enumerate(ids):
                assert (whole.expert("block", layer, old).dense(full).down_HI.numpy() == down[old]).all()
                assert (part.expert("block", layer, new).dense(full).down_HI.numpy() == down[old]).all()
    ids = torch.arange(24).reshape(1, 24) * 7 % 256
    assert np.isfinite(mlx_logits(widened(pruned, tmp_path / "wide"), ids)).all()
    with pytest.raises(
        SchemeError, match=r"integers with biases, groups of \d+, which symmetric integers of one scheme do not hold"
    ):
        convert(out, tmp_path / "back", "auto-round")


def dequantized(out: Path, module: str, bits: int) -> np.ndarray:
    """What mlx makes of a module, in float32."""
    tensors: dict[str, Any] = {}
    for path in out.glob("*.safetensors"):
        tensors |= mx.load(str(path))
    words, scales, biases = (tensors[f"{module}.{last}"] for last in ("weight", "scales", "biases"))
    group = words.shape[-1] * 32 // bits // scales.shape[-1]
    return np.array(mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group, bits))
