"""`convert` end to end: other formats byte for byte those of `quantize`, refusals, crashes, values.

Dequantized values are compared with `values_of`, which unpacks code by code from the stored words and rounds to
bfloat16 or float16 by arithmetic on float64, and shares nothing with the package.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, bf16, read_checkpoint, tiny, write_checkpoint
from click.testing import CliRunner
from faults import Counting, Crashing, Failing, Short, forked, sampled
from strategies import picked
from test_prune import manifest_of
from test_quantize import KIND_SIZES, make, without_record
from test_run import looks_complete, tree

from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError, ExecutionError, FamilyError, SchemeError, ShardxformError
from shardxform.execution.runner import RunOptions, run
from shardxform.formats import dialects, plain
from shardxform.formats.encoding import Cut
from shardxform.formats.plain import Plain
from shardxform.formats.scheme import Grid, Scheme
from shardxform.formats.stored import read_stored, scan_stored
from shardxform.plan import plan as plan_module
from shardxform.plan.convert import ConvertOptions, Target, plan_convert
from shardxform.plan.plan import Plan
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.steps import Transcode
from shardxform.plan.view import ViewOptions

SHARD_BYTES = 150_000
SPELLINGS: tuple[tuple[Any, Any], ...] = (
    ("auto-round", "split"),
    ("compressed-tensors", "split"),
    ("gptq", "fused-indexed"),
    ("auto-round", "fused-indexed"),
    ("gptq", "split"),
)
KINDS = sorted(KIND_SIZES)
GRIDS = ((4, 32), (4, -1), (8, 32), (8, -1))
PREFIX = "model.layers.1."
EXPERT = PREFIX + "mlp.experts.2.gate_proj."


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many steps and tiles, though the checkpoints are tiny."""
    monkeypatch.setattr(plan_module, "STEP_BYTES", 100_000)
    monkeypatch.setattr(plain, "DECODE_TILE", 640)


def quantize(source: Path, out: Path, format_: Any = "auto-round", names: Any = "split", **over: Any) -> Path:
    grid = Grid(
        **{
            "group_size": 32,
            **{key: over.pop(key) for key in ("bits", "group_size", "scale_grid", "search") if key in over},
        }
    )
    scheme = Scheme(grid=grid, format=format_, expert_names=names, **over)
    run(plan_quantize(Checkpoint.open(source), scheme, None, ViewOptions(max_shard_bytes=SHARD_BYTES)), out)
    return out


def plan_of(source: Path, to: Any, names: Any = "split", g_idx: bool = False) -> Plan:
    target = Target(format=to, expert_names=names, g_idx=g_idx)
    return plan_convert(Checkpoint.open(source), target, ConvertOptions(max_shard_bytes=SHARD_BYTES))


def converted(source: Path, out: Path, to: Any, names: Any = "split", *, g_idx: bool = False, jobs: int = 2) -> Path:
    run(plan_of(source, to, names, g_idx), out, RunOptions(jobs=jobs))
    return out


