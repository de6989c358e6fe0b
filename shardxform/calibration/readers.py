"""Records of one data file, one at a time: JSON lines, a JSON array, parquet; and plain text in runs.

Files of any size are streamed: one line, one batch of rows or one run of characters is held. Whatever is malformed is
refused with file and line. Which records make up the data, and what becomes of them, is decided elsewhere.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import re
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

from shardxform.base.strict_json import JsonError, parse_object
from shardxform.calibration.options import SOURCE, SOURCE_NAME, is_source
from shardxform.errors import PlanError

__all__ = [
    "COMPLETION",
    "KINDS",
    "MAX_RECORD_BYTES",
    "PROMPT",
    "SYSTEM",
    "TOOLS",
    "DataFile",
    "DataRecord",
    "Kind",
    "about_data",
    "count_records",
    "fields",
    "kind_of",
    "listed",
    "no_sources",
    "read_records",
    "read_text",
    "sources_of",
]

Kind = Literal["jsonl", "json", "parquet", "text"]

KINDS: Final[dict[str, Kind]] = {
    ".jsonl": "jsonl",
    ".json-lines": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
MAX_RECORD_BYTES: Final = 64 << 20
PROMPT, COMPLETION, SYSTEM, TOOLS = "prompt", "completion", "system", "tools"
"""Fields of a conversation that is not all in one: its halves, and what stands beside its messages."""
_RUN_BYTES: Final = 1 << 18
_ROWS: Final = 64
_ABOUT: Final = re.compile(
    r"((read_?me|licen[cs]e|copying|notice)([-_.][\w.-]{1,20})?|copyright|changelog|changes|citation|authors|contributing"
    r"|contributors|code_of_conduct|security|datasheet|data_?card|requirements)\.(md|txt)"
    r"|(dataset_infos?|dataset_dict|state|croissant)\.json",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file of the data.

    Attributes:
        name: for provenance; no path of this machine.
        place: for messages.
        kind: how it is read.
        fetch: gives its local path; a file of a hub data set is downloaded then.

    """

    name: str
    place: str
    kind: Kind
    fetch: Callable[[], Path]


@dataclass(frozen=True, slots=True)
class DataRecord:
    """The value of one record's field `key`, its place for messages, its source, and fields beside it, where asked."""

    place: str
    key: str
    value: object
    source: str = ""
    beside: Mapping[str, object] = field(default_factory=dict)


def kind_of(name: str) -> Kind | None:
    """How a file of this name is read; None when it is no data file."""
    return KINDS.get(Path(name).suffix.lower())


def about_data(path: str) -> bool:
    """Whether a file of this name tells of the data rather than being some: a read-me, a licence, a table of facts."""
    name = path.rpartition("/")[2]
    return name.startswith((".", "_")) or _ABOUT.fullmatch(name) is not None


def count_records(file: DataFile) -> int:
    """Number of documents of a file, from as little as tells it; a plain text is one.

    Raises:
        PlanError: unreadable.

    """
    if file.kind == "text":
        return 1
    if file.kind == "parquet":
        with _parquet(file) as table:
            return int(table.metadata.num_rows)
    return sum(1 for _ in _entries(file))


def fields(file: DataFile) -> tuple[str, tuple[str, ...]] | None:
    """Place of a file's first record, and names of its fields, or columns; None when it has no record, or no fields.

    Raises:
        PlanError: unreadable.

    """
    if file.kind == "text":
        return None
    if file.kind == "parquet":
        with _parquet(file) as table:
            return file.place, tuple(table.schema_arrow.names)
    with contextlib.closing(_entries(file)) as entries:
        first = next(entries, None)
    return (first[0], tuple(_object(first[1], first[0]))) if first else None


def read_records(
    file: DataFile, key: str, wanted: Iterator[bool], *, sources: bool = False, beside: Collection[str] = ()
) -> Iterator[DataRecord | None]:
    """Yield the field `key` of every record, or None for one that is not wanted, which is not parsed either.

    Takes one item of `wanted` a record, so that one iterator serves several files. With `sources`, every wanted record
    must name its source. The fields of `beside` are given where a record has them.

    Raises:
        PlanError: unreadable or malformed, or a wanted record without the field, or without a source.

    """
    if file.kind == "parquet":
        yield from _rows(file, key, wanted, sources, beside)
        return
    for place, raw in _entries(file):
        if not next(wanted, False):
            yield None
            continue
        record = _object(raw, place)
        if key not in record:
            raise PlanError(f"{place}: expected a field {key!r}, found {listed(record)}")
        others = {name: record[name] for name in beside if name in record}
        yield DataRecord(place, key, record[key], _source(record, place) if sources else "", others)


def sources_of(file: DataFile) -> Iterator[str]:
    """Yield the source of every record, without its text.

    Raises:
        PlanError: unreadable or malformed, or a record that names no source.

    """
    if file.kind == "text":
        raise no_sources(file)
    for record in read_records(file, SOURCE, itertools.repeat(True), sources=True):
        if record is not None:
            yield record.source


def no_sources(file: DataFile) -> PlanError:
    """The refusal of a plain text where sources count."""
    return PlanError(f"{file.place}: expected records with a field {SOURCE!r}, found plain text")


