"""Send SIGINT and SIGTERM to commands at random moments, a thousand times, and count hangs and tracebacks.

    python benchmarks/stress_signals.py [--runs 100] [--commands prune,score,...] [--seed 0] [--again 4] [--dir SCRATCH]

Every run gets one to five of both, mixed, from 0 ms up apart, at a random moment from its start to some time after its
end. It must end within a minute, with 130 and one line, or with 0 and none if it was done before. Every `--again`-th
is run a second time, which must give what an undisturbed run gives. A hub (the server of the tests) and a Ray cluster
of two CPUs, on this machine, are started for the commands that want them. Exits with 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
barrage: Any = __import__("barrage")
hubserver: Any = __import__("hubserver")

NAMES: Final = (
    "prune,quantize,tune,verify,score,evaluate,compress,inspect,doctor,remote,remote score,push,ray,ray score"
)
CLUSTER: Final = """
import ray, sys
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def cluster(wanted: bool) -> Iterator[str]:
    """Address of a Ray cluster, empty if none is wanted."""
    if not wanted:
        yield ""
        return
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    words = [sys.executable, "-c", CLUSTER]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdin
        assert process.stdout
        yield process.stdout.readline().strip()
        process.stdin.close()


def stress(
    nursery: Any,  # noqa: ANN401
    name: str,
    case: Any,  # noqa: ANN401
    args: argparse.Namespace,
    folder: Path,
) -> int:
    """Hit one command; prints what is wrong, and a row of the table; how often something was."""
    rng, kind = random.Random(f"{args.seed} {name}"), name.replace(" ", "-")
    whole = barrage.undisturbed(nursery, case, folder / f"{kind}-whole")
    codes: Counter[int | None] = Counter()
    slowest, wrong, began = 0.0, 0, time.monotonic()
    for number in range(args.runs):
        again = number % args.again == 0
        outcome = barrage.assault(nursery, case, whole, folder / f"{kind}-{number}", rng, again=again)
        codes[outcome.code] += 1
        slowest = max(slowest, outcome.seconds)
        if outcome.wrong:
            wrong += 1
            print(f"WRONG: {name}, run {number}, signals {outcome.sent}: {outcome.wrong}")
    ends = ", ".join(f"{count} x {code}" for code, count in sorted(codes.items(), key=str))
    print(
        f"{name:13s} {args.runs:5d} runs of {whole.seconds:5.2f} s: {ends}; slowest end {slowest:.2f} s;"
        f" {wrong} wrong; {time.monotonic() - began:.0f} s",
        flush=True,
    )
    return wrong


def main() -> None:
    """Hit every command that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--commands", default=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=int, default=4)
    parser.add_argument("--dir", type=Path)
    args = parser.parse_args()
    names = args.commands.split(",")
    with (
        tempfile.TemporaryDirectory(dir=args.dir) as scratch,
        hubserver.HubServer() as server,
        cluster(any("ray" in name for name in names)) as ray,
    ):
        folder = Path(scratch)
        server.add_repo("org/small", barrage.SMALL_MOE)
        environment = {**server.env(folder / "home", hubserver.WRITER), "RAY_AUTH_MODE": "disabled"}
        with barrage.Nursery(barrage.COMPUTING) as process:
            nursery = process.having(barrage.SMALL_STEPS, environment)
            made = barrage.made(nursery, folder)
            found = barrage.cases(made, "org/small", ray)
            wrong = sum(stress(nursery, name, found[name], args, folder) for name in names)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
