"""`shardxform doctor`: memory, disk, cores, GPUs and libraries of this machine, held against what commands need.

Looks and changes nothing. Needs are worked out from a checkpoint's headers, or known for one model by name. torch is
imported only to list GPUs, and only when the torch that is installed could see one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import click

from shardxform import __version__
from shardxform.ask.recipe import Recipe
from shardxform.base.file_system import FileSystem, nearest
from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.console import gb, print_json, rows, table
from shardxform.cli.options import PATH, JsonFlags, command, option
from shardxform.errors import SchemeError
from shardxform.formats.stored import read_stored
from shardxform.model.layout import Layout, layout_of
from shardxform.plan.block_size import sizes_of as sizes_of_blocks
from shardxform.plan.inspection import inspect_checkpoint

__all__ = [
    "REFERENCE",
    "Device",
    "Diagnosis",
    "Library",
    "Machine",
    "Need",
    "Sizes",
    "diagnose",
    "doctor_command",
    "sizes_of",
    "version_lines",
]

_WANTED: Final = (  # name, least version, extra, what it is for; as pyproject.toml has them
    ("blake3", "1.0", "", "digests of what is written"),
    ("numpy", "1.26", "", "everything that looks at numbers"),
    ("click", "8.1", "", "the command line"),
    ("rich", "13.7", "", "progress"),
    ("numba", "0.61", "fast", "compiled rounding; the same bytes without it, slower"),
    ("torch", "2.9", "models", "score, evaluate, quantize --method auto-round"),
    ("transformers", "5.0", "models", "the same"),
    ("pyarrow", "15", "models", "text from Parquet files"),
    ("huggingface_hub", "1.0", "hub", "checkpoints and data sets of the hub, push"),
    ("ray", "2.40", "ray", "--ray: steps on many machines"),
    ("matplotlib", "3.8", "plot", "select --plot, evaluate --plot"),
)
_MODEL_LIBRARIES: Final = ("torch", "transformers")

_LIBRARIES: Final = 450_000_000  # python, torch, transformers and a tokenizer, resident
_LIVE_STATES: Final = 90  # states that one block holds at its peak; as `forward.estimate` has it, and a test compares
_BATCH_TOKENS: Final = 2048
_FLOAT32: Final = 4
_COPYING: Final = 61_000_000
_ROUNDING: Final = 200_000_000
_SCORED_TOKENS: Final = 256 * 2048  # by default
_TUNED: Final = Recipe(windows="", data={}, samples=128, seqlen=2048)

_LIMITS: Final = (  # of a control group: root, limit, use, name of what can be given back at once
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A library; `version` is empty when it is not installed, `extra` when shardxform does not work without it."""

    name: str
    version: str
    least: str
    extra: str
    enables: str

    @property
    def usable(self) -> bool:
        """Whether it is installed, and new enough."""
        return bool(self.version) and _numbers(self.version) >= _numbers(self.least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A GPU, and its memory in bytes."""

    name: str
    model: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is; sizes in bytes, None where the system does not say.

    Attributes:
        memory_bytes, available_bytes: of main memory, as far as a container lets this process have it.
        disk: where outputs would be written.
        free_bytes: that may be written there.
        cores: that this process may use.
        devices: GPUs; `devices_unknown` says why they could not be listed.

    """

    system: str
    python: str
    memory_bytes: int | None
    available_bytes: int | None
    disk: str
    free_bytes: int
    cores: int
    devices: tuple[Device, ...]
    devices_unknown: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What a checkpoint's needs are made of; in bytes.

    Attributes:
        name: of the model.
        nbytes: of all tensors.
        block, head: the largest decoder block, and the output head.
        tuning: memory for tuning the block that takes most, by default.
        hidden: width of the hidden states, in elements.
        outlook: what could be written -> bytes.
        quantized: whether it is quantized already.

    """

    name: str
    nbytes: int
    block: int
    head: int
    tuning: int
    hidden: int
    outlook: Mapping[str, int]
    quantized: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one command takes. `lacks` says what stands against it; empty when nothing does."""

    command: str
    memory_bytes: int
    disk_bytes: int
    lacks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything that was found. `problems` are what keeps shardxform from working at all."""

    machine: Machine
    libraries: tuple[Library, ...]
    model: str
    needs: tuple[Need, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        libraries = [{**asdict(library), "usable": library.usable} for library in self.libraries]
        return {"shardxform": __version__, **asdict(self), "libraries": libraries}


REFERENCE: Final = Sizes(
    name="Qwen3.5-35B-A3B",
    nbytes=71_903_655_008,
    block=1_685_402_304,
    head=1_017_118_720,
    tuning=11_380_790_880,
    hidden=2048,
    outlook={
        "quantize to W4A16": 22_134_223_968,
        "prune to 128 experts": 37_981_147_232,
        "prune to 128 experts and quantize to W4A16": 12_056_334_432,
    },
)
"""A model whose sizes are known without its files, from the shapes of its release."""


def diagnose(disk: Path, source: Path | None = None) -> Diagnosis:
    """Look at the machine, and hold it against the needs of `source`, or of the reference model.

    Args:
        disk: where outputs would be written; need not exist yet.
        source: a checkpoint.

    Raises:
        CheckpointError, FamilyError: the checkpoint cannot be read.

    """
    libraries = tuple(map(_library, _WANTED))
    machine = _machine(disk, libraries)
    sizes = sizes_of(Checkpoint.open(source)) if source else REFERENCE
    return Diagnosis(
        machine=machine,
        libraries=libraries,
        model=sizes.name,
        needs=tuple(_needs(sizes, machine, {each.name: each for each in libraries})),
        problems=tuple(
            f"{each.name} {each.version or 'is missing'}: {each.least} or later is needed for {each.enables}"
            for each in libraries
            if not each.extra and not each.usable
        ),
    )


def version_lines() -> list[str]:
    """Return shardxform's version, then those of python and the libraries that are installed, without importing any."""
    found = [(each.name, each.version) for each in map(_library, _WANTED) if each.version]
    found += [(name, version) for name in ("auto-round", "compressed-tensors") if (version := _version(name))]
    rows = [("python", platform.python_version()), *found]
    width = max(len(name) for name, _ in rows)
    return [f"shardxform {__version__}", *(f"  {name:<{width}}  {version}" for name, version in rows)]


# -- needs ------------------------------------------------------------------------------------------------------------


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """Work out the sizes of a checkpoint, from headers alone; quantized weights count as in 16 bits.

    Raises:
        FamilyError: see `layout.layout_of`.
        CheckpointError: it is quantized, but not as its config says.

    """
    layout, refs, quantized = _seen(checkpoint)
    blocks: Counter[tuple[str, int]] = Counter()
    heads: Counter[str] = Counter()
    for ref in refs:
        place = layout.places.get(ref.name)
        if place and place.scope in ("block", "mtp") and place.layer is not None:
            blocks[place.scope, place.layer] += ref.nbytes
        elif place and place.role in ("lm head", "embeddings"):
            heads[place.role] += ref.nbytes
    hidden = layout.text.get("hidden_size")
    tuned = sizes_of_blocks({ref.name: ref for ref in refs}, layout.places).values()
    return Sizes(
        name=checkpoint.root.resolve().name,
        nbytes=checkpoint.nbytes,
        block=max(blocks.values(), default=0),
        head=heads["lm head"] or heads["embeddings"],
        tuning=max((size.peak_bytes(_TUNED) for size in tuned), default=0),
        hidden=hidden if type(hidden) is int else 0,
        outlook={} if quantized else inspect_checkpoint(checkpoint).outlook,
        quantized=quantized,
    )


def _seen(checkpoint: Checkpoint) -> tuple[Layout, list[TensorRef], bool]:
    """Tensors of a checkpoint as a forward pass sees them."""
    quantized = bool(checkpoint.config.get("quantization_config"))
    if quantized:
        with contextlib.suppress(SchemeError):
            stored = read_stored(checkpoint)
            return stored.layout, [*stored.weights.values(), *stored.plain.values()], True
    tensors = checkpoint.tensors
    return layout_of(checkpoint.config, tensors, checkpoint.where), list(tensors.values()), quantized


def _needs(sizes: Sizes, machine: Machine, libraries: Mapping[str, Library]) -> Iterator[Need]:
    """What every command takes, with its defaults; on the CPU, where computing is in float32."""
    state = sizes.hidden * _FLOAT32
    live = _LIBRARIES + _LIVE_STATES * _BATCH_TOKENS * state
    if not sizes.quantized:
        for what, nbytes in sizes.outlook.items():
            memory = _ROUNDING if "quantize" in what else _COPYING
            yield _need(what, memory, nbytes, machine)
    largest = max(sizes.block, sizes.head)
    one, two = (2 * _SCORED_TOKENS * state * chains for chains in (1, 2))
    lacking = [name for name in _MODEL_LIBRARIES if not libraries[name].usable]
    if not sizes.quantized:
        yield _need("score", live + largest, one, machine, lacking)
    yield _need("evaluate", live + largest, one, machine, lacking)
    if not sizes.quantized:
        yield _need("evaluate --against", live + 2 * largest, two, machine, lacking)
        written = sizes.outlook.get("quantize to W4A16", 0) + 4 * _TUNED.samples * _TUNED.seqlen * state
        yield _need("quantize --method auto-round", sizes.tuning, written, machine, lacking)


def _need(command: str, memory: int, disk: int, machine: Machine, lacking: list[str] | None = None) -> Need:
    lacks = list(lacking or [])
    if machine.available_bytes is not None and memory > machine.available_bytes:
        lacks.append("memory")
    if disk > machine.free_bytes:
        lacks.append("disk")
    return Need(command=command, memory_bytes=memory, disk_bytes=disk, lacks=tuple(lacks))


# -- the machine ------------------------------------------------------------------------------------------------------


def _machine(disk: Path, libraries: tuple[Library, ...]) -> Machine:
    total, available = _memory()
    torch = next(each.version for each in libraries if each.name == "torch")
    devices, unknown = _devices(torch)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        memory_bytes=total,
        available_bytes=available,
        disk=str(disk if disk.exists() else nearest(disk)),
        free_bytes=FileSystem().free_bytes(disk),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        devices=devices,
        devices_unknown=unknown,
    )


