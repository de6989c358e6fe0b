"""Checkpoints of integers as sources of every verb, against a twin in bfloat16 that holds the same values.

They are packed here in plain numpy, a code at a time, from the layouts of AutoAWQ, GPTQModel, auto-round and
compressed-tensors. Scales are powers of two, so that the twin is exact in bfloat16, and whatever is made from the
source must be what is made from the twin, byte for byte.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import bf16, read_checkpoint, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from strategies import picked

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import any_moe  # noqa: E402
import test_remote  # noqa: E402
import test_small_floats  # noqa: E402
from hubserver import HubServer  # noqa: E402
from test_gguf_outputs import tokenizer  # noqa: E402
from test_small_floats import DATA, Tensors, apart, as_released, call, keep_file, raw, shards  # noqa: E402

from shardxform.base.tensors import TensorRef  # noqa: E402
from shardxform.errors import ExecutionError  # noqa: E402
from shardxform.formats.asymmetric import Asymmetric  # noqa: E402
from shardxform.formats.encoding import Cut  # noqa: E402
from shardxform.formats.scheme import FORMATS  # noqa: E402
from shardxform.verification.findings import Findings  # noqa: E402
from shardxform.verification.independent import check_independently  # noqa: E402

pytestmark = pytest.mark.oracle

EXPERT = "model.layers.1.mlp.experts.1.up_proj"
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
MIXED = re.compile(r".*self_attn\.(q|k|v)_proj")


def words_of(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Codes [.., N] as int32 words [.., N * bits / 32]; nibble i of a word holds the code `order[i]` of its run."""
    count = 32 // bits
    runs = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, count)
    words = np.zeros(runs.shape[:-1], np.uint32)
    for i, at in enumerate(order or range(count)):
        words |= runs[..., at] << np.uint32(bits * i)
    return words.view(np.int32)


@dataclass(frozen=True)
class Packed:
    """Codes, zero points and scales of a weight; `group` is that of each column."""

    codes_OI: np.ndarray
    zero_OG: np.ndarray
    scale_OG: np.ndarray
    group_I: np.ndarray
    bits: int

    @property
    def values(self) -> np.ndarray:
        of = self.group_I
        return (self.codes_OI - self.zero_OG[:, of]).astype(np.float32) * self.scale_OG[:, of].astype(np.float32)


