"""Models in GGUF as sources: pruned by slabs, whatever their blocks, against the `gguf` package and llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from build import write_json
from click.testing import CliRunner
from ggufs import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    Kind,
    blocks,
    fields_of,
    moe_metadata,
    moe_tensors,
    quantized,
    read_gguf,
    write_gguf,
)
from llama import Llama
from strategies import picked

from shardxform.ask.manifest import Manifest
from shardxform.ask.width import Width
from shardxform.base.gguf import TYPES
from shardxform.checkpoint.gguf import GgufModel, open_gguf
from shardxform.checkpoint.identity import identify
from shardxform.checkpoint.table import find_gguf
from shardxform.cli import main
from shardxform.errors import CheckpointError, FamilyError, ManifestError, PlanError, ShardxformError
from shardxform.execution.runner import run
from shardxform.plan.slabs import inspect_gguf, plan_prune_gguf, pruned_gguf
from shardxform.verification.findings import Findings
from shardxform.verification.independent_gguf import check_gguf_independently

KEEP = {0: (0, 2, 5, 7), 1: (1, 2, 3, 6)}
COUNT = "qwen3moe.expert_count"
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]


def opened(path: Path) -> GgufModel:
    first = find_gguf(path)
    assert first is not None
    return open_gguf(first)


def sliced(tensors: dict[str, Any], keep: dict[int, tuple[int, ...]] = KEEP) -> dict[str, Any]:
    """What pruning must give, of arrays and of blocks: rows of whatever counts experts."""
    out = {}
    for name, value in tensors.items():
        counts = "_exps." in name or "ffn_gate_inp." in name or "exp_probs_b" in name
        kind, array = value if isinstance(value, tuple) else (None, value)
        array = array[list(keep[int(name.split(".")[1])])] if counts else array
        out[name] = (kind, array) if kind is not None else array
    return out


def manifest_file(folder: Path, keep: dict[int, tuple[int, ...]] = KEEP, **other: Any) -> Path:
    lists = {str(layer): list(ids) for layer, ids in keep.items()}
    write_json(folder / "keep.json", {"format": "shardxform.keep", "version": 1, "keep": lists, **other})
    return folder / "keep.json"


def call(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [*map(str, args)])
    assert result.exit_code == code, result.output
    return result.output


def extended(kind: Kind) -> dict[str, Any]:
    """The small model with experts in blocks of any type, and all else that may count experts beside them."""
    rng, tensors = np.random.default_rng(1), dict(moe_tensors())
    for layer in range(LAYERS):
        b = f"blk.{layer}."
        for name in ("gate", "up", "down"):
            tensors[f"{b}ffn_{name}_exps.weight"] = blocks(rng, kind, (EXPERTS, 3, 256))
            tensors[f"{b}ffn_{name}_exps.bias"] = rng.random((EXPERTS, 5), "f4")
            tensors[f"{b}ffn_{name}_exps.scale"] = rng.random(EXPERTS, "f4")
            tensors[f"{b}ffn_{name}_exps.input_scale"] = rng.random(EXPERTS if layer else 1, "f4")
        tensors[f"{b}ffn_gate_inp.bias"] = rng.random(EXPERTS, "f4")
        tensors[f"{b}exp_probs_b.bias"] = rng.random(EXPERTS, "f4")
        tensors[f"{b}exp_probs_b_vl.bias"] = rng.random(EXPERTS, "f4")
        tensors[f"{b}ffn_norm_exps.weight"] = rng.random(EXPERTS, "f4")  # which is as wide as there are experts
    return tensors


def wanted_of(tensors: dict[str, Any]) -> dict[str, Any]:
    """As `sliced`, with norms and what is one for all experts as they are."""
    alike = {
        name: value for name, value in tensors.items() if "_norm_" in name or ("0.ffn" in name and "input_s" in name)
    }
    return sliced({name: value for name, value in tensors.items() if name not in alike}) | alike


@pytest.mark.parametrize("kind", picked([Kind[name] for name in TYPES if name in Kind.__members__], 4))
def test_slabs_of_any_block_type_are_copied(kind: Kind, tmp_path: Path) -> None:
    if kind.name.startswith(("F", "BF", "I")) and kind.name[1:].isdigit():
        pytest.skip("no blocks")
    tensors = extended(kind)
    (source,) = write_gguf(tmp_path / "m.gguf", moe_metadata(), tensors)
    run(plan_prune_gguf(opened(source), Manifest(keep=KEEP)), tmp_path / "out")
    wanted = wanted_of(tensors)
    (reference,) = write_gguf(tmp_path / "ref.gguf", moe_metadata(expert_count=4), {n: wanted[n] for n in tensors})
    assert (tmp_path / "out" / "model.gguf").read_bytes() == reference.read_bytes()


def test_what_stays_is_the_slices_that_the_package_reads(tmp_path: Path) -> None:
    (source,) = write_gguf(tmp_path / "m.gguf", moe_metadata(), quantized(moe_tensors(), Kind.Q8_0))
    run(plan_prune_gguf(opened(source), Manifest(keep=KEEP)), tmp_path / "out")
    out = tmp_path / "out" / "model.gguf"
    before, after = read_gguf(source), read_gguf(out)
    for name, value in sliced(before).items():
        assert np.array_equal(after[name], value), name
    assert fields_of(out) == fields_of(source) | {COUNT: 4}
    assert list(fields_of(out)) == list(fields_of(source))
    assert list(after) == list(before)


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("kind", [None, Kind.Q8_0, Kind.Q5_1])
def test_llama_cpp_computes_the_same_as_of_a_file_of_the_experts_kept(
    kind: Kind | None, files: int, tmp_path: Path
) -> None:
    tensors: dict[str, Any] = dict(moe_tensors())
    tensors = quantized(tensors, kind) if kind else tensors
    written = write_gguf(tmp_path / "m.gguf", moe_metadata(), tensors, max_tensors=0 if files == 1 else 11)
    (reference,) = write_gguf(tmp_path / "ref.gguf", moe_metadata(expert_count=4), sliced(tensors))
    run(plan_prune_gguf(opened(written[0]), Manifest(keep=KEEP)), tmp_path / "out")
    out = sorted((tmp_path / "out").glob("*.gguf"))
    assert len(out) == files
    with Llama(out[0]) as ours, Llama(reference) as theirs, Llama(written[0]) as whole:
        logits = ours.logits(TEXT)
        assert np.array_equal(logits, theirs.logits(TEXT))
        assert np.abs(logits - whole.logits(TEXT)).max() > 0.1  # other experts answer


def test_files_of_a_split_model_stay_apart(tmp_path: Path) -> None:
    """Each by itself, as if the package had split the pruned model in the same places."""
    tensors = moe_tensors()
    files = write_gguf(tmp_path / "m.gguf", moe_metadata(), tensors, max_tensors=10)
    (tmp_path / "ref").mkdir()
    reference = write_gguf(tmp_path / "ref" / "m.gguf", moe_metadata(expert_count=4), sliced(tensors), max_tensors=10)
    for named in (files[0], files[2], tmp_path):
        out = tmp_path / f"out-{named.stem}"
        call("prune", "-m", manifest_file(tmp_path), named, out, "-q")
        found = sorted(out.glob("*.gguf"))
        assert [path.name for path in found] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
        assert [path.read_bytes() for path in found] == [path.read_bytes() for path in reference]


def test_a_size_splits_it_anew(tmp_path: Path) -> None:
    tensors, keep = moe_tensors(), manifest_file(tmp_path)
    files = write_gguf(tmp_path / "m.gguf", moe_metadata(), tensors, max_tensors=10)
    (whole,) = write_gguf(tmp_path / "ref.gguf", moe_metadata(expert_count=4), sliced(tensors))
    call("prune", "-m", keep, files[0], tmp_path / "one", "-q", "--max-shard-size", "1GB")
    assert (tmp_path / "one" / "model.gguf").read_bytes() == whole.read_bytes()
    reference = write_gguf(tmp_path / "split.gguf", moe_metadata(expert_count=4), sliced(tensors), max_bytes=200_000)
    call("prune", "-m", keep, files[0], tmp_path / "small", "-q", "--max-shard-size", "200kB")
    found = sorted((tmp_path / "small").glob("*.gguf"))
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in reference]
    assert len(found) > 1


def test_blocks_that_predict_further_tokens_are_pruned_with_the_others(tmp_path: Path) -> None:
    tensors = dict(moe_tensors())
    tensors |= {name.replace("blk.1.", "blk.2."): value + 1 for name, value in tensors.items() if "blk.1." in name}
    tensors["blk.2.nextn.eh_proj.weight"] = np.ones((HIDDEN, 2 * HIDDEN), "f4")
    metadata = moe_metadata(block_count=3, nextn_predict_layers=1)
    (source,) = write_gguf(tmp_path / "m.gguf", metadata, tensors)
    model = opened(source)
    with pytest.raises(ManifestError, match="mtp_keep: missing, but block 2 predicts further tokens"):
        plan_prune_gguf(model, Manifest(keep=KEEP))
    run(plan_prune_gguf(model, Manifest(keep=KEEP, mtp_keep={0: (4, 5, 6, 7)})), tmp_path / "out")
    found = read_gguf(tmp_path / "out" / "model.gguf")
    for name, value in sliced(tensors, {**KEEP, 2: (4, 5, 6, 7)}).items():
        assert np.array_equal(found[name], value), name
    assert inspect_gguf(model).slabs.mtp_layers == (0,)  # type: ignore[union-attr]


# -- refused ----------------------------------------------------------------------------------------------------------


def without(*endings: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {name: value for name, value in tensors.items() if not name.endswith(endings)}


def plus(name: str, *shape: int, dtype: str = "f4") -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: tensors | {name: np.zeros(shape, dtype)}


SAME = without("nothing")
REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "chunks": ({}, plus("blk.0.ffn_up_chexps.weight", 4, 8, 8), "chunks of several experts, as of grovemoe"),
    "hash routing": ({}, plus("blk.0.ffn_gate_tid2eid.weight", 300, 2, dtype="i4"), "ids of experts by token"),
    "old names": ({}, plus("blk.0.ffn_gate.3.weight", 32, 64), "one expert by itself, as old files have them"),
    "vision": ({}, plus("v.blk.0.ffn_up_exps.weight", 8, 8, 8), "experts of a vision tower"),
    "unknown": ({}, plus("blk.0.ffn_side_exps.weight", 8, 8, 8), "looks like a part of experts or a router"),
    "router's": ({}, plus("blk.0.ffn_gate_inp.scale", 8), "looks like a part of experts or a router"),
    "unknown, by its shape": ({}, plus("blk.0.ffn_side.weight", 8, 8), "looks like a part of experts or a router"),
    "a value each": ({"expert_bias": [1.0] * 8}, SAME, "qwen3moe.expert_bias: 8 values, one for each expert"),
    "other count": ({}, plus("blk.0.exp_probs_b.bias", 9), "'blk.0.exp_probs_b.bias' is [9]: expected 1 dimensions"),
    "other rank": ({}, plus("blk.0.ffn_up_exps.bias", 8), "expected 2 dimensions"),
    "no router": ({}, without("1.ffn_gate_inp.weight"), "block 1 has ffn_down_exps.weight, ffn_gate_exps.weight"),
    "no up": ({}, without("0.ffn_up_exps.weight"), "block 0 has"),
    "no experts": ({}, without("_exps.weight", "ffn_gate_inp.weight"), "no expert tensor, though"),
    "blocks": ({"block_count": 1}, SAME, "but qwen3moe.block_count is 1"),
    "many": ({"expert_count": 1025}, SAME, "expert_count is 1025, of which 2 are used: expected 1 to 1024"),
    "a count each": ({"expert_count": [8, 8]}, SAME, "expected one count for all blocks, found an array of 2"),
    "no number": ({"expert_used_count": "2"}, SAME, "expected one count for all blocks, found STRING '2'"),
    "groups": ({"expert_group_count": 3}, SAME, "8 experts in 3 groups"),
    "nextn": ({"nextn_predict_layers": 2}, SAME, "2 blocks, 2 of them nextn"),
    "a block short": ({"block_count": 3}, SAME, "no tensor of block 2, though qwen3moe.block_count is 3"),
    "no nextn": ({"nextn_predict_layers": 1}, SAME, "block 1 has no nextn tensor, though"),
    "more groups used": ({"expert_group_count": 2, "expert_group_used_count": 3}, SAME, "in 2 groups, 3 of which are"),
    "dense blocks": ({"leading_dense_block_count": 1}, SAME, "block 0 has experts, though"),
    "no dense blocks": (
        {"leading_dense_block_count": 0},
        lambda t: {name: value for name, value in t.items() if "blk.1.ffn" not in name or "norm" in name},
        "block 1 has no experts, though",
    ),
    "nextn where none is": ({}, plus("blk.0.nextn.enorm.weight", 64), "blocks that predict further tokens begin at 2"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_taken_out_is_refused(fault: str, tmp_path: Path) -> None:
    keys, change, message = REFUSED[fault]
    (source,) = write_gguf(tmp_path / "m.gguf", moe_metadata(**keys), change(dict(moe_tensors())))
    with pytest.raises((PlanError, FamilyError), match=r"m\.gguf: ") as e:
        plan_prune_gguf(opened(source), Manifest(keep=KEEP))
    assert message in str(e.value)
    assert inspect_gguf(opened(source)).refusal in str(e.value)
    assert not call("prune", "-m", manifest_file(tmp_path), source, tmp_path / "out", code=1).count("Traceback")
    assert not (tmp_path / "out").exists()


def test_a_source_that_verify_calls_unsound_is_refused(tmp_path: Path) -> None:
    tensors = moe_tensors()
    tensors["blk.0.attn_w.weight"] = tensors.pop("blk.0.attn_v.weight")
    del tensors["output_norm.weight"]
    write_gguf(tmp_path / "m.gguf", moe_metadata(), tensors)
    said = call("prune", tmp_path / "m.gguf", tmp_path / "out", "-m", manifest_file(tmp_path), code=1)
    assert "its output would not be sound: output_norm.weight: missing" in said
    assert f"see `shardxform verify {tmp_path / 'm.gguf'}`" in said
    assert not (tmp_path / "out").exists()


def test_maverick_keeps_the_count_that_llama_knows_it_by(tmp_path: Path) -> None:
    """Of Llama 4 llama.cpp leaves norms of queries and keys out where there are 128 experts."""
    keys = {name.replace("qwen3moe.", "llama4."): value for name, value in moe_metadata(expert_count=128).items()}
    (source,) = write_gguf(tmp_path / "m.gguf", keys, moe_tensors(experts=128), arch="llama4")
    with pytest.raises(PlanError, match=r"128 experts, of which 4 would stay; by 128 llama\.cpp knows"):
        plan_prune_gguf(opened(source), Manifest(keep=KEEP))
    keys["llama4.expert_count"] = 8
    (source,) = write_gguf(tmp_path / "s.gguf", keys, moe_tensors(), arch="llama4")
    assert plan_prune_gguf(opened(source), Manifest(keep=KEEP)).steps


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    metadata = {key: value for key, value in moe_metadata().items() if ".expert_" not in key}
    dense = {name: value for name, value in moe_tensors().items() if "_exps." not in name and "gate_inp" not in name}
    (source,) = write_gguf(tmp_path / "m.gguf", metadata, dense)
    with pytest.raises(FamilyError, match="a model without experts"):
        plan_prune_gguf(opened(source), Manifest(keep=KEEP))
    assert "not prunable  no key qwen3moe.expert_count: a model without experts" in call("inspect", source)
    assert f"sound: {len(dense)} tensors" in call("verify", source)


def test_manifests_are_held_against_the_file(tmp_path: Path) -> None:
    groups = moe_metadata(expert_group_count=2, expert_group_used_count=1)
    model = opened(write_gguf(tmp_path / "m.gguf", groups, moe_tensors())[0])
    for keep, message in (
        ({0: (0, 4)}, "no entry for layer 1"),
        ({0: (0, 4), 1: (0, 4), 2: (0, 4)}, "there is no layer 2"),
        ({0: (0,), 1: (4,)}, r"the router picks 2 per token \(qwen3moe.expert_used_count\)"),
        ({0: (0, 1, 4, 5), 1: (0, 1, 4)}, "layer 1 keeps 3 experts, but layer 0 keeps 4"),
        ({0: (0, 1, 4, 8), 1: (0, 1, 4, 5)}, "expert 8, but layer 0 has experts 0..7"),
        ({0: (0, 1, 2, 4), 1: (0, 1, 4, 5)}, r"each of the 2 groups \(qwen3moe.expert_group_count\)"),
        ({0: (0, 4), 1: (0, 4)}, "the router needs two to score a group"),
    ):
        with pytest.raises(ManifestError, match=message):
            pruned_gguf(model, Manifest(keep=keep))
    keep = {0: (0, 1, 4, 5), 1: (0, 3, 6, 7)}
    assert pruned_gguf(model, Manifest(keep=keep)).sliced == 8
    width = Width(channels=1, of=2, kept=dict.fromkeys(keep, (b"\1",) * 4))
    with pytest.raises(ManifestError, match="width: columns of blocks are not taken out of a GGUF file"):
        pruned_gguf(model, Manifest(keep=keep, width=width))


def test_a_manifest_is_bound_to_what_it_was_chosen_on(tmp_path: Path) -> None:
    one, other = (write_gguf(tmp_path / f"{n}.gguf", moe_metadata(), moe_tensors(n))[0] for n in (1, 2))
    told = {"model_type": "qwen3_moe", "num_layers": 2, "num_experts": 8}
    keep = manifest_file(tmp_path, model={**told, "identity": identify(opened(one).table).to_dict()})
    call("prune", "-m", keep, one, tmp_path / "out1", "-q")
    assert "chosen on another checkpoint" in call("prune", "-m", keep, other, tmp_path / "out2", "-q", code=1)
    call("prune", "-m", keep, other, tmp_path / "out2", "-q", "--any-source")
    strange = manifest_file(tmp_path, model={**told, "model_type": "qwen3_next"})
    assert "made for 'qwen3_next'" in call("prune", "-m", strange, one, tmp_path / "out3", "-q", code=1)
    call("prune", "-m", strange, one, tmp_path / "out3", "-q", "--any-source")
    wrong = manifest_file(tmp_path, model={**told, "num_layers": 3})
    assert "made for 3 layers" in call("prune", "-m", wrong, one, tmp_path / "out4", "--any-source", code=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-only"], "--text-only is for safetensors, but"),
        (["--mtp", "drop"], "--mtp is for safetensors, but"),
        (["--heal=all"], "--heal is for safetensors, but"),
        (["--ray"], "--ray is for safetensors, but"),
        (["--device", "cuda:0"], "--device is for safetensors, but"),
    ],
)
def test_options_for_safetensors_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    (source,) = write_gguf(tmp_path / "m.gguf", moe_metadata(), moe_tensors())
    assert message in call("prune", source, tmp_path / "out", "-m", manifest_file(tmp_path), *options, code=1)


def test_arguments_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    (source,) = write_gguf(tmp_path / "m.gguf", moe_metadata(), moe_tensors())
    keep = manifest_file(tmp_path)
    assert "give --manifest" in call("prune", source, tmp_path / "out", code=2)
    assert "OUT is the folder" in call("prune", "-m", keep, source, tmp_path / "out.gguf", code=2)
    assert "overlaps the source" in call("prune", "-m", keep, source, tmp_path, code=1)
    assert "no such file" in call("prune", "-m", keep, "x/m.gguf", tmp_path / "out", code=1)
    assert "a model in GGUF" in call("quantize", source, tmp_path / "out", code=1)
    assert "a model in GGUF" in call("quantize", tmp_path, tmp_path / "out", code=1)
    call("prune", "-m", keep, source, tmp_path / "below", "-q")  # beside the file, not in it


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_the_one_model_in_it(tmp_path: Path) -> None:
    (source,) = write_gguf(tmp_path / "m.gguf", moe_metadata(), moe_tensors())
    (tmp_path / "mmproj-m.gguf").write_bytes(source.read_bytes())
    (tmp_path / "README.md").write_text("about")
    assert find_gguf(tmp_path) == source
    assert opened(tmp_path).table.unread == ("mmproj-m.gguf",)
    assert "not part of it  mmproj-m.gguf" in call("inspect", tmp_path)
    (tmp_path / "n.gguf").write_bytes(source.read_bytes())
    with pytest.raises(CheckpointError, match=r"2 models in GGUF \(m.gguf, n.gguf, ...\); name the file of one"):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_gguf(tmp_path) is None


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    files = write_gguf(tmp_path / "m.gguf", moe_metadata(), moe_tensors(), max_tensors=10)
    data = [path.read_bytes() for path in files]
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003.gguf: no such file; the model is split into 3 files"):
        opened(files[0])
    files[1].write_bytes(data[2])
    with pytest.raises(CheckpointError, match=r"says split.no 2, split.count 3, split.tensors.count 27; expected 1, 3"):
        opened(files[0])
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(data[0])
    with pytest.raises(CheckpointError, match=r"says split.no 0, split.count 3, .*; expected 0, 1 and 10"):
        opened(alone)
    (other,) = write_gguf(tmp_path / "x" / "m.gguf" if (tmp_path / "x").mkdir() is None else tmp_path, {}, {})
    with pytest.raises(CheckpointError, match="no tensor; expected the file of a model"):
        opened(other)


def test_whatever_is_wrong_with_a_file_is_one_line(tmp_path: Path) -> None:
    (source,) = write_gguf(tmp_path / "m.gguf", moe_metadata(), moe_tensors())
    source.write_bytes(source.read_bytes()[:-40_000])
    for verb in (["inspect"], ["prune", "-m", manifest_file(tmp_path)]):
        out = [tmp_path / "out"] if verb[0] == "prune" else []
        assert "m.gguf: truncated: its head describes" in call(*verb, source, *out, code=1)
    assert "truncated" in call("verify", source, code=1)


# -- verified ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Path, Path]:
    """A source, and what was made of it."""
    (source,) = write_gguf(tmp_path / "m.gguf", moe_metadata(), moe_tensors())
    call("prune", "-m", manifest_file(tmp_path), source, tmp_path / "out", "-q")
    return source, tmp_path / "out"


def verified(out: Path, *args: object, code: int = 1) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(call("verify", out, *args, "--json", "-q", code=code))
    return value


def codes(report: dict[str, Any]) -> list[str]:
    return [problem["code"] for problem in report["problems"]]


def test_a_sound_output_is_proved(pruned: tuple[Path, Path]) -> None:
    source, out = pruned
    report = verified(out, "--source", source, code=0)
    assert (report["sound"], report["tensors"], report["experts"]) == (True, 27, 8)
    assert (report["values_compared"], report["tensors_digested"]) == (27, 27)
    assert "values of all 27 tensors equal to" in call("verify", out, "--source", source)
    assert verified(out / "model.gguf", "--source", source, "--quick", code=0)["values_compared"] == 0


def test_every_flipped_bit_is_found(pruned: tuple[Path, Path]) -> None:
    source, out = pruned
    path = out / "model.gguf"
    data, start = path.read_bytes(), opened(path).table.shards[0].data_start
    rng = np.random.default_rng(0)
    for at in [*rng.integers(0, start, 6), *rng.integers(start, len(data), 6)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        assert verified(out)["problems"], at
    path.write_bytes(data)
    (out / "shardxform.json").unlink()
    flipped = bytearray(data)
    flipped[-100] ^= 1
    path.write_bytes(flipped)
    assert "source-bytes" in codes(verified(out, "--source", source, "-m", manifest_file(source.parent)))


def test_other_experts_and_other_keys_are_found(pruned: tuple[Path, Path], tmp_path: Path) -> None:
    """In files that nobody recorded, and that llama.cpp loads without a word."""
    source, _ = pruned
    keep = manifest_file(tmp_path)
    tensors, other = moe_tensors(), {**KEEP, 1: (1, 2, 3, 5)}
    (tmp_path / "x").mkdir()
    (wrong,) = write_gguf(tmp_path / "x" / "a.gguf", moe_metadata(expert_count=4), sliced(tensors, other))
    report = verified(wrong, "--source", source, "-m", keep)
    assert {problem["where"] for problem in report["problems"]} == {
        *(f"blk.1.ffn_{name}_exps.weight" for name in ("gate", "up", "down")),
        "blk.1.ffn_gate_inp.weight",
    }
    metadata = moe_metadata(expert_count=4, context_length=64)
    (wrong,) = write_gguf(tmp_path / "x" / "b.gguf", metadata, sliced(tensors))
    assert codes(report := verified(wrong, "--source", source, "-m", keep)) == ["source-key"]
    assert report["problems"][0]["message"] == ("qwen3moe.context_length: UINT32 64, but UINT32 128 by the source")
    lost = {name: value for name, value in sliced(tensors).items() if name != "output.weight"}
    (wrong,) = write_gguf(tmp_path / "x" / "c.gguf", moe_metadata(expert_count=4), lost)
    assert codes(verified(wrong, "--source", source, "-m", keep)) == ["source-missing"]
    (wrong,) = write_gguf(tmp_path / "x" / "d.gguf", moe_metadata(expert_count=8), sliced(tensors))
    assert "experts" in codes(verified(wrong))
    assert codes(verified(wrong, "--source", source)) == ["experts", "source-manifest"]


def test_numbers_that_are_none_are_found(tmp_path: Path) -> None:
    tensors = moe_tensors()
    tensors["output_norm.weight"] = np.full(HIDDEN, np.nan, "f4")
    (source,) = write_gguf(tmp_path / "m.gguf", moe_metadata(), tensors)
    assert codes(verified(source)) == ["not-finite"]


def test_an_unfinished_output_is_told(pruned: tuple[Path, Path]) -> None:
    source, out = pruned
    (out / ".shardxform").mkdir()
    (out / "model.gguf").rename(out / "model.gguf.partial")
    assert verified(out)["unfinished"]
    assert "unfinished" in call("inspect", out, code=1)
    with pytest.raises(ShardxformError):
        plan_prune_gguf(replace(opened(source), name="other"), Manifest(keep={0: (0,)}))


def test_a_pruned_model_is_a_source_again(pruned: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = pruned
    keep = manifest_file(tmp_path, {0: (0, 3), 1: (1, 2)})
    call("prune", "-m", keep, out, tmp_path / "again", "-q")
    found = read_gguf(tmp_path / "again" / "model.gguf")
    for name, value in sliced(moe_tensors(), {0: (0, 7), 1: (2, 3)}).items():
        assert np.array_equal(found[name], value), name
    assert package.GGUFReader(tmp_path / "again" / "model.gguf").fields[COUNT].contents() == 2


def test_a_second_opinion_finds_the_same(pruned: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pruned
    assert "27 weights derived independently" in call("verify", out, "--source", source, "--independent")
    keep, tensors = manifest_file(tmp_path), moe_tensors()
    (tmp_path / "x").mkdir()
    metadata = moe_metadata(expert_count=3, context_length=64)
    (wrong,) = write_gguf(tmp_path / "x" / "a.gguf", metadata, sliced(tensors, {**KEEP, 1: (1, 2, 3, 5)}))
    findings = Findings()
    lists = {"keep": {str(layer): list(ids) for layer, ids in KEEP.items()}}
    assert check_gguf_independently([wrong], [source], findings, lists) == 27
    found = {problem.where: problem.message for problem in findings.problems}
    stacks = {f"blk.1.ffn_{name}_exps.weight" for name in ("gate", "up", "down")}
    assert found.keys() == stacks | {"blk.1.ffn_gate_inp.weight", COUNT, "qwen3moe.context_length"}
    assert found["blk.1.ffn_up_exps.weight"] == "expert 3 is not 6 of the source"
    assert found[COUNT] == "3, expected 4"
    assert "independent" in codes(verified(wrong, "--source", source, "-m", keep, "--independent"))
    lost = {name: value for name, value in sliced(tensors).items() if name != "output.weight"}
    (wrong,) = write_gguf(tmp_path / "x" / "b.gguf", moe_metadata(expert_count=4), lost)
    check_gguf_independently([wrong], [source], findings := Findings(), lists)
    missing = [(each.where, each.message) for each in findings.problems]
    assert missing == [("output.weight", "missing: the source has it")]
