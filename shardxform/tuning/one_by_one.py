"""The gated delta rule for one sample and some heads at a time: what it needs for a whole batch is gigabytes.

As transformers writes it in torch it keeps 255 KB a token for the backward pass, at the shapes of Qwen3.5-35B-A3B; the
rule of `delta_rule`, taken where it agrees with transformers' own, makes most of that during the pass. Neither samples
nor heads depend on each other, so in a batch of several samples each part is forgotten as soon as it is done, and made
again when its gradient arrives.
"""

# B: samples of a batch, T: positions, G: key heads, V: value heads.

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.utils.checkpoint import checkpoint

from shardxform.forward.memory import give_back

__all__ = ["one_by_one"]

_NOT_OF_HEADS: Final = ("initial_state", "cu_seqlens")
_TRIM_BYTES: Final = 1 << 25
_WINDOW_BYTES: Final = 1 << 20
"""Of values as they are computed with. From 32 MB on, glibc asks the system for each tensor anew, and every page of it
costs: at 2,048 positions of Qwen3.5-35B-A3B that was a third of the time. Smaller windows take less memory: 90 MB at
512 positions, where windows of twice the size take 127 MB and the same time."""


def one_by_one(rule: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> Callable[..., Any]:
    """`rule` for one sample and some heads at a time.

    Args:
        rule: takes tensors [B, T, heads, ...] by position and by name, queries, keys and values first; returns
            `(out [B, T, V, ...], None)`.

    """

    @functools.wraps(rule)
    def each(*batched: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:  # noqa: ANN401
        if options.get("output_final_state") or any(options.get(name) is not None for name in _NOT_OF_HEADS):
            return rule(*batched, **options)
        named = [name for name, value in options.items() if isinstance(value, torch.Tensor)]

        def out(*tensors: torch.Tensor) -> torch.Tensor:
            own = dict(zip(named, tensors[len(batched) :], strict=True))
            result: torch.Tensor = rule(*tensors[: len(batched)], **{**options, **own})[0]
            return result

        tensors = (*batched, *(options[name] for name in named))
        samples = _apart(tensors, len(batched[0]), 0)
        if len(batched[0]) == 1 or not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors)):
            return torch.cat([_sample(out, sample) for sample in samples]), None
        outs = (_sample(_forgotten(out), sample) for sample in samples)
        every = 1 + _TRIM_BYTES // _computed_bytes(batched[2][:1])
        return torch.cat([one if at % every else _trimmed(one) for at, one in enumerate(outs, start=1)]), None

    return each


def _sample(part: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The outputs [1, T, V, ...] of one sample, a window of heads after the other."""
    heads, value = tensors[1].shape[2], tensors[2]
    wanted = max(1, -(-_computed_bytes(value) // _WINDOW_BYTES))
    windows = next((n for n in range(wanted, heads) if heads % n == 0), heads)
    return torch.cat([part(*window) for window in _apart(tensors, windows, 2)], dim=2)


def _computed_bytes(value: torch.Tensor) -> int:
    return value.numel() * torch.float32.itemsize


def _apart(tensors: tuple[torch.Tensor, ...], parts: int, dim: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Equal parts of all tensors, taken at once: by index, each would have a gradient of the size of the whole."""
    yield from zip(*(tensor.chunk(parts, dim) for tensor in tensors), strict=True)


def _forgotten(out: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`out`, whose inside is computed again when gradients arrive."""
    return functools.partial(checkpoint, out, use_reentrant=False, preserve_rng_state=False)


def _trimmed(out: torch.Tensor) -> torch.Tensor:
    """Give back what was freed, now and before the gradients pass.

    glibc would keep most of it, in holes that the next sample's tensors do not quite fit: 4 samples of 2,048 positions
    took 2.1 GB instead of 0.9.
    """
    give_back()
    out.register_hook(lambda _: give_back())  # type: ignore[no-untyped-call]
    return out
