"""auto-round changes how transformers loads a family, for the whole process, when it loads one; this takes it back."""

from __future__ import annotations

import sys


def forget_changes() -> None:
    """Let transformers build its registry of conversions again, if any was changed."""
    registry = sys.modules.get("transformers.conversion_mapping")
    if registry is not None and registry.USER_REGISTERED_MAPPINGS:
        registry.USER_REGISTERED_MAPPINGS.clear()
        registry._checkpoint_conversion_mapping_cache = None
