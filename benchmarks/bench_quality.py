"""Perplexity and divergence of quantized or pruned checkpoints against their 16-bit source, in float32.

    python benchmarks/bench_quality.py [CHECKPOINT ...] [--source examples/small-moe] [--sequences 64] [--json]

Without checkpoints, quantizes the source every way there is: plain and searched scales on both scale grids. Every
checkpoint is dequantized to float32 and run as a plain model, so that only its weights differ from the source's. With
--cast-scales, scales are first rounded to bfloat16: what a client computes that holds them in the model's type.
Held-out documents are joined with the end-of-text token and cut into windows. The divergence is the mean over all
positions; perplexity leaves out the first token of each window. Sums are in float64. Needs torch and transformers;
made for small models, all of which are held in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from shardxform.checkpoint.table import Checkpoint
from shardxform.execution.runner import run
from shardxform.formats.scheme import PRESETS, Grid, ScaleGrid, Scheme
from shardxform.plan.quantize import plan_quantize

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
GRIDS: Final[tuple[ScaleGrid, ...]] = ("fp16", "bf16")
BATCH: Final = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One checkpoint; `kl_error` is the standard error of `kl` over the windows, `top1` the share of equal choices."""

    name: str
    perplexity: float
    kl: float
    kl_error: float
    top1: float


@dataclass(slots=True)
class Sums:
    """Running sums of one model."""

    loss: float = 0.0
    predicted: int = 0
    agree: int = 0
    positions: int = 0
    kl_of_sequence: list[float] = field(default_factory=list)

    def row(self, name: str) -> Row:
        """Turn the sums into means."""
        kl = torch.tensor(self.kl_of_sequence, dtype=torch.float64)
        error = float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else math.nan
        return Row(name, math.exp(self.loss / self.predicted), float(kl.mean()), error, self.agree / self.positions)


# -- checkpoints as plain models ---------------------------------------------------------------------------------------


