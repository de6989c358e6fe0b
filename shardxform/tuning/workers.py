"""Threads for the tuner: results come back in the order of the tasks, a few at a time, whoever finishes first.

Every task runs with one torch thread and without autograd, so what it computes does not depend on how many run beside
it. Scratch memory belongs to a thread and is used again.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

from shardxform.errors import SchemeError
from shardxform.forward.runtime import keep_one_heap

__all__ = ["Workers", "one_thread"]

A = TypeVar("A")
B = TypeVar("B")


class Workers:
    """A pool of threads; close it, or use it as a context manager."""

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise SchemeError(f"threads: expected at least 1, found {threads}")
        keep_one_heap()
        self.threads = threads
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(threads, "tune", torch.set_num_threads, (1,))

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; tasks that have not begun are dropped."""
        self._pool.shutdown(cancel_futures=True)

    def ordered(self, function: Callable[[A], B], items: Iterable[A], at_once: int | None = None) -> Iterator[B]:
        """Yield `function(item)` for every item, in order; at most two results a thread wait to be taken.

        With `at_once`, no more than so many are under way or wait to be taken, whatever the threads.

        One thread is the caller's own, where that has one torch thread as well: memory that it freed is used again.
        """
        most = min(at_once or sys.maxsize, 2 * self.threads + 1)
        if min(self.threads, most) == 1 and torch.get_num_threads() == 1:
            yield from (_quietly(function, item) for item in items)
            return
        waiting: deque[Future[B]] = deque()
        for item in items:
            waiting.append(self._pool.submit(_quietly, function, item))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def each(self, function: Callable[[A], object], items: Iterable[A]) -> None:
        """Call `function(item)` for every item."""
        for _ in self.ordered(function, items):
            pass

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of this thread on the host, the same again for the same name."""
        held: dict[str, torch.Tensor] = self._local.__dict__
        size = 1
        for n in shape:
            size *= n
        flat = held.get(name)
        if flat is None or flat.numel() < size or flat.dtype != dtype:
            flat = held[name] = torch.empty(size, dtype=dtype)
        return flat[:size].view(shape)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Have torch's own sums in one order: it may depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _quietly(function: Callable[[A], B], item: A) -> B:
    with torch.no_grad():
        return function(item)
