"""Checkpoints on a hub: the real commands against a local server, held to what they write from a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import barrage
import pytest
from build import write_json
from hubserver import READER, Fault, HubServer

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.remote.repository import RepoName, is_ambiguous, parse_source
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError
from shardxform.plan.prune import plan_prune

pytest.importorskip("huggingface_hub", minversion="1.0")

KEEP = Path(__file__).resolve().parents[1] / "manifests" / "small-moe-keep8.json"
NAME = "org/small"
SHARDS = r"\.safetensors$"
CLIENT = (*barrage.COPYING, "huggingface_hub", "huggingface_hub.hf_api", "httpx", "shardxform.checkpoint.remote.client")
CLIENT += ("shardxform.cli.push_cmd", "shardxform.publish.hub")


@pytest.fixture
def server(small_moe: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.add_repo(NAME, small_moe)
        running.reset_counts()
        yield running


class Command:
    """A command that was started; what of `subprocess.Popen` is asked for here."""

    def __init__(self, parent: barrage.Nursery, run: barrage.Running) -> None:
        self._parent, self._run = parent, run
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._parent.poll(self._run)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self._run.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the end, and return what it said; it is killed when the seconds are over."""
        if self.returncode is None:
            self.returncode = self._parent.wait(self._run, timeout)
        assert self.returncode is not None, f"it did not end in {timeout} s: {self._run.err.read_text()}"
        return self._run.out.read_text(), self._run.err.read_text()


def start(
    server: HubServer,
    home: Path,
    *arguments: object,
    modules: tuple[str, ...] = CLIENT,
    first: str = "",
    token: str | None = None,
    **more: str,
) -> Command:
    """Start a command that asks this server, in the folder that its cache is in; its process has `modules`."""
    environment = {**server.env(home, token), "OMP_NUM_THREADS": "1", **more}
    said = Path(tempfile.mkdtemp(dir=home.parent, prefix="said-"))
    words = list(map(str, arguments))
    parent = barrage.nursery(modules)
    return Command(parent, parent.start(words, home.parent, f"{said.name}/command", environment, first))


def command(server: HubServer, home: Path, *arguments: object, code: int = 0, **more: Any) -> str:
    run = start(server, home, *arguments, **more)
    out, errors = run.communicate()
    assert run.returncode == code, out + errors
    assert "Traceback" not in errors
    return out + errors


