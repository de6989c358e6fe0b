"""Matrices whose rows are worked out from those of the source, each by itself: columns picked, experts' ids renumbered.

What becomes of the id of a pruned expert is a rule, known before any data is read: the next kept expert by number,
after the last the first again, that the row does not name yet, slots from left to right. So every row still names as
many different experts as it did, and no id of a pruned expert remains.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.base.tensors import Remade

__all__ = ["DTYPES", "remade_rows", "strange_ids"]

DTYPES: Final = {1: "<u1", 2: "<u2", 4: "<u4", 8: "<u8"}
"""Of elements so many bytes wide, where only their bits matter."""


def remade_rows(remade: Remade, rows: NDArray[Any]) -> NDArray[Any]:
    """Rows as they become; those of ids must name experts that there are.

    Args:
        remade: what is done.
        rows: a run of rows of its source.

    """
    if remade.what == "columns":
        return np.ascontiguousarray(rows[:, np.array(remade.keep, np.intp)])
    return _renumbered(rows, np.array(remade.keep, np.int64), remade.experts)


def strange_ids(rows: NDArray[Any], experts: int) -> NDArray[np.bool_]:
    """Where ids name no expert."""
    strange: NDArray[np.bool_] = (rows < 0) | (rows >= experts)
    return strange


def _renumbered(rows: NDArray[Any], keep: NDArray[np.int64], experts: int) -> NDArray[Any]:
    following = np.searchsorted(keep, np.arange(experts)) % len(keep)  # new id of the expert, or of the next that stays
    stays = np.zeros(experts, np.bool_)
    stays[keep] = True
    out, settled = following[rows], stays[rows]
    for slot in range(rows.shape[1]):
        for _ in keep:
            clash = ~settled[:, slot] & ((out == out[:, slot, None]) & settled).any(axis=1)
            if not clash.any():
                break
            out[clash, slot] = (out[clash, slot] + 1) % len(keep)
        settled[:, slot] = True
    return np.asarray(out, rows.dtype)
