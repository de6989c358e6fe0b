"""Keys of a GGUF file that hold the tokenizer: tokens and their kinds, merges, special ids, how text is split.

Files of the tokenizer come from strangers: each is read as JSON and looked at before anything is taken from it. What
the `gguf` package does itself, merges and special ids and chat templates, is left to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shardxform.base.strict_json import JsonError, parse_object
from shardxform.errors import SchemeError
from shardxform.runtimes.gguf.architecture import Architecture
from shardxform.runtimes.gguf.keys import Recorder
from shardxform.runtimes.gguf.pieces import MalformedModel, pieces_of
from shardxform.runtimes.gguf.pretokenizers import ADDING_BOS, BY_DIGEST, BY_PATTERN, NAMES, digest_of, signature_of

__all__ = ["Token", "add_tokenizer", "read_json", "token_list"]

_FILE: Final = "tokenizer.json"
_CONFIG: Final = "tokenizer_config.json"
_MODEL: Final = "tokenizer.model"
_MODEL_SUFFIX: Final = ".model"
_TIKTOKEN: Final = ".tiktoken"
_TEMPLATE: Final = "chat_template.jinja"
_NORMAL, _CONTROL, _USER, _UNUSED, _BYTE = 1, 3, 4, 5, 6  # as `gguf.TokenType` numbers them
_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"  # what SentencePiece writes for a space
_BYTE_TOKEN: Final = re.compile("<0x[0-9A-Fa-f]{2}>")
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
_VISIBLE: Final = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
)
"""Special tokens of Gemma 4 that are shown, so that what reads answers finds them."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token as llama.cpp wants it: its text, its number in `gguf.TokenType`, and its score where there are scores."""

    text: str
    kind: int
    score: float = 0.0


