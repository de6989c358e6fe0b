"""`verify` of GGUF outputs: sound ones of every verb, and every kind of defect, with and without the source."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import forget_digests
from ggufs import fields_of, read_gguf, write_gguf
from strategies import by_night, picked
from test_convert import quantize
from test_gguf_outputs import ARRAY, KINDS, PRE, SMALL, TEXT, call, done, in_gguf, make, to_gguf
from test_prune import manifest_of

from shardxform.checkpoint.gguf import open_gguf
from shardxform.checkpoint.table import Checkpoint, find_gguf
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import ViewOptions
from shardxform.verification import VerifyReport, verify

Damage = Callable[[np.ndarray], None]


def damaged(out: Path, copy: Path, tensor: str, damage: Damage) -> Path:
    """A copy whose bytes of one tensor are changed, and whose record has no digests."""
    shutil.copytree(out, copy)
    forget_digests(copy)
    ref = opened(copy).table.tensors[tensor]
    (place,) = ref.ranges
    data = np.memmap(copy / place.file, np.uint8, "r+", place.offset, (place.length,))
    damage(data.reshape(ref.spec.shape[0], -1))
    data.flush()
    return copy


def opened(out: Path) -> Any:
    first = find_gguf(out)
    assert first is not None
    return open_gguf(first)


def codes(report: VerifyReport) -> set[str]:
    return {problem.code for problem in report.problems}


@pytest.mark.parametrize("kind", picked(KINDS, 4))
def test_what_every_verb_writes_is_proved(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    manifest = manifest_of(source)
    twin, options = quantize(source, tmp_path / "twin"), ViewOptions(max_shard_bytes=1 << 30, gguf=PRE)
    outs = [
        (done(in_gguf(source), tmp_path / "q"), source),
        (done(in_gguf(source, 8, -1, pruned=True), tmp_path / "q8"), source),
        (done(to_gguf(source, 60_000), tmp_path / "c"), source),
        (done(to_gguf(twin), tmp_path / "t"), twin),
        (tmp_path / "t", source),  # of which the twin's own record tells how it was made
        (done(plan_prune(Checkpoint.open(source), manifest, options), tmp_path / "p"), source),
    ]
    for out, against in outs:
        report = verify(out, source=against, independent=True)
        assert report.problems == (), out
        assert report.rederived
        assert report.values_compared == report.tensors == report.tensors_digested
        assert verify(out).problems == ()


# -- defects ----------------------------------------------------------------------------------------------------------


def flip(data: np.ndarray) -> None:
    data[2, 17] ^= 0x10


def swap(data: np.ndarray) -> None:
    data[[1, 3]] = data[[3, 1]]


def nan_scale(data: np.ndarray) -> None:
    data[2, 18:20] = 0x00, 0x7E


def hole(data: np.ndarray) -> None:
    data[1] = 0


BLOCKS: dict[str, tuple[str, Damage, str, str]] = {
    "a bit": ("blk.1.ffn_up_exps.weight", flip, "source-bytes", ""),
    "experts in another order": ("blk.0.ffn_down_exps.weight", swap, "source-bytes", ""),
    "a scale that is no number": ("blk.1.ffn_gate_exps.weight", nan_scale, "not-finite", "not-finite"),
    "a hole": ("blk.0.ffn_gate_exps.weight", hole, "source-bytes", "zero"),
    "rows of a router": ("blk.0.ffn_gate_inp.weight", swap, "source-bytes", ""),
    "a bit of what is copied": ("token_embd.weight", flip, "source-bytes", ""),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("gguf")
    source = make(root / "source")
    return source, done(in_gguf(source), root / "out")


@pytest.mark.parametrize("what", BLOCKS)
def test_bytes_that_are_wrong_are_found(what: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    tensor, damage, against, alone = BLOCKS[what]
    copy = damaged(out, tmp_path / "copy", tensor, damage)
    report = verify(copy, source=source, independent=True)
    assert {against, "independent"} <= codes(report)
    assert {problem.where for problem in report.problems} == {tensor}
    if what in ("a bit", "a hole"):
        assert f"(expert {2 if what == 'a bit' else 1})" in report.problems[0].message
    report = verify(copy)
    assert alone in {*codes(report), *(each.code for each in report.warnings), ""}
    assert report.sound == (alone != "not-finite")
    shutil.copy(out / "shardxform.json", copy)
    assert codes(verify(copy)) >= {"digest"}


def rewritten(out: Path, copy: Path, keys: dict[str, Any], drop: str = "") -> Path:
    """A copy with other keys, or without a tensor, and without a record."""
    import gguf

    copy.mkdir()
    reader = gguf.GGUFReader(out / "model.gguf")
    plain = {n: (f.types[0], f.contents()) for n, f in reader.fields.items() if f.types and f.types[0] != ARRAY}
    plain = {n: value for n, value in plain.items() if not n.startswith(("GGUF.", "general.architecture"))}
    lists = {n: f.contents() for n, f in reader.fields.items() if f.types and f.types[0] == ARRAY}
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    floats = (gguf.GGMLQuantizationType.F32,)
    tensors: dict[str, Any] = {
        name: value if kinds[name] in floats else (kinds[name], value)
        for name, value in read_gguf(out / "model.gguf").items()
        if name != drop
    }
    metadata = {**plain, **lists, **{n: (plain[n][0], value) for n, value in keys.items()}}
    write_gguf(copy / "model.gguf", metadata, tensors, arch=fields_of(out / "model.gguf")["general.architecture"])
    return copy


HEADS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a tensor of one block": ({}, "blk.1.attn_q.weight", "missing"),
    "an expert stack": ({}, "blk.0.ffn_up_exps.weight", "experts"),
    "the embeddings": ({}, "token_embd.weight", "missing"),
    "experts counted wrong": ({"qwen3moe.expert_count": 7}, "", "experts"),
    "blocks counted wrong": ({"qwen3moe.block_count": 9}, "", "missing"),
    "a width": ({"qwen3moe.embedding_length": 32}, "", "shape"),
    "a key that only the source tells": ({"qwen3moe.rope.freq_base": 1.5}, "", ""),
}


@pytest.mark.parametrize("what", HEADS)
def test_names_and_keys_that_are_wrong_are_found(what: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    keys, drop, alone = HEADS[what]
    copy = rewritten(out, tmp_path / "copy", keys, drop)
    assert codes(verify(copy)) >= ({alone} if alone else set())
    assert verify(copy).sound == (not alone)
    shutil.copy(out / "shardxform.json", copy)
    forget_digests(copy)
    found = codes(verify(copy, source=source))
    assert ("source-missing" if drop else "source-key") in found


# -- tuned ------------------------------------------------------------------------------------------------------------


def off_by_two(data: np.ndarray) -> None:
    low = data[0, 2] & 15
    data[0, 2] = (data[0, 2] & 0xF0) | ((low + 8) % 16)


@pytest.mark.oracle
@by_night
def test_what_is_tuned_is_within_bounds_and_what_is_not_is_found(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    options = ["--method", "auto-round", "--iters", "2", "--format", "gguf", "--group-size", "64"]
    call("quantize", SMALL, tmp_path / "out", *options, "--data", SMALL / "text" / "heldout.jsonl", *TEXT)
    report = verify(tmp_path / "out", source=SMALL, independent=True)
    assert report.problems == ()
    assert report.rounding is not None
    assert report.rounding.modules == 4 * (16 * 3 + 3) + 3 * 3 + 4
    assert report.values_compared == report.tensors
    copy = damaged(tmp_path / "out", tmp_path / "code", "blk.1.attn_qkv.weight", off_by_two)
    assert codes(verify(copy, source=SMALL, independent=True)) == {"source-error", "independent"}

    def scale(data: np.ndarray) -> None:
        data[0, 0] ^= 1  # of one block of two that share it

    copy = damaged(tmp_path / "out", tmp_path / "scale", "blk.1.ffn_up_exps.weight", scale)
    assert codes(verify(copy, source=SMALL)) == {"source-scale"}
