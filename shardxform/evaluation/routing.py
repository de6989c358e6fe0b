"""How a router's choices change: which experts its tokens go to, before and after.

Both models see the same text, each on its own chain. What the original router sent to experts that are gone must go to
those that stay; whether it spreads over them as their own tokens do, or floods a few, is what the shift says.
"""

# E: experts of the checkpoint, which are those kept of the reference's.

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from shardxform.base.strict_json import Fields
from shardxform.checkpoint.history import steps_of
from shardxform.checkpoint.identity import Identity, identify
from shardxform.checkpoint.record import PROVENANCE, RecordError, read_record
from shardxform.checkpoint.table import Checkpoint

__all__ = ["Load", "kept_ids", "load_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One MoE layer: tokens that went to each expert.

    Attributes:
        keep: the experts' ids in the reference, ascending.
        tested: tokens of each, in the checkpoint.
        reference: tokens of each, in the reference.
        pruned: tokens that the reference sent to experts that are gone, each counted for every one of them.

    """

    keep: tuple[int, ...]
    tested: tuple[int, ...]
    reference: tuple[int, ...]
    pruned: int

    @property
    def lost(self) -> float:
        """Share of the reference's choices that fell on experts that are gone."""
        total = sum(self.reference) + self.pruned
        return self.pruned / total if total else 0.0

    @property
    def shares(self) -> tuple[tuple[float, float], ...]:
        """Of each expert its share of all choices, in the reference among the kept ones, and in the checkpoint."""
        before, after = sum(self.reference) or 1, sum(self.tested) or 1
        return tuple((old / before, new / after) for old, new in zip(self.reference, self.tested, strict=True))

    @property
    def moved(self) -> float:
        """Share of the choices that fall on other kept experts than the reference's shares have it: total variation."""
        return 0.5 * math.fsum(abs(new - old) for old, new in self.shares)

    @property
    def even(self) -> tuple[float, float]:
        """As how many equally busy experts they are used, before and after: the exponential of the entropy."""
        before, after = zip(*self.shares, strict=True)
        return _perplexity(before), _perplexity(after)


def _perplexity(shares: Sequence[float]) -> float:
    return math.exp(-math.fsum(share * math.log(share) for share in shares if share > 0))


def load_of(
    tested: Sequence[int], reference: Sequence[int], layer: int, keep: Mapping[int, Sequence[int]]
) -> Load | None:
    """Put the counts of a layer side by side; None where `keep` does not fit them."""
    ids = tuple(keep[layer]) if layer in keep else tuple(range(len(reference)))
    if len(ids) != len(tested) or not ids or max(ids) >= len(reference):
        return None
    kept = tuple(reference[expert] for expert in ids)
    return Load(keep=ids, tested=tuple(tested), reference=kept, pruned=sum(reference) - sum(kept))


def kept_ids(checkpoint: Checkpoint, reference: Checkpoint) -> Mapping[int, tuple[int, ...]] | None:
    """Layer -> ids of the reference's experts that a checkpoint has, as its record says; empty where it has all.

    None where nothing links the two: experts of one number need not be the same ones.

    Raises:
        CheckpointError: a shard cannot be read.

    """
    record = read_record(checkpoint.file(PROVENANCE))
    if record is None:
        return None if read_record(reference.file(PROVENANCE)) else {}
    here = identify(reference)
    with contextlib.suppress(RecordError):
        steps = steps_of(record)
        for first, step in enumerate(steps):
            source = Identity.from_dict(step.get("source"))
            if source is not None and not source.difference(here):
                return _kept_through(steps[first:])
    return None


def _kept_through(steps: Sequence[Fields]) -> Mapping[int, tuple[int, ...]] | None:
    """Ids that are left after steps, one after the other, in the numbering of the first; None where these are none."""
    left: dict[int, tuple[int, ...]] = {}
    for step in steps:
        keep = step.section("manifest", "keep")
        for layer, ids in keep.items():
            if not _is_list(layer, ids):
                return None
            known, wanted = left.get(int(layer)), tuple(cast(list[int], ids))
            if known and max(wanted, default=0) >= len(known):
                return None
            left[int(layer)] = tuple(known[one] for one in wanted) if known else wanted
    return left


def _is_list(layer: object, ids: object) -> bool:
    whole = isinstance(ids, list) and all(type(each) is int and each >= 0 for each in ids)
    return whole and isinstance(layer, str) and layer.isdecimal()