@dataclass(frozen=True, slots=True)
class _Added:
    """A token that was added to the vocabulary: its text, and whether it is special."""

    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of a tokenizer that were read: tokenizer.json and tokenizer_config.json, empty where missing."""

    root: Path
    tokenizer: Mapping[str, Any]
    config: Mapping[str, Any]

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.root}/{_FILE}"

    @property
    def model(self) -> Mapping[str, Any]:
        """The part of tokenizer.json that holds the vocabulary."""
        model = self.tokenizer.get("model")
        return model if isinstance(model, dict) else {}

    @property
    def vocabulary(self) -> dict[str, int]:
        """Ids of tokens.

        Raises:
            SchemeError: it is no vocabulary of pairs that are merged.

        """
        found = self.model.get("vocab")
        if self.model.get("type") != "BPE" or not isinstance(found, dict):
            raise SchemeError(f"{self.where}: expected a model of type BPE, found {self.model.get('type')!r}")
        return found

    def refuse_moved(self) -> None:
        """Refuse ids that the `tokenizers` library, and so every client, does not give: it counts on where they jump.

        Raises:
            SchemeError: names the first such token.

        """
        vocabulary, following = self.vocabulary, len(self.vocabulary)
        for each in self.tokenizer.get("added_tokens") or ():
            at, text = (each.get("id"), each.get("content")) if isinstance(each, dict) else (None, None)
            if not isinstance(at, int) or not isinstance(text, str):
                raise SchemeError(f"{self.where}: added_tokens: expected an id and a content, found {each!r}")
            given = vocabulary.get(text, following)
            if at != given:
                raise SchemeError(f"{self.where}: added token {text!r} has id {at}, but is loaded with id {given}")
            following = max(following, at + 1)

    def listed(self, *, config: bool = True) -> dict[int, _Added]:
        """Added tokens by id, with those of tokenizer_config.json."""
        listed = {each.get("id"): each for each in self.tokenizer.get("added_tokens") or () if isinstance(each, dict)}
        others = self.config.get("added_tokens_decoder")
        for key, each in others.items() if config and isinstance(others, dict) else ():
            if key.isdecimal() and isinstance(each, dict):
                listed.setdefault(int(key), each)
        found = {at: each for at, each in listed.items() if isinstance(at, int)}
        return {at: _Added(str(each.get("content", "")), bool(each.get("special"))) for at, each in found.items()}


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
    files = _Files(root, read_json(root, _FILE) or {}, read_json(root, _CONFIG) or {})
    kind, count = architecture.kind.tokenizer, architecture.size("vocab_size")
    pre, pieces = "", (root / _MODEL).is_file() and kind == "llama"
    if not files.tokenizer and not pieces:
        raise SchemeError(f"{root}/{_FILE} is missing: GGUF holds the tokenizer too; {_way_out(root)}")
    if kind == "llama" and not pieces and not files.model.get("byte_fallback"):
        kind = "gpt2"
    writer = recorder.writer
    writer.add_tokenizer_model(kind)
    if kind == "gpt2":
        pre = _pre_tokenizer(files, pre_tokenizer)
        pre = architecture.kind.splits.get(pre, pre)
        writer.add_tokenizer_pre(pre)
        tokens = token_list(files, count)
    elif kind == "llama":
        prefix = files.config.get("add_prefix_space") if pieces else _begins_with_space(files)
        if prefix is not None:
            writer.add_add_space_prefix(prefix)
        writer.add_tokenizer_pre("default")
        tokens = _tokens_of_pieces(files, count) if pieces else _tokens_of_characters(files, count, scored=True)
    else:
        tokens = [_shown(token) for token in _tokens_of_characters(files, count, scored=False)]
    ends = architecture.kind.specials.values()  # though they may be no special tokens by the tokenizer's files
    tokens = [replace(each, kind=_CONTROL) if each.kind == _USER and each.text in ends else each for each in tokens]
    writer.add_token_list([token.text for token in tokens])
    if kind != "gpt2":
        writer.add_token_scores([token.score for token in tokens])
    writer.add_token_types([token.kind for token in tokens])
    special = _special(architecture, recorder, files, tokens, merges=kind != "llama")
    if kind == "gpt2" and pre in ADDING_BOS:
        special.add_special_token.setdefault("bos", False)
    special.add_to_gguf(writer, quiet=True)
    if kind == "gemma4":
        writer.add_add_space_prefix(False)
    if kind == "gemma4" or architecture.kind.adds_bos:
        writer.add_add_bos_token(True)


def _way_out(root: Path) -> str:
    if any(path.suffix in (_TIKTOKEN, _MODEL_SUFFIX) and path.is_file() for path in root.glob("*")):
        return "other files of tokenizers are not read here: have transformers' save_pretrained write it of them"
    return "put the release's there"


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


def _special(
    architecture: Architecture, recorder: Recorder, files: _Files, tokens: list[Token], *, merges: bool
) -> Any:  # noqa: ANN401
    """Merges, special ids, which of them every text begins and ends with, and the chat template, as the package has it.

    Raises:
        SchemeError: the package finds them malformed.

    """
    try:
        special = recorder.gguf.SpecialVocab(files.root, load_merges=merges, n_vocab=len(tokens))
        template = files.root / _TEMPLATE
        if template.is_file() and not isinstance(special.chat_template, list):  # it decides, as in transformers
            special.chat_template = template.read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        raise SchemeError(f"{files.where} or what is beside it is malformed: {e}") from e
    for name, text in architecture.kind.specials.items():
        found = next((at for at, token in enumerate(tokens) if token.text == text), None)
        special._set_special_token(name, found)
    special.add_special_token.update(_begins_and_ends(files))
    if merges and not special.merges:
        raise SchemeError(f"{files.where}: no merges; llama.cpp loads no such tokenizer without them")
    return special


def _begins_and_ends(files: _Files) -> dict[str, bool]:
    """Whether texts begin and end with tokens of their own by tokenizer.json, which decides before any other file."""
    processor = files.tokenizer.get("post_processor")
    processor = processor if isinstance(processor, dict) else {}
    out: dict[str, bool] = {}
    for each in processor.get("processors", [processor]):
        kind = each.get("type") if isinstance(each, dict) else None
        if kind == "ByteLevel":
            out = {"bos": False, "eos": False, **out}
        elif kind == "TemplateProcessing":
            out.update(_of_template(each, files.config))
    return out


def _of_template(processor: Mapping[str, object], config: Mapping[str, object]) -> dict[str, bool]:
    """The same of the template of one text: whether what it begins or ends with is the token of beginnings or ends."""
    single = processor.get("single")
    if not isinstance(single, list) or len(single) < 2:
        return {}
    out: dict[str, bool] = {}
    for name, at in (("bos", 0), ("eos", -1)):
        part = single[at].get("SpecialToken") if isinstance(single[at], dict) else None
        if isinstance(part, dict) and part.get("id"):
            out[name] = part["id"] == _content(config.get(f"{name}_token")) or not config
    return out


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


# -- tokens ------------------------------------------------------------------------------------------------------------


def token_list(files: _Files, count: int) -> list[Token]:
    """List the tokens of a byte-level BPE by id, as many as the embeddings have rows; holes are unused.

    Raises:
        SchemeError: it is another kind of tokenizer, or has an id beyond.

    """
    if files.model.get("byte_fallback"):
        raise SchemeError(f"{files.where}: expected a BPE of bytes, which is what llama.cpp's gpt2 is")
    files.refuse_moved()
    added = files.listed()
    by_id = {at: text for text, at in files.vocabulary.items()} | {at: each.text for at, each in added.items()}
    _refuse_beyond(by_id, count, files.where)
    return [_token(at, by_id.get(at), added.get(at)) for at in range(count)]


def _refuse_beyond(ids: Mapping[int, str], count: int, where: str) -> None:
    bad = next((at for at in ids if not isinstance(at, int) or not 0 <= at < count), None)
    if bad is not None:
        raise SchemeError(f"{where}: token {ids[bad]!r} has id {bad}, but config.json: vocab_size is {count}")


def _token(at: int, text: str | None, added: _Added | None) -> Token:
    if text is None:
        return Token(f"[PAD{at}]", _UNUSED)
    if added is None:
        return Token(text, _NORMAL)
    if added.special or _looks_special(text):
        return Token(text, _CONTROL)
    return Token(text.replace(_SPACE, " "), _USER)


def _looks_special(text: str) -> bool:
    """Whether an added token is a control token though it is not said to be, by llama.cpp's converter."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _tokens_of_pieces(files: _Files, count: int) -> list[Token]:
    """List the tokens of a SentencePiece model, with those that were added.

    Raises:
        SchemeError: it is malformed.

    """
    where = files.root / _MODEL
    try:
        pieces = list(pieces_of(where.read_bytes()))
    except (OSError, MalformedModel) as e:
        raise SchemeError(f"{where}: {e}") from e
    _refuse_beyond({at: piece.text for at, piece in enumerate(pieces)}, count, str(where))
    tokens = [Token(piece.text, _NORMAL if piece.kind == _USER else piece.kind, piece.score) for piece in pieces]
    tokens += [Token(f"[PAD{at}]", _UNUSED, _UNUSED_SCORE) for at in range(len(tokens), count)]
    others = {at: text for text, at in (read_json(files.root, "added_tokens.json") or {}).items()}
    _refuse_beyond(others, count, f"{files.root}/added_tokens.json")
    for at, text in others.items():
        tokens[at] = Token(text, _USER, _ADDED_SCORE)
    decoder = _Files(files.root, {}, files.config).listed()
    _refuse_beyond({at: each.text for at, each in decoder.items()}, count, f"{files.root}/{_CONFIG}")
    for at, added in decoder.items():
        found = _token(at, added.text, added)
        tokens[at] = Token(found.text, found.kind, _ADDED_SCORE)
    return tokens


