"""Fixtures shared by all tests. Session-scoped directories are read-only: copy before changing.

What the tests say does not depend on the shell that they are started from: its proxies, locale, colours, time zone,
ignored signals and settings of the hub's client are put aside here, before any library reads them. Temporary files lie
in memory where there is room, so that syncing, which `faults` models, is not waited for. The workers of `-n` are given
whole files, the longest first: what a module's fixtures make is made once.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

MEMORY = Path("/dev/shm")  # of Linux
ROOM = 6 << 30  # bytes; the tests of a session leave less than a quarter of it at any time
PUT_ASIDE = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "LANGUAGE", "TZ")
PUT_ASIDE += ("TTY_COMPATIBLE", "TTY_INTERACTIVE", "UNICODE_VERSION", "PYTHONIOENCODING", "PYTHONWARNINGS")
FAMILIES = ("HF_", "HUGGING", "LC_", "_SHARDXFORM_")
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def put_aside() -> None:
    """Give this process, and those that it starts, an environment that every machine has."""
    for name in list(os.environ):
        if name in PUT_ASIDE or name.lower().endswith("_proxy") or name.startswith(FAMILIES):
            del os.environ[name]
    time.tzset()
    os.environ["LANG"] = "C.UTF-8"
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # macOS asks the system for proxies
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as shells start what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ONE_THREAD:  # threads of several processes wait for each other, busily
        os.environ.setdefault(name, "1")


def keep_in_memory() -> None:
    """Have pytest make its temporary directories in memory, unless it was told where."""
    asked = "PYTEST_DEBUG_TEMPROOT" in os.environ
    if not asked and os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)


put_aside()
keep_in_memory()

from build import KINDS, tiny, write_checkpoint  # noqa: E402
from conversions import forget_changes  # noqa: E402

LONGEST = (
    "test_device.py",
    "test_every_family.py",
    "test_compress.py",
    "test_ray.py",
    "test_heal_command.py",
    "test_convert.py",
    "test_tuning_session.py",
    "test_remote_models.py",
    "test_convert_oracle.py",
    "test_memory.py",
    "test_interrupts.py",
    "test_attacks.py",
    "test_heal_small_floats.py",
    "test_golden.py",
    "test_crash.py",
    "test_small_floats.py",
    "test_remote_faults.py",
    "test_remote.py",
    "test_evaluation.py",
    "test_card.py",
    "test_drafts.py",
)  # by what they took; they begin first, so that the workers end together
TOGETHER = {
    "test_memory.py": "models",
    "test_remote_models.py": "models",
    "test_interrupts.py": "models",
    "test_calibration_hub.py": "models",
    "test_convert_oracle.py": "models",
    "test_remote.py": "client",
    "test_remote_faults.py": "client",
    "test_push.py": "client",
}  # files whose commands one process forks, for which they go to one worker
ROOT = Path(__file__).resolve().parents[1]
SIDECARS = {
    "generation_config.json": '{"do_sample": false}\n',
    "tokenizer.json": '{"version": "1.0"}\n',
    "chat_template.jinja": "{{ messages }}\n",
    "LICENSE": "as you like\n",
    "README.md": "# tiny\n",
    "notes.bin": b"\x00\x01",  # no part of the model
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give whole files to the workers, some of them together, unless another way was asked for."""
    if config.getoption("dist") != "load":  # what -n alone means
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return TOGETHER.get(Path(file).name, file)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Import without the collector: there is nothing to collect among the libraries, and it looks at all of them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and those beside them that go together; within a file the order stays."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    for name, group in TOGETHER.items():
        rank[name] = min(rank.get(other, len(rank)) for other in TOGETHER if TOGETHER[other] == group)
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Spare the collector the libraries: commands call it after every block, and it would look at all of them."""
    if len(sys.modules) > _modules[0] + 50:
        gc.freeze()
        _modules[0] = len(sys.modules)


_modules = [0]


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
