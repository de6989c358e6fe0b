"""The one place with file-system effects.

`FileSystem` has two layers: primitives that map to one system call each (what fault injection overrides), and the
operations built on them, which absorb short reads and writes and fall back where a platform lacks a call. Durability
is explicit: nothing here syncs unless its name says so.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import stat
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol, TypeVar

from shardxform.base import interrupts
from shardxform.base.tensors import ByteRange
from shardxform.errors import ExecutionError, OutputError

__all__ = [
    "BUFFER_BYTES",
    "LOCK",
    "FileSystem",
    "Files",
    "FolderReader",
    "OpenTarget",
    "OwnedDir",
    "SourceReader",
    "items_of",
    "nearest",
    "not_a_directory",
    "read_given",
    "why_not",
]

try:
    import fcntl
except ImportError:  # no flock on this platform: two runs in one directory go unnoticed, nothing else changes
    fcntl = None  # type: ignore[assignment]


BUFFER_BYTES: Final = 4 << 20
"""Size of the buffer that a copy through memory uses, where the kernel cannot copy by itself."""

_NO_KERNEL_COPY: Final = {
    errno.EXDEV,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EINVAL,
    errno.EPERM,
    errno.ETXTBSY,
}
_OWN_PIPE: Final = re.compile(r"/dev/stdin|/dev/fd/[0-9]+|/proc/self/fd/[0-9]+", re.ASCII)
_HINT: Final = 1 << 20
_NO_PREALLOCATE: Final = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_MAC_PREALLOCATE: Final = 42  # F_PREALLOCATE of <sys/fcntl.h>, which the fcntl module does not name everywhere


def not_a_directory(path: Path) -> str:
    """What is wrong with a path that is no directory, in words."""
    if not os.path.lexists(path):
        return "no such directory"
    what = "a file" if path.is_file() else "a broken link" if path.is_symlink() else "something else"
    return f"expected a directory, found {what}"


def nearest(path: Path) -> Path:
    """The path itself, or where it is not there, the folder above it that is."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def why_not(path: Path, error: OSError) -> str:
    """What keeps `path` from being written, in words: a folder that is missing, a file where a folder should be."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        for folder in reversed(path.parents):
            if not folder.is_dir() and folder != Path():
                return f"{not_a_directory(folder)}: {folder}"
    return error.strerror or str(error)


def read_given(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a small file that a user names: a file, or a pipe that this process was started with.

    `<(…)` of a shell gives such a pipe, by the number of its descriptor, as `/dev/fd/63`; it is read once, to its end,
    however often it is asked for. A pipe that has a name in a folder is refused: opening it may wait for ever.

    Args:
        path: what is named; links are followed.
        most: bytes; of more, one further byte is given.

    Raises:
        OSError: it cannot be read, or is neither.

    """
    info = os.stat(path)
    if stat.S_ISREG(info.st_mode):
        with open(path, "rb") as file:
            return file.read(most + 1)
    if not stat.S_ISFIFO(info.st_mode):
        raise OSError(errno.EINVAL, "expected a file")
    if not _OWN_PIPE.fullmatch(os.fspath(path)):
        raise OSError(errno.EINVAL, "expected a file, or a pipe as `<(...)` or /dev/stdin give one; found a named pipe")
    return _read_pipe(os.fspath(path), (info.st_dev, info.st_ino), most)


@functools.lru_cache(maxsize=8)
def _read_pipe(path: str, which: tuple[int, int], most: int) -> bytes:  # noqa: ARG001
    """Read a pipe to its end; what was read of one is not there a second time."""
    with open(path, "rb") as file:
        return file.read(most + 1)


