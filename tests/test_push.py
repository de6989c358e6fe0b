"""`shardxform push` against a hub on this machine: what is uploaded, what refused, and what an interruption costs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults import ended
from hubserver import READER, WRITER, Fault, HubServer
from test_remote import Command, start

from shardxform.base.progress import Progress
from shardxform.cli import main
from shardxform.errors import OutputError, RemoteError, ShardxformError
from shardxform.publish import contents_of, is_repo_name
from shardxform.publish.contents import PublishedFile, git_blob_id, sha256_of_all
from shardxform.publish.push import _Sender

ROOT = Path(__file__).resolve().parents[1]
KEEP = ROOT / "manifests" / "small-moe-keep8.json"


@pytest.fixture(scope="module")
def made(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned output of several shards."""
    out = tmp_path_factory.mktemp("push") / "small-moe-8"
    make("prune", small_moe, out, "--max-shard-size", "1MB")
    return out


@pytest.fixture(scope="module")
def rounded(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized output of one shard."""
    out = tmp_path_factory.mktemp("push") / "small-moe-8-w4"
    make("quantize", small_moe, out, "--format", "compressed-tensors")
    return out


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


def make(verb: str, source: Path, out: Path, *options: str) -> None:
    main([verb, str(source), str(out), "-m", str(KEEP), "-q", *options], standalone_mode=False)


class Pusher:
    """Runs the real command against a server, forked from a process that has the client."""

    def __init__(self, server: HubServer, home: Path) -> None:
        self.server, self.home = server, home

    @contextlib.contextmanager
    def started(self, out: Path, *options: str, token: str | None = WRITER, **env: str) -> Iterator[Command]:
        command = start(self.server, self.home, "push", out, *options, token=token, **env)
        with ended(command) as process:
            yield process

    def __call__(self, out: Path, *options: str, **kwargs: Any) -> tuple[int, str, str]:
        with self.started(out, *options, **kwargs) as process:
            stdout, stderr = process.communicate(timeout=120)
        assert "Traceback" not in stderr, stderr
        assert process.returncode is not None
        return process.returncode, stdout, stderr

    def done(self, out: Path, *options: str, **kwargs: Any) -> dict[str, Any]:
        """Push, and give the report."""
        code, stdout, stderr = self(out, *options, "--json", **kwargs)
        assert code == 0, stderr
        report: dict[str, Any] = json.loads(stdout)["report"]
        return report


@pytest.fixture
def pusher(server: HubServer, tmp_path: Path) -> Pusher:
    return Pusher(server, tmp_path / "home")


def published(server: HubServer, repo: str, branch: str = "main") -> dict[str, bytes]:
    """Every file of a branch, but what the hub itself puts there."""
    there = server.repos[repo]
    files = there.commits[there.refs[branch]]
    return {name: file.path.read_bytes() for name, file in files.items() if name != ".gitattributes"}


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def uploaded(server: HubServer) -> list[str]:
    """SHA-256 of what arrived whole."""
    return [oid for oid, _, whole in server.uploads if whole]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What is uploaded


def test_an_output_is_published_in_one_commit_and_then_nothing_is_left_to_do(
    server: HubServer, pusher: Pusher, made: Path
) -> None:
    code, stdout, stderr = pusher(made, "org/new", "--create", "--private", "--message", "Half the experts")
    assert code == 0
    assert published(server, "org/new") == contents(made)
    repo = server.repos["org/new"]
    commit = repo.refs["main"]
    assert (repo.private, list(repo.messages.values())) == (True, ["initial commit", "Half the experts"])
    assert stdout.splitlines()[:2] == [
        f"{server.endpoint}/org/new: made, complete, every size and hash compared",
        f"  commit  {commit}",
    ]
    shards = sorted(made.glob("*.safetensors"))
    assert sorted(uploaded(server)) == sorted(map(sha256, shards))
    size = sum(path.stat().st_size for path in made.iterdir())
    assert f"  files   {len(contents(made))}, {size / 1e6:.2f} MB\n" in stderr
    assert f"  shards  {len(shards)}, " in stderr
    assert all(any(line.startswith(f"{stage}: ") for line in stderr.splitlines()) for stage in ("hash", "push"))
    assert server.tokens_leaked == 0
    server.reset_counts()
    report = pusher.done(made, "org/new", "--create", "--private")
    assert (report["commit"], report["sent_bytes"], report["created"]) == (commit, 0, False)
    assert not [r for r in server.requests if r.method in ("PUT", "POST") and "preupload" not in r.path]


def test_only_what_belongs_to_the_checkpoint_is_published(
    server: HubServer, pusher: Pusher, made: Path, writable: Callable[[Path], Path]
) -> None:
    out = writable(made)
    (out / "README.md").write_text("![errors](errors.png) ![far](http://x/far.png) ![up](../up.png)")
    for name in ("errors.png", "other.png", "LICENSE", "notes.txt", ".secret", ".env"):
        (out / name).write_bytes(b"x")
    for name in ("scratch", ".git"):
        (out / name).mkdir()
        (out / name / "inner.txt").write_text("x")
    found = contents_of(out)
    assert found.left_out == ("notes.txt", "other.png", "scratch/")
    _, _, stderr = pusher(out, "org/new", "--create")
    assert "  left out  notes.txt, other.png, scratch/\n" in stderr
    added = {name: (out / name).read_bytes() for name in ("README.md", "errors.png", "LICENSE")}
    assert published(server, "org/new") == contents(made) | added


def test_a_dry_run_asks_nothing_of_the_hub(server: HubServer, pusher: Pusher, made: Path) -> None:
    code, stdout, _ = pusher(made, "org/new", "--dry-run", token=None)
    assert code == 0
    assert stdout.startswith(f"push {made} -> org/new  (dry run: nothing is uploaded)\n  files   ")
    code, stdout, _ = pusher(made, "org/new", "--dry-run", "--json", token=None)
    facts = json.loads(stdout)
    assert facts["files"] == {name: len(data) for name, data in sorted(contents(made).items())}
    assert (facts["repo"], facts["bytes"]) == ("org/new", sum(map(len, contents(made).values())))
    assert server.requests == []


def test_another_branch_is_made_and_left_alone_by_main(
    server: HubServer, pusher: Pusher, made: Path, rounded: Path
) -> None:
    pusher.done(rounded, "org/new", "--create")
    code, _, stderr = pusher(rounded, "org/new", "--revision", "two/shards")
    assert (code, stderr.splitlines()[-1]) == (1, "shardxform: org/new: no branch 'two/shards'; --create makes it")
    report = pusher.done(made, "org/new", "--revision", "two/shards", "--create", "--replace")
    assert report["url"] == f"{server.endpoint}/org/new/tree/two/shards"
    assert report["removed"] == ["model.safetensors"]
    assert published(server, "org/new", "two/shards") == contents(made)
    assert published(server, "org/new") == contents(rounded)


def test_another_checkpoint_is_replaced_only_when_told(
    server: HubServer, pusher: Pusher, made: Path, rounded: Path
) -> None:
    pusher.done(made, "org/new", "--create")
    before = server.repos["org/new"].refs["main"]
    shards = sorted(path.name for path in made.glob("*.safetensors"))
    code, _, stderr = pusher(rounded, "org/new")
    assert code == 1
    assert stderr.splitlines()[-1].startswith(
        f"shardxform: org/new: has {shards[0]} and {len(shards)} more, of another checkpoint"
    )
    assert server.repos["org/new"].refs["main"] == before
    report = pusher.done(rounded, "org/new", "--replace")
    assert report["removed"] == [*shards, "model.safetensors.index.json"]
    assert published(server, "org/new") == contents(rounded)


def test_an_upload_in_parts(server: HubServer, pusher: Pusher, made: Path) -> None:
    server.part_bytes = 300_000
    pusher.done(made, "org/new", "--create")
    assert published(server, "org/new") == contents(made)


# Interruptions and faults


@pytest.mark.crash
def test_a_killed_upload_goes_on_with_the_files_that_are_missing(server: HubServer, pusher: Pusher, made: Path) -> None:
    shards = sorted(made.glob("*.safetensors"))
    cut = sha256(shards[2])
    server.faults.append(Fault("drop", cut, count=99, after=100_000, method="PUT"))
    with pusher.started(made, "org/new", "--create") as process:
        wait_until(lambda: len(uploaded(server)) == len(shards) - 1 and bool(server.fired))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert published(server, "org/new") == {}  # not half a checkpoint
    assert cut not in uploaded(server)
    server.faults = []
    server.reset_counts()
    report = pusher.done(made, "org/new", "--create")
    assert uploaded(server) == [cut]
    others = sum(path.stat().st_size for path in made.iterdir() if path not in shards)
    assert report["sent_bytes"] == shards[2].stat().st_size + others
    assert published(server, "org/new") == contents(made)


@pytest.mark.crash
def test_an_interrupt_ends_a_stalled_upload_at_once(server: HubServer, pusher: Pusher, made: Path) -> None:
    server.faults.append(Fault("slow", "^/upload/", count=99, retry_after=40, method="PUT"))
    with pusher.started(made, "org/new", "--create") as process:
        wait_until(lambda: len(server.fired) >= 2)
        process.send_signal(signal.SIGTERM)  # SIGINT may be ignored where the tests run
        _, stderr = process.communicate()
    assert (process.returncode, stderr.splitlines()[-1]) == (
        130,
        "shardxform: stopped; run the same command again to go on",
    )
    assert "Traceback" not in stderr


@pytest.mark.parametrize("abandoned", [False, True])
def test_the_client_is_kept_silent_after_uploads_that_nobody_waits_for(
    abandoned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import logging

    from shardxform.publish.hub import silenced

    monkeypatch.setattr(logging.get_logger("huggingface_hub"), "level", logging.WARNING)
    stop = threading.Event()
    with silenced(shows_itself=True, abandoned=stop):
        assert logging.get_verbosity() == logging.ERROR
        if abandoned:
            stop.set()
    assert logging.get_verbosity() == (logging.ERROR if abandoned else logging.WARNING)


def test_passing_faults_cost_only_time(server: HubServer, pusher: Pusher, made: Path) -> None:
    shards = sorted(made.glob("*.safetensors"))
    server.faults += [
        Fault("503", "/whoami"),
        Fault("500", "/commit/"),
        Fault("429", "/preupload/", retry_after=1),
        Fault("500", sha256(shards[0]), method="PUT"),
        Fault("drop", sha256(shards[1]), after=100_000, method="PUT"),
        Fault("503", "/batch$"),
    ]
    code, stdout, stderr = pusher(made, "org/new", "--create")
    assert code == 0, stderr
    assert "complete, every size and hash compared" in stdout
    assert "org/new: it answers 503, a fault; trying again in 0 s (2 of 6)\n" in stderr
    assert len(server.fired) == 6
    assert published(server, "org/new") == contents(made)
    assert len(server.repos["org/new"].commits) == 2


def test_what_was_done_though_the_answer_is_lost_is_not_done_twice(
    server: HubServer, pusher: Pusher, made: Path
) -> None:
    server.faults += [Fault("lost", "/commit/"), Fault("lost", "/repos/create")]
    report = pusher.done(made, "org/new", "--create")
    assert server.fired == [("lost", "/api/repos/create"), ("lost", "/api/models/org/new/commit/main")]
    assert report["commit"] == server.repos["org/new"].refs["main"]
    assert len(server.repos["org/new"].commits) == 2


def test_a_token_that_is_lost_on_the_way_costs_no_upload(server: HubServer, pusher: Pusher, made: Path) -> None:
    server.faults.append(Fault("slow", "/verify$", count=99, retry_after=1))
    with pusher.started(made, "org/new", "--create") as process:
        wait_until(lambda: len(uploaded(server)) >= 2)
        user = server.users.pop(WRITER)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    last = stderr.splitlines()[-1]
    assert last.startswith("shardxform: org/new")
    assert last.endswith("the hub does not know the token: run `hf auth login` again, or set another HF_TOKEN")
    server.users[WRITER], server.faults = user, []
    before = set(uploaded(server))
    server.reset_counts()
    pusher.done(made, "org/new", "--create")
    assert len(before) >= 2
    assert not before & set(uploaded(server))
    assert published(server, "org/new") == contents(made)


def test_a_file_that_does_not_arrive_is_noticed(server: HubServer, pusher: Pusher, made: Path) -> None:
    server.ignored = {"tokenizer_config.json"}
    code, stdout, stderr = pusher(made, "org/new", "--create")
    assert (code, stdout) == (1, "")
    assert "shardxform: org/new/tokenizer_config.json: expected the 197 bytes of" in stderr
    assert stderr.endswith("found no such file; run the same command again\n")


def test_a_hub_that_is_not_there(server: HubServer, pusher: Pusher, made: Path) -> None:
    code, _, stderr = pusher(made, "org/new", HF_HUB_OFFLINE="1")
    assert (code, server.requests) == (1, [])
    assert stderr.endswith("org/new: the client is offline (HF_HUB_OFFLINE); nothing was uploaded\n")


# Refusals


@pytest.mark.parametrize(
    ("repo", "options", "token", "message"),
    [
        ("org/none", (), WRITER, "org/none: no such repository, or none that the token sees; --create makes it"),
        ("other/none", ("--create",), WRITER, "other/none: the token is tester's, who may not create repositories of"),
        ("org/there", (), READER, "org/there: the token may not write here: Forbidden: you must use a write token"),
        ("other/there", (), WRITER, "other/there: the token may not write here: You don't have the rights"),
        ("org/there", (), "hf_unknown", "org/there: the hub does not know the token: run `hf auth login` again"),
        ("org/there", (), None, "org/there: uploading needs a token, and there is none: run `hf auth login`"),
        ("org/taken", ("--create",), WRITER, "org/taken: the name is taken, by something that the token does not see"),
        ("org/there", ("--private",), WRITER, "org/there: is public, and --private makes only new repositories"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    server: HubServer, pusher: Pusher, rounded: Path, repo: str, options: tuple[str, ...], token: str, message: str
) -> None:
    server.add_repo("org/there")
    server.add_repo("other/there")
    server.add_repo("org/taken", private=True, token="hf_other")
    code, stdout, stderr = pusher(rounded, repo, "-q", *options, token=token)
    assert (code, stdout, stderr.count("\n")) == (1, "", 1)
    assert stderr.startswith(f"shardxform: {message}")
    assert server.uploads == []


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def offset_of(path: Path, suffix: str) -> int:
    """Where the data of the first tensor of a kind begin."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        head = json.loads(file.read(length))
    return int(8 + length + min(v["data_offsets"][0] for k, v in head.items() if k.endswith(suffix)))


def test_a_flipped_code_is_not_published(
    server: HubServer, pusher: Pusher, rounded: Path, small_moe: Path, writable: Callable[[Path], Path]
) -> None:
    out = writable(rounded)
    flip(out / "model.safetensors", offset_of(out / "model.safetensors", ".weight_packed"))
    code, _, stderr = pusher(out, "org/new", "--create", "--source", str(small_moe))
    assert code == 1
    assert f"shardxform: {out}: not sound, so not uploaded: model.layers.0." in stderr
    assert stderr.endswith(f"  all of it: shardxform verify {out} --source {small_moe}\n")
    assert "org/new" not in server.repos
    pusher.done(rounded, "org/new", "--create", "--source", str(small_moe))


def test_an_output_that_is_not_sound_is_not_published(
    server: HubServer, pusher: Pusher, rounded: Path, writable: Callable[[Path], Path]
) -> None:
    out = writable(rounded)
    with (out / "model.safetensors").open("r+b") as file:
        file.seek(offset_of(out / "model.safetensors", ".weight_scale"))
        file.write(b"\xc0\x7f" * 8)  # not a number
    code, _, stderr = pusher(out, "org/new", "--create")
    assert code == 1
    assert f"{out}: not sound, so not uploaded: " in stderr
    config = writable(out) / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    code, _, stderr = pusher(config.parent, "org/new", "--dry-run")
    assert (code, "config.json: changed since shardxform wrote it" in stderr) == (1, True)
    assert "org/new" not in server.repos


def test_refused_before_anything_is_asked(
    made: Path, small_moe: Path, writable: Callable[[Path], Path], tmp_path: Path
) -> None:
    def refused(out: Path) -> str:
        with pytest.raises(ShardxformError) as caught:
            contents_of(out)
        return str(caught.value).replace(str(tmp_path), "T").replace(str(ROOT), "R")

    assert refused(small_moe) == (
        "R/examples/small-moe: expected an output of shardxform with its shardxform.json and config.json; not uploaded"
    )
    assert refused(tmp_path / "none") == "T/none: expected an output directory: No such file or directory"
    out = writable(made)
    again = f"run the command that makes T/{out.name} again, to its end"
    (out / ".shardxform").mkdir()
    assert refused(out) == f"T/{out.name}/.shardxform: left by an unfinished run; {again}"
    (out / ".shardxform").rmdir()
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.rename(f"{shard}.partial")
    assert refused(out) == f"T/{out.name}/{shard.name}.partial: left by an unfinished run; {again}"
    Path(f"{shard}.partial").rename(tmp_path / "elsewhere")
    assert refused(out) == f"T/{out.name}/{shard.name}: expected a file of the output, found none; not uploaded"
    shard.symlink_to(tmp_path / "elsewhere")
    assert refused(out) == f"T/{out.name}/{shard.name}: expected a file of the output, found a link; not uploaded"
    (out / "config.json").unlink()
    assert "expected an output of shardxform" in refused(out)


@pytest.mark.parametrize("name", ["../up.txt", "/etc/passwd", ".env", "a/b/c", ".git/config", "a\0b", "chat/.x"])
def test_a_record_that_names_foreign_files_is_refused(
    made: Path, writable: Callable[[Path], Path], name: str, tmp_path: Path
) -> None:
    out = writable(made)
    (tmp_path / "up.txt").write_text("secret")
    (out / ".env").write_text("secret")
    record = json.loads((out / "shardxform.json").read_text())
    record["files"][name] = None
    (out / "shardxform.json").write_text(json.dumps(record))
    with pytest.raises(OutputError, match=r"shardxform\.json: names a file that is none of a checkpoint: "):
        contents_of(out)


def test_files_of_a_folder_are_published_and_its_links_are_not(
    made: Path, writable: Callable[[Path], Path], tmp_path: Path
) -> None:
    out = writable(made)
    folder = out / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool.jinja").write_text("{{ messages }}")
    (folder / "notes.txt").write_text("x")
    record = json.loads((out / "shardxform.json").read_text())
    record["files"]["additional_chat_templates/tool.jinja"] = hashlib.sha256(b"{{ messages }}").hexdigest()
    (out / "shardxform.json").write_text(json.dumps(record))
    found = contents_of(out)
    assert "additional_chat_templates/tool.jinja" in [item.name for item in found.items]
    assert found.left_out == ("additional_chat_templates/notes.txt",)
    shutil.move(folder, tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(OutputError, match=r"tool\.jinja: expected a file of the output"):
        contents_of(out)


# Small parts


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("org/name", True),
        ("o/n", True),
        ("Org-1/Qwen3.5-35B_A3B", True),
        ("name", False),
        ("org/name/more", False),
        ("/name", False),
        ("org/", False),
        ("org/na me", False),
        ("org/na--me", False),
        ("org/na..me", False),
        ("org/name.git", False),
        ("org/-name", False),
        ("org/" + "n" * 97, False),
        ("https://x/org/name", False),
        ("org/name\n", False),
    ],
)
def test_names_of_repositories(name: str, is_one: bool) -> None:
    assert is_repo_name(name) is is_one


