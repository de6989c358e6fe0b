"""Tuned experts and linear layers against plain autograd: whole tensors in float64, one token and expert at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shardxform.formats.scheme import Grid

torch = pytest.importorskip("torch")

from shardxform.tuning import modules, stacked  # noqa: E402
from shardxform.tuning.elementwise import ONE, Pace  # noqa: E402
from shardxform.tuning.modules import TunedExperts, TunedLinear, route  # noqa: E402
from shardxform.tuning.workers import Workers  # noqa: E402

pytestmark = pytest.mark.oracle

EXPERTS, INNER, HIDDEN, TOKENS, TOP = 6, 32, 64, 40, 2
CLIPS = (0.5, 1.2)
STEPS = 6


class Oracle:
    """One stack of weights; offsets and clips are ordinary parameters."""

    def __init__(self, w_EOI: Any, start_EOG: Any, grid: Grid) -> None:
        self.w, self.start, self.grid = w_EOI.double(), start_EOG.double(), grid
        self.v = torch.zeros_like(self.w, requires_grad=True)
        self.clip = torch.ones_like(self.start, requires_grad=True)

    def weight(self) -> Any:
        exact = self.start * self.clip
        scale = exact + (exact.detach().to(torch.bfloat16).to(torch.float16).double() - exact.detach())
        scale = scale.repeat_interleave(self.grid.group_size, dim=2)
        x = self.w / scale + self.v
        q = x + (torch.round(x.detach()) - x.detach())
        return scale * torch.clamp(q, -self.grid.zero_code, self.grid.zero_code - 1)

    def step(self, pace: Pace) -> None:
        with torch.no_grad():
            self.v -= pace.offset / ONE * torch.sign(self.v.grad)
            self.clip -= pace.clip * torch.sign(self.clip.grad)
            self.clip.clamp_(pace.low, pace.high)
        self.v.grad = self.clip.grad = None


def paces() -> list[Pace]:
    return [Pace(4.0 * round(ONE / 4 * 0.2 * (1 - t / STEPS)), 0.03125 * (1 - t / 8), *CLIPS) for t in range(STEPS)]


def gate(between: Any) -> Any:
    first, second = between.chunk(2, dim=-1)
    return torch.nn.functional.silu(first) * second


def stacks(grid: Grid, workers: Workers) -> tuple[stacked.StackedWeight, stacked.StackedWeight]:
    generator = torch.Generator().manual_seed(1)
    gate_up = (0.3 * torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator)).bfloat16()
    down = (0.3 * torch.randn(EXPERTS, HIDDEN, INNER, generator=generator)).bfloat16()
    return stacked.stacked_weight(gate_up, grid, workers, "gate_up"), stacked.stacked_weight(
        down, grid, workers, "down"
    )


def oracle_of(weight: stacked.StackedWeight) -> Oracle:
    experts, rows, _ = weight.shape
    return Oracle(weight._w_RI.view(weight.shape), weight._start_RG.view(experts, rows, -1), weight.grid)


def inputs(seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Hidden states, routes that never lead to the last expert, router weights, target."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.rand(TOKENS, EXPERTS - 1, generator=generator).topk(TOP).indices
    return hidden, index, torch.rand(TOKENS, TOP, generator=generator), torch.randn(TOKENS, HIDDEN, generator=generator)


def naive(up: Oracle, down: Oracle, hidden: Any, index: Any, weight: Any) -> Any:
    ups, downs = up.weight(), down.weight()
    rows = []
    for t in range(TOKENS):
        choices = [weight[t, k] * downs[e] @ gate(ups[e] @ hidden[t]) for k, e in enumerate(index[t].tolist())]
        rows.append(torch.stack(choices).sum(0))
    return torch.stack(rows)


def assert_same_state(weight: stacked.StackedWeight, oracle: Oracle) -> None:
    """But for gradients so near to zero that float32 and float64 do not agree on their sign."""
    offset = (weight._v_RI & -4).double().view(weight.shape) / ONE
    assert float((offset != oracle.v).double().mean()) < 0.002
    clip = weight._clip_RG.double().view(oracle.clip.shape)
    assert float((clip != oracle.clip).double().mean()) < 0.002


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("engine", ["compiled", "torch", "grouped"])
def test_experts_move_as_plain_autograd_moves_them(bits: Any, engine: str) -> None:
    with Workers(2) as workers:
        up, down = stacks(Grid(bits=bits, group_size=32, search=True), workers)
        module = TunedExperts(up, down, gate, workers)
        module.grouped = engine == "grouped"
        up._compiled = down._compiled = up._compiled and engine == "compiled"
        oracles = oracle_of(up), oracle_of(down)
        for turn, pace in enumerate(paces()):
            hidden, index, weight, target = inputs(turn)
            ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            theirs = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
            up.pace = down.pace = pace
            out = module(ours[0], index, ours[1])
            expected = naive(*oracles, theirs[0], index, theirs[1])
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
            ((out - target) ** 2).sum().backward()
            ((expected - target) ** 2).sum().backward()
            for found, wanted in zip(ours, theirs, strict=True):
                torch.testing.assert_close(found.grad.double(), wanted.grad, rtol=1e-3, atol=1e-2)
            for tuned, oracle in zip((up, down), oracles, strict=True):
                oracle.step(pace)
                assert_same_state(tuned, oracle)
        assert module.reached_E == [True] * (EXPERTS - 1) + [False]
    last = up._v_RI.view(up.shape)[-1]
    assert not last.any()
    assert bool((down._clip_RG.view(EXPERTS, -1)[-1] == 1).all())
    assert int((up._v_RI != 0).sum()) > 0.9 * up._v_RI.numel() * (EXPERTS - 1) / EXPERTS
    assert len(up._clip_RG.unique()) > 4


@pytest.mark.parametrize("engine", ["compiled", "grouped"])
def test_reach_is_that_of_the_expert_of_a_token(engine: str) -> None:
    """Over all calls; numbers from `EXPERTS` on mean no expert."""
    with Workers(1) as workers:
        module = TunedExperts(*stacks(Grid(group_size=32), workers), gate, workers)
        module.grouped = engine == "grouped"
        assert module.reach == 1.0
        hidden, _, weight, _ = inputs()
        first, second = torch.full((2, TOKENS, TOP), EXPERTS)
        first[:, 0], first[: TOKENS // 4, 1] = 0, 1
        module(hidden, first, weight)
        assert module.reach == pytest.approx((1 * 1 + 1 / 4 * 1 / 4) / (1 + 1 / 4))
        module(hidden, second, weight)
        assert module.reach == pytest.approx((1 / 2 * 1 / 2 + 1 / 8 * 1 / 8) / (1 / 2 + 1 / 8))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_moves_as_plain_autograd_moves_it(bias: bool) -> None:
    grid = Grid(group_size=64)
    generator = torch.Generator().manual_seed(3)
    w = (0.3 * torch.randn(1, 160, 64, generator=generator)).bfloat16()
    added = torch.randn(160, generator=generator) if bias else None
    with Workers(2) as workers:
        weight = stacked.stacked_weight(w, grid, workers, "w")
        module, oracle = TunedLinear(weight, workers, added), oracle_of(weight)
        for pace in paces():
            x = torch.randn(3, 7, 64, generator=generator)
            target = torch.randn(3, 7, 160, generator=generator)
            ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
            weight.pace = pace
            out = module(ours)
            expected = theirs @ oracle.weight()[0].T + (0 if added is None else added)
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
            ((out - target) ** 2).sum().backward()
            ((expected - target) ** 2).sum().backward()
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)
            oracle.step(pace)
            assert_same_state(weight, oracle)


def test_a_linear_layer_is_tuned_though_its_input_wants_no_gradient() -> None:
    with Workers(1) as workers:
        weight = stacked.stacked_weight(torch.randn(1, 32, 32), Grid(group_size=32), workers, "w")
        weight.pace = Pace(400.0, 0.0, 1.0, 1.0)
        TunedLinear(weight, workers)(torch.randn(5, 32)).sum().backward()
    assert int((weight._v_RI != 0).sum()) > 900


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype: Any) -> None:
    results = []
    for threads in (1, 2, 5):
        with Workers(threads) as workers:
            up, down = stacks(Grid(group_size=32, search=True), workers)
            single = stacked.stacked_weight(
                torch.linspace(-1, 1, 300 * 64).view(1, 300, 64), Grid(group_size=64), workers, "w"
            )
            experts, linear = TunedExperts(up, down, gate, workers), TunedLinear(single, workers)
            for turn, pace in enumerate(paces()):
                hidden, index, weight, _ = inputs(turn)
                hidden = hidden.to(dtype).requires_grad_()
                up.pace = down.pace = single.pace = pace
                out = experts(hidden, index, weight.requires_grad_())
                (out.float().square().sum() + linear(hidden).float().square().sum()).backward()
            tensors = [out.detach(), hidden.grad, weight.grad, up._v_RI, up._clip_RG, down._v_RI, single._v_RI]
            results.append([tensor.clone() for tensor in tensors])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_bfloat16_hidden_states_give_nearly_the_same() -> None:
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        with Workers(1) as workers:
            module = TunedExperts(*stacks(Grid(group_size=32), workers), gate, workers)
            hidden, index, weight, _ = inputs()
            outs.append(module(hidden.to(dtype), index, weight.to(dtype)))
    assert outs[1].dtype == torch.bfloat16
    error = (outs[1].float() - outs[0]).square().mean() / outs[0].square().mean()
    assert float(error.detach()) < 1e-4


def test_the_forward_pass_stores_its_inputs_and_nothing_else() -> None:
    stored: list[Any] = []

    def pack(tensor: Any) -> Any:
        stored.append(tensor)
        return tensor

    with Workers(1) as workers, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module = TunedExperts(*stacks(Grid(group_size=32), workers), gate, workers)
        hidden, index, weight, _ = inputs()
        module(hidden.requires_grad_(), index, weight)
    assert {tensor.data_ptr() for tensor in stored} == {tensor.data_ptr() for tensor in (hidden, index, weight)}


def test_slots_are_sorted_by_expert_and_numbers_beyond_are_no_expert() -> None:
    routing = route(torch.tensor([[2, 0], [0, 4], [2, 4]]), 4)
    assert routing.bounds == [0, 2, 2, 4, 4]
    assert routing.reached == [0, 2]
    np.testing.assert_array_equal(routing.slot_S[routing.of(2)], [0, 4])
    np.testing.assert_array_equal(routing.token_S[routing.of(0)], [0, 1])


@pytest.mark.parametrize(("tokens", "size"), [(1, 8), (8, 8), (9, 16), (100, 104), (129, 144), (1000, 1024)])
def test_few_shapes_of_16_bit_products(tokens: int, size: int) -> None:
    some = torch.arange(tokens)
    assert modules._size(some, torch.zeros(1, dtype=torch.bfloat16)) == size
    assert modules._size(some, torch.zeros(1)) == tokens
    rows = torch.arange(2.0, 2 * tokens + 2).view(tokens, 2)
    padded = modules._taken(rows, some, size)
    assert torch.equal(padded[:tokens], rows)
    assert torch.equal(padded[tokens:], torch.zeros(size - tokens, 2))
