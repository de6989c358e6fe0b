"""The routed experts on a device with threads of its own: a few large operations for many experts at a time.

The same functions as the loops of `experts`, with grouped matrix products over the slots sorted by expert; no loop per
expert. Weights exist for a chunk of experts at a time. Sums over a token's experts go by their rank. Results are
gathered into place rather than scattered, which GPUs do in a fixed order by sorting alone.
"""

# T: tokens, K: experts of a token, S: slots (T * K, sorted by expert), H: hidden size, J: intermediate size, C: experts
# of a chunk.

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch.nn.functional import grouped_mm

from shardxform.base.constants import GROUPED_WEIGHTS

if TYPE_CHECKING:
    from shardxform.tuning.routing import Routing, StackedExperts
    from shardxform.tuning.stacked import Tunable

__all__ = ["multiply", "pass_back"]

_ALIGNMENT: Final = 16


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Experts `first` to `last`, their slots, and where each one's end within them."""

    first: int
    last: int
    slots: slice
    ends: list[int]
    ends_C: torch.Tensor

    @property
    def runs(self) -> list[slice]:
        """Each expert's slots within the chunk's."""
        return [slice(*pair) for pair in itertools.pairwise([0, *self.ends])]

    def by_expert(self, a_SK: torch.Tensor, b_CKN: torch.Tensor) -> torch.Tensor:
        """Each expert's rows by its matrix [S, N]."""
        if _fits(a_SK) and _fits(b_CKN):
            return grouped_mm(a_SK, b_CKN, offs=self.ends_C)
        return torch.cat([a_SK[run] @ b_KN for run, b_KN in zip(self.runs, b_CKN, strict=True)])

    def added(self, y_SO: torch.Tensor, bias_EO: torch.Tensor | None) -> torch.Tensor:
        """Each expert's rows and its bias, if there are biases."""
        return y_SO if bias_EO is None else y_SO + self.spread(bias_EO).to(y_SO.dtype)

    def spread(self, values_EO: torch.Tensor) -> torch.Tensor:
        """Each expert's row of `values` at all of its slots."""
        counts_C = torch.tensor([run.stop - run.start for run in self.runs], device=values_EO.device)
        slots = self.slots.stop - self.slots.start
        return values_EO[self.first : self.last].repeat_interleave(counts_C, dim=0, output_size=slots)

    def over_slots(self, a_SM: torch.Tensor, b_SN: torch.Tensor) -> torch.Tensor:
        """Sums over each expert's slots of products of `a` and `b` [C, M, N]; zero without a slot."""
        if not (_fits(a_SM) and _fits(b_SN)):
            return torch.stack([a_SM[run].T @ b_SN[run] for run in self.runs])
        out_CMN = grouped_mm(a_SM.T, b_SN, offs=self.ends_C)
        for expert, run in enumerate(self.runs):
            if run.start == run.stop:
                out_CMN[expert] = 0  # on some GPUs it is not: pytorch issue 172439
        return out_CMN


def _fits(x: torch.Tensor) -> bool:
    """Whether rows, or columns where these are contiguous, are of whole 16 bytes, as GPUs' grouped products want."""
    return max(x.stride()[-2:]) * x.element_size() % _ALIGNMENT == 0


