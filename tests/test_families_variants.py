"""Configs as releases write them, and as the first one of each family in test_every_family.py does not have them.

Positions are told in the older keys, keys that transformers does not know stand beside them, biases and ranks are there
or not: the block runner's logits are those of the model that transformers loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from build import raw, read_checkpoint, write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import any_moe  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.errors import FamilyError, SchemeError  # noqa: E402
from shardxform.execution.runner import RunOptions, run  # noqa: E402
from shardxform.formats.scheme import Grid, Scheme  # noqa: E402
from shardxform.forward.skeleton import Skeleton  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.model.layout import layout_of  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.plan.quantize import plan_quantize  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
OLD = {"rope_theta": 50000.0, "rope_scaling": None}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("beam", {"attention_bias": True, "n_group": 2, "final_logit_softcapping": None}, {}),
    ("deepseek_v2", {"q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}, OLD),
    ("deepseek_v2", {}, {**OLD, "rope_scaling": YARN, "scoring_func": "softmax", "moe_layer_freq": 1}),
    ("deepseek_v32", {"n_group": 2}, {**OLD, "rope_scaling": YARN, "mlp_layer_types": None, "layer_types": None}),
    ("deepseek_v32", {"index_topk": 5}, {"topk_method": "noaux_tc"}),  # less than the window: the indexer chooses
    ("glm4_moe", {"head_dim": 24}, {**OLD, "partial_rotary_factor": 0.5, "pad_token_id": 151329}),
    ("glm4_moe_lite", {"q_lora_rank": None, "attention_bias": True}, OLD),
    ("glm4_moe_lite", {}, {**OLD, "mlp_layer_types": None, "first_k_dense_replace": 1, "pad_token_id": 154820}),
    ("kimi_k2", {}, {**OLD, "rope_scaling": YARN, "num_nextn_predict_layers": 0, "aux_loss_alpha": 0.001}),
    ("olmoe", {"attention_bias": True, "clip_qkv": 0.5, "num_key_value_heads": 4}, OLD),
    ("qwen2_moe", {"qkv_bias": False, "mlp_only_layers": [0]}, {**OLD, "layer_types": None, "head_dim": 16}),
    ("qwen3_next", {"attention_bias": True, "mlp_only_layers": [0]}, OLD),
    ("qwen3_next", {}, {**OLD, "layer_types": None, "full_attention_interval": 2, "partial_rotary_factor": 0.25}),
]
IDS = torch.randint(1, any_moe.VOCAB, (2, 16), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("kind", "over", "told"), VARIANTS, ids=lambda value: json.dumps(value))
@torch.no_grad()
def test_a_config_as_releases_have_it_is_run_as_it_is_loaded(
    kind: str, over: dict[str, Any], told: dict[str, Any], tmp_path: Path
) -> None:
    root = any_moe.save(any_moe.build(kind, **over), tmp_path / "source", model_type=kind)
    config = json.loads((root / "config.json").read_text())
    gone = {"rope_parameters"} if "rope_theta" in told else set()
    gone |= {key for key, value in told.items() if value is None and key != "rope_scaling"}
    config = {key: value for key, value in {**config, **told}.items() if key not in gone}
    (root / "config.json").write_text(json.dumps(config))
    source = Checkpoint.open(root)
    assert layout_of(source.config, source.tensors).unknown == ()
    assert verify(root).problems == ()
    loads = {**config, "pad_token_id": None}  # one beyond the table keeps transformers from loading, and no runner
    (root / "config.json").write_text(json.dumps(loads))
    model, said = any_moe.load(root, torch.float32)
    assert not any(said.values())
    wanted = model.eval()(input_ids=IDS).logits
    with Weights(source, Precision(torch.device("cpu"), torch.float32)) as weights:
        skeleton = Skeleton(weights)
        hidden = skeleton.embed(IDS)
        for layer in range(skeleton.num_blocks):
            with skeleton.block(layer) as block:
                hidden = block(hidden)
        with skeleton.head() as head:
            found = head.logits(hidden.flatten(0, 1)).view_as(wanted)
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm4_moe", "glm4_moe_lite", "kimi_k2", "olmoe"])
def test_an_expert_count_under_its_other_name_must_agree(kind: str) -> None:
    config = any_moe.tiny_config(kind) | {"model_type": kind}
    assert layout_of({**config, "num_local_experts": any_moe.EXPERTS}, []).num_experts == any_moe.EXPERTS
    with pytest.raises(FamilyError, match="expert counts disagree"):
        layout_of({**config, "num_local_experts": 5}, [])


def test_a_list_of_dense_layers_says_more_than_their_number() -> None:
    config = any_moe.tiny_config("glm4_moe_lite", layers=4)
    for listed, layers in ((["sparse", "dense", "sparse", "dense"], (0, 2)), (None, (1, 2, 3))):
        assert layout_of({**config, "mlp_layer_types": listed}, []).moe_layers == layers
    with pytest.raises(FamilyError, match="expected a list of dense or sparse"):
        layout_of({**config, "mlp_layer_types": ["sparse", "full"]}, [])


def in_fp8(root: Path, out: Path, *but: str) -> Path:
    """The same checkpoint with its linear layers in FP8, one block each, but for those whose names end with one."""
    tensors, config = read_checkpoint(root), json.loads((root / "config.json").read_text())
    for name, value in list(tensors.items()):
        if len(value.shape) == 2 and ".layers." in name and not name.endswith(but):
            values = torch.from_numpy(value.float32().copy())
            scale = values.abs().max().reshape(1, 1) / 448
            tensors |= {name: raw((values / scale).to(torch.float8_e4m3fn)), f"{name}_scale_inv": raw(scale)}
    fp8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return write_checkpoint(out, tensors, config | {"quantization_config": fp8}, files={"tokenizer.json": "{}"})


def test_an_indexer_is_pruned_along_in_fp8_and_never_quantized_to_integers(tmp_path: Path) -> None:
    plain = any_moe.save(any_moe.build("deepseek_v32"), tmp_path / "plain")
    root = in_fp8(plain, tmp_path / "fp8", "mlp.gate.weight", "indexer.weights_proj.weight")
    assert verify(root).problems == ()
    source, keep = Checkpoint.open(root), Manifest(keep={1: (0, 2, 3, 5)})
    indexer = {name for name in source.tensors if ".indexer." in name}
    run(plan_prune(source, keep), tmp_path / "pruned", RunOptions(jobs=1))
    assert verify(tmp_path / "pruned", source=source, independent=True).problems == ()
    assert indexer <= set(read_checkpoint(tmp_path / "pruned"))
    run(plan_quantize(source, Scheme(grid=Grid(group_size=32)), keep), tmp_path / "int4", RunOptions(jobs=1))
    assert verify(tmp_path / "int4", source=source, independent=True).problems == ()
    found = read_checkpoint(tmp_path / "int4")
    assert {found[name].dtype for name in found if ".indexer." in name} == {"BF16"}
    with pytest.raises(SchemeError, match="no client runs indexer weights as integers"):
        plan_quantize(Checkpoint.open(plain), Scheme(grid=Grid(group_size=32), quantize=("*.indexer.wk",)))
