"""FP8 as releases store it: every code, blocks that are partial, and quantizing from it, against torch's float8."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, read_checkpoint, tiny, write_checkpoint
from click.testing import CliRunner
from test_prune import manifest_of
from test_quantize import KIND_SIZES, without_record

from shardxform.base.tensors import ByteRange, TensorRef, TensorSpec
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError, ExecutionError, SchemeError
from shardxform.execution.runner import RunOptions, run
from shardxform.formats import fp8, integers, plain
from shardxform.formats.decoding import decoded
from shardxform.formats.encoding import Cut, Opener, Storage, Writing
from shardxform.formats.fp8 import Fp8, decoded_codes
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import Format, Grid, Scheme
from shardxform.plan.quantize import plan_quantize
from shardxform.verification import verify

NAN, INF = math.nan, math.inf
E4M3 = (
    *(0.0, 0.001953125, 0.00390625, 0.005859375, 0.0078125, 0.009765625, 0.01171875, 0.013671875),
    *(0.015625, 0.017578125, 0.01953125, 0.021484375, 0.0234375, 0.025390625, 0.02734375, 0.029296875),
    *(0.03125, 0.03515625, 0.0390625, 0.04296875, 0.046875, 0.05078125, 0.0546875, 0.05859375),
    *(0.0625, 0.0703125, 0.078125, 0.0859375, 0.09375, 0.1015625, 0.109375, 0.1171875),
    *(0.125, 0.140625, 0.15625, 0.171875, 0.1875, 0.203125, 0.21875, 0.234375),
    *(0.25, 0.28125, 0.3125, 0.34375, 0.375, 0.40625, 0.4375, 0.46875),
    *(0.5, 0.5625, 0.625, 0.6875, 0.75, 0.8125, 0.875, 0.9375),
    *(1.0, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875),
    *(2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75),
    *(4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 7.5),
    *(8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0),
    *(16.0, 18.0, 20.0, 22.0, 24.0, 26.0, 28.0, 30.0),
    *(32.0, 36.0, 40.0, 44.0, 48.0, 52.0, 56.0, 60.0),
    *(64.0, 72.0, 80.0, 88.0, 96.0, 104.0, 112.0, 120.0),
    *(128.0, 144.0, 160.0, 176.0, 192.0, 208.0, 224.0, 240.0),
    *(256.0, 288.0, 320.0, 352.0, 384.0, 416.0, 448.0, NAN),
)
E5M2 = (
    *(0.0, 2.0**-16, 2.0**-15, 1.5 * 2.0**-15),
    *(m * 2.0**e for e in range(-14, 16) for m in (1.0, 1.25, 1.5, 1.75)),
    *(INF, NAN, NAN, NAN),
)
SCHEME = Scheme(grid=Grid(group_size=32))
KINDS = ("deepseek_v3", "qwen3_moe", "qwen3_5_moe")
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
BLOCK = (24, 40)  # neither fills a weight


# -- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "positive"), [("F8_E4M3", E4M3), ("F8_E5M2", E5M2)])
def test_every_code_is_the_value_that_it_stands_for(dtype: str, positive: tuple[float, ...]) -> None:
    values = decoded_codes(dtype)
    assert values.dtype == np.float32
    assert np.array_equal(values, np.float32((*positive, *(-value for value in positive))), equal_nan=True)
    assert list(np.signbit(values[[0, 128]])) == [False, True]


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_every_code_is_what_torch_makes_of_it(dtype: str) -> None:
    import torch

    kinds = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
    codes = np.arange(256, dtype=np.uint8)
    ours = fp8.powers_of_two(codes) if dtype == "F8_E8M0" else decoded_codes(dtype)
    theirs = torch.from_numpy(codes).view(kinds[dtype]).to(torch.float32).numpy()
    assert np.array_equal(ours.view(np.uint32)[~np.isnan(ours)], theirs.view(np.uint32)[~np.isnan(theirs)])
    assert np.array_equal(np.isnan(ours), np.isnan(theirs))


# -- one weight -------------------------------------------------------------------------------------------------------


def by_hand(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int], dtype: str = "F8_E4M3") -> np.ndarray:
    """Element by element, from the literals."""
    positive = E4M3 if dtype == "F8_E4M3" else E5M2
    out = np.empty(codes.shape, np.float32)
    for (row, column), code in np.ndenumerate(codes):
        value = positive[code & 127] * (-1 if code > 127 else 1)
        out[row, column] = np.float32(value) * np.float32(scales[row // block[0], column // block[1]])
    return out


def stored(codes: np.ndarray, scales: np.ndarray, encoding: Fp8) -> tuple[Storage, Any]:
    """A weight in memory, and what reads it."""
    data = {"w": codes.tobytes(), "s": scales.tobytes()}

    def read(ref: TensorRef, into: np.ndarray) -> None:
        flat = b"".join(data[piece.file][piece.offset : piece.end] for piece in ref.ranges)
        into.reshape(-1).view(np.uint8)[:] = np.frombuffer(flat, np.uint8)

    dtype = {4: "F32", 2: "F16", 1: "F8_E8M0"}[scales.dtype.itemsize]
    weight = TensorRef(TensorSpec("m.weight", encoding.dtype, codes.shape), (ByteRange("w", 0, codes.nbytes),))
    scale = TensorRef(TensorSpec("m.weight_scale_inv", dtype, scales.shape), (ByteRange("s", 0, scales.nbytes),))
    return Storage(encoding, (("values", weight), ("scales", scale)), codes.shape), read


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("block", [(4, 4), (3, 5), (16, 16), (1, 12), (10, 12), (128, 128)])
def test_values_are_codes_times_the_scale_of_their_block(block: tuple[int, int], dtype: str) -> None:
    rng = np.random.default_rng(block)
    codes = rng.integers(0, 0x7B, (10, 12), np.uint8) | (rng.integers(0, 2, (10, 12), np.uint8) << 7)
    scales = rng.random((math.ceil(10 / block[0]), math.ceil(12 / block[1])), np.float32)
    encoding = Fp8(dtype, block, "weight_scale_inv", "F32")
    assert encoding.parts(10, 12)[1].shape == scales.shape
    storage, read = stored(codes, scales, encoding)
    wanted = by_hand(codes, scales, block, dtype)
    rows = Opener(read).open(storage)
    for start in range(10):
        for stop in range(start + 1, 11):
            assert np.array_equal(rows.values(start, stop), wanted[start:stop])
    assert np.array_equal(rows.cut(Cut(7, 2)).values(0, 2), wanted[7:9])


@pytest.mark.parametrize(
    ("block", "shape"), [((None, None), ()), ((None, None), (1,)), ((1, None), (6, 1)), ((1, None), (6,))]
)
def test_scales_may_be_one_or_one_a_row(block: Any, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(0, 127, (6, 8), np.uint8)
    scales = np.random.default_rng(1).random(shape, np.float32).reshape(shape)
    storage, read = stored(codes, scales, Fp8("F8_E4M3", block, "weight_scale", "F32"))
    grid = np.broadcast_to(scales.reshape(-1, 1), (6, 1))
    assert np.array_equal(Opener(read).open(storage).values(2, 6), by_hand(codes, grid, (1, 8))[2:])


def test_what_stands_below_is_opened_after_what_stands_above_is_written() -> None:
    storage, read = stored(np.zeros((4, 4), np.uint8), np.ones((1, 1), np.float32), Fp8("F8_E4M3", (4, 4), "s", "F32"))
    opened: list[int] = []

    def one_by_one() -> Iterator[Any]:
        for number in range(8):
            opened.append(number)
            yield Opener(read).open(storage)

    writing = Writing("m", (32, 4), rounder=print, stopped=lambda: None)
    for number, (role, offset, bits) in enumerate(Plain("BF16").written(one_by_one(), writing)):
        assert (role, offset, bits.shape) == ("values", 32 * number, (4, 4))
        assert opened == list(range(number + 1))


def test_what_is_not_finite_is_refused_and_named() -> None:
    codes, encoding = np.zeros((4, 4), np.uint8), Fp8("F8_E4M3", (2, 2), "weight_scale_inv", "F32")
    codes[3, 1] = 0xFF
    storage, read = stored(codes, np.ones((2, 2), np.float32), encoding)
    rows = Opener(read).open(storage)
    assert rows.values(0, 3).any() == np.False_
    with pytest.raises(ExecutionError, match=r"'m\.weight': NaN or infinity at row 3, column 1"):
        rows.values(2, 4)
    assert np.isnan(Opener(read, checked=False).open(storage).values(0, 4)).sum() == 1
    storage, read = stored(codes, np.float32([[1, 1], [math.inf, 1]]), encoding)
    with pytest.raises(ExecutionError, match=r"'m\.weight_scale_inv': scale inf at \[1, 0\]; expected finite"):
        Opener(read).open(storage)
    codes[:] = 0x7E
    storage, read = stored(codes, np.full((2, 2), 3e38, np.float32), encoding)
    with pytest.raises(ExecutionError, match="NaN or infinity at row 0, column 0"):
        Opener(read).open(storage).values(0, 1)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Weights that releases hold in FP8: linear layers of blocks and of MTP layers."""
    parts = ("_proj.weight", "_proj_with_mqa.weight", "in_proj_qkv.weight", "in_proj_z.weight")
    return name.endswith(parts) and len(shape) == 2 and "eh_proj" not in name and "visual" not in name


