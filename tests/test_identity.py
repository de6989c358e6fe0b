"""Identity: every tensor's values count, what differs is named, and whatever is kept is bound to it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from build import tiny, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune import manifest_of

from shardxform.checkpoint import identity as module
from shardxform.checkpoint.identity import Identity, identify, names_of
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError, ManifestError
from shardxform.execution.runner import run
from shardxform.plan.prune import plan_prune


@pytest.fixture
def root(tmp_path: Path) -> Path:
    config, tensors = tiny("qwen3_moe")
    return write_checkpoint(tmp_path / "source", tensors, config, shards=2)


def flip(root: Path, tensor: str, byte: int = 0, bit: int = 0) -> None:
    """Flip one bit of a tensor, leaving size and modification time as they were."""
    for shard in Checkpoint.open(root).shards:
        for entry in shard.entries:
            if entry.spec.name == tensor:
                path = root / shard.name
                times, data = path.stat(), bytearray(path.read_bytes())
                data[shard.data_start + entry.begin + byte] ^= 1 << bit
                path.write_bytes(data)
                os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
                return
    raise KeyError(tensor)


def difference(one: Identity, root: Path) -> str:
    here = Checkpoint.open(root)
    return one.difference(identify(here), names_of(here.shards))


def test_every_bit_of_a_small_checkpoint_counts(root: Path) -> None:
    before = identify(Checkpoint.open(root))
    tensors = Checkpoint.open(root).tensors
    for at, (name, ref) in enumerate(tensors.items()):
        byte, bit = (at * 977) % ref.nbytes, at % 8
        flip(root, name, byte, bit)
        assert difference(before, root) == f"other values in tensor '{name}'"
        flip(root, name, byte, bit)
    assert difference(before, root) == ""
    assert identify(Checkpoint.open(root)).fingerprint == before.fingerprint


def test_a_mark_is_the_digest_of_the_bytes_of_its_places(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places spelled out anew: four at least, one for every slab of a stack, in the middle of each share."""
    monkeypatch.setattr(module, "_WHOLE", 0)
    monkeypatch.setattr(module, "_STRIDE", 1000)
    found = identify(Checkpoint.open(root))
    for shard in Checkpoint.open(root).shards:
        data = (root / shard.name).read_bytes()[shard.data_start :]
        for at, entry in enumerate(shard.entries):
            values, size, shape = data[entry.begin : entry.end], entry.nbytes, entry.spec.shape
            places = max(4, -(-size // 1000), shape[0] if len(shape) > 2 else 0)
            seen = values
            if size > 64 * places:
                middles = [(size * p // places + size * (p + 1) // places - 64) // 2 for p in range(places)]
                seen = b"".join(values[m : m + 64] for m in middles)
            assert found.shards[shard.name].marks[8 * at : 8 * at + 8] == blake3(seen).digest()[:8]


@given(
    shape=st.lists(st.integers(1, 300), min_size=1, max_size=4).filter(lambda s: int(np.prod(s)) < 4_000_000),
    stride=st.sampled_from([64, 1000, 4 << 20]),
)
@settings(max_examples=40)
def test_places_lie_in_the_tensor_apart_and_in_every_slab(shape: list[int], stride: int) -> None:
    nbytes = 2 * int(np.prod(shape))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STRIDE", stride)
        pieces = list(module._pieces(nbytes, tuple(shape), False))
    end = 0
    for offset, count in pieces:
        assert end <= offset < offset + count <= nbytes
        end = offset + count
    slab = nbytes // shape[0]
    if len(shape) >= 3 and slab >= 64 and shape[0] < 4096:
        touched = {
            index for offset, count in pieces for index in range(offset // slab, (offset + count - 1) // slab + 1)
        }
        assert touched == set(range(shape[0]))


def test_a_planned_release_has_places_in_every_tensor_and_reads_little() -> None:
    assert len(module._pieces(2 * 256 * 1024 * 2048, (256, 1024, 2048), False)) == 256


@pytest.mark.parametrize("way", ["to_dict", "described"])
def test_an_identity_survives_json(root: Path, way: str) -> None:
    before = identify(Checkpoint.open(root))
    again = Identity.from_dict(json.loads(json.dumps(getattr(before, way)())))
    assert again == before
    assert again.fingerprint == before.fingerprint


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        [],
        {},
        {"config": 5, "shards": {}, "values": {}},
        {"config": "c", "shards": [], "values": {}},
        {"config": "c", "shards": {"a": [1]}, "values": {"a": ""}},
        {"config": "c", "shards": {"a": [1, "h"]}, "values": {"a": "no base64!"}},
        {"config": "c", "shards": {"a": ["1", "h"]}, "values": {"a": ""}},
        {"config": "c", "shards": {}, "values": "of an earlier version"},
    ],
)
def test_what_is_no_identity_is_none(damaged: Any) -> None:
    found = Identity.from_dict(damaged)
    assert found is None or found.shards == {}


def test_differences_are_named_the_most_telling_first(root: Path, tmp_path: Path) -> None:
    before = identify(Checkpoint.open(root))
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "rope_theta": 7}))
    assert difference(before, root) == "another config.json"
    (root / "config.json").write_text(json.dumps(config))
    other, tensors = tiny("qwen3_moe")
    more = write_checkpoint(tmp_path / "more", {**tensors, "extra": next(iter(tensors.values()))}, other, shards=2)
    assert "holds other tensors" in difference(before, more)
    names = list(Checkpoint.open(root).tensors)
    for name in names[:3]:
        flip(root, name)
    shard = Checkpoint.open(root).shards[0].name
    assert difference(before, root) == f"other values in tensor '{names[0]}' and 2 more of {shard}"