def read_text(file: DataFile) -> Iterator[str]:
    """Yield a plain text in runs of characters. A byte order mark at its start is no part of it.

    Raises:
        PlanError: unreadable, or not UTF-8.

    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    at = 0
    with _opened(file) as stream:
        while data := stream.read(_RUN_BYTES):
            yield _decoded(decoder, data, file, at)
            at += len(data)
    yield _decoded(decoder, b"", file, at)


# -- JSON ----------------------------------------------------------------------------------------------------------


def _entries(file: DataFile) -> Generator[tuple[str, object], None, None]:
    """Yield (place, line or parsed element) of every record; a `.json` file is an array or JSON lines."""
    with _opened(file) as stream:
        if file.kind == "json" and stream.peek(_ROWS).lstrip()[:1] == b"[":  # type: ignore[attr-defined]
            yield from _elements(file, stream.read(MAX_RECORD_BYTES + 1))
            return
        number = 0
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES:
                raise PlanError(f"{file.place}:{number}: expected a line of at most 64 MiB, found a longer one")
            if not line.isspace():
                yield f"{file.place}:{number}", line


def _elements(file: DataFile, data: bytes) -> Iterator[tuple[str, object]]:
    """Yield the elements of a JSON array, which is held whole."""
    if len(data) > MAX_RECORD_BYTES:
        raise PlanError(f"{file.place}: expected a JSON array of at most 64 MiB, or one record a line in a .jsonl file")
    try:
        parsed = parse_object(b'{"":' + data + b"}")
    except JsonError as e:
        raise PlanError(f"{file.place}: expected an array of records: {e}") from e
    if len(parsed) != 1:  # text after the array that closed our object in a way of its own
        raise PlanError(f"{file.place}: expected an array of records, found something after it")
    for number, element in enumerate(parsed[""], start=1):
        yield f"{file.place}: record {number}", element


def _source(record: Mapping[str, object], place: str) -> str:
    """The source that a record names: a name that can be shown, and told from others."""
    if SOURCE not in record:
        raise PlanError(f"{place}: expected a field {SOURCE!r}, found {listed(record)}")
    name = record[SOURCE]
    if not isinstance(name, str):
        raise PlanError(f"{place}: {SOURCE}: expected a string, found {type(name).__name__}")
    if not is_source(name):
        raise PlanError(f"{place}: {SOURCE}: expected {SOURCE_NAME}, found {name[:40]!r}")
    return name


def _object(raw: object, place: str) -> dict[str, Any]:
    if isinstance(raw, bytes):
        try:
            return parse_object(raw)
        except JsonError as e:
            raise PlanError(f"{place}: {e}") from e
    if not isinstance(raw, dict):
        raise PlanError(f"{place}: expected an object, found {type(raw).__name__}")
    return raw


def listed(names: Collection[str]) -> str:
    """Names in a message: a few of them, quoted, since they are a stranger's."""
    shown = [repr(name[:40]) for name in list(names)[:8]]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "") or "none"


# -- parquet -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _parquet(file: DataFile) -> Iterator[Any]:
    """A parquet file, opened; errors of the reader become refusals."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as e:
        raise PlanError(f"{file.place}: reading parquet needs pyarrow: pip install pyarrow") from e
    path = file.fetch()
    try:
        with parquet.ParquetFile(path) as table:
            yield table
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise PlanError(f"{file.place}: not readable as parquet: {str(e).splitlines()[0][:200]}") from e


def _rows(
    file: DataFile, key: str, wanted: Iterator[bool], sources: bool, beside: Collection[str]
) -> Iterator[DataRecord | None]:
    with _parquet(file) as table:
        names = table.schema_arrow.names
        others = [name for name in beside if name in names]
        columns = list(dict.fromkeys([key, *([SOURCE] if sources else []), *others]))
        for column in columns:
            if names.count(column) != 1:
                raise PlanError(f"{file.place}: expected one column {column!r}, found {listed(names)}")
        batches = table.iter_batches(batch_size=_ROWS, columns=columns)
        rows = (cells for batch in batches for cells in zip(*map(batch.column, columns), strict=True))
        for number, cells in enumerate(rows, start=1):
            if not next(wanted, False):
                yield None
                continue
            place = f"{file.place}: row {number}"
            row = {column: _without_nulls(cell.as_py()) for column, cell in zip(columns, cells, strict=True)}
            found = {name: row[name] for name in others}
            yield DataRecord(place, key, row[key], _source(row, place) if sources else "", found)


def _without_nulls(value: object) -> Any:  # noqa: ANN401
    """A cell without the fields that are null in it: a table gives every struct the fields of all its structs.

    `content` stays, which messages that call tools set to null.
    """
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None or key == "content"}
    return value


# -- bytes ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(file: DataFile) -> Iterator[BinaryIO]:
    path = file.fetch()
    try:
        with path.open("rb") as stream:
            yield stream
    except OSError as e:
        raise PlanError(f"{file.place}: {e.strerror or e}") from e


def _decoded(decoder: codecs.IncrementalDecoder, data: bytes, file: DataFile, at: int) -> str:
    """Decode the bytes that stand at offset `at`, the last ones when there are none."""
    held = len(decoder.getstate()[0])
    try:
        return decoder.decode(data, final=not data)
    except UnicodeDecodeError as e:
        raise PlanError(f"{file.place}: expected UTF-8, found another byte at {at - held + e.start}") from e