def test_hashes_are_those_of_the_files_and_progress_ends_with_all(made: Path) -> None:
    told: list[Progress] = []
    found = contents_of(made)
    digests = sha256_of_all(found.items, told.append)
    assert digests == {name: hashlib.sha256(data).hexdigest() for name, data in contents(made).items()}
    assert told[-1].done == told[-1].total == found.nbytes
    config = (made / "config.json").read_bytes()
    assert git_blob_id(made / "config.json") == hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()


def test_without_the_client_it_is_said_what_to_install(made: Path, tmp_path: Path) -> None:
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "shardxform", "push", str(made), "org/new", "-q"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        1,
        "shardxform: push needs huggingface_hub: pip install 'shardxform[hub]'\n",
    )


def sender_of(send: Callable[[Any], None], names: str, xet: bool, told: list[Progress]) -> tuple[_Sender, list[Any]]:
    """Files of 10 bytes each, named by a letter, and a hub that does `send` with them."""
    hub: Any = SimpleNamespace(send=send, stop=threading.Event())
    items = [PublishedFile(name=f"{name}.safetensors", path=Path(name), nbytes=10) for name in names]
    return _Sender(hub=hub, on_progress=told.append, total=10 * len(items), xet=xet), [
        SimpleNamespace(item=item) for item in items
    ]


