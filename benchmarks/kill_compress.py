"""Kill `shardxform compress` at random moments, run it to its end, and compare with a run that nothing stopped.

    python benchmarks/kill_compress.py [--dir SCRATCH] [--kills 10] [--seed 0] [-- OPTIONS OF COMPRESS]

SIGKILL, up to two seconds after a stage began, the stages in turn: most time goes into two of them. What was killed is
gone on with, and begun anew when it came to its end. Every file of OUT and of OUT.compress is compared then; seconds
and memory in OUT/shardxform.json are left out, which no two runs share. After every kill OUT has a config.json only if
its shards are there. Exits with 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
SOURCE: Final = ROOT / "examples" / "small-moe"
TEXT: Final = SOURCE / "text"
OPTIONS: Final = [
    *("--keep", "8", "--data", str(TEXT / "calib.jsonl"), "--samples", "32", "--seqlen", "256", "--iters", "20"),
    *("--eval-data", str(TEXT / "heldout.jsonl"), "--eval-samples", "16", "--eval-seqlen", "256", "--plots"),
]
STAGES: Final = (
    "score",
    "score",
    "select",
    "quantize",
    "quantize",
    "quantize",
    "verify",
    "evaluate",
    "evaluate",
    "card",
)
AFTER: Final = 2.0
SPENT: Final = re.compile(rb'"(seconds|peak_rss_bytes|peak_gpu_bytes)": [\d.]+')


def start(out: Path, options: list[str]) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    command = [sys.executable, "-m", "shardxform", "compress", str(SOURCE), str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def to_the_end(out: Path, options: list[str]) -> float:
    """Run it; seconds that it took."""
    began = time.monotonic()
    process = start(out, options)
    said = process.communicate()[1]
    if process.returncode:
        sys.exit(f"compress ended with {process.returncode}: {said}")
    return time.monotonic() - began


def killed(out: Path, options: list[str], stage: str, seconds: float) -> str | None:
    """Kill it some time after a stage began that is not done; what it was doing, or None when it came to its end."""
    process = start(out, options)
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if re.match(rf"\[\d/\d\] {stage}: (?!done already)", line):
            break
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    said += process.communicate()[1].splitlines()
    if process.returncode == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        sys.exit(f"compress ended with {process.returncode}: {''.join(said)}")
    return next(line.split(":")[0] for line in reversed(said) if re.match(r"\[\d/\d\] ", line))


def tree(out: Path) -> dict[str, bytes]:
    """Every file of the output and of its results, by name."""
    files = {}
    for root in (out, out.with_name(out.name + ".compress")):
        for path in sorted(root.rglob("*")):
            if path.is_file():
                name = f"{root.name.removeprefix(out.name)}/{path.relative_to(root)}"
                data = path.read_bytes()
                files[name] = SPENT.sub(b"", data) if name == "/shardxform.json" else data
    return files


def refuse_half(out: Path) -> None:
    """A config.json says that the output is whole: then every shard of its index must be there under its name."""
    if not (out / "config.json").exists():
        return
    shards = {"model.safetensors"}
    if (index := out / "model.safetensors.index.json").exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
    missing = [name for name in shards if not (out / name).is_file()]
    if missing:
        sys.exit(f"{out}: has a config.json but no {missing}")


def refuse_other(files: dict[str, bytes], out: Path) -> None:
    """A complete output must have these files."""
    found = tree(out)
    if names := sorted(name for name in files.keys() | found.keys() if files.get(name) != found.get(name)):
        sys.exit(f"differ: {', '.join(names)}")


def kill_in(stage: str, out: Path, options: list[str], files: dict[str, bytes], rng: random.Random) -> str:
    """Kill it in a stage; what came to its end before that is compared, removed and begun anew."""
    after = AFTER
    while True:
        seconds = rng.uniform(0, after)
        doing = killed(out, options, stage, seconds)
        refuse_half(out)
        if doing:
            return f"{doing}, {seconds:.2f} s after {stage} began"
        refuse_other(files, out)
        for root in (out, out.with_name(out.name + ".compress")):
            shutil.rmtree(root)
        after /= 2  # that stage was done already, or is short


def main() -> None:
    """Run once, then kill and run, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to work; a temporary directory if not given")
    parser.add_argument("--kills", type=int, default=10, help="how often to kill it (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the times (default 0)")
    parser.add_argument("options", nargs="*", help="options of compress, after --; a small job if not given")
    args = parser.parse_args()
    options, rng = args.options or OPTIONS, random.Random(args.seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    place = Path(tempfile.mkdtemp(dir=args.dir))
    for folder in ("whole", "killed"):
        (place / folder).mkdir()
    try:
        print(f"uninterrupted: {to_the_end(place / 'whole/out', options):.1f} s", flush=True)
        out = place / "killed/out"
        files = tree(place / "whole/out")
        for number in range(args.kills):
            stage = STAGES[len(STAGES) * number // args.kills]
            print(f"kill {number + 1:2}: {kill_in(stage, out, options, files, rng)}", flush=True)
        to_the_end(out, options)
        refuse_other(files, out)
        print(f"{len(files)} files, the same as those of the uninterrupted run")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
