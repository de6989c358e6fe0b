"""The gated delta rule in chunks, with a backward pass whose cost grows with the length and not with its square.

The numbers of transformers' own torch version, bit for bit but in the gradient of the decays, where sums are rounded
otherwise: Yang et al., "Gated Delta Networks" (2024), in the form of Yang et al., "Parallelizing Linear Transformers
with the Delta Rule" (2024). That version takes each chunk by its index from tensors of all chunks, so each chunk's
gradient is a tensor of all chunks, nearly all of it zero: here they are taken apart and put together once. Carries no
state from call to call.
"""

# B: samples, T: positions, G: query and key heads, V: value heads, D: a key's width, W: a value's width; N: chunks,
# C: positions of a chunk.

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
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
    served = value_BTVW.shape[2] // key_BTGD.shape[2]
    q, k = (_heads_first(x.repeat_interleave(served, dim=2)) for x in (query_BTGD, key_BTGD))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + _EPSILON) for x in (q, k))
    qkv = _chunks(q * q.shape[-1] ** -0.5), _chunks(k), _chunks(_heads_first(value_BTVW))
    beta_BVNC1, decay_BVNC1 = (_chunks(_heads_first(x)[..., None]) for x in (beta, g))
    out_BVTW = _scan(*_within_chunks(qkv, beta_BVNC1, decay_BVNC1.squeeze(-1).cumsum(dim=3)))
    out_BTVW = out_BVTW[:, :, : query_BTGD.shape[1]].transpose(1, 2)
    return out_BTVW.to(query_BTGD.dtype, memory_format=torch.contiguous_format), None


def _heads_first(x_BTV: torch.Tensor) -> torch.Tensor:
    return x_BTV.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)


def _chunks(x_BVTD: torch.Tensor) -> torch.Tensor:
    """[B, V, T, D] -> [B, V, N, C, D], zeros at the end."""
    padded = functional.pad(x_BVTD, (0, 0, 0, -x_BVTD.shape[2] % _CHUNK))
    return padded.reshape(*x_BVTD.shape[:2], -1, _CHUNK, x_BVTD.shape[3])


def _within_chunks(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], beta_BVNC1: torch.Tensor, decay_BVNC: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What each chunk has of its own, with its decays in it; `decay` is summed from the start of the chunk."""
    q, k, v = qkv
    future = torch.ones(_CHUNK, _CHUNK, dtype=torch.bool, device=q.device).triu(1)
    pairwise = (decay_BVNC.unsqueeze(4) - decay_BVNC.unsqueeze(3)).masked_fill(future, float("-inf")).exp()
    v_beta, k_beta = v * beta_BVNC1, k * beta_BVNC1
    system = (k_beta @ k.transpose(-1, -2)) * pairwise
    attention = (q @ k.transpose(-1, -2)) * pairwise
    since_start = decay_BVNC.exp().unsqueeze(-1)
    new_values = torch.linalg.solve_triangular(system, v_beta, upper=False, unitriangular=True)
    old_keys = torch.linalg.solve_triangular(system, k_beta * since_start, upper=False, unitriangular=True)
    until_end = (decay_BVNC[..., -1:] - decay_BVNC).exp().unsqueeze(-1)
    whole = decay_BVNC[..., -1].exp()[..., None, None]
    return new_values, old_keys, q * since_start, attention, k * until_end, whole


def _scan(*parts: torch.Tensor) -> torch.Tensor:
    """Go from chunk to chunk with a state [B, V, D, W]; outputs [B, V, N * C, W]."""
    outs, shape = [], (*parts[0].shape[:2], parts[1].shape[-1], parts[0].shape[-1])
    state = parts[0].new_zeros(shape)
    for new_values, old_keys, q, attention, k, whole in zip(*(part.unbind(2) for part in parts), strict=True):
        corrected = new_values - old_keys @ state
        outs.append(q @ state + attention @ corrected)
        state = state * whole + k.transpose(-1, -2) @ corrected
    return torch.stack(outs, 2).flatten(2, 3)


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
