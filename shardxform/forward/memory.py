"""Giving freed memory back to the system, where the C library keeps it: glibc."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["give_back"]


def give_back() -> None:
    """Return what is free to the system; nothing happens where there is no such call.

    A block's experts are thousands of pieces of a few megabytes, which glibc keeps when they are freed, in holes that
    the next block's pieces do not quite fit.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:  # noqa: ANN401
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):  # another C library
        return None
