"""`doctor`: what it says of the machine is so, and the needs are those that commands work out for themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_quantize import make

from shardxform.checkpoint.table import Checkpoint
from shardxform.cli import doctor
from shardxform.cli.doctor import REFERENCE, Need, command_needs, doctor_command, machine_of, model_sizes, version_lines
from shardxform.errors import CheckpointError
from shardxform.plan.inspection import inspect_checkpoint

ROOT = Path(__file__).resolve().parents[1]


def shown(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(doctor_command, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def needs(disk: Path, source: Path) -> list[Need]:
    return list(command_needs(model_sizes(Checkpoint.open(source)), machine_of(disk, "")))


def without(monkeypatch: pytest.MonkeyPatch, *names: str, **versions: str) -> None:
    """Let libraries be missing, or be of other versions."""
    real = metadata.version

    def version(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)


def group(folder: Path, limit: str, used: str, spare: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "limit").write_text(limit + "\n")
    (folder / "use").write_text(used + "\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {spare}\n")


# -- needs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3_5_moe", "qwen3_moe", "deepseek_v3"])
def test_sizes_are_those_of_the_headers(kind: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make(tmp_path / "source", kind))
    found = model_sizes(checkpoint)
    blocks: dict[str, int] = {}
    for name, ref in checkpoint.tensors.items():
        if match := re.match(r"(.*layers\.\d+)\.", name):
            blocks[match[1]] = blocks.get(match[1], 0) + ref.nbytes
    assert found.block == max(blocks.values())
    assert found.head == checkpoint.tensors["lm_head.weight"].nbytes
    assert found.outlook == inspect_checkpoint(checkpoint).outlook


@pytest.mark.oracle
@pytest.mark.parametrize("quantized", [False, True])
def test_what_evaluating_takes_is_what_it_says_itself(quantized: bool, small_moe: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import numpy as np

    from shardxform.calibration import Windows
    from shardxform.cli import main
    from shardxform.forward.passes import estimate
    from shardxform.forward.weights import Precision

    root = small_moe
    if quantized:
        root = tmp_path / "q"
        assert CliRunner().invoke(main, ["quantize", str(small_moe), str(root), "-q"]).exit_code == 0
    windows = Windows(ids_NT=np.zeros((256, 2048), np.int32), fingerprint="", provenance={}, notes=())
    found = {need.command: need for need in needs(tmp_path, root)}
    precision = Precision(torch.device("cpu"), torch.float32)
    alone = estimate({"tested": Checkpoint.open(root)}, windows, precision)
    assert found["evaluate"].memory_bytes == alone["peak_memory_bytes"]
    assert found["evaluate"].disk_bytes == alone["work_bytes"]
    if not quantized:
        both = estimate({"a": Checkpoint.open(root), "b": Checkpoint.open(root)}, windows, precision)
        assert found["evaluate --against"].memory_bytes == both["peak_memory_bytes"]
        assert found["evaluate --against"].disk_bytes == both["work_bytes"]
        assert found["score"][1:3] == (alone["peak_memory_bytes"], alone["work_bytes"])


def test_tuning_takes_what_its_plan_says(small_moe: Path, tmp_path: Path) -> None:
    from shardxform.ask.recipe import Recipe
    from shardxform.formats.scheme import Scheme
    from shardxform.plan.quantize import plan_quantize
    from shardxform.plan.steps import TuneBlock

    recipe = Recipe(windows="", data={}, samples=128, seqlen=2048)
    plan = plan_quantize(Checkpoint.open(small_moe), Scheme.preset("W4A16"), recipe=recipe)
    planned = max(step.peak_bytes for step in plan.steps if isinstance(step, TuneBlock))
    need = next(need for need in needs(tmp_path, small_moe) if "auto-round" in need.command)
    assert planned <= need.memory_bytes <= 1.01 * planned
    assert need.disk_bytes == plan.data_bytes + 4 * 128 * 2048 * 4 * 128


def test_the_reference_is_the_model_as_it_is_released(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from synth import Spec, write_checkpoint
    finally:
        sys.path.pop(0)
    write_checkpoint(tmp_path / REFERENCE.name, Spec(layers=40, vision_depth=27, sparse=True))
    assert model_sizes(Checkpoint.open(tmp_path / REFERENCE.name)) == REFERENCE


def test_a_quantized_checkpoint_is_not_quantized_again(small_moe: Path, tmp_path: Path) -> None:
    from shardxform.cli import main

    assert CliRunner().invoke(main, ["quantize", str(small_moe), str(tmp_path / "q"), "-q"]).exit_code == 0
    assert [need.command for need in needs(tmp_path, tmp_path / "q")] == ["evaluate"]
    commands = [need.command for need in needs(tmp_path, small_moe)]
    assert commands[-4:] == ["score", "evaluate", "evaluate --against", "quantize --method auto-round"]


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_memory", lambda: (8_000_000_000, 4_000_000_000))
    monkeypatch.setattr(doctor.FileSystem, "free_bytes", lambda _self, _path: 20_000_000_000)
    without(monkeypatch, "transformers")
    found = json.loads(shown("--disk", tmp_path, "--json"))["needs"]
    lacks = {need["command"]: tuple(need["lacks"]) for need in found}
    assert lacks == {
        "quantize to W4A16": ("disk",),
        "prune to 128 experts": ("disk",),
        "prune to 128 experts and quantize to W4A16": (),
        "score": ("transformers",),
        "evaluate": ("transformers",),
        "evaluate --against": ("transformers", "memory"),
        "quantize --method auto-round": ("transformers", "memory", "disk"),
    }
    text = shown("--disk", tmp_path)
    assert "too little or missing: transformers, memory, disk" in text
    assert "transformers (the same); pip install 'shardxform[models]'" in text


# -- the machine ------------------------------------------------------------------------------------------------------


def test_the_machine_is_this_one(tmp_path: Path) -> None:
    found = machine_of(tmp_path / "not" / "yet", "")
    assert found.cores == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert found.memory_bytes is not None
    assert 0 < found.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert found.available_bytes is None or 0 < found.available_bytes <= found.memory_bytes
    assert found.free_bytes > 0


def test_a_container_has_what_its_group_lets_it_have(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = {Path("/proc/meminfo"): "MemTotal: 1000 kB\nMemAvailable: 800 kB\n", Path("/proc/self/cgroup"): "0::/a/b\n"}
    real = doctor._text
    monkeypatch.setattr(doctor, "_text", lambda path: texts.get(path) or real(path))
    monkeypatch.setattr(doctor, "_LIMITS", ((str(tmp_path), "limit", "use", "inactive_file"),))
    assert doctor._memory() == (1000 << 10, 800 << 10)
    group(tmp_path, "max", "0")
    group(tmp_path / "a", "600000", "200000", spare=50_000)
    group(tmp_path / "a" / "b", str((1 << 63) - 4096), "100")
    assert doctor._memory() == (600_000, 450_000)
    group(tmp_path / "a" / "b", "700000", "690000")
    assert doctor._memory() == (600_000, 10_000)
    group(tmp_path / "a" / "b", "700000", "nonsense")
    assert doctor._memory() == (600_000, 450_000)


def test_gpus_are_listed_as_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        name, total_memory = "GPU X", 80_000_000_000

    class Cuda:
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 2)
        get_device_properties = staticmethod(lambda _number: Gpu)

    class Torch:
        cuda: Any = Cuda

    monkeypatch.setitem(sys.modules, "torch", Torch)  # type: ignore[arg-type]
    without(monkeypatch, torch="2.13.0+cu130")
    text = shown()
    assert "GPUs    cuda:0 GPU X (80.00 GB), cuda:1 GPU X (80.00 GB)" in text

    class Broken:
        @staticmethod
        def is_available() -> bool:
            raise RuntimeError("driver too old\nmore")

    Torch.cuda = Broken
    assert "GPUs    torch cannot be asked: driver too old\n" in shown()
    without(monkeypatch, "torch")
    assert "GPUs    torch is not installed\n" in shown()


# -- libraries --------------------------------------------------------------------------------------------------------


def test_libraries_and_extras_are_those_of_the_project() -> None:
    """A library that several extras bring is shown under the one that is for it, the last in this order."""
    text = (ROOT / "pyproject.toml").read_text()
    project = text.split("[project.optional-dependencies]")
    sections = {"": re.search(r"^dependencies = \[(.*?)\]", project[0], re.DOTALL | re.MULTILINE)}
    for extra in ("fast", "models", "plot", "ray", "hub"):
        sections[extra] = re.search(rf"^{extra} = \[(.*?)\]", project[1], re.DOTALL | re.MULTILINE)
    wanted = {
        name: (name, least, extra)
        for extra, match in sections.items()
        for name, least in re.findall(r'"([\w-]+)>=([\d.]+)"', match[1] if match else "")
    }
    assert {(name, least, extra) for name, least, extra, _ in doctor._WANTED} == {*wanted.values()}
    readme = (ROOT / "README.md").read_text()
    assert all(f"`shardxform[{extra}]`" in readme for extra in sections if extra)


def test_something_essential_missing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "rich", numpy="1.25.9")
    text = shown(code=1)
    assert "PROBLEM: rich is missing: 13.7 or later is needed for progress" in text
    assert "PROBLEM: numpy 1.25.9: 1.26 or later is needed" in text
    without(monkeypatch, "numba", "matplotlib")
    shown(code=1)
    monkeypatch.undo()
    without(monkeypatch, "numba", "matplotlib", "torch", "pyarrow", "huggingface_hub")
    shown()


def test_versions_without_importing_what_they_are_of() -> None:
    lines = version_lines()
    assert re.fullmatch(r"shardxform \d+\.\d+\.\d+\S*", lines[0])
    assert lines[1].split() == ["python", ".".join(map(str, sys.version_info[:3]))]
    found = dict(line.split() for line in lines[1:])
    assert found["numpy"] == metadata.version("numpy")
    assert found["click"] == metadata.version("click")
    code = "import sys; from shardxform.cli.doctor import version_lines as v; v(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"'numpy'", "'torch'", "'rich'", "'numba'"} & set(loaded.strip("[]\n").split(", "))


def test_versions_of_what_is_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch", "auto-round")
    assert not [line for line in version_lines() if "torch" in line or "auto-round" in line]


def test_json_and_a_bad_source(small_moe: Path, tmp_path: Path) -> None:
    found = json.loads(shown(small_moe, "--disk", tmp_path, "--json"))
    assert found["model"] == "small-moe"
    assert found["machine"]["disk"] == str(tmp_path)
    assert {library["name"]: library["usable"] for library in found["libraries"]}["numpy"] is True
    assert found["problems"] == []
    with pytest.raises(CheckpointError, match="no such directory"):
        shown(tmp_path / "gone")


def test_the_folder_that_was_looked_at_is_named(tmp_path: Path) -> None:
    assert f" free in {tmp_path}\n" in shown("--disk", tmp_path / "not/there")
    assert f" free in {tmp_path}\n" in shown("--disk", tmp_path)
