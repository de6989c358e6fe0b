"""Offsets, clips and kept codes of a stack of weights: kernels against torch operations, and both against rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import some

from shardxform.errors import ExecutionError, SchemeError
from shardxform.formats import packing, rounding
from shardxform.formats.encoding import Writing
from shardxform.formats.integers import Ints
from shardxform.formats.scheme import Grid

torch = pytest.importorskip("torch")

from shardxform.tuning import elementwise, stacked  # noqa: E402
from shardxform.tuning.elementwise import Pace  # noqa: E402
from shardxform.tuning.workers import Workers, one_thread  # noqa: E402

pytestmark = pytest.mark.oracle

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PACE = Pace(164 * 4.0, float(np.float32(0.02)), 0.25, 1.2)


def raw(w: Any) -> np.ndarray:
    return w.view(torch.uint32 if w.dtype == torch.float32 else torch.uint16).numpy()


def weights(shape: tuple[int, int, int], dtype: Any = torch.bfloat16, seed: int = 0) -> Any:
    """Rows of different size, with outliers, zeros, ties, and an all-zero group."""
    generator = torch.Generator().manual_seed(seed)
    w = 0.05 * torch.randn(shape, generator=generator)
    w *= torch.exp2(torch.randint(-12, 4, (*shape[:2], 1), generator=generator).float())
    w[torch.rand(shape, generator=generator) < 0.02] *= 20
    w[torch.rand(shape, generator=generator) < 0.03] = -0.0
    w[0, 0] = torch.randint(-16, 17, shape[2:], generator=generator) / 2
    w[0, 1, :32] = 0.0
    return w.to(dtype)


def stack(w: Any, grid: Grid, compiled: bool = True) -> stacked.StackedWeight:
    with Workers(2) as workers:
        weight = stacked.stacked_weight(w, grid, workers, "w")
    if not compiled:
        weight._compiled = False
    return weight


def values(weight: stacked.StackedWeight, dtype: Any = torch.float32) -> Any:
    experts, rows, columns = weight.shape
    out = torch.full((experts * rows, columns), torch.nan, dtype=dtype)
    weight.values_into(0, out)
    return out


def state(weight: stacked.StackedWeight) -> tuple[np.ndarray, ...]:
    return weight._v_RI.numpy(), weight._clip_RG.numpy(), weight._kept_RG.numpy()


def gradient(weight: stacked.StackedWeight, seed: int, dtype: Any = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(weight._v_RI.shape, generator=generator)
    g[torch.rand(g.shape, generator=generator) < 0.1] = 0.0
    return g.to(dtype)


def needs_numba() -> None:
    pytest.importorskip("numba")


@given(
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([32, 64, 128, -1]),
    columns=st.sampled_from([32, 96, 256]),
    scale_grid=st.sampled_from(["fp16", "bf16"]),
    search=st.booleans(),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    narrow=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=some(60), deadline=None)
def test_kernels_give_the_bits_of_the_torch_operations(
    bits: Any, group: Any, columns: int, scale_grid: Any, search: bool, dtype: str, narrow: bool, seed: int
) -> None:
    needs_numba()
    grid = Grid(bits=bits, group_size=group, scale_grid=scale_grid, search=search)
    w = weights((2, 3, columns), DTYPES[dtype], seed)
    pair = stack(w, grid), stack(w, grid, compiled=False)
    assert pair[0]._compiled
    passing = torch.bfloat16 if narrow else torch.float32
    for turn in range(5):
        expected = values(pair[1], passing)
        for weight in pair:
            weight.pace = PACE
            before = torch.full_like(expected, torch.nan) if turn % 2 else None
            weight.update(0, gradient(weight, seed + turn, passing), before)
            assert before is None or torch.equal(before, expected)
            if turn == 2:
                weight.keep(1, 6)
        assert torch.equal(values(pair[0], passing), values(pair[1], passing))
    for ours, theirs in zip(state(pair[0]), state(pair[1]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for weight in pair:
        weight.settled = True
    assert torch.equal(values(pair[0], passing), values(pair[1], passing))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["gptq", "row"])
def test_it_starts_from_plain_rounding_bit_for_bit(bits: Any, search: bool, compiled: bool, layout: Any) -> None:
    grid = Grid(bits=bits, group_size=32, search=search)
    target = Ints(grid, layout)
    w = weights((2, 32, 96))
    weight = stack(w, grid, compiled)
    for expert in range(2):
        expected, stats = rounding.quantize(raw(w[expert]), "BF16", grid, layout=layout)
        assert stats.ok
        rows = stacked.rows_of(weight.codes(expert, slice(None)), grid, "w")
        found = {
            role: part
            for role, _, part in target.written([rows], Writing("w", (32, 96), rounding.quantize_into, lambda: None))
        }
        np.testing.assert_array_equal(found["words"], expected.words)
        np.testing.assert_array_equal(found["scales"], expected.scales)


@given(
    seed=st.integers(0, 2**16), bits=st.sampled_from([4, 8]), compiled=st.booleans(), group=st.sampled_from([32, -1])
)
@settings(max_examples=40, deadline=None)
def test_what_is_stored_has_the_values_that_the_block_was_judged_with(
    seed: int, bits: Any, compiled: bool, group: Any
) -> None:
    grid = Grid(bits=bits, group_size=group, search=True)
    weight = stack(weights((2, 4, 96), seed=seed), grid, compiled)
    weight.pace = Pace(8000.0, float(np.float32(0.1)), 0.0, 1.2)
    for turn in range(6):
        weight.update(0, gradient(weight, seed + turn))
    judged = values(weight)
    weight.keep(0, 8)
    for turn in range(3):
        weight.update(0, gradient(weight, seed + 99 + turn))
    assert not torch.equal(values(weight), judged)
    weight.settled = True
    assert torch.equal(values(weight), judged)
    for expert in range(2):
        codes = weight.codes(expert, slice(None))
        assert codes.codes_OI.max() <= 2 * grid.zero_code - 1
        found = packing.dequantize(codes.codes_OI, codes.scale_OG, bits, group)
        np.testing.assert_array_equal(found, judged[4 * expert : 4 * expert + 4].numpy())


@pytest.mark.parametrize("compiled", [True, False])
def test_offsets_stop_short_of_one_and_keep_their_tags(compiled: bool) -> None:
    weight = stack(weights((1, 4, 32)), Grid(group_size=32), compiled)
    weight.pace = Pace(20000.0, 0.0, 1.0, 1.0)
    up = torch.ones(4, 32) * torch.sign(weight._start_RG)
    weight.update(0, -up)
    weight.keep(0, 4)
    tags = weight._v_RI & 3
    for _ in range(3):
        weight.update(0, -up)
    assert torch.equal(weight._v_RI & 3, tags)
    assert int((weight._v_RI & -4).max()) == elementwise.LIMIT
    for _ in range(9):
        weight.update(0, up)
    assert torch.equal(weight._v_RI & 3, tags)


@pytest.mark.parametrize("compiled", [True, False])
def test_nothing_moves_without_a_gradient_nor_with_nan(compiled: bool) -> None:
    weight = stack(weights((1, 4, 64)), Grid(group_size=32), compiled)
    weight.pace = PACE
    for g in (torch.zeros(4, 64), torch.full((4, 64), torch.nan)):
        weight.update(0, g)
        assert not weight._v_RI.any()
        assert bool((weight._clip_RG == 1).all())


@pytest.mark.parametrize("compiled", [True, False])
def test_clips_stay_in_their_range(compiled: bool) -> None:
    weight = stack(weights((1, 4, 64)), Grid(group_size=32), compiled)
    weight.pace = Pace(0.0, 0.5, 0.75, 1.125)
    g = gradient(weight, 3)
    weight.update(0, g)
    assert set(weight._clip_RG.unique().tolist()) <= {0.75, 1.0, 1.125}
    assert len(weight._clip_RG.unique()) > 1


def test_a_run_of_rows_is_independent_of_the_others() -> None:
    whole, parts = (stack(weights((3, 8, 64)), Grid(group_size=32)) for _ in range(2))
    for weight in (whole, parts):
        weight.pace = PACE
    g = gradient(whole, 0)
    whole.update(0, g)
    for first in range(0, 24, 6):
        parts.update(first, g[first : first + 6].contiguous())
    for ours, theirs in zip(state(whole), state(parts), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def bytes_of(holder: object) -> int:
    """Bytes of the tensors that an object holds."""
    return sum(value.nbytes for value in vars(holder).values() if isinstance(value, torch.Tensor))


def test_little_memory_beside_the_weights() -> None:
    w = weights((2, 64, 256))
    weight = stack(w, Grid())
    beside = bytes_of(weight) - w.nbytes
    assert beside == 2 * w.numel() + 12 * w.numel() // 128
    assert beside <= 2.5 * w.numel()
    assert weight._w_RI.data_ptr() == w.data_ptr()


@pytest.mark.parametrize(("group", "zero"), [(32, 3), (64, 2), (128, 0), (-1, 0)])
def test_groups_of_zeros_are_counted_as_plain_rounding_counts_them(group: Any, zero: int) -> None:
    w = weights((2, 4, 96))
    w[w == 0] = 1
    w[1, 2, :64], w[1, 3, 64:] = 0, -0.0
    weight = stack(w, Grid(group_size=group))
    assert [weight.codes(expert, slice(None)).zero_groups for expert in range(2)] == [0, zero]
    assert weight.codes(1, slice(0, 2)).zero_groups == 0
    assert rounding.quantize(raw(w[1]), "BF16", Grid(group_size=group), layout="row")[1].zero_groups == zero


def test_restarting_forgets_everything() -> None:
    weight = stack(weights((2, 4, 64)), Grid(group_size=32))
    start = values(weight)
    weight.pace = PACE
    weight.update(0, gradient(weight, 0))
    weight.keep(0, 8)
    weight.settled = True
    weight.restart()
    assert torch.equal(values(weight), start)
    assert not weight.settled


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "NaN or an infinity in row 5"), (3e38, "beyond float16 in row 5")]
)
def test_weights_without_a_representation_are_refused(value: float, text: str) -> None:
    w = weights((2, 4, 64), torch.float32)
    w[1, 1, 7] = value
    with pytest.raises(ExecutionError, match=f"w \\[2, 4, 64\\]: .*{text}"):
        stack(w, Grid(group_size=32))


def test_shapes_and_types_that_cannot_be_packed_are_refused() -> None:
    with pytest.raises(SchemeError, match="multiple of 32 columns, found \\[1, 4, 40\\]"):
        stack(torch.zeros(1, 4, 40), Grid(group_size=32))
    with pytest.raises(SchemeError, match=r"found torch\.float64"):
        stack(torch.zeros(1, 4, 32, dtype=torch.float64), Grid(group_size=32))
    with pytest.raises(SchemeError, match="contiguous"):
        stack(torch.zeros(2, 64, 32).transpose(1, 2), Grid(group_size=32))


def test_workers_have_no_more_under_way_than_they_may() -> None:
    """Each of them may take gigabytes, whatever the number of threads."""
    begun: list[int] = []
    with Workers(4) as workers:
        for taken, _ in enumerate(workers.ordered(begun.append, range(12), 2)):
            assert len(begun) <= taken + 2
        with one_thread():
            for taken, _ in enumerate(workers.ordered(begun.append, range(12), 1)):
                assert len(begun) == 12 + taken + 1


def test_workers_give_results_in_order_and_pass_errors_on() -> None:
    import time

    with Workers(4) as workers:
        assert list(workers.ordered(lambda n: time.sleep((9 - n) / 500) or n, range(10))) == list(range(10))
        with pytest.raises(ZeroDivisionError):
            list(workers.ordered(lambda n: 1 // (n - 3), range(10)))
        assert list(workers.ordered(lambda _: torch.get_num_threads(), range(8))) == [1] * 8
    with pytest.raises(SchemeError, match="threads: expected at least 1, found 0"):
        Workers(0)
