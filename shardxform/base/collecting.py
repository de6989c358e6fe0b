"""Making many values without looks for cyclic garbage.

A plan of 72 GB is a million small frozen values that hold no cycle. While they are made, the interpreter looks through
all of them for cycles again and again, which takes longer than making them.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["uncollected"]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Look for no cycles meanwhile; also a decorator. For short work on values: tensors may be held in cycles."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
