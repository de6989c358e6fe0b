"""Drafts of entries, for the model types that a draft is right for without a word of a person.

Each is drafted, named with --family, and asked what `test_every_family` asks of the entries of the package.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from strategies import picked

pytest.importorskip("torch")
pytest.importorskip("transformers")

import test_every_family as suite
from click.testing import CliRunner
from test_config_values import COMMON, words
from texts import few
from transformers import CONFIG_MAPPING

from shardxform.cli import main
from shardxform.drafting import Draft, draft
from shardxform.drafting.names import renames
from shardxform.drafting.shapes import solve
from shardxform.errors import FamilyError
from shardxform.model import families
from shardxform.model.families import use
from shardxform.model.families.base import Family
from shardxform.model.families.outside import family_of_text

pytestmark = pytest.mark.oracle

BIAS = ({"attention_bias": True},)
LATENT = ({"q_lora_rank": None}, *BIAS)
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
RIGHT: dict[str, suite.Case] = {
    "afmoe": suite.Case(more=BIAS),
    "axk1": suite.Case(more=BIAS),
    "axk2": suite.Case(more=BIAS),
    "beam": suite.Case(more=BIAS),
    "cohere2_moe": suite.Case(
        over={"mlp_layer_types": ["dense", "sparse"], "num_shared_experts": 2, "tie_word_embeddings": False}, more=BIAS
    ),
    "deepseek_v2": suite.Case(more=({"q_lora_rank": None}, {"attention_bias": True, "mlp_bias": True})),
    "deepseek_v3": suite.Case(more=LATENT),
    "deepseek_v32": suite.Case(more=BIAS),
    "dots1": suite.Case(more=BIAS),
    "exaone_moe": suite.Case(),
    "flex_olmo": suite.Case(more=BIAS),
    "flint": suite.Case(more=BIAS),
    "glm4_moe": suite.Case(over={"attention_bias": True, "use_qk_norm": True}),
    "glm4_moe_lite": suite.Case(more=LATENT),
    "granitemoe": suite.Case(more=BIAS),
    "granitemoe_swa": suite.Case(more=BIAS),
    "granitemoeshared": suite.Case(more=BIAS),
    "hunyuan_v1_moe": suite.Case(over={"moe_topk": [2, 2]}, more=BIAS),
    "hy_v3": suite.Case(more=({"attention_bias": True, "mlp_bias": True},)),
    "kolibri1": suite.Case(),
    "mellum": suite.Case(over={"mlp_layer_types": ["dense", "sparse"]}, more=BIAS),
    "mimo_v2_flash": suite.Case(over={"layer_types": ["full_attention", "sliding_attention"]}, more=BIAS),
    "minimax": suite.Case(),
    "minimax_m2": suite.Case(),
    "mixtral": suite.Case(),
    "olmoe": suite.Case(more=BIAS),
    "phimoe": suite.Case(more=({"attention_bias": True, "lm_head_bias": True},)),
    "qwen2_moe": suite.Case(more=({"mlp_only_layers": [0], "qkv_bias": False},)),
    "qwen3_5_moe_text": suite.Case(over=LINEAR, more=BIAS),
    "qwen3_moe": suite.Case(more=({"mlp_only_layers": [0], "attention_bias": True},)),
    "qwen3_next": suite.Case(over=LINEAR, more=({"mlp_only_layers": [0], "attention_bias": True},)),
    "solar_open": suite.Case(more=BIAS),
}
"""Model types, with tiny configs that have all that their drafts know."""


@pytest.fixture(autouse=True)
def known_again() -> Iterator[None]:
    yield
    use(())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drafts")


@cache
def drafted(kind: str) -> Draft:
    return draft(kind)


@pytest.mark.parametrize("kind", picked(RIGHT, 6))
def test_a_draft_is_a_right_entry(kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name, home in families.HOMES.items() if home == families.HOMES.get(kind)]:
        monkeypatch.delitem(families.HOMES, name)
    monkeypatch.setitem(suite.CASES, kind, RIGHT[kind])
    assert all(note.startswith(("mtp: ", "formats: ")) for note in drafted(kind).decide)
    found = family_of_text(drafted(kind).text, f"{kind}.py")
    use([found])
    known(found.family, kind)
    suite.model_of.cache_clear()
    suite.test_a_release_is_known_to_the_last_tensor(kind, folder)
    suite.test_every_template_is_seen_in_some_release(kind, folder, tmp_path)
    suite.test_experts_lie_as_the_flags_of_transformers_class_say(kind)
    suite.test_a_pruned_output_is_slices_of_the_loaded_model(kind, folder)
    suite.test_the_block_runner_gives_the_logits_of_the_model(kind, folder)
    suite.model_of.cache_clear()


def known(family: Family, kind: str) -> None:
    """What the package's own entries are held to, without a checkpoint."""
    cls = CONFIG_MAPPING[kind]
    for field in dataclasses.fields(cls):
        if field.name not in COMMON:
            names = {field.name, cls.attribute_map.get(field.name, field.name)}
            (value,) = [family.types[name] for name in names if name in family.types]
            assert set(value.split(" or ")) == set(words(field.type)), field.name
    keys = [(template.name, template.when) for template in (*family.root, *family.block)]
    assert len(keys) == len(set(keys))


