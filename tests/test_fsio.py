from __future__ import annotations

import errno
import importlib.util
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from shardxform.base import file_system
from shardxform.base.file_system import BUFFER_BYTES, FileSystem

fs = FileSystem()
DATA = bytes(range(256)) * 40


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """Descriptors of a file that holds DATA, and of an empty one."""
    (tmp_path / "source").write_bytes(DATA)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield source, target
    os.close(source)
    os.close(target)


def read_all(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


class NoKernelCopy(FileSystem):
    """Copies `sizes` in the kernel, one by one, and then fails with `code` (or claims the end of file)."""

    def __init__(self, code: int, *sizes: int) -> None:
        self.code, self.sizes, self.calls = code, list(sizes), 0

    def copy_file_range(self, source: int, target: int, count: int, source_offset: int, target_offset: int) -> int:
        self.calls += 1
        if self.sizes:
            data = os.pread(source, min(count, self.sizes.pop(0)), source_offset)
            return os.pwrite(target, data, target_offset)
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        return 0


class Trickle(FileSystem):
    """Reads and writes three bytes at most."""

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        return super().pread_into(fd, buffer[:3], offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return super().pwrite(fd, data[:3], offset)

    def copy_file_range(self, *_: int) -> int:
        raise OSError(errno.ENOSYS, "no such call")


# -- reading and writing -----------------------------------------------------------------------------------------------


def test_short_reads_and_writes_are_continued(files: tuple[int, int]) -> None:
    source, target = files
    buffer = bytearray(100)
    Trickle().read_exact_into(source, memoryview(buffer), 7)
    assert bytes(buffer) == DATA[7:107]
    Trickle().write_all(target, memoryview(DATA[:100]), 5)
    assert read_all(target) == bytes(5) + DATA[:100]


@pytest.mark.parametrize("system", [fs, Trickle()])
def test_reading_beyond_the_end_says_where_the_file_ends(files: tuple[int, int], system: FileSystem) -> None:
    offset = len(DATA) - 10
    with pytest.raises(EOFError, match=rf"file ends at byte {len(DATA)}, expected {offset + 11}"):
        system.read_exact_into(files[0], memoryview(bytearray(11)), offset)
    system.read_exact_into(files[0], memoryview(bytearray(10)), offset)


def test_a_write_that_makes_no_progress_is_an_error_and_no_endless_loop(files: tuple[int, int]) -> None:
    class Stuck(FileSystem):
        def pwrite(self, fd: int, data: memoryview, offset: int) -> int:  # noqa: ARG002
            return 0

    with pytest.raises(OSError, match="no progress"):
        Stuck().write_all(files[1], memoryview(b"x"), 0)


def test_nothing_is_read_or_written_for_an_empty_buffer(files: tuple[int, int]) -> None:
    fs.read_exact_into(files[0], memoryview(bytearray()), 10**9)
    fs.write_all(files[1], memoryview(b""), 10**9)
    fs.copy(files[0], 10**9, files[1], 0, 0)
    assert read_all(files[1]) == b""


# -- copying -----------------------------------------------------------------------------------------------------------

SYSTEMS = {
    "the kernel": fs,
    "other devices": NoKernelCopy(errno.EXDEV),
    "an old kernel": NoKernelCopy(errno.ENOSYS),
    "unsupported": NoKernelCopy(errno.EOPNOTSUPP),
    "pretends to reach the end": NoKernelCopy(0),
    "short reads and writes": Trickle(),
}


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_a_copy_moves_exactly_the_bytes_asked_for(files: tuple[int, int], system: FileSystem) -> None:
    source, target = files
    os.pwrite(target, b"#" * 50, 0)
    system.copy(source, 100, target, 20, 10)
    assert read_all(target) == b"#" * 20 + DATA[100:110] + b"#" * 20


@pytest.mark.parametrize("code", [0, errno.EXDEV, errno.EINVAL, errno.EPERM, errno.ETXTBSY])
def test_a_copy_goes_on_where_the_kernel_stopped(files: tuple[int, int], code: int) -> None:
    source, target = files
    system = NoKernelCopy(code, 3, 4)
    system.copy(source, 1, target, 0, 1000)
    assert read_all(target) == DATA[1:1001]
    assert system.calls == 3


def test_a_copy_in_short_steps_stays_in_the_kernel(files: tuple[int, int]) -> None:
    system = NoKernelCopy(errno.EIO, 400, 500, 10**6)
    system.copy(files[0], 0, files[1], 0, 1000)
    assert read_all(files[1]) == DATA[:1000]
    assert system.calls == 3


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EFBIG, errno.EBADF])
def test_a_copy_that_fails_for_good_is_not_tried_another_way(files: tuple[int, int], code: int) -> None:
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        NoKernelCopy(code).copy(files[0], 0, files[1], 0, 10)
    assert caught.value.errno == code
    assert read_all(files[1]) == b""


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_a_copy_beyond_the_end_of_the_source_is_an_error(files: tuple[int, int], system: FileSystem) -> None:
    with pytest.raises(EOFError, match=f"file ends at byte {len(DATA)}"):
        system.copy(files[0], len(DATA) - 5, files[1], 0, 6)


