"""LLVM's operations in the kernels of tuning: the same bits as numpy and torch give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from strategies import ALL

pytest.importorskip("numba")
torch = pytest.importorskip("torch")
from numba import njit  # noqa: E402

from shardxform.tuning import kernels  # noqa: E402

SIZES = st.floats(-(2.0**100), 2.0**100, width=32)


@njit("float32(float32, float32, float32)")  # compiled now: the first call must not take longer than others
def multiply_add(x: Any, y: Any, z: Any) -> Any:
    return kernels.multiply_add(x, y, z)


@njit("float32(float32[::1])")
def sum_lanes(x_L: Any) -> Any:
    return kernels.sum_lanes(x_L)


@given(st.integers(-(2**15), 2**15 - 1), st.floats(-16, 16, width=32))
def test_multiply_add_of_an_exact_product_is_both_operations(offset: int, ratio: float) -> None:
    x, y, z = np.float32(offset), np.float32(2.0**-15), np.float32(ratio)
    assert multiply_add(x, y, z) == x * y + z


@given(arrays.arrays(np.float32, kernels.LANES, elements=SIZES))
def test_lanes_are_added_half_to_half(x_L: Any) -> None:
    expected = x_L
    while len(expected) > 1:
        expected = expected[: len(expected) // 2] + expected[len(expected) // 2 :]
    assert sum_lanes(x_L) == expected[0]


def test_lanes_may_lie_anywhere() -> None:
    x = np.arange(40, dtype=np.float32)
    assert sum_lanes(x[3:35]) == sum(range(3, 35))


@pytest.mark.skipif(not kernels.HAS_BF16, reason="this CPU has no such instruction")
def test_narrowing_rounds_to_nearest_ties_to_even() -> None:
    @njit
    def narrow(x_I: Any, out_I: Any) -> None:
        for i in range(len(x_I)):
            out_I[i] = kernels.narrow(x_I[i])

    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << 16) | np.uint32(0x8000)
    x = np.concatenate([bits, ties, [np.uint32(0), np.uint32(1 << 31)]]).view(np.float32)
    x = x[np.isfinite(x) & ((np.abs(x) >= np.finfo(np.float32).tiny) | (x == 0))]
    out = np.empty(len(x), np.uint16)
    narrow(x, out)
    expected = torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(out, expected)


ELSEWHERE = """
import torch
from shardxform.formats.scheme import Grid
from shardxform.tuning import kernels
from shardxform.tuning.stacked import stacked_weight
from shardxform.tuning.workers import Workers

assert not kernels.HAS_BF16
w_EOI = torch.randn(1, 64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
with Workers(1) as workers:
    weight = stacked_weight(w_EOI, Grid(), workers, "w")
wide, narrow = torch.empty(64, 256), torch.empty(64, 256, dtype=torch.bfloat16)
weight.values_into(0, wide)
weight.values_into(0, narrow)
assert torch.equal(wide.bfloat16(), narrow)
weight.update(0, narrow, narrow.clone())
"""


@pytest.mark.skipif(not ALL, reason="by night: all kernels are compiled anew")
def test_a_cpu_without_the_instruction_needs_none_of_it(tmp_path: Path) -> None:
    """As the environment has numba compile for one."""
    env = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", ELSEWHERE], env=env, check=True)
