"""`verify` on quantized checkpoints: sound ones of every kind, and every way in which one may not be what it claims."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, bf16, forget_digests, read_checkpoint, tiny, write_checkpoint, write_json
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import picked, some
from test_quantize import KIND_SIZES

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.execution.runner import run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.model.layout import layout_of
from shardxform.plan.convert import Target, plan_convert
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions
from shardxform.verification import Problem, VerifyReport, rounding, verify
from shardxform.verification.rounding import Limits

SIDECARS = {"tokenizer.json": "{}\n", "preprocessor_config.json": "{}\n"}
G32 = Grid(group_size=32, scale_grid="fp16")
SPLIT = Scheme(grid=G32)
TEXT = "qwen3_5_moe_text"
EXPERT = "model.layers.1.mlp.experts.3"


def make(root: Path, kind: str = TEXT, change: dict[str, Raw] | None = None, **over: Any) -> Path:
    config, tensors = tiny(kind, **KIND_SIZES[kind], **over)
    return write_checkpoint(root, {**tensors, **(change or {})}, config, shards=3, files=SIDECARS)


def manifest_of(root: Path) -> Manifest:
    """Four experts of every layer, as many of each router group."""
    checkpoint = Checkpoint.open(root)
    layout = layout_of(checkpoint.config, checkpoint.tensors)
    return Manifest(keep=dict.fromkeys(layout.moe_layers, (1, 2, 5, 7) if layout.num_experts == 8 else (0, 2, 3, 5)))


def quantize(source: Path, out: Path, scheme: Scheme = SPLIT, *, pruned: bool = True, **options: Any) -> Path:
    manifest = manifest_of(source) if pruned else None
    view = ViewOptions(max_shard_bytes=100_000, **options)
    run(plan_quantize(Checkpoint.open(source), scheme, manifest, view), out)
    return forget_digests(out)


def sound(report: VerifyReport) -> bool:
    assert (report.problems, report.warnings) == ((), ())
    return report.sound


def only(report: VerifyReport, code: str, *, warning: bool = False) -> Problem:
    """The one thing that was found."""
    listed, other = (report.warnings, report.problems) if warning else (report.problems, report.warnings)
    assert [p.code for p in listed] == [code], listed
    assert not other, other
    return listed[0]


def change(out: Path, name: str, edit: Callable[[np.ndarray], object]) -> None:
    """Change a tensor of a checkpoint in place; `edit` gets its elements."""
    ref = Checkpoint.open(out).tensors[name]
    array = read_checkpoint(out)[name].array().copy()
    edit(array)
    (piece,) = ref.ranges
    with (out / piece.file).open("r+b") as file:
        file.seek(piece.offset)
        file.write(array.tobytes())


def swap(out: Path, one: str, other: str) -> None:
    tensors = read_checkpoint(out)
    for here, there in ((one, other), (other, one)):
        for part in ("qweight", "scales"):
            change(out, f"{here}.{part}", lambda a, n=f"{there}.{part}": np.copyto(a, tensors[n].array()))


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    write_json(path, value)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its pruned, rounded output; never changed."""
    root = tmp_path_factory.mktemp("quantized")
    source = make(root / "source")
    return source, quantize(source, root / "out")


@pytest.fixture
def source(pair: tuple[Path, Path]) -> Path:
    return pair[0]


@pytest.fixture
def out(pair: tuple[Path, Path], writable: Callable[[Path], Path]) -> Path:
    return writable(pair[1])


# -- sound --------------------------------------------------------------------------------------------------------

ROW: Any = ("compressed-tensors", "bf16")  # the one grid that the format is written with
SCHEMES = [
    *(
        Scheme(grid=Grid(bits=bits, group_size=size, scale_grid=scale_grid), format=format_)
        for bits, size in product((4, 8), (32, -1))
        for format_, scale_grid in (("auto-round", "fp16"), ("gptq", "fp16"), ("gptq", "bf16"), ROW)
    ),
    *(Scheme(grid=replace(G32, search=True, bits=bits), format="gptq", g_idx=True) for bits in (4, 8)),
    Scheme(grid=G32, g_idx=True),
    Scheme(grid=G32, keep_16bit=("*.self_attn.*",)),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.format}-{s.grid.bits}-{s.grid.group_size}")
def test_outputs_of_every_scheme_are_bit_equal_to_rounding_again(scheme: Scheme, source: Path, tmp_path: Path) -> None:
    out = quantize(source, tmp_path / "out", scheme)
    assert sound(verify(out))
    report = verify(out, source=source)
    assert sound(report)
    assert report.experts == 4 * 4
    assert report.rounding is not None
    assert (report.rounding.exact, report.rounding.moved, report.rounding.differing) == (True, 0, 0)
    assert report.rounding.modules == len({n.rpartition(".")[0] for n in read_checkpoint(out) if "scale" in n})


