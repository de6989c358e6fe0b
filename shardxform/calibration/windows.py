"""Documents to windows of token ids: joined and cut, or one document a window.

The same data, options and tokenizer give the same windows, on any machine. What is held is the windows themselves
and a few pieces of text: packing reads no further than it needs, and choosing by the seed reads the data again.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardxform.calibration.documents import Corpus, Form, Piece, count_documents, find_key, open_corpus, pieces, sha256
from shardxform.calibration.options import DataOptions, Windows
from shardxform.calibration.tokens import Tokenizer, conversation, encoded, load_tokenizer, plain_text
from shardxform.errors import CheckpointError, PlanError

__all__ = ["load_windows"]

_FIRST_TRY: Final = 4  # documents tried a window wanted; each further try takes as many again as all before


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Everything that windows are made from."""

    corpus: Corpus
    form: Form
    tokenizer: Tokenizer
    options: DataOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Windows, and how many documents and files went into them."""

    ids_NT: NDArray[np.int64]
    documents: int
    files: int


def load_windows(checkpoint_root: Path, options: DataOptions) -> Windows:
    """Read the data and cut them into windows.

    Raises:
        CheckpointError: the checkpoint's tokenizer is missing, needs code, or does not fit its config.json.
        PlanError: the data are missing, malformed, out of reach, or do not fill one window.

    """
    tokenizer = load_tokenizer(checkpoint_root)
    corpus = open_corpus(options)
    render = partial(conversation, tokenizer) if options.chat_template else plain_text
    form = Form(key=find_key(corpus, options), render=render)
    source = _Source(corpus=corpus, form=form, tokenizer=tokenizer, options=options)
    found = _packed(source) if options.pack else _sampled(source)
    highest = int(found.ids_NT.max())
    if highest >= tokenizer.vocab_size:
        raise CheckpointError(
            f"{checkpoint_root}: the tokenizer gives id {highest}, but vocab_size in config.json is "
            f"{tokenizer.vocab_size}"
        )
    return _windows(source, found)


# -- one stream, cut -----------------------------------------------------------------------------------------------


def _packed(source: _Source) -> _Found:
    """The first windows of all documents joined, each followed by the end-of-text token."""
    seqlen = source.options.seqlen
    wanted = source.options.samples * seqlen
    ids: list[NDArray[np.int64]] = []
    starts: list[tuple[int, int]] = []  # of each document: its first token, its file
    total = 0
    for (file, new), run in _runs(source):
        if new:
            starts.append((total, file))
        ids.append(run)
        total += len(run)
        if total >= wanted:
            break
    used = min(total, wanted) // seqlen * seqlen
    if not used:
        raise PlanError(
            f"{source.options.data}: expected at least one window of {seqlen:,} tokens, "
            f"found {total:,} tokens in {len(starts):,} documents"
        )
    documents = bisect_left(starts, (used, -1))
    ids_NT = np.concatenate(ids)[:used].reshape(-1, seqlen)
    return _Found(ids_NT=ids_NT, documents=documents, files=starts[documents - 1][1] + 1)


def _runs(source: _Source) -> Iterator[tuple[tuple[int, bool], NDArray[np.int64]]]:
    """Yield ((file, whether a document begins), ids) in order; the last ids of a document end it."""
    new = True
    files = pieces(source.corpus, source.form, itertools.repeat(True))
    for piece, ids in itertools.chain.from_iterable(encoded(source.tokenizer, file) for file in files):
        if piece.last:
            ids.append(source.tokenizer.end)
        yield (piece.file, new), np.array(ids, dtype=np.int64)
        new = piece.last


# -- one document a window -----------------------------------------------------------------------------------------


def _sampled(source: _Source) -> _Found:
    """The windows of the documents that come first in the seed's order and are long enough."""
    options = source.options
    documents = count_documents(source.corpus)
    order = np.random.Generator(np.random.PCG64(options.seed)).permutation(documents)
    rank = np.empty(documents, dtype=np.int64)
    rank[order] = np.arange(documents)
    found: list[NDArray[np.int64]] = []
    longest, low, high = 0, 0, _FIRST_TRY * options.samples
    while len(found) < options.samples and low < documents:
        best: list[tuple[int, NDArray[np.int64]]] = []  # a heap of those with the lowest ranks, the highest on top
        for document, ids in _heads(source, iter((rank >= low) & (rank < high))):
            longest = max(longest, len(ids))
            if _is_window(ids, options.seqlen):
                push = heapq.heappush if len(best) < options.samples - len(found) else heapq.heappushpop
                push(best, (-int(rank[document]), ids))
        found += [ids for _, ids in sorted(best, key=lambda each: -each[0])]
        low, high = high, 2 * high
    if not found:
        raise PlanError(
            f"{options.data}: expected at least one document of {options.seqlen:,} tokens, "
            f"found {documents:,} documents, the longest of {longest:,} tokens"
        )
    return _Found(ids_NT=np.stack(found), documents=len(found), files=len(source.corpus.files))


def _heads(source: _Source, wanted: Iterator[bool]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (document, its ids up to the length of a window) for the documents wanted."""
    seqlen = source.options.seqlen
    begin = () if source.options.chat_template else source.tokenizer.begin  # templates write their own
    head: list[int] = []
    current = -1

    def short(file: Iterable[Piece]) -> Iterator[Piece]:
        """Pieces but those whose window is full already."""
        return (piece for piece in file if piece.last or piece.document != current or len(head) < seqlen)

    files = pieces(source.corpus, source.form, wanted)
    for piece, ids in itertools.chain.from_iterable(encoded(source.tokenizer, short(file)) for file in files):
        if piece.document != current:
            head, current = list(begin), piece.document
        head += ids[: seqlen - len(head)]
        if piece.last:
            yield current, np.array(head, dtype=np.int64)


def _is_window(ids: NDArray[np.int64], seqlen: int) -> bool:
    """Whether a document fills a window, and not for more than half with its last token, such as a rule of dashes."""
    return len(ids) == seqlen and (seqlen <= 2 or int((ids == ids[-1]).sum()) <= seqlen // 2)


# -- the value -----------------------------------------------------------------------------------------------------


def _windows(source: _Source, found: _Found) -> Windows:
    ids_NT = found.ids_NT.astype(np.int32)
    got, seqlen = ids_NT.shape
    lengths_N = np.full(got, seqlen, dtype=np.int32)
    digest = hashlib.sha256(f"windows {got} {seqlen}\n".encode())
    digest.update(ids_NT.astype("<i4", copy=False).tobytes())
    digest.update(lengths_N.astype("<i4", copy=False).tobytes())
    asked = source.options.samples
    short = f"asked for {asked:,} windows of {seqlen:,} tokens, the data give {got:,}"
    return Windows(
        ids_NT=ids_NT,
        lengths_N=lengths_N,
        fingerprint=digest.hexdigest(),
        provenance=_provenance(source, found),
        notes=(short,) if got < asked else (),
    )


def _provenance(source: _Source, found: _Found) -> dict[str, Any]:
    corpus, options = source.corpus, source.options
    content = {"revision": corpus.revision} if corpus.revision else {"sha256": sha256(corpus, found.files)}
    return {
        "data": corpus.name,
        "files": [file.name for file in corpus.files[: found.files]],
        **content,
        "samples_asked": options.samples,
        "samples": len(found.ids_NT),
        "seqlen": options.seqlen,
        "seed": options.seed,
        "pack": options.pack,
        "chat_template": options.chat_template,
        "text_key": source.form.key,
        "documents": found.documents,
        "tokens": int(found.ids_NT.size),
        "tokenizer_sha256": source.tokenizer.sha256,
    }
