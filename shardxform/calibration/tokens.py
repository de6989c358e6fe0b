"""A checkpoint's tokenizer, texts as its token ids, and whether these are the ids that the text has in use.

Loaded by transformers from the checkpoint's own files: nothing is downloaded, and code in the checkpoint is not run.
Text is tokenized without the special tokens that a tokenizer would put around it.

A tokenizer loads without complaint from files that are not all there, or that its class reads otherwise than they say;
its ids run through a model all the same. So it is held against `tokenizer.json`, against the size of the vocabulary
and against what becomes of text: that of the data, and a fixed sample. Where two models are run on one text, the
tokenizer of the other must give the same ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shardxform.base.file_system import not_a_directory
from shardxform.base.strict_json import JsonError, dumps, parse_config, parse_object
from shardxform.calibration.documents import Passage
from shardxform.calibration.readers import DataRecord
from shardxform.errors import CheckpointError, PlanError

__all__ = [
    "SAMPLE",
    "Encoder",
    "Tokenizer",
    "id_batches",
    "ids_of",
    "line_of",
    "load_tokenizer",
    "load_twin",
    "plain_text",
    "tokenizer_digest",
    "type_name",
]

_CONFIG: Final = "config.json"
_TOKENIZER_CONFIG: Final = "tokenizer_config.json"
_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_OTHERS: Final = (
    _TOKENIZER_CONFIG,
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
)
_MAX_JSON_BYTES: Final = 64 << 20
_BATCH_CHARACTERS: Final = 1 << 19
_BATCH_PIECES: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer that fits its checkpoint.

    Attributes:
        inner: transformers' object.
        root: the checkpoint.
        end: id of the end-of-text token.
        begin: the id that it puts before every text, such as a beginning-of-text token, or nothing.
        vocab_size: number of embeddings of the model; every id is below it.
        sha256: over the names and contents of its files.

    """

    inner: Any
    root: Path
    end: int
    begin: tuple[int, ...]
    vocab_size: int
    sha256: str


def load_tokenizer(root: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    Raises:
        CheckpointError: files are missing or malformed, it needs code to be run, or it does not fit config.json.

    """
    if not root.is_dir():
        raise CheckpointError(f"{root}: {not_a_directory(root)}")
    config = _json(root / _CONFIG)
    if not any((root / name).is_file() for name in _VOCABULARIES):
        raise CheckpointError(f"{root}: expected a tokenizer, such as tokenizer.json, found none")
    vocab_size = _number(config, "vocab_size")
    if vocab_size is None or vocab_size > 1 << 31:
        raise CheckpointError(f"{root / _CONFIG}: expected a vocab_size of at most 2^31, found {vocab_size}")
    inner = _loaded(root)
    end = _end_of_text(inner, config, root)
    if not 0 <= end < vocab_size:
        raise CheckpointError(f"{root}: the end-of-text token has id {end}, but vocab_size is {vocab_size}")
    first = ids_of(inner, [""], special=True)[0][:1]
    begin = tuple(first) if first == [inner.bos_token_id] else ()
    return Tokenizer(inner=inner, root=root, end=end, begin=begin, vocab_size=vocab_size, sha256=_digest(root))


def plain_text(record: DataRecord) -> str:
    """Text of a record whose value is one.

    Raises:
        PlanError: it is none.

    """
    if not isinstance(record.value, str):
        raise PlanError(f"{record.place}: {_field(record)}: expected a string, found {type_name(record.value)}")
    return record.value


def _field(record: DataRecord) -> str:
    """The name of a record's field, which may be a stranger's."""
    return record.key if record.key.isprintable() else ascii(record.key)


# -- loading -------------------------------------------------------------------------------------------------------


def _loaded(root: Path) -> Any:  # noqa: ANN401
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise CheckpointError(f"{root}: reading its tokenizer needs transformers: pip install transformers") from e
    load: Any = AutoTokenizer.from_pretrained
    try:
        return load(root, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # of transformers, tokenizers and what they use
        if "trust_remote_code" in str(e):
            raise CheckpointError(f"{root}: its tokenizer is code in the checkpoint, which is not run") from e
        if fault := _config_fault(root):
            raise CheckpointError(f"{root / _CONFIG}: transformers refuses it: {fault}") from e
        raise CheckpointError(f"{root}: its tokenizer cannot be loaded: {line_of(e)}") from e


def _config_fault(root: Path) -> str:
    """What transformers says against config.json, which it reads before any tokenizer; empty for nothing."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # of transformers and what checks its configs
        return line_of(e)
    return ""


def _end_of_text(inner: Any, config: Mapping[str, object], root: Path) -> int:  # noqa: ANN401
    """Id of the end-of-text token: the tokenizer's, else of config.json, else of generation_config.json."""
    if type(inner.eos_token_id) is int:
        return inner.eos_token_id
    end = _number(config, "eos_token_id")
    if end is None and (root / "generation_config.json").is_file():
        end = _number(_json(root / "generation_config.json"), "eos_token_id")
    if end is None:
        raise CheckpointError(f"{root}: expected an end-of-text token of the tokenizer or in config.json, found none")
    return end


def _number(config: Mapping[str, object], key: str) -> int | None:
    """A number of the config or of its text part; the first where it is a list."""
    thinker = config.get("thinker_config")
    outer = thinker if isinstance(thinker, dict) else config
    text = outer.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        value = part.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int:
            return value
    return None


def _json(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: expected a regular file")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: expected at most 64 MiB, found more")
        return parse_config(data) if path.name == _CONFIG else parse_object(data)
    except JsonError as e:
        raise CheckpointError(f"{path}: {e}") from e
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror or e}") from e


def _digest(root: Path) -> str:
    digest = hashlib.sha256()
    for name in sorted((*_VOCABULARIES, *_OTHERS)):
        if (root / name).is_file():
            data = (root / name).read_bytes()
            digest.update(f"{name} {len(data)}\n".encode() + data)
    return digest.hexdigest()


# -- encoding ------------------------------------------------------------------------------------------------------


def id_batches(pieces: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Group pieces so that the encodings of a group, about 150 bytes a token, stay small."""
    batch: list[Passage] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def ids_of(inner: Any, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:  # noqa: ANN401
    """Ids of texts, with the tokens that the tokenizer puts around them if `special`.

    Raises:
        CheckpointError: the tokenizer cannot do it, though it could be loaded: its files say what makes no sense, or
            it has no token for what it does not know.

    """
    try:
        encoding = inner(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # says that a text is longer than the model's context
        )
        ids: list[list[int]] = encoding["input_ids"]
    except Exception as e:  # of transformers and tokenizers
        raise CheckpointError(
            f"{getattr(inner, 'name_or_path', '')}: its tokenizer gives no ids for text: {line_of(e)}; compare"
            " tokenizer.json and tokenizer_config.json with those of the release"
        ) from e
    return ids


def type_name(value: object) -> str:
    """What a value is, for messages."""
    return "null" if value is None else "an empty list" if value == [] else type(value).__name__


def line_of(error: Exception) -> str:
    """All that a stranger's error says, in a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# -- text as ids -------------------------------------------------------------------------------------------------------


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

    def encoded(self, pieces: Iterable[Passage]) -> Iterator[tuple[Passage, list[int]]]:
        """Yield every piece with its ids; a bounded number of pieces is read ahead.

        Raises:
            CheckpointError: text that can be seen gives no ids.
            PlanError: the twin gives other ids.

        """
        for batch in id_batches(pieces):
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

    def _refuse_other(self, piece: Passage, ids: Sequence[int], other: Sequence[int]) -> None:
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
