"""The gated delta rule for one sample and some heads at a time: what it needs for a whole batch is gigabytes.

As transformers writes it in torch it keeps 255 KB a token for the backward pass, at the shapes of Qwen3.5-35B-A3B; the
rule of `delta_rule`, taken where it agrees with transformers' own, makes most of that during the pass. Neither samples
nor heads depend on each other, so threads work on different ones, and in a batch of several samples each part is
forgotten as soon as it is done, and made again when its gradient arrives. Parts are the same whatever the number of
threads, so the numbers are too.
"""

# B: samples of a batch, T: positions, G: key heads, V: value heads, W: a value's width.

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch
from torch.autograd.function import once_differentiable

from shardxform.base.constants import DEVICE_HEADS_BYTES as _DEVICE_WINDOW_BYTES
from shardxform.base.constants import HEADS_BYTES as _WINDOW_BYTES
from shardxform.forward.memory import give_back
from shardxform.tuning.workers import Workers

__all__ = ["one_by_one"]

_NOT_OF_HEADS: Final = ("initial_state", "cu_seqlens")
_TRIM_BYTES: Final = 1 << 25

A = TypeVar("A")
B = TypeVar("B")
_Tensors = tuple[torch.Tensor, ...]


def one_by_one(
    rule: Callable[..., tuple[torch.Tensor, torch.Tensor | None]], workers: Workers
) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """`rule` for one sample and some heads at a time, on threads.

    Args:
        rule: takes tensors [B, T, heads, ...] by position and by name, queries, keys and values first; returns
            `(out [B, T, V, W], None)`.
        workers: the threads.

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
        parts = _Parts(out, workers, samples=len(batched[0]), windows=_windows(batched[1], batched[2]))
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return parts.together(parts.each(lambda part: out(*part), parts.of(tensors), tensors)), None
        found: torch.Tensor = _Apart.apply(parts, *tensors)  # type: ignore[no-untyped-call]
        return found, None

    return each


@dataclass(frozen=True, slots=True)
class _Parts:
    """How a batch is cut, and who works on it.

    Attributes:
        out: the outputs [1, T, heads, W] of a part's tensors.
        workers: threads.
        samples: of the batch.
        windows: of heads.
    """

    out: Callable[..., torch.Tensor]
    workers: Workers
    samples: int
    windows: int

    @property
    def forgets(self) -> bool:
        """Whether parts are made again for the backward pass."""
        return self.samples > 1

    def of(self, tensors: _Tensors) -> Iterator[_Tensors]:
        """The same part of all tensors, one part after the other; taken at once, since each by its index costs more."""
        for sample in zip(*(tensor.chunk(self.samples) for tensor in tensors), strict=True):
            yield from zip(*(tensor.chunk(self.windows, 2) for tensor in sample), strict=True)

    def each(self, work: Callable[[A], B], items: Iterable[A], tensors: _Tensors) -> Iterator[B]:
        """`work` on every part, in order; now and then what was freed goes back to the system.

        glibc would keep most of it, in holes that the next sample's tensors do not quite fit: 4 samples of 2,048
        positions took 2.1 GB instead of 0.9.
        """
        # On other devices a thread would wait for autograd's thread of the device, which waits for this one.
        on_threads = tensors[0].device.type == "cpu"
        results = self.workers.ordered(work, items) if on_threads else map(work, items)
        every = self.windows * (1 + _TRIM_BYTES // _computed_bytes(tensors[2][:1]))
        for at, result in enumerate(results, start=1):
            yield result
            if self.forgets and at % every == 0:
                give_back()

    def together(self, outs: Iterable[torch.Tensor]) -> torch.Tensor:
        """[B, T, V, W] of the outputs of all parts."""
        held = list(outs)
        samples = [torch.cat(held[at : at + self.windows], 2) for at in range(0, len(held), self.windows)]
        return torch.cat(samples) if len(samples) > 1 else samples[0]


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: _Parts, *tensors: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        wanted = ctx.needs_input_grad[1:]
        ctx.save_for_backward(*tensors)
        ctx.parts, ctx.kept = parts, []

        def one(part: _Tensors) -> tuple[torch.Tensor, _Made | None]:
            if parts.forgets:
                return parts.out(*part), None
            made = _Made.of(parts, part, wanted)
            return made.out.detach(), made

        outs = []
        for out, made in parts.each(one, parts.of(tensors), tensors):
            outs.append(out)
            ctx.kept.append(made)
        return parts.together(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTVW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        parts, tensors, wanted = ctx.parts, ctx.saved_tensors, ctx.needs_input_grad[1:]
        kept, ctx.kept = ctx.kept[::-1], []

        def one(part: tuple[_Made | None, _Tensors]) -> _Tensors:
            made, (gradient, *inputs) = part
            return (made or _Made.of(parts, tuple(inputs), wanted)).pass_back(gradient)

        works = ((kept.pop(), part) for part in parts.of((gradient_BTVW, *tensors)))
        gradients = tuple(torch.empty_like(t) for t, w in zip(tensors, wanted, strict=True) if w)
        for places, found in zip(parts.of(gradients), parts.each(one, works, tensors), strict=True):
            for place, value in zip(places, found, strict=True):
                place.copy_(value)
        ready = iter(gradients)
        return (None, *(next(ready) if w else None for w in wanted))


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    """A part's outputs, with what their backward pass needs."""

    inputs: list[torch.Tensor]
    out: torch.Tensor

    @classmethod
    def of(cls, parts: _Parts, tensors: _Tensors, wanted: tuple[bool, ...]) -> _Made:
        inputs = [tensor.detach().requires_grad_(w) for tensor, w in zip(tensors, wanted, strict=True)]
        with torch.enable_grad():
            return cls([one for one in inputs if one.requires_grad], parts.out(*inputs))

    def pass_back(self, gradient: torch.Tensor) -> _Tensors:
        return torch.autograd.grad(self.out, self.inputs, gradient)


def _windows(key_BTGD: torch.Tensor, value_BTVW: torch.Tensor) -> int:
    """Into how many windows the heads of one sample are cut."""
    heads, size = key_BTGD.shape[2], _WINDOW_BYTES if value_BTVW.device.type == "cpu" else _DEVICE_WINDOW_BYTES
    wanted = max(1, -(-_computed_bytes(value_BTVW[:1]) // size))
    return next((n for n in range(wanted, heads) if heads % n == 0), heads)


def _computed_bytes(value: torch.Tensor) -> int:
    return value.numel() * torch.float32.itemsize
