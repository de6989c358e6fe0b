"""docs/architecture.md holds: its rooms are those of the package in their order, and a prune goes where it says."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from build import tiny, write_checkpoint, write_json
from click.testing import CliRunner
from test_layers import PACKAGE, ROOMS

from shardxform.cli import main
from shardxform.plan import plan, steps

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
WALK = re.findall(r"^\d+\. `([a-z_]+/[a-z_/]+)\.([a-z_]+)`", PAGE, re.MULTILINE)


def test_the_rooms_are_those_of_the_package_in_their_order() -> None:
    block = next(text for text in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) if text.startswith("cli "))
    named = [line.split()[0] for line in block.splitlines()]
    assert named[::-1] == [room for room in ROOMS if (PACKAGE / room).is_dir()]


def test_every_module_that_is_named_is_there() -> None:
    for name in re.findall(r"`([a-z_]+/[a-z_/]+)(?:\.[a-z_]+)?`", PAGE):
        if name.split("/")[0] in ROOMS:
            assert (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir(), name


def test_the_picture_names_the_steps_that_there_are() -> None:
    picture = (PACKAGE.parent / "docs" / "pictures" / "architecture.svg").read_text(encoding="utf-8")
    named = next(text for text in re.findall(r">([^<]+)</text>", picture) if "Copy" in text)
    classes = [each for module in (plan, steps) for each in vars(module).values() if isinstance(each, type)]
    made = {each.__name__ for each in classes if hasattr(each, "reads") and hasattr(each, "writes") and each is not plan.Step}
    assert set(named.split(" · ")) == made


def test_a_prune_comes_to_the_modules_that_are_named_in_their_order(tmp_path: Path) -> None:
    assert 8 <= len(WALK) <= 12
    config, tensors = tiny("qwen3_moe")
    source = write_checkpoint(tmp_path / "source", tensors, config)
    keep = {str(layer): [0, 1, 2, 3] for layer in range(config["num_hidden_layers"])}
    write_json(tmp_path / "keep.json", {"format": "shardxform.keep", "version": 1, "keep": keep})
    wanted = {(str(PACKAGE / f"{module}.py"), function): (module, function) for module, function in WALK}
    seen: dict[tuple[str, str], None] = {}

    def watch(frame: FrameType, event: str, _arg: Any) -> None:
        place = wanted.get((frame.f_code.co_filename, frame.f_code.co_name)) if event == "call" else None
        if place:
            seen.setdefault(place)

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        command = ["prune", str(source), str(tmp_path / "out"), "-m", str(tmp_path / "keep.json"), "-q"]
        result = CliRunner().invoke(main, command, catch_exceptions=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    assert list(seen) == WALK
