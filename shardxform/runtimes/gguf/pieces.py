"""Tokens of a SentencePiece model: the three fields of its protocol buffer that a vocabulary is made of.

Fields and numbers are those of sentencepiece_model.proto. The file comes from strangers: what is not such a message is
refused, and nothing is read beyond its end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["MalformedModel", "SentencePiece", "pieces_of"]


class MalformedModel(ValueError):
    """Bytes that are no SentencePiece model."""


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """A piece: its text, its score, and its kind: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte."""

    text: str
    score: float = 0.0
    kind: int = 1


def pieces_of(data: bytes) -> Iterator[SentencePiece]:
    """List the pieces of a model, in the order of their ids.

    Raises:
        MalformedModel: it is none.

    """
    for number, value in _fields(data):
        if number == 1:
            if not isinstance(value, bytes):
                raise MalformedModel("a piece is no message")
            yield _piece(value)


def _piece(data: bytes) -> SentencePiece:
    found = dict(_fields(data))
    text, score, kind = found.get(1, b""), found.get(2, b"\0\0\0\0"), found.get(3, 1)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4 or not isinstance(kind, int):
        raise MalformedModel("a piece has fields of other types")
    try:
        return SentencePiece(text.decode(), struct.unpack("<f", score)[0], kind)
    except UnicodeDecodeError as e:
        raise MalformedModel("a piece is no UTF-8") from e


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a message: integers, or bytes where they have a length or a width."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise MalformedModel(f"field {key >> 3} has wire type {wire}")
        if at + length > len(data):
            raise MalformedModel(f"field {key >> 3} ends after the file")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise MalformedModel("a number does not end")