def test_where_only_the_client_can_count_files_are_sent_one_by_one() -> None:
    threads, told = [], list[Progress]()
    sender, adds = sender_of(lambda _: threads.append(threading.current_thread()), "abc", True, told)
    sender.send(adds)
    assert threads == [threading.current_thread()] * 3  # where an interrupt arrives
    assert told[-1] == Progress(30, 30, 0)
    assert sender.sent_bytes == 30


def test_what_was_not_read_was_there_already() -> None:
    told: list[Progress] = []

    def send(add: Any) -> None:
        if add.item.name == "b.safetensors":
            sender.read(add.item.name, 10)

    sender, adds = sender_of(send, "ab", False, told)
    sender.send(adds)
    assert told[-1] == Progress(20, 20, 10)
    assert sender.sent_bytes == 10


def test_the_first_failure_stops_the_others() -> None:
    sent: list[str] = []

    def send(add: Any) -> None:
        if add.item.name == "b.safetensors":
            raise RemoteError("no more")
        time.sleep(0.2)
        sent.append(add.item.name)

    sender, adds = sender_of(send, "abcdefghijkl", False, [])
    with pytest.raises(RemoteError, match="no more"):
        sender.send(adds)
    time.sleep(1)
    assert len(sent) <= 3  # those that were under way
