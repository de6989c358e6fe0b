"""Memory of the real processes on layers of the real shape, far larger than what they may hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import barrage
import pytest
from click.testing import CliRunner
from conftest import ROOT
from strategies import picked
from texts import few

from shardxform.cli import main
from shardxform.forward import runtime

pytestmark = pytest.mark.slow

PRUNE_LIMIT = 150e6
QUANTIZE_LIMIT = 600e6


@pytest.fixture(scope="module")
def real_shape(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of the reference model with 64 experts: 0.5 GB in one shard, on disk as holes."""
    out = tmp_path_factory.mktemp("real") / "source"
    shape = ["--layers", "1", "--experts", "64", "--vocab", "1024", "--no-mtp", "--text-only", "--sparse"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "synth.py", out, *shape], check=True, stdout=subprocess.DEVNULL
    )
    return out


def peak(*arguments: Any) -> int:
    """Peak resident bytes of the command, as it reports them itself."""
    command = [sys.executable, "-m", "shardxform", *map(str, arguments), "-q", "--json"]
    return reported(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def reported(printed: str) -> int:
    return int(json.loads(printed)["report"]["peak_rss_bytes"])


def test_prune_stays_small(real_shape: Path, tmp_path: Path) -> None:
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps({"0": list(range(0, 64, 2))}))
    assert sum(path.stat().st_size for path in real_shape.iterdir()) > 3 * PRUNE_LIMIT
    assert peak("prune", real_shape, tmp_path / "out", "-m", keep, "-j", "4") <= PRUNE_LIMIT


def test_quantize_stays_small(real_shape: Path, tmp_path: Path) -> None:
    command = ["quantize", real_shape, tmp_path / "out", "-j", "4"]
    dry = [sys.executable, "-m", "shardxform", *map(str, command), "-q", "--json", "--dry-run"]
    planned = json.loads(subprocess.run(dry, check=True, capture_output=True, text=True).stdout)["peak_memory_bytes"]
    assert peak(*command) <= min(planned, QUANTIZE_LIMIT)


def test_one_heap_keeps_what_the_environment_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(runtime, "_of_glibc", {"mallopt": lambda *call: calls.append(call)}.get)
    for name in runtime._HEAP:
        monkeypatch.delenv(name, raising=False)
    runtime.keep_one_heap()
    assert calls == [(-8, 1), (-3, 32 << 20), (-1, 64 << 20)]
    calls.clear()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    runtime.keep_one_heap()
    assert calls == [(-8, 1), (-3, 32 << 20)]


PRODUCTS = """
import torch
from shardxform.forward.runtime import keep_few_kernels
from shardxform.base.progress import peak_rss_bytes

keep_few_kernels()
weight = torch.ones(1024, 1024, dtype=torch.bfloat16)
torch.ones(1, 1024, dtype=torch.bfloat16) @ weight.T
before = peak_rss_bytes()
for tokens in range(2, 300):
    there = torch.ones(tokens, 1024, dtype=torch.bfloat16) @ weight.T
    there.T @ (there @ weight)
print(peak_rss_bytes() - before)
raise SystemExit
"""


def forked(folder: Path, *arguments: Any, first: str = "") -> str:
    """What a command prints that is forked from a process with torch and transformers, which most of its memory is."""
    nursery = barrage.nursery(tuple(barrage.COMPUTING))
    command = nursery.start(list(map(str, arguments)), folder, "command", first=first)
    assert nursery.wait(command, 240) == 0, command.err.read_text()
    return command.out.read_text()


def test_kernels_of_many_shapes_are_not_all_kept(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    assert int(forked(tmp_path, first=PRODUCTS)) <= 200e6  # 0.6 GB where the CPU multiplies bfloat16, and all are kept


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A block of the real shape with numbers in it, which a forward pass takes, and a manifest of half its experts."""
    root, small = tmp_path_factory.mktemp("computed"), ROOT / "examples" / "small-moe"
    shape = ["--layers", "1", "--experts", "32", "--vocab", "2048", "--no-mtp", "--text-only"]
    synth = [sys.executable, ROOT / "benchmarks" / "synth.py", root / "source", *shape]
    subprocess.run(synth, check=True, stdout=subprocess.DEVNULL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small / name, root / "source")
    (root / "keep.json").write_text(json.dumps({"0": list(range(0, 32, 2))}))
    return root


TUNED = [("quantize", "--iters", "2"), ("prune", "--heal=all", "--heal-iters", "2")]


@pytest.mark.parametrize("options", picked(TUNED, 2))
def test_tuning_and_healing_take_no_more_than_planned(options: tuple[str, ...], computed: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command, *what = options
    arguments = [computed / "source", tmp_path / "out", "-m", computed / "keep.json", *what]
    arguments += ["--batch-size", "4", "--seqlen", "128", "--samples", "4"]
    arguments += ["--data", few("calib.jsonl")]
    arguments += ["--method", "auto-round"] if command == "quantize" else ["--heal-lr", "0.01"]
    dry = CliRunner().invoke(main, [command, *map(str, arguments), "-q", "--json", "--dry-run"], catch_exceptions=False)
    planned = json.loads(dry.stdout)["peak_memory_bytes"]
    assert planned / 2 <= reported(forked(tmp_path, command, *arguments, "-q", "--json")) <= planned