class FileSystem:
    """The operating system's file operations, with the guarantees the writer needs."""

    # -- primitives: one system call each -----------------------------------------------------------------------

    def open(self, path: Path, flags: int) -> int:
        """Open `path`, mode 0644 when created; closed on exec. What is written to is never reached through a link."""
        if flags & (os.O_WRONLY | os.O_RDWR):
            flags |= getattr(os, "O_NOFOLLOW", 0)
        return os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o644)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        """Read at `offset` into `buffer`; may read less."""
        return os.preadv(fd, [buffer], offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        """Write `data` at `offset`; may write less."""
        return os.pwrite(fd, data, offset)

    def copy_file_range(self, source: int, target: int, count: int, source_offset: int, target_offset: int) -> int:
        """Copy inside the kernel; may copy less. Raises OSError(ENOSYS) where there is no such call."""
        if not hasattr(os, "copy_file_range"):
            raise OSError(errno.ENOSYS, "no copy_file_range on this platform")
        return os.copy_file_range(source, target, count, source_offset, target_offset)

    def will_need(self, fd: int, offset: int, count: int) -> None:
        """Have the kernel begin to read a range, and no more than it. A hint: nothing happens where it is not heard."""
        if hasattr(os, "posix_fadvise"):
            for start in range(offset, offset + count, _HINT):  # Linux cuts a longer hint at the disk's largest request
                with contextlib.suppress(OSError):
                    os.posix_fadvise(fd, start, min(_HINT, offset + count - start), os.POSIX_FADV_WILLNEED)

    def done_with(self, fd: int, offset: int = 0, count: int = 0) -> None:
        """Let the kernel forget a range, or the whole file, as far as it is on the disk. A hint, as above.

        A job of tens of gigabytes would push everything else out of the page cache, and pay for every new page of it.
        """
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)

    def allocate(self, fd: int, size: int) -> None:
        """Reserve `size` bytes of disk. Raises OSError(ENOSYS) where there is no such call."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        elif sys.platform == "darwin" and fcntl is not None:
            # fstore_t: F_ALLOCATEALL, from the physical end of file, offset 0, length, bytes allocated (out)
            fcntl.fcntl(fd, _MAC_PREALLOCATE, struct.pack("=Iiqqq", 4, 3, 0, size, 0))
        else:
            raise OSError(errno.ENOSYS, "no preallocation on this platform")

    def truncate(self, fd: int, size: int) -> None:
        """Set the length of the file."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """Return when the file's data, and what is needed to read it back, are on stable storage."""
        if sys.platform == "darwin" and fcntl is not None:
            self._full_sync(fd)
        elif hasattr(os, "fdatasync"):
            os.fdatasync(fd)
        else:
            os.fsync(fd)

    def _full_sync(self, fd: int) -> None:
        """Sync through the drive's cache, at which macOS's fsync stops; network disks have the plain way only."""
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # type: ignore[attr-defined]
        except OSError as e:
            if e.errno not in (errno.ENOTSUP, errno.EINVAL):
                raise
            os.fsync(fd)

    def sync_dir(self, path: Path) -> None:
        """Return when the directory's entries are on stable storage."""
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def nameless(self, folder: Path) -> int:
        """Open a new file that no name leads to, for reading and writing; it is gone when it is closed."""
        fd, name = tempfile.mkstemp(prefix=".shardxform-", dir=folder)
        try:
            os.unlink(name)
        except OSError:
            os.close(fd)
            raise
        return fd

    def rename(self, old: Path, new: Path) -> None:
        """Replace `new` by `old` in one step."""
        os.replace(old, new)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make a directory and its parents; fine when it is there."""
        path.mkdir(parents=True, exist_ok=True)

    def rmdir(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    # -- operations ---------------------------------------------------------------------------------------------

    def read_exact_into(self, fd: int, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`.

        Raises:
            EOFError: the file ends before the buffer is full.

        """
        done = 0
        while done < len(buffer):
            count = self.pread_into(fd, buffer[done:], offset + done)
            if count == 0:
                raise EOFError(f"file ends at byte {offset + done}, expected {offset + len(buffer)}")
            done += count

    def write_all(self, fd: int, data: memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        done = 0
        while done < len(data):
            count = self.pwrite(fd, data[done:], offset + done)
            if count <= 0:
                raise OSError(errno.EIO, "write made no progress")
            done += count

    def copy(self, source: int, source_offset: int, target: int, target_offset: int, count: int) -> None:
        """Copy `count` bytes between files: in the kernel where it can, else through `BUFFER_BYTES` of memory.

        Raises:
            EOFError: the source ends too early.

        """
        done = 0
        try:
            while done < count:
                step = self.copy_file_range(source, target, count - done, source_offset + done, target_offset + done)
                if step == 0:  # the end of the file, or a file system that pretends: the other way tells them apart
                    break
                done += step
        except OSError as e:
            if e.errno not in _NO_KERNEL_COPY:
                raise
        if done < count:
            self._copy_through_memory(source, source_offset + done, target, target_offset + done, count - done)

    def _copy_through_memory(
        self, source: int, source_offset: int, target: int, target_offset: int, count: int
    ) -> None:
        buffer = memoryview(bytearray(min(BUFFER_BYTES, count)))
        for done in range(0, count, BUFFER_BYTES):
            piece = buffer[: min(BUFFER_BYTES, count - done)]
            self.read_exact_into(source, piece, source_offset + done)
            self.write_all(target, piece, target_offset + done)

    def preallocate(self, fd: int, size: int) -> None:
        """Give the file exactly `size` bytes, reserved on disk where the file system can."""
        if size:
            try:
                self.allocate(fd, size)
            except OSError as e:
                if e.errno not in _NO_PREALLOCATE:
                    raise
        self.truncate(fd, size)

    def write_synced(self, path: Path, data: bytes, how: int) -> None:
        """Write a small file and make it durable, though not yet its name; `how` is O_TRUNC or O_EXCL."""
        fd = self.open(path, os.O_WRONLY | os.O_CREAT | how)
        try:
            self.write_all(fd, memoryview(data), 0)
            self.sync(fd)
        finally:
            os.close(fd)

    def write_atomic(self, path: Path, data: bytes, scratch: Path) -> None:
        """Write a small file so that `path` holds all of it, durably, or is untouched.

        `scratch` is a directory on the same disk.
        """
        temporary = scratch / (path.name + ".tmp")
        try:
            self.write_synced(temporary, data, os.O_TRUNC)
            self.rename(temporary, path)
        except OSError as e:  # of a file that the user knows
            raise OSError(e.errno, e.strerror, os.fspath(path)) from e
        self.sync_dir(path.parent)

    def remove_if_there(self, path: Path) -> None:
        """Remove a file; fine when it is gone."""
        with contextlib.suppress(FileNotFoundError):
            self.unlink(path)

    def free_bytes(self, path: Path) -> int:
        """Bytes an unprivileged writer can still put beside `path`, which need not exist yet."""
        return shutil.disk_usage(nearest(path)).free

    @contextlib.contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        """Hold an exclusive lock on `path` as long as the process lives or the block runs.

        Raises:
            BlockingIOError: another process holds it.

        """
        fd = self.open(path, os.O_RDWR | os.O_CREAT)
        try:
            if fcntl is not None:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or os.fstat(fd).st_ino != path.stat().st_ino:  # its holder just removed it
                raise BlockingIOError(errno.EAGAIN, "the lock is gone", str(path))
            yield
        finally:
            os.close(fd)


# -- small files --------------------------------------------------------------------------------------------------


_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EMLINK}