def plain_model(checkpoint: Path, scratch: Path, cast_scales: bool) -> Any:  # noqa: ANN401
    """Load a checkpoint of any of our formats as a float32 model without quantized layers."""
    config = json.loads((checkpoint / "config.json").read_text())
    quantization = config.pop("quantization_config", None)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(shard)
    if quantization:
        tensors = dict(dequantized(tensors, bits_of(quantization), cast_scales))
    out = Path(tempfile.mkdtemp(dir=scratch))
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(out, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise SystemExit(f"{checkpoint}: missing {sorted(info['missing_keys'])[:3]}")
    return model.eval()


def bits_of(quantization: dict[str, Any]) -> int:
    """Width of the weights that a `quantization_config` of any of our formats states."""
    groups = quantization.get("config_groups")
    return int(next(iter(groups.values()))["weights"]["num_bits"] if groups else quantization["bits"])


def dequantized(tensors: dict[str, torch.Tensor], bits: int, cast_scales: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Replace the parts of packed weights by float32 weights; pass everything else on."""
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            yield f"{module}.weight", values(tensor.T, tensors[f"{module}.scales"].T, bits, cast_scales)
        elif part == "weight_packed":
            yield f"{module}.weight", values(tensor, tensors[f"{module}.weight_scale"], bits, cast_scales)
        elif f"{module}.qweight" not in tensors and f"{module}.weight_packed" not in tensors:
            yield name, tensor


def values(words_OW: torch.Tensor, scale_OG: torch.Tensor, bits: int, cast_scales: bool) -> torch.Tensor:
    """Values of int32 words [O, W] with scales [O, G], exact in float32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes_OI = (words_OW.contiguous()[:, :, None] >> shifts & ((1 << bits) - 1)).reshape(words_OW.shape[0], -1)
    if cast_scales:
        scale_OG = scale_OG.to(torch.bfloat16)
    scale_OI = scale_OG.float().repeat_interleave(codes_OI.shape[1] // scale_OG.shape[1], dim=1)
    return (codes_OI - (1 << (bits - 1))).float() * scale_OI


# -- measuring ---------------------------------------------------------------------------------------------------------


def windows(source: Path, text: Path, sequences: int, length: int) -> torch.Tensor:
    """Token ids [sequences, length] of the documents joined with the end-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids: list[int] = []
    for line in text.read_text(encoding="utf-8").splitlines():
        ids += [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]
    if len(ids) < sequences * length:
        raise SystemExit(f"{text}: {len(ids)} tokens, fewer than {sequences} x {length}")
    return torch.tensor(ids[: sequences * length]).reshape(sequences, length)


@torch.no_grad()
def measure(models: dict[str, Any], ids_SL: torch.Tensor) -> list[Row]:
    """Run all models over the windows; the first is the reference."""
    sums = {name: Sums() for name in models}
    for start in range(0, len(ids_SL), BATCH):
        batch_BL = ids_SL[start : start + BATCH]
        reference: torch.Tensor | None = None
        for name, model in models.items():
            logp = model(batch_BL).logits.double().log_softmax(-1)
            reference = logp if reference is None else reference
            add(sums[name], logp, reference, batch_BL)
    return [total.row(name) for name, total in sums.items()]


def add(sums: Sums, logp: torch.Tensor, reference: torch.Tensor, batch_BL: torch.Tensor) -> None:
    """Add one batch of log-probabilities [B, L, V]."""
    targets = batch_BL[:, 1:, None]
    sums.loss -= float(logp[:, :-1].gather(-1, targets).sum())
    sums.predicted += targets.numel()
    sums.kl_of_sequence += (reference.exp() * (reference - logp)).sum(-1).mean(-1).tolist()
    sums.agree += int((logp.argmax(-1) == reference.argmax(-1)).sum())
    sums.positions += batch_BL.numel()


def own_variants(source: Path, scratch: Path, args: argparse.Namespace) -> Iterator[tuple[str, Path, bool]]:
    """(name, checkpoint, whether to cast its scales) of what `quantize` makes of the source without data."""
    for search in (False, True):
        for scale_grid in GRIDS:
            grid = Grid(bits=PRESETS[args.scheme], group_size=args.group_size, scale_grid=scale_grid, search=search)
            name = f"rtn{' --search' if search else ''} --scale-grid {scale_grid}"
            out = scratch / name.replace(" ", "_")
            run(plan_quantize(Checkpoint.open(source), Scheme(grid=grid)), out)
            yield name, out, False
            if scale_grid == "fp16":
                yield f"{name}, cast to bf16", out, True


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of the table."""
    width = max(len(row.name) for row in rows) + 2
    yield f"{'':{width}}{'perplexity':>11}{'KL':>12}{'+-':>11}{'top-1':>9}"
    for row in rows:
        yield f"{row.name:{width}}{row.perplexity:11.3f}{row.kl:12.6f}{row.kl_error:11.6f}{row.top1:9.4f}"


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, help="checkpoints to compare with the source")
    parser.add_argument("--source", type=Path, default=SMALL_MOE, help="16-bit checkpoint (default examples/small-moe)")
    parser.add_argument("--text", type=Path, help="JSON lines with a 'text' each (default SOURCE/text/heldout.jsonl)")
    parser.add_argument("--sequences", type=int, default=64, help="windows (default 64)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--scheme", choices=list(PRESETS), default="W4A16", help="of its own checkpoints")
    parser.add_argument("--group-size", type=int, choices=[128, 64, 32, -1], default=128, help="likewise")
    parser.add_argument("--cast-scales", action="store_true", help="round the scales of CHECKPOINTs to bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    quiet: Any = logging.disable_progress_bar
    quiet()
    ids_SL = windows(args.source, args.text or args.source / "text" / "heldout.jsonl", args.sequences, args.length)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        models = {"16-bit": plain_model(args.source, scratch, cast_scales=False)}
        given = [(str(path), path, args.cast_scales) for path in args.checkpoints]
        for name, path, cast in given or own_variants(args.source, scratch, args):
            models[name] = plain_model(path, scratch, cast)
        rows = measure(models, ids_SL)
    if args.json:
        print(json.dumps({"sequences": args.sequences, "length": args.length, "rows": [asdict(r) for r in rows]}))
        return
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
