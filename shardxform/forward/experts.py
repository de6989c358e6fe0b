"""Routed experts as transformers runs them, with weights that are read when a token reaches them.

Registered with transformers as an experts implementation; gate and activation are the model's own. Experts are visited
in ascending order, as the model's plain implementation does, and only those that some token is routed to.
"""

# T: tokens, K: experts per token, n: tokens of one expert, H: hidden size, I: intermediate size, O: 2 * I.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from shardxform.errors import FamilyError
from shardxform.forward.weights import ExpertValues, Precision, RoutedExpert

__all__ = ["IMPLEMENTATION", "STACKS", "ExpertBank", "Observer", "attach", "detach", "experts_module"]

IMPLEMENTATION: Final = "shardxform"
STACKS: Final = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
"""Parameters of transformers' experts modules."""
_BANK: Final = "shardxform_bank"

Observer = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with an expert, the router's weights of its tokens [n], and its outputs [n, H], not yet weighted."""


@dataclass(slots=True)
class ExpertBank:
    """The routed experts of one block: read at first use, then kept on the device until the block is done.

    Attributes:
        read: reads an expert.
        precision: what it is computed in.
        observer: sees what every expert puts out, or None.
        loaded: experts read so far.

    """

    read: Callable[[int], RoutedExpert]
    precision: Precision
    observer: Observer | None = None
    loaded: dict[int, RoutedExpert] = field(default_factory=dict)

    def dense(self, expert: int) -> ExpertValues:
        """What an expert computes with."""
        if expert not in self.loaded:
            self.loaded[expert] = self.read(expert).on(self.precision.device)
        return self.loaded[expert].dense(self.precision)


def experts_module(block: nn.Module) -> nn.Module | None:
    """Find the routed experts of a decoder block; None in a dense one.

    Raises:
        FamilyError: experts that this implementation does not compute.

    """
    found = [module for module in block.modules() if hasattr(module, "_is_expert_parallel")]
    if not found:
        return None
    module: Any = found[0]
    if len(found) > 1 or module.has_post_expert_norm or not module.has_gate:
        raise FamilyError(f"{type(module).__name__}: experts of two kinds, with a norm or without a gate are not run")
    return found[0]


def attach(module: nn.Module, bank: ExpertBank) -> None:
    """Give an experts module its weights."""
    object.__setattr__(module, _BANK, bank)


def detach(module: nn.Module) -> None:
    """Take them away again."""
    object.__delattr__(module, _BANK)


def _forward(
    self: Any,  # noqa: ANN401
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of the outputs of every token's experts.

    Args:
        self: the model's experts module.
        hidden_states: [T, H].
        top_k_index: expert ids [T, K], different ones for a token.
        top_k_weights: the router's weights [T, K].

    Returns:
        [T, H].

    """
    bank: ExpertBank = getattr(self, _BANK)
    out_TH = torch.zeros_like(hidden_states)
    order = top_k_index.flatten().argsort(stable=True)
    counts = top_k_index.flatten().bincount(minlength=self.num_experts).tolist()
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        pairs = order[start : start + count]
        start += count
        token_n = pairs // top_k_index.shape[1]
        weight_n = top_k_weights.flatten()[pairs]
        values = bank.dense(expert)
        between_nO = nn.functional.linear(hidden_states[token_n], values.gate_up_OH, values.gate_up_bias_O)
        value_nH = nn.functional.linear(self._apply_gate(between_nO), values.down_HI, values.down_bias_H)
        if bank.observer is not None:
            bank.observer(expert, weight_n, value_nH)
        # A token meets an expert once, so nothing is added twice and the order of the sums is fixed.
        out_TH[token_n] += (value_nH * weight_n[:, None]).to(out_TH.dtype)
    return out_TH


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
