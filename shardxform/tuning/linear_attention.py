"""Linear attention while its layer is tuned: the same outputs, and little kept for the backward pass.

Between the projections, which store their inputs, transformers' torch code keeps hundreds of kilobytes a token. Three
of its functions are replaced here by others that keep their inputs alone, or little more:

the delta rule        for one sample and some heads at a time. As transformers writes it, it keeps 255 KB a token at the
                      shapes of Qwen3.5-35B-A3B; the rule of `delta_rule`, taken where it agrees with transformers' own,
                      makes most of that during the pass. In a batch of several samples each part is forgotten as soon
                      as it is done, and made again when its gradient arrives.
the convolution       some channels at a time, by transformers' own code, so the outputs are its bits. Products and sums
before it             of shifted rows give the gradients that torch gives up to rounding, of the input alone.
the gated norm        some rows at a time, by transformers' own module, forth and back; of a whole sample it would keep
behind it             several tensors in float32.

Parts do not depend on each other, so threads work on different ones; they are the same whatever the number of threads,
so the numbers are too. Where fla is installed, transformers calls its kernel for the rule, and that is left alone; so
are convolution and norm on other devices than the CPU.
"""

# B: samples of a batch, T: positions, G: key heads, V: value heads, C: channels, K: width of the kernel, R: rows,
# positions times heads, W: a value's width, or the channels of a window.

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, Protocol, TypeVar

import torch
from torch.autograd.function import once_differentiable

from shardxform.base.constants import DEVICE_HEADS_BYTES as _DEVICE_HEADS_BYTES
from shardxform.base.constants import HEADS_BYTES as _HEADS_BYTES
from shardxform.forward.runtime import PassContext, any_order, give_back
from shardxform.tuning.delta_rule import Rule, computes_the_same, gated_delta_rule
from shardxform.tuning.modules import slices_of
from shardxform.tuning.workers import Workers

__all__ = ["frugal_linear_attention", "one_by_one", "row_by_row", "storing_the_input"]

_NOT_OF_HEADS: Final = ("initial_state", "cu_seqlens")
_TRIM_BYTES: Final = 1 << 25

A = TypeVar("A")
B = TypeVar("B")
_Tensors = tuple[torch.Tensor, ...]


def one_by_one(rule: Rule, workers: Workers) -> Rule:
    """`rule` for one sample and some heads at a time, on threads.

    Args:
        rule: takes tensors [B, T, heads, ...] by position and by name, queries, keys and values first; returns
            `(out [B, T, V, W], None)`.
        workers: the threads.

    """

    @functools.wraps(rule)
    def each(*batched: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        if options.get("output_final_state") or any(options.get(name) is not None for name in _NOT_OF_HEADS):
            return rule(*batched, **options)
        named = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}

        def out(*tensors: torch.Tensor) -> torch.Tensor:
            own = dict(zip(named, tensors[len(batched) :], strict=True))
            result: torch.Tensor = rule(*tensors[: len(batched)], **{**options, **own})[0]
            return result

        tensors = (*batched, *named.values())
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


