"""What a clock and the machine say of steps: for the people who ran them, and in no record of the output.

A record is the same bytes for the same inputs. So a step that measures its time or memory puts that under `MEASURED`,
beside what it found; the journal keeps both, and the two part here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["MEASURED", "measured", "recorded"]

MEASURED: Final = "measured"


def recorded(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what steps found, for the record."""
    return {key: value for key, value in facts.items() if key != MEASURED}


def measured(facts: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return what was measured of steps, one entry each."""
    found = facts.get(MEASURED)
    return tuple(each for each in found if isinstance(each, dict)) if isinstance(found, list) else ()
