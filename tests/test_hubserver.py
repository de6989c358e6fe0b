"""The hub of the tests speaks the protocol as the real client does, and breaks it only on command."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub as hub
import pytest
from hubserver import READER, WRITER, Fault, HubServer
from huggingface_hub import constants, errors

SHARD = "model.safetensors-00001-of-00004.safetensors"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with HubServer() as running:
        yield running


@pytest.fixture
def api(server: HubServer) -> Any:
    return hub.HfApi(endpoint=server.endpoint, token=WRITER)


def ask(url: str, *, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body; what came of it where the connection broke off."""
    split = urlsplit(url)
    connection = http.client.HTTPConnection(split.netloc, timeout=20)
    with contextlib.closing(connection):
        connection.request(method, f"{split.path}?{split.query}", headers=headers)
        answer = connection.getresponse()
        try:
            body = answer.read()
        except http.client.IncompleteRead as e:
            body = e.partial
        return answer.status, {key.lower(): value for key, value in answer.headers.items()}, body


def link(server: HubServer, name: str = SHARD) -> str:
    """The signed URL of a file of o/m."""
    status, headers, _ = ask(f"{server.endpoint}/o/m/resolve/main/{name}")
    assert status == 302
    return headers["location"]


def download(server: HubServer, cache: Path, name: str = SHARD) -> Path:
    return Path(hub.hf_hub_download("o/m", name, endpoint=server.endpoint, cache_dir=cache, token=False))


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_snapshot_equals_the_directory(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    commit = server.add_repo("o/m", small_moe)
    got = Path(hub.snapshot_download("o/m", endpoint=server.endpoint, cache_dir=tmp_path, token=WRITER))
    assert got.name == commit
    assert contents(got) == contents(small_moe)
    assert server.data_bytes("o/m") == sum(p.stat().st_size for p in small_moe.glob("*.safetensors"))
    assert server.tokens_leaked == 0
    server.reset_counts()
    assert (server.requests, server.data_bytes("o/m")) == ([], 0)


def test_what_the_api_tells_of_files(server: HubServer, api: Any, small_moe: Path) -> None:
    import hashlib

    commit = server.add_repo("o/m", small_moe, revisions={"old/er": small_moe / "text"})
    server.page_size = 3
    info = api.model_info("o/m", files_metadata=True)
    data = (small_moe / SHARD).read_bytes()
    by_name = {sibling.rfilename: sibling for sibling in info.siblings}
    assert (info.sha, info.private) == (commit, False)
    assert (by_name[SHARD].size, by_name[SHARD].lfs.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    tree = {file.path: file for file in api.list_repo_tree("o/m", recursive=True)}
    assert set(by_name) | {"text"} == set(tree)
    assert tree[SHARD].blob_id == by_name[SHARD].blob_id
    assert tree["config.json"].blob_id == hub.utils.sha.git_hash((small_moe / "config.json").read_bytes())
    assert [file.path for file in api.list_repo_tree("o/m", "text")] == ["text/calib.jsonl", "text/heldout.jsonl"]
    assert [file.path for file in api.get_paths_info("o/m", ["config.json", "none"])] == ["config.json"]
    assert api.list_repo_files("o/m", revision="old/er") == ["calib.jsonl", "heldout.jsonl"]
    assert [branch.name for branch in api.list_repo_refs("o/m").branches] == ["main", "old/er"]
    at = hub.get_hf_file_metadata(hub.hf_hub_url("o/m", SHARD, endpoint=server.endpoint), token=False)
    assert (at.commit_hash, at.etag, at.size) == (commit, hashlib.sha256(data).hexdigest(), len(data))
    assert urlsplit(at.location).netloc == f"127.0.0.1:{server.link_port}"
    assert at.xet_file_data is None
    plain = hub.get_hf_file_metadata(hub.hf_hub_url("o/m", "config.json", endpoint=server.endpoint), token=False)
    assert (plain.etag, plain.size) == (tree["config.json"].blob_id, tree["config.json"].size)


def test_a_directory_that_changed_is_another_commit_of_main(server: HubServer, api: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    first = server.add_repo("o/m", tmp_path / "one")
    second = server.add_repo("o/m", tmp_path / "two")
    assert api.model_info("o/m").sha == second != first
    urls = [f"{server.endpoint}/o/m/resolve/{revision}/config.json" for revision in (first, second, "main")]
    assert [ask(url)[2] for url in urls] == [b"one", b"two", b"two"]


def test_refusals_are_those_that_the_client_knows(server: HubServer, small_moe: Path) -> None:
    server.add_repo("o/m", small_moe)
    server.add_repo("o/gated", small_moe, gated=True, token="hf_guest")
    server.add_repo("o/private", small_moe, private=True, token="hf_guest")

    def asked(token: Any, call: Callable[[Any], object]) -> object:
        try:
            return call(hub.HfApi(endpoint=server.endpoint, token=token))
        except errors.HfHubHTTPError as e:
            return type(e), e.response.status_code

    def fetch(name: str, file: str = "config.json") -> Callable[[Any], object]:
        return lambda api: api.get_hf_file_metadata(url=f"{server.endpoint}/{name}/resolve/main/{file}").size

    size = (small_moe / "config.json").stat().st_size
    missing, gated = errors.RepositoryNotFoundError, errors.GatedRepoError
    assert asked(False, lambda api: api.model_info("o/none")) == (missing, 401)
    assert asked(READER, lambda api: api.model_info("o/none")) == (missing, 404)
    assert asked(False, lambda api: api.model_info("o/m", revision="x")) == (errors.RevisionNotFoundError, 404)
    assert asked(False, fetch("o/m", "none.json")) == (errors.RemoteEntryNotFoundError, 404)
    assert asked("hf_wrong", lambda api: api.model_info("o/m")) == (errors.HfHubHTTPError, 401)
    assert [asked(token, fetch("o/gated")) for token in (False, READER)] == [(gated, 401), (gated, 403)]
    assert [asked(token, fetch("o/private")) for token in (False, READER)] == [(missing, 401), (missing, 404)]
    assert [asked("hf_guest", fetch(name)) for name in ("o/gated", "o/private")] == [size, size]
    assert asked(READER, lambda api: api.whoami()["name"]) == "tester"
    assert asked(READER, lambda api: api.create_repo("org/new")) == (errors.HfHubHTTPError, 403)
    assert asked(WRITER, lambda api: api.create_repo("other/new")) == (errors.HfHubHTTPError, 403)


@pytest.mark.parametrize("name", [SHARD, "config.json"])
@pytest.mark.parametrize("asked", ["0-9", "7-", "-5", "3-3", "0-999999999"])
def test_ranges(server: HubServer, small_moe: Path, name: str, asked: str) -> None:
    server.add_repo("o/m", small_moe)
    data = (small_moe / name).read_bytes()
    first, last = asked.split("-")
    start, stop = (int(first), int(last or len(data)) + 1) if first else (len(data) - int(last), len(data))
    url = link(server) if name == SHARD else f"{server.endpoint}/o/m/resolve/main/{name}"
    status, headers, body = ask(url, Range=f"bytes={asked}")
    stop = min(stop, len(data))
    assert (status, headers["content-range"]) == (206, f"bytes {start}-{stop - 1}/{len(data)}")
    assert body == data[start:stop]
    assert ask(url, Range=f"bytes={len(data)}-")[:1] == (416,)
    assert server.data_bytes("o/m") == (len(body) if name == SHARD else 0)
    assert (server.requests[-2].range, server.requests[-2].bytes_sent) == (f"bytes={asked}", len(body))


def test_links_are_good_for_one_file_and_one_time(server: HubServer, small_moe: Path) -> None:
    server.add_repo("o/m", small_moe)
    url = link(server)
    assert ask(url)[0] == 200
    assert ask(url.replace("00001-of", "00002-of"))[0] == 403
    assert ask(url[:-1] + "z")[0] == 403
    assert ask(url.split("?")[0])[0] == 403
    server.link_seconds = -1
    assert ask(link(server))[0] == 403
    assert server.tokens_leaked == 0
    assert ask(url, Authorization=f"Bearer {WRITER}")[0] == 200
    assert server.tokens_leaked == 1


def test_a_dropped_download_goes_on_where_it_broke_off(
    server: HubServer, small_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_repo("o/m", small_moe)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    server.faults.append(Fault("drop", SHARD, method="GET", after=1_000_000))
    assert download(server, tmp_path).read_bytes() == (small_moe / SHARD).read_bytes()
    assert [r.range for r in server.requests if r.path.startswith("/lfs/")] == [None, "bytes=1000000-"]
    assert server.data_bytes("o/m") == (small_moe / SHARD).stat().st_size
    assert server.fired == [("drop", server.requests[-1].path)]


def test_too_many_requests_are_asked_again_later(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    server.add_repo("o/m", small_moe)
    server.faults.append(Fault("429", "^/lfs/", retry_after=1))
    started = time.monotonic()
    assert download(server, tmp_path).read_bytes() == (small_moe / SHARD).read_bytes()
    assert time.monotonic() - started > 1
    assert [r.status for r in server.requests if r.path.startswith("/lfs/")] == [429, 200]


@pytest.mark.parametrize(
    ("fault", "status"),
    [(Fault("500", "^/lfs/"), 500), (Fault("503", "^/lfs/"), 503), (Fault("expired", "^/lfs/"), 403)],
)
def test_a_fault_that_the_client_does_not_mend(
    server: HubServer, small_moe: Path, tmp_path: Path, fault: Fault, status: int
) -> None:
    server.add_repo("o/m", small_moe)
    server.faults.append(fault)
    with pytest.raises((errors.HfHubHTTPError, errors.LocalEntryNotFoundError)):
        download(server, tmp_path)
    assert server.requests[-1].status == status
    assert download(server, tmp_path).read_bytes() == (small_moe / SHARD).read_bytes()


@pytest.mark.parametrize("kind", ["short", "wrong_length"])
def test_a_length_that_is_wrong_is_seen_by_the_client(
    server: HubServer, small_moe: Path, tmp_path: Path, kind: str
) -> None:
    server.add_repo("o/m", small_moe)
    server.faults.append(Fault(kind, SHARD))
    with pytest.raises(OSError, match="Consistency check failed"):
        download(server, tmp_path)
    assert len(server.fired) == 1


def test_faults_of_one_answer(server: HubServer, small_moe: Path) -> None:
    server.add_repo("o/m", small_moe)
    data, url = (small_moe / SHARD).read_bytes(), link(server)

    def with_fault(fault: Fault) -> tuple[int, dict[str, str], bytes]:
        server.faults = [fault]
        return ask(url, Range="bytes=100-199")

    good = with_fault(Fault("500", "no such path"))
    assert good[2] == data[100:200]
    assert with_fault(Fault("no_range"))[::2] == (200, data)
    status, headers, body = with_fault(Fault("changed"))
    assert (status, headers["etag"] == good[1]["etag"]) == (206, False)
    assert body == bytes([data[100] ^ 255]) + data[101:200]
    status, headers, body = with_fault(Fault("short"))
    assert (status, body, headers["content-range"]) == (206, data[100:150], good[1]["content-range"])
    status, headers, body = with_fault(Fault("wrong_length"))
    assert (status, body, headers["content-range"]) == (206, data[100:200], f"bytes 100-199/{len(data) + 1}")
    assert with_fault(Fault("drop", after=30))[2] == data[100:130]
    started = time.monotonic()
    assert with_fault(Fault("slow", after=10, retry_after=0.3))[2] == data[100:200]
    assert time.monotonic() - started > 0.3
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        with_fault(Fault("drop"))
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        with_fault(Fault("lost"))
    assert ask(url, Range="bytes=100-199")[2] == data[100:200]  # used up
    with pytest.raises(ValueError, match="found 'drip'"):
        Fault("drip")


def test_a_change_is_told_everywhere(server: HubServer, small_moe: Path) -> None:
    commit = server.add_repo("o/m", small_moe)
    url = f"{server.endpoint}/o/m/resolve/main/{SHARD}"
    before = ask(url, method="HEAD")[1]
    server.faults.append(Fault("changed", count=2))
    after = ask(url, method="HEAD")[1]
    assert after["x-repo-commit"] != before["x-repo-commit"] == commit
    assert after["x-linked-etag"] != before["x-linked-etag"]
    assert json.loads(ask(f"{server.endpoint}/api/models/o/m/revision/main")[2])["sha"] != commit


def test_random_faults_are_as_many_as_were_asked_for(server: HubServer, small_moe: Path) -> None:
    server.add_repo("o/m", small_moe)
    data = (small_moe / SHARD).read_bytes()
    kinds = ("drop", "429", "500", "503", "short", "expired", "no_range")

    def fired(seed: int) -> list[str]:
        server.reset_counts()
        server.random_faults(seed, 0.5, kinds, 20, match="^/lfs/")
        whole = b""
        while len(whole) < len(data):
            with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
                stop = min(len(whole) + 99_999, len(data)) - 1
                status, _, body = ask(link(server), Range=f"bytes={len(whole)}-{stop}")
                whole += body if status == 206 else b""
        assert whole == data
        return [kind for kind, _ in server.fired]

    one = fired(1)
    assert len(one) == 20
    assert set(one) == set(kinds)
    assert fired(1) == one != fired(2)


@pytest.mark.parametrize("part_bytes", [None, 1_000_000])
def test_a_folder_is_uploaded_once(
    server: HubServer, api: Any, small_moe: Path, tmp_path: Path, part_bytes: int | None
) -> None:
    server.part_bytes = part_bytes
    api.create_repo("org/new", private=True)
    server.faults.append(Fault("500", "^/upload/", method="PUT"))
    done = api.upload_folder(repo_id="org/new", folder_path=small_moe)
    assert done.oid == api.model_info("org/new").sha
    options = {"endpoint": server.endpoint, "cache_dir": tmp_path}
    got = Path(hub.snapshot_download("org/new", token=WRITER, **options))
    attributes = {".gitattributes": (got / ".gitattributes").read_bytes()}
    assert contents(got) == contents(small_moe) | attributes
    with pytest.raises(errors.RepositoryNotFoundError):
        api.model_info("org/new", token=False)
    server.reset_counts()
    again = api.upload_folder(repo_id="org/new", folder_path=small_moe)
    assert (again.oid, server.uploads) == (done.oid, [])
    assert not any(r.path.startswith("/upload/") for r in server.requests)


def test_commits_are_all_or_nothing(api: Any) -> None:
    api.create_repo("org/new")
    base = api.model_info("org/new").sha
    add = [hub.CommitOperationAdd(name, name.encode()) for name in ("a.txt", "b/c.txt", "b/d.txt")]
    first = api.create_commit("org/new", add, commit_message="one", parent_commit=base)
    more = [hub.CommitOperationAdd("e.txt", b"e")]
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api.create_commit("org/new", more, commit_message="two", parent_commit=base)
    assert caught.value.response.status_code == 412
    assert api.model_info("org/new").sha == first.oid
    api.create_commit("org/new", [hub.CommitOperationDelete("b/")], commit_message="three")
    assert api.list_repo_files("org/new") == [".gitattributes", "a.txt"]
    api.create_branch("org/new", branch="old", revision=first.oid)
    assert "b/c.txt" in api.list_repo_files("org/new", revision="old")
    with pytest.raises(errors.HfHubHTTPError):
        api.create_repo("org/new")
    with pytest.raises(errors.RevisionNotFoundError):
        api.create_commit("org/new", more, commit_message="four", revision="none")


def test_an_upload_of_other_bytes_is_refused(server: HubServer) -> None:
    oid = "0" * 64
    status, _, _ = ask(server.sign(f"/upload/o/m/{oid}"), method="PUT")
    assert status == 400
    assert server.uploads == [(oid, 0, False)]
    assert not server.stored("o/m", oid).exists()


def test_a_process_of_its_own_writes_its_counts(small_moe: Path, tmp_path: Path) -> None:
    counts = tmp_path / "counts.json"
    command = [sys.executable, "tests/hubserver.py", str(small_moe), "o/m", "--counts", str(counts)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        endpoint, commit = process.stdout.readline().split()
        got = hub.hf_hub_download("o/m", SHARD, endpoint=endpoint, cache_dir=tmp_path, token=False)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == 0
    size = (small_moe / SHARD).stat().st_size
    assert commit in got
    assert json.loads(counts.read_text())["data_bytes"] == {"o/m": size}
