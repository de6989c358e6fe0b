"""The torch backend gives the bits of the numpy one, on whatever device the tests have."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardxform.errors import SchemeError
from shardxform.formats import rounding
from shardxform.formats.scheme import Grid

pytestmark = pytest.mark.oracle


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128, -1]),
    scale_grid=st.sampled_from(["fp16", "bf16"]),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    layout=st.sampled_from(["gptq", "row"]),
    spread=st.sampled_from([1e-7, 1e-3, 1.0, 300.0]),
)
@settings(max_examples=60, deadline=None)
def test_torch_and_numpy_give_the_same_bits(
    seed: int, bits: int, group: int, scale_grid: str, dtype: str, layout: str, spread: float
) -> None:
    from shardxform.formats import rounding_torch

    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((32, 256)) * spread).astype(np.float32)
    w[rng.integers(0, 32, 3)] = 0
    w[:, ::7] = np.abs(w).max() / 2  # ties between groups and within them
    raw = {
        "F32": w,
        "F16": w.astype(np.float16),
        "BF16": (w.view(np.uint32) >> 16).astype(np.uint16),
    }[dtype]
    grid = Grid(bits=bits, group_size=group, scale_grid=scale_grid)  # type: ignore[arg-type]
    expected, stats = rounding.quantize(raw, dtype, grid, layout=layout, backend="numpy")  # type: ignore[arg-type]
    out = rounding.QuantizedWeight.empty(layout, grid, (32, 256))  # type: ignore[arg-type]
    assert rounding_torch.quantize_on(raw, dtype, grid, out, rounding_torch.open_device(device())) == stats  # type: ignore[arg-type]
    assert np.array_equal(out.words, expected.words)
    assert np.array_equal(out.scales, expected.scales)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_bad_weights_are_reported_at_the_same_place(value: float) -> None:
    from shardxform.formats import rounding_torch

    w = np.ones((64, 128), np.float32)
    w[37, 5] = w[40, 2] = value
    grid = Grid()
    _, stats = rounding.quantize(w, "F32", grid, layout="gptq", backend="numpy")
    out = rounding.QuantizedWeight.empty("gptq", grid, w.shape)
    found = rounding_torch.quantize_on(w, "F32", grid, out, rounding_torch.open_device(device()))
    assert (found.nonfinite, found.overflow_row) == (stats.nonfinite, stats.overflow_row)
    assert not found.ok


def test_the_search_is_refused() -> None:
    from shardxform.formats import rounding_torch

    grid = Grid(search=True)
    out = rounding.QuantizedWeight.empty("gptq", grid, (32, 128))
    with pytest.raises(SchemeError, match="CPU only"):
        rounding_torch.quantize_on(np.ones((32, 128), np.float32), "F32", grid, out, rounding_torch.open_device("cpu"))


def test_a_device_that_is_not_there_is_refused_by_name() -> None:
    from shardxform.formats import rounding_torch

    with pytest.raises(SchemeError, match="`device` cuda:77"):
        rounding_torch.open_device("cuda:77")
    with pytest.raises(SchemeError, match="`device` abacus"):
        rounding_torch.open_device("abacus")