def files(root: Path) -> dict[str, bytes]:
    """What an output holds, its record apart: that names where the source was."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name != "shardxform.json"}


def record(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "shardxform.json").read_text())
    return found


def headers(server: HubServer, home: Path) -> int:
    """Bytes of shards that a look at the repository takes; the counts begin anew."""
    server.reset_counts()
    command(server, home, "inspect", NAME)
    taken = server.data_bytes(NAME)
    server.reset_counts()
    return taken


def reads(source: Path) -> int:
    """Bytes that pruning by KEEP reads of the source."""
    plan = plan_prune(Checkpoint.open(source), Manifest.load(KEEP))
    return sum(piece.length for step in plan.steps for piece in step.reads)


# -- what is read ---------------------------------------------------------------------------------------------------


def test_pruning_a_repository_reads_what_is_kept_and_gives_the_bytes_of_pruning_a_folder(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    command(server, home, "prune", small_moe, tmp_path / "local", "-m", KEEP, "-q")
    assert not server.requests
    looked = headers(server, home)
    command(server, home, "prune", NAME, tmp_path / "out", "-m", KEEP, "-q")
    assert files(tmp_path / "out") == files(tmp_path / "local")
    shards = sum(path.stat().st_size for path in small_moe.glob("*.safetensors"))
    assert server.data_bytes(NAME) == reads(small_moe) + looked < 0.7 * shards


def test_looking_and_planning_read_headers_only(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert "qwen3_5_moe" in command(server, home, "inspect", NAME)
    looked = server.data_bytes(NAME)
    shards = list(small_moe.glob("*.safetensors"))
    sizes = [int.from_bytes(path.read_bytes()[:8], "little") + 8 for path in shards]
    assert sum(sizes) <= looked <= sum(sizes) + 8192 * len(shards)
    assert len([r for r in server.requests if r.path.endswith(".safetensors") and r.method == "GET"]) == len(shards)
    server.reset_counts()
    told = command(server, home, "prune", NAME, tmp_path / "out", "-m", KEEP, "--dry-run")
    assert f"prune hf://{NAME}@" in told
    assert server.data_bytes(NAME) == looked
    assert not (tmp_path / "out").exists()


def test_quantizing_and_converting_a_repository_give_the_bytes_of_a_folder(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    command(server, home, "quantize", small_moe, tmp_path / "local", "-m", KEEP, "-q")
    command(server, home, "quantize", f"hf://{NAME}@main", tmp_path / "out", "-m", KEEP, "-q", "--connections", 2)
    assert files(tmp_path / "out") == files(tmp_path / "local")
    server.add_repo("org/quantized", tmp_path / "local")
    for source, out in ((tmp_path / "local", "local-gptq"), ("org/quantized", "gptq")):
        command(server, home, "convert", source, tmp_path / out, "--to", "gptq", "-q")
    assert files(tmp_path / "gptq") == files(tmp_path / "local-gptq")
    assert record(tmp_path / "gptq")["inputs"]["history"] == record(tmp_path / "local-gptq")["inputs"]["history"]


def test_an_output_is_proved_against_the_repository(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    command(server, home, "prune", small_moe, out, "-m", KEEP, "-q")
    assert "tensors equal to hf://org/small@" in command(server, home, "verify", out, "--source", NAME, "-q")
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    told = command(server, home, "verify", out, "--source", NAME, "-q", code=1)
    assert "1 of 72 tensors differ from hf://org/small@" in told


def test_the_record_names_the_commit(server: HubServer, tmp_path: Path) -> None:
    commit = server.repos[NAME].refs["main"]
    command(server, tmp_path / "home", "prune", NAME, tmp_path / "out", "-m", KEEP, "-q")
    assert record(tmp_path / "out")["inputs"]["source"]["repository"] == f"hf://{NAME}@{commit}"
    told = command(server, tmp_path / "home", "prune", f"{NAME}@{commit}", tmp_path / "out", "-m", KEEP, "-q")
    assert "already complete" in told


# -- who may read ---------------------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_alone(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    server.add_repo("org/private", small_moe, private=True)
    told = command(server, home, "inspect", "hf://org/private", code=1)
    assert told.count("\n") == 1
    assert "HF_TOKEN" in told
    token = {"HF_TOKEN": READER, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
    command(server, home, "prune", "org/private", tmp_path / "out", "-m", KEEP, "-q", **token)
    assert server.tokens_leaked == 0


def test_a_gated_repository_says_so(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    server.add_repo("org/gated", small_moe, gated=True)
    told = command(server, tmp_path / "home", "inspect", "hf://org/gated", code=1)
    assert told.count("\n") == 1
    assert "ask for access" in told


@pytest.mark.parametrize("name", ["org/nothing", f"{NAME}@no-such-branch", "no/such", "nosuch", "/no/such/folder"])
def test_what_is_not_there_is_refused_in_a_line(server: HubServer, tmp_path: Path, name: str) -> None:
    told = command(server, tmp_path / "home", "inspect", name, code=1)
    assert told.count("\n") == 1 + ("asking the hub" in told)
    assert "no such" in told


def test_a_repository_without_a_checkpoint_is_refused(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(small_moe, folder)
    (folder / "config.json").unlink()
    server.add_repo("org/half", folder)
    assert "no config.json" in command(server, tmp_path / "home", "inspect", "org/half", code=1)


def test_a_malformed_checkpoint_is_refused_naming_the_repository(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(small_moe, folder)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-4])
    commit = server.add_repo("org/short", folder)
    told = command(server, tmp_path / "home", "inspect", "hf://org/short", code=1)
    assert told.startswith(f"shardxform: hf://org/short@{commit}/{shard.name}: truncated")


def test_a_shard_that_the_index_names_and_nobody_has_is_refused(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(small_moe, folder)
    sorted(folder.glob("*.safetensors"))[1].unlink()
    server.add_repo("org/few", folder)
    assert "listed in the index but missing" in command(server, tmp_path / "home", "inspect", "org/few", code=1)


# -- what lies here -------------------------------------------------------------------------------------------------


def test_a_folder_of_that_name_wins(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    shutil.copytree(small_moe, tmp_path / NAME)
    assert "note" not in command(server, tmp_path / "home", "inspect", NAME)
    assert not server.requests
    assert "note" not in command(server, tmp_path / "home", "inspect", f"hf://{NAME}")
    assert server.requests


def test_a_folder_that_is_no_checkpoint_hides_a_repository_and_it_is_said(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    told = command(server, tmp_path / "home", "inspect", NAME, code=1)
    assert told.endswith(f"; for the repository of the hub of that name, write hf://{NAME}\n")
    (tmp_path / NAME / "config.json").write_text("{}")
    assert "hf://" not in command(server, tmp_path / "home", "inspect", NAME, code=1)


def test_what_is_no_folder_is_asked_of_the_hub_and_both_are_said(server: HubServer, tmp_path: Path) -> None:
    asked, home = "note: no folder org/tpyo here; asking the hub\n", tmp_path / "home"
    told = command(server, home, "inspect", "org/tpyo", code=1)
    assert told.startswith(f"{asked}shardxform: hf://org/tpyo@main: no such folder here; no such repository on the hub")
    told = command(server, home, "inspect", "hf://org/tpyo", code=1)
    assert told.startswith("shardxform: hf://org/tpyo@main: no such repository on the hub")


def test_without_a_network_it_is_said_at_once_that_nothing_of_that_name_is_here(
    server: HubServer, tmp_path: Path
) -> None:
    began = time.monotonic()
    nowhere = {"HF_ENDPOINT": "http://hub.invalid"}
    told = command(server, tmp_path / "home", "inspect", "models/tpyo", code=1, **nowhere)
    assert time.monotonic() - began < 30
    note, error = told.splitlines()
    assert note == "note: no folder models/tpyo here; asking the hub"
    assert error.startswith("shardxform: hf://models/tpyo@main: no such folder here; the hub cannot be asked: ")
    assert "run the same command again" not in error


def cached(server: HubServer, home: Path, *names: str) -> None:
    """Have the hub's own client bring files of the repository to its cache."""
    code = f"import huggingface_hub as h; h.snapshot_download({NAME!r}, allow_patterns={list(names) or None!r})"
    environment = {**server.env(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    server.reset_counts()


def test_offline_the_cache_of_the_client_is_used_whole(server: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command(server, home, "prune", NAME, tmp_path / "online", "-m", KEEP, "-q")
    cached(server, home)
    command(server, home, "prune", NAME, tmp_path / "offline", "-m", KEEP, "-q", HF_HUB_OFFLINE="1")
    assert not server.requests
    assert files(tmp_path / "offline") == files(tmp_path / "online")
    assert record(tmp_path / "offline") == record(tmp_path / "online")


def test_offline_what_is_not_in_the_cache_is_refused(server: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    told = command(server, home, "inspect", NAME, code=1, HF_HUB_OFFLINE="1")
    assert told.count("\n") == 1
    assert "HF_HUB_OFFLINE is set" in told
    cached(server, home, "*.json")
    told = command(server, home, "inspect", NAME, code=1, HF_HUB_OFFLINE="1")
    assert "not in the cache, and HF_HUB_OFFLINE is set" in told


def test_shards_that_the_cache_has_are_not_fetched(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command(server, home, "prune", small_moe, tmp_path / "local", "-m", KEEP, "-q")
    cached(server, home, "*00001-of-00004*", "*00003-of-00004*", "*.json")
    command(server, home, "prune", NAME, tmp_path / "out", "-m", KEEP, "-q")
    assert files(tmp_path / "out") == files(tmp_path / "local")
    asked = {r.path.rpartition("/")[2] for r in server.requests if r.path.endswith(".safetensors")}
    assert sorted(name.partition("-")[2][:5] for name in asked) == ["00002", "00004"]


def test_a_small_file_of_the_cache_that_was_changed_is_refused(server: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    cached(server, home, "*.json")
    config = next(home.rglob("config.json"))
    config.write_text(config.read_text() + " ")
    told = command(server, home, "inspect", NAME, code=1)
    assert "not what the hub says" in told
    assert "remove the file" in told


# -- going on -------------------------------------------------------------------------------------------------------

PIECES = ("--max-shard-size", "500KB", "-j", "1")


def journaled(out: Path) -> int:
    """Steps that a run in `out` has done."""
    journal = out / ".shardxform" / "journal"
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


def begin(server: HubServer, home: Path, out: Path, source: str = NAME) -> None:
    """Start to prune, and kill it when some steps are done and some are not."""
    server.faults = [Fault("slow", match=SHARDS, count=10_000, retry_after=0.1, method="GET")]
    run = start(server, home, "prune", source, out, "-m", KEEP, "-q", *PIECES, "--connections", "1")
    deadline = time.monotonic() + 240
    while journaled(out) < 3:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    server.faults = []
    assert not (out / "config.json").exists()


def test_killed_it_goes_on_without_reading_again_what_is_done(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    looked = headers(server, home)
    begin(server, home, out)
    server.reset_counts()
    told, _ = json.JSONDecoder().raw_decode(
        command(server, home, "prune", NAME, out, "-m", KEEP, "-q", "--json", *PIECES)
    )
    resumed = told["report"]["resumed_bytes"]
    assert resumed > 0
    assert server.data_bytes(NAME) == reads(small_moe) - resumed + looked
    command(server, home, "prune", small_moe, tmp_path / "local", "-m", KEEP, "-q", *PIECES)
    assert files(out) == files(tmp_path / "local")


def test_interrupted_it_stops_at_once_although_the_hub_asks_to_wait(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    begin(server, home, out)
    server.faults = [Fault("429", match="^/lfs/", count=10_000, retry_after=600)]
    server.faults[0].match = "^/lfs/.*00003-of-00004"  # a later step's
    run = start(server, home, "prune", NAME, out, "-m", KEEP, *PIECES)
    done = journaled(out)
    deadline = time.monotonic() + 240
    while not any(kind == "429" for kind, _ in server.fired):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)  # SIGINT may be ignored where the tests run
    told = run.communicate(timeout=60)[1]
    assert run.returncode == 130, told
    assert time.monotonic() - began < 20
    assert journaled(out) >= done
    server.faults = []
    command(server, home, "prune", NAME, out, "-m", KEEP, "-q", *PIECES)
    command(server, home, "prune", small_moe, tmp_path / "local", "-m", KEEP, "-q", *PIECES)
    assert files(out) == files(tmp_path / "local")


def test_another_commit_is_refused_and_the_old_one_goes_on(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    old = server.repos[NAME].refs["main"]
    begin(server, home, out)
    changed = tmp_path / "changed"
    shutil.copytree(small_moe, changed)
    write_json(changed / "generation_config.json", {"changed": True})
    new = server.add_repo(NAME, changed)
    told = command(server, home, "prune", NAME, out, "-m", KEEP, "-q", *PIECES, code=1)
    assert f"was 'hf://{NAME}@{old}', now 'hf://{NAME}@{new}'; name that commit after @ to go on" in told
    command(server, home, "prune", f"{NAME}@{old}", out, "-m", KEEP, "-q", *PIECES)
    command(server, home, "prune", small_moe, tmp_path / "local", "-m", KEEP, "-q", *PIECES)
    assert files(out) == files(tmp_path / "local")


def test_a_folder_with_the_same_bytes_is_another_source(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    begin(server, home, out)
    told = command(server, home, "prune", small_moe, out, "-m", KEEP, "-q", *PIECES, code=1)
    assert f"source.repository: was 'hf://{NAME}@" in told


# -- what is asked for ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", RepoName("org/name")),
        ("hf://org/name", RepoName("org/name")),
        ("org/name@v1.0", RepoName("org/name", "v1.0")),
        ("hf://org/name@refs/pr/3", RepoName("org/name", "refs/pr/3")),
        ("Qwen/Qwen3.5-35B-A3B@" + "0" * 40, RepoName("Qwen/Qwen3.5-35B-A3B", "0" * 40)),
        ("name", Path("name")),
        ("./org/name", Path("org/name")),
        ("../org/name", Path("../org/name")),
        ("/org/name", Path("/org/name")),
        ("a/b/c", Path("a/b/c")),
        ("org/name@", Path("org/name@")),
        ("org/na me", Path("org/na me")),
        ("org/..", Path("org/..")),
        ("org/name@../../x", Path("org/name@../../x")),
        ("o" * 60 + "/" + "n" * 60, Path("o" * 60 + "/" + "n" * 60)),
    ],
)
def test_what_a_source_means(
    text: str, found: Path | RepoName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_source(text) == found
    assert not is_ambiguous(text)


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://a/b/c", "hf://org/name@", "hf:///etc/passwd"])
def test_what_is_no_repository_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"expected hf://owner/name\[@revision\]"):
        parse_source(text)


def test_options_of_the_hub_are_refused_for_a_folder(server: HubServer, small_moe: Path, tmp_path: Path) -> None:
    for options in (("--connections", 2), ("--cache-limit", "1GB")):
        told = command(server, tmp_path / "home", "prune", small_moe, tmp_path / "out", "-m", KEEP, *options, code=2)
        assert "is for repositories of the hub" in told
    told = command(
        server, tmp_path / "home", "prune", NAME, tmp_path / "out", "-m", KEEP, "--cache-limit", "1MB", code=2
    )
    assert "expected at least" in told


def test_a_folder_is_pruned_without_the_client_of_the_hub(small_moe: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from shardxform.cli import main\n"
        f"main(['prune', {str(small_moe)!r}, {str(tmp_path / 'out')!r}, '-m', {str(KEEP)!r}, '-q'],"
        " standalone_mode=False)\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ})
