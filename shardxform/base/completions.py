"""Waiting for futures without holding a lock of theirs: each tells of itself, through a queue.

`concurrent.futures.wait` holds the conditions of all of them while it looks. A KeyboardInterrupt at that moment leaves
them held, and every thread that completes one of them waits for ever.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Final, Generic, TypeVar

__all__ = ["Completions"]

K = TypeVar("K")
V = TypeVar("V")

_LOOK: Final = 0.2  # seconds


class Completions(Generic[V, K]):
    """Futures under way, used by one thread.

    Attributes:
        pending: what each is for; the user takes out what it is done with.

    """

    def __init__(self) -> None:
        self.pending: dict[Future[V], K] = {}
        self._told: SimpleQueue[Future[V]] = SimpleQueue()

    def add(self, future: Future[V], key: K) -> None:
        """Wait for one more."""
        self.pending[future] = key
        future.add_done_callback(self._told.put)

    def next(self) -> list[Future[V]]:
        """Those that completed and were not given yet, in that order; none if none does within a moment."""
        found: list[Future[V]] = []
        with contextlib.suppress(Empty):
            found.append(self._told.get(timeout=_LOOK))
            while True:
                found.append(self._told.get_nowait())
        return found

    def wait(self) -> None:
        """Return when none is under way any more."""
        while not all(future.done() for future in self.pending):
            self.next()
