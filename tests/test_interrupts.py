"""SIGINT and SIGTERM, however many, at any moment: the end within seconds, on one line, with 130, and no byte lost.

With `--ray` see test_ray.py, which has a cluster. SHARDXFORM_SIGNALS=100 hits every command a hundred times, and
benchmarks/stress_signals.py more of them.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import barrage
import pytest
from barrage import Nursery
from hubserver import Fault, HubServer
from strategies import picked

from shardxform.base import interrupts
from shardxform.base.interrupts import Completions

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at /proc to see who takes signals")
RUNS = int(os.environ.get("SHARDXFORM_SIGNALS", "1"))
REPOSITORY = "org/small"


# -- the real commands ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    pytest.importorskip("huggingface_hub", minversion="1.0")
    with HubServer() as running:
        running.add_repo(REPOSITORY, barrage.SMALL_MOE)
        yield running


@pytest.fixture(scope="module")
def nursery(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    pytest.importorskip("transformers")
    environment = server.env(tmp_path_factory.mktemp("home"))
    return barrage.nursery(tuple(barrage.COMPUTING)).having(barrage.SMALL_STEPS + barrage.UNWATCHED, environment)


@pytest.fixture(scope="module")
def made(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return barrage.made(nursery, tmp_path_factory.mktemp("made"))


@linux
@pytest.mark.crash
@pytest.mark.parametrize("name", picked(["prune", "verify", "score", "quantize", "evaluate", "remote"], 2))
def test_a_barrage_ends_it_on_one_line_and_the_next_run_ends_it_well(
    name: str, nursery: Nursery, made: Path, tmp_path: Path
) -> None:
    case, rng = barrage.cases(made, REPOSITORY)[name], random.Random(name)
    whole = barrage.undisturbed(nursery, case, tmp_path / "whole", times=1)
    for number in range(RUNS):
        outcome = barrage.assault(nursery, case, whole, tmp_path / f"hit-{number}", rng)
        assert not outcome.wrong, outcome


def test_a_signal_that_strikes_while_the_last_line_is_said_does_not_keep_it_from_being_said() -> None:
    script = (
        "import os, signal\n"
        "from shardxform.base import interrupts\n"
        "say = interrupts._say\n"
        "def struck():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    say()\n"
        "interrupts._say = struck\n"
        "interrupts.take_over()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.pause()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (130, f"shardxform: {interrupts.STOPPED}\n")


@linux
@pytest.mark.parametrize("name", ["verify", "score"])
def test_a_hub_that_lets_it_wait_does_not_keep_it(
    name: str, nursery: Nursery, server: HubServer, made: Path, tmp_path: Path
) -> None:
    """Where headers are fetched, and where the weights of a block are."""
    words = {
        "verify": ["verify", str(made), "--source", REPOSITORY, "-m", str(barrage.KEEP), "-q"],
        "score": barrage.cases(made, REPOSITORY)["remote score"].words(tmp_path),
    }
    shard = "^/lfs/.*00003-of-00004"
    stalled = [Fault("429", match=shard, count=10_000, retry_after=600)]
    server.reset_counts()
    server.faults = stalled if name == "verify" else []
    run = nursery.start(words[name], tmp_path, "stalled")
    try:
        if name == "score":
            until(lambda: any(re.match(shard, each.path) for each in list(server.requests)))
            server.faults = stalled
        until(lambda: bool(server.fired))
        barrage.hail(run.pid, random.Random(0))
    finally:
        code = nursery.wait(run)
        server.faults = []
    assert (code, barrage.complaint(code, run.err.read_text())) == (130, "")
    if name == "score":
        assert re.search("stopped: [0-3] of 4 blocks are safe", run.err.read_text())


def until(wanted: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not wanted():
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- the process that was taken over ----------------------------------------------------------------------------------


START = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests run
from shardxform.base import interrupts
"""


def ended(script: str) -> tuple[int, list[str]]:
    """Exit code and stderr of a process that does this."""
    words = [sys.executable, "-c", START + script]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_where_it_stands(number: int) -> None:
    script = f"interrupts.take_over()\nwith interrupts.during('[2/6] select'):\n    signal.raise_signal({number})\n"
    assert ended(script) == (130, [f"shardxform: [2/6] select: {interrupts.STOPPED}"])


def test_in_order_it_goes_on_to_the_next_check_whatever_comes_meanwhile() -> None:
    script = """
interrupts.take_over()
try:
    with interrupts.deferred():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        print("goes on", file=sys.stderr)
        interrupts.check()
        print("not here", file=sys.stderr)
except KeyboardInterrupt:
    signal.raise_signal(signal.SIGINT)
    print("on the way out", file=sys.stderr)
interrupts.settle()
"""
    assert ended(script) == (130, ["goes on", "on the way out", f"shardxform: {interrupts.STOPPED}"])


def test_who_never_looks_is_ended() -> None:
    script = """
interrupts._ORDERLY = 0.2
interrupts.take_over()
with interrupts.deferred():
    signal.raise_signal(signal.SIGTERM)
    time.sleep(100)
"""
    assert ended(script) == (130, [f"shardxform: {interrupts.STOPPED}"])


