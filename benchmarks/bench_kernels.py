"""Speed of round-to-nearest on one thread: every backend and layout, against a copy and against auto-round.

    python benchmarks/bench_kernels.py [--rows 1024] [--columns 2048] [--repeat 15] [--json]

Prints weights per second (the best of the repeats) and the source bytes read per second, for weights that fit the
last-level cache and, with ``--stream``, for ones that do not. auto-round is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shardxform.formats import rounding
from shardxform.formats.packing import bf16_bits_of
from shardxform.formats.scheme import Bits, Grid, Layout

BITS: tuple[Bits, ...] = (4, 8)
LAYOUTS: tuple[Layout, ...] = ("gptq", "row")
BACKENDS: tuple[rounding.Backend, ...] = ("numba", "numpy") if find_spec("numba") else ("numpy",)


class Row(NamedTuple):
    """One line of the table; speeds in units of 10^9."""

    what: str
    weights_per_s: float
    bytes_per_s: float
    of_copy: float


def best_seconds(work: Callable[[], object], repeat: int) -> float:
    """Shortest of ``repeat`` runs after one to warm up."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def compile_seconds() -> float:
    """Time until the 16-bit kernel is ready: compiled, or loaded from the disk cache."""
    if find_spec("numba") is None:
        return 0.0
    start = time.perf_counter()
    from shardxform.formats import kernels

    kernels.quantizer(wide=False)
    return time.perf_counter() - start


def ours(w_OI: np.ndarray[Any, Any], args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """(description, seconds) of our variants."""
    for backend in BACKENDS:
        for bits in BITS:
            for layout in LAYOUTS:
                for search in (False, True):
                    grid = Grid(bits=bits, search=search)
                    out = rounding.QuantizedWeight.empty(layout, grid, (w_OI.shape[0], w_OI.shape[1]))

                    work = partial(rounding.quantize_into, w_OI, "BF16", grid, out, backend=backend)
                    repeat = 1 if backend == "numpy" else max(2, args.repeat // (5 if search else 1))
                    label = f"{backend} W{bits} {layout}{' search' if search else ''}"
                    yield label, best_seconds(work, repeat)


def upstream(w_OI: np.ndarray[Any, Any]) -> Iterator[tuple[str, float]]:
    """(description, seconds) of auto-round's round and pack, one thread."""
    if find_spec("auto_round") is None or find_spec("torch") is None:
        return
    import torch
    from auto_round.utils.model_free_utils import quantize_weight_rtn

    torch.set_num_threads(1)
    w = torch.from_numpy(w_OI).view(torch.bfloat16)
    for bits in BITS:
        work = partial(quantize_weight_rtn, w, bits, 128, packing="auto_round:auto_gptq")
        yield f"auto-round W{bits} gptq", best_seconds(work, 3)


def table(args: argparse.Namespace) -> list[Row]:
    """Measure everything on one random BF16 weight."""
    rng = np.random.default_rng(0)
    w_OI = bf16_bits_of((0.02 * rng.standard_normal((args.rows, args.columns))).astype(np.float32))
    if args.stream:  # more than any last-level cache: every pass reads from memory
        w_OI = np.tile(w_OI, (-(-(1 << 28) // w_OI.size), 1))
    target = np.empty_like(w_OI)
    copy = best_seconds(lambda: np.copyto(target, w_OI), args.repeat)
    timings = [("copy of the same bytes", copy), *ours(w_OI, args)]
    if not args.stream:
        timings += upstream(w_OI)
    return [Row(what, w_OI.size / s / 1e9, w_OI.nbytes / s / 1e9, copy / s) for what, s in timings]


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="output channels (default 1024)")
    parser.add_argument("--columns", type=int, default=2048, help="input channels (default 2048)")
    parser.add_argument("--repeat", type=int, default=15, help="runs per line (default 15)")
    parser.add_argument("--stream", action="store_true", help="repeat the weight to 512 MB, beyond every cache")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    ready = compile_seconds()
    rows = table(args)
    if args.json:
        print(json.dumps({"kernel_ready_s": ready, "rows": [row._asdict() for row in rows]}, indent=2))
        return
    print(f"kernel compiled or loaded in {ready:.2f} s; BF16 [{args.rows}, {args.columns}], groups of 128\n")
    print(f"{'':32}{'G weights/s':>12}{'GB/s read':>12}{'of a copy':>12}")
    for row in rows:
        print(f"{row.what:32}{row.weights_per_s:12.3f}{row.bytes_per_s:12.2f}{row.of_copy:12.4f}")


if __name__ == "__main__":
    main()
