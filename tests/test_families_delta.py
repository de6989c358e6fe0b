"""Ling 3 and Kimi Linear: names of releases that transformers saves otherwise, configs as in the wild, MTP layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from build import Raw, read_checkpoint, write_checkpoint
from click.testing import CliRunner
from texts import few

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import any_moe  # noqa: E402
from test_every_family import (  # noqa: E402
    FLOAT32,
    IDS,
    Checkpoint,
    Manifest,
    RunOptions,
    Skeleton,
    Weights,
    block_by_block,
    keep_of,
    loaded,
    model_of,
    plan_prune,
    run,
    sliced,
    source_of,
    verify,
)
from test_every_family import test_the_block_runner_gives_the_logits_of_the_model as runs_like_the_model  # noqa: E402
from transformers import CONFIG_MAPPING  # noqa: E402

from shardxform.cli import main  # noqa: E402
from shardxform.errors import CheckpointError, FamilyError  # noqa: E402
from shardxform.forward.skeleton import mtp_layer  # noqa: E402
from shardxform.model.layout import layout_of  # noqa: E402

pytestmark = pytest.mark.oracle

KINDS = ("bailing_hybrid", "kimi_linear")


def ling(config: dict[str, Any], tensors: dict[str, Raw]) -> None:
    """As the release has it: the class of its own code, other keys, `o_proj` in delta attention."""
    config["architectures"] = ["BailingMoeV3ForCausalLM"]
    for theirs, ours in (
        *(("num_experts_per_token", "num_experts_per_tok"), ("num_expert_group", "n_group")),
        *(("moe_renormalize", "norm_topk_prob"), ("model_max_length", "max_position_embeddings")),
    ):
        config[ours] = config.pop(theirs)
    config["moe_shared_expert_intermediate_size"] = config["moe_intermediate_size"]
    tensors["model.layers.0.attention.o_proj.weight"] = tensors.pop("model.layers.0.attention.dense.weight")


def kimi(config: dict[str, Any], tensors: dict[str, Raw]) -> None:
    """As the release has it: sizes and layers of delta attention in an object, dense layers under `mlp`."""
    for key in ("layer_types", "mlp_layer_types"):
        del config[key]
    sizes = {"head_dim": "linear_head_dim", "num_heads": "linear_num_heads"}
    sizes["short_conv_kernel_size"] = "linear_conv_kernel_dim"
    config["linear_attn_config"] = {ours: config.pop(theirs) for ours, theirs in sizes.items()}
    config["linear_attn_config"] |= {"kda_layers": [1], "full_attn_layers": [2]}
    config |= {"first_k_dense_replace": 1, "moe_layer_freq": 1, "mla_use_nope": True, "num_nextn_predict_layers": 0}
    for name in [name for name in tensors if name.startswith("model.layers.0.block_sparse_moe.")]:
        tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)


RELEASES: dict[str, Callable[[dict[str, Any], dict[str, Raw]], None]] = {"bailing_hybrid": ling, "kimi_linear": kimi}


def release_of(kind: str, folder: Path, root: Path) -> Path:
    """The tiny checkpoint in the names of the release itself, from under `root`."""
    saved = source_of(kind, root)
    config, tensors = json.loads((saved / "config.json").read_text()), read_checkpoint(saved)
    RELEASES[kind](config, tensors)
    files = {"tokenizer.json": (saved / "tokenizer.json").read_text()}
    return write_checkpoint(folder / kind, tensors, {**config, "transformers_version": "4.57.1"}, files=files)


@pytest.mark.parametrize("kind", KINDS)
def test_a_release_is_known_runs_and_is_pruned(kind: str, tmp_path: Path) -> None:
    root = release_of(kind, tmp_path / "release", tmp_path)
    source = Checkpoint.open(root)
    layout = layout_of(source.config, source.tensors)
    assert (layout.unknown, layout.top_k, layout.moe_layers) == ((), 2, (1,))
    assert layout.groups == {"bailing_hybrid": 2, "kimi_linear": 1}[kind]
    assert verify(root).problems == ()
    runs_like_the_model(kind, tmp_path / "release")
    keep = {1: (0, 2, 4, 5)}
    run(plan_prune(source, Manifest(keep=keep)), tmp_path / "out", RunOptions(jobs=1))
    smaller = loaded(tmp_path / "out")
    wanted = sliced(model_of(kind), smaller, keep)
    assert all(torch.equal(value, wanted[name]) for name, value in smaller.state_dict().items())
    assert verify(tmp_path / "out", source=source, independent=True).problems == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("missing", ["o_proj", "gate_proj"])
def test_a_tensor_that_has_two_names_must_be_there_under_one(kind: str, missing: str, tmp_path: Path) -> None:
    for root in (release_of(kind, tmp_path / "release", tmp_path), source_of(kind, tmp_path)):
        tensors, config = read_checkpoint(root), json.loads((root / "config.json").read_text())
        ends = (f"0.attention.{missing}.weight", f"0.self_attn.{missing}.weight", "0.attention.dense.weight")
        ends = ends if missing == "o_proj" else ("0.mlp.gate_proj.weight", "0.block_sparse_moe.gate_proj.weight")
        (name,) = (name for name in tensors if name.endswith(ends))
        del tensors[name]
        (problem,) = verify(write_checkpoint(tmp_path / root.parent.name / "less", tensors, config)).problems
        assert problem.where.split(".")[2] == "0"
        assert "missing" in problem.message


@pytest.mark.parametrize("kind", KINDS)
def test_a_healed_output_is_better_and_loads(kind: str, tmp_path: Path) -> None:
    root, out = release_of(kind, tmp_path / "release", tmp_path), tmp_path / "out"
    keep = {"1": [0, 2, 4, 5]}
    (tmp_path / "keep.json").write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": keep}))
    command = ["prune", str(root), str(out), "-m", str(tmp_path / "keep.json"), "--heal", "all", "--heal-iters", "8"]
    command += ["--heal-lr", "0.005", "--data", str(few("calib.jsonl")), "--samples", "8", "--seqlen", "32"]
    result = CliRunner().invoke(main, [*command, "--batch-size", "4", "--dtype", "float32", "-q"])
    assert result.exit_code == 0, result.output
    (healed,) = (block["healed"] for block in json.loads((out / "shardxform.json").read_text())["facts"]["blocks"])
    assert healed["healed_error"] < 0.999 * healed["pruned_error"]
    assert verify(out, source=Checkpoint.open(root), independent=True).problems == ()
    before, after = model_of(kind).state_dict(), loaded(out).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items() if ".layers.1." not in name)
    moved = [
        name for name, value in after.items() if value.shape == before[name].shape and (value != before[name]).any()
    ]
    assert any("self_attn" in name for name in moved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["auto-round", "gptq", "compressed-tensors"])
def test_no_quantized_format_is_written_and_why(kind: str, name: str, tmp_path: Path) -> None:
    command = ["quantize", str(source_of(kind, tmp_path)), str(tmp_path / "out"), "--format", name, "-q"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert f"no quantized format of family {kind} is read: transformers does not put the convolutions" in result.output
    assert not (tmp_path / "out").exists()


def test_ling_of_another_architecture_is_refused() -> None:
    config = {"model_type": "bailing_hybrid", "architectures": ["BailingMoeV2_5ForCausalLM"]}
    with pytest.raises(FamilyError, match=r"but architectures is \['BailingMoeV2_5ForCausalLM'\]"):
        layout_of(config, [])


def test_ling_with_a_query_rank_is_pruned_and_run_where_transformers_knows_it(tmp_path: Path) -> None:
    saved = source_of("bailing_hybrid", tmp_path)
    config, tensors = json.loads((saved / "config.json").read_text()), read_checkpoint(saved)
    before = "model.layers.1.attention."
    del tensors[f"{before}q_proj.weight"]
    for name, shape in (("q_a_proj", (24, 64)), ("q_a_layernorm", (24,)), ("q_b_proj", (128, 24))):
        tensors[f"{before}{name}.weight"] = Raw("BF16", shape, b"\x80\x3f" * (shape[0] * (*shape, 1)[1]))
    source = Checkpoint.open(write_checkpoint(tmp_path / "tiny", tensors, {**config, "q_lora_rank": 24}))
    assert layout_of(source.config, source.tensors).unknown == ()
    assert verify(source.root).problems == ()
    run(plan_prune(source, Manifest(keep={1: (0, 2, 4, 5)})), tmp_path / "out", RunOptions(jobs=1))
    assert verify(tmp_path / "out", source=source, independent=True).problems == ()
    if hasattr(CONFIG_MAPPING["bailing_hybrid"], "q_lora_rank"):  # from 5.24 on
        logits = any_moe.load(source.root, torch.float32)[0].eval()(input_ids=IDS).logits
        torch.testing.assert_close(block_by_block(source.root), logits, rtol=2e-6, atol=2e-6)
        return
    with (
        Weights(source, FLOAT32) as weights,
        pytest.raises(CheckpointError, match=r"q_proj.weight' is missing; the mod"),
        Skeleton(weights).block(1),
    ):
        pass


# -- MTP layers of Ling --------------------------------------------------------------------------------------------


def with_mtp(tmp_path: Path) -> Path:
    """The release with an MTP layer, whose block is that of layer 1."""
    root = release_of("bailing_hybrid", tmp_path / "release", tmp_path)
    config, tensors = json.loads((root / "config.json").read_text()), read_checkpoint(root)
    before = "model.layers.1."
    tensors |= {
        f"model.layers.2.{name[len(before) :]}": each for name, each in tensors.items() if name.startswith(before)
    }
    generator = torch.Generator().manual_seed(5)
    for name, shape in (*(("eh_proj", (64, 128)), ("enorm", (64,)), ("hnorm", (64,)), ("final_layernorm", (64,))),):
        values = (torch.rand(shape, generator=generator) / 8 + (len(shape) == 1)).bfloat16()
        tensors[f"model.layers.2.{name}.weight"] = Raw("BF16", shape, values.view(torch.uint8).numpy().tobytes())
    config["num_nextn_predict_layers"] = 1
    files = {"tokenizer.json": (root / "tokenizer.json").read_text()}
    return write_checkpoint(tmp_path / "mtp", tensors, config, files=files)


def test_mtp_layers_are_known_and_pruned_with_their_own_list_or_dropped(tmp_path: Path) -> None:
    source = Checkpoint.open(with_mtp(tmp_path))
    layout = layout_of(source.config, source.tensors)
    assert (layout.unknown, layout.mtp_layers, layout.has_mtp) == ((), 1, True)
    report = verify(source.root)
    assert (report.problems, report.warnings) == ((), ())
    keep, own = keep_of(source), (1, 2, 3, 4)
    assert keep == {1: (0, 1, 3, 4)}
    run(plan_prune(source, Manifest(keep=keep, mtp_keep={0: own})), tmp_path / "out", RunOptions(jobs=1))
    before, after = read_checkpoint(source.root), read_checkpoint(tmp_path / "out")
    for new, old in enumerate(own):
        for part in ("gate_proj", "up_proj", "down_proj"):
            name = "model.layers.2.mlp.experts.{}." + f"{part}.weight"
            assert after[name.format(new)] == before[name.format(old)]
    for part in ("weight", "expert_bias"):
        name = f"model.layers.2.mlp.gate.{part}"
        assert (after[name].array() == before[name].array()[list(own)]).all()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert verify(tmp_path / "out", source=source, independent=True).problems == ()
    run(plan_prune(source, Manifest(keep=keep)), tmp_path / "less", RunOptions(jobs=1))
    assert not any(name.startswith("model.layers.2.") for name in read_checkpoint(tmp_path / "less"))
    assert json.loads((tmp_path / "less" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert verify(tmp_path / "less", source=source, independent=True).problems == ()


@torch.no_grad()
def test_an_mtp_layer_is_run_as_the_release_runs_it(tmp_path: Path) -> None:
    model = model_of("bailing_hybrid")
    normed = model.model(input_ids=IDS).last_hidden_state
    with Weights(Checkpoint.open(with_mtp(tmp_path)), FLOAT32) as weights:
        with mtp_layer(Skeleton(weights), 0, None) as layer:
            found = layer(IDS, normed)
        read = {name: weights.tensor(f"model.layers.2.{name}.weight") for name in ("eh_proj", "enorm", "hnorm")}
        last = weights.tensor("model.layers.2.final_layernorm.weight")

    def norm(hidden: Any, weight: Any) -> Any:
        return weight * hidden * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    tokens = model.model.embed_tokens(IDS[:, 1:])
    both = torch.cat((norm(tokens, read["enorm"]), norm(normed[:, :-1], read["hnorm"])), -1) @ read["eh_proj"].T
    first, block = model.model.layers
    given: list[Any] = []
    handle = first.register_forward_hook(lambda _module, _args, _out: both)
    taken = block.register_forward_hook(lambda _module, _args, out: given.append(out))
    model.model(inputs_embeds=both)
    handle.remove()
    taken.remove()
    torch.testing.assert_close(found, norm(given[0], last), rtol=2e-5, atol=2e-5)