def release(kind: str, block: tuple[int, int] = BLOCK, scale: str = "F32", seed: int = 0) -> tuple[Any, Any, Any]:
    """Config and tensors in FP8, and what these stand for as float32 and 16-bit tensors, worked out by torch."""
    import torch

    config, tensors = tiny(kind, experts="per-expert", seed=seed, **KIND_SIZES[kind])
    plain_twin = dict(tensors)
    for name in [name for name in tensors if is_linear(name, tensors[name].shape)]:
        rows, columns = tensors[name].shape
        rng = np.random.default_rng([rows, columns, len(name)])
        shape = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
        scales = torch.from_numpy(rng.uniform(1e-4, 1e-3, shape).astype(np.float32))
        if scale == "F8_E8M0":
            scales = scales.to(torch.float8_e8m0fnu)
        values = torch.from_numpy(tensors[name].float32().copy()) * 1000
        codes = values.clamp(-448, 448).to(torch.float8_e4m3fn)
        wide = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :columns]
        plain_twin[name] = (codes.float() * wide).numpy()
        raw = scales.view(torch.uint8).numpy().tobytes() if scale != "F32" else scales.numpy().tobytes()
        tensors[name] = Raw("F8_E4M3", (rows, columns), codes.view(torch.uint8).numpy().tobytes())
        tensors[f"{name}_scale_inv"] = Raw(scale, shape, raw)
    declared = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    more = {"scale_fmt": "ue8m0"} if scale == "F8_E8M0" else {}
    config["quantization_config"] = {**declared, **more, "modules_to_not_convert": ["lm_head"]}
    return config, tensors, plain_twin


