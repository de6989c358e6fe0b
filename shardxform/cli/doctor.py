"""`shardxform doctor`: what this machine has, and which commands that is enough for.

Looks and changes nothing. Needs are worked out from a checkpoint's headers, or known for one model by name. torch is
imported only to list GPUs, and only when the torch that is installed could see one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

import click

from shardxform import __version__
from shardxform.ask.recipe import Recipe
from shardxform.base.constants import BATCH_TOKENS
from shardxform.base.file_system import FileSystem, nearest
from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import Checkpoint
from shardxform.cli.console import gb, print_json, rows, say, table
from shardxform.cli.options import PATH, FamilyFlags, JsonFlags, command, option
from shardxform.errors import SchemeError
from shardxform.formats.config_names import declares
from shardxform.formats.stored import read_stored
from shardxform.model.layout import Layout, layout_of
from shardxform.plan.inspection import inspect_checkpoint
from shardxform.plan.steps import sizes_of
from shardxform.runtimes import as_family

__all__ = [
    "REFERENCE",
    "Library",
    "Machine",
    "ModelSizes",
    "Need",
    "command_needs",
    "doctor_command",
    "libraries",
    "machine_of",
    "model_sizes",
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
    ("packaging", "23", "models", "which transformers that is"),
    ("pyarrow", "15", "models", "text from Parquet files"),
    ("scipy", "1.10", "models", "--merge"),
    ("huggingface_hub", "1.0", "hub", "checkpoints and data sets of the hub, push"),
    ("ray", "2.40", "ray", "--ray: steps on many machines"),
    ("matplotlib", "3.8", "plot", "select --plot, evaluate --plot"),
)
_BESIDE: Final = ("auto-round", "compressed-tensors")  # clients, whose versions matter in a report
_MODEL_LIBRARIES: Final = ("torch", "transformers")

_LIBRARIES: Final = 450_000_000  # python, torch, transformers and a tokenizer, resident
_LIVE_STATES: Final = 90  # states that one block holds at its peak; as `forward.estimate` has it, and a test compares
_FLOAT32: Final = 4
_COPYING: Final = 61_000_000
_ROUNDING: Final = 200_000_000
_SCORED_TOKENS: Final = 256 * 2048  # by default
_TUNED: Final = Recipe(windows="", data={}, samples=128, seqlen=2048)

_LIMITS: Final = (  # of a control group: root, limit, use, name of what can be given back at once
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Library(NamedTuple):
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
class Machine:
    """What there is; sizes in bytes, as far as a container lets this process have it, None where nothing says."""

    system: str
    python: str
    memory_bytes: int | None
    available_bytes: int | None
    disk: str
    free_bytes: int
    cores: int
    devices: tuple[dict[str, str | int], ...]
    devices_unknown: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What a checkpoint's needs are made of; in bytes.

    Attributes:
        name: of the model.
        block, head: the largest decoder block, and the output head.
        tuning: memory for tuning the block that takes most, by default.
        hidden: width of the hidden states, in elements.
        outlook: what could be written -> bytes; None of a checkpoint that is quantized already.

    """

    name: str
    block: int
    head: int
    tuning: int
    hidden: int
    outlook: Mapping[str, int] | None


class Need(NamedTuple):
    """What one command takes."""

    command: str
    memory_bytes: int
    disk_bytes: int
    lacks: tuple[str, ...]


