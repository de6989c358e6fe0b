"""The checks of `device_checks.py`, in a process of their own.

A process that knows another device computes gradients on a thread of its own, and can be forked no more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("device_checks.py")


@pytest.mark.oracle
def test_every_verb_gives_on_a_pretend_device_what_it_gives_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'checks'}")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", str(CHECKS), *options]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stdout[-20_000:]
    assert " passed" in found.stdout
    assert "skipped" not in found.stdout
