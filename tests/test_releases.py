"""Releases at full size, as holes: `inspect` knows every tensor, and plans are as large as plain arithmetic says."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import published
from strategies import ALL, by_night

from shardxform.ask.manifest import Manifest, keep_all
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import ManifestError
from shardxform.formats.decoding import decoded
from shardxform.formats.scheme import Scheme
from shardxform.model.layout import layout_of
from shardxform.plan.inspection import inspect_checkpoint
from shardxform.plan.prune import plan_prune
from shardxform.plan.quantize import plan_quantize
from shardxform.plan.view import ViewOptions, pruned_view
from shardxform.runtimes.gguf.architectures import KINDS, architecture_of
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.verification.structure import refuse_unsound

pytestmark = pytest.mark.oracle

EXPERT = re.compile(r"\.experts\.(\d+)\.")
OF_ALL = re.compile(r"\.experts\.(gate_up_proj|down_proj)|\.(gate|router)\.(proj\.)?(weight|bias)$")
OF_ALL_TOO = re.compile(r"e_score_correction_bias$|expert_bias$|per_expert_scale$|feed_forward\.router\.weight$")
OF_ALL_OTHERWISE = re.compile(
    r"block_sparse_moe\.(in|out)put_linear\.weight$|router\.layer\.weight$|gate\.wg\.weight$|ffn\.experts\.mlp\.(w1|v1|w2)$"
)
LINEAR = re.compile(r"\.((q|k|v|o|q_a|q_b|gate|up|down)_proj|kv_a_proj_with_mqa|w[123])\.weight$")
QUANTIZED = ("DeepSeek-V2-Lite", "DeepSeek-V3", "GLM-4.7-Flash", "MiniMax-M2", "Mixtral-8x7B-v0.1")
NIGHTLY = (  # alike to others, or the largest; of each some is held in quicker ones
    "DBRX-Instruct",
    "DeepSeek-V3",
    "DeepSeek-V3.1",
    "DeepSeek-V3.2",
    "GLM-4.5",
    "GLM-4.5V",
    "GLM-5",
    "GLM-5.2",
    "Hunyuan-A13B",
    "Hy3",
    "K-EXAONE-236B-A23B",
    "Kimi-K2-Instruct",
    "Kimi-K2.6",
    "Kimi-Linear-48B-A3B",
    "Laguna-XS.2",
    "Ling-3.0-flash",
    "Llama-4-Scout-17B-16E",
    "Mellum2.1-12B-A2.5B",
    "MiMo-V2-Flash",
    "MiniMax-M2",
    "MiniMax-M3",
    "North-Mini-Code-1.0",
    "OLMoE-1B-7B-0924",
    "Phi-3.5-MoE",
    "Qwen2-57B-A14B",
    "Qwen3-235B-A22B",
    "Qwen3-30B-A3B",
    "Qwen3-Next-80B-A3B",
    "Solar-Open-100B",
    "Trinity-Nano-Preview",
    "dots.llm1",
    "gpt-oss-120b",
)
BLOCKS = 5
USES_ALL = ("FlexOlmo-7x7B-1T",)
"""Releases whose tokens go through all experts, so that none can go."""

QUANTIZED_RELEASES = {"DeepSeek-V3": 688.6, "Kimi-K2.6": 594.0, "MiniMax-M2": 230.1, "gpt-oss-120b": 65.2}
"""Gigabytes of releases in FP8, in integers of 4 bits, in FP8 and in MXFP4."""

GROUPS = {
    "Gemma-4-26B-A4B": (64, "quantize to W4A16 in groups of 64"),
    "Mixtral-8x7B-v0.1": (128, "quantize to W4A16"),
    "gpt-oss-20b": (64, "quantize to W4A16 in groups of 64, rounding 4 bits again"),
}


@dataclass(frozen=True)
class Case:
    """A release on disk."""

    name: str
    release: published.Release
    shapes: dict[str, tuple[int, ...]]
    tensors: published.Tensors
    source: Checkpoint


@pytest.fixture(
    scope="module",
    params=[name for name in published.RELEASES if ALL or name not in NIGHTLY],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    name = request.param
    shapes = published.shapes_of(name)
    tensors = published.tensors_of(name, shapes)
    root = published.write(tmp_path_factory.mktemp("releases") / name, published.config_of(name), tensors)
    yield Case(name, published.RELEASES[name], shapes, tensors, Checkpoint.open(root))
    shutil.rmtree(root)


def test_every_config_is_of_a_family_and_held_at_full_size_but_for_those_named() -> None:
    files = {path.stem for path in published.HOME.glob("*.json")}
    assert files == published.RELEASES.keys() | set(published.NAMED_OTHERWISE)
    assert not published.RELEASES.keys() & set(published.NAMED_OTHERWISE)
    for name in files:
        assert layout_of(published.config_of(name), ()).moe_layers, name


def test_names_are_as_many_as_in_the_release(case: Case) -> None:
    if case.release.tensors:
        assert len(case.tensors) == case.release.tensors
        assert sum(math.prod(shape) for _, shape in case.tensors.values()) == case.release.elements


def test_every_tensor_is_known_and_parameters_are_those_published(case: Case) -> None:
    found = inspect_checkpoint(case.source)
    assert found.unknown == ()
    assert found.parameters == pytest.approx(case.release.parameters, rel=0.015)
    assert found.nbytes == sum(published.nbytes(*spec) for spec in case.tensors.values())


@by_night
def test_every_tensor_has_a_place_in_llama_cpp(case: Case) -> None:
    """As many experts in each stack as there are, every name once, and keys that say of the config what they must."""
    gguf, source = pytest.importorskip("gguf"), case.source
    layout = layout_of(source.config, source.tensors)
    if layout.family.name not in KINDS or case.name == "Kimi-K2.6":  # of integers, which have no weights by name
        pytest.skip("not written as GGUF, or not of weights")
    source = decoded(source) or source
    if "max_position_embeddings" not in layout.text:  # of what of a config is in the fixture
        source = replace(source, config={"max_position_embeddings": 1 << 17, **source.config})
    view = pruned_view(source, None)
    architecture = architecture_of(view.layout)
    architecture.kind.check(architecture)
    architecture.kind.keys(architecture, Recorder(architecture.name, gguf))
    found = list(architecture.tensors(view.checkpoint.tensors))
    assert len({named.name for named in found}) == len(found)
    counted = [named.shape[0] for named in found if "_exps.weight" in named.name]
    assert set(counted) == {layout.num_experts}
    assert len(counted) >= 2 * len(layout.moe_layers)


def test_half_the_experts_are_half_their_bytes(case: Case) -> None:
    if case.name in USES_ALL:
        with pytest.raises(ManifestError, match="but the router picks 7 per token"):
            plan_prune(case.source, halved(case.source))
        return
    assert_halved(case.source, case.tensors)


@pytest.mark.parametrize(("name", "gigabytes"), QUANTIZED_RELEASES.items())
def test_codes_and_scales_are_cut_alike_in_the_first_blocks(name: str, gigabytes: float, tmp_path: Path) -> None:
    """Of as many as are of every kind by day, of all by night."""
    shapes = published.shapes_of(name, 0 if ALL else BLOCKS)
    tensors = published.tensors_of(name, shapes)
    if ALL:
        assert sum(published.nbytes(*spec) for spec in tensors.values()) == pytest.approx(gigabytes * 1e9, rel=0.005)
    root = published.write(tmp_path / name, published.config_of(name, 0 if ALL else BLOCKS), tensors)
    source = Checkpoint.open(root)
    assert inspect_checkpoint(source).unknown == ()
    assert_halved(source, tensors)


def test_four_bits_are_as_many_bytes_as_words_and_scales(case: Case) -> None:
    if case.name not in QUANTIZED:
        pytest.skip("a second each")
    layout = layout_of(case.source.config, case.source.tensors)
    scheme = Scheme.preset("W4A16", format=layout.family.formats[0])
    assert plan_quantize(case.source, scheme).data_bytes == sum(quantized(case, scheme.format, layout.blocks))


def test_the_outlook_is_in_groups_that_experts_fit(case: Case) -> None:
    if case.name not in GROUPS:
        pytest.skip("seen in others")
    group_size, label = GROUPS[case.name]
    formats = layout_of(case.source.config, case.source.tensors).family.formats
    scheme = replace(Scheme.preset("W4A16", format=formats[0], group_size=group_size), requantize=True)
    assert inspect_checkpoint(case.source).outlook[label] == plan_quantize(case.source, scheme).data_bytes


def quantized(case: Case, format: str, blocks: str) -> Iterator[int]:  # noqa: A002
    """Bytes of every weight: four bits an element, and scales and zeros of 128 each, or 16 bits."""
    layers = case.source.config["num_hidden_layers"]
    for name, shape in case.shapes.items():
        size = math.prod(shape)
        layer = name.removeprefix(blocks).partition(".")[0]
        in_block = name.startswith(blocks) and int(layer) < layers
        if not in_block or not LINEAR.search(name) or shape[1] % 128:
            yield published.nbytes("F32" if re.search(case.release.float32, name) else "BF16", shape)
        elif format == "compressed-tensors":
            yield size // 2 + size // 128 * 2 + 2 * 8
        else:
            yield size // 2 + size // 128 * 2 + size // 128 // 2


def assert_halved(source: Checkpoint, tensors: published.Tensors, options: ViewOptions | None = None) -> None:
    """What is planned for every second expert is what is left of every tensor, by name, dtype and shape."""
    plan = plan_prune(source, halved(source), options)
    refuse_unsound(plan)
    left = dict(pruned(tensors))
    specs = [entry.spec for shard in plan.shards for entry in shard.entries]
    assert {spec.name: (spec.dtype, spec.shape) for spec in specs} == left
    assert plan.data_bytes == sum(published.nbytes(*spec) for spec in left.values())


def halved(source: Checkpoint) -> Manifest:
    """Every second expert of every layer."""
    every = keep_all(layout_of(source.config, source.tensors))
    return Manifest(
        keep={layer: kept[::2] for layer, kept in every.keep.items()},
        mtp_keep={layer: kept[::2] for layer, kept in every.mtp_keep.items()},
        model=every.model,
    )


def pruned(tensors: published.Tensors) -> Iterator[tuple[str, published.Spec]]:
    """What is left when every second expert goes: names as they become, dtypes and shapes."""
    for name, (dtype, shape) in tensors.items():
        match = EXPERT.search(name)
        if match and int(match[1]) % 2:
            continue
        if match:
            name = f"{name[: match.start(1)]}{int(match[1]) // 2}{name[match.end(1) :]}"
        elif name.endswith("moe_statics.e_score_correction_bias"):
            shape = (shape[0], shape[1] // 2)
        elif any(each.search(name) for each in (OF_ALL, OF_ALL_TOO, OF_ALL_OTHERWISE)) and "shared" not in name:
            shape = (shape[0] // 2, *shape[1:])
        yield name, (dtype, shape)
