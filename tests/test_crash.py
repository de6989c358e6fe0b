"""Killed at any instant, the same command goes on and ends with the same bytes.

Invariant: at no moment does OUT look like a complete checkpoint without being one. Checked at every effect of a tiny
run, with unsynced bytes lost, and before effects drawn at random of the command, under SIGKILL.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from faults import Counting, Crashing, forked, kill_when_there, killed_at_effect, sampled
from test_run import SMALL, interrupted, looks_complete, plan_of, tree
from test_run import finished as finished
from test_run import small_steps as small_steps
from test_run import source as source

from shardxform.cli import main
from shardxform.execution.runner import RunOptions, run

pytestmark = pytest.mark.crash


def crash_at(k: int, source: Path, out: Path) -> bool:
    """Run in a child process that dies at effect `k`; whether it died."""
    plan = plan_of(source, SMALL)
    return forked(lambda: run(plan, out, RunOptions(jobs=1), fs=Crashing(k))) == 9


def complete_files(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(out).items() if not name.startswith(".shardxform")}


def test_a_crash_at_any_effect_loses_nothing_that_was_durable(
    source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    counting = Counting()
    run(plan_of(source), tmp_path / "count", RunOptions(jobs=1), fs=counting)
    for k in sampled(counting.effects):
        out = tmp_path / "out"
        assert crash_at(k, source, out)
        if out.exists() and looks_complete(out):
            assert complete_files(out) == finished
        run(plan_of(source), out)
        assert tree(out) == finished, f"effect {k}"
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink()
        out.rmdir()


def test_crashing_again_and_again_still_ends_the_same(source: Path, finished: dict[str, bytes], tmp_path: Path) -> None:
    """Each attempt gets a few effects further; progress is never lost, so it ends."""
    out = tmp_path / "out"
    rng = random.Random(1)
    for _attempt in range(200):
        if not crash_at(rng.randint(10, 45), source, out):
            break
        assert not looks_complete(out) or complete_files(out) == finished
    else:
        pytest.fail("no progress in 200 attempts")
    assert tree(out) == finished


def test_a_lost_shard_is_never_taken_for_done_however_often_it_crashes(
    source: Path, finished: dict[str, bytes], tmp_path: Path
) -> None:
    """A shard that vanished is made anew full of zeros: the journal must have forgotten its steps before that."""
    for k in sampled(39, ends=8):
        out = interrupted(source, tmp_path / f"out{k}")
        sorted(out.glob("*.partial"))[0].unlink()
        assert crash_at(k, source, out)
        run(plan_of(source), out)
        assert tree(out) == finished, f"effect {k}"


def prune_command(source: Path, folder: Path) -> list[str]:
    """Arguments that prune the small checkpoint into shards of a few steps; OUT is to follow."""
    manifest = folder / "keep.json"
    manifest.write_text('{"0": [0,2,4,6], "1": [1,3,5,7], "2": [8,9,10,11], "3": [0,5,10,15]}')
    return ["prune", str(source), "-m", str(manifest), "--max-shard-size", "300KB", "-q"]


def test_the_command_survives_sigkill_before_effects_drawn_at_random(small_moe: Path, tmp_path: Path) -> None:
    """As many threads as it likes; what was written and not synced survives, as it does a process that is killed."""
    command = prune_command(small_moe, tmp_path)
    main([*command, str(tmp_path / "reference")], standalone_mode=False)
    reference = tree(tmp_path / "reference")
    rng = random.Random(0)
    killed = 0
    for attempt in range(8):
        out = tmp_path / f"out{attempt}"

        def prune(out: Path = out) -> None:
            main([*command, str(out)], standalone_mode=False)

        for _ in range(3):
            killed += killed_at_effect(rng.randint(5, 150), prune)
            assert not out.exists() or not looks_complete(out) or complete_files(out) == reference
        prune()
        assert tree(out) == reference
    assert killed > 12


def test_the_real_command_survives_sigkill(small_moe: Path, tmp_path: Path) -> None:
    """In processes of their own, whose steps are as large as they are."""
    command = [sys.executable, "-m", "shardxform", *prune_command(small_moe, tmp_path)]
    subprocess.run([*command, str(tmp_path / "reference")], check=True, capture_output=True)
    out = tmp_path / "out"
    kill_when_there(lambda: os.execv(sys.executable, [*command, str(out)]), out / ".shardxform")  # or it was faster
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert tree(out) == tree(tmp_path / "reference")


def test_sigint_stops_with_130_and_the_rerun_finishes(small_moe: Path, tmp_path: Path) -> None:
    """The command sends itself SIGINT after its first step."""
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it may be ignored where the tests run
        "from shardxform.execution import runner as r\n"
        "step = r._Loop._step\n"
        "def slow(self, s):\n"
        "    facts = step(self, s)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return facts\n"
        "r._Loop._step = slow\n"
        "from shardxform.__main__ import entry\n"
        "entry()\n"
    )
    arguments = [*prune_command(small_moe, tmp_path), str(tmp_path / "out")]
    stopped = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert stopped.returncode == 130, stopped.stderr
    assert "run the same command again to go on" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not looks_complete(tmp_path / "out")
    again = subprocess.run([sys.executable, "-m", "shardxform", *arguments], capture_output=True, text=True, check=True)
    assert "complete and durable" in again.stdout
