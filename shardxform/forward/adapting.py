"""Transformers' modules changed to hold what checkpoints hold, and to call experts as those of most models are called.

What they compute stays what it was, to the order of a sum.
"""

# N: tokens, K: experts of a token, E: experts, H: hidden size.

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from shardxform.model.families.base import ExpertLayout

__all__ = ["compute_experts", "take_apart", "weigh_inputs"]


class _SideBySide(nn.Module):
    """A linear module whose rows are those of several, which are its children."""

    def __init__(self, joined: nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            rows, dtype = joined.out_features // len(names), joined.weight.dtype
            part = nn.Linear(joined.in_features, rows, joined.bias is not None, dtype=dtype)
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.children()], dim=-1)


def take_apart(decoder: nn.Module, joined: Mapping[str, tuple[str, ...]]) -> None:
    """Have linear modules that a checkpoint holds in parts, by their last names, hold these."""
    for module in list(decoder.modules()):
        for name in joined.keys() & dict(module.named_children()).keys():
            whole = module.get_submodule(name)
            assert isinstance(whole, nn.Linear)
            setattr(module, name, _SideBySide(whole, joined[name]))


def compute_experts(model: nn.Module, implementation: str, layout: ExpertLayout) -> None:
    """Have experts computed by what is registered under a name, and say how they lie where transformers does not.

    Before 5.8 a model is not made with an implementation of others, but takes one afterwards; before 5.4 its modules
    say less of themselves.
    """
    flags = {
        "_is_expert_parallel": False,
        "has_gate": layout.gated,
        "has_post_expert_norm": False,
        "is_concatenated": layout.gate != "interleaved",
    }
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = implementation
        if hasattr(module, "is_transposed"):
            for name in flags.keys() - vars(module).keys():
                if not hasattr(module, name):
                    setattr(module, name, flags[name])


def weigh_inputs(decoder: nn.Module, home: str) -> None:
    """Have each block's router weigh the inputs of the experts that it chooses, which are called with those alone.

    Llama 4's own code gives every expert all tokens, those times zero that are not its own.

    Args:
        decoder: whose blocks have a router, a shared expert and experts that are called so.
        home: name of the experts within a block.

    """
    holder, _, last = home.rpartition(".")
    for block in decoder.modules():
        moe: Any = dict(block.named_children()).get(holder)
        if moe is not None and hasattr(moe, last):
            config: Any = decoder.config
            setattr(moe, last, MixtralExperts(config))  # those of most models; no other parameter has another shape
            moe.forward = types.MethodType(_weighing_inputs, moe)


def _weighing_inputs(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401
    hidden_NH = hidden_states.reshape(-1, hidden_states.shape[-1])
    score_NE, logit_NE = self.router(hidden_NH)
    expert_NK = logit_NE.topk(self.top_k, dim=1).indices
    entering_NKH = hidden_NH[:, None] * score_NE.gather(1, expert_NK)[..., None]
    as_they_are = torch.ones_like(expert_NK, dtype=hidden_NH.dtype).view(-1, 1)
    leaving = self.experts(entering_NKH.flatten(0, 1), expert_NK.view(-1, 1), as_they_are)
    return self.shared_expert(hidden_NH) + leaving.view(entering_NKH.shape).sum(1), logit_NE
