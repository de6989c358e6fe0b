"""Documents to windows of token ids: joined and cut, or one document a window; of all sources together, or each apart.

The same data, options and tokenizer give the same windows, on any machine. What is held is the windows themselves
and a few pieces of text: packing reads no further than it needs, and choosing by the seed reads the data again.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.base.constants import EXTRA, PIECE, REPLACED
from shardxform.base.strict_json import dumps
from shardxform.calibration.conversations import conversation
from shardxform.calibration.documents import (
    Corpus,
    Passage,
    Rendering,
    count_documents,
    document_sources,
    find_key,
    open_corpus,
    passages,
    sha256,
)
from shardxform.calibration.options import MAX_SOURCES, MAX_TOKENS, DataOptions, Windows
from shardxform.calibration.readers import COMPLETION, SYSTEM, TOOLS, listed
from shardxform.calibration.tokens import Encoder, Tokenizer, load_tokenizer, load_twin, plain_text, tokenizer_digest
from shardxform.errors import CheckpointError, PlanError

__all__ = ["load_windows", "with_extra"]

_FIRST_TRY: Final = 4  # documents tried a window wanted; each further try takes as many again as all before


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Everything that windows are made from."""

    corpus: Corpus
    form: Rendering
    encoder: Encoder
    options: DataOptions

    @property
    def tokenizer(self) -> Tokenizer:
        return self.encoder.tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Windows, and how many documents and files went into them."""

    ids_NT: NDArray[np.int64]
    documents: int
    files: int


@dataclass(frozen=True, slots=True)
class _TooLittle:
    """Why documents do not fill one window, and what to do about it."""

    said: str
    advice: str = ""


_Result = _Found | _TooLittle
"""What the documents of a source give."""


def load_windows(checkpoint_root: Path, options: DataOptions, against: Path | None = None) -> Windows:
    """Read the data and cut them into windows.

    Args:
        checkpoint_root: the model's, for its tokenizer.
        options: which data.
        against: of a model that is run on the same windows, and must read the same ids in the text.

    Raises:
        CheckpointError: the checkpoint's tokenizer is missing, needs code, or does not fit its config.json or the text.
        PlanError: the data are missing, malformed, out of reach, or do not fill one window, or are other ids for the
            model that it is compared with.

    """
    tokenizer = load_tokenizer(checkpoint_root)
    twin, unknown = load_twin(against) if against else (None, "")
    corpus = open_corpus(options)
    encoder = Encoder(tokenizer=tokenizer, twin=twin, files=[file.name for file in corpus.files])
    form = Rendering(key=find_key(corpus, options), render=plain_text)
    if options.chat_template:
        render, beside = partial(conversation, tokenizer), (TOOLS, SYSTEM, COMPLETION)
        form = replace(form, render=render, beside=tuple(name for name in beside if name != form.key))
    source = _Source(corpus=corpus, form=form, encoder=encoder, options=options)
    results = _packed(source) if options.pack else _sampled(source)
    found, notes = _settled(source, results)
    highest = max(int(each.ids_NT.max()) for each in found.values())
    if highest >= tokenizer.vocab_size:
        raise CheckpointError(
            f"{checkpoint_root}: the tokenizer gives id {highest}, but vocab_size in config.json is "
            f"{tokenizer.vocab_size}"
        )
    told = [*([unknown] if unknown else []), *encoder.notes(), *notes]
    return _windows(source, found, told)


def with_extra(windows: Windows, count: int, learned: Sequence[int], checkpoint_root: Path, seed: int) -> Windows:
    """Add windows that are made up of the text, for a pruned model to be taught by the one before pruning.

    Each is a row of pieces of text, of which half of the tokens are drawn from all that the tokenizer knows but for its
    special ones. So there are contexts and tokens in them that a little text has not; what a model should put out for
    them, the one before pruning says.

    Args:
        windows: of the text; they stay, and come first.
        count: windows to add.
        learned: numbers of the windows that pieces are taken from: not of those that judge.
        checkpoint_root: the model's, for its tokenizer.
        seed: of all choices.

    Raises:
        CheckpointError: see `load_windows`.

    """
    tokenizer = load_tokenizer(checkpoint_root)
    apart = {*tokenizer.inner.all_special_ids, *tokenizer.inner.added_tokens_decoder}
    known = {i for i in tokenizer.inner.get_vocab().values() if 0 <= i < tokenizer.vocab_size}
    vocabulary_V = np.array(sorted(known - apart or known), np.int32)
    random = np.random.Generator(np.random.PCG64([seed, EXTRA]))
    length = windows.ids_NT.shape[1]
    text_NT = windows.ids_NT[np.asarray(learned)]
    extra_NT = np.stack([_pieced(text_NT, random) for _ in range(count)])
    replaced_NT = random.random((count, length)) < REPLACED
    extra_NT[replaced_NT] = vocabulary_V[random.integers(len(vocabulary_V), size=int(replaced_NT.sum()))]
    digest = hashlib.sha256(f"{windows.fingerprint} and {count}\n".encode())
    digest.update(extra_NT.astype("<i4", copy=False).tobytes())
    ids_NT = np.concatenate([windows.ids_NT, extra_NT])
    return replace(windows, ids_NT=ids_NT, fingerprint=digest.hexdigest())


def _pieced(text_NT: NDArray[np.int32], random: np.random.Generator) -> NDArray[np.int32]:
    """A window [T] of pieces of other windows, each of a random length and from a random place."""
    rows, length = text_NT.shape
    pieces, filled = list[NDArray[np.int32]](), 0
    while filled < length:
        row, first, size = random.integers([rows, length, PIECE[1] - PIECE[0]]).tolist()
        pieces.append(text_NT[row, first : first + size + PIECE[0]])
        filled += len(pieces[-1])
    return np.concatenate(pieces)[:length]


def _settled(source: _Source, results: Mapping[str, _Result]) -> tuple[dict[str, _Found], list[str]]:
    """Windows by source, in the order of their names, and notes; a source that nobody named may give none."""
    options = source.options
    found = {name: result for name, result in sorted(results.items()) if isinstance(result, _Found)}
    notes: list[str] = []
    for name, result in sorted(results.items()):
        of = f"source {name!r}: " if options.by_source else ""
        if isinstance(result, _TooLittle):
            if not found or not options.by_source or name in options.sources:
                raise PlanError(f"{options.data}: {of}{result.said}{result.advice}")
            notes.append(f"{of}{result.said}; it is left out")
        elif len(result.ids_NT) < options.samples:
            asked, got = f"{options.samples:,} windows of {options.seqlen:,} tokens", f"{len(result.ids_NT):,}"
            notes.append(f"{of}asked for {asked}, {options.data} gives {got}")
    return found, notes


def _short(what: str, seqlen: int, found: str, longest: int) -> _TooLittle:
    """Not one window, or document, of `seqlen` tokens, though one of the `longest` there is."""
    fits = f", or ask for less: `seqlen` {longest}" if 2 <= longest < seqlen else ""
    return _TooLittle(f"expected at least one {what} of {seqlen:,} tokens, found {found}", f"; give more text{fits}")


def _no_text(documents: int) -> _TooLittle:
    return _TooLittle(f"found no text in {_count(documents, 'document')}" if documents else "found no document")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


# -- sources -------------------------------------------------------------------------------------------------------


def _refuse_absent(source: _Source, present: Collection[str]) -> None:
    """Refuse sources that were asked for and have no document, among those `present` or in the data at all."""
    absent = set(source.options.sources).difference(present)
    names: dict[str, None] = {}
    for name in document_sources(source.corpus) if absent else ():
        absent.discard(name)
        if not absent:
            return
        if len(names) <= MAX_SOURCES:
            names[name] = None
    if absent:
        raise PlanError(f"{source.options.data}: expected documents of source {min(absent)!r}, found {listed(names)}")


def _refuse_too_many(options: DataOptions, names: Collection[str]) -> None:
    if len(names) > MAX_SOURCES:
        raise PlanError(f"{options.data}: expected at most {MAX_SOURCES} sources to keep apart, found more: name some")


# -- one stream a source, cut --------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _Stream:
    """Documents that are joined while the data are read, as far as the windows wanted reach.

    Attributes:
        seqlen, wanted: tokens of a window, and of all windows.
        runs: ids, in order.
        starts: of each document, its first token and its file.
        total: tokens in `runs`.
        empty: whether all of it is white space.

    """

    seqlen: int
    wanted: int
    runs: list[NDArray[np.int64]] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)
    total: int = 0
    empty: bool = True

    @property
    def full(self) -> bool:
        return self.total >= self.wanted

    def add(self, piece: Passage, new: bool, run: NDArray[np.int64]) -> None:
        """Append the ids of a piece; `new` when they begin a document."""
        if new:
            self.starts.append((self.total, piece.file))
        self.empty = self.empty and not piece.text.strip()
        self.runs.append(run)
        self.total += len(run)

    def cut(self) -> _Result:
        """The windows; what remains is dropped."""
        used = min(self.total, self.wanted) // self.seqlen * self.seqlen
        if not used:
            found = f"{_count(self.total, 'token')} in {_count(len(self.starts), 'document')}"
            return _no_text(len(self.starts)) if self.empty else _short("window", self.seqlen, found, self.total)
        documents = bisect_left(self.starts, (used, -1))
        ids_NT = np.concatenate(self.runs)[:used].reshape(-1, self.seqlen)
        return _Found(ids_NT=ids_NT, documents=documents, files=self.starts[documents - 1][1] + 1)


def _packed(source: _Source) -> dict[str, _Result]:
    """The first windows of all documents joined, each followed by the end-of-text token; of each source if asked."""
    options = source.options
    named = options.sources if options.by_source else ("",)
    streams = {name: _stream(options) for name in named}
    present: set[str] = set()
    for piece, new, run in _runs(source, _taker(options, streams)):
        if options.sources:
            present.add(piece.source)
        stream = streams.setdefault(piece.source if options.by_source else "", _stream(options))
        if not stream.full:  # a document goes on, and pieces are read ahead
            stream.add(piece, new, run)
            _refuse_too_much(options, streams)
        if named and all(each.full for each in streams.values()):
            break
    _refuse_absent(source, present)
    return {name: stream.cut() for name, stream in (streams or {"": _stream(options)}).items()}


def _stream(options: DataOptions) -> _Stream:
    return _Stream(seqlen=options.seqlen, wanted=options.samples * options.seqlen)


def _taker(options: DataOptions, streams: Mapping[str, _Stream]) -> Callable[[str], bool] | None:
    """Which documents are worth their tokens, as the streams are when they are asked for."""
    if not options.sources and not options.by_source:
        return None

    def takes(name: str) -> bool:
        stream = streams.get(name)
        return (not options.sources or name in options.sources) and (stream is None or not stream.full)

    return takes


def _refuse_too_much(options: DataOptions, streams: Mapping[str, _Stream]) -> None:
    _refuse_too_many(options, streams)
    if len(streams) > 1 and sum(stream.total for stream in streams.values()) > MAX_TOKENS:
        raise PlanError(f"{options.data}: expected at most {MAX_TOKENS:,} tokens of all sources: ask for fewer windows")


def _runs(source: _Source, takes: Callable[[str], bool] | None) -> Iterator[tuple[Passage, bool, NDArray[np.int64]]]:
    """Yield (piece, whether it begins a document, its ids) in order; the last ids of a document end it."""
    new = True
    files = passages(source.corpus, replace(source.form, takes=takes), itertools.repeat(True))
    for piece, ids in itertools.chain.from_iterable(source.encoder.encoded(file) for file in files):
        if piece.last:
            ids.append(source.tokenizer.end)
        yield piece, new, np.array(ids, dtype=np.int64)
        new = piece.last


# -- one document a window -----------------------------------------------------------------------------------------


def _sampled(source: _Source) -> dict[str, _Result]:
    """The windows of the documents that come first in the seed's order and are long enough; of each source if asked."""
    options = source.options
    if not options.sources and not options.by_source:
        total = count_documents(source.corpus)
        return {"": _first(source, np.arange(total), total)}
    names, codes_D = _codes(source)
    _refuse_absent(source, [name for name, code in names.items() if (codes_D == code).any()])
    if not options.by_source:
        return {"": _first(source, np.flatnonzero(codes_D >= 0), len(codes_D))}
    return {name: _first(source, np.flatnonzero(codes_D == code), len(codes_D)) for name, code in names.items()}


