"""What releases have and transformers does not save: MTP layers under their own names, and configs with older keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from build import Raw, read_checkpoint, write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import any_moe  # noqa: E402

from shardxform.ask.manifest import Manifest  # noqa: E402
from shardxform.calibration import Windows  # noqa: E402
from shardxform.checkpoint.table import Checkpoint  # noqa: E402
from shardxform.errors import FamilyError, PlanError  # noqa: E402
from shardxform.execution.runner import RunOptions, run  # noqa: E402
from shardxform.experts.scoring import ScoreOptions, score  # noqa: E402
from shardxform.forward.skeleton import Skeleton  # noqa: E402
from shardxform.forward.weights import Precision, Weights  # noqa: E402
from shardxform.model.expected import expected  # noqa: E402
from shardxform.model.families import family_of  # noqa: E402
from shardxform.model.layout import layout_of  # noqa: E402
from shardxform.plan.prune import plan_prune  # noqa: E402
from shardxform.plan.view import ViewOptions  # noqa: E402
from shardxform.verification import verify  # noqa: E402

pytestmark = pytest.mark.oracle

H, D, Q, KV, F, WIDTH, E = 64, 16, 4, 2, 96, 32, 6
FLOAT32 = Precision(torch.device("cpu"), torch.float32)

_MLP = {"gate_proj.weight": (F, H), "up_proj.weight": (F, H), "down_proj.weight": (H, F)}
_SMALL = {"gate_proj.weight": (WIDTH, H), "up_proj.weight": (WIDTH, H), "down_proj.weight": (H, WIDTH)}
_ATTENTION = {
    "self_attn.q_proj.weight": (Q * D, H),
    "self_attn.k_proj.weight": (KV * D, H),
    "self_attn.v_proj.weight": (KV * D, H),
    "self_attn.o_proj.weight": (H, Q * D),
}
_QK_NORMS = {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
_NORMS = {"input_layernorm.weight": (H,), "post_attention_layernorm.weight": (H,)}
_INPUTS = {"enorm.weight": (H,), "hnorm.weight": (H,), "eh_proj.weight": (H, 2 * H), "final_layernorm.weight": (H,)}

Shapes = dict[str, tuple[int, ...]]


def under(prefix: str, *parts: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {f"{prefix}{name}": shape for part in parts for name, shape in part.items()}


MTP: dict[str, Shapes] = {
    "exaone_moe": under("mtp.layers.0.", _NORMS, _ATTENTION, _QK_NORMS, under("mlp.", _MLP))
    | {
        "mtp.fc.weight": (H, 2 * H),
        "mtp.norm.weight": (H,),
        "mtp.pre_fc_norm_embedding.weight": (H,),
        "mtp.pre_fc_norm_hidden.weight": (H,),
    },
    "hy_v3": under(
        "model.layers.2.",
        _NORMS,
        _ATTENTION,
        _QK_NORMS,
        _INPUTS,
        {"mlp.router.gate.weight": (E, H), "mlp.expert_bias": (E,)},
        under("mlp.shared_mlp.", _SMALL),
        *(under(f"mlp.experts.{e}.", _SMALL) for e in range(E)),
    ),
    "mimo_v2_flash": {
        name: shape
        for layer in range(2)
        for name, shape in under(
            f"model.mtp.layers.{layer}.",
            {"input_layernorm.weight": (H,), "pre_mlp_layernorm.weight": (H,)},
            _ATTENTION,
            {"self_attn.k_proj.weight": (2 * KV * D, H), "self_attn.v_proj.weight": (2 * KV * D, H)},  # sliding
            {"self_attn.attention_sink_bias": (Q,)},
            _INPUTS,
            under("mlp.", _MLP),
        ).items()
    },
}
COUNTED = {"hy_v3": {"num_nextn_predict_layers": 1}, "exaone_moe": {}, "mimo_v2_flash": {}}


def random(shape: tuple[int, ...], seed: int) -> Raw:
    values = np.random.default_rng(seed).normal(1.0 if len(shape) == 1 else 0.0, 0.1, shape).astype("<f4")
    return Raw("BF16", shape, (values.view("<u4") >> 16).astype("<u2").tobytes())


def release(kind: str, root: Path, **over: Any) -> Path:
    """A tiny checkpoint with the MTP layers that transformers passes over."""
    plain = any_moe.save(any_moe.build(kind), root / "plain")
    config = {**json.loads((plain / "config.json").read_text()), **COUNTED[kind], **over}
    made = {name: random(shape, seed) for seed, (name, shape) in enumerate(MTP[kind].items())}
    return write_checkpoint(root / "release", {**read_checkpoint(plain), **made}, config)


KEEP = {1: (0, 2, 3, 5)}


@pytest.mark.parametrize("kind", MTP)
def test_mtp_layers_are_known_to_the_last_tensor_and_need_not_be_counted(kind: str, tmp_path: Path) -> None:
    source = Checkpoint.open(release(kind, tmp_path))
    layout = layout_of(source.config, source.tensors)
    assert (layout.unknown, layout.moe_layers) == ((), (1,))
    assert layout.mtp_layers == (2 if kind == "mimo_v2_flash" else 1)
    assert {name for name, place in layout.places.items() if place.scope == "mtp"} == set(MTP[kind])
    report = verify(source.root)
    assert (report.problems, {each.code for each in report.warnings}) == ((), {"tokenizer"})
    wanted = {name: each.shape for name, each in expected(layout, {}) if each.place.scope == "mtp"}
    assert {name: shape for name, shape in MTP[kind].items() if name in wanted} == {
        name: shape for name, shape in wanted.items() if name in MTP[kind]
    }


@pytest.mark.parametrize("kind", ["exaone_moe", "mimo_v2_flash"])
def test_dense_mtp_layers_stay_when_experts_go(kind: str, tmp_path: Path) -> None:
    source, out = Checkpoint.open(release(kind, tmp_path)), tmp_path / "out"
    run(plan_prune(source, Manifest(keep=KEEP)), out, RunOptions(jobs=1))
    before, after = read_checkpoint(source.root), read_checkpoint(out)
    assert all(after[name] == before[name] for name in MTP[kind])
    report = verify(out, source=source, independent=True)
    assert (report.problems, report.tensors_differing) == ((), 0)


def test_an_mtp_layer_with_experts_is_pruned_by_its_own_list(tmp_path: Path) -> None:
    source, out = Checkpoint.open(release("hy_v3", tmp_path)), tmp_path / "out"
    run(plan_prune(source, Manifest(keep=KEEP, mtp_keep={0: (1, 2, 3, 4)})), out, RunOptions(jobs=1))
    before, after = read_checkpoint(source.root), read_checkpoint(out)
    prefix = "model.layers.2.mlp."
    for name in ("router.gate.weight", "expert_bias"):
        wanted = before[prefix + name].array()[[1, 2, 3, 4]]
        np.testing.assert_array_equal(after[prefix + name].array(), wanted)
    assert after[f"{prefix}experts.0.up_proj.weight"] == before[f"{prefix}experts.1.up_proj.weight"]
    report = verify(out, source=source, independent=True)
    assert (report.problems, report.tensors_differing) == ((), 0)


@pytest.mark.parametrize("kind", MTP)
def test_mtp_layers_are_dropped_with_their_count(kind: str, tmp_path: Path) -> None:
    count = 2 if kind == "mimo_v2_flash" else 1
    source, out = Checkpoint.open(release(kind, tmp_path, num_nextn_predict_layers=count)), tmp_path / "out"
    run(plan_prune(source, Manifest(keep=KEEP), ViewOptions(mtp="drop")), out, RunOptions(jobs=1))
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not set(MTP[kind]) & set(read_checkpoint(out))
    assert verify(out, source=source, independent=True).problems == ()


def test_an_mtp_layer_with_experts_is_run_and_scored(tmp_path: Path) -> None:
    ids = torch.randint(1, any_moe.VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    windows = Windows(ids_NT=ids.numpy().astype(np.int32), fingerprint="x", provenance={"data": "random"}, notes=())
    source = Checkpoint.open(release("hy_v3", tmp_path))
    found = score(source, windows, ScoreOptions(precision=FLOAT32, work=tmp_path / "w"))
    assert int(found.mtp_layers[0].count_E.sum()) == 2 * 11 * any_moe.TOP_K
    assert not score(
        Checkpoint.open(release("exaone_moe", tmp_path / "dense")),
        windows,
        ScoreOptions(precision=FLOAT32, work=tmp_path / "v"),
    ).mtp_layers


def test_an_mtp_layer_whose_names_no_release_has_shown_is_refused(tmp_path: Path) -> None:
    plain = any_moe.save(any_moe.build("mellum"), tmp_path / "plain")
    strange = {"mtp.layers.0.mlp.experts.0.up_proj.weight": random((WIDTH, H), 0)}
    config = json.loads((plain / "config.json").read_text())
    source = Checkpoint.open(write_checkpoint(tmp_path / "m", {**read_checkpoint(plain), **strange}, config))
    with pytest.raises(PlanError, match="unknown to family mellum"):
        plan_prune(source, Manifest(keep=dict.fromkeys(range(2), (0, 2, 3, 5))))


OLDER: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "cohere2_moe": ({"first_k_dense_replace": 1}, ("mlp_layer_types", "layer_types", "tie_word_embeddings")),
    "exaone_moe": (
        {
            "architectures": ["ExaoneMoEForCausalLM"],
            "is_moe_layer": [False, True],
            "first_last_k_dense_replace": 1,
            "sliding_window_pattern": "LLLG",
            "rope_theta": 1000000,
            "rope_scaling": None,
        },
        ("mlp_layer_types", "first_k_dense_replace", "rope_parameters"),
    ),
    "hy_v3": ({"first_k_dense_replace": 1, "expert_hidden_dim": 32}, ("mlp_layer_types",)),
    "mimo_v2_flash": (
        {
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 1],
            "swa_num_key_value_heads": 4,
            "n_shared_experts": None,
            "routed_scaling_factor": None,
            "layernorm_epsilon": 1e-05,
            "rope_theta": 5000000,
            "swa_rope_theta": 10000,
            "partial_rotary_factor": 0.334,
        },
        ("mlp_layer_types", "layer_types", "rope_parameters"),
    ),
}


@pytest.mark.parametrize("kind", OLDER)
def test_the_keys_of_releases_describe_the_same_model(kind: str, tmp_path: Path) -> None:
    more, without = OLDER[kind]
    over = {"prefix_dense_intermediate_size": 96, "mlp_layer_types": ["dense", "sparse"]} if "cohere" in kind else {}
    model = any_moe.build(kind, **over)
    root = any_moe.save(model, tmp_path / "saved")
    config = {key: value for key, value in json.loads((root / "config.json").read_text()).items() if key not in without}
    source = Checkpoint.open(write_checkpoint(tmp_path / "wild", read_checkpoint(root), config | more))
    assert verify(source.root).problems == ()
    layout = layout_of(source.config, source.tensors)
    assert (layout.unknown, layout.moe_layers) == ((), (1,))
    with Weights(source, FLOAT32) as weights:
        weights.check()
        assert Skeleton(weights).num_blocks == 2


def test_a_count_may_be_a_list_of_the_same_for_every_layer(tmp_path: Path) -> None:
    root = any_moe.save(any_moe.build("hunyuan_v1_moe"), tmp_path / "saved")
    lists = {"num_experts": [6, 6], "moe_topk": [2, 2], "moe_intermediate_size": [96, 96], "num_shared_expert": [1, 1]}
    config = {**json.loads((root / "config.json").read_text()), **lists}
    source = Checkpoint.open(write_checkpoint(tmp_path / "wild", read_checkpoint(root), config))
    layout = layout_of(source.config, source.tensors)
    assert (layout.num_experts, layout.top_k) == (6, 2)
    out = tmp_path / "out"
    run(plan_prune(source, Manifest(keep=dict.fromkeys(range(2), (0, 2, 3, 5)))), out, RunOptions(jobs=1))
    assert json.loads((out / "config.json").read_text())["num_experts"] == [4, 4]
    for differing in ({"num_experts": [6, 5]}, {"moe_topk": [2, 1]}, {"num_experts": []}):
        with pytest.raises(FamilyError, match="expected a count"):
            layout_of({**source.config, **differing}, source.tensors)


def test_a_router_that_is_float32_whatever_the_rest_stays_so(tmp_path: Path) -> None:
    source = Checkpoint.open(any_moe.save(any_moe.build("hunyuan_v1_moe"), tmp_path / "saved"))
    model = any_moe.AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.bfloat16)
    with (
        Weights(source, Precision(torch.device("cpu"), torch.bfloat16)) as weights,
        Skeleton(weights).block(0) as block,
    ):
        found = {name: each.dtype for name, each in block.module.named_parameters() if "experts" not in name}
    assert found == {name: each.dtype for name, each in model.model.layers[0].named_parameters() if name in found}
    assert found["mlp.gate.wg.weight"] == torch.float32


def test_a_model_type_may_be_published_under_two_architectures() -> None:
    for name in ("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"):
        _, wrapper = family_of({"model_type": "exaone_moe", "architectures": [name]})
        assert wrapper.architecture == name
    with pytest.raises(FamilyError, match="belongs to ExaoneMoeForCausalLM"):
        family_of({"model_type": "exaone_moe", "architectures": ["Exaone4ForCausalLM"]})
