"""A family that is not of this package, made of a text that is executed, or of an entry point.

A file is executed, as any Python file that is run is; it is one that the user named, and nothing else is looked for.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

from shardxform.errors import FamilyError
from shardxform.model.families.base import COUNT_KEYS, Family, Template

__all__ = ["Outside", "family_of_text", "of_entry_point"]

_NAME: Final = "FAMILY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """A family that is not of this package.

    Attributes:
        family: what it says.
        origin: what people call it: the name of its file, or `package.module:FAMILY`.
        sha256: of the text that says it; all that is kept between two commands is bound to it.
        text: of a file, so that workers have it too; empty for an entry point.
        path: of the file, as it was named.

    """

    family: Family
    origin: str
    sha256: str
    text: str = ""
    path: str = ""

    @property
    def model_types(self) -> tuple[str, ...]:
        """What it claims to know."""
        return tuple(dict.fromkeys(wrapper.model_type for wrapper in self.family.wrappers))


def family_of_text(text: str, origin: str, where: str = "") -> Outside:
    """Execute the text of a file; see `read_file`."""
    where = where or origin
    digest = hashlib.sha256(text.encode()).hexdigest()
    module = ModuleType(f"shardxform_family_{digest[:16]}")
    module.__file__ = where
    sys.modules[module.__name__] = module  # as dataclasses want it
    try:
        exec(compile(text, where, "exec"), vars(module))  # noqa: S102 - the user named it
    except (Exception, SystemExit) as e:
        raise FamilyError(f"{where}: {_line(e, where)}") from e
    return Outside(family=_checked(vars(module), where), origin=origin, sha256=digest, text=text, path=where)


def of_entry_point(model_type: str, point: Any) -> Outside:  # noqa: ANN401
    """Load the family of an entry point.

    Raises:
        FamilyError: it cannot be imported, or is no family of that type.

    """
    where = f"{point.value} of {point.dist.name}"
    try:
        found = point.load()
        text = _text_of(point.module)
    except (Exception, SystemExit) as e:
        raise FamilyError(f"{where}: {_line(e, where)}") from e
    family = _checked({_NAME: found}, where)
    if model_type not in {wrapper.model_type for wrapper in family.wrappers}:
        raise FamilyError(f"{where}: claims model_type '{model_type}', but no wrapper of it has that")
    return Outside(family=family, origin=point.value, sha256=hashlib.sha256(text.encode()).hexdigest())


def _checked(names: dict[str, object], where: str) -> Family:
    if _NAME not in names:
        raise FamilyError(f"{where}: no {_NAME} in it; see docs/adding-a-family.md")
    family = names[_NAME]
    if not isinstance(family, Family):
        raise FamilyError(f"{where}: {_NAME}: expected a Family, found {type(family).__name__}")
    try:
        fault = next(_faults(family), "")
    except (AttributeError, TypeError) as e:
        raise FamilyError(f"{where}: {_NAME}: {_line(e, where)}") from e
    if fault:
        raise FamilyError(f"{where}: {_NAME}: {fault}")
    return family


def _faults(family: Family) -> Iterator[str]:
    """What does not hang together, as the tests of this package want it of its own."""
    if not family.wrappers:
        yield "no wrappers"
    if not family.count_keys or not set(family.count_keys) <= COUNT_KEYS:
        yield f"count_keys: expected some of {', '.join(sorted(COUNT_KEYS))}, found {family.count_keys}"
    if family.moe and family.moe not in family.conditions:
        yield f"moe: no condition {family.moe!r}"
    for template in _templates(family):
        symbols = family.vision_symbols if template.role == "vision" else family.symbols
        for symbol in re.findall(r"[A-Z]+", template.shape):
            if symbol not in ("E", *symbols):
                yield f"'{template.name}': no symbol {symbol!r}"
        if template.when and template.when not in family.conditions:
            yield f"'{template.name}': no condition {template.when!r}"


def _templates(family: Family) -> Iterator[Template]:
    yield from (*family.root, *family.block, *family.vision)
    if family.mtp:
        yield from (*family.mtp.layer, *family.mtp.root)


def _line(error: BaseException, where: str) -> str:
    """What failed, and in which line of the file."""
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    at = error.__traceback__
    while at is not None and line is None:
        line = at.tb_lineno if at.tb_frame.f_code.co_filename == where else None
        at = at.tb_next
    said = " ".join(str(getattr(error, "msg", None) or error).split())
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}{f': {said}' if said else ''}"


def _text_of(module: str) -> str:
    """The text of a module that is imported."""
    loader: Any = sys.modules[module].__loader__
    return str(loader.get_source(module))
