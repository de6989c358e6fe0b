"""GGUF outputs in block types: the bytes of llama.cpp's own rounding, of the file in 16 bits, type by type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from ggufs import fields_of
from strategies import picked
from test_convert import quantize
from test_ggml import TYPES, by_ggml
from test_gguf_outputs import done, in_gguf, make, to_gguf, values
from test_prune import manifest_of

from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import SchemeError
from shardxform.execution.runner import run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan.convert import ConvertOptions, Target, plan_convert
from shardxform.plan.plan import Plan
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import GgufOptions, ViewOptions
from shardxform.runtimes.gguf.mixes import KINDS

pytestmark = pytest.mark.oracle

FAMILIES = ("qwen3_5_moe_text", "qwen3_moe")
ORDER = ("Q4_K_M", *(name for name in KINDS if name != "Q4_K_M"))
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256}


def options(kind: str) -> GgufOptions:
    return GgufOptions(pre_tokenizer="qwen2", kind=kind)


def of_kind(source: Path, kind: str) -> Plan:
    asked = ConvertOptions(max_shard_bytes=1 << 30, gguf=options(kind))
    return plan_convert(Checkpoint.open(source), Target(format="gguf"), asked)


def rounded_by_llama_cpp(plain: np.ndarray, type_name: str) -> bytes:
    if type_name in TYPES:
        return by_ggml(plain.astype(np.float32).reshape(-1, plain.shape[-1]), type_name).tobytes()
    return np.asarray(gguf.quantize(plain.astype(np.float32), gguf.GGMLQuantizationType[type_name])).tobytes()


@pytest.mark.parametrize(("family", "kind"), picked([(family, kind) for family in FAMILIES for kind in ORDER], 15))
def test_a_file_has_the_bytes_of_llama_cpps_rounding(family: str, kind: str, tmp_path: Path) -> None:
    """Which tensor has which type is held against llama-quantize in `test_gguf_mixes`."""
    source = make(tmp_path / "source", family, **WIDE)
    plain = values(done(to_gguf(source), tmp_path / "plain") / "model.gguf")
    file = done(of_kind(source, kind), tmp_path / "out") / "model.gguf"
    types: set[str] = set()
    for tensor in gguf.GGUFReader(file).tensors:
        types.add(tensor.tensor_type.name)
        wanted = rounded_by_llama_cpp(plain[tensor.name], tensor.tensor_type.name)
        assert np.ascontiguousarray(tensor.data).tobytes() == wanted, tensor.name
    assert types >= {"F32", KINDS[kind].base}
    assert fields_of(file)["general.file_type"] == KINDS[kind].number


def test_the_wider_types_of_a_mix(tmp_path: Path) -> None:
    plan = of_kind(make(tmp_path / "source", **WIDE), "Q4_K_M")
    types = {entry.spec.name: entry.spec.dtype for shard in plan.shards for entry in shard.entries}
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == types["blk.0.ffn_up_exps.weight"] == "Q4_K"
    last = max(int(name.split(".")[1]) for name in types if name.startswith("blk."))
    assert types[f"blk.{last}.ffn_down_exps.weight"] == "Q6_K"
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"
    assert any("Q4_K_M as llama-quantize makes it" in note and "in Q6_K" in note for note in plan.notes)


def test_pruning_into_a_type_equals_converting_what_is_pruned(tmp_path: Path) -> None:
    source = make(tmp_path / "source", **WIDE)
    manifest = manifest_of(source)
    asked = ViewOptions(max_shard_bytes=1 << 30, gguf=options("Q5_0"))
    one = done(plan_prune(Checkpoint.open(source), manifest, asked), tmp_path / "one")
    run(plan_prune(Checkpoint.open(source), manifest), tmp_path / "pruned")
    two = done(of_kind(tmp_path / "pruned", "Q5_0"), tmp_path / "two")
    assert (one / "model.gguf").read_bytes() == (two / "model.gguf").read_bytes()


def shardxform(*args: object) -> Any:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_command_writes_it_and_verify_proves_it(tmp_path: Path) -> None:
    source, out = make(tmp_path / "source", **WIDE), tmp_path / "out"
    made = shardxform("convert", source, out, "--to", "gguf", "--gguf-type", "q8_0", "--pre-tokenizer", "qwen2")
    assert made.exit_code == 0, made.output
    assert {t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors} == {"F32", "Q8_0"}
    proven = shardxform("verify", out, "--source", source)
    assert proven.exit_code == 0, proven.output
    tensor = next(t for t in gguf.GGUFReader(out / "model.gguf").tensors if t.name == "blk.1.ffn_up_exps.weight")
    data = bytearray((out / "model.gguf").read_bytes())
    data[tensor.data_offset + 5] ^= 1
    (out / "model.gguf").write_bytes(data)
    found = shardxform("verify", out, "--source", source)
    assert found.exit_code != 0
    assert "blk.1.ffn_up_exps.weight" in found.output


def test_what_would_be_rounded_twice_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    twin = quantize(source, tmp_path / "twin")
    with pytest.raises(SchemeError, match=r"`gguf.kind` Q8_0: tensor '.*' is of integers, which would be rounded a"):
        of_kind(twin, "Q8_0")
    scheme = Scheme(grid=Grid(group_size=32), format="gguf")
    with pytest.raises(SchemeError, match="weights are rounded by `scheme`; give one of the two"):
        plan_quantize(Checkpoint.open(source), scheme, None, ViewOptions(gguf=options("Q4_0")))
    with pytest.raises(SchemeError, match=r"`gguf.kind`: expected one of F32, F16"):
        of_kind(source, "Q9")
    assert in_gguf(source).inputs["options"]["gguf"] == {"pre_tokenizer": "qwen2", "kind": ""}


def test_integers_may_become_floats(tmp_path: Path) -> None:
    twin = quantize(make(tmp_path / "source"), tmp_path / "twin")
    found = values(done(of_kind(twin, "F32"), tmp_path / "out") / "model.gguf")
    kept = values(done(to_gguf(twin), tmp_path / "kept") / "model.gguf")
    for name, tensor in kept.items():
        np.testing.assert_array_equal(found[name], tensor)
