"""Models in GGUF in a repository of the hub: heads are fetched, and of the data what is kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from build import write_json
from ggufs import moe_metadata, moe_tensors, write_gguf
from hubserver import HubServer
from test_remote import command, files

from shardxform.checkpoint.remote.repository import RepoName, parse_source
from shardxform.errors import CheckpointError

REPO = "org/moe-gguf"
ONE, SPLIT = f"hf://{REPO}/moe-Q8.gguf", f"hf://{REPO}/split/moe-00001-of-00003.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the repository holds, and beside it a manifest."""
    root = tmp_path / "here"
    (root / "split").mkdir(parents=True)
    write_gguf(root / "moe-Q8.gguf", moe_metadata(), moe_tensors())
    write_gguf(root / "split" / "moe.gguf", moe_metadata(), moe_tensors(), max_tensors=10)
    (root / "mmproj-moe.gguf").write_bytes(b"GGUF")
    (root / "README.md").write_text("about")
    write_json(tmp_path / "keep.json", {"format": "shardxform.keep", "version": 1, "keep": {"0": [0, 5], "1": [1, 6]}})
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.add_repo(REPO, folder)
        running.reset_counts()
        yield running


@pytest.mark.parametrize(("named", "here"), [(ONE, "moe-Q8.gguf"), (SPLIT, "split/moe-00001-of-00003.gguf")])
def test_a_file_of_a_repository_is_pruned_as_one_in_a_folder(
    named: str, here: str, server: HubServer, folder: Path, tmp_path: Path
) -> None:
    home, keep = tmp_path / "home", tmp_path / "keep.json"
    command(server, home, "prune", folder / here, tmp_path / "local", "-m", keep, "-q")
    assert not server.requests
    told = command(server, home, "inspect", named, "--json")
    head = server.data_bytes(REPO)
    assert json.loads(told)["slabs"]["num_experts"] == 8
    server.reset_counts()
    said = command(server, home, "prune", named, tmp_path / "out", "-m", keep, "-q")
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert f"verify {tmp_path}/out --source {named}@" in said
    kept = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.gguf"))
    assert server.data_bytes(REPO) <= head + kept
    record = json.loads((tmp_path / "out" / "shardxform.json").read_bytes())
    assert record["inputs"]["source"]["repository"].startswith(f"hf://{REPO}@")
    source = said.split("--source ")[1].split()[0]
    assert "values of all 27 tensors equal" in command(
        server, home, "verify", tmp_path / "out", "--source", source, "-q"
    )
    assert "already complete" in command(server, home, "prune", source, tmp_path / "out", "-m", keep, "-q")


def test_what_is_not_there_is_said(server: HubServer, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    said = command(server, home, "inspect", f"hf://{REPO}/other.gguf", code=1)
    assert "no such file at commit" in said
    assert "in GGUF there are: mmproj-moe.gguf, moe-Q8.gguf, split/moe-00001-of-00003.gguf" in said
    said = command(server, home, "inspect", REPO, code=1)
    assert f"a file of it is named as hf://{REPO}/mmproj-moe.gguf" in said
    assert "a model in GGUF, which can be" in command(server, home, "quantize", ONE, out, code=1)
    said = command(server, home, "inspect", ONE, code=1, HF_HUB_OFFLINE="1")
    assert "read from the hub, which is not asked here" in said


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://a/b/c.gguf", RepoName("a/b", file="c.gguf")),
        ("hf://a/b/c/d-00001-of-00002.gguf@v1", RepoName("a/b", "v1", file="c/d-00001-of-00002.gguf")),
    ],
)
def test_names_of_files(text: str, name: RepoName) -> None:
    assert parse_source(text) == name
    assert parse_source(str(name)) == name


@pytest.mark.parametrize(
    "text", ["hf://a/b/c", "hf://a/b/../c.gguf", "hf://a/b//c.gguf", "hf://a/c.gguf/", "hf://a/b/.gguf"]
)
def test_what_is_no_name_of_a_file_is_refused(text: str) -> None:
    if text == "hf://a/b/.gguf":
        assert parse_source(text) == RepoName("a/b", file=".gguf")
        return
    with pytest.raises(CheckpointError, match="expected hf://owner/name"):
        parse_source(text)
