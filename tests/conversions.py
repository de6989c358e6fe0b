"""auto-round changes how transformers loads a family, for the whole process, when it loads one; this takes it back."""

from __future__ import annotations

import sys
from typing import Any


def forget_changes() -> None:
    """Let transformers build its registry of conversions again, if any was changed."""
    registry: Any = sys.modules.get("transformers.conversion_mapping")
    if getattr(registry, "USER_REGISTERED_MAPPINGS", None):  # from 5.14 on
        registry.USER_REGISTERED_MAPPINGS.clear()
        registry._checkpoint_conversion_mapping_cache = None