def test_files_of_the_hubs_cache_are_known_by_their_names(root: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(root.glob("*.safetensors"))):
        path.rename(blobs / f"{number:064x}")
        path.symlink_to(blobs / f"{number:064x}")
    local = identify(Checkpoint.open(root))
    assert [shard.sha256 for shard in local.shards.values()] == [f"{number:064x}" for number in range(2)]
    listed = {
        name: module.ShardIdentity(nbytes=each.nbytes, header=each.header, sha256=each.sha256)
        for name, each in local.shards.items()
    }
    remote = Identity(config=local.config, shards=listed, repository="hf://a/b@c")
    assert remote.is_comparable(local)
    assert remote.difference(local) == ""
    again = Identity.from_dict(json.loads(json.dumps(local.described())))
    assert again is not None
    assert again.is_comparable(remote)
    plain = Identity.from_dict(local.to_dict())
    assert plain is not None
    assert not plain.is_comparable(remote)
    first, *_ = listed
    other = {
        **listed,
        first: module.ShardIdentity(nbytes=listed[first].nbytes, header=listed[first].header, sha256="f" * 64),
    }
    assert Identity(config=local.config, shards=other).difference(local) == f"other values in {first}"


def test_a_shard_that_cannot_be_read_is_named(root: Path) -> None:
    found = Checkpoint.open(root)
    (root / found.shards[0].name).unlink()
    with pytest.raises(CheckpointError, match=f"{found.shards[0].name}: No such file"):
        identify(found)


def test_a_plan_reads_values_when_its_fingerprint_is_asked_for_and_once(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, read = Checkpoint.open(root), list[int]()
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: read.append(at) or pread(fd, count, at))
    plan = plan_prune(checkpoint, manifest_of(root))
    assert not read
    assert plan.inputs["source"]["values"] == identify(checkpoint).to_dict()["values"]
    twice = len(read)
    assert plan.fingerprint == replace(plan).fingerprint
    assert len(read) == twice > 0


def test_a_shard_that_went_away_is_named_before_anything_is_written(root: Path) -> None:
    checkpoint = Checkpoint.open(root)
    plan = plan_prune(checkpoint, manifest_of(root))
    (root / checkpoint.shards[0].name).unlink()
    with pytest.raises(CheckpointError, match=f"{checkpoint.shards[0].name}: No such file"):
        run(plan, root.parent / "out")
    assert not list(root.parent.glob("out/**/*.safetensors*"))


def test_a_manifest_of_other_values_is_refused_and_named(root: Path) -> None:
    checkpoint = Checkpoint.open(root)
    chosen = replace(manifest_of(root), model={"identity": identify(checkpoint).described()})
    plan = plan_prune(checkpoint, chosen)
    name = next(n for n in checkpoint.tensors if "mlp.gate" in n)
    flip(root, name, 3)
    with pytest.raises(ManifestError, match=f"chosen on another checkpoint: other values in tensor '{name}'; score"):
        plan_prune(Checkpoint.open(root), chosen)
    again = plan_prune(Checkpoint.open(root), chosen.of_any_source())
    assert again.shards == plan.shards
    assert again.fingerprint != plan.fingerprint