def _tokens_of_characters(files: _Files, count: int, *, scored: bool) -> list[Token]:
    """List the tokens of a BPE of characters that falls back to bytes.

    With scores they are merged in the order of the merges, as SentencePiece has it; llama.cpp's converter gives all the
    same score where there is no SentencePiece model, by which its tokenizer would merge from left to right.
    """
    files.refuse_moved()
    vocabulary, added = files.vocabulary, files.listed()
    if not files.model.get("byte_fallback"):
        raise SchemeError(f"{files.where}: expected a BPE of characters that falls back to bytes")
    by_id = {at: text for text, at in vocabulary.items()} | {at: each.text for at, each in added.items()}
    _refuse_beyond(by_id, count, files.where)
    ranks = _ranks(files.model.get("merges") or ()) if scored else {}
    out: list[Token] = []
    for at in range(count):
        text = by_id.get(at)
        kind = _UNUSED if text is None else _kind(text, added.get(at), inside=vocabulary.get(text) == at)
        score = -float(ranks[text]) if scored and text in ranks else _ADDED_SCORE
        out.append(Token(f"[PAD{at}]" if text is None else text, kind, score))
    return out


def _ranks(merges: Iterable[object]) -> dict[str, int]:
    """Number of the first merge that makes a token, by its text."""
    out: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(pair, list) and all(isinstance(part, str) for part in pair):
            out.setdefault("".join(pair), rank)
    return out