@pytest.mark.parametrize("format_", ["auto-round", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("kind", picked(sorted(KIND_SIZES), 2))
@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_outputs_of_every_family_are_sound(kind: str, experts: str, format_: Any, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind, experts=experts)
    out = quantize(source, tmp_path / "out", Scheme(grid=Grid(group_size=32), format=format_))
    assert sound(verify(out, quick=True))
    report = verify(out, source=source)
    assert sound(report)
    assert report.rounding is not None
    assert report.rounding.exact
    assert sound(verify(out, source=source, quick=True))


def test_the_source_may_be_in_float32_or_float16(tmp_path: Path) -> None:
    for dtype, numpy in (("F32", "<f4"), ("F16", "<f2")):
        _, tensors = tiny("qwen3_moe", **KIND_SIZES["qwen3_moe"])
        name = "model.layers.1.self_attn.o_proj.weight"
        values = np.random.default_rng(0).standard_normal(tensors[name].shape).astype(numpy)
        new = {name: Raw(dtype, values.shape, values.tobytes())}
        source = make(tmp_path / dtype, "qwen3_moe", new)
        assert sound(verify(quantize(source, tmp_path / f"{dtype}-out"), source=source))


def test_an_output_without_record_or_converted_is_held_against_a_bound(source: Path, out: Path, tmp_path: Path) -> None:
    manifest = manifest_of(source)
    (out / "shardxform.json").unlink()
    report = verify(out, source=source, manifest=manifest)
    assert sound(report)
    assert report.rounding is not None
    assert (report.rounding.exact, report.rounding.moved) == (False, 0)
    run(plan_convert(Checkpoint.open(out), Target(format="compressed-tensors")), tmp_path / "converted")
    report = verify(tmp_path / "converted", source=source, manifest=manifest)
    assert report.sound
    assert {p.code for p in report.warnings} == {"other-source"}


def convert(source: Path, out: Path, **target: Any) -> Path:
    run(plan_convert(Checkpoint.open(source), Target(**target)), out)
    return forget_digests(out)


@pytest.mark.parametrize("names", ["split", "fused-indexed"])
def test_a_converted_output_is_held_against_the_quantized_source(names: Any, source: Path, tmp_path: Path) -> None:
    scheme = Scheme(grid=replace(G32, scale_grid="bf16"), expert_names=names)
    before = quantize(source, tmp_path / "before", scheme)
    for number, to in enumerate(("auto-round", "gptq", "compressed-tensors")):
        if (to, names) == ("auto-round", "split"):
            continue
        out = convert(before, tmp_path / str(number), format=to)
        report = verify(out, source=before)
        assert sound(report)
        assert report.rounding is not None
        assert (report.rounding.exact, report.rounding.repacked) == (True, True)
        part = "weight_packed" if to == "compressed-tensors" else "qweight"
        change(out, f"{EXPERT}.up_proj.{part}", lambda w: np.bitwise_xor(w, 1, out=w))
        assert only(verify(out, source=before), "source-error").where == f"{EXPERT}.up_proj.{part}"
        assert "with the same integers and scales" not in invoke(out, "--source", before)
    indexed = convert(before, tmp_path / "indexed", format="gptq", g_idx=True)
    assert "with the same integers and scales" in invoke(indexed, "--source", before)


def invoke(*arguments: object) -> str:
    return CliRunner().invoke(main, ["verify", "--quiet", *map(str, arguments)]).stdout


def test_the_small_model_is_proven(small_moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert CliRunner().invoke(main, ["quantize", str(small_moe), str(out), "-q"]).exit_code == 0
    result = CliRunner().invoke(main, ["verify", str(out), "--source", str(small_moe), "-q", "--worst", "2"])
    assert result.exit_code == 0
    first, *worst, last = result.stdout.splitlines()
    assert last.startswith("sound: ")
    assert f"; values of all 690 tensors compared with {small_moe} (217 quantized weights bit-equal to" in last
    assert first.startswith("relative error 0.10")
    assert len(worst) == 2
    listed = CliRunner().invoke(main, ["verify", str(out), "--source", str(small_moe), "-q", "--json"])
    by_weight = json.loads(listed.stdout)["rounding"]["by_weight"]
    assert len(by_weight) == 217
    assert [e["relative_error"] for e in by_weight] == sorted((e["relative_error"] for e in by_weight), reverse=True)
    assert worst[0].endswith(by_weight[0]["name"])


def test_relative_errors_are_those_of_the_dequantized_weights(source: Path, out: Path) -> None:
    report = verify(out, source=source)
    before, after = read_checkpoint(source), read_checkpoint(out)
    keep = manifest_of(source).keep[1]
    fused = (before["model.layers.1.mlp.experts.down_proj"].array()[keep[3]].astype("u4") << 16).view("f4")
    words = after[f"{EXPERT}.down_proj.qweight"].array().view("u4")
    codes = ((words[:, None, :] >> np.arange(0, 32, 4, dtype="u4")[:, None]) & 15).reshape(-1, words.shape[1]).T
    scales = np.repeat(after[f"{EXPERT}.down_proj.scales"].array().view("f2").astype("f8"), 32, axis=0).T
    error = np.linalg.norm((codes - 8.0) * scales - fused) / np.linalg.norm(fused)
    assert report.rounding is not None
    (found,) = [e for e in report.rounding.by_weight if e.name == f"{EXPERT}.down_proj"]
    assert found.relative_error == pytest.approx(error, rel=1e-5)


# -- against the source: a proof ----------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=some(40), deadline=None)
def test_any_flipped_bit_of_any_word_or_scale_is_found(pair: tuple[Path, Path], draw: st.DataObject) -> None:
    source, out = pair
    tensors = Checkpoint.open(out).tensors
    name = draw.draw(st.sampled_from([n for n in tensors if n.endswith((".qweight", ".scales"))]))
    (piece,) = tensors[name].ranges
    path = out / piece.file
    whole = path.read_bytes()
    bit = draw.draw(st.integers(0, 8 * piece.length - 1))
    damaged = bytearray(whole)
    damaged[piece.offset + bit // 8] ^= 1 << bit % 8
    try:
        path.write_bytes(damaged)
        report = verify(out, source=source)
        assert not report.sound
        module = name.rpartition(".")[0]
        assert {p.where.rpartition(".")[0] for p in report.problems} == {module}
        if name.endswith(".qweight"):
            word = bit // 32
            rows = tensors[name].spec.shape[1]
            at = f"row {word % rows}, column {word // rows * 8 + bit % 32 // 4}:"
            assert at in only(report, "source-error").message
        assert verify(out, source=source, manifest=manifest_of(source), tolerance=0).problems == report.problems
    finally:
        path.write_bytes(whole)


def test_a_wrong_code_is_named_with_expert_row_and_column(source: Path, out: Path) -> None:
    name = f"{EXPERT}.up_proj.qweight"
    code = {}

    def flip(words: np.ndarray) -> None:
        code["was"] = int(words.view("u4")[2, 5] >> 12 & 15)
        words.view("u4")[2, 5] ^= 0x8000

    change(out, name, flip)
    problem = only(verify(out, source=source), "source-error")
    assert problem.where == name
    text = "expert 3: 1 of 2048 weights are no rounding of the source's, the first at row 5, column 19: code"
    assert problem.message.startswith(f"{text} {code['was'] ^ 8} for ")
    assert f", expected {code['was']} for " in problem.message


def test_swapped_weights_are_found(source: Path, out: Path) -> None:
    swap(out, f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj")
    report = verify(out, source=source)
    assert [p.where for p in report.problems] == [f"{EXPERT}.{p}_proj.qweight" for p in ("gate", "up")]
    assert {p.code for p in report.problems} == {"source-error"}
    assert report.rounding is not None
    assert (report.rounding.exact, report.rounding.differing) == (False, 2)


def test_swapped_experts_are_found(source: Path, out: Path) -> None:
    for projection in ("gate_proj", "up_proj", "down_proj"):
        swap(out, f"{EXPERT}.{projection}", f"model.layers.1.mlp.experts.0.{projection}")
    report = verify(out, source=source)
    assert {p.code for p in report.problems} == {"source-error"}
    assert {p.where.split(".")[5] for p in report.problems} == {"0", "3"}
    assert len(report.problems) == 6


def test_another_kept_expert_is_found(source: Path, out: Path) -> None:
    edit_json(out / "shardxform.json", lambda r: r["inputs"]["manifest"]["keep"].update({"2": [1, 2, 4, 7]}))
    report = verify(out, source=source)
    experts = [p for p in report.problems if p.code == "source-error"]
    assert {p.where for p in experts} == {
        f"model.layers.2.mlp.experts.2.{projection}.qweight" for projection in ("gate_proj", "up_proj", "down_proj")
    }
    assert [p.where for p in report.problems if p.code == "source-bytes"] == ["model.layers.2.mlp.gate.weight"]


@pytest.mark.parametrize("record", [True, False])
def test_scales_of_another_row_are_found(record: bool, source: Path, out: Path) -> None:
    if not record:
        (out / "shardxform.json").unlink()

    def roll(scales: np.ndarray) -> None:
        scales[:, [4, 5]] = scales[:, [5, 4]]

    change(out, f"{EXPERT}.down_proj.scales", roll)
    report = verify(out, source=source, manifest=manifest_of(source), tolerance=0)
    assert "row 4, column" in only(report, "source-error").message
    assert ("scales are not what rounding" in report.problems[0].message) == record


def tied(root: Path) -> tuple[Path, str]:
    """A source with a weight exactly between two codes, at row 0, column 1."""
    name = "model.layers.3.self_attn.o_proj.weight"
    _, tensors = tiny(TEXT, **KIND_SIZES[TEXT])
    values = np.zeros(tensors[name].shape, "f4")
    values[:, 0], values[:, 1] = -8, 2.5  # a scale of 1
    return make(root, change={name: bf16(values)}), name.removesuffix("weight")


def test_of_two_nearest_codes_only_the_even_one_is_right_by_the_record(tmp_path: Path) -> None:
    source, stem = tied(tmp_path / "source")
    out = quantize(source, tmp_path / "out", pruned=False)
    change(
        out, stem + "qweight", lambda w: np.bitwise_xor(w, 0x10, out=w, where=np.arange(w.size).reshape(w.shape) == 0)
    )
    message = only(verify(out, source=source), "source-error").message
    assert "row 0, column 1: code 11 for 3, expected 10 for 2.5 (scale 1)" in message
    (out / "shardxform.json").unlink()
    assert sound(verify(out, source=source, tolerance=0))


def test_another_scale_under_which_all_codes_are_nearest_is_found(tmp_path: Path) -> None:
    source, stem = tied(tmp_path / "source")
    out = quantize(source, tmp_path / "out", pruned=False)

    def grow(scales: np.ndarray) -> None:
        scales[0, 7] = np.float16(1.0009765625).view(scales.dtype) if scales.dtype != np.float16 else 1.0009765625

    change(out, stem + "scales", grow)
    problem = only(verify(out, source=source), "source-scale")
    assert problem.where == stem + "scales"
    assert problem.message.endswith("the first at row 7, group 0: 1.00098, expected 1")


def test_codes_of_a_tuned_checkpoint_may_be_one_off(source: Path, out: Path) -> None:
    def one_up(words: np.ndarray) -> None:
        bits = words.view("u4")
        first = bits & 15
        bits[:] = np.where(first < 15, bits + 1, bits - 1)

    change(out, f"{EXPERT}.down_proj.qweight", one_up)
    assert only(verify(out, source=source), "source-error").message.startswith("expert 3: 256 of 2048 weights")
    edit_json(out / "shardxform.json", lambda r: r["inputs"]["scheme"].update(method="autoround"))
    report = verify(out, source=source)
    assert sound(report)
    assert report.rounding is not None
    assert not report.rounding.exact
    assert 0 < report.rounding.moved <= 256
    assert only(verify(out, source=source, tolerance=0), "source-error")
    (out / "shardxform.json").unlink()
    moved = only(verify(out, source=source, manifest=manifest_of(source)), "moved", warning=True)
    assert "in 1 modules, are not at the nearest code" in moved.message
    change(out, f"{EXPERT}.down_proj.qweight", lambda w: np.bitwise_xor(w, 0x80, out=w))
    assert [p.code for p in verify(out, source=source, manifest=manifest_of(source)).problems] == ["source-error"]


def test_a_record_of_another_scheme_is_a_problem_and_not_believed(source: Path, out: Path) -> None:
    edit_json(out / "shardxform.json", lambda r: r["inputs"]["scheme"]["grid"].update(bits=8))
    report = verify(out, source=source)
    assert only(report, "record").message.startswith("rounded to 8 bits in groups of 32, but config.json says 4")
    for grid in ([], None, {"bits": 4}, {"bits": "4", "group_size": 32, "scale_grid": "x", "search": 1}):
        edit_json(out / "shardxform.json", lambda r, g=grid: r["inputs"]["scheme"].update(grid=g))
        report = verify(out, source=source)
        assert sound(report)
        assert report.rounding is not None
        assert not report.rounding.exact


def test_a_source_with_nan_is_no_source_of_what_is_stored(source: Path, out: Path, tmp_path: Path) -> None:
    tensors = read_checkpoint(source)
    name = "model.layers.3.self_attn.o_proj.weight"
    values = tensors[name].array().copy()
    values[3, 9] = 0x7FC0
    config = json.loads((source / "config.json").read_text())
    other = write_checkpoint(
        tmp_path / "other", {**tensors, name: Raw("BF16", values.shape, values.tobytes())}, config, files=SIDECARS
    )
    report = verify(out, source=other)
    (problem,) = report.problems
    assert "row 3, column 9: the source's weight is nan" in problem.message
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_weight_of_another_shape_or_dtype_in_the_source_is_named(source: Path, out: Path, tmp_path: Path) -> None:
    tensors = read_checkpoint(source)
    name = "model.layers.3.self_attn.o_proj.weight"
    config = json.loads((source / "config.json").read_text())
    small = Raw("BF16", (32, 32), bytes(2048))
    other = write_checkpoint(tmp_path / "a", {**tensors, name: small}, config, files=SIDECARS)
    assert [p.code for p in verify(out, source=other).problems] == ["source-shape"]
    narrow = Raw("F8_E4M3", tensors[name].shape, bytes(len(tensors[name].data) // 2))
    other = write_checkpoint(tmp_path / "b", {**tensors, name: narrow}, config, files=SIDECARS)
    assert "rounded" in [p.code for p in verify(out, source=other).warnings]


# -- values -------------------------------------------------------------------------------------------------------


def put(at: tuple[int, ...], value: int) -> Callable[[np.ndarray], object]:
    return lambda array: array.view(f"u{array.itemsize}").__setitem__(at, value)


FAULTS: dict[str, tuple[Scheme, str, Callable[[np.ndarray], object], str, str]] = {
    "zero points of 4 bits": (SPLIT, "qzeros", put((0, 2), 0x77777776), "qzeros", "1 of 8 zero points are"),
    "zero points of 8 bits": (
        Scheme(grid=Grid(bits=8, group_size=32)),
        "qzeros",
        put((0, 3), 0x80808080),
        "qzeros",
        "at [0, 3]: 0x80808080, expected 0x7F7F7F7F",
    ),
    "act-order": (
        Scheme(grid=G32, format="gptq", g_idx=True),
        "g_idx",
        put((7,), 1),
        "g-idx",
        "1 of 32 columns are not in the group of their place, the first at [7]: 1, expected 0",
    ),
    "weight_shape": (
        Scheme(grid=replace(G32, scale_grid="bf16"), format="compressed-tensors"),
        "weight_shape",
        lambda a: np.copyto(a, a[::-1].copy()),
        "weight-shape",
        "2 of 2 sizes are not the weight's, the first at [0]: 32, expected 64",
    ),
    "a scale of zero": (SPLIT, "scales", put((0, 9), 0), "scale", "1 of 64 scales are zero"),
    "a denormal scale": (SPLIT, "scales", put((0, 9), 0x80A7), "scale", "the first at [0, 9]: -9.95398e-06"),
    "a bf16 scale of zero": (
        Scheme(grid=replace(G32, scale_grid="bf16"), format="compressed-tensors"),
        "weight_scale",
        put((9, 0), 0x8000),
        "scale",
        "the first at [9, 0]: -0",
    ),
    "a scale that is NaN": (SPLIT, "scales", put((0, 9), 0x7E00), "not-finite", "the first at 9"),
    "a scale off the bf16 grid": (
        Scheme(grid=replace(G32, scale_grid="bf16")),
        "scales",
        put((0, 9), 0x3C01),
        "scale-grid",
        "1 of 64 scales are off the bf16 grid that the record promises, the first at [0, 9]: 1.00098",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_value_is_found_without_the_source(name: str, source: Path, tmp_path: Path) -> None:
    scheme, part, edit, code, message = FAULTS[name]
    out = quantize(source, tmp_path / "out", scheme)
    change(out, f"{EXPERT}.down_proj.{part}", edit)
    problem = only(verify(out), code)
    assert problem.where == f"{EXPERT}.down_proj.{part}"
    assert message in problem.message
    assert code in [p.code for p in verify(out, source=source).problems]


def test_the_same_fault_in_many_tensors_is_one_problem(out: Path) -> None:
    for name in Checkpoint.open(out).tensors:
        if name.endswith("experts.3.down_proj.qzeros"):
            change(out, name, lambda a: a.fill(-0x77777778))
    problem = only(verify(out), "qzeros")
    assert problem.where == "layers 0..3, expert 3"
    assert "8 of 8 zero points" in problem.message


def test_words_that_were_never_written_are_noticed(out: Path) -> None:
    change(out, f"{EXPERT}.down_proj.qweight", lambda a: a.fill(0))
    assert only(verify(out), "zero", warning=True).where == f"{EXPERT}.down_proj.qweight"


# -- structure ----------------------------------------------------------------------------------------------------


def rewritten(out: Path, to: Path, edit: Callable[[dict[str, Any], dict[str, Raw]], object]) -> Path:
    """The same checkpoint with other tensors and config, and no record."""
    config, tensors = json.loads((out / "config.json").read_text()), read_checkpoint(out)
    edit(config, tensors)
    return write_checkpoint(to, tensors, config, shards=2, files=SIDECARS)


def declare(**keys: Any) -> Callable[[dict[str, Any], dict[str, Raw]], object]:
    return lambda config, _: config["quantization_config"].update(keys)


def plain(fragment: str) -> Callable[[dict[str, Any], dict[str, Raw]], object]:
    """Store a module in 16 bits."""

    def edit(_: dict[str, Any], tensors: dict[str, Raw]) -> None:
        for name in [n for n in tensors if fragment in n and n.endswith(".qweight")]:
            words, rows = tensors[name].shape
            stem = name.removesuffix("qweight")
            for part in ("qweight", "qzeros", "scales"):
                del tensors[stem + part]
            tensors[stem + "weight"] = bf16(np.ones((rows, 8 * words)))

    return edit


def drop(*names: str) -> Callable[[dict[str, Any], dict[str, Raw]], object]:
    return lambda _, tensors: [tensors.pop(name) for name in names]


def foreign(_: dict[str, Any], tensors: dict[str, Raw]) -> None:
    tensors[f"{EXPERT}.up_proj.weight_zero_point"] = Raw("I32", (2, 2), bytes(16))


def wider(_: dict[str, Any], tensors: dict[str, Raw]) -> None:
    """One expert in 8 bits."""
    name = f"{EXPERT}.up_proj.qweight"
    words = np.concatenate([tensors[name].array()] * 2)
    tensors[name] = Raw("I32", words.shape, words.tobytes())


DEFECTS: dict[str, tuple[Callable[[dict[str, Any], dict[str, Raw]], object], str, str, str]] = {
    "other bits than declared": (declare(bits=8), "part-shape", "layers 0..3, all experts", "in 8 bits"),
    "other groups than declared": (declare(group_size=-1), "part-shape", "layers 0..3, all experts", "one group a row"),
    "#4 an expert in other bits": (
        wider,
        "part-shape",
        f"{EXPERT}.up_proj.qweight",
        "I32 [16, 32], expected I32 [8, 32]",
    ),
    "#4 an expert in 16 bits": (plain(f"{EXPERT}.up_proj"), "merged", "layer 1", "up_proj of expert 3 is 16-bit"),
    "#4 q in 16 bits": (
        plain("layers.3.self_attn.q_proj"),
        "merged not-quantized",
        "layer 3",
        "self_attn.q_proj 16-bit",
    ),
    "#2 experts in 16 bits": (plain(".experts."), "not-quantized", "layers 0..3, all experts", "declares it quantized"),
    "#2 attention in 16 bits": (plain("self_attn."), "not-quantized", "layer 3", "declares it quantized (auto-round)"),
    "a foreign part": (foreign, "parts", f"{EXPERT}.up_proj.weight_zero_point", "asymmetric"),
    "#10 qzeros missing": (drop(f"{EXPERT}.up_proj.qzeros"), "missing", f"{EXPERT}.up_proj.qzeros", "missing"),
    "#10 an expert missing": (
        lambda _, t: [t.pop(n) for n in list(t) if n.startswith(EXPERT)],
        "missing",
        "layer 1, expert 3",
        "(9 tensors)",
    ),
    "#10 experts out of range": (
        lambda _, t: t.update({n.replace("experts.3.", "experts.4."): r for n, r in list(t.items()) if EXPERT in n}),
        "expert-range",
        "layer 1, expert 4",
        "beyond the 4 experts",
    ),
    "#11 a packing that clients refuse": (
        declare(packing_format="auto_round:x"),
        "quantization-config",
        "config.json",
        "packing_format",
    ),
    "#11 no group_size": (
        lambda c, _: c["quantization_config"].pop("group_size"),
        "quantization-config",
        "config.json",
        "group_size: missing",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_names_the_defect_of_a_quantized_checkpoint(name: str, out: Path, tmp_path: Path) -> None:
    edit, code, where, message = DEFECTS[name]
    problems = verify(rewritten(out, tmp_path / "new", edit)).problems
    assert {p.code for p in problems} == set(code.split()), problems
    assert any(where in p.where and message in p.message for p in problems), problems


@pytest.mark.parametrize("module", ["mlp.gate", "linear_attn.in_proj_a", "linear_attn.in_proj_b"])
def test_modules_that_no_client_runs_quantized_are_named(module: str, source: Path, tmp_path: Path) -> None:
    """#3 and #5: a router, and the two halves of `in_proj_ba`."""

    def edit(_: dict[str, Any], tensors: dict[str, Raw]) -> None:
        rows, columns = tensors.pop(f"model.layers.1.{module}.weight").shape
        for part, shape in (("qweight", (columns // 8, rows)), ("qzeros", (2, 1)), ("scales", (columns // 32, rows))):
            dtype = "F16" if part == "scales" else "I32"
            data = np.full(shape, 0x77777777, "i4") if dtype == "I32" else np.ones(shape, "f2")
            tensors[f"model.layers.1.{module}.{part}"] = Raw(dtype, shape, data.tobytes())

    out = quantize(source, tmp_path / "out")
    problems = verify(rewritten(out, tmp_path / "new", edit)).problems
    assert {"quantized"} <= {p.code for p in problems} <= {"quantized", "merged", "undeclared"}
    assert any(module in p.where and "clients need it in 16 bits" in p.message for p in problems)


def test_a_config_with_several_schemes_is_held_against_merged_rows_only(out: Path, tmp_path: Path) -> None:
    """#4 where modules may differ: those that clients merge must not."""
    several = {"model.layers.3.self_attn.q_proj": {"bits": 8}}
    report = verify(
        rewritten(out, tmp_path / "a", lambda c, _: c["quantization_config"]["extra_config"].update(several))
    )
    problem = only(report, "parts")
    assert "for a weight [128, 32] in 8-bit integers, groups of 32" in problem.message

    def edit(config: dict[str, Any], tensors: dict[str, Raw]) -> None:
        config["quantization_config"]["extra_config"].update(several)
        wider(config, tensors)

    problems = verify(rewritten(out, tmp_path / "b", edit)).problems
    assert [p.code for p in problems] == ["merged", "parts", "parts"]
    assert "16 elements a row, but 8 in model.layers.1.mlp.experts.0.up_proj.qweight" in problems[0].message


def test_sixteen_bit_modules_may_be_listed_by_plain_names_as_upstream_does(out: Path, tmp_path: Path) -> None:
    def edit(config: dict[str, Any], tensors: dict[str, Raw]) -> None:
        kept = [n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and len(t.shape) == 2]
        config["quantization_config"]["extra_config"] = {n: {"bits": 16, "data_type": "float"} for n in kept}
        config["quantization_config"]["block_name_to_quantize"] = "model.layers"

    assert sound(verify(rewritten(out, tmp_path / "new", edit)))


# -- the older spelling (#1) --------------------------------------------------------------------------------------


@pytest.fixture
def older(source: Path, tmp_path: Path) -> Path:
    return quantize(source, tmp_path / "older", replace(SPLIT, expert_names="fused-indexed"))


def test_the_older_spelling_is_a_problem_with_a_way_out_but_its_weights_are_proven(source: Path, older: Path) -> None:
    report = verify(older, source=source)
    problem = only(report, "seed-spelling")
    assert "`shardxform convert` to auto-round with `expert_names` split respells it" in problem.message
    assert report.experts == 4 * 4
    assert report.rounding is not None
    assert report.rounding.exact
    assert f"{EXPERT}.up_proj" in [e.name for e in report.rounding.by_weight]


def test_in_the_older_spelling_a_wrong_weight_is_found(source: Path, older: Path) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj.3.qweight"
    change(older, name, put((0, 40), 0))  # row 8 of the up projection
    problems = verify(older, source=source).problems
    assert [(p.code, p.where) for p in problems[1:]] == [("source-error", name)]
    assert "expert 3: " in problems[1].message
    assert "row 8, column " in problems[1].message


def test_in_the_older_spelling_experts_are_counted(older: Path, tmp_path: Path) -> None:
    def edit(_: dict[str, Any], tensors: dict[str, Raw]) -> None:
        for name in [n for n in tensors if "layers.1." in n and ".3." in n and "experts" in n]:
            tensors[name.replace(".3.", ".7.")] = tensors.pop(name)

    report = verify(rewritten(older, tmp_path / "new", edit))
    found = {p.code: p.where for p in report.problems}
    assert found["missing"] == "layer 1, expert 3"
    assert found["expert-range"] == "layer 1, expert 7"
    assert "seed-spelling" in found


# -- how it is done -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([4, 8]), st.booleans(), st.integers(0, 2), st.sampled_from([32, 64, 96]))
def test_both_backends_count_the_same(seed: int, bits: int, strict: bool, tolerance: int, columns: int) -> None:
    pytest.importorskip("numba")
    rng = np.random.default_rng(seed)
    zero, span = 1 << (bits - 1), 32
    scales = (rng.standard_normal((5, columns // span)) * 10.0 ** rng.integers(-4, 4)).astype("f4")
    codes = rng.integers(0, 2 * zero, (5, columns), dtype="u1")
    spread = np.repeat(scales, span, axis=1)
    steps = rng.choice([0, 0.25, 0.5, 1, 1.5, 2, 40], codes.shape) * rng.choice([-1, 1], codes.shape)
    weights = ((codes.astype("f4") - zero + steps) * spread).astype("f4")
    for special in (np.nan, np.inf, -np.inf, 0.0, 3e38):
        weights[rng.integers(0, 5), rng.integers(0, columns)] = special
    near = 0.0 if strict else 0.5
    limits = Limits(zero, span, strict, near, near + tolerance)
    with np.errstate(all="ignore"):
        plain = rounding._plain(weights, codes, scales, limits)
    fast = rounding._compiled(weights, codes, scales, limits)
    assert fast.counts == plain.counts
    for one, other in zip(fast.rows, plain.rows, strict=True):
        np.testing.assert_array_equal(one, other)
    if np.isfinite(fast.squares).all():
        assert fast.squares == pytest.approx(plain.squares, rel=1e-4)


@pytest.mark.parametrize(
    ("numba", "tile", "jobs"), [(False, 1 << 17, 2), (True, 100, 1), (True, 700, 4), (False, 64, 3)]
)
def test_what_is_found_does_not_depend_on_backend_tiles_or_threads(
    numba: bool, tile: int, jobs: int, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap(out, f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj")
    change(out, f"{EXPERT}.down_proj.qweight", put((3, 60), 0x12345678))
    expected = verify(out, source=source)
    monkeypatch.setattr(rounding, "_NUMBA", numba and rounding._NUMBA)
    monkeypatch.setattr(rounding, "_TILE_WEIGHTS", tile)
    report = verify(out, source=source, jobs=jobs)
    assert report.problems == expected.problems
    assert report.rounding is not None
    assert expected.rounding is not None
    for ours, theirs in zip(report.rounding.by_weight, expected.rounding.by_weight, strict=True):
        assert (ours.name, ours.clipped) == (theirs.name, theirs.clipped)
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=1e-5)


def test_sums_beyond_float32_are_figures_all_the_same(tmp_path: Path) -> None:
    name = "model.layers.3.self_attn.o_proj.weight"
    _, tensors = tiny(TEXT, **KIND_SIZES[TEXT])
    for size in (1e-30, 0.0):
        values = np.full(tensors[name].shape, size, "f4")
        source = make(tmp_path / f"{size}", change={name: bf16(values)})
        report = verify(quantize(source, tmp_path / f"{size}-out"), source=source)
        assert [p.code for p in report.problems] == []
        assert report.rounding is not None
        (found,) = [e for e in report.rounding.by_weight if e.name == name.removesuffix(".weight")]
        assert found.relative_error == pytest.approx(1.0 if size else 0.0)


VALUES: list[object] = [
    None,
    True,
    -1,
    0,
    3,
    8,
    10**30,
    0.5,
    "",
    "x",
    [],
    [1],
    {},
    {"a": {"b": 1}},
    ["re:("],
    {"(": {}},
]


@given(st.data())
@settings(max_examples=some(80), deadline=None)
def test_no_damage_to_config_record_or_headers_raises(pair: tuple[Path, Path], draw: st.DataObject) -> None:
    source, out = pair
    name = draw.draw(
        st.sampled_from(["config.json", "shardxform.json", *(s.name for s in Checkpoint.open(out).shards)])
    )
    whole = (out / name).read_bytes()
    try:
        if name.endswith("json"):
            value = json.loads(whole)
            home = value["quantization_config"] if name == "config.json" else value["inputs"]["scheme"]
            home = draw.draw(st.sampled_from([home, *(v for v in home.values() if isinstance(v, dict) and v), value]))
            home[draw.draw(st.sampled_from([*home, "dynamic", "lm_head"]))] = draw.draw(st.sampled_from(VALUES))
            write_json(out / name, value)
        else:  # sizes and dtypes of parts that nobody wrote
            old, new = draw.draw(
                st.sampled_from([(b'"I32"', b'"F32"'), (b"[32", b"[16"), (b"[2,", b"[0,"), (b"8]", b"0]")])
            )
            (out / name).write_bytes(whole.replace(old, new, draw.draw(st.integers(1, 5))))
        report = verify(out, source=source, quick=draw.draw(st.booleans()))
        json.dumps(report.to_dict(), allow_nan=False)
    finally:
        (out / name).write_bytes(whole)


def test_a_converted_output_is_proven_against_both_of_its_sources(small_moe: Path, tmp_path: Path) -> None:
    """Against the checkpoint that was converted, and against the one that had been pruned and rounded before."""
    manifest = Manifest(keep={layer: tuple(range(layer, layer + 8)) for layer in range(4)})
    scheme = Scheme(grid=Grid(search=True))
    run(plan_quantize(Checkpoint.open(small_moe), scheme, manifest), tmp_path / "first")
    for name, to, before in (("second", "gptq", "first"), ("third", "compressed-tensors", "second")):
        run(plan_convert(Checkpoint.open(tmp_path / before), Target(format=to)), tmp_path / name)  # type: ignore[arg-type]
        assert verify(tmp_path / name, source=tmp_path / before).problems == ()
        report = verify(tmp_path / name, source=small_moe)
        assert report.problems == ()
        assert report.warnings == ()
        assert report.rounding is not None
        assert report.rounding.exact
