"""The scripts of examples/, run as people run them; every one ends well and says what it did.

Those that need torch are run in children of this process, which has it: to start it costs more than what they do.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from faults import forked, overheard
from strategies import by_night

from shardxform.cli import main

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, path: Path, *, fails: bool = False) -> str:
    """What a script prints, given a path."""
    command = [sys.executable, str(EXAMPLES / name), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert (done.returncode != 0) == fails, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def run_forked(name: str, path: Path, tmp_path: Path) -> str:
    """The same of a script that imports torch, in a forked child; so are the commands that it runs."""
    pytest.importorskip("transformers.models.qwen3_5_moe.modeling_qwen3_5_moe")
    import shardxform.experts.scoring
    import shardxform.tuning.session  # noqa: F401  both, and what they import, are there when the children begin

    def child() -> None:
        sys.argv = [name, str(path)]
        os.chdir(path.parent if path.parent != EXAMPLES else tmp_path)
        subprocess.run = command
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    def command(words: list[str], *, check: bool) -> None:
        assert words[:3] == [sys.executable, "-m", "shardxform"]
        assert check
        sys.stdout.flush()
        assert forked(lambda: main(words[3:])) == 0

    code, said, errors = overheard(child, tmp_path)
    assert code == 0, errors
    assert "Traceback" not in errors
    return said


def test_every_example_is_tested() -> None:
    here = Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        assert f'"{script.name}"' in here, script


def test_library_prune(tmp_path: Path) -> None:
    said = run("library_prune.py", tmp_path / "out")
    assert "sound: 72 tensors" in said
    assert (tmp_path / "out/config.json").is_file()
    assert "found complete" in run("library_prune.py", tmp_path / "out")


def test_library_prune_says_in_a_line_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert run("library_prune.py", tmp_path / "out", fails=True).startswith("library_prune.py: ")


def test_custom_manifest(tmp_path: Path, small_moe: Path) -> None:
    from shardxform import Checkpoint, Manifest
    from shardxform.model.layout import layout_of

    said = run("custom_manifest.py", tmp_path / "keep.json")
    assert "8,821,064 -> 5,667,144 bytes" in said
    source = Checkpoint.open(small_moe)
    manifest = Manifest.load(tmp_path / "keep.json", layout_of(source.config, source.tensors))
    assert manifest.num_kept == 8


@pytest.mark.slow
@pytest.mark.oracle
def test_score_and_select(tmp_path: Path) -> None:
    from shardxform import Manifest

    said = run_forked("score_and_select.py", tmp_path / "keep.json", tmp_path)
    assert "layer 3: keeps [" in said
    assert Manifest.load(tmp_path / "keep.json").criterion == "reap"


@by_night
@pytest.mark.slow
@pytest.mark.oracle
def test_quantize_blocks_apart(tmp_path: Path) -> None:
    said = run_forked("quantize_blocks_apart.py", tmp_path / "out", tmp_path)
    assert said.endswith("\nthe bytes are those of one run\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["joined", "whole"]


@pytest.mark.slow
@pytest.mark.oracle
def test_generate(small_moe: Path, tmp_path: Path) -> None:
    said = run_forked("generate.py", small_moe, tmp_path)
    assert said.startswith("In the beginning")
    assert len(said.split()) > 10
