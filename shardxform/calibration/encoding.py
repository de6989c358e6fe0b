"""Texts as ids, and whether these are the ids that the text has in use.

A tokenizer loads without complaint from files that are not all there, or that its class reads otherwise than they say;
its ids run through a model all the same. So it is held against `tokenizer.json`, against the size of the vocabulary
and against what becomes of text: that of the data, and a fixed sample. Where two models are run on one text, the
tokenizer of the other must give the same ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shardxform.base.strict_json import dumps
from shardxform.calibration.documents import Piece
from shardxform.calibration.tokens import Tokenizer, batches, ids_of, line_of, load_tokenizer
from shardxform.errors import CheckpointError, PlanError

__all__ = ["SAMPLE", "Encoder", "load_twin", "tokenizer_digest"]

SAMPLE: Final = (
    "The quick brown fox jumps over the lazy dog. It's 1,234.56 o'clock, isn't it? WE'LL see you'd ACT\n\n\nThen: yes.",
    "def f(x: int) -> str:\n    if x >= 10:\n\t\treturn f'{x:>08}'  # [a-z]+\\d{2,}\r\n    return 0\n\n\n\n# 20260131",
    "Zwölf Boxkämpfer; ça naïf, cœur e\u0301t cafe\u0301; Привет, мир; Γειά σου; \u212b \ufb01 ½ ²",
    "你好，世界。機械学習のテスト 한국어 문장 مرحبا بالعالم שלום नमस्ते สวัสดี 👩‍💻🇪🇺",
)
"""Text that tokenizers tell apart: contractions, numbers, white space, code, and scripts composed and decomposed."""

_LOOKED_AT: Final = 1 << 16  # characters of the data
_PLAIN: Final = 0  # the text of SAMPLE that every tokenizer must know
_LEAST_KNOWN: Final = 0.5  # share of the embeddings without which a vocabulary is another model's
_USUAL_KNOWN: Final = 0.9  # what releases have: the rest is padding
_NOTABLE: Final = 0.05


@dataclass(slots=True, kw_only=True)
class Encoder:
    """A tokenizer at work on the data.

    Attributes:
        tokenizer: of the model that is run.
        twin: of the model that it is compared with, if there is one: each text must become the same ids.
        files: name of each file of the data, for messages.

    """

    tokenizer: Tokenizer
    twin: Tokenizer | None = None
    files: Sequence[str] = ()
    _seen: list[tuple[str, tuple[int, ...]]] = field(default_factory=list, init=False)
    _characters: int = field(default=0, init=False)
    _document: int = field(default=-1, init=False)
    _before: int = field(default=0, init=False)  # ids of the document so far

    def __post_init__(self) -> None:
        """Refuse what cannot be right, whatever the data are.

        Raises:
            CheckpointError: it gives no ids for plain text, or knows a fraction of the model's vocabulary.
            PlanError: the twin ends or begins texts otherwise.

        """
        root, known, size = self.tokenizer.root, _known(self.tokenizer), self.tokenizer.vocab_size
        self._refuse_nothing(SAMPLE[_PLAIN], ids_of(self.tokenizer.inner, SAMPLE[_PLAIN : _PLAIN + 1])[0])
        if known < _LEAST_KNOWN * size:
            raise CheckpointError(
                f"{root}: its tokenizer knows {known:,} tokens, but the model has {size:,}: a file of it is missing, "
                "or it is another model's"
            )
        for what in ("end", "begin") if self.twin else ():
            mine, other = getattr(self.tokenizer, what), getattr(self.twin, what)
            if mine != other and self.twin:
                raise PlanError(
                    f"{self.twin.root}: its tokenizer is another than that of {root}: the {what} of a text is "
                    f"{_shown(other)}, expected {_shown(mine)}; models are compared on the same ids"
                )

    def encoded(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, list[int]]]:
        """Yield every piece with its ids; a bounded number of pieces is read ahead.

        Raises:
            CheckpointError: text that can be seen gives no ids.
            PlanError: the twin gives other ids.

        """
        for batch in batches(pieces):
            texts = [piece.text for piece in batch]
            found = ids_of(self.tokenizer.inner, texts)
            others = ids_of(self.twin.inner, texts) if self.twin else found
            for piece, ids, other in zip(batch, found, others, strict=True):
                self._refuse_nothing(piece.text, ids)
                self._refuse_other(piece, ids, other)
                if self._characters < _LOOKED_AT:
                    text = piece.text[: _LOOKED_AT - self._characters]
                    self._seen.append((text, tuple(ids if len(text) == len(piece.text) else ())))
                    self._characters += len(text)
            yield from zip(batch, found, strict=True)

    def notes(self) -> Iterator[str]:
        """Yield what the user should be told of the tokenizer, from the text that went through it."""
        root, inner = self.tokenizer.root, self.tokenizer.inner
        texts = [text for text, _ in self._seen]
        found = [list(ids) or ids_of(inner, [text])[0] for text, ids in self._seen]
        yield from _vocabulary_notes(self.tokenizer)
        unknown = inner.unk_token_id
        total, unknowns = sum(map(len, found)), sum(ids.count(unknown) for ids in found)
        if unknowns > _NOTABLE * total:
            yield f"{root}: {unknowns / total:.0%} of the text's tokens are {inner.unk_token!r}, for what is not known"
        seen = sum(map(_letters, texts))
        back = sum(_letters(inner.decode([each for each in ids if each != unknown])) for ids in found)
        if back < (1 - _NOTABLE) * seen:
            yield f"{root}: {1 - back / seen:.0%} of the text's letters are lost: its tokenizer leaves them out"
        yield from _file_notes(self.tokenizer, texts, found)

    def _refuse_nothing(self, text: str, ids: Sequence[int]) -> None:
        if ids or not any(letter.isprintable() and not letter.isspace() for letter in text):
            return
        raise CheckpointError(
            f"{self.tokenizer.root}: its tokenizer, read as {type(self.tokenizer.inner).__name__}, gives no ids for "
            f"{text.strip()[:40]!r}: a file of it is missing, such as tokenizer.json, or made for another class"
        )

    def _refuse_other(self, piece: Piece, ids: Sequence[int], other: Sequence[int]) -> None:
        """Refuse a piece that the twin reads otherwise.

        Raises:
            PlanError: says in which document, and at which of its tokens.

        """
        if piece.document != self._document:
            self._document, self._before = piece.document, 0
        if self.twin and ids != other:
            at = _first_difference(ids, other)
            mine, theirs = (_token(of, each[at : at + 1]) for of, each in ((self.tokenizer, ids), (self.twin, other)))
            file = self.files[piece.file] if piece.file < len(self.files) else "the data"
            number, token = piece.document + 1, self._before + at + 1
            raise PlanError(
                f"{self.twin.root}: its tokenizer is another than that of {self.tokenizer.root}: document {number} of "
                f"the data, in {file}: token {token} is {theirs}, expected {mine}; models are compared on the same ids"
            )
        self._before += len(ids)


def load_twin(root: Path) -> tuple[Tokenizer | None, str]:
    """Load the tokenizer of the model that another is compared with, or say why its ids cannot be looked at."""
    try:
        return load_tokenizer(root), ""
    except CheckpointError as e:
        return None, f"the two models were not found to read text as the same ids: {e}"


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Digest of what a tokenizer does, however its files are written: of its tokens, and its ids for a fixed sample."""
    inner = tokenizer.inner
    vocabulary = sorted((int(number), str(token)) for token, number in inner.get_vocab().items())
    does = {"sample": ids_of(inner, SAMPLE), "end": tokenizer.end, "begin": list(tokenizer.begin)}
    digest = hashlib.sha256(dumps(does).encode())
    for number, token in vocabulary:
        digest.update(f"\n{number} ".encode() + token.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _vocabulary_notes(tokenizer: Tokenizer) -> Iterator[str]:
    known, size, root = _known(tokenizer), tokenizer.vocab_size, tokenizer.root
    if known > size:
        yield f"{root}: its tokenizer knows {known:,} tokens, but the model has {size:,}: text with more is refused"
    elif known < _USUAL_KNOWN * size:
        yield f"{root}: its tokenizer knows {known:,} tokens, but the model has {size:,}: is it this model's?"


def _known(tokenizer: Tokenizer) -> int:
    return len(tokenizer.inner)


def _file_notes(tokenizer: Tokenizer, texts: Sequence[str], found: Sequence[Sequence[int]]) -> Iterator[str]:
    """Yield a note where `tokenizer.json` by itself gives other ids, for the data or the fixed sample."""
    path = tokenizer.root / "tokenizer.json"
    if not path.is_file():
        return
    try:
        own = _own(path)
        of_sample = [(text, own(text)) for text in SAMPLE]
        of_data = [(text, own(text)) for text in texts]
    except Exception as e:  # of the tokenizers library, whose errors are bare
        yield f"{path}: cannot be held against the tokenizer that was loaded: {line_of(e)}"
        return
    ids = [*found, *ids_of(tokenizer.inner, SAMPLE)]
    others = [(text, mine, its) for (text, its), mine in zip((*of_data, *of_sample), ids, strict=True) if its != mine]
    if others:
        text, mine, its = others[0]
        at = _first_difference(mine, its)
        one, other = (_token(tokenizer, each[at : at + 1]) for each in (mine, its))
        yield (
            f"{path}: read as {type(tokenizer.inner).__name__}, it gives other ids than the file says, for "
            f"{len(others)} of {len(ids)} texts looked at, of the data and of a fixed sample: {one} instead of {other} "
            f"in {_around(tokenizer, text, mine[:at])!r}; clients that take the file alone see other text"
        )


def _own(path: Path) -> Callable[[str], list[int]]:
    """The ids that a `tokenizer.json` gives by itself."""
    from tokenizers import Tokenizer as Backend

    backend: Any = Backend.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()

    def ids(text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)

    return ids


def _around(tokenizer: Tokenizer, text: str, before: Sequence[int]) -> str:
    """Where in a text its ids part: what comes after those `before`, as far as the tokenizer gives texts back."""
    start = str(tokenizer.inner.decode(list(before)))
    at = len(start) if text.startswith(start) else 0
    return text[max(0, at - 10) : at + 20]


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (mine, its) in enumerate(pairs) if mine != its), min(len(one), len(other)))


def _token(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """An id with its token, for messages; there is none at the end of a text."""
    return f"{ids[0]} ({tokenizer.inner.convert_ids_to_tokens(ids[0])!r})" if ids else "none"


def _shown(ids: int | tuple[int, ...]) -> str:
    return " ".join(map(str, (ids,) if isinstance(ids, int) else ids)) or "none"


def _letters(text: str) -> int:
    return sum(map(str.isalnum, text))
