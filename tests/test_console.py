"""What is shown while a command works: on a real terminal, and in a pipe."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from shardxform.cli.console import pasteable

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