def test_a_call_that_lets_no_handler_run_is_ended() -> None:
    script = """
import hashlib, threading
interrupts.take_over()
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""
    assert ended(script) == (130, [f"shardxform: {interrupts.STOPPED}"])


def test_threads_that_hang_do_not_keep_the_interpreter() -> None:
    script = """
import threading
interrupts._ORDERLY = 0.2
interrupts.take_over()
threading.Thread(target=time.sleep, args=(100,)).start()
try:
    with interrupts.deferred():
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    pass
"""
    assert ended(script) == (130, [f"shardxform: {interrupts.STOPPED}"])


def test_the_last_line_is_not_written_into_a_file_that_has_the_place_of_stderr(tmp_path: Path) -> None:
    script = """
interrupts.take_over()
for _ in range(3):
    os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
signal.raise_signal(signal.SIGINT)
"""
    shard = tmp_path / "shard"
    words = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", START + script, str(shard)]
    assert subprocess.run(words, timeout=60, check=False).returncode == 130
    assert shard.read_bytes() == b""


def test_what_is_ignored_stays_so_and_the_way_out_is_not_disturbed() -> None:
    script = """
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.take_over()
signal.raise_signal(signal.SIGINT)
interrupts.settle()
signal.raise_signal(signal.SIGTERM)
"""
    assert ended(script) == (0, [])


# -- a program that uses the library ----------------------------------------------------------------------------------


@pytest.fixture
def python_takes_sigint() -> Iterator[None]:
    """As in a program that did nothing about signals; where the tests run it may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("python_takes_sigint")
def test_ctrl_c_waits_for_a_check() -> None:
    seen = []

    def work() -> None:
        with interrupts.deferred(), interrupts.deferred():
            ctrl_c()
            ctrl_c()
            seen.append("goes on")
            interrupts.check()
            seen.append("not here")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["goes on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not interrupts.asked()


@pytest.mark.usefixtures("python_takes_sigint")
def test_ctrl_c_that_nobody_checked_for_comes_at_the_end_of_the_block() -> None:
    seen = []

    def work() -> None:
        with interrupts.deferred():
            ctrl_c()
            seen.append("to the end")
        seen.append("not here")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert seen == ["to the end"]


@pytest.mark.usefixtures("python_takes_sigint")
def test_another_error_is_told_rather() -> None:
    def work() -> None:
        with interrupts.deferred():
            ctrl_c()
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        work()
    interrupts.check()


def test_handlers_of_the_program_stay() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    try:
        with interrupts.deferred():
            ctrl_c()
            interrupts.check()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


@pytest.mark.usefixtures("python_takes_sigint")
def test_a_wait_for_an_event_ends_at_once_and_other_threads_are_not_concerned() -> None:
    event = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(interrupts.wait, event, 0.5)
        threading.Timer(0.1, ctrl_c).start()
        with pytest.raises(KeyboardInterrupt):
            interrupts.wait(event, 60)
        assert theirs.result() is False
    event.set()
    assert interrupts.wait(event, 60)


MANY = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from shardxform import Checkpoint, Manifest, RunOptions, plan_prune, run
from shardxform.execution import runner
from shardxform.plan import plan
from shardxform.errors import Interrupted
plan.STEP_BYTES = 4096
made = plan_prune(Checkpoint.open(sys.argv[1]), Manifest.load(sys.argv[2]))
stepped = runner._Loop._step
def step(self, todo):
    started.set()
    sent.wait()  # so that none comes after the run
    return stepped(self, todo)
runner._Loop._step = step
def send():
    started.wait()
    for _ in range(20):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.0005)
    sent.set()
for number in range(10):
    started, sent = threading.Event(), threading.Event()
    threading.Thread(target=send, daemon=True).start()
    try:
        run(made, sys.argv[3] + str(number), RunOptions(jobs=4))
    except Interrupted:
        print("stopped")
"""


def test_a_run_of_the_library_bears_ctrl_c_twenty_times(small_moe: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", MANY, str(small_moe), str(barrage.KEEP), str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "stopped\n" * 10, done.stderr


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_futures_are_told_in_the_order_in_which_they_complete_each_once() -> None:
    under_way: Completions[int, str] = Completions()
    first, second, third = Future[int](), Future[int](), Future[int]()
    third.set_exception(ValueError())
    for future, key in ((first, "first"), (second, "second"), (third, "third")):
        under_way.add(future, key)
    assert under_way.next() == [third]  # it was done when it was added
    assert under_way.next() == []
    second.set_result(2)
    first.cancel()
    first.set_running_or_notify_cancel()
    assert under_way.next() == [second, first]
    assert list(under_way.pending.values()) == ["first", "second", "third"]  # until they are taken out


def test_waiting_for_all_holds_none() -> None:
    under_way: Completions[bool, int] = Completions()
    gate = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        for number in range(20):
            under_way.add(pool.submit(gate.wait, 60), number)
        threading.Timer(0.3, gate.set).start()
        under_way.wait()
        assert all(future.done() for future in under_way.pending)
