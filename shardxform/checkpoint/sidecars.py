"""Small files beside the shards, held against what clients read in them: tokenizers, templates, generation settings.

A download that failed leaves a pointer of Git LFS, a page of HTML, nothing, or half of a file under the right name, and
no client says so before it starts. Plan, verification and upload ask the one function `fault_of`. Files for people,
such as a README or a licence, may hold anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import CheckpointError

__all__ = ["fault_of", "faults_of", "is_document", "refuse_faulty", "refuse_faulty_file", "template_fault"]

_DOCUMENTS: Final = ("readme*", "license*", "licence*", "notice*", "use_policy*", "usage_policy*")
_OBJECTS: Final = (
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
_POINTERS: Final = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_PAGE: Final = re.compile(rb"<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
_ANSWERS: Final = re.compile(
    rb"(\d{3}:? )?(access (denied|to model .{0,200})|entry not found|file not found|forbidden|internal error.{0,99}"
    rb"|invalid (credentials|rev id|username or password)\.?.{0,99}|not found|repository not found|unauthorized)\.?",
    re.IGNORECASE | re.DOTALL,
)
_MAX_REMOTE_BYTES: Final = 1 << 20  # of a large file of the hub; pointers, pages and answers are smaller
_BLOCKS: Final = frozenset({"autoescape", "block", "call", "filter", "for", "generation", "if", "macro", "with"})
_WIRE: Final = {1: 8, 5: 4}  # bytes of a protobuf field of fixed size


def is_document(name: str) -> bool:
    """Tell whether a sidecar is for people: publishers rewrite model cards, and no client reads them."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in _DOCUMENTS)


def fault_of(path: Path, name: str) -> str:
    """Say what is wrong with the sidecar `name` that lies at `path`; empty for nothing, and for any document.

    Raises:
        OSError: it cannot be read.

    """
    return "" if is_document(name) else _fault(name.lower().rpartition("/")[2], path.read_bytes())


def faults_of(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield each sidecar that no client can read, by name, with what is wrong with it.

    Of a repository, large files that are not here yet are not fetched for it: they are looked at once they are.

    Raises:
        CheckpointError: one cannot be read.
        RemoteError: the hub does not give it.

    """
    for sidecar in checkpoint.sidecars:
        name, remote = sidecar.name, checkpoint.remote
        if remote and remote.sha256(name) and sidecar.nbytes > _MAX_REMOTE_BYTES:
            continue
        try:
            fault = fault_of(checkpoint.file(name), name)
        except OSError as e:
            raise CheckpointError(f"{checkpoint.where}/{name}: {e.strerror}") from e
        if fault:
            yield name, fault


def refuse_faulty(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose sidecars no client can read, before any of them is copied.

    Raises:
        CheckpointError: names the first, and how many there are.

    """
    found = list(faults_of(checkpoint))
    if found:
        (name, fault), more = found[0], len(found) - 1
        others = f" (and {more} more: {', '.join(name for name, _ in found[1:4])})" if more else ""
        raise CheckpointError(f"{checkpoint.where}/{name}: {fault}; fetch it again, or remove it{others}")


def refuse_faulty_file(path: Path, name: str) -> None:
    """Refuse the sidecar `name` that was fetched to `path` just now, if no client can read it.

    Raises:
        CheckpointError: it is faulty, or cannot be read.

    """
    try:
        fault = fault_of(path, name)
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror}") from e
    if fault:
        raise CheckpointError(f"{path}: {fault}")


def template_fault(text: str) -> str:
    """Say where a chat template is cut short: inside a tag, or inside a block that is not ended; empty for nowhere.

    Only delimiters, strings, brackets and the names of blocks are looked at, as the lexer of Jinja does.
    """
    if "{{" not in text and "{%" not in text:
        return "no template: it takes nothing from the messages"
    opened: list[str] = []
    at = 0
    while match := re.compile(r"\{[{%#]").search(text, at):
        tag = match.group()
        if tag == "{#":
            at = text.find("#}", match.end()) + 2
            if at < 2:
                return f"cut short: {{# at character {match.start()} is not closed"
            continue
        end = _tag_end(text, match.end(), "}}" if tag == "{{" else "%}")
        if end is None:
            return f"cut short: {tag} at character {match.start()} is not closed"
        at = end
        if tag == "{%" and (at := _block(text, text[match.end() : end - 2], end, opened)) < 0:
            return "cut short: {% raw %} is not ended"
    return f"cut short: {{% {opened[-1]} %}} is not ended" if opened else ""


def _block(text: str, inside: str, end: int, opened: list[str]) -> int:
    """Follow the statement `inside` that ends at `end`; give where to go on, or -1 for raw text without an end."""
    words = inside.strip("-+ \t\r\n")
    name = re.match(r"\w*", words).group()  # type: ignore[union-attr]
    if name == "raw":
        match = re.compile(r"\{%[-+]?\s*endraw\s*[-+]?%\}").search(text, end)
        return match.end() if match else -1
    if name in _BLOCKS or (name == "set" and "=" not in words):
        opened.append(name)
    elif name.startswith("end") and opened and opened[-1] == name[3:]:
        opened.pop()
    return end