def test_a_copy_through_memory_takes_a_bounded_buffer(tmp_path: Path, files: tuple[int, int]) -> None:
    biggest = 0

    class Watch(NoKernelCopy):
        def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
            nonlocal biggest
            biggest = max(biggest, len(buffer))
            return super().pread_into(fd, buffer, offset)

    size = 2 * BUFFER_BYTES + 17
    content = os.urandom(1000) * (size // 1000 + 1)
    (tmp_path / "big").write_bytes(content)
    fd = os.open(tmp_path / "big", os.O_RDONLY)
    Watch(errno.EXDEV).copy(fd, 3, files[1], 0, size)
    os.close(fd)
    assert read_all(files[1]) == content[3 : 3 + size]
    assert biggest == BUFFER_BYTES


def test_a_platform_without_copy_file_range_copies_through_memory(
    files: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    fs.copy(files[0], 0, files[1], 0, len(DATA))
    assert read_all(files[1]) == DATA


# -- preallocating, locking, space -------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 10, 5000])
@pytest.mark.parametrize("size", [0, 1, 4096])
def test_preallocating_gives_the_file_exactly_that_size(files: tuple[int, int], before: int, size: int) -> None:
    os.pwrite(files[1], b"x" * before, 0)
    fs.preallocate(files[1], size)
    assert read_all(files[1]) == (b"x" * before).ljust(size, b"\0")[:size]


def test_preallocating_reserves_the_disk_where_it_can(files: tuple[int, int]) -> None:
    fs.preallocate(files[1], 1 << 20)
    assert os.fstat(files[1]).st_blocks * 512 >= 1 << 20 or sys.platform != "linux"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_preallocating_falls_back_to_a_hole_where_the_call_is_missing(files: tuple[int, int], code: int) -> None:
    class Without(FileSystem):
        def allocate(self, fd: int, size: int) -> None:  # noqa: ARG002
            raise OSError(code, os.strerror(code))

    Without().preallocate(files[1], 4096)
    assert read_all(files[1]) == bytes(4096)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_full_disk_is_reported_by_preallocating(files: tuple[int, int], code: int) -> None:
    class Full(FileSystem):
        def allocate(self, fd: int, size: int) -> None:  # noqa: ARG002
            raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=os.strerror(code)):
        Full().preallocate(files[1], 4096)
    assert read_all(files[1]) == b""


def test_a_lock_refuses_a_second_holder_until_it_is_released(tmp_path: Path) -> None:
    with fs.locked(tmp_path / "lock"):
        with pytest.raises(BlockingIOError), fs.locked(tmp_path / "lock"):
            pytest.fail("held twice")
        with fs.locked(tmp_path / "other"):
            pass
    with fs.locked(tmp_path / "lock"):
        pass


def test_a_lock_is_released_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), fs.locked(tmp_path / "lock"):
        raise ZeroDivisionError
    with fs.locked(tmp_path / "lock"):
        pass


