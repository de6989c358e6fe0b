"""Keys of a GGUF file that hold the tokenizer: tokens and their kinds, merges, special ids, how text is split.

Files of the tokenizer come from strangers: each is read as JSON and looked at before anything is taken from it. What
the `gguf` package does itself, merges and special ids and chat templates, is left to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shardxform.base.strict_json import JsonError, parse_object
from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.architecture import Architecture
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.pretokenizers import BY_DIGEST, BY_PATTERN, NAMES, digest_of, signature_of

__all__ = ["Token", "add_tokenizer", "read_json", "tokens_of"]

_FILE: Final = "tokenizer.json"
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # as `gguf.TokenType` numbers them


@dataclass(frozen=True, slots=True)
class Token:
    """A token as llama.cpp wants it: its text, its number in `gguf.TokenType`, and its score where there are scores."""

    text: str
    kind: int
    score: float = 0.0


def add_tokenizer(architecture: Architecture, recorder: Recorder, root: Path, pre_tokenizer: str = "") -> None:
    """Record the tokenizer of a model, from the files beside it.

    Args:
        architecture: the model.
        recorder: told of it.
        root: folder of tokenizer.json and what else belongs to it.
        pre_tokenizer: llama.cpp's name of how text is split, where it cannot be told; else empty.

    Raises:
        SchemeError: a file is missing or malformed, or the way in which it splits text is unknown to llama.cpp.

    """
    tokenizer = read_json(root, _FILE)
    if tokenizer is None:
        raise SchemeError(f"{root}/{_FILE} is missing: GGUF holds the tokenizer as well; put the release's there")
    where = f"{root}/{_FILE}"
    writer = recorder.writer
    pre = pre_tokenizer or _pre_tokenizer(tokenizer, where)
    if pre not in NAMES:
        raise SchemeError(f"`pre_tokenizer` {pre}: unknown to llama.cpp; expected one of {', '.join(sorted(NAMES))}")
    tokens = tokens_of(
        tokenizer, _added(tokenizer, read_json(root, "tokenizer_config.json")), architecture.size("vocab_size"), where
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token.text for token in tokens])
    writer.add_token_types([token.kind for token in tokens])
    special = recorder.gguf.SpecialVocab(root, load_merges=True)
    for name, text in architecture.kind.specials.items():
        special._set_special_token(name, next((at for at, token in enumerate(tokens) if token.text == text), None))
    special.add_to_gguf(writer, quiet=True)


def read_json(root: Path, name: str) -> dict[str, Any] | None:
    """A JSON file; None where there is none.

    Raises:
        SchemeError: it is no object.

    """
    path = root / name
    try:
        return parse_object(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, JsonError) as e:
        raise SchemeError(f"{path}: {e}") from e


@dataclass(frozen=True, slots=True)
class _Added:
    """A token that was added to the vocabulary: its text, and whether it is special."""

    text: str
    special: bool


def _added(tokenizer: Mapping[str, Any], config: Mapping[str, Any] | None) -> dict[int, _Added]:
    """Added tokens by id, those of tokenizer_config.json too."""
    listed = {each.get("id"): each for each in tokenizer.get("added_tokens") or () if isinstance(each, dict)}
    others = (config or {}).get("added_tokens_decoder") or {}
    for key, each in others.items() if isinstance(others, dict) else ():
        if key.isdecimal() and isinstance(each, dict):
            listed.setdefault(int(key), each)
    return {
        at: _Added(each.get("content", ""), bool(each.get("special")))
        for at, each in listed.items()
        if isinstance(at, int)
    }


def tokens_of(tokenizer: Mapping[str, Any], added: Mapping[int, _Added], count: int, where: str) -> list[Token]:
    """List the tokens of a byte-level BPE by id, as many as the embeddings have rows; holes are unused.

    Raises:
        SchemeError: it is another kind of tokenizer, or has an id beyond.

    """
    model = tokenizer.get("model")
    model = model if isinstance(model, dict) else {}
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict) or model.get("byte_fallback"):
        raise SchemeError(f"{where}: expected a byte-level BPE, which is what llama.cpp's gpt2 is")
    by_id = {at: text for text, at in vocabulary.items()} | {at: each.text for at, each in added.items()}
    bad = next((at for at in by_id if not isinstance(at, int) or not 0 <= at < count), None)
    if bad is not None:
        raise SchemeError(f"{where}: token {by_id[bad]!r} has id {bad}, but config.json: vocab_size is {count}")
    return [_token(at, by_id.get(at), added.get(at)) for at in range(count)]


def _token(at: int, text: str | None, added: _Added | None) -> Token:
    if text is None:
        return Token(f"[PAD{at}]", _UNUSED)
    if added is None:
        return Token(text, _NORMAL)
    if added.special or _looks_special(text):
        return Token(text, _CONTROL)
    return Token(text.replace("▁", " "), _USER)


def _looks_special(text: str) -> bool:
    """Whether an added token is a control token though it is not said to be, by llama.cpp's converter."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _pre_tokenizer(tokenizer: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name of how a tokenizer splits text: by its patterns, or by what becomes of a text.

    Raises:
        SchemeError: it is unknown.

    """
    found = BY_PATTERN.get(signature_of(tokenizer))
    if found is not None:
        return found
    name = BY_DIGEST.get(digest_of(tokenizer))
    if name is not None:
        return name
    raise SchemeError(
        f"{where}: llama.cpp knows no pre-tokenizer that splits text by {signature_of(tokenizer)};"
        " name the one that does the same with `pre_tokenizer`"
    )