def edited(root: Path, out: Path, tensors: Mapping[str, Raw | None] | None = None, **quantization: Any) -> Path:
    """A copy in one shard, tensors and keys of quantization_config replaced, or left out where None."""
    merged = {name: t for name, t in {**read_checkpoint(root), **(tensors or {})}.items() if t is not None}
    config = json.loads((root / "config.json").read_text())
    fields = {**config["quantization_config"], **quantization}
    config["quantization_config"] = {key: value for key, value in fields.items() if value is not None}
    return write_checkpoint(out, merged, config)


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A small quantized checkpoint of a family with per-expert names."""
    return quantize(make(tmp_path / "source", "qwen3_moe"), tmp_path / "quantized")


# -- formats and spellings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
@pytest.mark.parametrize("kind", picked(KINDS, 2))
def test_converting_equals_quantizing_to_that_format(kind: str, bits: int, group_size: int, tmp_path: Path) -> None:
    """Round and round: every format and spelling is made from the one before it."""
    source = make(tmp_path / "source", kind)
    direct = [
        quantize(source, tmp_path / f"direct{i}", *to, bits=bits, group_size=group_size)
        for i, to in enumerate(SPELLINGS)
    ]
    at = direct[0]
    for i, to in enumerate((*SPELLINGS[1:], SPELLINGS[0])):
        at = converted(at, tmp_path / f"made{i}", *to)
        assert without_record(at) == without_record(direct[SPELLINGS.index(to)])


@pytest.mark.parametrize("before", SPELLINGS, ids=str)
def test_every_pair_of_formats_and_spellings(before: tuple[Any, Any], tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_6_moe")
    first = quantize(source, tmp_path / "first", *before)
    for i, to in enumerate(SPELLINGS):
        if to == before:
            with pytest.raises(SchemeError, match="nothing to convert"):
                plan_of(first, *to)
            continue
        made = converted(first, tmp_path / f"made{i}", *to)
        assert without_record(made) == without_record(quantize(source, tmp_path / f"direct{i}", *to))
        assert without_record(converted(made, tmp_path / f"back{i}", *before)) == without_record(first)


def test_scales_exact_in_bfloat16_become_bfloat16_and_back(tmp_path: Path) -> None:
    """The record says that they are exact; it outlives a conversion. Without it float16 stays float16."""
    source = make(tmp_path / "source")
    first = quantize(source, tmp_path / "first", scale_grid="bf16", search=True)
    direct = quantize(source, tmp_path / "direct", "compressed-tensors", scale_grid="bf16", search=True)
    gptq = converted(first, tmp_path / "gptq", "gptq")
    made = converted(gptq, tmp_path / "made", "compressed-tensors")
    assert without_record(made) == without_record(direct)
    assert any(t.dtype == "BF16" for name, t in read_checkpoint(made).items() if name.endswith("weight_scale"))
    (made / "shardxform.json").unlink()
    assert without_record(converted(made, tmp_path / "back", "auto-round")) == without_record(first)
    (first / "shardxform.json").write_text("[")
    half = read_checkpoint(converted(first, tmp_path / "half", "compressed-tensors"))
    assert {t.dtype for name, t in half.items() if name.endswith("weight_scale")} == {"F16"}


def test_a_record_that_promises_bfloat16_scales_is_not_believed(tmp_path: Path) -> None:
    """Searched scales are no bfloat16; plain ones of bfloat16 weights are, being an eighth of a weight."""
    made = make(tmp_path / "source", "qwen3_moe")
    quantized = quantize(made, tmp_path / "quantized", search=True, scale_grid="fp16")
    record = json.loads((quantized / "shardxform.json").read_text())
    record["inputs"]["scheme"]["grid"]["scale_grid"] = "bf16"
    (quantized / "shardxform.json").write_text(json.dumps(record))
    with pytest.raises(ExecutionError, match=r"tensor '.*scales': scale .* the target's BF16 cannot hold it exactly"):
        converted(quantized, tmp_path / "out", "compressed-tensors")
    assert not looks_complete(tmp_path / "out")


@pytest.mark.parametrize("value", [2.0**20, 2.0**-26, 1 + 2.0**-7 + 2.0**17], ids=["large", "tiny", "long"])
def test_a_bfloat16_scale_that_float16_cannot_hold_is_refused(value: float, tmp_path: Path) -> None:
    source = quantize(make(tmp_path / "source", "qwen3_moe"), tmp_path / "q", "compressed-tensors", scale_grid="bf16")
    name = EXPERT + "weight_scale"
    scales = read_checkpoint(source)[name].float32().copy()
    scales[3, 1] = value
    bad = edited(source, tmp_path / "bad", {name: bf16(scales)})
    with pytest.raises(ExecutionError, match=rf"tensor '{name}': scale .* at \[3, 1\] is stored as BF16"):
        converted(bad, tmp_path / "out", "gptq")
    converted(bad, tmp_path / "bf16", "bf16")


def test_g_idx_is_written_checked_and_dropped(quantized: Path, tmp_path: Path) -> None:
    with_index = converted(quantized, tmp_path / "with", "gptq", g_idx=True)
    found = read_checkpoint(with_index)[EXPERT + "g_idx"].array()
    assert found.tolist() == [column // 32 for column in range(64)]
    direct = quantize(tmp_path / "source", tmp_path / "direct", "gptq", g_idx=True)
    assert without_record(with_index) == without_record(direct)
    without = converted(with_index, tmp_path / "without", "gptq")
    assert read_checkpoint(without) == read_checkpoint(quantized)


@pytest.fixture
def mtp_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantize MTP weights as upstream does, which our own command refuses."""
    monkeypatch.setattr(dialects, "_refuse_unrunnable", lambda *_: None)


