"""`prune --heal` of checkpoints in integers: written as the source has them, in 16 bits, or refused.

The twin of a checkpoint holds the same values in bfloat16, and is healed as any 16-bit checkpoint is. Rounding is held
against compressed-tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from build import Raw, forget_digests, read_checkpoint, write_checkpoint
from strategies import picked

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import test_small_floats as floats  # noqa: E402
from test_heal_small_floats import HEAL, config_of, healed, layers_moved, record_of  # noqa: E402
from test_integer_sources import KINDS, STILL, made  # noqa: E402
from test_small_floats import DATA, call, keep_file  # noqa: E402

from shardxform.formats.asymmetric import Asymmetric  # noqa: E402
from shardxform.formats.encoding import round_to  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

ALL_KINDS = KINDS | STILL
SYMMETRIC = ["compressed-tensors", "gptq", "compressed-tensors in groups of 16", "auto-round", "8 bits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("healed")


@pytest.mark.parametrize("kind", picked(SYMMETRIC, 3))
def test_written_as_the_source_has_it_only_words_and_scales_of_what_moved_differ(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    source, _ = made(folder, kind, ALL_KINDS)
    after, out = healed(source, tmp_path / "out", "moe"), tmp_path / "out"
    call("prune", source, tmp_path / "plain", "-m", keep_file(tmp_path), "-q")
    before = read_checkpoint(tmp_path / "plain")
    assert record_of(out)["inputs"]["recipe"]["heal"]["encoding"] == "source"
    assert config_of(out) == config_of(tmp_path / "plain")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    changed = {name for name in after if after[name] != before[name]}
    assert layers_moved(out)
    assert any(".experts." in name for name in changed)
    for name in changed:
        assert ".mlp." in name or "post_attention_layernorm" in name
        assert not name.endswith(("qzeros", "weight_shape", "g_idx"))
    report = verify(out, source=source)
    assert report.sound, report.problems
    assert report.values_near == report.tensors_healed > 0
    assert report.values_compared + report.values_near == report.tensors


# -- in 16 bits -------------------------------------------------------------------------------------------------------

IN_16_BITS = ["awq", "gptq", "compressed-tensors", "auto-round", "gptq with zero points", *KINDS, "8 bits"]


@pytest.mark.parametrize("kind", picked([kind for kind in dict.fromkeys(IN_16_BITS) if "decoder" not in kind], 6))
def test_in_16_bits_it_is_the_twin_healed_and_the_config_says_so(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind, ALL_KINDS)
    out = tmp_path / "out"
    ours = healed(source, out, "moe", "--heal-encoding", "16bit")
    theirs = healed(twin, tmp_path / "twin", "moe")
    stored = read_checkpoint(source)
    for name, tensor in ours.items():
        if name in theirs:
            assert tensor == theirs[name], name
        else:
            assert name in stored, name
            assert ".mlp.experts." not in name
    declared = config_of(out).get("quantization_config")
    left = [name for name in ours if name.endswith((".qweight", ".weight_packed"))]
    assert bool(declared) == bool(left)
    report = verify(out, source=source)
    assert report.sound, report.problems
    assert report.values_near == report.tensors_healed > 0
    assert report.values_compared + report.values_near == report.tensors
    told = json.loads(call("evaluate", out, "--against", tmp_path / "twin", "--json", *DATA).stdout)
    assert told["against"]["block_errors"] == [0.0, 0.0]


def test_int8_as_it_is_is_refused_likewise(folder: Path, tmp_path: Path) -> None:
    source, _ = floats.made(folder, "8-bit integers of W8A8")
    asked = ("prune", source, tmp_path / "out", "-m", keep_file(tmp_path), "--heal", "moe", *HEAL)
    told = call(*asked, code=1).output
    assert "8-bit integers as they are, a scale a row, which is read only" in told
    assert "--heal-encoding 16bit" in told


@pytest.mark.parametrize("kind", ["awq", "gptq with zero points", "gptq in another order"])
def test_what_values_are_not_rounded_to_is_refused_with_the_ways_on(kind: str, folder: Path, tmp_path: Path) -> None:
    source, _ = made(folder, kind, ALL_KINDS)
    asked = ("prune", source, tmp_path / "out", "-m", keep_file(tmp_path), "--heal", "moe", *HEAL)
    told = call(*asked, code=1).output
    assert "has zero points" in told
    assert "--heal-encoding 16bit" in told
    assert "`shardxform quantize` and --requantize" in told
    assert not (tmp_path / "out").exists()


SPOILS = {
    "a code": ("weight_packed", 0x70, "healed-reach"),
    "a scale": ("weight_scale", 0x01, "healed-scale"),
    "the shape": ("weight_shape", 0x01, "source-bytes"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_verify_finds_what_healing_cannot_have_made(spoil: str, folder: Path, tmp_path: Path) -> None:
    last, flip, code = SPOILS[spoil]
    source, shared = made(folder, "compressed-tensors", ALL_KINDS)[0], folder / "spoilt"
    if not shared.exists():
        healed(source, shared, "moe")
    tensors, name = read_checkpoint(shared), f"model.layers.0.mlp.experts.1.up_proj.{last}"
    data = bytearray(tensors[name].data)
    data[0 if last != "weight_scale" else 1] ^= flip
    files = {p.name: p.read_text() for p in (*source.glob("tokenizer*"), shared / "shardxform.json")}
    spoilt = {**tensors, name: Raw(tensors[name].dtype, tensors[name].shape, bytes(data))}
    out = write_checkpoint(tmp_path / "out", spoilt, config_of(shared), files=files)
    forget_digests(out)
    found = verify(out, source=source).problems
    assert code in {problem.code for problem in found}, found
    assert all(problem.where.startswith("model.layers.0.mlp.experts.1.up_proj") for problem in found), found


# -- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "size", "dtype"), [(4, 32, "BF16"), (8, -1, "BF16"), (4, 16, "F16"), (8, 24, "F32")])
def test_weights_are_what_compressed_tensors_makes_of_them(bits: int, size: int, dtype: str) -> None:
    """In both orders of words, unpacked by numpy; scales in their dtype, as that of a model's weights is."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    strategy = {"strategy": "channel"} if size == -1 else {"strategy": "group", "group_size": size}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, dynamic=False, **strategy)
    w = (0.02 * np.random.default_rng(bits).standard_t(3, size=(32, 96))).astype(np.float32)
    groups = w.reshape(32, -1, 96 if size == -1 else size)
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    ends = torch.from_numpy(groups.min(-1)), torch.from_numpy(groups.max(-1))
    scale, zero = calculate_qparams(*ends, args)
    scale = scale.to(kind).float()
    wanted = fake_quantize(torch.from_numpy(w), scale, zero, args).numpy()
    found = {}
    for order in ("row", "gptq"):
        values = w.copy()
        found[order] = round_to(Asymmetric(bits, size, order, "", symmetric=True, scale_dtype=dtype), values)
        assert np.array_equal(values, wanted), order
    assert np.array_equal(found["row"]["words"], found["gptq"]["words"].T)
    assert np.array_equal(found["row"]["scales"], found["gptq"]["scales"].T)
    words = found["row"]["words"].astype(np.int64)
    codes = np.stack([words >> shift & ((1 << bits) - 1) for shift in range(0, 32, bits)], -1).reshape(32, 96)
    spread = np.repeat(scale.numpy(), groups.shape[-1], axis=1)
    assert np.array_equal((codes - (1 << (bits - 1))).astype(np.float32) * spread, wanted)