def _codes(source: _Source) -> tuple[dict[str, int], NDArray[np.int32]]:
    """Sources by name with a number each, and the number of every document [D]; -1 for one that is not asked for."""
    options = source.options
    names = {name: code for code, name in enumerate(sorted(set(options.sources)))}

    def code(name: str) -> int:
        if not options.sources and name not in names:
            names[name] = len(names)
            _refuse_too_many(options, names)
        return names.get(name, -1)

    return names, np.fromiter(map(code, document_sources(source.corpus)), dtype=np.int32)


def _first(source: _Source, among: NDArray[np.int64], total: int) -> _Result:
    """Windows of the documents with the numbers `among`, of `total` in the data."""
    options = source.options
    order = np.random.Generator(np.random.PCG64(options.seed)).permutation(len(among))
    rank = np.full(total, np.iinfo(np.int64).max)
    rank[among[order]] = np.arange(len(among))
    found: list[NDArray[np.int64]] = []
    longest, low, high = 0, 0, _FIRST_TRY * options.samples
    while len(found) < options.samples and low < len(among):
        best: list[tuple[int, NDArray[np.int64]]] = []  # a heap of those with the lowest ranks, the highest on top
        for document, ids in _heads(source, iter((rank >= low) & (rank < high))):
            longest = max(longest, len(ids))
            if _is_window(ids, options.seqlen):
                push = heapq.heappush if len(best) < options.samples - len(found) else heapq.heappushpop
                push(best, (-int(rank[document]), ids))
        found += [ids for _, ids in sorted(best, key=lambda each: -each[0])]
        low, high = high, 2 * high
    if not found:
        if longest <= len(source.tokenizer.begin):
            return _no_text(len(among))
        told = f"{_count(len(among), 'document')}, the longest of {_count(longest, 'token')}"
        return _short("document", options.seqlen, told, longest)
    return _Found(ids_NT=np.stack(found), documents=len(found), files=len(source.corpus.files))


