"""How fast this machine is at running and tuning the model, found out in seconds on the model's own shapes.

Runs the model's own modules around the experts, one expert and one expert being tuned, on random numbers, with
whatever else the machine is doing. What moves and rounds weights is measured by `timing`. Nothing is written.
"""

# E: experts, n: tokens of one expert, H: hidden size, I: intermediate size, T: tokens.

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn

from shardxform.checkpoint.table import Checkpoint
from shardxform.compress.costs import Costs
from shardxform.formats.grid import Grid
from shardxform.forward.experts import experts_module
from shardxform.forward.skeleton import Block, Skeleton
from shardxform.forward.weights import Precision, Weights
from shardxform.tuning.modules import TunedExperts
from shardxform.tuning.stacked import stacked_weight
from shardxform.tuning.workers import Workers

__all__ = ["measure_model"]

_TOKENS: Final = 128
_MORE_TOKENS: Final = 512  # of small models, whose time goes into calls rather than numbers
_SMALL: Final = 512  # channels
_FEW, _MANY = 4, 68  # tokens of one expert: what their difference takes is the tokens', the rest is the expert's
_TUNED: Final = 2  # experts that are tuned for the measurement
_EXPERTS: Final = 8
_HEAD_ROWS: Final = 8192
_LOGITS: Final = 1 << 24  # as `evaluation` has it: how many are held at once
_DECODING: Final = 5.0  # of a quantized weight, in conversions of a 16-bit one
_AGAIN: Final = 4 / 3  # what is forgotten and computed again is a third of forward and backward
_LEAST: Final = 1e-12


def measure_model(
    source: Checkpoint, precision: Precision, tuned_in: Precision | None, grid: Grid, costs: Costs
) -> Costs:
    """Find out what running the model costs; what is not measured stays as it is in `costs`.

    Args:
        source: whose config says what is computed.
        precision: device and type of the computation.
        tuned_in: the same of tuning; None measures none.
        grid: what weights are rounded to.
        costs: known so far.

    Raises:
        FamilyError: transformers does not run the model.

    """
    with _RandomWeights(source, precision) as weights, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        skeleton = Skeleton(weights)
        found = {"tokens": _around(skeleton, _forward)}
        found |= _expert(skeleton, precision)
        found |= {"headed": _head(skeleton, precision)}
        if tuned_in is not None:
            with _RandomWeights(source, tuned_in) as others:
                skeleton = Skeleton(others)
                found |= {"step_tokens": _around(skeleton, _step)}
                if _width(skeleton):
                    found |= _tuned_experts(skeleton, tuned_in, grid)
    return replace(costs, **{name: max(value, _LEAST) for name, value in found.items()})