class _ApartContext(PassContext, Protocol):
    parts: _Parts
    kept: list[_Made | None]


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _ApartContext, parts: _Parts, *tensors: torch.Tensor) -> torch.Tensor:
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
    def backward(ctx: _ApartContext, gradient_BTVW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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
    heads, size = key_BTGD.shape[2], _HEADS_BYTES if value_BTVW.device.type == "cpu" else _DEVICE_HEADS_BYTES
    wanted = max(1, -(-_computed_bytes(value_BTVW[:1]) // size))
    return next((n for n in range(wanted, heads) if heads % n == 0), heads)


def _computed_bytes(value: torch.Tensor) -> int:
    return value.numel() * torch.float32.itemsize


# -- the convolution before it -----------------------------------------------------------------------------------------


_CHANNELS_BYTES: Final = 1 << 20
_ACTIVATION: Final = "silu"

_Place = tuple[int, slice]


def storing_the_input(convolve: Callable[..., torch.Tensor], workers: Workers) -> Callable[..., torch.Tensor]:
    """`convolve(hidden_BCT, weight, bias, activation=...)`, whose gradient of `hidden_BCT` is computed here.

    Models pass weight and bias by position or by name. Other calls than transformers makes of frozen kernels on the CPU
    go to `convolve` as they are.
    """

    @functools.wraps(convolve)
    def convolved(
        hidden_BCT: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **options: object,
    ) -> torch.Tensor:
        weight_CK, bias_C = weight, bias
        given = functools.partial(convolve, activation=activation, **options)
        frozen = not weight_CK.requires_grad and (bias_C is None or not bias_C.requires_grad)
        asked = [name for name, value in options.items() if value is not None and value is not False]
        special = bool(asked) or activation != _ACTIVATION
        if special or not frozen or not hidden_BCT.requires_grad or hidden_BCT.device.type != "cpu":
            return given(hidden_BCT, weight_CK, bias_C)
        out: torch.Tensor = _Convolution.apply(hidden_BCT, weight_CK, bias_C, given, workers)  # type: ignore[no-untyped-call]
        return out

    return convolved


class _ConvolutionContext(PassContext, Protocol):
    workers: Workers


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _ConvolutionContext,
        hidden_BCT: torch.Tensor,
        weight_CK: torch.Tensor,
        bias_C: torch.Tensor | None,
        convolve: Callable[..., torch.Tensor],
        workers: Workers,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_BCT, weight_CK, bias_C)
        ctx.workers = workers
        out_BTC = _positions_first(hidden_BCT)

        def one(place: _Place) -> None:
            b, run = place
            bias_W = None if bias_C is None else bias_C[run]
            out_BTC[b, :, run] = convolve(hidden_BCT[b : b + 1, run], weight_CK[run], bias_W)[0].T

        workers.each(one, _places(hidden_BCT))
        return out_BTC.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: _ConvolutionContext, gradient_BCT: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        hidden_BCT, weight_CK, bias_C = ctx.saved_tensors
        out_BTC = _positions_first(hidden_BCT)

        def one(place: _Place) -> None:
            b, run = place
            weight_KW = weight_CK[run].T.float()
            bias_W = None if bias_C is None else bias_C[run].float()
            before_TW = _before_activation(hidden_BCT[b, run].T, weight_KW, bias_W).to(weight_CK.dtype).float()
            inner_TW = torch.ops.aten.silu_backward(gradient_BCT[b, run].T.float(), before_TW)
            out_BTC[b, :, run] = _shifted_sum(inner_TW, weight_KW, back=True)

        ctx.workers.each(one, _places(hidden_BCT))
        return out_BTC.transpose(1, 2), None, None, None, None


def _positions_first(x_BCT: torch.Tensor) -> torch.Tensor:
    """Uninitialised [B, T, C], as the projections have it: a position is contiguous."""
    return torch.empty_like(x_BCT.transpose(1, 2), memory_format=torch.contiguous_format)


def _before_activation(x_TW: torch.Tensor, weight_KW: torch.Tensor, bias_W: torch.Tensor | None) -> torch.Tensor:
    out_TW = _shifted_sum(x_TW.float(), weight_KW, back=False)
    return out_TW if bias_W is None else out_TW + bias_W


def _shifted_sum(x_TW: torch.Tensor, weight_KW: torch.Tensor, *, back: bool) -> torch.Tensor:
    """The sum of x, each time a position later (`back`: earlier) and with the kernel's weight before the last."""
    positions = len(x_TW)
    out_TW = x_TW * weight_KW[-1]
    for shift, weight_W in enumerate(weight_KW.flip(0)[1:positions], start=1):
        if back:
            out_TW[:-shift].addcmul_(x_TW[shift:], weight_W)
        else:
            out_TW[shift:].addcmul_(x_TW[:-shift], weight_W)
    return out_TW


def _places(x_BCT: torch.Tensor) -> Iterator[_Place]:
    """Every sample's windows of channels."""
    samples, channels, positions = x_BCT.shape
    width = max(1, _CHANNELS_BYTES // (torch.float32.itemsize * positions))
    for b in range(samples):
        for run in slices_of(channels, width):
            yield b, run


# -- the gated norm behind it ------------------------------------------------------------------------------------------


_ROWS_BYTES: Final = 1 << 19
"""Of rows as they are computed with, in float32."""

_Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def row_by_row(norm: torch.nn.Module, workers: Workers) -> Callable[..., torch.Tensor]:
    """The forward pass of `norm(hidden_RW, gate_RW)` as it is now; not for parameters that want gradients."""
    forward: _Norm = norm.forward

    @functools.wraps(forward)
    def pieces(hidden_RW: torch.Tensor, gate_RW: torch.Tensor) -> torch.Tensor:
        trained = any(parameter.requires_grad for parameter in norm.parameters())
        if trained or not torch.is_grad_enabled() or hidden_RW.device.type != "cpu":
            return forward(hidden_RW, gate_RW)
        out_RW: torch.Tensor = _RowByRow.apply(hidden_RW, gate_RW, forward, workers)  # type: ignore[no-untyped-call]
        return out_RW

    return pieces


class _RowContext(PassContext, Protocol):
    norm: _Norm
    workers: Workers


class _RowByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _RowContext,
        hidden_RW: torch.Tensor,
        gate_RW: torch.Tensor,
        norm: _Norm,
        workers: Workers,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_RW, gate_RW)
        ctx.norm, ctx.workers = norm, workers
        out_RW = torch.empty_like(hidden_RW)

        def one(rows: slice) -> None:
            out_RW[rows] = norm(hidden_RW[rows], gate_RW[rows])

        workers.each(one, _row_runs(hidden_RW))
        return out_RW

    @staticmethod
    @once_differentiable
    def backward(ctx: _RowContext, gradient_RW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        inputs = ctx.saved_tensors
        hidden_RW, gate_RW = (torch.empty_like(x) for x in inputs)

        def one(rows: slice) -> None:
            piece = [x[rows].detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                out = ctx.norm(*piece)
            hidden_RW[rows], gate_RW[rows] = torch.autograd.grad(out, piece, gradient_RW[rows])

        ctx.workers.each(one, _row_runs(gradient_RW))
        return hidden_RW, gate_RW, None, None


def _row_runs(x_RW: torch.Tensor) -> Iterator[slice]:
    """Some rows, one piece after the other."""
    rows = max(1, _ROWS_BYTES // (torch.float32.itemsize * x_RW.shape[1]))
    return slices_of(len(x_RW), rows)


# -- a layer -----------------------------------------------------------------------------------------------------------


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


def _rule(rule: Rule, workers: Workers, stack: contextlib.ExitStack) -> Rule:
    if computes_the_same(rule):
        return one_by_one(gated_delta_rule, workers)
    stack.enter_context(any_order())  # its cumulative sums have none on a GPU
    return one_by_one(rule, workers)


def _replace(
    stack: contextlib.ExitStack, layer: torch.nn.Module, name: str, by: Callable[..., Callable[..., object]]
) -> None:
    """Where the layer's modules are defined, since transformers calls its functions by their names there."""
    for home in {sys.modules[type(module).__module__] for module in layer.modules()}:
        former = getattr(home, name, None)
        if former is not None:
            setattr(home, name, by(former))
            stack.callback(setattr, home, name, former)
