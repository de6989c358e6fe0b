"""What the libraries beneath are told: how torch adds on a GPU, and what memory the C library and oneDNN keep.

By default, or because a container's environment says so, GPUs multiply float32 in fewer bits, add products of bfloat16
up in bfloat16, and let the order of sums be that of the threads which happen to end first. Figures of two machines
would differ by more than their rounding, and a run that was stopped would not end with the bytes of one that was not.
These settings are torch's own and hold for the process, until the context ends. On the CPU nothing changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, Final, Protocol

import torch

from shardxform.errors import ExecutionError

__all__ = ["PassContext", "any_order", "fixed_order", "give_back", "keep_few_kernels", "keep_one_heap", "on_device"]

_WARN, _FIXED = 1, 2  # as `torch.set_deterministic_debug_mode` has them
_WORKSPACE: Final = "CUBLAS_WORKSPACE_CONFIG"


class PassContext(Protocol):
    """What torch gives the two passes of an `autograd.Function` to share; functions add attributes of their own."""

    saved_tensors: tuple[torch.Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        """Keep tensors for the backward pass."""
        ...


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Compute there: float32 multiplied in float32, products of bfloat16 added up in float32.

    TF32 has 10 bits of mantissa: convolutions use it by default, products where `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE` is
    set, as it is in images of GPU makers. cuBLAS is also given workspaces of a fixed size, without which torch does not
    call it deterministic; it reads that when a process multiplies for the first time.

    Raises:
        ExecutionError: the device ran out of memory.

    """
    with contextlib.ExitStack() as stack:
        if device.type != "cpu":
            os.environ.setdefault(_WORKSPACE, ":4096:8")
            stack.enter_context(_exact_products())
        try:
            yield
        except torch.OutOfMemoryError as e:
            raise ExecutionError(
                f"{device}: {str(e).splitlines()[0]} Tuning takes less with smaller batches; what is done is safe"
            ) from e


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before[:2]
        cudnn.allow_tf32, cudnn.benchmark = before[2:]


@contextlib.contextmanager
def fixed_order(device: torch.device) -> Iterator[None]:
    """Have a GPU add in a fixed order in backward passes, and refuse what it cannot add so.

    For what learns; passes that only go forward add nothing up across threads. Merely to be warned is not enough: then
    the backward pass of attention stays as it is. torch would also fill all memory that it hands out, to make its use
    before it is written repeatable; that is a sweep over every chunk of weights, and what is used here is written
    first.
    """
    if device.type == "cpu":
        yield
        return
    memory: Any = importlib.import_module("torch.utils.deterministic")  # its class has the property
    before, filled = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(_FIXED)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        memory.fill_uninitialized_memory = filled


@contextlib.contextmanager
def any_order() -> Iterator[None]:
    """Within `fixed_order`, allow what cannot be added in a fixed order, and have torch warn of it."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(min(before, _WARN))
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


# -- memory ------------------------------------------------------------------------------------------------------------


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
    few kernels serve (`tuning.modules`). Both capacities are read when the process multiplies for the first time; they
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