class _RandomWeights(Weights):
    """What a block is loaded from; nothing is read: the numbers do not matter here, and may have to come from a hub."""

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random numbers, small enough to compute with, in the place of a tensor."""
        shape = self.ref(name).spec.shape
        return torch.empty(shape, dtype=dtype or self.precision.dtype, device=self.precision.device).normal_(0, 0.02)


# -- around the experts -----------------------------------------------------------------------------------------------


def _around(skeleton: Skeleton, measure: Callable[[Block, torch.Tensor, Precision], float]) -> float:
    """Seconds of a token in a block without its experts: one of each kind, weighed by how many there are."""
    kinds: dict[tuple[object, bool], list[int]] = {}
    names = skeleton.layout.text.get("layer_types")
    for layer in range(skeleton.num_blocks):
        kind = names[layer] if isinstance(names, list) and layer < len(names) else ""
        kinds.setdefault((kind, layer in skeleton.layout.moe_layers), []).append(layer)
    count = _TOKENS if skeleton.hidden_size > _SMALL else _MORE_TOKENS
    precision = skeleton.weights.precision
    seconds = 0.0
    for layers in kinds.values():
        x_BTH = torch.randn(1, count, skeleton.hidden_size, device=precision.device).to(precision.dtype)
        with skeleton.block(layers[0]) as block, _without_experts(block):
            seconds += measure(block, x_BTH, precision) * len(layers) / skeleton.num_blocks
    return seconds / count


def _forward(block: Block, x_BTH: torch.Tensor, precision: Precision) -> float:
    """Seconds of a forward pass on all threads."""
    with torch.no_grad():
        return _time(lambda: block(x_BTH), precision, turns=1)


def _step(block: Block, x_BTH: torch.Tensor, precision: Precision) -> float:
    """Seconds of a step on one thread: forward, backward, forward again."""
    block.module.requires_grad_(True)
    x_BTH.requires_grad_()
    with _one_thread():
        return _AGAIN * _time(lambda: _back(block(x_BTH)), precision, turns=1)


def _back(out: torch.Tensor) -> None:
    out.float().square().mean().backward()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _without_experts(block: Block) -> Iterator[None]:
    module: Any = experts_module(block.module)
    if module is None:
        yield
        return
    module.forward = lambda hidden, *_: torch.zeros_like(hidden)
    try:
        yield
    finally:
        del module.forward


# -- experts ----------------------------------------------------------------------------------------------------------


def _expert(skeleton: Skeleton, precision: Precision) -> dict[str, float]:
    """One expert: made ready, and its tokens multiplied."""
    width = _width(skeleton)
    if not width:
        return {}
    up_EJH, down_EHI = _matrices(skeleton, precision, _EXPERTS)

    def run(count: int) -> float:
        x_nH = torch.randn(count, skeleton.hidden_size, device=precision.device).to(precision.dtype)

        def all_in_turn() -> None:  # as a block does: none is still in the processor's cache
            for up_JH, down_HI in zip(up_EJH, down_EHI, strict=True):
                inner_nI = _gate(nn.functional.linear(x_nH, up_JH.to(precision.dtype)))
                nn.functional.linear(inner_nI, down_HI.to(precision.dtype)).float().norm(dim=-1)

        return _time(all_in_turn, precision) / _EXPERTS

    with torch.no_grad():
        call, pair = _line(run(_FEW), run(_MANY))
    return {"calls": call, "pairs": pair, "decoded": _DECODING * call / (up_EJH[0].numel() + down_EHI[0].numel())}


def _tuned_experts(skeleton: Skeleton, precision: Precision, grid: Grid) -> dict[str, float]:
    """A few experts being tuned, with the code that tunes them."""
    stacks = _matrices(skeleton, precision, _TUNED)
    with Workers(torch.get_num_threads()) as workers:
        stacked_weight(stacks[1][:, :32].contiguous(), grid, workers, "timing")  # compiles
        started, ready = _clock(lambda: [stacked_weight(stack, grid, workers, "timing") for stack in stacks], precision)
        module = TunedExperts(ready[0], ready[1], _gate, workers)

        def run(count: int) -> float:
            total = count * _TUNED
            x_TH = torch.randn(total, skeleton.hidden_size, device=precision.device).to(precision.dtype)
            index_T1 = torch.arange(total, device=precision.device)[:, None] % _TUNED
            weight_T1 = torch.full((total, 1), 0.5, dtype=precision.dtype, device=precision.device)
            x_TH.requires_grad_()
            return _time(lambda: _back(module(x_TH, index_T1, weight_T1)), precision) / _TUNED

        call, pair = _line(run(_FEW), run(_MANY))
    return {"step_calls": call, "step_pairs": pair, "started": started / sum(stack.numel() for stack in stacks)}


def _gate(between: torch.Tensor) -> torch.Tensor:
    gate, up = between.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def _width(skeleton: Skeleton) -> int:
    width = skeleton.layout.text.get("moe_intermediate_size")
    return width if type(width) is int else 0


def _matrices(skeleton: Skeleton, precision: Precision, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random experts in bfloat16: gate over up projection [E, 2I, H], and down projection [E, H, I]."""
    width, hidden = _width(skeleton), skeleton.hidden_size
    shapes = (experts, 2 * width, hidden), (experts, hidden, width)
    up, down = ((0.02 * torch.randn(shape, device=precision.device)).bfloat16() for shape in shapes)
    return up, down


# -- the rest ---------------------------------------------------------------------------------------------------------


def _head(skeleton: Skeleton, precision: Precision) -> float:
    """Seconds of a token in the output head, by a tile of its rows and as many tokens as go through it at once."""
    rows, tokens = min(_HEAD_ROWS, skeleton.vocab_size), max(1, min(_TOKENS, _LOGITS // skeleton.vocab_size))
    w_VH = torch.randn(rows, skeleton.hidden_size, device=precision.device).bfloat16()
    x_TH = torch.randn(tokens, skeleton.hidden_size, device=precision.device)

    def one() -> torch.Tensor:
        logp_TV = (x_TH @ w_VH.float().T).log_softmax(-1)
        return (logp_TV.exp() * logp_TV).sum(-1)

    return _time(one, precision) / tokens * skeleton.vocab_size / rows


def _line(few: float, many: float) -> tuple[float, float]:
    """Seconds of an expert without tokens, and of a token."""
    slope = max(0.0, (many - few) / (_MANY - _FEW))
    return max(0.0, few - slope * _FEW), slope


def _time(call: Callable[[], object], precision: Precision, turns: int = 2) -> float:
    """Seconds of the fastest of some calls, after one that is not counted."""
    call()
    return min(_clock(call, precision)[0] for _ in range(turns))


def _clock(call: Callable[[], Any], precision: Precision) -> tuple[float, Any]:
    _wait(precision)
    began = time.perf_counter()
    found = call()
    _wait(precision)
    return time.perf_counter() - began, found


def _wait(precision: Precision) -> None:
    if precision.device.type == "cuda":
        torch.cuda.synchronize(precision.device)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As the tuner runs what it does not tune."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
