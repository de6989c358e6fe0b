"""Calibration and held-out data: files or a hub data set as windows of token ids, the same for the same inputs.

`load_windows` reads what `DataOptions` names with a checkpoint's own tokenizer; `Windows` is what it gives. Files are
streamed, the network is used for hub data sets alone, and no code of a checkpoint or data set is run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardxform.calibration.options import DataOptions, Windows

if TYPE_CHECKING:
    from shardxform.calibration.windows import load_windows

__all__ = ["DataOptions", "Windows", "load_windows"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import `load_windows` on first use: the options alone need neither numpy nor a tokenizer."""
    if name != "load_windows":
        raise AttributeError(f"module 'shardxform.calibration' has no attribute {name!r}")
    from shardxform.calibration.windows import load_windows

    return load_windows