def _kind(text: str, added: _Added | None, *, inside: bool) -> int:
    """Kind of a token; of one that was added it matters whether the vocabulary has it as well."""
    if _BYTE_TOKEN.fullmatch(text):
        return _BYTE
    if added is not None and added.special:
        return _CONTROL
    return _NORMAL if added is None or inside else _USER


def _shown(token: Token) -> Token:
    return Token(token.text, _USER, token.score) if token.text in _VISIBLE else token


# -- how text is split -------------------------------------------------------------------------------------------------


def _pre_tokenizer(files: _Files, asked: str) -> str:
    """llama.cpp's name of how a tokenizer splits text: by its patterns, or by what becomes of a text.

    Raises:
        SchemeError: it is unknown.

    """
    if asked and asked not in NAMES:
        raise SchemeError(f"`pre_tokenizer` {asked}: unknown to llama.cpp; expected one of {', '.join(sorted(NAMES))}")
    signature, unread = signature_of(files.tokenizer), _unread_of(files)
    known = "" if unread else BY_PATTERN.get(signature)
    name = asked or known or BY_DIGEST.get(digest_of(files.tokenizer))
    if name is None and unread:
        raise SchemeError(
            f"{files.where}: {unread}, which llama.cpp is not known to do; name its pre-tokenizer that does with"
            " `pre_tokenizer`"
        )
    if name is None:
        raise SchemeError(
            f"{files.where}: llama.cpp is not known to split text by {signature}; name its pre-tokenizer that does with"
            " `pre_tokenizer`"
        )
    return name


def _begins_with_space(files: _Files) -> bool:
    """Whether a space is put before a text whose characters are merged.

    Raises:
        SchemeError: more is done to the text than to write spaces as SentencePiece does.

    """
    steps = [*_steps(files.tokenizer.get("normalizer")), *_steps(files.tokenizer.get("pre_tokenizer"))]
    for step in steps:
        spaces = step.get("type") == "Replace" and (step.get("pattern"), step.get("content")) == (
            {"String": " "},
            _SPACE,
        )
        spaces = spaces or (step.get("type") == "Prepend" and step.get("prepend") == _SPACE)
        if not spaces and step.get("type") != "Metaspace":
            raise SchemeError(
                f"{files.where}: text goes through {step.get('type')!r}, which llama.cpp's tokenizer has not"
            )
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )


def _steps(step: object) -> list[dict[str, Any]]:
    """Steps of a normalizer or a pre-tokenizer, one after the other."""
    if not isinstance(step, dict):
        return []
    parts = step.get("normalizers", step.get("pretokenizers")) if step.get("type") == "Sequence" else [step]
    return [each for each in parts or () if isinstance(each, dict)]


_READ_NORMALIZERS: Final = ("NFC",)  # which leaves nearly all text as it is; llama.cpp's converter passes it over
_UNREAD: Final = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")


def _unread_of(files: _Files) -> str:
    """What a tokenizer of bytes does to text, or to its parts, that llama.cpp's does not; empty for nothing."""
    kinds = [str(each.get("type")) for each in _steps(files.tokenizer.get("normalizer")) if each]
    if others := [kind for kind in kinds if kind not in _READ_NORMALIZERS]:
        return f"text is normalized by {', '.join(others)}"
    return next((f"{key} is {files.model[key]!r}" for key in _UNREAD if files.model.get(key)), "")
