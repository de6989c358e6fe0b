"""The library names fields, the command line its options: one table leads from one to the other, and none is spoken of
below it.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import click
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from structure import MODULES, tree_of

from shardxform.cli.console import _OF_STAGES, _SHORT, option_of, with_options

COMMANDS = ("compress", "quantize", "prune", "convert", "score", "select", "evaluate", "card", "push", "verify")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OF_CARDS = "publish.card."  # text of an output: how it is made again, and served by other programs


def options_of_commands() -> set[str]:
    there = set()
    for name in COMMANDS:
        command = getattr(importlib.import_module(f"shardxform.cli.{name}"), f"{name}_command")
        assert isinstance(command, click.Command)
        there |= {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
    return there


def test_every_option_of_the_table_exists() -> None:
    there = {"--sort", "--step", *options_of_commands()}
    named = [*_SHORT.values(), *(text for stage in _OF_STAGES.values() for pair in stage.items() for text in pair)]
    assert {option for text in named for option in OPTION.findall(text)} <= there


def test_every_field_of_a_message_that_has_an_options_name_becomes_it() -> None:
    """Else a message says `width` where a person has to write --width."""
    nodes = [node for each in MODULES if each.partition(".")[0] != "cli" for node in ast.walk(tree_of(each))]
    described = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in described]
    said = {field for text in texts if isinstance(text, str) for field in re.findall(r"`([a-z_]+)`", text)}
    there = options_of_commands()
    assert [each for each in sorted(said) if f"--{each.replace('_', '-')}" in there and option_of(each) == each] == []


def test_the_library_speaks_of_no_option() -> None:
    spoken = [
        f"{module}: {node.value.strip()}"
        for module in MODULES
        if module.partition(".")[0] != "cli" and not module.startswith(OF_CARDS)
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and OPTION.search(node.value)
    ]
    assert spoken == []


@pytest.mark.parametrize(
    ("path", "option"),
    [
        ("scheme.grid.group_size", "--group-size"),
        ("group_size", "--group-size"),
        ("scheme.format", "--format"),
        ("format", "--format"),
        ("target.format", "--to"),
        ("recipe.iters", "--iters"),
        ("recipe.heal.iters", "--heal-iters"),
        ("recipe.data.samples_asked", "--samples"),
        ("evaluate.data.samples_asked", "--eval-samples"),
        ("evaluate.seqlen", "--eval-seqlen"),
        ("quantize.recipe.data.data", "--data"),
        ("score.data.sha256", "--data: sha256"),
        ("manifest.keep.3", "--manifest: keep.3"),
        ("source.shards.a.safetensors", "source.shards.a.safetensors"),
        ("select.source.shards.a.safetensors", "source.shards.a.safetensors"),
        ("quantize.pruned_by", "pruned_by"),
    ],
)
def test_a_field_has_the_name_of_its_option(path: str, option: str) -> None:
    assert option_of(path) == option
    assert with_options(f"a: `{path}`: was 1, now 2") == f"a: {option}: was 1, now 2"


def test_a_text_that_has_changed_has_the_name_of_its_option() -> None:
    said = "the text of 'a.txt' has changed since"
    assert with_options(f"`quantize.recipe.data`: {said}") == f"--data: {said}"
    assert with_options(f"`evaluate.data`: {said}") == f"--eval-data: {said}"


def test_what_names_no_field_stays_as_it_is() -> None:
    for text in ("unknown inputs", "", "see `shardxform verify a`", "a ` b"):
        assert with_options(text) == text


def test_a_stage_of_compress_has_options_of_its_own() -> None:
    assert with_options("`seqlen` 4 or samples, `data`", "evaluate") == "--eval-seqlen 4 or samples, --eval-data"
