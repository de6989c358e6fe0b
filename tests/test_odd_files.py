"""Oddities of files are read as the reference readers read them, and what those refuse is refused or reported."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import INDEX, read_checkpoint, tiny, write_checkpoint

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError
from shardxform.execution.runner import run
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import ViewOptions
from shardxform.verification import verify

KEEP = Manifest(keep=dict.fromkeys(range(3), (1, 3, 4)))
BOM = b"\xef\xbb\xbf"


def written(root: Path, shards: Any = 1, **over: Any) -> Path:
    config, tensors = tiny("qwen3_moe", **over)
    return write_checkpoint(root, tensors, config, shards=shards, files={"tokenizer.json": "{}"})


def with_metadata(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a shard's header in place, as the file's owner might."""
    path = root / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def reference_opens(root: Path) -> bool:
    """Whether safetensors itself opens the shard."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(root / "model.safetensors", "np") as shard:
            return len(list(shard.keys())) > 0
    except SafetensorError:
        return False


def opens(root: Path) -> bool:
    try:
        return len(Checkpoint.open(root).tensors) > 0
    except CheckpointError:
        return False


@pytest.mark.parametrize(
    "metadata",
    [
        ...,
        None,
        {},
        {"format": "pt"},
        {"format": "np"},
        {"a": "b"},
        {"format": None},
        {"format": 3},
        [],
        "pt",
        {"a": {}},
        0,
    ],
)
def test_metadata_of_a_shard_is_taken_where_safetensors_takes_it(metadata: Any, tmp_path: Path) -> None:
    root = written(tmp_path / "s")
    with_metadata(root, lambda h: h.pop("__metadata__") if metadata is ... else h.update({"__metadata__": metadata}))
    assert opens(root) == reference_opens(root)
    if opens(root):
        out = tmp_path / "out"
        run(plan_prune(Checkpoint.open(root), KEEP), out)
        assert verify(out, source=root).sound


@pytest.mark.parametrize(
    "metadata", [{}, {"total_size": None}, {"total_size": "12"}, {"total_size": 0, "more": [None]}]
)
def test_an_index_with_odd_metadata_is_read(metadata: Any, tmp_path: Path) -> None:
    root = written(tmp_path / "s", 3)
    index = json.loads((root / INDEX).read_text())
    (root / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
    report = verify(root)
    assert report.sound
    assert "total-size" in [warning.code for warning in report.warnings]
    run(plan_prune(Checkpoint.open(root), KEEP), tmp_path / "out")
    assert verify(tmp_path / "out", source=root).sound


@pytest.mark.parametrize("metadata", [..., None, "x", [], 3])
def test_an_index_that_transformers_refuses_is_read_and_reported(metadata: Any, tmp_path: Path) -> None:
    """vLLM and SGLang read no more than weight_map; the output has an index of its own."""
    root = written(tmp_path / "s", 3)
    index = json.loads((root / INDEX).read_text())
    del index["metadata"]
    (root / INDEX).write_text(json.dumps(index if metadata is ... else {**index, "metadata": metadata}))
    (problem,) = verify(root).problems
    assert (problem.code, problem.where) == ("index", INDEX)
    assert "which transformers refuses" in problem.message
    run(plan_prune(Checkpoint.open(root), KEEP), tmp_path / "out")
    assert verify(tmp_path / "out", source=root).sound


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_byte_order_mark_is_named(name: str, tmp_path: Path) -> None:
    root = written(tmp_path / "s", 2)
    (root / name).write_bytes(BOM + (root / name).read_bytes())
    with pytest.raises(CheckpointError, match=rf"{name}: not JSON: it begins with a byte-order mark"):
        Checkpoint.open(root)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00001.safetensors", "weights.safetensors", "pytorch_model.safetensors"]
)
def test_a_lone_shard_is_read_under_any_name_and_written_under_the_usual_one(name: str, tmp_path: Path) -> None:
    root = written(tmp_path / "s")
    (root / "model.safetensors").rename(root / name)
    run(plan_prune(Checkpoint.open(root), KEEP), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert verify(tmp_path / "out", source=root).sound


def test_a_whole_shard_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    """transformers reads model.safetensors, vLLM what the index lists."""
    root = written(tmp_path / "s", 2)
    other = written(tmp_path / "other")
    (root / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors lies beside an index of other shards"):
        Checkpoint.open(root)
    indexed = written(tmp_path / "indexed")
    names = dict.fromkeys(read_checkpoint(indexed), "model.safetensors")
    (indexed / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert Checkpoint.open(indexed).tensors.keys() == read_checkpoint(root).keys()


@pytest.mark.parametrize("declared", [None, {}])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_an_empty_declaration_declares_nothing(declared: Any, key: str, tmp_path: Path) -> None:
    """`{}` is what transformers refuses to load, so it is not passed on."""
    root = written(tmp_path / "s")
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, key: declared}))
    run(plan_prune(Checkpoint.open(root), KEEP), tmp_path / "out")
    assert verify(tmp_path / "out", source=root).sound
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert out.get(key, ...) == (None if declared is None else ...)


@pytest.mark.parametrize("vision", ["there", None, ...])
def test_text_only_asks_nothing_of_a_vision_tower_that_was_stripped(vision: Any, tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_5_moe")
    if vision != "there":
        config["vision_config"] = None
    if vision is ...:
        del config["vision_config"]
    stripped = {name: t for name, t in tensors.items() if not name.startswith("model.visual.")}
    root = write_checkpoint(tmp_path / "s", stripped, config, files={"tokenizer.json": "{}"})
    plan = plan_prune(Checkpoint.open(root), None, ViewOptions(text_only=True))
    assert plan.notes == ()
    run(plan, tmp_path / "out")
    assert verify(tmp_path / "out", source=root).sound


def test_mtp_layers_that_were_stripped_are_said(tmp_path: Path) -> None:
    config, tensors = tiny("deepseek_v3")
    stripped = {name: t for name, t in tensors.items() if not name.startswith("model.layers.3.")}
    root = write_checkpoint(tmp_path / "s", stripped, config, files={"tokenizer.json": "{}"})
    plan = plan_prune(Checkpoint.open(root), Manifest(keep={1: (0, 1, 4, 5), 2: (1, 2, 5, 6)}))
    assert any("declares MTP layers, but the source has no tensor of them" in note for note in plan.notes)
    run(plan, tmp_path / "out")
    assert verify(tmp_path / "out", source=root).sound
