"""Names of modules in quantization configs go where the tensors go, as the clients' own code reads them.

What a config says is asked of transformers' `should_convert_module` and compressed-tensors' `match_name`, and of the
few lines of other clients that are spelled out here. What becomes of a module is spelled out here a second time.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from build import tiny, write_checkpoint

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import PlanError
from shardxform.formats.config_names import _is_numberless
from shardxform.plan.prune import plan_prune
from shardxform.plan.view import ViewOptions

Reads = Callable[[str, str], bool]
"""Whether a string of a config is about a module."""

KEEP = {  # other experts in every layer
    "qwen3_moe": {0: (1, 3, 4), 1: (0, 3, 5), 2: (2, 3, 4)},
    "qwen3_5_moe": {0: (0, 2, 5, 7), 1: (3, 4, 6, 7), 2: (0, 1, 2, 3), 3: (1, 2, 4, 7)},
    "deepseek_v3": {1: (1, 2, 5, 6), 2: (0, 3, 4, 7)},
}


def in_transformers(text: str, module: str) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(module, [text])


def in_compressed_tensors(text: str, module: str) -> bool:
    from compressed_tensors.utils.match import match_name

    return bool(match_name(module, text))


def in_gptq(text: str, module: str) -> bool:
    """GPTQModel and vLLM: `dynamic` holds regular expressions that are matched from the start."""
    return re.match(text[2:] if text[:2] in ("-:", "+:") else text, module) is not None


def in_auto_round(text: str, module: str) -> bool:
    """The loader looks for `extra_config` anywhere in a name, SGLang matches all of it."""
    return re.search(text, module) is not None


def in_sglang(text: str, module: str) -> bool:
    return re.fullmatch(text, module) is not None


def as_prefix(text: str, module: str) -> bool:
    """auto-round's `check_start_with_block_name`."""
    return module.startswith(text)


def as_glob(text: str, module: str) -> bool:
    return fnmatch(module, text)


def as_end(text: str, module: str) -> bool:
    """Transformers, of a string that is the end of a name."""
    return module.endswith(text)


def as_part(text: str, module: str) -> bool:
    """vLLM's reading of AWQ."""
    return text in module


PRUNE, TEXT, BOTH = {"prune": True}, {"text_only": True}, {"prune": True, "text_only": True}
DECODER = "model.language_model.layers."


def source_modules(kind: str) -> list[str]:
    """Every module of a tiny model, experts of fused tensors one by one, and what clients merge."""
    _, tensors = tiny(kind)
    out = {name.removesuffix(".weight").removesuffix(".bias") for name in tensors}
    for name in [name for name in out if name.endswith(".experts.gate_up_proj")]:
        experts = name.removesuffix(".gate_up_proj")
        out |= {f"{experts}.{e}.{p}_proj" for e in range(8) for p in ("gate", "up", "down")}
    out |= {name.replace("q_proj", "qkv_proj") for name in out if name.endswith("self_attn.q_proj")}
    return sorted(out)


def moved(module: str, kind: str, *, prune: bool = False, text_only: bool = False) -> str | None:
    """What a module is called in the output; None when it is dropped."""
    mtp = "model.layers.3" if kind == "deepseek_v3" else "mtp"
    if (prune and (module + ".").startswith(mtp + ".")) or (text_only and module.startswith("model.visual")):
        return None
    if prune and (expert := re.fullmatch(r"(.*layers\.(\d+)\.mlp\.experts)\.(\d+)(\..*)", module)):
        kept = KEEP[kind][int(expert[2])]
        if int(expert[3]) not in kept:
            return None
        module = f"{expert[1]}.{kept.index(int(expert[3]))}{expert[4]}"
    return module.replace("model.language_model.", "model.") if text_only else module


