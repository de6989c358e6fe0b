"""Ranges that are fetched, kept and dropped: no reader ever sees a byte that did not come from the source."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shardxform.base.file_system import FileSystem
from shardxform.checkpoint.remote.pieces import Arena, DiskArena, MemoryArena, Pieces, RemotePiece
from shardxform.errors import RemoteError

SLOT = 64
FILE = ("hf://org/name@0", "model.safetensors")
DATA = random.Random(7).randbytes(10_000)
GARBAGE = b"\xee" * SLOT


class Source:
    """Fetchers that give bytes of DATA, count them, and fail when told to."""

    def __init__(self, arena: Arena, *, run_bytes: int = 4 * SLOT, reserve: int = 2, threads: int = 2) -> None:
        self.arena = arena
        self.pieces = Pieces(arena, run_bytes=run_bytes, reserve=reserve)
        self.fetched: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.failing = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while run := self.pieces.take():
            self.gate.wait()
            try:
                self._fetch(run)
            except OSError as e:
                self.pieces.failed(run, e)

    def _fetch(self, run: list[RemotePiece]) -> None:
        with self._lock:
            self.fetched.append((run[0].start, run[-1].stop))
            if self.failing:
                self.failing -= 1
                raise OSError("no answer")
        for piece in run:
            self.arena.write(piece.slot, 0, memoryview(GARBAGE))  # what a slot holds besides means nothing
            self.arena.write(piece.slot, 0, memoryview(DATA)[piece.start : piece.stop])
            self.pieces.arrived(piece)

    def keep_busy(self) -> None:
        """Have the one fetcher hold something until the gate opens."""
        self.gate.clear()
        self.pieces.want(FILE, 9_000, 9_001)
        until(lambda: bool(self.pieces._placed))

    def read(self, start: int, stop: int) -> bytes:
        out = bytearray(stop - start)
        self.pieces.want(FILE, start, stop, now=True)
        at = start
        while at < stop:
            with self.pieces.reading(FILE, at, stop) as piece:
                count = min(piece.stop, stop) - at
                self.arena.read_into(piece.slot, at - piece.start, memoryview(out)[at - start :][:count])
            at += count
        return bytes(out)

    @property
    def nbytes(self) -> int:
        return sum(stop - start for start, stop in self.fetched)

    def close(self) -> None:
        self.gate.set()
        self.pieces.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


def until(happened: Callable[[], bool]) -> None:
    """Wait for something, ten seconds at most."""
    for _ in range(10_000):
        if happened():
            return
        time.sleep(0.001)
    raise AssertionError("it did not happen")


Make = Callable[..., Source]


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def made(slots: int, **options: int) -> Source:
            arena: Arena = MemoryArena(slots, SLOT, FileSystem())
            if request.param == "disk":
                arena = DiskArena(slots, SLOT, FileSystem(), tmp_path)
            source = Source(arena, **options)
            stack.callback(source.close)
            return source

        yield made


def test_what_is_read_is_the_source(make: Make) -> None:
    source = make(8)
    for start, stop in ((0, 1), (5, 70), (0, 1000), (9_000, 10_000), (63, 65), (0, len(DATA))):
        assert source.read(start, stop) == DATA[start:stop]


def test_what_is_here_is_not_fetched_again(make: Make) -> None:
    source = make(64)
    source.read(100, 400)
    source.read(150, 350)
    source.read(50, 500)  # of which the outer parts are missing
    assert source.nbytes == 450


def test_a_range_larger_than_all_slots_passes_through_them_once(make: Make) -> None:
    source = make(4)
    assert source.read(0, len(DATA)) == DATA
    assert source.nbytes == len(DATA)


def test_adjacent_pieces_are_fetched_together_up_to_a_limit(make: Make) -> None:
    source = make(64, threads=1)
    source.keep_busy()
    for start in range(0, 8 * SLOT, SLOT):
        source.pieces.want(FILE, start, start + SLOT)
    source.gate.set()
    assert source.read(0, 8 * SLOT) == DATA[: 8 * SLOT]
    assert source.fetched[1:] == [(0, 4 * SLOT), (4 * SLOT, 8 * SLOT)]


def test_what_is_read_now_goes_before_what_was_wanted(make: Make) -> None:
    source = make(64, threads=1)
    source.keep_busy()
    source.pieces.want(FILE, 1_000, 2_000)
    reader = threading.Thread(target=source.read, args=(5_000, 5_010))
    reader.start()
    until(lambda: bool(source.pieces._awaited))
    source.gate.set()
    reader.join(10)
    assert source.fetched[1] == (5_000, 5_010)


def test_read_ahead_never_pushes_out_what_is_yet_to_be_read(make: Make) -> None:
    source = make(6)
    source.pieces.want(FILE, 0, 100 * SLOT)  # far more than there is room for
    for start in range(0, 100 * SLOT, SLOT):
        assert source.read(start, start + SLOT) == DATA[start : start + SLOT]
    assert source.nbytes == 100 * SLOT


def test_readers_go_on_although_all_slots_hold_what_nobody_reads(make: Make) -> None:
    source = make(6, reserve=1)
    source.pieces.want(FILE, 0, 50 * SLOT)
    for start in range(60 * SLOT, 90 * SLOT, 7):  # parts of pieces, never a whole one, here and there
        assert source.read(start, start + 3) == DATA[start : start + 3]
    assert source.read(0, 50 * SLOT) == DATA[: 50 * SLOT]


def test_what_was_dropped_leaves_room_and_can_be_read_again(make: Make) -> None:
    source = make(8)
    source.pieces.want(FILE, 0, 6 * SLOT)
    assert source.read(0, SLOT) == DATA[:SLOT]
    source.pieces.drop(FILE, 0, 100 * SLOT)
    assert source.read(3 * SLOT - 5, 3 * SLOT + 5) == DATA[3 * SLOT - 5 : 3 * SLOT + 5]


def test_an_error_reaches_the_reader_and_the_next_read_tries_again(make: Make) -> None:
    source = make(8)
    source.failing = 1
    with pytest.raises(RemoteError, match="no answer"):
        source.read(0, 10)
    assert source.read(0, 10) == DATA[:10]


def test_an_error_of_read_ahead_is_told_to_nobody(make: Make) -> None:
    source = make(8, threads=1)
    source.failing = 1
    source.pieces.want(FILE, 0, 10)
    until(lambda: bool(source.fetched))
    assert source.read(0, 10) == DATA[:10]


def test_closing_wakes_who_waits(make: Make) -> None:
    source = make(8)
    source.gate.clear()
    failed: list[str] = []

    def read() -> None:
        try:
            source.read(0, 10)
        except RemoteError as e:
            failed.append(str(e))

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: any(piece.readers for piece in source.pieces._placed.values()))
    source.pieces.close()
    reader.join(10)
    assert failed == ["stopped"]


@pytest.mark.parametrize("seed", range(6))
def test_any_reads_of_any_threads_see_the_source(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    source = make(rng.choice([3, 5, 9, 40]), threads=rng.choice([1, 3]), reserve=rng.choice([1, 2]))
    wrong: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        mine = random.Random(seed)
        for _ in range(60):
            start = mine.randrange(len(DATA))
            stop = min(start + mine.choice([1, 10, SLOT, 700]), len(DATA))
            action = mine.random()
            if action < 0.2:
                source.pieces.want(FILE, start, stop)
            elif action < 0.3:
                source.pieces.drop(FILE, start, stop)
            elif source.read(start, stop) != DATA[start:stop]:
                wrong.append((start, stop))

    readers = [threading.Thread(target=work, args=(rng.random(),), daemon=True) for _ in range(5)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive(), "readers wait for each other"
    assert not wrong


def test_a_disk_arena_leaves_no_name_and_no_disk(tmp_path: Path) -> None:
    arena = DiskArena(4, SLOT, FileSystem(), tmp_path)
    arena.write(3, 0, memoryview(b"x" * SLOT))
    assert not list(tmp_path.iterdir())
    opened = arena._opened()
    assert os.fstat(opened.fd).st_size == 4 * SLOT
    number = opened.fd
    arena.close()
    os.fstat(number)  # whoever is amid a write keeps it
    del opened
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_a_disk_that_cannot_be_written_to_is_said_so(tmp_path: Path) -> None:
    arena = DiskArena(4, SLOT, FileSystem(), tmp_path / "missing")
    with pytest.raises(RemoteError, match="`cache_bytes`"):
        arena.write(0, 0, memoryview(b"x"))


def test_an_arena_copies_to_a_file(make: Make, tmp_path: Path) -> None:
    source = make(8)
    source.read(0, 3 * SLOT)
    with (tmp_path / "out").open("w+b") as file:
        with source.pieces.reading(FILE, SLOT, 2 * SLOT) as piece:
            source.arena.copy(piece.slot, 3, 20, file.fileno(), 5)
        assert file.read() == b"\0" * 5 + DATA[SLOT + 3 : SLOT + 23]
