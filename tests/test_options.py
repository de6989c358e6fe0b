"""Options of the command line: what a group declares is what click parses, a command is handed, and help shows."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from shardxform.cli import main, options
from shardxform.errors import SchemeError

Colour = Literal["red", "blue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paint(options.Flags, heading="Paint"):
    colour: Colour = options.option("Of the wall.", default="red", first=True)
    coats: int | None = options.option("How many.", "-c", type=click.IntRange(1))
    dry: bool = options.option("Wait.", default=False)
    over: tuple[Path, ...] = options.option("What is under it.", default=(), metavar="DIR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thick(Paint):
    coats: int | None = options.option("How many, at least two.", "-c", type=click.IntRange(2))
    primer: bool = options.option("First of all.", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class House(options.Flags):
    outside: Thick
    number: int = options.option("Of the door.", default=1, type=int)


handed: list[object] = []


@options.command("paint")
@click.argument("wall")
def paint(wall: str, house: House) -> None:
    """Paint."""
    handed[:] = [wall, house]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(paint, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_command_is_handed_the_objects_of_its_groups() -> None:
    run("north", "--colour", "blue", "-c", "3", "--over", "a", "--over", "b", "--primer")
    paths = (Path("a"), Path("b"))
    wanted = Thick(colour="blue", coats=3, dry=False, over=paths, primer=True)
    assert handed == ["north", House(outside=wanted, number=1)]


def test_what_is_not_given_is_what_the_group_says() -> None:
    run("north")
    assert handed == ["north", House(outside=Thick())]


def test_values_are_of_the_kinds_that_the_fields_have() -> None:
    for wrong in (["--colour", "green"], ["-c", "1"], ["--over", ""], ["--number", "one"]):
        assert CliRunner().invoke(paint, ["north", *wrong]).exit_code == 2


def test_help_shows_headings_what_is_used_first_on_top_and_own_options_before_shared_ones() -> None:
    text = run("--help")
    assert re.findall(r"^(\w.*):$", text, re.MULTILINE) == ["Used first", "Paint", "Options"]
    assert re.findall(r"--\w+", text) == ["--colour", "--primer", "--coats", "--dry", "--over", "--number", "--help"]
    assert "[default: red]" in text


def test_options_that_would_do_nothing_are_named() -> None:
    options.refuse_idle(Paint(), wanted="walls")
    options.refuse_idle(Paint(coats=2), "dry", wanted="walls")
    with pytest.raises(SchemeError, match=r"--coats is for walls"):
        options.refuse_idle(Paint(coats=2), wanted="walls")
    assert list(options.given(options.TextFlags(seed=0, no_pack=True))) == ["--seed", "--no-pack"]
    assert list(options.given(options.SchemeFlags(search=True))) == ["--search"]


# -- all commands -----------------------------------------------------------------------------------------------------


def commands(group: click.Group = main) -> Iterator[click.Command]:
    for name in group.list_commands(click.Context(group)):
        found = group.get_command(click.Context(group), name)
        assert found is not None
        yield from commands(found) if isinstance(found, click.Group) else (found,)


def test_no_command_has_an_option_twice() -> None:
    for each in commands():
        names = Counter(name for option in each.params for name in (option.name, *option.opts, *option.secondary_opts))
        assert [name for name, count in names.items() if count > 1 and name.startswith("-")] == [], each.name


def test_one_word_is_declared_in_one_way() -> None:
    """An option of several commands has the same short form, and takes a value in all of them or in none."""
    kinds: dict[str, set[tuple[object, ...]]] = {}
    for each in commands():
        for option in each.params:
            if isinstance(option, click.Option):
                kind = (tuple(sorted(option.opts)), option.is_flag, option.multiple)
                kinds.setdefault(max(option.opts, key=len), set()).add(kind)
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_whatever_shows_progress_can_be_quiet() -> None:
    for path in Path(options.__file__).parent.glob("*.py"):
        name = path.stem
        if name in ("console", "outputs") or "progress(" not in path.read_text():
            continue
        command = getattr(importlib.import_module(f"shardxform.cli.{name}"), f"{name}_command")
        commands = command.commands.values() if isinstance(command, click.Group) else [command]
        assert "-q" in {opt for each in commands for option in each.params for opt in option.opts}, name


def test_every_group_of_the_library_can_be_made_without_a_command_line() -> None:
    for group in (options.TextFlags, options.SchemeFlags, options.HealFlags, options.ComputeFlags):
        assert all(hasattr(group(), each.name) for each in fields(group))


@pytest.mark.parametrize("setting", [{"COLUMNS": "60", "NO_COLOR": "1"}, {"COLUMNS": "200", "FORCE_COLOR": "1"}])
def test_help_is_plain_text_of_the_width_of_the_terminal(setting: dict[str, str]) -> None:
    command = [sys.executable, "-m", "shardxform", "compress", "--help"]
    environment = {**os.environ, **setting}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