def pruned(root: Path, kind: str, config: Mapping[str, Any], *, prune: bool = False, text_only: bool = False) -> Any:
    """config.json of a tiny model that is planned so, with `config` put over the source's."""
    whole, tensors = tiny(kind)
    for key, value in config.items():
        home, _, last = key.rpartition(".")
        (whole[home] if home else whole)[last] = value
    source = Checkpoint.open(write_checkpoint(root / "s", tensors, whole))
    plan = plan_prune(source, Manifest(keep=KEEP[kind]) if prune else None, ViewOptions(text_only=text_only))
    return json.loads(plan.config)


def selected(strings: Any, reads: Reads, modules: list[str]) -> set[str]:
    return {module for module in modules if any(reads(text, module) for text in strings)}


def hold(kind: str, how: dict[str, bool], reads: Reads, before: Any, after: Any) -> None:
    """The strings select the same modules, by their new names, of all that stay."""
    pairs = [(old, new) for old in source_modules(kind) if (new := moved(old, kind, **how))]
    once, now = (selected(s, reads, [p[at] for p in pairs]) for at, s in enumerate((before, after)))
    assert now == {new for old, new in pairs if old in once}


def fp8_exceptions(kind: str) -> list[str]:
    """Exceptions by their full names, as FP8 releases list them, some experts among them."""
    kinds = ("mlp.gate", "in_proj_a", "in_proj_b", "conv1d", "norm", "visual", "lm_head", "embed_tokens", "mtp.fc")
    return [name for name in source_modules(kind) if any(k in name for k in kinds) or ".experts.3." in name]


LISTS: list[tuple[str, dict[str, bool], str, Any, Reads]] = [
    ("qwen3_5_moe", TEXT, "modules_to_not_convert", fp8_exceptions("qwen3_5_moe"), in_transformers),
    ("qwen3_5_moe", BOTH, "modules_to_not_convert", fp8_exceptions("qwen3_5_moe"), as_part),
    ("qwen3_moe", PRUNE, "ignored_layers", fp8_exceptions("qwen3_moe"), in_transformers),
    ("deepseek_v3", PRUNE, "modules_to_not_convert", fp8_exceptions("deepseek_v3"), in_transformers),
    ("qwen3_5_moe", BOTH, "modules_to_not_convert", ["visual", "mtp", "mlp.gate", "lm_head"], in_transformers),
    ("qwen3_5_moe", TEXT, "modules_to_not_convert", [DECODER + "1", DECODER + "2.mlp.experts"], in_transformers),
    (
        "qwen3_5_moe",
        BOTH,
        "ignore",
        ["re:.*mlp.gate$", "re:.*visual.*", "re:.*mtp.*", "lm_head"],
        in_compressed_tensors,
    ),
    ("qwen3_5_moe", BOTH, "ignore", [r"re:model\.language_model\.layers\.(1|3)\..*_proj"], in_compressed_tensors),
    ("qwen3_5_moe", BOTH, "ignore", [r"re:(model|model\.language_model)\.layers\.3\..*"], in_compressed_tensors),
    ("qwen3_5_moe", BOTH, "ignore", [r"re:model(\.language_model)?\.layers\.3\..*"], in_compressed_tensors),
    ("qwen3_5_moe", PRUNE, "ignore", [f"{DECODER}1.mlp.experts.{e}.up_proj" for e in range(8)], in_compressed_tensors),
    ("qwen3_moe", PRUNE, "ignore", [r"re:.*mlp\.experts\.\d+\.up_proj", r"re:.*experts.*"], in_compressed_tensors),
    ("qwen3_5_moe", BOTH, "exclude_modules", ["model.language_model.layers.0*", "*visual*", "lm_head"], as_glob),
    ("qwen3_5_moe", TEXT, "block_name_to_quantize", ["model.layers", "model.language_model.layers"], as_prefix),
    ("qwen3_5_moe", TEXT, "block_name_to_quantize", ["model.language_model.layers", "model.visual.blocks"], as_prefix),
    ("qwen3_5_moe", TEXT, "modules_in_block_to_quantize", ["mlp.shared_expert.up_proj", "self_attn"], in_auto_round),
]