def test_a_lock_refuses_another_process(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\nfrom shardxform.base.file_system import FileSystem\n"
        "try:\n    with FileSystem().locked(pathlib.Path(sys.argv[1])): print('got it')\n"
        "except BlockingIOError: print('refused')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    with fs.locked(tmp_path / "lock"):
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "refused\n"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "got it\n"


def test_a_lock_outlives_no_process(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\nfrom shardxform.base.file_system import FileSystem\n"
        "with FileSystem().locked(pathlib.Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "lock")]).returncode == 9
    with fs.locked(tmp_path / "lock"):
        pass


def test_without_flock_a_lock_lets_everybody_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_system, "fcntl", None)
    with fs.locked(tmp_path / "lock"), fs.locked(tmp_path / "lock"):
        pass


def test_free_space_is_asked_of_the_nearest_directory_that_exists(tmp_path: Path) -> None:
    info = os.statvfs(tmp_path)
    free = fs.free_bytes(tmp_path / "not" / "yet" / "there")
    assert abs(free - info.f_bavail * info.f_frsize) < 1 << 30
    assert fs.free_bytes(Path("not/yet/there")) > 0


# -- small files at once -----------------------------------------------------------------------------------------------

EFFECTS = ("open", "pwrite", "sync", "rename", "sync_dir")


class FailsAt(FileSystem):
    """Fails at the k-th effect; k = 0 counts only."""

    def __init__(self, k: int) -> None:
        self.k, self.effects = k, []


def _failing(name: str) -> Any:
    def effect(self: FailsAt, *args: Any) -> Any:
        self.effects.append(name)
        if len(self.effects) == self.k:
            raise OSError(errno.EIO, f"injected at {name}")
        return getattr(FileSystem, name)(self, *args)

    return effect


for _name in EFFECTS:
    setattr(FailsAt, _name, _failing(_name))


def test_a_small_file_is_synced_before_it_is_renamed_and_the_directory_after(tmp_path: Path) -> None:
    system = FailsAt(0)
    (tmp_path / "scratch").mkdir()
    system.write_atomic(tmp_path / "f", b"new", tmp_path / "scratch")
    assert system.effects == ["open", "pwrite", "sync", "rename", "sync_dir"]
    assert (tmp_path / "f").read_bytes() == b"new"
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("k", range(1, 6))
@pytest.mark.parametrize("old", [b"old", None])
def test_a_small_file_is_never_half_written_whatever_fails(tmp_path: Path, k: int, old: bytes | None) -> None:
    """Invariant: after a failure at any effect the path holds the old content; the new one only once renamed."""
    path = tmp_path / "f"
    if old is not None:
        path.write_bytes(old)
    open_before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    with pytest.raises(OSError, match=f"injected at {EFFECTS[k - 1]}"):
        FailsAt(k).write_atomic(path, b"the new content", tmp_path)
    content = path.read_bytes() if path.exists() else None
    assert content == (b"the new content" if EFFECTS[k - 1] == "sync_dir" else old)
    assert not open_before or len(os.listdir("/proc/self/fd")) == open_before
    fs.write_atomic(path, b"", tmp_path)
    assert path.read_bytes() == b""


def test_a_leftover_of_an_earlier_attempt_does_not_show(tmp_path: Path) -> None:
    (tmp_path / "f.tmp").write_bytes(b"much longer than the new content")
    fs.write_atomic(tmp_path / "f", b"new", tmp_path)
    assert (tmp_path / "f").read_bytes() == b"new"


def test_small_operations_do_what_they_say(tmp_path: Path) -> None:
    fs.mkdir(tmp_path / "a" / "b")
    fs.mkdir(tmp_path / "a" / "b")
    os.close(fs.open(tmp_path / "a" / "f", os.O_WRONLY | os.O_CREAT))
    assert (tmp_path / "a" / "f").stat().st_mode & 0o133 == 0
    fs.rename(tmp_path / "a" / "f", tmp_path / "a" / "b" / "g")
    fs.remove_if_there(tmp_path / "a" / "f")
    with pytest.raises(OSError, match="not empty"):
        fs.rmdir(tmp_path / "a" / "b")
    fs.remove_if_there(tmp_path / "a" / "b" / "g")
    fs.rmdir(tmp_path / "a" / "b")
    assert list((tmp_path / "a").iterdir()) == []


def test_descriptors_are_not_inherited_by_other_programs(tmp_path: Path) -> None:
    fd = fs.open(tmp_path / "f", os.O_WRONLY | os.O_CREAT)
    assert os.get_inheritable(fd) is False
    os.close(fd)


# -- macOS -------------------------------------------------------------------------------------------------------------

MAC = {"ENOTSUP": 45, "EOPNOTSUPP": 102, "ENOSYS": 78}  # <sys/errno.h>; on Linux the first two are one number


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it would be imported on macOS, with a recording fcntl."""
    for name, number in MAC.items():
        monkeypatch.setattr(errno, name, number)
    for name in ("posix_fallocate", "copy_file_range", "fdatasync"):
        monkeypatch.delattr(os, name, raising=False)
    spec = importlib.util.spec_from_file_location("fsio_mac", file_system.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls: list[tuple[Any, ...]] = []
    fake = SimpleNamespace(
        F_FULLFSYNC=51, LOCK_EX=2, LOCK_NB=4, calls=calls, fcntl=lambda *args: calls.append(args), flock=lambda *_: None
    )
    monkeypatch.setattr(module, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(module, "fcntl", fake)
    return module


def test_on_macos_data_is_synced_beyond_the_cache_of_the_drive(mac: ModuleType, files: tuple[int, int]) -> None:
    mac.FileSystem().sync(files[1])
    assert mac.fcntl.calls == [(files[1], 51)]


def test_on_macos_space_is_reserved_with_f_preallocate(mac: ModuleType, files: tuple[int, int]) -> None:
    mac.FileSystem().preallocate(files[1], 4096)
    ((fd, command, argument),) = mac.fcntl.calls
    assert (fd, command) == (files[1], 42)
    assert len(argument) == 32  # fstore_t
    assert struct.unpack("=Iiqqq", argument) == (4, 3, 0, 4096, 0)  # F_ALLOCATEALL, F_PEOFPOSMODE
    assert read_all(files[1]) == bytes(4096)


def test_on_macos_a_disk_that_cannot_reserve_space_is_no_error(
    mac: ModuleType, files: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(MAC["ENOTSUP"], "Operation not supported")

    monkeypatch.setattr(mac.fcntl, "fcntl", unsupported)
    mac.FileSystem().preallocate(files[1], 4096)
    assert read_all(files[1]) == bytes(4096)


def test_on_macos_a_disk_without_full_sync_is_synced_the_plain_way(
    mac: ModuleType, files: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def unsupported(*_: Any) -> None:  # network disks and exFAT, says fcntl(2)
        raise OSError(MAC["ENOTSUP"], "Operation not supported")

    monkeypatch.setattr(mac.fcntl, "fcntl", unsupported)
    monkeypatch.setattr(os, "fsync", synced.append)
    mac.FileSystem().sync(files[1])
    assert synced == [files[1]]


def test_on_macos_a_copy_goes_through_memory(mac: ModuleType, files: tuple[int, int]) -> None:
    mac.FileSystem().copy(files[0], 0, files[1], 0, len(DATA))
    assert read_all(files[1]) == DATA


def test_a_platform_without_any_of_these_calls_still_writes(
    files: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    for name in ("posix_fallocate", "copy_file_range", "fdatasync"):
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(os, "fsync", synced.append)
    fs.preallocate(files[1], 10)
    fs.sync(files[1])
    assert read_all(files[1]) == bytes(10)
    assert synced == [files[1]]
