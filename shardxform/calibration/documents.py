"""The data as a sequence of documents, and each document as passages that are short enough to tokenize.

Documents come in the order of the files and in file order, whatever the sizes of reads. A document is cut into passages
where the patterns of byte-level BPE split it anyway, so that these give the tokens of the whole.

Files of a hub data set are fetched here, and nothing else uses the network: through huggingface_hub, with whatever
endpoint, token, cache and offline mode the user has set for it. One revision is asked for once, and every file is
fetched from that one when it is read.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from shardxform.calibration.options import DataOptions
from shardxform.calibration.readers import (
    COMPLETION,
    KINDS,
    PROMPT,
    DataFile,
    DataRecord,
    about_data,
    count_records,
    fields,
    kind_of,
    listed,
    no_sources,
    read_records,
    read_text,
    sources_of,
)
from shardxform.errors import PlanError

__all__ = [
    "MAX_WHOLE_BYTES",
    "PASSAGE",
    "SUFFIXES",
    "Corpus",
    "Passage",
    "Rendering",
    "chosen",
    "count_documents",
    "cut",
    "document_sources",
    "find_key",
    "hub_files",
    "is_data_set_name",
    "local_files",
    "open_corpus",
    "passages",
    "sha256",
]

T = TypeVar("T")

MAX_WHOLE_BYTES: Final = 16 * 10**9
"""Where documents are chosen, by the seed or their source, all files are needed; no more is downloaded for it."""

_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/[^/\x00-\x1f\x7f\ud800-\udfff]+)*/?", re.ASCII)
_TRAIN: Final = re.compile(r"(^|[/_.-])train(ing)?([/_.-]|$)", re.IGNORECASE)
_HELD_OUT: Final = re.compile(r"(^|[/_.-])(test|testing|valid|validation|dev|eval)([/_.-]|$)", re.IGNORECASE)
_SHARD: Final = re.compile(r"-\d+-of-\d+[^/]*$")
SUFFIXES: Final = (".parquet", ".jsonl", ".json", ".txt")  # the first that there is: the others hold the same again


def is_data_set_name(data: str) -> bool:
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


# -- documents ---------------------------------------------------------------------------------------------------------


PASSAGE: Final = 1 << 18
"""Characters after which a piece ends at the next seam of the text; at twice as many it ends anywhere."""

_FOLDERS: Final = 1000  # in a data set, that are looked into
_DEPTH: Final = 3
_CHATS: Final = ("messages", "conversations", "conversation")

# Between two lines, or before the one space between two words: the tokenizers' patterns split there anyway.
_SEAM: Final = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= \S))")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The files of the data, in order. `name` is for provenance, `revision` a commit id of the hub or empty."""

    name: str
    files: tuple[DataFile, ...]
    revision: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """How a record becomes text.

    Attributes:
        key: the field it stands in.
        render: turns the field's value into text, or refuses it.
        beside: further fields that it is given where a record has them.
        takes: whether a document of this source is wanted at this point of the data; None where sources have no say,
            and are not read.

    """

    key: str
    render: Callable[[DataRecord], str]
    beside: tuple[str, ...] = ()
    takes: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """Part of the text of a document; `document` counts through all files, `file` is an index, `last` ends it."""

    file: int
    document: int
    text: str
    last: bool
    source: str = ""


def open_corpus(options: DataOptions) -> Corpus:
    """Find the files that `options.data` names: a path when there is one, or else a hub data set.

    Raises:
        PlanError: neither, or no data file among them.

    """
    if files := local_files(options.data):
        return Corpus(name=_printable(Path(options.data).resolve().name), files=files)
    whole = not options.pack or options.by_source or bool(options.sources)
    revision, files = hub_files(options.data, whole=whole)
    return Corpus(name=options.data, files=files, revision=revision)


def local_files(data: str) -> tuple[DataFile, ...]:
    """Find the files of a path; none where `data` can only be the name of a hub data set. Reads nothing.

    Raises:
        PlanError: it is neither, or holds no data file.

    """
    path = Path(data)
    if _exists(path):
        if not path.is_dir():
            return (_local(path, path.name),)
        return tuple(_local(path / name, name) for name in _listing(path))
    if not is_data_set_name(data):
        raise PlanError(f"{data}: no such file or directory, and no name of a hub data set (owner/name)")
    return ()


def find_key(corpus: Corpus, options: DataOptions) -> str:
    """Find the field that holds the documents, by the first record of the data.

    Raises:
        PlanError: none, or more than one that could be it, or plain text where fields are needed.

    """
    plain = next((file for file in corpus.files if file.kind == "text"), None)
    if plain and options.chat_template:
        raise PlanError(f"{plain.place}: expected conversations, for the chat template, found plain text")
    for file in corpus.files:
        if (found := fields(file)) is not None:
            place, names = found
            return _key_among(names, place, options)
    if options.text_key:
        raise PlanError(f"{options.data}: expected a field {options.text_key!r}, found nothing that has fields")
    return "text"


def count_documents(corpus: Corpus) -> int:
    """Number of documents, from reading the files once without parsing them."""
    return sum(count_records(file) for file in corpus.files)


def document_sources(corpus: Corpus) -> Iterator[str]:
    """Yield the source of every document, in order; a file is not touched before its documents are asked for.

    Raises:
        PlanError: a file is unreadable or malformed, or a document has no source.

    """
    for file in corpus.files:
        yield from sources_of(file)


