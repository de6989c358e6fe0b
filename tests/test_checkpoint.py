from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import INDEX, Raw, read_checkpoint, shard_bytes, tiny, write_checkpoint, write_json

from shardxform.checkpoint import table as module
from shardxform.checkpoint.table import Checkpoint, Sidecar, is_plain_name, scan
from shardxform.errors import CheckpointError, FamilyError
from shardxform.model.layout import layout_of

ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
TENSORS = {name: Raw("U8", (3,), bytes([i, i, i])) for i, name in enumerate("abcd")}
EMPTY = Raw("F32", (0, 4), b"")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two shards, a b and c d, with an index and a config."""
    return write_checkpoint(tmp_path / "ckpt", TENSORS, {"model_type": "any"}, shards=2)


def refuse(root: Path, message: str) -> CheckpointError:
    """Open must refuse, and scan must report the same instead of raising."""
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(root)
    _, errors = scan(root)
    assert str(errors[0]) == str(caught.value)
    return caught.value


def contents(checkpoint: Checkpoint) -> dict[str, Raw]:
    """Every tensor, read where the table says its bytes are."""
    files = {shard.name: (checkpoint.root / shard.name).read_bytes() for shard in checkpoint.shards}
    return {
        name: Raw(ref.spec.dtype, ref.spec.shape, b"".join(files[r.file][r.offset : r.end] for r in ref.ranges))
        for name, ref in checkpoint.tensors.items()
    }


def set_index(root: Path, weight_map: Any) -> None:
    write_json(root / INDEX, {"metadata": {}, "weight_map": weight_map})


def indexed(**shards: str) -> dict[str, str]:
    """The weight map of `root` with some entries changed."""
    return {"a": ONE, "b": ONE, "c": TWO, "d": TWO} | shards


# -- sources as they are found ----------------------------------------------------------------------------------------


def test_the_table_says_where_the_bytes_of_every_tensor_are(tiny_checkpoint: Path) -> None:
    opened = Checkpoint.open(tiny_checkpoint)
    assert contents(opened) == read_checkpoint(tiny_checkpoint)
    assert opened.nbytes == sum(len(raw.data) for raw in read_checkpoint(tiny_checkpoint).values())
    assert opened.config == json.loads((tiny_checkpoint / "config.json").read_text())
    assert opened.unread == ("notes.bin",)


def test_the_small_checkpoint_opens(small_moe: Path) -> None:
    opened = Checkpoint.open(small_moe)
    assert len(opened.shards) == 4
    assert contents(opened) == read_checkpoint(small_moe)
    assert [s.name for s in opened.sidecars] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def test_tensors_come_by_shard_name_and_then_offset(tmp_path: Path) -> None:
    wide = {"z": Raw("U8", (1,), b"z"), "m": Raw("F32", (1,), b"mmmm"), "a": Raw("U8", (1,), b"a")}
    write_checkpoint(tmp_path, {**wide, "b": Raw("U8", (1,), b"b")}, {}, shards=["y.safetensors", "x.safetensors"])
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b", "m", "z"]


def test_a_shard_is_known_by_its_size_and_the_digest_of_its_header(root: Path) -> None:
    shard = Checkpoint.open(root).shards[1]
    data = (root / TWO).read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert (shard.name, shard.nbytes, shard.data_start) == (TWO, len(data), start)
    assert shard.header_sha256 == hashlib.sha256(data[:start]).hexdigest()
    assert shard.mtime_ns == (root / TWO).stat().st_mtime_ns


def test_opening_reads_no_tensor_data(root: Path) -> None:
    before = Checkpoint.open(root)
    for path in root.glob("*.safetensors"):  # the data becomes a hole: any value would do
        start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
        size = path.stat().st_size
        os.truncate(path, start)
        os.truncate(path, size)
    assert dict(Checkpoint.open(root).tensors) == dict(before.tensors)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors", "modèle 1.safetensors"])
def test_a_single_shard_needs_no_index(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, TENSORS, {}, shards=[name], index=False)
    assert contents(Checkpoint.open(tmp_path)) == TENSORS


def test_model_safetensors_wins_over_other_files_when_there_is_no_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TENSORS, {})
    (tmp_path / "consolidated.safetensors").write_bytes(shard_bytes({"x": EMPTY}))
    opened = Checkpoint.open(tmp_path)
    assert list(opened.tensors) == list("abcd")
    assert opened.unread == ("consolidated.safetensors",)


def test_the_hub_cache_of_symlinks_opens(root: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (root / "tokenizer.json").write_text("{}")
    for path in root.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    opened = Checkpoint.open(snapshot)
    assert contents(opened) == TENSORS
    assert opened.sidecars == (Sidecar("tokenizer.json", 2),)


def test_shard_names_are_whatever_the_index_says(tmp_path: Path) -> None:
    names = ["model.safetensors-00001-of-00002.safetensors", "mtp-é.safetensors"]
    write_checkpoint(tmp_path, TENSORS, {}, shards=names)
    assert [shard.name for shard in Checkpoint.open(tmp_path).shards] == names


def test_a_shard_that_the_index_does_not_name_is_left_unread(root: Path) -> None:
    (root / "extra.safetensors").write_bytes(b"not even a header")
    assert Checkpoint.open(root).unread == ("extra.safetensors",)


def test_a_path_may_be_a_string(root: Path) -> None:
    assert Checkpoint.open(str(root)).tensors == Checkpoint.open(root).tensors


def test_empty_tensors_and_scalars_are_in_the_table(tmp_path: Path) -> None:
    tensors = {"e": EMPTY, "s": Raw("F32", (), b"1234")}
    write_checkpoint(tmp_path, tensors, {})
    opened = Checkpoint.open(tmp_path)
    assert contents(opened) == tensors
    assert opened.tensors["e"].ranges == ()


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "Tokenizer.Model",
        "spiece.model",
        "qwen.tiktoken",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "generation_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/tool_use.jinja",
        "configuration_deepseek.py",
        "LICENSE",
        "LICENSE.txt",
        "LICENCE.md",
        "NOTICE",
        "USE_POLICY.md",
        "README.md",
    ],
)
def test_what_loaders_read_beside_the_shards_is_a_sidecar(root: Path, name: str) -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text("x" * 7)
    opened = Checkpoint.open(root)
    assert (opened.sidecars, opened.unread) == ((Sidecar(name, 7),), ())


def test_what_is_no_part_of_the_model_is_listed_and_left(root: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", ".gitattributes", "training_args.json", "CONFIG.JSON"):
        (root / name).write_text("x")
    for name in ("onnx", "tokenizer", "code.py", ".cache", "additional_chat_templates/x.jinja"):
        (root / name).mkdir(parents=True)
    (root / "link.bin").symlink_to("nowhere")
    (root / "more.py").symlink_to("onnx")
    opened = Checkpoint.open(root)
    assert opened.sidecars == ()
    assert set(opened.unread) == {
        *("pytorch_model.bin", "optimizer.pt", ".gitattributes", "training_args.json", "CONFIG.JSON", "link.bin"),
        *("onnx/", "tokenizer/", "code.py/", ".cache/", "additional_chat_templates/x.jinja", "more.py/"),
    }


def test_a_huge_sidecar_is_listed_and_left(root: Path) -> None:
    (root / "tokenizer.json").touch()
    os.truncate(root / "tokenizer.json", (256 << 20) + 1)
    assert Checkpoint.open(root).unread == ("tokenizer.json",)


# -- refusals: config and directory ------------------------------------------------------------------------------------


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none", "none: no such directory")


def test_a_file_in_place_of_the_directory_is_refused(root: Path) -> None:
    refuse(root / ONE, "expected a directory, found a file")


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, r"no config\.json; expected a checkpoint directory")
    (tmp_path / "params.json").write_text("{}")
    refuse(tmp_path, r"no config\.json, but params\.json: Mistral's own layout .* take the release's files")


def test_a_directory_without_shards_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    refuse(tmp_path, "no safetensors shard and no model.safetensors.index.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON: .* at line 1 column 2"),
        (b"[]", "expected an object, found list"),
        (b'"x"', "expected an object, found str"),
        (b'{"a":1,"a":2}', "duplicate key 'a'"),
        (b'{"x":{"num_experts":8,"num_experts":4}}', "duplicate key 'num_experts'"),
        (b'{"a":"\xff"}', "not UTF-8 at byte 6"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "not JSON"),
        pytest.param(b'{"a":1e999}', "config.json", id="a number that overflows to infinity"),
        pytest.param(b'{"a":"\\ud800"}', "config.json", id="half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_malformed_json_is_refused_naming_the_file(root: Path, name: str, text: bytes, message: str) -> None:
    (root / name).write_bytes(text)
    refuse(root, f"{name}: .*{message}" if message != "config.json" else name)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "Infinity"])
def test_what_python_writes_for_no_number_is_taken_in_a_config_alone(root: Path, text: str) -> None:
    config = (root / "config.json").read_bytes()
    (root / "config.json").write_bytes(config.replace(b"{", f'{{"a":[{text}],'.encode(), 1))
    one, other = Checkpoint.open(root).config, Checkpoint.open(root).config
    assert (one == other, json.dumps(one["a"])) == (True, f"[{text}]")
    (root / INDEX).write_text(f'{{"a":{text}}}')
    refuse(root, f"{INDEX}: {text} is not JSON")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_of_more_than_64_mib_is_refused_unread(root: Path, name: str) -> None:
    (root / name).touch()
    os.truncate(root / name, (64 << 20) + 1)
    refuse(root, f"{name}: more than 67108864 bytes")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_directory_in_place_of_a_json_file_is_refused(root: Path, name: str) -> None:
    (root / name).unlink()
    (root / name).mkdir()
    refuse(root, name)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_dangling_link_in_place_of_a_json_file_is_refused(root: Path, name: str) -> None:
    (root / name).unlink()
    (root / name).symlink_to("../blobs/gone")
    refuse(root, f"no {name}")


@pytest.mark.parametrize("name", ["config.json", INDEX, ONE])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_and_not_waited_for(root: Path, name: str) -> None:
    (root / name).unlink()
    os.mkfifo(root / name)
    code = (
        "import pathlib, sys; from shardxform.checkpoint.table import scan; print(scan(pathlib.Path(sys.argv[1]))[1])"
    )
    try:
        result = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, timeout=3)
    except subprocess.TimeoutExpired:
        pytest.fail(f"opening hangs on a named pipe {name}")
    assert "CheckpointError" in result.stdout
    assert name in result.stdout


def test_a_file_that_may_not_be_read_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == TWO:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    refuse(root, f"{TWO}: Permission denied")


def test_a_directory_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, TENSORS, {})

    def denied(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.os, "scandir", denied)
    refuse(tmp_path, "Permission denied")


def test_a_link_that_leads_back_to_itself_does_no_harm(root: Path) -> None:
    (root / "loop").symlink_to("loop")
    assert Checkpoint.open(root).unread == ("loop",)


def test_a_sidecar_that_links_nowhere_is_refused(root: Path) -> None:
    (root / "tokenizer.json").symlink_to("../blobs/gone")
    refuse(root, "tokenizer.json: No such file")


# -- refusals: index ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 1, [["a", ONE]]])
def test_an_index_without_a_weight_map_is_refused(root: Path, weight_map: Any) -> None:
    set_index(root, weight_map)
    refuse(root, "index.json: expected a non-empty object 'weight_map'")


def test_an_index_that_lacks_the_key_is_refused(root: Path) -> None:
    write_json(root / INDEX, {"metadata": {"total_size": 12}})
    refuse(root, "expected a non-empty object 'weight_map'")


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "..",
        ".",
        "",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "./x.safetensors",
        "sub\\x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "x\x7f.safetensors",
        "x" * 250 + ".safetensors",
        "é" * 125 + ".safetensors",
        "model.bin",
        "model.safetensors.bin",
        "config.json",
        None,
        1,
        True,
        ["x.safetensors"],
        {"x": "x.safetensors"},
        pytest.param("\ud800.safetensors", id="half a surrogate pair"),
    ],
)
def test_an_index_entry_that_is_no_plain_shard_name_is_refused(root: Path, shard: Any) -> None:
    set_index(root, indexed(b=shard))
    error = refuse(root, "index.json: ")
    assert "weight_map['b']: expected a plain .safetensors file name" in str(error) or shard == "\ud800.safetensors"


def test_plain_names_are_told_from_paths() -> None:
    assert all(is_plain_name(name) for name in ("a", "a b", "é", "...", "-x", "x.safetensors", "x" * 255))
    assert not any(
        is_plain_name(name) for name in ("", ".", "..", "a/b", "/", "a\\b", "\0", "\t", "x" * 256, 1, None, b"a")
    )


def test_a_tensor_that_the_index_promises_and_no_shard_has_is_refused(root: Path) -> None:
    set_index(root, indexed(e=TWO))
    refuse(root, f"tensor 'e' should be in {TWO}, but no shard has it")


def test_a_tensor_that_a_shard_has_and_the_index_does_not_name_is_refused(root: Path) -> None:
    weight_map = indexed()
    del weight_map["d"]
    set_index(root, weight_map)
    refuse(root, f"tensor 'd' is in {TWO} but not in the index")


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(root: Path) -> None:
    set_index(root, indexed(b=TWO))
    refuse(root, f"tensor 'b' should be in {TWO}, but it is in {ONE}")


def test_an_empty_tensor_in_another_shard_than_the_index_says_is_refused(root: Path) -> None:
    (root / ONE).write_bytes(shard_bytes({"a": TENSORS["a"], "b": EMPTY}))
    set_index(root, indexed(b=TWO))
    refuse(root, "tensor 'b'")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (TENSORS["a"], TENSORS["a"]),
        (TENSORS["a"], EMPTY),
        (EMPTY, TENSORS["a"]),
        pytest.param(EMPTY, EMPTY, id="both empty"),
    ],
)
def test_a_tensor_in_two_shards_is_refused(root: Path, first: Raw, second: Raw) -> None:
    (root / ONE).write_bytes(shard_bytes({"a": first, "b": TENSORS["b"]}))
    (root / TWO).write_bytes(shard_bytes({"a": second, "c": TENSORS["c"], "d": TENSORS["d"]}))
    refuse(root, f"{TWO}: tensor 'a' is also in ")


def test_several_shards_without_an_index_are_refused(root: Path) -> None:
    (root / INDEX).unlink()
    refuse(root, "2 .safetensors files but no model.safetensors.index.json to say which belong together")


# -- refusals: shards --------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_refused(root: Path) -> None:
    (root / TWO).unlink()
    refuse(root, f"{TWO}: listed in the index but missing")


def test_a_shard_that_links_nowhere_is_refused(root: Path) -> None:
    (root / TWO).unlink()
    (root / TWO).symlink_to("../blobs/gone")
    refuse(root, f"{TWO}: listed in the index but missing")


def test_a_lone_shard_that_links_nowhere_is_refused_without_talk_of_an_index(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    (tmp_path / "model.safetensors").symlink_to("../blobs/gone")
    assert "index" not in str(refuse(tmp_path, "model.safetensors: "))


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (0, "too short"),
        (7, "too short"),
        (8, "header claims"),
        (20, "header claims"),
        (-1, "truncated"),
        (-6, "truncated"),
    ],
)
def test_a_truncated_shard_is_refused(root: Path, cut: int, message: str) -> None:
    data = (root / TWO).read_bytes()
    (root / TWO).write_bytes(data[:cut])
    refuse(root, f"{TWO}: .*{message}")


def test_a_shard_longer_than_its_header_says_is_refused(root: Path) -> None:
    with (root / TWO).open("ab") as file:
        file.write(b"\0")
    refuse(root, f"{TWO}: longer than its header says: header describes 6 bytes of data, the file has 7")


def test_a_pointer_file_in_place_of_a_shard_is_refused(root: Path) -> None:
    (root / TWO).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    refuse(root, f"{TWO}: expected a safetensors file, found none: a pointer of Git LFS")
    (root / TWO).write_bytes(bytes(range(200, 250)))
    refuse(root, f"{TWO}: expected a safetensors file, found none: header claims .* the limit is")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_directory_named_like_a_shard_is_refused(tmp_path: Path, indexed: bool) -> None:
    write_checkpoint(tmp_path, TENSORS, {}, index=indexed)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    refuse(tmp_path, "model.safetensors: expected a file")


def test_scan_reports_every_fault_and_keeps_what_could_be_read(root: Path) -> None:
    (root / ONE).write_bytes(b"x")
    set_index(root, indexed(e=TWO))
    (root / "tokenizer.json").symlink_to("gone")
    opened, errors = scan(root)
    assert opened is not None
    assert list(opened.tensors) == ["c", "d"]
    faults = [f"{ONE}: 1 bytes, too short", "tensor 'e' should be in", "tokenizer.json: No such file"]
    assert len(errors) == len(faults)
    assert all(fault in str(error) for fault, error in zip(faults, errors, strict=True))


def test_a_config_that_parses_is_never_too_deep_for_what_reads_it(
    writable: Callable[[Path], Path], tiny_checkpoints: dict[str, Path]
) -> None:
    copy = writable(tiny_checkpoints["qwen3_moe"])
    config = (copy / "config.json").read_text()
    for depth in (50, 500, 3000, 20_000):
        (copy / "config.json").write_text('{"x":' + '{"x":' * depth + "1" + "}" * depth + "," + config[1:])
        opened, errors = scan(copy)
        assert opened is not None or "nested too deeply" in str(errors[0])
        if opened is not None:  # on Python 3.13 the parser goes deeper than Python functions can
            with contextlib.suppress(FamilyError):
                assert layout_of(opened.config, opened.tensors).num_experts == 6


def test_tiny_tensors_are_all_different() -> None:
    """What the other tests rely on: no mix-up of two tensors goes unnoticed."""
    _, tensors = tiny("qwen3_5_moe")
    assert len({raw.data for raw in tensors.values()}) == len(tensors)
