"""Bytes of every command's output on every kind of tiny checkpoint, as `golden.json` has them.

What moves code must not move a byte. A digest that changes on purpose is told in CHANGELOG.md; `python
tests/test_golden.py` writes the file anew. Tuned and healed bytes depend on the processor too: they are kept by what
`computing` calls its arithmetic, and looked at where that is known.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from build import text_of, tiny, write_checkpoint, write_json
from click.testing import CliRunner
from conftest import ONE_THREAD

from shardxform.base.computing import of_model
from shardxform.cli import main

GOLDEN = Path(__file__).with_name("golden.json")
SMALL = Path(__file__).resolve().parents[1] / "examples" / "small-moe"

BASE: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32}
QWEN35: dict[str, Any] = {**BASE, "shared_expert_intermediate_size": 32, "head_dim": 32, "linear_value_head_dim": 32}
QWEN3: dict[str, Any] = {**BASE, "head_dim": 32, "intermediate_size": 64}
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": QWEN35,
    "qwen3_6_moe": QWEN35,
    "qwen3_5_moe_text": QWEN35,
    "qwen3_moe": QWEN3,
    "qwen3_moe_mixed": QWEN3,
    "deepseek_v3": {**BASE, "intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 32},
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32, "head_dim": 32},
    "mixtral": {"hidden_size": 64, "intermediate_size": 32, "head_dim": 32},
}
ROUND = ["quantize", "--group-size", "32"]
QUANTIZED: dict[str, list[str]] = {
    "auto-round": ROUND,
    "gptq": [*ROUND, "--format", "gptq", "--g-idx"],
    "compressed-tensors": [*ROUND, "--format", "compressed-tensors"],
    "8 bits": [*ROUND, "--scheme", "W8A16", "--scale-grid", "fp16"],
    "a scale a row": ["quantize", "--group-size", "-1"],
    "fused-indexed": [*ROUND, "--expert-names", "fused-indexed"],
    "searched": [*ROUND, "--search"],
    "16-bit experts": [*ROUND, "--keep-16bit", "*.experts.*"],
    "16-bit attention": [*ROUND, "--format", "compressed-tensors", "--keep-16bit", "*.self_attn.o_proj"],
}
ONLY = {"gpt_oss": "auto-round", "mixtral": "compressed-tensors"}  # formats in which experts of a kind are read
ROUTERS = (".mlp.gate.weight", ".mlp.router.weight", ".block_sparse_moe.gate.weight")
CONVERTED = ("auto-round", "gptq", "compressed-tensors", "bf16")
TUNED: dict[str, list[str]] = {
    "heal": ["prune", "--heal=all", "--heal-iters", "3"],
    "auto-round": ["quantize", "--method", "auto-round", "--iters", "3"],
    "heal, then auto-round": ["quantize", "--method", "auto-round", "--iters", "2", "--heal=moe", "--heal-iters", "2"],
    "auto-round, bfloat16": ["quantize", "--method", "auto-round", "--iters", "2", "--dtype", "bfloat16"],
}


def source(root: Path, kind: str) -> Path:
    """A checkpoint of a kind, and beside it a manifest `keep.json` that keeps half of its experts."""
    config, tensors = tiny(kind, **SIZES[kind])
    write_checkpoint(root / kind, tensors, config, shards=3, files={"tokenizer.json": "{}"})
    text = text_of(config)
    count = next(text[key] for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in text)
    layers = sorted({int(name.split("layers.")[1].split(".")[0]) for name in tensors if name.endswith(ROUTERS)})
    layers = [layer for layer in layers if layer < text["num_hidden_layers"]]
    mixed = {str(layer): [e for e in range(count) if (e + layer) % 2] for layer in layers}
    mtp = {"mtp_keep": {"0": list(range(count // 2))}} if any("mtp." in name for name in tensors) else {}
    write_json(root / kind / ".." / f"{kind}.json", {"format": "shardxform.keep", "version": 1, "keep": mixed, **mtp})
    return root / kind


def call(*args: object) -> str:
    result = CliRunner().invoke(main, [*map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def digest(out: Path) -> str:
    """Of every file of an output but its record, which names versions and whose checksum is its own."""
    total = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name != "shardxform.json":
            total.update(f"{path.relative_to(out)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def outputs(root: Path, kind: str) -> Iterator[tuple[str, str]]:
    """Name and digest of what every command makes of a kind."""
    checkpoint = source(root, kind)
    keep = root / f"{kind}.json"

    def made(name: str, *args: object) -> tuple[str, str]:
        out = root / f"{kind}-{name}"
        call(*args[:1], *args[1:2], out, *args[2:])
        return f"{kind}: {name}", digest(out)

    yield made("pruned", "prune", checkpoint, "-m", keep, "--max-shard-size", "100kB")
    yield made("without MTP", "prune", checkpoint, "--mtp", "drop")
    if kind in ("qwen3_5_moe", "qwen3_6_moe"):
        yield made("pruned text", "prune", checkpoint, "-m", keep, "--text-only")
    if kind in ONLY:
        for name, options in (("quantized", []), ("16-bit experts", QUANTIZED["16-bit experts"][3:])):
            yield made(name, "quantize", checkpoint, "-m", keep, *ROUND[1:], "--format", ONLY[kind], *options)
        return
    for name, (verb, *options) in QUANTIZED.items():
        yield made(name, verb, checkpoint, "-m", keep, *options)
    yield made("unpruned", "quantize", checkpoint, *ROUND[1:], "--max-shard-size", "200kB")
    for name in ("auto-round", "gptq", "compressed-tensors", "fused-indexed", "8 bits"):
        for target in CONVERTED:
            if target != name and (name, target) not in {("fused-indexed", "gptq"), ("8 bits", "auto-round")}:
                yield made(f"{name} to {target}", "convert", root / f"{kind}-{name}", "--to", target)


def tuned(root: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of what is tuned and healed of the small checkpoint."""
    keep = root / "keep.json"
    write_json(
        keep, {"format": "shardxform.keep", "version": 1, "keep": {str(n): [*range(n, n + 8)] for n in range(4)}}
    )
    text = ["--data", SMALL / "text" / "heldout.jsonl", "--samples", "4", "--seqlen", "48", "--batch-size", "2"]
    for name, (verb, *options) in TUNED.items():
        call(verb, SMALL, root / name, "-m", keep, *options, *text)
        yield name, digest(root / name)
    saliency, chosen = root / "saliency.safetensors", root / "chosen.json"
    call("score", SMALL, "-o", saliency, *text[:-2])
    yield "score", hashlib.sha256(shard_data(saliency)).hexdigest()[:16]
    call("select", saliency, "-o", chosen, "--keep", "8", "--criterion", "reap")
    yield "select", hashlib.sha256(json.dumps(json.loads(chosen.read_bytes())["keep"]).encode()).hexdigest()[:16]
    figures = json.loads(call("evaluate", root / "auto-round", "--against", SMALL, "--json", *text[:-2]))
    yield "evaluate", f"{figures['perplexity']:.6g}, {figures['against']['kl']:.6g}"


