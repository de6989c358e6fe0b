"""Weights that are healed against an oracle in float64: what is held, what a step does, what is stored in the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import strategies  # noqa: F401  (configures hypothesis)
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from shardxform.tuning.heal import HealedStack, Moving, signs  # noqa: E402

pytestmark = pytest.mark.oracle

PATHS = [pytest.param(True, id="compiled"), pytest.param(False, id="torch")]
KINDS = [torch.bfloat16, torch.float16, torch.float32]
ROWS = slice(None)


def moving(w_RI: Any, compiled: bool) -> Moving:
    """Held as it is with numba, or as it is without."""
    if compiled:
        pytest.importorskip("numba")
    out = Moving(w_RI)
    out._compiled = compiled
    return out


def held(values: Moving, shape: tuple[int, ...]) -> np.ndarray:
    out = torch.empty(shape)
    values.exact_into(ROWS, out)
    return out.numpy()


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Nearest numbers of `bits` bits of significand in the range of float32, ties away from zero, in float64."""
    x = x.astype(np.float64)
    exponent = np.maximum(np.frexp(x)[1], -125)  # below, all numbers are as far apart as at the smallest normal
    return np.copysign(np.floor(np.ldexp(np.abs(x), bits - exponent) + 0.5), x) * np.ldexp(1.0, exponent - bits)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def random_w(shape: tuple[int, ...], seed: int = 0, dtype: Any = torch.bfloat16) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- one run of values ------------------------------------------------------------------------------------------------

_FINITE = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)
_GRADIENT = st.sampled_from([1.0, -1.0, 0.0, -0.0, 3e-39, -1e-30, 1e30, np.nan, np.inf, -np.inf])


@st.composite
def walks(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[float, list[float]]]]:
    """Bits of bfloat16 weights, and steps: their size, and a gradient for every weight."""
    count = draw(st.integers(1, 6))
    bits = draw(st.lists(_FINITE, min_size=count, max_size=count))
    sizes = st.floats(2**-100, 2.0**10, width=32) | st.floats(2**-16, 2**-4, width=32)
    steps = st.tuples(sizes, st.lists(_GRADIENT, min_size=count, max_size=count))
    return np.array(bits, np.uint16), draw(st.lists(steps, min_size=1, max_size=8))


@pytest.mark.parametrize("compiled", PATHS)
@given(walk=walks())
@settings(max_examples=200)
def test_any_walk_is_that_of_numbers_with_a_significand_of_16_bits(
    compiled: bool, walk: tuple[np.ndarray, list[tuple[float, list[float]]]]
) -> None:
    bits, steps = walk
    values = moving(torch.from_numpy(bits.copy()).view(torch.bfloat16)[None], compiled)
    wanted = bf16_values(bits)
    for size, gradient in steps:
        values.step(ROWS, torch.tensor([size]), torch.tensor([gradient]))
        sign = np.array([0 if np.isnan(g) or g == 0 else np.sign(g) for g in gradient], np.float32)
        wanted = rounded(np.float32(wanted) - np.float32(size) * sign, 16).astype(np.float32)
        np.testing.assert_array_equal(held(values, (1, len(bits)))[0], wanted)
        found = values.nearest.float().numpy()[0]
        np.testing.assert_array_equal(found, rounded(wanted, 8).astype(np.float32))


@given(walk=walks(), narrow=st.booleans())
@settings(max_examples=200)
def test_compiled_and_plain_passes_agree_to_the_bit(
    walk: tuple[np.ndarray, list[tuple[float, list[float]]]], narrow: bool
) -> None:
    bits, steps = walk
    both = [moving(torch.from_numpy(bits.copy()).view(torch.bfloat16)[None], compiled) for compiled in (True, False)]
    for size, gradient in steps:
        arriving = torch.tensor([gradient], dtype=torch.bfloat16 if narrow else torch.float32)
        for values in both:
            values.step(ROWS, torch.tensor([size]), arriving)
        one, other = (held(values, (1, len(bits))).view(np.uint32) for values in both)
        np.testing.assert_array_equal(one, other)
        assert torch.equal(both[0].nearest.view(torch.int16), both[1].nearest.view(torch.int16))


def test_every_bfloat16_is_held_as_it_is_until_it_moves() -> None:
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80].reshape(1, -1)
    for compiled in (True, False):
        values = moving(torch.from_numpy(bits.copy()).view(torch.bfloat16), compiled)
        values.step(ROWS, torch.tensor([0.5]), torch.full(bits.shape, torch.nan))
        values.step(ROWS, torch.tensor([0.5]), torch.zeros(bits.shape))
        values.step(ROWS, torch.tensor([0.0]), torch.ones(bits.shape))
        np.testing.assert_array_equal(values.nearest.view(torch.int16).numpy().view(np.uint16), bits)
        np.testing.assert_array_equal(held(values, bits.shape), bf16_values(bits))


