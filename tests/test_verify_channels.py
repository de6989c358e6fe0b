"""The second opinion on experts with fewer channels: which stay is the manifest's to say, their bytes the source's."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import read_checkpoint, text_of, tiny, write_checkpoint
from strategies import picked
from test_quantize import KIND_SIZES
from test_verify_independent import found, rewrite
from test_verify_quantized import SIDECARS, convert, edit_json
from test_verify_systematic import Opened, claim_tuned
from test_width import manifest, text

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import PlanError
from shardxform.execution.runner import run
from shardxform.formats.picking import picked_ids
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions
from shardxform.verification import definitions, verify
from shardxform.verification.findings import Findings
from shardxform.verification.independent import CODE, check_independently

OF = 64
SIZES: dict[str, dict[str, Any]] = {
    **{kind: {**KIND_SIZES[kind], "moe_intermediate_size": OF} for kind in ("qwen3_moe", "qwen3_5_moe", "deepseek_v3")},
    "mixtral": {"hidden_size": 64, "intermediate_size": OF},
}
EXPERTS = {"qwen3_moe": [1, 2, 4, 5], "qwen3_5_moe": [1, 2, 4, 5], "deepseek_v3": [0, 2, 5, 7], "mixtral": [0, 3, 4, 5]}
HOME = {
    "qwen3_moe": "model.layers.1.mlp",
    "qwen3_5_moe": "model.language_model.layers.1.mlp",
    "deepseek_v3": "model.layers.1.mlp",
    "mixtral": "model.layers.1.block_sparse_moe",
}
FORMATS = ("auto-round", "gptq", "compressed-tensors", "mlx")


def make(root: Path, kind: str) -> tuple[Path, dict[str, Any]]:
    """A source, and a manifest of some of its experts with half of their channels each."""
    config, tensors = tiny(kind, **SIZES[kind])
    source = write_checkpoint(root, tensors, config, shards=2, files=SIDECARS)
    return source, manifest(config, EXPERTS[kind], OF, mtp=kind == "qwen3_5_moe")


def prune(source: Path, out: Path, value: dict[str, Any], **options: Any) -> Path:
    run(plan_prune(Checkpoint.open(source), Manifest.from_dict(value), ViewOptions(**options)), out)
    return out


def quantize(source: Path, out: Path, value: dict[str, Any], format_: Any, bits: Any = 4) -> Path:
    scheme = Scheme(grid=Grid(bits=bits, group_size=32), format=format_)
    run(plan_quantize(Checkpoint.open(source), scheme, Manifest.from_dict(value)), out)
    return out


def alone(value: dict[str, Any]) -> dict[str, Any]:
    """What the command hands over of a manifest."""
    return {key: value[key] for key in ("keep", "mtp_keep", "width") if key in value}


# -- sound outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SIZES)
def test_pruned_outputs_are_derived_with_a_record_and_with_a_manifest(kind: str, tmp_path: Path) -> None:
    source, value = make(tmp_path / "source", kind)
    every = {**value, "keep": {}, "width": {**value["width"], "kept": {}}}
    count = text_of(json.loads((source / "config.json").read_text()))
    number = next(count[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in count)
    for layer, bitmaps in value["width"]["kept"].items():
        every["keep"][layer] = list(range(number))
        every["width"]["kept"][layer] = (bitmaps * number)[:number]
    if kind == "qwen3_5_moe":
        every["mtp_keep"], every["width"]["mtp_kept"] = {"0": every["keep"]["0"]}, {"0": every["width"]["kept"]["0"]}
    for name, asked in (("some", value), ("every", every)):
        out = prune(source, tmp_path / name, asked)
        assert found(out, source) == []
        assert verify(out, source=source, independent=True, manifest=Manifest.from_dict(asked)).problems == ()
        (out / "shardxform.json").unlink()
        assert found(out, source, manifest=alone(asked)) == []
    if kind == "qwen3_5_moe":
        dropped = prune(source, tmp_path / "dropped", value, mtp="drop", text_only=True)
        assert found(dropped, source) == []


READ = {"mixtral": ("compressed-tensors", "mlx")}
"""Formats that are written of a kind, where not all are."""


@pytest.mark.parametrize(
    ("kind", "format_"), [(kind, each) for kind in picked(tuple(SIZES), 2) for each in READ.get(kind, FORMATS)]
)
def test_quantized_and_converted_outputs_are_derived(kind: str, format_: str, tmp_path: Path) -> None:
    source, value = make(tmp_path / "source", kind)
    out = quantize(source, tmp_path / "out", value, format_, 8 if format_ == "gptq" else 4)
    assert found(out, source) == []
    if format_ == "mlx":
        return
    other = "compressed-tensors" if format_ != "compressed-tensors" else "gptq"
    for to in ("bf16", *({other} & {*READ.get(kind, FORMATS)})):
        converted = convert(out, tmp_path / to, format=to)
        assert found(converted, out) == []
        assert found(converted, source) == []


def test_models_in_gguf_are_derived(tmp_path: Path) -> None:
    from test_gguf_outputs import PRE, tokenizer

    config, tensors = tiny("qwen3_moe", **SIZES["qwen3_moe"])
    files = {"tokenizer.json": tokenizer(config["vocab_size"])}
    source, value = write_checkpoint(tmp_path / "source", tensors, config, files=files), manifest(config, [1, 2, 4], OF)
    scheme, options = Scheme(grid=Grid(group_size=32), format="gguf"), ViewOptions(gguf=PRE)
    run(plan_quantize(Checkpoint.open(source), scheme, Manifest.from_dict(value), options), tmp_path / "out")
    report = verify(tmp_path / "out", source=source, independent=True)
    assert (report.problems, report.rederived) == ((), len(read_checkpoint(source)) - 3 * 3 * 3)
    other = json.loads(json.dumps(value))
    other["width"]["kept"]["1"] = other["width"]["kept"]["1"][::-1]
    told = verify(tmp_path / "out", source=source, independent=True, manifest=Manifest.from_dict(other)).problems
    assert {p.where for p in told if p.code == CODE} == {
        f"blk.1.ffn_{part}_exps.weight" for part in ("gate", "up", "down")
    }
    edit_json(tmp_path / "out" / "shardxform.json", lambda r: r["inputs"]["manifest"]["width"].update(of=128))
    told = verify(tmp_path / "out", source=source, independent=True).problems
    assert [p.message for p in told if p.code == CODE] == [
        "cannot be compared: width.kept, layer 0, expert 0: no bitmap of 32 of 128 channels"
    ]


@pytest.mark.oracle
@pytest.mark.parametrize("block", [(24, 40), (32, 32)])
def test_channels_of_small_floats_are_those_of_their_values(block: tuple[int, int], tmp_path: Path) -> None:
    """Commands refuse to narrow such a source; what was narrowed of its 16-bit twin can be held against it."""
    from test_fp8 import release, write

    config, tensors, _ = release("qwen3_moe", block)
    source, value = write(tmp_path / "fp8", config, tensors), manifest(config, [1, 2, 4], 32)
    for bitmaps in value["width"]["kept"].values():
        bitmaps[:] = [text(list(range(at, at + 16)), 32) for at, _ in enumerate(bitmaps)]
    value["width"]["channels"] = 16
    with pytest.raises(PlanError, match="is quantized; narrow the 16-bit checkpoint"):
        prune(source, tmp_path / "refused", value)
    out = prune(convert(source, tmp_path / "twin", format="bf16"), tmp_path / "out", value)
    assert found(out, source) == []
    up = "model.layers.1.mlp.experts.2.up_proj.weight"
    swap_rows(out, up, 3, 4)
    assert [p.where for p in found(out, source)] == [up]
    # what stays of scales of blocks is nowhere written down, and both hold small floats
    edit_json(source / "config.json", lambda c: c["quantization_config"].update(weight_block_size=[32, 32]))
    problem = underivable(source, source, manifest=alone(value))
    assert (
        problem
        == "model.layers.0.mlp.experts.1.down_proj.weight_scale_inv: how channels are taken out of it is not derived"
    )


def underivable(out: Path, source: Path, **given: Any) -> str:
    """The one line that says why nothing is derived."""
    findings = Findings()
    assert check_independently(out, source, findings, **given) == 0
    (problem,) = findings.problems
    assert (problem.code, problem.where) == (CODE, ".")
    assert problem.message.startswith("cannot be derived: ")
    return problem.message.removeprefix("cannot be derived: ")


@pytest.mark.oracle
def test_channels_of_integers_are_those_of_their_values(tmp_path: Path) -> None:
    """Zero points and columns in another order, as other tools store them; as for small floats."""
    from test_integer_sources import KINDS, made

    source, _ = made(tmp_path, "gptq in another order")
    assert KINDS["gptq in another order"].model_type == "qwen3_moe"
    config = json.loads((source / "config.json").read_text())
    value = manifest(config, [0, 2, 3], 32)
    for bitmaps in value["width"]["kept"].values():
        bitmaps[:] = [text(list(range(at, 32, 2)), 32) for at in (0, 1, 0)]
    value["width"]["channels"] = 16
    out = prune(convert(source, tmp_path / "bf16", format="bf16"), tmp_path / "out", value)
    assert found(out, source) == []
    down = "model.layers.1.mlp.experts.2.down_proj.weight"
    swap_rows(out, down, 3, 4, axis=1)
    assert [p.where for p in found(out, source)] == [down]


# -- faults --------------------------------------------------------------------------------------------------------


def swap_rows(out: Path, name: str, one: int, other: int, axis: int = 0) -> None:
    tensors = read_checkpoint(out)
    array = tensors[name].array().copy()
    order = np.arange(array.shape[axis])
    order[[one, other]] = other, one
    array = np.take(array, order, axis)
    rewrite(out, {**tensors, name: (tensors[name].dtype, array.shape, np.ascontiguousarray(array).tobytes())})


def channels_of(value: dict[str, Any], expert: int) -> list[int]:
    return list(picked_ids(base64.b64decode(value["width"]["kept"]["1"][expert])))


def other(value: dict[str, Any], expert: int, ids: list[int]) -> dict[str, Any]:
    """The same manifest with other channels of one expert."""
    new = json.loads(json.dumps(value))
    new["width"]["kept"]["1"][expert] = text(sorted(ids), OF)
    return new


def shifted(value: dict[str, Any]) -> dict[str, Any]:
    return other(value, 2, [(each + 1) % OF for each in channels_of(value, 2)])


def one_other(value: dict[str, Any]) -> dict[str, Any]:
    ids = channels_of(value, 2)
    return other(value, 2, [*ids[1:], next(each for each in range(OF) if each not in ids)])


def of_another_expert(value: dict[str, Any]) -> dict[str, Any]:
    return other(value, 2, channels_of(value, 1))


@pytest.mark.parametrize("how", [shifted, one_other, of_another_expert])
@pytest.mark.parametrize("kind", SIZES)
def test_a_cut_of_other_channels_than_those_recorded_is_told(
    how: Callable[[dict[str, Any]], dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    """Pruned, rounded, and as if tuned; the names are those of that expert's three weights."""
    source, value = make(tmp_path / "source", kind)
    made = {
        "pruned": prune(source, tmp_path / "pruned", how(value)),
        "rounded": quantize(source, tmp_path / "rounded", how(value), "compressed-tensors"),
        "tuned": quantize(source, tmp_path / "tuned", how(value), "compressed-tensors"),
    }
    claim_tuned(made["tuned"])
    for out in made.values():
        recorded = json.loads(json.dumps(alone(value)))
        edit_json(out / "shardxform.json", lambda r, recorded=recorded: r["inputs"].update(manifest=recorded))
        told = found(out, source)
        homes = (f"{HOME[kind]}.experts.2.", f"{HOME[kind]}.experts.gate_up_proj", f"{HOME[kind]}.experts.down_proj")
        assert all(p.where.startswith(homes) for p in told)
        assert len(told) == 3, (out.name, told)


