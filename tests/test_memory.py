"""Memory of the real processes on layers of the real shape, far larger than what they may hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

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
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(done.stdout)["report"]["peak_rss_bytes"])


def test_prune_stays_small(real_shape: Path, tmp_path: Path) -> None:
    keep = tmp_path / "keep.json"
    keep.write_text(json.dumps({"0": list(range(0, 64, 2))}))
    assert sum(path.stat().st_size for path in real_shape.iterdir()) > 3 * PRUNE_LIMIT
    assert peak("prune", real_shape, tmp_path / "out", "-m", keep, "-j", "4") <= PRUNE_LIMIT


def test_quantize_stays_small(real_shape: Path, tmp_path: Path) -> None:
    assert peak("quantize", real_shape, tmp_path / "out", "-j", "4") <= QUANTIZE_LIMIT
