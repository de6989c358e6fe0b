"""Time and memory of `shardxform prune` on a checkpoint of the real shape, against `cp` of as many bytes.

    python benchmarks/bench_prune.py [--dir SCRATCH] [--layers 4] [--runs 5] [--cache cold|warm] [--json]

Every figure comes from a process of its own, as a user would start it. Needs Linux, and free disk of about 2.3 times
the source (24 GB at 4 layers). The scratch folder is made fresh and removed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

ROOT: Final = Path(__file__).resolve().parents[1]
SHARDXFORM: Final = (sys.executable, "-m", "shardxform")
Cache = Literal["cold", "warm"]


@dataclass(frozen=True, slots=True)
class Done:
    """What one process took; bytes. `anonymous` is its most memory that no file backs, `read` what the disk gave."""

    seconds: float
    peak_rss: int
    anonymous: int
    read: int
    stdout: str


@dataclass(slots=True)
class Results:
    """Everything measured; seconds and bytes."""

    machine: dict[str, Any]
    source_bytes: int = 0
    output_bytes: int = 0
    cache: str = ""
    prune_seconds: list[float] = field(default_factory=list)
    cp_seconds: list[float] = field(default_factory=list)
    prune_peak_rss: list[int] = field(default_factory=list)
    prune_read_bytes: list[int] = field(default_factory=list)
    jobs: dict[int, dict[str, float]] = field(default_factory=dict)
    sparse: dict[str, dict[str, float]] = field(default_factory=dict)
    help_seconds: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Prune against cp, pair by pair."""
        return [prune / cp for prune, cp in zip(self.prune_seconds, self.cp_seconds, strict=True)]


# -- running -----------------------------------------------------------------------------------------------------------


def run(command: Sequence[str | Path], sample: bool = False) -> Done:
    """Run a process to its end.

    This process imports neither numpy nor the package, because a child starts with its parent's peak on Linux.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([str(word) for word in command], stdout=out, env=environment)
        peak = _Sampler(process.pid) if sample else None
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(str(word) for word in command)}: exit {process.returncode}")
    anonymous = peak.stop() if peak else 0
    return Done(seconds, usage.ru_maxrss * 1024, anonymous, usage.ru_inblock * 512, text)


class _Sampler:
    """Looks at a process's anonymous memory every 20 ms, as long as it lives."""

    def __init__(self, pid: int) -> None:
        self._rollup = Path(f"/proc/{pid}/smaps_rollup")
        self._stop = threading.Event()
        self._most = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while not self._stop.wait(0.02):
                for line in self._rollup.read_text().splitlines():
                    if line.startswith("Anonymous:"):
                        self._most = max(self._most, int(line.split()[1]) * 1024)

    def stop(self) -> int:
        """End sampling; the most that was seen."""
        self._stop.set()
        self._thread.join()
        return self._most


def set_cache(folder: Path, state: Cache) -> None:
    """Put the shards of `folder` into the page cache, or drop them from it."""
    buffer = bytearray(4 << 20)
    for path in shards(folder):
        with path.open("rb", buffering=0) as file:
            if state == "cold":
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.readinto(buffer):
                    pass


def remove(folder: Path) -> None:
    """Remove a folder, and wait until the disk knows."""
    if folder.exists():
        shutil.rmtree(folder)
        subprocess.run(["sync"], check=True)
        time.sleep(1)  # ext4 frees and discards blocks after the commit


