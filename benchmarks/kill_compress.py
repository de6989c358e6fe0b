"""Kill `shardxform compress` at random moments, run it to its end, and compare with a run that nothing stopped.

    python benchmarks/kill_compress.py [--dir SCRATCH] [--kills 10] [--seed 0] [-- OPTIONS OF COMPRESS]

SIGKILL, up to two seconds after a stage began, the stages in turn: most time goes into two of them. What was killed is
gone on with, and when it came to its end begun anew. Every file of OUT and of OUT.compress is compared; seconds and
memory in OUT/shardxform.json are left out, which no two runs share. After every kill OUT has a config.json only if its
shards are there. Exits with 1 when anything differs.
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
    *("--eval-data", str(TEXT / "heldout.jsonl"), "--eval-samples", "16", "--eval-seqlen", "256", "--plot"),
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


def compare(wanted: dict[str, bytes], out: Path) -> int:
    """Hold an output that is complete against another's files, and remove it; 1."""
    found = tree(out)
    if names := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        sys.exit(f"differ: {', '.join(names)}")
    for root in (out, out.with_name(out.name + ".compress")):
        shutil.rmtree(root)
    return 1


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
        files, compared = tree(place / "whole/out"), 0
        for number in range(args.kills):
            stage, after = STAGES[len(STAGES) * number // args.kills], AFTER
            while True:
                seconds = rng.uniform(0, after)
                doing = killed(out, options, stage, seconds)
                refuse_half(out)
                if doing:
                    break
                compared += compare(files, out)  # that stage was done, or over too soon: from the beginning
                after /= 2
            print(f"kill {number + 1:2}: {doing}, {seconds:.2f} s after {stage} began", flush=True)
        to_the_end(out, options)
        compared += compare(files, out)
        print(f"{compared} runs came to their end, each with {len(files)} files as the uninterrupted one has them")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
