"""An output that is only planned, held to what verification will say of its names, shapes and config when it is made.

What a command would write and then call unsound is refused before its first byte, and before the first hour of work.
"""

from __future__ import annotations

from collections.abc import Collection

from shardxform.base.collecting import uncollected
from shardxform.base.strict_json import parse_object
from shardxform.base.tensors import TensorRef
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import PlanError
from shardxform.plan.plan import Plan
from shardxform.verification.findings import Findings
from shardxform.verification.structure import check_structure

__all__ = ["refuse_unsound"]


@uncollected()
def refuse_unsound(plan: Plan, but: Collection[str] = ()) -> None:
    """Refuse a plan whose output would not be sound, by what headers and config tell.

    Args:
        plan: of any command.
        but: codes of problems that are wanted, such as a spelling for old clients.

    Raises:
        PlanError: says what verification would find first, and how much more.

    """
    specs = (entry.spec for shard in plan.shards for entry in shard.entries)
    tensors = {spec.name: TensorRef(spec, ()) for spec in specs}
    planned = Checkpoint(plan.source, parse_object(plan.config), tensors, ())
    findings = Findings()
    check_structure(planned, frozenset(), findings, parts_too=plan.command == "prune")  # others make parts themselves
    found = [problem for problem in findings.problems if problem.code not in but]
    if found:
        first, more = found[0], len(found) - 1
        others = f" (and {more} more)" if more else ""
        raise PlanError(
            f"{plan.origin}: its output would not be sound: {first.where}: {first.message}{others};"
            f" see `shardxform verify {plan.origin}`"
        )