def passages(corpus: Corpus, form: Rendering, wanted: Iterator[bool]) -> Iterator[Iterator[Passage]]:
    """Yield for every file, in order, the pieces of its documents that are wanted; each file must be read to its end.

    Takes one item of `wanted` a document. A document that is wanted has a last piece, be it empty. A file is not
    touched before its pieces are asked for: it may have to be downloaded.

    Raises:
        PlanError: a file is unreadable or malformed, or a record has no such text, or no source where these count.

    """
    numbers = itertools.count()
    for index, file in enumerate(corpus.files):
        texts = zip(_texts(file, form, wanted), numbers, strict=False)  # texts first: their end draws no number
        yield _pieces(index, texts)


def cut(text: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Cut a text that comes in runs into pieces, and say which is the last; where does not depend on the runs."""
    held, at = "", 0
    for run in text:
        held, at = held[at:] + run, 0
        while len(held) - at > 2 * PASSAGE:
            seam = _SEAM.search(held, at + PASSAGE, at + 2 * PASSAGE)
            end = seam.end() if seam else at + 2 * PASSAGE
            yield held[at:end], False
            at = end
    yield held[at:], True


def sha256(corpus: Corpus, files: int) -> str:
    """Digest of the first `files` files: of the content of a single one, else of their digests and names."""
    digests = [_digest(file) for file in corpus.files[:files]]
    if len(corpus.files) == 1:
        return digests[0]
    listing = "".join(f"{digest}  {file.name}\n" for digest, file in zip(digests, corpus.files[:files], strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


# -- finding -------------------------------------------------------------------------------------------------------


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a zero byte
        return False


def _listing(folder: Path) -> list[str]:
    """Names of the data files in a folder, in order; hidden files, and those about the data, are none.

    A folder that holds no others is looked at as a data set of the hub is, with the folders in it: clones of these
    have their data there. A folder of files about data is data all the same.
    """
    try:
        found = sorted(name for name in os.listdir(folder) if kind_of(name) and not name.startswith("."))
    except OSError as e:
        raise PlanError(f"{folder}: {e.strerror or e}") from e
    found = [name for name in found if (folder / name).is_file()]
    records = any(kind_of(name) != "text" and not about_data(name) for name in found)
    data = [name for name in found if not (about_data(name) or (records and name.lower().endswith(".md")))]
    if not data and (below := [path for path in _below(folder) if not about_data(path)]):
        return list(chosen(str(folder), below, "", "by the path of its folder or file"))
    if not found:
        raise PlanError(f"{folder}: expected {', '.join(KINDS)} files in it, found none")
    return data or found


def _below(folder: Path) -> Iterator[str]:
    """Yield the paths of data files in the folders of a folder, not too deep, nor too many of them."""
    walk = ((Path(root).relative_to(folder), dirs, files) for root, dirs, files in os.walk(folder))
    for at, dirs, files in itertools.islice(walk, _FOLDERS):
        dirs[:] = sorted(name for name in dirs if not name.startswith((".", "_"))) if len(at.parts) < _DEPTH else []
        if at.parts:
            paths = (at / name for name in files if name.lower().endswith(SUFFIXES) and not name.startswith("."))
            yield from (str(path) for path in paths if (folder / path).is_file())


def _local(path: Path, name: str) -> DataFile:
    kind = kind_of(path.name)
    if kind is None:
        raise PlanError(f"{path}: expected a file whose name ends in one of {', '.join(KINDS)}")
    if not path.is_file():
        raise PlanError(f"{path}: expected a regular file")
    return DataFile(name=_printable(name), place=str(path), kind=kind, fetch=lambda: path)


def _printable(name: str) -> str:
    """The name of a file as text that can be encoded, whatever its bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _key_among(names: Collection[str], place: str, options: DataOptions) -> str:
    usual = _CHATS if options.chat_template else ("text", "content")
    expected = (options.text_key,) if options.text_key else usual
    found = [name for name in expected if name in names]
    if not found and options.chat_template and not options.text_key and {PROMPT, COMPLETION} <= {*names}:
        return PROMPT
    if not found:
        which = " or ".join(filter(None, (", ".join(map(repr, expected[:-1])), repr(expected[-1]))))
        chats = not options.chat_template and any(name in names for name in _CHATS)
        needs = "; conversations need the chat template" if chats else ""
        other = "; `text_key` names another" if names and not needs and not options.text_key else ""
        raise PlanError(f"{place}: expected a field {which}, found {listed(names)}{needs}{other}")
    if options.chat_template and len(found) > 1:
        raise PlanError(f"{place}: expected one field of conversations, found both {found[0]!r} and {found[1]!r}")
    return found[0]


# -- reading -------------------------------------------------------------------------------------------------------


def _texts(file: DataFile, form: Rendering, wanted: Iterator[bool]) -> Iterator[tuple[str, Iterable[str]] | None]:
    """Yield every document of a file as its source and runs of text, or None for one that is not wanted."""
    if file.kind == "text":
        if form.takes:
            raise no_sources(file)
        yield ("", read_text(file)) if next(wanted, False) else None
        return
    for record in read_records(file, form.key, wanted, sources=form.takes is not None, beside=form.beside):
        taken = record is not None and (form.takes is None or form.takes(record.source))
        yield (record.source, (form.render(record),)) if record is not None and taken else None


def _pieces(file: int, texts: Iterable[tuple[tuple[str, Iterable[str]] | None, int]]) -> Iterator[Passage]:
    for text, number in texts:
        if text is not None:
            source, runs_of_it = text
            for part, last in cut(runs_of_it):
                yield Passage(file=file, document=number, text=part, last=last, source=source)


def _digest(file: DataFile) -> str:
    digest = hashlib.sha256()
    path = file.fetch()
    try:
        with path.open("rb", buffering=0) as stream:
            while data := stream.read(1 << 20):
                digest.update(data)
    except OSError as e:
        raise PlanError(f"{file.place}: {e.strerror or e}") from e
    return digest.hexdigest()