@pytest.mark.parametrize(("kind", "how", "key", "strings", "reads"), LISTS)
def test_a_list_selects_the_modules_that_it_selected(
    kind: str, how: dict[str, bool], key: str, strings: list[str], reads: Reads, tmp_path: Path
) -> None:
    after = pruned(tmp_path, kind, {"quantization_config": {key: strings}}, **how)["quantization_config"][key]
    hold(kind, how, reads, strings, after)
    both = re.compile(r".*(\?|\|).*")  # patterns that hold under either prefix
    assert not any("language_model" in text and not both.match(text) for text in after if how.get("text_only"))


MAPS: list[tuple[str, dict[str, bool], str, dict[str, Any], Reads]] = [
    (
        "qwen3_5_moe",
        BOTH,
        "extra_config",
        {
            r".*\.mlp\.gate$": {"bits": 16},
            r".*visual.*": {"bits": 16},
            r"model\.language_model\.layers\.0\.linear_attn\.in_proj_(a|b|ba)": {"bits": 16},
            "model.language_model.layers.3.self_attn.q_proj": {"bits": 8},
            "model.language_model.layers.1.mlp.experts.4.up_proj": {"bits": 8},
            "model.language_model.layers.1.mlp.experts.5.up_proj": {"bits": 2},
            "lm_head": {"bits": 16},
        },
        in_auto_round,
    ),
    (
        "qwen3_5_moe",
        BOTH,
        "extra_config",
        {"model.layers": {"bits": 8}, "model.language_model.layers": {"bits": 8}},
        in_auto_round,
    ),
    (
        "qwen3_5_moe",
        BOTH,
        "dynamic",
        {r"-:.*language_model\.layers\.0\.mlp\.gate": {}, r"+:.*\.3\..*q_proj": {"bits": 8}, "-:.*mtp.*": {}},
        in_gptq,
    ),
    ("deepseek_v3", PRUNE, "dynamic", {r"-:.*mlp\.experts\.[0-9]+\.down_proj": {}, "lm_head": {}}, in_gptq),
    (
        "qwen3_moe",
        PRUNE,
        "quantized_layers",
        {f"model.layers.{at}.mlp.experts.{e}.up_proj": {"quant_algo": f"A{e}"} for at in range(3) for e in range(6)},
        in_sglang,
    ),
]


@pytest.mark.parametrize(("kind", "how", "key", "rules", "reads"), MAPS)
def test_an_object_says_of_modules_what_it_said(
    kind: str, how: dict[str, bool], key: str, rules: dict[str, Any], reads: Reads, tmp_path: Path
) -> None:
    after = pruned(tmp_path, kind, {"quantization_config": {key: rules}}, **how)["quantization_config"][key]
    for old in source_modules(kind):
        if new := moved(old, kind, **how):
            once = [value for text, value in rules.items() if reads(text, old)]
            now = [value for text, value in after.items() if reads(text, new)]
            assert once == now or {str(value) for value in once} == {str(value) for value in now}, (old, new)
    assert "language_model" not in json.dumps(after) or not how.get("text_only")


def test_full_names_of_experts_are_renumbered_or_dropped(tmp_path: Path) -> None:
    """Keys and values, at any depth, of a module and of a tensor, and nothing else."""
    name = "model.layers.{}.mlp.experts.{}.{}"
    declared = {
        "quant_method": "fp8",
        "bits": 8,
        "modules_to_not_convert": [name.format(1, 3, "up_proj"), name.format(1, 4, "up_proj"), "lm_head"],
        "config_groups": {"group_0": {"targets": [name.format(1, 5, "up_proj.weight")], "format": None}},
        "quantized_layers": {name.format(2, 2, "down_proj"): {"like": name.format(0, 4, "gate_proj"), "x": [1, 2.5]}},
    }
    after = pruned(tmp_path, "qwen3_moe", {"quantization_config": declared}, **PRUNE)["quantization_config"]
    assert after == {
        "quant_method": "fp8",
        "bits": 8,
        "modules_to_not_convert": [name.format(1, 1, "up_proj"), "lm_head"],
        "config_groups": {"group_0": {"targets": [name.format(1, 2, "up_proj.weight")], "format": None}},
        "quantized_layers": {name.format(2, 0, "down_proj"): {"like": name.format(0, 2, "gate_proj"), "x": [1, 2.5]}},
    }


