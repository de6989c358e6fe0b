"""Prune a checkpoint through the library: plan, look at the plan, run it, verify.

    python examples/library_prune.py [OUT]

A plan is a value: everything about the output but its numbers is known before the first byte is written. Running the
same plan again goes on where it was stopped, or finds the output complete.
"""

from __future__ import annotations

import sys
from pathlib import Path

from shardxform import Checkpoint, Manifest, Progress, RunOptions, ShardxformError, plan_prune, run, verify

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "examples" / "small-moe"
KEEP = ROOT / "manifests" / "small-moe-keep8.json"  # 8 of 16 experts of every layer


def show(progress: Progress) -> None:
    """Called while the run goes on."""
    print(f"  {progress.done:,} of {progress.total:,} bytes")


def main(out: Path) -> None:
    """Prune the small model of the repository into `out`."""
    source = Checkpoint.open(SOURCE)
    plan = plan_prune(source, Manifest.load(KEEP))
    print(f"{source.nbytes:,} -> {plan.data_bytes:,} bytes, at most {plan.peak_bytes(jobs=2):,} bytes of memory")

    report = run(plan, out, RunOptions(jobs=2, on_progress=show))
    print(f"{out}: " + ("found complete" if report.already_done else f"written in {report.seconds:.1f} s"))

    checked = verify(out, source=SOURCE)  # every byte, against the source
    print(f"{'sound' if checked.sound else 'NOT sound'}: {checked.tensors} tensors, {checked.bytes_compared:,} bytes")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/library-prune"))
    except ShardxformError as e:  # the one class of what is refused: a line that says what, and where
        sys.exit(f"library_prune.py: {e}")