PARTS = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


def part_of(kind: str, part: str) -> str:
    return f"{HOME[kind]}.experts.2.{PARTS[part][kind == 'mixtral']}"


def swapped(opened: Opened, module: str, axis: int) -> None:
    """Two channels in each other's place, with their scales."""
    codes, scales = opened.codes(module), opened.scales(module)
    order = np.arange(codes.shape[axis])
    order[[5, 9]] = 9, 5
    opened.put_codes(module, np.take(codes, order, axis))
    if axis == 0:
        opened.put_scales(module, scales[order])


QUANTIZED_FAULTS: dict[str, tuple[tuple[str, int], ...]] = {
    "a swapped pair of channels": (("gate", 0), ("up", 0), ("down", 1)),
    "rows of gate in another order": (("gate", 0),),
    "columns of down in another order": (("down", 1),),
}


@pytest.mark.parametrize("fault", QUANTIZED_FAULTS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_channels_in_another_order_are_told(fault: str, kind: str, tmp_path: Path) -> None:
    source, value = make(tmp_path / "source", kind)
    out = quantize(source, tmp_path / "out", value, "auto-round" if kind != "mixtral" else "compressed-tensors")
    pruned = prune(source, tmp_path / "pruned", value)
    wanted = {part_of(kind, part) for part, _ in QUANTIZED_FAULTS[fault]}
    for part, axis in QUANTIZED_FAULTS[fault]:
        swapped(Opened(out), part_of(kind, part), axis)
        swap_rows(pruned, f"{part_of(kind, part)}.weight", 5, 9, axis)
    assert {p.where.rpartition(".")[0] for p in found(pruned, source)} == wanted
    assert {p.where.rpartition(".")[0] for p in found(out, source)} == wanted
    claim_tuned(out)
    assert {p.where.rpartition(".")[0] for p in found(out, source)} == wanted


@pytest.mark.parametrize("kind", SIZES)
def test_a_changed_byte_is_told(kind: str, tmp_path: Path) -> None:
    source, value = make(tmp_path / "source", kind)
    for out in (prune(source, tmp_path / "0", value), quantize(source, tmp_path / "1", value, "compressed-tensors")):
        tensors = read_checkpoint(out)
        for last in ("weight", "weight_packed", "weight_scale", "down_proj"):
            for name in [n for n in tensors if ".experts." in n and n.endswith(last)][-1:]:
                raw = tensors[name]
                data = bytes([*raw.data[:-1], raw.data[-1] ^ 1])
                rewrite(out, {**tensors, name: (raw.dtype, raw.shape, data)})
                (problem,) = found(out, source)
                assert problem.where.rpartition(".")[0] == name.rpartition(".")[0]


@pytest.mark.parametrize(("kind", "key"), [("deepseek_v3", "n_shared_experts"), ("mixtral", "intermediate_size")])
def test_numbers_of_the_config_are_those_of_what_stays(kind: str, key: str, tmp_path: Path) -> None:
    source, value = make(tmp_path / "source", kind)
    out = prune(source, tmp_path / "out", value)
    before = json.loads((source / "config.json").read_text())[key]
    edit_json(out / "config.json", lambda config: config.update({key: before}))
    (problem,) = found(out, source)
    assert problem.where == "config.json"
    assert problem.message.startswith(f"{key} is {before}, but ")


# -- what cannot be derived ------------------------------------------------------------------------------------------


def without_a_layer(width: dict[str, Any]) -> None:
    del width["kept"]["1"]


def of_more(width: dict[str, Any]) -> None:
    width["of"] = 128


def a_bit_more(width: dict[str, Any]) -> None:
    width["kept"]["1"][0] = text(list(range(33)), OF)


def no_base64(width: dict[str, Any]) -> None:
    width["kept"]["1"][0] = "?"


def more_than_there_are(width: dict[str, Any]) -> None:
    width["channels"] = 65


def no_count(width: dict[str, Any]) -> None:
    del width["channels"]


def fewer_lists(width: dict[str, Any]) -> None:
    width["kept"]["1"].pop()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without_a_layer, "width.kept, layer 1: channels of 0 experts, but 4 are kept"),
        (fewer_lists, "width.kept, layer 1: channels of 3 experts, but 4 are kept"),
        (of_more, "width.kept, layer 0, expert 0: no bitmap of 32 of 128 channels"),
        (a_bit_more, "width.kept, layer 1, expert 0: no bitmap of 32 of 64 channels"),
        (no_base64, "Only base64 data is allowed"),
        (more_than_there_are, "width: 65 channels of 64"),
        (no_count, "no 'channels' where it is expected"),
    ],
)
def test_a_record_that_does_not_lead_to_channels_is_told(
    change: Callable[[dict[str, Any]], None], why: str, tmp_path: Path
) -> None:
    source, value = make(tmp_path / "source", "qwen3_moe")
    out = prune(source, tmp_path / "out", value)
    edit_json(out / "shardxform.json", lambda record: change(record["inputs"]["manifest"]["width"]))
    assert underivable(out, source) == why
    report = verify(out, source=source, independent=True)
    assert (report.sound, report.rederived) == (False, 0)


def test_a_source_of_another_width_or_with_rows_that_take_turns_is_told(tmp_path: Path) -> None:
    source, value = make(tmp_path / "source", "qwen3_moe")
    out = prune(source, tmp_path / "out", value)
    config, tensors = tiny("qwen3_moe", **{**SIZES["qwen3_moe"], "moe_intermediate_size": 96})
    wider = write_checkpoint(tmp_path / "wider", tensors, config)
    assert underivable(out, wider).endswith(".down_proj.weight: 96 channels, but the manifest is of experts of 64")
    config, tensors = tiny("gpt_oss")
    turns = write_checkpoint(tmp_path / "turns", tensors, config)
    assert (
        underivable(out, turns) == "width: rows of gate and up projection take turns in gpt_oss, which is not derived"
    )
    (out / "shardxform.json").unlink()
    assert {p.message.split(",")[0] for p in found(out, source, manifest={"keep": value["keep"]})} >= {"shape [32"}


def test_rows_and_columns_of_a_run_are_those_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows are in memory."""
    source, value = make(tmp_path / "source", "deepseek_v3")
    out = quantize(source, tmp_path / "out", value, "compressed-tensors")
    monkeypatch.setattr(definitions, "_RUN", 100)
    assert found(out, source) == []
