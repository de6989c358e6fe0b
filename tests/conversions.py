"""auto-round changes how transformers loads a family, for the whole process, when it loads one; this takes it back."""

from __future__ import annotations

import sys
from typing import Any

_unchanged: list[dict[str, Any]] = []  # made once: it takes a quarter of a second


def forget_changes() -> None:
    """Give transformers its registry of conversions as it builds it, if any was changed."""
    registry: Any = sys.modules.get("transformers.conversion_mapping")
    if getattr(registry, "USER_REGISTERED_MAPPINGS", None):  # from 5.14 on
        registry.USER_REGISTERED_MAPPINGS.clear()
        if not _unchanged:
            _unchanged.append(registry._build_checkpoint_conversion_mapping())
        registry._checkpoint_conversion_mapping_cache = dict(_unchanged[0])  # it gives copies of its entries