def shard_data(path: Path) -> bytes:
    """Tensors of a shard without its header, which names versions."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.mark.parametrize("kind", SIZES)
def test_no_byte_of_any_output_changed(kind: str, tmp_path: Path) -> None:
    wanted = {name: value for name, value in golden()["bytes"].items() if name.startswith(f"{kind}: ")}
    assert dict(outputs(tmp_path, kind)) == wanted


@pytest.mark.oracle
def test_no_byte_of_what_is_tuned_changed(tmp_path: Path) -> None:
    known = golden()["tuned"].get(arithmetic())
    if known is None:
        pytest.skip(f"tuned bytes are not known for this processor's arithmetic, {arithmetic()}")
    assert dict(tuned(tmp_path)) == known


def arithmetic() -> str:
    found = of_model("cpu")
    return f"{found['instructions']}, {found['arithmetic']}, torch {found['torch']}"


def golden() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return value


def write() -> None:
    """Write `golden.json` anew, but for what is tuned on other processors."""
    others = golden()["tuned"] if GOLDEN.exists() and "--all" not in sys.argv else {}
    with tempfile.TemporaryDirectory() as folder:
        made = {name: value for kind in SIZES for name, value in outputs(Path(folder), kind)}
        value = {"bytes": made, "tuned": {**others, arithmetic(): dict(tuned(Path(folder)))}}
    write_json(GOLDEN, value)


if __name__ == "__main__":
    os.environ |= dict.fromkeys(ONE_THREAD, "1")  # as in tests: sums of scores are those of one thread
    write()