def refuse_other(path: Path, data: bytes, kind: str = "file") -> bool:
    """Whether `path` holds exactly `data` already; False when nothing is there.

    Raises:
        OutputError: something else is there, or it cannot be looked at; `kind` says what it was taken for.

    """
    try:
        if not os.path.lexists(path):
            return False
        same = path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    except (OSError, ValueError) as e:
        raise OutputError(f"{path}: {getattr(e, 'strerror', None) or e}") from e
    if same:
        return True
    what = f"another {kind} is there" if path.is_file() else "something that is no file is there"
    raise OutputError(f"{path}: {what}, and nothing is overwritten; name a file that does not exist yet")


def write_new(path: Path, data: bytes, kind: str = "file") -> None:
    """Make `path` hold `data`, durably and in one step; nothing happens when it does already.

    Raises:
        OutputError: another file is there, or it cannot be written.

    """
    if not refuse_other(path, data, kind) and not _put(path, data, _publish):  # between the look and the link
        refuse_other(path, data, kind)


def write_over(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, durably and in one step, in place of what the caller found to be its own.

    Raises:
        OutputError: it cannot be written.

    """

    def replace(fs: FileSystem, temporary: Path, path: Path) -> bool:
        fs.rename(temporary, path)
        return True

    _put(path, data, replace)


def _put(path: Path, data: bytes, publish: Callable[[FileSystem, Path, Path], bool]) -> bool:
    """Write a file of another name and give it its own; what `publish` says of that."""
    fs = FileSystem()
    temporary = path.parent / f".shardxform-{secrets.token_hex(8)}.tmp"
    try:
        with interrupts.deferred():
            try:
                fs.write_synced(temporary, data, os.O_EXCL)
                published = publish(fs, temporary, path)
            finally:
                fs.remove_if_there(temporary)
            fs.sync_dir(path.parent)
    except OSError as e:
        raise OutputError(f"{path}: {why_not(path, e)}") from e
    return published


def _publish(fs: FileSystem, temporary: Path, path: Path) -> bool:
    """Give the file its name; False when the name is taken. A link, because a rename would replace what is there."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as e:
        if e.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):  # a file system without links: look once more, and take the small risk
            return False
        fs.rename(temporary, path)
    return True


# -- readers -----------------------------------------------------------------------------------------------------------
# Where the shards of a source are read from: files of a folder, or ranges of a repository that pass by.
#
# The one way in which tensor data of a source is read while there is work to do. What is not here yet is fetched
# before a read returns: no reader ever sees a byte that did not come from the source.


