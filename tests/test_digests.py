"""A digest of every tensor: what it is of, that it survives interruption, and that no flipped bit escapes it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from build import forget_digests, read_checkpoint, tiny, write_checkpoint
from faults import Short
from hypothesis import given
from hypothesis import strategies as st
from test_prune import manifest_of
from test_run import interrupted, looks_complete, plan_of

from shardxform.base import digests
from shardxform.base.file_system import FileSystem
from shardxform.base.strict_json import pretty
from shardxform.checkpoint.record import Record, RecordError, is_as_written, read_record
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ExecutionError, OutputError, PlanError
from shardxform.execution.runner import RunOptions, run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan import plan as plan_module
from shardxform.plan.convert import Target, plan_convert
from shardxform.plan.plan import Extent
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions
from shardxform.verification import verify


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config, tensors = tiny(
        "qwen3_5_moe_text", hidden_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=32
    )
    return write_checkpoint(tmp_path / "source", tensors, config, shards=2)


def by_hand(data: bytes, chunk: int = 16 << 20) -> str:
    pieces = [blake3(data[at : at + chunk]).digest() for at in range(0, len(data), chunk)]
    return (blake3(b"".join(pieces)) if len(pieces) > 1 else blake3(data)).digest()[:16].hex()


def recorded(out: Path) -> dict[str, str]:
    record = read_record(out / "shardxform.json")
    assert record is not None
    assert record.digests is not None
    return dict(record.digests)


@pytest.mark.parametrize("chunk", [16 << 20, 4096, 1000])
def test_digests_are_those_of_the_tensors_and_of_their_chunks(
    chunk: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(plan_module, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(plan_module, "STEP_BYTES", 10_000)
    monkeypatch.setattr("shardxform.checkpoint.record.CHUNK_BYTES", chunk)
    plan, out = plan_prune(Checkpoint.open(source), manifest_of(source)), tmp_path / "out"
    run(plan, out, fs=Short() if chunk == 4096 else None)
    assert recorded(out) == {name: by_hand(raw.data, chunk) for name, raw in read_checkpoint(out).items()}
    assert (len(plan.steps) > len(plan.shards)) is (chunk < 10_000) or chunk > 10_000
    assert verify(out, source=source).tensors_digested == len(plan.shards[0].entries)


@given(st.binary(max_size=70_000), st.integers(0, 5000), st.booleans())
def test_a_digest_is_of_exactly_the_bytes_of_its_chunk(data: bytes, offset: int, direct: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        path.write_bytes(bytes(offset) + data + b"after")
        chunk = digests.Chunk("w", 0, 0, offset, len(data))
        assert digests.digest_chunks([chunk], lambda _: path, FileSystem(), direct=direct) == [blake3(data).hexdigest()]
        path.write_bytes((bytes(offset) + data)[: max(offset + len(data) - 1, 0)])
        if data:
            with pytest.raises(EOFError, match="file ends at byte"):
                digests.digest_chunks([chunk], lambda _: path, FileSystem(), direct=direct)


@given(st.binary(max_size=70_000), st.integers(0, 5000))
def test_digests_taken_before_writing_are_those_of_the_chunks(data: bytes, offset: int) -> None:
    taken: digests.Taken = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digests, "CHUNK_BYTES", 16_384)
        digests.take(memoryview(data), 3, offset, taken)
    cut = {at: data[at : at + 16_384] for at in range(0, len(data), 16_384)}
    assert taken == {(3, offset + at): blake3(piece).hexdigest() for at, piece in cut.items()}
    chunks = [digests.Chunk("w", number, 3, offset + at, len(piece)) for number, (at, piece) in enumerate(cut.items())]
    nowhere = Path("/no/such/shard")
    assert digests.digest_chunks(chunks, lambda _: nowhere, FileSystem(), taken=taken) == list(taken.values())


def test_steps_that_cut_a_chunk_are_a_bug_of_the_planner(source: Path) -> None:
    plan = plan_prune(Checkpoint.open(source), manifest_of(source))
    start, entry = len(plan.shards[0].head), plan.shards[0].entries[0]
    with pytest.raises(PlanError, match=f"internal: a step writes a part of a chunk of tensor '{entry.spec.name}'"):
        plan.chunks.of([Extent(0, start, entry.spec.nbytes - 2)])
    with pytest.raises(PlanError, match=f"internal: a step writes a part of a chunk of tensor '{entry.spec.name}'"):
        plan.chunks.of([Extent(0, start + 2, entry.spec.nbytes - 2)])


def test_an_index_reads_as_plain_json_does(source: Path) -> None:
    plan = plan_prune(Checkpoint.open(source), manifest_of(source), ViewOptions(max_shard_bytes=100_000))
    weight_map = {entry.spec.name: shard.name for shard in plan.shards for entry in shard.entries}
    total = {"metadata": {"total_size": plan.data_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    assert len(plan.shards) > 1
    assert plan.index == pretty(total).encode()


def test_a_journal_without_its_digests_is_refused(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    journal = out / ".shardxform" / "journal"
    head, *lines = journal.read_text().splitlines()
    journal.write_text("\n".join([head, *(line.partition(" ")[0] for line in lines)]) + "\n")
    with pytest.raises(ExecutionError, match="the journal has 0 digests of step"):
        run(plan_of(source), out)
    assert not looks_complete(out)


# -- flipped bits -----------------------------------------------------------------------------------------------------


def outputs(source: Path, folder: Path) -> Iterator[Path]:
    checkpoint, manifest = Checkpoint.open(source), manifest_of(source)
    run(plan_prune(checkpoint, manifest), folder / "pruned")
    yield folder / "pruned"
    for format_ in ("auto-round", "gptq", "compressed-tensors"):
        scheme: Any = Scheme(grid=Grid(bits=4, group_size=32, scale_grid="bf16"), format=format_)
        run(plan_quantize(checkpoint, scheme, manifest), folder / format_)
        yield folder / format_
    run(plan_convert(Checkpoint.open(folder / "gptq"), Target(format="bf16")), folder / "bf16")
    yield folder / "bf16"


def test_any_flipped_bit_of_any_file_is_found_without_a_source(source: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    for out in outputs(source, tmp_path):
        assert verify(out).sound
        shards, small = sorted(out.glob("*.safetensors")), sorted(out.glob("*.json"))
        for path in (*shards * 4, *small * 2):
            whole = path.read_bytes()
            at, bit = rng.randrange(len(whole)), rng.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            assert not verify(out, jobs=1).sound, (path, at, bit)
            path.write_bytes(whole)


def test_a_flipped_bit_is_named_by_its_tensor_and_by_compress_too(source: Path, tmp_path: Path) -> None:
    """Values that stay finite and small, of a tensor of which nothing else is known, such as one that was healed."""
    *_, out = outputs(source, tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    (piece,) = Checkpoint.open(out).tensors[name].ranges
    with (out / piece.file).open("r+b") as file:
        file.seek(piece.offset + 100)
        byte = file.read(1)[0]
        file.seek(piece.offset + 100)
        file.write(bytes([byte ^ 1]))
    for quick in (False, True):
        (problem,) = verify(out, quick=quick, written=True).problems
        assert (problem.code, problem.where) == ("digest", name)
    assert verify(out, quick=True).sound
    assert verify(forget_digests(out)).sound


# -- the record -------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was_written(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_prune(Checkpoint.open(source), manifest_of(source)), out)
    path = out / "shardxform.json"
    data, record = path.read_bytes(), read_record(path)
    assert record is not None
    assert record.to_bytes() == data
    assert is_as_written(data)
    for changed in (data.replace(b": ", b":", 1), data.replace(b"prune", b"prane", 1), data + b" "):
        assert not is_as_written(changed)
    assert not is_as_written(replace(record, notes=("x",)).to_bytes().replace(b'"x"', b'"y"'))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "x"}, "format: expected 'shardxform.provenance'"),
        ({"version": 3}, "version: expected one of"),
        ({"fingerprint": 1}, "fingerprint: expected a text"),
        ({"inputs": []}, "inputs: expected an object"),
        ({"files": {"a": 1}}, "files['a']: expected a digest or null"),
        ({"shards": {"a": [1, 2, "x"]}}, "shards['a']: expected size, header size and digest"),
        ({"notes": "x"}, "notes: expected a list of texts"),
        ({"digests": {"algorithm": "md5", "chunk_bytes": 1}}, "digests: expected blake3-128"),
        ({"digests": {"algorithm": "blake3-128", "chunk_bytes": 16 << 20, "tensors": {"a": 1}}}, "digests.tensors"),
    ],
)
def test_what_is_no_record_is_named_by_its_key(change: dict[str, Any], told: str) -> None:
    whole = {
        "format": "shardxform.provenance",
        "version": 1,
        "fingerprint": "ab",
        "inputs": {},
        "files": {},
        "shards": {},
    }
    assert Record.parse(whole).digests is None
    with pytest.raises(RecordError) as error:
        Record.parse({**whole, **change})
    assert str(error.value).startswith(told)


def test_records_of_earlier_versions_are_read(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_prune(Checkpoint.open(source), manifest_of(source)), out)
    path = out / "shardxform.json"
    record = json.loads(path.read_text())
    for key in ("digests", "checksum"):
        del record[key]
    record["version"] = 1
    record["inputs"]["source"]["values"] = "ab" * 32
    path.write_text(json.dumps(record))
    report = verify(out, source=source)
    assert report.sound
    assert report.tensors_digested == 0


# -- parts of several machines ----------------------------------------------------------------------------------------


def test_a_part_that_rotted_is_not_merged(source: Path, tmp_path: Path) -> None:
    part = interrupted(source, tmp_path / "part")
    shard = max(part.glob("*.partial"), key=lambda path: path.stat().st_mtime_ns)
    plan = plan_of(source)
    first = next(iter(plan.steps[0].writes))
    shard = part / f"{plan.shards[first.shard].name}.partial"
    shard = shard if shard.exists() else part / plan.shards[first.shard].name
    data = bytearray(shard.read_bytes())
    data[first.offset] ^= 1
    shard.write_bytes(data)
    with pytest.raises(OutputError, match=r"tensor '.*' is not as it was written: its digest differs"):
        run(plan, tmp_path / "out", RunOptions(parts=(part,)))
    assert not looks_complete(tmp_path / "out")
