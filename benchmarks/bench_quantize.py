"""Time and memory of `shardxform quantize` on a checkpoint of the real shape, against auto-round and against reading.

    python benchmarks/bench_quantize.py [--dir SCRATCH] [--layers 4] [--runs 3] [--only upstream|read|options] [--json]

Every figure comes from a process of its own, as a user would start it. `upstream` needs auto-round and torch. Needs
Linux, and free disk of about 1.6 times the source (17 GB at 4 layers).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bench_prune import ROOT, SHARDXFORM, machine, remove, say, set_cache, shards, table, write_keep

UPSTREAM: Final = """
import sys, torch
torch.set_num_threads(int(sys.argv[3]))
from auto_round.compressors.model_free import ModelFreeCompressor
ModelFreeCompressor(sys.argv[1], scheme="W4A16", disable_opt_rtn=True).quantize_and_save(
    output_dir=sys.argv[2], format="auto_round")
"""
LIBRARIES: Final = {
    "python": "pass",
    "numpy": "import numpy",
    "numpy + numba kernels": "import shardxform.formats.kernels",
    "torch": "import torch",
}


@dataclass(frozen=True, slots=True)
class Took:
    """What one process took: seconds of the wall clock and of the processors, peak resident bytes."""

    wall: float
    cpu: float
    peak_rss: int


@dataclass(slots=True)
class Results:
    """Everything measured."""

    machine: dict[str, Any]
    source_bytes: dict[str, int] = field(default_factory=dict)
    upstream: dict[str, list[Took]] = field(default_factory=dict)
    read: dict[str, list[Took]] = field(default_factory=dict)
    options: dict[str, Took] = field(default_factory=dict)
    libraries: dict[str, Took] = field(default_factory=dict)


def took(command: Sequence[str | Path], threads: int | None = None) -> Took:
    """Run a process to its end, on `threads` threads where it can be told."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if threads:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    started = os.times().elapsed
    process = subprocess.Popen(
        [str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]}: exit {process.returncode}: {errors.decode()[-2000:]}")
    return Took(os.times().elapsed - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def quantize(source: Path, out: Path, *options: str) -> list[str | Path]:
    """The command line that is measured."""
    return [*SHARDXFORM, "quantize", source, out, "-q", *options]


def synthesize(source: Path, results: Results, *options: str) -> None:
    """Write a source, and note its size."""
    say(f"writing {source}")
    subprocess.run([sys.executable, ROOT / "benchmarks/synth.py", source, *options], check=True, stdout=sys.stderr)
    subprocess.run(["sync"], check=True)
    results.source_bytes[source.name] = sum(path.stat().st_size for path in shards(source))


def measure_upstream(scratch: Path, results: Results, runs: int) -> None:
    """Round two blocks on one thread, in turns with auto-round's model-free mode; both read from the page cache."""
    source, out = scratch / "two-blocks", scratch / "out"
    small = ("--layers", "2", "--text-only", "--no-mtp", "--vocab", "16384", "--shard-gb", "1")
    synthesize(source, results, *small)
    upstream: list[str | Path] = [sys.executable, "-c", UPSTREAM, source, out, "1"]
    for number in range(runs):
        for name, command in (
            ("shardxform quantize -j 1", quantize(source, out, "-j", "1")),
            ("auto-round, model-free", upstream),
        ):
            set_cache(source, "warm")
            done = took(command, threads=1)
            remove(out)
            results.upstream.setdefault(name, []).append(done)
            say(f"run {number + 1}: {name}: {done.wall:.1f} s, {done.cpu:.1f} CPU s, {done.peak_rss / 1e6:.0f} MB")
    remove(source)


def measure_read(scratch: Path, results: Results, runs: int) -> None:
    """Prune and quantize in one pass, in turns with reading the source once; both from the disk."""
    source, out = scratch / "source", scratch / "out"
    keep = ("-m", str(scratch / "keep.json"))
    read: list[str | Path] = ["sh", "-c", 'cat "$@" > /dev/null', "sh", *shards(source)]
    for number in range(runs):
        for name, command in (
            ("quantize", quantize(source, out)),
            ("prune and quantize", quantize(source, out, *keep)),
            ("cat SRC > /dev/null", read),
        ):
            set_cache(source, "cold")
            done = took(command)
            remove(out)
            results.read.setdefault(name, []).append(done)
            say(f"run {number + 1}: {name}: {done.wall:.1f} s, {done.cpu:.1f} CPU s, {done.peak_rss / 1e6:.0f} MB")


def measure_options(scratch: Path, results: Results) -> None:
    """Memory and time of the options that could change them."""
    source, out = scratch / "source", scratch / "out"
    for options in (
        ("-j", "1"),
        ("-j", "2"),
        ("-j", "4"),
        ("--search",),
        ("--format", "compressed-tensors"),
        ("--max-shard-size", "500MB"),
    ):
        set_cache(source, "cold")
        results.options[" ".join(options)] = took(quantize(source, out, *options))
        remove(out)
        say(f"{options}: {results.options[' '.join(options)]}")
    for name, code in LIBRARIES.items():
        results.libraries[name] = took([sys.executable, "-c", code])


def report(r: Results) -> Iterator[str]:
    """Everything as text."""
    m = r.machine
    yield f"{m['cpu']}, {m['cores']} cores, Linux {m['kernel']}, {m['file_system']}, Python {m['python']}"
    header = ("", "wall", "CPU", "GB/s of CPU", "peak RSS")
    for title, measured, size in (
        ("one thread, two blocks, page cache", r.upstream, r.source_bytes.get("two-blocks", 0)),
        ("all jobs, from the disk", r.read, r.source_bytes.get("source", 0)),
    ):
        if measured:
            lines = [(name, *_figures(runs, size)) for name, runs in measured.items()]
            lines += [(f"{a} / {b}", *ratio) for a, b, ratio in _ratios(measured)]
            yield from table(
                f"{title}: {size / 1e9:.2f} GB, medians of {len(next(iter(measured.values())))}", header, lines
            )
    for title, singles in (("by option", r.options), ("importing alone", r.libraries)):
        if singles:
            size = r.source_bytes.get("source", 0) if singles is r.options else 0
            yield from table(title, header, [(name, *_figures([one], size)) for name, one in singles.items()])


def _figures(runs: Sequence[Took], nbytes: int) -> tuple[str, ...]:
    wall, cpu = (statistics.median(values) for values in ([t.wall for t in runs], [t.cpu for t in runs]))
    rate = f"{nbytes / 1e9 / cpu:.2f}" if nbytes else ""
    return f"{wall:.2f} s", f"{cpu:.2f} s", rate, f"{max(t.peak_rss for t in runs) / 1e6:.0f} MB"


def _ratios(measured: dict[str, list[Took]]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """The last one against each of the others, run by run."""
    *others, last = measured
    for other in others:
        pairs = list(zip(measured[last], measured[other], strict=True))
        wall = statistics.median(a.wall / b.wall for a, b in pairs)
        cpu = statistics.median(a.cpu / b.cpu for a, b in pairs)
        memory = statistics.median(a.peak_rss / b.peak_rss for a, b in pairs)
        yield last, other, (f"{wall:.2f}", f"{cpu:.2f}", "", f"{memory:.2f}")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Time and memory of shardxform quantize.")
    parser.add_argument("--dir", type=Path, help="where to make the scratch folder; the system's temporary directory")
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks of the large source; %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="rounds of each comparison; %(default)s")
    parser.add_argument("--only", choices=["upstream", "read", "options"], action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    given = parser.parse_args()
    wanted = given.only or ["upstream", "read", "options"]
    with tempfile.TemporaryDirectory(prefix="bench-quantize-", dir=given.dir) as folder:
        scratch = Path(folder)
        results = Results(machine(scratch))
        if "upstream" in wanted:
            measure_upstream(scratch, results, given.runs)
        if "read" in wanted or "options" in wanted:
            synthesize(scratch / "source", results, "--layers", str(given.layers))
            write_keep(scratch / "keep.json", given.layers)
        if "read" in wanted:
            measure_read(scratch, results, given.runs)
        if "options" in wanted:
            measure_options(scratch, results)
        print(json.dumps(asdict(results), indent=2) if given.json else "\n".join(report(results)))


if __name__ == "__main__":
    main()