class SourceReader(Protocol):
    """Reads byte ranges of shards by name; safe to use from several threads."""

    def read_into(self, place: ByteRange, buffer: memoryview) -> None:
        """Fill `buffer` with a range of its length.

        Raises:
            EOFError: the shard ends too early.
            OSError, RemoteError: it cannot be read.

        """
        ...

    def copy(self, place: ByteRange, target: int, offset: int) -> None:
        """Write a range to the descriptor `target` at `offset`; raises like `read_into`."""
        ...

    def will_need(self, places: Iterable[ByteRange]) -> None:
        """Begin to bring ranges that will be read, in this order. A hint."""
        ...

    def done_with(self, place: ByteRange) -> None:
        """Let go of a range that is not read again. A hint."""
        ...

    def stop(self) -> None:
        """End the waiting of other threads, with an error; nothing is read any more."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


OpenTarget = Callable[[int], int]
"""Gives an open descriptor of an output shard, by its number."""

Files = tuple[SourceReader, OpenTarget]
"""Where to read the source, and where to write."""


class FolderReader:
    """Shards of a folder, opened when first read."""

    def __init__(self, root: Path, fs: FileSystem) -> None:
        self._root = root
        self._fs = fs
        self._fds: dict[str, int] = {}
        self._opening = threading.Lock()

    def read_into(self, place: ByteRange, buffer: memoryview) -> None:
        """Fill `buffer` with a range of its length."""
        self._fs.read_exact_into(self._fd(place.file), buffer, place.offset)

    def copy(self, place: ByteRange, target: int, offset: int) -> None:
        """Write a range to the descriptor `target` at `offset`."""
        self._fs.copy(self._fd(place.file), place.offset, target, offset, place.length)

    def will_need(self, places: Iterable[ByteRange]) -> None:
        """Ask the kernel to read ranges."""
        for place in places:
            self._fs.will_need(self._fd(place.file), place.offset, place.length)

    def done_with(self, place: ByteRange) -> None:
        """Let the kernel forget a range."""
        self._fs.done_with(self._fd(place.file), place.offset, place.length)

    def stop(self) -> None:
        """Nothing waits long here."""

    def close(self) -> None:
        """Close the shards."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, name: str) -> int:
        with self._opening:
            if name not in self._fds:
                self._fds[name] = self._fs.open(self._root / name, os.O_RDONLY)
            return self._fds[name]


# -- owned -------------------------------------------------------------------------------------------------------------
# A directory that belongs to one kind of work, and to one process at a time.

LOCK: Final = "lock"
"""File that the process at work holds."""

_Dir = TypeVar("_Dir", bound="OwnedDir")


class OwnedDir:
    """Holds the lock of a directory as a context manager; a subclass says what may lie there, and reads it."""

    def __init__(self, root: Path, fs: FileSystem) -> None:
        self.root = root
        self.fs = fs
        self._stack = contextlib.ExitStack()

    def __enter__(self: _Dir) -> _Dir:
        """Make or enter the directory.

        Raises:
            OutputError: something stands there that shardxform did not make, or another process works in it.
            ResumeError: it holds work of other inputs, as far as the subclass looks.

        """
        with contextlib.ExitStack() as stack:
            try:
                self.refuse_foreign()
                self.fs.mkdir(self.root)
                stack.enter_context(self.fs.locked(self.root / LOCK))
                self.load()
            except BlockingIOError as e:
                raise OutputError(f"{self.root}: another process works here") from e
            except OSError as e:
                raise OutputError(f"{e.filename or self.root}: {e.strerror or e}") from e
            self._stack = stack.pop_all()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Let go of the directory; what the disk refused meanwhile becomes an `ExecutionError`."""
        self._stack.close()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise ExecutionError(
                f"{error.filename or self.root}: {error.strerror or error};"
                f" what was finished is safe in {self.root}: run the same command again to go on"
            ) from error

    def refuse_foreign(self) -> None:
        """Refuse what somebody else put there, before anything is written."""
        raise NotImplementedError

    def load(self) -> None:
        """Read what an earlier process left; the lock is held."""
        raise NotImplementedError


def items_of(root: Path, expected: str) -> list[os.DirEntry[str]]:
    """Return what lies in a directory; nothing where there is none.

    Raises:
        OutputError: a link or a file stands there; `expected` is what should.

    """
    if not os.path.lexists(root):
        return []
    if root.is_symlink() or not root.is_dir():
        raise OutputError(f"{root}: expected {expected} or nothing, found something else")
    return list(os.scandir(root))
