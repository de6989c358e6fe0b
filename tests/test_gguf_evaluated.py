"""A GGUF output as the checkpoint that it stands for: values, figures, and the whole way of `compress`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, read_checkpoint
from click.testing import CliRunner
from gguf_families import OVER, checkpoint
from strategies import by_night, picked
from test_convert import quantize, values_of
from test_gguf_outputs import KINDS, SMALL, TEXT, call, done, in_gguf, make, to_gguf
from test_prune import manifest_of
from test_verify_gguf import opened

from shardxform.base.file_system import FileSystem
from shardxform.checkpoint.remote.repository import open_source
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import CheckpointError
from shardxform.execution.transcoding import reading
from shardxform.formats.encoding import Encoded, Opener
from shardxform.plan.gguf_origin import stands_for
from shardxform.verification import verify

DATA = ("--data", SMALL / "text" / "heldout.jsonl", "--samples", "2", "--seqlen", "32")


def read_back(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """float32 values of all tensors."""
    opener, out = Opener(reading(open_source(checkpoint.root, None, FileSystem()))), dict[str, np.ndarray]()
    for name, ref in checkpoint.tensors.items():
        assert isinstance(ref, Encoded)
        rows = [source.open(opener) for source in ref.sources]
        out[name] = np.concatenate([each.values(0, each.count) for each in rows]).reshape(ref.spec.shape)
    return out


def values(twin: dict[str, Raw], name: str, fused: dict[str, Raw]) -> np.ndarray:
    """What a checkpoint has for a tensor: integers with scales, one of a stack's experts, or floats."""
    stem = name.removesuffix(".weight")
    if f"{stem}.qweight" in twin:
        return values_of(twin, stem, 4, 32)
    return twin[name].float32() if name in twin else released(fused, name, turned=False)


@pytest.mark.parametrize("kind", picked(KINDS, 2))
def test_it_stands_for_the_values_of_its_twin(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", kind)
    twin = read_checkpoint(quantize(source, tmp_path / "twin"))
    found = read_back(stands_for(opened(done(in_gguf(source), tmp_path / "out")), Checkpoint.open(source)))
    assert found
    for name, value in found.items():
        if "experts" in name and not name.startswith("mtp."):
            assert f"{name.removesuffix('.weight')}.qweight" in twin
        wanted = values(twin, name, read_checkpoint(source))
        exact = not name.endswith(("norm.weight", "A_log"))  # 1 + x and -exp(x) were rounded to float32
        np.testing.assert_allclose(value, wanted, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6, err_msg=name)


def released(held: dict[str, Raw], name: str, *, turned: bool) -> np.ndarray:
    """What a release has for a tensor; of an expert where experts are stacks, of which gate and up are halves."""
    if name in held:
        return held[name].float32()
    found = re.fullmatch(r"(.*experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)", name)
    assert found, name
    stack = f"{found[1]}.{'down' if found[3] == 'down' else 'gate_up'}_proj"
    if stack not in held:  # as Granite's
        named = "output_linear" if found[3] == "down" else "input_linear"
        return released({stack: held[f"{found[1].removesuffix('.experts')}.{named}.weight"]}, name, turned=turned)
    value = held[stack if found[4] == "weight" else f"{stack}_bias"].float32()[int(found[2])]
    value = value.T if turned and found[4] == "weight" else value
    half = len(value) // 2
    return {"gate": value[:half], "up": value[half:], "down": value}[found[3]]


TURNED = ("gpt_oss", "llama4_text", "qwen3_vl_moe")  # whose stacks are transposed
APART = ("gpt_oss", "qwen3_next")  # rows of one matrix stand in several tensors


@pytest.mark.parametrize("family", [*APART, *picked([each for each in sorted(OVER) if each not in APART], 6)])
def test_it_stands_for_the_values_of_every_family(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = checkpoint(family, tmp_path)
    model = opened(done(to_gguf(source), tmp_path / "out"))
    assert verify(tmp_path / "out", source=source, independent=True).problems == ()
    held, found = read_checkpoint(source), read_back(stands_for(model, Checkpoint.open(source)))
    for name, value in found.items():
        wanted = released(held, name, turned=family in TURNED)
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6, err_msg=name)
    assert len(found) >= 40


def test_what_was_converted_stands_for_both_of_its_sources(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    twin = quantize(source, tmp_path / "twin")
    model = opened(done(to_gguf(twin), tmp_path / "out"))
    one, two = (read_back(stands_for(model, Checkpoint.open(each))) for each in (source, twin))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name])


