"""A keep manifest as the text of its file: JSON in which every list of plain values is one line.

Forty layers of 128 ids are then forty lines, which people can read and tools can compare; the content is that of
`Manifest.to_dict`. Pure: nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from shardxform.ask.manifest import Manifest

__all__ = ["manifest_text"]

_INDENT: Final = "  "


def manifest_text(manifest: Manifest) -> str:
    """The manifest in our own form, keys in the order of `Manifest.to_dict`, with a newline at the end."""
    return _render(manifest.to_dict(), "") + "\n"


def _render(value: object, indent: str) -> str:
    """`value` as JSON whose lines after the first are indented by `indent`."""
    if isinstance(value, Mapping) and value:
        return _block(
            "{}", [f"{_plain(key)}: {_render(item, indent + _INDENT)}" for key, item in value.items()], indent
        )
    if isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        return _block("[]", [_render(item, indent + _INDENT) for item in value], indent)
    return _plain(value)


def _block(brackets: str, lines: list[str], indent: str) -> str:
    inner = indent + _INDENT
    return f"{brackets[0]}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{brackets[1]}"


def _plain(value: Any) -> str:  # noqa: ANN401
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
