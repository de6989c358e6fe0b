"""What is shown while a command works: on a real terminal, and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from shardxform.cli import console, main
from shardxform.cli.console import escaped, pasteable

SCRIPT = """
from shardxform.cli.console import progress, tell
from shardxform.base.progress import Progress
with progress("work", quiet=False) as update:
    update(Progress(1, 4, 0, {unit!r}))
    tell("a line")
    update(Progress(2, 4, 0, {unit!r}))
tell("the end")
"""


def on_a_terminal(unit: str) -> str:
    """What a terminal is sent by SCRIPT."""
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        environment.pop(name, None)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(unit=unit)], stderr=other, stdin=other, env=environment
    ) as process:
        os.close(other)
        sent = b""
        try:
            while piece := os.read(main, 4096):
                sent += piece
        except OSError:  # how Linux says that the other end is closed
            pass
        assert process.wait(60) == 0
    os.close(main)
    return sent.decode()


def screen(sent: str) -> list[str]:
    """The lines that are left on a terminal, as far as a bar uses it: carriage return, erase, one line up."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", sent):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\r":
            column = 0
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece == "\x1b[1A":
            row -= 1
        elif not piece.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in lines if line.strip()]


def test_lines_stand_above_the_bar_and_not_in_it() -> None:
    told, bar, end = screen(on_a_terminal("bytes"))
    assert told == "a line"
    assert re.fullmatch(r"work \S+ +50 % 2 B of 4 B, .*/s, .* left", bar)
    assert end == "the end"


def test_work_of_several_kinds_says_its_percentage_once() -> None:
    _, bar, _ = screen(on_a_terminal("work"))
    assert re.fullmatch(r"work \S+ +50 % of all stages, .* left", bar)


def test_in_a_pipe_there_are_plain_lines() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(unit="work")], stderr=subprocess.PIPE, text=True, check=True
    )
    lines = found.stderr.splitlines()
    assert lines[0].startswith("work: 25 % of all stages, ")
    assert lines[1:] == ["a line", "the end"]


RESUMED = """
from shardxform.cli.console import progress
from shardxform.base.progress import Progress
with progress("work", quiet=False) as update:
    update(Progress(2, 4, 2, "work"))
    update(Progress(3, 4, 3, "work", "block 7"))
    update(Progress(4, 4, 3, "work", "block 7"))
"""


def test_what_an_earlier_run_did_is_said_once_and_where_it_goes_on() -> None:
    found = subprocess.run([sys.executable, "-c", RESUMED], stderr=subprocess.PIPE, text=True, check=True)
    assert [line for line in found.stderr.splitlines() if "going on" in line] == [
        "work: going on: 50 % of all stages done already",
        "work: going on with block 7: 75 % of all stages done already",
    ]


def test_a_command_to_paste_is_quoted_where_a_shell_needs_it() -> None:
    line = pasteable("shardxform", "verify", Path("my models/a b"), "--source", "hf://owner/name@main")
    assert line == "shardxform verify 'my models/a b' --source hf://owner/name@main"


HOSTILE = "a\x00\x1b[31m\x7f\u202eb"


def test_a_strangers_words_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "keep.json"
    keep = {"0": [0, 1], "1": [0, 1]}
    file.write_text(json.dumps({"format": "shardxform.keep", "version": 1, "criterion": HOSTILE, "keep": keep}))
    shown = CliRunner().invoke(main, ["manifest", "show", str(file)]).output
    assert r"a\x00\x1b[31m\x7f\u202eb" in shown
    as_json = CliRunner().invoke(main, ["manifest", "show", "--json", str(file)]).output
    assert json.loads(as_json)["criterion"] == HOSTILE
    assert not set(HOSTILE[1:-1]) - set("[31m") & set(shown + as_json)


def test_an_error_quotes_little_of_a_file(tmp_path: Path) -> None:
    config = {"model_type": "x" * 1_000_000, "num_experts": 8, "architectures": ["A"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert done.exit_code == 1
    assert len(done.output) < 3000


def test_only_the_middle_of_a_long_text_is_left_out() -> None:
    shown = escaped("begin" + "x" * 1000 + "end", 90)
    assert shown == "begin" + "x" * 55 + " ... (918 characters) ... " + "x" * 27 + "end"
    assert escaped("a\nb", 90) == "a\nb"


def test_commands_print_through_what_escapes() -> None:
    cli = Path(console.__file__).parent
    by_themselves = {path.name for path in cli.glob("*.py") if "click.echo(" in path.read_text()}
    assert by_themselves == {"console.py", "__init__.py", "card.py", "family.py"}  # versions, Markdown and Python
