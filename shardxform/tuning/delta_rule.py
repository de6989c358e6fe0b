"""The gated delta rule in chunks, with a backward pass of its own: linear in the length, and little is stored for it.

The numbers of transformers' own torch version up to rounding: Yang et al., "Gated Delta Networks" (2024), in the form
of Yang et al., "Parallelizing Linear Transformers with the Delta Rule" (2024). That version takes each chunk by its
index from tensors of all chunks, so each chunk's gradient is a tensor of all chunks, nearly all of it zero; and it
stores all that is within chunks. This one stores a chunk's inverted system, its attention, and how far its values are
from what the state says; its backward pass makes the states again. Carries no state from call to call.

Within a chunk, with the state S before it, decays d since its start, and P the decays between its positions:

    z = value - d (key S)                   what the state does not know
    y = inverse(1 + tril(beta key key' P, -1)) (beta z)
    out = d (query S) + tril(query key' P) y
    S' = S d_last + (key d_last / d)' y
"""

# B: samples, T: positions, G: query and key heads, V: value heads, D: a key's width, W: a value's width; H: value heads
# of all samples, N: chunks, C: positions of a chunk, P: 2 C rows, those of keys above those of queries.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from shardxform.base.constants import DELTA_CHUNK as _CHUNK
from shardxform.forward.runtime import PassContext

__all__ = ["Rule", "computes_the_same", "gated_delta_rule"]

_EPSILON: Final = 1e-6

Rule = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""Queries, keys and values, decays and gates by name -> outputs [B, T, V, W], and a state or None."""


def gated_delta_rule(
    query_BTGD: torch.Tensor,
    key_BTGD: torch.Tensor,
    value_BTVW: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Outputs [B, T, V, W] in the type of the queries, and no state; computed in float32.

    Args:
        query_BTGD: queries; each head serves V / G neighbouring value heads.
        key_BTGD: keys.
        value_BTVW: values.
        g: the logarithms of decays [B, T, V], at most 0.
        beta: how far a state moves to a value [B, T, V].
        use_qk_l2norm_in_kernel: give queries and keys a length of 1.

    """
    tensors = query_BTGD, key_BTGD, value_BTVW, beta, g
    out_BTVW: torch.Tensor = _Rule.apply(use_qk_l2norm_in_kernel, *tensors)  # type: ignore[no-untyped-call]
    return out_BTVW, None