@pytest.mark.parametrize(
    "pattern",
    [
        r"re:.*mlp\.experts\.3\..*",
        r"re:.*mlp\.experts\.(1|2)\..*",
        r"re:.*experts.[0-3]..*",
        r"re:.*\.3\.up_proj",
        r"re:model\.layers\.1\.mlp\.experts\.3\.up_proj",
        r"-:.*\.experts\.3\.",
        r".*experts\.[^3]\..*",
        "*.experts.3.*",
        "experts.3.up_proj",
    ],
)
@pytest.mark.parametrize("shape", ["list", "key", "value"])
def test_a_pattern_that_tells_experts_apart_is_refused(pattern: str, shape: str, tmp_path: Path) -> None:
    """Expert 3 becomes expert 1 of two layers, and expert 1 or 2 may be another one."""
    values = {"list": {"ignore": [pattern]}, "key": {"dynamic": {pattern: {}}}, "value": {"ignore": {"of": pattern}}}
    with pytest.raises(PlanError, match=r"quantization_config\.\S+ .* would not mean the same modules .*full names"):
        pruned(tmp_path, "qwen3_moe", {"quantization_config": values[shape]}, **PRUNE)


@pytest.mark.parametrize(
    "pattern", [r"re:.*language_model.*", r"re:.*guage_model\.layers.*", r"re:(model\.){1}lang[a-z_]+\.layers.*"]
)
def test_a_pattern_of_the_old_prefix_that_has_no_other_form_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"text_config\.\S*ignore|quantization_config\.ignore"):
        pruned(tmp_path, "qwen3_5_moe", {"quantization_config": {"ignore": [pattern, "lm_head"]}}, **TEXT)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
@pytest.mark.parametrize("home", ["", "text_config."])
def test_every_declaration_is_carried_and_renamed(key: str, home: str, tmp_path: Path) -> None:
    name = "model.language_model.layers.0.mlp.gate"
    out = pruned(tmp_path, "qwen3_5_moe", {home + key: {"ignore": [name]}}, **TEXT)
    assert out[key] == {"ignore": ["model.layers.0.mlp.gate"]}
    other = pruned(
        tmp_path / "pruned", "qwen3_5_moe", {home + key: {"ignore": [f"{DECODER}0.mlp.experts.2.up_proj"]}}, **PRUNE
    )
    assert (other["text_config"] if home else other)[key] == {"ignore": [f"{DECODER}0.mlp.experts.1.up_proj"]}


def test_declarations_that_differ_are_refused_and_an_empty_one_hides_none(tmp_path: Path) -> None:
    one, two = {"quant_method": "fp8"}, {"quant_method": "awq"}
    for above in (None, {}, one):
        both = {"quantization_config": above, "text_config.quantization_config": one}
        assert pruned(tmp_path / str(above), "qwen3_5_moe", both, **TEXT)["quantization_config"] == one
    both = {"quantization_config": two, "text_config.quantization_config": one}
    with pytest.raises(PlanError, match="quantization_config and that of the text config differ"):
        pruned(tmp_path / "differ", "qwen3_5_moe", both, **TEXT)


