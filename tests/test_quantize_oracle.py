"""Quantized checkpoints in the clients: they load without a complaint and compute with the weights that are stored.

What is stored is dequantized here by a few lines of numpy, and put into a plain model. auto-round's torch backend
multiplies scale and code in float16 and rounds the product to the type of its input; compressed-tensors multiplies in
the type of the stored scale. Weights are compared bit for bit. Logits are compared in float32, exactly where both
sides run the same operations, otherwise up to the order of sums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, read_checkpoint, tiny, write_checkpoint
from conversions import forget_changes
from smaller import BLOCKS, ROUTED, smaller
from strategies import picked
from test_prune_oracle import KEEP, prune_loaded, tokens

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.execution.runner import run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("auto_round")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.oracle

SUM_ORDER = 2e-5
"""Largest difference of logits, relative to the largest logit, that the order of float32 sums may make."""

TINY: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "head_dim": 32,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
    },
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 32, "head_dim": 32, "intermediate_size": 64},
    "deepseek_v3": {
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "v_head_dim": 32,
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices only wait for one another on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def small_moe() -> Path:
    return smaller()


def quantize(source: Path, out: Path, scheme: Scheme, manifest: Manifest | None = None, **view: Any) -> Path:
    run(plan_quantize(Checkpoint.open(source), scheme, manifest, ViewOptions(**view)), out)
    return out


def load(path: Path, dtype: Any, **options: Any) -> Any:
    """The model as a user loads it; any complaint of the loader fails."""
    config = json.loads((path / "config.json").read_text())
    quantization = config.get("quantization_config", {})
    if quantization.get("quant_method") == "gptq":  # transformers' own gptq wants optimum and gptqmodel
        options["quantization_config"] = transformers.AutoRoundConfig(backend="torch")
    multimodal = config["architectures"][0].endswith("ForConditionalGeneration")
    auto = transformers.AutoModelForImageTextToText if multimodal else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(path, dtype=dtype, device_map="cpu", output_loading_info=True, **options)
    forget_changes()
    assert {kind: keys for kind, keys in info.items() if keys} == {}
    return model.eval()


def in_float32(model: Any) -> Any:
    """All parameters and scales in float32; transformers' own `float` refuses quantized models."""
    return torch.nn.Module.float(model)


def logits(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=batch).logits


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, ties to even, as float32."""
    return torch.from_numpy(values).to(torch.bfloat16).float().numpy()


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """Signed codes of int32 words [..., W] -> [..., W * 32 / bits], the lowest bits first."""
    unsigned = words.view(np.uint32)[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & ((1 << bits) - 1)
    return unsigned.reshape(*words.shape[:-1], -1).astype(np.int32) - (1 << (bits - 1))


def stored_weights(path: Path, bits: int) -> dict[str, np.ndarray]:
    """Weights [O, I] by module, as a client computes them before it knows the model's type; float32 values."""
    tensors = read_checkpoint(path)
    out = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            codes = codes_of(np.ascontiguousarray(tensor.array().T), bits)
            scales = np.ascontiguousarray(tensors[f"{module}.scales"].array().T)
        elif kind == "weight_packed":
            codes = codes_of(tensor.array(), bits)
            scales = tensors[f"{module}.weight_scale"].float32()
            assert list(codes.shape) == tensors[f"{module}.weight_shape"].array().tolist()
        else:
            continue
        wide = np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)
        if kind == "qweight" or tensors[f"{module}.weight_scale"].dtype == "F16":
            out[module] = (wide.astype(np.float16) * codes.astype(np.float16)).astype(np.float32)
        else:
            out[module] = bf16(wide * codes.astype(np.float32))
    return out


def exact_weights(path: Path, bits: int) -> dict[str, np.ndarray]:
    """The same of GPTQ tensors in float32, where the product of a scale and a code is exact."""
    tensors = read_checkpoint(path)
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".qweight"):
            codes = codes_of(np.ascontiguousarray(tensor.array().T), bits)
            scales = tensors[name.replace(".qweight", ".scales")].float32().T
            out[name.removesuffix(".qweight")] = np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1) * codes
    return out


