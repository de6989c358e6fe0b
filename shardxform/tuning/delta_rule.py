"""The gated delta rule in chunks, with a backward pass of its own: linear in the length, and little is stored for it.

The outputs of transformers' own torch version, bit for bit, and its gradients up to rounding: Yang et al., "Gated Delta
Networks" (2024), in the form of Yang et al., "Parallelizing Linear Transformers with the Delta Rule" (2024). That
version takes each chunk by its index from tensors of all chunks, so each chunk's gradient is a tensor of all chunks,
nearly all of it zero; and it stores all that is within chunks. This one stores the states between them. Its backward
pass makes what is within chunks again, by the inverse of their systems. Carries no state from call to call.
"""

# B: samples, T: positions, G: query and key heads, V: value heads, D: a key's width, W: a value's width; N: chunks,
# C: positions of a chunk.

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Final

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["computes_the_same", "gated_delta_rule"]

_CHUNK: Final = 64
_EPSILON: Final = 1e-6


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
    out_BTVW: torch.Tensor = _Rule.apply(*tensors, use_qk_l2norm_in_kernel)  # type: ignore[no-untyped-call]
    return out_BTVW, None


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:  # noqa: ANN401
        *tensors, norm = inputs
        out_BVTW, states = _scan(_within_chunks(*_in_chunks(*tensors, norm=norm), _solved))
        ctx.save_for_backward(*tensors, *states)
        ctx.norm = norm
        out_BTVW = out_BVTW[:, :, : tensors[0].shape[1]].transpose(1, 2)
        return out_BTVW.to(tensors[0].dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTVW: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        saved = ctx.saved_tensors
        tensors, states = saved[:5], saved[5:]
        wanted = ctx.needs_input_grad[:5]
        inputs = [x.detach().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
        with torch.enable_grad():
            parts = _within_chunks(*_in_chunks(*inputs, norm=ctx.norm), _inverted)
        with torch.no_grad():
            gradients = _scan_back(parts, states, _chunks(_heads_first(gradient_BTVW)))
        reached = [(part, gradient) for part, gradient in zip(parts, gradients, strict=True) if part.requires_grad]
        outs, arriving = zip(*reached, strict=True)
        found = iter(torch.autograd.grad(outs, [x for x in inputs if x.requires_grad], arriving))
        return (*(next(found) if w else None for w in wanted), None)


def _in_chunks(
    query_BTGD: torch.Tensor,
    key_BTGD: torch.Tensor,
    value_BTVW: torch.Tensor,
    beta_BTV: torch.Tensor,
    g_BTV: torch.Tensor,
    *,
    norm: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys, values, betas and decays, the last [B, V, N, C] and summed from the start of their chunks."""
    served = value_BTVW.shape[2] // key_BTGD.shape[2]
    q, k = (_heads_first(x.repeat_interleave(served, dim=2)) for x in (query_BTGD, key_BTGD))
    if norm:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + _EPSILON) for x in (q, k))
    beta_BVNC1, decay_BVNC1 = (_chunks(_heads_first(x)[..., None]) for x in (beta_BTV, g_BTV))
    q = q * q.shape[-1] ** -0.5
    return _chunks(q), _chunks(k), _chunks(_heads_first(value_BTVW)), beta_BVNC1, decay_BVNC1.squeeze(-1).cumsum(dim=3)


def _heads_first(x_BTV: torch.Tensor) -> torch.Tensor:
    return x_BTV.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _chunks(x_BVTD: torch.Tensor) -> torch.Tensor:
    """[B, V, T, D] -> [B, V, N, C, D], zeros at the end."""
    padded = functional.pad(x_BVTD, (0, 0, 0, -x_BVTD.shape[2] % _CHUNK))
    return padded.reshape(*x_BVTD.shape[:2], -1, _CHUNK, x_BVTD.shape[3])


def _within_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta_BVNC1: torch.Tensor,
    decay_BVNC: torch.Tensor,
    solver: Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]],
) -> tuple[torch.Tensor, ...]:
    """What each chunk has of its own, with its decays in it; `solver(system)(x)` is the y of `system @ y = x`."""
    future = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=q.device).triu(1)
    pairwise = (decay_BVNC.unsqueeze(4) - decay_BVNC.unsqueeze(3)).masked_fill(future, float("-inf")).exp()
    v_beta, k_beta = v * beta_BVNC1, k * beta_BVNC1
    solved = solver((k_beta @ k.transpose(-1, -2)) * pairwise)
    attention = (q @ k.transpose(-1, -2)) * pairwise
    since_start = decay_BVNC.exp().unsqueeze(-1)
    new_values, old_keys = solved(v_beta), solved(k_beta * since_start)
    until_end = (decay_BVNC[..., -1:] - decay_BVNC).exp().unsqueeze(-1)
    whole = decay_BVNC[..., -1].exp()[..., None, None]
    return new_values, old_keys, q * since_start, attention, k * until_end, whole


def _solved(system: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """As transformers does it: below the diagonal the system, on it ones."""
    return partial(torch.linalg.solve_triangular, system, upper=False, unitriangular=True)


def _inverted(system: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    inverse: torch.Tensor = _Inverse.apply(system)  # type: ignore[no-untyped-call]
    return inverse.matmul


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, system: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        inverse = _solved(system)(torch.eye(_CHUNK, device=system.device).expand_as(system))
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        (inverse,) = ctx.saved_tensors
        transposed: torch.Tensor = inverse.transpose(-1, -2)
        return (transposed @ gradient @ transposed).tril_(-1).neg_()


def _scan(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Go from chunk to chunk with a state; outputs [B, V, N * C, W], and the state [B, V, D, W] before each chunk."""
    outs, states = [], []
    state = parts[0].new_zeros(*parts[0].shape[:2], parts[1].shape[-1], parts[0].shape[-1])
    for new_values, old_keys, q, attention, k, whole in zip(*(part.unbind(2) for part in parts), strict=True):
        states.append(state)
        corrected = new_values - old_keys @ state
        outs.append(q @ state + attention @ corrected)
        state = state * whole + k.transpose(-1, -2) @ corrected
    return torch.stack(outs, 2).flatten(2, 3), states


def _scan_back(
    parts: tuple[torch.Tensor, ...], states: tuple[torch.Tensor, ...], gradient_BVNCW: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of the parts, from the last chunk to the first."""
    gradients = tuple(torch.empty_like(part) for part in parts)
    later = torch.zeros_like(states[0])  # the gradient of the state after the chunk
    for n in reversed(range(len(states))):
        new_values, old_keys, q, attention, k, whole = (part[:, :, n] for part in parts)
        state, gradient = states[n], gradient_BVNCW[:, :, n]
        corrected = new_values - old_keys @ state
        of_corrected = attention.transpose(-1, -2) @ gradient + k @ later
        state_WD = state.transpose(-1, -2)
        found = (
            of_corrected,
            -(of_corrected @ state_WD),
            gradient @ state_WD,
            gradient @ corrected.transpose(-1, -2),
            corrected @ later.transpose(-1, -2),
            (state * later).sum((-1, -2), keepdim=True),
        )
        for out, one in zip(gradients, found, strict=True):
            out[:, :, n] = one
        later = later * whole + q.transpose(-1, -2) @ gradient - old_keys.transpose(-1, -2) @ of_corrected
    return gradients


@cache
def computes_the_same(rule: Callable[..., Any]) -> bool:
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
