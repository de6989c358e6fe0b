"""Files of a hub data set: which of them are the data, and where they come to lie.

The only module that uses the network, through huggingface_hub with whatever endpoint, token, cache and offline mode
the user has set for it. One revision is asked for once, and every file is fetched from that one when it is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from shardxform.calibration.readers import DataFile, about_data, kind_of
from shardxform.errors import PlanError

__all__ = ["MAX_WHOLE_BYTES", "SUFFIXES", "chosen", "hub_files", "is_hub_name"]

T = TypeVar("T")

MAX_WHOLE_BYTES: Final = 16 * 10**9
"""Where documents are chosen, by the seed or their source, all files are needed; no more is downloaded for it."""

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[^/\x00-\x1f\x7f\ud800-\udfff]+)*/?", re.ASCII)
_TRAIN: Final = re.compile(r"(^|[/_.-])train(ing)?([/_.-]|$)", re.IGNORECASE)
_HELD_OUT: Final = re.compile(r"(^|[/_.-])(test|testing|valid|validation|dev|eval)([/_.-]|$)", re.IGNORECASE)
_SHARD: Final = re.compile(r"-\d+-of-\d+[^/]*$")
SUFFIXES: Final = (".parquet", ".jsonl", ".json", ".txt")  # the first that there is: the others hold the same again


def is_hub_name(data: str) -> bool:
    """Whether `data` has the form owner/name or owner/name/PREFIX and does not look like the path of a data file."""
    return _NAME.fullmatch(data) is not None and (data.count("/") > 1 or kind_of(data) is None)


def hub_files(data: str, whole: bool) -> tuple[str, tuple[DataFile, ...]]:
    """Give the revision (a commit id) of a data set and its data files, none of them downloaded yet.

    Args:
        data: owner/name, or owner/name/PREFIX.
        whole: all files will be read, so that their size matters.

    Raises:
        PlanError: no such data set, no access, no network, no or no single set of data files, too much to download.

    """
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ImportError as e:
        raise PlanError(f"{data}: hub data sets need huggingface_hub: pip install 'shardxform[hub]'") from e
    owner, name, *rest = data.split("/", 2)
    repo = f"{owner}/{name}"
    ask = partial(HfApi().dataset_info, repo, files_metadata=True)
    info: Any = _asked(repo, ask, absent="no such file or directory here; ")
    sizes = {str(sibling.rfilename): int(sibling.size or 0) for sibling in info.siblings or ()}
    names = chosen(data, sizes, rest[0] if rest else "")
    nbytes = sum(sizes[name] for name in names)
    if whole and nbytes > MAX_WHOLE_BYTES:
        raise PlanError(
            f"{data}: choosing documents, by the seed or their source, reads all {len(names)} files,"
            f" {nbytes / 1e9:,.1f} GB; expected at most {MAX_WHOLE_BYTES / 1e9:.0f} GB: pack all that comes,"
            " or name fewer files as owner/name/PREFIX"
        )
    get = partial(hf_hub_download, repo, repo_type="dataset", revision=info.sha)
    return str(info.sha), tuple(_file(repo, name, partial(get, name)) for name in names)


def chosen(data: str, paths: Iterable[str], prefix: str, one: str = "as owner/name/PREFIX") -> tuple[str, ...]:
    """Choose the data files among the paths of a data set: of one kind, of the split `train` where there is one.

    Where they are several sets of files, the refusal asks to name `one`.

    Raises:
        PlanError: there are none, or they belong to several configurations or splits.

    """
    files = sorted(path for path in paths if path.startswith(prefix) and _is_data(path))
    found: Sequence[str] = next((of for suffix in SUFFIXES if (of := _ending(files, suffix))), ())
    if not found:
        where = f" below {prefix!r}" if prefix else ""
        raise PlanError(f"{data}: expected {', '.join(SUFFIXES)} files in the data set{where}, found none")
    train = [path for path in found if _TRAIN.search(path)]
    found = train or [path for path in found if not _HELD_OUT.search(path)] or found
    groups = sorted({_group(path) for path in found})
    if len(groups) > 1:
        some = ", ".join(repr(group) for group in groups[:6]) + (", ..." if len(groups) > 6 else "")
        raise PlanError(f"{data}: expected files of one kind, found {some}: name one {one}")
    return tuple(found)


def _is_data(path: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.split("/"))
    return not hidden and not about_data(path)


def _ending(paths: Sequence[str], suffix: str) -> list[str]:
    return [path for path in paths if path.lower().endswith(suffix)]


def _group(path: str) -> str:
    """What the files of one split share: the name before a shard's number, or else the folder."""
    stem, numbered = _SHARD.subn("", path)
    return stem if numbered else path.rpartition("/")[0]


def _file(repo: str, name: str, get: Callable[[], str]) -> DataFile:
    kind = kind_of(name)
    assert kind is not None
    place = f"{repo}/{name}"
    return DataFile(name=name, place=place, kind=kind, fetch=lambda: Path(_asked(place, get)))


def _asked(what: str, call: Callable[[], T], absent: str = "") -> T:
    """Call the hub; whatever its client raises becomes one line, which begins with what is `absent` on this machine."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as e:
        raise PlanError(f"{what}: access must be asked for on the hub, and a token be set (hf auth login)") from e
    except errors.RepositoryNotFoundError as e:
        raise PlanError(f"{what}: {absent}no such data set on the hub") from e
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as e:
        raise PlanError(f"{what}: {absent}the hub cannot be reached: {_line(e)}") from e
    except Exception as e:  # of any of the libraries below it, which differ by version
        raise PlanError(f"{what}: {absent}the hub gave no answer that can be used: {_line(e)}") from e


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
