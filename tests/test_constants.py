"""Constants that decide bytes: all of them are named, and every module reads them from one place."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from shardxform.base import constants

HOME = Path(constants.__file__)
PACKAGE = HOME.parents[1]

# Numbers of modules that compute what is healed, tuned or scored, which decide no byte, and why.
HARMLESS = {
    ("tuning/block.py", "_KEEP_ROWS"): "rows that are copied at a time",
    ("tuning/stacked.py", "_START_ROWS"): "rows whose scales are searched at a time, each by itself",
    ("tuning/healer.py", "_FINITE_TILE"): "values that are looked at at a time",
    ("tuning/linear_attention.py", "_CHANNELS_BYTES"): "channels at a time, each by itself",
    ("tuning/linear_attention.py", "_ROWS_BYTES"): "rows at a time, each by itself",
    ("tuning/linear_attention.py", "_TRIM_BYTES"): "memory that is given back",
    ("tuning/delta_rule.py", "_EPSILON"): "of the model: transformers has it, and is compared with",
    ("tuning/modules.py", "_ALIGNMENT"): "of grouped products; what is not so aligned is multiplied by itself",
    ("forward/passes.py", "_LIBRARIES"): "a prediction of memory",
    ("forward/passes.py", "_LIVE_STATES"): "a prediction of memory",
    ("forward/weights.py", "_BLOCKS_WANTED"): "what is fetched ahead",
    ("forward/skeleton.py", "_SHIFT"): "of the model: a layer predicts the token after the next",
    ("forward/skeleton.py", "_TILE_ROWS"): "logits of a head, which no block and no score sees",
}


def numbers(path: Path) -> dict[str, str]:
    """Module-level names that are given a number, or numbers, as they are written."""
    found: dict[str, str] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            parts = list(ast.walk(node.value))
            literal = any(isinstance(part, ast.Constant) and isinstance(part.value, int | float) for part in parts)
            if literal and not any(isinstance(part, ast.Call | ast.Name | ast.Dict | ast.Compare) for part in parts):
                found[node.target.id] = ast.unparse(node.value)
    return found


def test_all_of_them_are_named_and_can_be_recorded() -> None:
    found = constants.constants()
    assert set(found) == {name.lower() for name in numbers(HOME)}
    assert json.loads(json.dumps(found)) == found
    assert found["held_out"] == 8
    assert found["judged_at"] == [0.8, 0.9, 1.0]
    assert found["batch_tokens"] == 2048


@pytest.mark.parametrize("name", sorted(numbers(HOME)))
def test_a_change_of_each_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = constants.constants()
    monkeypatch.setattr(constants, name, 0.123)
    assert {key for key, value in constants.constants().items() if value != before[key]} == {name.lower()}


def test_no_module_that_computes_has_a_number_of_its_own() -> None:
    """Whoever adds one says here why it decides no byte, or puts it where records can name it."""
    paths = [
        *(PACKAGE / "tuning").glob("*.py"),
        *(PACKAGE / "forward").glob("*.py"),
        PACKAGE / "experts" / "scoring.py",
    ]
    found = {(str(path.relative_to(PACKAGE)), name) for path in paths for name in numbers(path)}
    assert found == set(HARMLESS)


def test_every_one_of_them_is_read_somewhere() -> None:
    imported = {
        alias.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "shardxform.base.constants"
        for alias in node.names
    }
    assert imported - {"constants"} == set(numbers(HOME))


def test_it_imports_nothing() -> None:
    tree = ast.parse((HOME).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"__future__", "typing"}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