def packed(w: np.ndarray, *, bits: int = 4, size: int = 32, sym: bool = False, mixed: bool = False) -> Packed:
    """Rounded so that values have at most 8 bits; with `mixed` columns belong to groups in no order."""
    columns, top = w.shape[1], (1 << min(bits, 7)) - 1
    group_I = np.arange(columns) // (columns if size == -1 else size)
    if mixed:
        group_I = np.random.default_rng(7).permutation(group_I)
    groups = int(group_I.max()) + 1
    low = np.stack([np.minimum(w[:, group_I == g].min(1), 0) for g in range(groups)], 1)
    high = np.stack([np.maximum(w[:, group_I == g].max(1), 0) for g in range(groups)], 1)
    if sym:
        high = np.maximum(-low, high)
        low = -high
    scale = 2.0 ** np.ceil(np.log2(np.maximum(high - low, 2.0**-12) / top))
    zero = np.full_like(scale, 1 << (bits - 1)) if sym else np.clip(np.rint(-low / scale), 1, top)
    least, most = (zero - (1 << (min(bits, 7) - 1)), zero + top // 2) if sym else (zero * 0, zero * 0 + top)
    codes = np.clip(np.rint(w / scale[:, group_I]) + zero[:, group_I], least[:, group_I], most[:, group_I])
    return Packed(codes.astype(np.int64), zero.astype(np.int64), scale, group_I, bits)


def gptq(p: Packed, less: int = 1, index: bool = False) -> Tensors:
    """`less` is taken from zero points in the first version of the format."""
    parts = {
        "qweight": raw("I32", words_of(p.codes_OI, p.bits).T),
        "qzeros": raw("I32", words_of(p.zero_OG.T - less, p.bits)),
        "scales": raw("F16", p.scale_OG.T.astype(np.float16).view(np.uint16)),
    }
    return {**parts, **({"g_idx": raw("I32", p.group_I.astype(np.int32))} if index else {})}


def awq(p: Packed) -> Tensors:
    return {
        "qweight": raw("I32", words_of(p.codes_OI.T, 4, AWQ)),
        "qzeros": raw("I32", words_of(p.zero_OG.T, 4, AWQ)),
        "scales": raw("F16", p.scale_OG.T.astype(np.float16).view(np.uint16)),
    }


def rows(p: Packed, zeros: bool = True, index: bool = False) -> Tensors:
    parts = {
        "weight_packed": raw("I32", words_of(p.codes_OI, p.bits)),
        "weight_scale": bf16(p.scale_OG.astype(np.float32)),
        "weight_shape": raw("I64", np.array(p.codes_OI.shape)),
    }
    if zeros:
        parts["weight_zero_point"] = raw("I32", words_of(p.zero_OG.T, p.bits).T)
    return {**parts, **({"weight_g_idx": raw("I32", p.group_I.astype(np.int32))} if index else {})}


@dataclass(frozen=True)
class Kind:
    """How weights are stored.

    Attributes:
        store: gives the parts and the values of a weight.
        declared: what the config says.
        encodings: what `inspect` says.
        weights: ends of the names of the weights that are stored so.
        model_type: of the checkpoint.
        nested: whether the config of the decoder says it.

    """

    store: Callable[[str, np.ndarray], tuple[Tensors, Packed]]
    declared: dict[str, Any]
    encodings: tuple[str, ...]
    weights: tuple[str, ...] = ("_proj.weight",)
    model_type: str = "qwen3_moe"
    nested: bool = False


def plainly(write: Callable[..., Tensors], how: dict[str, Any], **more: Any) -> Callable[..., tuple[Tensors, Packed]]:
    def store(_: str, w: np.ndarray) -> tuple[Tensors, Packed]:
        p = packed(w, **how)
        return write(p, **more), p

    return store


def by_name(name: str, w: np.ndarray) -> tuple[Tensors, Packed]:
    """Of 8 bits where attention reads."""
    p = packed(w, bits=8, size=64, sym=True) if MIXED.match(name) else packed(w, sym=True)
    return gptq(p), p


def compressed(ignore: list[str], **weights: Any) -> dict[str, Any]:
    weights = {"type": "int", "num_bits": 4, "strategy": "group", "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    found = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return {**found, "config_groups": {"group_0": group}, "ignore": ["lm_head", *ignore], "kv_cache_scheme": None}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "lm_head": False}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
ROUND |= {"block_name_to_quantize": "model.layers", "iters": 200}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
GLM: dict[str, Any] = {"first_k_dense_replace": 0, "rope_parameters": ROPE}
SKIPPED = ["re:.*self_attn.*"]
ROUTERS = {"-:.*mlp\\.gate$": {}}
KEPT = {"model.layers.0.mlp.gate": {"bits": 16}, "model.layers.1.mlp.gate": {"bits": 16}}

KINDS: dict[str, Kind] = {
    "awq": Kind(
        plainly(awq, {}),
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["mlp.gate"],
        },
        ("4-bit integers with zero points, groups of 32, in the order of AWQ",),
    ),
    "gptq with zero points": Kind(
        plainly(gptq, {}), {**GPTQ, "dynamic": ROUTERS}, ("4-bit integers with zero points, groups of 32",)
    ),
    "gptq in another order": Kind(
        plainly(gptq, {"mixed": True}, less=0, index=True),
        {**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2", "dynamic": ROUTERS},
        ("4-bit integers with zero points, groups of 32",),
    ),
    "gptq of 8 bits": Kind(
        plainly(gptq, {"bits": 8, "size": -1}),
        {**GPTQ, "bits": 8, "group_size": -1, "dynamic": ROUTERS},
        ("8-bit integers with zero points, a scale a row",),
    ),
    "auto-round of two widths": Kind(
        by_name,
        {
            **ROUND,
            "sym": True,
            "packing_format": "auto_round:auto_gptq",
            "extra_config": {**KEPT, MIXED.pattern: {"bits": 8, "group_size": 64}},
        },
        ("4-bit integers, groups of 32", "8-bit integers, groups of 64"),
    ),
    "auto-round in the order of awq": Kind(
        plainly(awq, {}),
        {**ROUND, "packing_format": "auto_round:auto_awq", "extra_config": KEPT},
        ("4-bit integers with zero points, groups of 32, in the order of AWQ",),
    ),
    "compressed-tensors with zero points": Kind(
        plainly(rows, {"mixed": True}, index=True),
        compressed(SKIPPED, symmetric=False, group_size=32, actorder="group"),
        ("4-bit integers with zero points, groups of 32",),
        ("down_proj.weight", "gate_proj.weight", "up_proj.weight"),
    ),
    "compressed-tensors in groups of 16": Kind(
        plainly(rows, {"sym": True, "size": 16}, zeros=False),
        compressed(SKIPPED, symmetric=True, group_size=16),
        ("4-bit integers, groups of 16",),
        ("down_proj.weight", "gate_proj.weight", "up_proj.weight"),
    ),
}
KINDS["in the config of the decoder"] = Kind(
    plainly(rows, {"sym": True, "size": 16}, zeros=False),
    compressed([*SKIPPED, "re:.*visual.*", "re:.*shared_experts.*"], symmetric=True, group_size=16),
    ("4-bit integers, groups of 16",),
    tuple(f"{expert}.{part}_proj.weight" for expert in range(6) for part in ("down", "gate", "up")),
    "glm4v_moe",
    nested=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("integers")


def made(folder: Path, kind: str, kinds: dict[str, Kind] = KINDS) -> tuple[Path, Path]:
    """A checkpoint, and its twin in bfloat16."""
    model_type = kinds[kind].model_type
    plain, source, twin = folder / model_type, folder / kind, folder / f"{kind} twin"
    if source.exists():
        return source, twin
    if not plain.exists():
        over = GLM if kinds[kind].nested else {"norm_topk_prob": True}  # as llama.cpp runs it
        any_moe.save(any_moe.build(model_type, **over), plain)
    config, tensors = json.loads((plain / "config.json").read_text()), read_checkpoint(plain)
    stored, values = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(kinds[kind].weights)]:
        parts, p = kinds[kind].store(name, tensors[name].float32())
        del stored[name]
        stored |= {name.removesuffix("weight") + last: part for last, part in parts.items()}
        values[name] = bf16(p.values)
        assert np.array_equal(values[name].float32(), p.values), name
    files = {p.name: p.read_text() for p in plain.glob("tokenizer*")}
    write_checkpoint(twin, values, config, files=files)
    declared = {"quantization_config": kinds[kind].declared}
    said = {**config, "text_config": {**config["text_config"], **declared}} if kinds[kind].nested else config | declared
    write_checkpoint(source, stored, said, files=files)
    return source, twin


def test_words_are_what_the_layouts_say() -> None:
    codes = np.arange(8)[None]
    assert words_of(codes, 4)[0, 0] == 0x76543210
    assert words_of(codes, 4, AWQ)[0, 0] == 0x75316420
    assert words_of(codes[:, :4], 8)[0, 0] == 0x03020100


@pytest.mark.parametrize("kind", picked(KINDS, 4))
def test_pruning_copies_integers(kind: str, folder: Path, tmp_path: Path) -> None:
    source, _ = made(folder, kind)
    call("prune", source, tmp_path / "out", "-m", keep_file(tmp_path), "-q")
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "out")
    home = next(name for name in before if ".layers.1.mlp.experts.0." in name).partition("layers.")[0]
    stem = home + "layers.1.mlp.experts.{}."
    for new, old in enumerate((1, 2, 4, 5)):
        names = [name for name in before if name.startswith(stem.format(old))]
        assert len(names) >= 9
        assert all(after[name.replace(stem.format(old), stem.format(new))] == before[name] for name in names)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert any_moe.text_of(config)["quantization_config"] == KINDS[kind].declared
    call("verify", tmp_path / "out", "--source", source)


@pytest.mark.parametrize("kind", picked(KINDS, 4))
def test_rounding_anew_is_that_of_the_twin(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    how = ("-m", keep_file(tmp_path), "--group-size", 32, "-q", "--requantize")
    for root, out in ((source, tmp_path / "a"), (twin, tmp_path / "b")):
        call("quantize", root, out, *how)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    call("verify", tmp_path / "a", "--source", source)


@pytest.mark.parametrize("kind", picked(KINDS, 9))
def test_healing_and_tuning_are_those_of_the_twin(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    how = ("-m", keep_file(tmp_path), "--group-size", 32, "-q", "--requantize", "--method", "auto-round", "--iters", 3)
    heal = ("--heal", "all", "--heal-iters", 3, "--heal-lr", "0.005", "--batch-size", 3)
    for root, out in ((source, tmp_path / "a"), (twin, tmp_path / "b")):
        call("quantize", root, out, *how, *heal, *DATA)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    call("verify", tmp_path / "a", "--source", source)


@pytest.mark.parametrize("kind", picked(KINDS, 9))
def test_scores_and_evaluations_are_those_of_the_twin(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    found = []
    for number, root in enumerate((source, twin)):
        out = tmp_path / f"{number}.saliency"
        call("score", root, "-o", out, "-q", *DATA)
        data = out.read_bytes()
        found.append(data[8 + int.from_bytes(data[:8], "little") :])
    assert found[0] == found[1]
    told = json.loads(call("evaluate", source, "--against", twin, "--work", tmp_path / "work", "--json", *DATA).stdout)
    assert told["against"]["block_errors"] == [0.0, 0.0]


@pytest.mark.parametrize("kind", picked(KINDS, 4))
def test_it_converts_to_the_twin(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    call("convert", source, tmp_path / "out", "--to", "bf16", "-q")
    assert shards(tmp_path / "out") == as_released(shards(twin), kind)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((twin / "config.json").read_text())
    call("verify", tmp_path / "out", "--source", source)


@pytest.mark.parametrize("kind", picked(KINDS, 4))
def test_inspect_names_the_encodings(kind: str, folder: Path) -> None:
    source, twin = made(folder, kind)
    told = json.loads(call("inspect", source, "--json").stdout)
    before, after = read_checkpoint(source), read_checkpoint(twin)
    assert sorted(told["encodings"]) == sorted(KINDS[kind].encodings)
    found = told["encodings"].values()
    assert sum(each["weights"] for each in found) == len([name for name in after if name not in before])
    assert sum(each["bytes"] for each in found) == sum(len(before[n].data) for n in before if n not in after)
    assert told["parameters"] == json.loads(call("inspect", twin, "--json").stdout)["parameters"]
    call("verify", source)


# -- integers that stay what they are ---------------------------------------------------------------------------------

SYM = {"sym": True}
EXPERTS = ("down_proj.weight", "gate_proj.weight", "up_proj.weight")
STILL: dict[str, Kind] = {
    "compressed-tensors in the config of the decoder": replace(
        KINDS["in the config of the decoder"],
        store=plainly(rows, {"sym": True}, zeros=False),
        declared=compressed([*SKIPPED, "re:.*visual.*", "re:.*shared_experts.*"], symmetric=True, group_size=32),
        encodings=("4-bit integers, groups of 32",),
    ),
    "auto-round": Kind(
        plainly(gptq, {"sym": True}),
        {**ROUND, **SYM, "packing_format": "auto_round:auto_gptq", "extra_config": KEPT},
        ("4-bit integers, groups of 32",),
    ),
    "gptq": Kind(plainly(gptq, {"sym": True}), {**GPTQ, **SYM, "dynamic": ROUTERS}, ("4-bit integers, groups of 32",)),
    "compressed-tensors": Kind(
        plainly(rows, {"sym": True}, zeros=False),
        compressed(SKIPPED, symmetric=True, group_size=32),
        ("4-bit integers, groups of 32",),
        EXPERTS,
    ),
    "8 bits": Kind(
        plainly(gptq, {"sym": True, "bits": 8}),
        {**GPTQ, **SYM, "bits": 8, "dynamic": ROUTERS},
        ("8-bit integers, groups of 32",),
    ),
}
GRID = ("--group-size", 32, "--scale-grid", "fp16")
"""That of sources whose scales nothing says to be exact in bfloat16."""


def codes_of(tensors: Tensors, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [O, I] and scales [O, G] of a weight in any of the three formats, unpacked by hand."""
    if f"{name}.qweight" in tensors:
        words, scales = tensors[f"{name}.qweight"].array().T, tensors[f"{name}.scales"].float32().T
    else:
        words, scales = tensors[f"{name}.weight_packed"].array(), tensors[f"{name}.weight_scale"].float32()
    nibbles = [(words.astype(np.int64) >> (4 * i)) & 15 for i in range(8)]
    return np.stack(nibbles, -1).reshape(len(words), -1), scales


@pytest.mark.parametrize(
    ("kind", "to"), picked([(kind, to) for kind in STILL if kind != "8 bits" for to in FORMATS[:3]], 5)
)
def test_integers_of_the_grid_asked_for_stay_what_they_are(kind: str, to: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind, STILL)
    grid = ("--group-size", 32) if "compressed" in kind else GRID
    how = ("-m", keep_file(tmp_path), *grid, "--format", to)
    if to == "compressed-tensors" and grid == GRID:
        assert "--requantize" in call("quantize", source, tmp_path / "no", *how[:4], *how[6:], code=1).output
        return
    told = call("quantize", source, tmp_path / "out", *how).output
    before, after, plain = read_checkpoint(source), shards(tmp_path / "out"), shards(twin)
    names = [name for name in plain if name.endswith(STILL[kind].weights) and ".experts." in name and ".1." in name]
    still = len([name for name in plain if name not in before]) - 2 * 2 * 3  # less those of pruned experts
    assert f"{still} weights keep every integer" in told
    for name in names:
        home, layer, expert, rest = re.fullmatch(r"(.*)layers\.(\d)\.mlp\.experts\.(\d)\.(\w+)\.weight", name).groups()
        if int(layer) != 1 or int(expert) not in (1, 2, 4, 5):
            continue
        new = f"{home}layers.1.mlp.experts.{(1, 2, 4, 5).index(int(expert))}.{rest}"
        for ours, theirs in zip(codes_of(after, new), codes_of(before, name.removesuffix(".weight")), strict=True):
            assert np.array_equal(ours, theirs), name
    told = call("verify", tmp_path / "out", "--source", source).output
    assert f"{still} quantized weights with the integers and scales of the source" in told
    if "compressed" in kind:  # attention, which is in 16 bits there, is rounded as that of the twin
        call("quantize", twin, tmp_path / "twin", *how, "-q")
        other = shards(tmp_path / "twin")
        assert all(after[name] == other[name] for name in other if "self_attn" in name)
        assert any("self_attn.q_proj.qweight" in name or "q_proj.weight_packed" in name for name in other)


# -- one weight, against other implementations ------------------------------------------------------------------------


def opened(encoding: Asymmetric, parts: Tensors, shape: tuple[int, int]) -> Any:
    """Rows of a weight in memory."""

    def read(ref: TensorRef, into: np.ndarray) -> None:
        into.reshape(-1).view(np.uint8)[:] = np.frombuffer(parts[ref.name.removeprefix("m.")].data, np.uint8)

    refs = {part.role: TensorRef(part.spec("m"), ()) for part in encoding.parts(*shape)}
    return encoding.open(refs, shape, read, checked=True)


def random_codes(rows_: int, columns: int, size: int, bits: int = 4, seed: int = 0, zeros: bool = True) -> Packed:
    rng = np.random.default_rng(seed)
    group_I = np.arange(columns) // size
    shape, most = (rows_, int(group_I[-1]) + 1), 1 << bits
    zero = rng.integers(1, most, shape) if zeros else np.full(shape, most // 2)
    scale = 2.0 ** rng.integers(-12, -2, shape) * rng.choice([-1.0, 1.0], shape)
    return Packed(rng.integers(0, most, (rows_, columns)), zero, scale, group_I, bits)


def test_awq_is_what_compressed_tensors_reads() -> None:
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    p = random_codes(64, 96, 32)
    scale = np.random.default_rng(3).normal(size=p.scale_OG.shape).astype(np.float16)
    parts = {**awq(p), "scales": raw("F16", scale.T.view(np.uint16))}
    qweight, qzeros = (torch.from_numpy(parts[name].array().copy()) for name in ("qweight", "qzeros"))
    converter = AutoAWQConverter(bits=4, group_size=32)
    codes, scales, zeros = converter._convert_gemm_module(qweight, torch.from_numpy(scale.T.copy()), qzeros)
    wide = [each.float().repeat_interleave(32, dim=1) for each in (scales, zeros)]
    theirs = (codes.float() - wide[1]) * wide[0]
    assert np.array_equal(opened(Asymmetric(4, 32, "awq", "stored"), parts, (64, 96)).values(0, 64), theirs.numpy())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("less", [0, 1])
def test_gptq_with_zero_points_is_what_auto_round_runs(bits: int, less: int) -> None:
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    p = random_codes(64, 96, 32, bits)
    parts = gptq(p, less)
    layer = (qlinear_torch_zp if less else qlinear_torch).QuantLinear(bits, 32, 96, 64, bias=False)
    for name in ("qweight", "qzeros"):
        setattr(layer, name, torch.from_numpy(parts[name].array().copy()))
    layer.scales = torch.from_numpy(parts["scales"].array().copy().view(np.float16))
    theirs = layer.forward(torch.eye(96)).T.numpy()
    encoding = Asymmetric(bits, 32, "gptq", "less one" if less else "stored")
    ours = opened(encoding, parts, (64, 96)).values(0, 64)
    if bits == 4:
        assert np.array_equal(ours, theirs)
    else:  # which holds zero points of 8 bits in int16, and products in float16
        assert np.allclose(ours, theirs, rtol=2.0**-10)
    assert np.array_equal(ours, p.values.astype(np.float32))


def test_columns_in_another_order_are_in_the_group_that_is_named() -> None:
    p = random_codes(32, 64, 32)
    p = replace(p, group_I=np.random.default_rng(1).permutation(p.group_I))
    for order, zeros, parts in (("gptq", "less one", gptq(p, 1, True)), ("row", "stored", rows(p, True, True))):
        dtype = "BF16" if order == "row" else "F16"
        encoding = Asymmetric(4, 32, order, zeros, scale_dtype=dtype, g_idx=True)
        values = opened(encoding, parts, (32, 64)).values(0, 32)
        for column, group in enumerate(p.group_I):
            wanted = (p.codes_OI[:, column] - p.zero_OG[:, group]) * p.scale_OG[:, group]
            assert np.array_equal(values[:, column], wanted.astype(np.float32))


def test_zero_points_of_rows_are_what_compressed_tensors_unpacks() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    p = random_codes(64, 96, 16)
    parts = rows(p)
    words, zeros = (torch.from_numpy(parts[f"weight_{name}"].array().copy()) for name in ("packed", "zero_point"))
    codes = unpack_from_int32(words, 4, torch.Size((64, 96))).float()
    zero = unpack_from_int32(zeros, 4, torch.Size((64, 6)), packed_dim=0).float().repeat_interleave(16, dim=1)
    theirs = (codes - zero) * torch.from_numpy(parts["weight_scale"].float32().copy()).repeat_interleave(16, dim=1)
    encoding = Asymmetric(4, 16, "row", "stored", scale_dtype="BF16")
    assert np.array_equal(opened(encoding, parts, (64, 96)).values(0, 64), theirs.numpy())


@given(
    order=st.sampled_from(["gptq", "awq", "row"]),
    cut=st.tuples(st.integers(0, 63), st.integers(1, 64)),
    size=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 99),
)
def test_any_run_of_rows_or_columns_is_that_of_the_whole(
    order: Any, cut: tuple[int, int], size: int, seed: int
) -> None:
    p = random_codes(64, 64, size, seed=seed)
    parts = {"gptq": lambda: gptq(p, 0), "awq": lambda: awq(p), "row": lambda: rows(p)}[order]()
    encoding = Asymmetric(4, size, order, "stored", scale_dtype="BF16" if order == "row" else "F16")
    weight = opened(encoding, parts, (64, 64))
    first, count = cut[0], min(cut[1], 64 - cut[0])
    whole = p.values.astype(np.float32)
    assert np.array_equal(weight.values(first, first + count), whole[first : first + count])
    assert np.array_equal(weight.cut(Cut(first, count)).values(0, count), whole[first : first + count])
    turned = weight.cut(Cut(first, count, transposed=True))
    assert np.array_equal(turned.values(0, count), whole.T[first : first + count])


def with_array(parts: Tensors, name: str, change: Callable[[np.ndarray], object]) -> Tensors:
    array = parts[name].array().copy()
    change(array)
    return {**parts, name: raw(parts[name].dtype, array)}


def put(at: Any, value: Any) -> Callable[[np.ndarray], object]:
    return lambda array: array.__setitem__(at, value)


ODD: dict[str, tuple[Asymmetric, Tensors, str]] = {
    "a zero point that clients read in two ways": (
        Asymmetric(4, 32, "gptq", "less one"),
        with_array(gptq(random_codes(32, 64, 32)), "qzeros", put((1, 2), np.int32(0x1111F111))),
        r"'m.qzeros': zero point 15 of row 19, group 1, .* gptq_v2",
    ),
    "zero points of a symmetric weight": (
        Asymmetric(4, 32, "gptq", "less one", symmetric=True),
        gptq(random_codes(32, 64, 32)),
        r"'m.qzeros': zero point \d+ of row 0, group 0, expected 8 ",
    ),
    "a scale that is no number": (
        Asymmetric(4, 32, "awq", "stored"),
        with_array(awq(random_codes(32, 64, 32)), "scales", put((1, 3), np.inf)),
        r"'m.scales': scale inf at \[3, 1\]",
    ),
    "a column in no group": (
        Asymmetric(4, 32, "gptq", "stored", g_idx=True),
        with_array(gptq(random_codes(32, 64, 32), 0, True), "g_idx", put(5, 2)),
        r"'m.g_idx': column 5 is in group 2, expected one of 2",
    ),
    "another shape": (
        Asymmetric(4, 32, "row", "stored", scale_dtype="BF16"),
        with_array(rows(random_codes(32, 64, 32)), "weight_shape", put(1, 60)),
        r"'m.weight_shape': \[32, 60\], expected the weight's shape \[32, 64\]",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_data_that_means_nothing_is_refused_by_name(case: str) -> None:
    encoding, parts, message = ODD[case]
    with pytest.raises(ExecutionError, match=message):
        opened(encoding, parts, (32, 64))


# -- defects ----------------------------------------------------------------------------------------------------------


def flipped(root: Path, name: str, out: Path) -> Path:
    """The same output with one bit of a tensor changed, and no record of what was written."""
    tensors = read_checkpoint(root)
    data = bytearray(tensors[name].data)
    data[len(data) // 2] ^= 0x10
    tensors[name] = replace(tensors[name], data=bytes(data))
    files = {p.name: p.read_text() for p in root.glob("tokenizer*")}
    return write_checkpoint(out, tensors, json.loads((root / "config.json").read_text()), files=files)


@pytest.mark.parametrize(
    ("kind", "verb", "name"),
    picked(
        [
            ("compressed-tensors", ("quantize", "--group-size", 32), "mlp.experts.1.up_proj.qweight"),
            ("compressed-tensors", ("quantize", "--group-size", 32), "mlp.experts.1.up_proj.scales"),
            ("compressed-tensors", ("quantize", "--group-size", 32), "self_attn.q_proj.qweight"),
            ("gptq", ("quantize", *GRID, "--requantize"), "mlp.experts.1.up_proj.qweight"),
        ],
        3,
    ),
)
def test_a_changed_bit_of_what_was_taken_over_or_rounded_is_found(
    kind: str, verb: tuple[Any, ...], name: str, folder: Path, tmp_path: Path
) -> None:
    source, _ = made(folder, kind, STILL)
    keep = keep_file(tmp_path)
    call(verb[0], source, tmp_path / "out", "-m", keep, "-q", *verb[1:])
    bare = shutil.copytree(tmp_path / "out", tmp_path / "bare")
    record = json.loads((bare / "shardxform.json").read_text())
    del record["digests"], record["checksum"]
    (bare / "shardxform.json").write_text(json.dumps(record))
    call("verify", bare, "--source", source, "--independent")
    bad = flipped(tmp_path / "out", f"model.layers.1.{name}", tmp_path / "bad")
    (bad / "shardxform.json").write_text(json.dumps(record))
    told = call("verify", bad, "--source", source, code=1).output
    assert f"model.layers.1.{name.rpartition('.')[0]}" in told
    assert "not sound" in told


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any], Tensors], object], str]] = {
    "no zero points": ("awq", lambda _, t: t.pop(f"{EXPERT}.qzeros"), "missing"),
    "zero points of another shape": (
        "awq",
        lambda _, t: t.update({f"{EXPERT}.qzeros": raw("I32", np.zeros((1, 4), "i4"))}),
        r"I32 \[1, 4\], expected I32 \[2, 4\]",
    ),
    "another version": ("awq", lambda c, _: c.update(version="gemv"), "expected 'gemm' with zero_point true"),
    "groups that columns do not fill": ("awq", lambda c, _: c.update(group_size=48), "no groups of 48"),
    "no groups": (
        "gptq in another order",
        lambda _, t: t.update({f"{EXPERT}.g_idx": raw("I32", np.zeros(32, "i4"))}),
        r"I32 \[32\], expected I32 \[64\]",
    ),
    "three bits": ("gptq with zero points", lambda c, _: c.update(bits=3), "expected 4 or 8, found 3"),
    "marlin": ("gptq with zero points", lambda c, _: c.update(checkpoint_format="marlin"), "'marlin' .* is not read"),
    "rotations": (
        "compressed-tensors with zero points",
        lambda c, _: c.update(transform_config={"config_groups": {"a": {}}}),
        "transform_config beside integers",
    ),
}


@pytest.mark.parametrize("fault", picked(FAULTS, 3))
def test_what_is_not_as_the_config_says_is_refused_and_unsound(fault: str, folder: Path, tmp_path: Path) -> None:
    kind, spoil, message = FAULTS[fault]
    source, _ = made(folder, kind)
    config, tensors = json.loads((source / "config.json").read_text()), read_checkpoint(source)
    spoil(config["quantization_config"], tensors)
    spoilt = write_checkpoint(tmp_path / "spoilt", tensors, config)
    for verb in (("quantize", "--requantize"), ("convert", "--to", "bf16")):
        told = call(verb[0], spoilt, tmp_path / verb[0], *verb[1:], code=1).output
        assert re.search(message, told), told
        assert not (tmp_path / verb[0]).exists()
    assert "not sound" in call("verify", spoilt, code=1).output


def _with_merges(root: Path, copy: Path) -> Path:
    """A copy with a tokenizer that llama.cpp loads, which wants merges."""
    shutil.copytree(root, copy)
    config = json.loads((copy / "config.json").read_bytes())
    (copy / "tokenizer.json").write_text(tokenizer(int(config["vocab_size"])))
    return copy


@pytest.mark.parametrize(
    ("kind", "more"), picked([("awq", ("--requantize",)), ("gptq", GRID), ("compressed-tensors", ())], 2)
)
def test_gguf_holds_what_the_other_formats_do(kind: str, more: tuple[Any, ...], folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind, KINDS | STILL)
    source, twin = (_with_merges(each, tmp_path / f"{each.name}-merges") for each in (source, twin))
    how = ("-m", keep_file(tmp_path), "--format", "gguf", "--pre-tokenizer", "gpt-2", "-q", *more)
    call("quantize", source, tmp_path / "out", *how)
    call("verify", tmp_path / "out", "--source", source)
    if kind == "awq":
        call("quantize", twin, tmp_path / "twin", *(each for each in how if each != "--requantize"))
        assert [p.read_bytes() for p in (tmp_path / "out").glob("*.gguf")] == [
            p.read_bytes() for p in (tmp_path / "twin").glob("*.gguf")
        ]


def test_what_stays_beside_is_not_tuned_and_runs_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Attention is tuned as in a twin whose experts stay in 16 bits: the blocks have the same values."""
    source, twin = made(folder, "compressed-tensors", STILL)
    how = ("-m", keep_file(tmp_path), "--group-size", 32, "-q", "--method", "auto-round", "--iters", 3, *DATA)
    call("quantize", source, tmp_path / "a", *how, "--batch-size", 3)
    call("quantize", twin, tmp_path / "b", *how, "--batch-size", 3, "--keep-16bit", "*.experts.*")
    tuned, other, before = shards(tmp_path / "a"), shards(tmp_path / "b"), read_checkpoint(source)
    names = [name for name in other if "self_attn" in name and name.endswith("qweight")]
    assert len(names) == 8
    assert all(tuned[name] == other[name] for name in names)
    for ours, theirs in zip(
        codes_of(tuned, "model.layers.1.mlp.experts.0.up_proj"), codes_of(before, EXPERT), strict=True
    ):
        assert np.array_equal(ours, theirs)
    call("verify", tmp_path / "a", "--source", source)


@pytest.mark.parametrize(
    ("kind", "asked", "message"),
    [
        (
            "compressed-tensors",
            ("--heal", "all", *DATA),
            "integers that stay as they are, and cannot move; --requantize",
        ),
        ("gptq", (*GRID[2:], "--method", "auto-round", *DATA), "nothing to tune: all "),
        ("gptq", (), "--scale-grid fp16 takes them over as they are, --requantize rounds them a second time"),
        ("8 bits", ("--scheme", "W8A16"), "--scale-grid fp16 takes them over"),
        ("compressed-tensors", ("--group-size", -1), "--group-size 32 takes them over as they are"),
        ("compressed-tensors", ("--scheme", "W8A16"), "--scheme W4A16 takes them over as they are"),
        ("awq", (), "with zero points, groups of 32, in the order of AWQ: no larger than 4-bit integers"),
    ],
)
def test_what_cannot_stay_or_move_is_refused(
    kind: str, asked: tuple[Any, ...], message: str, folder: Path, tmp_path: Path
) -> None:
    source, _ = made(folder, kind, KINDS | STILL)
    how = ("-m", keep_file(tmp_path), *(() if "--group-size" in asked else ("--group-size", 32)))
    told = call("quantize", source, tmp_path / "out", *how, *asked, code=1).output
    assert message in told
    assert not (tmp_path / "out").exists()


def test_eight_bits_are_rounded_to_four_and_stay_where_eight_are_asked_for(folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, "8 bits", STILL)
    how = ("-m", keep_file(tmp_path), "--group-size", 32, "-q")
    for root, out in ((source, tmp_path / "a"), (twin, tmp_path / "b")):
        call("quantize", root, out, *how)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    call("verify", tmp_path / "a", "--source", source, "--independent")
    call("quantize", source, tmp_path / "c", *how, "--scheme", "W8A16", "--scale-grid", "fp16")
    before, after = read_checkpoint(source), shards(tmp_path / "c")
    for last in ("qweight", "qzeros", "scales"):
        assert after[f"model.layers.1.mlp.experts.0.up_proj.{last}"] == before[f"{EXPERT}.{last}"]
    call("verify", tmp_path / "c", "--source", source)


def test_a_pruned_view_of_integers_is_measured_as_what_pruning_writes(folder: Path, tmp_path: Path) -> None:
    found = []
    for kind in picked(["awq", "compressed-tensors"], 2):
        source, _ = made(folder, kind, KINDS | STILL)
        keep = keep_file(tmp_path)
        call("prune", source, tmp_path / kind, "-m", keep, "-q")
        for root in ((source, "-m", keep), (tmp_path / kind,)):
            told = json.loads(call("evaluate", *root, "--work", tmp_path / "work", "--json", *DATA).stdout)
            found.append(told["perplexity"])
    assert found[::2] == found[1::2]


@pytest.mark.parametrize("kind", picked(["fp8 whole", "awq"], 2))
def test_a_repository_is_read_as_a_folder(kind: str, folder: Path, tmp_path: Path) -> None:
    """Its hf_quant_config.json, too, where config.json says nothing."""
    source, _ = made(folder, kind) if kind in KINDS else test_small_floats.made(folder, kind)
    root = apart(source, tmp_path / "apart") if kind not in KINDS else source
    how = ("-m", keep_file(tmp_path), "--group-size", 32, "-q", "--requantize")
    with HubServer() as server:
        server.add_repo("org/small", root)
        test_remote.command(server, tmp_path / "home", "quantize", "org/small", tmp_path / "there", *how)
    call("quantize", root, tmp_path / "here", *how)
    assert shards(tmp_path / "there") == shards(tmp_path / "here")


@pytest.mark.parametrize("kind", picked(KINDS, 3))
def test_the_independent_check_knows_zero_points_and_groups(kind: str, folder: Path, tmp_path: Path) -> None:
    """Of pruned integers as they are, and of what they are rounded to; and it finds one that is another."""
    source, _ = made(folder, kind)
    keep, bare = keep_file(tmp_path), tmp_path / "bare"
    for verb in (("prune",), ("quantize", *GRID, "--requantize")):
        out = tmp_path / verb[0]
        call(verb[0], source, out, "-m", keep, "-q", *verb[1:])
        assert "derived independently" in call("verify", out, "--source", source, "--independent").output
    stem = EXPERT if KINDS[kind].model_type == "qwen3_moe" else EXPERT.replace("model.", "model.language_model.", 1)
    names = [name for name in read_checkpoint(tmp_path / "prune") if name.startswith(f"{stem}.")]
    for last in ("qweight", "qzeros", "scales", "weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx"):
        if (name := f"{stem}.{last}") in names:
            flipped(tmp_path / "prune", name, bare)
            shutil.copy(tmp_path / "prune" / "shardxform.json", bare)
            found = Findings()
            check_independently(bare, source, found)
            words = "weight_packed" if f"{stem}.weight_packed" in names else "qweight"
            assert [problem.where for problem in found.problems] == [f"{stem}.{words}"], name
            shutil.rmtree(bare)
