"""Scores against hooks on the loaded transformers model; resuming; the multi-token-prediction layer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import tiny, write_checkpoint
from click.testing import CliRunner
from faults import kill_when_there, killed_after
from strategies import picked
from test_identity import flip
from texts import few

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from shardxform.base.progress import Progress  # noqa: E402
from shardxform.calibration import DataOptions, Windows, load_windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.cli import main  # noqa: E402
from shardxform.errors import FamilyError, Interrupted, ResumeError  # noqa: E402
from shardxform.experts import ExpertStats, Saliency  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.experts.weighing import weigh  # noqa: E402
from shardxform.forward import passes  # noqa: E402
from shardxform.forward.weights import Precision  # noqa: E402
from shardxform.forward.work import HiddenWriter  # noqa: E402

pytestmark = pytest.mark.oracle

FLOAT32 = Precision(torch.device("cpu"), torch.float32)
NAMES = ("count_E", "reap_E", "ean_E", "gate_E", "peak_E", "square_E", "energy_E")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded(path: Path) -> Any:
    transformers.utils.logging.set_verbosity_error()
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def windows_of(ids: Any) -> Windows:
    return Windows(
        ids_NT=ids.numpy().astype(np.int32),
        fingerprint=str(hash(ids.numpy().tobytes())),
        provenance={"data": "random"},
        notes=(),
    )


class Hooked:
    """Statistics in float64 from a hook before every experts module, one expert after the other over all tokens."""

    def __init__(self, model: Any) -> None:
        self.stats: list[dict[str, Any]] = []
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts.register_forward_pre_hook(self.look)

    def look(self, module: Any, args: Any) -> None:
        hidden, index, weights = args
        experts = module.gate_up_proj.shape[0]
        found = {name: np.zeros(experts) for name in NAMES}
        for expert in range(experts):
            chosen = index == expert
            rows = chosen.any(-1)
            if not rows.any():
                continue
            gate, up = (hidden[rows] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            out = (inner @ module.down_proj[expert].T).double()
            g = weights[chosen].double()
            norm = out.pow(2).sum(-1).sqrt()
            squares = out.pow(2).sum(), inner.double().pow(2).sum()
            values = (rows.sum(), (g * norm).sum(), norm.sum(), g.sum(), out.abs().max(), *squares)
            for name, value in zip(NAMES, values, strict=True):
                found[name][expert] = float(value)
        self.stats.append(found)


def assert_same(found: ExpertStats, wanted: dict[str, Any], rtol: float = 1e-5) -> None:
    for name in NAMES:
        np.testing.assert_allclose(getattr(found, name), wanted[name], rtol=rtol, err_msg=name)


def test_what_weights_tell_equals_numpy_over_the_loaded_model(small_moe: Path) -> None:
    found = weigh(Checkpoint.open(small_moe))
    model = loaded(small_moe)
    assert (found.known, found.tokens, sorted(found.layers)) == (("spread",), 0, [0, 1, 2, 3])
    for layer, stats in found.layers.items():
        experts = model.model.layers[layer].mlp.experts
        for expert in range(16):
            each = [stack[expert].detach().numpy().ravel() for stack in (experts.gate_up_proj, experts.down_proj)]
            w = np.concatenate(each).astype(np.float64)
            wanted = np.sqrt((w**2).mean()) / np.abs(w).mean()
            np.testing.assert_allclose(stats.of("spread")[expert], wanted, rtol=1e-6)


def test_scores_equal_hooks_on_the_loaded_model(small_moe: Path, tmp_path: Path) -> None:
    """The bar: 1e-5 relative in float32; real text, every expert reached."""
    windows = load_windows(small_moe, DataOptions(data=str(few("calib.jsonl", 5)), samples=12, seqlen=256))
    model = loaded(small_moe)
    hooked = Hooked(model)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(windows.ids_NT).long())
    found = score(Checkpoint.open(small_moe), windows, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    assert found.tokens == 12 * 256
    assert sorted(found.layers) == [0, 1, 2, 3]
    for layer, stats in found.layers.items():
        assert stats.count_E.sum() == 12 * 256 * 4
        assert_same(stats, hooked.stats[layer])


@pytest.mark.parametrize("kind", ["qwen3_5_moe_text", "qwen3_moe", "qwen3_moe_mixed", "deepseek_v3"])
def test_scores_of_every_family_equal_hooks(tiny_checkpoints: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path = tiny_checkpoints[kind]
    vocab = json.loads((path / "config.json").read_text())["vocab_size"]
    ids = torch.randint(1, vocab, (3, 20), generator=torch.Generator().manual_seed(2))
    model = loaded(path)
    hooked = Hooked(model)
    with torch.no_grad():
        model(input_ids=ids)
    found = score(Checkpoint.open(path), windows_of(ids), ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    assert found.tokens == 60
    for stats, wanted in zip(found.layers.values(), hooked.stats, strict=True):
        assert_same(stats, wanted, rtol=1e-4)


def test_the_mtp_layer_is_scored_on_its_own_inputs(tiny_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """By hand, with transformers' modules: norms, projection, block; next token's embedding, normed hidden state."""
    from safetensors.torch import load_file
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

    path = tiny_checkpoints["qwen3_6_moe"]  # fused MTP experts
    tensors: dict[str, Any] = {}
    for shard in path.glob("*.safetensors"):
        tensors |= {name: value.float() for name, value in load_file(shard).items()}
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    text = model.model.language_model
    config = text.config
    ids = torch.randint(1, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(3))
    like = config.layer_types.index("full_attention")
    config._experts_implementation = "eager"
    block = modeling.Qwen3_5MoeDecoderLayer(config, like).eval()
    prefix = "mtp.layers.0."
    block.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def norm(name: str, values: Any) -> Any:
        scaled = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
        return scaled * (1 + tensors[f"mtp.{name}.weight"])

    with torch.no_grad():
        hidden = text(input_ids=ids).last_hidden_state  # after the final norm
        both = torch.cat(
            (norm("pre_fc_norm_embedding", text.embed_tokens(ids[:, 1:])), norm("pre_fc_norm_hidden", hidden[:, :-1])),
            dim=-1,
        )
        entering = both @ tensors["mtp.fc.weight"].T
        wrapper = type("M", (), {"model": type("D", (), {"layers": [block]})})
        hooked = Hooked(wrapper)
        positions = torch.arange(15).expand(3, 2, 15)
        block(entering, position_embeddings=text.rotary_emb(entering, positions), attention_mask=None)
    found = score(Checkpoint.open(path), windows_of(ids), ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    assert list(found.mtp_layers) == [0]
    assert_same(found.mtp_layers[0], hooked.stats[0], rtol=1e-4)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    config["mlp_only_layers"] = list(range(config["num_hidden_layers"]))
    inter, hidden = config["intermediate_size"], config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}.mlp"
        tensors = {name: value for name, value in tensors.items() if not name.startswith(stem)}
        for name, shape in (("gate", (inter, hidden)), ("up", (inter, hidden)), ("down", (hidden, inter))):
            tensors[f"{stem}.{name}_proj.weight"] = np.zeros(shape, np.float32)
    path = write_checkpoint(tmp_path / "dense", tensors, config)
    windows = windows_of(torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(FamilyError, match="no layer has experts"):
        score(Checkpoint.open(path), windows, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))


# -- resuming ---------------------------------------------------------------------------------------------------------


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(small_moe: Path, tmp_path: Path) -> None:
    windows = load_windows(small_moe, DataOptions(data=str(few("calib.jsonl", 5)), samples=16, seqlen=64))
    source = Checkpoint.open(small_moe)
    whole = score(source, windows, ScoreOptions(precision=FLOAT32, work=tmp_path / "whole")).to_bytes()
    for stop_at in picked((2, 1, 3), 3):
        seen: list[Progress] = []

        def stop(p: Progress, seen: list[Progress] = seen, stop_at: int = stop_at) -> None:
            seen.append(p)
            if len(seen) == stop_at:
                raise KeyboardInterrupt

        options = ScoreOptions(precision=FLOAT32, work=tmp_path / f"{stop_at}", on_progress=stop)
        with pytest.raises(Interrupted, match="run the same command again") as caught:
            score(source, windows, options)
        assert caught.value.exit_code == 130
        options.on_progress = seen.append
        assert score(source, windows, options).to_bytes() == whole
        assert seen[-1].done == seen[-1].total == 4 * 16 * 64


def arguments(small_moe: Path, out: Path) -> list[str]:
    data = ["--data", str(few("calib.jsonl", 5)), "--samples", "6", "--seqlen", "64"]
    return ["score", str(small_moe), "-o", str(out), "--quiet", *data]


@pytest.mark.crash
def test_killed_in_several_blocks_the_command_ends_with_the_same_file(
    small_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within blocks, of three batches each, and between them, and before that, in a child of this process."""
    monkeypatch.setattr(passes, "BATCH_TOKENS", 128)
    main(arguments(small_moe, tmp_path / "whole"), standalone_mode=False)
    out = tmp_path / "killed"
    begun = tmp_path / "killed.work" / "scored-0000.hidden"
    assert kill_when_there(lambda: main(arguments(small_moe, out)), begun)
    for number in (1, 3, 4):  # batches that have left a block since
        assert killed_after(HiddenWriter, "put", number, lambda: main(arguments(small_moe, out)))
        assert not out.exists()
    main(arguments(small_moe, out), standalone_mode=False)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_the_command_refuses_to_replace_another_run_and_knows_its_own(small_moe: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    data = ["--data", str(few("calib.jsonl", 5)), "--samples", "2", "--seqlen"]
    runner = CliRunner()
    base = ["score", str(small_moe), "-o", str(out), "-q"]
    first = runner.invoke(main, [*base, *data, "64", "--dry-run"])
    assert first.exit_code == 0, first.output
    assert not list(tmp_path.iterdir())
    first = runner.invoke(main, [*base, *data, "64"])
    assert first.exit_code == 0, first.output
    written = out.read_bytes()
    again = runner.invoke(main, [*base, *data, "64"])
    assert again.exit_code == 0
    assert "already complete" in again.output
    other = runner.invoke(main, [*base, *data, "65"])
    assert other.exit_code == 1
    assert "another run" in other.output
    assert out.read_bytes() == written
    assert Saliency.load(out).tokens == 128
    shutil.rmtree(tmp_path / "s.safetensors.work", ignore_errors=True)


def test_a_source_changed_meanwhile_is_not_resumed(small_moe: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_moe, copy)
    windows = load_windows(copy, DataOptions(data=str(few("calib.jsonl", 5)), samples=2, seqlen=64))
    options = ScoreOptions(precision=FLOAT32, work=tmp_path / "w")
    score(Checkpoint.open(copy), windows, options)
    for shard in copy.glob("*.safetensors"):
        os.utime(shard)
    again = score(Checkpoint.open(copy), windows, options)  # touched, it is the same source
    flip(copy, "model.layers.1.mlp.gate.weight")
    with pytest.raises(ResumeError, match=r"`sources.scored.source.values`: other values in .*; remove it, or name"):
        score(Checkpoint.open(copy), windows, options)
    assert again.tokens == 128
