"""The checks of `device_checks.py`, in a process of their own.

A process that knows another device computes gradients on a thread of its own, and can be forked no more: the checks
have a fork of this one, which has the libraries.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults import overheard

CHECKS = Path(__file__).with_name("device_checks.py")


@pytest.mark.oracle
def test_every_verb_gives_on_a_pretend_device_what_it_gives_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("transformers")

    def check() -> None:
        for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # of this run
            del os.environ[name]
        options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'checks'}")
        raise SystemExit(int(pytest.main([str(CHECKS), *options])))

    code, said, _ = overheard(check, tmp_path)
    assert code == 0, said[-20_000:]
    assert " passed" in said
    assert "skipped" not in said