def multiply(
    experts: StackedExperts, hidden_TH: torch.Tensor, weight_TK: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """As `TunedExperts.multiply`."""
    out_SH = hidden_TH.new_zeros(weight_TK.numel(), hidden_TH.shape[1])  # no expert's slots give nothing
    for chunk in _chunks(experts, routing, hidden_TH.device):
        x_SH = hidden_TH[routing.token_S[chunk.slots]]
        up_CJH, down_CHJ = _values(experts.gate_up, chunk, x_SH.dtype), _values(experts.down, chunk, x_SH.dtype)
        up_bias_EO, down_bias_EH = _biases(experts)
        inner_SJ = experts.gate(chunk.added(chunk.by_expert(x_SH, up_CJH.mT), up_bias_EO))
        out_SH[chunk.slots] = chunk.added(chunk.by_expert(inner_SJ, down_CHJ.mT), down_bias_EH)
    out_TKH = out_SH[routing.places].float() * weight_TK[..., None].float()
    return out_TKH.sum(1).to(hidden_TH.dtype)


def pass_back(
    experts: StackedExperts,
    inputs: tuple[torch.Tensor, torch.Tensor],
    routing: Routing,
    gradient_TH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `TunedExperts.pass_back`; `inputs` are the hidden states and the router's weights."""
    hidden_TH, weight_TK = inputs
    back_SH = hidden_TH.new_zeros(weight_TK.numel(), hidden_TH.shape[1])
    router_S, flat_S = torch.zeros_like(weight_TK).reshape(-1), weight_TK.reshape(-1)
    place_TK = routing.places
    for chunk in _chunks(experts, routing, hidden_TH.device):
        token_S, slot_S = routing.token_S[chunk.slots], routing.slot_S[chunk.slots]
        arriving = gradient_TH[token_S], flat_S[slot_S, None]
        back_SH[chunk.slots], router_S[chunk.slots] = _pass_back_chunk(experts, chunk, hidden_TH[token_S], arriving)
    return back_SH[place_TK].float().sum(1).to(hidden_TH.dtype), router_S[place_TK]


def _pass_back_chunk(
    experts: StackedExperts, chunk: _Chunk, x_SH: torch.Tensor, arriving: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    gradient_SH, weight_S1 = arriving[0], arriving[1].to(x_SH.dtype)
    up_CJH, down_CHJ = _values(experts.gate_up, chunk, x_SH.dtype), _values(experts.down, chunk, x_SH.dtype)
    up_bias_EO, down_bias_EH = _biases(experts)
    with torch.enable_grad():
        between_SJ = chunk.added(chunk.by_expert(x_SH, up_CJH.mT), up_bias_EO).detach().requires_grad_()
        inner_SJ = experts.gate(between_SJ)
    back_SJ = chunk.by_expert(gradient_SH, down_CHJ)
    router_S = (back_SJ.float() * inner_SJ.detach().float()).sum(1)
    if down_bias_EH is not None:
        router_S += (gradient_SH.float() * chunk.spread(down_bias_EH).float()).sum(1)
    (pre_SJ,) = torch.autograd.grad(inner_SJ, between_SJ, back_SJ * weight_S1)
    out_SH = chunk.by_expert(pre_SJ, up_CJH)
    _update(experts.down, chunk, gradient_SH * weight_S1, inner_SJ.detach())
    _update(experts.gate_up, chunk, pre_SJ, x_SH)
    return out_SH, router_S


def _biases(experts: StackedExperts) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (experts.biases.gate_up_EO, experts.biases.down_EH) if experts.biases else (None, None)


def _chunks(experts: StackedExperts, routing: Routing, device: torch.device) -> Iterator[_Chunk]:
    """Runs of experts of bounded size, those without tokens left out."""
    count, rows, columns = experts.gate_up.shape
    step = max(1, GROUPED_WEIGHTS // (rows * columns))
    for first in range(0, count, step):
        last = min(first + step, count)
        slots = slice(routing.bounds[first], routing.bounds[last])
        if slots.stop > slots.start:
            ends = [end - slots.start for end in routing.bounds[first + 1 : last + 1]]
            yield _Chunk(first, last, slots, ends, torch.tensor(ends, dtype=torch.int32, device=device))


def _values(weight: Tunable, chunk: _Chunk, dtype: torch.dtype) -> torch.Tensor:
    _, rows, columns = weight.shape
    w_CRI = torch.empty(chunk.last - chunk.first, rows, columns, dtype=dtype, device=weight.device)
    weight.values_into(chunk.first * rows, w_CRI.view(-1, columns))
    return w_CRI


def _update(weight: Tunable, chunk: _Chunk, gradient_SO: torch.Tensor, x_SI: torch.Tensor) -> None:
    if not weight.moves:
        return
    _, rows, columns = weight.shape
    gradient_CRI = chunk.over_slots(gradient_SO, x_SI)
    weight.update(chunk.first * rows, gradient_CRI.reshape(-1, columns))
