"""The gated delta rule, one sample after the other: what it stores of a whole batch is gigabytes.

Written out in torch it keeps 255 KB a token for the backward pass, at the shapes of Qwen3.5-35B-A3B. Samples do not
depend on each other, so each is forgotten as soon as it is done, and made again when its gradient arrives. The rule is
that of `delta_rule` where it agrees with transformers' own. Where fla is installed, transformers calls its kernel
instead, and that is left alone.
"""

# B: samples of a batch, T: positions.

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch.utils.checkpoint import checkpoint

from shardxform.tuning.delta_rule import computes_the_same, gated_delta_rule

__all__ = ["one_by_one", "samples_one_by_one"]

_RULE: Final = "torch_chunk_gated_delta_rule"


@contextlib.contextmanager
def samples_one_by_one(layer: torch.nn.Module) -> Iterator[None]:
    """Have the delta rule of a layer work sample by sample, and faster; other layers are not affected by it.

    Transformers calls the rule by a name of the module that defines the layer, so that is where it is replaced.
    """
    if find_spec("fla") is not None:
        yield
        return
    homes = {sys.modules[type(module).__module__] for module in layer.modules()}
    rules = {home: rule for home in homes if (rule := getattr(home, _RULE, None)) is not None}
    for home, rule in rules.items():
        setattr(home, _RULE, one_by_one(gated_delta_rule if computes_the_same(rule) else rule))
    try:
        yield
    finally:
        for home, rule in rules.items():
            setattr(home, _RULE, rule)


def one_by_one(rule: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> Callable[..., Any]:
    """`rule` for a batch of one at a time.

    Args:
        rule: takes tensors [B, T, ...] by position and by name, returns `(out_BT..., None)`.

    """

    @functools.wraps(rule)
    def each(*batched: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ANN401
        samples = batched[0].shape[0]
        if samples == 1 or options.get("initial_state") is not None or options.get("output_final_state"):
            return rule(*batched, **options)
        outs = []
        for at in range(samples):
            one = [tensor[at : at + 1] for tensor in batched]
            named = {k: v[at : at + 1] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            outs.append(_forgotten(rule, one, named))
        return torch.cat(outs), None

    return each


def _forgotten(rule: Callable[..., Any], tensors: list[torch.Tensor], named: dict[str, Any]) -> torch.Tensor:
    """The output of `rule`, whose inside is computed again when gradients arrive."""

    def out() -> torch.Tensor:
        result: torch.Tensor = rule(*tensors, **named)[0]
        return result

    if not torch.is_grad_enabled():
        return out()
    again: torch.Tensor = checkpoint(out, use_reentrant=False, preserve_rng_state=False)
    return again
