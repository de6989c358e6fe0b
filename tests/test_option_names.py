"""Messages name options: every one that the table names exists, and the inputs of a plan are found in it."""

from __future__ import annotations

import importlib
import re

import pytest

from shardxform.base.option_names import _OF_STAGES, _OPTIONS, in_stage, option_of, with_option

COMMANDS = ("compress", "quantize", "prune", "convert", "select", "evaluate")


def test_every_option_of_the_table_exists() -> None:
    modules = [importlib.import_module(f"shardxform.cli.{name}_cmd") for name in COMMANDS]
    there = {option for m in modules for p in m.command.params for option in (*p.opts, *p.secondary_opts)}
    named = [*_OPTIONS.values(), *(text for stage in _OF_STAGES.values() for pair in stage.items() for text in pair)]
    assert {option for text in named for option in re.findall(r"--[\w-]+", text)} <= there


@pytest.mark.parametrize(
    ("path", "stage", "option"),
    [
        ("scheme.grid.group_size", "", "--group-size"),
        ("recipe.iters", "", "--iters"),
        ("recipe.heal.iters", "", "--heal-iters"),
        ("recipe.data.samples_asked", "", "--samples"),
        ("data.samples_asked", "evaluate", "--eval-samples"),
        ("recipe.data.data", "quantize", "--data"),
        ("data.sha256", "score", "--data: sha256"),
        ("manifest.keep.3", "", "--manifest: keep.3"),
        ("source.shards.a.safetensors", "", "source.shards.a.safetensors"),
        ("pruned_by", "quantize", "pruned_by"),
        ("", "", ""),
    ],
)
def test_an_input_has_the_name_of_its_option(path: str, stage: str, option: str) -> None:
    assert option_of(path, stage) == option
    assert with_option(f"{path}: was 1, now 2", stage) == f"{option}: was 1, now 2"


def test_a_text_that_has_changed_has_the_name_of_its_option() -> None:
    said = "the text of 'a.txt' has changed since"
    assert with_option(f"recipe.data: {said}", "quantize") == f"--data: {said}"
    assert with_option(f"data: {said}", "evaluate") == f"--eval-data: {said}"


def test_what_is_no_difference_stays_as_it_is() -> None:
    assert with_option("unknown inputs") == "unknown inputs"
    assert with_option("") == ""


def test_a_stage_of_compress_has_options_of_its_own() -> None:
    assert (
        in_stage("--seqlen 4 or --samples-of 3, --data", "evaluate") == "--eval-seqlen 4 or --samples-of 3, --eval-data"
    )
