"""The executor: states of the output directory, refusals, resume, faults that are reported."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
from pathlib import Path

import pytest
from build import read_checkpoint, tiny, write_checkpoint
from click.testing import CliRunner
from faults import Counting, Failing, Short, WithoutKernelCopy, sampled
from test_prune import manifest_of

from shardxform.base.file_system import FileSystem
from shardxform.base.progress import Progress
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError, ExecutionError, Interrupted, OutputError, ResumeError, ShardxformError
from shardxform.execution.output import difference, state_of
from shardxform.execution.runner import RunOptions, run
from shardxform.plan import plan as plan_module
from shardxform.plan.plan import Plan
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import ViewOptions

SMALL = ViewOptions(max_shard_bytes=20_000)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many steps, though the checkpoints are tiny."""
    monkeypatch.setattr(plan_module, "STEP_BYTES", 4096)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config, tensors = tiny("qwen3_5_moe")
    return write_checkpoint(tmp_path / "source", tensors, config, shards=3, files={"tokenizer.json": "{}"})


def plan_of(source: Path, options: ViewOptions = SMALL, seed: int = 0) -> Plan:
    return plan_prune(Checkpoint.open(source), manifest_of(source, seed=seed), options)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def finished(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    run(plan_of(source), tmp_path / "reference")
    return tree(tmp_path / "reference")


def looks_complete(out: Path) -> bool:
    """Whether a loader would take `out` for a checkpoint."""
    try:
        Checkpoint.open(out)
    except CheckpointError:
        return False
    return True


def test_running_a_finished_job_again_writes_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_of(source), out)
    counting = Counting()
    report = run(plan_of(source), out, fs=counting)
    assert report.already_done
    assert counting.effects == 0


def test_the_work_directory_is_gone_when_the_job_is_finished(finished: dict[str, bytes]) -> None:
    assert not any(".shardxform/" in name or name.endswith(".partial") for name in finished)
    assert "shardxform.json" in finished