def test_drafts_are_formatted_as_entries_are(tmp_path: Path) -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    settings = str(Path(__file__).resolve().parents[1] / "pyproject.toml")
    for kind in (*picked(RIGHT, 6), "ernie4_5_moe", "laguna"):
        (tmp_path / f"{kind}.py").write_text(drafted(kind).text)
    for each in (("format", "--check"), ("check",)):
        done = subprocess.run([ruff, *each, "--config", settings, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# -- what is not decided -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("laguna", "num_attention_heads_per_layer: shapes follow it layer by layer, and are left open"),
        ("bailing_hybrid", "head_dim: transformers overwrites it, so that what it saves is not what releases say"),
        ("jetmoe", "experts: blocks have several modules of them: mlp.input_linear"),
        ("glm4_moe", r"mtp: transformers passes over model\.layers\.46.*"),
        ("qwen3_next", "mtp: transformers passes over ^mtp.*: layers of multi-token prediction as a rule, apart"),
    ],
)
def test_what_could_not_be_decided_stands_at_the_top(kind: str, said: str) -> None:
    assert any(said in note for note in drafted(kind).decide), drafted(kind).decide
    head = " ".join(line.lstrip("# ") for line in drafted(kind).text.partition('"""')[0].splitlines())
    assert said in head


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("none", "model_type 'none': transformers does not know it either"),
        ("llama", "model_type 'llama': no config key of it counts routed experts"),
        ("qwen3_vl_moe", "no text-only class of it; its text config is 'qwen3_vl_moe_text'"),
    ],
)
def test_what_no_entry_can_be_made_from_is_refused(kind: str, said: str) -> None:
    with pytest.raises(FamilyError) as e:
        draft(kind)
    assert said in str(e.value)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_file_that_family_takes(tmp_path: Path) -> None:
    root = suite.any_moe.save(suite.any_moe.build("jetmoe"), tmp_path / "src")
    printed = CliRunner().invoke(main, ["family", "draft", "olmoe"])
    assert (printed.exit_code, printed.stdout) == (0, drafted("olmoe").text)
    file = tmp_path / "family.py"
    written = CliRunner().invoke(main, ["family", "draft", str(root), "-o", str(file)])
    assert written.exit_code == 0, written.output
    assert f"{file}: written; use it with --family {file}" in written.stdout
    assert "decide: experts: blocks have several modules of them" in written.stderr
    again = CliRunner().invoke(main, ["family", "draft", "jetmoe", "-o", str(file)])
    assert again.exit_code == 1
    assert f"{file}: exists" in again.output


def test_what_is_passed_over_for_another_reason_is_not_taken_for_layers() -> None:
    assert [note.partition(":")[0] for note in drafted("axk1").decide] == ["formats"]  # inv_freq, and a norm


def test_tensors_of_a_checkpoint_that_the_draft_lacks_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from build import read_checkpoint, write_checkpoint

    monkeypatch.delitem(families.HOMES, "flint")
    root = suite.any_moe.save(suite.any_moe.build("flint"), tmp_path / "src")
    config, tensors = json.loads((root / "config.json").read_text()), read_checkpoint(root)
    some = next(iter(tensors.values()))
    more = {f"model.layers.{layer}.mlp.odd_{name}.weight": some for layer in range(2) for name in "ab"}
    write_checkpoint(tmp_path / "more", {**tensors, **more}, config)
    found = CliRunner().invoke(main, ["family", "draft", str(tmp_path / "more")])
    assert "are not known: model.layers.*.mlp.odd_a.weight, model.layers.*.mlp.odd_b.weight" in found.stderr


def test_scores_are_bound_to_the_text_of_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(families.HOMES, "olmoe", raising=False)
    root = suite.any_moe.save(suite.any_moe.build("olmoe"), tmp_path / "src")
    file, out = tmp_path / "olmoe.py", tmp_path / "saliency.safetensors"
    file.write_text(drafted("olmoe").text)
    command = [
        "score",
        str(root),
        "-o",
        str(out),
        "--data",
        str(few("calib.jsonl")),
        "--samples",
        "2",
        "--seqlen",
        "16",
    ]
    command += ["--family", str(file), "-q"]
    for said in ("complete and durable", "already complete"):
        found = CliRunner().invoke(main, command, catch_exceptions=False)
        assert found.exit_code == 0, found.output
        assert said in found.stdout
    file.write_text(drafted("olmoe").text + "# another\n")
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert f"{out}: holds a saliency of another run: --family: olmoe.py: was " in refused.output


# -- its parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ((6, 10), "A"),
        ((12, 20), "2*A"),
        ((7, 7), "7"),
        ((6 * 7, 10 * 11), "A*C"),
        ((6 * 7 + 5, 10 * 11 + 3), "A*C+B"),
        ((2 * 6 * 7 + 5 * 7, 2 * 10 * 11 + 3 * 11), "2*A*C+B*C"),
        ((1000, 3), None),
    ],
)
def test_a_dimension_is_the_simplest_expression_that_it_can_be(values: tuple[int, ...], found: str | None) -> None:
    assert solve(values, [{"A": 6, "B": 5, "C": 7}, {"A": 10, "B": 3, "C": 11}]) == found


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"a.x.weight": "a.x.weight"}, []),
        ({"a.x": "b.x", "a.y": "b.y", "c.z": "c.z"}, [("a.", "b.")]),
        ({"a.x": "b.x", "a.z": "b.z", "a.y": "b.c.y"}, [("a.y", "b.c.y"), ("a.", "b.")]),
        ({"a.x": "b.y", "c.x": "b.y"}, None),
    ],
)
def test_renames_lead_there_and_back(names: dict[str, str], found: list[tuple[str, str]] | None) -> None:
    assert renames(names) == found