@pytest.mark.parametrize("compiled", PATHS)
def test_small_steps_add_up_where_bfloat16_alone_loses_them(compiled: bool) -> None:
    """A thousand steps of a ten-thousandth of a weight: in bfloat16 nothing moves, in float32 a tenth."""
    w_RI = torch.linspace(1.0, 1.99, 64).bfloat16()[None]
    plain, wide = w_RI.clone(), w_RI.float()
    values = moving(w_RI.clone(), compiled)
    for _ in range(1000):
        plain -= torch.full_like(plain, 1e-4)
        wide -= 1e-4
        values.step(ROWS, torch.tensor([1e-4]), torch.ones(1, 64))
    assert torch.equal(plain, w_RI)
    walked = w_RI.float().numpy() - held(values, (1, 64))
    # A step is rounded to a multiple of 2^-15: half a unit, no more, is lost or won each time.
    np.testing.assert_allclose(walked, 0.1, atol=1000 * 2**-16)
    assert (w_RI.float() - values.nearest.float() > 0.08).all()
    torch.testing.assert_close(torch.from_numpy(held(values, (1, 64))), wide, atol=1000 * 2**-16, rtol=0)


@pytest.mark.parametrize("compiled", PATHS)
def test_steps_to_and_fro_bring_a_weight_back(compiled: bool) -> None:
    w_RI = random_w((4, 33))
    values = moving(w_RI.clone(), compiled)
    gradient_RI = random_w((4, 33), 1, torch.float32)
    for _ in range(50):
        values.step(ROWS, torch.full((4,), 2.0**-9), gradient_RI)
        values.step(ROWS, torch.full((4,), 2.0**-9), -gradient_RI)
    # Exact where both ends lie in one binade; a weight that leaves its own, or is small, comes back to within a unit.
    np.testing.assert_allclose(held(values, (4, 33)), w_RI.float().numpy(), atol=50 * 2**-15)
    assert (values.nearest == w_RI).float().mean() > 0.8


def bytes_of(holder: object) -> int:
    """Bytes of the tensors that an object holds."""
    return sum(value.nbytes for value in vars(holder).values() if isinstance(value, torch.Tensor))


def test_values_take_three_bytes_a_weight_or_four() -> None:
    assert bytes_of(Moving(random_w((4, 32)))) == 3 * 128
    assert bytes_of(Moving(random_w((4, 32), dtype=torch.float16))) == 4 * 128
    assert bytes_of(Moving(random_w((4, 32), dtype=torch.float32))) == 4 * 128


def test_bfloat16_stays_in_the_tensor_it_came_in() -> None:
    w_RI = random_w((4, 32))
    values = Moving(w_RI)
    assert values.nearest.data_ptr() == w_RI.data_ptr()
    values.step(slice(1, 2), torch.tensor([0.5]), torch.ones(1, 32))
    start_RI = random_w((4, 32))
    assert torch.equal(w_RI[[0, 2, 3]], start_RI[[0, 2, 3]])
    assert not torch.equal(w_RI[1], start_RI[1])


def test_signs_of_what_is_no_number_are_zero() -> None:
    found = signs(torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -2.0]))
    assert found.tolist() == [0, 1, -1, 0, 0, 1, -1]
    assert found.dtype == torch.float32
    assert signs(torch.tensor([torch.nan, -torch.inf], dtype=torch.bfloat16)).tolist() == [0, -1]


# -- stacks -----------------------------------------------------------------------------------------------------------