@pytest.mark.parametrize("fs", [Short(), WithoutKernelCopy()], ids=["short calls", "no kernel copy"])
def test_bytes_are_the_same_on_poor_file_systems(
    fs: FileSystem, source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    run(plan_of(source), tmp_path / "out", fs=fs)
    assert tree(tmp_path / "out") == finished


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_effect_is_reported_and_resumed_to_the_same_bytes(
    code: int, source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    """For every k: the k-th effect fails, the message is one line, OUT is no half checkpoint, a rerun ends the same."""
    counting = Counting()
    run(plan_of(source), tmp_path / "count", RunOptions(jobs=1), fs=counting)
    assert counting.effects > 100
    messages: list[str] = []
    for k in sampled(counting.effects, ends=12 if code == errno.ENOSPC else 2):
        out = tmp_path / f"out{k}"
        try:
            run(plan_of(source), out, RunOptions(jobs=1), fs=Failing(k, code))
        except ShardxformError as e:
            messages.append(str(e))
        if out.exists() and looks_complete(out):
            assert {n: b for n, b in tree(out).items() if not n.startswith(".shardxform")} == finished
        run(plan_of(source), out)
        assert tree(out) == finished, f"effect {k}"
    assert messages
    assert not any("\n" in message for message in messages)


def test_an_interrupted_run_keeps_what_is_done_and_says_how_to_go_on(
    source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def stop_halfway(progress: Progress) -> None:
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="run the same command again") as caught:
        run(plan_of(source), out, RunOptions(jobs=1, on_progress=stop_halfway))
    assert caught.value.exit_code == 130
    assert not looks_complete(out)
    report = run(plan_of(source), out)
    assert 0 < report.resumed_bytes < plan_of(source).data_bytes
    assert report.resumed_bytes + report.written_bytes == plan_of(source).data_bytes
    assert tree(out) == finished


def interrupted(source: Path, out: Path) -> Path:
    """An unfinished output with about half its steps done."""

    def stop(progress: Progress) -> None:
        if progress.done > progress.total / 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(plan_of(source), out, RunOptions(jobs=1, on_progress=stop))
    return out


def test_a_torn_last_journal_line_is_dropped(source: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    journal = out / ".shardxform" / "journal"
    journal.write_bytes(journal.read_bytes()[:-1])
    run(plan_of(source), out)
    assert tree(out) == finished


def test_a_truncated_partial_shard_is_made_again(source: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    partial = sorted(out.glob("*.partial"))[0]
    os.truncate(partial, partial.stat().st_size // 2)
    run(plan_of(source), out)
    assert tree(out) == finished


def test_a_partial_shard_that_vanished_is_made_again(source: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    sorted(out.glob("*.partial"))[0].unlink()
    run(plan_of(source), out)
    assert tree(out) == finished


def test_another_manifest_is_refused_naming_the_first_difference(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    with pytest.raises(ResumeError, match=r"unfinished work made from other inputs: `manifest\.keep\.0`: was \["):
        run(plan_of(source, seed=5), out)


def test_other_options_are_refused_naming_them(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    with pytest.raises(ResumeError, match=r"`options\.max_shard_bytes`: was 20000, now 9000"):
        run(plan_of(source, ViewOptions(max_shard_bytes=9000)), out)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ab" * 32, "cd" * 32, "`x`: was 'abababababab...', now 'cdcdcdcdcdcd...'"),
        ("a" * 61, "b", f"`x`: was '{'a' * 60}...', now 'b'"),
        ("hf://o/n@" + "a" * 60, None, f"`x`: was 'hf://o/n@{'a' * 60}', now None"),
        (list(range(99)), [0], "`x`: was [0, 1, 2, 3, 4, 5, ...], now [0]"),
        (["name-of-a-file.txt"] * 3 + ["c" * 90], [], None),
        (
            {"data": "a.txt", "files": ["a.txt"], "sha256": "1", "seed": 1},
            {"data": "a.txt", "files": ["a.txt"], "sha256": "2", "seed": 1},
            "`x`: the text of 'a.txt' has changed since",
        ),
        ({"data": "a.txt", "sha256": "1"}, {"data": "b.txt", "sha256": "2"}, "`x.data`: was 'a.txt', now 'b.txt'"),
    ],
)
def test_a_difference_is_cut_so_that_quotes_close(old: object, new: object, said: str | None) -> None:
    found = difference({"x": old}, {"x": new})
    assert (
        found == said if said else len(found) < 200 and found.count("'") % 2 == 0 == found.count("[") - found.count("]")
    )


def test_a_finished_output_of_other_inputs_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_of(source), out)
    with pytest.raises(ResumeError, match="holds an output made from other inputs"):
        run(plan_of(source, seed=5), out)


def touch(source: Path) -> None:
    for shard in source.glob("*.safetensors"):
        os.utime(shard, ns=(1, 1))


def change(source: Path) -> str:
    """Change one byte of one tensor in the middle of a shard, and nothing that a directory shows of it."""
    path = sorted(source.glob("*.safetensors"))[0]
    (shard,) = (each for each in Checkpoint.open(source).shards if each.name == path.name)
    entry, times = shard.entries[len(shard.entries) // 2], path.stat()
    data = bytearray(path.read_bytes())
    data[shard.data_start + entry.end - 1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return entry.spec.name


def test_a_source_that_was_touched_is_the_same_source(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    touch(source)
    assert not run(plan_of(source), out, RunOptions(on_progress=lambda _: touch(source))).already_done
    touch(source)
    assert run(plan_of(source), out).already_done


def test_other_values_in_the_source_are_named_though_nothing_else_shows_them(source: Path, tmp_path: Path) -> None:
    begun, out = interrupted(source, tmp_path / "begun"), tmp_path / "out"
    run(plan_of(source), out)
    name = change(source)
    for path in (begun, out):
        with pytest.raises(ResumeError, match=f"`source.values`: other values in tensor '{re.escape(name)}'; name"):
            run(plan_of(source), path)


def test_a_source_that_changes_while_running_is_not_committed(source: Path, tmp_path: Path) -> None:
    changed: list[str] = []

    def on_progress(_: Progress) -> None:
        if not changed:
            changed.append(change(source))
        touch(source)

    with pytest.raises(ExecutionError, match="changed while shardxform was running: other values in tensor '"):
        run(plan_of(source), tmp_path / "out", RunOptions(on_progress=on_progress))
    assert not looks_complete(tmp_path / "out")


def test_a_source_truncated_while_running_is_reported(source: Path, tmp_path: Path) -> None:
    plan = plan_of(source)
    shard = sorted(source.glob("*.safetensors"))[-1]
    os.truncate(shard, 100)
    with pytest.raises(ExecutionError, match="truncated while"):
        run(plan, tmp_path / "out")


def test_a_foreign_directory_is_refused_and_untouched(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(OutputError, match="not empty, and not an output of shardxform"):
            run(plan_of(source), out, RunOptions(force=force))
    assert tree(out) == {"thesis.txt": b"years of work"}


def test_a_checkpoint_of_somebody_else_is_refused(source: Path, tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    out = write_checkpoint(tmp_path / "out", tensors, config)
    before = tree(out)
    with pytest.raises(OutputError, match="not an output of shardxform"):
        run(plan_of(source), out, RunOptions(force=True))
    assert tree(out) == before


@pytest.mark.parametrize("place", [".", "inside", ".."])
def test_an_output_that_overlaps_the_source_is_refused(place: str, source: Path) -> None:
    before = tree(source)
    with pytest.raises(OutputError, match="overlaps the source"):
        run(plan_of(source), source / place)
    assert tree(source) == before


def test_a_link_to_the_source_is_refused_as_output(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match="overlaps the source"):
        run(plan_of(source), tmp_path / "link")


def test_force_starts_over_an_unfinished_and_a_finished_output(source: Path, tmp_path: Path) -> None:
    run(plan_of(source, seed=5), tmp_path / "fresh")
    for out in (interrupted(source, tmp_path / "half"), tmp_path / "whole"):
        if not out.exists():
            run(plan_of(source), out)
        run(plan_of(source, seed=5), out, RunOptions(force=True))
        assert tree(out) == tree(tmp_path / "fresh")


def test_force_does_not_touch_what_was_changed_since(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_of(source), out)
    (out / "tokenizer.json").write_text("edited by hand")
    before = tree(out)
    with pytest.raises(OutputError, match=r"tokenizer\.json: changed since shardxform wrote it"):
        run(plan_of(source, seed=5), out, RunOptions(force=True))
    assert tree(out) == before


def test_force_leaves_files_that_are_not_ours(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_of(source), out)
    (out / "notes.txt").write_text("mine")
    run(plan_of(source, seed=5), out, RunOptions(force=True))
    assert (out / "notes.txt").read_text() == "mine"


def test_a_record_that_names_files_elsewhere_is_not_believed(source: Path, tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    run(plan_of(source), out)
    victim.write_text("precious")
    record = json.loads((out / "shardxform.json").read_text())
    record["files"]["../victim"] = None
    (out / "shardxform.json").write_text(json.dumps(record))
    with pytest.raises(OutputError, match="remove the directory yourself"):
        run(plan_of(source, seed=5), out, RunOptions(force=True))
    assert victim.read_text() == "precious"


def test_a_crash_while_starting_over_can_be_started_over(source: Path, tmp_path: Path) -> None:
    run(plan_of(source, seed=5), tmp_path / "fresh")
    for k in sampled(59):
        out = tmp_path / f"out{k}"
        run(plan_of(source), out)
        with contextlib.suppress(ShardxformError):
            run(plan_of(source, seed=5), out, RunOptions(jobs=1, force=True), fs=Failing(k))
        run(plan_of(source, seed=5), out, RunOptions(force=True))
        assert tree(out) == tree(tmp_path / "fresh"), f"effect {k}"


def test_a_file_in_the_way_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    (out / "tokenizer.json").write_text("not ours")
    with pytest.raises(OutputError, match="stands in the way"):
        run(plan_of(source), out)
    assert (out / "tokenizer.json").read_text() == "not ours"


def test_a_damaged_finished_output_is_named(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_of(source), out)
    shard = sorted(out.glob("*.safetensors"))[1]
    os.truncate(shard, 50)
    with pytest.raises(OutputError, match=f"{shard.name}: missing or damaged"):
        run(plan_of(source), out)


def test_too_little_space_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    class Full(Counting):
        def free_bytes(self, _path: Path) -> int:
            return 1000

    fs = Full()
    with pytest.raises(OutputError, match=r"needs .* more, but only 1\.00 kB are free"):
        run(plan_of(source), tmp_path / "out", fs=fs)
    assert fs.effects == 0


def test_two_runs_in_one_directory_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running, release = threading.Event(), threading.Event()

    def hold(_: Progress) -> None:
        running.set()
        release.wait(10)

    first = threading.Thread(target=run, args=(plan_of(source), out, RunOptions(on_progress=hold)))
    first.start()
    try:
        assert running.wait(10)
        with pytest.raises(OutputError, match="another shardxform process"):
            run(plan_of(source), out)
    finally:
        release.set()
        first.join()
    assert looks_complete(out)


def test_a_journal_of_another_plan_is_refused(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    journal = out / ".shardxform" / "journal"
    journal.write_text("shardxform journal 1 " + "0" * 64 + "\n")
    with pytest.raises(ResumeError, match="belongs to another plan"):
        run(plan_of(source), out)


def test_links_in_the_source_are_read_through_and_written_as_files(source: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for i, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(Path("..") / "blobs" / str(i))
    run(plan_of(snapshot), tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert read_checkpoint(tmp_path / "out")


def test_the_source_is_never_opened_for_writing(source: Path, tmp_path: Path) -> None:
    class Watching(FileSystem):
        def open(self, path: Path, flags: int) -> int:
            assert not (Path(path).is_relative_to(source) and flags & (os.O_WRONLY | os.O_RDWR))
            return super().open(path, flags)

    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()}
    run(plan_of(source), tmp_path / "out", fs=Watching())
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()} == before


def test_describing_the_state_changes_nothing(source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert state_of(tmp_path / "out", plan_of(source)).name == "new"
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unfinished_output_is_called_so_where_a_checkpoint_is_expected(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    for command in (["inspect", str(out)], ["convert", str(out), str(tmp_path / "other"), "--to", "bf16"]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"shardxform: {out}: unfinished: the run that writes it was stopped, or is not")
        assert result.stderr.endswith("run the same command again, and it goes on\n")
    run(plan_of(source), out)
    assert Checkpoint.open(out).tensors


def test_an_output_below_a_file_is_refused_naming_the_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("mine")
    with pytest.raises(OutputError, match=rf"afile/x/out: .*: expected a directory, found a file: {tmp_path}/afile$"):
        run(plan_of(source), tmp_path / "afile/x/out")
    assert (tmp_path / "afile").read_text() == "mine"
