"""Checkpoints in small floats as they are released: every verb on each, against a twin that holds the same values.

The twin is written with torch's float8 types and plain numpy: each encoded weight decoded by hand. Scales are powers of
two wherever the encoding allows it, so that the twin is exact in bfloat16, and whatever is made from the source must be
what is made from the twin, byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, bf16, read_checkpoint, write_checkpoint
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import picked
from texts import few

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import any_moe  # noqa: E402

from shardxform.base.tensors import ByteRange, TensorRef  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.errors import ExecutionError  # noqa: E402
from shardxform.formats.encoding import Cut  # noqa: E402
from shardxform.formats.fp8 import Fp8  # noqa: E402
from shardxform.formats.microscaling import MXFP4, MXFP8, NVFP4, Microscaled  # noqa: E402
from shardxform.formats.packing import dequantize, unpack, values_of  # noqa: E402
from shardxform.formats.scheme import Grid  # noqa: E402
from shardxform.publish.card.gathering import gather  # noqa: E402
from shardxform.publish.card.rendering import render  # noqa: E402

pytestmark = pytest.mark.oracle

Tensors = dict[str, Raw]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
FP4_GROUP = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}


def e4m3(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and what they stand for, by torch."""
    codes = torch.from_numpy(values).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).numpy(), codes.to(torch.float32).numpy()


