"""Speed of ggml's block types on one thread: rounding by each backend, and decoding, against llama.cpp's own library.

    python benchmarks/bench_ggml.py [--rows 1024] [--columns 2048] [--repeat 5] [--json]

Prints weights per second of processor time (the best of the repeats), and the time ours takes as a share of that of
llama.cpp's library, which is left out where xllamacpp is not installed. The bytes that are compared are equal, or it
stops.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shardxform.base.tensors import BLOCKS
from shardxform.formats import ggml, ggml_blocks
from shardxform.formats.encoding import DECODE_TILE, row_tiles
from shardxform.formats.rounding import Backend

NUMBERS = dict(Q4_0=2, Q4_1=3, Q5_0=6, Q5_1=7, Q8_0=8, Q4_K=12, Q5_K=13, Q6_K=14, IQ4_NL=20, MXFP4=39)  # noqa: C408
BACKENDS: tuple[Backend, ...] = ("numba", "numpy") if find_spec("numba") else ("numpy",)


class Row(NamedTuple):
    """One line of the table; speed in units of 10^6."""

    what: str
    weights_per_s: float
    of_llama_cpp: float | None


def best_seconds(work: Callable[[], object], repeat: int) -> float:
    """Least processor time of ``repeat`` runs after one to warm up."""
    work()
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


@cache
def library() -> Any:  # noqa: ANN401
    """The C functions of llama.cpp, or None."""
    if find_spec("xllamacpp") is None:
        return None
    from xllamacpp import xllamacpp

    found = ctypes.CDLL(xllamacpp.__file__)
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_void_p]
    return found


def their_rounding(values: np.ndarray[Any, Any], out: np.ndarray[Any, Any], name: str) -> None:
    """Let llama.cpp round."""
    places = values.ctypes.data, out.ctypes.data
    library().ggml_quantize_chunk(NUMBERS[name], *places, 0, *values.shape, None)


def their_decoding(blocks: np.ndarray[Any, Any], out: np.ndarray[Any, Any], name: str) -> None:
    """Let llama.cpp decode."""
    decode = getattr(library(), f"dequantize_row_{name.lower().replace('_k', '_K')}")
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(blocks.ctypes.data, out.ctypes.data, out.size)


def ours(values: np.ndarray[Any, Any], name: str, backend: Backend) -> np.ndarray[Any, Any]:
    """Round in tiles, as outputs are written."""
    tiles = row_tiles(values.shape[0], values.shape[1], DECODE_TILE)
    return np.concatenate([ggml.rounded_blocks(values[start:stop], name, backend) for start, stop in tiles])


def our_decoding(blocks: np.ndarray[Any, Any], name: str, columns: int) -> np.ndarray[Any, Any]:
    """Decode in tiles."""
    tiles = row_tiles(len(blocks), columns, DECODE_TILE)
    return np.concatenate([ggml_blocks.block_values(blocks[start:stop], name) for start, stop in tiles])


def of_type(values: np.ndarray[Any, Any], name: str, repeat: int) -> Iterator[Row]:
    """Lines of a type."""
    columns, nbytes = BLOCKS[name]
    blocks = np.empty((len(values), values.shape[1] // columns * nbytes), np.uint8)
    back = np.empty_like(values)
    theirs, decoded = None, None
    if library():
        theirs = best_seconds(lambda: their_rounding(values, blocks, name), repeat)
        decoded = best_seconds(lambda: their_decoding(blocks, back, name), repeat)
        yield Row(f"{name} llama.cpp", values.size / theirs / 1e6, None)
    for backend in BACKENDS:
        work = partial(ours, values, name, backend)
        seconds = best_seconds(work, repeat)
        if theirs and not np.array_equal(work(), blocks):
            raise SystemExit(f"{name}, {backend}: not the bytes of llama.cpp")
        yield Row(f"{name} {backend}", values.size / seconds / 1e6, seconds / theirs if theirs else None)
    seconds = best_seconds(partial(our_decoding, ours(values, name, "auto"), name, values.shape[1]), repeat)
    yield Row(f"{name} decoded", values.size / seconds / 1e6, seconds / decoded if decoded else None)


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="output channels (default 1024)")
    parser.add_argument("--columns", type=int, default=2048, help="input channels (default 2048)")
    parser.add_argument("--repeat", type=int, default=5, help="runs per line (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    values = (0.02 * np.random.default_rng(0).standard_normal((args.rows, args.columns))).astype(np.float32)
    rows = [row for name in NUMBERS for row in of_type(values, name, args.repeat)]
    if args.json:
        print(json.dumps({"rows": [row._asdict() for row in rows]}, indent=2))
        return
    print(f"{'':24}{'M weights/s':>14}{'of llama.cpp time':>20}")
    for row in rows:
        share = "" if row.of_llama_cpp is None else f"{row.of_llama_cpp:20.2f}"
        print(f"{row.what:24}{row.weights_per_s:14.0f}{share}")


if __name__ == "__main__":
    main()
