"""Imports point one way. A new module needs one line in LAYERS."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "shardxform"

# From bottom to top. A module imports only what stands before it, in its own row or in an earlier one.
# A pattern stands for modules that do not import each other; list a module by name, before, when they do.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "dtypes", "progress", "option_names", "interrupts", "completions", "deciding", "computing"),
    ("measured", "standard_errors"),
    ("strictjson", "tensors"),
    ("header", "fsio", "digests", "record"),
    ("sources", "remote", "remote.names", "remote.repository", "remote.client", "remote.arena", "remote.pieces"),
    ("remote.downloads", "remote.reading", "checkpoint", "sidecars", "identity", "opening"),
    (
        "families.base",
        "families.parts",
        "families.*",
        "families",
        "layout",
        "expectation",
        "config_names",
        "tied_head",
        "strays",
        "config_values",
    ),
    ("quantize", "quantize.grid", "quantize.packing", "quantize.kernels", "quantize.rtn", "quantize.rtn_torch"),
    ("manifest_import", "manifest", "scheme", "recipe", "modules", "selection", "quantization_config"),
    ("manifest_text", "saliency.storage", "saliency.saving", "saliency.statistics", "saliency.criteria"),
    ("saliency.choosing", "saliency.plotting", "saliency"),
    ("calibration.options", "calibration.readers", "calibration.hub", "calibration.documents"),
    ("calibration.tokens", "calibration.encoding", "calibration.conversations", "calibration.windows", "calibration"),
    ("view", "sharding", "plan", "copying", "block_size", "quantize.steps", "heal_plan", "prune"),
    ("quantize.planner", "quantize.execute"),
    ("journal", "outdir", "output", "quantize.stored", "quantize.convert", "quantize.loading", "quantize.repack"),
    ("parameters", "inspection"),
    (
        "forward",
        "forward.memory",
        "forward.arithmetic",
        "forward.weights",
        "forward.experts",
        "forward.skeleton",
        "forward.work",
    ),
    ("forward.passes", "forward.mtp", "forward.estimate", "scoring", "evaluation", "evaluation_plot"),
    (
        "tuning.elementwise",
        "tuning.intrinsics",
        "tuning.kernels",
        "tuning.workers",
        "tuning.stacked",
        "tuning.routing",
        "tuning.linear",
    ),
    ("tuning.grouped", "tuning.experts", "tuning", "tuning.block", "tuning.samples", "tuning.tune"),
    ("tuning.causal_conv", "tuning.gated_norm", "tuning.delta_rule", "tuning.one_by_one", "tuning.linear_attention"),
    ("tuning.chains", "tuning.heal_kernels", "tuning.healed", "tuning.heal", "tuning.healing", "tuning.session"),
    ("execution", "run_options", "merging", "runner"),
    ("cluster", "cluster.session", "cluster.worker", "cluster.blocks", "cluster.pool", "cluster.scoring"),
    ("verification.findings", "verification.unknown", "verification.fp8", "verification.declared"),
    ("verification.quantized", "verification.parts"),
    (
        "verification.structure",
        "verification.files",
        "verification.digests",
        "verification.reading",
        "verification.report",
    ),
    ("verification.wanted", "verification.values", "verification.kernels"),
    ("verification.systematic", "verification.rounding", "verification.independent"),
    (
        "verification.planned",
        "verification.derived",
        "verification.jobs",
        "verification.data",
        "verification.source",
        "verification",
    ),
    ("card.facts", "card.record", "card.markdown", "card.frontmatter", "card.reproduction"),
    ("card.evaluations", "card.writing", "card.gathering", "card.loading", "card.render", "card", "doctor"),
    ("compress.request", "compress.costs", "compress.folder", "compress.beside", "compress.overall"),
    ("compress.prepared",),
    ("compress.job", "compress.model_timing", "compress.timing"),
    ("compress.showing", "compress.stages", "compress.forecast", "compress.driver", "compress"),
    ("publishing.contents", "publishing.hub", "publishing.push", "publishing"),
    ("__init__",),
    ("cli.console", "cli.options", "cli.model_options", "cli.sources", "cli.tune_options", "cli.block_report"),
    ("cli.ray_options", "cli.planned", "cli.compress_report"),
    ("cli.*", "cli", "__main__"),
)
ORDER = [name for layer in LAYERS for name in layer]

# Importing these loads neither torch nor numpy: a command that moves bytes starts at once.
LIGHT = (
    *("layout", "checkpoint", "manifest", "prune", "runner", "card", "doctor"),
    *("cli", "cli.prune_cmd", "cli.inspect_cmd", "cli.card_cmd", "cli.doctor_cmd"),
)


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def place(module: str) -> int:
    """Index in ORDER: the exact name, else the first pattern that fits."""
    if module in ORDER:
        return ORDER.index(module)
    return next((at for at, pattern in enumerate(ORDER) if fnmatchcase(module, pattern)), -1)


def imports(path: Path, module: str) -> set[str]:
    """Modules of the package that a module imports anywhere in its text, type checking included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = (
                    f"shardxform.{module}".split(".")
                    if path.name == "__init__.py"
                    else f"shardxform.{module}".split(".")[:-1]
                )
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix("shardxform.")
                if inner in MODULES:
                    found.add(f"shardxform.{inner}")
                elif (base, alias.name) != ("shardxform", "__version__"):  # the one name that everybody may read
                    found.add(base)
    inside = {name for name in found if name == "shardxform" or name.startswith("shardxform.")}
    return {name.removeprefix("shardxform.") if name != "shardxform" else "__init__" for name in inside} - {module}


def test_every_module_has_a_layer() -> None:
    missing = [name for name in MODULES if place(name) < 0]
    assert not missing, f"add to LAYERS in tests/test_layers.py, above everything they import: {missing}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    upward = {name for name in imports(MODULES[module], module) if place(name) >= place(module)}
    assert not upward, f"{module} imports {sorted(upward)}, which stand above or beside it in LAYERS"


def test_the_rule_finds_an_import_that_points_up(tmp_path: Path) -> None:
    text = "def f():\n    from shardxform import layout, __version__\n    import shardxform.runner\n"
    path = tmp_path / "header.py"
    path.write_text(text + "from . import cli\nfrom .families import base\nimport os.path\n")
    assert imports(path, "header") == {"layout", "runner", "cli", "families.base"}
    assert all(place(name) > place("header") for name in ("layout", "runner", "cli", "families.base"))
    path.write_text("from shardxform import main\n")
    assert imports(path, "header") == {"__init__"}


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_loads_neither_torch_nor_numpy(module: str) -> None:
    assert module in MODULES
    code = f"import sys, shardxform.{module}; print(sorted({{'torch', 'numpy', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_the_lowest_layers_know_nothing_of_files() -> None:
    effects = {"os", "io", "pathlib", "shutil", "tempfile", "mmap", "subprocess"}
    for module in ("errors", "dtypes", "strictjson", "tensors", "header", "layout", "families.base", "families.parts"):
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        named = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        named |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not named & effects, module
