"""Tune the blocks of one model on two machines, and put the halves together; here both are this machine.

    python examples/quantize_blocks_apart.py [DIR]

With `--inputs fp` every block is tuned on what the 16-bit blocks before it put out, so none waits for another. Each
machine runs the same command with its own `--blocks`; copies of the OUTs are then put together by the same command with
`--join`. The bytes are those of one run. Needs torch and transformers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "examples" / "small-moe"
TEXT = SOURCE / "text" / "calib.jsonl"
# The same for everybody: it decides bytes, and another OUT is refused. A few steps, so that this ends soon.
COMMAND = ["--method", "auto-round", "--inputs", "fp", "--data", str(TEXT)]
COMMAND += ["--samples", "4", "--seqlen", "128", "--iters", "10", "--batch-size", "2", "--quiet"]


def quantize(out: Path, *more: str) -> None:
    """Run the command, as a machine of its own would."""
    arguments = ["quantize", str(SOURCE), str(out), *COMMAND, *more]
    print("$ shardxform", *arguments)
    subprocess.run([sys.executable, "-m", "shardxform", *arguments], check=True)


def main(folder: Path) -> None:
    """Two halves, put together in `folder`/joined, compared with `folder`/whole."""
    quantize(folder / "first", "--blocks", "0-1")  # on one machine
    quantize(folder / "second", "--blocks", "2-3")  # on another
    # Either of them, or a third, with the unfinished OUTs at hand:
    quantize(folder / "joined", "--join", str(folder / "first"), "--join", str(folder / "second"))

    quantize(folder / "whole")
    shard = "model.safetensors"
    same = (folder / "joined" / shard).read_bytes() == (folder / "whole" / shard).read_bytes()
    print("the bytes are", "those of one run" if same else "NOT those of one run")
    for part in ("first", "second"):  # what was put together is no longer needed
        shutil.rmtree(folder / part)
    sys.exit(not same)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/blocks-apart"))
