"""Checkpoints on a hub: the real commands against a local server, held to what they write from a folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubserver import Fault, HubServer

pytest.importorskip("huggingface_hub")

KEEP = Path(__file__).resolve().parents[1] / "manifests" / "small-moe-keep8.json"
NAME = "org/small"
SHARDS = r"\.safetensors($|\?)"


@pytest.fixture
def server(small_moe: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.add_repo(NAME, small_moe)
        running.reset_counts()
        yield running


def command(server: HubServer, home: Path, *arguments: object, code: int = 0) -> str:
    environment = {**os.environ, **server.env(home)}
    run = subprocess.run(
        [sys.executable, "-m", "shardxform", *map(str, arguments)],
        env=environment,
        cwd=home.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == code, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout + run.stderr


def files(root: Path) -> dict[str, bytes]:
    """What an output holds, its record apart: that names where the source was."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name != "shardxform.json"}


def test_pruning_a_repository_gives_the_bytes_of_pruning_a_folder(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    command(server, tmp_path / "home", "prune", small_moe, tmp_path / "local", "-m", KEEP, "-q")
    assert server.data_bytes(NAME) == 0
    command(server, tmp_path / "home", "prune", NAME, tmp_path / "out", "-m", KEEP, "-q")
    assert files(tmp_path / "out") == files(tmp_path / "local")
    shards = sum(path.stat().st_size for path in small_moe.glob("*.safetensors"))
    kept = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert kept < 0.7 * shards
    # What pruned experts hold is not fetched; headers are, with the first bytes after them.
    assert (
        kept - (1 << 16)
        <= server.data_bytes(NAME)
        <= 1.02 * kept + (1 << 16) * len(list(small_moe.glob("*.safetensors")))
    )


def test_broken_answers_change_nothing(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    command(server, tmp_path / "home", "quantize", small_moe, tmp_path / "local", "-m", KEEP, "-q")
    server.faults += [
        Fault("drop", match=SHARDS, count=2, after=1000),
        Fault("503", match=SHARDS, count=2),
        Fault("429", match=SHARDS, count=1, retry_after=1),
        Fault("short", match=SHARDS, count=2),
    ]
    command(server, tmp_path / "home", "quantize", f"hf://{NAME}@main", tmp_path / "out", "-m", KEEP, "-q")
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert len(server.fired) >= 5


def test_a_folder_of_that_name_wins(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    shutil.copytree(small_moe, tmp_path / NAME)
    assert "org/small" in command(server, tmp_path / "home", "inspect", NAME)
    assert not server.requests


def test_looking_reads_headers_only(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    told = command(server, tmp_path / "home", "inspect", NAME)
    assert "qwen3_5_moe" in told
    count = len(list(small_moe.glob("*.safetensors")))
    assert 0 < server.data_bytes(NAME) <= count << 18
    assert "dry run" in command(server, tmp_path / "home", "prune", NAME, tmp_path / "out", "-m", KEEP, "--dry-run")
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_refused_in_a_line(server: HubServer, tmp_path: Path) -> None:
    for name in ("org/nothing", f"{NAME}@no-such-branch", "no/such/folder"):
        told = command(server, tmp_path / "home", "inspect", name, code=1)
        assert len(told.strip().splitlines()) <= 2, told
