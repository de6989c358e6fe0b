"""DeepSeek-V4 as it is released: FP8 in blocks beside experts of two codes a byte, every scale a byte, called `.scale`.

At full size from headers and holes, under the names that are published; and a tiny one against a twin in bfloat16.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from build import bf16, read_checkpoint, write_checkpoint
from strategies import ALL

pytest.importorskip("torch")
pytest.importorskip("transformers")

import published
from test_families_slicing import deepseek_v4
from test_releases import assert_halved, halved
from test_small_floats import Tensors, call, fp8_blocks, mxfp4, raw, shards

from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import FamilyError
from shardxform.plan.inspection import inspect_checkpoint
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import ViewOptions

pytestmark = pytest.mark.oracle

RELEASE = "DeepSeek-V4-Flash-0731"
IN_16_BITS = (
    "gate.weight",
    "weights_proj.weight",
    "wgate.weight",
    "compressor.wkv.weight",
    "embed.weight",
    "head.weight",
)
BLOCK = 24
DRAFTS = {"main_norm", "main_proj", "confidence_head", "markov_head"}


# -- at full size -----------------------------------------------------------------------------------------------------


def test_tensors_and_elements_are_those_listed() -> None:
    """165,265,454,782 elements, scales among them, in 155.42 GiB; codes of experts count in pairs."""
    tensors = published.tensors_of_v4(published.config_of(RELEASE))
    assert len(tensors) == 72_317
    assert sum(math.prod(shape) for _, shape in tensors.values()) == 165_265_454_782
    assert sum(published.nbytes(*spec) for spec in tensors.values()) / 2**30 == pytest.approx(155.42, abs=0.005)


@pytest.mark.parametrize("name", published.NAMED_OTHERWISE)
def test_half_the_experts_are_half_their_bytes(name: str, tmp_path: Path) -> None:
    """Of five blocks by day, which are of every kind; what predicts tokens in the second release is not known whole."""
    config = published.config_of(name, 0 if ALL else 5)
    tensors = published.tensors_of_v4(config)
    source = Checkpoint.open(published.write(tmp_path / "in", config, tensors))
    found = inspect_checkpoint(source)
    assert found.unknown == () or "dspark_block_size" in config
    assert {re.sub(r"^mtp\.\d\.", "", tensor).partition(".")[0] for tensor in found.unknown} <= DRAFTS
    assert list(found.encodings) == ["MXFP4 in blocks of 32", "FP8 in blocks of 128 x 128"]
    if found.unknown:
        with pytest.raises(FamilyError, match=r"the config does not allow for .* leave the MTP layers out"):
            plan_prune(source, halved(source))
        tensors = {tensor: spec for tensor, spec in tensors.items() if not tensor.startswith("mtp.")}
    assert_halved(source, tensors, ViewOptions(mtp="drop" if found.unknown else "auto"))


# -- a tiny one -------------------------------------------------------------------------------------------------------


def fp8(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    """In blocks, the last of which are partial, with powers of two for scales."""
    parts, values = fp8_blocks(w, BLOCK)
    scales = parts["weight_scale_inv"].array()
    return {"weight": parts["weight"], "scale": raw("F8_E8M0", (np.log2(scales) + 127).astype(np.uint8))}, values


def fp4(w: np.ndarray) -> tuple[Tensors, np.ndarray]:
    parts, values = mxfp4(w)
    codes, scales = parts["weight_packed"].array(), parts["weight_scale"].array()
    return {"weight": raw("I8", codes), "scale": raw("F8_E8M0", scales)}, values


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A release, and its twin in bfloat16."""
    root = tmp_path_factory.mktemp("v4")
    plain = deepseek_v4(root)
    config, tensors = json.loads((plain / "config.json").read_text()), read_checkpoint(plain)
    stored, values = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) != 2 or not name.endswith(".weight") or name.endswith(IN_16_BITS):
            continue
        parts, decoded = (fp4 if ".ffn.experts." in name else fp8)(tensor.float32())
        del stored[name]
        stored |= {name.removesuffix("weight") + last: part for last, part in parts.items()}
        values[name] = bf16(decoded)
        assert np.array_equal(values[name].float32(), decoded), name
    declared = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [BLOCK, BLOCK]}
    write_checkpoint(root / "twin", values, config)
    write_checkpoint(root / "source", stored, {**config, "expert_dtype": "fp4", "quantization_config": declared})
    return root / "source", root / "twin"


def keep_file(folder: Path) -> Path:
    keep = {"0": [0, 2, 3, 5], "1": [1, 2, 4, 5]}
    value = {"format": "shardxform.keep", "version": 1, "keep": keep, "mtp_keep": {"0": [0, 1, 4, 5]}}
    (folder / "keep.json").write_text(json.dumps(value))
    return folder / "keep.json"


def unsaid(source: Path, out: Path) -> Path:
    """The same, of a config that does not say what experts are, as the first release's did not."""
    config = json.loads((source / "config.json").read_text())
    del config["expert_dtype"]
    return write_checkpoint(out, read_checkpoint(source), config)


@pytest.mark.parametrize("said", [True, False])
def test_rounding_is_that_of_the_twin(said: bool, pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, twin = (pair[0] if said else unsaid(pair[0], tmp_path / "unsaid")), pair[1]
    how = ("-m", keep_file(tmp_path), "--group-size", 32, "--format", "compressed-tensors", "-q")
    assert "--requantize" in call("quantize", source, tmp_path / "no", *how, code=1).output
    for root, out in ((source, tmp_path / "a"), (twin, tmp_path / "b")):
        call("quantize", root, out, *how, "--requantize")
    ours = shards(tmp_path / "a")
    assert ours == shards(tmp_path / "b")
    assert any(name.startswith("mtp.") for name in ours)
    assert sum(name.endswith(".weight_packed") for name in ours) > 2 * 4 * 3
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "expert_dtype" not in config
    call("verify", tmp_path / "a", "--source", source, "--independent")


def test_decoding_is_the_twin_and_pruning_copies(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, twin = pair
    call("convert", source, tmp_path / "plain", "--to", "bf16", "-q")
    assert shards(tmp_path / "plain") == shards(twin)
    call("verify", tmp_path / "plain", "--source", source, "--independent")
    call("prune", source, tmp_path / "out", "-m", keep_file(tmp_path), "-q")
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "out")
    for home, ids in (("layers.0", (0, 2, 3, 5)), ("layers.1", (1, 2, 4, 5)), ("mtp.0", (0, 1, 4, 5))):
        for new, old in enumerate(ids):
            for part in ("w1", "w2", "w3"):
                for last in ("weight", "scale"):
                    name = f"{home}.ffn.experts.{{}}.{part}.{last}"
                    assert after[name.format(new)] == before[name.format(old)]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["expert_dtype"] == "fp4"
    call("verify", tmp_path / "out", "--source", source, "--independent")
