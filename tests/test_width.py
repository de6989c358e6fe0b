"""Experts with fewer channels: chosen by what they gave, cut alike in every layout, loaded by every client."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import read_checkpoint, tiny, write_checkpoint, write_json
from click.testing import CliRunner
from texts import few

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.errors import ManifestError, PlanError
from shardxform.experts.choosing import channels_kept, decide, with_width
from shardxform.experts.statistics import ExpertStats, Saliency
from shardxform.formats.picking import bitmap_of, picked_ids
from shardxform.plan.prune import plan_prune
from shardxform.publish.card.facts import Change
from shardxform.publish.card.gathering import gather

CHANNELS = 32


def call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def text(ids: list[int], of: int) -> str:
    return base64.b64encode(bitmap_of(ids, of)).decode()


def manifest(config: dict[str, Any], experts: list[int], of: int, mtp: bool = False) -> dict[str, Any]:
    """Keep these experts, each with other channels."""
    rng = np.random.default_rng(0)
    body = config.get("text_config", config)
    layers = [str(layer) for layer in range(body.get("first_k_dense_replace", 0), body["num_hidden_layers"])]
    bitmaps = {layer: [text(sorted(rng.choice(of, CHANNELS, False).tolist()), of) for _ in experts] for layer in layers}
    width: dict[str, Any] = {"channels": CHANNELS, "of": of, "kept": bitmaps}
    out: dict[str, Any] = {"format": "shardxform.keep", "version": 1, "keep": dict.fromkeys(layers, experts)}
    if mtp:
        out["mtp_keep"] = {"0": experts}
        width["mtp_kept"] = {"0": bitmaps[layers[0]]}
    return {**out, "width": width}


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe"])
def test_rows_and_columns_are_those_of_the_channels(kind: str, tmp_path: Path) -> None:
    """Single experts, stacks, and MTP layers; numpy takes them out of the source's arrays."""
    config, tensors = tiny(kind, moe_intermediate_size=64)
    source = write_checkpoint(tmp_path / "source", tensors, config)
    mtp, experts = kind == "qwen3_5_moe", [1, 2, 4, 5]
    value = manifest(config, experts, 64, mtp)
    write_json(tmp_path / "keep.json", value)
    call("prune", source, tmp_path / "out", "-m", tmp_path / "keep.json", "-q")
    found = read_checkpoint(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert written.get("text_config", written)["moe_intermediate_size"] == CHANNELS
    seen = 0
    for name, raw in found.items():
        if ".mlp.experts." not in name:
            continue
        seen += 1
        scope = "mtp_kept" if name.startswith("mtp.") else "kept"
        parts = name.split(".")
        bitmaps = value["width"][scope][parts[parts.index("layers") + 1]]
        kept = [picked_ids(base64.b64decode(each)) for each in bitmaps]
        numbered = parts[parts.index("experts") + 1]
        if numbered.isdecimal():
            parts[parts.index("experts") + 1] = str(experts[int(numbered)])
            whole, channels = tensors[".".join(parts)].array(), list(kept[int(numbered)])
            wanted = whole[:, channels] if "down_proj" in name else whole[channels]
        else:
            whole = tensors[name].array()[experts]
            both = [list(each) for each in kept]
            if "gate_up" in name:
                wanted = np.stack([each[[*ids, *(64 + i for i in ids)]] for each, ids in zip(whole, both, strict=True)])
            else:
                wanted = np.stack([each[:, ids] for each, ids in zip(whole, both, strict=True)])
        np.testing.assert_array_equal(raw.array(), wanted, err_msg=name)
    assert seen
    assert "sound" in call("verify", tmp_path / "out", "--source", source)
    _flip(tmp_path / "out", next(name for name in found if "down_proj" in name and ".experts." in name))
    call("verify", tmp_path / "out", "--source", source, code=1)


@pytest.mark.parametrize("experts", [[1, 2, 4, 5], None])
def test_the_card_has_the_width_and_the_parameters_of_the_source(experts: list[int] | None, tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe", moe_intermediate_size=64)
    source = write_checkpoint(tmp_path / "source", tensors, config)
    every = list(range(config["num_experts"]))
    write_json(tmp_path / "keep.json", manifest(config, experts or every, 64))
    call("prune", source, tmp_path / "out", "-m", tmp_path / "keep.json", "-q")
    facts, card = gather(tmp_path / "out"), call("card", tmp_path / "out")
    counts = [sum(int(np.prod(t.shape)) for t in read_checkpoint(root).values()) for root in (source, tmp_path / "out")]
    assert facts.parameters == Change(*counts)
    assert "| channels of each of them | 64 | 32 |" in card
    kept = f"4 of {len(every)} routed experts kept in every MoE layer, 32 of 64 channels kept in each of them"
    again = [{"SRC": source, "out": tmp_path / "out"}.get(word, word) for word in facts.commands[0][1:]]
    again[again.index("shardxform.json")] = tmp_path / "out" / "shardxform.json"
    assert "already complete, made from the same inputs" in call(*again)
    assert (kept if experts else "checkpoint with 32 of 64 channels kept in every routed expert.") in card


def test_a_manifest_is_shown_and_checked_with_its_width(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe", moe_intermediate_size=64)
    source = write_checkpoint(tmp_path / "source", tensors, config)
    write_json(tmp_path / "keep.json", manifest(config, [1, 2], 64))
    for command in (("show",), ("check", source)):
        said = call("manifest", command[0], tmp_path / "keep.json", *command[1:])
        assert "32 of 64 channels of each" in said.splitlines()[0]
    write_json(tmp_path / "other.json", manifest(config, [1, 2], 96))
    said = call("manifest", "check", tmp_path / "other.json", source, code=1)
    assert "made for experts of 96 channels, but they have 64" in said


def test_ids_are_not_put_in_another_order_than_their_channels() -> None:
    value = {"format": "shardxform.keep", "version": 1, "keep": {"0": [2, 0]}}
    width = {"channels": 32, "of": 64, "kept": {"0": [text([*range(32)], 64), text([*range(32, 64)], 64)]}}
    assert Manifest.from_dict(value, sort=True).keep == {0: (0, 2)}
    with pytest.raises(ManifestError, match="ascending"):
        Manifest.from_dict({**value, "width": width}, sort=True)


def _flip(out: Path, name: str) -> None:
    shard = next(out.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    size = int.from_bytes(data[:8], "little")
    begin = json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
    data[8 + size + begin] ^= 1
    shard.write_bytes(data)


@pytest.mark.oracle
def test_what_is_left_computes_what_the_model_computes_without_those_channels(small_moe: Path, tmp_path: Path) -> None:
    """Scored, chosen, pruned, loaded: as the whole model with zeros for the channels that are gone; and quantized."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from shardxform.formats.integers import Ints
    from shardxform.formats.stored import read_stored

    data = ["--data", few("calib.jsonl"), "--samples", 4, "--seqlen", 64]
    call("score", small_moe, "-o", tmp_path / "s", "--channels", "-q", "--dtype", "float32", *data)
    every = ["--keep", 16, "--width", 64, "-o", tmp_path / "keep.json"]
    assert "  channels  128 -> 64 of every expert" in call("select", tmp_path / "s", *every).splitlines()
    keep = Manifest.load(tmp_path / "keep.json")
    assert keep.width is not None
    call("prune", small_moe, tmp_path / "out", "-m", tmp_path / "keep.json", "-q")
    narrow, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    whole = AutoModelForCausalLM.from_pretrained(small_moe, dtype=torch.float32)
    given = _given(whole, Saliency.load(tmp_path / "s"), data)
    with torch.no_grad():
        for layer, bitmaps in keep.width.kept.items():
            for expert, bitmap in enumerate(bitmaps):
                kept = list(picked_ids(bitmap))
                assert sorted(np.argsort(-given[layer][expert], kind="stable")[:64]) == kept
                gone = [each for each in range(128) if each not in kept]
                whole.model.layers[layer].mlp.experts.down_proj[expert][:, gone] = 0
        ids = torch.arange(96).view(2, 48) + 100
        torch.testing.assert_close(narrow(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)
    quantized = tmp_path / "quantized"
    call("quantize", small_moe, quantized, "-m", tmp_path / "keep.json", "--group-size", 32, "-q")
    assert "sound" in call("verify", quantized, "--source", small_moe)
    stored = read_stored(Checkpoint.open(quantized))
    experts = [module for name, module in stored.modules.items() if ".experts." in name]
    assert len(experts) == 4 * 16 * 3
    assert all(isinstance(module.encoding, Ints) and 64 in module.shape for module in experts)


@pytest.mark.oracle
def test_shared_experts_stay_as_wide_as_they_are(tmp_path: Path) -> None:
    """Their width is a number of times that of routed ones: what is left computes as the whole model, less channels."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config, tensors = tiny("deepseek_v3", moe_intermediate_size=64)
    source = write_checkpoint(tmp_path / "source", tensors, config)
    value = manifest(config, list(range(8)), 64)
    write_json(tmp_path / "keep.json", value)
    told = call("prune", source, tmp_path / "out", "-m", tmp_path / "keep.json", "--mtp", "drop")
    assert config["n_shared_experts"] == 2
    assert "shared experts keep all of theirs: n_shared_experts is 4 from now on" in told
    assert "sound" in call("verify", tmp_path / "out", "--source", source)
    narrow, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for layer, bitmaps in value["width"]["kept"].items():
            for expert, bitmap in enumerate(bitmaps):
                gone = sorted(set(range(64)) - set(picked_ids(base64.b64decode(bitmap))))
                whole.model.layers[int(layer)].mlp.experts.down_proj[expert][:, gone] = 0
        ids = torch.arange(24).view(2, 12)
        torch.testing.assert_close(narrow(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.oracle
def test_shared_experts_that_are_as_wide_by_default_are_no_number_of_their_own(tmp_path: Path) -> None:
    """Where a config has a width of shared experts they stay so wide; where it has none it would say another."""
    pytest.importorskip("torch")
    import any_moe
    from test_every_family import CASES

    over = {**CASES["bailing_hybrid"].over, "moe_intermediate_size": 64}
    any_moe.save(any_moe.build("bailing_hybrid", **over), tmp_path / "source", model_type="bailing_hybrid")
    config = json.loads((tmp_path / "source" / "config.json").read_bytes())
    assert config.get("moe_shared_expert_intermediate_size") is None
    value = Manifest.from_dict(manifest(config, list(range(config["num_experts"])), 64))
    with pytest.raises(PlanError, match=r"mlp\.shared_experts.* is as wide as moe_intermediate_size says, where"):
        plan_prune(Checkpoint.open(tmp_path / "source"), value)
    write_json(tmp_path / "source" / "config.json", {**config, "moe_shared_expert_intermediate_size": 64})
    assert plan_prune(Checkpoint.open(tmp_path / "source"), value).steps


def _given(model: Any, saliency: Saliency, data: list[object]) -> list[np.ndarray]:
    """What every channel gave, by hooks on the loaded model's experts, which the file agrees with."""
    import torch

    from shardxform.calibration import DataOptions, load_windows

    options = DataOptions(data=str(data[1]), samples=4, seqlen=64)
    windows = load_windows(Path(model.name_or_path), options)
    found = [np.zeros((16, 128)) for _ in model.model.layers]

    def look(layer: int, experts: Any, args: Any) -> None:
        hidden, index, weights = args
        for expert in range(16):
            chosen = index == expert
            rows = chosen.any(-1)
            gate, up = (hidden[rows] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up * weights[chosen][:, None]
            norms = experts.down_proj[expert].double().square().sum(0)
            found[layer][expert] += (inner.double().square().sum(0) * norms).detach().numpy()

    for layer, block in enumerate(model.model.layers):
        block.mlp.experts.register_forward_pre_hook(lambda module, args, layer=layer: look(layer, module, args))
    with torch.no_grad():
        model(input_ids=torch.from_numpy(windows.ids_NT).long())
    for layer, stats in saliency.layers.items():
        np.testing.assert_allclose(stats.of("channels"), found[layer], rtol=1e-4)
    return [saliency.layers[layer].of("channels") for layer in range(len(found))]


# -- choosing ---------------------------------------------------------------------------------------------------------


def known(channels: np.ndarray) -> Saliency:
    model = {"model_type": "t", "num_layers": 1, "num_experts": 2, "num_experts_per_tok": 1, "num_groups": 1}
    stats = ExpertStats(count_E=np.array([1, 1]), channels_EI=channels.astype(np.float32))
    return Saliency(
        model={**model, "source_fingerprint": "ab"}, layers={0: stats}, mtp_layers={}, tokens=2, runs=(), where="s"
    )


def test_the_channels_that_gave_most_stay_and_ties_go_to_the_lower_id() -> None:
    given = np.ones((2, 64))
    given[0, 40:60] = 2
    given[1, ::2] = 3
    choice = with_width(decide(known(given), 2, "frequency"), 32)
    assert choice.width is not None
    assert [picked_ids(each) for each in choice.width.kept[0]] == [
        (*range(12), *range(40, 60)),
        tuple(range(0, 64, 2)),
    ]
    assert channels_kept(choice) == {0: (12 + 40 + 96) / (44 + 40 + 96 + 32)}
    assert Manifest.from_dict(choice.manifest().to_dict()) == choice.manifest()


@pytest.mark.parametrize(
    ("channels", "message"),
    [(64, "fewer than the 64 channels"), (31, "a multiple of 32"), (96, "fewer than the 64 channels")],
)
def test_widths_that_cannot_be_are_refused(channels: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        with_width(decide(known(np.ones((2, 64))), 2, "frequency"), channels)
    other = Saliency(
        **{**vars_of(known(np.ones((2, 64)))), "layers": {0: ExpertStats(count_E=np.array([1, 1]))}}  # type: ignore[arg-type]
    )
    with pytest.raises(PlanError, match="says nothing of channels"):
        with_width(decide(other, 2, "frequency"), 32)


def vars_of(saliency: Saliency) -> dict[str, object]:
    names = ("model", "layers", "mtp_layers", "tokens", "runs", "where")
    return {name: getattr(saliency, name) for name in names}


WIDTH = {"channels": 1, "of": 8, "kept": {"0": ["AQ==", "gA=="]}}


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (3, "width: expected an object with channels, of, kept, mtp_kept, found 3"),
        ({**WIDTH, "channels": 9}, "9 channels of 8 cannot stay"),
        ({**WIDTH, "of": True}, "width.of: expected a count, found"),
        ({**WIDTH, "kept": {"0": ["AQ=="]}}, r'width.kept\["0"\]: channels of 1 experts, but 2 are kept'),
        ({**WIDTH, "kept": {"0": ["AQ==", "Aw=="]}}, "expected a bitmap of 1 of 8 channels in base64"),
        ({**WIDTH, "kept": {"0": ["AQ==", "AQA="]}}, "expected a bitmap of 1 of 8 channels in base64"),
        ({**WIDTH, "kept": {"0": ["AQ==", 3]}}, "expected a bitmap of 1 of 8 channels in base64, found 3"),
        ({**WIDTH, "kept": {"x": []}}, "width.kept: expected lists by layer"),
        ({**WIDTH, "more": 1}, "width: expected an object with"),
    ],
)
def test_malformed_widths_are_refused(width: object, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        Manifest.from_dict({"format": "shardxform.keep", "version": 1, "keep": {"0": [0, 1]}, "width": width})


@pytest.mark.parametrize(
    ("kind", "wide", "of", "message"),
    [
        ("deepseek_v3", 40, 40, "`width`: expected one that divides 80, since shared experts of family deepseek_v3"),
        ("qwen3_moe", 64, 128, "made for experts of 128 channels, but .* has 64"),
    ],
)
def test_experts_that_cannot_be_narrowed_are_refused(
    kind: str, wide: int, of: int, message: str, tmp_path: Path
) -> None:
    config, tensors = tiny(kind, moe_intermediate_size=wide)
    source = Checkpoint.open(write_checkpoint(tmp_path / "source", tensors, config))
    experts = {"qwen3_moe": 6, "deepseek_v3": 8}[kind]
    value = manifest(config, list(range(experts)), of)
    with pytest.raises((ManifestError, PlanError), match=message):
        plan_prune(source, Manifest.from_dict(value))
