"""`verify` on sound checkpoints, on outputs held against their source, on random damage, and as a command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strategies
from build import (
    KINDS,
    Raw,
    bf16,
    forget_digests,
    random_scales,
    random_tensor,
    read_checkpoint,
    tiny,
    write_checkpoint,
    write_json,
)
from click.testing import CliRunner
from faults import Failing
from hypothesis import given, settings
from hypothesis import strategies as st

from shardxform.ask.manifest import Manifest, keep_all
from shardxform.base.progress import Progress
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError, ExecutionError, ManifestError
from shardxform.execution.runner import RunOptions, run
from shardxform.model.layout import layout_of
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import ViewOptions
from shardxform.verification import Problem, VerifyReport, data, jobs, verify

INDEX = "model.safetensors.index.json"
SIDECARS = {"tokenizer.json": "{}\n", "preprocessor_config.json": "{}\n", "README.md": "# tiny\n"}


def sound(report: VerifyReport) -> bool:
    assert (report.problems, report.warnings) == ((), ())
    return report.sound


def codes(report: VerifyReport) -> list[str]:
    return [problem.code for problem in report.problems]


def found(report: VerifyReport, code: str) -> Problem:
    """The one problem of this kind."""
    (problem,) = [p for p in report.problems if p.code == code]
    return problem


def write(root: Path, kind: str = "qwen3_5_moe_text", shards: int = 2, **over: Any) -> Path:
    config, tensors = tiny(kind, **over)
    return write_checkpoint(root, tensors, config, shards=shards, files=SIDECARS)


def halved(source: Path, mtp: bool = False) -> Manifest:
    """Every other expert, and of the MTP layers the other half."""
    checkpoint = Checkpoint.open(source)
    every = keep_all(layout_of(checkpoint.config, checkpoint.tensors))
    return Manifest(
        keep={layer: ids[::2] for layer, ids in every.keep.items()},
        mtp_keep={layer: ids[1::2] for layer, ids in every.mtp_keep.items()} if mtp else {},
    )


def pruned(source: Path, out: Path, with_mtp: bool = False, **options: Any) -> Path:
    plan = plan_prune(Checkpoint.open(source), halved(source, with_mtp), ViewOptions(max_shard_bytes=30_000, **options))
    run(plan, out)
    return forget_digests(out)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its pruned output; restore what you change."""
    root = tmp_path_factory.mktemp("pair")
    source = write(root / "source", "qwen3_6_moe")
    return source, pruned(source, root / "out", with_mtp=True)


# -- sound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("experts", ["fused", "per-expert"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_checkpoint_of_every_family_has_no_problem(
    kind: str, experts: str, shards: int, tmp_path: Path
) -> None:
    root = write(tmp_path / "out", kind, shards, experts=experts)
    assert sound(verify(root))
    assert sound(verify(root, quick=True))


def test_the_small_trained_checkpoint_is_sound(small_moe: Path) -> None:
    report = verify(small_moe)
    assert sound(report)
    assert (report.tensors, report.experts) == (72, 64)
    assert report.bytes_scanned == sum(len(t.data) for t in read_checkpoint(small_moe).values())


def test_counts_experts_and_bytes(tmp_path: Path) -> None:
    report = verify(write(tmp_path / "out", "qwen3_5_moe"))
    assert report.experts == 4 * 8 + 8  # the MTP layer has its own
    assert (report.bytes_compared, report.tensors_compared) == (0, 0)
    assert report.bytes_scanned == Checkpoint.open(tmp_path / "out").nbytes
    assert report.peak_rss_bytes > 0


