"""Measure the shape of the package: `python scripts/structure.py` prints one line a figure.

modules in the root      files beside the rooms
modules of one prune     loaded when the command has pruned a tiny checkpoint
import chain             most modules that import each other in a row
ambiguous names          public functions and classes defined in more than one module
Any in a parameter       share of functions, NDArray[Any] included
body                     lines of a function without its docstring, half and nine tenths of all being shorter
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "shardxform"
Function = ast.FunctionDef | ast.AsyncFunctionDef

_PRUNE = """
import sys
from click.testing import CliRunner
from shardxform.cli import main
result = CliRunner().invoke(main, ["prune", sys.argv[1], sys.argv[2], "-m", sys.argv[3]], catch_exceptions=False)
assert result.exit_code == 0, result.output
print(sum(name == "shardxform" or name.startswith("shardxform.") for name in sys.modules))
"""


def name_of(path: Path) -> str:
    """Name of a module within the package; `__init__` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES: Mapping[str, Path] = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree_of(module: str) -> ast.Module:
    """Syntax of a module."""
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """Modules of the package that a text imports anywhere, type checking included; relative imports are not used."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name.removeprefix("shardxform.") in MODULES}
            names = {alias.name for alias in node.names} - {name.rpartition(".")[2] for name in modules}
            # The version is the one name of the package that everybody may read.
            found |= modules | (
                {node.module} if names and (node.module, names) != ("shardxform", {"__version__"}) else set()
            )
    inside = {name for name in found if name == "shardxform" or name.startswith("shardxform.")}
    return {name.removeprefix("shardxform.") if name != "shardxform" else "__init__" for name in inside}


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the package that a module imports."""
    return frozenset(imported(tree_of(module)) - {module})


@cache
def chain(module: str) -> int:
    """Modules of the longest chain of imports that begins with `module`."""
    return 1 + max((chain(other) for other in imports(module) if other in MODULES), default=0)


def cycle() -> list[str]:
    """Modules that import each other in a circle; empty when none do."""
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> list[str]:
        if state.get(module) == 1:
            return path[path.index(module) :]
        if state.get(module) == 2:
            return []
        state[module] = 1
        for other in sorted(imports(module) & MODULES.keys()):
            if found := visit(other, [*path, module]):
                return found
        state[module] = 2
        return []

    return next((found for module in MODULES if (found := visit(module, []))), [])


def functions() -> Iterator[Function]:
    """Every function of the package."""
    for module in MODULES:
        yield from (node for node in ast.walk(tree_of(module)) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    """Lines of a function's body but for its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def takes_any(function: Function) -> bool:
    """Whether a parameter's annotation has `Any` in it."""
    a = function.args
    every = (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg)))
    return any(each.annotation and "Any" in ast.unparse(each.annotation) for each in every)


def ambiguous() -> dict[str, list[str]]:
    """Public functions and classes that several modules define, with these modules."""
    homes: dict[str, list[str]] = {}
    for module in MODULES:
        for node in tree_of(module).body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    return {name: found for name, found in homes.items() if len(set(found)) > 1}


def of_one_prune() -> int:
    """Modules that are loaded when a tiny checkpoint was pruned."""
    sys.path.insert(0, str(ROOT / "tests"))
    from build import tiny, write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        config, tensors = tiny("qwen3_moe")
        source = write_checkpoint(Path(folder, "source"), tensors, config)
        keep = Path(folder, "keep.json")
        layers = {str(layer): [0, 1, 2, 3] for layer in range(config["num_hidden_layers"])}
        keep.write_text(json.dumps({"format": "shardxform.keep", "version": 1, "keep": layers}))
        command = [sys.executable, "-c", _PRUNE, str(source), f"{folder}/out", str(keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


def main() -> None:
    """Print the table."""
    bodies = sorted(body_lines(function) for function in functions())
    share = Counter(takes_any(function) for function in functions())
    sizes = [len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()]
    names = ambiguous()
    table = {
        "modules in the root": sum(path.parent == PACKAGE for path in MODULES.values()),
        "modules of one prune": of_one_prune(),
        "import chain": max(chain(module) for module in MODULES),
        "ambiguous names": len(names),
        "Any in a parameter": f"{share[True] / share.total():.1%}",
        "modules": len(MODULES),
        "lines": sum(sizes),
        "largest module": max(sizes),
        "body p50 / p90 / max": f"{bodies[len(bodies) // 2]} / {bodies[len(bodies) * 9 // 10]} / {bodies[-1]}",
    }
    for name, value in table.items():
        print(f"{name:22} {value}")
    if "-v" in sys.argv:
        for name, homes in sorted(names.items()):
            print(f"  {name}: {', '.join(homes)}")


if __name__ == "__main__":
    main()
