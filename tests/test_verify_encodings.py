"""Defects of quantized weights that load: every kind of scale, zero point and table, and every number of a config.

Each is put into a sound checkpoint of the layouts of `test_small_floats` and `test_integer_sources`; `verify` has to
name it, and the command that decodes has to refuse what has no value.
"""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import test_integer_sources as integers
import test_small_floats as floats
from build import read_checkpoint, write_checkpoint
from strategies import picked
from test_small_floats import call

from shardxform.verification import verify

pytestmark = pytest.mark.oracle

DOWN = "model.layers.0.mlp.experts.0.down_proj"
ZERO, NEGATIVE, TINY = struct.pack("<f", 0), struct.pack("<f", -1), struct.pack("<f", 1e-44)
NAN, INFINITE = b"\xff\xff\xff\x7f", b"\0\0\x80\x7f"
HALF = {"zero": b"\0\0", "negative": b"\0\xbc"}
SYM_INTEGERS = {**integers.KINDS, **integers.STILL}

# kind, tensor, first bytes of its data, code of the problem, and whether decoding refuses it too
DATA: dict[str, tuple[str, str, bytes, str, bool]] = {
    **{
        f"{kind}: {what}": (kind, f"{DOWN}.{last}", data, "scale", False)
        for kind, last in (
            ("fp8 blocks", "weight_scale_inv"),
            ("fp8 channels", "weight_scale"),
            ("fp8 whole", "weight_scale"),
            ("fp8 of mistral", "qscale_weight"),
        )
        for what, data in (("zero", ZERO), ("negative", NEGATIVE), ("next to zero", TINY))
    },
    **{
        f"{kind}: of all {what}": (kind, f"{DOWN}.{last}", data, code, True)
        for kind, last in (("nvfp4", "weight_global_scale"), ("nvfp4 of modelopt", "weight_scale_2"))
        for what, data, code in (
            ("zero", ZERO, "scale"),
            ("negative", NEGATIVE, "scale"),
            ("NaN", NAN, "not-finite"),
            ("infinite", INFINITE, "not-finite"),
        )
    },
    "nvfp4: a block's zero": ("nvfp4", f"{DOWN}.weight_scale", b"\0", "scale", False),
    "nvfp4: a block's negative": ("nvfp4", f"{DOWN}.weight_scale", b"\xb8", "scale", False),
    "nvfp4: a block's NaN": ("nvfp4", f"{DOWN}.weight_scale", b"\x7f", "not-finite", True),
    "mxfp4: NaN": ("mxfp4", f"{DOWN}.weight_scale", b"\xff", "not-finite", True),
    "mxfp8: NaN": ("mxfp8", f"{DOWN}.weight_scale", b"\xff", "not-finite", True),
    "mxfp8: NaN among codes": ("mxfp8", f"{DOWN}.weight", b"\x7f", "not-finite", True),
    "fp8 blocks: NaN among codes": ("fp8 blocks", f"{DOWN}.weight", b"\xff", "not-finite", True),
    "fp8 whole: of activations": ("fp8 whole", f"{DOWN}.input_scale", ZERO, "activation-scale", False),
    "awq: zero": ("awq", f"{DOWN}.scales", HALF["zero"], "scale", False),
    "awq: negative": ("awq", f"{DOWN}.scales", HALF["negative"], "scale", False),
    "gptq: zero": ("gptq with zero points", f"{DOWN}.scales", HALF["zero"], "scale", False),
    "gptq: zero point": ("gptq with zero points", f"{DOWN}.qzeros", NAN[:3] + b"\xff", "scale", True),
    "gptq: group of a column": ("gptq in another order", f"{DOWN}.g_idx", NAN, "scale", True),
    "compressed-tensors: group": ("compressed-tensors with zero points", f"{DOWN}.weight_g_idx", NAN, "scale", True),
    "compressed-tensors: shape": (
        "compressed-tensors with zero points",
        f"{DOWN}.weight_shape",
        b"\x41",
        "scale",
        True,
    ),
    "compressed-tensors: negative": (
        "compressed-tensors with zero points",
        f"{DOWN}.weight_scale",
        b"\x80\xbf",
        "scale",
        False,
    ),
    "int8: zero": ("8-bit integers of W8A8", f"{DOWN}.weight_scale", b"\0\0", "scale", False),
    "int8: negative": ("8-bit integers in groups", f"{DOWN}.weight_scale", b"\x80\xbf", "scale", False),
    "int8: NaN": ("8-bit integers in groups", f"{DOWN}.weight_scale", b"\xff\x7f", "not-finite", True),
    "in groups of 16: zero": ("compressed-tensors in groups of 16", f"{DOWN}.weight_scale", b"\0\0", "scale", False),
}

