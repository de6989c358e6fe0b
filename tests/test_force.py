"""Whatever stands in OUT, `--force` ends with the bytes of a fresh run, and leaves nothing of what stood there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import tiny, write_checkpoint
from click.testing import CliRunner
from faults import Counting, Crashing
from smaller import smaller
from strategies import picked
from test_identity import flip
from test_prune import manifest_of
from test_run import looks_complete, tree
from texts import few

from shardxform.base import computing
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import ResumeError
from shardxform.execution.output import states_of
from shardxform.execution.runner import RunOptions, run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan import plan as plan_module
from shardxform.plan.plan import Plan
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions

FORCE = RunOptions(jobs=1, force=True)


@pytest.fixture
def small_moe() -> Path:
    return smaller()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config, tensors = tiny("qwen3_moe", hidden_size=64, moe_intermediate_size=32)
    return write_checkpoint(tmp_path / "source", tensors, config, shards=2)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "STEP_BYTES", 60_000)


def pruned(source: Path, seed: int = 0, shard: int = 200_000) -> Plan:
    return plan_prune(Checkpoint.open(source), manifest_of(source, seed=seed), ViewOptions(max_shard_bytes=shard))


def rounded(source: Path, **grid: Any) -> Plan:
    scheme = Scheme(grid=Grid(bits=4, group_size=32, **grid))
    return plan_quantize(Checkpoint.open(source), scheme, manifest_of(source), ViewOptions(max_shard_bytes=200_000))


def crash(plan: Plan, out: Path, effect: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            run(plan, out, RunOptions(jobs=1), fs=Crashing(effect))
        finally:
            os._exit(0)
    os.waitpid(child, 0)


PLANS: dict[str, Callable[[Path], Plan]] = {
    "other experts": lambda source: pruned(source, seed=5),
    "other shards": lambda source: pruned(source, shard=90_000),
    "another command": rounded,
    "other options": lambda source: rounded(source, scale_grid="bf16"),
}


@pytest.mark.crash
@pytest.mark.parametrize("other", PLANS)
def test_force_over_whatever_a_crash_left_gives_the_bytes_of_a_fresh_run(
    other: str, source: Path, tmp_path: Path
) -> None:
    make = rounded if "option" in other else pruned
    fresh = make(source)
    run(fresh, tmp_path / "fresh", RunOptions(jobs=1))
    wanted, counting = tree(tmp_path / "fresh"), Counting()
    stale = PLANS[other](source)
    run(stale, tmp_path / "count", RunOptions(jobs=1), fs=counting)
    for effect in [*range(1, counting.effects, 31), counting.effects - 3, counting.effects + 1]:
        out = tmp_path / f"out{effect}"
        crash(stale, out, effect)
        run(fresh, out, FORCE)
        assert tree(out) == wanted, f"effect {effect}"


def test_force_over_work_on_other_values_of_the_source(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    crash(pruned(source), out, 60)
    name = next(n for n in Checkpoint.open(source).tensors if "mlp.gate" in n)
    flip(source, name)
    with pytest.raises(ResumeError, match=f"other values in tensor '{name}'"):
        run(pruned(source), out)
    run(pruned(source), out, FORCE)
    run(pruned(source), tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_states_of_another_plan_are_removed_when_work_begins(source: Path, tmp_path: Path) -> None:
    """Those of an earlier version lie in the work directory itself."""
    out, plan = tmp_path / "out", pruned(source)
    crash(plan, out, 60)
    work = out / ".shardxform"
    mine, other = states_of(work, plan.fingerprint), states_of(work, "f" * 64)
    for folder in (mine, other, work):
        folder.mkdir(exist_ok=True)
        (folder / "original-0000.hidden").write_bytes(b"stale")
    seen: list[bool] = []

    def look(_: object) -> None:
        seen.append(other.exists() or (work / "original-0000.hidden").exists() or not mine.exists())

    run(plan, out, RunOptions(on_progress=look))
    assert seen
    assert not any(seen)
    assert not work.exists()


# -- what computes ----------------------------------------------------------------------------------------------------


def test_unfinished_rounding_of_another_version_is_refused_and_finished_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, done = tmp_path / "begun", tmp_path / "done"
    crash(rounded(source), begun, 60)
    run(rounded(source), done)
    monkeypatch.setattr(computing, "__version__", "9.9")
    with pytest.raises(ResumeError, match=r"`made_by.shardxform`: was '\S+', now '9.9'; name a new directory"):
        run(rounded(source), begun)
    report = run(rounded(source), done)
    assert report.already_done
    assert report.made_by_others.endswith("now '9.9'")
    run(rounded(source), begun, FORCE)
    assert json.loads((begun / "shardxform.json").read_text())["inputs"]["made_by"] == {"shardxform": "9.9"}


def test_copying_goes_on_whatever_the_version(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    crash(pruned(source), out, 60)
    monkeypatch.setattr(computing, "__version__", "9.9")
    run(pruned(source), out)
    assert looks_complete(out)


# -- hidden states ----------------------------------------------------------------------------------------------------


def tuned(source: Path, out: Path, data: Path, *more: str) -> str:
    pytest.importorskip("torch")
    options = ("--samples", "2", "--seqlen", "32", "--iters", "2", "--dtype", "float32", "--method", "auto-round", "-q")
    command = ["quantize", str(source), str(out), "--data", str(data), "--group-size", "32", *options, *more]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code in (0, 1), result.output
    return result.output


@pytest.mark.oracle
@pytest.mark.parametrize("inputs", picked(["fp", "quantized"], 2))
def test_force_does_not_tune_on_the_states_of_another_text(inputs: str, small_moe: Path, tmp_path: Path) -> None:
    """Work that stopped after a block leaves hidden states of its own text, which have the size of any other text's."""
    one, other = few("calib.jsonl"), few("heldout.jsonl")
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    if inputs == "fp":
        ways = ("--inputs", "fp", "--blocks", "0-0")
        tuned(small_moe, out, one, *ways)
    else:
        ways = ()
        stopped_after_a_block(small_moe, out, one)
    assert list((out / ".shardxform").glob("states-*/*.hidden"))
    assert "other inputs" in tuned(small_moe, out, other, *ways)
    for place in (out, fresh):
        tuned(small_moe, place, other, *ways, "--force")
    shards = {path.name: path.read_bytes() for path in fresh.glob("*.safetensors*")}
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors*")} == shards
    assert len(list((out / ".shardxform").glob("states-*"))) == (inputs == "fp")


def stopped_after_a_block(source: Path, out: Path, data: Path) -> None:
    """Tune, and be stopped when the first block is in the journal."""
    from shardxform.tuning import session

    with pytest.MonkeyPatch.context() as patch:
        execute = session._BlockRun.execute

        def once(self: Any, *args: Any) -> Any:
            if self._step.layer:
                raise session.ExecutionError("stopped by the test")
            return execute(self, *args)

        patch.setattr(session._BlockRun, "execute", once)
        assert "stopped by the test" in tuned(source, out, data)


@pytest.mark.oracle
def test_tuning_of_other_versions_or_instructions_is_refused_naming_them(
    small_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = few("calib.jsonl"), tmp_path / "out"
    stopped_after_a_block(small_moe, out, data)
    made_by = computing.of_model("cpu")
    assert made_by.keys() == {"shardxform", "torch", "transformers", "instructions", "arithmetic", "constants"}
    for name in made_by:
        monkeypatch.setattr(computing, "of_model", lambda _, name=name: replace_in(made_by, name))
        assert f"made_by.{name}: was '{made_by[name]}', now 'other'" in tuned(small_moe, out, data)


def replace_in(made_by: dict[str, str], name: str) -> dict[str, str]:
    return {**made_by, name: "other"}
