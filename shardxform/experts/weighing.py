"""What the weights alone say of every expert, without text and without running the model: numpy, a tile at a time."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform import __version__
from shardxform.base import interrupts
from shardxform.base.file_system import FileSystem
from shardxform.base.progress import OnProgress, Progress
from shardxform.checkpoint.identity import identify
from shardxform.checkpoint.remote.repository import open_source
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ExecutionError, FamilyError
from shardxform.execution.transcoding import reading
from shardxform.experts.statistics import ExpertStats, Saliency
from shardxform.formats.decoding import decoded
from shardxform.formats.encoding import DECODE_TILE, Opener, row_tiles
from shardxform.formats.matrices import Matrix, matrices_of
from shardxform.formats.stored import read_stored
from shardxform.model.layout import Layout, is_quantized, layout_of

__all__ = ["experts_of", "model_facts", "weigh"]

_SUMS: Final = 3  # of |w|, of w^2, and of ones


def model_facts(source: Checkpoint, layout: Layout | None = None) -> dict[str, Any]:
    """What a `Saliency` says of the model that was scored; it binds its values, and not their times.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    layout = layout or layout_of(source.config, source.tensors, source.where)
    identity = identify(source)
    return {
        "model_type": layout.wrapper.model_type,
        "num_layers": layout.num_layers,
        "num_experts": layout.num_experts,
        "num_experts_per_tok": layout.top_k,
        "num_groups": layout.groups,
        "source_fingerprint": identity.fingerprint,
        "identity": identity.described(),
    }


def weigh(source: Checkpoint, on_progress: OnProgress | None = None) -> Saliency:
    """Read the weights of every routed expert once, and tell how far they are from all alike in size.

    MTP layers included. Whatever the weights are stored in, their values are what counts.

    Raises:
        FamilyError: the family has no experts.
        SchemeError, CheckpointError: the source is quantized in a way that is not read, or malformed.
        ExecutionError: weights that are not finite.

    """
    layout, matrices = experts_of(source)
    if not layout.moe_layers:
        raise FamilyError(f"{source.where}: no layer has experts; there is nothing to weigh")
    sums: dict[tuple[str, int], NDArray[np.float64]] = {}
    total = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices)
    done = 0
    with contextlib.closing(open_source(source.root, source.remote, FileSystem())) as reader:
        opener = Opener(reading(reader))
        for matrix in matrices:
            interrupts.check()
            assert matrix.expert is not None
            assert matrix.place.layer is not None
            scope = "mtp_layers" if matrix.place.scope == "mtp" else "layers"
            into = sums.setdefault((scope, matrix.place.layer), np.zeros((layout.num_experts, _SUMS)))
            into[matrix.expert] += _sums(matrix, opener)
            done += matrix.shape[0] * matrix.shape[1]
            if on_progress:
                on_progress(Progress(done=2 * done, total=2 * total, resumed=0))
    found: dict[str, dict[int, ExpertStats]] = {"layers": {}, "mtp_layers": {}}
    for (scope, layer), sums_E3 in sums.items():
        found[scope][layer] = ExpertStats(spread_E=_spread(sums_E3))
    return Saliency(
        model=model_facts(source, layout),
        layers=found["layers"],
        mtp_layers=found["mtp_layers"],
        tokens=0,
        runs=({"tool": f"shardxform {__version__}", "weights": total},),
        where=source.where,
    )


def experts_of(source: Checkpoint) -> tuple[Layout, list[Matrix]]:
    """The layout, and every matrix of a routed expert of a decoder block or MTP layer, whatever it is stored in."""
    plain = decoded(source)
    tensors = (plain or source).tensors
    config = (plain or source).config
    if plain is None and any(is_quantized(ref.spec) for ref in tensors.values()):
        stored = read_stored(source)
        layout, tensors = stored.layout, {**stored.plain, **stored.weights}
    else:
        layout = layout_of(config, tensors, source.where)
    scopes = ("block", "mtp")
    return layout, [
        matrix
        for matrix in matrices_of(layout, tensors)
        if matrix.expert is not None and matrix.place.scope in scopes and matrix.place.layer is not None
    ]


def _sums(matrix: Matrix, opener: Opener) -> NDArray[np.float64]:
    """Sums over the weights of a matrix: of |w|, of w^2, of ones, float64 [3].

    Raises:
        ExecutionError: they are not finite; names the matrix.

    """
    out = np.zeros(_SUMS)
    for storage in matrix.stored:
        rows = opener.open(storage)
        for start, stop in row_tiles(rows.count, matrix.shape[1], DECODE_TILE):
            values_RI = rows.values(start, stop)
            out += (np.abs(values_RI).sum(dtype=np.float64), np.square(values_RI).sum(dtype=np.float64), values_RI.size)
    if not np.isfinite(out).all():
        raise ExecutionError(f"weight '{matrix.name}': NaN or infinity; expected finite weights")
    return out


def _spread(sums_E3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Root mean square over mean absolute value, 0 where all weights are 0; float64 [E]."""
    absolute_E, square_E, count_E = sums_E3.T
    root_E: NDArray[np.float64] = np.sqrt(square_E * count_E)
    out_E = np.zeros_like(root_E)
    np.divide(root_E, absolute_E, out=out_E, where=absolute_E > 0)
    return out_E
