"""What `shardxform prune` of a repository on a hub takes, against a plain ranged download of the same bytes.

    python benchmarks/bench_remote.py [--dir SCRATCH] [--layers 1] [--runs 3] [--connections 4] [--json]

The hub is tests/hubserver.py in a process of its own, on this machine: what is measured is the work around the network.
The plain download asks for the very ranges that the plan reads, joined where they touch, through huggingface_hub's own
client, and writes them to one file; both end with the bytes on stable storage. Needs Linux, huggingface_hub, and free
disk of about 2.2 times the source (12 GB at one layer). The scratch folder is made fresh and removed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
SHARDXFORM: Final = (sys.executable, "-m", "shardxform")
NAME: Final = "org/synthetic"
_MOST: Final = 16 << 20  # bytes of one request of the plain download
_FAULTS: Final = ("drop", "429", "500", "503", "short", "expired", "no_range", "wrong_length", "changed")


@dataclass(frozen=True, slots=True)
class Done:
    """What one process took: seconds, most memory, most disk in its output and in files without a name, in bytes."""

    seconds: float
    peak_rss: int
    peak_disk: int
    stdout: str


@dataclass(slots=True)
class Results:
    """Everything measured; seconds and bytes."""

    connections: int
    source_bytes: int = 0
    plan_bytes: int = 0
    output_bytes: int = 0
    served_bytes: list[int] = field(default_factory=list)
    prune_seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    peak_rss: list[int] = field(default_factory=list)
    local_rss: int = 0
    peak_disk: list[int] = field(default_factory=list)
    looked_bytes: int = 0
    faults: int = 0
    fault_seconds: float = 0
    identical: bool = False

    @property
    def ratios(self) -> list[float]:
        """Throughput of prune over that of the plain download, pair by pair."""
        return [plain / prune for prune, plain in zip(self.prune_seconds, self.plain_seconds, strict=True)]


# -- processes ---------------------------------------------------------------------------------------------------------


class Hub:
    """The server's process; answers one line of JSON to each line that it is sent."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, __file__, "--serve", str(folder)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.endpoint = str(self._read()["endpoint"])

    def ask(self, **what: object) -> dict[str, Any]:
        """Forget the counts, after what is asked for: `counts`, or `faults` to come."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


def serve(folder: Path) -> None:
    """Be the server, until stdin ends."""
    sys.path.insert(0, str(ROOT / "tests"))
    hubserver: Any = __import__("hubserver")
    with hubserver.HubServer() as server:
        server.add_repo(NAME, folder)
        print(json.dumps({"endpoint": server.endpoint}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            counts = {"bytes": server.data_bytes(NAME), "fired": len(server.fired)}
            server.reset_counts()
            if asked.get("faults"):
                server.random_faults(1, asked["rate"], _FAULTS, asked["faults"], match=r"\.safetensors$")
            print(json.dumps(counts), flush=True)


def run(command: Sequence[str | Path], environment: Mapping[str, str], out: Path | None = None) -> Done:
    """Run a process to its end, and watch the disk that it takes."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen([str(word) for word in command], stdout=told, env=environment)
        disk = _Disk(process.pid, out) if out else None
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        text = told.read().decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(str(word) for word in command)}: exit {process.returncode}")
    return Done(seconds, usage.ru_maxrss * 1024, disk.stop() if disk else 0, text)


class _Disk:
    """Looks at the disk that an output and files without a name take, every 50 ms."""

    def __init__(self, pid: int, out: Path) -> None:
        self._fds, self._out = Path(f"/proc/{pid}/fd"), out
        self._stop = threading.Event()
        self._most = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            total = 0
            for path in (*self._out.rglob("*"), *_listed(self._fds)):
                with contextlib.suppress(OSError):
                    info = path.stat()
                    nameless = path.parent == self._fds and info.st_nlink == 0
                    total += info.st_blocks * 512 if nameless or path.parent != self._fds else 0
            self._most = max(self._most, total)

    def stop(self) -> int:
        """End looking; the most that was seen."""
        self._stop.set()
        self._thread.join()
        return self._most


