"""Verification of the names and shapes of a GGUF file by itself: nothing that its architecture needs is missing.

llama.cpp knows the tensors of an architecture in its code alone. But blocks of a model are alike: one whose tensors are
some of another's lacks the others, and what stands in many blocks has one shape in all of them. What is outside the
blocks, and how large it is, follows from the keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Final

from shardxform.base.gguf import KeyValue
from shardxform.checkpoint.gguf import GgufModel
from shardxform.runtimes.gguf.architectures import KINDS
from shardxform.runtimes.gguf.slabs import ARCHITECTURE
from shardxform.verification.findings import Findings, spans

__all__ = ["check_names", "refuse_unsound_source"]

_BLOCK: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
_EMBEDDINGS: Final = "token_embd.weight"
_NORM: Final = "output_norm.weight"
_NORMS: Final[Mapping[str, str]] = {"lfm2moe": "token_embd_norm.weight"}
"""What the last norm is called, where it is otherwise."""
_UNLIKE: Final = frozenset({"gemma4", "kimi-linear", "laguna", "mimo2"})
"""Architectures whose blocks share keys and values with others, or differ in the sizes of heads."""

Blocks = Mapping[int, Mapping[str, tuple[int, ...]]]
"""Shapes of the tensors of every block, by the rest of their names."""


def check_names(model: GgufModel, findings: Findings) -> None:
    """Report what is missing, misshapen or beyond what the keys say; of architectures not written here, warn of it."""
    metadata = model.metadata
    arch = _text(metadata.get(ARCHITECTURE))
    known = arch in {kind.name for kind in KINDS.values()} - _UNLIKE
    report = findings.problem if known else findings.warn
    blocks = _blocks(model)
    count, nextn = _count(metadata, f"{arch}.block_count"), _count(metadata, f"{arch}.nextn_predict_layers") or 0
    if known:
        for name in (_EMBEDDINGS, _NORMS.get(arch, _NORM)):
            if name not in model.table.tensors:
                report("missing", name, "missing; llama.cpp loads no file without it")
    if count is not None:
        for number in (number for number in range(min(count, 100_000)) if number not in blocks):
            report("missing", f"blk.{number}", f"no tensor of it, though {arch}.block_count is {count}")
        for number in (number for number in blocks if number >= count):
            report("layer-range", f"blk.{number}", f"beyond the {count} blocks of {arch}.block_count")
    decoder = {number: names for number, names in blocks.items() if number < (count or len(blocks)) - nextn}
    for name, numbers in _missing(decoder).items():
        report("missing", f"blk.{spans(numbers)}.{name}", "missing, though blocks of the same kind have it")
    for name, text in _misshapen(decoder):
        report("shape", name, text)
    _check_vocabulary(model, arch, findings)


def refuse_unsound_source(model: GgufModel) -> None:
    """Refuse a source whose output would not be sound, by its names and shapes: pruning keeps what is wrong with them.

    Raises:
        PlanError: says what verification would find first, and how much more.

    """
    findings = Findings()
    check_names(model, findings)
    findings.refuse(model.where)


def _blocks(model: GgufModel) -> Blocks:
    out: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, ref in model.table.tensors.items():
        if match := _BLOCK.fullmatch(name):
            out.setdefault(int(match[1]), {})[match[2]] = ref.spec.shape
    return out


def _missing(blocks: Blocks) -> dict[str, list[int]]:
    """Names that a block lacks whose own are some of another block's, and the blocks."""
    kinds: dict[frozenset[str], list[int]] = {}
    for number, names in blocks.items():
        kinds.setdefault(frozenset(names), []).append(number)
    out: dict[str, list[int]] = {}
    for kind, numbers in kinds.items():
        larger = [other for other in kinds if kind < other]
        whole = min(larger, key=len, default=kind)
        for name in sorted(whole - kind):
            out.setdefault(name, []).extend(numbers)
    return {name: sorted(numbers) for name, numbers in out.items()}


def _misshapen(blocks: Blocks) -> Iterator[tuple[str, str]]:
    """Tensors of another shape than most of their name."""
    shapes: dict[str, Counter[tuple[int, ...]]] = {}
    for names in blocks.values():
        for name, shape in names.items():
            shapes.setdefault(name, Counter())[shape] += 1
    for number, names in blocks.items():
        for name, shape in names.items():
            usual, often = shapes[name].most_common(1)[0]
            if shape != usual and often > 1:
                yield f"blk.{number}.{name}", f"shape {list(shape)}, but {list(usual)} in {often} other blocks"


def _check_vocabulary(model: GgufModel, arch: str, findings: Findings) -> None:
    """Embeddings and head have a row for each token, and a column for each element of a hidden state."""
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    width = _count(model.metadata, f"{arch}.embedding_length")
    for name in ("token_embd.weight", "output.weight"):
        ref = model.table.tensors.get(name)
        if ref is None or len(ref.spec.shape) != 2:
            continue
        rows, columns = ref.spec.shape
        if tokens is not None and tokens.count != rows:
            findings.problem("shape", name, f"{rows} rows, but the tokenizer has {tokens.count} tokens")
        if width is not None and width != columns:
            findings.problem("shape", name, f"{columns} columns, but {arch}.embedding_length is {width}")


def _text(found: KeyValue | None) -> str:
    value = found.value if found is not None and found.kind == "STRING" else ""
    return value if isinstance(value, str) else ""


def _count(metadata: Mapping[str, KeyValue], key: str) -> int | None:
    found = metadata.get(key)
    value = found.value if found is not None and found.kind.startswith("UINT") else None
    return value if isinstance(value, int) else None