def _memory() -> tuple[int | None, int | None]:
    """Memory in all and available; the least of what the machine and its control groups say."""
    found = [_meminfo(), *_control_groups()]
    totals = [total for total, _ in found if total is not None]
    free = [available for _, available in found if available is not None]
    return min(totals, default=None), min(free, default=None)


def _meminfo() -> tuple[int | None, int | None]:
    text = _text(Path("/proc/meminfo"))
    sizes = {key: int(kib) << 10 for key, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    total = sizes.get("MemTotal")
    if total is None:
        with contextlib.suppress(OSError, ValueError):  # no Linux
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, sizes.get("MemAvailable")


def _control_groups() -> Iterator[tuple[int, int]]:
    """Limit and what is left of it, of every group that this process is in and that has one."""
    paths = [line.split(":", 2)[2] for line in _text(Path("/proc/self/cgroup")).splitlines() if line.count(":") >= 2]
    for root, limit_name, use_name, spare_name in _LIMITS:
        for folder in sorted({group for path in paths for group in _above(Path(root), path)}):
            limit, use = _text(folder / limit_name).strip(), _text(folder / use_name).strip()
            if not limit.isdecimal() or int(limit) >= 1 << 60:  # "max", or as large as the type holds
                continue
            spare = re.search(rf"^{spare_name} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            used = (int(use) if use.isdecimal() else 0) - (int(spare[1]) if spare else 0)
            yield int(limit), max(0, int(limit) - max(0, used))


def _above(root: Path, path: str) -> Iterator[Path]:
    """A group's folder and those of all groups that it is in; in a container its own is the root."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for end in range(len(parts) + 1):
        yield root.joinpath(*parts[:end])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _devices(torch_version: str) -> tuple[tuple[Device, ...], str]:
    """GPUs that torch sees, or why it cannot be asked."""
    if not torch_version:
        return (), "torch is not installed"
    if torch_version.endswith("+cpu"):
        return (), "this torch is made for the CPU alone"
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = [torch.cuda.get_device_properties(number) for number in range(count)]
    except (ImportError, OSError, RuntimeError) as e:
        return (), f"torch cannot be asked: {(str(e).splitlines() or [type(e).__name__])[0]}"
    return tuple(
        Device(name=f"cuda:{number}", model=each.name, memory_bytes=each.total_memory)
        for number, each in enumerate(found)
    ), ""


def _library(wanted: tuple[str, str, str, str]) -> Library:
    name, least, extra, enables = wanted
    return Library(name=name, version=_version(name), least=least, extra=extra, enables=enables)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of `2.13.0+cpu`."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


# -- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output(JsonFlags):
    disk: Path = option("Where outputs would be written.", default=Path(), metavar="DIR")


@command("doctor")
@click.argument("source", metavar="[SRC]", required=False, type=PATH)
def doctor_command(source: Path | None, output: _Output) -> None:
    """Show memory, disk, cores, GPUs and libraries, and which commands they are enough for.

    What a command takes is worked out from SRC's headers; without SRC, for Qwen3.5-35B-A3B. Exits with 1 when
    something is missing without which nothing works.
    """
    found = diagnose(output.disk, source)
    if output.as_json:
        print_json(found.to_dict())
    else:
        _show(found)
    raise click.exceptions.Exit(1 if found.problems else 0)


def _show(found: Diagnosis) -> None:
    rows(_machine_lines(found.machine))
    click.echo()
    table(("library", "version", "wanted", "extra"), _library_lines(found))
    for extra, names in _missing(found).items():
        click.echo(f"  not there: {', '.join(names)}; pip install 'shardxform[{extra}]'")
    click.echo()
    table((found.model, "memory", "disk", ""), map(_need_line, found.needs))
    for problem in found.problems:
        click.echo(f"  PROBLEM: {problem}")


def _machine_lines(machine: Machine) -> Iterator[tuple[str, str]]:
    yield "system", f"{machine.system}, Python {machine.python}"
    yield "memory", f"{_known(machine.memory_bytes)}, {_known(machine.available_bytes)} of it available"
    yield "disk", f"{gb(machine.free_bytes)} free in {machine.disk}"
    yield "cores", str(machine.cores)
    listed = ", ".join(f"{each.name} {each.model} ({gb(each.memory_bytes)})" for each in machine.devices)
    yield "GPUs", listed or machine.devices_unknown or "none that torch sees"


def _known(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else gb(nbytes)


def _library_lines(found: Diagnosis) -> Iterator[tuple[str, ...]]:
    for each in found.libraries:
        yield each.name, each.version or "-", f">= {each.least}", each.extra or "required"


def _missing(found: Diagnosis) -> dict[str, list[str]]:
    """Libraries of every extra that are not there or too old, and what they are for."""
    out: dict[str, list[str]] = {}
    for each in found.libraries:
        if each.extra and not each.usable:
            out.setdefault(each.extra, []).append(f"{each.name} ({each.enables})")
    return out


def _need_line(need: Need) -> tuple[str, ...]:
    verdict = f"too little or missing: {', '.join(need.lacks)}" if need.lacks else "fits"
    return need.command, gb(need.memory_bytes), gb(need.disk_bytes), verdict
