"""JSON from strangers: UTF-8 only, no duplicate keys, no NaN, no bottomless nesting; one error type.

config.json alone may hold Infinity and NaN as Python writes them, which are no JSON: transformers reads them there.
`dumps` writes the compact form that the reference safetensors writer gives a header, `pretty` what people read.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NoReturn

__all__ = [
    "JsonError",
    "compact_config",
    "config_text",
    "dumps",
    "parse_config",
    "parse_object",
    "pretty",
    "pretty_strings",
]


MAX_DEPTH: Final = 100
"""Levels of nesting that are read; no config comes near it."""


class JsonError(ValueError):
    """The text is not the JSON object that was expected; the message says why."""


_CONSTANTS: Final = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
"""One object each, so that containers that hold the same are equal."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse `data` as one JSON object.

    Raises:
        JsonError: not UTF-8, not JSON, not an object, a duplicate key, a non-finite number, nested too deeply.

    """
    return _parsed(data, _no_constant)


def parse_config(data: bytes) -> dict[str, Any]:
    """Parse a config.json, which may hold Infinity and NaN; `config_text` writes them so again.

    Raises:
        JsonError: anything else that `parse_object` refuses.

    """
    return _parsed(data, _CONSTANTS.__getitem__)


def compact_config(config: object) -> str:
    """Give a config as `dumps` does, with Infinity and NaN where it holds them."""
    return json.dumps(config, separators=(",", ":"), ensure_ascii=False)


def config_text(config: object) -> str:
    """Give a config as people read it, with Infinity and NaN where it holds them."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _parsed(data: bytes, constant: Callable[[str], float]) -> dict[str, Any]:
    if data.startswith(codecs.BOM_UTF8):
        raise JsonError(
            "not JSON: it begins with a byte-order mark, which no client takes; save it as UTF-8 without BOM"
        )
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        _check_depth_and_text(value, has_escapes=b"\\u" in data)
    except UnicodeDecodeError as e:
        raise JsonError(f"not UTF-8 at byte {e.start}") from e
    except RecursionError as e:
        raise JsonError("nested too deeply") from e
    except json.JSONDecodeError as e:
        raise JsonError(f"not JSON: {e.msg} at line {e.lineno} column {e.colno}") from e
    except ValueError as e:  # an integer of thousands of digits
        raise e if isinstance(e, JsonError) else JsonError(f"not JSON: {e}") from e
    if not isinstance(value, dict):
        raise JsonError(f"expected an object, found {type(value).__name__}")
    return value


def dumps(value: object, *, infinity: bool = False) -> str:
    """Compact JSON, keys in the order given, non-ASCII text kept."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=infinity)


def pretty(value: object, *, infinity: bool = False) -> str:
    """JSON as people read it: indented by 2, keys in the order given, a newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=infinity) + "\n"


def pretty_strings(value: dict[str, str], level: int) -> str:
    """What `pretty` gives an object of strings that lies `level` levels deep, in a tenth of the time."""
    if not value:
        return "{}"
    outer = "\n" + "  " * level
    inner = json.dumps(value, separators=(f",{outer}  ", ": "), ensure_ascii=False)
    return f"{{{outer}  {inner[1:-1]}{outer}}}"


def _unique(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"duplicate key {twice!r}")
    return out


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"{text} is beyond a double")
    return value


def _integer(text: str) -> int:
    if text == "-0":  # other readers take it for a float
        raise JsonError("-0 is no integer")
    return int(text)


def _check_depth_and_text(value: object, has_escapes: bool) -> None:
    """Refuse what parses but breaks what reads it: deep nesting, and halves of surrogate pairs."""
    level: list[object] = [value]
    for depth in itertools.count():
        if has_escapes:
            _refuse_halves(item for item in level if isinstance(item, str))
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return
        if depth == MAX_DEPTH:
            raise JsonError("nested too deeply")
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
            if has_escapes or isinstance(child, dict | list)
        ]
        if has_escapes:
            level.extend(key for item in containers if isinstance(item, dict) for key in item)


def _refuse_halves(texts: Iterable[str]) -> None:
    """Refuse halves of surrogate pairs; all texts are looked at at once, since a tokenizer has half a million."""
    found = list(texts)
    try:
        "".join(found).encode("utf-8")
    except UnicodeEncodeError as e:
        bad = next(text for text in found if not _is_whole(text))
        raise JsonError(f"{bad!r} holds half a surrogate pair") from e


def _is_whole(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _no_constant(text: str) -> NoReturn:
    raise JsonError(f"{text} is not JSON")


class Fields:
    """An object out of JSON from strangers: its values are of the type that is asked for, or not there."""

    __slots__ = ("_values",)

    def __init__(self, value: object) -> None:
        """Take an object; of anything else nothing is there."""
        self._values: Mapping[str, object] = value if isinstance(value, Mapping) else {}

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def items(self) -> Iterable[tuple[str, object]]:
        """Return all keys and values as they are."""
        return self._values.items()

    def get(self, key: str) -> object:
        """Return a value as it is; None where it is not there."""
        return self._values.get(key)

    def section(self, *path: str) -> Fields:
        """Return the object at `path`; empty when there is none."""
        found = self
        for key in path:
            found = Fields(found.get(key))
        return found

    def sections(self, key: str) -> tuple[Fields, ...]:
        """Return the objects of a list."""
        found = self.get(key)
        return tuple(map(Fields, found)) if isinstance(found, list) else ()

    def text(self, key: str) -> str:
        """Return a text without control characters, or an empty one."""
        found = self.get(key)
        return found if isinstance(found, str) and found.isprintable() else ""

    def texts(self, key: str) -> tuple[str, ...]:
        """Return the texts of a list."""
        found = self.get(key)
        listed = found if isinstance(found, list | tuple) else ()
        return tuple(item for item in listed if isinstance(item, str) and item)

    def whole(self, key: str) -> int | None:
        """Return an integer that counts something."""
        found = self.get(key)
        return found if type(found) is int and found >= 0 else None

    def number(self, key: str) -> float | None:
        """Return a finite number."""
        found = self.get(key)
        try:
            out = float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan
        except OverflowError:  # an integer of hundreds of digits
            return None
        return out if math.isfinite(out) else None

    def flag(self, key: str) -> bool:
        """Return whether something is said to be so."""
        return self.get(key) is True
