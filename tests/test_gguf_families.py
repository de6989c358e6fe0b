"""Every family as llama.cpp has it: its tensors and keys are those of the converter, its logits those of transformers.

`MADE` holds what that converter made of the checkpoints that `checkpoint` makes: a digest of every tensor in float32,
and one of every key. They were recorded with llama.cpp's convert_hf_to_gguf.py at 0c1e57098, told to take tokenizers as
they are in tokenizer.json; `MORE` and `OTHER` are what differs on purpose, and why. Jamba's decay rates are ours:
those of the converter differ in the last bit, as torch rounds e^x otherwise from machine to machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from config_changes import changed, changes, edited, taken
from gguf_families import (
    MADE,
    MORE,
    OTHER,
    OVER,
    checkpoint,
    digest_of_keys,
    digest_of_tensors,
    keys_of,
    values_of,
    viewed,
    with_mtp,
)
from ggufs import read_gguf
from llama import Llama
from strategies import ALL, picked
from test_gguf_outputs import done, to_gguf
from test_verify_gguf import opened

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import PlanError, SchemeError
from shardxform.execution.runner import run
from shardxform.formats.scheme import Grid, Scheme
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.slabs import plan_prune_gguf
from shardxform.plan.view import GgufOptions, ViewOptions
from shardxform.runtimes.gguf.metadata import metadata_of
from shardxform.verification import verify

# -- families ----------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize("family", picked(sorted(OVER), 5))
def test_tensors_and_keys_are_those_of_the_converter(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    root = checkpoint(family, tmp_path)
    view, architecture = viewed(root)
    tensors = values_of(root, architecture.tensors(view.checkpoint.tensors))
    keys = keys_of(root)
    others = (*MORE.get(family, ()), *OTHER.get(family, ()))
    assert (digest_of_tensors(tensors), digest_of_keys(keys, others)) == MADE[family]
    for key in MORE.get(family, ()):
        assert [value for name, (value, _) in keys.items() if name.endswith(key)] in (
            [1 + (family != "deepseek_v2")],
            [True],
        )


@pytest.mark.oracle
@pytest.mark.parametrize("family", picked(sorted(OVER), 6))
def test_llama_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    """Every tensor is where llama.cpp looks for it, and means what it means there."""
    root = checkpoint(family, tmp_path)
    assert divergence(logits_of(family, root), root) <= (1e-8 if family == "gemma4_text" else 2e-10)


IDS = [1 + at * 37 % 249 for at in range(24)]


def logits_of(family: str, root: Path) -> Any:
    """What transformers computes, as log-probabilities."""
    torch = pytest.importorskip("torch")
    import any_moe

    model, _ = any_moe.load(root, torch.float32, OVER[family].get("class_name", ""))
    model = any_moe.of_text(model)
    if family == "gemma4_text":
        look_gelu_up(torch, model)
    with torch.no_grad():
        return torch.log_softmax(model.eval()(torch.tensor([IDS])).logits[0].double(), -1)


def divergence(wanted: Any, root: Path) -> float:
    """Mean KL divergence of llama.cpp from transformers, of a checkpoint whose values it is given in float32.

    Most is rounding of float32, in transformers' own computation: of a delta net whose heads have 16 channels it is
    2e-10 and 1e-9 (qwen3_5_moe, qwen3_next, the worst position) from its own in float64, llama.cpp is 1e-10 and 2e-10
    from that. Of gemma4, values next to the edge of two entries of the table fall into the other one.
    """
    torch = pytest.importorskip("torch")
    from gguf import GGUFValueType, GGUFWriter
    from llama import Llama

    view, architecture = viewed(root)
    tensors = list(architecture.tensors(view.checkpoint.tensors))
    path = root.parent / "out.gguf"
    writer = GGUFWriter(path, architecture.name)
    for key in metadata_of(architecture, tensors, root, name="x", file_type=0, pre_tokenizer="gpt-2")[1:]:
        writer.add_key_value(key.name, key.value, GGUFValueType[key.type], GGUFValueType[key.of] if key.of else None)
    for name, values in values_of(root, tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Llama(path) as llama:
        found = torch.log_softmax(torch.from_numpy(llama.logits(IDS)).double(), -1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


BY_DAY = (
    ("qwen3_moe", "rotated: yarn and its magnitude"),
    ("deepseek_v3", "rotated: yarn"),
    ("glm4_moe", "missing: norm_topk_prob"),
)


@pytest.mark.oracle
@pytest.mark.parametrize(("family", "kind"), changes([name for name in sorted(OVER) if name != "kimi_k2"], BY_DAY))
def test_a_config_that_is_changed_is_run_as_it_is_meant_or_refused(family: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    over, told, without = changed(family, kind, OVER[family])
    with taken():
        root = edited(checkpoint(family, tmp_path, **over), told, without)
        wanted = logits_of(family, root)
    try:
        found = divergence(wanted, root)
    except PlanError as e:
        assert "unknown to family" in str(e)  # noqa: PT017
    except SchemeError as e:
        assert "config.json" in str(e) or "llama.cpp" in str(e)  # noqa: PT017
    else:
        assert found <= (1e-7 if family == "gemma4_text" else 1e-8)


PREDICTING = (
    *("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "deepseek_v32", "qwen3_5_moe", "qwen3_next"),
    *("deepseek_v3", "ernie4_5_moe", "exaone_moe", "glm4v_moe", "hy_v3", "mimo_v2_flash", "nemotron_h"),
)
"""Families whose releases have layers that predict further tokens: blocks of the first six, left out of the others."""


@pytest.mark.oracle
@pytest.mark.parametrize("family", PREDICTING if ALL else PREDICTING[:1])
def test_layers_that_predict_further_tokens_leave_the_others_as_they_are(family: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    root = with_mtp(checkpoint(family, tmp_path))
    view, architecture = viewed(root)
    written = [each.name for each in architecture.tensors(view.checkpoint.tensors) if ".nextn." in each.name]
    assert bool(written) == (architecture.nextn == 1) == (family in PREDICTING[:6])
    assert divergence(logits_of(family, root), root) <= 2e-10


TOLD: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("mimo_v2_flash", {"sliding_window_size": 5}, ()),
    ("mimo_v2_flash", {}, ("attention_value_scale",)),
    ("laguna", {"n_group": 2, "topk_group": 1}, ()),
    ("jamba", {"topk_group": 1}, ()),
)
"""Keys of older or of other classes, what is said beside, and what is not."""


@pytest.mark.oracle
@pytest.mark.parametrize(("family", "told", "without"), TOLD if ALL else TOLD[:3])
def test_keys_beside_a_config_are_run_as_its_class_takes_them(
    family: str, told: dict[str, Any], without: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    over = {**OVER[family], **({"attention_value_scale": 0.707} if without else {})}
    root = edited(checkpoint(family, tmp_path, **over), told, without)
    assert divergence(logits_of(family, root), root) <= 2e-10


def look_gelu_up(torch: Any, model: Any) -> None:
    """Compute GELU as llama.cpp does on the CPU, from a table of float16, which alone is a divergence of 1e-6."""

    class Table(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            value = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
            return torch.where(x <= -10, 0, torch.where(x >= 10, x, value))

    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = Table()


# -- pruned and rounded --


@pytest.mark.oracle
@pytest.mark.parametrize("family", picked(sorted(OVER), 8))
def test_experts_of_every_family_go_before_or_after(family: str, tmp_path: Path) -> None:
    """Pruned on the way into GGUF, a checkpoint is what its GGUF is after pruning, and what llama.cpp runs."""
    pytest.importorskip("torch")
    source, gguf = checkpoint(family, tmp_path), GgufOptions(pre_tokenizer="gpt-2")
    layers, options = viewed(source)[1].layout.moe_layers, ViewOptions(max_shard_bytes=1 << 30, gguf=gguf)
    manifest = Manifest(keep={layer: (layer % 2, 2, 4, 5) for layer in layers})
    done(plan_prune(Checkpoint.open(source), manifest, options), tmp_path / "one")
    done(to_gguf(source), tmp_path / "whole")
    done(plan_prune_gguf(opened(tmp_path / "whole"), manifest), tmp_path / "two")
    for out, against in (("one", source), ("two", tmp_path / "whole")):
        assert verify(tmp_path / out, source=against, independent=True).problems == ()
    one, two = (read_gguf(tmp_path / out / "model.gguf") for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)
    scheme = Scheme(grid=Grid(bits=4, group_size=32), format="gguf")
    done(plan_quantize(Checkpoint.open(source), scheme, manifest, options), tmp_path / "rounded")
    assert verify(tmp_path / "rounded", source=source, independent=True).problems == ()
    run(plan_prune(Checkpoint.open(source), manifest), tmp_path / "pruned")
    assert divergence(logits_of(family, tmp_path / "pruned"), tmp_path / "pruned") <= 1e-8
    with Llama(tmp_path / "rounded" / "model.gguf") as llama:
        assert np.isfinite(llama.logits([1, 2, 3])).all()