def held_weights(model: Any, modules: Mapping[str, Any]) -> dict[str, Any]:
    """What a loaded model multiplies with, by stored module: an identity matrix sent through packed layers."""
    out = {}
    for name in modules:
        fused = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj", name)
        experts = model.get_submodule(fused[1]) if fused else None
        if fused and hasattr(experts, "gate_up_proj"):
            both = experts.gate_up_proj[int(fused[2])].detach()
            half = both.shape[0] // 2
            down = experts.down_proj[int(fused[2])].detach()
            out[name] = {"gate": both[:half], "up": both[half:], "down": down}[fused[3]]
            continue
        layer = model.get_submodule(name)
        if hasattr(layer, "qweight"):
            eye = torch.eye(layer.infeatures, dtype=torch.bfloat16)
            out[name] = layer(eye).detach().T
        else:
            out[name] = layer.weight.detach()
    return out


def assert_same(held: Mapping[str, Any], expected: Mapping[str, np.ndarray]) -> None:
    assert held.keys() == expected.keys()
    for name, weight in held.items():
        rounded = torch.from_numpy(expected[name]).to(weight.dtype)
        assert torch.equal(weight, rounded), name


def put_weights(model: Any, weights: Mapping[str, np.ndarray]) -> Any:
    """Replace weights of a plain model, each by one that is near it: another expert's would not be."""
    with torch.no_grad():
        for name, value in weights.items():
            fused = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj", name)
            if fused:
                experts, expert = model.get_submodule(fused[1]), int(fused[2])
                half = experts.gate_up_proj.shape[1] // 2
                both = experts.gate_up_proj[expert]
                target = {"gate": both[:half], "up": both[half:], "down": experts.down_proj[expert]}[fused[3]]
            else:
                target = model.get_submodule(name).weight
            new = torch.from_numpy(value).to(target.dtype)
            assert (new - target).norm() < 0.25 * target.norm(), name
            target.copy_(new)
    return model


def reference(small_moe: Path, weights: Mapping[str, np.ndarray], keep: dict[int, tuple[int, ...]] | None) -> Any:
    """The source in float32 after bfloat16, pruned by indexing, holding `weights`."""
    model = in_float32(load(small_moe, torch.bfloat16))
    return put_weights(prune_loaded(model, keep) if keep else model, weights)


def assert_near(ours: Any, theirs: Any) -> None:
    assert (ours - theirs).abs().max() <= SUM_ORDER * theirs.abs().max()


