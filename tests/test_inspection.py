"""`inspect`: sizes by role add up, and the outlook is what the planners would write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from build import tiny, write_checkpoint
from click.testing import CliRunner
from test_prune import manifest_of
from test_quantize import KIND_SIZES

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import main
from shardxform.execution.runner import run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.model.families import HOMES
from shardxform.model.layout import layout_of
from shardxform.plan.inspection import inspect_checkpoint
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.publish.card import gather


def test_roles_add_up_to_the_whole(tiny_checkpoint: Path) -> None:
    found = inspect_checkpoint(Checkpoint.open(tiny_checkpoint))
    assert sum(nbytes for _, nbytes in found.roles.values()) == found.nbytes
    assert sum(count for count, _ in found.roles.values()) == found.tensors
    assert sum(found.dtypes.values()) == found.nbytes
    assert "unknown" not in found.roles


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "deepseek_v3", "qwen3_moe"])
def test_the_outlook_is_what_the_planners_would_write(kind: str, tmp_path: Path) -> None:
    big = {"hidden_size": 256, "moe_intermediate_size": 128}
    config, tensors = tiny(kind, **{**KIND_SIZES[kind], **big})
    source = Checkpoint.open(write_checkpoint(tmp_path / "s", tensors, config))
    found = inspect_checkpoint(source)
    half = found.experts // 2
    group = found.experts // found.groups
    keep = tuple(e for e in range(found.experts) if e % group < group // 2)
    manifest = Manifest(keep=dict.fromkeys(manifest_of(tmp_path / "s").keep, keep))
    scheme = Scheme.preset("W4A16")
    assert found.outlook == {
        f"prune to {half} experts": plan_prune(source, manifest).data_bytes,
        "quantize to W4A16": plan_quantize(source, scheme).data_bytes,
        f"prune to {half} experts and quantize to W4A16": plan_quantize(source, scheme, manifest).data_bytes,
    }


@pytest.mark.parametrize("format_", ["auto-round", "gptq", "compressed-tensors"])
@pytest.mark.parametrize("kind", ["qwen3_5_moe", "deepseek_v3", "qwen3_moe"])
def test_parameters_are_those_of_the_model_that_packed_words_stand_for(kind: str, format_: Any, tmp_path: Path) -> None:
    config, tensors = tiny(kind, **KIND_SIZES[kind])
    source = Checkpoint.open(write_checkpoint(tmp_path / "s", tensors, config))
    before = inspect_checkpoint(source)
    known = [math.prod(t.shape) for name, t in tensors.items() if "scale_inv" not in name]
    assert before.parameters is not None
    assert before.parameters + before.parameters_apart == sum(known)
    manifest, scheme = manifest_of(tmp_path / "s"), Scheme(grid=Grid(group_size=32), format=format_)
    run(plan_prune(source, manifest), tmp_path / "pruned")
    run(plan_quantize(source, scheme, manifest), tmp_path / "packed")
    pruned, packed = (inspect_checkpoint(Checkpoint.open(tmp_path / name)) for name in ("pruned", "packed"))
    assert pruned.parameters == packed.parameters == gather(tmp_path / "packed").parameters.after
    assert pruned.parameters is not None
    assert pruned.parameters < before.parameters
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "packed"), "--json"])
    assert json.loads(shown.stdout)["parameters"] == packed.parameters


def test_parameters_of_a_form_that_is_not_understood_are_not_made_up(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe", **KIND_SIZES["qwen3_moe"])
    source = Checkpoint.open(write_checkpoint(tmp_path / "s", tensors, config))
    run(plan_quantize(source, Scheme(grid=Grid(group_size=32))), tmp_path / "packed")
    path = tmp_path / "packed" / "config.json"
    changed = json.loads(path.read_text())
    changed["quantization_config"]["quant_method"] = "awq"
    path.write_text(json.dumps(changed))
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "packed")])
    assert "parameters not known: quantized in a form that is not understood" in shown.stdout.splitlines()[0]
    assert inspect_checkpoint(Checkpoint.open(tmp_path / "packed")).parameters is None


def test_inspect_prints_and_lists(small_moe: Path) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(small_moe)])
    assert shown.exit_code == 0
    assert "qwen3_5_moe (Qwen3_5MoeForCausalLM)" in shown.stdout
    assert "16 per layer, top-4, fused" in shown.stdout
    assert shown.stdout.startswith(f"{small_moe}: 8.82 MB, 4.41 M parameters\n")
    listed = CliRunner().invoke(main, ["inspect", str(small_moe), "--tensors", "*A_log", "--json"])
    names = [tensor["name"] for tensor in json.loads(listed.stdout)["tensors"]]
    assert names == [f"model.layers.{layer}.linear_attn.A_log" for layer in range(3)]
    assert json.loads(CliRunner().invoke(main, ["inspect", str(small_moe), "--json"]).stdout)["experts"] == 16


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    config, tensors = tiny("qwen3_moe")
    write_checkpoint(tmp_path, tensors, {**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    said = f"{tmp_path}/config.json: model_type 'llama' is not a known family; known: {', '.join(sorted(HOMES))}"
    assert said in result.stderr


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_5_moe"])
def test_mtp_layers_that_are_declared_and_not_there_are_told(kind: str, tmp_path: Path) -> None:
    config, tensors = tiny(kind)
    prefixes = layout_of(config, tensors).mtp_prefixes
    whole = write_checkpoint(tmp_path / "whole", tensors, config)
    less = {name: raw for name, raw in tensors.items() if not name.startswith(prefixes)}
    without = write_checkpoint(tmp_path / "less", less, config)
    told = [CliRunner().invoke(main, ["inspect", str(root)]).output for root in (whole, without)]
    assert " + 1 MTP\n" in told[0]
    assert "MTP layers\n" in told[0].partition("\n")[0] + "\n"
    assert "; no MTP layers, though config.json declares 1\n" in told[1]
    assert "MTP" not in told[1].partition("\n")[0]
    found = inspect_checkpoint(Checkpoint.open(without))
    assert (found.mtp_layers, found.mtp_layers_found) == (1, 0)


@pytest.mark.parametrize("count", [2, 12])
def test_a_count_that_no_router_has_is_told(count: int, tmp_path: Path) -> None:
    config, tensors = tiny("deepseek_v3", n_group=1, topk_group=1)
    root = write_checkpoint(tmp_path / "s", tensors, config | {"n_routed_experts": count})
    done = CliRunner().invoke(main, ["inspect", str(root)])
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert "mlp.gate." in done.output
    assert f"expected dimension 0 to count the {count} experts that config.json says" in done.output
