"""Prune, quantize and verify huge Mixture-of-Experts checkpoints on a machine that could never load them.

    from shardxform import Checkpoint, Manifest, Scheme, plan_quantize, run

    source = Checkpoint.open("Qwen3.5-35B-A3B")
    plan = plan_quantize(source, Scheme.preset("W4A16"), Manifest.load("keep.json"))
    print(plan.nbytes, plan.notes)
    run(plan, "Qwen3.5-35B-A3B-REAP-128-W4A16")

Planning is pure; `run` is the only function that writes, and it goes on where an earlier run of the same plan stopped.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shardxform.checkpoint import Checkpoint
    from shardxform.errors import ShardxformError
    from shardxform.manifest import Manifest
    from shardxform.plan import Plan
    from shardxform.progress import Progress
    from shardxform.prune import ViewOptions, plan_prune
    from shardxform.quantize.convert import plan_convert
    from shardxform.quantize.planner import plan_quantize
    from shardxform.runner import Report, RunOptions, run
    from shardxform.scheme import Scheme
    from shardxform.tensors import TensorSpec
    from shardxform.verification import VerifyReport, verify

__all__ = [
    "Checkpoint",
    "Manifest",
    "Plan",
    "Progress",
    "Report",
    "RunOptions",
    "Scheme",
    "ShardxformError",
    "TensorSpec",
    "VerifyReport",
    "ViewOptions",
    "__version__",
    "plan_convert",
    "plan_prune",
    "plan_quantize",
    "run",
    "verify",
]

__version__ = "0.1.0"

_HOMES: Final = {
    "Checkpoint": "checkpoint",
    "Manifest": "manifest",
    "Plan": "plan",
    "Progress": "progress",
    "Report": "runner",
    "RunOptions": "runner",
    "Scheme": "scheme",
    "ShardxformError": "errors",
    "TensorSpec": "tensors",
    "VerifyReport": "verification",
    "ViewOptions": "prune",
    "plan_convert": "quantize.convert",
    "plan_prune": "prune",
    "plan_quantize": "quantize.planner",
    "run": "runner",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name on first use, so that `shardxform --help` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shardxform' has no attribute {name!r}")
    return getattr(importlib.import_module(f"shardxform.{_HOMES[name]}"), name)
