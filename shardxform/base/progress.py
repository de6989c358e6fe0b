"""What a run says of itself while it runs: how far it is, and the memory it took."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["OnProgress", "Progress", "Unit", "peak_rss_bytes"]

Unit = Literal["bytes", "tokens", "work"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; `resumed` of what is done stems from an earlier run, and `at` is where it goes on, if known.

    Tokens are counted once for every block that they went through; work of several kinds is shares of the whole.
    """

    done: int
    total: int
    resumed: int
    unit: Unit = "bytes"
    at: str = ""


OnProgress = Callable[[Progress], None]


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes; 0 where the platform does not tell."""
    with contextlib.suppress(OSError):  # Linux: unlike ru_maxrss, not inherited from the parent across exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
