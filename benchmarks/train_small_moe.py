"""Train the model of examples/small-moe further, on the standard library of this Python and the King James Bible.

    python benchmarks/train_small_moe.py --out DIR [--source examples/small-moe] [--steps 600] [--rate 1.5e-3]

Needs torch, transformers, and `bible` (Debian: bible-kjv-text). Documents are pieces of 6,000 characters; those that
have lines of text/calib.jsonl or text/heldout.jsonl are left out. Names, shapes, types and shards stay as they are.
Another Python, or other libraries, give another model of the same kind.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from shardxform.tuning.delta_rule import gated_delta_rule

SMALL_MOE: Final = Path(__file__).resolve().parents[1] / "examples" / "small-moe"
BATCH, LENGTH, PIECE, WARMUP, BALANCE, SEED = 8, 256, 6000, 50, 0.002, 42


def pieces(text: str) -> list[str]:
    """Cut a text into documents."""
    return [text[at : at + PIECE] for at in range(0, len(text), PIECE)]


def code() -> list[str]:
    """Documents of the standard library, its tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = sorted(path for path in root.rglob("*.py") if not apart & set(path.relative_to(root).parts))
    return [piece for path in files for piece in pieces(path.read_text("utf-8", errors="replace"))]


def kjv() -> list[str]:
    """Documents of the Bible, a verse a line."""
    verses = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    return pieces("".join(line.split(" ", 1)[1] + "\n" for line in verses.splitlines()))


def seen_nowhere(documents: list[str], apart: list[str]) -> list[str]:
    """Keep those that share no more than a twentieth of their long lines with the texts apart."""
    lines = {line for text in apart for line in text.split("\n") if len(line) > 40}
    own = [[line for line in text.split("\n") if len(line) > 40] for text in documents]
    return [text for text, its in zip(documents, own, strict=True) if sum(i in lines for i in its) <= 0.05 * len(its)]


def sources_of(source: Path) -> list[torch.Tensor]:
    """Ids of the code and of the Bible, by the tokenizer of `source`, without what its texts hold."""
    apart = [json.loads(line)["text"] for path in (source / "text").iterdir() for line in path.open()]
    tokenizer = AutoTokenizer.from_pretrained(source)
    found = []
    for documents in (code(), kjv()):
        kept = seen_nowhere(documents, apart)
        ids = [i for row in tokenizer(kept)["input_ids"] for i in [*row, tokenizer.eos_token_id]]
        found.append(torch.tensor(ids))
        print(f"{len(kept):,} of {len(documents):,} documents, {len(ids):,} tokens", flush=True)
    return found


def experts_forward(self: Any, x: torch.Tensor, top_k: torch.Tensor, g: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Do as transformers, with the stacks taken apart once: no gradient of a whole stack for every expert."""
    out = torch.zeros_like(x)
    for e, (gate_up, down) in enumerate(zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)):
        token, k = torch.where(top_k == e)
        gate, up = functional.linear(x[token], gate_up).chunk(2, -1)
        out = out.index_add(0, token, functional.linear(functional.silu(gate) * up, down) * g[token, k, None])
    return out


def imbalance(logits: list[torch.Tensor], top_k: int) -> torch.Tensor:
    """How unequal experts are, mean over the layers; 1 when each gets as many tokens as any other."""
    total = torch.zeros(())
    for layer in logits:
        probability = layer.softmax(-1)
        chosen = torch.zeros_like(layer).scatter(-1, layer.topk(top_k, -1).indices, 1.0)
        total = total + (chosen.mean(0) * probability.mean(0)).sum() * layer.shape[-1] / top_k
    return total / len(logits)


def train(model: Any, sources: list[torch.Tensor], steps: int, peak: float) -> None:  # noqa: ANN401
    """AdamW over windows of the sources; the rate rises to its peak, and falls as a cosine."""
    logits: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda _module, _inputs, out: logits.append(out[0]))
    apart = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    groups = [{"params": each, "weight_decay": decay} for each, decay in zip(apart, (0.05, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    random = np.random.default_rng(SEED)
    for step in range(steps):
        rate = peak * min(1, (step + 1) / WARMUP) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = []
        for _ in range(BATCH):
            ids = sources[int(random.random() < 0.4)]  # three windows of code for two of the Bible
            rows.append(ids[int(random.integers(len(ids) - LENGTH)) :][: LENGTH + 1])
        batch = torch.stack(rows)
        logits.clear()  # of all layers, which the forward pass appends
        out = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(out.flatten(0, 1), batch[:, 1:].flatten())
        total = loss + BALANCE * imbalance(logits, model.config.num_experts_per_tok)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"{step:5d}  loss {loss.item():.3f}  rate {rate:.1e}", flush=True)


def write(model: Any, source: Path, out: Path) -> None:  # noqa: ANN401
    """Copy the source, with the model's values in its shards."""
    shutil.copytree(source, out, dirs_exist_ok=True)
    values = model.state_dict()
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            save_file({name: values[name].to(old[name].dtype) for name in old}, out / shard.name, file.metadata())


def main() -> None:
    """Read the texts, train, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=SMALL_MOE)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    given = parser.parse_args()
    setattr(modeling_qwen3_5_moe.Qwen3_5MoeExperts, "forward", experts_forward)  # noqa: B010
    setattr(modeling_qwen3_5_moe, "torch_chunk_gated_delta_rule", gated_delta_rule)  # noqa: B010
    sources = sources_of(given.source)
    model = AutoModelForCausalLM.from_pretrained(given.source, dtype=torch.float32)
    train(model.train(), sources, given.steps, given.rate)
    write(model, given.source, given.out)


if __name__ == "__main__":
    main()
