"""What transformers has no code for in families that are sliced otherwise: tensors by hand, in names of releases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import any_moe
import pytest
from build import Raw, random_tensors, read_checkpoint, write_checkpoint

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import FamilyError, ManifestError
from shardxform.execution.runner import RunOptions, run
from shardxform.model.layout import layout_of
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import MtpMode, ViewOptions
from shardxform.verification import verify

pytestmark = pytest.mark.oracle


def pruned(source: Path, out: Path, keep: Manifest, mtp: MtpMode = "auto") -> Path:
    """A pruned output, sound by every check."""
    run(plan_prune(Checkpoint.open(source), keep, ViewOptions(mtp=mtp)), out, RunOptions(jobs=1))
    report = verify(out, source=source, manifest=keep, mtp=mtp, independent=True)
    assert (report.problems, report.tensors_differing) == ((), 0)
    return out


@pytest.mark.parametrize("mtp", ["auto", "drop"])
def test_mtp_layers_of_ernie_have_no_experts_and_stay_as_they_are(mtp: MtpMode, tmp_path: Path) -> None:
    plain = any_moe.save(any_moe.build("ernie4_5_moe"), tmp_path / "plain")
    tensors, config = read_checkpoint(plain), dict(Checkpoint.open(plain).config)
    dense = {name: raw.shape for name, raw in tensors.items() if name.startswith("model.layers.0.")}
    shapes = {name.replace("layers.0.", "mtp_block.0."): shape for name, shape in dense.items()}
    shapes |= {f"model.mtp_{name}.0.weight": (64,) for name in ("emb_norm", "hidden_norm")}
    shapes["model.mtp_linear_proj.0.weight"] = (64, 128)
    extra = random_tensors(shapes)
    source = write_checkpoint(tmp_path / "in", {**tensors, **extra}, {**config, "num_nextn_predict_layers": 1})
    checkpoint = Checkpoint.open(source)
    layout = layout_of(checkpoint.config, checkpoint.tensors)
    assert (layout.unknown, layout.mtp_layers, layout.has_mtp) == ((), 1, True)
    out = read_checkpoint(pruned(source, tmp_path / "out", Manifest(keep={1: (0, 2, 5)}), mtp))
    assert {name: out.get(name) for name in extra} == (extra if mtp == "auto" else dict.fromkeys(extra))
    assert Checkpoint.open(tmp_path / "out").config["num_nextn_predict_layers"] == (mtp == "auto")


def ernie_vl(root: Path) -> Path:
    """A tiny ERNIE-4.5-VL with sets of six experts, text ones before vision ones."""
    from test_every_family import CASES

    case = CASES["ernie4_5_vl_moe"]
    model = any_moe.build("ernie4_5_vl_moe", class_name=case.class_name, **case.over)
    return any_moe.save(model, root, model_type="ernie4_5_vl_moe")


def test_a_keep_list_names_as_many_experts_of_either_set_by_the_numbers_of_their_tensors(tmp_path: Path) -> None:
    source = ernie_vl(tmp_path / "in")
    before = read_checkpoint(source)
    after = read_checkpoint(pruned(source, tmp_path / "out", Manifest(keep={1: (0, 4, 5, 6, 9, 10)})))
    home, router = "model.layers.1.mlp.experts", "model.layers.1.mlp.gate.weight"
    for old, new in ((0, 0), (4, 1), (5, 2), (6, 3), (9, 4), (10, 5)):
        name = "up_proj.weight"
        assert after[f"{home}.{new}.{name}"].data == before[f"{home}.{old}.{name}"].data
    for name, own in ((router, [0, 4, 5]), (f"{router}_1", [0, 3, 4])):
        assert (after[name].float32() == before[name].float32()[:, own]).all()
    bias = "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    both = before[bias].float32()
    assert after[bias].float32().tolist() == [both[0, [0, 4, 5]].tolist(), both[1, [0, 3, 4]].tolist()]
    assert Checkpoint.open(tmp_path / "out").config["text_config"]["moe_num_experts"] == 3


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ((0, 1, 2), r"keeps 3 text and 0 vision experts; layer 1 has 2 sets .* \(0\.\.5 text, 6\.\.11 vision\)"),
        ((0, 1, 2, 6), "keeps 3 text and 1 vision experts"),
        ((0, 6), "keeps 1 experts of each set, but its router picks 2 per token"),
        ((0, 1, 6, 12), "expert 12, but layer 1 has experts 0..11"),
    ],
)
def test_a_keep_list_that_does_not_tell_both_sets_is_refused(keep: tuple[int, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=said):
        plan_prune(Checkpoint.open(ernie_vl(tmp_path / "in")), Manifest(keep={1: keep}))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The config as releases of ERNIE-4.5-VL have it."""
    text = {key: value for key, value in config["text_config"].items() if key != "mlp_layer_types"}
    layers = {"moe_layer_start_index": [1, 1], "moe_layer_end_index": [1, 1], "moe_layer_interval": 1}
    more = {"moe_num_experts": [6, 6], "model_type": "ernie4_5_moe_vl", "vision_config": config["vision_config"]}
    return {**text, **layers, **more, "architectures": config["architectures"], "tie_word_embeddings": False}


