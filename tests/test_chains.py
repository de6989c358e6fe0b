"""Chains of commands from 8-bit, FP8, FP4 and integer sources: `verify` proves each output against all before it.

Or refuses in one line what several steps made of a source and nothing can prove at once; it never calls unsound what is
as it was written, and always what is not.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from build import forget_digests
from strategies import picked

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import test_gguf_outputs  # noqa: E402
import test_integer_sources  # noqa: E402
import test_quantize  # noqa: E402
import test_small_floats  # noqa: E402
from test_small_floats import call  # noqa: E402

from shardxform.checkpoint.table import Checkpoint  # noqa: E402

pytestmark = pytest.mark.oracle

GGUF = ("--pre-tokenizer", "gpt-2")
OPS: dict[str, tuple[str, ...]] = {
    "prune": ("prune", "-m", "KEEP"),
    "copy": ("prune", "--mtp", "drop"),
    "text": ("prune", "--text-only"),
    "w4": ("quantize", "--group-size", "32"),
    "w4 anew": ("quantize", "--group-size", "32", "--requantize"),
    "w4 in part": ("quantize", "--group-size", "32", "--requantize", "--keep-16bit", "*.layers.1.*self_attn*"),
    "w4 of rows, pruned": ("quantize", "-m", "KEEP", "--group-size", "-1", "--requantize"),
    "w8 anew": ("quantize", "--group-size", "32", "--requantize", "--scheme", "W8A16", "--format", "gptq"),
    "w8 in mlx": ("quantize", "--format", "mlx", "--scheme", "W8A16"),
    "w4 in gguf": ("quantize", "--format", "gguf", *GGUF),
    "to gptq": ("convert", "--to", "gptq"),
    "to packed": ("convert", "--to", "compressed-tensors"),
    "to bf16": ("convert", "--to", "bf16"),
    "to fp16": ("convert", "--to", "fp16"),
    "to gguf": ("convert", "--to", "gguf", *GGUF),
    "to Q8_0": ("convert", "--to", "gguf", "--gguf-type", "Q8_0", *GGUF),
}
PROVED: list[tuple[str, ...]] = [
    ("fp8 channels", "w4", "to fp16"),
    ("gptq with zero points", "w4 of rows, pruned", "to bf16"),
    ("8 bits", "prune", "w4", "to gptq"),
    ("8 bits", "w8 anew", "copy"),
    ("mxfp8", "to fp16", "prune"),
    ("compressed-tensors", "w4 in part", "to bf16"),
    ("fp8 blocks", "w4 in part", "to gptq", "to fp16"),
    ("in the config of the decoder", "prune", "w8 anew", "to bf16"),
    ("compressed-tensors", "to gptq", "to packed"),
    ("compressed-tensors", "to gptq", "prune", "to packed"),
    ("nvfp4", "w4 anew", "to bf16", "prune"),
    ("8-bit integers of W8A8", "text", "w4", "prune", "to fp16"),
    ("plain", "prune", "w8 in mlx", "to bf16"),
]
REFUSED: list[tuple[str, ...]] = [
    ("plain", "w4", "to bf16", "to Q8_0"),
    ("plain", "w4 in gguf", "prune"),
    ("plain", "w8 in mlx", "to gguf"),
    ("plain", "w8 anew", "w4 in gguf"),
    ("plain", "to Q8_0", "prune"),
    ("fp8 channels", "to bf16", "w4"),
    ("gptq with zero points", "w8 anew", "w4"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chains")


def source_of(kind: str, folder: Path) -> Path:
    """A tiny model of that way to store weights; `plain` has 16 bits, and is written in GGUF as well."""
    home = folder / ("floats" if kind in test_small_floats.KINDS else "integers")
    home.mkdir(exist_ok=True)
    if kind == "plain":
        return home / kind if (home / kind).exists() else test_gguf_outputs.make(home / kind)
    if kind in test_small_floats.KINDS:
        return test_small_floats.made(home, kind)[0]
    kinds = test_integer_sources.STILL if kind in test_integer_sources.STILL else test_integer_sources.KINDS
    return test_integer_sources.made(home, kind, kinds)[0]


def keep_file(source: Path, path: Path) -> Path:
    """Four of the experts of every layer."""
    layers = json.loads((source / "config.json").read_text())
    layers = layers.get("text_config", layers)["num_hidden_layers"]
    path.write_text(json.dumps({str(layer): [0, 2, 3, 5] for layer in range(layers)}))
    return path


def made(folder: Path, kind: str, *ops: str) -> list[Path]:
    """A source, and what each command makes of what the one before it wrote."""
    chain = [source_of(kind, folder)]
    for number, op in enumerate(ops):
        out = folder / " ".join((kind, *ops[: number + 1])).replace(" ", "-")
        if not out.exists():
            keep = keep_file(chain[0], folder / "keep.json")
            options = [str(keep) if each == "KEEP" else each for each in OPS[op]]
            call(options[0], chain[-1], out, *options[1:], "-q")
        chain.append(out)
    return chain


def told_of(out: Path, source: Path, *options: str, code: int = 0) -> dict[str, Any]:
    return dict(json.loads(call("verify", out, "--source", source, *options, "--json", "-q", code=code).stdout))


@pytest.mark.parametrize("steps", picked(PROVED, 3), ids=", ".join)
def test_it_is_proved_against_every_checkpoint_on_the_way(steps: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    *before, out = made(folder, *steps)
    spoiled = forget_digests(Path(shutil.copytree(out, tmp_path / "spoiled")))
    place = Checkpoint.open(spoiled).tensors[expert_of(spoiled)].ranges[0]
    with (spoiled / place.file).open("r+b") as file:
        file.seek(place.offset + 1)
        byte = file.read(1)[0]
        file.seek(place.offset + 1)
        file.write(bytes([byte ^ 1]))
    for source in before:
        told = told_of(out, source)
        assert told["values_compared"] == told["tensors"]
        assert told_of(spoiled, source, code=1)["problems"]
    assert told_of(out, before[-1], "--independent")["rederived"] > 20
    assert told_of(spoiled, before[-1], "--independent", code=1)["problems"]


@cache
def expert_of(root: Path) -> str:
    """Codes, or values, of an expert."""
    ends = (".weight", ".qweight", ".weight_packed", ".gate_up_proj")
    return next(name for name in Checkpoint.open(root).tensors if ".experts" in name and name.endswith(ends))


@pytest.mark.parametrize("steps", picked(REFUSED, 2), ids=", ".join)
def test_what_is_not_proved_at_once_is_refused_and_each_step_proved(steps: tuple[str, ...], folder: Path) -> None:
    chain = made(folder, *steps)
    for options in ((), ("--independent",)):
        told = call("verify", chain[-1], "--source", chain[0], *options, code=1)
        assert "several steps" in told.output or "which are not proved at once" in told.output
        assert len(told.output.splitlines()) == 1
        for source, out in pairwise(chain):
            assert told_of(out, source, *options)["problems"] == []


@pytest.mark.parametrize("kind", ["qwen3_6_moe", "qwen3_5_moe"])
def test_stacks_that_stay_16_bit_beside_integers_are_pruned(kind: str, tmp_path: Path) -> None:
    """Of an MTP layer, and of experts that were to stay."""
    source = test_quantize.make(tmp_path / "source", kind)
    options = ("--keep-16bit", "*.layers.1.*experts*", "--format", "compressed-tensors", "--group-size", 32)
    call("quantize", source, tmp_path / "rounded", *options, "-q")
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps(test_quantize.manifest_of(source, mtp=True).to_dict()))
    call("prune", tmp_path / "rounded", tmp_path / "out", "-m", keep, "-q")
    for root in (source, tmp_path / "rounded"):
        told = told_of(tmp_path / "out", root)
        assert told["values_compared"] == told["tensors"]


def test_a_record_that_is_too_deep_is_a_finding_of_the_second_opinion(folder: Path, tmp_path: Path) -> None:
    *_, source, out = made(folder, "compressed-tensors", "prune", "to gptq")
    deep = Path(shutil.copytree(out, tmp_path / "deep"))
    (deep / "shardxform.json").write_text("[" * 100_000 + "]" * 100_000)
    told = told_of(deep, source, "--independent", code=1)["problems"]
    assert "cannot be derived: nested too deeply" in str(told)
