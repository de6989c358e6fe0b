"""What rounding to each kind of GGUF file costs in quality: divergence of examples/small-moe from its 16-bit source.

    python benchmarks/bench_gguf_types.py [--source DIR] [--samples 64] [--iters 200] [--only tuned|files|importance]

`tuned`: `quantize --format gguf`, rounded and tuned, in groups of 32 and of 128. `files`: every kind of files that
`convert --to gguf` writes, embeddings and head rounded too, as by llama-quantize. `importance`: the weights that
`quantize` rounds and no others, by llama.cpp itself, with an importance matrix: the mean squares of what
enters each weight, each expert by itself, on the windows that tuning sees. Rows of examples/small-moe fill no blocks of
256 columns, so kinds of K take the types that llama-quantize puts in their place; rows of `square`, which
`small_moes.py` trains, do. Everything is measured by `evaluate` on held-out text, in float32. Needs torch and
transformers, and for `importance` xllamacpp; about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from bench_ggml import NUMBERS, library
from bench_prune import ROOT, SHARDXFORM, say, table
from bench_quality import SMALL_MOE, windows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shardxform.base.tensors import BLOCKS
from shardxform.formats import ggml, ggml_blocks
from shardxform.runtimes.gguf.mixes import KINDS

WINDOWS, LENGTH = 128, 256
TYPES: Final = ("Q4_0", "IQ4_NL", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0")
ROUNDED: Final = re.compile(
    r".*\.(mlp\.(experts\.(gate_up_proj|down_proj|\d+\.\w+\.weight)|shared_expert\.\w+\.weight)"
    r"|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)\.weight|self_attn\.[qkvo]_proj\.weight)"
)
Importance = Mapping[str, np.ndarray[Any, Any]]


class Row(NamedTuple):
    """A line of the table."""

    name: str
    nbytes: int
    perplexity: float
    kl: float
    kl_error: float
    top1: float


def called(*words: object) -> str:
    """Run a command of shardxform; what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*SHARDXFORM, *map(str, words)], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def measured(name: str, out: Path, args: argparse.Namespace) -> Row:
    """Evaluate an output against the source, and remove it."""
    text = ("--data", args.source / "text" / "heldout.jsonl", "--samples", args.samples, "--seqlen", LENGTH)
    found = json.loads(
        called("evaluate", out, "--against", args.source, *text, "--work", f"{out}.work", "--json", "-q")
    )
    nbytes = sum(path.stat().st_size for path in out.glob("*.gguf"))
    shutil.rmtree(out)
    against = found["against"]
    row = Row(name, nbytes, found["perplexity"], against["kl"], against["kl_standard_error"], against["top1_agreement"])
    say(f"{name}: KL {row.kl:.5f}")
    return row


# -- what shardxform writes --------------------------------------------------------------------------------------------