def values_of(stack: HealedStack, dtype: Any = torch.float32) -> Any:
    experts, rows, columns = stack.shape
    out_RI = torch.empty(experts * rows, columns, dtype=dtype)
    stack.values_into(0, out_RI)
    return out_RI.view(stack.shape)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_step_is_a_part_of_each_experts_own_root_mean_square(dtype: Any) -> None:
    w_EOI = random_w((3, 8, 32), dtype=dtype) * torch.tensor([1.0, 10.0, 0.1])[:, None, None].to(dtype)
    start = w_EOI.double().numpy()
    gradient_EOI = random_w((3, 8, 32), 1, torch.float32).numpy()
    stack = HealedStack(w_EOI.clone(), moves=True)
    stack.lr = 0.01
    stack.update(0, torch.from_numpy(gradient_EOI.reshape(24, 32)))
    step_E = 0.01 * np.sqrt(np.square(start).mean((1, 2)))
    wanted = start - np.sign(gradient_EOI) * step_E[:, None, None]
    np.testing.assert_allclose(values_of(stack).numpy(), wanted, rtol=2**-15, atol=1e-7)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_cut_into_tiles_in_any_order_it_is_the_same_step(dtype: Any) -> None:
    gradient_RI = random_w((24, 32), 1, torch.float32)
    whole, tiled = (HealedStack(random_w((3, 8, 32), dtype=dtype), moves=True) for _ in range(2))
    for lr in (0.02, 0.013, 0.001):
        whole.lr = tiled.lr = lr
        expected_RI, before_RI = values_of(whole).view(24, 32), torch.full((24, 32), torch.nan)
        whole.update(0, gradient_RI)
        for first in (15, 0, 5, 10, 20):  # across experts too
            tiled.update(first, gradient_RI[first : first + 5], before_RI[first : first + 5])
        assert torch.equal(before_RI, expected_RI)
    assert torch.equal(values_of(whole), values_of(tiled))
    assert torch.equal(whole.stored(slice(None)), tiled.stored(slice(None)))
    part = torch.empty(7, 32)
    whole.values_into(6, part)
    assert torch.equal(part, values_of(whole).view(24, 32)[6:13])


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_once_settled_the_values_are_those_that_are_stored(dtype: Any) -> None:
    stack = HealedStack(random_w((3, 8, 32), dtype=dtype), moves=True)
    stack.lr = 0.003
    for seed in range(5):
        stack.update(0, random_w((24, 32), seed, torch.float32))
    before = values_of(stack)
    nearest = values_of(stack, torch.bfloat16)
    stack.settle()
    stored = stack.stored(slice(None))
    assert stored.dtype == dtype
    assert torch.equal(values_of(stack), stored.float())
    torch.testing.assert_close(stored.float(), before, rtol=2.0**-8, atol=0)
    if dtype == torch.bfloat16:
        assert torch.equal(stored, nearest)
        assert not torch.equal(stored.float(), before)
        assert bytes_of(stack) == 2 * 768 + 4 * 3  # a root mean square for each expert
    assert torch.equal(stack.stored(1), stored[1])
    stack.lr = 0.5
    stack.update(0, random_w((24, 32), 9, torch.float32))
    assert torch.equal(stack.stored(slice(None)), stored)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_stack_never_changes_but_by_its_steps(dtype: Any) -> None:
    """In particular not while it is measured: float32 weights are held where they are."""
    stack = HealedStack(random_w((3, 8, 32), dtype=dtype), moves=True)
    assert torch.equal(stack.stored(slice(None)), random_w((3, 8, 32), dtype=dtype))
    assert torch.equal(values_of(stack), random_w((3, 8, 32), dtype=dtype).float())
    stack.update(0, random_w((24, 32), 1, torch.float32))  # lr is 0
    assert torch.equal(values_of(stack), random_w((3, 8, 32), dtype=dtype).float())


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_stack_that_does_not_move_keeps_its_bits_and_costs_nothing(dtype: Any) -> None:
    w_EOI = random_w((3, 8, 32), dtype=dtype)
    stack = HealedStack(w_EOI.clone(), moves=False)
    stack.lr = 0.5
    stack.update(0, random_w((24, 32), 1, torch.float32))
    assert torch.equal(values_of(stack), w_EOI.float())
    stack.settle()
    assert torch.equal(stack.stored(slice(None)), w_EOI)
    assert bytes_of(stack) == w_EOI.nbytes


def test_gradients_that_are_no_numbers_move_nothing_and_harm_nothing() -> None:
    stack = HealedStack(random_w((3, 8, 32)), moves=True)
    stack.lr = 0.01
    gradient_RI = torch.full((24, 32), torch.nan)
    gradient_RI[3, 4] = torch.inf
    stack.update(0, gradient_RI)
    moved = values_of(stack) != random_w((3, 8, 32)).float()
    assert moved.nonzero().tolist() == [[0, 3, 4]]
    assert torch.isfinite(values_of(stack)).all()


def test_weights_that_are_all_zero_stay_so() -> None:
    stack = HealedStack(torch.zeros(2, 4, 32, dtype=torch.bfloat16), moves=True)
    stack.lr = 0.02
    stack.update(0, torch.ones(8, 32))
    assert not values_of(stack).any()