def test_a_flat_config_counts_the_experts_of_each_set(tmp_path: Path) -> None:
    saved = ernie_vl(tmp_path / "saved")
    tensors = {name.replace("model.vision_model", "vision_model"): raw for name, raw in read_checkpoint(saved).items()}
    source = write_checkpoint(tmp_path / "in", tensors, flat(dict(Checkpoint.open(saved).config)))
    assert layout_of(Checkpoint.open(source).config, tensors).unknown == ()
    out = pruned(source, tmp_path / "out", Manifest(keep={1: (1, 3, 6, 7)}))
    assert Checkpoint.open(out).config["moe_num_experts"] == [2, 2]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("moe_num_experts", [6, 5], r"moe_num_experts: expected a count, found \[6, 5\]"),
        ("moe_layer_start_index", [1, 0], "moe_layer_start_index: expected one number for both sets of experts"),
        ("moe_intermediate_size", [32], "moe_intermediate_size: expected a size for each of two sets"),
    ],
)
def test_sets_that_are_not_alike_are_refused(key: str, value: list[int], said: str, tmp_path: Path) -> None:
    saved = Checkpoint.open(ernie_vl(tmp_path / "in"))
    source = replace(saved, config={**flat(dict(saved.config)), key: value})
    with pytest.raises(FamilyError, match=said):
        plan_prune(source, Manifest(keep={1: (0, 1, 6, 7)}))


def test_the_text_of_two_sets_is_no_model_of_its_own(tmp_path: Path) -> None:
    source = Checkpoint.open(ernie_vl(tmp_path / "in"))
    for config in (source.config, flat(dict(source.config))):
        with pytest.raises(FamilyError, match="family ernie4_5_vl_moe has no text-only class"):
            plan_prune(replace(source, config=config), None, ViewOptions(text_only=True))