def e2m1(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two codes a byte, the first in the lower half, and what they stand for."""
    codes = np.abs(values[..., None] - E2M1).argmin(-1).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, E2M1[codes]


def exponents(blocks: np.ndarray, most: float) -> np.ndarray:
    """Power of two for each block, under which its largest value is at most `most`."""
    return np.ceil(np.log2(np.maximum(np.abs(blocks).max(-1), 2.0**-20) / most)).astype(np.int64)


def raw(dtype: str, array: np.ndarray) -> Raw:
    return Raw(dtype, array.shape, np.ascontiguousarray(array).tobytes())


def fp8_blocks(w: np.ndarray, size: int = 24) -> tuple[Tensors, np.ndarray]:
    rows, columns = w.shape
    shape = (math.ceil(rows / size), math.ceil(columns / size))
    scale = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            block = w[i * size : (i + 1) * size, j * size : (j + 1) * size]
            scale[i, j] = 2.0 ** exponents(block.reshape(1, -1), 256)[0]
    wide = np.repeat(np.repeat(scale, size, 0), size, 1)[:rows, :columns]
    codes, values = e4m3(w / wide)
    return {"weight": raw("F8_E4M3", codes), "weight_scale_inv": raw("F32", scale)}, values * wide


def fp8_channels(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    scale = (2.0 ** exponents(w, 256))[:, None].astype(np.float32)
    codes, values = e4m3(w / scale)
    return {"weight": raw("F8_E4M3", codes), "weight_scale": raw("F32", scale)}, values * scale


def fp8_whole(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    scale = np.float32(2.0 ** exponents(w.reshape(1, -1), 256)[0])
    codes, values = e4m3(w / scale)
    parts = {"weight": raw("F8_E4M3", codes), "weight_scale": raw("F32", np.array(scale))}
    return {**parts, "input_scale": raw("F32", np.array(np.float32(0.5)))}, values * scale


def fp8_of_mistral(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    parts, values = fp8_whole(w)
    names = {"weight_scale": "qscale_weight", "input_scale": "qscale_act"}
    return {names.get(last, last): part for last, part in parts.items()}, values


def mxfp4(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    blocks = w.reshape(len(w), -1, 32)
    power = exponents(blocks, 6)
    packed, values = e2m1(blocks / np.exp2(power)[..., None].astype(np.float32))
    parts = {
        "weight_packed": raw("U8", packed.reshape(len(w), -1)),
        "weight_scale": raw("U8", (power + 127).astype(np.uint8)),
    }
    return parts, (values * np.exp2(power)[..., None].astype(np.float32)).reshape(w.shape)


def mxfp8(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    blocks = w.reshape(len(w), -1, 32)
    power = exponents(blocks, 256)
    codes, values = e4m3(blocks / np.exp2(power)[..., None].astype(np.float32))
    parts = {
        "weight": raw("F8_E4M3", codes.reshape(w.shape)),
        "weight_scale": raw("U8", (power + 127).astype(np.uint8)),
    }
    return parts, (values * np.exp2(power)[..., None].astype(np.float32)).reshape(w.shape)


def nvfp4(w: np.ndarray, divided: bool) -> tuple[Tensors, np.ndarray]:
    blocks = w.reshape(len(w), -1, 16)
    codes, scale = e4m3(np.exp2(exponents(blocks, 6) + 3).astype(np.float32))
    packed, values = e2m1(blocks / (scale / 8)[..., None])
    whole = np.array(np.float32(8.0 if divided else 0.125))
    names = ("weight_packed", "weight_global_scale") if divided else ("weight", "weight_scale_2")
    parts = {
        names[0]: raw("U8", packed.reshape(len(w), -1)),
        "weight_scale": raw("F8_E4M3", codes),
        names[1]: raw("F32", whole.reshape(1) if divided else whole),
    }
    return parts, (values * (scale / 8)[..., None]).reshape(w.shape)


def integers(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    """As Kimi-K2-Thinking has its experts."""
    blocks = w.reshape(len(w), -1, 32)
    power = exponents(blocks, 7)
    scale = np.exp2(power).astype(np.float32)
    codes = np.clip(np.rint(blocks / scale[..., None]), -8, 7)
    words = (codes.astype(np.int64) + 8).reshape(len(w), -1, 8) << np.arange(0, 32, 4)
    parts = {
        "weight_packed": raw("I32", words.sum(-1).astype(np.uint32).view(np.int32)),
        "weight_scale": bf16(scale),
        "weight_shape": raw("I32", np.array(w.shape, np.int32)),
    }
    return parts, ((codes + 0.0) * scale[..., None]).astype(np.float32).reshape(w.shape)


def stacked(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    """A stack [E, I, O] of gpt-oss: stored row by row, in blocks."""
    rows = np.ascontiguousarray(w.transpose(0, 2, 1))
    count, out, columns = rows.shape
    parts, values = mxfp4(rows.reshape(-1, columns))
    blocks, scales = parts["weight_packed"].array(), parts["weight_scale"].array()
    named = {
        "_blocks": raw("U8", blocks.reshape(count, out, columns // 32, 16)),
        "_scales": raw("U8", scales.reshape(count, out, columns // 32)),
    }
    return named, values.reshape(rows.shape).transpose(0, 2, 1)


@dataclass(frozen=True)
class Kind:
    """How weights are stored.

    Attributes:
        encode: gives the parts and the values of one.
        declared: what the config says.
        model_type: of the checkpoint.
        weights: ends of the names of the weights that are stored so.
        experts: name of the first part of what holds experts of layer 1; the id of an expert stands for `{}`.

    """

    encode: Callable[[np.ndarray], tuple[Tensors, np.ndarray]]
    declared: dict[str, Any]
    model_type: str = "qwen3_moe"
    weights: tuple[str, ...] = ("_proj.weight",)
    experts: str = "model.layers.1.mlp.experts.{}."


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "float", "symmetric": True, "dynamic": False, **weights}}
    return {**COMPRESSED, "format": form, "config_groups": {"group_0": {**group, "format": form}}}


KINDS: dict[str, Kind] = {
    "fp8 blocks": Kind(
        fp8_blocks, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 24]}
    ),
    "fp8 channels": Kind(fp8_channels, compressed("float-quantized", num_bits=8, strategy="channel")),
    "fp8 whole": Kind(fp8_whole, {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["lm_head"]}),
    "fp8 of mistral": Kind(fp8_of_mistral, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 blocks of mistral": Kind(
        lambda w: (lambda p, v: ({"weight": p["weight"], "qscale_weight": p["weight_scale_inv"]}, v))(*fp8_blocks(w)),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 24]},
    ),
    "mxfp4": Kind(mxfp4, compressed("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32)),
    "mxfp8": Kind(mxfp8, {"quant_method": "mxfp8", "modules_to_not_convert": ["lm_head"]}),
    "nvfp4": Kind(
        lambda w: nvfp4(w, True), compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16)
    ),
    "nvfp4 of modelopt": Kind(
        lambda w: nvfp4(w, False), {"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}
    ),
}
KINDS["4-bit integers of experts"] = Kind(
    integers,
    {
        **COMPRESSED,
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*self_attn.*"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
            }
        },
    },
    weights=("down_proj.weight", "gate_proj.weight", "up_proj.weight"),
)


def int8(w: np.ndarray, size: int = 0) -> tuple[Tensors, np.ndarray]:
    """A scale a row, or a group of columns."""
    groups = w.reshape(len(w), -1, size or w.shape[1])
    scale = (2.0 ** np.ceil(np.log2(np.maximum(np.abs(groups).max(-1), 2.0**-20) / 60))).astype(np.float32)
    codes = np.rint(groups / scale[..., None]).astype(np.int8)
    values = (codes * scale[..., None]).astype(np.float32).reshape(w.shape)
    return {"weight": raw("I8", codes.reshape(w.shape)), "weight_scale": bf16(scale)}, values


KINDS["8-bit integers of W8A8"] = Kind(
    int8, compressed("int-quantized", num_bits=8, type="int", symmetric=True, strategy="channel")
)
KINDS["8-bit integers of W8A8"].declared["config_groups"]["group_0"]["input_activations"] = {
    "num_bits": 8,
    "type": "int",
    "strategy": "token",
    "dynamic": True,
    "symmetric": True,
}
KINDS["8-bit integers in groups"] = Kind(
    lambda w: int8(w, 32), compressed("int-quantized", num_bits=8, type="int", strategy="group", group_size=32)
)
KINDS["mxfp4 of gpt-oss"] = Kind(
    stacked,
    {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]},
    "gpt_oss",
    ("experts.gate_up_proj", "experts.down_proj"),
    "",
)
LEFT_OUT = [
    "lm_head",
    *(f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("gate", "shared_expert_gate")),
    *(f"model.layers.0.linear_attn.in_proj_{name}" for name in ("a", "b", "qkv", "z")),
    "model.layers.0.linear_attn.conv1d",
]
KINDS["fp8 blocks, fused in 16 bits"] = Kind(
    fp8_blocks,
    {**KINDS["fp8 blocks"].declared, "modules_to_not_convert": LEFT_OUT},
    "qwen3_5_moe_text",
)
every = pytest.mark.parametrize("kind", KINDS)
FLOATS = [kind for kind in KINDS if "integers" not in kind]
floats = pytest.mark.parametrize("kind", FLOATS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("floats")


def made(folder: Path, kind: str) -> tuple[Path, Path]:
    """A checkpoint, and its twin in bfloat16."""
    model_type = KINDS[kind].model_type
    plain, source, twin = folder / model_type, folder / kind, folder / f"{kind} twin"
    if source.exists():
        return source, twin
    if not plain.exists():
        any_moe.save(any_moe.build(model_type), plain)
    config = json.loads((plain / "config.json").read_text())
    tensors = read_checkpoint(plain)
    stored, values = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(KINDS[kind].weights)]:
        parts, decoded = KINDS[kind].encode(tensors[name].float32())
        del stored[name]
        stored |= {name.removesuffix("weight") + last: part for last, part in parts.items()}
        values[name] = bf16(decoded)
        assert np.array_equal(values[name].float32(), decoded), name
    files = {p.name: p.read_text() for p in plain.glob("tokenizer*")}
    write_checkpoint(twin, values, config, files=files)
    write_checkpoint(source, stored, {**config, "quantization_config": KINDS[kind].declared}, files=files)
    return source, twin


def call(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def keep_file(folder: Path) -> Path:
    keep = {"0": [0, 2, 3, 5], "1": [1, 2, 4, 5]}
    path = folder / "keep.json"
    path.write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))
    return path


def again(kind: str) -> tuple[str, ...]:
    """What has weights of 4 bits rounded a second time."""
    return ("--requantize",) if "fp4" in kind else ()


def shards(root: Path) -> Tensors:
    return read_checkpoint(root)


@pytest.mark.parametrize("kind", picked(["mxfp4 of gpt-oss", "nvfp4", "nvfp4 of modelopt", "mxfp4"], 4))
def test_a_card_counts_parameters_and_not_numbers_that_hold_several(kind: str, folder: Path, tmp_path: Path) -> None:
    cards = []
    for root in made(folder, kind):
        call("prune", root, tmp_path / root.name, "-m", keep_file(tmp_path), "-q")
        cards.append(gather(tmp_path / root.name))
    told = render(cards[0])
    assert cards[0].encodings
    assert all(name in told for name in cards[0].encodings)
    assert ("Needs `pip install compressed-tensors`." in told) == (cards[0].method == "compressed-tensors")
    assert (cards[1].encodings, cards[1].method) == ((), "")
    assert cards[0].parameters == cards[1].parameters
    assert cards[0].active == cards[1].active


@pytest.mark.parametrize("heal", picked([(), ("--heal", "router", "--heal-iters", 2)], 2))
def test_the_commands_of_what_was_pruned_and_decoded_make_it_again(
    heal: tuple[Any, ...], folder: Path, tmp_path: Path
) -> None:
    source, keep = made(folder, "fp8 blocks")[0], keep_file(tmp_path)
    call("prune", source, tmp_path / "out-step-1", "-m", keep, "-q", *heal, *(DATA if heal else ()))
    call("convert", tmp_path / "out-step-1", tmp_path / "out", "--to", "bf16", "-q")
    facts = gather(tmp_path / "out")
    assert [command[1] for command in facts.commands] == ["prune", "convert"]
    assert (facts.experts.before, facts.experts.after) == (6, 4)
    places: dict[str, object] = {
        "SRC": source,
        "calib.jsonl": DATA[1],
        "shardxform.json": tmp_path / "out/shardxform.json",
    }
    places |= {name: tmp_path / name for name in ("out", "out-step-1")}
    for command in facts.commands:
        said = call(*(places.get(word, word) for word in command[1:]))
        assert "already complete, made from the same inputs" in said.output


def test_the_command_on_a_card_rounds_again_what_was_rounded_again(folder: Path, tmp_path: Path) -> None:
    source, out = made(folder, "mxfp4")[0], tmp_path / "out"
    call("quantize", source, out, "--group-size", 32, "--requantize", "-q")
    (command,) = gather(out).commands
    assert "--requantize" in command
    said = call(*({"SRC": source, "out": out}.get(word, word) for word in command[1:]))
    assert "already complete, made from the same inputs" in said.output


DATA = ("--data", few("calib.jsonl"), "--samples", 6, "--seqlen", 32, "--dtype", "float32")


@every
def test_pruning_copies_codes_and_scales(kind: str, folder: Path, tmp_path: Path) -> None:
    source, _ = made(folder, kind)
    out, keep = tmp_path / "out", keep_file(tmp_path)
    call("prune", source, out, "-m", keep, "-q")
    before, after = read_checkpoint(source), read_checkpoint(out)
    stem, kept = KINDS[kind].experts, (1, 2, 4, 5)
    for new, old in enumerate(kept if stem else ()):
        names = [name for name in before if name.startswith(stem.format(old))]
        assert names
        assert all(after[name.replace(stem.format(old), stem.format(new))] == before[name] for name in names)
    for name in [name for name in before if ".layers.1.mlp.experts." in name and not stem]:
        assert np.array_equal(after[name].array(), before[name].array()[list(kept)]), name
    call("verify", out, "--source", source)


@floats
def test_rounding_to_nearest_is_that_of_the_twin(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    keep = keep_file(tmp_path)
    for root, out in ((source, tmp_path / "a"), (twin, tmp_path / "b")):
        call("quantize", root, out, "-m", keep, "--group-size", 32, "-q", *again(kind))
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    call("verify", tmp_path / "a", "--source", source)


@pytest.mark.parametrize("kind", picked(FLOATS, 2))
def test_healing_and_tuning_are_those_of_the_twin(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    keep = keep_file(tmp_path)
    for root, out in ((source, tmp_path / "a"), (twin, tmp_path / "b")):
        how = ("--method", "auto-round", "--iters", 3, "--heal", "all", "--heal-iters", 3, "--heal-lr", "0.005")
        call("quantize", root, out, "-m", keep, "--group-size", 32, "-q", *how, "--batch-size", 3, *DATA, *again(kind))
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    call("verify", tmp_path / "a", "--source", source)


@floats
def test_as_much_memory_is_planned_as_for_the_twin(kind: str, folder: Path, tmp_path: Path) -> None:
    """Whose unpruned blocks, most of what is held here, are as large: they are decoded to 16 bits."""
    (tmp_path / "keep.json").write_text(
        json.dumps({"format": "shardxform.keep", "version": 1, "keep": {"0": [0, 1], "1": [2, 3]}})
    )
    how = ("--group-size", 32, "--method", "auto-round", "--heal", *DATA, "--dry-run", "--json", *again(kind))
    found = [
        json.loads(call("quantize", root, tmp_path / "out", "-m", tmp_path / "keep.json", *how).stdout)
        for root in made(folder, kind)
    ]
    assert found[0]["peak_memory_bytes"] == found[1]["peak_memory_bytes"]


@pytest.mark.parametrize("kind", picked(KINDS, 3))
def test_scores_and_evaluations_are_those_of_the_twin(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    found = []
    for number, root in enumerate((source, twin)):
        out = tmp_path / f"{number}.saliency"
        call("score", root, "-o", out, "-q", *DATA)
        data = out.read_bytes()
        length = int.from_bytes(data[:8], "little")
        found.append(data[8 + length :])
    assert found[0] == found[1]
    work = tmp_path / "evaluate.work"
    told = json.loads(call("evaluate", source, "--against", twin, "--work", work, "--json", *DATA).stdout)
    assert told["against"]["block_errors"] == [0.0, 0.0]


@pytest.mark.parametrize("kind", picked(FLOATS, 3))
def test_codes_that_are_sent_to_a_device_are_decoded_there_to_the_same_bits(kind: str, folder: Path) -> None:
    from shardxform.checkpoint.table import Checkpoint
    from shardxform.forward.resting import Coded, Precision, Sent
    from shardxform.forward.weights import Weights

    source, _ = made(folder, kind)
    precision = Precision(torch.device("cpu"), torch.float32)
    with Weights(Checkpoint.open(source), precision) as weights:
        expert = weights.expert("block", 1, 2)
        for part in (*expert.gate_up, expert.down):
            assert isinstance(part, Coded)
            sent = Sent.of(part, precision.device)
            assert sent is not None
            assert torch.equal(sent.dense(precision), part.dense(precision))


@every
def test_it_converts_to_the_twin(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    call("convert", source, tmp_path / "out", "--to", "bf16", "-q")
    assert shards(tmp_path / "out") == as_released(shards(twin), kind)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((twin / "config.json").read_text())
    call("verify", tmp_path / "out", "--source", source)


def as_released(tensors: Tensors, kind: str) -> Tensors:
    """With experts stacked, where 16-bit releases of the family have them so."""
    if "fused" not in kind:
        return tensors
    out = {name: part for name, part in tensors.items() if ".experts." not in name}
    for layer in range(any_moe.LAYERS):
        home = f"model.layers.{layer}.mlp.experts"
        one = [[tensors[f"{home}.{e}.{p}_proj.weight"].array() for p in ("gate", "up", "down")] for e in range(6)]
        out[f"{home}.gate_up_proj"] = raw("BF16", np.stack([np.concatenate((gate, up)) for gate, up, _ in one]))
        out[f"{home}.down_proj"] = raw("BF16", np.stack([down for *_, down in one]))
    return out


@every
def test_inspect_names_the_encoding(kind: str, folder: Path) -> None:
    source, twin = made(folder, kind)
    told = json.loads(call("inspect", source, "--json").stdout)
    (name, sizes), *none = told["encodings"].items()
    assert not none
    assert name.lower().startswith(kind.split()[0])
    before, after = read_checkpoint(source), read_checkpoint(twin)
    encoded = [name for name in after if name not in before or before[name] != after[name]]
    assert sizes["weights"] == sum(len(after[name].array()) if after[name].array().ndim > 2 else 1 for name in encoded)
    parts = [name for name in before if name not in after or name in encoded]
    assert sizes["bytes"] == sum(
        len(before[name].data) for name in parts if not name.endswith(("input_scale", "qscale_act"))
    )
    other = json.loads(call("inspect", twin, "--json").stdout)
    assert told["parameters"] == other["parameters"]
    assert told["outlook"].keys() == other["outlook"].keys()
    call("verify", source)


# -- one weight -------------------------------------------------------------------------------------------------------


def opened(encoding: Microscaled, codes: np.ndarray, scales: np.ndarray, whole: float | None = None) -> Any:
    """Rows of a weight in memory."""
    data = {"values": codes, "scales": scales, "whole": np.array(whole or 0, np.float32)}

    def read(ref: TensorRef, into: np.ndarray) -> None:
        flat = b"".join(data[piece.file].tobytes()[piece.offset : piece.end] for piece in ref.ranges)
        into.reshape(-1).view(np.uint8)[:] = np.frombuffer(flat, np.uint8)

    rows, columns = len(codes), codes.shape[1] * encoding.per_byte
    parts = {
        part.role: TensorRef(part.spec("m"), (ByteRange(part.role, 0, part.spec("m").nbytes),))
        for part in encoding.parts(rows, columns)
    }
    return encoding.open(parts, (rows, columns), read, checked=True)


def test_every_code_of_four_bits_is_the_value_that_it_stands_for() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    low = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    values = opened(MXFP4, codes, np.full((16, 1), 128, np.uint8)).values(0, 16)
    assert values.dtype == np.float32
    for row in range(16):
        assert [2 * value for value in low] == values[row, ::2].tolist()
        assert {2 * low[row]} == set(values[row, 1::2].tolist())
    assert np.signbit(values[0, 16])


def test_a_scale_is_of_its_block_and_the_whole_multiplies_or_divides() -> None:
    codes = np.full((2, 16), 0x21, np.uint8)  # 0.5, then 1
    scales = np.array([[0x38, 0x40], [0x30, 0xB8]], np.uint8)  # 1, 2; 0.5, -1
    for whole, factor in ((NVFP4, 1 / 3), (replace(NVFP4, whole="multiplied"), 3)):
        values = opened(whole, codes, scales, 3.0).values(0, 2)
        scale = np.float32([[1, 2], [0.5, -1]]) * np.float32(3) if factor == 3 else np.float32([[1, 2], [0.5, -1]]) / 3
        wanted = np.tile(np.float32([0.5, 1]), 16) * np.repeat(scale.astype(np.float32), 16, axis=1)
        assert np.array_equal(values, wanted)


@pytest.mark.parametrize(("rows", "columns", "begin"), [(128, 768, 0), (40, 2080, 24), (9, 8224, 3)])
def test_compiled_code_gives_the_bits_of_numpys(rows: int, columns: int, begin: int) -> None:
    """Every code, under scales of both signs and of any size that leaves them finite; blocks may be partial."""
    pytest.importorskip("numba")
    rng = np.random.default_rng(rows)
    every = np.arange(rows * columns, dtype=np.uint32).reshape(rows, columns)
    bytes_RI = (every * 7 + every // 256).astype(np.uint8)
    numbers_RI = np.where(bytes_RI & 127 == 127, bytes_RI - 1, bytes_RI).astype(np.uint8)

    def scales(shape: tuple[int, int]) -> np.ndarray:
        return (rng.choice([-1, 1], shape) * np.exp2(rng.uniform(-126, 99, shape))).astype(np.float32)

    for block in ((24, 40), (1, None), (None, None)):
        fp8 = Fp8("F8_E4M3", block, "weight_scale_inv", "F32")
        some = scales(fp8.parts(begin + rows, columns)[1].shape)
        found = np.empty((rows, columns), np.float32)
        assert fp8._compiled(numbers_RI, some, begin, found)
        assert found.tobytes() == fp8.decoded(numbers_RI, some, begin).tobytes()
        assert not fp8._compiled(bytes_RI, some, begin, found)
        assert not np.isfinite(fp8.decoded(bytes_RI, some, begin)).all()
    for small in (MXFP4, MXFP8, NVFP4):
        codes = numbers_RI[:, : columns // small.per_byte]
        some = scales((begin + rows, columns // small.group))
        codes = np.ascontiguousarray(np.tile(codes, (2, 1))) if codes.size < 1 << 16 else np.ascontiguousarray(codes)
        some = np.tile(some, (2, 1))
        found = np.empty((len(codes), columns), np.float32)
        assert small._compiled(codes, some, begin, found)
        assert found.tobytes() == small.decoded(codes, some, begin).tobytes()
    words = every.astype(np.int32)[:, : columns // 8] * np.int32(2654435)
    words = np.tile(words, (4, 1))
    for group in (32, 64, 128, -1):
        grid = Grid(bits=4, group_size=group)
        some = scales((len(words), -(-columns // (columns if group == -1 else group))))
        assert values_of(words, some, grid).tobytes() == dequantize(unpack(words, 4, "row"), some, 4, group).tobytes()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    encoding=st.sampled_from([MXFP4, MXFP8, NVFP4]),
    cut=st.tuples(st.integers(0, 95), st.integers(1, 96)),
    seed=st.integers(0, 9),
)
def test_any_run_of_rows_or_columns_is_that_of_the_whole(
    rows: int, groups: int, encoding: Microscaled, cut: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    columns = groups * encoding.group
    most = 256 if encoding.per_byte == 2 else 0x7F
    codes = rng.integers(0, most, (rows, columns // encoding.per_byte), np.uint8)
    scales = rng.integers(100, 0x7E, (rows, groups), np.uint8)
    weight = opened(encoding, codes, scales, 2.0)
    whole = weight.values(0, rows)
    for row in range(rows):
        assert np.array_equal(weight.values(row, row + 1)[0], whole[row])
        assert np.array_equal(weight.cut(Cut(row, rows - row)).values(0, rows - row), whole[row:])
    first = cut[0] % columns
    count = min(cut[1], columns - first)
    assert np.array_equal(
        weight.cut(Cut(first, count, transposed=True)).values(0, count), whole.T[first : first + count]
    )


def test_scales_and_codes_that_are_no_numbers_are_refused_by_name() -> None:
    codes, scales = np.zeros((2, 16), np.uint8), np.array([[127], [255]], np.uint8)
    with pytest.raises(ExecutionError, match=r"'m.weight_scale': scale nan at \[1, 0\]"):
        opened(MXFP4, codes, scales)
    codes = np.zeros((2, 32), np.uint8)
    codes[1, 3] = 0x7F
    with pytest.raises(ExecutionError, match=r"'m.weight': NaN or infinity at row 1, column 3"):
        opened(MXFP8, codes, np.full((2, 1), 127, np.uint8)).values(0, 2)
    for whole in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ExecutionError, match=r"'m.weight_global_scale': .*, expected a positive scale of all"):
            opened(NVFP4, np.zeros((1, 8), np.uint8), np.full((1, 1), 0x38, np.uint8), whole)
    with pytest.raises(ExecutionError, match=r"'m.weight_scale': scale inf at \[0, 0\]"):
        opened(NVFP4, np.zeros((1, 8), np.uint8), np.full((1, 1), 0x78, np.uint8), 1e-38)


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any], Tensors], object], str]] = {
    "no scale": ("mxfp4", lambda _, t: t.pop(f"{Q}weight_scale"), "missing; its weight means nothing without"),
    "another shape": (
        "nvfp4",
        lambda _, t: t.update({f"{Q}weight_scale": raw("F8_E4M3", np.zeros((64, 2), "u1"))}),
        "expected",
    ),
    "no global scale": ("nvfp4", lambda _, t: t.pop(f"{Q}weight_global_scale"), "missing"),
    "scales twice": (
        "fp8 blocks",
        lambda _, t: t.update({f"{Q}weight_scale": t[f"{Q}weight_scale_inv"]}),
        "scales twice",
    ),
    "codes and values": (
        "mxfp4",
        lambda _, t: t.update({f"{Q}weight": raw("BF16", np.zeros((64, 64), "u2"))}),
        "is there as it is, and in MXFP4 in blocks of 32 as",
    ),
    "no scale of a stack": ("mxfp4 of gpt-oss", lambda _, t: t.pop(f"{STACK}_scales"), "missing"),
    "stacks of another shape": (
        "mxfp4 of gpt-oss",
        lambda _, t: t.update({f"{STACK}_scales": raw("U8", np.zeros((6, 64, 1), "u1"))}),
        ", 192, 2]",
    ),
    "integers beside floats": (
        "mxfp4",
        lambda c, _: c["quantization_config"]["config_groups"].update(
            group_1={"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}
        ),
        "floats beside integers",
    ),
    "groups that are not read": (
        "mxfp4",
        lambda c, _: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=64),
        "floats of 4 bits in groups of 64 are not read",
    ),
}
Q = "model.layers.0.self_attn.q_proj."
STACK = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_as_the_config_says_is_refused_and_unsound(fault: str, folder: Path, tmp_path: Path) -> None:
    kind, spoil, message = FAULTS[fault]
    source, _ = made(folder, kind)
    config, tensors = json.loads((source / "config.json").read_text()), read_checkpoint(source)
    spoil(config, tensors)
    spoilt = write_checkpoint(tmp_path / "spoilt", tensors, config)
    for command in (
        ("quantize", "--group-size", 32),
        ("convert", "--to", "bf16"),
        ("prune", "-m", keep_file(tmp_path)),
    ):
        result = call(command[0], spoilt, tmp_path / command[0], *command[1:], code=1)
        assert message in result.output, result.output
        assert not (tmp_path / command[0]).exists()
    assert "not sound" in call("verify", spoilt, code=1).output


@pytest.mark.parametrize(
    ("kind", "name"),
    [("mxfp4", f"{Q}weight_scale"), ("mxfp8", f"{Q}weight_scale"), ("mxfp4 of gpt-oss", f"{STACK}_scales")],
)
def test_a_power_of_two_that_is_none_is_found(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    source, _ = made(folder, kind)
    tensors = read_checkpoint(source)
    data = bytearray(tensors[name].data)
    data[7] = 255
    tensors[name] = replace(tensors[name], data=bytes(data))
    spoilt = write_checkpoint(tmp_path / "spoilt", tensors, json.loads((source / "config.json").read_text()))
    told = call("verify", spoilt, code=1).output
    assert "1 of " in told
    assert "NaN" in told
    assert "expected finite scales" in call("convert", spoilt, tmp_path / "out", "--to", "bf16", code=1).output


# -- declared elsewhere -----------------------------------------------------------------------------------------------


def apart(source: Path, out: Path, **said: Any) -> Path:
    """The same checkpoint, with what it says of quantized weights in ModelOpt's own file."""
    config = json.loads((source / "config.json").read_text())
    declared = config.pop("quantization_config")
    quantization = {key: value for key, value in declared.items() if key != "quant_method"}
    whole = {"producer": {"name": "modelopt"}, "quantization": {"kv_cache_quant_algo": None, **quantization, **said}}
    files = {p.name: p.read_text() for p in source.glob("tokenizer*")}
    write_checkpoint(out, read_checkpoint(source), config, files={**files, "hf_quant_config.json": json.dumps(whole)})
    return out


@pytest.mark.parametrize("kind", ["fp8 whole", "nvfp4 of modelopt"])
def test_what_modelopt_says_in_a_file_of_its_own_is_read(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    root = apart(source, tmp_path / "apart")
    told = json.loads(call("inspect", root, "--json").stdout)
    assert told["encodings"] == json.loads(call("inspect", source, "--json").stdout)["encodings"]
    assert told["quantization"] == "modelopt"
    assert "hf_quant_config.json" not in told["unread"]
    call("convert", root, tmp_path / "half", "--to", "bf16", "-q")
    assert shards(tmp_path / "half") == shards(twin)
    for number, more in enumerate((("--mtp", "drop"), ("-m", keep_file(tmp_path)))):
        out = tmp_path / f"pruned{number}"
        call("prune", root, out, *more, "-q")
        declared = json.loads((out / "config.json").read_text())["quantization_config"]
        method, algorithm = "modelopt", KINDS[kind].declared["quant_algo"]
        assert declared == {"quant_method": method, "quant_algo": algorithm, "ignore": ["lm_head"]}
        call("verify", out, "--source", root)
        call("verify", out)
    assert shards(tmp_path / "pruned0") == shards(source)


def test_what_it_says_goes_after_the_config_and_without_such_weights_for_nothing(folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, "fp8 whole")
    half = write_checkpoint(tmp_path / "half", read_checkpoint(twin), json.loads((twin / "config.json").read_text()))
    (half / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert json.loads(call("inspect", half, "--json").stdout)["quantization"] == ""
    call("quantize", half, tmp_path / "out", "--group-size", 32, "-q")
    root = apart(source, tmp_path / "apart", quant_algo=8)
    assert "expected an object 'quantization' with a quant_algo" in call("inspect", root, code=1).output
    (root / "config.json").write_text((source / "config.json").read_text())
    assert json.loads(call("inspect", root, "--json").stdout)["quantization"] == "modelopt"