def _tag_end(text: str, at: int, closing: str) -> int | None:
    """Position after the end of a tag; strings are skipped, and brackets within it must be closed first."""
    depth = 0
    while at < len(text):
        char = text[at]
        if char in "\"'":
            match = re.compile(r"(?s)([\"'])(?:\\.|(?!\1).)*\1").match(text, at)
            if not match:
                return None
            at = match.end()
            continue
        if depth == 0 and text.startswith(closing, at):
            return at + 2
        depth += (char in "([{") - (char in ")]}")
        at += 1
    return None


# -- kinds of files ---------------------------------------------------------------------------------------------------


def _fault(name: str, data: bytes) -> str:
    if name.endswith(".py") and not data.strip():
        return ""  # a package's __init__.py
    if not data.strip():
        return "empty"
    if data.startswith(_POINTERS):
        return "a pointer of Git LFS instead of the file"
    if not data.strip(b"\0"):
        return "only zero bytes"
    start = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    if _PAGE.match(start):
        return "a page of HTML instead of the file"
    if len(data) < 1024 and _ANSWERS.fullmatch(data.strip()):
        return f"the answer of a server instead of the file: {data.decode('utf-8', 'replace').strip()[:60]!r}"
    if name.endswith(".json"):
        return _json_fault(name, data)
    if start.startswith(b"{") and len(data) < 1024 and (said := _answer(_parsed(data)[0])):
        return said
    return _other_fault(name, data)


def _other_fault(name: str, data: bytes) -> str:
    if name.endswith(".model") and data[0] == 0x0A:
        return "" if _is_whole_protobuf(data) else "cut short: its last record is not whole"
    if name.endswith((".model", ".tiktoken")):
        return _line_fault(data, rb"\S+ \d+", "a token and its rank")
    try:
        text = data.decode("utf-8") if name.endswith((".jinja", ".txt", ".py")) else ""
    except UnicodeDecodeError as e:
        return f"not UTF-8 at byte {e.start}"
    if name.endswith(".jinja"):
        return template_fault(text)
    return _line_fault(data, rb"\S+ \S+", "two tokens to merge") if name == "merges.txt" else ""


def _line_fault(data: bytes, pattern: bytes, what: str) -> str:
    """Look at the first lines and the last one of a list, but for a heading."""
    lines = data.strip().splitlines()
    if lines[0].startswith(b"#version"):
        lines = lines[1:]
    for line in lines[:3] + lines[-1:]:
        if not re.fullmatch(pattern, line):
            return f"expected lines of {what}, found {line[:40].decode('utf-8', 'replace')!r}"
    return "" if lines else "a heading and nothing else"


def _json_fault(name: str, data: bytes) -> str:
    value, wrong = _parsed(data)
    if wrong:
        return wrong
    if said := _answer(value):
        return said
    if not isinstance(value, dict):
        return f"expected an object, found {_kind(value)}" if name in _OBJECTS else ""
    return _templates_fault(value.get("chat_template")) if name != "vocab.json" else ""


def _templates_fault(found: object) -> str:
    """Look at the chat templates of a tokenizer: one, or several by name."""
    if found is None:
        return ""
    texts = [found] if isinstance(found, str) else _named(found)
    if texts is None:
        return f"chat_template: expected a template or a list of them by name, found {_kind(found)}"
    faults = (fault for text in texts if (fault := template_fault(text)))
    return next((f"chat_template: {fault}" for fault in faults), "")


def _named(found: object) -> list[str] | None:
    items = found if isinstance(found, list) else list(found.values()) if isinstance(found, dict) else [None]
    texts = [item.get("template") if isinstance(item, dict) else item for item in items]
    strings = [text for text in texts if isinstance(text, str)]
    return strings if len(strings) == len(texts) else None


def _parsed(data: bytes) -> tuple[Any, str]:
    """Parse JSON as Python's reader takes it, which is the most lenient of clients'; the value, and what is wrong."""
    try:
        return json.loads(data.decode("utf-8")), ""
    except UnicodeDecodeError as e:
        return None, f"not UTF-8 at byte {e.start}"
    except RecursionError:
        return None, "not JSON: nested too deeply"
    except json.JSONDecodeError as e:
        cut = e.pos >= len(e.doc.rstrip()) or e.msg.startswith("Unterminated string")
        what = "cut short" if cut else "not JSON"
        return None, f"{what}: {e.msg} at line {e.lineno} column {e.colno}"
    except ValueError as e:  # an integer of thousands of digits
        return None, f"not JSON: {e}"


def _answer(value: object) -> str:
    """Say that a server's message was stored in place of a file: an object with an error and little else."""
    error = value.get("error") if isinstance(value, dict) and len(value) <= 3 else None
    return f"the answer of a server instead of the file: {error[:60]!r}" if isinstance(error, str) else ""


def _kind(value: object) -> str:
    names = {"NoneType": "null", "str": "a string", "list": "a list"}
    return names.get(type(value).__name__, repr(value)[:40])


def _is_whole_protobuf(data: bytes) -> bool:
    """Walk the records of a SentencePiece model; each says how long it is, and the last one ends with the file."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 2:
            length, at = _varint(data, at)
            at += length
        elif kind == 0:
            _, at = _varint(data, at)
        elif kind in _WIRE:
            at += _WIRE[kind]
        else:
            return False
        if at < 0:
            return False
    return at == end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number of variable length; its value, and where it ends, or far beyond everything if it does not."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    return 0, len(data) + 1
