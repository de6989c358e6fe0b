"""Commands under a barrage of signals: started at once, hit at random moments, held to what an undisturbed run gives.

    with Nursery(COMPUTING) as process:
        nursery = process.having(SMALL_STEPS + UNWATCHED)
        case = cases(...)["prune"]
        whole = undisturbed(nursery, case, folder)
        assault(nursery, case, whole, folder, random.Random(0))

A command is forked from a process that has imported everything, so that most signals find it at work; from there on it
is what the shell starts: `shardxform.__main__.entry`, its own handlers, the interpreter's own way out.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from texts import few

ROOT = Path(__file__).resolve().parents[1]
SMALL_MOE = ROOT / "examples" / "small-moe"
KEEP = ROOT / "manifests" / "small-moe-keep8.json"
ENDS_WITHIN = 60.0  # seconds, on a machine that does other things too; the command itself gives up after eight
_CAUGHT = 1 << (signal.SIGTERM - 1)  # in the mask of /proc that says for which signals there is a handler
_SPENT = re.compile(rb'"(seconds|peak_rss_bytes)": [\d.]+')

_NURSERY = """
import gc, importlib, json, os, signal, sys, time

def imported(name):
    try:
        importlib.import_module(name)
    except ImportError:
        pass

def given(environment):
    os.environ.clear()
    os.environ.update(environment)
    constants = sys.modules.get("huggingface_hub.constants")
    if constants:  # of the hub's client, which reads the environment when it is imported
        importlib.reload(constants)

