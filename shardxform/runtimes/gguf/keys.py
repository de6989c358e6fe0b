"""Keys of a GGUF file: what the `gguf` package's writer is told, recorded, with the types that it gives them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from shardxform.errors import SchemeError

__all__ = ["Key", "Recorder"]


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a GGUF file.

    Attributes:
        name: in full.
        type: name of its type, as `GGUFValueType` has it: `UINT32`, `STRING`, `ARRAY`...
        value: a number, a string, or a list of one kind.
        of: type of the elements of an array, else empty.

    """

    name: str
    type: str
    value: Any
    of: str = ""


_RANGES: Final = {"UINT8": 8, "UINT16": 16, "UINT32": 32, "UINT64": 64}


class Recorder:
    """The package's own writer, which writes nothing here, and what it was told."""

    def __init__(self, name: str, gguf: Any) -> None:  # noqa: ANN401
        self.gguf = gguf
        self.name = name
        self.writer = gguf.GGUFWriter(path=None, arch=name)

    def keys(self) -> list[Key]:
        """All keys, in order.

        Raises:
            SchemeError: a value does not fit the type of its key.

        """
        out: list[Key] = []
        for data in self.writer.kv_data:
            for name, entry in data.items():
                value, of = entry.value, entry.sub_type
                if entry.type.name == "ARRAY":
                    of = of or self.gguf.GGUFValueType.get_type(value[0])
                self._refuse_misfit(name, entry.type.name, value)
                out.append(Key(name, entry.type.name, value, of.name if of else ""))
        return out

    def _refuse_misfit(self, name: str, kind: str, value: object) -> None:
        fits = True
        if kind in _RANGES:
            fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << _RANGES[kind]
        elif kind == "FLOAT32":
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        elif kind in ("STRING", "BOOL"):
            fits = isinstance(value, str if kind == "STRING" else bool)
        if not fits:
            raise SchemeError(f"config.json: {value!r} cannot be {name}, a {kind} of GGUF")
