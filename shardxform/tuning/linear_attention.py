"""Linear attention while its layer is tuned: the same outputs, and little kept for the backward pass.

Between the projections, which store their inputs, transformers' torch code keeps hundreds of kilobytes a token. The
delta rule, the convolution before it and the gated norm behind it are replaced here by others that keep their inputs
alone, or little more. Where fla is installed, transformers calls its kernel for the rule, and that is left alone; so
are convolution and norm on other devices than the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, Final

import torch

from shardxform.forward.arithmetic import any_order
from shardxform.tuning.causal_conv import storing_the_input
from shardxform.tuning.delta_rule import computes_the_same, gated_delta_rule
from shardxform.tuning.gated_norm import row_by_row
from shardxform.tuning.one_by_one import one_by_one
from shardxform.tuning.workers import Workers

__all__ = ["frugal_linear_attention"]

_RULE: Final = "torch_chunk_gated_delta_rule"
_CONVOLUTION: Final = "causal_conv1d_fn"
_NORM: Final = "RMSNormGated"


@contextlib.contextmanager
def frugal_linear_attention(layer: torch.nn.Module, workers: Workers) -> Iterator[None]:
    """Have the linear attention of a layer keep little, and use all threads; other layers are not affected by it."""
    with contextlib.ExitStack() as stack:
        if find_spec("fla") is None:
            _replace(stack, layer, _RULE, functools.partial(_rule, workers=workers, stack=stack))
        _replace(stack, layer, _CONVOLUTION, functools.partial(storing_the_input, workers=workers))
        for module in layer.modules():
            if type(module).__name__.endswith(_NORM):
                module.forward = row_by_row(module, workers)
                stack.callback(delattr, module, "forward")
        yield


def _rule(rule: Callable[..., Any], workers: Workers, stack: contextlib.ExitStack) -> Callable[..., Any]:
    if computes_the_same(rule):
        return one_by_one(gated_delta_rule, workers)
    stack.enter_context(any_order())  # its cumulative sums have none on a GPU
    return one_by_one(rule, workers)


def _replace(
    stack: contextlib.ExitStack, layer: torch.nn.Module, name: str, by: Callable[[Callable[..., Any]], Any]
) -> None:
    """Where the layer's modules are defined, since transformers calls its functions by their names there."""
    for home in {sys.modules[type(module).__module__] for module in layer.modules()}:
        former = getattr(home, name, None)
        if former is not None:
            setattr(home, name, by(former))
            stack.callback(setattr, home, name, former)
