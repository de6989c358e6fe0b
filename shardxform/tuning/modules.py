"""Modules whose weights are tuned while gradients pass through them: linear layers, and the routed experts of a layer.

The forward pass stores its inputs, and of few tokens the first product of each expert, but no weights. The backward
pass makes the weights again, in scratch memory, passes gradients on to the inputs and to the router's weights, and
hands each tile of a weight's own gradient to the weight, which moves at once. Work is cut the same way whatever the
number of threads, and sums over experts go by expert number, whoever was first, so the results are the same.
"""

# N: tokens, I: input columns, O: output rows, T: tokens, K: experts of a token, S: slots (T * K, sorted by expert), H:
# hidden size, J: intermediate size, n: tokens of one expert, C: experts of a chunk.

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch.nn.functional import grouped_mm

from shardxform.base.constants import EXPERT_ROWS, GROUPED_WEIGHTS, KEPT_BYTES, LINEAR_ROWS, LINEAR_TOKENS
from shardxform.forward.runtime import PassContext

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shardxform.tuning.stacked import Tunable
    from shardxform.tuning.workers import Workers

__all__ = [
    "ExpertBiases",
    "Gate",
    "Routing",
    "StackedExperts",
    "TunedExperts",
    "TunedLinear",
    "route",
    "slices_of",
]


class TunedLinear(torch.nn.Module):
    """Stands for a `torch.nn.Linear` of the same weight; a bias is added and not tuned."""

    def __init__(self, weight: Tunable, workers: Workers, bias_O: torch.Tensor | None = None) -> None:
        super().__init__()
        _, self.out_features, self.in_features = weight.shape
        self.tuned, self.workers = weight, workers
        self.bias: torch.Tensor | None
        self.register_buffer("bias", bias_O)
        # Without an input that wants a gradient, autograd would not come by to deliver the weight's.
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., I] -> [..., O] in the type of the input."""
        y_NO = _Linear.apply(x.reshape(-1, x.shape[-1]), self._anchor, self)  # type: ignore[no-untyped-call]
        y: torch.Tensor = y_NO.reshape(*x.shape[:-1], y_NO.shape[-1])
        return y if self.bias is None else y + self.bias

    def multiply(self, x_NI: torch.Tensor) -> torch.Tensor:
        """Outputs [N, O]."""
        y_NO = x_NI.new_empty(x_NI.shape[0], self.out_features)
        self._each(lambda run: self._multiply(x_NI, y_NO[:, run], run.start), self.out_features, LINEAR_ROWS)
        return y_NO

    def pass_back(self, x_NI: torch.Tensor, gradient_NO: torch.Tensor, wanted: bool) -> torch.Tensor | None:
        """Tune the weight, and return the gradient of the input if `wanted`."""
        w_OI = x_NI.new_empty(self.out_features, self.in_features) if wanted else None
        self._each(lambda run: self._update(x_NI, gradient_NO, run, w_OI), self.out_features, LINEAR_ROWS)
        if w_OI is None:
            return None
        gradient_NI = torch.empty_like(x_NI)
        self._each(lambda run: torch.mm(gradient_NO[run], w_OI, out=gradient_NI[run]), len(x_NI), LINEAR_TOKENS)
        return gradient_NI

    def _multiply(self, x_NI: torch.Tensor, y_NR: torch.Tensor, first: int) -> None:
        w_RI = self._scratch("values", (y_NR.shape[1], self.in_features), x_NI.dtype)
        self.tuned.values_into(first, w_RI)
        torch.mm(x_NI, w_RI.T, out=y_NR)

    def _update(self, x_NI: torch.Tensor, gradient_NO: torch.Tensor, run: slice, old_OI: torch.Tensor | None) -> None:
        """Move some rows; the values that they had go into `old_OI`."""
        tile_RI = self._scratch("rows", (run.stop - run.start, self.in_features), x_NI.dtype)
        torch.mm(gradient_NO[:, run].T, x_NI, out=tile_RI)
        self.tuned.update(run.start, tile_RI, None if old_OI is None else old_OI[run])

    def _scratch(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        if self.tuned.device.type == "cpu":
            return self.workers.scratch(name, shape, dtype)
        return torch.empty(shape, dtype=dtype, device=self.tuned.device)

    def _each(self, work: Callable[[slice], object], size: int, tile: int) -> None:
        """Do `work` for tiles of `size`: on the threads, or at once where a device has threads of its own."""
        if self.tuned.device.type == "cpu":
            self.workers.each(work, slices_of(size, tile))
        else:
            work(slice(0, size))


class _LinearContext(PassContext, Protocol):
    module: TunedLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _LinearContext, x_NI: torch.Tensor, anchor: torch.Tensor, module: TunedLinear) -> torch.Tensor:  # noqa: ARG004
        ctx.save_for_backward(x_NI)
        ctx.module = module
        return module.multiply(x_NI)

    @staticmethod
    def backward(ctx: _LinearContext, gradient_NO: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (x_NI,) = ctx.saved_tensors
        with torch.no_grad():
            return ctx.module.pass_back(x_NI, gradient_NO, ctx.needs_input_grad[0]), None, None


def slices_of(size: int, tile: int) -> Iterator[slice]:
    """Cut `range(size)` into tiles."""
    for first in range(0, size, tile):
        yield slice(first, min(first + tile, size))


# -- routing -----------------------------------------------------------------------------------------------------------


Gate = Callable[[torch.Tensor], torch.Tensor]
"""[n, 2J] -> [n, J]: what lies between the two weights."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertBiases:
    """What is added to the products of experts, and not tuned: `gate_up_EO` [E, 2J] and `down_EH`."""

    gate_up_EO: torch.Tensor
    down_EH: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StackedExperts:
    """The routed experts of a layer: `gate_up` [E, 2J, H], `down` [E, H, J], what lies between, and biases or None."""

    gate_up: Tunable
    down: Tunable
    gate: Gate
    biases: ExpertBiases | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """Which slots belong to which expert.

    Attributes:
        slot_S: slots in the order of their experts; slot t * K + k is the k-th expert of token t.
        token_S: their tokens.
        bounds: expert e has `slot_S[bounds[e]:bounds[e + 1]]`.
        shape: tokens, and experts of each.
    """

    slot_S: torch.Tensor
    token_S: torch.Tensor
    bounds: list[int]
    shape: tuple[int, int]

    @property
    def places(self) -> torch.Tensor:
        """Where each expert of a token stands among the sorted slots [T, K]."""
        place_S = torch.empty_like(self.slot_S)
        place_S[self.slot_S] = torch.arange(len(place_S), device=place_S.device)
        return place_S.view(self.shape)

    @property
    def counts(self) -> list[int]:
        """How many slots each expert has."""
        return [end - begin for begin, end in itertools.pairwise(self.bounds)]

    @property
    def reached(self) -> list[int]:
        """Experts with at least one token, ascending."""
        return [expert for expert, count in enumerate(self.counts) if count]

    def of(self, expert: int) -> slice:
        """Where an expert's slots stand."""
        return slice(self.bounds[expert], self.bounds[expert + 1])