class _RuleContext(PassContext, Protocol):
    norm: bool


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RuleContext, norm: bool, *tensors: torch.Tensor) -> torch.Tensor:
        kept = _Kept.empty(tensors[2])
        chunks = _Chunks.of(*tensors[:2], *tensors[3:], norm=norm)
        _within(chunks, kept)
        out = _scan(chunks, kept, _in_chunks(tensors[2]))
        ctx.save_for_backward(*tensors, kept.inverse, kept.attention, kept.z)
        ctx.norm = norm
        return _positions_first(out, tensors[2].shape).to(tensors[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: _RuleContext, gradient_BTVW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, beta, g, inverse, attention, z = ctx.saved_tensors
        chunks = _Chunks.of(query, key, beta, g, norm=ctx.norm)
        gradient = _scan_back(chunks, _Kept(inverse, attention, z), _in_chunks(gradient_BTVW))
        found = (
            *chunks.of_queries_and_keys(gradient.rows, query, key),
            _positions_first(gradient.value, value.shape),
            _positions_first(gradient.beta, beta.shape),
            _positions_first(_added_up(gradient.decay.flip(2)).flip(2), g.shape),
        )
        inputs = query, key, value, beta, g
        return (None, *(gradient.to(x.dtype) for gradient, x in zip(found, inputs, strict=True)))


@dataclass(frozen=True, slots=True, eq=False)
class _Chunks:
    """Keys and queries in chunks, and what their decays make of them.

    Attributes:
        rows: keys, and below them queries, both as the rule multiplies with them [N, H, P, D].
        beta: [N, H, C, 1].
        decay: logarithms, summed from the start of each chunk [N, H, C, 1].
    """

    rows: torch.Tensor
    beta: torch.Tensor
    decay: torch.Tensor
    norm: bool

    @classmethod
    def of(
        cls,
        query_BTGD: torch.Tensor,
        key_BTGD: torch.Tensor,
        beta_BTV: torch.Tensor,
        g_BTV: torch.Tensor,
        *,
        norm: bool,
    ) -> _Chunks:
        """Keys and queries of each head, for all the value heads that it serves."""
        served = beta_BTV.shape[2] // key_BTGD.shape[2]
        pair = []
        for x_BTGD, scale in ((key_BTGD, 1.0), (query_BTGD, key_BTGD.shape[3] ** -0.5)):
            x_NHCD = _in_chunks(x_BTGD)
            x_NHCD = x_NHCD * _inverse_length(x_NHCD) if norm else x_NHCD
            pair.append((x_NHCD * scale)[:, :, None].expand(-1, -1, served, -1, -1))
        rows = torch.cat(pair, 3).flatten(1, 2)
        return cls(rows, _in_chunks(beta_BTV[..., None]), _added_up(_in_chunks(g_BTV[..., None])), norm)

    @property
    def keys(self) -> torch.Tensor:
        """[N, H, C, D]."""
        return self.rows[:, :, :_CHUNK]

    def between(self) -> torch.Tensor:
        """Decays from each position of a chunk [N, H, 1, C, C], to it and those after it; 0 elsewhere."""
        future = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=self.rows.device).triu(1)
        return (self.decay - self.decay.mT).masked_fill_(future, float("-inf")).exp_()[:, :, None]

    def to_end(self) -> torch.Tensor:
        """Decays from each position to the last one of its chunk [N, H, C, 1]."""
        return (self.decay[:, :, -1:] - self.decay).exp()

    def whole(self) -> torch.Tensor:
        """Decays over a chunk [N, H, 1, 1]."""
        return self.decay[:, :, -1:].exp()

    def since_start(self) -> torch.Tensor:
        """Decays from before a chunk to each row's position [N, H, P, 1]."""
        return self.decay.exp().repeat(1, 1, 2, 1)

    def factors(self) -> torch.Tensor:
        """Beta for the rows of keys, 1 for those of queries [N, H, P, 1]."""
        return torch.cat((self.beta, torch.ones_like(self.beta)), 2)

    def of_queries_and_keys(
        self, gradient_NHPD: torch.Tensor, query_BTGD: torch.Tensor, key_BTGD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of queries and keys, from those of their rows."""
        samples, _, heads, width = key_BTGD.shape
        summed = gradient_NHPD.view(len(gradient_NHPD), samples * heads, -1, *gradient_NHPD.shape[2:]).sum(2)
        found = []
        for x_BTGD, own, scale in (
            (query_BTGD, summed[:, :, _CHUNK:], width**-0.5),
            (key_BTGD, summed[:, :, :_CHUNK], 1.0),
        ):
            gradient_NHCD = own * scale
            if self.norm:
                x_NHCD = _in_chunks(x_BTGD)
                inverse = _inverse_length(x_NHCD)
                unit = x_NHCD * inverse
                along = (unit * gradient_NHCD).sum(-1, keepdim=True)
                gradient_NHCD = torch.addcmul(gradient_NHCD, unit, along, value=-1).mul_(inverse)
            found.append(_positions_first(gradient_NHCD, x_BTGD.shape))
        return found[0], found[1]


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """What the backward pass needs.

    Attributes:
        inverse: of each chunk's system [N, H, C, C].
        attention: within each chunk [N, H, C, C].
        z: values less what the state says [N, H, C, W].
    """

    inverse: torch.Tensor
    attention: torch.Tensor
    z: torch.Tensor

    @classmethod
    def empty(cls, value_BTVW: torch.Tensor) -> _Kept:
        """Uninitialised, before what is forgotten soon: else that would leave holes between them."""
        samples, positions, heads, width = value_BTVW.shape
        sizes = [-(-positions // _CHUNK), samples * heads, _CHUNK]
        empty = [value_BTVW.new_empty(*sizes, last, dtype=torch.float32) for last in (_CHUNK, _CHUNK, width)]
        return cls(*empty)


@dataclass(frozen=True, slots=True, eq=False)
class _Gradients:
    """Of the rows [N, H, P, D], the values [N, H, C, W], betas and summed decays [N, H, C, 1]."""

    rows: torch.Tensor
    value: torch.Tensor
    beta: torch.Tensor
    decay: torch.Tensor


def _within(chunks: _Chunks, kept: _Kept) -> None:
    """Make the inverses and the attention."""
    products = (chunks.rows * chunks.factors()) @ chunks.keys.mT
    _halves(products).mul_(chunks.between())
    one = torch.eye(_CHUNK, device=products.device)
    kept.attention.copy_(products[:, :, _CHUNK:])
    torch.linalg.solve_triangular(products[:, :, :_CHUNK], one, upper=False, unitriangular=True, out=kept.inverse)


def _scan(chunks: _Chunks, kept: _Kept, value: torch.Tensor) -> torch.Tensor:
    """Go from chunk to chunk with a state; outputs [N, H, C, W], for values of that shape."""
    since_start = chunks.since_start()
    moving, whole = chunks.keys * chunks.to_end(), chunks.whole()
    out = torch.empty_like(value)
    state = value.new_zeros(value.shape[1], chunks.rows.shape[3], value.shape[3])
    for n in range(len(value)):
        known = torch.bmm(chunks.rows[n], state).mul_(since_start[n])
        torch.sub(value[n], known[:, :_CHUNK], out=kept.z[n])
        y = torch.bmm(kept.inverse[n], kept.z[n] * chunks.beta[n])
        torch.baddbmm(known[:, _CHUNK:], kept.attention[n], y, out=out[n])
        state = torch.baddbmm(state * whole[n], moving[n].mT, y)
    return out


def _scan_back(chunks: _Chunks, kept: _Kept, gradient: torch.Tensor) -> _Gradients:
    """Gradients, from the last chunk to the first, of what `gradient` [N, H, C, W] is that of the outputs of.

    A decay multiplies a row, or divides it, wherever the row is: so the products of rows with their gradients are the
    gradients of the decays' logarithms (Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient
    Training", 2024).
    """
    whole, to_end, factors = chunks.whole(), chunks.to_end(), chunks.factors()
    moving = chunks.keys * to_end
    y = kept.inverse @ (kept.z * chunks.beta)
    apart, of_states, laters = _down(chunks, kept, moving, gradient)
    states = _states(moving, whole, y)
    plus = of_states @ states.mT
    of_moving = y @ laters.mT
    of_whole = whole * states.mul_(laters).sum((2, 3), keepdim=True) + (moving * of_moving).sum((2, 3), keepdim=True)
    del of_states, states, laters, moving  # a window's temporaries are what threads need most memory for
    of_products = apart @ y.mT
    _halves(of_products).mul_(chunks.between())
    of_products[:, :, :_CHUNK].tril_(-1)
    minus = (of_products.mT @ (chunks.rows * factors)).addcmul_(of_moving, to_end)
    multiplied = of_products @ chunks.keys
    plus.addcmul_(multiplied, factors)
    beta = _sum(chunks.keys * multiplied[:, :, :_CHUNK]) - _sum(apart[:, :, :_CHUNK] * kept.z)
    del multiplied
    decay = _halves(_sum(chunks.rows * plus)).sum(2) - _sum(chunks.keys * minus)
    decay[:, :, -1:] += of_whole
    plus[:, :, :_CHUNK] += minus
    return _Gradients(plus, apart[:, :, :_CHUNK] * -chunks.beta, beta, decay)


def _states(moving: torch.Tensor, whole: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The state before each chunk [N, H, D, W]."""
    states = y.new_zeros(*y.shape[:2], moving.shape[3], y.shape[3])
    for n in range(1, len(y)):
        torch.baddbmm(states[n - 1] * whole[n - 1], moving[n - 1].mT, y[n - 1], out=states[n])
    return states


def _down(
    chunks: _Chunks, kept: _Kept, moving: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The part of the backward pass that goes from chunk to chunk.

    Gradients of `-beta z` above those of the outputs, of the rows' products with the states, both [N, H, P, W], and of
    the states after each chunk [N, H, D, W].
    """
    whole = chunks.whole()
    factors = chunks.factors().mul_(chunks.since_start())
    apart = torch.cat((gradient, gradient), 2)
    of_states, of_y = torch.empty_like(apart), kept.attention.mT @ gradient
    laters = gradient.new_zeros(*gradient.shape[:2], moving.shape[3], gradient.shape[3])
    for n in reversed(range(len(gradient))):
        arrived = torch.baddbmm(of_y[n], moving[n], laters[n])
        torch.neg(torch.bmm(kept.inverse[n].mT, arrived), out=apart[n, :, :_CHUNK])
        torch.mul(apart[n], factors[n], out=of_states[n])
        if n:
            torch.baddbmm(laters[n] * whole[n], chunks.rows[n].mT, of_states[n], out=laters[n - 1])
    return apart, of_states, laters


def _halves(x_NHPD: torch.Tensor) -> torch.Tensor:
    """Those of keys and those of queries [N, H, 2, C, D]."""
    return x_NHPD.view(*x_NHPD.shape[:2], 2, _CHUNK, x_NHPD.shape[3])


def _added_up(x_NHC1: torch.Tensor) -> torch.Tensor:
    """Each position's sum of itself and those before it in its chunk, float32.

    torch has no cumulative sum of floats that it calls deterministic on GPUs; there it is a product.
    """
    if x_NHC1.device.type == "cpu":
        return x_NHC1.cumsum(2)
    return torch.ones(_CHUNK, _CHUNK, device=x_NHC1.device).tril() @ x_NHC1


def _sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1, keepdim=True)


def _inverse_length(x: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt_(_sum(x * x).add_(_EPSILON))


def _in_chunks(x_BTVD: torch.Tensor) -> torch.Tensor:
    """[B, T, V, D] -> float32 [N, B * V, C, D], zeros at the end."""
    samples, positions, heads, width = x_BTVD.shape
    padded = functional.pad(x_BTVD, (0, 0, 0, 0, 0, -positions % _CHUNK))
    chunks = padded.reshape(samples, -1, _CHUNK, heads, width).permute(1, 0, 3, 2, 4)
    wide = chunks.to(torch.float32, memory_format=torch.contiguous_format)  # as it is, if it is float32 already
    return wide.contiguous().flatten(1, 2)


def _positions_first(x_NHCD: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[N, B * V, C, D] -> [B, T, V, D], or [B, T, V] for a D of one."""
    samples, positions, heads, *_ = shape
    apart = x_NHCD.view(len(x_NHCD), samples, heads, *x_NHCD.shape[2:]).permute(1, 0, 3, 2, 4)
    return apart.reshape(samples, -1, heads, x_NHCD.shape[3])[:, :positions].reshape(shape)


@cache
def computes_the_same(rule: Rule) -> bool:
    """Whether `rule`, of whatever version of transformers, and this one agree on a small example.

    One that cannot be called so does not.
    """
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, _CHUNK + 6, 2, 8, generator=random) for _ in range(2))
    v = torch.randn(1, _CHUNK + 6, 4, 8, generator=random)
    g, beta = (torch.rand(1, _CHUNK + 6, 4, generator=random) for _ in range(2))
    for norm in (True, False):
        rules = (gated_delta_rule, rule)
        try:
            found, expected = (f(q / 4, k / 4, v, g=-g, beta=beta, use_qk_l2norm_in_kernel=norm)[0] for f in rules)
        except (RuntimeError, TypeError):
            return False
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
            return False
    return True
