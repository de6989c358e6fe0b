"""Every family as llama.cpp has it: its tensors and keys are those of the converter, its logits those of transformers.

`MADE` holds what that converter made of the checkpoints that `checkpoint` makes: a digest of every tensor in float32,
and one of every key. They were recorded with llama.cpp's convert_hf_to_gguf.py at 0c1e57098, told to take tokenizers as
they are in tokenizer.json; `MORE` and `OTHER` are what differs on purpose, and why.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
)
from strategies import picked

from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.metadata import metadata_of

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
        assert [value for name, (value, _) in keys.items() if name.endswith(key)] in ([2], [True])


@pytest.mark.oracle
@pytest.mark.parametrize("family", picked(sorted(OVER), 6))
def test_llama_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    """Every tensor is where llama.cpp looks for it, and means what it means there."""
    root = checkpoint(family, tmp_path)
    assert divergence(logits_of(family, root), root) <= (1e-8 if family == "gemma4_text" else 1e-10)


IDS = [1 + at * 37 % 249 for at in range(24)]


def logits_of(family: str, root: Path) -> Any:
    """What transformers computes, as log-probabilities."""
    torch = pytest.importorskip("torch")
    import any_moe

    model, _ = any_moe.load(root, torch.float32)
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
    except SchemeError as e:
        assert "config.json" in str(e) or "llama.cpp" in str(e)  # noqa: PT017
    else:
        assert found <= (1e-7 if family == "gemma4_text" else 1e-8)


def look_gelu_up(torch: Any, model: Any) -> None:
    """Compute GELU as llama.cpp does on the CPU, from a table of float16, which alone is a divergence of 1e-6."""

    class Table(torch.nn.Module):  # type: ignore[misc,name-defined]
        def forward(self, x: Any) -> Any:
            value = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
            return torch.where(x <= -10, 0, torch.where(x >= 10, x, value))

    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = Table()
