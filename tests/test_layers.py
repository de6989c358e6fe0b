"""Imports point one way: from a room to those below it, and never in a circle. A new room needs one name in ROOMS."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from structure import MODULES, PACKAGE, cycle, imported, imports, tree_of

# From bottom to top. A module imports modules of its own room and of rooms that stand before it; `errors` is for all.
ROOMS = (
    *("errors", "base", "calibration", "checkpoint", "model", "formats", "runtimes", "ask", "plan", "execution"),
    *("forward", "drafting", "evaluation", "experts", "tuning", "cluster", "verification", "publish", "compress"),
    *("__init__", "cli", "__main__"),
)
PUBLIC = "__init__"  # what users import; only the commands do here

# Importing these loads neither torch nor numpy: a command that moves bytes starts at once.
LIGHT = (
    *("model.layout", "model.family_files", "checkpoint.table", "ask.manifest", "plan.prune"),
    *("execution.runner", "publish.card"),
    *("cli", "cli.prune", "cli.inspect", "cli.card", "cli.doctor", "cli.family"),
)
PURE = ("errors", "base.strict_json", "base.tensors", "model.layout", "model.families.*")


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_is_in_a_room_and_the_root_holds_three() -> None:
    assert {room(module) for module in MODULES} == set(ROOMS)
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py", "errors.py"]


def test_imports_point_down() -> None:
    upward = [
        f"{module} imports {other}"
        for module in MODULES
        for other in imports(module)
        if other not in MODULES or ROOMS.index(room(other)) > ROOMS.index(room(module))
    ]
    allowed = [text for text in upward if text.endswith(" imports __init__")]
    assert [text for text in upward if text not in allowed or not text.startswith("cli.")] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert cycle() == []


def test_the_rule_finds_imports_wherever_they_stand() -> None:
    text = "def f():\n    from shardxform.model import layout, __version__\n    import shardxform.execution.runner\n"
    text += "from shardxform import main\nfrom shardxform import __version__\nimport os.path\n"
    assert imported(ast.parse(text)) == {"model.layout", "model", "execution.runner", "__init__"}
    assert imported(ast.parse("from shardxform import __version__")) == set()


def test_imports_are_absolute() -> None:
    relative = [m for m in MODULES for n in ast.walk(tree_of(m)) if isinstance(n, ast.ImportFrom) and n.level]
    assert relative == []


def test_importing_them_loads_neither_torch_nor_numpy() -> None:
    """In one process, one after the other: what none of them has loaded at the end, none loads alone."""
    assert set(LIGHT) <= MODULES.keys()
    heavy = {"torch", "numpy", "transformers"}
    code = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module(f"shardxform.{{name}}")
    if found := {heavy} & set(sys.modules):
        sys.exit(f"{{name}} loads {{found}}")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_lowest_layers_know_nothing_of_files() -> None:
    effects = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "subprocess"}
    for module in MODULES:
        if module not in PURE and not module.startswith("model.families."):
            continue
        tree = tree_of(module)
        named = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        named |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not named & effects, module
