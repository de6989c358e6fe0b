"""A checkpoint directory as an immutable table: tensor name -> where its bytes are, with config and sidecars.

Opening reads the config, the index and the shards' headers, never tensor data. Whatever a stranger put there is
checked before anything relies on it; a malformed checkpoint is refused with the place of the fault.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from shardxform.base import tensors
from shardxform.base.file_system import not_a_directory
from shardxform.base.strict_json import JsonError, parse_config, parse_object
from shardxform.base.tensors import ByteRange, TensorRef, uncollected
from shardxform.errors import CheckpointError

if TYPE_CHECKING:
    from shardxform.checkpoint.remote.repository import Remote

__all__ = [
    "CONFIG",
    "GGUF_SUFFIX",
    "INDEX",
    "IN_GGUF",
    "MAX_SIDECAR_BYTES",
    "PROJECTOR",
    "QUANTIZATION",
    "SPLIT_NAME",
    "WORK",
    "Checkpoint",
    "Folder",
    "Head",
    "Shard",
    "Sidecar",
    "find_gguf",
    "first_file",
    "is_plain_name",
    "scan",
    "stopped",
]

CONFIG: Final = "config.json"
INDEX: Final = "model.safetensors.index.json"
QUANTIZATION: Final = "hf_quant_config.json"  # of ModelOpt, where config.json does not say it
WORK: Final = ".shardxform"  # of an output that is still to be written
_SINGLE: Final = "model.safetensors"
GGUF_SUFFIX: Final = ".gguf"
SPLIT_NAME: Final = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")  # of one of several files in GGUF
PROJECTOR: Final = "mmproj"  # how files in GGUF begin that hold no decoder
_PARTIAL: Final = ".gguf.partial"
_OF_MISTRAL: Final = "params.json"
IN_GGUF: Final = "a model in GGUF, which can be inspected, pruned and verified; expected a checkpoint in safetensors"
"""What is said of a model in GGUF where it is none of what is taken."""
_MAX_JSON_BYTES: Final = 64 << 20
MAX_SIDECAR_BYTES: Final = 256 << 20

# What transformers, vLLM and SGLang read beside the shards, and what a publisher must pass on. Lower case.
_SIDECARS: Final = (
    "*tokenizer*",
    "*.jinja",
    "*.model",
    "*.py",
    "*.tiktoken",
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "chat_template*",
    "generation_config.json",
    "license*",
    "licence*",
    "merges.txt",
    "notice*",
    "preprocessor_config.json",
    "processor_config.json",
    "readme*",
    "special_tokens_map.json",
    "usage_policy*",
    "use_policy*",
    "video_preprocessor_config.json",
    "vocab.*",
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One `.safetensors` file as it was when opened; `mtime_ns` is 0 where a commit stands for what it holds.

    `header_sha256` covers length prefix and JSON. `entries` are all its tensors, in the order of their data.
    """

    name: str
    nbytes: int
    data_start: int
    header_sha256: str
    mtime_ns: int
    entries: tuple[tensors.Entry, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A small file beside the shards that belongs to the model; `name` is relative to the checkpoint."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk, or a view of one that nobody wrote.

    `tensors` is in source order: shards by name, then offset. `config` is the parsed config.json, with what
    hf_quant_config.json says of quantized weights where it says nothing. `unread` names
    what else lies in the directory and is no part of the model. `remote` is the repository of the hub that the shards
    are read from; `root` is then where small files of it come to lie, see `file`.
    """

    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    shards: tuple[Shard, ...]
    sidecars: tuple[Sidecar, ...] = ()
    unread: tuple[str, ...] = ()
    remote: Remote | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a checkpoint directory from config, index and headers alone.

        Raises:
            CheckpointError: the first of everything that `scan` finds wrong.

        """
        checkpoint, errors = scan(Path(path))
        if errors or checkpoint is None:
            raise errors[0]
        return checkpoint

    @property
    def where(self) -> str:
        """What people call it: its directory, or `hf://owner/name@commit`."""
        return str(self.remote or self.root)

    def file(self, name: str) -> Path:
        """Where a small file of it lies, here by now; a path that leads nowhere if it has none of that name.

        Raises:
            RemoteError: the hub does not give it.

        """
        return self.remote.fetch(name) if self.remote else self.root / name

    def bring(self) -> None:
        """Have every sidecar in `root`, for those that look there themselves, such as tokenizers."""
        for sidecar in self.sidecars if self.remote else ():
            self.file(sidecar.name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(ref.nbytes for ref in self.tensors.values())


@dataclass(slots=True)
class _Table:
    """What `scan` gathers: tensors and shards that could be read, and every error on the way."""

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    errors: list[CheckpointError] = field(default_factory=list)

    def homes(self) -> dict[str, str]:
        """Name of the first shard that holds each tensor."""
        found: dict[str, str] = {}
        for shard in self.shards:
            for spec, _, _ in shard.entries:
                found.setdefault(spec.name, shard.name)
        return found


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a shard: length prefix and header, and what the file system says of the rest."""

    data: bytes
    nbytes: int
    mtime_ns: int


class Files(Protocol):
    """What `scan` looks at: a directory, or what stands for one."""

    def names(self) -> Iterable[str]:
        """Name every file beside each other; folders end in a slash."""

    def size(self, name: str) -> int | None:
        """Size in bytes; None of what is no regular file. Raises OSError."""

    def head(self, name: str) -> Head:
        """Read a shard's header. Raises OSError, CheckpointError."""


@uncollected()
def scan(root: Path, files: Files | None = None) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """Read a checkpoint's config, index and headers, and list everything that is wrong with them.

    Args:
        root: where config.json and the index lie.
        files: all files, if they do not all lie in `root`.

    Returns:
        the checkpoint as far as it could be read (None without config or shards), and the errors.

    """
    table = _Table()
    files = files or Folder(root)
    try:
        config = _read_json(root / CONFIG, root)
        beside = {} if any(_declares(config)) else _declared_beside(root)
        weight_map = _weight_map(root)
        names = sorted(set(weight_map.values()) if weight_map else _lone_shard(root, files))
        sidecars, unread, errors = _other_files(
            root, files, {*names, CONFIG, INDEX, *([QUANTIZATION] if beside else [])}
        )
    except CheckpointError as e:
        return None, [e]
    except OSError as e:
        return None, [CheckpointError(f"{root}: {e.strerror}")]
    for name in names:
        try:
            _read_shard(root, name, files, table)
        except CheckpointError as e:
            table.errors.append(e)
    dtypes = {spec.dtype for shard in table.shards for spec, _, _ in shard.entries}
    if any(map(_is_small, dtypes)):  # else it is left over from a conversion
        config = {**config, **beside}
    if weight_map:
        table.errors.extend(_compare_index(weight_map, table))
    table.errors.extend(errors)
    checkpoint = Checkpoint(root, config, table.tensors, tuple(table.shards), sidecars, unread)
    if not table.shards and not table.errors:
        table.errors.append(CheckpointError(f"{root}: no safetensors shard and no {INDEX}"))
    return checkpoint, table.errors


def _is_small(dtype: str) -> bool:
    return tensors.BITS.get(dtype, 16) <= 8 and dtype != "BOOL"


def _declares(config: Mapping[str, object]) -> Iterator[bool]:
    """Whether a config says how weights are quantized, at its top level or in a config within it."""
    for value in (config, *config.values()):
        yield isinstance(value, Mapping) and bool(value.get("quantization_config"))


def _declared_beside(root: Path) -> dict[str, Any]:
    """What ModelOpt says of quantized weights in a file of its own, in the form in which it stands in config.json.

    vLLM reads either form; the lists of modules differ in what they are called.

    Raises:
        CheckpointError: it does not say how weights are quantized.

    """
    path = root / QUANTIZATION
    if not os.path.lexists(path):
        return {}
    said = _read_json(path, root).get("quantization")
    if not isinstance(said, Mapping) or not isinstance(said.get("quant_algo"), str | None):
        raise CheckpointError(f"{path}: expected an object 'quantization' with a quant_algo, as ModelOpt writes it")
    if said.get("quant_algo") is None:
        return {}
    names = {"exclude_modules": "ignore"}
    declared = {names.get(key, key): value for key, value in said.items() if value is not None}
    return {"quantization_config": {"quant_method": "modelopt", **declared}}


def stopped(root: Path) -> str:
    """Say of an output that is still to be written that it is, since no other defect means anything; else empty."""
    if (root / CONFIG).exists() or not (root / WORK).is_dir():
        return ""
    return "the run that writes it was stopped, or is not done yet; run the same command again, and it goes on"


class Folder:
    """The files of a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def names(self) -> Iterable[str]:
        """Name every file, and those of the one folder that belongs to a model."""
        for entry in os.scandir(self._root):
            is_folder = _is_folder(entry)
            if entry.name == "additional_chat_templates" and is_folder:
                yield from (f"{entry.name}/{child.name}" for child in os.scandir(entry.path))
            else:
                yield entry.name + ("/" if is_folder else "")

    def size(self, name: str) -> int | None:
        """Size in bytes; None of what is no regular file."""
        info = (self._root / name).stat()
        return info.st_size if stat.S_ISREG(info.st_mode) else None

    def head(self, name: str) -> Head:
        """Read a shard's header."""
        path = self._root / name
        _refuse_irregular(path)
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            prefix = file.read(tensors.LENGTH_BYTES)
            start = tensors.data_start(prefix, info.st_size, str(path))
            return Head(prefix + file.read(start - tensors.LENGTH_BYTES), info.st_size, info.st_mtime_ns)


def is_plain_name(name: object) -> bool:
    """Whether `name` can only mean a file in the directory itself."""
    try:
        nbytes = len(name.encode("utf-8")) if isinstance(name, str) else 0
    except UnicodeEncodeError:
        return False
    return (
        isinstance(name, str)
        and 0 < nbytes <= 255
        and name not in (".", "..")
        and not re.search(r"[/\\\x00-\x1f\x7f]", name)
    )


def _read_json(path: Path, root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise CheckpointError(f"{root}: {IN_GGUF if root.suffix == GGUF_SUFFIX else not_a_directory(root)}")
    try:
        _refuse_irregular(path)
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: more than {_MAX_JSON_BYTES} bytes")
        return parse_config(data) if path.name == CONFIG else parse_object(data)
    except FileNotFoundError as e:
        why = f"unfinished: {stopped(root)}" if stopped(root) else ""
        if not why and any(entry.name.endswith(GGUF_SUFFIX) for entry in os.scandir(root)):
            why = IN_GGUF
        if not why and (root / _OF_MISTRAL).is_file():
            why = f"no {path.name}, but {_OF_MISTRAL}: Mistral's own layout is not read; take the release's files for"
            why += " transformers, which have a config.json and model-*.safetensors"
        raise CheckpointError(f"{root}: {why or f'no {path.name}; expected a checkpoint directory'}") from e
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from e
    except JsonError as e:
        raise CheckpointError(f"{path}: {e}") from e


def _refuse_irregular(path: Path) -> None:
    """Refuse pipes and devices, on which a read waits or never ends."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path}: expected a file")


def _weight_map(root: Path) -> dict[str, str]:
    """`weight_map` of the index, checked; empty when there is no index."""
    if not os.path.lexists(root / INDEX):
        return {}
    weight_map = _read_json(root / INDEX, root).get("weight_map")
    where = root / INDEX
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: expected a non-empty object 'weight_map'")
    if (root / _SINGLE).exists() and set(weight_map.values()) != {_SINGLE}:
        raise CheckpointError(
            f"{root}: {_SINGLE} lies beside an index of other shards: transformers reads the one, vLLM what the index"
            " lists; remove the one that is not meant"
        )
    plain: set[str] = set()
    for tensor, shard in weight_map.items():
        if isinstance(shard, str) and shard in plain:
            continue
        if not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{where}: weight_map[{tensor!r}]: expected a plain .safetensors file name, found {shard!r}"
            )
        plain.add(shard)
    return weight_map


def _lone_shard(root: Path, files: Files) -> list[str]:
    """The one shard of a checkpoint without an index."""
    names = sorted(name.rstrip("/") for name in files.names() if name.rstrip("/").endswith(".safetensors"))
    if _SINGLE in names:
        return [_SINGLE]
    if len(names) > 1:
        raise CheckpointError(f"{root}: {len(names)} .safetensors files but no {INDEX} to say which belong together")
    return names


def _read_shard(root: Path, name: str, files: Files, table: _Table) -> None:
    path = root / name
    try:
        head = files.head(name)
    except OSError as e:
        listed = (root / INDEX).exists() and isinstance(e, FileNotFoundError)
        detail = "listed in the index but missing" if listed else e.strerror
        raise CheckpointError(f"{path}: {detail}") from e
    start = len(head.data)
    entries = tensors.decode(head.data[tensors.LENGTH_BYTES :], head.nbytes - start, str(path))
    digest = hashlib.sha256(head.data).hexdigest()
    places = tensors.many(ByteRange, ((name, start + begin, end - begin) for _, begin, end in entries))
    specs = [spec for spec, _, _ in entries]
    refs = map(TensorRef, specs, [(place,) if place.length else () for place in places])
    found = dict(zip([spec.name for spec in specs], refs, strict=True))
    if not table.tensors.keys().isdisjoint(found):
        homes = table.homes()
        for twice in [each for each in found if each in homes]:
            table.errors.append(CheckpointError(f"{path}: tensor '{twice}' is also in {homes[twice]}"))
            del found[twice]
    table.tensors.update(found)
    table.shards.append(Shard(name, head.nbytes, start, digest, head.mtime_ns, entries))


def _compare_index(weight_map: Mapping[str, str], table: _Table) -> Iterable[CheckpointError]:
    said = ({weight_map.get(spec.name) for spec, _, _ in shard.entries} == {shard.name} for shard in table.shards)
    if len(weight_map) == len(table.tensors) and all(said):
        return
    read, homes = {shard.name for shard in table.shards}, table.homes()
    for name, shard in weight_map.items():
        home = homes.get(name)
        if shard in read and home != shard:
            found = f"it is in {home}" if home else "no shard has it"
            yield CheckpointError(f"{INDEX}: tensor '{name}' should be in {shard}, but {found}")
    for name, home in homes.items():
        if name not in weight_map:
            yield CheckpointError(f"{INDEX}: tensor '{name}' is in {home} but not in the index")


def _other_files(
    root: Path, files: Files, known: set[str]
) -> tuple[tuple[Sidecar, ...], tuple[str, ...], list[CheckpointError]]:
    """Split what else lies in the directory into sidecars, files to leave, and links that lead nowhere."""
    sidecars: list[Sidecar] = []
    unread: list[str] = []
    errors: list[CheckpointError] = []
    for name in sorted(files.names()):
        if name in known:
            continue
        known_kind = any(fnmatchcase(name.lower(), pattern) for pattern in _SIDECARS)
        if not known_kind or not all(is_plain_name(part) for part in name.split("/")):
            unread.append(_printable(name))
            continue
        try:
            nbytes = files.size(name)
        except OSError as e:
            errors.append(CheckpointError(f"{root / name}: {e.strerror}"))
            continue
        if nbytes is not None and nbytes <= MAX_SIDECAR_BYTES:
            sidecars.append(Sidecar(name, nbytes))
        else:
            unread.append(_printable(name))
    return tuple(sidecars), tuple(unread), errors


def _printable(name: str) -> str:
    """Show a file name that is no text, or holds control characters, with escapes."""
    return name.encode("utf-8", "backslashreplace").decode() if name.isprintable() else ascii(name)[1:-1]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def find_gguf(path: Path) -> Path | None:
    """First file of the model in GGUF that `path` means: a file, or a folder of it without safetensors.

    Raises:
        CheckpointError: the folder holds several models; or the file, or one of its first, is still to be written.

    """
    if path.suffix == GGUF_SUFFIX and not path.is_dir():
        return path.with_name(first_file(path.name))
    if not path.is_dir():
        return None
    names = sorted(entry.name for entry in os.scandir(path))
    if any(name.endswith(".safetensors") or name == INDEX for name in names):
        return None
    if WORK in names and any(name.endswith(_PARTIAL) for name in names):
        raise CheckpointError(
            f"{path}: unfinished: the run that writes it was stopped, or is not done yet; run the same command again,"
            " and it goes on"
        )
    found = dict.fromkeys(
        path / first_file(name) for name in names if name.endswith(GGUF_SUFFIX) and not name.startswith(PROJECTOR)
    )
    if len(found) > 1:
        listed = ", ".join(each.name for each in list(found)[:3])
        raise CheckpointError(f"{path}: {len(found)} models in GGUF ({listed}, ...); name the file of one")
    return next(iter(found), None)


def first_file(name: str) -> str:
    """Name of the first of the files that one is split into; the file's own where it is whole."""
    match = SPLIT_NAME.fullmatch(name)
    return f"{match[1]}-00001-of-{match[3]}{GGUF_SUFFIX}" if match else name
