"""A checkpoint's tokenizer, and texts as its token ids.

Loaded by transformers from the checkpoint's own files: nothing is downloaded, and code in the checkpoint is not run.
Text is tokenized without the special tokens that a tokenizer would put around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardxform.base.file_system import not_a_directory
from shardxform.base.strict_json import JsonError, parse_object
from shardxform.calibration.documents import Piece
from shardxform.calibration.readers import Record
from shardxform.errors import CheckpointError, PlanError

__all__ = ["Tokenizer", "batches", "ids_of", "line_of", "load_tokenizer", "plain_text", "type_name"]

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


def plain_text(record: Record) -> str:
    """Text of a record whose value is one.

    Raises:
        PlanError: it is none.

    """
    if not isinstance(record.value, str):
        raise PlanError(f"{record.place}: {_field(record)}: expected a string, found {type_name(record.value)}")
    return record.value


def _field(record: Record) -> str:
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


def _end_of_text(inner: Any, config: Mapping[str, Any], root: Path) -> int:  # noqa: ANN401
    """Id of the end-of-text token: the tokenizer's, else of config.json, else of generation_config.json."""
    if type(inner.eos_token_id) is int:
        return inner.eos_token_id
    end = _number(config, "eos_token_id")
    if end is None and (root / "generation_config.json").is_file():
        end = _number(_json(root / "generation_config.json"), "eos_token_id")
    if end is None:
        raise CheckpointError(f"{root}: expected an end-of-text token of the tokenizer or in config.json, found none")
    return end


def _number(config: Mapping[str, Any], key: str) -> int | None:
    """A number of the config or of its text part; the first where it is a list."""
    text = config.get("text_config")
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
        return parse_object(data)
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


def batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Group pieces so that the encodings of a group, about 150 bytes a token, stay small."""
    batch: list[Piece] = []
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
    """Ids of texts, with the tokens that the tokenizer puts around them if `special`."""
    encoding = inner(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # says that a text is longer than the model's context
    )
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def type_name(value: object) -> str:
    """What a value is, for messages."""
    return "null" if value is None else "an empty list" if value == [] else type(value).__name__


def line_of(error: Exception) -> str:
    """All that a stranger's error says, in a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
