"""What `--ray` costs on one worker, and what more workers give: measured with one and two, simulated beyond.

    python benchmarks/bench_ray.py [--dir SCRATCH] [--layers 4] [--runs 3] [--only KIND] [--json]

KIND: prune, rtn (blocks of the real shape, written by synth.py; 17 GB of disk at 4 layers), tune, score
(examples/small-moe). A cluster of as many CPUs as workers is started once, and every command is a process of its own
that connects to it. What is simulated is told apart: the steps' own times on one worker, put on as many slots in the
order in which they are handed out, with the driver's time for each step in a row; disks and networks that keep up.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bench_prune import ROOT, SHARDXFORM, Cache, machine, remove, run, say, set_cache, shards, table, write_keep

SMALL_MOE: Final = ROOT / "examples" / "small-moe"
KINDS: Final = ("prune", "rtn", "tune", "score")
WORKERS: Final = (1, 2, 4, 8, 16, 32, 64)
BLOCKS: Final = 40  # of the model that is simulated
TIMED: Final = """
import sys
from shardxform.cluster import pool
def timed(module, name, folder):
    def task(*args):
        import importlib, os, time
        began = time.time()
        out = getattr(importlib.import_module(module), name)(*args)
        with open(f"{folder}/{name} {time.time_ns()} {os.getpid()}", "w") as file:
            file.write(f"{began} {time.time()}")
        return out
    return task
folder, names, slots = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
for each in names.split(","):
    module, name = each.split(":")
    target = pool if name == "do_step" else __import__(module, fromlist=[name])
    setattr(target, name, timed(module, name, folder))
if slots:
    from shardxform.cluster.session import Session
    Session.slots = lambda *_: slots