def test_what_names_no_module_stays_as_it_is(tmp_path: Path) -> None:
    declared = {
        "quant_method": "compressed-tensors",
        "version": "0.3.1",
        "format": "float-quantized",
        "a": {"3": "1", "experts": 3, "visual": None},
        "targets": ["Linear"],
        "nothing": [],
        "nested": [["model.layers.9.mlp.gate"], 3, None, [["x"]]],
        "note": "(unfinished [pattern",
    }
    assert pruned(tmp_path, "qwen3_moe", {"quantization_config": declared}, **PRUNE)["quantization_config"] == declared
    other = pruned(tmp_path / "text", "qwen3_5_moe", {"quantization_config": declared}, **TEXT)
    assert other["quantization_config"] == declared


def test_names_of_blocks_that_are_all_dropped_are_refused(tmp_path: Path) -> None:
    """An empty list of what to quantize means everything."""
    for value in (["model.visual.blocks"], "model.visual.blocks"):
        declared: dict[str, Any] = {"quantization_config": {"block_name_to_quantize": value}}
        with pytest.raises(PlanError, match=r"block_name_to_quantize.*names only what is dropped"):
            pruned(tmp_path / type(value).__name__, "qwen3_5_moe", declared, **TEXT)
    declared = {"quantization_config": {"block_name_to_quantize": "model.visual.blocks,model.language_model.layers"}}
    out = pruned(tmp_path / "both", "qwen3_5_moe", declared, **TEXT)
    assert out["quantization_config"]["block_name_to_quantize"] == "model.layers"


def test_two_keys_that_become_one_and_differ_are_refused(tmp_path: Path) -> None:
    rules = {"model.layers.0.mlp.gate": {"bits": 8}, "model.language_model.layers.0.mlp.gate": {"bits": 4}}
    with pytest.raises(PlanError, match=r"quantization_config\.extra_config"):
        pruned(tmp_path, "qwen3_5_moe", {"quantization_config": {"extra_config": rules}}, **TEXT)


def test_an_expert_of_many_is_not_taken_for_the_beginning_of_another(tmp_path: Path) -> None:
    """12 experts: `experts.1` is how `experts.10` begins, in readings that take parts of names."""
    config, tensors = tiny("qwen3_moe", num_experts=12)
    names = [f"model.layers.0.mlp.experts.{e}" for e in (1, 10)]
    for value, refused in ((names[:1], True), ([name + ".up_proj" for name in names], False)):
        config["quantization_config"] = {"modules_to_not_convert": value}
        source = Checkpoint.open(write_checkpoint(tmp_path / str(refused), tensors, config))
        manifest = Manifest(keep=dict.fromkeys(range(3), (1, 9, 10, 11)))
        if refused:
            with pytest.raises(PlanError, match=r"experts\.1' would not mean the same"):
                plan_prune(source, manifest)
        else:
            after = json.loads(plan_prune(source, manifest).config)["quantization_config"]["modules_to_not_convert"]
            assert after == [f"model.layers.0.mlp.experts.{e}.up_proj" for e in (0, 2)]


def test_what_is_taken_for_numberless_means_the_same_of_any_numbers() -> None:
    """Every string of up to four pieces, in every way of reading, of names that differ in numbers of any length."""
    pieces = ("a", r"\.", ".*", "(", "|", ")", "$", ".", "?", "+", "[^b]", r"\d", "3")
    pairs = [("a.3.b", "a.12.b"), ("a.12.b", "a.3.b"), ("b.3", "b.412"), ("a3.b.3", "a3.b.70"), ("3.a", "0.a")]
    readers: tuple[Reads, ...] = (in_auto_round, in_sglang, in_gptq, as_glob, as_part, as_prefix, as_end)
    taken = 0
    for count in range(1, 5):
        for text in map("".join, itertools.product(pieces, repeat=count)):
            if not _is_numberless(text):
                continue
            taken += 1
            for reads in readers if _compiles(text) else (as_glob, as_part, as_end):
                assert all(reads(text, one) == reads(text, other) for one, other in pairs), (text, reads)
    assert taken > 2000


def _compiles(text: str) -> bool:
    try:
        return bool(re.compile(text))
    except re.error:
        return False
