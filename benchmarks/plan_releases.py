"""CPU time of opening, inspecting and planning releases at full size, from sparse checkpoints of tests/releases.

    python benchmarks/plan_releases.py                 every release of a known family
    python benchmarks/plan_releases.py DeepSeek-V3     some of them

Prints a Markdown table: tensors, parameters found, bytes of the source, of half the experts, and of W4A16 in the
family's first format; and seconds of CPU for each. Nothing but headers is written.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import published  # type: ignore[import-not-found]

from shardxform.ask.manifest import Manifest, keep_all
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import SchemeError
from shardxform.formats.scheme import Format, Scheme
from shardxform.model.layout import layout_of
from shardxform.plan.inspection import inspect_checkpoint
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize

T = TypeVar("T")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="RELEASE", default=list(published.RELEASES))
    print("| release | tensors | parameters | source GB | half the experts GB | W4A16 GB | open s | inspect s | prune s"
          " | quantize s |")  # fmt: skip
    print("| --- |" + " ---: |" * 9)
    for name in parser.parse_args().names:
        with tempfile.TemporaryDirectory() as folder:
            print(_row(name, Path(folder)), flush=True)


def _row(name: str, folder: Path) -> str:
    tensors = published.tensors_of(name, published.shapes_of(name))
    root = published.write(folder / name, published.config_of(name), tensors)
    source, opened = _timed(lambda: Checkpoint.open(root))
    found, inspected = _timed(lambda: inspect_checkpoint(source))
    layout = layout_of(source.config, source.tensors)
    every = keep_all(layout)
    manifest = Manifest(
        keep={layer: kept[::2] for layer, kept in every.keep.items()},
        mtp_keep={layer: kept[::2] for layer, kept in every.mtp_keep.items()},
    )
    pruned, pruning = _timed(lambda: plan_prune(source, manifest))
    size, quantizing = "refused", 0.0
    try:
        kind = cast("Format", (*layout.family.formats, "auto-round")[0])
        scheme = Scheme.preset("W4A16", format=kind, group_size=published.RELEASES[name].group_size)
        plan, quantizing = _timed(lambda: plan_quantize(source, scheme))
        size = f"{plan.data_bytes / 1e9:.1f}"
    except SchemeError:
        pass
    sizes = f"{source.nbytes / 1e9:.1f} | {pruned.data_bytes / 1e9:.1f} | {size}"
    seconds = " | ".join(f"{each:.2f}" for each in (opened, inspected, pruning, quantizing))
    return f"| {name} | {len(tensors):,} | {(found.parameters or 0) / 1e9:.2f} B | {sizes} | {seconds} |"


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    begin = time.process_time()
    found = work()
    return found, time.process_time() - begin


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