@pytest.mark.parametrize(
    ("format_", "bits", "group_size", "scale_grid", "search", "pruned"),
    picked(
        [
            ("auto-round", 4, 128, "fp16", False, True),
            ("auto-round", 8, 64, "bf16", True, False),
            ("auto-round", 4, -1, "bf16", False, False),
            ("auto-round", 8, 32, "fp16", True, True),
            ("gptq", 4, 64, "fp16", True, False),
            ("gptq", 8, -1, "fp16", False, True),
            ("gptq", 4, 32, "bf16", True, True),
        ],
        3,
    ),
)
def test_auto_round_loads_the_small_model_and_computes_with_the_stored_weights(
    format_: Any,
    bits: Any,
    group_size: int,
    scale_grid: Any,
    search: bool,
    pruned: bool,
    small_moe: Path,
    tmp_path: Path,
) -> None:
    grid = Grid(bits=bits, group_size=group_size, scale_grid=scale_grid, search=search)
    keep = KEEP if pruned else None
    out = quantize(
        small_moe, tmp_path / "out", Scheme(grid=grid, format=format_), Manifest(keep=KEEP) if keep else None
    )
    model = load(out, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    packed = {type(module).__module__ for module in model.modules() if hasattr(module, "qweight")}
    assert packed == {"auto_round_extension.torch.qlinear_torch_zp"}
    stored = stored_weights(out, bits)
    assert (
        len(stored) == BLOCKS * 3 * (4 if pruned else ROUTED) + BLOCKS * 3 + 3 + 4
    )  # experts, shared, linear and full attention
    assert_same(held_weights(model, stored), stored)
    batch = tokens(small_moe)
    plain = reference(small_moe, exact_weights(out, bits), keep)
    ours, theirs = logits(in_float32(model), batch), logits(plain, batch)
    assert_near(ours, theirs)
    assert not torch.equal(theirs, logits(in_float32(load(small_moe, torch.bfloat16)), batch)), (
        "the oracle changed nothing"
    )


@pytest.mark.parametrize(
    ("bits", "group_size", "search", "pruned"),
    [(4, 128, True, True), (4, 32, False, False), (8, 64, False, True), (8, -1, True, False)],
)
def test_compressed_tensors_load_the_small_model_dequantized_by_their_own_code(
    bits: Any, group_size: int, search: bool, pruned: bool, small_moe: Path, tmp_path: Path
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    grid = Grid(bits=bits, group_size=group_size, search=search)
    keep = KEEP if pruned else None
    scheme = Scheme(grid=grid, format="compressed-tensors")
    out = quantize(small_moe, tmp_path / "out", scheme, Manifest(keep=KEEP) if keep else None)
    stored = stored_weights(out, bits)

    config = QuantizationConfig.model_validate(json.loads((out / "config.json").read_text())["quantization_config"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(out / "model.safetensors")
    for module, weight in stored.items():
        parts = {kind: tensors[f"{module}.{kind}"] for kind in ("weight_packed", "weight_scale", "weight_shape")}
        decompressed = compressor.decompress(parts, config.config_groups["group_0"])["weight"]
        assert torch.equal(decompressed.float(), torch.from_numpy(weight)), module

    model = load(out, torch.bfloat16, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    held = held_weights(model, stored)
    assert_same(held, stored)
    assert {weight.dtype for weight in held.values()} == {torch.bfloat16}
    batch = tokens(small_moe)
    in_its_type = {name: held[name].float().numpy() for name in stored}  # dense layers are rounded to the model's type
    plain = reference(small_moe, in_its_type, keep)
    assert torch.equal(logits(in_float32(model), batch), logits(plain, batch))

    lazily = load(out, torch.bfloat16)
    logits(lazily, batch)  # decompresses
    assert_same(held_weights(lazily, stored), stored)


@pytest.mark.parametrize("format_", ["auto-round", "gptq", "compressed-tensors"])
def test_experts_that_stay_16_bit_in_one_layer_are_loaded_too(format_: Any, small_moe: Path, tmp_path: Path) -> None:
    """The loader of auto-round un-fuses every layer or none, so kept experts are written un-fused beside others."""
    scheme = Scheme(grid=Grid(), format=format_, keep_16bit=("*.layers.1.mlp.experts.*",))
    out = quantize(small_moe, tmp_path / "out", scheme)
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    model = load(out, torch.bfloat16, **(options if format_ == "compressed-tensors" else {}))
    kept = [name for name in read_checkpoint(out) if ".1.mlp.experts." in name]
    assert len(kept) == (2 if format_ == "compressed-tensors" else 3 * ROUTED)
    source = {name: t.float32() for name, t in read_checkpoint(small_moe).items() if ".1.mlp.experts." in name}
    stored = {}
    for expert in range(ROUTED):
        stem = f"model.layers.1.mlp.experts.{expert}"
        both = source["model.layers.1.mlp.experts.gate_up_proj"][expert]
        stored |= {f"{stem}.gate_proj": both[:128], f"{stem}.up_proj": both[128:]}
        stored[f"{stem}.down_proj"] = source["model.layers.1.mlp.experts.down_proj"][expert]
    assert_same(held_weights(model, stored), stored)


@pytest.mark.parametrize("format_", ["auto-round", "gptq"])
def test_a_quantized_head_is_loaded(format_: Any, small_moe: Path, tmp_path: Path) -> None:
    out = quantize(small_moe, tmp_path / "out", Scheme(grid=Grid(), format=format_, quantize=("lm_head",)))
    model = load(out, torch.bfloat16)
    stored = {"lm_head": stored_weights(out, 4)["lm_head"]}
    assert_same(held_weights(model, stored), stored)


def test_all_formats_hold_the_same_bfloat16_weights_and_generate_the_same_text(small_moe: Path, tmp_path: Path) -> None:
    """At 4 bits a bfloat16 scale times a code is exact in float16, so that every client rounds once, to bfloat16."""
    prompt = tokens(small_moe)[:1, :24]
    held: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[int]] = {}
    for format_ in ("auto-round", "gptq", "compressed-tensors"):
        scheme = Scheme(grid=Grid(scale_grid="bf16", search=True), format=format_)
        model = load(quantize(small_moe, tmp_path / format_, scheme, Manifest(keep=KEEP)), torch.bfloat16)
        logits(model, prompt)
        held[format_] = held_weights(model, stored_weights(tmp_path / format_, 4))
        plain = in_float32(load(small_moe, torch.bfloat16))
        put_weights(prune_loaded(plain, KEEP), {name: w.float().numpy() for name, w in held[format_].items()})
        out = model.generate(prompt, max_new_tokens=20, do_sample=False)[0].tolist()
        texts[format_] = out[prompt.shape[1] :]
        texts[f"plain {format_}"] = plain.generate(prompt, max_new_tokens=20, do_sample=False)[0].tolist()[24:]
    first, *others = held.values()
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)
    assert len(texts["auto-round"]) == 20
    assert len({tuple(text) for text in texts.values()}) == 1, texts


CASES = [
    ("qwen3_5_moe", "auto-round", {}),
    ("qwen3_5_moe", "gptq", {}),
    ("qwen3_5_moe", "compressed-tensors", {}),
    ("qwen3_5_moe", "auto-round", {"text_only": True}),
    ("qwen3_5_moe", "gptq", {"text_only": True, "mtp": "drop"}),
    ("qwen3_5_moe", "compressed-tensors", {"text_only": True}),
    ("qwen3_moe", "auto-round", {}),
    ("qwen3_moe", "gptq", {}),
    ("qwen3_moe", "compressed-tensors", {}),
    ("deepseek_v3", "auto-round", {"mtp": "drop"}),
    ("deepseek_v3", "gptq", {"mtp": "drop"}),
    ("deepseek_v3", "compressed-tensors", {"mtp": "drop"}),
]


@pytest.mark.parametrize(("kind", "format_", "view"), picked(CASES, 2))
def test_every_family_and_wrapper_loads_and_computes_with_the_stored_weights(
    kind: str, format_: Any, view: dict[str, Any], tmp_path: Path
) -> None:
    config, tensors = tiny(kind, **TINY[kind])
    source = write_checkpoint(tmp_path / "source", tensors, config)
    scheme = Scheme(grid=Grid(group_size=32, scale_grid="bf16"), format=format_)
    out = quantize(source, tmp_path / "out", scheme, **view)
    stored = stored_weights(out, 4)
    options = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    model = load(out, torch.bfloat16, **(options if format_ == "compressed-tensors" else {}))
    loaded = {name: value for name, value in stored.items() if not name.startswith("mtp.")}
    assert_same(held_weights(model, loaded), loaded)
    plain = load(
        dequantized(out, tmp_path / "plain", stored if format_ == "compressed-tensors" else None), torch.float32
    )
    batch = torch.arange(24).reshape(2, 12)
    assert_near(logits(in_float32(model), batch), logits(plain, batch))


def dequantized(path: Path, out: Path, weights: Mapping[str, np.ndarray] | None) -> Path:
    """A plain float32 copy of a quantized checkpoint; what is not quantized rounded to bfloat16 as it was loaded."""
    weights = exact_weights(path, 4) if weights is None else weights
    tensors = {
        name: Raw("F32", tensor.shape, bf16(tensor.float32()).tobytes())
        for name, tensor in read_checkpoint(path).items()
        if name.rpartition(".")[0] not in weights
    }
    for module, weight in weights.items():
        values = np.ascontiguousarray(weight, np.float32)
        tensors[f"{module}.weight"] = Raw("F32", values.shape, values.tobytes())
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    return write_checkpoint(out, tensors, config)