def test_a_tied_checkpoint_may_hold_its_head_or_not(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe", tie_word_embeddings=True)
    assert sound(verify(write_checkpoint(tmp_path / "a", tensors, config, files=SIDECARS)))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert sound(verify(write_checkpoint(tmp_path / "b", tensors, config, files=SIDECARS)))


def test_a_release_in_fp8_with_its_scales_is_sound(tmp_path: Path) -> None:
    config, tensors = tiny("deepseek_v3")
    for name in [n for n in tensors if n.endswith(("_proj.weight", "_proj_with_mqa.weight")) and "eh_proj" not in n]:
        shape = tensors[name].shape
        tensors[name] = Raw("F8_E4M3", shape, np.full(shape, 0x38, "u1").tobytes())
        tensors[f"{name}_scale_inv"] = random_scales(name, "F32", (1, 1))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert sound(verify(write_checkpoint(tmp_path / "out", tensors, config, files=SIDECARS)))


# -- against the source -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mtp", [False, True])
def test_an_output_of_prune_equals_its_source(kind: str, mtp: bool, tmp_path: Path) -> None:
    source = write(tmp_path / "source", kind, 3)
    mtp = mtp and bool(halved(source, True).mtp_keep)
    out = pruned(source, tmp_path / "out", mtp)
    report = verify(out, source=source)
    assert sound(report)
    assert report.tensors_compared == report.tensors
    assert report.bytes_compared == Checkpoint.open(out).nbytes
    assert sound(verify(out, source=source, quick=True))


@pytest.mark.parametrize("options", [{"text_only": True}, {"mtp": "drop"}, {"text_only": True, "mtp": "drop"}])
def test_options_are_taken_from_the_record_or_the_caller(options: dict[str, Any], tmp_path: Path) -> None:
    source = write(tmp_path / "source", "qwen3_5_moe")
    out = pruned(source, tmp_path / "out", with_mtp=True, **options)
    assert sound(verify(out, source=source))
    (out / "shardxform.json").unlink()
    assert sound(verify(out, source=source, manifest=halved(source, True), **options))
    assert not verify(out, source=source, manifest=halved(source, True)).sound


def test_without_record_and_manifest_a_pruned_output_cannot_be_compared(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    out = pruned(source, tmp_path / "out")
    (out / "shardxform.json").unlink()
    report = verify(out, source=source)
    assert codes(report) == ["source-manifest"]
    assert report.bytes_scanned
    assert report.bytes_compared == 0


def test_a_copy_in_other_shards_equals_its_source(tmp_path: Path) -> None:
    assert sound(verify(write(tmp_path / "out", shards=1), source=write(tmp_path / "source", shards=3)))


def test_another_manifest_than_the_one_used_is_noticed(pair: tuple[Path, Path]) -> None:
    source, out = pair
    other = halved(source, True)
    other = Manifest(keep={**other.keep, 1: tuple(range(1, 8, 2))}, mtp_keep=other.mtp_keep)
    report = verify(out, source=source, manifest=other)
    assert set(codes(report)) == {"source-bytes"}
    assert {p.where.partition("layers.")[2][:1] for p in report.problems} == {"1"}
    assert report.tensors_differing == len(report.problems) == 3


def test_a_byte_is_named_by_tensor_expert_and_offset(tmp_path: Path) -> None:
    source, out = write(tmp_path / "source"), tmp_path / "out"
    config, tensors = tiny("qwen3_5_moe_text")
    name = "model.layers.2.mlp.experts.down_proj"
    changed = bytearray(tensors[name].data)
    at = 5 * 16 * 12 * 2 + 8
    changed[at] ^= 1
    changed[at + 3] ^= 1
    tensors[name] = Raw("BF16", tensors[name].shape, bytes(changed))
    report = verify(write_checkpoint(out, tensors, config, files=SIDECARS), source=source)
    assert found(report, "source-bytes").where == name
    assert f"2 of {len(changed)} bytes differ from the source, the first at {at} (expert 5)" in str(report.problems)
    assert report.tensors_differing == 1


def test_what_differs_in_the_table_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    config, tensors = tiny("qwen3_5_moe_text", vocab_size=48)
    log = "model.layers.0.linear_attn.A_log"
    tensors[log] = bf16(tensors[log].float32())
    config |= {"rms_norm_eps": 1e-5, "use_cache": True}
    del config["max_position_embeddings"]
    files = {**SIDECARS, "tokenizer.json": "{ }\n"}
    del files["preprocessor_config.json"]
    report = verify(write_checkpoint(tmp_path / "out", tensors, config, files=files), source=source)
    assert found(report, "source-dtype").where == log
    assert "BF16, but F32 in the source" in found(report, "source-dtype").message
    assert {p.message for p in report.problems if p.code == "source-config"} == {
        "max_position_embeddings: absent, but 64 by the source",
        "rms_norm_eps: 1e-05, but 1e-06 by the source",
        "use_cache: True, but absent by the source",
    }
    assert {p.where for p in report.problems if p.code == "source-sidecar"} == {
        "tokenizer.json",
        "preprocessor_config.json",
    }


def test_tensors_that_the_source_has_or_lacks_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "qwen3_moe", tie_word_embeddings=True)
    config, tensors = tiny("qwen3_moe", tie_word_embeddings=True)
    tensors["lm_head.weight"] = random_tensor("h", "BF16", (48, 16))
    with_head = write_checkpoint(tmp_path / "out", tensors, config, files=SIDECARS)
    assert found(verify(with_head, source=source), "source-extra").where == "lm_head.weight"
    assert found(verify(source, source=with_head), "source-missing").where == "lm_head.weight"


def test_a_changed_model_card_is_a_warning_only(pair: tuple[Path, Path], writable: Callable[[Path], Path]) -> None:
    source, out = pair[0], writable(pair[1])
    (out / "README.md").write_text("# pruned\n")
    report = verify(out, source=source)
    assert report.sound
    assert {(p.code, p.where) for p in report.warnings} == {("record", "README.md"), ("source-sidecar", "README.md")}


def test_another_source_is_a_warning_as_long_as_the_bytes_are_equal(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    out = pruned(source, tmp_path / "out")
    report = verify(out, source=write(tmp_path / "again", shards=3))
    assert report.sound
    assert [p.code for p in report.warnings] == ["other-source"]


def test_what_a_quantized_output_holds_in_16_bits_is_compared_byte_for_byte(small_moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert CliRunner().invoke(main, ["quantize", str(small_moe), str(out), "--quiet"]).exit_code == 0
    assert sound(verify(out, source=small_moe))
    embedding = Checkpoint.open(out).tensors["model.embed_tokens.weight"].ranges[0]
    shard = out / embedding.file
    broken = bytearray(shard.read_bytes())
    broken[embedding.offset + 77] ^= 1
    shard.write_bytes(broken)
    problem = found(verify(out, source=small_moe), "source-bytes")
    assert (problem.where, problem.message.split(",")[1]) == ("model.embed_tokens.weight", " the first at 77")


# -- the record ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "where", "message"),
    [
        (lambda out: (out / "tokenizer.json").write_text("[]"), "tokenizer.json", "changed"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json", "missing"),
        (lambda out: (out / "config.json").write_text((out / "config.json").read_text() + " "), "config.json", "chang"),
        (lambda out: (out / "shardxform.json").write_text("{"), "shardxform.json", "damaged"),
        (lambda out: edit_record(out, lambda r: r["files"].update({"../x": None})), "shardxform.json", "outside"),
        (lambda out: edit_record(out, lambda r: r.update(inputs=None)), "shardxform.json", "damaged"),
    ],
)
def test_files_are_held_against_the_record(
    change: Callable[[Path], object],
    where: str,
    message: str,
    pair: tuple[Path, Path],
    writable: Callable[[Path], Path],
) -> None:
    out = writable(pair[1])
    change(out)
    problem = found(verify(out), "record")
    assert problem.where == where
    assert message in problem.message


@pytest.mark.parametrize("manifest", [{"keep": {"0": [1, 2]}}, {"keep": {"0": "x"}}, {"x": 1}, [], 7])
def test_a_recorded_manifest_that_does_not_fit_is_a_problem(
    manifest: object, pair: tuple[Path, Path], writable: Callable[[Path], Path]
) -> None:
    out = writable(pair[1])
    edit_record(out, lambda r: r["inputs"].update(manifest=manifest))
    assert found(verify(out, source=pair[0]), "source-manifest").where == "shardxform.json"


def edit_record(out: Path, change: Callable[[Any], object]) -> None:
    record = json.loads((out / "shardxform.json").read_text())
    change(record)
    write_json(out / "shardxform.json", record)


# -- errors of the caller -----------------------------------------------------------------------------------------


def test_only_errors_of_the_caller_are_raised(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    with pytest.raises(CheckpointError, match="no such directory"):
        verify(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        verify(out, source=tmp_path)
    with pytest.raises(ManifestError, match="no entry for layers"):
        verify(out, source=source, manifest=Manifest(keep={0: (1, 2)}))
    (tmp_path / "keep.json").write_text("[]")
    with pytest.raises(ManifestError, match="expected an object"):
        verify(out, source=source, manifest=tmp_path / "keep.json")
    assert codes(verify(tmp_path)) == ["config"]


# -- random damage ------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=40)
def test_any_flipped_bit_of_the_data_is_found_with_the_source(pair: tuple[Path, Path], draw: st.DataObject) -> None:
    source, out = pair
    shard = draw.draw(st.sampled_from(Checkpoint.open(out).shards))
    path, at = out / shard.name, draw.draw(st.integers(shard.data_start, shard.nbytes - 1))
    whole = path.read_bytes()
    try:
        broken = bytearray(whole)
        broken[at] ^= 1 << draw.draw(st.integers(0, 7))
        path.write_bytes(broken)
        assert "source-bytes" in codes(verify(out, source=source))
    finally:
        path.write_bytes(whole)


@given(st.data())
@settings(max_examples=60)
def test_no_damage_to_headers_index_or_config_raises(pair: tuple[Path, Path], draw: st.DataObject) -> None:
    source, out = pair
    name = draw.draw(st.sampled_from([Checkpoint.open(out).shards[0].name, INDEX, "config.json", "shardxform.json"]))
    path = out / name
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little") if name.endswith(".safetensors") else len(whole)
    try:
        path.write_bytes(draw.draw(strategies.mutations(whole[:length])) + whole[length:])
        report = verify(out, source=source, quick=draw.draw(st.booleans()))
        assert json.dumps(report.to_dict(), ensure_ascii=False).encode()
    finally:
        path.write_bytes(whole)


VALUES: list[object] = [None, True, -1, 0, 1, 3, 10**9, 10**30, 0.5, "", "x", [], [1], {}, {"a": {"b": 1}}]


@given(st.data())
@settings(max_examples=60)
def test_no_value_in_a_config_raises(pair: tuple[Path, Path], draw: st.DataObject) -> None:
    _, out = pair
    path = out / "config.json"
    whole = path.read_bytes()
    config = json.loads(whole)
    home = draw.draw(st.sampled_from([config, config["text_config"], config["vision_config"]]))
    keys = [*home, "quantization_config", "layer_types", "dtype"]
    home[draw.draw(st.sampled_from(keys))] = draw.draw(st.sampled_from(VALUES))
    try:
        write_json(path, config)
        verify(out, quick=True)
    finally:
        path.write_bytes(whole)


@settings(max_examples=40)
@given(
    st.sampled_from(["gptq", "auto-round", "compressed-tensors", "fp8", "x", 5]),
    st.dictionaries(
        st.sampled_from(
            ["bits", "sym", "packing_format", "extra_config", "dynamic", "ignore", "block_name_to_quantize", "format"]
        ),
        st.sampled_from([*VALUES, {"(": {"bits": 16}}, ["re:(", 5], {"-:[": {}}, "model.layers", [5, "model.layers"]]),
    ),
)
def test_no_quantization_config_raises(pair: tuple[Path, Path], method: object, keys: dict[str, object]) -> None:
    _, out = pair
    path = out / "config.json"
    whole = path.read_bytes()
    try:
        write_json(path, {**json.loads(whole), "quantization_config": {"quant_method": method, **keys}})
        verify(out, quick=True)
    finally:
        path.write_bytes(whole)


# -- numbers ------------------------------------------------------------------------------------------------------

NONFINITE: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "BF16": ("<u2", lambda b: ~np.isfinite((b.astype("<u4") << 16).view("<f4"))),
    "F16": ("<u2", lambda b: ~np.isfinite(b.view("<f2"))),
    "F32": ("<u4", lambda b: ~np.isfinite(b.view("<f4"))),
    "F64": ("<u8", lambda b: ~np.isfinite(b.view("<f8"))),
    "F8_E4M3": ("<u1", lambda b: (b == 0x7F) | (b == 0xFF)),
    "F8_E5M2": ("<u1", lambda b: np.isin(b, [0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF])),
}


@given(st.sampled_from(list(NONFINITE)), st.integers(1, 4), st.integers(0, 6), st.integers(0, 2**32), st.integers(0, 3))
@settings(max_examples=80)
def test_the_scan_equals_numpy_on_any_bits(dtype: str, rows: int, bad: int, seed: int, zero: int) -> None:
    code, nonfinite = NONFINITE[dtype]
    rng = np.random.default_rng(seed)
    bits = np.frombuffer(rng.bytes(rows * 16 * np.dtype(code).itemsize), code).copy().reshape(rows, 16)
    bits[nonfinite(bits)] = 0
    flat = bits.reshape(-1)
    for special in rng.choice(flat.size, bad):
        flat[special] = rng.integers(0, np.iinfo(code).max, dtype=code, endpoint=True)
    sign = 1 << (8 * bits.itemsize - 1)
    if zero < rows:
        bits[zero] = rng.choice(np.array([0, sign], code), 16)
    expected = nonfinite(flat)
    nonzero, count, first = jobs.scan_floats(bits.view("u1").reshape(-1), jobs.FLOATS[dtype], bits.nbytes // rows)
    assert count == expected.sum()
    assert first == (expected.argmax() if expected.any() else -1)
    assert nonzero.tolist() == [bool(((row & (sign - 1)) != 0).any()) for row in bits]


@pytest.mark.parametrize("chunk", [8, 64, 200, 384, 1000, 100_000])
@pytest.mark.parametrize("jobs", [1, 3])
def test_what_is_found_does_not_depend_on_buffers_or_threads(
    chunk: int, jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "source"), tmp_path / "out"
    config, tensors = tiny("qwen3_5_moe_text")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    values = tensors[name].array().copy()
    values[2] = 0
    values[6, 23, 15] = 0x7F80
    values[4, 0, 3] = 0xFFC1
    tensors[name] = Raw("BF16", values.shape, values.tobytes())
    write_checkpoint(out, tensors, config, files=SIDECARS)
    monkeypatch.setattr(data, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(data, "_TASK_BYTES", 5000)
    report = verify(out, source=source, jobs=jobs)
    nan = found(report, "not-finite")
    assert (nan.where, nan.message) == (
        name,
        "2 of 3072 values are NaN or infinite, the first at 1539 (expert 4)",
    )
    assert "(expert 2)" in found(report, "source-bytes").message
    assert [(p.where, p.message.split(":")[0]) for p in report.warnings] == [(name, "expert 2")]


def test_a_shard_that_shrinks_while_it_is_read_is_a_problem(tmp_path: Path) -> None:
    root = write(tmp_path / "out")
    checkpoint = Checkpoint.open(root)
    shard = root / checkpoint.shards[1].name
    shard.write_bytes(shard.read_bytes()[:-100])
    from shardxform.verification.findings import Findings

    findings = Findings()
    data.check_data(checkpoint, None, None, findings)
    assert [(p.code, p.where) for p in findings.problems] == [("unreadable", shard.name)]
    with pytest.raises(CheckpointError, match=r"model-00002.*file ends at byte"):
        data.check_data(
            Checkpoint.open(write(tmp_path / "whole")), None, data.Against(root, checkpoint.tensors), Findings()
        )


def test_progress_ends_at_the_total_and_an_interrupt_stops_at_once(tmp_path: Path) -> None:
    root, seen = write(tmp_path / "out"), []
    verify(root, on_progress=seen.append)
    assert seen[-1] == Progress(Checkpoint.open(root).nbytes, Checkpoint.open(root).nbytes, 0)

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(root, on_progress=interrupt)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured through /proc")
def test_memory_is_bounded_whatever_the_tensor(tmp_path: Path) -> None:
    """A tensor of 268 MB, in a file of holes, beside its equal: two buffers a thread."""
    shape = (8, 4096, 4096)
    head = {"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2 * 8 * 4096 * 4096]}}
    text = json.dumps(head).encode().ljust(128)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", tiny("qwen3_5_moe_text")[0])
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.write((128).to_bytes(8, "little") + text)
            file.truncate(8 + 128 + 2 * 8 * 4096 * 4096)
    code = (
        "import sys; from shardxform.verification.data import *; from shardxform.verification.findings import *\n"
        "from shardxform.checkpoint.table import Checkpoint\n"
        "a, b = (Checkpoint.open(p) for p in sys.argv[1:])\n"
        "print(check_data(a, None, Against(b.root, b.tensors), Findings(), jobs=2).bytes_compared)\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(int(status['VmHWM'].split()[0]) * 1024)"  # ru_maxrss would count what the parent had
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], check=True, capture_output=True, text=True
    )
    compared, peak = map(int, done.stdout.split())
    assert compared == 2 * 8 * 4096 * 4096
    assert peak < 120e6


def test_quick_needs_no_numpy(tmp_path: Path) -> None:
    root, source = write(tmp_path / "out"), write(tmp_path / "source")
    code = (
        "import sys; import shardxform.cli.verify; from shardxform.verification import verify\n"
        "assert verify(sys.argv[1], source=sys.argv[2], quick=True).sound; assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, root, source], check=True)


# -- the command --------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_the_command_says_sound_and_exits_with_zero(pair: tuple[Path, Path]) -> None:
    source, out = pair
    result = invoke(out, "--source", source)
    assert result.exit_code == 0
    assert result.stdout.startswith("sound: ")
    count = verify(out).tensors
    assert result.stdout.endswith(f" scanned; values of all {count} tensors equal to {source}, byte for byte\n")
    assert result.stderr.startswith("verify: ")
    assert invoke(out, "--quiet").stderr == ""
    looked = f"sound: {count} tensors, 20 experts, headers only"
    assert invoke(out, "--quick").stdout == f"{looked}; values not compared, no --source given\n"
    assert invoke(out, "--quick", "--source", source).stdout == f"{looked}; no value compared with {source}\n"


def test_the_command_lists_what_is_wrong_and_exits_with_one(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    for name in [n for n in tensors if ".experts.5." in n]:
        del tensors[name]
    for number in range(30):
        tensors[f"model.router{number}.{chr(0x1B)}[2J"] = random_tensor("x", "BF16", (2, 2))
    root = write_checkpoint(tmp_path / "out", tensors, config)
    result = invoke(root)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == f"{root}: 31 problems, 1 warning"
    assert "  layers 0..2, expert 5  missing: mlp.experts.{e}.{gate_proj,up_proj,down_proj}.weight (9 tensors)" in lines
    assert "  and 22 more; --json lists all" in lines
    assert "warning: tokenizer" in lines
    assert "\x1b" not in result.stdout
    whole = json.loads(invoke(root, "--json", "--quiet").stdout)
    assert (whole["sound"], len(whole["problems"])) == (False, 31)


@pytest.mark.parametrize("more", [(), ("--source",), ("--quick",)])
def test_of_an_unfinished_output_it_says_that_alone(more: tuple[str, ...], tmp_path: Path) -> None:
    source = write(tmp_path / "source", "qwen3_6_moe")
    out = tmp_path / "out"
    plan = plan_prune(Checkpoint.open(source), halved(source), ViewOptions(max_shard_bytes=30_000))
    for effect in (4, 12, 40):
        with pytest.raises(ExecutionError):
            run(plan, out, RunOptions(jobs=1), fs=Failing(effect))
        result = invoke(out, *more, *([source] if more == ("--source",) else ()), "-q")
        assert result.exit_code == 1
        assert result.stdout == (
            f"{out}: unfinished: the run that writes it was stopped, or is not done yet;"
            " run the same command again, and it goes on\n"
        )
        report = verify(out)
        assert (report.unfinished, codes(report), report.warnings) == (True, ["unfinished"], ())
    run(plan, out)
    assert sound(verify(out, source=source))
    (out / ".shardxform").mkdir()  # as a crash after the last file may leave it
    (problem,) = verify(out, source=source).problems
    assert (problem.code, problem.where) == ("unfinished", ".shardxform")


def test_the_command_counts_tensors_that_differ(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    other = halved(source, True)
    manifest = Manifest(keep=dict.fromkeys(other.keep, (0, 1, 2, 3)), mtp_keep=other.mtp_keep)
    write_json(tmp_path / "keep.json", manifest.to_dict())
    result = invoke(out, "--source", source, "-m", tmp_path / "keep.json")
    assert result.exit_code == 1
    assert "12 problems, 12 of " in result.stdout
    assert f" tensors differ from {source}" in result.stdout


def test_the_command_tells_the_caller_what_is_missing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert invoke(pair[1], "--text-only").exit_code == 2
    assert invoke(pair[1], "--mtp", "drop").exit_code == 2
    result = invoke(tmp_path / "nowhere")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no such directory" in result.stderr


def test_a_checkpoint_does_not_prove_itself(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = pair
    (tmp_path / "link").symlink_to(out)
    for source in (out, tmp_path / "link"):
        with pytest.raises(CheckpointError, match="as source, found itself"):
            verify(out, source=source)


def test_a_manifest_other_than_the_recorded_one_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "source")
    out = pruned(source, tmp_path / "out")
    used = halved(source)
    assert not verify(out, source=source, manifest=used).warnings
    layers = {
        layer: tuple(reversed([e for e in range(8) if e not in keep]))[: len(keep)] for layer, keep in used.keep.items()
    }
    other = Manifest(keep={layer: tuple(sorted(keep)) for layer, keep in layers.items()})
    report = verify(out, source=source, manifest=other)
    assert not report.sound
    assert [each.message for each in report.warnings] == ["records another manifest than the one given"]