def become(ask):
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in ((1, ask["out"]), (2, ask["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(ask["folder"])
    sys.argv = ["shardxform", *ask["words"]]
    if ask["environment"] is not None:
        given(ask["environment"])
    exec(ask["first"], {})

def ended(pid, seconds):
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)

signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where this runs
modules = json.loads(sys.argv[1])
for name in modules:
    imported(name)
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)
from shardxform.__main__ import entry
gc.freeze()
print("ready", flush=True)
while line := sys.stdin.readline():
    ask = json.loads(line)
    if "wait" in ask:
        print(json.dumps(ended(ask["wait"], ask["seconds"])), flush=True)
    elif pid := os.fork():
        print(pid, flush=True)
    else:
        become(ask)
        entry()
        break
"""

SMALL_STEPS = """
from shardxform.plan import plan
plan.STEP_BYTES = 1 << 14
"""  # so that there are many
UNWATCHED = """
from shardxform.base import interrupts
interrupts._ORDERLY = 1e9
"""  # nobody ends a command that does not end in order

LIGHT = ("prune", "inspect", "verify", "quantize", "convert", "doctor", "card")
_MODELS = ("score", "evaluate", "select", "compress")
COPYING = [f"shardxform.cli.{name}" for name in LIGHT] + [
    "numpy",
    "shardxform.execution.runner",
    "shardxform.verification",
]
COPYING += ["shardxform.verification.data", "shardxform.execution.rounding"]
COMPUTING = [*COPYING, *(f"shardxform.cli.{name}" for name in _MODELS), "torch", "shardxform.experts.scoring"]
COMPUTING += ["shardxform.evaluation.evaluate", "shardxform.tuning.session", "shardxform.compress"]
COMPUTING += ["transformers.models.qwen3_5_moe.modeling_qwen3_5_moe", "tokenizers", "huggingface_hub", "httpx"]
COMPUTING += ["shardxform.cli.push", "shardxform.publish.hub"]


@dataclass
class Running:
    """A command that was started: its process, and the files that its words go to."""

    pid: int
    out: Path
    err: Path


class Nursery:
    """The process that commands are forked from; use as a context manager."""

    def __init__(self, modules: Sequence[str]) -> None:
        """Import modules."""
        self._alive: set[int] = set()
        self._first = ""
        self._environment: Mapping[str, str] | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY, json.dumps(modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._line() == "ready"

    def having(self, first: str, environment: Mapping[str, str] | None = None) -> Nursery:
        """The same process; what it forks runs `first` before a command, in an environment."""
        same = copy.copy(self)
        same._first, same._environment = first, environment and {**environment, "OMP_NUM_THREADS": "1"}
        return same

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.kill()
        self._process.communicate()

    def start(
        self,
        words: list[str],
        folder: Path,
        name: str,
        environment: Mapping[str, str] | None = None,
        first: str = "",
    ) -> Running:
        """Start a command, and return when it takes signals.

        Args:
            words: of the command.
            folder: that it works in.
            name: of the files there that get its words.
            environment: of it; None: the nursery's.
            first: code that its process runs before; after the nursery's.

        """
        out, err = folder / f"{name}.out", folder / f"{name}.err"
        run = Running(0, out, err)
        ask: dict[str, object] = {"words": words, "folder": str(folder), "out": str(out), "err": str(err)}
        environment = environment or self._environment
        ask |= {"first": self._first + first, "environment": environment and dict(environment)}
        run.pid = int(self._ask(ask))
        self._alive.add(run.pid)
        while not takes_signals(run.pid):
            time.sleep(0.0005)
        return run

    def wait(self, run: Running, seconds: float = ENDS_WITHIN) -> int | None:
        """Exit code of a command; None if it does not end, and is killed."""
        code: int | None = json.loads(self._ask({"wait": run.pid, "seconds": seconds}))
        if code is None:
            os.kill(run.pid, signal.SIGKILL)
            self._ask({"wait": run.pid, "seconds": 60})
        self._alive.discard(run.pid)
        return code

    def poll(self, run: Running) -> int | None:
        """Exit code of a command; None while it runs."""
        code: int | None = json.loads(self._ask({"wait": run.pid, "seconds": 0}))
        if code is not None:
            self._alive.discard(run.pid)
        return code

    def _ask(self, what: Mapping[str, object]) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@functools.cache
def nursery(modules: tuple[str, ...]) -> Nursery:
    """The process that commands are forked from, one for all tests of a worker."""
    made = Nursery(modules)
    atexit.register(made.__exit__)
    return made


def takes_signals(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, or has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    return bool(caught & _CAUGHT) or "\nState:\tZ" in status


@dataclass
class Case:
    """A command, and what it leaves.

    Attributes:
        words: of the command, given the folder that it works in.
        result: what of it is to be the same, given the folder and what it printed.

    """

    words: Callable[[Path], list[str]]
    result: Callable[[Path, bytes], object]


@dataclass
class Whole:
    """An undisturbed run: seconds that it took, and its result."""

    seconds: float
    result: object


@dataclass
class Outcome:
    """What came of a barrage: the exit code, None for a hang; what is wrong, if anything; seconds to the end."""

    code: int | None
    wrong: str = ""
    seconds: float = 0.0
    sent: list[tuple[float, int]] = field(default_factory=list)


def undisturbed(nursery: Nursery, case: Case, folder: Path, times: int = 2) -> Whole:
    """Run a command to its end, and once more: the first time more is read from the disk, and compiled."""
    for number in range(times):
        (place := folder / str(number)).mkdir(parents=True)
        began = time.monotonic()
        run = nursery.start(case.words(place), place, "whole")
        code = nursery.wait(run, 300)
        seconds = time.monotonic() - began
        assert code == 0, (code, run.err.read_text())
    return Whole(seconds, case.result(place, run.out.read_bytes()))


def assault(
    nursery: Nursery, case: Case, whole: Whole, folder: Path, rng: random.Random, *, again: bool = True
) -> Outcome:
    """Send one to five signals at a random moment, then run the command `again`, and say what is wrong."""
    folder.mkdir()
    run = nursery.start(case.words(folder), folder, "hit")
    outcome = Outcome(None)
    try:
        time.sleep(1.05 * whole.seconds * rng.random() ** 2)  # it may run faster than the one that was measured
        began = time.monotonic()
        outcome.sent = hail(run.pid, rng)
    finally:
        outcome.code = nursery.wait(run)
    outcome.seconds = time.monotonic() - began
    outcome.wrong = complaint(outcome.code, run.err.read_text())
    if again and not outcome.wrong:
        second = nursery.start(case.words(folder), folder, "again")
        code = nursery.wait(second, 300)
        if code != 0:
            outcome.wrong = f"the second run ended with {code}: {second.err.read_text()}"
        elif case.result(folder, second.out.read_bytes()) != whole.result:
            outcome.wrong = f"the second run of {folder} gave something else"
    if not outcome.wrong:
        shutil.rmtree(folder)
    return outcome


def hail(pid: int, rng: random.Random) -> list[tuple[float, int]]:
    """Send one to five of SIGINT and SIGTERM, mixed, from 0 ms up apart."""
    sent: list[tuple[float, int]] = []
    for _ in range(rng.randint(1, 5)):
        number = rng.choice((signal.SIGINT, signal.SIGTERM))
        pause = rng.choice((0.0, rng.uniform(0, 0.002), rng.uniform(0, 0.05), rng.uniform(0, 0.3)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        sent.append((pause, int(number)))
        time.sleep(pause)
    return sent


def complaint(code: int | None, errors: str) -> str:
    """What is wrong with the end of a command that was hit, if anything."""
    said = [line for line in errors.splitlines() if line.startswith("shardxform: ")]
    if code is None:
        return f"it hangs: {errors}"
    if "Traceback" in errors or "Exception ignored" in errors:
        return f"a traceback: {errors}"
    if code not in (0, 130):
        return f"exit code {code}: {errors}"
    if len(said) != (code == 130) or (said and not said[0].endswith("run the same command again to go on")):
        return f"exit code {code}, and {len(said)} lines: {errors}"
    return ""


def made(nursery: Nursery, folder: Path) -> Path:
    """An output for the commands that take one."""
    run = nursery.start(["quantize", str(SMALL_MOE), "made", "-m", str(KEEP), "-q"], folder, "made")
    assert nursery.wait(run, 300) == 0, run.err.read_text()
    return folder / "made"


# -- commands ---------------------------------------------------------------------------------------------------------


def tree(root: Path) -> dict[str, bytes]:
    """Every file of an output; of the record, all but what a clock and a machine say."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    if "shardxform.json" in files:
        files["shardxform.json"] = _SPENT.sub(b"", files["shardxform.json"])
    return files


def _out(folder: Path, _printed: bytes) -> object:
    return tree(folder / "out")


def _printed(folder: Path, printed: bytes) -> object:
    return _SPENT.sub(b"", printed).replace(str(folder).encode(), b"")


def _writing(*words: str | Path) -> Case:
    """A command that writes OUT, in many small steps."""

    def given(folder: Path) -> list[str]:
        return [words[0], *map(str, words[1:2]), str(folder / "out"), *map(str, words[2:]), "-q"]  # type: ignore[list-item]

    return Case(given, _out)


def _text(name: str, samples: int, seqlen: int) -> list[str]:
    return ["--data", str(few(name)), "--samples", str(samples), "--seqlen", str(seqlen)]


def cases(made: Path, repository: str = "", ray: str = "") -> dict[str, Case]:
    """The commands by name.

    Args:
        made: an output quantized from the example.
        repository: the example on a hub, if there is one.
        ray: address of a cluster, if there is one.

    """
    calib, held_out = _text("calib.jsonl", 12, 64), _text("heldout.jsonl", 4, 64)
    compress = ["--keep", "8", *_text("calib.jsonl", 4, 64), "--iters", "2"]
    compress += ["--eval-data", str(few("heldout.jsonl")), "--eval-samples", "2", "--eval-seqlen", "64"]
    pruned = ("-m", KEEP, "--max-shard-size", "300KB")
    found = {
        "prune": _writing("prune", SMALL_MOE, *pruned, "-j", "2"),
        "quantize": _writing("quantize", SMALL_MOE, *pruned, "-j", "2"),
        "tune": _writing(
            *("quantize", SMALL_MOE, "-m", KEEP, "--method", "auto-round", "--iters", "3"), *_text("calib.jsonl", 4, 64)
        ),
        "verify": Case(
            lambda _: ["verify", str(made), "--source", str(SMALL_MOE), "-m", str(KEEP), "-q", "--json"], _printed
        ),
        "score": Case(
            lambda folder: ["score", str(SMALL_MOE), "-o", str(folder / "saliency"), *calib, "-q"],
            lambda folder, _: (folder / "saliency").read_bytes(),
        ),
        "evaluate": Case(
            lambda folder: [
                *("evaluate", str(made), "--against", str(SMALL_MOE), *held_out),
                *("--work", str(folder / "work"), "--json", "-q"),
            ],
            _printed,
        ),
        "compress": _writing("compress", SMALL_MOE, *compress),
        "inspect": Case(lambda _: ["inspect", str(SMALL_MOE), "--json"], _printed),
        "doctor": Case(lambda _: ["doctor"], lambda *_: None),
    }
    if repository:
        found["remote"] = _writing("prune", repository, *pruned, "-j", "2")
        found["remote score"] = Case(
            lambda folder: ["score", repository, "-o", str(folder / "saliency"), *calib, "-q"],
            lambda folder, _: (folder / "saliency").read_bytes(),
        )
        found["push"] = Case(
            lambda folder: ["push", str(made), f"tester/{folder.name}", "--create", "-q"], lambda *_: None
        )
    if ray:
        found["ray"] = _writing("prune", SMALL_MOE, *pruned, "--ray", ray)
        found["ray score"] = Case(
            lambda folder: ["score", str(SMALL_MOE), "-o", str(folder / "saliency"), *calib, "-q", "--ray", ray],
            lambda folder, _: (folder / "saliency").exists(),
        )
    return found
