"""What it costs to work from FP8, FP4 and int4 instead of from BF16: decoding, and the commands, each against its twin.

    python benchmarks/bench_sources.py --dir SCRATCH [--layers 2] [--pairs 5] [--only decode] [--json]

Writes blocks of the shapes of Qwen3-30B-A3B in each encoding, of random codes under scales that are powers of two, and
in bfloat16 with the same values (2.5 GB with two blocks, and 1.3 GB or half of that for each encoding; removed at the
end). Each measurement takes turns with its twin's, with the page cache warm; ratios are of pairs.

- `decode`: processor time on one thread. Rows as float32, as rounding reads them; experts in float32 and in bfloat16,
  as a forward pass reads them.
- `score`, `prune`, `quantize`: the processes that a user starts; wall and processor time, and the peak of resident
  memory as the kernel counts it, read a hundred times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from safetensors.torch import save_file

from shardxform.checkpoint.table import Checkpoint
from shardxform.forward.weights import Precision, Weights

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
TEXT: Final = SMALL_MOE / "text" / "calib.jsonl"
HIDDEN, INNER, EXPERTS, HEADS, KV, HEAD, VOCABULARY = 2048, 768, 128, 32, 4, 128, 2048
GROUP: Final = {"targets": ["Linear"], "input_activations": None}
FP4: Final = {"num_bits": 4, "type": "float", "symmetric": True}
E2M1: Final = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

Parts = dict[str, torch.Tensor]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def fp8(rng: torch.Generator, rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
    """In blocks of 128, as most releases."""
    codes = torch.randint(0, 256, (rows, columns), generator=rng, dtype=torch.uint8)
    codes = torch.where(codes & 127 > 119, codes - 8, codes)  # no NaN
    power = torch.randint(-14, -11, (-(-rows // 128), -(-columns // 128)), generator=rng)
    spread = torch.exp2(power.float()).repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    weight = codes.view(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale_inv": torch.exp2(power.float())}, weight.float() * spread


def halves(codes: torch.Tensor) -> torch.Tensor:
    """Values of two codes a byte."""
    both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    return E2M1[both.long()]


def mxfp4(rng: torch.Generator, rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
    """As compressed-tensors has it."""
    codes = torch.randint(0, 256, (rows, columns // 2), generator=rng, dtype=torch.uint8)
    power = torch.randint(-8, -6, (rows, columns // 32), generator=rng)
    values = halves(codes) * torch.exp2(power.float()).repeat_interleave(32, 1)
    return {"weight_packed": codes, "weight_scale": (power + 127).to(torch.uint8)}, values


def nvfp4(rng: torch.Generator, rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
    """As compressed-tensors has it, whose second scale divides."""
    codes = torch.randint(0, 256, (rows, columns // 2), generator=rng, dtype=torch.uint8)
    power = torch.exp2(torch.randint(-2, 3, (rows, columns // 16), generator=rng).float())
    parts = {"weight_packed": codes, "weight_scale": power.to(torch.float8_e4m3fn)}
    parts["weight_global_scale"] = torch.tensor([256.0])
    return parts, halves(codes) * (power / 256).repeat_interleave(16, 1)


def int4(rng: torch.Generator, rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
    """As compressed-tensors packs it, in groups of 32 (Kimi-K2)."""
    words = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=rng).to(torch.int32)
    nibbles = torch.stack([words >> shift & 15 for shift in range(0, 32, 4)], dim=-1).flatten(1)
    scale = torch.exp2(torch.randint(-9, -7, (rows, columns // 32), generator=rng).float())
    parts = {"weight_packed": words, "weight_scale": scale.bfloat16(), "weight_shape": torch.tensor([rows, columns])}
    return parts, (nibbles - 8) * scale.repeat_interleave(32, 1)


def compressed(form: str, **weights: object) -> dict[str, object]:
    """A quantization_config of compressed-tensors."""
    groups = {"group_0": {**GROUP, "weights": weights, "format": form}}
    ignore = ["lm_head", r"re:.*mlp\.gate$"]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": form,
        "config_groups": groups,
        "ignore": ignore,
    }


KINDS: Final[dict[str, tuple[Callable[..., tuple[Parts, torch.Tensor]], dict[str, object]]]] = {
    "FP8 in blocks": (
        fp8,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "MXFP4": (mxfp4, compressed("mxfp4-pack-quantized", **FP4, strategy="group", group_size=32)),
    "NVFP4": (nvfp4, compressed("nvfp4-pack-quantized", **FP4, strategy="tensor_group", group_size=16)),
    "int4": (
        int4,
        compressed("pack-quantized", num_bits=4, type="int", symmetric=True, strategy="group", group_size=32),
    ),
}


def config(layers: int) -> dict[str, Any]:
    """That of Qwen3-30B-A3B, of fewer blocks and words."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "intermediate_size": 6144,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }


def linears() -> Iterator[tuple[str, int, int]]:
    """Quantized weights of a block: name and shape."""
    yield "self_attn.q_proj", HEADS * HEAD, HIDDEN
    yield "self_attn.k_proj", KV * HEAD, HIDDEN
    yield "self_attn.v_proj", KV * HEAD, HIDDEN
    yield "self_attn.o_proj", HIDDEN, HEADS * HEAD
    for expert in range(EXPERTS):
        yield f"mlp.experts.{expert}.gate_proj", INNER, HIDDEN
        yield f"mlp.experts.{expert}.up_proj", INNER, HIDDEN
        yield f"mlp.experts.{expert}.down_proj", HIDDEN, INNER


def write_pair(root: Path, kind: str, layers: int) -> tuple[Path, Path]:
    """A checkpoint of a kind, and its twin; a shard for each block."""
    encode, declared = KINDS[kind]
    source, twin = root / kind.replace(" ", "-"), root / f"{kind.replace(' ', '-')}-twin"
    rng = torch.Generator().manual_seed(7)
    for out in (source, twin):
        out.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(SMALL_MOE / name, out / name)
    ends = {f"{end}.weight": normal(rng, VOCABULARY, HIDDEN) for end in ("model.embed_tokens", "lm_head")}
    ends["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    index: list[dict[str, str]] = [{}, {}]
    count = layers + 1
    for number in range(count):
        both: tuple[Parts, Parts] = (dict(ends), dict(ends)) if number == layers else block(rng, number, encode)
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        for out, tensors, where in zip((source, twin), both, index, strict=True):
            save_file(tensors, out / file, metadata={"format": "pt"})
            where |= dict.fromkeys(tensors, file)
    for out, where, said in zip((source, twin), index, ({"quantization_config": declared}, {}), strict=True):
        (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        (out / "config.json").write_text(json.dumps({**config(layers), **said}))
    return source, twin


def normal(rng: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """A weight in bfloat16."""
    return (0.02 * torch.randn(rows, columns, generator=rng)).bfloat16()


def block(rng: torch.Generator, layer: int, encode: Callable[..., tuple[Parts, torch.Tensor]]) -> tuple[Parts, Parts]:
    """Tensors of a block, encoded and not."""
    home = f"model.layers.{layer}."
    plain = {f"{home}{norm}_layernorm.weight": torch.ones(HIDDEN).bfloat16() for norm in ("input", "post_attention")}
    plain |= {f"{home}self_attn.{part}_norm.weight": torch.ones(HEAD).bfloat16() for part in ("q", "k")}
    plain[f"{home}mlp.gate.weight"] = normal(rng, EXPERTS, HIDDEN)
    stored, values = dict(plain), dict(plain)
    for name, rows, columns in linears():
        parts, value = encode(rng, rows, columns)
        stored |= {f"{home}{name}.{last}": part for last, part in parts.items()}
        values[f"{home}{name}.weight"] = value.bfloat16()
        assert torch.equal(values[f"{home}{name}.weight"].float(), value)
    return stored, values


# -- measuring --------------------------------------------------------------------------------------------------------


def warm(root: Path) -> None:
    """Have all of a checkpoint in the page cache."""
    for path in root.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def decode(root: Path, how: str, experts: int = 48) -> float:
    """Seconds of the processor for the weights of so many experts."""
    dtype = torch.bfloat16 if how == "experts, bfloat16" else torch.float32
    with Weights(Checkpoint.open(root), Precision(torch.device("cpu"), dtype)) as weights:
        started = time.process_time()
        for expert in range(experts):
            weights.expert("block", 0, expert).dense(weights.precision)
        return time.process_time() - started


def rows(root: Path, _how: str, experts: int = 48) -> float:
    """Likewise, as float32 rows of each matrix."""
    from shardxform.base.file_system import FileSystem
    from shardxform.checkpoint.remote.repository import open_source
    from shardxform.formats.decoding import decoded
    from shardxform.formats.encoding import DECODE_TILE, Encoded, Opener, Storage, row_tiles
    from shardxform.formats.plain import Plain
    from shardxform.formats.stored import read_stored

    checkpoint = Checkpoint.open(root)
    plain = decoded(checkpoint) or checkpoint
    table = plain.tensors
    if plain is checkpoint and "quantization_config" in checkpoint.config:
        stored = read_stored(checkpoint)
        table = {**stored.plain, **stored.weights}
    source = open_source(checkpoint.root, None, FileSystem())

    def read(ref: Any, into: np.ndarray[Any, Any]) -> None:  # noqa: ANN401
        view = into.reshape(-1).view(np.uint8).data
        done = 0
        for piece in ref.ranges:
            source.read_into(piece, view[done : done + piece.length])
            done += piece.length

    opener = Opener(read)
    started = time.process_time()
    for expert in range(experts):
        for part in ("gate", "up", "down"):
            ref = table[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"]
            if isinstance(ref, Encoded):
                (one,) = ref.sources
            else:
                rows_, columns = ref.spec.shape
                one = Storage(Plain(ref.spec.dtype), (("values", ref),), (rows_, columns))
            opened = opener.open(one)
            for start, stop in row_tiles(opened.count, one.shape[1], DECODE_TILE):
                opened.values(start, stop)
    took = time.process_time() - started
    source.close()
    return took


def process(command: list[str], out: Path) -> dict[str, float]:
    """Wall and processor seconds, and peak memory in GB, of a process; what it wrote is removed."""
    started = time.monotonic()
    child = subprocess.Popen([sys.executable, "-m", "shardxform", *command], stdout=subprocess.DEVNULL)
    done = status = peak = 0
    while not done:  # what the kernel says at the end counts this process too, of which it was a copy
        with contextlib.suppress(OSError, IndexError):
            told = Path(f"/proc/{child.pid}/status").read_text()
            peak = max(peak, int(told.split("VmHWM:")[1].split()[0]) * 1024)
        done, status, usage = os.wait4(child.pid, os.WNOHANG)
        time.sleep(0.01)
    took = time.monotonic() - started
    if status:
        raise SystemExit(f"{' '.join(command)}: exit {status}")
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()
    return {"wall": took, "cpu": usage.ru_utime + usage.ru_stime, "gb": peak / 1e9}


def commands(scratch: Path, layers: int) -> Iterator[tuple[str, Callable[[Path], list[str]], Path]]:
    """What is run: its name, the arguments for a source, and what it leaves."""
    keep = scratch / "keep.json"
    every = {str(layer): list(range(0, EXPERTS, 2)) for layer in range(layers)}
    keep.write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": every}))
    out = scratch / "out"
    data = ["--data", str(TEXT), "--samples", "8", "--seqlen", "512"]
    scores = scratch / "saliency"
    yield "score", lambda root: ["score", str(root), "-o", str(scores), "-q", *data], scores
    yield "prune", lambda root: ["prune", str(root), str(out), "-m", str(keep), "-q"], out
    yield "quantize", lambda root: ["quantize", str(root), str(out), "-m", str(keep), "-q", "--requantize"], out


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where to write checkpoints (a temporary directory)")
    parser.add_argument("--layers", type=int, default=2, help="decoder blocks (default 2)")
    parser.add_argument("--pairs", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--only", action="append", choices=["decode", "score", "prune", "quantize"], default=[])
    parser.add_argument("--kind", action="append", choices=list(KINDS), default=[], help="encodings (all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.only == ["decode"] else torch.get_num_threads())
    found = []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        for kind in args.kind or KINDS:
            pair = write_pair(Path(folder), kind, args.layers)
            for root in pair:
                warm(root)
            for line in measured(kind, pair, Path(folder), args):
                found.append(line)
                if not args.json:
                    print(row_of(line), flush=True)
            for root in pair:
                shutil.rmtree(root)
    if args.json:
        print(json.dumps({"rows": found}, indent=2))


def measured(kind: str, pair: tuple[Path, Path], scratch: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Lines of the table for one encoding."""
    wanted = args.only or ["decode", "score", "prune", "quantize"]
    hows: tuple[tuple[str, Callable[[Path, str], float]], ...] = (
        ("rows, float32", rows),
        ("experts, float32", decode),
        ("experts, bfloat16", decode),
    )
    for how, work in hows if "decode" in wanted else ():
        turns = [[work(root, how) for root in pair] for _ in range(args.pairs + 1)][1:]
        yield line_of(kind, how, turns)
    for name, command, out in commands(scratch, args.layers):
        if name not in wanted:
            continue
        runs = [[process(command(root), out) for root in pair] for _ in range(args.pairs)]
        line = line_of(kind, name, [[run["wall"] for run in turn] for turn in runs])
        cpu = line_of(kind, name, [[run["cpu"] for run in turn] for turn in runs])
        yield {**line, "cpu": cpu["ratio"], "gb": [max(run[side]["gb"] for run in runs) for side in (0, 1)]}


def line_of(kind: str, what: str, turns: list[list[float]]) -> dict[str, Any]:
    """Medians of both, and of the ratios of turns."""
    ours, theirs = zip(*turns, strict=True)
    ratios = [one / other for one, other in turns]
    return {
        "kind": kind,
        "what": what,
        "seconds": statistics.median(ours),
        "twin": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def row_of(line: dict[str, Any]) -> str:
    """A line of a Markdown table."""
    more = f" {line['cpu']:.2f} | {line['gb'][0]:.2f} GB, {line['gb'][1]:.2f} GB |" if "gb" in line else " | |"
    spread = f"{line['ratio']:.2f} ({line['least']:.2f} to {line['most']:.2f})"
    return f"| {line['kind']} | {line['what']} | {line['seconds']:.2f} s | {line['twin']:.2f} s | {spread} |{more}"


if __name__ == "__main__":
    main()