from shardxform.cli import main
main()
"""
STEPS: Final = "shardxform.cluster.worker:do_step"
BLOCK: Final = "shardxform.cluster.pool:make_states,shardxform.cluster.pool:do_block"
PART: Final = "shardxform.cluster.scoring:score_part"
TASKS: Final = {"prune": STEPS, "rtn": STEPS, "tune": f"{STEPS},{BLOCK}", "score": PART}


@dataclass(slots=True, kw_only=True)
class Result:
    """One kind; seconds. `ray` by workers, `tasks` of one run on one worker: kind of task -> seconds of each."""

    kind: str
    nbytes: int
    local: list[float] = field(default_factory=list)
    ray: dict[int, list[float]] = field(default_factory=dict)
    tasks: dict[str, list[float]] = field(default_factory=dict)
    span: float = 0.0
    simulated: dict[int, float] = field(default_factory=dict)

    @property
    def overhead(self) -> float:
        """How much longer one worker takes, in the median of pairs."""
        pairs = zip(self.ray[1], self.local, strict=True)
        return statistics.median(there / here for there, here in pairs) - 1


# -- measuring ---------------------------------------------------------------------------------------------------------


def command(kind: str, scratch: Path, out: Path) -> list[str | Path]:
    """What is measured."""
    text = SMALL_MOE / "text" / "calib.jsonl"
    tuning = ("--method", "auto-round", "--inputs", "fp", "--iters", "40", "--samples", "64", "--seqlen", "256")
    words: dict[str, list[str | Path]] = {
        "prune": ["prune", scratch / "source", out, "-m", scratch / "keep.json", "-q"],
        "rtn": ["quantize", scratch / "source", out, "-q"],
        "tune": ["quantize", SMALL_MOE, out, *tuning, "--dtype", "float32", "--data", text, "-q"],
        "score": ["score", SMALL_MOE, "-o", out, "--samples", "256", "--seqlen", "512", "--data", text, "-q"],
    }
    return words[kind]


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[str]:
    """Start Ray with so many CPUs; its address."""
    import ray

    ray.init("local", num_cpus=workers, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def once(kind: str, scratch: Path, words: Sequence[str | Path], cache: Cache = "cold") -> float:
    """Seconds of one process, from its start to its end, and its output removed."""
    if kind in ("prune", "rtn"):
        set_cache(scratch / "source", cache)
    seconds = run(words).seconds
    clear(scratch / "out")
    return seconds


def clear(out: Path) -> None:
    """Remove an output, a directory or a file."""
    if out.is_file():
        out.unlink()
    remove(out)


def measure(kind: str, scratch: Path, runs: int) -> Result:
    """Local and one worker in turns, then two workers, then the steps one by one."""
    words = command(kind, scratch, scratch / "out")
    here = [] if kind in ("tune", "score") else ["--jobs", "1"]
    result = Result(kind=kind, nbytes=0)
    for workers in (1, 2):
        with cluster(workers) as address:
            once(kind, scratch, [*SHARDXFORM, *words, "--ray", address])  # workers start, kernels are compiled
            for number in range(runs):
                if workers == 1:
                    result.local.append(once(kind, scratch, [*SHARDXFORM, *words, *here]))
                result.ray.setdefault(workers, []).append(once(kind, scratch, [*SHARDXFORM, *words, "--ray", address]))
                local = f"local {result.local[number]:.2f} s, " if workers == 1 else ""
                say(f"{kind}: {local}{workers} workers {result.ray[workers][number]:.2f} s")
            if workers == 1:
                time_tasks(scratch, address, result)
    return result


def time_tasks(scratch: Path, address: str, result: Result) -> None:
    """Seconds of every task on one worker; of the parts of scoring, as they would be cut for more workers."""
    result.tasks, result.span = timed(result.kind, scratch, address)
    for slots in WORKERS[2:] if result.kind == "score" else ():
        parts, _ = timed(result.kind, scratch, address, slots)
        result.simulated[slots] = max(parts["score_part"])
        say(f"score: {len(parts['score_part'])} parts, the longest {result.simulated[slots]:.2f} s")


def timed(kind: str, scratch: Path, address: str, slots: int = 0) -> tuple[dict[str, list[float]], float]:
    """Seconds of every task by its name, and from the beginning of the first to the end of the last."""
    tasks: dict[str, list[float]] = {}
    spans: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        words = [*command(kind, scratch, scratch / "out"), "--ray", address]
        once(kind, scratch, [sys.executable, "-c", TIMED, folder, TASKS[kind], str(slots), *words])
        for path in sorted(Path(folder).iterdir(), key=lambda path: path.name.split()[1]):
            began, ended = map(float, path.read_text().split())
            tasks.setdefault(path.name.split()[0], []).append(ended - began)
            spans.append((began, ended))
    return tasks, max(ended for _, ended in spans) - min(began for began, _ in spans)


# -- simulating --------------------------------------------------------------------------------------------------------


def simulate(result: Result, layers: int) -> None:
    """Seconds of the tasks of a model of 40 blocks on more workers."""
    for workers in WORKERS:
        if result.kind == "tune":
            made, tuned = (statistics.median(result.tasks[name]) for name in ("make_states", "do_block"))
            result.simulated[workers] = blocks_on(workers, made, tuned)
        elif result.kind in ("prune", "rtn"):
            times = result.tasks["do_step"]
            between = max(0.0, (result.span - sum(times)) / len(times))
            result.simulated[workers] = steps_on(workers, times * (BLOCKS // layers), between)


def steps_on(workers: int, times: Sequence[float], between: float) -> float:
    """Steps handed out in order to whoever is free; the driver takes `between` for each, one after the other."""
    free = [0.0] * workers
    driver = end = 0.0
    for seconds in times:
        driver = max(driver, heapq.heappop(free)) + between
        heapq.heappush(free, driver + seconds)
        end = max(end, driver + seconds)
    return end


def blocks_on(workers: int, made: float, tuned: float) -> float:
    """A chain of states, one task after the other, and a block after the states on both sides of it, on the same slots.

    Ready tasks begin in the order in which they were handed over.
    """
    tasks: list[tuple[float, tuple[int, ...]]] = []  # seconds, what it comes after
    for block in range(BLOCKS):
        first = len(tasks)
        if block == 0:
            tasks.append((made, ()))  # the embeddings
            first += 1
        before = 0 if block == 0 else first - 2
        tasks.append((made, (before,)))
        tasks.append((tuned, (before, first)))
    ends: dict[int, float] = {}
    slots: list[tuple[float, int]] = []
    todo, now = list(range(len(tasks))), 0.0
    while todo or slots:
        ready = [n for n in todo if all(ends.get(each, 1e99) <= now for each in tasks[n][1])]
        for n in ready[: workers - len(slots)]:
            ends[n] = now + tasks[n][0]
            heapq.heappush(slots, (ends[n], n))
            todo.remove(n)
        now, _ = heapq.heappop(slots)
    return now


# -- output ------------------------------------------------------------------------------------------------------------


def report(results: Sequence[Result], about: dict[str, Any]) -> Iterator[str]:
    """Everything as text."""
    yield f"{about['cpu']}, {about['cores']} cores, {about['file_system']}, Linux {about['kernel']}"
    rows = [
        (
            r.kind,
            f"{statistics.median(r.local):.2f} s",
            f"{statistics.median(r.ray[1]):.2f} s",
            f"{r.overhead:+.1%}",
            f"{statistics.median(r.ray[2]):.2f} s",
            f"{statistics.median(r.ray[1]) / statistics.median(r.ray[2]):.2f}",
        )
        for r in results
    ]
    header = ("", "local, 1 job", "1 worker", "overhead, by pair", "2 workers", "speed-up")
    yield from table("measured: the process, from its start to its end; median of runs", header, rows)
    lines = [
        (r.kind, *(f"{r.simulated[workers]:.1f} s" if workers in r.simulated else "" for workers in WORKERS))
        for r in results
        if r.simulated
    ]
    title = f"SIMULATED for {BLOCKS} blocks, from the times of single tasks on one worker; tasks only"
    if lines:
        yield from table(title, ("workers", *map(str, WORKERS)), lines)
    for r in results:
        yield ""
        told = ", ".join(
            f"{name}: {len(times)} of {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})"
            for name, times in r.tasks.items()
        )
        yield f"{r.kind}: tasks on one worker: {told}; first to last {r.span:.2f} s"


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="What --ray costs on one worker, and what more workers give.")
    parser.add_argument("--dir", type=Path, help="where to make the scratch folder; the system's temporary directory")
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks of the real shape; %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="pairs of a local run and one on a worker; %(default)s")
    parser.add_argument("--only", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder goes in that case too
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread here, as a worker has
    # Ray's is 15: on a machine that others use too, local runs would have an edge.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - its name
    os.environ["PYTHONPATH"] = str(ROOT)  # of the workers too
    wanted = given.only or list(KINDS)
    with tempfile.TemporaryDirectory(prefix="bench-ray-", dir=given.dir) as folder:
        scratch = Path(folder)
        if {"prune", "rtn"} & set(wanted):
            say(f"writing a checkpoint of {given.layers} layers to {scratch}")
            run([sys.executable, ROOT / "benchmarks/synth.py", scratch / "source", "--layers", str(given.layers)])
            subprocess.run(["sync"], check=True)
            time.sleep(1)
            write_keep(scratch / "keep.json", given.layers)
        results = [measure(kind, scratch, given.runs) for kind in wanted]
        about = machine(scratch)
        for result in results:
            if result.kind in ("prune", "rtn"):
                result.nbytes = sum(path.stat().st_size for path in shards(scratch / "source"))
            simulate(result, given.layers)
    if given.json:
        print(json.dumps({"machine": about, "results": [asdict(result) for result in results]}, indent=2))
    else:
        print("\n".join(report(results, about)))


if __name__ == "__main__":
    main()