def deepseek_v4(root: Path, *, packed: bool = False) -> Path:
    """A tiny DeepSeek-V4 with an MTP layer, its experts in 16 bits or as releases have them, two codes to a byte."""
    from test_every_family import CASES

    case = CASES["deepseek_v4"]
    saved = any_moe.save(any_moe.build("deepseek_v4", **case.over), root / "plain", renames=case.renames)
    tensors, config = read_checkpoint(saved), dict(Checkpoint.open(saved).config)
    like = {name: raw.shape for name, raw in tensors.items() if name.startswith("layers.1.")}
    shapes = {name.replace("layers.1.", "mtp.0."): shape for name, shape in like.items()}
    shapes = {name: shape for name, shape in shapes.items() if "indexer" not in name and "compressor" not in name}
    shapes |= {f"mtp.0.{name}.weight": (64,) for name in ("enorm", "hnorm", "norm")}
    shapes |= {f"mtp.0.{name}.weight": (64, 64) for name in ("e_proj", "h_proj")}
    shapes |= {f"mtp.0.{name}": tensors[name].shape for name in ("hc_head_base", "hc_head_fn", "hc_head_scale")}
    tensors |= random_tensors(shapes)
    config["num_nextn_predict_layers"] = 1
    if packed:
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        plain = [name for name, raw in tensors.items() if len(raw.shape) == 2 and ".experts." not in name]
        config["quantization_config"]["modules_to_not_convert"] = [name.removesuffix(".weight") for name in plain]
        config["expert_dtype"] = "fp4"
        for name in [name for name in tensors if ".ffn.experts." in name]:
            rows, columns = tensors[name].shape
            tensors[name] = Raw("I8", (rows, columns // 2), tensors[name].data[: rows * columns // 2])
            scale = name.replace("weight", "scale")
            tensors[scale] = Raw(
                "F8_E8M0", (rows, columns // 32), bytes([120 + at % 9 for at in range(rows * columns // 32)])
            )
    return write_checkpoint(root / "in", tensors, config)


@pytest.mark.parametrize("packed", [False, True])
def test_deepseek_v4_is_pruned_with_its_mtp_layer_and_its_hash_tables(packed: bool, tmp_path: Path) -> None:
    source = Checkpoint.open(deepseek_v4(tmp_path, packed=packed))
    layout = layout_of(source.config, source.tensors)
    assert (layout.unknown, layout.mtp_layers, layout.has_mtp) == ((), 1, True)
    assert verify(source.root).problems == ()
    keep = Manifest(keep={0: (0, 2, 5), 1: (1, 2, 3)}, mtp_keep={0: (0, 4, 5)})
    before = read_checkpoint(source.root)
    after = read_checkpoint(pruned(source.root, tmp_path / "out", keep))
    for prefix, ids in (("layers.0", (0, 2, 5)), ("layers.1", (1, 2, 3)), ("mtp.0", (0, 4, 5))):
        for new, old in enumerate(ids):
            for part in ("w1.weight", "w2.weight", "w3.weight", *(("w1.scale",) if packed else ())):
                assert after[f"{prefix}.ffn.experts.{new}.{part}"] == before[f"{prefix}.ffn.experts.{old}.{part}"]
        assert f"{prefix}.ffn.experts.3.w1.weight" not in after
        assert after[f"{prefix}.ffn.gate.weight"].shape == (3, 64)
    dropped = read_checkpoint(pruned(source.root, tmp_path / "dropped", Manifest(keep=keep.keep)))
    assert not any(name.startswith("mtp.") for name in dropped)
    assert Checkpoint.open(tmp_path / "dropped").config["num_nextn_predict_layers"] == 0


def test_step3p5_as_its_release_has_it_is_pruned_beside_dense_mtp_layers(tmp_path: Path) -> None:
    from test_every_family import CASES

    case = CASES["step3p7"]
    over = {**case.over, "layer_types": ["sliding_attention", "full_attention"]}
    model = any_moe.build("step3p7", class_name=case.class_name, around=case.around, **over)
    saved = any_moe.save(model, tmp_path / "saved")
    config = dict(Checkpoint.open(saved).config)["text_config"]
    for key in ("mlp_layer_types", "num_experts_per_tok", "n_routed_experts", "num_key_value_heads"):
        config.pop(key)
    config = {key: value for key, value in config.items() if not key.startswith(("mtp_", "num_sliding"))}
    config |= {"architectures": ["Step3p5ForCausalLM"], "moe_num_experts": 6, "moe_top_k": 2, "moe_layers_enum": "1"}
    config |= {"num_attention_groups": 2, "attention_other_setting": {"num_attention_heads": 6}}
    config |= {"layer_types": [*config["layer_types"], "sliding_attention"], "num_nextn_predict_layers": 1}
    tensors = {name: raw for name, raw in read_checkpoint(saved).items() if name.startswith(("model.", "lm_head."))}
    dense = {name: raw.shape for name, raw in tensors.items() if name.startswith("model.layers.0.")}
    extra = {name.replace("layers.0.", "layers.2."): shape for name, shape in dense.items()}
    extra |= {f"model.layers.2.{name}.weight": (64,) for name in ("enorm", "hnorm", "transformer.shared_head.norm")}
    extra |= {
        "model.layers.2.eh_proj.weight": (64, 128),
        "model.layers.2.transformer.shared_head.output.weight": (258, 64),
    }
    source = write_checkpoint(tmp_path / "in", {**tensors, **random_tensors(extra)}, config)
    checkpoint = Checkpoint.open(source)
    layout = layout_of(checkpoint.config, checkpoint.tensors)
    assert (layout.unknown, layout.moe_layers, layout.mtp_layers, layout.top_k) == ((), (1,), 1, 2)
    assert verify(source).problems == ()
    out = read_checkpoint(pruned(source, tmp_path / "out", Manifest(keep={1: (0, 2, 5)})))
    assert extra.keys() <= out.keys()
    assert out["model.layers.1.moe.up_proj.weight"].shape == (3, 32, 64)
    assert Checkpoint.open(tmp_path / "out").config["moe_num_experts"] == 3
