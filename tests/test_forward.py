"""The block runner against transformers' loaded models: same logits, both layer kinds, padding, several sequences."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import KINDS, tiny, write_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.errors import CheckpointError, ExecutionError, FamilyError, OutputError, ResumeError  # noqa: E402
from shardxform.execution.runner import run  # noqa: E402
from shardxform.formats.scheme import Scheme  # noqa: E402
from shardxform.forward.passes import BATCH_TOKENS, batches  # noqa: E402
from shardxform.forward.skeleton import Skeleton  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.forward.work import WorkDir  # noqa: E402
from shardxform.plan.quantize import plan_quantize  # noqa: E402
from shardxform.plan.view import pruned_view  # noqa: E402

pytestmark = pytest.mark.oracle

FLOAT32 = Precision(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded(path: Path, dtype: Any = None) -> Any:
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32).eval()


def tokens(vocab: int, count: int, length: int) -> Any:
    """Random ids."""
    return torch.randint(1, vocab, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def streamed_logits(checkpoint: Checkpoint, ids: Any, precision: Precision = FLOAT32) -> Any:
    with Weights(checkpoint, precision) as weights:
        skeleton = Skeleton(weights)
        hidden = skeleton.embed(ids)
        for layer in range(skeleton.num_blocks):
            with skeleton.block(layer) as block:
                hidden = block(hidden)
        with skeleton.head() as head:
            return head.logits(hidden.flatten(0, 1)).view(*ids.shape, -1)


@torch.no_grad()
def loaded_logits(path: Path, ids: Any) -> Any:
    return loaded(path)(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "length"), [(1, 7), (3, 40)], ids=["one", "three"])
def test_logits_are_those_of_the_loaded_model(
    tiny_checkpoints: dict[str, Path], kind: str, count: int, length: int
) -> None:
    path = tiny_checkpoints[kind]
    config = json.loads((path / "config.json").read_text())
    ids = tokens(config.get("text_config", config)["vocab_size"], count, length)
    found, wanted = streamed_logits(Checkpoint.open(path), ids), loaded_logits(path, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_logits_of_the_trained_model_both_kinds_of_layer(small_moe: Path) -> None:
    ids = tokens(2048, 3, 128)
    found, wanted = streamed_logits(Checkpoint.open(small_moe), ids), loaded_logits(small_moe, ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found.argmax(-1) == wanted.argmax(-1)).all()


def test_a_pruned_view_is_the_pruned_model_though_nobody_wrote_it(small_moe: Path, tmp_path: Path) -> None:
    from shardxform.plan.prune import plan_prune

    source = Checkpoint.open(small_moe)
    manifest = Manifest(keep=dict.fromkeys(range(4), (0, 2, 3, 5, 8, 11, 13, 15)))
    run(plan_prune(source, manifest), tmp_path / "pruned")
    ids = tokens(2048, 2, 50)
    found = streamed_logits(pruned_view(source, manifest).checkpoint, ids)
    wanted = loaded_logits(tmp_path / "pruned", ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def gptq_values(tensors: dict[str, Any], stem: str) -> Any:
    """Float32 values of a GPTQ-packed weight, nibble by nibble."""
    words, scales = tensors[f"{stem}.qweight"], tensors[f"{stem}.scales"].float()
    codes = torch.stack([(words >> (4 * k)) & 15 for k in range(8)], dim=1).reshape(-1, words.shape[1])
    return ((codes - 8) * scales.repeat_interleave(codes.shape[0] // scales.shape[0], dim=0)).T


def fuse_experts(tensors: dict[str, Any], layers: int, experts: int) -> None:
    """Replace per-expert weights by the fused ones, in place."""
    for layer in range(layers):
        stem = f"model.layers.{layer}.mlp.experts"
        parts = {
            kind: [tensors.pop(f"{stem}.{expert}.{kind}_proj.weight") for expert in range(experts)]
            for kind in ("gate", "up", "down")
        }
        both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"], strict=True)]
        tensors[f"{stem}.gate_up_proj"], tensors[f"{stem}.down_proj"] = torch.stack(both), torch.stack(parts["down"])


@pytest.mark.parametrize("format", ["auto-round", "compressed-tensors"])
def test_a_quantized_checkpoint_runs_as_its_values(small_moe: Path, tmp_path: Path, format: str) -> None:  # noqa: A002
    """Dequantized by hand into a plain checkpoint, loaded by transformers."""
    from safetensors.torch import load_file, save_file

    plans = {
        name: plan_quantize(Checkpoint.open(small_moe), Scheme.preset("W4A16", format=name))
        for name in ("auto-round", format)
    }
    for name, plan in plans.items():
        run(plan, tmp_path / name)
    tensors = load_file(tmp_path / "auto-round" / "model.safetensors")
    plain = {name: value for name, value in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for name in tensors:
        if name.endswith(".qweight"):
            plain[name.replace("qweight", "weight")] = gptq_values(tensors, name.removesuffix(".qweight")).contiguous()
    fuse_experts(
        plain, layers=4, experts=16
    )  # as the release has them: auto-round, once imported, patches the other way
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    (tmp_path / "plain" / "config.json").write_text((small_moe / "config.json").read_text())
    ids = tokens(2048, 1, 40)
    found = streamed_logits(Checkpoint.open(tmp_path / format), ids)
    torch.testing.assert_close(found, loaded_logits(tmp_path / "plain", ids), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_computed_as_the_model_loaded_in_bfloat16(small_moe: Path) -> None:
    ids = tokens(2048, 1, 64)
    bfloat16 = Precision(torch.device("cpu"), torch.bfloat16)
    found = streamed_logits(Checkpoint.open(small_moe), ids, bfloat16).float().log_softmax(-1)
    with torch.no_grad():
        wanted = loaded(small_moe, torch.bfloat16)(input_ids=ids).logits.float().log_softmax(-1)
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 2e-3  # another order of sums, rounded to 8 bits


def test_experts_that_no_token_reaches_are_not_read(small_moe: Path) -> None:
    with Weights(Checkpoint.open(small_moe), FLOAT32) as weights, torch.no_grad():
        skeleton = Skeleton(weights)
        hidden = skeleton.embed(torch.tensor([[5, 9]]))
        with skeleton.block(0) as block:
            block(hidden)
            assert 4 <= len(block.bank.loaded) <= 8  # two tokens, four experts each


def test_nothing_of_a_block_stays_when_it_is_done(small_moe: Path) -> None:
    with Weights(Checkpoint.open(small_moe), FLOAT32) as weights, torch.no_grad():
        skeleton = Skeleton(weights)
        with skeleton.block(1) as block:
            module = block.module
            assert any(p.device.type == "cpu" for p in module.parameters())
        assert all(p.device.type == "meta" for p in module.parameters())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    path = write_checkpoint(tmp_path / "x", tensors, config)
    with Weights(Checkpoint.open(path), FLOAT32) as weights:
        skeleton = Skeleton(weights)
        missing = r"'model\.layers\.1\.self_attn\.k_proj\.weight' is missing"
        with pytest.raises(CheckpointError, match=missing), skeleton.block(1):
            pass


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = ("BF16", (4, 4), bytes(32))
    path = write_checkpoint(tmp_path / "x", tensors, config)
    with Weights(Checkpoint.open(path), FLOAT32) as weights:
        skeleton = Skeleton(weights)
        with (
            pytest.raises(
                CheckpointError, match=r"q_proj\.weight': shape \[4, 4\], but the model of config.json wants"
            ),
            skeleton.block(0),
        ):
            pass


def test_a_config_that_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    config["hidden_act"] = "no such function"
    path = write_checkpoint(tmp_path / "x", tensors, config)
    with Weights(Checkpoint.open(path), FLOAT32) as weights, pytest.raises(FamilyError, match="Qwen3MoeForCausalLM"):
        Skeleton(weights)


def test_eight_bit_floats_are_refused(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    name = "model.layers.0.self_attn.q_proj.weight"
    shape = tensors[name].shape if hasattr(tensors[name], "shape") else tensors[name][1]
    tensors[name] = ("F8_E4M3", tuple(shape), bytes(int(np.prod(shape))))
    path = write_checkpoint(tmp_path / "x", tensors, config)
    with Weights(Checkpoint.open(path), FLOAT32) as weights:
        skeleton = Skeleton(weights)
        with pytest.raises(CheckpointError, match="F8_E4M3"), skeleton.block(0):
            pass


# -- windows and work -------------------------------------------------------------------------------------------------


def windows_of(count: int, length: int) -> Windows:
    return Windows(ids_NT=np.ones((count, length), np.int32), fingerprint="f", provenance={}, notes=())


def test_batches_hold_whole_sequences_and_at_least_one() -> None:
    found = list(batches(windows_of(3, BATCH_TOKENS)))
    assert [(b.start, b.stop) for b in found] == [(0, 1), (1, 2), (2, 3)]
    (only,) = batches(windows_of(3, 4))
    assert only.ids_BT.tolist() == [[1] * 4] * 3


def test_hidden_states_come_back_as_they_were_put(tmp_path: Path) -> None:
    with WorkDir(tmp_path / "w", {}) as work:
        file = work.hidden("chain", 0, (5, 3, 2), torch.bfloat16)
        values = torch.randn(5, 3, 2).bfloat16()
        with file.writing() as out:
            out.put(3, values[3:])
            out.put(0, values[:3])
        with file.reading() as back:
            assert torch.equal(back.rows(1, 4), values[1:4])
        file.path.write_bytes(b"short")
        with pytest.raises(ExecutionError, match="damaged"), file.reading():
            pass


def make_foreign_file(root: Path) -> None:
    root.mkdir()
    (root / "thesis.tex").write_text("years of work")


def make_link(root: Path) -> None:
    (root.parent / "elsewhere").mkdir()
    root.symlink_to(root.parent / "elsewhere")


def make_file(root: Path) -> None:
    root.write_text("x")


@pytest.mark.parametrize("make", [make_foreign_file, make_link, make_file])
def test_a_foreign_work_directory_is_refused_and_left(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "w")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(OutputError), WorkDir(tmp_path / "w", {}):
        pass
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_work_of_other_inputs_is_refused(tmp_path: Path) -> None:
    inputs = {"seed": 1, "made_by": {"torch": "2.1"}}
    with WorkDir(tmp_path / "w", inputs) as work:
        work.record("block 0", {"count": [1, 2]})
    with WorkDir(tmp_path / "w", inputs) as work:
        assert work.steps == {"block 0": {"count": [1, 2]}}
    other = {"seed": 1, "made_by": {"torch": "2.2"}}
    with (
        pytest.raises(ResumeError, match=r"`made_by.torch`: was '2.1', now '2.2'; remove"),
        WorkDir(tmp_path / "w", other),
    ):
        pass
    (tmp_path / "w" / "progress.json").write_text("{")
    with pytest.raises(ResumeError, match="damaged"), WorkDir(tmp_path / "w", inputs):
        pass


def test_two_processes_do_not_work_in_one_directory(tmp_path: Path) -> None:
    with WorkDir(tmp_path / "w", {}), pytest.raises(OutputError, match="another process"):
        WorkDir(tmp_path / "w", {}).__enter__()


def test_what_an_older_transformers_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = tiny("qwen3_moe")
    path = write_checkpoint(tmp_path / "x", tensors, config)
    monkeypatch.delitem(transformers.CONFIG_MAPPING._mapping, "qwen3_moe")
    message = (
        f"transformers {transformers.__version__} has no class for model_type 'qwen3_moe', which a newer one may have"
    )
    with Weights(Checkpoint.open(path), FLOAT32) as weights, pytest.raises(FamilyError, match=message):
        Skeleton(weights)