W = ("config_groups", "group_0", "weights")
# kind, path in the quantization config, what is said there
CONFIGS: dict[str, tuple[str, tuple[str, ...], object]] = {
    **{
        f"{kind}: {bits} bits": (kind, (*W, "num_bits"), bits)
        for kind in ("mxfp4", "nvfp4", "fp8 channels", "compressed-tensors", "compressed-tensors in groups of 16")
        for bits in (2, 3, 6)
    },
    **{f"{kind}: {bits} bits": (kind, ("bits",), bits) for kind in ("awq", "gptq", "auto-round") for bits in (2, 3, 8)},
    **{
        f"{kind}: strategy {strategy}": (kind, (*W, "strategy"), strategy)
        for kind, strategies in (
            ("mxfp4", ("channel", "tensor_group")),
            ("nvfp4", ("group", "tensor")),
            ("compressed-tensors", ("channel", "tensor", "block")),
            ("compressed-tensors in groups of 16", ("channel",)),
        )
        for strategy in strategies
    },
    **{
        f"{kind}: a format that is none": (kind, path, "nonsense")
        for kind in ("mxfp4", "nvfp4", "fp8 channels", "compressed-tensors")
        for path in (("format",),)
    },
    "mxfp4: a format of another type": ("mxfp4", ("format",), {"a": 1}),
    "mxfp4: a group that is none": ("mxfp4", ("config_groups", "group_0"), "x"),
    "compressed-tensors: no bits": ("compressed-tensors", W, {"bits": "4"}),
    "compressed-tensors in groups of 16: targets": (
        "compressed-tensors in groups of 16",
        ("config_groups", "group_0", "targets"),
        1,
    ),
    "compressed-tensors: a number for weights": ("compressed-tensors", W, 3),
    "auto-round: a number for extra_config": ("auto-round", ("extra_config",), 7),
    "fp8 whole: no method": ("fp8 whole", ("quant_method",), ""),
    "fp8 channels: a list for a strategy": ("fp8 channels", (*W, "strategy"), [[]]),
    "mxfp4: an object for bits": ("mxfp4", (*W, "num_bits"), {"a": 1}),
    "gptq: a word for desc_act": ("gptq", ("desc_act",), "re:("),
    "gptq of 8 bits: an object for sym": ("gptq of 8 bits", ("sym",), {"bits": "4"}),
    "int8: 4 bits": ("8-bit integers of W8A8", (*W, "num_bits"), 4),
    "int8: groups": ("8-bit integers of W8A8", (*W, "strategy"), "tensor"),
    "int8: zero points": ("8-bit integers of W8A8", (*W, "symmetric"), False),
    "mxfp4: integers": ("mxfp4", (*W, "type"), "int"),
    "fp8 channels: integers": ("fp8 channels", (*W, "type"), "int"),
    "nvfp4: zero points": ("nvfp4", (*W, "symmetric"), False),
    "compressed-tensors: floats": ("compressed-tensors", (*W, "type"), "float"),
    "compressed-tensors: groups": ("compressed-tensors", (*W, "group_size"), -1),
    "compressed-tensors in groups of 16: groups": ("compressed-tensors in groups of 16", (*W, "group_size"), 8),
    "gptq in another order: symmetric": ("gptq in another order", ("sym",), True),
    "nvfp4 of modelopt: another": ("nvfp4 of modelopt", ("quant_algo",), "FP8"),
    "fp8 whole: another": ("fp8 whole", ("quant_algo",), "NVFP4"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("encodings")


def made(folder: Path, kind: str) -> Path:
    home = folder / ("integers" if kind in SYM_INTEGERS else "floats")
    home.mkdir(exist_ok=True)
    source, _ = integers.made(home, kind, SYM_INTEGERS) if kind in SYM_INTEGERS else floats.made(home, kind)
    return source


def spoilt(source: Path, out: Path, tensors: Any = None, config: Any = None) -> Path:
    config = config or json.loads((source / "config.json").read_text())
    files = {p.name: p.read_text() for p in source.glob("tokenizer*")}
    return write_checkpoint(out, tensors or read_checkpoint(source), config, files=files)


@pytest.mark.parametrize("case", picked(DATA, 6))
def test_numbers_that_load_and_are_wrong_are_found(case: str, folder: Path, tmp_path: Path) -> None:
    kind, name, data, code, refused = DATA[case]
    source = made(folder, kind)
    assert verify(source).sound
    tensors = read_checkpoint(source)
    part = tensors[name]
    data = data[: len(part.data)]
    copy = spoilt(source, tmp_path / "s", {**tensors, name: replace(part, data=data + bytes(part.data[len(data) :]))})
    problems = [(problem.code, problem.where) for problem in verify(copy).problems]
    assert problems == [(code, name)]
    if refused:
        told = call("convert", copy, tmp_path / "out", "--to", "bf16", code=1).output
        assert name in told or name.removesuffix(".qweight") in told


@pytest.mark.parametrize("case", picked(CONFIGS, 7))
def test_a_config_that_contradicts_what_is_stored_is_found(case: str, folder: Path, tmp_path: Path) -> None:
    kind, path, value = CONFIGS[case]
    source = made(folder, kind)
    config = json.loads((source / "config.json").read_text())
    at = config["quantization_config"]
    for key in path[:-1]:
        at = at[key]
    assert at[path[-1]] != value
    at[path[-1]] = value
    report = verify(spoilt(source, tmp_path / "s", config=config))
    assert not report.sound, report.warnings


@pytest.mark.parametrize("case", picked(["fp8 blocks: NaN among codes", "mxfp4: NaN", "gptq: zero point"], 2))
def test_what_data_refuse_under_way_is_named_and_said_what_to_do_about(case: str, folder: Path, tmp_path: Path) -> None:
    kind, name, data, _, _ = DATA[case]
    source, out = made(folder, kind), tmp_path / "out"
    tensors = read_checkpoint(source)
    part = tensors[name]
    bad = {**tensors, name: replace(part, data=data[: len(part.data)] + bytes(part.data[len(data) :]))}
    copy = spoilt(source, tmp_path / "s", bad)
    convert = ("convert", copy, out, "--to", "bf16", "-q")
    for _ in range(2):  # the same command comes to the same place
        told = call(*convert, code=1).output
        assert name in told
        assert "row 0" in told or "[0, 0]" in told
        assert f"{out} is unfinished" in told
        assert "--force" in told
        assert not (out / "config.json").exists()
    shutil.rmtree(copy)
    spoilt(source, copy)
    assert "--force" in call(*convert, code=1).output
    call(*convert, "--force")
    call("convert", source, tmp_path / "clean", "--to", "bf16", "-q")
    assert read_checkpoint(out) == read_checkpoint(tmp_path / "clean")
    assert verify(out).sound


def test_scales_of_zero_over_nothing_are_sound(folder: Path, tmp_path: Path) -> None:
    """As quantizers leave blocks of zeros."""
    source = made(folder, "nvfp4")
    tensors = read_checkpoint(source)
    codes, scales = f"{DOWN}.weight_packed", f"{DOWN}.weight_scale"
    tensors[codes] = replace(tensors[codes], data=b"\x80" * 8 + bytes(tensors[codes].data[8:]))
    tensors[scales] = replace(tensors[scales], data=b"\0" + bytes(tensors[scales].data[1:]))
    assert verify(spoilt(source, tmp_path / "s", tensors)).sound
