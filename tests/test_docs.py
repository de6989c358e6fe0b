"""The documentation holds: links lead somewhere, commands parse, options exist, scripts and names are there.

Nothing is run but the making of shell completion.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from faults import overheard

from shardxform.__main__ import entry
from shardxform.cli import main
from shardxform.runtimes.gguf.architectures import KINDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", ROOT / "manifests/README.md"]
)
OTHERS_OPTIONS = {  # of other programs that pages speak of
    *("--build-arg", "--rm", "--user", "--gpus"),  # docker
    *("--head", "--port", "--address", "--autoscaling-config"),  # ray
    *("--quantization", "--max-model-len", "--model-path", "--tensor-parallel-size", "--language-model-only"),  # vLLM
    *("--outtype", "--no-mtp"),  # llama.cpp's converter
}


def ids(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


# -- links ------------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What the headings of a page can be reached by, as GitHub names them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        number = next(n for n in range(100) if (f"{slug}-{n}" if n else slug) not in names)
        names.add(f"{slug}-{number}" if number else slug)
    return names


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert ROOT in there.parents, target
        if anchor:
            assert there.suffix == ".md", target
            assert anchor in anchors(there), target


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name}" in index, page.name


# -- commands ---------------------------------------------------------------------------------------------------------


def code(page: Path) -> Iterator[str]:
    """Lines of code blocks, those that are continued as one, and pieces of code in prose."""
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```[^\n]*\n(.*?)```", text, re.DOTALL):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    yield from (re.sub(r"\s+", " ", piece) for piece in re.findall(r"`([^`]+)`", text))


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every command line that is quoted: no synopsis with brackets, no dots."""
    for line in code(page):
        found = re.match(r"(?:\$ )?(?:\.venv/bin/)?shardxform (.+)", line.strip())
        if (
            found is None
            or found[1].startswith("journal ")
            or re.search(r"\[|\.\.\. |\.\.\.$", found[1])
            or " -> " in found[1]
        ):
            continue
        words = shlex.split(found[1], comments=True)
        arguments = itertools.takewhile(lambda word: word not in (">", "|"), words)
        yield ["1" if argument == "N" else argument for argument in arguments]


def parse(arguments: list[str]) -> None:
    """Parse a command line down to the last command, as far as that goes without running it."""
    command: click.Command = main
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"no command {name}"
        command = found
    if {"--help", "--version"}.intersection(arguments) or not arguments:
        return
    command.make_context("shardxform", list(arguments)).close()


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_command_line_parses(page: Path) -> None:
    for arguments in commands(page):
        try:
            parse(arguments)
        except click.MissingParameter as e:  # prose may speak of an option without the rest
            if f"`shardxform {shlex.join(arguments)}`" not in " ".join(page.read_text().split()):
                pytest.fail(f"shardxform {shlex.join(arguments)}: {e.format_message()}")
        except click.ClickException as e:
            pytest.fail(f"shardxform {shlex.join(arguments)}: {e.format_message()}")


def test_there_are_command_lines_to_parse() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 50


def options_of(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), name)
            assert found is not None
            yield from options_of(found)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_option_exists(page: Path) -> None:
    known = {*options_of(main), "--help", *OTHERS_OPTIONS}
    for script in ROOT.glob("benchmarks/*.py"):
        known.update(re.findall(r'"(--[a-z0-9-]+)"', script.read_text(encoding="utf-8")))
    for line in code(page):
        for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", line):
            assert option in known, f"{option} in {line!r}"


def test_commands_of_the_readme_are_all_there_are() -> None:
    listed = set(re.findall(r"^\| `(\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert set(main.list_commands(click.Context(main))) <= listed


def test_the_readme_counts_the_families_of_gguf() -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"`--format gguf` writes {len(KINDS)} of the families" in text


def test_the_page_of_families_is_what_the_families_say() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "families.py")]
    page = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert page == (ROOT / "docs" / "families.md").read_text(encoding="utf-8"), (
        "python scripts/families.py > docs/families.md"
    )


# -- scripts and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_every_script_that_is_named_is_there(page: Path) -> None:
    for line in code(page):
        for script in re.findall(r"(?<![\w/.])((?:benchmarks|examples|scripts|tests)/[\w.-]+\.(?:py|sh))", line):
            assert (ROOT / script).is_file(), line


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_imports_of_python_code_exist(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "shardxform":
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), alias.name


def test_the_container_copies_what_is_there_and_installs_extras_that_exist() -> None:
    text = (ROOT / "Dockerfile").read_text()
    allowed = (ROOT / ".dockerignore").read_text().split()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert f"!{source.removeprefix('./')}" in allowed, source
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for names in re.findall(r"EXTRAS=([\w,]+)", text):
        assert set(names.split(",")) <= extras
    page = (ROOT / "docs/recipes.md").read_text()
    for argument in re.findall(r"--build-arg (\w+)=", page + text):
        assert re.search(rf"^ARG {argument}=", text, re.MULTILINE), argument


# -- shell completion -------------------------------------------------------------------------------------------------


def complete(kind: str, **words: str) -> str:
    """What the command says to a shell, in a forked child, which has imported it already."""

    def child() -> None:
        os.environ.update({"_SHARDXFORM_COMPLETE": kind, **words})
        sys.argv = ["shardxform"]
        vars(sys.modules["__main__"]).update(__package__=None)  # else `python -m pytest` gives it its name
        entry()

    with tempfile.TemporaryDirectory() as folder:
        code, said, errors = overheard(child, Path(folder))
    assert (code, errors) == (0, "")
    return said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_made(shell: str) -> None:
    assert f"{shell}_source shardxform" in (ROOT / "docs/shell-completion.md").read_text()
    assert f"_SHARDXFORM_COMPLETE={shell}_complete" in complete(f"{shell}_source")


def test_commands_options_and_choices_complete() -> None:
    def found(words: str) -> set[str]:
        cword = str(len(words.split(" ")) - 1)
        return {line.split(",")[1] for line in complete("bash_complete", COMP_WORDS=words, COMP_CWORD=cword).split()}

    assert found("shardxform comp") == {"compress"}
    assert {"--keep", "--keep-16bit"} <= found("shardxform compress --kee")
    assert found("shardxform compress --method au") == {"auto-round"}


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("compress exa", "dir,exa"),
        ("evaluate exa", "dir,exa"),
        ("evaluate m --against exa", "dir,exa"),
        ("verify m --source exa", "dir,exa"),
        ("push m --source exa", "file,exa"),
        ("score m --data exa", "file,exa"),
        ("compress m out --eval-data exa", "file,exa"),
    ],
)
def test_names_of_files_and_folders_are_left_to_the_shell(words: str, answer: str) -> None:
    cword = str(len(words.split(" ")))
    found = complete("bash_complete", COMP_WORDS=f"shardxform {words}", COMP_CWORD=cword)
    assert found.split() == [answer]
