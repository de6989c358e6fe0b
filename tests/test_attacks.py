"""What a careless, an unlucky and a hostile user do to the command, and what must not come of it.

Each test states a promise of the README or DESIGN: the source and foreign files are never touched, a run that exits 0
is right to the byte, what stands half done can be gone on with or started over, errors are one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, raw, read_checkpoint, tiny, write_checkpoint
from faults import Failing, overheard
from strategies import picked
from test_prune import manifest_of
from test_run import SMALL, interrupted, looks_complete, plan_of, tree
from test_run import finished as finished
from test_run import small_steps as small_steps
from test_run import source as source

from shardxform import RunOptions, run
from shardxform.__main__ import entry
from shardxform.base.file_system import FileSystem
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import OutputError, PlanError, ResumeError, ShardxformError
from shardxform.execution import runner
from shardxform.execution.journal import Journal
from shardxform.formats.dialects import resolve
from shardxform.formats.scheme import ExpertNames, Format, Grid, Scheme
from shardxform.plan import plan as plan_module
from shardxform.plan.plan import Plan
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions

FORCE = RunOptions(force=True)
WIDE = {"hidden_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
KEEP = '{"0": [0,2,4,6], "1": [1,3,5,7], "2": [0,1,2,3], "3": [0,3,5,7]}'
AS_ROOT = os.geteuid() == 0


def scheme(format_: Format = "auto-round", names: ExpertNames = "split") -> Scheme:
    return Scheme(grid=Grid(bits=4, group_size=32, scale_grid="bf16"), format=format_, expert_names=names)


def tensors_in(root: Path) -> dict[str, Raw]:
    read = read_checkpoint(root)
    return dict(read[1] if isinstance(read, tuple) else read)


class Stopping(FileSystem):
    """Fails at the rename to a given name: everything before it is done."""

    def __init__(self, name: str) -> None:
        self._name = name

    def rename(self, old: Path, new: Path) -> None:
        if new.name == self._name:
            raise OSError(5, "stopped here")
        super().rename(old, new)


def stopped_before(name: str, plan: Plan, out: Path) -> Path:
    with pytest.raises(ShardxformError, match="stopped here"):
        run(plan, out, fs=Stopping(name))
    return out


# -- never touch what is not ours -----------------------------------------------------------------------------------


def test_a_work_directory_that_is_a_link_into_the_source_is_not_followed(source: Path, tmp_path: Path) -> None:
    """It was taken for an empty output of ours; the clean-up at the end emptied the source."""
    before = tree(source)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".shardxform").symlink_to(source)
    with contextlib.suppress(ShardxformError):
        run(plan_of(source), tmp_path / "out")
    assert tree(source) == before


def test_foreign_files_in_a_directory_named_like_ours_survive(source: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "out" / ".shardxform" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    with contextlib.suppress(ShardxformError):
        run(plan_of(source), tmp_path / "out")
    assert thesis.read_text() == "years of work"


def test_a_partial_shard_that_is_a_link_is_not_written_through(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    before = tree(source)
    partial = sorted(out.glob("*.partial"))[0]
    partial.unlink()
    partial.symlink_to(sorted(source.glob("*.safetensors"))[0])
    with contextlib.suppress(ShardxformError):
        run(plan_of(source), out)
    assert tree(source) == before
    assert not looks_complete(out) or not any(path.is_symlink() for path in out.iterdir())


def test_a_foreign_file_under_a_shards_name_is_not_replaced(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    mine = out / plan_of(source).shards[0].name
    mine.write_bytes(b"years of work")
    with pytest.raises(OutputError, match="stands in the way"):
        run(plan_of(source), out)
    assert mine.read_bytes() == b"years of work"


def test_force_does_not_remove_a_shard_that_was_changed(source: Path, tmp_path: Path) -> None:
    """Small files are compared with their digest before they go; a shard that is not ours any more must stay too."""
    out = tmp_path / "out"
    run(plan_of(source), out)
    shard = out / plan_of(source).shards[0].name
    shard.write_bytes(b"my own file under that name")
    with pytest.raises(OutputError):
        run(plan_of(source, seed=5), out, FORCE)
    assert shard.read_bytes() == b"my own file under that name"


def test_force_removes_no_file_of_a_kind_that_shardxform_never_writes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(plan_of(source), out)
    (out / "thesis.txt").write_text("years of work")
    record = json.loads((out / "shardxform.json").read_text())
    record["files"]["thesis.txt"] = None
    (out / "shardxform.json").write_text(json.dumps(record))
    with pytest.raises(OutputError):
        run(plan_of(source, seed=5), out, FORCE)
    assert (out / "thesis.txt").exists()


def test_force_does_not_follow_a_linked_folder(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "a.jinja").write_text("{{ messages }}")
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    run(plan_of(source), out)
    (out / "additional_chat_templates").rename(elsewhere)
    (out / "additional_chat_templates").symlink_to(elsewhere)
    before = (elsewhere / "a.jinja").stat()
    with contextlib.suppress(ShardxformError):
        run(plan_of(source, seed=5), out, FORCE)
    after = (elsewhere / "a.jinja").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_output_whose_files_are_the_source_is_refused(source: Path, tmp_path: Path) -> None:
    """A source of links, as in a hub's cache, that lead into OUT: --force deleted what it was about to read."""
    out, farm = tmp_path / "out", tmp_path / "farm"
    run(plan_of(source), out)
    before = tree(out)
    farm.mkdir()
    for path in out.iterdir():
        (farm / path.name).symlink_to(path)
    with pytest.raises(OutputError, match="overlaps the source"):
        run(plan_prune(Checkpoint.open(farm), None, ViewOptions(text_only=True)), out, FORCE)
    assert tree(out) == before


