"""Which tokens go to which expert, and what an expert is made of. Integers only; no product is computed here."""

# T: tokens, K: experts of a token, S: slots (T * K, sorted by expert), H: hidden size, J: intermediate size, n: tokens
# of one expert.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from shardxform.tuning.stacked import Tunable

__all__ = ["ExpertBiases", "Gate", "Routing", "StackedExperts", "route"]

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
    def reached(self) -> list[int]:
        """Experts with at least one token, ascending."""
        return [e for e in range(len(self.bounds) - 1) if self.bounds[e + 1] > self.bounds[e]]

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
