"""Attention of models that no kernel knows, some queries at a time.

Attention sinks, as gpt-oss has them, leave transformers with the model's own plain code, which holds several tensors
[heads, T, T]: at 64 heads and 2,048 positions, gigabytes. That code is called here for some rows of queries after the
other; they do not depend on each other. Registered with transformers as an attention implementation.
"""

# B: sequences, T: positions, D: channels of a head.

from __future__ import annotations

import sys
from typing import Any, Final

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shardxform.base.constants import BATCH_TOKENS

__all__ = ["attend_by_rows"]

_PLAIN: Final = "eager"
_BY_ROWS: Final = "shardxform_rows"
_ROWS: Final = BATCH_TOKENS // 8


def attend_by_rows(model: nn.Module) -> None:
    """Have a model of transformers that would run its own plain attention run it by rows; others stay as they are."""
    config: Any = model.config
    if config._attn_implementation == _PLAIN:
        config._attn_implementation = _BY_ROWS


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Outputs [B, T, heads, D] of queries [B, heads, T, D], by the plain code of the module's model."""
    plain = sys.modules[type(module).__module__].eager_attention_forward
    outs = []
    for first in range(0, query.shape[2], _ROWS):
        rows = slice(first, first + _ROWS)
        mask = None if attention_mask is None else attention_mask[:, :, rows]
        outs.append(plain(module, query[:, :, rows], key, value, mask, **options)[0])
    return torch.cat(outs, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(_BY_ROWS, _forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(_BY_ROWS, eager_mask)