def _listed(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []


# -- the plain download ------------------------------------------------------------------------------------------------


def plain(ranges: Path, out: Path, connections: int) -> None:
    """Be the download: threads that take one range after the other."""
    import huggingface_hub as hub

    name, commit, listed = json.loads(ranges.read_text())
    session: Any = hub.get_session()
    urls = {file: hub.hf_hub_url(name, file, revision=commit) for file in {file for file, _, _ in listed}}
    places = {file: hub.get_hf_file_metadata(url).location for file, url in urls.items()}
    fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(fd, 0, sum(stop - start for _, start, stop in listed))
    todo = _placed(listed)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                task = next(todo, None)
            if task is None:
                return
            file, start, stop, at = task
            headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            with session.stream("GET", places[file], headers=headers) as answer:
                assert answer.status_code == 206
                for block in answer.iter_raw():
                    os.pwrite(fd, block, at)
                    at += len(block)

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fdatasync(fd)
    os.close(fd)


def _placed(ranges: Sequence[tuple[str, int, int]]) -> Iterator[tuple[str, int, int, int]]:
    """Ranges with their places in the file that is written."""
    at = 0
    for file, start, stop in ranges:
        yield file, start, stop, at
        at += stop - start


def write_ranges(source: Path, keep: Path, path: Path, commit: str) -> int:
    """The ranges that the plan reads, in its order; their bytes."""
    from shardxform import Checkpoint, Manifest, plan_prune

    plan = plan_prune(Checkpoint.open(source), Manifest.load(keep))
    joined: list[list[Any]] = []
    for piece in (piece for step in plan.steps for piece in step.reads):
        touches = joined and joined[-1][0] == piece.file and joined[-1][2] == piece.offset
        if touches and piece.end - joined[-1][1] <= _MOST:
            joined[-1][2] = piece.end
        else:
            cuts = range(piece.offset, piece.end, _MOST)
            joined += [[piece.file, at, min(at + _MOST, piece.end)] for at in cuts]
    path.write_text(json.dumps([NAME, commit, joined]))
    return sum(stop - start for _, start, stop in joined)


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(scratch: Path, results: Results, runs: int, limit: str) -> None:
    """Everything, in turns."""
    source, keep, ranges, local = (scratch / name for name in ("source", "keep.json", "ranges.json", "local"))
    ids = list(range(0, 256, 2))
    layers = len(json.loads((source / "config.json").read_text())["text_config"]["layer_types"])
    kept = {"keep": {str(layer): ids for layer in range(layers)}, "mtp_keep": {"0": ids}}
    keep.write_text(json.dumps({"format": "shardxform.keep", "version": 1, **kept}))
    results.source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    hub = Hub(source)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(scratch / "home")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    try:
        looked = run([*SHARDXFORM, "inspect", NAME, "--json"], environment)
        results.looked_bytes = int(hub.ask(counts=True)["bytes"])
        commit = json.loads(looked.stdout)["path"].partition("@")[2]
        results.plan_bytes = write_ranges(source, keep, ranges, commit)
        results.local_rss = run([*SHARDXFORM, "prune", source, local, "-m", keep, "-q"], environment).peak_rss
        results.output_bytes = sum(path.stat().st_size for path in local.glob("*.safetensors"))
        options = ("--connections", str(results.connections), "--cache-limit", limit, "-q")
        pruning: list[str | Path] = [*SHARDXFORM, "prune", NAME, scratch / "out", "-m", keep, *options]
        for number in range(runs):
            _settle()
            done = run(pruning, environment, scratch / "out")
            results.served_bytes.append(int(hub.ask(counts=True)["bytes"]))
            same = _same(local, scratch / "out")
            results.identical = same and (results.identical or number == 0)
            shutil.rmtree(scratch / "out")
            _settle()
            plainly: list[str | Path] = [
                sys.executable,
                __file__,
                "--plain",
                ranges,
                scratch / "plain",
                str(results.connections),
            ]
            download = run(plainly, environment)
            hub.ask(counts=True)
            (scratch / "plain").unlink()
            results.prune_seconds.append(done.seconds)
            results.plain_seconds.append(download.seconds)
            results.peak_rss.append(done.peak_rss)
            results.peak_disk.append(done.peak_disk)
            say(f"pair {number + 1}: prune {done.seconds:.2f} s, plain {download.seconds:.2f} s")
        hub.ask(faults=100, rate=0.25)
        broken = run(pruning, environment)
        results.fault_seconds, results.faults = broken.seconds, int(hub.ask(counts=True)["fired"])
        results.identical = results.identical and _same(local, scratch / "out")
    finally:
        hub.close()


def _settle() -> None:
    """Let the disk come to rest."""
    subprocess.run(["sync"], check=True)
    time.sleep(1)


def _same(one: Path, other: Path) -> bool:
    """Whether two outputs hold the same files, the record apart, which names the source."""
    names = sorted(path.name for path in one.iterdir() if path.name != "shardxform.json")
    there = sorted(path.name for path in other.iterdir() if path.name != "shardxform.json")
    return names == there and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def report(r: Results) -> Iterator[str]:
    """Everything as text."""
    yield f"source {r.source_bytes / 1e9:.2f} GB, output {r.output_bytes / 1e9:.2f} GB, {r.connections} connections"
    yield f"inspect: {r.looked_bytes / 1e3:,.0f} kB of shards served"
    rate = [r.plan_bytes / 1e6 / seconds for seconds in r.prune_seconds]
    plainly = [r.plan_bytes / 1e6 / seconds for seconds in r.plain_seconds]
    yield f"prune: {_spread(rate)} MB/s; plain download: {_spread(plainly)} MB/s"
    yield f"throughput over plain, by pair: {_spread(r.ratios, 3)}"
    yield f"served over what the plan reads: {max(r.served_bytes) / r.plan_bytes:.5f}"
    yield f"peak RSS: {max(r.peak_rss) / 1e6:.1f} MB; from a folder {r.local_rss / 1e6:.1f} MB"
    yield f"peak disk over output: {max(r.peak_disk) / r.output_bytes:.4f}"
    yield f"{r.faults} faults: {r.fault_seconds:.1f} s; outputs {'identical' if r.identical else 'DIFFER'}"


def _spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def say(text: str) -> None:
    """Tell what is going on."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
        return
    if sys.argv[1:2] == ["--plain"]:
        plain(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description="shardxform prune from a hub, against a plain ranged download.")
    parser.add_argument("--dir", type=Path, help="where to make the scratch folder; the system's temporary directory")
    parser.add_argument("--source", type=Path, help="a checkpoint that benchmarks/synth.py made; made anew where none")
    parser.add_argument("--layers", type=int, default=1, help="decoder blocks; %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="pairs of prune and plain download; %(default)s")
    parser.add_argument("--connections", type=int, default=4, help="of both; %(default)s")
    parser.add_argument("--cache-limit", default="300MB", help="of prune, which needs none of it; %(default)s")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder goes in that case too
    with tempfile.TemporaryDirectory(prefix="bench-remote-", dir=given.dir) as folder:
        scratch = Path(folder)
        results = Results(given.connections)
        if given.source:
            (scratch / "source").symlink_to(given.source.resolve())
        else:
            say(f"writing a checkpoint of {given.layers} layers to {scratch}")
            make: list[str | Path] = [
                sys.executable,
                ROOT / "benchmarks/synth.py",
                scratch / "source",
                "--layers",
                str(given.layers),
            ]
            run(make, os.environ)
        measure(scratch, results, given.runs, given.cache_limit)
    if given.json:
        print(json.dumps({**asdict(results), "ratios": results.ratios}, indent=2))
    else:
        print("\n".join(report(results)))


if __name__ == "__main__":
    main()
