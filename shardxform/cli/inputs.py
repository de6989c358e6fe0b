"""What a command line names, opened and read: checkpoints, manifests, text, the device to compute on.

Everything that can be refused is refused here, before anything takes time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shardxform.ask.manifest import Manifest
from shardxform.checkpoint.identity import identity_when_asked
from shardxform.checkpoint.remote.repository import SCHEME, RepoName, is_ambiguous
from shardxform.checkpoint.table import CONFIG, GGUF_SUFFIX, Checkpoint, find_gguf, stopped
from shardxform.cli.console import tell
from shardxform.cli.options import ComputeFlags, HealFlags, HubFlags, PruneFlags, Source, TextFlags, TransferFlags
from shardxform.errors import CheckpointError, OutputError, PlanError
from shardxform.model.families import in_use
from shardxform.model.layout import layout_of, refuse_longer
from shardxform.runtimes import as_family

if TYPE_CHECKING:
    from shardxform.calibration import Windows
    from shardxform.checkpoint.gguf import GgufModel
    from shardxform.checkpoint.remote.reading import Downloads
    from shardxform.forward.weights import Precision

__all__ = [
    "family_words",
    "is_gguf",
    "load_gguf_manifest",
    "load_manifest",
    "load_text",
    "make_precision",
    "open_all_named",
    "open_gguf_named",
    "open_named",
    "refuse_no_data",
    "refuse_nothing_pruned",
    "refuse_unwritable",
    "require",
]

_CONNECTIONS: Final = 4
_CACHE_BYTES: Final = 10 * 10**9


# -- checkpoints and manifests ----------------------------------------------------------------------------------------


def open_named(source: Source, hub: HubFlags, folder: Path) -> Checkpoint:
    """Open one checkpoint; see `open_all_named`."""
    return open_all_named([source], hub, folder)[0]


def open_all_named(sources: Sequence[Source], hub: HubFlags, folder: Path) -> list[Checkpoint]:
    """Open what was named on the command line.

    Args:
        sources: folders and repositories.
        hub: how a repository is read.
        folder: a place on the disk that is to hold what was fetched and not yet read.

    Raises:
        CheckpointError, RemoteError: see `opening.open_checkpoint`.

    """
    if all(isinstance(source, Path) for source in sources):
        _refuse_transfer(hub, str(sources[0]))
        return [_open_folder(source) for source in sources if isinstance(source, Path)]
    from shardxform.checkpoint.opening import asks_hub, open_checkpoint

    fetched = _downloads(hub, folder)
    for source in sources:
        if isinstance(source, RepoName) and source.as_path and asks_hub():
            tell(f"note: no folder {source.repo} here; asking the hub")
    return [_open_folder(s) if isinstance(s, Path) else as_family(open_checkpoint(s, fetched)) for s in sources]


def _refuse_transfer(hub: HubFlags, where: str) -> None:
    """Refuse options that say how the hub is read where it is not."""
    cache = hub.cache_limit if isinstance(hub, TransferFlags) else None
    for option, value in (("--connections", hub.connections), ("--cache-limit", cache)):
        if value is not None:
            raise click.UsageError(f"{option} is for repositories of the hub, but {where} is a folder")


def _downloads(hub: HubFlags, folder: Path) -> Downloads:
    """What fetches of the hub; see `open_all_named`."""
    from shardxform.checkpoint.remote import reading

    cache = hub.cache_limit if isinstance(hub, TransferFlags) else None
    if cache is not None and cache < reading.LEAST_CACHE_BYTES:
        raise click.UsageError(f"--cache-limit: expected at least {reading.LEAST_CACHE_BYTES:,} bytes, found {cache:,}")
    transfer = reading.Transfer(
        connections=hub.connections or _CONNECTIONS, cache_bytes=cache or _CACHE_BYTES, folder=_existing(folder)
    )
    return reading.Downloads(transfer)


def is_gguf(source: Source) -> bool:
    """Whether a model in GGUF was named on the command line: a file, a folder of one model, or a repository's file.

    Raises:
        CheckpointError: see `gguf.find_gguf`.

    """
    if isinstance(source, RepoName):
        if source.as_path and source.repo.endswith(GGUF_SUFFIX):
            raise CheckpointError(f"{source.repo}: no such file")
        return bool(source.file)
    return find_gguf(source) is not None


def open_gguf_named(source: Source, hub: HubFlags | None = None, folder: Path = Path()) -> GgufModel | None:
    """Open what was named on the command line if it is GGUF, else None; see `open_all_named`.

    Raises:
        CheckpointError, RemoteError: see `gguf.find_gguf`, `gguf.open_gguf` and `opening.open_gguf_file`.

    """
    if not is_gguf(source):
        return None
    if isinstance(source, RepoName):
        from shardxform.checkpoint.opening import open_gguf_file

        return open_gguf_file(source, _downloads(hub or HubFlags(), folder))
    _refuse_transfer(hub or HubFlags(), str(source))
    from shardxform.checkpoint.gguf import open_gguf

    first = find_gguf(source)
    assert first is not None
    return open_gguf(first)


def _open_folder(path: Path) -> Checkpoint:
    """Open a folder; one that is no checkpoint, but is called as a repository could be, hides that repository."""
    try:
        return as_family(Checkpoint.open(path))
    except CheckpointError as e:
        if not is_ambiguous(str(path)) or (path / CONFIG).exists() or stopped(path):
            raise
        raise CheckpointError(f"{e}; for the repository of the hub of that name, write {SCHEME}{path}") from e


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def family_words() -> list[str]:
    """The options that name the families in use, for a command line that is proposed."""
    return [word for each in in_use() if each.path for word in ("--family", each.path)]


def load_manifest(pruned: PruneFlags, checkpoint: Checkpoint) -> Manifest | None:
    """Read the manifest given on the command line, if any; it must be this checkpoint's unless --any-source is given.

    Raises:
        ManifestError: see `Manifest.load`; or it was chosen on another checkpoint.

    """
    if pruned.manifest is None:
        return None
    manifest = Manifest.load(pruned.manifest, layout_of(checkpoint.config, checkpoint.tensors, checkpoint.where))
    if pruned.any_source:
        return manifest.of_any_source()
    if "identity" in manifest.model:
        manifest.refuse_other_source(identity_when_asked(checkpoint), checkpoint.shards)
    return manifest


def load_gguf_manifest(pruned: PruneFlags, model: GgufModel) -> Manifest:
    """Read the manifest given on the command line for a model in GGUF; see `load_manifest`.

    With --any-source it may be one that was chosen on the model's safetensors, whatever these call the model.

    Raises:
        ManifestError: see `Manifest.load`.

    """
    from shardxform.plan.slabs import pruned_of_slabs
    from shardxform.runtimes.gguf.slabs import slabs_of

    assert pruned.manifest is not None
    of = pruned_of_slabs(slabs_of(model.metadata, model.table.tensors, model.where))
    if not pruned.any_source:
        return Manifest.load(pruned.manifest, of)
    manifest = Manifest.load(pruned.manifest, replace(of, is_called=lambda _: True)).of_any_source()
    return replace(manifest, model={key: value for key, value in manifest.model.items() if key != "model_type"})


# -- text -------------------------------------------------------------------------------------------------------------


def load_text(text: TextFlags, source: Checkpoint, *, against: Checkpoint | None = None) -> Windows:
    """Read the text that was named with the tokenizer of the checkpoint, and say what is to be said of it.

    A model that is run on the same windows, `against`, must read the same ids in the text.

    Raises:
        RemoteError: the tokenizer is on the hub, which does not give it.
        CheckpointError: the tokenizer is none, or not the model's; see `calibration.load_windows`.
        FamilyError: windows are longer than the model is run over.
        PlanError: no data named, or none found, or two models that read it otherwise; see there too.

    """
    refuse_no_data(text)
    require("transformers")
    options = text.read()
    from shardxform.calibration import load_windows

    for checkpoint in filter(None, (source, against)):
        refuse_longer(layout_of(checkpoint.config, (), checkpoint.where), options.seqlen, checkpoint.where)
        checkpoint.bring()
    windows = load_windows(source.root, options, against.root if against else None)
    for note in windows.notes:
        tell(f"note: {note}")
    return windows


def refuse_no_data(text: TextFlags) -> None:
    """Refuse a command line that names no text, or text that is not there, before anything takes time.

    Raises:
        PlanError: what is there is no data.

    """
    from shardxform.calibration.documents import local_files

    if text.data is None:
        raise click.UsageError("Missing option '--data'.")
    local_files(text.data)


def refuse_nothing_pruned(healing: HealFlags, text: TextFlags, *, prunes: bool, ways: str) -> None:
    """Refuse --heal and --merge where nothing is pruned, before data are asked for; `ways` are those to prune.

    Raises:
        UsageError: names what is missing, the data included.

    """
    if not healing.asked or healing.none or prunes:
        return
    data = "" if text.data else ", and --data"
    if healing.heal is None:
        raise click.UsageError(f"--merge: nothing is pruned, so there is nothing to merge; give {ways}{data}.")
    raise click.UsageError(f"--heal: nothing is pruned, so there is nothing to heal; give {ways}{data}.")


# -- the machine ------------------------------------------------------------------------------------------------------


def make_precision(asked: ComputeFlags, *, tunes: bool = False, here: bool = True) -> Precision:
    """Find the device; auto is bfloat16 on accelerators, and for tuning on a CPU that multiplies it.

    That halves the time there (benchmarks/README.md), and the results are as good (docs/quantization.md).

    Args:
        asked: device and type.
        tunes: whether it is to tune, rather than to measure.
        here: whether this machine must have the device, rather than those of a cluster.

    Raises:
        PlanError: torch or transformers is not installed, or there is no such device here.

    """
    require("torch", "transformers")
    import torch
    from transformers.utils import logging

    from shardxform.forward.weights import Precision

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    try:
        place = torch.device(asked.device)
        if here:
            torch.zeros(1, dtype=torch.float64, device=place).item()  # sums over tokens are
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as e:
        raise PlanError(f"--device {asked.device}: {str(e).splitlines()[0]}") from e
    dtype: str = asked.dtype or "auto"
    if dtype == "auto":
        dtype = "bfloat16" if place.type != "cpu" or (tunes and _cpu_multiplies_bfloat16()) else "float32"
    return Precision(place, getattr(torch, dtype))


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; without them products in bfloat16 are slower than in float32."""
    import torch

    can: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def require(*libraries: str, extra: str = "models") -> None:
    """Refuse to go on without libraries that only some commands need.

    Raises:
        PlanError: names what is missing and how to get it.

    """
    for name in libraries:
        if find_spec(name) is None:
            raise PlanError(f"this command needs {name}: pip install 'shardxform[{extra}]'")


def refuse_unwritable(path: Path) -> None:
    """Refuse a name for a result that could not be written at the end of hours of work.

    Raises:
        OutputError: a directory, or a name in a directory that is missing or may not be written to.

    """
    if path.is_dir():
        raise OutputError(f"{path}: expected the name of a file, found a directory")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: no directory {path.parent} to write it to; make it, or give another name")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: the directory {path.parent} is not writable")
