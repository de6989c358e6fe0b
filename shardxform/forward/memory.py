"""Memory that libraries keep: what the C library does not give back or holds for each thread, and oneDNN's kernels."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from typing import Any, Final

__all__ = ["give_back", "keep_few_kernels", "keep_one_heap"]

_CAPACITIES: Final = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")  # of oneDNN, and of torch above it
_KERNELS: Final = "64"
_HEAP: Final = {  # by the names that the environment has for them: number in glibc's malloc.h, value
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_THRESHOLD_": (-3, 1 << 25),
    "MALLOC_TRIM_THRESHOLD_": (-1, 1 << 26),
}


def give_back() -> None:
    """Return what is free to the system; nothing happens where there is no such call.

    A block's experts are thousands of pieces of a few megabytes, which glibc keeps when they are freed, in holes that
    the next block's pieces do not quite fit.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_one_heap() -> None:
    """Have threads that start from now on allocate from one heap, which keeps 64 MB; not what the environment sets.

    glibc gives every thread a heap of its own, and what one has freed no other uses. Threads that allocate megabytes
    and compute with them for long do not wait for each other. Pieces of less than 32 MB come from the heap, and its
    free end is given back from 64 MB on: where glibc itself arrives in steps. Until then it asks the system for every
    tensor anew, and each page of it costs: the backward pass of tuning's delta rule took half as much time again.
    """
    option = _of_glibc("mallopt")
    if option is not None:
        for name, (parameter, value) in _HEAP.items():
            if name not in os.environ:
                option(parameter, value)


def keep_few_kernels() -> None:
    """Have torch forget bfloat16 matrix products' kernels soon, unless the environment says otherwise.

    Both caches hold 1024 by default. Every number of tokens that an expert is sent is a shape, and so a kernel, of its
    own: 600 of them, in three products with weights of 1024 x 2048, took 0.8 GB. Tuning rounds these numbers so that
    few kernels serve (`tuning.experts`). Both capacities are read when the process multiplies for the first time; they
    do not change results.
    """
    for name in _CAPACITIES:
        os.environ.setdefault(name, _KERNELS)


@cache
def _of_glibc(name: str) -> Any:  # noqa: ANN401
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):  # another C library
        return None
