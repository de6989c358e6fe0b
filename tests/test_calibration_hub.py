"""Hub data sets: which files are taken, and what a server that speaks the hub's protocol can answer."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import barrage
import pytest

from shardxform.calibration.documents import chosen, is_data_set_name
from shardxform.errors import PlanError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for the data sets in `server.sets`: name -> files, or an error code and status."""

    port: ClassVar[int]
    sets: ClassVar[dict[str, Any]]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        api = path.startswith("/api/datasets/")
        name = "/".join(path.removeprefix("/api").split("/")[2:4])
        files = self.sets.get(name, (404, "RepoNotFound"))
        if isinstance(files, tuple):
            self.reply(files[0], b"{}", body, {"X-Error-Code": files[1], "X-Error-Message": "said the hub"})
        elif api:
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            info = {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            self.reply(200, json.dumps(info | {"likes": 0}).encode(), body, {"Content-Type": "application/json"})
        else:
            data = files[path.partition(f"/resolve/{COMMIT}/")[2]]
            etag = f'"{hashlib.sha1(data, usedforsecurity=False).hexdigest()}"'
            self.reply(200, data, body, {"X-Repo-Commit": COMMIT, "ETag": etag})

    def reply(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def texts(*documents: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


@pytest.fixture(scope="module")
def hub() -> Iterator[type[Hub]]:
    class Served(Hub):
        sets: ClassVar[dict[str, Any]] = {
            "a/packed": {
                "README.md": b"# about",
                "data/train-00000-of-00002.jsonl": texts("one two three four " * 40, "five"),
                "data/train-00001-of-00002.jsonl": texts("never needed"),
                "data/test-00000-of-00001.jsonl": texts("held out"),
            },
            "a/none": {"README.md": b"# about", "load.py": b"raise SystemExit"},
            "a/bad": {"train.jsonl": b'{"text": "fine"}\n{"text": 1}\n'},
            "a/gated": (403, "GatedRepo"),
            "a/broken": (418, ""),
        }
        asked: ClassVar[list[str]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Served.port = server.server_address[1]
    yield Served
    server.shutdown()
    server.server_close()


# Several data sets a process, since the client's settings are read once, at its import.
SCRIPT = """
import json, sys
from pathlib import Path
from shardxform.calibration import DataOptions, load_windows
from shardxform.errors import ShardxformError
out = []
for case in json.loads(sys.argv[1]):
    try:
        windows = load_windows(Path(sys.argv[2]), DataOptions(**case))
        out.append({"provenance": dict(windows.provenance), "ids": windows.ids_NT.tolist()})
    except ShardxformError as e:
        out.append({"error": str(e), "type": type(e).__name__})
print(json.dumps(out))
raise SystemExit
"""


def answers(checkpoint: Path, home: Path, port: int, cases: list[dict[str, Any]], **env: str) -> list[dict[str, Any]]:
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings | env
    nursery = barrage.nursery(tuple(barrage.COMPUTING))
    script = nursery.start([json.dumps(cases), str(checkpoint)], home.parent, "answers", ours, first=SCRIPT)
    assert nursery.wait(script) == 0, script.err.read_text()
    out: list[dict[str, Any]] = json.loads(script.out.read_text())
    return out


@pytest.mark.oracle
def test_a_hub_data_set_is_read_from_one_revision_and_no_further_than_needed(
    hub: type[Hub], small_moe: Path, tmp_path: Path
) -> None:
    small = {"samples": 2, "seqlen": 8}
    names = ("a/packed", "a/packed/data/test", "a/none", "a/missing", "a/gated", "a/broken", "a/bad")
    cases = [{"data": name, **small} for name in names]
    packed, test, *errors = answers(small_moe, tmp_path / "home", hub.port, cases)
    provenance = packed["provenance"]
    assert provenance["data"] == "a/packed"
    assert provenance["revision"] == COMMIT
    assert provenance["files"] == ["data/train-00000-of-00002.jsonl"]
    assert "sha256" not in provenance
    assert not any("00001-of-00002" in path for path in hub.asked)
    assert [error["type"] for error in errors] == ["PlanError"] * 5
    assert "expected at least one window of 8 tokens, found " in test["error"]
    assert [error["error"] for error in errors[:3]] == [
        "a/none: expected .parquet, .jsonl, .json, .txt files in the data set, found none",
        "a/missing: no such file or directory here; no such data set on the hub",
        "a/gated: access must be asked for on the hub, and a token be set (hf auth login)",
    ]
    assert errors[3]["error"].startswith(
        "a/broken: no such file or directory here; the hub gave no answer that can be used: "
    )
    assert errors[4]["error"] == "a/bad/train.jsonl:2: text: expected a string, found int"
    local = tmp_path / "local.jsonl"
    local.write_bytes(hub.sets["a/packed"]["data/train-00000-of-00002.jsonl"])
    asked = len(hub.asked)
    same, offline = answers(
        small_moe, tmp_path / "home", hub.port, [{"data": str(local), **small}, cases[0]], HF_HUB_OFFLINE="1"
    )
    assert same["ids"] == packed["ids"]
    assert offline["error"].startswith("a/packed: no such file or directory here; the hub cannot be reached: ")
    assert len(hub.asked) == asked


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("NeelNanda/pile-10k", True),
        ("Salesforce/wikitext/wikitext-2-raw-v1/train", True),
        ("owner/name.jsonl", False),  # a path that was mistyped
        ("owner", False),
        ("/absolute/path", False),
        ("../up", False),
        ("./here", False),
        ("owner/name\0", False),
        ("owner//name", False),
        ("öwner/name", False),
        ("owner/name?x=1", False),
    ],
)
def test_names_of_hub_data_sets(name: str, is_one: bool) -> None:
    assert is_data_set_name(name) is is_one


@pytest.mark.parametrize(
    ("paths", "prefix", "found"),
    [
        (["data/train-00000-of-00001-4746b8785c874cc7.parquet", "README.md"], "", [0]),
        (["train-1-of-2.parquet", "train-0-of-2.parquet"], "", [1, 0]),
        (["train.jsonl", "test.jsonl", "valid.jsonl"], "", [0]),
        (["part2.jsonl", "part1.jsonl", "dev.jsonl"], "", [1, 0]),
        (["test.jsonl"], "", [0]),  # better than nothing, and named in the provenance
        (["data.json", "data.parquet", "requirements.txt"], "", [1]),
        (["data.JSON", "dataset_infos.json", ".hidden/data.parquet", "_old/data.parquet"], "", [0]),
        (["en/train.parquet", "de/train.parquet"], "de/", [1]),
        (["data/train_sft-0-of-1.parquet", "data/train_gen-0-of-1.parquet"], "data/train_gen", [1]),
        (["data/train-0-of-1.parquet", "data/test-0-of-1.parquet"], "data/test", [1]),
    ],
)
def test_which_files_are_the_data(paths: list[str], prefix: str, found: list[int]) -> None:
    assert chosen("o/n", paths, prefix) == tuple(paths[index] for index in found)


@pytest.mark.parametrize(
    ("paths", "prefix", "message"),
    [
        ([], "", "found none"),
        (["data.csv"], "", "found none"),
        (["train.jsonl"], "de/", "below 'de/', found none"),
        (["en/train.parquet", "de/train.parquet"], "", "found 'de', 'en': name one as owner/name/PREFIX"),
        (
            ["data/train_sft-0-of-1.parquet", "data/train_gen-0-of-1.parquet"],
            "",
            "found 'data/train_gen', 'data/train_sft': name",
        ),
    ],
)
def test_no_single_set_of_files_is_refused(paths: list[str], prefix: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        chosen("o/n", paths, prefix)
    assert message in str(caught.value)


def test_choosing_by_the_seed_does_not_download_a_web_crawl(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from shardxform.calibration.documents import hub_files

    class Sibling:
        rfilename, size = "train.parquet", 17 * 10**9

    class Info:
        sha, siblings = COMMIT, [Sibling]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info)
    with pytest.raises(PlanError, match=r"o/n: choosing .* reads all 1 files, 17\.0 GB; expected at most 16 GB: pack"):
        hub_files("o/n", whole=True)
    revision, files = hub_files("o/n", whole=False)
    assert (revision, [file.name for file in files]) == (COMMIT, ["train.parquet"])
