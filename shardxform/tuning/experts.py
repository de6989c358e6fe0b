"""The routed experts of a layer, tuned as what they are: two stacks of weights.

Stands for transformers' fused experts: `(hidden_TH, index_TK, weight_TK) -> hidden_TH`. The forward pass stores its
inputs, and of few tokens the first product of each expert, but no weights. The backward pass makes each expert's
weights again in scratch memory, passes gradients on to the hidden states and to the router's weights, and hands each
tile of a weight's gradient to the weight at once. An expert that no token reached costs nothing and is not touched.
Sums over experts go by expert number, whoever was first: the number of threads does not show.
"""

# T: tokens, K: experts of a token, S: slots (T * K, sorted by expert), H: hidden size, J: intermediate size, n: tokens
# of one expert.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from shardxform.base.constants import EXPERT_ROWS, KEPT_BYTES
from shardxform.tuning import grouped
from shardxform.tuning.linear import runs
from shardxform.tuning.routing import ExpertBiases, Gate, StackedExperts, route

if TYPE_CHECKING:
    from shardxform.tuning.stacked import Tunable
    from shardxform.tuning.workers import Workers

__all__ = ["TunedExperts"]


class TunedExperts(torch.nn.Module):
    """Stands for a fused experts module.

    Attributes:
        gate_up: weights [E, 2J, H].
        down: weights [E, H, J].
        biases: what is added to their products, or None.
        interleaved: whether gate and up projection are every second row of `gate_up`, rather than its halves.
        reached_E: whether any token ever reached an expert, over all calls.
    """

    def __init__(
        self,
        gate_up: Tunable,
        down: Tunable,
        gate: Gate,
        workers: Workers,
        biases: ExpertBiases | None = None,
        *,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.gate_up, self.down, self.gate, self.workers = gate_up, down, gate, workers
        self.biases, self.interleaved = biases, interleaved
        self.reached_E = [False] * gate_up.shape[0]
        self.grouped = gate_up.device.type != "cpu"
        self._anchor = torch.zeros((), requires_grad=True)

    def forward(self, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """Weighted sums of the chosen experts' outputs, in the type of `hidden_TH`."""
        out: torch.Tensor = _Experts.apply(hidden_TH, weight_TK, self._anchor, index_TK, self)  # type: ignore[no-untyped-call]
        return out

    def multiply(
        self, hidden_TH: torch.Tensor, weight_TK: torch.Tensor, index_TK: torch.Tensor, kept: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """Outputs [T, H]; what is worth it for `pass_back` is put into `kept`."""
        keeps = index_TK.numel() * self.gate_up.shape[1] * hidden_TH.element_size() <= KEPT_BYTES
        routing = route(index_TK, self.gate_up.shape[0])
        for expert in routing.reached:
            self.reached_E[expert] = True
        if self.grouped:
            return grouped.multiply(self._both, hidden_TH, weight_TK, routing)
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
        if self.grouped:
            return grouped.pass_back(self._both, (hidden_TH, weight_TK), routing, gradient_TH)
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
        for run in runs(rows, EXPERT_ROWS):
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


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
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
        ctx: Any,  # noqa: ANN401
        gradient_TH: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        with torch.no_grad():
            hidden, weight = ctx.module.pass_back(ctx.saved_tensors, gradient_TH.contiguous(), ctx.kept)
        return hidden, weight, None, None, None
