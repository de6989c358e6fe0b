"""`prune --heal` of checkpoints in integers: written as the source has them, in 16 bits, or refused.

The twin of a checkpoint holds the same values in bfloat16, and is healed as any 16-bit checkpoint is. Rounding is held
against compressed-tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import read_checkpoint
from strategies import picked

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from test_heal_small_floats import HEAL, config_of, healed, layers_moved, record_of  # noqa: E402
from test_integer_sources import EXPERTS, GRID, KINDS, STILL, made  # noqa: E402
from test_small_floats import call, keep_file  # noqa: E402

from shardxform.formats.asymmetric import Asymmetric  # noqa: E402
from shardxform.formats.encoding import round_to  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

ALL_KINDS = KINDS | STILL
SYMMETRIC = ["compressed-tensors", "gptq", "compressed-tensors in groups of 16", "auto-round", "8 bits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("healed")


@pytest.mark.parametrize("kind", picked(SYMMETRIC, 3))
def test_written_as_the_source_has_it_only_words_and_scales_of_what_moved_differ(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    source, _ = made(folder, kind, ALL_KINDS)
    after, out = healed(source, tmp_path / "out", "moe"), tmp_path / "out"
    call("prune", source, tmp_path / "plain", "-m", keep_file(tmp_path), "-q")
    before = read_checkpoint(tmp_path / "plain")
    assert record_of(out)["inputs"]["recipe"]["heal"]["encoding"] == "source"
    assert config_of(out) == config_of(tmp_path / "plain")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    changed = {name for name in after if after[name] != before[name]}
    assert layers_moved(out)
    assert any(".experts." in name for name in changed)
    for name in changed:
        assert ".mlp." in name or "post_attention_layernorm" in name
        assert not name.endswith(("qzeros", "weight_shape", "g_idx"))
    report = verify(out, source=source)
    assert report.sound, report.problems
    assert report.values_near == report.tensors_healed > 0
    assert report.values_compared + report.values_near == report.tensors
