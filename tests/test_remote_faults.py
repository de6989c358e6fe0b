"""A hub that breaks off, asks to wait, and says other things than before: the output is the same, or refused."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import pytest
from build import tiny, write_checkpoint
from faults import ended
from hubserver import Fault, HubServer
from strategies import picked
from test_remote import KEEP, NAME, PIECES, SHARDS, begin, command, files, start
from test_remote import server as server

from shardxform.cli import main

LINKS = r"^/lfs/.*\.safetensors$"  # where shards are sent from
UNKNOWN = ("^/api/", "changed")  # the first answer says which commit it is: none is known before
QUICK = (
    "import shardxform.checkpoint.remote.client as client; client._FIRST_PAUSE = 0.005"  # seconds; 0.2 outside of tests
)
KINDS = ("drop", "429", "500", "503", "short", "expired", "no_range", "wrong_length", "changed", "slow")


@pytest.fixture(scope="module")
def local(small_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What pruning the folder gives, in pieces."""
    out = tmp_path_factory.mktemp("local") / "out"
    main(["prune", str(small_moe), str(out), "-m", str(KEEP), "-q", *map(str, PIECES)], standalone_mode=False)
    return files(out)


@pytest.mark.parametrize("match", picked([SHARDS, r"/resolve/", LINKS, "^/api/"], 2))
def test_a_fault_that_passes_changes_nothing(
    small_moe: Path, local: dict[str, bytes], match: str, tmp_path: Path
) -> None:
    """Every kind of fault at once, each with a server of its own: most of what it takes is waiting."""
    with contextlib.ExitStack() as stack:
        runs = {}
        for kind in KINDS:
            if (match, kind) == UNKNOWN:
                continue
            server = stack.enter_context(HubServer())
            server.add_repo(NAME, small_moe)
            server.faults = [Fault(kind, match, count=2, after=100_000 if kind == "drop" else 0, retry_after=0.1)]
            (tmp_path / kind).mkdir()
            words = ("prune", NAME, tmp_path / kind / "out", "-m", KEEP, "-q", *PIECES[:2])
            runs[kind] = stack.enter_context(ended(start(server, tmp_path / kind / "home", *words, first=QUICK)))
        for kind, run in runs.items():
            said = "".join(run.communicate(timeout=240))
            assert (run.returncode, "Traceback" in said) == (0, False), (kind, said)
            assert files(tmp_path / kind / "out") == local, kind


@pytest.mark.parametrize(
    ("kind", "match", "told"),
    [
        ("changed", LINKS, "its content is .* when planned"),
        ("changed", r"/resolve/.*\.safetensors", "the hub answers for commit"),
        ("wrong_length", LINKS, "the file has .* bytes, but had .* when planned"),
        ("no_range", LINKS, "expected a part of the file, found status 200"),
        ("short", LINKS, "asked for bytes"),
    ],
)
def test_a_fault_that_stays_is_refused_and_what_was_done_is_not_lost(
    server: HubServer, local: dict[str, bytes], tmp_path: Path, kind: str, match: str, told: str
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    begin(server, home, out)
    server.faults = [Fault(kind, match=match, count=10_000)]
    refused = command(server, home, "prune", NAME, out, "-m", KEEP, "-q", *PIECES, code=1, first=QUICK)
    assert re.search(rf"^shardxform: hf://{NAME}@\w+/model.*: {told}", refused, re.MULTILINE), refused
    server.faults = []
    command(server, home, "prune", NAME, out, "-m", KEEP, "-q", *PIECES)
    assert files(out) == local


def test_a_hundred_faults_change_nothing(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe", num_experts=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=4)
    source = write_checkpoint(tmp_path / "source", tensors, config, shards=3)
    keep = {"format": "shardxform.keep", "version": 1, "keep": {str(k): list(range(0, 64, 2)) for k in range(4)}}
    (tmp_path / "keep.json").write_text(json.dumps(keep))
    arguments = ("-m", tmp_path / "keep.json", "-q", "-j", 2)
    with HubServer() as server:
        server.add_repo(NAME, source)
        command(server, tmp_path / "home", "prune", source, tmp_path / "local", *arguments)
        server.random_faults(1, 0.4, KINDS, 100, match=SHARDS)
        command(server, tmp_path / "home", "prune", NAME, tmp_path / "out", *arguments, "--connections", 8, first=QUICK)
        assert len(server.fired) == 100
        assert {kind for kind, _ in server.fired} == set(KINDS)
        assert server.tokens_leaked == 0
    assert files(tmp_path / "out") == files(tmp_path / "local")
