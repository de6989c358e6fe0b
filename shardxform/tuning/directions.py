"""Which way weights go in a step of healing: as the nearest orthogonal matrix to the gradient, a run of rows at a time.

Sign steps let the few large directions of a gradient decide: those that all tokens share. Here all directions count
alike (Bernstein & Newhouse, "Old Optimizer, New Norm", 2024; Jordan et al., "Muon", 2024, whose momentum is left out:
nothing is kept from step to step). Rows arrive in runs, and each run is a matrix of its own. No weights, no step sizes.
"""

# M: matrices, R: a run of rows, I: input columns, S: the shorter of the two.

from __future__ import annotations

import math

import torch

from shardxform.base.constants import (
    GRADIENT_SQUARES,
    LARGEST_MOVE,
    LEAST_GRADIENT,
    NEWTON_SCHULZ,
    ORTHOGONAL_ITERS,
    ORTHOGONAL_ROWS,
)

__all__ = ["direction", "directions", "signs"]


def signs(x: torch.Tensor) -> torch.Tensor:
    """-1, 0 or 1 in float32; 0 for NaN."""
    return torch.sign(torch.nan_to_num(x.float(), nan=0.0))


def direction(gradient: torch.Tensor) -> torch.Tensor:
    """Direction of a parameter, float32: that of a matrix, or the sign of what is none."""
    return directions(gradient[None])[0] if gradient.ndim == 2 else signs(gradient)


def directions(gradient_MRI: torch.Tensor) -> torch.Tensor:
    """Directions of matrices, float32 [M, R, I]: the root mean square of a run is near 1 or less, within the clip.

    Of a run that is not finite the signs are taken first, 0 for NaN; one of zeros stays.
    """
    out_MRI = torch.empty(gradient_MRI.shape, dtype=torch.float32, device=gradient_MRI.device)
    for run_MRI, to_MRI in zip(_runs(gradient_MRI), _runs(out_MRI), strict=True):
        _orthogonal_into(run_MRI.float(), to_MRI)
    return out_MRI.clamp_(-LARGEST_MOVE, LARGEST_MOVE)


def _runs(x_MRI: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(x_MRI, ORTHOGONAL_ROWS, dim=1)


def _orthogonal_into(x_MRI: torch.Tensor, out_MRI: torch.Tensor) -> None:
    """As large as the shape of a run says, so that one with few directions moves less."""
    gram_MSS, square_M11 = _gram(x_MRI)
    if not bool(((square_M11 > GRADIENT_SQUARES[0]) & (square_M11 < GRADIENT_SQUARES[1])).all()):
        x_MRI = _bounded(x_MRI)
        gram_MSS, square_M11 = _gram(x_MRI)
        square_M11 = square_M11.clamp(min=LEAST_GRADIENT)  # of zeros
    size = math.sqrt(max(x_MRI.shape[1:]))
    way_MSS = _inverse_root(gram_MSS / square_M11) * (size / square_M11.sqrt())
    torch.matmul(*((way_MSS, x_MRI) if x_MRI.shape[1] <= x_MRI.shape[2] else (x_MRI, way_MSS)), out=out_MRI)


def _gram(x_MRI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smaller Gram matrix, and the sum of all squares [M, 1, 1]."""
    gram_MSS = x_MRI @ x_MRI.mT if x_MRI.shape[1] <= x_MRI.shape[2] else x_MRI.mT @ x_MRI
    square_M = gram_MSS.diagonal(dim1=1, dim2=2).sum(1)
    return gram_MSS, square_M[:, None, None]


def _bounded(x_MRI: torch.Tensor) -> torch.Tensor:
    """Of a size whose squares are numbers of float32; signs where a value is none."""
    largest_M11 = x_MRI.abs().amax((1, 2), keepdim=True)
    return torch.where(largest_M11.isfinite(), x_MRI / largest_M11.clamp(min=LEAST_GRADIENT), signs(x_MRI))


def _inverse_root(gram_MSS: torch.Tensor) -> torch.Tensor:
    """About the inverse of the square root, by Newton-Schulz; of what is nearly zero, a few hundred."""
    first, second, third = NEWTON_SCHULZ
    one_SS = torch.eye(gram_MSS.shape[-1], device=gram_MSS.device)
    way_MSS = one_SS
    for done in range(ORTHOGONAL_ITERS):
        factor_MSS = torch.baddbmm(gram_MSS, gram_MSS, gram_MSS, beta=second, alpha=third).add_(one_SS, alpha=first)
        way_MSS = factor_MSS @ way_MSS if done else factor_MSS
        if done < ORTHOGONAL_ITERS - 1:
            gram_MSS = factor_MSS @ gram_MSS @ factor_MSS
    return way_MSS