def write(root: Path, config: Any, tensors: Any) -> Path:
    return write_checkpoint(root, tensors, config, shards=3, files={"tokenizer.json": "{}"})


def quantize(source: Path, out: Path, scheme: Scheme = SCHEME, *, pruned: bool = False, jobs: int = 1) -> Path:
    manifest = manifest_of(source) if pruned else None
    run(plan_quantize(Checkpoint.open(source), scheme, manifest), out, RunOptions(jobs=jobs))
    return out


def twins(tmp_path: Path, kind: str, **options: Any) -> tuple[Path, Path]:
    """A release in FP8, and a checkpoint of float32 weights of the same values."""
    config, tensors, wide = release(kind, **options)
    source = write(tmp_path / "fp8", config, tensors)
    return source, write(tmp_path / "wide", {k: v for k, v in config.items() if k != "quantization_config"}, wide)


@pytest.mark.oracle
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("format_", ["auto-round", "compressed-tensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_fp8_is_quantizing_what_torch_decodes(
    kind: str, format_: Format, pruned: bool, tmp_path: Path
) -> None:
    source, wide = twins(tmp_path, kind)
    scheme = Scheme(grid=SCHEME.grid, format=format_)
    ours = read_checkpoint(quantize(source, tmp_path / "ours", scheme, pruned=pruned))
    theirs = read_checkpoint(quantize(wide, tmp_path / "theirs", scheme, pruned=pruned))
    assert ours.keys() == theirs.keys()
    rounded = [name for name in ours if name.endswith(("qweight", "weight_packed"))]
    assert any(".experts." in name for name in rounded)
    assert any("self_attn" in name for name in rounded)
    was_fp8 = {name for name, tensor in theirs.items() if is_linear(name, tensor.shape)}
    for name, tensor in ours.items():
        if name in was_fp8:
            values = theirs[name].array()
            bits = values.view("<u4")
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            assert tensor.dtype == "BF16"
            assert np.array_equal(tensor.array(), nearest.astype("<u2"))
        else:
            assert tensor == theirs[name], name
    assert kind != "deepseek_v3" or any("kv_b_proj" in name for name in was_fp8)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config == json.loads((tmp_path / "theirs" / "config.json").read_text())
    report = verify(tmp_path / "ours", source=source)
    assert report.sound, report.problems
    assert {problem.code for problem in report.warnings} <= {"preprocessor"}
    assert report.rounding is not None
    assert report.rounding.exact
    assert not report.values_left


@pytest.mark.oracle
def test_powers_of_two_are_scales(tmp_path: Path) -> None:
    source, wide = twins(tmp_path, "deepseek_v3", scale="F8_E8M0")
    ours, theirs = (read_checkpoint(quantize(root, tmp_path / f"{root.name}-q")) for root in (source, wide))
    assert {n: t for n, t in ours.items() if t.dtype == "I32"} == {n: t for n, t in theirs.items() if t.dtype == "I32"}


def test_bytes_do_not_depend_on_tiles_and_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = twins(tmp_path, "deepseek_v3")
    reference = without_record(quantize(source, tmp_path / "a", pruned=True))
    monkeypatch.setattr(integers, "ROUND_TILE", 100)
    monkeypatch.setattr(plain, "DECODE_TILE", 70)
    assert without_record(quantize(source, tmp_path / "b", pruned=True, jobs=3)) == reference


def test_a_defect_of_what_was_made_is_found_against_the_source(tmp_path: Path) -> None:
    source, _ = twins(tmp_path, "deepseek_v3")
    out = quantize(source, tmp_path / "out")
    (out / "shardxform.json").unlink()
    tensors = read_checkpoint(out)
    packed = "model.layers.1.mlp.experts.2.up_proj.qweight"
    kept = "model.layers.0.self_attn.kv_b_proj.weight"
    for name, code in ((packed, "source-error"), (kept, "source-bytes")):
        data = bytearray(tensors[name].data)
        data[5] ^= 0x80
        changed = {**tensors, name: Raw(tensors[name].dtype, tensors[name].shape, bytes(data))}
        bad = write_checkpoint(tmp_path / code, changed, json.loads((out / "config.json").read_text()))
        found = verify(bad, source=source).problems
        assert [(p.code, p.where) for p in found if p.code.startswith("source-") and p.code != "source-sidecar"] == [
            (code, name)
        ]


@pytest.mark.parametrize("pruned", [False, True])
def test_the_independent_check_agrees_and_finds_what_is_wrong(pruned: bool, tmp_path: Path) -> None:
    source, _ = twins(tmp_path, "deepseek_v3")
    out = quantize(source, tmp_path / "out", pruned=pruned)
    report = verify(out, source=source, independent=True)
    assert report.sound, report.problems
    assert report.rederived
    assert report.rederived > 60
    tensors = read_checkpoint(out)
    for name in (f"{UP.removesuffix('weight')}qweight", "model.layers.0.self_attn.kv_b_proj.weight"):
        data = bytearray(tensors[name].data)
        data[9] ^= 1
        changed = {**tensors, name: Raw(tensors[name].dtype, tensors[name].shape, bytes(data))}
        bad = write_checkpoint(tmp_path / name, changed, json.loads((out / "config.json").read_text()))
        (bad / "shardxform.json").write_bytes((out / "shardxform.json").read_bytes())
        found = verify(bad, source=source, independent=True).problems
        assert [p.where for p in found if p.code == "independent"] == [name]


def test_static_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    config, tensors, _ = release("qwen3_moe")
    name = "model.layers.0.self_attn.o_proj"
    tensors[f"{name}.input_scale"] = np.float32(2)
    out = quantize(write(tmp_path / "s", config, tensors), tmp_path / "out")
    assert f"{name}.qweight" in read_checkpoint(out)
    assert not [each for each in read_checkpoint(out) if "scale_inv" in each or "input_scale" in each]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}_scale_inv": None}, r"up_proj\.weight_scale_inv' is missing; its weight is F8_E4M3"),
        (
            {f"{UP}_scale_inv": Raw("F32", (1, 1), bytes(4))},
            r"shape \[1, 1\], expected \[2, 2\] for a weight \[32, 64\]",
        ),
        ({f"{UP}_scale_inv": Raw("I32", (2, 2), bytes(16))}, "I32, expected BF16 or F16 or F32"),
        (
            {UP: Raw("F8_E4M3FNUZ", (32, 64), bytes(2048))},
            "FNUZ .*; matrices .* of F8_E4M3 and F8_E5M2 are read",
        ),
    ],
)
def test_a_weight_that_is_not_stored_as_the_config_says_is_refused(
    change: dict[str, Raw | None], message: str, tmp_path: Path
) -> None:
    config, tensors, _ = release("qwen3_moe")
    table = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        quantize(write(tmp_path / "s", config, table), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_blocks_are_the_configs_and_never_guessed(tmp_path: Path) -> None:
    config, tensors, _ = release("qwen3_moe")
    config["quantization_config"]["weight_block_size"] = [128]
    with pytest.raises(SchemeError, match=r"weight_block_size: expected two sizes of blocks, found \[128\]"):
        quantize(write(tmp_path / "s", config, tensors), tmp_path / "out")
    config["quantization_config"]["weight_block_size"] = [128, 128]
    with pytest.raises(CheckpointError, match=r"expected \[1, 1\] for a weight"):
        quantize(write(tmp_path / "t", config, tensors), tmp_path / "out")


@pytest.mark.parametrize("name", [UP, "model.layers.0.self_attn.kv_b_proj.weight"])
def test_nan_codes_are_refused_whether_they_are_rounded_or_kept(name: str, tmp_path: Path) -> None:
    config, tensors, _ = release("deepseek_v3")
    data = bytearray(tensors[name].data)
    data[tensors[name].shape[1] + 3] = 0x7F
    tensors[name] = Raw("F8_E4M3", tensors[name].shape, bytes(data))
    with pytest.raises(ExecutionError, match=rf"'{name}': NaN or infinity at row 1, column 3"):
        quantize(write(tmp_path / "s", config, tensors), tmp_path / "out")


def test_rounding_from_fp8_is_told(tmp_path: Path) -> None:
    config, tensors, _ = release("qwen3_moe")
    source = write(tmp_path / "s", config, tensors)
    result = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "out"), "--group-size", "32"])
    assert result.exit_code == 0, result.output
    assert re.search(r"rounded from their values: \d+ weights that are FP8 in blocks of ", result.output)