def tuned(scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Q4_0 and Q8_0 of integers: rounded, searched, and tuned."""
    data = ("--data", args.source / "text" / "calib.jsonl", "--samples", WINDOWS, "--seqlen", LENGTH)
    tuning = ("--method", "auto-round", *data, "--iters", args.iters)
    for name, options in (
        ("Q4_0, tuned", tuning),
        ("Q4_0, tuned in groups of 128", (*tuning, "--group-size", "128")),
        ("Q4_0, --search", ("--search",)),
        ("Q4_0, rounded", ()),
        ("Q8_0, rounded", ("--scheme", "W8A16")),
    ):
        called("quantize", args.source, scratch / "out", "--format", "gguf", *args.options, "-q", *options)
        yield measured(name, scratch / "out", args)


def files(scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Every kind of files that convert rounds to."""
    for kind in KINDS:
        if kind not in ("F32", "F16", "BF16"):
            called("convert", args.source, scratch / "out", "--to", "gguf", "--gguf-type", kind, *args.options, "-q")
            yield measured(f"whole file in {kind}", scratch / "out", args)


# -- with an importance matrix -----------------------------------------------------------------------------------------


def with_importance(scratch: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Round in llama.cpp's library, with an importance matrix and without."""
    if library() is None:
        raise SystemExit("xllamacpp is not installed")
    seen = importance(args.source)
    for type_name in types_of(args.source):
        for name, found in (("importance matrix", seen), ("no importance matrix", {})):
            write_rounded(args.source, scratch / "out", partial(rounded, type_name=type_name, seen=found))
            yield measured(f"{type_name}, llama.cpp, {name}", scratch / "out", args)


def types_of(source: Path) -> Iterator[str]:
    """Types whose blocks the rows of all weights fill."""
    shapes = [
        tensor.shape
        for shard in sorted(source.glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
        if ROUNDED.fullmatch(name)
    ]
    for name in TYPES:
        if not any(shape[-1] % BLOCKS[name][0] for shape in shapes):
            yield name


@torch.no_grad()
def importance(source: Path) -> Importance:
    """Mean squares of the columns that enter each weight, [I] or [E, I]; ones for an expert that no token reaches."""
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(source, dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}

    def linear(name: str, _module: Any, inputs: Any) -> None:  # noqa: ANN401
        sums[name] = sums.get(name, 0) + inputs[0].flatten(0, -2).double().square().sum(0)

    def experts(name: str, module: Any, inputs: Any) -> None:  # noqa: ANN401
        hidden_TH, chosen_TK = inputs[0].flatten(0, -2), inputs[1].flatten(0, -2)
        for expert in range(len(module.gate_up_proj)):
            x = hidden_TH[(chosen_TK == expert).any(-1)]
            gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, -1)
            for part, each in (("gate_up_proj", x), ("down_proj", module.act_fn(gate) * up)):
                shape = (len(module.gate_up_proj), each.shape[-1])
                own = sums.setdefault(f"{name}.{part}", torch.zeros(shape, dtype=torch.float64))
                own[expert] += each.double().square().sum(0)

    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(partial(experts, name))
        elif isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(partial(linear, f"{name}.weight"))
    ids_SL = windows(source, source / "text" / "calib.jsonl", WINDOWS, LENGTH)
    for start in range(0, WINDOWS, 8):
        model(ids_SL[start : start + 8])
    return {name: torch.where(of.any(-1, keepdim=True), of, 1).float().numpy() for name, of in sums.items()}


def write_rounded(source: Path, out: Path, rounding: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Write a float32 copy of a checkpoint whose weights are rounded."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(shard).items()}
    out.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / file, out)
    found = {name: rounding(name, each) if ROUNDED.fullmatch(name) else each for name, each in tensors.items()}
    save_file(found, out / "model.safetensors", {"format": "pt"})


def rounded(name: str, values: torch.Tensor, type_name: str, seen: Importance) -> torch.Tensor:
    """The values that llama.cpp's blocks stand for."""
    matrices = values.numpy().reshape(-1, *values.shape[-2:])
    weights = found_for(name, seen).reshape(len(matrices), -1) if seen else [None] * len(matrices)
    columns, nbytes = BLOCKS[type_name]
    out = []
    for matrix_OI, weight_I in zip(matrices, weights, strict=True):
        blocks_OB = np.empty((len(matrix_OI), matrix_OI.shape[1] // columns * nbytes), np.uint8)
        at = (each.ctypes.data for each in (np.ascontiguousarray(matrix_OI), blocks_OB))
        of = None if weight_I is None else np.ascontiguousarray(weight_I).ctypes.data
        library().ggml_quantize_chunk(NUMBERS[type_name], *at, 0, *matrix_OI.shape, of)
        if weight_I is None:
            assert (ggml.rounded_blocks(matrix_OI, type_name) == blocks_OB).all()
        out.append(ggml_blocks.block_values(blocks_OB, type_name))
    return torch.from_numpy(np.stack(out).reshape(values.shape))


def found_for(name: str, seen: Importance) -> np.ndarray[Any, Any]:
    """What entered a weight; of an expert that is stored by itself, its row of what entered the stack."""
    match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if match is None:
        return seen[name]
    found: np.ndarray[Any, Any] = seen[f"{match[1]}.{'down' if match[3] == 'down' else 'gate_up'}_proj"][int(match[2])]
    return found


def lines(rows: list[Row]) -> Iterator[str]:
    """Everything as text, the least divergence first."""
    found = [
        (
            row.name,
            f"{row.nbytes / 1e6:.2f} MB" if row.nbytes else "",
            f"{row.perplexity:.3f}",
            f"{row.kl:.5f} ± {row.kl_error:.5f}",
            f"{row.top1:.1%}",
        )
        for row in sorted(rows, key=lambda row: row.kl)
    ]
    yield from table("kinds of GGUF files", ("", "file", "perplexity", "KL", "same choice"), found)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SMALL_MOE, help="16-bit checkpoint with text/ beside it")
    parser.add_argument("--samples", type=int, default=64, help="held-out windows of 256 tokens; %(default)s")
    parser.add_argument("--iters", type=int, default=200, help="steps of tuning a block; %(default)s")
    parser.add_argument("--pre-tokenizer", help="of the source, where its tokenizer does not tell")
    parser.add_argument("--only", choices=["tuned", "files", "importance"], action="append", help="default: all")
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    args = parser.parse_args()
    args.source = args.source.resolve()
    args.options = ("--pre-tokenizer", args.pre_tokenizer) if args.pre_tokenizer else ()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-gguf-types-") as folder:
        for name, work in (("tuned", tuned), ("files", files), ("importance", with_importance)):
            if not args.only or name in args.only:
                rows += work(Path(folder), args)
    print(json.dumps([row._asdict() for row in rows], indent=2) if args.json else "\n".join(lines(rows)))


if __name__ == "__main__":
    main()
