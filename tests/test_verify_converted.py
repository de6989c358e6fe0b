"""`verify` of what `convert` dequantized: every value against the source that it follows from, or told to be left.

The values are those that `test_convert` proves against a reference of its own; here, any other value must be noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, read_checkpoint, write_checkpoint
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import KIND_SIZES
from test_verify_quantized import G32, change, convert, edit_json, make, only, quantize, sound

from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.formats.scheme import Grid, Scheme
from shardxform.verification import VerifyReport, data, verify

LEFT = "only shape, type and finiteness"


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A source, what became of it by pruning and rounding, and that in bfloat16 again; never changed."""
    root = tmp_path_factory.mktemp("converted")
    source = make(root / "source")
    packed = quantize(source, root / "packed")
    return source, packed, convert(packed, root / "plain", format="bf16")


@pytest.fixture
def source(trio: tuple[Path, Path, Path]) -> Path:
    return trio[0]


@pytest.fixture
def packed(trio: tuple[Path, Path, Path], writable: Callable[[Path], Path]) -> Path:
    return writable(trio[1])


@pytest.fixture
def plain(trio: tuple[Path, Path, Path], writable: Callable[[Path], Path]) -> Path:
    return writable(trio[2])


def flip(at: int = 0) -> Callable[[np.ndarray], object]:
    """Change the lowest bit of one element."""

    def edit(array: np.ndarray) -> None:
        array.view("u2").reshape(-1)[at] ^= 1

    return edit