@pytest.mark.usefixtures("mtp_allowed")
def test_modules_outside_the_decoder_blocks_come_along(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    also = ("lm_head", "mtp.*_proj*", "mtp.fc")
    gate = ("mtp.*shared_expert_gate",)
    first = quantize(source, tmp_path / "first", quantize=also, keep_16bit=gate)
    assert "mtp.fc.qweight" in read_checkpoint(first)
    older = converted(first, tmp_path / "older", "auto-round", "fused-indexed")
    direct = quantize(source, tmp_path / "direct", "auto-round", "fused-indexed", quantize=also, keep_16bit=gate)
    assert without_record(older) == without_record(direct)
    assert without_record(converted(older, tmp_path / "back", "auto-round")) == without_record(first)


def test_a_layer_kept_in_16_bits_stays_byte_for_byte(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    kept = ("*.layers.0.mlp.experts.*", "*.layers.1.linear_attn.*")
    first = quantize(source, tmp_path / "first", keep_16bit=kept)
    direct = quantize(source, tmp_path / "direct", "compressed-tensors", keep_16bit=kept)
    made = converted(first, tmp_path / "made", "compressed-tensors")
    assert without_record(made) == without_record(direct)
    before, after = read_checkpoint(source), read_checkpoint(converted(first, tmp_path / "bf16", "bf16"))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert after[name] == before[name]


def test_only_quantization_config_changes_and_sidecars_come_along(quantized: Path, tmp_path: Path) -> None:
    config = json.loads((quantized / "config.json").read_text())
    moved = {"quantization_config": config.pop("quantization_config"), **config}
    (quantized / "config.json").write_text(json.dumps(moved))
    made = json.loads((converted(quantized, tmp_path / "gptq", "gptq") / "config.json").read_text())
    assert list(made) == list(moved)
    assert {key: value for key, value in made.items() if key != "quantization_config"} == config
    plain = converted(quantized, tmp_path / "bf16", "bf16")
    assert json.loads((plain / "config.json").read_text()) == config
    assert (plain / "tokenizer.json").read_text() == "{}"


# -- values -----------------------------------------------------------------------------------------------------


def values_of(tensors: Mapping[str, Raw], module: str, bits: int, group_size: int) -> np.ndarray:
    """float64 values [O, I] of a stored module, of either layout."""
    if f"{module}.qweight" in tensors:
        words, scales = tensors[f"{module}.qweight"].array().T, tensors[f"{module}.scales"].float32().T
    else:
        words, scales = tensors[f"{module}.weight_packed"].array(), tensors[f"{module}.weight_scale"].float32()
    rows, columns = words.shape[0], words.shape[1] * 32 // bits
    out = np.empty((rows, columns))
    for column in range(columns):
        at = column * bits
        code = (words[:, at // 32].astype(np.int64) >> (at % 32)) & (2**bits - 1)
        group = 0 if group_size == -1 else column // group_size
        out[:, column] = (code - 2 ** (bits - 1)) * scales[:, group].astype(np.float64)
    return out


def as_bf16(values: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, as float64; within the range of normal numbers."""
    _, exponent = np.frexp(values)
    unit = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    return np.rint(values / unit) * unit


@pytest.mark.parametrize(("bits", "group_size"), GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_weights_are_the_stored_values_rounded_once(
    kind: str, bits: int, group_size: int, tmp_path: Path
) -> None:
    to = SPELLINGS[(KINDS.index(kind) + GRIDS.index((bits, group_size))) % len(SPELLINGS)]
    source = make(tmp_path / "source", kind)
    stored_at = quantize(source, tmp_path / "q", *to, bits=bits, group_size=group_size)
    stored, before = read_checkpoint(stored_at), read_checkpoint(source)
    after = read_checkpoint(converted(stored_at, tmp_path / "bf16", "bf16"))
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {
        name: (t.dtype, t.shape) for name, t in before.items()
    }
    stems = {name.rsplit(".", 1)[0] for name in stored if name.endswith((".qweight", ".weight_packed"))}
    assert stems
    for stem in stems:
        expected = as_bf16(values_of(stored, stem, bits, group_size))
        np.testing.assert_array_equal(weight_of(after, stem), expected, err_msg=stem)
    for name in stored.keys() & after.keys():
        assert stored[name] == after[name]


def weight_of(tensors: Mapping[str, Raw], stem: str) -> np.ndarray:
    """The weight of a module as stored, wherever a release puts it."""
    if f"{stem}.weight" in tensors:
        return tensors[f"{stem}.weight"].float32()
    parts = stem.split(".")
    expert = next(i for i, part in enumerate(parts) if part == "experts") + 1
    projection = parts[-1] if parts[expert].isdigit() else parts[expert]
    number = int(parts[expert] if parts[expert].isdigit() else parts[-1])
    prefix = ".".join(parts[:expert])
    if f"{prefix}.down_proj" not in tensors:  # one tensor per expert
        names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        return np.concatenate([tensors[f"{prefix}.{number}.{name}.weight"].float32() for name in names])
    if projection in ("down_proj", "gate_up_proj"):
        return tensors[f"{prefix}.{projection}"].float32()[number]
    gate, up = np.split(tensors[f"{prefix}.gate_up_proj"].float32()[number], 2)
    return gate if projection == "gate_proj" else up


def as_half(values: np.ndarray) -> np.ndarray:
    """Nearest float16, ties to even, as float64; of what does not overflow."""
    _, exponent = np.frexp(values)
    unit = np.ldexp(1.0, np.maximum(exponent - 11, -24))
    return np.rint(values / unit) * unit


def halved(stored_at: Path, out: Path) -> tuple[dict[str, Raw], dict[str, Raw]]:
    """A checkpoint, and what it becomes in float16."""
    return read_checkpoint(stored_at), read_checkpoint(converted(stored_at, out, "fp16"))


@pytest.mark.parametrize(("bits", "scale_grid"), [(4, "bf16"), (4, "fp16"), (8, "bf16")])
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_float16_holds_weights_of_4_bits_exactly_and_others_rounded_once(
    kind: str, bits: int, scale_grid: str, tmp_path: Path
) -> None:
    exact = (bits, scale_grid) == (4, "bf16")
    source = make(tmp_path / "source", kind)
    to = "compressed-tensors" if exact else "gptq"
    made = quantize(source, tmp_path / "q", to, bits=bits, scale_grid=scale_grid, search=not exact)
    stored, after = halved(made, tmp_path / "out")
    stems = {name.rsplit(".", 1)[0] for name in stored if name.endswith((".qweight", ".weight_packed"))}
    rounded = 0
    for stem in stems:
        values = values_of(stored, stem, bits, 32)
        np.testing.assert_array_equal(weight_of(after, stem), as_half(values), err_msg=stem)
        rounded += int((as_half(values) != values).sum())
    assert (rounded == 0) is exact
    before = read_checkpoint(source)
    assert {name: t.shape for name, t in after.items()} == {name: t.shape for name, t in before.items()}
    assert {name for name, t in after.items() if t.dtype != "F16"} == stored.keys() & after.keys()
    assert all(after[name] == stored[name] for name in stored.keys() & after.keys())
    note = plan_of(made, "fp16").notes[0]
    assert note.endswith("each integer times its scale, exactly") is exact
    assert ("rounded to its 11 significant bits" in note) is not exact
    assert plan_of(made, "bf16").notes[0].endswith("`target.format` fp16 holds them exactly") is exact


def test_float16_is_what_config_says_then(quantized: Path, tmp_path: Path) -> None:
    """By whichever name it is said; a client that went by the old one would round to bfloat16 what is exact."""
    for number, key in enumerate(("dtype", "torch_dtype", None)):
        config = json.loads((quantized / "config.json").read_text())
        config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
        (quantized / "config.json").write_text(json.dumps({**config, **({key: "bfloat16"} if key else {})}))
        made = json.loads((converted(quantized, tmp_path / str(number), "fp16") / "config.json").read_text())
        del config["quantization_config"]
        assert made == {**config, key or "dtype": "float16"}


@pytest.mark.parametrize(
    ("scale", "row"),
    [
        (2.0**13, r"row 3, column \d+ stands for -?[\d.]+, which float16 cannot hold; use `target.format` bf16"),
        (2.0**-27, "exactly"),
    ],
    ids=["overflow", "underflow"],
)
def test_a_value_that_float16_cannot_hold_is_refused(scale: float, row: str, tmp_path: Path) -> None:
    """Scales that our own rounding never takes: 65536 is beyond float16, 2^-27 below its last bit."""
    source = quantize(make(tmp_path / "source", "qwen3_moe"), tmp_path / "q", "compressed-tensors")
    name = EXPERT + "weight_scale"
    scales = read_checkpoint(source)[name].float32().copy()
    scales[3, 1] = scale
    words = read_checkpoint(source)[EXPERT + "weight_packed"].array().copy()
    words[3, 4:] = 0  # the lowest code, -8
    packed = Raw("I32", words.shape, words.tobytes())
    bad = edited(source, tmp_path / "bad", {name: bf16(scales), EXPERT + "weight_packed": packed})
    value = {2.0**13: "-65536.0", 2.0**-27: "-5.96"}[scale]
    if scale < 1:  # -8 * 2^-27 is the smallest float16 of all, and -7 * 2^-27 is none
        words[3, 4] = 1
        bad = edited(bad, tmp_path / "odd", {EXPERT + "weight_packed": Raw("I32", words.shape, words.tobytes())})
        value = "-5.2"
    with pytest.raises(ExecutionError, match=row) as caught:
        converted(bad, tmp_path / "out", "fp16")
    assert f"tensor '{EXPERT[:-1]}': row 3, column 32 stands for {value}" in str(caught.value)
    assert not looks_complete(tmp_path / "out")
    converted(bad, tmp_path / "bf16", "bf16")


def test_float16_that_is_rounded_must_not_overflow_either(tmp_path: Path) -> None:
    source = quantize(make(tmp_path / "source", "qwen3_moe"), tmp_path / "q", "gptq", bits=8)
    name = EXPERT + "scales"
    scales = read_checkpoint(source)[name].array().copy()
    scales[0, 0] = np.float16(-1000).view(scales.dtype)
    bad = edited(source, tmp_path / "bad", {name: Raw("F16", scales.shape, scales.tobytes())})
    with pytest.raises(ExecutionError, match=r"row 0, column \d+ stands for -?\d+\.0, which float16 cannot hold; use"):
        converted(bad, tmp_path / "out", "fp16")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("qwen3_5", "qwen3_6"))])
def test_float16_is_refused_where_it_overflows_while_the_model_runs(kind: str, tmp_path: Path) -> None:
    made = quantize(make(tmp_path / "source", kind), tmp_path / "q")
    with pytest.raises(SchemeError, match=r"gated delta-net layers of family qwen3_5_moe; use bf16"):
        plan_of(made, "fp16")
    assert not any("fp16" in note for note in plan_of(made, "bf16").notes)


def test_a_fused_tensor_is_written_slab_by_slab(quantized: Path, tmp_path: Path) -> None:
    source = quantize(make(tmp_path / "fused"), tmp_path / "q")
    steps = [step for step in plan_of(source, "bf16").steps if isinstance(step, Transcode)]
    assert len(steps) > 5
    items = [item for step in steps for item in step.items]
    slabs = [source for item in items if ".experts." in item.module for source in item.sources]
    assert [source.shape[0] * source.shape[1] for source in slabs] == [32 * 64] * (4 * 8 * 3)
    assert {item.target for item in items} == {Plain("BF16")}
    assert plan_of(quantized, "bf16").notes[1].startswith("this cannot be undone")


# -- bytes depend on inputs alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["compressed-tensors", "bf16"])
def test_bytes_are_the_same_whatever_jobs_steps_and_short_calls(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantize(make(tmp_path / "source"), tmp_path / "q", "gptq", "fused-indexed")
    reference = without_record(converted(source, tmp_path / "a", to, jobs=1))
    assert without_record(converted(source, tmp_path / "b", to, jobs=3)) == reference
    monkeypatch.setattr(plan_module, "STEP_BYTES", 1_000)
    monkeypatch.setattr(plain, "DECODE_TILE", 1)
    run(plan_of(source, to), tmp_path / "c", fs=Short())
    assert without_record(tmp_path / "c") == reference


@pytest.mark.usefixtures("mtp_allowed")
def test_bytes_do_not_depend_on_how_the_source_is_sharded(tmp_path: Path) -> None:
    source = quantize(make(tmp_path / "source"), tmp_path / "q", quantize=("lm_head", "mtp.*_proj*"))
    tensors = read_checkpoint(source)
    config = json.loads((source / "config.json").read_text())
    shuffled = dict(sorted(tensors.items(), key=lambda item: item[0][::-1]))
    other = write_checkpoint(tmp_path / "other", shuffled, config, shards=["z.safetensors", "a.safetensors"])
    for to in ("auto-round", "bf16"):
        names: Any = "fused-indexed" if to == "auto-round" else "split"
        ours = without_record(converted(source, tmp_path / f"a-{to}", to, names))
        theirs = without_record(converted(other, tmp_path / f"b-{to}", to, names))
        assert {name: data for name, data in ours.items() if name != "tokenizer.json"} == theirs


def test_steps_read_every_stored_byte_and_tile_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = quantize(make(tmp_path / "source"), tmp_path / "q", "gptq", "fused-indexed")
    monkeypatch.setattr(plan_module, "STEP_BYTES", 1 << 30)
    plan = plan_of(source, "auto-round")
    reads = sorted((r.file, r.offset, r.length) for step in plan.steps for r in step.reads)
    assert len(set(reads)) == len(reads)
    assert sum(length for *_, length in reads) == Checkpoint.open(source).nbytes
    plan.check()


@pytest.mark.crash
@pytest.mark.parametrize("to", picked(["compressed-tensors", "bf16"], 2))
def test_a_crash_at_any_effect_ends_with_the_same_bytes(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "STEP_BYTES", 20_000)
    source = quantize(make(tmp_path / "source"), tmp_path / "q", "auto-round", "fused-indexed")
    plan = plan_of(source, to)
    counting = Counting()
    run(plan, tmp_path / "reference", RunOptions(jobs=1), fs=counting)
    reference = tree(tmp_path / "reference")
    for k in sampled(counting.effects, step=29, ends=4):
        out = tmp_path / f"out{k}"
        crashing = functools.partial(run, plan, out, RunOptions(jobs=1), fs=Crashing(k))
        assert forked(crashing) == 9
        if out.exists() and looks_complete(out):
            assert {name: data for name, data in tree(out).items() if name in reference} == reference
        run(plan, out)
        assert tree(out) == reference, f"effect {k}"


def test_an_error_at_any_effect_is_reported_and_resumed(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "STEP_BYTES", 20_000)
    plan = plan_of(quantized, "gptq", "fused-indexed")
    counting = Counting()
    run(plan, tmp_path / "reference", RunOptions(jobs=1), fs=counting)
    resumed = 0
    for k in sampled(counting.effects, step=29, ends=3):
        out = tmp_path / f"out{k}"
        with pytest.raises(ShardxformError):
            run(plan, out, RunOptions(jobs=1), fs=Failing(k))
        resumed += run(plan, out).resumed_bytes
        assert tree(out) == tree(tmp_path / "reference"), f"effect {k}"
    assert resumed


# -- refusals ---------------------------------------------------------------------------------------------------


def like(raw: Raw, *shape: int, dtype: str = "") -> Raw:
    """Zeros of another shape or dtype."""
    width = {"I32": 4, "F16": 2, "BF16": 2, "I64": 8, "F32": 4}[dtype or raw.dtype]
    return Raw(dtype or raw.dtype, shape or raw.shape, bytes(int(np.prod(shape or raw.shape)) * width))


SINGLE: dict[str, tuple[str, Callable[[Raw], Raw | None], str]] = {
    "missing qzeros": ("qzeros", lambda _: None, "qzeros' is missing; qweight, scales of the same weight"),
    "missing scales": ("scales", lambda _: None, "scales' is missing"),
    "missing words": ("qweight", lambda _: None, "qweight' is missing"),
    "transposed words": (
        "qweight",
        lambda t: like(t, *t.shape[::-1]),
        r"qweight': I32 \[32, 8\], expected I32 \[8, 32\]",
    ),
    "other words": ("qweight", lambda t: like(t, 8, 16), r"expected I32 \[8, 32\] for a weight \[32, 64\] in 4 bits"),
    "flat words": ("qweight", lambda t: like(t, 256), r"qweight': I32 \[256\]"),
    "scales in bf16": ("scales", lambda t: like(t, dtype="BF16"), r"scales': BF16 \[2, 32\], expected F16 \[2, 32\]"),
    "scales in f32": ("scales", lambda t: like(t, dtype="F32"), "scales': F32"),
    "one group": ("scales", lambda t: like(t, 1, 32), r"scales': F16 \[1, 32\], expected F16 \[2, 32\]"),
    "unpacked zeros": ("qzeros", lambda t: like(t, 2, 32), r"qzeros': I32 \[2, 32\], expected I32 \[2, 4\]"),
    "short g_idx": ("g_idx", lambda t: like(t, 32, dtype="I32"), r"g_idx': I32 \[32\], expected I32 \[64\]"),
    "zero point": ("weight_zero_point", lambda t: t, "asymmetric"),
    "input scale": ("input_scale", lambda t: t, "no part of a weight in auto-round"),
    "row words": ("weight_packed", lambda t: t, "no part of a weight in auto-round"),
    "16-bit weight": ("weight", lambda t: like(t, 32, 64, dtype="BF16"), "in 16 bits beside its quantized parts"),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_module_that_is_not_whole_is_refused_naming_the_tensor(case: str, quantized: Path, tmp_path: Path) -> None:
    last, change, message = SINGLE[case]
    tensors = read_checkpoint(quantized)
    old = tensors.get(EXPERT + last, tensors[EXPERT + "scales"])
    bad = edited(quantized, tmp_path / "bad", {EXPERT + last: change(old)})
    for to in ("gptq", "bf16"):
        with pytest.raises(CheckpointError, match=message) as caught:
            plan_of(bad, to)
        assert EXPERT + last in str(caught.value)


def test_everything_wrong_is_listed(quantized: Path, tmp_path: Path) -> None:
    bad = edited(quantized, tmp_path / "bad", {EXPERT + "qzeros": None, PREFIX + "self_attn.q_proj.scales": None})
    stored, errors = scan_stored(Checkpoint.open(bad))
    assert sorted(str(e).split("'")[1] for e in errors) == [EXPERT + "qzeros", PREFIX + "self_attn.q_proj.scales"]
    assert EXPERT.rstrip(".") not in stored.modules


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "other bits": ({"bits": 8}, r"qweight': I32 .*, expected I32 .* in 8 bits"),
    "other groups": ({"group_size": 64}, r"I32 \[2, 4\], expected I32 \[1, 4\] .* groups of 64"),
    "three bits": ({"bits": 3}, "bits 3, expected 4 or 8"),
    "odd bits": ({"bits": 4.0}, "malformed|bits 4.0"),
    "odd groups": ({"group_size": 16}, r"I32 \[1, 8\], expected I32 \[2, 8\] .* groups of 16"),
    "asymmetric": ({"sym": False}, "with zero points.* which symmetric integers of one scheme do not hold"),
    "awq": ({"quant_method": "awq"}, "expected 'gemm' with zero_point true"),
    "fp8": ({"quant_method": "fp8"}, "quant_method 'fp8'"),
    "awq packing": ({"packing_format": "auto_round:auto_awq"}, "4 columns are no groups of 32"),
    "no method": ({"quant_method": None}, "quant_method None"),
    "float data": ({"data_type": "mx_fp"}, "data_type 'mx_fp'"),
    "activations": ({"act_bits": 8}, "act_bits 8"),
    "mixed bits": ({"extra_config": {"lm_head": {"bits": 8}}}, "which symmetric integers of one scheme do not hold"),
    "mixed groups": ({"extra_config": {"x": {"bits": 4, "group_size": 64}}}, "32 columns are no groups of 64"),
    "malformed": ({"extra_config": ["lm_head"]}, "malformed"),
    "bad pattern": ({"extra_config": {"(": {"bits": 16}}}, "no regular expression"),
    "act-order": ({"quant_method": "gptq", "desc_act": True}, "of one scheme do not hold"),
    "gptq_v2": (
        {"quant_method": "gptq", "desc_act": False, "checkpoint_format": "gptq_v2"},
        "of one scheme do not hold",
    ),
    "dynamic bits": (
        {"quant_method": "gptq", "desc_act": False, "dynamic": {"+:.*down.*": {"bits": 8}}},
        "16 columns are no groups of 32",
    ),
    "row format": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        "one config group",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_is_not_supported_is_refused_before_anything_is_written(
    case: str, quantized: Path, tmp_path: Path
) -> None:
    fields, message = CONFIGS[case]
    bad = edited(quantized, tmp_path / "bad", **fields)
    result = CliRunner().invoke(main, ["convert", str(bad), str(tmp_path / "out"), "--to", "compressed-tensors"])
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    with pytest.raises((SchemeError, CheckpointError), match=message):
        plan_of(bad, "compressed-tensors")
    assert not (tmp_path / "out").exists()


ROW_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "act-order": ({"actorder": "group"}, {}, "of one scheme do not hold"),
    "asymmetric": ({"symmetric": False}, {}, "weight_zero_point' is missing"),
    "float": ({"type": "float"}, {}, r"weight_packed': I32 .*, expected U8"),
    "channels in groups": ({"strategy": "channel"}, {}, "strategy 'channel' with groups of 32"),
    "blocks": ({"strategy": "block"}, {}, "strategy 'block'"),
    "odd groups": ({"group_size": "x"}, {}, "group_size: expected columns of a group"),
    "key cache": ({}, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    "rotations": ({}, {"transform_config": {"config_groups": {}}}, "transform_config"),
    "activations": ({}, {"group": {"input_activations": {"num_bits": 8}}}, "input_activations"),
    "sparse": ({}, {"sparsity_config": {"format": "dense"}}, "sparsity_config"),
}


@pytest.mark.parametrize("case", ROW_CONFIGS)
def test_what_compressed_tensors_can_say_beyond_one_scheme_is_refused(case: str, tmp_path: Path) -> None:
    source = quantize(make(tmp_path / "source", "qwen3_moe"), tmp_path / "q", "compressed-tensors")
    weights, fields, message = (dict(ROW_CONFIGS[case][0]), dict(ROW_CONFIGS[case][1]), ROW_CONFIGS[case][2])
    config = json.loads((source / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    group["weights"] |= weights
    group |= fields.pop("group", {})
    bad = edited(source, tmp_path / "bad", **{**config, **fields})
    with pytest.raises((SchemeError, CheckpointError), match=message):
        plan_of(bad, "gptq")


def test_two_spellings_in_one_layer_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe")
    split = quantize(source, tmp_path / "split")
    older = read_checkpoint(quantize(source, tmp_path / "older", "auto-round", "fused-indexed"))
    stems = [PREFIX + "mlp.experts.2.gate_proj.", PREFIX + "mlp.experts.2.up_proj."]
    changes: dict[str, Raw | None] = {stem + last: None for stem in stems for last in ("qweight", "qzeros", "scales")}
    moved = {name: t for name, t in older.items() if name.startswith(PREFIX + "mlp.experts.gate_up_proj.2.")}
    assert len(moved) == 3
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts: two spellings of experts in one layer"):
        plan_of(edited(split, tmp_path / "bad", {**changes, **moved}), "gptq")


def test_layers_that_differ_in_spelling_are_brought_to_one(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3_moe")
    split, older = (quantize(source, tmp_path / n, "auto-round", n) for n in ("split", "fused-indexed"))
    mixed = {name: t for name, t in read_checkpoint(split).items() if not name.startswith(PREFIX + "mlp.experts.")}
    mixed |= {name: t for name, t in read_checkpoint(older).items() if name.startswith(PREFIX + "mlp.experts.")}
    config = json.loads((split / "config.json").read_text())
    both = write_checkpoint(tmp_path / "both", mixed, config)
    for names, wanted in (("split", split), ("fused-indexed", older)):
        made = converted(both, tmp_path / f"made-{names}", "auto-round", names)
        assert read_checkpoint(made) == read_checkpoint(wanted)


def test_an_expert_that_is_missing_too_many_or_16_bit_is_refused(quantized: Path, tmp_path: Path) -> None:
    tensors = read_checkpoint(quantized)
    of_one = {name: t for name, t in tensors.items() if ".layers.1.mlp.experts.5." in name}
    with pytest.raises(FamilyError, match=r"experts\.5\.gate_proj\.weight' is missing"):
        plan_of(edited(quantized, tmp_path / "few", dict.fromkeys(of_one)), "gptq")
    more = {name.replace("experts.5", "experts.6"): t for name, t in of_one.items()}
    with pytest.raises(FamilyError, match="one the config does not allow for"):
        plan_of(edited(quantized, tmp_path / "many", more), "bf16")
    plain = read_checkpoint(tmp_path / "source")
    changes = {**dict.fromkeys(of_one), **{name: plain[name] for name in plain if ".layers.1.mlp.experts.5." in name}}
    with pytest.raises(CheckpointError, match="experts of one layer must be stored alike"):
        plan_of(edited(quantized, tmp_path / "mixed", changes), "gptq")


def test_a_quantized_router_is_refused_unless_dequantized(tmp_path: Path) -> None:
    """32 experts, so that the router's rows fill words."""
    config, tensors = tiny("qwen3_moe", **KIND_SIZES["qwen3_moe"], num_experts=32)
    source = write_checkpoint(tmp_path / "many", tensors, config)
    first = quantize(source, tmp_path / "q")
    stem = PREFIX + "mlp.gate"
    donor = read_checkpoint(first)
    router = {f"{stem}.{last}": donor[f"{EXPERT}{last}"] for last in ("qweight", "qzeros", "scales")}
    bad = edited(first, tmp_path / "bad", {**router, f"{stem}.weight": None})
    with pytest.raises(SchemeError, match=r"mlp\.gate\.weight' is quantized, but no client runs a quantized router"):
        plan_of(bad, "gptq")
    plan = plan_of(bad, "bf16")
    assert any("declares model.layers.1.mlp.gate 16-bit, but it is stored in 4 bits" in note for note in plan.notes)


def test_a_quantized_tensor_that_the_family_does_not_know_is_refused(quantized: Path, tmp_path: Path) -> None:
    donor = read_checkpoint(quantized)
    extra = {f"{PREFIX}adapter.{last}": donor[EXPERT + last] for last in ("qweight", "qzeros", "scales")}
    with pytest.raises(CheckpointError, match=r"layers\.1\.adapter\.qweight' is quantized, but unknown to family"):
        plan_of(edited(quantized, tmp_path / "bad", extra), "bf16")


def test_what_is_not_quantized_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    with pytest.raises(SchemeError, match=r"/source/config\.json: no quantization_config: the source is not"):
        plan_of(source, "gptq")
    config = json.loads((source / "config.json").read_text())
    declared = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    config["text_config"]["quantization_config"] = declared
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemeError, match="no tensor is quantized"):
        plan_of(source, "auto-round")
    del config["text_config"]["quantization_config"]
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": declared}))
    with pytest.raises(SchemeError, match="no tensor is quantized"):
        plan_of(source, "auto-round")


def test_targets_that_cannot_be_are_refused(quantized: Path) -> None:
    for to in ("bf16", "fp16"):
        with pytest.raises(SchemeError, match=f"{to} has no g_idx"):
            plan_of(quantized, to, g_idx=True)
    with pytest.raises(SchemeError, match="fused-indexed exists in auto-round and gptq"):
        plan_of(quantized, "compressed-tensors", "fused-indexed")
    with pytest.raises(SchemeError, match="`g_idx`: expected `format` gptq"):
        plan_of(quantized, "compressed-tensors", g_idx=True)


DATA: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "gptq_v2 zeros": ("qzeros", lambda a: np.full_like(a, -0x77777778), r"0x88888888 at \[0, 0\], expected 0x77777777"),
    "one zero point": ("qzeros", lambda a: np.where(np.arange(8).reshape(2, 4) == 6, 7, a), r"0x00000007 at \[1, 2\]"),
    "act-order": ("g_idx", lambda a: a[::-1].copy(), "column 0 is in group 1"),
    "one column": ("g_idx", lambda a: np.where(np.arange(64) == 40, 0, a), "column 40 is in group 0"),
    "infinite scale": ("scales", lambda a: np.where(a == a[1, 3], np.inf, a), r"scale inf at \[1, 3\]"),
    "NaN scale": ("scales", lambda a: np.where(a == a[0, 0], np.nan, a), r"scale nan at \[0, 0\]"),
}


@pytest.mark.parametrize("to", [("compressed-tensors", "split"), ("auto-round", "fused-indexed"), ("bf16", "split")])
@pytest.mark.parametrize("case", DATA)
def test_data_that_the_target_cannot_say_is_refused_naming_the_tensor(
    case: str, to: tuple[Any, Any], quantized: Path, tmp_path: Path
) -> None:
    last, change, message = DATA[case]
    source = converted(quantized, tmp_path / "with", "gptq", g_idx=True)
    old = read_checkpoint(source)[EXPERT + last]
    data = change(old.array()).astype(old.array().dtype).tobytes()
    bad = edited(source, tmp_path / "bad", {EXPERT + last: replace(old, data=data)})
    with pytest.raises(ExecutionError, match=message) as caught:
        converted(bad, tmp_path / "out", *to)
    assert f"tensor '{EXPERT}{last}'" in str(caught.value)
    assert not looks_complete(tmp_path / "out")


def test_a_weight_shape_that_lies_is_refused(tmp_path: Path) -> None:
    source = quantize(make(tmp_path / "source", "qwen3_moe"), tmp_path / "q", "compressed-tensors")
    name = EXPERT + "weight_shape"
    bad = edited(source, tmp_path / "bad", {name: Raw("I64", (2,), np.array([64, 32]).tobytes())})
    with pytest.raises(ExecutionError, match=rf"{name}': \[64, 32\], expected the weight's shape \[32, 64\]"):
        converted(bad, tmp_path / "out", "bf16")


# -- stored modules, and the command line -----------------------------------------------------------------------


def test_a_checkpoint_is_read_as_modules(tmp_path: Path) -> None:
    source = quantize(make(tmp_path / "source"), tmp_path / "q", "gptq", "fused-indexed", g_idx=True)
    stored = read_stored(Checkpoint.open(source))
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj.3"
    module = stored.modules[name]
    assert module.shape == (64, 64)
    assert [role for role, _ in module.parts] == ["words", "zeros", "scales", "g_idx"]
    assert (stored.scheme.format, stored.scheme.grid, stored.spellings) == (
        "gptq",
        Grid(group_size=32),
        {"fused-indexed"},
    )
    up = stored.weights["model.language_model.layers.0.mlp.experts.3.up_proj.weight"]
    assert up.spec.shape == (32, 64)
    assert [(source.name, source.cut) for source in up.sources] == [(name, Cut(32, 32))]
    assert up.ranges == ()
    assert not stored.contradictions


@pytest.mark.usefixtures("mtp_allowed")
def test_a_config_that_says_less_than_is_stored_is_reported_and_put_right(tmp_path: Path) -> None:
    """As upstream's model-free mode writes it: MTP weights quantized, though nothing says so."""
    source = make(tmp_path / "source")
    first = quantize(source, tmp_path / "first", quantize=("mtp.*_proj*",))
    quiet = {
        key: item
        for key, item in json.loads((first / "config.json").read_text())["quantization_config"]["extra_config"].items()
        if not key.startswith("mtp.")
    }
    silent = edited(first, tmp_path / "silent", extra_config={**quiet, ".*mtp.*": {"bits": 16, "data_type": "float"}})
    plan = plan_of(silent, "auto-round", "fused-indexed")
    assert any("declares mtp.layers.0." in note and "the new one says what is stored" in note for note in plan.notes)
    run(plan, tmp_path / "out")
    direct = quantize(source, tmp_path / "direct", "auto-round", "fused-indexed", quantize=("mtp.*_proj*",))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (direct / "config.json").read_text()
    )


def test_pruning_a_quantized_source_is_still_refused_in_the_older_spelling(tmp_path: Path) -> None:
    """The names stay unknown to pruning, which would have to slice inside words."""
    source = make(tmp_path / "source")
    older = quantize(source, tmp_path / "older", "auto-round", "fused-indexed")
    from shardxform.plan.prune import plan_prune

    with pytest.raises(ShardxformError):
        plan_prune(Checkpoint.open(older), manifest_of(source))


def test_the_command_converts_and_says_so(tmp_path: Path) -> None:
    source = quantize(make(tmp_path / "source"), tmp_path / "q", "auto-round", "fused-indexed")
    out = tmp_path / "out"
    command = ["convert", str(source), str(out), "--to", "gptq", "--max-shard-size", "150KB"]
    shown = CliRunner().invoke(main, [*command, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "weight matrices of 4 bits are stored as gptq, not auto-round: every integer and every scale" in shown.stdout
    assert "named otherwise: experts.0.gate_proj and experts.0.up_proj for experts.gate_up_proj.0" in shown.stdout
    assert "4 bits in groups of 32, gptq" in shown.stdout
    assert not out.exists()
    result = CliRunner().invoke(main, [*command, "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["summary"]["from"] == "auto-round"
    assert facts["summary"]["converted_modules"] == len(read_stored(Checkpoint.open(source)).modules)
    assert facts["summary"]["tensors_after"] == len(read_checkpoint(out))
    assert without_record(out) == without_record(quantize(tmp_path / "source", tmp_path / "direct", "gptq"))
    again = CliRunner().invoke(main, command)
    assert "already complete" in again.stdout
    other = CliRunner().invoke(main, ["convert", str(source), str(out), "--to", "bf16", "--quiet"])
    assert other.exit_code == 1
    assert "made from other inputs" in other.stderr
    forced = CliRunner().invoke(main, ["convert", str(source), str(out), "--to", "bf16", "--force"])
    assert forced.exit_code == 0, forced.output
    assert "cannot be undone" in forced.stderr


@pytest.mark.parametrize("name", ["fp16", "f16", "float16", "bf16", "bfloat16"])
def test_16_bit_types_have_their_usual_names(name: str, quantized: Path, tmp_path: Path) -> None:
    command = ["convert", str(quantized), str(tmp_path / "out"), "--to", name, "--dry-run"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert f"become {'b' * name.startswith('b')}float16: each integer times its scale" in result.stdout


def test_the_command_refuses_in_one_line(quantized: Path, tmp_path: Path) -> None:
    cases = {
        "nothing to convert: the source is auto-round with split": [str(quantized), "--to", "auto-round"],
        "the source is not quantized": [str(tmp_path / "source"), "--to", "gptq"],
        "bf16 has no g_idx": [str(quantized), "--to", "bf16", "--g-idx"],
    }
    for message, (source, *rest) in cases.items():
        result = CliRunner().invoke(main, ["convert", source, str(tmp_path / "out"), *rest])
        assert result.exit_code == 1
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert CliRunner().invoke(main, ["convert", str(quantized), str(tmp_path / "out")]).exit_code == 2
    bad = ["convert", str(quantized), str(tmp_path / "out"), "--to", "gptq", "--max-shard-size", "much"]
    assert CliRunner().invoke(main, bad).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_planning_reads_no_tensor_and_loads_no_array_library() -> None:
    import subprocess
    import sys

    code = "import sys, shardxform.cli.convert; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
