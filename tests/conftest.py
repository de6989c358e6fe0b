"""Fixtures shared by all tests. Session-scoped directories are read-only: copy before changing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from build import KINDS, tiny, write_checkpoint
from conversions import forget_changes

ROOT = Path(__file__).resolve().parents[1]
SIDECARS = {
    "generation_config.json": '{"do_sample": false}\n',
    "tokenizer.json": '{"version": "1.0"}\n',
    "chat_template.jinja": "{{ messages }}\n",
    "LICENSE": "as you like\n",
    "README.md": "# tiny\n",
    "notes.bin": b"\x00\x01",  # no part of the model
}


@pytest.fixture(autouse=True)
def conversions_as_they_were() -> Iterator[None]:
    """No test changes how the next one loads a model."""
    yield
    forget_changes()


@pytest.fixture(scope="session")
def small_moe() -> Path:
    """The trained small checkpoint of examples/, bf16, text-only Qwen3.5-MoE."""
    return ROOT / "examples" / "small-moe"


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One written checkpoint per kind of `build.KINDS`, three shards each, with sidecars."""
    root = tmp_path_factory.mktemp("tiny")
    out = {}
    for kind in KINDS:
        config, tensors = tiny(kind)
        out[kind] = write_checkpoint(root / kind, tensors, config, shards=3, files=SIDECARS)
        for path in out[kind].iterdir():
            path.chmod(0o444)
    return out


@pytest.fixture(params=KINDS)
def tiny_checkpoint(request: pytest.FixtureRequest, tiny_checkpoints: dict[str, Path]) -> Path:
    """A tiny checkpoint of every kind in turn."""
    return tiny_checkpoints[request.param]


@pytest.fixture
def writable(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a checkpoint directory to where a test may change it."""

    def copy(source: Path) -> Path:
        target = tmp_path / f"copy-{source.name}"
        shutil.copytree(source, target)
        for folder, _, names in os.walk(target):
            for name in names:
                os.chmod(os.path.join(folder, name), 0o644)
        return target

    return copy
