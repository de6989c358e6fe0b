"""What clients read in quantization configs, held against the code of transformers and of the libraries it calls.

One tree of modules on the meta device, as checkpoints name them; every rule is asked about every module of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.utils.match import match_named_modules
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import AwqConfig, FineGrainedFP8Config

from shardxform.verification.quantized import Asked, readers_of

ATTENTION = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "linear_attn.in_proj_a",
    "linear_attn.out_proj",
)
EXPERT = ("gate_proj", "up_proj", "down_proj")


def asked_of(prefix: str) -> Iterator[Asked]:
    """Modules of a model of two blocks with three experts, an MTP layer, and a vision tower under the longer prefix."""
    yield Asked(f"{prefix}embed_tokens", kind="Embedding")
    blocks = [f"{prefix}layers.{layer}" for layer in (0, 1, 11)]
    for block in (*blocks, "mtp.layers.0"):
        yield from (Asked(f"{block}.{name}") for name in ATTENTION)
        for expert in range(3):
            yield from (Asked(f"{block}.mlp.experts.{expert}.{each}", f"{block}.mlp.experts") for each in EXPERT)
        yield from (Asked(f"{block}.mlp.shared_expert.{each}") for each in EXPERT)
        yield Asked(f"{block}.mlp.shared_expert_gate")
    if prefix != "model.":
        yield from (Asked(f"model.visual.blocks.0.{name}") for name in ("attn.qkv", "mlp.linear_fc1"))
        yield Asked("model.visual.merger.linear_fc1")
    yield Asked("lm_head")


class Tree(nn.Module):
    """Modules under the names asked about."""

    def __init__(self, asked: list[Asked]) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="tree", text_config=None)
        self.all_tied_weights_keys: dict[str, str] = {}
        with torch.device("meta"):
            for each in asked:
                home: nn.Module = self
                *parents, last = each.name.split(".")
                for part in parents:
                    if part not in home._modules:
                        home.add_module(part, nn.Module())
                    home = home.get_submodule(part)
                home.add_module(last, nn.Embedding(8, 8) if each.kind == "Embedding" else nn.Linear(8, 8, bias=False))

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.get_submodule("lm_head")

    def tie_weights(self) -> None:
        """It is tied to nothing."""


PREFIXES = ("model.", "model.language_model.")
ASKED = {prefix: list(asked_of(prefix)) for prefix in PREFIXES}
TREES = {prefix: Tree(asked) for prefix, asked in ASKED.items()}


def said(declared: dict[str, Any], prefix: str, reader: int = 0) -> set[str]:
    """Modules that a reader takes for quantized."""
    reads = readers_of(declared, {"tie_word_embeddings": False})[reader]
    return {asked.name for asked in ASKED[prefix] if reads(asked)}


# -- compressed-tensors -----------------------------------------------------------------------------------------------

TARGETS: list[list[str]] = [
    ["Linear"],
    ["Linear", "Embedding"],
    ["Module"],
    ["re:.*q_proj"],
    ["re:.*self_attn.*", r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"],
    ["model.layers.1.self_attn.q_proj", "lm_head"],
    ["re:model.layers.1"],
    ["model.layers.1.mlp.experts"],
    [],
]
IGNORED: list[list[str]] = [
    [],
    ["lm_head"],
    ["lm_head", "re:.*mlp.gate$", "re:.*visual.*", "re:.*mtp.*"],
    ["re:.*layers\\.1\\..*", "model.layers.11"],
    ["Linear"],
    ["re:.*experts.2.*", "re:(", "re:q_proj"],
    ["model.layers.0.self_attn", "re:model[.]layers[.]0[.]self_attn"],
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("targets", TARGETS)
def test_compressed_tensors(targets: list[str], prefix: str) -> None:
    for ignore in IGNORED:
        valid = [each for each in ignore if each != "re:("]  # which its own code does not survive
        wanted = {name for name, _ in match_named_modules(TREES[prefix], targets, valid)}
        group = {"targets": targets, "weights": {"num_bits": 4}}
        declared = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ignore}
        assert said(declared, prefix) == wanted & {asked.name for asked in ASKED[prefix]}, ignore


def test_groups_of_compressed_tensors_are_joined_and_those_without_weights_say_nothing() -> None:
    groups = {
        "a": {"targets": ["re:.*q_proj"], "weights": {"num_bits": 8}},
        "b": {"targets": ["re:.*k_proj"], "weights": {"num_bits": 4}},
        "c": {"targets": ["Linear"], "weights": None, "input_activations": {"num_bits": 8}},
    }
    found = said({"quant_method": "compressed-tensors", "config_groups": groups}, "model.")
    assert found == {name for asked in ASKED["model."] if (name := asked.name).endswith(("q_proj", "k_proj"))}


# -- fp8, awq: transformers' lists ------------------------------------------------------------------------------------

LISTS: list[list[str] | None] = [
    None,
    [],
    ["lm_head"],
    ["mlp.gate", "lm_head", "visual", "mtp"],
    ["model.layers.1", "experts"],
    ["model.layers.1.mlp.experts", "model.layers.0.self_attn.q_proj"],
    ["model.*in_proj_a", "model.language_model.layers.*.linear_attn", "out_proj"],
    ["model.layers.1.mlp.experts.0.gate_proj"],
    ["model.visual", "mtp.layers.0", "shared_expert"],
]


def taken(prefix: str, skipped: list[str] | None, *, of_experts: bool) -> set[str]:
    """Modules that transformers replaces, by its own test of names; experts go as one module where they are one."""
    names = {asked.name: asked.whole if of_experts else asked.name for asked in ASKED[prefix] if asked.kind == "Linear"}
    return {name for name, whole in names.items() if should_convert_module(whole, skipped)}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("listed", LISTS, ids=str)
def test_fp8(listed: list[str] | None, prefix: str) -> None:
    declared = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": listed}
    config = FineGrainedFP8Config(weight_block_size=(128, 128), modules_to_not_convert=listed)
    tree: Any = TREES[prefix]
    skipped = HfQuantizer.get_modules_to_not_convert(tree, config.modules_to_not_convert, None)
    assert said(declared, prefix) == taken(prefix, skipped, of_experts=True)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("listed", LISTS, ids=str)
def test_awq(listed: list[str] | None, prefix: str) -> None:
    config = AwqConfig(bits=4, modules_to_not_convert=listed)
    tree: Any = TREES[prefix]
    skipped = HfQuantizer.get_modules_to_not_convert(tree, config.modules_to_not_convert, None, add_default_skips=True)
    found = said({"quant_method": "awq", "bits": 4, "modules_to_not_convert": listed}, prefix)
    assert found == taken(prefix, skipped, of_experts=False)


def test_vllm_reads_fp8_lists_by_whole_names_and_never_the_head() -> None:
    listed = ["model.layers.1.mlp.experts.0.gate_proj", "model.layers.0.self_attn.q_proj", "self_attn.k_proj"]
    found = said({"quant_method": "fp8", "ignored_layers": listed}, "model.", reader=1)
    left = {asked.name for asked in ASKED["model."]} - found
    experts = {f"model.layers.1.mlp.experts.{e}.{each}" for e in range(3) for each in EXPERT}
    assert left == {"model.embed_tokens", "lm_head", "model.layers.0.self_attn.q_proj", *experts}


# -- auto-round, gptq: auto-round's loader ----------------------------------------------------------------------------

WIDE = {"bits": 16, "data_type": "float"}
LOADED: list[dict[str, Any]] = [
    {},
    {"block_name_to_quantize": ["model.layers"]},
    {"block_name_to_quantize": "model.layers,mtp.layers"},
    {"block_name_to_quantize": "model.layers.1"},
    {"extra_config": {".*self_attn.*": WIDE, "model.layers.1.self_attn.q_proj": {"bits": 8}}},
    {"extra_config": {"mlp.experts": WIDE, ".*experts\\.1\\..*": {"bits": 4}}},
    {"extra_config": {".*experts\\.1\\..*": {"bits": 4}, "mlp.experts": WIDE}},
    {"extra_config": {"lm_head": {"bits": 4}, "model.layers.0.mlp.shared_expert_gate": WIDE}},
    {"extra_config": {"(": WIDE, "model.layers.0.mlp.shared_expert": {"data_type": "int"}}},
    {
        "modules_to_not_convert": ["self_attn", "lm_head"],
        "extra_config": {"model.layers.1.self_attn.q_proj": {"bits": 4}},
    },
    {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.experts"]]},
    {
        "modules_in_block_to_quantize": ["self_attn.q_proj"],
        "extra_config": {"model.layers.0.self_attn.k_proj": {"bits": 4}},
    },
    {"dynamic": {"-:.*self_attn.*": {}, "-:mtp.*": {}}},
    {"dynamic": {r"-:model\\.layers\\.1\\..*": {}, "+:.*lm_head$": {"bits": 4}}},
    {"dynamic": {"-:lm_head": {}, "lm_head": {}, "+:.*q_proj": {}, "-:.*_proj": {}}},
]


@pytest.mark.parametrize("config", LOADED, ids=str)
def test_the_loader_of_auto_round(config: dict[str, Any]) -> None:
    from auto_round.inference.convert_model import check_to_quantized, get_layer_config

    names = ("model.layers", "mtp.layers") if "block_name_to_quantize" not in config else ()
    blocks = {"block_name_to_quantize": list(names)} if names else {}
    declared = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, **blocks, **config}
    own: Any = SimpleNamespace(**{"extra_config": {}, **declared})
    own.extra_config = dict(own.extra_config)
    found = get_layer_config(TREES["model."], own)
    known = {asked.name for asked in ASKED["model."] if asked.kind == "Linear"}
    assert said(declared, "model.") == {name for name, each in found.items() if check_to_quantized(each)} & known


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dynamic", [{}, {"-:lm_head": {}}, {"-:.*experts.*": {}, "+:.*": {"bits": 8}}], ids=str)
def test_gptq_is_read_by_flag_rules_and_modules_of_a_block(head: bool, dynamic: dict[str, Any]) -> None:
    declared = {"quant_method": "gptq", "bits": 4, "lm_head": head, "dynamic": dynamic}
    linear = {asked.name for asked in ASKED["model."] if asked.kind == "Linear"}
    left = {name for name in linear if ".experts." in name} if len(dynamic) > 1 else set()
    left |= {"lm_head"} if not head or "-:lm_head" in dynamic else set()
    assert said(declared, "model.") == linear - left
    assert ("lm_head" in said(declared, "model.", reader=1)) == head
    inside = {**declared, "dynamic": {}, "modules_in_block_to_quantize": [["self_attn.q_proj"]]}
    wanted = {name for name in linear if name.endswith("self_attn.q_proj")} | ({"lm_head"} if head else set())
    assert said(inside, "model.") == said(inside, "model.", reader=1) == wanted