def shards(folder: Path) -> list[Path]:
    """Shards of a checkpoint, by name."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])


def prune_command(source: Path, out: Path, keep: Path, *options: str) -> list[str | Path]:
    """The command line that is measured."""
    return [*SHARDXFORM, "prune", source, out, "--manifest", keep, *options]


def write_keep(path: Path, layers: int, experts: int = 256) -> None:
    """Keep every second expert: no two of them touch, the most copies a choice of that many can need."""
    ids = list(range(0, experts, 2))
    keep = {str(layer): ids for layer in range(layers)}
    manifest = {"format": "shardxform.keep", "version": 1, "keep": keep, "mtp_keep": {"0": ids}}
    path.write_text(json.dumps(manifest))


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)


# -- the four measurements ---------------------------------------------------------------------------------------------


def measure_against_cp(scratch: Path, results: Results, runs: int, cache: Cache, jobs: Sequence[str]) -> None:
    """Prune and cp in turns, both ending with the bytes on stable storage."""
    source, keep, reference = scratch / "source", scratch / "keep.json", scratch / "reference"
    run(prune_command(source, reference, keep, "-q"))
    results.output_bytes = sum(path.stat().st_size for path in shards(reference))
    for number in range(runs):
        set_cache(reference, "cold")  # so that only what is about to be read takes part of the cache
        set_cache(source, cache)
        done = run(prune_command(source, scratch / "out", keep, "-q", *jobs))
        remove(scratch / "out")
        set_cache(source, "cold")
        set_cache(reference, cache)
        copied = copy(reference, scratch / "copy")
        remove(scratch / "copy")
        results.prune_seconds.append(done.seconds)
        results.prune_peak_rss.append(done.peak_rss)
        results.prune_read_bytes.append(done.read)
        results.cp_seconds.append(copied)
        say(f"pair {number + 1}: prune {done.seconds:.2f} s, cp {copied:.2f} s, ratio {done.seconds / copied:.3f}")
    remove(reference)


def copy(source: Path, target: Path) -> float:
    """Seconds that cp and sync of all shards take."""
    started = time.perf_counter()
    target.mkdir()
    run(["cp", *shards(source), target])
    run(["sync", *shards(target), target])
    return time.perf_counter() - started


def measure_jobs(scratch: Path, results: Results, cache: Cache) -> None:
    """Memory of the whole process for 1, 2 and 4 jobs."""
    for jobs in (1, 2, 4):
        set_cache(scratch / "source", cache)
        command = prune_command(scratch / "source", scratch / "out", scratch / "keep.json", "-q", "-j", str(jobs))
        done = run(command, sample=True)
        remove(scratch / "out")
        results.jobs[jobs] = {"seconds": done.seconds, "peak_rss": done.peak_rss, "anonymous": done.anonymous}
        say(f"{jobs} jobs: {done.seconds:.2f} s, {done.peak_rss / 1e6:.1f} MB peak RSS")


def measure_sparse(scratch: Path, results: Results, runs: int) -> None:
    """Inspect and plan the table of the whole model, from headers alone."""
    whole, keep = scratch / "whole", scratch / "keep-whole.json"
    run([sys.executable, ROOT / "benchmarks/synth.py", whole, "--layers", "40", "--vision-depth", "27", "--sparse"])
    write_keep(keep, 40)
    commands: dict[str, list[str | Path]] = {
        "inspect": [*SHARDXFORM, "inspect", whole],
        "prune --dry-run": prune_command(whole, scratch / "never", keep, "--dry-run"),
    }
    for name, command in commands.items():
        done = [run(command) for _ in range(runs)]
        seconds = [one.seconds for one in done]
        results.sparse[name] = {
            "median": statistics.median(seconds),
            "min": min(seconds),
            "max": max(seconds),
            "peak_rss": max(one.peak_rss for one in done),
        }


def measure_help(results: Results, runs: int = 10) -> None:
    """Start of the command: what a typo costs."""
    results.help_seconds = [run([*SHARDXFORM, "--help"]).seconds for _ in range(runs)]


# -- output ------------------------------------------------------------------------------------------------------------


def machine(scratch: Path) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    mount = subprocess.run(["df", "--output=fstype", scratch], capture_output=True, text=True, check=True)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu.partition(": ")[2],
        "cores": os.cpu_count(),
        "memory_bytes": pages,
        "kernel": platform.release(),
        "file_system": mount.stdout.split()[-1],
        "python": platform.python_version(),
    }


def table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns, as a Markdown table."""
    rows = [list(header), *(list(line) for line in lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    yield ""
    yield title
    yield ""
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "| " + " | ".join(cells) + " |"
        if number == 0:
            yield "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"


def report(r: Results) -> Iterator[str]:
    """Everything as text."""
    m = r.machine
    yield (
        f"{m['cpu']}, {m['cores']} cores, {m['memory_bytes'] / 1e9:.0f} GB memory, Linux {m['kernel']},"
        f" {m['file_system']}, Python {m['python']}"
    )
    if r.prune_seconds:
        title = (
            f"prune against cp, {r.cache} cache: {r.source_bytes / 1e9:.2f} GB -> {r.output_bytes / 1e9:.2f} GB,"
            f" {len(r.ratios)} pairs"
        )
        lines = [
            _spread("shardxform prune", r.prune_seconds, "s", 2),
            _spread("cp + sync", r.cp_seconds, "s", 2),
            _spread("prune / cp, by pair", r.ratios, "", 3),
            _spread("prune, peak RSS", [rss / 1e6 for rss in r.prune_peak_rss], "MB", 1),
            _spread("prune, read from disk", [read / 1e9 for read in r.prune_read_bytes], "GB", 2),
        ]
        yield from table(title, ("", "median", "min", "max"), lines)
    if r.jobs:
        lines = [
            (str(jobs), f"{v['seconds']:.2f} s", f"{v['peak_rss'] / 1e6:.1f} MB", f"{v['anonymous'] / 1e6:.1f} MB")
            for jobs, v in r.jobs.items()
        ]
        yield from table("prune by number of jobs", ("jobs", "time", "peak RSS", "of it anonymous"), lines)
    if r.sparse:
        lines = [
            (what, f"{v['median']:.3f} s", f"{v['min']:.3f} s", f"{v['max']:.3f} s", f"{v['peak_rss'] / 1e6:.1f} MB")
            for what, v in r.sparse.items()
        ]
        title = "the whole model, 1,811 tensors, 71.9 GB (sparse files)"
        yield from table(title, ("", "median", "min", "max", "peak RSS"), lines)
    if r.help_seconds:
        lines = [_spread("shardxform --help", r.help_seconds, "s", 3)]
        yield from table("start", ("", "median", "min", "max"), lines)


def _spread(label: str, values: Sequence[float], unit: str, digits: int) -> tuple[str, ...]:
    figures = (statistics.median(values), min(values), max(values))
    return (label, *(f"{value:.{digits}f} {unit}".strip() for value in figures))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Time and memory of shardxform prune, against cp of as many bytes.")
    parser.add_argument("--dir", type=Path, help="where to make the scratch folder; the system's temporary directory")
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks; %(default)s")
    parser.add_argument("--runs", type=int, default=5, help="pairs of prune and cp; %(default)s")
    parser.add_argument("--cache", choices=["cold", "warm"], default="cold", help="of what is read; %(default)s")
    parser.add_argument("--jobs", type=int, help="for the comparison with cp; the command's own default")
    parser.add_argument("--only", choices=["cp", "jobs", "sparse", "help"], action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder goes in that case too
    wanted = given.only or ["cp", "jobs", "sparse", "help"]
    with tempfile.TemporaryDirectory(prefix="bench-prune-", dir=given.dir) as folder:
        scratch = Path(folder)
        results = Results(machine(scratch), cache=given.cache)
        if "help" in wanted:
            measure_help(results)
        if "sparse" in wanted:
            measure_sparse(scratch, results, runs=5)
        if "cp" in wanted or "jobs" in wanted:
            say(f"writing a checkpoint of {given.layers} layers to {scratch}")
            run([sys.executable, ROOT / "benchmarks/synth.py", scratch / "source", "--layers", str(given.layers)])
            subprocess.run(["sync"], check=True)
            write_keep(scratch / "keep.json", given.layers)
            results.source_bytes = sum(path.stat().st_size for path in shards(scratch / "source"))
        if "cp" in wanted:
            jobs = ["-j", str(given.jobs)] if given.jobs else []
            measure_against_cp(scratch, results, given.runs, given.cache, jobs)
        if "jobs" in wanted:
            measure_jobs(scratch, results, given.cache)
    if given.json:
        print(json.dumps({**asdict(results), "ratios": results.ratios}, indent=2))
    else:
        print("\n".join(report(results)))


if __name__ == "__main__":
    main()