def test_other_checkpoints_are_not_decoded(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    assert decoded(Checkpoint.open(write(tmp_path / "a", config, tensors))) is None
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    assert decoded(Checkpoint.open(write(tmp_path / "b", config, tensors))) is None


@pytest.mark.parametrize("threads", [1, 3])
def test_experts_rest_as_codes_and_give_what_torch_makes_of_them(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row a tile, so that many threads have work; and a code that is none is named with the checkpoint."""
    torch = pytest.importorskip("torch")
    from shardxform.forward import weights as reading
    from shardxform.forward.resting import Coded, Precision

    monkeypatch.setattr(reading, "DECODE_TILE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    config, tensors, wide = release("qwen3_moe")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name] = Raw("F8_E4M3", tensors[name].shape, b"\xff" + bytes(tensors[name].data[1:]))
    precision = Precision(torch.device("cpu"), torch.float32)
    with reading.Weights(Checkpoint.open(write(tmp_path / "s", config, tensors)), precision) as weights:
        expert = weights.expert("block", 1, 2).on(precision)
        assert all(isinstance(part, Coded) for part in (*expert.gate_up, expert.down))
        gate, up, down = (wide[f"model.layers.1.mlp.experts.2.{part}_proj.weight"] for part in ("gate", "up", "down"))
        values, resting = expert.dense(precision), expert.at_rest()
        assert np.array_equal(values.gate_up_OH.numpy(), np.concatenate([gate, up]))
        assert np.array_equal(values.down_HI.numpy(), down)
        assert torch.equal(resting.down_HI, torch.from_numpy(down).bfloat16())
        with pytest.raises(ExecutionError, match=rf"{tmp_path}/s: tensor '{re.escape(name)}': NaN .* row 0, column 0"):
            weights.expert("block", 1, 3).dense(precision)
