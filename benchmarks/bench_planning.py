"""CPU time and memory of planning releases at full size, whole commands: inspect, and prune and quantize --dry-run.

    python benchmarks/bench_planning.py                              the largest releases, and two small ones
    python benchmarks/bench_planning.py DeepSeek-V3 --runs 5
    python benchmarks/bench_planning.py --against ../before          in turns with another checkout

Checkpoints are headers and holes with the names, shapes and dtypes of releases (tests/releases). Every second expert is
kept. User and system time of the process, and the most memory that it had, are the kernel's; the least of the runs
counts, since other work on the machine only adds to them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import published  # type: ignore[import-not-found]

from shardxform.ask.manifest import Manifest, keep_all, manifest_text
from shardxform.checkpoint.table import Checkpoint
from shardxform.model.layout import layout_of

HOME = Path(__file__).parents[1]
RELEASES = (
    *("Kimi-K2.6", "Kimi-K2-Instruct", "MiniMax-M2", "DeepSeek-V3", "DeepSeek-V4-Flash", "GLM-4.5"),
    *("gpt-oss-120b", "Qwen3.5-35B-A3B"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one process took; `refused` where it gave no plan."""

    user: float
    system: float
    rss: int
    refused: bool


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="RELEASE", default=RELEASES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout, whose package runs in turns with this one's")
    parser.add_argument("--json", action="store_true", help="print every run")
    asked = parser.parse_args()
    trees = [HOME, *([asked.against.resolve()] if asked.against else [])]
    found: dict[str, list[list[Run]]] = {}
    if not asked.json:
        before = " | before | before, RSS" if asked.against else ""
        print(f"| release | tensors | command | CPU, user + system | RSS{before} |")
        print("| --- | ---: | --- |" + " ---: |" * (2 * len(trees)))
    for name in asked.names:
        with tempfile.TemporaryDirectory() as folder:
            count, commands = _prepared(name, Path(folder))
            for what, words in commands:
                turns = [_turn(trees, words, backwards=number % 2 == 1) for number in range(asked.runs)]
                found[f"{name} {what}"] = turns
                if not asked.json:
                    cells = " | ".join(_cells([turn[at] for turn in turns]) for at in range(len(trees)))
                    print(f"| {name} | {count:,} | {what} | {cells} |", flush=True)
    if asked.json:
        plain = {what: [[asdict(run) for run in turn] for turn in turns] for what, turns in found.items()}
        print(json.dumps(plain, indent=2))


def _prepared(name: str, folder: Path) -> tuple[int, list[tuple[str, list[str]]]]:
    """Write a release and a manifest; give the number of its tensors, and commands by what they are called."""
    config = published.config_of(name)
    named_otherwise = name in published.NAMED_OTHERWISE
    tensors = (
        published.tensors_of_v4(config) if named_otherwise else published.tensors_of(name, published.shapes_of(name))
    )
    root, manifest = published.write(folder / name, config, tensors), folder / "keep.json"
    checkpoint = Checkpoint.open(root)
    layout = layout_of(checkpoint.config, checkpoint.tensors)
    every = keep_all(layout)
    half = Manifest(
        keep={layer: kept[::2] for layer, kept in every.keep.items()},
        mtp_keep={layer: kept[::2] for layer, kept in every.mtp_keep.items()},
    )
    manifest.write_text(manifest_text(half))
    source, out = str(root), str(folder / "out")
    size = str(128 if named_otherwise else published.RELEASES[name].group_size)
    kind = (*layout.family.formats, "auto-round")[0]
    rounded = ["--format", kind, "--group-size", size, "--dry-run"]
    return len(tensors), [
        ("inspect", ["inspect", source]),
        ("prune", ["prune", source, out, "--manifest", str(manifest), "--dry-run"]),
        ("quantize", ["quantize", source, out, *rounded]),
        ("quantize, pruned", ["quantize", source, out, "--manifest", str(manifest), *rounded]),
    ]


def _turn(trees: Sequence[Path], words: Sequence[str], *, backwards: bool) -> list[Run]:
    """Run a command of every checkout; the first of them may find less in the page cache."""
    found = {tree: _run(tree, words) for tree in (reversed(trees) if backwards else trees)}
    return [found[tree] for tree in trees]


_LAUNCHER = """
import json, os, sys
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(json.dumps([usage.ru_utime, usage.ru_stime, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status) != 0]))
"""
"""Starts a process from a small one: what is counted as its most memory begins with that of the process it is from."""


def _run(tree: Path, words: Sequence[str]) -> Run:
    """Run a command of a checkout."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    quiet = f'exec "$0" "$@" >{os.devnull} 2>&1'
    found = subprocess.run(
        [sys.executable, "-IS", "-c", _LAUNCHER, "/bin/sh", "-c", quiet, sys.executable, "-m", "shardxform", *words],
        cwd=tree,
        env={**environment, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        check=True,
    )
    user, system, rss, refused = json.loads(found.stdout)
    return Run(user=user, system=system, rss=rss, refused=refused)


def _cells(runs: Sequence[Run]) -> str:
    """Cells of the table: the least time of several runs, and the memory."""
    if any(run.refused for run in runs):
        return "refused | "
    best = min(runs, key=lambda run: run.user + run.system)
    return f"{best.user:.2f} + {best.system:.2f} s | {max(run.rss for run in runs) / 1e6:.0f} MB"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
