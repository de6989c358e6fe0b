"""The scripts of examples/, run as people run them; every one ends well and says what it did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, path: Path, *, fails: bool = False) -> str:
    """What a script prints, given a path."""
    command = [sys.executable, str(EXAMPLES / name), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path.parent)
    assert (done.returncode != 0) == fails, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


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
    from shardxform.layout import layout_of

    said = run("custom_manifest.py", tmp_path / "keep.json")
    assert "8,821,064 -> 5,667,144 bytes" in said
    source = Checkpoint.open(small_moe)
    manifest = Manifest.load(tmp_path / "keep.json", layout_of(source.config, source.tensors))
    assert manifest.num_kept == 8


@pytest.mark.slow
@pytest.mark.oracle
def test_score_and_select(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from shardxform import Manifest

    said = run("score_and_select.py", tmp_path / "keep.json")
    assert "layer 3: keeps [" in said
    assert Manifest.load(tmp_path / "keep.json").criterion == "reap"


@pytest.mark.slow
@pytest.mark.oracle
def test_quantize_blocks_apart(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert run("quantize_blocks_apart.py", tmp_path / "out").endswith("the bytes are those of one run\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["merged", "whole"]


@pytest.mark.slow
@pytest.mark.oracle
def test_generate(small_moe: Path) -> None:
    pytest.importorskip("transformers")
    said = run("generate.py", small_moe)
    assert said.startswith("In the beginning")
    assert len(said.split()) > 10
