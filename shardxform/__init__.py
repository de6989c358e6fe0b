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
    from shardxform.ask.manifest import Manifest
    from shardxform.base.progress import Progress
    from shardxform.base.tensors import TensorSpec
    from shardxform.checkpoint.table import Checkpoint
    from shardxform.errors import ShardxformError
    from shardxform.execution.runner import Report, RunOptions, run
    from shardxform.formats.scheme import Scheme
    from shardxform.plan.convert import plan_convert
    from shardxform.plan.plan import Plan
    from shardxform.plan.prune import plan_prune
    from shardxform.plan.quantize import plan_quantize
    from shardxform.plan.view import ViewOptions
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
    "Checkpoint": "checkpoint.table",
    "Manifest": "ask.manifest",
    "Plan": "plan.plan",
    "Progress": "base.progress",
    "Report": "execution.runner",
    "RunOptions": "execution.runner",
    "Scheme": "formats.scheme",
    "ShardxformError": "errors",
    "TensorSpec": "base.tensors",
    "VerifyReport": "verification",
    "ViewOptions": "plan.prune",
    "plan_convert": "plan.convert",
    "plan_prune": "plan.prune",
    "plan_quantize": "plan.quantize",
    "run": "execution.runner",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import a public name on first use, so that help is shown at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shardxform' has no attribute {name!r}")
    return getattr(importlib.import_module(f"shardxform.{_HOMES[name]}"), name)
