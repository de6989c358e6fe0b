"""llama.cpp as an oracle: its C interface in the shared library of `xllamacpp`, by ctypes.

`with Llama(path) as llama: llama.logits([1, 2, 3])` gives an array [tokens, vocabulary]. By default the cache is
float32 and attention plain, so that what remains to a float32 reference is rounding. A file that does not load is a
`LlamaError` with what llama.cpp said.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

_F16, _F32 = 1, 0
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_said: list[str] = []


class LlamaError(Exception):
    """llama.cpp does not load a file, or not compute with it; the message is the end of its log."""


class _Room(ctypes.Structure):
    """Parameters as the library has them, longer than they are: as the last argument they may be."""

    _fields_ = (("bytes", ctypes.c_uint8 * 512),)

    def set(self, at: int, value: int, was: int) -> None:
        """Change a field of 32 bits, which must have its known default: another version has other places."""
        word = (ctypes.c_int32).from_buffer(self, at)
        assert word.value == was, "another version of llama.cpp lays its parameters out in another way"
        word.value = value


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


@_LOG
def _note(_level: int, text: bytes | None, _data: Any) -> None:
    _said.append((text or b"").decode("utf-8", "replace"))


@functools.cache
def library() -> Any:
    """The shared library, or the test is skipped."""
    found = ctypes.CDLL(str(pytest.importorskip("xllamacpp.xllamacpp").__file__))
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    for name, result, *arguments in (
        ("llama_model_default_params", _Room),
        ("llama_context_default_params", _Room),
        ("llama_model_load_from_file", pointer, ctypes.c_char_p, _Room),
        ("llama_init_from_model", pointer, pointer, _Room),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", number, pointer),
        ("llama_batch_init", _Batch, number, number, number),
        ("llama_batch_free", None, _Batch),
        ("llama_decode", number, pointer, _Batch),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), pointer),
        ("llama_free", None, pointer),
        ("llama_model_free", None, pointer),
        ("llama_log_set", None, _LOG, pointer),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, list(arguments)
    found.llama_tokenize.argtypes = [pointer, ctypes.c_char_p, number, ctypes.POINTER(number), number]
    found.llama_tokenize.argtypes += [ctypes.c_bool, ctypes.c_bool]
    found.llama_log_set(_note, None)
    found.llama_backend_init()
    return found


class Llama:
    """A model loaded by llama.cpp on one thread of the processor; the first of several files names the others."""

    def __init__(self, path: Path, *, exact: bool = True, context: int = 512) -> None:
        self._lib, self._context = library(), None
        _said.clear()
        params = self._lib.llama_model_default_params()
        params.set(16, 0, -1)  # layers on an accelerator
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise LlamaError(_last_words())
        params = self._lib.llama_context_default_params()
        params.set(0, context, 512)
        params.set(4, context, 2048)  # tokens at a time
        params.set(8, context, 512)
        params.set(28, 1, 4)  # threads
        params.set(32, 1, 4)
        if exact:
            params.set(52, 0, -1)  # flash attention
            params.set(104, _F32, _F16)  # the cache's keys
            params.set(108, _F32, _F16)
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            self.close()
            raise LlamaError(_last_words())
        self._vocab = self._lib.llama_model_get_vocab(self._model)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return int(self._lib.llama_vocab_n_tokens(self._vocab))

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits [tokens, vocabulary] of one text, once per model: its tokens stay in the cache."""
        count = len(tokens)
        batch = self._lib.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for at, token in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, 1
        status = self._lib.llama_decode(self._context, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise LlamaError(_last_words())
        found = self._lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (count, self.vocab_size)).copy()

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of the tokens of a text, with none put before it but those that the file asks for."""
        data = text.encode()
        room = (ctypes.c_int32 * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), room, len(room), special, special)
        return list(room[:count])

    def close(self) -> None:
        """Free what it holds."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _last_words() -> str:
    return "".join(_said)[-800:]
