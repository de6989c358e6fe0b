"""`prune --heal` of FP8 and FP4 checkpoints, as the source has them or in 16 bits, against twins and references.

The twin of a checkpoint holds the same values in bfloat16, and is healed as any 16-bit checkpoint is. Rounding is held
against torch's float8 types and compressed-tensors.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, forget_digests, read_checkpoint, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import picked

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_small_floats import DATA, E2M1, FLOATS, call, keep_file, made  # noqa: E402

from shardxform.formats.encoding import round_to  # noqa: E402
from shardxform.formats.fp8 import ELEMENTS, Fp8  # noqa: E402
from shardxform.formats.microscaling import MXFP4, MXFP8, NVFP4  # noqa: E402
from shardxform.formats.packing import float32_of  # noqa: E402
from shardxform.tuning import healer  # noqa: E402
from shardxform.tuning.samples import Loss  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

HEAL = ("--heal-iters", 4, "--heal-lr", "0.01", "--batch-size", 3, *DATA, "-q")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("healed")


def healed(source: Path, out: Path, what: str, *options: object) -> dict[str, Raw]:
    call("prune", source, out, "-m", keep_file(out.parent), "--heal", what, *HEAL, *options)
    return read_checkpoint(out)


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "shardxform.json").read_text())
    return record


def config_of(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


def layers_moved(out: Path) -> set[int]:
    return {block["layer"] for block in record_of(out)["facts"]["blocks"] if block["healed"]["what"]}


# -- as the source has it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", picked(FLOATS, 4))
def test_written_as_the_source_has_it_only_codes_and_scales_of_what_moved_differ(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    source, _ = made(folder, kind)
    after, out = healed(source, tmp_path / "out", "moe"), tmp_path / "out"
    call("prune", source, tmp_path / "plain", "-m", keep_file(tmp_path), "-q")
    before = read_checkpoint(tmp_path / "plain")
    assert record_of(out)["inputs"]["recipe"]["heal"]["encoding"] == "source"
    assert config_of(out) == config_of(tmp_path / "plain")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    changed = {name for name in after if after[name] != before[name]}
    moved = layers_moved(out)
    assert moved
    for name in changed:
        assert int(name.split(".layers.")[1].split(".")[0]) in moved
        assert ".mlp." in name or "post_attention_layernorm" in name
        assert not name.endswith(("weight_global_scale", "weight_scale_2", "input_scale"))
    assert any(".experts." in name for name in changed)
    report = verify(out, source=source)
    assert report.sound, report.problems
    assert report.values_near == report.tensors_healed > 0
    assert report.values_compared + report.values_near == report.tensors


def test_scales_are_powers_of_two_where_the_config_says_so(folder: Path, tmp_path: Path) -> None:
    source, _ = made(folder, "fp8 blocks")
    copy = shutil.copytree(source, tmp_path / "src")
    config = config_of(copy)
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    (copy / "config.json").write_text(json.dumps(config))
    after = healed(copy, tmp_path / "out", "moe")
    before = read_checkpoint(source)
    scales = {name: part.array() for name, part in after.items() if name.endswith("weight_scale_inv")}
    assert all((np.frexp(scale)[0] == 0.5).all() for scale in scales.values())
    assert verify(tmp_path / "out", source=copy).sound
    plain = healed(source, tmp_path / "other", "moe")
    assert any(not (np.frexp(plain[name].array())[0] == 0.5).all() for name in scales)
    assert len(after) < len(before)


SPOILS: dict[str, tuple[str, str, str]] = {
    "a code": ("mxfp8", "model.layers.0.mlp.experts.1.up_proj.weight", "healed-reach"),
    "a scale": ("mxfp8", "model.layers.0.mlp.experts.1.up_proj.weight_scale", "healed-scale"),
    "a scale of a stack": ("mxfp4 of gpt-oss", "model.layers.0.mlp.experts.down_proj_scales", "healed-scale"),
    "a value": ("mxfp8 in 16 bits", "model.layers.0.mlp.experts.1.up_proj.weight", "healed-reach"),
    "a byte that was not healed": ("mxfp8", "model.layers.0.self_attn.q_proj.weight", "source-bytes"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_verify_finds_what_healing_cannot_have_made(spoil: str, folder: Path, tmp_path: Path) -> None:
    kind, name, code = SPOILS[spoil]
    source, _ = made(folder, kind.removesuffix(" in 16 bits"))
    shared = folder / f"{kind} healed"
    if not shared.exists():
        how = ("--heal-encoding", "16bit") if kind.endswith("16 bits") else ()
        healed(source, shared, "moe", *how)
        assert verify(shared, source=source).sound
    out = shutil.copytree(shared, tmp_path / "out")
    tensors, config = read_checkpoint(out), config_of(out)
    data = bytearray(tensors[name].data)
    for at in range(1, 2 if "scale" in spoil else 12, 2):
        data[at] ^= 1 if "scale" in spoil else 0x40
    tensors[name] = Raw(tensors[name].dtype, tensors[name].shape, bytes(data))
    record = (out / "shardxform.json").read_text()
    shutil.rmtree(out)
    write_checkpoint(out, tensors, config, files={p.name: p.read_text() for p in source.glob("tokenizer*")})
    (out / "shardxform.json").write_text(record)
    forget_digests(out)
    found = verify(out, source=source)
    assert code in {problem.code for problem in found.problems}, found.problems
    stem = name.removesuffix("_scales").removesuffix("_scale")
    assert all(problem.where.startswith(stem) for problem in found.problems), found.problems


# -- in 16 bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", picked(FLOATS, 4))
def test_all_of_it_in_16_bits_is_the_twin_healed(kind: str, folder: Path, tmp_path: Path) -> None:
    """Nothing is quantized then, and no config says so; of families whose other linear layers stay in 16 bits too."""
    source, twin = made(folder, kind)
    ours = healed(source, tmp_path / "out", "all", "--heal-encoding", "16bit")
    theirs = healed(twin, tmp_path / "twin", "all")
    assert ours == theirs
    assert config_of(tmp_path / "out") == config_of(tmp_path / "twin")
    report = verify(tmp_path / "out", source=source)
    assert report.sound, report.problems
    assert report.values_near == report.tensors_healed > 0
    assert report.values_compared + report.values_near == report.tensors


PART = [kind for kind in FLOATS if "gpt-oss" not in kind]


@pytest.mark.parametrize("kind", picked(PART, 3))
def test_a_part_in_16_bits_is_named_in_the_config(kind: str, folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, kind)
    ours = healed(source, tmp_path / "out", "moe", "--heal-encoding", "16bit")
    theirs = healed(twin, tmp_path / "twin", "moe")
    stored = read_checkpoint(source)
    for name, tensor in ours.items():
        if ".mlp.experts." in name or ".shared_expert" in name:
            assert tensor == theirs[name]
        elif ".mlp." not in name and "layernorm" not in name:
            assert tensor == stored[name]
    assert not [name for name in ours if ".experts." in name and "scale" in name]
    assert verify(tmp_path / "out", source=source).sound
    assert_skipped(config_of(tmp_path / "out")["quantization_config"], ours)
    told = json.loads(
        call(
            "evaluate", tmp_path / "out", "--against", tmp_path / "twin", "--work", tmp_path / "w", "--json", *DATA
        ).stdout
    )
    assert told["against"]["block_errors"] == [0.0, 0.0]


def assert_skipped(declared: dict[str, Any], tensors: dict[str, Raw]) -> None:
    """Clients take exactly those linear modules for quantized that are, by their own matching."""
    names = {name.rpartition(".")[0] for name in tensors if name.endswith("_proj.weight")}
    homes = {name.partition(".experts.")[0] + ".experts" for name in names if ".experts." in name}
    packed = {
        name.rpartition(".")[0]
        for name in tensors
        if name.endswith(("weight_scale", "weight_scale_inv", "qscale_weight"))
    }
    assert packed
    if declared["quant_method"] == "compressed-tensors":
        from compressed_tensors.utils.match import match_name

        for name in (*names, *homes, *packed):
            assert any(match_name(name, entry) for entry in declared["ignore"]) == (name not in packed)
        return
    if declared["quant_method"] == "modelopt":
        for name in (*names, *homes, *packed):
            globs = [re.escape(entry).replace(r"\*", ".*") for entry in declared["exclude_modules"]]
            assert any(re.fullmatch(glob, name) for glob in globs) == (name not in packed)
        return
    from transformers.quantizers.quantizers_utils import should_convert_module

    for name in (*(name for name in names if ".experts." not in name), *homes, *packed):
        assert should_convert_module(name, declared["modules_to_not_convert"]) == (name in packed)


def test_what_stays_in_16_bits_beside_rounded_weights_is_healed_too(folder: Path, tmp_path: Path) -> None:
    """Weights that are decoded and not rounded, and experts of transposed stacks, which are written one by one."""
    for kind, keep in (("fp8 blocks", "*self_attn*"), ("mxfp4 of gpt-oss", "*.layers.1.mlp.experts.*")):
        source, twin = made(folder, kind)
        outs = [tmp_path / f"{kind} {number}" for number in range(2)]
        for root, out in zip((source, twin), outs, strict=True):
            how = ("--heal", "all", *HEAL, "--requantize", "--group-size", 32, "--keep-16bit", keep)
            call("quantize", root, out, "-m", keep_file(tmp_path), *how)
        found = read_checkpoint(outs[0])
        assert found == read_checkpoint(outs[1])
        call("quantize", source, tmp_path / f"{kind} plain", "-m", keep_file(tmp_path), *how[-5:], "-q")
        plain = read_checkpoint(tmp_path / f"{kind} plain")
        names = [name for name in plain if plain[name].dtype == "BF16" and "_proj" in name and "layers.1" in name]
        assert any(found[name] != plain[name] for name in names)
        assert verify(outs[0], source=source).sound


# -- what is refused --------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_so_is_refused_before_anything_is(folder: Path, tmp_path: Path) -> None:
    source, twin = made(folder, "nvfp4 of modelopt")
    keep, heal = keep_file(tmp_path), ("--heal", "moe", *HEAL)

    def refused(root: Path, *options: object) -> str:
        said = call("prune", root, tmp_path / "out", "-m", keep, *options, code=1).output
        assert not (tmp_path / "out").exists()
        return " ".join(said.split())

    assert "--heal-encoding: the weights of the source are in 16 bits" in refused(
        twin, *heal, "--heal-encoding", "source"
    )
    assert "--heal-encoding is for --heal" in refused(source, "--heal-encoding", "16bit")


# -- rounding ---------------------------------------------------------------------------------------------------------


def test_codes_are_torchs_and_those_of_four_bits_compressed_tensors() -> None:
    from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA

    random = np.random.default_rng(0)
    sizes = 10 ** random.uniform(-12, 6, 20_000)
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 464, 448, 1e30, 2.0**-10, 3 * 2.0**-10, 0]
    x = np.concatenate((random.normal(size=20_000) * sizes, ties)).astype(np.float32)
    x = np.concatenate((x, -x))
    for dtype, torchs in (("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)):
        most = ELEMENTS[dtype].largest
        wanted = torch.from_numpy(x.clip(-most, most)).to(torchs).view(torch.uint8).numpy()
        assert np.array_equal(ELEMENTS[dtype].nearest(x), wanted)
    assert np.array_equal(
        E2M1[ELEMENTS["E2M1"].nearest(x)], FP4_E2M1_DATA.cast_to_fp4(torch.from_numpy(x.clip(-6, 6))).numpy()
    )


def reference(w: np.ndarray, whole: float | None = None, **weights: Any) -> np.ndarray:
    """What compressed-tensors makes of a weight, a group or block after the other."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(type="float", symmetric=True, dynamic=False, **weights)
    most = torch.from_numpy(np.abs(w).reshape(len(w), -1, args.group_size).max(-1))
    scale_of_all = None if whole is None else torch.tensor([whole])
    scale, zero = calculate_qparams(-most, most, args, scale_of_all)
    return np.asarray(fake_quantize(torch.from_numpy(w), scale, zero, args, global_scale=scale_of_all))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(-20, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_weights_are_what_compressed_tensors_makes_of_them(rows: int, groups: int, power: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    w = (random.standard_t(3, size=(rows, 32 * groups)) * 2.0**power).astype(np.float32)
    for encoding, bits in ((MXFP4, 4), (MXFP8, 8)):
        ours, strategy = w.copy(), {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
        round_to(encoding, ours)
        assert np.array_equal(ours, reference(w, num_bits=bits, **strategy)), encoding
    ours, whole = w.copy(), np.float32(448 * 6 / np.abs(w).max())
    round_to(NVFP4, ours, np.array(whole))
    assert np.array_equal(
        ours,
        reference(w, whole, num_bits=4, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn),
    )


@given(
    st.integers(1, 30),
    st.integers(1, 50),
    st.sampled_from([(8, 8), (5, 7), (1, None), (None, None)]),
    st.sampled_from(["F32", "BF16", "F16", "F8_E8M0"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_partial_blocks_are_rounded_as_whole_ones(
    rows: int, columns: int, block: Any, dtype: str, powers: bool, seed: int
) -> None:
    """By torch, a block after the other; and what is rounded once is rounded to itself."""
    random = np.random.default_rng(seed)
    w = (random.normal(size=(rows, columns)) * 2.0 ** random.integers(-8, 8)).astype(np.float32)
    ours, encoding = w.copy(), Fp8("F8_E4M3", block, "weight_scale", dtype, powers)
    parts = round_to(encoding, ours)
    again = ours.copy()
    round_to(encoding, again)
    assert np.array_equal(ours, again)
    scales = encoding.scales(parts["scales"])
    height, width = block[0] or rows, block[1] or columns
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            run = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
            scale = torch.from_numpy(np.abs(w[run]).max(keepdims=True) / np.float32(448)).reshape(())
            if powers or dtype == "F8_E8M0":
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scale = scale.to({"BF16": torch.bfloat16, "F16": torch.float16}.get(dtype, torch.float32)).float()
            if dtype != "F16" or scale >= 2.0**-14:
                assert scales[i, j] == scale.item()
            codes = (torch.from_numpy(w[run]) / float(scales[i, j])).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert np.array_equal(parts["values"][run], codes.view(torch.uint8).numpy())


def test_a_block_of_zeros_has_a_scale_that_is_a_number() -> None:
    for encoding in (Fp8("F8_E4M3", (4, 4), "weight_scale", "F32"), MXFP4, MXFP8):
        w = np.zeros((4, 32), np.float32)
        parts = round_to(encoding, w)
        assert not parts["values"].any()
        assert np.isfinite(encoding.scales(parts["scales"])).all()
        assert not w.any()


# -- a second opinion -------------------------------------------------------------------------------------------------

HOWS: dict[str, tuple[object, ...]] = {
    "prune": ("prune",),
    "quantize": ("quantize", "--group-size", 32, "--requantize"),
    "as the source": ("prune", "--heal", "moe", *HEAL),
    "in 16 bits": ("prune", "--heal", "moe", *HEAL, "--heal-encoding", "16bit"),
}


@pytest.mark.parametrize(("kind", "how"), picked([(kind, how) for kind in FLOATS for how in HOWS], 5))
def test_the_independent_check_knows_small_floats(kind: str, how: str, folder: Path, tmp_path: Path) -> None:
    source, _ = made(folder, kind)
    command, *options = HOWS[how]
    call(command, source, tmp_path / "out", "-m", keep_file(tmp_path), *options, "-q")
    report = verify(tmp_path / "out", source=source, independent=True)
    assert report.sound, report.problems
    assert report.rederived
    assert report.rederived >= 30


@pytest.mark.parametrize("kind", picked(FLOATS, 4))
def test_the_independent_check_finds_one_wrong_code(kind: str, folder: Path, tmp_path: Path) -> None:
    """Of the source, so that what was rounded from it is not what rounding it gives."""
    source, _ = made(folder, kind)
    out = folder / f"{kind} rounded"
    if not out.exists():
        call("quantize", source, out, "-m", keep_file(folder), "--group-size", 32, "--requantize", "-q")
    tensors, config = read_checkpoint(source), config_of(source)
    codes = [n for n in tensors if "layers.1.mlp.experts" in n and n.endswith(("_packed", ".weight", "_blocks"))]
    name = next(n for n in codes if "experts.1." in n or n.endswith("_blocks"))
    data = bytearray(tensors[name].data)
    begin = len(data) // 6 if name.endswith("_blocks") else 0  # of the second of six experts
    for at in range(begin, begin + 32):
        data[at] ^= 0x88  # other signs
    spoilt = write_checkpoint(
        tmp_path / "src", {**tensors, name: Raw(tensors[name].dtype, tensors[name].shape, bytes(data))}, config
    )
    found = [p for p in verify(out, source=spoilt, independent=True).problems if p.code == "independent"]
    assert len(found) == 1, found
    assert "layers.1.mlp.experts" in found[0].where


# -- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "encoding"), picked([(kind, encoding) for kind in FLOATS for encoding in ("source", "16bit")], 3)
)
def test_merged_experts_are_rounded_as_healed_ones_are(
    kind: str, encoding: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, twin = made(folder, kind)
    judged: list[float] = []
    real = healer.judge_start

    def partial(*args: Any) -> Loss:
        found = real(*args)
        judged.append(found.mean)
        return found if len(judged) % 2 == 0 else Loss(tuple(10 * each for each in found.sums), found.values)

    monkeypatch.setattr(healer, "judge_start", partial)
    monkeypatch.setattr(healer, "MERGED_SHARES", (1.0,))
    options = ("--merge", "--heal-encoding", encoding, *DATA, "-q")
    call("prune", source, tmp_path / "out", "-m", keep_file(tmp_path), *options)
    call("prune", twin, tmp_path / "twin", "-m", keep_file(tmp_path), "--merge", *DATA, "-q")
    facts = record_of(tmp_path / "out")["facts"]["blocks"]
    assert all(block["healed"]["merged"] == 1.0 for block in facts)
    for checked in ({}, {"independent": True}):
        report = verify(tmp_path / "out", source=source, **checked)
        assert report.sound, report.problems
    plain = tmp_path / ("plain" if encoding == "source" else "out")
    if encoding == "source":
        call("convert", tmp_path / "out", plain, "--to", "bf16", "-q")
    ours, theirs = read_checkpoint(plain), read_checkpoint(tmp_path / "twin")
    first = ".layers.0." if encoding == "source" else ".layers."  # later blocks answer for what rounding did before
    experts = [name for name in theirs if first in name and ".experts." in name and name in ours]
    assert experts or "fused" in kind
    for name in experts:
        a, b = (float32_of(each[name].array(), "BF16").astype(np.float64) for each in (ours, theirs))
        assert np.square(a - b).sum() <= (0 if encoding == "16bit" else 0.02) * np.square(b).sum(), name
