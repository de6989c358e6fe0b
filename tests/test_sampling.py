"""One fine-tune is told from another by its values, though config, headers and sizes are the same."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from build import tiny, write_checkpoint
from click.testing import CliRunner

from shardxform import sampling
from shardxform.checkpoint import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError
from shardxform.sampling import sampled


def checkpoint(root: Path, shards: int = 2) -> Checkpoint:
    config, tensors = tiny("qwen3_5_moe_text")
    return Checkpoint.open(write_checkpoint(root, tensors, config, shards=shards))


def other(source: Path, out: Path) -> Path:
    """The same layout of other values, in files that are older than anything made since."""
    shutil.copytree(source, out)
    for shard in out.glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes((byte + 1) % 128 for byte in data[start:])
        shard.write_bytes(data)
        os.utime(shard, (1, 1))
    return out


def test_the_mark_is_of_evenly_spread_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = checkpoint(tmp_path / "m")
    monkeypatch.setattr(sampling, "_PLACES", 10)
    monkeypatch.setattr(sampling, "_BYTES", 4)
    stride = sum(shard.nbytes for shard in found.shards) // 10
    pieces = b""
    for name in sorted(shard.name for shard in found.shards):
        data = (found.root / name).read_bytes()
        pieces += b"".join(data[at : at + 4] for at in range((stride - 4) // 2, len(data) + stride, stride))
    assert sampled(found.root, found.shards) == hashlib.sha256(pieces).hexdigest()


def test_values_make_the_mark_and_the_folder_does_not(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m")
    mark = sampled(found.root, found.shards)
    moved = Checkpoint.open(shutil.copytree(found.root, tmp_path / "moved"))
    assert sampled(moved.root, reversed(moved.shards)) == mark
    changed = Checkpoint.open(other(found.root, tmp_path / "other"))
    assert changed.fingerprint == found.fingerprint
    assert sampled(changed.root, changed.shards) != mark


def test_a_shard_that_is_gone_is_refused(tmp_path: Path) -> None:
    found = checkpoint(tmp_path / "m")
    (found.root / found.shards[0].name).unlink()
    with pytest.raises(CheckpointError, match=found.shards[0].name):
        sampled(found.root, found.shards)


@pytest.mark.parametrize("command", ["quantize", "prune"])
def test_what_was_made_of_another_fine_tune_is_not_complete(command: str, small_moe: Path, tmp_path: Path) -> None:
    source = shutil.copytree(small_moe, tmp_path / "m")
    run = [command, "SRC", str(tmp_path / "out"), "-q", *(["--mtp", "drop"] if command == "prune" else [])]
    made = CliRunner().invoke(main, [arg.replace("SRC", str(source)) for arg in run])
    assert made.exit_code == 0, made.output
    twin = other(source, tmp_path / "twin")
    refused = CliRunner().invoke(main, [arg.replace("SRC", str(twin)) for arg in run])
    assert refused.exit_code == 1
    assert "made from other inputs: source.values: other weights of the same names and shapes" in refused.output
