"""GGUF as what an output is written in: preallocated, resumable, and complete with its last file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf as package
import pytest
from build import tiny, write_checkpoint
from faults import Counting, Crashing, forked, sampled
from ggufs import fields_of, read_gguf
from strategies import by_night, picked
from test_run import tree

from shardxform.base.gguf import KeyValue
from shardxform.base.tensors import ByteRange, TensorRef, TensorSpec
from shardxform.checkpoint.identity import identity_when_asked
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import OutputError, PlanError, ResumeError
from shardxform.execution.output import state_of
from shardxform.execution.runner import RunOptions, run
from shardxform.plan import plan as plan_module
from shardxform.plan.gguf_files import lay_out_gguf
from shardxform.plan.plan import Plan, copy_steps

METADATA = (
    KeyValue.of("general.architecture", "STRING", "tiny"),
    KeyValue.array("tokenizer.ggml.tokens", "STRING", ["a", "b"]),
)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "STEP_BYTES", 4096)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config, tensors = tiny("qwen3_moe")
    return write_checkpoint(tmp_path / "source", tensors, config, files={"tokenizer.json": "{}"})


def plan_of(source: Path, max_bytes: int | None = 2_000, rows: int = 7) -> Plan:
    """A plan that copies the first rows of some tensors, whose sizes are no multiples of 32."""
    checkpoint = Checkpoint.open(source)
    taken = [ref for ref in checkpoint.tensors.values() if len(ref.spec.shape) == 2 and ref.spec.shape[0] > rows]
    refs = {f"t{n}": ref.rows(0, rows).renamed(f"t{n}") for n, ref in enumerate(taken[:40])}
    refs["odd"] = TensorRef(TensorSpec("odd", "I8", (3, 5)), (ByteRange("model.safetensors", 200, 15),))
    shards = lay_out_gguf(METADATA, [ref.spec for ref in refs.values()], max_bytes)
    sidecars = {"tokenizer.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    return Plan(
        command="prune",
        source=source,
        source_shards=checkpoint.shards,
        view=checkpoint,
        shards=shards,
        steps=tuple(copy_steps(shards, refs)),
        config=b"",
        sidecars=sidecars,
        identity=identity_when_asked(checkpoint),
        stated={"command": "prune", "source": {"sidecars": sidecars}},
        container="gguf",
    )


def loads(out: Path) -> bool:
    """Whether a client would take `out` for complete: every file of the model has its name."""
    names = sorted(path.name for path in out.glob("*.gguf"))
    return bool(names) and (names == ["model.gguf"] or len(names) == int(names[0][-10:-5]))


@pytest.mark.parametrize("max_bytes", [None, 2_000])
def test_files_are_those_of_the_reference_writer(max_bytes: int | None, source: Path, tmp_path: Path) -> None:
    plan = plan_of(source, max_bytes)
    plan.check()
    run(plan, tmp_path / "out")
    written = sorted((tmp_path / "out").glob("*.gguf"))
    (tmp_path / "ref").mkdir()
    writer = package.GGUFWriter(tmp_path / "ref" / "model.gguf", "tiny", split_max_size=max_bytes or 0)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, data in read_gguf(*written).items():
        kind = package.GGMLQuantizationType.BF16 if name != "odd" else None
        writer.add_tensor(name, data.view("u1") if kind else data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reference = {path.name: path.read_bytes() for path in (tmp_path / "ref").iterdir()}
    assert {path.name: path.read_bytes() for path in written} == reference
    assert (len(written) > 3) is bool(max_bytes)


def test_the_numbers_are_the_sources(source: Path, tmp_path: Path) -> None:
    run(plan_of(source), tmp_path / "out")
    checkpoint, data = Checkpoint.open(source), (source / "model.safetensors").read_bytes()
    taken = [ref for ref in checkpoint.tensors.values() if len(ref.spec.shape) == 2 and ref.spec.shape[0] > 7][:40]
    found = read_gguf(*sorted((tmp_path / "out").glob("*.gguf")))
    for n, ref in enumerate(taken):
        place = ref.rows(0, 7).ranges[0]
        assert found[f"t{n}"].tobytes() == data[place.offset : place.end]


def test_a_finished_output_has_its_record_and_no_config(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = plan_of(source)
    run(plan, out)
    record = json.loads((out / "shardxform.json").read_bytes())
    assert set(record["shards"]) == {path.name for path in out.glob("*.gguf")}
    assert set(tree(out)) == {*record["files"], "shardxform.json"} == {*plan.files(), "shardxform.json"}
    assert "config.json" not in record["files"]
    assert len(record["digests"]["tensors"]) == 41
    assert state_of(out, plan).name == "finished"
    counting = Counting()
    assert run(plan, out, fs=counting).already_done
    assert counting.effects == 0


def test_every_file_but_the_first_says_only_which_it_is(source: Path, tmp_path: Path) -> None:
    run(plan_of(source), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.gguf"))
    own = {"split.no": 1, "split.count": len(files), "split.tensors.count": 41}
    assert fields_of(files[1]) == own
    assert fields_of(files[0]) == {"general.architecture": "tiny", "tokenizer.ggml.tokens": ["a", "b"]} | own | {
        "split.no": 0
    }


def crash_at(k: int, plan: Plan, out: Path) -> int:
    """Run in a child process that dies at effect `k`, starting over what others made; how it ended."""
    return forked(lambda: run(plan, out, RunOptions(jobs=1, force=True), fs=Crashing(k)))


@pytest.mark.crash
@pytest.mark.parametrize("max_bytes", picked([1_500, None], 2))
def test_a_crash_at_any_effect_loses_nothing_that_was_durable(
    max_bytes: int | None, source: Path, tmp_path: Path
) -> None:
    counting = Counting()
    run(plan_of(source, max_bytes), tmp_path / "count", RunOptions(jobs=1), fs=counting)
    finished, out = tree(tmp_path / "count"), tmp_path / "out"
    for k in sampled(counting.effects):
        plan = plan_of(source, max_bytes)
        assert crash_at(k, plan, out) == 9
        if loads(out):
            left = {name: data for name, data in tree(out).items() if not name.startswith(".shardxform")}
            assert left == finished, f"effect {k}"
        run(plan, out)
        assert tree(out) == finished, f"effect {k}"
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink()
        out.rmdir()


@by_night
@pytest.mark.crash
def test_starting_over_takes_the_last_file_first(source: Path, tmp_path: Path) -> None:
    """At no effect of replacing one output by another is there a whole model that is neither."""
    first, other = plan_of(source, 1_500), plan_of(source, 1_500, rows=6)
    run(other, tmp_path / "other")
    wanted = tree(tmp_path / "other")
    counting = Counting()
    run(first, tmp_path / "count")
    run(other, tmp_path / "count", RunOptions(jobs=1, force=True), fs=counting)
    assert tree(tmp_path / "count") == wanted
    for k in sampled(counting.effects, ends=8):
        out = tmp_path / f"out{k}"
        run(first, out)
        before = tree(out)
        assert crash_at(k, other, out) == 9
        if loads(out):
            left = {name: data for name, data in tree(out).items() if not name.startswith(".shardxform")}
            assert left in (before, wanted), f"effect {k}"
        run(other, out, RunOptions(force=True))
        assert tree(out) == wanted, f"effect {k}"


def test_what_is_not_ours_is_not_touched(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / plan.shards[-1].name).write_bytes(b"GGUF of somebody")
    with pytest.raises(OutputError, match="not an output of shardxform"):
        run(plan, tmp_path / "out")
    run(plan, tmp_path / "ours")
    with pytest.raises(ResumeError, match="made from other inputs"):
        run(replace(plan, stated={**plan.stated, "command": "other"}), tmp_path / "ours")
    with (tmp_path / "ours" / plan.shards[0].name).open("r+b") as file:
        file.write(b"X")
    with pytest.raises(ResumeError, match="missing or damaged in a finished output"):
        run(plan, tmp_path / "ours")


def test_padding_is_in_no_step(source: Path) -> None:
    """Steps tile the tensors and nothing but them: what lies between is zeros of a file made anew."""
    plan = plan_of(source, None)
    plan.check()
    copies = [step.segments for step in plan.steps]
    odd = next(segment for segments in copies for segment in segments if segment.source.length == 15)
    longer = odd._replace(source=odd.source._replace(length=16))
    for step, wrong in ((plan.steps[-1], longer), (plan.steps[-1], odd._replace(offset=odd.offset + 1))):
        segments = tuple(wrong if each == odd else each for each in step.segments)
        with pytest.raises(PlanError, match="internal: steps"):
            replace(plan, steps=(*plan.steps[:-1], replace(step, segments=segments))).check()
    with pytest.raises(PlanError, match="internal: steps leave"):
        replace(plan, steps=plan.steps[:-1]).check()
    with pytest.raises(PlanError, match="internal: steps do not tile"):
        replace(plan, steps=(*plan.steps, plan.steps[0])).check()


def test_what_cannot_be_laid_out_is_refused() -> None:
    spec = TensorSpec("t", "F32", (1,))
    with pytest.raises(PlanError, match="no tensor"):
        lay_out_gguf(METADATA, [])
    with pytest.raises(PlanError, match="would both be called 't'"):
        lay_out_gguf(METADATA, [spec, spec])
    with pytest.raises(PlanError, match="of which there can be 65535"):
        lay_out_gguf(METADATA, (TensorSpec(f"t{n}", "F32", (1,)) for n in range(1 << 16)), 1)


def test_an_alignment_of_its_own_is_kept_in_every_file() -> None:
    metadata = (*METADATA, KeyValue.of("general.alignment", "UINT32", 64))
    shards = lay_out_gguf(metadata, [TensorSpec(name, "F32", (3,)) for name in "abc"], 24)
    assert [len(shard.head) % 64 for shard in shards] == [0, 0]
    assert [[e.begin for e in shard.entries] for shard in shards] == [[0, 64], [0]]
    assert [shard.nbytes - len(shard.head) for shard in shards] == [128, 64]
    assert b"general.alignment" in shards[1].head
