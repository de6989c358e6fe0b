"""SIGINT and SIGTERM: a command ends within seconds, on one line, with 130, whenever and however often they come.

Python's own way is an exception wherever the main thread happens to be: in a lock's `__enter__`, which then nobody
leaves, in a finalizer, which prints it and goes on, or on the way out of the first. So here no signal ever raises:

- What a command writes bears a kill at any instant. So a signal ends the process on the spot, with one line; that is
  the way out of imports, planning, calls of the hub, and of an interpreter that is on its own way out.
- Where there is more to save or to say, the main thread is in a `deferred()` block. There a signal sets a flag, and
  `check()`, which the loops in there call between two pieces of work, makes it a KeyboardInterrupt.
- Whoever does not get that far in a few seconds is ended by a thread that looks on, wherever it is stuck. Further
  signals change nothing.

Only the command line takes signals over for good. In a program that uses the library, Python's handler of SIGINT stands
aside inside `deferred()` blocks of the main thread, so that Ctrl-C is one KeyboardInterrupt, at a place that bears it;
SIGTERM, handlers that the program installed, and other threads are its own affair, and no thread looks on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Final, Generic, NoReturn, TypeVar

__all__ = [
    "STOPPED",
    "Completions",
    "asked",
    "check",
    "deferred",
    "during",
    "leave",
    "say_once",
    "settle",
    "take_over",
    "wait",
]

STOPPED: Final = "stopped; run the same command again to go on"
_CODE: Final = 130
_ORDERLY: Final = (
    8.0  # seconds until a process that ends in order is ended: less than the 10 s that `docker stop` gives
)
_UNSEEN: Final = 1.0  # seconds until one is whose main thread does not even come to look at a signal
_LOOK: Final = 0.05


class _State:
    """What is known of signals, in this process."""

    def __init__(self) -> None:
        self.taken = False  # all signals are ours until the end
        self.depth = 0  # of `deferred` blocks that the main thread is in
        self.asked = False  # to stop, inside of one
        self.leaving = False  # the main thread is in a handler that ends the process
        self.where = ""  # what the command is doing, for the last line
        self.last_word = threading.Lock()  # whoever gets it says why the process ends; it is never given back


_state = _State()


# -- the command line -------------------------------------------------------------------------------------------------


def take_over() -> None:
    """Have SIGINT and SIGTERM end this process as told above, from now on; one that is ignored stays so."""
    _state.taken = True
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # of a background job of a script
            signal.signal(number, _on_signal)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to even while the main thread is in a long call
    threading.Thread(target=_look_on, args=(reader,), name="interrupts", daemon=True).start()


def settle() -> None:
    """Everything is done and said: end now if that was asked for, else let no signal disturb the way out."""
    if _state.asked:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            sys.stdout.flush()
        if say_once():
            _say()
        os._exit(_CODE)
    for number in (signal.SIGINT, signal.SIGTERM):  # ignored: the interpreter would put back what kills
        signal.signal(number, signal.SIG_IGN)


def leave() -> NoReturn:
    """End the process here and now; the system lets go of its locks. Takes no lock: it may be called from a handler."""
    if say_once():
        _say()
    else:
        time.sleep(_LOOK)  # another thread is just saying it
    os._exit(_CODE)


def say_once() -> bool:
    """Whether the caller is the first that is to say why the process stops, and so the only one."""
    return not _state.taken or _state.last_word.acquire(blocking=False)


def _say() -> None:
    if sys.stderr is not None:  # else the descriptor may be of a shard
        with contextlib.suppress(OSError):
            tidy = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # a bar, and the cursor that it hides
            os.write(2, f"{tidy}shardxform: {_state.where}{STOPPED}\n".encode())


def _on_signal(_number: int, _frame: FrameType | None) -> None:
    if _state.depth or _state.asked:
        _state.asked = True
    elif not _state.leaving:  # else this one struck that one, which has the last word and goes on when this returns
        _state.leaving = True
        leave()


def _look_on(reader: int) -> None:
    """End the process some time after the first signal, if it has not ended by then."""
    while os.read(reader, 1)[0] not in (signal.SIGINT, signal.SIGTERM):
        pass  # another that somebody has a handler for
    began = time.monotonic()
    while time.monotonic() - began < (_ORDERLY if _state.asked else _UNSEEN):
        time.sleep(_LOOK)
    leave()


# -- what works -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let no signal interrupt the block: who is in it calls `check` at least every second or so, or is done sooner.

    Raises:
        KeyboardInterrupt: at the end of the block, if it was asked for meanwhile and nothing else is raised.

    """
    if threading.current_thread() is not threading.main_thread():  # which alone sees signals
        yield
        return
    with _python_aside():
        _state.depth += 1
        try:
            yield
        finally:
            _state.depth -= 1
        check()


def check() -> None:
    """Stop here if that was asked for; on the main thread, inside of `deferred`.

    Raises:
        KeyboardInterrupt: it was.

    """
    if _state.asked and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def asked() -> bool:
    """Whether the process was asked to stop."""
    return _state.asked


def wait(event: threading.Event, seconds: float) -> bool:
    """Wait for an event as its own `wait` does, which must not be interrupted.

    Raises:
        KeyboardInterrupt: the main thread was asked to stop meanwhile.

    """
    until = time.monotonic() + seconds
    with deferred():
        while not event.wait(max(0.0, min(_LOOK * 4, until - time.monotonic()))):
            check()
            if time.monotonic() >= until:
                return False
    return True


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Have the last line of a process that is ended in the block begin with `what`."""
    before, _state.where = _state.where, f"{what}: "
    try:
        yield
    finally:
        _state.where = before


@contextlib.contextmanager
def _python_aside() -> Iterator[None]:
    """Set aside Python's own handler of SIGINT, where that is what stands."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        came, _state.asked = _state.asked, False
    if came:
        raise KeyboardInterrupt


def _ask(_number: int, _frame: FrameType | None) -> None:
    _state.asked = True


# -- completions, which a signal cannot deadlock ------------------------------------------------------------------


K = TypeVar("K")
V = TypeVar("V")

_GLANCE: Final = 0.2  # seconds


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
            found.append(self._told.get(timeout=_GLANCE))
            while True:
                found.append(self._told.get_nowait())
        return found

    def wait(self) -> None:
        """Return when none is under way any more."""
        while not all(future.done() for future in self.pending):
            self.next()