# -- exit 0 means right to the byte ---------------------------------------------------------------------------------


class InterruptedSync(FileSystem):
    """A Ctrl-C that arrives in the n-th sync, where a run that writes spends its time."""

    def __init__(self, n: int) -> None:
        self._left = n

    def sync(self, fd: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        super().sync(fd)


@pytest.mark.parametrize(("first", "second"), [([9, 12], [13]), ([8, 9, 10], [11]), ([98, 102], [99]), ([7, 31], [8])])
def test_a_record_interrupted_while_syncing_claims_no_step_that_was_not_done(
    first: list[int], second: list[int], tmp_path: Path
) -> None:
    """`9 12` was overwritten by `13` at the same place, which left `13` and `2`: step 2 was never done."""
    path = tmp_path / "journal"
    with Journal(InterruptedSync(2), path, "f" * 64, 200) as journal:  # the first sync is of the head
        with pytest.raises(KeyboardInterrupt):
            journal.record({step: {} for step in first})
        journal.record({step: {} for step in second})
    with Journal(FileSystem(), path, "f" * 64, 200) as journal:
        assert set(second) <= journal.done <= {*first, *second}


def test_two_tensors_that_would_get_one_name_are_refused(tmp_path: Path) -> None:
    """--text-only renames `model.language_model.x` to `model.x`, which an unknown tensor may be called already."""
    config, tensors = tiny("qwen3_5_moe")
    tensors["model.norm.weight"] = Raw("BF16", (16,), b"\0" * 32)
    root = write_checkpoint(tmp_path / "source", tensors, config)
    with pytest.raises(PlanError, match=r"model\.norm\.weight"):
        plan_prune(Checkpoint.open(root), None, ViewOptions(text_only=True))


def test_gate_and_up_of_different_dtypes_are_not_joined_as_if_they_were_one(tmp_path: Path) -> None:
    """Under the older spelling, the float32 half was rounded as if its bytes were bfloat16."""
    config, tensors = tiny("qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    up = "model.layers.0.mlp.experts.0.up_proj.weight"
    values = np.nan_to_num(tensors[up].float32())
    packed: list[Raw] = []
    for dtype, stored in (("BF16", tensors[up]), ("F32", raw(values))):
        root = write_checkpoint(tmp_path / f"source {dtype}", {**tensors, up: stored}, config)
        out = tmp_path / f"out {dtype}"
        if dtype == "BF16":
            run(plan_quantize(Checkpoint.open(root), scheme(names="fused-indexed")), out)
        else:
            try:
                run(plan_quantize(Checkpoint.open(root), scheme(names="fused-indexed")), out)
            except ShardxformError:
                return  # a refusal is right, too
        packed.append(tensors_in(out)["model.layers.0.mlp.experts.gate_up_proj.0.qweight"])
    assert packed[0] == packed[1]


def test_a_foreign_config_is_not_taken_for_the_commit(source: Path, tmp_path: Path) -> None:
    """The first run refused it but had written shardxform.json; the second one called the output complete."""
    out = interrupted(source, tmp_path / "out")
    (out / "config.json").write_text('{"mine": 1}')
    for _ in range(2):
        with pytest.raises(OutputError):
            run(plan_of(source), out)
    assert (out / "config.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_a_small_file_changed_in_a_finished_output_is_not_called_complete(
    name: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(plan_of(source), out)
    (out / name).write_text("{}  ")
    with pytest.raises(OutputError, match=name):
        run(plan_of(source), out)


@pytest.mark.parametrize("format_", ["auto-round", "gptq", "compressed-tensors"])
def test_the_config_says_16_bit_of_unknown_matrices_that_are_copied(format_: Format, tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_5_moe_text", **WIDE)
    tensors["model.layers.0.adapter.weight"] = Raw("BF16", (64, 64), b"\0" * 8192)
    root = write_checkpoint(tmp_path / "source", tensors, config)
    plan = plan_quantize(Checkpoint.open(root), scheme(format_))
    quantization = json.loads(plan.config)["quantization_config"]
    assert resolve(quantization).bits_of("model.layers.0.adapter") == 16


def test_text_only_names_its_class_whatever_the_text_config_says(tmp_path: Path) -> None:
    """transformers writes `architectures: null` into nested configs."""
    config, tensors = tiny("qwen3_5_moe")
    config["text_config"]["architectures"] = None
    root = write_checkpoint(tmp_path / "source", tensors, config)
    plan = plan_prune(Checkpoint.open(root), None, ViewOptions(text_only=True))
    assert json.loads(plan.config)["architectures"] == ["Qwen3_5MoeForCausalLM"]


@pytest.mark.parametrize("place", ["text_config", "compression_config"])
def test_a_source_that_is_quantized_by_another_key_is_refused(place: str, tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_5_moe", **WIDE)
    home = config["text_config"] if place == "text_config" else config
    home["quantization_config" if place == "text_config" else place] = {"quant_method": "compressed-tensors"}
    root = write_checkpoint(tmp_path / "source", tensors, config)
    with pytest.raises(ShardxformError, match=rf"{place}\S* declares quantized weights, but the shards hold none"):
        plan_quantize(Checkpoint.open(root), scheme())


def test_a_stored_part_beside_its_weight_is_refused_by_name(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_5_moe_text", **WIDE)
    tensors["model.layers.0.mlp.shared_expert.down_proj.qweight"] = raw(np.zeros((8, 64), "<i4"))
    root = write_checkpoint(tmp_path / "source", tensors, config)
    with pytest.raises(ShardxformError, match=r"down_proj\.qweight"):
        plan_quantize(Checkpoint.open(root), scheme())


# -- what stands half done can be gone on with, or started over -----------------------------------------------------


def test_a_source_that_was_downloaded_again_is_the_same_source(
    source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    out = interrupted(source, tmp_path / "out")
    for path in source.glob("*.safetensors"):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    assert run(plan_of(source), out).resumed_bytes
    assert tree(out) == finished


def test_force_starts_over_from_a_damaged_journal(source: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    with (out / ".shardxform" / "journal").open("ab") as file:
        file.write(b"\0\0\0\0\n")  # as a crash can leave a file that had grown
    with contextlib.suppress(ResumeError):
        run(plan_of(source), out)
    run(plan_of(source), out, FORCE)
    assert tree(out) == finished


def test_a_start_over_that_was_killed_can_be_taken_back(source: Path, tmp_path: Path) -> None:
    """--force with other inputs is killed, and the first inputs are asked for again: no dead end."""
    run(plan_of(source), tmp_path / "reference")
    for k in range(10, 20):
        out = tmp_path / f"out{k}"
        run(plan_of(source), out)
        with contextlib.suppress(ShardxformError):
            run(plan_of(source, seed=5), out, RunOptions(jobs=1, force=True), fs=Failing(k))
        run(plan_of(source), out, FORCE)
        assert tree(out) == tree(tmp_path / "reference"), f"effect {k}"


def test_journal_lines_lost_after_a_shard_was_published_cost_time_only(
    source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    out = stopped_before("config.json", plan_of(source), tmp_path / "out")
    journal = out / ".shardxform" / "journal"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    run(plan_of(source), out)
    assert tree(out) == finished


def test_a_published_shard_that_vanished_is_made_again_though_its_steps_span_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "STEP_BYTES", 1 << 20)
    config, tensors = tiny("qwen3_5_moe_text", **WIDE)
    root = write_checkpoint(tmp_path / "source", tensors, config)
    plan = plan_quantize(Checkpoint.open(root), scheme(), None, ViewOptions(max_shard_bytes=60_000))
    assert any(len({extent.shard for extent in step.writes}) > 1 for step in plan.steps)
    run(plan, tmp_path / "reference")
    out = stopped_before("config.json", plan, tmp_path / "out")
    (out / plan.shards[3].name).unlink()
    run(plan, out)
    assert tree(out) == tree(tmp_path / "reference")


def test_a_stray_file_in_the_source_does_not_stop_a_commit_that_was_under_way(source: Path, tmp_path: Path) -> None:
    """shardxform.json lists what was not copied: a file that appears between two runs changed its bytes."""
    out = stopped_before("config.json", plan_of(source), tmp_path / "out")
    (source / ".DS_Store").write_text("x")
    run(plan_of(source), out)
    assert looks_complete(out)


def test_a_run_that_starts_as_another_one_ends_finds_it_complete(
    source: Path, finished: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory was looked at before the lock was held."""
    out = interrupted(source, tmp_path / "out")
    look = runner.state_of
    others = [lambda: run(plan_of(source), out)]

    def state_of(root: Path, plan: Plan) -> Any:
        seen = look(root, plan)
        if others:
            others.pop()()
        return seen

    monkeypatch.setattr(runner, "state_of", state_of)
    run(plan_of(source), out)
    assert tree(out) == finished


def test_a_sidecar_with_a_line_break_in_its_name_can_be_started_over(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer\nextra.json").write_text("{}")
    out = tmp_path / "out"
    try:
        run(plan_of(source), out)
    except ShardxformError:
        return  # a refusal is right, too
    run(plan_of(source, seed=5), out, FORCE)


@pytest.mark.parametrize("change", [{"fingerprint": 3}, {"inputs": []}, {"version": 9}, {"shards": {"a": [1]}}])
def test_a_plan_record_edited_by_hand_is_an_error_of_one_line(change: Any, source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    record = json.loads((out / ".shardxform" / "plan.json").read_text())
    (out / ".shardxform" / "plan.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(ShardxformError):
        run(plan_of(source), out)


def test_journal_facts_edited_by_hand_are_an_error_of_one_line(source: Path, tmp_path: Path) -> None:
    out = interrupted(source, tmp_path / "out")
    journal = out / ".shardxform" / "journal"
    head, first, second, *rest = journal.read_text().splitlines()
    lines = [head, first + ' {"zero_groups":1}', second + ' {"zero_groups":"x"}', *rest]
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(ShardxformError):
        run(plan_of(source), out)


# -- the command: exit codes, one-line errors, streams --------------------------------------------------------------


@pytest.fixture
def keep(tmp_path: Path) -> Path:
    path = tmp_path / "keep.json"
    path.write_text(KEEP)
    return path


Prune = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def prune(source: Path, keep: Path) -> Prune:
    """Runs `shardxform prune` on the tiny source; keywords go to `subprocess.run`."""

    def call(out: Path | str | bytes, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "shardxform", "prune", source, out, "-m", keep, *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        return subprocess.run(command, check=False, timeout=60, **{**streams, **options})

    return call


@pytest.fixture
def prune_here(source: Path, keep: Path, tmp_path_factory: pytest.TempPathFactory) -> Prune:
    """The same in a fork of this process, with its small steps: for what is refused before any of them."""

    def call(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        def child() -> None:
            sys.argv = ["shardxform", "prune", str(source), str(out), "-m", str(keep), *arguments]
            entry()

        return subprocess.CompletedProcess(arguments, *overheard(child, tmp_path_factory.mktemp("told")))

    return call


def is_refusal(done: subprocess.CompletedProcess[str], code: int = 1) -> bool:
    """One line of error after any notes, no traceback, nothing on stdout."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    one_line = code == 2 or (len(lines) == 1 and lines[0].startswith("shardxform: "))
    return done.returncode == code and "Traceback" not in done.stderr and one_line and not done.stdout


@pytest.mark.parametrize("size", ["0", "-5", "1e30GB", "5 XB", "", "9" * 400 + "GB", "9" * 5000])
def test_sizes_that_are_none_are_usage_errors(size: str, prune_here: Prune, tmp_path: Path) -> None:
    done = prune_here(tmp_path / "out", "--max-shard-size", size)
    assert is_refusal(done, code=2), done.stderr[-300:]


@pytest.mark.parametrize("place", ["file", "file/below", "name too long", "loop", "dangling", "..", "source"])
def test_places_where_no_output_can_be_are_refused_in_one_line(
    place: str, prune_here: Prune, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at" / "all")
    out = {"name too long": tmp_path / ("a" * 300), "..": source / "..", "source": source}.get(place, tmp_path / place)
    before = tree(source)
    done = prune_here(out)
    assert is_refusal(done), done.stderr[-300:]
    assert tree(source) == before


@pytest.mark.skipif(AS_ROOT, reason="root may do everything")
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_an_output_behind_a_locked_folder_is_refused_in_one_line(
    dry: tuple[str, ...], prune: Prune, tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0)
    try:
        assert is_refusal(prune(locked / "out", *dry))
    finally:
        locked.chmod(0o755)


def test_a_finished_output_with_a_folder_for_a_shard_is_refused_in_one_line(prune: Prune, tmp_path: Path) -> None:
    assert prune(tmp_path / "out").returncode == 0
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / "model.safetensors").mkdir()
    done = prune(tmp_path / "out")
    assert is_refusal(done), done.stderr[-300:]


@pytest.mark.parametrize("name", [b"tokenizer\xff.json", b"notes\xff.bin"], ids=["sidecar", "not part of the model"])
def test_a_name_in_the_source_that_is_no_text_is_no_traceback(
    name: bytes, prune: Prune, source: Path, tmp_path: Path
) -> None:
    """The second was found at the very end, when shardxform.json was written, after hours of work."""
    try:
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_bytes(b"{}")
    except OSError:
        pytest.skip("a file system of text names only")
    done = prune(tmp_path / "out")
    assert done.returncode == 0 or is_refusal(done), done.stderr[-300:]
    assert done.returncode == 0 or not (tmp_path / "out").exists(), "refused after the work"


def test_an_output_name_that_is_no_text_does_not_fail_after_the_work(prune: Prune, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in any locale but C and POSIX
    done = prune(os.fsencode(tmp_path) + b"/out\xff", env=env)
    assert "Traceback" not in done.stderr, done.stderr[-300:]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [(), ("--json",), ("--dry-run",)])
def test_a_full_disk_under_stdout_is_an_error_of_one_line(
    arguments: tuple[str, ...], prune: Prune, tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        done = prune(tmp_path / "out", "--quiet", *arguments, stdout=full)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr[-300:]


def test_the_work_is_done_without_a_stderr(prune: Prune, tmp_path: Path) -> None:
    done = prune(tmp_path / "out", stderr=None, preexec_fn=lambda: os.close(2))
    assert done.returncode == 0
    assert looks_complete(tmp_path / "out")


def test_the_work_is_done_though_nobody_reads_its_progress_any_more(prune: Prune, tmp_path: Path) -> None:
    """`2>&1 | head`, or a terminal that went away: hours of work ended with the first line that could not be shown."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        prune(tmp_path / "out", stderr=writer)
    finally:
        os.close(writer)
    assert looks_complete(tmp_path / "out")


def test_stdout_holds_nothing_but_json(prune: Prune, tmp_path: Path) -> None:
    for arguments in (("--dry-run",), (), ()):  # planned, done, done already
        done = prune(tmp_path / "out", "--json", *arguments)
        assert done.returncode == 0
        assert json.loads(done.stdout)["command"] == "prune"


def test_a_refusal_prints_no_json(prune: Prune, source: Path) -> None:
    assert is_refusal(prune(source, "--json"))


def test_progress_without_a_terminal_says_the_end_once(
    source: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """While the last bytes were being synced, a line came every fifth of a second."""
    from shardxform.cli.console import progress

    class Slow(FileSystem):
        def sync(self, fd: int) -> None:
            time.sleep(0.9 if os.fstat(fd).st_size > 40_000 else 0)  # the shard, not the records
            super().sync(fd)

    plan = plan_prune(Checkpoint.open(source), manifest_of(source))
    with progress("prune", quiet=False) as on_progress:
        run(plan, tmp_path / "out", RunOptions(jobs=64, on_progress=on_progress), fs=Slow())
    assert len(capsys.readouterr().err.splitlines()) <= 3


# -- promises that held ---------------------------------------------------------------------------------------------


def test_a_source_copied_with_its_times_and_an_output_moved_are_gone_on_with(
    source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    interrupted(source, tmp_path / "out").rename(tmp_path / "moved")
    shutil.copytree(source, tmp_path / "copy")  # keeps times
    report = run(plan_of(tmp_path / "copy"), tmp_path / "moved")
    assert report.resumed_bytes
    assert tree(tmp_path / "moved") == finished


def test_a_pipe_among_the_sidecars_is_left_alone(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "readme.pipe")
    run(plan_of(source), tmp_path / "out")
    assert not (tmp_path / "out" / "readme.pipe").exists()


def test_a_limit_on_file_sizes_is_reported_and_gone_on_from(prune: Prune, tmp_path: Path) -> None:
    import resource

    done = prune(
        tmp_path / "out", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    )
    assert is_refusal(done), done.stderr[-300:]
    assert not looks_complete(tmp_path / "out")
    assert prune(tmp_path / "out").returncode == 0
    assert looks_complete(tmp_path / "out")


@pytest.mark.parametrize("times", picked([3, 1, 2], 3))
def test_sigint_however_often_leaves_an_output_to_go_on_with(
    times: int, source: Path, keep: Path, tmp_path: Path
) -> None:
    script = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from shardxform.execution import runner\n"
        "from shardxform.plan import plan\n"
        "plan.STEP_BYTES = 4096\n"
        "step = runner._Loop._step\n"
        "def slow(self, s):\n"
        "    print('step', flush=True)\n"
        "    time.sleep(0.2)\n"
        "    return step(self, s)\n"
        "runner._Loop._step = slow\n"
        "from shardxform.__main__ import entry\n"
        "entry()\n"
    )
    command = [sys.executable, "-c", script, "prune", str(source), str(tmp_path / "out"), "-m", str(keep), "-j", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.03)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not looks_complete(tmp_path / "out")
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert again.returncode == 0, again.stderr
    assert looks_complete(tmp_path / "out")


def test_options_that_cannot_matter_do_not_change_a_byte(source: Path, tmp_path: Path) -> None:
    plan = plan_prune(Checkpoint.open(source), manifest_of(source), SMALL)
    for jobs in (1, 64):
        run(plan, tmp_path / f"out{jobs}", RunOptions(jobs=jobs))
    assert tree(tmp_path / "out1") == tree(tmp_path / "out64")
