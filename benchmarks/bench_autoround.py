"""Tuned rounding against upstream auto-round on examples/small-moe: the same windows, iterations and batch size.

    python benchmarks/bench_autoround.py [--iters 50] [--batch-size 8] [--samples 64] [--seqlen 512] [--threads 1]
    python benchmarks/bench_autoround.py --pack --iters 200 --samples 128 --seqlen 256 [--alg-ext]

Each runs as a process of its own. Calibration documents are cut to windows of `--seqlen` tokens, shorter ones passed
over, as upstream does; both see the same set (upstream reads the documents that we take, one a line). With `--pack`
documents are joined and cut, as we do by default, and upstream is given the windows that we take. With `--alg-ext`
upstream runs a second time, with its `enable_alg_ext`. Then, in float32 on 64 windows of 256 held-out tokens:
perplexity, divergence from the 16-bit model, and how far the output of every block is from the 16-bit one's, each on
its own chain, on the calibration windows as well. Needs auto-round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
CALIB: Final = SMALL_MOE / "text" / "calib.jsonl"
HELDOUT: Final = SMALL_MOE / "text" / "heldout.jsonl"


def shardxform(*arguments: str) -> dict[str, Any]:
    """Run a command of ours, and return what it prints with --json."""
    command = [sys.executable, "-m", "shardxform", *arguments, "--json", "--quiet"]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    facts: dict[str, Any] = json.loads(out)
    return facts


def timed(command: list[str], threads: int) -> dict[str, float]:
    """Wall time, CPU time and peak memory of a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    started = time.monotonic()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: ended with {status}")
    return {
        "seconds": time.monotonic() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024.0,
    }


def packed_windows(args: argparse.Namespace) -> Any:  # noqa: ANN401
    """Token ids [samples, seqlen] as our own commands cut them."""
    import torch

    from shardxform.calibration import DataOptions, load_windows

    data = DataOptions(data=str(CALIB), samples=args.samples, seqlen=args.seqlen)
    return torch.as_tensor(load_windows(SMALL_MOE, data).ids_NT).long()


def long_documents(args: argparse.Namespace, out: Path) -> int:
    """Write the documents that fill a window, which is all that either tool takes; their number."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(SMALL_MOE)
    kept: list[dict[str, str]] = []
    for line in CALIB.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        if len(tokenizer(text).input_ids) >= args.seqlen:
            kept.append({"text": text})
    out.write_text("\n".join(map(json.dumps, kept)) + "\n", encoding="utf-8")
    samples = min(len(kept), int(args.samples))
    return samples - samples % int(args.batch_size)  # upstream fails in a batch that is not full


def upstream_run(out: Path, data: Path, args: argparse.Namespace) -> None:
    """Let auto-round quantize the model, in this process."""
    import torch
    from auto_round import AutoRound, calib_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(SMALL_MOE, dtype=torch.bfloat16)
    keep = ("mlp.gate", "shared_expert_gate", "in_proj_a", "in_proj_b")
    tuner = AutoRound(
        model,
        AutoTokenizer.from_pretrained(SMALL_MOE),
        scheme="W4A16",
        iters=args.iters,
        nsamples=args.samples,
        seqlen=args.seqlen,
        batch_size=args.batch_size,
        dataset=str(data),
        device_map="cpu",
        enable_torch_compile=False,
        layer_config={name: {"bits": 16, "data_type": "float"} for name in keep},
        seed=args.seed,
        enable_alg_ext=args.alg_ext,
    )
    if args.pack:
        ids_NT = packed_windows(args)
        batches: Any = torch.split(ids_NT, args.batch_size)
        calib_dataset.get_dataloader = lambda *_, **__: [{"input_ids": ids_BT} for ids_BT in batches]  # what it reads
    tuner.quantize_and_save(str(out), format="auto_round")


def evaluate(checkpoint: Path, text: Path, size: tuple[int, int], work: Path, *options: str) -> dict[str, Any]:
    """Figures of a checkpoint against the 16-bit one."""
    samples, length = map(str, size)
    data = ["--data", str(text), "--samples", samples, "--seqlen", length, *options]
    return shardxform("evaluate", str(checkpoint), "--against", str(SMALL_MOE), *data, "--work", str(work))


def measure(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """One row a way of quantizing."""
    data = scratch / "calib.jsonl"
    samples = len(packed_windows(args)) if args.pack else long_documents(args, data)
    data, pack = (CALIB, []) if args.pack else (data, ["--no-pack"])
    shape = ["--samples", str(samples), "--seqlen", str(args.seqlen)]
    tune = ["--iters", str(args.iters), "--batch-size", str(args.batch_size), "--seed", str(args.seed)]
    ours = [sys.executable, "-m", "shardxform", "quantize", str(SMALL_MOE)]
    upstream = [sys.executable, __file__, *(["--pack"] if args.pack else []), "--data", str(data), *shape, *tune]
    upstream += ["--threads", str(args.threads), "--upstream-run"]
    runs = {
        "rtn": [*ours, str(scratch / "rtn"), "-q"],
        "rtn --search": [*ours, str(scratch / "search"), "-q", "--search"],
        "auto-round 0.16.1": [*upstream, str(scratch / "upstream")],
        "shardxform": [
            *(*ours, str(scratch / "tuned"), "-q", "--method", "auto-round"),
            *("--data", str(data), *pack, "--dtype", args.dtype, *shape, *tune),
        ],
    }
    folders = dict(zip(runs, ("rtn", "search", "upstream", "tuned"), strict=True))
    if args.alg_ext:
        runs["enable_alg_ext"], folders["enable_alg_ext"] = [*upstream, str(scratch / "ext"), "--alg-ext"], "ext"
    rows = []
    for name, command in runs.items():
        cost = timed(command, args.threads)
        folder = next((scratch / folders[name]).rglob("config.json")).parent  # upstream names a folder of its own
        held = evaluate(folder, HELDOUT, (64, 256), scratch / "work")
        seen = evaluate(folder, data, (samples, args.seqlen), scratch / "work", *pack)
        rows.append({"name": name, **cost, "heldout": held, "calibration": seen})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print two tables: what clients see, and the blocks."""
    print(f"{'':<20} {'perplexity':>10} {'KL':>9} {'top-1':>7} {'CPU s':>7} {'RSS GB':>7}")
    for row in rows:
        held = row["heldout"]
        kl, top1 = held["against"]["kl"], held["against"]["top1_agreement"]
        cost = f"{row['cpu_seconds']:>7.0f} {row['peak_rss_bytes'] / 1e9:>7.2f}"
        print(f"{row['name']:<20} {held['perplexity']:>10.3f} {kl:>9.5f} {top1:>7.2%} {cost}")
    for part in ("calibration", "heldout"):
        print(f"\nerror of each block's output, % of the 16-bit one's norm, {part} text")
        for row in rows:
            errors = "  ".join(f"{100 * error:6.3f}" for error in row[part]["against"]["block_errors"])
            print(f"{row['name']:<20} {errors}")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description="Tuned rounding against upstream on examples/small-moe.")
    parser.add_argument("--iters", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pack", action="store_true", help="join the documents")
    parser.add_argument("--alg-ext", action="store_true", help="upstream with enable_alg_ext, too")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of ours; %(default)s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--upstream-run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.upstream_run:
        upstream_run(args.upstream_run, args.data, args)
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)


if __name__ == "__main__":
    main()