def route(index_TK: torch.Tensor, experts: int) -> Routing:
    """Sort slots by expert, by token within one. Numbers from `experts` on mean no expert."""
    flat_S = index_TK.reshape(-1)
    slot_S = torch.sort(flat_S, stable=True).indices
    counts = torch.bincount(flat_S, minlength=experts)[:experts]
    bounds = [0, *torch.cumsum(counts, 0).tolist()]
    tokens, each = index_TK.shape
    return Routing(slot_S=slot_S, token_S=slot_S // each, bounds=bounds, shape=(tokens, each))


# -- experts on a device -----------------------------------------------------------------------------------------------


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


def _multiply_grouped(
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


def _pass_back_grouped(
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


# -- experts -----------------------------------------------------------------------------------------------------------


class TunedExperts(torch.nn.Module):
    """Stands for a fused experts module.

    Attributes:
        gate_up: weights [E, 2J, H].
        down: weights [E, H, J].
        biases: what is added to their products, or None.
        reached_E: whether an expert was ever passed a gradient, of any token, over all calls.
        tokens_E: how many tokens came to each expert over all calls.
        tokens: how many there were.
    """

    def __init__(
        self,
        gate_up: Tunable,
        down: Tunable,
        gate: Gate,
        workers: Workers,
        biases: ExpertBiases | None = None,
    ) -> None:
        super().__init__()
        self.gate_up, self.down, self.gate, self.workers = gate_up, down, gate, workers
        self.biases = biases
        self.reached_E = [False] * gate_up.shape[0]
        self.tokens_E, self.tokens = [0] * gate_up.shape[0], 0
        self.grouped = gate_up.device.type != "cpu"
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Weighted sums of the chosen experts' outputs, in the type of `hidden_TH`."""
        out: torch.Tensor = _Experts.apply(hidden_TH, weight_TK, self._anchor, index_TK, self)  # type: ignore[no-untyped-call]
        return out

    @property
    def reach(self) -> float:
        """Share of the tokens that come to the expert that a token comes to, on the mean; 1 where none came to any."""
        squares = sum(tokens * tokens for tokens in self.tokens_E)
        return squares / (self.tokens * sum(self.tokens_E)) if squares else 1.0

    def multiply(
        self, hidden_TH: torch.Tensor, weight_TK: torch.Tensor, index_TK: torch.Tensor, kept: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """Outputs [T, H]; what is worth it for `pass_back` is put into `kept`."""
        keeps = index_TK.numel() * self.gate_up.shape[1] * hidden_TH.element_size() <= KEPT_BYTES
        routing = route(index_TK, self.gate_up.shape[0])
        self.tokens += routing.shape[0]
        self.tokens_E = [known + new for known, new in zip(self.tokens_E, routing.counts, strict=True)]
        if self.grouped:
            return _multiply_grouped(self._both, hidden_TH, weight_TK, routing)
        out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32)
        flat_S = weight_TK.reshape(-1)

        def one(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
            token_n = routing.token_S[routing.of(expert)]
            weight_n1 = flat_S[routing.slot_S[routing.of(expert)], None]
            between_nJ = self._between(expert, _taken(hidden_TH, token_n, _size(token_n, hidden_TH)))
            if keeps:
                kept[expert] = between_nJ
            down_HJ = self._values(self.down, expert, "down", hidden_TH.dtype)
            y_nH = self.gate(between_nJ) @ down_HJ.T
            if self.biases:
                y_nH += self.biases.down_EH[expert].to(y_nH.dtype)
            return token_n, y_nH[: len(token_n)].float() * weight_n1.float()

        for token_n, y_nH in self.workers.ordered(one, routing.reached):
            out_TH.index_add_(0, token_n, y_nH)
        return out_TH.to(hidden_TH.dtype)

    def pass_back(
        self,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        gradient_TH: torch.Tensor,
        kept: dict[int, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tune the experts, and return the gradients of `hidden_TH` and `weight_TK`; `kept` is used up."""
        hidden_TH, weight_TK, index_TK = inputs
        routing = route(index_TK, self.gate_up.shape[0])
        self._note_reached(inputs, gradient_TH)
        if self.grouped:
            return _pass_back_grouped(self._both, (hidden_TH, weight_TK), routing, gradient_TH)
        gradient_out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32)
        gradient_S, flat_S = torch.zeros_like(weight_TK).reshape(-1), weight_TK.reshape(-1)

        def one(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
            token_n, slot_n = routing.token_S[routing.of(expert)], routing.slot_S[routing.of(expert)]
            size = _size(token_n, hidden_TH)
            arriving = _taken(gradient_TH, token_n, size), _taken(flat_S[:, None], slot_n, size)
            x_nH, between_nJ = _taken(hidden_TH, token_n, size), kept.pop(expert, None)
            gradient_nH, gradient_n = self._pass_back_one(expert, (x_nH, between_nJ), arriving)
            gradient_S[slot_n] = gradient_n[: len(slot_n)].to(gradient_S.dtype)
            return token_n, gradient_nH[: len(token_n)]

        for token_n, gradient_nH in self.workers.ordered(one, routing.reached):
            gradient_out_TH.index_add_(0, token_n, gradient_nH)
        return gradient_out_TH.to(hidden_TH.dtype), gradient_S.reshape(weight_TK.shape)

    def _note_reached(self, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], gradient_TH: torch.Tensor) -> None:
        """Note the experts of tokens with a gradient: those that only judge, or do not count, move no expert."""
        if all(self.reached_E):
            return
        _, weight_TK, index_TK = inputs
        learned_TK = (gradient_TH != 0).any(1)[:, None] & (weight_TK != 0)
        for expert in torch.unique(index_TK[learned_TK]).tolist():
            if expert < len(self.reached_E):
                self.reached_E[expert] = True

    @property
    def _both(self) -> StackedExperts:
        return StackedExperts(gate_up=self.gate_up, down=self.down, gate=self.gate, biases=self.biases)

    def _values(self, weight: Tunable, expert: int, name: str, dtype: torch.dtype) -> torch.Tensor:
        _, rows, columns = weight.shape
        w_OI = self.workers.scratch(name, (rows, columns), dtype)
        weight.values_into(expert * rows, w_OI)
        return w_OI

    def _between(self, expert: int, x_nH: torch.Tensor) -> torch.Tensor:
        between_nJ = x_nH @ self._values(self.gate_up, expert, "gate_up", x_nH.dtype).T
        return between_nJ + self.biases.gate_up_EO[expert].to(x_nH.dtype) if self.biases else between_nJ

    def _pass_back_one(
        self,
        expert: int,
        forth: tuple[torch.Tensor, torch.Tensor | None],
        arriving: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the expert's inputs [n, H], and of its router weights [n], both float32; tunes the expert."""
        x_nH, between_nJ = forth
        gradient_nH, weight_n1 = arriving[0], arriving[1].to(x_nH.dtype)
        between_nJ = self._between(expert, x_nH) if between_nJ is None else between_nJ
        with torch.enable_grad():
            between_nJ = between_nJ.detach().requires_grad_()
            inner_nJ = self.gate(between_nJ)
        down_HJ = self._update(self.down, "down", expert, (gradient_nH * weight_n1, inner_nJ.detach()))
        back_nJ = gradient_nH @ down_HJ
        router_n = (back_nJ.float() * inner_nJ.detach().float()).sum(1)
        if self.biases:
            router_n += gradient_nH.float() @ self.biases.down_EH[expert].float()
        (pre_nJ,) = torch.autograd.grad(inner_nJ, between_nJ, back_nJ * weight_n1)
        up_JH = self._update(self.gate_up, "gate_up", expert, (pre_nJ, x_nH))
        return (pre_nJ @ up_JH).float(), router_n

    def _update(self, weight: Tunable, name: str, expert: int, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Move a weight against the product of the gradients that arrived and its inputs; the values it had before."""
        gradient_nO, x_nI = pair
        _, rows, columns = weight.shape
        if not weight.moves:
            return self._values(weight, expert, name, x_nI.dtype)
        w_OI = self.workers.scratch(name, (rows, columns), x_nI.dtype)
        for run in slices_of(rows, EXPERT_ROWS):
            tile_RI = self.workers.scratch("rows", (run.stop - run.start, columns), x_nI.dtype)
            torch.mm(gradient_nO[:, run].T, x_nI, out=tile_RI)
            weight.update(expert * rows + run.start, tile_RI, w_OI[run])
        return w_OI


def _taken(x_TH: torch.Tensor, token_n: torch.Tensor, size: int) -> torch.Tensor:
    """Some rows, and zeros up to `size`, which change no other row and no sum."""
    if len(token_n) == size:
        return x_TH[token_n]
    out_nH = x_TH.new_zeros(size, x_TH.shape[1])
    torch.index_select(x_TH, 0, token_n, out=out_nH[: len(token_n)])
    return out_nH


def _size(token_n: torch.Tensor, hidden_TH: torch.Tensor) -> int:
    """As how many tokens these are multiplied: by less than 8 or an eighth more, eight sizes for each power of two.

    torch makes a kernel for every shape of a 16-bit product, and experts are sent any number of tokens.
    """
    tokens = len(token_n)
    step = max(8, 1 << max(0, tokens.bit_length() - 4)) if hidden_TH.dtype != torch.float32 else 1
    return -(-tokens // step) * step


class _ExpertsContext(PassContext, Protocol):
    module: TunedExperts
    kept: dict[int, torch.Tensor]


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _ExpertsContext,
        hidden_TH: torch.Tensor,
        weight_TK: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004
        index_TK: torch.Tensor,
        module: TunedExperts,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_TH, weight_TK, index_TK)
        ctx.module, ctx.kept = module, {}
        return module.multiply(hidden_TH, weight_TK, index_TK, ctx.kept)

    @staticmethod
    def backward(
        ctx: _ExpertsContext,
        gradient_TH: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        hidden_TH, weight_TK, index_TK = ctx.saved_tensors
        with torch.no_grad():
            inputs = hidden_TH, weight_TK, index_TK
            hidden, weight = ctx.module.pass_back(inputs, gradient_TH.contiguous(), ctx.kept)
        return hidden, weight, None, None, None