def test_another_source_is_refused(tmp_path: Path) -> None:
    source, other = make(tmp_path / "source"), make(tmp_path / "other", num_experts=4)
    out = done(in_gguf(source), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"not made of .*other"):
        stands_for(opened(out), Checkpoint.open(other))
    (out / "shardxform.json").unlink()  # then it is taken for any file of that model
    assert read_back(stands_for(opened(out), Checkpoint.open(source)))
    with pytest.raises(CheckpointError, match=r"expected \[4, .*another model, or pruned otherwise"):
        stands_for(opened(out), Checkpoint.open(other))
    pruned = done(in_gguf(source, pruned=True), tmp_path / "pruned")
    assert read_back(stands_for(opened(pruned), Checkpoint.open(source)))
    (pruned / "shardxform.json").unlink()
    assert read_back(stands_for(opened(pruned), Checkpoint.open(source), manifest_of(source)))


def test_the_command_wants_a_source(tmp_path: Path) -> None:
    out = done(in_gguf(make(tmp_path / "source")), tmp_path / "out")
    result = CliRunner().invoke(main, ["evaluate", str(out), "--work", f"{out}.work", *map(str, DATA)])
    assert result.exit_code == 2
    assert "give --against, what it was made of" in " ".join(result.output.split())


def test_the_card_says_how_to_run_it(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    card = call("card", done(in_gguf(source, pruned=True), tmp_path / "out"))
    for line in ("llama-server -m model.gguf", "FROM ./", "blocks of Q4_0", "--format gguf --pre-tokenizer qwen2"):
        assert line in card
    assert "transformers" not in card
    done(to_gguf(source, 60_000), tmp_path / "split")
    assert "llama-gguf-split --merge model-00001-of-" in call("card", tmp_path / "split")


@pytest.mark.oracle
@by_night
def test_figures_are_those_of_the_twin(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    call("quantize", SMALL, tmp_path / "twin", "--group-size", "32", "-q")
    call("quantize", SMALL, tmp_path / "out", "--format", "gguf", "-q")
    figures = []
    for name in ("twin", "out"):
        work = ("--work", tmp_path / "work", "--json", "-q")
        figures.append(json.loads(call("evaluate", tmp_path / name, "--against", SMALL, *DATA, *work)))
    one, two = figures
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
    assert two["against"]["kl"] == pytest.approx(one["against"]["kl"], rel=1e-4)
    assert two["identity"]["shards"].keys() == {"model.gguf"}


@pytest.mark.oracle
@by_night
def test_compress_goes_all_the_way(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    data: tuple[Any, ...] = ("--data", SMALL / "text" / "heldout.jsonl", *TEXT, "--keep", "8", "--iters", "2")
    told = ("--eval-data", SMALL / "text" / "heldout.jsonl", "--eval-samples", "2", "--eval-seqlen", "32")
    text = call("compress", SMALL, tmp_path / "out", "--format", "gguf", *data, *told, "--full-verify")
    assert "sound: 76 tensors" in text
    assert (tmp_path / "out" / "model.gguf").is_file()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-server -m model.gguf" in card
    assert "Q4_0" in card
    shutil.rmtree(tmp_path / "out.compress")


@pytest.mark.oracle
@by_night
@pytest.mark.parametrize("format_", ["gguf", "mlx"])
def test_compress_measures_rows_that_take_turns(format_: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = checkpoint("gpt_oss", tmp_path)
    (data := tmp_path / "data.jsonl").write_text((json.dumps({"text": "0123456789" * 40}) + "\n") * 4)
    few = ("--samples", "2", "--seqlen", "32", "--eval-samples", "2", "--eval-seqlen", "32", "--iters", "2")
    how = ("--keep", "4", "--heal=all", "--heal-iters", "2", "--group-size", "32", "--format", format_, *few)
    named = ("--pre-tokenizer", "gpt-2") if format_ == "gguf" else ()
    text = call("compress", source, tmp_path / "out", *how, *named, "--data", data, "--eval-data", data)
    assert "sound: " in text
    figures = json.loads((tmp_path / "out.compress" / "evaluation.json").read_text())
    assert 0 < figures["against"]["kl"] < 1
