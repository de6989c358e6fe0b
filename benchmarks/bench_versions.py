"""CPU seconds and memory of every command in two versions of the project, in turns: whether the later one is slower.

    git worktree add /tmp/before COMMIT
    python benchmarks/bench_versions.py /tmp/before [--dir SCRATCH] [--pairs 3] [--only prune] [--json]

Writes a checkpoint of the shapes of Qwen3.5-35B-A3B (0.9 GB: two blocks of 64 experts), with the tokenizer and the text
of examples/small-moe. Each command is run by either version as a process of its own, on one thread, first one, then the
other, the order changing from pair to pair, after one run of both that fills caches and compiles kernels. CPU seconds
are the kernel's, which other processes disturb less than the clock, and the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from synth import Spec, write_checkpoint

HERE: Final = Path(__file__).resolve().parents[1]
SMALL_MOE: Final = HERE / "examples" / "small-moe"
LAYERS: Final = 2
EXPERTS: Final = 64
DATA: Final = ["--data", str(SMALL_MOE / "text" / "calib.jsonl"), "--samples", "4", "--seqlen", "256"]
STEPS: Final = ["--batch-size", "2"]
COMMANDS: Final = {
    "version": [],
    "prune": ["-m", "KEEP"],
    "rtn": [],
    "rtn --search": ["--search"],
    "auto-round": ["--method", "auto-round", "--iters", "4", *STEPS, *DATA],
    "heal": ["-m", "KEEP", "--heal", "moe", "--heal-lr", "0.01", "--heal-iters", "4", *STEPS, *DATA],
    "score": DATA,
    "evaluate": DATA,
}
"""What is run, by the name that is shown; `KEEP` stands for a manifest of half the experts."""


def main() -> None:
    """Print a row a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="root of a tree of the other version")
    parser.add_argument("--dir", type=Path, help="where to make the scratch folder; the system's temporary directory")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each version, %(default)s; twice the quick ones")
    parser.add_argument("--only", choices=list(COMMANDS), action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="print everything measured, one JSON object a command")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        scratch = Path(folder)
        make_source(scratch)
        for name in args.only or COMMANDS:
            row = compare(name, {"before": args.before.resolve(), "now": HERE}, args.pairs, scratch)
            print(json.dumps(row) if args.json else line(row), flush=True)


def make_source(scratch: Path) -> None:
    """Write the checkpoint, and a manifest that keeps every second expert."""
    source = scratch / "source"
    write_checkpoint(source, Spec(layers=LAYERS, experts=EXPERTS, text_only=True, mtp=False, vocab=2048))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL_MOE / name, source / name)
    keep = {str(layer): list(range(0, EXPERTS, 2)) for layer in range(LAYERS)}
    (scratch / "keep.json").write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))


def compare(name: str, trees: dict[str, Path], pairs: int, scratch: Path) -> dict[str, Any]:
    """CPU seconds and peak memory of both versions, and the ratios of the pairs."""
    runs: dict[str, list[tuple[float, float]]] = {version: [] for version in trees}
    for version, tree in trees.items():
        quick = run(name, tree, scratch / version, scratch)[0] < 15
    for turn in range(2 * pairs if quick else pairs):
        for version in sorted(trees, reverse=bool(turn % 2)):
            runs[version].append(run(name, trees[version], scratch / version, scratch))
    seconds = {version: [cpu for cpu, _ in each] for version, each in runs.items()}
    ratios = [now / before for before, now in zip(seconds["before"], seconds["now"], strict=True)]
    memory = {version: max(rss for _, rss in each) for version, each in runs.items()}
    return {"command": name, "cpu_seconds": seconds, "peak_rss_bytes": memory, "ratio": statistics.median(ratios)}


def run(name: str, tree: Path, out: Path, scratch: Path) -> tuple[float, float]:
    """CPU seconds and peak memory of one process."""
    arguments = [str(scratch / "keep.json") if word == "KEEP" else word for word in COMMANDS[name]]
    command = [sys.executable, "-m", "shardxform", *words_of(name, scratch / "source", out), *arguments]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    environment = {**os.environ, **one_thread, "PYTHONPATH": str(tree)}
    with (scratch / "errors").open("w") as errors:
        child = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with {status}\n{(scratch / 'errors').read_text()}")
    shutil.rmtree(out, ignore_errors=True)
    saliency(out).unlink(missing_ok=True)  # a scoring that is done is not done again
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024.0


def saliency(out: Path) -> Path:
    """What `score` writes."""
    return out.with_suffix(".safetensors")


def words_of(name: str, source: Path, out: Path) -> list[str]:
    """Words of a command line but for its own options."""
    match name:
        case "version":
            return ["--version"]
        case "score":
            return ["score", str(source), "-o", str(saliency(out)), "-q", "--work", str(out)]
        case "evaluate":
            return ["evaluate", str(source), "--work", str(out), "-q"]
        case "heal":
            return ["prune", str(source), str(out), "-q", "-j", "1"]
        case "prune":
            return ["prune", str(source), str(out), "-q", "-j", "1"]
        case _:
            return ["quantize", str(source), str(out), "-q", "-j", "1"]


def line(row: dict[str, Any]) -> str:
    """One command's row."""
    seconds = {version: statistics.median(each) for version, each in row["cpu_seconds"].items()}
    memory = {version: rss / 1e6 for version, rss in row["peak_rss_bytes"].items()}
    spread = [now / before for before, now in zip(row["cpu_seconds"]["before"], row["cpu_seconds"]["now"], strict=True)]
    return (
        f"{row['command']:<14} {seconds['before']:7.2f} s {seconds['now']:7.2f} s  {row['ratio']:5.3f}"
        f" ({min(spread):.3f} to {max(spread):.3f})  {memory['before']:6.0f} MB {memory['now']:6.0f} MB"
    )


if __name__ == "__main__":
    main()