def last_line(out: Path, source: Path | None = None, code: int = 0) -> str:
    more = ("--source", str(source)) if source else ()
    result = CliRunner().invoke(main, ["verify", str(out), "-q", *more], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout.splitlines()[-1]


def whole(report: VerifyReport) -> bool:
    """Sound, and every value compared."""
    assert sound(report)
    assert (report.values_compared, report.values_left) == (report.tensors, {})
    return report.tensors_derived > 0


# -- all of it is compared ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_float16_is_proven_as_bfloat16_is(kind: str, bits: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    packed = quantize(source, tmp_path / "packed", Scheme(grid=replace(G32, bits=bits)))
    plain = convert(packed, tmp_path / "plain", format="fp16")
    for origin in (packed, source):
        report = verify(plain, source=origin, independent=True)
        assert whole(report)
        assert report.rederived > 20
    name = next(name for name in read_checkpoint(plain) if name.endswith("layers.1.self_attn.o_proj.weight"))
    change(plain, name, flip(3))
    for origin in (packed, source):
        found = verify(plain, source=origin, independent=True).problems
        assert {(p.code, p.where) for p in found} == {("source-bytes", name), ("independent", name)}
    change(plain, name, flip(3))
    edit_json(plain / "config.json", lambda config: config.update(dtype="bfloat16"))
    assert [p.code for p in verify(plain, source=packed).problems if p.code != "record"] == ["source-config"]


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("kind", sorted(KIND_SIZES))
def test_every_value_follows_from_both_sources(kind: str, experts: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind, experts=experts)
    for format_ in ("auto-round", "gptq", "compressed-tensors"):
        scheme = Scheme(grid=Grid(group_size=32), format=format_)
        packed = quantize(source, tmp_path / f"{format_}-packed", scheme)
        plain = convert(packed, tmp_path / f"{format_}-plain", format="bf16")
        assert whole(verify(plain, source=packed))
        assert whole(verify(plain, source=source))


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(grid=replace(G32, bits=8, search=True, scale_grid="bf16")),
        Scheme(grid=replace(G32, group_size=-1)),
        Scheme(grid=G32, expert_names="fused-indexed"),
        Scheme(grid=G32, keep_16bit=("*.self_attn.*", "model.layers.1.mlp.experts*")),
        Scheme(grid=G32, quantize=("lm_head",)),
    ],
    ids=str,
)
def test_whatever_was_rounded_and_how(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    packed = quantize(source, tmp_path / "packed", scheme)
    plain = convert(packed, tmp_path / "plain", format="bf16")
    for origin in (packed, source):
        assert whole(verify(plain, source=origin))
    for name in read_checkpoint(plain):
        change(plain, name, flip(-1))
    count = len(read_checkpoint(plain))
    for origin in (packed, source):
        report = verify(plain, source=origin)
        assert [p.code for p in report.problems if p.code != "not-finite"] == ["source-bytes"] * count
        assert report.tensors_differing == count


def test_the_source_may_be_in_float16(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    shape = read_checkpoint(make(tmp_path / "shape", "qwen3_moe"))[name].shape
    values = np.random.default_rng(0).standard_normal(shape).astype("<f2")
    source = make(tmp_path / "source", "qwen3_moe", {name: Raw("F16", shape, values.tobytes())})
    plain = convert(quantize(source, tmp_path / "packed"), tmp_path / "plain", format="bf16")
    assert whole(verify(plain, source=source))


def test_what_was_converted_twice_is_proven_against_all_before(source: Path, packed: Path, tmp_path: Path) -> None:
    second = convert(packed, tmp_path / "second", format="gptq")
    plain = convert(second, tmp_path / "plain", format="bf16")
    for origin in (second, packed, source):
        assert whole(verify(plain, source=origin))


@pytest.mark.parametrize("chunk", [2 * 64, 2 * 64 * 3 + 2, 1 << 20])
def test_pieces_need_not_end_with_rows(
    chunk: int, source: Path, packed: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CHUNK_BYTES", chunk)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    at = 1000
    for origin in (source, packed):
        assert whole(verify(plain, source=origin, jobs=3))
        change(plain, name, flip(at))
        found = only(verify(plain, source=origin, jobs=3), "source-bytes")
        rows, columns = Checkpoint.open(plain).tensors[name].spec.shape[1:]
        assert found.where == name
        assert f"the first at {2 * at} (expert {at // (rows * columns)})" in found.message
        change(plain, name, flip(at))


# -- a wrong value ------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_found(trio: tuple[Path, Path, Path], draw: st.DataObject) -> None:
    source, packed, plain = trio
    tensors = Checkpoint.open(plain).tensors
    name = draw.draw(st.sampled_from(list(tensors)))
    (piece,) = tensors[name].ranges
    path = plain / piece.file
    good = path.read_bytes()
    bit = draw.draw(st.integers(0, 8 * piece.length - 1))
    damaged = bytearray(good)
    damaged[piece.offset + bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(damaged)
        for origin in (packed, source):
            report = verify(plain, source=origin)
            assert {p.where for p in report.problems} == {name}
            assert "source-bytes" in {p.code for p in report.problems}
    finally:
        path.write_bytes(good)


def test_a_changed_code_of_the_packed_source_is_found(packed: Path, plain: Path) -> None:
    def other(words: np.ndarray) -> None:
        words.view("u4")[0, 0] ^= 1

    change(packed, "model.layers.1.mlp.experts.3.up_proj.qweight", other)
    report = verify(plain, source=packed)
    (found,) = report.problems
    assert [warning.code for warning in report.warnings] == ["other-source"]
    assert found.code == "source-bytes"
    assert (found.where, found.message.endswith("(expert 3)")) == ("model.layers.1.mlp.experts.gate_up_proj", True)
    assert "differ from the source dequantized" in found.message


def test_swapped_experts_are_found(packed: Path, source: Path, plain: Path) -> None:
    change(plain, "model.layers.2.mlp.experts.down_proj", lambda a: np.copyto(a, a[[1, 0, 2, 3]]))
    assert "differ from the source dequantized" in only(verify(plain, source=packed), "source-bytes").message
    assert "rounded again and dequantized" in only(verify(plain, source=source), "source-bytes").message


def test_unrounded_weights_are_found(source: Path, tmp_path: Path) -> None:
    packed = quantize(source, tmp_path / "packed", pruned=False)
    plain = convert(packed, tmp_path / "plain", format="bf16")
    name = "model.layers.3.self_attn.q_proj.weight"
    change(plain, name, lambda a: np.copyto(a, read_checkpoint(source)[name].array()))
    for origin in (packed, source):
        assert only(verify(plain, source=origin), "source-bytes").where == name


def test_what_is_missing_misshapen_or_of_another_dtype_is_named(packed: Path, source: Path, plain: Path) -> None:
    tensors = read_checkpoint(plain)
    gone, wide = "model.layers.1.mlp.experts.down_proj", "model.layers.3.self_attn.o_proj.weight"
    del tensors[gone]
    values = tensors[wide].array().astype("<u4") << np.uint32(16)
    tensors[wide] = Raw("F32", tensors[wide].shape, values.tobytes())
    config = json.loads((plain / "config.json").read_text())
    for path in plain.glob("*.safetensors*"):
        path.unlink()
    write_checkpoint(plain, tensors, config)
    for origin in (packed, source):
        report = verify(plain, source=origin)
        about = {(p.code, p.where) for p in report.problems}
        assert ("source-dtype", wide) in about
        assert any(
            gone in where or "mlp.experts.down_proj" in p.message for p in report.problems for where in [p.where]
        )
        assert report.values_compared < report.tensors


# -- what cannot be compared --------------------------------------------------------------------------------------


def tuned(plain: Path, **recipe: Any) -> None:
    """Have the record say that weights were tuned, and healed if `recipe` says so."""

    def edit(record: dict[str, Any]) -> None:
        origin = record["inputs"]["history"]["steps"][0]
        origin["scheme"]["method"] = "auto-round"
        origin.update(recipe)

    edit_json(plain / "shardxform.json", edit)


HEAL = {"recipe": {"heal": {"what": "moe"}}, "facts": {"blocks": [{"layer": 1, "healed": {"what": None}}]}}


def test_what_was_tuned_is_counted_and_told_apart(source: Path, packed: Path, plain: Path) -> None:
    tuned(plain)
    name = "model.layers.1.mlp.experts.down_proj"
    change(plain, name, flip(5))
    report = verify(plain, source=source)
    assert report.sound
    assert report.values_compared + report.values_left["tuned"] == report.tensors
    (warning,) = report.warnings
    assert "against the quantized checkpoint that OUT was converted from, all are" in warning.message
    count = report.values_left["tuned"]
    same = report.values_compared
    said = last_line(plain, source)
    assert said.endswith(
        f"; values of {same} of {report.tensors} tensors compared with {source} ({same} equal byte for byte);"
        f" {count} rounded with tuning: {LEFT}"
    )
    assert only(verify(plain, source=packed), "source-bytes").where == name
    assert last_line(plain, packed, code=1).startswith("not sound: 1 problem in ")


def test_what_was_healed_is_counted_and_all_else_compared(source: Path, packed: Path, plain: Path) -> None:
    tuned(plain, **HEAL)
    report = verify(plain, source=source)
    assert report.sound
    healed = {n for n in read_checkpoint(plain) if (".mlp." in n or "post_attention" in n) and ".layers.1." not in n}
    assert report.values_left["healed"] == len(healed) == report.tensors_healed
    assert report.values_compared + sum(report.values_left.values()) == report.tensors
    assert f"; {len(healed)} healed, " in last_line(plain, source)
    for name in ("model.layers.0.input_layernorm.weight", "model.layers.1.mlp.gate.weight", "lm_head.weight"):
        change(plain, name, flip())
        assert only_problem(verify(plain, source=source)) == ("source-bytes", name)
        change(plain, name, flip())
    some = "model.layers.2.mlp.experts.gate_up_proj"
    change(plain, some, lambda a: a.view("u2").reshape(-1).__setitem__(7, 0x7FC0))
    assert only_problem(verify(plain, source=source)) == ("not-finite", some)
    change(plain, some, lambda a: a.view("u2").reshape(-1).__setitem__(7, 0x3F80))
    assert verify(plain, source=source).sound  # so the last line must not claim it
    assert only_problem(verify(plain, source=packed)) == ("source-bytes", some)


def only_problem(report: VerifyReport) -> tuple[str, str]:
    (problem,) = report.problems
    return problem.code, problem.where


def test_healing_of_weights_rounded_to_nearest_leaves_the_others_provable(source: Path, plain: Path) -> None:
    edit_json(plain / "shardxform.json", lambda record: record["inputs"]["history"]["steps"][0].update(HEAL))
    report = verify(plain, source=source)
    assert report.values_left.keys() == {"healed"}
    assert report.tensors_derived
    name = "model.layers.1.mlp.experts.down_proj"  # of the block that stayed as it was pruned
    change(plain, name, flip())
    assert only_problem(verify(plain, source=source)) == ("source-bytes", name)


def test_a_record_without_blocks_leaves_all_that_healing_may_have_changed(source: Path, plain: Path) -> None:
    tuned(plain, recipe=HEAL["recipe"])
    tensors = read_checkpoint(plain)
    healed = {name for name in tensors if ".mlp." in name or "post_attention" in name}
    assert verify(plain, source=source).values_left["healed"] == len(healed)


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


def test_convert_records_what_was_healed(packed: Path, tmp_path: Path) -> None:
    def edit(record: dict[str, Any]) -> None:
        record["inputs"]["recipe"] = HEAL["recipe"]
        blocks = [{"layer": 1, "seconds": 2.5, "healed": {"what": "moe", "pruned_error": 0.5}}, {"layer": 2}, 5]
        record["facts"] = {"blocks": [*blocks, {"layer": 3, "healed": {"what": None}}, {"healed": {"what": "moe"}}]}

    edit_json(packed / "shardxform.json", edit)
    healed = {"layer": 1, "healed": {"what": "moe", "pruned_error": 0.5}}
    kept = {"blocks": [healed, {"layer": 2}, {"layer": 3, "healed": {"what": None}}]}
    second = convert(packed, tmp_path / "second", format="gptq")
    third = convert(second, tmp_path / "third", format="bf16")
    for out in (second, third):
        assert json_of(out / "shardxform.json")["inputs"]["history"]["steps"][0]["facts"] == kept


@pytest.mark.parametrize("scheme", [None, {}, {"grid": 5}, {"grid": {"bits": 4}}, {"format": []}, {"keep_16bit": [5]}])
def test_where_nothing_says_how_it_was_rounded_no_linear_weight_is_compared(
    scheme: object, source: Path, plain: Path
) -> None:
    def edit(record: dict[str, Any]) -> None:
        origin = record["inputs"]["history"]["steps"][0]
        origin["scheme"] = {**origin["scheme"], **scheme} if isinstance(scheme, dict) and scheme else scheme

    edit_json(plain / "shardxform.json", edit)
    report = verify(plain, source=source)
    assert report.problems == ()
    assert set(report.values_left) == {"unknown"}
    assert f"{report.values_left['unknown']} not comparable: {LEFT}" in last_line(plain, source)
    change(plain, "model.embed_tokens.weight", flip())
    assert only_problem(verify(plain, source=source)) == ("source-bytes", "model.embed_tokens.weight")


def test_without_a_source_or_data_no_value_is_said_to_be_compared(source: Path, plain: Path) -> None:
    assert last_line(plain).endswith("scanned; values not compared, no --source given")
    result = CliRunner().invoke(main, ["verify", str(plain), "--quick", "--source", str(source)])
    assert result.stdout.splitlines()[-1].endswith(f"headers only; no value compared with {source}")
    assert verify(plain, source=source, quick=True).values_compared == 0


def test_another_tools_dequantized_checkpoint_is_held_against_the_quantized_one(packed: Path, plain: Path) -> None:
    """Without a record: experts one by one, and float32 where somebody chose it."""
    tensors = read_checkpoint(plain)
    (plain / "shardxform.json").unlink()
    fused = "model.layers.2.mlp.experts.down_proj"
    stack = tensors.pop(fused).array()
    both = tensors.pop("model.layers.2.mlp.experts.gate_up_proj").array()
    stem = "model.layers.2.mlp.experts"
    for expert in range(len(stack)):
        parts = (*zip(("gate_proj", "up_proj"), np.split(both[expert], 2), strict=True), ("down_proj", stack[expert]))
        for name, array in parts:
            tensors[f"{stem}.{expert}.{name}.weight"] = Raw("BF16", array.shape, array.tobytes())
    wide = "model.layers.3.self_attn.o_proj.weight"
    tensors[wide] = Raw("F32", tensors[wide].shape, (tensors[wide].array().astype("<u4") << np.uint32(16)).tobytes())
    config = json.loads((plain / "config.json").read_text())
    for path in plain.glob("*.safetensors*"):
        path.unlink()
    write_checkpoint(plain, tensors, config)
    report = verify(plain, source=packed)
    assert report.problems == ()
    assert (report.values_compared, report.values_left) == (report.tensors - 1, {"unknown": 1})
    assert "in no 16-bit type" in only(report, "dequantized", warning=True).message
    change(plain, f"{stem}.1.up_proj.weight", flip(9))
    assert only_problem(verify(plain, source=packed)) == ("source-bytes", f"{stem}.1.up_proj.weight")
