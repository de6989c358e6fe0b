"""File systems that fail: at the k-th effect, with an error, a short write, or the end of the process.

`Crashing` also models the loss of the page cache: when it ends the process, every byte written since its file was
last synced is overwritten with garbage first. What survives is what the code made durable.

A child that is to die is forked from the tests' process, which has the libraries, and dies by what it does, not by a
clock: a slow machine changes nothing. Where the number of effects is large, `sampled` names those that are tried.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shardxform.base.file_system import FileSystem

EFFECTS = (
    "open",
    "pwrite",
    "copy_file_range",
    "allocate",
    "truncate",
    "sync",
    "sync_dir",
    "rename",
    "unlink",
    "mkdir",
    "rmdir",
)


class Counting(FileSystem):
    """Counts effects; `at_effect` is what subclasses do at each."""

    def __init__(self) -> None:
        self.effects = 0
        self._lock = threading.Lock()  # steps run on threads

    def next_effect(self) -> None:
        """Count one effect, and do what subclasses do at its number, from 1."""
        with self._lock:
            self.effects += 1
            number = self.effects
        self.at_effect(number)

    def at_effect(self, number: int) -> None:
        """Called before effect `number`."""


def _counted(name: str) -> Any:
    original = getattr(FileSystem, name)

    def effect(self: Counting, *args: Any) -> Any:
        self.next_effect()
        return original(self, *args)

    return effect


for _name in EFFECTS:
    setattr(Counting, _name, _counted(_name))


class Failing(Counting):
    """Raises an OSError at effect number `k`."""

    def __init__(self, k: int, code: int = errno.ENOSPC) -> None:
        super().__init__()
        self.k, self.code = k, code

    def at_effect(self, number: int) -> None:
        if number == self.k:
            raise OSError(self.code, os.strerror(self.code))


class Short(FileSystem):
    """Writes and copies at most 7 bytes at a time, and reads at most 5."""

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        return super().pread_into(fd, buffer[:5], offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return super().pwrite(fd, data[:7], offset)

    def copy_file_range(self, source: int, target: int, count: int, source_offset: int, target_offset: int) -> int:
        return super().copy_file_range(source, target, min(count, 7), source_offset, target_offset)


class WithoutKernelCopy(FileSystem):
    """A platform that has neither copy_file_range nor preallocation."""

    def copy_file_range(self, *_: int) -> int:
        raise OSError(errno.ENOSYS, "none here")

    def allocate(self, *_: int) -> None:
        raise OSError(errno.ENOSYS, "none here")


class Crashing(Counting):
    """Ends the process at effect number `k`, with unsynced bytes lost."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self._dirty: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        self._paths: dict[tuple[int, int], Path] = {}

    def at_effect(self, number: int) -> None:
        if number == self.k:
            self._lose_page_cache()
            os._exit(9)

    def open(self, path: Path, flags: int) -> int:
        fd = super().open(path, flags)
        self._paths[self._key(fd)] = Path(path)
        return fd

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        count = super().pwrite(fd, data, offset)
        self._dirty[self._key(fd)].append((offset, count))
        return count

    def copy_file_range(self, source: int, target: int, count: int, source_offset: int, target_offset: int) -> int:
        count = super().copy_file_range(source, target, count, source_offset, target_offset)
        self._dirty[self._key(target)].append((target_offset, count))
        return count

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self._dirty.pop(self._key(fd), None)

    def rename(self, old: Path, new: Path) -> None:
        super().rename(old, new)
        info = new.stat()
        self._paths[(info.st_dev, info.st_ino)] = new

    @staticmethod
    def _key(fd: int) -> tuple[int, int]:
        info = os.fstat(fd)
        return info.st_dev, info.st_ino

    def _lose_page_cache(self) -> None:
        for key, ranges in list(self._dirty.items()):  # other threads go on meanwhile
            path = self._paths[key]
            if not path.exists():
                continue
            with path.open("r+b") as file:
                for offset, count in list(ranges):
                    file.seek(offset)
                    file.write(b"\xee" * count)


def sampled(count: int, step: int = 17, ends: int = 12) -> list[int]:
    """Which of the effects 1 to `count` are tried: first, last, and every 17th; all where SHARDXFORM_TESTS=all."""
    if os.environ.get("SHARDXFORM_TESTS") == "all":
        return list(range(1, count + 1))
    return [k for k in range(1, count + 1) if k <= ends or k > count - ends or k % step == 0]


def fork(call: Callable[[], object]) -> int:
    """Make a call in a forked child, whose process is returned."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if torch := sys.modules.get("torch"):  # its pool is not there; several threads that ask for it first race
                torch.set_num_threads(torch.get_num_threads())
            call()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def forked(call: Callable[[], object]) -> int:
    """What became of a call in a forked child: 0 at its end, the code of its exit, 1 for an error, -9 if killed."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(call), 0)[1])


def overheard(call: Callable[[], object], folder: Path) -> tuple[int, str, str]:
    """What became of a call in a forked child, and what it put on its standard output and error."""
    paths = [folder / "stdout", folder / "stderr"]

    def child() -> None:
        for fd, path in enumerate(paths, 1):
            with path.open("wb") as file:
                os.dup2(file.fileno(), fd)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))  # noqa: SIM115
        call()

    code = forked(child)
    return code, *(path.read_text() for path in paths)


def killed_after(owner: Any, name: str, number: int, call: Callable[[], object]) -> bool:
    """Make a call in a child that is SIGKILLed once `owner.name` has returned so often; whether it came to that."""

    def child() -> None:
        done, real = itertools.count(1), getattr(owner, name)

        def counted(*args: Any, **more: Any) -> Any:
            value = real(*args, **more)
            if next(done) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        setattr(owner, name, counted)
        call()

    return forked(child) == -signal.SIGKILL


def die_at_effect(k: int) -> None:
    """Have this process, a child, SIGKILLed before the k-th effect from now, on whatever thread."""
    begun = itertools.count(1)

    def counted(real: Any) -> Any:
        def effect(self: FileSystem, *args: Any) -> Any:
            if next(begun) == k:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *args)

        return effect

    for name in EFFECTS:
        setattr(FileSystem, name, counted(getattr(FileSystem, name)))


def killed_at_effect(k: int, call: Callable[[], object]) -> bool:
    """Make a call in a child that is SIGKILLed before the k-th effect; whether it came to that."""

    def child() -> None:
        die_at_effect(k)
        call()

    return forked(child) == -signal.SIGKILL


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Kill a process at the end of the block, if it runs then."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def kill_when_there(call: Callable[[], object], path: Path) -> bool:
    """Make a call in a child that is SIGKILLed as soon as `path`, a pattern, exists; whether before its end."""

    def quiet() -> None:
        for fd in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        call()

    child = fork(quiet)
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if glob.glob(str(path)):
            os.kill(child, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1]) == -signal.SIGKILL