def _heads(source: _Source, wanted: Iterator[bool]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (document, its ids up to the length of a window) for the documents wanted."""
    seqlen = source.options.seqlen
    begin = () if source.options.chat_template else source.tokenizer.begin  # templates write their own
    head: list[int] = []
    current = -1

    def short(file: Iterable[Passage]) -> Iterator[Passage]:
        """Pieces but those whose window is full already."""
        return (piece for piece in file if piece.last or piece.document != current or len(head) < seqlen)

    files = passages(source.corpus, source.form, wanted)
    for piece, ids in itertools.chain.from_iterable(source.encoder.encoded(short(file)) for file in files):
        if piece.document != current:
            head, current = list(begin), piece.document
        head += ids[: seqlen - len(head)]
        if piece.last:
            yield current, np.array(head, dtype=np.int64)


def _is_window(ids: NDArray[np.int64], seqlen: int) -> bool:
    """Whether a document fills a window, and not for more than half with its last token, such as a rule of dashes."""
    return len(ids) == seqlen and (seqlen <= 2 or int((ids == ids[-1]).sum()) <= seqlen // 2)


# -- the value -----------------------------------------------------------------------------------------------------


def _windows(source: _Source, found: Mapping[str, _Found], notes: Iterable[str]) -> Windows:
    options = source.options
    ids_NT = np.concatenate([each.ids_NT for each in found.values()]).astype(np.int32)
    got, seqlen = ids_NT.shape
    digest = hashlib.sha256(f"windows {got} {seqlen}\n".encode())
    digest.update(ids_NT.astype("<i4", copy=False).tobytes())
    digest.update(np.full(got, seqlen, "<i4").tobytes())  # as files of earlier versions were bound to them
    chosen = _chosen(options, found)
    digest.update(dumps(chosen).encode() if chosen else b"")
    return Windows(
        ids_NT=ids_NT,
        fingerprint=digest.hexdigest(),
        provenance={**_provenance(source, found), **chosen},
        notes=tuple(notes),
        rows=tuple(_rows(found)) if options.by_source else (),
    )


def _rows(found: Mapping[str, _Found]) -> Iterator[tuple[str, range]]:
    start = 0
    for name, each in found.items():
        yield name, range(start, start + len(each.ids_NT))
        start += len(each.ids_NT)


def _chosen(options: DataOptions, found: Mapping[str, _Found]) -> dict[str, Any]:
    """Which sources were chosen, and how many windows each gave; nothing where sources have no say."""
    asked = {"sources": sorted(set(options.sources))} if options.sources else {}
    return asked | ({"by_source": {name: len(rows) for name, rows in _rows(found)}} if options.by_source else {})


def _files(source: _Source, found: Mapping[str, _Found]) -> int:
    """Number of files that decide the windows: which sources there are is known when all are read."""
    open_ended = source.options.by_source and not source.options.sources
    return len(source.corpus.files) if open_ended else max(each.files for each in found.values())


def _provenance(source: _Source, found: Mapping[str, _Found]) -> dict[str, Any]:
    corpus, options, files = source.corpus, source.options, _files(source, found)
    content = {"revision": corpus.revision} if corpus.revision else {"sha256": sha256(corpus, files)}
    samples = sum(len(each.ids_NT) for each in found.values())
    return {
        "data": corpus.name,
        "files": [file.name for file in corpus.files[:files]],
        **content,
        "samples_asked": options.samples,
        "samples": samples,
        "seqlen": options.seqlen,
        "seed": options.seed,
        "pack": options.pack,
        "chat_template": options.chat_template,
        "text_key": source.form.key,
        "documents": sum(each.documents for each in found.values()),
        "tokens": samples * options.seqlen,
        "tokenizer": tokenizer_digest(source.tokenizer),
        "tokenizer_sha256": source.tokenizer.sha256,
    }