REFERENCE: Final = ModelSizes(
    name="Qwen3.5-35B-A3B",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output(JsonFlags):
    disk: Path = option("Where outputs would be written.", default=Path(), metavar="DIR")


@command("doctor")
@click.argument("source", metavar="[SRC]", required=False, type=PATH)
def doctor_command(source: Path | None, family: FamilyFlags, output: _Output) -> None:
    """Show memory, disk, cores, GPUs and libraries, and which commands they are enough for.

    What a command takes is worked out from SRC's headers; without SRC, for Qwen3.5-35B-A3B. Exits with 1 when
    something is missing without which nothing works.
    """
    family.load()
    found = libraries()
    machine = machine_of(output.disk, found["torch"].version)
    sizes = model_sizes(as_family(Checkpoint.open(source))) if source else REFERENCE
    needs = list(command_needs(sizes, machine, [name for name in _MODEL_LIBRARIES if not found[name].usable]))
    problems = [
        f"{each.name} {each.version or 'is missing'}: {each.least} or later is needed for {each.enables}"
        for each in found.values()
        if not each.extra and not each.usable
    ]
    if output.as_json:
        listed = [{**each._asdict(), "usable": each.usable} for each in found.values()]
        known = {"shardxform": __version__, "machine": asdict(machine), "libraries": listed, "model": sizes.name}
        print_json({**known, "needs": [need._asdict() for need in needs], "problems": problems})
    else:
        _show(machine, list(found.values()), sizes.name, needs)
        for problem in problems:
            say(f"  PROBLEM: {problem}")
    raise click.exceptions.Exit(1 if problems else 0)


def _show(machine: Machine, found: Sequence[Library], model: str, needs: Sequence[Need]) -> None:
    memory, available = (
        "unknown" if size is None else gb(size) for size in (machine.memory_bytes, machine.available_bytes)
    )
    listed = ", ".join(f"{gpu['name']} {gpu['model']} ({gb(int(gpu['memory_bytes']))})" for gpu in machine.devices)
    rows(
        [
            ("system", f"{machine.system}, Python {machine.python}"),
            ("memory", f"{memory}, {available} of it available"),
            ("disk", f"{gb(machine.free_bytes)} free in {machine.disk}"),
            ("cores", str(machine.cores)),
            ("GPUs", listed or machine.devices_unknown or "none that torch sees"),
        ]
    )
    say()
    lines = ((each.name, each.version or "-", f">= {each.least}", each.extra or "required") for each in found)
    table(("library", "version", "wanted", "extra"), lines)
    for extra in dict.fromkeys(each.extra for each in found if each.extra and not each.usable):
        names = [f"{each.name} ({each.enables})" for each in found if each.extra == extra and not each.usable]
        say(f"  not there: {', '.join(names)}; pip install 'shardxform[{extra}]'")
    say()
    verdicts = (f"too little or missing: {', '.join(need.lacks)}" if need.lacks else "fits" for need in needs)
    sizes = ((need.command, gb(need.memory_bytes), gb(need.disk_bytes)) for need in needs)
    table((model, "memory", "disk", ""), ((*row, verdict) for row, verdict in zip(sizes, verdicts, strict=True)))


# -- libraries --------------------------------------------------------------------------------------------------------


def libraries() -> dict[str, Library]:
    """Return what is wanted, by name, with the versions that are installed; imports none of it."""
    return {name: Library(name, _version(name), least, extra, use) for name, least, extra, use in _WANTED}


def version_lines() -> list[str]:
    """Return shardxform's version, then those of python and the libraries that are installed, without importing any."""
    found = {name: _version(name) for name in (*libraries(), *_BESIDE)}
    versions = {"python": platform.python_version()} | {name: version for name, version in found.items() if version}
    width = max(map(len, versions))
    return [f"shardxform {__version__}", *(f"  {name:<{width}}  {version}" for name, version in versions.items())]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of `2.13.0+cpu`."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


# -- needs ------------------------------------------------------------------------------------------------------------


def model_sizes(checkpoint: Checkpoint) -> ModelSizes:
    """Work out the sizes of a checkpoint, from headers alone; quantized weights count as in 16 bits.

    Raises:
        FamilyError: see `layout.layout_of`.
        CheckpointError: it is quantized, but not as its config says.

    """
    layout, refs = _seen(checkpoint)
    blocks: Counter[tuple[str, int]] = Counter()
    heads: Counter[str] = Counter()
    for ref in refs:
        place = layout.places.get(ref.name)
        if place and place.scope in ("block", "mtp") and place.layer is not None:
            blocks[place.scope, place.layer] += ref.nbytes
        elif place and place.role in ("lm head", "embeddings"):
            heads[place.role] += ref.nbytes
    hidden = layout.text.get("hidden_size")
    tuned = sizes_of({ref.name: ref for ref in refs}, layout.places).values()
    return ModelSizes(
        name=checkpoint.root.resolve().name,
        block=max(blocks.values(), default=0),
        head=heads["lm head"] or heads["embeddings"],
        tuning=max((size.peak_bytes(_TUNED) for size in tuned), default=0),
        hidden=hidden if type(hidden) is int else 0,
        outlook=None if declares(checkpoint.config) else inspect_checkpoint(checkpoint).outlook,
    )


def _seen(checkpoint: Checkpoint) -> tuple[Layout, list[TensorRef]]:
    """Tensors of a checkpoint as a forward pass sees them."""
    if declares(checkpoint.config):
        with contextlib.suppress(SchemeError):
            stored = read_stored(checkpoint)
            return stored.layout, [*stored.weights.values(), *stored.plain.values()]
    tensors = checkpoint.tensors
    return layout_of(checkpoint.config, tensors, checkpoint.where), list(tensors.values())


def command_needs(sizes: ModelSizes, machine: Machine, lacking: Sequence[str] = ()) -> Iterator[Need]:
    """What every command takes, with its defaults; on the CPU, where computing is in float32.

    `lacking` are libraries that running the model needs and that are not there.
    """

    def need(command: str, memory: int, disk: int, lacks: Sequence[str] = lacking) -> Need:
        memory_lacks = machine.available_bytes is not None and memory > machine.available_bytes
        short = [*["memory"] * memory_lacks, *["disk"] * (disk > machine.free_bytes)]
        return Need(command, memory, disk, (*lacks, *short))

    state = sizes.hidden * _FLOAT32
    running = _LIBRARIES + _LIVE_STATES * BATCH_TOKENS * state
    largest = max(sizes.block, sizes.head)
    states = 2 * _SCORED_TOKENS * state
    if sizes.outlook is None:
        yield need("evaluate", running + largest, states)
        return
    for what, nbytes in sizes.outlook.items():
        yield need(what, _ROUNDING if "quantize" in what else _COPYING, nbytes, ())
    yield need("score", running + largest, states)
    yield need("evaluate", running + largest, states)
    yield need("evaluate --against", running + 2 * largest, 2 * states)
    written = sizes.outlook.get("quantize to W4A16", 0) + 4 * _TUNED.samples * _TUNED.seqlen * state
    yield need("quantize --method auto-round", sizes.tuning, written)


# -- the machine ------------------------------------------------------------------------------------------------------


def machine_of(disk: Path, torch_version: str) -> Machine:
    """Look at this machine; `disk`, where outputs would be written, need not exist yet."""
    total, available = _memory()
    devices, unknown = _devices(torch_version)
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


def _devices(torch_version: str) -> tuple[tuple[dict[str, str | int], ...], str]:
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
        {"name": f"cuda:{number}", "model": each.name, "memory_bytes": each.total_memory}
        for number, each in enumerate(found)
    ), ""
