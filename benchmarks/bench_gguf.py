"""Time and memory of what writes GGUF, `quantize --format gguf` and `prune` of a GGUF file, at the real shape.

    python benchmarks/bench_gguf.py [--dir SCRATCH] [--layers 4] [--runs 5] [--cache cold|warm] [--json]

`quantize` takes turns with itself in auto-round's format, `prune` of what it wrote with `cp` and `sync` of as many
bytes; all end with the bytes on stable storage. Every figure comes from a process of its own, as a user would start it.
Needs Linux, the gguf package, and free disk of about twice the source (21 GB at 4 layers).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench_prune import ROOT, SHARDXFORM, Cache, machine, remove, say, set_cache, shards, table, write_keep
from bench_quantize import Took, quantize, took

VOCABULARY: Final = 248320
GGUF: Final = ("--format", "gguf", "--pre-tokenizer", "qwen35")


class Pair(NamedTuple):
    """Ours, and what it is held against."""

    ours: Took
    other: Took

    @property
    def ratios(self) -> tuple[float, float]:
        """Of the wall clock, and of the processors."""
        return self.ours.wall / self.other.wall, self.ours.cpu / self.other.cpu


@dataclass(slots=True)
class Results:
    """Everything measured."""

    machine: dict[str, Any]
    cache: Cache
    source_bytes: int = 0
    gguf_bytes: int = 0
    pruned_bytes: int = 0
    quantize: list[Pair] = field(default_factory=list)
    prune: list[Pair] = field(default_factory=list)


def write_tokenizer(path: Path, count: int = VOCABULARY) -> None:
    """Write a BPE of bytes with as many tokens as the real model's, each but the bytes made by a merge."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(each) for each in kept] + [chr(256 + n) for n in range(256 - len(kept))]
    longer = ("".join(word) for length in (2, 3) for word in itertools.product(letters, repeat=length))
    tokens = [*letters, *itertools.islice(longer, count - len(letters))]
    merges = [[token[:-1], token[-1]] for token in tokens[len(letters) :]]
    model = {"type": "BPE", "vocab": {token: at for at, token in enumerate(tokens)}, "merges": merges}
    whole = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel"}, "model": model}
    path.write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")


def measure_quantize(scratch: Path, results: Results, runs: int) -> None:
    """Round the source to either format in turns."""
    source, out = scratch / "source", scratch / "out"
    for warming in (GGUF, ("--format", "auto-round")):  # not counted: kernels are compiled once, and kept
        took(quantize(source, out, *warming))
        remove(out)
    for number in range(runs):
        done = []
        for options in (GGUF, ("--format", "auto-round")):
            set_cache(source, results.cache)
            done.append(took(quantize(source, out, *options)))
            remove(out)
        results.quantize.append(pair := Pair(*done))
        say(f"quantize, pair {number + 1}: {told(pair)}")


def measure_prune(scratch: Path, results: Results, runs: int) -> None:
    """Prune what `quantize` writes, in turns with a copy of what comes of it."""
    whole, reference, out = scratch / "whole", scratch / "reference", scratch / "out"
    took(quantize(scratch / "source", whole, *GGUF))
    prune: list[str | Path] = [*SHARDXFORM, "prune", whole, out, "-q", "--any-source", "-m", scratch / "keep.json"]
    took([reference if each is out else each for each in prune])
    (model,) = shards(reference)
    results.gguf_bytes, results.pruned_bytes = shards(whole)[0].stat().st_size, model.stat().st_size
    copy: list[str | Path] = ["sh", "-c", 'mkdir "$1" && cp "$0" "$1" && sync "$1"/* "$1"', model, out]
    for number in range(runs):
        done = []
        for read, other, command in ((whole, reference, prune), (reference, whole, copy)):
            set_cache(other, "cold")
            set_cache(read, results.cache)
            done.append(took(command))
            remove(out)
        results.prune.append(pair := Pair(*done))
        say(f"prune, pair {number + 1}: {told(pair)}")


def told(pair: Pair) -> str:
    """A pair in one line."""
    texts = (
        f"{each.wall:.2f} s, {each.cpu:.2f} CPU s, {each.peak_rss / 1e6:.0f} MB" for each in (pair.ours, pair.other)
    )
    return f"{' against '.join(texts)}; ratio {pair.ratios[0]:.3f}"


def report(r: Results) -> Iterator[str]:
    """Everything as text."""
    m = r.machine
    yield f"{m['cpu']}, {m['cores']} cores, Linux {m['kernel']}, {m['file_system']}, Python {m['python']}"
    for title, other, pairs in (
        (f"quantize --format gguf, {r.cache} cache: {r.source_bytes / 1e9:.2f} GB", "--format auto-round", r.quantize),
        (
            f"prune of GGUF, {r.cache} cache: {r.gguf_bytes / 1e9:.2f} -> {r.pruned_bytes / 1e9:.2f} GB",
            "cp + sync",
            r.prune,
        ),
    ):
        if pairs:
            yield from table(f"{title}, {len(pairs)} pairs", ("", "median", "min", "max"), list(lines(other, pairs)))


def lines(other: str, pairs: Sequence[Pair]) -> Iterator[tuple[str, ...]]:
    """Lines of the table of one comparison."""
    for name, each in (("ours", [pair.ours for pair in pairs]), (other, [pair.other for pair in pairs])):
        yield _spread(f"{name}, wall", [one.wall for one in each], " s", 2)
        yield _spread(f"{name}, CPU", [one.cpu for one in each], " s", 2)
        yield _spread(f"{name}, peak RSS", [one.peak_rss / 1e6 for one in each], " MB", 1)
    yield _spread("ratio by pair, wall", [pair.ratios[0] for pair in pairs], "", 3)
    yield _spread("ratio by pair, CPU", [pair.ratios[1] for pair in pairs], "", 3)


def _spread(label: str, values: Sequence[float], unit: str, digits: int) -> tuple[str, ...]:
    return label, *(f"{value:.{digits}f}{unit}" for value in (statistics.median(values), min(values), max(values)))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Time and memory of what writes GGUF.")
    parser.add_argument("--dir", type=Path, help="where to make the scratch folder; the system's temporary directory")
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks; %(default)s")
    parser.add_argument("--runs", type=int, default=5, help="pairs of each comparison; %(default)s")
    parser.add_argument("--cache", choices=["cold", "warm"], default="cold", help="of what is read; %(default)s")
    parser.add_argument("--only", choices=["quantize", "prune"], action="append", help="default: both")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder goes in that case too
    wanted = given.only or ["quantize", "prune"]
    with tempfile.TemporaryDirectory(prefix="bench-gguf-", dir=given.dir) as folder:
        scratch = Path(folder)
        results = Results(machine(scratch), given.cache)
        say(f"writing a checkpoint of {given.layers} layers to {scratch}")
        took([sys.executable, ROOT / "benchmarks/synth.py", scratch / "source", "--layers", str(given.layers)])
        took(["sync"])
        apart = multiprocessing.Process(target=write_tokenizer, args=(scratch / "source" / "tokenizer.json",))
        apart.start()  # since a child's peak of memory begins with its parent's
        apart.join()
        write_keep(scratch / "keep.json", given.layers)
        results.source_bytes = sum(path.stat().st_size for path in shards(scratch / "source"))
        if "quantize" in wanted:
            measure_quantize(scratch, results, given.runs)
        if "prune" in wanted:
            measure_prune(scratch, results, given.runs)
    print(json.dumps(asdict(results), indent=2) if given.json else "\n".join(report(results)))


if __name__ == "__main__":
    main()
