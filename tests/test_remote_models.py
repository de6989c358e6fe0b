"""Models on a hub that are run: the figures of a folder, and each byte fetched about once, under any limit of disk."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import barrage
import pytest
import test_remote
from hubserver import HubServer
from strategies import picked
from test_remote import KEEP, NAME, files, headers, record
from test_remote import server as server
from texts import few

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

command = partial(test_remote.command, modules=tuple(barrage.COMPUTING))
STAGES = ["score", "select", "quantize", "verify", "card"]
DATA = ("--samples", 8, "--seqlen", 128, "-q")
CALIB = few("calib.jsonl")


def shard_bytes(source: Path) -> int:
    return sum(path.stat().st_size for path in source.glob("*.safetensors"))


def figures(told: str) -> dict[str, Any]:
    """An evaluation, without what differs from run to run, and what names the source."""
    found, _ = json.JSONDecoder().raw_decode(told[told.index("{") :])
    (found.get("against") or {}).pop("identity", None)
    return {key: value for key, value in found.items() if key not in ("seconds", "peak_rss_bytes", "identity")}


def test_scoring_a_repository_gives_the_statistics_of_a_folder(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    from shardxform.experts import Saliency

    home, data = tmp_path / "home", ("--data", CALIB, *DATA)
    command(server, home, "score", small_moe, "-o", tmp_path / "local.safetensors", *data)
    assert not server.requests
    command(server, home, "score", NAME, "-o", tmp_path / "out.safetensors", *data)
    here, there = (Saliency.load(tmp_path / f"{name}.safetensors") for name in ("local", "out"))
    for layer, stats in here.layers.items():
        for name in ("count_E", "reap_E", "ean_E", "gate_E", "peak_E"):
            assert getattr(stats, name).tolist() == getattr(there.layers[layer], name).tolist()
    assert 0.5 * shard_bytes(small_moe) < server.data_bytes(NAME) <= 1.02 * shard_bytes(small_moe)
    assert not list(tmp_path.glob("*.work"))
    told = command(server, home, "score", NAME, "-o", tmp_path / "out.safetensors", *data)
    assert "already complete" in told


def test_evaluating_what_was_not_written_against_its_source_fetches_both_once(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    options = ("-m", KEEP, "--data", CALIB, *DATA, "--json")
    here = command(server, home, "evaluate", small_moe, "--against", small_moe, *options)
    there = command(server, home, "evaluate", NAME, "--against", f"hf://{NAME}", *options)
    assert figures(here) == figures(there)
    assert server.data_bytes(NAME) <= 1.02 * shard_bytes(small_moe)


@pytest.mark.parametrize(
    ("options", "share"),
    picked(
        [
            (("quantize", "--method", "auto-round", "--iters", 2, "--batch-size", 4), 0.67),  # pruned experts never
            (("prune", "--heal", "all", "--heal-iters", 2, "--heal-lr", 0.01), 1.02),
            (("prune", "--heal", "shared", "--heal-iters", 2, "--heal-lr", 0.01), 1.5),  # and what is copied once more
        ],
        3,
    ),
)
def test_tuning_and_healing_a_repository_give_the_bytes_of_a_folder(
    server: HubServer, small_moe: Path, tmp_path: Path, options: tuple[object, ...], share: float
) -> None:
    verb, *more = *options, "-m", KEEP, "--data", CALIB, *DATA
    command(server, tmp_path / "home", verb, small_moe, tmp_path / "local", *more)
    command(server, tmp_path / "home", verb, NAME, tmp_path / "out", *more)
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert server.data_bytes(NAME) <= share * shard_bytes(small_moe)


def test_a_dry_run_of_the_whole_way_fetches_headers_and_a_sample(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    home, options = tmp_path / "home", ("--keep", 8, "--iters", 2, "--data", CALIB, *DATA, "--dry-run", "--json")
    looked = headers(server, home)
    server.reset_counts()
    stages = json.loads(command(server, home, "compress", f"hf://{NAME}", tmp_path / "out", *options))["stages"]
    assert [stage["stage"] for stage in stages if stage["state"] == "to do"] == STAGES
    assert looked < server.data_bytes(NAME) <= looked + max(p.stat().st_size for p in small_moe.glob("*.safetensors"))
    assert not (tmp_path / "out").exists()


def test_the_whole_way_from_a_repository_gives_what_it_gives_from_a_folder(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    home, held_out = tmp_path / "home", few("heldout.jsonl")
    options = ("--keep", 8, "--iters", 2, "--tune-samples", 8, "--tune-seqlen", 64, "--data", CALIB, *DATA)
    options = (*options, "--eval-data", held_out, "--eval-samples", 4, "--eval-seqlen", 64, "--full-verify")
    command(server, home, "compress", small_moe, tmp_path / "local", *options)
    command(server, home, "compress", NAME, tmp_path / "out", *options, "--connections", 2)
    assert record(tmp_path / "out")["inputs"]["source"]["repository"].startswith(f"hf://{NAME}@")
    here, there = (files(tmp_path / name) for name in ("local", "out"))
    assert here.keys() == there.keys()
    assert {name for name in here if here[name] != there[name]} <= {"README.md"}
    keeps = [(tmp_path / f"{name}.compress" / "keep.json").read_text() for name in ("local", "out")]
    assert json.loads(keeps[0])["keep"] == json.loads(keeps[1])["keep"]


def test_a_model_passes_through_much_less_disk_than_a_block_takes(
    server: HubServer, small_moe: Path, tmp_path: Path
) -> None:
    home, options = tmp_path / "home", ("-m", KEEP, "--data", CALIB, *DATA, "--json")
    here = command(server, home, "evaluate", small_moe, *options)
    first = (
        "import os, pathlib, shardxform.checkpoint.remote.reading as downloads\n"
        "downloads._DISK_SLOT, downloads.LEAST_CACHE_BYTES = 1 << 14, 1 << 20\n"
        "most, made = [0], downloads.DiskArena._opened\n"
        "def opened(arena):\n"
        "    file = made(arena)\n"
        "    most[0] = max(most[0], os.fstat(file.fd).st_size)\n"
        "    pathlib.Path('most').write_text(str(most[0]))\n"
        "    return file\n"
        "downloads.DiskArena._opened = opened\n"
    )
    there = command(server, home, "evaluate", NAME, *options, "--cache-limit", "1MiB", first=first)
    assert 0 < int((tmp_path / "most").read_text()) <= 1 << 20
    assert figures(there) == figures(here)
    assert server.data_bytes(NAME) <= 1.1 * shard_bytes(small_moe)
