"""Reading what `shardxform evaluate` printed as JSON, checked before it is published."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from shardxform.base.strict_json import JsonError, parse_object
from shardxform.calibration.options import MAX_SOURCES, is_source
from shardxform.checkpoint.identity import Identity, identify, names_of
from shardxform.checkpoint.table import Checkpoint
from shardxform.errors import PlanError
from shardxform.publish.card.facts import Data, Evaluation
from shardxform.publish.card.record import data_of, number, section, text, whole

__all__ = ["read_evaluation"]

_MAX_BYTES: Final = 16 << 20


def read_evaluation(path: Path, checkpoint: Checkpoint, origins: Sequence[Identity] = ()) -> Evaluation:
    """Read one evaluation.

    Args:
        path: what `evaluate --json` printed.
        checkpoint: what it must be of.
        origins: what that was made from, directly or by way of another; its reference must be one of them.

    Raises:
        PlanError: it cannot be read, is no evaluation, or not one of this checkpoint with these values, or was held
            against something else than its source.
        CheckpointError: a shard cannot be read.

    """
    value = _object(path)
    data = data_of(section(value, "data"))
    if data is None:
        raise _malformed(path, "data")
    found = _figures(path, value, data)
    errors, sources = _errors(path, section(value, "against")), _sources(path, value, data)
    _refuse_other(path, value, checkpoint)
    of_source = _refuse_other_reference(path, section(value, "against"), checkpoint, origins)
    return replace(found, block_errors=errors, sources=sources, of_source=of_source)


def _refuse_other(path: Path, value: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse figures of another checkpoint, or that do not say of which values they are."""
    measured = Identity.from_dict(value.get("identity"))
    if measured is None:
        why = "says nothing of the values that it is of, as earlier versions did not" if "fingerprint" in value else ""
        raise PlanError(f"{path}: {why or 'identity: missing or malformed'}; evaluate {checkpoint.where} again")
    here = identify(checkpoint)
    where = measured.difference(here, names_of(checkpoint.shards))
    if not where and not measured.is_comparable(here):
        where = "it was read in another way, so that its values cannot be compared"
    if where:
        raise PlanError(f"{path}: an evaluation of another checkpoint than {checkpoint.where}: {where}")


def _refuse_other_reference(
    path: Path, against: Mapping[str, Any], checkpoint: Checkpoint, origins: Sequence[Identity]
) -> bool:
    """Refuse a reference that is none of the origins: its figures would not say what making the output has cost.

    Returns:
        whether it is one of them; where that is not recorded, or not comparable, nobody knows.

    """
    reference = Identity.from_dict(against.get("identity"))
    if reference is None or not origins:
        return False
    where = [reference.difference(origin) for origin in origins]
    if all(where):
        raise PlanError(
            f"{path}: its reference is not what {checkpoint.where} was made from: {where[0]};"
            f" evaluate it again, --against its source"
        )
    return any(not told and reference.is_comparable(origin) for told, origin in zip(where, origins, strict=True))


def _figures(path: Path, value: Mapping[str, Any], data: Data, source: str = "") -> Evaluation:
    """The figures of an evaluation, or of one source in it."""
    windows, tokens = whole(value, "windows"), whole(value, "tokens")
    if not windows or not tokens:
        raise _malformed(path, "windows" if not windows else "tokens")
    against = section(value, "against")
    top1 = _known(path, against, "top1_agreement")
    if top1 is not None and top1 > 1:
        raise PlanError(f"{path}: top1_agreement: expected a share from 0 to 1, found {top1}")
    return Evaluation(
        data=data,
        windows=windows,
        tokens=tokens,
        perplexity=_known(path, value, "perplexity"),
        perplexity_error=_error(path, value, "perplexity_standard_error"),
        reference=_known(path, against, "perplexity") if against else None,
        ratio_error=_error(path, against, "perplexity_ratio_standard_error"),
        kl=_known(path, against, "kl"),
        kl_error=_error(path, against, "kl_standard_error"),
        top1=top1,
        top1_error=_error(path, against, "top1_standard_error"),
        dtype=text(value, "dtype"),
        source=source,
    )


def _sources(path: Path, value: Mapping[str, Any], data: Data) -> tuple[Evaluation, ...]:
    """The figures of every source, in the order of the file."""
    listed = value.get("sources", {})
    if not isinstance(listed, dict) or len(listed) > MAX_SOURCES or not all(map(is_source, listed)):
        raise PlanError(f"{path}: sources: expected at most {MAX_SOURCES} names, each with its figures")
    return tuple(_figures(path, section(listed, name), data, name) for name in listed)


def _malformed(path: Path, what: str) -> PlanError:
    return PlanError(f"{path}: {what}: missing or malformed; expected what `shardxform evaluate` prints as JSON")


def _object(path: Path) -> Mapping[str, Any]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise PlanError(f"{path}: expected a file")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise PlanError(f"{path}: more than {_MAX_BYTES} bytes, which is no evaluation")
        return parse_object(data)
    except OSError as e:
        raise PlanError(f"{path}: {e.strerror}") from e
    except JsonError as e:
        raise PlanError(f"{path}: {e}") from e


def _known(path: Path, value: Mapping[str, Any], key: str) -> float | None:
    """A figure; None where the evaluation says that it is not finite, or has none."""
    if value.get(key) is None:
        return None
    found = number(value, key)
    if found is None:
        raise PlanError(f"{path}: {key}: expected a number, found {str(value[key])[:60]!r}")
    return found


def _error(path: Path, value: Mapping[str, Any], key: str) -> float | None:
    """A standard error; None of a single window, and in evaluations of earlier versions."""
    found = _known(path, value, key)
    if found is not None and found < 0:
        raise PlanError(f"{path}: {key}: expected no negative number, found {found}")
    return found


def _errors(path: Path, against: Mapping[str, Any]) -> tuple[float | None, ...]:
    listed = against.get("block_errors", [])
    if not isinstance(listed, list):
        raise PlanError(f"{path}: block_errors: expected a list")
    return tuple(_known(path, {"block_errors": error}, "block_errors") for error in listed)
