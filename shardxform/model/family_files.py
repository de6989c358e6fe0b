"""Files that say what a family is: read for one command, and carried to its workers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from shardxform.base.file_system import why_not
from shardxform.errors import FamilyError
from shardxform.model.families import installed, use
from shardxform.model.families.outside import Outside, family_of_text

__all__ = ["Carried", "carried", "load_files", "read_file", "restore"]


def load_files(paths: Iterable[Path]) -> None:
    """Have the families of these files known, and of no others.

    Raises:
        FamilyError: see `read_file` and `families.use`.

    """
    use([read_file(path) for path in paths])


def read_file(path: Path) -> Outside:
    """Execute a file, and take its FAMILY.

    Raises:
        FamilyError: it is missing, fails, or gives no family that hangs together.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise FamilyError(f"{path}: expected Python in UTF-8") from e
    except OSError as e:
        raise FamilyError(f"{path}: {why_not(path, e)}") from e
    return family_of_text(text, path.name, str(path))


# -- for workers -------------------------------------------------------------------------------------------------------

Carried = tuple[str, str, str, tuple[str, ...]]
"""What a worker needs to know a family: its origin, digest, text, and the model types that it claims."""


def carried(families: Iterable[Outside]) -> tuple[Carried, ...]:
    """Families as they are sent to workers: as text, since conditions are functions."""
    return tuple((each.origin, each.sha256, each.text, each.model_types) for each in families)


def restore(families: Iterable[Carried]) -> None:
    """Know on a worker what the driver knows.

    Raises:
        FamilyError: an installed package is missing here, or is another.

    """
    named = []
    for origin, digest, text, model_types in families:
        if text:
            named.append(family_of_text(text, origin))
            continue
        found = [each for each in map(installed, model_types) if each]
        if not found or found[0].sha256 != digest:
            raise FamilyError(f"{origin}: {'another' if found else 'not installed'} here; install the same everywhere")
    use(named)
