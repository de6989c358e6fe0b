"""Granite 4: configs that say Infinity, in the ways that releases and transformers write it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_every_family import (
    FLOAT32,
    Checkpoint,
    Manifest,
    RunOptions,
    Skeleton,
    Weights,
    keep_of,
    loaded,
    plan_prune,
    run,
    source_of,
    verify,
)

from shardxform.base.strict_json import JsonError, parse_config, parse_object
from shardxform.cli import main
from shardxform.errors import CheckpointError

pytestmark = pytest.mark.oracle


def with_limit(folder: Path, spelling: str) -> Path:
    """A tiny checkpoint whose config gives the upper limit of time steps so."""
    root = source_of("granitemoehybrid", folder)
    config = json.loads((root / "config.json").read_text())
    text = json.dumps({**config, "time_step_limit": [0.0, "X"]})
    (root / "config.json").write_text(text.replace('"X"', spelling))
    return root


@pytest.mark.parametrize("spelling", ["Infinity", '{"__float__": "Infinity"}'])
def test_infinity_is_read_run_and_written_as_it_was(spelling: str, tmp_path: Path) -> None:
    root, out, packed = with_limit(tmp_path, spelling), tmp_path / "out", tmp_path / "packed"
    source = Checkpoint.open(root)
    run(plan_prune(source, Manifest(keep=keep_of(source))), out, RunOptions(jobs=1))
    assert spelling in " ".join((out / "config.json").read_text().split()).replace("{ ", "{").replace(" }", "}")
    assert verify(out, source=source, independent=True).problems == ()
    assert loaded(out).config.time_step_limit == (0.0, float("inf"))
    with Weights(source, FLOAT32) as weights:
        assert Skeleton(weights).module(0).mamba.time_step_limit == (0.0, float("inf"))
    result = CliRunner().invoke(main, ["quantize", str(root), str(packed), "--group-size", "32", "-q"])
    assert result.exit_code == 0, result.output
    assert verify(packed, source=source).problems == ()


@pytest.mark.parametrize("spelling", ["1e999"])
def test_other_numbers_that_are_none_are_refused(spelling: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=spelling):
        Checkpoint.open(with_limit(tmp_path, spelling))


def test_nothing_but_configs_may_say_infinity() -> None:
    with pytest.raises(JsonError, match="Infinity is not JSON"):
        parse_object(b'{"a": Infinity}')
    assert parse_config(b'{"a": [Infinity]}') == {"a": [float("inf")]}
